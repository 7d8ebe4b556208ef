//! The driver against a backend that shares nothing with it: DPDK's `dpdk-testpmd` with its vhost PMD,
//! which sends every frame back with its MAC addresses swapped.
//!
//! What DPDK 22.11 does, where it matters here: it polls, so without `EVENT_IDX` it never wants a kick, and
//! with it leaves `avail_event` alone; it starts at the used index whatever base it is told, if the two
//! differ; it takes `SET_VRING_ENABLE` at any time; it knows neither `CONFIG` nor `CONFIGURE_MEM_SLOTS`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver as Lines, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmflow_driver::channel::Channel;
use vmflow_driver::frame::{Ends, Segment, at, ethertype, pattern, swapped, tagged};
use vmflow_driver::memory::Layout as MemoryLayout;
use vmflow_driver::net::{Config, Device, FEATURES};
use vmflow_driver::receive::Posting;
use vmflow_driver::request::feature;
use vmflow_driver::sequence::Sequence;
use vmflow_driver::session::Session;
use vmflow_driver::transmit::{Layout, Traffic};
use vmflow_driver::vnet::VnetHeader;

/// The longest that anything here may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(20);
/// Room for a frame of 9,000 bytes in any layout used here.
const LARGE: u32 = 16 << 10;
/// The longest frame sent here.
const LONGEST: usize = 9000;

/// Each testpmd polls a core of its own: one at a time.
static ONE: Mutex<()> = Mutex::new(());
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A running testpmd.
struct Testpmd {
    child: Child,
    input: ChildStdin,
    lines: Lines<String>,
    seen: Vec<String>,
    prefix: String,
    socket: PathBuf,
    _one: MutexGuard<'static, ()>,
}

/// What testpmd itself says that it received and sent.
#[derive(Debug, PartialEq, Eq)]
struct Counted {
    received: u64,
    sent: u64,
    dropped: u64,
}

impl Testpmd {
    /// Listens at `socket()`, with so many queue pairs.
    fn listening(pairs: u16) -> Self {
        Self::forwarding(pairs, "")
    }

    /// Connects to `socket()`, every second until somebody listens there.
    fn connecting() -> Self {
        Self::forwarding(1, ",client=1")
    }

    /// Waits until it forwards: before, it throws away what it finds in the queues.
    fn forwarding(pairs: u16, options: &str) -> Self {
        let mut testpmd = Self::start(pairs, options);
        testpmd.wait_for("Press enter to exit");
        testpmd
    }

