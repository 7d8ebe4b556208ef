//! A host in a guest: a Debian on which vmflow is installed as a package and runs as a service. The VMs of that host
//! are the driver's: a virtio-net device needs no VM.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::MutexGuard,
};

use serde_json::Value;
use tempfile::TempDir;
use vmflow::monitor::api::document::PortStats;

use crate::{
    bed::{must, output_of, script, settle, take_turn},
    harness::VMFLOW,
};

const NAME: &str = "host";
/// Where VMMs find the port of the host's VM.
const SOCKET: &str = "/run/vmflow/web1/net0.sock";
/// The versions of the two packages that it can have.
pub const VERSIONS: [&str; 2] = ["1.0", "2.0"];

/// A guest that is a host.
pub struct Host {
    directory: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Host {
    /// Boots it; packages and the front end are in /root.
    pub fn start() -> Self {
        let host = Self { directory: tempfile::tempdir().unwrap(), _turn: take_turn() };
        let disk = host.disk();
        let mut start = host.script(&["start", NAME, "--image", "debian", "--no-network", "--disk"]);
        must(start.arg(disk));
        host.run("tar -xf /dev/vdb -C /root");
        host
    }

    /// What the host is given: a disk whose bytes are a tar archive.
    fn disk(&self) -> PathBuf {
        let (files, disk) = (self.directory.path().join("files"), self.directory.path().join("disk.tar"));
        fs::create_dir(&files).unwrap();
        std::thread::scope(|scope| {
            for version in VERSIONS {
                let mut build = script("build-deb");
                build.args(["--binary", VMFLOW, "--version", version, "--out"]).arg(&files);
                scope.spawn(move || must(&mut build));
            }
        });
        must(Command::new("strip").arg(front_end()).arg("-o").arg(files.join("steady")));
        must(Command::new("tar").arg("-cf").arg(&disk).arg("-C").arg(&files).arg("."));
        disk
    }

    fn script(&self, words: &[&str]) -> Command {
        let mut command = script("run-guest");
        command.env("VMFLOW_RUN", self.directory.path()).args(words);
        command
    }

    /// Runs a command that must succeed; gives what it printed.
    pub fn run(&self, command: &str) -> String {
        must(&mut self.script(&["exec", NAME, command]))
    }

    /// Runs a command; gives its exit code and all that it printed.
    pub fn outcome(&self, command: &str) -> (Option<i32>, String) {
        let output = output_of(&mut self.script(&["exec", NAME, command]));
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    }

    /// Reboots it by systemctl.
    pub fn reboot(&self) {
        must(&mut self.script(&["reboot", NAME]));
    }

    /// A property of vmflow's unit.
    pub fn unit(&self, property: &str) -> String {
        self.run(&format!("systemctl show --property {property} --value vmflow.service")).trim().to_owned()
    }

    /// The unit's lines in the journal since the last boot.
    pub fn journal(&self) -> String {
        self.run("journalctl --unit vmflow.service --boot --no-pager")
    }

    /// Writes down the VM, named `web1`.
    pub fn write_vm(&self) {
        self.run(&format!(
            "mkdir -p /etc/vmflow/vms.d; printf '%s\\n' '[[vm]]' 'name = \"web1\"' '[[vm.port]]' 'socket = \"{SOCKET}\"' 'tap = \"vmf-web1\"' \
             >/etc/vmflow/vms.d/web1.toml"
        ));
    }

    /// What is counted for the VM's port.
    pub fn port(&self) -> PortStats {
        let stats: Value = serde_json::from_str(&self.run("vmflow stats --json")).unwrap();
        serde_json::from_value(stats["vms"][0]["ports"][0].clone()).unwrap()
    }

    /// The VM's label.
    pub fn label(&self) -> u64 {
        let vms: Value = serde_json::from_str(&self.run("vmflow vms --json")).unwrap();
        vms["vms"][0]["label"].as_u64().unwrap_or_else(|| panic!("no label: {vms}"))
    }

    /// A front end connects and sends, until it is told to stop.
    pub fn send(&self) {
        self.run("ip link set vmf-web1 up");
        // The tap is another one after a restart: its counters begin anew.
        let tap = self.tap_frames();
        self.run(&format!(
            "echo {tap} >/run/tap.before; touch /run/go; (/root/steady {SOCKET} /run/go >/run/sent 2>&1 & \
             echo $! >/run/steady; wait $!; echo $? >/run/ended) >/dev/null 2>&1 &"
        ));
        self.wait_for_frames();
    }

    /// Waits until more frames have come through.
    pub fn wait_for_frames(&self) {
        let before = self.port().transmit.chains;
        settle("more frames", || {
            let port = self.port();
            if port.transmit.chains > before { Ok(()) } else { Err(format!("{port:?}; {before} before")) }
        });
    }

    fn tap_frames(&self) -> u64 {
        self.run("cat /sys/class/net/vmf-web1/statistics/rx_packets").trim().parse().unwrap()
    }

    /// The front end, whose port has gone, is ended.
    pub fn kill_front_end(&self) {
        self.run("kill $(cat /run/steady); until rm /run/ended 2>/dev/null; do sleep 0.1; done");
    }

    /// The front end stops sending: gives how many frames it sent, each of which the tap has got.
    pub fn stop_sending(&self) -> u64 {
        self.run("rm /run/go");
        settle("the front end's end", || {
            let (code, said) =
                self.outcome("cat /run/ended && rm /run/ended && cat /run/sent /run/tap.before");
            let words: Vec<_> = said.split_whitespace().collect();
            let [ended, sent, before] = words[..] else { return Err(said) };
            assert_eq!((code, ended), (Some(0), "0"), "the front end: {said}");
            let (sent, before): (u64, u64) = (sent.parse().unwrap(), before.parse().unwrap());
            assert_eq!(self.tap_frames(), before + sent, "frames that the tap got");
            Ok(sent)
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = output_of(&mut self.script(&["log", NAME]));
            let (_, journal) = self.outcome("journalctl --unit vmflow.service --no-pager | tail -n 60");
            eprintln!("{}\n{journal}", String::from_utf8_lossy(&log.stdout));
        }
        let _ = output_of(&mut self.script(&["kill", NAME]));
    }
}

/// The driver's front end, built.
fn front_end() -> PathBuf {
    // With the whole workspace, as the tests were: nothing is compiled twice.
    let mut cargo = Command::new(env!("CARGO"));
    must(cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--workspace", "--example", "steady"]));
    Path::new(VMFLOW).with_file_name("examples").join("steady")
}
