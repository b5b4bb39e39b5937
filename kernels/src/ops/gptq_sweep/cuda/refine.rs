//! Codes and scales of a finished sweep, changed one after the other while the rest stays as it is.

use std::ops::Range;

use cudarc::driver::{CudaSlice, DeviceRepr};

use super::{CudaSweep, ROWS};
use crate::cuda::{Arg, Cuda, Launch, Operand};
use crate::ops::hessian::cuda::CudaMatrix;
use crate::{Error, LOOP_WINDOW, Result};

/// The places of one group, and the rows of H that belong to them.
struct Group {
    number: usize,
    width: usize,
    /// Address of the places.
    places: u64,
    /// Address of `[width, in]`.
    h: u64,
}

impl Cuda {
    pub(super) fn refine(
        &self,
        sweep: &mut CudaSweep,
        target: &CudaMatrix,
        hessian: &CudaMatrix,
        rounds: usize,
    ) -> Result<()> {
        check(sweep, target, hessian)?;
        let (_, gradient) = self.gradient(sweep, target, hessian)?;
        let columns = sweep.dims().1;
        let places = sweep.grouping.places();
        for _ in 0..rounds {
            for start in (0..columns).step_by(LOOP_WINDOW) {
                self.descend(sweep, &gradient, hessian, start..(start + LOOP_WINDOW).min(columns))?;
            }
            for (number, places) in places.iter().enumerate() {
                self.refit(sweep, &gradient, hessian, number, places)?;
            }
        }
        Ok(())
    }

    pub(super) fn losses(
        &self,
        sweep: &CudaSweep,
        weights: &CudaMatrix,
        hessian: &CudaMatrix,
        pull: Option<&CudaMatrix>,
    ) -> Result<Vec<f32>> {
        check(sweep, weights, hessian)?;
        if let Some(pull) = pull.filter(|pull| pull.dims != weights.dims) {
            return Err(Error::shape("sweep_losses pull", weights.dims, pull.dims));
        }
        let (rows, columns) = sweep.dims();
        let (difference, gradient) = self.gradient(sweep, weights, hessian)?;
        let losses = self.alloc::<f32>(rows)?;
        let args = [
            Arg::Address(self.address(&losses)),
            Arg::Address(self.address(&difference)),
            Arg::Address(self.address(&gradient)),
            Arg::Address(pull.map_or(0, |pull| self.address(&pull.values))),
            Arg::Int(columns as i32),
        ];
        self.launch("sweep_row_losses", Launch::blocks(rows, 256), &args)?;
        self.download(&losses.slice(..rows))
    }

    /// `W - Q` and `(W - Q) H`.
    fn gradient(
        &self,
        sweep: &CudaSweep,
        weights: &CudaMatrix,
        hessian: &CudaMatrix,
    ) -> Result<(CudaSlice<f32>, CudaSlice<f32>)> {
        let (rows, k) = sweep.dims();
        let (difference, gradient) = (self.alloc::<f32>(rows * k)?, self.alloc::<f32>(rows * k)?);
        let args = [
            Arg::Address(self.address(&difference)),
            Arg::Address(self.address(&weights.values)),
            Arg::Address(self.address(&sweep.weights)),
            Arg::Long((rows * k) as u64),
        ];
        self.launch("sweep_minus", Launch::threads(rows * k), &args)?;
        let wide = |slice: &CudaSlice<f32>| Operand::wide(self.address(slice), k);
        self.gemm((k, rows, k), (1.0, 0.0), wide(&hessian.values), wide(&difference), wide(&gradient))?;
        Ok((difference, gradient))
    }

    /// Every code of some columns once; G follows in all of them.
    fn descend(
        &self,
        sweep: &CudaSweep,
        gradient: &CudaSlice<f32>,
        hessian: &CudaMatrix,
        window: Range<usize>,
    ) -> Result<()> {
        let ((rows, k), width) = (sweep.dims(), window.len());
        let changes = self.alloc::<f32>(rows * width)?;
        let args = [
            Arg::Address(self.address(&sweep.weights)),
            Arg::Address(self.address(&sweep.codes)),
            Arg::Address(self.address(&changes)),
            Arg::Address(self.address(gradient)),
            Arg::Address(self.address(&sweep.scales)),
            Arg::Address(self.address(&sweep.zeros)),
            Arg::Address(self.address(&hessian.values)),
            Arg::Address(self.address(&sweep.group_of)),
            Arg::Int(rows as i32),
            Arg::Int(k as i32),
            Arg::Int(window.start as i32),
            Arg::Int(width as i32),
            Arg::Spec(sweep.spec.numbers()),
        ];
        let launch = Launch::blocks(rows.div_ceil(ROWS), 32 * ROWS as u32).shared(4 * width * width);
        self.launch("sweep_descend", launch, &args)?;
        let h = self.address(&hessian.values) + 4 * (window.start * k) as u64;
        self.follow(sweep, gradient, &changes, width, h)
    }

