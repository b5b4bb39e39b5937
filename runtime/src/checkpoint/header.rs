//! The header of a safetensors file: eight bytes of length, then JSON. The data follows without holes.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use gptq_input::{Distinct, short, short_line};
use safetensors::tensor::Dtype as FileDtype;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::Entry;
use super::small::Small;

/// Bytes of a header at most. An entry has some 150: a quantized DeepSeek-V3 in a single file would have 27 MB, in its
/// shards 150 KB each, and Llama 405B has 0.5 MB at most. The format itself allows 100 MB.
const MAX_HEADER_BYTES: u64 = 32 << 20;

pub(super) struct Header {
    pub tensors: Vec<(String, Entry)>,
    pub metadata: BTreeMap<String, String>,
}

/// Parses and checks the header of a whole mapped file; an error is one line without the path.
pub(super) fn parse(file: &[u8], shard: usize) -> Result<Header, String> {
    let (json, data_start) = header_bytes(file)?;
    let mut header = Header { tensors: Vec::new(), metadata: BTreeMap::new() };
    let mut problem = None;
    let reading = Reading { header: &mut header, problem: &mut problem, shard };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let read = reading.deserialize(&mut deserializer).and_then(|()| deserializer.end());
    match (problem, read) {
        (Some(problem), _) => return Err(problem),
        (None, Err(cause)) => {
            let cause = short_line(&cause.to_string());
            return Err(format!("header: expected a JSON object, got {cause}"));
        }
        (None, Ok(())) => {}
    }
    check_names(&mut header.tensors)?;
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
            "header: expected at most {MAX_HEADER_BYTES} bytes, got {length}: not safetensors, or of no known model"
        ));
    }
    let length = length as usize;
    let json = rest.get(..length);
    let json =
        json.ok_or_else(|| format!("truncated header: expected {length} bytes, got {}", rest.len()))?;
    Ok((json, 8 + length))
}

/// Reads entry by entry, so that a header takes no more memory than what is kept of it.
struct Reading<'a> {
    header: &'a mut Header,
    /// What is wrong with an entry.
    problem: &'a mut Option<String>,
    shard: usize,
}

impl<'de> DeserializeSeed<'de> for Reading<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Reading<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut described = false;
        while let Some(name) = map.next_key::<String>()? {
            let read = if name == "__metadata__" {
                let twice = std::mem::replace(&mut described, true);
                let strings = map.next_value::<Distinct<String>>();
                strings
                    .map_err(|cause| {
                        format!("header: __metadata__: expected an object of strings, got {cause}")
                    })
                    .and_then(|Distinct(strings)| {
                        self.header.metadata = strings;
                        if twice {
                            Err("header: __metadata__: expected once, got it twice".into())
                        } else {
                            Ok(())
                        }
                    })
            } else {
                let fields = map.next_value::<Fields>()?;
                entry(&name, &fields, self.shard).map(|entry| self.header.tensors.push((name, entry)))
            };
            if let Err(problem) = read {
                *self.problem = Some(short_line(&problem));
                return Err(A::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

/// What an entry says, `null` where it says nothing.
#[derive(Default)]
struct Fields {
    dtype: Value,
    shape: Value,
    data_offsets: Value,
    /// A field that stands there twice.
    twice: Option<&'static str>,
}

impl<'de> serde::Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entry;

        impl<'de> Visitor<'de> for Entry {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Fields::default();
                while let Some(key) = map.next_key::<String>()? {
                    let (name, field) = match key.as_str() {
                        "dtype" => ("dtype", &mut fields.dtype),
                        "shape" => ("shape", &mut fields.shape),
                        "data_offsets" => ("data_offsets", &mut fields.data_offsets),
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    if !field.is_null() {
                        fields.twice = Some(name);
                    }
                    *field = map.next_value::<Small>()?.0;
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(Entry)
    }
}

/// One tensor, its range still relative to the data.
fn entry(name: &str, fields: &Fields, shard: usize) -> Result<Entry, String> {
    let name = short(name);
    if let Some(field) = fields.twice {
        return Err(format!("{name}: {field}: expected once, got it twice"));
    }
    let bad = |key: &str, expected: &str, got: &Value| {
        format!("{name}: {key}: expected {expected}, got {}", short(&got.to_string()))
    };
    let dtype: FileDtype = serde_json::from_value(fields.dtype.clone())
        .map_err(|_| bad("dtype", "a safetensors type", &fields.dtype))?;
    let shape = sizes(&fields.shape).ok_or_else(|| bad("shape", "a list of sizes", &fields.shape))?;
    let offsets = sizes(&fields.data_offsets);
    let range = match offsets.as_deref() {
        Some([start, end]) if start <= end => *start..*end,
        _ => return Err(bad("data_offsets", "[start, end]", &fields.data_offsets)),
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

/// Which of two entries of one name counts differs from reader to reader.
fn check_names(tensors: &mut [(String, Entry)]) -> Result<(), String> {
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    match tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(format!("{}: expected once, got it twice", short(&pair[0].0))),
        None => Ok(()),
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
            return Err(format!("{what}: expected {} at offset {end}, got {start}", short(name)));
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
                "header: expected at most 33554432 bytes, got 18446744073709551615",
            ),
            (file("not json", &[]), "header: expected a JSON object, got "),
            (file("[1]", &[]), "header: expected a JSON object, got "),
            (
                file(r#"{"__metadata__":{"x":1}}"#, &[]),
                "header: __metadata__: expected an object of strings, got ",
            ),
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
            (one("[]", 0), "header: expected a JSON object, got "),
            (file(&GOOD.replace("\"b\"", "\"a\""), &[0; 8]), "a: expected once, got it twice"),
            (
                one(r#"{"dtype":"F16","shape":[2],"shape":[2],"data_offsets":[0,4]}"#, 4),
                "a: shape: expected once, got it twice",
            ),
            (file(&GOOD.replace(r#""format":"pt""#, r#""a":"1","a":"2""#), &[0; 8]), "got it twice"),
            (
                one(&entry("F16", &format!("[{}1]", "1,".repeat(100)), "[0,2]"), 2),
                "a: shape: expected a list of sizes",
            ),
            (file(&GOOD.replace("\"a\"", &format!("\"{}\"", "a".repeat(200_000))), &[0; 7]), "truncated: "),
            (
                file(&format!(r#"{{"{}":{}}}"#, "a".repeat(200_000), entry("Q7", "[2]", "[0,4]")), &[0; 4]),
                "... (200000 bytes): dtype: expected",
            ),
            (
                file(&GOOD.replace("[4,8]", "[2,6]"), &[0; 8]),
                "overlapping tensors: expected b at offset 4, got 2",
            ),
        ];
        for (bytes, expected) in cases {
            let message = refusal(&bytes);
            assert!(message.contains(expected), "expected {expected}, got {message}");
            assert!(message.lines().count() == 1 && message.len() < 500, "{message}");
        }
        assert_eq!(refusal(&good), "accepted");
    }
}
