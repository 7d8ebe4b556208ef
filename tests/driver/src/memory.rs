//! The guest's memory: files, the regions that a guest sees of them, and room for rings and buffers.
//!
//! ```text
//!  guest physical   0 ........ 0x8_0000 |  hole  | 4 GiB .........
//!                   [ region 0         ]          [ region 1     ]
//!                        |                             |
//!  files            [ memfd 0: offset | region 0 ] [ memfd 1 | region 1 ]
//! ```
//! A vhost-user message names a region by guest address, size, *user* address and file offset. The user
//! addresses told here are made up, far apart and in the opposite order of the regions, so that a backend
//! which mixes up the two address spaces, or takes user addresses for its own, cannot get away with it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::mapping::Area;

/// Memory comes and goes in pages.
pub const PAGE: u64 = 4096;
/// Where a hole below 4 `GiB` ends for a PC's guest.
pub const FOUR_GIB: u64 = 1 << 32;
/// The lowest user address told to a backend.
const USER_BASE: u64 = 0x5000_0000_0000;
/// How far apart the regions' user addresses are; no region may be larger.
const USER_STRIDE: u64 = 1 << 36;

/// One region as wanted: what [`Memory::new`] makes a [`Region`] of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Which file it is a part of, from 0.
    pub file: usize,
    /// Where in that file.
    pub offset: u64,
}

/// Which regions there are, in the order in which they are told to the backend.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The regions.
    pub spans: Vec<Span>,
    /// Whether the files can neither shrink nor grow any more, as with QEMU's `memory-backend-memfd`.
    pub sealed: bool,
    /// Whether the files are of huge pages (2 `MiB`): every size and offset must be a multiple of that, and the
    /// host must have set enough of them aside (`vm.nr_hugepages`).
    pub huge: bool,
    /// Where allocations go.
    pub placement: Placement,
}

/// Which region an allocation is made in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// The first that has room.
    First,
    /// Each time the next one in turn, so that rings and buffers are spread over all regions.
    InTurn,
}

impl Layout {
    /// Sealed files, the regions given, allocations in the first with room.
    #[must_use]
    pub fn of(spans: Vec<Span>) -> Self {
        Self { spans, sealed: true, huge: false, placement: Placement::First }
    }

    /// One region at guest address 0.
    #[must_use]
    pub fn single(size: u64) -> Self {
        Self::of(vec![Span { guest: 0, size, file: 0, offset: 0 }])
    }

    /// As a PC's guest with more memory than fits below its hole: half at 0, half above 4 `GiB`, one file,
    /// allocations in both.
    #[must_use]
    pub fn with_hole(size: u64) -> Self {
        let half = pages(size / 2);
        let low = Span { guest: 0, size: half, file: 0, offset: 0 };
        Self::of(vec![low, Span { guest: FOUR_GIB, offset: half, ..low }]).in_turn()
    }

    /// `count` regions, each with a file of its own at an offset that is not 0, with holes between them, and
    /// told in an order that is not that of their addresses; allocations in all of them.
    #[must_use]
    pub fn scattered(size: u64, count: usize) -> Self {
        let each = pages(size / count.max(1) as u64);
        let place = |file: usize| {
            let step = (count + 1 - file) % count;
            Span { guest: step as u64 * (each + 16 * PAGE) + PAGE, size: each, file, offset: PAGE }
        };
        Self::of((0..count).map(place).collect()).in_turn()
    }

    /// The same with allocations in every region in turn.
    #[must_use]
    pub fn in_turn(self) -> Self {
        Self { placement: Placement::InTurn, ..self }
    }

    /// The same with files that a hostile test can truncate later.
    #[must_use]
    pub fn unsealed(self) -> Self {
        Self { sealed: false, ..self }
    }

    /// The same with huge pages.
    #[must_use]
    pub fn huge(self) -> Self {
        Self { huge: true, ..self }
    }
}

fn pages(size: u64) -> u64 {
    size.next_multiple_of(PAGE).max(PAGE)
}

/// One region of guest memory, mapped here too.
#[derive(Debug)]
pub struct Region {
    /// What it was made of.
    pub span: Span,
    /// The address by which vhost-user messages of the front end mean its beginning.
    pub user: u64,
    area: Area,
    allocated: u64,
}

impl Region {
    /// All of it.
    #[must_use]
    pub fn area(&self) -> &Area {
        &self.area
    }
}

/// Guest memory with a bump allocator: nothing is ever given back.
#[derive(Debug)]
pub struct Memory {
    files: Vec<OwnedFd>,
    regions: Vec<Region>,
    placement: Placement,
    turn: usize,
}

/// A piece of guest memory: its address for descriptors, its window for the driver.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Guest physical address of the first byte.
    pub guest: u64,
    /// The bytes.
    pub area: Area,
}

