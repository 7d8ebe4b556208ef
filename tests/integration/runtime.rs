//! VMs that come and go while vmflow runs.

use std::{
    cell::RefCell,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use serde_json::{Value, json};
use vmflow::ledger::DropReason;
use vmflow_driver::{
    channel::Deadline,
    net::{Config, Device},
};

use crate::{
    harness::{Netns, PATIENCE, Setup, VMFLOW, Vmflow, count, dropped, run, unique, wait_for},
    rig::{NAMES, Rig, frame, passes, receive_one, send_one},
    traffic::Traffic,
    wire::Wire,
};

thread_local! {
    /// The names of taps that this test uses: taps are made where those of other tests are, too.
    static TAPS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// A name for a tap.
fn tap_name() -> String {
    let name = unique("t");
    TAPS.with_borrow_mut(|taps| taps.push(name.clone()));
    name
}

/// A VM that is to come: its tap goes to the rig's namespace.
#[derive(Clone)]
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
            tap: tap_name(),
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

    /// As a file has it.
    fn toml(&self, more: &str) -> String {
        let Self { name, socket, tap, netns } = self;
        let socket = socket.display();
        format!(
            "[[vm]]\nname = \"{name}\"\n[[vm.port]]\nsocket = \"{socket}\"\ntap = \"{tap}\"\nnetns = \"{netns}\"\n{more}\n"
        )
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
    assert!(rig.vmflow.log().wait("label=2 by=\"root (uid 0, pid "), "the log says who did it");
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

/// Everything that a change could leave behind: what is on disk, in the network, and running.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    files: Vec<(PathBuf, String)>,
    interfaces: [String; 2],
    processes: Vec<u32>,
    vms: String,
}

impl Traces {
    fn of(rig: &Rig) -> Self {
        let mut files = Vec::new();
        collect(rig.vmflow.directory(), &mut files);
        // Totals are written again while they grow, whatever changes.
        files.retain(|(path, _)| !path.file_name().unwrap().to_string_lossy().starts_with("totals.json"));
        files.sort();
        let interfaces = [run("ls", &["/sys/class/net"]), rig.netns.run("ls", &["/sys/class/net"])];
        let own = |list: &String| {
            let of_this_test = |name: &&str| TAPS.with_borrow(|taps| taps.iter().any(|tap| tap == name));
            list.lines().filter(of_this_test).collect::<Vec<_>>().join(" ")
        };
        let processes = [rig.vmflow.processes("vmf-k"), rig.vmflow.processes("vmf-w")].concat();
        Self {
            files,
            interfaces: interfaces.each_ref().map(own),
            processes,
            vms: rig.vmflow.ok(&["vms", "--json"]),
        }
    }
}

fn collect(directory: &Path, files: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => {
                collect(&path, files);
                files.push((path, String::new()));
            }
            kind if kind.is_file() => files.push((path.clone(), fs::read_to_string(&path).unwrap())),
            _ => files.push((path, String::new())),
        }
    }
}

/// A change that is refused with this exit code and these words, one line for each, and leaves no trace.
fn refused(rig: &Rig, arguments: &[&str], code: i32, words: &[&str]) {
    let before = Traces::of(rig);
    let output = rig.vmflow.command(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("vmflow: "), "{text}");
    for word in words {
        assert!(text.contains(word), "{text} does not say {word:?}");
    }
    assert_eq!(before, Traces::of(rig), "after {text}");
}

/// A file in `vms.d` beside the configuration.
fn vms_file(rig: &Rig, name: &str, text: &str) -> PathBuf {
    let dir = rig.vmflow.directory().join("vms.d");
    fs::create_dir_all(&dir).unwrap();
    let file = dir.join(name);
    fs::write(&file, text).unwrap();
    file
}

