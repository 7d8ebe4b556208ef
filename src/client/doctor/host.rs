//! The host itself: the TUN driver, what the kernel can do, rights and limits.

use std::{fs, io, path::Path};

use rustix::{
    fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, open},
    process::{Pid, PidfdFlags, getpid, pidfd_open},
};

use super::Finding;
use crate::{keeper::door, tap};

/// What the monitor does with rights: capabilities(7), with their numbers.
const NEEDED: [(&str, u32); 9] = [
    ("CAP_NET_ADMIN", 12),   // taps
    ("CAP_SYS_ADMIN", 21),   // namespaces
    ("CAP_SETUID", 7),       // keepers have users of their own
    ("CAP_SETGID", 6),       // and groups
    ("CAP_SETPCAP", 8),      // and lose every right
    ("CAP_KILL", 5),         // and are ended
    ("CAP_CHOWN", 0),        // sockets get their owners
    ("CAP_FOWNER", 3),       // and modes
    ("CAP_DAC_OVERRIDE", 1), // and are reached in other users' directories
];
/// Descriptors that the monitor needs for itself, and for each port.
const DESCRIPTORS: (usize, usize) = (64, 16);
/// A tap that is made where nobody sees it.
const PROBE: &str = "vmf-doctor";

/// The TUN driver.
pub(super) fn tun(device: &Path) -> Finding {
    let what = device.display().to_string();
    match open(device, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from) {
        Ok(_) => Finding::ok(what, "can be opened"),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => {
                let advice = "run `modprobe tun`; a container must be given the device";
                Finding::fail(what, "is missing", advice)
            }
            io::ErrorKind::PermissionDenied => Finding::fail(
                what,
                "may not be opened",
                "run as root; a container must be allowed the device",
            ),
            _ => Finding::fail(what, error.to_string(), "load the tun driver: `modprobe tun`"),
        },
    }
}

/// What keepers and workers need of the kernel, each tried: in namespaces that end with a thread.
pub(super) fn kernel() -> Vec<Finding> {
    let tried = std::thread::scope(|scope| scope.spawn(in_namespaces).join());
    let mut findings = tried.unwrap_or_default();
    findings.push(feature("sealed shared memory", sealed_memory(), "a newer kernel is needed"));
    findings.push(feature(
        "pidfd",
        pidfd_open(getpid(), PidfdFlags::empty()).map(drop),
        "a newer kernel is needed",
    ));
    findings
}

fn in_namespaces() -> Vec<Finding> {
    let advice = "run as root; a container must be allowed namespaces of its own";
    let new = feature("new namespaces", door::new_namespaces(), advice);
    if new.level > super::Level::Ok {
        return vec![new];
    }
    vec![
        new,
        match tap::attach(PROBE) {
            Err(error) => Finding::fail("a new tap", error.to_string(), "run as root, with the tun driver"),
            Ok(tap) => match tap::set_carrier(&tap, false) {
                Ok(()) => Finding::ok("a new tap", "can be made, and its carrier switched"),
                Err(error) => {
                    let why = format!("its carrier cannot be switched: {error}");
                    Finding::warn(
                        "a new tap",
                        why,
                        "the host does not see when a VM goes: use Linux 5.0 or newer",
                    )
                }
            },
        },
    ]
}

fn feature(what: &str, tried: Result<(), rustix::io::Errno>, advice: &str) -> Finding {
    match tried {
        Ok(()) => Finding::ok(what, "can be had"),
        Err(error) => Finding::fail(what, io::Error::from(error).to_string(), advice),
    }
}

fn sealed_memory() -> Result<(), rustix::io::Errno> {
    let memory = memfd_create("vmflow-doctor", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW)
}

/// The file of a process in /proc: the monitor's, or our own.
fn of_process(process: Option<Pid>, name: &str) -> io::Result<String> {
    let process = process.map_or_else(|| "self".to_owned(), |pid| pid.as_raw_nonzero().to_string());
    fs::read_to_string(format!("/proc/{process}/{name}"))
}

/// Who is looked at: the monitor while it runs, else whoever would start it.
const fn whose(monitor: Option<Pid>) -> &'static str {
    if monitor.is_some() { "the monitor" } else { "this user" }
}

/// The rights of the monitor, or of whoever runs the doctor.
pub(super) fn capabilities(monitor: Option<Pid>) -> Finding {
    let what = format!("rights of {}", whose(monitor));
    match of_process(monitor, "status") {
        Ok(status) => lacking(what, &status),
        Err(error) => Finding::warn(what, error.to_string(), "run as root"),
    }
}

fn lacking(what: String, status: &str) -> Finding {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or_default();
    let lacking: Vec<_> =
        NEEDED.iter().filter(|(_, bit)| effective >> bit & 1 == 0).map(|(name, _)| *name).collect();
    if lacking.is_empty() {
        return Finding::ok(what, "are all there");
    }
    Finding::fail(
        what,
        format!("{} missing", lacking.join(", ")),
        "start `vmflow serve` as root, or with these capabilities",
    )
}

/// The number of descriptors that the monitor may have.
pub(super) fn descriptors(monitor: Option<Pid>, ports: usize) -> Finding {
    let what = format!("descriptors of {}", whose(monitor));
    match of_process(monitor, "limits") {
        Ok(limits) => enough(what, &limits, ports),
        Err(error) => Finding::warn(what, error.to_string(), "run as root"),
    }
}

/// The monitor raises its limit as far as it may, so it is the hard one that matters.
fn enough(what: String, limits: &str, ports: usize) -> Finding {
    let line = limits.lines().find(|line| line.starts_with("Max open files"));
    let hard = line.and_then(|line| line.split_whitespace().nth(4)).unwrap_or("0");
    let (own, each) = DESCRIPTORS;
    let needed = own + each * ports;
    match hard.parse::<usize>() {
        Ok(limit) if limit < needed => {
            let why = format!("at most {limit}, and {ports} ports need some {needed}");
            Finding::fail(what, why, "raise LimitNOFILE= of its service, or `ulimit -Hn`")
        }
        _ => Finding::ok(what, format!("at most {hard} for {ports} ports")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::doctor::Level;

    #[test]
    fn a_missing_tun_device_and_one_that_is_none_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let missing = tun(&directory.path().join("tun"));
        assert_eq!((missing.level, missing.why.as_str()), (Level::Fail, "is missing"));
        assert_eq!(tun(directory.path()).level, Level::Fail);
        assert_eq!(tun(Path::new("/dev/null")).level, Level::Ok);
    }

    #[test]
    fn every_missing_right_is_named() {
        let said = |mask: &str| lacking("r".into(), &format!("Name:\tx\nCapEff:\t{mask}\n"));
        assert_eq!(said("000001ffffffffff").level, Level::Ok);
        assert_eq!(said("000001ffffffefff").why, "CAP_NET_ADMIN missing");
        assert_eq!(said("0000000000000000").why.matches("CAP_").count(), NEEDED.len());
    }

    #[test]
    fn a_limit_below_what_ports_need_is_told() {
        let limits =
            |hard| format!("Limit  Soft  Hard  Units\nMax open files            256   {hard}   files\n");
        assert_eq!(enough("d".into(), &limits("1024"), 60).level, Level::Ok);
        assert_eq!(enough("d".into(), &limits("1024"), 61).level, Level::Fail);
        assert_eq!(enough("d".into(), &limits("unlimited"), 9999).level, Level::Ok);
    }
}
