//! The API: HTTP/1.1 with JSON on two unix sockets.
//!
//! ```text
//!   stats.sock    GET /v1/stats  GET /v1/vms                       for a group that may look
//!                 GET /v1/health  GET /v1/version                  is all well, and what runs
//!                 GET /v1/openapi.json                             what there is, in OpenAPI's terms
//!   control.sock  the same, and
//!                 PUT    /v1/vms/NAME/suspect {"reason": "..."}    for root, who may change
//!                 DELETE /v1/vms/NAME/suspect
//!                 POST   /v1/vms {"name": "...", "port": [..]}     a VM as in a [[vm]] table
//!                 DELETE /v1/vms/NAME, /v1/vms?uuid=UUID
//!                 POST   /v1/reload                                the configuration files
//!                 GET    /v1/state                                 labels and totals, to be taken elsewhere
//!                 PUT    /v1/state
//!                 GET    /v1/log                                   how much is logged
//!                 PUT    /v1/log                {"level": "..."}
//! ```
//!
//! Answers are one line of JSON; errors are `{"error": "..."}`, one clear line. The API holds no state and knows
//! no VM: it turns requests into [`Command`]s for the monitor's one task and waits for the reply.

mod change;
pub mod document;
pub mod health;
pub mod log;
mod openapi;
mod serve;
mod state;
mod time;

use axum::{
    Extension, Router,
    body::{Body, Bytes},
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderValue, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use http_body_util::BodyExt;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use uuid::Uuid;

pub use change::{Added, VmCommand, Which};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use document::{Stats, VmDocument, Vms};
use health::Health;
pub use serve::{Limits, Peer, serve_unix};
pub use state::StateCommand;

/// The longest reason that a tag may have, in characters.
pub const REASON_MAX: usize = 1024;

/// How much of a body above the limit is read and thrown away, in bytes: a client that is still sending when
/// we close would see a broken pipe in place of our answer.
const DISCARD_MAX: u64 = 4 << 20;

/// How many VMs an error names.
const NAMED_MAX: usize = 20;

/// What the API asks of the monitor. A reply that nobody waits for any more is dropped: the client gave up.
#[derive(Debug)]
pub enum Command {
    /// For `GET /v1/stats`.
    Stats(oneshot::Sender<Stats>),
    /// For `GET /v1/health`.
    Health(oneshot::Sender<Health>),
    /// For `GET /v1/vms`.
    Vms(oneshot::Sender<Vms>),
    /// Puts every frame of a VM under its suspect label, or no longer does.
    Tag {
        /// The VM's name.
        vm: String,
        /// The tag; none clears it.
        tag: Option<TagRequest>,
        /// What is now in force.
        reply: oneshot::Sender<Result<VmDocument, CommandError>>,
    },
    /// Changes which VMs there are.
    Vm {
        /// How.
        command: VmCommand,
        /// Who asks: the process at the other end of the control socket.
        by: String,
    },
    /// About what outlives everything.
    State(StateCommand),
}

/// A tag that an operator wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagRequest {
    /// Why: 1 to [`REASON_MAX`] characters, none of them a control character.
    pub reason: String,
    /// Who: the process at the other end of the control socket.
    pub by: String,
}

/// Why the monitor could not do as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No VM has this name.
    #[error("no VM is called \"{0}\"")]
    NoSuchVm(String),
    /// No VM has this UUID.
    #[error("no VM has the UUID {0}")]
    NoSuchUuid(Uuid),
    /// What is wanted is wrong in itself, for the reasons given: one a line.
    #[error("{0}")]
    Invalid(String),
    /// What is wanted does not go with what there is, for the reasons given: one a line.
    #[error("{0}")]
    Conflict(String),
    /// A port (named here) did not acknowledge the change in time.
    #[error("not in force yet: {0}")]
    NotApplied(String),
    /// The change could not be written to the state directory, for the reason given.
    #[error("not changed: {0}")]
    State(String),
}

/// The routes of the stats socket: GET only. Any other method is refused on any path, before anything else is
/// looked at.
pub fn stats_router(commands: mpsc::Sender<Command>) -> Router {
    openapi::described(reads()).layer(middleware::from_fn(get_only)).with_state(Monitor { commands })
}

/// The routes of the control socket: those of the stats socket, and changes.
pub fn control_router(commands: mpsc::Sender<Command>) -> Router {
    openapi::described(log::routes(change::routes(state::routes(reads()))).routes(routes!(tag, clear)))
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(Monitor { commands })
}

fn reads() -> OpenApiRouter<Monitor> {
    let router = openapi::router().routes(routes!(stats)).routes(routes!(vms));
    health::routes(router).fallback(no_such_path)
}

/// The way to the monitor's task.
#[derive(Clone, Debug)]
struct Monitor {
    commands: mpsc::Sender<Command>,
}

