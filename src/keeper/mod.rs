//! The keeper: one front end's connection, from its first message to its last.
//!
//! It is a process of its own, small, with one thread; it never maps guest memory. It looks at every message
//! ([`gate`]), answers what needs no worker, and passes the rest on to the worker that it forked, one message
//! at a time. When the front end or the worker is gone, so is the keeper; the monitor then waits for the next
//! connection.
//!
//! ```text
//!   front end --- gate --- session --- worker (forked; maps memory, moves frames)
//!                              private socket
//! ```

pub mod brief;
pub mod door;
pub mod files;
pub mod gate;
pub mod memory;
pub mod message;
pub mod process;
pub mod worker;

use std::{
    fmt,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use epoll::{ControlOptions, Event, Events};

use brief::Brief;
use files::Descriptors;
use gate::{Gate, Request, Step};
use message::{Inbox, Message, REPLY, request::GET_VRING_BASE};
use process::Inherited;
use worker::{Worker, WorkerError};

/// How long a message that has begun may take to be complete.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);
/// How long an answer may take to be taken by the front end.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);

/// What woke the keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Token {
    FrontEnd = 0,
    WorkerEnded = 1,
    Termination = 2,
}

impl Token {
    const fn decode(data: u64) -> Option<Self> {
        match data {
            0 => Some(Self::FrontEnd),
            1 => Some(Self::WorkerEnded),
            2 => Some(Self::Termination),
            _ => None,
        }
    }
}

/// Serves the inherited connection until it ends, and says in the log what there is to say. False if its
/// worker died, or nothing could be served at all: descriptors missing, rights that cannot be given up.
#[must_use]
pub fn run(brief: Brief) -> bool {
    let port =
        tracing::error_span!("keeper", vm = brief.vm, label = brief.label, port = brief.port).entered();
    let end = begin(brief).and_then(|(keeper, termination)| keeper.serve(&termination));
    match &end {
        Ok(End::Fault(why)) => tracing::warn!("the connection is closed: {why:#}"),
        Ok(why) => tracing::info!("the connection ends: {why}"),
        Err(why) => tracing::warn!("the connection is closed: {why:#}"),
    }
    drop(port);
    // What the front end did wrong is no failure of ours.
    end.is_ok()
}

fn begin(brief: Brief) -> anyhow::Result<(Keeper, OwnedFd)> {
    let inherited = Inherited::take().context("a keeper is started by vmflow itself, never by hand")?;
    let _ = rustix::thread::set_name(&std::ffi::CString::new(brief.process_name('k'))?);
    let descriptors = Descriptors::open().context("/proc/self/fd")?;
    door::shut(brief.uid)?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_pid().unsigned_abs());
    if parent != Some(brief.monitor) {
        bail!("the monitor ended before its keeper had begun");
    }
    let termination = process::termination().context("signalfd")?;
    files::set_nonblocking(&inherited.policies).context("policy socket")?;
    let worker = Worker::start(&brief, &inherited)?;
    let gate = Gate::new(brief, descriptors);
    Ok((Keeper { front_end: inherited.front_end, gate, worker, inbox: Inbox::default() }, termination))
}

/// How a connection can end while all is well with us.
#[derive(Debug)]
enum End {
    /// The front end closed it.
    HungUp,
    /// The monitor wants it to end.
    Asked,
    /// The front end did what it must not, or does not take its answers.
    Fault(anyhow::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HungUp => f.write_str("the front end hung up"),
            Self::Asked => f.write_str("vmflow ends it"),
            Self::Fault(why) => why.fmt(f),
        }
    }
}

struct Keeper {
    front_end: OwnedFd,
    gate: Gate,
    worker: Worker,
    inbox: Inbox,
}

impl Keeper {
    fn serve(mut self, termination: &OwnedFd) -> anyhow::Result<End> {
        let timeout = Some(ANSWER_DEADLINE);
        rustix::net::sockopt::set_socket_timeout(
            &self.front_end,
            rustix::net::sockopt::Timeout::Send,
            timeout,
        )?;
        let end = match self.attend(termination) {
            Err(why) if !why.is::<WorkerError>() => Ok(End::Fault(why)),
            other => other,
        };
        self.stop_rings();
        self.worker.finish();
        end
    }

