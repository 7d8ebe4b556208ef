//! The host's side: a network namespace of our own, taps and what is behind them, the packet socket that feeds them.
//! All of it goes when this process and those that it started have ended.

#![expect(unsafe_code, reason = "packet sockets and namespaces")]

use std::{
    cell::RefCell,
    collections::HashSet,
    fs,
    io::IoSlice,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use vmflow_driver::vnet::{LEGACY_HEADER_SIZE, VnetHeader};

use crate::{PATIENCE, process::must};

/// The host's address on a tap that has one, its MAC address there, and the guest's.
pub const HOST: [u8; 4] = [10, 0, 0, 2];
const HOST_MAC: &str = "52:54:00:00:00:02";
/// The guest's address.
pub const GUEST: [u8; 4] = [10, 0, 0, 1];
const GUEST_MAC: &str = "52:54:00:00:00:01";
/// The host's address for a guest with a kernel of its own.
pub const GATEWAY: &str = "10.0.1.1";
/// Where a socket waits for what the guest sends.
const DISCARD_PORT: u16 = 9;

/// What is behind a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sink {
    /// Nothing: frames are dropped when they come out of the tap.
    Drop,
    /// A bridge, a veth pair, and at its end nothing.
    Bridge,
    /// The host's own stack, with a UDP socket; what it does not hold is dropped there.
    Socket,
    /// The host's own stack, for a guest with a kernel.
    Gateway,
}

/// The network namespace and what is in it.
#[derive(Debug, Default)]
pub struct Network {
    taps: RefCell<HashSet<String>>,
    sockets: RefCell<Vec<UdpSocket>>,
}

impl Network {
    /// Moves this process to a network namespace of its own. Call it before there are threads.
    ///
    /// # Errors
    /// When we are not root.
    pub fn own() -> Result<Self> {
        use rustix::thread::{UnshareFlags, unshare_unsafe};
        // SAFETY: the descriptor table is not among the flags.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        // SAFETY: as above; /sys is mounted anew so that it shows the new namespace.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        run("mount --make-rprivate /")?;
        run("mount -t sysfs sysfs /sys")?;
        run("ip link set lo up")?;
        run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")?;
        Ok(Self::default())
    }

    /// A persistent tap with something behind it, made when it is first asked for. It is as nobody had had it before.
    ///
    /// # Errors
    /// When a command fails.
    pub fn tap(&self, sink: Sink, pairs: u16, index: u16) -> Result<String> {
        let (kind, queues) = (format!("{sink:?}").to_lowercase(), if pairs > 1 { "q" } else { "" });
        let name = format!("vb{kind}{index}{queues}");
        if self.taps.borrow_mut().insert(name.clone()) {
            let multi = if pairs > 1 { "multi_queue" } else { "" };
            run(&format!("ip tuntap add dev {name} mode tap vnet_hdr {multi}"))?;
            run(&format!("ip link set {name} up txqueuelen 1000"))?;
            self.put_behind(sink, &name)?;
        }
        // Offloads stay as the last one had them; this sets them to none.
        // The last one may still be on its way out.
        wait_for("the tap", || vmflow::tap::attach(&name).map(drop).map_err(|e| e.to_string()))?;
        Ok(name)
    }

    /// Undoes what a backend has done to the tap when it started.
    ///
    /// # Errors
    /// When a command fails.
    pub fn mend(&self, sink: Sink, tap: &str) -> Result<()> {
        if sink == Sink::Socket {
            // Some give it an address of their own; with that goes what the host knows of its neighbours.
            run(&format!("ip link set {tap} address {HOST_MAC}"))?;
            // Nobody asks for it: each frame is one that was measured.
            let guest = Ipv4Addr::from(GUEST);
            run(&format!("ip neighbour replace {guest} lladdr {GUEST_MAC} dev {tap} nud permanent"))?;
        }
        Ok(())
    }

    fn put_behind(&self, sink: Sink, tap: &str) -> Result<()> {
        match sink {
            Sink::Drop => drop_all_from(tap)?,
            Sink::Bridge => {
                let (bridge, near, far) = (format!("{tap}b"), format!("{tap}n"), format!("{tap}f"));
                run(&format!("ip link add {bridge} type bridge"))?;
                run(&format!("ip link add {near} type veth peer name {far}"))?;
                for port in [tap, &near] {
                    run(&format!("ip link set {port} master {bridge} up"))?;
                }
                run(&format!("ip link set {bridge} up"))?;
                run(&format!("ip link set {far} up"))?;
                drop_all_from(&far)?;
            }
            Sink::Socket => {
                let host = Ipv4Addr::from(HOST);
                run(&format!("ip address add {host}/24 dev {tap}"))?;
                self.mend(sink, tap)?;
                self.sockets.borrow_mut().push(UdpSocket::bind((host, DISCARD_PORT))?);
            }
            Sink::Gateway => run(&format!("ip address add {GATEWAY}/24 dev {tap}"))?,
        }
        Ok(())
    }
}

