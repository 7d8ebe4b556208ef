//! Frames that could be segments of one longer frame: which of them the kernel gives back, byte for byte, when
//! they are written to the tap as one frame that it is to cut (GSO), and what that frame's headers are.
//!
//! ```text
//!   headers | payload 0 |      headers | payload 1 |      headers | payload 2 |        what the guest sent
//!   headers of frame 0, lengths for all | payload 0 | payload 1 | payload 2 |          one frame for the kernel
//! ```
//! The kernel copies the headers before each piece, counts IPv4's ID and TCP's sequence number on, keeps PSH and
//! FIN for the last piece, and computes each length and checksum. So a frame follows another one only if it
//! differs from it in these fields alone, in just this way, and only if its checksums are what the kernel will
//! compute: a wrong checksum stays wrong, and its frame alone. IPv4's ID may be anything where DF is set: it has no
//! meaning there (RFC 6864 section 4.1).
//!
//! IPv4 options and IPv6 extension headers are not for segments here.

use super::{
    Family, Fragment, Framing, Headers, TcpFlags,
    net::{IPV4_HEADER, IPV6_HEADER, protocol},
    transport::{TCP_CHECKSUM_OFFSET, UDP_CHECKSUM_OFFSET},
    vnet::{Flags, GsoType, VnetHeader},
};

/// Longest IP packet in bytes: what its 16 bits of length can say.
const PACKET_MAX: usize = 65_535;

/// Where a frame's parts are, if it could be a segment of a longer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// How the longer frame is cut: its protocol and family.
    gso_type: GsoType,
    l3: u16,
    l4: u16,
    /// H in bytes.
    headers: u16,
    payload: u16,
    /// The checksum is to be finished by the kernel.
    offloaded: bool,
    /// TCP with PSH or FIN: nothing may follow.
    is_last: bool,
}

impl Segment {
    /// What a frame of `len` bytes, with a virtio-net header that was judged, would be as a segment. Nothing if
    /// it can never be one.
    #[must_use]
    pub fn of(headers: &Headers, header: VnetHeader, len: usize) -> Option<Self> {
        let all_headers = headers.payload_offset()?;
        let (l3, l4) = (headers.l3_offset()?, headers.l4_offset()?);
        let payload = len.checked_sub(all_headers)?;
        let key = headers.flow_key();
        let whole = header.gso_type == GsoType::NONE
            && headers.packet_end() == Some(len)
            && key.framing() == Framing::EthernetII
            && key.fragment() == Fragment::Whole;
        let ip_header = match key.family() {
            Family::Ipv4 => IPV4_HEADER,
            Family::Ipv6 => IPV6_HEADER,
            _ => return None,
        };
        if !whole || payload == 0 || l4.wrapping_sub(l3) != ip_header {
            return None;
        }
        let offloaded = header.flags.contains(Flags::NEEDS_CSUM);
        // All that is parsed lies in the first 256 bytes and TCP's options behind, and a packet has 16 bits of length.
        let short = |n| u16::try_from(n).ok();
        let (l3, l4, all_headers, payload) = (short(l3)?, short(l4)?, short(all_headers)?, short(payload)?);
        let segment =
            |gso_type, is_last| Self { gso_type, l3, l4, headers: all_headers, payload, offloaded, is_last };
        if let Some(tcp) = headers.tcp() {
            const NEVER: TcpFlags = TcpFlags::SYN.with(TcpFlags::RST).with(TcpFlags::URG).with(TcpFlags::CWR);
            const LAST: TcpFlags = TcpFlags::PSH.with(TcpFlags::FIN);
            let gso_type = if ip_header == IPV4_HEADER { GsoType::TCPV4 } else { GsoType::TCPV6 };
            return (!tcp.flags.intersects(NEVER)).then(|| segment(gso_type, tcp.flags.intersects(LAST)));
        }
        let udp = headers.udp()?;
        let fills_the_packet = usize::from(udp.length) == len.wrapping_sub(l4.into());
        (udp.has_checksum && fills_the_packet).then(|| segment(GsoType::UDP_L4, false))
    }

    /// True for UDP, whose cutting (USO) not every kernel knows.
    #[must_use]
    pub fn is_udp(&self) -> bool {
        self.gso_type == GsoType::UDP_L4
    }

    /// H: the length of all headers in bytes.
    #[must_use]
    pub const fn headers(&self) -> usize {
        self.headers as usize
    }

    /// Bytes behind the headers.
    #[must_use]
    pub const fn payload(&self) -> usize {
        self.payload as usize
    }

    const fn l3(&self) -> usize {
        self.l3 as usize
    }

    const fn l4(&self) -> usize {
        self.l4 as usize
    }

