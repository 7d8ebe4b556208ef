//! The command line: what was typed becomes a [`Command`], and an error becomes lines and an exit code.
//!
//! Every error is one line: `vmflow: where: what: what to do`. Exit code 2 means that the command or the
//! configuration is wrong, 1 that something else went wrong.

mod check;
mod generate;
mod state;

use std::{
    ffi::OsString,
    io::{self, IsTerminal},
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, CommandFactory, Parser, Subcommand, ValueHint, error::ErrorKind};
use uuid::Uuid;

use crate::{
    client::{
        self, Action, ClientError,
        doctor::{self, Doctor},
        libvirt::{self, Event, HookError},
    },
    config::{self, Config, DEFAULT_CONTROL, DEFAULT_FILE, Described, Faults, Origins},
    keeper::{self, brief::Brief},
    log::{self, Directive, Format},
    monitor::{self, api::Which, change::ChangeError, state::StateError},
};
use state::LowState;
pub use state::{Place, StateCommand};

/// Longest reason for a tag, in bytes: it is shown in tables and kept for ever.
const REASON_MAX: usize = 200;

/// What is to be done, with everything that was typed already judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Be the monitor.
    Serve {
        /// Where its configuration comes from.
        origins: Origins,
        /// Where what was counted is lost, numbers begin at 0.
        forget_totals: bool,
        /// In what form it logs.
        log_format: Option<Format>,
    },
    /// Judge a configuration and change nothing.
    Check(Origins),
    /// Ask the running monitor.
    Ask {
        /// Its socket.
        control: PathBuf,
        /// For what.
        action: Action,
    },
    /// Take labels and totals elsewhere.
    State {
        /// Where they are.
        place: Place,
        /// What to do with them.
        command: StateCommand,
    },
    /// Be a port's keeper: the monitor starts these.
    Keeper(Box<Brief>),
    /// Write man pages and completions below this directory.
    Generate(PathBuf),
    /// Say what is wrong with this host.
    Doctor(Doctor),
    /// Be libvirt's hook.
    Libvirt {
        /// The monitor's socket.
        control: PathBuf,
        /// What libvirt says; the domain's XML comes on standard input.
        event: Event,
    },
}

/// Why the command did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command line means nothing.
    #[error("{0}")]
    Usage(String),
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] Faults),
    /// The output could not be written.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
    /// The monitor did not do as asked.
    #[error(transparent)]
    Ask(#[from] ClientError),
    /// Labels and totals could not be taken elsewhere.
    #[error(transparent)]
    State(#[from] StateError),
    /// A file is not a document of labels and totals.
    #[error("{path}: {why}", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: StateError,
    },
    /// A file could not be read or written.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        reason: io::Error,
    },
    /// There is nothing to read.
    #[error("standard input: {0}")]
    Input(io::Error),
    /// A domain is not to start, or has not been removed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A generated file could not be written.
    #[error("{0}")]
    Generate(io::Error),
    /// The monitor, or a keeper, cannot run.
    #[error("{0:#}")]
    Run(#[from] anyhow::Error),
    /// A keeper failed, and its log says why; or the doctor has said what it has found.
    #[error("see the log")]
    Said,
}

impl CliError {
    const USAGE: u8 = 2;
    const OTHER: u8 = 1;

    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let is_configuration = |error: &anyhow::Error| {
            error.downcast_ref::<ChangeError>().is_some_and(ChangeError::is_configuration)
        };
        match self {
            Self::Usage(_) | Self::Config(_) | Self::Ask(ClientError::Invalid(_)) => Self::USAGE,
            Self::Run(error) if is_configuration(error) => Self::USAGE,
            Self::Output(_)
            | Self::Ask(_)
            | Self::State(_)
            | Self::Foreign { .. }
            | Self::File { .. }
            | Self::Run(_)
            | Self::Said
            | Self::Generate(_)
            | Self::Input(_)
            | Self::Hook(_) => Self::OTHER,
        }
    }

    /// The error as it is printed: each fault on a line of its own.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        match self {
            Self::Said | Self::Ask(ClientError::Unwell) => Vec::new(),
            Self::Config(faults) => faults.iter().map(|fault| format!("vmflow: {fault}")).collect(),
            // The monitor, too, may tell several faults of a configuration.
            _ => self.to_string().lines().map(|line| format!("vmflow: {line}")).collect(),
        }
    }
}

