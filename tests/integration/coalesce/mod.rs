//! Neighbouring frames of a flow go to the tap in one write, and leave the host as the guest sent them.
//!
//! ```text
//!   specification --- bytes --- driver --- vmflow --- tap --- bridge --- tap without offloads
//!         |                                            |                          |
//!     what must leave the host                  what was written           what left the host
//! ```

mod bed;
mod mix;
mod oracle;
mod spec;

use std::cell::RefCell;

use proptest::test_runner::{Config, TestCaseError, TestRunner};

use vmflow_driver::{net::FEATURES, request::feature};

use crate::harness::count;
use bed::{Bed, Counted};
use mix::{Mix, mixes};
use spec::{DONT_FRAGMENT, IpSum, MORE_FRAGMENTS, Sent, Spec, Sum, TCP, UDP};

/// Frames that the guest sends at once.
const AT_ONCE: usize = 240;

/// Every kind of flow whose frames can go together.
fn flows() -> Vec<Spec> {
    let stamps = vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    let [tcp4, tcp6, udp4, udp6] =
        [(TCP, false), (TCP, true), (UDP, false), (UDP, true)].map(|(p, v6)| Spec::plain(p, v6, 100));
    vec![
        Spec { options: stamps.clone(), ..tcp4.clone() },
        Spec { options: stamps, tags: vec![(0x8100, 0x6005)], ..tcp6.clone() },
        Spec { fragment: DONT_FRAGMENT, ..udp4.clone() },
        Spec { tags: vec![(0x88a8, 7), (0x8100, 5)], ..udp6.clone() },
        Spec { sum: Sum::Unfinished(0), fragment: DONT_FRAGMENT, ..tcp4.clone() },
        Spec { sum: Sum::Unfinished(0), ..udp6.clone() },
        tcp4,
        tcp6,
        udp4,
        udp6,
    ]
}

/// The frame after this one in its flow.
fn next(spec: &Spec) -> Spec {
    let sequence = spec.sequence.wrapping_add(u32::try_from(spec.payload).unwrap());
    Spec { sequence, id: spec.id.wrapping_add(1), number: spec.number + 1, ..spec.clone() }
}

/// So many frames of a flow.
fn run(first: &Spec, frames: usize) -> Vec<Sent> {
    std::iter::successors(Some(first.clone()), |spec| Some(next(spec)))
        .take(frames)
        .map(|s| s.sent())
        .collect()
}

fn mixes_pass(mixes: impl proptest::strategy::Strategy<Value = Mix>, cases: u32) {
    let bed = RefCell::new(Bed::new(""));
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&mixes, |mix| {
        let counted = bed.borrow_mut().pass(&mix.sent()).map_err(TestCaseError::fail)?;
        if mix.must_coalesce() && counted.writes == counted.frames {
            return Err(TestCaseError::fail(format!("nothing was coalesced: {counted:?}")));
        }
        Ok(())
    });
    outcome.unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn every_mix_of_short_runs_leaves_the_host_as_the_guest_sent_it() {
    mixes_pass(mixes(6, 12), count(200, 10_000));
}

#[test]
fn every_mix_of_long_runs_leaves_the_host_as_the_guest_sent_it() {
    mixes_pass(mixes(2, 200), count(50, 2_000));
}

#[test]
fn a_run_goes_in_few_writes() {
    let mut bed = Bed::new("");
    for flow in flows() {
        for payload in [1, 18, 100, 1000, 1400] {
            for frames in [2, 3, 44, 130, AT_ONCE] {
                let sent = run(&Spec { payload, ..flow.clone() }, frames);
                let counted = bed.pass(&sent).unwrap_or_else(|e| panic!("{flow:?} {e}"));
                let Counted { writes, .. } = counted;
                assert!(writes * 20 <= number(frames) + 20, "{writes} writes of {frames} frames: {flow:?}");
            }
        }
    }
}

