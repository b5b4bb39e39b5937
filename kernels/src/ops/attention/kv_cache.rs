//! How a KV cache keeps keys and values.

use crate::{Error, KV_BLOCK_ROWS, Result};

/// The type of a KV cache's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// As the backend computes: nothing is lost.
    #[default]
    Auto,
    /// A byte each, and an f32 for every token and head: `value = code * scale`, `scale = max |x| / 127`. Attention
    /// sees these values, also of the tokens that it has just appended, so that it makes no difference how many came at
    /// once.
    Int8,
}

impl KvDtype {
    /// Bytes of a token's keys and values in one layer, on a device whose activations have `element_size` bytes.
    pub fn token_bytes(self, kv_heads: usize, head_dim: usize, element_size: usize) -> usize {
        let head = match self {
            Self::Auto => head_dim * element_size,
            Self::Int8 => head_dim + size_of::<f32>(),
        };
        2 * kv_heads * head
    }
}

/// The KV cache of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Of [`KV_BLOCK_ROWS`] tokens each.
    pub blocks: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub dtype: KvDtype,
}

/// Codes of so many features are read at once.
const CODES_AT_ONCE: usize = 8;

impl KvShape {
    /// Tokens that have room.
    pub(super) fn rows(&self) -> usize {
        self.blocks * KV_BLOCK_ROWS
    }

    /// Codes are kept of heads of a whole number of [`CODES_AT_ONCE`].
    pub(super) fn check(&self) -> Result<()> {
        match self.dtype {
            KvDtype::Int8 if !self.head_dim.is_multiple_of(CODES_AT_ONCE) => {
                Err(Error::shape("int8 KV cache head_dim", "a multiple of 8", self.head_dim))
            }
            _ => Ok(()),
        }
    }
}

/// A head without a larger number counts as zeros: 127 divided by less would be infinite.
const SMALLEST: f32 = 1e-30;

/// Codes of one head of one token; returns their scale. `scale = max |x| / 127`, `code = round(x * (127 / max |x|))`,
/// ties to even, in f32: what the GPU does, step for step.
/// x, codes: `[head_dim]`
pub(super) fn quantize(x: &[f32], codes: &mut [i8]) -> f32 {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let (scale, inverse) = if largest > SMALLEST { (largest / 127.0, 127.0 / largest) } else { (0.0, 0.0) };
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (x * inverse).round_ties_even() as i8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_the_nearest_of_255_and_zeros_stay_zeros() {
        let mut codes = [9; 4];
        assert_eq!(quantize(&[-254.0, 127.0, 3.0, 2.2], &mut codes), 2.0);
        assert_eq!(codes, [-127, 64, 2, 1], "63.5 and 1.5 are ties, which go to the even one");
        for nothing in [0.0, 1e-38] {
            assert_eq!(quantize(&[nothing; 4], &mut codes), 0.0);
            assert_eq!(codes, [0; 4]);
        }
        assert_eq!(quantize(&[1e-29, 0.0, 0.0, -1e-29], &mut codes), 1e-29 / 127.0);
        assert_eq!(codes, [127, 0, 0, -127]);
    }

    #[test]
    fn int8_takes_a_byte_a_feature_and_a_scale_a_head() {
        assert_eq!(KvDtype::Auto.token_bytes(4, 128, 2), 2048);
        assert_eq!(KvDtype::Int8.token_bytes(4, 128, 2), 1056);
        let shape = |dtype, head_dim| KvShape { blocks: 1, kv_heads: 1, head_dim, dtype };
        assert!(shape(KvDtype::Int8, 20).check().is_err());
        assert!(shape(KvDtype::Int8, 24).check().is_ok() && shape(KvDtype::Auto, 20).check().is_ok());
    }
}
