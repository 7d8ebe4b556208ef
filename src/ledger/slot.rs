//! What is in force together: the counters, and how far the ring is that they belong to.

use std::sync::atomic::{AtomicU64, Ordering};

use super::totals::Totals;

/// A frame that was read from the tap and has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its length in bytes, without the virtio-net header.
    pub bytes: u64,
    /// Which label it carries.
    pub suspect: bool,
}

/// Everything that one flip of the epoch puts in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) totals: Totals,
    /// The used ring's index up to which elements may be published.
    pub(super) index: u16,
    /// Receive: the frame that is in flight.
    pub(super) held: Option<Held>,
    /// Frames of the tap writes and reads of which dead workers left unknown whether they happened.
    pub(super) uncertain: u64,
}

impl Slot {
    /// Its words in the ledger.
    pub(super) const WORDS: usize = Totals::WORDS + 3;

    pub(super) fn load(words: &[AtomicU64]) -> Self {
        let mut totals = [0; Totals::WORDS];
        let mut shared = words.iter().map(|word| word.load(Ordering::Relaxed));
        for (word, value) in totals.iter_mut().zip(&mut shared) {
            *word = value;
        }
        let mut next = || shared.next().unwrap_or_default();
        Self {
            totals: Totals::from_words(&totals),
            index: low_16_bits(next()),
            held: Held::decode(next()),
            uncertain: next(),
        }
    }

    pub(super) fn store(&self, words: &[AtomicU64]) {
        let rest = [u64::from(self.index), Held::encode(self.held), self.uncertain];
        for (shared, value) in words.iter().zip(self.totals.words().into_iter().chain(rest)) {
            super::fault::may_die();
            shared.store(value, Ordering::Relaxed);
        }
    }
}

impl Held {
    /// Bit 0: there is one. Bit 1: suspect. The rest: bytes.
    fn encode(held: Option<Self>) -> u64 {
        held.map_or(0, |Self { bytes, suspect }| bytes << 2 | u64::from(suspect) << 1 | 1)
    }

    const fn decode(word: u64) -> Option<Self> {
        if word & 1 == 1 { Some(Self { bytes: word >> 2, suspect: word & 2 != 0 }) } else { None }
    }
}

/// The low half-word.
pub(super) const fn low_16_bits(word: u64) -> u16 {
    (word & 0xffff) as u16
}
