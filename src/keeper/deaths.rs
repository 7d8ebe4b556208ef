//! How many workers of one connection may die.
//!
//! A worker that something kills from outside is replaced, as often as that may be. One that dies by itself (a
//! fault, an abort) or hangs was broken by its guest or front end, which would break the next one too: after
//! [`OWN_MAX`] of those within a minute the connection is given up.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Most deaths of its own making within [`PERIOD`].
const OWN_MAX: usize = 10;
/// Most kills from outside without a single worker that came up in between.
const KILLS_MAX: u32 = 1000;
/// What is longer ago does not count.
const PERIOD: Duration = Duration::from_secs(60);

/// Why a worker died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Killed by somebody else.
    Killed,
    /// By itself, or by us because it did not answer.
    Own,
}

/// More deaths than can be put up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooMany {
    /// See [`OWN_MAX`].
    #[error("{OWN_MAX} workers died or hung within {} s: this guest breaks every worker", PERIOD.as_secs())]
    Own,
    /// See [`KILLS_MAX`].
    #[error("{KILLS_MAX} workers in a row were killed before they had begun")]
    Kills,
}

/// Between two lines of the log about deaths.
const PAUSE: Duration = Duration::from_secs(1);

/// The deaths so far.
#[derive(Debug, Default)]
pub struct Deaths {
    own: VecDeque<Instant>,
    kills: u32,
    /// When the log last had a line, and how many deaths it was silent about since.
    said: Option<Instant>,
    unsaid: u64,
}

impl Deaths {
    /// One more death.
    ///
    /// # Errors
    /// [`TooMany`]: there is to be no other worker.
    pub fn count(&mut self, cause: Cause, now: Instant) -> Result<(), TooMany> {
        if cause == Cause::Killed {
            self.kills += 1;
            return if self.kills < KILLS_MAX { Ok(()) } else { Err(TooMany::Kills) };
        }
        self.own.push_back(now);
        self.own.retain(|at| now.duration_since(*at) < PERIOD);
        if self.own.len() < OWN_MAX { Ok(()) } else { Err(TooMany::Own) }
    }

    /// How many deaths a line in the log may speak of now; none if there was one just before.
    pub fn to_be_said(&mut self, now: Instant) -> Option<u64> {
        self.unsaid += 1;
        if self.said.is_some_and(|said| now.duration_since(said) < PAUSE) {
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }

    /// A worker came up and took over.
    pub const fn revived(&mut self) {
        self.kills = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_deaths_of_its_own_within_a_minute_are_too_many_and_ten_in_an_hour_are_not() {
        let mut deaths = Deaths::default();
        let begin = Instant::now();
        for n in 0..100 {
            assert_eq!(deaths.count(Cause::Own, begin + n * PERIOD / 9), Ok(()), "number {n}");
        }
        let later = begin + 200 * PERIOD;
        for n in 1..10 {
            assert_eq!(deaths.count(Cause::Own, later), Ok(()), "number {n}");
            deaths.revived();
        }
        assert_eq!(deaths.count(Cause::Own, later), Err(TooMany::Own));
    }

    #[test]
    fn the_log_has_a_line_a_second_which_speaks_for_all() {
        let mut deaths = Deaths::default();
        let now = Instant::now();
        assert_eq!(deaths.to_be_said(now), Some(1));
        assert_eq!((0..5).find_map(|_| deaths.to_be_said(now)), None);
        assert_eq!(deaths.to_be_said(now + PAUSE), Some(6));
    }

    #[test]
    fn kills_are_put_up_with_as_long_as_workers_come_up() {
        let mut deaths = Deaths::default();
        let now = Instant::now();
        for _ in 0..10 * KILLS_MAX {
            assert_eq!(deaths.count(Cause::Killed, now), Ok(()));
            deaths.revived();
        }
        for _ in 1..KILLS_MAX {
            assert_eq!(deaths.count(Cause::Killed, now), Ok(()));
        }
        assert_eq!(deaths.count(Cause::Killed, now), Err(TooMany::Kills));
    }
}
