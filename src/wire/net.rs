//! The network layer: IPv4, IPv6 with its extension headers, ARP.
//!
//! ```text
//! IPv4   version,IHL | DSCP,ECN | total length (2) | ID (2) | flags 3, fragment offset 13 (2)
//!        TTL | protocol | checksum (2) | source (4) | destination (4) | options up to IHL * 4
//! IPv6   version 4, traffic class 8, flow label 20 | payload length (2) | next header | hop limit
//!        source (16) | destination (16), then a chain of extension headers:
//!        next header | length in 8 bytes, less the first 8 | ...           AH counts in 4, less 8
//!        44 | reserved | fragment offset 13, reserved 2, more 1 | ID (4)   the fragment header
//! ARP    hardware (2) | protocol (2) | 6 | 4 | operation (2) | sender MAC, IPv4 | target MAC, IPv4
//! ```
//!
//! A header is only believed if its lengths fit the frame. Bytes behind the packet are the padding that
//! every short frame has.

use super::link::Packet;
use super::{EtherType, Headers, Mac, Unclassified, View, be16, be32, field, transport};
use std::net::Ipv4Addr;

/// Numbers of protocols, which IPv4's protocol field and IPv6's next header share.
pub mod protocol {
    /// IPv6's hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP, in IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6's routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6's fragment header.
    pub const FRAGMENT: u8 = 44;
    /// The authentication header.
    pub const AUTHENTICATION: u8 = 51;
    /// ICMP, in IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6's destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
}

/// How many extension headers are looked behind: more than RFC 8200 has use for, few enough to bound the work.
pub const MAX_EXTENSIONS: usize = 8;

pub(super) const IPV4_HEADER: usize = 20;
pub(super) const IPV6_HEADER: usize = 40;
/// Extension headers count their length in these, less the first; the fragment header is one.
const EXTENSION_UNIT: usize = 8;
/// The authentication header's length is in these, less the first two.
const AUTHENTICATION_UNIT: usize = 4;
const ARP_PACKET: usize = 28;
const VERSION_SHIFT: u32 = 4;
const IHL_MASK: u8 = 0x0f;
/// The IHL counts in words of 4 bytes.
const IHL_SHIFT: u32 = 2;
const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET_MASK: u16 = 0x1fff;
const IPV6_MORE_FRAGMENTS: u16 = 1;
/// IPv6 keeps its fragment offset above three flag bits.
const IPV6_FRAGMENT_OFFSET_SHIFT: u32 = 3;
/// Ethernet addresses of 6 bytes for IPv4 addresses of 4.
const ARP_ETHERNET_IPV4: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];

/// What kind of addresses a frame has above its MACs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Family {
    /// None that could be parsed.
    #[default]
    None,
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// ARP: the sender's and the target's IPv4 address.
    Arp,
}

/// Is the packet a piece of another one?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Fragment {
    /// No. An IPv6 packet whose fragment header says "the first and the last" is whole, too (RFC 6946).
    #[default]
    Whole,
    /// The first piece: the headers of its transport are in it.
    First,
    /// A later piece: nothing in it tells its ports.
    Later,
}

impl Fragment {
    const fn of(offset: u16, more: bool) -> Self {
        match (offset, more) {
            (0, false) => Self::Whole,
            (0, true) => Self::First,
            _ => Self::Later,
        }
    }
}

/// A transport's segment in its packet: what it should be, where it begins, and a view that ends with the packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment<'a> {
    pub(super) view: View<'a>,
    pub(super) offset: usize,
    pub(super) protocol: u8,
    pub(super) family: Family,
    pub(super) fragment: Fragment,
}

/// Reads the network layer, if it is one that is known here, and what it carries.
#[expect(clippy::inline_always, reason = "a third less time: what a layer hands on stays in registers")]
#[inline(always)]
pub(super) fn read(headers: &mut Headers, packet: Packet<'_>) -> Result<(), Unclassified> {
    match packet.ether_type {
        EtherType::IPV4 => ipv4(headers, packet),
        EtherType::IPV6 => ipv6(headers, packet),
        EtherType::ARP => arp(headers, packet),
        _ => Ok(()),
    }
}

/// An IPv4 address as the key keeps it.
fn word(address: [u8; 4]) -> [u64; 2] {
    [u64::from(u32::from_le_bytes(address)), 0]
}

/// The length that an IPv4 header gives itself.
pub(super) fn ipv4_header_length(version_ihl: u8) -> usize {
    usize::from((version_ihl & IHL_MASK).wrapping_shl(IHL_SHIFT))
}

