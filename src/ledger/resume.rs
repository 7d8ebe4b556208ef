//! A new ledger that goes on from what an earlier one held: numbers outlive the shared memory they were in.

use std::{os::fd::OwnedFd, sync::atomic::Ordering};

use super::{
    layout::{Ledger, LedgerError, PartWord},
    reader::Known,
    recover::lost,
    slot::Slot,
};
use crate::features::QUEUE_PAIRS_MAX;

impl Ledger {
    /// Makes a new ledger whose counters begin with what is known of an earlier one: the first writer resumes
    /// from them, and so does a reader that begins with the same [`Known`]. Parts that nothing is known of
    /// begin at 0.
    ///
    /// # Errors
    /// [`LedgerError::Io`] when the kernel gives no memory.
    pub fn resume(pairs: u16, known: &[Known]) -> Result<(Self, OwnedFd), LedgerError> {
        let (ledger, fd) = Self::create(pairs)?;
        ledger.begin_with(known);
        Ok((ledger, fd))
    }

    /// Lets a ledger that nobody writes yet begin with what is known of an earlier one.
    pub fn begin_with(&self, known: &[Known]) {
        for known in known {
            let part = known.part();
            let word = |word| self.part_word(part, word);
            word(PartWord::QueueFaults).store(known.queue_faults(), Ordering::Relaxed);
            let epoch = word(PartWord::Epoch).load(Ordering::Relaxed);
            let mut slot = Slot { totals: *known.totals(), uncertain: known.uncertain(), ..Slot::default() };
            // The workers that held these frames, one for each queue pair at most, are gone, and nobody knows how
            // long the frames were.
            for _ in 0..slot.totals.in_flight.min(QUEUE_PAIRS_MAX.into()) {
                slot.totals.received(&lost(0, false).ended);
            }
            slot.store(self.slot(part, epoch));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Account, Part, Totals},
        *,
    };

    #[test]
    fn frames_that_were_in_flight_are_lost_and_the_equation_holds() {
        let counted = Totals { chains: 3, in_flight: 3, ..Totals::default() };
        let known = [Known::resumed(Part::receive(0), counted, 0, 0, 0)];
        let (ledger, _fd) = Ledger::resume(1, &known).unwrap();
        let totals = *Account::resume(&ledger, Part::receive(0)).totals();
        assert_eq!((totals.chains, totals.in_flight, totals.dropped_frames()), (3, 0, 3));
    }

    #[test]
    fn writer_and_reader_go_on_from_what_was_known() {
        let counted = Totals { chains: 70, ..Totals::default() };
        let known = [Known::resumed(Part::receive(0), counted, 3, 2, 1), Known::new(Part::transmit(0))];
        let (ledger, _fd) = Ledger::resume(2, &known).unwrap();
        let mut account = Account::resume(&ledger, Part::receive(0));
        for _ in 0..5 {
            account.read(Some(1), false);
            account.record(&lost(1, false).ended, false);
        }
        account.queue_fault();
        let [mut receive, mut transmit] = known;
        receive.refresh(&ledger);
        assert_eq!((receive.totals().chains, receive.queue_faults(), receive.gone_back()), (70, 4, 1));
        let _ = account.commit();
        receive.refresh(&ledger);
        assert_eq!((receive.totals().chains, receive.uncertain(), receive.gone_back()), (75, 2, 1));
        transmit.refresh(&ledger);
        assert_eq!(*transmit.totals(), Totals::default());
        assert_eq!(*Account::resume(&ledger, Part::receive(1)).totals(), Totals::default());
    }
}
