//! The rings: wrap and wake-ups, buffers that are missing or too small, chains and indices that are wrong.

use vmflow::ledger::DropReason;
use vmflow_driver::{
    net::{Config, Device, FEATURES},
    queue::Buffer,
    receive::Posting,
    request::feature,
    sequence::Sequence,
    transmit::Layout,
    vnet::VnetHeader,
};

use crate::{
    harness::{PATIENCE, count, dropped, wait_for},
    rig::{NAMES, Rig, frame, number, passes, receive_one, send_one},
};

/// More than the 65,536 values of a ring's index, each way.
const WRAPPED: u64 = 70_400;
/// Frames that are on their way at once: fewer than the tap's queue holds (500 by default in its qdisc).
const BURST: u64 = 64;
/// Length of the frames of a stream.
const LENGTH: usize = 64;

/// Streams numbered frames both ways in bursts; each must arrive, in order, woken by calls alone.
fn stream(rig: &Rig, device: &mut Device, frames: u64) {
    let pair = device.first();
    for first in (0..frames).step_by(usize::try_from(BURST).unwrap()) {
        for number in first..first + BURST {
            pair.transmit.add(&frame(LENGTH, number), &VnetHeader::default(), Layout::Single).unwrap();
            rig.wire().send(&frame(LENGTH, number));
        }
        pair.transmit.flush().unwrap();
        pair.transmit.drain(PATIENCE).unwrap();
        for expected in first..first + BURST {
            assert_eq!(number(&rig.wire().receive().bytes), expected);
            let received = pair.receive.receive_within(PATIENCE).unwrap();
            assert_eq!(number(&received.bytes), expected);
        }
        pair.receive.refill().unwrap();
    }
}

fn wraps(features: u64) {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config { features, ..Config::default() });
    stream(&rig, &mut device, WRAPPED);
    let (transmit, receive) = rig.check(0, &device, 0);
    assert_eq!((transmit.passed.frames, receive.passed.frames), (WRAPPED, WRAPPED));
}

#[test]
fn indices_wrap_and_no_wake_up_is_lost_with_event_indices() {
    wraps(FEATURES | feature::EVENT_IDX);
}

#[test]
fn indices_wrap_and_no_wake_up_is_lost_without_event_indices() {
    wraps(FEATURES & !feature::EVENT_IDX);
}

#[test]
fn indices_wrap_with_used_elements_in_order() {
    wraps(FEATURES | feature::IN_ORDER);
}

#[test]
fn a_guest_that_refills_late_gets_what_waited_and_the_rest_is_the_kernels() {
    let rig = Rig::one("");
    let config = Config { queue_size: 16, patience: PATIENCE, ..Config::default() };
    let mut device = Device::connect(&rig.socket(0), config).unwrap();
    rig.wait_carrier(0, true);
    let frames: Vec<_> = (0..100).map(|number| frame(LENGTH, number)).collect();
    for frame in &frames {
        rig.wire().send(frame);
    }
    // Nothing is taken from the tap while there is nowhere to put it.
    send_one(&mut device, &frames[0]);
    assert_eq!(rig.wire().receive().bytes, frames[0]);
    let (_, receive) = rig.vmflow.totals(NAMES[0]);
    assert!(receive.chains <= 1 && receive.passed.frames == 0, "{receive:?}");
    device.first().receive.refill().unwrap();
    for frame in &frames {
        assert_eq!(&receive_one(&mut device), frame);
    }
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn a_frame_for_which_the_guests_buffers_are_too_small_is_a_counted_drop() {
    let rig = Rig::one("");
    let config = Config {
        features: FEATURES & !feature::MRG_RXBUF,
        posting: Posting::single(300),
        ..Config::default()
    };
    let mut device = rig.connect(0, config);
    for length in [289, 1514] {
        rig.wire().send(&frame(length, 0));
    }
    passes(&rig, 0, &mut device);
    rig.wire().send(&frame(288, 0));
    assert_eq!(receive_one(&mut device), frame(288, 0));
    let (_, receive) = rig.check(0, &device, 0);
    assert_eq!(dropped(&receive, DropReason::BuffersTooSmall), 2, "{receive:?}");
}

#[test]
fn a_full_ring_that_cannot_hold_a_merged_frame_is_a_counted_drop() {
    let rig = Rig::one("");
    let config = Config { queue_size: 4, posting: Posting::single(256), ..Config::default() };
    let mut device = rig.connect(0, config);
    rig.wire().send(&frame(4 * 256 - 12 + 1, 0));
    passes(&rig, 0, &mut device);
    rig.wire().send(&frame(4 * 256 - 12, 0));
    assert_eq!(receive_one(&mut device), frame(4 * 256 - 12, 0));
    let (_, receive) = rig.check(0, &device, 0);
    assert_eq!(dropped(&receive, DropReason::BuffersTooSmall), 1, "{receive:?}");
}

/// Chains that are no frames: outside of memory, for writing, shorter than a header, empty, half outside.
fn malformed(memory: u64) -> Vec<Vec<Buffer>> {
    let buffer = |addr, len, writable| Buffer { addr, len, writable };
    vec![
        vec![buffer(u64::MAX - 5, 100, false)],
        vec![buffer(memory, 100, false)],
        vec![buffer(memory - 50, 100, false)],
        vec![buffer(0, 100, true)],
        vec![buffer(0, 5, false)],
        vec![buffer(0, 0, false), buffer(0, 0, false)],
        vec![buffer(0, 12, false), buffer(0, 60, true)],
        vec![buffer(0, 12, false), buffer(0, u32::MAX, false)],
    ]
}

#[test]
fn malformed_chains_are_counted_and_the_good_ones_between_them_arrive() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    let memory = device.memory.regions()[0].span.size;
    let bad = malformed(memory);
    let rounds = count(20, 2000);
    let transmit = &mut device.first().transmit;
    let mut good = 0;
    for _ in 0..rounds {
        for chain in &bad {
            transmit.add_chain(chain, false).unwrap();
            transmit.add(&frame(LENGTH, good), &VnetHeader::default(), Layout::Single).unwrap();
            good += 1;
        }
        transmit.flush().unwrap();
        transmit.drain(PATIENCE).unwrap();
    }
    for expected in 0..good {
        assert_eq!(number(&rig.wire().receive().bytes), expected);
    }
    passes(&rig, 0, &mut device);
    let (transmit, _) = rig.check(0, &device, good);
    assert_eq!(dropped(&transmit, DropReason::Malformed), good, "{transmit:?}");
    assert_eq!(rig.vmflow.port(NAMES[0]).queue_faults, 0);
}

