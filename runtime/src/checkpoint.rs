//! Safetensors: one file or shards, mapped into memory, every size checked before it is believed.

mod files;
mod finite;
mod header;
mod plan;
mod small;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gptq_input::{short, short_path};
use gptq_kernels::HostTensor;
use memmap2::Mmap;
use safetensors::tensor::Dtype as FileDtype;

pub use plan::{FilePlan, shards, write_atomically};

use crate::layout::{StoredDtype, TensorSpec};
use crate::quant_config::QuantConfig;
use crate::{Error, Result};

/// The safetensors files of one model folder.
pub struct Checkpoint {
    dir: PathBuf,
    /// Tensor name to file, where there is an index.
    index: BTreeMap<String, Arc<Path>>,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// What a header says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The type as the file has it, which may be one that we do not read.
    pub dtype: FileDtype,
    pub shape: Vec<usize>,
    shard: usize,
    /// Where the tensor lies in its file.
    range: Range<usize>,
}

impl Checkpoint {
    /// Opens the file that an artifact's description names, `model.safetensors`, the shards of an index, or the folder's
    /// only safetensors file. Headers are read and checked in full; the data is not touched.
    pub fn open(dir: &Path) -> Result<Self> {
        let found = files::find(dir, &QuantConfig::file_names(dir)?)?;
        let (shards, tensors, metadata) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        let mut checkpoint = Self { dir: dir.into(), index: found.index, shards, tensors, metadata };
        for path in found.paths {
            checkpoint.add(path)?;
        }
        checkpoint.name_as_whole_model();
        Ok(checkpoint)
    }

    /// A model that was saved without its head has no `model.` before its names.
    fn name_as_whole_model(&mut self) {
        if self.contains("model.embed_tokens.weight") || !self.contains("embed_tokens.weight") {
            return;
        }
        let named = |name: String| if name.starts_with("lm_head.") { name } else { format!("model.{name}") };
        self.tensors =
            std::mem::take(&mut self.tensors).into_iter().map(|(n, entry)| (named(n), entry)).collect();
        self.index = std::mem::take(&mut self.index).into_iter().map(|(n, path)| (named(n), path)).collect();
    }

    /// Gives a tensor another name.
    pub(crate) fn rename(&mut self, from: &str, to: &str) {
        if let Some(entry) = self.tensors.remove(from) {
            self.tensors.insert(to.into(), entry);
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Type and shape of a tensor, if it is there.
    pub fn spec(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name)
    }

    /// The `__metadata__` of all files.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Files and their sizes in bytes.
    pub fn file_sizes(&self) -> Vec<(&Path, u64)> {
        self.shards.iter().map(|shard| (shard.path.as_path(), shard.map.len() as u64)).collect()
    }

    /// A floating-point tensor of the given shape, as a view into the file.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<HostTensor<'_>> {
        let entry = self.expect(name, shape)?;
        let Some(dtype) = entry.stored().and_then(StoredDtype::float) else {
            return Err(self.wrong(name, "type F16, BF16 or F32", &entry.dtype.to_string()));
        };
        Ok(HostTensor::new(dtype, shape.to_vec(), self.bytes(entry))?)
    }

