//! Sees that the worker lives although nobody asks it anything.
//!
//! ```text
//!            a kick or the tap is readable            nothing is readable, the pulse stands still
//!   Asleep ------------------------------> Awake ---------------------------------------------> Asleep
//!                                          | looks once per INTERVAL at the pulse in the ledger:
//!                                          |   it moves: all is well
//!                                          |   it stands still, and something waits: knock
//!                                          |   it stands still after a knock: the worker hangs
//! ```
//! So a port where nothing happens wakes nobody, and one where something does costs one look per interval.

use std::time::{Duration, Instant};

/// Between two looks.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// What is known of the worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Watch {
    /// Nothing waits for the worker: to be woken when something does.
    #[default]
    Asleep,
    /// Something waited for it lately.
    Awake {
        /// The pulse at the last look.
        pulse: u64,
        /// When to look next.
        next: Instant,
        /// It was knocked for since the pulse last moved.
        knocked: bool,
    },
}

/// What is to be done after a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Nothing.
    Fine,
    /// Wake it: it must then show a pulse.
    Knock,
    /// Replace it.
    Hangs,
}

impl Watch {
    /// Something waits for the worker.
    #[must_use]
    pub fn woken(pulse: u64, now: Instant) -> Self {
        Self::Awake { pulse, next: now + INTERVAL, knocked: false }
    }

    /// When to look next; never while asleep.
    #[must_use]
    pub const fn next(&self) -> Option<Instant> {
        match self {
            Self::Asleep => None,
            Self::Awake { next, .. } => Some(*next),
        }
    }

    /// Looks, if it is time. `waits`: a kick or the tap is readable.
    pub fn look(&mut self, now: Instant, pulse: u64, waits: impl FnOnce() -> bool) -> Finding {
        let Self::Awake { pulse: before, next, knocked } = *self else { return Finding::Fine };
        if now < next {
            return Finding::Fine;
        }
        if pulse != before {
            *self = Self::woken(pulse, now);
            return Finding::Fine;
        }
        if knocked {
            return Finding::Hangs;
        }
        if !waits() {
            *self = Self::Asleep;
            return Finding::Fine;
        }
        *self = Self::Awake { pulse, next: now + INTERVAL, knocked: true };
        Finding::Knock
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_hangs_when_it_shows_no_pulse_after_a_knock() {
        let begin = Instant::now();
        let mut watch = Watch::woken(7, begin);
        assert_eq!(watch.look(begin, 7, || true), Finding::Fine, "too early");
        assert_eq!(watch.look(begin + INTERVAL, 7, || true), Finding::Knock);
        assert_eq!(watch.look(begin + INTERVAL, 7, || true), Finding::Fine, "it has its time to answer");
        assert_eq!(watch.look(begin + 2 * INTERVAL, 7, || false), Finding::Hangs);
    }

    #[test]
    fn a_pulse_is_an_answer_and_quiet_puts_the_watch_to_sleep() {
        let begin = Instant::now();
        let mut watch = Watch::woken(7, begin);
        assert_eq!(watch.look(begin + INTERVAL, 7, || true), Finding::Knock);
        assert_eq!(watch.look(begin + 2 * INTERVAL, 8, || true), Finding::Fine);
        assert_eq!(watch.look(begin + 3 * INTERVAL, 8, || false), Finding::Fine);
        assert_eq!((watch, watch.next()), (Watch::Asleep, None));
        assert_eq!(watch.look(begin + 9 * INTERVAL, 8, || true), Finding::Fine, "asleep");
    }
}
