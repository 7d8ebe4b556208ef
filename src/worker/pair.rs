//! One queue pair: the turns of its two rings, on a thread of its own.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use epoll::{ControlOptions, Event, Events};
use vhost_user_backend::VringT;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;

use super::{
    queues::TapQueues,
    vring::{Ring, SharedMemory},
};
use crate::{
    features,
    keeper::brief::Brief,
    ledger::{Account, DropReason, Ledger, Part, Pulse},
    path::{
        self, Turn, WaitsFor,
        forward::Tap,
        inspect::{Coalesce, Link},
        receive::Receive,
        ring::{Memory, QueueFault},
        transmit::Transmit,
    },
    policy::Policy,
    wire::vnet::{HEADER_LEN, NegotiatedOffloads},
};

/// Turns of a queue before other events have theirs.
const TURNS: usize = 4;
/// How often frames may be found while lingering before other events have their turn.
const FINDS: usize = 16;
/// Length of the virtio-net header of a driver without `VERSION_1` and `MRG_RXBUF` (virtio 1.2, 5.1.6.1).
const LEGACY_HEADER_LEN: usize = 10;
/// Between two lines of the log that the guest caused.
const PAUSE: Duration = Duration::from_secs(1);

/// A ring of a pair (virtio 1.2, 5.1.2: receiveq1, transmitq1, receiveq2, ...).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What the guest gets.
    Receive,
    /// What the guest sends.
    Transmit,
}

/// Is the guest to kick when it makes more available?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kicks {
    /// The thread may sleep next.
    Wanted,
    /// The thread looks again before it sleeps.
    Unwanted,
}

/// What all pairs of a port share.
#[derive(Debug)]
pub struct Shared {
    /// What the monitor said of the port.
    pub brief: Brief,
    /// Guest memory.
    pub memory: SharedMemory,
    /// Features that the driver acknowledged.
    pub acked: AtomicU64,
    /// Which queues of the tap are attached.
    pub queues: Arc<TapQueues>,
}

impl Shared {
    fn link(&self) -> Link {
        let acked = self.acked.load(Ordering::Relaxed);
        let modern = acked & (features::VERSION_1 | features::MRG_RXBUF) != 0;
        Link {
            mtu: self.brief.mtu,
            negotiated: NegotiatedOffloads::from_features(acked),
            header_len: if modern { HEADER_LEN } else { LEGACY_HEADER_LEN },
            coalesce: match (self.brief.coalesce, self.brief.uso) {
                (false, _) => Coalesce::Nothing,
                (true, false) => Coalesce::Tcp,
                (true, true) => Coalesce::TcpAndUdp,
            },
        }
    }
}

/// One queue pair.
#[derive(Debug)]
pub struct Pair {
    shared: Arc<Shared>,
    number: u16,
    tap: Tap,
    /// Readable when a turn was bounded and there is more to do, and when the keeper wants to see a pulse.
    again: OwnedFd,
    pulse: Pulse,
    /// The event loop that the tap is registered with, and under which number.
    event_loop: OnceLock<(RawFd, u64)>,
    /// Other threads that wait for the pair. (A mutex is not fair.)
    others: AtomicUsize,
    state: Mutex<State>,
}

/// What the pair's thread changes. Its lock is held for a turn, so whoever takes it knows that no turn runs.
#[derive(Debug)]
pub struct State {
    /// The connection's number, by which the ledger knows its rings.
    session: u64,
    policy: Option<Policy>,
    transmit: Transmit,
    receive: Receive,
    /// Frames wait for room in the tap.
    tap_full: bool,
    /// What comes to the tap wakes nobody, as the guest has no buffer for it.
    is_deaf: bool,
    /// When the guest last caused a line in the log.
    said: Option<Instant>,
}

/// What a pair is made of.
#[derive(Debug)]
pub struct Parts {
    /// Its number, from 0.
    pub number: u16,
    /// Its queue of the tap.
    pub tap: OwnedFd,
    /// An eventfd that the keeper can write to as well.
    pub again: OwnedFd,
}

impl Pair {
    /// A pair without rings and policy: it passes nothing.
    #[must_use]
    pub fn new(parts: Parts, shared: Arc<Shared>, ledger: &Ledger, session: u64) -> Self {
        let Parts { number, tap, again } = parts;
        let account = |part| Account::succeed(ledger, part, session);
        Self {
            shared,
            number,
            tap: Tap::new(tap),
            again,
            pulse: Pulse::new(ledger.clone(), number),
            event_loop: OnceLock::new(),
            others: AtomicUsize::new(0),
            state: Mutex::new(State {
                session,
                policy: None,
                transmit: Transmit::new(account(Part::transmit(number))),
                receive: Receive::new(account(Part::receive(number))),
                tap_full: false,
                is_deaf: false,
                said: None,
            }),
        }
    }

