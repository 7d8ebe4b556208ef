//! The file with the totals, `totals.json` in the state directory. Beside the registry, whose lock guards it.
//!
//! ```text
//!   { "format": "vmflow-totals", "version": 1, "clean": false, "boot": "..", "written": 1800000000,
//!     "gaps": [ {"from": .., "to": .., "reason": "killed"}, .. ],
//!     "ports": [ {"label": 1, "port": 0, "counted": {..}}, .. ] }
//! ```
//!
//! A file that is missing is refused where labels were given, and so is one that is damaged: replacing it in one
//! step leaves neither, so a person or a broken disk has been at work, and a restart that began at 0 would take
//! numbers back that somebody has seen. Only before the first label there is nothing to lose.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{counters::PortCounters, error::CheckpointError};
use crate::{
    label::Label,
    monitor::registry::{Registry, disk},
};

const FILE: &str = "totals.json";
/// Where totals that could not be read are put when they are to be forgotten.
const FORGOTTEN: &str = "totals.json.forgotten";
const FORMAT: &str = "vmflow-totals";
const VERSION: u64 = 1;
/// How many gaps are kept: the newest.
const GAPS_MAX: usize = 100;

/// Which port: its VM's label, and its number among the VM's ports.
pub type PortKey = (Label, usize);

/// What was counted under every label that was ever given, and when it was not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Saved {
    /// Whoever wrote it had stopped in good order: nothing was counted after it.
    pub clean: bool,
    /// The boot of the host in which it was written.
    pub boot: String,
    /// When it was written, in seconds since 1970 (UTC) by the clock of then.
    pub written: u64,
    /// When numbers were lost, oldest first.
    pub gaps: Vec<Gap>,
    /// Each port's counters.
    pub ports: BTreeMap<PortKey, PortCounters>,
}

/// A time of which nobody knows what was counted at its beginning: the last totals were written, frames may
/// have passed, and then it was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gap {
    /// When the last totals were written, in seconds since 1970 (UTC). They are written only when they change.
    pub from: u64,
    /// When the next vmflow went on from them, in seconds since 1970 (UTC); never before `from`.
    pub to: u64,
    /// Why.
    pub reason: GapReason,
}

/// Why there is a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum GapReason {
    /// vmflow died without a word, and the host went on.
    Killed,
    /// The host went down, and vmflow with it.
    Reboot,
    /// An operator had vmflow begin at 0, because the totals could not be read.
    Forgotten,
}

/// The file as it is.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    format: String,
    version: u64,
    clean: bool,
    boot: String,
    written: u64,
    gaps: Vec<Gap>,
    ports: Vec<Row>,
}

/// A port's line in the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    label: u32,
    port: usize,
    counted: PortCounters,
}

impl Saved {
    /// Nothing was ever counted.
    #[must_use]
    pub(super) const fn none() -> Self {
        Self { clean: true, boot: String::new(), written: 0, gaps: Vec::new(), ports: BTreeMap::new() }
    }

    /// Notes a gap; the oldest goes when there are too many.
    pub(super) fn note(&mut self, gap: Gap) {
        self.gaps.push(gap);
        let too_many = self.gaps.len().saturating_sub(GAPS_MAX);
        self.gaps.drain(..too_many);
    }
}

/// The file of a state directory.
#[must_use]
pub(super) fn path(registry: &Registry) -> PathBuf {
    registry.directory().join(FILE)
}

/// Reads the file that belongs to these labels.
///
/// # Errors
/// [`CheckpointError`]: there is none, or it is not as it must be.
pub(super) fn read(registry: &Registry) -> Result<Saved, CheckpointError> {
    let path = path(registry);
    match fs::read(&path) {
        Ok(bytes) => parse(&path, &bytes, registry),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match registry.entries().count() {
            0 => Ok(Saved::none()),
            labels => Err(CheckpointError::Missing { path, labels }),
        },
        Err(reason) => Err(CheckpointError::Unreadable { path, reason }),
    }
}

