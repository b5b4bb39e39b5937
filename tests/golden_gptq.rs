//! The solver against an independent f64 implementation of the paper, case by case, and the packing of its codes.

use std::collections::BTreeMap;

use gptq_kernels::packing::{PackedLinear, pack_zeros};
use gptq_kernels::{Backend, Cpu, Device, Dtype, GridKind, Hessian, HostTensor, Quantized};
use gptq_quantizer::gptq::{self, GptqParams, Method, StageWeights, solve};
use gptq_quantizer::moments::Evidence;
use gptq_quantizer::recipe::{Order, Preset, Recipe};
use gptq_runtime::quant_config::{CheckpointFormat, QuantConfig};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::paper::{OneSigned, Paper};
use crate::support;

/// Rows and columns of the golden weight; rows of the golden input.
const OUT: usize = 64;
const IN: usize = 256;
const TOKENS: usize = 640;
/// The row of the golden weight whose weights are all positive; AutoGPTQ's grid for it cuts its upper half.
const POSITIVE: usize = 3;

fn cases() -> Vec<Value> {
    serde_json::from_str(&std::fs::read_to_string(support::golden("gptq/cases.json")).unwrap()).unwrap()
}

fn params(case: &Value) -> GptqParams {
    let flag = |key: &str| case[key].as_bool().unwrap();
    let grid = if flag("mse") { GridKind::Mse } else { GridKind::Absmax };
    let order = match (flag("act_order"), flag("static_groups")) {
        (true, true) => Order::StaticGroups,
        (true, false) => Order::ActOrder,
        (false, _) => Order::File,
    };
    GptqParams {
        quant: QuantConfig {
            bits: case["bits"].as_u64().unwrap() as u32,
            group_size: usize::try_from(case["group_size"].as_i64().unwrap()).ok(),
            damp_percent: case["damp_percent"].as_f64().unwrap(),
            act_order: flag("act_order"),
            static_groups: flag("static_groups"),
            sym: flag("sym"),
            true_sequential: true,
            format: CheckpointFormat::GptqV2,
            ..QuantConfig::default()
        },
        method: Method::Gptq,
        recipe: Recipe { order, grid, ..Preset::Card.recipe() },
        f16_scales: false,
    }
}

struct OnHost {
    packed: PackedLinear<'static>,
    /// With one sequence H = 2 X X^T, as in the reference.
    loss: f64,
}

fn solved<B: Backend>(
    backend: &B,
    weight: &HostTensor,
    evidence: &Evidence<B>,
    params: &GptqParams,
) -> OnHost {
    let weights = StageWeights::read(backend, std::slice::from_ref(weight), &[]).unwrap();
    let solved = solve(backend, &weights, Some(evidence), params).unwrap();
    OnHost { loss: gptq::loss(&solved.losses, 1), packed: backend.collect(solved.packed).unwrap() }
}

/// Our grids are found in place; where the reference's are not, its smaller groups cannot be compared.
fn comparable(case: &Value) -> bool {
    let group_size = case["group_size"].as_i64().unwrap();
    case["grids"] == "in-place" || group_size >= 128 || group_size == -1 || case["static_groups"] == true
}

fn share_equal(a: &[u8], b: &[u8]) -> f64 {
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}

/// Where a row of a symmetric grid has one sign we differ from AutoGPTQ; there an f64 sweep of that row decides, which
/// must find the golden codes by AutoGPTQ's rule.
#[test]
fn codes_and_loss_agree_with_the_reference() {
    let bytes = std::fs::read(support::golden("gptq/inputs.safetensors")).unwrap();
    let inputs = SafeTensors::deserialize(&bytes).unwrap();
    let weight = HostTensor::new(Dtype::F32, vec![OUT, IN], inputs.tensor("weight").unwrap().data()).unwrap();
    let values = support::floats(&inputs, "input");
    let cpu = Cpu::new();
    let mut hessian = cpu.hessian(IN).unwrap();
    cpu.accumulate(&mut hessian, &cpu.tensor(values.clone(), (TOKENS, IN)).unwrap()).unwrap();
    let evidence = Evidence::of(hessian);
    let cases = cases();
    let compared: Vec<_> = cases.iter().filter(|case| comparable(case)).collect();
    assert_eq!(compared.len(), 14);
    for case in compared {
        let name = case["case"].as_str().unwrap();
        let bytes = std::fs::read(support::golden(&format!("gptq/{name}.safetensors"))).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        let params = params(case);
        let solved = solved(&cpu, &weight, &evidence, &params);
        let mut codes = expected.tensor("codes").unwrap().data().to_vec();
        let (loss, mut reference) = (solved.loss, case["loss"].as_f64().unwrap());
        if params.quant.sym {
            let paper = Paper::new(&params, &values, IN);
            // Groups that the sweep itself has made one-signed count, too.
            for (n, row) in weight.to_f32().chunks_exact(IN).enumerate() {
                let (theirs, their_loss) = paper.solve(row, OneSigned::FromZero);
                let (ours, our_loss) = paper.solve(row, OneSigned::Even);
                if theirs == ours {
                    assert_ne!(n, POSITIVE, "{name}");
                    continue;
                }
                let known = &mut codes[n * IN..][..IN];
                assert!(share_equal(&theirs, known) >= 0.98, "{name}: the reference of row {n}");
                known.copy_from_slice(&ours);
                reference += our_loss - their_loss;
                let found = &solved.packed.codes()[n * IN..][..IN];
                assert!(share_equal(found, &ours) >= 0.98, "{name}: row {n}, with a group of one sign");
            }
        }
        let share = share_equal(&solved.packed.codes(), &codes);
        println!(
            "{name}: {:.3} % of codes equal, loss {:+.4} %",
            share * 100.0,
            (loss / reference - 1.0) * 100.0
        );
        assert!(share >= 0.995, "{name}: {share}");
        assert!((loss / reference - 1.0).abs() <= 1e-3, "{name}: loss {loss}, reference {reference}");
        assert_eq!(solved.packed.g_idx, support::ints(&expected, "g_idx"), "{name}");
    }
}

