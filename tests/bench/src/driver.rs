//! The driver of the tests as the front end.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vmflow_driver::{
    frame::Ends,
    net::{Config, Device, Pair},
    receive::Posting,
    transmit::{Layout, Traffic as Moved},
    vnet::VnetHeader,
};

use crate::{
    PATIENCE,
    backend::Backend,
    case::{Case, Traffic},
    host::{Sender, takes_whole, wait_for_carrier},
    load::{Change, Frame, Load, is_answer, ping, to_host},
    measure::{Latency, Meter, Sample},
};

/// Slots of each ring.
pub const SLOTS: u16 = 1024;
/// Slots of each ring that is filled at once: a few milliseconds' work.
const BURST: u16 = 8192;
/// Between two looks whether a ring is empty.
const LOOK: Duration = Duration::from_micros(50);
/// Frames that are sent, or taken, at once.
const BATCH: u16 = 64;
/// Frames on their way to a driver that sends meanwhile: fewer than a tap's queue and a ring hold.
const WINDOW: u64 = 512;
/// How often each port is served where the load is paced: a batch each time.
const PACE: Duration = Duration::from_millis(16);
/// Bytes of a page, which is what a driver posts for frames of any size.
const PAGE: u32 = 4096;
/// Pages that hold the largest frame.
const PAGES: usize = 17;

/// Runs a case once.
///
/// # Errors
/// What went wrong; counts that do not agree.
pub fn run(case: &Case, backend: &Backend, time: Duration) -> Result<Sample> {
    let mut devices = backend
        .sockets
        .iter()
        .map(|socket| Ok(Device::connect(socket, config(case))?))
        .collect::<Result<Vec<_>>>()?;
    for (device, tap) in devices.iter_mut().zip(&backend.taps) {
        device.settle()?;
        wait_for_carrier(tap)?;
        for pair in &mut device.pairs {
            prepare(pair, case)?;
        }
    }
    let sample = match case.traffic {
        Traffic::Transmit => transmit(case, backend, &mut devices, time),
        Traffic::Burst => bursts(case, backend, &mut devices, time),
        Traffic::Paced => paced(case, backend, &mut devices, time),
        Traffic::Receive => receive(case, backend, &mut devices[0], time),
        Traffic::Both => both(case, backend, &mut devices[0], time),
        Traffic::RoundTrip => round_trips(case, backend, &mut devices[0], time),
    }?;
    let (mut sent, mut got) = (Moved::default(), Moved::default());
    for totals in devices.iter().map(Device::totals) {
        sent += totals.0;
        got += totals.1;
    }
    backend.check(sent, Some(got))?;
    Ok(sample)
}

fn config(case: &Case) -> Config {
    let large = case.load.segment.is_some();
    Config {
        features: case.features,
        pairs: case.pairs,
        // Large frames in many slots would be more memory than a guest has at hand.
        queue_size: match case.traffic {
            Traffic::Burst => BURST,
            _ if large => SLOTS / 2,
            _ => SLOTS,
        },
        transmit_room: u32::try_from(case.load.stride()).unwrap_or(u32::MAX),
        posting: Posting::single(if large { PAGE } else { PAGE / 2 }),
        unmerged: case.wants_whole().then(|| Posting::chain(&[PAGE; PAGES])),
        patience: PATIENCE,
        ..Config::default()
    }
}

/// Lays the frames out.
fn prepare(pair: &mut Pair, case: &Case) -> Result<()> {
    pair.receive.watch = false;
    let frames = case.load.frames(pair.transmit.queue.ring().size(), to_host());
    let frame = |slot: u16| {
        let Frame { header, bytes } = &frames[usize::from(slot)];
        (bytes.as_slice(), *header)
    };
    Ok(pair.transmit.prefill_offloaded(frame)?)
}

fn pairs(devices: &mut [Device]) -> impl Iterator<Item = &mut Pair> {
    devices.iter_mut().flat_map(|device| &mut device.pairs)
}

