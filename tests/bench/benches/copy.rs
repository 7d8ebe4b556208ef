//! From which length on a frame had better stay where it is: all of it copied and written from one place, beside
//! its start copied and the rest written from guest memory.
//!
//! `cargo bench -p vmflow-bench --bench copy [-- ROUNDS]`, as root, in a network namespace of its own. The frames lie about in
//! memory that is larger than the caches, as a guest's do; the tap drops them at its ingress. Both ways run in
//! turn, in one thread; what counts is the ratio, pair by pair.

use std::{io::IoSlice, os::fd::OwnedFd};

use rustix::time::{ClockId, clock_gettime};
use vmflow::path::batch::COPY_PREFIX;
use vmflow_bench::{
    BACKEND_CPU,
    host::{Network, Sink, wait_for_carrier},
    process::pin,
    report::Spread,
};

const HEADER: usize = 12;
const LENGTHS: [usize; 12] = [256, 512, 1024, 1514, 2048, 4096, 9014, 16_384, 24_576, 32_768, 49_152, 65_000];
const MEMORY: usize = 256 << 20;
/// Bytes of one measurement, and the fewest frames.
const BYTES: usize = 64 << 20;

fn main() {
    let rounds = std::env::args().skip(1).find_map(|word| word.parse().ok()).unwrap_or(15);
    let network = Network::own().expect("root");
    let tap = network.tap(Sink::Drop, 1, 0).expect("a tap");
    let fd = vmflow::tap::attach(&tap).expect("the tap is free");
    wait_for_carrier(&tap).expect("the tap is up");
    pin(&[BACKEND_CPU]).expect("a processor");
    let memory = vec![0x88_u8; MEMORY];
    println!(
        "| frame | copied whole, ns | start copied, ns | start / whole | range |\n|---|---|---|---|---|"
    );
    for len in LENGTHS {
        let pairs: Vec<(f64, f64)> =
            (0..rounds).map(|_| (whole(&fd, &memory, len), in_place(&fd, &memory, len))).collect();
        let spread = |figure: fn(&(f64, f64)) -> f64| {
            Spread::of(pairs.iter().map(figure).collect(), rounds).expect("a round")
        };
        let (whole, start) = (spread(|pair| pair.0), spread(|pair| pair.1));
        let Spread { median, low, high, .. } = spread(|pair| pair.1 / pair.0);
        println!(
            "| {len} B | {:.0} | {:.0} | {median:.2} | {low:.2} .. {high:.2} |",
            whole.median, start.median
        );
    }
}

/// Where frames lie: far from each other, in no order that a processor could guess.
fn places(len: usize) -> impl Iterator<Item = usize> {
    let room = MEMORY - len;
    (0..frames(len)).map(move |n| (n * 0x9e37_79b1) % room / 64 * 64)
}

fn frames(len: usize) -> usize {
    (BYTES / len).min(100_000)
}

fn whole(fd: &OwnedFd, memory: &[u8], len: usize) -> f64 {
    let mut hot = vec![0; HEADER + len];
    measured(len, || {
        for place in places(len) {
            hot[HEADER..].copy_from_slice(&memory[place..place + len]);
            assert_eq!(rustix::io::write(fd, &hot), Ok(HEADER + len));
        }
    })
}

fn in_place(fd: &OwnedFd, memory: &[u8], len: usize) -> f64 {
    let start = len.min(COPY_PREFIX);
    let mut hot = vec![0; HEADER + start];
    measured(len, || {
        for place in places(len) {
            hot[HEADER..].copy_from_slice(&memory[place..place + start]);
            let rest = &memory[place + start..place + len];
            assert_eq!(rustix::io::writev(fd, &[IoSlice::new(&hot), IoSlice::new(rest)]), Ok(HEADER + len));
        }
    })
}

/// ns of this thread's CPU time per frame.
fn measured(len: usize, work: impl FnOnce()) -> f64 {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec * 1_000_000_000 + time.tv_nsec
    };
    let begin = now();
    work();
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let (spent, frames) = ((now() - begin) as f64, frames(len) as f64);
    spent / frames
}
