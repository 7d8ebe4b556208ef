//! The doctor: what is wrong with this host, a line for each thing that was looked at.
//!
//! Each check is a function that is given what it looks at and changes nothing; what one of them says stands for
//! itself. Those that need a running monitor ask it as every client does.

mod host;
mod port;
mod socket;
mod state;
mod vmm;

use std::{
    fmt,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::Serialize;

use self::port::Port;
use super::Client;
use crate::{
    config::{Config, DEFAULT_CONTROL, DEFAULT_FILE, DEFAULT_STATE, Origins},
    monitor::api::document::Vms,
};

/// The version of the document: it changes when a key goes or changes its meaning.
const VERSION: u32 = 1;

/// What is to be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doctor {
    /// The main file of the configuration, if it is not the usual one.
    pub file: Option<PathBuf>,
    /// The monitor's socket, if it is not the one in the configuration.
    pub control: Option<String>,
    /// Print one document instead of lines.
    pub json: bool,
}

/// How bad something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        })
    }
}

/// What one check has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    level: Level,
    /// What was looked at.
    what: String,
    /// What was seen.
    why: String,
    /// What to do; nothing where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    advice: String,
}

impl Finding {
    fn ok(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { level: Level::Ok, what: what.into(), why: why.into(), advice: String::new() }
    }

    fn warn(what: impl Into<String>, why: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Warn, what: what.into(), why: why.into(), advice: advice.into() }
    }

    fn fail(what: impl Into<String>, why: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Fail, ..Self::warn(what, why, advice) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, what, why, advice } = self;
        let separator = if advice.is_empty() { "" } else { ": " };
        write!(f, "{level:<4}  {what}: {why}{separator}{advice}")
    }
}

#[derive(Serialize)]
struct Report {
    version: u32,
    findings: Vec<Finding>,
}

/// Looks at everything and says what it has found. True if nothing has failed. To be called inside a tokio runtime.
///
/// # Errors
/// When the output cannot be written.
pub async fn run(doctor: &Doctor, out: &mut impl Write) -> io::Result<bool> {
    let findings = look(doctor).await;
    let is_well = findings.iter().all(|finding| finding.level < Level::Fail);
    if doctor.json {
        serde_json::to_writer(&mut *out, &Report { version: VERSION, findings })?;
        writeln!(out)?;
    } else {
        for finding in &findings {
            writeln!(out, "{finding}")?;
        }
    }
    out.flush()?;
    Ok(is_well)
}

async fn look(doctor: &Doctor) -> Vec<Finding> {
    let mut findings = vec![host::tun(Path::new("/dev/net/tun"))];
    findings.extend(host::kernel());
    let config = configuration(doctor, &mut findings);
    let daemon = config.as_ref().map(|config| &config.daemon);
    let control = doctor.control.as_ref().map(PathBuf::from);
    let control = control.or_else(|| daemon.map(|daemon| daemon.control.clone()));
    let control = control.unwrap_or_else(|| DEFAULT_CONTROL.into());
    findings.extend(state::directory(daemon.map_or(Path::new(DEFAULT_STATE), |daemon| &daemon.state)));
    let monitor = socket::monitor(&control, &mut findings);
    let vms = match monitor {
        Some(_) => asked(&control, &mut findings).await,
        None => None,
    };
    findings.push(host::capabilities(monitor));
    let ports = Port::all(config.as_ref(), vms.as_ref());
    findings.push(host::descriptors(monitor, ports.len()));
    for port in &ports {
        findings.extend(port.look(monitor.is_some()));
    }
    let sockets: Vec<_> = ports.iter().map(|port| port.socket.as_path()).collect();
    findings.extend(vmm::all(Path::new("/proc"), &sockets));
    findings
}

/// The configuration, if there is one without a fault.
fn configuration(doctor: &Doctor, findings: &mut Vec<Finding>) -> Option<Config> {
    let file = doctor.file.clone().unwrap_or_else(|| DEFAULT_FILE.into());
    let what = format!("configuration {}", file.display());
    if doctor.file.is_none() && !file.exists() {
        findings.push(Finding::warn(what, "is not there", "write it, or name another with --config"));
        return None;
    }
    match Config::load(&Origins { file: Some(file), control: doctor.control.clone(), ..Origins::default() }) {
        Ok(config) => {
            let ports = config.vms.iter().map(|vm| vm.ports.len()).sum::<usize>();
            findings.push(Finding::ok(what, format!("{} VMs with {ports} ports", config.vms.len())));
            Some(config)
        }
        Err(faults) => {
            // Their texts say what to do.
            findings.extend(faults.iter().map(|fault| Finding::fail("configuration", fault.to_string(), "")));
            None
        }
    }
}

/// What the monitor says about its VMs.
async fn asked(control: &Path, findings: &mut Vec<Finding>) -> Option<Vms> {
    match Client::new(control).vms().await {
        Ok(vms) => Some(vms),
        Err(error) => {
            findings.push(Finding::fail("monitor", error.to_string(), "look at its log"));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line() {
        assert_eq!(Finding::ok("a", "is there").to_string(), "ok    a: is there");
        assert_eq!(Finding::warn("a", "is old", "renew it").to_string(), "warn  a: is old: renew it");
        assert_eq!(Finding::fail("a", "is gone", "make it").to_string(), "fail  a: is gone: make it");
    }
}
