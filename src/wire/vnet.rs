//! The virtio-net header (virtio 1.2 section 5.1.6): parsed, judged, and rebuilt from what was judged.
//!
//! ```text
//!  0       1          2         4          6            8             10            12   all little endian
//!  | flags | gso_type | hdr_len | gso_size | csum_start | csum_offset | num_buffers |
//! ```
//!
//! The header before a frame is a request to rewrite the frame: with `NEEDS_CSUM` the kernel sums everything
//! from `csum_start` to the end and stores two bytes at `csum_start + csum_offset`, wherever that is. A guest
//! can choose both and the payload, so it can turn an address or a port that was inspected into another one
//! behind the verdict's back. Therefore a guest's header is never passed on. [`check_transmit`] lets pass what
//! the driver negotiated and what fits the headers that were parsed, and makes a new header that says so.
//! [`check_receive`] does the same for frames from the tap, whose header the kernel wrote.
//!
//! Neither touches `num_buffers`: it is 0 in a header that was rebuilt.

use super::link::{ETHERNET_HEADER, VLAN_TAG};
use super::transport::{TCP_CHECKSUM_OFFSET, UDP_CHECKSUM_OFFSET};
use super::{Family, Fragment, Framing, Headers};
use virtio_bindings::virtio_net as spec;

/// The length of the header in bytes, with `num_buffers`.
pub const HEADER_LEN: usize = 12;

/// The smallest segment that a guest may ask for, in bytes. Linux doesn't believe a TCP peer that claims a
/// smaller maximum (`tcp_min_snd_mss`). A frame of 65,535 bytes then becomes at most 1,365 packets, where a size of
/// 1 would have the host make 65,000.
pub const MIN_GSO_SIZE: u16 = 48;

/// What the checksum field occupies.
const CHECKSUM_SIZE: usize = 2;

/// The header's flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u8);

impl Flags {
    /// The checksum is to be finished.
    pub const NEEDS_CSUM: Self = Self(byte(spec::VIRTIO_NET_HDR_F_NEEDS_CSUM));
    /// The checksum was found right.
    pub const DATA_VALID: Self = Self(byte(spec::VIRTIO_NET_HDR_F_DATA_VALID));

    /// Are all flags of `other` set?
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those flags that are set in `other`, too.
    const fn only(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// How a frame is to be cut into packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GsoType(u8);

impl GsoType {
    /// Not at all.
    pub const NONE: Self = Self(byte(spec::VIRTIO_NET_HDR_GSO_NONE));
    /// TCP over IPv4.
    pub const TCPV4: Self = Self(byte(spec::VIRTIO_NET_HDR_GSO_TCPV4));
    /// UDP into IPv4 fragments ("UFO"), which is never offered.
    pub const UDP: Self = Self(byte(spec::VIRTIO_NET_HDR_GSO_UDP));
    /// TCP over IPv6.
    pub const TCPV6: Self = Self(byte(spec::VIRTIO_NET_HDR_GSO_TCPV6));
    /// UDP into datagrams ("USO").
    pub const UDP_L4: Self = Self(byte(spec::VIRTIO_NET_HDR_GSO_UDP_L4));
    /// Added to a type of TCP: the first segment alone keeps CWR.
    const ECN: u8 = byte(spec::VIRTIO_NET_HDR_GSO_ECN);

    /// The type without the ECN bit.
    #[must_use]
    pub const fn without_ecn(self) -> Self {
        Self(self.0 & !Self::ECN)
    }

    /// The type with the ECN bit.
    #[must_use]
    pub const fn with_ecn(self) -> Self {
        Self(self.0 | Self::ECN)
    }

    /// Is the ECN bit set?
    #[must_use]
    pub const fn has_ecn(self) -> bool {
        self.0 & Self::ECN != 0
    }

    /// Does the type, apart from ECN, fit what was parsed? Nothing fits behind SNAP: the 802.3 length would be
    /// wrong in each packet.
    fn fits(self, headers: &Headers) -> bool {
        let family = headers.flow_key().family();
        if headers.flow_key().framing() != Framing::EthernetII {
            return false;
        }
        match self.without_ecn() {
            Self::TCPV4 => headers.tcp().is_some() && family == Family::Ipv4,
            Self::TCPV6 => headers.tcp().is_some() && family == Family::Ipv6,
            Self::UDP_L4 => headers.udp().is_some(),
            _ => false,
        }
    }
}

/// The constants of the specification that fill one byte of the header.
#[expect(
    clippy::cast_possible_truncation,
    reason = "evaluated at compile time: one that doesn't fit is an error"
)]
const fn byte(value: u32) -> u8 {
    assert!(value <= u8::MAX as u32);
    value as u8
}

