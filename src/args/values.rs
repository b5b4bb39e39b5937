//! Values of options, and how they are read.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// `None` is one group a row, -1 on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSize(pub Option<usize>);

/// `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceArg {
    /// The first GPU, or the CPU where there is none.
    Auto,
    Cpu,
    Cuda(usize),
}

/// Which branches are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanArg {
    Card,
    Portable,
    /// A plan of one's own.
    File(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    Gptq,
    Rtn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    Gptq,
    #[value(name = "gptq_v2")]
    GptqV2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum JoinArg {
    /// A blank line between two rows
    Paper,
    /// Rows one after the other, nothing between; an empty row becomes a line of one blank (" \n")
    Raw,
    /// As raw, and a line end between a row that brings none and the next
    Lines,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SamplingArg {
    Consecutive,
    Random,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    F16,
    Bf16,
}

/// Type in which a GPU computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ComputeArg {
    /// The checkpoint's own type; f16 for one in f32.
    Auto,
    #[value(alias = "float16")]
    F16,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "float32")]
    F32,
}

/// Type of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvDtypeArg {
    /// As the device computes.
    Auto,
    /// A byte a number and a scale for every token and head: half of what 16 bits take.
    Int8,
}

/// How keys and values are kept.
#[derive(Args, Clone, Copy, Debug)]
pub struct KvCacheArgs {
    /// Type of keys and values in the KV cache
    #[arg(long, value_enum, default_value_t = KvDtypeArg::Auto)]
    pub kv_cache_dtype: KvDtypeArg,
}

pub fn parse_device(text: &str) -> Result<DeviceArg, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceArg::Auto),
        None if text == "cpu" => Ok(DeviceArg::Cpu),
        None if text == "cuda" => Ok(DeviceArg::Cuda(0)),
        Some(("cuda", number)) => number.parse().map(DeviceArg::Cuda).map_err(|_| "expected cuda:N".into()),
        _ => Err("expected auto, cpu, cuda or cuda:N".into()),
    }
}

/// Where to compute, and how.
#[derive(Args, Clone, Copy, Debug)]
pub struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: DeviceArg,

    /// Type in which a GPU computes; the CPU always takes f32
    #[arg(long, value_enum, default_value_t = ComputeArg::Auto)]
    pub dtype: ComputeArg,

    /// Limit of GPU memory, e.g. 24GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_gpu_memory: Option<u64>,
}

/// A file that is called like a plan is `./card`.
pub fn parse_plan(text: &str) -> Result<PlanArg, String> {
    Ok(match text {
        "card" => PlanArg::Card,
        "portable" => PlanArg::Portable,
        path => PlanArg::File(path.into()),
    })
}

pub fn parse_bits(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(bits) if matches!(bits, 2 | 3 | 4 | 8) => Ok(bits),
        _ => Err("expected 2, 3, 4 or 8".into()),
    }
}

pub fn parse_group_size(text: &str) -> Result<GroupSize, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(GroupSize(None)),
        Ok(size) if (1..1 << 24).contains(&size) => Ok(GroupSize(Some(size as usize))),
        _ => Err("expected -1 or a positive number".into()),
    }
}

pub fn parse_damp(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(damp) if damp > 0.0 && damp < 1.0 => Ok(damp),
        _ => Err("expected a number above 0 and below 1".into()),
    }
}

/// 0 and -1 are no limit.
pub fn parse_top_k(text: &str) -> Result<usize, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(0),
        Ok(count) if count >= 0 => usize::try_from(count).map_err(|error| error.to_string()),
        _ => Err("expected -1 or more".into()),
    }
}

/// Bytes with an optional decimal suffix: 500MB, 5GB.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let factor = match text[digits..].trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err("expected a number with B, KB, MB or GB".into()),
    };
    let number: u64 = text[..digits].parse().map_err(|_| "expected a number with B, KB, MB or GB")?;
    number.checked_mul(factor).filter(|size| *size > 0).ok_or("expected a positive size below 2^64".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_groups_are_read_as_people_write_them() {
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("512"), Ok(512));
        assert!(
            parse_size("5 apples").is_err()
                && parse_size("0").is_err()
                && parse_size("99999999999GB").is_err()
        );
        assert_eq!(parse_group_size("-1"), Ok(GroupSize(None)));
        assert!(parse_group_size("0").is_err() && parse_group_size("-2").is_err());
        assert_eq!(parse_device("cuda:3"), Ok(DeviceArg::Cuda(3)));
        assert!(parse_device("cuda:x").is_err() && parse_device("tpu").is_err());
        assert_eq!((parse_top_k("-1"), parse_top_k("0"), parse_top_k("40")), (Ok(0), Ok(0), Ok(40)));
        assert!(parse_top_k("-2").is_err() && parse_top_k("1.5").is_err());
        assert!(parse_bits("5").is_err() && parse_damp("1").is_err() && parse_damp("NaN").is_err());
    }
}
