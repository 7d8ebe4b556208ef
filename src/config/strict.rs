//! From what was written to what is meant: the main file and the arguments. A fault is noted and the judging
//! goes on, so that one run tells all that is wrong.

use std::{
    ffi::OsStr,
    fs, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use super::{
    Config, DEFAULT_CONTROL, DEFAULT_STATE, Daemon, Faults, Origins, SuspectAction,
    error::ConfigError,
    ids::GROUPS,
    judge::{Judge, at},
    loose::{LooseDaemon, LooseMain, LooseRules, LooseSuspect},
    source::Spot,
    values,
    vms::Vms,
};
use crate::label::Label;

/// The directory beside the main file whose files hold VMs.
const VMS_DIR: &str = "vms.d";
const STATS_SOCKET: &str = "stats.sock";
/// The labels of a host that shares its numbers with no other: 24 bits, as many as a VXLAN has.
const DEFAULT_LABELS: &str = "1..=16777215";
/// The source of what nobody wrote: it has no values, so no place is ever asked of it.
const NO_SOURCE: usize = usize::MAX;

/// Reads and judges all origins.
pub(super) fn load(origins: &Origins) -> Result<Config, Faults> {
    let mut judge = Judge::default();
    let main = origins.file.as_deref().and_then(|file| judge.sources.read_toml::<LooseMain>(file));
    let (number, main) = main.unwrap_or_else(|| (NO_SOURCE, LooseMain::default()));
    refuse_rules(&mut judge, number, &main.rules);
    let mut loose = main.daemon;
    let labels = labels(&mut judge, number, &mut loose);
    let daemon = daemon(&mut judge, number, loose, labels.clone(), origins);
    let suspect = suspect(&mut judge, number, main.suspect);

    let mut vms = Vms::new(&mut judge, labels);
    vms.judge_all(number, main.vm);
    if let Some(main) = &origins.file {
        vms.judge_files(&main.with_file_name(VMS_DIR));
    }
    vms.judge_arguments("--vm", &origins.vms);
    if let Some(daemon) = &daemon {
        vms.judge_added(&added_dir(&daemon.state));
    }
    let vms = vms.finish();

    let faults = judge.sources.into_faults();
    match daemon {
        Some(daemon) if faults.is_empty() => {
            Ok(Config { daemon, suspect: origins.suspect.or(suspect).unwrap_or_default(), vms })
        }
        _ => Err(Faults(faults)),
    }
}

fn refuse_rules(judge: &mut Judge, number: usize, rules: &LooseRules) {
    for file in &rules.files.0 {
        let advice = "leave \"files\" empty or out";
        let error = ConfigError::NotInRelease { what: "rules are".to_owned(), advice };
        judge.sources.fault(Spot::of(number, file), error);
    }
}

/// The labels that this host may give; none while the range is at fault.
fn labels(judge: &mut Judge, number: usize, daemon: &mut LooseDaemon) -> Option<RangeInclusive<Label>> {
    let written = at(number, daemon.labels.take());
    let labels = written.unwrap_or_else(|| judge.unwritten("labels", DEFAULT_LABELS));
    judge.value(Some(labels), |text| label_range(text))
}

fn daemon(
    judge: &mut Judge,
    number: usize,
    loose: LooseDaemon,
    labels: Option<RangeInclusive<Label>>,
    origins: &Origins,
) -> Option<Daemon> {
    let control = judge.argument("--control", origins.control.as_ref()).or(at(number, loose.control));
    let control = control.unwrap_or_else(|| judge.unwritten("control", DEFAULT_CONTROL));
    let control = judge.socket("control", Some(control));
    let readers = at(number, loose.stats).or_else(|| {
        let beside = control.as_ref()?.with_file_name(STATS_SOCKET);
        Some(judge.unwritten("stats", &beside.to_string_lossy()))
    });
    let readers = judge.socket("stats", readers);
    let stats_group = judge.value(at(number, loose.stats_group), |group| GROUPS.number_of(group));
    let state = judge.argument("--state", origins.state.as_ref()).or(at(number, loose.state));
    let state = state.unwrap_or_else(|| judge.unwritten("state", DEFAULT_STATE));
    let state = judge.value(Some(state), |text| values::absolute("state", text));
    let node = at(number, loose.node).unwrap_or_else(|| {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        judge.unwritten("node", &host)
    });
    let node = judge.value(Some(node), |text| values::node_name(text));
    Some(Daemon {
        control: control?,
        stats: readers?,
        stats_group,
        state: state?,
        labels: labels?,
        node: node?,
    })
}

pub(super) fn suspect(judge: &mut Judge, source: usize, loose: LooseSuspect) -> Option<SuspectAction> {
    judge.value(at(source, loose.action), |text| suspect_action(text))
}

/// The suspect action by its word.
///
/// # Errors
/// [`ConfigError`] for other words; those of later releases are known and refused.
pub fn suspect_action(text: &str) -> Result<SuspectAction, ConfigError> {
    match text {
        "count" => Ok(SuspectAction::Count),
        "drop" => Ok(SuspectAction::Drop),
        "limit" | "mirror" | "divert" => Err(ConfigError::NotInRelease {
            what: format!("the suspect action {text:?} is"),
            advice: "write \"count\" or \"drop\"",
        }),
        _ => Err(ConfigError::BadValue {
            what: "suspect action",
            value: text.to_owned(),
            why: "is not \"count\" or \"drop\"",
        }),
    }
}

/// A range as Rust writes it: both ends belong to it.
fn label_range(text: &str) -> Result<RangeInclusive<Label>, ConfigError> {
    let ends = text.split_once("..=").map(|(first, last)| (first.trim().parse(), last.trim().parse()));
    match ends {
        Some((Ok(first), Ok(last))) if first <= last => Ok(first..=last),
        _ => Err(ConfigError::BadValue {
            what: "label range",
            value: text.to_owned(),
            why: "is not FIRST..=LAST with labels from 1 to 2147483647, as \"1..=16777215\"",
        }),
    }
}

/// Where VMs that were added while running are kept: files as in `vms.d`, below the state directory.
pub(super) fn added_dir(state: &Path) -> PathBuf {
    state.join(VMS_DIR)
}

/// The files with VMs in a directory, in the order of their names; none if it is not there.
pub(super) fn vm_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
    files.retain(|file| is_vm_file(file));
    files.sort();
    Ok(files)
}

/// Editors and package managers leave other names, and hidden ones, beside the files.
fn is_vm_file(file: &Path) -> bool {
    let hidden = file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && file.extension() == Some(OsStr::new("toml"))
}
