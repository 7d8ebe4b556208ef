//! Walking a descriptor chain (virtio 1.2, section 2.7.5). Whatever the guest wrote there, the walk ends
//! after at most [`DESCRIPTORS_MAX`] descriptors, and what is not a proper chain is a counted drop.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{VolatileMemory, VolatileSlice, volatile_memory::VolatileArrayRef};

use super::ring::{OpenRing, Pieces, QueueFault};

/// Most descriptors that one chain may have, whatever the queue size: a 64 KiB frame of a Linux guest has at
/// most 19; the bound keeps the work that one kick can cause small.
pub const DESCRIPTORS_MAX: usize = 256;

/// Longest chain that is looked at, in bytes. Above it a chain is malformed and counts no bytes.
const BYTES_MAX: u64 = 1 << 20;

/// Bits of `Descriptor::flags` (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Why a chain is no frame. The guest's fault, never ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// A `next` outside its table.
    BadLink,
    /// More than [`DESCRIPTORS_MAX`] descriptors: a loop, most likely.
    TooManyDescriptors,
    /// Device-writable in transmit, or device-readable in receive.
    WrongDirection,
    /// Not in guest memory.
    OutsideMemory,
    /// Nested, linked on, empty, or of a length that is no whole number of descriptors.
    BadIndirectTable,
    /// More than a mebibyte.
    TooLong,
    /// Not even a virtio-net header.
    ShorterThanHeader,
}

/// What the buffers of a chain are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The device reads them: the guest transmits.
    Transmit,
    /// The device writes them: the guest receives.
    Receive,
}

/// A chain that was taken from the transmit ring and whose bytes are in hand.
///
/// It is made by `Batch::take` only, and ends in `OpenRing::give_back` or is un-taken.
#[derive(Debug)]
#[must_use = "a chain that is not given back is a buffer that the guest has lost"]
pub struct Chain {
    head: u16,
}

impl Chain {
    pub(super) const fn new(head: u16) -> Self {
        Self { head }
    }
    pub(super) const fn into_head(self) -> u16 {
        self.head
    }
}

/// A chain that was taken and walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// Its head's index.
    pub head: u16,
    /// Its length in bytes, or why it is none.
    pub bytes: Result<u32, Malformed>,
    /// How many entries of the queue's own table it takes up.
    pub table_entries: u16,
    /// How many descriptors it has, those of an indirect table included.
    pub descriptors: usize,
}

impl<'m> OpenRing<'_, 'm> {
    /// Takes the next chain and finds its buffers.
    ///
    /// # Errors
    /// [`QueueFault`] when the ring itself is broken.
    #[inline]
    pub fn take(&mut self, purpose: Purpose, pieces: &mut Pieces<'m>) -> Result<Option<Walked>, QueueFault> {
        let Some(head) = self.take_head()? else { return Ok(None) };
        let mut walk = Walk { purpose, bytes: 0, descriptors: 1, table_entries: 1 };
        // `take_head` has seen to it that there is such a descriptor. This is the one read of it.
        let first = self.table.load(head.into());
        let bytes = if first.flags() & (NEXT | INDIRECT) == 0 {
            walk.add(first, self, pieces).and_then(|()| walk.bytes())
        } else {
            walk.run(self, first, pieces)
        };
        let Walk { table_entries, descriptors, .. } = walk;
        Ok(Some(Walked { head, bytes, table_entries, descriptors }))
    }
}

/// One walk.
struct Walk {
    purpose: Purpose,
    bytes: u64,
    descriptors: usize,
    table_entries: u16,
}

impl Walk {
    /// Walks on from the first descriptor, where there is more than that one.
    #[inline(never)]
    fn run<'m>(
        &mut self,
        ring: &mut OpenRing<'_, 'm>,
        first: Descriptor,
        pieces: &mut Pieces<'m>,
    ) -> Result<u32, Malformed> {
        let table = ring.table;
        let last = self.follow(&table, first, ring, pieces)?;
        self.table_entries = u16::try_from(self.descriptors).unwrap_or(u16::MAX);
        if last.flags() & INDIRECT != 0 {
            let (table, entries) = indirect_table(last, ring)?;
            let table = table.get_array_ref(0, entries).map_err(|_| Malformed::OutsideMemory)?;
            self.descriptors = self.descriptors.saturating_add(1);
            let last = self.follow(&table, table.load(0), ring, pieces)?;
            if last.flags() & INDIRECT != 0 {
                return Err(Malformed::BadIndirectTable);
            }
        }
        self.bytes()
    }

    fn bytes(&self) -> Result<u32, Malformed> {
        u32::try_from(self.bytes).map_err(|_| Malformed::TooLong)
    }

    /// Follows the links in one table. Returns the last descriptor: one that is indirect (its buffer not
    /// added), or one without a link.
    fn follow<'m>(
        &mut self,
        table: &VolatileArrayRef<'_, Descriptor, ()>,
        first: Descriptor,
        ring: &mut OpenRing<'_, 'm>,
        pieces: &mut Pieces<'m>,
    ) -> Result<Descriptor, Malformed> {
        let mut descriptor = first;
        loop {
            if descriptor.flags() & INDIRECT != 0 {
                return Ok(descriptor);
            }
            self.add(descriptor, ring, pieces)?;
            if descriptor.flags() & NEXT == 0 {
                return Ok(descriptor);
            }
            let next = usize::from(descriptor.next());
            if next >= table.len() {
                return Err(Malformed::BadLink);
            }
            self.descriptors = self.descriptors.saturating_add(1);
            if self.descriptors > DESCRIPTORS_MAX {
                return Err(Malformed::TooManyDescriptors);
            }
            descriptor = table.load(next); // the one read of it
        }
    }

    #[inline]
    fn add<'m>(
        &mut self,
        d: Descriptor,
        ring: &mut OpenRing<'_, 'm>,
        pieces: &mut Pieces<'m>,
    ) -> Result<(), Malformed> {
        let writable = d.flags() & WRITE != 0;
        if writable != (self.purpose == Purpose::Receive) {
            return Err(Malformed::WrongDirection);
        }
        self.bytes = self.bytes.saturating_add(u64::from(d.len()));
        // A receive chain may offer more than any frame needs; a transmit chain that long is no frame.
        if self.purpose == Purpose::Transmit && self.bytes > BYTES_MAX {
            return Err(Malformed::TooLong);
        }
        ring.memory.resolve(d.addr().0, d.len(), pieces).map_err(|_| Malformed::OutsideMemory)
    }
}

/// The table that an indirect descriptor leads to, and how many entries it has.
fn indirect_table<'m>(
    d: Descriptor,
    ring: &OpenRing<'_, 'm>,
) -> Result<(VolatileSlice<'m, ()>, usize), Malformed> {
    let bytes = usize::try_from(d.len()).unwrap_or(usize::MAX);
    let entries = bytes.checked_div(size_of::<Descriptor>()).unwrap_or_default();
    let whole = bytes.is_multiple_of(size_of::<Descriptor>());
    if d.flags() & NEXT != 0 || !whole || !(1..=DESCRIPTORS_MAX).contains(&entries) {
        return Err(Malformed::BadIndirectTable);
    }
    let table = ring.memory.indirect_table(d.addr().0, bytes).ok_or(Malformed::OutsideMemory)?;
    Ok((table, entries))
}
