//! Workers and keepers that die or hang while frames flow.

use std::{collections::BTreeSet, fs, time::Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmflow::ledger::{DropReason, Totals};
use vmflow_driver::{
    channel::Deadline,
    memory::Layout,
    net::{Config, Device},
    sequence::Sequence,
};

use crate::{
    harness::{
        PATIENCE, count, dropped,
        harass::{Harasser, scatter},
        name, wait_for,
    },
    held::Held,
    rig::{NAMES, Rig, hang_up, passes},
    session::reconnect,
    traffic::Traffic,
};

/// Frames each way that make sure that it flows.
const SOME: u64 = 300;
/// Most frames of one batch: what a keeper that dies with its worker can leave unpublished.
const BATCH: u64 = 64;
/// Every front end's order of messages.
const SEQUENCES: [Sequence; 4] =
    [Sequence::Plain, Sequence::Qemu, Sequence::Qemu7, Sequence::CloudHypervisor];

/// Numbers that may only grow.
pub fn never_back(before: &Totals, after: &Totals) {
    let pairs = before.words().into_iter().zip(after.words()).enumerate();
    // The second word is `in_flight`, which is no counter.
    for (place, (before, after)) in pairs.filter(|(place, _)| *place != 1) {
        assert!(after >= before, "word {place} went back from {before} to {after}");
    }
}

/// The processes of one port.
fn of_port(rig: &Rig, kind: &str, vm: &str) -> BTreeSet<u32> {
    let belongs = |pid: &u32| name(*pid).ends_with(vm);
    rig.vmflow.processes(kind).into_iter().filter(belongs).collect()
}

/// The only process of this kind that a port has, once it has one.
fn process(rig: &Rig, kind: &str, vm: &str) -> Pid {
    wait_for("the process", || {
        let pid = of_port(rig, kind, vm).into_iter().next()?;
        Pid::from_raw(i32::try_from(pid).unwrap())
    })
}

/// Signals a process that may be gone by now.
fn signal(process: Pid, signal: Signal) -> bool {
    kill_process(process, signal).is_ok()
}

/// Stops a process, and waits until each of its threads stands still.
fn stop(process: Pid) {
    assert!(signal(process, Signal::STOP));
    let stands = |task: &fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    };
    wait_for("the process to stand still", || {
        let tasks = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).unwrap();
        tasks.flatten().all(|task| stands(&task)).then_some(())
    });
}

/// What a VM's deaths may have cost, and no more: both ends agree with the ledger, but for what it calls uncertain.
fn check_after_deaths(rig: &Rig, traffic: &Traffic, device: &Device, deaths: u64) {
    let pairs = u64::try_from(device.pairs.len()).unwrap();
    let port = rig.vmflow.port(NAMES[0]);
    let (transmit, receive) = rig.vmflow.totals(NAMES[0]);
    let (from_guest, to_guest) = rig.kernel(0);
    let (_, received) = device.totals();
    let (lost, doubled) = traffic.lost_and_doubled();
    let gone = dropped(&receive, DropReason::Restart);
    println!(
        "{deaths} deaths: {} uncertain, {doubled} frames doubled, {gone} read and lost, {} lost to the guest",
        port.uncertain,
        traffic.lost_to_guest(to_guest)
    );
    assert_eq!(port.connections, 1, "the front end notices nothing");
    assert_eq!(port.worker_restarts, deaths);
    assert!(port.uncertain <= 2 * pairs * deaths, "one write, one read a pair a death: {}", port.uncertain);
    assert_eq!((lost, traffic.doubled_to_guest()), (0, 0));
    assert!(doubled <= port.uncertain);
    assert_eq!(transmit.passed.frames + doubled, from_guest.frames, "the tap's count");
    assert_eq!(transmit.chains, traffic.sent);
    assert!(to_guest - receive.chains <= port.uncertain, "{to_guest} read, {} counted", receive.chains);
    assert_eq!((receive.passed.frames, receive.passed.bytes), (received.frames, received.bytes));
    assert_eq!(receive.chains, receive.passed.frames + gone);
    assert!(gone <= pairs * deaths);
    assert!(traffic.lost_to_guest(to_guest) <= gone + port.uncertain);
}

