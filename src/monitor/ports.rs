//! One port: its tap, its ledger, and the keeper of whichever front end is connected.

use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::OwnedFd,
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    doorbell::{Doorbell, FrontEnd},
    spawn::{KeeperProcess, PolicySocket},
};
use crate::{
    keeper::{brief::Brief, process::Inherited},
    ledger::{Known, Ledger, Part},
    policy::{
        Policy,
        handover::{self, Packet},
    },
    tap,
};

/// A second front end may come before the first one's keeper has noticed that the first is gone (a VMM that
/// restarts): it waits this long, and is then refused.
const SECOND_WAITS: Duration = Duration::from_millis(500);
/// How long a keeper may take to end in good order.
const END_DEADLINE: Duration = Duration::from_secs(5);
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
    doorbell: Doorbell,
    peer: Option<u32>,
    tap: OwnedFd,
    ledger: Ledger,
    ledger_file: OwnedFd,
    known: RefCell<[Known; 2]>,
    policy: watch::Sender<Policy>,
    /// The generation that the worker acknowledged; everything is acknowledged while there is no worker.
    acknowledged: watch::Sender<Acknowledged>,
    connected: Cell<bool>,
    connections: Cell<u64>,
    refused: Cell<u64>,
    worker_restarts: Cell<u64>,
}

/// How far the port's worker is with its policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledged {
    /// There is no worker: the next one passes nothing before it has the policy of then.
    NoWorker,
    /// There is one, without a policy yet: it passes nothing.
    Nothing,
    /// It has this generation.
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
            worker_restarts: Cell::new(0),
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
            None => self.doorbell.ring(self.peer).await,
        }
    }

    /// The tap's carrier follows the front end.
    fn connected(&self, connected: bool) {
        self.connected.set(connected);
        if let Err(e) = tap::set_carrier(&self.tap, connected) {
            tracing::debug!(vm = self.brief.vm, "carrier: {e}");
        }
    }

    /// One connection, from its keeper's start to its end; gives a front end that came meanwhile.
    async fn attend(
        &self,
        front_end: FrontEnd,
        mut stop: watch::Receiver<bool>,
    ) -> io::Result<Option<FrontEnd>> {
        self.connections.set(self.connections.get() + 1);
        tracing::info!(
            vm = self.brief.vm,
            label = self.brief.label,
            port = self.brief.port,
            pid = front_end.pid,
            uid = front_end.uid,
            "a front end is connected"
        );
        let (ours, theirs) = handover::pair()?;
        let inherited = Inherited {
            front_end: front_end.connection,
            tap: self.tap.try_clone()?,
            ledger: self.ledger_file.try_clone()?,
            policies: theirs,
        };
        let mut keeper = KeeperProcess::start(&self.brief, inherited)?;
        self.acknowledged.send_replace(Acknowledged::Nothing);
        let policies = PolicySocket::new(ours)?;
        let mut policy = self.policy.subscribe();
        let mut ready = false;
        let mut second: Option<(FrontEnd, Instant)> = None;
        let mut deadline = None;
        loop {
            let second_expires = second.as_ref().map(|(_, at)| *at);
            tokio::select! {
                status = keeper.ended() => {
                    self.log_end(status?);
                    break;
                }
                packet = policies.receive() => match packet {
                    Ok(Some(packet)) => ready |= self.answer(packet, &policies, &mut policy),
                    // The worker is gone; its keeper will follow.
                    Ok(None) | Err(_) => {
                        let status = keeper.ended().await?;
                        self.log_end(status);
                        break;
                    }
                },
                changed = policy.changed(), if ready => {
                    if changed.is_ok() {
                        self.hand_over(&policies, &mut policy);
                    }
                }
                another = self.doorbell.ring(self.peer), if second.is_none() && self.listens() => {
                    second = Some((another, Instant::now() + SECOND_WAITS));
                }
                () = at(second_expires) => {
                    self.refused.set(self.refused.get() + 1);
                    second = None;
                    tracing::warn!(vm = self.brief.vm, "a second front end was refused: one is connected");
                }
                _ = stop.wait_for(|stop| *stop), if deadline.is_none() => {
                    keeper.terminate();
                    deadline = Some(Instant::now() + END_DEADLINE);
                }
                () = at(deadline) => {
                    tracing::warn!(vm = self.brief.vm, "the keeper did not end in time: killed");
                    keeper.kill();
                    deadline = None;
                }
            }
        }
        // A successor starts only after keeper and worker are gone.
        while let Ok(Some(_)) = policies.receive().await {}
        keeper.reap_worker();
        self.acknowledged.send_replace(Acknowledged::NoWorker);
        Ok(second.map(|(front_end, _)| front_end))
    }

    const fn listens(&self) -> bool {
        matches!(self.doorbell, Doorbell::Server(_))
    }

    /// Answers a worker's packet. True once the worker has had its first policy.
    fn answer(&self, packet: Packet, socket: &PolicySocket, policy: &mut watch::Receiver<Policy>) -> bool {
        match packet {
            Packet::Ready => {
                self.hand_over(socket, policy);
                return true;
            }
            Packet::Acknowledged(generation) => {
                self.acknowledged.send_replace(Acknowledged::Generation(generation));
            }
            Packet::Refused(generation) => {
                tracing::error!(vm = self.brief.vm, generation, "the worker refused its policy");
            }
            Packet::Policy(_) => {}
        }
        false
    }

    fn hand_over(&self, socket: &PolicySocket, policy: &mut watch::Receiver<Policy>) {
        let policy = *policy.borrow_and_update();
        if let Err(e) = socket.send(&policy) {
            tracing::error!(vm = self.brief.vm, "cannot hand over the policy: {e}");
        }
    }

    /// A keeper that fails, or is killed, has lost its worker; the next connection has a new one.
    fn log_end(&self, status: std::process::ExitStatus) {
        let Brief { vm, label, port, .. } = &self.brief;
        if status.success() {
            tracing::info!(vm, label, port, "the front end is disconnected");
        } else {
            self.worker_restarts.set(self.worker_restarts.get() + 1);
            tracing::warn!(vm, label, port, "keeper and worker died ({status}): the VMM may reconnect");
        }
    }

    /// Puts another policy in force; waits until no frame passes under an older one. False if the worker did
    /// not say so in time.
    pub async fn enforce(&self, policy: Policy, patience: Duration) -> bool {
        self.policy.send_replace(policy);
        let mut acknowledged = self.acknowledged.subscribe();
        let covered = acknowledged.wait_for(|a| a.covers(policy.generation));
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
    /// Workers that died.
    #[must_use]
    pub const fn worker_restarts(&self) -> u64 {
        self.worker_restarts.get()
    }
    /// Front ends refused because another one was connected.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.refused.get()
    }
}

/// Waits until a moment; for ever if there is none.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
