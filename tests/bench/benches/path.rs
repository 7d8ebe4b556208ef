//! What the data path itself costs, in ns per frame: rings in plain memory, no worker, no guest, and a descriptor
//! for a tap that takes everything at once.
//!
//! `cargo bench -p vmflow-bench --bench path [-- ROUNDS] [PART OF A NAME]`. The cases run in turn; shown are the
//! fastest round and the median. A
//! write to /dev/null alone is measured beside them: what is above it is ours.

use std::{hint::black_box, os::fd::OwnedFd, time::Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmflow::{
    features,
    label::Label,
    ledger::{Account, Ledger, Part},
    path::{
        Port,
        forward::Tap,
        inspect::{Coalesce, Link},
        ring::Memory,
        transmit::Transmit,
    },
    policy::{Policy, SuspectAction},
    wire::vnet::{HEADER_LEN, NegotiatedOffloads},
};
use vmflow_driver::frame::{Ends, Segment, pattern};

const SIZE: u16 = 1024;
const TABLE: u64 = 0;
const AVAIL: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
/// Each buffer has a page of its own, as a guest's have.
const BUFFERS: u64 = 0x10_0000;
const PAGE: u64 = 0x1000;
const MEMORY: usize = 0x80_0000;
const SESSION: u64 = 1;
/// Frames of one measurement.
const FRAMES: usize = 64 << 10;

/// What is measured: the frame at each place of the ring.
struct Case {
    name: &'static str,
    frame: fn(u16) -> Vec<u8>,
    action: Option<SuspectAction>,
    coalesce: Coalesce,
}

fn flow(n: u16) -> Ends {
    Ends { ports: [1000 + n, 9], ..Ends::default() }
}

fn datagram(len: usize, n: u16, flows: u16) -> Vec<u8> {
    flow(n % flows).udp(&pattern(len - 42, n.into()))
}

fn segment(n: u16) -> Vec<u8> {
    let segment = Segment { sequence: u32::from(n) * 1460, acknowledged: 1, flags: 0x10, window: 500 };
    flow(0).tcp(segment, &pattern(1460, n.into()))
}

const DROP: Option<SuspectAction> = Some(SuspectAction::Drop);

const CASES: [Case; 10] = [
    case("runt: ring and ledger alone", |_| vec![0; 13], None, Coalesce::Nothing),
    case("64 B, judged and dropped", |n| datagram(64, n, 1024), DROP, Coalesce::TcpAndUdp),
    case("1514 B, judged and dropped", |n| datagram(1514, n, 1024), DROP, Coalesce::TcpAndUdp),
    case("64 B, one by one", |n| datagram(64, n, 1), None, Coalesce::Nothing),
    case("64 B, nothing to put together", |n| datagram(64, n, 1024), None, Coalesce::TcpAndUdp),
    case("1514 B, nothing to put together", |n| datagram(1514, n, 1024), None, Coalesce::TcpAndUdp),
    case("4000 B, nothing to put together", |n| datagram(4000, n, 1024), None, Coalesce::TcpAndUdp),
    case("64 B datagrams of one flow", |n| datagram(64, n, 1), None, Coalesce::TcpAndUdp),
    case("1442 B datagrams of one flow", |n| datagram(1442, n, 1), None, Coalesce::TcpAndUdp),
    case("1514 B segments of one stream", segment, None, Coalesce::TcpAndUdp),
];

const fn case(
    name: &'static str,
    frame: fn(u16) -> Vec<u8>,
    action: Option<SuspectAction>,
    coalesce: Coalesce,
) -> Case {
    Case { name, frame, action, coalesce }
}

/// A ring full of frames, and the path that sends them again and again.
struct Bed {
    memory: Memory,
    queue: Queue,
    transmit: Transmit,
    tap: Tap,
    policy: Policy,
    link: Link,
    avail: u16,
}

impl Bed {
    fn new(case: &Case) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let mut queue = Queue::new(SIZE).expect("a power of two");
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(TABLE)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(USED)).expect("aligned");
        queue.set_event_idx(true);
        queue.set_ready(true);
        for n in 0..SIZE {
            let image = [&[0; HEADER_LEN][..], &(case.frame)(n)].concat();
            let address = BUFFERS + u64::from(n) * PAGE;
            memory.write_slice(&image, GuestAddress(address)).expect("inside");
            let len = u32::try_from(image.len()).expect("short");
            let descriptor = [&address.to_le_bytes()[..], &len.to_le_bytes(), &[0; 4]].concat();
            memory.write_slice(&descriptor, GuestAddress(TABLE + 16 * u64::from(n))).expect("inside");
            memory.write_slice(&n.to_le_bytes(), GuestAddress(AVAIL + 4 + 2 * u64::from(n))).expect("inside");
        }
        let (ledger, _) = Ledger::create(1).expect("a ledger");
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null").expect("/dev/null");
        let mut transmit = Transmit::new(Account::succeed(&ledger, Part::transmit(0), SESSION));
        transmit.settle(&mut queue, &memory, SESSION).expect("a ring");
        Self {
            memory,
            queue,
            transmit,
            tap: Tap::new(OwnedFd::from(null)),
            policy: Policy {
                generation: 1,
                label: Label::MIN,
                tagged: case.action.is_some(),
                suspect_action: case.action.unwrap_or(SuspectAction::Count),
            },
            link: Link {
                mtu: 9000,
                negotiated: NegotiatedOffloads::from_features(features::ALWAYS),
                header_len: HEADER_LEN,
                coalesce: case.coalesce,
            },
            avail: 0,
        }
    }

    /// ns per frame.
    fn run(&mut self) -> f64 {
        let port = Port { policy: &self.policy, link: self.link, tap: &self.tap, looks_again: false };
        let begin = Instant::now();
        for _ in 0..FRAMES / 64 {
            self.avail = self.avail.wrapping_add(64);
            self.memory.write_obj(self.avail.to_le(), GuestAddress(AVAIL + 2)).expect("inside");
            black_box(self.transmit.turn(&mut self.queue, &self.memory, &port).signal);
        }
        nanoseconds(begin)
    }
}

/// ns per write of a small frame to /dev/null.
fn write_alone() -> f64 {
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null").expect("/dev/null");
    let begin = Instant::now();
    for _ in 0..FRAMES {
        black_box(rustix::io::write(&null, &[0; 76]).is_ok());
    }
    nanoseconds(begin)
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn nanoseconds(since: Instant) -> f64 {
    since.elapsed().as_nanos() as f64 / FRAMES as f64
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let rounds = words.iter().find_map(|word| word.parse().ok()).unwrap_or(25);
    let wanted = words.iter().find(|word| word.parse::<usize>().is_err());
    let wanted = |case: &&Case| wanted.is_none_or(|part| case.name.contains(part.as_str()));
    let cases: Vec<&Case> = CASES.iter().filter(wanted).collect();
    let mut beds: Vec<Bed> = cases.iter().map(|case| Bed::new(case)).collect();
    let mut times = vec![Vec::new(); cases.len() + 1];
    for _ in 0..rounds {
        for (bed, times) in beds.iter_mut().zip(&mut times) {
            times.push(bed.run());
        }
        times[cases.len()].push(write_alone());
    }
    println!("| what | ns/frame, fastest | median |\n|---|---|---|");
    let names = cases.iter().map(|case| case.name).chain(["a write to /dev/null alone"]);
    for (name, times) in names.zip(&mut times) {
        times.sort_by(f64::total_cmp);
        println!("| {name} | {:.1} | {:.1} |", times[0], times[times.len() / 2]);
    }
}
