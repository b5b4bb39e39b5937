//! How unevenly a linear's inputs are used: quantiles of its Hessian's diagonal.

use serde::{Deserialize, Serialize};

/// Quantiles of a Hessian's diagonal over the input features that have any input, each a multiple of the diagonal's mean
/// over all features. A damp of 0.1 adds a tenth of that mean to each: features far below it are hardly told apart.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
pub struct Spread {
    pub least: f64,
    /// The fifth percentile.
    pub p5: f64,
    pub median: f64,
    /// The ninety-fifth percentile.
    pub p95: f64,
    pub most: f64,
    /// Features without any input.
    pub dead: usize,
}

impl Spread {
    /// `None` where no feature has an input.
    pub fn of(diagonal: &[f32]) -> Option<Self> {
        let mut used: Vec<f64> = diagonal.iter().map(|h| f64::from(*h)).filter(|h| *h > 0.0).collect();
        used.sort_by(f64::total_cmp);
        let mean = used.iter().sum::<f64>() / diagonal.len().max(1) as f64;
        let last = used.len().checked_sub(1)?;
        let at = |share: f64| used[(share * last as f64).round() as usize] / mean;
        Some(Self {
            least: at(0.0),
            p5: at(0.05),
            median: at(0.5),
            p95: at(0.95),
            most: at(1.0),
            dead: diagonal.len() - used.len(),
        })
    }

    /// The span of both together.
    pub fn joined(self, other: Self) -> Self {
        Self {
            least: self.least.min(other.least),
            p5: self.p5.min(other.p5),
            median: (self.median * other.median).sqrt(),
            p95: self.p95.max(other.p95),
            most: self.most.max(other.most),
            dead: self.dead + other.dead,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_multiples_of_the_mean_and_dead_features_are_counted_apart() {
        // 0, then 1 to 101: the mean over all 102 is 50.5.
        let diagonal: Vec<f32> = (0..=101u16).map(f32::from).collect();
        let spread = Spread::of(&diagonal).unwrap();
        let expected = [1.0, 6.0, 51.0, 96.0, 101.0].map(|value| value / 50.5);
        assert_eq!([spread.least, spread.p5, spread.median, spread.p95, spread.most], expected);
        assert_eq!(spread.dead, 1);
        assert_eq!(Spread::of(&[0.0; 4]), None);
        assert_eq!(Spread::of(&[]), None);
    }
}
