//! Receiving frames.
//!
//! Each head of the queue owns a piece of guest memory, posted as one chain of writable buffers; between
//! the buffers of a chain lie a few bytes that no device may touch, and [`Receiver::receive`] looks whether
//! they, and what lies behind the length that the device told, still hold what the driver put there.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::memory::{Memory, MemoryError, Piece};
use crate::queue::{Buffer, Fault, Queue, Refused, Silence, Used};
use crate::transmit::{GAP, Traffic};
use crate::vnet::{HEADER_SIZE, VnetHeader};

/// What every byte of a posted chain holds before the device writes it.
pub const UNTOUCHED: u8 = 0x5A;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// What is posted at each head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Posting {
    /// The lengths of a chain's buffers.
    pub lengths: Vec<u32>,
    /// Whether they are in an indirect table.
    pub indirect: bool,
}

impl Posting {
    /// One buffer: for mergeable frames, or for whole ones.
    #[must_use]
    pub fn single(length: u32) -> Self {
        Self { lengths: vec![length], indirect: false }
    }

    /// Several buffers: what drivers post for large frames when they cannot be merged.
    #[must_use]
    pub fn chain(lengths: &[u32]) -> Self {
        Self { lengths: lengths.to_vec(), indirect: false }
    }

    /// The same in an indirect table.
    #[must_use]
    pub fn indirect(self) -> Self {
        Self { indirect: true, ..self }
    }

    /// Bytes that a head needs for it.
    fn room(&self) -> u64 {
        self.lengths.iter().map(|length| u64::from(*length) + GAP as u64).sum()
    }
}

/// A frame that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its header.
    pub header: VnetHeader,
    /// The frame.
    pub bytes: Vec<u8>,
    /// How many chains it filled.
    pub buffers: u16,
    /// Bytes that the device wrote although they are behind the length it told, or between two buffers.
    pub strays: usize,
}

/// What `drain_batch` took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Frames and their bytes.
    pub traffic: Traffic,
    /// Chains.
    pub buffers: u16,
}

/// Why no frame came.
#[derive(Debug)]
pub enum NotReceived {
    /// The device broke the ring or a length.
    Fault(Fault),
    /// The device did nothing.
    Silence(Silence),
    /// The kick failed.
    Kick(io::Error),
}

impl fmt::Display for NotReceived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => write!(f, "receive: {fault}"),
            Self::Silence(silence) => write!(f, "receive: {silence}"),
            Self::Kick(source) => write!(f, "receive: kick: {source}"),
        }
    }
}

impl std::error::Error for NotReceived {}

impl From<Fault> for NotReceived {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Silence> for NotReceived {
    fn from(silence: Silence) -> Self {
        Self::Silence(silence)
    }
}

impl From<io::Error> for NotReceived {
    fn from(source: io::Error) -> Self {
        Self::Kick(source)
    }
}

/// What the acknowledged features mean for frames that come.
#[derive(Clone, Copy, Debug)]
pub struct Framing {
    /// Bytes of the header.
    pub header_size: usize,
    /// A frame may fill several chains.
    pub mergeable: bool,
}

/// A receive queue with room for one chain at each head.
#[derive(Debug)]
pub struct Receiver {
    /// The queue, for what is wrong on purpose.
    pub queue: Queue,
    rooms: Vec<Piece>,
    posting: Posting,
    framing: Framing,
    /// Reused, so that posting does not allocate.
    chain: Vec<Buffer>,
    /// Whether `receive` looks for strays: the rooms are then filled again at each posting.
    pub watch: bool,
    received: Traffic,
    buffers: u64,
}

impl Receiver {
    /// Room for the chain of `posting` at each head.
    ///
    /// # Errors
    /// When guest memory has not that much left.
    pub fn new(
        m: &mut Memory,
        queue: Queue,
        posting: Posting,
        framing: Framing,
    ) -> Result<Self, MemoryError> {
        let size = queue.ring().size();
        let rooms = (0..size).map(|_| m.allocate(posting.room(), 1)).collect::<Result<_, _>>()?;
        let received = Traffic::default();
        Ok(Self { queue, rooms, posting, framing, chain: Vec::new(), watch: true, received, buffers: 0 })
    }

    /// Frames received so far, and their bytes.
    #[must_use]
    pub fn received(&self) -> Traffic {
        self.received
    }

    /// Chains that they filled.
    #[must_use]
    pub fn buffers(&self) -> u64 {
        self.buffers
    }

    /// Where the frames of a head come to lie.
    #[must_use]
    pub fn room(&self, head: u16) -> Option<&Piece> {
        self.rooms.get(usize::from(head))
    }

    /// As after a reset of the device: nothing is posted.
    pub fn reset(&mut self, start: u16) {
        self.queue.reset(start);
    }

    /// Posts up to `most` chains more. Returns how many.
    ///
    /// # Errors
    /// When the kick fails.
    pub fn post(&mut self, most: u16) -> io::Result<u16> {
        let mut count = 0;
        while count < most && self.post_one().is_ok() {
            count += 1;
        }
        self.queue.publish();
        self.queue.kick_if_needed()?;
        Ok(count)
    }

    /// Posts as much as the queue holds.
    ///
    /// # Errors
    /// When the kick fails.
    pub fn refill(&mut self) -> io::Result<u16> {
        self.post(u16::MAX)
    }

