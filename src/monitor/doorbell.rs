//! Where front ends come from: a socket that the monitor listens on, or one that it connects to.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use tokio::net::{UnixListener, UnixStream};

use super::listen::{self, Access, BindError, Claim};
use crate::config;

/// Mode of a directory that is made for a VM's socket.
const SOCKET_DIRECTORY: u32 = 0o710;

/// How long to wait between two tries to reach a front end that listens: first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// A port's socket.
#[derive(Clone, Debug)]
pub enum Doorbell {
    /// We listen (the front end is the client).
    Server(Rc<Listening>),
    /// We connect (the front end is the server), again and again.
    Client(PathBuf),
}

/// A socket that we listen on; it goes with the last port that has it.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    claim: Claim,
    #[expect(dead_code, reason = "dropped last")]
    directory: Option<MadeDirectory>,
}

/// A directory that was made for a socket: it goes when it is empty.
#[derive(Debug)]
struct MadeDirectory(PathBuf);

impl Drop for MadeDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0); // another socket may be in it
    }
}

impl Listening {
    /// Lets those use the socket whom a port's settings name.
    ///
    /// # Errors
    /// [`BindError::System`] where the system refuses.
    pub fn give_access(&self, port: &config::Port) -> Result<(), BindError> {
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let Access { mode, uid, gid } = access(port);
        self.claim.give_access(&Access { mode, uid: uid.or(Some(own.0)), gid: gid.or(Some(own.1)) })
    }
}

const fn access(port: &config::Port) -> Access {
    Access { mode: port.socket_mode, uid: port.owner, gid: port.group }
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
    /// Listens, or gets ready to connect, as a port's settings say. To be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`] where the socket cannot be had; nothing is left behind then.
    pub fn open(port: &config::Port) -> Result<Self, BindError> {
        let (path, access) = (&port.socket, access(port));
        if port.mode == config::Mode::Client {
            return Ok(Self::Client(path.clone()));
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        let made = listen::ensure_directory(parent, &Access { mode: SOCKET_DIRECTORY, ..access })?;
        let directory = made.then(|| MadeDirectory(parent.to_owned()));
        let bound = listen::bind_unix(path, &access)?.into_tokio();
        let (listener, claim) =
            bound.map_err(|source| BindError::System { step: "watch", path: path.clone(), source })?;
        Ok(Self::Server(Rc::new(Listening { listener, claim, directory })))
    }

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
                Self::Server(listening) => accept(&listening.listener).await,
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
