//! Labels and totals that move from one vmflow to another.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};
use vmflow::{ledger::Totals, monitor::api::document::PortStats};
use vmflow_driver::net::Config;

use crate::{
    harness::{Netns, Setup, VMFLOW, unique},
    rig::{NAMES, Rig, passes},
};

const UUID: &str = "0a1b2c3d-0000-4000-8000-000000000001";

fn vmflow(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(VMFLOW)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// What a command printed that must succeed.
fn ok(arguments: &[&str], input: &str) -> String {
    let output = vmflow(arguments, input);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The lines of a command that must fail.
fn refused(arguments: &[&str], input: &str) -> Vec<String> {
    let output = vmflow(arguments, input);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap().lines().map(str::to_owned).collect()
}

/// Two VMs, of which the first has passed one frame each way; tagged.
struct Old {
    rig: Rig,
    port: PortStats,
}

impl Old {
    fn new() -> Self {
        let rig = Rig::two();
        let mut device = rig.connect(0, Config::default());
        passes(&rig, 0, &mut device);
        rig.vmflow.ok(&["suspect", NAMES[0], "--reason", "scans"]);
        passes(&rig, 0, &mut device);
        drop(device);
        rig.vmflow.wait_connected(NAMES[0], false);
        let port = rig.vmflow.port(NAMES[0]);
        Self { rig, port }
    }

    fn export(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.rig.vmflow.ok(&[&["state", "export"], arguments].concat())).unwrap()
    }
}

/// The directory's content, to see that nothing has changed.
fn content(state: &Path) -> Vec<Vec<u8>> {
    ["registry.json", "totals.json"].map(|name| fs::read(state.join(name)).unwrap()).into()
}

/// A new host whose vmflow does not run.
struct Host {
    setup: Setup,
    state: PathBuf,
}

impl Host {
    fn new() -> Self {
        let setup = Setup::new();
        let state = setup.directory.path().join("state");
        Self { setup, state }
    }

    fn import(&self, document: &Value) -> String {
        ok(&["state", "import", "--state", self.state.to_str().unwrap(), "-"], &document.to_string())
    }

    /// The refusal, after which everything must be as before.
    fn refuses(&self, document: &Value) -> Vec<String> {
        let before = content(&self.state);
        let arguments = ["state", "import", "--state", self.state.to_str().unwrap(), "-"];
        let lines = refused(&arguments, &document.to_string());
        assert_eq!(content(&self.state), before);
        lines
    }

    fn export(&self) -> Value {
        serde_json::from_str(&ok(&["state", "export", "--state", self.state.to_str().unwrap()], "")).unwrap()
    }
}

#[test]
fn a_vm_that_moves_to_another_host_takes_its_label_its_tag_and_its_numbers_along() {
    let old = Old::new();
    let file = old.rig.setup.directory.path().join("web1.json");
    old.rig.vmflow.ok(&["state", "export", "--vm", NAMES[0], file.to_str().unwrap()]);
    let document: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(document["vms"].as_array().unwrap().len(), 1);

    let new = Host::new();
    assert_eq!(
        ok(&["state", "import", "--state", new.state.to_str().unwrap(), file.to_str().unwrap()], ""),
        "imported: 1 label, 1 port\n"
    );
    assert_eq!(new.export(), document, "what was exported is there, and nothing else");
    // Again changes nothing.
    let before = content(&new.state);
    new.import(&document);
    assert_eq!(content(&new.state)[0], before[0]);
    assert_eq!(new.export(), document);

    let (netns, tap) = (Netns::new(), unique("t"));
    let Host { setup, .. } = new;
    let setup = setup.vm("other", &unique("t"), &netns, "").vm(NAMES[0], &tap, &netns, "");
    let vmflow = setup.start();
    let port = vmflow.port(NAMES[0]);
    assert_eq!((&port.transmit, &port.receive), (&old.port.transmit, &old.port.receive));
    assert!(Totals::from(&port.transmit).balances() && port.connections == 1);
    let stats = vmflow.stats();
    let [other, web1] = stats.vms.as_slice() else { panic!("{stats:?}") };
    assert_eq!((web1.label, other.label), (1, 2), "the label was taken when the other came");
    assert_eq!(web1.tag.as_ref().unwrap().reason, "scans");
    assert_eq!(stats.gaps, []);
}

#[test]
fn everything_moves_from_a_stopped_vmflow_to_a_new_directory() {
    let old = Old::new();
    let running = old.export(&[]);
    let Old { rig, .. } = old;
    let state = rig.setup.directory.path().join("state");
    let in_use = refused(&["state", "export", "--state", state.to_str().unwrap()], "");
    assert!(in_use.len() == 1 && in_use[0].contains("in use by another vmflow"), "{in_use:?}");
    let Rig { vmflow, setup, .. } = rig;
    vmflow.stop();
    let stopped: Value =
        serde_json::from_str(&ok(&["state", "export", "--state", state.to_str().unwrap(), "-"], "")).unwrap();
    assert_eq!(stopped, running);
    assert_eq!(stopped["vms"].as_array().unwrap().len(), 2);
    let new = Host::new();
    assert_eq!(new.import(&stopped), "imported: 2 labels, 2 ports\n");
    assert_eq!(new.export(), stopped);
    drop(setup);
}

#[test]
fn an_import_that_contradicts_what_is_there_imports_nothing() {
    let old = Old::new();
    let document = old.export(&[]);
    let new = Host::new();
    new.import(&document);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut document = document.clone();
        change(&mut document["vms"]);
        document
    };
    let chains = |vms: &mut Value, number: u64| {
        vms[0]["ports"][0]["counted"]["transmit"]["chains"] = number.into();
    };

    // Other VMs' labels, a line for each.
    let strangers = with(&|vms| {
        vms[0]["name"] = "a".into();
        vms[1]["uuid"] = UUID.into();
    });
    assert_eq!(
        new.refuses(&strangers),
        [
            "vmflow: label 1 of VM \"a\" belongs to VM \"web1\" here, and labels are never given twice: \
             nothing is imported",
            "vmflow: label 2 of VM \"web2\" belongs to VM \"web2\" here, and labels are never given twice: \
             nothing is imported",
        ]
    );
    // A VM that has another label here.
    assert_eq!(
        new.refuses(&with(&|vms| vms[0]["label"] = 9.into())),
        ["vmflow: VM \"web1\" has label 1 here, not 9: nothing is imported"]
    );
    // Numbers that are lower here and higher there.
    let apart = with(&|vms| {
        chains(vms, 0);
        vms[0]["ports"][0]["counted"]["connections"] = 77.into();
    });
    assert_eq!(
        new.refuses(&apart),
        ["vmflow: port 0 of VM \"web1\": some of its numbers are lower than here, others higher: \
          nothing is imported"]
    );
    // One of them spoils the others.
    let mixed = with(&|vms| {
        let more = json!({"label": 5, "name": "new", "uuid": null, "generation": 1, "retired": false,
                          "tag": null, "ports": []});
        vms.as_array_mut().unwrap().push(more);
        vms[0]["label"] = 9.into();
    });
    assert_eq!(new.refuses(&mixed).len(), 1);
    for (wrong, said) in [
        (with(&|vms| vms[0]["label"] = 0.into()), "label"),
        (with(&|vms| vms[0]["name"] = "../x".into()), "VM name"),
        (with(&|vms| vms[1]["label"] = 1.into()), "label 1"),
        (with(&|vms| vms[0]["generation"] = 0.into()), "belongs to"),
        (json!({"format": "vmflow-state", "version": 2, "vms": []}), "version 2"),
        (json!({"version": 1, "vms": []}), "missing field `format`"),
    ] {
        let lines = new.refuses(&wrong);
        assert!(lines.len() == 1 && lines[0].contains(said), "{lines:?}");
    }

    // Numbers that are all lower do no harm; all higher ones are taken.
    new.import(&with(&|vms| chains(vms, 0)));
    assert_eq!(new.export(), document);
    new.import(&with(&|vms| chains(vms, 1000)));
    assert_eq!(new.export()["vms"][0]["ports"][0]["counted"]["transmit"]["chains"], 1000);
}