    /// Handles events until the connection is to end; says why.
    fn attend(&mut self, termination: &OwnedFd) -> anyhow::Result<End> {
        let epoll = epoll::create(true)?;
        let sources = [
            (self.front_end.as_raw_fd(), Token::FrontEnd),
            (self.worker.pidfd().as_raw_fd(), Token::WorkerEnded),
            (termination.as_raw_fd(), Token::Termination),
        ];
        for (fd, token) in sources {
            epoll::ctl(epoll, ControlOptions::EPOLL_CTL_ADD, fd, Event::new(Events::EPOLLIN, token as u64))?;
        }
        loop {
            let mut event = [Event::new(Events::empty(), 0)];
            let count = match epoll::wait(epoll, self.timeout_ms(), &mut event) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if count == 0 {
                bail!("a message was begun and not completed within {MESSAGE_DEADLINE:?}");
            }
            let data = event[0].data;
            match Token::decode(data) {
                Some(Token::FrontEnd) => match self.receive() {
                    Err(e) if matches!(e.downcast_ref(), Some(message::MessageError::Closed)) => {
                        return Ok(End::HungUp);
                    }
                    other => other?,
                },
                Some(Token::WorkerEnded) => return Err(WorkerError::Ended.into()),
                Some(Token::Termination) => return Ok(End::Asked),
                None => {}
            }
        }
    }

    /// -1 waits for ever: nothing is begun.
    fn timeout_ms(&self) -> i32 {
        let rest = |since: Instant| MESSAGE_DEADLINE.saturating_sub(since.elapsed()).as_millis();
        self.inbox.since().map_or(-1, |since| i32::try_from(rest(since)).unwrap_or(i32::MAX))
    }

    fn receive(&mut self) -> anyhow::Result<()> {
        while let Some(message) = self.inbox.receive(&self.front_end)? {
            self.handle(message)?;
        }
        Ok(())
    }

    fn handle(&mut self, message: Message) -> anyhow::Result<()> {
        tracing::trace!(
            request = message.request,
            flags = message.flags,
            size = message.body.len(),
            files = message.files.len(),
            "from the front end"
        );
        let (code, acknowledge) = (message.request, self.gate.wants_acknowledgement(&message));
        let in_order = match self.gate.look(message)? {
            Step::Answer(body) => return self.answer(code, &body),
            Step::Ask(request) => {
                let answer = self.worker.ask(&request)?;
                if code == GET_VRING_BASE {
                    return self.answer(code, &answer);
                }
                is_success(&answer)
            }
            Step::AskAll(requests) => {
                let mut all = true;
                for request in requests {
                    let answer = self.worker.ask(&request)?;
                    all &= request.code == GET_VRING_BASE || is_success(&answer);
                }
                all
            }
            Step::Acknowledge(in_order) => in_order,
        };
        if acknowledge { self.answer(code, &u64::from(!in_order).to_ne_bytes()) } else { Ok(()) }
    }

    fn answer(&self, code: u32, body: &[u8]) -> anyhow::Result<()> {
        message::send(self.front_end.as_fd(), code, REPLY, body, &[]).context("cannot answer the front end")
    }

    /// Stops every ring that runs: the batch in hand is finished, and nothing is taken any more.
    fn stop_rings(&mut self) {
        let rings: Vec<_> = self.gate.started().collect();
        for ring in rings {
            let stop = Request { code: GET_VRING_BASE, body: gate::state(ring, 0), files: Vec::new() };
            if self.worker.ask(&stop).is_err() {
                return; // it is gone: there is nothing to stop
            }
        }
    }
}

/// An acknowledgement's payload is 0 for success.
fn is_success(answer: &[u8]) -> bool {
    answer.len() == 8 && message::u64_at(answer, 0) == 0
}
