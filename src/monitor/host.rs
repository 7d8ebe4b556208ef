//! All VMs of this host, as the API sees them.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::Mutex;

use super::{
    api::{
        Command, CommandError, TagRequest,
        document::{self, Mode, PortDocument, PortStats, Stats, VmDocument, VmStats, Vms, rfc3339},
    },
    ports::Port,
    registry::{Registry, Tag},
};
use crate::{
    config,
    ledger::Known,
    policy::{Policy, SuspectAction},
};

/// How long a worker may take to acknowledge a policy: it does between two batches.
const PATIENCE: Duration = Duration::from_secs(2);

/// One VM.
#[derive(Debug)]
pub struct Vm {
    config: config::Vm,
    policy: Cell<Policy>,
    tag: RefCell<Option<Tag>>,
    ports: Vec<Rc<Port>>,
}

impl Vm {
    /// A VM with its ports set up; in the order of its configuration.
    #[must_use]
    pub const fn new(config: config::Vm, policy: Policy, tag: Option<Tag>, ports: Vec<Rc<Port>>) -> Self {
        Self { config, policy: Cell::new(policy), tag: RefCell::new(tag), ports }
    }
}

/// This host.
#[derive(Debug)]
pub struct Host {
    node: String,
    vms: Vec<Vm>,
    /// One change at a time.
    registry: Mutex<Registry>,
}

impl Host {
    /// A host with its VMs set up.
    #[must_use]
    pub fn new(node: String, vms: Vec<Vm>, registry: Registry) -> Self {
        Self { node, vms, registry: Mutex::new(registry) }
    }

    /// Every port.
    pub fn ports(&self) -> impl Iterator<Item = &Rc<Port>> {
        self.vms.iter().flat_map(|vm| &vm.ports)
    }

    /// Does what the API asks. A change goes on in a task of its own: it may have to wait for a worker.
    pub fn obey(self: Rc<Self>, command: Command) {
        match command {
            Command::Stats(reply) => {
                let _ = reply.send(self.stats());
            }
            Command::Vms(reply) => {
                let _ = reply.send(Vms::new(self.node.clone(), self.vms.iter().map(Vm::document).collect()));
            }
            Command::Tag { vm, tag, reply } => {
                tokio::task::spawn_local(async move {
                    let _ = reply.send(self.tag(&vm, tag).await);
                });
            }
        }
    }

    fn stats(&self) -> Stats {
        Stats::new(self.node.clone(), self.vms.iter().map(Vm::stats).collect())
    }

    /// Tags a VM, or clears its tag: first on disk, then in every worker.
    async fn tag(&self, name: &str, wanted: Option<TagRequest>) -> Result<VmDocument, CommandError> {
        let vm = self.vms.iter().find(|vm| vm.config.name == name);
        let vm = vm.ok_or_else(|| CommandError::NoSuchVm(name.into()))?;
        let tag = wanted.map(|TagRequest { reason, by }| Tag { reason, by, at: seconds_since_1970() });
        let mut registry = self.registry.lock().await;
        registry
            .set_suspect(vm.policy.get().label, tag.clone())
            .map_err(|e| CommandError::State(e.to_string()))?;
        let (reason, by) = tag.as_ref().map_or(("", ""), |tag| (&*tag.reason, &*tag.by));
        tracing::info!(vm = name, suspect = tag.is_some(), reason, by, "the operator's tag");
        vm.tag.replace(tag);
        vm.enforce().await?;
        Ok(vm.document())
    }
}

impl Vm {
    /// Puts the tag in force at every port.
    async fn enforce(&self) -> Result<(), CommandError> {
        let old = self.policy.get();
        let tagged = self.tag.borrow().is_some();
        let policy = Policy { generation: old.generation + 1, tagged, ..old };
        self.policy.set(policy);
        for port in &self.ports {
            port.announce(policy);
        }
        let mut silent = Vec::new();
        for (port, config) in self.ports.iter().zip(&self.config.ports) {
            if !port.enforced(policy.generation, PATIENCE).await {
                silent.push(config.tap.as_str());
            }
        }
        if silent.is_empty() {
            return Ok(());
        }
        let taps = silent.join(", ");
        Err(CommandError::NotApplied(format!("the worker of tap {taps} did not acknowledge it")))
    }

    fn tag(&self) -> Option<document::Tag> {
        let tag = self.tag.borrow();
        tag.as_ref().map(|tag| document::Tag {
            reason: tag.reason.clone(),
            by: tag.by.clone(),
            since: rfc3339(UNIX_EPOCH + Duration::from_secs(tag.at)),
        })
    }

    fn document(&self) -> VmDocument {
        let policy = self.policy.get();
        let action = match policy.suspect_action {
            SuspectAction::Count => "count",
            SuspectAction::Drop => "drop",
        };
        let (name, uuid) = (self.config.name.clone(), self.config.uuid);
        let mut document = VmDocument::new(name, uuid, policy.label, self.tag(), action.into());
        document.ports =
            self.ports.iter().zip(&self.config.ports).map(|(port, config)| describe(port, config)).collect();
        document
    }

    fn stats(&self) -> VmStats {
        let (name, uuid) = (self.config.name.clone(), self.config.uuid);
        let mut stats = VmStats::new(name, uuid, self.policy.get().label, self.tag());
        stats.ports =
            self.ports.iter().zip(&self.config.ports).map(|(port, config)| count(port, config)).collect();
        stats
    }
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn describe(port: &Port, config: &config::Port) -> PortDocument {
    PortDocument {
        socket: config.socket.display().to_string(),
        mode: mode(config),
        tap: config.tap.to_string(),
        netns: netns(config),
        connected: port.is_connected(),
        mac: config.mac.map(|mac| mac.to_string()),
        mtu: Some(port.brief.mtu),
    }
}

fn count(port: &Port, config: &config::Port) -> PortStats {
    let [receive, transmit] = port.counted();
    let both = |value: fn(&Known) -> u64| value(&receive) + value(&transmit);
    PortStats {
        socket: config.socket.display().to_string(),
        mode: mode(config),
        tap: config.tap.to_string(),
        netns: netns(config),
        connected: port.is_connected(),
        queue_pairs: port.brief.queue_pairs,
        worker_restarts: port.worker_restarts(),
        uncertain: both(Known::uncertain),
        queue_faults: both(Known::queue_faults),
        refused_connections: port.refused(),
        connections: port.connections(),
        connections_given_up: port.connections_given_up(),
        transmit: transmit.totals().into(),
        receive: receive.totals().into(),
    }
}

const fn mode(config: &config::Port) -> Mode {
    match config.mode {
        config::Mode::Server => Mode::Server,
        config::Mode::Client => Mode::Client,
    }
}

fn netns(config: &config::Port) -> Option<String> {
    config.netns.as_ref().map(ToString::to_string)
}
