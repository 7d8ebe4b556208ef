//! Where things are in the ledger, and the one mapping of it.
//!
//! The ledger is a memfd that the monitor creates and seals; a port's worker writes it, its keeper counts the
//! workers' deaths in it, the monitor reads it. It outlives workers, keepers and connections. All of it is
//! 64-bit words.
//!
//! ```text
//!  word    0  magic | 1 layout version | 2 queue pairs | 3 workers that died | 4 connections given up | 5..
//!  word  512  part 0: receive of pair 0      (256 words each, one writer each)
//!  word  768  part 1: transmit of pair 0
//!  word 1024  part 2: receive of pair 1 ...
//!
//!  in a part   0  epoch: the slot epoch % 2 is in force
//!              1  queue faults | 2 heartbeat
//!              3  session | 4 used ring: whose ring is being served, 0 if none
//!              5  begun | 6 read | 7 ended: how far the batch in hand is, each as epoch << 16 | frames
//!             16  slot 0: the counters in the order of Totals::words | ring index | held | uncertain
//!             72  slot 1
//!            128  log: how each frame of the batch in hand ended, 64 entries of two words (see `log`)
//! ```
//!
//! A batch fills the spare slot and then flips the epoch, so a reader always finds one slot that nobody
//! writes. The flip also ends the log: its words name the epoch that they belong to. So a writer that dies at
//! any moment leaves one slot in force and, behind it, what it had done since (`recover` counts that).

#![expect(unsafe_code, reason = "maps shared memory")]

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use super::{log::ENTRIES, slot::Slot};

const MAGIC: u64 = u64::from_le_bytes(*b"VMFLEDG\0");
const VERSION: u64 = 2;
const WORD: usize = size_of::<u64>();
const FIRST_PART: usize = 512;
const PART: usize = 256;
const SLOTS: [usize; 2] = [16, 72];
const LOG: usize = 128;
const _: () = assert!(SLOTS[0] + Slot::WORDS <= SLOTS[1] && SLOTS[1] + Slot::WORDS <= LOG);
const _: () = assert!(LOG + 2 * ENTRIES <= PART);

/// Words at the head of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeadWord {
    Magic = 0,
    Version = 1,
    Pairs = 2,
    /// Workers that died and were replaced, or not: written by the keeper.
    WorkerDeaths = 3,
    /// Connections that the keeper gave up because their workers kept dying.
    GivenUp = 4,
}

/// Words at the head of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PartWord {
    /// The slot `epoch % 2` is in force.
    Epoch = 0,
    /// How often the queue was stopped for a bad head index or a jump of avail.idx.
    QueueFaults = 1,
    /// Changes whenever the queue's thread wakes up.
    Heartbeat = 2,
    /// The connection whose ring is being served; 0 if none is.
    Session = 3,
    /// The guest address of that ring's used ring.
    UsedRing = 4,
    /// Frames of this batch for which a tap write or read was begun.
    Begun = 5,
    /// Receive: frames of this batch that were read.
    Read = 6,
    /// Frames of this batch that ended: their log entries, and their elements of the used ring, are written.
    Ended = 7,
}

/// Which part of a ledger: one direction of one queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part(usize);

impl Part {
    /// What the guest gets, of queue pair `pair`.
    #[must_use]
    pub const fn receive(pair: u16) -> Self {
        Self(2 * pair as usize)
    }
    /// What the guest sends, of queue pair `pair`.
    #[must_use]
    pub const fn transmit(pair: u16) -> Self {
        Self(2 * pair as usize + 1)
    }
    /// True for what the guest sends.
    #[must_use]
    pub const fn is_transmit(self) -> bool {
        self.0 % 2 == 1
    }
    const fn start(self) -> usize {
        FIRST_PART + self.0 * PART
    }
}

/// A file that is no ledger of ours.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The kernel refused something.
    #[error("cannot {0} the ledger: {1}")]
    Io(&'static str, io::Error),
    /// Wrong size, seals, magic, version or number of queue pairs.
    #[error("not a ledger of this version for {0} queue pairs")]
    Foreign(u16),
}

/// One port's ledger, mapped. Cheap to clone; the mapping goes with the last clone.
#[derive(Clone, Debug)]
pub struct Ledger {
    mapping: Arc<Mapping>,
    pairs: u16,
}

