//! Measures vmflow beside other backends; `qemu-scripts/bench` builds and starts it.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Parser;
use vmflow_bench::{
    FRONT_CPU,
    backend::{Kind, Variant},
    case::{CASES, Rival},
    chart::Chart,
    host::Network,
    measure::Metric,
    process::pin,
    report::{document, groups, judge, markdown},
    run::{Plan, Row, all},
};

/// Measures vmflow beside other backends, in one run and in turn (A B A B ..): a table, raw figures, charts.
#[derive(Parser)]
#[command(name = "bench", bin_name = "qemu-scripts/bench")]
struct Arguments {
    /// How often each case is measured with each backend.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// How long one measurement takes.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// A measurement during which anything else used more of a processor than this is left out.
    #[arg(long, value_name = "SHARE", default_value_t = 0.08)]
    tolerate: f64,
    /// One round of 0.1 s: whether everything works.
    #[arg(long)]
    quick: bool,
    /// Only cases and backends whose "group: case, backend" holds this; repeatable.
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Says what would be measured.
    #[arg(long)]
    list: bool,
    /// Where the results go: results.md, results.json, *.svg.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Another vhost-user-net backend: its name and its command line with {socket} and {tap}; repeatable.
    #[arg(long, value_name = "NAME=COMMAND", value_parser = peer)]
    peer: Vec<(String, String)>,
    /// vmflow.
    #[arg(long, value_name = "PROGRAM", hide = true)]
    vmflow: PathBuf,
    /// A vmflow that was built without monitoring.
    #[arg(long, value_name = "PROGRAM", hide = true)]
    without_monitoring: Option<PathBuf>,
}

fn peer(text: &str) -> Result<(String, String)> {
    let (name, command) = text.split_once('=').context("write NAME=COMMAND")?;
    if !command.contains("{socket}") {
        bail!("the command says nowhere {{socket}}");
    }
    Ok((name.into(), command.into()))
}

impl Arguments {
    /// The backends that there are, in the order in which a round takes them.
    fn variants(&self) -> Vec<Variant> {
        let variant = |name: &str, rival, kind| Variant { name: name.into(), rival, kind };
        let vmflow =
            |program: &PathBuf, words, counts| Kind::Vmflow { program: program.clone(), words, counts };
        let mut variants = vec![
            variant("vmflow", Rival::Vmflow, vmflow(&self.vmflow, "", true)),
            variant(
                "vmflow, coalesce=false",
                Rival::Uncoalesced,
                vmflow(&self.vmflow, ",coalesce=false", true),
            ),
            variant("vmflow, poll_us=50", Rival::Polling, vmflow(&self.vmflow, ",poll_us=50", true)),
            variant("plain loop", Rival::Plain, Kind::Plain),
            variant("DPDK vhost + tap (polls)", Rival::Dpdk, Kind::Dpdk),
            variant("QEMU's tap", Rival::QemuTap, Kind::Qemu { vhost: false }),
        ];
        if has_vhost() {
            variants.push(variant("QEMU's tap, vhost-net", Rival::QemuVhost, Kind::Qemu { vhost: true }));
        }
        if let Some(program) = &self.without_monitoring {
            variants.push(variant("vmflow, unmonitored", Rival::Unmonitored, vmflow(program, "", false)));
        }
        for (name, command) in &self.peer {
            variants.push(variant(name, Rival::Peers, Kind::Command(command.clone())));
        }
        variants
    }

    /// What is to be measured.
    fn rows(&self) -> Vec<Row> {
        let variants = self.variants();
        let mut rows = Vec::new();
        for case in CASES {
            let of = |rival| variants.iter().filter(move |variant| variant.rival == rival);
            for variant in case.rivals.iter().copied().flat_map(of) {
                let name = format!("{}, {}", case.title(), variant.name);
                if self.only.is_empty() || self.only.iter().any(|pattern| name.contains(pattern.as_str())) {
                    rows.push(Row { case, variant: variant.clone(), outcomes: Vec::new() });
                }
            }
        }
        rows
    }

    fn about(&self) -> Vec<(String, String)> {
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        let cpus = read("/proc/cpuinfo");
        let models: Vec<&str> = cpus.lines().filter(|line| line.starts_with("model name")).collect();
        let model = models.first().and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown");
        let accelerator =
            read(&format!("{}/../target/guest/accel", vmflow_bench::guest::scripts().display()));
        vec![
            ("processors".into(), format!("{} x {model}", models.len())),
            ("kernel".into(), read("/proc/sys/kernel/osrelease").trim().into()),
            ("rounds".into(), self.rounds.to_string()),
            ("seconds each".into(), self.seconds.to_string()),
            (
                "left out".into(),
                format!("what ran while anything else used over {} of a processor", self.tolerate),
            ),
            ("guests run on".into(), accelerator.lines().next().unwrap_or("nothing").into()),
            ("vhost-net".into(), if has_vhost() { "there" } else { "not there: not measured" }.into()),
        ]
    }
}

/// Whether the host's kernel has a vhost-net.
fn has_vhost() -> bool {
    fs::exists("/dev/vhost-net").unwrap_or(false)
}

fn main() -> Result<()> {
    let mut arguments = Arguments::parse();
    if arguments.quick {
        (arguments.rounds, arguments.seconds) = (1, 0.1);
    }
    let mut rows = arguments.rows();
    if arguments.list {
        for row in &rows {
            println!("{}, {}", row.case.title(), row.variant.name);
        }
        return Ok(());
    }
    if rows.is_empty() {
        bail!("no case is named like that: --list names them");
    }
    fs::create_dir_all(&arguments.out).with_context(|| arguments.out.display().to_string())?;
    let network = Network::own().context("bench needs a network namespace of its own")?;
    pin(&[FRONT_CPU])?;
    let (rounds, tolerance) = (arguments.rounds, arguments.tolerate);
    all(&mut rows, &network, Plan { rounds, time: Duration::from_secs_f64(arguments.seconds), tolerance });
    write(&arguments, &rows)
}

fn write(arguments: &Arguments, rows: &[Row]) -> Result<()> {
    let about = arguments.about();
    let text = markdown(rows, &about);
    fs::write(arguments.out.join("results.md"), &text)?;
    fs::write(arguments.out.join("results.json"), serde_json::to_string_pretty(&document(rows, &about))?)?;
    for group in groups(rows) {
        for (metric, name) in [(Metric::Cpu, "cpu"), (Metric::Bits, "throughput"), (Metric::Median, "time")] {
            if let Some(chart) = Chart::of_group(rows, group, metric) {
                chart.write(&arguments.out.join(format!("{}-{name}.svg", group.replace(' ', "-"))))?;
            }
        }
    }
    if let Some(chart) = Chart::of_goals(&judge(rows)) {
        chart.write(&arguments.out.join("goals.svg"))?;
    }
    println!("{text}");
    eprintln!("bench: written to {}", arguments.out.display());
    Ok(())
}
