//! The CUDA backend: f16, bf16 or f32 with f32 sums, cuBLAS for products, our own kernels for the
//! rest. Libraries are loaded when the program runs; nothing of CUDA is needed to build.

mod answer;
mod batch_metadata;
mod blas;
mod buffer_pool;
mod compile;
mod graph;
mod launch;
mod memory;
mod offload;
mod order;
mod tensor;
mod tensor_map;
pub(crate) mod tf32;
mod transfer;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::cublas::CudaBlas;
use cudarc::driver::result::memcpy_dtod_async;
use cudarc::driver::sys::{self, CUevent_flags};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub(crate) use answer::Answer;
pub(crate) use batch_metadata::BatchMetadata;
pub(crate) use blas::{Operand, TF32};
use buffer_pool::BufferPool;
use compile::Program;
pub use graph::StepGraph;
pub(crate) use launch::{Arg, Args, Launch};
use memory::Pool;
pub use offload::CudaOffloaded;
pub use order::CudaOrder;
pub(crate) use order::{Layout, PANEL_ROWS, PANEL_TILE};
pub use tensor::CudaTensor;
use tensor::Data;
pub(crate) use tensor_map::Rows;
pub(crate) use transfer::Bytes;
use transfer::Transfers;

use crate::{Batch, Device, Dtype, Error, HostTensor, Memory, Result};

/// One NVIDIA GPU.
#[derive(Clone)]
pub struct Cuda {
    inner: Arc<Inner>,
}

struct Inner {
    /// The stream that computes.
    stream: Arc<CudaStream>,
    transfers: Transfers,
    pool: Pool,
    blas: CudaBlas,
    arch: (i32, i32),
    multiprocessors: usize,
    /// Bytes of shared memory that one block may have.
    shared_memory: usize,
    /// Loaded at the first use of one of their kernels, in the order of [`Program::ALL`].
    modules: [OnceLock<Arc<CudaModule>>; Program::ALL.len()],
    functions: Mutex<HashMap<&'static str, CudaFunction>>,
    /// Clusters that run at a time, by kernel and blocks of a cluster.
    clusters: Mutex<HashMap<(&'static str, u32), usize>>,
    launches: AtomicU64,
    /// Where buffers of activations come from and go back to.
    buffers: Mutex<Arc<BufferPool>>,
    /// A step is being captured: nothing may ask the driver for memory.
    capturing: AtomicBool,
    /// Something that ran chose its blocks by how long the contexts are.
    split_by_context: AtomicBool,
    /// The last batch that something ran on.
    metadata: Mutex<Option<(Batch, Arc<BatchMetadata>)>>,
    /// How activations and dense weights are kept.
    dtype: Dtype,
    name: String,
}

impl Cuda {
    /// GPU `ordinal`, computing in `dtype`; 16-bit types use the tensor cores, f32 does not. Fails with a line
    /// that says what is missing: the driver, the GPU, NVRTC or cuBLAS. `memory` acts as if the GPU had that
    /// many bytes.
    pub fn new(ordinal: usize, dtype: Dtype, memory: Option<usize>) -> Result<Self> {
        // SAFETY: these only ask whether a library can be loaded.
        unsafe {
            if !cudarc::driver::sys::is_culib_present() {
                return Err(Error::cuda("CUDA", "the NVIDIA driver (libcuda) is not installed"));
            }
            if !cudarc::cublas::sys::is_culib_present() {
                return Err(Error::cuda(
                    "CUDA",
                    "libcublas is not installed (it comes with the CUDA toolkit)",
                ));
            }
        }
        let context = CudaContext::new(ordinal).map_err(Error::driver("CUDA"))?;
        // SAFETY: everything computes on one stream, and copies on others are ordered by events of their own (`Copying`).
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(Error::driver("CUDA"))?;
        let arch = context.compute_capability().map_err(Error::driver("CUDA"))?;
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).map_err(Error::driver("CUDA"))? as usize;
        let shared = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_memory = context.attribute(shared).map_err(Error::driver("CUDA"))? as usize;
        let stream = context.new_stream().map_err(Error::driver("CUDA"))?;
        let blas = CudaBlas::new(stream.clone()).map_err(|e| Error::cuda("cuBLAS", format!("{e:?}")))?;
        let inner = Inner {
            transfers: Transfers::new(&stream)?,
            pool: Pool::new(&context, memory)?,
            stream,
            blas,
            arch,
            multiprocessors,
            shared_memory,
            modules: Default::default(),
            functions: Mutex::default(),
            clusters: Mutex::default(),
            launches: AtomicU64::new(0),
            buffers: Mutex::new(BufferPool::common()),
            capturing: AtomicBool::new(false),
            split_by_context: AtomicBool::new(false),
            metadata: Mutex::default(),
            dtype,
            name,
        };
        let gpu = Self { inner: Arc::new(inner) };
        // What is missing for compiling shows here, not in the middle of the work.
        gpu.module(Program::Common)?;
        Ok(gpu)
    }

