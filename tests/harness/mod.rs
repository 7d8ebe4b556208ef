//! What the tests of the whole program share: network namespaces, a running vmflow, its numbers.
//!
//! Everything is removed when it is dropped, also when the test fails. Nothing waits for time: only for a state,
//! with a deadline.

#![allow(dead_code, reason = "each test program uses a part")]

mod described;
pub mod harass;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use described::Described;
use serde_json::Value;
use tempfile::TempDir;
use vmflow::{
    ledger::{DropReason, Totals},
    monitor::api::document::{PortStats, Stats},
};

/// How long a state may take to come: long, since the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How often a state is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The program under test.
pub const VMFLOW: &str = env!("CARGO_BIN_EXE_vmflow");

/// True when the full counts are wanted (`qemu-scripts/test --long`).
pub fn long() -> bool {
    std::env::var("VMFLOW_TEST_COUNTS").is_ok_and(|counts| counts == "full")
}

/// One of two counts: the small one, or the full one with `--long`.
pub fn count<T>(small: T, full: T) -> T {
    if long() { full } else { small }
}

/// Waits until `state` gives something.
pub fn wait_for<T>(what: &str, mut state: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = state() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain for {what}");
        std::thread::park_timeout(LOOK_AGAIN);
    }
}

/// Runs a command that must succeed; gives what it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// A name that no other test of this machine uses now.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}{}-{}", std::process::id() % 100_000, NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A network namespace of this test's own, without IPv6 (whose solicitations nobody asked for).
pub struct Netns(pub String);

impl Netns {
    pub fn new() -> Self {
        let netns = Self(unique("vft"));
        run("ip", &["netns", "add", &netns.0]);
        for scope in ["all", "default"] {
            netns.run("sysctl", &["-qw", &format!("net.ipv6.conf.{scope}.disable_ipv6=1")]);
        }
        netns
    }

    /// Runs a command in it.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        run("ip", &[&["netns", "exec", &self.0, program][..], arguments].concat())
    }

    /// A counter of an interface in it.
    pub fn counter(&self, interface: &str, name: &str) -> u64 {
        let path = format!("/sys/class/net/{interface}/statistics/{name}");
        self.run("cat", &[&path]).trim().parse().unwrap()
    }

    /// Runs `work` on a thread that is in the namespace.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = fs::File::open(format!("/run/netns/{}", self.0)).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                use std::os::fd::AsFd;
                let network = rustix::thread::LinkNameSpaceType::Network;
                rustix::thread::move_into_link_name_space(file.as_fd(), Some(network)).unwrap();
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

/// A running `vmflow serve`, with its sockets and state in a directory of its own.
pub struct Vmflow {
    child: Child,
    directory: Arc<TempDir>,
    log: Arc<Log>,
}

/// What the program said so far, line by line.
#[derive(Default)]
pub struct Log {
    lines: Mutex<Vec<String>>,
    more: Condvar,
}

impl Log {
    fn follow(self: &Arc<Self>, from: impl std::io::Read + Send + 'static) {
        let log = Arc::clone(self);
        std::thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                log.lines.lock().unwrap().push(line);
                log.more.notify_all();
            }
        });
    }

    pub fn text(&self) -> String {
        self.lines.lock().unwrap().join("\n")
    }

    pub fn count(&self, words: &str) -> usize {
        self.lines.lock().unwrap().iter().filter(|line| line.contains(words)).count()
    }

    /// Waits for a line; false if it has not come in time.
    pub fn wait(&self, words: &str) -> bool {
        let has = |lines: &mut Vec<String>| !lines.iter().any(|line| line.contains(words));
        let lines = self.lines.lock().unwrap();
        let waited = self.more.wait_timeout_while(lines, PATIENCE, has).unwrap();
        !waited.1.timed_out()
    }
}

/// A configuration in the making.
#[derive(Clone)]
pub struct Setup {
    pub directory: Arc<TempDir>,
    text: String,
    /// The command that starts vmflow, if there is one before it.
    before: Vec<String>,
}

impl Setup {
    pub fn new() -> Self {
        let directory = Arc::new(tempfile::Builder::new().prefix("vmflow-").tempdir().unwrap());
        // Front ends of other users must be able to reach the sockets in it.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(directory.path(), open).unwrap();
        let at = directory.path().display();
        let text =
            format!("[daemon]\ncontrol = \"{at}/control.sock\"\nstate = \"{at}/state\"\nnode = \"test\"\n");
        Self { directory, text, before: Vec::new() }
    }

    /// Has another command start vmflow: it must become vmflow, so that its process is vmflow's.
    pub fn started_by(mut self, command: &[String]) -> Self {
        self.before = command.to_vec();
        self
    }

    /// Adds lines as they are.
    pub fn with(mut self, lines: &str) -> Self {
        self.text.push_str(lines);
        self.text.push('\n');
        self
    }

    /// Adds a VM with one port: its tap goes to `netns`; `more` are further lines of the port.
    pub fn vm(self, name: &str, tap: &str, netns: &Netns, more: &str) -> Self {
        let socket = self.socket(name);
        let lines = format!(
            "[[vm]]\nname = \"{name}\"\n[[vm.port]]\nsocket = \"{}\"\ntap = \"{tap}\"\nnetns = \"{}\"\n{more}",
            socket.display(),
            netns.0
        );
        self.with(&lines)
    }

