//! Sending frames.
//!
//! Each head of the queue owns a piece of guest memory. A frame is written there behind its header; where
//! its layout cuts it into several buffers, a few bytes of poison lie between them, so that a backend that
//! takes neighbouring buffers for one is found out, and odd addresses come for free.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::mapping::Area;
use crate::memory::{Memory, MemoryError, Piece};
use crate::queue::{Buffer, Fault, Queue, Refused, Silence};
use crate::vnet::VnetHeader;

/// Bytes between two buffers of one chain.
pub(crate) const GAP: usize = 3;
/// What they hold.
const POISON: u8 = 0xA5;

/// How a frame and its header are cut into buffers.
#[derive(Clone, Copy, Debug)]
pub enum Layout<'a> {
    /// One buffer for both.
    Single,
    /// One for the header, one for the frame.
    HeaderApart,
    /// Header and frame as one row of bytes, cut into these lengths; what is left goes into one more. A
    /// length may be 0.
    Scattered(&'a [usize]),
    /// As the inner one, in an indirect table.
    Indirect(&'a Layout<'a>),
}

/// Frames and their bytes without the virtio-net header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames.
    pub frames: u64,
    /// Bytes.
    pub bytes: u64,
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, more: Self) {
        self.frames += more.frames;
        self.bytes += more.bytes;
    }
}

/// Why a frame was not sent.
#[derive(Debug)]
pub enum NotSent {
    /// There is no room in the queue, or for so many buffers.
    Queue(Refused),
    /// The frame is larger than the room that each head has.
    TooLarge {
        /// Bytes of the frame, its header and the gaps.
        size: usize,
        /// Bytes that there are.
        room: usize,
    },
    /// The device broke the ring.
    Fault(Fault),
    /// The device did nothing.
    Silence(Silence),
    /// The kick failed.
    Kick(io::Error),
}

impl fmt::Display for NotSent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Queue(refused) => write!(f, "transmit: {refused}"),
            Self::TooLarge { size, room } => write!(f, "transmit: {size} bytes in room for {room}"),
            Self::Fault(fault) => write!(f, "transmit: {fault}"),
            Self::Silence(silence) => write!(f, "transmit: {silence}"),
            Self::Kick(source) => write!(f, "transmit: kick: {source}"),
        }
    }
}

impl std::error::Error for NotSent {}

impl From<Refused> for NotSent {
    fn from(refused: Refused) -> Self {
        Self::Queue(refused)
    }
}

impl From<Fault> for NotSent {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Silence> for NotSent {
    fn from(silence: Silence) -> Self {
        Self::Silence(silence)
    }
}

impl From<io::Error> for NotSent {
    fn from(source: io::Error) -> Self {
        Self::Kick(source)
    }
}

/// A transmit queue with room for one frame at each head.
#[derive(Debug)]
pub struct Transmitter {
    /// The queue, for what is wrong on purpose.
    pub queue: Queue,
    rooms: Vec<Piece>,
    header_size: usize,
    /// By head: the frame's length for which the descriptor there is already right; 0 = for none.
    ready: Box<[u32]>,
    /// Reused, so that sending does not allocate.
    chain: Vec<Buffer>,
    sent: Traffic,
    done: u64,
}

impl Transmitter {
    /// Room for `room` bytes at each head: header, frame, gaps.
    ///
    /// # Errors
    /// When guest memory has not that much left.
    pub fn new(
        memory: &mut Memory,
        queue: Queue,
        room: u32,
        header_size: usize,
    ) -> Result<Self, MemoryError> {
        let size = queue.ring().size();
        let rooms = (0..size).map(|_| memory.allocate(room.into(), 1)).collect::<Result<_, _>>()?;
        let ready = vec![0; size.into()].into();
        Ok(Self { queue, rooms, header_size, ready, chain: Vec::new(), sent: Traffic::default(), done: 0 })
    }

    /// Frames added so far, and their bytes.
    #[must_use]
    pub fn sent(&self) -> Traffic {
        self.sent
    }

    /// Chains that the device gave back.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Where the frames of a head lie.
    #[must_use]
    pub fn room(&self, head: u16) -> Option<&Piece> {
        self.rooms.get(usize::from(head))
    }

    /// As after a reset of the device.
    pub fn reset(&mut self, start: u16) {
        self.queue.reset(start);
        self.ready.fill(0);
    }
}

/// Any frame in any layout.
impl Transmitter {
    /// Writes a frame and adds its chain; the device sees it at `flush`.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn add(&mut self, frame: &[u8], header: &VnetHeader, layout: Layout<'_>) -> Result<u16, NotSent> {
        let head = self.queue.next_head().ok_or(Refused::Full)?;
        self.cut(frame.len(), layout, head)?;
        let indirect = matches!(layout, Layout::Indirect(_));
        let added = self.queue.add(&self.chain, indirect)?;
        debug_assert_eq!(added, head, "the next head is the next chain's");
        self.fill(frame, header, head);
        self.ready[usize::from(head)] = 0;
        self.sent.frames += 1;
        self.sent.bytes += frame.len() as u64;
        Ok(head)
    }

    /// Adds a chain of the caller's own making, anywhere in or outside of guest memory; not counted as sent.
    ///
    /// # Errors
    /// When the queue has no room.
    pub fn add_chain(&mut self, chain: &[Buffer], indirect: bool) -> Result<u16, Refused> {
        let head = self.queue.add(chain, indirect)?;
        self.ready[usize::from(head)] = 0;
        Ok(head)
    }

