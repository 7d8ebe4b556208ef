//! What the monitor does by itself, once a second: write numbers to disk, and look whether all is well.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    rc::Rc,
    time::Duration,
};

use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{Host, PATIENCE};
use crate::monitor::{
    api::health::{Check, Health, Problem},
    checkpoint::PortKey,
    ports::Port,
};

/// How often.
const PERIOD: Duration = Duration::from_secs(1);
/// A worker that dies this often within [`WINDOW`] keeps dying.
const DEATHS: u64 = 3;
/// The time in which deaths are counted.
const WINDOW: Duration = Duration::from_secs(60);

/// What was seen of each port.
#[derive(Debug, Default)]
pub(super) struct Watch(RefCell<BTreeMap<PortKey, Seen>>);

#[derive(Debug, Default)]
struct Seen {
    /// How many workers had died by when, as far as the window goes back.
    deaths: VecDeque<(Instant, u64)>,
    /// Since when the worker has not taken its policy.
    awaits_policy: Option<Instant>,
}

impl Seen {
    fn look(&mut self, now: Instant, deaths: u64, awaits_policy: bool) {
        self.deaths.push_back((now, deaths));
        while self.deaths.front().is_some_and(|(at, _)| now.duration_since(*at) > WINDOW) {
            self.deaths.pop_front();
        }
        self.awaits_policy = awaits_policy.then(|| self.awaits_policy.unwrap_or(now));
    }

    /// Workers that died within the window.
    fn deaths(&self) -> u64 {
        let ends = self.deaths.front().zip(self.deaths.back());
        ends.map_or(0, |((_, first), (_, last))| last.saturating_sub(*first))
    }
}

impl Watch {
    fn look(&self, ports: &[Rc<Port>]) {
        let now = Instant::now();
        let mut before = self.0.take();
        let look = |port: &Rc<Port>| {
            let mut seen = before.remove(&key(port)).unwrap_or_default();
            seen.look(now, port.tally.worker_restarts(), port.awaits_policy());
            (key(port), seen)
        };
        self.0.replace(ports.iter().map(look).collect());
    }
}

fn key(port: &Port) -> PortKey {
    (port.brief.label(), port.brief.port)
}

impl Host {
    /// Does once a second what is to be done, for as long as it is polled.
    pub async fn keep_up(&self) {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            period.tick().await;
            self.watch.look(&self.ports());
            self.checkpoint.write(|| self.ports()).await;
        }
    }

    /// Writes the last numbers; all of them, if the ports have `ended`.
    pub async fn finish_numbers(&self, ended: bool) {
        self.checkpoint.finish(|| self.ports(), ended).await;
    }

    /// Whether all is well.
    pub(super) fn health(&self) -> Health {
        let ports = self.ports();
        let watch = self.watch.0.borrow();
        let of_ports = |why: &dyn Fn(&Port, Option<&Seen>) -> Option<String>| {
            let problem = |port: &Rc<Port>| Some(Problem::of(&port.brief, why(port, watch.get(&key(port)))?));
            ports.iter().filter_map(problem).collect()
        };
        let checkpoint = self.checkpoint.trouble().into_iter().map(Problem::of_host).collect();
        let taps = of_ports(&|port, _| port.tap_trouble().map(str::to_owned));
        let workers = of_ports(&|_, seen| {
            let deaths = seen.map(Seen::deaths).filter(|deaths| *deaths >= DEATHS)?;
            Some(format!("{deaths} workers died within {} s", WINDOW.as_secs()))
        });
        let policies = of_ports(&|port, seen| {
            let since = seen?.awaits_policy.filter(|_| port.awaits_policy())?;
            let late = since.elapsed() > PATIENCE;
            late.then(|| {
                "the worker has not taken its policy: it passes nothing, or under an older one".into()
            })
        });
        Health::new(vec![
            Check::new("checkpoint", checkpoint),
            Check::new("taps", taps),
            Check::new("workers", workers),
            Check::new("policies", policies),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deaths_count_for_a_minute_and_those_of_earlier_runs_not_at_all() {
        let (mut seen, begin) = (Seen::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        for (second, deaths) in [(0, 100), (1, 101), (50, 102), (60, 103)] {
            seen.look(at(second), deaths, false);
        }
        assert_eq!(seen.deaths(), 3);
        seen.look(at(62), 103, false);
        assert_eq!(seen.deaths(), 1, "that between 1 and 50 s, and the first, are over");
        seen.look(at(200), 103, false);
        assert_eq!(seen.deaths(), 0);
    }

    #[test]
    fn waiting_begins_when_it_was_seen_first_and_ends_when_it_is_over() {
        let (mut seen, begin) = (Seen::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        seen.look(at(1), 0, true);
        seen.look(at(2), 0, true);
        assert_eq!(seen.awaits_policy, Some(at(1)));
        seen.look(at(3), 0, false);
        assert_eq!(seen.awaits_policy, None);
    }
}
