//! Processes: started on chosen processors, listened to, watched through /proc, ended.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use crate::PATIENCE;

/// Lines of a process that are worth a place in an error.
const LAST_WORDS: usize = 3;
/// How long a process may take to end when it is asked to.
const END: Duration = Duration::from_secs(10);

/// A process of ours; ended when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    /// Some programs end as soon as this is closed.
    input: ChildStdin,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Process {
    /// Starts it on these processors; no processors: on any.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, command: &mut Command, cpus: &[usize]) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = on(cpus, || command.spawn())?.with_context(|| format!("{name} cannot be started"))?;
        let (sender, lines) = channel();
        let piped = || anyhow!("{name} has no pipes");
        listen(child.stdout.take().ok_or_else(piped)?, sender.clone());
        listen(child.stderr.take().ok_or_else(piped)?, sender);
        let input = child.stdin.take().ok_or_else(piped)?;
        Ok(Self { child, name: name.into(), input, lines, said: Vec::new() })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    /// When it has closed it.
    pub fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}").with_context(|| format!("{} listens no more", self.name))
    }

    /// Waits for a line with these words, and returns it.
    ///
    /// # Errors
    /// When it ends or says nothing of that kind in time; its last words are in the error.
    pub fn wait_for(&mut self, words: &str) -> Result<String> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(words) => return Ok(line),
                Ok(line) => self.said.push(line),
                Err(RecvTimeoutError::Disconnected) => bail!("{}", self.last_words("ended")),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{}", self.last_words(&format!("did not say \"{words}\" in {PATIENCE:?}")));
                }
            }
        }
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// It has; its last words are in the error.
    pub fn must_live(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            _ => bail!("{}", self.last_words("ended")),
        }
    }

    /// What it did, and what it said before.
    fn last_words(&mut self, did: &str) -> String {
        // The pipes of one that has ended are at their end soon.
        while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(100)) {
            self.said.push(line);
        }
        let from = self.said.len().saturating_sub(LAST_WORDS);
        format!("{} {did}: {}", self.name, self.said[from..].join(" / "))
    }

    /// Waits for its end.
    fn ended_within(&mut self, time: Duration) -> bool {
        let fd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty());
        let time = Timespec::try_from(time).ok();
        let ended = fd.is_ok_and(|fd| poll(&mut [PollFd::new(&fd, PollFlags::IN)], time.as_ref()) == Ok(1));
        ended && self.child.try_wait().is_ok_and(|status| status.is_some())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // What fails here has ended by itself.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        if !self.ended_within(END) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

fn listen(from: impl Read + Send + 'static, to: Sender<String>) {
    std::thread::spawn(move || {
        // Ends with the pipe, or when nobody listens any more.
        BufReader::new(from).lines().map_while(Result::ok).try_for_each(|line| to.send(line))
    });
}

/// Runs a command that must succeed; gives what it printed.
///
/// # Errors
/// What it said when it failed.
pub fn must(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !output.status.success() {
        let program = Path::new(command.get_program()).display().to_string();
        let said = [text(&output.stderr), text(&output.stdout)].concat();
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        bail!("{program} {}: {} {said}", words.join(" "), output.status);
    }
    Ok(text(&output.stdout))
}

/// Does something that starts processes or threads, which then run on these processors.
///
/// # Errors
/// When there are no such processors.
pub fn on<T>(cpus: &[usize], work: impl FnOnce() -> T) -> Result<T> {
    let before = sched_getaffinity(None)?;
    pin(cpus)?;
    let done = work();
    sched_setaffinity(None, &before)?;
    Ok(done)
}

/// Runs this thread on these processors; none: on any.
///
/// # Errors
/// When there are no such processors.
pub fn pin(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    let all: Vec<usize> = (0..CpuSet::MAX_CPU).collect();
    for cpu in if cpus.is_empty() { &all } else { cpus } {
        set.set(*cpu);
    }
    sched_setaffinity(None, &set).with_context(|| format!("this machine has no processors {cpus:?}"))
}

/// A process and all below it.
#[must_use]
pub fn tree(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> =
        children.flat_map(|text| text.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    std::iter::once(pid).chain(children.into_iter().flat_map(tree)).collect()
}

/// The kernel's threads that go on with frames where a processor has too many of them at once.
#[must_use]
pub fn softirq_threads() -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let named = processes.filter(|process| {
        fs::read_to_string(process.path().join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/"))
    });
    named.filter_map(|process| process.file_name().to_str()?.parse().ok()).collect()
}

/// What processes have used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// ns of CPU.
    pub cpu: u64,
    /// How often their threads went to sleep, which is how often they were woken up.
    pub sleeps: u64,
}

/// What all threads of these processes have used. Ticks (utime, stime) would under-count light load.
#[must_use]
pub fn usage(pids: &[u32]) -> Usage {
    let mut usage = Usage::default();
    let tasks = pids.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task"))).flatten().flatten();
    for task in tasks {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        usage.cpu += first_number(&read("schedstat"));
        usage.sleeps += field(&read("status"), "voluntary_ctxt_switches:");
    }
    usage
}

/// KiB that these processes held at most (`VmHWM`), guest memory that they touched included.
#[must_use]
pub fn peak(pids: &[u32]) -> u64 {
    let status = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    pids.iter().map(|pid| field(&status(pid), "VmHWM:")).sum()
}

/// How often this thread went to sleep.
#[must_use]
pub fn own_sleeps() -> u64 {
    field(&fs::read_to_string("/proc/thread-self/status").unwrap_or_default(), "voluntary_ctxt_switches:")
}

/// ns during which any processor was busy, or taken away from this machine, since it booted.
#[must_use]
pub fn busy() -> u64 {
    /// A tick of /proc/stat is 1/100 s (`USER_HZ`).
    const TICK: u64 = 10_000_000;
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks: Vec<u64> =
        text.lines().next().unwrap_or_default().split_whitespace().flat_map(str::parse).collect();
    // user nice system idle iowait irq softirq steal
    let idle = ticks.iter().skip(3).take(2).sum::<u64>();
    (ticks.iter().take(8).sum::<u64>() - idle) * TICK
}

fn first_number(text: &str) -> u64 {
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
}

fn field(text: &str, name: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix(name)).map_or(0, first_number)
}
