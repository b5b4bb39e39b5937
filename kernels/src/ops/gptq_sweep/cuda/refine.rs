//! Codes and scales of a finished sweep, changed one after the other while the rest stays as it is.

use std::ops::Range;

use cudarc::driver::{CudaSlice, DeviceRepr};

use super::CudaSweep;
use crate::cuda::{Args, Cuda, Launch, Operand, TF32};
use crate::error::expect;
use crate::ops::gptq_sweep::SweepRefine;
use crate::ops::hessian::cuda::CudaMatrix;
use crate::{Error, Result};

/// Windows whose gradient is one product: one of 128 columns alone would leave multiprocessors idle.
const TOGETHER: usize = 8;

/// A refinement under way.
struct Refining<'a> {
    sweep: &'a CudaSweep,
    hessian: &'a CudaMatrix,
    /// E: what is missing to the target, `[rows, in]`.
    missing: CudaSlice<f32>,
    /// Whether groups lie inside of windows.
    whole: bool,
}

impl SweepRefine for Cuda {
    fn sweep_refine(
        &self,
        sweep: &mut CudaSweep,
        target: &CudaMatrix,
        hessian: &CudaMatrix,
        rounds: usize,
    ) -> Result<()> {
        check(sweep, target, hessian)?;
        let (windows, whole) = sweep.grouping.windows();
        let places = sweep.grouping.places();
        let refining = Refining { sweep, hessian, missing: self.missing(sweep, target)?, whole };
        for _ in 0..rounds {
            for windows in windows.chunks(TOGETHER) {
                self.descend(&refining, windows)?;
            }
            for (group, places) in places.iter().enumerate().filter(|_| !whole) {
                self.refit(&refining, group, places)?;
            }
        }
        Ok(())
    }

    fn sweep_losses(
        &self,
        sweep: &CudaSweep,
        weights: &CudaMatrix,
        hessian: &CudaMatrix,
        pull: Option<&CudaMatrix>,
    ) -> Result<Vec<f32>> {
        check(sweep, weights, hessian)?;
        expect("sweep_losses pull", weights.dims, pull.map_or(weights.dims, |pull| pull.dims))?;
        let (rows, columns) = sweep.dims();
        let difference = self.missing(sweep, weights)?;
        let gradient = self.alloc::<f32>(rows * columns)?;
        let wide = |slice: &CudaSlice<f32>| Operand::wide(self.address(slice), columns);
        // H is symmetric, and the tensor cores read it along its rows.
        let (h_rows, e) = (wide(&hessian.values).transposed(), wide(&difference));
        self.gemm_as(TF32, (columns, rows, columns), (1.0, 0.0), [h_rows, e, wide(&gradient)])?;
        let losses = self.alloc::<f32>(rows)?;
        let args = Args::new([self.address(&losses), self.address(&difference), self.address(&gradient)])
            .addresses([pull.map_or(0, |pull| self.address(&pull.values))])
            .ints([columns]);
        self.launch("sweep_row_losses", Launch::blocks(rows, 256), &args)?;
        self.download(&losses.slice(..rows))
    }

    fn sweep_copy(&self, sweep: &CudaSweep) -> Result<CudaSweep> {
        Ok(CudaSweep {
            weights: self.copied(&sweep.weights)?,
            codes: self.copied(&sweep.codes)?,
            losses: self.copied(&sweep.losses)?,
            scales: self.copied(&sweep.scales)?,
            zeros: self.copied(&sweep.zeros)?,
            group_of: self.copied(&sweep.group_of)?,
            group_end: self.copied(&sweep.group_end)?,
            order: self.copied(&sweep.order)?,
            rows: sweep.rows,
            grids_known: sweep.grids_known,
            grouping: sweep.grouping.clone(),
            spec: sweep.spec,
            strip: None,
        })
    }

    fn sweep_take_rows(&self, sweep: &mut CudaSweep, from: &CudaSweep, rows: Range<usize>) -> Result<()> {
        let (dims, other) = (sweep.dims(), from.dims());
        if dims != other || rows.end > dims.0 || rows.start > rows.end {
            return Err(Error::shape("sweep_take_rows", (dims, "rows of both"), (other, rows)));
        }
        let values = rows.start * dims.1..rows.end * dims.1;
        self.copy_range(&from.weights, &mut sweep.weights, values.clone())?;
        self.copy_range(&from.codes, &mut sweep.codes, values)?;
        self.copy_range(&from.losses, &mut sweep.losses, rows.clone())?;
        let args =
            Args::new([self.address(&sweep.scales), self.address(&sweep.zeros), self.address(&from.scales)])
                .addresses([self.address(&from.zeros)])
                .ints([dims.0, rows.start, rows.len()]);
        let groups = sweep.grouping.groups;
        self.launch("sweep_take_grids", Launch::grid(rows.len().div_ceil(256), groups, 1, 256), &args)
    }
}

impl Cuda {
    /// `W - Q`
    fn missing(&self, sweep: &CudaSweep, weights: &CudaMatrix) -> Result<CudaSlice<f32>> {
        let count = sweep.rows * sweep.dims().1;
        let difference = self.alloc::<f32>(count)?;
        let args = Args::new([self.address(&difference), self.address(&weights.values)])
            .addresses([self.address(&sweep.weights)])
            .long(count);
        self.launch("sweep_minus", Launch::threads(count), &args)?;
        Ok(difference)
    }