/// A virtio-net header as it was found, or as it is to be written: `virtio_net_hdr_v1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// What about the checksum.
    pub flags: Flags,
    /// How the frame is to be cut into packets.
    pub gso_type: GsoType,
    /// The length of all headers; a hint.
    pub hdr_len: u16,
    /// The payload of each packet, in bytes.
    pub gso_size: u16,
    /// Where summing begins.
    pub csum_start: u16,
    /// Where the sum is stored, from `csum_start`.
    pub csum_offset: u16,
    /// Over how many of the driver's buffers a received frame is spread.
    pub num_buffers: u16,
}

impl VnetHeader {
    /// Reads a header.
    #[must_use]
    pub const fn decode(bytes: [u8; HEADER_LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = bytes;
        Self {
            flags: Flags(flags),
            gso_type: GsoType(gso_type),
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }

    /// Writes a header.
    #[must_use]
    pub const fn encode(self) -> [u8; HEADER_LEN] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [self.flags.0, self.gso_type.0, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1]
    }
}

/// The feature bits that the driver acknowledged, as far as they speak of offloads. `HOST_` bits are for what
/// the guest sends, `GUEST_` bits for what it gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NegotiatedOffloads(u64);

impl NegotiatedOffloads {
    const CSUM: u64 = feature(spec::VIRTIO_NET_F_CSUM);
    const HOST_TSO4: u64 = feature(spec::VIRTIO_NET_F_HOST_TSO4);
    const HOST_TSO6: u64 = feature(spec::VIRTIO_NET_F_HOST_TSO6);
    const HOST_ECN: u64 = feature(spec::VIRTIO_NET_F_HOST_ECN);
    const HOST_USO: u64 = feature(spec::VIRTIO_NET_F_HOST_USO);
    const GUEST_CSUM: u64 = feature(spec::VIRTIO_NET_F_GUEST_CSUM);
    const GUEST_TSO4: u64 = feature(spec::VIRTIO_NET_F_GUEST_TSO4);
    const GUEST_TSO6: u64 = feature(spec::VIRTIO_NET_F_GUEST_TSO6);
    const GUEST_ECN: u64 = feature(spec::VIRTIO_NET_F_GUEST_ECN);
    const GUEST_USO4: u64 = feature(spec::VIRTIO_NET_F_GUEST_USO4);
    const GUEST_USO6: u64 = feature(spec::VIRTIO_NET_F_GUEST_USO6);

    /// Of all features that the driver acknowledged. `HOST_UFO` and `GUEST_UFO` count for nothing: they are
    /// never offered.
    #[must_use]
    pub const fn from_features(acknowledged: u64) -> Self {
        Self(acknowledged)
    }

    const fn has(self, feature: u64) -> Result<(), OffloadFault> {
        if self.0 & feature == 0 { Err(OffloadFault::NotNegotiated) } else { Ok(()) }
    }

    fn may_send(self, gso: GsoType) -> Result<(), OffloadFault> {
        match gso.without_ecn() {
            GsoType::NONE => Ok(()),
            GsoType::TCPV4 => self.has(Self::HOST_TSO4),
            GsoType::TCPV6 => self.has(Self::HOST_TSO6),
            GsoType::UDP_L4 => self.has(Self::HOST_USO),
            _ => Err(OffloadFault::NotNegotiated),
        }
    }

