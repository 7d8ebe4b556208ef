//! The monitor's side of the ledger. What it reads was written by a process that a guest may have broken,
//! so it keeps totals of its own and believes no counter that goes back.

use std::sync::atomic::{Ordering, fence};

use super::{
    layout::{HeadWord, Ledger, Part, PartWord},
    slot::Slot,
    totals::Totals,
};

/// How often a snapshot is tried before the last one is kept: a writer flips at most once in that time,
/// unless it is broken.
const TRIES: usize = 100;

/// What the monitor knows of one direction of one queue pair.
#[derive(Clone, Debug)]
pub struct Known {
    part: Part,
    totals: Totals,
    queue_faults: u64,
    uncertain: u64,
    gone_back: u64,
}

impl Known {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(part: Part) -> Self {
        Self { part, totals: Totals::default(), queue_faults: 0, uncertain: 0, gone_back: 0 }
    }

    /// What was known of an earlier ledger; the next one goes on from it ([`Ledger::resume`]).
    #[must_use]
    pub const fn resumed(
        part: Part,
        totals: Totals,
        queue_faults: u64,
        uncertain: u64,
        gone_back: u64,
    ) -> Self {
        Self { part, totals, queue_faults, uncertain, gone_back }
    }

    /// Adds what is known of the same direction of another queue pair.
    pub fn add(&mut self, other: &Self) {
        self.totals.add(&other.totals);
        self.queue_faults = self.queue_faults.saturating_add(other.queue_faults);
        self.uncertain = self.uncertain.saturating_add(other.uncertain);
        self.gone_back = self.gone_back.saturating_add(other.gone_back);
    }

    /// Which part of the ledger.
    #[must_use]
    pub const fn part(&self) -> Part {
        self.part
    }

    /// Reads the ledger.
    pub fn refresh(&mut self, ledger: &Ledger) {
        if let Some(seen) = snapshot(ledger, self.part) {
            self.gone_back += self.totals.advance_to(&seen.totals) as u64;
            self.uncertain = self.uncertain.max(seen.uncertain);
        }
        let queue_faults = ledger.part_word(self.part, PartWord::QueueFaults).load(Ordering::Relaxed);
        self.queue_faults = self.queue_faults.max(queue_faults);
    }

    /// The counters, as of the last refresh.
    #[must_use]
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }
    /// How often the queue was stopped for a fault of the guest.
    #[must_use]
    pub const fn queue_faults(&self) -> u64 {
        self.queue_faults
    }
    /// Frames of the tap writes and reads of which dead workers left unknown whether they happened.
    #[must_use]
    pub const fn uncertain(&self) -> u64 {
        self.uncertain
    }
    /// How many counters were not believed because they went back.
    #[must_use]
    pub const fn gone_back(&self) -> u64 {
        self.gone_back
    }
}

impl Ledger {
    /// Workers of the port that died.
    #[must_use]
    pub fn worker_deaths(&self) -> u64 {
        self.head_word(HeadWord::WorkerDeaths).load(Ordering::Relaxed)
    }

    /// The keeper: a worker died.
    pub fn count_worker_death(&self) {
        self.head_word(HeadWord::WorkerDeaths).fetch_add(1, Ordering::Relaxed);
    }

    /// Connections that were given up because their workers kept dying.
    #[must_use]
    pub fn connections_given_up(&self) -> u64 {
        self.head_word(HeadWord::GivenUp).load(Ordering::Relaxed)
    }

    /// The keeper: the connection is given up.
    pub fn count_connection_given_up(&self) {
        self.head_word(HeadWord::GivenUp).fetch_add(1, Ordering::Relaxed);
    }

    /// The pulse of a queue pair's thread: changes whenever it wakes up.
    #[must_use]
    pub fn pulse(&self, pair: u16) -> u64 {
        self.part_word(Part::receive(pair), PartWord::Heartbeat).load(Ordering::Relaxed)
    }
}

/// What was in force between two batches; nothing if the writer leaves us no quiet moment.
fn snapshot(ledger: &Ledger, part: Part) -> Option<Slot> {
    let epoch = ledger.part_word(part, PartWord::Epoch);
    for _ in 0..TRIES {
        let before = epoch.load(Ordering::Acquire);
        let slot = Slot::load(ledger.slot(part, before));
        fence(Ordering::Acquire);
        // The slot of `before` is written again only after the epoch has moved on.
        if epoch.load(Ordering::Relaxed) == before {
            return Some(slot);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            log::{Ended, Fate},
            totals::Volume,
            writer::Account,
        },
        *,
    };

    fn ended() -> Ended {
        Ended { volume: Volume::frame(1, 1, 1), suspect: false, fate: Fate::Passed, elements: 1, joined: 0 }
    }

    #[test]
    fn what_was_not_committed_is_not_seen_and_is_gone_with_its_writer() {
        let (ledger, fd) = Ledger::create(1).unwrap();
        let mut account = Account::resume(&Ledger::open(&fd, 1).unwrap(), Part::transmit(0));
        let mut known = Known::new(Part::transmit(0));
        for n in 0..9 {
            account.record(&ended(), false);
            account.confirm();
            if n == 4 {
                let _ = account.commit();
            }
        }
        known.refresh(&ledger);
        assert_eq!(known.totals().chains, 5);
        drop(account);
        let successor = Account::resume(&ledger, Part::transmit(0));
        assert_eq!(successor.totals().chains, 5);
    }

    #[test]
    fn directions_and_pairs_do_not_share_counters() {
        let (ledger, _fd) = Ledger::create(2).unwrap();
        for (n, part) in
            [Part::receive(0), Part::transmit(0), Part::receive(1), Part::transmit(1)].into_iter().enumerate()
        {
            let mut account = Account::resume(&ledger, part);
            for _ in 0..=n {
                account.read(Some(1), false);
                account.record(&ended(), false);
            }
            let _ = account.commit();
        }
        let mut known = Known::new(Part::receive(1));
        known.refresh(&ledger);
        assert_eq!(known.totals().chains, 3);
    }

    #[test]
    fn a_snapshot_taken_while_batches_are_written_is_always_of_one_batch() {
        let (ledger, fd) = Ledger::create(1).unwrap();
        let theirs = Ledger::open(&fd, 1).unwrap();
        let writer = std::thread::spawn(move || {
            let mut account = Account::resume(&theirs, Part::receive(0));
            for n in 1..=200_000_u64 {
                account.slot.totals = Totals::from_words(&[n; Totals::WORDS]);
                let _ = account.commit();
            }
        });
        while !writer.is_finished() {
            if let Some(Slot { totals, .. }) = snapshot(&ledger, Part::receive(0)) {
                assert!(totals.words().iter().all(|w| *w == totals.chains), "torn: {totals:?}");
            }
        }
        writer.join().unwrap();
    }

    #[test]
    fn a_file_of_another_size_or_without_seals_is_refused() {
        let (_ledger, fd) = Ledger::create(1).unwrap();
        assert!(Ledger::open(&fd, 2).is_err());
        let bare = rustix::fs::memfd_create("bare", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&bare, rustix::fs::fstat(&fd).unwrap().st_size.unsigned_abs()).unwrap();
        assert!(Ledger::open(&bare, 1).is_err());
    }
}
