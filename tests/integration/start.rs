//! What only the host can refuse: one line that says what, where and why, an exit code, and nothing left.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::{
    harness::{Netns, PATIENCE, Setup, VMFLOW, Vmflow, run, unique},
    rig::NAMES,
};

/// A user without any right.
const NOBODY: &str = "65534";

/// The exit codes: of a wrong configuration, of anything else.
const CONFIGURATION: i32 = 2;
const REFUSED: i32 = 1;

/// A VM without a namespace: its tap is in that of the test.
fn here(setup: Setup, tap: &str, more: &str) -> Setup {
    let socket = setup.socket(NAMES[0]);
    setup.with(&format!(
        "[[vm]]\nname = \"web1\"\n[[vm.port]]\nsocket = \"{}\"\ntap = \"{tap}\"\n{more}",
        socket.display()
    ))
}

fn serve(setup: &Setup) -> Output {
    Command::new(VMFLOW).arg("serve").arg("--config").arg(setup.file()).output().unwrap()
}

/// Every file below a directory but the configuration and the state, and every interface here.
fn found(directory: &Path) -> (Vec<PathBuf>, String) {
    let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "sock"));
    files.sort();
    (files, run("ls", &["/sys/class/net"]))
}

/// One line with these words, this exit code, and no trace.
fn refused(setup: &Setup, code: i32, words: &[&str]) {
    let tap_exists = |text: &str, tap: &str| text.lines().any(|line| line == tap);
    let before = found(setup.directory.path());
    let output = serve(setup);
    judge(&output, code, words);
    let after = found(setup.directory.path());
    assert_eq!(before.0, after.0, "sockets");
    for word in words.iter().filter(|word| word.starts_with('t')) {
        assert_eq!(tap_exists(&before.1, word), tap_exists(&after.1, word), "{word}");
    }
}

fn judge(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("vmflow: "), "{text}");
    for word in words {
        assert!(text.contains(word), "{text} does not say {word:?}");
    }
    assert!(text.matches("os error").count() <= 1, "the reason is said twice: {text}");
    assert!(output.stdout.is_empty());
}

#[test]
fn a_tap_that_somebody_else_uses_is_refused() {
    let tap = unique("t");
    let held = vmflow::tap::attach(&tap).unwrap();
    refused(&here(Setup::new(), &tap, ""), REFUSED, &[&tap, "in use by another program"]);
    drop(held);
}

#[test]
fn a_tap_with_one_queue_is_refused_where_several_are_wanted() {
    let tap = unique("t");
    let held = vmflow::tap::attach(&tap).unwrap();
    let words = [&*tap, "one queue", "multi_queue"];
    refused(&here(Setup::new(), &tap, "queue_pairs = 2"), REFUSED, &words);
    drop(held);
    run("ip", &["tuntap", "add", "dev", &tap, "mode", "tap", "vnet_hdr"]);
    let removed = Interface(tap.clone());
    refused(&here(Setup::new(), &tap, "queue_pairs = 2"), REFUSED, &words);
    drop(removed);
    let bridge = Interface(unique("t"));
    run("ip", &["link", "add", &bridge.0, "type", "bridge"]);
    refused(&here(Setup::new(), &bridge.0, "queue_pairs = 2"), REFUSED, &[&bridge.0, "not a tap"]);
}

#[test]
fn a_tap_that_was_made_with_several_queues_is_taken_as_it_is_and_left_there() {
    let tap = Interface(unique("t"));
    run("ip", &["tuntap", "add", "dev", &tap.0, "mode", "tap", "multi_queue", "vnet_hdr"]);
    run("ip", &["addr", "add", "192.0.2.77/32", "dev", &tap.0]);
    let setup = here(Setup::new(), &tap.0, "queue_pairs = 3");
    let vmflow = setup.start();
    assert_eq!(vmflow.port(NAMES[0]).queue_pairs, 3);
    vmflow.stop();
    assert!(run("ip", &["addr", "show", "dev", &tap.0]).contains("192.0.2.77"));
}

#[test]
fn an_interface_that_is_no_tap_is_refused() {
    let (bridge, setup) = (unique("t"), Setup::new());
    run("ip", &["link", "add", &bridge, "type", "bridge"]);
    let removed = Interface(bridge.clone());
    refused(&here(setup, &bridge, ""), REFUSED, &[&bridge, "not a tap"]);
    drop(removed);
}

struct Interface(String);

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).output();
    }
}

#[test]
fn a_network_namespace_that_is_not_there_is_refused() {
    let (tap, netns) = (unique("t"), unique("none"));
    refused(&here(Setup::new(), &tap, &format!("netns = \"{netns}\"")), REFUSED, &[&netns, "No such file"]);
}

#[test]
fn a_bridge_that_is_not_there_is_refused() {
    let (tap, bridge) = (unique("t"), unique("b"));
    refused(&here(Setup::new(), &tap, &format!("bridge = \"{bridge}\"")), REFUSED, &[&bridge]);
}

#[test]
fn a_socket_directory_that_cannot_be_made_is_refused() {
    let (tap, setup) = (unique("t"), Setup::new());
    let file = setup.directory.path().join("file");
    fs::write(&file, "").unwrap();
    let socket = file.join("below").join("net0.sock");
    let setup = setup.with(&format!(
        "[[vm]]\nname = \"web1\"\n[[vm.port]]\nsocket = \"{}\"\ntap = \"{tap}\"",
        socket.display()
    ));
    refused(&setup, REFUSED, &[&file.display().to_string()]);
}

