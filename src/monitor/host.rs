//! All VMs of this host, as the API sees them.

mod state;
mod upkeep;

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::future::join_all;
use tokio::sync::Mutex;

use super::{
    api::{
        Added, Command, CommandError, TagRequest, VmCommand, Which,
        document::{
            self, Changes, Mode, PortDocument, PortStats, Stats, VmDocument, VmStats, Vms, rfc3339_seconds,
        },
    },
    change::{ChangeError, Files, InForce, blocking},
    checkpoint::Checkpoint,
    ports::Port,
    registry::Tag,
};
use upkeep::Watch;

use crate::{
    config::{self, Config, Origins, Place},
    label::Label,
    ledger::Known,
    policy::Policy,
};

/// How long a worker may take to acknowledge a policy: it does between two batches.
const PATIENCE: Duration = Duration::from_secs(2);

/// One VM.
#[derive(Debug)]
pub struct Vm {
    pub(super) config: config::Vm,
    policy: Cell<Policy>,
    tag: RefCell<Option<Tag>>,
    pub(super) ports: Vec<Rc<Port>>,
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
    /// Where its configuration comes from.
    origins: Origins,
    /// What there is now, for those who look; changed only by whoever has `in_force`.
    vms: RefCell<Vec<Rc<Vm>>>,
    /// One change at a time.
    in_force: Mutex<InForce>,
    pub(super) checkpoint: Checkpoint,
    watch: Watch,
}

impl Host {
    /// A host without VMs yet.
    #[must_use]
    pub fn new(origins: Origins, in_force: InForce, checkpoint: Checkpoint) -> Self {
        let node = in_force.config.daemon.node.clone();
        Self {
            node,
            origins,
            vms: RefCell::default(),
            in_force: Mutex::new(in_force),
            checkpoint,
            watch: Watch::default(),
        }
    }

    /// The VMs that there are.
    #[must_use]
    pub fn vms(&self) -> Vec<Rc<Vm>> {
        self.vms.borrow().clone()
    }

    pub(super) fn replace(&self, vms: Vec<Rc<Vm>>) {
        self.vms.replace(vms);
    }

    /// Ends all ports in good order, after a change that is being made.
    pub async fn end(&self) {
        let _last = self.in_force.lock().await;
        let ports = self.ports();
        join_all(ports.iter().map(|port| port.end())).await;
        for port in &ports {
            self.checkpoint.gather(port);
        }
        self.replace(Vec::new());
    }

    /// Every port.
    fn ports(&self) -> Vec<Rc<Port>> {
        self.vms().iter().flat_map(|vm| &vm.ports).cloned().collect()
    }

    /// Does what the API asks. A change goes on in a task of its own: it may have to wait for a worker.
    pub fn obey(self: Rc<Self>, command: Command) {
        match command {
            Command::Stats(reply) => {
                tokio::task::spawn_local(async move {
                    let stats = self.stats();
                    self.checkpoint.cover(|| self.ports()).await;
                    let _ = reply.send(stats);
                });
            }
            Command::Health(reply) => {
                let _ = reply.send(self.health());
            }
            Command::Vms(reply) => {
                let vms = self.vms.borrow().iter().map(|vm| vm.document()).collect();
                let _ = reply.send(Vms::new(self.node.clone(), vms));
            }
            Command::Vm { command, by } => {
                tokio::task::spawn_local(async move {
                    match command {
                        VmCommand::Add(vm, reply) => drop(reply.send(self.add(&vm, &by).await)),
                        VmCommand::Remove(vm, reply) => drop(reply.send(self.remove(&vm, &by).await)),
                        VmCommand::Reload(reply) => drop(reply.send(self.reload(&by).await)),
                    }
                });
            }
            Command::State(command) => drop(tokio::task::spawn_local(self.obey_about_state(command))),
            Command::Tag { vm, tag, reply } => {
                tokio::task::spawn_local(async move {
                    let _ = reply.send(self.tag(&vm, tag).await);
                });
            }
        }
    }

    fn stats(&self) -> Stats {
        let vms = self.vms.borrow().iter().map(|vm| vm.stats()).collect();
        let mut stats = Stats::new(self.node.clone(), vms);
        stats.gaps = self.checkpoint.gaps().iter().map(Into::into).collect();
        stats
    }

