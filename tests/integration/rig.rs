//! A running vmflow with VMs, and for each the tap's other side; and the comparison at a test's end.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use vmflow::ledger::Totals;
use vmflow_driver::{
    channel::Channel,
    frame::{Ends, at, pattern},
    net::{Config, Device},
    session::Session,
    transmit::{Layout, Traffic},
    vnet::VnetHeader,
};

use crate::{
    harness::{Netns, PATIENCE, Setup, Vmflow, unique, wait_for},
    wire::Wire,
};

/// The names that VMs get, in order.
pub const NAMES: [&str; 2] = ["web1", "web2"];
/// An EtherType for experiments: nothing answers it.
pub const EXPERIMENT: u16 = 0x88b5;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// The first port number of frames with flows.
const FLOWS_FROM: u16 = 10_000;

/// A frame that nobody answers, of `length` bytes in all, different for each `number`.
pub fn frame(length: usize, number: u64) -> Vec<u8> {
    Ends::default().ethernet(EXPERIMENT, &pattern(length - ETHERNET, number))
}

/// The number of a frame that [`frame`] made, of at least 22 bytes.
pub fn number(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[ETHERNET..ETHERNET + 8].try_into().unwrap())
}

/// The same, of at least 50 bytes, as one packet of flow `flow` of many: a UDP datagram without a checksum.
pub fn of_flow(flow: u16, length: usize, number: u64) -> Vec<u8> {
    let headers = at::UDP_PAYLOAD;
    let ends = Ends { ports: [FLOWS_FROM + flow, FLOWS_FROM], ..Ends::default() };
    let mut bytes = ends.udp(&pattern(length - headers, number));
    bytes[headers - 2..headers].fill(0);
    bytes
}

/// The other direction of that flow.
pub fn of_flow_back(flow: u16, length: usize, number: u64) -> Vec<u8> {
    let mut bytes = of_flow(flow, length, number);
    let (ip, l4) = (at::IP, at::L4);
    bytes[..12].rotate_left(6);
    bytes[ip + 12..ip + 20].rotate_left(4);
    bytes[l4..l4 + 4].rotate_left(2);
    bytes
}

/// Flow and number of a frame that one of these made.
pub fn flow_and_number(bytes: &[u8]) -> (u16, u64) {
    let port = |at: usize| u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap());
    let number = &bytes[at::UDP_PAYLOAD..at::UDP_PAYLOAD + 8];
    let flow = port(at::L4).max(port(at::L4 + 2)) - FLOWS_FROM;
    (flow, u64::from_be_bytes(number.try_into().unwrap()))
}

/// A vmflow, the tap of each VM, and the other side of each tap.
pub struct Rig {
    // Dropped first, while its namespace is there.
    pub vmflow: Vmflow,
    pub wires: Vec<Wire>,
    pub taps: Vec<String>,
    pub setup: Setup,
    pub netns: Netns,
}

impl Rig {
    /// One VM; `more` are further lines of its port.
    pub fn one(more: &str) -> Self {
        Self::with("", &[more])
    }

    /// Two VMs without anything special.
    pub fn two() -> Self {
        Self::with("", &["", ""])
    }

    /// `first` are lines of their own before the VMs; then each VM with further lines of its port.
    pub fn with(first: &str, ports: &[&str]) -> Self {
        let netns = Netns::new();
        let taps: Vec<String> = ports.iter().map(|_| unique("t")).collect();
        let mut setup = Setup::new().with(first);
        for ((name, tap), more) in NAMES.iter().zip(&taps).zip(ports) {
            setup = setup.vm(name, tap, &netns, more);
        }
        let vmflow = setup.start();
        let wires = taps.iter().map(|tap| Wire::open(&netns, tap)).collect();
        Self { vmflow, wires, taps, setup, netns }
    }

    /// Ends vmflow and starts it again with the same configuration and state.
    pub fn restart(self) -> Self {
        self.again(|vmflow, _| drop(vmflow.stop()))
    }

    /// Ends vmflow in some way, does something to its directory, and starts it again.
    pub fn again(self, end: impl FnOnce(Vmflow, &Path)) -> Self {
        let Self { vmflow, wires, taps, setup, netns } = self;
        drop(wires);
        end(vmflow, setup.directory.path());
        let vmflow = setup.start();
        let wires = taps.iter().map(|tap| Wire::open(&netns, tap)).collect();
        Self { vmflow, wires, taps, setup, netns }
    }