    fn start(pairs: u16, options: &str) -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let here = std::env::var_os("PATH").is_some_and(|path| {
            std::env::split_paths(&path).any(|directory| directory.join("dpdk-testpmd").exists())
        });
        assert!(here, "dpdk-testpmd is not installed; Debian has it in the package dpdk-dev");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("vmflow-driver-{}-{number}", std::process::id());
        let socket = std::env::temp_dir().join(format!("{prefix}.sock"));
        let mut child = Command::new("stdbuf")
            .args(["-oL", "dpdk-testpmd", "--no-pci", "--no-huge", "-m", "384", "-l", "0,1"])
            .arg(format!("--file-prefix={prefix}"))
            .arg(format!("--vdev=net_vhost0,iface={},queues={pairs}{options}", socket.display()))
            .args(["--", "--forward-mode=macswap", "-a", "--total-num-mbufs=8192"])
            .args([format!("--rxq={pairs}"), format!("--txq={pairs}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("stdbuf runs dpdk-testpmd");
        let (sender, lines) = channel();
        pass_on(child.stdout.take().expect("piped"), sender.clone());
        pass_on(child.stderr.take().expect("piped"), sender);
        let input = child.stdin.take().expect("piped");
        Self { child, input, lines, seen: Vec::new(), prefix, socket, _one: one }
    }

    fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits for a line with these words, and returns it.
    fn wait_for(&mut self, words: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            assert!(line.is_ok(), "testpmd never said {words:?}, but:\n{}", self.seen.join("\n"));
            self.seen.extend(line);
            if let Some(line) = self.seen.last().filter(|line| line.contains(words)) {
                return line.clone();
            }
        }
    }

    /// Ends it and returns what it counted.
    fn end(mut self) -> Counted {
        self.input.write_all(b"\n").expect("testpmd takes an end");
        self.wait_for("Accumulated forward statistics");
        let received = self.wait_for("RX-packets:");
        let sent = self.wait_for("TX-packets:");
        let [received, sent, dropped] =
            [(&received, "RX-packets:"), (&sent, "TX-packets:"), (&sent, "TX-dropped:")].map(number_in);
        Counted { received, sent, dropped }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // Both fail only where testpmd is gone already, which is what they are for.
        drop(self.child.kill());
        drop(self.child.wait());
        drop(std::fs::remove_file(&self.socket));
        drop(std::fs::remove_dir_all(Path::new("/var/run/dpdk").join(&self.prefix)));
    }
}

fn pass_on(from: impl Read + Send + 'static, to: Sender<String>) {
    thread::spawn(move || {
        // Ends with the pipe, or when the test is over and nobody listens.
        BufReader::new(from).lines().map_while(Result::ok).try_for_each(|line| to.send(line))
    });
}

/// The number behind a name in a line of statistics.
fn number_in((line, name): (&String, &str)) -> u64 {
    let number = line.split_once(name).and_then(|(_, rest)| rest.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).expect("a number")
}

fn connect(testpmd: &Testpmd, config: Config) -> Device {
    let device = Device::connect(testpmd.socket(), config).expect("device");
    // DPDK begins to forward after it has acknowledged the last message of a start.
    device.settle().expect("settled");
    device
}

/// Closes the connection; guest memory and rings stay.
fn leave(device: &mut Device, testpmd: &mut Testpmd) {
    let (nobody, _) = UnixStream::pair().expect("socketpair");
    device.session = Session::new(nobody.into());
    testpmd.wait_for("vhost peer closed");
}

/// Sends a frame through the first pair and checks what comes back. Returns how many chains it filled.
fn echo(device: &mut Device, frame: &[u8], layout: Layout<'_>) -> u16 {
    echo_at(device, 0, frame, layout)
}

fn echo_at(device: &mut Device, pair: usize, frame: &[u8], layout: Layout<'_>) -> u16 {
    let pair = &mut device.pairs[pair];
    pair.receive.refill().expect("posted");
    pair.transmit.send(frame, &VnetHeader::default(), layout).expect("sent");
    let back = pair.receive.receive_within(PATIENCE).expect("an echo");
    pair.transmit.drain(PATIENCE).expect("given back");
    assert!(back.bytes == swapped(frame), "{} bytes, {layout:?}: {:?}", frame.len(), back.header);
    assert_eq!(back.strays, 0, "bytes written outside of the frame");
    // DPDK leaves num_buffers as it is where buffers are not mergeable, though virtio 1 wants a 1 there.
    let merges = device.agreed().features & feature::MRG_RXBUF != 0;
    let num_buffers = if merges { back.buffers } else { back.header.num_buffers };
    assert_eq!(back.header, VnetHeader { num_buffers, ..VnetHeader::default() });
    back.buffers
}

/// A frame of any length from 14 bytes, different at each place.
fn frame(length: usize, number: u64) -> Vec<u8> {
    /// An `EtherType` for experiments.
    const EXPERIMENT: u16 = 0x88b5;
    Ends::default().ethernet(EXPERIMENT, &pattern(length - at::IP, number))
}

fn large(config: Config) -> Config {
    Config { transmit_room: LARGE, ..config }
}

fn totals(device: &Device) -> Counted {
    let (sent, received) = device.totals();
    Counted { received: sent.frames, sent: received.frames, dropped: 0 }
}

#[test]
fn frames_of_every_length_come_back_byte_for_byte() {
    let testpmd = Testpmd::listening(1);
    let mut device = connect(&testpmd, large(Config::default()));
    let mut bytes = 0;
    let lengths = (14..300).chain((300..LONGEST).step_by(97)).chain([1514, 1518, 1524, 1525, LONGEST]);
    for (length, number) in lengths.zip(0..) {
        let buffers = echo(&mut device, &frame(length, number), Layout::Single);
        assert_eq!(usize::from(buffers), (length + 12).div_ceil(1536), "buffers for {length} bytes");
        bytes += length as u64;
    }
    let (sent, received) = device.totals();
    assert_eq!(sent, received);
    assert_eq!(sent.bytes, bytes);
    assert_eq!(testpmd.end(), totals(&device), "testpmd's own counters");
}

#[test]
fn a_frame_may_be_cut_in_any_way() {
    let testpmd = Testpmd::listening(1);
    let config = large(Config { indirect: 128, ..Config::default() });
    let mut device = connect(&testpmd, config);
    let bytes = [1; 100];
    let direct = [
        Layout::Single,
        Layout::HeaderApart,
        Layout::Scattered(&[12, 14, 20, 8]),
        Layout::Scattered(&[1, 11]),
        Layout::Scattered(&[26, 1, 1, 1]),
        Layout::Scattered(&bytes),
        Layout::Scattered(&[13, 1000, 2000]),
    ];
    for length in [64, 65, 1514, 4000, LONGEST] {
        for (layout, number) in direct.iter().zip(0..) {
            echo(&mut device, &frame(length, number), *layout);
            echo(&mut device, &frame(length, number + 100), Layout::Indirect(layout));
        }
    }
    assert_eq!(testpmd.end(), totals(&device));
}

#[test]
fn frames_of_every_protocol_come_back() {
    let testpmd = Testpmd::listening(1);
    let mut device = connect(&testpmd, Config::default());
    let tags = [(ethertype::PROVIDER, 7), (ethertype::VLAN, 0x2008)];
    for ends in [Ends::default(), Ends::v6().reversed()] {
        for frame in [ends.udp(b"udp"), ends.tcp(Segment::default(), b"tcp"), ends.numbered(1500, 1)] {
            for count in 0..=tags.len() {
                echo(&mut device, &tagged(&frame, &tags[..count]), Layout::Single);
            }
        }
    }
    echo(&mut device, &Ends::default().arp(), Layout::HeaderApart);
    assert_eq!(testpmd.end(), totals(&device));
}

#[test]
fn without_mergeable_buffers_a_frame_fills_one_chain_of_any_kind() {
    let testpmd = Testpmd::listening(1);
    let features = FEATURES & !feature::MRG_RXBUF;
    let many = [300; 31];
    let postings = [
        Posting::single(LARGE),
        Posting::chain(&[12, 1514, 8000]),
        Posting::chain(&[1, 11, 4096, 4096, 4096]),
        Posting::chain(&many),
        Posting::chain(&many).indirect(),
        Posting::chain(&[12, 9000]).indirect(),
    ];
    for posting in postings {
        let config = large(Config { features, posting, indirect: 32, ..Config::default() });
        let mut device = connect(&testpmd, config);
        for (length, number) in [14, 60, 289, 1514, 4001, LONGEST].into_iter().zip(0..) {
            assert_eq!(echo(&mut device, &frame(length, number), Layout::HeaderApart), 1);
        }
    }
}

#[test]
fn a_large_frame_is_merged_from_many_small_buffers() {
    let testpmd = Testpmd::listening(1);
    let config = large(Config { posting: Posting::single(300), ..Config::default() });
    let mut device = connect(&testpmd, config);
    assert_eq!(echo(&mut device, &frame(288, 0), Layout::Single), 1);
    assert_eq!(echo(&mut device, &frame(289, 1), Layout::Single), 2);
    assert_eq!(echo(&mut device, &frame(LONGEST, 2), Layout::Single), 31);
}

/// Sends `count` frames with up to `window` on their way, each checked against its number, waiting only by
/// the calls of the backend.
fn stream(device: &mut Device, count: u64, window: u64) {
    let pair = device.first();
    let ends = Ends::default();
    let (mut sent, mut back) = (0, 0);
    while back < count {
        pair.receive.refill().expect("posted");
        while sent < count.min(back + window) {
            let length = 60 + usize::try_from(sent % 200).expect("small");
            pair.transmit
                .add(&ends.numbered(length, sent), &VnetHeader::default(), Layout::Single)
                .expect("room");
            sent += 1;
        }
        pair.transmit.flush().expect("kick");
        let mut frame = pair.receive.receive_within(PATIENCE).map(Some).expect("an echo");
        while let Some(received) = frame {
            let length = 60 + usize::try_from(back % 200).expect("small");
            assert!(received.bytes == swapped(&ends.numbered(length, back)), "frame {back}");
            back += 1;
            frame = pair.receive.receive().expect("no fault");
        }
        pair.transmit.reclaim().expect("no fault");
    }
    pair.transmit.drain(PATIENCE).expect("given back");
}

#[test]
fn no_call_is_lost_over_the_wrap_of_the_indices() {
    const FRAMES: u64 = 80_000;
    let testpmd = Testpmd::listening(1);
    for (features, start) in
        [(FEATURES, 0), (FEATURES, u16::MAX - 7), (FEATURES & !feature::EVENT_IDX, 40_000)]
    {
        let config = Config { features, start, ..Config::default() };
        let mut device = connect(&testpmd, config);
        assert_eq!(device.agreed().features, features);
        stream(&mut device, FRAMES, 64);
        let pair = device.first();
        let wrapped = u16::try_from((FRAMES + u64::from(start)) % (1 << 16)).expect("16 bits");
        assert_eq!(pair.transmit.queue.used_idx(), wrapped);
        assert_eq!(pair.receive.queue.used_idx(), wrapped);
        let calls = pair.receive.queue.notifications();
        assert!(calls.calls > 0 && calls.out_of_order == 0, "{calls:?}");
        // The first kick is the start's; DPDK polls and leaves avail_event at 0, so the wrap asks for one.
        let kicks = pair.transmit.queue.notifications().kicks;
        assert!((1..=3).contains(&kicks), "{kicks} kicks from {start}");
    }
}

#[test]
fn memory_may_have_holes_several_files_and_no_order() {
    let testpmd = Testpmd::listening(1);
    for layout in [MemoryLayout::with_hole(16 << 20), MemoryLayout::scattered(16 << 20, 5)] {
        let config = large(Config { memory: Some(layout), indirect: 16, ..Config::default() });
        let mut device = connect(&testpmd, config);
        for number in 0..300 {
            let layout = Layout::Scattered(&[5, 7, 14]);
            echo(&mut device, &frame(2000, number), layout);
            echo(&mut device, &frame(2000, number), Layout::Indirect(&layout));
        }
    }
}

#[test]
fn every_front_ends_order_of_messages_works_through_reset_and_reconnect() {
    let mut testpmd = Testpmd::listening(1);
    let in_order = FEATURES | feature::IN_ORDER;
    for (sequence, features) in [
        (Sequence::Plain, FEATURES),
        (Sequence::Qemu, FEATURES),
        (Sequence::Qemu7, in_order),
        (Sequence::CloudHypervisor, FEATURES),
        (Sequence::CloudHypervisor, in_order),
    ] {
        let config = Config { sequence, features, start: 65_530, ..Config::default() };
        let mut device = connect(&testpmd, config);
        stream(&mut device, 1000, 32);

        let bases = device.reset(100).expect("reset");
        device.settle().expect("settled");
        let wrapped = 65_530_u16.wrapping_add(1000);
        assert_eq!(bases[1], wrapped, "the backend took what was sent");
        assert_eq!(device.first().receive.queue.in_flight(), 0);
        stream(&mut device, 1000, 32);

        device.first().receive.refill().expect("posted");
        assert_eq!(device.first().receive.queue.in_flight(), 256);
        leave(&mut device, &mut testpmd);
        device.reconnect(testpmd.socket()).expect("reconnect");
        device.settle().expect("settled");
        stream(&mut device, 1000, 32);
        let (sent, received) = device.totals();
        assert_eq!(sent, received, "{sequence:?}");
        assert_eq!(sent.frames, 3000);
        device.shut_down().expect("shutdown");
        testpmd.wait_for("vhost peer closed");
    }
    let all = testpmd.end();
    assert_eq!(all, Counted { received: 15_000, sent: 15_000, dropped: 0 });
}

#[test]
fn frames_sent_while_nobody_is_there_are_taken_once_somebody_is() {
    /// Fewer than the ring has entries.
    const WAITING: u64 = 100;
    let mut testpmd = Testpmd::listening(1);
    let mut back = 0;
    for sequence in [Sequence::Qemu, Sequence::CloudHypervisor] {
        let config = Config { sequence, ..Config::default() };
        let mut device = connect(&testpmd, config);
        echo(&mut device, &frame(100, 0), Layout::Single);
        leave(&mut device, &mut testpmd);
        let pair = device.first();
        pair.receive.refill().expect("posted");
        for number in 1..=WAITING {
            pair.transmit.send(&frame(100, number), &VnetHeader::default(), Layout::Single).expect("room");
        }
        device.reconnect(testpmd.socket()).expect("reconnect");
        device.settle().expect("settled");
        let pair = device.first();
        pair.transmit.drain(PATIENCE).expect("all taken");
        pair.transmit.send(&frame(100, WAITING + 1), &VnetHeader::default(), Layout::Single).expect("room");
        let mut last = 0;
        while last <= WAITING {
            let received = pair.receive.receive_within(PATIENCE).expect("an echo");
            let newer =
                (last + 1..=WAITING + 1).find(|number| received.bytes == swapped(&frame(100, *number)));
            last = newer.expect("frames come in order, none twice");
        }
        back += device.totals().1.frames;
        drop(device);
        testpmd.wait_for("vhost peer closed");
    }
    // While it starts, DPDK takes frames for a moment before it can send them on; it counts what it drops.
    let Counted { received, sent, dropped } = testpmd.end();
    assert_eq!(received, 2 * (WAITING + 2));
    assert_eq!((sent, dropped), (back, received - back));
}

#[test]
fn each_queue_pair_is_a_loop_of_its_own() {
    let testpmd = Testpmd::listening(2);
    for sequence in [Sequence::Plain, Sequence::Qemu, Sequence::CloudHypervisor] {
        let config = Config { sequence, pairs: 2, features: FEATURES | feature::MQ, ..Config::default() };
        let mut device = connect(&testpmd, config);
        for number in 0..100 {
            for pair in [0, 1] {
                echo_at(&mut device, pair, &frame(200, number), Layout::Single);
            }
        }
        let first = device.pairs[0].receive.received();
        assert_eq!(first, Traffic { frames: 100, bytes: 20_000 });
        assert_eq!(device.pairs[1].receive.received(), first);
    }
}

#[test]
fn a_backend_that_connects_is_served_again_and_again() {
    let mut testpmd = Testpmd::connecting();
    let listener = UnixListener::bind(testpmd.socket()).expect("a socket");
    let config = Config { patience: PATIENCE, ..Config::default() };
    let mut device = Device::accept(&listener, config).expect("device");
    device.settle().expect("settled");
    stream(&mut device, 100, 16);
    leave(&mut device, &mut testpmd);
    device.reconnect_over(Channel::accept(&listener, PATIENCE).expect("it comes again")).expect("reconnect");
    device.settle().expect("settled");
    stream(&mut device, 100, 16);
    assert_eq!(testpmd.end(), Counted { received: 200, sent: 200, dropped: 0 });
}

#[test]
fn prefilled_batches_are_counted_as_testpmd_counts_them() {
    const FRAMES: u64 = 200_000;
    let testpmd = Testpmd::listening(1);
    let mut device = connect(&testpmd, Config::default());
    let pair = device.first();
    let frame = Ends::default().numbered(64, 7);
    pair.receive.refill().expect("posted");
    pair.transmit.prefill(|_| &frame).expect("room");
    let until = Instant::now() + PATIENCE;
    let mut back = Traffic::default();
    let mut sent = 0;
    while back.frames < FRAMES {
        assert!(Instant::now() < until, "{sent} sent, {back:?} back");
        // No more on their way than there are buffers for, or testpmd drops them.
        let room = (FRAMES - sent).min(200 - (sent - back.frames));
        let most = u16::try_from(room).expect("a window");
        sent += u64::from(pair.transmit.send_batch(most).expect("kick"));
        pair.transmit.reclaim().expect("no fault");
        back += pair.receive.drain_batch(64).expect("no fault").traffic;
    }
    assert_eq!(back, Traffic { frames: FRAMES, bytes: FRAMES * 64 });
    assert_eq!(pair.transmit.sent(), back);
    assert_eq!(testpmd.end(), Counted { received: FRAMES, sent: FRAMES, dropped: 0 });
}
