//! What the guest sends.

use super::*;

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
    assert_eq!(turn, Turn { frames: 1, signal: true, ..Turn::default() });
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
fn the_longest_frame_that_the_mtu_allows_arrives_whole() {
    let mut rig = rig();
    rig.mtu = 65_521;
    let bytes = with_header(&frame(65_535));
    // In pieces that end within the part that is looked at, and behind it.
    for (n, (at, len)) in (0..).zip([(0, 100), (100, 200), (300, 65_247)]) {
        rig.memory.write_slice(&bytes[at..at + len], GuestAddress(BUFFERS + 0x2_0000 * n)).unwrap();
        let next = if n < 2 { NEXT } else { 0 };
        let place = u16::try_from(n).unwrap();
        let len = u32::try_from(len).unwrap();
        rig.descriptor(TABLE, place, (BUFFERS + 0x2_0000 * n, len, next, place + 1));
    }
    rig.make_available(0);
    let _ = rig.transmit();
    assert_eq!(rig.at_far_end().unwrap(), bytes);
    assert_eq!(rig.sent().passed.bytes, 65_535);
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
        assert_eq!(turn.waits_for, (rig.used_index() < 40).then_some(WaitsFor::Room));
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
fn a_guest_is_not_asked_for_kicks_while_its_ring_is_looked_at_again_anyway() {
    for event_idx in [true, false] {
        let mut rig = rig();
        rig.queue.set_event_idx(event_idx);
        let asked = |rig: &Rig| {
            let at = if event_idx { USED + 4 + 8 * u64::from(SIZE) } else { USED };
            u16::from_le(rig.memory.read_obj(GuestAddress(at)).unwrap())
        };
        rig.offer(0, &with_header(&frame(60)));
        let _ = rig.transmit();
        assert_eq!(asked(&rig), u16::from(event_idx), "with an index: the next one; without: no flag");
        rig.looks_again = true;
        rig.offer(1, &with_header(&frame(60)));
        assert_eq!(rig.transmit().frames, 1);
        assert_eq!(asked(&rig), 1, "with an index: one that is gone by; without: the flag");
        assert_eq!(rig.transmit().frames, 0);
        rig.looks_again = false;
        let _ = rig.transmit();
        assert_eq!(asked(&rig), if event_idx { 2 } else { 0 });
    }
}

#[test]
fn the_indices_wrap_without_a_lost_or_doubled_frame() {
    let mut rig = rig();
    rig.memory.write_obj(65_500_u16.to_le(), GuestAddress(USED + 2)).unwrap();
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
