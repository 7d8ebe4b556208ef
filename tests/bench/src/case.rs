//! What is measured, and what it ought to come to: data.

use vmflow_driver::{net::FEATURES, request::feature};

use crate::{host::Sink, load::Load, measure::Metric, testpmd::Words};

/// Against whom a case is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// vmflow itself.
    Vmflow,
    /// vmflow with `coalesce` off.
    Uncoalesced,
    /// vmflow with `poll_us`: it looks for more before it sleeps.
    Polling,
    /// vmflow built without monitoring.
    Unmonitored,
    /// A plain loop on the same tap.
    Plain,
    /// DPDK's testpmd between a vhost-user socket and a tap; it polls.
    Dpdk,
    /// Every backend that was given by its command line.
    Peers,
    /// QEMU's own tap.
    QemuTap,
    /// QEMU's own tap with the kernel's vhost-net.
    QemuVhost,
}

use Rival::{Dpdk, Peers, Plain, Polling, QemuTap, QemuVhost, Uncoalesced, Unmonitored, Vmflow};

/// Who drives the backend.
#[derive(Clone, Copy, Debug)]
pub enum Front {
    /// The driver of the tests; the case's `traffic` says how.
    Driver,
    /// DPDK's testpmd.
    Testpmd(Words),
    /// A guest with a kernel of its own, in QEMU.
    Guest {
        /// Options of iperf3's client.
        iperf: &'static str,
        /// Properties of the virtio-net device.
        device: &'static str,
    },
}

/// What the driver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Sends as fast as the backend takes it.
    Transmit,
    /// Fills all rings, and sleeps until they are empty: every processor is the backend's.
    Burst,
    /// Takes what waits in the tap, burst by burst.
    Receive,
    /// Sends and takes at the same time.
    Both,
    /// Sends one frame, sleeps until the answer of the host's kernel.
    RoundTrip,
    /// Sends the same to every port, so much a second, whatever else there is.
    Paced,
}

/// One thing to measure.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Cases of a group are in one table and one chart.
    pub group: &'static str,
    /// What it is.
    pub name: &'static str,
    /// Who drives.
    pub front: Front,
    /// How, where the driver drives.
    pub traffic: Traffic,
    /// What is sent.
    pub load: Load,
    /// Virtio features that the driver wants.
    pub features: u64,
    /// Ports, each with a driver of its own.
    pub ports: u16,
    /// Queue pairs of each.
    pub pairs: u16,
    /// What is behind the tap.
    pub sink: Sink,
    /// Against whom, in this order.
    pub rivals: &'static [Rival],
    /// What the chart shows, and ratios are made of.
    pub metric: Metric,
    /// No more rounds than this.
    pub rounds: usize,
}

impl Case {
    /// Its name in full.
    #[must_use]
    pub fn title(&self) -> String {
        format!("{}: {}", self.group, self.name)
    }

    /// Whether the driver takes GSO frames as they are.
    #[must_use]
    pub const fn wants_whole(&self) -> bool {
        self.features & GUEST_TSO == GUEST_TSO
    }
}

/// A ratio that is wanted: how many times better the first is than the second.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// What is wanted.
    pub what: &'static str,
    /// Group and name of the case, and who.
    pub better: (&'static str, &'static str, Rival),
    /// The same for whom it is compared with.
    pub than: (&'static str, &'static str, Rival),
    /// What is compared.
    pub metric: Metric,
    /// At least so many times better.
    pub at_least: f64,
}

const HOST_TSO: u64 = feature::CSUM | feature::HOST_TSO4;
const GUEST_TSO: u64 = feature::GUEST_CSUM | feature::GUEST_TSO4;
const UNMERGED: u64 = FEATURES & !feature::MRG_RXBUF;

