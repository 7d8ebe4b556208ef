//! Mixes of frames: runs of flows, broken in every way.

use proptest::prelude::*;

use vmflow_driver::vnet::{VnetHeader, flag};

use super::bed::MTU;
use super::spec::{ACK, DONT_FRAGMENT, IpSum, MORE_FRAGMENTS, PSH, Sent, Spec, Sum, TCP, UDP};

/// Payload of frames that must go together, at most: two of them are copied in any case.
const MOST: usize = 1400;

/// What the guest sends at once.
#[derive(Clone, Debug)]
pub struct Mix {
    runs: Vec<Run>,
    /// What is no frame for the host, and where it is.
    junk: Vec<(prop::sample::Index, Junk)>,
}

/// What is dropped.
#[derive(Clone, Copy, Debug)]
enum Junk {
    /// Shorter than an Ethernet header.
    Runt,
    /// Longer than the MTU.
    Oversize,
    /// It wants a checksum that it cannot have.
    BadOffload,
}

impl Junk {
    fn sent(self) -> Sent {
        let plain = Spec::plain(UDP, false, 100).sent();
        let Sent { header, bytes, .. } = match self {
            Self::Runt => Sent { bytes: vec![0; 13], ..plain },
            Self::Oversize => Spec::plain(UDP, false, MTU).sent(),
            Self::BadOffload => {
                Sent { header: VnetHeader { flags: flag::NEEDS_CSUM, ..VnetHeader::default() }, ..plain }
            }
        };
        Sent { header, bytes, may_be_refused: true }
    }
}

/// Frames of one flow, each as the one before would have it go on, but for the twists.
#[derive(Clone, Debug)]
struct Run {
    first: Spec,
    frames: usize,
    ids: Ids,
    /// Payload of the last one, if that is another.
    last: Option<usize>,
    /// The last one pushes.
    push: bool,
    twists: Vec<(prop::sample::Index, Twist)>,
    /// Its frames and those of the run before take turns.
    takes_turns: bool,
}

#[derive(Clone, Copy, Debug)]
enum Ids {
    Consecutive,
    Same,
    Any,
}

/// What is done to one frame of a run.
#[derive(Clone, Debug)]
enum Twist {
    Tags(Vec<(u16, u16)>),
    Tos(u8),
    Hops(u8),
    Id(u16),
    Fragment(u16),
    IpOptions(u8),
    Label(u32),
    Extension,
    Sequence(u32),
    Acknowledged(u32),
    Flags(u8),
    Reserved(u8),
    Window(u16),
    Urgent(u16),
    Options(Vec<u8>),
    Payload(usize),
    Sum(Sum),
    SumsToZero(Sum),
    IpSum(IpSum),
    Padding(usize),
    IpLength(u16),
    UdpLength(u16),
    Protocol(u8),
    Gso(u16),
}

impl Twist {
    fn apply(&self, spec: &mut Spec) {
        match self {
            Self::Tags(tags) => spec.tags.clone_from(tags),
            Self::Tos(tos) => spec.tos = *tos,
            Self::Hops(hops) => spec.hops = *hops,
            Self::Id(id) => spec.id = *id,
            Self::Fragment(fragment) => spec.fragment = *fragment,
            Self::IpOptions(words) => spec.ip_options = *words,
            Self::Label(label) => spec.label = *label,
            Self::Extension => spec.extension = spec.v6,
            Self::Sequence(more) => spec.sequence = spec.sequence.wrapping_add(*more),
            Self::Acknowledged(more) => spec.acknowledged = spec.acknowledged.wrapping_add(*more),
            Self::Flags(flags) => spec.flags ^= flags,
            Self::Reserved(reserved) => spec.reserved = *reserved,
            Self::Window(window) => spec.window = *window,
            Self::Urgent(urgent) => spec.urgent = *urgent,
            Self::Options(options) => spec.options.clone_from(options),
            Self::Payload(payload) => spec.payload = *payload,
            Self::Sum(sum) => spec.sum = *sum,
            Self::SumsToZero(sum) => (spec.sums_to_zero, spec.sum) = (true, *sum),
            Self::IpSum(sum) => spec.ip_sum = *sum,
            Self::Padding(padding) => spec.padding = *padding,
            Self::IpLength(more) => spec.ip_length = *more,
            Self::UdpLength(more) => spec.udp_length = *more,
            Self::Protocol(protocol) => spec.protocol = *protocol,
            Self::Gso(size) => spec.gso_size = Some(*size),
        }
    }
}

/// If it is to be a GSO frame: one of three packets, the last a short one, where its flow can have one.
fn make_gso(spec: &mut Spec) {
    let Some(size) = spec.gso_size.take() else { return };
    let can = (spec.protocol == TCP || spec.protocol == UDP) && !spec.extension && spec.ip_options == 0;
    if can && spec.fragment & !DONT_FRAGMENT == 0 && spec.padding == 0 {
        spec.payload = usize::from(size) * 5 / 2;
        (spec.ip_length, spec.udp_length) = (0, 0);
        spec.sum = Sum::Unfinished(0);
        spec.gso_size = Some(size);
    }
}

