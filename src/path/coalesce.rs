//! Puts neighbouring frames of one flow together: what goes to the tap in one write.
//!
//! ```text
//!   bytes  | vnet header | headers | payload 0 | payload 1 | payload 2 | ...
//!            ^ the kernel cuts it here again: ^           ^
//! ```
//! A frame joins a [`Run`] only where the kernel's segmentation gives back what the guest sent (`wire::segment`),
//! and only under the same label and verdict. Frames are counted before they are put together, each on its own. A
//! frame that joins nothing is a run of one, and goes as it is.

use arrayvec::{ArrayVec, CapacityError};

use vm_memory::VolatileSlice;

use super::{
    batch::{Batch, COPY_PREFIX, COPY_WHOLE, FRAME_MAX, FRAMES},
    chain::Chain,
    judge::{Judged, Verdict},
};
use crate::wire::{
    segment::{Segment, Train},
    vnet::HEADER_LEN,
};

/// The longest run; no frame that passes is longer.
const BYTES: usize = HEADER_LEN + FRAME_MAX;

const _: () = assert!(COPY_PREFIX <= COPY_WHOLE && COPY_WHOLE <= FRAME_MAX);

/// What a transmit queue keeps for its runs, one after the other, so that none allocates.
#[derive(Debug)]
pub struct Storage {
    bytes: Box<[u8]>,
    frames: Box<ArrayVec<Judged<Chain>, FRAMES>>,
}

impl Default for Storage {
    fn default() -> Self {
        Self { bytes: vec![0; BYTES].into_boxed_slice(), frames: Box::default() }
    }
}

/// Frames with one verdict that are one write to the tap. It owns them until they are given back.
#[derive(Debug)]
#[must_use = "the guest has lost the chains of a run that is not given back"]
pub struct Run<'b> {
    bytes: &'b mut [u8],
    /// How many of the bytes there are.
    used: usize,
    /// The rest of a long frame, in guest memory.
    tail: &'b [VolatileSlice<'b, ()>],
    frames: &'b mut ArrayVec<Judged<Chain>, FRAMES>,
    verdict: Verdict,
    /// What may follow; nothing if the frame goes alone.
    train: Option<Train>,
    /// The first frame's checksums were looked at, and are right.
    is_sound: bool,
}

impl<'b> Run<'b> {
    /// Begins with the frame in hand, of which all is copied.
    pub(super) fn short(storage: &'b mut Storage, judged: Judged<Chain>, batch: &Batch<'_, '_>) -> Self {
        let mut run = Self::begin(storage, judged, batch);
        if run.verdict == Verdict::Forward {
            let end = HEADER_LEN.saturating_add(batch.len());
            batch.copy_rest(run.bytes.get_mut(run.used..end).unwrap_or_default());
            run.used = end;
            run.train = batch.segment().map(Train::new);
        }
        run
    }

    /// Begins with the frame in hand, and ends with it: all but its start stays in guest memory.
    pub(super) fn long(storage: &'b mut Storage, judged: Judged<Chain>, batch: &'b Batch<'_, '_>) -> Self {
        Self { tail: batch.rest(), ..Self::begin(storage, judged, batch) }
    }

    fn begin(storage: &'b mut Storage, judged: Judged<Chain>, batch: &Batch<'_, '_>) -> Self {
        let Storage { bytes, frames } = storage;
        let (start, verdict) = (batch.image(), judged.verdict());
        if let Some(place) = bytes.get_mut(..start.len()) {
            place.copy_from_slice(start);
        }
        frames.clear();
        frames.push(judged);
        Self { bytes, used: start.len(), tail: &[], frames, verdict, train: None, is_sound: false }
    }

    /// True if a frame that follows may join.
    pub(super) const fn may_grow(&self) -> bool {
        self.train.is_some()
    }

    /// Takes in the frame in hand.
    ///
    /// # Errors
    /// The frame, if it is not to follow: it begins another run.
    pub fn join(&mut self, judged: Judged<Chain>, batch: &Batch<'_, '_>) -> Result<(), Judged<Chain>> {
        let same = judged.verdict() == self.verdict
            && self.frames.first().is_some_and(|first| first.label() == judged.label());
        let joined = same
            && batch
                .segment()
                .is_some_and(|segment| self.follows(&segment, batch) && self.append(&segment, batch));
        if !joined {
            return Err(judged);
        }
        self.frames.try_push(judged).map_err(CapacityError::element)
    }

    fn follows(&mut self, segment: &Segment, batch: &Batch<'_, '_>) -> bool {
        let (Some(train), Some(frame)) = (&self.train, self.bytes.get(HEADER_LEN..)) else { return false };
        let follows =
            frame.first_chunk().is_some_and(|first| train.is_followed_by(segment, first, batch.window()));
        if self.frames.is_full() || !follows {
            return false;
        }
        let frame = frame.get(..self.used.saturating_sub(HEADER_LEN)).unwrap_or_default();
        // The first frame's checksums are looked at when a second one comes, so that single frames cost nothing.
        self.is_sound = self.is_sound || train.lead().has_right_checksums(frame);
        self.is_sound
    }

    /// Copies the payload behind the last one's, unless its checksums are wrong. That copy is left then: the frame is
    /// copied by the run that it begins, and it is that copy which is sent. What was judged is its start, which is
    /// read once.
    fn append(&mut self, segment: &Segment, batch: &Batch<'_, '_>) -> bool {
        let end = self.used.saturating_add(segment.payload());
        let Some(room) = self.bytes.get_mut(self.used..end) else { return false };
        let prefix = batch.prefix();
        let Some((_, start)) = prefix.split_at_checked(segment.headers()) else { return false };
        let Some((place, rest)) = room.split_at_mut_checked(start.len()) else { return false };
        place.copy_from_slice(start);
        if !rest.is_empty() {
            batch.copy_rest(rest);
        }
        if !segment.has_right_checksums_with(prefix, room) {
            return false;
        }
        if let Some(train) = &mut self.train {
            train.add(segment, batch.window());
        }
        self.used = end;
        true
    }

    /// What is to be done with the frames.
    pub(super) const fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// How many frames it has: at least one.
    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    /// What is written to the tap: header and copied bytes, then pieces of guest memory.
    pub(super) fn image(&mut self) -> (&[u8], &[VolatileSlice<'b, ()>]) {
        if let Some(train) = self.train.as_ref().filter(|_| self.frames.len() > 1)
            && let Some((header, frame)) = self.bytes.split_first_chunk_mut()
        {
            *header = train.finish(frame).encode();
        }
        (self.bytes.get(..self.used).unwrap_or_default(), self.tail)
    }

    /// Its frames in order, each with the bytes of headers that were left out because it joined others: 0 for the
    /// first.
    pub(super) fn frames(&self) -> impl Iterator<Item = (&Judged<Chain>, u8)> {
        let headers = self.train.as_ref().map_or(0, |train| train.lead().headers());
        let headers = u8::try_from(headers).unwrap_or(u8::MAX);
        self.frames.iter().enumerate().map(move |(n, frame)| (frame, if n == 0 { 0 } else { headers }))
    }

    /// The chains, to be given back.
    pub(super) fn into_chains(self) -> impl Iterator<Item = Chain> + use<'b> {
        self.frames.drain(..).map(Judged::into_frame)
    }
}
