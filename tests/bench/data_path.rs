//! What a frame costs: CPU time per frame of vmflow's worker, beside a plain `writev`/`read` loop on the same
//! tap, in the same run, in turn (A B A B ...).
//!
//! `cargo bench --bench data_path [-- ROUNDS FRAMES]`, as root. It works in a network namespace of its own.
//! The driver is `tests/driver`; frames that are sent are dropped at the tap's ingress, frames that are
//! received are put into the tap's queue by a packet socket before the reader is let loose.
//!
//! Times are CPU time (schedstat of the worker's threads, thread CPU time of the plain loop): the machine may
//! be shared. Only the ratio of a pair of neighbours means something.

#![allow(unreachable_pub, reason = "a program of its own")]

mod host;
mod report;

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use host::{Plain, Sender, Tap};
use report::Series;
use vmflow_driver::{
    frame::pattern,
    net::{Config, Device},
};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Frames that wait in the tap before they are received: fewer than its queue holds.
const BURST: u16 = 900;
const QUEUE_SIZE: u16 = 1024;
/// Frame lengths in bytes.
const LENGTHS: [usize; 2] = [64, 1514];
const TAP: &str = "vmfbench0";
/// The processor of the driver and of whoever feeds the tap; the other one is the backend's.
const DRIVER_CPU: usize = 0;
const BACKEND_CPU: usize = 1;

fn main() {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let rounds = numbers.first().copied().unwrap_or(7);
    let frames = numbers.get(1).copied().unwrap_or(1_000_000);
    host::own_network();
    let tap = Tap::persistent(TAP);
    host::pin(DRIVER_CPU);
    println!("| what | vmflow ns/frame | plain ns/frame | plain / vmflow | range |\n|---|---|---|---|---|");
    let mut sent = 0;
    for len in LENGTHS {
        let mut transmit = Series::new(format!("transmit, {len} B"));
        let mut receive = Series::new(format!("receive, {len} B"));
        for _ in 0..rounds {
            let vmflow = Vmflow::start();
            let mut device = vmflow.connect();
            let a = transmitted(&vmflow, &mut device, len, frames);
            let r = received(&vmflow, &mut device, len, frames / 4);
            sent += frames;
            vmflow.check(&device);
            drop(device);
            drop(vmflow);
            let mut plain = Plain::attach(&tap);
            transmit.push(a, plain.transmit(len, frames));
            receive.push(r, plain.receive(len, frames / 4, BURST));
        }
        println!("{transmit}\n{receive}");
    }
    println!(
        "\n{sent} frames were transmitted through vmflow; every time the ledger balanced and agreed with the driver."
    );
}

/// ns of CPU per frame of the worker.
fn transmitted(vmflow: &Vmflow, device: &mut Device, len: usize, frames: u64) -> f64 {
    let frame = frame(len);
    let pair = device.first();
    pair.transmit.prefill(|_| &frame).expect("the rings are empty");
    let before = vmflow.cpu();
    let (mut added, goal) = (0, pair.transmit.done() + frames);
    while pair.transmit.done() < goal {
        let most = u16::try_from((frames - added).min(64)).unwrap_or(64);
        added += u64::from(pair.transmit.send_batch(most).expect("kick"));
        pair.transmit.reclaim().expect("the used ring is sound");
    }
    per_frame(vmflow.cpu() - before, frames)
}

fn received(vmflow: &Vmflow, device: &mut Device, len: usize, frames: u64) -> f64 {
    let sender = Sender::on(TAP);
    let frame = frame(len);
    let before = vmflow.cpu();
    let mut total = 0;
    while total < frames {
        sender.send(&frame, BURST);
        let pair = device.first();
        pair.receive.post(BURST).expect("kick");
        let mut came = 0;
        while came < u64::from(BURST) {
            if let Some(_frame) = pair.receive.receive().expect("the used ring is sound") {
                came += 1;
            }
        }
        total += came;
    }
    per_frame(vmflow.cpu() - before, total)
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn per_frame(nanoseconds: u64, frames: u64) -> f64 {
    nanoseconds as f64 / frames as f64
}

/// A frame that no host answers.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = pattern(len, 1);
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    frame
}

/// A running vmflow with one VM on the tap.
struct Vmflow {
    child: Child,
    directory: PathBuf,
}

impl Vmflow {
    fn start() -> Self {
        let directory = std::env::temp_dir().join(format!("vmflow-bench-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a temporary directory");
        let path = |name: &str| directory.join(name).display().to_string();
        let vm = format!("name=bench,socket={},tap={TAP}", path("bench.sock"));
        let child = Command::new(env!("CARGO_BIN_EXE_vmflow"))
            .args(["serve", "--vm", &vm, "--control", &path("control.sock"), "--state", &path("state")])
            .env("VMFLOW_LOG", "off")
            .stdin(Stdio::null())
            .spawn()
            .expect("vmflow starts");
        let vmflow = Self { child, directory };
        host::wait_for("vmflow", || vmflow.directory.join("stats.sock").exists());
        vmflow
    }

    fn connect(&self) -> Device {
        let config = Config { queue_size: QUEUE_SIZE, patience: PATIENCE, ..Config::default() };
        let device =
            Device::connect(&self.directory.join("bench.sock"), config).expect("vmflow accepts a driver");
        host::pin_process(self.worker(), BACKEND_CPU);
        host::wait_for("the carrier", || host::carrier(TAP));
        device
    }

    fn worker(&self) -> u32 {
        host::descendant(self.child.id(), "vmf-w").expect("there is a worker")
    }

    /// ns that all threads of the worker have used.
    fn cpu(&self) -> u64 {
        host::cpu_of_process(self.worker())
    }

    /// The ledger balances and says what the driver says.
    fn check(&self, device: &Device) {
        let control = self.directory.join("control.sock").display().to_string();
        let output = Command::new(env!("CARGO_BIN_EXE_vmflow"))
            .args(["stats", "--json", "--control", &control])
            .output();
        let stats: vmflow::monitor::api::document::Stats =
            serde_json::from_slice(&output.expect("vmflow stats").stdout).expect("a document");
        let port = &stats.vms[0].ports[0];
        let (transmit, receive) =
            (vmflow::ledger::Totals::from(&port.transmit), vmflow::ledger::Totals::from(&port.receive));
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
