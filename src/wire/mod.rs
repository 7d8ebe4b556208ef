//! What a frame says: its headers, and the virtio-net header before it.
//!
//! A frame's bytes are a guest's to choose, so everything here is total: any bytes give an answer, and no
//! bytes give a panic, an allocation or unbounded work. Nothing here decides about a frame (that is `judge`'s
//! to do) and nothing here reads guest memory: the caller holds a private copy of the frame's first bytes.
//!
//! ```text
//!  | virtio-net header |  Ethernet, VLAN tags  |  IP, extensions  |  TCP, UDP, ICMP  |  payload ... |
//!  ^ vnet: 12 bytes    ^ link                  ^ net              ^ transport        ^              ^
//!                      0                       l3_offset          l4_offset          H              L
//! ```
//!
//! * [`link`], [`net`], [`transport`]: one layer each.
//! * [`Headers::parse`] puts them together: offsets, facts, and the [`FlowKey`].
//! * [`segment`]: which frames the kernel would give back if they were written to the tap as one.
//! * [`vnet`]: which checksum and segmentation offloads may be asked for, and how many packets a frame becomes.
//!
//! Where parsing stops early, [`Headers::unclassified`] says why; what was parsed before that is there.
//!
//! Offsets are added with `wrapping_add`, which cannot wrap: an offset is at most [`PREFIX`], what is added to it
//! comes from a field of 16 bits, and a frame's own length is compared, never added to.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

pub mod key;
pub mod link;
pub mod net;
pub mod segment;
pub mod transport;
pub mod vnet;

#[cfg(test)]
mod tests;

pub use key::{Addresses, FlowKey};
pub use link::{EtherType, Framing, Mac, VlanTag};
pub use net::{Arp, Family, Fragment};
pub use transport::{Icmp, Tcp, TcpFlags, Transport, Udp};

use transport::RawTransport;

/// How many of a frame's first bytes are looked at. More are ignored, so that the answer doesn't depend on how
/// many bytes a caller happened to copy.
pub const PREFIX: usize = 256;

/// Why a frame could not be parsed to its end. A frame of a protocol that isn't known here is not meant: that
/// one is classified by its `EtherType` or its protocol number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Unclassified {
    /// Shorter than an Ethernet header.
    Runt,
    /// The frame ends within a VLAN tag.
    TruncatedVlanTag,
    /// A third VLAN tag.
    TooManyVlanTags,
    /// A VLAN tag within SNAP.
    MisplacedVlanTag,
    /// The type field is neither a type nor a length that fits the frame.
    LengthField,
    /// The frame ends within its LLC or SNAP header.
    TruncatedLlc,
    /// The frame ends within its ARP packet.
    TruncatedArp,
    /// ARP for something else than Ethernet and IPv4.
    ForeignArp,
    /// The frame ends within its IPv4 header.
    TruncatedIpv4Header,
    /// The `EtherType` says IPv4, the packet says another version.
    Ipv4Version,
    /// IPv4's header length is less than 20 bytes.
    Ipv4HeaderLength,
    /// IPv4's total length is less than its header or more than the frame holds.
    Ipv4TotalLength,
    /// The frame ends within its IPv6 header.
    TruncatedIpv6Header,
    /// The `EtherType` says IPv6, the packet says another version.
    Ipv6Version,
    /// IPv6's payload length is more than the frame holds.
    Ipv6PayloadLength,
    /// An IPv6 packet whose length is in an option (RFC 2675): no Ethernet carries one.
    Jumbogram,
    /// An IPv6 extension header that doesn't fit the packet, or the bytes that are looked at.
    TruncatedExtension,
    /// An authentication header whose length is less than its fixed fields' 12 bytes.
    AuthenticationLength,
    /// More than [`net::MAX_EXTENSIONS`] IPv6 extension headers.
    TooManyExtensions,
    /// Hop-by-hop options that don't come first (RFC 8200 section 4.1).
    HopByHopNotFirst,
    /// A fragment of a fragment.
    RepeatedFragmentHeader,
    /// A first fragment that doesn't hold all headers (RFC 1858, RFC 7112).
    IncompleteFirstFragment,
    /// The packet ends within its TCP header.
    TruncatedTcpHeader,
    /// TCP's data offset is less than 20 bytes or more than the packet holds.
    TcpDataOffset,
    /// The packet ends within its UDP header.
    TruncatedUdpHeader,
    /// UDP's length is less than 8 bytes or more than the packet holds.
    UdpLength,
    /// The packet ends within its ICMP header.
    TruncatedIcmpHeader,
}

