//! What the monitor tells a keeper about its port: on the command line, where `ps` shows it.

use serde::{Deserialize, Serialize};

use crate::{features, label::Label};

/// One port, as its keeper and worker need to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Brief {
    /// The monitor's process: a keeper does not outlive it.
    pub monitor: u32,
    /// The VM's name.
    pub vm: String,
    /// The VM's label.
    pub label: u32,
    /// Which of the VM's ports: 0 is the first.
    pub port: usize,
    /// The user and group that keeper and worker run as.
    pub uid: u32,
    /// Queue pairs that the port offers.
    pub queue_pairs: u16,
    /// The tap's MTU in bytes.
    pub mtu: u16,
    /// The device's MAC address, if it has one of its own.
    pub mac: Option<[u8; 6]>,
    /// The VMM serves a control queue itself.
    pub control_queue: bool,
    /// The tap takes and gives UDP unsegmented.
    pub uso: bool,
    /// Neighbouring frames of one flow are put together on their way to the tap.
    pub coalesce: bool,
    /// How long a pair's thread looks for more frames before it sleeps, in microseconds.
    pub poll_us: u16,
}

impl Brief {
    /// The virtio and vhost-user features that the port offers.
    #[must_use]
    pub const fn features(&self) -> u64 {
        let mac = if self.mac.is_some() { features::MAC } else { 0 };
        let control = if self.control_queue { features::CTRL_VQ | features::GUEST_ANNOUNCE } else { 0 };
        // A guest asks for more than one pair through the control queue.
        let many = if self.queue_pairs > 1 && self.control_queue { features::MQ } else { 0 };
        let uso = if self.uso { features::USO } else { 0 };
        features::ALWAYS | mac | control | many | uso
    }

    /// The VM's label; the smallest one if the monitor gave none, which it never does.
    #[must_use]
    pub fn label(&self) -> Label {
        Label::new(self.label).unwrap_or(Label::MIN)
    }

    /// A process name of this port, as `ps` shows it: at most 15 bytes.
    #[must_use]
    pub fn process_name(&self, role: char) -> String {
        let mut name = format!("vmf-{role}:{}", self.vm);
        name.truncate(15); // VM names are ASCII
        name
    }
}

#[cfg(test)]
impl Brief {
    /// A port with everything, for tests.
    pub(super) fn example() -> Self {
        Self {
            monitor: 1,
            vm: "web1".into(),
            label: 1,
            port: 0,
            uid: 1,
            queue_pairs: 1,
            mtu: 1500,
            mac: Some([2, 0, 0, 0, 0, 7]),
            control_queue: true,
            uso: true,
            coalesce: true,
            poll_us: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn udp_segmentation_is_offered_only_where_the_tap_knows_it() {
        let brief = |uso| Brief { uso, ..Brief::example() };
        assert_eq!(brief(false).features() & features::USO, 0);
        assert_eq!(brief(true).features(), brief(false).features() | 1 << 54 | 1 << 55 | 1 << 56);
    }
}
