//! From a checkpoint to a finished artifact folder: solve layer by layer, write each as it is done.

use std::path::Path;
use std::time::Instant;

use gptq_kernels::Backend;
use gptq_kernels::packing::PackedLinear;
use gptq_runtime::layout::{self, Stage, TensorSpec};
use gptq_runtime::model::{self, ModelFiles};

use crate::artifact::{self, ArtifactLayout, ArtifactWriter, Fingerprint, OutMode};
use crate::card;
use crate::gptq::{GptqParams, Method};
use crate::record::{CalibrationRecord, LOG_FILE, LayerRecord, LinearRecord, QuantizeLog};
use crate::sequential::{SolvedLayer, Walk};
use crate::{Error, Result};

/// One artifact to make.
pub struct Job<'a> {
    /// The source as the user named it.
    pub model: &'a str,
    pub source: &'a Path,
    pub files: &'a ModelFiles,
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

/// Refuses what cannot be quantized, before anything is written: layout, missing tensors, NaN and infinity.
pub fn check(files: &ModelFiles, params: &GptqParams) -> Result<()> {
    check_settings(files, params)?;
    let specs = layout::checkpoint_tensors(&files.config);
    files.checkpoint.verify_against(&specs)?;
    for spec in specs {
        let tensor = files.checkpoint.tensor(&spec.name, &spec.shape)?;
        files.checkpoint.check_finite(&tensor, &spec.name)?;
    }
    Ok(())
}

/// The part of [`check`] that reads no weights.
pub fn check_settings(files: &ModelFiles, params: &GptqParams) -> Result<()> {
    if files.quant.is_some() {
        let problem =
            "expected a checkpoint of floating-point weights, got one that is quantized already".into();
        return Err(Error::Invalid { place: "quantization_config".into(), problem });
    }
    Ok(layout::check_quantizable(&files.config, &params.quant)?)
}

/// Makes the artifact; its folder appears under its name when everything is in it.
pub fn produce<B: Backend>(backend: &B, job: &Job, on_event: &mut dyn FnMut(Event)) -> Result<QuantizeLog> {
    let started = Instant::now();
    check(job.files, job.params)?;
    refuse_source(job)?;
    let specs = artifact_specs(job);
    let layout = ArtifactLayout::new(specs, &artifact::metadata(&job.params.quant), job.max_shard_size);
    let (writer, finished) = ArtifactWriter::begin(job.out, layout, &fingerprint(job), job.mode)?;
    let mut walk = Walk::start(backend, job.files, job.params, job.sequences)?;
    let records = read_records(finished)?;
    for layer in 0..records.len() {
        on_event(Event::Restoring { layer });
        walk.skip_layer(layer, &restore(&writer, job, layer)?)?;
    }
    let (writer, records) = solve_and_write(job, &mut walk, writer, records, on_event)?;
    drop(walk);
    for spec in outer_tensors(job) {
        write_copy(&writer, job, &spec)?;
    }
    let log = log(job, B::name(backend), records, started.elapsed().as_secs_f64());
    for (name, bytes) in artifact::side_files(job.source, &job.params.quant, job.model)? {
        writer.add_file(&name, &bytes)?;
    }
    writer.add_file(LOG_FILE, &log.to_bytes())?;
    writer.add_file(card::CARD_FILE, card::model_card(&log, &job.files.config).as_bytes())?;
    writer.finish()?;
    Ok(log)
}

/// Solves the layers that are left, while another thread writes the one before.
fn solve_and_write<B: Backend>(
    job: &Job,
    walk: &mut Walk<B>,
    mut writer: ArtifactWriter,
    mut records: Vec<LayerRecord>,
    on_event: &mut dyn FnMut(Event),
) -> Result<(ArtifactWriter, Vec<LayerRecord>)> {
    let first = records.len();
    let (send, receive) = std::sync::mpsc::sync_channel::<(usize, SolvedLayer)>(1);
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || -> Result<_> {
            for (layer, solved) in receive {
                let started = Instant::now();
                write_layer(&writer, job, layer, &solved)?;
                let record = layer_record(layer, &solved, started.elapsed().as_secs_f64());
                writer.layer_done(&serde_json::to_value(&record).unwrap_or_default())?;
                records.push(record);
            }
            Ok((writer, records))
        });
        for layer in first..job.files.config.num_hidden_layers {
            let solved = walk.solve_layer(layer, &mut |stage| on_event(Event::Solving { layer, stage }))?;
            on_event(Event::Done { layer, loss: solved.linears.iter().map(|linear| linear.loss).sum() });
            // A writer that is gone has failed: its error comes with the join.
            if send.send((layer, solved)).is_err() {
                break;
            }
        }
        drop(send);
        writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The output must not hold the source, which replacing it would delete.
fn refuse_source(job: &Job) -> Result<()> {
    let whole = |path: &Path| path.canonicalize().ok();
    match (whole(job.source), whole(job.out)) {
        (Some(source), Some(out)) if source.starts_with(&out) => {
            let problem = format!("expected another folder than the source's, {}", source.display());
            Err(Error::Output { path: job.out.into(), problem })
        }
        _ => Ok(()),
    }
}

