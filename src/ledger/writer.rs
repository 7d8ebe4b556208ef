//! The worker's side of the ledger: one [`Account`] per direction of a queue pair.
//!
//! ```text
//!   begin_tap_operation      before each write to the tap, of one frame or several, and each read from it
//!   read                     receive: after a read that brought a frame
//!   record                   the frame ended: its log entry is written; then its elements of the used ring are
//!   confirm                  both are there: from now on a successor counts the frame, and publishes it
//!   commit                   the batch: all counters and the ring's index at once; then used.idx
//! ```
//! Whoever dies between two of these leaves the last of them standing; see [`recover`](super::recover).

use std::sync::atomic::{Ordering, fence};

use super::{
    fault::may_die,
    layout::{Ledger, Part, PartWord},
    log::{Ended, Entry, Fate},
    slot::{Held, Slot},
    totals::{Totals, Volume},
};

/// A vmflow that counts nothing, for the bench to compare with.
pub const UNMONITORED: bool = cfg!(feature = "unmonitored");

/// The counters of one direction of one queue pair, and the right to write them: at any time there is one
/// worker for a ledger, and one account for a part.
#[derive(Debug)]
pub struct Account {
    pub(super) ledger: Ledger,
    pub(super) part: Part,
    pub(super) epoch: u64,
    pub(super) slot: Slot,
    /// Frames of this batch that ended.
    pub(super) ended: u64,
    /// Frames of this batch whose end is in the log: those that ended, and those that are to be confirmed.
    recorded: u64,
    /// A frame was read in this batch and has not ended.
    reading: bool,
    /// A frame ended, or was read, and is not committed.
    has_news: bool,
}

/// Proof that a batch is in the ledger: without it nothing is published to the guest.
#[derive(Debug)]
#[must_use = "a batch that is in the ledger is to be published to the guest"]
pub struct Committed {
    index: u16,
}

impl Committed {
    /// The used ring's index up to which the guest may see elements.
    #[must_use]
    pub fn into_index(self) -> u16 {
        self.index
    }
}

impl Account {
    /// Goes on from what is in force. What a dead worker had done since is still to be counted:
    /// [`Self::take_over`] or [`Self::abandon`].
    #[must_use]
    pub fn resume(ledger: &Ledger, part: Part) -> Self {
        let epoch = ledger.part_word(part, PartWord::Epoch).load(Ordering::Acquire);
        let slot = Slot::load(ledger.slot(part, epoch));
        Self {
            ledger: ledger.clone(),
            part,
            epoch,
            slot,
            ended: 0,
            recorded: 0,
            reading: false,
            has_news: false,
        }
    }

    /// The counters with everything that happened so far.
    #[must_use]
    pub const fn totals(&self) -> &Totals {
        &self.slot.totals
    }

    /// The used ring's index behind everything that was given back.
    #[must_use]
    pub const fn index(&self) -> u16 {
        self.slot.index
    }

    /// How many frames ended since the last commit.
    #[must_use]
    pub const fn frames(&self) -> u64 {
        self.recorded
    }

    /// True if something happened that is not committed.
    #[must_use]
    pub const fn has_news(&self) -> bool {
        self.has_news
    }

    /// A write of so many frames to the tap, or a read of one from it, is about to happen.
    pub fn begin_tap_operation(&mut self, frames: usize) {
        self.mark(PartWord::Begun, self.ended.wrapping_add(frames as u64));
        may_die();
    }

    /// It did not happen.
    pub fn withdraw_tap_operation(&mut self) {
        self.mark(PartWord::Begun, self.ended);
    }

    /// Receive: the read brought a frame; nothing in `tap_bytes` if the kernel could not hand it over.
    pub fn read(&mut self, tap_bytes: Option<u64>, suspect: bool) {
        if UNMONITORED {
            return;
        }
        let bytes = tap_bytes.unwrap_or_default();
        let volume = Volume::frame(1, bytes, bytes);
        let ended = Ended { volume, suspect, fate: Fate::Passed, elements: 0, joined: 0 };
        self.write_entry(&Entry { ended, held: false, unreadable: tap_bytes.is_none() });
        self.mark(PartWord::Read, self.ended.wrapping_add(1));
        self.slot.totals.read(tap_bytes);
        self.slot.held = Some(Held { bytes, suspect });
        (self.reading, self.has_news) = (true, true);
    }

    /// A frame ended. Its elements of the used ring are to be written next.
    pub fn record(&mut self, ended: &Ended, unreadable: bool) {
        self.slot.index = self.slot.index.wrapping_add(ended.elements);
        self.has_news = true;
        if UNMONITORED {
            self.recorded = self.recorded.wrapping_add(1);
            return;
        }
        let transmit = self.part.is_transmit();
        self.write_entry(&Entry { ended: *ended, held: !transmit && !self.reading, unreadable });
        if transmit {
            self.slot.totals.transmitted(ended);
        } else {
            self.slot.totals.received(ended);
            self.slot.held = None;
        }
        self.recorded = self.recorded.wrapping_add(1);
        self.reading = false;
    }

    /// The elements of all frames that were recorded are written too.
    pub fn confirm(&mut self) {
        self.ended = self.recorded;
        self.mark(PartWord::Ended, self.ended);
    }

    /// Makes the batch visible: all of it or, if we die on the way, nothing.
    pub fn commit(&mut self) -> Committed {
        if UNMONITORED {
            (self.recorded, self.has_news) = (0, false);
            return Committed { index: self.slot.index };
        }
        // Readers that see a word of the new slot must also see the epoch that freed it (see `reader`).
        fence(Ordering::Release);
        let next = self.epoch.wrapping_add(1);
        self.slot.store(self.ledger.slot(self.part, next));
        self.store(PartWord::Epoch, next);
        self.epoch = next;
        (self.ended, self.recorded) = (0, 0);
        (self.reading, self.has_news) = (false, false);
        may_die();
        Committed { index: self.slot.index }
    }

    /// Counts a queue that had to be stopped.
    pub fn queue_fault(&mut self) {
        self.ledger.part_word(self.part, PartWord::QueueFaults).fetch_add(1, Ordering::Relaxed);
    }

    fn write_entry(&self, entry: &Entry) {
        let place = usize::try_from(self.recorded).unwrap_or_default();
        for (shared, word) in self.ledger.entry(self.part, place).iter().zip(entry.encode()) {
            may_die();
            shared.store(word, Ordering::Relaxed);
        }
    }

    /// Says how far the batch is; what was said in an earlier epoch says nothing in this one.
    fn mark(&self, word: PartWord, frames: u64) {
        if UNMONITORED {
            return;
        }
        self.store(word, self.epoch << 16 | frames);
    }

    pub(super) fn store(&self, word: PartWord, value: u64) {
        may_die();
        self.ledger.part_word(self.part, word).store(value, Ordering::Release);
    }
}

/// What a queue's thread does whenever it wakes up, for its keeper to see that it lives.
#[derive(Debug)]
pub struct Pulse(Ledger, Part);

impl Pulse {
    /// The pulse of a queue pair's thread.
    #[must_use]
    pub const fn new(ledger: Ledger, pair: u16) -> Self {
        Self(ledger, Part::receive(pair))
    }

    /// It lives.
    pub fn beat(&self) {
        self.0.part_word(self.1, PartWord::Heartbeat).fetch_add(1, Ordering::Relaxed);
    }
}
