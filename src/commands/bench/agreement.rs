//! `gptq bench agreement`: a device against the CPU, stage by stage from the same activations.

use anyhow::Result;
use gptq_kernels::packing::PackedLinear;
use gptq_kernels::{Backend, Cpu};
use gptq_quantizer::gptq;
use gptq_quantizer::plan::Branch;
use gptq_quantizer::produce;
use gptq_quantizer::sequential::{ActivationCache, Reader, SolvedLayer, Walk};
use gptq_runtime::model::ModelFiles;
use serde::Serialize;

use crate::args::AgreementBenchArgs;
use crate::commands::common::{self, Calibration, Chosen, DeviceKind};
use crate::output;
use crate::progress::Progress;

pub fn run(args: &AgreementBenchArgs) -> Result<()> {
    let dir = common::model_dir(&args.model)?;
    let files = common::open_model(&dir)?;
    let calibration = Calibration::load(&args.calibration, &dir, DeviceKind::Cpu)?;
    let sequences = &calibration.sequences;
    let (device, layers) = match common::device(args.device, &files.config)? {
        Chosen::Cpu(cpu) => measure(&cpu, &files, sequences)?,
        Chosen::Gpu(gpu) => measure(&gpu, &files, sequences)?,
    };
    if args.json {
        return Ok(output::json(&layers)?);
    }
    say!("{}: {device} against the CPU, 4-bit 128g act-order\n", args.model)?;
    say!("{:>5} {:>14} {:>22}", "layer", "codes equal", "largest loss distance")?;
    for LayerAgreement { layer, codes_equal, loss_distance } in &layers {
        say!("{layer:>5} {:>12.3} % {:>20.4} %", 100.0 * codes_equal, 100.0 * loss_distance)?;
    }
    let mean = layers.iter().map(|layer| layer.codes_equal).sum::<f64>() / layers.len().max(1) as f64;
    say!("{:>5} {:>12.3} %", "all", 100.0 * mean)?;
    Ok(())
}

#[derive(Serialize)]
struct LayerAgreement {
    layer: usize,
    /// Share of equal codes.
    codes_equal: f64,
    /// Largest relative difference of a stage's loss.
    loss_distance: f64,
}

/// The device's name, and how its layers agree.
fn measure<B: Backend>(
    device: &B,
    files: &ModelFiles,
    sequences: &[Vec<u32>],
) -> Result<(String, Vec<LayerAgreement>)> {
    let params = Branch::new("main".into(), 4, Some(128)).params();
    produce::check_settings(files, &params)?;
    let cpu = Cpu::new();
    let layout = params.layout();
    let mut on_cpu =
        Walk::start(&cpu, files, &params, ActivationCache::embed(&cpu, files, sequences, layout)?);
    let activations = ActivationCache::embed(device, files, sequences, layout)?;
    let mut on_device = Walk::start(device, files, &params, activations);
    let layers = files.config.num_hidden_layers;
    let mut progress = Progress::start("comparing", layers as u64);
    let layers = std::thread::scope(|scope| {
        let for_cpu = Reader::start(scope, &cpu, files, 0);
        let for_device = Reader::start(scope, device, files, 0);
        let compare = |layer| {
            let expected = Groups::of(&cpu, on_cpu.solve_layer(layer, &for_cpu, None, &mut |_| {})?)?;
            let through = Some(&expected.packed[..]);
            let got = on_device.solve_layer(layer, &for_device, through, &mut |_| {})?;
            progress.advance(1);
            Ok(Groups::of(device, got)?.against(&expected, layer))
        };
        (0..layers).map(compare).collect::<Result<Vec<_>>>()
    })?;
    Ok((device.name(), layers))
}

/// The groups of a layer in host memory, with their losses.
struct Groups {
    packed: Vec<PackedLinear<'static>>,
    losses: Vec<f64>,
}

impl Groups {
    fn of<B: Backend>(backend: &B, layer: SolvedLayer<B>) -> Result<Self> {
        let losses = layer.groups.iter().map(|group| gptq::loss(&group.losses, 1)).collect();
        let packed = layer.groups.into_iter().map(|group| backend.collect(group.packed));
        let packed = packed.collect::<Result<_, _>>()?;
        Ok(Self { packed, losses })
    }

    fn against(&self, expected: &Self, layer: usize) -> LayerAgreement {
        let (mut equal, mut all) = (0, 0);
        for (a, b) in self.packed.iter().zip(&expected.packed) {
            let (a, b) = (a.codes(), b.codes());
            equal += a.iter().zip(&b).filter(|(a, b)| a == b).count();
            all += a.len();
        }
        let distances = self.losses.iter().zip(&expected.losses).map(|(a, b)| (a / b - 1.0).abs());
        LayerAgreement {
            layer,
            codes_equal: equal as f64 / all.max(1) as f64,
            loss_distance: distances.fold(0.0, f64::max),
        }
    }
}
