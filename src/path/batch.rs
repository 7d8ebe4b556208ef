//! The arena of one transmit batch: it owns the bytes that were read from guest memory, once, and what was
//! found out about them. Everything after the copy looks at these bytes and sends these bytes.
//!
//! ```text
//!   bytes   | vnet header | frame ......... | vnet header | frame .. |     packed, cache-hot
//!           ^ slot 0: start      copied     ^ slot 1
//!   tails     pieces of guest memory behind the copied start of a long frame
//! ```

use vm_memory::VolatileSlice;

use super::{
    chain::{Chain, Malformed, Walked},
    ring::Pieces,
};
use crate::wire::vnet::{HEADER_LEN, VnetHeader};

/// Most frames in one batch.
pub const FRAMES: usize = 64;
/// A frame up to this length is copied whole: that is the fastest way to the tap as well as the safest.
pub const COPY_WHOLE: usize = 4096;
/// Of a longer frame this much is copied, and only this is looked at.
pub const COPY_PREFIX: usize = 256;
/// Bytes that a batch copies before it ends: what stays in the first-level cache.
const BYTES: usize = 32 << 10;

const _: () = assert!(HEADER_LEN + COPY_WHOLE <= BYTES && COPY_PREFIX <= COPY_WHOLE);

/// What a transmit queue keeps between batches, so that none allocates.
#[derive(Debug)]
pub struct Storage {
    bytes: Box<[u8]>,
    slots: [Slot; FRAMES],
}

/// One frame of a batch.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// Where its virtio-net header begins; the frame is right behind it.
    start: usize,
    /// Bytes of the frame that were copied.
    copied: usize,
    /// Bytes of the frame: L.
    len: usize,
    /// Its pieces in `tails`: first, and how many.
    tail: (usize, usize),
    fault: Option<Malformed>,
}

/// A batch being filled, inspected and sent.
#[derive(Debug)]
pub struct Batch<'s, 'm> {
    storage: &'s mut Storage,
    frames: usize,
    used: usize,
    tails: Pieces<'m>,
}

/// No room for the frame in this batch: it is the first of the next one.
#[derive(Clone, Copy, Debug)]
pub struct Full;

impl Default for Storage {
    fn default() -> Self {
        Self { bytes: vec![0; BYTES].into_boxed_slice(), slots: [Slot::default(); FRAMES] }
    }
}

impl Storage {
    /// Begins a batch.
    pub fn begin<'m>(&mut self) -> Batch<'_, 'm> {
        Batch { storage: self, frames: 0, used: 0, tails: Pieces::new() }
    }
}

