//! A vmflow for the benches: one VM with a port on each of some taps.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use vmflow::{
    ledger::Totals,
    monitor::api::document::{PortStats, Stats},
};
use vmflow_driver::transmit::Traffic;

use crate::process::{Process, must, tree};

/// A running vmflow.
#[derive(Debug)]
pub struct Vmflow {
    process: Process,
    program: PathBuf,
    directory: TempDir,
}

impl Vmflow {
    /// Starts it, with a port for each tap; `words` are more of a port's settings: `,key=value`.
    ///
    /// # Errors
    /// What it says when it does not start.
    pub fn start(program: &Path, taps: &[String], words: &str, cpus: &[usize]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut command = Command::new(program);
        command.env("VMFLOW_LOG", "vmflow::monitor=info").arg("serve");
        for (index, tap) in taps.iter().enumerate() {
            let socket = socket(directory.path(), index).display().to_string();
            command.arg("--vm").arg(format!("name=bench,socket={socket},tap={tap}{words}"));
        }
        let path = |name: &str| directory.path().join(name);
        command.arg("--control").arg(path("control.sock")).arg("--state").arg(path("state"));
        let mut process = Process::start("vmflow", &mut command, cpus)?;
        process.wait_for("ready: ")?;
        Ok(Self { process, program: program.into(), directory })
    }

    /// The socket of a port.
    #[must_use]
    pub fn socket(&self, port: usize) -> PathBuf {
        socket(self.directory.path(), port)
    }

    /// Monitor, keepers and workers.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        tree(self.process.pid())
    }

    /// The worker of a port, of which there is one.
    ///
    /// # Errors
    /// When there is none.
    pub fn worker(&self) -> Result<u32> {
        let is_worker = |pid: &u32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.starts_with("vmf-w"))
        };
        self.pids().into_iter().find(is_worker).context("there is no worker")
    }

    /// The ports as vmflow shows them.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ports(&self) -> Result<Vec<PortStats>> {
        let mut command = Command::new(&self.program);
        command.args(["stats", "--json", "--control"]).arg(self.directory.path().join("control.sock"));
        let mut stats: Stats = serde_json::from_str(&must(&mut command)?)?;
        ensure!(!stats.vms.is_empty(), "vmflow shows no VM");
        Ok(stats.vms.remove(0).ports)
    }

    /// The ledgers balance and say what the front ends say that they sent and got. `None`: its frames are not known.
    ///
    /// # Errors
    /// What does not agree.
    pub fn check(&self, sent: Traffic, got: Option<Traffic>) -> Result<()> {
        let (mut transmitted, mut received) = (Traffic::default(), Traffic::default());
        for port in self.ports()? {
            let (transmit, receive) = (Totals::from(&port.transmit), Totals::from(&port.receive));
            ensure!(transmit.balances() && receive.balances(), "a ledger does not balance: {port:?}");
            for (sum, totals) in [(&mut transmitted, transmit), (&mut received, receive)] {
                *sum += Traffic { frames: totals.passed.frames, bytes: totals.passed.bytes };
            }
        }
        ensure!(transmitted == sent, "the front end sent {sent:?}, vmflow counted {transmitted:?}");
        let got = got.unwrap_or(received);
        ensure!(received == got, "the front end got {got:?}, vmflow counted {received:?}");
        Ok(())
    }
}

fn socket(directory: &Path, port: usize) -> PathBuf {
    directory.join(format!("{port}.sock"))
}
