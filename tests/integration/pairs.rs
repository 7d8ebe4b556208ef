//! Ports with several queue pairs.

use std::collections::BTreeMap;

use vmflow_driver::{
    net::{Config, Device, FEATURES, Pair},
    request::feature,
    transmit::Layout,
    vnet::VnetHeader,
};

use crate::{
    harness::{PATIENCE, wait_for},
    rig::{Rig, flow_and_number, of_flow, of_flow_back},
};

/// Length of the frames.
const LENGTH: usize = 100;

/// A VM whose port has so many pairs.
fn rig(pairs: u16) -> Rig {
    Rig::one(&format!("queue_pairs = {pairs}"))
}

/// A guest with so many.
pub fn config(pairs: u16) -> Config {
    Config { pairs, features: FEATURES | feature::MQ | feature::CTRL_VQ, ..Config::default() }
}

/// Waits until so many queues of the tap are attached.
fn wait_attached(rig: &Rig, queues: usize) {
    let path = format!("/sys/class/net/{}/queues", rig.taps[0]);
    wait_for("the tap's queues", || {
        let listed = rig.netns.run("ls", &[&path]);
        (listed.lines().filter(|line| line.starts_with("tx-")).count() == queues).then_some(())
    });
}

/// Sends frames from a pair, and waits until they are taken.
fn send(pair: &mut Pair, flow: u16, frames: u64) {
    for n in 0..frames {
        pair.transmit.send(&of_flow(flow, LENGTH, n), &VnetHeader::default(), Layout::Single).unwrap();
    }
    pair.transmit.drain(PATIENCE).unwrap();
}

/// Waits for so many frames, over all pairs; gives how many of each flow came at which pair, in order each.
fn receive(device: &mut Device, frames: u64) -> BTreeMap<(u16, usize), u64> {
    let mut came = BTreeMap::new();
    wait_for("the frames", || {
        for (number, pair) in device.pairs.iter_mut().enumerate() {
            while let Some(frame) = pair.receive.receive().unwrap() {
                let (flow, n) = flow_and_number(&frame.bytes);
                let so_far = came.entry((flow, number)).or_default();
                assert_eq!((frame.strays, n), (0, *so_far), "flow {flow}");
                *so_far += 1;
            }
            pair.receive.refill().unwrap();
        }
        (came.values().sum::<u64>() == frames).then_some(())
    });
    came
}

/// The host sends the other direction of flows, so many frames each.
fn inject(rig: &Rig, flows: std::ops::Range<u16>, frames: u64) {
    for n in 0..frames {
        for flow in flows.clone() {
            rig.wire().send(&of_flow_back(flow, LENGTH, n));
        }
    }
}

#[test]
fn each_pair_carries_frames_both_ways_and_each_frame_is_counted() {
    const EACH: u64 = 20;
    for pairs in [2, 4, 16] {
        let rig = rig(pairs);
        let mut device = rig.connect(0, config(pairs));
        wait_attached(&rig, pairs.into());
        for (flow, pair) in (0..).zip(&mut device.pairs) {
            send(pair, flow, EACH);
        }
        let mut arrived = BTreeMap::new();
        for _ in 0..u64::from(pairs) * EACH {
            *arrived.entry(flow_and_number(&rig.wire().receive().bytes).0).or_insert(0) += 1;
        }
        assert!(arrived.into_iter().eq((0..pairs).map(|flow| (flow, EACH))));
        // A flow's frames come back where its other direction left.
        inject(&rig, 0..pairs, EACH);
        let came = receive(&mut device, u64::from(pairs) * EACH);
        assert!(came.into_iter().eq((0..pairs).map(|flow| ((flow, flow.into()), EACH))));
        // Others are spread over all.
        inject(&rig, 100..300, 3);
        let came = receive(&mut device, 200 * 3);
        for pair in 0..usize::from(pairs) {
            assert!(came.keys().any(|(_, at)| *at == pair), "pair {pair} of {pairs} got nothing");
        }
        rig.check(0, &device, 0);
        assert_eq!(rig.vmflow.port("web1").queue_pairs, pairs);
    }
}
