//! The host's side of the benches: the tap, a packet socket that feeds it, processors and clocks.

#![expect(unsafe_code, reason = "packet sockets and namespaces")]

use std::{
    fs,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::Command,
    time::{Duration, Instant},
};

use rustix::thread::{CpuSet, sched_setaffinity};

/// Moves this process to a network namespace of its own.
pub fn own_network() {
    // SAFETY: the descriptor table is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.expect("root");
    // SAFETY: as above; /sys is mounted anew so that it shows the new namespace.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.expect("root");
    run("mount", &["--make-rprivate", "/"]);
    run("mount", &["-t", "sysfs", "sysfs", "/sys"]);
    run("sysctl", &["-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"]);
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status();
    assert!(status.is_ok_and(|s| s.success()), "{program} {arguments:?} failed");
}

/// Waits for a state.
pub fn wait_for(what: &str, state: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !state() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// A persistent tap whose frames from the guest are dropped at ingress.
pub struct Tap(pub &'static str);

impl Tap {
    pub fn persistent(name: &'static str) -> Self {
        run("ip", &["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"]);
        run("ip", &["link", "set", name, "up", "txqueuelen", "1000"]);
        let rules = format!(
            "add table netdev t; add chain netdev t c {{ type filter hook ingress device {name} priority 0; policy drop; }}"
        );
        run("nft", &[&rules]);
        Self(name)
    }
}

pub fn carrier(name: &str) -> bool {
    fs::read_to_string(format!("/sys/class/net/{name}/carrier")).is_ok_and(|text| text.trim() == "1")
}

/// Runs this thread on one processor.
pub fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).expect("a processor");
}

/// Runs all threads of a process on one processor.
pub fn pin_process(pid: u32, cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    for task in fs::read_dir(format!("/proc/{pid}/task")).expect("a process").flatten() {
        let id = task.file_name().to_string_lossy().parse().unwrap_or_default();
        let _ = sched_setaffinity(rustix::process::Pid::from_raw(id), &set);
    }
}

/// ns of CPU that the threads of a process have used.
pub fn cpu_of_process(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process").flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .sum()
}

/// A process below another one, by the beginning of its name.
pub fn descendant(pid: u32, prefix: &str) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().filter_map(|child| child.parse().ok()).find_map(|child: u32| {
        let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
        if name.starts_with(prefix) { Some(child) } else { descendant(child, prefix) }
    })
}

/// A packet socket on the tap: what it sends waits in the tap's queue.
pub struct Sender(OwnedFd);

impl Sender {
    pub fn on(name: &str) -> Self {
        // SAFETY: a plain system call.
        let number = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        assert!(number >= 0, "a packet socket");
        // SAFETY: the descriptor is new and ours.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        let index = rustix::net::netdevice::name_to_index(&fd, name).expect("the tap");
        // SAFETY: all bytes zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).expect("small");
        address.sll_ifindex = i32::try_from(index).expect("small");
        let size = u32::try_from(size_of_val(&address)).expect("small");
        // SAFETY: the address is a sockaddr_ll of that size.
        assert_eq!(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) }, 0, "bind");
        Self(fd)
    }

    pub fn send(&self, frame: &[u8], times: u16) {
        for _ in 0..times {
            let sent = rustix::net::send(&self.0, frame, rustix::net::SendFlags::empty());
            assert_eq!(sent, Ok(frame.len()), "the tap's queue is full");
        }
    }
}
