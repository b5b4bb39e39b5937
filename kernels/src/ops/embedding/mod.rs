//! Token ids to rows of the embedding table.

mod cpu;
pub(crate) mod cuda;

use crate::{Error, MatMul, Result, Sample};

/// `y[t] = table[ids[t]]`.  table: `[vocab, hidden]`, ids: `[tokens]`, result: `[tokens, hidden]`
pub trait Embedding: MatMul + Sample {
    fn embedding(&self, table: &Self::Weight, ids: &[u32]) -> Result<Self::Tensor>;

    /// The same into a tensor that is there: the input of a captured step.
    fn embedding_into(&self, target: &Self::Tensor, table: &Self::Weight, ids: &[u32]) -> Result<()>;

    /// The same for tokens that are still being sampled. Rows beyond them, and those without a token, get that of id 0.
    fn embedding_of_sampled(
        &self,
        target: &Self::Tensor,
        table: &Self::Weight,
        sampled: &Self::Sampled,
    ) -> Result<()>;
}

/// The ids must be rows of the table.
pub(crate) fn check(ids: &[u32], vocab: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(id) => Err(Error::shape("embedding", format!("ids below {vocab}"), id)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpu, Dtype, HostTensor, RowSampling};
    use half::f16;

    /// `captures`: the device has captured steps, whose input is written in place.
    fn conforms(device: &impl Embedding, captures: bool) {
        let table: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let bytes: Vec<u8> = table.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        let host = HostTensor::new(Dtype::F16, vec![4, 3], &bytes).unwrap();
        let table = device.weight(&[host], &[]).unwrap();
        let y = device.embedding(&table, &[3, 0, 3]).unwrap();
        assert_eq!(device.to_vec(&y).unwrap(), [9., 10., 11., 0., 1., 2., 9., 10., 11.]);
        assert!(device.embedding(&table, &[4]).is_err(), "an id past the table");
        for count in [1, 40] {
            let target = device.tensor(vec![-1.0; 3 * count], (count, 3)).unwrap();
            let ids: Vec<u32> = (0..count as u32).map(|i| (i + 1) % 4).collect();
            assert_eq!(device.embedding_into(&target, &table, &ids).is_ok(), captures);
            if captures {
                let expected: Vec<f32> =
                    ids.iter().flat_map(|id| (0..3).map(move |i| (3 * id + i) as f32)).collect();
                assert_eq!(device.to_vec(&target).unwrap(), expected);
            }
            assert!(device.embedding_into(&target, &table, &vec![1; count + 1]).is_err(), "another count");
        }
        if captures {
            // Tokens 2, none and 1, in a step for four.
            let scores = vec![0., 1., 2., 0., f32::NAN, f32::NAN, f32::NAN, f32::NAN, 0., 3., 1., 0.];
            let logits = device.wide_tensor(scores, (3, 4)).unwrap();
            let sampled = device.sample(&logits, &[const { RowSampling::likeliest() }; 3]).unwrap();
            let target = device.tensor(vec![-1.0; 12], (4, 3)).unwrap();
            device.embedding_of_sampled(&target, &table, &sampled).unwrap();
            assert_eq!(device.to_vec(&target).unwrap(), [6., 7., 8., 0., 1., 2., 3., 4., 5., 0., 1., 2.]);
            let small = device.tensor(vec![-1.0; 6], (2, 3)).unwrap();
            assert!(device.embedding_of_sampled(&small, &table, &sampled).is_err(), "fewer rows than tokens");
        }
    }

    #[test]
    fn rows_come_in_the_order_of_the_ids_on_the_cpu() {
        conforms(&Cpu::new(), false);
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn agrees_with_f64_on_cuda() {
        crate::testing::gpus().iter().for_each(|gpu| conforms(gpu, true));
    }
}
