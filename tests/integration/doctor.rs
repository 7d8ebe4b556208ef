//! `vmflow doctor`: each thing that can be wrong with a host is made wrong, and told in one line; what the line advises
//! is done, and then all is well.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    process::{Command, Output},
};

use vmflow_driver::net::Config;

use crate::{
    harness::{Netns, Setup, VMFLOW, json, unique, wait_for},
    rig::{NAMES, Rig},
};

/// What the doctor said, and its exit code.
struct Said {
    text: String,
    code: Option<i32>,
}

impl Said {
    fn by(output: Output) -> Self {
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        Self { text, code: output.status.code() }
    }

    /// The only line of this level.
    fn only(&self, level: &str) -> &str {
        let lines: Vec<_> = self.text.lines().filter(|line| line.starts_with(level)).collect();
        assert_eq!(lines.len(), 1, "{level} in:\n{}", self.text);
        lines[0]
    }

    /// Fails with one line, which has these words.
    fn fails(&self, words: &str) {
        assert!(self.only("fail").contains(words), "{words:?} in:\n{}", self.text);
        assert_eq!(self.code, Some(1), "{}", self.text);
    }

    /// Nothing is wrong.
    fn is_well(&self) {
        assert!(self.text.lines().all(|line| line.starts_with("ok ")), "{}", self.text);
        assert_eq!(self.code, Some(0), "{}", self.text);
    }
}

/// The doctor, started by another command.
fn doctor_by(words: &[&str], setup: &Setup) -> Said {
    let file = setup.file().display().to_string();
    let words = [words, &[VMFLOW, "doctor", "--config", &file]].concat();
    Said::by(Command::new(words[0]).args(&words[1..]).output().unwrap())
}

fn doctor(setup: &Setup) -> Said {
    doctor_by(&[], setup)
}

#[test]
fn a_host_in_order_is_well_while_its_front_end_is_connected() {
    let rig = Rig::one("");
    let idle = doctor(&rig.setup);
    assert!(idle.only("warn").contains("no front end is connected"), "{}", idle.text);
    assert_eq!(idle.code, Some(0), "a warning is no failure");
    let _device = rig.connect(0, Config::default());
    let said = doctor(&rig.setup);
    said.is_well();
    for what in ["/dev/net/tun", "new namespaces", "the tap is up", "a monitor listens", "knows 1 labels"] {
        assert!(said.text.contains(what), "{what} in:\n{}", said.text);
    }
    let document =
        Command::new(VMFLOW).args(["doctor", "--json", "--config"]).arg(rig.setup.file()).output().unwrap();
    let document: serde_json::Value = serde_json::from_slice(&document.stdout).unwrap();
    assert_eq!(json(&document, "/findings").as_array().unwrap().len(), said.text.lines().count());
    assert_eq!(json(&document, "/findings/0/level"), "ok");
}

#[test]
fn a_host_without_the_tun_driver_is_told_so() {
    let rig = Rig::one("");
    let _device = rig.connect(0, Config::default());
    let hide = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /dev/net && exec \"$0\" \"$@\""];
    let said = doctor_by(&hide, &rig.setup);
    assert!(said.text.contains("fail  /dev/net/tun: is missing: run `modprobe tun`"), "{}", said.text);
    assert!(said.text.contains("fail  a new tap: cannot open /dev/net/tun"), "{}", said.text);
    assert_eq!(said.code, Some(1));
}

#[test]
fn missing_rights_and_too_few_descriptors_are_told() {
    let netns = Netns::new();
    let setup = Setup::new().vm(NAMES[0], &unique("t"), &netns, "");
    let lame = doctor_by(&["setpriv", "--bounding-set=-net_admin,-sys_admin"], &setup);
    assert!(
        lame.text.contains("fail  rights of this user: CAP_NET_ADMIN, CAP_SYS_ADMIN missing"),
        "{}",
        lame.text
    );
    assert!(lame.text.contains("fail  new namespaces: Operation not permitted"), "{}", lame.text);
    let poor = doctor_by(&["prlimit", "--nofile=64:64"], &setup);
    assert!(poor.text.contains("fail  descriptors of this user: at most 64"), "{}", poor.text);
}

#[test]
fn a_configuration_that_is_wrong_is_told_as_check_tells_it() {
    let setup = Setup::new().with("[[vm]]\nname = \"web1\"\nlabel = 0");
    let said = doctor(&setup);
    let check = Command::new(VMFLOW).args(["check", "--config"]).arg(setup.file()).output().unwrap();
    let check = String::from_utf8(check.stderr).unwrap();
    assert_eq!(check.lines().count(), 2, "{check}");
    for line in check.lines() {
        let told = line.replacen("vmflow: ", "fail  configuration: ", 1);
        assert!(said.text.contains(&told), "{told} in:\n{}", said.text);
    }
}

