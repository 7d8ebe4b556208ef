//! The vhost-user device: what the front end asked for, and which queue an event belongs to. No frame is
//! looked at here.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::io::Errno;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};

use super::vring::{Ring, SharedMemory};
use crate::{
    features,
    keeper::brief::Brief,
    ledger::{Account, DropReason, Ledger, Part, Pulse},
    path::{
        self, Turn,
        forward::Tap,
        inspect::{Coalesce, Link},
        receive::Receive,
        ring::{Memory, QueueFault},
        transmit::Transmit,
    },
    policy::{
        Policy,
        handover::{self, Packet},
    },
    tap,
    wire::vnet::{HEADER_LEN, NegotiatedOffloads},
};

/// Largest queue size that the device takes.
const QUEUE_SIZE_MAX: usize = 32_768;
/// Rings of the one queue pair.
const RINGS: u16 = 2;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Turns of a queue before other events have theirs.
const TURNS: usize = 4;
/// Length of the virtio-net header of a driver without `VERSION_1` and `MRG_RXBUF` (virtio 1.2, 5.1.6.1).
const LEGACY_HEADER_LEN: usize = 10;
/// Between two lines of the log that the guest caused.
const PAUSE: Duration = Duration::from_secs(1);

/// What woke the queue's thread. The crate has `0..RINGS` for kicks and `RINGS` for its exit event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Token {
    ReceiveKick = 0,
    TransmitKick = 1,
    Tap = 3,
    Again = 4,
    Policy = 5,
}

impl Token {
    const fn decode(event: u16) -> Option<Self> {
        match event {
            0 => Some(Self::ReceiveKick),
            1 => Some(Self::TransmitKick),
            3 => Some(Self::Tap),
            4 => Some(Self::Again),
            5 => Some(Self::Policy),
            _ => None,
        }
    }
}

/// One port's device.
#[derive(Debug)]
pub struct Device {
    brief: Brief,
    memory: SharedMemory,
    tap: Tap,
    /// Readable when a turn was bounded and there is more to do, and when the keeper wants to see a pulse.
    again: OwnedFd,
    pulse: Pulse,
    policies: OwnedFd,
    acked: AtomicU64,
    rings: OnceLock<Vec<Ring>>,
    /// The control thread waits for the pair. (A mutex is not fair.)
    control: AtomicUsize,
    pair: Mutex<Pair>,
}

/// What the queue's thread changes. Its lock is held for a turn, so whoever takes it knows that no turn runs.
#[derive(Debug)]
struct Pair {
    /// The connection's number, by which the ledger knows its rings.
    session: u64,
    policy: Option<Policy>,
    transmit: Transmit,
    receive: Receive,
    /// Frames wait for room in the tap.
    tap_full: bool,
    /// When the guest last caused a line in the log.
    said: Option<Instant>,
}

