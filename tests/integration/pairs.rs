//! Ports with several queue pairs.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Instant,
};

use vmflow::ledger::DropReason;
use vmflow_driver::{
    net::{Config, Device, FEATURES, Pair},
    request::feature,
    sequence::Sequence,
    transmit::Layout,
    vnet::VnetHeader,
};

use crate::{
    deaths::never_back,
    harness::{Netns, PATIENCE, dropped, unique, wait_for},
    rig::{NAMES, Rig, flow_and_number, hang_up, of_flow, of_flow_back},
    tap,
    traffic::Traffic,
};

/// Length of the frames.
const LENGTH: usize = 100;
/// Flows of the host's that no guest has answered: enough to reach every queue.
const FLOWS: std::ops::Range<u16> = 100..500;
/// Frames each way that make sure that it flows.
const SOME: u64 = 300;
/// Every front end's order of messages.
const SEQUENCES: [Sequence; 4] =
    [Sequence::Plain, Sequence::Qemu, Sequence::Qemu7, Sequence::CloudHypervisor];

/// A VM whose port has so many pairs.
fn rig(pairs: u16) -> Rig {
    Rig::one(&format!("queue_pairs = {pairs}"))
}

/// A guest with so many.
pub fn config(pairs: u16) -> Config {
    Config { pairs, features: FEATURES | feature::MQ | feature::CTRL_VQ, ..Config::default() }
}

/// How many queues of the tap are attached.
fn attached(rig: &Rig) -> usize {
    let listed = rig.netns.run("ls", &[&format!("/sys/class/net/{}/queues", rig.taps[0])]);
    listed.lines().filter(|line| line.starts_with("tx-")).count()
}

