//! The driver's half against a device's half of a few lines.

use std::time::{Duration, Instant};

use super::events::crossed;
use super::*;
use crate::memory::Layout;
use crate::ring::NO_NOTIFICATION;

const SIZE: u16 = 8;
/// The longest that a test waits for what must not come.
const SHORT: Duration = Duration::from_millis(20);
/// The longest that a test waits for what must come.
const LONG: Duration = Duration::from_secs(5);

fn queue(options: Options) -> (Queue, Memory) {
    let mut memory = Memory::new(&Layout::single(1 << 20)).expect("memory");
    let queue = Queue::new(&mut memory, SIZE, options).expect("queue");
    (queue, memory)
}

fn buffer(addr: u64, len: u32) -> Buffer {
    Buffer { addr, len, writable: false }
}

/// The device's half: takes heads in order, gives back what it is told to.
struct Device {
    ring: Ring,
    taken: u16,
    done: u16,
}

impl Device {
    fn of(queue: &Queue) -> Self {
        Self { ring: queue.ring().clone(), taken: queue.available_idx(), done: queue.used_idx() }
    }

    fn take(&mut self) -> Option<u16> {
        if self.taken == self.ring.available_idx() {
            return None;
        }
        let head = self.ring.available(self.taken % SIZE);
        self.taken = self.taken.wrapping_add(1);
        Some(head)
    }

    fn give(&mut self, head: u16, len: u32) {
        self.ring.set_used(self.done % SIZE, head.into(), len);
        self.done = self.done.wrapping_add(1);
        self.ring.set_used_idx(self.done);
    }
}

#[test]
fn a_chain_is_linked_as_the_device_reads_it() {
    let (mut queue, _memory) = queue(Options::default());
    let last = Buffer { writable: true, ..buffer(0x3000, 3) };
    let head = queue.add(&[buffer(0x1000, 1), buffer(0x2000, 2), last], false).expect("room");
    let ring = queue.ring();
    let first = ring.descriptor(head);
    assert_eq!((first.addr, first.len, first.flags), (0x1000, 1, descriptor::NEXT));
    let second = ring.descriptor(first.next);
    assert_eq!((second.addr, second.flags), (0x2000, descriptor::NEXT));
    let third = ring.descriptor(second.next);
    assert_eq!(third, Descriptor { addr: 0x3000, len: 3, flags: descriptor::WRITE, next: 0 });
    assert_eq!(queue.free(), SIZE - 3);
    assert_eq!(queue.ring().available_idx(), 0, "not published yet");
    assert_eq!(queue.publish(), 1);
    assert_eq!(queue.ring().available_idx(), 1);
}

#[test]
fn an_indirect_chain_takes_one_descriptor_and_fills_its_own_table() {
    let (mut queue, _memory) = queue(Options { indirect: 4, ..Options::default() });
    let head = queue.add(&[buffer(0x1000, 1), buffer(0x2000, 2)], true).expect("room");
    let table = queue.table(head).expect("table").clone();
    let want = Descriptor { addr: table.guest, len: 32, flags: descriptor::INDIRECT, next: 0 };
    assert_eq!(queue.ring().descriptor(head), want);
    let first = Descriptor::read(&table.area, 0);
    assert_eq!(first, Descriptor { addr: 0x1000, len: 1, flags: descriptor::NEXT, next: 1 });
    assert_eq!(queue.free(), SIZE - 1);
    assert_eq!(queue.add(&[buffer(0, 0); 5], true), Err(Refused::TooLong));
}

#[test]
fn a_full_queue_refuses_and_release_makes_room_again() {
    let (mut queue, _memory) = queue(Options::default());
    let mut device = Device::of(&queue);
    assert_eq!(queue.add(&[], false), Err(Refused::Empty));
    assert_eq!(queue.add(&[buffer(0, 1); 9], false), Err(Refused::TooLong));
    let head = queue.add(&[buffer(0, 1); 5], false).expect("room");
    assert_eq!(queue.add(&[buffer(0, 1); 4], false), Err(Refused::Full));
    queue.publish();
    device.give(head, 0);
    assert_eq!(queue.next_used(), Ok(Some(Used { head, len: Some(0) })));
    assert_eq!(queue.free(), 3, "taken until released");
    queue.release(head);
    assert_eq!(queue.free(), SIZE);
}

#[test]
fn every_chain_comes_back_once_over_the_wrap_of_both_indices() {
    let options = Options { start: u16::MAX - 100, event_idx: true, ..Options::default() };
    let (mut queue, _memory) = queue(options);
    let mut device = Device::of(&queue);
    let (mut sent, mut back) = (0_u64, 0_u64);
    while back < 200_000 {
        while queue.add(&[buffer(sent, 1)], false).is_ok() {
            sent += 1;
        }
        queue.publish();
        while let Some(head) = device.take() {
            assert_eq!(
                queue.ring().descriptor(head).addr,
                back + u64::from(queue.ring().used_idx().wrapping_sub(queue.used_idx()))
            );
            device.give(head, 0);
        }
        while let Some(used) = queue.next_used().expect("no fault") {
            queue.release(used.head);
            back += 1;
        }
    }
    assert_eq!(sent, back);
    assert_eq!(queue.notifications().out_of_order, 0);
}

