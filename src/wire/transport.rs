//! The transport layer: TCP, UDP, ICMP and `ICMPv6`; others are known by their protocol number alone.
//!
//! ```text
//! TCP    source port (2) | destination port (2) | sequence (4) | acknowledged (4)
//!        data offset 4, reserved 4 | flags | window (2) | checksum (2) | urgent (2) | options
//! UDP    source port (2) | destination port (2) | length (2) | checksum (2)
//! ICMP   type | code | checksum (2) | 4 more bytes
//! ```

use super::key::Ends;
use super::net::{Family, Fragment, Segment, protocol};
use super::{Depth, Headers, Unclassified, be16, be32, field};

/// TCP's header without options.
pub const TCP_HEADER: usize = 20;
/// UDP's header.
pub const UDP_HEADER: usize = 8;
/// Where TCP's header has its checksum.
pub const TCP_CHECKSUM_OFFSET: u16 = 16;
/// Where UDP's header has its checksum.
pub const UDP_CHECKSUM_OFFSET: u16 = 6;

/// What every message of ICMP and of `ICMPv6` has at least.
const ICMP_HEADER: usize = 8;
const RAW_SIZE: usize = 16;
const DATA_OFFSET_MASK: u8 = 0xf0;
/// The data offset is in the upper 4 bits and counts words of 4 bytes: shifted right by 4, left by 2.
const DATA_OFFSET_SHIFT: u32 = 2;

/// TCP's flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// No more data.
    pub const FIN: Self = Self(0x01);
    /// Begin.
    pub const SYN: Self = Self(0x02);
    /// Abort.
    pub const RST: Self = Self(0x04);
    /// Hand it to the application.
    pub const PSH: Self = Self(0x08);
    /// The acknowledgement counts.
    pub const ACK: Self = Self(0x10);
    /// The urgent pointer counts.
    pub const URG: Self = Self(0x20);
    /// ECN: congestion was seen.
    pub const ECE: Self = Self(0x40);
    /// ECN: the window was reduced.
    pub const CWR: Self = Self(0x80);

    /// Is one of `others` set?
    #[must_use]
    pub const fn intersects(self, others: Self) -> bool {
        self.0 & others.0 != 0
    }

    /// These and `others`.
    #[must_use]
    pub const fn with(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }
}

/// A TCP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// The sender's port.
    pub source_port: u16,
    /// The receiver's port.
    pub destination_port: u16,
    /// The number of the first byte.
    pub sequence: u32,
    /// The number of the byte expected next.
    pub acknowledgement: u32,
    /// How much more may be sent, unscaled.
    pub window: u16,
    /// The flags.
    pub flags: TcpFlags,
    /// The header's length with its options, in bytes: 20 to 60.
    pub header_length: u8,
}

/// A UDP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Udp {
    /// The sender's port.
    pub source_port: u16,
    /// The receiver's port.
    pub destination_port: u16,
    /// The length of header and data, in bytes.
    pub length: u16,
    /// Does it have a checksum? Over IPv4, 0 says that it has none.
    pub has_checksum: bool,
}

/// What an ICMP or `ICMPv6` message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Icmp {
    /// What it is.
    pub kind: u8,
    /// Which sort of it.
    pub code: u8,
}

/// A packet's transport header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// None that is known here, none that could be parsed, or none there: a later fragment.
    #[default]
    None,
    /// TCP.
    Tcp(Tcp),
    /// UDP.
    Udp(Udp),
    /// ICMP in IPv4.
    Icmp(Icmp),
    /// ICMP in IPv6.
    Icmpv6(Icmp),
}

/// What is kept of a transport's header until somebody asks for it: most frames' sequence numbers and windows
/// never are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RawTransport {
    kind: Kind,
    /// TCP's first 16 bytes, UDP's and ICMP's 8; the rest is 0.
    bytes: [u8; RAW_SIZE],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    None,
    Tcp,
    Udp,
    Icmp,
    Icmpv6,
}

impl RawTransport {
    #[inline]
    pub(super) const fn is_tcp(&self) -> bool {
        matches!(self.kind, Kind::Tcp)
    }

    #[inline]
    pub(super) const fn is_udp(&self) -> bool {
        matches!(self.kind, Kind::Udp)
    }

    pub(super) fn decode(&self) -> Transport {
        match self.kind {
            Kind::None => Transport::None,
            Kind::Tcp => Transport::Tcp(self.tcp()),
            Kind::Udp => Transport::Udp(self.udp()),
            Kind::Icmp => Transport::Icmp(self.icmp()),
            Kind::Icmpv6 => Transport::Icmpv6(self.icmp()),
        }
    }

