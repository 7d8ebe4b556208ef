//! The data path does not allocate: a worker runs in this process, whose allocator counts what the worker's queue
//! threads ask for, while a driver sends and gets every kind of frame.
//!
//! ```text
//!   driver --- vhost-user --- worker (this process) --- tap in a network namespace --- packet socket
//!                              |  policy, ledger
//!                             test
//! ```

#![expect(clippy::unwrap_used, clippy::panic, reason = "what a test cannot go on without fails it")]
#![expect(unreachable_pub, reason = "a test program exports nothing")]
#![expect(unsafe_code, reason = "an allocator that counts")]

#[path = "harness/mod.rs"]
mod harness;
#[allow(dead_code, reason = "the packet socket serves other tests too")]
#[path = "integration/coalesce/spec.rs"]
mod spec;
#[allow(dead_code, reason = "the packet socket serves other tests too")]
#[path = "integration/wire.rs"]
mod wire;

use std::{
    alloc::{GlobalAlloc, Layout as Wanted, System},
    cell::Cell,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::atomic::{AtomicU64, Ordering},
    thread::JoinHandle,
};

use rustix::event::{EventfdFlags, eventfd};
use vmflow::{
    keeper::{brief::Brief, process::Inherited},
    label::Label,
    ledger::{DropReason, Known, Ledger, Part, Totals},
    policy::{
        Policy, SuspectAction,
        handover::{self, Packet},
    },
    worker::{self, Orders},
};
use vmflow_driver::{
    channel::Channel,
    frame::Ends,
    net::{Config, Device, FEATURES},
    queue::Buffer,
    receive::Posting,
    request::feature,
    transmit::Layout,
    vnet::{VnetHeader, flag, gso},
};

use harness::{Netns, PATIENCE, unique, wait_for};
use spec::{DONT_FRAGMENT, IpSum, PSH, Sent, Spec, Sum, TCP, UDP};
use wire::Wire;

/// Counts allocations of the worker's queue threads.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// How the crate names the threads that serve queues.
const QUEUE_THREAD: &[u8] = b"vring_worker";

thread_local! {
    /// Whether this thread serves queues; nothing before it was looked up.
    static SERVES: Cell<Option<bool>> = const { Cell::new(None) };
}

fn serves_queues() -> bool {
    // A thread at its end has no such variables any more; no frame is moved then.
    let known = SERVES.try_with(|serves| {
        serves.get().unwrap_or_else(|| {
            let mut name = [0_u8; 16];
            // SAFETY: PR_GET_NAME writes at most 16 bytes, which `name` has.
            unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
            let is_one = name.starts_with(QUEUE_THREAD);
            // A thread gets its name after its first allocations.
            if is_one {
                serves.set(Some(true));
            }
            is_one
        })
    });
    known.unwrap_or(false)
}

fn count() {
    if serves_queues() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is the system's allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, wanted: Wanted) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are those that the system's allocator wants.
        unsafe { System.alloc(wanted) }
    }
    unsafe fn dealloc(&self, place: *mut u8, wanted: Wanted) {
        count();
        // SAFETY: as above.
        unsafe { System.dealloc(place, wanted) }
    }
    unsafe fn realloc(&self, place: *mut u8, wanted: Wanted, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(place, wanted, size) }
    }
}

/// All offloads of a Linux guest.
const OFFLOADS: u64 = feature::CSUM
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_USO
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6;
/// Longest packet that the tap takes.
const MTU: u16 = 9000;
/// Room for the longest frame.
const ROOM: u32 = 40_000;
/// How often each kind of frame is sent.
const TIMES: usize = 20;
/// How often each kind of frame is received: more than the guest has buffers for.
const BURST: usize = 60;

/// A worker, its driver and its tap.
struct Bed {
    // Dropped first: the worker ends when its front end hangs up.
    device: Option<Device>,
    worker: Option<JoinHandle<i32>>,
    wire: Wire,
    ledger: Ledger,
    policies: OwnedFd,
    _netns: Netns,
}

