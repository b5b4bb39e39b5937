//! Algorithm 1 of the paper for one row, column by column in f64: the reference where golden files have none.

use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};
use gptq_kernels::GridKind;
use gptq_quantizer::gptq::GptqParams;

/// Which range a symmetric grid gets where all weights are positive.
#[derive(Clone, Copy, PartialEq)]
pub enum OneSigned {
    /// From 0 to the largest, with the middle code as zero point all the same: AutoGPTQ's.
    FromZero,
    /// As far to both sides.
    Even,
}

/// The order of columns, and U with `U^T U = (H + damp)^-1` in that order, for H = 2 X X^T.
pub struct Paper<'a> {
    params: &'a GptqParams,
    dead: Vec<bool>,
    order: Vec<usize>,
    u: Mat<f64>,
}

impl<'a> Paper<'a> {
    /// `input` is `[tokens, width]`.
    pub fn new(params: &'a GptqParams, input: &[f32], width: usize) -> Self {
        let x = Mat::from_fn(input.len() / width, width, |t, i| input[t * width + i] as f64);
        let mut h = x.transpose() * &x * 2.0;
        let dead: Vec<bool> = (0..width).map(|i| h[(i, i)] == 0.0).collect();
        for i in (0..width).filter(|i| dead[*i]) {
            h[(i, i)] = 1.0;
        }
        let mut order: Vec<usize> = (0..width).collect();
        if params.quant.act_order {
            order.sort_by(|a, b| h[(*b, *b)].total_cmp(&h[(*a, *a)]));
        }
        let mean = (0..width).map(|i| h[(i, i)]).sum::<f64>() / width as f64;
        let damp = |i, j| if i == j { params.quant.damp_percent * mean } else { 0.0 };
        let h = Mat::from_fn(width, width, |i, j| h[(order[i], order[j])] + damp(i, j));
        let inverse = h.llt(Side::Lower).unwrap().inverse();
        let u = inverse.llt(Side::Lower).unwrap().L().transpose().to_owned();
        Self { params, dead, order, u }
    }

    /// Codes of one row in the checkpoint's order, and its loss.
    pub fn solve(&self, row: &[f32], rule: OneSigned) -> (Vec<u8>, f64) {
        let quant = &self.params.quant;
        let width = row.len();
        let original: Vec<f64> = row.iter().map(|w| *w as f64).collect();
        let live = |i: usize| if self.dead[i] { 0.0 } else { original[i] };
        let mut w: Vec<f64> = self.order.iter().map(|i| live(*i)).collect();
        let size = quant.group_size.unwrap_or(width);
        let (mut codes, mut loss, mut scale) = (vec![0; width], 0.0, self.scale(&original, rule));
        let middle = 2f64.powi(quant.bits as i32 - 1);
        for i in 0..width {
            if quant.static_groups {
                let start = self.order[i] / size * size;
                scale = self.scale(&(start..start + size).map(live).collect::<Vec<_>>(), rule);
            } else if size < width && i % size == 0 {
                scale = self.scale(&w[i..i + size], rule);
            }
            let code = ((w[i] / scale).round_ties_even() + middle).clamp(0.0, 2.0 * middle - 1.0);
            let error = (w[i] - (code - middle) * scale) / self.u[(i, i)];
            for (j, w) in w.iter_mut().enumerate().skip(i + 1) {
                *w -= error * self.u[(i, j)];
            }
            codes[self.order[i]] = code as u8;
            loss += error * error / 2.0;
        }
        (codes, loss)
    }

    /// The scale of a symmetric grid; with `mse`, of the shrunken range with the least error.
    fn scale(&self, weights: &[f64], rule: OneSigned) -> f64 {
        let bits = self.params.quant.bits as i32;
        let (max_code, middle) = (2f64.powi(bits) - 1.0, 2f64.powi(bits - 1));
        let largest = weights.iter().fold(0.0, |top: f64, w| top.max(w.abs()));
        let positive = weights.iter().all(|w| *w >= 0.0) && largest > 0.0;
        let width = if positive && rule == OneSigned::FromZero { largest } else { 2.0 * largest };
        let whole = if largest > 0.0 { width } else { 2.0 } / max_code;
        let error = |scale: f64| {
            let code = |w: f64| ((w / scale).round_ties_even() + middle).clamp(0.0, max_code);
            weights.iter().map(|w| ((code(*w) - middle) * scale - w).abs().powf(2.4)).sum::<f64>()
        };
        let shrunk = (1..if self.params.recipe.grid == GridKind::Mse { 80 } else { 1 })
            .map(|i| whole * (1.0 - i as f64 / 100.0));
        shrunk.fold((error(whole), whole), |best, s| if error(s) < best.0 { (error(s), s) } else { best }).1
    }
}
