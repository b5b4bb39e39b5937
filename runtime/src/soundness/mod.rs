//! Whether a model folder says and holds what belongs together, asked once for everything that loads one.
//!
//! Every tensor's name, type and shape is compared with the config, and what is small beside the codes is read: group
//! indices, zero points and scales. What would make numbers wrong stops a load; the rest is worth saying.

mod finding;
mod groups;
mod linear;
mod zeros;

use gptq_kernels::Dtype;
use rayon::prelude::*;

pub use finding::{Finding, summary};
pub use groups::Stored;
pub(crate) use zeros::zeros_as_v2;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::layout::{self, LinearSpec, TensorSpec};
use crate::quant_config::QuantConfig;

/// A linear of a checkpoint: where it is, what it is, and how it is stored.
#[derive(Clone, Debug)]
pub struct Module {
    /// `model.layers.3.self_attn.q_proj`
    pub name: String,
    pub linear: LinearSpec,
    /// `None` where its weight is floating point.
    pub quant: Option<QuantConfig>,
}

impl Module {
    /// A linear of layer `index`, as the checkpoint holds it: where it has codes, they are read by the settings of this
    /// module, or by those of all where the description leaves it out.
    pub(crate) fn of(
        checkpoint: &Checkpoint,
        quant: Option<&QuantConfig>,
        index: usize,
        linear: LinearSpec,
    ) -> crate::Result<Self> {
        let name = layout::layer_prefix(index) + &linear.module;
        let packed = checkpoint.contains(&format!("{name}.qweight"));
        let quant = match quant.filter(|_| packed) {
            Some(quant) => Some(quant.of_module(&name)?.unwrap_or_else(|| quant.clone())),
            None => None,
        };
        Ok(Self { name, linear, quant })
    }
}

/// All linears, layer by layer.
pub(crate) fn modules(
    config: &ModelConfig,
    quant: Option<&QuantConfig>,
    checkpoint: &Checkpoint,
) -> crate::Result<Vec<Module>> {
    let linears = layout::linears(config).into_iter();
    linears.map(|(index, linear)| Module::of(checkpoint, quant, index, linear)).collect()
}

/// Everything that is amiss, what makes numbers wrong first.
pub(crate) fn examine(
    config: &ModelConfig,
    quant: Option<&QuantConfig>,
    checkpoint: &Checkpoint,
) -> crate::Result<Vec<Finding>> {
    let modules = modules(config, quant, checkpoint)?;
    let mut findings = descriptions(quant, checkpoint, &modules);
    if findings.is_empty() {
        let of_linears = modules.par_iter().map(|module| linear::examine(checkpoint, quant, module));
        findings.extend(of_linears.collect::<crate::Result<Vec<_>>>()?.into_iter().flatten());
        findings
            .extend(layout::other_tensors(config).into_iter().filter_map(|spec| misfit(checkpoint, &spec)));
    }
    findings.sort_by_key(Finding::is_harmless);
    Ok(findings)
}

/// Codes without a description, and a description without codes.
fn descriptions(quant: Option<&QuantConfig>, checkpoint: &Checkpoint, modules: &[Module]) -> Vec<Finding> {
    let packed = modules.iter().find(|module| checkpoint.contains(&format!("{}.qweight", module.name)));
    match (quant, packed) {
        (None, Some(module)) => {
            let tensor = format!("{}.qweight", module.name);
            // AWQ's own file; its weights have the same names.
            match checkpoint.dir().join("quant_config.json").exists() {
                true => vec![Finding::Awq { tensor }],
                false => vec![Finding::NoDescription { tensor }],
            }
        }
        (Some(_), None) => vec![Finding::NoCodes],
        _ => vec![],
    }
}

/// A tensor that is not there, or not as the config says.
pub(super) fn misfit(checkpoint: &Checkpoint, spec: &TensorSpec) -> Option<Finding> {
    checkpoint.verify_against(std::slice::from_ref(spec)).err().map(|error| Finding::Tensor(Box::new(error)))
}

/// A floating-point tensor's specification; any floating-point type fits.
pub(super) fn float(name: String, shape: impl Into<Vec<usize>>) -> TensorSpec {
    TensorSpec::new(name, Dtype::F16.into(), shape)
}
