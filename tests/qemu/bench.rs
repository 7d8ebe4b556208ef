//! `qemu-scripts/bench`, in its smallest form: that it works, not what it measures.

use std::{fs, path::Path, process::Command};

use roxmltree::Document;
use serde_json::Value;

use crate::{
    bed::{must, script, take_turn},
    harness::{VMFLOW, json},
};

/// "group: case, backend", each run once.
const RUNS: [&str; 10] = [
    "transmit: 64 B, 10,000 flows, vmflow",
    "transmit: 64 B, 10,000 flows, plain loop",
    "transmit: 64 B, 10,000 flows, peer",
    "transmit: 64 B, 10,000 flows, broken",
    "transmit: TCP with TSO, 64 KiB, vmflow",
    "receive: TCP GSO, mergeable, vmflow",
    "receive: TCP GSO, mergeable, plain loop",
    "round trip: 64 B, vmflow",
    "round trip: 64 B, vmflow, poll_us=50",
    "testpmd: txonly, 64 B, many flows, DPDK vhost + tap (polls)",
];

fn bench(out: &Path) -> Command {
    let mut bench = script("bench");
    bench.args(["--profile", "dev", "--quick", "--out"]).arg(out);
    // Any vhost-user-net backend will do, this one too. It runs in a directory of its own.
    let peer = format!(
        "{VMFLOW} serve --vm name=p,socket={{socket}},tap={{tap}} --control $PWD/c.sock --state $PWD/state"
    );
    bench.args(["--peer", &format!("peer={peer}"), "--peer", "broken=echo this is no backend: {socket}"]);
    bench.args(RUNS.iter().flat_map(|run| ["--only", run]));
    bench
}

#[test]
fn a_quick_bench_writes_tables_figures_and_charts_and_loses_nothing_when_a_backend_fails() {
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let listed = must(bench(directory.path()).arg("--list"));
    assert_eq!(listed.lines().collect::<Vec<_>>(), RUNS);

    must(&mut bench(directory.path()));
    let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
    let result: Value = serde_json::from_str(&read("results.json")).unwrap();
    let rows = json(&result, "/rows").as_array().unwrap();
    for (row, run) in rows.iter().zip(RUNS) {
        // On a busy machine a round may be left out: it was run all the same.
        let [outcome] = json(row, "/rounds").as_array().unwrap().as_slice() else { panic!("{run}: {row}") };
        if run.ends_with("broken") {
            let why = json(outcome, "/failed").as_str().unwrap();
            assert!(why.contains("this is no backend: "), "{run}: {why}");
            continue;
        }
        let sample =
            outcome.get("clean").or(outcome.get("disturbed")).unwrap_or_else(|| panic!("{run}: {row}"));
        let packets = json(sample, "/packets").as_u64().unwrap();
        assert!(packets > 0 && json(sample, "/cpu_ns").as_u64().unwrap() > 0, "{run}: {row}");
    }
    assert_eq!(rows.len(), RUNS.len());

    let table = read("results.md");
    for row in
        ["| 64 B, 10,000 flows | broken | failed: ", "| TCP GSO, mergeable | plain loop |", "## round trip"]
    {
        assert!(table.contains(row), "no '{row}' in {table}");
    }
    for chart in ["goals", "transmit-cpu", "receive-throughput", "round-trip-time", "testpmd-cpu"] {
        let text = read(&format!("{chart}.svg"));
        let drawing = Document::parse(&text).unwrap();
        assert!(
            drawing.root_element().has_tag_name(("http://www.w3.org/2000/svg", "svg")),
            "{chart}: {text}"
        );
        assert!(drawing.descendants().any(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "text"))));
    }
}