    fn may_get(self, gso: GsoType, family: Family) -> Result<(), OffloadFault> {
        match gso.without_ecn() {
            GsoType::NONE => Ok(()),
            GsoType::TCPV4 => self.has(Self::GUEST_TSO4),
            GsoType::TCPV6 => self.has(Self::GUEST_TSO6),
            // One type for both families. The driver's two bits say which it can take.
            GsoType::UDP_L4 if family == Family::Ipv6 => self.has(Self::GUEST_USO6),
            GsoType::UDP_L4 => self.has(Self::GUEST_USO4),
            _ => Err(OffloadFault::NotNegotiated),
        }
    }
}

const fn feature(bit: u32) -> u64 {
    1u64.wrapping_shl(bit)
}

/// Why a frame's virtio-net header was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffloadFault {
    /// It asks for, or brings, an offload that the driver didn't acknowledge.
    NotNegotiated,
    /// It doesn't fit the frame.
    BadOffload(BadOffload),
}

/// How a virtio-net header can fail to fit its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadOffload {
    /// A checksum to be finished in a frame that has no TCP or UDP header that could be parsed.
    ChecksumOfUnparsed,
    /// A checksum to be finished in a fragment, where it can't be right.
    ChecksumOfFragment,
    /// Summing wouldn't begin at the TCP or UDP header.
    ChecksumStart,
    /// The sum wouldn't be stored in the checksum field.
    ChecksumOffset,
    /// A checksum beyond the frame's end.
    ChecksumOutside,
    /// To be cut into packets whose checksums nobody would finish (virtio 1.2 section 5.1.6.2).
    GsoWithoutChecksum,
    /// To be cut in a way that isn't its protocol's.
    GsoProtocol,
    /// To be cut into pieces of less than [`MIN_GSO_SIZE`]; from the kernel, of 0.
    GsoSize,
    /// To be cut, but there is no payload.
    GsoWithoutPayload,
    /// To be cut, but there are bytes behind the packet: padding, which would be cut as if it were payload.
    GsoWithPadding,
    /// The ECN bit on something that isn't TCP.
    EcnWithoutTcp,
}

impl From<BadOffload> for OffloadFault {
    fn from(bad: BadOffload) -> Self {
        Self::BadOffload(bad)
    }
}

/// A frame's size in every unit. With L the frame's length without the virtio-net header, H the length of its
/// headers and P = L - H:
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// What it is on a wire: with segmentation `max(1, ceil(P / gso_size))`, else 1.
    pub packets: u64,
    /// L.
    pub bytes: u64,
    /// What these packets have together, since each has headers of its own: `L + (packets - 1) * H`.
    pub wire_bytes: u64,
}

impl Size {
    fn of(len: usize, segmentation: Option<Segmentation>) -> Self {
        let bytes = len as u64;
        let Some(Segmentation { headers, size }) = segmentation else {
            return Self { packets: 1, bytes, wire_bytes: bytes };
        };
        let headers = headers as u64;
        let payload = bytes.saturating_sub(headers);
        let packets = payload.div_ceil(u64::from(size).max(1)).max(1);
        let wire_bytes = bytes.saturating_add(packets.saturating_sub(1).saturating_mul(headers));
        Self { packets, bytes, wire_bytes }
    }
}

/// What a frame is cut by: packets with `headers` bytes of headers and at most `size` bytes of payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segmentation {
    headers: usize,
    size: u16,
}

/// A virtio-net header that was judged and rebuilt, with the frame's size. Only [`check_transmit`] and
/// [`check_receive`] make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    header: VnetHeader,
    size: Size,
    segmentation: Option<Segmentation>,
}

impl Checked {
    fn new(header: VnetHeader, len: usize, segmentation: Option<Segmentation>) -> Self {
        Self { header, size: Size::of(len, segmentation), segmentation }
    }

