//! What the guest gets.

use super::*;

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
    rig.receive = Receive::new(Account::succeed(&rig.ledger, Part::receive(0), SESSION));
    rig.fresh = true;
    let _ = rig.receive();
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
