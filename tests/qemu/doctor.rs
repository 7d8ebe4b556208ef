//! `vmflow doctor` and a QEMU whose guest's memory no other process can reach.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::harness::{Netns, Setup, VMFLOW, Vmflow, unique, wait_for};

/// A QEMU that holds the port's socket and waits.
struct Qemu(Child);

impl Qemu {
    fn start(socket: &Path, memory: &[&str]) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-S", "-nodefaults", "-no-user-config", "-display", "none", "-m", "64"]).args(memory);
        command.arg("-chardev").arg(format!("socket,id=backend,path={}", socket.display()));
        Self(command.stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the doctor says about this QEMU.
fn diagnosis(setup: &Setup, vmflow: &Vmflow, memory: &[&str]) -> (String, Option<i32>) {
    let qemu = Qemu::start(&vmflow.socket("web1"), memory);
    vmflow.wait_connected("web1", true);
    let process = format!("process {},", qemu.0.id());
    wait_for("QEMU's memory", || {
        let output = Command::new(VMFLOW).args(["doctor", "--config"]).arg(setup.file()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|line| line.contains(&process))?.to_owned();
        Some((line, output.status.code()))
    })
}

#[test]
fn a_guest_whose_memory_is_not_shared_is_told() {
    const SHARED: &str = "memory-backend-memfd,id=mem,size=64M,share=on";
    let netns = Netns::new();
    let setup = Setup::new().vm("web1", &unique("t"), &netns, "");
    let vmflow = setup.start();
    let (line, code) = diagnosis(&setup, &vmflow, &["-object", SHARED, "-machine", "pc,memory-backend=mem"]);
    assert!(line.starts_with("ok    ") && line.ends_with("shares its guest's memory"), "{line}");
    assert_eq!(code, Some(0), "{line}");
    let private = SHARED.replace("share=on", "share=off");
    for memory in [&[][..], &["-object", &private, "-machine", "pc,memory-backend=mem"]] {
        vmflow.wait_connected("web1", false);
        let (line, code) = diagnosis(&setup, &vmflow, memory);
        assert!(line.starts_with("fail  ") && line.contains("does not share its guest's memory"), "{line}");
        assert!(line.contains("share=on"), "{line}");
        assert_eq!(code, Some(1), "{line}");
    }
}
