//! The plain loop that vmflow is compared with: a `writev` of header and frame, a `read`, for each frame, as every
//! simple backend does it. It has no ring: its frames lie in memory of its own.

use std::{
    io::IoSlice,
    os::fd::OwnedFd,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
    time::{ClockId, clock_gettime},
};
use vmflow_driver::vnet::{HEADER_SIZE, VnetHeader};

use crate::{
    BACKEND_CPU, PATIENCE,
    case::{Case, Traffic},
    driver::SLOTS,
    host::{Sender, takes_whole, wait_for_carrier},
    load::{Load, is_answer, ping, to_host},
    measure::{Latency, Meter, Sample},
    process::{own_sleeps, pin},
};

/// An eventfd's number.
const ONE: [u8; 8] = 1_u64.to_ne_bytes();
/// The largest frame with its header.
const LARGEST: usize = 1 << 17;

/// Runs a case on a tap.
///
/// # Errors
/// What the tap says; a case that the loop does not know.
pub fn run(case: &Case, tap: &str, time: Duration) -> Result<Sample> {
    let fd = vmflow::tap::attach(tap)?;
    wait_for_carrier(tap)?;
    match case.traffic {
        Traffic::Transmit => transmit(&fd, &case.load, time),
        Traffic::Receive => {
            vmflow::tap::set_offloads(&fd, case.features)?;
            receive(&fd, &case.load, takes_whole(tap)?, &Sender::on(tap)?, time)
        }
        Traffic::RoundTrip => round_trips(&fd, case.load.length, time),
        Traffic::Both | Traffic::Paced | Traffic::Burst => bail!("the plain loop does not do that"),
    }
}

/// What this thread, from now on on the backend's processor, used for its work: ns of CPU, sleeps, and what it came to.
fn counted<T>(work: impl FnOnce() -> Result<T>) -> Result<(u64, u64, T)> {
    pin(&[BACKEND_CPU])?;
    let before = (thread_cpu(), own_sleeps());
    let done = work()?;
    Ok((thread_cpu() - before.0, own_sleeps() - before.1, done))
}

/// The same of a thread of its own. The front end's processor is busy meanwhile, as it is beside other backends: the
/// two may be threads of one core.
fn measured<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<(u64, u64, T)> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| counted(work));
        while !thread.is_finished() {
            std::hint::spin_loop();
        }
        thread.join().unwrap_or_else(|_| bail!("the plain loop's thread panicked"))
    })
}

fn transmit(fd: &OwnedFd, load: &Load, time: Duration) -> Result<Sample> {
    let frames = load.frames(SLOTS, to_host());
    let mut memory = vec![0; frames.len() * load.stride()];
    for (room, frame) in memory.chunks_mut(load.stride()).zip(&frames) {
        room[..frame.bytes.len()].copy_from_slice(&frame.bytes);
    }
    let headers: Vec<_> = frames.iter().map(|frame| frame.header.bytes()).collect();
    let meter = Meter::start(Vec::new(), Vec::new());
    let (cpu_ns, wakeups, count) = measured(|| {
        let (begin, mut count) = (Instant::now(), 0);
        while begin.elapsed() < time {
            for (header, room) in headers.iter().zip(memory.chunks(load.stride())) {
                let frame = &room[..load.length];
                let written = rustix::io::writev(fd, &[IoSlice::new(header), IoSlice::new(frame)])?;
                ensure!(written == HEADER_SIZE + frame.len(), "a frame was cut");
            }
            count += headers.len() as u64;
        }
        Ok(count)
    })?;
    let (packets, bytes) = (count * load.packets(), count * load.length as u64);
    Ok(Sample { packets, bytes, cpu_ns, wakeups, peak_kib: 0, ..meter.stop_after(cpu_ns) })
}

fn receive(fd: &OwnedFd, load: &Load, whole: bool, sender: &Sender, time: Duration) -> Result<Sample> {
    let frame = load.frames(1, to_host().reversed()).remove(0);
    let (burst, frames) = load.burst(whole);
    let meter = Meter::start(Vec::new(), Vec::new());
    let (begin, mut sample, mut busy) = (Instant::now(), Sample::default(), Duration::ZERO);
    while begin.elapsed() < time {
        for _ in 0..burst {
            sender.send(&frame.header, &frame.bytes)?;
        }
        let (cpu, sleeps, (bytes, took)) = measured(|| {
            // A thread's start is no part of it.
            let now = Instant::now();
            Ok((read(fd, frames)?, now.elapsed()))
        })?;
        busy += took;
        sample.cpu_ns += cpu;
        sample.wakeups += sleeps;
        sample.packets += burst * load.packets();
        sample.bytes += bytes;
    }
    Ok(Sample { seconds: busy.as_secs_f64(), foreign: meter.stop_after(sample.cpu_ns).foreign, ..sample })
}