    /// Shows the device all that was added, and kicks it if it wants that.
    ///
    /// # Errors
    /// When the kick fails.
    pub fn flush(&mut self) -> io::Result<bool> {
        self.queue.publish();
        self.queue.kick_if_needed()
    }

    /// `add` and `flush`.
    ///
    /// # Errors
    /// As both.
    pub fn send(&mut self, frame: &[u8], header: &VnetHeader, layout: Layout<'_>) -> Result<u16, NotSent> {
        let head = self.add(frame, header, layout)?;
        self.flush()?;
        Ok(head)
    }

    /// Takes back what the device is done with. Returns how many chains.
    ///
    /// # Errors
    /// When the device broke the ring.
    pub fn reclaim(&mut self) -> Result<u64, Fault> {
        let mut count = 0;
        while let Some(used) = self.queue.next_used()? {
            self.queue.release(used.head);
            count += 1;
        }
        self.done += count;
        Ok(count)
    }

    /// Waits, called by the device each time, until it has given back everything.
    ///
    /// # Errors
    /// When it breaks the ring, or does nothing for that long.
    pub fn drain(&mut self, within: Duration) -> Result<(), NotSent> {
        self.reclaim()?;
        while self.queue.in_flight() > 0 {
            self.queue.wait(within)?;
            self.reclaim()?;
        }
        Ok(())
    }

    /// Lays the chain for a frame of `length` bytes out over the room of `head`.
    fn cut(&mut self, length: usize, layout: Layout<'_>, head: u16) -> Result<(), NotSent> {
        let total = self.header_size + length;
        let header = [self.header_size];
        let lengths = match layout {
            Layout::Indirect(&layout) => return self.cut(length, layout, head),
            Layout::Single => &[],
            Layout::HeaderApart => header.as_slice(),
            Layout::Scattered(lengths) => lengths,
        };
        let room = &self.rooms[usize::from(head)];
        self.chain.clear();
        let (mut left, mut at) = (total, 0);
        for length in lengths.iter().copied().chain([total]) {
            let length = length.min(left);
            let over = || NotSent::TooLarge { size: at + length, room: room.area.length() };
            if at + length > room.area.length() {
                return Err(over());
            }
            let len = u32::try_from(length).map_err(|_| over())?;
            self.chain.push(Buffer { addr: room.guest + at as u64, len, writable: false });
            left -= length;
            at += length + GAP;
            if left == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Writes header, frame and poison to where the chain says.
    fn fill(&self, frame: &[u8], header: &VnetHeader, head: u16) {
        let room = &self.rooms[usize::from(head)];
        let header = header.bytes();
        let mut rest = [&header[..self.header_size], frame];
        let mut at = 0;
        for buffer in &self.chain {
            let mut left = usize::try_from(buffer.len).unwrap_or(usize::MAX);
            for part in &mut rest {
                let (now, later) = part.split_at(left.min(part.len()));
                room.area.write(at, now);
                *part = later;
                at += now.len();
                left -= now.len();
            }
            let gap = GAP.min(room.area.length() - at);
            room.area.write(at, &[POISON; GAP][..gap]);
            at += gap;
        }
    }
}

/// The same frames again and again, without a copy or an allocation: for benchmarks.
impl Transmitter {
    /// Writes a frame, all in one buffer, to the room and the descriptor of every head; `frame` is called
    /// with each. Nothing may be in flight or added.
    ///
    /// # Errors
    /// When a frame does not fit; `Full` when something is in flight.
    pub fn prefill<'a>(&mut self, mut frame: impl FnMut(u16) -> &'a [u8]) -> Result<(), NotSent> {
        self.prefill_offloaded(|head| (frame(head), VnetHeader::default()))
    }

    /// The same with a header of the caller's for each frame.
    ///
    /// # Errors
    /// As `prefill`.
    pub fn prefill_offloaded<'a>(
        &mut self,
        mut frame: impl FnMut(u16) -> (&'a [u8], VnetHeader),
    ) -> Result<(), NotSent> {
        let size = self.queue.ring().size();
        if self.queue.free() != size {
            return Err(Refused::Full.into());
        }
        for head in 0..size {
            let (bytes, header) = frame(head);
            self.cut(bytes.len(), Layout::Single, head)?;
            self.fill(bytes, &header, head);
            self.queue.prepare(head, self.chain[0]);
            self.ready[usize::from(head)] = self.chain[0].len;
        }
        Ok(())
    }

    /// Adds up to `most` frames that `prefill` wrote, shows them and kicks if needed. Fewer go out when the
    /// queue is full, or when another frame was sent meanwhile from where they were written.
    ///
    /// # Errors
    /// When the kick fails.
    pub fn send_batch(&mut self, most: u16) -> io::Result<u16> {
        self.send_changed(most, |_, _| {})
    }

    /// The same; before each frame goes out, `change` is lent the memory that it lies in, and told where there it
    /// begins, behind its header.
    ///
    /// # Errors
    /// As `send_batch`.
    pub fn send_changed(&mut self, most: u16, mut change: impl FnMut(&Area, usize)) -> io::Result<u16> {
        let mut count = 0;
        let mut bytes = 0;
        while count < most {
            let Some(head) = self.queue.next_head() else { break };
            let length = self.ready[usize::from(head)];
            if length == 0 || self.queue.add_unchanged().is_none() {
                break;
            }
            change(&self.rooms[usize::from(head)].area, self.header_size);
            bytes += u64::from(length);
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        self.sent.frames += u64::from(count);
        self.sent.bytes += bytes - u64::from(count) * self.header_size as u64;
        self.flush()?;
        Ok(count)
    }
}
