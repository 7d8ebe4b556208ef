//! The tables that `vmflow vms` and `vmflow stats` print: plain text, without colour, numbers to the right.

use std::fmt;

use super::units::{bytes, count, share};
use crate::{
    ledger::{DropReason, Totals, Volume},
    monitor::api::document::{Mode, PortStats, Stats, Tag, VmStats, Vms},
};

/// The width that statistics fit into while VMs' names have at most 13 characters.
const WIDTH: usize = 80;

/// What stands where there is nothing.
const NONE: &str = "-";

/// A direction, from the guest's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// The guest sends.
    Transmit,
    /// The guest gets.
    Receive,
}

impl Direction {
    const BOTH: [Self; 2] = [Self::Transmit, Self::Receive];

    fn totals(self, port: &PortStats) -> Totals {
        match self {
            Self::Transmit => (&port.transmit).into(),
            Self::Receive => (&port.receive).into(),
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Transmit => "transmit",
            Self::Receive => "receive",
        })
    }
}

/// All ports of a VM in one direction.
#[derive(Debug)]
pub(super) struct Sum<'a> {
    pub(super) vm: &'a VmStats,
    pub(super) direction: Direction,
    pub(super) totals: Totals,
}

impl Sum<'_> {
    /// Everything that had an end, whatever its label and its end.
    pub(super) fn all(&self) -> Volume {
        let mut all = self.totals.normal;
        all.add(self.totals.suspect);
        all
    }
}

/// Each VM in each direction.
pub(super) fn sums(stats: &Stats) -> Vec<Sum<'_>> {
    let each = stats.vms.iter().flat_map(|vm| Direction::BOTH.map(|direction| (vm, direction)));
    each.map(|(vm, direction)| {
        let mut totals = Totals::default();
        for port in &vm.ports {
            totals.add(&direction.totals(port));
        }
        Sum { vm, direction, totals }
    })
    .collect()
}

