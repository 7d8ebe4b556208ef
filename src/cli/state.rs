//! `vmflow state`: labels and totals, taken from one vmflow and given to another, in a file.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};

use super::{CliError, check::count, vm_name};
use crate::{
    client::Client,
    monitor::state::{State, export_directory, import_directory},
};

/// The file name that means standard input or output.
const STANDARD: &str = "-";
/// Who may read an exported file: it holds names, and why VMs are tagged.
const FILE_MODE: u32 = 0o600;

/// Where labels and totals are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the vmflow with this control socket.
    Running(PathBuf),
    /// In the state directory of one that does not run.
    Directory(PathBuf),
}

/// What is to be done with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateCommand {
    /// Write them to a file, or without one to standard output.
    Export {
        /// These VMs only, unless there are none.
        vms: Vec<String>,
        /// The file.
        file: Option<PathBuf>,
    },
    /// Read them from a file, or without one from standard input.
    Import {
        /// The file.
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum LowState {
    /// Write labels and totals to a file: of a running vmflow, or with --state of a stopped one
    Export {
        /// This VM only; may be given again
        #[arg(long = "vm", value_name = "NAME")]
        vms: Vec<String>,
        #[command(flatten)]
        place: LowPlace,
        /// The file
        #[arg(default_value = STANDARD)]
        file: PathBuf,
    },
    /// Take over labels and totals from a file, for VMs that are not served; nothing here is lowered or replaced
    Import {
        #[command(flatten)]
        place: LowPlace,
        /// The file, or - for standard input
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct LowPlace {
    /// The state directory of a vmflow that does not run
    #[arg(long, value_name = "DIR", conflicts_with = "control")]
    state: Option<PathBuf>,
}

impl LowState {
    pub(super) fn strict(self, control: PathBuf) -> Result<(Place, StateCommand), CliError> {
        let named = |file: PathBuf| (file != Path::new(STANDARD)).then_some(file);
        let (place, command) = match self {
            Self::Export { vms, place, file } => {
                let vms = vms.iter().map(|name| vm_name(name)).collect::<Result<_, _>>()?;
                (place, StateCommand::Export { vms, file: named(file) })
            }
            Self::Import { place, file } => (place, StateCommand::Import { file: named(file) }),
        };
        Ok((place.state.map_or(Place::Running(control), Place::Directory), command))
    }
}

pub(super) fn run(place: &Place, command: StateCommand) -> Result<(), CliError> {
    match command {
        StateCommand::Export { vms, file } => export(place, &vms, file.as_deref()),
        StateCommand::Import { file } => import(place, file.as_deref()),
    }
}

fn export(place: &Place, vms: &[String], file: Option<&Path>) -> Result<(), CliError> {
    let mut state = match place {
        Place::Directory(directory) => export_directory(directory)?,
        Place::Running(control) => runtime()?.block_on(Client::new(control).state())?,
    };
    if !vms.is_empty() {
        state.keep_only(vms)?;
    }
    let mut text = serde_json::to_string_pretty(&state).map_err(io::Error::from)?;
    text.push('\n');
    match file {
        None => Ok(io::stdout().lock().write_all(text.as_bytes())?),
        Some(path) => write(path, &text).map_err(|reason| CliError::File { path: path.to_owned(), reason }),
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn import(place: &Place, file: Option<&Path>) -> Result<(), CliError> {
    let name = file.unwrap_or(Path::new("standard input"));
    let bytes = file
        .map_or_else(standard_input, fs::read)
        .map_err(|reason| CliError::File { path: name.to_owned(), reason })?;
    let state = State::parse(&bytes).map_err(|why| CliError::Foreign { path: name.to_owned(), why })?;
    let imported = match place {
        Place::Directory(directory) => import_directory(directory, state)?,
        Place::Running(control) => runtime()?.block_on(Client::new(control).import(&state))?,
    };
    let (labels, ports) = (count(imported.vms, "label"), count(imported.ports, "port"));
    Ok(writeln!(io::stdout().lock(), "imported: {labels}, {ports}")?)
}

fn standard_input() -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