#[expect(clippy::inline_always, reason = "a third less time: what a layer hands on stays in registers")]
#[inline(always)]
fn ipv4(headers: &mut Headers, packet: Packet<'_>) -> Result<(), Unclassified> {
    let Packet { view, offset, .. } = packet;
    let header = view.at::<IPV4_HEADER>(offset).ok_or(Unclassified::TruncatedIpv4Header)?;
    let [version_ihl, traffic_class, ..] = *header;
    if version_ihl.wrapping_shr(VERSION_SHIFT) != 4 {
        return Err(Unclassified::Ipv4Version);
    }
    let header_length = ipv4_header_length(version_ihl);
    if header_length < IPV4_HEADER {
        return Err(Unclassified::Ipv4HeaderLength);
    }
    let total_length = usize::from(be16::<2, _>(header));
    let end = offset.wrapping_add(total_length);
    let view = view.until(end).filter(|_| total_length >= header_length);
    let view = view.ok_or(Unclassified::Ipv4TotalLength)?;
    let offset = offset.wrapping_add(header_length);
    if offset > view.copy.len() {
        return Err(Unclassified::TruncatedIpv4Header);
    }
    let flags = be16::<6, _>(header);
    let [hop_limit, protocol] = field::<8, 2, _>(header);
    let fragment_offset = flags & FRAGMENT_OFFSET_MASK;
    let fragment = Fragment::of(fragment_offset, flags & MORE_FRAGMENTS != 0);
    let addresses = [field::<12, 4, _>(header), field::<16, 4, _>(header)].map(word);
    headers.set_packet(Family::Ipv4, addresses, end);
    headers.key.set_protocol(protocol, fragment);
    headers.traffic_class = traffic_class;
    headers.hop_limit = hop_limit;
    headers.dont_fragment = flags & DONT_FRAGMENT != 0;
    headers.fragment_offset = fragment_offset;
    headers.identification = u32::from(be16::<4, _>(header));
    if fragment == Fragment::Later {
        return Ok(());
    }
    transport::read(headers, Segment { view, offset, protocol, family: Family::Ipv4, fragment })
}

#[expect(clippy::inline_always, reason = "a third less time: what a layer hands on stays in registers")]
#[inline(always)]
fn ipv6(headers: &mut Headers, packet: Packet<'_>) -> Result<(), Unclassified> {
    let Packet { view, offset, .. } = packet;
    let header = view.at::<IPV6_HEADER>(offset).ok_or(Unclassified::TruncatedIpv6Header)?;
    let [v0, v1, ..] = *header;
    let [protocol, hop_limit] = field::<6, 2, _>(header);
    if v0.wrapping_shr(VERSION_SHIFT) != 6 {
        return Err(Unclassified::Ipv6Version);
    }
    let payload_length = usize::from(be16::<4, _>(header));
    if payload_length == 0 && protocol == protocol::HOP_BY_HOP {
        return Err(Unclassified::Jumbogram);
    }
    let offset = offset.wrapping_add(IPV6_HEADER);
    let end = offset.wrapping_add(payload_length);
    let view = view.until(end).ok_or(Unclassified::Ipv6PayloadLength)?;
    let half = u64::from_le_bytes;
    let addresses = [
        [half(field::<8, 8, _>(header)), half(field::<16, 8, _>(header))],
        [half(field::<24, 8, _>(header)), half(field::<32, 8, _>(header))],
    ];
    headers.set_packet(Family::Ipv6, addresses, end);
    headers.traffic_class = v0.wrapping_shl(VERSION_SHIFT) | v1.wrapping_shr(VERSION_SHIFT);
    headers.hop_limit = hop_limit;
    if is_extension(protocol) {
        return read_extended(headers, view.copy, offset, protocol);
    }
    headers.key.set_protocol(protocol, Fragment::Whole);
    let fragment = Fragment::Whole;
    transport::read(headers, Segment { view, offset, protocol, family: Family::Ipv6, fragment })
}

const fn is_extension(number: u8) -> bool {
    matches!(
        number,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::AUTHENTICATION
            | protocol::DESTINATION_OPTIONS
    )
}

/// Reads the chain of extension headers and what it ends with. In a first fragment the whole chain must be
/// present (RFC 7112), or else cutting a packet within the chain would pass it by a rule on ports.
#[inline(never)]
fn read_extended(
    headers: &mut Headers,
    copy: &[u8],
    offset: usize,
    protocol: u8,
) -> Result<(), Unclassified> {
    let view = View { copy, end: headers.packet_end().unwrap_or_default() };
    let mut segment = Segment { view, offset, protocol, family: Family::Ipv6, fragment: Fragment::Whole };
    let walked = walk(headers, &mut segment);
    headers.key.set_protocol(segment.protocol, segment.fragment);
    match (walked, segment.fragment) {
        (Ok(()), Fragment::Later) => Ok(()),
        (Ok(()), _) => transport::read(headers, segment),
        (Err(Unclassified::TruncatedExtension), Fragment::First) => {
            Err(Unclassified::IncompleteFirstFragment)
        }
        (Err(reason), _) => Err(reason),
    }
}

