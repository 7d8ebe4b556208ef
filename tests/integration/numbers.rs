//! Numbers never go back: not when vmflow is stopped, is killed, loses its sockets' directory or its disk.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use vmflow::{
    ledger::Totals,
    monitor::{api::document::PortStats, checkpoint::GapReason},
};
use vmflow_driver::net::{Config, Device};

use crate::{
    deaths::never_back,
    harness::{Netns, Setup, VMFLOW, Vmflow, count, run, unique, wait_for},
    rig::{NAMES, Rig, passes},
    traffic::Traffic,
};

/// Frames each way.
const SOME: u64 = 300;

/// No number of a port is lower than before.
fn port_never_back(before: &PortStats, after: &PortStats) {
    never_back(&Totals::from(&before.transmit), &Totals::from(&after.transmit));
    never_back(&Totals::from(&before.receive), &Totals::from(&after.receive));
    let others = |p: &PortStats| {
        [p.connections, p.refused_connections, p.worker_restarts, p.uncertain, p.queue_faults]
    };
    for (before, after) in others(before).into_iter().zip(others(after)) {
        assert!(after >= before, "{before} to {after}");
    }
}

/// Connects again, at the same place in the rings.
fn reconnect(rig: &Rig, device: &mut Device) {
    device.reconnect(&rig.socket(0)).unwrap_or_else(|e| panic!("{e}: {e:?}"));
    device.first().receive.refill().unwrap();
    rig.wait_carrier(0, true);
}

#[test]
fn a_killed_vmflow_goes_on_from_numbers_no_lower_than_any_that_it_showed() {
    let mut rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    let mut traffic = Traffic::default();
    let times = count(5, 50);
    for round in 1..=times {
        traffic.flow(&rig, 0, &mut device, SOME);
        let mut shown = None;
        traffic.flow_until_closed(&rig, 0, &mut device, || {
            // At different times after the totals were written.
            for _ in 0..=(round % 7) {
                shown = Some(rig.vmflow.port(NAMES[0]));
            }
            rig.vmflow.signal(rustix::process::Signal::KILL);
        });
        rig = rig.again(|vmflow, _| vmflow.kill());
        port_never_back(&shown.unwrap(), &rig.vmflow.port(NAMES[0]));
        rig.vmflow.totals(NAMES[0]);
        let gaps = rig.vmflow.stats().gaps;
        assert_eq!(gaps.len(), usize::try_from(round).unwrap());
        assert!(gaps.iter().all(|gap| gap.reason == GapReason::Killed && gap.from <= gap.to), "{gaps:?}");
        assert_eq!(rig.vmflow.log().count("is lost: vmflow was killed"), 1);
        reconnect(&rig, &mut device);
    }
    traffic.flow(&rig, 0, &mut device, SOME);
    let table = rig.vmflow.ok(&["stats"]);
    assert!(table.contains(&format!("\ngaps: {times}, last 20")) && table.contains("balanced"), "{table}");
}

#[test]
fn a_vmflow_that_was_stopped_goes_on_from_exactly_the_same_numbers_without_a_gap() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    let mut traffic = Traffic::default();
    traffic.flow(&rig, 0, &mut device, SOME);
    traffic.end(&rig, 0, &mut device);
    let before = rig.vmflow.port(NAMES[0]);
    let expected = PortStats { connected: false, ..before };
    let rig = rig.restart();
    assert_eq!(rig.vmflow.port(NAMES[0]), expected);
    assert_eq!(rig.vmflow.stats().gaps, []);
    // Stopped while frames flow: nobody could see the last numbers, but the next run has them.
    reconnect(&rig, &mut device);
    traffic.flow(&rig, 0, &mut device, SOME);
    traffic.flow_until_closed(&rig, 0, &mut device, || rig.vmflow.signal(rustix::process::Signal::TERM));
    let rig = rig.again(|vmflow, _| drop(vmflow.stop()));
    traffic.end_of_device(&rig, 0, &mut device);
    let (transmit, receive) = rig.vmflow.totals(NAMES[0]);
    assert_eq!(transmit.chains, device.first().transmit.done(), "all that the guest was given back");
    assert_eq!((transmit.in_flight, receive.in_flight), (0, 0));
    assert_eq!(rig.vmflow.stats().gaps, []);
}

