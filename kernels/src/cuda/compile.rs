//! Kernels from source to machine code when the program runs: NVRTC, for the GPU at hand, kept on disk.

use std::ffi::{CString, c_char};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

use cudarc::nvrtc::{result as nvrtc, sys};

use crate::ops::gptq_sweep::TIES_OUTWARD;
use crate::ops::sample::{FRACTION_BITS, ID_BITS, OCTAVES, SERIES};
use crate::{Dtype, Error, KV_BLOCK_ROWS, Result, ops};

/// Kernels that are compiled together, at the first use of one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// What every use of a GPU needs.
    Common,
    /// Quantized small-M GEMMs: many variants, which only running an artifact needs.
    SmallM,
    /// Mixtures of experts.
    Experts,
}

impl Program {
    pub const ALL: [Self; 3] = [Self::Common, Self::SmallM, Self::Experts];

    pub fn of(kernel: &str) -> Self {
        let small_m = ["medium_m_quant", "small_m_quant", "hopper_quant", "repack_", "dequantize_fragments"];
        match kernel {
            _ if small_m.iter().any(|prefix| kernel.starts_with(prefix)) => Self::SmallM,
            _ if ops::experts::cuda::KERNELS.contains(&kernel) || kernel.starts_with("expert_") => {
                Self::Experts
            }
            _ => Self::Common,
        }
    }

    /// The prelude, then each operation's file.
    fn sources(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Common => &COMMON,
            Self::SmallM => &SMALL_M,
            Self::Experts => &EXPERTS,
        }
    }

    /// All files as one, errors pointing to the file that they are in.
    fn text(self) -> String {
        self.sources().iter().map(|(name, text)| format!("#line 1 \"{name}\"\n{text}\n")).collect()
    }
}

const SMALL_M: [(&str, &str); 10] = [
    ("prelude.cu", include_str!("prelude.cu")),
    ("activation.cu", ops::gated::cuda::ACTIVATION_SOURCE),
    ("quant_matmul.cu", ops::quant_matmul::cuda::SOURCE),
    ("matmul/small_m.cu", ops::matmul::cuda::SMALL_M_SOURCE),
    ("fragments.cu", ops::quant_matmul::fragments::SOURCE),
    ("quant_matmul/medium_m.cu", ops::quant_matmul::medium_m::SOURCE),
    ("small_m_fused.cu", ops::quant_matmul::small_m::FUSED_SOURCE),
    ("small_m.cu", ops::quant_matmul::small_m::SOURCE),
    ("hopper_store.cu", ops::quant_matmul::hopper::STORE_SOURCE),
    ("quant_matmul/hopper.cu", ops::quant_matmul::hopper::SOURCE),
];

const EXPERTS: [(&str, &str); 4] = [
    ("prelude.cu", include_str!("prelude.cu")),
    ("quant_matmul.cu", ops::quant_matmul::cuda::SOURCE),
    ("experts/route.cu", ops::experts::cuda::SOURCE),
    ("experts/product.cu", ops::experts::product::SOURCE),
];

const COMMON: [(&str, &str); 33] = [
    ("prelude.cu", include_str!("prelude.cu")),
    ("tensor_map.cu", include_str!("tensor_map.cu")),
    ("tf32.cu", super::tf32::SOURCE),
    ("columns.cu", include_str!("columns.cu")),
    ("add.cu", ops::add::cuda::SOURCE),
    ("scale.cu", ops::scale::cuda::SOURCE),
    ("activation.cu", ops::gated::cuda::ACTIVATION_SOURCE),
    ("gated.cu", ops::gated::cuda::SOURCE),
    ("attention.cu", ops::attention::cuda::SOURCE),
    ("decode.cu", ops::attention::cuda::DECODE_SOURCE),
    ("hopper_copy.cu", ops::attention::hopper::COPY_SOURCE),
    ("hopper.cu", ops::attention::hopper::SOURCE),
    ("kv_int8.cu", ops::attention::cuda_cache::SOURCE),
    ("rope.cu", ops::rope::cuda::SOURCE),
    ("step_parts.cu", ops::attention::step::PARTS_SOURCE),
    ("step.cu", ops::attention::step::SOURCE),
    ("step_int8.cu", ops::attention::step::INT8_SOURCE),
    ("embedding.cu", ops::embedding::cuda::SOURCE),
    ("grid.cu", ops::gptq_sweep::cuda::GRID_SOURCE),
    ("gptq_sweep.cu", ops::gptq_sweep::cuda::SOURCE),
    ("pack.cu", ops::gptq_sweep::cuda::PACK_SOURCE),
    ("loop_search.cu", ops::gptq_sweep::cuda::SEARCH_SOURCE),
    ("refine.cu", ops::gptq_sweep::cuda::REFINE_SOURCE),
    ("hessian.cu", ops::hessian::cuda::SOURCE),
    ("hessian/hopper.cu", ops::hessian::hopper::SOURCE),
    ("inverse_cholesky.cu", ops::inverse_cholesky::cuda::SOURCE),
    ("quant_matmul.cu", ops::quant_matmul::cuda::SOURCE),
    ("matmul/small_m.cu", ops::matmul::cuda::SMALL_M_SOURCE),
    ("rms_norm.cu", ops::rms_norm::cuda::SOURCE),
    ("token_loss.cu", ops::token_loss::cuda::SOURCE),
    ("top_logits.cu", ops::top_logits::cuda::SOURCE),
    ("search.cu", ops::sample::cuda::SEARCH_SOURCE),
    ("sample.cu", ops::sample::cuda::SOURCE),
];

