//! How long traffic stands still when a worker is killed: from `kill -9` until the guest has its next frame
//! back from the device, sent by another worker.
//!
//! `death VMFLOW [KILLS]`, as root: VMFLOW is the program to measure. It works in a network namespace of its own. The
//! driver is `tests/driver`; its frames are dropped at the tap's ingress.
//!
//! Then the same with guest memory of which the worker had touched every page: the kernel gives that back before
//! another worker may start. Huge pages are set aside for the time that they are needed, if the host has them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use vmflow_driver::{
    memory::{Layout as Memory, PAGE},
    net::{Config, Device},
    queue::Buffer,
    transmit::Layout,
    vnet::VnetHeader,
};

use vmflow_bench::{
    PATIENCE,
    host::{Network, Sink, wait_for_carrier},
    vmflow::Vmflow,
};

/// Memory of the guests of the second part, in `GiB`.
const SIZES: [u64; 3] = [1, 2, 4];
/// Kills for each of these.
const FEW: u64 = 20;
/// Bytes of a huge page.
const HUGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// Bytes of a frame with its header.
const CHAIN: u32 = 76;
const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

fn main() {
    let mut words = std::env::args().skip(1);
    let program = PathBuf::from(words.next().expect("which vmflow?"));
    let kills = words.find_map(|word| word.parse().ok()).unwrap_or(1000);
    let network = Network::own().expect("root");
    let tap = network.tap(Sink::Drop, 1, 0).expect("a tap");
    let measure = |name: &str, kills, config, one| measure(&program, &tap, (name, kills), config, one);
    println!("| guest | kills | median ms | p99 ms | worst ms | uncertain |\n|---|---|---|---|---|---|");
    measure("small, idle when the worker is killed", kills, Config::default(), idle);
    measure("small, 64-byte frames as fast as they go", kills, Config::default(), loaded);
    for gib in SIZES {
        let memory = Memory::single(gib * GIB);
        let config = Config { memory: Some(memory), ..Config::default() };
        measure(&format!("{gib} GiB on 4 KiB pages, all touched"), FEW, config, touched::<PAGE>);
    }
    for gib in SIZES {
        let Some(_pages) = HugePages::set_aside(gib * GIB / HUGE) else {
            println!("| {gib} GiB on huge pages: the host has not so many | | | | | |");
            continue;
        };
        let memory = Memory::single(gib * GIB).huge();
        let config = Config { memory: Some(memory), ..Config::default() };
        measure(&format!("{gib} GiB on 2 MiB pages, all touched"), FEW, config, touched::<HUGE>);
    }
}

/// Kills workers, and prints a row of the table.
fn measure(
    program: &Path,
    tap: &str,
    (name, kills): (&str, u64),
    config: Config,
    one: fn(&Vmflow, &mut Device) -> Duration,
) {
    let vmflow = Vmflow::start(program, &[tap.to_owned()], "", &[]).expect("vmflow starts");
    let config = Config { patience: PATIENCE, ..config };
    let mut device = Device::connect(&vmflow.socket(0), config).expect("vmflow accepts a driver");
    wait_for_carrier(tap).expect("the tap is up");
    let mut times: Vec<Duration> = (0..kills).map(|_| one(&vmflow, &mut device)).collect();
    times.sort();
    let port = vmflow.ports().expect("vmflow answers").remove(0);
    assert_eq!((port.worker_restarts, port.connections), (kills, 1), "each kill is one death, and no more");
    let ms = |time: Option<&Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e3);
    println!(
        "| {name} | {kills} | {:.2} | {:.2} | {:.2} | {} |",
        ms(times.get(times.len() / 2)),
        ms(times.get(times.len() * 99 / 100)),
        ms(times.last()),
        port.uncertain,
    );
}

fn kill(vmflow: &Vmflow) -> Instant {
    let worker = Pid::from_raw(vmflow.worker().expect("there is one").cast_signed()).expect("a process");
    let now = Instant::now();
    kill_process(worker, Signal::KILL).expect("it lives");
    now
}

/// Everything is quiet; the frame is sent right after the kill.
fn idle(vmflow: &Vmflow, device: &mut Device) -> Duration {
    let transmit = &mut device.first().transmit;
    let send = |transmit: &mut vmflow_driver::transmit::Transmitter| {
        let frame = [0_u8; 64];
        transmit.send(&frame, &VnetHeader::default(), Layout::Single).expect("the ring has room");
        transmit.drain(PATIENCE).expect("the frame is sent");
    };
    send(transmit);
    let killed = kill(vmflow);
    send(transmit);
    killed.elapsed()
}

/// The longest time without a frame after a kill under load.
fn loaded(vmflow: &Vmflow, device: &mut Device) -> Duration {
    const BEFORE: u64 = 2000;
    /// So many frames after the kill, of which the dead worker can have sent but a ring full.
    const AFTER: u64 = 4000;
    let transmit = &mut device.first().transmit;
    let mut longest = Duration::ZERO;
    let (mut last, mut killed) = (Instant::now(), None);
    let goal = transmit.done() + BEFORE;
    while transmit.done() < goal + AFTER {
        while transmit.queue.free() > 0 {
            transmit.add(&[0; 64], &VnetHeader::default(), Layout::Single).expect("the ring has room");
        }
        transmit.flush().expect("kick");
        let came = transmit.reclaim().expect("the used ring is sound") > 0;
        if came {
            let now = Instant::now();
            if killed.is_some() {
                longest = longest.max(now - last);
            }
            last = now;
        }
        if killed.is_none() && transmit.done() >= goal {
            killed = Some(kill(vmflow));
        }
        assert!(last.elapsed() < PATIENCE, "nothing is sent any more");
    }
    transmit.drain(PATIENCE).expect("all is sent");
    longest
}

/// As [`idle`], after the worker has sent a frame from each page of guest memory.
fn touched<const STEP: u64>(vmflow: &Vmflow, device: &mut Device) -> Duration {
    let memory = device.memory.regions()[0].span.size;
    let transmit = &mut device.first().transmit;
    for page in 0..memory / STEP {
        // The rings and buffers of the driver are at the beginning: a page of them is a frame like any other.
        let chain = [Buffer { addr: page * STEP, len: CHAIN, writable: false }];
        while transmit.add_chain(&chain, false).is_err() {
            transmit.flush().expect("kick");
            transmit.reclaim().expect("the used ring is sound");
        }
    }
    transmit.flush().expect("kick");
    transmit.drain(PATIENCE).expect("all is sent");
    idle(vmflow, device)
}

/// Huge pages that the host keeps for us, until this is dropped.
struct HugePages(u64);

impl HugePages {
    /// Some more than a guest needs.
    fn set_aside(pages: u64) -> Option<Self> {
        let read = || fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse::<u64>().ok();
        let before = Self(read()?);
        let wanted = before.0 + pages;
        fs::write(NR_HUGEPAGES, wanted.to_string()).ok()?;
        (read()? >= wanted).then_some(before)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, self.0.to_string());
    }
}