#[test]
fn chains_given_back_in_disorder_are_all_freed_and_counted() {
    let (mut queue, _memory) = queue(Options::default());
    let mut device = Device::of(&queue);
    let heads: Vec<u16> = (0..4).map(|_| queue.add(&[buffer(0, 1); 2], false).expect("room")).collect();
    queue.publish();
    for head in heads.iter().rev() {
        device.give(*head, 0);
    }
    let back: Vec<u16> = queue.used().map(|used| used.expect("no fault").head).collect();
    assert!(back.iter().eq(heads.iter().rev()));
    for head in back {
        queue.release(head);
    }
    assert_eq!(queue.free(), SIZE);
    assert_eq!(queue.notifications().out_of_order, 4);
    assert!(queue.add(&[buffer(0, 1); 8], false).is_ok(), "all eight are there, each once");
}

#[test]
fn in_order_one_element_may_stand_for_a_batch() {
    let (mut queue, _memory) = queue(Options { in_order: true, ..Options::default() });
    let heads: Vec<u16> = (0..4).map(|_| queue.add(&[buffer(0, 1)], false).expect("room")).collect();
    queue.publish();
    queue.ring().set_used(0, heads[2].into(), 9);
    queue.ring().set_used_idx(3);
    let used: Vec<Used> = queue.used().map(|used| used.expect("no fault")).collect();
    assert_eq!(used.iter().map(|used| used.head).collect::<Vec<_>>(), heads[..3]);
    assert_eq!(used.iter().map(|used| used.len).collect::<Vec<_>>(), [None, None, Some(9)]);
    assert_eq!(queue.in_flight(), 1);
}

#[test]
fn a_device_that_lies_is_caught() {
    let (mut queue, _memory) = queue(Options::default());
    let mut device = Device::of(&queue);
    let head = queue.add(&[buffer(0, 1)], false).expect("room");
    queue.publish();
    queue.ring().set_used_idx(2);
    assert_eq!(queue.next_used(), Err(Fault::Jump { from: 0, to: 2 }));
    device.ring.set_used(0, 70_000, 0);
    queue.ring().set_used_idx(1);
    assert_eq!(queue.next_used(), Err(Fault::NotInFlight { head: 70_000 }));
    device.done = 1;
    queue.push_raw(head);
    queue.push_raw(head);
    queue.publish();
    device.give(head, 0);
    device.give(head, 0);
    assert!(queue.next_used().expect("the chain itself").is_some());
    assert_eq!(queue.next_used(), Err(Fault::NotInFlight { head: head.into() }));
}

#[test]
fn without_event_idx_flags_decide_about_kicks() {
    let (mut queue, _memory) = queue(Options::default());
    queue.add(&[buffer(0, 1)], false).expect("room");
    assert!(!queue.kick_if_needed().expect("kick"), "nothing was published");
    queue.publish();
    assert!(queue.kick_if_needed().expect("kick"));
    queue.ring().set_used_flags(NO_NOTIFICATION);
    queue.add(&[buffer(0, 1)], false).expect("room");
    queue.publish();
    assert!(!queue.kick_if_needed().expect("kick"));
    assert_eq!(queue.notifications().kicks, 1);
}

#[test]
fn with_event_idx_a_kick_is_sent_when_the_event_is_passed_and_only_then() {
    let (mut queue, _memory) = queue(Options { event_idx: true, start: u16::MAX, ..Options::default() });
    queue.ring().set_available_event(1);
    let mut kicks = Vec::new();
    for _ in 0..4 {
        queue.add(&[buffer(0, 1)], false).expect("room");
        queue.publish();
        kicks.push(queue.kick_if_needed().expect("kick"));
    }
    // The chains have the indices 65535, 0, 1, 2; the device asked for 1.
    assert_eq!(kicks, [false, false, true, false]);
}

#[test]
fn a_lost_call_is_told_apart_from_a_device_that_does_nothing() {
    let (mut queue, _memory) = queue(Options { event_idx: true, ..Options::default() });
    let mut device = Device::of(&queue);
    let head = queue.add(&[buffer(0, 1)], false).expect("room");
    queue.publish();
    assert!(matches!(queue.wait(SHORT), Err(Silence::Nothing(SHORT))));
    assert_eq!(queue.ring().used_event(), 0, "a call was asked for");
    let driver = rustix::thread::gettid().as_raw_nonzero();
    let forgets = std::thread::spawn(move || {
        let until = Instant::now() + LONG;
        while !sleeps(driver.get()) {
            assert!(Instant::now() < until, "the driver never waits");
        }
        device.give(head, 0);
    });
    let silence = queue.wait(LONG / 10);
    forgets.join().expect("device");
    assert!(matches!(silence, Err(Silence::LostCall(_))), "{silence:?}");
}

/// Whether a thread of this process sleeps in the kernel.
fn sleeps(thread: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).expect("stat");
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S'))
}

#[test]
fn a_call_ends_the_wait_and_is_counted() {
    let (mut queue, _memory) = queue(Options::default());
    let mut device = Device::of(&queue);
    let head = queue.add(&[buffer(0, 1)], false).expect("room");
    queue.publish();
    let call = queue.call_event().try_clone_to_owned().expect("dup");
    let calls = std::thread::spawn(move || {
        device.give(head, 0);
        rustix::io::write(&call, &1_u64.to_ne_bytes()).expect("call");
    });
    queue.wait(LONG).expect("called");
    calls.join().expect("device");
    queue.take_calls().expect("calls");
    assert_eq!(queue.notifications().calls, 1);
}

#[test]
fn a_poller_asks_for_no_calls() {
    let (mut with, _memory) = queue(Options { event_idx: true, ..Options::default() });
    with.refuse_calls();
    assert!(!crossed(with.ring().used_event(), 0, SIZE), "no batch that fits the ring crosses it");
    let (mut without, _memory) = queue(Options::default());
    without.refuse_calls();
    assert_eq!(without.ring().available_flags(), NO_NOTIFICATION);
}
