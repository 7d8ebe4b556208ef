//! One port: its tap, what is counted of it, and the keeper of whichever front end is connected.

use std::{
    cell::{Cell, RefCell},
    io,
    process::ExitStatus,
    rc::Rc,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tracing::Instrument;

use super::{
    connection::Connection,
    doorbell::{Doorbell, FrontEnd},
    tally::Tally,
};
use crate::{
    config,
    keeper::brief::Brief,
    policy::Policy,
    tap::{self, Queues},
};

/// How long to wait before the next connection is served, when keepers cannot be started.
const START_RETRY: Duration = Duration::from_secs(1);
/// Two connections of one port begin at least this far apart: a front end that comes and goes all the time
/// cannot keep the host busy with starting keepers.
const CONNECTION_SPACING: Duration = Duration::from_millis(50);
/// How long a port may take to end: more than it gives its keeper.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// A port that is set up.
#[derive(Debug)]
pub struct Port {
    /// Its settings.
    pub config: config::Port,
    /// What its keepers are told.
    pub brief: Brief,
    pub(super) doorbell: Doorbell,
    pub(super) tap: Queues,
    /// What is counted of it.
    pub tally: Rc<Tally>,
    pub(super) policy: watch::Sender<Policy>,
    pub(super) acknowledged: watch::Sender<Acknowledged>,
    connected: Cell<bool>,
    stop: watch::Sender<bool>,
    /// Serves its front ends, from its start to its end.
    task: RefCell<Option<JoinHandle<()>>>,
}

/// How far the port's worker is with its policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledged {
    /// There is no worker: the next one passes nothing before it has the policy of then.
    NoWorker,
    /// There is one, without a policy yet: it passes nothing.
    Nothing,
    /// It passes nothing under an older policy than this generation.
    Generation(u64),
}

impl Acknowledged {
    /// True if no frame passes under an older policy.
    #[must_use]
    pub const fn covers(self, generation: u64) -> bool {
        match self {
            Self::NoWorker | Self::Nothing => true,
            Self::Generation(g) => g >= generation,
        }
    }
}

/// What a port is made of.
#[derive(Debug)]
pub struct Parts {
    /// Its settings.
    pub config: config::Port,
    /// What its keepers are told.
    pub brief: Brief,
    /// Where its front ends come from.
    pub doorbell: Doorbell,
    /// Its tap, set up.
    pub tap: Queues,
    /// What is counted of it: goes on where it was there before.
    pub tally: Rc<Tally>,
    /// Its first policy.
    pub policy: Policy,
}

impl Port {
    /// A port that serves nobody yet: its tap may be another port's until then.
    #[must_use]
    pub fn new(Parts { config, brief, doorbell, tap, tally, policy }: Parts) -> Self {
        Self {
            config,
            brief,
            doorbell,
            tap,
            tally,
            policy: watch::Sender::new(policy),
            acknowledged: watch::Sender::new(Acknowledged::NoWorker),
            connected: Cell::new(false),
            stop: watch::Sender::new(false),
            task: RefCell::new(None),
        }
    }

    /// Begins to serve front ends. To be called inside a tokio `LocalSet`.
    pub fn start(self: &Rc<Self>) {
        let port = Rc::clone(self);
        let serving = tokio::task::spawn_local(async move { port.serve(port.stop.subscribe()).await });
        self.task.replace(Some(serving));
    }

    /// Ends in good order, with the front end that is connected.
    pub async fn end(&self) {
        self.stop.send_replace(true);
        let Some(mut task) = self.task.take() else { return };
        if timeout(END_DEADLINE, &mut task).await.is_err() {
            let Brief { vm, label, port, .. } = &self.brief;
            tracing::error!(vm, label, port, "the port did not end within {END_DEADLINE:?}: killed");
            task.abort();
            let _ = task.await;
        }
    }

    /// Serves one front end after the other until `stop` says true. What is logged meanwhile is about the port.
    async fn serve(&self, stop: watch::Receiver<bool>) {
        let Brief { vm, label, port, .. } = &self.brief;
        let about = tracing::error_span!("port", vm, label, port);
        self.serve_all(stop).instrument(about).await;
    }

