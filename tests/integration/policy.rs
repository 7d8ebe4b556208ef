//! A VM that the operator calls suspect, while its frames flow.

use rustix::process::{Pid, Signal, kill_process};
use vmflow::ledger::{DropReason, Totals};
use vmflow_driver::{
    net::{Config, Device},
    transmit::Layout,
    vnet::VnetHeader,
};

use crate::{
    harness::{Netns, PATIENCE, Setup, count, dropped, unique, wait_for},
    rig::{NAMES, Rig, frame, passes, receive_one, send_one},
    traffic::Traffic,
};

/// Frames each way between two changes.
const SOME: u64 = 200;

/// Every frame under one label, none under both.
fn labelled(totals: &Totals) {
    assert_eq!(totals.normal.frames + totals.suspect.frames, totals.chains - totals.in_flight, "{totals:?}");
}

#[test]
fn a_vm_that_is_tagged_and_cleared_under_traffic_loses_and_doubles_no_frame() {
    tagged_under_traffic(Config::default());
}

#[test]
fn that_is_so_with_several_queue_pairs() {
    tagged_under_traffic(crate::pairs::config(4));
}

fn tagged_under_traffic(config: Config) {
    let rig = Rig::with("", &[&format!("queue_pairs = {}", config.pairs), ""]);
    let mut device = rig.connect(0, config);
    let mut other = rig.connect(1, Config::default());
    let mut traffic = Traffic::default();
    for _ in 0..count(5, 200) {
        for command in [&["suspect", "web1", "--reason", "a test"][..], &["clear", "web1"]] {
            traffic.flow(&rig, 0, &mut device, SOME);
            let before = rig.vmflow.totals(NAMES[0]);
            rig.vmflow.ok(command);
            traffic.flow(&rig, 0, &mut device, SOME);
            let after = rig.vmflow.totals(NAMES[0]);
            for (before, after) in [(before.0, after.0), (before.1, after.1)] {
                labelled(&after);
                let (normal, suspect) = (
                    after.normal.frames - before.normal.frames,
                    after.suspect.frames - before.suspect.frames,
                );
                let grown = if command[0] == "suspect" { suspect } else { normal };
                assert!(grown >= SOME / 2, "{normal} normal and {suspect} suspect frames after {command:?}");
            }
        }
    }
    traffic.end(&rig, 0, &mut device);
    assert_eq!((traffic.lost_and_doubled(), traffic.doubled_to_guest()), ((0, 0), 0));
    let (transmit, receive) = rig.check(0, &device, 0);
    labelled(&transmit);
    labelled(&receive);
    assert_eq!(transmit.dropped_packets + receive.dropped_packets, 0);
    passes(&rig, 1, &mut other);
    let (transmit, receive) = rig.check(1, &other, 0);
    assert_eq!((transmit.suspect.frames, receive.suspect.frames), (0, 0));
}

#[test]
fn after_the_command_returns_every_frame_carries_the_new_label() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    for round in 1..=count(10, 200) {
        rig.vmflow.ok(&["suspect", "web1", "--reason", "a test"]);
        passes(&rig, 0, &mut device);
        rig.vmflow.ok(&["clear", "web1"]);
        passes(&rig, 0, &mut device);
        let (transmit, receive) = rig.check(0, &device, 0);
        for totals in [transmit, receive] {
            assert_eq!((totals.normal.frames, totals.suspect.frames), (round, round));
        }
    }
}

/// With action drop a tagged VM's frames go nowhere, another VM's do, and all is counted.
fn drops(rig: &Rig) {
    let mut device = rig.connect(0, Config::default());
    let mut other = rig.connect(1, Config::default());
    passes(rig, 0, &mut device);
    rig.vmflow.ok(&["suspect", "web1", "--reason", "a test"]);
    for number in 0..SOME {
        send_one(&mut device, &frame(100, number));
        rig.wires[0].send(&frame(100, number));
    }
    passes(rig, 1, &mut other);
    wait_for("the host's frames to be read", || {
        (rig.vmflow.totals(NAMES[0]).1.suspect.frames == SOME).then_some(())
    });
    rig.vmflow.ok(&["clear", "web1"]);
    // The first frame that comes is the first one after the tag: none of those before gets through late.
    passes(rig, 0, &mut device);
    rig.wires[0].send(&frame(300, 7));
    assert_eq!(receive_one(&mut device), frame(300, 7));
    let (transmit, receive) = rig.check(0, &device, 0);
    for totals in [&transmit, &receive] {
        labelled(totals);
        let of_tag = dropped(totals, DropReason::SuspectPolicy);
        assert_eq!(of_tag, totals.suspect.frames, "{totals:?}");
    }
    assert_eq!(transmit.suspect.frames, SOME);
    assert_eq!(receive.suspect.frames, SOME);
    rig.check(1, &other, 0);
}

