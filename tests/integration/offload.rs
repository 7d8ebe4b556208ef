//! Offloads: frames whose segments and checksums are still to be made, both ways.

use vmflow::ledger::DropReason;
use vmflow_driver::{
    frame::{Ends, Segment, at},
    net::{Config, Device, FEATURES},
    receive::Posting,
    request::feature,
    transmit::Layout,
    vnet::{VnetHeader, flag, gso},
};

use crate::{
    harness::{PATIENCE, dropped},
    pairs::wait_attached,
    rig::{Rig, passes},
};

/// All that a Linux guest acknowledges of TCP offloads.
const OFFLOADS: u64 = feature::CSUM
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6;
/// Bytes of Ethernet, IPv4 and TCP headers.
const HEADERS: usize = 54;
/// Payload of one segment.
const SEGMENT: u16 = 1448;
/// Segments of the large frame; the last one is short.
const SEGMENTS: u64 = 10;
/// Payload of the large frame.
const PAYLOAD: usize = SEGMENT as usize * 9 + 100;
/// Where TCP's checksum is in its header.
const TCP_SUM: u16 = 16;
/// Where TCP begins in the frame.
const L4: u16 = 34;
/// Room for the large frame.
const ROOM: u32 = 20_000;

/// A TCP frame whose checksum field holds the pseudo header's sum, as a kernel leaves it.
fn unfinished(payload: usize) -> Vec<u8> {
    let ends = Ends::default();
    let bytes: Vec<u8> = (0..=u8::MAX).cycle().take(payload).collect();
    let mut frame =
        ends.tcp(Segment { sequence: 1000, flags: 0x10, window: 500, ..Segment::default() }, &bytes);
    let length = u16::try_from(frame.len() - at::L4).unwrap();
    let pseudo = [&frame[26..34], &[0, 6], &length.to_be_bytes()].concat();
    let sum = vmflow_driver::frame::sum(&pseudo).to_be_bytes();
    frame[at::L4 + 16..at::L4 + 18].copy_from_slice(&sum);
    frame
}

fn tso() -> VnetHeader {
    VnetHeader {
        flags: flag::NEEDS_CSUM,
        gso_type: gso::TCPV4,
        hdr_len: u16::try_from(HEADERS).unwrap(),
        gso_size: SEGMENT,
        csum_start: L4,
        csum_offset: TCP_SUM,
        num_buffers: 0,
    }
}

fn config(features: u64) -> Config {
    Config { features, transmit_room: ROOM, ..Config::default() }
}

fn transmit(device: &mut Device, frame: &[u8], header: &VnetHeader) {
    let transmit = &mut device.first().transmit;
    transmit.send(frame, header, Layout::HeaderApart).unwrap();
    transmit.drain(PATIENCE).unwrap();
}

#[test]
fn a_large_tcp_frame_from_the_guest_stays_one_frame_and_counts_its_segments() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(FEATURES | OFFLOADS));
    let frame = unfinished(PAYLOAD);
    transmit(&mut device, &frame, &tso());
    let received = rig.wire().receive();
    assert!(received.bytes == frame, "{} bytes instead of {}", received.bytes.len(), frame.len());
    assert_eq!(received.header, tso());
    let (counts, _) = rig.check(0, &device, 0);
    let bytes = u64::try_from(frame.len()).unwrap();
    let wire = bytes + (SEGMENTS - 1) * u64::try_from(HEADERS).unwrap();
    let passed = counts.passed;
    assert_eq!((passed.frames, passed.packets, passed.bytes, passed.wire_bytes), (1, SEGMENTS, bytes, wire));
}

#[test]
fn a_checksum_left_out_by_the_guest_is_still_left_out_at_the_tap() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(FEATURES | OFFLOADS));
    let frame = unfinished(700);
    let header = VnetHeader { gso_type: gso::NONE, gso_size: 0, hdr_len: 0, ..tso() };
    transmit(&mut device, &frame, &header);
    let received = rig.wire().receive();
    assert!(received.bytes == frame);
    let (came, sent) = (received.header, header);
    assert_eq!((came.flags, came.gso_type), (sent.flags, sent.gso_type));
    assert_eq!((came.csum_start, came.csum_offset), (sent.csum_start, sent.csum_offset));
    rig.check(0, &device, 0);
}

#[test]
fn a_large_tcp_frame_for_the_guest_arrives_whole_where_the_driver_takes_it() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(FEATURES | OFFLOADS));
    let frame = unfinished(PAYLOAD);
    rig.wire().send_with(&tso(), &frame);
    let received = device.first().receive.receive_within(PATIENCE).unwrap();
    assert!(received.bytes == frame, "{} bytes instead of {}", received.bytes.len(), frame.len());
    assert_eq!(received.strays, 0);
    let buffers = received.header.num_buffers;
    assert_eq!(VnetHeader { num_buffers: 0, ..received.header }, tso());
    assert_eq!(usize::from(buffers), (frame.len() + 12).div_ceil(1536));
    let (_, counts) = rig.check(0, &device, 0);
    assert_eq!((counts.passed.frames, counts.passed.packets), (1, SEGMENTS));
}

