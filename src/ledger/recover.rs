//! What a worker left that died in the middle of a batch, counted by whoever comes after it.
//!
//! ```text
//!   the slot in force     what was committed; its elements may or may not be published
//!   Ended frames          sent, delivered or dropped, their elements written: counted now, and published
//!   one frame Read        and not ended: it died with the worker: dropped, `restart`
//!   more frames Begun     the write or read may have happened or not: `uncertain`. They are sent again; one that
//!                         was read is lost
//! ```
//! That is so where the ring goes on: the same connection and the same used ring. Where it does not (the keeper
//! died too, and the VMM makes a new connection), the guest never sees what was not published: what was
//! received ends as `restart_unmatched`; what was sent was sent, and the guest will send it again.
//!
//! A recovery is a commit like any other: one that dies on the way has changed nothing.

use std::sync::atomic::Ordering;

use super::{
    layout::{Ledger, Part, PartWord},
    log::{ENTRIES, Ended, Entry, Fate},
    reason::DropReason,
    slot::Held,
    totals::Volume,
    writer::Account,
};

/// Which ring is being served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingIdentity {
    /// The connection: each keeper has its own, never 0.
    pub session: u64,
    /// Guest address of the used ring.
    pub used_ring: u64,
}

/// How far the batch in hand was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    begun: u64,
    read: u64,
    ended: u64,
}

impl Account {
    /// Goes on from what a ledger holds, as a worker of this connection. What a worker of it left is counted when
    /// its ring is set up again ([`Self::take_over`]); what one of another connection left, now.
    #[must_use]
    pub fn succeed(ledger: &Ledger, part: Part, session: u64) -> Self {
        let mut account = Self::resume(ledger, part);
        if account.served().is_some_and(|ring| ring.session != session) {
            account.abandon();
        }
        account
    }

    /// Takes over the ring of a worker that died, if it is this one: counts what that worker had done. Gives the
    /// used ring's index up to which elements are written, which is to be published.
    pub fn take_over(&mut self, ring: RingIdentity) -> Option<u16> {
        if self.served() != Some(ring) {
            return None;
        }
        self.count_what_was_left(true);
        Some(self.slot.index)
    }

    /// Counts what a worker left of a ring that is gone.
    pub fn abandon(&mut self) {
        self.count_what_was_left(false);
        self.store(PartWord::Session, 0);
    }

    /// Begins to serve a ring at this index, with nothing in hand.
    pub fn begin(&mut self, ring: RingIdentity, index: u16) {
        self.store(PartWord::Session, 0);
        self.slot.index = index;
        let _nothing_to_publish = self.commit();
        self.store(PartWord::UsedRing, ring.used_ring);
        self.store(PartWord::Session, ring.session);
    }

    /// The ring is stopped: a worker after us starts from what the guest says.
    pub fn end(&mut self) {
        if self.has_news() {
            let _nothing_to_publish = self.commit();
        }
        self.store(PartWord::Session, 0);
    }

    /// The ring that is being served.
    fn served(&self) -> Option<RingIdentity> {
        let word = |word| self.ledger.part_word(self.part, word).load(Ordering::Acquire);
        let session = word(PartWord::Session);
        (session != 0).then(|| RingIdentity { session, used_ring: word(PartWord::UsedRing) })
    }

    fn count_what_was_left(&mut self, goes_on: bool) {
        let left = self.progress();
        let uncertain = left.begun.saturating_sub(left.read.max(left.ended));
        if left == Progress::default() && self.slot.held.is_none() {
            return;
        }
        for place in 0..left.ended {
            self.count(self.entry(place), goes_on);
        }
        if left.read > left.ended {
            self.lose(self.entry(left.ended));
        } else if let Some(Held { bytes, suspect }) = self.slot.held {
            self.lose(Entry { held: true, ..lost(bytes, suspect) });
        }
        self.slot.uncertain = self.slot.uncertain.wrapping_add(uncertain);
        let _published_by_the_caller = self.commit();
    }

    /// A frame whose end is in the log.
    fn count(&mut self, mut entry: Entry, goes_on: bool) {
        let transmit = self.part.is_transmit();
        if !goes_on && !transmit && entry.ended.fate == Fate::Passed {
            entry.ended.fate = Fate::Dropped(DropReason::RestartUnmatched);
        }
        entry.count(&mut self.slot.totals, transmit);
        self.slot.index = self.slot.index.wrapping_add(entry.ended.elements);
        self.slot.held = None;
    }

    /// A frame that was read, and died with the worker that held it.
    fn lose(&mut self, read: Entry) {
        let Volume { bytes, .. } = read.ended.volume;
        let entry = Entry { held: read.held, unreadable: read.unreadable, ..lost(bytes, read.ended.suspect) };
        entry.count(&mut self.slot.totals, false);
        self.slot.held = None;
    }

    fn entry(&self, place: u64) -> Entry {
        let place = usize::try_from(place).unwrap_or_default();
        let mut words = [0; 2];
        for (word, shared) in words.iter_mut().zip(self.ledger.entry(self.part, place)) {
            *word = shared.load(Ordering::Relaxed);
        }
        Entry::decode(words)
    }

    /// What was said in the epoch in force; a broken writer may have said anything.
    fn progress(&self) -> Progress {
        let said = |word| {
            let word = self.ledger.part_word(self.part, word).load(Ordering::Acquire);
            let frames = (word & 0xffff).min(ENTRIES as u64);
            if word >> 16 == self.epoch & (u64::MAX >> 16) { frames } else { 0 }
        };
        Progress { begun: said(PartWord::Begun), read: said(PartWord::Read), ended: said(PartWord::Ended) }
    }
}

/// A frame that was lost: how many packets it would have been, nobody knows.
pub(super) const fn lost(bytes: u64, suspect: bool) -> Entry {
    let fate = Fate::Dropped(DropReason::Restart);
    let ended = Ended { volume: Volume::frame(1, bytes, bytes), suspect, fate, elements: 0, joined: 0 };
    Entry { ended, held: false, unreadable: false }
}

/// Counts what was left in every part, when keeper and worker are gone and no ring goes on.
pub fn abandon_all(ledger: &Ledger) {
    for part in ledger.parts() {
        Account::resume(ledger, part).abandon();
    }
}
