//! The path on rings in plain memory, with a datagram socket for a tap: each write and read is one frame.

use std::os::{fd::OwnedFd, unix::net::UnixDatagram};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{
    Port, Turn,
    batch::{COPY_WHOLE, FRAMES},
    forward::Tap,
    inspect::Link,
    receive::Receive,
    ring::{Memory, QueueFault},
    transmit::Transmit,
};
use crate::{
    features,
    label::Label,
    ledger::{Account, DropReason, Known, Ledger, Part, Totals},
    policy::{Policy, SuspectAction},
    wire::vnet::{HEADER_LEN, NegotiatedOffloads},
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const SIZE: u16 = 128;
const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where the guest keeps its buffers; the second memory region begins at `SEAM`.
const BUFFERS: u64 = 0x1_0000;
const SEAM: u64 = 0x10_0000;

/// A guest with one queue, and a tap.
struct Rig {
    memory: Memory,
    queue: Queue,
    tap: Tap,
    far_end: UnixDatagram,
    ledger: Ledger,
    transmit: Transmit,
    receive: Receive,
    policy: Policy,
    acked: u64,
    avail: u16,
    mtu: u16,
}

fn rig() -> Rig {
    let ranges = [(GuestAddress(0), 0x10_0000), (GuestAddress(SEAM), 0x10_0000)];
    let memory = Memory::from_ranges(&ranges).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    let (near, far_end) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far_end.set_nonblocking(true).unwrap();
    let (ledger, _) = Ledger::create(1).unwrap();
    let account = |part| Account::resume(&ledger, part);
    Rig {
        transmit: Transmit::new(account(Part::transmit(0))),
        receive: Receive::new(account(Part::receive(0))),
        policy: Policy {
            generation: 1,
            label: Label::new(7).unwrap(),
            tagged: false,
            suspect_action: SuspectAction::Count,
        },
        acked: features::VERSION_1 | features::MRG_RXBUF,
        tap: Tap::new(OwnedFd::from(near)),
        mtu: 1500,
        avail: 0,
        memory,
        queue,
        far_end,
        ledger,
    }
}

/// A frame that every parser takes for a non-IP one, with bytes that tell their place.
fn frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|n| (n % 251).to_le_bytes()[0]).collect();
    let head = [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..], &[0x88, 0xb5]].concat();
    for (byte, value) in frame.iter_mut().zip(head) {
        *byte = value;
    }
    frame
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_LEN][..], frame].concat()
}

impl Rig {
    fn descriptor(&self, table: u64, index: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let bytes =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.memory.write_slice(&bytes.concat(), GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    fn make_available(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u64::from(self.avail % SIZE);
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.write_obj(self.avail.to_le(), GuestAddress(AVAIL + 2)).unwrap();
    }

    /// A transmit chain of one buffer, in descriptor and place `n`.
    fn offer(&mut self, n: u16, bytes: &[u8]) {
        let address = BUFFERS + u64::from(n) * 0x2000;
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        self.descriptor(TABLE, n, (address, u32::try_from(bytes.len()).unwrap(), 0, 0));
        self.make_available(n);
    }

    /// A receive chain of one buffer.
    fn post(&mut self, n: u16, len: u32) {
        self.descriptor(TABLE, n, (BUFFERS + u64::from(n) * 0x2000, len, WRITE, 0));
        self.make_available(n);
    }

    fn link(&self) -> Link {
        let modern = self.acked & features::VERSION_1 != 0;
        Link {
            mtu: self.mtu,
            negotiated: NegotiatedOffloads::from_features(self.acked),
            header_len: if modern { HEADER_LEN } else { 10 },
        }
    }

    fn transmit(&mut self) -> Turn {
        let port = Port { policy: &self.policy, link: self.link(), tap: &self.tap };
        self.transmit.turn(&mut self.queue, &self.memory, &port)
    }

    fn receive(&mut self) -> Turn {
        let port = Port { policy: &self.policy, link: self.link(), tap: &self.tap };
        let mergeable = self.acked & features::MRG_RXBUF != 0;
        self.receive.turn(&mut self.queue, &self.memory, &port, mergeable)
    }

    fn totals(&self, part: Part) -> Totals {
        let mut known = Known::new(part);
        known.refresh(&self.ledger);
        assert!(known.totals().balances(), "{:?}", known.totals());
        *known.totals()
    }
    fn sent(&self) -> Totals {
        self.totals(Part::transmit(0))
    }
    fn got(&self) -> Totals {
        self.totals(Part::receive(0))
    }

    fn used_index(&self) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(USED + 2)).unwrap())
    }
    fn used(&self, place: u16) -> (u32, u32) {
        let element: u64 = self.memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(place))).unwrap();
        let element = u64::from_le(element);
        (u32::try_from(element & 0xffff_ffff).unwrap(), u32::try_from(element >> 32).unwrap())
    }
    fn at_far_end(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let n = self.far_end.recv(&mut bytes).ok()?;
        bytes.truncate(n);
        Some(bytes)
    }
    fn guest_bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

