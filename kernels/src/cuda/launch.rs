//! Launching a kernel by its name.

use std::ffi::c_void;
use std::ops::Deref;
use std::sync::atomic::Ordering;

use cudarc::driver::{CudaFunction, sys};

use super::Cuda;
use super::compile::Program;
use crate::{Error, Result};

/// One argument of a kernel.
pub(crate) enum Arg {
    Address(u64),
    Int(i32),
    Long(u64),
    Float(f32),
    /// `struct Spec` of the sweep.
    Spec([i32; 5]),
    /// `struct Batch` of the attention.
    Batch([u64; 5]),
    /// `struct CodedCache` of the attention.
    Codes([u64; 4]),
    /// `struct Gate` of the gated activation.
    Gate([f32; 2]),
    /// `struct FewIds` of the embedding.
    Ids([u32; 16]),
    /// `struct TensorMap` of the copy engine.
    Map(Box<sys::CUtensorMap>),
}

impl Arg {
    /// Where the driver reads the argument from.
    fn pointer(&self) -> *mut c_void {
        match self {
            Self::Address(value) | Self::Long(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::Int(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::Float(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::Spec(values) => values.as_ptr() as *mut c_void,
            Self::Batch(values) => values.as_ptr() as *mut c_void,
            Self::Codes(values) => values.as_ptr() as *mut c_void,
            Self::Gate(values) => values.as_ptr() as *mut c_void,
            Self::Ids(values) => values.as_ptr() as *mut c_void,
            Self::Map(map) => std::ptr::from_ref(map.as_ref()) as *mut c_void,
        }
    }
}

/// All arguments, in the order of the kernel's parameters.
pub(crate) struct Args(Vec<Arg>);

impl Args {
    /// Those of a kernel whose parameters begin with these addresses.
    pub fn new<const N: usize>(addresses: [u64; N]) -> Self {
        Self(addresses.map(Arg::Address).into())
    }

    pub fn addresses<const N: usize>(self, addresses: [u64; N]) -> Self {
        addresses.into_iter().map(Arg::Address).fold(self, Self::and)
    }

    pub fn ints<const N: usize>(self, numbers: [usize; N]) -> Self {
        numbers.into_iter().map(|number| Arg::Int(number as i32)).fold(self, Self::and)
    }

    pub fn floats<const N: usize>(self, numbers: [f32; N]) -> Self {
        numbers.into_iter().map(Arg::Float).fold(self, Self::and)
    }

    pub fn long(self, number: usize) -> Self {
        self.and(Arg::Long(number as u64))
    }

    pub fn and(mut self, arg: Arg) -> Self {
        self.0.push(arg);
        self
    }
}

impl Deref for Args {
    type Target = [Arg];

    fn deref(&self) -> &[Arg] {
        &self.0
    }
}

/// How many threads, and how much shared memory a block gets.
pub(crate) struct Launch {
    grid: (u32, u32, u32),
    threads: u32,
    shared: u32,
    early: bool,
    mostly_shared: bool,
    cluster: u32,
}

impl Launch {
    /// One block for each of `count` things.
    pub fn blocks(count: usize, threads: u32) -> Self {
        Self::grid(count, 1, 1, threads)
    }

    /// One thread for each of `count` things.
    pub fn threads(count: usize) -> Self {
        Self::blocks(count.div_ceil(256), 256)
    }

    pub fn grid(x: usize, y: usize, z: usize, threads: u32) -> Self {
        let grid = (x as u32, y as u32, z as u32);
        Self { grid, threads, shared: 0, early: false, mostly_shared: false, cluster: 1 }
    }

    /// With `bytes` of dynamic shared memory a block.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes as u32, ..self }
    }

    /// May start before the kernel before it has ended: for kernels that call `await_previous`.
    pub fn early(self) -> Self {
        Self { early: true, ..self }
    }

    /// For the kernels of a decoding step: a multiprocessor that divides its memory anew between cache and shared
    /// memory for every kernel waits each time until it is empty.
    pub fn mostly_shared(self) -> Self {
        Self { mostly_shared: true, ..self }
    }

    /// `blocks` along y see each other's shared memory.
    pub fn cluster(self, blocks: usize) -> Self {
        Self { cluster: blocks as u32, ..self }
    }
}

/// Above this much dynamic shared memory a kernel must be told first.
const PLAIN_SHARED: u32 = 48 << 10;

impl Cuda {
    pub(crate) fn launch(&self, kernel: &'static str, launch: Launch, args: &[Arg]) -> Result<()> {
        if launch.grid.0 == 0 || launch.grid.1 == 0 || launch.grid.2 == 0 {
            return Ok(());
        }
        let function = self.function(kernel, launch.mostly_shared)?;
        self.inner.launches.fetch_add(1, Ordering::Relaxed);
        let mut attributes = self.attributes(&function, kernel, &launch)?;
        let config = self.config(&launch, &mut attributes);
        let mut pointers: Vec<_> = args.iter().map(Arg::pointer).collect();
        self.inner.stream.context().bind_to_thread().map_err(Error::driver(kernel))?;
        // SAFETY: each operation passes what its kernel's parameter list says, over memory that it has sized; the
        // driver only reads the arguments, before this returns.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function.cu_function(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(Error::driver(kernel))
    }

    /// How many clusters of a launch run at a time. Of blocks without one, which the driver does not count, there is
    /// one on every multiprocessor at least. The driver is asked once: every launch of a kernel has the same threads and
    /// shared memory.
    pub(crate) fn clusters(&self, kernel: &'static str, launch: &Launch) -> Result<usize> {
        if launch.cluster == 1 {
            return Ok(self.multiprocessors());
        }
        let mut known =
            self.inner.clusters.lock().map_err(|_| Error::cuda(kernel, "an earlier launch failed"))?;
        if let Some(count) = known.get(&(kernel, launch.cluster)) {
            return Ok(*count);
        }
        let count = self.count_clusters(kernel, launch)?;
        known.insert((kernel, launch.cluster), count);
        Ok(count)
    }

    fn count_clusters(&self, kernel: &'static str, launch: &Launch) -> Result<usize> {
        let function = self.function(kernel, launch.mostly_shared)?;
        let mut attributes = self.attributes(&function, kernel, launch)?;
        let config = self.config(launch, &mut attributes);
        let mut count = 0;
        // SAFETY: the driver reads the configuration and its attributes, and writes the count, before this returns.
        unsafe { sys::cuOccupancyMaxActiveClusters(&mut count, function.cu_function(), &config) }
            .result()
            .map_err(Error::driver(kernel))?;
        Ok(count.max(0) as usize)
    }

    /// Tells the function and the launch what is out of the ordinary.
    fn attributes(
        &self,
        function: &CudaFunction,
        kernel: &'static str,
        launch: &Launch,
    ) -> Result<Vec<sys::CUlaunchAttribute>> {
        if launch.shared > PLAIN_SHARED {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, launch.shared as i32).map_err(Error::driver(kernel))?;
        }
        let mut attributes = Vec::with_capacity(2);
        // Earlier GPUs know neither.
        if launch.early && self.is_hopper() {
            attributes.push(attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                |value| value.programmaticStreamSerializationAllowed = 1,
            ));
        }
        if launch.cluster > 1 {
            attributes.push(attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                |value| {
                    value.clusterDim.x = 1;
                    value.clusterDim.y = launch.cluster;
                    value.clusterDim.z = 1;
                },
            ));
        }
        Ok(attributes)
    }

    fn config(&self, launch: &Launch, attributes: &mut [sys::CUlaunchAttribute]) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: launch.grid.0,
            gridDimY: launch.grid.1,
            gridDimZ: launch.grid.2,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.inner.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }

    fn function(&self, kernel: &'static str, mostly_shared: bool) -> Result<CudaFunction> {
        let mut functions =
            self.inner.functions.lock().map_err(|_| Error::cuda(kernel, "an earlier launch failed"))?;
        if let Some(function) = functions.get(kernel) {
            return Ok(function.clone());
        }
        let function =
            self.module(Program::of(kernel))?.load_function(kernel).map_err(Error::driver(kernel))?;
        if mostly_shared {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            function.set_attribute(attribute, 100).map_err(Error::driver(kernel))?;
        }
        functions.insert(kernel, function.clone());
        Ok(function)
    }
}

fn attribute(
    id: sys::CUlaunchAttributeID,
    set: impl FnOnce(&mut sys::CUlaunchAttributeValue),
) -> sys::CUlaunchAttribute {
    // SAFETY: plain numbers, for which zeros are valid.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = id;
    set(&mut attribute.value);
    attribute
}