    async fn serve_all(&self, mut stop: watch::Receiver<bool>) {
        self.connected(false);
        let mut next = None;
        loop {
            let front_end = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                front_end = self.next(next.take()) => front_end,
            };
            let spacing = Instant::now() + CONNECTION_SPACING;
            self.connected(true);
            match self.attend(front_end, stop.clone()).await {
                Ok(waiting) => next = waiting,
                Err(e) => {
                    tracing::error!("cannot serve a front end: {e}");
                    tokio::time::sleep(START_RETRY).await;
                }
            }
            self.connected(false);
            sleep_until(spacing).await;
        }
    }

    async fn next(&self, waiting: Option<FrontEnd>) -> FrontEnd {
        match waiting {
            Some(front_end) => front_end,
            None => self.another().await,
        }
    }

    /// Waits for a front end that may be served.
    pub(super) async fn another(&self) -> FrontEnd {
        self.doorbell.ring(self.config.peer, || self.tally.refused.count()).await
    }

    /// The tap's carrier follows the front end.
    fn connected(&self, connected: bool) {
        self.connected.set(connected);
        if let Err(e) = tap::set_carrier(self.tap.first(), connected) {
            tracing::debug!("carrier: {e}");
        }
    }

    async fn attend(&self, front_end: FrontEnd, stop: watch::Receiver<bool>) -> io::Result<Option<FrontEnd>> {
        self.tally.connections.count();
        let FrontEnd { pid, uid, .. } = &front_end;
        tracing::info!(pid, uid, "a front end is connected");
        Connection::start(self, front_end)?.serve(stop).await
    }

    /// A keeper that fails, or is killed, has lost its worker; the next connection has a new one.
    pub(super) fn keeper_ended(&self, status: ExitStatus) {
        if status.success() {
            tracing::info!("the front end is disconnected");
        } else {
            self.tally.keeper_deaths.count();
            tracing::warn!("keeper and worker died ({status}): the VMM may reconnect");
        }
    }

    /// A front end was not let in.
    pub(super) fn refuse(&self, why: &str) {
        self.tally.refused.count();
        tracing::warn!("a second front end was refused: {why}");
    }

    /// A policy is to be in force: if it is another one, the worker of now, and each one after it, gets it.
    pub fn announce(&self, policy: Policy) {
        self.policy.send_if_modified(|now| std::mem::replace(now, policy) != policy);
    }

    /// Waits until no frame passes under a policy older than this generation. False if the worker did not say
    /// so in time.
    pub async fn enforced(&self, generation: u64, patience: Duration) -> bool {
        let mut acknowledged = self.acknowledged.subscribe();
        let covered = acknowledged.wait_for(|a| a.covers(generation));
        matches!(tokio::time::timeout(patience, covered).await, Ok(Ok(_)))
    }

    /// True if it listens at the socket that another one wants to listen at.
    #[must_use]
    pub fn has_socket_of(&self, other: &config::Port) -> bool {
        let listen = [self.config.mode, other.mode].iter().all(|mode| *mode == config::Mode::Server);
        listen && self.config.socket == other.socket
    }

    /// True if its tap is the one that another one wants.
    #[must_use]
    pub fn has_tap_of(&self, other: &config::Port) -> bool {
        (&self.config.netns, &self.config.tap) == (&other.netns, &other.tap)
    }

    /// True if it is the same port of the same VM, with other settings.
    #[must_use]
    pub fn is_successor_of(&self, before: &Self) -> bool {
        (self.brief.label, self.brief.port) == (before.brief.label, before.brief.port)
    }

    /// What is wrong with the tap, if anything. One that takes no frames for a moment, since its queue is full, is
    /// taken for one that is down.
    #[must_use]
    pub fn tap_trouble(&self) -> Option<&'static str> {
        let mut tap = [PollFd::new(self.tap.first(), PollFlags::OUT)];
        poll(&mut tap, Some(&Timespec::default())).ok()?;
        let found = tap[0].revents();
        if found.contains(PollFlags::ERR) {
            Some("the tap is gone")
        } else if found.contains(PollFlags::OUT) {
            None
        } else {
            Some("the tap takes no frames: is it up?")
        }
    }

    /// True if the worker has yet to take the policy that is to be in force.
    #[must_use]
    pub fn awaits_policy(&self) -> bool {
        match *self.acknowledged.borrow() {
            Acknowledged::NoWorker => false,
            Acknowledged::Nothing => true,
            Acknowledged::Generation(generation) => generation < self.policy.borrow().generation,
        }
    }

    /// True while a front end is connected.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.connected.get()
    }
}