/// Labels, counts and filters every frame of every VM at its virtqueue.
#[derive(Debug, Parser)]
#[command(name = "vmflow", version, propagate_version = true)]
struct LowArgs {
    #[command(subcommand)]
    command: LowCommand,
    /// The monitor's socket; serve and check take it from the configuration otherwise
    /// [default: /run/vmflow/control.sock]
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    control: Option<String>,
}

#[derive(Debug, Subcommand)]
enum LowCommand {
    /// Serve the VMs of this host
    Serve(LowServe),
    /// Explain what is wrong with the configuration; changes nothing
    Check {
        /// The main file; vms.d beside it is read as well
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, default_value = DEFAULT_FILE)]
        config: PathBuf,
    },
    /// List the VMs, their labels and ports
    Vms {
        /// Print the document as it is
        #[arg(long)]
        json: bool,
    },
    /// Show what every VM sent and received
    Stats {
        /// This VM only
        vm: Option<String>,
        /// Print the document as it is
        #[arg(long, conflicts_with = "watch")]
        json: bool,
        /// Show rates, again and again
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1")]
        watch: Option<NonZeroU32>,
    },
    /// Put every frame of a VM under its suspect label
    Suspect {
        /// The VM's name
        vm: String,
        /// Why, for those who come later
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// Take a VM's suspect tag off
    Clear {
        /// The VM's name
        vm: String,
    },
    /// Add a VM to those that are served; kept over restarts
    Add {
        /// The VM: name=NAME,socket=PATH,tap=IFNAME and, if wanted, label, uuid, mac, mtu, mode, netns, peer,
        /// queue_pairs, coalesce and poll_us; each further one is another port of it
        #[arg(value_name = "KEY=VALUE,...", required_unless_present = "file")]
        vm: Vec<String>,
        /// The VM as in a file in vms.d
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "vm")]
        file: Option<PathBuf>,
    },
    /// Remove a VM that was added, and retire its label
    Remove {
        /// The VM's name
        #[arg(required_unless_present = "uuid")]
        vm: Option<String>,
        /// The VM with this UUID
        #[arg(long, conflicts_with = "vm")]
        uuid: Option<Uuid>,
    },
    /// Read the configuration files again, and serve what they say now
    Reload,
    /// Take labels and totals from one vmflow to another
    #[command(subcommand)]
    State(LowState),
    /// Say whether all is well; exit code 1 if it is not
    Health {
        /// Print the document as it is
        #[arg(long)]
        json: bool,
    },
    /// Print the versions of this program and of the running one
    Version {
        /// Print the running one's document as it is
        #[arg(long)]
        json: bool,
    },
    /// Show how much is logged, or change it while vmflow runs
    LogLevel {
        /// off, error, warn, info, debug or trace; or those of modules, as in vmflow=info,vhost=debug
        level: Option<Directive>,
    },
    /// Say what is wrong with this host, a line for each thing that was looked at; changes nothing
    Doctor {
        /// The main file; vms.d beside it is read as well [default: /etc/vmflow/vmflow.toml]
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        config: Option<PathBuf>,
        /// Print one document
        #[arg(long)]
        json: bool,
    },
    /// Hold one front end's connection
    #[command(hide = true)]
    Keeper {
        /// The port, as the monitor describes it
        brief: String,
    },
    /// Be libvirt's hook for domains; the domain's XML comes on standard input
    #[command(hide = true)]
    LibvirtHook {
        /// The domain's name
        domain: String,
        /// What happens to it
        operation: String,
        /// begin or end
        phase: String,
        /// What libvirt may say besides
        more: Vec<String>,
    },
    /// Write man pages and shell completions, for packages
    #[command(hide = true)]
    Generate {
        /// The directory that stands for /usr/share
        #[arg(value_name = "DIR")]
        share: PathBuf,
    },
}

#[derive(Debug, Args)]
struct LowServe {
    /// The main file; vms.d beside it is read as well [default: /etc/vmflow/vmflow.toml without --vm]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: Option<PathBuf>,
    /// A VM: name=NAME,socket=PATH,tap=IFNAME and, if wanted, label, uuid, mac, mtu, mode, netns, peer,
    /// queue_pairs, coalesce and poll_us; the same name again is another port
    #[arg(long = "vm", value_name = "KEY=VALUE,...")]
    vms: Vec<String>,
    /// The directory for what outlives the process
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    state: Option<String>,
    /// What becomes of frames under a suspect label
    #[arg(long, value_name = "count|drop")]
    suspect_action: Option<String>,
    /// Begin every VM's numbers at 0 if the file with the totals is missing or damaged; an intact one is kept
    #[arg(long)]
    forget_totals: bool,
    /// Log lines for people, or objects; without it text, or under systemd the journal's own form
    #[arg(long, value_name = "text|json")]
    log_format: Option<Format>,
}