/// Replaces the file in one step. It may take long: the disk is waited for.
///
/// # Errors
/// [`CheckpointError::State`]: the old file is still there.
pub(super) fn write(path: &Path, saved: &Saved) -> Result<(), CheckpointError> {
    let bytes = serde_json::to_vec(&Page::of(saved)).map_err(|error| CheckpointError::Damaged {
        path: path.to_owned(),
        why: format!("cannot be put into words: {error}"),
    })?;
    Ok(disk::replace(path, &bytes)?)
}

/// Puts a file that could not be read out of the way.
///
/// # Errors
/// [`CheckpointError::Unreadable`]: it is still there.
pub(super) fn put_away(registry: &Registry) -> Result<(), CheckpointError> {
    let path = path(registry);
    match fs::rename(&path, registry.directory().join(FORGOTTEN)) {
        Err(reason) if reason.kind() != io::ErrorKind::NotFound => {
            Err(CheckpointError::Unreadable { path, reason })
        }
        _ => Ok(()),
    }
}

impl Page {
    fn of(saved: &Saved) -> Self {
        let Saved { clean, boot, written, gaps, ports } = saved.clone();
        let row =
            |((label, port), counted): (PortKey, PortCounters)| Row { label: label.get(), port, counted };
        let ports = ports.into_iter().map(row).collect();
        Self { format: FORMAT.to_owned(), version: VERSION, clean, boot, written, gaps, ports }
    }

    /// The totals, or what is wrong with the page.
    fn strict(self) -> Result<Saved, String> {
        let mut ports = BTreeMap::new();
        for Row { label, port, counted } in self.ports {
            let key = (Label::new(label).map_err(|error| error.to_string())?, port);
            if ports.insert(key, counted).is_some() {
                return Err(format!("port {port} of label {label} is there twice"));
            }
        }
        let Self { clean, boot, written, gaps, .. } = self;
        Ok(Saved { clean, boot, written, gaps, ports })
    }
}

fn parse(path: &Path, bytes: &[u8], registry: &Registry) -> Result<Saved, CheckpointError> {
    let damaged = |why: String| CheckpointError::Damaged { path: path.to_owned(), why };
    match disk::version(bytes, FORMAT) {
        Ok(VERSION) => {}
        Ok(found) => {
            return Err(CheckpointError::OtherVersion { path: path.to_owned(), found, known: VERSION });
        }
        Err(why) => return Err(damaged(why)),
    }
    let page: Page = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
    let saved = page.strict().map_err(damaged)?;
    let mut labels = saved.ports.keys().map(|(label, _)| *label);
    match labels.find(|label| registry.entry(*label).is_none()) {
        Some(label) => Err(CheckpointError::UnknownLabel { path: path.to_owned(), label }),
        None => Ok(saved),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_gaps_are_kept() {
        let mut saved = Saved::none();
        for n in 0..250 {
            saved.note(Gap { from: n, to: n, reason: GapReason::Killed });
        }
        assert_eq!((saved.gaps.len(), saved.gaps[0].from, saved.gaps[99].from), (GAPS_MAX, 150, 249));
    }

    #[test]
    fn what_was_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let mut registry = Registry::open(&directory.path().join("state")).unwrap();
        assert_eq!(read(&registry).unwrap(), Saved::none());
        let claim = crate::monitor::registry::Claim { name: "web1".into(), uuid: None, label: None };
        let range = Label::new(7).unwrap()..=Label::new(9).unwrap();
        let label = registry.allocate(&[claim], &range).unwrap()[0];
        let mut saved = Saved { clean: false, boot: "b".into(), written: 5, ..Saved::none() };
        saved.note(Gap { from: 1, to: 2, reason: GapReason::Reboot });
        let counters = PortCounters { connections: 3, ..PortCounters::default() };
        saved.ports = BTreeMap::from([((label, 0), counters.clone()), ((label, 1), counters)]);
        write(&path(&registry), &saved).unwrap();
        assert_eq!(read(&registry).unwrap(), saved);
    }
}
