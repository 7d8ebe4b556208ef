//! The driver's half of a split virtqueue (virtio 1.2, section 2.7).
//!
//! ```text
//!   add -> publish -> kick_if_needed        wait -> next_used -> release | recycle
//!           avail.idx  avail_event/flags           used_event
//! ```
//! What the driver knows of its chains it keeps for itself and never reads back from the rings: a device,
//! or a hostile test, may have written there. Nothing on this path allocates.

mod events;
mod fault;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::memory::{Memory, MemoryError, Piece};
use crate::ring::{DESCRIPTOR_SIZE, Descriptor, LARGEST_RING, Ring, descriptor};

pub(crate) use events::{event, take};
pub use fault::{Fault, Refused, Silence};

/// One element of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// What was agreed for a queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// `EVENT_IDX` was acknowledged.
    pub event_idx: bool,
    /// `IN_ORDER` was acknowledged: one used element may stand for several chains.
    pub in_order: bool,
    /// Entries of the indirect table that each head has; 0 = none.
    pub indirect: u16,
    /// Where both indices begin.
    pub start: u16,
}

/// A chain that came back: its head, and how many bytes the device says that it wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// As `add` returned it.
    pub head: u16,
    /// Bytes; `None` where `IN_ORDER` let the device say nothing about this chain.
    pub len: Option<u32>,
}

/// Numbers that only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notifications {
    /// Kicks sent.
    pub kicks: u64,
    /// Calls read: as the eventfd counts them.
    pub calls: u64,
    /// Chains that came back before an older one.
    pub out_of_order: u64,
}

/// What the driver knows of one descriptor and the chain that it heads.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The next descriptor of the chain that this one belongs to.
    next: u16,
    /// Descriptors of the chain that this one heads; 0 = heads none.
    length: u16,
    /// The device has that chain.
    in_flight: bool,
}

/// The driver's half of a queue.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    options: Options,
    /// An indirect table for each head.
    tables: Vec<Piece>,
    slots: Box<[Slot]>,
    /// First in, first out, so that chains given back in order are taken in order (`IN_ORDER` asks for that).
    free: Box<[u16]>,
    free_first: u16,
    free_count: u16,
    /// Which head went into which slot of the available ring.
    order: Box<[u16]>,
    /// The next available index; what the device has been told; where the last kick was decided.
    next: u16,
    published: u16,
    kicked: u16,
    /// The next used index to look at, and the device's own, as last read.
    seen: u16,
    device: u16,
    /// The last head of a batch that one used element stands for, and what it says was written there.
    batch: Option<(u16, u32)>,
    kick: OwnedFd,
    call: OwnedFd,
    notifications: Notifications,
}

impl Queue {
    /// A queue of `size` entries, a power of two, in room of its own.
    ///
    /// # Errors
    /// When there is no room, or the kernel gives no eventfd.
    pub fn new(memory: &mut Memory, size: u16, options: Options) -> Result<Self, MemoryError> {
        check_size(size);
        let ring = Ring::allocate(memory, size)?;
        let table = u64::from(options.indirect) * u64::from(DESCRIPTOR_SIZE);
        let count = if options.indirect == 0 { 0 } else { size };
        let tables = (0..count).map(|_| memory.allocate(table, u64::from(DESCRIPTOR_SIZE)));
        let entries = usize::from(size);
        let mut queue = Self {
            ring,
            options,
            tables: tables.collect::<Result<_, _>>()?,
            slots: vec![Slot::default(); entries].into(),
            free: vec![0; entries].into(),
            free_first: 0,
            free_count: 0,
            order: vec![0; entries].into(),
            next: 0,
            published: 0,
            kicked: 0,
            seen: 0,
            device: 0,
            batch: None,
            kick: event()?,
            call: event()?,
            notifications: Notifications::default(),
        };
        queue.reset(options.start);
        Ok(queue)
    }

    /// As after a reset of the device: rings zeroed, nothing in flight, both indices at `start`.
    pub fn reset(&mut self, start: u16) {
        self.ring.clear(start);
        self.slots.fill(Slot::default());
        for (free, index) in self.free.iter_mut().zip(0..) {
            *free = index;
        }
        (self.free_first, self.free_count) = (0, self.ring.size());
        (self.next, self.published, self.kicked) = (start, start, start);
        (self.seen, self.device) = (start, start);
        self.batch = None;
        self.set_call_after(1);
    }

