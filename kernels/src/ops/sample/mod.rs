//! Choosing the next token from scores: penalties and biases, temperature, top-k, top-p, min-p, typical-p, then a
//! draw.
//!
//! After the changes, scores become weights `2^-y`, y being how many octaves a token is less likely than the likeliest:
//! `y = (largest - logit) * log2(e) / temperature`, in [`FRACTION_BITS`] bits after the point. Weights are integers,
//! so that sums do not depend on their order: a GPU with its thousands of threads draws what a processor draws. Of
//! tokens that are equally likely in so many bits the smaller id counts as likelier. Tokens from [`OCTAVES`] on are
//! never drawn.

mod cpu;
pub(crate) mod cuda;

use crate::{Device, Error, Result};

/// Bits of a shortfall after the point: as many as a float has in its fraction.
pub(crate) const FRACTION_BITS: u32 = 24;

/// A token that is so many octaves less likely than the likeliest weighs nothing.
pub(crate) const OCTAVES: u32 = 40;

/// Ids have so many bits, below the shortfall in what tokens are ordered by.
pub(crate) const ID_BITS: u32 = 20;

/// The series of `2^-(1/2 + x)` for x from -1/2 to 1/2, the highest power first: `2^-1/2 (-ln 2)^n / n!`. The rest is
/// below 1e-8.
#[rustfmt::skip]
pub(crate) const SERIES: [f32; 8] = [
    -1.078_531_1e-5, 1.089_194_05e-4, -9.428_249_3e-4, 6.801_044e-3,
    -3.924_733e-2, 0.169_865_79, -0.490_129_08, std::f32::consts::FRAC_1_SQRT_2,
];

/// Sampling parameters of one row of scores.
#[derive(Clone, Debug, PartialEq)]
pub struct RowSampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Keep this many of the likeliest; 0 keeps all.
    pub top_k: usize,
    /// Of those keep the fewest likeliest that have this share of their mass; 1 keeps all.
    pub top_p: f32,
    /// Of those keep the ones that are at least this share as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Of those keep the fewest whose surprise is nearest the expected one that have this share of their mass (Meister
    /// et al. 2022); 1 keeps all.
    pub typical_p: f32,
    /// Where in the mass of what is kept, likeliest first, the token lies: in 2^64ths.
    pub random: u64,
    /// Every id at most once.
    pub changes: Vec<Change>,
    /// Whether the token's log-probability is wanted too, which takes the scores of all tokens.
    pub logprob: bool,
}

/// What is done to a token's logit first.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::NoUninit)]
#[repr(C)]
pub struct Change {
    pub id: u32,
    pub added: f32,
    /// What is then positive is divided by this, and what is not is multiplied (Keskar et al. 2019).
    pub repeated: f32,
}

/// A sampled token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampledToken {
    pub id: u32,
    /// Natural logarithm of the model's own probability, before changes and temperature; of no meaning where
    /// [`RowSampling::logprob`] is false.
    pub logprob: f32,
}

/// One token for each row.  logits: `[rows, vocab]` in f32, at most 2^20 tokens, sampling: one a row
pub trait Sample: Device {
    /// Tokens that are being sampled on the device.
    type Sampled: Send;

    /// Asks for tokens. Where the device works beside the host this returns at once.
    fn sample(&self, logits: &Self::Tensor, sampling: &[RowSampling]) -> Result<Self::Sampled>;

    /// Waits for the tokens that were asked for; none for a row without a finite score.
    fn sampled_tokens(&self, sampled: &Self::Sampled) -> Result<Vec<Option<SampledToken>>>;
}

impl RowSampling {
    /// The likeliest token of the scores as they are.
    pub const fn likeliest() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            random: 0,
            changes: Vec::new(),
            logprob: true,
        }
    }

    /// How many of the largest scores decide which token it is; none where all do.
    pub(crate) fn deciding(&self) -> Option<usize> {
        match self.temperature {
            _ if self.logprob => None,
            0.0 => Some(1),
            _ => Some(self.top_k).filter(|k| *k > 0),
        }
    }

    /// Octaves for each unit of a logit, and 0 where the likeliest token is wanted.
    pub(crate) fn rate(&self) -> f32 {
        let rate = std::f32::consts::LOG2_E / self.temperature;
        if self.temperature > 0.0 { rate.min(f32::MAX) } else { 0.0 }
    }

    /// The largest shortfall, in [`FRACTION_BITS`] bits after the point, that `min_p` keeps. One number for all
    /// backends.
    pub(crate) fn farthest(&self) -> u32 {
        let octaves = -f64::from(self.min_p).log2();
        (octaves.min(OCTAVES.into()) * f64::from(1 << FRACTION_BITS)) as u32
    }
}

impl Change {
    pub(crate) fn of(&self, logit: f32) -> f32 {
        let logit = logit + self.added;
        match self.repeated {
            1.0 => logit,
            repeated if logit > 0.0 => logit / repeated,
            repeated => logit * repeated,
        }
    }
}

/// Parameters for every row, of a vocabulary whose ids fit; parameters that mean something; changes to ids that there are.
pub(crate) fn check((rows, vocab): (usize, usize), sampling: &[RowSampling]) -> Result<()> {
    if sampling.len() != rows {
        return Err(Error::shape("sample", format!("parameters of {rows} rows"), sampling.len()));
    }
    if vocab == 0 || vocab > 1 << ID_BITS {
        return Err(Error::shape("sample", format!("1 to {} tokens", 1 << ID_BITS), vocab));
    }
    let share = |share: f32| share > 0.0 && share <= 1.0;
    for params in sampling {
        let means = params.temperature >= 0.0 && params.temperature.is_finite();
        let shares = share(params.top_p) && share(params.typical_p) && (0.0..=1.0).contains(&params.min_p);
        if !(means && shares) {
            return Err(Error::shape("sample", "a temperature from 0 on and shares up to 1", params));
        }
        if let Some(change) = params.changes.iter().find(|change| change.id as usize >= vocab) {
            return Err(Error::shape("sample", format!("changes of ids below {vocab}"), change.id));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