    /// The header that was rebuilt.
    #[must_use]
    pub const fn header(&self) -> VnetHeader {
        self.header
    }

    /// The frame's size.
    #[must_use]
    pub const fn size(&self) -> Size {
        self.size
    }

    /// Are its packets no longer than a link of this MTU carries? The MTU counts what is behind the Ethernet
    /// header and up to two VLAN tags.
    #[must_use]
    pub fn fits_mtu(&self, headers: &Headers, len: usize, mtu: u16) -> bool {
        let longest = match self.segmentation {
            None => len,
            Some(Segmentation { headers, size }) => headers.saturating_add(usize::from(size)),
        };
        let without_tags = usize::from(mtu).saturating_add(usize::from(ETHERNET_HEADER));
        longest <= without_tags || {
            let tags = headers.flow_key().vlan_ids().into_iter().flatten().count();
            longest <= without_tags.saturating_add(tags.saturating_mul(usize::from(VLAN_TAG)))
        }
    }
}

/// Judges the header of a frame of `len` bytes that the guest sends.
///
/// # Errors
/// What the driver didn't negotiate, and what doesn't fit the frame.
#[inline]
pub fn check_transmit(
    header: VnetHeader,
    headers: &Headers,
    len: usize,
    negotiated: NegotiatedOffloads,
) -> Result<Checked, OffloadFault> {
    let mut rebuilt = VnetHeader::default();
    let needs_checksum = header.flags.contains(Flags::NEEDS_CSUM);
    if !needs_checksum && header.gso_type == GsoType::NONE {
        return Ok(Checked::new(rebuilt, len, None));
    }
    if needs_checksum {
        negotiated.has(NegotiatedOffloads::CSUM)?;
    }
    negotiated.may_send(header.gso_type)?;
    check_ecn(header.gso_type, NegotiatedOffloads::HOST_ECN, negotiated)?;
    if needs_checksum {
        let (start, offset) = checksum_place(headers)?;
        if header.csum_start != start {
            return Err(BadOffload::ChecksumStart.into());
        }
        if header.csum_offset != offset {
            return Err(BadOffload::ChecksumOffset.into());
        }
        rebuilt.flags = Flags::NEEDS_CSUM;
        rebuilt.csum_start = start;
        rebuilt.csum_offset = offset;
    }
    if header.gso_type == GsoType::NONE {
        return Ok(Checked::new(rebuilt, len, None));
    }
    if !needs_checksum {
        return Err(BadOffload::GsoWithoutChecksum.into());
    }
    let segmentation = sent_segmentation(header, headers, len)?;
    rebuilt.gso_type = header.gso_type;
    rebuilt.gso_size = segmentation.size;
    rebuilt.hdr_len = length(segmentation.headers);
    Ok(Checked::new(rebuilt, len, Some(segmentation)))
}

fn check_ecn(gso: GsoType, feature: u64, negotiated: NegotiatedOffloads) -> Result<(), OffloadFault> {
    if !gso.has_ecn() {
        return Ok(());
    }
    if !matches!(gso.without_ecn(), GsoType::TCPV4 | GsoType::TCPV6) {
        return Err(BadOffload::EcnWithoutTcp.into());
    }
    negotiated.has(feature)
}

/// The only `csum_start` and `csum_offset` that a frame may have: the start of its TCP or UDP header, and the
/// checksum field in that.
fn checksum_place(headers: &Headers) -> Result<(u16, u16), BadOffload> {
    if headers.flow_key().fragment() != Fragment::Whole {
        return Err(BadOffload::ChecksumOfFragment);
    }
    let offset = match (headers.tcp(), headers.udp()) {
        (Some(_), _) => TCP_CHECKSUM_OFFSET,
        (_, Some(_)) => UDP_CHECKSUM_OFFSET,
        _ => return Err(BadOffload::ChecksumOfUnparsed),
    };
    let start = headers.l4_offset().ok_or(BadOffload::ChecksumOfUnparsed)?;
    Ok((length(start), offset))
}

