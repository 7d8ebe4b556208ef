//! The vhost-user session as the worker has acknowledged it: all that another worker must be told to go on in
//! its place, so that the front end notices nothing.
//!
//! ```text
//!   features -> memory -> per ring: size, addresses, error, call, kick -> per ring: enabled or not
//! ```
//! The call comes before the kick, since the kick makes a ring ready; the enabling comes last, since it makes it
//! run. Bases are not kept: a ring starts where the ledger, or else the guest, says.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{
    gate::{Request, state},
    memory::{Region, Regions},
    message::{request, u32_at, u64_at},
};

/// A front end's session.
#[derive(Debug)]
pub struct Session {
    features: Option<u64>,
    regions: Regions,
    rings: Vec<Ring>,
}

/// A ring of it.
#[derive(Debug, Default)]
struct Ring {
    size: Option<u32>,
    /// The payload of `SET_VRING_ADDR`.
    addresses: Option<Vec<u8>>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    enabled: Option<u32>,
}

/// How a request is put to a worker: code, payload, descriptors.
pub type Ask<'a, E> = dyn FnMut(u32, &[u8], &[BorrowedFd<'_>]) -> Result<(), E> + 'a;

impl Session {
    /// Nothing was said yet.
    #[must_use]
    pub fn new(rings: usize) -> Self {
        let rings = std::iter::repeat_with(Ring::default).take(rings).collect();
        Self { features: None, regions: Regions::default(), rings }
    }

    /// How many rings there are.
    #[must_use]
    pub const fn rings(&self) -> usize {
        self.rings.len()
    }

    /// The front end's memory.
    #[must_use]
    pub const fn regions(&self) -> &Regions {
        &self.regions
    }

    /// True for a ring that has its kick, and was not stopped since.
    #[must_use]
    pub fn is_started(&self, ring: usize) -> bool {
        self.rings.get(ring).is_some_and(|ring| ring.kick.is_some())
    }

    /// The kicks of those rings of a queue pair that are started.
    pub fn kicks(&self, pair: usize) -> impl Iterator<Item = BorrowedFd<'_>> {
        let rings = self.rings.iter().skip(2 * pair).take(2);
        rings.filter_map(|ring| ring.kick.as_ref().map(AsFd::as_fd))
    }

    /// Keeps what the worker has acknowledged; not before, or a worker that died of it would hear it again.
    pub fn remember(&mut self, asked: Request) {
        let Request { code, body, files } = asked;
        match code {
            request::SET_FEATURES => self.features = Some(u64_at(&body, 0)),
            request::SET_MEM_TABLE => self.regions = Regions::from_table(&body, files).unwrap_or_default(),
            request::ADD_MEM_REG => {
                if let (Ok(region), Some(file)) = (Region::from_single(&body), files.into_iter().next()) {
                    self.regions.insert(region, file);
                }
            }
            request::REM_MEM_REG => {
                if let Ok(region) = Region::from_single(&body) {
                    self.regions.remove(&region);
                }
            }
            _ => self.remember_ring(code, body, files),
        }
    }

    fn remember_ring(&mut self, code: u32, body: Vec<u8>, files: Vec<OwnedFd>) {
        let of_file =
            [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR].contains(&code);
        // Those with a descriptor have flags above the index.
        let index = if of_file { u32_at(&body, 0) & 0xff } else { u32_at(&body, 0) };
        let Some(ring) = usize::try_from(index).ok().and_then(|index| self.rings.get_mut(index)) else {
            return;
        };
        let (value, file) = (u32_at(&body, 4), files.into_iter().next());
        match code {
            request::SET_VRING_NUM => ring.size = Some(value),
            request::SET_VRING_ADDR => ring.addresses = Some(body),
            request::SET_VRING_ENABLE => ring.enabled = Some(value),
            request::SET_VRING_KICK => ring.kick = file,
            request::SET_VRING_CALL => ring.call = file,
            request::SET_VRING_ERR => ring.error = file,
            // The ring is stopped, and must not start again in a replay.
            request::GET_VRING_BASE => (ring.kick, ring.call) = (None, None),
            _ => {}
        }
    }

    /// Tells a new worker everything. False if a ring could not be set up (its memory is not there now): see
    /// [`Self::replay_rings`].
    ///
    /// # Errors
    /// What `ask` says: the worker is gone too.
    pub fn replay<E>(&self, ask: &mut Ask<'_, E>) -> Result<bool, E> {
        if let Some(features) = self.features {
            ask(request::SET_FEATURES, &features.to_ne_bytes(), &[])?;
        }
        if !self.regions.is_empty() {
            let (body, files) = self.regions.table();
            ask(request::SET_MEM_TABLE, &body, &files)?;
        }
        self.replay_rings(ask)
    }

    /// Tells a worker that has the memory about the rings.
    ///
    /// # Errors
    /// As [`Self::replay`].
    pub fn replay_rings<E>(&self, ask: &mut Ask<'_, E>) -> Result<bool, E> {
        let mut whole = true;
        for (index, ring) in (0..).zip(&self.rings) {
            whole &= ring.set_up(index, &self.regions, ask)?;
        }
        for (index, ring) in (0..).zip(&self.rings) {
            if let Some(enabled) = ring.enabled {
                ask(request::SET_VRING_ENABLE, &state(index, enabled), &[])?;
            }
        }
        Ok(whole)
    }
}

