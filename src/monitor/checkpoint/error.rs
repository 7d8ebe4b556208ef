//! Why totals could not be read or kept.

use std::{io, path::PathBuf};

use crate::{label::Label, monitor::registry::RegistryError};

/// What went wrong, and what to do about it, in one line.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// There are labels, but not what was counted under them.
    #[error("{path}: missing, but {labels} labels were given: numbers would begin at 0 again: restore it from a backup; without one start once with --forget-totals", path = path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// How many labels there are.
        labels: usize,
    },
    /// The file cannot be read.
    #[error("{path}: cannot be read: {reason}: run as its owner, or restore it from a backup", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        reason: io::Error,
    },
    /// The file cannot be understood.
    #[error("{path}: damaged: {why}: restore it from a backup; without one start once with --forget-totals, then every VM's numbers begin at 0", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// There are totals of a label that was never given: whoever got it next would get them too.
    #[error("{path}: has totals of label {label}, which registry.json beside it does not know: restore both from the same backup; without one start once with --forget-totals, then every VM's numbers begin at 0", path = path.display())]
    UnknownLabel {
        /// The file.
        path: PathBuf,
        /// The label.
        label: Label,
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
    /// The kernel refused something.
    #[error(transparent)]
    State(#[from] RegistryError),
}

impl CheckpointError {
    /// True if there is nothing that could be read, now or ever: only then may the totals be forgotten.
    pub(super) const fn is_loss(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Damaged { .. } | Self::UnknownLabel { .. })
    }
}
