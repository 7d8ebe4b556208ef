//! Frames for tests: Ethernet with tags, ARP, IPv4, IPv6, UDP, TCP, sums right unless the test breaks them.
//!
//! ```text
//!   Ends { MACs, addresses, ports }  ->  .udp(payload) / .tcp(..) / .arp()  ->  bytes  ->  tagged(bytes, tags)
//! ```
//! The bytes are plain: a test that wants a wrong field writes it at its offset ([`at`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes of an Ethernet header without tags.
pub const ETHERNET: usize = 14;
/// Bytes of a VLAN tag.
pub const TAG: usize = 4;
/// Bytes of an IPv4 header without options.
pub const IPV4: usize = 20;
/// Bytes of an IPv6 header.
pub const IPV6: usize = 40;
/// Bytes of a UDP header.
pub const UDP: usize = 8;
/// Bytes of a TCP header without options.
pub const TCP: usize = 20;
/// Hops that a packet may go.
const HOPS: u8 = 64;

/// `EtherType`s.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// A customer's VLAN tag.
    pub const VLAN: u16 = 0x8100;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// A provider's VLAN tag.
    pub const PROVIDER: u16 = 0x88a8;
}

/// IP protocol numbers.
pub mod protocol {
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
}

/// Offsets in a frame of IPv4 without tags and options.
pub mod at {
    /// The `EtherType`.
    pub const ETHERTYPE: usize = 12;
    /// The IP header.
    pub const IP: usize = super::ETHERNET;
    /// The transport header.
    pub const L4: usize = super::ETHERNET + super::IPV4;
    /// A UDP payload.
    pub const UDP_PAYLOAD: usize = L4 + super::UDP;
}

/// From where to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// MAC addresses: destination and source, in the order of the wire.
    pub macs: [[u8; 6]; 2],
    /// The IP addresses of source and destination; both of one version.
    pub addresses: [IpAddr; 2],
    /// The ports of source and destination.
    pub ports: [u16; 2],
}

/// What a TCP segment has beside its ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "TCP's own fields")]
pub struct Segment {
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub window: u16,
}

impl Default for Ends {
    /// A guest at 10.0.0.1 to its gateway.
    fn default() -> Self {
        Self {
            macs: [[0x52, 0x54, 0, 0, 0, 2], [0x52, 0x54, 0, 0, 0, 1]],
            addresses: [Ipv4Addr::new(10, 0, 0, 1).into(), Ipv4Addr::new(10, 0, 0, 2).into()],
            ports: [40_000, 9],
        }
    }
}

impl Ends {
    /// The same over IPv6.
    #[must_use]
    pub fn v6() -> Self {
        let address = |host| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host).into();
        Self { addresses: [address(1), address(2)], ..Self::default() }
    }

    /// The way back.
    #[must_use]
    pub fn reversed(mut self) -> Self {
        self.macs.reverse();
        self.addresses.reverse();
        self.ports.reverse();
        self
    }

    /// A UDP datagram.
    #[must_use]
    pub fn udp(&self, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(UDP + payload.len()).unwrap_or(0);
        let mut datagram = words(&[self.ports[0], self.ports[1], length, 0]);
        datagram.extend_from_slice(payload);
        let sum = match self.transport_sum(protocol::UDP, &datagram) {
            // 0 would mean that there is no sum.
            0 => u16::MAX,
            sum => sum,
        };
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        self.ip(protocol::UDP, &datagram)
    }

    /// A TCP segment without options.
    #[must_use]
    pub fn tcp(&self, segment: Segment, payload: &[u8]) -> Vec<u8> {
        let mut bytes = words(&self.ports);
        bytes.extend_from_slice(&segment.sequence.to_be_bytes());
        bytes.extend_from_slice(&segment.acknowledged.to_be_bytes());
        let header_words = u8::try_from(TCP / 4).unwrap_or(0);
        bytes.extend_from_slice(&[header_words << 4, segment.flags]);
        bytes.extend_from_slice(&words(&[segment.window, 0, 0]));
        bytes.extend_from_slice(payload);
        let sum = self.transport_sum(protocol::TCP, &bytes);
        bytes[16..18].copy_from_slice(&sum.to_be_bytes());
        self.ip(protocol::TCP, &bytes)
    }

    /// Who has the destination's address? Answer the source. Asked of everybody.
    #[must_use]
    pub fn arp(&self) -> Vec<u8> {
        let ends = Self { macs: [[0xff; 6], self.macs[1]], ..*self };
        let mut bytes = words(&[1, ethertype::IPV4, 0x0604, 1]);
        bytes.extend_from_slice(&self.macs[1]);
        bytes.extend_from_slice(&octets(self.addresses[0]));
        bytes.extend_from_slice(&[0; 6]);
        bytes.extend_from_slice(&octets(self.addresses[1]));
        ends.ethernet(ethertype::ARP, &bytes)
    }

    /// An IP packet of any protocol.
    #[must_use]
    pub fn ip(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let [source, destination] = self.addresses.map(octets);
        let v4 = self.addresses[0].is_ipv4();
        let mut header = if v4 {
            let total = u16::try_from(IPV4 + payload.len()).unwrap_or(0);
            // Version 4, 5 words; don't fragment.
            words(&[0x4500, total, 0, 0x4000, u16::from_be_bytes([HOPS, protocol]), 0])
        } else {
            let length = u16::try_from(payload.len()).unwrap_or(0);
            words(&[0x6000, 0, length, u16::from_be_bytes([protocol, HOPS])])
        };
        header.extend_from_slice(&source);
        header.extend_from_slice(&destination);
        if v4 {
            let sum = !sum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        header.extend_from_slice(payload);
        self.ethernet(if v4 { ethertype::IPV4 } else { ethertype::IPV6 }, &header)
    }

    /// A frame of any `EtherType`, as short as its payload.
    #[must_use]
    pub fn ethernet(&self, ethertype: u16, payload: &[u8]) -> Vec<u8> {
        [self.macs.as_flattened(), &ethertype.to_be_bytes(), payload].concat()
    }

    /// A UDP frame of `length` bytes in all (at least its headers), whose payload shows `number` and is
    /// different at each place.
    #[must_use]
    pub fn numbered(&self, length: usize, number: u64) -> Vec<u8> {
        let headers = ETHERNET + UDP + if self.addresses[0].is_ipv4() { IPV4 } else { IPV6 };
        self.udp(&pattern(length.saturating_sub(headers), number))
    }

    /// The transport checksum over `bytes`, in which its own field is 0.
    #[must_use]
    pub fn transport_sum(&self, protocol: u8, bytes: &[u8]) -> u16 {
        let length = u32::try_from(bytes.len()).unwrap_or(0).to_be_bytes();
        let addresses = self.addresses.map(octets).concat();
        !sum(&[&addresses, length.as_slice(), &[0, protocol], bytes].concat())
    }
}

