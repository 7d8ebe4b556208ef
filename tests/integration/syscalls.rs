//! The system calls of a worker under load, as `strace` sees them: the tap's and the notifications', and no other.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    process::{Child, ChildStderr, Command, Stdio},
};

use vmflow_driver::net::Config;

use crate::{
    harness::wait_for,
    notify::{BATCH, Wish, connect, receive, send},
    rig::Rig,
};

/// Batches each way.
const BATCHES: u64 = 50;
/// How the threads that serve queues are called.
const QUEUE_THREAD: &str = "vring_worker";
const TAP: &str = "/dev/net/tun";
const EVENT: &str = "anon_inode:[eventfd]";
const EVENT_LOOP: &str = "anon_inode:[eventpoll]";

/// How often each call was made, by its name and the file that it was for.
type Calls = BTreeMap<(String, String), u64>;

/// A process that is being looked at.
struct Traced {
    strace: Child,
    /// Open until it has ended: it says goodbye.
    _said: BufReader<ChildStderr>,
    directory: tempfile::TempDir,
}

impl Traced {
    /// Begins; all threads of the process are attached when this returns.
    fn begin(pid: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut strace = Command::new("strace")
            .args(["-f", "-y", "-s", "0", "-p", &pid.to_string(), "-o"])
            .arg(directory.path().join("trace"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(strace.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "{line}");
        Self { strace, _said: said, directory }
    }

    /// Ends; gives the calls of each thread.
    fn end(mut self) -> BTreeMap<u32, Calls> {
        let pid = rustix::process::Pid::from_child(&self.strace);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        wait_for("strace to end", || self.strace.try_wait().unwrap());
        let mut threads = BTreeMap::<_, Calls>::new();
        for line in fs::read_to_string(self.directory.path().join("trace")).unwrap().lines() {
            if let Some((thread, call)) = call(line) {
                *threads.entry(thread).or_default().entry(call).or_default() += 1;
            }
        }
        threads
    }
}

/// `PID NAME(FD<FILE>, ...` is the beginning of a call; other lines are its end, or a signal.
fn call(line: &str) -> Option<(u32, (String, String))> {
    let (thread, rest) = line.trim_start().split_once(' ')?;
    let (name, arguments) = rest.trim_start().split_once('(')?;
    if !name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_') {
        return None;
    }
    let first = arguments.split([',', ')']).next()?;
    let file = first.split_once('<').map_or("", |(_, file)| file.trim_end_matches('>'));
    Some((thread.parse().ok()?, (name.to_owned(), file.to_owned())))
}

/// What the thread that serves the queues calls during `load`; the other threads of the worker call nothing.
fn calls_during(worker: u32, load: impl FnOnce()) -> Calls {
    let traced = Traced::begin(worker);
    load();
    let mut threads = traced.end();
    let serves = |thread: &u32| {
        let name = fs::read_to_string(format!("/proc/{worker}/task/{thread}/comm")).unwrap();
        name.trim_end() == QUEUE_THREAD
    };
    let thread = threads.keys().copied().find(serves).expect("a thread that serves queues");
    let calls = threads.remove(&thread).unwrap();
    for (thread, calls) in threads {
        assert!(calls.values().sum::<u64>() <= 1, "thread {thread} does not just wait: {calls:?}");
    }
    calls
}

/// How often each of these calls was made; there may be no other.
fn only<const N: usize>(calls: &Calls, known: [(&str, &str); N]) -> [u64; N] {
    let known = known.map(|(name, file)| (name.to_owned(), file.to_owned()));
    let others: Vec<_> = calls.keys().filter(|call| !known.contains(call)).collect();
    assert!(others.is_empty(), "{others:?} among {calls:?}");
    known.map(|call| calls.get(&call).copied().unwrap_or(0))
}

#[test]
fn a_worker_calls_the_kernel_for_taps_and_notifications_only_and_for_those_no_more_than_it_must() {
    let rig = Rig::one("");
    let mut device = connect(&rig, Config::default());
    let [worker] = rig.vmflow.processes("vmf-w")[..] else { panic!("not one worker") };
    receive(&rig, &mut device, Wish::After(BATCH));
    let known = [
        ("epoll_wait", EVENT_LOOP),
        ("read", EVENT),
        ("write", EVENT),
        ("read", TAP),
        ("write", TAP),
        ("epoll_ctl", EVENT_LOOP),
    ];
    let frames = BATCHES * u64::from(BATCH);

    let calls = calls_during(worker, || {
        for _ in 0..BATCHES {
            send(&mut device, BATCH, Wish::After(BATCH));
        }
    });
    let [waits, kicks, signals, reads, writes, listens] = only(&calls, known);
    assert_eq!((writes, listens), (frames, 0), "{calls:?}");
    assert!(kicks <= BATCHES && signals <= BATCHES, "{calls:?}");
    assert!(waits <= 2 * BATCHES + 1 && reads <= waits, "{calls:?}");

    let calls = calls_during(worker, || {
        for _ in 0..BATCHES {
            receive(&rig, &mut device, Wish::After(BATCH));
        }
    });
    let [waits, kicks, signals, reads, writes, listens] = only(&calls, known);
    assert_eq!(writes, 0, "{calls:?}");
    assert!(kicks <= BATCHES, "{calls:?}");
    // Frames that come to the tap while the guest has no buffer wake nobody, but for the first of all.
    assert!(waits <= 2 * BATCHES + 2 && signals <= BATCHES && listens <= 1, "{calls:?}");
    assert!((frames..=frames + BATCHES).contains(&reads), "{calls:?}");
    while rig.wire().try_receive().is_some() {}
    rig.check(0, &device, 0);
}
