//! The `vmflow` command.

use std::{env, io::IsTerminal, process::ExitCode};

use tracing_subscriber::EnvFilter;
use vmflow::cli::{self, CliError, Stop};

fn main() -> ExitCode {
    log_to_stderr();
    match cli::parse(env::args_os()) {
        Ok(command) => cli::run(command).map_or_else(|error| refuse(&error), |()| ExitCode::SUCCESS),
        Err(Stop::Refused(error)) => refuse(&error),
        Err(Stop::Shown(help)) => help.exit(),
    }
}

fn refuse(error: &CliError) -> ExitCode {
    for line in error.lines() {
        eprintln!("{line}");
    }
    error.exit_code().into()
}

/// `VMFLOW_LOG` says how much: `vmflow=info` unless it is set. Only our own modules: what the libraries log, a
/// guest could cause without limit.
fn log_to_stderr() {
    let wanted = env::var("VMFLOW_LOG").unwrap_or_else(|_| "vmflow=info".into());
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(EnvFilter::new(wanted))
        .init();
}
