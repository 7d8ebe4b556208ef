//! Taps: made, taken over and set up by the monitor; the worker only reads, writes and sets offloads.

#![expect(unsafe_code, reason = "the TUN driver is driven by ioctls")]

mod queues;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use rustix::fs::{Mode, OFlags, open};

use crate::{features, wire::vnet::HEADER_LEN};

pub use queues::Queues;

/// Longest interface name in bytes (IFNAMSIZ without the final zero).
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// The owner of our taps: a user that nobody runs as. Without an owner any local user could attach to a
/// queue of the tap and inject frames that no ledger has seen.
const NOBODY: u32 = u32::MAX - 1;

/// What our taps are: Ethernet frames, each with a virtio-net header in front.
const KIND: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why a tap cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The TUN driver is not there or not for us.
    #[error("cannot open /dev/net/tun: {0}: vmflow needs the tun driver and CAP_NET_ADMIN")]
    Driver(io::Error),
    /// Somebody else uses the interface.
    #[error("tap {0} is in use by another program")]
    Busy(String),
    /// There is an interface of that name that is no tap.
    #[error("{0} exists and is not a tap: {1}")]
    NotATap(String, io::Error),
    /// We may not.
    #[error("no permission to create or attach to tap {0}: vmflow needs CAP_NET_ADMIN")]
    Permission(String),
    /// The descriptor that was handed in is no tap, or not this one.
    #[error("the descriptor handed in as {0} is not that tap")]
    NotThisTap(String),
    /// It has one queue, and cannot get another.
    #[error(
        "tap {0} has one queue: for more queue_pairs than 1 make it with multi_queue, or, if vmflow made it, restart vmflow"
    )]
    OneQueue(String),
    /// Fewer queues were handed in than are wanted.
    #[error(
        "tap {name}: {there} of its queues were handed in: queue_pairs = {wanted} needs a descriptor for each"
    )]
    TooFew {
        /// Its name.
        name: String,
        /// How many descriptors there are.
        there: usize,
        /// How many are needed.
        wanted: u16,
    },
    /// A step of the set-up.
    #[error("tap {0}: cannot set {1}: {2}")]
    Setup(String, &'static str, io::Error),
}

/// Creates a tap, or attaches to the one of that name; sets owner and header size. The link stays as it is.
///
/// # Errors
/// [`TapError`].
pub fn attach(name: &str) -> Result<OwnedFd, TapError> {
    let mut attached = open_queue(name, KIND)?;
    if attached.as_ref().is_err_and(is_invalid) {
        // A tap that was made with `multi_queue` wants to be asked for as one.
        attached = open_queue(name, KIND | libc::IFF_MULTI_QUEUE)?;
    }
    let fd = attached.map_err(|e| refused(name, e))?;
    prepare(&fd, name)?;
    Ok(fd)
}

/// One more queue of a tap with several, which is made if it is not there; nothing is set.
fn attach_one_of_several(name: &str) -> Result<OwnedFd, TapError> {
    open_queue(name, KIND | libc::IFF_MULTI_QUEUE)?.map_err(|e| {
        // Is it a tap, but one that was made with one queue?
        let single = is_invalid(&e).then(|| open_queue(name, KIND));
        match single {
            Some(Ok(Ok(_))) => TapError::OneQueue(name.into()),
            Some(Ok(Err(busy))) if busy.raw_os_error() == Some(libc::EBUSY) => {
                TapError::OneQueue(name.into())
            }
            _ => refused(name, e),
        }
    })
}

/// A new descriptor of a tap of that name, if the kernel takes it for one of this kind.
fn open_queue(name: &str, kind: libc::c_int) -> Result<io::Result<OwnedFd>, TapError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = open("/dev/net/tun", flags, Mode::empty()).map_err(|e| TapError::Driver(e.into()))?;
    Ok(set_interface(&fd, name, kind).map(|()| fd))
}

fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

fn refused(name: &str, error: io::Error) -> TapError {
    match error.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy(name.into()),
        Some(libc::EPERM) => TapError::Permission(name.into()),
        _ => TapError::NotATap(name.into(), error),
    }
}

/// Takes a queue of a tap that was handed in as a descriptor; nothing is set but that it does not block. True if
/// the tap can have several.
fn adopt(fd: &OwnedFd, name: &str) -> Result<bool, TapError> {
    let (found, flags) = interface(fd).map_err(|_| TapError::NotThisTap(name.into()))?;
    if found != name || i32::from(flags) & KIND != KIND {
        return Err(TapError::NotThisTap(name.into()));
    }
    let nonblocking =
        rustix::fs::fcntl_getfl(fd).and_then(|flags| rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK));
    nonblocking.map_err(|e| TapError::Setup(name.into(), "non-blocking mode", e.into()))?;
    Ok(i32::from(flags) & libc::IFF_MULTI_QUEUE != 0)
}

fn prepare(fd: &OwnedFd, name: &str) -> Result<(), TapError> {
    let setup = |what, done: io::Result<()>| done.map_err(|e| TapError::Setup(name.into(), what, e));
    setup("its owner", by_value(fd, libc::TUNSETOWNER, NOBODY.into()))?;
    setup("the header size", by_pointer(fd, libc::TUNSETVNETHDRSZ, int(HEADER_LEN)))?;
    setup("its offloads", set_offloads(fd, 0))
}

