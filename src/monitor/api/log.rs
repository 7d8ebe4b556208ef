//! How much is logged: `GET` and `PUT /v1/log` on the control socket.

use axum::{Extension, extract::Request, http::StatusCode, response::Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{ErrorDocument, Limits, Monitor, Refusal, json, read_body};
use crate::log::{self, Directive};

/// How much is logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// A level (off, error, warn, info, debug, trace), or levels of modules, such as `vmflow::keeper=trace`.
    pub level: String,
}

pub(super) fn routes(router: OpenApiRouter<Monitor>) -> OpenApiRouter<Monitor> {
    router.routes(routes!(level, set_level))
}

fn now() -> Response {
    json(StatusCode::OK, &LogLevel { level: log::directive().to_string() })
}

/// How much is logged now.
#[utoipa::path(get, path = "/v1/log", responses((status = 200, description = "Now", body = LogLevel)))]
async fn level() -> Response {
    now()
}

/// Changes how much is logged: of the monitor at once, of a port's processes from its next connection on.
#[utoipa::path(put, path = "/v1/log", request_body = LogLevel, responses(
    (status = 200, description = "It is in force", body = LogLevel),
    (status = 400, description = "The body is wrong", body = ErrorDocument),
    (status = 408, description = "The body did not arrive in time", body = ErrorDocument),
    (status = 413, description = "The body is too large", body = ErrorDocument),
    (status = 500, description = "It cannot be changed", body = ErrorDocument),
))]
async fn set_level(Extension(limits): Extension<Limits>, request: Request) -> Result<Response, Refusal> {
    let bad = |text: String| Refusal::new(StatusCode::BAD_REQUEST, text);
    let body = read_body(request.into_body(), limits).await?;
    let LogLevel { level } = serde_json::from_slice(&body)
        .map_err(|error| bad(format!("the body must be {{\"level\": \"...\"}}: {error}")))?;
    let directive: Directive = level.parse().map_err(|error: log::LogError| bad(error.to_string()))?;
    log::change(directive)
        .map_err(|error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(now())
}
