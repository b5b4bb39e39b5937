//! Serves a model folder over HTTP until Enter is pressed; on a GPU only the line with `Cpu` differs:
//! `cargo run --release --example serve -- MODEL 3000`

use std::path::Path;
use std::sync::Arc;

use gptq_kernels::Cpu;
use gptq_runtime::engine::{self, EngineLimits};
use gptq_runtime::generation_config::GenerationConfig;
use gptq_runtime::model::{Model, ModelFiles};
use gptq_server::{Codec, Gate, ModelInfo, ServerConfig, ServerLimits, serve};
use tokio::net::TcpListener;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, port] = &args[..] else { anyhow::bail!("usage: serve MODEL PORT") };
    let dir = Path::new(model);
    let model = Model::load(Cpu::new(), &ModelFiles::open(dir)?)?;
    let tokens = model.config.context_length().min(4096);

    // The server, on threads of its own.
    let (engine, inbox) = engine::handle();
    let codec = Codec::load(dir, None)?;
    let defaults = GenerationConfig::read(dir)?.unwrap_or_default();
    let config = ServerConfig {
        limits: ServerLimits::new(tokens),
        info: ModelInfo { model_id: "example".into(), model_sha: None, version: "0".into() },
        eos_token_ids: defaults.end_ids(&model.config, codec.tokenizer().eos_id()),
        defaults,
        vocab_size: model.config.vocab_size,
        gate: Gate::default(),
        text: Arc::new(codec),
        engine,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", port.parse::<u16>()?)))?;
    println!("listening on http://{}, Enter stops", listener.local_addr()?);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_line(&mut String::new());
        drop(stop);
    });
    let served = runtime.spawn(serve(listener, config, async {
        // Dropping the sender is the sign.
        let _ = stopped.await;
    }));

    // The model, on this thread, until the server ends.
    engine::run(&model, EngineLimits::new(&model, tokens)?, inbox)?;
    Ok(runtime.block_on(served)??)
}
