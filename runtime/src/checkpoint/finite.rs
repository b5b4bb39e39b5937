//! Finding NaN and infinity at the speed of memory.

use gptq_kernels::{Dtype, HostTensor};
use rayon::prelude::*;

/// The first element whose exponent bits are all set, which is how infinity and NaN are written.
pub(super) fn first_not_finite(tensor: &HostTensor) -> Option<usize> {
    match tensor.dtype {
        Dtype::F16 => first_of(tensor.bytes, |b: &[u8; 2]| u16::from_le_bytes(*b) & 0x7C00 == 0x7C00),
        Dtype::BF16 => first_of(tensor.bytes, |b: &[u8; 2]| u16::from_le_bytes(*b) & 0x7F80 == 0x7F80),
        Dtype::F32 => {
            first_of(tensor.bytes, |b: &[u8; 4]| u32::from_le_bytes(*b) & 0x7F80_0000 == 0x7F80_0000)
        }
    }
}

/// Whole blocks are asked first, without a branch an element, so that the compiler can use vectors.
fn first_of<const N: usize>(bytes: &[u8], bad: impl Fn(&[u8; N]) -> bool + Sync) -> Option<usize> {
    const BLOCK: usize = 4096;
    let elements = bytes.as_chunks::<N>().0;
    let any = |block: &[[u8; N]]| block.iter().fold(false, |found, element| found | bad(element));
    let block = elements.par_chunks(BLOCK).position_first(any)?;
    let start = block * BLOCK;
    elements[start..].iter().position(bad).map(|i| start + i)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn found(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
        first_not_finite(&HostTensor::new(dtype, vec![bytes.len() / dtype.size()], bytes).unwrap())
    }

    #[test]
    fn the_first_bad_element_is_found_in_any_block() {
        for (bad, index) in [(f32::NAN, 5000), (f32::INFINITY, 0), (f32::NEG_INFINITY, 9999)] {
            let mut values = vec![1f32; 10_000];
            values[index] = bad;
            values[9999] = bad;
            let bytes =
                |cast: &dyn Fn(f32) -> Vec<u8>| values.iter().flat_map(|x| cast(*x)).collect::<Vec<u8>>();
            assert_eq!(found(Dtype::F16, &bytes(&|x| f16::from_f32(x).to_le_bytes().into())), Some(index));
            assert_eq!(found(Dtype::BF16, &bytes(&|x| bf16::from_f32(x).to_le_bytes().into())), Some(index));
            assert_eq!(found(Dtype::F32, &bytes(&|x| x.to_le_bytes().into())), Some(index));
        }
    }

    #[test]
    fn the_largest_values_pass() {
        assert_eq!(found(Dtype::F16, &f16::MAX.to_le_bytes()), None);
        assert_eq!(found(Dtype::BF16, &bf16::MIN.to_le_bytes()), None);
        assert_eq!(found(Dtype::F32, &f32::MAX.to_le_bytes()), None);
    }
}