/// Why there is no command to run.
#[derive(Debug)]
pub enum Stop {
    /// Help or a version was asked for.
    Shown(clap::Error),
    /// What was typed means nothing.
    Refused(CliError),
}

/// Turns what was typed into a command.
///
/// # Errors
/// [`Stop`]: nothing is to be done.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, Stop> {
    let low = LowArgs::try_parse_from(args).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Stop::Shown(error),
        _ => Stop::Refused(CliError::Usage(on_one_line(&error))),
    })?;
    low.strict().map_err(Stop::Refused)
}

/// What clap says above its usage, on one line.
fn on_one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let said =
        text.split("\n\n").take_while(|part| !part.starts_with("Usage:") && !part.starts_with("For more"));
    let parts: Vec<_> = said.map(|part| part.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let line = parts.join("; ");
    format!("{}: see vmflow --help", line.strip_prefix("error: ").unwrap_or(&line))
}

impl LowArgs {
    fn strict(self) -> Result<Command, CliError> {
        let written = self.control;
        let control = PathBuf::from(written.as_deref().unwrap_or(DEFAULT_CONTROL));
        Ok(match self.command {
            LowCommand::Serve(serve) => {
                let (forget_totals, log_format) = (serve.forget_totals, serve.log_format);
                Command::Serve { origins: serve.strict(written)?, forget_totals, log_format }
            }
            LowCommand::Check { config } => {
                Command::Check(Origins { file: Some(config), control: written, ..Origins::default() })
            }
            LowCommand::Vms { json } => Command::Ask { control, action: Action::Vms { json } },
            LowCommand::Stats { vm, json, watch } => {
                let vm = vm.map(|name| vm_name(&name)).transpose()?;
                let watch = watch.map(|seconds| Duration::from_secs(seconds.get().into()));
                Command::Ask { control, action: Action::Stats { vm, json, watch } }
            }
            LowCommand::Suspect { vm, reason } => {
                let action = Action::Suspect { vm: vm_name(&vm)?, reason: tag_reason(&reason)? };
                Command::Ask { control, action }
            }
            LowCommand::Clear { vm } => Command::Ask { control, action: Action::Clear { vm: vm_name(&vm)? } },
            LowCommand::Add { vm, file } => {
                let described = file.map_or(Described::Arguments(vm), Described::File);
                Command::Ask { control, action: Action::Add(Box::new(described.judge()?)) }
            }
            LowCommand::Remove { vm, uuid } => {
                let name = |vm: Option<String>| vm_name(&vm.unwrap_or_default()).map(Which::Name);
                let which = uuid.map_or_else(|| name(vm), |uuid| Ok(Which::Uuid(uuid)))?;
                Command::Ask { control, action: Action::Remove(which) }
            }
            LowCommand::Doctor { config, json } => {
                Command::Doctor(Doctor { file: config, control: written, json })
            }
            LowCommand::Reload => Command::Ask { control, action: Action::Reload },
            LowCommand::Health { json } => Command::Ask { control, action: Action::Health { json } },
            LowCommand::Version { json } => Command::Ask { control, action: Action::Version { json } },
            LowCommand::LogLevel { level } => Command::Ask { control, action: Action::LogLevel { level } },
            LowCommand::State(state) => {
                let (place, command) = state.strict(control)?;
                Command::State { place, command }
            }
            LowCommand::Keeper { brief } => {
                let brief = serde_json::from_str(&brief);
                Command::Keeper(Box::new(brief.map_err(|error| CliError::Usage(error.to_string()))?))
            }
            LowCommand::LibvirtHook { domain, operation, phase, more: _ } => {
                Command::Libvirt { control, event: Event { domain, operation, phase } }
            }
            LowCommand::Generate { share } => Command::Generate(share),
        })
    }
}

