//! The end of vmflow, and what it found before it began.

use std::{fs, process::Command};

use rustix::process::Signal;
use vmflow_driver::net::Config;

use crate::{
    harness::{Netns, Setup, run, unique},
    rig::{NAMES, Rig},
    traffic::Traffic,
};

/// Frames each way before the end.
const SOME: u64 = 500;

pub fn exists(netns: &Netns, interface: &str) -> bool {
    netns.run("ip", &["-o", "link"]).contains(&format!(": {interface}:"))
}

#[test]
fn at_the_end_under_traffic_the_guest_sees_as_used_what_the_tap_got_and_nothing_is_left() {
    let rig = Rig::two();
    let mut device = rig.connect(0, Config::default());
    let _other = rig.connect(1, Config::default());
    let mut traffic = Traffic::default();
    traffic.flow(&rig, 0, &mut device, SOME);
    // The guest knows nothing of an end: its frames go on until the connection is closed.
    traffic.flow_until_closed(&rig, 0, &mut device, || rig.vmflow.signal(Signal::TERM));
    traffic.end_of_device(&rig, 0, &mut device);
    let Rig { vmflow, wires, taps, setup, netns } = rig;
    let log = vmflow.stop();
    assert!(log.contains("ended"), "{log}");
    let used = device.first().transmit.done();
    let (arrived, doubled) = traffic.arrived_and_doubled();
    assert_eq!((arrived, doubled), (used, 0), "used by the device, arrived at the tap");
    assert_eq!(traffic.doubled_to_guest(), 0);
    drop(wires);
    for (name, tap) in NAMES.iter().zip(&taps) {
        assert!(!setup.socket(name).exists() && !exists(&netns, tap), "{name}'s socket or tap is left");
    }
    for socket in ["control.sock", "stats.sock"] {
        assert!(!setup.directory.path().join(socket).exists(), "{socket} is left");
    }
}

#[test]
fn a_tap_that_was_there_keeps_its_addresses_and_its_mtu_and_stays() {
    let netns = Netns::new();
    let tap = unique("t");
    run("ip", &["tuntap", "add", &tap, "mode", "tap", "vnet_hdr"]);
    let removed = Tap(tap.clone());
    run("ip", &["addr", "add", "192.0.2.1/32", "dev", &tap]);
    run("ip", &["link", "set", &tap, "mtu", "1400"]);
    let described = || {
        let text = run("ip", &["-o", "addr", "show", "dev", &tap]);
        let mtu = fs::read_to_string(format!("/sys/class/net/{tap}/mtu")).unwrap();
        (text.contains("192.0.2.1/32"), mtu.trim().to_owned())
    };
    let setup = Setup::new();
    let socket = setup.socket(NAMES[0]);
    let setup = setup.with(&format!(
        "[[vm]]\nname = \"web1\"\n[[vm.port]]\nsocket = \"{}\"\ntap = \"{tap}\"",
        socket.display()
    ));
    let vmflow = setup.start();
    assert_eq!(described(), (true, "1400".into()));
    // Without an owner any user could attach to the tap and inject frames; ours is a user that nobody runs as.
    let owner = fs::read_to_string(format!("/sys/class/net/{tap}/owner")).unwrap();
    assert_eq!(owner.trim(), (u32::MAX - 1).to_string());
    vmflow.stop();
    assert_eq!(described(), (true, "1400".into()));
    drop((removed, netns));
}

/// A tap in the machine's own network namespace, removed in the end.
struct Tap(String);

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).output();
    }
}

#[test]
fn the_taps_carrier_follows_the_front_end() {
    let rig = Rig::one("");
    rig.wait_carrier(0, false);
    for _ in 0..3 {
        let device = rig.connect(0, Config::default());
        drop(device);
        rig.wait_carrier(0, false);
    }
}