    /// An integer tensor of the given shape; I64 is taken where every value fits.
    pub fn ints(&self, name: &str, shape: &[usize]) -> Result<Vec<i32>> {
        let entry = self.expect(name, shape)?;
        let bytes = self.bytes(entry);
        match entry.dtype {
            FileDtype::I32 => Ok(bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()),
            FileDtype::I64 => {
                let wide = bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b));
                wide.map(|x| {
                    i32::try_from(x).map_err(|_| self.wrong(name, "values of 32 bits", &x.to_string()))
                })
                .collect()
            }
            other => Err(self.wrong(name, "type I32", &other.to_string())),
        }
    }

    /// The same as 32-bit words, in place where the file has them so.
    pub fn words(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [u32]>> {
        let entry = self.expect(name, shape)?;
        if entry.dtype == FileDtype::I32
            && cfg!(target_endian = "little")
            && let Ok(words) = bytemuck::try_cast_slice(self.bytes(entry))
        {
            return Ok(Cow::Borrowed(words));
        }
        Ok(self.ints(name, shape)?.into_iter().map(|x| x as u32).collect())
    }

    /// The bytes of a tensor, if it is there.
    pub fn raw(&self, name: &str) -> Option<&[u8]> {
        Some(self.bytes(self.tensors.get(name)?))
    }

    /// Every tensor of `specs` is there with its shape, floating-point ones in any floating-point type.
    /// Further tensors are none of our business: old checkpoints store rotary tables, for instance.
    pub fn verify_against(&self, specs: &[TensorSpec]) -> Result<()> {
        for spec in specs {
            let entry = self.expect(&spec.name, &spec.shape)?;
            let is_float = entry.stored().and_then(StoredDtype::float).is_some();
            let is_int = matches!(entry.dtype, FileDtype::I32 | FileDtype::I64);
            let fits = if spec.dtype == StoredDtype::I32 { is_int } else { is_float };
            if !fits {
                let expected = format!("type {}", spec.dtype.name());
                return Err(self.wrong(&spec.name, &expected, &entry.dtype.to_string()));
            }
        }
        Ok(())
    }

    /// Refuses NaN and infinity, naming tensor, element and value. `name` is for the message.
    pub fn check_finite(&self, tensor: &HostTensor, name: &str) -> Result<()> {
        let Some(index) = finite::first_not_finite(tensor) else { return Ok(()) };
        let size = tensor.dtype.size();
        let element = HostTensor::new(tensor.dtype, vec![1], &tensor.bytes[index * size..][..size])?;
        let value = element.to_f32()[0];
        Err(Error::NotFinite { path: self.path_of(name), name: name.into(), index, value })
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let file = gptq_input::open(&path).map_err(Error::io(&path))?;
        let length = file.metadata().map_err(Error::io(&path))?.len();
        let problem = |problem| Error::File { path: path.clone(), problem };
        if length < 8 {
            return Err(problem(format!("header: expected at least 8 bytes, got {length}")));
        }
        // SAFETY: the map is only read. A file that another process shortens meanwhile would end this one
        // with SIGBUS; model files are replaced by renaming, which leaves a mapped file whole.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        let header = header::parse(&map, self.shards.len()).map_err(problem)?;
        for (name, entry) in header.tensors {
            if let Some(other) = self.tensors.get(&name) {
                let other = &self.shards[other.shard].path;
                match self.index.get(&name) {
                    Some(named) if **named == *path => {}
                    Some(named) if **named == **other => continue,
                    _ => {
                        let (name, other) = (short(&name), short_path(other));
                        return Err(problem(format!(
                            "{name}: expected in one file only, got it in {other} too"
                        )));
                    }
                }
            }
            self.tensors.insert(name, entry);
        }
        self.metadata.extend(header.metadata);
        self.shards.push(Shard { path, map });
        Ok(())
    }

    fn expect(&self, name: &str, shape: &[usize]) -> Result<&Entry> {
        let Some(entry) = self.tensors.get(name) else {
            return Err(Error::MissingTensor { path: self.path_of(name), name: name.into() });
        };
        if entry.shape != shape {
            return Err(self.wrong(name, &format!("shape {shape:?}"), &format!("{:?}", entry.shape)));
        }
        Ok(entry)
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.shards[entry.shard].map[entry.range.clone()]
    }

    fn wrong(&self, name: &str, expected: &str, got: &str) -> Error {
        let (expected, got) = (expected.into(), got.into());
        Error::WrongTensor { path: self.path_of(name), name: name.into(), expected, got }
    }

    /// The file that holds a tensor, or should; the folder if nothing is known of it.
    fn path_of(&self, name: &str) -> PathBuf {
        let named = || self.index.get(name).map_or(&*self.dir, |path| path);
        self.tensors.get(name).map_or_else(named, |entry| &self.shards[entry.shard].path).to_owned()
    }
}

impl Entry {
    /// Bytes of the tensor in its file.
    pub fn bytes(&self) -> u64 {
        self.range.len() as u64
    }

    /// The type, if it is one that we read.
    pub fn stored(&self) -> Option<StoredDtype> {
        StoredDtype::from_name(&self.dtype.to_string())
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use safetensors::tensor::TensorView;

    use super::*;

    fn open(bytes: &[u8]) -> Result<Checkpoint> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        Checkpoint::open(dir.path())
    }