const TRANSMIT: Case = Case {
    group: "transmit",
    name: "",
    front: Front::Driver,
    traffic: Traffic::Transmit,
    load: Load::udp(64),
    features: FEATURES,
    ports: 1,
    pairs: 1,
    sink: Sink::Drop,
    rivals: &[Vmflow, Plain],
    metric: Metric::Cpu,
    rounds: usize::MAX,
};
const SINKS: Case = Case { group: "sinks", rivals: &[Vmflow, Uncoalesced, Plain], ..TRANSMIT };
const RECEIVE: Case = Case { group: "receive", traffic: Traffic::Receive, ..TRANSMIT };
const PAIRS: Case = Case {
    group: "queue pairs",
    traffic: Traffic::Burst,
    load: Load::udp(64).flows(1000),
    rivals: &[Uncoalesced, Vmflow],
    metric: Metric::Packets,
    ..TRANSMIT
};
const PORTS: Case = Case { group: "ports", traffic: Traffic::Paced, rivals: &[Vmflow], ..TRANSMIT };
const TESTPMD: Case = Case { group: "testpmd", rivals: &[Vmflow, Dpdk, Peers], ..TRANSMIT };
const GUEST: Case = Case {
    group: "guest",
    sink: Sink::Gateway,
    load: Load::tcp(1448),
    rivals: &[Vmflow, QemuTap, QemuVhost],
    metric: Metric::Bits,
    rounds: 3,
    ..TRANSMIT
};

const MANY: u16 = 10_000;
const RUN: u16 = 44;
/// A datagram of 1,400 bytes with its headers.
const LARGE: usize = 1442;
const MSS: usize = 1460;
const MSS_TSO: u16 = 1448;

