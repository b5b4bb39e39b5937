//! From a checkpoint to a finished artifact folder: solve layer by layer, write each as it is done.

use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use gptq_kernels::Backend;
use gptq_kernels::packing::{PackedLinear, Scales};
use gptq_runtime::layout::{self, LinearSpec, Stage, TensorSpec};
use gptq_runtime::model::{self, ModelFiles};

use crate::artifact::{self, ArtifactLayout, ArtifactWriter, Fingerprint, OutMode};
use crate::card;
use crate::engines;
use crate::gptq::{self, GptqParams, Method, Solved};
use crate::record::{CalibrationRecord, LOG_FILE, LayerRecord, LinearRecord, QuantizeLog};
use crate::sequential::{Reader, SolvedLayer, Tiles, Walk};
use crate::{Error, Result};

/// A checkpoint that can be quantized: nothing is missing, and every weight is a finite number.
pub struct Source<'a> {
    /// As the user named it.
    model: &'a str,
    dir: &'a Path,
    files: &'a ModelFiles,
}

/// One artifact to make.
pub struct Job<'a> {
    pub source: &'a Source<'a>,
    pub params: &'a GptqParams,
    /// Write AutoGPTQ's all-zero bias tensors.
    pub zero_bias: bool,
    /// Calibration tokens; empty for rounding to nearest.
    pub sequences: &'a [Vec<u32>],
    pub calibration: Option<&'a CalibrationRecord>,
    pub out: &'a Path,
    pub mode: OutMode,
    pub max_shard_size: Option<u64>,
}

/// What is happening, for progress.
pub enum Event {
    /// An earlier run finished this layer; its activations are made again.
    Restoring {
        layer: usize,
    },
    Solving {
        layer: usize,
        stage: Stage,
    },
    /// Solved; it is being written while the next one is solved.
    Done {
        layer: usize,
        loss: f64,
    },
}

impl<'a> Source<'a> {
    /// Reads every weight once, and refuses a checkpoint that lacks a tensor or holds NaN or infinity.
    pub fn check(model: &'a str, dir: &'a Path, files: &'a ModelFiles) -> Result<Self> {
        let specs = layout::checkpoint_tensors(&files.config);
        files.checkpoint.verify_against(&specs)?;
        for spec in specs {
            let tensor = files.checkpoint.tensor(&spec.name, &spec.shape)?;
            files.checkpoint.check_finite(&tensor, &spec.name)?;
        }
        Ok(Self { model, dir, files })
    }

    pub fn files(&self) -> &'a ModelFiles {
        self.files
    }
}

/// Refuses settings that the checkpoint's shapes do not allow; reads no weights.
pub fn check_settings(files: &ModelFiles, params: &GptqParams) -> Result<()> {
    if files.quant.is_some() {
        let problem =
            "expected a checkpoint of floating-point weights, got one that is quantized already".into();
        return Err(Error::Invalid { place: "quantization_config".into(), problem });
    }
    Ok(layout::check_quantizable(&files.config, &params.quant)?)
}