    /// True if the checksums in a frame are what the kernel computes for a segment; of one that is to be
    /// finished, if it can be. `frame` is the whole frame.
    #[must_use]
    pub fn has_right_checksums(&self, frame: &[u8]) -> bool {
        frame.get(self.headers()..).is_some_and(|payload| self.has_right_checksums_with(frame, payload))
    }

    /// As [`Self::has_right_checksums`], with headers and payload in different places.
    #[must_use]
    pub fn has_right_checksums_with(&self, headers: &[u8], payload: &[u8]) -> bool {
        let field = self.checksum_field(headers);
        let right = if self.offloaded {
            // The field holds the pseudo header's sum, to which the kernel adds the rest.
            field == Some(fold(self.pseudo_sum(headers, payload.len())).to_le_bytes())
        } else {
            let all = self
                .sum_of_addresses_and_header(headers)
                .wrapping_add(sum(payload))
                .wrapping_add(self.protocol_and_length(payload.len()));
            fold(all) == 0xffff && (self.is_udp() || field != Some([0xff, 0xff]))
        };
        right && (self.is_ipv6() || self.has_right_ipv4_checksum(headers))
    }

    /// The addresses are right before the transport's header, and together they have an even length, so that the
    /// payload's words are the packet's.
    fn sum_of_addresses_and_header(&self, headers: &[u8]) -> u64 {
        let bytes = headers.get(self.addresses()..self.headers()).unwrap_or_default();
        // IPv4 and UDP: a length that is known when this is compiled.
        <&[u8; 16]>::try_from(bytes).map_or_else(|_| sum_of_words(bytes), |bytes| sum_of_words(bytes))
    }

    /// The header's sum is right, and written as the kernel writes it: never 0xffff, which would stand for 0 too.
    fn has_right_ipv4_checksum(&self, headers: &[u8]) -> bool {
        let header = headers.get(self.l3()..).and_then(<[u8]>::first_chunk::<IPV4_HEADER>);
        header.is_some_and(|header| {
            fold(sum_of_words(header)) == 0xffff && header.get(10..12) != Some(&[0xff, 0xff])
        })
    }

    fn checksum_field(&self, headers: &[u8]) -> Option<[u8; 2]> {
        let place = self.l4().wrapping_add(usize::from(self.checksum_offset()));
        headers.get(place..)?.first_chunk().copied()
    }

    fn checksum_offset(&self) -> u16 {
        if self.is_udp() { UDP_CHECKSUM_OFFSET } else { TCP_CHECKSUM_OFFSET }
    }

    const fn is_ipv6(&self) -> bool {
        self.l4.wrapping_sub(self.l3) as usize == IPV6_HEADER
    }

    /// Where the IP addresses begin: they end where the transport's header begins.
    const fn addresses(&self) -> usize {
        self.l3().wrapping_add(if self.is_ipv6() { 8 } else { 12 })
    }

    /// The sum of the pseudo header (RFC 9293 section 3.1, RFC 768, RFC 8200 section 8.1) of a packet with so
    /// many bytes of payload.
    fn pseudo_sum(&self, headers: &[u8], payload: usize) -> u64 {
        let addresses = headers.get(self.addresses()..self.l4()).unwrap_or_default();
        sum_of_words(addresses).wrapping_add(self.protocol_and_length(payload))
    }

    /// What the pseudo header has beside the addresses.
    fn protocol_and_length(&self, payload: usize) -> u64 {
        let protocol = if self.is_udp() { protocol::UDP } else { protocol::TCP };
        let transport = self.headers().wrapping_sub(self.l4()).wrapping_add(payload);
        let words = [[0, protocol], be(transport)].map(u16::from_le_bytes);
        words.into_iter().fold(0, |sum, word| sum.wrapping_add(word.into()))
    }
}

/// The beginning of a frame: all headers that a segment can have, which are at most 14 + 2 * 4 + 40 + 60 bytes.
/// What is behind the headers is not looked at.
pub type Window = [u8; 128];

/// Segments that were put together: the first one's place and how much followed.
#[derive(Clone, Copy, Debug)]
pub struct Train {
    lead: Segment,
    /// TCP's flags of the last one: PSH and FIN are only there.
    last_flags: u8,
    segments: usize,
    /// Bytes of payload so far.
    payload: usize,
    /// Nothing may follow: the last one was shorter, or ended the stream.
    is_closed: bool,
}

/// Fields of the IPv4 header and the ports behind it that a following segment has in common with the first:
/// all but total length, ID and checksum. Then those of IPv6 (all but the payload length), and of TCP behind
/// the sequence number (all but PSH, FIN and the checksum).
const IPV4_SAME: [[u8; 8]; 3] =
    [[255, 255, 0, 0, 0, 0, 255, 255], [255, 255, 0, 0, 255, 255, 255, 255], [255; 8]];
