//! The `vmflow` command.

use std::{env, process::ExitCode};

use vmflow::cli::{self, CliError, Stop};

fn main() -> ExitCode {
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