#[test]
fn files_are_reloaded_by_command_and_by_signal_and_only_what_they_change_is_changed() {
    let rig = Rig::two();
    let mut devices = [rig.connect(0, Config::default()), rig.connect(1, Config::default())];
    let keepers = rig.vmflow.processes("vmf-k");
    let (third, fourth) = (Guest::new(&rig, "web3"), Guest::new(&rig, "web4"));
    assert_eq!(rig.vmflow.ok(&["reload"]), "nothing is different\n");

    vms_file(&rig, "3.toml", &third.toml(""));
    assert_eq!(rig.vmflow.ok(&["reload"]), "added: web3\n");
    drop(third.passes(&rig));

    let file = vms_file(&rig, "3.toml", &fourth.toml("mtu = 1300"));
    rig.vmflow.signal(rustix::process::Signal::HUP);
    assert!(rig.vmflow.log().wait(r#"is reloaded added=["web4"] removed=["web3"] changed=[] by="SIGHUP""#));
    assert_eq!(labels(&rig.vmflow)[2], ("web4".into(), 4), "the label of web3 is not given again");
    assert!(!third.socket.exists());
    drop(fourth.passes(&rig));

    fs::remove_file(file).unwrap();
    let (status, changes) = curl(&rig.vmflow, "POST", "/v1/reload", "");
    assert_eq!((status, &changes["removed"], &changes["added"]), (200, &json!(["web4"]), &json!([])));

    assert_eq!(rig.vmflow.processes("vmf-k"), keepers, "ports that did not change keep their keepers");
    for (vm, device) in devices.iter_mut().enumerate() {
        passes(&rig, vm, device);
        rig.check(vm, device, 0);
        assert_eq!(rig.vmflow.port(NAMES[vm]).connections, 1);
    }
}

#[test]
fn a_port_that_changes_ends_its_connection_and_goes_on_with_its_numbers() {
    let rig = Rig::two();
    let guest = Guest::new(&rig, "web3");
    let file = vms_file(&rig, "3.toml", &guest.toml("mtu = 1400"));
    rig.vmflow.ok(&["reload"]);
    let mut other = rig.connect(0, Config::default());
    let mut device = guest.passes(&rig);
    let index = || rig.netns.run("cat", &[&format!("/sys/class/net/{}/ifindex", guest.tap)]);
    let (tap, label) = (index(), labels(&rig.vmflow)[2].1);

    fs::write(&file, guest.toml("mtu = 1300\nsocket_mode = \"0600\"")).unwrap();
    assert_eq!(rig.vmflow.ok(&["reload"]), "changed: web3\n");
    device.session.channel().wait_closed(Deadline::within(PATIENCE)).unwrap();
    drop(device);
    let mode = fs::metadata(&guest.socket).unwrap().permissions().mode();
    assert_eq!((mode & 0o777, index()), (0o600, tap), "the same tap, and the socket's new mode");
    assert!(rig.netns.run("ip", &["link", "show", &guest.tap]).contains("mtu 1300"));
    device = guest.passes(&rig);
    let (transmit, receive) = rig.vmflow.totals("web3");
    assert_eq!((transmit.passed.frames, receive.passed.frames), (2, 2), "numbers go on");
    assert_eq!(rig.vmflow.port("web3").connections, 2);
    assert_eq!(labels(&rig.vmflow)[2].1, label);

    // The suspect action is a policy: the connection stays.
    fs::write(&file, guest.toml("mtu = 1300\nsocket_mode = \"0600\"\n[vm.suspect]\naction = \"drop\""))
        .unwrap();
    assert_eq!(rig.vmflow.ok(&["reload"]), "changed: web3\n");
    rig.vmflow.ok(&["suspect", "web3", "--reason", "a test"]);
    send_one(&mut device, &frame(100, 3));
    let (transmit, _) = rig.vmflow.totals("web3");
    assert_eq!(dropped(&transmit, DropReason::SuspectPolicy), 1);
    assert_eq!(rig.vmflow.port("web3").connections, 2);
    passes(&rig, 0, &mut other);
    assert_eq!(rig.vmflow.port(NAMES[0]).connections, 1);
}

#[test]
fn the_hosts_suspect_action_changes_while_frames_flow() {
    let rig = Rig::two();
    let mut device = rig.connect(0, Config::default());
    rig.vmflow.ok(&["suspect", "web1", "--reason", "a test"]);
    passes(&rig, 0, &mut device);
    let main = rig.setup.file();
    let text = fs::read_to_string(&main).unwrap();
    fs::write(&main, text + "[suspect]\naction = \"drop\"\n").unwrap();
    assert_eq!(rig.vmflow.ok(&["reload"]), "changed: web1, web2\n");
    send_one(&mut device, &frame(100, 1));
    let (transmit, _) = rig.check(0, &device, 0);
    assert_eq!(dropped(&transmit, DropReason::SuspectPolicy), 1);
    assert_eq!(rig.vmflow.port(NAMES[0]).connections, 1);
}

#[test]
fn a_vm_gets_and_loses_ports() {
    let rig = Rig::one("");
    let (first, second) = (Guest::new(&rig, "web3"), Guest::new(&rig, "web3"));
    let second = Guest { socket: rig.vmflow.socket("web3b"), ..second };
    let port = |guest: &Guest| guest.toml("").replace("[[vm]]\nname = \"web3\"\n", "");
    let file = vms_file(&rig, "3.toml", &first.toml(""));
    rig.vmflow.ok(&["reload"]);
    let mut device = first.passes(&rig);
    fs::write(&file, first.toml(&port(&second))).unwrap();
    assert_eq!(rig.vmflow.ok(&["reload"]), "changed: web3\n");
    drop(second.passes(&rig));
    fs::write(&file, first.toml("")).unwrap();
    assert_eq!(rig.vmflow.ok(&["reload"]), "changed: web3\n");
    assert!(!second.socket.exists());
    send_one(&mut device, &frame(100, 3));
    assert_eq!(rig.vmflow.port("web3").connections, 1);
    assert!(rig.vmflow.log().wait("the port is removed, with these last totals"));
}

#[test]
fn what_a_port_leaves_another_gets_in_one_step() {
    let rig = Rig::one("");
    let (old, new) = (Guest::new(&rig, "web3"), Guest::new(&rig, "web4"));
    let new = Guest { socket: old.socket.clone(), tap: old.tap.clone(), ..new };
    let file = vms_file(&rig, "3.toml", &old.toml(""));
    rig.vmflow.ok(&["reload"]);
    let device = old.passes(&rig);
    fs::write(&file, new.toml("")).unwrap();
    assert_eq!(rig.vmflow.ok(&["reload"]), "added: web4\nremoved: web3\n");
    device.session.channel().wait_closed(Deadline::within(PATIENCE)).unwrap();
    drop(new.passes(&rig));
    let (transmit, receive) = rig.vmflow.totals("web4");
    assert_eq!((transmit.chains, receive.chains), (1, 1), "another VM's numbers begin at nothing");
}

#[test]
fn frames_that_wait_for_one_vm_do_not_go_to_the_next() {
    let rig = Rig::one("");
    let (old, new) = (Guest::new(&rig, "web3"), Guest::new(&rig, "web4"));
    let new = Guest { socket: old.socket.clone(), tap: old.tap.clone(), ..new };
    let file = vms_file(&rig, "3.toml", &old.toml(""));
    rig.vmflow.ok(&["reload"]);
    let _device = old.passes(&rig);
    // More than the guest has buffers for: the rest waits in the tap.
    let wire = Wire::open(&rig.netns, &old.tap);
    (0..500).for_each(|number| wire.send(&frame(60, number)));
    fs::write(&file, new.toml("")).unwrap();
    rig.vmflow.ok(&["reload"]);
    let mut device = new.passes(&rig);
    assert!(device.first().receive.receive().unwrap().is_none());
    assert_eq!(rig.vmflow.totals("web4").1.chains, 1, "of the host's frames, it got its own");
}

#[test]
fn what_was_altered_is_altered_back_when_a_later_step_fails() {
    let rig = Rig::one("");
    let (third, fourth) = (Guest::new(&rig, "web3"), Guest::new(&rig, "web4"));
    let files = |mtu: u16, mode: &str, more: &str| {
        vms_file(&rig, "3.toml", &third.toml(&format!("mtu = {mtu}\nsocket_mode = \"{mode}\"")));
        vms_file(&rig, "4.toml", &fourth.toml(more));
    };
    files(1400, "0660", "");
    rig.vmflow.ok(&["reload"]);
    let mut device = third.passes(&rig);
    // There is such an interface, but it is no bridge.
    files(1300, "0600", "bridge = \"lo\"");
    let text = |output: std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let refused = text(rig.vmflow.command(&["reload"]));
    assert!(refused.contains(&fourth.tap) && refused.contains("cannot add it to its bridge"), "{refused}");
    assert!(rig.netns.run("ip", &["link", "show", &third.tap]).contains("mtu 1400"));
    assert_eq!(fs::metadata(&third.socket).unwrap().permissions().mode() & 0o777, 0o660);
    send_one(&mut device, &frame(100, 3));
    assert_eq!(rig.vmflow.port("web3").connections, 1);
    files(1300, "0600", "");
    assert_eq!(rig.vmflow.ok(&["reload"]), "changed: web3\n");
}

#[test]
fn a_tap_goes_into_a_bridge_and_out_of_it() {
    let rig = Rig::one("");
    let (guest, bridge) = (Guest::new(&rig, "web3"), unique("b"));
    rig.netns.run("ip", &["link", "add", &bridge, "type", "bridge"]);
    let controller =
        || rig.netns.run("ip", &["-o", "link", "show", &guest.tap]).contains(&format!("master {bridge}"));
    vms_file(&rig, "3.toml", &guest.toml(""));
    rig.vmflow.ok(&["reload"]);
    for inside in [true, false, true] {
        let more = if inside { format!("bridge = \"{bridge}\"") } else { String::new() };
        vms_file(&rig, "3.toml", &guest.toml(&more));
        assert_eq!(rig.vmflow.ok(&["reload"]), "changed: web3\n");
        assert_eq!(controller(), inside);
    }
}

#[test]
fn the_service_manager_is_told_when_a_reload_begins_and_ends() {
    let (netns, setup) = (Netns::new(), Setup::new());
    let setup = setup.vm("web1", &unique("t"), &netns, "");
    let (vmflow, told) = crate::start::start_under_manager(&setup);
    assert_eq!(told(), "READY=1");
    vmflow.signal(rustix::process::Signal::HUP);
    assert!(told().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(told(), "READY=1");
    vmflow.stop();
}

#[test]
fn what_the_host_does_not_give_is_refused_and_leaves_no_trace() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    let guest = Guest::new(&rig, "web3");
    rig.vmflow.ok(&["add", &guest.argument("")]);
    let at = |guest: &Guest, socket: &Path, tap: &str| {
        Guest {
            socket: socket.to_owned(),
            tap: tap.to_owned(),
            name: "web9".into(),
            netns: guest.netns.clone(),
        }
        .argument("")
    };
    let free = rig.vmflow.socket("free");

    let bridge = tap_name();
    run("ip", &["link", "add", &bridge, "type", "bridge"]);
    refused(&rig, &["add", &at(&guest, &free, &bridge)], 1, &[&bridge, "not a tap"]);
    run("ip", &["link", "del", &bridge]);

    let tap = tap_name();
    let held = vmflow::tap::attach(&tap).unwrap();
    refused(&rig, &["add", &at(&guest, &free, &tap)], 1, &[&tap, "in use by another program"]);
    drop(held);

    let file = rig.vmflow.directory().join("file");
    fs::write(&file, "precious").unwrap();
    refused(&rig, &["add", &at(&guest, &file, &tap)], 1, &["exists and is not a socket"]);
    let nowhere = Guest { netns: unique("none"), ..Guest::new(&rig, "web9") };
    refused(&rig, &["add", &nowhere.argument("")], 1, &[&nowhere.netns, "No such file"]);

    // The second port fails: the first is undone, with the directory that was made for it.
    let directory = rig.vmflow.directory().join("new");
    let good = at(&guest, &directory.join("net0.sock"), &tap);
    let bad = at(&guest, &file, &tap_name());
    refused(&rig, &["add", &good, &bad], 1, &["exists and is not a socket"]);
    assert!(!directory.exists());

    // The disk refuses: neither the VM nor its label is kept.
    let added = rig.vmflow.directory().join("state/vms.d");
    let aside = rig.vmflow.directory().join("aside");
    fs::rename(&added, &aside).unwrap();
    fs::write(&added, "").unwrap();
    refused(&rig, &["add", &at(&guest, &free, &tap)], 1, &["not changed: ", "state/vms.d"]);
    fs::remove_file(&added).unwrap();
    fs::rename(&aside, &added).unwrap();

    rig.vmflow.ok(&["add", &at(&guest, &free, &tap)]);
    assert_eq!(labels(&rig.vmflow)[2], ("web9".into(), 3), "no label was used up");
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn what_others_have_is_refused_with_both_places_and_leaves_no_trace() {
    let rig = Rig::with("", &[""]);
    let main = rig.setup.file().display().to_string();
    let guest = Guest::new(&rig, "web3");
    rig.vmflow.ok(&["add", &guest.argument(",label=7,uuid=1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3")]);
    let kept = "state/vms.d/web3.toml (added while running)";

    let again = guest.argument(",label=7,uuid=1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3");
    assert!(rig.vmflow.ok(&["add", &again]).starts_with("web3 is there already: label 7"));
    refused(&rig, &["add", &guest.argument("")], 1, &["other settings", "vmflow remove web3"]);
    let same_tap = Guest { tap: guest.tap.clone(), ..Guest::new(&rig, "web4") };
    refused(&rig, &["add", &same_tap.argument("")], 1, &["port number 1: the tap", &guest.tap, kept]);
    let same_socket = Guest { socket: guest.socket.clone(), ..Guest::new(&rig, "web4") };
    refused(&rig, &["add", &same_socket.argument("")], 1, &["port number 1: the socket", kept]);
    refused(&rig, &["add", &Guest::new(&rig, "web4").argument(",label=7")], 1, &["label 7", kept]);
    refused(&rig, &["add", &Guest::new(&rig, "web4").argument(",label=1")], 1, &["label 1", "web1"]);
    refused(
        &rig,
        &["add", &Guest::new(&rig, "web1").argument("")],
        1,
        &["\"web1\"", &main, ":7:8", "vmflow reload"],
    );
    refused(&rig, &["remove", "web1"], 1, &["\"web1\"", &main, ":7:8", "vmflow reload"]);
    refused(&rig, &["remove", "web9"], 1, &["no VM is called \"web9\": there are web1, web3"]);
    refused(&rig, &["add", "name=web9,socket=x,tap=t"], 2, &["argument number 1, column 18"]);

    let file =
        vms_file(&rig, "3.toml", &guest.toml("").replace(&guest.tap, "other").replace("web3.sock", "x.sock"));
    let place = format!("{}:2:8", file.display());
    refused(&rig, &["reload"], 2, &["the VM name \"web3\"", "state/vms.d/web3.toml:", &place]);
    fs::remove_file(file).unwrap();

    let uuid = "1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3";
    assert_eq!(rig.vmflow.ok(&["remove", "--uuid", uuid]), "web3 is removed, and its label 7 retired\n");
    refused(&rig, &["add", &guest.argument(",label=7")], 1, &["label 7", "belonged to the removed"]);
    let said = rig.vmflow.ok(&["add", &guest.argument(&format!(",uuid={uuid}"))]);
    assert!(said.contains("label 7"), "a UUID that comes back is the same VM: {said}");
}

#[test]
fn a_bad_file_or_a_change_that_needs_a_restart_changes_nothing() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    let (third, fourth) = (Guest::new(&rig, "web3"), Guest::new(&rig, "web4"));
    let good = vms_file(&rig, "3.toml", &third.toml(""));
    let bad = vms_file(&rig, "4.toml", &fourth.toml("mtu = 1\n"));
    let place = format!("{}:7:7: mtu 1 is out of range", bad.display());
    refused(&rig, &["reload"], 2, &[&place]);
    fs::write(&bad, fourth.toml(&format!("mtu = 1\nmac = \"{}\"", "x"))).unwrap();
    let output = rig.vmflow.command(&["reload"]);
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 2, "each fault has its line");
    let told = || rig.vmflow.log().count("the configuration is not reloaded: ");
    let before = told();
    rig.vmflow.signal(rustix::process::Signal::HUP);
    wait_for("the log to tell why", || (told() == before + 2).then_some(()));

    // The last of several VMs fails: all of them are undone.
    fs::write(&bad, fourth.toml("bridge = \"none-there\"")).unwrap();
    refused(&rig, &["reload"], 1, &["none-there"]);
    fs::remove_file(bad).unwrap();

    let main = rig.setup.file();
    let text = fs::read_to_string(&main).unwrap();
    for (key, line) in [
        ("node", "node = \"other\""),
        ("control", "control = \"/run/other.sock\""),
        ("state", "state = \"/var/lib/other\""),
        ("stats", "stats = \"/run/other-stats.sock\""),
        ("stats_group", "stats_group = 4711"),
    ] {
        let kept: Vec<_> = text.lines().filter(|line| !line.starts_with(&format!("{key} ="))).collect();
        fs::write(&main, kept.join("\n").replace("[daemon]", &format!("[daemon]\n{line}"))).unwrap();
        refused(&rig, &["reload"], 1, &[&format!("{key} under [daemon]"), "restart"]);
    }
    fs::write(&main, &text).unwrap();
    assert_eq!(labels(&rig.vmflow).len(), 1);
    assert_eq!(rig.vmflow.ok(&["reload"]), "added: web3\n");
    assert_eq!(labels(&rig.vmflow)[1].1, 2, "no label was used up");
    fs::remove_file(good).unwrap();
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

/// A keeper that does not answer is killed after a while; until then others are served as always.
#[test]
fn a_removal_that_takes_long_delays_nobody_who_looks() {
    let rig = Rig::one("");
    let guest = Guest::new(&rig, "web3");
    rig.vmflow.ok(&["add", &guest.argument("")]);
    let _device = guest.passes(&rig);
    let keeper = *rig.vmflow.processes("vmf-k").last().unwrap();
    let keeper = rustix::process::Pid::from_raw(i32::try_from(keeper).unwrap()).unwrap();
    rustix::process::kill_process(keeper, rustix::process::Signal::STOP).unwrap();
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| rig.vmflow.ok(&["remove", "web3"]));
        let mut looks = 0;
        while !removal.is_finished() {
            rig.vmflow.stats();
            looks += 1;
        }
        assert!(looks > 20, "only {looks} looks while a keeper took its time");
        assert!(removal.join().unwrap().starts_with("web3 is removed"));
    });
    assert_eq!(labels(&rig.vmflow), [("web1".into(), 1)]);
    assert!(rig.vmflow.processes("vmf-").is_empty());
}