    /// The compute type.
    pub fn dtype(&self) -> Dtype {
        self.inner.dtype
    }

    /// To be told by what chooses its blocks by the contexts of a batch: a graph of it fits no others.
    pub(crate) fn depends_on_contexts(&self) {
        self.inner.split_by_context.store(true, Ordering::Relaxed);
    }

    pub(crate) fn multiprocessors(&self) -> usize {
        self.inner.multiprocessors
    }

    /// Bytes of shared memory that one block may have.
    pub(crate) fn shared_memory(&self) -> usize {
        self.inner.shared_memory
    }

    /// Whether the kernels that only Hopper has are there.
    pub(crate) fn is_hopper(&self) -> bool {
        compile::is_hopper(self.inner.arch)
    }

    /// The module of a program, compiled and loaded if it was not yet.
    fn module(&self, program: Program) -> Result<&Arc<CudaModule>> {
        let slot = &self.inner.modules[program as usize];
        if slot.get().is_none() {
            let cubin = compile::cubin(program, self.inner.arch, self.inner.dtype)?;
            let cubin = cudarc::nvrtc::Ptx::from_binary(cubin);
            let module = self.inner.stream.context().load_module(cubin);
            // Another thread's, if it came first, serves as well.
            let _ = slot.set(module.map_err(Error::driver("CUDA kernels"))?);
        }
        slot.get().ok_or_else(|| Error::cuda("CUDA kernels", "no module"))
    }

    /// The address of a slice's first element.
    pub(crate) fn address<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(&self.inner.stream).0
    }

    /// The bytes of f32 values in the compute type.
    pub(crate) fn encode(&self, values: &[f32]) -> Vec<u8> {
        match self.dtype() {
            Dtype::F32 => bytemuck::cast_slice(values).to_vec(),
            Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            Dtype::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                bytemuck::cast_slice(&halves).to_vec()
            }
        }
    }
}

impl Device for Cuda {
    type Tensor = CudaTensor;
    type Offloaded = CudaOffloaded;
    type Order = CudaOrder;
    type Graph = StepGraph;
    type Mark = CudaEvent;

    fn name(&self) -> String {
        self.inner.name.clone()
    }

    fn arithmetic(&self) -> String {
        format!("{}, {:?}", self.inner.name, self.dtype()).to_lowercase()
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.stream.synchronize().map_err(Error::driver("synchronize"))
    }

    fn mark(&self) -> Result<CudaEvent> {
        let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
        self.inner.stream.record_event(timed).map_err(Error::driver("timing"))
    }

