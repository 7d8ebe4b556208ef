//! The state directory, as the registry wants it.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use rustix::{
    fs::{StatVfsMountFlags, statvfs},
    process::geteuid,
};

use super::Finding;

const REGISTRY: &str = "registry.json";
/// What a directory without labels may hold.
const EMPTY: [&str; 3] = ["lock", "registry.json.new", "lost+found"];
/// Bits that let others write.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Below this much room, in bytes, the next write may be the one that fails.
const ROOM: u64 = 16 << 20;

/// The directory for what outlives the process.
pub(super) fn directory(path: &Path) -> Vec<Finding> {
    let what = format!("state directory {}", path.display());
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return vec![missing(what, path)];
        }
        Err(error) => return vec![Finding::fail(what, error.to_string(), "run as root")],
    };
    if !found.is_dir() {
        return vec![Finding::fail(
            what,
            "is not a directory",
            "move it away, or choose another with --state",
        )];
    }
    vec![access(what.clone(), &found), room(what.clone(), path), registry(what, path)]
}

fn missing(what: String, path: &Path) -> Finding {
    match path.parent() {
        Some(parent) if parent.is_dir() => {
            Finding::warn(what, "is not there yet", "the first `vmflow serve` makes it")
        }
        _ => Finding::fail(what, "is missing, and so is the one above it", "make the one above it"),
    }
}

fn access(what: String, found: &fs::Metadata) -> Finding {
    let mode = found.permissions().mode();
    if ![0, geteuid().as_raw()].contains(&found.uid()) {
        let why = format!("belongs to user {}", found.uid());
        return Finding::fail(what, why, "give it to root: chown root");
    }
    if mode & WRITABLE_BY_OTHERS != 0 {
        return Finding::fail(
            what,
            format!("others may write there (mode {:04o})", mode & 0o7777),
            "chmod 0700",
        );
    }
    Finding::ok(what, "is nobody else's")
}

fn room(what: String, path: &Path) -> Finding {
    match statvfs(path) {
        Err(error) => Finding::fail(what, io::Error::from(error).to_string(), "look after its file system"),
        Ok(found) if found.f_flag.contains(StatVfsMountFlags::RDONLY) => {
            Finding::fail(what, "is on a file system that cannot be written", "mount it read-write")
        }
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let has_inodes = found.f_files == 0 || found.f_favail > 0;
            if free < ROOM || !has_inodes {
                return Finding::fail(
                    what,
                    format!("its file system is full ({} KiB free)", free >> 10),
                    "make room",
                );
            }
            Finding::ok(what, format!("has {} MiB of room", free >> 20))
        }
    }
}

fn registry(what: String, path: &Path) -> Finding {
    let file = path.join(REGISTRY);
    match fs::read(&file) {
        Ok(bytes) => match serde_json::from_slice::<serde_json::Value>(&bytes) {
            Ok(page) => {
                let labels = page["vms"].as_array().map_or(0, Vec::len);
                Finding::ok(what, format!("knows {labels} labels"))
            }
            Err(error) => {
                let why = format!("{REGISTRY} is damaged: {error}");
                Finding::fail(
                    what,
                    why,
                    "put a good copy in its place; do not remove it: labels would be given anew",
                )
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => without_registry(what, path),
        Err(error) => Finding::fail(what, format!("{REGISTRY}: {error}"), "run as root"),
    }
}

fn without_registry(what: String, path: &Path) -> Finding {
    let mut entries = fs::read_dir(path).into_iter().flatten().flatten();
    let is_state = |name: &str| !EMPTY.contains(&name) && !name.starts_with('.');
    if entries.any(|entry| is_state(&entry.file_name().to_string_lossy())) {
        let advice = "put a good copy back: without it labels would be given anew";
        return Finding::fail(what, format!("has no {REGISTRY}, but other files"), advice);
    }
    Finding::warn(what, "is empty", "the first `vmflow serve` fills it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::doctor::Level;

    fn said(path: &Path) -> String {
        let findings = directory(path);
        let bad: Vec<_> = findings.iter().filter(|f| f.level > Level::Ok).map(|f| f.why.clone()).collect();
        bad.join("; ")
    }

    #[test]
    fn a_directory_in_order_is_well_and_each_fault_is_told() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("state");
        assert_eq!(said(&path), "is not there yet");
        assert_eq!(said(&path.join("deeper")), "is missing, and so is the one above it");
        fs::create_dir(&path).unwrap();
        let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        mode(0o700);
        assert_eq!(said(&path), "is empty");
        fs::write(path.join(REGISTRY), r#"{"vms":[{}]}"#).unwrap();
        assert_eq!(said(&path), "");
        mode(0o770);
        assert_eq!(said(&path), "others may write there (mode 0770)");
        mode(0o700);
        fs::write(path.join(REGISTRY), r#"{"vms":"#).unwrap();
        assert!(said(&path).starts_with("registry.json is damaged: "), "{}", said(&path));
        fs::rename(path.join(REGISTRY), path.join("totals.json")).unwrap();
        assert_eq!(said(&path), "has no registry.json, but other files");
        assert_eq!(said(&path.join("totals.json")), "is not a directory");
        if geteuid().is_root() {
            rustix::fs::chown(&path, Some(rustix::fs::Uid::from_raw(12345)), None).unwrap();
            assert!(said(&path).starts_with("belongs to user 12345"), "{}", said(&path));
        }
    }
}