#[test]
fn without_its_sockets_directory_vmflow_goes_on_from_the_same_numbers() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    passes(&rig, 0, &mut device);
    let before = rig.vmflow.port(NAMES[0]);
    let rig = rig.again(|vmflow, directory| {
        vmflow.kill();
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            if !["state", "vmflow.toml"].iter().any(|kept| entry.file_name() == *kept) {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    });
    assert_eq!(rig.vmflow.port(NAMES[0]), PortStats { connected: false, ..before });
    reconnect(&rig, &mut device);
    passes(&rig, 0, &mut device);
    assert_eq!(rig.vmflow.totals(NAMES[0]).0.chains, 2);
}

#[test]
fn while_nothing_passes_nothing_is_written() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    passes(&rig, 0, &mut device);
    let file = rig.setup.directory.path().join("state/totals.json");
    let written = || fs::metadata(&file).unwrap().modified().unwrap();
    rig.vmflow.stats();
    let before = written();
    // As long as a write is due twice over.
    let second = std::time::Instant::now() + std::time::Duration::from_millis(2200);
    wait_for("two seconds", || {
        rig.vmflow.stats();
        (std::time::Instant::now() > second).then_some(())
    });
    assert_eq!(written(), before);
    // And without anybody who looks, what passes is there after a second.
    passes(&rig, 0, &mut device);
    wait_for("the file", || (written() > before).then_some(()));
}

