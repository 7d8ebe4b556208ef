//! The keeper: one front end's connection, from its first message to its last.
//!
//! It is a process of its own, small, with one thread; it never maps guest memory. It looks at every message
//! ([`gate`]), answers what needs no worker, and passes the rest on to the worker that it forked, one message
//! at a time. What the worker has acknowledged it remembers ([`session`]): when the worker dies, or hangs
//! ([`watch`]), it forks another one and tells it everything again. The front end notices nothing, unless one
//! worker after the other dies ([`deaths`]). When the front end is gone, so is the keeper; the monitor then waits
//! for the next connection.
//!
//! ```text
//!   front end --- gate --- session --- worker (forked; maps memory, moves frames)
//!                              private socket
//! ```

pub mod brief;
pub mod deaths;
pub mod door;
pub mod files;
pub mod gate;
pub mod memory;
pub mod message;
pub mod process;
pub mod session;
pub mod watch;
pub mod worker;

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    time::{ClockId, clock_gettime},
};

use crate::ledger::Ledger;
use brief::Brief;
use deaths::{Cause, Deaths};
use files::Descriptors;
use gate::{Gate, Request, Step};
use message::{
    Inbox, Message, REPLY,
    request::{ADD_MEM_REG, GET_VRING_BASE, SET_MEM_TABLE},
};
use process::Inherited;
use watch::{Finding, Watch};
use worker::{Worker, WorkerError};

/// How long a message that has begun may take to be complete.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);
/// How long an answer may take to be taken by the front end.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);

/// What woke the keeper, in the order in which it is dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    WorkerEnded,
    Termination,
    FrontEnd,
    /// A kick of this queue pair, or its queue of the tap, is readable: something waits for the worker.
    Work(usize),
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
    let inherited =
        Inherited::take(brief.queue_pairs).context("a keeper is started by vmflow itself, never by hand")?;
    let _ = rustix::thread::set_name(&std::ffi::CString::new(brief.process_name('k'))?);
    let descriptors = Descriptors::open().context("/proc/self/fd")?;
    door::shut(brief.uid)?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_pid().unsigned_abs());
    if parent != Some(brief.monitor) {
        bail!("the monitor ended before its keeper had begun");
    }
    let termination = process::termination().context("signalfd")?;
    files::set_nonblocking(&inherited.policies).context("policy socket")?;
    let ledger = Ledger::open(&inherited.ledger, brief.queue_pairs)?;
    let gate = Gate::new(brief.clone(), descriptors);
    let connection = connection_number();
    let worker = Worker::fork(&brief, &inherited, connection)?;
    let watches = vec![Watch::default(); brief.queue_pairs.into()];
    let keeper = Keeper {
        brief,
        inherited,
        ledger,
        connection,
        gate,
        worker,
        inbox: Inbox::default(),
        deaths: Deaths::default(),
        watches,
        is_whole: true,
    };
    Ok((keeper, termination))
}

/// A number that no other connection of this port has while the ledger lives: nanoseconds since boot.
fn connection_number() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
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
    brief: Brief,
    inherited: Inherited,
    ledger: Ledger,
    /// Tells the rings of this connection from those of another in the ledger.
    connection: u64,
    gate: Gate,
    worker: Worker,
    inbox: Inbox,
    deaths: Deaths,
    /// One for each queue pair.
    watches: Vec<Watch>,
    /// The worker was told everything. It was not where a ring's memory is missing.
    is_whole: bool,
}

impl Keeper {
    fn serve(mut self, termination: &OwnedFd) -> anyhow::Result<End> {
        let timeout = Some(ANSWER_DEADLINE);
        rustix::net::sockopt::set_socket_timeout(
            &self.inherited.front_end,
            rustix::net::sockopt::Timeout::Send,
            timeout,
        )?;
        let end = match self.attend(termination) {
            Err(why) if is_fault_of_front_end(&why) => Ok(End::Fault(why)),
            other => other,
        };
        self.stop_rings();
        self.worker.finish();
        end
    }

