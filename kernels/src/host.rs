//! Tensors as they lie in host memory, on their way to or from a backend.

use half::{bf16, f16};

use crate::error::expect;
use crate::{Error, Result};

/// Floating-point types a checkpoint may hold, numbered as the kernels number them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F16,
    BF16,
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
        }
    }
}

/// A borrowed row-major tensor in host memory, usually a view into a mapped checkpoint.
#[derive(Clone, Debug)]
pub struct HostTensor<'a> {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Little-endian elements, `shape.product() * dtype.size()` bytes, at any alignment.
    pub bytes: &'a [u8],
}

impl<'a> HostTensor<'a> {
    /// Checks that `bytes` has the length `shape` and `dtype` ask for.
    pub fn new(dtype: Dtype, shape: Vec<usize>, bytes: &'a [u8]) -> Result<Self> {
        expect("host tensor bytes", shape.iter().product::<usize>() * dtype.size(), bytes.len())?;
        Ok(Self { dtype, shape, bytes })
    }

    /// Rows and columns, a vector counting as one row.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self.shape[..] {
            [columns] => Ok((1, columns)),
            [rows, columns] => Ok((rows, columns)),
            _ => Err(Error::shape("host tensor", "one or two dimensions", &self.shape)),
        }
    }

    /// Every element as f16, those of other types rounded.
    pub fn to_f16(&self) -> Vec<f16> {
        match self.dtype {
            Dtype::F16 => self.bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect(),
            Dtype::BF16 | Dtype::F32 => self.to_f32().into_iter().map(f16::from_f32).collect(),
        }
    }

    /// Every element widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let pairs = self.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.dtype {
            Dtype::F16 => pairs.map(|b| f16::from_bits(b).to_f32()).collect(),
            Dtype::BF16 => pairs.map(|b| bf16::from_bits(b).to_f32()).collect(),
            Dtype::F32 => {
                self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
        }
    }
}
