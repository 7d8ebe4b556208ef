//! The transport layer: TCP, UDP, ICMP and ICMPv6; others are known by their protocol number alone.
//!
//! ```text
//! TCP    source port (2) | destination port (2) | sequence (4) | acknowledged (4)
//!        data offset 4, reserved 4 | flags | window (2) | checksum (2) | urgent (2) | options
//! UDP    source port (2) | destination port (2) | length (2) | checksum (2)
//! ICMP   type | code | checksum (2) | 4 more bytes
//! ```

use super::net::{Family, Fragment, Network, protocol};
use super::{Unclassified, View, be16, be32, field};

/// TCP's header without options.
pub const TCP_HEADER: usize = 20;
/// UDP's header.
pub const UDP_HEADER: usize = 8;
/// Where TCP's header has its checksum.
pub const TCP_CHECKSUM_OFFSET: u16 = 16;
/// Where UDP's header has its checksum.
pub const UDP_CHECKSUM_OFFSET: u16 = 6;

/// What every message of ICMP and of ICMPv6 has at least.
const ICMP_HEADER: usize = 8;
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

/// What an ICMP or ICMPv6 message is about.
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

impl Transport {
    /// The length of the header, options included.
    #[inline]
    pub(super) fn header_length(self) -> Option<usize> {
        match self {
            Self::None => None,
            Self::Tcp(tcp) => Some(usize::from(tcp.header_length)),
            Self::Udp(_) => Some(UDP_HEADER),
            Self::Icmp(_) | Self::Icmpv6(_) => Some(ICMP_HEADER),
        }
    }
}

/// The transport header at `offset` of a view that ends with the packet.
#[inline]
pub(super) fn parse(view: View<'_>, offset: usize, network: &Network) -> Result<Transport, Unclassified> {
    let parsed = match (network.protocol, network.family) {
        (protocol::TCP, _) => tcp(view, offset),
        (protocol::UDP, _) => udp(view, offset, network.fragment),
        (protocol::ICMP, Family::Ipv4) => icmp(view, offset).map(Transport::Icmp),
        (protocol::ICMPV6, Family::Ipv6) => icmp(view, offset).map(Transport::Icmpv6),
        _ => Ok(Transport::None),
    };
    match (parsed, network.fragment) {
        // RFC 1858 and RFC 7112: nobody but an attacker cuts a packet within these headers.
        (
            Err(
                Unclassified::TruncatedTcpHeader
                | Unclassified::TruncatedUdpHeader
                | Unclassified::TruncatedIcmpHeader,
            ),
            Fragment::First,
        ) => Err(Unclassified::IncompleteFirstFragment),
        (parsed, _) => parsed,
    }
}

#[inline]
fn tcp(view: View<'_>, offset: usize) -> Result<Transport, Unclassified> {
    let header = view.at::<TCP_HEADER>(offset).ok_or(Unclassified::TruncatedTcpHeader)?;
    let [data_offset, flags] = field::<12, 2, _>(header);
    let header_length = (data_offset & DATA_OFFSET_MASK).wrapping_shr(DATA_OFFSET_SHIFT);
    let length = usize::from(header_length);
    // The options may lie beyond the copied bytes, but not beyond the packet.
    if length < TCP_HEADER || offset.saturating_add(length) > view.end {
        return Err(Unclassified::TcpDataOffset);
    }
    Ok(Transport::Tcp(Tcp {
        source_port: be16::<0, _>(header),
        destination_port: be16::<2, _>(header),
        sequence: be32::<4, _>(header),
        acknowledgement: be32::<8, _>(header),
        window: be16::<14, _>(header),
        flags: TcpFlags(flags),
        header_length,
    }))
}

#[inline]
fn udp(view: View<'_>, offset: usize, fragment: Fragment) -> Result<Transport, Unclassified> {
    let header = view.at::<UDP_HEADER>(offset).ok_or(Unclassified::TruncatedUdpHeader)?;
    let length = be16::<4, _>(header);
    let size = usize::from(length);
    // A first fragment tells the length of the whole datagram. Bytes behind the datagram are allowed: UDP options.
    let fits = fragment == Fragment::First || offset.saturating_add(size) <= view.end;
    if size < UDP_HEADER || !fits {
        return Err(Unclassified::UdpLength);
    }
    Ok(Transport::Udp(Udp {
        source_port: be16::<0, _>(header),
        destination_port: be16::<2, _>(header),
        length,
        has_checksum: be16::<6, _>(header) != 0,
    }))
}

fn icmp(view: View<'_>, offset: usize) -> Result<Icmp, Unclassified> {
    let [kind, code, ..] = *view.at::<ICMP_HEADER>(offset).ok_or(Unclassified::TruncatedIcmpHeader)?;
    Ok(Icmp { kind, code })
}