    /// Where a VM's socket is.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.sock"))
    }

    pub fn file(&self) -> PathBuf {
        let path = self.directory.path().join("vmflow.toml");
        fs::write(&path, &self.text).unwrap();
        path
    }

    /// Starts vmflow and waits until it is ready.
    pub fn start(&self) -> Vmflow {
        Vmflow::start(self)
    }
}

impl Vmflow {
    fn start(setup: &Setup) -> Self {
        let words: Vec<_> = setup.before.iter().map(String::as_str).chain([VMFLOW]).collect();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .arg("serve")
            .arg("--config")
            .arg(setup.file())
            .env("VMFLOW_LOG", "vmflow=debug");
        Self::start_as(command, &setup.directory)
    }

    /// Starts a command that is to become ready.
    pub fn start_as(mut command: Command, directory: &Arc<TempDir>) -> Self {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        log.follow(child.stderr.take().unwrap());
        let vmflow = Self { child, directory: Arc::clone(directory), log };
        assert!(vmflow.log.wait("ready: "), "vmflow is not ready:\n{}", vmflow.log.text());
        vmflow
    }

    pub fn log(&self) -> &Log {
        &self.log
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.sock"))
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn control(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    /// Runs a subcommand against it.
    pub fn command(&self, arguments: &[&str]) -> Output {
        Command::new(VMFLOW).args(arguments).arg("--control").arg(self.control()).output().unwrap()
    }

    /// Runs a subcommand that must succeed; gives what it printed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "vmflow {arguments:?}: {text}");
        text
    }

    pub fn stats(&self) -> Stats {
        let text = self.ok(&["stats", "--json"]);
        self.described().check("GET", "/v1/stats", 200, &text);
        serde_json::from_str(&text).unwrap()
    }

    /// How the API describes itself.
    fn described(&self) -> &'static Described {
        static DESCRIBED: OnceLock<Described> = OnceLock::new();
        DESCRIBED.get_or_init(|| {
            let (status, body) = self.exchange("GET", "/v1/openapi.json", "");
            assert_eq!(status, 200, "{body}");
            Described::new(serde_json::from_str(&body).unwrap())
        })
    }

    /// Asks the API through the control socket; the answer must be as it describes itself.
    pub fn api(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let (status, body) = self.exchange(method, path, body);
        self.described().check(method, path, status, &body);
        (status, serde_json::from_str(&body).unwrap())
    }

    fn exchange(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(self.control()).unwrap();
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: vmflow\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all((head + body).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// The first port of a VM.
    pub fn port(&self, vm: &str) -> PortStats {
        let stats = self.stats();
        let vm = stats.vms.into_iter().find(|v| v.name == vm).unwrap();
        vm.ports.into_iter().next().unwrap()
    }

    /// What a VM sent and received; the equation must hold.
    pub fn totals(&self, vm: &str) -> (Totals, Totals) {
        let port = self.port(vm);
        let (transmit, receive) = (Totals::from(&port.transmit), Totals::from(&port.receive));
        assert!(transmit.balances(), "transmit of {vm}: {transmit:?}");
        assert!(receive.balances(), "receive of {vm}: {receive:?}");
        (transmit, receive)
    }

    /// Waits until a front end is connected to the VM's port, or none is.
    pub fn wait_connected(&self, vm: &str, connected: bool) {
        wait_for("the front end", || (self.port(vm).connected == connected).then_some(()));
    }

    /// Processes of this vmflow, by the beginning of their names: `vmf-k` keepers, `vmf-w` workers.
    pub fn processes(&self, prefix: &str) -> Vec<u32> {
        let mut found = Vec::new();
        let mut parents = vec![self.pid()];
        while let Some(parent) = parents.pop() {
            for child in children(parent) {
                parents.push(child);
                if name(child).starts_with(prefix) {
                    found.push(child);
                }
            }
        }
        found
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Kills it, and waits until its keepers and workers, which then end by themselves, are gone too.
    pub fn kill(mut self) {
        let children = self.processes("vmf-");
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let gone = |pid: &u32| !Path::new(&format!("/proc/{pid}")).exists();
        wait_for("the keepers' end", || children.iter().all(gone).then_some(()));
    }

    /// Ends it as a service manager does; gives what it said.
    pub fn stop(mut self) -> String {
        self.signal(rustix::process::Signal::TERM);
        let status = wait_for("the end of vmflow", || self.child.try_wait().unwrap());
        assert!(status.success(), "vmflow ended with {status}:\n{}", self.log.text());
        self.log.text()
    }
}

impl Drop for Vmflow {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            if std::thread::panicking() {
                eprintln!("vmflow said:\n{}", self.log.text());
            }
            // Its keepers end with it.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The processes that a process has started.
pub fn children(parent: u32) -> Vec<u32> {
    let listed = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// A process's name; nothing if it has gone.
pub fn name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// How many frames of a direction were dropped for a reason.
pub fn dropped(totals: &Totals, reason: DropReason) -> u64 {
    totals.dropped[reason.index()]
}

/// A value deep in a JSON document.
pub fn json<'v>(value: &'v Value, pointer: &str) -> &'v Value {
    value.pointer(pointer).unwrap_or_else(|| panic!("{value} lacks {pointer}"))
}
