//! Each mistake in a configuration is one line with its place, what is wrong and what to do, and exit code 2.
//!
//! The tests run the built command as a person would.
#![expect(clippy::unwrap_used, reason = "a helper of a test fails the test, as the test itself does")]

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// A directory with a main file, and what `vmflow check` says about it.
struct Written {
    dir: TempDir,
}

impl Written {
    fn new(main: &str) -> Self {
        let written = Self { dir: tempfile::tempdir().unwrap() };
        fs::write(written.main(), main).unwrap();
        written
    }

    /// With a file in `vms.d`.
    fn and(self, name: &str, text: &str) -> Self {
        let file = self.path(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn main(&self) -> PathBuf {
        self.path("vmflow.toml")
    }

    fn check(&self) -> Output {
        check(&self.main())
    }

    /// Asserts every line, with `DIR` for the directory, exit code 2 and silence on standard output.
    fn refused(&self, lines: &[&str]) {
        let output = self.check();
        assert_eq!(self.said(&output), lines);
        assert_eq!(output.status.code(), Some(2));
        assert!(output.stdout.is_empty(), "{output:?}");
    }

    fn said(&self, output: &Output) -> Vec<String> {
        let dir = self.dir.path().to_str().unwrap();
        let text = String::from_utf8(output.stderr.clone()).unwrap().replace(dir, "DIR");
        text.lines().map(str::to_owned).collect()
    }
}

fn check(file: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmflow")).arg("check").arg("--config").arg(file).output().unwrap()
}

/// One VM with one port, both with these further lines.
fn vm(name: &str, vm_lines: &str, port_lines: &str) -> String {
    format!("[[vm]]\nname = \"{name}\"\n{vm_lines}[[vm.port]]\n{port_lines}")
}

/// The lines of a port that has nothing of any other.
fn port(name: &str) -> String {
    format!("socket = \"/run/vmflow/{name}/net0.sock\"\ntap = \"vmf-{name}\"\n")
}

/// Two VMs with a line of their own each: lines 3 and 9 of the file.
fn two(first: &str, second: &str) -> String {
    vm("a", first, &port("a")) + &vm("b", second, &port("b"))
}

#[test]
fn a_valid_configuration_is_summed_up_and_nothing_is_changed() {
    let written = Written::new(&two("", "label = 7\n"))
        .and("vms.d/10.toml", &(vm("c", "", &port("c")) + "[[vm.port]]\n" + &port("c2")));
    let output = written.check();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "a: label not pinned, vmf-a at /run/vmflow/a/net0.sock\n\
         b: label 7, vmf-b at /run/vmflow/b/net0.sock\n\
         c: label not pinned, vmf-c at /run/vmflow/c/net0.sock, vmf-c2 at /run/vmflow/c2/net0.sock\n\
         OK: 3 VMs, 4 ports, 1 label pinned\n"
    );
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn an_unknown_key_is_named_with_the_one_that_was_meant() {
    let port = "  sokcet = \"/run/vmflow/a/net0.sock\"\ntap = \"vmf-a\"\n";
    Written::new(&vm("a", "", port))
        .refused(&["vmflow: DIR/vmflow.toml:4:3: unknown key \"sokcet\": did you mean \"socket\"?"]);
}

#[test]
fn an_unknown_key_that_is_near_nothing_is_told_what_is_known() {
    Written::new("[daemon]\nport = 80\n").refused(&[
        "vmflow: DIR/vmflow.toml:2:1: unknown key \"port\": known here: control, stats, stats_group, state, labels, node",
    ]);
}

#[test]
fn a_port_without_a_socket_is_refused() {
    Written::new(&vm("a", "", "tap = \"vmf-a\"\n")).refused(&[
        "vmflow: DIR/vmflow.toml:3:1: this port has no \"socket\": add socket = \"/run/vmflow/web1/net0.sock\"",
    ]);
}

#[test]
fn a_port_without_a_tap_is_refused() {
    Written::new(&vm("a", "", "socket = \"/s\"\n"))
        .refused(&["vmflow: DIR/vmflow.toml:3:1: this port has no \"tap\": add tap = \"vmf-web1\""]);
}

#[test]
fn a_vm_without_ports_is_refused() {
    Written::new("[[vm]]\nname = \"a\"\n").refused(&[
        "vmflow: DIR/vmflow.toml:1:1: the VM \"a\" has no port: add a [[vm.port]] table with a socket and a tap",
    ]);
}

#[test]
fn a_vm_without_a_name_is_refused() {
    Written::new(&("[[vm]]\n[[vm.port]]\n".to_owned() + &port("a")))
        .refused(&["vmflow: DIR/vmflow.toml:1:1: this VM has no \"name\": add name = \"web1\""]);
}

#[test]
fn a_name_taken_twice_is_refused_with_both_places() {
    Written::new(&vm("a", "", &port("a"))).and("vms.d/10.toml", &vm("a", "", &port("b"))).refused(&[
        "vmflow: DIR/vms.d/10.toml:2:8: the VM name \"a\" is taken at DIR/vmflow.toml:2:8: give each its own",
    ]);
}

#[test]
fn a_label_taken_twice_is_refused_with_both_places() {
    Written::new(&two("label = 7\n", "label = 7\n")).refused(&[
        "vmflow: DIR/vmflow.toml:9:9: label 7 is taken at DIR/vmflow.toml:3:9: give each its own",
    ]);
}

#[test]
fn a_uuid_taken_twice_in_two_spellings_is_refused_with_both_places() {
    let (dashes, plain) = ("1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3", "1F3A7C529D0E4B6A8C115E2D7F904AB3");
    Written::new(&two(&format!("uuid = \"{dashes}\"\n"), &format!("uuid = \"{plain}\"\n"))).refused(&[
        "vmflow: DIR/vmflow.toml:9:8: the UUID 1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3 is taken at DIR/vmflow.toml:3:8: give each its own",
    ]);
}

#[test]
fn a_socket_taken_twice_is_refused_with_both_places() {
    let second = "socket = \"/run//vmflow/./a/net0.sock\"\ntap = \"vmf-b\"\n";
    Written::new(&(vm("a", "", &port("a")) + &vm("b", "", second))).refused(&[
        "vmflow: DIR/vmflow.toml:9:10: the socket \"/run/vmflow/a/net0.sock\" is taken at DIR/vmflow.toml:4:10: give each its own",
    ]);
}

#[test]
fn a_port_cannot_have_the_monitors_own_socket() {
    Written::new(&vm("a", "", "socket = \"/run/vmflow/stats.sock\"\ntap = \"vmf-a\"\n")).refused(&[
        "vmflow: DIR/vmflow.toml:4:10: the socket \"/run/vmflow/stats.sock\" is taken at the default of \"stats\": give each its own",
    ]);
}

#[test]
fn a_tap_taken_twice_is_refused_with_both_places() {
    let second = "socket = \"/run/vmflow/b/net0.sock\"\ntap = \"vmf-a\"\n";
    Written::new(&(vm("a", "", &port("a")) + &vm("b", "", second))).refused(&[
        "vmflow: DIR/vmflow.toml:10:7: the tap \"vmf-a\" is taken at DIR/vmflow.toml:5:7: give each its own",
    ]);
}

#[test]
fn a_tap_name_of_sixteen_bytes_is_refused() {
    Written::new(&vm("a", "", "socket = \"/s\"\ntap = \"sixteen-bytes-xx\"\n")).refused(&[
        "vmflow: DIR/vmflow.toml:5:7: tap name \"sixteen-bytes-xx\" is not 1 to 15 bytes long: choose another name",
    ]);
}

#[test]
fn a_label_outside_the_hosts_range_is_refused() {
    let main = "[daemon]\nlabels = \"10..=19\"\n".to_owned() + &vm("a", "label = 20\n", &port("a"));
    Written::new(&main).refused(&[
        "vmflow: DIR/vmflow.toml:5:9: label 20 is outside this host's range 10..=19: pin one of the range, or widen \"labels\" under [daemon]",
    ]);
}

#[test]
fn a_label_that_is_none_is_refused() {
    Written::new(&two("label = 0\n", "label = 2147483648\n")).refused(&[
        "vmflow: DIR/vmflow.toml:3:9: label 0 is out of range: it is 1 to 2147483647",
        "vmflow: DIR/vmflow.toml:9:9: label 2147483648 is out of range: it is 1 to 2147483647",
    ]);
}

#[test]
fn a_label_range_that_is_none_is_refused() {
    Written::new("[daemon]\nlabels = \"9..=5\"\n").refused(&[
        "vmflow: DIR/vmflow.toml:2:10: label range \"9..=5\" is not FIRST..=LAST with labels from 1 to 2147483647, as \"1..=16777215\"",
    ]);
}

#[test]
fn a_file_that_this_user_may_not_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    /// A user who owns nothing: "nobody".
    const NOBODY: u32 = 65534;
    assert!(rustix::process::geteuid().is_root(), "needs root, to become a user without rights");
    let written = Written::new("");
    fs::set_permissions(written.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(written.main(), fs::Permissions::from_mode(0o600)).unwrap();
    // A copy, as the user without rights may not reach the build's directory. Another process writes it: a child
    // that another test forks here meanwhile would hold it open, and the kernel would call it busy.
    let command = written.path("vmflow");
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_vmflow")).arg(&command).status().unwrap();
    assert!(copied.success());
    let output = Command::new(command)
        .args(["check", "--config"])
        .arg(written.main())
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    assert_eq!(
        written.said(&output),
        [
            "vmflow: DIR/vmflow.toml: cannot be read: Permission denied (os error 13): run as a user who may read it"
        ]
    );
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_directory_in_the_place_of_a_file_is_refused() {
    let written = Written::new("");
    fs::create_dir_all(written.path("vms.d/10.toml")).unwrap();
    written.refused(&[
        "vmflow: DIR/vms.d/10.toml: cannot be read: Is a directory (os error 21): put a file in its place",
    ]);
}

#[test]
fn a_file_that_is_not_there_is_refused() {
    let written = Written::new("");
    fs::remove_file(written.main()).unwrap();
    written.refused(&[
        "vmflow: DIR/vmflow.toml: cannot be read: No such file or directory (os error 2): write it, or name another file with --config",
    ]);
}

#[test]
fn a_file_that_is_no_text_is_refused() {
    let written = Written::new("");
    fs::write(written.main(), b"# \xc3\xa4\n# \xff\n").unwrap();
    written.refused(&["vmflow: DIR/vmflow.toml:2:3: not UTF-8 from here on: save the file as UTF-8"]);
}

#[test]
fn a_bad_mac_is_refused() {
    let bad = |mac| vm("a", "", &(port("a") + &format!("mac = \"{mac}\"\n")));
    Written::new(&bad("52:54:00:12:34")).refused(&[
        "vmflow: DIR/vmflow.toml:6:7: MAC address \"52:54:00:12:34\" is not six pairs of hex digits with colons, as 52:54:00:12:34:56",
    ]);
    Written::new(&bad("01:00:5e:00:00:01")).refused(&[
        "vmflow: DIR/vmflow.toml:6:7: MAC address \"01:00:5e:00:00:01\" is a group address: make the second digit even",
    ]);
    Written::new(&bad("00:00:00:00:00:00")).refused(&[
        "vmflow: DIR/vmflow.toml:6:7: MAC address \"00:00:00:00:00:00\" is all zero: give a real one, or leave mac out",
    ]);
}

#[test]
fn queue_pairs_that_no_port_has_are_refused() {
    for wrong in [-1, 0, 17, 65_537] {
        Written::new(&vm("a", "", &(port("a") + &format!("queue_pairs = {wrong}\n")))).refused(&[&format!(
            "vmflow: DIR/vmflow.toml:6:15: queue_pairs {wrong} is out of range: it is 1 to 16"
        )]);
    }
}

#[test]
fn several_queue_pairs_without_the_control_queue_are_refused() {
    Written::new(&vm("a", "", &(port("a") + "queue_pairs = 2\ncontrol_queue = false\n"))).refused(&[
        "vmflow: DIR/vmflow.toml:6:15: queue_pairs is 2 and control_queue false: a guest asks for more than one pair through the control queue: leave one of the two out",
    ]);
}

#[test]
fn an_mtu_that_no_tap_has_is_refused() {
    Written::new(&vm("a", "", &(port("a") + "mtu = 67\n")))
        .refused(&["vmflow: DIR/vmflow.toml:6:7: mtu 67 is out of range: it is 68 to 65521"]);
}

#[test]
fn a_text_that_is_no_toml_is_refused_at_its_first_error() {
    Written::new("[daemon]\n\nnode = = \"x\n")
        .refused(&["vmflow: DIR/vmflow.toml:3:8: not valid TOML: extra \"=\", expected nothing"]);
}

#[test]
fn a_key_written_twice_is_refused() {
    Written::new("[daemon]\nnode = \"x\"\nnode = \"y\"\n")
        .refused(&["vmflow: DIR/vmflow.toml:3:1: not valid TOML: duplicate key"]);
}

#[test]
fn a_text_where_a_number_belongs_is_refused() {
    Written::new(&two("label = \"7\"\n", "label = 99999999999999999999\n")).refused(&[
        "vmflow: DIR/vmflow.toml:3:9: invalid type: string \"7\", expected a number",
        "vmflow: DIR/vmflow.toml:9:9: invalid type: integer 99999999999999999999, which is too large, expected a number",
    ]);
}

#[test]
fn a_number_where_a_text_belongs_is_refused() {
    Written::new(&vm("a", "uuid = 7\n", &port("a")))
        .refused(&["vmflow: DIR/vmflow.toml:3:8: invalid type: integer 7, expected a string"]);
}

#[test]
fn a_vm_with_one_bracket_is_told_to_have_two() {
    Written::new(&vm("a", "", &port("a")).replace("[[vm]]", "[vm]")).refused(&[
        "vmflow: DIR/vmflow.toml:1:1: invalid type: table, expected a list: tables of a list have two brackets, as [[vm]]",
    ]);
}

#[test]
fn what_a_later_release_may_have_is_refused_by_name() {
    Written::new("[rules]\nfiles = [\"/etc/vmflow/rules.d/*.toml\"]\n[suspect]\naction = \"mirror\"\n").refused(&[
        "vmflow: DIR/vmflow.toml:2:10: rules are not in this release: leave \"files\" empty or out",
        "vmflow: DIR/vmflow.toml:4:10: the suspect action \"mirror\" is not in this release: write \"count\" or \"drop\"",
    ]);
}

#[test]
fn an_unknown_user_is_refused() {
    Written::new(&vm("a", "", &(port("a") + "peer = { uid = \"no-such-user\" }\n"))).refused(&[
        "vmflow: DIR/vmflow.toml:6:16: no user \"no-such-user\" in /etc/passwd: create it, or give the number",
    ]);
}

#[test]
fn a_socket_that_the_front_end_makes_has_no_owner_here() {
    Written::new(&vm("a", "", &(port("a") + "mode = \"client\"\nowner = 0\n"))).refused(&[
        "vmflow: DIR/vmflow.toml:7:9: \"owner\" is for mode = \"server\": in client mode the front end makes the socket: leave it out",
    ]);
}

#[test]
fn all_faults_of_all_files_are_told_in_the_order_of_their_places() {
    let main = vm(".a", "label = 7\n", &(port("a") + "mtu = 1\n"));
    Written::new(&main)
        .and("vms.d/20.toml", "[[vm]\n")
        .and("vms.d/10.toml", &vm("b", "colour = 1\nlabel = 7\nuuid = 3\n", "socket = \"x\"\n"))
        .refused(&[
            "vmflow: DIR/vmflow.toml:2:8: VM name \".a\" begins with a dot or a dash: choose another name",
            "vmflow: DIR/vmflow.toml:7:7: mtu 1 is out of range: it is 68 to 65521",
            "vmflow: DIR/vms.d/10.toml:3:1: unknown key \"colour\": known here: name, uuid, label, suspect, port",
            "vmflow: DIR/vms.d/10.toml:4:9: label 7 is taken at DIR/vmflow.toml:3:9: give each its own",
            "vmflow: DIR/vms.d/10.toml:5:8: invalid type: integer 3, expected a string",
            "vmflow: DIR/vms.d/10.toml:7:10: socket \"x\" is not an absolute path: begin it with \"/\"",
            "vmflow: DIR/vms.d/20.toml:1:6: not valid TOML: unclosed array table, expected \"]\"",
        ]);
}
