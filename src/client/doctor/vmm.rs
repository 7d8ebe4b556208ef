//! VMMs that run and have a port's socket: is their guests' memory shared?

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::Finding;

/// A guest's memory is at least this large, in bytes; what VMMs share for other ends is smaller.
const GUEST_MEMORY_MIN: u64 = 2 << 20;

/// Every process below `proc` that has one of the sockets on its command line.
pub(super) fn all(proc: &Path, sockets: &[&Path]) -> Vec<Finding> {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let processes = entries.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok());
    processes.filter_map(|process| look(&process.path(), sockets)).collect()
}

fn look(process: &Path, sockets: &[&Path]) -> Option<Finding> {
    let words = fs::read(process.join("cmdline")).ok()?;
    let mut words = words.split(|byte| *byte == 0);
    let program = PathBuf::from(String::from_utf8_lossy(words.next()?).into_owned());
    let program = program.file_name()?.to_string_lossy().into_owned();
    if !program.starts_with("qemu") && !program.contains("cloud-hypervisor") && program != "kvm" {
        return None;
    }
    let arguments: Vec<_> = words.map(String::from_utf8_lossy).collect();
    let socket = sockets.iter().find(|socket| names(&arguments, socket))?;
    let what = format!("{program}, process {}, at {}", process.file_name()?.display(), socket.display());
    let Ok(maps) = fs::read_to_string(process.join("maps")) else {
        return Some(Finding::warn(what, "its memory may not be looked at", "run as root"));
    };
    if maps.lines().any(is_shared_guest_memory) {
        return Some(Finding::ok(what, "shares its guest's memory"));
    }
    let advice = "QEMU: -object memory-backend-memfd,..,share=on; libvirt: <memoryBacking> with <source type='memfd'/> \
                  and <access mode='shared'/>; cloud-hypervisor: --memory ..,shared=on";
    Some(Finding::fail(what, "does not share its guest's memory", advice))
}

/// True if an option has this path, and no longer one.
fn names(arguments: &[std::borrow::Cow<'_, str>], socket: &Path) -> bool {
    let socket = socket.to_string_lossy();
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric() || "/._-".contains(c));
    arguments.iter().any(|argument| {
        argument.match_indices(&*socket).any(|(at, found)| ends(&argument[at + found.len()..]))
    })
}

/// A line of `/proc/PID/maps` (`proc_pid_maps(5)`): a large, writable, shared mapping of a file.
fn is_shared_guest_memory(line: &str) -> bool {
    let mut fields = line.split_whitespace();
    let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else { return false };
    let file = fields.nth(3).unwrap_or_default();
    let ends = range.split_once('-').map(|(start, end)| [start, end].map(|hex| u64::from_str_radix(hex, 16)));
    let Some([Ok(start), Ok(end)]) = ends else { return false };
    let is_large = end.saturating_sub(start) >= GUEST_MEMORY_MIN;
    is_large && permissions.starts_with("rw") && permissions.ends_with('s') && file.starts_with('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: &str =
        "7f0000000000-7f0000400000 rw-s 00000000 00:01 5 /memfd:memory-backend-memfd (deleted)";
    const PRIVATE: &str = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 ";

    #[test]
    fn only_large_shared_writable_files_are_guest_memory() {
        assert!(is_shared_guest_memory(SHARED));
        assert!(!is_shared_guest_memory(PRIVATE));
        assert!(!is_shared_guest_memory(&SHARED.replace("7f0000400000", "7f0000001000")));
        assert!(!is_shared_guest_memory(&SHARED.replace("rw-s", "r--s")));
        assert!(!is_shared_guest_memory("nonsense"));
    }

    #[test]
    fn a_socket_is_named_by_its_whole_path() {
        let named = |argument: &str| names(&[argument.into()], Path::new("/run/a.sock"));
        assert!(named("socket,id=c,path=/run/a.sock,reconnect=1") && named("/run/a.sock"));
        assert!(!named("path=/run/a.sock2") && !named("path=/run/b.sock"));
    }
}
