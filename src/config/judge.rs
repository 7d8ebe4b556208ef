//! The judge's notebook: values with their places, faults, and who claimed what first.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    path::PathBuf,
};

use toml::Spanned;
use uuid::Uuid;

use super::{
    NetNs, TapName,
    error::{ConfigError, Place},
    source::{Source, Sources, Spot},
    values,
};
use crate::label::Label;

/// A value and where it was written.
#[derive(Clone, Copy)]
pub(super) struct At<T> {
    pub(super) spot: Spot,
    pub(super) value: T,
}

/// Puts the number of the source to a value that knows its offset only.
pub(super) fn at<T>(source: usize, written: Option<Spanned<T>>) -> Option<At<T>> {
    written.map(|written| At { spot: Spot::of(source, &written), value: written.into_inner() })
}

/// What can belong to one VM, port or socket only.
#[derive(PartialEq, Eq, Hash)]
pub(super) enum Claim {
    Name(String),
    Uuid(Uuid),
    Label(Label),
    Socket(PathBuf),
    /// Names of interfaces are one of a kind within a network namespace.
    Tap(Option<NetNs>, TapName),
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "the VM name {name:?}"),
            Self::Uuid(uuid) => write!(f, "the UUID {uuid}"),
            Self::Label(label) => write!(f, "label {label}"),
            Self::Socket(path) => write!(f, "the socket {:?}", path.display().to_string()),
            Self::Tap(None, tap) => write!(f, "the tap {:?}", tap.as_str()),
            Self::Tap(Some(netns), tap) => {
                write!(f, "the tap {:?} in netns {:?}", tap.as_str(), netns.to_string())
            }
        }
    }
}

/// A key that a table must have.
pub(super) struct Needed {
    /// What the table describes.
    pub(super) table: &'static str,
    pub(super) key: &'static str,
    /// How it is written.
    pub(super) example: &'static str,
}

/// Notes what is wrong and goes on.
#[derive(Default)]
pub(super) struct Judge {
    pub(super) sources: Sources,
    claims: HashMap<Claim, Spot>,
}

impl Judge {
    /// Judges one value, if it was written.
    pub(super) fn read<T, U>(
        &mut self,
        written: Option<At<T>>,
        judge: impl FnOnce(&T) -> Result<U, ConfigError>,
    ) -> Option<At<U>> {
        let At { spot, value } = written?;
        match judge(&value) {
            Ok(value) => Some(At { spot, value }),
            Err(error) => {
                self.sources.fault(spot, error);
                None
            }
        }
    }

    /// As [`Self::read`], for those who need no place any more.
    pub(super) fn value<T, U>(
        &mut self,
        written: Option<At<T>>,
        judge: impl FnOnce(&T) -> Result<U, ConfigError>,
    ) -> Option<U> {
        self.read(written, judge).map(|judged| judged.value)
    }

    /// Notes that a key is missing, if it is; not where a misspelt one was just found.
    pub(super) fn require<T>(&mut self, written: Option<&T>, table_at: Spot, needed: &Needed) {
        if written.is_none() && !self.sources.is_garbled(table_at.source) {
            let Needed { table, key, example } = *needed;
            self.sources.fault(table_at, ConfigError::Missing { table, key, example });
        }
    }

    /// Notes who has a thing, or that someone has it already.
    pub(super) fn claim(&mut self, spot: Spot, claim: Claim) {
        match self.claims.entry(claim) {
            Entry::Vacant(free) => {
                free.insert(spot);
            }
            Entry::Occupied(taken) => {
                let what = taken.key().to_string();
                let first = self.sources.place(*taken.get());
                let error = if self.sources.is_added(spot) {
                    ConfigError::TakenFromAdded { what, first }
                } else {
                    ConfigError::Taken { what, first }
                };
                self.sources.fault(spot, error);
            }
        }
    }

    /// Notes what a VM, or the monitor itself, has already: it was judged before.
    pub(super) fn occupy(&mut self, place: Place, claims: impl IntoIterator<Item = Claim>) {
        let spot = self.sources.whole(Source::Known(place));
        self.claims.extend(claims.into_iter().map(|claim| (claim, spot)));
    }

    /// Judges a socket's path and claims it.
    pub(super) fn socket(&mut self, what: &'static str, written: Option<At<String>>) -> Option<PathBuf> {
        let socket = self.read(written, |text| values::socket_path(what, text))?;
        self.claim(socket.spot, Claim::Socket(socket.value.clone()));
        Some(socket.value)
    }

    /// An argument of the command line.
    pub(super) fn argument(&mut self, option: &'static str, text: Option<&String>) -> Option<At<String>> {
        text.map(|text| At { spot: self.sources.whole(Source::Argument(option)), value: text.clone() })
    }

    /// What holds where a key is not written.
    pub(super) fn unwritten(&mut self, key: &'static str, text: &str) -> At<String> {
        At { spot: self.sources.whole(Source::Default(key)), value: text.to_owned() }
    }
}
