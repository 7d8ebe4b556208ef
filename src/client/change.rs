//! VMs that are added and removed while vmflow runs.

use hyper::{Method, StatusCode};
use tokio::net::UnixStream;

use super::{Answer, Client, ClientError, exchange, path_segment};
use crate::{
    config::Vm,
    monitor::api::{
        Added, Which,
        document::{Changes, VmDocument},
    },
};

impl Client {
    /// Adds a VM; one that is there already with the same settings stays as it is.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line for each thing that is wrong.
    pub async fn add(&self, vm: &Vm) -> Result<Added, ClientError> {
        let body = serde_json::to_string(vm).map_err(|error| ClientError::Invalid(error.to_string()))?;
        let answer = self.request(Method::POST, "/v1/vms", body).await?;
        Ok(Added { vm: answer.part()?, is_new: answer.status == StatusCode::CREATED })
    }

    /// Removes a VM that was added.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn remove(&self, which: &Which) -> Result<VmDocument, ClientError> {
        let path = match which {
            Which::Name(name) => format!("/v1/vms/{}", path_segment(name)),
            Which::Uuid(uuid) => format!("/v1/vms?uuid={uuid}"),
        };
        self.request(Method::DELETE, &path, String::new()).await?.part()
    }

    /// Lets the daemon read its configuration files again.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line for each thing that is wrong.
    pub async fn reload(&self) -> Result<Changes, ClientError> {
        self.request(Method::POST, "/v1/reload", String::new()).await?.document()
    }

    /// Asks for a change.
    pub(super) async fn request(
        &self,
        method: Method,
        path: &str,
        body: String,
    ) -> Result<Answer, ClientError> {
        let stream = UnixStream::connect(&self.control).await;
        exchange(self.control.clone(), stream, method, path, body).await
    }
}

/// One line that says what became of a VM that was to be added.
pub(super) fn added(Added { vm, is_new }: &Added) -> String {
    let what = if *is_new { "is added" } else { "is there already" };
    let ports: Vec<_> = vm.ports.iter().map(|port| format!("{} at {}", port.tap, port.socket)).collect();
    format!("{} {what}: label {}, {}\n", vm.name, vm.label, ports.join(", "))
}

/// One line that says which VM is gone.
pub(super) fn removed(vm: &VmDocument) -> String {
    format!("{} is removed, and its label {} retired\n", vm.name, vm.label)
}

/// A line for each kind of change.
pub(super) fn reloaded(changes: &Changes) -> String {
    let Changes { version: _, added, removed, changed } = changes;
    let kinds = [("added", added), ("removed", removed), ("changed", changed)];
    let told = kinds.iter().filter(|(_, names)| !names.is_empty());
    let lines: Vec<_> = told.map(|(kind, names)| format!("{kind}: {}\n", names.join(", "))).collect();
    if lines.is_empty() { "nothing is different\n".to_owned() } else { lines.concat() }
}