impl Bed {
    fn new() -> Self {
        let netns = Netns::new();
        let name = unique("t");
        let tap = netns.inside(|| vmflow::tap::attach(&name)).unwrap();
        netns.run("ip", &["link", "set", &name, "mtu", &MTU.to_string(), "txqueuelen", "4000", "up"]);
        let wire = Wire::open(&netns, &name);
        let (ledger, file) = Ledger::create(1).unwrap();
        let (policies, of_worker) = handover::pair().unwrap();
        let (front_end, _) = UnixStream::pair().unwrap();
        let inherited =
            Inherited { front_end: front_end.into(), ledger: file, policies: of_worker, tap: vec![tap] };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("worker.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let worker = std::thread::spawn(move || run_worker(&inherited, &listener));
        let features = FEATURES | OFFLOADS;
        let posting = Posting::single(1536);
        let config = Config {
            features,
            posting,
            queue_size: 1024,
            indirect: 16,
            transmit_room: ROOM,
            patience: PATIENCE,
            ..Config::default()
        };
        let mut device = Device::over(Channel::connect(&path).unwrap(), config).unwrap();
        device.first().receive.refill().unwrap();
        let next = || handover::receive(&policies).ok();
        let ready = wait_for("the worker", next).unwrap().0;
        assert_eq!(ready, Packet::Ready);
        Self { device: Some(device), worker: Some(worker), wire, ledger, policies, _netns: netns }
    }

    /// Does what the monitor does: nothing passes before a policy is acknowledged.
    fn hand_over(&self, policy: &Policy) {
        let file = policy.seal().unwrap();
        handover::send(&self.policies, Packet::Policy(policy.generation), Some(file.as_fd())).unwrap();
        let answer = wait_for("the worker", || handover::receive(&self.policies).ok()).unwrap().0;
        assert_eq!(answer, Packet::Acknowledged(policy.generation));
    }

    fn device(&mut self) -> &mut Device {
        self.device.as_mut().unwrap()
    }

    /// Of transmit and receive.
    fn totals(&self) -> [Totals; 2] {
        [Part::transmit(0), Part::receive(0)].map(|part| {
            let mut known = Known::new(part);
            known.refresh(&self.ledger);
            *known.totals()
        })
    }

    /// Has the guest send what the test adds, all at once, and waits until it has everything back.
    fn transmit(&mut self, add: impl FnOnce(&mut Device)) {
        add(self.device());
        let transmit = &mut self.device().first().transmit;
        transmit.flush().unwrap();
        transmit.drain(PATIENCE).unwrap();
        while self.wire.try_receive().is_some() {}
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        drop(self.device.take());
        let ended = self.worker.take().unwrap().join();
        if !std::thread::panicking() {
            assert_eq!(ended.unwrap(), 0);
        }
    }
}

fn run_worker(inherited: &Inherited, listener: &UnixListener) -> i32 {
    let again = [eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()];
    let brief = Brief {
        monitor: std::process::id(),
        vm: "web1".into(),
        label: 1,
        port: 0,
        uid: 0,
        queue_pairs: 1,
        mtu: MTU,
        mac: None,
        control_queue: false,
        uso: true,
        coalesce: true,
        poll_us: 0,
    };
    worker::run(&Orders { brief: &brief, inherited, listener: listener.as_fd(), again: &again, session: 1 })
}

/// Frames that go together, frames that go alone, and those that are refused.
fn frames() -> Vec<Sent> {
    let flow = |protocol, v6, payload| Spec::plain(protocol, v6, payload);
    let stamps = vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    let runs = [
        flow(TCP, false, 1000),
        Spec { options: stamps, tags: vec![(0x8100, 5)], ..flow(TCP, true, 100) },
        Spec { fragment: DONT_FRAGMENT, ..flow(UDP, false, 18) },
        Spec { sum: Sum::Unfinished(0), ..flow(UDP, true, 1400) },
    ];
    let mut frames = Vec::new();
    for first in runs {
        let next = |spec: &Spec| Spec {
            sequence: spec.sequence.wrapping_add(u32::try_from(spec.payload).unwrap()),
            id: spec.id.wrapping_add(1),
            ..spec.clone()
        };
        let run = std::iter::successors(Some(first), |spec| Some(next(spec)));
        frames.extend(run.take(12).map(|spec| spec.sent()));
    }
    let tcp = || flow(TCP, false, 500);
    let gso =
        |protocol, v6| Spec { sum: Sum::Unfinished(0), gso_size: Some(1000), ..flow(protocol, v6, 8000) };
    let alone = [
        Spec { sum: Sum::Wrong(1), ..tcp() },
        Spec { ip_sum: IpSum::Wrong(1), ..tcp() },
        Spec { flags: PSH, padding: 6, ..tcp() },
        Spec { ip_options: 3, ..tcp() },
        Spec { fragment: 0x2000, ..flow(UDP, false, 64) },
        Spec { tags: vec![(0x88a8, 1), (0x8100, 2), (0x8100, 3)], ..tcp() },
        Spec { extension: true, ..flow(UDP, true, 64) },
        flow(1, false, 64),
        flow(TCP, false, 8000), // longer than what is looked at
        gso(TCP, false),
        gso(TCP, true),
        gso(UDP, false),
        // Refused: longer than the MTU; its checksum is nowhere.
        flow(UDP, false, usize::from(MTU)),
        Spec { sum: Sum::Unfinished(0), ..flow(1, false, 64) },
    ];
    frames.extend(alone.iter().map(Spec::sent));
    let plain = |bytes: &[u8], header| Sent { header, bytes: bytes.to_vec(), may_be_refused: true };
    let ethernet = Ends::default().ethernet(0x88b5, &[0; 46]);
    frames.push(plain(&ethernet, VnetHeader::default()));
    frames.push(plain(&[0; 9], VnetHeader::default())); // too short for a frame
    frames.push(plain(
        &ethernet,
        VnetHeader { flags: flag::NEEDS_CSUM, csum_start: 2, ..VnetHeader::default() },
    ));
    frames.push(plain(&ethernet, VnetHeader { gso_type: gso::UDP, ..VnetHeader::default() }));
    frames
}

/// Chains that are no frames.
fn malformed(device: &mut Device) -> u64 {
    let room = device.first().transmit.room(0).unwrap().guest;
    let chain = |addr, len, writable| [Buffer { addr, len, writable }];
    let chains = [
        chain(room, 11, false),
        chain(room, 100, true),
        chain(0xffff_ffff_0000, 100, false),
        chain(u64::MAX - 10, 100, false),
        chain(room, 2 << 20, false),
    ];
    for chain in &chains {
        device.first().transmit.add_chain(chain, false).unwrap();
    }
    u64::try_from(chains.len()).unwrap()
}

/// Everything that a guest can send, in every layout. Gives how many chains it was.
fn send_everything(bed: &mut Bed) -> u64 {
    let layouts = [
        Layout::Single,
        Layout::HeaderApart,
        Layout::Scattered(&[5, 7, 1, 20, 0, 300]),
        Layout::Indirect(&Layout::Scattered(&[12, 40, 100])),
    ];
    let frames = frames();
    let mut chains = 0;
    for layout in layouts {
        bed.transmit(|device| {
            for Sent { header, bytes, .. } in &frames {
                device.first().transmit.add(bytes, header, layout).unwrap();
            }
            chains += u64::try_from(frames.len()).unwrap() + malformed(device);
        });
    }
    chains
}

/// Frames of every size and offload for the guest, at first more than it has buffers for. Gives how many.
fn receive_everything(bed: &mut Bed) -> u64 {
    let gso = |protocol, v6| Spec {
        sum: Sum::Unfinished(0),
        gso_size: Some(1000),
        ..Spec::plain(protocol, v6, 8000)
    };
    let unfinished = Spec { sum: Sum::Unfinished(0), ..Spec::plain(UDP, false, 100) };
    let plain = [0, 100, 1000, 1400, 5000, 8900].map(|payload| Spec::plain(TCP, false, payload));
    let frames: Vec<_> =
        plain.iter().chain([&unfinished, &gso(TCP, false), &gso(TCP, true)]).map(Spec::sent).collect();
    for Sent { header, bytes, .. } in std::iter::repeat_n(&frames, BURST).flatten() {
        bed.wire.send_with(header, bytes);
    }
    let sent = u64::try_from(BURST * frames.len()).unwrap();
    let receive = &mut bed.device().first().receive;
    for _ in 0..sent {
        receive.receive_within(PATIENCE).unwrap();
        // Only now and then: frames wait for buffers.
        if receive.queue.in_flight() < 8 {
            receive.refill().unwrap();
        }
    }
    receive.refill().unwrap();
    sent
}

/// Runs `load` many times, of which none may allocate; the first time everything is set up. Gives what `load`
/// gave, added up, and what was counted meanwhile.
fn without_allocation(bed: &mut Bed, load: impl Fn(&mut Bed) -> [u64; 2]) -> ([u64; 2], [Totals; 4]) {
    load(bed);
    let set_up = ALLOCATIONS.load(Ordering::Relaxed);
    assert!(set_up > 0, "no thread is called {}", String::from_utf8_lossy(QUEUE_THREAD));
    let before = bed.totals();
    let mut done = [0; 2];
    for _ in 0..TIMES {
        let [sent, got] = load(bed);
        done = [done[0] + sent, done[1] + got];
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - set_up, 0);
    let after = bed.totals();
    assert!(after.iter().all(Totals::balances));
    (done, [before[0], before[1], after[0], after[1]])
}

#[test]
fn the_queues_thread_does_not_allocate_whatever_the_guest_sends_and_gets() {
    let mut bed = Bed::new();
    let policy = Policy {
        generation: 1,
        label: Label::new(1).unwrap(),
        tagged: false,
        suspect_action: SuspectAction::Drop,
    };
    bed.hand_over(&policy);
    let both = |bed: &mut Bed| [send_everything(bed), receive_everything(bed)];
    let ([chains, reads], [sent_before, got_before, sent, got]) = without_allocation(&mut bed, both);
    assert_eq!((sent.chains - sent_before.chains, got.chains - got_before.chains), (chains, reads));
    // All of it happened: frames went together and alone, and were refused for each reason that there can be.
    let writes = sent.tap_operations - sent_before.tap_operations;
    let passed = sent.passed.frames - sent_before.passed.frames;
    assert!(writes < passed && writes > passed / 10, "{writes} writes of {passed} frames");
    let dropped = |reason: DropReason| sent.dropped[reason.index()] - sent_before.dropped[reason.index()];
    for reason in [
        DropReason::Malformed,
        DropReason::Runt,
        DropReason::Oversize,
        DropReason::BadOffload,
        DropReason::NotNegotiated,
    ] {
        assert!(dropped(reason) > 0, "{reason:?}");
    }
    assert_eq!(got.passed.frames - got_before.passed.frames, reads);

    // What the policy drops.
    bed.hand_over(&Policy { generation: 2, tagged: true, ..policy });
    let ([chains, _], [before, _, after, _]) = without_allocation(&mut bed, |bed| [send_everything(bed), 0]);
    assert_eq!((after.chains - before.chains, after.passed), (chains, before.passed));
    assert!(
        after.dropped[DropReason::SuspectPolicy.index()] > before.dropped[DropReason::SuspectPolicy.index()]
    );
}