/// Why guest memory could not be made or given out.
#[derive(Debug)]
pub enum MemoryError {
    /// The kernel refused a file or a mapping.
    Io(io::Error),
    /// A region larger than this machine or the made-up user addresses allow.
    TooLarge(Span),
    /// No region has that many bytes left.
    Exhausted {
        /// What was asked for.
        wanted: u64,
    },
    /// These bytes are not all in guest memory.
    Outside {
        /// Guest physical address.
        guest: u64,
        /// Bytes.
        length: u64,
    },
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(_) => write!(f, "guest memory could not be created"),
            Self::TooLarge(span) => write!(f, "a region of {} bytes is too large", span.size),
            Self::Exhausted { wanted } => write!(f, "no region has {wanted} bytes left"),
            Self::Outside { guest, length } => {
                write!(f, "{length} bytes at guest address {guest:#x} are not all in guest memory")
            }
        }
    }
}

impl std::error::Error for MemoryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        if let Self::Io(source) = self { Some(source) } else { None }
    }
}

impl From<io::Error> for MemoryError {
    fn from(source: io::Error) -> Self {
        Self::Io(source)
    }
}

impl Memory {
    /// Makes the files and maps the regions.
    ///
    /// # Errors
    /// What the kernel refuses, and regions that are too large.
    pub fn new(layout: &Layout) -> Result<Self, MemoryError> {
        let count = layout.spans.iter().map(|span| span.file + 1).max().unwrap_or(0);
        let ends = (0..count).map(|file| file_end(&layout.spans, file));
        let files = ends.map(|end| memfd(end, layout)).collect::<Result<Vec<_>, _>>()?;
        let mut regions = Vec::with_capacity(layout.spans.len());
        for (turn, span) in layout.spans.iter().enumerate() {
            let length = usize::try_from(span.size).map_err(|_| MemoryError::TooLarge(*span))?;
            if span.size > USER_STRIDE {
                return Err(MemoryError::TooLarge(*span));
            }
            let user = USER_BASE + (layout.spans.len() - turn) as u64 * USER_STRIDE;
            let area = Area::map(files[span.file].as_fd(), span.offset, length)?;
            regions.push(Region { span: *span, user, area, allocated: 0 });
        }
        Ok(Self { files, regions, placement: layout.placement, turn: 0 })
    }

    /// The regions, in the order in which they are told to the backend.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The file that a region is a part of.
    #[must_use]
    pub fn file(&self, region: &Region) -> BorrowedFd<'_> {
        self.files[region.span.file].as_fd()
    }

    /// Gives out `size` bytes, aligned to `align` (a power of two), zero unless somebody wrote there.
    ///
    /// # Errors
    /// When no region has that much left.
    pub fn allocate(&mut self, size: u64, align: u64) -> Result<Piece, MemoryError> {
        let count = self.regions.len();
        for step in 0..count {
            let region = (self.turn + step) % count;
            if let Ok(piece) = self.allocate_in(region, size, align) {
                if self.placement == Placement::InTurn {
                    self.turn = (region + 1) % count;
                }
                return Ok(piece);
            }
        }
        Err(MemoryError::Exhausted { wanted: size })
    }

    /// The same in a region of the caller's choice.
    ///
    /// # Errors
    /// When this region has not that much left.
    pub fn allocate_in(&mut self, region: usize, size: u64, align: u64) -> Result<Piece, MemoryError> {
        let exhausted = MemoryError::Exhausted { wanted: size };
        let Some(Region { span, allocated, .. }) = self.regions.get_mut(region) else {
            return Err(exhausted);
        };
        let guest = (span.guest + *allocated).next_multiple_of(align);
        if guest + size > span.guest + span.size {
            return Err(exhausted);
        }
        *allocated = guest + size - span.guest;
        self.piece(guest, size)
    }

    /// The window on bytes that lie in one region.
    ///
    /// # Errors
    /// When they don't.
    pub fn piece(&self, guest: u64, length: u64) -> Result<Piece, MemoryError> {
        let outside = || MemoryError::Outside { guest, length };
        let region = self.region_of(guest).ok_or_else(outside)?;
        let offset = guest - region.span.guest;
        if length > region.span.size - offset {
            return Err(outside());
        }
        let fits = |value: u64| usize::try_from(value).map_err(|_| outside());
        Ok(Piece { guest, area: region.area.part(fits(offset)?, fits(length)?) })
    }

    /// The user address of a guest address, for `SET_VRING_ADDR`.
    #[must_use]
    pub fn user(&self, guest: u64) -> Option<u64> {
        self.region_of(guest).map(|region| guest - region.span.guest + region.user)
    }

    /// Writes bytes, also over the border of two regions that touch.
    ///
    /// # Errors
    /// When they are not all in guest memory; those before the hole are then written.
    pub fn write(&self, guest: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < bytes.len() {
            let part = self.contiguous(guest, done, bytes.len())?;
            let end = done + part.area.length();
            part.area.write(0, &bytes[done..end]);
            done = end;
        }
        Ok(())
    }

    /// Reads bytes, also over the border of two regions that touch.
    ///
    /// # Errors
    /// When they are not all in guest memory.
    pub fn read(&self, guest: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < bytes.len() {
            let part = self.contiguous(guest, done, bytes.len())?;
            let end = done + part.area.length();
            part.area.read(0, &mut bytes[done..end]);
            done = end;
        }
        Ok(())
    }

    /// As much of `total` bytes from `guest`, without the first `done`, as lies in one region.
    fn contiguous(&self, guest: u64, done: usize, total: usize) -> Result<Piece, MemoryError> {
        let left = (total - done) as u64;
        let outside = MemoryError::Outside { guest, length: total as u64 };
        let Some(from) = guest.checked_add(done as u64) else { return Err(outside) };
        let Some(region) = self.region_of(from) else { return Err(outside) };
        self.piece(from, left.min(region.span.guest + region.span.size - from))
    }

    fn region_of(&self, guest: u64) -> Option<&Region> {
        let holds = |region: &&Region| {
            guest.checked_sub(region.span.guest).is_some_and(|into| into < region.span.size)
        };
        self.regions.iter().find(holds)
    }
}