/// The kernel takes a while to remove a tap.
#[test]
fn many_vms_that_go_at_once_delay_nobody_who_looks() {
    let rig = Rig::one("");
    let guests: Vec<_> = (0..60).map(|n| Guest::new(&rig, &format!("many{n}")).toml("")).collect();
    let file = vms_file(&rig, "many.toml", &guests.concat());
    rig.vmflow.ok(&["reload"]);
    assert_eq!(labels(&rig.vmflow).len(), 61);
    fs::remove_file(file).unwrap();
    std::thread::scope(|scope| {
        let reload = scope.spawn(|| rig.vmflow.ok(&["reload"]));
        let mut looks = 0;
        while !reload.is_finished() {
            rig.vmflow.stats();
            looks += 1;
        }
        assert!(reload.join().unwrap().starts_with("removed: many0, many1, "));
        assert!(looks > 10, "only {looks} looks while the taps went");
    });
    let interfaces = rig.netns.run("ls", &["/sys/class/net"]);
    assert_eq!(interfaces.lines().filter(|name| *name != "lo").collect::<Vec<_>>(), rig.taps);
}

/// Descriptors, threads and resident memory in KiB of the monitor.
fn taken(vmflow: &Vmflow) -> [usize; 3] {
    let process = format!("/proc/{}", vmflow.pid());
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    [fs::read_dir(format!("{process}/fd")).unwrap().count(), field("Threads:"), field("VmRSS:")]
}

