//! Taps that are handed in as descriptors, and what one does that is full.

use std::{path::Path, process::Command};

use command_fds::{CommandFdExt, FdMapping};
use vmflow::tap::Queues;
use vmflow_driver::{net::Config, transmit::Layout, vnet::VnetHeader};

use crate::{
    ending::exists,
    harness::{Netns, Setup, VMFLOW, Vmflow, unique, wait_for},
    rig::{NAMES, Rig, frame, number, passes},
    wire::{self, Wire},
};

/// Frames of a batch at most.
const BATCH: u64 = 64;

/// A tap made in the namespace, as a launcher that may enter it would.
fn made_in(netns: &Netns) -> (String, Queues) {
    let tap = unique("t");
    let queues = netns.inside(|| Queues::attach(&tap, 1)).unwrap();
    (tap, queues)
}

/// vmflow with one VM on a tap whose queues it is handed; `more` are further lines of its port; the host's side of
/// the tap is interface `outside`.
pub fn serve(netns: Netns, tap: String, queues: Queues, more: &str, outside: &str) -> Rig {
    let setup = Setup::new();
    let socket = setup.socket(NAMES[0]);
    let setup = setup.with(&format!(
        "[[vm]]\nname = \"web1\"\n[[vm.port]]\nsocket = \"{}\"\ntap = \"{tap}\"\nnetns = \"{}\"\n{more}",
        socket.display(),
        netns.0
    ));
    let mappings = (3..).zip(queues).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd });
    let mappings: Vec<_> = mappings.collect();
    let mut command = Command::new("sh");
    let script = format!(
        "LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={} exec {VMFLOW} serve --config {}",
        mappings.len(),
        vec![&*tap; mappings.len()].join(":"),
        setup.file().display()
    );
    command.arg("-c").arg(script).fd_mappings(mappings).unwrap();
    let vmflow = Vmflow::start_as(command, &setup.directory);
    let wires = vec![Wire::open(&netns, outside)];
    Rig { vmflow, wires, taps: vec![tap], setup, netns }
}

#[test]
fn a_tap_handed_in_as_a_descriptor_is_served_where_it_is() {
    let netns = Netns::new();
    let (tap, queues) = made_in(&netns);
    let rig = serve(netns, tap.clone(), queues, "", &tap);
    let mut device = rig.connect(0, Config::default());
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
    let Rig { vmflow, wires, taps, netns, setup } = rig;
    vmflow.stop();
    drop(wires);
    wait_for("the tap to go with its last descriptor", || (!exists(&netns, &taps[0])).then_some(()));
    assert!(!Path::new(&setup.socket(NAMES[0])).exists());
}

#[test]
fn a_tap_handed_in_goes_from_one_vm_to_the_next_while_vmflow_runs() {
    let netns = Netns::new();
    let (tap, queues) = made_in(&netns);
    let rig = serve(netns, tap.clone(), queues, "", &tap);
    let main = rig.setup.file();
    let text = std::fs::read_to_string(&main).unwrap();
    std::fs::write(&main, text.split("[[vm]]").next().unwrap()).unwrap();
    assert_eq!(rig.vmflow.ok(&["reload"]), "removed: web1\n");
    assert!(exists(&rig.netns, &tap), "it was not ours to remove");
    // Another tap of that name could not be moved there: it is the one that was handed in.
    let argument = format!("name=web1,socket={},tap={tap},netns={}", rig.socket(0).display(), rig.netns.0);
    assert!(rig.vmflow.ok(&["add", &argument]).contains("label 2"));
    let mut device = rig.connect(0, Config::default());
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

/// The tap may hold a few frames, and what is behind it takes them slowly: a bridge, and a shaped link.
#[test]
fn a_tap_that_is_full_in_the_middle_of_a_batch_loses_and_doubles_nothing() {
    const FRAMES: u64 = 400;
    const LENGTH: usize = 100;
    let netns = Netns::new();
    let (tap, queues) = made_in(&netns);
    wire::hold_at_most(queues.first(), 8000);
    let (near, far, bridge) = (unique("n"), unique("f"), unique("b"));
    for line in [
        format!("link add {bridge} type bridge mcast_snooping 0"),
        format!("link add {near} type veth peer name {far}"),
        format!("link set {tap} master {bridge}"),
        format!("link set {near} master {bridge}"),
        format!("link set {near} up"),
        format!("link set {far} up"),
        format!("link set {bridge} up"),
    ] {
        netns.run("ip", &line.split(' ').collect::<Vec<_>>());
    }
    let shape = format!("qdisc add dev {near} root tbf rate 5mbit burst 2kb limit 1mb");
    netns.run("tc", &shape.split(' ').collect::<Vec<_>>());
    let rig = serve(netns, tap, queues, "", &far);
    let mut device = rig.connect(0, Config { queue_size: 512, ..Config::default() });
    // A bridge forwards nothing through a port until it has seen its carrier.
    wait_for("the bridge", || {
        rig.netns.run("bridge", &["link"]).matches("state forwarding").nth(1).map(drop)
    });

    let transmit = &mut device.first().transmit;
    for n in 0..FRAMES {
        transmit.add(&frame(LENGTH, n), &VnetHeader::default(), Layout::Single).unwrap();
    }
    transmit.flush().unwrap();
    let mut stops = Vec::new();
    let all = wait_for("every frame to be taken", || {
        transmit.reclaim().unwrap();
        stops.push(transmit.done());
        (transmit.done() == FRAMES).then_some(FRAMES)
    });
    assert!(stops.iter().any(|n| n % BATCH != 0 && *n < all), "the tap was never full: {stops:?}");

    // The bridge says a word of its own now and then.
    let from_guest =
        || std::iter::repeat_with(|| rig.wire().receive().bytes).find(|bytes| bytes.len() == LENGTH);
    let arrived: Vec<u64> = (0..FRAMES).filter_map(|_| from_guest()).map(|bytes| number(&bytes)).collect();
    assert!(arrived.iter().copied().eq(0..FRAMES), "{arrived:?}");
    rig.check(0, &device, 0);
}
