//! One port: its tap, its ledger, and the keeper of whichever front end is connected.

use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::OwnedFd,
    process::ExitStatus,
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    connection::Connection,
    doorbell::{Doorbell, FrontEnd},
};
use crate::{
    keeper::brief::Brief,
    ledger::{Known, Ledger, Part, recover},
    policy::Policy,
    tap,
};

/// How long to wait before the next connection is served, when keepers cannot be started.
const START_RETRY: Duration = Duration::from_secs(1);
/// Two connections of one port begin at least this far apart: a front end that comes and goes all the time
/// cannot keep the host busy with starting keepers.
const CONNECTION_SPACING: Duration = Duration::from_millis(50);

/// A port that is set up.
#[derive(Debug)]
pub struct Port {
    /// What its keepers are told.
    pub brief: Brief,
    pub(super) doorbell: Doorbell,
    peer: Option<u32>,
    pub(super) tap: OwnedFd,
    pub(super) ledger_file: OwnedFd,
    ledger: Ledger,
    known: RefCell<[Known; 2]>,
    pub(super) policy: watch::Sender<Policy>,
    pub(super) acknowledged: watch::Sender<Acknowledged>,
    connected: Cell<bool>,
    connections: Cell<u64>,
    refused: Cell<u64>,
    keeper_deaths: Cell<u64>,
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
    /// What its keepers are told.
    pub brief: Brief,
    /// Where its front ends come from.
    pub doorbell: Doorbell,
    /// The user that they must run as.
    pub peer: Option<u32>,
    /// Its tap, set up.
    pub tap: OwnedFd,
    /// Its first policy.
    pub policy: Policy,
}

impl Port {
    /// A port without a front end.
    ///
    /// # Errors
    /// When there is no memory for its ledger.
    pub fn new(parts: Parts) -> Result<Self, crate::ledger::LedgerError> {
        let (ledger, ledger_file) = Ledger::create(parts.brief.queue_pairs)?;
        let _ = tap::set_carrier(&parts.tap, false);
        Ok(Self {
            brief: parts.brief,
            doorbell: parts.doorbell,
            peer: parts.peer,
            tap: parts.tap,
            ledger,
            ledger_file,
            known: RefCell::new([Known::new(Part::receive(0)), Known::new(Part::transmit(0))]),
            policy: watch::Sender::new(parts.policy),
            acknowledged: watch::Sender::new(Acknowledged::NoWorker),
            connected: Cell::new(false),
            connections: Cell::new(0),
            refused: Cell::new(0),
            keeper_deaths: Cell::new(0),
        })
    }

    /// Serves one front end after the other until `stop` says true.
    pub async fn serve(&self, mut stop: watch::Receiver<bool>) {
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
                    tracing::error!(vm = self.brief.vm, "cannot serve a front end: {e}");
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
        self.doorbell.ring(self.peer, || self.refused.set(self.refused.get() + 1)).await
    }

    /// The tap's carrier follows the front end.
    fn connected(&self, connected: bool) {
        self.connected.set(connected);
        if let Err(e) = tap::set_carrier(&self.tap, connected) {
            tracing::debug!(vm = self.brief.vm, "carrier: {e}");
        }
    }

    async fn attend(&self, front_end: FrontEnd, stop: watch::Receiver<bool>) -> io::Result<Option<FrontEnd>> {
        self.connections.set(self.connections.get() + 1);
        let (Brief { vm, label, port, .. }, FrontEnd { pid, uid, .. }) = (&self.brief, &front_end);
        tracing::info!(vm, label, port, pid, uid, "a front end is connected");
        Connection::start(self, front_end)?.serve(stop).await
    }

    /// A keeper that fails, or is killed, has lost its worker; the next connection has a new one.
    pub(super) fn keeper_ended(&self, status: ExitStatus) {
        let Brief { vm, label, port, .. } = &self.brief;
        if status.success() {
            tracing::info!(vm, label, port, "the front end is disconnected");
        } else {
            self.keeper_deaths.set(self.keeper_deaths.get() + 1);
            tracing::warn!(vm, label, port, "keeper and worker died ({status}): the VMM may reconnect");
        }
    }

    /// Keeper and worker are gone: what they left unfinished is counted, since no ring goes on.
    pub(super) fn close_accounts(&self) {
        recover::abandon_all(&self.ledger);
    }

    /// A front end was not let in.
    pub(super) fn refuse(&self, why: &str) {
        self.refused.set(self.refused.get() + 1);
        tracing::warn!(vm = self.brief.vm, "a second front end was refused: {why}");
    }

    /// Another policy is to be in force: the worker of now, and each one after it, gets it.
    pub fn announce(&self, policy: Policy) {
        self.policy.send_replace(policy);
    }

    /// Waits until no frame passes under a policy older than this generation. False if the worker did not say
    /// so in time.
    pub async fn enforced(&self, generation: u64, patience: Duration) -> bool {
        let mut acknowledged = self.acknowledged.subscribe();
        let covered = acknowledged.wait_for(|a| a.covers(generation));
        matches!(tokio::time::timeout(patience, covered).await, Ok(Ok(_)))
    }

    /// What was counted, read from the ledger now: receive, transmit.
    pub fn counted(&self) -> [Known; 2] {
        let mut known = self.known.borrow_mut();
        for direction in known.iter_mut() {
            direction.refresh(&self.ledger);
        }
        known.clone()
    }

    /// True while a front end is connected.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.connected.get()
    }
    /// Front ends served since the start.
    #[must_use]
    pub const fn connections(&self) -> u64 {
        self.connections.get()
    }
    /// Workers that died: those that their keepers replaced, and those that died with their keepers.
    #[must_use]
    pub fn worker_restarts(&self) -> u64 {
        self.ledger.worker_deaths() + self.keeper_deaths.get()
    }
    /// Connections that keepers gave up because one worker after the other died.
    #[must_use]
    pub fn connections_given_up(&self) -> u64 {
        self.ledger.connections_given_up()
    }
    /// Front ends refused: of another user, or because one was connected.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.refused.get()
    }
}
