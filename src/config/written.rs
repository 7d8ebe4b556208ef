//! The way back: a VM as a `[[vm]]` table has it, with every value as it was understood. So a VM that was added
//! while running is kept in the language of the configuration, and judged like one when it is read again.

use std::path::Path;

use serde::{Serialize, Serializer};
use uuid::Uuid;

use super::{Mode, Port, SuspectAction, Vm};

/// The head of a file that holds an added VM.
const HEAD: &str =
    "# Added while vmflow ran, and kept by it: change it with `vmflow remove` and `vmflow add`.\n";

#[derive(Serialize)]
struct WrittenVms<'a> {
    vm: [&'a Vm; 1],
}

#[derive(Serialize)]
struct WrittenVm<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    suspect: Option<WrittenSuspect>,
    port: Vec<WrittenPort<'a>>,
}

#[derive(Serialize)]
struct WrittenSuspect {
    action: &'static str,
}

#[derive(Serialize)]
struct WrittenPort<'a> {
    socket: &'a Path,
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<WrittenPeer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<u32>,
    /// None in client mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    socket_mode: Option<String>,
    tap: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    netns: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bridge: Option<&'a str>,
    queue_pairs: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u16>,
    control_queue: bool,
    coalesce: bool,
    poll_us: u16,
}

#[derive(Serialize)]
struct WrittenPeer {
    uid: u32,
}

/// As a `[[vm]]` table; users and groups are numbers.
impl Serialize for Vm {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let written = WrittenVm {
            name: &self.name,
            uuid: self.uuid,
            label: self.label.map(crate::label::Label::get),
            suspect: self.suspect.map(|action| WrittenSuspect { action: action.name() }),
            port: self.ports.iter().map(WrittenPort::of).collect(),
        };
        written.serialize(serializer)
    }
}

impl<'a> WrittenPort<'a> {
    fn of(port: &'a Port) -> Self {
        Self {
            socket: &port.socket,
            mode: port.mode.name(),
            peer: port.peer.map(|uid| WrittenPeer { uid }),
            owner: port.owner,
            group: port.group,
            socket_mode: (port.mode == Mode::Server).then(|| format!("{:04o}", port.socket_mode)),
            tap: port.tap.as_str(),
            netns: port.netns.as_ref().map(ToString::to_string),
            bridge: port.bridge.as_deref(),
            queue_pairs: port.queue_pairs,
            mac: port.mac.map(|mac| mac.to_string()),
            mtu: port.mtu,
            control_queue: port.control_queue,
            coalesce: port.coalesce,
            poll_us: port.poll_us,
        }
    }
}

impl Vm {
    /// The text of a file in `vms.d` that describes this VM.
    ///
    /// # Errors
    /// When a value has no form in TOML: none has.
    pub fn to_file(&self) -> Result<String, toml::ser::Error> {
        Ok(format!("{HEAD}{}", toml::to_string(&WrittenVms { vm: [self] })?))
    }
}

impl SuspectAction {
    /// The word in the configuration and in documents.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Drop => "drop",
        }
    }
}
