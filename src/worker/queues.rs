//! Which queues of the tap are attached: those of the queue pairs that the guest takes frames from.
//!
//! The kernel spreads what comes for the guest over all attached queues; what it gives to a queue that nobody
//! reads is lost. Some front ends enable every ring whatever the guest uses, so a queue is attached when its
//! receive ring is enabled *and* holds its first buffer, and detached when the ring stops, is disabled or breaks.
//! While no pair is served the first queue is attached: frames wait there until one is. What waits in a queue that is
//! detached the kernel throws away; so it is read before, and counted as dropped.
//!
//! A worker that dies leaves the queues as they are. Its successor finds them so, takes the frames that wait, and
//! touches a queue only when it knows what is to become of it. Where there is no successor the monitor detaches.
//!
//! Attaching may wait for the kernel's network lock. So the pairs' threads, which move frames, only say what they
//! want; a thread that does nothing else does it. The control thread detaches itself, before it answers. The whole
//! host shares that lock, so a guest that changes its mind all the time has to wait for its queues.

use std::{
    os::fd::OwnedFd,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::Thread,
    time::{Duration, Instant},
};

use crate::tap;

/// A queue is attached again this long after the last time, at the earliest.
const PAUSE: Duration = Duration::from_millis(500);

/// The queues of the tap, one for each queue pair.
#[derive(Debug)]
pub struct TapQueues {
    queues: Vec<OwnedFd>,
    /// Pairs that are served, one bit each.
    served: AtomicU32,
    /// Pairs of which this worker knows whether they are.
    known: AtomicU32,
    told: Mutex<Vec<Told>>,
    thread: OnceLock<Thread>,
    ended: AtomicBool,
}

impl TapQueues {
    /// Queues of which nothing is known: a worker before us may have attached them.
    #[must_use]
    pub fn new(queues: Vec<OwnedFd>) -> Self {
        Self {
            told: Mutex::new(vec![Told::default(); queues.len()]),
            queues,
            served: AtomicU32::new(0),
            known: AtomicU32::new(0),
            thread: OnceLock::new(),
            ended: AtomicBool::new(false),
        }
    }

    /// True if there is a choice: a tap with one queue has it attached, always.
    #[must_use]
    pub const fn are_several(&self) -> bool {
        self.queues.len() > 1
    }

    /// True if the pair's queue is, or will be, attached.
    #[must_use]
    pub fn is_served(&self, pair: usize) -> bool {
        self.served.load(Ordering::Relaxed) & bit(pair) != 0
    }

    /// True if the pair's queue is attached, and will be detached when the pair is not served any more.
    #[must_use]
    pub fn detaches(&self, pair: usize) -> bool {
        let served = self.served.load(Ordering::SeqCst);
        self.are_several() && served & bit(pair) != 0 && (pair > 0 || served & !bit(pair) != 0)
    }

    /// For the pair's thread, under its ring's lock: there is a buffer.
    pub fn serve(&self, pair: usize) {
        self.served.fetch_or(bit(pair), Ordering::SeqCst);
        self.known.fetch_or(bit(pair), Ordering::SeqCst);
        self.wake();
    }

    /// For the pair's thread: the guest broke the ring.
    pub fn release_soon(&self, pair: usize) {
        self.forget(pair);
        self.wake();
    }

    /// For the control thread: the ring stopped. When this returns the queue is detached.
    pub fn release(&self, pair: usize) {
        self.forget(pair);
        if self.carry_out().is_some() {
            self.wake(); // not all could be done
        }
    }

    fn forget(&self, pair: usize) {
        self.served.fetch_and(!bit(pair), Ordering::SeqCst);
        self.known.fetch_or(bit(pair), Ordering::SeqCst);
    }

    /// What the thread does that attaches and detaches, until [`Self::end`].
    pub fn follow(&self) {
        while !self.ended.load(Ordering::SeqCst) {
            match self.carry_out() {
                None => std::thread::park(),
                Some(rest) => std::thread::park_timeout(rest),
            }
        }
    }