fn dropped(totals: &Totals, reason: DropReason) -> u64 {
    totals.dropped[reason.index()]
}

#[test]
fn a_scattered_frame_reaches_the_tap_byte_for_byte_and_is_counted_once() {
    let mut rig = rig();
    let bytes = with_header(&frame(600));
    // In four pieces, one of them across the seam of two memory regions, one of them empty.
    rig.memory.write_slice(&bytes[..5], GuestAddress(BUFFERS)).unwrap();
    rig.memory.write_slice(&bytes[5..205], GuestAddress(SEAM - 100)).unwrap();
    rig.memory.write_slice(&bytes[205..], GuestAddress(BUFFERS + 0x1000)).unwrap();
    rig.descriptor(TABLE, 3, (BUFFERS, 5, NEXT, 9));
    rig.descriptor(TABLE, 9, (u64::MAX, 0, NEXT, 4));
    rig.descriptor(TABLE, 4, (SEAM - 100, 200, NEXT, 5));
    rig.descriptor(TABLE, 5, (BUFFERS + 0x1000, 407, 0, 0));
    rig.make_available(3);
    let turn = rig.transmit();
    assert_eq!(turn, Turn { signal: true, ..Turn::default() });
    assert_eq!(rig.at_far_end().unwrap(), bytes);
    let sent = rig.sent();
    assert_eq!((sent.chains, sent.passed.frames, sent.passed.bytes, sent.normal.frames), (1, 1, 600, 1));
    assert_eq!((sent.tap_operations, sent.tap_bytes), (1, 600));
    assert_eq!((rig.used_index(), rig.used(0)), (1, (3, 0)));
}

#[test]
fn an_indirect_chain_is_a_chain() {
    let mut rig = rig();
    let bytes = with_header(&frame(100));
    rig.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    let table = BUFFERS + 0x8000;
    rig.descriptor(table, 0, (BUFFERS + 12, 100, 0, 0));
    rig.descriptor(TABLE, 0, (BUFFERS, 12, NEXT, 1));
    rig.descriptor(TABLE, 1, (table, 16, INDIRECT, 0));
    rig.make_available(0);
    assert_eq!(rig.transmit().fault, None);
    assert_eq!(rig.at_far_end().unwrap(), bytes);
}

#[test]
fn a_long_frame_goes_partly_from_guest_memory_and_arrives_whole() {
    let mut rig = rig();
    rig.mtu = 60_000;
    let bytes = with_header(&frame(COPY_WHOLE + 1000));
    rig.offer(0, &bytes);
    let _ = rig.transmit();
    assert_eq!(rig.at_far_end().unwrap(), bytes);
    assert_eq!(rig.sent().passed.bytes, COPY_WHOLE as u64 + 1000);
}

#[test]
fn a_legacy_drivers_short_header_becomes_the_taps_long_one() {
    let mut rig = rig();
    rig.acked = 0;
    rig.offer(0, &[&[0; 10][..], &frame(64)].concat());
    let _ = rig.transmit();
    assert_eq!(rig.at_far_end().unwrap(), with_header(&frame(64)));
}

#[test]
fn every_malformed_chain_is_one_counted_drop_and_goes_back() {
    let mut rig = rig();
    let table = BUFFERS + 0x8000;
    rig.descriptor(table, 0, (BUFFERS, 100, INDIRECT, 0));
    let chains: [&[(u64, u32, u16, u16)]; 12] = [
        &[(BUFFERS, 100, NEXT, 0)],           // a loop
        &[(BUFFERS, 100, NEXT, SIZE)],        // a link out of the table
        &[(BUFFERS, 100, WRITE, 0)],          // device-writable
        &[(0xffff_0000, 100, 0, 0)],          // outside
        &[(u64::MAX - 10, 100, 0, 0)],        // wraps
        &[(2 * SEAM - 10, 100, 0, 0)],        // the end of memory
        &[(BUFFERS, 2 << 20, 0, 0)],          // too long
        &[(BUFFERS, 11, 0, 0)],               // shorter than its header
        &[(table, 16, INDIRECT, 0)],          // nested
        &[(table, 16, INDIRECT | NEXT, 0)],   // linked on
        &[(table, 17, INDIRECT, 0)],          // no whole number of descriptors
        &[(table, 16 * 65_535, INDIRECT, 0)], // more than anybody needs
    ];
    for (done, chain) in (1..).zip(chains) {
        rig.descriptor(TABLE, 0, chain[0]);
        rig.make_available(0);
        assert_eq!(rig.transmit().fault, None, "{chain:?}");
        assert_eq!(rig.used_index(), done, "{chain:?}");
        assert_eq!(rig.used(done - 1), (0, 0));
        assert_eq!(dropped(&rig.sent(), DropReason::Malformed), u64::from(done), "{chain:?}");
    }
    let sent = rig.sent();
    assert_eq!((sent.chains, sent.dropped_packets, sent.dropped_bytes, sent.passed.frames), (12, 12, 0, 0));
    assert!(rig.at_far_end().is_none());
}

