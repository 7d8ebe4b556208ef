//! The crate's ring, mended: what messages cannot put right.
//!
//! * A ring starts at the guest's used index, whatever base the front end says. We complete strictly in
//!   order, so that index is right after a reconnection with QEMU and with cloud-hypervisor alike (the latter
//!   sends the *available* index, which would skip every posted buffer).
//! * `SET_VRING_ADDR` on a running ring does not rewind it.
//! * A second `SET_VRING_KICK` replaces the first one in the event loop too.
//! * A spurious wake-up does not end the event loop.
//! * The signal to the guest goes through a descriptor of our own, outside the ring's lock.

use std::{
    cell::RefCell,
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
    },
};

use epoll::{ControlOptions, Event, Events};
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::GuestMemoryAtomic;

use super::pair::Pair;
use crate::path::ring::{Memory, QueueFault};

/// Guest memory as the crates share it.
pub type SharedMemory = GuestMemoryAtomic<Memory>;

thread_local! {
    /// Rings made by this thread and not yet collected: the crate makes them, and tells nobody.
    static MADE: RefCell<Vec<Ring>> = const { RefCell::new(Vec::new()) };
}

/// The ring is in order.
const SOUND: u8 = 0;
/// The guest broke it.
const BROKEN: u8 = 1;
/// It lies outside guest memory as it is now.
const OUTSIDE: u8 = 2;

/// One virtqueue.
#[derive(Clone)]
pub struct Ring {
    inner: VringMutex<SharedMemory>,
    own: Arc<Own>,
}

/// What we keep of a ring beside the crate's own state.
#[derive(Debug, Default)]
struct Own {
    call: Mutex<Option<Arc<File>>>,
    error: Mutex<Option<Arc<File>>>,
    /// The event loop that the kick is registered with, and under which number.
    event_loop: OnceLock<(RawFd, u64)>,
    /// The pair of a receive ring.
    receives_for: OnceLock<Arc<Pair>>,
    /// It became ready, and no batch has run since.
    fresh: AtomicBool,
    /// [`SOUND`], or the guest broke it: it rests until it is stopped and started again.
    broken: AtomicU8,
    /// Operations of the control thread that are under way.
    control: AtomicUsize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("own", &self.own).finish_non_exhaustive()
    }
}

impl Ring {
    /// The rings that the crate made in `work`, in the order of their indices.
    pub fn made_in<T>(work: impl FnOnce() -> T) -> (T, Vec<Self>) {
        MADE.take();
        let done = work();
        (done, MADE.take())
    }

    /// Tells the ring where its kick is registered.
    pub fn belongs_to(&self, event_loop: RawFd, token: u64) {
        let _ = self.own.event_loop.set((event_loop, token));
    }

    /// Tells a receive ring which pair is to know when it is not served any more.
    pub fn receives_for(&self, pair: Arc<Pair>) {
        let _ = self.own.receives_for.set(pair);
    }

    /// The ring is not served: nothing is to come for it.
    fn give_up_tap_queue(&self) {
        if let Some(pair) = self.own.receives_for.get() {
            pair.give_up_tap_queue();
        }
    }

    /// Signals the guest.
    pub fn signal(&self) {
        write_event(&self.own.call);
    }

    /// The guest broke the ring: it rests. To be called under the ring's lock.
    pub fn mark_broken(&self, fault: QueueFault) {
        let why = if fault == QueueFault::Outside { OUTSIDE } else { BROKEN };
        self.own.broken.store(why, Ordering::Relaxed);
    }

    /// Tells the front end that the ring is broken.
    pub fn signal_error(&self) {
        write_event(&self.own.error);
    }