impl Mix {
    /// What is sent, in its order.
    pub fn sent(&self) -> Vec<Sent> {
        let mut sent: Vec<_> = self.frames().iter().map(Spec::sent).collect();
        for (place, junk) in &self.junk {
            sent.insert(place.index(sent.len() + 1), junk.sent());
        }
        sent
    }

    fn frames(&self) -> Vec<Spec> {
        let mut all: Vec<Spec> = Vec::new();
        let mut before = 0;
        for (flow, run) in (0..).zip(&self.runs) {
            let frames = run.frames(flow);
            let here = all.len();
            if run.takes_turns {
                let earlier = all.split_off(before);
                all.extend(take_turns(earlier, frames));
            } else {
                all.extend(frames);
            }
            before = here.min(all.len());
        }
        for (number, frame) in (1..).zip(&mut all) {
            frame.number = number;
        }
        all
    }

    /// True if some run is so long and so usual that frames of it must go together.
    pub fn must_coalesce(&self) -> bool {
        self.runs.iter().enumerate().any(|(number, run)| {
            let mixed = run.takes_turns || self.runs.get(number + 1).is_some_and(|next| next.takes_turns);
            !mixed && run.is_usual()
        })
    }
}

/// One of each, until one side has no more.
fn take_turns(left: Vec<Spec>, right: Vec<Spec>) -> Vec<Spec> {
    let (mut left, mut right) = (left.into_iter(), right.into_iter());
    let mut all = Vec::new();
    loop {
        let (one, other) = (left.next(), right.next());
        if one.is_none() && other.is_none() {
            return all;
        }
        all.extend(one);
        all.extend(other);
    }
}

impl Run {
    fn frames(&self, flow: u8) -> Vec<Spec> {
        let mut next = Spec { flow, ..self.first.clone() };
        let mut frames = Vec::new();
        for number in 0..self.frames {
            let mut frame = next.clone();
            if number + 1 == self.frames {
                frame.payload = self.last.unwrap_or(frame.payload);
                frame.flags |= if self.push { PSH } else { 0 };
            }
            for (index, twist) in &self.twists {
                if index.index(self.frames) == number {
                    twist.apply(&mut frame);
                }
            }
            make_gso(&mut frame);
            if frame.may_be_refused() {
                // Its payload says which one it is, and so whether it came.
                frame.payload = frame.payload.max(8);
            }
            next.sequence = next.sequence.wrapping_add(u32::try_from(frame.payload).unwrap());
            next.id = match self.ids {
                Ids::Consecutive => next.id.wrapping_add(1),
                Ids::Same => next.id,
                Ids::Any => next.id.wrapping_mul(0x6255).wrapping_add(0x3619),
            };
            frames.push(frame);
        }
        frames
    }

    fn is_usual(&self) -> bool {
        let first = &self.first;
        let id_is_right = first.v6 || matches!(self.ids, Ids::Consecutive) || first.fragment == DONT_FRAGMENT;
        let sum_is_right =
            matches!(first.sum, Sum::Right | Sum::Unfinished(0)) && first.ip_sum == IpSum::Right;
        let plain = first.ip_options == 0 && !first.extension && first.tags.len() <= 2;
        let exact = (first.padding, first.ip_length, first.udp_length) == (0, 0, 0);
        let whole = first.fragment & !DONT_FRAGMENT == 0;
        let protocol =
            first.protocol == UDP || first.protocol == TCP && first.flags == ACK && first.urgent == 0;
        self.frames >= 8
            && first.gso_size.is_none()
            && self.twists.is_empty()
            && (8..=MOST).contains(&first.payload)
            && self.last.is_none_or(|last| last > 0)
            && id_is_right
            && sum_is_right
            && (plain && exact && whole && protocol)
    }
}

fn tags() -> impl Strategy<Value = Vec<(u16, u16)>> {
    // Priorities and VLANs of few values, so that some are the same.
    let rest = prop::sample::select(vec![1, 2, 0x2001, 0x1001, 0xefff]);
    let kind = prop::sample::select(vec![0x8100, 0x88a8]);
    prop_oneof![4 => Just(Vec::new()), 1 => prop::collection::vec((kind, rest), 1..4)]
}

/// TCP options: none, time stamps, and others in whole words.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let stamps = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    prop_oneof![
        2 => Just(Vec::new()),
        2 => Just(stamps.to_vec()),
        1 => any::<u8>().prop_map(move |byte| [&stamps[..8], &[byte, 0, 0, 2][..]].concat()),
        1 => (1..=10_usize).prop_map(|words| vec![1; 4 * words]),
    ]
}

fn sum() -> impl Strategy<Value = Sum> {
    prop_oneof![
        2 => Just(Sum::Right),
        1 => (1..=u16::MAX).prop_map(Sum::Wrong),
        1 => Just(Sum::Zero),
        1 => Just(Sum::Ones),
        2 => Just(Sum::Unfinished(0)),
        1 => (1..=u16::MAX).prop_map(Sum::Unfinished),
    ]
}

fn ip_sum() -> impl Strategy<Value = IpSum> {
    prop_oneof![Just(IpSum::Right), Just(IpSum::Ones), (1..=u16::MAX).prop_map(IpSum::Wrong)]
}

