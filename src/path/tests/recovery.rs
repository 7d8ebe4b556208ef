//! A worker dies before each store and each tap operation of a batch, and its successor dies too; whoever comes
//! after them must find what happened, to the frame.
//!
//! The model is what the outside saw: the far end of the tap, and the guest's used ring.

use vmflow_driver::frame::{Ends, pattern};

use super::*;
use crate::{
    ledger::{fault, recover},
    path::ring::settle,
};

/// How a worker is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// By another one on the same ring, which lives.
    Lives,
    /// By one that dies after so many moments, and then by one that lives.
    DiesAfter(usize),
}

impl Rig {
    /// Another worker of the same connection: it knows nothing but the ledger, and the guest's memory.
    fn new_worker(&mut self) {
        self.transmit = Transmit::new(Account::succeed(&self.ledger, Part::transmit(0), SESSION));
        self.receive = Receive::new(Account::succeed(&self.ledger, Part::receive(0), SESSION));
        self.queue.set_next_avail(0);
        self.queue.set_next_used(0);
        self.fresh = true;
    }

    /// Runs `work` in a worker that dies after so many moments; then in its successors, until one lives. Gives
    /// the number of deaths; none means that `moments` is beyond the end.
    fn with_deaths(&mut self, moments: usize, next: Next, work: fn(&mut Self)) -> u64 {
        let mut deaths = 0;
        let mut plan = vec![moments];
        if let Next::DiesAfter(moments) = next {
            plan.push(moments);
        }
        for moments in plan {
            if fault::run_until(moments, || work(self)).is_ok() {
                return deaths;
            }
            deaths += 1;
            self.new_worker();
        }
        work(self);
        deaths
    }

    fn uncertain(&self, part: Part) -> u64 {
        let mut known = Known::new(part);
        known.refresh(&self.ledger);
        known.uncertain()
    }
}

/// What the guest sends: frames that pass, between those that do not.
const SENT: u16 = 7;
const FORWARDED: [usize; 4] = [60, 62, 64, 66];

fn offer_all(rig: &mut Rig) {
    for n in 0..SENT {
        let len = if n % 2 == 1 { 13 } else { 60 + usize::from(n) };
        rig.offer(n, &with_header(&frame(len)));
    }
}

fn send_all(rig: &mut Rig) {
    while rig.used_index() < SENT {
        let _ = rig.transmit();
    }
}

fn check_sent(rig: &Rig, deaths: u64, case: &str) {
    let sent = rig.sent();
    let mut arrived: Vec<usize> = std::iter::from_fn(|| rig.at_far_end()).map(|f| f.len() - 12).collect();
    let uncertain = rig.uncertain(Part::transmit(0));
    let doubled = (arrived.len() - FORWARDED.len()) as u64;
    assert!(doubled <= uncertain && uncertain <= deaths, "{case}: {doubled} doubled, {uncertain} uncertain");
    assert!(arrived.is_sorted(), "{case}: {arrived:?}");
    arrived.dedup();
    assert_eq!(arrived, FORWARDED, "{case}");
    assert_eq!((sent.chains, sent.passed.frames, sent.tap_operations), (7, 4, 4), "{case}");
    assert_eq!((sent.passed.bytes, sent.tap_bytes, sent.dropped_bytes), (252, 252, 39), "{case}");
    assert_eq!(dropped(&sent, DropReason::Runt), 3, "{case}");
    assert_eq!(rig.used_index(), SENT, "{case}");
    assert!((0..SENT).all(|n| rig.used(n) == (u32::from(n), 0)), "{case}");
}

#[test]
fn a_worker_that_dies_at_any_moment_of_a_transmit_batch_is_taken_over_to_the_frame() {
    let mut moments = 0;
    loop {
        let mut rig = rig();
        offer_all(&mut rig);
        let deaths = rig.with_deaths(moments, Next::Lives, send_all);
        check_sent(&rig, deaths, &format!("dies after {moments}"));
        if deaths == 0 {
            break;
        }
        moments += 1;
    }
    assert!(moments > 100, "{moments} moments only: are the stores watched?");
}

#[test]
fn a_successor_that_dies_too_changes_nothing_about_it() {
    for first in 0.. {
        for second in (0..).step_by(3) {
            let mut rig = rig();
            offer_all(&mut rig);
            let deaths = rig.with_deaths(first, Next::DiesAfter(second), send_all);
            check_sent(&rig, deaths, &format!("dies after {first}, then after {second}"));
            match deaths {
                0 => return,
                1 => break,
                _ => {}
            }
        }
    }
}

