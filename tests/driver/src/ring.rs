//! A split virtqueue as it lies in memory (virtio 1.2, section 2.7): every field, raw.
//!
//! ```text
//!  descriptors   size x { addr u64 | len u32 | flags u16 | next u16 }
//!  available     flags u16 | idx u16 | size x head u16 | used_event u16
//!  used          flags u16 | idx u16 | size x { id u32 | len u32 } | avail_event u16
//! ```
//! Nothing is remembered and nothing is checked here but the bounds of the three areas, so a hostile test
//! can write any value into any field at any time, also from another thread ([`Ring`] is cheap to clone).

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::mapping::Area;
use crate::memory::{Memory, MemoryError, Piece};
use crate::session::RingAddresses;

/// Bytes of a descriptor, in the table of a ring or in an indirect one.
pub const DESCRIPTOR_SIZE: u16 = 16;
/// The largest split ring that virtio allows.
pub const LARGEST_RING: u16 = 1 << 15;
/// Bytes of the available and the used ring before their elements.
const RING_HEADER: usize = 4;
/// Bytes of an element of the used ring.
const USED_SIZE: usize = 8;
/// Where the index is in both rings.
const IDX: usize = 2;

/// Descriptor flags.
pub mod descriptor {
    /// `next` is valid.
    pub const NEXT: u16 = 1;
    /// The device writes the buffer.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// In the available ring's flags: the driver wants no calls. In the used ring's: the device wants no kicks.
pub const NO_NOTIFICATION: u16 = 1;

/// One descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// See [`descriptor`].
    pub flags: u16,
    /// The next one's index.
    pub next: u16,
}

impl Descriptor {
    /// Writes it as entry `index` of a table of descriptors.
    #[inline]
    pub fn write(self, table: &Area, index: u16) {
        let at = usize::from(index) * usize::from(DESCRIPTOR_SIZE);
        table.store_u64(at, self.addr, Relaxed);
        table.store_u32(at + 8, self.len, Relaxed);
        table.store_u16(at + 12, self.flags, Relaxed);
        table.store_u16(at + 14, self.next, Relaxed);
    }

    /// Reads entry `index` of a table of descriptors.
    #[must_use]
    pub fn read(table: &Area, index: u16) -> Self {
        let at = usize::from(index) * usize::from(DESCRIPTOR_SIZE);
        Self {
            addr: table.load_u64(at, Relaxed),
            len: table.load_u32(at + 8, Relaxed),
            flags: table.load_u16(at + 12, Relaxed),
            next: table.load_u16(at + 14, Relaxed),
        }
    }
}

/// The three areas of a ring.
#[derive(Clone, Debug)]
pub struct Ring {
    size: u16,
    descriptors: Piece,
    available: Piece,
    used: Piece,
}

impl Ring {
    /// Finds room for a ring of `size` entries; any size, also one that virtio forbids.
    ///
    /// # Errors
    /// When there is no room.
    pub fn allocate(memory: &mut Memory, size: u16) -> Result<Self, MemoryError> {
        let entries = u64::from(size);
        Ok(Self {
            size,
            descriptors: memory.allocate(u64::from(DESCRIPTOR_SIZE) * entries, 16)?,
            available: memory.allocate(RING_HEADER as u64 + 2 * entries + 2, 2)?,
            used: memory.allocate(RING_HEADER as u64 + USED_SIZE as u64 * entries + 2, 4)?,
        })
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor table, available and used ring: guest addresses and bytes.
    #[must_use]
    pub fn pieces(&self) -> [&Piece; 3] {
        [&self.descriptors, &self.available, &self.used]
    }

    /// What `SET_VRING_ADDR` says of it, without logging.
    #[must_use]
    pub fn addresses(&self, memory: &Memory) -> Option<RingAddresses> {
        Some(RingAddresses {
            flags: 0,
            descriptors: memory.user(self.descriptors.guest)?,
            used: memory.user(self.used.guest)?,
            available: memory.user(self.available.guest)?,
            log: self.used.guest,
        })
    }

    /// Zeroes all of it, then sets both indices, as a driver that begins at `start`.
    pub fn clear(&self, start: u16) {
        for piece in self.pieces() {
            piece.area.fill(0);
        }
        self.set_used_idx(start);
        self.set_available_idx(start);
    }

    fn available_at(index: u16) -> usize {
        RING_HEADER + 2 * usize::from(index)
    }

    fn used_at(index: u16) -> usize {
        RING_HEADER + USED_SIZE * usize::from(index)
    }
}

/// The descriptor table and the available ring: the driver's to write.
impl Ring {
    /// A descriptor.
    #[must_use]
    pub fn descriptor(&self, index: u16) -> Descriptor {
        Descriptor::read(&self.descriptors.area, index)
    }