/// How far a frame could be parsed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    /// Not at all.
    #[default]
    Nothing,
    /// MACs, tags and `EtherType`.
    Link,
    /// Addresses, protocol and fragment state.
    Network,
    /// Ports, or ICMP's type and code.
    Transport,
}

/// The first bytes of a frame, with where the current layer ends: never beyond its lower layer, never before
/// the last of the bytes.
#[derive(Clone, Copy, Debug)]
struct View<'a> {
    copy: &'a [u8],
    end: usize,
}

impl<'a> View<'a> {
    #[inline]
    fn of(prefix: &'a [u8], frame_len: usize) -> Self {
        let looked_at = prefix.len().min(frame_len).min(PREFIX);
        Self { copy: prefix.get(..looked_at).unwrap_or_default(), end: frame_len }
    }

    /// The `N` bytes at `offset`, if the layer and the copy hold them.
    #[inline]
    fn at<const N: usize>(self, offset: usize) -> Option<&'a [u8; N]> {
        self.copy.get(offset..)?.first_chunk()
    }

    /// The same view, ending at `end`; `None` if the layer ends before.
    #[inline]
    fn until(self, end: usize) -> Option<Self> {
        let copy = self.copy.get(..end).unwrap_or(self.copy);
        (end <= self.end).then_some(Self { copy, end })
    }
}