    /// Turns what runs into what the configuration says now; at the start, from nothing.
    ///
    /// # Errors
    /// [`ChangeError`]: nothing is changed then.
    pub async fn load(&self) -> Result<Changes, ChangeError> {
        let mut in_force = self.in_force.lock().await;
        let origins = self.origins.clone();
        let next = blocking(move || Config::load(&origins)).await?;
        self.apply(&mut in_force, next, Files::Stay).await
    }

    /// As [`Self::load`], while VMs run: the log tells how it ended.
    ///
    /// # Errors
    /// As [`Self::load`], and [`CommandError::NotApplied`] for a worker that does not answer.
    pub async fn reload(&self, by: &str) -> Result<Changes, CommandError> {
        match self.load().await {
            Ok(changes) => {
                let Changes { added, removed, changed, .. } = &changes;
                tracing::info!(?added, ?removed, ?changed, by, "the configuration is reloaded");
                for vm in self.vms() {
                    vm.acknowledged().await?;
                }
                Ok(changes)
            }
            Err(error) => {
                let error = match error {
                    ChangeError::Config(faults) => CommandError::Invalid(faults.to_string()),
                    other => other.into(),
                };
                for line in error.to_string().lines() {
                    tracing::error!(by, "the configuration is not reloaded: {line}");
                }
                Err(error)
            }
        }
    }

    /// Adds a VM, described in JSON.
    async fn add(&self, vm: &[u8], by: &str) -> Result<Added, CommandError> {
        let mut in_force = self.in_force.lock().await;
        let mut vm = in_force.config.judge_addition(vm).map_err(ChangeError::from)?;
        if let Some(there) = in_force.config.vms.iter().find(|there| there.name == vm.name) {
            is_there(there, &vm)?;
            return Ok(Added { vm: self.document(&vm.name)?, is_new: false });
        }
        let file = vm.added_file(&in_force.config.daemon.state);
        let text = vm.to_file().map_err(ChangeError::from)?;
        vm.at = Place::Added(file.clone());
        let (name, mut next) = (vm.name.clone(), in_force.config.clone());
        next.vms.push(vm);
        self.apply(&mut in_force, next, Files::Keep(file, text)).await?;
        let document = self.document(&name)?;
        tracing::info!(vm = name, label = document.label, by, "the VM is added");
        Ok(Added { vm: document, is_new: true })
    }

    /// Removes a VM that was added.
    async fn remove(&self, which: &Which, by: &str) -> Result<VmDocument, CommandError> {
        let mut in_force = self.in_force.lock().await;
        let found = in_force.config.vms.iter().find(|vm| which.is(&vm.name, vm.uuid));
        let vm = found.ok_or_else(|| which.missing())?.clone();
        let Place::Added(file) = vm.at else {
            let how = match vm.at {
                Place::VmArgument { .. } => "restart vmflow without it",
                _ => "take it out there, and run `vmflow reload`",
            };
            return Err(CommandError::Conflict(format!("VM {:?} is in {}: {how}", vm.name, vm.at)));
        };
        let document = self.document(&vm.name)?;
        let mut next = in_force.config.clone();
        next.vms.retain(|other| other.name != vm.name);
        self.apply(&mut in_force, next, Files::Forget(file)).await?;
        tracing::info!(vm = vm.name, label = document.label, by, "the VM is removed, and its label retired");
        Ok(document)
    }

    fn find(&self, name: &str) -> Result<Rc<Vm>, CommandError> {
        let found = self.vms.borrow().iter().find(|vm| vm.config.name == name).cloned();
        found.ok_or_else(|| CommandError::NoSuchVm(name.to_owned()))
    }

    fn document(&self, name: &str) -> Result<VmDocument, CommandError> {
        Ok(self.find(name)?.document())
    }

