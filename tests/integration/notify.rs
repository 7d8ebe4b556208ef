//! Kicks and calls: no more than the other side needs, by the driver's own count of both.

use vmflow_driver::{
    net::{Config, Device, FEATURES},
    queue::Queue,
    request::feature,
    transmit::Layout,
    vnet::VnetHeader,
};

use crate::{
    harness::{Netns, PATIENCE, count, wait_for},
    rig::{Rig, frame},
    tap,
};

/// Frames of a batch at most.
pub const BATCH: u16 = 64;
/// Batches that the guest makes available at once.
const BATCHES: u16 = 3;
/// Frames that are sent with one kick.
const AT_ONCE: u16 = BATCH * BATCHES;
const LENGTH: usize = 100;

/// Times that the guest sends or gets many frames at once.
fn times() -> u64 {
    count(50, 2000)
}

/// What the guest says of the calls that it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// One, after the last of so many chains; without event indices that cannot be said: it is one a batch.
    After(u16),
    None,
}

impl Wish {
    fn say(self, queue: &mut Queue) {
        match self {
            Self::After(chains) => queue.set_call_after(chains),
            Self::None => queue.refuse_calls(),
        }
    }
}

fn configs() -> [Config; 2] {
    [FEATURES, FEATURES & !feature::EVENT_IDX].map(|features| Config { features, ..Config::default() })
}

fn has_event_idx(config: &Config) -> bool {
    config.features & feature::EVENT_IDX != 0
}

/// Sends so many frames with one kick at most, and waits for them by looking at the ring. Gives the kicks.
pub fn send(device: &mut Device, frames: u16, wish: Wish) -> u64 {
    let transmit = &mut device.first().transmit;
    wish.say(&mut transmit.queue);
    for number in 0..frames {
        transmit.add(&frame(LENGTH, number.into()), &VnetHeader::default(), Layout::Single).unwrap();
    }
    let kicked = transmit.flush().unwrap();
    wait_for("the frames to be sent", || {
        transmit.reclaim().unwrap();
        (transmit.queue.in_flight() == 0).then_some(())
    });
    kicked.into()
}

/// Puts frames into the tap while the guest has no buffer, then posts as many at once. Gives the kicks.
pub fn receive(rig: &Rig, device: &mut Device, wish: Wish) -> u64 {
    for number in 0..BATCH {
        rig.wire().send(&frame(LENGTH, number.into()));
    }
    let receive = &mut device.first().receive;
    wish.say(&mut receive.queue);
    let before = receive.queue.notifications().kicks;
    assert_eq!(receive.post(BATCH).unwrap(), BATCH);
    let kicks = receive.queue.notifications().kicks - before;
    for _ in 0..BATCH {
        wait_for("a frame", || receive.receive().unwrap());
    }
    kicks
}

/// A guest that has no receive buffers yet.
pub fn connect(rig: &Rig, config: Config) -> Device {
    let config = Config { patience: PATIENCE, ..config };
    let mut device = Device::connect(&rig.socket(0), config).unwrap();
    rig.wait_carrier(0, true);
    device.settle().unwrap();
    send(&mut device, 1, Wish::None); // the policy is in force
    device
}

#[test]
fn many_frames_at_once_need_one_kick_and_bring_one_call_a_batch_at_most() {
    for config in configs() {
        let rig = Rig::one("");
        let mut device = connect(&rig, config.clone());
        device.first().transmit.queue.take_calls().unwrap();
        for _ in 0..times() {
            assert!(send(&mut device, AT_ONCE, Wish::After(AT_ONCE)) <= 1);
        }
        // What comes before the end of this is all that there was: the queue's thread does one after the other.
        send(&mut device, 1, Wish::None);
        let calls = device.first().transmit.queue.take_calls().unwrap();
        let most = times() * u64::from(if has_event_idx(&config) { 1 } else { BATCHES });
        assert!(calls >= times() && calls <= most, "{calls} calls, {config:?}");

        for _ in 0..times() {
            send(&mut device, AT_ONCE, Wish::None);
        }
        assert_eq!(device.first().transmit.queue.take_calls().unwrap(), 0, "{config:?}");
        while rig.wire().try_receive().is_some() {}
        rig.check(0, &device, 0);
    }
}

#[test]
fn many_buffers_at_once_need_one_kick_and_bring_one_call_a_batch() {
    for config in configs() {
        let rig = Rig::one("");
        let mut device = connect(&rig, config.clone());
        device.first().receive.queue.take_calls().unwrap();
        for _ in 0..times() {
            assert!(receive(&rig, &mut device, Wish::After(BATCH)) <= 1);
        }
        receive(&rig, &mut device, Wish::None);
        let calls = device.first().receive.queue.take_calls().unwrap();
        assert_eq!(calls, times(), "{config:?}");
        for _ in 0..times() {
            receive(&rig, &mut device, Wish::None);
        }
        assert_eq!(device.first().receive.queue.take_calls().unwrap(), 0, "{config:?}");
        rig.check(0, &device, 0);
    }
}

#[test]
fn a_thread_that_looks_for_more_before_it_sleeps_carries_everything_and_sleeps_in_the_end() {
    for config in configs() {
        let netns = Netns::new();
        let (tap, queues) = tap::made_in(&netns);
        let rig = tap::serve(netns, tap.clone(), queues, "poll_us = 1000", &tap);
        let mut device = connect(&rig, config);
        let [worker] = rig.vmflow.processes("vmf-w")[..] else { panic!("not one worker") };
        for _ in 0..times() / 10 {
            send(&mut device, AT_ONCE, Wish::None);
            receive(&rig, &mut device, Wish::None);
        }
        wait_for("the thread to sleep", || tap::rests(worker).then_some(()));
        // It is woken by either side.
        assert_eq!(send(&mut device, 1, Wish::None), 1, "the guest is asked for a kick again");
        receive(&rig, &mut device, Wish::After(1));
        rig.check(0, &device, 0);
    }
}
