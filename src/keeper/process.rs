//! What a keeper needs of the kernel that no library offers safely: its inherited descriptors, `fork`, and
//! signals as a descriptor.

#![expect(unsafe_code, reason = "fork, signalfd and inherited descriptors")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, set_parent_process_death_signal};

/// What a keeper is started with: the monitor puts these descriptors at 3, 4, 5, and from 6 on.
#[derive(Debug)]
pub struct Inherited {
    /// The front end's connection.
    pub front_end: OwnedFd,
    /// The port's ledger.
    pub ledger: OwnedFd,
    /// The worker's end of the socket that policies come through.
    pub policies: OwnedFd,
    /// The tap's queues, one for each queue pair, not blocking.
    pub tap: Vec<OwnedFd>,
}

impl Inherited {
    /// The first one's number.
    pub const FIRST: RawFd = 3;

    /// Takes them over, with so many queues of the tap; `None` if they are not there, or not for the first time.
    #[must_use]
    pub fn take(queues: u16) -> Option<Self> {
        static TAKEN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
        if TAKEN.swap(true, std::sync::atomic::Ordering::Relaxed) {
            return None;
        }
        let (front_end, ledger, policies) = (own(3)?, own(4)?, own(5)?);
        let tap = (6..).take(queues.into()).map(own).collect::<Option<_>>()?;
        Some(Self { front_end, ledger, policies, tap })
    }
}

/// In the order of their numbers.
impl IntoIterator for Inherited {
    type Item = OwnedFd;
    type IntoIter = std::iter::Chain<std::array::IntoIter<OwnedFd, 3>, std::vec::IntoIter<OwnedFd>>;

    fn into_iter(self) -> Self::IntoIter {
        let Self { front_end, ledger, policies, tap } = self;
        [front_end, ledger, policies].into_iter().chain(tap)
    }
}

/// Takes over an inherited descriptor, and keeps it from being inherited any further.
fn own(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_SETFD takes an integer and touches no memory; on a number that is not open it fails.
    let open = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
    // SAFETY: the descriptor is open, the monitor put it there for us, and `take` runs once.
    open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// Forks. The child keeps standard input, output and error and the descriptors of `keep`, is killed when
/// we die, and and ends with the code that `child` gives. Gives the child's pidfd.
///
/// # Errors
/// Whatever `fork` or `pidfd_open` says.
pub fn fork(keep: &[BorrowedFd<'_>], child: impl FnOnce() -> i32) -> io::Result<OwnedFd> {
    let parent = rustix::process::getpid();
    // SAFETY: this process has one thread (the keeper never starts another), so the child may do anything
    // that the parent could: no lock can be held by a thread that it lacks.
    let pid = unsafe { libc::fork() };
    match Pid::from_raw(pid) {
        _ if pid < 0 => Err(io::Error::last_os_error()),
        Some(pid) => Ok(pidfd_open(pid, PidfdFlags::empty())?),
        None => {
            let mortal = set_parent_process_death_signal(Some(Signal::KILL));
            if mortal.is_err() || getppid() != Some(parent) {
                std::process::exit(1); // the parent died before the line above
            }
            close_all_but(keep);
            std::process::exit(child())
        }
    }
}

/// Closes every descriptor from 3 on that is not named.
fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let mut kept: Vec<_> = keep.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept.into_iter().chain([u32::MAX]) {
        if fd > first {
            // SAFETY: these descriptors belong to values of the parent that this process never uses or
            // drops: it runs `child` and ends.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
}

/// Blocks the signals that ask for an end, and gives a descriptor that is readable when one has come.
///
/// # Errors
/// Whatever `signalfd` says.
pub fn termination() -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: `set` is valid for writes; sigemptyset initialises it.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: `set` was initialised above; the signal numbers are valid.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: `set` was initialised above; no old mask is asked for.
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) };
    // SAFETY: `set` was initialised above; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
