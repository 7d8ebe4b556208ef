//! Memory that another process sees too: the mapping, and the only ways to touch it.
//!
//! This is the crate's one file with `unsafe`. The rest of the crate knows guest memory as [`Area`]s:
//! bounds-checked windows without references, so that nothing in Rust ever assumes that the bytes behind
//! them hold still. Ring fields go through atomics, buffers through raw copies.
//!
//! A device that writes where it may not, or a test that truncates the file, can make the bytes change or
//! the access end in SIGBUS; neither can make an access leave its mapping.
#![expect(unsafe_code, reason = "mmap and access to memory that another process writes")]

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// One `MAP_SHARED` mapping of a part of a file; unmapped when the last [`Area`] on it is gone.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to no thread: any thread may access and unmap it, and `Mapping` itself offers
// no access at all.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared `Mapping` gives out nothing that could be raced on.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `length` are what `mmap` returned and was given, this is the one owner of
        // them, and every `Area` that could still point here holds an `Arc` of it.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), self.length) };
        debug_assert!(unmapped.is_ok(), "unmapping guest memory: {unmapped:?}");
    }
}

/// A window into guest memory. Clones show the same bytes, also from other threads.
///
/// Every access checks its bounds and, for atomics, its alignment, and panics where they are wrong: the
/// offsets come from the test's own code, never from the device.
#[derive(Clone, Debug)]
pub struct Area {
    start: NonNull<u8>,
    length: usize,
    mapping: Arc<Mapping>,
}

// SAFETY: all access through an `Area` is by atomics or by raw copies of plain bytes; it gives out no
// reference, and the mapping that it points into lives as long as its `Arc`.
unsafe impl Send for Area {}
// SAFETY: as above: `&Area` offers nothing that `Area` in two threads doesn't.
unsafe impl Sync for Area {}

/// Loads and stores of one width; in memory the value is little-endian, as virtio 1 wants it.
macro_rules! word {
    ($load:ident, $store:ident, $word:ty, $atomic:ty) => {
        #[doc = concat!("The little-endian `", stringify!($word), "` at `offset`.")]
        #[inline]
        #[must_use]
        pub fn $load(&self, offset: usize, order: Ordering) -> $word {
            let word = self.aligned(offset, size_of::<$word>()).cast::<$word>();
            // SAFETY: `aligned` checked that the word lies inside the mapping, which outlives this call by
            // the `Arc`, and is aligned. In this process only atomics and raw copies touch it; what other
            // processes do to the memory is outside of Rust's rules and changes nothing but the value.
            let atomic = unsafe { <$atomic>::from_ptr(word.as_ptr()) };
            <$word>::from_le(atomic.load(order))
        }

        #[doc = concat!("Stores a little-endian `", stringify!($word), "` at `offset`.")]
        #[inline]
        pub fn $store(&self, offset: usize, value: $word, order: Ordering) {
            let word = self.aligned(offset, size_of::<$word>()).cast::<$word>();
            // SAFETY: as for the load; the mapping is made with `PROT_WRITE`.
            let atomic = unsafe { <$atomic>::from_ptr(word.as_ptr()) };
            atomic.store(value.to_le(), order);
        }
    };
}

impl Area {
    /// Maps `length` bytes of `file` from `offset`, readable and writable, shared.
    ///
    /// # Errors
    /// What `mmap` says, and `InvalidInput` for a length of 0.
    pub fn map(file: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is asked for, so no existing mapping is replaced; the result is checked by
        // `?` and becomes owned by the `Mapping` below.
        let start = unsafe { mmap(ptr::null_mut(), length, access, MapFlags::SHARED, file, offset) }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { start, length, mapping: Arc::new(Mapping { start, length }) })
    }

    /// How many bytes the window shows.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Where the window begins in this process; what is found there may change at any time.
    #[must_use]
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// A window into this window.
    #[must_use]
    pub fn part(&self, offset: usize, length: usize) -> Self {
        Self { start: self.within(offset, length), length, mapping: Arc::clone(&self.mapping) }
    }

    word!(load_u16, store_u16, u16, AtomicU16);
    word!(load_u32, store_u32, u32, AtomicU32);
    word!(load_u64, store_u64, u64, AtomicU64);

    /// Copies the bytes at `offset` into `bytes`; they may change meanwhile.
    #[inline]
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.within(offset, bytes.len());
        // SAFETY: `within` checked the source; the destination is a live exclusive slice of that length, so
        // both are valid, bytes need no alignment, and private memory doesn't overlap the mapping.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Copies `bytes` to `offset`.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.within(offset, bytes.len());
        // SAFETY: as for `read`, the other way round; the mapping is writable.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) }
    }

    /// Sets every byte of the window.
    pub fn fill(&self, byte: u8) {
        // SAFETY: a window always lies inside its writable mapping (`map` and `part` see to it).
        unsafe { ptr::write_bytes(self.start.as_ptr(), byte, self.length) }
    }

    /// A pointer to `length` bytes at `offset`, all of them inside the window.
    #[inline]
    fn within(&self, offset: usize, length: usize) -> NonNull<u8> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.length);
        assert!(inside, "{length} bytes at {offset} are outside of a window of {} bytes", self.length);
        // SAFETY: `offset` is at most the window's length, so the result is in bounds of the mapping or one
        // past its end, and a mapping is smaller than `isize::MAX`.
        unsafe { self.start.add(offset) }
    }

    /// As `within`, for a word of `size` bytes, which must be aligned.
    #[inline]
    fn aligned(&self, offset: usize, size: usize) -> NonNull<u8> {
        let word = self.within(offset, size);
        let aligned = (word.as_ptr() as usize).is_multiple_of(size);
        assert!(aligned, "a word of {size} bytes at {offset} is not aligned");
        word
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::AsFd;

    fn area(length: usize) -> Area {
        let file = memfd_create("area", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&file, length as u64).expect("size");
        Area::map(file.as_fd(), 0, length).expect("map")
    }

    #[test]
    fn words_are_little_endian_and_seen_by_every_window() {
        let area = area(4096);
        let part = area.part(16, 16);
        part.store_u32(4, 0x0102_0304, Ordering::Release);
        let mut bytes = [0; 4];
        area.read(20, &mut bytes);
        assert_eq!(bytes, [4, 3, 2, 1]);
        assert_eq!(area.load_u16(22, Ordering::Acquire), 0x0102);
    }

    #[test]
    fn a_window_outlives_the_one_it_was_cut_from() {
        let part = area(4096).part(4088, 8);
        part.store_u64(0, 7, Ordering::Relaxed);
        assert_eq!(part.load_u64(0, Ordering::Relaxed), 7);
    }

    #[test]
    #[should_panic(expected = "outside of a window")]
    fn an_access_over_the_end_is_refused() {
        area(4096).part(0, 8).write(5, &[0; 4]);
    }

    #[test]
    #[should_panic(expected = "not aligned")]
    fn an_unaligned_word_is_refused() {
        let _ = area(4096).load_u16(1, Ordering::Relaxed);
    }
}