impl LowServe {
    fn strict(self, control: Option<String>) -> Result<Origins, CliError> {
        let suspect = self.suspect_action.map(|text| config::suspect_action(&text)).transpose();
        let suspect = suspect.map_err(|error| CliError::Usage(format!("--suspect-action: {error}")))?;
        // Whoever names VMs here wants these and no others, unless a file is named too.
        let file = self.config.or_else(|| self.vms.is_empty().then(|| DEFAULT_FILE.into()));
        Ok(Origins { file, vms: self.vms, control, state: self.state, suspect })
    }
}

fn vm_name(text: &str) -> Result<String, CliError> {
    config::vm_name(text).map_err(|error| CliError::Usage(error.to_string()))
}

fn tag_reason(text: &str) -> Result<String, CliError> {
    let text = text.trim();
    if text.is_empty() || text.len() > REASON_MAX || text.chars().any(char::is_control) {
        let rule = format!("--reason: write one line of 1 to {REASON_MAX} bytes");
        return Err(CliError::Usage(rule));
    }
    Ok(text.to_owned())
}

/// Does what the command says.
///
/// # Errors
/// [`CliError`]: what to print, and the exit code.
pub fn run(command: Command) -> Result<(), CliError> {
    let log_format = match command {
        Command::Serve { log_format, .. } => log_format,
        _ => None,
    };
    log::init(log_format).map_err(|error| CliError::Usage(error.to_string()))?;
    match command {
        Command::Check(origins) => check::tell(&Config::load(&origins)?, &mut io::stdout().lock()),
        Command::Serve { origins, forget_totals, .. } => {
            let config = Config::load(&origins)?;
            Ok(monitor::run(origins, &config, forget_totals)?)
        }
        Command::Ask { control, action } => ask(&control, &action),
        Command::State { place, command } => state::run(&place, command),
        Command::Keeper(brief) => keeper::run(*brief).then_some(()).ok_or(CliError::Said),
        Command::Doctor(doctor) => {
            let is_well = runtime()?.block_on(doctor::run(&doctor, &mut io::stdout().lock()))?;
            is_well.then_some(()).ok_or(CliError::Said)
        }
        Command::Libvirt { control, event } => hook(&control, &event),
        Command::Generate(share) => {
            generate::write_all(&LowArgs::command(), &share).map_err(CliError::Generate)
        }
    }
}