    #[test]
    fn values_come_back_as_the_safetensors_library_wrote_them() {
        let floats: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        let narrow: Vec<u8> = [7i32, -8].iter().flat_map(|x| x.to_le_bytes()).collect();
        let wide: Vec<u8> = [7i64, -8].iter().flat_map(|x| x.to_le_bytes()).collect();
        let huge: Vec<u8> = [7i64, 1 << 40].iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data).unwrap();
        let tensors = [
            ("floats", view(FileDtype::F16, &[1, 2], &floats)),
            ("narrow", view(FileDtype::I32, &[2], &narrow)),
            ("wide", view(FileDtype::I64, &[2], &wide)),
            ("huge", view(FileDtype::I64, &[2], &huge)),
            ("empty", view(FileDtype::BOOL, &[0, 9], &[])),
        ];
        let checkpoint = open(&safetensors::serialize(tensors, None).unwrap()).unwrap();
        let read = checkpoint.tensor("floats", &[1, 2]).unwrap();
        assert_eq!(read.to_f32(), [1.5, -2.0]);
        checkpoint.check_finite(&read, "floats").unwrap();
        let infinite = HostTensor { bytes: &[0, 0, 0, 0x7C], ..read };
        let message = checkpoint.check_finite(&infinite, "floats").unwrap_err().to_string();
        assert!(message.ends_with("model.safetensors: floats: expected finite values, got inf at element 1"));
        assert_eq!(checkpoint.ints("narrow", &[2]).unwrap(), [7, -8]);
        assert_eq!(checkpoint.ints("wide", &[2]).unwrap(), [7, -8]);
        assert_eq!(checkpoint.raw("wide").unwrap(), wide);
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["empty", "floats", "huge", "narrow", "wide"]);
        let message = |result: Result<Vec<i32>>| result.unwrap_err().to_string();
        assert!(
            message(checkpoint.ints("huge", &[2]))
                .ends_with("huge: expected values of 32 bits, got 1099511627776")
        );
        assert!(message(checkpoint.ints("floats", &[1, 2])).ends_with("floats: expected type I32, got F16"));
        assert!(message(checkpoint.ints("narrow", &[3])).ends_with("narrow: expected shape [3], got [2]"));
        assert!(message(checkpoint.ints("none", &[3])).ends_with("tensor none is missing"));
        assert!(checkpoint.tensor("narrow", &[2]).is_err());
    }

    #[test]
    fn words_are_read_in_place_where_they_lie_so_and_are_the_same_elsewhere() {
        let data: Vec<u8> = [7i32, -8].iter().flat_map(|x| x.to_le_bytes()).collect();
        let wide: Vec<u8> = [7i64, -8].iter().flat_map(|x| x.to_le_bytes()).collect();
        let file = |dtype, data: &[u8], gap: usize| {
            let entry =
                format!(r#"{{"x":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,{}]}}}}"#, data.len());
            let header = format!("{entry}{}", " ".repeat(8 - entry.len() % 8 + gap));
            [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
        };
        for (file, in_place) in
            [(file("I32", &data, 0), true), (file("I32", &data, 1), false), (file("I64", &wide, 0), false)]
        {
            let checkpoint = open(&file).unwrap();
            let words = checkpoint.words("x", &[2]).unwrap();
            assert_eq!(*words, [7, -8i32 as u32]);
            assert_eq!(matches!(words, Cow::Borrowed(_)), in_place);
            assert!(checkpoint.words("x", &[3]).is_err());
        }
    }

    #[test]
    fn a_missing_or_misshapen_tensor_is_found_before_loading() {
        let data = [0; 8];
        let view = |dtype, size| TensorView::new(dtype, vec![size], &data).unwrap();
        let tensors = [("a", view(FileDtype::F16, 4)), ("b", view(FileDtype::I32, 2))];
        let checkpoint = open(&safetensors::serialize(tensors, None).unwrap()).unwrap();
        let spec = |name: &str, dtype, size: usize| TensorSpec::new(name, dtype, [size]);
        checkpoint
            .verify_against(&[spec("a", StoredDtype::BF16, 4), spec("b", StoredDtype::I32, 2)])
            .unwrap();
        for wrong in
            [spec("a", StoredDtype::I32, 4), spec("a", StoredDtype::F16, 3), spec("c", StoredDtype::F16, 1)]
        {
            assert!(checkpoint.verify_against(&[wrong]).is_err());
        }
    }
}