fn file_end(spans: &[Span], file: usize) -> u64 {
    spans.iter().filter(|span| span.file == file).map(|span| span.offset + span.size).max().unwrap_or(0)
}

fn memfd(size: u64, layout: &Layout) -> io::Result<OwnedFd> {
    let kind = if layout.huge { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
    let file = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind)?;
    ftruncate(&file, size)?;
    if layout.sealed {
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_of_one_file_show_different_parts_of_it() {
        let memory = Memory::new(&Layout::with_hole(2 * PAGE)).expect("memory");
        memory.write(FOUR_GIB, b"high").expect("above the hole");
        let mut low = [1; 4];
        memory.read(0, &mut low).expect("below the hole");
        assert_eq!(low, [0; 4]);
        let mut high = [0; 4];
        memory.read(FOUR_GIB, &mut high).expect("above the hole");
        assert_eq!(&high, b"high");
    }

    #[test]
    fn nothing_is_read_or_written_in_a_hole() {
        let memory = Memory::new(&Layout::with_hole(2 * PAGE)).expect("memory");
        assert!(matches!(memory.write(PAGE - 2, b"four"), Err(MemoryError::Outside { length: 4, .. })));
        assert!(memory.write(PAGE - 4, b"four").is_ok());
        assert!(memory.read(u64::MAX - 1, &mut [0; 4]).is_err());
        assert!(memory.user(PAGE).is_none());
    }

    #[test]
    fn bytes_over_the_border_of_two_files_arrive_in_both() {
        let low = Span { guest: 0, size: PAGE, file: 0, offset: 0 };
        let high = Span { guest: PAGE, file: 1, ..low };
        let memory = Memory::new(&Layout::of(vec![high, low])).expect("memory");
        memory.write(PAGE - 2, b"four").expect("both");
        let mut bytes = [0; 4];
        memory.read(PAGE - 2, &mut bytes).expect("both");
        assert_eq!(&bytes, b"four");
        let mut ours = [0; 2];
        memory.regions()[0].area().read(0, &mut ours);
        assert_eq!(&ours, b"ur");
        assert!(memory.piece(PAGE - 2, 4).is_err(), "no window can span two mappings");
    }

    #[test]
    fn allocations_in_turn_use_every_region_and_keep_their_alignment() {
        let mut memory = Memory::new(&Layout::scattered(8 * PAGE, 4)).expect("memory");
        let guests: Vec<u64> = (0..4).map(|_| memory.allocate(100, 64).expect("room").guest).collect();
        assert!(guests.iter().all(|guest| guest % 64 == 0));
        let homes: Vec<u64> = memory.regions().iter().map(|region| region.span.guest).collect();
        assert_eq!(guests, homes, "each is the first in its region");
        assert!(memory.allocate(3 * PAGE, 1).is_err());
    }

    #[test]
    fn scattered_regions_are_not_sorted_and_do_not_overlap() {
        let layout = Layout::scattered(1 << 20, 4);
        let guests: Vec<u64> = layout.spans.iter().map(|span| span.guest).collect();
        assert!(!guests.is_sorted(), "{guests:x?}");
        let mut spans = layout.spans.clone();
        spans.sort_by_key(|span| span.guest);
        assert!(spans.windows(2).all(|pair| pair[0].guest + pair[0].size < pair[1].guest), "{spans:x?}");
    }

    #[test]
    fn a_sealed_file_cannot_be_truncated_and_an_unsealed_one_can() {
        let sealed = Memory::new(&Layout::single(PAGE)).expect("memory");
        assert!(ftruncate(sealed.file(&sealed.regions()[0]), 0).is_err());
        let open = Memory::new(&Layout::single(PAGE).unsealed()).expect("memory");
        assert!(ftruncate(open.file(&open.regions()[0]), 0).is_ok());
    }
}
