//! A guest whose frames are looked at where they are written to the tap, and where they have left the host.

use vmflow::ledger::Totals;
use vmflow_driver::{
    net::{Config, Device, FEATURES},
    request::feature,
    transmit::Layout,
    vnet::{VnetHeader, gso},
};

use super::{
    oracle::{Leaving, leaving},
    spec::Sent,
};
use crate::{
    far::Far,
    harness::PATIENCE,
    rig::{Rig, frame},
    wire::Frame,
};

/// All that a guest can leave to be done of what it sends.
const OFFLOADS: u64 = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_USO;
/// The longest packet of the link.
pub const MTU: usize = 9000;
/// Room for the longest frame, and for one of several segments.
const ROOM: u32 = 32_768;
/// How frames lie in guest memory: they take turns. Each takes one descriptor.
const LAYOUTS: [Layout<'static>; 4] = [
    Layout::Single,
    Layout::Indirect(&Layout::HeaderApart),
    Layout::Indirect(&Layout::Scattered(&[12, 14, 20, 8, 1, 213, 1, 30])),
    Layout::Indirect(&Layout::Scattered(&[5, 60, 0, 300])),
];
/// Length of the frame behind all others.
const MARKER: usize = 60;

pub struct Bed {
    rig: Rig,
    far: Far,
    device: Device,
    /// Numbers the markers.
    passes: u64,
    counts: Counts,
}

/// vmflow's counts of what was sent, and the kernel's of the tap: frames and bytes.
#[derive(Clone, Debug)]
struct Counts {
    vmflow: Totals,
    kernel: [u64; 2],
}

/// What was counted of one pass.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    pub frames: u64,
    pub writes: u64,
}

impl Bed {
    /// A driver that has all offloads; `more` are further lines of the port.
    pub fn new(more: &str) -> Self {
        Self::with(more, FEATURES | OFFLOADS)
    }

    /// A driver that wants these features.
    pub fn with(more: &str, features: u64) -> Self {
        let rig = Rig::one(&format!("mtu = {MTU}\n{more}"));
        let far = Far::of(&rig, 0);
        let config = Config { features, transmit_room: ROOM, indirect: 16, ..Config::default() };
        let device = rig.connect(0, config);
        let counts = counts(&rig);
        Self { rig, far, device, passes: 0, counts }
    }

    /// Has the guest send all of them, as many at once as its ring holds.
    ///
    /// # Errors
    /// What is not as it must be: frames, their order, or a count.
    pub fn pass(&mut self, sent: &[Sent]) -> Result<Counted, String> {
        let marker = frame(MARKER, self.passes);
        self.passes += 1;
        self.send(sent, &marker);
        let left: Vec<_> = std::iter::from_fn(|| Some(self.far.receive()).filter(|f| *f != marker)).collect();
        let wire = self.rig.wire();
        let written: Vec<_> =
            std::iter::from_fn(|| Some(wire.receive()).filter(|f| f.bytes != marker)).collect();
        let after = counts(&self.rig);
        let before = std::mem::replace(&mut self.counts, after.clone());
        let refused = compare(sent, &left, &alone(&written)?)?;
        check(sent, &left, &written, refused, &difference(&before, &after))?;
        Ok(Counted {
            frames: after.vmflow.passed.frames - before.vmflow.passed.frames - 1,
            writes: u64::try_from(written.len()).unwrap(),
        })
    }

    fn send(&mut self, sent: &[Sent], marker: &[u8]) {
        let transmit = &mut self.device.first().transmit;
        let marker = Sent { header: VnetHeader::default(), bytes: marker.to_vec(), may_be_refused: false };
        let all = sent.iter().chain([&marker]).zip(LAYOUTS.into_iter().cycle());
        for (Sent { header, bytes, .. }, layout) in all {
            if transmit.queue.free() == 0 {
                transmit.flush().unwrap();
                transmit.drain(PATIENCE).unwrap();
            }
            transmit.add(bytes, header, layout).unwrap();
        }
        transmit.flush().unwrap();
        transmit.drain(PATIENCE).unwrap();
    }
}

