//! A frame by its fields, each of which may be wrong, and its bytes. Written from the RFCs and by hand: nothing of
//! the program under test is used, so that it can be found wrong.

use vmflow_driver::{
    frame::{pattern, sum},
    vnet::{VnetHeader, flag, gso},
};

/// MAC addresses of destination and source. No single bit makes one of them the other, or a group of a bridge's.
const MACS: [[u8; 6]; 2] = [[0x52, 0x54, 0x0a, 0x0b, 0x0c, 0x0d], [0x52, 0x54, 0xf1, 0xf2, 0xf3, 0xf4]];
/// Bytes of both, before tags and `EtherType`.
const BOTH_MACS: usize = 12;

/// The IPv4 flag "don't fragment", where fragment offsets are.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// The IPv4 flag "more fragments".
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// TCP's flags.
pub const FIN: u8 = 1;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;
pub const CWR: u8 = 128;

/// IP protocols.
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// What is in the transport's checksum field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// The right one.
    Right,
    /// The right one with some bits changed.
    Wrong(u16),
    /// Zero: over IPv4 UDP has none then.
    Zero,
    /// All ones: wrong, but where the right one is zero it means the same.
    Ones,
    /// The pseudo header's, to be finished (`NEEDS_CSUM`), with some bits changed: 0 = right.
    Unfinished(u16),
}

/// What is in the IPv4 header's checksum field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpSum {
    /// The right one.
    Right,
    /// The right one with some bits changed.
    Wrong(u16),
    /// The ID is such that the right one is zero, and there are all ones instead, which mean the same.
    Ones,
}

/// A frame by its fields. What a field does not exist for in the frame's protocols is not looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Distinguishes flows: part of the source port.
    pub flow: u8,
    /// VLAN tags, the outermost first: `EtherType` and the rest.
    pub tags: Vec<(u16, u16)>,
    pub v6: bool,
    pub protocol: u8,
    /// IPv4's type of service, IPv6's traffic class.
    pub tos: u8,
    pub hops: u8,
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Words of IPv4 options.
    pub ip_options: u8,
    /// IPv6's flow label.
    pub label: u32,
    /// An IPv6 extension header (hop by hop) stands before the transport's.
    pub extension: bool,
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    /// The low four bits beside TCP's header length.
    pub reserved: u8,
    pub window: u16,
    pub urgent: u16,
    /// TCP's options, in whole words.
    pub options: Vec<u8>,
    /// Bytes of payload.
    pub payload: usize,
    /// What is in it.
    pub number: u64,
    /// The payload is such that the transport's right checksum is zero.
    pub sums_to_zero: bool,
    pub sum: Sum,
    pub ip_sum: IpSum,
    /// Bytes behind the IP packet.
    pub padding: usize,
    /// Added to the length that the IP header tells.
    pub ip_length: u16,
    /// Added to the length that the UDP header tells.
    pub udp_length: u16,
    /// To be cut by the kernel into packets of so much payload (a GSO frame); it is `Unfinished` then.
    pub gso_size: Option<u16>,
}

/// What the guest sends: bytes, and the header before them.
#[derive(Clone, Debug)]
pub struct Sent {
    pub header: VnetHeader,
    pub bytes: Vec<u8>,
    /// It may be refused: its offload does not fit what it has become.
    pub may_be_refused: bool,
}

/// Where things are in a frame.
#[derive(Clone, Copy, Debug)]
struct Places {
    ip: usize,
    l4: usize,
    payload: usize,
    /// Behind the IP packet.
    end: usize,
}

impl Spec {
    /// A frame of UDP or TCP over IPv4 or IPv6 with nothing unusual.
    pub fn plain(protocol: u8, v6: bool, payload: usize) -> Self {
        Self {
            flow: 0,
            tags: Vec::new(),
            v6,
            protocol,
            tos: 0,
            hops: 64,
            id: 0x1234,
            fragment: 0,
            ip_options: 0,
            label: 0,
            extension: false,
            sequence: 0x1000_0000,
            acknowledged: 0x2000_0000,
            flags: ACK,
            reserved: 0,
            window: 500,
            urgent: 0,
            options: Vec::new(),
            payload,
            number: 0,
            sums_to_zero: false,
            sum: Sum::Right,
            ip_sum: IpSum::Right,
            padding: 0,
            ip_length: 0,
            udp_length: 0,
            gso_size: None,
        }
    }

