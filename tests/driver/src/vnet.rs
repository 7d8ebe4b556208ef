//! The header before every frame (virtio 1.2, section 5.1.6).
//!
//! ```text
//!   0       1          2         4          6            8             10            12
//!   | flags | gso_type | hdr_len | gso_size | csum_start | csum_offset | num_buffers |
//! ```

/// Bytes of the header with `VERSION_1` or `MRG_RXBUF`, as on most wires.
pub const HEADER_SIZE: usize = 12;
/// Bytes of the header without either: there is no `num_buffers`.
pub const LEGACY_HEADER_SIZE: usize = 10;

/// Values of `flags`.
pub mod flag {
    /// The sum at `csum_start` + `csum_offset` is still to be made.
    pub const NEEDS_CSUM: u8 = 1;
    /// The sums are known to be right.
    pub const DATA_VALID: u8 = 2;
}

/// Values of `gso_type`.
pub mod gso {
    /// One frame.
    pub const NONE: u8 = 0;
    /// TCP over IPv4.
    pub const TCPV4: u8 = 1;
    /// UDP fragments.
    pub const UDP: u8 = 3;
    /// TCP over IPv6.
    pub const TCPV6: u8 = 4;
    /// UDP segments.
    pub const UDP_L4: u8 = 5;
    /// With ECN.
    pub const ECN: u8 = 0x80;
}

/// The header, any field of which may be wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the specification's own fields, drawn above")]
pub struct VnetHeader {
    pub flags: u8,
    pub gso_type: u8,
    pub hdr_len: u16,
    pub gso_size: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
    pub num_buffers: u16,
}

impl VnetHeader {
    /// As it lies before the frame; a legacy header is its first 10 bytes.
    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The header of these bytes; `None` when they are fewer than the legacy one has.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| bytes.get(at..at + 2).map(|word| u16::from_le_bytes([word[0], word[1]]));
        Some(Self {
            flags: *bytes.first()?,
            gso_type: *bytes.get(1)?,
            hdr_len: word(2)?,
            gso_size: word(4)?,
            csum_start: word(6)?,
            csum_offset: word(8)?,
            num_buffers: word(10).unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_laid_out_as_drawn_and_read_back() {
        let header = VnetHeader {
            flags: flag::NEEDS_CSUM,
            gso_type: gso::TCPV4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0x0102,
        };
        let bytes = header.bytes();
        assert_eq!(bytes, [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 2, 1]);
        assert_eq!(VnetHeader::parse(&bytes), Some(header));
        let legacy = VnetHeader::parse(&bytes[..LEGACY_HEADER_SIZE]);
        assert_eq!(legacy, Some(VnetHeader { num_buffers: 0, ..header }));
        assert_eq!(VnetHeader::parse(&bytes[..9]), None);
    }
}