/// How a column stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table of columns as wide as their widest cell, one space apart, without spaces at a line's end.
pub(super) fn table<const N: usize>(columns: [(&str, Side); N], rows: &[[String; N]]) -> String {
    let titles = columns.map(|(title, _)| title.to_owned());
    let mut widths = [0; N];
    for line in std::iter::once(&titles).chain(rows) {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for line in std::iter::once(&titles).chain(rows) {
        let cells = line.iter().zip(widths).zip(columns).map(|((cell, width), (_, side))| match side {
            Side::Left => format!("{cell:<width$}"),
            Side::Right => format!("{cell:>width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join(" ").trim_end());
        text.push('\n');
    }
    text
}

/// `vmflow vms`: one row per port; below it, why VMs are tagged.
#[must_use]
pub fn vms_table(document: &Vms) -> String {
    let columns = ["NAME", "LABEL", "SUSPECT", "UUID", "TAP", "NETNS", "SOCKET", "STATE"];
    let mut rows = Vec::new();
    for vm in &document.vms {
        let uuid = vm.uuid.map_or(NONE.to_owned(), |uuid| uuid.to_string());
        let suspect = if vm.suspect { "yes" } else { "no" };
        let row = |tap: &str, netns: &str, socket: &str, state: &str| {
            [&vm.name, &vm.label.to_string(), suspect, &uuid, tap, netns, socket, state].map(str::to_owned)
        };
        if vm.ports.is_empty() {
            rows.push(row(NONE, NONE, NONE, "no ports"));
        }
        for port in &vm.ports {
            let state = match (port.connected, port.mode) {
                (true, _) => "connected",
                (false, Mode::Server) => "listening",
                (false, Mode::Client) => "connecting",
            };
            rows.push(row(&port.tap, port.netns.as_deref().unwrap_or(NONE), &port.socket, state));
        }
    }
    let mut text = table(columns.map(|title| (title, Side::Left)), &rows);
    for vm in &document.vms {
        text.push_str(&tag_line(&vm.name, vm.tag.as_ref()));
    }
    text
}

/// `vmflow stats`: one row per VM and direction; below it, why frames were dropped, what else is of note, and
/// whether the ledger balances.
#[must_use]
pub fn stats_table(stats: &Stats) -> String {
    use Side::{Left, Right};
    let columns = [
        ("VM", Left),
        ("DIRECTION", Left),
        ("FRAMES", Right),
        ("PACKETS", Right),
        ("BYTES", Right),
        ("SUSPECT", Right),
        ("DROPPED", Right),
        ("IN-FLIGHT", Right),
        ("TAP-OPS", Right),
    ];
    let rows: Vec<_> = sums(stats)
        .iter()
        .map(|sum| {
            let all = sum.all();
            [
                sum.vm.name.clone(),
                sum.direction.to_string(),
                count(sum.totals.chains),
                count(all.packets),
                bytes(all.bytes),
                share(sum.totals.suspect.frames, all.frames),
                count(sum.totals.dropped_frames()),
                count(sum.totals.in_flight),
                count(sum.totals.tap_operations),
            ]
        })
        .collect();
    table(columns, &rows) + &below(stats)
}

/// What stands below a table of statistics.
pub(super) fn below(stats: &Stats) -> String {
    let mut text = String::from("\n");
    for sum in sums(stats) {
        text.push_str(&drops(&sum));
    }
    for vm in &stats.vms {
        text.push_str(&tag_line(&vm.name, vm.tag.as_ref()));
        text.push_str(&events(vm));
    }
    text + &lost(stats) + &balance(stats)
}

/// Since when numbers may be too low, if they may.
fn lost(stats: &Stats) -> String {
    let Some(last) = stats.gaps.last() else { return String::new() };
    let (number, why) = (stats.gaps.len(), last.reason.meaning());
    format!("gaps: {number}, last {} to {}: {why}\n", last.from, last.to)
}

fn tag_line(vm: &str, tag: Option<&Tag>) -> String {
    tag.map_or_else(String::new, |tag| {
        format!("{vm}: suspect since {} by {}: {}\n", tag.since, tag.by, tag.reason)
    })
}

/// The reasons for which frames were dropped, with a sentence each.
fn drops(sum: &Sum<'_>) -> String {
    let reasons = DropReason::ALL.iter().zip(sum.totals.dropped).filter(|(_, frames)| *frames > 0);
    let reasons: Vec<_> = reasons.map(|(reason, frames)| (reason, count(frames))).collect();
    let widest_name = reasons.iter().map(|(reason, _)| reason.name().len()).max().unwrap_or_default();
    let widest_count = reasons.iter().map(|(_, frames)| frames.len()).max().unwrap_or_default();
    if reasons.is_empty() {
        return String::new();
    }
    let lines = reasons.iter().map(|(reason, frames)| {
        let head = format!("  {frames:>widest_count$} {:<widest_name$}  ", reason.name());
        let sentence = wrap(reason.meaning(), WIDTH.saturating_sub(head.len()));
        format!("{head}{}\n", sentence.join(&format!("\n{}", " ".repeat(head.len()))))
    });
    format!("{}: frames dropped in {}\n", sum.vm.name, sum.direction) + &lines.collect::<String>()
}

/// Breaks a sentence into lines of at most `width` characters; a longer word stands alone.
fn wrap(sentence: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in sentence.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// What happened to a VM's ports besides frames, if anything.
fn events(vm: &VmStats) -> String {
    let sum = |of: fn(&PortStats) -> u64| vm.ports.iter().map(of).fold(0, u64::saturating_add);
    let kinds = [
        ("worker restarts", sum(|port| port.worker_restarts)),
        ("uncertain frames", sum(|port| port.uncertain)),
        ("queue faults", sum(|port| port.queue_faults)),
        ("refused connections", sum(|port| port.refused_connections)),
        ("connections given up", sum(|port| port.connections_given_up)),
    ];
    let seen: Vec<_> = kinds.iter().filter(|(_, n)| *n > 0).map(|(kind, n)| format!("{kind}: {n}")).collect();
    if seen.is_empty() { String::new() } else { format!("{}: {}\n", vm.name, seen.join(", ")) }
}

/// Whether every port's ledger balances, and where not, by how much.
fn balance(stats: &Stats) -> String {
    let mut lines = Vec::new();
    for vm in &stats.vms {
        for (port, direction) in vm.ports.iter().flat_map(|port| Direction::BOTH.map(|d| (port, d))) {
            let gaps = gaps(&direction.totals(port)).into_iter();
            lines.extend(gaps.map(|gap| format!("  {} {} {direction}: {gap}\n", vm.name, port.socket)));
        }
    }
    let verdict = if lines.is_empty() { "balanced" } else { "NOT balanced" };
    format!("ledger: {verdict}\n{}", lines.concat())
}

/// By how much each equation of the ledger fails: empty when it balances.
fn gaps(totals: &Totals) -> Vec<String> {
    let ended = [
        [totals.passed.frames, totals.diverted.frames, totals.dropped_frames()],
        [totals.passed.packets, totals.diverted.packets, totals.dropped_packets],
        [totals.passed.bytes, totals.diverted.bytes, totals.dropped_bytes],
    ]
    .map(|parts| parts.into_iter().map(u128::from).sum::<u128>());
    let (normal, suspect) = (totals.normal, totals.suspect);
    let labelled =
        [[normal.frames, suspect.frames], [normal.packets, suspect.packets], [normal.bytes, suspect.bytes]]
            .map(|parts| parts.into_iter().map(u128::from).sum::<u128>());
    let [ended_frames, ..] = ended;
    let outcomes =
        gap("frames", "outcomes", totals.chains.into(), ended_frames + u128::from(totals.in_flight));
    let labels = ["frames", "packets", "bytes"].into_iter().zip(ended.into_iter().zip(labelled));
    let labels = labels.filter_map(|(unit, (ended, labelled))| gap(unit, "labels", ended, labelled));
    outcomes.into_iter().chain(labels).collect()
}

fn gap(unit: &str, place: &str, wanted: u128, found: u128) -> Option<String> {
    match wanted.abs_diff(found) {
        0 => None,
        missing if found < wanted => Some(format!("{missing} {unit} are missing from the {place}")),
        more => Some(format!("{more} {unit} too many in the {place}")),
    }
}

#[cfg(test)]
pub(super) mod fixture {
    //! Two VMs: one busy and tagged, one without traffic.

    use super::*;
    use crate::{
        label::Label,
        monitor::api::document::{Receive, Transmit},
    };

    pub(in crate::client) fn port(socket: &str, transmit: &Totals, receive: &Totals) -> PortStats {
        PortStats {
            socket: socket.into(),
            mode: Mode::Server,
            tap: "vmf-web1".into(),
            netns: None,
            connected: true,
            queue_pairs: 1,
            worker_restarts: 0,
            uncertain: 0,
            queue_faults: 0,
            refused_connections: 0,
            connections: 1,
            connections_given_up: 0,
            transmit: Transmit::from(transmit),
            receive: Receive::from(receive),
        }
    }

    pub(in crate::client) fn stats() -> Stats {
        let mut sent = Totals {
            chains: 1_234_567,
            passed: Volume {
                frames: 1_234_540,
                packets: 55_000_000,
                bytes: 78_000_000_000,
                wire_bytes: 81_000_000_000,
            },
            suspect: Volume { frames: 120, packets: 120, bytes: 7200, wire_bytes: 7200 },
            dropped_packets: 27,
            dropped_bytes: 1350,
            tap_operations: 30_021,
            tap_bytes: 78_000_000_000,
            ..Totals::default()
        };
        sent.dropped[DropReason::Runt.index()] = 3;
        sent.dropped[DropReason::RestartUnmatched.index()] = 24;
        sent.normal = Volume {
            frames: sent.chains - sent.suspect.frames,
            packets: 55_000_027 - sent.suspect.packets,
            bytes: 78_000_001_350 - sent.suspect.bytes,
            wire_bytes: 81_000_000_000,
        };
        let received = Totals {
            chains: 6,
            in_flight: 1,
            passed: Volume::frame(5, 500, 500),
            normal: Volume { frames: 5, packets: 9, bytes: 900, wire_bytes: 900 },
            tap_operations: 6,
            tap_bytes: 1000,
            diverted: Volume { frames: 4, packets: 4, bytes: 400, wire_bytes: 400 },
            ..Totals::default()
        };
        let tag = Tag {
            reason: "scans".into(),
            by: "root (uid 0, pid 1)".into(),
            since: "2026-01-02T03:04:05Z".into(),
        };
        let mut web1 = VmStats::new("web1".into(), None, Label::new(1).unwrap(), Some(tag));
        web1.ports = vec![port("/run/vmflow/web1/net0.sock", &sent, &received)];
        let mut database = VmStats::new("database".into(), None, Label::new(2).unwrap(), None);
        let quiet = Totals::default();
        database.ports = vec![port("/run/vmflow/database/net0.sock", &quiet, &quiet); 2];
        Stats::new("host1".into(), vec![web1, database])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        label::Label,
        monitor::{
            api::document::{Gap, PortDocument, Transmit, VmDocument},
            checkpoint::GapReason,
        },
    };

    #[test]
    fn statistics_look_like_this() {
        let mut stats = fixture::stats();
        stats.vms[0].ports[0].worker_restarts = 1;
        stats.vms[0].ports[0].uncertain = 2;
        for to in ["2026-01-02T03:04:06Z", "2026-01-02T03:04:07Z"] {
            let (from, to) = ("2026-01-02T03:04:05Z".into(), to.into());
            stats.gaps.push(Gap { from, to, reason: GapReason::Killed });
        }
        let wanted = "\
VM       DIRECTION FRAMES PACKETS   BYTES SUSPECT DROPPED IN-FLIGHT TAP-OPS
web1     transmit  1.23 M  55.0 M 78.0 GB  <0.1 %      27         0   30021
web1     receive        6       9   900 B     0 %       0         1       6
database transmit       0       0     0 B       -       0         0       0
database receive        0       0     0 B       -       0         0       0

web1: frames dropped in transmit
   3 runt               The frame is shorter than an Ethernet header (14 bytes).
  24 restart_unmatched  The frame was lost in the death of a worker, and its
                        ring could not be matched.
web1: suspect since 2026-01-02T03:04:05Z by root (uid 0, pid 1): scans
web1: worker restarts: 1, uncertain frames: 2
gaps: 2, last 2026-01-02T03:04:05Z to 2026-01-02T03:04:07Z: vmflow was killed
ledger: balanced
";
        assert_eq!(stats_table(&stats), wanted, "\n{}", stats_table(&stats));
        assert!(wanted.lines().all(|line| line.chars().count() <= WIDTH));
    }

    #[test]
    fn vms_look_like_this() {
        let port = |tap: &str, mode, connected, netns: Option<&str>| PortDocument {
            socket: format!("/run/vmflow/{tap}.sock"),
            mode,
            tap: tap.into(),
            netns: netns.map(str::to_owned),
            connected,
            mac: None,
            mtu: Some(1500),
        };
        let tag = fixture::stats().vms[0].tag.clone();
        let uuid = "0a1b2c3d-0000-0000-0000-000000000001".parse().unwrap();
        let label = |number| Label::new(number).unwrap();
        let mut web1 = VmDocument::new("web1".into(), Some(uuid), label(1), tag, "drop".into());
        web1.ports = vec![
            port("vmf-web1", Mode::Server, true, Some("blue")),
            port("vmf-web1b", Mode::Client, false, None),
        ];
        let mut database = VmDocument::new("database".into(), None, label(16_777_215), None, "count".into());
        database.ports = vec![port("vmf-db", Mode::Server, false, None)];
        let empty = VmDocument::new("empty".into(), None, label(3), None, "count".into());
        let text = vms_table(&Vms::new("host1".into(), vec![web1, database, empty]));
        let wanted = "\
NAME     LABEL    SUSPECT UUID                                 TAP       NETNS SOCKET                     STATE
web1     1        yes     0a1b2c3d-0000-0000-0000-000000000001 vmf-web1  blue  /run/vmflow/vmf-web1.sock  connected
web1     1        yes     0a1b2c3d-0000-0000-0000-000000000001 vmf-web1b -     /run/vmflow/vmf-web1b.sock connecting
database 16777215 no      -                                    vmf-db    -     /run/vmflow/vmf-db.sock    listening
empty    3        no      -                                    -         -     -                          no ports
web1: suspect since 2026-01-02T03:04:05Z by root (uid 0, pid 1): scans
";
        assert_eq!(text, wanted, "\n{text}");
    }

    #[test]
    fn a_ledger_that_does_not_balance_says_what_is_missing_and_where() {
        let mut stats = fixture::stats();
        assert!(stats_table(&stats).ends_with("\nledger: balanced\n"));
        let mut totals = Totals::from(&stats.vms[0].ports[0].transmit);
        totals.chains += 5;
        totals.normal.packets += 7;
        totals.suspect.bytes -= 100;
        stats.vms[0].ports[0].transmit = Transmit::from(&totals);
        let text = stats_table(&stats);
        let port = "  web1 /run/vmflow/web1/net0.sock transmit:";
        let wanted = format!(
            "ledger: NOT balanced\n\
             {port} 5 frames are missing from the outcomes\n\
             {port} 7 packets too many in the labels\n\
             {port} 100 bytes are missing from the labels\n"
        );
        assert!(text.ends_with(&wanted), "{text}");
    }

    #[test]
    fn the_client_and_the_ledger_agree_on_what_balances() {
        let balanced = Totals::from(&fixture::stats().vms[0].ports[0].transmit);
        assert!(balanced.balances() && gaps(&balanced).is_empty());
        // wire_bytes (of dropped frames nobody counts them) and the tap's counters are in no equation.
        let outside = |place: usize| {
            let wire_bytes = [5, 9, 13, 17];
            wire_bytes.contains(&place) || place >= Totals::WORDS - 2
        };
        for place in 0..Totals::WORDS {
            let mut words = balanced.words();
            words[place] += 1;
            let off = Totals::from_words(&words);
            assert_eq!(off.balances(), gaps(&off).is_empty(), "word {place}");
            assert_eq!(gaps(&off).is_empty(), outside(place), "word {place}");
        }
    }

    #[test]
    fn the_ports_of_a_vm_are_summed() {
        let mut stats = fixture::stats();
        let again = stats.vms[0].ports[0].clone();
        stats.vms[0].ports.push(again);
        assert_eq!(sums(&stats)[0].totals.chains, 2 * 1_234_567);
        assert_eq!(sums(&stats)[1].totals.tap_operations, 12);
    }
}