#[test]
fn a_runt_and_an_oversized_frame_never_reach_the_tap() {
    let mut rig = rig();
    rig.offer(0, &with_header(&frame(13)));
    rig.offer(1, &with_header(&[]));
    rig.offer(2, &with_header(&frame(1515)));
    rig.offer(3, &with_header(&frame(1514)));
    let _ = rig.transmit();
    let sent = rig.sent();
    assert_eq!((dropped(&sent, DropReason::Runt), dropped(&sent, DropReason::Oversize)), (2, 1));
    assert_eq!((sent.passed.frames, sent.dropped_bytes), (1, 13 + 1515));
    assert_eq!(rig.at_far_end().unwrap().len(), 12 + 1514);
}

#[test]
fn a_jump_of_the_available_index_or_a_bad_head_stops_the_queue_outside_the_equation() {
    let mut jumped = rig();
    jumped.memory.write_obj(SIZE + 1, GuestAddress(AVAIL + 2)).unwrap();
    assert_eq!(jumped.transmit().fault, Some(QueueFault::Jump));
    let mut rig = rig();
    rig.offer(0, &with_header(&frame(60)));
    rig.make_available(SIZE);
    let turn = rig.transmit();
    assert_eq!((turn.fault, turn.signal), (Some(QueueFault::BadHead), true));
    assert_eq!((rig.sent().chains, rig.used_index()), (1, 1), "the good frame before it went out");
    let mut known = Known::new(Part::transmit(0));
    known.refresh(&rig.ledger);
    assert_eq!(known.queue_faults(), 1);
}

#[test]
fn a_tap_that_is_full_in_the_middle_of_a_batch_loses_nothing_and_counts_nothing_twice() {
    let mut rig = rig();
    rustix::net::sockopt::set_socket_send_buffer_size(&rig.tap, 4608).unwrap(); // room for a few frames
    for n in 0..40 {
        // Every third one is a drop: it must not overtake the frames before it.
        let len = if n % 3 == 2 { 13 } else { 60 + usize::from(n) };
        rig.offer(n, &with_header(&frame(len)));
    }
    let mut arrived = Vec::new();
    let mut turns = 0;
    while rig.used_index() < 40 {
        let turn = rig.transmit();
        assert_eq!((turn.fault, turn.more), (None, false), "a full tap tells when there is room");
        assert_eq!(turn.tap_full, rig.used_index() < 40);
        assert_eq!(rig.sent().chains, u64::from(rig.used_index()), "what was not given back was not counted");
        arrived.extend(std::iter::from_fn(|| rig.at_far_end()).map(|f| f.len() - 12));
        turns += 1;
        assert!(turns < 41);
    }
    assert!(turns > 1, "the socket never was full: the test tests nothing");
    let expected: Vec<usize> = (0..40).filter(|n| n % 3 != 2).map(|n| 60 + n).collect();
    assert_eq!(arrived, expected);
    assert_eq!(dropped(&rig.sent(), DropReason::Runt), 13);
}

#[test]
fn a_turn_is_bounded_and_says_that_there_is_more() {
    let mut rig = rig();
    for n in 0..100 {
        rig.offer(n % 100, &with_header(&frame(13)));
    }
    assert!(rig.transmit().more);
    assert_eq!(usize::from(rig.used_index()), FRAMES);
    assert!(!rig.transmit().more);
    assert_eq!(rig.used_index(), 100);
}

