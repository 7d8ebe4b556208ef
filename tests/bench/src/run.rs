//! One case with one backend, once; and all of them, in turn.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::{
    backend::{Backend, Kind, Variant},
    case::{Case, Front},
    driver,
    guest::{self, Nic},
    host::Network,
    measure::Sample,
    plain, testpmd,
};

/// What became of one run.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nobody else was busy.
    Clean(Sample),
    /// Somebody else was: it does not count.
    Disturbed(Sample),
    /// Why there is nothing.
    Failed(String),
}

/// A case with a backend, and what became of it round by round.
#[derive(Debug)]
pub struct Row {
    /// The case.
    pub case: &'static Case,
    /// The backend.
    pub variant: Variant,
    /// One for each round.
    pub outcomes: Vec<Outcome>,
}

/// How to run all of them.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How often.
    pub rounds: usize,
    /// How long each takes.
    pub time: Duration,
    /// A run during which anything else used more of a processor than this is disturbed.
    pub tolerance: f64,
}

/// Runs all rows in turn, round by round. A row that has failed is not tried again: it says why.
pub fn all(rows: &mut [Row], network: &Network, plan: Plan) {
    let Plan { rounds, time, tolerance } = plan;
    let begin = Instant::now();
    for round in 0..rounds {
        for row in rows.iter_mut().filter(|row| round < row.case.rounds) {
            if matches!(row.outcomes.last(), Some(Outcome::Failed(_))) {
                continue;
            }
            let outcome = outcome(once(row.case, &row.variant, network, time), tolerance);
            eprintln!(
                "bench: {:4} s, round {}/{}: {}, {}: {}",
                begin.elapsed().as_secs(),
                round + 1,
                rounds.min(row.case.rounds),
                row.case.title(),
                row.variant.name,
                said(row.case, &outcome)
            );
            row.outcomes.push(outcome);
        }
    }
}

fn outcome(result: Result<Sample>, tolerance: f64) -> Outcome {
    match result {
        // One line.
        Err(error) => Outcome::Failed(format!("{error:#}").replace('\n', " / ")),
        Ok(sample) if sample.foreign > tolerance => Outcome::Disturbed(sample),
        Ok(sample) => Outcome::Clean(sample),
    }
}

fn said(case: &Case, outcome: &Outcome) -> String {
    let figure = |sample| case.metric.of(sample).unwrap_or(f64::NAN);
    match outcome {
        Outcome::Clean(sample) => format!("{:.2} {}", figure(sample), case.metric.title()),
        Outcome::Disturbed(sample) => {
            format!("left out: something else used {:.0} % of a processor", sample.foreign * 1e2)
        }
        Outcome::Failed(why) => format!("failed: {why}"),
    }
}

fn once(case: &Case, variant: &Variant, network: &Network, time: Duration) -> Result<Sample> {
    let backend = Backend::start(&variant.kind, case, network)?;
    let tap = || network.tap(case.sink, case.pairs, 0);
    match (case.front, &backend) {
        (Front::Guest { iperf, device }, backend) => {
            let nic = match (backend, &variant.kind) {
                (Some(backend), _) => Nic::Backend(backend),
                (None, Kind::Qemu { vhost }) => Nic::Tap { name: tap()?, vhost: *vhost },
                (None, _) => bail!("a guest cannot connect to this"),
            };
            guest::run(case, (iperf, device), &nic, time)
        }
        (Front::Driver, None) if matches!(variant.kind, Kind::Plain) => plain::run(case, &tap()?, time),
        (front, backend) => {
            let backend = backend.as_ref().context("this backend has no socket")?;
            match front {
                Front::Testpmd(words) => testpmd::run(case, words, backend, time),
                _ => driver::run(case, backend, time),
            }
        }
    }
}
