//! What can be wrong in a configuration: each fault is one line that says where, what, and what to do.
//!
//! ```text
//!   /etc/vmflow/vmflow.toml:12:9: unknown key "sokcet": did you mean "socket"?
//!   `----------- Place --------'  `------------- ConfigError --------------'
//! ```

use std::{
    fmt,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use crate::label::Label;

/// What is wrong at one place, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot be read: {what}: {advice}")]
    Unreadable {
        /// What the kernel said.
        what: String,
        /// The way out.
        advice: &'static str,
    },
    /// The file's bytes are no text.
    #[error("not UTF-8 from here on: save the file as UTF-8")]
    NotText,
    /// The file is no TOML.
    #[error("not valid TOML: {0}")]
    Syntax(String),
    /// A key that the table does not have.
    #[error("unknown key {key:?}: {hint}")]
    UnknownKey {
        /// The key as it was written.
        key: String,
        /// The key that was probably meant, or all of them.
        hint: String,
    },
    /// A string where a number belongs, and the like.
    #[error("{0}")]
    WrongType(String),
    /// A key that must be there is not.
    #[error("this {table} has no {key:?}: add {example}")]
    Missing {
        /// What the table describes.
        table: &'static str,
        /// The key.
        key: &'static str,
        /// How it is written.
        example: &'static str,
    },
    /// More or fewer VMs than one where one is to be added.
    #[error("describes {0} VMs: one is added at a time")]
    NotOne(usize),
    /// A request that is no JSON object.
    #[error("is not a JSON object with the keys of a [[vm]] table: {0}")]
    NotAnObject(String),
    /// A VM without ports.
    #[error("the VM {0:?} has no port: add a [[vm.port]] table with a socket and a tap")]
    NoPort(String),
    /// A value that does not mean anything.
    #[error("{what} {value:?} {why}")]
    BadValue {
        /// What it should be.
        what: &'static str,
        /// The value as it was written.
        value: String,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// A pinned label that this host does not own.
    #[error("label {label} is outside this host's range {}..={}: pin one of the range, or widen \"labels\" under [daemon]", .range.start(), .range.end())]
    LabelOutside {
        /// The label.
        label: Label,
        /// The host's range.
        range: RangeInclusive<Label>,
    },
    /// A thing that a later release may have.
    #[error("{what} not in this release: {advice}")]
    NotInRelease {
        /// The thing, with its verb.
        what: String,
        /// What to write instead.
        advice: &'static str,
    },
    /// Several queue pairs, and no way for the guest to ask for them.
    #[error(
        "queue_pairs is {0} and control_queue false: a guest asks for more than one pair through the control queue: leave one of the two out"
    )]
    PairsWithoutControl(u16),
    /// A number outside its range.
    #[error("{what} {value} is out of range: it is {min} to {max}")]
    OutOfRange {
        /// What the number is.
        what: &'static str,
        /// The number as it was written.
        value: i64,
        /// The smallest that is allowed.
        min: i64,
        /// The largest that is allowed.
        max: i64,
    },
    /// A user or group that this host does not know.
    #[error("no {kind} {name:?} in {table}: create it, or give the number")]
    Unknown {
        /// "user" or "group".
        kind: &'static str,
        /// The name.
        name: String,
        /// The file that was searched.
        table: &'static str,
    },
    /// A key that says nothing about a socket that the front end owns.
    #[error("{0:?} is for mode = \"server\": in client mode the front end makes the socket: leave it out")]
    ServerOnly(&'static str),
    /// A thing that belongs to one VM or port, claimed by two.
    #[error("{what} is taken at {first}: give each its own")]
    Taken {
        /// The thing.
        what: String,
        /// Who has it.
        first: Place,
    },
    /// A thing that a VM which was added while running has, claimed by a file or argument.
    #[error(
        "{what} is taken at {first}, and this VM was added while running: take it out there, or remove this one (`vmflow remove`; this file while vmflow does not run)"
    )]
    TakenFromAdded {
        /// The thing.
        what: String,
        /// Who has it, too.
        first: Place,
    },
    /// Two arguments about one VM that contradict each other.
    #[error("{key} {value} contradicts {first}: one VM has one {key}")]
    Contradicts {
        /// "label" or "uuid".
        key: &'static str,
        /// What the later argument says.
        value: String,
        /// The earlier argument.
        first: Place,
    },
    /// A part of an argument that is no `key=value`.
    #[error("{0:?} is not key=value: write name=NAME,socket=PATH,tap=IFNAME")]
    NotAPair(String),
    /// A key that is given twice in one argument.
    #[error("{0:?} is given twice: leave one of them out")]
    Twice(String),
}

/// Where something was written. Lines and columns count from 1, columns in characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A character of a file.
    File {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The column.
        column: usize,
    },
    /// A file that has no lines, because it could not be read.
    WholeFile(PathBuf),
    /// A character of the n-th argument that describes a VM.
    VmArgument {
        /// What these arguments are called: `--vm`, or `argument`.
        kind: &'static str,
        /// Which of them, from 1.
        nth: usize,
        /// The column.
        column: usize,
    },
    /// What a request says about a VM, or about one of its ports.
    Request {
        /// Which of its ports, from 1.
        port: Option<usize>,
    },
    /// A VM that was added while the monitor ran, by the file that it is kept in.
    Added(PathBuf),
    /// Another argument of the command line, as `--control`.
    Argument(&'static str),
    /// Nowhere: the value that a key has when it is not written.
    Default(&'static str),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path_on_one_line(path)),
            Self::WholeFile(path) => f.write_str(&path_on_one_line(path)),
            Self::VmArgument { kind, nth, column } => write!(f, "{kind} number {nth}, column {column}"),
            Self::Request { port: None } => f.write_str("the request"),
            Self::Request { port: Some(port) } => write!(f, "the request, port number {port}"),
            Self::Added(path) => write!(f, "{} (added while running)", path_on_one_line(path)),
            Self::Argument(option) => f.write_str(option),
            Self::Default(key) => write!(f, "the default of {key:?}"),
        }
    }
}

/// A path as text that stays on one line, whatever bytes it has.
fn path_on_one_line(path: &Path) -> String {
    on_one_line(&path.to_string_lossy())
}

/// The text with its control characters as escapes.
pub(super) fn on_one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// One fault: where and what.
#[derive(Debug)]
pub struct Fault {
    /// Where.
    pub place: Place,
    /// What, and what to do.
    pub error: ConfigError,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.error)
    }
}

/// Everything that is wrong with a configuration, in the order of the places; never empty.
#[derive(Debug)]
pub struct Faults(pub(super) Vec<Fault>);

impl Faults {
    /// The faults in the order of their places.
    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter()
    }

    /// True if nothing is wrong but that other VMs have what this one wants.
    #[must_use]
    pub fn are_conflicts(&self) -> bool {
        self.iter().all(|fault| matches!(fault.error, ConfigError::Taken { .. }))
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, fault) in self.0.iter().enumerate() {
            let separator = if n == 0 { "" } else { "\n" };
            write!(f, "{separator}{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}
