//! libvirt's hook: a domain's ports are added before QEMU starts, and removed after it has ended.
//!
//! libvirt runs the hook as `qemu DOMAIN OPERATION PHASE EXTRA` with the domain's XML on standard input
//! (<https://libvirt.org/hooks.html>). When it fails before a start, the domain is not started, and what the hook
//! has printed is the reason that is shown. Nothing that it does later may stand in the way of a domain. `start` is
//! the last operation before QEMU, and not `prepare`: only then it is known which user QEMU will run as.

mod domain;

use std::path::Path;

use hyper::Method;

pub use self::domain::DomainError;
use self::domain::{Domain, Port};
use super::{Client, ClientError};
use crate::monitor::api::Which;

/// What libvirt says about a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its name.
    pub domain: String,
    /// What happens to it: `start`, `release`, `reconnect` ..
    pub operation: String,
    /// `begin` or `end`.
    pub phase: String,
}

/// Why the hook could not do its part.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The domain does not say what is needed.
    #[error("domain {0:?}: {1}")]
    Domain(String, DomainError),
    /// vmflow did not do as asked.
    #[error("domain {0:?}: {1}")]
    Client(String, ClientError),
}

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Duty {
    /// The domain is about to start.
    Add,
    /// libvirtd has come back and found the domain running: it would end it if the hook failed.
    AddAgain,
    /// The domain has ended.
    Remove,
}

impl Event {
    /// True if the domain is not to start when the hook fails. Else the failure is only told.
    #[must_use]
    pub fn can_be_refused(&self) -> bool {
        self.duty() == Some(Duty::Add)
    }

    fn duty(&self) -> Option<Duty> {
        match (self.operation.as_str(), self.phase.as_str()) {
            ("start", "begin") => Some(Duty::Add),
            ("reconnect", "begin") => Some(Duty::AddAgain),
            ("release", "end") => Some(Duty::Remove),
            _ => None,
        }
    }
}

/// Does what an event asks for. To be called inside a tokio runtime.
///
/// # Errors
/// [`HookError`], of one line.
pub async fn obey(control: &Path, event: &Event, xml: &str) -> Result<(), HookError> {
    match event.duty() {
        Some(duty) => perform(&Client::new(control), duty, &event.domain, xml).await,
        None => Ok(()),
    }
}

async fn perform(client: &Client, duty: Duty, name: &str, xml: &str) -> Result<(), HookError> {
    let domain = Domain::parse(xml).map_err(|error| HookError::Domain(name.into(), error))?;
    if domain.ports.is_empty() {
        return Ok(());
    }
    let done = match duty {
        Duty::Add | Duty::AddAgain => add(client, &domain, name).await?,
        Duty::Remove => client.remove(&Which::Uuid(domain.uuid)).await.map(drop),
    };
    done.map_err(|error| HookError::Client(name.into(), error))
}

/// Adds the domain, unless all of its ports are in vmflow's configuration.
async fn add(client: &Client, domain: &Domain, name: &str) -> Result<Result<(), ClientError>, HookError> {
    if let Some(port) = domain.ports.iter().find(|port| !port.has_tap()) {
        return match is_configured(client, domain).await {
            Ok(true) => Ok(Ok(())),
            Ok(false) => Err(HookError::Domain(name.into(), DomainError::NoTap(port.socket.clone()))),
            Err(error) => Ok(Err(error)),
        };
    }
    let body = domain.to_json().to_string();
    Ok(client.request(Method::POST, "/v1/vms", body).await.map(drop))
}

/// True if vmflow serves all sockets of the domain already.
async fn is_configured(client: &Client, domain: &Domain) -> Result<bool, ClientError> {
    let vms = client.vms().await?.vms;
    let served = |port: &Port| vms.iter().flat_map(|vm| &vm.ports).any(|served| served.socket == port.socket);
    Ok(domain.ports.iter().all(served))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_start_can_be_refused() {
        let duty = |operation: &str, phase: &str| {
            let event = Event { domain: "web1".into(), operation: operation.into(), phase: phase.into() };
            (event.duty(), event.can_be_refused())
        };
        assert_eq!(duty("start", "begin"), (Some(Duty::Add), true));
        assert_eq!(duty("reconnect", "begin"), (Some(Duty::AddAgain), false));
        assert_eq!(duty("release", "end"), (Some(Duty::Remove), false));
        for (operation, phase) in
            [("prepare", "begin"), ("started", "begin"), ("stopped", "end"), ("new", "")]
        {
            assert_eq!(duty(operation, phase), (None, false), "{operation} {phase}");
        }
    }
}
