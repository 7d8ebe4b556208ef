//! The front end's memory regions: checked, sorted and counted before a worker maps them.
//!
//! ```text
//!  region, 32 bytes    guest address u64 | size u64 | front end's address u64 | offset in the file u64
//!  table               count u32 | 0 u32 | regions              (SET_MEM_TABLE)
//!  single              0 u64 | region                           (ADD_MEM_REG, REM_MEM_REG)
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::fstat;

use super::message::{u32_at, u64_at};

const REGION: usize = 32;
const HEAD: usize = 8;

/// One region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
}

impl Region {
    fn parse(bytes: &[u8]) -> Self {
        let [guest, size, user, offset] = [0, 8, 16, 24].map(|at| u64_at(bytes, at));
        Self { guest, size, user, offset }
    }

    /// The region of an `ADD_MEM_REG` or `REM_MEM_REG`.
    ///
    /// # Errors
    /// A line for the log.
    pub fn from_single(body: &[u8]) -> Result<Self, String> {
        if body.len() != HEAD + REGION {
            return Err(format!("{} bytes instead of {}", body.len(), HEAD + REGION));
        }
        Ok(Self::parse(&body[HEAD..]))
    }

    /// The payload of an `ADD_MEM_REG` or `REM_MEM_REG`.
    #[must_use]
    pub fn to_single(self) -> Vec<u8> {
        let mut body = vec![0; HEAD];
        body.extend(self.bytes());
        body
    }

    fn bytes(self) -> impl Iterator<Item = u8> {
        [self.guest, self.size, self.user, self.offset].into_iter().flat_map(u64::to_ne_bytes)
    }

    /// The region lies in the file that backs it: else the first access beyond it would end the worker.
    fn check(&self, file: &OwnedFd) -> Result<(), String> {
        let available = fstat(file).map_err(|e| format!("a region's file: {e}"))?.st_size;
        let end = self.offset.checked_add(self.size);
        let fits = end.zip(u64::try_from(available).ok()).is_some_and(|(end, available)| end <= available);
        let ends = [self.guest, self.user].map(|start| start.checked_add(self.size));
        if self.size == 0 || !fits || ends.contains(&None) {
            return Err(format!(
                "a region of {:#x} bytes at offset {:#x} of a file of {available:#x} bytes",
                self.size, self.offset
            ));
        }
        Ok(())
    }

    const fn is_like(&self, other: &Self) -> bool {
        self.guest == other.guest && self.size == other.size && self.user == other.user
    }

    const fn overlaps(&self, other: &Self) -> bool {
        self.guest < other.guest + other.size && other.guest < self.guest + self.size
    }
}

/// All regions of a connection, in the order of their guest addresses, with their files.
#[derive(Debug, Default)]
pub struct Regions(Vec<(Region, OwnedFd)>);

impl Regions {
    /// Most regions: as many as the `vhost` crate's own messages carry.
    pub const MAX: usize = 32;

    /// Reads a memory table.
    ///
    /// # Errors
    /// A line for the log.
    pub fn from_table(body: &[u8], files: Vec<OwnedFd>) -> Result<Self, String> {
        let count = u32_at(body, 0) as usize;
        // User-Mode Linux pads the table: what lies behind the regions that it names does not matter.
        if count == 0 || count > Self::MAX || body.len() < HEAD + count * REGION || files.len() != count {
            return Err(format!("{count} regions in {} bytes with {} files", body.len(), files.len()));
        }
        let mut regions = Self::default();
        for (bytes, file) in body[HEAD..].chunks_exact(REGION).zip(files) {
            let region = Region::parse(bytes);
            regions.admits(&region, &file)?;
            regions.insert(region, file);
        }
        Ok(regions)
    }

    /// The table as the worker gets it: sorted, which its crates insist on.
    #[must_use]
    pub fn into_table(self) -> (Vec<u8>, Vec<OwnedFd>) {
        let body = self.body();
        (body, self.0.into_iter().map(|(_, file)| file).collect())
    }

