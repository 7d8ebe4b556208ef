//! Guests with a kernel of their own, in QEMU, started by `qemu-scripts/run-guest`; iperf3 in the guest and on the
//! host.
//!
//! QEMU's own tap backend runs in QEMU's threads, so the CPU time here is that of QEMU and the backend together.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use vmflow_driver::{
    frame::{ETHERNET, IPV4, TCP, UDP},
    transmit::Traffic as Moved,
};

use crate::{
    backend::Backend,
    case::Case,
    host::{GATEWAY, tap_frames, wait_for},
    measure::{Meter, Sample},
    process::{Process, must, tree},
};

const NAME: &str = "bench";
const ADDRESS: &str = "10.0.1.2/24";

/// Where the scripts are.
#[must_use]
pub fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../qemu-scripts")
}

/// A running guest; killed when this is dropped.
struct Guest(TempDir);

impl Guest {
    fn start(options: &[&str]) -> Result<Self> {
        let guest = Self(tempfile::tempdir()?);
        must(guest.command("start").args(["--ip", ADDRESS, "--cpus", "2"]).args(options))?;
        Ok(guest)
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(scripts().join("run-guest"));
        command.env("VMFLOW_RUN", self.0.path()).args([what, NAME]);
        command
    }

    fn run(&self, line: &str) -> Result<String> {
        must(self.command("exec").arg(line))
    }

    fn pids(&self) -> Result<Vec<u32>> {
        Ok(tree(must(&mut self.command("pid"))?.parse()?))
    }

    /// What its interface has sent and received.
    fn counters(&self) -> Result<(Moved, Moved)> {
        let text =
            self.run("cd /sys/class/net/eth0/statistics; cat tx_packets tx_bytes rx_packets rx_bytes")?;
        let numbers: Vec<u64> = text.split_whitespace().flat_map(str::parse).collect();
        let [sent, sent_bytes, got, got_bytes] = numbers[..] else {
            anyhow::bail!("not four counters: {text}")
        };
        Ok((Moved { frames: sent, bytes: sent_bytes }, Moved { frames: got, bytes: got_bytes }))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // A guest that never came up has no process; that is said by who wanted it.
        let _ = must(&mut self.command("kill"));
    }
}

/// What is behind the guest's device.
#[derive(Debug)]
pub enum Nic<'a> {
    /// A vhost-user backend.
    Backend(&'a Backend),
    /// QEMU's own, on this tap.
    Tap {
        /// The tap.
        name: String,
        /// With the kernel's vhost-net.
        vhost: bool,
    },
}

/// Runs a case once: boots a guest, lets iperf3 go, compares the counters.
///
/// # Errors
/// What went wrong; counts that do not agree.
pub fn run(case: &Case, words: (&str, &str), nic: &Nic<'_>, time: Duration) -> Result<Sample> {
    let (iperf, device) = words;
    let (tap, backend) = match nic {
        Nic::Backend(backend) => (&backend.taps[0], Some(*backend)),
        Nic::Tap { name, .. } => (name, None),
    };
    let socket = backend.map(|backend| backend.sockets[0].display().to_string());
    let mut options = match (&socket, nic) {
        (Some(socket), _) => vec!["--socket", socket],
        (None, Nic::Tap { vhost: true, .. }) => vec!["--tap", tap, "--vhost"],
        (None, _) => vec!["--tap", tap],
    };
    if !device.is_empty() {
        options.extend(["--device", device]);
    }
    let before = tap_frames(tap);
    let guest = Guest::start(&options)?;
    let mut command = Command::new("iperf3");
    let mut server = Process::start("iperf3", command.args(["--server", "--forceflush"]), &[])?;
    server.wait_for("Server listening")?;

    let pids = [backend.map(Backend::pids).unwrap_or_default(), guest.pids()?].concat();
    let meter = Meter::start(pids, vec![server.pid()]);
    // A boot takes longer than any of this: twice the time makes it worth it.
    let seconds = (2 * time).as_secs_f64().ceil();
    let text = guest.run(&format!("iperf3 --client {GATEWAY} --json --time {seconds} {iperf}"))?;
    let sample = meter.stop();

    let (bytes, seconds) = received(&text)?;
    let transport = if case.load.tcp { TCP } else { UDP };
    let payload = u64::try_from(case.load.length - ETHERNET - IPV4 - transport)?;
    agree(&guest, backend, tap, before)?;
    Ok(Sample { packets: bytes / payload, bytes, seconds, ..sample })
}

/// What iperf3's receiver says: bytes, and in how many seconds.
fn received(text: &str) -> Result<(u64, f64)> {
    let result: Value = serde_json::from_str(text)?;
    let sum = &result["end"]["sum_received"];
    let bytes = sum["bytes"].as_u64().with_context(|| format!("iperf3 said: {text}"))?;
    let seconds = sum["seconds"].as_f64().with_context(|| format!("iperf3 said: {text}"))?;
    ensure!(bytes > 0, "iperf3 received nothing");
    Ok((bytes, seconds))
}

/// The guest counted what vmflow, or the tap, counted.
fn agree(guest: &Guest, backend: Option<&Backend>, tap: &str, before: (u64, u64)) -> Result<()> {
    wait_for("equal counts of the guest and what is behind it", || {
        let (sent, got) = guest.counters().map_err(|e| e.to_string())?;
        let now = tap_frames(tap);
        let moved = match backend {
            Some(backend) => backend.moved().map_err(|e| e.to_string())?,
            None => (now.0 - before.0, now.1 - before.1),
        };
        // QEMU's own tap throws away what came before the guest was up.
        let agree = moved.0 == sent.frames && (moved.1 == got.frames || backend.is_none());
        if agree { Ok(()) } else { Err(format!("{sent:?}, {got:?}: {moved:?}")) }
    })?;
    let (sent, got) = guest.counters()?;
    backend.map_or(Ok(()), |backend| backend.check(sent, Some(got)))
}
