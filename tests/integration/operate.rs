//! What an operator asks besides numbers: is all well, what runs, and how much is said in the log.

use std::{
    fs,
    os::unix::net::UnixDatagram,
    process::{Command, Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmflow_driver::{channel::Channel, net::Config};

use crate::{
    harness::{Netns, PATIENCE, Setup, VMFLOW, Vmflow, json, unique, wait_for},
    rig::{NAMES, Rig, passes},
};

/// A check of the health, and its problems.
fn check(vmflow: &Vmflow, name: &str) -> Vec<Value> {
    let (status, health) = vmflow.api("GET", "/v1/health", "");
    let checks = json(&health, "/checks").as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == name).unwrap();
    let problems = check["problems"].as_array().unwrap().clone();
    assert_eq!(check["status"], if problems.is_empty() { "ok" } else { "degraded" });
    assert_eq!(health["status"], if status == 200 { "ok" } else { "degraded" });
    assert!(status == 200 || status == 503 && health["status"] == "degraded");
    problems
}

/// Waits until a check has this number of problems, and gives them.
fn problems(vmflow: &Vmflow, name: &str, number: usize) -> Vec<Value> {
    wait_for("the health", || Some(check(vmflow, name)).filter(|problems| problems.len() == number))
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

#[test]
fn a_tap_that_is_down_or_gone_is_named_with_its_vm() {
    let rig = Rig::two();
    let (status, health) = rig.vmflow.api("GET", "/v1/health", "");
    assert_eq!((status, json(&health, "/status").as_str()), (200, Some("ok")));
    assert!(rig.vmflow.ok(&["health"]).ends_with("status: ok\n"));
    let tap = rig.taps[1].as_str();
    rig.netns.run("ip", &["link", "set", tap, "down"]);
    let [problem] = &check(&rig.vmflow, "taps")[..] else { panic!("one tap is down") };
    assert_eq!((&problem["vm"], &problem["port"]), (&"web2".into(), &0.into()));
    assert_eq!(problem["reason"], "the tap takes no frames: is it up?");
    rig.netns.run("ip", &["link", "set", tap, "up"]);
    assert!(check(&rig.vmflow, "taps").is_empty());
    rig.netns.run("ip", &["link", "del", tap]);
    assert_eq!(check(&rig.vmflow, "taps")[0]["reason"], "the tap is gone");
    let Output { status, stdout, stderr } = rig.vmflow.command(&["health"]);
    let text = String::from_utf8_lossy(&stdout);
    assert_eq!((status.code(), stderr.len()), (Some(1), 0));
    assert!(text.contains("taps: degraded\n  web2, port 0: the tap is gone\n"), "{text}");
}

#[test]
fn workers_that_keep_dying_and_policies_that_are_not_taken_are_problems() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    passes(&rig, 0, &mut device);
    // With its keeper, or that would take the worker for one that hangs, and have another take over.
    let stopped = rig.vmflow.processes("vmf-");
    for pid in &stopped {
        signal(*pid, Signal::STOP);
    }
    assert!(!rig.vmflow.command(&["suspect", "web1", "--reason", "x"]).status.success());
    let [problem] = &problems(&rig.vmflow, "policies", 1)[..] else { unreachable!() };
    assert!(problem["reason"].as_str().unwrap().starts_with("the worker has not taken its policy"));
    for pid in &stopped {
        signal(*pid, Signal::CONT);
    }
    problems(&rig.vmflow, "policies", 0);

    let before = rig.vmflow.port(NAMES[0]).worker_restarts;
    for deaths in 1..=3 {
        signal(wait_for("a worker", || rig.vmflow.processes("vmf-w").pop()), Signal::KILL);
        let restarts = || rig.vmflow.port(NAMES[0]).worker_restarts;
        wait_for("the death", || (restarts() >= before + deaths).then_some(()));
    }
    let [problem] = &problems(&rig.vmflow, "workers", 1)[..] else { unreachable!() };
    assert!(problem["reason"].as_str().unwrap().ends_with("workers died within 60 s"), "{problem}");
    passes(&rig, 0, &mut device);
}

#[test]
fn the_version_is_told() {
    let rig = Rig::one("");
    let own = env!("CARGO_PKG_VERSION");
    let (_, version) = rig.vmflow.api("GET", "/v1/version", "");
    assert_eq!(version["version"], own);
    let text = rig.vmflow.ok(&["version"]);
    assert_eq!(text, format!("this program: {own}\nrunning: {own}, API version 1\n"));
}

#[test]
fn how_much_is_logged_changes_while_vmflow_runs_and_for_keepers_that_start_later() {
    let rig = Rig::one("");
    let log = rig.vmflow.log();
    let connects = || {
        drop(rig.connect(0, Config::default()));
        rig.vmflow.wait_connected(NAMES[0], false);
    };
    let counts = || (log.count("a front end is connected"), log.count("from the front end"));
    assert_eq!(rig.vmflow.ok(&["log-level"]), "vmflow=debug\n");
    assert_eq!(rig.vmflow.ok(&["log-level", "warn"]), "vmflow=warn\n");
    connects();
    assert_eq!(rig.vmflow.ok(&["log-level", "vmflow=info,vmflow::keeper=trace"]).lines().count(), 1);
    connects();
    assert!(log.wait("the front end is disconnected") && log.wait("from the front end"));
    let (connected, messages) = counts();
    assert!(connected == 1 && messages > 5, "{connected} {messages}");
    // A level of our own modules, for short, through the API.
    let (status, level) = rig.vmflow.api("PUT", "/v1/log", r#"{"level": "error"}"#);
    assert_eq!((status, &level["level"]), (200, &"vmflow=error".into()));
    connects();
    assert_eq!(counts(), (connected, messages));
    for wrong in [r#"{"level": "lod"}"#, r#"{"level": "vmflow=loud"}"#, r#"{"level": 3}"#, "{}", ""] {
        assert_eq!(rig.vmflow.api("PUT", "/v1/log", wrong).0, 400, "{wrong}");
    }
    let wrong = rig.vmflow.command(&["log-level", "lod"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert_eq!(rig.vmflow.ok(&["log-level"]), "vmflow=error\n");
}

#[test]
fn nonsense_about_the_log_is_refused_before_anything_begins() {
    let setup = Setup::new();
    for (variable, value) in [("VMFLOW_LOG", "lod"), ("VMFLOW_LOG_FORMAT", "xml")] {
        let mut serve = Command::new(VMFLOW);
        serve.arg("serve").arg("--config").arg(setup.file()).env(variable, value);
        let Output { status, stderr, .. } = serve.output().unwrap();
        let text = String::from_utf8_lossy(&stderr);
        assert_eq!((status.code(), text.lines().count()), (Some(2), 1), "{text}");
        assert!(text.contains(&format!("\"{value}\"")), "{text}");
    }
}

/// Connects, is refused a second time, is tagged, loses its worker, and goes.
fn eventful(rig: &Rig) {
    let mut device = rig.connect(0, Config::default());
    passes(rig, 0, &mut device);
    let second = Channel::connect(&rig.socket(0)).unwrap();
    second.wait_closed(vmflow_driver::channel::Deadline::within(PATIENCE)).unwrap();
    rig.vmflow.ok(&["suspect", "web1", "--reason", "scans"]);
    signal(rig.vmflow.processes("vmf-w")[0], Signal::KILL);
    assert!(rig.vmflow.log().wait("another one takes over"));
    passes(rig, 0, &mut device);
    drop(device);
    assert!(rig.vmflow.log().wait("the front end is disconnected"));
}

#[test]
fn every_line_about_a_vm_names_vm_label_and_port() {
    let rig = Rig::one("");
    eventful(&rig);
    let text = rig.vmflow.log().text();
    let (of_host, of_vms): (Vec<_>, Vec<_>) =
        text.lines().partition(|line| line.contains("vmflow::monitor: ") || line.contains("api"));
    assert!(of_host.len() < 3, "{of_host:#?}");
    assert!(of_vms.len() >= 6, "{text}");
    for line in of_vms {
        let port = if line.contains("the operator's tag") { "" } else { " port=0" };
        assert!(line.contains(&format!("vm=\"web1\" label=1{port}")), "{line}");
        assert_eq!(line.matches("vm=").count(), 1, "{line}");
    }
}

#[test]
fn as_json_each_line_is_an_object_of_the_keepers_too() {
    let (netns, tap) = (Netns::new(), unique("t"));
    let setup = Setup::new().vm(NAMES[0], &tap, &netns, "");
    let mut command = Command::new(VMFLOW);
    command.args(["serve", "--log-format", "json", "--config"]).arg(setup.file());
    let vmflow = Vmflow::start_as(command, &setup.directory);
    let wires = vec![crate::wire::Wire::open(&netns, &tap)];
    let rig = Rig { vmflow, wires, taps: vec![tap], setup, netns };
    eventful(&rig);
    let text = rig.vmflow.log().text();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_ports: Vec<_> = lines.iter().filter(|line| line["span"].is_object()).collect();
    for line in &of_ports {
        let span = &line["span"];
        let about = (&span["vm"], &span["label"], &span["port"]);
        assert_eq!(about, (&"web1".into(), &1.into(), &0.into()), "{line}");
    }
    let from = |name: &str| of_ports.iter().any(|line| line["span"]["name"] == name);
    assert!(from("port") && from("keeper"), "{text}");
}

/// The fields of a journal entry in the journal's native protocol: `NAME`, a little-endian length, the value.
fn fields(entry: &[u8]) -> Vec<(String, String)> {
    let (mut rest, mut found) = (entry, Vec::new());
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let name = String::from_utf8(rest[..end].to_vec()).unwrap();
        if let Some((name, value)) = name.split_once('=') {
            found.push((name.to_owned(), value.to_owned()));
            rest = &rest[end + 1..];
            continue;
        }
        let value = &rest[end + 9..];
        let length = u64::from_le_bytes(rest[end + 1..end + 9].try_into().unwrap());
        let (value, after) = value.split_at(usize::try_from(length).unwrap());
        found.push((name, String::from_utf8_lossy(value).into_owned()));
        rest = &after[1..];
    }
    found
}

#[test]
fn in_the_journal_vm_label_and_port_are_fields() {
    let (netns, setup) = (Netns::new(), Setup::new());
    let setup = setup.vm(NAMES[0], &unique("t"), &netns, "");
    let at = setup.directory.path().join("journal");
    fs::create_dir(&at).unwrap();
    let journal = UnixDatagram::bind(at.join("socket")).unwrap();
    journal.set_read_timeout(Some(PATIENCE)).unwrap();
    // A /run of its own, with our socket where the journal's is; only what netns needs is taken over.
    let script = "mount --make-rprivate / && mkdir netns && mount --rbind /run/netns netns \
        && mount -t tmpfs vmflow-test /run && mkdir -p /run/netns /run/systemd/journal \
        && mount --rbind netns /run/netns && mount --bind journal /run/systemd/journal \
        && export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) && exec \"$0\" serve --config vmflow.toml";
    setup.file();
    let child = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, VMFLOW])
        .current_dir(setup.directory.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let child = Ended(child);
    let entry = |message: &str| loop {
        let mut bytes = [0; 4096];
        let length = journal.recv(&mut bytes).unwrap();
        let fields = fields(&bytes[..length]);
        let value = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
        if value("MESSAGE").is_some_and(|said| said.contains(message)) {
            return ["VM", "LABEL", "PORT", "SYSLOG_IDENTIFIER"].map(value);
        }
    };
    let field = |text: &str| Some(text.to_owned());
    assert_eq!(entry("ready: 1 VMs"), [None, None, None, field("vmflow")]);
    let second = Channel::connect(&setup.socket(NAMES[0])).unwrap();
    let wanted = [field("web1"), field("1"), field("0"), field("vmflow")];
    assert_eq!(entry("a front end is connected"), wanted);
    drop(second);
    assert_eq!(entry("the front end is disconnected"), wanted);
    // The keeper's lines are text, and not lost.
    drop(child.terminated().filter(|text| text.contains("keeper{vm=\"web1\" label=1 port=0}")).unwrap());
}

/// A process that ends with the test.
struct Ended(std::process::Child);

impl Ended {
    /// Ends it in good order; gives what it said.
    fn terminated(mut self) -> Option<String> {
        signal(self.0.id(), Signal::TERM);
        wait_for("its end", || self.0.try_wait().unwrap());
        std::io::read_to_string(self.0.stderr.take()?).ok()
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