    /// As [`Self::into_table`], for one more worker.
    #[must_use]
    pub fn table(&self) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
        (self.body(), self.0.iter().map(|(_, file)| file.as_fd()).collect())
    }

    fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(HEAD + self.0.len() * REGION);
        body.extend(u32::try_from(self.0.len()).unwrap_or_default().to_ne_bytes());
        body.extend([0; 4]);
        body.extend(self.0.iter().flat_map(|(region, _)| region.bytes()));
        body
    }

    /// True if there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds one region that [`Self::admits`].
    pub fn insert(&mut self, region: Region, file: OwnedFd) {
        let place = self.0.partition_point(|(known, _)| known.guest < region.guest);
        self.0.insert(place, (region, file));
    }

    /// Forgets a region.
    pub fn remove(&mut self, region: &Region) {
        self.0.retain(|(known, _)| !known.is_like(region));
    }

    /// True if a region like this is known: `REM_MEM_REG` names no file.
    #[must_use]
    pub fn has(&self, region: &Region) -> bool {
        self.0.iter().any(|(known, _)| known.is_like(region))
    }

    /// True if this very region is known.
    #[must_use]
    pub fn contains(&self, region: &Region) -> bool {
        self.0.iter().any(|(known, _)| known == region)
    }

    /// True if the descriptor table, the used ring and the available ring of a `struct vhost_vring_addr` begin in
    /// these regions, aligned as virtio asks (virtio 1.2, 2.7).
    #[must_use]
    pub fn hold_ring(&self, addresses: &[u8]) -> bool {
        let areas = [(8, 16), (16, 4), (24, 2)];
        areas.into_iter().all(|(at, align)| {
            self.guest_address(u64_at(addresses, at)).is_some_and(|guest| guest.is_multiple_of(align))
        })
    }

    /// The guest address of one of the front end's, if a ring can begin there: with room for its indices.
    #[must_use]
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        const INDICES: u64 = 4;
        self.0.iter().find_map(|(region, _)| {
            let offset = user.checked_sub(region.user)?;
            (offset.checked_add(INDICES)? <= region.size).then(|| region.guest + offset)
        })
    }

    /// A region may be added.
    ///
    /// # Errors
    /// A line for the log.
    pub fn admits(&self, region: &Region, file: &OwnedFd) -> Result<(), String> {
        region.check(file)?;
        if self.0.len() >= Self::MAX {
            return Err(format!("more than {} regions", Self::MAX));
        }
        if self.0.iter().any(|(known, _)| known.overlaps(region)) {
            return Err("two regions overlap".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn file(bytes: u64) -> OwnedFd {
        let fd = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fd
    }
    fn region(guest: u64, size: u64) -> Region {
        Region { guest, size, user: guest + (1 << 40), offset: 0 }
    }
    fn table(regions: &[Region]) -> Vec<u8> {
        let mut body = [u32::try_from(regions.len()).unwrap().to_ne_bytes(), [0; 4]].concat();
        body.extend(regions.iter().flat_map(|r| r.bytes()));
        body
    }

    #[test]
    fn unsorted_regions_are_sorted_and_padding_is_cut() {
        let body = [table(&[region(0x10_0000, 0x1000), region(0, 0x1000)]), vec![0; 32]].concat();
        let regions = Regions::from_table(&body, vec![file(0x1000), file(0x1000)]).unwrap();
        let (sorted, files) = regions.into_table();
        assert_eq!(sorted, table(&[region(0, 0x1000), region(0x10_0000, 0x1000)]));
        assert_eq!(files.len(), 2);
    }

    #[test]
    fn a_region_beyond_its_file_is_refused() {
        for (size, backing) in [(0x2000, 0x1000), (0, 0x1000), (u64::MAX, 0x1000), (1 << 45, 0x1000)] {
            assert!(
                Regions::from_table(&table(&[region(0, size)]), vec![file(backing)]).is_err(),
                "{size:#x}"
            );
        }
        let wraps = Region { guest: 0, size: 0x1000, user: 0, offset: u64::MAX - 0x10 };
        assert!(Regions::from_table(&table(&[wraps]), vec![file(0x1000)]).is_err());
        let wraps = Region { guest: u64::MAX - 0x10, size: 0x1000, user: 0, offset: 0 };
        assert!(Regions::from_table(&table(&[wraps]), vec![file(0x1000)]).is_err());
    }

    #[test]
    fn overlap_a_wrong_count_and_too_many_are_refused() {
        let two = [region(0, 0x2000), region(0x1000, 0x1000)];
        assert!(Regions::from_table(&table(&two), vec![file(0x2000), file(0x1000)]).is_err());
        assert!(Regions::from_table(&table(&two[..1]), vec![]).is_err());
        assert!(Regions::from_table(&table(&[]), vec![]).is_err());
        let mut regions = Regions::default();
        for n in 0..Regions::MAX as u64 {
            regions.insert(region(n * 0x1000, 0x1000), file(0x1000));
        }
        assert!(regions.admits(&region(1 << 30, 0x1000), &file(0x1000)).is_err());
    }

    #[test]
    fn a_region_is_found_and_forgotten_by_what_it_is() {
        let mut regions = Regions::default();
        regions.insert(region(0, 0x1000), file(0x1000));
        assert!(regions.contains(&Region::from_single(&region(0, 0x1000).to_single()).unwrap()));
        assert!(!regions.has(&region(0x1000, 0x1000)));
        assert_eq!(regions.guest_address((1 << 40) + 0x10), Some(0x10));
        assert_eq!(regions.guest_address((1 << 40) + 0xffd), None);
        assert!(regions.has(&region(0, 0x1000)));
        regions.remove(&region(0, 0x1000));
        assert_eq!(regions.guest_address((1 << 40) + 0x10), None);
    }
}
