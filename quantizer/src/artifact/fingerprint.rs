//! Whether an interrupted run and this one make the same artifact.

use serde_json::{Map, Value};

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

    /// The first setting in which a stored fingerprint differs from this one.
    pub(crate) fn difference(&self, stored: &Value) -> Option<String> {
        let (name, now) = self.0.iter().find(|(name, value)| stored.get(name) != Some(value))?;
        let then = stored.get(name).unwrap_or(&Value::Null);
        Some(format!("{name} {then}, this one has {now}"))
    }
}

/// 64-bit FNV-1a (Fowler, Noll, Vo 1991) in hexadecimal: to notice differences, not to resist attacks.
pub fn hash(bytes: impl IntoIterator<Item = u8>) -> String {
    let step = |hash: u64, byte: u8| (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01B3);
    format!("{:016x}", bytes.into_iter().fold(0xCBF2_9CE4_8422_2325, step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_published_function() {
        assert_eq!(hash([]), "cbf29ce484222325");
        assert_eq!(hash(*b"foobar"), "85944171f73967e8");
    }

    #[test]
    fn the_first_difference_is_named_with_both_values() {
        let mut then = Fingerprint::new();
        then.insert("bits", 4);
        let mut now = then.clone();
        assert_eq!(now.difference(&then.to_json()), None);
        now.insert("bits", 8);
        assert_eq!(now.difference(&then.to_json()).unwrap(), "bits 4, this one has 8");
    }
}