const IPV6_SAME: [[u8; 8]; 6] = [
    [255, 255, 255, 255, 0, 0, 255, 255],
    [255; 8],
    [255; 8],
    [255; 8],
    [255; 8],
    [255, 255, 255, 255, 0, 0, 0, 0],
];
const TCP_SAME: [[u8; 8]; 1] = [[255, 255, 255, 255, 255, 0xf6, 255, 255]];

impl Train {
    /// Begins with this one.
    #[must_use]
    pub const fn new(lead: Segment) -> Self {
        Self { lead, last_flags: 0, segments: 1, payload: lead.payload as usize, is_closed: lead.is_last }
    }

    /// The first segment.
    #[must_use]
    pub const fn lead(&self) -> &Segment {
        &self.lead
    }

    /// True if `next` is the segment that follows, by its headers: its checksums are another question.
    /// `first` and `frame` begin with the headers of the first frame and of this one.
    #[must_use]
    #[inline]
    pub fn is_followed_by(&self, next: &Segment, first: &Window, frame: &Window) -> bool {
        let lead = &self.lead;
        let alike = !self.is_closed
            && (next.gso_type, next.l3, next.headers) == (lead.gso_type, lead.l3, lead.headers)
            && next.payload <= lead.payload;
        let packet =
            lead.headers().wrapping_sub(lead.l3()).wrapping_add(self.payload).wrapping_add(next.payload());
        // The places are known when this is compiled, so that nothing is left of looking whether they are inside.
        alike
            && packet <= PACKET_MAX
            && match (lead.l3(), lead.is_ipv6()) {
                (14, false) => self.continues(first, frame, 14, IPV4_HEADER),
                (14, true) => self.continues(first, frame, 14, IPV6_HEADER),
                (18, false) => self.continues(first, frame, 18, IPV4_HEADER),
                (18, true) => self.continues(first, frame, 18, IPV6_HEADER),
                (22, false) => self.continues(first, frame, 22, IPV4_HEADER),
                (22, true) => self.continues(first, frame, 22, IPV6_HEADER),
                _ => false,
            }
    }

    #[expect(clippy::inline_always, reason = "the places are constants then")]
    #[inline(always)]
    fn continues(&self, first: &Window, frame: &Window, l3: usize, ip_header: usize) -> bool {
        let l4 = l3.wrapping_add(ip_header);
        // Ports and the end of the destination's address first: most frames that don't follow differ there.
        differs(first, frame, l4.wrapping_sub(4)) == 0
            && (self.lead.is_udp() || self.continues_tcp(first, frame, l4))
            && differs(first, frame, 0) | differs(first, frame, 6) | differs(first, frame, l3.wrapping_sub(8))
                == 0
            && if ip_header == IPV6_HEADER {
                same(first, frame, l3, &IPV6_SAME)
            } else {
                self.continues_ipv4(first, frame, l3)
            }
    }

    #[expect(clippy::inline_always, reason = "the place is a constant then")]
    #[inline(always)]
    fn continues_ipv4(&self, first: &Window, frame: &Window, l3: usize) -> bool {
        let id = |bytes| number::<2>(bytes, l3.wrapping_add(4)).map(u16::from_be_bytes);
        let dont_fragment = number::<1>(first, l3.wrapping_add(6)).is_some_and(|[flags]| flags & 0x40 != 0);
        let counted = || {
            let on = u16::try_from(self.segments).ok()?;
            Some(id(first)?.wrapping_add(on) == id(frame)?)
        };
        same(first, frame, l3, &IPV4_SAME) && (dont_fragment || counted() == Some(true))
    }

    #[expect(clippy::inline_always, reason = "the place is a constant then")]
    #[inline(always)]
    fn continues_tcp(&self, first: &Window, frame: &Window, l4: usize) -> bool {
        let sequence = |bytes| number::<4>(bytes, l4.wrapping_add(4)).map(u32::from_be_bytes);
        let counted = || {
            let on = u32::try_from(self.payload).ok()?;
            Some(sequence(first)?.wrapping_add(on) == sequence(frame)?)
        };
        let rest = l4.wrapping_add(18)..self.lead.headers();
        counted() == Some(true)
            && same(first, frame, l4.wrapping_add(8), &TCP_SAME)
            && first
                .get(rest.clone())
                .is_some_and(|urgent_and_options| frame.get(rest) == Some(urgent_and_options))
    }

