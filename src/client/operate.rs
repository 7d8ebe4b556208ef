//! What an operator asks of a running vmflow besides numbers: is all well, what runs, how much is logged.

use std::io::Write;

use hyper::{Method, StatusCode};
use tokio::net::UnixStream;

use super::{Client, ClientError, ErrorDocument, converse, exchange, print};
use crate::{
    log::Directive,
    monitor::api::{
        health::{Check, Health, Problem, Status, Version},
        log::LogLevel,
    },
};

impl Client {
    /// Prints whether all is well.
    ///
    /// # Errors
    /// [`ClientError::Unwell`] if it is not; else [`ClientError`], whose text is one line.
    pub(super) async fn show_health(&self, json: bool, out: &mut impl Write) -> Result<(), ClientError> {
        let (socket, stream) = self.reach().await;
        let path = "/v1/health";
        let (status, answer) = converse(socket, stream, Method::GET, path, String::new()).await?;
        if !matches!(status, StatusCode::OK | StatusCode::SERVICE_UNAVAILABLE) {
            return Err(answer.unreadable(&format!("status {status}")));
        }
        if let Ok(ErrorDocument { error }) = serde_json::from_slice(&answer.body) {
            return Err(ClientError::Refused(error));
        }
        let health: Health =
            serde_json::from_slice(&answer.body).map_err(|error| answer.unreadable(&error))?;
        print(out, &if json { answer.text()? } else { lines(&health) })?;
        if health.status == Status::Ok { Ok(()) } else { Err(ClientError::Unwell) }
    }

    /// Prints our own version, and that of the daemon.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub(super) async fn show_version(&self, json: bool, out: &mut impl Write) -> Result<(), ClientError> {
        if json {
            return print(out, &self.look("/v1/version").await?.text()?);
        }
        print(out, &format!("this program: {}\n", Version::own().version))?;
        let answer = self.look("/v1/version").await?;
        let running: Version =
            serde_json::from_slice(&answer.body).map_err(|error| answer.unreadable(&error))?;
        print(out, &format!("running: {}, API version {}\n", running.version, running.api))
    }

    /// How much is logged, after a change if one is wanted: one line.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn log_level(&self, wanted: Option<&Directive>) -> Result<String, ClientError> {
        let (method, body) = match wanted {
            Some(level) => (Method::PUT, serde_json::json!({ "level": level.to_string() }).to_string()),
            None => (Method::GET, String::new()),
        };
        let stream = UnixStream::connect(&self.control).await;
        let answer = exchange(self.control.clone(), stream, method, "/v1/log", body).await?;
        let LogLevel { level } =
            serde_json::from_slice(&answer.body).map_err(|error| answer.unreadable(&error))?;
        Ok(level + "\n")
    }
}

/// One line for each check, and one for each problem.
fn lines(health: &Health) -> String {
    let word = |status| if status == Status::Ok { "ok" } else { "degraded" };
    let of_check = |check: &Check| {
        let problems = check.problems.iter().map(|problem| format!("  {}\n", line(problem)));
        format!("{}: {}\n{}", check.name, word(check.status), problems.collect::<String>())
    };
    let checks = health.checks.iter().map(of_check);
    checks.collect::<String>() + &format!("status: {}\n", word(health.status))
}

fn line(problem: &Problem) -> String {
    match (&problem.vm, problem.port) {
        (Some(vm), Some(port)) => format!("{vm}, port {port}: {}", problem.reason),
        _ => problem.reason.clone(),
    }
}
