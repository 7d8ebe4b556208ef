//! The frame in hand: a chain that was taken, and as much of its bytes as is looked at, read from guest memory
//! once. Everything that is decided about the frame is decided by these bytes, and these bytes are sent.
//!
//! ```text
//!   bytes   | vnet header | start of the frame ..... |      private, in the first-level cache
//!   pieces                                            | the rest, still in guest memory | ... |
//! ```
//! The rest is copied when it is known where to: behind this start, or behind the frame before it (`coalesce`).
//!
//! Of a long frame the rest stays where it is, and goes to the tap by an iovec. From which length on that is
//! faster was measured on two shared processors, Linux 6.18 (ratios, as times depend on the machine):
//!
//! | frame in bytes | CPU time of start copied + iovec / all copied | by |
//! |---|---|---|
//! | 256 | 1.04 | `cargo bench -p vmflow-bench --bench copy` |
//! | 512 .. 4,096 | 1.23 .. 1.28 | |
//! | 9,014 | 1.20 | |
//! | 16,384 | 1.13 | |
//! | 32,768 | 1.03 | |
//! | 65,000 | 0.92 .. 1.01 | |
//! | 65,214, from a driver's ring | 0.73 | `qemu-scripts/bench`, TCP with TSO |

use vm_memory::VolatileSlice;

use super::{
    chain::{Chain, Malformed, Purpose},
    ring::{OpenRing, Pieces, QueueFault},
};
use crate::wire::{
    segment::{Segment, Window},
    vnet::{HEADER_LEN, VnetHeader},
};

/// Most frames in one batch.
pub const FRAMES: usize = 64;
/// Longest frame that can pass: an IPv6 packet with a payload of 65,535 bytes behind an Ethernet header with two
/// tags.
pub const FRAME_MAX: usize = 14 + 2 * 4 + 40 + 65_535;
/// A frame up to this length is copied whole: that is the fastest way to the tap as well as the safest.
pub const COPY_WHOLE: usize = 32 << 10;
/// So much of a frame is copied at once, and only this is looked at.
pub const COPY_PREFIX: usize = 256;
/// So many chains before its turn a buffer is fetched from memory.
const AHEAD: u16 = 4;

/// The frame in hand; there is one at a time.
#[derive(Debug)]
pub struct Batch<'p, 'm> {
    /// Virtio-net header, then the frame's start.
    bytes: [u8; HEADER_LEN + COPY_PREFIX],
    /// Length of the guest's virtio-net header in bytes: 12, or 10 for a driver without `VERSION_1` and
    /// `MRG_RXBUF` (virtio 1.2, 5.1.6.1).
    header_len: usize,
    /// L: bytes of the frame without the header.
    len: usize,
    /// Its pieces of guest memory. (Borrowed, as it is large and to stay where it is.)
    pieces: &'p mut Pieces<'m>,
    /// The first piece that is not in `bytes`.
    rest: usize,
    fault: Option<Malformed>,
    segment: Option<Segment>,
}

impl<'p, 'm> Batch<'p, 'm> {
    /// Nothing is in hand. `header_len` is the length of the guest's virtio-net header: 12 bytes, or 10.
    pub fn new(header_len: usize, pieces: &'p mut Pieces<'m>) -> Self {
        Self {
            bytes: [0; HEADER_LEN + COPY_PREFIX],
            header_len,
            len: 0,
            pieces,
            rest: 0,
            fault: None,
            segment: None,
        }
    }

    /// Takes the next chain and copies its start out of guest memory; the frame before it is forgotten.
    ///
    /// # Errors
    /// [`QueueFault`] when the ring itself is broken.
    pub fn take(&mut self, ring: &mut OpenRing<'_, 'm>) -> Result<Option<Chain>, QueueFault> {
        self.pieces.clear();
        ring.fetch_ahead(AHEAD);
        let Some(walked) = ring.take(Purpose::Transmit, self.pieces)? else { return Ok(None) };
        (self.len, self.rest, self.segment) = (0, 0, None);
        self.fault = match walked.bytes.map(|n| usize::try_from(n).unwrap_or(usize::MAX)) {
            Ok(n) if n < self.header_len => Some(Malformed::ShorterThanHeader),
            Ok(n) => {
                self.copy_start(n);
                None
            }
            Err(fault) => Some(fault),
        };
        Ok(Some(Chain::new(walked.head)))
    }

