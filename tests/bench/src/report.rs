//! What rounds come to: medians, ranges, ratios pair by pair; a table in Markdown, and everything in JSON.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    case::{GOALS, Goal, Rival},
    measure::Metric,
    run::{Outcome, Row},
};

/// What tables show beside the ratio.
const COLUMNS: [Metric; 8] = [
    Metric::Cpu,
    Metric::Packets,
    Metric::Bits,
    Metric::Wakeups,
    Metric::Peak,
    Metric::Median,
    Metric::P99,
    Metric::P999,
];

/// The middle and both ends of some figures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The lowest.
    pub low: f64,
    /// The highest.
    pub high: f64,
    /// How many there are.
    pub rounds: usize,
}

impl Spread {
    /// Of these figures, if they are enough: more than half of the rounds there were.
    ///
    /// # Errors
    /// How many there are.
    pub fn of(mut figures: Vec<f64>, rounds: usize) -> Result<Self, String> {
        figures.sort_by(f64::total_cmp);
        let enough = rounds / 2 + 1;
        match figures[..] {
            [low, .., high] | [low @ high] if figures.len() >= enough => {
                Ok(Self { median: median(&figures), low, high, rounds: figures.len() })
            }
            _ => Err(format!("too few clean rounds: {} of {rounds}", figures.len())),
        }
    }
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

impl Row {
    /// Why it failed, if it did.
    fn failure(&self) -> Option<&str> {
        self.outcomes.iter().find_map(|outcome| match outcome {
            Outcome::Failed(why) => Some(why.as_str()),
            _ => None,
        })
    }

    /// The figure of a round that counts.
    fn figure(&self, round: usize, metric: Metric) -> Option<f64> {
        match self.outcomes.get(round)? {
            Outcome::Clean(sample) => metric.of(sample),
            _ => None,
        }
    }

    /// Over all rounds that count.
    ///
    /// # Errors
    /// Why there is no figure.
    pub fn spread(&self, metric: Metric) -> Result<Spread, String> {
        if let Some(why) = self.failure() {
            return Err(format!("failed: {why}"));
        }
        let rounds = 0..self.outcomes.len();
        Spread::of(rounds.filter_map(|round| self.figure(round, metric)).collect(), self.outcomes.len())
    }

    /// How many times better this one is than another, in the rounds that count for both.
    ///
    /// # Errors
    /// Why there is no figure.
    pub fn times_better(&self, than: &Self, metric: Metric) -> Result<Spread, String> {
        for row in [self, than] {
            if let Some(why) = row.failure() {
                return Err(format!("{} failed: {why}", row.variant.name));
            }
        }
        let rounds = self.outcomes.len();
        let ratio = |round| {
            let (ours, theirs) = (self.figure(round, metric)?, than.figure(round, metric)?);
            Some(if metric.is_cost() { theirs / ours } else { ours / theirs })
        };
        Spread::of((0..rounds).filter_map(ratio).collect(), rounds)
    }

    fn disturbed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Disturbed(_))).count()
    }
}

/// A goal, and what became of it.
#[derive(Debug)]
pub struct Judged {
    /// The goal.
    pub goal: &'static Goal,
    /// Whom it was measured against, where that is a peer.
    pub peer: Option<String>,
    /// The ratio, or why there is none.
    pub ratio: Result<Spread, String>,
}

impl Judged {
    /// What the table says.
    #[must_use]
    pub fn verdict(&self) -> &'static str {
        match &self.ratio {
            Ok(ratio) if ratio.median >= self.goal.at_least => "met",
            Ok(_) => "MISSED",
            Err(_) => "not measured",
        }
    }

    /// What is wanted, of whom.
    #[must_use]
    pub fn title(&self) -> String {
        let peer = self.peer.as_deref().map(|peer| format!(" ({peer})")).unwrap_or_default();
        format!("{}{peer}", self.goal.what)
    }
}