/// The same input, rounded to f16 for both, on the GPU and on the CPU.
#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_card_finds_the_codes_of_the_cpu() {
    let gpu = gptq_kernels::Cuda::new(0, Dtype::F16, None).unwrap();
    let bytes = std::fs::read(support::golden("gptq/inputs.safetensors")).unwrap();
    let inputs = SafeTensors::deserialize(&bytes).unwrap();
    let weight = HostTensor::new(Dtype::F32, vec![OUT, IN], inputs.tensor("weight").unwrap().data()).unwrap();
    let input: Vec<f32> =
        support::floats(&inputs, "input").iter().map(|x| half::f16::from_f32(*x).to_f32()).collect();
    let cpu = Cpu::new();
    let mut on_cpu = cpu.hessian(IN).unwrap();
    cpu.accumulate(&mut on_cpu, &cpu.tensor(input.clone(), (TOKENS, IN)).unwrap()).unwrap();
    let mut on_gpu = gpu.hessian(IN).unwrap();
    gpu.accumulate(&mut on_gpu, &gpu.tensor(input, (TOKENS, IN)).unwrap()).unwrap();
    let (on_cpu, on_gpu) = (Evidence::of(on_cpu), Evidence::of(on_gpu));
    for case in cases() {
        for f16_scales in [false, true] {
            let name = case["case"].as_str().unwrap();
            let params = GptqParams { f16_scales, ..params(&case) };
            let expected = solved(&cpu, &weight, &on_cpu, &params);
            let solved = solved(&gpu, &weight, &on_gpu, &params);
            let (codes, expected_codes) = (solved.packed.codes(), expected.packed.codes());
            let share =
                codes.iter().zip(&expected_codes).filter(|(a, b)| a == b).count() as f64 / (OUT * IN) as f64;
            let loss = solved.loss / expected.loss - 1.0;
            println!("{name}: {:.3} % of codes equal, loss {:+.4} %", share * 100.0, loss * 100.0);
            assert!(share >= 0.99 && loss.abs() <= 0.01, "{name}: {share}, {loss}");
            assert_eq!(solved.packed.g_idx, expected.packed.g_idx, "{name}");
        }
    }
}

#[test]
fn given_codes_are_packed_bit_for_bit() {
    let mut widths = BTreeMap::new();
    for case in cases() {
        let name = case["case"].as_str().unwrap();
        let bytes = std::fs::read(support::golden(&format!("gptq/{name}.safetensors"))).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let bits = case["bits"].as_u64().unwrap() as u32;
        let zeros: Vec<u8> = support::ints(&file, "zeros").iter().map(|z| *z as u8).collect();
        let solved = Quantized {
            bits,
            codes: file.tensor("codes").unwrap().data().to_vec(),
            scales: support::floats(&file, "scales"),
            zeros: zeros.clone(),
            g_idx: support::ints(&file, "g_idx"),
            losses: vec![0.0; OUT],
        };
        let packed = PackedLinear::pack(&solved, 0).unwrap();
        assert_eq!(packed.qweight.concat(), support::ints(&file, "qweight"), "{name}");
        assert_eq!(packed.qzeros, support::ints(&file, "qzeros_v2"), "{name}");
        if case["sym"] == true {
            let v1 = pack_zeros(&zeros, OUT, bits, 1).unwrap();
            assert_eq!(v1, support::ints(&file, "qzeros_v1"), "{name}");
        }
        *widths.entry(bits).or_insert(0) += 1;
    }
    assert_eq!(widths.keys().copied().collect::<Vec<_>>(), [2, 3, 4, 8]);
}