impl Ring {
    fn set_up<E>(&self, index: u32, regions: &Regions, ask: &mut Ask<'_, E>) -> Result<bool, E> {
        if let Some(size) = self.size {
            ask(request::SET_VRING_NUM, &state(index, size), &[])?;
        }
        // A worker that is told addresses outside its memory hangs up.
        let found = self.addresses.as_ref().is_none_or(|body| regions.hold_ring(body));
        if let Some(addresses) = self.addresses.as_ref().filter(|_| found) {
            ask(request::SET_VRING_ADDR, addresses, &[])?;
        }
        let kick = self.kick.as_ref().filter(|_| found);
        let files = [
            (request::SET_VRING_ERR, self.error.as_ref()),
            (request::SET_VRING_CALL, self.call.as_ref()),
            (request::SET_VRING_KICK, kick),
        ];
        for (code, file) in files {
            if let Some(file) = file {
                ask(code, &u64::from(index).to_ne_bytes(), &[file.as_fd()])?;
            }
        }
        Ok(found || self.kick.is_none())
    }
}

#[cfg(test)]
mod tests {
    use rustix::{
        event::{EventfdFlags, eventfd},
        fs::{MemfdFlags, ftruncate, memfd_create},
    };

    use super::*;

    fn said(code: u32, body: Vec<u8>) -> Request {
        Request { code, body, files: Vec::new() }
    }

    fn with_file(code: u32, ring: u64) -> Request {
        let file = eventfd(0, EventfdFlags::empty()).unwrap();
        Request { code, body: ring.to_ne_bytes().to_vec(), files: vec![file] }
    }

    /// What a replay says: code, ring, number of descriptors; and whether it was all.
    fn replayed(session: &Session) -> (Vec<(u32, u32, usize)>, bool) {
        let mut heard = Vec::new();
        let whole = session.replay::<()>(&mut |code, body, files| {
            heard.push((code, u32_at(body, 0), files.len()));
            Ok(())
        });
        (heard, whole.unwrap())
    }

    const SIZE: u64 = 0x10_0000;
    const USER: u64 = 1 << 40;

    fn region() -> Vec<u8> {
        [[0; 8], [0; 8], SIZE.to_ne_bytes(), USER.to_ne_bytes(), [0; 8]].concat()
    }

    fn share_memory(session: &mut Session) {
        let file = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, SIZE).unwrap();
        session.remember(Request { code: request::ADD_MEM_REG, body: region(), files: vec![file] });
    }

    fn started() -> Session {
        let mut session = Session::new(2);
        session.remember(said(request::SET_VRING_ENABLE, state(1, 1))); // as QEMU does, before all else
        session.remember(said(request::SET_FEATURES, 7_u64.to_ne_bytes().to_vec()));
        share_memory(&mut session);
        session.remember(with_file(request::SET_VRING_KICK, 1));
        session.remember(with_file(request::SET_VRING_CALL, 1));
        let areas = [USER + 0x1000, USER + 0x3000, USER + 0x2000, 0].map(u64::to_ne_bytes).concat();
        session.remember(said(request::SET_VRING_ADDR, [&state(1, 0)[..], &areas].concat()));
        session.remember(said(request::SET_VRING_NUM, state(1, 256)));
        session
    }

    #[test]
    fn a_replay_has_its_own_order_whatever_the_front_ends_was() {
        let expected = [
            (request::SET_FEATURES, 7, 0),
            (request::SET_MEM_TABLE, 1, 1),
            (request::SET_VRING_NUM, 1, 0),
            (request::SET_VRING_ADDR, 1, 0),
            (request::SET_VRING_CALL, 1, 1),
            (request::SET_VRING_KICK, 1, 1),
            (request::SET_VRING_ENABLE, 1, 0),
        ];
        assert_eq!(replayed(&started()), (expected.to_vec(), true));
    }

    #[test]
    fn a_ring_that_was_stopped_does_not_start_again() {
        let mut session = started();
        assert!(session.is_started(1) && session.kicks(0).count() == 1);
        session.remember(said(request::GET_VRING_BASE, state(1, 0)));
        assert!(!session.is_started(1));
        let (heard, whole) = replayed(&session);
        assert!(whole && heard.iter().all(|(code, ..)| *code != request::SET_VRING_KICK), "{heard:?}");
    }

    #[test]
    fn a_ring_outside_memory_is_not_started_and_that_is_said() {
        let mut session = started();
        session.remember(said(request::REM_MEM_REG, region()));
        let (heard, whole) = replayed(&session);
        assert!(!whole && heard.iter().all(|(code, ..)| *code != request::SET_VRING_KICK), "{heard:?}");
        share_memory(&mut session);
        assert!(replayed(&session).1, "the region is there again");
    }

    #[test]
    fn a_descriptor_is_taken_away_by_the_flag_for_none() {
        let mut session = started();
        session.remember(said(request::SET_VRING_CALL, 0x101_u64.to_ne_bytes().to_vec()));
        let (heard, _) = replayed(&session);
        assert!(heard.iter().all(|(code, ..)| *code != request::SET_VRING_CALL), "{heard:?}");
    }
}