/// Machine code of a program for a GPU of compute capability `arch`, from the cache where it is there.
pub(super) fn cubin(program: Program, arch: (i32, i32), dtype: Dtype) -> Result<Vec<u8>> {
    let options = options(arch, dtype);
    let path = cache_path(program, &options);
    if let Some(bytes) = path.as_ref().and_then(|path| fs::read(path).ok()) {
        return Ok(bytes);
    }
    let bytes = compile(program, &options)?;
    if let Some(path) = path {
        keep(&path, &bytes);
    }
    Ok(bytes)
}

/// Whether the GPU has the instructions of `hopper.cu`.
pub(super) fn is_hopper(arch: (i32, i32)) -> bool {
    arch == (9, 0)
}

fn options(arch: (i32, i32), dtype: Dtype) -> Vec<String> {
    // Hopper's own instructions need the architecture's own variant.
    let variant = if is_hopper(arch) { "a" } else { "" };
    vec![
        format!("--gpu-architecture=sm_{}{}{variant}", arch.0, arch.1),
        "--std=c++17".into(),
        format!("-DHOPPER={}", is_hopper(arch) as u8),
        format!("-DF16={}", (dtype == Dtype::F16) as u8),
        format!("-DBF16={}", (dtype == Dtype::BF16) as u8),
        format!("-DF32={}", (dtype == Dtype::F32) as u8),
        format!("-DKV_BLOCK_ROWS={KV_BLOCK_ROWS}"),
        format!("-DTIES_OUTWARD={TIES_OUTWARD:.9}f"),
        format!("-DSAMPLE_FRACTION_BITS={FRACTION_BITS}"),
        format!("-DSAMPLE_OCTAVES={OCTAVES}"),
        format!("-DSAMPLE_ID_BITS={ID_BITS}"),
        format!("-DSAMPLE_SERIES={}", SERIES.map(|x| format!("{x:e}f")).join(",")),
    ]
}

fn compile(program: Program, options: &[String]) -> Result<Vec<u8>> {
    // SAFETY: only asks whether a library can be loaded.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::cuda("NVRTC", "libnvrtc is not installed (it comes with the CUDA toolkit)"));
    }
    let failed = |error: nvrtc::NvrtcError| Error::cuda("NVRTC", format!("{error:?}"));
    let source = CString::new(program.text()).map_err(|error| Error::cuda("NVRTC", error))?;
    let program = nvrtc::create_program(&source, None).map_err(failed)?;
    // SAFETY: `program` is the handle just made; each buffer has the length NVRTC asked for.
    unsafe {
        let compiled = nvrtc::compile_program(program, options);
        if compiled.is_err() {
            let log = nvrtc::get_program_log(program).unwrap_or_default();
            let text: String = log.iter().map(|c| *c as u8 as char).filter(|c| *c != '\0').collect();
            let first = text.lines().find(|line| line.contains("error")).unwrap_or(&text).to_string();
            nvrtc::destroy_program(program).map_err(failed)?;
            return Err(Error::cuda("NVRTC", first));
        }
        let mut size = 0;
        sys::nvrtcGetCUBINSize(program, &mut size).result().map_err(failed)?;
        let mut cubin = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr() as *mut c_char).result().map_err(failed)?;
        nvrtc::destroy_program(program).map_err(failed)?;
        Ok(cubin)
    }
}

/// `~/.cache/gptq/<hash>.cubin`; the hash covers sources, options and NVRTC's version.
fn cache_path(program: Program, options: &[String]) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let root = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there, and the two integers are ours.
    unsafe {
        if sys::is_culib_present() {
            sys::nvrtcVersion(&mut major, &mut minor).result().ok()?;
        }
    }
    let mut hasher = DefaultHasher::new();
    (program.text(), options, major, minor).hash(&mut hasher);
    Some(root.join("gptq").join(format!("{:016x}.cubin", hasher.finish())))
}

/// Failing to keep the code costs the next start some seconds, and nothing else.
fn keep(path: &PathBuf, bytes: &[u8]) {
    let temporary = path.with_extension(format!("{}.partial", std::process::id()));
    let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
    let _ = folder.and_then(|()| fs::write(&temporary, bytes)).and_then(|()| fs::rename(&temporary, path));
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    /// Needs NVRTC, not a GPU.
    #[test]
    #[cfg_attr(not(has_nvrtc), ignore = "needs NVRTC: REQUIRE_NVRTC is not set")]
    fn every_kernel_compiles_for_the_supported_gpus() {
        // SAFETY: only asks whether a library can be loaded.
        assert!(unsafe { sys::is_culib_present() }, "libnvrtc is not installed");
        // Every GPU with one type, and every type on the two kinds whose sources differ; those of Hopper are not in f32.
        let f16 = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)].map(|arch| (arch, Dtype::F16));
        let others = [((8, 0), Dtype::BF16), ((8, 0), Dtype::F32), ((9, 0), Dtype::BF16)];
        let all = f16
            .into_iter()
            .chain(others)
            .flat_map(|(arch, dtype)| Program::ALL.map(|program| (arch, dtype, program)));
        all.collect::<Vec<_>>().into_par_iter().for_each(|(arch, dtype, program)| {
            let cubin = compile(program, &options(arch, dtype)).unwrap();
            assert!(cubin.starts_with(b"\x7fELF"), "{program:?} {arch:?} {dtype:?}");
        });
    }
}
