//! Charts: horizontal bars with their range, drawn as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::{DrawingArea, IntoDrawingArea, PathElement, RGBColor, Rectangle, SVGBackend, Text, WHITE},
    style::{
        Color, IntoFont, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};

use crate::{
    case::Rival,
    measure::Metric,
    report::{Judged, Spread, ours, short},
    run::Row,
};

const WIDTH: i32 = 1000;
/// Where bars begin, and the room to their right for what is said about them.
const LEFT: i32 = 210;
const RIGHT: i32 = 260;
const HEAD: i32 = 56;
const FOOT: i32 = 30;
const BAR: i32 = 22;
const TITLE: i32 = 26;
const GAP: i32 = 10;
/// The longest that fits to the right of a bar of no length.
const LONGEST: usize = 100;

const BLACK: RGBColor = RGBColor(30, 30, 30);
const GREY: RGBColor = RGBColor(150, 150, 150);
const LIGHT: RGBColor = RGBColor(225, 225, 225);
const GOOD: RGBColor = RGBColor(44, 140, 80);
const BAD: RGBColor = RGBColor(200, 60, 50);
const NEUTRAL: RGBColor = RGBColor(120, 130, 145);

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A chart.
#[derive(Debug)]
pub struct Chart {
    title: String,
    unit: String,
    clusters: Vec<(String, Vec<Bar>)>,
}

/// A bar, or why there is none.
#[derive(Debug)]
struct Bar {
    name: String,
    spread: Result<Spread, String>,
    /// What is said beside the figure.
    note: String,
    color: RGBColor,
    /// A mark at a figure that is wanted.
    mark: Option<f64>,
}

impl Chart {
    /// The cases of a group that show this metric; `None` if there are none.
    #[must_use]
    pub fn of_group(rows: &[Row], group: &str, metric: Metric) -> Option<Self> {
        let mut clusters: Vec<(String, Vec<Bar>)> = Vec::new();
        for row in rows.iter().filter(|row| row.case.group == group && row.case.metric == metric) {
            if clusters.last().is_none_or(|(name, _)| name != row.case.name) {
                clusters.push((row.case.name.into(), Vec::new()));
            }
            let ratio = ours(rows, row).and_then(|ours| ours.times_better(row, metric).ok());
            let note = ratio.map(|ratio| in_words(ratio.median)).unwrap_or_default();
            let color = color(row.variant.rival);
            let bar =
                Bar { name: row.variant.name.clone(), spread: row.spread(metric), note, color, mark: None };
            if let Some((_, bars)) = clusters.last_mut() {
                bars.push(bar);
            }
        }
        let better = if metric.is_cost() { "shorter is better" } else { "longer is better" };
        let unit = format!("{} ({better})", metric.title());
        (!clusters.is_empty()).then(|| Self { title: group.into(), unit, clusters })
    }

    /// Goals, and what was reached.
    #[must_use]
    pub fn of_goals(goals: &[Judged]) -> Option<Self> {
        let bar = |judged: &Judged| {
            let color = if judged.verdict() == "met" { GOOD } else { BAD };
            let note = format!("goal {:.2}x: {}", judged.goal.at_least, judged.verdict());
            let mark = Some(judged.goal.at_least);
            (
                judged.title(),
                vec![Bar { name: String::new(), spread: judged.ratio.clone(), note, color, mark }],
            )
        };
        (!goals.is_empty()).then(|| Self {
            title: "goals".into(),
            unit: "times better (longer is better; the line is the goal)".into(),
            clusters: goals.iter().map(bar).collect(),
        })
    }

    /// Draws it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let height: i32 = self.clusters.iter().map(|(_, bars)| TITLE + GAP + BAR * count(bars)).sum();
        let size = (WIDTH.unsigned_abs(), (HEAD + height + FOOT).unsigned_abs());
        let canvas = SVGBackend::new(file, size).into_drawing_area();
        let drawn = self.draw(&canvas).and_then(|()| canvas.present());
        drawn.map_err(|e| anyhow!("{}: {e}", file.display()))
    }

    fn draw(&self, canvas: &Canvas<'_>) -> Result<(), Failed> {
        canvas.fill(&WHITE)?;
        say(canvas, &self.title, (10, 18), (20, BLACK), HPos::Left)?;
        say(canvas, &self.unit, (10, 40), (14, BLACK), HPos::Left)?;
        let scale = self.scale();
        grid(canvas, scale)?;
        let mut y = HEAD;
        for (name, bars) in &self.clusters {
            say(canvas, name, (10, y + TITLE / 2), (14, BLACK), HPos::Left)?;
            y += TITLE;
            for bar in bars {
                bar.draw(canvas, y, scale)?;
                y += BAR;
            }
            y += GAP;
        }
        Ok(())
    }

    /// What the whole width of bars stands for: a round number.
    fn scale(&self) -> f64 {
        let bars = self.clusters.iter().flat_map(|(_, bars)| bars);
        let most =
            bars.flat_map(|bar| [bar.spread.as_ref().map_or(0.0, |s| s.high), bar.mark.unwrap_or(0.0)]);
        let most = most.fold(f64::MIN_POSITIVE.max(1e-6), f64::max);
        let power = 10_f64.powf(most.log10().floor());
        [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0]
            .map(|step| step * power)
            .into_iter()
            .find(|s| *s >= most)
            .unwrap_or(most)
    }
}

