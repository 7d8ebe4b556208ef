//! Where front ends come from: a socket that the monitor listens on, or one that it connects to.

use std::{os::fd::OwnedFd, path::PathBuf, time::Duration};

use tokio::net::{UnixListener, UnixStream};

/// How long to wait between two tries to reach a front end that listens: first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// A port's socket.
#[derive(Debug)]
pub enum Doorbell {
    /// We listen (the front end is the client).
    Server(UnixListener),
    /// We connect (the front end is the server), again and again.
    Client(PathBuf),
}

/// A front end that may be served.
#[derive(Debug)]
pub struct FrontEnd {
    /// Its connection.
    pub connection: OwnedFd,
    /// Its process, for the log; none where it is in a process namespace that we cannot see into.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: u32,
}

impl Doorbell {
    /// True if front ends come to us.
    #[must_use]
    pub const fn listens(&self) -> bool {
        matches!(self, Self::Server(_))
    }

    /// Waits for the next front end; refuses those of another user than `only`, each with a call of
    /// `refused`. May be dropped and called again.
    pub async fn ring(&self, only: Option<u32>, refused: impl Fn()) -> FrontEnd {
        loop {
            let stream = match self {
                Self::Server(listener) => accept(listener).await,
                Self::Client(path) => connect(path).await,
            };
            match identify(stream) {
                Ok(front_end) if only.is_none_or(|uid| uid == front_end.uid) => return front_end,
                Ok(FrontEnd { pid, uid, .. }) => {
                    refused();
                    tracing::warn!(
                        pid,
                        uid,
                        "refused: the front end must run as user {}",
                        only.unwrap_or(uid)
                    );
                    // A server of the wrong user is asked again later, not at once.
                    if matches!(self, Self::Client(_)) {
                        tokio::time::sleep(RETRY.1).await;
                    }
                }
                Err(e) => tracing::warn!("a front end came and went: {e}"),
            }
        }
    }
}

async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(e) => {
                // Out of descriptors, most likely: the listener stays, and is tried again.
                tracing::warn!("cannot accept a front end: {e}");
                tokio::time::sleep(RETRY.0).await;
            }
        }
    }
}

async fn connect(path: &PathBuf) -> UnixStream {
    let mut pause = RETRY.0;
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return stream,
            Err(e) => tracing::debug!("{}: {e}", path.display()),
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(RETRY.1);
    }
}

fn identify(stream: UnixStream) -> std::io::Result<FrontEnd> {
    let peer = stream.peer_cred()?;
    let connection = OwnedFd::from(stream.into_std()?);
    // The keeper's reads say themselves that they do not wait; its writes have a deadline.
    let flags = rustix::fs::fcntl_getfl(&connection)?;
    rustix::fs::fcntl_setfl(&connection, flags - rustix::fs::OFlags::NONBLOCK)?;
    Ok(FrontEnd { connection, pid: peer.pid(), uid: peer.uid() })
}