#[test]
fn a_running_vmflow_takes_over_vms_that_it_does_not_serve() {
    let old = Old::new();
    let document = old.export(&["--vm", NAMES[0]]).to_string();
    // A label comes along that this host would not give.
    let (netns, setup) = (Netns::new(), Setup::new().with("labels = \"7..=9\""));
    let setup = setup.vm("other", &unique("t"), &netns, "");
    let new = setup.start();
    let control = new.control();
    let import = ["state", "import", "--control", control.to_str().unwrap(), "-"];
    assert_eq!(ok(&import, &document), "imported: 1 label, 1 port\n");
    // It is on disk when it is said to be imported.
    new.kill();
    let setup = setup.vm(NAMES[0], &unique("t"), &netns, "");
    let new = setup.start();
    let port = new.port(NAMES[0]);
    assert_eq!((&port.transmit, &port.receive), (&old.port.transmit, &old.port.receive));
    // Now it is served.
    let lines = refused(&import, &document);
    assert_eq!(
        lines,
        ["vmflow: label 1 of VM \"web1\" is being served: remove its VM first: nothing is imported"]
    );
}

#[test]
fn what_cannot_be_exported_is_said_in_a_line() {
    let old = Old::new();
    let control = old.rig.vmflow.control();
    let one = |arguments: &[&str]| {
        let lines = refused(arguments, "");
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines[0].clone()
    };
    let control = control.to_str().unwrap();
    let export = ["state", "export", "--control", control];
    assert!(one(&[&export[..], &["--vm", "web9"]].concat()).contains("no VM is called \"web9\""));
    assert!(
        one(&[&export[..], &["/nowhere/file"]].concat()).starts_with("vmflow: /nowhere/file: No such file")
    );
    let empty = tempfile::tempdir().unwrap();
    let path = empty.path().to_str().unwrap();
    assert!(one(&["state", "export", "--state", path]).contains("there is no registry.json"));
    assert!(
        one(&["state", "import", "--state", path, "/nowhere"]).starts_with("vmflow: /nowhere: No such file")
    );
    assert_eq!(fs::read_dir(empty.path()).unwrap().count(), 0, "looking leaves nothing");
    let usage = vmflow(&["state", "export", "--control", control, "--state", path], "");
    assert_eq!(usage.status.code(), Some(2));
}