fn payload() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(0),
        4 => 1..64_usize,
        4 => prop::sample::select(vec![18, 19, 100, 512, 1000]),
        1 => 1..1400_usize,
        1 => prop::sample::select(vec![3900, 5000, 8800]), // few of these make a packet
    ]
}

fn fragment() -> impl Strategy<Value = u16> {
    prop_oneof![
        4 => Just(0),
        4 => Just(DONT_FRAGMENT),
        1 => Just(MORE_FRAGMENTS),
        1 => Just(185),
        1 => Just(0x8000), // the flag that is reserved
        1 => any::<u16>(),
    ]
}

/// A difference in a length: mostly a small one.
fn length() -> impl Strategy<Value = u16> {
    prop_oneof![prop::sample::select(vec![1, 2, 8, u16::MAX, u16::MAX - 1, u16::MAX - 7]), any::<u16>()]
}

fn twist() -> impl Strategy<Value = Twist> {
    let ip = prop_oneof![
        tags().prop_map(Twist::Tags),
        any::<u8>().prop_map(Twist::Tos),
        any::<u8>().prop_map(Twist::Hops),
        any::<u16>().prop_map(Twist::Id),
        fragment().prop_map(Twist::Fragment),
        (1..=10_u8).prop_map(Twist::IpOptions),
        (0..1_u32 << 20).prop_map(Twist::Label),
        Just(Twist::Extension),
        ip_sum().prop_map(Twist::IpSum),
        (1..60_usize).prop_map(Twist::Padding),
        length().prop_map(Twist::IpLength),
        prop::sample::select(vec![TCP, UDP, 1, 132, 136]).prop_map(Twist::Protocol),
    ];
    let tcp = prop_oneof![
        length().prop_map(|more| Twist::Sequence(more.into())),
        any::<u32>().prop_map(Twist::Sequence),
        any::<u32>().prop_map(Twist::Acknowledged),
        (0..8_u32).prop_map(|bit| Twist::Flags(1 << bit)),
        any::<u8>().prop_map(Twist::Flags),
        (1..16_u8).prop_map(Twist::Reserved),
        any::<u16>().prop_map(Twist::Window),
        any::<u16>().prop_map(Twist::Urgent),
        options().prop_map(Twist::Options),
    ];
    let both = prop_oneof![
        2 => payload().prop_map(Twist::Payload),
        2 => sum().prop_map(Twist::Sum),
        1 => sum().prop_map(Twist::SumsToZero),
        1 => length().prop_map(Twist::UdpLength),
        1 => (48..1000_u16).prop_map(Twist::Gso),
    ];
    prop_oneof![ip, tcp, both]
}

/// The first frame of a run: mostly a usual one.
fn first() -> impl Strategy<Value = Spec> {
    let protocol = prop_oneof![4 => Just(TCP), 4 => Just(UDP), 1 => Just(136), 1 => Just(1)];
    let network =
        (any::<bool>(), tags(), fragment(), any::<u16>(), prop_oneof![8 => Just(0), 1 => any::<u8>()]);
    let sum = prop_oneof![4 => Just(Sum::Right), 2 => Just(Sum::Unfinished(0)), 1 => sum()];
    let odd = prop_oneof![
        6 => Just(None),
        1 => twist().prop_map(Some),
    ];
    let sequence = prop_oneof![4 => Just(1000), 1 => Just(u32::MAX - 500)];
    (protocol, network, payload(), options(), sequence, sum, odd).prop_map(
        |(protocol, (v6, tags, fragment, id, tos), payload, options, sequence, sum, odd)| {
            let plain = Spec::plain(protocol, v6, payload);
            let mut first = Spec { tags, tos, id, fragment, sequence, options, sum, ..plain };
            if let Some(odd) = odd {
                odd.apply(&mut first);
            }
            first
        },
    )
}

fn run(frames: usize) -> impl Strategy<Value = Run> {
    let ids = prop_oneof![4 => Just(Ids::Consecutive), 1 => Just(Ids::Same), 1 => Just(Ids::Any)];
    let last = prop_oneof![2 => Just(None), 1 => payload().prop_map(Some)];
    let twists = prop::collection::vec((any::<prop::sample::Index>(), twist()), 0..4);
    (first(), 1..=frames, ids, last, any::<bool>(), twists, prop::bool::weighted(0.2)).prop_map(
        |(first, frames, ids, last, push, twists, takes_turns)| Run {
            first,
            frames,
            ids,
            last,
            push,
            twists,
            takes_turns,
        },
    )
}

/// Mixes of up to `runs` runs of up to `frames` frames.
pub fn mixes(runs: usize, frames: usize) -> impl Strategy<Value = Mix> {
    let junk = prop::sample::select(vec![Junk::Runt, Junk::Oversize, Junk::BadOffload]);
    let junk = prop::collection::vec((any::<prop::sample::Index>(), junk), 0..3);
    let runs = prop::collection::vec(run(frames), 1..=runs);
    (runs, junk).prop_map(|(runs, junk)| Mix { runs, junk })
}