/// Lets frames flow at two VMs while `act` runs; none may be lost, nor come twice.
fn beside_two_busy_ports(rig: &Rig, act: impl FnOnce() + Send) {
    let mut ports = [0, 1].map(|vm| (rig.connect(vm, Config::default()), Traffic::default()));
    let keepers = rig.vmflow.processes("vmf-k");
    std::thread::scope(|scope| {
        let acting = scope.spawn(act);
        while !acting.is_finished() {
            for (vm, (device, traffic)) in ports.iter_mut().enumerate() {
                traffic.step(rig, vm, device);
            }
        }
        acting.join().unwrap();
    });
    for (vm, (device, traffic)) in ports.iter_mut().enumerate() {
        traffic.flow(rig, vm, device, 100);
        traffic.end(rig, vm, device);
        let delivered = u64::try_from(traffic.delivered.len()).unwrap();
        println!("{}: {} frames sent, {} injected", NAMES[vm], traffic.sent, traffic.injected);
        assert_eq!((traffic.lost_and_doubled(), traffic.doubled_to_guest()), ((0, 0), 0));
        assert_eq!(traffic.injected, delivered, "frames to the guest are lost");
        let (transmit, receive) = rig.check(vm, device, 0);
        assert_eq!(transmit.dropped_packets + receive.dropped_packets, 0);
        let port = rig.vmflow.port(NAMES[vm]);
        assert_eq!((port.connections, port.worker_restarts), (1, 0));
    }
    assert_eq!(rig.vmflow.processes("vmf-k"), keepers);
}