#[test]
fn what_the_driver_takes_holds_for_every_queue_of_the_tap() {
    let features = FEATURES | OFFLOADS | feature::MQ | feature::CTRL_VQ;
    for (features, frames) in [(features, 1), (features & !feature::GUEST_TSO4, SEGMENTS)] {
        let rig = Rig::one("queue_pairs = 3");
        let mut device = rig.connect(0, Config { pairs: 3, ..config(features) });
        wait_attached(&rig, 3);
        let frame = unfinished(PAYLOAD);
        for pair in &mut device.pairs {
            pair.transmit.send(&frame, &tso(), Layout::HeaderApart).unwrap();
            pair.transmit.drain(PATIENCE).unwrap();
            assert_eq!(rig.wire().receive().header, tso());
            // The flow comes back to the pair that it left from.
            rig.wire().send_with(&tso(), &frame);
            for _ in 0..frames {
                pair.receive.receive_within(PATIENCE).unwrap();
            }
        }
        let (_, counts) = rig.check(0, &device, 0);
        assert_eq!((counts.passed.frames, counts.passed.packets), (3 * frames, 3 * SEGMENTS));
    }
}

#[test]
fn a_large_tcp_frame_is_segmented_by_the_kernel_for_a_driver_that_takes_none() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(FEATURES));
    let frame = unfinished(PAYLOAD);
    rig.wire().send_with(&tso(), &frame);
    let mut payload = Vec::new();
    for _ in 0..SEGMENTS {
        let received = device.first().receive.receive_within(PATIENCE).unwrap();
        assert_eq!((received.header.flags & flag::NEEDS_CSUM, received.header.gso_type), (0, gso::NONE));
        let sum = Ends::default().transport_sum(6, &received.bytes[at::L4..]);
        assert_eq!(sum, 0, "the kernel finished the checksum");
        payload.extend_from_slice(&received.bytes[HEADERS..]);
    }
    assert!(payload == frame[HEADERS..]);
    let (_, counts) = rig.check(0, &device, 0);
    assert_eq!((counts.passed.frames, counts.passed.packets), (SEGMENTS, SEGMENTS));
}

#[test]
fn a_header_that_does_not_fit_its_frame_is_a_counted_drop() {
    let wrong = [
        VnetHeader { csum_start: L4 + 2, ..tso() },
        VnetHeader { csum_start: 0, ..tso() },
        VnetHeader { csum_start: u16::MAX, ..tso() },
        VnetHeader { csum_offset: 6, ..tso() },
        VnetHeader { gso_type: gso::TCPV6, ..tso() },
        VnetHeader { gso_size: 0, ..tso() },
    ];
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(FEATURES | OFFLOADS));
    for (count, header) in (1..).zip(&wrong) {
        transmit(&mut device, &unfinished(PAYLOAD), header);
        let (counts, _) = rig.check(0, &device, 0);
        assert_eq!(dropped(&counts, DropReason::BadOffload), count, "{header:?}: {counts:?}");
    }
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn offloads_that_the_driver_did_not_negotiate_are_a_counted_drop() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(FEATURES));
    let sum = VnetHeader { gso_type: gso::NONE, gso_size: 0, hdr_len: 0, ..tso() };
    let unknown = VnetHeader { gso_type: 0x7f, ..tso() };
    for (count, (payload, header)) in (1..).zip([(PAYLOAD, tso()), (PAYLOAD, unknown), (700, sum)]) {
        transmit(&mut device, &unfinished(payload), &header);
        let (counts, _) = rig.check(0, &device, 0);
        assert_eq!(dropped(&counts, DropReason::NotNegotiated), count, "{header:?}: {counts:?}");
    }
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn frames_and_segments_beyond_the_mtu_are_a_counted_drop() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(FEATURES | OFFLOADS));
    let plain = VnetHeader::default();
    for (count, (payload, header)) in
        (1..).zip([(1515 - HEADERS, plain), (PAYLOAD, VnetHeader { gso_size: 1461, ..tso() })])
    {
        transmit(&mut device, &unfinished(payload), &header);
        let (counts, _) = rig.check(0, &device, 0);
        assert_eq!(dropped(&counts, DropReason::Oversize), count, "{header:?}: {counts:?}");
    }
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn a_large_frame_fits_into_chains_that_cannot_be_merged() {
    let rig = Rig::one("");
    let features = (FEATURES | OFFLOADS) & !feature::MRG_RXBUF;
    let posting = Posting::chain(&[12, 4096, 4096, 4096, 4096, 4096]);
    let mut device = rig.connect(0, Config { posting, ..config(features) });
    let frame = unfinished(PAYLOAD);
    rig.wire().send_with(&tso(), &frame);
    let received = device.first().receive.receive_within(PATIENCE).unwrap();
    assert!(received.bytes == frame && received.strays == 0);
    assert_eq!(VnetHeader { num_buffers: 0, ..received.header }, tso());
    rig.check(0, &device, 0);
}
