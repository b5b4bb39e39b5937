//! The residual connection.

mod cpu;
pub(crate) mod cuda;

use crate::error::expect;
use crate::{Device, Result};

/// `y = a + b`, element by element.  a, b: `[tokens, features]`
pub trait Add: Device {
    fn add(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
}

/// Both must have the same shape: nothing is broadcast.
pub(crate) fn check(a: (usize, usize), b: (usize, usize)) -> Result<()> {
    expect("add", a, b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;

    fn conforms(device: &impl Add) {
        let a = device.tensor(vec![1.0, 2.0, 3.0, 4.0], (2, 2)).unwrap();
        let b = device.tensor(vec![0.5; 4], (2, 2)).unwrap();
        assert_eq!(device.to_vec(&device.add(&a, &b).unwrap()).unwrap(), [1.5, 2.5, 3.5, 4.5]);
        let row = device.tensor(vec![0.5; 2], (1, 2)).unwrap();
        assert!(device.add(&a, &row).is_err(), "a row is not broadcast");
    }

    #[test]
    fn adds_and_does_not_broadcast_on_the_cpu() {
        conforms(&Cpu::new());
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn agrees_with_f64_on_cuda() {
        crate::testing::gpus().iter().for_each(conforms);
    }
}
