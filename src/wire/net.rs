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

use super::{EtherType, Mac, Unclassified, View, be16, be32, field};
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

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
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

/// A packet's network layer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Network {
    pub(super) family: Family,
    /// IPv4 addresses fill the first 4 bytes, the rest is 0.
    pub(super) source: [u8; 16],
    pub(super) destination: [u8; 16],
    /// What the packet carries, or at which extension header the chain was left.
    pub(super) protocol: u8,
    pub(super) traffic_class: u8,
    pub(super) hop_limit: u8,
    pub(super) dont_fragment: bool,
    pub(super) fragment: Fragment,
    /// In units of 8 bytes.
    pub(super) fragment_offset: u16,
    pub(super) identification: u32,
    /// Where the packet ends.
    pub(super) end: usize,
    /// Where the transport begins; `None` in a later fragment, in ARP and behind a broken chain.
    pub(super) transport_offset: Option<usize>,
    /// Why the chain of extension headers was left.
    pub(super) stopped: Option<Unclassified>,
}

/// The network layer at `offset`; `None` if the `EtherType` is of none that is known here.
#[inline]
pub(super) fn parse(
    view: View<'_>,
    offset: usize,
    ether_type: EtherType,
) -> Option<Result<Network, Unclassified>> {
    match ether_type {
        EtherType::IPV4 => Some(ipv4(view, offset)),
        EtherType::IPV6 => Some(ipv6(view, offset)),
        EtherType::ARP => Some(arp(view, offset)),
        _ => None,
    }
}