    pub fn is_unfinished(&self) -> bool {
        matches!(self.sum, Sum::Unfinished(_))
    }

    /// The frame.
    pub fn sent(&self) -> Sent {
        let places = self.places();
        let mut bytes = [MACS.as_flattened(), &self.tag_bytes(), &self.ethertype().to_be_bytes()].concat();
        bytes.extend(self.ip_header(places));
        bytes.extend(self.l4_header());
        // The number shows in a payload of one byte already.
        bytes.extend(pattern(self.payload, self.number.wrapping_mul(0x0101_0101_0101_0101)));
        self.finish_transport(&mut bytes, places);
        bytes.extend((1..=u8::MAX).cycle().take(self.padding));
        Sent { header: self.header(places), bytes, may_be_refused: self.may_be_refused() }
    }

    /// The frame with the bits of one byte changed; `repaired`: with the checksums that it should then have, if the
    /// byte is not in one.
    pub fn with_changed(&self, place: usize, bits: u8, repaired: bool) -> Sent {
        let (places, mut frame) = (self.places(), self.sent());
        let network = places.ip + 10;
        let transport = places.l4 + if self.protocol == TCP { 16 } else { 6 };
        let in_sum = |field: usize| (field..field + 2).contains(&place);
        frame.bytes[place] ^= bits;
        if repaired && !self.v6 && !in_sum(network) {
            frame.bytes[network..network + 2].fill(0);
            let told = !sum(&frame.bytes[places.ip..places.l4]);
            frame.bytes[network..network + 2].copy_from_slice(&told.to_be_bytes());
        }
        if repaired && !in_sum(transport) {
            frame.bytes[transport..transport + 2].fill(0);
            self.finish_transport(&mut frame.bytes, places);
        }
        frame.may_be_refused |= self.is_unfinished() && (BOTH_MACS..places.payload).contains(&place);
        frame
    }

    /// The ID with which the IPv4 header's right checksum is zero.
    pub fn id_for_zero(&self) -> u16 {
        let places = self.places();
        let frame = Self { ip_sum: IpSum::Ones, ..self.clone() }.sent();
        u16::from_be_bytes([frame.bytes[places.ip + 4], frame.bytes[places.ip + 5]])
    }

    /// Bytes of all headers.
    pub fn headers(&self) -> usize {
        self.places().payload
    }

    /// May its offload be refused, as it does not fit what the frame has become?
    pub fn may_be_refused(&self) -> bool {
        let usual = (self.protocol == TCP || self.protocol == UDP)
            && (self.v6 || self.fragment & !DONT_FRAGMENT == 0)
            && (self.gso_size.is_none() || self.padding == 0)
            && self.tags.len() <= 2
            && (self.ip_length, self.udp_length) == (0, 0);
        self.is_unfinished() && !usual
    }

    fn places(&self) -> Places {
        let ip = BOTH_MACS + 4 * self.tags.len() + 2;
        let l4 = ip
            + if self.v6 {
                40 + 8 * usize::from(self.extension)
            } else {
                20 + 4 * usize::from(self.ip_options)
            };
        let payload = l4
            + match self.protocol {
                TCP => 20 + self.options.len(),
                UDP => 8,
                _ => 0,
            };
        Places { ip, l4, payload, end: payload + self.payload }
    }

    fn header(&self, places: Places) -> VnetHeader {
        if !self.is_unfinished() {
            return VnetHeader::default();
        }
        let csum_offset = if self.protocol == TCP { 16 } else { 6 };
        let unsegmented = VnetHeader {
            flags: flag::NEEDS_CSUM,
            csum_start: u16::try_from(places.l4).unwrap(),
            csum_offset,
            ..VnetHeader::default()
        };
        let Some(gso_size) = self.gso_size else { return unsegmented };
        let gso_type = match (self.protocol, self.v6) {
            (TCP, false) => gso::TCPV4,
            (TCP, true) => gso::TCPV6,
            _ => gso::UDP_L4,
        };
        VnetHeader { gso_type, gso_size, hdr_len: u16::try_from(places.payload).unwrap(), ..unsegmented }
    }

    fn tag_bytes(&self) -> Vec<u8> {
        self.tags.iter().flat_map(|(kind, rest)| [kind.to_be_bytes(), rest.to_be_bytes()]).flatten().collect()
    }

    fn ethertype(&self) -> u16 {
        if self.v6 { 0x86dd } else { 0x0800 }
    }