fn counts(rig: &Rig) -> Counts {
    let (vmflow, _) = rig.vmflow.totals("web1");
    let devices = rig.netns.inside(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
    let line =
        devices.lines().find_map(|line| line.trim().strip_prefix(&format!("{}:", rig.taps[0]))).unwrap();
    let mut numbers = line.split_whitespace().map(|number| number.parse().unwrap());
    let (bytes, frames) = (numbers.next().unwrap(), numbers.next().unwrap());
    Counts { vmflow, kernel: [frames, bytes] }
}

/// For each packet that the kernel made of what was written: was it a write of its own?
fn alone(written: &[Frame]) -> Result<Vec<bool>, String> {
    let mut alone = Vec::new();
    for Frame { header, bytes } in written {
        if header.gso_type == gso::NONE {
            alone.push(true);
            continue;
        }
        let l4 = usize::from(header.csum_start);
        let headers = l4
            + match header.gso_type & !gso::ECN {
                gso::UDP_L4 => 8,
                gso::TCPV4 | gso::TCPV6 => 4 * usize::from(bytes[l4 + 12] >> 4),
                other => return Err(format!("a GSO type {other} was written")),
            };
        let packets = (bytes.len() - headers).div_ceil(header.gso_size.into());
        alone.extend(std::iter::repeat_n(false, packets));
    }
    Ok(alone)
}

/// Every frame came as it must, in its order. Gives how many are missing of those that may be refused.
fn compare(sent: &[Sent], left: &[Vec<u8>], alone: &[bool]) -> Result<u64, String> {
    if left.len() != alone.len() {
        return Err(format!(
            "{} frames left the host, {} should by what was written",
            left.len(),
            alone.len()
        ));
    }
    let mut came = left.iter().zip(alone.iter().copied()).peekable();
    let mut refused = 0;
    for (number, sent) in sent.iter().enumerate() {
        let expected = leaving(sent);
        let comes = |frame: &Leaving| came.peek().is_some_and(|(bytes, alone)| frame.is(bytes, *alone));
        if sent.may_be_refused && !expected.first().is_some_and(comes) {
            refused += 1;
            continue;
        }
        for leaving in &expected {
            let Some((bytes, alone)) = came.next() else {
                return Err(format!("frame {number} did not come: {}", hex(&leaving.bytes)));
            };
            if !leaving.is(bytes, alone) {
                return Err(differs(number, leaving, bytes, alone));
            }
        }
    }
    match came.next() {
        Some((bytes, _)) => Err(format!("a frame too many came: {}", hex(bytes))),
        None => Ok(refused),
    }
}

fn differs(number: usize, leaving: &Leaving, came: &[u8], alone: bool) -> String {
    let how = if alone { "alone" } else { "cut off a larger one" };
    let places =
        leaving.bytes.iter().zip(came).enumerate().filter(|(_, (a, b))| a != b).map(|(place, _)| place);
    let places: Vec<_> = places.take(20).collect();
    format!(
        "frame {number} should be\n  {}\nbut, {how}, came\n  {}\nthey differ at {places:?}",
        hex(&leaving.bytes),
        hex(came)
    )
}

/// The first bytes, which hold all headers.
fn hex(bytes: &[u8]) -> String {
    let shown: Vec<_> = bytes.iter().take(110).map(|byte| format!("{byte:02x}")).collect();
    format!("{} ({} bytes)", shown.join(" "), bytes.len())
}

/// The counts of one pass, marker and all.
#[derive(Debug)]
struct Difference {
    chains: u64,
    passed: [u64; 4],
    dropped: u64,
    writes: u64,
    write_bytes: u64,
    kernel: [u64; 2],
}

fn difference(before: &Counts, after: &Counts) -> Difference {
    let (from, to) = (&before.vmflow, &after.vmflow);
    let volume = |t: &Totals| [t.passed.frames, t.passed.packets, t.passed.bytes, t.passed.wire_bytes];
    let (passed_from, passed_to) = (volume(from), volume(to));
    Difference {
        chains: to.chains - from.chains,
        passed: std::array::from_fn(|i| passed_to[i] - passed_from[i]),
        dropped: to.dropped_frames() - from.dropped_frames(),
        writes: to.tap_operations - from.tap_operations,
        write_bytes: to.tap_bytes - from.tap_bytes,
        kernel: std::array::from_fn(|i| after.kernel[i] - before.kernel[i]),
    }
}

/// The guest's frames are counted as it sent them, the writes as the kernel counts them.
fn check(
    sent: &[Sent],
    left: &[Vec<u8>],
    written: &[Frame],
    refused: u64,
    counts: &Difference,
) -> Result<(), String> {
    let number = |n: usize| u64::try_from(n).unwrap();
    let marker = number(MARKER);
    let sent_frames = number(sent.len());
    let all_bytes: usize = sent.iter().filter(|sent| !sent.may_be_refused).map(|sent| sent.bytes.len()).sum();
    let wire_bytes = number(left.iter().map(Vec::len).sum()) + marker;
    let [frames, packets, bytes, on_wire] = counts.passed;
    let pairs = [
        ("chains", counts.chains, sent_frames + 1),
        ("dropped", counts.dropped, refused),
        ("passed frames", frames, sent_frames + 1 - refused),
        ("passed packets", packets, number(left.len()) + 1),
        ("passed wire_bytes", on_wire, wire_bytes),
        ("writes", counts.writes, number(written.len()) + 1),
        ("the kernel's frames", counts.kernel[0], counts.writes),
        ("the kernel's bytes", counts.kernel[1], counts.write_bytes),
    ];
    for (what, counted, expected) in pairs {
        if counted != expected {
            return Err(format!("{what}: {counted}, not {expected}: {counts:?}"));
        }
    }
    let exact = sent.iter().all(|sent| !sent.may_be_refused);
    if exact && bytes != number(all_bytes) + marker {
        return Err(format!("passed bytes: {bytes}, not {all_bytes} + {marker}: {counts:?}"));
    }
    Ok(())
}