/// Bytes that differ from place to place and from one `number` to the next; the first eight are the number.
#[must_use]
pub fn pattern(length: usize, number: u64) -> Vec<u8> {
    let mut state = number;
    let mut bytes = Vec::with_capacity(length + 8);
    bytes.extend_from_slice(&number.to_be_bytes());
    while bytes.len() < length {
        // A linear congruential generator; its high bits are the good ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_be_bytes()[..4]);
    }
    bytes.truncate(length);
    bytes
}

/// The frame with tags between its MACs and its `EtherType`, the outermost first: `EtherType` and VLAN.
#[must_use]
pub fn tagged(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let (macs, rest) = frame.split_at(at::ETHERTYPE.min(frame.len()));
    let tags: Vec<u16> = tags.iter().flat_map(|tag| [tag.0, tag.1]).collect();
    [macs, &words(&tags), rest].concat()
}

/// The frame with its MACs swapped.
#[must_use]
pub fn swapped(frame: &[u8]) -> Vec<u8> {
    let (macs, rest) = frame.split_at(at::ETHERTYPE);
    [&macs[6..], &macs[..6], rest].concat()
}

/// The Internet's sum of 16-bit words (RFC 1071), not inverted.
#[must_use]
pub fn sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u64 = bytes.chunks(2).map(word).sum();
    while sum > u64::from(u16::MAX) {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

fn words(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_header_has_the_sum_of_a_known_one() {
        // RFC 1071's way over a header that is printed in many places: 192.168.0.1 -> 192.168.0.199.
        let header =
            [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
        assert_eq!(!sum(&header), 0xb861);
    }

    #[test]
    fn sums_of_all_kinds_verify() {
        for ends in [Ends::default(), Ends::v6()] {
            for frame in [ends.udp(b"odd"), ends.tcp(Segment::default(), b"even")] {
                let v4 = ends.addresses[0].is_ipv4();
                let (protocol, l4) = if v4 { (frame[23], at::L4) } else { (frame[20], ETHERNET + IPV6) };
                assert_eq!(ends.transport_sum(protocol, &frame[l4..]), 0);
                assert!(!v4 || sum(&frame[at::IP..at::L4]) == u16::MAX);
            }
        }
    }

    #[test]
    fn frames_have_the_length_asked_for_and_differ() {
        for length in [42, 43, 64, 1514, 9014] {
            let frame = Ends::default().numbered(length, 5);
            assert_eq!(frame.len(), length);
            assert!(length < 50 || frame != Ends::default().numbered(length, 6));
        }
    }

    #[test]
    fn tags_stand_before_the_ethertype() {
        let frame = tagged(&Ends::default().arp(), &[(ethertype::PROVIDER, 7), (ethertype::VLAN, 8)]);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[12..22], [0x88, 0xa8, 0, 7, 0x81, 0, 0, 8, 8, 6]);
        assert_eq!(frame.len(), ETHERNET + 2 * TAG + 28);
    }
}
