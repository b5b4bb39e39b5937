//! The codes and zero points of a finished sweep as the file's words.

use cudarc::driver::CudaSlice;

use super::CudaSweep;
use crate::Result;
use crate::cuda::{Args, Cuda, Launch};
use crate::packing::{ZeroOffset, lane_words};

impl Cuda {
    pub(super) fn pack_codes(&self, sweep: &CudaSweep) -> Result<CudaSlice<u32>> {
        let (k, rows, bits) = (sweep.grouping.order.len(), sweep.rows, sweep.spec.bits);
        let words = lane_words(k, bits)?;
        let codes = self.codes_in_file_order(sweep)?;
        let qweight = self.alloc::<u32>(words * rows)?;
        let args = Args::new([self.address(&qweight), self.address(&codes)]).ints([rows, k, bits as usize]);
        self.launch("pack_codes", Launch::grid(rows.div_ceil(256), words, 1, 256), &args)?;
        Ok(qweight)
    }

    pub(super) fn pack_zeros(&self, sweep: &CudaSweep, zero_offset: ZeroOffset) -> Result<CudaSlice<u32>> {
        let (rows, groups, bits) = (sweep.rows, sweep.grouping.groups, sweep.spec.bits);
        let words = lane_words(rows, bits)?;
        let qzeros = self.alloc::<u32>(groups * words)?;
        let numbers = [words, rows, bits as usize, zero_offset.into()];
        let args = Args::new([self.address(&qzeros), self.address(&sweep.zeros)]).ints(numbers);
        self.launch("pack_zeros", Launch::grid(words.div_ceil(256), groups, 1, 256), &args)?;
        Ok(qzeros)
    }

    /// `[rows, in]`, input features in the checkpoint's order.
    pub(super) fn codes_in_file_order(&self, sweep: &CudaSweep) -> Result<CudaSlice<u8>> {
        let k = sweep.grouping.order.len();
        let codes = self.alloc::<u8>(sweep.rows * k)?;
        let args = Args::new([self.address(&codes), self.address(&sweep.codes), self.address(&sweep.order)])
            .ints([k]);
        self.launch("sweep_scatter", Launch::blocks(sweep.rows, 256), &args)?;
        Ok(codes)
    }
}
