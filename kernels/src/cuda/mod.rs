//! The CUDA backend: 16-bit floats with f32 sums, cuBLAS and cuSOLVER for products and factors, our own
//! kernels for the rest. Libraries are loaded when the program runs; nothing of CUDA is needed to build.

mod blas;
mod compile;
mod launch;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::cublas::CudaBlas;
use cudarc::cusolver::safe::DnHandle;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub(crate) use blas::Operand;
pub(crate) use launch::{Arg, Launch};

use crate::{Device, Dtype, Error, HostTensor, Result};

/// One NVIDIA card.
#[derive(Clone)]
pub struct Cuda {
    inner: Arc<Inner>,
}

struct Inner {
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    /// Made at the first factorization.
    solver: OnceLock<DnHandle>,
    module: Arc<CudaModule>,
    functions: Mutex<HashMap<&'static str, CudaFunction>>,
    /// F16 or BF16: how activations and dense weights are kept.
    dtype: Dtype,
    name: String,
}

/// Activations on the card, row-major. A clone shares the memory; so does a range of rows.
#[derive(Clone)]
pub struct CudaTensor {
    data: Arc<Data>,
    /// First row of this tensor in `data`.
    first: usize,
    shape: (usize, usize),
}

enum Data {
    Half(CudaSlice<u16>),
    /// Logits and rotary frequencies.
    Wide(CudaSlice<f32>),
}

impl Cuda {
    /// Card `ordinal`, computing in `dtype` (f32 checkpoints in f16). Fails with a line that says what is
    /// missing: the driver, the card, NVRTC or cuBLAS.
    pub fn new(ordinal: usize, dtype: Dtype) -> Result<Self> {
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
            if !cudarc::cusolver::sys::is_culib_present() {
                return Err(Error::cuda(
                    "CUDA",
                    "libcusolver is not installed (it comes with the CUDA toolkit)",
                ));
            }
        }
        let dtype = if dtype == Dtype::BF16 { Dtype::BF16 } else { Dtype::F16 };
        let context = CudaContext::new(ordinal).map_err(Error::driver("CUDA"))?;
        // SAFETY: everything runs on one stream, so that order needs no events.
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(Error::driver("CUDA"))?;
        let arch = context.compute_capability().map_err(Error::driver("CUDA"))?;
        let stream = context.new_stream().map_err(Error::driver("CUDA"))?;
        let cubin = cudarc::nvrtc::Ptx::from_binary(compile::cubin(arch, dtype)?);
        let module = context.load_module(cubin).map_err(Error::driver("CUDA kernels"))?;
        let blas = CudaBlas::new(stream.clone()).map_err(|e| Error::cuda("cuBLAS", format!("{e:?}")))?;
        launch::keep_freed_memory(&context)?;
        let inner =
            Inner { stream, blas, solver: OnceLock::new(), module, functions: Mutex::default(), dtype, name };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// F16 or BF16.
    pub fn dtype(&self) -> Dtype {
        self.inner.dtype
    }

    /// Free and total memory of the card in bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.inner.stream.context().mem_get_info().map_err(Error::driver("memory"))
    }

    pub(crate) fn solver(&self) -> Result<&DnHandle> {
        if self.inner.solver.get().is_none() {
            let solver = DnHandle::new(self.inner.stream.clone());
            let solver = solver.map_err(|error| Error::cuda("cuSOLVER", format!("{error:?}")))?;
            // Another thread's handle, if it came first, serves as well.
            let _ = self.inner.solver.set(solver);
        }
        self.inner.solver.get().ok_or_else(|| Error::cuda("cuSOLVER", "no handle"))
    }

    /// Memory that nothing was written to yet.
    pub(crate) fn alloc<T: DeviceRepr>(&self, length: usize) -> Result<CudaSlice<T>> {
        // SAFETY: every caller hands the memory to a kernel, product or copy that writes all of it.
        unsafe { self.inner.stream.alloc(length.max(1)) }.map_err(Error::driver("allocation"))
    }

    pub(crate) fn zeros<T: DeviceRepr + cudarc::driver::ValidAsZeroBits>(
        &self,
        length: usize,
    ) -> Result<CudaSlice<T>> {
        self.inner.stream.alloc_zeros(length.max(1)).map_err(Error::driver("allocation"))
    }

    pub(crate) fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        let mut slice = self.alloc(values.len())?;
        if !values.is_empty() {
            self.inner.stream.memcpy_htod(values, &mut slice).map_err(Error::driver("copy to the card"))?;
        }
        Ok(slice)
    }

    pub(crate) fn download<T: DeviceRepr + Default + Clone>(
        &self,
        slice: &CudaSlice<T>,
        length: usize,
    ) -> Result<Vec<T>> {
        let mut values = vec![T::default(); length];
        if length > 0 {
            let view = slice.slice(0..length);
            self.inner.stream.memcpy_dtoh(&view, &mut values).map_err(Error::driver("copy from the card"))?;
        }
        self.synchronize()?;
        Ok(values)
    }

    /// The address of a slice's first element.
    pub(crate) fn address<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(&self.inner.stream).0
    }

    /// A new 16-bit tensor for a kernel to fill.
    pub(crate) fn new_tensor(&self, shape: (usize, usize)) -> Result<CudaTensor> {
        let data = Arc::new(Data::Half(self.alloc(shape.0 * shape.1)?));
        Ok(CudaTensor { data, first: 0, shape })
    }

    /// The same in f32.
    pub(crate) fn new_wide_tensor(&self, shape: (usize, usize)) -> Result<CudaTensor> {
        let data = Arc::new(Data::Wide(self.alloc(shape.0 * shape.1)?));
        Ok(CudaTensor { data, first: 0, shape })
    }

    /// Address of a tensor's 16-bit values.
    pub(crate) fn half(&self, x: &CudaTensor) -> Result<u64> {
        match &*x.data {
            Data::Half(slice) => Ok(self.address(slice) + 2 * (x.first * x.shape.1) as u64),
            Data::Wide(_) => Err(Error::shape("tensor", "16-bit values", "f32 values")),
        }
    }

    /// Address of a tensor's f32 values.
    pub(crate) fn wide(&self, x: &CudaTensor) -> Result<u64> {
        match &*x.data {
            Data::Wide(slice) => Ok(self.address(slice) + 4 * (x.first * x.shape.1) as u64),
            Data::Half(_) => Err(Error::shape("tensor", "f32 values", "16-bit values")),
        }
    }

    /// f32 values in the compute type.
    pub(crate) fn narrow(&self, values: &[f32]) -> Vec<u16> {
        match self.dtype() {
            Dtype::BF16 => values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect(),
            Dtype::F16 | Dtype::F32 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                bytemuck::cast_vec(halves)
            }
        }
    }

    /// A host tensor on the card in the compute type, copied as it is where it has that type already.
    pub(crate) fn upload_host(
        &self,
        host: &HostTensor,
        target: &mut cudarc::driver::CudaViewMut<u16>,
    ) -> Result<()> {
        let copy = |bits: &[u16], target: &mut cudarc::driver::CudaViewMut<u16>| {
            self.inner.stream.memcpy_htod(bits, target).map_err(Error::driver("copy to the card"))
        };
        match bytemuck::try_cast_slice::<u8, u16>(host.bytes) {
            Ok(bits) if host.dtype == self.dtype() => copy(bits, target),
            _ => copy(&self.narrow(&host.to_f32()), target),
        }
    }
}