    /// Its queue of the tap.
    pub const fn tap(&self) -> &Tap {
        &self.tap
    }

    /// The eventfd that asks for another turn.
    pub fn again(&self) -> RawFd {
        self.again.as_raw_fd()
    }

    /// Tells the pair where its tap is watched, and under which number.
    pub fn belongs_to(&self, event_loop: RawFd, token: u64) {
        let _ = self.event_loop.set((event_loop, token));
    }

    /// The pair's thread lives.
    pub fn beat(&self) {
        self.pulse.beat();
    }

    /// Wakes the pair's thread, for a turn of both rings.
    pub fn wake(&self) {
        let _ = rustix::io::write(&self.again, &1_u64.to_ne_bytes());
    }

    /// The thread is awake.
    pub fn woken(&self) {
        let _ = rustix::io::read(&self.again, &mut [0_u8; 8]);
    }

    /// For another thread: no turn runs while it holds this, and none comes before it.
    pub fn quiet(&self) -> MutexGuard<'_, State> {
        self.others.fetch_add(1, Ordering::AcqRel);
        let state = self.state();
        self.others.fetch_sub(1, Ordering::AcqRel);
        state
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a policy in force, unless a later one is; gives the generation that is. When this returns no frame
    /// passes under an earlier one.
    pub fn put_in_force(&self, policy: Policy) -> u64 {
        let mut pair = self.quiet();
        // One that was meant for a worker before us may be older than what we have.
        let newest = pair.policy.filter(|known| known.generation > policy.generation).unwrap_or(policy);
        pair.policy = Some(newest);
        newest.generation
    }

    /// The tap has room again, and frames wait for that.
    pub fn waits_for_room(&self) -> bool {
        self.state().tap_full
    }

    /// Runs turns of one ring; asks for another event if there is more to do after them. True if frames came to
    /// their end.
    pub fn run(&self, vring: &Ring, direction: Direction, kicks: Kicks) -> bool {
        let mut moved = false;
        for _ in 0..TURNS {
            let turn = self.turn(vring, direction, kicks);
            moved |= turn.frames > 0;
            if turn.signal {
                vring.signal();
            }
            if let Some(fault) = turn.fault {
                self.broken(vring, direction, fault);
            }
            if !turn.more {
                return moved;
            }
        }
        self.wake();
        moved
    }

    /// After an event: looks for more frames for a while, if that is wanted and the event had brought some, and
    /// then asks for kicks again. To sleep and to be woken by another processor takes as long as ten frames and more,
    /// for who wakes as well.
    pub fn linger(&self, rings: [&Ring; 2], moved: bool) {
        let Some(poll) = self.polls() else { return };
        let both = |kicks| {
            let [receive, transmit] = rings;
            let sent = self.run(transmit, Direction::Transmit, kicks);
            self.run(receive, Direction::Receive, kicks) || sent
        };
        let (mut until, mut finds) = (Instant::now() + poll, 0);
        while moved && finds < FINDS && Instant::now() < until {
            if both(Kicks::Unwanted) {
                until = Instant::now() + poll;
                finds += 1;
            }
            std::hint::spin_loop();
        }
        both(Kicks::Wanted);
    }

    /// How long it looks for more before it sleeps, if it does.
    pub fn polls(&self) -> Option<Duration> {
        let poll = self.shared.brief.poll_us;
        (poll > 0).then(|| Duration::from_micros(poll.into()))
    }

    fn turn(&self, vring: &Ring, direction: Direction, kicks: Kicks) -> Turn {
        vring.let_control_pass();
        while self.others.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        let mut pair = self.state();
        let memory = self.shared.memory.memory();
        let mut state = vring.get_mut();
        let runs = state.is_enabled() && state.get_queue().ready() && !vring.is_broken();
        if pair.policy.is_none() || !runs {
            return Turn::default();
        }
        let queue = state.get_queue_mut();
        let took_over = match vring.settle(|| pair.begin(direction, queue, &memory)) {
            Ok(took_over) => took_over,
            Err(fault) => {
                vring.mark_broken(fault);
                return Turn::fault(fault);
            }
        };
        let State { policy: Some(policy), transmit, receive, tap_full, is_deaf, .. } = &mut *pair else {
            return Turn::default();
        };
        let looks_again = kicks == Kicks::Unwanted;
        let port = path::Port { policy, link: self.shared.link(), tap: &self.tap, looks_again };
        let mut turn = match direction {
            Direction::Receive => {
                self.serve_tap_queue(queue, &memory);
                let mergeable = self.shared.acked.load(Ordering::Relaxed) & features::MRG_RXBUF != 0;
                let turn = receive.turn(queue, &memory, &port, mergeable);
                self.listen(is_deaf, &turn);
                turn
            }
            Direction::Transmit => {
                let turn = transmit.turn(queue, &memory, &port);
                *tap_full = turn.waits_for == Some(WaitsFor::Room);
                turn
            }
        };
        if let Some(fault) = turn.fault {
            vring.mark_broken(fault);
        }
        // The worker before us may have died between publishing and signalling.
        turn.signal |= took_over;
        turn
    }

