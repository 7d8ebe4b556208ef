//! One virtqueue during one batch: chains are taken from its available ring, and given back through its
//! used ring with one store of `used.idx` (virtio 1.2, section 2.7).
//!
//! The three areas are resolved once per batch; every index and descriptor is read once.

use std::sync::atomic::{AtomicU16, Ordering, fence};

use arrayvec::ArrayVec;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueT, desc::split::Descriptor};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileMemory, VolatileSlice,
    volatile_memory::VolatileArrayRef,
};

use super::{
    account::Recorded,
    coalesce::Run,
    place::{ReceiveBuffer, TapFrame},
    prefetch::prefetch,
};
use crate::ledger::{Account, Committed, RingIdentity, fault::may_die};

/// Guest memory, without a dirty log.
pub type Memory = GuestMemoryMmap<()>;

/// Most pieces of guest memory that the buffers of one frame may consist of.
pub const PIECES: usize = 1024;

/// A chain's buffers, in order.
pub type Pieces<'m> = ArrayVec<VolatileSlice<'m, ()>, PIECES>;

/// The guest broke the queue itself: it stops until the guest resets it. Outside the ledger's equation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueFault {
    /// One of the three areas is not in guest memory.
    #[error("a ring lies outside guest memory")]
    Outside,
    /// `avail.idx` is more than the queue size ahead.
    #[error("avail.idx is further ahead than the queue is long")]
    Jump,
    /// A head index is no descriptor.
    #[error("a head index is not in the descriptor table")]
    BadHead,
}

/// The three areas of a queue that is ready, found in guest memory.
#[derive(Debug)]
pub struct Areas<'m> {
    memory: &'m Memory,
    table: VolatileSlice<'m, ()>,
    avail: VolatileSlice<'m, ()>,
    used: VolatileSlice<'m, ()>,
}

impl<'m> Areas<'m> {
    /// Finds them.
    ///
    /// # Errors
    /// [`QueueFault::Outside`].
    pub fn find(queue: &Queue, memory: &'m Memory) -> Result<Self, QueueFault> {
        let n = usize::from(queue.size());
        let area = |address, bytes| {
            GuestMemoryBackend::get_slice(memory, GuestAddress(address), bytes)
                .map_err(|_| QueueFault::Outside)
        };
        // Layouts: struct vring_avail { flags, idx, ring[size], used_event } of u16; struct vring_used
        // { flags, idx: u16, ring[size]: { id, len: u32 }, avail_event: u16 }.
        Ok(Self {
            memory,
            table: area(queue.desc_table(), n.saturating_mul(16))?,
            avail: area(queue.avail_ring(), n.saturating_mul(2).saturating_add(6))?,
            used: area(queue.used_ring(), n.saturating_mul(8).saturating_add(6))?,
        })
    }
}

/// Proof that a frame's elements are in the used ring, where the guest does not see them yet.
#[derive(Debug)]
#[must_use = "a frame that was given back is to be confirmed in the ledger"]
pub struct GivenBack(());

/// A ring that is being worked on.
#[derive(Debug)]
pub struct OpenRing<'a, 'm> {
    queue: &'a mut Queue,
    pub(super) memory: GuestRegions<'m>,
    pub(super) table: VolatileArrayRef<'a, Descriptor, ()>,
    heads: VolatileArrayRef<'a, u16, ()>,
    used: VolatileArrayRef<'a, u64, ()>,
    indices: Indices<'a>,
    size: u16,
    /// The next head to take.
    next: u16,
    /// avail.idx as last seen.
    end: u16,
    /// Elements written to the used ring and not yet published.
    given_back: u16,
}

/// The fields of both rings that both sides write while the other reads.
#[derive(Clone, Copy, Debug)]
struct Indices<'a> {
    avail_flags: &'a AtomicU16,
    avail_idx: &'a AtomicU16,
    used_event: &'a AtomicU16,
    used_flags: &'a AtomicU16,
    used_idx: &'a AtomicU16,
    avail_event: &'a AtomicU16,
}

impl<'a, 'm> OpenRing<'a, 'm> {
    /// Opens a ring for one batch.
    ///
    /// # Errors
    /// [`QueueFault::Outside`] if the areas are not aligned as they must be.
    pub fn open(queue: &'a mut Queue, areas: &'a Areas<'m>) -> Result<Self, QueueFault> {
        let (size, next) = (queue.size(), queue.next_avail());
        let n = usize::from(size);
        let outside = |_| QueueFault::Outside;
        let Areas { memory, table, avail, used } = areas;
        let indices = Indices {
            avail_flags: avail.get_atomic_ref(0).map_err(outside)?,
            avail_idx: avail.get_atomic_ref(2).map_err(outside)?,
            used_event: avail.get_atomic_ref(n.saturating_mul(2).saturating_add(4)).map_err(outside)?,
            used_flags: used.get_atomic_ref(0).map_err(outside)?,
            used_idx: used.get_atomic_ref(2).map_err(outside)?,
            avail_event: used.get_atomic_ref(n.saturating_mul(8).saturating_add(4)).map_err(outside)?,
        };
        Ok(Self {
            queue,
            memory: GuestRegions { memory, last: None },
            table: table.get_array_ref(0, n).map_err(outside)?,
            heads: avail.get_array_ref(4, n).map_err(outside)?,
            used: used.get_array_ref(4, n).map_err(outside)?,
            indices,
            size,
            next,
            end: next,
            given_back: 0,
        })
    }