    pub fn wire(&self) -> &Wire {
        &self.wires[0]
    }

    pub fn socket(&self, vm: usize) -> PathBuf {
        self.vmflow.socket(NAMES[vm])
    }

    /// Connects a driver to a VM's port, with receive buffers posted; the tap then takes frames.
    pub fn connect(&self, vm: usize, config: Config) -> Device {
        let config = Config { patience: PATIENCE, ..config };
        let mut device = Device::connect(&self.socket(vm), config).unwrap_or_else(|e| panic!("{e}: {e:?}"));
        for pair in &mut device.pairs {
            pair.receive.refill().unwrap();
        }
        self.wait_carrier(vm, true);
        device
    }

    /// Waits until the kernel has taken notice of the carrier: before, it throws frames away.
    pub fn wait_carrier(&self, vm: usize, up: bool) {
        let path = format!("/sys/class/net/{}/operstate", self.taps[vm]);
        let wanted = if up { "up" } else { "down" };
        wait_for("the tap's carrier", || (self.netns.run("cat", &[&path]).trim() == wanted).then_some(()));
    }

    /// The kernel's own counts of a tap: from the guest, to the guest.
    pub fn kernel(&self, vm: usize) -> (Traffic, u64) {
        let counter = |name| self.netns.counter(&self.taps[vm], name);
        (Traffic { frames: counter("rx_packets"), bytes: counter("rx_bytes") }, counter("tx_packets"))
    }

    /// The end of every test: vmflow's counts balance, and are those of the driver and of the kernel.
    /// `malformed`: chains that were no frames, and that the driver does not count.
    pub fn check(&self, vm: usize, device: &Device, malformed: u64) -> (Totals, Totals) {
        let (sent, received) = device.totals();
        self.check_counts(vm, sent, received, malformed)
    }

    /// The same with counts that were added up over several devices.
    pub fn check_counts(
        &self,
        vm: usize,
        sent: Traffic,
        received: Traffic,
        malformed: u64,
    ) -> (Totals, Totals) {
        let (transmit, receive) = self.vmflow.totals(NAMES[vm]);
        assert_eq!(transmit.in_flight, 0, "{transmit:?}");
        assert_eq!(transmit.chains, sent.frames + malformed, "{transmit:?}");
        assert_eq!(transmit.passed.bytes + transmit.dropped_bytes, sent.bytes, "{transmit:?}");
        assert_eq!((receive.passed.frames, receive.passed.bytes), (received.frames, received.bytes));
        let (from_guest, to_guest) = self.kernel(vm);
        assert_eq!((transmit.passed.frames, transmit.passed.bytes), (from_guest.frames, from_guest.bytes));
        assert_eq!((transmit.tap_operations, transmit.tap_bytes), (from_guest.frames, from_guest.bytes));
        assert_eq!((receive.chains, receive.tap_operations), (to_guest, to_guest));
        assert_eq!(self.netns.counter(&self.taps[vm], "tx_dropped"), 0, "the kernel's queue overflowed");
        assert_eq!(self.wires[vm].lost(), 0, "the packet socket overflowed");
        (transmit, receive)
    }
}

/// Sends frame `number` from the guest and waits until the device is done with it.
pub fn send_one(device: &mut Device, bytes: &[u8]) {
    let transmit = &mut device.first().transmit;
    transmit.send(bytes, &VnetHeader::default(), Layout::Single).unwrap();
    transmit.drain(PATIENCE).unwrap();
}

/// The guest's next frame, whose buffers are posted again.
pub fn receive_one(device: &mut Device) -> Vec<u8> {
    let receive = &mut device.first().receive;
    let frame = receive.receive_within(PATIENCE).unwrap();
    assert_eq!(frame.strays, 0, "bytes were written beyond what the device told");
    receive.refill().unwrap();
    frame.bytes
}

/// One frame each way arrives, whatever happened before.
pub fn passes(rig: &Rig, vm: usize, device: &mut Device) {
    let bytes = frame(100, 1);
    send_one(device, &bytes);
    assert_eq!(rig.wires[vm].receive().bytes, bytes);
    let bytes = frame(200, 2);
    rig.wires[vm].send(&bytes);
    assert_eq!(receive_one(device), bytes);
}

/// Closes the device's connection as a killed front end does; what is told to it now is heard by nobody.
pub fn hang_up(device: &mut Device) {
    let (ours, _) = UnixStream::pair().unwrap();
    device.session = Session::new(Channel::from(ours));
}