impl Pair {
    /// Before a ring's first batch. True if the guest is to be signalled.
    fn begin(&mut self, ring: usize, queue: &mut Queue, memory: &Memory) -> Result<bool, QueueFault> {
        if ring == RECEIVE {
            self.receive.settle(queue, memory, self.session)
        } else {
            self.transmit.settle(queue, memory, self.session)
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

/// What a device is made of.
#[derive(Debug)]
pub struct Parts {
    /// What the monitor said of the port.
    pub brief: Brief,
    /// Guest memory, empty still.
    pub memory: SharedMemory,
    /// The tap.
    pub tap: OwnedFd,
    /// An eventfd that the keeper can write to as well.
    pub again: OwnedFd,
    /// Where policies come from.
    pub policies: OwnedFd,
    /// Where to count.
    pub ledger: Ledger,
    /// The connection's number, by which the ledger knows its rings.
    pub session: u64,
}

impl Device {
    /// A device without memory, rings and policy: it passes nothing.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let Parts { brief, memory, tap, again, policies, ledger, session } = parts;
        let account = |part| Account::succeed(&ledger, part, session);
        Self {
            brief,
            memory,
            tap: Tap::new(tap),
            again,
            pulse: Pulse::new(ledger.clone(), 0),
            policies,
            acked: AtomicU64::new(0),
            rings: OnceLock::new(),
            control: AtomicUsize::new(0),
            pair: Mutex::new(Pair {
                session,
                policy: None,
                transmit: Transmit::new(account(Part::transmit(0))),
                receive: Receive::new(account(Part::receive(0))),
                tap_full: false,
                said: None,
            }),
        }
    }

    /// Gives the device its rings, which the crate made.
    pub fn adopt(&self, rings: Vec<Ring>) {
        let _ = self.rings.set(rings);
    }

    /// Descriptors to be watched by the queue's thread, with their events and numbers.
    pub fn sources(&self) -> [(i32, EventSet, u64); 3] {
        use std::os::fd::AsFd;
        let both_ways = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        [
            (self.tap.as_fd().as_raw_fd(), both_ways, Token::Tap as u64),
            (self.again.as_raw_fd(), EventSet::IN, Token::Again as u64),
            (self.policies.as_raw_fd(), EventSet::IN, Token::Policy as u64),
        ]
    }

    /// The end: a frame that still waits is counted, and no ring is served any more.
    pub fn finish(&self) {
        let mut pair = self.pair();
        pair.receive.stop(DropReason::RingDisabled);
        pair.transmit.stop();
    }

    /// For the control thread: no turn runs while it holds this, and none comes before it.
    fn quiet(&self) -> MutexGuard<'_, Pair> {
        self.control.fetch_add(1, Ordering::AcqRel);
        let pair = self.pair();
        self.control.fetch_sub(1, Ordering::AcqRel);
        pair
    }

    fn pair(&self) -> MutexGuard<'_, Pair> {
        self.pair.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs turns of one ring; asks for another event if there is more to do after them.
    fn run(&self, ring: usize) {
        let Some(vring) = self.rings.get().and_then(|rings| rings.get(ring)) else { return };
        for _ in 0..TURNS {
            let turn = self.turn(vring, ring);
            if turn.signal {
                vring.signal();
            }
            if let Some(fault) = turn.fault {
                vring.signal_error();
                if self.pair().may_say() {
                    let Brief { vm, label, port, .. } = &self.brief;
                    let text = "it rests until it is reset";
                    tracing::warn!(vm, label, port, ring, "the guest broke its queue: {fault}: {text}");
                }
            }
            if !turn.more {
                return;
            }
        }
        let _ = rustix::io::write(&self.again, &1_u64.to_ne_bytes());
    }

    fn turn(&self, vring: &Ring, ring: usize) -> Turn {
        vring.let_control_pass();
        while self.control.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        let mut pair = self.pair();
        let memory = self.memory.memory();
        let mut state = vring.get_mut();
        let runs = state.is_enabled() && state.get_queue().ready() && !vring.is_broken();
        if pair.policy.is_none() || !runs {
            return Turn::default();
        }
        let queue = state.get_queue_mut();
        let took_over = match vring.settle(|| pair.begin(ring, queue, &memory)) {
            Ok(took_over) => took_over,
            Err(fault) => {
                vring.mark_broken(fault);
                return Turn::fault(fault);
            }
        };
        let Pair { policy: Some(policy), transmit, receive, tap_full, .. } = &mut *pair else {
            return Turn::default();
        };
        let port = path::Port { policy, link: self.link(), tap: &self.tap };
        let mut turn = if ring == RECEIVE {
            let mergeable = self.acked.load(Ordering::Relaxed) & features::MRG_RXBUF != 0;
            receive.turn(queue, &memory, &port, mergeable)
        } else {
            let turn = transmit.turn(queue, &memory, &port);
            *tap_full = turn.tap_full;
            turn
        };
        if let Some(fault) = turn.fault {
            vring.mark_broken(fault);
        }
        // The worker before us may have died between publishing and signalling.
        turn.signal |= took_over;
        turn
    }

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

    /// Takes policies until there are no more, and answers each.
    fn take_policies(&self) -> Result<(), Errno> {
        loop {
            match handover::receive(&self.policies) {
                Ok(Some((Packet::Policy(generation), Some(file)))) => {
                    let answer = self.swap_policy(generation, &file);
                    // A monitor that does not read its answers will see that the generation is not covered.
                    let sent = handover::send(&self.policies, answer, None);
                    if let Err(gone @ (Errno::PIPE | Errno::CONNRESET)) = sent {
                        return Err(gone);
                    }
                }
                Ok(Some(_)) | Err(Errno::PROTO) => {}
                // The monitor is gone: what was decided stays in force until the keeper ends us.
                Ok(None) => return Err(Errno::CONNRESET),
                Err(Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    fn swap_policy(&self, generation: u64, file: &OwnedFd) -> Packet {
        match Policy::read(file) {
            Ok(policy) if policy.generation == generation && policy.label == self.brief.label() => {
                // One that was meant for a worker before us may be older than what we have.
                let in_force = &mut self.pair().policy;
                let newest = in_force.filter(|known| known.generation > generation).unwrap_or(policy);
                *in_force = Some(newest);
                Packet::Acknowledged(newest.generation)
            }
            Ok(_) => Packet::Refused(generation),
            Err(e) => {
                let Brief { vm, label, port, .. } = &self.brief;
                tracing::warn!(vm, label, port, "{e}: the policy before stays in force");
                Packet::Refused(generation)
            }
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        RINGS.into()
    }
    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX
    }
    fn features(&self) -> u64 {
        self.brief.features()
    }
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }
    fn set_event_idx(&self, _enabled: bool) {} // the crate tells each queue

    fn acked_features(&self, acked: u64) {
        let _no_turn_runs = self.quiet();
        if let Err(e) = tap::set_offloads(&self.tap, acked) {
            let Brief { vm, label, port, .. } = &self.brief;
            tracing::warn!(vm, label, port, "the tap's offloads could not be set: {e}");
        }
        self.acked.store(acked, Ordering::Relaxed);
    }

    /// When this returns no turn uses the memory of before.
    fn update_memory(&self, _memory: SharedMemory) -> io::Result<()> {
        drop(self.quiet());
        for ring in self.rings.get().into_iter().flatten() {
            ring.memory_changed();
        }
        let _ = rustix::io::write(&self.again, &1_u64.to_ne_bytes());
        Ok(())
    }

    /// When this returns no turn runs on the ring, and none will. What a dead worker did on a ring that stops
    /// before its first batch is published now, and the base that the front end is told is behind it.
    fn stop_vring(&self, index: u32) -> io::Result<()> {
        let mut pair = self.quiet();
        let ring = usize::try_from(index).unwrap_or(usize::MAX);
        if let Some(vring) = self.rings.get().and_then(|rings| rings.get(ring)) {
            let mut state = vring.get_mut();
            let memory = self.memory.memory();
            if vring.settle(|| pair.begin(ring, state.get_queue_mut(), &memory)) == Ok(true) {
                vring.signal();
            }
            vring.set_stopped();
        }
        match ring {
            RECEIVE => pair.receive.stop(DropReason::RingDisabled),
            TRANSMIT => pair.transmit.stop(),
            _ => {}
        }
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    /// Never an error for something that the guest did: an error ends the thread.
    fn handle_event(&self, event: u16, set: EventSet, _rings: &[Ring], _thread: usize) -> io::Result<()> {
        self.pulse.beat();
        match Token::decode(event) {
            Some(Token::ReceiveKick) => self.run(RECEIVE),
            Some(Token::TransmitKick) => self.run(TRANSMIT),
            Some(Token::Tap) => {
                if set.contains(EventSet::IN) {
                    self.run(RECEIVE);
                }
                // The tap says that it has room each time that it says anything.
                if set.contains(EventSet::OUT) && self.pair().tap_full {
                    self.run(TRANSMIT);
                }
            }
            Some(Token::Again) => {
                let _ = rustix::io::read(&self.again, &mut [0_u8; 8]);
                self.run(TRANSMIT);
                self.run(RECEIVE);
            }
            Some(Token::Policy) => {
                if self.take_policies().is_err() {
                    return Err(io::Error::other("the monitor is gone"));
                }
                self.run(TRANSMIT);
                self.run(RECEIVE);
            }
            None => {}
        }
        Ok(())
    }
}