/// Kills the worker at random moments under load.
fn killed_under_load(config: Config, deaths: u64) {
    let rig = Rig::with("", &[&format!("queue_pairs = {}", config.pairs), ""]);
    let mut other = rig.connect(1, Config::default());
    let mut device = rig.connect(0, config);
    let (mut traffic, mut others) = (Traffic::default(), Traffic::default());
    traffic.flow(&rig, 0, &mut device, SOME);
    let mut seed = deaths;
    for _ in 0..deaths {
        let before = rig.vmflow.totals(NAMES[0]);
        // Wherever it is now: the killer is another thread, which nothing synchronises with the worker.
        let worker = process(&rig, "vmf-w", NAMES[0]);
        let frames = 1 + scatter(&mut seed, SOME);
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(signal(worker, Signal::KILL)));
            traffic.flow(&rig, 0, &mut device, frames);
        });
        others.step(&rig, 1, &mut other);
        wait_for("another worker", || {
            traffic.step(&rig, 0, &mut device);
            (process(&rig, "vmf-w", NAMES[0]) != worker).then_some(())
        });
        // What the guest has back is in the ledger: the tap must have seen the same.
        for pair in &mut device.pairs {
            pair.transmit.drain(PATIENCE).unwrap();
        }
        let after = rig.vmflow.totals(NAMES[0]);
        never_back(&before.0, &after.0);
        never_back(&before.1, &after.1);
        let (uncertain, (from_guest, to_guest)) = (rig.vmflow.port(NAMES[0]).uncertain, rig.kernel(0));
        let unknown = from_guest.frames - after.0.passed.frames;
        assert!(unknown <= uncertain, "{unknown} frames on the tap more than counted, {uncertain} uncertain");
        assert!(after.1.chains <= to_guest, "{} frames counted, {to_guest} read", after.1.chains);
    }
    traffic.flow(&rig, 0, &mut device, SOME);
    traffic.end_and_empty_tap(&rig, 0, &mut device);
    others.flow(&rig, 1, &mut other, SOME);
    others.end_and_empty_tap(&rig, 1, &mut other);
    check_after_deaths(&rig, &traffic, &device, deaths);
    assert_eq!((others.lost_and_doubled(), others.doubled_to_guest()), ((0, 0), 0));
    rig.check(1, &other, 0);
    assert_eq!(rig.vmflow.port(NAMES[1]).worker_restarts, 0);
}

#[test]
fn a_worker_killed_under_load_is_replaced_and_its_front_end_notices_nothing() {
    killed_under_load(Config::default(), count(20, 1000));
}

#[test]
fn that_is_so_with_several_queue_pairs() {
    for (pairs, deaths) in [(2, count(20, 500)), (4, count(20, 500)), (16, count(5, 50))] {
        killed_under_load(crate::pairs::config(pairs), deaths);
    }
}

#[test]
fn that_is_so_for_every_front_end_and_kind_of_driver() {
    for sequence in SEQUENCES {
        killed_under_load(Config { sequence, ..Config::default() }, count(3, 50));
    }
    let features = vmflow_driver::net::FEATURES & !vmflow_driver::request::feature::EVENT_IDX;
    killed_under_load(Config { features, ..Config::default() }, count(3, 50));
    let scattered = Layout::scattered(8 << 20, 5);
    killed_under_load(Config { memory: Some(scattered), ..Config::default() }, count(3, 50));
    killed_under_load(Config { start: 65_400, ..Config::default() }, count(3, 50));
}

#[test]
fn a_worker_that_hangs_while_frames_flow_is_replaced() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    let mut traffic = Traffic::default();
    for round in 1..=count(1, 5) {
        traffic.flow(&rig, 0, &mut device, SOME);
        // It is in the middle of something, most likely, or waits for the next kick.
        stop(process(&rig, "vmf-w", NAMES[0]));
        wait_for("another worker", || {
            traffic.step(&rig, 0, &mut device);
            (rig.vmflow.port(NAMES[0]).worker_restarts == round).then_some(())
        });
    }
    traffic.flow(&rig, 0, &mut device, SOME);
    traffic.end_and_empty_tap(&rig, 0, &mut device);
    check_after_deaths(&rig, &traffic, &device, count(1, 5));
    assert!(rig.vmflow.log().wait("the worker hangs: another one takes over"));
}

