//! `vmflow stats --watch`: what flows per second, from one sample to the next.
//!
//! Time is the client's monotonic clock at the arrival of each answer, so a rate is off by what the answers'
//! ways differ in: microseconds on a unix socket.

use std::{
    io::Write,
    time::{Duration, Instant, SystemTime},
};

use tokio::time::{MissedTickBehavior, interval};

use super::{
    Client, ClientError,
    table::{Side, Sum, below, sums, table},
    units::{approximate, rate, share},
};
use crate::monitor::api::document::{Stats, rfc3339};

/// The shortest time between two samples.
pub const PERIOD_MIN: Duration = Duration::from_millis(100);

/// Moves the cursor to the top and clears the screen.
const CLEAR_SCREEN: &str = "\x1b[H\x1b[2J";

/// A document and when it arrived.
#[derive(Debug)]
pub struct Sample {
    /// When.
    pub at: Instant,
    /// What.
    pub stats: Stats,
}

/// What flowed per second between two samples, for one VM and direction.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rates {
    frames: f64,
    packets: f64,
    /// Bits on the wire.
    bits: f64,
    dropped: f64,
    tap_operations: f64,
    /// Suspect frames and all frames of the interval.
    suspect: (u64, u64),
}

impl Rates {
    /// None where a counter went back: it was begun anew, and nobody knows what flowed since.
    fn between(before: &Sum<'_>, now: &Sum<'_>, elapsed: Duration) -> Option<Self> {
        if elapsed.is_zero() {
            return None;
        }
        let change = |of: fn(&Sum<'_>) -> u64| of(now).checked_sub(of(before));
        let per_second = |change: u64| approximate(change) / elapsed.as_secs_f64();
        let frames = change(|sum| sum.totals.chains)?;
        Some(Self {
            frames: per_second(frames),
            packets: per_second(change(|sum| sum.all().packets)?),
            bits: per_second(change(|sum| sum.all().wire_bytes)?) * f64::from(u8::BITS),
            dropped: per_second(change(|sum| sum.totals.dropped_frames())?),
            tap_operations: per_second(change(|sum| sum.totals.tap_operations)?),
            suspect: (change(|sum| sum.totals.suspect.frames)?, change(|sum| sum.all().frames)?),
        })
    }
}

/// One block of output: rates since the sample before, then drop reasons and balance as they stand.
#[must_use]
pub fn block(before: Option<&Sample>, now: &Sample, wall_clock: SystemTime) -> String {
    use Side::{Left, Right};
    let columns = [
        ("VM", Left),
        ("DIRECTION", Left),
        ("FRAMES/S", Right),
        ("PACKETS/S", Right),
        ("BIT/S", Right),
        ("SUSPECT", Right),
        ("DROPPED/S", Right),
        ("TAP-OPS/S", Right),
    ];
    let elapsed = before.map(|before| now.at.saturating_duration_since(before.at));
    let earlier = before.map(|before| sums(&before.stats)).unwrap_or_default();
    let rows: Vec<_> = sums(&now.stats)
        .iter()
        .map(|sum| {
            // By label: a VM that was removed and added under the same name is another one.
            let same = |old: &&Sum<'_>| (old.vm.label, old.direction) == (sum.vm.label, sum.direction);
            let rates = earlier.iter().find(same).zip(elapsed);
            let rates = rates.and_then(|(old, elapsed)| Rates::between(old, sum, elapsed));
            row(sum, rates)
        })
        .collect();
    let since = match elapsed {
        Some(elapsed) => format!("rates over {:.2} s", elapsed.as_secs_f64()),
        None => "rates from the next sample on".to_owned(),
    };
    let head = format!("{} {}: {since}\n", rfc3339(wall_clock), now.stats.node);
    head + &table(columns, &rows) + &below(&now.stats)
}

fn row(sum: &Sum<'_>, rates: Option<Rates>) -> [String; 8] {
    let known = |of: fn(Rates) -> String| rates.map_or_else(|| "-".to_owned(), of);
    [
        sum.vm.name.clone(),
        sum.direction.to_string(),
        known(|rates| rate(rates.frames)),
        known(|rates| rate(rates.packets)),
        known(|rates| rate(rates.bits)),
        known(|Rates { suspect: (part, whole), .. }| share(part, whole)),
        known(|rates| rate(rates.dropped)),
        known(|rates| rate(rates.tap_operations)),
    ]
}

/// What is watched, and how it is shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watch<'a> {
    /// Only this VM.
    pub(super) vm: Option<&'a str>,
    pub(super) period: Duration,
    /// A document per line in place of tables.
    pub(super) json: bool,
    /// Each block is to stand on a screen of its own.
    pub(super) is_terminal: bool,
}

