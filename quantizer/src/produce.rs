//! From a checkpoint to a finished artifact folder: solve layer by layer, write each as it is done.

mod settings;
mod tensors;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use gptq_kernels::Backend;
use gptq_runtime::layout::{self, Role};
use gptq_runtime::model::ModelFiles;
use serde_json::{Value, json};

use crate::artifact::{self, ArtifactLayout, ArtifactWriter, Begun, Fingerprint, OutMode};
use crate::card;
use crate::engines;
use crate::gptq::{self, GptqParams, Method};
use crate::recipe::Preset;
use crate::record::{CalibrationRecord, LOG_FILE, LayerRecord, QuantizeLog, RecipeRecord};
use crate::sequential::{ActivationCache, Reader, SolvedLayer, Walk};
use crate::{Error, Result};
use tensors::{artifact_specs, restore, write_copy, write_group, write_others};

/// Name and version, as GPTQModel writes its own.
const QUANTIZER: &str = concat!("gptq:", env!("CARGO_PKG_VERSION"));

/// A checkpoint that can be quantized: nothing is missing, and every weight is a finite number.
pub struct Source<'a> {
    /// As the user named it.
    model: &'a str,
    dir: &'a Path,
    files: &'a ModelFiles,
    /// Hash of all weights.
    weights: String,
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
    /// Once it is set, the run ends when the layer that is being solved is written.
    pub stop: &'a AtomicBool,
}

/// Of jobs that nothing stops.
static NEVER: AtomicBool = AtomicBool::new(false);

impl<'a> Job<'a> {
    /// A new artifact in one file, with AutoGPTQ's bias tensors.
    pub fn new(
        source: &'a Source<'a>,
        params: &'a GptqParams,
        sequences: &'a [Vec<u32>],
        out: &'a Path,
    ) -> Self {
        let (zero_bias, calibration, mode, max_shard_size) = (true, None, OutMode::New, None);
        Self { source, params, zero_bias, sequences, calibration, out, mode, max_shard_size, stop: &NEVER }
    }
}

/// What is happening, for progress.
pub enum Event {
    /// The output is there already, made with the same settings.
    Finished,
    /// An earlier run finished this layer; its activations are made again.
    Restoring {
        layer: usize,
    },
    Solving {
        layer: usize,
        group: Role,
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
        Ok(Self { model, dir, files, weights: settings::check_weights(files, &specs)? })
    }

    pub fn files(&self) -> &'a ModelFiles {
        self.files
    }
}

/// Refuses settings that the checkpoint's shapes do not allow; reads no weights.
pub fn check_settings(files: &ModelFiles, params: &GptqParams) -> Result<()> {
    if files.quant.is_some() {
        let problem = "expected a checkpoint of floating-point weights, got one that is quantized already";
        return Err(Error::invalid("quantization_config", problem));
    }
    Ok(layout::check_quantizable(&files.config, &params.quant)?)
}

/// Makes the artifact; its folder appears under its name when everything is in it. `activations` are the embedded
/// tokens of the job's sequences, laid out as [`GptqParams::layout`] has it.
///
/// # Errors
/// [`Error::Stopped`] where the run was asked to stop before it was complete; it can be resumed.
pub fn produce<B: Backend>(
    backend: &B,
    job: &Job,
    activations: ActivationCache<B>,
    on_event: &mut dyn FnMut(Event),
) -> Result<QuantizeLog> {
    let started = Instant::now();
    let files = job.source.files;
    check_settings(files, job.params)?;
    refuse_source(job)?;
    if activations.layout() != job.params.layout() {
        let (expected, got) = (job.params.layout(), activations.layout());
        let problem = format!("expected {expected:?} as the settings have it, got {got:?}");
        return Err(Error::invalid("activations", problem));
    }
    let layout =
        ArtifactLayout::new(artifact_specs(job), &artifact::metadata(&job.params.quant), job.max_shard_size);
    let written = engines::as_written(&files.config, &job.params.quant);
    let side_files =
        artifact::side_files(job.source.dir, &files.config, &written, job.source.model, meta(job))?;
    let settings = settings::fingerprint(backend, job, &side_files)?;
    let (writer, records) = match artifact::begin(job.out, layout, &settings, job.mode)? {
        Begun::Writing(writer, records) => (*writer, records),
        Begun::Finished(log) => {
            on_event(Event::Finished);
            return Ok(*log);
        }
    };
    let mut walk = Walk::start(backend, files, job.params, activations);
    for layer in 0..records.len() {
        job.check_stop(records.len())?;
        on_event(Event::Restoring { layer });
        walk.skip_layer(layer, &restore(&writer, job, layer)?)?;
    }
    let (mut writer, records) = solve_and_write(backend, job, &mut walk, writer, records, on_event)?;
    let agreement = walk.agreement()?;
    drop(walk);
    let seconds = started.elapsed().as_secs_f64();
    let peak = backend.memory()?.map(|memory| memory.peak);
    let log = QuantizeLog {
        held_out: agreement,
        ..log(job, B::name(backend), records, &settings, (seconds, peak))
    };
    for (name, bytes) in &side_files {
        writer.add_file(name, bytes)?;
    }
    writer.add_file(LOG_FILE, &log.to_bytes())?;
    writer.add_file(card::CARD_FILE, card::model_card(&log, &files.config).as_bytes())?;
    writer.finish()?;
    Ok(log)
}

