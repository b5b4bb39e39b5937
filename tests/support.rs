//! What several test modules need: golden files and reading them without our own loaders.

use std::path::PathBuf;

use safetensors::SafeTensors;

/// `tests/golden/<path>`
pub fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

/// A folder of shared models and texts that is too large for the project; tests that need it are ignored without it.
pub fn shared(path: &str) -> PathBuf {
    PathBuf::from(std::env::var_os("GPTQ_SHARED").expect("GPTQ_SHARED is not set")).join(path)
}

/// f32 values of a tensor in a safetensors buffer.
pub fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    match tensor.dtype() {
        safetensors::Dtype::F32 => {
            tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        safetensors::Dtype::F16 => tensor
            .data()
            .chunks_exact(2)
            .map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32())
            .collect(),
        other => panic!("{name}: {other:?}"),
    }
}

/// u32 values of an I32 or I64 tensor in a safetensors buffer.
pub fn ints(file: &SafeTensors, name: &str) -> Vec<u32> {
    let tensor = file.tensor(name).unwrap();
    match tensor.dtype() {
        safetensors::Dtype::I32 => {
            tensor.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        safetensors::Dtype::I64 => {
            tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
        }
        other => panic!("{name}: {other:?}"),
    }
}