#[test]
fn with_event_idx_the_guest_is_signalled_only_where_it_asked() {
    let mut rig = rig();
    rig.queue.set_event_idx(true);
    let used_event = GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE));
    for (asked, expected) in [(0_u16, true), (5, false), (2, true)] {
        rig.memory.write_obj(asked.to_le(), used_event).unwrap();
        rig.offer(0, &with_header(&frame(13)));
        assert_eq!(rig.transmit().signal, expected, "asked for {asked}, now at {}", rig.used_index());
    }
    let avail_event: u16 = rig.memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap();
    assert_eq!(u16::from_le(avail_event), 3, "a kick is wanted for the next chain");
}

#[test]
fn the_indices_wrap_without_a_lost_or_doubled_frame() {
    let mut rig = rig();
    rig.queue.set_next_avail(65_500);
    rig.queue.set_next_used(65_500);
    rig.avail = 65_500;
    for n in 0..200_u64 {
        rig.offer(0, &with_header(&frame(60)));
        assert_eq!(rig.transmit().fault, None);
        assert_eq!(rig.at_far_end().unwrap().len(), 72);
        assert_eq!(rig.sent().passed.frames, n + 1);
    }
    assert_eq!(rig.used_index(), 65_500_u16.wrapping_add(200));
}

#[test]
fn an_operators_tag_counts_apart_and_its_action_decides() {
    let mut rig = rig();
    rig.offer(0, &with_header(&frame(60)));
    let _ = rig.transmit();
    rig.policy.tagged = true;
    rig.offer(1, &with_header(&frame(61)));
    let _ = rig.transmit();
    rig.policy.suspect_action = SuspectAction::Drop;
    rig.offer(2, &with_header(&frame(62)));
    let _ = rig.transmit();
    let sent = rig.sent();
    assert_eq!((sent.normal.bytes, sent.suspect.bytes, sent.passed.bytes), (60, 61 + 62, 60 + 61));
    assert_eq!(dropped(&sent, DropReason::SuspectPolicy), 1);
    assert_eq!(std::iter::from_fn(|| rig.at_far_end()).count(), 2);
}

#[test]
fn a_received_frame_fills_as_many_buffers_as_it_needs() {
    let mut rig = rig();
    let bytes = frame(250);
    rig.far_end.send(&with_header(&bytes)).unwrap();
    for n in 0..4 {
        rig.post(n, 100);
    }
    assert!(rig.receive().signal);
    assert_eq!(rig.used_index(), 3);
    assert_eq!([0, 1, 2].map(|n| rig.used(n)), [(0, 100), (1, 100), (2, 62)]);
    let got = [0, 1, 2].map(|n| rig.guest_bytes(BUFFERS + n * 0x2000, 100)).concat();
    assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0], "three buffers");
    assert_eq!(got[12..262], bytes);
    assert_eq!((rig.got().passed.bytes, rig.got().tap_bytes), (250, 250));
}

#[test]
fn a_frame_waits_for_buffers_and_is_the_only_one_in_flight() {
    let mut rig = rig();
    rig.far_end.send(&with_header(&frame(250))).unwrap();
    rig.far_end.send(&with_header(&frame(20))).unwrap();
    rig.post(0, 100);
    let turn = rig.receive();
    assert_eq!((turn.more, turn.fault), (false, None), "no spinning while the guest has too few");
    assert_eq!((rig.got().chains, rig.got().in_flight, rig.used_index()), (1, 1, 0));
    rig.post(1, 200);
    rig.post(2, 200);
    let _ = rig.receive();
    let got = rig.got();
    assert_eq!((got.chains, got.in_flight, got.passed.bytes), (2, 0, 270));
    assert_eq!([0, 1, 2].map(|n| rig.used(n)), [(0, 100), (1, 162), (2, 32)]);
}

#[test]
fn nothing_is_read_while_the_guest_has_no_buffer() {
    let mut rig = rig();
    rig.far_end.send(&with_header(&frame(60))).unwrap();
    assert!(!rig.receive().more);
    assert_eq!(rig.got(), Totals::default());
    rig.post(0, 1000);
    let _ = rig.receive();
    assert_eq!(rig.got().passed.frames, 1);
}

#[test]
fn a_frame_that_the_guests_whole_ring_cannot_hold_is_dropped() {
    let mut rig = rig();
    rig.far_end.send(&with_header(&frame(1500))).unwrap();
    for n in 0..SIZE {
        rig.post(n, 10);
    }
    let _ = rig.receive();
    assert_eq!(dropped(&rig.got(), DropReason::BuffersTooSmall), 1);
    assert_eq!(rig.used_index(), 0, "the buffers stay with us");
    rig.far_end.send(&with_header(&frame(60))).unwrap();
    let _ = rig.receive();
    assert_eq!((rig.got().passed.frames, rig.used_index()), (1, 8));
}

