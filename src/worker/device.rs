//! The vhost-user device: what the front end asked for, and which queue pair an event belongs to. No frame is
//! looked at here.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::io::Errno;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};

use super::{
    pair::{self, Direction, Kicks, Pair, Shared},
    queues::TapQueues,
    vring::{Ring, SharedMemory},
};
use crate::{
    keeper::brief::Brief,
    ledger::Ledger,
    policy::{
        Policy,
        handover::{self, Packet},
    },
    tap,
};

/// Largest queue size that the device takes.
const QUEUE_SIZE_MAX: usize = 32_768;
/// Rings of a queue pair.
const RINGS: usize = 2;

/// What woke a pair's thread. The crate has `0..RINGS` for the kicks of the thread's own rings, and the number of
/// all rings of the port (at most 32) for its exit event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Token {
    ReceiveKick = 0,
    TransmitKick = 1,
    Tap = 64,
    Again = 65,
    Policy = 66,
}

impl Token {
    const fn decode(event: u16) -> Option<Self> {
        match event {
            0 => Some(Self::ReceiveKick),
            1 => Some(Self::TransmitKick),
            64 => Some(Self::Tap),
            65 => Some(Self::Again),
            66 => Some(Self::Policy),
            _ => None,
        }
    }
}

/// One port's device.
///
/// Who takes the locks of pairs: a pair's own thread takes its own, for a turn; any other thread one at a time, or
/// all of them in the order of their numbers.
#[derive(Debug)]
pub struct Device {
    shared: Arc<Shared>,
    policies: OwnedFd,
    rings: OnceLock<Vec<Ring>>,
    pairs: Vec<Arc<Pair>>,
}

/// What a device is made of.
#[derive(Debug)]
pub struct Parts {
    /// What the monitor said of the port.
    pub brief: Brief,
    /// Guest memory, empty still.
    pub memory: SharedMemory,
    /// The tap's queues and eventfds that the keeper can write to as well, one of each for each queue pair.
    pub pairs: Vec<pair::Parts>,
    /// Which queues of the tap are attached.
    pub queues: Arc<TapQueues>,
    /// Where policies come from.
    pub policies: OwnedFd,
    /// Where to count.
    pub ledger: Ledger,
    /// The connection's number, by which the ledger knows its rings.
    pub session: u64,
}

/// A descriptor that a thread watches: with which events, and under which number.
pub type Source = (RawFd, EventSet, u64);