    /// Memory has changed: a ring that was outside may be inside again (a region is changed by removing and
    /// adding it).
    pub fn memory_changed(&self) {
        let _ = self.own.broken.compare_exchange(OUTSIDE, SOUND, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Waits until the control thread, if it wants the ring, has had it. A mutex is not fair: the queue's
    /// thread would take it again and again, and a front end would wait for its answer.
    pub fn let_control_pass(&self) {
        while self.own.control.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
    }

    /// The control thread changes something.
    fn control<T>(&self, work: impl FnOnce(&VringMutex<SharedMemory>) -> T) -> T {
        self.own.control.fetch_add(1, Ordering::AcqRel);
        let done = work(&self.inner);
        self.own.control.fetch_sub(1, Ordering::AcqRel);
        done
    }

    /// True if the ring may be worked on.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.own.broken.load(Ordering::Relaxed) != SOUND
    }

    /// Before the first batch of a ring that became ready: where it starts, which `begin` finds out. The guest
    /// may have cleared the ring after it was set up (a firmware's driver hands over to the kernel's), so this is
    /// looked up late. Gives what `begin` says; false for any later batch.
    ///
    /// # Errors
    /// What `begin` says; it is then asked again before the next batch.
    pub fn settle(&self, begin: impl FnOnce() -> Result<bool, QueueFault>) -> Result<bool, QueueFault> {
        if !self.own.fresh.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let place = begin();
        self.own.fresh.store(place.is_err(), Ordering::Relaxed);
        place
    }

    /// The ring is stopped: nothing is to be settled any more.
    pub fn set_stopped(&self) {
        self.own.fresh.store(false, Ordering::Relaxed);
    }
}

/// Adds 1 to an eventfd. The lock is released before: a write that blocks must not block the control thread.
fn write_event(to: &Mutex<Option<Arc<File>>>) {
    let file = lock(to).clone();
    if let Some(file) = file {
        // It can fail only when the counter is full: then the other side has a signal to come anyway.
        let _ = rustix::io::write(&*file, &1_u64.to_ne_bytes());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> VringStateGuard<'a, SharedMemory> for Ring {
    type G = <VringMutex<SharedMemory> as VringStateGuard<'a, SharedMemory>>::G;
}
impl<'a> VringStateMutGuard<'a, SharedMemory> for Ring {
    type G = <VringMutex<SharedMemory> as VringStateMutGuard<'a, SharedMemory>>::G;
}

impl VringT<SharedMemory> for Ring {
    fn new(memory: SharedMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        let inner = VringMutex::new(memory, max_queue_size)?;
        let ring = Self { inner, own: Arc::default() };
        MADE.with_borrow_mut(|made| made.push(ring.clone()));
        Ok(ring)
    }

    fn set_queue_ready(&self, ready: bool) {
        self.control(|inner| {
            let mut state = inner.get_mut();
            if ready {
                // A ring that stops before its first batch is still to be settled.
                self.own.fresh.store(true, Ordering::Relaxed);
            }
            self.own.broken.store(SOUND, Ordering::Relaxed);
            state.get_queue_mut().set_ready(ready);
        });
        if !ready {
            self.give_up_tap_queue();
        }
    }

    /// Where a ring starts is decided before its first batch.
    fn set_queue_next_avail(&self, _base: u16) {}
    fn set_queue_next_used(&self, _index: u16) {}

    fn set_kick(&self, file: Option<File>) {
        let state = self.inner.get_mut();
        let running = state.is_enabled() && state.get_queue().ready();
        let old = state.get_kick().as_ref().map(AsRawFd::as_raw_fd);
        drop(state);
        if let (true, Some(old), Some(new), Some((event_loop, token))) =
            (running, old, &file, self.own.event_loop.get())
        {
            let event = Event::new(Events::EPOLLIN, *token);
            let _ = epoll::ctl(*event_loop, ControlOptions::EPOLL_CTL_DEL, old, event);
            let _ = epoll::ctl(*event_loop, ControlOptions::EPOLL_CTL_ADD, new.as_raw_fd(), event);
            // The old one may hold a kick that nobody has read.
            let _ = rustix::io::write(new, &1_u64.to_ne_bytes());
        }
        self.control(|inner| inner.set_kick(file));
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.inner.read_kick() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(self.inner.get_ref().is_enabled()),
            other => other,
        }
    }

    fn set_call(&self, file: Option<File>) {
        *lock(&self.own.call) = file.as_ref().and_then(|file| file.try_clone().ok()).map(Arc::new);
        self.control(|inner| inner.set_call(file));
        // QEMU changes the descriptor of a running ring without waiting (from its own to the guest's, when the
        // guest unmasks the interrupt). A signal that went to the old one would be lost: give the new one one.
        if self.inner.get_ref().get_queue().ready() {
            self.signal();
        }
    }

    fn set_err(&self, file: Option<File>) {
        *lock(&self.own.error) = file.as_ref().and_then(|file| file.try_clone().ok()).map(Arc::new);
        self.inner.set_err(file);
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, SharedMemory>>::G {
        self.inner.get_ref()
    }
    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, SharedMemory>>::G {
        self.inner.get_mut()
    }
    fn add_used(&self, index: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(index, len)
    }
    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }
    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }
    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }
    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }
    fn set_enabled(&self, enabled: bool) {
        self.control(|inner| inner.set_enabled(enabled));
        // One that becomes ready later, or is so already, is served when it has a buffer.
        if !enabled || !self.get_ref().get_queue().ready() {
            self.give_up_tap_queue();
        }
    }
    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), QueueError> {
        self.control(|inner| inner.set_queue_info(descriptors, available, used))
    }
    fn queue_next_avail(&self) -> u16 {
        self.control(VringT::queue_next_avail)
    }
    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.control(VringT::queue_used_idx)
    }
    fn set_queue_size(&self, size: u16) {
        self.control(|inner| inner.set_queue_size(size));
    }
    fn set_queue_event_idx(&self, enabled: bool) {
        self.control(|inner| inner.set_queue_event_idx(enabled));
    }
}
