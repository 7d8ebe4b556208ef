//! What outlives everything, to be taken elsewhere: `GET` and `PUT /v1/state` on the control socket.

use axum::{
    Extension, Router,
    extract::{Request, State},
    http::StatusCode,
    response::Response,
    routing,
};
use tokio::sync::oneshot;

use super::{Command, CommandError, Limits, Monitor, Refusal, json, read_body};
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

pub(super) fn routes(router: Router<Monitor>) -> Router<Monitor> {
    router.route("/v1/state", routing::get(export).put(import))
}

async fn export(
    State(monitor): State<Monitor>,
    Extension(limits): Extension<Limits>,
) -> Result<Response, Refusal> {
    let state = monitor.ask(limits, |reply| Command::State(StateCommand::Export(reply))).await?;
    Ok(json(StatusCode::OK, &state))
}

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
