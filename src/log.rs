//! Log lines on standard error: how much is said, and in what form.
//!
//! Every line that is about a VM has the fields `vm`, `label` and `port`. They come from the span that a port's
//! task, or its keeper, runs in. Where standard error is systemd's journal, the monitor writes to the journal
//! itself, so that they are fields there: `journalctl VM=web1`. A keeper has shut its door and cannot reach the
//! journal's socket: its lines go to standard error as text, with the same fields in it.

use std::{
    env, fmt, io,
    io::IsTerminal,
    str::FromStr,
    sync::{Mutex, OnceLock, PoisonError},
};

use rustix::{fs::fstat, stdio::stderr};
use tracing_subscriber::{EnvFilter, Layer, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

/// The variable that says how much is said.
const FILTER: &str = "VMFLOW_LOG";
/// The variable that says in what form.
const FORMAT: &str = "VMFLOW_LOG_FORMAT";
/// Set by systemd: which file the journal reads, as `DEVICE:INODE`.
const JOURNAL_STREAM: &str = "JOURNAL_STREAM";
/// What a level may be.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// The target of our own lines.
const OURS: &str = "vmflow";

/// In what form lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// An object a line.
    Json,
}

/// How much is said: the levels of modules, as `tracing` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directive(String);

/// Why the log is not as wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// Neither a level nor a directive.
    #[error(
        "log level \"{0}\" is none: write off, error, warn, info, debug or trace, or a directive such as vmflow=debug,vmflow::keeper=trace"
    )]
    Directive(String),
    /// No such form.
    #[error("log format \"{0}\" is none: write text or json")]
    Format(String),
    /// The log was set up otherwise than by [`init`].
    #[error("the log level of this process cannot be changed")]
    Fixed,
}

impl Default for Directive {
    fn default() -> Self {
        Self(format!("{OURS}=info"))
    }
}

impl FromStr for Directive {
    type Err = LogError;

    /// A level is that of our own modules: what the libraries log, a guest could cause without limit.
    fn from_str(text: &str) -> Result<Self, LogError> {
        let wrong = || LogError::Directive(text.to_owned());
        let text = text.trim();
        let is_level = |part: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(part));
        if is_level(text) {
            return Ok(Self(format!("{OURS}={text}").to_lowercase()));
        }
        // A word by itself would be taken for the name of a module.
        let is_one = |part: &str| part.contains('=') || is_level(part);
        if !text.split(',').all(is_one) || text.chars().any(char::is_control) {
            return Err(wrong());
        }
        EnvFilter::try_new(text).map(|_| Self(text.to_owned())).map_err(|_| wrong())
    }
}

impl fmt::Display for Directive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Format {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(LogError::Format(other.to_owned())),
        }
    }
}

impl Format {
    const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// The log of this process.
#[derive(Debug)]
struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    directive: Mutex<Directive>,
    format: Option<Format>,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Begins to log, as the environment says, or in this `format`. To be called once.
///
/// # Errors
/// [`LogError`]: the environment says nonsense.
pub fn init(format: Option<Format>) -> Result<(), LogError> {
    let directive: Directive = setting(FILTER)?.unwrap_or_default();
    let format = format.map_or_else(|| setting(FORMAT), |format| Ok(Some(format)))?;
    let (filter, handle) = reload::Layer::new(EnvFilter::new(&directive.0));
    let subscriber = tracing_subscriber::registry().with(filter);
    match (format, journal()) {
        (None, Some(journal)) => subscriber.with(journal).init(),
        (Some(Format::Json), _) => subscriber.with(lines().json().flatten_event(true).boxed()).init(),
        (Some(Format::Text) | None, _) => subscriber.with(lines().boxed()).init(),
    }
    let _ = LOG.set(Log { filter: handle, directive: Mutex::new(directive), format });
    Ok(())
}

fn lines<S>() -> tracing_subscriber::fmt::Layer<
    S,
    tracing_subscriber::fmt::format::DefaultFields,
    tracing_subscriber::fmt::format::Format,
    fn() -> io::Stderr,
> {
    let stderr: fn() -> io::Stderr = io::stderr;
    tracing_subscriber::fmt::layer().with_ansi(io::stderr().is_terminal()).with_writer(stderr)
}

fn setting<T: FromStr<Err = LogError>>(variable: &str) -> Result<Option<T>, LogError> {
    env::var(variable).ok().filter(|text| !text.is_empty()).map(|text| text.parse()).transpose()
}

/// The journal, if it is what reads our standard error.
fn journal() -> Option<tracing_journald::Layer> {
    let reads = env::var(JOURNAL_STREAM).ok()?;
    let file = fstat(stderr()).ok()?;
    if reads != format!("{}:{}", file.st_dev, file.st_ino) {
        return None;
    }
    let journal = tracing_journald::Layer::new().ok()?;
    // Without a prefix the fields are VM, LABEL and PORT.
    Some(journal.with_field_prefix(None).with_syslog_identifier(OURS.to_owned()))
}

/// How much is said now.
#[must_use]
pub fn directive() -> Directive {
    let held = |log: &Log| log.directive.lock().unwrap_or_else(PoisonError::into_inner).clone();
    LOG.get().map(held).unwrap_or_default()
}

/// Changes how much is said, from the next line on.
///
/// # Errors
/// [`LogError::Fixed`].
pub fn change(directive: Directive) -> Result<(), LogError> {
    let log = LOG.get().ok_or(LogError::Fixed)?;
    log.filter.reload(EnvFilter::new(&directive.0)).map_err(|_| LogError::Fixed)?;
    *log.directive.lock().unwrap_or_else(PoisonError::into_inner) = directive;
    Ok(())
}

/// The environment in which another process of ours logs as this one does now; but as text where this one
/// writes to the journal, whose socket the other cannot reach.
pub fn environment() -> impl Iterator<Item = (&'static str, String)> {
    let format = LOG.get().and_then(|log| log.format).unwrap_or(Format::Text);
    [(FILTER, directive().0), (FORMAT, format.name().to_owned())].into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_that_of_our_own_modules() {
        for (text, meant) in [("debug", "vmflow=debug"), (" WARN ", "vmflow=warn"), ("off", "vmflow=off")] {
            assert_eq!(text.parse::<Directive>().unwrap().to_string(), meant);
        }
    }

    #[test]
    fn a_directive_is_kept_as_it_is() {
        for text in
            ["vmflow=debug", "vmflow=info,vmflow::keeper=trace", "warn,vhost=debug", "off,vmflow=info"]
        {
            assert_eq!(text.parse::<Directive>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_neither_is_refused_before_the_log_falls_silent() {
        for text in ["", "lod", "vmflow", "vmflow=loud", "vmflow=debug,keeper", "3", "vmflow=in\nfo", "=,="] {
            assert_eq!(text.parse::<Directive>(), Err(LogError::Directive(text.to_owned())), "{text:?}");
        }
        assert_eq!("xml".parse::<Format>(), Err(LogError::Format("xml".into())));
    }
}
