//! A new ledger that goes on from what an earlier one held: numbers outlive the shared memory they were in.

use std::{os::fd::OwnedFd, sync::atomic::Ordering};

use super::{
    layout::{Ledger, LedgerError, PartWord},
    reader::Known,
    recover::lost,
    slot::Slot,
};

impl Ledger {
    /// Makes a new ledger whose counters begin with what is known of an earlier one: the first writer resumes
    /// from them, and so does a reader that begins with the same [`Known`]. Parts that nothing is known of
    /// begin at 0.
    ///
    /// # Errors
    /// [`LedgerError::Io`] when the kernel gives no memory.
    pub fn resume(pairs: u16, known: &[Known]) -> Result<(Self, OwnedFd), LedgerError> {
        let (ledger, fd) = Self::create(pairs)?;
        for known in known {
            let part = known.part();
            let word = |word| ledger.part_word(part, word);
            word(PartWord::QueueFaults).store(known.queue_faults(), Ordering::Relaxed);
            let epoch = word(PartWord::Epoch).load(Ordering::Relaxed);
            let mut slot = Slot { totals: *known.totals(), uncertain: known.uncertain(), ..Slot::default() };
            if slot.totals.in_flight > 0 {
                // The worker that held the frame is gone, and nobody knows how long it was.
                slot.totals.received(&lost(0, false).ended);
            }
            slot.store(ledger.slot(part, epoch));
        }
        Ok((ledger, fd))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Account, Part, Totals},
        *,
    };

    #[test]
    fn a_frame_that_was_in_flight_is_lost_and_the_equation_holds() {
        let counted = Totals { chains: 3, in_flight: 1, ..Totals::default() };
        let known = [Known::resumed(Part::receive(0), counted, 0, 0, 0)];
        let (ledger, _fd) = Ledger::resume(1, &known).unwrap();
        let totals = *Account::resume(&ledger, Part::receive(0)).totals();
        assert_eq!((totals.chains, totals.in_flight, totals.dropped_frames()), (3, 0, 1));
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