/// Sends up to a batch; gives how many frames came back.
fn send(pair: &mut Pair, most: u16, change: Option<&mut Change>) -> Result<u64> {
    pair.transmit.queue.refuse_calls();
    match change {
        Some(change) => pair.transmit.send_changed(most, |frame, begin| change.write(frame, begin))?,
        None => pair.transmit.send_batch(most)?,
    };
    Ok(pair.transmit.reclaim()?)
}

/// Takes back all that is on its way.
fn drain(devices: &mut [Device]) -> Result<u64> {
    let mut back = 0;
    for pair in pairs(devices) {
        let mut moved = Progress::default();
        while pair.transmit.queue.in_flight() > 0 {
            back += moved.note(pair.transmit.reclaim()?)?;
        }
    }
    Ok(back)
}

fn change(load: &Load) -> Option<Change> {
    load.changes(SLOTS).then(|| Change::new(load.flows))
}

fn sent(case: &Case, frames: u64, sample: Sample) -> Sample {
    let bytes = frames * case.load.length as u64;
    Sample { packets: frames * case.load.packets(), bytes, ..sample }
}

fn transmit(case: &Case, backend: &Backend, devices: &mut [Device], time: Duration) -> Result<Sample> {
    let mut change = change(&case.load);
    let meter = Meter::start(backend.pids(), Vec::new());
    let (begin, mut frames, mut moved) = (Instant::now(), 0, Progress::default());
    while begin.elapsed() < time {
        let mut back = 0;
        for pair in pairs(devices) {
            back += send(pair, BATCH, change.as_mut())?;
        }
        frames += moved.note(back)?;
    }
    frames += drain(devices)?;
    Ok(sent(case, frames, meter.stop()))
}

/// Fills all rings and looks seldom whether they are empty.
fn bursts(case: &Case, backend: &Backend, devices: &mut [Device], time: Duration) -> Result<Sample> {
    let meter = Meter::start(backend.pids(), Vec::new());
    let (begin, mut busy, mut frames) = (Instant::now(), Duration::ZERO, 0);
    while begin.elapsed() < time {
        let (now, mut moved) = (Instant::now(), Progress::default());
        for pair in pairs(devices) {
            frames += send(pair, BURST, None)?;
        }
        while pairs(devices).any(|pair| pair.transmit.queue.in_flight() > 0) {
            std::thread::sleep(LOOK);
            let mut back = 0;
            for pair in pairs(devices) {
                back += pair.transmit.reclaim()?;
            }
            frames += moved.note(back)?;
        }
        busy += now.elapsed();
    }
    Ok(Sample { seconds: busy.as_secs_f64(), ..sent(case, frames, meter.stop()) })
}

