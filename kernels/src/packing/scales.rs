//! The scales of a quantized linear, as narrow as they can be kept without changing one of them.

use half::f16;

/// Scales `[groups, out]`.
///
/// Writers store f16, bf16 or f32. What f16 holds exactly is kept as f16, which the fast kernels read; anything else
/// stays f32.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Scales {
    /// The same values, as f16 where that changes none of them.
    pub fn exact(values: Vec<f32>) -> Self {
        let narrow: Vec<f16> = values.iter().map(|scale| f16::from_f32(*scale)).collect();
        let same = |(narrow, wide): (&f16, &f32)| narrow.to_f32().to_bits() == wide.to_bits();
        match narrow.iter().zip(&values).all(same) {
            true => Self::F16(narrow),
            false => Self::F32(values),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::F16(scales) => scales.len(),
            Self::F32(scales) => scales.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F16(scales) => scales.iter().map(|scale| scale.to_f32()).collect(),
            Self::F32(scales) => scales.clone(),
        }
    }

    /// Little-endian elements, two or four bytes each.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::F16(scales) => bytemuck::cast_slice(scales),
            Self::F32(scales) => bytemuck::cast_slice(scales),
        }
    }

    /// The values, some of them in other places: `rearrange` moves slices of any type alike.
    pub(super) fn rearranged(parts: &[&Self], rearrange: impl Rearrange) -> Self {
        let narrow = |part: &&Self| match part {
            Self::F16(scales) => Some(scales.clone()),
            Self::F32(_) => None,
        };
        match parts.iter().map(narrow).collect::<Option<Vec<_>>>() {
            Some(parts) => Self::F16(rearrange.apply(&parts)),
            None => {
                let parts: Vec<_> = parts.iter().map(|part| part.to_f32()).collect();
                Self::F32(rearrange.apply(&parts))
            }
        }
    }
}

/// A way to make one vector of several, whatever their type.
pub(super) trait Rearrange {
    fn apply<T: Copy + Send + Sync>(&self, parts: &[Vec<T>]) -> Vec<T>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_that_f16_cannot_hold_keeps_its_value() {
        let exact = vec![0.5, 1.0 / 1024.0, f16::MIN_POSITIVE_SUBNORMAL.to_f32(), -0.25];
        assert!(matches!(Scales::exact(exact.clone()), Scales::F16(_)));
        assert_eq!(Scales::exact(exact).to_f32()[2], f16::MIN_POSITIVE_SUBNORMAL.to_f32());
        for odd in [1e-9, 1e5, 0.1, f16::MIN_POSITIVE_SUBNORMAL.to_f32() / 2.0] {
            let scales = Scales::exact(vec![0.5, odd]);
            assert_eq!(scales, Scales::F32(vec![0.5, odd]));
        }
    }
}