#[test]
fn the_hosts_action_drop_stops_a_tagged_vm_both_ways() {
    drops(&Rig::with("[suspect]\naction = \"drop\"", &["", ""]));
}

#[test]
fn a_vms_own_action_drop_stops_it_both_ways() {
    let own = "[vm.suspect]\naction = \"drop\"";
    drops(&Rig::with("", &[own, ""]));
}

#[test]
fn a_vms_own_action_count_wins_over_the_hosts_drop() {
    let rig = Rig::with("[suspect]\naction = \"drop\"", &["[vm.suspect]\naction = \"count\""]);
    let mut device = rig.connect(0, Config::default());
    rig.vmflow.ok(&["suspect", "web1", "--reason", "a test"]);
    passes(&rig, 0, &mut device);
    let (transmit, receive) = rig.check(0, &device, 0);
    assert_eq!((transmit.suspect.frames, receive.suspect.frames), (1, 1));
}

#[test]
fn a_tag_is_kept_over_a_restart() {
    let rig = Rig::one("");
    rig.vmflow.ok(&["suspect", "web1", "--reason", "seen scanning"]);
    let before = rig.vmflow.stats().vms.remove(0);
    assert!(before.suspect);
    let rig = rig.restart();
    let after = rig.vmflow.stats().vms.remove(0);
    assert_eq!((after.suspect, after.label, &after.tag), (true, before.label, &before.tag));
    let mut device = rig.connect(0, Config::default());
    passes(&rig, 0, &mut device);
    let (transmit, _) = rig.check(0, &device, 0);
    assert_eq!((transmit.normal.frames, transmit.suspect.frames), (0, 1));
}

/// A worker that does not answer is no reason to let the VM's other ports go on under the old label.
#[test]
fn a_tag_reaches_every_port_of_a_vm_also_when_one_does_not_answer() {
    let (netns, setup) = (Netns::new(), Setup::new());
    let taps = [unique("t"), unique("t")];
    let sockets = ["a", "b"].map(|name| setup.socket(name));
    let port = |n: usize| {
        let (socket, tap) = (sockets[n].display(), &taps[n]);
        format!("[[vm.port]]\nsocket = \"{socket}\"\ntap = \"{tap}\"\nnetns = \"{}\"\n", netns.0)
    };
    let setup = setup.with(&format!("[[vm]]\nname = \"web1\"\n{}{}", port(0), port(1)));
    let vmflow = setup.start();
    let mut devices = sockets.each_ref().map(|socket| Device::connect(socket, Config::default()).unwrap());
    let mut send = |n: usize| {
        let transmit = &mut devices[n].first().transmit;
        transmit.send(&frame(60, 1), &VnetHeader::default(), Layout::Single).unwrap();
        transmit.drain(PATIENCE).unwrap();
    };
    let suspect = || {
        let ports = vmflow.stats().vms.remove(0).ports;
        [0, 1].map(|n| Totals::from(&ports[n].transmit).suspect.frames)
    };
    (0..2).for_each(&mut send);
    assert_eq!(suspect(), [0, 0]);

    let of_first = |pid: &u32| {
        let maps = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap().flatten();
        maps.filter_map(|fd| std::fs::read_to_string(fd.path()).ok()).any(|info| info.contains(&taps[0]))
    };
    let worker = vmflow.processes("vmf-w").into_iter().find(of_first).unwrap();
    let worker = Pid::from_raw(i32::try_from(worker).unwrap()).unwrap();
    kill_process(worker, Signal::STOP).unwrap();
    let refused = vmflow.command(&["suspect", "web1", "--reason", "a test"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains(&taps[0]) && !said.contains(&taps[1]), "{said}");
    send(1);
    assert_eq!(suspect(), [0, 1]);

    kill_process(worker, Signal::CONT).unwrap();
    vmflow.ok(&["suspect", "web1", "--reason", "again"]);
    (0..2).for_each(&mut send);
    assert_eq!(suspect(), [1, 2]);
    vmflow.stop();
}