#[test]
fn vms_that_come_and_go_cost_two_busy_ports_nothing_and_leave_nothing() {
    let rig = Rig::two();
    let guest = Guest::new(&rig, "web3");
    let round = |connect: bool| {
        rig.vmflow.ok(&["add", &guest.argument("")]);
        let _device = connect.then(|| guest.passes(&rig));
        rig.vmflow.ok(&["remove", "web3"]);
        assert!(!guest.socket.exists());
    };
    (0..3).for_each(|_| round(true));
    let before = taken(&rig.vmflow);
    let times = count(30, 1000);
    let began = Instant::now();
    beside_two_busy_ports(&rig, || (0..times).for_each(|n| round(n % 10 == 0)));
    println!("{times} additions and removals in {:?}", began.elapsed());
    let after = wait_for("descriptors and threads to be given back", || {
        // The busy ports' front ends are gone by then, too.
        let now = taken(&rig.vmflow);
        (now[0] <= before[0] && now[1] <= before[1]).then_some(now)
    });
    println!("descriptors, threads, KiB: {before:?} before, {after:?} after");
    assert!(after[2] < before[2] + 8 * 1024, "memory grew from {} KiB to {}", before[2], after[2]);
    let next = u32::try_from(3 + 3 + times).unwrap();
    rig.vmflow.ok(&["add", &guest.argument("")]);
    assert_eq!(labels(&rig.vmflow)[2].1, next, "every one had a label of its own");
}