fn widen(address: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = address;
    [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// The length that an IPv4 header gives itself.
pub(super) fn ipv4_header_length(version_ihl: u8) -> usize {
    usize::from((version_ihl & IHL_MASK).wrapping_shl(IHL_SHIFT))
}

#[inline]
fn ipv4(view: View<'_>, offset: usize) -> Result<Network, Unclassified> {
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
    let end = offset.saturating_add(total_length);
    if total_length < header_length || end > view.end {
        return Err(Unclassified::Ipv4TotalLength);
    }
    let transport_offset = offset.saturating_add(header_length);
    if transport_offset > view.copy.len() {
        return Err(Unclassified::TruncatedIpv4Header);
    }
    let flags = be16::<6, _>(header);
    let [hop_limit, protocol] = field::<8, 2, _>(header);
    let fragment_offset = flags & FRAGMENT_OFFSET_MASK;
    let fragment = Fragment::of(fragment_offset, flags & MORE_FRAGMENTS != 0);
    Ok(Network {
        family: Family::Ipv4,
        source: widen(field::<12, 4, _>(header)),
        destination: widen(field::<16, 4, _>(header)),
        protocol,
        traffic_class,
        hop_limit,
        dont_fragment: flags & DONT_FRAGMENT != 0,
        fragment,
        fragment_offset,
        identification: u32::from(be16::<4, _>(header)),
        end,
        transport_offset: (fragment != Fragment::Later).then_some(transport_offset),
        stopped: None,
    })
}

#[inline]
fn ipv6(view: View<'_>, offset: usize) -> Result<Network, Unclassified> {
    let header = view.at::<IPV6_HEADER>(offset).ok_or(Unclassified::TruncatedIpv6Header)?;
    let [v0, v1, ..] = *header;
    let [next_header, hop_limit] = field::<6, 2, _>(header);
    if v0.wrapping_shr(VERSION_SHIFT) != 6 {
        return Err(Unclassified::Ipv6Version);
    }
    let payload_length = usize::from(be16::<4, _>(header));
    if payload_length == 0 && next_header == protocol::HOP_BY_HOP {
        return Err(Unclassified::Jumbogram);
    }
    let payload = offset.saturating_add(IPV6_HEADER);
    let end = payload.saturating_add(payload_length);
    let view = view.until(end).ok_or(Unclassified::Ipv6PayloadLength)?;
    let mut network = Network {
        family: Family::Ipv6,
        source: field::<8, 16, _>(header),
        destination: field::<24, 16, _>(header),
        protocol: next_header,
        traffic_class: v0.wrapping_shl(VERSION_SHIFT) | v1.wrapping_shr(VERSION_SHIFT),
        hop_limit,
        end,
        transport_offset: Some(payload),
        ..Network::default()
    };
    if is_extension(next_header) {
        network.follow(view, payload);
    }
    Ok(network)
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

impl Network {
    /// Follows the chain of extension headers that begins at `start`. In a first fragment the whole chain
    /// must be present (RFC 7112), or else a rule on ports could be passed by cutting the packet in the chain.
    fn follow(&mut self, view: View<'_>, start: usize) {
        let end = self.walk(view, start);
        self.transport_offset = match end {
            Ok(offset) => offset,
            Err(reason) => {
                self.stopped = Some(match (self.fragment, reason) {
                    (Fragment::First, Unclassified::TruncatedExtension) => {
                        Unclassified::IncompleteFirstFragment
                    }
                    _ => reason,
                });
                None
            }
        };
    }

    /// Where the transport begins; `None` behind the fragment header of a later fragment.
    fn walk(&mut self, view: View<'_>, start: usize) -> Result<Option<usize>, Unclassified> {
        let mut offset = start;
        let mut has_fragment_header = false;
        for _ in 0..MAX_EXTENSIONS {
            if !is_extension(self.protocol) {
                return Ok(Some(offset));
            }
            if self.protocol == protocol::HOP_BY_HOP && offset != start {
                return Err(Unclassified::HopByHopNotFirst);
            }
            let first = view.at::<8>(offset).ok_or(Unclassified::TruncatedExtension)?;
            let [next_header, length, ..] = *first;
            let size = extension_size(self.protocol, length);
            offset = offset.saturating_add(size);
            if offset > view.copy.len() {
                return Err(Unclassified::TruncatedExtension);
            }
            if self.protocol == protocol::FRAGMENT {
                if std::mem::replace(&mut has_fragment_header, true) {
                    return Err(Unclassified::RepeatedFragmentHeader);
                }
                self.read_fragment_header(first);
            }
            self.protocol = next_header;
            if self.fragment == Fragment::Later {
                return Ok(None);
            }
        }
        if is_extension(self.protocol) { Err(Unclassified::TooManyExtensions) } else { Ok(Some(offset)) }
    }

    fn read_fragment_header(&mut self, header: &[u8; 8]) {
        let offset_and_flags = be16::<2, _>(header);
        self.fragment_offset = offset_and_flags.wrapping_shr(IPV6_FRAGMENT_OFFSET_SHIFT);
        self.fragment = Fragment::of(self.fragment_offset, offset_and_flags & IPV6_MORE_FRAGMENTS != 0);
        self.identification = be32::<4, _>(header);
    }
}

/// The size in bytes of an extension header whose length field says `length`.
fn extension_size(number: u8, length: u8) -> usize {
    let length = usize::from(length);
    match number {
        protocol::FRAGMENT => 8,
        protocol::AUTHENTICATION => length.saturating_add(2).saturating_mul(4),
        _ => length.saturating_add(1).saturating_mul(8),
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
    pub(super) fn parse(packet: &[u8; ARP_PACKET]) -> Result<Self, Unclassified> {
        if field::<0, 6, _>(packet) != ARP_ETHERNET_IPV4 {
            return Err(Unclassified::ForeignArp);
        }
        Ok(Self {
            operation: be16::<6, _>(packet),
            sender_mac: Mac::new(field::<8, 6, _>(packet)),
            sender: Ipv4Addr::from(field::<14, 4, _>(packet)),
            target_mac: Mac::new(field::<18, 6, _>(packet)),
            target: Ipv4Addr::from(field::<24, 4, _>(packet)),
        })
    }

    pub(super) fn at(view: View<'_>, offset: usize) -> Result<Self, Unclassified> {
        Self::parse(view.at::<ARP_PACKET>(offset).ok_or(Unclassified::TruncatedArp)?)
    }
}

fn arp(view: View<'_>, offset: usize) -> Result<Network, Unclassified> {
    let packet = Arp::at(view, offset)?;
    Ok(Network {
        family: Family::Arp,
        source: widen(packet.sender.octets()),
        destination: widen(packet.target.octets()),
        end: offset.saturating_add(ARP_PACKET),
        ..Network::default()
    })
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