impl Watch<'_> {
    /// Prints a block per period until the output goes away. Once it has begun, a daemon that doesn't answer
    /// is said and waited for.
    ///
    /// # Errors
    /// [`ClientError`] where the first sample fails, or the output.
    pub(super) async fn run(&self, client: &Client, out: &mut impl Write) -> Result<(), ClientError> {
        if self.period < PERIOD_MIN {
            return Err(ClientError::Period(self.period));
        }
        let mut ticks = interval(self.period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut before, mut begun) = (None, false);
        loop {
            ticks.tick().await;
            let text = match self.next(client, &mut before).await {
                Err(error) if !begun => return Err(error),
                Err(error) => self.failure(&error),
                Ok(text) => text,
            };
            begun = true;
            out.write_all(self.framed(&text).as_bytes())
                .and_then(|()| out.flush())
                .map_err(ClientError::Output)?;
        }
    }

    async fn next(&self, client: &Client, before: &mut Option<Sample>) -> Result<String, ClientError> {
        if self.json {
            return client.stats_json(self.vm).await;
        }
        let stats = client.stats(self.vm).await?;
        let now = Sample { at: Instant::now(), stats };
        let text = block(before.as_ref(), &now, SystemTime::now());
        *before = Some(now);
        Ok(text)
    }

    fn failure(&self, error: &ClientError) -> String {
        if self.json {
            return format!("{}\n", serde_json::json!({ "error": error.to_string() }));
        }
        format!("{} {error}\n", rfc3339(SystemTime::now()))
    }

    fn framed(&self, text: &str) -> String {
        match (self.json, self.is_terminal) {
            (true, _) => text.to_owned(),
            (false, true) => format!("{CLEAR_SCREEN}{text}"),
            (false, false) => format!("{text}\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        client::table::fixture,
        monitor::api::document::{Receive, Transmit},
    };

    fn sample(at: Instant, stats: Stats) -> Sample {
        Sample { at, stats }
    }

    /// The rows of a block: what stands between the titles and the empty line.
    fn rows(text: &str) -> Vec<&str> {
        text.lines().skip(2).take_while(|line| !line.is_empty()).collect()
    }

    #[test]
    fn rates_are_what_flowed_per_second_on_the_wire() {
        let begin = Instant::now();
        let before = fixture::stats();
        let mut now = before.clone();
        let port = &mut now.vms[0].ports[0];
        let mut sent = crate::ledger::Totals::from(&port.transmit);
        // 3000 frames of one packet and 60 bytes, a third of them suspect, one in ten dropped, in 2 s.
        sent.chains += 3000;
        sent.passed.frames += 2700;
        sent.dropped[0] += 300;
        sent.suspect.frames += 1000;
        sent.suspect.packets += 1000;
        sent.suspect.wire_bytes += 60_000;
        sent.normal.frames += 2000;
        sent.normal.packets += 2000;
        sent.normal.wire_bytes += 120_000;
        sent.tap_operations += 100;
        port.transmit = Transmit::from(&sent);

        let after = sample(begin + Duration::from_secs(2), now);
        let text = block(Some(&sample(begin, before)), &after, SystemTime::UNIX_EPOCH);
        assert!(text.starts_with("1970-01-01T00:00:00Z host1: rates over 2.00 s\n"), "{text}");
        assert_eq!(
            rows(&text)[0].split_whitespace().collect::<Vec<_>>().join(" "),
            "web1 transmit 1.50 k 1.50 k 720 k 33.3 % 150 50.0"
        );
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn the_first_sample_has_no_rates() {
        let text = block(None, &sample(Instant::now(), fixture::stats()), SystemTime::UNIX_EPOCH);
        assert!(text.contains("host1: rates from the next sample on"));
        for row in rows(&text) {
            assert_eq!(row.split_whitespace().skip(2).collect::<Vec<_>>(), ["-"; 6], "{row}");
        }
    }

    #[test]
    fn a_counter_that_goes_back_gives_no_rate_and_never_a_negative_one() {
        let begin = Instant::now();
        let mut now = fixture::stats();
        // A daemon that lost its state begins at zero: the transmit side here, the receive side goes on.
        now.vms[0].ports[0].transmit = Transmit::from(&crate::ledger::Totals::default());
        let after = sample(begin + Duration::from_secs(1), now);
        let text = block(Some(&sample(begin, fixture::stats())), &after, SystemTime::UNIX_EPOCH);
        assert_eq!(rows(&text)[0].split_whitespace().skip(2).collect::<Vec<_>>(), ["-"; 6]);
        assert_eq!(
            rows(&text)[1].split_whitespace().skip(2).collect::<Vec<_>>(),
            ["0", "0", "0", "-", "0", "0"]
        );
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn a_counter_at_its_end_and_no_time_at_all_give_no_nonsense() {
        let begin = Instant::now();
        let mut now = fixture::stats();
        let mut most = crate::ledger::Totals::from(&now.vms[0].ports[0].receive);
        most.chains = u64::MAX;
        now.vms[0].ports[0].receive = Receive::from(&most);
        let at_once = block(
            Some(&sample(begin, fixture::stats())),
            &sample(begin, now.clone()),
            SystemTime::UNIX_EPOCH,
        );
        assert_eq!(rows(&at_once)[1].split_whitespace().skip(2).collect::<Vec<_>>(), ["-"; 6]);
        let later = sample(begin + Duration::from_secs(1), now);
        let text = block(Some(&sample(begin, fixture::stats())), &later, SystemTime::UNIX_EPOCH);
        assert!(rows(&text)[1].contains("18.4 E"), "{text}");
    }

    #[test]
    fn a_vm_with_another_label_is_another_vm() {
        let begin = Instant::now();
        let mut now = fixture::stats();
        now.vms[0].label = 99;
        let after = sample(begin + Duration::from_secs(1), now);
        let text = block(Some(&sample(begin, fixture::stats())), &after, SystemTime::UNIX_EPOCH);
        assert_eq!(rows(&text)[0].split_whitespace().skip(2).collect::<Vec<_>>(), ["-"; 6]);
        assert_eq!(rows(&text)[2].split_whitespace().nth(2), Some("0"), "the other VM has its rates");
    }
}