#[test]
fn a_busy_port_loses_nothing_while_files_are_reloaded() {
    let rig = Rig::two();
    let guest = Guest::new(&rig, "web3");
    beside_two_busy_ports(&rig, || {
        for n in 0..count(10, 200) {
            let file = vms_file(&rig, "3.toml", &guest.toml(&format!("mtu = {}", 1000 + n)));
            rig.vmflow.ok(&["reload"]);
            if n % 3 == 2 {
                fs::remove_file(file).unwrap();
                rig.vmflow.ok(&["reload"]);
            }
        }
    });
}

#[test]
fn a_vm_of_a_file_is_added_with_the_file_as_it_is() {
    let rig = Rig::one("");
    let guest = Guest::new(&rig, "web3");
    let file = rig.vmflow.directory().join("one.toml");
    fs::write(&file, guest.toml("mtu = 1350")).unwrap();
    let file = file.display().to_string();
    rig.vmflow.ok(&["add", "--file", &file]);
    drop(guest.passes(&rig));
    assert!(rig.netns.run("ip", &["link", "show", &guest.tap]).contains("mtu 1350"));
    let rig = rig.restart();
    drop(guest.passes(&rig));
    rig.vmflow.wait_connected("web3", false);
    fs::write(&file, guest.toml("mtv = 1350")).unwrap();
    refused(&rig, &["add", "--file", &file], 2, &[&format!("{file}:7:1: unknown key \"mtv\"")]);
    fs::write(&file, format!("{}{}", guest.toml(""), Guest::new(&rig, "web4").toml(""))).unwrap();
    refused(&rig, &["add", "--file", &file], 2, &["describes 2 VMs"]);
}

#[test]
fn a_vm_that_is_in_a_file_and_added_stops_a_start_with_both_places() {
    let rig = Rig::one("");
    let guest = Guest::new(&rig, "web3");
    rig.vmflow.ok(&["add", &guest.argument("")]);
    let file = vms_file(&rig, "3.toml", &guest.toml(""));
    let Rig { vmflow, setup, .. } = rig;
    vmflow.stop();
    // If it starts all the same, it is ended.
    let mut start = Command::new("timeout");
    let output = start.args(["20", VMFLOW, "serve", "--config"]).arg(setup.file()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("state/vms.d/web3.toml:") && text.contains(&file.display().to_string()), "{text}");
}
