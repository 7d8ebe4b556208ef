//! Is all well, and what runs here: `GET /v1/health` and `GET /v1/version`, on both sockets.

use axum::{Extension, extract::State, http::StatusCode, response::Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Command, ErrorDocument, Limits, Monitor, Refusal, document, json};
use crate::keeper::brief::Brief;

/// `GET /v1/health`: whether all is well, and if not, what is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// The worst of the checks.
    pub status: Status,
    /// Each check, in a fixed order.
    pub checks: Vec<Check>,
}

/// How it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// All is well.
    Ok,
    /// Something does not work as it should.
    Degraded,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// `checkpoint`: totals are on disk. `taps`: each port's tap is there and up. `workers`: none keeps dying.
    /// `policies`: each worker has taken its policy.
    pub name: String,
    /// How it is.
    pub status: Status,
    /// What is wrong; empty if all is well.
    pub problems: Vec<Problem>,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The VM that it is about, if it is about one.
    pub vm: Option<String>,
    /// The VM's label.
    pub label: Option<u32>,
    /// Which of the VM's ports: 0 is the first.
    pub port: Option<usize>,
    /// What is wrong: one line.
    pub reason: String,
}

/// `GET /v1/version`: what runs here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// vmflow's version.
    pub version: String,
    /// The version of the API's documents: 1.
    pub api: u32,
}

/// The body of an answer that all is not well.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "it describes; what is sent is one of these")]
enum Unhealthy {
    /// Something is wrong.
    Degraded(Health),
    /// vmflow does not answer.
    Error(ErrorDocument),
}

impl Health {
    /// What these checks come to.
    #[must_use]
    pub fn new(checks: Vec<Check>) -> Self {
        Self { status: Status::of(checks.iter().any(|check| check.status == Status::Degraded)), checks }
    }
}

impl Status {
    const fn of(has_problems: bool) -> Self {
        if has_problems { Self::Degraded } else { Self::Ok }
    }
}

impl Check {
    /// A check that found these problems.
    #[must_use]
    pub fn new(name: &str, problems: Vec<Problem>) -> Self {
        Self { name: name.to_owned(), status: Status::of(!problems.is_empty()), problems }
    }
}

impl Problem {
    /// A problem of a port.
    #[must_use]
    pub fn of(port: &Brief, reason: String) -> Self {
        Self { vm: Some(port.vm.clone()), label: Some(port.label), port: Some(port.port), reason }
    }

    /// A problem of the host.
    #[must_use]
    pub const fn of_host(reason: String) -> Self {
        Self { vm: None, label: None, port: None, reason }
    }
}

impl Version {
    /// Our own.
    #[must_use]
    pub fn own() -> Self {
        Self { version: env!("CARGO_PKG_VERSION").to_owned(), api: document::VERSION }
    }
}

pub(super) fn routes(router: OpenApiRouter<Monitor>) -> OpenApiRouter<Monitor> {
    router.routes(routes!(health)).routes(routes!(version))
}

/// Whether all is well.
#[utoipa::path(get, path = "/v1/health", responses(
    (status = 200, description = "All is well", body = Health),
    (status = 503, description = "Something is wrong, or vmflow does not answer",
        body = Unhealthy),
))]
async fn health(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
) -> Result<Response, Refusal> {
    let health = monitor.ask(limits, Command::Health).await?;
    let status = match health.status {
        Status::Ok => StatusCode::OK,
        Status::Degraded => StatusCode::SERVICE_UNAVAILABLE,
    };
    Ok(json(status, &health))
}

/// What runs here.
#[utoipa::path(get, path = "/v1/version", responses((status = 200, description = "Versions", body = Version)))]
async fn version() -> Response {
    json(StatusCode::OK, &Version::own())
}
