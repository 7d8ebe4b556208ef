//! DPDK's testpmd: a front end that shares no code with QEMU, and a forwarder between a vhost-user socket and a tap.

use std::{
    path::Path,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use vmflow_driver::transmit::Traffic as Moved;

use crate::{
    FRONT_CPU,
    backend::Backend,
    case::{Case, Traffic},
    driver::SLOTS,
    host::{Sender, wait_for, wait_for_carrier},
    load::{Frame, Load, to_host},
    measure::{Meter, Sample},
    process::Process,
};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A testpmd at its prompt.
#[derive(Debug)]
pub struct Testpmd {
    process: Process,
    prefix: String,
}

/// How it is to drive.
#[derive(Clone, Copy, Debug)]
pub struct Words {
    /// `set fwd` of this.
    pub forward: &'static str,
    /// More options.
    pub options: &'static [&'static str],
    /// The load comes from a capture file.
    pub replay: bool,
}

/// What it counted over all its devices.
#[derive(Clone, Copy, Debug)]
struct Counted {
    received: u64,
    sent: u64,
}

impl Testpmd {
    /// Starts it on one processor with these devices.
    ///
    /// # Errors
    /// What it says when it does not start.
    pub fn start(cpu: usize, devices: &[String], options: &[&str]) -> Result<Self> {
        // A name of its own: another testpmd may run on this machine.
        let prefix =
            format!("vmflow-bench-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "dpdk-testpmd", "--no-pci", "--no-huge", "--no-telemetry", "-m", "384"]);
        // One core for the prompt, which sleeps, and one that polls.
        command.arg(format!("--lcores=0@{cpu},1@{cpu}")).arg(format!("--file-prefix={prefix}"));
        command.args(devices.iter().map(|device| format!("--vdev={device}")));
        command.args(["--", "--interactive", "--no-mlockall", "--total-num-mbufs=16384"]);
        command.args(["--disable-link-check", "--no-flush-rx"]);
        let process = Process::start("testpmd", command.args(options), &[cpu])?;
        Ok(Self { process, prefix })
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Chooses how to forward; when that is done its ports are up.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn choose(&mut self, forward: &str) -> Result<()> {
        self.process.say(&format!("set fwd {forward}"))?;
        self.process.wait_for(&format!("Set {forward} packet forwarding mode"))?;
        Ok(())
    }

    /// Begins to forward.
    ///
    /// # Errors
    /// When it does not.
    pub fn begin(&mut self) -> Result<()> {
        self.process.say("start")?;
        self.process.wait_for("packets/burst")?;
        Ok(())
    }

    /// What it has counted so far (`show fwd stats all`), or in all (`stop`).
    fn counted(&mut self, command: &str) -> Result<Counted> {
        self.process.say(command)?;
        self.process.wait_for("Accumulated forward statistics")?;
        let [received, sent] = ["RX-packets:", "TX-packets:"].map(|name| {
            let line = self.process.wait_for(name)?;
            let number = line.split_once(name).and_then(|(_, rest)| rest.split_whitespace().next());
            number.and_then(|number| number.parse().ok()).with_context(|| line.clone())
        });
        Ok(Counted { received: received?, sent: sent? })
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // It ends by itself when it is told to, and cleans up; if it is gone already, that is well, too.
        let _ = self.process.say("quit").and_then(|()| self.process.wait_for("Bye"));
        let _ = std::fs::remove_dir_all(Path::new("/var/run/dpdk").join(&self.prefix));
    }
}

/// Runs a case once with testpmd as the front end.
///
/// # Errors
/// What went wrong; counts that do not agree.
pub fn run(case: &Case, words: Words, backend: &Backend, time: Duration) -> Result<Sample> {
    let Words { forward, options, replay } = words;
    let directory = tempfile::tempdir()?;
    let socket = &backend.sockets[0];
    let mut devices = Vec::new();
    if replay {
        let file = directory.path().join("frames.pcap");
        std::fs::write(&file, capture(&case.load))?;
        devices.push(format!("net_pcap0,rx_pcap={},infinite_rx=1", file.display()));
    }
    devices.push(format!("net_virtio_user0,path={},queues=1,queue_size={SLOTS}", socket.display()));
    let length = format!("--txpkts={}", case.load.length);
    let mut testpmd = Testpmd::start(FRONT_CPU, &devices, &[options, &[&length]].concat())?;
    testpmd.choose(forward)?;
    wait_for_carrier(&backend.taps[0])?;
    let meter = Meter::start(backend.pids(), vec![testpmd.pid()]);
    testpmd.begin()?;
    if case.traffic == Traffic::Receive {
        let fed = feed(case, backend, time)?;
        wait_for("all frames", || {
            let so_far = testpmd.counted("show fwd stats all").map_err(|e| e.to_string())?;
            let all = so_far.received == fed || backend.polls();
            if all { Ok(()) } else { Err(format!("{so_far:?} of {fed}")) }
        })?;
    } else {
        std::thread::sleep(time);
    }
    let counted = testpmd.counted("stop")?;
    let sample = meter.stop();
    // A capture file's frames are received as well, but not from the backend.
    let got = if replay { 0 } else { counted.received };
    let moved = |frames| Moved { frames, bytes: frames * case.load.length as u64 };
    backend.check(moved(counted.sent), (!backend.polls()).then(|| moved(got)))?;
    let frames = counted.sent + got;
    Ok(Sample { packets: frames, bytes: moved(frames).bytes, ..sample })
}

/// Puts frames into the tap's queue, and waits for the backend each time its ring could be full. Gives how many.
fn feed(case: &Case, backend: &Backend, time: Duration) -> Result<u64> {
    let sender = Sender::on(&backend.taps[0])?;
    let Frame { header, bytes } = case.load.frames(1, to_host().reversed()).remove(0);
    let (begin, mut fed) = (Instant::now(), 0);
    while begin.elapsed() < time {
        for _ in 0..SLOTS / 4 {
            sender.send(&header, &bytes)?;
        }
        fed += u64::from(SLOTS / 4);
        wait_for("frames out of the tap", || {
            let out = backend.at_taps().1;
            if out == fed { Ok(()) } else { Err(format!("{out} of {fed}")) }
        })?;
    }
    Ok(fed)
}

/// A capture file of the ring's frames, all at the same time
/// (<https://wiki.wireshark.org/Development/LibpcapFileFormat>).
fn capture(load: &Load) -> Vec<u8> {
    const ETHERNET: u32 = 1;
    let mut file = Vec::new();
    let word = |file: &mut Vec<u8>, word: u32| file.extend_from_slice(&word.to_le_bytes());
    for header in [0xa1b2_c3d4, 2 | 4 << 16, 0, 0, 0xffff, ETHERNET] {
        word(&mut file, header);
    }
    for frame in load.frames(SLOTS, to_host()) {
        let length = u32::try_from(frame.bytes.len()).unwrap_or(0);
        for field in [0, 0, length, length] {
            word(&mut file, field);
        }
        file.extend_from_slice(&frame.bytes);
    }
    file
}
