//! Sockets: the monitor's own, and who may use a port's.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::Path,
};

use rustix::{net::sockopt::socket_peercred, process::Pid};

use super::Finding;
use crate::config;

/// Bits that let others than the owner use the control socket.
const FOR_OTHERS: u32 = 0o077;

/// Whether a monitor listens there, and which process it is.
pub(super) fn monitor(control: &Path, findings: &mut Vec<Finding>) -> Option<Pid> {
    let what = format!("control socket {}", control.display());
    let stream = match UnixStream::connect(control) {
        Ok(stream) => stream,
        Err(error) => {
            findings.push(unconnected(what, &error));
            return None;
        }
    };
    let monitor = socket_peercred(&stream).ok().map(|peer| peer.pid);
    let mode = fs::metadata(control).map_or(0, |found| found.mode()) & 0o7777;
    if mode & FOR_OTHERS != 0 {
        let why = format!("others than its owner may change things there (mode {mode:04o})");
        findings.push(Finding::fail(what, why, "chmod 0600"));
    } else {
        let process = monitor.map_or_else(String::new, |pid| format!(", process {}", pid.as_raw_nonzero()));
        findings.push(Finding::ok(what, format!("a monitor listens{process}")));
    }
    monitor
}

fn unconnected(what: String, error: &io::Error) -> Finding {
    match error.kind() {
        io::ErrorKind::NotFound => Finding::fail(
            what,
            "there is no monitor",
            "start `vmflow serve`, or name its socket with --control",
        ),
        io::ErrorKind::ConnectionRefused => Finding::fail(
            what,
            "is left of a monitor that was killed",
            "start `vmflow serve`: it replaces it",
        ),
        io::ErrorKind::PermissionDenied => Finding::warn(what, "may not be opened", "run as root"),
        _ => Finding::fail(what, error.to_string(), "look whether `vmflow serve` still runs"),
    }
}

/// Whether a port's socket is as it is configured, and whether the user who is to come can reach it.
pub(super) fn port(what: &str, port: &config::Port) -> Finding {
    let found = match fs::symlink_metadata(&port.socket) {
        Ok(found) => found,
        Err(error) => {
            return Finding::fail(what, format!("its socket: {error}"), "restart vmflow: it makes it");
        }
    };
    if !found.file_type().is_socket() {
        return Finding::fail(
            what,
            "something else is in its socket's place",
            "move it away and restart vmflow",
        );
    }
    let mode = found.mode() & 0o7777;
    let differs = |which: &str, is: u32, wanted: Option<u32>| {
        wanted
            .filter(|wanted| is != *wanted)
            .map(|wanted| format!("its socket's {which} is {is}, not {wanted}"))
    };
    let differs = differs("owner", found.uid(), port.owner)
        .or_else(|| differs("group", found.gid(), port.group))
        .or_else(|| {
            (mode != port.socket_mode)
                .then(|| format!("its socket's mode is {mode:04o}, not {:04o}", port.socket_mode))
        });
    if let Some(why) = differs {
        return Finding::fail(what, why, "somebody has changed it: restart vmflow");
    }
    let Some(user) = port.peer.or(port.owner).filter(|user| *user != 0) else {
        return Finding::ok(what, "its socket is as it is configured");
    };
    if !may(user, &found, 0o2) {
        let why = format!("user {user} may not connect to its socket (mode {mode:04o})");
        return Finding::fail(what, why, "set owner to that user, or group to its group");
    }
    match closed_directory(user, &port.socket) {
        None => Finding::ok(what, format!("user {user} can connect to its socket")),
        Some(directory) => {
            let why = format!("user {user} may not enter {directory}, where its socket is");
            Finding::fail(what, why, "let that user enter it, as by chmod o+x, or choose another directory")
        }
    }
}

/// The first directory above a path that a user may not enter.
fn closed_directory(user: u32, path: &Path) -> Option<String> {
    let above: Vec<_> = path.ancestors().skip(1).collect();
    let closed = above
        .into_iter()
        .rev()
        .find(|directory| fs::metadata(directory).is_ok_and(|found| !may(user, &found, 0o1)));
    closed.map(|directory| directory.display().to_string())
}

/// Whether a user has a right, as a bit of what others have. Which groups the user is in is not known here: what the
/// group may counts for everybody.
fn may(user: u32, found: &fs::Metadata, right: u32) -> bool {
    let for_user = if found.uid() == user { right << 6 } else { right | right << 3 };
    found.mode() & for_user != 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::PermissionsExt, net::UnixListener};

    use super::*;
    use crate::{
        client::doctor::Level,
        config::{Config, Origins},
    };

    fn said(control: &Path) -> (Option<Pid>, String) {
        let mut findings = Vec::new();
        let found = monitor(control, &mut findings);
        (found, findings[0].to_string())
    }

    #[test]
    fn no_monitor_a_dead_one_and_an_open_one_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let control = directory.path().join("control.sock");
        assert!(said(&control).1.contains("there is no monitor"));
        let listener = UnixListener::bind(&control).unwrap();
        fs::set_permissions(&control, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(said(&control).0, Some(rustix::process::getpid()));
        assert!(said(&control).1.starts_with("ok "));
        fs::set_permissions(&control, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(said(&control).1.starts_with("fail "));
        drop(listener);
        assert!(said(&control).1.contains("is left of a monitor that was killed"));
    }

    #[test]
    fn a_socket_that_its_user_cannot_reach_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("web1");
        fs::create_dir(&own).unwrap();
        let socket = own.join("net0.sock");
        let argument = format!("name=web1,socket={},tap=t,peer=12345", socket.display());
        let config = Config::load(&Origins { vms: vec![argument], ..Origins::default() }).unwrap();
        let look = || port("p", &config.vms[0].ports[0]);
        assert_eq!(look().level, Level::Fail);
        let _listener = UnixListener::bind(&socket).unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        for path in [directory.path(), &own] {
            mode(path, 0o755);
        }
        mode(&socket, 0o600);
        assert!(look().why.contains("mode is 0600, not 0660"), "{}", look());
        mode(&socket, 0o660);
        assert_eq!(look().level, Level::Ok, "{}", look());
        mode(&own, 0o700);
        assert!(look().why.contains("may not enter"), "{}", look());
    }
}