impl Monitor {
    /// Sends a command and waits for its reply, for as long as a client may wait.
    async fn ask<T>(
        &self,
        limits: Limits,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.commands.send(command(reply)).await.ok()?;
            answer.await.ok()
        };
        match timeout(limits.answer, exchange).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "vmflow is stopping")),
            Err(_) => {
                let seconds = limits.answer.as_secs();
                let text = format!("the monitor did not answer within {seconds} s: see its log");
                Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text))
            }
        }
    }

    /// Asks for a change of a tag.
    async fn change(&self, limits: Limits, vm: String, tag: Option<TagRequest>) -> Result<Response, Refusal> {
        match self.ask(limits, |reply| Command::Tag { vm, tag, reply }).await? {
            Ok(document) => Ok(json(StatusCode::OK, &document)),
            Err(error) => Err(self.refusal(limits, error).await?),
        }
    }

    /// What a client is told; a name that no VM has is answered with those that VMs have.
    async fn refusal(&self, limits: Limits, error: CommandError) -> Result<Refusal, Refusal> {
        let status = match error {
            CommandError::NoSuchVm(_) | CommandError::NoSuchUuid(_) => StatusCode::NOT_FOUND,
            CommandError::Invalid(_) => StatusCode::BAD_REQUEST,
            CommandError::Conflict(_) => StatusCode::CONFLICT,
            CommandError::NotApplied(_) => StatusCode::GATEWAY_TIMEOUT,
            CommandError::State(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let mut text = error.to_string();
        if status == StatusCode::NOT_FOUND {
            let there = self.ask(limits, Command::Vms).await?;
            text = format!("{text}: {}", names(there.vms.iter().map(|vm| vm.name.as_str())));
        }
        Ok(Refusal::new(status, text))
    }
}

/// The names there are, as the end of a sentence.
pub(crate) fn names<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let first: Vec<_> = names.take(NAMED_MAX).collect();
    match (first.is_empty(), more) {
        (true, _) => "there is none".to_owned(),
        (false, 0) => format!("there are {}", first.join(", ")),
        (false, more) => format!("there are {} and {more} more", first.join(", ")),
    }
}

/// What every VM sent and received.
#[utoipa::path(get, path = "/v1/stats", responses(
    (status = 200, description = "The numbers of now: none is ever lower than one that was shown", body = Stats),
    (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
))]
async fn stats(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
) -> Result<Response, Refusal> {
    Ok(json(StatusCode::OK, &monitor.ask(limits, Command::Stats).await?))
}

/// Which VMs there are, with their labels, tags and ports.
#[utoipa::path(get, path = "/v1/vms", responses(
    (status = 200, description = "All VMs", body = Vms),
    (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
))]
async fn vms(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
) -> Result<Response, Refusal> {
    Ok(json(StatusCode::OK, &monitor.ask(limits, Command::Vms).await?))
}

/// An operator's tag for a VM.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct TagBody {
    /// Why: one line of at most 1024 characters.
    #[schema(min_length = 1, max_length = 1024)]
    reason: String,
}

/// Puts every frame of a VM under its suspect label, from the next batch on.
#[utoipa::path(put, path = "/v1/vms/{name}/suspect", request_body = TagBody,
    params(("name" = String, Path, description = "The VM's name")),
    responses(
        (status = 200, description = "The tag is in force at every port", body = VmDocument),
        (status = 400, description = "The body is wrong", body = ErrorDocument),
        (status = 404, description = "No VM has this name", body = ErrorDocument),
        (status = 408, description = "The body did not arrive in time", body = ErrorDocument),
        (status = 413, description = "The body is too large", body = ErrorDocument),
        (status = 500, description = "The state directory refuses it: nothing changed", body = ErrorDocument),
        (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
        (status = 504, description = "A port did not acknowledge it in time", body = ErrorDocument),
    ))]
async fn tag(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
    Extension(peer): Extension<Peer>,
    name: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Response, Refusal> {
    let vm = vm_name(name)?;
    let body = read_body(request.into_body(), limits).await?;
    let TagBody { reason } = serde_json::from_slice(&body).map_err(|error| {
        let text = format!("the body must be {{\"reason\": \"...\"}}: {error}");
        Refusal::new(StatusCode::BAD_REQUEST, text)
    })?;
    check_reason(&reason).map_err(|text| Refusal::new(StatusCode::BAD_REQUEST, text))?;
    let tag = TagRequest { reason, by: peer.to_string() };
    monitor.change(limits, vm, Some(tag)).await
}

/// Takes the tag off a VM.
#[utoipa::path(delete, path = "/v1/vms/{name}/suspect",
    params(("name" = String, Path, description = "The VM's name")),
    responses(
        (status = 200, description = "No tag is in force any more", body = VmDocument),
        (status = 400, description = "The name cannot be read", body = ErrorDocument),
        (status = 404, description = "No VM has this name", body = ErrorDocument),
        (status = 500, description = "The state directory refuses it: nothing changed", body = ErrorDocument),
        (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
        (status = 504, description = "A port did not acknowledge it in time", body = ErrorDocument),
    ))]