    /// The queue size.
    pub(super) const fn size(&self) -> u16 {
        self.size
    }

    /// True if the guest has made a chain available that was not taken yet.
    ///
    /// # Errors
    /// [`QueueFault::Jump`].
    pub fn has_next(&mut self) -> Result<bool, QueueFault> {
        if self.next == self.end {
            self.look()?;
        }
        Ok(self.next != self.end)
    }

    /// Looks at avail.idx.
    fn look(&mut self) -> Result<(), QueueFault> {
        let end = u16::from_le(self.indices.avail_idx.load(Ordering::Acquire));
        if end.wrapping_sub(self.next) > self.size {
            return Err(QueueFault::Jump);
        }
        self.end = end;
        Ok(())
    }

    /// Takes the next head, if there is one.
    pub(super) fn take_head(&mut self) -> Result<Option<u16>, QueueFault> {
        if !self.has_next()? {
            return Ok(None);
        }
        let head = u16::from_le(self.heads.load(self.place(self.next)));
        if head >= self.size {
            return Err(QueueFault::BadHead);
        }
        self.next = self.next.wrapping_add(1);
        Ok(Some(head))
    }

    /// Has the processor fetch the first buffer of the chain that is `ahead` places behind the next one, if it is
    /// there already. A hint: what is read here decides nothing.
    #[inline]
    pub(super) fn fetch_ahead(&self, ahead: u16) {
        if ahead >= self.end.wrapping_sub(self.next) {
            return;
        }
        let head = usize::from(u16::from_le(self.heads.load(self.place(self.next.wrapping_add(ahead)))));
        if head < self.table.len() {
            let first = self.table.load(head);
            self.memory.fetch(first.addr().0);
        }
    }

    /// Un-takes the last `n` heads: they are found again in the next batch.
    pub(super) fn untake(&mut self, n: u16) {
        self.next = self.next.wrapping_sub(n);
    }

    /// Gives the chains of a run back. Only frames that were counted can be given back.
    pub fn give_back(&mut self, recorded: Recorded<Run<'_>>) -> GivenBack {
        for chain in recorded.into_inner().into_chains() {
            self.give_back_head(chain.into_head(), 0);
        }
        GivenBack(())
    }

    /// Gives back the chains that hold a received frame (or none, if it was dropped).
    pub fn give_back_placed(
        &mut self,
        recorded: Recorded<TapFrame>,
        buffer: &mut ReceiveBuffer,
    ) -> GivenBack {
        let _the_frame_in_the_buffer = recorded.into_inner();
        for (head, bytes) in buffer.drain_heads() {
            self.give_back_head(head, bytes);
        }
        GivenBack(())
    }

    fn give_back_head(&mut self, head: u16, bytes: u32) {
        let place = self.place(self.queue.next_used().wrapping_add(self.given_back));
        let element = u64::from(head) | u64::from(bytes) << 32;
        may_die();
        self.used.store(place, element.to_le());
        self.given_back = self.given_back.wrapping_add(1);
    }

