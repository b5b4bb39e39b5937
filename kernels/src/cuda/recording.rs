//! One step of decoding as a CUDA graph: launching its kernels one by one costs more than they take.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::shelf::Shelf;
use super::{Cuda, CudaTensor, Placed};
use crate::ops::attention::cuda::splits;
use crate::{Batch, Error, Result};

/// A recorded step, with the memory that it works in.
pub struct CudaRecording {
    graph: CudaGraph,
    output: CudaTensor,
    /// Rewritten before every replay.
    placed: Arc<Placed>,
    /// Blocks that share one sequence's keys, where they depend on the context: the graph has fixed them.
    splits: Option<usize>,
    /// Buffers between the kernels; they outlive the graph.
    _shelf: Arc<Shelf>,
}

// SAFETY: a graph is used by one thread at a time, since replaying needs the recording's owner.
unsafe impl Send for CudaRecording {}

impl Cuda {
    /// Runs `step` once, so that everything it needs is there, then records it. `None` where it does something
    /// that cannot be recorded.
    pub(super) fn record_step<E: From<Error>>(
        &self,
        batch: &Batch,
        step: &mut dyn FnMut() -> Result<CudaTensor, E>,
    ) -> Result<Option<CudaRecording>, E> {
        let shelf = Shelf::private();
        let before = self.use_shelf(shelf.clone());
        let recorded = self.capture(step);
        self.use_shelf(before);
        let Some((graph, output)) = recorded? else {
            return Ok(None);
        };
        let placed = self.forget_placed(batch)?;
        Ok(Some(CudaRecording {
            graph,
            output,
            placed,
            splits: self.inner.split_by_context.load(Ordering::Relaxed).then(|| splits(&batch.sequences)),
            _shelf: shelf,
        }))
    }

    fn capture<E: From<Error>>(
        &self,
        step: &mut dyn FnMut() -> Result<CudaTensor, E>,
    ) -> Result<Option<(CudaGraph, CudaTensor)>, E> {
        let failed = || Error::driver("recording a step");
        let stream = &self.inner.stream;
        drop(step()?);
        stream.synchronize().map_err(failed())?;
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map_err(failed())?;
        self.inner.recording.store(true, Ordering::Relaxed);
        self.inner.split_by_context.store(false, Ordering::Relaxed);
        let output = step();
        self.inner.recording.store(false, Ordering::Relaxed);
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        match (output, graph) {
            (Ok(output), Ok(Some(graph))) => Ok(Some((graph, output))),
            _ => Ok(None),
        }
    }

    /// Runs a recorded step for another batch of the same shape; `None` where the shape differs.
    pub(super) fn replay_step(&self, recording: &CudaRecording, batch: &Batch) -> Result<Option<CudaTensor>> {
        if recording.splits.is_some_and(|recorded| recorded != splits(&batch.sequences))
            || !recording.placed.rewrite(self, batch)?
        {
            return Ok(None);
        }
        recording.graph.launch().map_err(Error::driver("replaying a step"))?;
        Ok(Some(recording.output.clone()))
    }
}
