//! The worker's side of the ledger: one [`Account`] per direction of a queue pair.

use std::sync::atomic::{Ordering, fence};

use super::{
    layout::{Ledger, Part, PartWord},
    totals::Totals,
};

/// The counters of one direction of one queue pair, and the right to write them: at any time there is one
/// worker for a ledger, and one account for a part.
#[derive(Debug)]
pub struct Account {
    ledger: Ledger,
    part: Part,
    epoch: u64,
    totals: Totals,
}

/// Proof that a batch is in the ledger: without it nothing is published to the guest.
#[derive(Debug)]
#[must_use = "a batch that is in the ledger is to be published to the guest"]
pub struct Committed(());

impl Account {
    /// Goes on from what the ledger holds.
    #[must_use]
    pub fn resume(ledger: &Ledger, part: Part) -> Self {
        let epoch = ledger.part_word(part, PartWord::Epoch).load(Ordering::Acquire);
        let mut words = [0; Totals::WORDS];
        for (word, shared) in words.iter_mut().zip(ledger.slot(part, epoch)) {
            *word = shared.load(Ordering::Relaxed);
        }
        Self { ledger: ledger.clone(), part, epoch, totals: Totals::from_words(&words) }
    }

    /// The counters, to be changed by what happens in a batch.
    pub const fn totals(&mut self) -> &mut Totals {
        &mut self.totals
    }

    /// Makes the batch visible: all of it or, if we die on the way, nothing.
    pub fn commit(&mut self) -> Committed {
        // Readers that see a word of the new slot must also see the epoch that freed it (see `reader`).
        fence(Ordering::Release);
        let next = self.epoch.wrapping_add(1);
        for (shared, word) in self.ledger.slot(self.part, next).iter().zip(self.totals.words()) {
            shared.store(word, Ordering::Relaxed);
        }
        self.ledger.part_word(self.part, PartWord::Epoch).store(next, Ordering::Release);
        self.epoch = next;
        Committed(())
    }

    /// Counts a queue that had to be stopped.
    pub fn queue_fault(&mut self) {
        self.ledger.part_word(self.part, PartWord::QueueFaults).fetch_add(1, Ordering::Relaxed);
    }
}
