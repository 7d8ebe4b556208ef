//! Frames made by hand, layer by layer. Lengths and IPv4's checksum are right; TCP's and UDP's checksums are 0.

pub(crate) const GUEST: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
pub(crate) const PEER: [u8; 6] = [0x02, 0, 0, 0, 0, 0x02];
pub(crate) const GUEST_PORT: u16 = 40_000;
pub(crate) const PEER_PORT: u16 = 53;

pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

fn short(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap().to_be_bytes()
}

/// A frame from the guest to its peer; `tags` are whole tags: type and control field.
pub(crate) fn ethernet(tags: &[[u8; 4]], ether_type: u16, packet: &[u8]) -> Vec<u8> {
    [&PEER[..], &GUEST[..], tags.as_flattened(), &ether_type.to_be_bytes()[..], packet].concat()
}

/// A packet from 10.0.0.1 to 10.0.0.2, ID 0x1234, "don't fragment".
pub(crate) fn ipv4(protocol: u8, segment: &[u8]) -> Vec<u8> {
    let mut header =
        vec![0x45, 0xb8, 0, 0, 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    header[2..4].copy_from_slice(&short(20 + segment.len()));
    let sum: u32 = header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap();
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    [header.as_slice(), segment].concat()
}

/// A packet from `fd00::1` to `fd00::2`; `protocol` is the next header of the first, `rest` may begin with
/// extension headers.
pub(crate) fn ipv6(protocol: u8, rest: &[u8]) -> Vec<u8> {
    let mut header = vec![0x6b, 0x80, 0, 0, 0, 0, protocol, 64];
    header[4..6].copy_from_slice(&short(rest.len()));
    for last in [1, 2] {
        header.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    }
    [header.as_slice(), rest].concat()
}

/// A segment with ACK and PSH; `options` in whole words.
pub(crate) fn tcp(options: &[u8], payload: &[u8]) -> Vec<u8> {
    let data_offset = u8::try_from((20 + options.len()) / 4).unwrap() << 4;
    let mut header = Vec::new();
    header.extend(GUEST_PORT.to_be_bytes());
    header.extend(PEER_PORT.to_be_bytes());
    header.extend([0, 0, 0, 7, 0, 0, 0, 9, data_offset, 0x18, 0x10, 0, 0, 0, 0, 0]);
    [header.as_slice(), options, payload].concat()
}

/// A datagram.
pub(crate) fn udp(payload: &[u8]) -> Vec<u8> {
    let ports = [GUEST_PORT.to_be_bytes(), PEER_PORT.to_be_bytes()];
    [ports.as_flattened(), &short(8 + payload.len())[..], &[0, 0][..], payload].concat()
}
