//! What the kernel does with a virtio-net header: it takes every one that was rebuilt, makes as many packets as
//! were counted, and would have rewritten inspected bytes for those that are refused.
//!
//! ```text
//!  test --write--> tap "guest" --- bridge --- tap "peer" (no offloads: the kernel finishes all work) --read--> test
//! ```
//!
//! Each test has a network namespace of its own, which ends with its thread. That needs root.

#![expect(
    unsafe_code,
    reason = "making a namespace, taps and a bridge takes system calls that no crate here wraps"
)]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that goes wrong panics")]

#[path = "../src/wire/tests/frames.rs"]
mod frames;

use frames::{GUEST, IPV4, IPV6, PEER_PORT, TCP, UDP, ethernet, ipv4, ipv6, tcp, udp};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Result, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};
use vmflow::wire::vnet::{
    BadOffload, Checked, Flags, GsoType, HEADER_LEN, NegotiatedOffloads, OffloadFault, Size, VnetHeader,
    check_receive, check_transmit,
};
use vmflow::wire::{Fragment, Headers};

const ALL: NegotiatedOffloads = NegotiatedOffloads::from_features(u64::MAX);
const GUEST_CSUM: u64 = 1 << 1;
const DEADLINE: Duration = Duration::from_secs(10);
/// An `EtherType` for experiments: the frame that says that all before it have been read.
const MARKER: u16 = 0x88b5;
const VLAN: [u8; 4] = [0x81, 0, 0, 5];
const SERVICE_VLAN: [u8; 4] = [0x88, 0xa8, 0, 7];
/// Not in libc: include/uapi/linux/sockios.h.
const SIOCBRADDBR: libc::Ioctl = 0x89a0;
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// Runs `test` in a network namespace of its own.
fn in_own_network(test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let run = || {
            // SAFETY: takes no pointer; a thread may leave its network namespace at any time.
            let left = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(left, 0, "a network namespace needs root: {}", std::io::Error::last_os_error());
            test();
        };
        scope.spawn(run).join().unwrap();
    });
}

fn checked(result: libc::c_int) {
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all fields are integers, arrays of them or a union of such and pointers: 0 is valid for each.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::try_from(from).unwrap();
    }
    request
}

/// A socket to ask about interfaces.
fn socket() -> OwnedFd {
    // SAFETY: takes no pointer.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    checked(fd);
    // SAFETY: the descriptor is new, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn set_up(name: &str) {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap();
    // SAFETY: the request is an ifreq, is read only, and outlives the call.
    checked(unsafe { libc::ioctl(socket().as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) });
}

fn bridge(ports: [&str; 2]) {
    let socket = socket();
    // SAFETY: the name ends with 0 and outlives the call.
    checked(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDBR, c"bridge".as_ptr()) });
    for port in ports {
        let name = std::ffi::CString::new(port).unwrap();
        // SAFETY: the name ends with 0 and outlives the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        let mut request = request("bridge");
        request.ifr_ifru.ifru_ifindex = libc::c_int::try_from(index).unwrap();
        // SAFETY: the request is an ifreq, is read only, and outlives the call.
        checked(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDIF, &raw const request) });
    }
    set_up("bridge");
}

/// A tap with virtio-net headers of 12 bytes.
struct Tap(File);

