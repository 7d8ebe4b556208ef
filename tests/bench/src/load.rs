//! What the frames of a load are: as data, and the bytes in each slot of a ring.

use std::net::Ipv4Addr;

use vmflow_driver::{
    frame::{ETHERNET, Ends, IPV4, Segment, TCP, UDP, at, pattern, protocol, sum},
    mapping::Area,
    vnet::{VnetHeader, flag, gso},
};

/// TCP's ACK flag.
const ACK: u8 = 0x10;
/// Where both ports are.
const PORTS: usize = at::L4;
/// The lowest source port.
const LOWEST_PORT: u16 = 10_000;

/// Frames, one after the other: of which protocol, how long, of how many flows.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// TCP segments with consecutive sequence numbers, not UDP datagrams.
    pub tcp: bool,
    /// Bytes of each frame.
    pub length: usize,
    /// So many frames of one flow follow each other.
    pub run: u16,
    /// So many flows take turns.
    pub flows: u16,
    /// The payload of each packet, where the frame is to be cut into several by whoever sends it on (TSO).
    pub segment: Option<u16>,
    /// The checksum is left to be finished, as every Linux guest does where it may.
    pub unsummed: bool,
}

/// A frame with its virtio-net header.
#[derive(Debug)]
pub struct Frame {
    /// What the driver asks for.
    pub header: VnetHeader,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Load {
    /// UDP datagrams of one flow, in frames of so many bytes.
    #[must_use]
    pub const fn udp(length: usize) -> Self {
        Self { tcp: false, length, run: 1, flows: 1, segment: None, unsummed: false }
    }

    /// TCP segments of one flow, with so many bytes each.
    #[must_use]
    pub const fn tcp(payload: usize) -> Self {
        Self { tcp: true, ..Self::udp(ETHERNET + IPV4 + TCP + payload) }
    }

    /// The same of so many flows.
    #[must_use]
    pub const fn flows(self, flows: u16) -> Self {
        Self { flows, ..self }
    }

    /// The same in runs of so many frames of one flow.
    #[must_use]
    pub const fn run(self, run: u16) -> Self {
        Self { run, flows: u16::MAX, ..self }
    }

    /// The same with checksums that are left to be finished.
    #[must_use]
    pub const fn unsummed(self) -> Self {
        Self { unsummed: true, ..self }
    }

    /// TCP in frames of 64 KiB that are left to be cut.
    #[must_use]
    pub const fn tso(segment: u16) -> Self {
        Self { segment: Some(segment), unsummed: true, ..Self::tcp(65_160) }
    }

    /// Packets on the wire for each frame.
    #[must_use]
    pub fn packets(&self) -> u64 {
        self.segment.map_or(1, |size| {
            u64::try_from((self.length - ETHERNET - IPV4 - TCP).div_ceil(usize::from(size))).unwrap_or(1)
        })
    }

    /// Bytes from one frame to the next where they lie in memory: as far apart as a guest's, and not all of them in
    /// the same sets of a cache.
    #[must_use]
    pub const fn stride(&self) -> usize {
        const APART: usize = 2048;
        const LINE: usize = 64;
        (self.length + APART).next_multiple_of(2 * LINE) + LINE
    }

    /// How many of them to put into a tap's queue at once, and how many frames come out of it then: fewer than it
    /// holds. `whole`: GSO frames come out as they went in.
    #[must_use]
    pub fn burst(&self, whole: bool) -> (u64, u64) {
        /// A tap's queue holds 1,000 frames.
        const SMALL: u64 = 900;
        const LARGE: u64 = 64;
        let each = if whole { 1 } else { self.packets() };
        let burst = if whole && self.segment.is_some() { LARGE } else { SMALL / each };
        (burst, burst * each)
    }

    /// Whether there are more flows than a ring has slots: then frames change on their way.
    #[must_use]
    pub fn changes(&self, slots: u16) -> bool {
        self.run == 1 && self.flows > slots
    }

    /// The frames of a ring with so many slots, sums right.
    #[must_use]
    pub fn frames(&self, slots: u16, ends: Ends) -> Vec<Frame> {
        (0..slots).map(|slot| self.frame(slot, ends)).collect()
    }

    fn frame(&self, slot: u16, ends: Ends) -> Frame {
        let flow = (slot / self.run) % self.flows;
        let ends = Ends { ports: [LOWEST_PORT + flow, ends.ports[1]], ..ends };
        if !self.tcp {
            let bytes = ends.udp(&pattern(self.length - ETHERNET - IPV4 - UDP, slot.into()));
            return self.left(bytes, protocol::UDP, 6);
        }
        let payload = pattern(self.length - ETHERNET - IPV4 - TCP, slot.into());
        let in_run = u32::from(if self.flows == 1 { slot } else { slot % self.run });
        let sequence = in_run.wrapping_mul(u32::try_from(payload.len()).unwrap_or(0));
        let segment = Segment { sequence, acknowledged: 1, flags: ACK, window: 512 };
        self.left(ends.tcp(segment, &payload), protocol::TCP, 16)
    }

    /// The frame as a driver hands it over: with what is left to be done. If that is anything, the sum over the pseudo
    /// header is where the checksum is.
    fn left(&self, mut bytes: Vec<u8>, protocol: u8, csum_offset: u16) -> Frame {
        if !self.unsummed {
            return Frame { header: VnetHeader::default(), bytes };
        }
        let length = word(bytes.len() - at::L4).to_be_bytes();
        let pseudo = [&bytes[at::IP + 12..at::L4], &[0, protocol], &length].concat();
        let field = at::L4 + usize::from(csum_offset);
        bytes[field..field + 2].copy_from_slice(&sum(&pseudo).to_be_bytes());
        let header = VnetHeader {
            flags: flag::NEEDS_CSUM,
            gso_type: self.segment.map_or(0, |_| gso::TCPV4),
            hdr_len: self.segment.map_or(0, |_| word(ETHERNET + IPV4 + TCP)),
            gso_size: self.segment.unwrap_or(0),
            csum_start: word(at::L4),
            csum_offset,
            num_buffers: 0,
        };
        Frame { header, bytes }
    }
}

fn word(number: usize) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

/// Gives each frame a flow of its own, from one frame to the next.
#[derive(Debug)]
pub struct Change {
    flows: u16,
    next: u16,
}

impl Change {
    /// Among so many flows.
    #[must_use]
    pub const fn new(flows: u16) -> Self {
        Self { flows, next: 0 }
    }