/// Switches the link's carrier: the host sees whether a front end is connected.
///
/// # Errors
/// Whatever the ioctl says; before Linux 5.0 there is no such switch.
pub fn set_carrier(fd: impl AsFd, on: bool) -> io::Result<()> {
    by_pointer(fd, libc::TUNSETCARRIER, on.into())
}

/// Throws away the frames that wait in the tap: they were for the VM that had it before.
pub fn drain(fd: impl AsFd) {
    /// More than a tap holds: what comes meanwhile is for the new VM.
    const MOST: usize = 10_000;
    let mut head = [0; HEADER_LEN];
    for _ in 0..MOST {
        // The rest of a frame that has no room goes with it.
        if rustix::io::read(&fd, &mut head).is_err() {
            return;
        }
    }
}

/// Does the kernel cut UDP into datagrams, and may it give us UDP that is not cut? Linux does from 6.2 on. It is
/// found out by trying, on a tap that no guest has yet; the tap is without offloads afterwards.
///
/// # Errors
/// [`TapError::Setup`] if they cannot be taken back.
pub fn knows_uso(fd: &OwnedFd, name: &str) -> Result<bool, TapError> {
    let uso = features::GUEST_CSUM | features::GUEST_USO4 | features::GUEST_USO6;
    let knows = set_offloads(fd, uso).is_ok();
    set_offloads(fd, 0).map_err(|e| TapError::Setup(name.into(), "its offloads", e))?;
    Ok(knows)
}

/// Tells the kernel which frames the guest takes unfinished, by the features that its driver acknowledged.
///
/// # Errors
/// Whatever the ioctl says.
pub fn set_offloads(fd: impl AsFd, acked: u64) -> io::Result<()> {
    by_value(fd, libc::TUNSETOFFLOAD, offloads(acked).into())
}

/// The TUN driver's flags for what a driver acknowledged. A bit without those that it requires (virtio 1.3,
/// 5.1.3.1) counts for nothing: the TUN driver would refuse them all.
fn offloads(acked: u64) -> libc::c_uint {
    let has = |feature| acked & feature != 0;
    let flag = |feature, flag| if has(feature) { flag } else { 0 };
    if !has(features::GUEST_CSUM) {
        // Segmentation is possible only where checksums may be left out.
        return 0;
    }
    let tso = flag(features::GUEST_TSO4, libc::TUN_F_TSO4) | flag(features::GUEST_TSO6, libc::TUN_F_TSO6);
    let ecn = if tso == 0 { 0 } else { flag(features::GUEST_ECN, libc::TUN_F_TSO_ECN) };
    // It knows UDP of both families only together.
    let both = has(features::GUEST_USO4) && has(features::GUEST_USO6);
    let uso = if both { libc::TUN_F_USO4 | libc::TUN_F_USO6 } else { 0 };
    libc::TUN_F_CSUM | tso | ecn | uso
}

/// Attaches a queue of a tap that has several, or detaches it. One that is detached takes no frames of the host's,
/// and loses those that it holds; what is written to it still passes. One that is so already stays so.
///
/// # Errors
/// Whatever the ioctl says.
pub fn attach_queue(queue: impl AsFd, attach: bool) -> io::Result<()> {
    let mut request = ifreq("");
    let flag = if attach { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or_default();
    // SAFETY: TUNSETQUEUE reads one `struct ifreq`, which `request` is.
    let done = check(unsafe { libc::ioctl(queue.as_fd().as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) });
    if done.as_ref().is_err_and(is_invalid) { Ok(()) } else { done }
}

/// TUNSETIFF.
fn set_interface(fd: &OwnedFd, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut request = ifreq(name);
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// TUNGETIFF: name and flags.
fn interface(fd: &OwnedFd) -> io::Result<(String, libc::c_short)> {
    let mut request = ifreq("");
    // SAFETY: TUNGETIFF writes one `struct ifreq`, which `request` is.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    let bytes = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| c.cast_unsigned()).collect();
    // SAFETY: TUNGETIFF fills in the flags, and any bits are valid ones.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((String::from_utf8(bytes).unwrap_or_default(), flags))
}

fn ifreq(name: &str) -> libc::ifreq {
    let mut bytes = [0; libc::IFNAMSIZ];
    for (byte, c) in bytes[..NAME_MAX].iter_mut().zip(name.bytes()) {
        *byte = c.cast_signed();
    }
    libc::ifreq { ifr_name: bytes, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } }
}

/// An ioctl whose argument is the value itself.
fn by_value(fd: impl AsFd, request: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: these requests (TUNSETOWNER, TUNSETOFFLOAD) take an integer and touch no memory.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, value) })
}

/// An ioctl whose argument is a pointer to an `int`.
fn by_pointer(fd: impl AsFd, request: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    // SAFETY: these requests (TUNSETVNETHDRSZ, TUNSETCARRIER) read one `int`, which `value` is.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw const value) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn int(n: usize) -> libc::c_int {
    libc::c_int::try_from(n).unwrap_or(libc::c_int::MAX)
}