    /// Tags a VM, or clears its tag: first on disk, then in every worker.
    async fn tag(&self, name: &str, wanted: Option<TagRequest>) -> Result<VmDocument, CommandError> {
        let in_force = self.in_force.lock().await;
        let vm = self.find(name)?;
        let tag = wanted.map(|TagRequest { reason, by }| Tag { reason, by, at: seconds_since_1970() });
        let (label, written) = (vm.label(), tag.clone());
        let saved = in_force.registry(move |registry| registry.set_suspect(label, written)).await;
        saved.map_err(|e| CommandError::State(e.to_string()))?;
        let (reason, by) = tag.as_ref().map_or(("", ""), |tag| (&*tag.reason, &*tag.by));
        let label = vm.label().get();
        tracing::info!(vm = name, label, suspect = tag.is_some(), reason, by, "the operator's tag");
        vm.enforce(tag).await?;
        Ok(vm.document())
    }
}

/// Refuses to add a VM that is there already, unless it is the same in every way: hooks repeat themselves.
fn is_there(there: &config::Vm, vm: &config::Vm) -> Result<(), CommandError> {
    let (name, at) = (&there.name, &there.at);
    if !there.is_added() {
        let text = format!("VM {name:?} is in {at}: change it there, and run `vmflow reload`");
        return Err(CommandError::Conflict(text));
    }
    if !there.is_same_as(vm) {
        let text = format!("VM {name:?} is there with other settings: run `vmflow remove {name}` first");
        return Err(CommandError::Conflict(text));
    }
    Ok(())
}

impl From<ChangeError> for CommandError {
    fn from(error: ChangeError) -> Self {
        let kind = match &error {
            ChangeError::Config(faults) if !faults.are_conflicts() => Self::Invalid,
            ChangeError::Registry(registry) if !registry.is_configuration() => Self::State,
            ChangeError::Added(_) | ChangeError::Unwritable(_) => Self::State,
            _ => Self::Conflict,
        };
        // With the reasons that the errors below give.
        kind(format!("{:#}", anyhow::Error::from(error)))
    }
}

impl Vm {
    pub(super) const fn label(&self) -> Label {
        self.policy.get().label
    }

    pub(super) const fn policy(&self) -> Policy {
        self.policy.get()
    }

    /// Tells every port the policy, if it is another one.
    pub(super) fn announce(&self) {
        for port in &self.ports {
            port.announce(self.policy.get());
        }
    }

    /// Puts a tag in force at every port.
    async fn enforce(&self, tag: Option<Tag>) -> Result<(), CommandError> {
        let old = self.policy.get();
        self.policy.set(Policy { generation: old.generation + 1, tagged: tag.is_some(), ..old });
        self.tag.replace(tag);
        self.announce();
        self.acknowledged().await
    }

    /// Waits until no port passes a frame under an older policy.
    async fn acknowledged(&self) -> Result<(), CommandError> {
        let generation = self.policy.get().generation;
        let mut silent = Vec::new();
        for port in &self.ports {
            if !port.enforced(generation, PATIENCE).await {
                silent.push(port.config.tap.as_str());
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
            since: rfc3339_seconds(tag.at),
        })
    }

    fn document(&self) -> VmDocument {
        let policy = self.policy.get();
        let action = policy.suspect_action.name();
        let (name, uuid) = (self.config.name.clone(), self.config.uuid);
        let mut document = VmDocument::new(name, uuid, policy.label, self.tag(), action.into());
        document.ports = self.ports.iter().map(|port| describe(port, &port.config)).collect();
        document
    }

    fn stats(&self) -> VmStats {
        let (name, uuid) = (self.config.name.clone(), self.config.uuid);
        let mut stats = VmStats::new(name, uuid, self.policy.get().label, self.tag());
        stats.ports = self.ports.iter().map(|port| count(port, &port.config)).collect();
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
    let [receive, transmit] = port.tally.counted();
    let both = |value: fn(&Known) -> u64| value(&receive).saturating_add(value(&transmit));
    PortStats {
        socket: config.socket.display().to_string(),
        mode: mode(config),
        tap: config.tap.to_string(),
        netns: netns(config),
        connected: port.is_connected(),
        queue_pairs: port.brief.queue_pairs,
        worker_restarts: port.tally.worker_restarts(),
        uncertain: both(Known::uncertain),
        queue_faults: both(Known::queue_faults),
        refused_connections: port.tally.refused.get(),
        connections: port.tally.connections.get(),
        connections_given_up: port.tally.connections_given_up(),
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
