//! The other side of a tap: a packet socket bound to it, with virtio-net headers.
//!
//! What it sends goes out through the tap, towards the guest; what it receives came in from the tap, from the
//! guest. Nothing in the kernel answers these frames: they are for MAC addresses that nobody has.

#![expect(unsafe_code, reason = "packet sockets are not in any of the libraries that the tests use")]

use std::{
    ffi::CString,
    io,
    mem::size_of,
    net::UdpSocket,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    time::Instant,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmflow_driver::vnet::{LEGACY_HEADER_SIZE, VnetHeader};

use crate::harness::{Netns, PATIENCE};

/// Room for a frame of 65,535 bytes, its header, and more, so that nothing is cut unnoticed.
const ROOM: usize = 70_000;
/// Bytes that the socket may hold, so that a test may send first and look later.
const HELD: libc::c_int = 64 << 20;

/// Limits the bytes of frames that a tap takes before the host has dealt with them (TUNSETSNDBUF).
pub fn hold_at_most(tap: &OwnedFd, bytes: libc::c_int) {
    // SAFETY: TUNSETSNDBUF reads one `int`, which `bytes` is.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETSNDBUF, &raw const bytes) }).unwrap();
}

/// Has the kernel cut what a socket sends into datagrams of so many bytes of payload (`UDP_SEGMENT`).
pub fn cut_into(socket: &UdpSocket, payload: u16) -> io::Result<()> {
    set(socket, libc::SOL_UDP, libc::UDP_SEGMENT, payload.into())
}

/// A frame with its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The header; the kernel gives no `num_buffers`.
    pub header: VnetHeader,
    /// The frame.
    pub bytes: Vec<u8>,
}

/// A packet socket bound to a tap.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
}

impl Wire {
    /// Binds one to an interface of the namespace.
    pub fn open(netns: &Netns, interface: &str) -> Self {
        netns
            .inside(|| Self::bound(interface))
            .unwrap_or_else(|e| panic!("a packet socket at {interface}: {e}"))
    }

    fn bound(interface: &str) -> io::Result<Self> {
        // SAFETY: `socket` takes integers only.
        let number = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0) };
        check(number)?;
        // SAFETY: the descriptor is new and nobody else's.
        let wire = Self { socket: unsafe { OwnedFd::from_raw_fd(number) } };
        set(&wire.socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        set(&wire.socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        set(&wire.socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, HELD)?;
        set(&wire.socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, HELD)?;
        let name = CString::new(interface)?;
        // SAFETY: `name` is a string with its final zero, alive during the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        // SAFETY: zero is a value of every field of `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
        address.sll_protocol = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?.to_be();
        address.sll_ifindex = index.cast_signed();
        let pointer = (&raw const address).cast();
        let length = u32::try_from(size_of::<libc::sockaddr_ll>()).map_err(io::Error::other)?;
        // SAFETY: `address` is of that length and alive during the call.
        check(unsafe { libc::bind(wire.socket.as_raw_fd(), pointer, length) })?;
        Ok(wire)
    }

    /// Sends a frame towards the guest, as it is.
    pub fn send(&self, frame: &[u8]) {
        self.send_with(&VnetHeader::default(), frame);
    }

    /// Sends a frame towards the guest, if the tap takes one now: it does not without a carrier.
    pub fn try_send(&self, frame: &[u8]) -> bool {
        let bytes = [&VnetHeader::default().bytes()[..LEGACY_HEADER_SIZE], frame].concat();
        match rustix::io::write(&self.socket, &bytes) {
            Ok(_) => true,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::NOBUFS) => false,
            Err(e) => panic!("a frame to the guest: {e}"),
        }
    }

    /// Sends a frame with offloads towards the guest.
    pub fn send_with(&self, header: &VnetHeader, frame: &[u8]) {
        let bytes = [&header.bytes()[..LEGACY_HEADER_SIZE], frame].concat();
        let sent = loop {
            match rustix::io::write(&self.socket, &bytes) {
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::OUT),
                sent => break sent,
            }
        };
        assert_eq!(sent.unwrap_or_else(|e| panic!("{} bytes to the guest: {e}", frame.len())), bytes.len());
    }

    /// The next frame from the guest, if there is one.
    pub fn try_receive(&self) -> Option<Frame> {
        let mut bytes = vec![0; ROOM];
        let length = match rustix::io::read(&self.socket, &mut bytes[..]) {
            Ok(length) => length,
            Err(rustix::io::Errno::AGAIN) => return None,
            // Said once when the tap goes; what it had brought is still to be read.
            Err(rustix::io::Errno::NETDOWN) => return self.try_receive(),
            Err(e) => panic!("a frame from the guest: {e}"),
        };
        bytes.truncate(length);
        let header = VnetHeader::parse(&bytes[..LEGACY_HEADER_SIZE]).unwrap();
        bytes.drain(..LEGACY_HEADER_SIZE);
        Some(Frame { header, bytes })
    }

    /// The next frame from the guest.
    pub fn receive(&self) -> Frame {
        loop {
            match self.try_receive() {
                Some(frame) => return frame,
                None => self.wait(PollFlags::IN),
            }
        }
    }

    /// Frames that came from the guest and found no room here.
    pub fn lost(&self) -> u32 {
        let mut statistics = [0_u32; 2]; // `struct tpacket_stats`: packets, drops
        let mut length = u32::try_from(size_of_val(&statistics)).unwrap();
        // SAFETY: both pointers are to live variables, of the type and length that this option has.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        check(result).unwrap();
        statistics[1]
    }

    fn wait(&self, event: PollFlags) {
        let until = Instant::now() + PATIENCE;
        let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).unwrap();
        let ready = poll(&mut [PollFd::new(&self.socket, event)], Some(&left)).unwrap();
        assert!(ready > 0, "nothing at the tap's other side within {PATIENCE:?}");
    }
}

fn set(socket: impl AsFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = u32::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    let pointer = (&raw const value).cast();
    // SAFETY: each option set here is an `int`, which `value` is, alive during the call.
    check(unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), level, option, pointer, length) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