#[test]
fn a_socket_that_somebody_listens_on_is_refused_and_left_alone() {
    let (tap, setup) = (unique("t"), Setup::new());
    let path = setup.socket(NAMES[0]);
    let listener = UnixListener::bind(&path).unwrap();
    let setup = here(setup, &tap, "");
    refused(&setup, REFUSED, &[&path.display().to_string()]);
    std::os::unix::net::UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
}

#[test]
fn a_second_vmflow_of_the_same_configuration_is_refused_and_the_first_goes_on() {
    let (netns, tap) = (Netns::new(), unique("t"));
    let setup = Setup::new().vm(NAMES[0], &tap, &netns, "");
    let first = setup.start();
    let output = serve(&setup);
    judge(&output, REFUSED, &[]);
    assert_eq!(first.stats().vms.len(), 1);
    assert!(setup.socket(NAMES[0]).exists());
    first.stop();
}

#[test]
fn a_wrong_configuration_is_refused_before_anything_is_made() {
    refused(&here(Setup::new(), &unique("t"), "mtv = 1500"), CONFIGURATION, &["vmflow.toml:", "mtv"]);
}

#[test]
fn a_user_without_the_right_to_make_taps_is_told_so() {
    let (tap, setup) = (unique("t"), Setup::new());
    let everybody = fs::Permissions::from_mode(0o777);
    fs::set_permissions(setup.directory.path(), everybody).unwrap();
    let setup = here(setup, &tap, "");
    // The program is where this user may not look: it is handed in as a copy, which another process writes:
    // a child that another test forks here meanwhile would hold it open, and the kernel calls it busy.
    let program = setup.directory.path().join("vmflow");
    run("cp", &[VMFLOW, program.to_str().unwrap()]);
    let output = Command::new("setpriv")
        .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"])
        .arg(&program)
        .arg("serve")
        .arg("--config")
        .arg(setup.file())
        .output()
        .unwrap();
    judge(&output, REFUSED, &["CAP_NET_ADMIN"]);
    assert!(found(setup.directory.path()).0.is_empty());
}

/// Starts vmflow as a service manager does; gives the means to hear the next thing that the manager is told.
pub fn start_under_manager(setup: &Setup) -> (Vmflow, impl Fn() -> String + use<>) {
    let notices = setup.directory.path().join("notify.sock");
    let manager = std::os::unix::net::UnixDatagram::bind(&notices).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = Command::new(VMFLOW);
    command.arg("serve").arg("--config").arg(setup.file()).env("NOTIFY_SOCKET", &notices);
    let vmflow = Vmflow::start_as(command, &setup.directory);
    let told = move || {
        let mut bytes = [0; 100];
        let n = manager.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..n]).trim().to_owned()
    };
    (vmflow, told)
}

#[test]
fn the_service_manager_is_told_when_every_socket_listens_and_when_the_end_begins() {
    let (netns, setup) = (Netns::new(), Setup::new());
    let setup = setup.vm("web1", &unique("t"), &netns, "");
    let (vmflow, told) = start_under_manager(&setup);
    assert_eq!(told(), "READY=1");
    for socket in ["web1.sock", "control.sock", "stats.sock"] {
        std::os::unix::net::UnixStream::connect(setup.directory.path().join(socket)).unwrap();
    }
    vmflow.stop();
    assert_eq!(told(), "STOPPING=1");
}

#[test]
fn a_vm_of_the_command_line_is_served_like_one_of_a_file() {
    let (netns, setup) = (Netns::new(), Setup::new());
    let (tap, at) = (unique("t"), setup.directory.path().display().to_string());
    let vm = format!(
        "name=web1,socket={at}/web1.sock,tap={tap},netns={},label=77,mtu=1400,mac=52:54:00:12:34:56,\
         uuid=0a1b2c3d-0000-4000-8000-000000000001",
        netns.0
    );
    let mut command = Command::new(VMFLOW);
    command.args([
        "serve",
        "--vm",
        &vm,
        "--control",
        &format!("{at}/control.sock"),
        "--state",
        &format!("{at}/s"),
    ]);
    let vmflow = Vmflow::start_as(command, &setup.directory);
    let (_, vms) = vmflow.api("GET", "/v1/vms", "");
    let vm = &vms["vms"][0];
    assert_eq!((vm["name"].as_str(), vm["label"].as_u64()), (Some("web1"), Some(77)));
    assert_eq!(vm["suspect_label"].as_u64(), Some((1 << 31) + 77));
    assert_eq!(vm["uuid"].as_str(), Some("0a1b2c3d-0000-4000-8000-000000000001"));
    let port = &vm["ports"][0];
    assert_eq!((port["mac"].as_str(), port["mtu"].as_u64()), (Some("52:54:00:12:34:56"), Some(1400)));
    assert!(netns.run("ip", &["link", "show", &tap]).contains("mtu 1400"));
    assert!(vmflow.ok(&["vms"]).contains("web1 77    no      0a1b2c3d"), "{}", vmflow.ok(&["vms"]));
    vmflow.stop();
}
