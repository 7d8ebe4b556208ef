//! What must leave the host for what the guest sent: the frame itself; of an unfinished one the frame with its
//! checksum; of a GSO frame its packets.

use vmflow_driver::{
    frame::sum,
    vnet::{VnetHeader, flag, gso},
};

use super::spec::{CWR, DONT_FRAGMENT, FIN, PSH, Sent};

/// A frame that must leave the host.
#[derive(Clone, Debug)]
pub struct Leaving {
    pub bytes: Vec<u8>,
    /// Where TCP's checksum is, if the kernel made it: zero and all ones are the same to TCP, and the kernel writes
    /// either. (To UDP they are not.)
    tcp_sum_of_kernel: Option<usize>,
}

/// What must leave the host for it; nothing for a frame that cannot have the checksum that it asks for.
pub fn leaving(sent: &Sent) -> Vec<Leaving> {
    let VnetHeader { flags, gso_type, .. } = sent.header;
    if flags & flag::NEEDS_CSUM == 0 {
        return vec![Leaving { bytes: sent.bytes.clone(), tcp_sum_of_kernel: None }];
    }
    if gso_type == gso::NONE {
        return finished(sent).into_iter().collect();
    }
    cut(sent)
}

/// The sum is over everything from where it starts, padding too, and whatever the field held before.
fn finished(sent: &Sent) -> Option<Leaving> {
    let start = usize::from(sent.header.csum_start);
    let field = start + usize::from(sent.header.csum_offset);
    let mut bytes = sent.bytes.clone();
    let told = match !sum(bytes.get(start..)?) {
        0 => u16::MAX,
        told => told,
    };
    bytes.get_mut(field..field + 2)?.copy_from_slice(&told.to_be_bytes());
    Some(Leaving { bytes, tcp_sum_of_kernel: tcp_sum(sent.header, field) })
}

/// The packets of a GSO frame without options, as TCP and UDP segmentation are documented for Linux.
fn cut(sent: &Sent) -> Vec<Leaving> {
    let header = sent.header;
    let (l4, payload) = (usize::from(header.csum_start), usize::from(header.hdr_len));
    let ip = l4 - if is_v4(header, &sent.bytes) { 20 } else { 40 };
    let chunks: Vec<_> = sent.bytes[payload..].chunks(header.gso_size.into()).collect();
    let mut leaving = Vec::new();
    for (number, chunk) in chunks.iter().enumerate() {
        let mut bytes = [&sent.bytes[..payload], chunk].concat();
        let (first, last) = (number == 0, number + 1 == chunks.len());
        if header.gso_type == gso::UDP_L4 {
            let length = u16::try_from(bytes.len() - l4).unwrap();
            bytes[l4 + 4..l4 + 6].copy_from_slice(&length.to_be_bytes());
        } else {
            let done = u32::try_from(number).unwrap() * u32::from(header.gso_size);
            let sequence = u32::from_be_bytes(*bytes[l4 + 4..].first_chunk().unwrap()).wrapping_add(done);
            bytes[l4 + 4..l4 + 8].copy_from_slice(&sequence.to_be_bytes());
            bytes[l4 + 13] &= !if last { 0 } else { FIN | PSH } & !if first { 0 } else { CWR };
        }
        tell_length(&mut bytes, ip, l4, u16::try_from(number).unwrap());
        let field = l4 + usize::from(header.csum_offset);
        finish(&mut bytes, ip, l4, field);
        leaving.push(Leaving { bytes, tcp_sum_of_kernel: tcp_sum(header, field) });
    }
    leaving
}

fn tcp_sum(header: VnetHeader, field: usize) -> Option<usize> {
    (header.csum_offset == 16).then_some(field)
}

/// Before the transport header of a frame that will be cut is an IP header without options and extensions.
fn is_v4(header: VnetHeader, bytes: &[u8]) -> bool {
    let l4 = usize::from(header.csum_start);
    bytes[l4 - 20] == 0x45 && bytes[l4 - 22..l4 - 20] == 0x0800_u16.to_be_bytes()
}

fn tell_length(bytes: &mut [u8], ip: usize, l4: usize, number: u16) {
    if l4 - ip == 40 {
        let length = u16::try_from(bytes.len() - l4).unwrap();
        bytes[ip + 4..ip + 6].copy_from_slice(&length.to_be_bytes());
        return;
    }
    let length = u16::try_from(bytes.len() - ip).unwrap();
    let id = u16::from_be_bytes([bytes[ip + 4], bytes[ip + 5]]).wrapping_add(number);
    bytes[ip + 2..ip + 4].copy_from_slice(&length.to_be_bytes());
    bytes[ip + 4..ip + 6].copy_from_slice(&id.to_be_bytes());
    bytes[ip + 10..ip + 12].fill(0);
    let told = !sum(&bytes[ip..l4]);
    bytes[ip + 10..ip + 12].copy_from_slice(&told.to_be_bytes());
}

fn finish(bytes: &mut [u8], ip: usize, l4: usize, field: usize) {
    let (addresses, protocol) =
        if l4 - ip == 40 { (ip + 8..l4, bytes[ip + 6]) } else { (ip + 12..l4, bytes[ip + 9]) };
    let length = u16::try_from(bytes.len() - l4).unwrap().to_be_bytes();
    bytes[field..field + 2].fill(0);
    let told = !sum(&[&bytes[addresses], &[0, protocol], &length, &bytes[l4..]].concat());
    let told = if told == 0 { u16::MAX } else { told };
    bytes[field..field + 2].copy_from_slice(&told.to_be_bytes());
}

impl Leaving {
    /// Is `came` this frame? `alone`: it was written to the tap as one frame; else the kernel cut it off a larger
    /// one, and may have numbered it anew if its ID says nothing (RFC 6864: it may not be fragmented).
    pub fn is(&self, came: &[u8], alone: bool) -> bool {
        if self.bytes == came {
            return true;
        }
        if self.bytes.len() != came.len() {
            return false;
        }
        let mut came = came.to_vec();
        if let Some(field) = self.tcp_sum_of_kernel
            && self.bytes[field..field + 2] == [0xff; 2]
            && came[field..field + 2] == [0; 2]
        {
            came[field..field + 2].fill(0xff);
        }
        if !alone && let Some(ip) = self.ipv4_with_id_without_meaning() {
            if sum(&came[ip..ip + 20]) != u16::MAX {
                return false;
            }
            came[ip + 4..ip + 6].copy_from_slice(&self.bytes[ip + 4..ip + 6]);
            came[ip + 10..ip + 12].copy_from_slice(&self.bytes[ip + 10..ip + 12]);
        }
        self.bytes == came
    }

    /// Where the IPv4 header is, if it is a right one without options, of a packet that is not and must not be
    /// fragmented.
    fn ipv4_with_id_without_meaning(&self) -> Option<usize> {
        let mut ip = 14;
        let tags = [[0x81, 0], [0x88, 0xa8]];
        while self.bytes.get(ip - 2..ip).is_some_and(|kind| tags.iter().any(|tag| tag == kind)) {
            ip += 4;
        }
        let header = self.bytes.get(ip..ip + 20)?;
        let dont = DONT_FRAGMENT.to_be_bytes();
        let is_it = self.bytes[ip - 2..ip] == [8, 0] && header[0] == 0x45 && header[6..8] == dont;
        (is_it && sum(header) == u16::MAX).then_some(ip)
    }
}