#[test]
fn one_hung_thread_of_several_is_noticed_though_the_others_go_on() {
    const PAIRS: u16 = 3;
    for pair in 0..PAIRS {
        let rig = Rig::one(&format!("queue_pairs = {PAIRS}"));
        let mut device = rig.connect(0, crate::pairs::config(PAIRS));
        let mut traffic = Traffic::default();
        traffic.flow(&rig, 0, &mut device, SOME);
        let held = Held::thread_of_pair(process(&rig, "vmf-w", NAMES[0]), pair.into());
        wait_for("another worker", || {
            traffic.step(&rig, 0, &mut device);
            held.let_it_die();
            (rig.vmflow.port(NAMES[0]).worker_restarts == 1).then_some(())
        });
        traffic.flow(&rig, 0, &mut device, SOME);
        traffic.end_and_empty_tap(&rig, 0, &mut device);
        check_after_deaths(&rig, &traffic, &device, 1);
    }
}

#[test]
fn a_worker_that_hangs_when_something_is_asked_of_it_is_replaced() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    for _ in 0..10 {
        passes(&rig, 0, &mut device);
    }
    stop(process(&rig, "vmf-w", NAMES[0]));
    // Both rings are stopped, and started again: the answers are the new worker's.
    let bases = device.reset(0).unwrap();
    assert_eq!(bases, [10, 10], "where the stopped worker had been");
    device.first().receive.refill().unwrap();
    passes(&rig, 0, &mut device);
    let port = rig.vmflow.port(NAMES[0]);
    assert_eq!((port.worker_restarts, port.connections), (1, 1));
    assert!(rig.vmflow.log().wait("the worker did not answer request"));
}

#[test]
fn an_idle_worker_that_is_stopped_is_noticed_when_the_guest_has_something_for_it() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    passes(&rig, 0, &mut device);
    stop(process(&rig, "vmf-w", NAMES[0]));
    passes(&rig, 0, &mut device);
    assert_eq!(rig.vmflow.port(NAMES[0]).worker_restarts, 1);
    // Nothing was in hand when it was stopped.
    assert_eq!(rig.vmflow.port(NAMES[0]).uncertain, 0);
    rig.check(0, &device, 0);
}

#[test]
fn kills_through_a_front_ends_start_and_its_drivers_reloads_lose_nothing() {
    for sequence in SEQUENCES {
        let rig = Rig::one("");
        let harasser = Harasser::of(&rig.vmflow, NAMES[0]);
        let mut device = rig.connect(0, Config { sequence, ..Config::default() });
        let mut traffic = Traffic::default();
        for _ in 0..count(3, 50) {
            traffic.flow(&rig, 0, &mut device, 20);
            traffic.end(&rig, 0, &mut device);
            device.reset(0).unwrap();
            device.first().receive.refill().unwrap();
        }
        traffic.flow(&rig, 0, &mut device, 20);
        let kills = harasser.stop();
        traffic.flow(&rig, 0, &mut device, 20);
        traffic.end_and_empty_tap(&rig, 0, &mut device);
        wait_for("the last death to be counted", || {
            (rig.vmflow.port(NAMES[0]).worker_restarts == kills).then_some(())
        });
        let port = rig.vmflow.port(NAMES[0]);
        let (transmit, receive) = rig.vmflow.totals(NAMES[0]);
        let (lost, doubled) = traffic.lost_and_doubled();
        let stopped = dropped(&receive, DropReason::RingDisabled);
        println!("{sequence:?}: {kills} kills, {} uncertain, {doubled} doubled", port.uncertain);
        assert!(kills > 5, "{kills} kills only");
        assert_eq!((port.connections, port.connections_given_up), (1, 0));
        assert_eq!((lost, traffic.doubled_to_guest()), (0, 0));
        assert!(doubled <= port.uncertain && port.uncertain <= 2 * kills);
        assert_eq!(transmit.passed.frames + doubled, rig.kernel(0).0.frames);
        let gone = dropped(&receive, DropReason::Restart) + port.uncertain + stopped;
        assert!(traffic.lost_to_guest(rig.kernel(0).1) <= gone);
    }
}

