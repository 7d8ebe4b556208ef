//! The test bed: the network of `net-up`, a running vmflow, guests of `run-guest`, and the comparison of counters.

use std::{
    cell::{Ref, RefCell},
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::Value;
use vmflow::ledger::Totals;

use crate::harness::{PATIENCE, Setup, Vmflow, json, unique};

/// Where guests find the server of `net-up`.
pub const SERVER: &str = "198.51.100.1";
/// The server's iperf3.
pub const IPERF_PORT: u16 = 5201;
/// The address of every guest.
pub const GUEST: &str = "10.0.0.2";
/// Their gateway: the tap.
pub const GATEWAY: &str = "10.0.0.1";
const MIB: u64 = 1 << 20;

/// One bed at a time: the machine may have two cores only.
static TURN: Mutex<()> = Mutex::new(());

/// Waits until no other test has a bed; the next one waits until the guard is dropped.
pub fn take_turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often a state is looked at: each look starts processes.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Tries until `state` gives something; what it said last is in the failure.
pub fn settle<T>(what: &str, mut state: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match state() {
            Ok(value) => return value,
            Err(why) => assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain for {what}: {why}"),
        }
        std::thread::park_timeout(LOOK_AGAIN);
    }
}

/// One of the scripts beside the tests.
pub fn script(name: &str) -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu-scripts").join(name))
}

