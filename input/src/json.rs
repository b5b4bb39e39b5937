//! JSON in which no key is said twice with two values: readers differ in which of them counts.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::short;

/// Parses a text of JSON.
///
/// # Errors
/// What is wrong and where, on one line. A key that stands twice in an object with different values is refused.
pub fn parse(text: &[u8]) -> Result<Value, String> {
    serde_json::from_slice::<Checked>(text)
        .map(|checked| checked.0)
        .map_err(|cause| crate::short_line(&cause.to_string()))
}

/// An object whose keys all differ, for readers of one type of value.
pub struct Distinct<T>(pub BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Distinct<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
            type Value = Distinct<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    let value = map
                        .next_value()
                        .map_err(|cause| Error::custom(format!("{}: {cause}", short(&key))))?;
                    if fields.contains_key(&key) {
                        return Err(twice(&key));
                    }
                    fields.insert(key, value);
                }
                Ok(Distinct(fields))
            }
        }

        deserializer.deserialize_map(Object(PhantomData))
    }
}

fn twice<E: Error>(key: &str) -> E {
    E::custom(format!("{}: expected once, got it twice", short(key)))
}

struct Checked(Value);

impl<'de> Deserialize<'de> for Checked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Checked;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_unit<E>(self) -> Result<Checked, E> {
                Ok(Checked(Value::Null))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Checked, E> {
                Ok(Checked(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Checked, E> {
                Ok(Checked(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Checked, E> {
                Ok(Checked(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Checked, E> {
                Ok(Checked(Number::from_f64(value).map_or(Value::Null, Value::Number)))
            }

            fn visit_str<E>(self, value: &str) -> Result<Checked, E> {
                Ok(Checked(value.into()))
            }

            fn visit_string<E>(self, value: String) -> Result<Checked, E> {
                Ok(Checked(value.into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Checked, A::Error> {
                let mut items = Vec::new();
                while let Some(Checked(item)) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Checked(items.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Checked, A::Error> {
                let mut fields = Map::new();
                while let Some((key, Checked(value))) = map.next_entry::<String, Checked>()? {
                    if fields.get(&key).is_some_and(|other| *other != value) {
                        return Err(twice(&key));
                    }
                    fields.insert(key, value);
                }
                Ok(Checked(fields.into()))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_library_unless_a_key_has_two_of_them() {
        let text =
            r#"{"a": [1, -2, 0.5, 1e300, true, null, "x\n", 18446744073709551615], "b": {"c": 1, "c": 1}}"#;
        assert_eq!(parse(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        let refusal = parse(br#"{"a": {"bits": 4, "bits": 8}}"#).unwrap_err();
        assert!(refusal.starts_with("bits: expected once, got it twice"), "{refusal}");
        assert!(parse(&b"[".repeat(100_000)).unwrap_err().contains("recursion"));
        assert!(parse(b"1 2").is_err());
        let typed = serde_json::from_str::<Distinct<u32>>(r#"{"a": 1, "a": 1}"#).err().unwrap().to_string();
        assert!(typed.starts_with("a: expected once"), "{typed}");
    }
}
