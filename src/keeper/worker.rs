//! The worker, as its keeper sees it: a process, and a vhost-user session of the keeper's own with it.
//!
//! The session has the same opening whatever the front end negotiated: acknowledgements for everything, and
//! feature bit 30 acknowledged (without it the `vhost` crate closes the connection at the first
//! `SET_VRING_ENABLE`, which QEMU sends before any `SET_FEATURES`).

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixListener,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
        socket_with,
    },
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};

use super::{
    brief::Brief,
    gate::Request,
    message::{self, Inbox, MessageError, NEED_REPLY, REPLY, request},
    process::{self, Inherited},
};
use crate::{
    features::{self, protocol},
    worker,
};

/// How long the worker may take for a request. Mapping memory and finishing a batch take microseconds; a
/// worker that takes longer hangs, and a front end must not hang with it.
const PATIENCE: Duration = Duration::from_secs(2);

/// The worker of this keeper.
#[derive(Debug)]
pub struct Worker {
    pidfd: OwnedFd,
    session: OwnedFd,
    inbox: Inbox,
}

/// Why the worker cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// It could not be started.
    #[error("cannot start a worker")]
    Start(#[from] std::io::Error),
    /// It ended by itself.
    #[error("the worker died")]
    Ended,
    /// It is gone.
    #[error("the worker died at request {0}: {1}")]
    Gone(u32, MessageError),
    /// It did not answer.
    #[error("the worker did not answer request {0} within {PATIENCE:?}")]
    Hangs(u32),
}

impl Worker {
    /// Forks the worker and opens the session. The listener has an address of the kernel's choice in our
    /// own empty network namespace, and is connected before the fork: nobody else can be first.
    ///
    /// # Errors
    /// [`WorkerError`].
    pub fn start(brief: &Brief, inherited: &Inherited) -> Result<Self, WorkerError> {
        let (listener, session) = private_connection().map_err(std::io::Error::from)?;
        let keep =
            [listener.as_fd(), inherited.tap.as_fd(), inherited.ledger.as_fd(), inherited.policies.as_fd()];
        let pidfd = process::fork(&keep, || worker::run(brief, inherited, listener.as_fd()))?;
        let mut worker = Self { pidfd, session, inbox: Inbox::default() };
        worker.open()?;
        Ok(worker)
    }

    fn open(&mut self) -> Result<(), WorkerError> {
        // The crate acknowledges nothing before it has seen GET_FEATURES and the protocol features.
        self.ask_number(request::GET_FEATURES, None)?;
        let protocol = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS;
        self.ask_number(request::SET_PROTOCOL_FEATURES, Some(protocol))?;
        self.ask_number(request::SET_OWNER, None)?;
        self.ask_number(request::SET_FEATURES, Some(features::PROTOCOL_FEATURES))
    }

    fn ask_number(&mut self, code: u32, value: Option<u64>) -> Result<(), WorkerError> {
        let body = value.map(|v| v.to_ne_bytes().to_vec()).unwrap_or_default();
        self.ask(&Request { code, body, files: Vec::new() }).map(drop)
    }

    /// One request, one answer.
    ///
    /// # Errors
    /// [`WorkerError`]: it is dead or as good as dead.
    pub fn ask(&mut self, asked: &Request) -> Result<Vec<u8>, WorkerError> {
        let has_answer = matches!(asked.code, request::GET_FEATURES | request::GET_VRING_BASE);
        let flags = if has_answer { 0 } else { NEED_REPLY };
        let files: Vec<BorrowedFd<'_>> = asked.files.iter().map(AsFd::as_fd).collect();
        let gone = |e| WorkerError::Gone(asked.code, e);
        message::send(&self.session, asked.code, flags, &asked.body, &files).map_err(|e| gone(e.into()))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.wait_readable(deadline).map_err(|_| WorkerError::Hangs(asked.code))?;
            match self.inbox.receive(&self.session).map_err(gone)? {
                Some(answer) if answer.request == asked.code && answer.flags & REPLY != 0 => {
                    return Ok(answer.body);
                }
                Some(_) | None => {}
            }
        }
    }

    fn wait_readable(&self, deadline: Instant) -> Result<(), Errno> {
        let rest = deadline.saturating_duration_since(Instant::now());
        let rest = Timespec::try_from(rest).map_err(|_| Errno::TIMEDOUT)?;
        let mut fds = [PollFd::new(&self.session, PollFlags::IN)];
        match poll(&mut fds, Some(&rest)) {
            Ok(0) => Err(Errno::TIMEDOUT),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Readable when the worker has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Hangs up and waits until the worker, having finished what it took, has ended; kills it if it does not.
    pub fn finish(self) {
        drop(self.session);
        let patience = Timespec::try_from(PATIENCE).ok();
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        if poll(&mut fds, patience.as_ref()) == Ok(0) {
            tracing::warn!("the worker did not end within {PATIENCE:?}: killed");
        }
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

fn private_connection() -> Result<(UnixListener, OwnedFd), Errno> {
    let stream =
        |flags| socket_with(AddressFamily::UNIX, SocketType::STREAM, flags | SocketFlags::CLOEXEC, None);
    let listener = stream(SocketFlags::empty())?;
    bind(&listener, &SocketAddrUnix::new_unnamed())?;
    listen(&listener, 1)?;
    let session = stream(SocketFlags::empty())?;
    connect(&session, &SocketAddrUnix::try_from(getsockname(&listener)?).map_err(|_| Errno::INVAL)?)?;
    Ok((UnixListener::from(listener), session))
}