/// Waits until so many queues of the tap are attached.
pub fn wait_attached(rig: &Rig, queues: usize) {
    wait_for("the tap's queues", || (attached(rig) == queues).then_some(()));
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

/// Frames of many flows are spread over the first `pairs` pairs, over no others, and all of them arrive.
fn all_arrive(rig: &Rig, device: &mut Device, pairs: u16) {
    inject(rig, FLOWS, 2);
    let came = receive(device, 2 * u64::try_from(FLOWS.len()).unwrap());
    let used: std::collections::BTreeSet<_> = came.keys().map(|(_, pair)| *pair).collect();
    assert!(used.into_iter().eq(0..usize::from(pairs)), "{came:?}");
}

/// Enables or disables all pairs, as a front end does when its guest changes the number of pairs that it uses.
fn use_pairs(device: &Device, pairs: u32) {
    for ring in 0..2 * u32::from(device.config().pairs) {
        device.session.enable_ring(ring, ring / 2 < pairs).unwrap();
    }
    device.settle().unwrap();
}

#[test]
fn each_pair_carries_frames_both_ways_and_each_frame_is_counted() {
    const EACH: u64 = 20;
    let sequences = [Sequence::Plain, Sequence::CloudHypervisor, Sequence::Qemu, Sequence::Qemu7];
    for (pairs, sequence) in [2, 4, 16, 16].into_iter().zip(sequences) {
        let rig = rig(pairs);
        let mut device = rig.connect(0, Config { sequence, ..config(pairs) });
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
        all_arrive(&rig, &mut device, pairs);
        rig.check(0, &device, 0);
        assert_eq!(rig.vmflow.port("web1").queue_pairs, pairs);
    }
}

#[test]
fn a_front_end_with_fewer_pairs_than_offered_gets_every_frame() {
    for sequence in SEQUENCES {
        let rig = rig(4);
        for pairs in [1, 2, 3] {
            let mut device = rig.connect(0, Config { sequence, ..config(pairs) });
            assert_eq!(device.agreed().offered & feature::MQ, feature::MQ);
            wait_attached(&rig, pairs.into());
            all_arrive(&rig, &mut device, pairs);
            hang_up(&mut device);
            rig.vmflow.wait_connected(NAMES[0], false);
        }
    }
}

#[test]
fn a_guest_that_knows_of_one_pair_only_is_served_as_always() {
    let rig = rig(4);
    let mut device = rig.connect(0, Config::default());
    all_arrive(&rig, &mut device, 1);
    rig.check(0, &device, 0);
}

/// cloud-hypervisor enables all rings, whatever its guest uses: only buffers tell.
#[test]
fn pairs_that_are_enabled_and_have_no_buffers_get_no_frames() {
    let rig = rig(4);
    let config = Config { sequence: Sequence::CloudHypervisor, patience: PATIENCE, ..config(4) };
    let mut device = Device::connect(&rig.socket(0), config).unwrap();
    rig.wait_carrier(0, true);
    // What comes before the first buffer waits for it.
    inject(&rig, 0..20, 1);
    for used in 1..=4 {
        device.pairs[used - 1].receive.refill().unwrap();
        wait_attached(&rig, used);
        inject(&rig, FLOWS, 2);
        let early = if used == 1 { 20 } else { 0 };
        let expected = 2 * u64::try_from(FLOWS.len()).unwrap() + early;
        let mut came = 0;
        wait_for("the frames", || {
            for pair in &mut device.pairs[..used] {
                while pair.receive.receive().unwrap().is_some() {
                    came += 1;
                }
                pair.receive.refill().unwrap();
            }
            (came == expected).then_some(())
        });
    }
    rig.check(0, &device, 0);
}

/// The guest sends from so many pairs only, and then its front end enables these and no others.
fn change(rig: &Rig, device: &mut Device, traffic: &mut Traffic, pairs: usize) {
    traffic.senders = Some(pairs);
    wait_for("the other pairs' frames", || {
        traffic.step(rig, 0, device);
        device.pairs[pairs..].iter().all(|pair| pair.transmit.queue.in_flight() == 0).then_some(())
    });
    use_pairs(device, u32::try_from(pairs).unwrap());
    wait_for("the tap's queues", || {
        traffic.step(rig, 0, device);
        (attached(rig) == pairs).then_some(())
    });
    traffic.flow(rig, 0, device, SOME);
}

#[test]
fn the_number_of_pairs_can_change_while_frames_flow() {
    for sequence in [Sequence::Plain, Sequence::Qemu, Sequence::Qemu7] {
        let rig = rig(4);
        let mut device = rig.connect(0, Config { sequence, ..config(4) });
        let mut traffic = Traffic::default();
        // A change to more loses nothing.
        use_pairs(&device, 1);
        wait_attached(&rig, 1);
        change(&rig, &mut device, &mut traffic, 1);
        change(&rig, &mut device, &mut traffic, 4);
        traffic.end_and_empty_tap(&rig, 0, &mut device);
        rig.check(0, &device, 0);
        // Nor does one to fewer, but for what waits in their queues.
        use_pairs(&device, 2);
        wait_attached(&rig, 2);
        traffic.senders = Some(2);
        traffic.flow(&rig, 0, &mut device, SOME);
        traffic.end_and_empty_tap(&rig, 0, &mut device);
        rig.check(0, &device, 0);
        assert_eq!((traffic.lost_and_doubled(), traffic.doubled_to_guest()), ((0, 0), 0));
        all_arrive(&rig, &mut device, 2);
        for pairs in [4, 1, 3, 2, 4] {
            change(&rig, &mut device, &mut traffic, pairs);
        }
        traffic.end(&rig, 0, &mut device);
        assert_eq!((traffic.lost_and_doubled(), traffic.doubled_to_guest()), ((0, 0), 0));
        rig.check(0, &device, 0);
    }
}

/// Hears what the kernel says of a namespace's interfaces.
struct LinkMonitor {
    process: Child,
    lines: Receiver<String>,
}

impl LinkMonitor {
    /// Begins to listen; returns when it does.
    fn start(netns: &Netns) -> Self {
        let words = ["netns", "exec", &netns.0, "stdbuf", "-oL", "ip", "-o", "monitor", "link"];
        let mut process = Command::new("ip").args(words).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(process.stdout.take().unwrap());
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
        let monitor = Self { process, lines };
        wait_for("a word of the monitor", || {
            for state in ["up", "down"] {
                netns.run("ip", &["link", "set", "lo", state]);
            }
            monitor.lines.try_recv().ok()
        });
        monitor
    }

    /// How often something was said of an interface so far.
    fn count(&self, interface: &str) -> usize {
        self.lines.try_iter().filter(|line| line.contains(interface)).count()
    }
}

impl Drop for LinkMonitor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Each change takes a lock that the whole host shares.
#[test]
fn a_front_end_that_changes_the_number_of_pairs_all_the_time_has_to_wait_for_its_queues() {
    const TIMES: usize = 300;
    let rig = rig(2);
    let mut device = rig.connect(0, config(2));
    wait_attached(&rig, 2);
    let monitor = LinkMonitor::start(&rig.netns);
    let begin = Instant::now();
    for _ in 0..TIMES {
        use_pairs(&device, 1);
        use_pairs(&device, 2);
    }
    wait_attached(&rig, 2);
    let took = begin.elapsed();
    all_arrive(&rig, &mut device, 2);
    rig.check(0, &device, 0);
    let changes = monitor.count(&rig.taps[0]);
    println!("{changes} changes of {TIMES} each way in {took:?}");
    // One each way each half second.
    let most = 2 * (usize::try_from(took.as_millis()).unwrap() / 500 + 1);
    assert!((1..=most).contains(&changes), "{changes} changes in {took:?}");
}

#[test]
fn what_waits_for_a_pair_that_is_given_up_is_a_counted_drop() {
    let rig = rig(2);
    let config = Config { queue_size: 16, ..config(2) };
    let mut device = rig.connect(0, config);
    wait_attached(&rig, 2);
    send(&mut device.pairs[1], 0, 1);
    // The guest takes as many as it has buffers for, and the rest waits.
    inject(&rig, 0..1, 16 + 50);
    wait_for("the buffers to be full", || (rig.vmflow.totals(NAMES[0]).1.passed.frames == 16).then_some(()));
    use_pairs(&device, 1);
    wait_attached(&rig, 1);
    let (_, totals) = rig.vmflow.totals(NAMES[0]);
    assert_eq!(dropped(&totals, DropReason::RingDisabled), 50, "{totals:?}");
    receive(&mut device, 16);
    rig.check(0, &device, 0);
    // What waits in the only queue that is attached goes on waiting.
    inject(&rig, 0..1, 16 + 50);
    wait_for("the buffers to be full", || (rig.vmflow.totals(NAMES[0]).1.passed.frames == 32).then_some(()));
    use_pairs(&device, 0);
    use_pairs(&device, 1);
    receive(&mut device, 16 + 50);
    rig.check(0, &device, 0);
}

/// A guest's fault in one ring, both ways and at each pair, costs the other pairs nothing.
#[test]
fn a_pair_whose_ring_the_guest_breaks_rests_and_the_others_go_on() {
    let rig = rig(3);
    for broken in 0..3 {
        let mut device = rig.connect(0, config(3));
        wait_attached(&rig, 3);
        let before = rig.vmflow.port(NAMES[0]).queue_faults;
        let Pair { receive: receiver, transmit } = &mut device.pairs[broken];
        for queue in [&mut receiver.queue, &mut transmit.queue] {
            queue.push_raw(60_000);
            queue.publish();
            queue.kick().unwrap();
        }
        wait_for("the faults", || (rig.vmflow.port(NAMES[0]).queue_faults == before + 2).then_some(()));
        wait_attached(&rig, 2);
        while device.pairs.iter_mut().any(|pair| pair.receive.receive().unwrap_or_default().is_some()) {}
        for (number, pair) in device.pairs.iter_mut().enumerate().filter(|(n, _)| *n != broken) {
            pair.receive.refill().unwrap();
            send(pair, u16::try_from(number).unwrap(), 10);
        }
        inject(&rig, FLOWS, 1);
        let mut came = 0;
        wait_for("the other pairs' frames", || {
            for (_, pair) in device.pairs.iter_mut().enumerate().filter(|(n, _)| *n != broken) {
                while pair.receive.receive().unwrap().is_some() {
                    came += 1;
                }
                pair.receive.refill().unwrap();
            }
            (came >= FLOWS.len()).then_some(())
        });
        // Until the guest resets it.
        device.reset(0).unwrap();
        for pair in &mut device.pairs {
            pair.receive.refill().unwrap();
        }
        wait_attached(&rig, 3);
        all_arrive(&rig, &mut device, 3);
        hang_up(&mut device);
        rig.vmflow.wait_connected(NAMES[0], false);
        wait_attached(&rig, 1);
        rig.vmflow.totals(NAMES[0]);
    }
}

/// Keeper and worker die with four queues attached, and nobody comes back to read them all.
#[test]
fn after_a_killed_keeper_a_front_end_with_fewer_pairs_gets_every_frame() {
    let rig = rig(4);
    let mut device = rig.connect(0, config(4));
    wait_attached(&rig, 4);
    for keeper in rig.vmflow.processes("vmf-k") {
        let keeper = rustix::process::Pid::from_raw(keeper.cast_signed()).unwrap();
        rustix::process::kill_process(keeper, rustix::process::Signal::KILL).unwrap();
    }
    wait_attached(&rig, 1);
    hang_up(&mut device);
    let mut device = rig.connect(0, config(2));
    wait_attached(&rig, 2);
    all_arrive(&rig, &mut device, 2);
    rig.vmflow.totals(NAMES[0]);
}

#[test]
fn after_a_tag_every_pairs_frames_carry_the_new_label() {
    const PAIRS: u16 = 4;
    let rig = rig(PAIRS);
    let mut device = rig.connect(0, config(PAIRS));
    wait_attached(&rig, PAIRS.into());
    let each = u64::from(PAIRS);
    for round in 1..=5 {
        for command in [&["suspect", "web1", "--reason", "a test"][..], &["clear", "web1"]] {
            rig.vmflow.ok(command);
            for (flow, pair) in (0..).zip(&mut device.pairs) {
                send(pair, flow, 1);
            }
            inject(&rig, 0..PAIRS, 1);
            receive(&mut device, each);
        }
        let (transmit, received) = rig.check(0, &device, 0);
        for totals in [transmit, received] {
            let frames = round * each;
            assert_eq!((totals.normal.frames, totals.suspect.frames), (frames, frames), "round {round}");
        }
    }
}

/// Changes the port's settings and reloads.
fn reload(rig: &Rig, old: &str, new: &str) -> std::process::Output {
    let main = rig.setup.directory.path().join("vmflow.toml");
    let text = fs::read_to_string(&main).unwrap();
    assert!(text.contains(old), "{text}");
    fs::write(&main, text.replace(old, new)).unwrap();
    rig.vmflow.command(&["reload"])
}

#[test]
fn numbers_go_on_when_a_reload_changes_the_number_of_pairs_while_frames_flow() {
    let rig = rig(4);
    let (mut given_back, mut received) = (0, 0);
    let mut connections = 0;
    for (old, new) in [(4, 2), (2, 16), (16, 1), (1, 4)] {
        let mut device = rig.connect(0, config(old));
        wait_attached(&rig, old.into());
        let mut traffic = Traffic::default();
        traffic.flow(&rig, 0, &mut device, SOME);
        let before = rig.vmflow.totals(NAMES[0]);
        traffic.flow_until_closed(&rig, 0, &mut device, || {
            let output = reload(&rig, &format!("queue_pairs = {old}"), &format!("queue_pairs = {new}"));
            assert_eq!(String::from_utf8_lossy(&output.stdout), "changed: web1\n", "{output:?}");
        });
        traffic.end_of_device(&rig, 0, &mut device);
        wait_for("the new number of pairs", || (rig.vmflow.port(NAMES[0]).queue_pairs == new).then_some(()));
        let after = rig.vmflow.totals(NAMES[0]);
        never_back(&before.0, &after.0);
        never_back(&before.1, &after.1);
        // Nothing is missing: not even what happened after anybody looked.
        given_back += device.pairs.iter().map(|pair| pair.transmit.done()).sum::<u64>();
        received += device.totals().1.frames;
        let (from_guest, to_guest) = rig.kernel(0);
        assert_eq!((after.0.chains, after.0.passed.frames), (given_back, from_guest.frames));
        assert_eq!((after.1.passed.frames, after.1.chains), (received, to_guest));
        connections += 1;
        let port = rig.vmflow.port(NAMES[0]);
        assert_eq!((port.connections, port.connected), (connections, false));
    }
}

#[test]
fn a_tap_that_was_made_with_one_queue_gets_no_more_and_goes_on() {
    let rig = rig(1);
    let mut device = rig.connect(0, Config::default());
    let output = reload(&rig, "queue_pairs = 1", "queue_pairs = 4");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.lines().count() == 1, "{said}");
    for words in [&*rig.taps[0], "has one queue", "multi_queue", "restart vmflow"] {
        assert!(said.contains(words), "{said}");
    }
    all_arrive(&rig, &mut device, 1);
    rig.check(0, &device, 0);
}

#[test]
fn a_tap_with_several_queues_is_handed_in_as_a_descriptor_for_each() {
    let netns = Netns::new();
    let tap = unique("t");
    let queues = netns.inside(|| vmflow::tap::Queues::attach(&tap, 3)).unwrap();
    // One more than is wanted.
    let rig = tap::serve(netns, tap.clone(), queues, "queue_pairs = 2", &tap);
    let mut device = rig.connect(0, config(2));
    wait_attached(&rig, 2);
    all_arrive(&rig, &mut device, 2);
    rig.check(0, &device, 0);
    // Which is there when it is wanted.
    assert!(reload(&rig, "queue_pairs = 2", "queue_pairs = 3").status.success());
    hang_up(&mut device);
    let mut device = rig.connect(0, config(3));
    wait_attached(&rig, 3);
    all_arrive(&rig, &mut device, 3);
    let output = reload(&rig, "queue_pairs = 3", "queue_pairs = 4");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("3 of its queues were handed in: queue_pairs = 4 needs"), "{said}");
    all_arrive(&rig, &mut device, 3);
}