/// Each port in turn, so that all have had a batch after [`PACE`].
fn paced(case: &Case, backend: &Backend, devices: &mut [Device], time: Duration) -> Result<Sample> {
    let step = PACE / u32::from(case.ports);
    // A whole number of turns, so that each port gets the same.
    let turns = (time.as_nanos() / PACE.as_nanos()).max(1);
    let meter = Meter::start(backend.pids(), Vec::new());
    let (mut next, mut frames) = (Instant::now(), 0);
    for _ in 0..turns {
        for pair in pairs(devices) {
            frames += send(pair, BATCH, None)?;
            next += step;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }
    frames += drain(devices)?;
    Ok(sent(case, frames, meter.stop()))
}

fn receive(case: &Case, backend: &Backend, device: &mut Device, time: Duration) -> Result<Sample> {
    let sender = Sender::on(&backend.taps[0])?;
    let frame = case.load.frames(1, to_host().reversed()).remove(0);
    let whole = takes_whole(&backend.taps[0])?;
    let (burst, frames) = case.load.burst(whole);
    let chains = chains(device, &frame, whole);
    let pair = device.first();
    let meter = Meter::start(backend.pids(), Vec::new());
    let (begin, mut packets, mut busy) = (Instant::now(), 0, Duration::ZERO);
    while begin.elapsed() < time {
        if backend.polls() {
            pair.receive.refill()?;
        }
        for _ in 0..burst {
            sender.send(&frame.header, &frame.bytes)?;
        }
        let now = Instant::now();
        take(pair, frames, if backend.polls() { 0 } else { frames * chains })?;
        busy += now.elapsed();
        packets += burst * case.load.packets();
    }
    let bytes = pair.receive.received().bytes;
    let sample = meter.stop();
    // One that polls has taken most of them before the last one was put there.
    let seconds = if backend.polls() { sample.seconds } else { busy.as_secs_f64() };
    Ok(Sample { packets, bytes, seconds, ..sample })
}

/// Chains that a frame fills.
fn chains(device: &Device, frame: &Frame, whole: bool) -> u64 {
    use vmflow_driver::{request::feature, vnet::HEADER_SIZE};
    let mergeable = device.agreed().features & feature::MRG_RXBUF != 0;
    let room = device.config().posting.lengths[0];
    let length = u64::try_from(frame.bytes.len() + HEADER_SIZE).unwrap_or(u64::MAX);
    if whole && mergeable { length.div_ceil(room.into()) } else { 1 }
}

/// Takes so many frames, posting so many chains as there is room: no more, for a backend that finds a chain reads the
/// next burst's first frames before the rest of it waits.
fn take(pair: &mut Pair, mut frames: u64, mut chains: u64) -> Result<()> {
    let mut moved = Progress::default();
    while frames > 0 {
        pair.receive.queue.refuse_calls();
        let most = u16::try_from(chains).unwrap_or(u16::MAX);
        if most > 0 {
            chains -= u64::from(pair.receive.post(most)?);
        }
        let came = pair.receive.take_batch(BATCH)?.traffic.frames;
        moved.note(came)?;
        ensure!(came <= frames, "more frames came than were sent");
        frames -= came;
    }
    Ok(())
}

fn both(case: &Case, backend: &Backend, device: &mut Device, time: Duration) -> Result<Sample> {
    let sender = Sender::on(&backend.taps[0])?;
    let frame = case.load.frames(1, to_host().reversed()).remove(0);
    device.first().receive.refill()?;
    let meter = Meter::start(backend.pids(), Vec::new());
    let (begin, mut fed, mut taken, mut frames) = (Instant::now(), 0, 0, 0);
    let mut moved = Progress::default();
    while begin.elapsed() < time || taken < fed {
        let pair = device.first();
        let more = begin.elapsed() < time;
        if more && fed - taken < WINDOW {
            for _ in 0..BATCH {
                sender.send(&frame.header, &frame.bytes)?;
            }
            fed += u64::from(BATCH);
        }
        let back = send(pair, if more { BATCH } else { 0 }, None)?;
        pair.receive.queue.refuse_calls();
        let got = pair.receive.drain_batch(BATCH)?.traffic.frames;
        frames += back;
        taken += got;
        moved.note(back + got)?;
    }
    frames += drain(std::slice::from_mut(device))?;
    Ok(sent(case, frames + taken, meter.stop()))
}

fn round_trips(case: &Case, backend: &Backend, device: &mut Device, time: Duration) -> Result<Sample> {
    let ends: Ends = to_host();
    let request = ping(ends, case.load.length);
    let pair = device.first();
    pair.receive.refill()?;
    let meter = Meter::start(backend.pids(), Vec::new());
    let (begin, mut times) = (Instant::now(), Vec::new());
    while begin.elapsed() < time {
        pair.transmit.queue.refuse_calls();
        let now = Instant::now();
        pair.transmit.send(&request, &VnetHeader::default(), Layout::Single)?;
        while !is_answer(&pair.receive.receive_within(PATIENCE)?.bytes, &request) {}
        times.push(now.elapsed());
        pair.transmit.reclaim()?;
        pair.receive.refill()?;
    }
    drain(std::slice::from_mut(device))?;
    let trips = 2 * times.len() as u64;
    Ok(Sample { latency: Some(Latency::of(times)), ..sent(case, trips, meter.stop()) })
}

/// Notices when nothing moves any more.
#[derive(Debug, Default)]
struct Progress(Option<Instant>);

impl Progress {
    fn note(&mut self, moved: u64) -> Result<u64> {
        if moved > 0 {
            self.0 = None;
        } else {
            let since = *self.0.get_or_insert_with(Instant::now);
            ensure!(since.elapsed() < PATIENCE, "nothing moved for {PATIENCE:?}");
        }
        Ok(moved)
    }
}