/// The `N` bytes at `AT` of a header. That they are in it is known when this is compiled.
#[inline]
fn field<const AT: usize, const N: usize, const SIZE: usize>(header: &[u8; SIZE]) -> [u8; N] {
    const { assert!(AT.saturating_add(N) <= SIZE) };
    header.get(AT..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

/// The two bytes at `AT` as a number.
#[inline]
fn be16<const AT: usize, const SIZE: usize>(header: &[u8; SIZE]) -> u16 {
    u16::from_be_bytes(field::<AT, 2, SIZE>(header))
}

/// The four bytes at `AT` as a number.
#[inline]
fn be32<const AT: usize, const SIZE: usize>(header: &[u8; SIZE]) -> u32 {
    u32::from_be_bytes(field::<AT, 4, SIZE>(header))
}

/// What a frame's headers say. It has no reference to the bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Headers {
    key: FlowKey,
    frame_len: u32,
    /// Where the network layer's packet ends; 0 = not known.
    packet_end: u32,
    identification: u32,
    /// Offsets; 0 = not there, as the link layer's header always comes first.
    l3_offset: u16,
    l4_offset: u16,
    payload_offset: u16,
    fragment_offset: u16,
    /// The tags' control fields; which of them there are, and of which kind, the key tells.
    tags: [u16; link::MAX_VLAN_TAGS],
    transport: RawTransport,
    traffic_class: u8,
    hop_limit: u8,
    dont_fragment: bool,
    depth: Depth,
    unclassified: Option<Unclassified>,
}

/// Offsets lie in the first [`PREFIX`] bytes or, with TCP's options, 60 bytes behind them: 2 bytes hold them.
#[inline]
fn offset(value: usize) -> u16 {
    let [.., high, low] = value.to_be_bytes();
    u16::from_be_bytes([high, low])
}

fn length(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn present(offset: u16) -> Option<usize> {
    (offset != 0).then_some(usize::from(offset))
}

/// How the headers are read: each layer notes what it finds, and hands what it carries to the next one.
impl Headers {
    /// Parses a frame of `frame_len` bytes, of which `prefix` is a copy of the first ones: all of them, or at
    /// least [`PREFIX`].
    #[inline]
    #[must_use]
    pub fn parse(prefix: &[u8], frame_len: usize) -> Self {
        let mut headers = Self::default();
        headers.read(prefix, frame_len);
        headers
    }

    /// Not inlined, so that the headers are written where the caller wants them and not copied there.
    #[inline(never)]
    fn read(&mut self, prefix: &[u8], frame_len: usize) {
        self.frame_len = length(frame_len);
        self.unclassified = link::read(self, View::of(prefix, frame_len)).err();
    }

    #[inline]
    fn set_l3_offset(&mut self, value: usize) {
        self.l3_offset = offset(value);
    }

    #[inline]
    fn set_packet(&mut self, family: Family, [source, destination]: [[u64; 2]; 2], end: usize) {
        self.key.set_addresses(family, source, destination);
        self.packet_end = length(end);
        self.depth = Depth::Network;
    }

    #[inline]
    fn set_l4_offset(&mut self, value: usize) {
        self.l4_offset = offset(value);
    }

    #[inline]
    fn set_payload_offset(&mut self, value: usize) {
        self.payload_offset = offset(value);
    }
}

/// What was found.
impl Headers {
    /// What tells this frame's flow from others.
    #[must_use]
    pub const fn flow_key(&self) -> &FlowKey {
        &self.key
    }

    /// How far the frame could be parsed.
    #[must_use]
    pub const fn depth(&self) -> Depth {
        self.depth
    }

    /// Why it could not be parsed further; `None` if there is nothing more that is known here.
    #[must_use]
    pub const fn unclassified(&self) -> Option<Unclassified> {
        self.unclassified
    }

    /// L: the frame's length without the virtio-net header, in bytes.
    #[must_use]
    pub const fn frame_len(&self) -> u32 {
        self.frame_len
    }

    /// The VLAN tags: the outer and the inner one.
    #[must_use]
    pub fn vlan_tags(&self) -> [Option<VlanTag>; link::MAX_VLAN_TAGS] {
        let [outer, inner] = self.tags;
        let [outer_is_service, inner_is_service] = self.key.service_vlans();
        let [outer_id, inner_id] = self.key.vlan_ids();
        [
            outer_id.map(|_| VlanTag::new(outer, outer_is_service)),
            inner_id.map(|_| VlanTag::new(inner, inner_is_service)),
        ]
    }

    /// Where the packet begins, behind the link layer's header and tags.
    #[must_use]
    pub fn l3_offset(&self) -> Option<usize> {
        present(self.l3_offset)
    }

    /// Where the packet's transport begins, known or not; `None` in a later fragment.
    #[must_use]
    pub fn l4_offset(&self) -> Option<usize> {
        present(self.l4_offset)
    }

    /// H: where the payload of a TCP, UDP or ICMP header begins, which is the length of all headers.
    #[must_use]
    pub fn payload_offset(&self) -> Option<usize> {
        present(self.payload_offset)
    }

    /// Where the packet ends by its own length field; the frame may be longer: padding.
    #[must_use]
    pub fn packet_end(&self) -> Option<usize> {
        (self.packet_end != 0).then(|| usize::try_from(self.packet_end).unwrap_or(usize::MAX))
    }

    /// The transport's header.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport.decode()
    }

    /// The TCP header.
    #[inline]
    #[must_use]
    pub fn tcp(&self) -> Option<Tcp> {
        self.transport.is_tcp().then(|| self.transport.tcp())
    }

    /// The UDP header.
    #[inline]
    #[must_use]
    pub fn udp(&self) -> Option<Udp> {
        self.transport.is_udp().then(|| self.transport.udp())
    }

    /// The fragment's place in its packet, in units of 8 bytes.
    #[must_use]
    pub const fn fragment_offset(&self) -> u16 {
        self.fragment_offset
    }

    /// IPv4's ID, or that of IPv6's fragment header; else 0.
    #[must_use]
    pub const fn identification(&self) -> u32 {
        self.identification
    }

    /// IPv4's "don't fragment".
    #[must_use]
    pub const fn dont_fragment(&self) -> bool {
        self.dont_fragment
    }

    /// The packet's differentiated services code point, 0 to 63.
    #[must_use]
    pub const fn dscp(&self) -> u8 {
        // The 2 bits below it are ECN's.
        self.traffic_class.wrapping_shr(2)
    }

    /// IPv4's time to live, IPv6's hop limit.
    #[must_use]
    pub const fn hop_limit(&self) -> u8 {
        self.hop_limit
    }

    /// The IPv4 header with its options, cut from the bytes that were parsed: what
    /// [`net::ipv4_checksum_is_valid`] is asked about.
    #[must_use]
    pub fn ipv4_header<'a>(&self, prefix: &'a [u8]) -> Option<&'a [u8]> {
        if self.key.family() != Family::Ipv4 {
            return None;
        }
        let header = prefix.get(usize::from(self.l3_offset)..)?;
        header.get(..net::ipv4_header_length(*header.first()?))
    }

    /// What the frame's ARP packet says, read from the bytes that were parsed.
    #[must_use]
    pub fn arp(&self, prefix: &[u8]) -> Option<Arp> {
        if self.key.family() != Family::Arp {
            return None;
        }
        prefix.get(usize::from(self.l3_offset)..)?.first_chunk().map(Arp::decode)
    }
}

/// Headers live in a slot of the batch arena, one per frame: two cache lines.
const _: () = assert!(size_of::<Headers>() <= 128);
