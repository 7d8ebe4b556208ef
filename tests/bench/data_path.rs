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

mod daemon;
#[allow(dead_code, reason = "each bench uses a part")]
mod host;
mod plain;
mod report;

use daemon::Vmflow;
use host::{Sender, Tap};
use plain::Plain;
use report::Series;
use vmflow_driver::{
    frame::pattern,
    net::{Config, Device},
};

/// Frames that wait in the tap before they are received: fewer than its queue holds.
const BURST: u16 = 900;
const QUEUE_SIZE: u16 = 1024;
/// Frame lengths in bytes.
const LENGTHS: [usize; 2] = [64, 1514];
/// The processor of the driver and of whoever feeds the tap; the other one is the backend's.
const DRIVER_CPU: usize = 0;
const BACKEND_CPU: usize = 1;

fn main() {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let rounds = numbers.first().copied().unwrap_or(7);
    let frames = numbers.get(1).copied().unwrap_or(1_000_000);
    host::own_network();
    let tap = Tap::persistent(daemon::TAP);
    host::pin(DRIVER_CPU);
    println!("| what | vmflow ns/frame | plain ns/frame | plain / vmflow | range |\n|---|---|---|---|---|");
    let mut sent = 0;
    for len in LENGTHS {
        let mut transmit = Series::new(format!("transmit, {len} B"));
        let mut receive = Series::new(format!("receive, {len} B"));
        for _ in 0..rounds {
            let vmflow = Vmflow::start();
            let mut device = vmflow.connect(Config { queue_size: QUEUE_SIZE, ..Config::default() });
            host::pin_process(vmflow.worker(), BACKEND_CPU);
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
    let sender = Sender::on(daemon::TAP);
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