pub fn output_of(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Runs a command that must succeed; gives what it printed.
pub fn must(command: &mut Command) -> String {
    let output = output_of(command);
    let [out, err] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out
}

/// A VM of the bed: its name, and lines of its configuration.
#[derive(Clone, Copy, Default)]
pub struct Vm {
    pub name: &'static str,
    /// Lines of the VM.
    pub own: &'static str,
    /// Lines of its port.
    pub port: &'static str,
    /// It has a network and nothing more: what vmflow is told about it is not the bed's.
    pub network_only: bool,
}

/// A VM with nothing special.
pub const WEB1: Vm = Vm { name: "web1", own: "", port: "", network_only: false };
/// Another one.
pub const WEB2: Vm = Vm { name: "web2", ..WEB1 };

/// Network, vmflow and servers; guests end with it.
pub struct Bed {
    prefix: String,
    vms: Vec<Vm>,
    setup: Setup,
    vmflow: RefCell<Option<Vmflow>>,
    servers: RefCell<Vec<Child>>,
    _turn: MutexGuard<'static, ()>,
}

impl Bed {
    pub fn new(vms: &[Vm]) -> Self {
        let bed = Self::without_vmflow(vms);
        bed.start_vmflow();
        bed
    }

    /// Everything but vmflow, which is to be started.
    pub fn without_vmflow(vms: &[Vm]) -> Self {
        assert!(rustix::process::geteuid().is_root(), "the tests with guests must run as root");
        let turn = take_turn();
        let prefix = unique("vq").replace('-', "_");
        must(script("net-up").arg(&prefix).args(vms.iter().map(|vm| vm.name)));
        let mut setup = Setup::new();
        for Vm { name, own, port, .. } in vms.iter().filter(|vm| !vm.network_only) {
            let socket = setup.socket(name).display().to_string();
            setup = setup.with(&format!(
                "[[vm]]\nname = \"{name}\"\n{own}\n[[vm.port]]\nsocket = \"{socket}\"\n\
                 tap = \"vmf-{name}\"\nnetns = \"{prefix}-{name}\"\n{port}"
            ));
        }
        let (vmflow, servers) = (RefCell::default(), RefCell::default());
        Self { prefix, vms: vms.to_vec(), setup, vmflow, servers, _turn: turn }
    }

    /// Says more about the vmflow that is to be started.
    pub fn configure(&mut self, more: impl FnOnce(Setup) -> Setup) {
        self.setup = more(self.setup.clone());
    }

    pub fn start_vmflow(&self) {
        *self.vmflow.borrow_mut() = Some(self.setup.start());
        for vm in self.vms.iter().filter(|vm| !vm.network_only) {
            self.bring_up_tap(vm.name);
        }
    }

    /// Waits for a VM's tap and makes it the VM's gateway.
    pub fn bring_up_tap(&self, vm: &str) {
        must(script("net-up").args(["--tap", &self.prefix, vm, &format!("vmf-{vm}")]));
    }

    /// The network namespace of a VM.
    pub fn netns(&self, vm: &str) -> String {
        format!("{}-{vm}", self.prefix)
    }

    pub fn stop_vmflow(&self) {
        let vmflow = self.vmflow.borrow_mut().take().unwrap();
        vmflow.stop();
    }

    pub fn vmflow(&self) -> Ref<'_, Vmflow> {
        Ref::map(self.vmflow.borrow(), |vmflow| vmflow.as_ref().unwrap())
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.setup.socket(name)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.setup.directory.path().join(name)
    }

    /// A command in one of the namespaces: `srv`, `nat` or a VM's.
    pub fn inside(&self, place: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}-{place}", self.prefix), program]);
        command
    }

    /// Starts a program in one of the namespaces; it is ended with the bed.
    fn start_inside(&self, place: &str, program: &str, arguments: &[&str]) {
        let mut command = self.inside(place, program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.servers.borrow_mut().push(command.spawn().unwrap());
    }

    /// Starts a DHCP server behind a VM's tap, which gives its guest one address: this one.
    pub fn serve_dhcp(&self, vm: &str, address: &str) {
        let leases = self.file("dhcp-leases").display().to_string();
        let options = [
            format!("--interface=vmf-{vm}"),
            format!("--dhcp-range={address},{address},255.255.255.0,1h"),
            format!("--dhcp-option=option:router,{GATEWAY}"),
            format!("--dhcp-leasefile={leases}"),
        ];
        // No file of this machine's is read, none is written; no name service; no pings of its own.
        let alone = ["--keep-in-foreground", "--conf-file=", "--pid-file=", "--port=0", "--user=root"];
        let server = ["--bind-interfaces", "--dhcp-authoritative", "--no-ping"];
        let options: Vec<_> = options.iter().map(String::as_str).chain(alone).chain(server).collect();
        self.start_inside(vm, "dnsmasq", &options);
        settle("the DHCP server", || {
            let sockets = must(self.inside(vm, "ss").args(["-Hlun", "sport = 67"]));
            if sockets.is_empty() { Err("nothing listens at port 67".into()) } else { Ok(()) }
        });
    }

    /// Starts a server, waits until it listens at a TCP port.
    pub fn serve(&self, port: u16, program: &str, arguments: &[&str]) {
        self.start_inside("srv", program, arguments);
        let filter = format!("sport = {port}");
        settle("the server", || {
            let listeners = must(self.inside("srv", "ss").args(["-Hltn", &filter]));
            if listeners.is_empty() { Err(format!("nothing listens at {port}")) } else { Ok(()) }
        });
    }

    pub fn serve_iperf(&self, port: u16) {
        self.serve(port, "iperf3", &["--server", "--port", &port.to_string()]);
    }

    /// iperf3 serves one client at a time: behind the taps, the second guest is taken to a server of its own. It asks
    /// for the same address and port as the first.
    pub fn take_second_guest_to(&self, port: u16) {
        let rules = format!(
            "table ip second {{ chain prerouting {{ type nat hook prerouting priority dstnat; \
             iifname \"vm1\" tcp dport {IPERF_PORT} dnat to {SERVER}:{port}; }}; }};"
        );
        must(self.inside("nat", "nft").arg(rules));
    }

    /// Counters of a VM's tap.
    pub fn tap(&self, vm: &str) -> Witness {
        let of = format!("/sys/class/net/vmf-{vm}/statistics");
        // What the tap receives, the guest has transmitted.
        let names = ["rx_packets", "rx_bytes", "tx_packets", "tx_bytes"].map(|name| format!("{of}/{name}"));
        Witness::parse(&must(self.inside(vm, "cat").args(names)))
    }

    /// A guest's folder, see `run-guest`.
    pub fn guest(&self, vm: &str) -> PathBuf {
        self.guests().join(vm)
    }

    fn guests(&self) -> PathBuf {
        self.file("guests")
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // First the guests: no more traffic. What does not work here is said by what comes next.
        for vm in &self.vms {
            if self.guests().join(vm.name).exists() {
                if std::thread::panicking() {
                    let log = output_of(
                        script("run-guest").env("VMFLOW_RUN", self.guests()).args(["log", vm.name]),
                    );
                    eprintln!("guest {}:\n{}", vm.name, String::from_utf8_lossy(&log.stdout));
                }
                let _ =
                    output_of(script("run-guest").env("VMFLOW_RUN", self.guests()).args(["kill", vm.name]));
            }
        }
        for server in self.servers.get_mut() {
            let _ = server.kill();
            let _ = server.wait();
        }
        self.vmflow.get_mut().take();
        let _ = output_of(script("net-down").arg(&self.prefix));
    }
}

/// A running guest.
#[derive(Clone, Copy)]
pub struct Guest<'b> {
    pub bed: &'b Bed,
    pub name: &'b str,
}

impl<'b> Guest<'b> {
    /// Starts it and waits until it answers.
    pub fn start(bed: &'b Bed, name: &'b str, options: &[&str]) -> Self {
        Self::launch(bed, name, options);
        bed.vmflow().wait_connected(name, true);
        Self { bed, name }
    }