impl Tap {
    fn new(name: &str, flags: libc::c_int) -> Self {
        let mut options = OpenOptions::new();
        let tun = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun").unwrap();
        let mut request = request(name);
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
        // SAFETY: the request is an ifreq and outlives the call.
        checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
        let size = libc::c_int::try_from(HEADER_LEN).unwrap();
        // SAFETY: the size is an int, is read only, and outlives the call.
        checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) });
        // SAFETY: the argument is a number: no offload.
        checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETOFFLOAD, 0) });
        set_up(name);
        Self(tun)
    }

    fn send(&mut self, header: VnetHeader, frame: &[u8]) -> Result<usize> {
        self.0.write(&[&header.encode()[..], frame].concat())
    }

    /// What came from the guest's address before the marker, which is sent now.
    fn received_from(&mut self, guest: &mut Self) -> Vec<(VnetHeader, Vec<u8>)> {
        guest.send(VnetHeader::default(), &ethernet(&[], MARKER, &[0; 46])).unwrap();
        let (mut frames, end) = (Vec::new(), Instant::now() + DEADLINE);
        loop {
            let frame = self.next(end);
            if frame[HEADER_LEN..][6..12] != GUEST {
                continue; // the kernel's own, looking for neighbours
            }
            if frame[HEADER_LEN..][12..14] == MARKER.to_be_bytes() {
                return frames;
            }
            let header = VnetHeader::decode(*frame.first_chunk().unwrap());
            frames.push((header, frame[HEADER_LEN..].to_vec()));
        }
    }

    fn next(&mut self, end: Instant) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 17];
        loop {
            match self.0.read(&mut bytes) {
                Ok(length) => return bytes[..length].to_vec(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(end),
                Err(error) => panic!("reading from the tap: {error}"),
            }
        }
    }

    fn wait(&self, end: Instant) {
        let left = end.checked_duration_since(Instant::now()).expect("the marker didn't come in time");
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = libc::c_int::try_from(left.as_millis()).unwrap();
        // SAFETY: one pollfd, which outlives the call.
        checked(unsafe { libc::poll(&raw mut poll, 1, milliseconds) });
    }
}

/// The guest's tap and the peer's, with a bridge between them.
fn bridged(guest_flags: libc::c_int) -> (Tap, Tap) {
    let taps = (Tap::new("guest", guest_flags), Tap::new("peer", 0));
    bridge(["guest", "peer"]);
    taps
}

fn csum(csum_start: u16, csum_offset: u16) -> VnetHeader {
    VnetHeader { flags: Flags::NEEDS_CSUM, csum_start, csum_offset, ..VnetHeader::default() }
}

fn gso(gso_type: GsoType, csum_start: u16, csum_offset: u16) -> VnetHeader {
    VnetHeader { gso_type, gso_size: 1000, ..csum(csum_start, csum_offset) }
}

fn check(header: VnetHeader, frame: &[u8]) -> std::result::Result<Checked, OffloadFault> {
    check_transmit(header, &Headers::parse(frame, frame.len()), frame.len(), ALL)
}

/// Every kind of request that a guest may make, with a frame of 3,500 bytes of payload.
fn requests() -> Vec<(VnetHeader, Vec<u8>)> {
    let (segment, datagram) = (tcp(&[1; 12], &[0x5a; 3500]), udp(&[0x5a; 3500]));
    let mut requests = vec![(VnetHeader::default(), ethernet(&[], IPV4, &ipv4(TCP, &segment)))];
    for (tags, length) in [(vec![], 0), (vec![VLAN], 4), (vec![SERVICE_VLAN, VLAN], 8)] {
        let tcp4 = ethernet(&tags, IPV4, &ipv4(TCP, &segment));
        let tcp6 = ethernet(&tags, IPV6, &ipv6(TCP, &segment));
        let udp4 = ethernet(&tags, IPV4, &ipv4(UDP, &datagram));
        let udp6 = ethernet(&tags, IPV6, &ipv6(UDP, &datagram));
        requests.extend([
            (csum(34 + length, 16), tcp4.clone()),
            (csum(54 + length, 6), udp6.clone()),
            (gso(GsoType::TCPV4, 34 + length, 16), tcp4.clone()),
            (gso(GsoType::TCPV4.with_ecn(), 34 + length, 16), tcp4),
            (gso(GsoType::TCPV6, 54 + length, 16), tcp6),
            (gso(GsoType::UDP_L4, 34 + length, 6), udp4),
            (gso(GsoType::UDP_L4, 54 + length, 6), udp6),
        ]);
    }
    requests
}

#[test]
fn the_kernel_takes_every_header_that_was_rebuilt() {
    in_own_network(|| {
        let mut guest = Tap::new("guest", 0);
        for (header, frame) in requests() {
            let rebuilt = check(header, &frame).unwrap().header();
            assert_eq!(guest.send(rebuilt, &frame).unwrap(), HEADER_LEN + frame.len(), "{rebuilt:?}");
        }
    });
}