    /// A guest without buffers is not to have its thread woken by each frame that comes to the tap: the tap is
    /// heard again when a turn gets as far as to ask it for a frame.
    fn listen(&self, is_deaf: &mut bool, turn: &Turn) {
        let for_nothing = turn.waits_for == Some(WaitsFor::Buffers) && turn.frames == 0;
        let tap_is_empty = turn.waits_for.is_none() && !turn.more && turn.fault.is_none();
        let changes = if *is_deaf { tap_is_empty } else { for_nothing };
        if !changes {
            return;
        }
        let Some((event_loop, token)) = self.event_loop.get() else { return };
        let incoming = if *is_deaf { Events::EPOLLIN } else { Events::empty() };
        let event = Event::new(incoming | Events::EPOLLOUT | Events::EPOLLET, *token);
        let tap = self.tap.as_fd().as_raw_fd();
        let done = epoll::ctl(*event_loop, ControlOptions::EPOLL_CTL_MOD, tap, event).is_ok();
        *is_deaf = *is_deaf != done;
    }

    /// With the receive ring's first buffer the pair's queue of the tap is attached.
    fn serve_tap_queue(&self, queue: &Queue, memory: &Memory) {
        let (queues, pair) = (&self.shared.queues, usize::from(self.number));
        if queues.are_several() && !queues.is_served(pair) {
            let available = queue.avail_idx(memory, Ordering::Acquire);
            if available.is_ok_and(|index| index.0 != queue.next_avail()) {
                queues.serve(pair);
            }
        }
    }

    fn broken(&self, vring: &Ring, direction: Direction, fault: QueueFault) {
        if direction == Direction::Receive {
            self.discard(&mut self.state());
            self.shared.queues.release_soon(self.number.into());
        }
        vring.signal_error();
        if self.state().may_say() {
            let Brief { vm, label, port, .. } = &self.shared.brief;
            let ring = 2 * self.number + u16::from(direction == Direction::Transmit);
            let text = "it rests until it is reset";
            tracing::warn!(vm, label, port, ring, "the guest broke its queue: {fault}: {text}");
        }
    }

    /// When this returns no turn runs on the ring, and none will. What a dead worker did on a ring that stops
    /// before its first batch is published now.
    pub fn stop_ring(&self, vring: &Ring, direction: Direction) {
        let mut pair = self.quiet();
        let mut state = vring.get_mut();
        let memory = self.shared.memory.memory();
        if vring.settle(|| pair.begin(direction, state.get_queue_mut(), &memory)) == Ok(true) {
            vring.signal();
        }
        vring.set_stopped();
        pair.stop(direction);
    }

    /// For the control thread: the receive ring is not served. When this returns the pair's queue of the tap is
    /// detached, unless it is the one that carries frames while no pair is served.
    pub fn give_up_tap_queue(&self) {
        self.discard(&mut self.quiet());
        self.shared.queues.release(self.number.into());
    }

    /// What waits in a queue of the tap that is about to be detached would be lost uncounted.
    fn discard(&self, pair: &mut State) {
        if let State { policy: Some(policy), receive, .. } = pair
            && self.shared.queues.detaches(self.number.into())
        {
            let port = path::Port { policy, link: self.shared.link(), tap: &self.tap, looks_again: false };
            receive.discard(&port, DropReason::RingDisabled);
        }
    }

    /// The end: a frame that still waits is counted, and no ring is served any more.
    pub fn finish(&self) {
        let mut pair = self.state();
        pair.stop(Direction::Receive);
        pair.stop(Direction::Transmit);
    }
}

impl State {
    /// Before a ring's first batch. True if the guest is to be signalled.
    fn begin(
        &mut self,
        direction: Direction,
        queue: &mut Queue,
        memory: &Memory,
    ) -> Result<bool, QueueFault> {
        match direction {
            Direction::Receive => self.receive.settle(queue, memory, self.session),
            Direction::Transmit => self.transmit.settle(queue, memory, self.session),
        }
    }

    fn stop(&mut self, direction: Direction) {
        match direction {
            Direction::Receive => self.receive.stop(DropReason::RingDisabled),
            Direction::Transmit => self.transmit.stop(),
        }
    }

    /// True at most once in [`PAUSE`]: a guest may break its queue as often as it likes.
    fn may_say(&mut self) -> bool {
        let may = self.said.is_none_or(|said| said.elapsed() >= PAUSE);
        if may {
            self.said = Some(Instant::now());
        }
        may
    }
}