    /// Copies header and start of a chain of so many bytes.
    fn copy_start(&mut self, bytes: usize) {
        self.len = bytes.saturating_sub(self.header_len);
        let begin = HEADER_LEN.saturating_sub(self.header_len);
        let end = HEADER_LEN.saturating_add(self.len.min(COPY_PREFIX));
        let mut room = self.bytes.get_mut(begin..end).unwrap_or_default();
        for piece in self.pieces.iter_mut() {
            let n = piece.copy_to(room);
            if n < piece.len() {
                // `n` lies within the piece.
                *piece = piece.offset(n).unwrap_or(*piece);
                break;
            }
            self.rest = self.rest.saturating_add(1);
            room = room.get_mut(n..).unwrap_or_default();
        }
    }

    /// Why the chain is no frame, if it is none.
    pub(super) const fn fault(&self) -> Option<Malformed> {
        self.fault
    }

    /// The frame's length L in bytes, without the virtio-net header.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// The virtio-net header as the guest wrote it.
    pub(super) fn header(&self) -> VnetHeader {
        let mut bytes = self.bytes.first_chunk().copied().unwrap_or_default();
        if self.header_len < HEADER_LEN {
            // A legacy header lies against the frame, and has no num_buffers.
            bytes.rotate_left(HEADER_LEN.saturating_sub(self.header_len));
            bytes.get_mut(self.header_len..).unwrap_or_default().fill(0);
        }
        VnetHeader::decode(bytes)
    }

    /// Puts the rebuilt virtio-net header in front of the frame: the guest's own is never sent. `segment`: what
    /// the frame is as a part of a longer one.
    pub(super) fn set_header(&mut self, header: VnetHeader, segment: Option<Segment>) {
        if let Some(place) = self.bytes.first_chunk_mut() {
            *place = header.encode();
        }
        self.segment = segment;
    }

    /// What the frame is as a part of a longer one; nothing if it goes to the tap alone.
    pub(super) fn segment(&self) -> Option<Segment> {
        self.segment.filter(|_| !self.is_long())
    }

    /// True if only its start is copied.
    pub(super) const fn is_long(&self) -> bool {
        self.len > COPY_WHOLE
    }

    /// The frame's headers, and whatever is behind them.
    pub(super) fn window(&self) -> &Window {
        const { assert!(COPY_PREFIX >= size_of::<Window>()) };
        let (_, frame) = self.bytes.split_at(HEADER_LEN);
        frame.first_chunk().unwrap_or(&[0; size_of::<Window>()])
    }

    /// The copied start of the frame: at most [`COPY_PREFIX`] bytes.
    pub(super) fn prefix(&self) -> &[u8] {
        self.image().get(HEADER_LEN..).unwrap_or_default()
    }

    /// The virtio-net header and the copied start of the frame.
    pub(super) fn image(&self) -> &[u8] {
        let end = HEADER_LEN.saturating_add(self.len.min(COPY_PREFIX));
        self.bytes.get(..end).unwrap_or_default()
    }

    /// What is behind the start, in guest memory.
    pub(super) fn rest(&self) -> &[VolatileSlice<'m, ()>] {
        self.pieces.get(self.rest..).unwrap_or_default()
    }

    /// Copies what is behind the start out of guest memory.
    pub(super) fn copy_rest(&self, mut into: &mut [u8]) {
        for piece in self.rest() {
            let n = piece.copy_to(into);
            into = into.get_mut(n..).unwrap_or_default();
        }
    }
}
