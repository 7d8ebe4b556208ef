//! Why labels could not be read, kept or given.

use std::{io, ops::RangeInclusive, path::PathBuf};

use crate::label::Label;

/// What went wrong, and what to do about it, in one line.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The kernel refused something.
    #[error("{path}: cannot {what}: {reason}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        reason: io::Error,
    },
    /// Someone else could change the labels.
    #[error("{path}: {why}: give it to this user, and run chmod go-w on it", path = path.display())]
    Exposed {
        /// The state directory.
        path: PathBuf,
        /// How.
        why: &'static str,
    },
    /// Another vmflow has this state.
    #[error("{path}: in use by another vmflow{holder}: stop it, or choose another directory with --state", path = path.display())]
    InUse {
        /// The state directory.
        path: PathBuf,
        /// " (process 123)", if it is known.
        holder: String,
    },
    /// The file with the labels cannot be read.
    #[error("{path}: cannot be read: {reason}: run as its owner, or restore it from a backup", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        reason: io::Error,
    },
    /// The file with the labels cannot be understood.
    #[error("{path}: damaged: {why}: restore it from a backup; without one move its directory away, then every VM gets a new label", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file was written by a newer vmflow.
    #[error("{path}: has format version {found}, and this vmflow knows {known}: run the vmflow that wrote it", path = path.display())]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// Ours.
        known: u64,
    },
    /// There is state, but no labels that it belongs to.
    #[error("{path}: missing, but its directory holds {found:?}: restore it from a backup; without one move the directory away, then every VM gets a new label", path = path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// A file that is there.
        found: String,
    },
    /// Two claims by one VM.
    #[error("VM {name:?} is claimed twice: each VM needs a name or UUID of its own")]
    ClaimedTwice {
        /// The VM.
        name: String,
    },
    /// A pinned label that is or was another VM's.
    #[error("label {label} of VM {name:?} {} VM {owner:?}, and labels are never given twice: pin another label, or leave it out", if *.retired { "belonged to the removed" } else { "belongs to" })]
    LabelUsed {
        /// Who wants it.
        name: String,
        /// The label.
        label: Label,
        /// Whose it is or was.
        owner: String,
        /// It was.
        retired: bool,
    },
    /// A pinned label that is not the one that the VM has.
    #[error("VM {name:?} has label {has}, not {asked}: use label {has}, or remove the VM first")]
    HasAnother {
        /// The VM.
        name: String,
        /// Its label.
        has: Label,
        /// The pinned one.
        asked: Label,
    },
    /// A pinned label that is not this host's to give.
    #[error("label {label} of VM {name:?} is outside this host's range {}..={}: pin one of the range, or widen \"labels\" under [daemon]", .range.start(), .range.end())]
    OutsideRange {
        /// The VM.
        name: String,
        /// The label.
        label: Label,
        /// The host's range.
        range: RangeInclusive<Label>,
    },
    /// No label is left.
    #[error("all labels of this host's range {}..={} have been used, and labels are never given twice: widen \"labels\" under [daemon]", .0.start(), .0.end())]
    UsedUp(RangeInclusive<Label>),
    /// A label that no VM has now.
    #[error("no VM has label {0}: see vmflow vms for those that are")]
    NotHeld(Label),
}

impl RegistryError {
    /// True if what was asked for is wrong, not the host: the exit code is then that of a configuration.
    #[must_use]
    pub const fn is_configuration(&self) -> bool {
        matches!(
            self,
            Self::ClaimedTwice { .. }
                | Self::LabelUsed { .. }
                | Self::HasAnother { .. }
                | Self::OutsideRange { .. }
                | Self::UsedUp(_)
        )
    }
}