#[test]
fn a_frame_shorter_than_an_ethernet_header_is_a_counted_drop() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    for length in 0..14 {
        send_one(&mut device, &frame(100, 0)[..length]);
    }
    passes(&rig, 0, &mut device);
    let (transmit, _) = rig.check(0, &device, 0);
    assert_eq!(dropped(&transmit, DropReason::Runt), 14, "{transmit:?}");
}

/// Breaks one VM's transmit ring; the other one notices nothing, and a reset mends it.
fn breaks(break_it: impl Fn(&mut Device)) {
    let rig = Rig::two();
    for sequence in [Sequence::Plain, Sequence::Qemu, Sequence::CloudHypervisor] {
        let faults = rig.vmflow.port(NAMES[0]).queue_faults;
        let mut other = rig.connect(1, Config::default());
        let mut device = rig.connect(0, Config { sequence, ..Config::default() });
        passes(&rig, 0, &mut device);
        break_it(&mut device);
        wait_for("the fault to be counted", || {
            (rig.vmflow.port(NAMES[0]).queue_faults == faults + 1).then_some(())
        });
        passes(&rig, 1, &mut other);
        // The ring rests: more chains change nothing.
        device.first().transmit.queue.kick().unwrap();
        passes(&rig, 1, &mut other);
        assert_eq!(rig.vmflow.port(NAMES[0]).queue_faults, faults + 1);
        device.reset(0).unwrap();
        device.first().receive.refill().unwrap();
        passes(&rig, 0, &mut device);
        drop((device, other));
        for name in NAMES {
            rig.vmflow.wait_connected(name, false);
        }
    }
    for (vm, name) in NAMES.iter().enumerate() {
        let (transmit, receive) = rig.vmflow.totals(name);
        let kernel = rig.kernel(vm);
        assert_eq!((transmit.passed.frames, receive.chains), (kernel.0.frames, kernel.1));
    }
}

#[test]
fn a_jump_of_the_available_index_stops_that_queue_until_a_reset_and_no_other_vm() {
    breaks(|device| {
        let queue = &mut device.first().transmit.queue;
        queue.ring().set_available_idx(queue.available_idx().wrapping_add(30_000));
        queue.kick().unwrap();
    });
}

#[test]
fn a_head_outside_of_the_ring_stops_that_queue_until_a_reset_and_no_other_vm() {
    breaks(|device| {
        let queue = &mut device.first().transmit.queue;
        queue.push_raw(u16::MAX);
        queue.publish();
        queue.kick().unwrap();
    });
}
