//! Ways to damage a file.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::RngCore;
use serde_json::{Value, json};

/// A seed with one to four changes: of its JSON where it is JSON, else of its bytes.
pub fn mutated(rng: &mut ChaCha20Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut input = seeds[below(rng, seeds.len())].clone();
    for _ in 0..=below(rng, 4) {
        // A safetensors file is a length, JSON and data.
        let header = input.first_chunk::<8>().map(|length| u64::from_le_bytes(*length));
        let header = header.and_then(|length| input.get(8..usize::try_from(length).ok()?.checked_add(8)?));
        match (below(rng, 4), header.map(<[u8]>::to_vec)) {
            (0, _) => bytes(rng, &mut input, seeds),
            (_, Some(header)) => {
                let changed = json_text(rng, &header).unwrap_or(header.clone());
                let data = input.split_off(8 + header.len());
                input = [&(changed.len() as u64).to_le_bytes()[..], &changed, &data].concat();
            }
            (_, None) => match json_text(rng, &input) {
                Some(changed) => input = changed,
                None => bytes(rng, &mut input, seeds),
            },
        }
    }
    input
}

fn below(rng: &mut ChaCha20Rng, n: usize) -> usize {
    (rng.next_u64() % n.max(1) as u64) as usize
}

/// Flips, cuts, repeats, or takes a part of another seed.
fn bytes(rng: &mut ChaCha20Rng, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let place = below(rng, input.len() + 1);
    let end = place + below(rng, (input.len() - place).min(64) + 1);
    match below(rng, 6) {
        0 if place < input.len() => input[place] ^= 1 << below(rng, 8),
        1 if place < input.len() => input[place] = rng.next_u32() as u8,
        2 => input.truncate(place),
        3 => drop(input.drain(place..end)),
        4 => {
            let part = input[place..end].to_vec();
            let at = below(rng, input.len() + 1);
            input.splice(at..at, part);
        }
        _ => {
            let other = &seeds[below(rng, seeds.len())];
            let from = below(rng, other.len() + 1);
            let part = other[from..(from + 64).min(other.len())].to_vec();
            input.splice(place..end, part);
        }
    }
}

/// The JSON with one place changed; `None` for what is not JSON.
fn json_text(rng: &mut ChaCha20Rng, text: &[u8]) -> Option<Vec<u8>> {
    let mut json: Value = serde_json::from_slice(text).ok()?;
    let place = below(rng, count(&json));
    let other = nth(&mut json.clone(), &mut below(rng, count(&json)))?.clone();
    let node = nth(&mut json, &mut { place })?;
    change(rng, node, other);
    serde_json::to_vec(&json).ok()
}

fn count(json: &Value) -> usize {
    1 + match json {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum::<usize>(),
        _ => 0,
    }
}

/// The node of this number, counted from the root.
fn nth<'a>(json: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
    if *left == 0 {
        return Some(json);
    }
    *left -= 1;
    match json {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, left)),
        Value::Object(fields) => fields.values_mut().find_map(|field| nth(field, left)),
        _ => None,
    }
}

fn change(rng: &mut ChaCha20Rng, node: &mut Value, other: Value) {
    match (below(rng, 4), &mut *node) {
        (0, Value::Object(fields)) if !fields.is_empty() => {
            let key = fields.keys().nth(below(rng, fields.len())).cloned().unwrap_or_default();
            let value = fields.remove(&key).unwrap_or_default();
            // Gone, or under another name.
            if below(rng, 2) == 0 {
                fields.insert(key + "x", value);
            }
        }
        (0, Value::Array(items)) if !items.is_empty() => drop(items.remove(below(rng, items.len()))),
        (1, Value::Array(items)) => items.push(other),
        (0 | 1, Value::String(text)) => {
            let mut bytes = std::mem::take(text).into_bytes();
            let seeds = [other.to_string().into_bytes()];
            self::bytes(rng, &mut bytes, &seeds);
            *text = String::from_utf8_lossy(&bytes).into_owned();
        }
        (0 | 1, Value::Number(number)) => {
            let number = number.as_i64().unwrap_or_default();
            *node = json!(number.wrapping_add(below(rng, 7) as i64 - 3));
        }
        (2, node) => *node = other,
        (_, node) => *node = interesting(rng),
    }
}

fn interesting(rng: &mut ChaCha20Rng) -> Value {
    let all = [
        json!(null),
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(1u64 << 32),
        json!(1u64 << 63),
        json!(1e300),
        json!(-0.5),
        json!(""),
        json!("\u{0}é\u{1F600}"),
        json!([]),
        json!([[]]),
        json!({}),
        json!([1, 2, 3]),
        json!({"content": 1}),
        json!("a".repeat(5000)),
    ];
    all[below(rng, all.len())].clone()
}
