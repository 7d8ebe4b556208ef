//! A vmflow for the benches: one VM on a tap that is there already.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, ChildStderr, Command, Stdio},
    time::Duration,
};

use vmflow::{
    ledger::Totals,
    monitor::api::document::{PortStats, Stats},
};
use vmflow_driver::net::{Config, Device};

use crate::host;

/// The tap.
pub const TAP: &str = "vmfbench0";
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running vmflow with one VM on the tap.
pub struct Vmflow {
    child: Child,
    directory: PathBuf,
    _log: BufReader<ChildStderr>,
}

impl Vmflow {
    pub fn start() -> Self {
        let directory = std::env::temp_dir().join(format!("vmflow-bench-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a temporary directory");
        let path = |name: &str| directory.join(name).display().to_string();
        let vm = format!("name=bench,socket={},tap={TAP}", path("bench.sock"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmflow"))
            .args(["serve", "--vm", &vm, "--control", &path("control.sock"), "--state", &path("state")])
            .env("VMFLOW_LOG", "vmflow::monitor=info")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmflow starts");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let ready = log.by_ref().lines().map_while(Result::ok).any(|line| line.contains("ready: "));
        assert!(ready, "vmflow ended before it was ready");
        // Nothing more is read; it is kept open so that nobody is told off for writing.
        Self { child, directory, _log: log }
    }

    pub fn connect(&self, config: Config) -> Device {
        let config = Config { patience: PATIENCE, ..config };
        let device =
            Device::connect(&self.directory.join("bench.sock"), config).expect("vmflow accepts a driver");
        host::wait_for("the carrier", || host::carrier(TAP));
        device
    }

    pub fn worker(&self) -> u32 {
        host::descendant(self.child.id(), "vmf-w").expect("there is a worker")
    }

    /// ns that all threads of the worker have used.
    #[allow(dead_code, reason = "each bench uses a part")]
    pub fn cpu(&self) -> u64 {
        host::cpu_of_process(self.worker())
    }

    /// The port as vmflow shows it.
    pub fn port(&self) -> PortStats {
        let control = self.directory.join("control.sock").display().to_string();
        let output = Command::new(env!("CARGO_BIN_EXE_vmflow"))
            .args(["stats", "--json", "--control", &control])
            .output();
        let mut stats: Stats =
            serde_json::from_slice(&output.expect("vmflow stats").stdout).expect("a document");
        stats.vms.remove(0).ports.remove(0)
    }

    /// The ledger balances and says what the driver says.
    #[allow(dead_code, reason = "each bench uses a part")]
    pub fn check(&self, device: &Device) {
        let port = self.port();
        let (transmit, receive) = (Totals::from(&port.transmit), Totals::from(&port.receive));
        let (sent, got) = device.totals();
        assert!(transmit.balances() && receive.balances(), "the ledger does not balance");
        assert_eq!((transmit.passed.frames, transmit.passed.bytes), (sent.frames, sent.bytes));
        assert_eq!((receive.passed.frames, receive.passed.bytes), (got.frames, got.bytes));
    }
}

impl Drop for Vmflow {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
