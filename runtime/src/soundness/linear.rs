//! One linear: its tensors, and whether they fit one another and the description.

use super::zeros::symmetric_format;
use super::{Finding, Module, Stored, float, misfit};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::layout::{StoredDtype, TensorSpec};
use crate::quant_config::QuantConfig;

/// What is amiss with a linear. `quant` describes the whole file.
pub(super) fn examine(
    checkpoint: &Checkpoint,
    quant: Option<&QuantConfig>,
    module: &Module,
) -> Result<Vec<Finding>> {
    let (name, linear) = (&module.name, &module.linear);
    let described = match quant {
        Some(quant) => quant.of_module(name)?,
        None => None,
    };
    let dense = checkpoint.contains(&format!("{name}.weight"));
    let mut findings = Vec::new();
    match &module.quant {
        Some(_) if dense => findings.push(Finding::TwoWeights { module: name.clone() }),
        Some(_) if described.is_none() => findings.push(Finding::UnexpectedCodes { module: name.clone() }),
        Some(own) => findings.extend(packed(checkpoint, module, own)),
        None => {
            // Where the description promises codes and there is nothing at all, they are what is missing.
            let missing = if described.is_some() && !dense { "qweight" } else { "weight" };
            let weight = [linear.out_features, linear.in_features];
            let wrong = misfit(checkpoint, &float(format!("{name}.{missing}"), weight));
            let undescribed = described.is_some().then(|| Finding::UnexpectedWeight { module: name.clone() });
            findings.extend(wrong.or(undescribed));
        }
    }
    findings.extend(bias(checkpoint, module));
    Ok(findings)
}

/// The tensors of a quantized linear.
fn packed(checkpoint: &Checkpoint, module: &Module, quant: &QuantConfig) -> Vec<Finding> {
    let (k, n, bits) = (module.linear.in_features, module.linear.out_features, quant.bits as usize);
    let (name, groups) = (&module.name, quant.groups(k));
    let words = |tensor: &str, shape: [usize; 2]| {
        misfit(checkpoint, &TensorSpec::new(format!("{name}.{tensor}"), StoredDtype::I32, shape))
    };
    let shapes = [
        words("qweight", [k * bits / 32, n]),
        words("qzeros", [groups, n * bits / 32]),
        misfit(checkpoint, &float(format!("{name}.scales"), [groups, n])),
    ];
    let mut findings: Vec<_> = shapes.into_iter().flatten().collect();
    if !findings.is_empty() {
        return findings;
    }
    match Stored::read(checkpoint, module, quant) {
        Ok(stored) => findings.extend(stored.examine(module, quant)),
        Err(error) => findings.push(Finding::Tensor(Box::new(error))),
    }
    for found in [zeros(checkpoint, module, quant), scales(checkpoint, module, [groups, n])] {
        match found {
            Ok(finding) => findings.extend(finding),
            Err(error) => findings.push(Finding::Tensor(Box::new(error))),
        }
    }
    findings
}

/// Symmetric grids have the middle code as their zero point, stored as the declared format has it.
fn zeros(checkpoint: &Checkpoint, module: &Module, quant: &QuantConfig) -> Result<Option<Finding>> {
    if !quant.sym {
        return Ok(None);
    }
    let (k, n) = (module.linear.in_features, module.linear.out_features);
    let shape = [quant.groups(k), n * quant.bits as usize / 32];
    let words = checkpoint.words(&format!("{}.qzeros", module.name), &shape)?;
    let name = || module.name.clone();
    Ok(match symmetric_format(&words, quant, n) {
        Some(found) if found == quant.format => None,
        Some(found) => Some(Finding::Zeros { module: name(), declared: quant.format, found }),
        None => Some(Finding::ZerosNotMiddle { module: name() }),
    })
}

fn scales(checkpoint: &Checkpoint, module: &Module, shape: [usize; 2]) -> Result<Option<Finding>> {
    let stored = checkpoint.tensor(&format!("{}.scales", module.name), &shape)?;
    let name = || module.name.clone();
    let scales = stored.to_f32();
    if let Some(place) = scales.iter().position(|scale| !scale.is_finite()) {
        return Ok(Some(Finding::Scale { module: name(), got: scales[place], place }));
    }
    let exact = |scale: &f32| half::f16::from_f32(*scale).to_f32() == *scale;
    Ok((!scales.iter().all(exact)).then(|| Finding::WideScales { module: name() }))
}

/// A bias that the family has must be there; one that it has not must say nothing.
fn bias(checkpoint: &Checkpoint, module: &Module) -> Option<Finding> {
    let (name, shape) = (format!("{}.bias", module.name), [module.linear.out_features]);
    if module.linear.bias {
        return misfit(checkpoint, &float(name, shape));
    }
    if !checkpoint.contains(&name) {
        return None;
    }
    match checkpoint.tensor(&name, &shape) {
        Ok(values) if values.to_f32().iter().all(|x| *x == 0.0) => None,
        Ok(_) => Some(Finding::UnexpectedBias { module: module.name.clone() }),
        Err(error) => Some(Finding::Tensor(Box::new(error))),
    }
}