impl Job<'_> {
    /// Sequences that stages are solved with.
    fn solved_sequences(&self) -> usize {
        let count = self.sequences.len();
        count - self.params.layout().held_out(count)
    }

    fn check_stop(&self, done: usize) -> Result<()> {
        let layers = self.source.files.config.num_hidden_layers;
        match self.stop.load(Ordering::Relaxed) && done < layers {
            true => Err(Error::Stopped { done, layers }),
            false => Ok(()),
        }
    }
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
            if job.stop.load(Ordering::Relaxed) {
                break;
            }
            let on_group = &mut |group| on_event(Event::Solving { layer, group });
            let mut solved = walk.solve_layer(layer, &reader, None, on_group)?;
            solved.phases.wait += waited;
            let sequences = job.solved_sequences();
            let loss = solved.groups.iter().map(|group| gptq::loss(&group.losses, sequences)).sum();
            on_event(Event::Done { layer, loss });
            let sending = Instant::now();
            // A writer that is gone has failed: its error comes with the join.
            if send.send((layer, solved)).is_err() {
                break;
            }
            waited = sending.elapsed().as_secs_f64();
        }
        drop((send, reader));
        let (writer, records) = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        job.check_stop(records.len())?;
        Ok((writer, records))
    })
}

/// Writes what no layer owns, while the first layer is being solved, then each layer as it comes.
fn write_all<B: Backend>(
    backend: &B,
    job: &Job,
    mut writer: ArtifactWriter,
    mut records: Vec<LayerRecord>,
    layers: Receiver<(usize, SolvedLayer<B>)>,
) -> Result<(ArtifactWriter, Vec<LayerRecord>)> {
    for spec in layout::outer_tensors(&job.source.files.config) {
        write_copy(&writer, job, &spec)?;
    }
    for (layer, SolvedLayer { groups, experts, mut phases }) in layers {
        let started = Instant::now();
        let spec = layout::layer(&job.source.files.config, layer);
        let mut linears = Vec::new();
        for (group, solved) in spec.groups.iter().zip(groups) {
            linears.extend(write_group(backend, &writer, job, (layer, group), solved)?);
        }
        write_others(&writer, job, layer)?;
        phases.write = started.elapsed().as_secs_f64();
        let record = LayerRecord { layer, phases, linears, experts };
        writer.layer_done(&record)?;
        records.push(record);
    }
    Ok((writer, records))
}

/// How the codes were found, in the place that GPTQModel has for it. Published files of the card have none, and AutoGPTQ
/// 0.4.2 refuses keys that it does not know.
fn meta(job: &Job) -> Option<Value> {
    let GptqParams { method, recipe, .. } = job.params;
    let meta = || json!({"quantizer": [QUANTIZER], "recipe": recipe.to_json()});
    (*method == Method::Gptq && recipe.preset() != Some(Preset::Card)).then(meta)
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

fn log(
    job: &Job,
    device: String,
    layers: Vec<LayerRecord>,
    settings: &Fingerprint,
    (seconds, peak_memory): (f64, Option<usize>),
) -> QuantizeLog {
    let GptqParams { quant, method, recipe, .. } = job.params;
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
        recipe: RecipeRecord::from(recipe),
        damp_percent: quant.damp_percent,
        checkpoint_format: quant.format.name().into(),
        calibration: job.calibration.cloned(),
        seconds,
        peak_memory,
        layers,
        held_out: None,
        settings: settings.to_json(),
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
