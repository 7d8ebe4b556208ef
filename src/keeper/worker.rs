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
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
        socket_with,
    },
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};

use super::{
    brief::Brief,
    deaths::{Cause, TooMany},
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
/// How long a worker that hung up may take to end: it gives back its memory first.
const DYING: Duration = Duration::from_secs(1);
/// How long a killed worker may take to be gone: the kernel gives back a gigabyte in some 10 ms.
const BURIAL: Duration = Duration::from_secs(60);

/// The worker of this keeper.
#[derive(Debug)]
pub struct Worker {
    pidfd: OwnedFd,
    session: OwnedFd,
    inbox: Inbox,
    /// One for each queue pair.
    again: Vec<OwnedFd>,
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
    Silent(u32),
    /// It does nothing although something waits for it.
    #[error("the worker hangs")]
    Hangs,
    /// It was killed, and is still there.
    #[error("the worker was killed and did not end within {BURIAL:?}")]
    Immortal,
    /// There is to be no other.
    #[error(transparent)]
    TooMany(#[from] TooMany),
}

impl WorkerError {
    /// True if the worker does not do what it should, though it may be alive.
    const fn is_hang(&self) -> bool {
        matches!(self, Self::Silent(_) | Self::Hangs)
    }
}

impl Worker {
    /// Forks the worker. The listener has an address of the kernel's choice in our own empty network namespace,
    /// and is connected before the fork: nobody else can be first.
    ///
    /// # Errors
    /// [`WorkerError::Start`].
    pub fn fork(brief: &Brief, inherited: &Inherited, session: u64) -> Result<Self, WorkerError> {
        let (listener, connection) = private_connection().map_err(std::io::Error::from)?;
        let event = |_| eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let again: Vec<_> =
            (0..brief.queue_pairs).map(event).collect::<Result<_, _>>().map_err(std::io::Error::from)?;
        let mut keep = vec![listener.as_fd(), inherited.ledger.as_fd(), inherited.policies.as_fd()];
        keep.extend(again.iter().chain(&inherited.tap).map(AsFd::as_fd));
        let orders = worker::Orders { brief, inherited, listener: listener.as_fd(), again: &again, session };
        let pidfd = process::fork(&keep, || worker::run(&orders))?;
        Ok(Self { pidfd, session: connection, inbox: Inbox::default(), again })
    }

    /// The opening of the session, the same for every worker.
    ///
    /// # Errors
    /// [`WorkerError`]: it is dead or as good as dead.
    pub fn open(&mut self) -> Result<(), WorkerError> {
        // The crate acknowledges nothing before it has seen GET_FEATURES and the protocol features.
        self.ask(request::GET_FEATURES, &[], &[])?;
        let protocol = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS;
        self.ask(request::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        self.ask(request::SET_OWNER, &[], &[])?;
        self.ask(request::SET_FEATURES, &features::PROTOCOL_FEATURES.to_ne_bytes(), &[]).map(drop)
    }

    /// One request, one answer.
    ///
    /// # Errors
    /// [`WorkerError`]: it is dead or as good as dead.
    pub fn ask(&mut self, code: u32, body: &[u8], files: &[BorrowedFd<'_>]) -> Result<Vec<u8>, WorkerError> {
        let has_answer = matches!(code, request::GET_FEATURES | request::GET_VRING_BASE);
        let flags = if has_answer { 0 } else { NEED_REPLY };
        let gone = |e| WorkerError::Gone(code, e);
        message::send(&self.session, code, flags, body, files).map_err(|e| gone(e.into()))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.wait_readable(deadline).map_err(|_| WorkerError::Silent(code))?;
            match self.inbox.receive(&self.session).map_err(gone)? {
                Some(answer) if answer.request == code && answer.flags & REPLY != 0 => {
                    return Ok(answer.body);
                }
                Some(_) | None => {}
            }
        }
    }

    /// Wakes the thread of a queue pair.
    pub fn knock(&self, pair: usize) {
        if let Some(again) = self.again.get(pair) {
            let _ = rustix::io::write(again, &1_u64.to_ne_bytes());
        }
    }

    /// Ends it, whatever it does, and waits until all its threads are gone and its memory is given back: only
    /// then may another one start. `why` it is of no use any more.
    ///
    /// # Errors
    /// [`WorkerError::Immortal`].
    pub fn bury(&self, why: &WorkerError) -> Result<Cause, WorkerError> {
        let by_itself = !why.is_hang() && has_ended(&self.pidfd, DYING);
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        if !has_ended(&self.pidfd, BURIAL) {
            return Err(WorkerError::Immortal);
        }
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED).ok().flatten();
        let signal = status.and_then(|status| status.terminating_signal());
        let killed = by_itself && signal == Some(Signal::KILL.as_raw());
        Ok(if killed { Cause::Killed } else { Cause::Own })
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
        if !has_ended(&self.pidfd, PATIENCE) {
            tracing::warn!("the worker did not end within {PATIENCE:?}: killed");
        }
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

/// Waits for a process's end.
fn has_ended(pidfd: &OwnedFd, within: Duration) -> bool {
    let until = Instant::now() + within;
    loop {
        let rest = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], rest.as_ref()) {
            Err(Errno::INTR) => {}
            ended => return ended.is_ok_and(|count| count > 0),
        }
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
