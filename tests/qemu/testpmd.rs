//! DPDK's `virtio-user`: a front end that shares no code with QEMU, and counts what it sends.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Instant,
};

use crate::{
    bed::{Bed, Seen, WEB1, settle},
    harness::{PATIENCE, count, harass::Harasser, unique},
    pairs::{TWO, wait_attached},
};

/// Its default would not fit into [`MEGABYTES`].
const MBUFS: &str = "--total-num-mbufs=16384";
/// Without huge pages, memory is what it is given here.
const MEGABYTES: &str = "384";

/// A testpmd at its prompt.
struct Testpmd {
    child: Child,
    // It ends as soon as this is closed.
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Testpmd {
    fn start(bed: &Bed, vm: &str, pairs: u16) -> Self {
        let socket = bed.socket(vm).display().to_string();
        let device = format!("net_virtio_user0,path={socket},queues={pairs},queue_size=256");
        let [receive, transmit] = ["rxq", "txq"].map(|queues| format!("--{queues}={pairs}"));
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "dpdk-testpmd", "--no-pci", "--no-huge", "--no-telemetry", "-l", "0,1"]);
        // A name of its own: another testpmd may run on this machine.
        command.args(["--file-prefix", &unique("vmflow")]);
        command.args(["-m", MEGABYTES, "--vdev", &device, "--", "--interactive", "--no-mlockall", MBUFS]);
        command.args([receive, transmit]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, input, lines }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// The next line that holds these words.
    fn line_with(&self, words: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut said = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("testpmd did not say '{words}', but:\n{}", said.join("\n"));
            };
            if line.contains(words) {
                return line;
            }
            said.push(line);
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        if std::thread::panicking() {
            self.lines.iter().for_each(|line| eprintln!("testpmd: {line}"));
        }
        let _ = self.child.wait();
    }
}

/// Lets testpmd send so many frames at least over so many pairs; gives how many it says they were.
fn sent_by_testpmd(bed: &Bed, pairs: u16, wanted: u64) -> (Testpmd, u64) {
    let mut testpmd = Testpmd::start(bed, WEB1.name, pairs);
    testpmd.say("set fwd txonly");
    testpmd.say("start");
    bed.vmflow().wait_connected(WEB1.name, true);
    settle("frames from testpmd", || {
        let sent = Seen::of(bed, WEB1.name).transmit.chains;
        if sent >= wanted { Ok(()) } else { Err(format!("{sent} of {wanted}")) }
    });
    testpmd.say("stop");
    testpmd.line_with("Accumulated forward statistics");
    let line = testpmd.line_with("TX-packets:");
    let counted: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(counted >= wanted, "{line}");
    (testpmd, counted)
}

#[test]
fn every_frame_that_testpmd_counts_is_counted_and_on_the_tap() {
    every_frame_is_counted(&Bed::new(&[WEB1]), 1);
}

#[test]
fn that_is_so_over_two_pairs() {
    let bed = Bed::new(&[TWO]);
    let _testpmd = every_frame_is_counted(&bed, 2);
    wait_attached(&bed, WEB1.name, 2);
}

fn every_frame_is_counted(bed: &Bed, pairs: u16) -> Testpmd {
    let (testpmd, counted) = sent_by_testpmd(bed, pairs, count(100_000, 10_000_000));
    settle("the same count in vmflow and at the tap", || {
        let sent = Seen::of(bed, WEB1.name).transmit;
        let tap = bed.tap(WEB1.name).transmitted;
        let same = sent.chains == counted && sent.passed.frames == counted;
        let at_tap = tap == (sent.tap_operations, sent.tap_bytes) && tap.0 <= counted;
        if same && at_tap { Ok(()) } else { Err(format!("testpmd {counted}, vmflow {sent:?}, tap {tap:?}")) }
    });
    testpmd
}

#[test]
fn testpmd_sends_on_while_workers_are_killed_and_every_frame_is_counted_once() {
    sends_on_while_workers_are_killed(&Bed::new(&[WEB1]), 1);
}

#[test]
fn it_does_so_over_two_pairs() {
    sends_on_while_workers_are_killed(&Bed::new(&[TWO]), 2);
}

fn sends_on_while_workers_are_killed(bed: &Bed, pairs: u16) {
    let harasser = Harasser::of(&bed.vmflow(), WEB1.name);
    let (_testpmd, counted) = sent_by_testpmd(bed, pairs, count(100_000, 5_000_000));
    let kills = harasser.stop();
    settle("the same count in vmflow and, but for what is uncertain, at the tap", || {
        let Seen { transmit: sent, uncertain, .. } = Seen::of(bed, WEB1.name);
        let (frames, _) = bed.tap(WEB1.name).transmitted;
        let same = sent.chains == counted && sent.passed.frames == counted;
        let doubled = frames.checked_sub(sent.tap_operations);
        if same && doubled.is_some_and(|doubled| doubled <= uncertain) {
            println!("{kills} kills: {uncertain} uncertain, {} sent twice", doubled.unwrap());
            return Ok(());
        }
        Err(format!("testpmd {counted}, vmflow {sent:?}, tap {frames}, uncertain {uncertain}"))
    });
    let port = bed.vmflow().port(WEB1.name);
    assert!(kills > 10 && port.worker_restarts == kills, "{kills}: {port:?}");
    assert!(port.uncertain <= 2 * u64::from(pairs) * kills, "{kills}: {port:?}");
    assert_eq!(port.connections, 1);
}
