//! One measurement: what a backend used, how much went through, and what else the machine did meanwhile.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::process::{Usage, busy, peak, softirq_threads, usage};

/// What one run of one backend came to.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    /// Packets on the wire: a GSO frame is as many as it has segments.
    pub packets: u64,
    /// Bytes of the frames.
    pub bytes: u64,
    /// The time that it took, in seconds.
    pub seconds: f64,
    /// ns of CPU that the backend used, all its threads.
    pub cpu_ns: u64,
    /// How often its threads were woken up.
    pub wakeups: u64,
    /// The most memory that it held, in KiB; 0 where that is not the backend's own.
    pub peak_kib: u64,
    /// Round-trip times.
    pub latency: Option<Latency>,
    /// What everything else on the machine used, as a share of one processor.
    pub foreign: f64,
}

/// Percentiles of round-trip times, in µs.
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(missing_docs, reason = "percentiles")]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
}

impl Latency {
    /// Of these times.
    #[must_use]
    pub fn of(mut times: Vec<Duration>) -> Self {
        times.sort();
        let at = |thousandth: usize| {
            let time = times.get(times.len() * thousandth / 1000).or(times.last());
            time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
        };
        Self { p50: at(500), p99: at(990), p999: at(999) }
    }
}

/// What is read off a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The backend's CPU time per packet.
    Cpu,
    /// Packets a second.
    Packets,
    /// Bits a second.
    Bits,
    /// Wake-ups per packet.
    Wakeups,
    /// The most memory.
    Peak,
    /// The median round trip.
    Median,
    /// One round trip in a hundred takes longer.
    P99,
    /// One in a thousand.
    P999,
}

impl Metric {
    /// Its name with the unit.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Cpu => "CPU, ns/packet",
            Self::Packets => "Mpps",
            Self::Bits => "Gbit/s",
            Self::Wakeups => "wake-ups/1,000 packets",
            Self::Peak => "peak memory, MiB",
            Self::Median => "round trip p50, µs",
            Self::P99 => "p99, µs",
            Self::P999 => "p99.9, µs",
        }
    }

    /// Whether less is better.
    #[must_use]
    pub const fn is_cost(self) -> bool {
        !matches!(self, Self::Packets | Self::Bits)
    }

    /// Of a sample, in the unit of the title; `None` where that was not measured.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    pub fn of(self, sample: &Sample) -> Option<f64> {
        let per_packet = |count: u64| (sample.packets > 0).then(|| count as f64 / sample.packets as f64);
        match self {
            Self::Cpu => per_packet(sample.cpu_ns),
            Self::Wakeups => per_packet(sample.wakeups).map(|wakeups| wakeups * 1e3),
            Self::Packets => Some(sample.packets as f64 / sample.seconds / 1e6),
            Self::Bits => Some(sample.bytes as f64 * 8.0 / sample.seconds / 1e9),
            Self::Peak => (sample.peak_kib > 0).then(|| sample.peak_kib as f64 / 1024.0),
            Self::Median => sample.latency.map(|latency| latency.p50),
            Self::P99 => sample.latency.map(|latency| latency.p99),
            Self::P999 => sample.latency.map(|latency| latency.p999),
        }
    }
}

/// A measurement that is under way.
#[derive(Debug)]
pub struct Meter {
    backend: Vec<u32>,
    others: Vec<u32>,
    begin: Instant,
    before: (Usage, Usage, u64),
}

impl Meter {
    /// Begins. `others` take part too, beside this process.
    #[must_use]
    pub fn start(backend: Vec<u32>, mut others: Vec<u32>) -> Self {
        others.push(std::process::id());
        // What they do, they do for the frames of here.
        others.extend(softirq_threads());
        // Of many processes this takes a while, which is not to be a part of what is measured.
        let (ours, others_used) = (usage(&backend), usage(&others));
        Self { backend, others, before: (ours, others_used, busy()), begin: Instant::now() }
    }

    /// Ends. What went through is the caller's to say.
    #[must_use]
    pub fn stop(self) -> Sample {
        self.stop_after(0)
    }

    /// The same, when threads of this process that have ended used so many ns of CPU.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    pub fn stop_after(self, threads: u64) -> Sample {
        let (time, all) = (self.begin.elapsed(), busy());
        let (others, ours) = (usage(&self.others), usage(&self.backend));
        let cpu_ns = ours.cpu.saturating_sub(self.before.0.cpu);
        let known = threads + cpu_ns + others.cpu.saturating_sub(self.before.1.cpu);
        let unknown = all.saturating_sub(self.before.2).saturating_sub(known);
        Sample {
            seconds: time.as_secs_f64(),
            cpu_ns,
            wakeups: ours.sleeps.saturating_sub(self.before.0.sleeps),
            peak_kib: peak(&self.backend),
            foreign: unknown as f64 / 1e9 / time.as_secs_f64(),
            ..Sample::default()
        }
    }
}
