//! How the copy engine of Hopper is told where values lie: the driver encodes it, a kernel gets it as an argument.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::{Arg, Cuda};
use crate::{Dtype, Error, Result};

/// `[rows, heads, head_dim]` values without gaps.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub rows: usize,
    pub heads: usize,
    pub head_dim: usize,
}

/// Features of a box: what a row of shared memory holds that the tensor cores read without conflicts.
const FEATURES: u32 = 64;

impl Cuda {
    /// Values of 16 bits at an address, to be copied in boxes of some rows of 64 features of one head, their 16-byte
    /// pieces permuted; rows beyond the last are zeros.
    pub(crate) fn tensor_map(&self, address: u64, of: Rows, rows: usize) -> Result<Arg> {
        let kind = match self.dtype() {
            Dtype::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let dims = [of.head_dim, of.heads, of.rows].map(|dim| dim as u64);
        let strides = [2 * dims[0], 2 * dims[0] * dims[1]];
        let boxes = [FEATURES, 1, rows as u32];
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the driver reads three dimensions, two strides, three sizes and three steps, and writes the map.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                kind,
                3,
                address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                [1; 3].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(Error::driver("describing a tensor"))?;
        Ok(Arg::Map(Box::new(map)))
    }
}