const fn testpmd(forward: &'static str, options: &'static [&'static str], replay: bool) -> Front {
    Front::Testpmd(Words { forward, options, replay })
}

const fn guest(iperf: &'static str, device: &'static str) -> Front {
    Front::Guest { iperf, device }
}

const NO_TSO: &str = "host_tso4=off,host_tso6=off,host_ufo=off,guest_tso4=off,guest_tso6=off,guest_ufo=off";

/// Everything that is measured.
pub const CASES: &[Case] = &[
    Case {
        name: "64 B, 10,000 flows",
        load: Load::udp(64).flows(MANY),
        rivals: &[Vmflow, Unmonitored, Plain, Dpdk, Peers],
        ..TRANSMIT
    },
    Case { name: "512 B, 10,000 flows", load: Load::udp(512).flows(MANY), ..TRANSMIT },
    Case {
        name: "1514 B, 10,000 flows",
        load: Load::udp(1514).flows(MANY),
        rivals: &[Vmflow, Plain, Dpdk, Peers],
        ..TRANSMIT
    },
    Case {
        name: "64 B, runs of 44",
        load: Load::udp(64).run(RUN),
        rivals: &[Vmflow, Uncoalesced, Unmonitored, Plain, Dpdk, Peers],
        ..TRANSMIT
    },
    Case {
        name: "UDP 1400 B, runs of 44",
        load: Load::udp(LARGE).run(RUN),
        rivals: &[Vmflow, Uncoalesced, Plain, Peers],
        ..TRANSMIT
    },
    Case {
        name: "TCP without TSO, runs of 44",
        load: Load::tcp(MSS).run(RUN),
        rivals: &[Vmflow, Uncoalesced, Plain, Peers],
        ..TRANSMIT
    },
    Case {
        name: "64 B, runs of 44, checksums left",
        load: Load::udp(64).run(RUN).unsummed(),
        features: FEATURES | feature::CSUM,
        ..TRANSMIT
    },
    Case {
        name: "UDP 1400 B, runs of 44, checksums left",
        load: Load::udp(LARGE).run(RUN).unsummed(),
        features: FEATURES | feature::CSUM,
        ..TRANSMIT
    },
    Case {
        name: "TCP without TSO, runs of 44, checksums left",
        load: Load::tcp(MSS).run(RUN).unsummed(),
        features: FEATURES | feature::CSUM,
        ..TRANSMIT
    },
    Case { name: "64 B, one flow", rivals: &[Vmflow, Uncoalesced, Plain], ..TRANSMIT },
    Case {
        name: "TCP with TSO, 64 KiB",
        load: Load::tso(MSS_TSO),
        features: FEATURES | HOST_TSO,
        rivals: &[Vmflow, Plain, Peers],
        ..TRANSMIT
    },
    Case {
        name: "64 B, 10,000 flows, 2 queue pairs",
        load: Load::udp(64).flows(MANY),
        features: FEATURES | feature::MQ,
        pairs: 2,
        rivals: &[Vmflow],
        ..TRANSMIT
    },
    Case { name: "bridge, 64 B, 10,000 flows", sink: Sink::Bridge, load: Load::udp(64).flows(MANY), ..SINKS },
    Case { name: "bridge, 64 B, runs of 44", sink: Sink::Bridge, load: Load::udp(64).run(RUN), ..SINKS },
    Case { name: "bridge, 1400 B, runs of 44", sink: Sink::Bridge, load: Load::udp(LARGE).run(RUN), ..SINKS },
    Case { name: "socket, 64 B, runs of 44", sink: Sink::Socket, load: Load::udp(64).run(RUN), ..SINKS },
    Case { name: "socket, 1400 B, runs of 44", sink: Sink::Socket, load: Load::udp(LARGE).run(RUN), ..SINKS },
    Case { name: "64 B", rivals: &[Vmflow, Unmonitored, Plain, Dpdk, Peers], ..RECEIVE },
    Case { name: "512 B", load: Load::udp(512), ..RECEIVE },
    Case { name: "1514 B", load: Load::udp(1514), rivals: &[Vmflow, Plain, Peers], ..RECEIVE },
    Case {
        name: "TCP GSO, mergeable",
        load: Load::tso(MSS_TSO),
        features: FEATURES | GUEST_TSO,
        rivals: &[Vmflow, Plain, Peers],
        metric: Metric::Bits,
        ..RECEIVE
    },
    Case {
        name: "TCP GSO, not mergeable",
        load: Load::tso(MSS_TSO),
        features: UNMERGED | GUEST_TSO,
        rivals: &[Vmflow, Peers],
        metric: Metric::Bits,
        ..RECEIVE
    },
    Case {
        name: "TCP, cut by the kernel",
        load: Load::tso(MSS_TSO),
        features: UNMERGED,
        rivals: &[Vmflow, Plain, Peers],
        metric: Metric::Bits,
        ..RECEIVE
    },
    Case { name: "64 B, 1 pair", ..PAIRS },
    Case { name: "64 B, 2 pairs", features: FEATURES | feature::MQ, pairs: 2, ..PAIRS },
    Case { name: "1514 B, 1 pair", load: Load::udp(1514).flows(1000), ..PAIRS },
    Case {
        name: "1514 B, 2 pairs",
        load: Load::udp(1514).flows(1000),
        features: FEATURES | feature::MQ,
        pairs: 2,
        ..PAIRS
    },
    Case { group: "both ways", name: "64 B", traffic: Traffic::Both, rivals: &[Vmflow, Peers], ..TRANSMIT },
    Case { name: "1 port, 4,000 frames/s each", ..PORTS },
    Case { name: "10 ports, 4,000 frames/s each", ports: 10, ..PORTS },
    Case { name: "100 ports, 4,000 frames/s each", ports: 100, ..PORTS },
    Case {
        group: "round trip",
        name: "64 B",
        traffic: Traffic::RoundTrip,
        sink: Sink::Socket,
        rivals: &[Vmflow, Polling, Plain, Peers],
        metric: Metric::Median,
        ..TRANSMIT
    },
    Case { name: "txonly, 64 B", front: testpmd("txonly", &[], false), ..TESTPMD },
    Case {
        name: "txonly, 64 B, many flows",
        front: testpmd("txonly", &["--txonly-multi-flow"], false),
        ..TESTPMD
    },
    Case { name: "txonly, 1514 B", front: testpmd("txonly", &[], false), load: Load::udp(1514), ..TESTPMD },
    Case { name: "rxonly, 64 B", front: testpmd("rxonly", &[], false), traffic: Traffic::Receive, ..TESTPMD },
    Case {
        name: "capture file, 64 B, runs of 44",
        front: testpmd("io", &[], true),
        load: Load::udp(64).run(RUN),
        ..TESTPMD
    },
    Case { name: "TCP out, TSO", front: guest("", ""), ..GUEST },
    Case { name: "TCP in, TSO", front: guest("--reverse", ""), ..GUEST },
    Case { name: "TCP out, no TSO", front: guest("", NO_TSO), ..GUEST },
    Case { name: "TCP in, no TSO", front: guest("--reverse", NO_TSO), ..GUEST },
    Case {
        name: "UDP 1400 B out",
        front: guest("--udp --bitrate 0 --length 1400", ""),
        load: Load::udp(LARGE),
        ..GUEST
    },
];

/// What the figures ought to be.
pub const GOALS: &[Goal] = &[
    same(("transmit", "64 B, 10,000 flows"), Peers, Metric::Cpu, 2.0, "single frames of 64 B: 2x a peer"),
    same(
        ("transmit", "64 B, 10,000 flows"),
        Plain,
        Metric::Cpu,
        1.2,
        "single frames of 64 B: 1.2x the plain loop",
    ),
    same(
        ("transmit", "64 B, 10,000 flows"),
        Dpdk,
        Metric::Cpu,
        1.0,
        "single frames of 64 B: no more CPU than DPDK, which polls",
    ),
    same(
        ("testpmd", "txonly, 64 B, many flows"),
        Peers,
        Metric::Cpu,
        2.0,
        "testpmd's frames of 64 B: 2x a peer",
    ),
    same(
        ("testpmd", "txonly, 64 B, many flows"),
        Dpdk,
        Metric::Packets,
        1.0,
        "testpmd's frames of 64 B: as many packets as DPDK",
    ),
    same(
        ("transmit", "64 B, runs of 44"),
        Plain,
        Metric::Cpu,
        5.0,
        "runs of 44 x 64 B UDP: 5x the plain loop",
    ),
    same(
        ("transmit", "UDP 1400 B, runs of 44"),
        Plain,
        Metric::Cpu,
        3.0,
        "runs of 44 x 1400 B UDP: 3x the plain loop",
    ),
    same(
        ("transmit", "TCP without TSO, runs of 44"),
        Plain,
        Metric::Cpu,
        3.0,
        "TCP segments without TSO: 3x the plain loop",
    ),
    same(
        ("transmit", "64 B, runs of 44, checksums left"),
        Plain,
        Metric::Cpu,
        5.0,
        "runs of 44 x 64 B UDP, checksums left: 5x the plain loop",
    ),
    same(
        ("transmit", "UDP 1400 B, runs of 44, checksums left"),
        Plain,
        Metric::Cpu,
        3.0,
        "runs of 44 x 1400 B UDP, checksums left: 3x the plain loop",
    ),
    same(
        ("transmit", "TCP without TSO, runs of 44, checksums left"),
        Plain,
        Metric::Cpu,
        3.0,
        "TCP segments without TSO, checksums left: 3x the plain loop",
    ),
    same(("receive", "64 B"), Peers, Metric::Cpu, 1.5, "receive 64 B: 1.5x less CPU than a peer"),
    same(
        ("testpmd", "rxonly, 64 B"),
        Peers,
        Metric::Cpu,
        1.5,
        "testpmd receives 64 B: 1.5x less CPU than a peer",
    ),
    same(("receive", "1514 B"), Peers, Metric::Cpu, 1.5, "receive 1514 B: 1.5x less CPU than a peer"),
    same(
        ("receive", "TCP GSO, mergeable"),
        Peers,
        Metric::Bits,
        5.0,
        "receive, GSO and mergeable: 5x a peer's throughput",
    ),
    same(
        ("transmit", "64 B, 10,000 flows"),
        Unmonitored,
        Metric::Cpu,
        0.95,
        "monitoring costs at most 5 % of a frame sent",
    ),
    same(
        ("receive", "64 B"),
        Unmonitored,
        Metric::Cpu,
        0.95,
        "monitoring costs at most 5 % of a frame received",
    ),
    pairs("64 B, 1 pair", "64 B, 2 pairs", "two queue pairs on two processors: 1.8x one, 64 B"),
    pairs("1514 B, 1 pair", "1514 B, 2 pairs", "two queue pairs on two processors: 1.8x one, 1514 B"),
    ports("10 ports, 4,000 frames/s each", "10 busy ports: within 25 % of one"),
    ports("100 ports, 4,000 frames/s each", "100 busy ports: within 25 % of one"),
];

/// vmflow against somebody in one case.
const fn same(
    (group, name): (&'static str, &'static str),
    rival: Rival,
    metric: Metric,
    at_least: f64,
    what: &'static str,
) -> Goal {
    Goal { what, better: (group, name, Vmflow), than: (group, name, rival), metric, at_least }
}

/// vmflow with more ports against itself with one.
const fn pairs(one: &'static str, two: &'static str, what: &'static str) -> Goal {
    Goal {
        what,
        better: ("queue pairs", two, Vmflow),
        than: ("queue pairs", one, Vmflow),
        metric: Metric::Packets,
        at_least: 1.8,
    }
}

const fn ports(name: &'static str, what: &'static str) -> Goal {
    let one = ("ports", "1 port, 4,000 frames/s each", Vmflow);
    Goal { what, better: ("ports", name, Vmflow), than: one, metric: Metric::Cpu, at_least: 0.8 }
}