    /// Names the thread that runs [`Self::follow`]; before any pair is served.
    pub fn followed_by(&self, thread: &Thread) {
        let _ = self.thread.set(thread.clone());
    }

    /// Ends [`Self::follow`].
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Does what is to be done now; gives the time until there is more to be done.
    fn carry_out(&self) -> Option<Duration> {
        if !self.are_several() {
            return None;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let wishes =
            Wishes { served: self.served.load(Ordering::SeqCst), known: self.known.load(Ordering::SeqCst) };
        let now = Instant::now();
        let mut rest: Option<Duration> = None;
        // Attaches first: frames always have somewhere to go.
        for attach in [true, false] {
            for (pair, (queue, told)) in self.queues.iter().zip(told.iter_mut()).enumerate() {
                if wishes.wants(pair) != Some(attach) || told.attached == Some(attach) {
                    continue;
                }
                match told.wait(attach && !wishes.is_last_resort(pair), now) {
                    Some(wait) => rest = Some(rest.map_or(wait, |rest| rest.min(wait))),
                    None => match tap::attach_queue(queue, attach) {
                        Ok(()) => told.note(attach, now),
                        Err(e) => tracing::debug!(pair, attach, "a queue of the tap: {e}"),
                    },
                }
            }
        }
        rest
    }
}

/// What the pairs want of the kernel.
#[derive(Clone, Copy, Debug)]
struct Wishes {
    served: u32,
    known: u32,
}

impl Wishes {
    /// Whether the pair's queue is to be attached; nothing where nobody knows.
    const fn wants(self, pair: usize) -> Option<bool> {
        if self.is_last_resort(pair) || self.served & bit(pair) != 0 {
            Some(true)
        } else if self.known & bit(pair) != 0 {
            Some(false)
        } else {
            None
        }
    }

    /// The queue that carries frames while no pair is served.
    const fn is_last_resort(self, pair: usize) -> bool {
        pair == 0 && self.served == 0
    }
}

/// What the kernel was told of a queue.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    /// Nothing where a worker before us left it as it is.
    attached: Option<bool>,
    /// When it was last attached.
    when: Option<Instant>,
}

impl Told {
    /// How long to wait with it; nothing if it can be done now.
    fn wait(&self, limited: bool, now: Instant) -> Option<Duration> {
        let rest = PAUSE.saturating_sub(now.saturating_duration_since(self.when?));
        (limited && !rest.is_zero()).then_some(rest)
    }

    fn note(&mut self, attached: bool, now: Instant) {
        self.attached = Some(attached);
        if attached {
            self.when = Some(now);
        }
    }
}

/// The pair's bit; there are fewer pairs than bits.
const fn bit(pair: usize) -> u32 {
    if pair < 32 { 1 << pair } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(served: u32, known: u32) -> [Option<bool>; 3] {
        let wishes = Wishes { served, known };
        [0, 1, 2].map(|pair| wishes.wants(pair))
    }

    #[test]
    fn a_queue_is_attached_while_its_pair_is_served_and_the_first_one_while_none_is() {
        assert_eq!(wants(0b000, 0b000), [Some(true), None, None], "what a worker before us left stays");
        assert_eq!(wants(0b000, 0b111), [Some(true), Some(false), Some(false)]);
        assert_eq!(wants(0b011, 0b011), [Some(true), Some(true), None]);
        assert_eq!(wants(0b010, 0b010), [None, Some(true), None]);
        assert_eq!(wants(0b110, 0b111), [Some(false), Some(true), Some(true)]);
    }

    #[test]
    fn a_queue_that_comes_and_goes_is_attached_again_after_a_pause_and_detached_at_once() {
        let (mut told, begin) = (Told::default(), Instant::now());
        assert_eq!(told.wait(true, begin), None, "the first time");
        told.note(true, begin);
        assert_eq!(told.wait(false, begin), None, "to detach");
        told.note(false, begin);
        assert_eq!(told.wait(true, begin + PAUSE / 4), Some(PAUSE / 4 * 3));
        assert_eq!(told.wait(true, begin + PAUSE), None);
    }
}
