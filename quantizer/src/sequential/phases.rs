//! Where the time of a layer goes.

use std::ops::AddAssign;
use std::time::Instant;

use gptq_kernels::Device;
use serde::{Deserialize, Serialize};

use crate::Result;

/// Seconds of one layer. Reading and writing run beside the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Phases {
    #[serde(rename = "forward_seconds")]
    pub forward: f64,
    #[serde(rename = "hessian_seconds")]
    pub hessian: f64,
    #[serde(rename = "factor_seconds")]
    pub factor: f64,
    /// The target of a sweep that makes up for errors in its input.
    #[serde(rename = "target_seconds", default)]
    pub target: f64,
    /// Grids and codes.
    #[serde(rename = "sweep_seconds")]
    pub sweep: f64,
    /// Coordinate descent and refit.
    #[serde(rename = "refine_seconds", default)]
    pub refine: f64,
    #[serde(rename = "pack_seconds")]
    pub pack: f64,
    /// Waiting for weights, or for the writer to take a layer.
    #[serde(rename = "wait_seconds", default)]
    pub wait: f64,
    /// Reading weights, beside.
    #[serde(rename = "read_seconds", default)]
    pub read: f64,
    /// Collecting and writing the layer, beside.
    #[serde(rename = "write_seconds")]
    pub write: f64,
}

impl AddAssign for Phases {
    fn add_assign(&mut self, other: Self) {
        self.forward += other.forward;
        self.hessian += other.hessian;
        self.factor += other.factor;
        self.target += other.target;
        self.sweep += other.sweep;
        self.refine += other.refine;
        self.pack += other.pack;
        self.wait += other.wait;
        self.read += other.read;
        self.write += other.write;
    }
}

type Phase = fn(&mut Phases) -> &mut f64;

/// Splits the time of a layer into phases.
pub(super) struct Clock<M> {
    last: Instant,
    /// Points in the device's work, each with the phase that ends there.
    marks: Vec<(M, Phase)>,
    pub phases: Phases,
}

impl<M> Clock<M> {
    pub fn new() -> Self {
        Self { last: Instant::now(), marks: Vec::new(), phases: Phases::default() }
    }

    /// Forgets the time since the last lap, which was booked otherwise.
    pub fn skip(&mut self) {
        self.last = Instant::now();
    }

    /// Books the time since the last lap.
    pub fn lap(&mut self, phase: Phase) {
        let now = Instant::now();
        *phase(&mut self.phases) += (now - self.last).as_secs_f64();
        self.last = now;
    }

    /// What the device is asked for until [`Self::settle`] is timed by the device, which need not wait between two phases.
    pub fn begin(&mut self, device: &impl Device<Mark = M>) -> Result<()> {
        self.mark(device, |phases| &mut phases.forward)
    }

    /// A phase ends where the device is through with what it was asked for so far.
    pub fn mark(&mut self, device: &impl Device<Mark = M>, phase: Phase) -> Result<()> {
        self.marks.push((device.mark()?, phase));
        Ok(())
    }

    /// Waits for the device and books what it took; what the host took beside that is forward.
    pub fn settle(&mut self, device: &impl Device<Mark = M>) -> Result<()> {
        device.synchronize()?;
        let mut timed = 0.0;
        for ((from, _), (to, phase)) in self.marks.iter().zip(self.marks.iter().skip(1)) {
            let seconds = device.seconds(from, to)?;
            *phase(&mut self.phases) += seconds;
            timed += seconds;
        }
        self.marks.clear();
        let now = Instant::now();
        self.phases.forward += ((now - self.last).as_secs_f64() - timed).max(0.0);
        self.last = now;
        Ok(())
    }
}