    /// Writes both ports so that they add up to what they did: the frame's sum stays right.
    pub fn write(&mut self, frame: &Area, begin: usize) {
        let mut ports = [[0; 2]; 2];
        frame.read(begin + PORTS, ports.as_flattened_mut());
        let total = ports.map(u16::from_be_bytes).map(u32::from).iter().sum::<u32>();
        let source = LOWEST_PORT + self.next;
        // A sum of 16-bit words is taken modulo 65,535.
        let rest = (total + u32::from(u16::MAX) - u32::from(source)) % u32::from(u16::MAX);
        let destination = u16::try_from(rest).unwrap_or(u16::MAX);
        frame.write(begin + PORTS, [source, destination].map(u16::to_be_bytes).as_flattened());
        self.next = (self.next + 1) % self.flows;
    }
}

/// An ICMP echo request, which the host's kernel answers at once.
#[must_use]
pub fn ping(ends: Ends, length: usize) -> Vec<u8> {
    // Type, code, checksum, identifier, sequence.
    let mut message = vec![8, 0, 0, 0, 0, 1, 0, 1];
    message.extend(pattern(length - ETHERNET - IPV4 - message.len(), 1));
    let checksum = !sum(&message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    ends.ip(1, &message)
}

/// Whether this is the answer to a [`ping`]; the host's kernel may have something else to say, too.
#[must_use]
pub fn is_answer(frame: &[u8], request: &[u8]) -> bool {
    let without_sum = |bytes: &[u8]| bytes.get(at::L4 + 4..).map(<[u8]>::to_vec);
    frame.get(at::L4) == Some(&0) && without_sum(frame) == without_sum(request)
}

/// From the guest to the host behind its tap.
#[must_use]
pub fn to_host() -> Ends {
    Ends {
        addresses: [Ipv4Addr::from(crate::host::GUEST).into(), Ipv4Addr::from(crate::host::HOST).into()],
        ..Ends::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_of_every_load_are_right() {
        for load in [Load::udp(64), Load::udp(65).run(44), Load::tcp(1460).run(44)] {
            for frame in load.frames(128, to_host()) {
                let number = if load.tcp { protocol::TCP } else { protocol::UDP };
                assert_eq!(to_host().transport_sum(number, &frame.bytes[at::L4..]), 0);
            }
        }
    }

    #[test]
    fn a_run_is_of_one_flow_and_the_next_of_another() {
        let frames = Load::tcp(100).run(3).frames(6, to_host());
        let of = |frame: &Frame, at: usize, count: usize| frame.bytes[at..at + count].to_vec();
        let flows: Vec<_> = frames.iter().map(|frame| of(frame, PORTS, 4)).collect();
        assert!(flows[0] == flows[2] && flows[3] == flows[5] && flows[2] != flows[3]);
        let sequence: Vec<_> = frames.iter().map(|frame| of(frame, PORTS + 4, 4)[3]).collect();
        assert_eq!(sequence, [0, 100, 200, 0, 100, 200]);
    }

    #[test]
    fn a_frame_left_to_be_cut_holds_the_sum_of_its_pseudo_header() {
        let load = Load::tso(1448);
        assert_eq!(load.packets(), 45);
        let mut frame = load.frames(1, to_host()).remove(0).bytes;
        let (left, l4) = (frame[at::L4 + 16..at::L4 + 18].to_vec(), at::L4);
        frame[l4 + 16..l4 + 18].fill(0);
        let whole = !to_host().transport_sum(protocol::TCP, &frame[l4..]);
        let rest = sum(&frame[l4..]);
        let both = sum(&[left.as_slice(), &rest.to_be_bytes()].concat());
        assert_eq!(both, whole);
    }
}