async fn clear(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response, Refusal> {
    monitor.change(limits, vm_name(name)?, None).await
}

fn vm_name(name: Result<Path<String>, PathRejection>) -> Result<String, Refusal> {
    let Path(name) = name.map_err(|rejection| Refusal::new(rejection.status(), rejection.body_text()))?;
    Ok(name)
}

/// A reason is printed on terminals and into logs: it says something, and only that.
fn check_reason(reason: &str) -> Result<(), String> {
    let length = reason.chars().count();
    if reason.trim().is_empty() {
        Err("the reason is empty: say why".to_owned())
    } else if length > REASON_MAX {
        Err(format!("the reason has {length} characters: {REASON_MAX} are allowed"))
    } else if let Some(control) = reason.chars().find(|c| c.is_control()) {
        Err(format!(
            "the reason has the control character {}: write one line of text",
            control.escape_unicode()
        ))
    } else {
        Ok(())
    }
}

/// Reads a body up to the limit, within the time that a client may let us wait.
async fn read_body(mut body: Body, limits: Limits) -> Result<Bytes, Refusal> {
    let too_large = || {
        let text = format!("the body is larger than {} bytes", limits.body_bytes);
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, text)
    };
    let whole = async {
        let (mut bytes, mut length) = (Vec::new(), 0);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                Refusal::new(StatusCode::BAD_REQUEST, format!("the body breaks off: {error}"))
            })?;
            let data = frame.into_data().unwrap_or_default();
            length += data.len() as u64;
            if length <= limits.body_bytes {
                bytes.extend_from_slice(&data);
            } else if length > DISCARD_MAX {
                break;
            }
        }
        if length > limits.body_bytes { Err(too_large()) } else { Ok(bytes.into()) }
    };
    timeout(limits.idle, whole).await.unwrap_or_else(|_| {
        let text = format!("the body did not arrive within {} s", limits.idle.as_secs());
        Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, text))
    })
}

/// Refuses every method but GET, on every path.
async fn get_only(request: Request, next: Next) -> Response {
    if request.method() == Method::GET {
        return next.run(request).await;
    }
    let text = format!("{} is not allowed here: this socket answers GET only", request.method());
    let mut response = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text).into_response();
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
    response
}

/// The router adds the `Allow` header.
async fn method_not_allowed(method: Method, uri: Uri) -> Refusal {
    let text = format!("{method} is not allowed on {}", uri.path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text)
}

async fn no_such_path(uri: Uri) -> Refusal {
    let text = format!("there is no {}: try /v1/stats or /v1/vms; /v1/openapi.json has them all", uri.path());
    Refusal::new(StatusCode::NOT_FOUND, text)
}

/// An error for the client: a status and one line.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    text: String,
}

impl Refusal {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }
}

/// The body of every error.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorDocument {
    /// What is wrong, and where: one line.
    pub error: String,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        json(self.status, &ErrorDocument { error: self.text })
    }
}

/// One line of JSON.
fn json(status: StatusCode, document: &impl Serialize) -> Response {
    match serde_json::to_vec(document) {
        Ok(mut line) => {
            line.push(b'\n');
            (status, [(header::CONTENT_TYPE, "application/json")], line).into_response()
        }
        Err(error) => {
            tracing::error!("cannot write a document: {error}");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_says_something_in_one_line_of_bounded_length() {
        assert_eq!(check_reason("scans port 22 (näheres: #17)"), Ok(()));
        assert_eq!(check_reason(&"ä".repeat(REASON_MAX)), Ok(()));
        assert!(check_reason(&"ä".repeat(REASON_MAX + 1)).unwrap_err().contains("1025 characters"));
        assert!(check_reason("").unwrap_err().contains("empty"));
        assert!(check_reason("  ").unwrap_err().contains("empty"));
        for control in ['\n', '\0', '\x1b', '\x7f', '\u{9b}'] {
            let error = check_reason(&format!("a{control}b")).unwrap_err();
            assert!(error.contains("control character \\u{") && !error.contains(control), "{error}");
        }
    }

    #[test]
    fn an_error_names_the_vms_there_are_but_not_a_thousand() {
        let all: Vec<_> = (0..1000).map(|n| format!("vm{n}")).collect();
        let of = |count: usize| names(all.iter().take(count).map(String::as_str));
        assert_eq!(of(0), "there is none");
        assert_eq!(of(2), "there are vm0, vm1");
        assert!(of(1000).ends_with("vm18, vm19 and 980 more"));
    }
}
