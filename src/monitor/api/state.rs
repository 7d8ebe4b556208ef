//! What outlives everything, to be taken elsewhere: `GET` and `PUT /v1/state` on the control socket.

use axum::{
    Extension,
    extract::{Request, State},
    http::StatusCode,
    response::Response,
};
use tokio::sync::oneshot;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Command, CommandError, ErrorDocument, Limits, Monitor, Refusal, json, read_body};
use crate::monitor::state::{self, Imported};

/// The largest document that is read, in bytes: some 20,000 ports.
const BODY_MAX: u64 = 64 << 20;

/// What is asked about the state.
#[derive(Debug)]
pub enum StateCommand {
    /// For `GET /v1/state`.
    Export(oneshot::Sender<state::State>),
    /// For `PUT /v1/state`.
    Import {
        /// What is to be there too.
        state: state::State,
        /// What came of it.
        reply: oneshot::Sender<Result<Imported, CommandError>>,
    },
}

pub(super) fn routes(router: OpenApiRouter<Monitor>) -> OpenApiRouter<Monitor> {
    router.routes(routes!(export, import))
}

/// Labels, tags and totals of every VM that there is or was.
#[utoipa::path(get, path = "/v1/state", responses(
    (status = 200, description = "What outlives vmflow, to be taken elsewhere", body = state::State),
    (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
))]
async fn export(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
) -> Result<Response, Refusal> {
    let state = monitor.ask(limits, |reply| Command::State(StateCommand::Export(reply))).await?;
    Ok(json(StatusCode::OK, &state))
}

/// Takes over labels, tags and totals of VMs that are not served here. Nothing is lowered or replaced.
#[utoipa::path(put, path = "/v1/state", request_body = state::State, responses(
    (status = 200, description = "All of it is here, and on disk", body = Imported),
    (status = 400, description = "The body is no such document", body = ErrorDocument),
    (status = 408, description = "The body did not arrive in time", body = ErrorDocument),
    (status = 409, description = "It contradicts what is here: nothing is imported", body = ErrorDocument),
    (status = 413, description = "The body is too large", body = ErrorDocument),
    (status = 500, description = "The state directory refuses it: nothing is imported", body = ErrorDocument),
    (status = 503, description = "vmflow stops, or does not answer", body = ErrorDocument),
    (status = 504, description = "The totals are not on disk yet", body = ErrorDocument),
))]
async fn import(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
    request: Request,
) -> Result<Response, Refusal> {
    let body = read_body(request.into_body(), Limits { body_bytes: BODY_MAX, ..limits }).await?;
    let state = state::State::parse(&body)
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error.to_string()))?;
    let command = |reply| Command::State(StateCommand::Import { state, reply });
    match monitor.ask(limits, command).await? {
        Ok(imported) => Ok(json(StatusCode::OK, &imported)),
        Err(error) => Err(monitor.refusal(limits, error).await?),
    }
}
