//! One step of decoding as a CUDA graph: launching its kernels one by one costs more than they take.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::buffer_pool::BufferPool;
use super::{BatchMetadata, Cuda, CudaTensor};
use crate::ops::attention::cuda::splits;
use crate::{Batch, Error, Result};

/// A captured step, with the memory that it works in.
pub struct StepGraph {
    graph: CudaGraph,
    output: CudaTensor,
    /// Rewritten before every replay.
    metadata: Arc<BatchMetadata>,
    /// Blocks that share one sequence's keys, where they depend on the context: the graph has fixed them.
    splits: Option<usize>,
    /// Buffers between the kernels; they outlive the graph.
    _buffers: Arc<BufferPool>,
}

// SAFETY: a graph is used by one thread at a time, since replaying needs the graph's owner.
unsafe impl Send for StepGraph {}

impl Cuda {
    /// Runs `step` once, so that everything it needs is there, then captures it as a graph. `None` where it does something
    /// that cannot be captured.
    pub(super) fn capture_step<E: From<Error>>(
        &self,
        batch: &Batch,
        step: &mut dyn FnMut() -> Result<CudaTensor, E>,
    ) -> Result<Option<StepGraph>, E> {
        let buffers = BufferPool::private();
        let before = self.use_buffers(buffers.clone());
        let captured = self.record_into_graph(step);
        self.use_buffers(before);
        let Some((graph, output)) = captured? else {
            return Ok(None);
        };
        let metadata = self.take_metadata(batch)?;
        Ok(Some(StepGraph {
            graph,
            output,
            metadata,
            splits: self.inner.split_by_context.load(Ordering::Relaxed).then(|| splits(&batch.sequences)),
            _buffers: buffers,
        }))
    }

    fn record_into_graph<E: From<Error>>(
        &self,
        step: &mut dyn FnMut() -> Result<CudaTensor, E>,
    ) -> Result<Option<(CudaGraph, CudaTensor)>, E> {
        let failed = || Error::driver("capturing a step");
        let stream = &self.inner.stream;
        drop(step()?);
        stream.synchronize().map_err(failed())?;
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map_err(failed())?;
        self.inner.capturing.store(true, Ordering::Relaxed);
        self.inner.split_by_context.store(false, Ordering::Relaxed);
        let output = step();
        self.inner.capturing.store(false, Ordering::Relaxed);
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        match (output, graph) {
            (Ok(output), Ok(Some(graph))) => Ok(Some((graph, output))),
            _ => Ok(None),
        }
    }

    /// Runs a captured step for another batch of the same shape; `None` where the shape differs.
    pub(super) fn launch_graph(&self, graph: &StepGraph, batch: &Batch) -> Result<Option<CudaTensor>> {
        if graph.splits.is_some_and(|captured| captured != splits(&batch.sequences))
            || !graph.metadata.rewrite(self, batch)?
        {
            return Ok(None);
        }
        graph.graph.launch().map_err(Error::driver("replaying a step"))?;
        Ok(Some(graph.output.clone()))
    }
}