#[test]
fn the_kernel_makes_as_many_packets_and_bytes_as_were_counted() {
    in_own_network(|| {
        let (mut guest, mut peer) = bridged(0);
        for (header, frame) in requests() {
            if header.gso_type == GsoType::NONE {
                continue;
            }
            let checked = check(header, &frame).unwrap();
            guest.send(checked.header(), &frame).unwrap();
            let packets = peer.received_from(&mut guest);
            let wire_bytes = packets.iter().map(|(_, packet)| packet.len() as u64).sum();
            let made = Size { packets: packets.len() as u64, bytes: frame.len() as u64, wire_bytes };
            assert_eq!(made, checked.size(), "{header:?}");
            assert_eq!(made.packets, 4);
        }
    });
}

/// Where the two differ.
fn changed(before: &[u8], after: &[u8]) -> Vec<usize> {
    assert_eq!(before.len(), after.len());
    (0..before.len()).filter(|at| before[*at] != after[*at]).collect()
}

#[test]
fn a_checksum_that_was_allowed_changes_the_checksum_field_alone() {
    in_own_network(|| {
        let (mut guest, mut peer) = bridged(0);
        let frame = ethernet(&[], IPV4, &ipv4(UDP, &udp(b"where is example.org?")));
        let checked = check(csum(34, 6), &frame).unwrap();
        guest.send(checked.header(), &frame).unwrap();
        let packets = peer.received_from(&mut guest);
        assert_eq!(packets.len(), 1);
        assert_eq!(changed(&frame, &packets[0].1), [40, 41]);
    });
}

#[test]
fn a_checksum_that_is_refused_would_have_changed_what_was_inspected() {
    in_own_network(|| {
        let (mut guest, mut peer) = bridged(0);
        let frame = ethernet(&[], IPV4, &ipv4(UDP, &udp(b"where is example.org?")));
        let places = [
            (20, 10, BadOffload::ChecksumStart, vec![30, 31]), // the destination address
            (34, 2, BadOffload::ChecksumOffset, vec![36, 37]), // the destination port
        ];
        for (start, offset, expected, rewritten) in places {
            assert_eq!(check(csum(start, offset), &frame), Err(OffloadFault::BadOffload(expected)));
            guest.send(csum(start, offset), &frame).unwrap();
            let packets = peer.received_from(&mut guest);
            assert_eq!(packets.len(), 1, "the kernel took it");
            assert_eq!(changed(&frame, &packets[0].1), rewritten);
            let (inspected, sent) =
                (Headers::parse(&frame, frame.len()), Headers::parse(&packets[0].1, frame.len()));
            assert_ne!(inspected.flow_key(), sent.flow_key(), "another flow than was judged");
            assert_eq!(inspected.flow_key().ports().unwrap().1, PEER_PORT);
            assert_eq!(sent.flow_key().fragment(), Fragment::Whole);
        }
    });
}

#[test]
fn the_kernel_says_data_valid_whatever_the_tap_was_told_and_a_driver_without_checksums_never_hears_it() {
    in_own_network(|| {
        // With NAPI the kernel looks for frames to merge, and so verifies checksums.
        let (mut guest, mut peer) = bridged(libc::IFF_NAPI);
        let frame = with_tcp_checksum(&ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[], &[0x5a; 100]))));
        guest.send(VnetHeader::default(), &frame).unwrap();
        let packets = peer.received_from(&mut guest);
        let [(header, packet)] = packets.as_slice() else { panic!("{} packets", packets.len()) };
        assert!(header.flags.contains(Flags::DATA_VALID), "{header:?}");
        let headers = Headers::parse(packet, packet.len());
        for (features, flags) in [(0, Flags::default()), (GUEST_CSUM, Flags::DATA_VALID)] {
            let negotiated = NegotiatedOffloads::from_features(features);
            let checked = check_receive(*header, &headers, packet.len(), negotiated).unwrap();
            assert_eq!(checked.header(), VnetHeader { flags, ..VnetHeader::default() });
        }
    });
}

/// The frame, an IPv4 packet with 20 bytes of header, with its TCP checksum.
fn with_tcp_checksum(frame: &[u8]) -> Vec<u8> {
    let segment = &frame[34..];
    let length = u16::try_from(segment.len()).unwrap().to_be_bytes();
    let pseudo = [&frame[26..34], &[0, TCP], &length, segment].concat();
    let mut sum: u32 = pseudo.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum > u32::from(u16::MAX) {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let mut summed = frame.to_vec();
    summed[50..52].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
    summed
}
