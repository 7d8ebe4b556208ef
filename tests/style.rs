//! Rules about the source itself.

#![expect(clippy::unwrap_used, reason = "a test program")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use vmflow::ledger::DropReason;

/// The files that may contain `unsafe`, and why each needs it.
const UNSAFE: [(&str, &str); 8] = [
    ("src/keeper/door.rs", "unshare"),
    ("src/keeper/process.rs", "fork, signalfd, inherited descriptors"),
    ("src/ledger/layout.rs", "the shared mapping"),
    ("src/monitor/spawn.rs", "a promise to tokio about a descriptor"),
    ("src/path/forward.rs", "writev with pointers into guest memory"),
    ("src/path/prefetch.rs", "a hint to the processor"),
    ("src/tap.rs", "ioctls of the TUN driver"),
    ("src/monitor/inherited.rs", "descriptors handed in by the service manager"),
];
/// Lines that a file may have without its tests.
const LINES: usize = 500;

fn sources(under: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(under).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

#[test]
fn unsafe_is_in_the_named_files_only_and_in_each_of_them() {
    let has_unsafe =
        |text: &str| ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|word| text.contains(word));
    let mut found: Vec<_> = sources(&root().join("src"))
        .into_iter()
        .filter(|path| has_unsafe(&fs::read_to_string(path).unwrap()))
        .map(|path| name(&path))
        .collect();
    found.sort();
    let mut named: Vec<_> = UNSAFE.iter().map(|(file, _)| (*file).to_string()).collect();
    named.sort();
    assert_eq!(found, named);
}

/// A frame's path: from ring to tap and back, and the part of the ledger that it writes. What takes locks around it
/// (the worker, for a batch) is seen by looking; that nobody waits for them, by `tests/integration/syscalls.rs`.
const PATH: [&str; 4] = ["src/path", "src/wire", "src/ledger/writer.rs", "src/ledger/log.rs"];

#[test]
fn the_path_of_a_frame_takes_no_lock_and_counts_no_references() {
    let words = ["Mutex", "RwLock", "Condvar", "OnceLock", "LazyLock", "mpsc", ".lock()", "Arc<", "Rc<"];
    let all = sources(&root().join("src"));
    for path in all.iter().filter(|path| PATH.iter().any(|part| name(path).starts_with(part))) {
        let text = fs::read_to_string(path).unwrap();
        let found: Vec<_> = words.iter().filter(|word| text.contains(*word)).collect();
        assert!(found.is_empty(), "{} has {found:?}", name(path));
    }
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    for path in sources(&root().join("src")) {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().take_while(|line| *line != "#[cfg(test)]").count();
        assert!(lines <= LINES, "{} has {lines} lines", name(&path));
    }
}

#[test]
fn every_drop_reason_is_in_the_readme_with_its_sentence() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for reason in DropReason::ALL {
        let row = format!("| `{}` | {} |", reason.name(), reason.meaning());
        assert!(readme.contains(&row), "README.md lacks: {row}");
    }
}

#[test]
fn the_readmes_configuration_is_valid_also_with_its_optional_lines() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let block = readme.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    check(block);
    check(&with_optional_lines(block));
}

#[test]
fn the_packages_configuration_is_valid_also_with_its_examples() {
    let text = fs::read_to_string(root().join("src/dist/vmflow.toml")).unwrap();
    check(&text);
    let with_all = with_optional_lines(&text);
    for line in ["state = ", "[[vm]]", "tap = "] {
        assert!(with_all.lines().any(|l| l.starts_with(line)), "{line} is no example: {with_all}");
    }
    check(&with_all);
}

/// Takes the `#` off the lines that are configuration. Users and groups of libvirt need not exist on the machine
/// that runs the tests.
fn with_optional_lines(text: &str) -> String {
    let is_configuration = |line: &str| line.starts_with('[') || line.contains(" = ");
    let lines = text.lines().map(|line| match line.strip_prefix("# ") {
        Some(rest) if is_configuration(rest) && !rest.contains("libvirt") => rest,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// `vmflow check` must find nothing wrong with it.
fn check(text: &str) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vmflow.toml");
    fs::write(&file, text).unwrap();
    let vmflow = env!("CARGO_BIN_EXE_vmflow");
    let output = std::process::Command::new(vmflow).args(["check", "--config"]).arg(&file).output().unwrap();
    assert!(output.status.success(), "{}\n{text}", String::from_utf8_lossy(&output.stderr));
}
