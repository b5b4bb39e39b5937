//! `gptq`: the command line. Parses, sets up logging, hands over to one command.

// First: its macros are used by the others.
#[macro_use]
mod output;

mod allocator;
mod args;
mod commands;
mod progress;
mod stop;
mod transfers;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{BenchVerb, Cli, DemoArgs, Verb};

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    let cli = Cli::parse();
    match &cli.verb {
        // A server's log has a line for every request.
        Some(Verb::Serve(args)) => start_logging(cli.verbose.max(1), args.json_output),
        _ => start_logging(cli.verbose, false),
    }
    match run(cli.verb) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Each part of it is short; together they may not be.
            note!("error: {}", gptq_input::short_to(&output::chain(&error).replace('\n', " "), 2000));
            error
                .downcast_ref::<stop::Stopped>()
                .map_or(ExitCode::FAILURE, |stopped| stopped.exit_status().into())
        }
    }
}

fn run(verb: Option<Verb>) -> anyhow::Result<ExitCode> {
    match verb {
        None => commands::demo::run(&DemoArgs { out: None, force: true })?,
        Some(Verb::Demo(args)) => commands::demo::run(&args)?,
        Some(Verb::Quantize(args)) => commands::quantize::run(&args)?,
        Some(Verb::Branches(args)) => commands::branches::run(&args)?,
        Some(Verb::Table(args)) => commands::table::run(&args)?,
        Some(Verb::Eval(args)) => commands::eval::run(&args)?,
        Some(Verb::Generate(args)) => commands::generate::run(&args)?,
        Some(Verb::Chat(args)) => commands::chat::run(&args)?,
        Some(Verb::Serve(args)) => commands::serve::run(&args)?,
        Some(Verb::Inspect(args)) => return commands::inspect::run(&args),
        Some(Verb::Synth(args)) => commands::synth::run(&args)?,
        Some(Verb::Download(args)) => commands::download::run(&args)?,
        Some(Verb::Push(args)) => commands::push::run(&args)?,
        Some(Verb::Card(args)) => commands::card::run(&args)?,
        Some(Verb::Report(args)) => commands::report::run(&args)?,
        Some(Verb::Bench(args)) => match args.what {
            BenchVerb::Cpu(args) => commands::bench::cpu::run(&args)?,
            BenchVerb::Quantize(args) => commands::bench::quantize::run(&args)?,
            BenchVerb::Quality(args) => commands::bench::quality::run(&args)?,
            BenchVerb::Reference(args) => commands::bench::reference::run(&args)?,
            BenchVerb::Agreement(args) => commands::bench::agreement::run(&args)?,
            BenchVerb::Decode(args) => commands::bench::decode::run(&args)?,
            BenchVerb::Prefill(args) => commands::bench::prefill::run(&args)?,
            BenchVerb::Matmul(args) => commands::bench::matmul::run(&args)?,
            BenchVerb::Load(args) => commands::bench::load::run(&args)?,
            BenchVerb::Serve(args) => commands::bench::serve::run(&args)?,
        },
        Some(Verb::Completions(args)) => commands::completions::run(&args)?,
        Some(Verb::Man(args)) => commands::man::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Warnings always; `RUST_LOG` overrides what `-v` says.
fn start_logging(verbose: u8, json: bool) {
    let level = ["gptq=warn", "gptq=info", "gptq=debug"][usize::from(verbose.min(2))];
    let crates = ["calibration", "kernels", "quantizer", "runtime"];
    let directives = crates.map(|name| level.replace("gptq", &format!("gptq_{name}"))).join(",");
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},{directives}")));
    let lines =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // A log that cannot be written would be told to stderr, which panics.
    let lines = lines.with_ansi(std::io::stderr().is_terminal()).log_internal_errors(false);
    if json {
        lines.json().init();
    } else {
        lines.without_time().init();
    }
}

/// A reader that closed its end, like `head`, is no failure of ours.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    // Not the source of a library's error: that is of a file or a connection, and a failure.
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
