//! The routes that change which VMs there are.

use axum::{
    Extension,
    body::Bytes,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{StatusCode, Uri},
    response::Response,
};
use tokio::sync::oneshot;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Command, CommandError, ErrorDocument, Limits, Monitor, Peer, Refusal,
    document::{Changes, VmDocument},
    json, read_body, vm_name,
};

/// The query of `DELETE /v1/vms` before the UUID.
const UUID_QUERY: &str = "uuid=";

/// What the API asks of the monitor about VMs that come and go.
#[derive(Debug)]
pub enum VmCommand {
    /// Adds a VM: JSON with the keys of a `[[vm]]` table.
    Add(Bytes, oneshot::Sender<Result<Added, CommandError>>),
    /// Removes a VM.
    Remove(Which, oneshot::Sender<Result<VmDocument, CommandError>>),
    /// Reads the configuration again.
    Reload(oneshot::Sender<Result<Changes, CommandError>>),
}

/// A VM that is there after it was to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    /// The VM.
    pub vm: VmDocument,
    /// False if it was there already, with the same settings.
    pub is_new: bool,
}

/// Which VM is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The one of this name.
    Name(String),
    /// The one with this UUID.
    Uuid(Uuid),
}

impl Which {
    /// True if a VM of this name and UUID is meant.
    #[must_use]
    pub fn is(&self, name: &str, uuid: Option<Uuid>) -> bool {
        match self {
            Self::Name(wanted) => wanted == name,
            Self::Uuid(wanted) => Some(*wanted) == uuid,
        }
    }

    /// There is none.
    #[must_use]
    pub fn missing(&self) -> CommandError {
        match self {
            Self::Name(name) => CommandError::NoSuchVm(name.clone()),
            Self::Uuid(uuid) => CommandError::NoSuchUuid(*uuid),
        }
    }
}

/// The routes, for the control socket only.
pub(super) fn routes(router: OpenApiRouter<Monitor>) -> OpenApiRouter<Monitor> {
    router.routes(routes!(add, remove_by_uuid)).routes(routes!(remove)).routes(routes!(reload))
}

/// Adds a VM to those that are served; kept over restarts.
#[utoipa::path(post, path = "/v1/vms",
    request_body(content = Object, description = "The keys of a `[[vm]]` table of the configuration, `port` a list"),
    responses(
        (status = 200, description = "It was there already, with the same settings", body = VmDocument),
        (status = 201, description = "Every socket of it listens", body = VmDocument),
        (status = 400, description = "The body is wrong: one fault a line", body = ErrorDocument),
        (status = 408, description = "The body did not arrive in time", body = ErrorDocument),
        (status = 409, description = "It does not go with what there is: nothing changed", body = ErrorDocument),
        (status = 413, description = "The body is too large", body = ErrorDocument),
        (status = 500, description = "The state directory refuses it: nothing changed", body = ErrorDocument),
        (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
    ))]
async fn add(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
    Extension(peer): Extension<Peer>,
    request: Request,
) -> Result<Response, Refusal> {
    let vm = read_body(request.into_body(), limits).await?;
    match monitor.command(limits, peer, |reply| VmCommand::Add(vm, reply)).await? {
        Ok(Added { vm, is_new }) => {
            let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
            Ok(json(status, &vm))
        }
        Err(error) => Err(monitor.refusal(limits, error).await?),
    }
}

/// Removes a VM that was added, and retires its label.
#[utoipa::path(delete, path = "/v1/vms/{name}",
    params(("name" = String, Path, description = "The VM's name")),
    responses(
        (status = 200, description = "It is gone: what it was", body = VmDocument),
        (status = 400, description = "The name cannot be read", body = ErrorDocument),
        (status = 404, description = "No VM has this name", body = ErrorDocument),
        (status = 409, description = "It is in a configuration file: nothing changed", body = ErrorDocument),
        (status = 500, description = "The state directory refuses it: nothing changed", body = ErrorDocument),
        (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
    ))]
async fn remove(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
    Extension(peer): Extension<Peer>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response, Refusal> {
    monitor.remove(limits, peer, Which::Name(vm_name(name)?)).await
}

/// The same by UUID.
#[utoipa::path(delete, path = "/v1/vms",
    params(("uuid" = Uuid, Query, description = "The VM's UUID")),
    responses(
        (status = 200, description = "It is gone: what it was", body = VmDocument),
        (status = 400, description = "There is no UUID in the query", body = ErrorDocument),
        (status = 404, description = "No VM has this UUID", body = ErrorDocument),
        (status = 409, description = "It is in a configuration file: nothing changed", body = ErrorDocument),
        (status = 500, description = "The state directory refuses it: nothing changed", body = ErrorDocument),
        (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
    ))]
async fn remove_by_uuid(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
    Extension(peer): Extension<Peer>,
    uri: Uri,
) -> Result<Response, Refusal> {
    let uuid = uri.query().and_then(|query| query.strip_prefix(UUID_QUERY));
    let uuid = uuid.and_then(|uuid| Uuid::try_parse(uuid).ok());
    let uuid = uuid.ok_or_else(|| {
        let text = "say which VM: DELETE /v1/vms/NAME, or DELETE /v1/vms?uuid=UUID";
        Refusal::new(StatusCode::BAD_REQUEST, text)
    })?;
    monitor.remove(limits, peer, Which::Uuid(uuid)).await
}

/// Reads the configuration files again, and serves what they say now: all of it, or nothing changes.
#[utoipa::path(post, path = "/v1/reload", responses(
    (status = 200, description = "What is different from before", body = Changes),
    (status = 400, description = "The configuration is wrong: one fault a line", body = ErrorDocument),
    (status = 409, description = "It cannot come into force while vmflow runs", body = ErrorDocument),
    (status = 500, description = "The state directory refuses it: nothing changed", body = ErrorDocument),
    (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
    (status = 504, description = "A port did not acknowledge its policy in time", body = ErrorDocument),
))]
async fn reload(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
    Extension(peer): Extension<Peer>,
) -> Result<Response, Refusal> {
    match monitor.command(limits, peer, VmCommand::Reload).await? {
        Ok(changes) => Ok(json(StatusCode::OK, &changes)),
        Err(error) => Err(monitor.refusal(limits, error).await?),
    }
}

impl Monitor {
    /// Sends a command on behalf of a peer, and waits for its reply.
    async fn command<T>(
        &self,
        limits: Limits,
        peer: Peer,
        command: impl FnOnce(oneshot::Sender<T>) -> VmCommand,
    ) -> Result<T, Refusal> {
        self.ask(limits, |reply| Command::Vm { command: command(reply), by: peer.to_string() }).await
    }

    async fn remove(&self, limits: Limits, peer: Peer, which: Which) -> Result<Response, Refusal> {
        match self.command(limits, peer, |reply| VmCommand::Remove(which, reply)).await? {
            Ok(vm) => Ok(json(StatusCode::OK, &vm)),
            Err(error) => Err(self.refusal(limits, error).await?),
        }
    }
}