    /// Every field of the rings, raw.
    #[must_use]
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The kick descriptor, for `SET_VRING_KICK`.
    #[must_use]
    pub fn kick_event(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The call descriptor, for `SET_VRING_CALL`.
    #[must_use]
    pub fn call_event(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Kicks, calls, disorder so far.
    #[must_use]
    pub fn notifications(&self) -> Notifications {
        self.notifications
    }

    /// The index that the next added chain gets.
    #[must_use]
    pub fn available_idx(&self) -> u16 {
        self.next
    }

    /// The used index up to which chains were taken back.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        self.seen
    }

    /// Chains that the device has been told of and that were not taken back.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.published.wrapping_sub(self.seen)
    }

    /// Free descriptors.
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free_count
    }

    /// The head that the next chain gets; `None` when there is no free descriptor.
    #[inline]
    #[must_use]
    pub fn next_head(&self) -> Option<u16> {
        (self.free_count > 0).then(|| self.free[usize::from(self.free_first)])
    }

    /// The indirect table of a head.
    #[must_use]
    pub fn table(&self, head: u16) -> Option<&Piece> {
        self.tables.get(usize::from(head))
    }

    #[inline]
    fn mask(&self, index: u16) -> u16 {
        index & (self.ring.size() - 1)
    }
}

/// Giving chains to the device.
impl Queue {
    /// Writes a chain's descriptors and its place in the available ring; the device sees it at `publish`.
    ///
    /// # Errors
    /// When it does not fit.
    #[inline]
    pub fn add(&mut self, chain: &[Buffer], indirect: bool) -> Result<u16, Refused> {
        if indirect { self.add_indirect(chain) } else { self.add_direct(chain) }
    }

    #[inline]
    fn add_direct(&mut self, chain: &[Buffer]) -> Result<u16, Refused> {
        let length = u16::try_from(chain.len()).ok().filter(|length| *length <= self.ring.size());
        let length = length.ok_or(Refused::TooLong)?;
        let head = self.take(length)?;
        let mut index = head;
        for (buffer, left) in chain.iter().zip((0..length).rev()) {
            let next = self.slots[usize::from(index)].next;
            self.ring.set_descriptor(index, buffer.descriptor(left > 0, next));
            index = next;
        }
        self.push(head);
        Ok(head)
    }

    fn add_indirect(&mut self, chain: &[Buffer]) -> Result<u16, Refused> {
        let fits = u16::try_from(chain.len()).ok().filter(|length| *length <= self.options.indirect);
        let length = fits.ok_or(Refused::TooLong)?;
        if length == 0 {
            return Err(Refused::Empty);
        }
        let head = self.take(1)?;
        let table = &self.tables[usize::from(head)];
        for (buffer, index) in chain.iter().zip(0..length) {
            buffer.descriptor(index + 1 < length, index + 1).write(&table.area, index);
        }
        let len = u32::from(length) * u32::from(DESCRIPTOR_SIZE);
        self.ring.set_descriptor(
            head,
            Descriptor { addr: table.guest, len, flags: descriptor::INDIRECT, next: 0 },
        );
        self.push(head);
        Ok(head)
    }

    /// Writes the descriptor of a head that is free, for `add_unchanged`.
    pub fn prepare(&mut self, head: u16, buffer: Buffer) {
        self.ring.set_descriptor(head, buffer.descriptor(false, 0));
    }

    /// Gives the descriptors of the next `add` that takes one: the same as last time, unwritten. For
    /// benchmarks whose descriptors never change. `None` when none is free.
    #[inline]
    pub fn add_unchanged(&mut self) -> Option<u16> {
        let head = self.take(1).ok()?;
        self.push(head);
        Some(head)
    }

    /// Gives a chain that came back, and was not released, to the device again, unchanged.
    #[inline]
    pub fn recycle(&mut self, head: u16) {
        debug_assert!(self.slots[usize::from(head)].length > 0, "recycling a chain that was released");
        self.push(head);
    }

    /// Puts any number into the available ring, without any book-keeping: for hostile tests. What the device
    /// does with it comes back as a [`Fault`] unless the head is one in flight.
    pub fn push_raw(&mut self, head: u16) {
        let slot = self.mask(self.next);
        self.order[usize::from(slot)] = head;
        self.ring.set_available(slot, head);
        self.next = self.next.wrapping_add(1);
    }

    #[inline]
    fn push(&mut self, head: u16) {
        self.slots[usize::from(head)].in_flight = true;
        self.push_raw(head);
    }