/// Runs of three, one and two datagrams, each of a length of its own, with a runt in between: the longest first, so
/// that each may follow the one before it, and no two runs are of one flow.
fn offer_runs(rig: &mut Rig) {
    let flow = |n: u16| Ends { ports: [n, 9], ..Ends::default() };
    let datagram = |n, len| flow(n).udp(&pattern(len, len as u64));
    let frames = [
        datagram(1, 90),
        datagram(1, 90),
        datagram(1, 80),
        frame(13),
        datagram(2, 70),
        datagram(3, 60),
        datagram(3, 50),
    ];
    for (n, frame) in (0..).zip(frames) {
        rig.offer(n, &with_header(&frame));
    }
}

/// The payload bytes of each write of [`offer_runs`], in order.
const RUNS: [usize; 3] = [260, 70, 110];

#[test]
fn a_worker_that_dies_in_a_run_of_frames_leaves_that_run_uncertain_and_no_other() {
    let mut moments = 0;
    loop {
        let mut rig = rig();
        offer_runs(&mut rig);
        let deaths = rig.with_deaths(moments, Next::Lives, send_all);
        let case = format!("dies after {moments}");
        let mut arrived: Vec<usize> =
            std::iter::from_fn(|| rig.at_far_end()).map(|f| f.len() - 12 - 42).collect();
        let uncertain = rig.uncertain(Part::transmit(0));
        let frames_of = |run: &usize| RUNS.iter().zip([3, 1, 2]).find(|(len, _)| *len == run).unwrap().1;
        let doubled: u64 = arrived.iter().map(frames_of).sum::<u64>() - 6;
        assert!(
            doubled <= uncertain && uncertain <= 3 * deaths,
            "{case}: {doubled} doubled, {uncertain} uncertain"
        );
        arrived.dedup();
        assert_eq!(arrived, RUNS, "{case}");
        let sent = rig.sent();
        assert_eq!((sent.chains, sent.passed.frames, sent.tap_operations), (7, 6, 3), "{case}");
        assert_eq!((sent.passed.bytes, sent.tap_bytes), (440 + 6 * 42, 440 + 3 * 42), "{case}");
        assert_eq!(rig.used_index(), 7, "{case}");
        if deaths == 0 {
            break;
        }
        moments += 1;
    }
    assert!(moments > 100, "{moments} moments only: are the stores watched?");
}

/// What the host sends: the second frame needs three buffers, and waits for the third.
const RECEIVED: [usize; 4] = [50, 250, 60, 40];
const BUFFERS_POSTED: u16 = 3;

fn inject_all(rig: &mut Rig) {
    for len in RECEIVED {
        rig.far_end.send(&with_header(&frame(len))).unwrap();
    }
    for n in 0..BUFFERS_POSTED {
        rig.post(n, 100);
    }
}

/// One turn with too few buffers, one with enough. Posting is the guest's, who does not die.
fn receive_all(rig: &mut Rig) {
    let _ = rig.receive();
    while rig.avail < 12 {
        rig.post(rig.avail, 100);
    }
    let _ = rig.receive();
}

/// The frames that the guest finds, by their lengths.
fn found_by_guest(rig: &Rig) -> Vec<usize> {
    let mut found = Vec::new();
    let mut place = 0;
    while place < rig.used_index() {
        let (head, _) = rig.used(place);
        let header = rig.guest_bytes(BUFFERS + u64::from(head) * 0x2000, 12);
        let buffers = u16::from_le_bytes([header[10], header[11]]);
        let bytes: u32 = (place..place + buffers).map(|n| rig.used(n).1).sum();
        found.push(bytes as usize - 12);
        place += buffers;
    }
    assert_eq!(place, rig.used_index(), "the last frame is whole");
    found
}

fn check_received(rig: &Rig, deaths: u64, case: &str) {
    let got = rig.got();
    let found = found_by_guest(rig);
    let uncertain = rig.uncertain(Part::receive(0));
    let lost = dropped(&got, DropReason::Restart);
    assert!(uncertain + lost <= deaths, "{case}: {uncertain} uncertain, {lost} lost");
    assert_eq!(got.in_flight, 0, "{case}");
    assert_eq!(got.passed.frames, found.len() as u64, "{case}");
    assert_eq!(got.passed.bytes, found.iter().sum::<usize>() as u64, "{case}");
    assert_eq!((got.chains, got.tap_operations), (got.passed.frames + lost, got.chains), "{case}");
    // What the guest has is what was sent, but for what was lost: in order, nothing twice.
    let mut rest = RECEIVED.iter();
    assert!(found.iter().all(|len| rest.any(|sent| sent == len)), "{case}: {found:?}");
    let missing = RECEIVED.len() as u64 - got.chains;
    assert!(missing <= uncertain, "{case}: {missing} frames are gone and not counted");
    let all: usize = RECEIVED.iter().sum();
    if missing == 0 {
        assert_eq!(got.tap_bytes, all as u64, "{case}");
    }
}