    fn post_one(&mut self) -> Result<(), Refused> {
        let head = self.queue.next_head().ok_or(Refused::Full)?;
        let room = &self.rooms[usize::from(head)];
        self.chain.clear();
        let mut addr = room.guest;
        for &len in &self.posting.lengths {
            self.chain.push(Buffer { addr, len, writable: true });
            addr += u64::from(len) + GAP as u64;
        }
        if self.watch {
            room.area.fill(UNTOUCHED);
        }
        self.queue.add(&self.chain, self.posting.indirect).map(|_| ())
    }
}

/// Whole frames.
impl Receiver {
    /// Takes the next frame; its chains are free again, not posted.
    ///
    /// # Errors
    /// When the device broke the ring, a length, or `num_buffers`.
    pub fn receive(&mut self) -> Result<Option<Received>, Fault> {
        let Some(used) = self.queue.next_used()? else { return Ok(None) };
        let mut bytes = Vec::new();
        let mut strays = self.take(used, &mut bytes)?;
        let least = self.framing.header_size;
        let short = Fault::Length { head: used.head, len: used.len.unwrap_or(0) };
        let header = bytes.get(..least).and_then(VnetHeader::parse).ok_or(short)?;
        let buffers = if self.framing.mergeable { header.num_buffers } else { 1 };
        for came in 1..buffers {
            let missing = Fault::Missing { buffers, came };
            let used = self.queue.next_used()?.ok_or(missing)?;
            strays += self.take(used, &mut bytes)?;
        }
        if buffers == 0 {
            return Err(Fault::Missing { buffers, came: 1 });
        }
        bytes.drain(..least);
        self.received.frames += 1;
        self.received.bytes += bytes.len() as u64;
        self.buffers += u64::from(buffers);
        Ok(Some(Received { header, bytes, buffers, strays }))
    }

    /// Takes the next frame, waiting for the device's call where none is there.
    ///
    /// # Errors
    /// As `receive`, and silence.
    pub fn receive_within(&mut self, within: Duration) -> Result<Received, NotReceived> {
        loop {
            if let Some(frame) = self.receive()? {
                return Ok(frame);
            }
            self.queue.wait(within)?;
        }
    }

    /// Copies a chain's bytes out and frees it. Returns the strays.
    fn take(&mut self, used: Used, bytes: &mut Vec<u8>) -> Result<usize, Fault> {
        let room = &self.rooms[usize::from(used.head)].area;
        let before = bytes.len();
        let mut left = self.length(used)?;
        let (mut at, mut strays) = (0, 0);
        for length in &self.posting.lengths {
            let length = usize::try_from(*length).unwrap_or(usize::MAX);
            let now = length.min(left);
            let end = bytes.len();
            bytes.resize(end + now, 0);
            room.read(at, &mut bytes[end..]);
            if self.watch {
                strays += touched(room, at + now, length - now + GAP);
            }
            left -= now;
            at += length + GAP;
        }
        self.queue.release(used.head);
        if left > 0 {
            bytes.truncate(before);
            return Err(Fault::Length { head: used.head, len: used.len.unwrap_or(u32::MAX) });
        }
        Ok(strays)
    }

    /// How many bytes the device says that it wrote; where `IN_ORDER` let it say nothing, it filled the chain.
    fn length(&self, used: Used) -> Result<usize, Fault> {
        let all = || self.posting.lengths.iter().sum();
        let len = used.len.unwrap_or_else(all);
        usize::try_from(len).map_err(|_| Fault::Length { head: used.head, len })
    }
}

/// Many frames, without looking at them and without an allocation: for benchmarks.
impl Receiver {
    /// Takes up to `most` chains, counts their frames and bytes, and posts the chains again as they are.
    /// A merged frame is taken whole. The first buffer of a chain must hold the header.
    ///
    /// # Errors
    /// As `receive`, and a kick that fails.
    pub fn drain_batch(&mut self, most: u16) -> Result<Drained, NotReceived> {
        let drained = self.count_batch(most, Queue::recycle)?;
        if drained.buffers > 0 {
            self.queue.publish();
            self.queue.kick_if_needed()?;
        }
        Ok(drained)
    }

    /// The same, but the chains are free then, not posted.
    ///
    /// # Errors
    /// When the device broke the ring, a length, or `num_buffers`.
    pub fn take_batch(&mut self, most: u16) -> Result<Drained, Fault> {
        self.count_batch(most, Queue::release)
    }

    /// Counts up to `most` chains; `then` is what becomes of each.
    fn count_batch(&mut self, most: u16, then: impl Fn(&mut Queue, u16)) -> Result<Drained, Fault> {
        let mut drained = Drained::default();
        while drained.buffers < most {
            let Some(used) = self.queue.next_used()? else { break };
            let mut bytes = self.length(used)? as u64;
            let buffers = self.merged(used.head);
            then(&mut self.queue, used.head);
            for came in 1..buffers {
                let missing = Fault::Missing { buffers, came };
                let used = self.queue.next_used()?.ok_or(missing)?;
                bytes += self.length(used)? as u64;
                then(&mut self.queue, used.head);
            }
            drained.buffers += buffers;
            drained.traffic.frames += 1;
            drained.traffic.bytes += bytes.saturating_sub(self.framing.header_size as u64);
        }
        self.received.frames += drained.traffic.frames;
        self.received.bytes += drained.traffic.bytes;
        self.buffers += u64::from(drained.buffers);
        Ok(drained)
    }

    #[inline]
    fn merged(&self, head: u16) -> u16 {
        if !self.framing.mergeable {
            return 1;
        }
        let mut count = [0; 2];
        self.rooms[usize::from(head)].area.read(NUM_BUFFERS, &mut count);
        u16::from_le_bytes(count).max(1)
    }
}

/// How many bytes of a part are not as the driver left them.
fn touched(room: &crate::mapping::Area, at: usize, length: usize) -> usize {
    let mut bytes = vec![0; length];
    room.read(at, &mut bytes);
    bytes.iter().filter(|byte| **byte != UNTOUCHED).count()
}

const _: () = assert!(NUM_BUFFERS + 2 == HEADER_SIZE, "num_buffers is the header's last field");
