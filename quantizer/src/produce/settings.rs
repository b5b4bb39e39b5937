//! Everything that decides an artifact's bytes. A run may only be resumed by one that agrees.

use std::fs;

use gptq_kernels::Backend;
use gptq_runtime::layout::TensorSpec;
use gptq_runtime::model::ModelFiles;
use serde_json::Value;

use super::Job;
use crate::artifact::{Fingerprint, Hash, hash_tokens};
use crate::{Error, NUMERICS, Result, engines};

/// `side_files` are the small files that the artifact gets.
pub(super) fn fingerprint<B: Backend>(
    backend: &B,
    job: &Job,
    side_files: &[(String, Vec<u8>)],
) -> Result<Fingerprint> {
    let quant = &job.params.quant;
    let mut print = Fingerprint::new();
    print.insert("numerics", NUMERICS);
    print.insert("arithmetic", backend.arithmetic());
    print.insert("quantization", quant.to_quantization_config_json());
    print.insert("desc_act", engines::needs_desc_act(&job.source.files.config, quant));
    print.insert("method", job.params.method.name());
    print.insert("recipe", job.params.recipe.to_json());
    print.insert("f16_scales", job.params.f16_scales);
    print.insert("zero_bias", job.zero_bias);
    print.insert("max_shard_size", job.max_shard_size);
    print.insert("calibration tokens", hash_tokens(job.sequences));
    print.insert("weights", job.source.weights.as_str());
    print.insert("config.json", source_config(job)?);
    for (name, bytes) in side_files {
        // Both configs are made from what is here already.
        if name != "config.json" && name != "quantize_config.json" {
            print.insert(name, Hash::default().part(bytes).finish());
        }
    }
    Ok(print)
}

fn source_config(job: &Job) -> Result<Value> {
    let path = job.source.dir.join("config.json");
    let text = fs::read(&path).map_err(Error::io(&path))?;
    serde_json::from_slice(&text).map_err(|error| Error::invalid(path.display(), error))
}

/// Reads every weight once: refuses NaN and infinity, and returns a hash of names, types, shapes and all values. How they
/// are spread over files does not matter.
pub(super) fn check_weights(files: &ModelFiles, specs: &[TensorSpec]) -> Result<String> {
    let mut hash = Hash::default();
    for spec in specs {
        let tensor = files.checkpoint.tensor(&spec.name, &spec.shape)?;
        files.checkpoint.check_finite(&tensor, &spec.name)?;
        let described = format!("{} {:?} {:?}", spec.name, tensor.dtype, spec.shape);
        hash = hash.part(described.as_bytes()).large_part(tensor.bytes);
    }
    Ok(hash.finish())
}