/// Everything that comes in by this interface is dropped at once.
///
/// # Errors
/// When nft fails.
pub fn drop_all_from(interface: &str) -> Result<()> {
    let hook = format!("type filter hook ingress device {interface} priority 0; policy drop;");
    must(
        Command::new("nft").arg(format!("add table netdev vb; add chain netdev vb {interface} {{ {hook} }}")),
    )?;
    Ok(())
}

fn run(line: &str) -> Result<()> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or_default();
    must(Command::new(program).args(words)).map(|_| ())
}

/// Waits for a state.
///
/// # Errors
/// When it does not come in time: what it was instead.
pub fn wait_for(what: &str, mut state: impl FnMut() -> Result<(), String>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while let Err(instead) = state() {
        if Instant::now() > deadline {
            bail!("waited {PATIENCE:?} in vain for {what}: {instead}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Waits until somebody has the tap, who lets frames through.
///
/// # Errors
/// When nobody comes.
pub fn wait_for_carrier(tap: &str) -> Result<()> {
    let carrier = format!("/sys/class/net/{tap}/carrier");
    wait_for(&format!("the carrier of {tap}"), || match fs::read_to_string(&carrier) {
        Ok(text) if text.trim() == "1" => Ok(()),
        other => Err(format!("{other:?}")),
    })
}

/// Whether the tap takes TCP frames that are still to be cut: its backend has said so to the kernel.
///
/// # Errors
/// When ethtool fails.
pub fn takes_whole(tap: &str) -> Result<bool> {
    Ok(must(Command::new("ethtool").args(["-k", tap]))?.contains("tcp-segmentation-offload: on"))
}

/// Whether somebody listens at this socket.
#[must_use]
pub fn listens(socket: &Path) -> bool {
    /// The flags of a socket that accepts connections (`__SO_ACCEPTCON`).
    const ACCEPTS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    sockets.lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.get(3) == Some(&ACCEPTS) && words.get(7).is_some_and(|path| Path::new(path) == socket)
    })
}

/// Frames that a tap got from its VM, and that it was given for it.
#[must_use]
pub fn tap_frames(tap: &str) -> (u64, u64) {
    let read = |name| {
        let text = fs::read_to_string(format!("/sys/class/net/{tap}/statistics/{name}"));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    (read("rx_packets"), read("tx_packets"))
}

/// A packet socket on the tap: what it sends waits in the tap's queue.
#[derive(Debug)]
pub struct Sender(OwnedFd);

impl Sender {
    /// On this tap.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn on(name: &str) -> Result<Self> {
        // SAFETY: a plain system call.
        let number = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        ensure!(number >= 0, "no packet socket: {}", std::io::Error::last_os_error());
        // SAFETY: the descriptor is new and ours.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        let index = rustix::net::netdevice::name_to_index(&fd, name)?;
        // SAFETY: all bytes zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_ifindex = i32::try_from(index)?;
        let size = u32::try_from(size_of_val(&address))?;
        // SAFETY: the address is a sockaddr_ll of that size.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) };
        ensure!(bound == 0, "bind: {}", std::io::Error::last_os_error());
        let on: libc::c_int = 1;
        let (level, name, size) = (libc::SOL_PACKET, libc::PACKET_VNET_HDR, size_of_val(&on));
        let size = u32::try_from(size)?;
        // SAFETY: the value is an int of that size.
        let set = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const on).cast(), size) };
        ensure!(set == 0, "PACKET_VNET_HDR: {}", std::io::Error::last_os_error());
        Ok(Self(fd))
    }

    /// Puts a frame into the tap's queue; a GSO frame is cut on its way unless the tap takes it whole.
    ///
    /// # Errors
    /// When there is no room.
    pub fn send(&self, header: &VnetHeader, frame: &[u8]) -> Result<()> {
        let header = header.bytes();
        let parts = [IoSlice::new(&header[..LEGACY_HEADER_SIZE]), IoSlice::new(frame)];
        let sent = rustix::io::writev(&self.0, &parts)?;
        ensure!(sent == LEGACY_HEADER_SIZE + frame.len(), "the tap's queue is full");
        Ok(())
    }
}
