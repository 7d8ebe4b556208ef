//! Labels and totals of a running vmflow.

use hyper::Method;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{Client, ClientError, exchange};
use crate::monitor::state::{Imported, State};

impl Client {
    /// Everything that outlives the daemon.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn state(&self) -> Result<State, ClientError> {
        self.about_state(Method::GET, String::new()).await
    }

    /// Has the daemon take over labels and totals.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn import(&self, state: &State) -> Result<Imported, ClientError> {
        let body = serde_json::to_string(state).map_err(|error| self.unreadable(&error))?;
        self.about_state(Method::PUT, body).await
    }

    async fn about_state<T: DeserializeOwned>(&self, method: Method, body: String) -> Result<T, ClientError> {
        let stream = UnixStream::connect(&self.control).await;
        let answer = exchange(self.control.clone(), stream, method, "/v1/state", body).await?;
        serde_json::from_slice(&answer.body).map_err(|error| answer.unreadable(&error))
    }

    fn unreadable(&self, error: &serde_json::Error) -> ClientError {
        ClientError::Unreadable { path: self.control.clone(), reason: error.to_string() }
    }
}
