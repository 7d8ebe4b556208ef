//! What an operator asks besides numbers: is all well, and what runs.

use std::process::Output;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmflow_driver::net::Config;

use crate::{
    harness::{Vmflow, json, wait_for},
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
    let worker = rig.vmflow.processes("vmf-w")[0];
    signal(worker, Signal::STOP);
    assert!(!rig.vmflow.command(&["suspect", "web1", "--reason", "x"]).status.success());
    let [problem] = &problems(&rig.vmflow, "policies", 1)[..] else { unreachable!() };
    assert!(problem["reason"].as_str().unwrap().starts_with("the worker has not taken its policy"));
    signal(worker, Signal::CONT);
    problems(&rig.vmflow, "policies", 0);

    assert!(check(&rig.vmflow, "workers").is_empty());
    for restarts in 1..=3 {
        signal(rig.vmflow.processes("vmf-w")[0], Signal::KILL);
        wait_for("the death", || (rig.vmflow.port(NAMES[0]).worker_restarts == restarts).then_some(()));
        rig.vmflow.wait_connected(NAMES[0], false);
        device = rig.connect(0, Config::default());
    }
    let [problem] = &problems(&rig.vmflow, "workers", 1)[..] else { unreachable!() };
    assert_eq!(problem["reason"], "3 workers died within 60 s");
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
