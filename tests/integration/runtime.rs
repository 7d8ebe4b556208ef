//! VMs that come and go while vmflow runs.

use std::{path::PathBuf, process::Command};

use serde_json::{Value, json};
use vmflow_driver::net::{Config, Device};

use crate::{
    harness::{PATIENCE, Vmflow, unique, wait_for},
    rig::{Rig, frame, receive_one, send_one},
    wire::Wire,
};

/// A VM that is to come: its tap goes to the rig's namespace.
struct Guest {
    name: String,
    socket: PathBuf,
    tap: String,
    netns: String,
}

impl Guest {
    fn new(rig: &Rig, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            socket: rig.vmflow.socket(name),
            tap: unique("t"),
            netns: rig.netns.0.clone(),
        }
    }

    /// As `vmflow add` takes it.
    fn argument(&self, more: &str) -> String {
        let Self { name, socket, tap, netns } = self;
        format!("name={name},socket={},tap={tap},netns={netns}{more}", socket.display())
    }

    /// As `POST /v1/vms` takes it.
    fn json(&self) -> Value {
        let Self { name, socket, tap, netns } = self;
        json!({ "name": name, "port": [{ "socket": socket, "tap": tap, "netns": netns }] })
    }

    /// A driver at its socket sends a frame and gets one.
    fn passes(&self, rig: &Rig) -> Device {
        let wire = Wire::open(&rig.netns, &self.tap);
        let mut device = Device::connect(&self.socket, Config { patience: PATIENCE, ..Config::default() })
            .unwrap_or_else(|e| panic!("{e}: {e:?}"));
        device.first().receive.refill().unwrap();
        let path = format!("/sys/class/net/{}/operstate", self.tap);
        wait_for("the tap's carrier", || (rig.netns.run("cat", &[&path]).trim() == "up").then_some(()));
        send_one(&mut device, &frame(100, 1));
        assert_eq!(wire.receive().bytes, frame(100, 1));
        wire.send(&frame(200, 2));
        assert_eq!(receive_one(&mut device), frame(200, 2));
        device
    }
}

/// A request on the control socket with curl: status and document.
fn curl(vmflow: &Vmflow, method: &str, path: &str, body: &str) -> (u16, Value) {
    let output = Command::new("curl")
        .args([
            "--silent",
            "--show-error",
            "--max-time",
            "20",
            "--write-out",
            "%{http_code}",
            "--unix-socket",
        ])
        .arg(vmflow.control())
        .args(["-X", method, "-d", body, &format!("http://vmflow{path}")])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let (document, status) = text.trim_end().split_at(text.trim_end().len() - 3);
    (status.parse().unwrap(), serde_json::from_str(document).unwrap())
}

/// The VMs and their labels.
fn labels(vmflow: &Vmflow) -> Vec<(String, u32)> {
    vmflow.stats().vms.into_iter().map(|vm| (vm.name, vm.label)).collect()
}

#[test]
fn a_vm_that_is_added_by_command_is_served_kept_over_a_restart_and_gone_when_removed() {
    let rig = Rig::one("");
    let guest = Guest::new(&rig, "web3");
    let said = rig.vmflow.ok(&["add", &guest.argument(",mtu=1400")]);
    assert!(said.starts_with("web3 is added: label 2, "), "{said}");
    drop(guest.passes(&rig));

    let rig = rig.restart();
    assert_eq!(labels(&rig.vmflow), [("web1".into(), 1), ("web3".into(), 2)]);
    assert!(rig.netns.run("ip", &["link", "show", &guest.tap]).contains("mtu 1400"));
    drop(guest.passes(&rig));

    assert_eq!(rig.vmflow.ok(&["remove", "web3"]), "web3 is removed, and its label 2 retired\n");
    assert!(!guest.socket.exists(), "its socket is still there");
    assert!(!rig.netns.run("ip", &["link"]).contains(&guest.tap), "its tap is still there");
    assert_eq!(labels(&rig.vmflow), [("web1".into(), 1)]);

    let rig = rig.restart();
    assert_eq!(labels(&rig.vmflow), [("web1".into(), 1)]);
    assert!(rig.vmflow.ok(&["add", &guest.argument("")]).contains("label 3"), "the label is never reused");
    drop(guest.passes(&rig));
}

#[test]
fn a_vm_is_added_and_removed_with_curl() {
    let rig = Rig::one("");
    let guest = Guest::new(&rig, "web3");
    let (status, vm) = curl(&rig.vmflow, "POST", "/v1/vms", &guest.json().to_string());
    assert_eq!(
        (status, vm["label"].as_u64(), vm["ports"][0]["tap"].as_str()),
        (201, Some(2), Some(&*guest.tap))
    );
    drop(guest.passes(&rig));
    let (status, again) = curl(&rig.vmflow, "POST", "/v1/vms", &guest.json().to_string());
    assert_eq!((status, &again["label"]), (200, &vm["label"]), "hooks repeat themselves");
    let (status, vm) = curl(&rig.vmflow, "DELETE", "/v1/vms/web3", "");
    assert_eq!((status, vm["name"].as_str()), (200, Some("web3")));
    assert_eq!(curl(&rig.vmflow, "DELETE", "/v1/vms/web3", "").0, 404);
    assert_eq!(labels(&rig.vmflow).len(), 1);
}
