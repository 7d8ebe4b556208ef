//! Places a frame from the tap into the guest's receive buffers (virtio 1.2, section 5.1.6.4).
//!
//! The buffers are collected first and written last: a frame that is dropped never touches guest memory.

use arrayvec::ArrayVec;
use vm_memory::VolatileSlice;

use super::{
    batch::FRAME_MAX,
    chain::{DESCRIPTORS_MAX, Purpose, Walked},
    forward::{Outcome, Tap},
    inspect::Link,
    judge::{Judged, Verdict},
    ring::{OpenRing, Pieces, QueueFault},
};
use crate::{
    ledger::{DropReason, Fate},
    wire::vnet::{HEADER_LEN, VnetHeader},
};

/// Most buffers that one frame may be spread over.
const BUFFERS_MAX: usize = 1024;
/// Descriptors that are looked at for one frame: buffers of no length hold nothing, and cost time.
const FRAME_DESCRIPTORS_MAX: usize = 1024;
/// The longest start of a frame that is looked at, in bytes.
const PREFIX: usize = 256;

/// A frame that was read from the tap and lies in the [`ReceiveBuffer`]; there is one at a time.
#[derive(Debug)]
#[must_use]
pub struct TapFrame(());

/// The private buffer that frames are read into, and the chains collected for the frame in it.
#[derive(Debug)]
pub struct ReceiveBuffer {
    /// Virtio-net header, then the frame.
    bytes: Box<[u8]>,
    /// L: the frame's length without the header.
    len: usize,
    is_readable: bool,
    heads: Box<ArrayVec<(u16, u32), BUFFERS_MAX>>,
}

impl Default for ReceiveBuffer {
    fn default() -> Self {
        // One byte more than the longest frame, so that a longer one is noticed and not cut.
        let bytes = vec![0; HEADER_LEN + FRAME_MAX + 1].into_boxed_slice();
        Self { bytes, len: 0, is_readable: true, heads: Box::default() }
    }
}

impl ReceiveBuffer {
    /// Reads the next frame from the tap. `None`: there is none now.
    pub(super) fn read(&mut self, tap: &Tap) -> Option<TapFrame> {
        let read = tap.read(&mut self.bytes)?;
        self.is_readable = read.is_ok();
        self.len = read.map_or(0, |bytes| bytes.saturating_sub(HEADER_LEN));
        self.heads.clear();
        Some(TapFrame(()))
    }

    /// False if the kernel could not hand the frame over: of it there is nothing.
    pub(super) const fn is_readable(&self) -> bool {
        self.is_readable
    }

    /// What the tap counts for the frame: its bytes; nothing if it was not handed over.
    pub(super) fn tap_bytes(&self) -> Option<u64> {
        self.is_readable.then_some(self.len as u64)
    }

    /// L in bytes.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// The virtio-net header as the kernel wrote it.
    pub(super) fn header(&self) -> VnetHeader {
        self.bytes.first_chunk().map_or_else(VnetHeader::default, |bytes| VnetHeader::decode(*bytes))
    }

    /// Replaces the header.
    pub(super) fn set_header(&mut self, header: VnetHeader) {
        if let Some(place) = self.bytes.first_chunk_mut() {
            *place = header.encode();
        }
    }

    /// The frame's first bytes.
    pub(super) fn prefix(&self) -> &[u8] {
        let end = HEADER_LEN.saturating_add(self.len.min(PREFIX));
        self.bytes.get(HEADER_LEN..end).unwrap_or_default()
    }

    /// How many chains are to be given back for the frame.
    pub(super) fn heads(&self) -> u16 {
        u16::try_from(self.heads.len()).unwrap_or(u16::MAX)
    }

    /// The chains that are to be given back for the frame, with the bytes written to each.
    pub(super) fn drain_heads(&mut self) -> impl Iterator<Item = (u16, u32)> + '_ {
        self.heads.drain(..)
    }

    /// What the guest gets: its own kind of header, and the frame.
    fn image(&mut self, buffers: usize, header_len: usize) -> &[u8] {
        let header = VnetHeader { num_buffers: u16::try_from(buffers).unwrap_or(u16::MAX), ..self.header() };
        self.set_header(header);
        let missing = HEADER_LEN.saturating_sub(header_len);
        if missing > 0 {
            // A legacy header has no num_buffers: move it up to the frame.
            self.bytes.copy_within(..header_len, missing);
        }
        let end = HEADER_LEN.saturating_add(self.len);
        self.bytes.get(missing..end).unwrap_or_default()
    }
}