    /// Writes a descriptor.
    #[inline]
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        descriptor.write(&self.descriptors.area, index);
    }

    /// The available ring's flags.
    #[must_use]
    pub fn available_flags(&self) -> u16 {
        self.available.area.load_u16(0, Relaxed)
    }

    /// Writes the available ring's flags.
    pub fn set_available_flags(&self, flags: u16) {
        self.available.area.store_u16(0, flags, Relaxed);
    }

    /// How far the driver says that it is.
    #[must_use]
    pub fn available_idx(&self) -> u16 {
        self.available.area.load_u16(IDX, Acquire)
    }

    /// Says how far the driver is; all that was written before is seen by who reads it.
    #[inline]
    pub fn set_available_idx(&self, idx: u16) {
        self.available.area.store_u16(IDX, idx, Release);
    }

    /// The head in a slot of the available ring.
    #[must_use]
    pub fn available(&self, slot: u16) -> u16 {
        self.available.area.load_u16(Self::available_at(slot), Relaxed)
    }

    /// Writes the head in a slot of the available ring.
    #[inline]
    pub fn set_available(&self, slot: u16, head: u16) {
        self.available.area.store_u16(Self::available_at(slot), head, Relaxed);
    }

    /// After which used element the driver wants a call (`EVENT_IDX`).
    #[must_use]
    pub fn used_event(&self) -> u16 {
        self.available.area.load_u16(Self::available_at(self.size), Relaxed)
    }

    /// Says after which used element the driver wants a call.
    #[inline]
    pub fn set_used_event(&self, idx: u16) {
        self.available.area.store_u16(Self::available_at(self.size), idx, Relaxed);
    }
}

/// The used ring: the device's to write; the setters are for tests that play the device, or worse.
impl Ring {
    /// The used ring's flags.
    #[must_use]
    pub fn used_flags(&self) -> u16 {
        self.used.area.load_u16(0, Relaxed)
    }

    /// Writes the used ring's flags.
    pub fn set_used_flags(&self, flags: u16) {
        self.used.area.store_u16(0, flags, Relaxed);
    }

    /// How far the device is; all that it wrote before is seen.
    #[inline]
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        self.used.area.load_u16(IDX, Acquire)
    }

    /// Says how far the device is.
    pub fn set_used_idx(&self, idx: u16) {
        self.used.area.store_u16(IDX, idx, Release);
    }

    /// The head and the length in a slot of the used ring.
    #[inline]
    #[must_use]
    pub fn used(&self, slot: u16) -> (u32, u32) {
        let at = Self::used_at(slot);
        (self.used.area.load_u32(at, Relaxed), self.used.area.load_u32(at + 4, Relaxed))
    }

    /// Writes the head and the length in a slot of the used ring.
    pub fn set_used(&self, slot: u16, head: u32, len: u32) {
        let at = Self::used_at(slot);
        self.used.area.store_u32(at, head, Relaxed);
        self.used.area.store_u32(at + 4, len, Relaxed);
    }

    /// After which available element the device wants a kick (`EVENT_IDX`).
    #[must_use]
    pub fn available_event(&self) -> u16 {
        self.used.area.load_u16(Self::used_at(self.size), Relaxed)
    }

    /// Says after which available element the device wants a kick.
    pub fn set_available_event(&self, idx: u16) {
        self.used.area.store_u16(Self::used_at(self.size), idx, Relaxed);
    }
}
