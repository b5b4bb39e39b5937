//! Launching a kernel by its name.

use cudarc::driver::{CudaFunction, DeviceRepr, LaunchConfig, PushKernelArg, sys};

use super::Cuda;
use super::compile::Program;
use crate::{Error, Result};

/// One argument, in the order of the kernel's parameters.
pub(crate) enum Arg {
    Address(u64),
    Int(i32),
    Long(u64),
    Float(f32),
    /// `struct Spec` of the sweep.
    Spec([i32; 5]),
    /// `struct Batch` of the attention.
    Batch([u64; 5]),
}

/// How many threads, and how much shared memory a block gets.
pub(crate) struct Launch {
    grid: (u32, u32, u32),
    threads: u32,
    shared: u32,
}

impl Launch {
    /// One block for each of `count` things.
    pub fn blocks(count: usize, threads: u32) -> Self {
        Self { grid: (count as u32, 1, 1), threads, shared: 0 }
    }

    /// One thread for each of `count` things.
    pub fn threads(count: usize) -> Self {
        Self::blocks(count.div_ceil(256), 256)
    }

    pub fn grid(x: usize, y: usize, z: usize, threads: u32) -> Self {
        Self { grid: (x as u32, y as u32, z as u32), threads, shared: 0 }
    }

    /// With `bytes` of dynamic shared memory a block.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes as u32, ..self }
    }
}

#[repr(transparent)]
struct Raw<const N: usize, T>([T; N]);

// SAFETY: plain integers in the order and size of the kernels' structs.
unsafe impl<const N: usize> DeviceRepr for Raw<N, i32> {}
// SAFETY: as above.
unsafe impl<const N: usize> DeviceRepr for Raw<N, u64> {}

/// Above this much dynamic shared memory a kernel must be told first.
const PLAIN_SHARED: u32 = 48 << 10;

impl Cuda {
    pub(crate) fn launch(&self, kernel: &'static str, launch: Launch, args: &[Arg]) -> Result<()> {
        if launch.grid.0 == 0 || launch.grid.1 == 0 || launch.grid.2 == 0 {
            return Ok(());
        }
        let function = self.function(kernel)?;
        if launch.shared > PLAIN_SHARED {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, launch.shared as i32).map_err(Error::driver(kernel))?;
        }
        let specs: Vec<_> =
            args.iter().map(|a| if let Arg::Spec(s) = a { Raw(*s) } else { Raw([0; 5]) }).collect();
        let batches: Vec<_> =
            args.iter().map(|a| if let Arg::Batch(b) = a { Raw(*b) } else { Raw([0; 5]) }).collect();
        let mut builder = self.inner.stream.launch_builder(&function);
        for (i, arg) in args.iter().enumerate() {
            match arg {
                Arg::Address(value) | Arg::Long(value) => builder.arg(value),
                Arg::Int(value) => builder.arg(value),
                Arg::Float(value) => builder.arg(value),
                Arg::Spec(_) => builder.arg(&specs[i]),
                Arg::Batch(_) => builder.arg(&batches[i]),
            };
        }
        let config = LaunchConfig {
            grid_dim: launch.grid,
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared,
        };
        // SAFETY: each operation passes what its kernel's parameter list says, over memory that it has sized.
        unsafe { builder.launch(config) }.map_err(Error::driver(kernel))?;
        Ok(())
    }

    fn function(&self, kernel: &'static str) -> Result<CudaFunction> {
        let mut functions =
            self.inner.functions.lock().map_err(|_| Error::cuda(kernel, "an earlier launch failed"))?;
        if let Some(function) = functions.get(kernel) {
            return Ok(function.clone());
        }
        let function =
            self.module(Program::of(kernel))?.load_function(kernel).map_err(Error::driver(kernel))?;
        functions.insert(kernel, function.clone());
        Ok(function)
    }
}