    /// Ends the batch: one store makes everything that was given back visible to the guest. True if the
    /// guest wants a signal for it.
    #[must_use]
    pub fn publish(self, in_the_ledger: Committed) -> bool {
        self.queue.set_next_avail(self.next);
        let (old, new) = (self.queue.next_used(), in_the_ledger.into_index());
        debug_assert_eq!(new, old.wrapping_add(self.given_back), "ring and ledger are of one mind");
        if new == old {
            return false;
        }
        may_die();
        self.indices.used_idx.store(new.to_le(), Ordering::Release);
        self.queue.set_next_used(new);
        may_die();
        // The store above must be visible before the guest's wish is read (virtio 1.2, 2.7.7.2).
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            let event = u16::from_le(self.indices.used_event.load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = u16::from_le(self.indices.avail_flags.load(Ordering::Relaxed));
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Ends the batch, in the ledger first if anything happened in it. True if the guest wants a signal.
    #[must_use]
    pub fn end(self, account: &mut Account) -> bool {
        if account.has_news() {
            return self.publish(account.commit());
        }
        self.queue.set_next_avail(self.next);
        false
    }

    /// Asks the guest for a kick when it makes the next chain available. True if it has done so already.
    ///
    /// # Errors
    /// [`QueueFault::Jump`].
    pub fn rearm(&mut self) -> Result<bool, QueueFault> {
        self.wish_for_kick(self.next);
        self.has_next()
    }

    /// As [`Self::rearm`], when the chains that are available are too few: for a chain beyond those.
    ///
    /// # Errors
    /// [`QueueFault::Jump`].
    pub fn rearm_for_more(&mut self) -> Result<bool, QueueFault> {
        let seen = self.end;
        self.wish_for_kick(seen);
        self.look()?;
        Ok(self.end != seen)
    }

    fn wish_for_kick(&self, beyond: u16) {
        if self.queue.event_idx_enabled() {
            self.indices.avail_event.store(beyond.to_le(), Ordering::Relaxed);
        } else {
            self.indices.used_flags.store(0, Ordering::Relaxed);
        }
        // The wish must be visible before avail.idx is looked at once more (virtio 1.2, 2.7.10).
        fence(Ordering::SeqCst);
    }

    /// Tells the guest that kicks are not needed now. With `EVENT_IDX` an old event index does that.
    pub fn suppress(&mut self) {
        if !self.queue.event_idx_enabled() {
            let flags = u16::try_from(VRING_USED_F_NO_NOTIFY).unwrap_or_default();
            self.indices.used_flags.store(flags.to_le(), Ordering::Relaxed);
        }
    }

    /// Where an index lies in a ring. The size is a power of two (the gate sees to it, and the crate).
    fn place(&self, index: u16) -> usize {
        usize::from(index & self.size.wrapping_sub(1))
    }
}

/// Where a ring starts, before its first batch. Where a worker died on this very ring, what that one had done
/// is counted, and published; else a ring starts at the guest's used index. True if the guest is to be
/// signalled: the dead worker may not have come to it.
///
/// # Errors
/// [`QueueFault::Outside`].
pub fn settle(
    queue: &mut Queue,
    memory: &Memory,
    account: &mut Account,
    session: u64,
) -> Result<bool, QueueFault> {
    let used = memory.get_slice(GuestAddress(queue.used_ring()), 4).map_err(|_| QueueFault::Outside)?;
    let used_idx = used.get_atomic_ref::<AtomicU16>(2).map_err(|_| QueueFault::Outside)?;
    let seen = u16::from_le(used_idx.load(Ordering::Acquire));
    let ring = RingIdentity { session, used_ring: queue.used_ring() };
    // The guest may have written anything there; what cannot be is not gone by.
    let left = account.take_over(ring).filter(|index| index.wrapping_sub(seen) <= queue.size());
    if let Some(index) = left {
        may_die();
        used_idx.store(index.to_le(), Ordering::Release);
    } else {
        account.abandon();
        account.begin(ring, seen);
    }
    queue.set_next_avail(account.index());
    queue.set_next_used(account.index());
    Ok(left.is_some())
}

/// Guest memory, with the region of the last look-up at hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct GuestRegions<'m> {
    memory: &'m Memory,
    last: Option<(u64, VolatileSlice<'m, ()>)>,
}

/// The address range is not in guest memory, or in too many pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unmapped;

impl<'m> GuestRegions<'m> {
    /// Adds the pieces that make up `bytes` bytes at a guest physical address.
    #[inline]
    pub(super) fn resolve(
        &mut self,
        address: u64,
        bytes: u32,
        into: &mut Pieces<'m>,
    ) -> Result<(), Unmapped> {
        if bytes == 0 {
            return Ok(());
        }
        if let Some(piece) = self.in_last_region(address, bytes) {
            return into.try_push(piece).map_err(|_| Unmapped);
        }
        self.resolve_anew(address, bytes, into)
    }

    #[inline(never)]
    fn resolve_anew(&mut self, address: u64, bytes: u32, into: &mut Pieces<'m>) -> Result<(), Unmapped> {
        let memory = self.memory;
        if let Some(region) = memory.find_region(GuestAddress(address)) {
            let slice = region.as_volatile_slice().map_err(|_| Unmapped)?;
            self.last = Some((region.start_addr().0, slice));
        }
        let bytes = usize::try_from(bytes).map_err(|_| Unmapped)?;
        for piece in GuestMemoryBackend::get_slices(memory, GuestAddress(address), bytes) {
            into.try_push(piece.map_err(|_| Unmapped)?).map_err(|_| Unmapped)?;
        }
        Ok(())
    }

    /// Has the processor fetch what is at an address, if that is in the region of the last look-up.
    #[inline]
    fn fetch(&self, address: u64) {
        if let Some((start, slice)) = &self.last
            && let Ok(from) = usize::try_from(address.wrapping_sub(*start))
            && from < slice.len()
        {
            prefetch(slice, from);
        }
    }

    #[inline]
    fn in_last_region(&self, address: u64, bytes: u32) -> Option<VolatileSlice<'m, ()>> {
        let (start, slice) = self.last?;
        let offset = usize::try_from(address.wrapping_sub(start)).ok()?;
        slice.subslice(offset, usize::try_from(bytes).ok()?).ok()
    }

    /// An indirect descriptor table (virtio 1.2, 2.7.5.3): in one piece, or it is refused.
    pub(super) fn indirect_table(&self, address: u64, bytes: usize) -> Option<VolatileSlice<'m, ()>> {
        GuestMemoryBackend::get_slice(self.memory, GuestAddress(address), bytes).ok()
    }
}
