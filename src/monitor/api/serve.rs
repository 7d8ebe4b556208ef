//! Serving HTTP on a unix socket to clients that may be slow, silent or many.
//!
//! ```text
//!   accept ---> header ---> body ---> answer ---> write ---> closed
//!   a place     idle        idle      answer      idle without progress
//!   among       |<------------------ connection ------------------->|
//!   `clients`
//! ```
//!
//! A connection serves one request, so that each of these times bounds it and no client keeps a place. When all
//! places are taken a further client waits in the kernel's backlog, where it costs nothing here.

use std::{
    convert::Infallible,
    fmt, io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    task::JoinSet,
    time::{Instant, Sleep, sleep, timeout},
};

/// The largest request line and header together, in bytes.
const HEADER_BYTES_MAX: usize = 16 * 1024;

/// The pause after `accept` failed: it does so when descriptors ran out, and would again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The user names of this host. Only the file is asked: a directory service may be slow, and the monitor waits.
const PASSWD: &str = "/etc/passwd";

/// What one client, and all of them together, may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Clients at a time; a further one waits to be accepted.
    pub clients: usize,
    /// Bytes of a request's body.
    pub body_bytes: u64,
    /// The time for a header to arrive, and again for a body, and for a stalled write to go on.
    pub idle: Duration,
    /// The time for the monitor to answer.
    pub answer: Duration,
    /// The time for a whole connection.
    pub connection: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clients: 16,
            body_bytes: 64 * 1024,
            idle: Duration::from_secs(5),
            answer: Duration::from_secs(10),
            connection: Duration::from_secs(30),
        }
    }
}

/// Who is at the other end of a connection: as the kernel noted it when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// User.
    pub uid: u32,
    /// Process; none where it is in a process namespace that we cannot see into.
    pub pid: Option<i32>,
}

impl Peer {
    /// The peer of this connection.
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let peer = stream.peer_cred()?;
        Ok(Self { uid: peer.uid(), pid: peer.pid().filter(|pid| *pid > 0) })
    }
}

/// `root (uid 0, pid 123)`, or without a name `uid 4711, pid 123`.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pid = self.pid.map_or_else(|| "pid unknown".to_owned(), |pid| format!("pid {pid}"));
        let passwd = std::fs::read_to_string(PASSWD).unwrap_or_default();
        match user_name(&passwd, self.uid) {
            Some(name) => write!(f, "{name} (uid {}, {pid})", self.uid),
            None => write!(f, "uid {}, {pid}", self.uid),
        }
    }
}

/// The name that a passwd file gives this user.
fn user_name(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then_some(name)
    })
}

/// Serves until it is dropped; its connections end with it. To be called inside a tokio runtime.
pub async fn serve_unix(listener: UnixListener, router: Router, limits: Limits) -> Infallible {
    let mut clients = JoinSet::new();
    loop {
        while clients.try_join_next().is_some() {}
        while clients.len() >= limits.clients {
            clients.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, _)) => {
                clients.spawn(serve_client(stream, router.clone(), limits));
            }
            Err(error) => {
                tracing::warn!("cannot accept a client of the API: {error}");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one request.
async fn serve_client(stream: UnixStream, router: Router, limits: Limits) {
    let peer = match Peer::of(&stream) {
        Ok(peer) => peer,
        Err(error) => {
            tracing::warn!("cannot find out who a client of the API is: {error}");
            return;
        }
    };
    let service = TowerToHyperService::new(router.layer(Extension(peer)).layer(Extension(limits)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle)
        .max_buf_size(HEADER_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(Impatient::new(stream, limits.idle)), service);
    match timeout(limits.connection, connection).await {
        Ok(Ok(())) => {}
        // Each of these is the client's doing, so it is nothing for the log of a quiet host.
        Ok(Err(error)) => tracing::debug!("a client of the API ({peer:?}) is cut off: {error}"),
        Err(_) => tracing::debug!("a client of the API ({peer:?}) is cut off: it took too long"),
    }
}

/// A stream whose writes fail when the other side reads nothing for too long.
#[derive(Debug)]
struct Impatient {
    stream: UnixStream,
    patience: Duration,
    /// When the write that waits now is given up; none while no write waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    const fn new(stream: UnixStream, patience: Duration) -> Self {
        Self { stream, patience, deadline: None }
    }

    /// Passes on what a write came to, unless it waits and has waited for too long.
    fn judge(&mut self, written: Poll<io::Result<usize>>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let patience = self.patience;
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + patience)));
        deadline.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.judge(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.judge(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::user_name;

    #[test]
    fn a_peer_is_named_by_its_number_alone_unless_the_host_knows_it() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\nlibvirt-qemu:x:64055:109::/:/bin/false\n";
        assert_eq!(user_name(passwd, 0), Some("root"));
        assert_eq!(user_name(passwd, 64055), Some("libvirt-qemu"));
        assert_eq!(user_name(passwd, 109), None);
    }
}