#[test]
fn frames_that_differ_in_one_bit_of_their_headers_leave_the_host_as_they_were_sent() {
    let mut bed = Bed::new("");
    let mut sent = Vec::new();
    for flow in flows() {
        let mut first = flow.clone();
        for repaired in [false, true] {
            for bit in 0..8 * flow.headers() {
                let (place, bits) = (bit / 8, 1 << (bit % 8));
                if (place, bits) == (6, 1) {
                    continue; // a bridge takes no frame from a group
                }
                let [second, third] = [next(&first), next(&next(&first))];
                sent.extend([first.sent(), second.with_changed(place, bits, repaired), third.sent()]);
                first = next(&third);
                if sent.len() + 3 > AT_ONCE {
                    bed.pass(&sent).unwrap_or_else(|e| panic!("{flow:?}, up to bit {bit}: {e}"));
                    sent.clear();
                }
            }
        }
    }
    bed.pass(&sent).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_checksum_that_can_be_written_in_two_ways_leaves_the_host_as_it_was_written() {
    let mut bed = Bed::new("");
    for flow in flows().into_iter().filter(|flow| !flow.is_unfinished()) {
        // The special one is the first, the second or the last of a run.
        for place in 0..3 {
            let first = Spec { id: flow.id_for_zero().wrapping_sub(place), ..flow.clone() };
            let run: Vec<_> = std::iter::successors(Some(first), |spec| Some(next(spec))).take(3).collect();
            let special = &run[usize::from(place)];
            let specials = [
                Spec { sums_to_zero: true, sum: Sum::Right, ..special.clone() },
                Spec { sums_to_zero: true, sum: Sum::Ones, ..special.clone() },
                Spec { sums_to_zero: true, sum: Sum::Zero, ..special.clone() },
                Spec { ip_sum: IpSum::Right, ..special.clone() },
                Spec { ip_sum: IpSum::Ones, ..special.clone() },
            ];
            for special in specials {
                let mut run = run.clone();
                run[usize::from(place)] = special.clone();
                let sent: Vec<_> = run.iter().map(Spec::sent).collect();
                bed.pass(&sent).unwrap_or_else(|e| panic!("{special:?}: {e}"));
            }
        }
    }
}

#[test]
fn a_run_that_all_but_fills_the_longest_packet_ends_where_it_is_full() {
    /// A packet that is a little longer than its 16 bits of length can say.
    const TOO_LONG: std::ops::Range<usize> = 65_536..65_543;
    let mut bed = Bed::new("");
    for flow in flows() {
        let ip_headers = flow.headers() - 14 - 4 * flow.tags.len();
        let lengths = (46..=60).flat_map(|frames| (1000..1400).map(move |payload| (frames, payload)));
        let (frames, payload) =
            lengths.into_iter().find(|(n, payload)| TOO_LONG.contains(&(ip_headers + n * payload))).unwrap();
        let counted = bed.pass(&run(&Spec { payload, ..flow.clone() }, frames));
        let counted = counted.unwrap_or_else(|e| panic!("{flow:?} {e}"));
        assert_eq!(counted.writes, 2, "{flow:?}");
    }
}

#[test]
fn segments_with_flags_that_not_all_of_a_run_can_have_go_alone() {
    const FRAMES: usize = 5;
    let [fin, syn, rst, psh, ack, urg, ece, cwr] = std::array::from_fn(|bit| 1 << bit);
    let mut bed = Bed::new("");
    for flow in flows().into_iter().filter(|flow| flow.protocol == TCP) {
        for (flags, together) in [
            (ack, true),
            (ack | ece, true),
            (0, true),
            (ack | fin, false),
            (ack | syn, false),
            (ack | rst, false),
            (ack | psh, false),
            (ack | urg, false),
            (ack | cwr, false),
        ] {
            let counted = bed.pass(&run(&Spec { flags, ..flow.clone() }, FRAMES));
            let counted = counted.unwrap_or_else(|e| panic!("{flags:#x} {flow:?} {e}"));
            let writes = if together { 1 } else { counted.frames };
            assert_eq!(counted.writes, writes, "{flags:#x} {flow:?}");
        }
    }
}

#[test]
fn frames_that_are_no_segments_go_alone() {
    const FRAMES: usize = 5;
    let [tcp, udp] = [TCP, UDP].map(|protocol| Spec::plain(protocol, false, 100));
    let alone = [
        Spec { payload: 0, ..tcp.clone() },
        Spec { fragment: MORE_FRAGMENTS, ..tcp.clone() },
        Spec { fragment: MORE_FRAGMENTS, ..udp.clone() },
        Spec { fragment: 185, ..udp.clone() },
        Spec { ip_options: 1, ..tcp.clone() },
        Spec { extension: true, ..Spec::plain(UDP, true, 100) },
        Spec { tags: vec![(0x8100, 1); 3], ..tcp.clone() },
        Spec { padding: 6, ..udp.clone() },
        Spec { ip_sum: IpSum::Wrong(1), ..tcp.clone() },
        Spec { sum: Sum::Wrong(1), ..tcp.clone() },
        Spec { sum: Sum::Wrong(1), ..udp.clone() },
        Spec { sum: Sum::Zero, ..udp.clone() },
        Spec { sum: Sum::Unfinished(1), ..udp.clone() },
        Spec { udp_length: u16::MAX, ..udp.clone() },
        Spec { ip_length: u16::MAX, ..tcp },
        Spec { protocol: 136, ..udp },
    ];
    let mut bed = Bed::new("");
    for flow in alone {
        let counted = bed.pass(&run(&flow, FRAMES)).unwrap_or_else(|e| panic!("{flow:?} {e}"));
        assert_eq!((counted.frames, counted.writes), (number(FRAMES), number(FRAMES)), "{flow:?}");
    }
}

#[test]
fn a_drivers_features_do_not_matter_to_runs_without_offloads() {
    let legacy = FEATURES & !(feature::VERSION_1 | feature::MRG_RXBUF);
    for features in [FEATURES, legacy] {
        let mut bed = Bed::with("", features);
        for flow in flows().iter().filter(|flow| !flow.is_unfinished()) {
            let counted = bed.pass(&run(flow, AT_ONCE)).unwrap_or_else(|e| panic!("{flow:?} {e}"));
            assert!(counted.writes * 20 <= counted.frames + 20, "{counted:?}: {flow:?}");
        }
    }
}

#[test]
fn a_port_that_does_not_coalesce_writes_each_frame_alone() {
    let mut bed = Bed::new("coalesce = false");
    for flow in flows() {
        let counted = bed.pass(&run(&flow, AT_ONCE)).unwrap_or_else(|e| panic!("{flow:?} {e}"));
        assert_eq!((counted.frames, counted.writes), (number(AT_ONCE), number(AT_ONCE)));
    }
}

fn number(n: usize) -> u64 {
    u64::try_from(n).unwrap()
}