/// The artifact's tensors, with the types that the source's own tensors have.
fn artifact_specs(job: &Job) -> Vec<TensorSpec> {
    let specs = layout::artifact_tensors(&job.files.config, &job.params.quant, job.zero_bias);
    specs.into_iter().map(|spec| as_stored(job, spec)).collect()
}

fn as_stored(job: &Job, mut spec: TensorSpec) -> TensorSpec {
    let copied = !is_packed(&spec.name);
    if let Some(stored) = job.files.checkpoint.spec(&spec.name).filter(|_| copied) {
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

fn write_layer(writer: &ArtifactWriter, job: &Job, layer: usize, solved: &SolvedLayer) -> Result<()> {
    let prefix = layout::layer_prefix(layer);
    for linear in &solved.linears {
        let (packed, module) = (&linear.packed, linear.spec.module);
        let tensor =
            |name: &str, bytes: &[u8]| writer.write_tensor(&format!("{prefix}{module}.{name}"), bytes);
        tensor("qweight", bytemuck::cast_slice(&packed.qweight))?;
        tensor("qzeros", bytemuck::cast_slice(&packed.qzeros))?;
        tensor("scales", bytemuck::cast_slice(&packed.scales))?;
        tensor("g_idx", bytemuck::cast_slice(&packed.g_idx))?;
        if job.zero_bias || linear.spec.bias {
            let bias = packed.bias.clone().unwrap_or(vec![0.0; packed.out_features]);
            let bias: Vec<half::f16> = bias.into_iter().map(half::f16::from_f32).collect();
            tensor("bias", bytemuck::cast_slice(&bias))?;
        }
    }
    let norms =
        artifact_specs(job).into_iter().filter(|s| s.name.starts_with(&prefix) && !is_packed(&s.name));
    norms.into_iter().try_for_each(|spec| write_copy(writer, job, &spec))
}

fn write_copy(writer: &ArtifactWriter, job: &Job, spec: &TensorSpec) -> Result<()> {
    writer.write_tensor(&spec.name, job.files.checkpoint.tensor(&spec.name, &spec.shape)?.bytes)
}

/// The stages of a finished layer, their linears stacked, read back from the unfinished artifact.
fn restore(writer: &ArtifactWriter, job: &Job, layer: usize) -> Result<[PackedLinear; 4]> {
    let quant = &job.params.quant;
    let mut stages = [const { Vec::new() }; 4];
    for linear in layout::linears(&job.files.config) {
        let name = |tensor: &str| format!("{}{}.{tensor}", layout::layer_prefix(layer), linear.module);
        let words = |tensor: &str| -> Result<Vec<u32>> {
            let bytes = writer.read_tensor(&name(tensor))?;
            Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let scales = writer.read_tensor(&name("scales"))?;
        let scales = scales.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]])).collect();
        let (_, biases) = model::dense_parts(job.files, layer, &[linear])?;
        let packed = PackedLinear {
            bits: quant.bits,
            in_features: linear.in_features,
            out_features: linear.out_features,
            qweight: words("qweight")?,
            qzeros: words("qzeros")?,
            scales,
            g_idx: words("g_idx")?,
            zero_offset: quant.format.zero_offset(),
            bias: biases.first().map(|bias| bias.to_f32()),
        };
        packed.check()?;
        stages[linear.stage as usize].push(packed);
    }
    let stacked = stages.iter().filter_map(|linears| PackedLinear::stack(linears)).collect::<Vec<_>>();
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
    print.insert("method", job.params.method.name());
    print.insert("mse", job.params.mse);
    print.insert("zero_bias", job.zero_bias);
    print.insert("max_shard_size", job.max_shard_size);
    print.insert("calibration tokens", artifact::hash(tokens));
    print.insert("checkpoint", artifact::hash(checkpoint_sample(job.files)));
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

fn layer_record(layer: usize, solved: &SolvedLayer, write_seconds: f64) -> LayerRecord {
    let linears = solved.linears.iter().map(|linear| LinearRecord {
        module: linear.spec.module.into(),
        loss: linear.loss,
        damp_percent: linear.damp_percent,
    });
    LayerRecord {
        layer,
        forward_seconds: solved.phases.forward.as_secs_f64(),
        hessian_seconds: solved.phases.hessian.as_secs_f64(),
        factor_seconds: solved.phases.factor.as_secs_f64(),
        sweep_seconds: solved.phases.sweep.as_secs_f64(),
        pack_seconds: solved.phases.pack.as_secs_f64(),
        write_seconds,
        linears: linears.collect(),
    }
}

fn log(job: &Job, device: String, layers: Vec<LayerRecord>, seconds: f64) -> QuantizeLog {
    let GptqParams { quant, method, mse, .. } = job.params;
    QuantizeLog {
        made_by: concat!("gptq ", env!("CARGO_PKG_VERSION")).into(),
        model: job.model.into(),
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