impl Bar {
    fn draw(&self, canvas: &Canvas<'_>, y: i32, scale: f64) -> Result<(), Failed> {
        let middle = y + BAR / 2;
        say(canvas, &self.name, (LEFT - 8, middle), (13, BLACK), HPos::Right)?;
        if let Some(mark) = self.mark {
            let x = at(mark, scale);
            canvas.draw(&PathElement::new(vec![(x, y - 1), (x, y + BAR - 2)], BLACK.stroke_width(3)))?;
        }
        let Spread { median, low, high, .. } = match &self.spread {
            Ok(spread) => *spread,
            Err(why) => {
                let mut why = why.clone();
                if let Some((end, _)) = why.char_indices().nth(LONGEST) {
                    why.replace_range(end.., " ..");
                }
                let x = self.mark.map_or(LEFT, |mark| at(mark, scale)) + 6;
                return say(canvas, &why, (x, middle), (12, GREY), HPos::Left);
            }
        };
        let body = [(LEFT, y + 3), (at(median, scale), y + BAR - 4)];
        canvas.draw(&Rectangle::new(body, self.color.mix(0.85).filled()))?;
        canvas.draw(&PathElement::new(vec![(at(low, scale), middle), (at(high, scale), middle)], BLACK))?;
        for end in [low, high] {
            let x = at(end, scale);
            canvas.draw(&PathElement::new(vec![(x, middle - 4), (x, middle + 4)], BLACK))?;
        }
        let said = [short(median).as_str(), &self.note].join("  \u{b7}  ");
        let behind = at(high.max(self.mark.unwrap_or(0.0)), scale) + 8;
        say(canvas, said.trim_end_matches([' ', '\u{b7}']), (behind, middle), (13, BLACK), HPos::Left)
    }
}

/// Lines at round figures, which are named below.
fn grid(canvas: &Canvas<'_>, scale: f64) -> Result<(), Failed> {
    const LINES: u32 = 5;
    let bottom = i32::try_from(canvas.dim_in_pixel().1).unwrap_or(i32::MAX) - FOOT;
    for line in 0..=LINES {
        let value = scale * f64::from(line) / f64::from(LINES);
        let x = at(value, scale);
        canvas.draw(&PathElement::new(vec![(x, HEAD), (x, bottom)], LIGHT))?;
        let text = if line == 0 { "0".into() } else { short(value) };
        say(canvas, &text, (x, bottom + 14), (12, GREY), HPos::Center)?;
    }
    Ok(())
}

/// How vmflow stands to another one.
fn in_words(ratio: f64) -> String {
    if ratio >= 1.0 {
        format!("vmflow is {}x better", short(ratio))
    } else {
        format!("vmflow is {}x worse", short(1.0 / ratio))
    }
}

type Failed = plotters::drawing::DrawingAreaErrorKind<std::io::Error>;

fn say(
    canvas: &Canvas<'_>,
    text: &str,
    at: (i32, i32),
    (height, color): (i32, RGBColor),
    side: HPos,
) -> Result<(), Failed> {
    let look =
        TextStyle::from(("sans-serif", height).into_font()).color(&color).pos(Pos::new(side, VPos::Center));
    canvas.draw(&Text::new(text.to_owned(), at, look))
}

/// Where a figure is.
#[expect(clippy::cast_possible_truncation, reason = "a place on the canvas")]
fn at(value: f64, scale: f64) -> i32 {
    LEFT + (f64::from(WIDTH - LEFT - RIGHT) * value / scale).round() as i32
}

fn count(bars: &[Bar]) -> i32 {
    i32::try_from(bars.len()).unwrap_or(i32::MAX)
}

const fn color(rival: Rival) -> RGBColor {
    match rival {
        Rival::Vmflow => RGBColor(31, 100, 180),
        Rival::Polling => RGBColor(70, 150, 160),
        Rival::Uncoalesced => RGBColor(120, 170, 220),
        Rival::Unmonitored => RGBColor(90, 190, 190),
        Rival::Plain => NEUTRAL,
        Rival::Dpdk => RGBColor(225, 140, 40),
        Rival::Peers => RGBColor(165, 90, 165),
        Rival::QemuTap => RGBColor(190, 150, 100),
        Rival::QemuVhost => RGBColor(140, 100, 60),
    }
}