/// Goals whose cases were asked for.
#[must_use]
pub fn judge(rows: &[Row]) -> Vec<Judged> {
    let find = |(group, name, rival): (&'static str, &'static str, Rival)| {
        let is =
            move |row: &&Row| row.case.group == group && row.case.name == name && row.variant.rival == rival;
        rows.iter().filter(is)
    };
    let mut judged = Vec::new();
    for goal in GOALS {
        let Some(better) = find(goal.better).next() else { continue };
        for than in find(goal.than) {
            let peer = (than.variant.rival == Rival::Peers).then(|| than.variant.name.clone());
            judged.push(Judged { goal, peer, ratio: better.times_better(than, goal.metric) });
        }
        if find(goal.than).next().is_none() {
            let ratio = Err("what it is compared with was not measured".into());
            judged.push(Judged { goal, peer: None, ratio });
        }
    }
    judged
}

/// The groups, in their order.
#[must_use]
pub fn groups(rows: &[Row]) -> Vec<&'static str> {
    let mut groups: Vec<_> = rows.iter().map(|row| row.case.group).collect();
    groups.dedup();
    groups
}

/// vmflow's own row of the same case.
#[must_use]
pub fn ours<'a>(rows: &'a [Row], of: &Row) -> Option<&'a Row> {
    let same = |row: &&Row| std::ptr::eq(row.case, of.case) && row.variant.rival == Rival::Vmflow;
    rows.iter().find(same).filter(|_| of.variant.rival != Rival::Vmflow)
}

/// The tables.
#[must_use]
pub fn markdown(rows: &[Row], about: &[(String, String)]) -> String {
    let mut text = String::from("# vmflow beside other backends\n\n");
    for (name, value) in about {
        let _ = writeln!(text, "* {name}: {value}");
    }
    text.push_str(
        "\nEach figure is the median of the rounds that count, with its range. A ratio is made within a round, of two \
         neighbours; the median is of these.\n\n## Goals\n\n| goal | at least | measured | range | rounds | |\n|---|---|---|---|---|---|\n",
    );
    for judged in judge(rows) {
        let (title, verdict, at_least) = (judged.title(), judged.verdict(), judged.goal.at_least);
        let measured = match &judged.ratio {
            Ok(ratio) => {
                format!("{:.2}x | {:.2} .. {:.2} | {}", ratio.median, ratio.low, ratio.high, ratio.rounds)
            }
            Err(why) => format!("{} | | ", cell(why)),
        };
        let _ = writeln!(text, "| {title} | {at_least:.2}x | {measured} | {verdict} |");
    }
    for group in groups(rows) {
        let _ = write!(text, "\n## {group}\n\n{}", table(rows, group));
    }
    text
}

fn table(rows: &[Row], group: &str) -> String {
    let of_group = || rows.iter().filter(|row| row.case.group == group);
    let has = |metric: &Metric| of_group().any(|row| row.spread(*metric).is_ok());
    let columns: Vec<Metric> = COLUMNS.into_iter().filter(has).collect();
    let head = ["case", "backend", "vmflow is better"].into_iter();
    let head = head.chain(columns.iter().map(|metric| metric.title())).chain(["left out"]);
    let mut text = line(head.map(str::to_owned));
    text.push_str(&line((0..columns.len() + 4).map(|_| "---".to_owned())));
    for row in of_group() {
        let (spread, ours) = (row.spread(row.case.metric), ours(rows, row));
        let ratio = match (&spread, ours.map(|ours| ours.times_better(row, row.case.metric))) {
            (Err(why), _) => cell(why),
            (Ok(_), Some(Err(why))) => cell(&why),
            (Ok(_), None) => String::new(),
            (Ok(_), Some(Ok(ratio))) => {
                format!("**{:.2}x** ({:.2} .. {:.2})", ratio.median, ratio.low, ratio.high)
            }
        };
        let name = [row.case.name.to_owned(), row.variant.name.clone(), ratio];
        let figures = columns.iter().map(|metric| figure(row.spread(*metric)));
        text.push_str(&line(name.into_iter().chain(figures).chain([row.disturbed().to_string()])));
    }
    text
}

/// A line of a table.
fn line(cells: impl Iterator<Item = String>) -> String {
    format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
}

