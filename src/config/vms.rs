//! VMs and ports: each value judged, and nothing claimed twice.

use std::{fmt, io, ops::RangeInclusive, path::Path};

use toml::Spanned;
use uuid::Uuid;

use super::{
    Mac, Mode, NetNs, Port, SuspectAction, TapName, Vm,
    error::ConfigError,
    ids::{GROUPS, USERS},
    judge::{At, Claim, Judge, Needed, at},
    loose::{List, LooseId, LoosePeer, LoosePort, LooseVm, LooseVms},
    source::Spot,
    strict, values,
};
use crate::{features::QUEUE_PAIRS_MAX, label::Label};

/// Read and write for owner and group: QEMU runs in the socket's group.
const DEFAULT_SOCKET_MODE: u32 = 0o660;
/// Smallest MTU of an IPv4 link (RFC 791, 3.2).
const MTU_MIN: u16 = 68;
/// Largest MTU that a tap takes: 65,535 less an Ethernet header.
const MTU_MAX: u16 = 65_521;
/// Longest time that a thread may look for more before it sleeps: other events wait for it.
const POLL_US_MAX: u16 = 1000;
/// Queue pairs of a port that says nothing.
const QUEUE_PAIRS: u16 = 1;

const VM_NAME: Needed = Needed { table: "VM", key: "name", example: "name = \"web1\"" };
const PORT_SOCKET: Needed =
    Needed { table: "port", key: "socket", example: "socket = \"/run/vmflow/web1/net0.sock\"" };
const PORT_TAP: Needed = Needed { table: "port", key: "tap", example: "tap = \"vmf-web1\"" };
const PEER_UID: Needed = Needed { table: "peer", key: "uid", example: "uid = \"libvirt-qemu\"" };

/// A VM that later arguments may still add a port to.
struct Draft {
    name: Option<At<String>>,
    uuid: Option<At<Uuid>>,
    label: Option<At<Label>>,
    suspect: Option<SuspectAction>,
    ports: Vec<Port>,
}

/// The VMs so far.
pub(super) struct Vms<'j> {
    pub(super) judge: &'j mut Judge,
    /// The host's labels; none while the range itself is at fault.
    labels: Option<RangeInclusive<Label>>,
    drafts: Vec<Draft>,
}

impl<'j> Vms<'j> {
    pub(super) fn new(judge: &'j mut Judge, labels: Option<RangeInclusive<Label>>) -> Self {
        Self { judge, labels, drafts: Vec::new() }
    }

    /// The VMs, whole if the judge found no fault.
    pub(super) fn finish(self) -> Vec<Vm> {
        let Self { judge, drafts, .. } = self;
        let vm = |draft: Draft| {
            let name = draft.name?;
            Some(Vm {
                at: judge.sources.place_of_vm(name.spot),
                name: name.value,
                uuid: draft.uuid.map(|uuid| uuid.value),
                label: draft.label.map(|label| label.value),
                suspect: draft.suspect,
                ports: draft.ports,
            })
        };
        drafts.into_iter().filter_map(vm).collect()
    }

    /// All files of a directory.
    pub(super) fn judge_files(&mut self, dir: &Path) {
        match strict::vm_files(dir) {
            Ok(files) => files.iter().for_each(|file| self.judge_file(file)),
            Err(error) => self.judge.sources.unreadable(dir, &error),
        }
    }

