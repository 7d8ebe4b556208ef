//! Sends what passed: the tap is the last thing a transmitted frame sees.

#![expect(unsafe_code, reason = "writev takes pointers into guest memory")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use arrayvec::ArrayVec;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use vm_memory::VolatileSlice;

use super::{
    coalesce::Run,
    judge::{Judged, Verdict},
    place::TapFrame,
    ring::PIECES,
};
use crate::ledger::{Account, DropReason, Fate};

/// The tap, as a worker sees it: one frame with a 12-byte virtio-net header per read or write, never
/// blocking. (Any datagram descriptor will do, which the tests use.)
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Takes a descriptor that is set up already.
    #[must_use]
    pub const fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Reads one frame with its header. `None`: there is none now, or the tap is gone.
    pub(super) fn read(&self, into: &mut [u8]) -> Option<Result<usize, Unreadable>> {
        match rustix::io::read(&self.0, into) {
            Ok(n) => Some(Ok(n)),
            // The kernel took a frame from the tap's queue whose offloads it cannot express.
            Err(Errno::INVAL) => Some(Err(Unreadable)),
            Err(_) => None,
        }
    }

    /// True if the tap, which has just refused a frame for want of room, has room again. To be asked each time:
    /// only this question makes the TUN driver tell (by `EPOLLOUT`) when there is room; a refused write does
    /// not.
    pub(super) fn has_room(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], Some(&now)).is_ok_and(|ready| ready > 0)
    }

    fn write(&self, head: &[u8], tail: &[VolatileSlice<'_, ()>]) -> Result<usize, Errno> {
        if tail.is_empty() { rustix::io::write(&self.0, head) } else { self.write_vectored(head, tail) }
    }

    fn write_vectored(&self, head: &[u8], tail: &[VolatileSlice<'_, ()>]) -> Result<usize, Errno> {
        let mut vectors = ArrayVec::<libc::iovec, { PIECES + 1 }>::new();
        vectors.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
        for piece in tail {
            let base = piece.ptr_guard().as_ptr().cast_mut().cast();
            vectors
                .try_push(libc::iovec { iov_base: base, iov_len: piece.len() })
                .map_err(|_| Errno::MSGSIZE)?;
        }
        let count = libc::c_int::try_from(vectors.len()).map_err(|_| Errno::MSGSIZE)?;
        // SAFETY: the first vector is `head`, which is borrowed; each further one is a `VolatileSlice`, whose
        // lifetime says that its guest memory stays mapped; the kernel only reads them.
        let written = unsafe { libc::writev(self.0.as_raw_fd(), vectors.as_ptr(), count) };
        usize::try_from(written)
            .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

/// A frame that the kernel could not hand over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unreadable;

impl AsFd for Tap {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A frame, or a run of frames, of which nothing remains to be done but to count it.
#[derive(Debug)]
#[must_use]
pub struct Outcome<F> {
    of: F,
    fate: Fate,
}

impl<F> Outcome<F> {
    pub(super) const fn fate(&self) -> Fate {
        self.fate
    }
    pub(super) const fn of(&self) -> &F {
        &self.of
    }
    pub(super) fn into_inner(self) -> F {
        self.of
    }
}

impl Outcome<Judged<TapFrame>> {
    /// Of a frame from the tap, whose end `place` decides.
    pub(super) const fn new(of: Judged<TapFrame>, fate: Fate) -> Self {
        Self { of, fate }
    }
}

/// Why a run was not sent. Nothing happened to its frames: they are un-taken, and nothing is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Unsent {
    /// The tap takes no more now.
    TapFull,
    /// The kernel does not take these frames as one: they are to be sent one by one.
    NotAsOne,
}

/// Carries out a verdict.
///
/// # Errors
/// [`Unsent`].
pub fn forward<'b>(mut run: Run<'b>, tap: &Tap, account: &mut Account) -> Result<Outcome<Run<'b>>, Unsent> {
    let fate = match run.verdict() {
        Verdict::Drop(reason) => Fate::Dropped(reason),
        Verdict::Forward => {
            account.begin_tap_operation(run.len());
            let (head, tail) = run.image();
            match tap.write(head, tail) {
                Ok(_) => Fate::Passed,
                Err(Errno::AGAIN) => {
                    account.withdraw_tap_operation();
                    return Err(Unsent::TapFull);
                }
                Err(Errno::INVAL) if run.len() > 1 => {
                    account.withdraw_tap_operation();
                    return Err(Unsent::NotAsOne);
                }
                Err(Errno::IO | Errno::BADFD | Errno::NETDOWN | Errno::NODEV) => {
                    Fate::Dropped(DropReason::TapDown)
                }
                Err(_) => Fate::Dropped(DropReason::TapRefused),
            }
        }
    };
    Ok(Outcome { of: run, fate })
}
