use std::ffi::c_void;

use cudarc::cusolver::sys::{
    cublasDiagType_t, cublasFillMode_t, cudaDataType_t, cusolverDnSpotrf, cusolverDnSpotrf_bufferSize,
    cusolverDnXtrtri, cusolverDnXtrtri_bufferSize,
};

use super::{InverseCholesky, check};
use crate::cuda::{Arg, Cuda, Launch};
use crate::ops::hessian::cuda::CudaMatrix;
use crate::{Device, Error, Result};

pub(crate) const SOURCE: &str = include_str!("inverse_cholesky.cu");

impl InverseCholesky for Cuda {
    fn inverse_cholesky(&self, hessian: &CudaMatrix, order: &[u32], damp: f32) -> Result<CudaMatrix> {
        let size = hessian.size;
        check(size, order)?;
        let reversed = self.alloc::<f32>(size * size)?;
        let order = self.upload(order)?;
        let args = [
            Arg::Address(self.address(&reversed)),
            Arg::Address(self.address(&hessian.values)),
            Arg::Address(self.address(&order)),
            Arg::Int(size as i32),
            Arg::Float(damp),
        ];
        self.launch("reversed_lower", Launch::grid(size.div_ceil(256), size, 1, 256), &args)?;
        self.factor_and_invert(self.address(&reversed), size)?;
        let u = CudaMatrix { values: self.alloc(size * size)?, size };
        let not_finite = self.zeros::<u32>(1)?;
        let args = [
            Arg::Address(self.address(&u.values)),
            Arg::Address(self.address(&not_finite)),
            Arg::Address(self.address(&reversed)),
            Arg::Int(size as i32),
        ];
        self.launch("turn_inverse", Launch::grid(size.div_ceil(256), size, 1, 256), &args)?;
        match self.download(&not_finite, 1)?[0] {
            0 => Ok(u),
            _ => Err(Error::NotPositiveDefinite { pivot: 0, size }),
        }
    }
}

impl Cuda {
    /// Replaces the lower triangle at `matrix`, column-major, by the inverse of its Cholesky factor.
    fn factor_and_invert(&self, matrix: u64, size: usize) -> Result<()> {
        let failed =
            |error: cudarc::cusolver::result::CusolverError| Error::cuda("cuSOLVER", format!("{error:?}"));
        let solver = self.solver()?;
        let lower = cublasFillMode_t::CUBLAS_FILL_MODE_LOWER;
        let info = self.zeros::<i32>(1)?;
        let info_address = self.address(&info) as *mut i32;
        // SAFETY: `matrix` is a square of this size, and work spaces have the sizes cuSOLVER asks for.
        unsafe {
            let mut length = 0;
            cusolverDnSpotrf_bufferSize(
                solver.cu(),
                lower,
                size as i32,
                matrix as *mut f32,
                size as i32,
                &mut length,
            )
            .result()
            .map_err(failed)?;
            let work = self.alloc::<f32>(length as usize)?;
            let work_address = self.address(&work) as *mut f32;
            let (n, a) = (size as i32, matrix as *mut f32);
            cusolverDnSpotrf(solver.cu(), lower, n, a, n, work_address, length, info_address)
                .result()
                .map_err(failed)?;
        }
        let pivot = self.download(&info, 1)?[0];
        if pivot != 0 {
            return Err(Error::NotPositiveDefinite { pivot: pivot.unsigned_abs() as usize - 1, size });
        }
        let diagonal = cublasDiagType_t::CUBLAS_DIAG_NON_UNIT;
        let (n, kind) = (size as i64, cudaDataType_t::CUDA_R_32F);
        // SAFETY: as above.
        unsafe {
            let (mut on_card, mut on_host) = (0, 0);
            let a = matrix as *mut c_void;
            cusolverDnXtrtri_bufferSize(
                solver.cu(),
                lower,
                diagonal,
                n,
                kind,
                a,
                n,
                &mut on_card,
                &mut on_host,
            )
            .result()
            .map_err(failed)?;
            let work = self.alloc::<u8>(on_card)?;
            let mut host_work = vec![0u8; on_host.max(1)];
            let work_address = self.address(&work) as *mut c_void;
            let host_address = host_work.as_mut_ptr().cast();
            cusolverDnXtrtri(
                solver.cu(),
                lower,
                diagonal,
                n,
                kind,
                a,
                n,
                work_address,
                on_card,
                host_address,
                on_host,
                info_address,
            )
            .result()
            .map_err(failed)?;
            self.synchronize()?;
        }
        Ok(())
    }
}