    /// Handles events until the connection is to end; says why.
    fn attend(&mut self, termination: &OwnedFd) -> anyhow::Result<End> {
        // The first worker comes up like any other.
        if let Err(why) = self.worker.open() {
            self.replace_worker(why)?;
        }
        loop {
            for event in self.wait(termination)? {
                match event {
                    Event::WorkerEnded => self.replace_worker(WorkerError::Ended)?,
                    Event::Termination => return Ok(End::Asked),
                    Event::FrontEnd => match self.receive() {
                        Err(e) if matches!(e.downcast_ref(), Some(message::MessageError::Closed)) => {
                            return Ok(End::HungUp);
                        }
                        other => other?,
                    },
                    Event::Work(pair) => self.wake_watch(pair),
                }
            }
            self.look_after_worker()?;
        }
    }

    /// Waits for something to do.
    fn wait(&self, termination: &OwnedFd) -> anyhow::Result<Vec<Event>> {
        let mut sources = vec![
            (Event::WorkerEnded, self.worker.pidfd()),
            (Event::Termination, termination.as_fd()),
            (Event::FrontEnd, self.inherited.front_end.as_fd()),
        ];
        let asleep = self.watches.iter().enumerate().filter(|(_, watch)| **watch == Watch::Asleep);
        sources.extend(asleep.flat_map(|(pair, _)| self.work(pair).map(move |fd| (Event::Work(pair), fd))));
        let mut fds: Vec<_> = sources.iter().map(|(_, fd)| readable(*fd)).collect();
        let until = self.deadlines().min();
        loop {
            let rest = until.map(|until| until.saturating_duration_since(Instant::now()));
            let rest = rest.and_then(|rest| Timespec::try_from(rest).ok());
            match poll(&mut fds, rest.as_ref()) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if self.inbox.since().is_some_and(|since| since.elapsed() >= MESSAGE_DEADLINE) {
            bail!("a message was begun and not completed within {MESSAGE_DEADLINE:?}");
        }
        let ready = sources.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|((event, _), _)| *event).collect())
    }

    /// What is readable when something waits for the thread of a queue pair: kicks, and its queue of the tap.
    fn work(&self, pair: usize) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.gate.session().kicks(pair).chain(self.inherited.tap.get(pair).map(AsFd::as_fd))
    }

    /// When to wake up at the latest: for the rest of a message, and to look after the worker.
    fn deadlines(&self) -> impl Iterator<Item = Instant> {
        let message = self.inbox.since().map(|since| since + MESSAGE_DEADLINE);
        message.into_iter().chain(self.watches.iter().filter_map(Watch::next))
    }

    fn look_after_worker(&mut self) -> Result<(), WorkerError> {
        for pair in 0..self.watches.len() {
            let mut watch = self.watches[pair];
            let finding = watch.look(Instant::now(), self.pulse(pair), || self.something_waits(pair));
            self.watches[pair] = watch;
            match finding {
                Finding::Fine => {}
                Finding::Knock => self.worker.knock(pair),
                Finding::Hangs => return self.replace_worker(WorkerError::Hangs),
            }
        }
        Ok(())
    }

    fn pulse(&self, pair: usize) -> u64 {
        u16::try_from(pair).map_or(0, |pair| self.ledger.pulse(pair))
    }

    fn wake_watch(&mut self, pair: usize) {
        self.watches[pair] = Watch::woken(self.pulse(pair), Instant::now());
    }

    /// True if a kick, or the tap, is readable.
    fn something_waits(&self, pair: usize) -> bool {
        let mut fds: Vec<_> = self.work(pair).map(readable).collect();
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// The worker is gone, or of no use: another one, and the session again, until one stays.
    fn replace_worker(&mut self, why: WorkerError) -> Result<(), WorkerError> {
        let mut why = why;
        loop {
            let (cause, now) = (self.worker.bury(&why)?, Instant::now());
            self.ledger.count_worker_death();
            if let Some(deaths) = self.deaths.to_be_said(now) {
                let by = if cause == Cause::Killed { ", killed" } else { "" };
                tracing::warn!(deaths, "{why}{by}: another one takes over");
            }
            if let Err(too_many) = self.deaths.count(cause, now) {
                self.ledger.count_connection_given_up();
                return Err(too_many.into());
            }
            self.worker = Worker::fork(&self.brief, &self.inherited, self.connection)?;
            match self.worker.open().and_then(|()| self.replay()) {
                Ok(is_whole) => {
                    self.is_whole = is_whole;
                    self.deaths.revived();
                    (0..self.watches.len()).for_each(|pair| self.wake_watch(pair));
                    return Ok(());
                }
                Err(again) => why = again,
            }
        }
    }

    fn replay(&mut self) -> Result<bool, WorkerError> {
        let Self { gate, worker, .. } = self;
        gate.session().replay(&mut |code, body, files| worker.ask(code, body, files).map(drop))
    }

    fn receive(&mut self) -> anyhow::Result<()> {
        while let Some(message) = self.inbox.receive(&self.inherited.front_end)? {
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
                let answer = self.ask(request)?;
                if code == GET_VRING_BASE {
                    return self.answer(code, &answer);
                }
                is_success(&answer)
            }
            Step::AskAll(requests) => {
                let mut all = true;
                for request in requests {
                    let has_answer = request.code == GET_VRING_BASE;
                    let answer = self.ask(request)?;
                    all &= has_answer || is_success(&answer);
                }
                all
            }
            Step::Acknowledge(in_order) => in_order,
        };
        if acknowledge { self.answer(code, &u64::from(!in_order).to_ne_bytes()) } else { Ok(()) }
    }

    /// Asks the worker, or the one after it, and keeps what was acknowledged. (Each request is harmless twice.)
    fn ask(&mut self, asked: Request) -> Result<Vec<u8>, WorkerError> {
        let answer = loop {
            let files: Vec<_> = asked.files.iter().map(AsFd::as_fd).collect();
            match self.worker.ask(asked.code, &asked.body, &files) {
                Ok(answer) => break answer,
                Err(why) => self.replace_worker(why)?,
            }
        };
        let code = asked.code;
        if code == GET_VRING_BASE || is_success(&answer) {
            self.gate.remember(asked);
        }
        if !self.is_whole && (code == SET_MEM_TABLE || code == ADD_MEM_REG) {
            let Self { gate, worker, .. } = self;
            let again =
                gate.session().replay_rings(&mut |code, body, files| worker.ask(code, body, files).map(drop));
            match again {
                Ok(is_whole) => self.is_whole = is_whole,
                Err(why) => self.replace_worker(why)?,
            }
        }
        Ok(answer)
    }

    fn answer(&self, code: u32, body: &[u8]) -> anyhow::Result<()> {
        message::send(self.inherited.front_end.as_fd(), code, REPLY, body, &[])
            .context("cannot answer the front end")
    }

    /// Stops every ring that runs: the batch in hand is finished, and nothing is taken any more.
    fn stop_rings(&mut self) {
        let rings: Vec<_> = self.gate.started().collect();
        for ring in rings {
            if self.worker.ask(GET_VRING_BASE, &gate::state(ring, 0), &[]).is_err() {
                return; // it is gone: there is nothing to stop
            }
        }
    }
}

/// True unless it was the worker that failed; one that breaks every worker is at fault itself.
fn is_fault_of_front_end(why: &anyhow::Error) -> bool {
    why.downcast_ref::<WorkerError>().is_none_or(|why| matches!(why, WorkerError::TooMany(_)))
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::from_borrowed_fd(fd, PollFlags::IN)
}

/// An acknowledgement's payload is 0 for success.
fn is_success(answer: &[u8]) -> bool {
    answer.len() == 8 && message::u64_at(answer, 0) == 0
}