/// A failure is only told where it must not stand in a domain's way.
fn hook(control: &Path, event: &Event) -> Result<(), CliError> {
    let xml = io::read_to_string(io::stdin()).map_err(CliError::Input)?;
    let done = runtime()?.block_on(libvirt::obey(control, event, &xml)).map_err(CliError::Hook);
    match done {
        Err(error) if !event.can_be_refused() => {
            error.lines().iter().for_each(|line| eprintln!("{line}"));
            Ok(())
        }
        done => done,
    }
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn ask(control: &Path, action: &Action) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    let is_terminal = out.is_terminal();
    Ok(runtime()?.block_on(client::run(control, action, &mut out, is_terminal))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SuspectAction;

    fn typed(line: &str) -> Result<Command, String> {
        let args = std::iter::once("vmflow").chain(line.split_whitespace()).map(OsString::from);
        parse(args).map_err(|stop| match stop {
            Stop::Shown(error) => format!("shown, exit code {}", error.exit_code()),
            Stop::Refused(error) => format!("{} (exit code {})", error.lines().join("|"), error.exit_code()),
        })
    }

    #[test]
    fn every_subcommand_takes_a_control_socket_before_and_after_its_name() {
        let control = PathBuf::from("/x");
        let ask = |control: &PathBuf, action| Ok(Command::Ask { control: control.clone(), action });
        let vms = Action::Vms { json: false };
        assert_eq!(typed("vms --control /x"), ask(&control, vms.clone()));
        assert_eq!(typed("--control /x vms"), ask(&control, vms.clone()));
        assert_eq!(typed("clear a --control /x"), ask(&control, Action::Clear { vm: "a".into() }));
        assert_eq!(typed("vms"), ask(&DEFAULT_CONTROL.into(), vms));
    }

    #[test]
    fn the_default_file_is_read_unless_vms_are_named() {
        let file = |line| match typed(line) {
            Ok(Command::Serve { origins, .. }) => origins.file,
            other => panic!("{other:?}"),
        };
        assert_eq!(file("serve"), Some(DEFAULT_FILE.into()));
        assert_eq!(file("serve --vm name=a"), None);
        assert_eq!(file("serve --vm name=a --config /c"), Some("/c".into()));
    }

    #[test]
    fn what_serve_is_told_is_kept_for_the_configuration() {
        let origins = Origins {
            file: None,
            vms: vec!["name=a,tap=b".into(), "name=c".into()],
            control: Some("/c".into()),
            state: Some("/s".into()),
            suspect: Some(SuspectAction::Drop),
        };
        let line = "serve --vm name=a,tap=b --vm name=c --control /c --state /s --suspect-action drop";
        assert_eq!(typed(line), Ok(Command::Serve { origins, forget_totals: false, log_format: None }));
        assert_eq!(
            typed("serve --suspect-action mirror").unwrap_err(),
            "vmflow: --suspect-action: the suspect action \"mirror\" is not in this release: \
             write \"count\" or \"drop\" (exit code 2)"
        );
    }

    #[test]
    fn watch_has_an_interval_of_its_own() {
        let watch = |line| match typed(line) {
            Ok(Command::Ask { action: Action::Stats { vm, watch, .. }, .. }) => {
                (vm, watch.map(|interval| interval.as_secs()))
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(watch("stats"), (None, None));
        assert_eq!(watch("stats --watch"), (None, Some(1)));
        assert_eq!(watch("stats web1 --watch"), (Some("web1".into()), Some(1)));
        assert_eq!(watch("stats web1 --watch 5"), (Some("web1".into()), Some(5)));
        assert!(typed("stats --watch 0").is_err() && typed("stats --json --watch").is_err());
    }

    #[test]
    fn a_wrong_command_line_is_one_line_and_exit_code_2() {
        assert_eq!(
            typed("serve --confg x").unwrap_err(),
            "vmflow: unexpected argument '--confg' found; tip: a similar argument exists: '--config': \
             see vmflow --help (exit code 2)"
        );
        assert_eq!(
            typed("suspect web1").unwrap_err(),
            "vmflow: the following required arguments were not provided: --reason <TEXT>: \
             see vmflow --help (exit code 2)"
        );
        assert_eq!(
            typed("clear ../x").unwrap_err(),
            "vmflow: VM name \"../x\" begins with a dot or a dash: choose another name (exit code 2)"
        );
        assert_eq!(typed("--help").unwrap_err(), "shown, exit code 0");
        assert_eq!(typed("").unwrap_err(), "shown, exit code 2");
    }

    #[test]
    fn vms_are_added_by_arguments_or_a_file_and_removed_by_name_or_uuid() {
        let added = |line| match typed(line) {
            Ok(Command::Ask { action: Action::Add(vm), .. }) => vm.ports.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(added("add name=a,socket=/s/1,tap=t1"), 1);
        assert_eq!(added("add name=a,socket=/s/1,tap=t1 name=a,socket=/s/2,tap=t2 --control /c"), 2);
        assert_eq!(
            typed("add name=a,socket=/s/1").unwrap_err(),
            "vmflow: argument number 1, column 1: this port has no \"tap\": add tap = \"vmf-web1\" (exit code 2)"
        );
        assert!(typed("add --file /none").unwrap_err().starts_with("vmflow: /none: cannot be read: "));
        assert!(typed("add").is_err() && typed("add name=a --file x").is_err());

        let uuid: Uuid = "1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3".parse().unwrap();
        let remove =
            |which| Ok(Command::Ask { control: DEFAULT_CONTROL.into(), action: Action::Remove(which) });
        assert_eq!(typed("remove a"), remove(Which::Name("a".into())));
        assert_eq!(typed(&format!("remove --uuid {uuid}")), remove(Which::Uuid(uuid)));
        assert!(typed("remove").is_err() && typed("remove --uuid 1").is_err());
        assert!(typed(&format!("remove a --uuid {uuid}")).is_err() && typed("remove ../x").is_err());
        assert!(matches!(typed("reload"), Ok(Command::Ask { action: Action::Reload, .. })));
    }

    #[test]
    fn a_reason_is_one_line_that_says_something() {
        assert_eq!(tag_reason(" port scan ").unwrap(), "port scan");
        for wrong in ["", "  ", "a\nb", &"x".repeat(REASON_MAX + 1)] {
            assert!(tag_reason(wrong).is_err(), "{wrong:?}");
        }
    }
}