impl<'m> Batch<'_, 'm> {
    /// Copies a chain's bytes out of guest memory. `header_len` is the length of the guest's virtio-net
    /// header: 12 bytes, or 10 for a driver without `VERSION_1` and `MRG_RXBUF` (virtio 1.2, 5.1.6.1).
    ///
    /// # Errors
    /// [`Full`]: the chain is to be un-taken.
    pub fn take(
        &mut self,
        walked: Walked,
        pieces: &[VolatileSlice<'m, ()>],
        header_len: usize,
    ) -> Result<Chain, Full> {
        if self.frames >= FRAMES {
            return Err(Full);
        }
        let bytes = match walked.bytes.map(|n| usize::try_from(n).unwrap_or(usize::MAX)) {
            Ok(n) if n < header_len => Err(Malformed::ShorterThanHeader),
            other => other,
        };
        let slot = match bytes {
            Ok(bytes) => self.copy(bytes, pieces, header_len)?,
            Err(fault) => Slot { fault: Some(fault), ..Slot::default() },
        };
        let place = self.frames;
        *self.storage.slot_mut(place) = slot;
        self.frames = self.frames.saturating_add(1);
        Ok(Chain::new(u8::try_from(place).unwrap_or_default(), walked.head))
    }

    fn copy(
        &mut self,
        bytes: usize,
        pieces: &[VolatileSlice<'m, ()>],
        header_len: usize,
    ) -> Result<Slot, Full> {
        let len = bytes.saturating_sub(header_len);
        let copied = if len <= COPY_WHOLE { len } else { COPY_PREFIX };
        let start = self.used;
        let (begin, end) = (
            start.saturating_add(HEADER_LEN.saturating_sub(header_len)),
            start.saturating_add(HEADER_LEN).saturating_add(copied),
        );
        let mut rest = self.storage.bytes.get_mut(begin..end).ok_or(Full)?;
        let first_tail = self.tails.len();
        for piece in pieces {
            if rest.is_empty() {
                self.tails.try_push(*piece).map_err(|_| Full)?;
                continue;
            }
            let n = piece.copy_to(rest);
            if n < piece.len() {
                self.tails.try_push(piece.offset(n).map_err(|_| Full)?).map_err(|_| Full)?;
            }
            rest = rest.get_mut(n..).unwrap_or_default();
        }
        self.used = end;
        let tail = (first_tail, self.tails.len().saturating_sub(first_tail));
        Ok(Slot { start, copied, len, tail, fault: None })
    }

    /// Why the chain is no frame, if it is none.
    pub(super) fn fault(&self, chain: &Chain) -> Option<Malformed> {
        self.slot(chain).fault
    }

    /// The frame's length L in bytes, without the virtio-net header.
    pub(super) fn len(&self, chain: &Chain) -> usize {
        self.slot(chain).len
    }

    /// The virtio-net header as the guest wrote it; `header_len` as in [`Self::take`].
    pub(super) fn header(&self, chain: &Chain, header_len: usize) -> VnetHeader {
        let mut bytes = [0; HEADER_LEN];
        let start = self.slot(chain).start;
        let from = start.saturating_add(HEADER_LEN.saturating_sub(header_len));
        let source = self.storage.bytes.get(from..start.saturating_add(HEADER_LEN)).unwrap_or_default();
        for (byte, value) in bytes.iter_mut().zip(source) {
            *byte = *value;
        }
        VnetHeader::decode(bytes)
    }

    /// Puts the rebuilt virtio-net header in front of the frame: the guest's own is never sent.
    pub(super) fn set_header(&mut self, chain: &Chain, header: VnetHeader) {
        let start = self.slot(chain).start;
        let end = start.saturating_add(HEADER_LEN);
        if let Some(place) = self.storage.bytes.get_mut(start..end) {
            place.copy_from_slice(&header.encode());
        }
    }

    /// The copied bytes of the frame.
    pub(super) fn prefix(&self, chain: &Chain) -> &[u8] {
        let slot = self.slot(chain);
        let start = slot.start.saturating_add(HEADER_LEN);
        self.storage.bytes.get(start..start.saturating_add(slot.copied)).unwrap_or_default()
    }

    /// What is written to the tap: header and copied bytes, then pieces of guest memory.
    pub(super) fn image(&self, chain: &Chain) -> (&[u8], &[VolatileSlice<'m, ()>]) {
        let slot = self.slot(chain);
        let end = slot.start.saturating_add(HEADER_LEN).saturating_add(slot.copied);
        let tail = slot.tail.0..slot.tail.0.saturating_add(slot.tail.1);
        (
            self.storage.bytes.get(slot.start..end).unwrap_or_default(),
            self.tails.get(tail).unwrap_or_default(),
        )
    }

    fn slot(&self, chain: &Chain) -> &Slot {
        let place = usize::from(chain.slot()) % FRAMES;
        #[expect(clippy::indexing_slicing, reason = "the remainder is below the length")]
        &self.storage.slots[place]
    }
}

impl Storage {
    fn slot_mut(&mut self, place: usize) -> &mut Slot {
        #[expect(clippy::indexing_slicing, reason = "the remainder is below the length")]
        &mut self.slots[place % FRAMES]
    }
}
