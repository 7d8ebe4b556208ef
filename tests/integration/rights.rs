//! What vmflow's processes may do, and who may speak to its sockets.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use rustix::{fs::Uid, thread::set_thread_res_uid};
use vmflow_driver::{
    channel::{Channel, Deadline},
    net::{Config, Device},
};

use crate::{
    harness::{PATIENCE, name, wait_for},
    rig::{NAMES, Rig, passes},
};

/// A user of its own for the front end.
const PEER: u32 = 12_345;
/// How soon a front end of the wrong user is sent away.
const SOON: Duration = Duration::from_secs(5);

/// The value of a line of `/proc/PID/status`.
fn status(pid: u32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
}

/// One process without any right.
fn has_no_rights(pid: u32) {
    let name = name(pid);
    for id in status(pid, "Uid").split_whitespace().chain(status(pid, "Gid").split_whitespace()) {
        assert_ne!(id, "0", "{name}");
    }
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status(pid, set), 16).unwrap(), 0, "{name}: {set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1", "{name}");
    assert_eq!(status(pid, "Groups"), "", "{name}");
    for namespace in ["net", "mnt", "ipc"] {
        let link = |of: &str| fs::read_link(format!("/proc/{of}/ns/{namespace}")).unwrap();
        assert_ne!(link(&pid.to_string()), link("self"), "{name}: namespace {namespace}");
    }
    let interfaces = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    let interfaces: Vec<_> =
        interfaces.lines().skip(2).map(|line| line.split(':').next().unwrap().trim()).collect();
    assert_eq!(interfaces, ["lo"], "{name}");
    let root: Vec<_> = fs::read_dir(format!("/proc/{pid}/root")).unwrap().collect();
    assert!(root.is_empty(), "{name} sees {root:?}");
    // The files of a process that is not dumpable belong to root, whoever it runs as.
    assert_eq!(fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid(), 0, "{name} is dumpable");
}

#[test]
fn keepers_and_workers_have_no_rights_and_are_called_by_their_vm() {
    let rig = Rig::two();
    let mut devices = [0, 1].map(|vm| rig.connect(vm, Config::default()));
    for (vm, device) in devices.iter_mut().enumerate() {
        passes(&rig, vm, device);
    }
    assert_eq!(name(rig.vmflow.pid()), "vmf-mon");
    let processes = rig.vmflow.processes("");
    let mut names: Vec<_> = processes.iter().map(|pid| name(*pid)).collect();
    names.sort();
    assert_eq!(names, ["vmf-k:web1", "vmf-k:web2", "vmf-w:web1", "vmf-w:web2"]);
    for pid in &processes {
        has_no_rights(*pid);
    }
    let users = |name: &str| {
        let of = |pid: &&u32| crate::harness::name(**pid).ends_with(name);
        processes.iter().filter(of).map(|pid| status(*pid, "Uid")).collect::<Vec<_>>()
    };
    assert_ne!(users(NAMES[0]), users(NAMES[1]), "each VM has a user of its own");
}

#[test]
fn a_processs_open_descriptors_are_those_of_its_port() {
    let rig = Rig::two();
    let _devices = [0, 1].map(|vm| rig.connect(vm, Config::default()));
    let taps = |pid: u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
        let infos = fds.map(|fd| fs::read_to_string(fd.unwrap().path()).unwrap_or_default());
        infos
            .filter_map(|info| info.lines().find_map(|l| Some(l.strip_prefix("iff:")?.trim().to_owned())))
            .collect::<BTreeSet<_>>()
    };
    let processes = rig.vmflow.processes("vmf-");
    assert_eq!(processes.len(), 4, "a keeper and a worker each");
    for pid in processes {
        let vm = NAMES.iter().position(|vm| name(pid).ends_with(vm)).unwrap();
        assert_eq!(taps(pid), [rig.taps[vm].clone()].into(), "{}", name(pid));
    }
}

/// One request over a Unix socket; gives the answer's first line.
fn ask(path: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nHost: vmflow\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.lines().next().unwrap_or_default().to_owned()
}

fn mode(path: &Path) -> u32 {
    let metadata = fs::metadata(path).unwrap();
    assert!(metadata.file_type().is_socket());
    metadata.mode() & 0o7777
}

#[test]
fn the_statistics_socket_only_tells_and_the_control_socket_is_roots() {
    let rig = Rig::one("");
    let stats = rig.vmflow.directory().join("stats.sock");
    assert_eq!((mode(&stats), mode(&rig.vmflow.control())), (0o660, 0o600));
    for socket in [&stats, &rig.vmflow.control()] {
        assert_eq!(ask(socket, "GET /v1/stats"), "HTTP/1.1 200 OK");
    }
    for change in
        ["POST /v1/vms/web1/suspect", "DELETE /v1/vms/web1/suspect", "PUT /v1/stats", "POST /v1/stats"]
    {
        let answer = ask(&stats, change);
        assert!(answer.starts_with("HTTP/1.1 40"), "{change}: {answer}");
    }
    assert!(!rig.vmflow.stats().vms[0].suspect);
}

#[test]
fn a_front_end_of_another_user_is_refused_and_one_of_the_right_user_served() {
    let rig = Rig::one(&format!("peer = {{ uid = {PEER} }}\nowner = {PEER}"));
    let path = rig.socket(0);
    // This test is root, who may open any socket.
    let refused = Channel::connect(&path).unwrap();
    refused.wait_closed(Deadline::within(SOON)).unwrap();
    assert!(rig.vmflow.log().wait("refused: the front end must run as user 12345"));
    let port = rig.vmflow.port(NAMES[0]);
    assert_eq!((port.connections, port.connected), (0, false));
    let channel = std::thread::scope(|scope| {
        let connect = scope.spawn(|| {
            let user = Uid::from_raw(PEER);
            set_thread_res_uid(user, user, user).unwrap();
            Channel::connect(&path).unwrap()
        });
        connect.join().unwrap()
    });
    let mut device = Device::over(channel, Config { patience: PATIENCE, ..Config::default() }).unwrap();
    device.first().receive.refill().unwrap();
    rig.wait_carrier(0, true);
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn a_front_end_of_another_user_is_refused_while_the_right_one_is_served() {
    let rig = Rig::one("peer = { uid = 0 }");
    let mut device = rig.connect(0, Config::default());
    let path = rig.socket(0);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let user = Uid::from_raw(PEER);
            set_thread_res_uid(user, user, user).unwrap();
            let refused = Channel::connect(&path).unwrap();
            refused.wait_closed(Deadline::within(SOON)).unwrap();
        });
    });
    wait_for("the line in the log", || {
        (rig.vmflow.log().count("refused: the front end must run as user 0") == 1).then_some(())
    });
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn a_front_end_of_another_user_is_counted_as_refused() {
    let rig = Rig::one(&format!("peer = {{ uid = {PEER} }}"));
    for refused in 1..=3 {
        let channel = Channel::connect(&rig.socket(0)).unwrap();
        channel.wait_closed(Deadline::within(SOON)).unwrap();
        assert_eq!(rig.vmflow.port(NAMES[0]).refused_connections, refused);
    }
}