    /// Every code of some neighbouring windows once, and the scales of groups that lie in them.
    fn descend(&self, refining: &Refining, windows: &[Range<usize>]) -> Result<()> {
        let Refining { sweep, hessian, missing, whole } = refining;
        let (Some(first), Some(last)) = (windows.first(), windows.last()) else { return Ok(()) };
        let ((rows, k), span) = (sweep.dims(), first.start..last.end);
        let h = |row: usize, column: usize| {
            Operand::wide(self.address(&hessian.values) + 4 * (row * k + column) as u64, k)
        };
        let gradient = self.alloc::<f32>(rows * span.len())?;
        let g = |column: usize| {
            Operand::wide(self.address(&gradient) + 4 * (column - span.start) as u64, span.len())
        };
        // H is symmetric, and the tensor cores read it along its rows. What is chosen by G need not know it to the last bit:
        // E itself is exact.
        let (h_rows, e) = (h(span.start, 0).transposed(), Operand::wide(self.address(missing), k));
        self.gemm_as(TF32, (span.len(), rows, k), (1.0, 0.0), [h_rows, e, g(span.start)])?;
        for window in windows {
            let width = window.len();
            let changes = self.alloc::<f32>(rows * width)?;
            let args =
                Args::new([self.address(&sweep.weights), self.address(&sweep.codes), self.address(missing)])
                    .addresses([self.address(&changes), g(window.start).address, self.address(&sweep.scales)])
                    .addresses([self.address(&sweep.zeros), self.address(&hessian.values)])
                    .addresses([self.address(&sweep.group_of)])
                    .ints([rows, k, window.start, width, span.len(), usize::from(*whole)])
                    .and(sweep.spec.arg());
            self.launch("sweep_descend", self.by_rows(rows)?, &args)?;
            // G -= D H for the windows that are still to come.
            let (d, sizes) =
                (Operand::wide(self.address(&changes), width), (span.end - window.end, rows, width));
            let h_rows = h(window.end, window.start).transposed();
            self.gemm_as(TF32, sizes, (-1.0, 1.0), [h_rows, d, g(window.end)])?;
        }
        Ok(())
    }

    /// The scales of one group, wherever it lies.
    fn refit(&self, refining: &Refining, number: usize, places: &[usize]) -> Result<()> {
        let Refining { sweep, hessian, missing, .. } = refining;
        let ((rows, k), width) = (sweep.dims(), places.len());
        let places = self.upload(&places.iter().map(|place| *place as u32).collect::<Vec<_>>())?;
        let places = self.address(&places);
        // H of all columns and of the group's own, by those of the group.
        let columns = self.taken(hessian, 0, places, (k, width))?;
        let inside = self.taken(hessian, places, places, (width, width))?;
        let matrix = || self.alloc::<f32>(rows * width);
        let (codes, product, gradient) = (matrix()?, matrix()?, matrix()?);
        let args =
            Args::new([self.address(&codes), self.address(&sweep.codes), self.address(&sweep.zeros), places])
                .ints([rows, k, width, number]);
        self.launch("sweep_signed_codes", Launch::blocks(rows, 128), &args)?;
        let wide = |slice: &CudaSlice<f32>| Operand::wide(self.address(slice), width);
        self.gemm_wide((width, rows, width), (1.0, 0.0), [wide(&inside), wide(&codes), wide(&product)])?;
        let e = Operand::wide(self.address(missing), k);
        self.gemm_wide((width, rows, k), (1.0, 0.0), [wide(&columns), e, wide(&gradient)])?;
        let args =
            Args::new([self.address(&sweep.weights), self.address(missing), self.address(&sweep.scales)])
                .addresses([self.address(&codes), self.address(&product), self.address(&gradient), places])
                .ints([rows, k, width, number])
                .and(sweep.spec.arg());
        self.launch("sweep_rescale", Launch::blocks(rows.div_ceil(8), 32 * 8), &args)
    }

    /// `matrix[rows, columns]`, from addresses of the places to take; 0 for those from the first on.
    pub(super) fn taken(
        &self,
        matrix: &CudaMatrix,
        rows: u64,
        columns: u64,
        dims: (usize, usize),
    ) -> Result<CudaSlice<f32>> {
        let taken = self.alloc::<f32>(dims.0 * dims.1)?;
        let args = Args::new([self.address(&taken), self.address(&matrix.values), rows, columns])
            .ints([matrix.dims.1, dims.1]);
        self.launch("sweep_take", Launch::grid(dims.1.div_ceil(256), dims.0, 1, 256), &args)?;
        Ok(taken)
    }

    /// The same values in memory of their own.
    pub(super) fn copied<T: DeviceRepr>(&self, slice: &CudaSlice<T>) -> Result<CudaSlice<T>> {
        let mut copy = self.alloc::<T>(slice.len())?;
        self.copy_range(slice, &mut copy, 0..slice.len())?;
        Ok(copy)
    }
}

fn check(sweep: &CudaSweep, weights: &CudaMatrix, hessian: &CudaMatrix) -> Result<()> {
    let (rows, columns) = sweep.dims();
    let got = (weights.dims, hessian.dims);
    expect("gptq_sweep target and Hessian", ((rows, columns), (columns, columns)), got)
}