/// Moves `segment` behind the chain, or behind the fragment header of a later fragment; where that fails it is
/// left at the header that is at fault.
fn walk(headers: &mut Headers, segment: &mut Segment<'_>) -> Result<(), Unclassified> {
    let start = segment.offset;
    let mut has_fragment_header = false;
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(segment.protocol) {
            return Ok(());
        }
        if segment.protocol == protocol::HOP_BY_HOP && segment.offset != start {
            return Err(Unclassified::HopByHopNotFirst);
        }
        let header =
            segment.view.at::<EXTENSION_UNIT>(segment.offset).ok_or(Unclassified::TruncatedExtension)?;
        let [next_header, length, ..] = *header;
        if segment.protocol == protocol::AUTHENTICATION && length == 0 {
            return Err(Unclassified::AuthenticationLength);
        }
        let end = segment.offset.wrapping_add(extension_size(segment.protocol, length));
        if end > segment.view.copy.len() {
            return Err(Unclassified::TruncatedExtension);
        }
        if segment.protocol == protocol::FRAGMENT {
            if std::mem::replace(&mut has_fragment_header, true) {
                return Err(Unclassified::RepeatedFragmentHeader);
            }
            segment.fragment = fragment_header(headers, *header);
        }
        segment.offset = end;
        segment.protocol = next_header;
        if segment.fragment == Fragment::Later {
            return Ok(());
        }
    }
    if is_extension(segment.protocol) { Err(Unclassified::TooManyExtensions) } else { Ok(()) }
}

fn fragment_header(headers: &mut Headers, header: [u8; EXTENSION_UNIT]) -> Fragment {
    let offset_and_flags = be16::<2, _>(&header);
    headers.fragment_offset = offset_and_flags.wrapping_shr(IPV6_FRAGMENT_OFFSET_SHIFT);
    headers.identification = be32::<4, _>(&header);
    Fragment::of(headers.fragment_offset, offset_and_flags & IPV6_MORE_FRAGMENTS != 0)
}

/// The size in bytes of an extension header whose length field says `length`.
fn extension_size(number: u8, length: u8) -> usize {
    let length = usize::from(length);
    match number {
        protocol::FRAGMENT => EXTENSION_UNIT,
        protocol::AUTHENTICATION => length.wrapping_add(2).wrapping_mul(AUTHENTICATION_UNIT),
        _ => length.wrapping_add(1).wrapping_mul(EXTENSION_UNIT),
    }
}

/// What an ARP packet says. The flow key has only the two IPv4 addresses; a guard against spoofing wants all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1 = request, 2 = reply.
    pub operation: u16,
    /// Whom the sender says it is.
    pub sender_mac: Mac,
    /// Where the sender says it is.
    pub sender: Ipv4Addr,
    /// Who is meant; 0 in a request.
    pub target_mac: Mac,
    /// Which address is asked for or told.
    pub target: Ipv4Addr,
}

impl Arp {
    pub(super) fn decode(packet: &[u8; ARP_PACKET]) -> Self {
        Self {
            operation: be16::<6, _>(packet),
            sender_mac: Mac::new(field::<8, 6, _>(packet)),
            sender: Ipv4Addr::from(field::<14, 4, _>(packet)),
            target_mac: Mac::new(field::<18, 6, _>(packet)),
            target: Ipv4Addr::from(field::<24, 4, _>(packet)),
        }
    }
}

#[cold]
fn arp(headers: &mut Headers, packet: Packet<'_>) -> Result<(), Unclassified> {
    let Packet { view, offset, .. } = packet;
    if *view.at(offset).ok_or(Unclassified::TruncatedArp)? != ARP_ETHERNET_IPV4 {
        return Err(Unclassified::ForeignArp);
    }
    let arp = Arp::decode(view.at(offset).ok_or(Unclassified::TruncatedArp)?);
    let addresses = [arp.sender.octets(), arp.target.octets()].map(word);
    headers.set_packet(Family::Arp, addresses, offset.wrapping_add(ARP_PACKET));
    Ok(())
}

/// Is the checksum of this IPv4 header (options included, nothing else) right? Apart from the parser, because
/// only coalescing must know: it makes new headers, and must not repair what the guest sent broken.
#[must_use]
pub fn ipv4_checksum_is_valid(header: &[u8]) -> bool {
    let Some(&version_ihl) = header.first() else { return false };
    if header.len() < IPV4_HEADER || header.len() != ipv4_header_length(version_ihl) {
        return false;
    }
    // At most 30 words, so 32 bits hold the sum, and folding twice brings it into 16.
    let (words, _) = header.as_chunks::<2>();
    let sum = words.iter().fold(0u32, |sum, word| sum.wrapping_add(u32::from(u16::from_be_bytes(*word))));
    let fold = |sum: u32| (sum & 0xffff).wrapping_add(sum.wrapping_shr(16));
    fold(fold(sum)) == 0xffff
}