/// Reads so many frames; gives their bytes.
fn read(fd: &OwnedFd, frames: u64) -> Result<u64> {
    let mut buffer = vec![0; LARGEST];
    let (mut came, mut bytes) = (0, 0);
    while came < frames {
        match rustix::io::read(fd, &mut buffer[..]) {
            Ok(length) => {
                came += 1;
                bytes += (length - HEADER_SIZE) as u64;
            }
            Err(Errno::AGAIN) => {
                wait(&mut [PollFd::new(fd, PollFlags::IN)])?;
            }
            Err(e) => bail!("the tap: {e}"),
        }
    }
    Ok(bytes)
}

/// A loop that sleeps as vmflow's worker does, until there is a kick or a frame, and a front end that sleeps until it
/// is called.
fn round_trips(fd: &OwnedFd, length: usize, time: Duration) -> Result<Sample> {
    let [kick, call] = [(); 2].map(|()| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK));
    let (kick, call, end) = (kick?, call?, AtomicBool::new(false));
    let request = ping(to_host(), length);
    let meter = Meter::start(Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let device = scope.spawn(|| counted(|| answer(fd, &kick, &call, &request, &end)));
        let times = ask(&kick, &call, time);
        end.store(true, Ordering::SeqCst);
        rustix::io::write(&kick, &ONE)?;
        let (cpu_ns, wakeups, back) =
            device.join().unwrap_or_else(|_| bail!("the plain loop's thread panicked"))?;
        let times = times?;
        let trips = times.len() as u64;
        ensure!(back == trips, "{back} answers to {trips} requests");
        let bytes = 2 * trips * length as u64;
        let latency = Some(Latency::of(times));
        Ok(Sample {
            packets: 2 * trips,
            bytes,
            cpu_ns,
            wakeups,
            latency,
            peak_kib: 0,
            ..meter.stop_after(cpu_ns)
        })
    })
}

/// The front end: kicks, sleeps until the call.
fn ask(kick: &OwnedFd, call: &OwnedFd, time: Duration) -> Result<Vec<Duration>> {
    let (begin, mut times) = (Instant::now(), Vec::new());
    while begin.elapsed() < time {
        let now = Instant::now();
        rustix::io::write(kick, &ONE)?;
        wait(&mut [PollFd::new(call, PollFlags::IN)])?;
        rustix::io::read(call, &mut [0; 8])?;
        times.push(now.elapsed());
    }
    Ok(times)
}

/// The device: sends the request when it is kicked, calls when an answer came. Gives how many did.
fn answer(fd: &OwnedFd, kick: &OwnedFd, call: &OwnedFd, request: &[u8], end: &AtomicBool) -> Result<u64> {
    let header = VnetHeader::default().bytes();
    let (mut buffer, mut answers) = (vec![0; LARGEST], 0);
    loop {
        wait(&mut [PollFd::new(kick, PollFlags::IN), PollFd::new(fd, PollFlags::IN)])?;
        if rustix::io::read(kick, &mut [0; 8]).is_ok() {
            if end.load(Ordering::SeqCst) {
                return Ok(answers);
            }
            rustix::io::writev(fd, &[IoSlice::new(&header), IoSlice::new(request)])?;
        }
        let came = rustix::io::read(fd, &mut buffer[..]);
        if came.is_ok_and(|length| is_answer(&buffer[HEADER_SIZE..length], request)) {
            answers += 1;
            rustix::io::write(call, &ONE)?;
        }
    }
}

/// Sleeps until one of them has something.
fn wait(fds: &mut [PollFd<'_>]) -> Result<()> {
    let ready = poll(fds, Some(&Timespec::try_from(PATIENCE)?))?;
    ensure!(ready > 0, "nothing came in {PATIENCE:?}");
    Ok(())
}

fn thread_cpu() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}