    /// Starts two at once.
    pub fn start_both(bed: &'b Bed, names: [&'b str; 2]) -> [Self; 2] {
        std::thread::scope(|scope| {
            for mut command in names.map(|name| Self::command_to_start(bed, name, &[])) {
                scope.spawn(move || eprintln!("{}", started(&mut command)));
            }
        });
        names.map(|name| Self { bed, name })
    }

    /// Takes over a guest that something else has started, as this process; waits until it answers.
    pub fn adopt(bed: &'b Bed, name: &'b str, qemu: &str) -> Self {
        let guest = Self { bed, name };
        must(&mut guest.command(&["adopt", qemu]));
        bed.vmflow().wait_connected(name, true);
        guest
    }

    fn command_to_start(bed: &Bed, name: &str, options: &[&str]) -> Command {
        let mut command = script("run-guest");
        command.env("VMFLOW_RUN", bed.guests()).args(["start", name, "--socket"]).arg(bed.socket(name));
        command.args(["--ip", &format!("{GUEST}/24"), "--gw", GATEWAY]).args(options);
        command
    }

    fn launch(bed: &Bed, name: &str, options: &[&str]) {
        eprintln!("{}", started(&mut Self::command_to_start(bed, name, options)));
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = script("run-guest");
        command.env("VMFLOW_RUN", self.bed.guests()).args([words[0], self.name]).args(&words[1..]);
        command
    }

    /// Runs a command in it that must succeed; gives what it printed.
    pub fn run(&self, command: &str) -> String {
        must(&mut self.command(&["exec", command]))
    }

    pub fn reboot(&self) {
        must(&mut self.command(&["reboot"]));
    }

    /// Ends its VMM at once.
    pub fn kill(&self) {
        must(&mut self.command(&["kill"]));
    }

    /// The guest's own counters of its interface.
    pub fn counters(&self) -> Witness {
        Witness::parse(
            &self.run("cd /sys/class/net/eth0/statistics; cat tx_packets tx_bytes rx_packets rx_bytes"),
        )
    }

    /// Sends pings; gives how many answers came.
    pub fn ping(&self, count: u32) -> u32 {
        // -A: the next one follows the answer.
        let said = self.run(&format!("ping -A -c {count} -W 1 {SERVER} || true"));
        // "5 packets transmitted, 5 packets received, .." by busybox; others leave the second "packets" out.
        let received = said.split_once(" transmitted, ").and_then(|(_, rest)| rest.split_whitespace().next());
        received.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("ping said: {said}"))
    }

    /// What QEMU itself said so far.
    pub fn qemu_said(&self) -> String {
        fs::read_to_string(self.bed.guests().join(self.name).join("qemu.log")).unwrap()
    }

    /// Its driver leaves the device and takes it again.
    pub fn reload_driver(&self) {
        self.run(
            "cd /sys/bus/virtio/drivers/virtio_net && device=$(ls -d virtio[0-9]*) && echo $device >unbind \
             && echo $device >bind && configure-network",
        );
    }

    /// Waits until the server answers again.
    pub fn wait_for_answer(&self) {
        settle("an answer to a ping", || if self.ping(1) == 1 { Ok(()) } else { Err("none came".into()) });
    }

    /// So much by iperf3, in units of 2^20 bytes; `words` are more of its options.
    pub fn iperf(&self, mib: u64, words: &str) {
        let text =
            self.run(&format!("iperf3 --client {SERVER} --port {IPERF_PORT} --json --bytes {mib}M {words}"));
        let result: Value = serde_json::from_str(&text).unwrap();
        let bytes = |what: &str| json(&result, &format!("/end/{what}/bytes")).as_u64().unwrap();
        assert!(bytes("sum_sent") >= mib * MIB, "sent: {text}");
        // The receiver's count ends with the test's time, when some may still be on their way.
        assert!(bytes("sum_received") >= mib * MIB / 2, "received: {text}");
    }

    /// Starts iperf3 in the guest and does not wait for its end; `words` say how much and from where.
    pub fn start_iperf(&self, words: &str) -> Child {
        let iperf = format!("iperf3 --client {SERVER} --port {IPERF_PORT} {words}");
        self.command(&["exec", &iperf]).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
    }

    /// Pings, and TCP both ways; then all counts agree.
    pub fn talk_and_agree(&self, before: &Seen) -> Seen {
        self.talk_and_agree_since(before.by_guest())
    }

    /// The same, where only the numbers of then are known.
    pub fn talk_and_agree_since(&self, before: Witness) -> Seen {
        const PINGS: u32 = 5;
        const EACH_WAY_MIB: u64 = 8;
        assert_eq!(self.ping(PINGS), PINGS, "answers to pings");
        self.iperf(EACH_WAY_MIB, "");
        self.iperf(EACH_WAY_MIB, "--reverse");
        self.agree_since(before)
    }

    /// What vmflow had seen when the guest's driver started: what it has seen by now, less what the guest counts. For
    /// a guest that sends something when it goes down and when it comes up.
    pub fn at_its_start(&self) -> Witness {
        settle("a guest that is quiet", || {
            let (before, guest, after) =
                (Seen::of(self.bed, self.name), self.counters(), Seen::of(self.bed, self.name));
            if before == after { Ok(before.by_guest().since(guest)) } else { Err(format!("{after:?}")) }
        })
    }

    /// Waits until the guest is quiet and until vmflow, the guest and the tap have counted the same. The guest counts
    /// since its driver started: `before` is what vmflow had seen then.
    pub fn agree(&self, before: &Seen) -> Seen {
        self.agree_since(before.by_guest())
    }

    fn agree_since(&self, before: Witness) -> Seen {
        settle("equal counts of vmflow, the guest and the tap", || {
            let seen = Seen::of(self.bed, self.name);
            let (guest, tap) = (self.counters(), self.bed.tap(self.name));
            if seen != Seen::of(self.bed, self.name) {
                return Err(format!("the guest is not quiet: {seen:?}"));
            }
            let differs = |who: &str, theirs: Witness, ours: Witness| {
                if theirs == ours { Ok(()) } else { Err(format!("{who} {theirs:?}, vmflow {ours:?}")) }
            };
            differs("guest", guest, seen.by_guest().since(before))?;
            // What a dead worker left unknown happened at the tap or not: no more than that.
            let unknown = tap.frames() - seen.by_tap().frames();
            if unknown > seen.uncertain || unknown == 0 {
                differs("tap", tap, seen.by_tap())?;
            }
            Ok(seen)
        })
    }
}