impl Device {
    /// A device without memory, rings and policy: it passes nothing.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let Parts { brief, memory, pairs, queues, policies, ledger, session } = parts;
        let shared = Arc::new(Shared { brief, memory, acked: AtomicU64::new(0), queues });
        let pair = |parts| Arc::new(Pair::new(parts, Arc::clone(&shared), &ledger, session));
        let pairs = pairs.into_iter().map(pair).collect();
        Self { shared, policies, rings: OnceLock::new(), pairs }
    }

    /// Gives the device its rings, which the crate made.
    pub fn adopt(&self, rings: Vec<Ring>) {
        for (receive, pair) in rings.iter().step_by(RINGS).zip(&self.pairs) {
            receive.receives_for(Arc::clone(pair));
        }
        let _ = self.rings.set(rings);
    }

    /// Descriptors to be watched by a pair's thread. The first pair's watches the policies too.
    pub fn sources(&self, thread: usize) -> Vec<Source> {
        let both_ways = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let Some(pair) = self.pairs.get(thread) else { return Vec::new() };
        let mut sources = vec![
            (pair.tap().as_fd().as_raw_fd(), both_ways, Token::Tap as u64),
            (pair.again(), EventSet::IN, Token::Again as u64),
        ];
        if thread == 0 {
            sources.push((self.policies.as_raw_fd(), EventSet::IN, Token::Policy as u64));
        }
        sources
    }

    /// The end: a frame that still waits is counted, and no ring is served any more.
    pub fn finish(&self) {
        self.pairs.iter().for_each(|pair| pair.finish());
    }

    /// Tells each pair which event loop watches its tap.
    pub fn watched_by(&self, thread: usize, event_loop: RawFd) {
        if let Some(pair) = self.pairs.get(thread) {
            pair.belongs_to(event_loop, Token::Tap as u64);
        }
    }

    fn ring(&self, index: usize) -> Option<&Ring> {
        self.rings.get().and_then(|rings| rings.get(index))
    }

    /// Runs turns of one ring of a pair. True if frames came to their end.
    fn run(&self, thread: usize, direction: Direction) -> bool {
        let ring = self.ring(RINGS * thread + usize::from(direction == Direction::Transmit));
        let (Some(pair), Some(ring)) = (self.pairs.get(thread), ring) else { return false };
        let kicks = if pair.polls().is_some() { Kicks::Unwanted } else { Kicks::Wanted };
        pair.run(ring, direction, kicks)
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

    /// It is acknowledged when it is in force for every pair.
    fn swap_policy(&self, generation: u64, file: &OwnedFd) -> Packet {
        let Brief { vm, label, port, .. } = &self.shared.brief;
        match Policy::read(file) {
            Ok(policy) if policy.generation == generation && policy.label == self.shared.brief.label() => {
                let in_force = self.pairs.iter().map(|pair| pair.put_in_force(policy)).min();
                self.pairs.iter().for_each(|pair| pair.wake());
                Packet::Acknowledged(in_force.unwrap_or(generation))
            }
            Ok(_) => Packet::Refused(generation),
            Err(e) => {
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
        RINGS * self.pairs.len()
    }
    /// One thread for each pair: a mask of its rings.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.pairs.len()).map(|pair| 0b11 << (RINGS * pair)).collect()
    }
    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX
    }
    fn features(&self) -> u64 {
        self.shared.brief.features()
    }
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }
    fn set_event_idx(&self, _enabled: bool) {} // the crate tells each queue

    /// Offloads belong to the tap, not to its queues.
    fn acked_features(&self, acked: u64) {
        let _no_turn_runs: Vec<_> = self.pairs.iter().map(|pair| pair.quiet()).collect();
        let offloads = self.pairs.first().map_or(Ok(()), |pair| tap::set_offloads(pair.tap(), acked));
        if let Err(e) = offloads {
            let Brief { vm, label, port, .. } = &self.shared.brief;
            tracing::warn!(vm, label, port, "the tap's offloads could not be set: {e}");
        }
        self.shared.acked.store(acked, Ordering::Relaxed);
    }

    /// When this returns no turn uses the memory of before.
    fn update_memory(&self, _memory: SharedMemory) -> io::Result<()> {
        self.pairs.iter().for_each(|pair| drop(pair.quiet()));
        self.rings.get().into_iter().flatten().for_each(Ring::memory_changed);
        self.pairs.iter().for_each(|pair| pair.wake());
        Ok(())
    }

    /// When this returns no turn runs on the ring, and none will; the base that the front end is told is behind
    /// all that was done.
    fn stop_vring(&self, index: u32) -> io::Result<()> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let direction = if index % RINGS == 0 { Direction::Receive } else { Direction::Transmit };
        if let (Some(pair), Some(ring)) = (self.pairs.get(index / RINGS), self.ring(index)) {
            pair.stop_ring(ring, direction);
        }
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    /// Never an error for something that the guest did: an error ends the thread.
    fn handle_event(&self, event: u16, set: EventSet, _rings: &[Ring], thread: usize) -> io::Result<()> {
        let Some(pair) = self.pairs.get(thread) else { return Ok(()) };
        pair.beat();
        let moved = match Token::decode(event) {
            Some(Token::ReceiveKick) => self.run(thread, Direction::Receive),
            Some(Token::TransmitKick) => self.run(thread, Direction::Transmit),
            Some(Token::Tap) => {
                let received = set.contains(EventSet::IN) && self.run(thread, Direction::Receive);
                // The tap says that it has room each time that it says anything.
                let room = set.contains(EventSet::OUT) && pair.waits_for_room();
                (room && self.run(thread, Direction::Transmit)) || received
            }
            Some(Token::Again) => {
                pair.woken();
                let transmitted = self.run(thread, Direction::Transmit);
                self.run(thread, Direction::Receive) || transmitted
            }
            // Every pair is woken when a policy is in force.
            Some(Token::Policy) => {
                self.take_policies().map_err(|_| io::Error::other("the monitor is gone"))?;
                false
            }
            None => false,
        };
        if let (Some(receive), Some(transmit)) = (self.ring(RINGS * thread), self.ring(RINGS * thread + 1)) {
            pair.linger([receive, transmit], moved);
        }
        Ok(())
    }
}
