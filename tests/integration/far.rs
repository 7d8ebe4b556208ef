//! What leaves the host: a second tap behind a bridge, for which the kernel finishes all work.
//!
//! ```text
//!   vmflow --- tap --- bridge --- tap without offloads --- test
//! ```

use std::os::fd::OwnedFd;

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use vmflow_driver::vnet::{VnetHeader, flag, gso};

use crate::{
    harness::{PATIENCE, unique, wait_for},
    rig::Rig,
};

/// Bytes of the virtio-net header before each frame.
const HEADER: usize = 12;
/// More than any frame has.
const ROOM: usize = 70_000;
/// Frames that may wait in it, so that a test may send first and look later.
const HELD: &str = "10000";
/// The state of a bridge's port that passes frames (`BR_STATE_FORWARDING`).
const FORWARDING: &str = "3";

/// The far side of a VM's tap.
pub struct Far {
    tap: OwnedFd,
}

impl Far {
    /// Connects a VM's tap with one.
    pub fn of(rig: &Rig, vm: usize) -> Self {
        let (name, bridge) = (unique("f"), unique("b"));
        let tap = rig.netns.inside(|| vmflow::tap::attach(&name)).unwrap();
        let ip = |words: &str| rig.netns.run("ip", &words.split(' ').collect::<Vec<_>>());
        // The kernel can have bridges look into packets, and drop those that are not right.
        let looks = "for f in /proc/sys/net/bridge/bridge-nf-call-*; do [ ! -e $f ] || echo 0 >$f; done";
        rig.netns.run("sh", &["-c", looks]);
        // This one neither listens to what groups are joined, nor asks, nor learns who is where.
        ip(&format!("link add {bridge} up type bridge mcast_snooping 0"));
        let mtu = rig.netns.run("cat", &[&format!("/sys/class/net/{}/mtu", rig.taps[vm])]);
        ip(&format!("link set {name} mtu {} txqueuelen {HELD} master {bridge} up", mtu.trim()));
        ip(&format!("link set {} master {bridge}", rig.taps[vm]));
        ip(&format!("link set {} type bridge_slave learning off", rig.taps[vm]));
        let far = Self { tap };
        wait_for("the bridge", || {
            let path = format!("/sys/class/net/{name}/brport/state");
            (rig.netns.run("cat", &[&path]).trim() == FORWARDING).then_some(())
        });
        far
    }

    /// The next frame; of the kernel's header nothing is left to be done.
    pub fn receive(&self) -> Vec<u8> {
        let mut bytes = vec![0; ROOM];
        let length = loop {
            match rustix::io::read(&self.tap, &mut bytes[..]) {
                Ok(length) => break length,
                Err(Errno::AGAIN) => self.wait(),
                Err(e) => panic!("a frame that left the host: {e}"),
            }
        };
        bytes.truncate(length);
        let header = VnetHeader::parse(&bytes[..HEADER]).unwrap();
        assert_eq!((header.flags & flag::NEEDS_CSUM, header.gso_type), (0, gso::NONE), "{header:?}");
        bytes.drain(..HEADER);
        bytes
    }

    fn wait(&self) {
        let patience = Timespec::try_from(PATIENCE).unwrap();
        let ready = poll(&mut [PollFd::new(&self.tap, PollFlags::IN)], Some(&patience)).unwrap();
        assert!(ready > 0, "nothing left the host within {PATIENCE:?}");
    }
}
