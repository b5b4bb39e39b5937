//! A value of a tensor's entry: a scalar, or a list of few scalars. Anything larger is none, and takes no memory.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// Sizes of a shape.
const MOST_ITEMS: usize = 64;

/// A list that is longer is a text that says so, an object is empty.
pub(super) struct Small(pub Value);

impl<'de> Deserialize<'de> for Small {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Small;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Small, E> {
        Ok(Small(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Small, E> {
        Ok(Small(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Small, E> {
        Ok(Small(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Small, E> {
        Ok(Small(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Small, E> {
        Ok(Small(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Small, E> {
        Ok(Small(gptq_input::short(value).into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Small, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Small(Value::Object(Default::default())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Small, A::Error> {
        let mut items = Vec::new();
        while items.len() < MOST_ITEMS {
            match list.next_element::<Small>()? {
                // A list in a list is no size.
                Some(Small(Value::Array(_))) => items.push(Value::Array(vec![])),
                Some(Small(item)) => items.push(item),
                None => return Ok(Small(items.into())),
            }
        }
        match list.next_element::<IgnoredAny>()? {
            None => Ok(Small(items.into())),
            Some(_) => {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Small(format!("a list of more than {MOST_ITEMS}").into()))
            }
        }
    }
}