    /// Takes `next` in, whose headers are at the beginning of `frame`.
    pub fn add(&mut self, next: &Segment, frame: &Window) {
        self.segments = self.segments.wrapping_add(1);
        self.payload = self.payload.wrapping_add(next.payload());
        self.is_closed = next.is_last || next.payload() < self.lead.payload();
        self.last_flags = frame.get(self.lead.l4().wrapping_add(13)).copied().unwrap_or_default();
    }

    /// Makes the first frame's headers those of the whole; gives the virtio-net header that tells the kernel how
    /// to cut it.
    #[must_use]
    pub fn finish(&self, first: &mut [u8]) -> VnetHeader {
        let lead = &self.lead;
        let (l3, l4, headers) = (lead.l3(), lead.l4(), lead.headers());
        let transport = headers.wrapping_sub(l4).wrapping_add(self.payload);
        if self.lead.is_ipv6() {
            put(first, l3.wrapping_add(4), be(transport));
        } else {
            put(first, l3.wrapping_add(2), be(transport.wrapping_add(IPV4_HEADER)));
            put(first, l3.wrapping_add(10), [0, 0]);
            let checksum = !fold(sum_of_words(first.get(l3..l4).unwrap_or_default()));
            put(first, l3.wrapping_add(10), checksum.to_le_bytes());
        }
        if self.lead.is_udp() {
            put(first, l4.wrapping_add(4), be(transport));
        } else {
            put(first, l4.wrapping_add(13), [self.last_flags]);
        }
        let csum_offset = self.lead.checksum_offset();
        let pseudo = fold(self.lead.pseudo_sum(first, self.payload));
        put(first, l4.wrapping_add(csum_offset.into()), pseudo.to_le_bytes());
        VnetHeader {
            flags: Flags::NEEDS_CSUM,
            gso_type: lead.gso_type,
            hdr_len: lead.headers,
            gso_size: lead.payload,
            csum_start: lead.l4,
            csum_offset,
            num_buffers: 0,
        }
    }
}

/// The `N` bytes at a place.
#[inline]
fn number<const N: usize>(bytes: &Window, at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// In which bits eight bytes at a place differ; in all, if they are not there.
#[inline]
fn differs(a: &Window, b: &Window, at: usize) -> u64 {
    match (number(a, at), number(b, at)) {
        (Some(a), Some(b)) => u64::from_ne_bytes(a) ^ u64::from_ne_bytes(b),
        _ => u64::MAX,
    }
}

/// True if the bits that `masks` names are the same from a place on.
#[inline]
fn same<const N: usize>(a: &Window, b: &Window, from: usize, masks: &[[u8; 8]; N]) -> bool {
    let places = (from..).step_by(8);
    let differences =
        masks.iter().zip(places).map(|(mask, at)| differs(a, b, at) & u64::from_ne_bytes(*mask));
    differences.fold(0, |all, one| all | one) == 0
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(place) = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        *place = value;
    }
}

fn be(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

/// The sum of a packet's words of 16 bits, an odd byte at the end filled up with 0 (RFC 1071). The words are taken
/// as little-endian ones: the sum is the same but for the order of its bytes, so it is stored in that order too.
#[inline]
fn sum(bytes: &[u8]) -> u64 {
    /// Fewer bytes than this are summed word by word: summing several at once has to pay for its beginning.
    const FEW: usize = 64;
    let (words, rest) = if bytes.len() < FEW { (&[][..], bytes) } else { bytes.as_chunks::<8>() };
    let halves = words.iter().fold(0_u64, |sum, word| {
        let word = u64::from_le_bytes(*word);
        sum.wrapping_add(word & 0xffff_ffff).wrapping_add(word.wrapping_shr(32))
    });
    let (words, last) = rest.split_at(rest.len() & !3);
    let last = last.iter().rev().fold(0, |sum: u64, byte| sum.wrapping_shl(8) | u64::from(*byte));
    halves.wrapping_add(last).wrapping_add(sum_of_words(words))
}

/// The same for whole words of 4 bytes, and few of them.
#[inline]
fn sum_of_words(mut bytes: &[u8]) -> u64 {
    let mut sum = 0_u64;
    while let Some((word, rest)) = bytes.split_first_chunk() {
        sum = sum.wrapping_add(u32::from_le_bytes(*word).into());
        bytes = rest;
    }
    sum
}

/// Brings a sum into 16 bits, adding each carry again.
#[inline]
fn fold(sum: u64) -> u16 {
    let halves = (sum & 0xffff_ffff).wrapping_add(sum.wrapping_shr(32));
    let once = |n: u64| (n & 0xffff).wrapping_add(n.wrapping_shr(16));
    // 33 bits, then 18, 17 and 16.
    let [low, high, ..] = once(once(once(halves))).to_le_bytes();
    u16::from_le_bytes([low, high])
}
