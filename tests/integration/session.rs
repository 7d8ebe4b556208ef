//! Front ends that come and go, workers and keepers that die, tags and the end, all while frames flow.

use std::{collections::BTreeSet, fs, os::unix::net::UnixListener, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use vmflow::ledger::Totals;
use vmflow_driver::{
    channel::{Channel, Deadline},
    net::{Config, Device},
};

use crate::{
    harness::{PATIENCE, count, wait_for},
    rig::{NAMES, Rig, hang_up, passes},
    traffic::Traffic,
};

/// Frames each way that make sure that it flows.
const SOME: u64 = 300;
/// Most frames of one batch: what a killed worker can have had in hand.
const BATCH: u64 = 64;

/// Connects again and goes on where it was.
fn reconnect(rig: &Rig, vm: usize, device: &mut Device) {
    device.reconnect(&rig.socket(vm)).unwrap_or_else(|e| panic!("{e}: {e:?}"));
    device.first().receive.refill().unwrap();
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

/// Numbers that may only grow.
fn never_back(before: &Totals, after: &Totals) {
    let pairs = before.words().into_iter().zip(after.words()).enumerate();
    // The second word is `in_flight`, which is no counter.
    for (place, (before, after)) in pairs.filter(|(place, _)| *place != 1) {
        assert!(after >= before, "word {place} went back from {before} to {after}");
    }
}

/// Kills a process of web1 while both VMs' frames flow.
fn killed(kind: &str) {
    let rig = Rig::two();
    let mut other = rig.connect(1, Config::default());
    let mut device = rig.connect(0, Config::default());
    let (mut traffic, mut others) = (Traffic::default(), Traffic::default());
    let times = count(10, 100);
    for round in 1..=times {
        traffic.flow(&rig, 0, &mut device, SOME);
        let before = rig.vmflow.totals(NAMES[0]);
        let processes: BTreeSet<u32> = of_port(&rig, "vmf-", NAMES[0]);
        let victim = of_port(&rig, kind, NAMES[0]).into_iter().next().unwrap();
        let victim = Pid::from_raw(victim.cast_signed()).unwrap();
        traffic.flow_until_closed(&rig, 0, &mut device, || kill_process(victim, Signal::KILL).unwrap());
        wait_for("keeper and worker to be gone", || {
            others.step(&rig, 1, &mut other);
            of_port(&rig, "vmf-", NAMES[0]).is_disjoint(&processes).then_some(())
        });
        reconnect(&rig, 0, &mut device);
        traffic.flow(&rig, 0, &mut device, SOME);
        let after = rig.vmflow.totals(NAMES[0]);
        never_back(&before.0, &after.0);
        never_back(&before.1, &after.1);
        assert_eq!(rig.vmflow.port(NAMES[0]).worker_restarts, round);
    }
    others.flow(&rig, 1, &mut other, SOME);
    traffic.end(&rig, 0, &mut device);
    others.end(&rig, 1, &mut other);
    assert_eq!((others.lost_and_doubled(), others.doubled_to_guest()), ((0, 0), 0));
    rig.check(1, &other, 0);
    let (lost, doubled) = traffic.lost_and_doubled();
    assert_eq!((lost, traffic.doubled_to_guest()), (0, 0), "the guest's chains are all sent");
    let (transmit, receive) = rig.vmflow.totals(NAMES[0]);
    let (from_guest, to_guest) = rig.kernel(0);
    let (_, received) = device.totals();
    let uncertain = [
        ("doubled", doubled),
        ("written and not counted", from_guest.frames - transmit.passed.frames),
        ("read and not counted", to_guest - receive.chains),
        ("counted and not seen by the guest", receive.passed.frames - received.frames),
    ];
    println!("{times} deaths: {uncertain:?}");
    assert!(uncertain.iter().all(|(_, frames)| *frames <= times * BATCH), "{uncertain:?} in {times} deaths");
}

/// The processes of one port.
fn of_port(rig: &Rig, kind: &str, vm: &str) -> BTreeSet<u32> {
    let belongs = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim().ends_with(vm))
    };
    rig.vmflow.processes(kind).into_iter().filter(belongs).collect()
}

#[test]
fn a_killed_worker_costs_its_vm_a_reconnect_and_the_other_vm_nothing() {
    killed("vmf-w");
}

#[test]
fn a_killed_keeper_costs_its_vm_a_reconnect_and_the_other_vm_nothing() {
    killed("vmf-k");
}