/// What became of placing.
#[derive(Debug)]
pub enum Placed {
    /// The frame is at its end.
    Done(Outcome<Judged<TapFrame>>),
    /// The guest has too few buffers now: nothing was taken, and the frame waits.
    Waits(Judged<TapFrame>),
    /// The ring is broken; the frame waits for the guest's reset.
    Broken(Judged<TapFrame>, QueueFault),
}

/// Why the buffers that were collected cannot be used.
enum Unusable {
    /// There may be more later.
    TooFewNow,
    /// However long we wait.
    Never(DropReason),
    Broken(QueueFault),
}

/// Places a frame that may pass; any other is at its end already.
pub fn place(
    judged: Judged<TapFrame>,
    buffer: &mut ReceiveBuffer,
    ring: &mut OpenRing<'_, '_>,
    link: &Link,
    mergeable: bool,
) -> Placed {
    if let Verdict::Drop(reason) = judged.verdict() {
        return Placed::Done(Outcome::new(judged, Fate::Dropped(reason)));
    }
    let bytes = buffer.len.saturating_add(link.header_len);
    let mut pieces = Pieces::new();
    match collect(bytes, &mut buffer.heads, &mut pieces, ring, mergeable) {
        Ok(()) => {
            let buffers = buffer.heads.len();
            write(buffer.image(buffers, link.header_len), &pieces);
            share_out(bytes, &mut buffer.heads);
            Placed::Done(Outcome::new(judged, Fate::Passed))
        }
        Err(Unusable::Never(reason)) => Placed::Done(Outcome::new(judged, Fate::Dropped(reason))),
        Err(Unusable::TooFewNow) => Placed::Waits(judged),
        Err(Unusable::Broken(fault)) => Placed::Broken(judged, fault),
    }
}

/// Takes chains until they hold `bytes`. When they do not, only a malformed chain, and those before it,
/// remain in `heads`, to be given back empty; all others are un-taken.
fn collect<'m>(
    bytes: usize,
    heads: &mut ArrayVec<(u16, u32), BUFFERS_MAX>,
    pieces: &mut Pieces<'m>,
    ring: &mut OpenRing<'_, 'm>,
    mergeable: bool,
) -> Result<(), Unusable> {
    let (mut room, mut entries, mut descriptors) = (0_usize, 0_usize, 0_usize);
    loop {
        let space = pieces.remaining_capacity() >= 2 * DESCRIPTORS_MAX
            && descriptors < FRAME_DESCRIPTORS_MAX
            && !heads.is_full();
        let taken = if space { ring.take(Purpose::Receive, pieces) } else { Ok(None) };
        let unusable = match taken {
            Ok(Some(Walked { head, bytes: Ok(n), table_entries, descriptors: more })) => {
                descriptors = descriptors.saturating_add(more);
                heads.push((head, n));
                room = room.saturating_add(usize::try_from(n).unwrap_or(usize::MAX));
                entries = entries.saturating_add(usize::from(table_entries));
                if room >= bytes {
                    return Ok(());
                }
                if mergeable {
                    continue;
                }
                Unusable::Never(DropReason::BuffersTooSmall)
            }
            Ok(Some(Walked { head, bytes: Err(_), .. })) => {
                heads.push((head, 0));
                heads.iter_mut().for_each(|(_, written)| *written = 0);
                return Err(Unusable::Never(DropReason::Malformed));
            }
            Ok(None) if !space || table_is_used_up(entries, heads.len(), ring.size()) => {
                Unusable::Never(DropReason::BuffersTooSmall)
            }
            Ok(None) => Unusable::TooFewNow,
            Err(fault) => Unusable::Broken(fault),
        };
        ring.untake(u16::try_from(heads.len()).unwrap_or(u16::MAX));
        heads.clear();
        return Err(unusable);
    }
}

/// True when the guest cannot make another chain like these available: its descriptor table has no room.
const fn table_is_used_up(entries: usize, chains: usize, size: u16) -> bool {
    let per_chain = if chains == 0 { 1 } else { entries.div_ceil(chains) };
    entries.saturating_add(per_chain) > size as usize
}

fn write(mut image: &[u8], pieces: &[VolatileSlice<'_, ()>]) {
    for piece in pieces {
        piece.copy_from(image);
        image = image.get(piece.len()..).unwrap_or_default();
    }
}

/// How many of `bytes` each chain got.
fn share_out(bytes: usize, heads: &mut ArrayVec<(u16, u32), BUFFERS_MAX>) {
    let mut rest = u32::try_from(bytes).unwrap_or(u32::MAX);
    for (_, written) in heads {
        *written = rest.min(*written);
        rest = rest.saturating_sub(*written);
    }
}