/// Starts a guest; gives the line that says on which accelerator.
fn started(command: &mut Command) -> String {
    let output = output_of(command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    said.trim_end().to_owned()
}

/// Frames and bytes that someone saw, in the guest's directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Witness {
    pub transmitted: (u64, u64),
    pub received: (u64, u64),
}

impl Witness {
    fn parse(text: &str) -> Self {
        let numbers: Vec<u64> = text.split_whitespace().map(|n| n.parse().unwrap()).collect();
        let [tx, tx_bytes, rx, rx_bytes] = numbers[..] else { panic!("not four counters: {text}") };
        Self { transmitted: (tx, tx_bytes), received: (rx, rx_bytes) }
    }

    fn frames(&self) -> u64 {
        self.transmitted.0 + self.received.0
    }

    pub fn since(self, before: Self) -> Self {
        let minus = |a: (u64, u64), b: (u64, u64)| (a.0 - b.0, a.1 - b.1);
        Self {
            transmitted: minus(self.transmitted, before.transmitted),
            received: minus(self.received, before.received),
        }
    }
}

/// What vmflow counted for one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub transmit: Totals,
    pub receive: Totals,
    pub uncertain: u64,
}

impl Seen {
    /// The ledger's equation must hold, whenever one looks.
    pub fn of(bed: &Bed, vm: &str) -> Self {
        let (transmit, receive) = bed.vmflow().totals(vm);
        Self { transmit, receive, uncertain: bed.vmflow().port(vm).uncertain }
    }

    /// What the guest must have counted: all that it sent, and what it was given.
    pub fn by_guest(&self) -> Witness {
        let sent = &self.transmit;
        Witness {
            transmitted: (sent.chains, sent.normal.bytes + sent.suspect.bytes),
            received: (self.receive.passed.frames, self.receive.passed.bytes),
        }
    }

    /// What the tap must have counted.
    fn by_tap(&self) -> Witness {
        Witness {
            transmitted: (self.transmit.tap_operations, self.transmit.tap_bytes),
            received: (self.receive.tap_operations, self.receive.tap_bytes),
        }
    }

    pub fn dropped(&self) -> u64 {
        self.transmit.dropped_frames() + self.receive.dropped_frames()
    }
}

/// The bytes of a file as `sha256sum` names them.
pub fn sha256(file: &Path) -> String {
    must(Command::new("sha256sum").arg(file)).split_whitespace().next().unwrap().to_owned()
}

/// Bytes that nobody can guess.
pub fn random_file(path: &Path, bytes: u64) {
    let mut random = std::io::Read::take(fs::File::open("/dev/urandom").unwrap(), bytes);
    std::io::copy(&mut random, &mut fs::File::create(path).unwrap()).unwrap();
}
