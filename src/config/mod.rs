//! The configuration: what was written becomes what is meant, or a list of faults with their places.
//!
//! ```text
//!   vmflow.toml, vms.d/*.toml   source: read, find unknown keys      strict: judge each value,
//!   --vm name=..,socket=..    ---------- loose types ------------->  find what is claimed twice  --> Config
//!   --control, --state, ..
//! ```
//!
//! After that there are no checks: a [`Config`] is valid in itself. What only the host can tell (is the tap
//! busy, is there room for a label) is judged where it is used.

mod addition;
mod error;
mod ids;
mod judge;
mod loose;
mod source;
mod spelling;
mod strict;
mod values;
mod vms;
mod written;

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use uuid::Uuid;

pub use self::{
    addition::Described,
    error::{ConfigError, Fault, Faults, Place},
    strict::suspect_action,
    values::{Mac, Mode, NetNs, TapName, vm_name},
};
use crate::label::Label;
pub use crate::policy::SuspectAction;

/// Where the configuration is unless `--config` says otherwise.
pub const DEFAULT_FILE: &str = "/etc/vmflow/vmflow.toml";
/// Where the socket for changes is unless told otherwise.
pub const DEFAULT_CONTROL: &str = "/run/vmflow/control.sock";
/// Where labels, tags and totals are kept unless told otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/vmflow";

/// Everything that the monitor is told when it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The monitor itself.
    pub daemon: Daemon,
    /// What becomes of frames under a suspect label, where the VM says nothing else.
    pub suspect: SuspectAction,
    /// The VMs in the order in which they were written.
    pub vms: Vec<Vm>,
}

/// The monitor's own settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// The socket for changes.
    pub control: PathBuf,
    /// The socket for readers: beside `control` unless told otherwise.
    pub stats: PathBuf,
    /// The group that may read from `stats`.
    pub stats_group: Option<u32>,
    /// The directory for what outlives the process.
    pub state: PathBuf,
    /// The labels that this host may give.
    pub labels: RangeInclusive<Label>,
    /// This host's name in records.
    pub node: String,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Where it was written.
    pub at: Place,
    /// Its name, one of a kind.
    pub name: String,
    /// What it is known by where it has one: the name may change then.
    pub uuid: Option<Uuid>,
    /// The label that it must get; else one is allocated and remembered.
    pub label: Option<Label>,
    /// What becomes of its frames under the suspect label; else the host's action.
    pub suspect: Option<SuspectAction>,
    /// Its virtio-net devices, at least one.
    pub ports: Vec<Port>,
}

/// One virtio-net device of a VM: a vhost-user socket and a tap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Who makes the socket.
    pub mode: Mode,
    /// The only uid that may be at the other end.
    pub peer: Option<u32>,
    /// The socket's owner, in server mode.
    pub owner: Option<u32>,
    /// The socket's group, in server mode.
    pub group: Option<u32>,
    /// The socket's permissions, in server mode.
    pub socket_mode: u32,
    /// The tap.
    pub tap: TapName,
    /// Where the tap lives, if not in the monitor's own network namespace.
    pub netns: Option<NetNs>,
    /// The bridge that the tap is put into.
    pub bridge: Option<String>,
    /// Pairs of virtqueues: 1 to 16.
    pub queue_pairs: u16,
    /// The address that the guest is told; else the front end's.
    pub mac: Option<Mac>,
    /// The MTU that the guest is told; else the tap's.
    pub mtu: Option<u16>,
    /// Offer the control queue to the front end.
    pub control_queue: bool,
    /// Put neighbouring frames of one flow together on their way to the tap.
    pub coalesce: bool,
    /// How long the port's threads look for more frames before they sleep, in microseconds.
    pub poll_us: u16,
}

/// Where a configuration comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    /// The main file; the directory `vms.d` beside it is read as well.
    pub file: Option<PathBuf>,
    /// VMs as `name=web1,socket=PATH,tap=IFNAME[,label=1]...`; a name that repeats is another port.
    pub vms: Vec<String>,
    /// Instead of the file's `control`.
    pub control: Option<String>,
    /// Instead of the file's `state`.
    pub state: Option<String>,
    /// Instead of the file's suspect action.
    pub suspect: Option<SuspectAction>,
}

impl Config {
    /// Reads and judges everything.
    ///
    /// # Errors
    /// [`Faults`]: all that is wrong, in the order of the places.
    pub fn load(origins: &Origins) -> Result<Self, Faults> {
        strict::load(origins)
    }

