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
//! want; a thread that does nothing else does it. The control thread does it itself, before it answers.

use std::{
    os::fd::OwnedFd,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::Thread,
};

use crate::tap;

/// The queues of the tap, one for each queue pair.
#[derive(Debug)]
pub struct TapQueues {
    queues: Vec<OwnedFd>,
    /// Pairs that are served, one bit each.
    served: AtomicU32,
    /// Pairs of which this worker knows whether they are.
    known: AtomicU32,
    /// What the kernel was last told of each queue.
    attached: Mutex<Vec<Option<bool>>>,
    thread: OnceLock<Thread>,
    ended: AtomicBool,
}

impl TapQueues {
    /// Queues of which nothing is known: a worker before us may have attached them.
    #[must_use]
    pub fn new(queues: Vec<OwnedFd>) -> Self {
        Self {
            attached: Mutex::new(vec![None; queues.len()]),
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
        self.carry_out();
    }

    fn forget(&self, pair: usize) {
        self.served.fetch_and(!bit(pair), Ordering::SeqCst);
        self.known.fetch_or(bit(pair), Ordering::SeqCst);
    }

    /// What the thread does that attaches and detaches, until [`Self::end`].
    pub fn follow(&self) {
        while !self.ended.load(Ordering::SeqCst) {
            self.carry_out();
            std::thread::park();
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

    /// Attaches first: frames always have somewhere to go.
    fn carry_out(&self) {
        if !self.are_several() {
            return;
        }
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let (served, known) = (self.served.load(Ordering::SeqCst), self.known.load(Ordering::SeqCst));
        let (wanted, known) = if served == 0 { (1, known | 1) } else { (served, known) };
        for attach in [true, false] {
            for (pair, (queue, now)) in self.queues.iter().zip(attached.iter_mut()).enumerate() {
                let wants = wanted & bit(pair) != 0;
                if wants == attach && known & bit(pair) != 0 && *now != Some(wants) {
                    match tap::attach_queue(queue, wants) {
                        Ok(()) => *now = Some(wants),
                        Err(e) => tracing::debug!(pair, attach, "a queue of the tap: {e}"),
                    }
                }
            }
        }
    }
}

/// The pair's bit; there are fewer pairs than bits.
const fn bit(pair: usize) -> u32 {
    if pair < 32 { 1 << pair } else { 0 }
}
