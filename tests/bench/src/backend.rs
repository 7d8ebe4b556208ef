//! The backends: started for each run, on the backend's processor, and checked against the front end's counts.

use std::{path::PathBuf, process::Command};

use anyhow::Result;
use tempfile::TempDir;
use vmflow_driver::transmit::Traffic;

use crate::{
    BACKEND_CPU,
    case::{Case, Rival},
    host::{Network, Sink, drop_all_from, listens, tap_frames, wait_for},
    process::{Process, tree},
    testpmd::Testpmd,
    vmflow::Vmflow,
};

/// The tap that DPDK makes for itself.
const DPDK_TAP: &str = "vbdpdk";

/// A backend that can be started again and again.
#[derive(Clone, Debug)]
pub struct Variant {
    /// What tables call it.
    pub name: String,
    /// Which rival of a case it is.
    pub rival: Rival,
    /// How to start it.
    pub kind: Kind,
}

/// How a backend is started.
#[derive(Clone, Debug)]
pub enum Kind {
    /// This program, with more settings for each port; `counts`: its ledger says what it did.
    Vmflow {
        /// The program.
        program: PathBuf,
        /// `,key=value`.
        words: &'static str,
        /// Whether it counts.
        counts: bool,
    },
    /// A command line with `{socket}` and `{tap}`.
    Command(String),
    /// A testpmd.
    Dpdk,
    /// A thread of this process.
    Plain,
    /// Inside QEMU.
    Qemu {
        /// With the kernel's vhost-net.
        vhost: bool,
    },
}

/// A running backend.
#[derive(Debug)]
pub struct Backend {
    running: Running,
    /// Where front ends connect, port by port.
    pub sockets: Vec<PathBuf>,
    /// The taps behind them.
    pub taps: Vec<String>,
    /// What the taps had counted before.
    before: Vec<(u64, u64)>,
    _directory: Option<TempDir>,
}

#[derive(Debug)]
enum Running {
    Vmflow { vmflow: Vmflow, counts: bool },
    Command(Vec<Process>),
    Dpdk(Testpmd),
}

impl Backend {
    /// Starts it for a case; `None` where the backend is no process of its own.
    ///
    /// # Errors
    /// What it says when it does not start.
    pub fn start(kind: &Kind, case: &Case, network: &Network) -> Result<Option<Self>> {
        let taps = || -> Result<Vec<String>> {
            (0..case.ports).map(|port| network.tap(case.sink, case.pairs, port)).collect()
        };
        let cpus: &[usize] = if case.pairs == 1 { &[BACKEND_CPU] } else { &[] };
        let mut backend = match kind {
            Kind::Vmflow { program, words, counts } => {
                let pairs =
                    if case.pairs > 1 { format!(",queue_pairs={}", case.pairs) } else { String::new() };
                let taps = taps()?;
                let vmflow = Vmflow::start(program, &taps, &format!("{words}{pairs}"), cpus)?;
                let sockets = (0..taps.len()).map(|port| vmflow.socket(port)).collect();
                Self::of(Running::Vmflow { vmflow, counts: *counts }, sockets, taps)
            }
            Kind::Command(command) => Self::command(command, taps()?, cpus)?,
            Kind::Dpdk => Self::dpdk(case.sink)?,
            Kind::Plain | Kind::Qemu { .. } => return Ok(None),
        };
        for tap in &backend.taps {
            network.mend(case.sink, tap)?;
        }
        backend.before = backend.taps.iter().map(|tap| tap_frames(tap)).collect();
        Ok(Some(backend))
    }

    fn of(running: Running, sockets: Vec<PathBuf>, taps: Vec<String>) -> Self {
        Self { running, sockets, taps, before: Vec::new(), _directory: None }
    }