#[test]
fn a_guest_that_breaks_every_worker_loses_its_connection_and_is_counted() {
    let rig = Rig::two();
    let mut other = rig.connect(1, Config::default());
    let memory = Layout::single(4 << 20).unsealed();
    let mut device = rig.connect(0, Config { memory: Some(memory), queue_size: 64, ..Config::default() });
    passes(&rig, 0, &mut device);
    // What it shares is gone: whoever looks at a ring is killed by SIGBUS, and so is whoever comes after.
    let file = device.memory.file(&device.memory.regions()[0]).try_clone_to_owned().unwrap();
    rustix::fs::ftruncate(&file, 0).unwrap();
    rig.wires[0].send(&crate::rig::frame(100, 1));
    device.session.channel().wait_closed(Deadline::within(PATIENCE)).unwrap();
    assert!(rig.vmflow.log().wait("this guest breaks every worker"), "the log says why");
    wait_for("the end of the connection", || (!rig.vmflow.port(NAMES[0]).connected).then_some(()));
    let port = rig.vmflow.port(NAMES[0]);
    assert_eq!((port.connections_given_up, port.connections, port.worker_restarts), (1, 1, 10));
    let lines = rig.vmflow.log().count("another one takes over");
    assert!(lines <= 3, "{lines} lines for ten deaths at once");
    rig.vmflow.totals(NAMES[0]);
    passes(&rig, 1, &mut other);
    rig.check(1, &other, 0);
    std::mem::forget(device); // its mapping is as good as gone
}

#[test]
fn a_killed_keeper_costs_its_vm_a_reconnect_and_the_other_vm_nothing() {
    killed_keeper(Config::default());
}

#[test]
fn a_killed_keeper_costs_no_more_with_several_queue_pairs() {
    killed_keeper(crate::pairs::config(4));
}

fn killed_keeper(config: Config) {
    let pairs = u64::from(config.pairs);
    let rig = Rig::with("", &[&format!("queue_pairs = {pairs}"), ""]);
    let mut other = rig.connect(1, Config::default());
    let mut device = rig.connect(0, config);
    let (mut traffic, mut others) = (Traffic::default(), Traffic::default());
    let times = count(10, 100);
    for round in 1..=times {
        traffic.flow(&rig, 0, &mut device, SOME);
        let before = rig.vmflow.totals(NAMES[0]);
        let processes = of_port(&rig, "vmf-", NAMES[0]);
        let keeper = process(&rig, "vmf-k", NAMES[0]);
        traffic.flow_until_closed(&rig, 0, &mut device, || assert!(signal(keeper, Signal::KILL)));
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
    let uncertain = rig.vmflow.port(NAMES[0]).uncertain;
    let (transmit, receive) = rig.vmflow.totals(NAMES[0]);
    let (from_guest, to_guest) = rig.kernel(0);
    let (_, received) = device.totals();
    let unseen = receive.passed.frames - received.frames;
    let unmatched = dropped(&receive, DropReason::RestartUnmatched);
    println!(
        "{times} deaths: {uncertain} uncertain, {doubled} sent again and counted, {unmatched} read and not \
         published, {unseen} counted and perhaps not published"
    );
    assert!(uncertain <= 2 * pairs * times);
    assert!(from_guest.frames - transmit.passed.frames <= uncertain, "what was sent is counted, also twice");
    assert!(to_guest - receive.chains <= uncertain);
    // Sent and not published is sent again; a batch in the ledger may not have been published.
    let batches = pairs * times * BATCH;
    assert!(doubled <= batches && unseen <= batches && unmatched <= batches);
}

#[test]
fn a_keeper_that_cannot_go_on_leaves_the_vmm_to_reconnect() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    passes(&rig, 0, &mut device);
    let keeper = process(&rig, "vmf-k", NAMES[0]);
    assert!(signal(keeper, Signal::KILL));
    device.session.channel().wait_closed(Deadline::within(PATIENCE)).unwrap();
    hang_up(&mut device);
    let begin = Instant::now();
    reconnect(&rig, 0, &mut device);
    rig.wait_carrier(0, true);
    passes(&rig, 0, &mut device);
    println!("back after {:?}", begin.elapsed());
    rig.check(0, &device, 0);
}