fn figure(spread: Result<Spread, String>) -> String {
    spread.map_or_else(
        |_| String::new(),
        |Spread { median, low, high, .. }| format!("{} ({} .. {})", short(median), short(low), short(high)),
    )
}

/// Three digits that say something.
#[must_use]
pub fn short(figure: f64) -> String {
    match figure.abs() {
        100.0.. => format!("{figure:.0}"),
        10.0..100.0 => format!("{figure:.1}"),
        1.0..10.0 => format!("{figure:.2}"),
        _ => format!("{figure:.3}"),
    }
}

/// Text for a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "/")
}

/// Everything, for programs.
#[must_use]
pub fn document(rows: &[Row], about: &[(String, String)]) -> Value {
    let spread = |spread: Result<Spread, String>| match spread {
        Ok(spread) => json!(spread),
        Err(why) => json!({ "none": why }),
    };
    let goals: Vec<Value> = judge(rows)
        .into_iter()
        .map(|judged| {
            json!({ "goal": judged.title(), "at_least": judged.goal.at_least, "verdict": judged.verdict(),
                "ratio": spread(judged.ratio) })
        })
        .collect();
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let ratio = ours(rows, row).map(|ours| spread(ours.times_better(row, row.case.metric)));
            json!({ "group": row.case.group, "case": row.case.name, "backend": row.variant.name,
                "metric": row.case.metric.title(), "figure": spread(row.spread(row.case.metric)),
                "vmflow_is_better": ratio, "rounds": row.outcomes })
        })
        .collect();
    let about: serde_json::Map<_, _> =
        about.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    json!({ "about": about, "goals": goals, "rows": rows })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::{Kind, Variant},
        case::CASES,
        measure::Sample,
    };

    fn row(rival: Rival, costs: &[(u64, bool)]) -> Row {
        let outcomes = costs.iter().map(|(cpu_ns, clean)| {
            let sample = Sample { packets: 1, cpu_ns: *cpu_ns, seconds: 1.0, ..Sample::default() };
            if *clean { Outcome::Clean(sample) } else { Outcome::Disturbed(sample) }
        });
        let variant = Variant { name: format!("{rival:?}"), rival, kind: Kind::Plain };
        Row { case: &CASES[0], variant, outcomes: outcomes.collect() }
    }

    #[test]
    fn a_ratio_is_made_within_each_round_that_counts_for_both() {
        let ours = row(Rival::Vmflow, &[(100, true), (1000, true), (100, true), (50, false)]);
        let theirs = row(Rival::Plain, &[(150, true), (1200, true), (200, true), (900, true)]);
        let spread = Spread { median: 1.5, low: 1.2, high: 2.0, rounds: 3 };
        assert_eq!(ours.times_better(&theirs, Metric::Cpu), Ok(spread));
    }

    #[test]
    fn half_of_the_rounds_is_too_few() {
        let row = row(Rival::Vmflow, &[(100, true), (100, false), (100, true), (100, false)]);
        assert_eq!(row.spread(Metric::Cpu), Err("too few clean rounds: 2 of 4".into()));
        assert!(markdown(&[row], &[]).contains("too few clean rounds: 2 of 4"));
    }

    #[test]
    fn every_goal_is_about_cases_that_there_are() {
        for goal in GOALS {
            for (group, name, rival) in [goal.better, goal.than] {
                let case = CASES.iter().find(|case| case.group == group && case.name == name);
                assert!(case.is_some_and(|case| case.rivals.contains(&rival)), "{goal:?}");
            }
        }
    }

    #[test]
    fn a_goal_is_met_or_missed_by_the_median() {
        let rows = |plain| [row(Rival::Vmflow, &[(100, true); 3]), row(Rival::Plain, &[(plain, true); 3])];
        let verdict = |rows: &[Row]| {
            let judged = judge(rows);
            judged.iter().find(|judged| judged.goal.than.2 == Rival::Plain).map(Judged::verdict)
        };
        assert_eq!((verdict(&rows(120)), verdict(&rows(119))), (Some("met"), Some("MISSED")));
    }
}