    /// A process for each port.
    fn command(command: &str, taps: Vec<String>, cpus: &[usize]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let sockets: Vec<_> =
            (0..taps.len()).map(|port| directory.path().join(format!("{port}.sock"))).collect();
        let mut processes = Vec::new();
        for (socket, tap) in sockets.iter().zip(&taps) {
            let line = command.replace("{socket}", &socket.display().to_string()).replace("{tap}", tap);
            // `exec`: the process is the backend, not a shell.
            let mut shell = Command::new("sh");
            let mut process = Process::start(
                &line,
                shell.args(["-c", &format!("exec {line}")]).current_dir(&directory),
                cpus,
            )?;
            let mut ended = Ok(());
            wait_for("the peer's socket", || {
                ended = process.must_live();
                if ended.is_err() || listens(socket) {
                    Ok(())
                } else {
                    Err(format!("none at {}", socket.display()))
                }
            })?;
            ended?;
            processes.push(process);
        }
        Ok(Self { _directory: Some(directory), ..Self::of(Running::Command(processes), sockets, taps) })
    }

    /// It makes its tap itself, as one with several queues.
    fn dpdk(sink: Sink) -> Result<Self> {
        anyhow::ensure!(sink == Sink::Drop, "DPDK makes its own tap, behind which there is nothing here");
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("dpdk.sock");
        let devices =
            [format!("net_vhost0,iface={}", socket.display()), format!("net_tap0,iface={DPDK_TAP}")];
        let mut testpmd = Testpmd::start(BACKEND_CPU, &devices, &[])?;
        testpmd.choose("io")?;
        testpmd.begin()?;
        drop_all_from(DPDK_TAP)?;
        let taps = vec![DPDK_TAP.to_owned()];
        Ok(Self { _directory: Some(directory), ..Self::of(Running::Dpdk(testpmd), vec![socket], taps) })
    }

    /// Its processes.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        match &self.running {
            Running::Vmflow { vmflow, .. } => vmflow.pids(),
            Running::Command(processes) => processes.iter().flat_map(|process| tree(process.pid())).collect(),
            Running::Dpdk(testpmd) => vec![testpmd.pid()],
        }
    }

    /// Whether it looks for frames all the time, and throws away those for which there is no room.
    #[must_use]
    pub const fn polls(&self) -> bool {
        matches!(self.running, Running::Dpdk(_))
    }

    /// Frames that it has got from front ends and from taps so far.
    ///
    /// # Errors
    /// When vmflow does not answer.
    pub fn moved(&self) -> Result<(u64, u64)> {
        if let Running::Vmflow { vmflow, counts: true } = &self.running {
            let ports = vmflow.ports()?;
            let sent = ports.iter().map(|port| port.transmit.forwarded.frames).sum();
            return Ok((sent, ports.iter().map(|port| port.receive.delivered.frames).sum()));
        }
        Ok(self.at_taps())
    }

    /// Frames that its taps have got from it and given to it.
    #[must_use]
    pub fn at_taps(&self) -> (u64, u64) {
        let now = self.taps.iter().map(|tap| tap_frames(tap));
        let since = now.zip(&self.before).map(|(now, before)| (now.0 - before.0, now.1 - before.1));
        since.fold((0, 0), |sum, moved| (sum.0 + moved.0, sum.1 + moved.1))
    }

    /// What was sent and received is what was counted: by vmflow's ledger, else by the taps. `None`: what was received
    /// is not known.
    ///
    /// # Errors
    /// What does not agree.
    pub fn check(&self, sent: Traffic, got: Option<Traffic>) -> Result<()> {
        let frames = (sent.frames, got.map(|got| got.frames));
        // A device may give a frame back before it is through with it.
        wait_for("equal counts", || {
            let moved = self.moved().map_err(|e| e.to_string())?;
            let agree = match &self.running {
                // Only its tap counts, and there several frames may be one.
                Running::Vmflow { counts: false, .. } => {
                    (moved.0 > 0) == (frames.0 > 0) && moved.0 <= frames.0
                }
                _ => moved.0 == frames.0 && frames.1.is_none_or(|got| moved.1 == got),
            };
            if agree { Ok(()) } else { Err(format!("{frames:?} at the front end, {moved:?} behind it")) }
        })?;
        match &self.running {
            Running::Vmflow { vmflow, counts: true } => vmflow.check(sent, got),
            _ => Ok(()),
        }
    }
}