#[test]
fn without_mergeable_buffers_a_frame_fits_one_chain_or_none() {
    let mut rig = rig();
    rig.acked = features::VERSION_1;
    rig.far_end.send(&with_header(&frame(100))).unwrap();
    rig.far_end.send(&with_header(&frame(50))).unwrap();
    rig.post(0, 100);
    rig.post(1, 100);
    let _ = rig.receive();
    let got = rig.got();
    assert_eq!((dropped(&got, DropReason::BuffersTooSmall), got.passed.frames, rig.used_index()), (1, 1, 1));
    assert_eq!(rig.used(0), (0, 62));
    assert_eq!(rig.guest_bytes(BUFFERS + 12, 50), frame(50));
}

#[test]
fn a_bad_receive_chain_costs_the_frame_and_gives_all_its_buffers_back_empty() {
    let mut rig = rig();
    rig.far_end.send(&with_header(&frame(150))).unwrap();
    rig.post(0, 100);
    rig.descriptor(TABLE, 1, (BUFFERS, 100, 0, 0)); // device-readable
    rig.make_available(1);
    let before = rig.guest_bytes(BUFFERS, 100);
    let _ = rig.receive();
    assert_eq!(dropped(&rig.got(), DropReason::Malformed), 1);
    assert_eq!((rig.used_index(), rig.used(0), rig.used(1)), (2, (0, 0), (1, 0)));
    assert_eq!(rig.guest_bytes(BUFFERS, 100), before, "a dropped frame never touches guest memory");
}

#[test]
fn a_dropped_received_frame_costs_no_buffer() {
    let mut rig = rig();
    rig.policy.tagged = true;
    rig.policy.suspect_action = SuspectAction::Drop;
    rig.far_end.send(&with_header(&frame(150))).unwrap();
    rig.post(0, 1000);
    let _ = rig.receive();
    assert_eq!((dropped(&rig.got(), DropReason::SuspectPolicy), rig.used_index()), (1, 0));
    assert_eq!((rig.got().suspect.frames, rig.got().suspect.bytes), (1, 150));
}

#[test]
fn a_frame_that_waits_when_the_ring_stops_is_counted() {
    let mut rig = rig();
    rig.far_end.send(&with_header(&frame(250))).unwrap();
    rig.post(0, 100);
    let _ = rig.receive();
    rig.receive.stop(DropReason::RingDisabled);
    let got = rig.got();
    assert_eq!((got.chains, got.in_flight, dropped(&got, DropReason::RingDisabled)), (1, 0, 1));
}

#[test]
fn a_frame_that_waited_is_judged_by_the_policy_of_when_it_goes_on() {
    let mut rig = rig();
    rig.far_end.send(&with_header(&frame(250))).unwrap();
    rig.post(0, 100);
    let _ = rig.receive();
    rig.policy.tagged = true;
    rig.policy.suspect_action = SuspectAction::Drop;
    rig.post(1, 200);
    let _ = rig.receive();
    let got = rig.got();
    assert_eq!((got.suspect.frames, got.normal.frames, got.passed.frames), (1, 0, 0));
    assert_eq!(dropped(&got, DropReason::SuspectPolicy), 1);
}

#[test]
fn a_frame_that_a_dead_worker_held_is_counted_as_lost_by_its_successor() {
    let mut rig = rig();
    rig.far_end.send(&with_header(&frame(250))).unwrap();
    rig.post(0, 100);
    let _ = rig.receive();
    assert_eq!(rig.got().in_flight, 1);
    rig.receive = Receive::new(Account::resume(&rig.ledger, Part::receive(0)));
    let got = rig.got();
    assert_eq!((got.chains, got.in_flight, dropped(&got, DropReason::Restart)), (1, 0, 1));
}

#[test]
fn buffers_of_no_length_cannot_make_one_frame_cost_much() {
    let mut rig = rig();
    rig.far_end.send(&with_header(&frame(60))).unwrap();
    // Every chain: a table of 255 empty buffers.
    let table = BUFFERS + 0x8000;
    for n in 0..255 {
        rig.descriptor(table, n, (BUFFERS, 0, if n < 254 { WRITE | NEXT } else { WRITE }, n + 1));
    }
    for n in 0..SIZE {
        rig.descriptor(TABLE, n, (table, 255 * 16, INDIRECT, 0));
        rig.make_available(n);
    }
    let _ = rig.receive();
    assert_eq!(dropped(&rig.got(), DropReason::BuffersTooSmall), 1);
    assert_eq!(rig.used_index(), 0, "the buffers stay with us");
}