#[test]
fn a_worker_that_dies_at_any_moment_of_a_receive_batch_is_taken_over_to_the_frame() {
    let mut moments = 0;
    loop {
        let mut rig = rig();
        inject_all(&mut rig);
        let deaths = rig.with_deaths(moments, Next::Lives, receive_all);
        check_received(&rig, deaths, &format!("dies after {moments}"));
        if deaths == 0 {
            assert_eq!(found_by_guest(&rig), RECEIVED);
            break;
        }
        moments += 1;
    }
    assert!(moments > 100, "{moments} moments only: are the stores watched?");
}

#[test]
fn a_successor_on_the_receive_ring_may_die_too() {
    for first in 0.. {
        for second in (0..).step_by(3) {
            let mut rig = rig();
            inject_all(&mut rig);
            let deaths = rig.with_deaths(first, Next::DiesAfter(second), receive_all);
            check_received(&rig, deaths, &format!("dies after {first}, then after {second}"));
            match deaths {
                0 => return,
                1 => break,
                _ => {}
            }
        }
    }
}

#[test]
fn what_is_left_of_a_ring_that_is_gone_is_counted_as_far_as_the_tap_saw_it() {
    for moments in 0.. {
        let mut rig = rig();
        offer_all(&mut rig);
        let died = fault::run_until(moments, || send_all(&mut rig)).is_err();
        recover::abandon_all(&rig.ledger);
        let (sent, arrived) = (rig.sent(), std::iter::from_fn(|| rig.at_far_end()).count() as u64);
        let uncertain = rig.uncertain(Part::transmit(0));
        assert!(arrived - sent.tap_operations <= uncertain && uncertain <= 1, "dies after {moments}");
        if !died {
            break;
        }
    }
    for moments in 0.. {
        let mut rig = rig();
        inject_all(&mut rig);
        let died = fault::run_until(moments, || receive_all(&mut rig)).is_err();
        recover::abandon_all(&rig.ledger);
        let (got, read) = (rig.got(), RECEIVED.len() - std::iter::from_fn(|| rig.waits_in_tap()).count());
        let uncertain = rig.uncertain(Part::receive(0));
        assert_eq!(got.in_flight, 0, "dies after {moments}");
        assert!(read as u64 - got.tap_operations <= uncertain && uncertain <= 1, "dies after {moments}");
        let unseen = dropped(&got, DropReason::RestartUnmatched);
        assert!(found_by_guest(&rig).len() as u64 + unseen <= got.chains, "dies after {moments}");
        if !died {
            break;
        }
    }
}

impl Rig {
    /// A frame that is still in the tap.
    fn waits_in_tap(&self) -> Option<()> {
        use std::os::fd::AsFd;
        rustix::io::read(self.tap.as_fd(), &mut [0; 4096]).ok().map(drop)
    }
}

#[test]
fn a_ring_of_another_connection_or_at_another_place_starts_where_the_guest_says() {
    for other in [false, true] {
        let mut rig = rig();
        let _the_ring_begins = rig.transmit();
        offer_all(&mut rig);
        // Dies with some frames sent and nothing published.
        fault::run_until(16, || send_all(&mut rig)).unwrap_err();
        assert_eq!(rig.used_index(), 0);
        let mut account = Account::succeed(&rig.ledger, Part::transmit(0), if other { 2 } else { SESSION });
        if !other {
            rig.queue.try_set_used_ring_address(GuestAddress(USED + 0x800)).unwrap();
        }
        let took_over = settle(&mut rig.queue, &rig.memory, &mut account, if other { 2 } else { SESSION });
        assert_eq!((took_over, rig.queue.next_avail(), rig.used_index()), (Ok(false), 0, 0));
        assert!(rig.sent().passed.frames > 0, "what was sent is counted all the same");
    }
}

#[test]
fn a_used_index_that_the_guest_moved_away_is_believed() {
    let mut rig = rig();
    offer_all(&mut rig);
    send_all(&mut rig);
    rig.memory.write_obj(40_000_u16.to_le(), GuestAddress(USED + 2)).unwrap();
    rig.new_worker();
    let mut account = Account::succeed(&rig.ledger, Part::transmit(0), SESSION);
    assert_eq!(settle(&mut rig.queue, &rig.memory, &mut account, SESSION), Ok(false));
    assert_eq!((rig.queue.next_used(), rig.queue.next_avail()), (40_000, 40_000));
}