    /// `G -= D H`, D being changes of `width` columns and `h` the address of their rows of H.
    fn follow(
        &self,
        sweep: &CudaSweep,
        gradient: &CudaSlice<f32>,
        changes: &CudaSlice<f32>,
        width: usize,
        h: u64,
    ) -> Result<()> {
        let (rows, k) = sweep.dims();
        let changes = Operand::wide(self.address(changes), width);
        let target = Operand::wide(self.address(gradient), k);
        self.gemm((k, rows, width), (-1.0, 1.0), Operand::wide(h, k), changes, target)
    }

    /// The scales of one group.
    fn refit(
        &self,
        sweep: &CudaSweep,
        gradient: &CudaSlice<f32>,
        hessian: &CudaMatrix,
        number: usize,
        places: &[usize],
    ) -> Result<()> {
        let Some(first) = places.first() else { return Ok(()) };
        let (k, width) = (sweep.dims().1, places.len());
        let listed = self.upload(&places.iter().map(|place| *place as u32).collect::<Vec<_>>())?;
        let mut group = Group { number, width, places: self.address(&listed), h: 0 };
        if places.iter().enumerate().all(|(i, place)| *place == first + i) {
            group.h = self.address(&hessian.values) + 4 * (first * k) as u64;
            let inside = Operand::wide(group.h + 4 * *first as u64, k);
            return self.rescale(sweep, gradient, &group, inside);
        }
        // Static groups lie anywhere.
        let rows = self.taken(hessian, group.places, 0, (width, k))?;
        let inside = self.taken(hessian, group.places, group.places, (width, width))?;
        group.h = self.address(&rows);
        self.rescale(sweep, gradient, &group, Operand::wide(self.address(&inside), width))
    }

    /// `inside` is H of the group's own places.
    fn rescale(
        &self,
        sweep: &CudaSweep,
        gradient: &CudaSlice<f32>,
        group: &Group,
        inside: Operand,
    ) -> Result<()> {
        let ((rows, k), width) = (sweep.dims(), group.width);
        let (codes, product) = (self.alloc::<f32>(rows * width)?, self.alloc::<f32>(rows * width)?);
        let sizes = [rows, k, width, group.number].map(|size| Arg::Int(size as i32));
        let args = [
            Arg::Address(self.address(&codes)),
            Arg::Address(self.address(&sweep.codes)),
            Arg::Address(self.address(&sweep.zeros)),
            Arg::Address(group.places),
        ];
        let args: Vec<Arg> = args.into_iter().chain(sizes).collect();
        self.launch("sweep_signed_codes", Launch::blocks(rows, 128), &args)?;
        let wide = |slice: &CudaSlice<f32>| Operand::wide(self.address(slice), width);
        self.gemm((width, rows, width), (1.0, 0.0), inside, wide(&codes), wide(&product))?;
        let args = [
            Arg::Address(self.address(&sweep.weights)),
            Arg::Address(self.address(&sweep.scales)),
            Arg::Address(self.address(&codes)),
            Arg::Address(self.address(&product)),
            Arg::Address(self.address(gradient)),
            Arg::Address(group.places),
            Arg::Int(rows as i32),
            Arg::Int(k as i32),
            Arg::Int(width as i32),
            Arg::Int(group.number as i32),
            Arg::Spec(sweep.spec.numbers()),
        ];
        self.launch("sweep_rescale", Launch::blocks(rows.div_ceil(ROWS), 32 * ROWS as u32), &args)?;
        self.follow(sweep, gradient, &codes, width, group.h)
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
        let args = [
            Arg::Address(self.address(&taken)),
            Arg::Address(self.address(&matrix.values)),
            Arg::Address(rows),
            Arg::Address(columns),
            Arg::Int(matrix.dims.1 as i32),
            Arg::Int(dims.1 as i32),
        ];
        self.launch("sweep_take", Launch::grid(dims.1.div_ceil(256), dims.0, 1, 256), &args)?;
        Ok(taken)
    }

    pub(super) fn take_rows(
        &self,
        sweep: &mut CudaSweep,
        from: &CudaSweep,
        rows: Range<usize>,
    ) -> Result<()> {
        let (dims, other) = (sweep.dims(), from.dims());
        if dims != other || rows.end > dims.0 || rows.start > rows.end {
            return Err(Error::shape("sweep_take_rows", (dims, "rows of both"), (other, rows)));
        }
        let values = rows.start * dims.1..rows.end * dims.1;
        self.copy_range(&from.weights, &mut sweep.weights, values.clone())?;
        self.copy_range(&from.codes, &mut sweep.codes, values)?;
        self.copy_range(&from.losses, &mut sweep.losses, rows.clone())?;
        let args = [
            Arg::Address(self.address(&sweep.scales)),
            Arg::Address(self.address(&sweep.zeros)),
            Arg::Address(self.address(&from.scales)),
            Arg::Address(self.address(&from.zeros)),
            Arg::Int(dims.0 as i32),
            Arg::Int(rows.start as i32),
            Arg::Int(rows.len() as i32),
        ];
        let groups = sweep.grouping.groups;
        self.launch("sweep_take_grids", Launch::grid(rows.len().div_ceil(256), groups, 1, 256), &args)
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
    let expected = ((rows, columns), (columns, columns));
    match (weights.dims, hessian.dims) == expected {
        true => Ok(()),
        false => Err(Error::shape("gptq_sweep target and Hessian", expected, (weights.dims, hessian.dims))),
    }
}
