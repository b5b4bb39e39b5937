//! The guard against fitting the calibration text: what tokens that solving never saw say of a change.

use gptq_kernels::Backend;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::moments::Moments;

/// What held-out tokens said of one linear, `tr(E H' E^T) + 2 tr(E P'^T)` with E = W - Q and P' as in
/// [`Moments::pull`]: the squared error of the outputs against their target, less that of the weights as they were, so
/// that below 0 is better than these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Of the target before it is quantized; taken where it is below 0, which leaving the weights alone has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<f64>,
    pub swept: f64,
    /// After refinement; taken where it is below `swept`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refined: Option<f64>,
}

impl Verdict {
    pub fn takes_target(&self) -> bool {
        self.target.is_some_and(|loss| loss < 0.0)
    }

    pub fn takes_refinement(&self) -> bool {
        self.refined.is_some_and(|loss| loss < self.swept)
    }
}

/// Tokens that were kept out, for the linears of one stage.
pub(crate) struct Judge<'a, B: Backend> {
    backend: &'a B,
    /// Outputs of each linear.
    outputs: &'a [usize],
    /// As they were, in the order of the sweep, as are the others.
    weights: B::Matrix,
    hessian: B::Matrix,
    pull: Option<B::Matrix>,
}

impl<'a, B: Backend> Judge<'a, B> {
    /// `sweep` has only just begun.
    pub fn new(
        backend: &'a B,
        sweep: &B::Sweep,
        held_out: &Moments<B>,
        order: &[u32],
        outputs: &'a [usize],
    ) -> Result<Self> {
        let weights = backend.sweep_weights(sweep)?;
        let pull = held_out.pull(backend, &weights, order)?;
        Ok(Self { backend, outputs, hessian: backend.damped(&held_out.hessian, order, 0.0)?, weights, pull })
    }

    /// Of each linear.
    pub fn losses(&self, sweep: &B::Sweep) -> Result<Vec<f64>> {
        let rows = self.backend.sweep_losses(sweep, &self.weights, &self.hessian, self.pull.as_ref())?;
        let mut rows = rows.into_iter().map(f64::from);
        Ok(self.outputs.iter().map(|count| rows.by_ref().take(*count).sum()).collect())
    }

    /// Undoes what made linears no better than `before`, where their losses were these; returns what was found.
    pub fn keep_better(&self, sweep: &mut B::Sweep, before: &B::Sweep, losses: &[f64]) -> Result<Vec<f64>> {
        let found = self.losses(sweep)?;
        let mut start = 0;
        for ((count, found), before_it) in self.outputs.iter().zip(&found).zip(losses) {
            let rows = start..start + count;
            start = rows.end;
            let better = found < before_it;
            if !better {
                self.backend.sweep_take_rows(sweep, before, rows)?;
            }
        }
        Ok(found)
    }
}
