//! The second moments of a stage's input: the Hessian of GPTQ's layer-wise problem
//! (Frantar et al. 2022, section 3.1).

pub(crate) mod cpu;
pub(crate) mod cuda;
pub(crate) mod hopper;

use crate::{Device, Error, Result};

/// `H += sum_t x[t] x[t]^T`.  x: `[tokens, in]`, H: `[in, in]`
///
/// The paper's factor 2 / samples is left to the caller: it scales the reported loss and no code.
pub trait Hessian: Device {
    /// An f32 matrix of the solver. Of a Hessian, which is square, only the lower triangle is meaningful.
    type Matrix: Send + Sync;

    /// A Hessian of `size` features that has seen no token.
    fn hessian(&self, size: usize) -> Result<Self::Matrix>;

    fn accumulate(&self, hessian: &mut Self::Matrix, x: &Self::Tensor) -> Result<()>;

    /// Products `[rows, columns]` of no token yet, for [`Self::accumulate_products`].
    fn products(&self, rows: usize, columns: usize) -> Result<Self::Matrix>;

    /// `M += sum_t a[t] x[t]^T`.  a: `[tokens, rows]`, x: `[tokens, columns]`, M: `[rows, columns]`
    fn accumulate_products(
        &self,
        products: &mut Self::Matrix,
        a: &Self::Tensor,
        x: &Self::Tensor,
    ) -> Result<()>;

    /// `y = a - b`, element by element: what two streams differ by. Taken token by token, since of two sums of products it
    /// would lose the digits that count.
    fn difference(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;

    /// The whole matrix, row-major.
    fn matrix_to_vec(&self, matrix: &Self::Matrix) -> Result<Vec<f32>>;

    /// `H[i, i]` for every feature.
    fn diagonal(&self, hessian: &Self::Matrix) -> Result<Vec<f32>>;
}

/// `x` must be as wide as the Hessian.
pub(crate) fn check(x: (usize, usize), size: usize) -> Result<()> {
    if x.1 != size {
        return Err(Error::shape("hessian", (x.0, size), x));
    }
    Ok(())
}

/// `a` must be as wide as the products are high, `x` as they are wide, and both of the same tokens.
pub(crate) fn check_products(products: (usize, usize), [a, x]: [(usize, usize); 2]) -> Result<()> {
    let expected = [(x.0, products.0), (x.0, products.1)];
    if [a, x] != expected {
        return Err(Error::shape("accumulate_products", expected, [a, x]));
    }
    Ok(())
}

/// Both must have the same shape.
pub(crate) fn check_difference(a: (usize, usize), b: (usize, usize)) -> Result<()> {
    if a != b {
        return Err(Error::shape("difference", a, b));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use crate::testing::{NMSE_F32, assert_close, gpus, random, tolerance};

    /// Odd sizes, and one of several panels.
    const SIZES: [(usize, usize); 2] = [(150, 70), (260, 1100)];

    fn tiles_of_tokens_add_up(device: &impl Hessian, sizes: &[(usize, usize)], tolerance: f64) {
        for &(tokens, size) in sizes {
            let x = random(1, tokens * size);
            let mut h = device.hessian(size).unwrap();
            for tile in [0..64, 64..65, 65..tokens] {
                let part = x[tile.start * size..tile.end * size].to_vec();
                device.accumulate(&mut h, &device.tensor(part, (tile.len(), size)).unwrap()).unwrap();
            }
            let pairs: Vec<_> = (0..size).step_by(7).flat_map(|i| (0..=i).map(move |j| (i, j))).collect();
            let moment = |&(i, j): &(usize, usize)| {
                (0..tokens).map(|t| x[t * size + i] as f64 * x[t * size + j] as f64).sum()
            };
            let all = device.matrix_to_vec(&h).unwrap();
            let got: Vec<f32> = pairs.iter().map(|&(i, j)| all[i * size + j]).collect();
            assert_close("lower triangle", &got, &pairs.iter().map(moment).collect::<Vec<f64>>(), tolerance);
            let diagonal: Vec<f32> = (0..size).map(|i| all[i * size + i]).collect();
            assert_eq!(device.diagonal(&h).unwrap(), diagonal);
            let narrow = device.tensor(vec![0.0; size - 1], (1, size - 1)).unwrap();
            assert!(device.accumulate(&mut h, &narrow).is_err(), "another width");
        }
    }

    /// What two streams differ by is far smaller than either.
    fn small_differences_add_up(device: &impl Hessian, tolerance: f64) {
        let (tokens, rows, columns) = (150, 33, 70);
        let (a, x) = (random(3, tokens * rows), random(5, tokens * columns));
        let b: Vec<f32> = a.iter().zip(random(4, tokens * rows)).map(|(a, d)| a + d / 64.0).collect();
        let mut products = device.products(rows, columns).unwrap();
        for tile in [0..64, 64..65, 65..tokens] {
            let part = |values: &[f32], width: usize| {
                let values = values[tile.start * width..tile.end * width].to_vec();
                device.tensor(values, (tile.len(), width)).unwrap()
            };
            let (a, b, x) = (part(&a, rows), part(&b, rows), part(&x, columns));
            let difference = device.difference(&a, &b).unwrap();
            device.accumulate_products(&mut products, &difference, &x).unwrap();
            assert!(device.difference(&a, &x).is_err(), "another width");
            assert!(device.accumulate_products(&mut products, &x, &x).is_err(), "another width");
        }
        let sum = |i: usize| -> f64 {
            let (row, column) = (i / columns, i % columns);
            let difference = |t: usize| a[t * rows + row] as f64 - b[t * rows + row] as f64;
            (0..tokens).map(|t| difference(t) * x[t * columns + column] as f64).sum()
        };
        let expected: Vec<f64> = (0..rows * columns).map(sum).collect();
        assert_close("products", &device.matrix_to_vec(&products).unwrap(), &expected, tolerance);
    }

    #[test]
    fn differences_of_two_streams_add_up() {
        small_differences_add_up(&Cpu::new(), NMSE_F32);
    }

    #[test]
    fn tiles_of_tokens_add_up_to_the_whole() {
        tiles_of_tokens_add_up(&Cpu::new(), &SIZES, NMSE_F32);
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn tiles_of_tokens_add_up_to_the_whole_on_cuda() {
        // Tiles that reach beyond the last feature, and so many that some are divided among clusters and others are not.
        let tiled = [(260, 1096), (700, 4096)];
        for gpu in gpus() {
            tiles_of_tokens_add_up(&gpu, &[&SIZES[..], &tiled].concat(), tolerance(&gpu));
        }
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn the_same_tokens_make_the_same_bits_on_cuda() {
        let (tokens, size) = (2048, 1536);
        for gpu in gpus() {
            let x = gpu.tensor(random(1, tokens * size), (tokens, size)).unwrap();
            let once = || {
                let mut h = gpu.hessian(size).unwrap();
                for _ in 0..3 {
                    gpu.accumulate(&mut h, &x).unwrap();
                }
                gpu.matrix_to_vec(&h).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let first = once();
            assert!((0..5).all(|_| once() == first));
        }
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn differences_of_two_streams_add_up_on_cuda() {
        // The streams themselves are rounded to 16 bits here, by up to a tenth of what they differ by.
        gpus().iter().for_each(|gpu| small_differences_add_up(gpu, 300.0 * tolerance(gpu)));
    }
}
