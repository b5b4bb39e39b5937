//! A model folder in memory, read and written by the safetensors library alone, to be damaged or rewritten.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use gptq_kernels::{Batch, Cpu, Device};
use gptq_runtime::model::{Model, ModelFiles};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

pub struct ModelFolder {
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl ModelFolder {
    /// `config.json` and every file `model*.safetensors`.
    pub fn read(dir: &Path) -> Self {
        let config = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        let mut tensors = BTreeMap::new();
        for path in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with("model") && name.ends_with(".safetensors") {
                let bytes = fs::read(&path).unwrap();
                for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                    let (dtype, shape) = (view.dtype(), view.shape().to_vec());
                    assert!(
                        tensors.insert(name, Tensor { dtype, shape, data: view.data().to_vec() }).is_none()
                    );
                }
            }
        }
        Self { config, tensors }
    }

    /// `config.json` and one safetensors file of the given name, in a folder that is made.
    pub fn write_as(&self, dir: &Path, file: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        let views = self.tensors.iter().map(|(name, tensor)| {
            (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap())
        });
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), &dir.join(file)).unwrap();
    }

    pub fn write(&self, dir: &Path) {
        self.write_as(dir, "model.safetensors");
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("{name} is missing"))
    }
}

impl Tensor {
    pub fn f32(shape: Vec<usize>, values: &[f32]) -> Self {
        Self { dtype: Dtype::F32, shape, data: values.iter().flat_map(|x| x.to_le_bytes()).collect() }
    }

    pub fn words(&self) -> Vec<u32> {
        assert_eq!(self.dtype, Dtype::I32);
        self.data.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub fn halves(&self) -> Vec<f32> {
        assert_eq!(self.dtype, Dtype::F16);
        self.data.chunks_exact(2).map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
    }
}

/// Logits of 96 fixed tokens, through the program's own forward pass.
pub fn logits(dir: &Path) -> Vec<f32> {
    let model = Model::load(Cpu::new(), &ModelFiles::open(dir).unwrap()).unwrap();
    let vocab = model.config.vocab_size as u32;
    let ids: Vec<u32> = (0..96).map(|i| (i * 37 + 11) % vocab).collect();
    let hidden = model.forward(&ids, &Batch::fresh([ids.len()]), None).unwrap();
    model.backend().to_vec(&model.logits(&hidden, 0..ids.len()).unwrap()).unwrap()
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|x| x.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