/// Makes the artifact; its folder appears under its name when everything is in it. `tiles` are the embedded
/// tokens of the job's sequences.
pub fn produce<B: Backend>(
    backend: &B,
    job: &Job,
    tiles: Tiles<B>,
    on_event: &mut dyn FnMut(Event),
) -> Result<QuantizeLog> {
    let started = Instant::now();
    let files = job.source.files;
    check_settings(files, job.params)?;
    refuse_source(job)?;
    let specs = artifact_specs(job);
    let layout = ArtifactLayout::new(specs, &artifact::metadata(&job.params.quant), job.max_shard_size);
    let (writer, finished) = ArtifactWriter::begin(job.out, layout, &fingerprint(job), job.mode)?;
    let mut walk = Walk::start(backend, files, job.params, tiles);
    let records = read_records(finished)?;
    for layer in 0..records.len() {
        on_event(Event::Restoring { layer });
        walk.skip_layer(layer, &restore(&writer, job, layer)?)?;
    }
    let (writer, records) = solve_and_write(backend, job, &mut walk, writer, records, on_event)?;
    drop(walk);
    for spec in outer_tensors(job) {
        write_copy(&writer, job, &spec)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let peak = backend.memory()?.map(|memory| memory.peak);
    let log = log(job, B::name(backend), records, seconds, peak);
    let written = engines::as_written(&files.config, &job.params.quant);
    for (name, bytes) in artifact::side_files(job.source.dir, &files.config, &written, job.source.model)? {
        writer.add_file(&name, &bytes)?;
    }
    writer.add_file(LOG_FILE, &log.to_bytes())?;
    writer.add_file(card::CARD_FILE, card::model_card(&log, &files.config).as_bytes())?;
    writer.finish()?;
    Ok(log)
}

/// Solves the layers that are left; one thread reads the weights ahead, another writes what is solved.
fn solve_and_write<B: Backend>(
    backend: &B,
    job: &Job,
    walk: &mut Walk<B>,
    writer: ArtifactWriter,
    records: Vec<LayerRecord>,
    on_event: &mut dyn FnMut(Event),
) -> Result<(ArtifactWriter, Vec<LayerRecord>)> {
    let first = records.len();
    let (send, receive) = sync_channel::<(usize, SolvedLayer<B>)>(1);
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || write_all(backend, job, writer, records, receive));
        let reader = Reader::start(scope, backend, job.source.files, first);
        let mut waited = 0.0;
        for layer in first..job.source.files.config.num_hidden_layers {
            let on_stage = &mut |stage| on_event(Event::Solving { layer, stage });
            let mut solved = walk.solve_layer(layer, &reader, None, on_stage)?;
            solved.phases.wait += waited;
            let sequences = job.sequences.len();
            let loss = solved.stages.iter().map(|stage| gptq::loss(&stage.losses, sequences)).sum();
            on_event(Event::Done { layer, loss });
            let sending = Instant::now();
            // A writer that is gone has failed: its error comes with the join.
            if send.send((layer, solved)).is_err() {
                break;
            }
            waited = sending.elapsed().as_secs_f64();
        }
        drop((send, reader));
        writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn write_all<B: Backend>(
    backend: &B,
    job: &Job,
    mut writer: ArtifactWriter,
    mut records: Vec<LayerRecord>,
    layers: Receiver<(usize, SolvedLayer<B>)>,
) -> Result<(ArtifactWriter, Vec<LayerRecord>)> {
    for (layer, SolvedLayer { stages, mut phases }) in layers {
        let started = Instant::now();
        let mut linears = Vec::new();
        for (stage, solved) in Stage::ALL.into_iter().zip(stages) {
            linears.extend(write_stage(backend, &writer, job, (layer, stage), solved)?);
        }
        write_norms(&writer, job, layer)?;
        phases.write = started.elapsed().as_secs_f64();
        let record = LayerRecord { layer, phases, linears };
        writer.layer_done(&serde_json::to_value(&record).unwrap_or_default())?;
        records.push(record);
    }
    Ok((writer, records))
}

/// The output must not hold the source, which replacing it would delete.
fn refuse_source(job: &Job) -> Result<()> {
    let whole = |path: &Path| path.canonicalize().ok();
    match (whole(job.source.dir), whole(job.out)) {
        (Some(source), Some(out)) if source.starts_with(&out) => {
            let problem = format!("expected another folder than the source's, {}", source.display());
            Err(Error::Output { path: job.out.into(), problem })
        }
        _ => Ok(()),
    }
}

/// The artifact's tensors, with the types that the source's own tensors have.
fn artifact_specs(job: &Job) -> Vec<TensorSpec> {
    let specs = layout::artifact_tensors(&job.source.files.config, &job.params.quant, job.zero_bias);
    specs.into_iter().map(|spec| as_stored(job, spec)).collect()
}

fn as_stored(job: &Job, mut spec: TensorSpec) -> TensorSpec {
    let copied = !is_packed(&spec.name);
    if let Some(stored) = job.source.files.checkpoint.spec(&spec.name).filter(|_| copied) {
        spec.dtype = stored.stored().unwrap_or(spec.dtype);
    }
    spec
}

/// Tensors of quantized linears; all others are copied.
fn is_packed(name: &str) -> bool {
    [".qweight", ".qzeros", ".scales", ".g_idx", ".bias"].iter().any(|suffix| name.ends_with(suffix))
}

/// Tensors outside the layers: embedding, final norm, head.
fn outer_tensors(job: &Job) -> Vec<TensorSpec> {
    artifact_specs(job).into_iter().filter(|spec| !spec.name.starts_with("model.layers.")).collect()
}

/// Cuts a solved stage into its linears and writes them.
fn write_stage<B: Backend>(
    backend: &B,
    writer: &ArtifactWriter,
    job: &Job,
    (layer, stage): (usize, Stage),
    solved: Solved<B>,
) -> Result<Vec<LinearRecord>> {
    let Solved { packed, losses, damp_percent, .. } = solved;
    let packed = backend.collect(packed)?;
    let (mut records, mut start) = (Vec::new(), 0);
    for linear in model::stage_linears(job.source.files, stage) {
        let rows = start..start + linear.out_features;
        start = rows.end;
        write_linear(writer, job, layer, &linear, &packed.rows(rows.clone())?)?;
        let loss = gptq::loss(&losses[rows], job.sequences.len());
        records.push(LinearRecord { module: linear.module.into(), loss, damp_percent });
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

fn write_norms(writer: &ArtifactWriter, job: &Job, layer: usize) -> Result<()> {
    let prefix = layout::layer_prefix(layer);
    let specs = artifact_specs(job).into_iter();
    let mut norms = specs.filter(|spec| spec.name.starts_with(&prefix) && !is_packed(&spec.name));
    norms.try_for_each(|spec| write_copy(writer, job, &spec))
}

fn write_copy(writer: &ArtifactWriter, job: &Job, spec: &TensorSpec) -> Result<()> {
    writer.write_tensor(&spec.name, job.source.files.checkpoint.tensor(&spec.name, &spec.shape)?.bytes)
}

/// The stages of a finished layer, their linears stacked, read back from the unfinished artifact.
fn restore(writer: &ArtifactWriter, job: &Job, layer: usize) -> Result<[PackedLinear<'static>; 4]> {
    let quant = &job.params.quant;
    let mut stages = [const { Vec::new() }; 4];
    for linear in layout::linears(&job.source.files.config) {
        let name = |tensor: &str| format!("{}{}.{tensor}", layout::layer_prefix(layer), linear.module);
        let words = |tensor: &str| -> Result<Vec<u32>> {
            let bytes = writer.read_tensor(&name(tensor))?;
            Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let scales = writer.read_tensor(&name("scales"))?;
        let scales = scales.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]])).collect();
        let (_, biases) = model::dense_parts(job.source.files, layer, &[linear])?;
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
        stages[linear.stage as usize].push(packed);
    }
    let stacked =
        stages.into_iter().filter_map(|linears| PackedLinear::stack(linears).ok()).collect::<Vec<_>>();
    stacked.try_into().map_err(|_| Error::Invalid {
        place: format!("layer {layer} of the interrupted run"),
        problem: "expected linears of a stage to share their groups".into(),
    })
}