#[test]
fn what_the_next_start_lacks_is_told_before_it() {
    let netns = Netns::new();
    let setup = Setup::new().vm(NAMES[0], &unique("t"), &netns, "bridge = \"br0\"");
    let said = doctor(&setup);
    assert!(said.text.contains("br0: cannot find it"), "{}", said.text);
    netns.run("ip", &["link", "add", "br0", "type", "bridge"]);
    let said = doctor(&setup);
    said.fails("there is no monitor");
    assert!(said.text.contains("its network namespace and bridge are there"), "{}", said.text);
}

#[test]
fn a_tap_that_somebody_has_changed_is_told_with_the_command_that_mends_it() {
    let netns = Netns::new();
    netns.run("ip", &["link", "add", "br0", "type", "bridge"]);
    let tap = unique("t");
    let setup = Setup::new().vm(NAMES[0], &tap, &netns, "bridge = \"br0\"\nmtu = 1400");
    let vmflow = setup.start();
    let faults = [
        (vec!["link", "set", &tap, "down"], "the tap is down"),
        (vec!["link", "set", &tap, "nomaster"], "the tap's bridge is none, not br0"),
        (vec!["link", "set", &tap, "mtu", "1300"], "the tap's MTU is 1300, not 1400"),
    ];
    for (command, words) in faults {
        netns.run("ip", &command);
        let said = doctor(&setup);
        said.fails(words);
        let advice = said.only("fail").rsplit(": ").next().unwrap();
        assert!(advice.starts_with("ip -n "), "{advice}");
        let mended = Command::new("sh").args(["-c", advice]).status().unwrap();
        assert!(mended.success(), "{advice}");
        assert_eq!(doctor(&setup).code, Some(0), "{}", doctor(&setup).text);
    }
    netns.run("ip", &["link", "set", "br0", "mtu", "1200"]);
    let said = doctor(&setup);
    let words = "the tap's MTU is 1400, that of its bridge br0 only 1200";
    assert!(said.text.contains(words), "{}", said.text);
    // One that only the monitor knows is looked at as well.
    let bare = setup.directory.path().join("bare.toml");
    let whole = fs::read_to_string(setup.file()).unwrap();
    fs::write(&bare, whole.split("[[vm]]").next().unwrap()).unwrap();
    netns.run("ip", &["link", "set", &tap, "down"]);
    let said = Said::by(Command::new(VMFLOW).args(["doctor", "--config"]).arg(bare).output().unwrap());
    said.fails("the tap is down");
    drop(vmflow);
}

#[test]
fn a_socket_that_its_front_end_cannot_reach_is_told() {
    const QEMU: u32 = 64055;
    let rig = Rig::one(&format!("owner = {QEMU}\npeer = {{ uid = {QEMU} }}"));
    let socket = rig.socket(0);
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    assert_eq!(doctor(&rig.setup).code, Some(0), "{}", doctor(&rig.setup).text);
    mode(&socket, 0o600);
    doctor(&rig.setup).fails("its socket's mode is 0600, not 0660");
    mode(&socket, 0o660);
    chown(&socket, Some(0), None).unwrap();
    doctor(&rig.setup).fails("its socket's owner is 0, not 64055");
    chown(&socket, Some(QEMU), None).unwrap();
    mode(rig.setup.directory.path(), 0o700);
    doctor(&rig.setup).fails(&format!("user {QEMU} may not enter {}", rig.setup.directory.path().display()));
    mode(rig.setup.directory.path(), 0o755);
    assert_eq!(doctor(&rig.setup).code, Some(0));
    fs::remove_file(&socket).unwrap();
    doctor(&rig.setup).fails("its socket: No such file or directory");
}

#[test]
fn an_open_control_socket_a_dead_monitor_and_an_exposed_state_are_told() {
    let rig = Rig::one("");
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    mode(&rig.vmflow.control(), 0o666);
    doctor(&rig.setup).fails("others than its owner may change things there (mode 0666)");
    mode(&rig.vmflow.control(), 0o600);
    let state = rig.setup.directory.path().join("state");
    mode(&state, 0o777);
    doctor(&rig.setup).fails("others may write there (mode 0777): chmod 0700");
    mode(&state, 0o700);
    rig.vmflow.signal(rustix::process::Signal::KILL);
    let dead = "is left of a monitor that was killed: start `vmflow serve`";
    wait_for("the monitor's end", || doctor(&rig.setup).text.contains(dead).then_some(()));
    doctor(&rig.setup).fails(dead);
}

#[test]
fn a_port_that_is_configured_and_not_served_is_told() {
    let rig = Rig::one("");
    let netns = &rig.netns;
    let setup = rig.setup.clone().vm(NAMES[1], &unique("t"), netns, "");
    let said = doctor(&setup);
    assert!(
        said.text.contains("is in the configuration and not served: run `vmflow reload`"),
        "{}",
        said.text
    );
    rig.vmflow.ok(&["reload"]);
    assert!(!doctor(&setup).text.contains("not served"));
}
