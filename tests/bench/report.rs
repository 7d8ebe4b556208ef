//! Pairs of figures, and what they come to.

use std::fmt;

/// What was measured in turn: ours, theirs.
pub struct Series {
    name: String,
    pairs: Vec<(f64, f64)>,
}

impl Series {
    pub fn new(name: String) -> Self {
        Self { name, pairs: Vec::new() }
    }

    pub fn push(&mut self, ours: f64, theirs: f64) {
        self.pairs.push((ours, theirs));
    }

    fn sorted(&self, value: impl Fn(&(f64, f64)) -> f64) -> Vec<f64> {
        let mut values: Vec<f64> = self.pairs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values
    }
}

/// A row of a Markdown table: medians, and the ratio pair by pair.
impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let median = |values: &[f64]| values.get(values.len() / 2).copied().unwrap_or(f64::NAN);
        let ratios = self.sorted(|(ours, theirs)| theirs / ours);
        let range = (ratios.first().copied().unwrap_or(f64::NAN), ratios.last().copied().unwrap_or(f64::NAN));
        write!(
            f,
            "| {} | {:.0} | {:.0} | {:.2} | {:.2} .. {:.2} |",
            self.name,
            median(&self.sorted(|pair| pair.0)),
            median(&self.sorted(|pair| pair.1)),
            median(&ratios),
            range.0,
            range.1
        )
    }
}