    /// What a file and its `vms.d` say.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_file(file: &Path) -> Result<Self, Faults> {
        Self::load(&Origins { file: Some(file.to_owned()), ..Origins::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(vms: &[&str]) -> Origins {
        Origins { vms: vms.iter().map(ToString::to_string).collect(), ..Origins::default() }
    }

    fn lines(origins: &Origins) -> Vec<String> {
        Config::load(origins).unwrap_err().iter().map(ToString::to_string).collect()
    }

    /// A main file, and files in `vms.d` beside it.
    fn written(main: &str, vms: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmflow.toml");
        std::fs::write(&file, main).unwrap();
        std::fs::create_dir(dir.path().join("vms.d")).unwrap();
        for (name, text) in vms {
            std::fs::write(dir.path().join("vms.d").join(name), text).unwrap();
        }
        (dir, file)
    }

    const DAEMON: &str = r#"
[daemon]
control = "/run/a/c.sock"
state = "/srv/v"
labels = "5..=9"
node = "n"
stats_group = "root"
[suspect]
action = "drop"
[rules]
files = []
"#;

    const WEB1: &str = r#"
[[vm]]
name = "web1"
uuid = "1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3"
label = 7
suspect = { action = "drop" }
[[vm.port]]
socket = "/run/vmflow/web1/net0.sock"
peer = { uid = "root" }
owner = "root"
group = 0
socket_mode = "0600"
tap = "vmf-web1"
netns = "web1"
bridge = "br0"
queue_pairs = 1
mac = "52:54:00:12:34:56"
mtu = 9000
control_queue = false
coalesce = false
poll_us = 50
[[vm.port]]
socket = "/run/qemu/web1.sock"
mode = "client"
tap = "vmf-web1b"
queue_pairs = 16
"#;

    #[test]
    fn every_key_arrives_in_its_place() {
        let main = format!("{DAEMON}{WEB1}");
        let (_dir, file) = written(&main, &[]);
        let config = Config::from_file(&file).unwrap();
        let label = |number| Label::new(number).unwrap();
        assert_eq!(
            config.daemon,
            Daemon {
                control: "/run/a/c.sock".into(),
                stats: "/run/a/stats.sock".into(),
                stats_group: Some(0),
                state: "/srv/v".into(),
                labels: label(5)..=label(9),
                node: "n".into(),
            }
        );
        assert_eq!(config.suspect, SuspectAction::Drop);
        let [vm] = config.vms.as_slice() else { panic!("{config:?}") };
        assert_eq!((vm.name.as_str(), vm.label), ("web1", Some(label(7))));
        assert_eq!(vm.suspect, Some(SuspectAction::Drop));
        let full = Port {
            socket: "/run/vmflow/web1/net0.sock".into(),
            mode: Mode::Server,
            peer: Some(0),
            owner: Some(0),
            group: Some(0),
            socket_mode: 0o600,
            tap: "vmf-web1".parse().unwrap(),
            netns: Some("web1".parse().unwrap()),
            bridge: Some("br0".into()),
            queue_pairs: 1,
            mac: Some("52:54:00:12:34:56".parse().unwrap()),
            mtu: Some(9000),
            control_queue: false,
            coalesce: false,
            poll_us: 50,
        };
        let bare = Port {
            socket: "/run/qemu/web1.sock".into(),
            mode: Mode::Client,
            peer: None,
            owner: None,
            group: None,
            socket_mode: 0o660,
            tap: "vmf-web1b".parse().unwrap(),
            netns: None,
            bridge: None,
            queue_pairs: 16,
            mac: None,
            mtu: None,
            control_queue: true,
            coalesce: true,
            poll_us: 0,
        };
        assert_eq!(vm.ports, [full, bare]);
    }

    #[test]
    fn vm_files_come_after_the_main_file_in_the_order_of_their_names() {
        let vm = |name: &str| {
            format!("[[vm]]\nname = \"{name}\"\n[[vm.port]]\nsocket = \"/s/{name}\"\ntap = \"t{name}\"\n")
        };
        let files =
            [("20.toml", vm("c")), ("10.toml", vm("b")), ("x.bak", "[".into()), (".h.toml", "[".into())];
        let files: Vec<_> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
        let (_dir, file) = written(&vm("a"), &files);
        let config = Config::from_file(&file).unwrap();
        let names: Vec<_> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(config.daemon.control, Path::new(DEFAULT_CONTROL));
        assert_eq!(config.daemon.labels.end().get(), 16_777_215);
        assert!(!config.daemon.node.is_empty());
    }

    #[test]
    fn a_vm_file_holds_nothing_but_vms() {
        let (dir, file) = written("", &[("a.toml", "[daemon]\nstate = \"/x\"\n")]);
        let faults = Config::from_file(&file).unwrap_err();
        let at = dir.path().join("vms.d/a.toml").display().to_string();
        assert_eq!(faults.to_string(), format!("{at}:1:2: unknown key \"daemon\": known here: vm"));
    }

    #[test]
    fn a_name_that_repeats_in_arguments_is_another_port() {
        let origins = arguments(&[
            "name=a,socket=/s/1,tap=t1",
            "name=b,socket=/s/2,tap=t2,label=4",
            "name=a,socket=/s/3,tap=t3,label=9,uuid=1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3",
            "name=a,socket=/s/4,tap=t4,label=9,mode=client,netns=n,mtu=1500,peer=0,mac=02:00:00:00:00:01",
        ]);
        let config = Config::load(&origins).unwrap();
        assert_eq!(config.vms.iter().map(|vm| vm.ports.len()).collect::<Vec<_>>(), [3, 1]);
        assert_eq!(config.vms[0].label, Some(Label::new(9).unwrap()));
        assert!(config.vms[0].uuid.is_some());
        assert_eq!(config.vms[0].ports[2].mode, Mode::Client);
    }

    #[test]
    fn arguments_about_one_vm_may_not_contradict_each_other() {
        let origins = arguments(&["name=a,socket=/s/1,tap=t1,label=4", "name=a,socket=/s/1,tap=t1,label=5"]);
        assert_eq!(
            lines(&origins),
            [
                "--vm number 2, column 15: the socket \"/s/1\" is taken at --vm number 1, column 15: give each its own",
                "--vm number 2, column 24: the tap \"t1\" is taken at --vm number 1, column 24: give each its own",
                "--vm number 2, column 33: label 5 contradicts --vm number 1, column 33: one VM has one label",
            ]
        );
    }

    #[test]
    fn arguments_go_before_the_file_and_their_vms_beside_its_own() {
        let (_dir, file) = written(&format!("[daemon]\ncontrol = \"/file/c\"\n{WEB1}"), &[]);
        let origins = Origins {
            file: Some(file.clone()),
            control: Some("/run/x/c.sock".into()),
            state: Some("/var/x".into()),
            suspect: Some(SuspectAction::Drop),
            ..arguments(&["name=b,socket=/s/2,tap=t2"])
        };
        let config = Config::load(&origins).unwrap();
        assert_eq!(config.daemon.control, Path::new("/run/x/c.sock"));
        assert_eq!(
            (config.daemon.state.as_path(), config.suspect),
            (Path::new("/var/x"), SuspectAction::Drop)
        );
        assert_eq!(config.vms.len(), 2);

        let origins = Origins {
            vms: vec!["name=web1,socket=/s/2,tap=t2".into()],
            control: Some("c".into()),
            ..origins
        };
        assert_eq!(
            lines(&origins),
            [
                "--control: control \"c\" is not an absolute path: begin it with \"/\"".to_owned(),
                format!(
                    "--vm number 1, column 6: the VM name \"web1\" is taken at {}:5:8: give each its own",
                    file.display()
                ),
            ]
        );
    }

    #[test]
    fn vms_that_were_added_come_last_and_do_not_stand_back_for_files() {
        let (dir, file) = written("", &[]);
        let state = dir.path().join("state");
        std::fs::create_dir_all(state.join("vms.d")).unwrap();
        let vm = |name: &str, tap: &str| {
            format!("[[vm]]\nname = \"{name}\"\n[[vm.port]]\nsocket = \"/s/{tap}\"\ntap = \"{tap}\"\n")
        };
        let added = state.join("vms.d/a.toml");
        std::fs::write(&added, vm("a", "t1")).unwrap();
        std::fs::write(state.join("vms.d/.b.toml.new"), "[").unwrap();
        let state = Some(state.display().to_string());
        let origins = Origins { file: Some(file), state, ..arguments(&["name=b,socket=/s/2,tap=t2"]) };
        let config = Config::load(&origins).unwrap();
        assert_eq!(config.vms.iter().map(Vm::is_added).collect::<Vec<_>>(), [false, true]);
        assert_eq!(config.vms[1].at, Place::Added(added.clone()));

        std::fs::write(dir.path().join("vms.d/c.toml"), vm("a", "t3")).unwrap();
        let (here, there) = (added.display(), dir.path().join("vms.d/c.toml"));
        let said = format!(
            "{here}:2:8: the VM name \"a\" is taken at {}:2:8, and this VM was added while running: take it out \
             there, or remove this one (`vmflow remove`; this file while vmflow does not run)",
            there.display()
        );
        assert_eq!(lines(&origins), [said]);
    }

    #[test]
    fn one_tap_name_in_two_namespaces_is_two_taps() {
        let two = |first, second| {
            arguments(&[
                &format!("name=a,socket=/s/1,tap=t{first}"),
                &format!("name=b,socket=/s/2,tap=t{second}"),
            ])
        };
        assert!(Config::load(&two(",netns=x", ",netns=y")).is_ok());
        assert!(Config::load(&two(",netns=x", "")).is_ok());
        assert_eq!(
            lines(&two(",netns=x", ",netns=/run/netns/x")),
            [
                "--vm number 2, column 24: the tap \"t\" in netns \"x\" is taken at --vm number 1, column 24: give each its own"
            ]
        );
    }

    #[test]
    fn a_tap_in_a_namespace_that_is_none_is_not_compared() {
        let origins = arguments(&["name=a,socket=/s/1,tap=t", "name=b,socket=/s/2,tap=t,netns=x/y"]);
        assert_eq!(
            lines(&origins),
            [
                "--vm number 2, column 32: netns \"x/y\" is neither a name under /run/netns nor an absolute path"
            ]
        );
    }

    #[test]
    fn one_mac_at_two_vms_is_no_fault() {
        let origins = arguments(&[
            "name=a,socket=/s/1,tap=t1,mac=02:00:00:00:00:01",
            "name=b,socket=/s/2,tap=t2,mac=02:00:00:00:00:01",
        ]);
        assert_eq!(Config::load(&origins).unwrap().vms.len(), 2);
    }
}