impl Ledger {
    /// Makes a new ledger with all counters at 0, sealed against any change of its size.
    ///
    /// # Errors
    /// [`LedgerError::Io`] when the kernel gives no memory.
    pub fn create(pairs: u16) -> Result<(Self, OwnedFd), LedgerError> {
        let io = |what| move |e: rustix::io::Errno| LedgerError::Io(what, e.into());
        let fd = memfd_create("vmflow-ledger", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(io("create"))?;
        ftruncate(&fd, bytes_for(pairs) as u64).map_err(io("size"))?;
        fcntl_add_seals(&fd, Self::SEALS).map_err(io("seal"))?;
        let ledger = Self { mapping: Arc::new(Mapping::new(&fd, bytes_for(pairs))?), pairs };
        let head = [(HeadWord::Version, VERSION), (HeadWord::Pairs, pairs.into()), (HeadWord::Magic, MAGIC)];
        for (word, value) in head {
            ledger.head_word(word).store(value, Ordering::Release);
        }
        Ok((ledger, fd))
    }

    /// Maps a ledger that [`Self::create`] made.
    ///
    /// # Errors
    /// [`LedgerError::Foreign`] unless size, seals and head are as expected.
    pub fn open(fd: &OwnedFd, pairs: u16) -> Result<Self, LedgerError> {
        let size = fstat(fd).map_err(|e| LedgerError::Io("look at", e.into()))?.st_size;
        let seals = fcntl_get_seals(fd).map_err(|e| LedgerError::Io("look at", e.into()))?;
        if usize::try_from(size).ok() != Some(bytes_for(pairs)) || !seals.contains(Self::SEALS) {
            return Err(LedgerError::Foreign(pairs));
        }
        let ledger = Self { mapping: Arc::new(Mapping::new(fd, bytes_for(pairs))?), pairs };
        let word = |word| ledger.head_word(word).load(Ordering::Acquire);
        let head = (word(HeadWord::Magic), word(HeadWord::Version), word(HeadWord::Pairs));
        if head != (MAGIC, VERSION, pairs.into()) {
            return Err(LedgerError::Foreign(pairs));
        }
        Ok(ledger)
    }

    const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

    /// How many queue pairs it has room for.
    #[must_use]
    pub const fn pairs(&self) -> u16 {
        self.pairs
    }

    /// Every part.
    pub fn parts(&self) -> impl Iterator<Item = Part> + use<> {
        (0..2 * usize::from(self.pairs)).map(Part)
    }

    /// A word at the head of the ledger.
    pub(super) fn head_word(&self, word: HeadWord) -> &AtomicU64 {
        &self.mapping.words()[word as usize]
    }

    /// A word at the head of a part.
    pub(super) fn part_word(&self, part: Part, word: PartWord) -> &AtomicU64 {
        &self.mapping.words()[part.start() + word as usize]
    }

    /// The words of the slot that belongs to an epoch.
    pub(super) fn slot(&self, part: Part, epoch: u64) -> &[AtomicU64] {
        let start = part.start() + SLOTS[usize::from(epoch % 2 == 1)];
        &self.mapping.words()[start..start + Slot::WORDS]
    }

    /// The two words of an entry of the log.
    pub(super) fn entry(&self, part: Part, place: usize) -> &[AtomicU64] {
        let start = part.start() + LOG + 2 * (place % ENTRIES);
        &self.mapping.words()[start..start + 2]
    }
}

/// Size of a ledger in bytes.
const fn bytes_for(pairs: u16) -> usize {
    (FIRST_PART + 2 * pairs as usize * PART) * WORD
}

/// The shared mapping.
#[derive(Debug)]
struct Mapping {
    address: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: the mapping is plain shared memory that lives until `drop`, and is only used through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above: `&Mapping` gives out `&AtomicU64` only.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: impl AsFd, bytes: usize) -> Result<Self, LedgerError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
        let address = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0) };
        let address = address.map_err(|e| LedgerError::Io("map", e.into()))?;
        NonNull::new(address.cast())
            .map(|address| Self { address, bytes })
            .ok_or(LedgerError::Io("map", io::ErrorKind::AddrNotAvailable.into()))
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned (so aligned for u64), `bytes` long, readable and writable, and
        // stays until `drop`; the file is sealed against shrinking, so no access can fault; other processes
        // change it at any time, which atomics allow.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes / WORD) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: address and length are those of our own `mmap`, and no reference outlives `self`.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}