    fn ip_header(&self, places: Places) -> Vec<u8> {
        if self.v6 { self.ipv6_header(places) } else { self.ipv4_header(places) }
    }

    fn ipv4_header(&self, places: Places) -> Vec<u8> {
        let total = u16::try_from(places.end - places.ip).unwrap().wrapping_add(self.ip_length);
        let mut header = vec![0x45 + self.ip_options, self.tos];
        for word in [total, self.id, self.fragment] {
            header.extend(word.to_be_bytes());
        }
        header.extend([self.hops, self.protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        header.extend(std::iter::repeat_n(1, 4 * usize::from(self.ip_options))); // "no operation"
        if self.ip_sum == IpSum::Ones {
            header[4..6].fill(0);
            let id = (!sum(&header)).to_be_bytes();
            header[4..6].copy_from_slice(&id);
        }
        let right = !sum(&header);
        let told = match self.ip_sum {
            IpSum::Right => right,
            IpSum::Wrong(bits) => right ^ bits,
            IpSum::Ones => u16::MAX,
        };
        header[10..12].copy_from_slice(&told.to_be_bytes());
        header
    }

    fn ipv6_header(&self, places: Places) -> Vec<u8> {
        let length = u16::try_from(places.end - places.ip - 40).unwrap().wrapping_add(self.ip_length);
        let first = 6 << 28 | u32::from(self.tos) << 20 | self.label;
        let next = if self.extension { 0 } else { self.protocol };
        let mut header = [&first.to_be_bytes()[..], &length.to_be_bytes(), &[next, self.hops]].concat();
        for host in [1, 2] {
            header.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host]);
        }
        if self.extension {
            header.extend([self.protocol, 0, 1, 4, 0, 0, 0, 0]); // six bytes of padding
        }
        header
    }

    fn l4_header(&self) -> Vec<u8> {
        let ports = [40_000 + u16::from(self.flow), 9].map(u16::to_be_bytes).concat();
        match self.protocol {
            TCP => {
                let words = u8::try_from(5 + self.options.len() / 4).unwrap();
                let mut header = ports;
                header.extend(self.sequence.to_be_bytes());
                header.extend(self.acknowledged.to_be_bytes());
                header.extend([words << 4 | self.reserved, self.flags]);
                header.extend(self.window.to_be_bytes());
                header.extend([0, 0]);
                header.extend(self.urgent.to_be_bytes());
                header.extend(&self.options);
                header
            }
            UDP => {
                let length = u16::try_from(8 + self.payload).unwrap().wrapping_add(self.udp_length);
                [&ports[..], &length.to_be_bytes(), &[0, 0]].concat()
            }
            _ => Vec::new(),
        }
    }

    /// The pseudo header's sum.
    fn pseudo(&self, bytes: &[u8], places: Places) -> u16 {
        let addresses = if self.v6 { places.ip + 8..places.ip + 40 } else { places.ip + 12..places.ip + 20 };
        let length = u16::try_from(places.end - places.l4).unwrap().to_be_bytes();
        sum(&[&bytes[addresses], &[0, self.protocol], &length].concat())
    }

    /// Writes the checksum; the IP packet is all there.
    fn finish_transport(&self, bytes: &mut [u8], places: Places) {
        let field = match self.protocol {
            TCP => places.l4 + 16,
            UDP => places.l4 + 6,
            _ => return,
        };
        let pseudo = self.pseudo(bytes, places);
        let right = |bytes: &[u8]| !sum(&[&pseudo.to_be_bytes(), &bytes[places.l4..]].concat());
        // The first two bytes that are at an even place and carry no number.
        let tunable = places.payload + 8..places.payload + 10;
        if self.sums_to_zero && self.payload >= 10 {
            bytes[tunable.clone()].fill(0);
            let missing = right(bytes);
            bytes[tunable].copy_from_slice(&missing.to_be_bytes());
        }
        let right = match right(bytes) {
            0 if self.protocol == UDP => u16::MAX, // 0 would mean that there is none
            right => right,
        };
        let told = match self.sum {
            Sum::Right => right,
            Sum::Wrong(bits) => right ^ bits,
            Sum::Zero => 0,
            Sum::Ones => u16::MAX,
            Sum::Unfinished(bits) => pseudo ^ bits,
        };
        bytes[field..field + 2].copy_from_slice(&told.to_be_bytes());
    }
}
