//! The header of a safetensors file: eight bytes of length, then JSON. The data follows without holes.

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::tensor::Dtype as FileDtype;
use serde_json::{Map, Value};

use super::Entry;

/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

pub(super) struct Header {
    pub tensors: Vec<(String, Entry)>,
    pub metadata: BTreeMap<String, String>,
}

/// Parses and checks the header of a whole mapped file; an error is one line without the path.
pub(super) fn parse(file: &[u8], shard: usize) -> Result<Header, String> {
    let (json, data_start) = header_bytes(file)?;
    let json: Map<String, Value> =
        serde_json::from_slice(json).map_err(|e| format!("header: expected a JSON object, got {e}"))?;
    let mut header = Header { tensors: Vec::new(), metadata: BTreeMap::new() };
    for (name, value) in &json {
        match name.as_str() {
            "__metadata__" => header.metadata = metadata(value)?,
            _ => header.tensors.push((name.clone(), entry(name, value, shard)?)),
        }
    }
    check_cover(&mut header.tensors, file.len() - data_start)?;
    for (_, entry) in &mut header.tensors {
        entry.range = data_start + entry.range.start..data_start + entry.range.end;
    }
    Ok(header)
}

/// The JSON text and where the data starts.
fn header_bytes(file: &[u8]) -> Result<(&[u8], usize), String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("header: expected at least 8 bytes, got {}", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(format!(
            "header: expected at most {MAX_HEADER_BYTES} bytes, got {length}: not safetensors"
        ));
    }
    let length = length as usize;
    let json = rest.get(..length);
    let json =
        json.ok_or_else(|| format!("truncated header: expected {length} bytes, got {}", rest.len()))?;
    Ok((json, 8 + length))
}

fn metadata(value: &Value) -> Result<BTreeMap<String, String>, String> {
    let bad = |got: &Value| format!("__metadata__: expected an object of strings, got {}", short(got));
    let map = value.as_object().ok_or_else(|| bad(value))?;
    map.iter().map(|(k, v)| Ok((k.clone(), v.as_str().ok_or_else(|| bad(v))?.to_owned()))).collect()
}

/// One tensor, its range still relative to the data.
fn entry(name: &str, value: &Value, shard: usize) -> Result<Entry, String> {
    let bad =
        |key: &str, expected: &str| format!("{name}: {key}: expected {expected}, got {}", short(&value[key]));
    let dtype: FileDtype =
        serde_json::from_value(value["dtype"].clone()).map_err(|_| bad("dtype", "a safetensors type"))?;
    let shape = sizes(&value["shape"]).ok_or_else(|| bad("shape", "a list of sizes"))?;
    let offsets = sizes(&value["data_offsets"]);
    let range = match offsets.as_deref() {
        Some([start, end]) if start <= end => *start..*end,
        _ => return Err(bad("data_offsets", "[start, end]")),
    };
    let elements = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    let bits = elements.and_then(|elements| elements.checked_mul(dtype.bitsize()));
    match bits {
        Some(bits) if bits.is_multiple_of(8) && bits / 8 == range.len() => {
            Ok(Entry { dtype, shape, shard, range })
        }
        Some(bits) => {
            let expected = bits.div_ceil(8);
            Err(format!("{name}: expected {expected} bytes for {dtype} {shape:?}, got {}", range.len()))
        }
        None => Err(format!("{name}: expected a shape that fits into memory, got {shape:?}")),
    }
}

/// Tensors, sorted by where they lie, must follow one another from the first to the last byte.
fn check_cover(tensors: &mut [(String, Entry)], data: usize) -> Result<(), String> {
    let sort_key = |range: &Range<usize>| (range.start, range.end);
    tensors.sort_by_key(|(_, entry)| sort_key(&entry.range));
    let needed = tensors.iter().map(|(_, entry)| entry.range.end).max().unwrap_or(0);
    if needed > data {
        return Err(format!("truncated: expected {needed} bytes of data, got {data}"));
    }
    let mut end = 0;
    for (name, entry) in tensors.iter() {
        let start = entry.range.start;
        if start != end {
            let what = if start < end { "overlapping tensors" } else { "hole in the data" };
            return Err(format!("{what}: expected {name} at offset {end}, got {start}"));
        }
        end = entry.range.end;
    }
    match end == data {
        true => Ok(()),
        false => Err(format!("extra bytes after the last tensor: expected {end} bytes of data, got {data}")),
    }
}

fn sizes(value: &Value) -> Option<Vec<usize>> {
    value.as_array()?.iter().map(|size| size.as_u64()?.try_into().ok()).collect()
}

fn short(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = concat!(
        r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"#,
        r#""b":{"dtype":"I32","shape":[1],"data_offsets":[4,8]}}"#
    );

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    fn one(entry: &str, data: usize) -> Vec<u8> {
        file(&format!(r#"{{"a":{entry}}}"#), &vec![0; data])
    }

    fn refusal(bytes: &[u8]) -> String {
        parse(bytes, 0).err().unwrap_or("accepted".into())
    }

    #[test]
    fn damaged_files_are_refused_in_one_line_that_says_what_was_expected() {
        let entry = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
        };
        let good = file(GOOD, &[0; 8]);
        let cases = [
            (vec![], "header: expected at least 8 bytes, got 0"),
            (good[..7].to_vec(), "header: expected at least 8 bytes, got 7"),
            (good[..20].to_vec(), "truncated header: expected 138 bytes, got 12"),
            (
                u64::MAX.to_le_bytes().to_vec(),
                "header: expected at most 100000000 bytes, got 18446744073709551615",
            ),
            (file("not json", &[]), "header: expected a JSON object, got "),
            (file("[1]", &[]), "header: expected a JSON object, got "),
            (file(r#"{"__metadata__":{"x":1}}"#, &[]), "__metadata__: expected an object of strings, got 1"),
            (good[..good.len() - 1].to_vec(), "truncated: expected 8 bytes of data, got 7"),
            (
                [&good[..], &[0]].concat(),
                "extra bytes after the last tensor: expected 8 bytes of data, got 9",
            ),
            (one(&entry("F16", "[2]", "[0,4]"), 0), "truncated: expected 4 bytes of data, got 0"),
            (one(&entry("F16", "[2]", "[4,0]"), 4), "a: data_offsets: expected [start, end], got [4,0]"),
            (one(&entry("F16", "[2]", "[0,-4]"), 4), "a: data_offsets: expected [start, end], got [0,-4]"),
            (one(&entry("F16", "[2]", "[4,8]"), 8), "hole in the data: expected a at offset 0, got 4"),
            (one(&entry("F16", "[3]", "[0,4]"), 4), "a: expected 6 bytes for F16 [3], got 4"),
            (one(&entry("F16", "[2.5]", "[0,5]"), 5), "a: shape: expected a list of sizes, got [2.5]"),
            (
                one(&entry("F16", "[4294967296,4294967296]", "[0,4]"), 4),
                "expected a shape that fits into memory",
            ),
            (one(&entry("Q7", "[2]", "[0,4]"), 4), "a: dtype: expected a safetensors type, got \"Q7\""),
            (one("[]", 0), "a: dtype: expected a safetensors type, got null"),
            (
                file(&GOOD.replace("[4,8]", "[2,6]"), &[0; 8]),
                "overlapping tensors: expected b at offset 4, got 2",
            ),
        ];
        for (bytes, expected) in cases {
            let message = refusal(&bytes);
            assert!(message.contains(expected), "expected {expected}, got {message}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
        assert_eq!(refusal(&good), "accepted");
    }
}
