//! Taps that are handed in as descriptors, and what one does that is full.

use std::{path::Path, process::Command};

use command_fds::{CommandFdExt, FdMapping};
use vmflow::tap::Queues;
use vmflow_driver::{
    net::{Config, FEATURES},
    request::feature,
    transmit::{Layout, Transmitter},
    vnet::VnetHeader,
};

use crate::{
    ending::exists,
    harness::{Netns, Setup, VMFLOW, Vmflow, unique, wait_for},
    rig::{NAMES, Rig, frame, number, passes},
    wire::{self, Wire},
};

/// Frames of a batch at most.
const BATCH: u64 = 64;

/// A tap made in the namespace, as a launcher that may enter it would.
/// A tap with one queue.
pub fn made_in(netns: &Netns) -> (String, Queues) {
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

/// Puts a bridge and a shaped link behind a tap; gives the link's two ends.
fn behind_slow_link(netns: &Netns, tap: &str, rate: &str) -> (String, String) {
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
    let shape = format!("qdisc add dev {near} root tbf rate {rate} burst 2kb limit 1mb");
    netns.run("tc", &shape.split(' ').collect::<Vec<_>>());
    (near, far)
}

/// A bridge forwards nothing through a port until it has seen its carrier.
fn wait_for_bridge(rig: &Rig) {
    wait_for("the bridge", || {
        rig.netns.run("bridge", &["link"]).matches("state forwarding").nth(1).map(drop)
    });
}

/// True if a thread of the process that serves queues sleeps until something happens.
pub fn rests(worker: u32) -> bool {
    let read = |path: String| std::fs::read_to_string(path).unwrap_or_default();
    let threads = std::fs::read_dir(format!("/proc/{worker}/task")).unwrap();
    let mut served = threads.map(|thread| thread.unwrap().path().display().to_string());
    served.any(|thread| {
        read(format!("{thread}/comm")).trim_end() == "vring_worker"
            && read(format!("{thread}/stat")).contains(") S ")
            && read(format!("{thread}/syscall")).starts_with(&format!("{} ", libc::SYS_epoll_wait))
    })
}

#[test]
fn a_guest_need_not_kick_while_its_frames_wait_for_room_in_the_tap() {
    const FRAMES: u64 = 150;
    for features in [FEATURES, FEATURES & !feature::EVENT_IDX] {
        let netns = Netns::new();
        let (tap, queues) = made_in(&netns);
        wire::hold_at_most(queues.first(), 8000);
        // As good as never.
        let (near, far) = behind_slow_link(&netns, &tap, "8bit");
        let rig = serve(netns, tap, queues, "", &far);
        let mut device = rig.connect(0, Config { features, queue_size: 512, ..Config::default() });
        wait_for_bridge(&rig);
        let [worker] = rig.vmflow.processes("vmf-w")[..] else { panic!("not one worker") };
        let transmit = &mut device.first().transmit;
        let add = |transmit: &mut Transmitter| {
            for n in 0..FRAMES {
                transmit.add(&frame(100, n), &VnetHeader::default(), Layout::Single).unwrap();
            }
            transmit.flush().unwrap()
        };
        add(transmit);
        wait_for("the tap to be full", || {
            transmit.reclaim().unwrap();
            (transmit.done() > 0 && rests(worker) && transmit.queue.in_flight() > 0).then_some(())
        });
        assert!(!add(transmit), "the guest was asked to kick");
        let kicks = transmit.queue.notifications().kicks;
        // What waits is thrown away; what comes then passes.
        rig.netns.run("tc", &["qdisc", "del", "dev", &near, "root"]);
        wait_for("every frame to be taken", || {
            transmit.reclaim().unwrap();
            (transmit.done() == 2 * FRAMES).then_some(())
        });
        assert_eq!(transmit.queue.notifications().kicks, kicks);
        rig.check(0, &device, 0);
    }
}

/// The tap may hold a few frames, and what is behind it takes them slowly.
#[test]
fn a_tap_that_is_full_in_the_middle_of_a_batch_loses_and_doubles_nothing() {
    const FRAMES: u64 = 400;
    const LENGTH: usize = 100;
    let netns = Netns::new();
    let (tap, queues) = made_in(&netns);
    wire::hold_at_most(queues.first(), 8000);
    let (_, far) = behind_slow_link(&netns, &tap, "5mbit");
    let rig = serve(netns, tap, queues, "", &far);
    let mut device = rig.connect(0, Config { queue_size: 512, ..Config::default() });
    wait_for_bridge(&rig);

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