/// A file system of this size in place of a directory.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, bytes: u32) -> Self {
        fs::create_dir(at).unwrap();
        let options = format!("size={bytes},mode=0700");
        run("mount", &["-t", "tmpfs", "-o", &options, "vmflow-test", &at.display().to_string()]);
        Self(at.to_owned())
    }

    /// Fills it to the last byte.
    fn fill(&self) {
        let mut file = fs::File::create(self.0.join("filler")).unwrap();
        while std::io::Write::write(&mut file, &[0; 512]).is_ok() {}
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_stops_no_frame_is_said_once_and_what_passed_meanwhile_is_written_later() {
    let (netns, tap) = (Netns::new(), unique("t"));
    let setup = Setup::new().vm(NAMES[0], &tap, &netns, "");
    let disk = Disk::mount(&setup.directory.path().join("state"), 64 << 10);
    let vmflow = setup.start();
    let wires = vec![crate::wire::Wire::open(&netns, &tap)];
    let rig = Rig { vmflow, wires, taps: vec![tap], setup, netns };
    let mut device = rig.connect(0, Config::default());
    let mut traffic = Traffic::default();
    traffic.flow(&rig, 0, &mut device, SOME);
    rig.vmflow.stats();
    disk.fill();
    for _ in 0..10 {
        let before = rig.vmflow.port(NAMES[0]);
        traffic.flow(&rig, 0, &mut device, SOME);
        port_never_back(&before, &rig.vmflow.port(NAMES[0]));
    }
    assert!(rig.vmflow.log().wait("totals are not on disk"), "{}", rig.vmflow.log().text());
    assert_eq!(rig.vmflow.log().count("totals are not on disk"), 1, "{}", rig.vmflow.log().text());
    let (status, health) = rig.vmflow.api("GET", "/v1/health", "");
    assert_eq!((status, health["checks"][0]["name"].as_str()), (503, Some("checkpoint")));
    let reason = health["checks"][0]["problems"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("totals.json.new: cannot write it: No space left on device"), "{reason}");
    fs::remove_file(disk.0.join("filler")).unwrap();
    assert!(rig.vmflow.log().wait("totals are written again"));
    assert_eq!(rig.vmflow.api("GET", "/v1/health", "").0, 200);
    traffic.end(&rig, 0, &mut device);
    let (transmit, receive) = rig.check(0, &device, 0);
    let rig = rig.again(|vmflow, _| vmflow.kill());
    assert_eq!(rig.vmflow.totals(NAMES[0]), (transmit, receive));
    drop(rig);
    drop(disk);
}

/// A vmflow that has counted something, and is stopped.
struct Stopped {
    setup: Setup,
    _netns: Netns,
}

impl Stopped {
    fn with_numbers() -> Self {
        let rig = Rig::one("");
        let mut device = rig.connect(0, Config::default());
        passes(&rig, 0, &mut device);
        let Rig { vmflow, setup, netns, .. } = rig;
        vmflow.stop();
        Self { setup, _netns: netns }
    }

    fn state(&self) -> PathBuf {
        self.setup.directory.path().join("state")
    }

    fn totals(&self) -> PathBuf {
        self.state().join("totals.json")
    }

    fn serve(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(VMFLOW);
        command.arg("serve").arg("--config").arg(self.setup.file()).args(arguments);
        command
    }

    /// Starts it; it must refuse in one line with these words.
    fn refuses(&self, arguments: &[&str], words: &[&str]) {
        let Output { status, stderr, .. } = self.serve(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&stderr);
        assert_eq!((status.code(), text.lines().count()), (Some(1), 1), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text} does not say {words:?}");
    }

    fn starts(&self, arguments: &[&str]) -> Vmflow {
        Vmflow::start_as(self.serve(arguments), &self.setup.directory)
    }
}

#[test]
fn lost_totals_are_refused_until_they_are_restored_or_given_up() {
    let stopped = Stopped::with_numbers();
    let intact = fs::read(stopped.totals()).unwrap();
    // An intact file is never forgotten.
    let vmflow = stopped.starts(&["--forget-totals"]);
    assert_eq!(vmflow.totals(NAMES[0]).0.chains, 1);
    vmflow.stop();

    fs::remove_file(stopped.totals()).unwrap();
    stopped.refuses(&[], &["totals.json: missing", "restore it from a backup", "--forget-totals"]);
    for damaged in [&intact[..intact.len() / 2], b"", b"{}", b"\0\0\0\0"] {
        fs::write(stopped.totals(), damaged).unwrap();
        stopped.refuses(&[], &["totals.json: damaged", "restore it from a backup", "--forget-totals"]);
    }
    let newer = String::from_utf8(intact.clone()).unwrap().replace("\"version\":1", "\"version\":2");
    fs::write(stopped.totals(), newer).unwrap();
    stopped.refuses(&["--forget-totals"], &["format version 2"]);

    // The ways out: a backup ..
    fs::write(stopped.totals(), &intact).unwrap();
    let vmflow = stopped.starts(&[]);
    assert_eq!(vmflow.totals(NAMES[0]).0.chains, 1);
    vmflow.stop();
    // .. or none.
    fs::write(stopped.totals(), "{").unwrap();
    let vmflow = stopped.starts(&["--forget-totals"]);
    assert_eq!(vmflow.totals(NAMES[0]).0.chains, 0);
    let gaps = vmflow.stats().gaps;
    assert_eq!(gaps.iter().map(|gap| gap.reason).collect::<Vec<_>>(), [GapReason::Forgotten]);
    vmflow.stop();
    assert_eq!(fs::read(stopped.state().join("totals.json.forgotten")).unwrap(), b"{");
    stopped.starts(&[]).stop();
}

#[test]
fn a_state_directory_without_its_registry_is_refused_until_it_is_moved_away() {
    let stopped = Stopped::with_numbers();
    let registry = stopped.state().join("registry.json");
    let backup = fs::read(&registry).unwrap();
    fs::remove_file(&registry).unwrap();
    stopped.refuses(&[], &["registry.json: missing", "totals.json", "move the directory away"]);
    fs::write(&registry, &backup).unwrap();
    let vmflow = stopped.starts(&[]);
    assert_eq!(vmflow.totals(NAMES[0]).0.chains, 1);
    vmflow.stop();
    fs::remove_file(&registry).unwrap();
    fs::rename(stopped.state(), stopped.setup.directory.path().join("state.old")).unwrap();
    let vmflow = stopped.starts(&[]);
    assert_eq!(vmflow.totals(NAMES[0]).0.chains, 0);
}

#[test]
fn totals_of_labels_that_the_registry_does_not_know_are_given_to_nobody() {
    let stopped = Stopped::with_numbers();
    // A registry from before the first VM, as from an old backup.
    let empty = r#"{"format":"vmflow-registry","version":1,"vms":[]}"#;
    fs::write(stopped.state().join("registry.json"), empty).unwrap();
    stopped.refuses(&[], &["totals of label 1", "restore both from the same backup", "--forget-totals"]);
    let vmflow = stopped.starts(&["--forget-totals"]);
    assert_eq!(vmflow.totals(NAMES[0]).0.chains, 0);
}

#[test]
fn a_clock_that_was_set_back_and_times_that_are_none_hurt_nobody() {
    let stopped = Stopped::with_numbers();
    let text = fs::read_to_string(stopped.totals()).unwrap();
    let mut page: Value = serde_json::from_str(&text).unwrap();
    for written in [u64::MAX, 4_102_444_800] {
        page["written"] = written.into();
        page["clean"] = false.into();
        page["boot"] = "another".into();
        fs::write(stopped.totals(), page.to_string()).unwrap();
        let vmflow = stopped.starts(&[]);
        let gaps = vmflow.stats().gaps;
        let gap = gaps.last().unwrap();
        assert_eq!((&gap.from, gap.reason), (&gap.to, GapReason::Reboot));
        assert_eq!(vmflow.totals(NAMES[0]).0.chains, 1);
        vmflow.stop();
    }
}

#[test]
fn a_vm_with_a_uuid_that_was_removed_and_comes_back_has_its_numbers_again_and_another_has_none() {
    let mut rig = Rig::one("");
    let uuid = "0a1b2c3d-0000-4000-8000-000000000002";
    let (tap, socket) = (unique("t"), rig.vmflow.socket("web2"));
    let vm =
        |more: &str| format!("name=web2,socket={},tap={tap},netns={}{more}", socket.display(), rig.netns.0);
    let (same, other) = (vm(&format!(",uuid={uuid}")), vm(""));
    rig.vmflow.ok(&["add", &same]);
    rig.taps.push(tap.clone());
    rig.wires.push(crate::wire::Wire::open(&rig.netns, &tap));
    let mut device = rig.connect(1, Config::default());
    passes(&rig, 1, &mut device);
    drop(device);
    rig.vmflow.wait_connected("web2", false);
    let before = rig.vmflow.port("web2");
    let comes_back = |vmflow: &Vmflow| {
        vmflow.ok(&["add", &same]);
        assert_eq!(vmflow.port("web2"), before);
        vmflow.ok(&["remove", "web2"]);
    };
    rig.vmflow.ok(&["remove", "web2"]);
    comes_back(&rig.vmflow);
    // A VM of the same name is another one.
    rig.vmflow.ok(&["add", &other]);
    assert_eq!(rig.vmflow.totals("web2"), (Totals::default(), Totals::default()));
    rig.vmflow.ok(&["remove", "web2"]);
    // The same after a kill: what is removed is kept like everything else.
    rig.vmflow.stats();
    rig.taps.pop();
    rig.wires.pop();
    let rig = rig.again(|vmflow, _| vmflow.kill());
    comes_back(&rig.vmflow);
}
