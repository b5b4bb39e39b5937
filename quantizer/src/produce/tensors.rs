//! The artifact's tensors: from solved groups and the source's own into the writer, and back from an unfinished artifact.

use std::collections::HashSet;

use gptq_kernels::Backend;
use gptq_kernels::packing::{PackedLinear, Scales};
use gptq_runtime::layout::{self, LinearGroup, LinearSpec, TensorSpec};
use gptq_runtime::model;

use super::Job;
use crate::artifact::ArtifactWriter;
use crate::gptq::{self, Solved};
use crate::record::LinearRecord;
use crate::{Error, Result};

/// The artifact's tensors, with the types that the source's own tensors have.
pub(super) fn artifact_specs(job: &Job) -> Vec<TensorSpec> {
    let config = &job.source.files.config;
    let copied: HashSet<String> = layout::other_tensors(config).into_iter().map(|spec| spec.name).collect();
    let specs = layout::artifact_tensors(config, &job.params.quant, job.zero_bias).into_iter();
    specs.map(|spec| if copied.contains(&spec.name) { as_stored(job, spec) } else { spec }).collect()
}

fn as_stored(job: &Job, mut spec: TensorSpec) -> TensorSpec {
    if let Some(stored) = job.source.files.checkpoint.spec(&spec.name) {
        spec.dtype = stored.stored().unwrap_or(spec.dtype);
    }
    spec
}

/// Cuts a solved group into its linears and writes them.
pub(super) fn write_group<B: Backend>(
    backend: &B,
    writer: &ArtifactWriter,
    job: &Job,
    (layer, group): (usize, &LinearGroup),
    solved: Solved<B>,
) -> Result<Vec<LinearRecord>> {
    let Solved { packed, losses, damp_percent, verdicts, spread: hessian, .. } = solved;
    let packed = backend.collect(packed)?;
    let (mut records, mut start) = (Vec::new(), 0);
    for (i, linear) in group.linears.iter().enumerate() {
        let rows = start..start + linear.out_features;
        start = rows.end;
        write_linear(writer, job, layer, linear, &packed.rows(rows.clone())?)?;
        let loss = gptq::loss(&losses[rows], job.solved_sequences());
        let held_out = verdicts.as_ref().and_then(|verdicts| verdicts.get(i).copied());
        records.push(LinearRecord { module: linear.module.clone(), loss, damp_percent, held_out, hessian });
    }
    Ok(records)
}

fn write_linear(
    writer: &ArtifactWriter,
    job: &Job,
    layer: usize,
    linear: &LinearSpec,
    packed: &PackedLinear<'_>,
) -> Result<()> {
    let tensor = |name: &str, bytes: &[u8]| {
        writer.write_tensor(&format!("{}{}.{name}", layout::layer_prefix(layer), linear.module), bytes)
    };
    tensor("qweight", bytemuck::cast_slice(&packed.joined_qweight()))?;
    tensor("qzeros", bytemuck::cast_slice(&packed.qzeros))?;
    tensor("scales", packed.scales.bytes())?;
    tensor("g_idx", bytemuck::cast_slice(&packed.g_idx))?;
    if job.zero_bias || linear.bias {
        let bias = packed.bias.clone().unwrap_or(vec![0.0; packed.out_features]);
        let bias: Vec<half::f16> = bias.into_iter().map(half::f16::from_f32).collect();
        tensor("bias", bytemuck::cast_slice(&bias))?;
    }
    Ok(())
}

/// Copies what a layer has beside its linears.
pub(super) fn write_others(writer: &ArtifactWriter, job: &Job, layer: usize) -> Result<()> {
    let specs = layout::layer_tensors(&job.source.files.config, layer);
    specs.into_iter().try_for_each(|spec| write_copy(writer, job, &spec))
}

pub(super) fn write_copy(writer: &ArtifactWriter, job: &Job, spec: &TensorSpec) -> Result<()> {
    writer.write_tensor(&spec.name, job.source.files.checkpoint.tensor(&spec.name, &spec.shape)?.bytes)
}

/// The groups of a finished layer, their linears stacked, read back from the unfinished artifact.
pub(super) fn restore(
    writer: &ArtifactWriter,
    job: &Job,
    layer: usize,
) -> Result<Vec<PackedLinear<'static>>> {
    let group = |group: LinearGroup| {
        let linears = group.linears.iter().map(|linear| restore_linear(writer, job, layer, linear));
        PackedLinear::stack(linears.collect::<Result<Vec<_>>>()?).map_err(|_| {
            let place = format!("layer {layer} of the interrupted run");
            Error::invalid(place, "expected linears of a group to share their groups")
        })
    };
    layout::layer(&job.source.files.config, layer).groups.into_iter().map(group).collect()
}

fn restore_linear(
    writer: &ArtifactWriter,
    job: &Job,
    layer: usize,
    linear: &LinearSpec,
) -> Result<PackedLinear<'static>> {
    let quant = &job.params.quant;
    let name = |tensor: &str| format!("{}{}.{tensor}", layout::layer_prefix(layer), linear.module);
    let words = |tensor: &str| -> Result<Vec<u32>> {
        let bytes = writer.read_tensor(&name(tensor))?;
        Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    };
    let scales = writer.read_tensor(&name("scales"))?;
    let scales = scales.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]])).collect();
    let (_, biases) = model::dense_parts(job.source.files, layer, std::slice::from_ref(linear))?;
    let packed = PackedLinear {
        bits: quant.bits,
        in_features: linear.in_features,
        out_features: linear.out_features,
        qweight: vec![words("qweight")?.into()],
        qzeros: words("qzeros")?,
        scales: Scales::F16(scales),
        g_idx: words("g_idx")?,
        zero_offset: quant.format.zero_offset(),
        bias: biases.first().map(|bias| bias.to_f32()),
    };
    packed.check()?;
    Ok(packed)
}