/// Everything that decides the artifact's bytes; a run may only be resumed by one that agrees.
fn fingerprint(job: &Job) -> Fingerprint {
    let quant = &job.params.quant;
    let tokens = job.sequences.iter().flatten().flat_map(|id| id.to_le_bytes());
    let mut print = Fingerprint::new();
    print.insert("quantization", quant.to_quantization_config_json());
    print.insert("desc_act", engines::needs_desc_act(&job.source.files.config, quant));
    print.insert("method", job.params.method.name());
    print.insert("mse", job.params.mse);
    print.insert("zero_bias", job.zero_bias);
    print.insert("max_shard_size", job.max_shard_size);
    print.insert("calibration tokens", artifact::hash(tokens));
    print.insert("checkpoint", artifact::hash(checkpoint_sample(job.source.files)));
    print
}

/// Names, sizes and the first bytes of every tensor: enough to notice another checkpoint, without reading it all.
fn checkpoint_sample(files: &ModelFiles) -> Vec<u8> {
    const BYTES: usize = 256;
    let specs = layout::checkpoint_tensors(&files.config);
    let sample = |spec: &TensorSpec| {
        let bytes = files.checkpoint.tensor(&spec.name, &spec.shape).map_or(&[][..], |tensor| tensor.bytes);
        [spec.name.as_bytes(), &bytes.len().to_le_bytes(), &bytes[..bytes.len().min(BYTES)]].concat()
    };
    specs.iter().flat_map(sample).collect()
}

fn read_records(finished: Vec<serde_json::Value>) -> Result<Vec<LayerRecord>> {
    let record = |value| serde_json::from_value(value);
    finished.into_iter().map(record).collect::<Result<_, _>>().map_err(|error| Error::Invalid {
        place: "journal of the interrupted run".into(),
        problem: error.to_string(),
    })
}

fn log(
    job: &Job,
    device: String,
    layers: Vec<LayerRecord>,
    seconds: f64,
    peak_memory: Option<usize>,
) -> QuantizeLog {
    let GptqParams { quant, method, mse, .. } = job.params;
    QuantizeLog {
        made_by: concat!("gptq ", env!("CARGO_PKG_VERSION")).into(),
        model: job.source.model.into(),
        device,
        method: method.name().into(),
        bits: quant.bits,
        group_size: quant.group_size_number(),
        act_order: quant.act_order,
        sym: quant.sym,
        static_groups: quant.static_groups,
        mse: *mse,
        damp_percent: quant.damp_percent,
        checkpoint_format: quant.format.name().into(),
        calibration: job.calibration.cloned(),
        seconds,
        peak_memory,
        layers,
        evaluation: None,
    }
}

impl Method {
    /// The name on the command line and in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::Rtn => "rtn",
        }
    }
}
