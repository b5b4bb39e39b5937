//! Whether an earlier run and this one make the same artifact.

use std::hash::Hasher;

use rayon::prelude::*;
use serde_json::{Map, Value};
use twox_hash::XxHash64;

/// Everything that decides an artifact's bytes, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fingerprint(Map<String, Value>);

impl Fingerprint {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn insert(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.into(), value.into());
    }

    pub fn to_json(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// The first setting in which a stored fingerprint differs from this one, with both values.
    pub(crate) fn difference(&self, stored: &Value) -> Option<String> {
        let (place, then, now) = first_difference(Some(stored), Some(&self.to_json()))?;
        Some(format!("{}{then}, this one has {now}", place.trim_start()))
    }
}

/// The keys that lead to the first difference, and both values.
fn first_difference(then: Option<&Value>, now: Option<&Value>) -> Option<(String, String, String)> {
    if then == now {
        return None;
    }
    let (Some(Value::Object(a)), Some(Value::Object(b))) = (then, now) else {
        return Some((String::from(" "), shown(then), shown(now)));
    };
    b.keys().chain(a.keys()).find_map(|key| {
        let (place, then, now) = first_difference(a.get(key), b.get(key))?;
        Some((format!(" {key}{place}"), then, now))
    })
}

fn shown(value: Option<&Value>) -> String {
    const LONGEST: usize = 80;
    let text = value.map_or("nothing".into(), Value::to_string);
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// XXH64 (Collet 2012): to notice differences, not to resist attacks.
pub struct Hash(XxHash64);

impl Default for Hash {
    fn default() -> Self {
        Self(XxHash64::with_seed(0))
    }
}

impl Hash {
    /// A part of its own: two hashes are equal where all parts are, not only their concatenation.
    pub fn part(mut self, bytes: &[u8]) -> Self {
        self.0.write(&(bytes.len() as u64).to_le_bytes());
        self.0.write(bytes);
        self
    }

    /// A part of any size, hashed on all cores.
    pub fn large_part(self, bytes: &[u8]) -> Self {
        const BLOCK: usize = 1 << 22;
        let blocks: Vec<u64> = bytes.par_chunks(BLOCK).map(|block| XxHash64::oneshot(0, block)).collect();
        self.part(bytemuck::cast_slice(&blocks))
    }

    /// In hexadecimal.
    pub fn finish(self) -> String {
        format!("{:016x}", self.0.finish())
    }
}

/// Hash of sequences of token ids.
pub fn hash_tokens(sequences: &[Vec<u32>]) -> String {
    let hash = sequences.iter().fold(Hash::default(), |hash, ids| hash.part(bytemuck::cast_slice(ids)));
    hash.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_hash_is_the_published_function() {
        assert_eq!(Hash::default().finish(), "ef46db3751d8e999");
        assert_eq!(XxHash64::oneshot(0, b"abc"), 0x44bc_2cf5_ad77_0999);
    }

    #[test]
    fn parts_do_not_run_into_one_another_and_every_byte_counts() {
        let hash =
            |parts: &[&[u8]]| parts.iter().fold(Hash::default(), |hash, part| hash.part(part)).finish();
        assert_ne!(hash(&[b"ab", b"c"]), hash(&[b"a", b"bc"]));
        let mut large = vec![7; (1 << 22) + 9];
        let before = Hash::default().large_part(&large).finish();
        for place in [300, (1 << 22) - 1, (1 << 22) + 8] {
            large[place] = 8;
            assert_ne!(Hash::default().large_part(&large).finish(), before);
            large[place] = 7;
        }
    }

    #[test]
    fn the_first_difference_is_named_with_both_values() {
        let mut then = Fingerprint::new();
        then.insert("bits", 4);
        then.insert("config.json", json!({ "rope_theta": 1e4, "rope_scaling": { "factor": 2 } }));
        let difference = |change: &dyn Fn(&mut Fingerprint)| {
            let mut now = then.clone();
            change(&mut now);
            now.difference(&then.to_json())
        };
        assert_eq!(difference(&|_| ()), None);
        assert_eq!(difference(&|now| now.insert("bits", 8)).unwrap(), "bits 4, this one has 8");
        let nested = |now: &mut Fingerprint| {
            now.insert("config.json", json!({ "rope_theta": 1e4, "rope_scaling": { "factor": 3 } }));
        };
        assert_eq!(difference(&nested).unwrap(), "config.json rope_scaling factor 2, this one has 3");
        let added = |now: &mut Fingerprint| now.insert("dtype", "f16");
        assert_eq!(difference(&added).unwrap(), "dtype nothing, this one has \"f16\"");
        let mut fewer = Fingerprint::new();
        fewer.insert("bits", 4);
        assert!(fewer.difference(&then.to_json()).unwrap().ends_with("this one has nothing"));
    }
}