    /// The directory of VMs that were added while running. Whoever may not look into the state directory
    /// does not see them: the monitor itself says so when it opens it.
    pub(super) fn judge_added(&mut self, dir: &Path) {
        match strict::vm_files(dir) {
            Ok(files) => {
                for file in files {
                    self.judge.sources.expect_added(&file);
                    self.judge_file(&file);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => self.judge.sources.unreadable(dir, &error),
        }
    }

    /// A file with VMs and nothing else.
    pub(super) fn judge_file(&mut self, file: &Path) {
        if let Some((number, loose)) = self.judge.sources.read_toml::<LooseVms>(file) {
            self.judge_all(number, loose.vm);
        }
    }

    /// Arguments of this kind.
    pub(super) fn judge_arguments(&mut self, kind: &'static str, arguments: &[String]) {
        for (n, argument) in arguments.iter().enumerate() {
            let (number, vm) = self.judge.sources.read_argument(kind, n + 1, argument);
            self.judge_one(number, vm);
        }
    }

    pub(super) fn judge_all(&mut self, source: usize, vms: List<Spanned<LooseVm>>) {
        for vm in vms.0 {
            self.judge_one(source, vm);
        }
    }

    pub(super) fn judge_one(&mut self, source: usize, vm: Spanned<LooseVm>) {
        let spot = Spot::of(source, &vm);
        let vm = vm.into_inner();
        if vm.port.0.is_empty() && !self.judge.sources.is_garbled(source) {
            let name = vm.name.as_ref().map_or_else(String::new, |name| name.get_ref().clone());
            self.judge.sources.fault(spot, ConfigError::NoPort(name));
        }
        self.judge.require(vm.name.as_ref(), spot, &VM_NAME);
        let labels = self.labels.clone();
        let draft = Draft {
            name: self.judge.read(at(source, vm.name), |text| values::vm_name(text)),
            uuid: self.judge.read(at(source, vm.uuid), |text| values::vm_uuid(text)),
            label: self.judge.read(at(source, vm.label), |&number| label(number, labels.as_ref())),
            suspect: strict::suspect(self.judge, source, vm.suspect),
            ports: vm.port.0.into_iter().filter_map(|loose| port(self.judge, source, loose)).collect(),
        };
        self.enroll(draft);
    }

    /// Takes a VM in, or another port of a VM that an earlier argument began.
    fn enroll(&mut self, draft: Draft) {
        let place = self.drafts.iter().position(|earlier| self.same_by_argument(earlier, &draft));
        let mut whole = if let Some(place) = place {
            self.drafts.remove(place)
        } else {
            if let Some(name) = &draft.name {
                self.judge.claim(name.spot, Claim::Name(name.value.clone()));
            }
            Draft { name: draft.name, uuid: None, label: None, suspect: draft.suspect, ports: Vec::new() }
        };
        whole.uuid = self.agree("uuid", whole.uuid, draft.uuid, Claim::Uuid);
        whole.label = self.agree("label", whole.label, draft.label, Claim::Label);
        whole.ports.extend(draft.ports);
        self.drafts.insert(place.unwrap_or(self.drafts.len()), whole);
    }

    /// True if both are arguments about one VM.
    fn same_by_argument(&self, earlier: &Draft, later: &Draft) -> bool {
        matches!((&earlier.name, &later.name), (Some(a), Some(b)) if a.value == b.value
            && [a.spot, b.spot].into_iter().all(|spot| self.judge.sources.is_vm_argument(spot)))
    }

    /// What two arguments say together: the earlier, if it speaks and the later does not contradict.
    fn agree<T: Copy + PartialEq + fmt::Display>(
        &mut self,
        key: &'static str,
        earlier: Option<At<T>>,
        later: Option<At<T>>,
        claim: fn(T) -> Claim,
    ) -> Option<At<T>> {
        match (earlier, later) {
            (None, Some(new)) => self.judge.claim(new.spot, claim(new.value)),
            (Some(old), Some(new)) if old.value != new.value => {
                let first = self.judge.sources.place(old.spot);
                let error = ConfigError::Contradicts { key, value: new.value.to_string(), first };
                self.judge.sources.fault(new.spot, error);
            }
            _ => {}
        }
        earlier.or(later)
    }
}

fn port(judge: &mut Judge, source: usize, port: Spanned<LoosePort>) -> Option<Port> {
    let spot = Spot::of(source, &port);
    let mut port = port.into_inner();
    judge.require(port.socket.as_ref(), spot, &PORT_SOCKET);
    judge.require(port.tap.as_ref(), spot, &PORT_TAP);
    let socket = judge.socket("socket", at(source, port.socket.take()));
    let mode = judge.value(at(source, port.mode.take()), |text| text.parse::<Mode>()).unwrap_or_default();
    if mode == Mode::Client {
        refuse_server_keys(judge, source, &port);
    }
    let (netns, tap) = place_of_tap(judge, source, port.netns, port.tap);
    let user = |written: &LooseId| USERS.number_of(written);
    let group = |written: &LooseId| GROUPS.number_of(written);
    let peer = port.peer.and_then(|peer| peer_uid(judge, source, peer));
    let control_queue = port.control_queue.unwrap_or(true);
    let pairs = judge.value(at(source, port.queue_pairs), |number| queue_pairs(*number, control_queue));
    Some(Port {
        peer: judge.value(peer, user),
        owner: judge.value(at(source, port.owner), user),
        group: judge.value(at(source, port.group), group),
        socket_mode: judge
            .value(at(source, port.socket_mode), |text| values::socket_mode(text))
            .unwrap_or(DEFAULT_SOCKET_MODE),
        bridge: judge.value(at(source, port.bridge), |text| bridge(text)),
        queue_pairs: pairs.unwrap_or(QUEUE_PAIRS),
        mac: judge.value(at(source, port.mac), |text| text.parse::<Mac>()),
        mtu: judge.value(at(source, port.mtu), |number| mtu(*number)),
        control_queue,
        coalesce: port.coalesce.unwrap_or(true),
        poll_us: judge.value(at(source, port.poll_us), |n| poll_us(*n)).unwrap_or(0),
        mode,
        netns,
        socket: socket?,
        tap: tap?,
    })
}

/// A tap whose namespace is at fault is not compared with others: nobody knows which they are.
fn place_of_tap(
    judge: &mut Judge,
    source: usize,
    netns: Option<Spanned<String>>,
    tap: Option<Spanned<String>>,
) -> (Option<NetNs>, Option<TapName>) {
    let elsewhere = netns.is_some();
    let netns = judge.value(at(source, netns), |text| text.parse::<NetNs>());
    let tap = judge.read(at(source, tap), |text| text.parse::<TapName>());
    if let Some(tap) = &tap
        && elsewhere == netns.is_some()
    {
        judge.claim(tap.spot, Claim::Tap(netns.clone(), tap.value.clone()));
    }
    (netns, tap.map(|tap| tap.value))
}

/// The front end makes a client's socket, so nothing can be said here about whose it is.
fn refuse_server_keys(judge: &mut Judge, source: usize, port: &LoosePort) {
    let keys = [
        ("owner", port.owner.as_ref().map(|owner| Spot::of(source, owner))),
        ("group", port.group.as_ref().map(|group| Spot::of(source, group))),
        ("socket_mode", port.socket_mode.as_ref().map(|mode| Spot::of(source, mode))),
    ];
    for (key, written) in keys {
        if let Some(spot) = written {
            judge.sources.fault(spot, ConfigError::ServerOnly(key));
        }
    }
}

fn peer_uid(judge: &mut Judge, source: usize, peer: Spanned<LoosePeer>) -> Option<At<LooseId>> {
    let spot = Spot::of(source, &peer);
    let uid = peer.into_inner().uid;
    judge.require(uid.as_ref(), spot, &PEER_UID);
    at(source, uid)
}

fn label(number: i64, labels: Option<&RangeInclusive<Label>>) -> Result<Label, ConfigError> {
    let label = u32::try_from(number).ok().and_then(|number| Label::new(number).ok());
    let label = label.ok_or(ConfigError::OutOfRange {
        what: "label",
        value: number,
        min: Label::MIN.get().into(),
        max: Label::MAX.get().into(),
    })?;
    match labels {
        Some(range) if !range.contains(&label) => {
            Err(ConfigError::LabelOutside { label, range: range.clone() })
        }
        _ => Ok(label),
    }
}

fn bridge(text: &str) -> Result<String, ConfigError> {
    TapName::parse("bridge name", text).map(|name| name.to_string())
}

fn queue_pairs(number: i64, control_queue: bool) -> Result<u16, ConfigError> {
    match u16::try_from(number) {
        Ok(pairs @ 2..=QUEUE_PAIRS_MAX) if !control_queue => Err(ConfigError::PairsWithoutControl(pairs)),
        Ok(pairs @ 1..=QUEUE_PAIRS_MAX) => Ok(pairs),
        _ => {
            let (min, max) = (1, QUEUE_PAIRS_MAX.into());
            Err(ConfigError::OutOfRange { what: "queue_pairs", value: number, min, max })
        }
    }
}

fn poll_us(number: i64) -> Result<u16, ConfigError> {
    u16::try_from(number).ok().filter(|us| *us <= POLL_US_MAX).ok_or(ConfigError::OutOfRange {
        what: "poll_us",
        value: number,
        min: 0,
        max: POLL_US_MAX.into(),
    })
}

fn mtu(number: i64) -> Result<u16, ConfigError> {
    u16::try_from(number).ok().filter(|mtu| (MTU_MIN..=MTU_MAX).contains(mtu)).ok_or(
        ConfigError::OutOfRange { what: "mtu", value: number, min: MTU_MIN.into(), max: MTU_MAX.into() },
    )
}