    /// Takes descriptors from the free ones and links them; the first is the head.
    #[inline]
    fn take(&mut self, count: u16) -> Result<u16, Refused> {
        if count == 0 {
            return Err(Refused::Empty);
        }
        if count > self.free_count {
            return Err(Refused::Full);
        }
        let head = self.free[usize::from(self.free_first)];
        let mut last = head;
        for step in 1..count {
            let index = self.free[usize::from(self.mask(self.free_first + step))];
            self.slots[usize::from(last)].next = index;
            last = index;
        }
        self.slots[usize::from(head)].length = count;
        self.free_first = self.mask(self.free_first + count);
        self.free_count -= count;
        Ok(head)
    }

    /// Tells the device of all chains added so far. Returns how many are new.
    #[inline]
    pub fn publish(&mut self) -> u16 {
        let new = self.next.wrapping_sub(self.published);
        self.ring.set_available_idx(self.next);
        self.published = self.next;
        new
    }
}

/// Taking chains back.
impl Queue {
    /// The next chain that the device is done with. Its descriptors stay taken until `release`, so that
    /// `recycle` can give it back as it is.
    ///
    /// # Errors
    /// When the device wrote what it may not; a bad element is skipped, a bad index stays.
    #[inline]
    pub fn next_used(&mut self) -> Result<Option<Used>, Fault> {
        if self.seen == self.device && !self.look()? {
            return Ok(None);
        }
        let slot = self.mask(self.seen);
        let oldest = self.order[usize::from(slot)];
        let (head, len) = match self.batch {
            Some(batch) => batch,
            None => self.element(slot)?,
        };
        self.seen = self.seen.wrapping_add(1);
        if head == oldest || !self.options.in_order {
            self.batch = None;
            self.notifications.out_of_order += u64::from(head != oldest);
            return self.landed(head).map(|()| Some(Used { head, len: Some(len) }));
        }
        self.batch = Some((head, len));
        self.landed(oldest).map(|()| Some(Used { head: oldest, len: None }))
    }

    /// All chains that the device is done with so far, one after the other.
    pub fn used(&mut self) -> impl Iterator<Item = Result<Used, Fault>> {
        std::iter::from_fn(|| self.next_used().transpose())
    }

    /// Whether the device is done with a chain that was not taken back.
    #[inline]
    #[must_use]
    pub fn has_used(&self) -> bool {
        self.ring.used_idx() != self.seen
    }

    /// Reads used.idx. False when nothing is new.
    #[inline]
    fn look(&mut self) -> Result<bool, Fault> {
        let to = self.ring.used_idx();
        if to.wrapping_sub(self.seen) > self.in_flight() {
            return Err(Fault::Jump { from: self.seen, to });
        }
        self.device = to;
        Ok(to != self.seen)
    }

    /// The used element in a slot.
    #[inline]
    fn element(&mut self, slot: u16) -> Result<(u16, u32), Fault> {
        let (head, len) = self.ring.used(slot);
        let inside = u16::try_from(head).ok().filter(|head| *head < self.ring.size());
        let Some(inside) = inside else {
            self.seen = self.seen.wrapping_add(1);
            return Err(Fault::NotInFlight { head });
        };
        Ok((inside, len))
    }

    #[inline]
    fn landed(&mut self, head: u16) -> Result<(), Fault> {
        match self.slots.get_mut(usize::from(head)) {
            Some(slot) if slot.in_flight => {
                slot.in_flight = false;
                Ok(())
            }
            _ => Err(Fault::NotInFlight { head: head.into() }),
        }
    }

    /// Frees the descriptors of a chain that came back.
    #[inline]
    pub fn release(&mut self, head: u16) {
        let length = std::mem::take(&mut self.slots[usize::from(head)].length);
        let mut index = head;
        for _ in 0..length {
            let place = self.mask(self.free_first + self.free_count);
            self.free[usize::from(place)] = index;
            self.free_count += 1;
            index = self.slots[usize::from(index)].next;
        }
    }
}

impl Buffer {
    #[inline]
    fn descriptor(self, more: bool, next: u16) -> Descriptor {
        let write = if self.writable { descriptor::WRITE } else { 0 };
        let (link, next) = if more { (descriptor::NEXT, next) } else { (0, 0) };
        Descriptor { addr: self.addr, len: self.len, flags: write | link, next }
    }
}

fn check_size(size: u16) {
    let allowed = size.is_power_of_two() && size <= LARGEST_RING;
    assert!(allowed, "a split ring has a power of two of entries, up to {LARGEST_RING}, not {size}");
}

#[cfg(test)]
mod tests;
