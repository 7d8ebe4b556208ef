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
    batch::Batch,
    chain::Chain,
    judge::{Judged, Verdict},
    ring::PIECES,
};
use crate::{
    label::FrameLabel,
    ledger::{Account, DropReason, Fate, Volume},
};

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

/// A frame of which nothing remains to be done but to count it.
#[derive(Debug)]
#[must_use]
pub struct Outcome<F> {
    frame: F,
    label: FrameLabel,
    volume: Volume,
    fate: Fate,
}

impl<F> Outcome<F> {
    pub(super) fn new(judged: Judged<F>, fate: Fate) -> Self {
        let (frame, label, volume) = judged.into_parts();
        Self { frame, label, volume, fate }
    }
    pub(super) const fn label(&self) -> FrameLabel {
        self.label
    }
    pub(super) const fn volume(&self) -> Volume {
        self.volume
    }
    pub(super) const fn fate(&self) -> Fate {
        self.fate
    }
    pub(super) fn into_frame(self) -> F {
        self.frame
    }
}

/// The tap takes no more now: nothing happened to the frame. It and everything after it is un-taken.
#[derive(Debug)]
#[must_use]
pub struct TapFull(());

/// Carries out a verdict.
///
/// # Errors
/// [`TapFull`]: the frame was not sent and is not to be counted.
pub fn forward(
    judged: Judged<Chain>,
    batch: &Batch<'_, '_>,
    tap: &Tap,
    account: &mut Account,
) -> Result<Outcome<Chain>, TapFull> {
    let fate = match judged.verdict() {
        Verdict::Drop(reason) => Fate::Dropped(reason),
        Verdict::Forward => {
            let (head, tail) = batch.image(judged.frame());
            account.begin_tap_operation();
            match tap.write(head, tail) {
                Ok(_) => Fate::Passed,
                Err(Errno::AGAIN) => {
                    account.withdraw_tap_operation();
                    return Err(TapFull(()));
                }
                Err(Errno::IO | Errno::BADFD | Errno::NETDOWN | Errno::NODEV) => {
                    Fate::Dropped(DropReason::TapDown)
                }
                Err(_) => Fate::Dropped(DropReason::TapRefused),
            }
        }
    };
    Ok(Outcome::new(judged, fate))
}