    pub(super) fn tcp(&self) -> Tcp {
        let [data_offset, flags] = field::<12, 2, _>(&self.bytes);
        Tcp {
            source_port: be16::<0, _>(&self.bytes),
            destination_port: be16::<2, _>(&self.bytes),
            sequence: be32::<4, _>(&self.bytes),
            acknowledgement: be32::<8, _>(&self.bytes),
            window: be16::<14, _>(&self.bytes),
            flags: TcpFlags(flags),
            header_length: tcp_header_length(data_offset),
        }
    }

    pub(super) fn udp(&self) -> Udp {
        Udp {
            source_port: be16::<0, _>(&self.bytes),
            destination_port: be16::<2, _>(&self.bytes),
            length: be16::<4, _>(&self.bytes),
            has_checksum: be16::<6, _>(&self.bytes) != 0,
        }
    }

    fn icmp(&self) -> Icmp {
        let [kind, code, ..] = self.bytes;
        Icmp { kind, code }
    }
}

/// Reads the transport's header, if it is one that is known here.
#[expect(clippy::inline_always, reason = "a third less time: what a layer hands on stays in registers")]
#[inline(always)]
pub(super) fn read(headers: &mut Headers, segment: Segment<'_>) -> Result<(), Unclassified> {
    headers.set_l4_offset(segment.offset);
    let read = match (segment.protocol, segment.family) {
        (protocol::TCP, _) => tcp(headers, segment),
        (protocol::UDP, _) => udp(headers, segment),
        (protocol::ICMP, Family::Ipv4) => icmp(headers, segment, Kind::Icmp),
        (protocol::ICMPV6, Family::Ipv6) => icmp(headers, segment, Kind::Icmpv6),
        _ => return Ok(()),
    };
    match read {
        Ok(header_length) => {
            headers.set_payload_offset(segment.offset.wrapping_add(header_length));
            headers.depth = Depth::Transport;
            Ok(())
        }
        // RFC 1858 and RFC 7112: nobody but an attacker cuts a packet within these headers.
        Err(
            Unclassified::TruncatedTcpHeader
            | Unclassified::TruncatedUdpHeader
            | Unclassified::TruncatedIcmpHeader,
        ) if segment.fragment == Fragment::First => Err(Unclassified::IncompleteFirstFragment),
        Err(reason) => Err(reason),
    }
}

/// The length that a TCP header gives itself, from the byte with its data offset.
const fn tcp_header_length(data_offset: u8) -> u8 {
    (data_offset & DATA_OFFSET_MASK).wrapping_shr(DATA_OFFSET_SHIFT)
}

#[expect(clippy::inline_always, reason = "a third less time: what a layer hands on stays in registers")]
#[inline(always)]
fn tcp(headers: &mut Headers, segment: Segment<'_>) -> Result<usize, Unclassified> {
    let header = segment.view.at::<TCP_HEADER>(segment.offset).ok_or(Unclassified::TruncatedTcpHeader)?;
    let [data_offset] = field::<12, 1, _>(header);
    let length = usize::from(tcp_header_length(data_offset));
    // The options may lie beyond the copied bytes, but not beyond the packet.
    if length < TCP_HEADER || segment.offset.wrapping_add(length) > segment.view.end {
        return Err(Unclassified::TcpDataOffset);
    }
    headers.key.set_ends(Ends::Ports, field::<0, 4, _>(header));
    headers.transport = RawTransport { kind: Kind::Tcp, bytes: field::<0, RAW_SIZE, _>(header) };
    Ok(length)
}

#[expect(clippy::inline_always, reason = "a third less time: what a layer hands on stays in registers")]
#[inline(always)]
fn udp(headers: &mut Headers, segment: Segment<'_>) -> Result<usize, Unclassified> {
    let header = segment.view.at::<UDP_HEADER>(segment.offset).ok_or(Unclassified::TruncatedUdpHeader)?;
    let length = usize::from(be16::<4, _>(header));
    // A first fragment tells the length of the whole datagram. Bytes behind a datagram are allowed: UDP options.
    let fits = segment.fragment == Fragment::First || segment.offset.wrapping_add(length) <= segment.view.end;
    if length < UDP_HEADER || !fits {
        return Err(Unclassified::UdpLength);
    }
    headers.key.set_ends(Ends::Ports, field::<0, 4, _>(header));
    headers.transport = RawTransport { kind: Kind::Udp, bytes: padded(*header) };
    Ok(UDP_HEADER)
}

fn icmp(headers: &mut Headers, segment: Segment<'_>, kind: Kind) -> Result<usize, Unclassified> {
    let header = segment.view.at::<ICMP_HEADER>(segment.offset).ok_or(Unclassified::TruncatedIcmpHeader)?;
    let [message, code, ..] = *header;
    headers.key.set_ends(Ends::Icmp, [message, code, 0, 0]);
    headers.transport = RawTransport { kind, bytes: padded(*header) };
    Ok(ICMP_HEADER)
}

fn padded(header: [u8; UDP_HEADER]) -> [u8; RAW_SIZE] {
    u128::from(u64::from_le_bytes(header)).to_le_bytes()
}
