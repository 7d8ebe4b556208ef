//! Front ends that come and go while frames flow.

use std::{os::unix::net::UnixListener, time::Duration};

use vmflow_driver::{
    channel::{Channel, Deadline},
    net::{Config, Device},
};

use crate::{
    harness::{PATIENCE, count},
    rig::{NAMES, Rig, hang_up, passes},
    traffic::Traffic,
};

/// Frames each way that make sure that it flows.
const SOME: u64 = 300;

/// Connects again and goes on where it was.
pub fn reconnect(rig: &Rig, vm: usize, device: &mut Device) {
    device.reconnect(&rig.socket(vm)).unwrap_or_else(|e| panic!("{e}: {e:?}"));
    for pair in &mut device.pairs {
        pair.receive.refill().unwrap();
    }
}

#[test]
fn a_front_end_that_reconnects_under_traffic_loses_and_doubles_nothing() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    let mut traffic = Traffic::default();
    let times = count(20, 100);
    for _ in 0..times {
        traffic.flow(&rig, 0, &mut device, SOME);
        reconnect(&rig, 0, &mut device);
    }
    traffic.flow(&rig, 0, &mut device, SOME);
    traffic.end(&rig, 0, &mut device);
    assert_eq!((traffic.lost_and_doubled(), traffic.doubled_to_guest()), ((0, 0), 0));
    let (transmit, receive) = rig.check(0, &device, 0);
    assert_eq!(transmit.dropped_packets + receive.dropped_packets, 0, "{transmit:?} {receive:?}");
    assert_eq!(rig.vmflow.port(NAMES[0]).connections, times + 1);
}

#[test]
fn a_second_front_end_is_closed_within_a_second_and_counted() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    let second = Channel::connect(&rig.socket(0)).unwrap();
    second.wait_closed(Deadline::within(Duration::from_secs(1))).unwrap();
    passes(&rig, 0, &mut device);
    let port = rig.vmflow.port(NAMES[0]);
    assert_eq!((port.refused_connections, port.connections), (1, 1));
    rig.check(0, &device, 0);
}

#[test]
fn vmflow_connects_to_a_front_end_that_listens_and_again_when_it_comes_back() {
    let rig = Rig::one("mode = \"client\"");
    let path = rig.socket(0);
    let listener = UnixListener::bind(&path).unwrap();
    let config = Config { patience: PATIENCE, ..Config::default() };
    let mut device = Device::accept(&listener, config).unwrap();
    device.first().receive.refill().unwrap();
    rig.wait_carrier(0, true);
    passes(&rig, 0, &mut device);
    for _ in 0..3 {
        hang_up(&mut device);
        device.reconnect_over(Channel::accept(&listener, PATIENCE).unwrap()).unwrap();
        rig.vmflow.wait_connected(NAMES[0], true);
        rig.wait_carrier(0, true);
        passes(&rig, 0, &mut device);
    }
    rig.check(0, &device, 0);
    assert_eq!(rig.vmflow.port(NAMES[0]).connections, 4);
}