    fn seconds(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f64> {
        Ok(f64::from(from.elapsed_ms(to).map_err(Error::driver("timing"))?) / 1e3)
    }

    fn launches(&self) -> Option<u64> {
        Some(self.inner.launches.load(Ordering::Relaxed))
    }

    fn works_aside(&self) -> bool {
        true
    }

    fn element_size(&self) -> usize {
        self.dtype().size()
    }

    fn memory(&self) -> Result<Option<Memory>> {
        self.inner.pool.memory().map(Some)
    }

    fn offload(&self, x: &CudaTensor) -> Result<CudaOffloaded> {
        self.park_tensor(x)
    }

    fn fetch(&self, offloaded: &CudaOffloaded) -> Result<CudaTensor> {
        self.fetch_tensor(offloaded)
    }

    fn copy(&self, x: &CudaTensor) -> Result<CudaTensor> {
        let y = self.new_tensor(x.shape)?;
        let (target, source) = (self.real(&y)?, self.real(x)?);
        let bytes = self.dtype().size() * x.shape.0 * x.shape.1;
        // SAFETY: both hold so many bytes, and everything runs on this one stream.
        unsafe { memcpy_dtod_async(target, source, bytes, self.inner.stream.cu_stream()) }
            .map_err(Error::driver("copy on the GPU"))?;
        Ok(y)
    }

    fn capture<E: From<Error>>(
        &self,
        batch: &Batch,
        step: &mut dyn FnMut() -> Result<CudaTensor, E>,
    ) -> Result<Option<StepGraph>, E> {
        self.capture_step(batch, step)
    }

    fn replay(&self, graph: &StepGraph, batch: &Batch) -> Result<Option<CudaTensor>> {
        self.launch_graph(graph, batch)
    }

    fn tensor(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<CudaTensor> {
        if values.len() != shape.0 * shape.1 {
            return Err(Error::shape("tensor", shape, values.len()));
        }
        let data = Arc::new(Data::Real(self.upload(&self.encode(&values))?.into()));
        Ok(CudaTensor::new(data, shape))
    }

    fn wide_tensor(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<CudaTensor> {
        if values.len() != shape.0 * shape.1 {
            return Err(Error::shape("tensor", shape, values.len()));
        }
        let data = Arc::new(Data::Wide(self.upload_bytes(&[bytemuck::cast_slice(&values)])?));
        Ok(CudaTensor::new(data, shape))
    }

    fn to_vec(&self, x: &CudaTensor) -> Result<Vec<f32>> {
        x.check_order()?;
        let (bytes, dtype) = match &*x.data {
            Data::Wide(bytes) => (bytes, Dtype::F32),
            Data::Real(bytes) => (bytes, self.dtype()),
        };
        let row = x.shape.1 * dtype.size();
        let bytes = self.download(&self.view(bytes, x.first * row..(x.first + x.shape.0) * row)?)?;
        Ok(HostTensor { dtype, shape: vec![x.shape.0 * x.shape.1], bytes: &bytes }.to_f32())
    }

    fn shape(&self, x: &CudaTensor) -> (usize, usize) {
        x.shape
    }

    fn rows(&self, x: &CudaTensor, range: Range<usize>) -> Result<CudaTensor> {
        x.check_order()?;
        if range.end > x.shape.0 || range.start > range.end {
            return Err(Error::shape("rows", format!("within {}", x.shape.0), range));
        }
        Ok(CudaTensor { first: x.first + range.start, shape: (range.len(), x.shape.1), ..x.clone() })
    }

    fn gather_rows(&self, x: &CudaTensor, indices: &[u32]) -> Result<CudaTensor> {
        let y = self.new_tensor((indices.len(), x.shape.1))?;
        let rows = self.upload(indices)?;
        let args = Args::new([self.real(&y)?, self.real(x)?, self.address(&rows)]).ints([x.shape.1]);
        self.launch("gather_rows", Launch::blocks(indices.len(), 256), &args)?;
        Ok(y)
    }

    fn join_columns(&self, parts: &[CudaTensor]) -> Result<CudaTensor> {
        let rows = parts.first().map_or(0, |p| p.shape.0);
        let width = parts.iter().map(|p| p.shape.1).sum();
        let y = self.new_tensor((rows, width))?;
        let mut column = 0;
        for part in parts {
            let args = Args::new([self.real(&y)? + (self.dtype().size() * column) as u64, self.real(part)?])
                .ints([part.shape.1, width]);
            self.launch("put_columns", Launch::blocks(rows, 256), &args)?;
            column += part.shape.1;
        }
        Ok(y)
    }
}
