//! What is counted of one port of a VM: it outlives connections, and goes on where the port's settings change.

use std::{
    cell::{Cell, RefCell},
    os::fd::OwnedFd,
};

use super::checkpoint::PortCounters;
use crate::{
    keeper::brief::Brief,
    ledger::{Known, Ledger, LedgerError, Part, recover},
};

/// Everything that is counted of a port.
#[derive(Debug)]
pub struct Tally {
    ledger: Ledger,
    /// The ledger as a file, for those who write it.
    pub(super) ledger_file: OwnedFd,
    /// Of each part of the ledger.
    known: RefCell<Vec<Known>>,
    /// Connections that were given up before the ledger was made.
    given_up_before: Counter,
    /// What the ledger said of workers that died, and of connections given up. A broken worker can write there.
    worker_deaths: Counter,
    given_up: Counter,
    /// Front ends served.
    pub(super) connections: Counter,
    /// Front ends refused: of another user, or because one was connected.
    pub(super) refused: Counter,
    /// Keepers that died, each with its worker; and the workers that died before the ledger was made.
    pub(super) keeper_deaths: Counter,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(Cell<u64>);

impl Counter {
    /// One more.
    pub fn count(&self) {
        self.0.set(self.0.get() + 1);
    }

    /// Takes over what somebody else has counted, but never backwards.
    fn advance_to(&self, seen: u64) -> u64 {
        self.0.set(self.0.get().max(seen));
        self.0.get()
    }

    /// How many so far.
    #[must_use]
    pub const fn get(&self) -> u64 {
        self.0.get()
    }
}

impl Tally {
    /// A tally that goes on from what was counted of the port before.
    ///
    /// # Errors
    /// When there is no memory for its ledger.
    pub fn new(port: &Brief, counted: &PortCounters) -> Result<Self, LedgerError> {
        let (ledger, ledger_file) = Ledger::create(port.queue_pairs)?;
        let tally = Self {
            ledger,
            ledger_file,
            known: RefCell::default(),
            given_up_before: Counter::default(),
            worker_deaths: Counter::default(),
            given_up: Counter::default(),
            connections: Counter::default(),
            refused: Counter::default(),
            keeper_deaths: Counter::default(),
        };
        tally.go_on_from(counted);
        Ok(tally)
    }

    /// Begins, before anything is counted here, with what was counted of the port before: all of it in the first
    /// queue pair.
    pub fn go_on_from(&self, counted: &PortCounters) {
        let before = counted.known();
        self.ledger.begin_with(&before);
        let part = |part| before.iter().find(|known| known.part() == part).cloned();
        let known = self.ledger.parts().map(|p| part(p).unwrap_or_else(|| Known::new(p)));
        self.known.replace(known.collect());
        self.connections.0.set(counted.connections);
        self.refused.0.set(counted.refused_connections);
        self.keeper_deaths.0.set(counted.worker_restarts);
        self.given_up_before.0.set(counted.connections_given_up);
    }

    /// What was counted over all queue pairs, read from the ledger now: receive, transmit.
    pub fn counted(&self) -> [Known; 2] {
        let mut sums = [Known::new(Part::receive(0)), Known::new(Part::transmit(0))];
        for known in self.known.borrow_mut().iter_mut() {
            known.refresh(&self.ledger);
            let [receive, transmit] = &mut sums;
            if known.part().is_transmit() { transmit.add(known) } else { receive.add(known) }
        }
        sums
    }

    /// Workers that died: those that their keepers replaced, and those that died with their keepers.
    #[must_use]
    pub fn worker_restarts(&self) -> u64 {
        let deaths = self.worker_deaths.advance_to(self.ledger.worker_deaths());
        deaths.saturating_add(self.keeper_deaths.get())
    }

    /// Connections that keepers gave up because one worker after the other died.
    #[must_use]
    pub fn connections_given_up(&self) -> u64 {
        let given_up = self.given_up.advance_to(self.ledger.connections_given_up());
        given_up.saturating_add(self.given_up_before.get())
    }

    /// Keeper and worker are gone: what they left unfinished is counted, since no ring goes on.
    pub fn close_accounts(&self) {
        recover::abandon_all(&self.ledger);
    }
}