impl CudaTensor {
    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }
}

impl Device for Cuda {
    type Tensor = CudaTensor;

    fn name(&self) -> String {
        self.inner.name.clone()
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.stream.synchronize().map_err(Error::driver("synchronize"))
    }

    fn tensor(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<CudaTensor> {
        if values.len() != shape.0 * shape.1 {
            return Err(Error::shape("tensor", shape, values.len()));
        }
        let data = Arc::new(Data::Half(self.upload(&self.narrow(&values))?));
        Ok(CudaTensor { data, first: 0, shape })
    }

    fn wide_tensor(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<CudaTensor> {
        if values.len() != shape.0 * shape.1 {
            return Err(Error::shape("tensor", shape, values.len()));
        }
        Ok(CudaTensor { data: Arc::new(Data::Wide(self.upload(&values)?)), first: 0, shape })
    }

    fn to_vec(&self, x: &CudaTensor) -> Result<Vec<f32>> {
        let range = x.first * x.shape.1..(x.first + x.shape.0) * x.shape.1;
        match &*x.data {
            Data::Wide(slice) => Ok(self.download(slice, range.end)?[range].to_vec()),
            Data::Half(slice) => {
                let bits = &self.download(slice, range.end)?[range];
                Ok(match self.dtype() {
                    Dtype::BF16 => bits.iter().map(|b| bf16::from_bits(*b).to_f32()).collect(),
                    Dtype::F16 | Dtype::F32 => bits.iter().map(|b| f16::from_bits(*b).to_f32()).collect(),
                })
            }
        }
    }

    fn shape(&self, x: &CudaTensor) -> (usize, usize) {
        x.shape
    }

    fn rows(&self, x: &CudaTensor, range: Range<usize>) -> Result<CudaTensor> {
        if range.end > x.shape.0 || range.start > range.end {
            return Err(Error::shape("rows", format!("within {}", x.shape.0), range));
        }
        Ok(CudaTensor { data: x.data.clone(), first: x.first + range.start, shape: (range.len(), x.shape.1) })
    }

    fn gather_rows(&self, x: &CudaTensor, indices: &[u32]) -> Result<CudaTensor> {
        let y = self.new_tensor((indices.len(), x.shape.1))?;
        let rows = self.upload(indices)?;
        let args = [
            Arg::Address(self.half(&y)?),
            Arg::Address(self.half(x)?),
            Arg::Address(self.address(&rows)),
            Arg::Int(x.shape.1 as i32),
        ];
        self.launch("gather_rows", Launch::blocks(indices.len(), 256), &args)?;
        Ok(y)
    }

    fn join_columns(&self, parts: &[CudaTensor]) -> Result<CudaTensor> {
        let rows = parts.first().map_or(0, |p| p.shape.0);
        let width = parts.iter().map(|p| p.shape.1).sum();
        let y = self.new_tensor((rows, width))?;
        let mut column = 0;
        for part in parts {
            let args = [
                Arg::Address(self.half(&y)? + 2 * column as u64),
                Arg::Address(self.half(part)?),
                Arg::Int(part.shape.1 as i32),
                Arg::Int(width as i32),
            ];
            self.launch("put_columns", Launch::blocks(rows, 256), &args)?;
            column += part.shape.1;
        }
        Ok(y)
    }
}