/// What a guest's frame, whose type was negotiated and whose checksum is to be finished, is cut by.
fn sent_segmentation(header: VnetHeader, headers: &Headers, len: usize) -> Result<Segmentation, BadOffload> {
    if !header.gso_type.fits(headers) {
        return Err(BadOffload::GsoProtocol);
    }
    if header.gso_size < MIN_GSO_SIZE {
        return Err(BadOffload::GsoSize);
    }
    let all_headers = headers.payload_offset().ok_or(BadOffload::GsoProtocol)?;
    if len <= all_headers {
        return Err(BadOffload::GsoWithoutPayload);
    }
    if headers.packet_end() != Some(len) {
        return Err(BadOffload::GsoWithPadding);
    }
    Ok(Segmentation { headers: all_headers, size: header.gso_size })
}

/// A length of headers: all that is parsed lies in the first [`super::PREFIX`] bytes and the options behind.
fn length(headers: usize) -> u16 {
    u16::try_from(headers).unwrap_or(u16::MAX)
}

/// Judges the header of a frame of `len` bytes that the kernel gave us for the guest.
///
/// The kernel may say `DATA_VALID` whatever offloads the tap was told: it is a remark on the frame, not an
/// offload. It is kept for a driver that acknowledged `GUEST_CSUM`, and cleared for others (virtio 1.2 section
/// 5.1.6.4.1).
///
/// # Errors
/// What the driver didn't negotiate, and what doesn't fit the frame.
#[inline]
pub fn check_receive(
    header: VnetHeader,
    headers: &Headers,
    len: usize,
    negotiated: NegotiatedOffloads,
) -> Result<Checked, OffloadFault> {
    let mut rebuilt = VnetHeader::default();
    let takes_partial = negotiated.has(NegotiatedOffloads::GUEST_CSUM);
    if takes_partial.is_ok() {
        rebuilt.flags = header.flags.only(Flags::DATA_VALID);
    }
    if header.flags.contains(Flags::NEEDS_CSUM) {
        takes_partial?;
        let field = usize::from(header.csum_start).saturating_add(usize::from(header.csum_offset));
        if field.saturating_add(CHECKSUM_SIZE) > len {
            return Err(BadOffload::ChecksumOutside.into());
        }
        rebuilt.flags = rebuilt.flags.with(Flags::NEEDS_CSUM);
        rebuilt.csum_start = header.csum_start;
        rebuilt.csum_offset = header.csum_offset;
    }
    negotiated.may_get(header.gso_type, headers.flow_key().family())?;
    check_ecn(header.gso_type, NegotiatedOffloads::GUEST_ECN, negotiated)?;
    if header.gso_type == GsoType::NONE {
        return Ok(Checked::new(rebuilt, len, None));
    }
    if header.gso_size == 0 {
        return Err(BadOffload::GsoSize.into());
    }
    let segmentation = Segmentation { headers: got_headers(header, headers, len), size: header.gso_size };
    rebuilt.gso_type = header.gso_type;
    rebuilt.gso_size = segmentation.size;
    rebuilt.hdr_len = length(segmentation.headers);
    Ok(Checked::new(rebuilt, len, Some(segmentation)))
}

/// H of a frame that the kernel cuts, or would: what was parsed, if that is the header that the kernel means
/// (within a tunnel it isn't), else the kernel's hint.
fn got_headers(header: VnetHeader, headers: &Headers, len: usize) -> usize {
    let is_meant = header.gso_type.fits(headers)
        && (!header.flags.contains(Flags::NEEDS_CSUM)
            || headers.l4_offset() == Some(usize::from(header.csum_start)));
    let parsed = headers.payload_offset().filter(|_| is_meant);
    parsed.unwrap_or(usize::from(header.hdr_len)).min(len)
}
