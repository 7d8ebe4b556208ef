//! A change of the configuration while VMs run: the whole of it comes into force, or nothing.
//!
//! ```text
//!   configuration, judged
//!     | plan     labels; which ports stay, which end, which begin     nothing is touched
//!     | make     sockets and taps of ports that begin                 undone by dropping them
//!     | alter    what goes from a port that ends to one that begins   undone step by step
//!     | save     labels and added VMs                                 undone by saving what was
//!     v enforce  policies change, ports end, ports begin              cannot fail
//! ```
//!
//! The start is the same: a change from no VM to all of them. A port of which nothing changes is not touched.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::future::join_all;

use super::{
    added::{self, AddedError},
    api::document::Changes,
    checkpoint::PortCounters,
    host::{Host, Vm},
    make::{self, Made, MakeError, Wish},
    ports::{Parts, Port},
    registry::{self, Plan, Registry, RegistryError, Tag},
};
use crate::{
    config::{self, Config, Daemon, Faults},
    keeper::brief::Brief,
    label::Label,
    ledger::{DropReason, Totals, Volume},
    policy::Policy,
    tap::{self, Queues},
};

/// Users (and groups) that keepers run as: this number plus the VM's label. The range up to 2^31 belongs to
/// no distribution's users, containers or dynamic services.
const UID_BASE: u32 = 0x7000_0000;
/// Labels beyond this share a user with another VM; nobody has that many.
const UID_COUNT: u32 = 0x0fff_fffe;

/// What is in force, and on disk. Whoever holds it may change it: one change at a time.
#[derive(Debug)]
pub struct InForce {
    /// The configuration.
    pub config: Config,
    /// Saved from threads that may wait for the disk.
    registry: Arc<Mutex<Registry>>,
    /// Taps that were handed in, by name. They stay ours whether a port has them or not.
    handed_in: HashMap<String, Queues>,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] Faults),
    /// Only a restart can change this.
    #[error("{0} under [daemon] cannot change while vmflow runs: change it back, or restart vmflow")]
    NeedsRestart(&'static str),
    /// A label is not to be had.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A socket or tap is not to be had.
    #[error(transparent)]
    Make(#[from] MakeError),
    /// The change could not be saved.
    #[error(transparent)]
    Added(#[from] AddedError),
    /// An added VM has no form in a file.
    #[error("cannot write down the VM: {0}")]
    Unwritable(#[from] toml::ser::Error),
}

impl ChangeError {
    /// True if what was asked for is wrong, not the host: the exit code is then that of a configuration.
    #[must_use]
    pub const fn is_configuration(&self) -> bool {
        match self {
            Self::Config(_) | Self::NeedsRestart(_) => true,
            Self::Registry(error) => error.is_configuration(),
            Self::Make(_) | Self::Added(_) | Self::Unwritable(_) => false,
        }
    }
}

/// What becomes of the files of added VMs.
#[derive(Clone, Debug)]
pub enum Files {
    /// Nothing.
    Stay,
    /// This one is written.
    Keep(PathBuf, String),
    /// This one is removed.
    Forget(PathBuf),
}

impl InForce {
    /// Nothing yet, but what belongs to the monitor itself.
    #[must_use]
    pub fn new(config: &Config, registry: Registry, handed_in: HashMap<String, Queues>) -> Self {
        let config = Config { vms: Vec::new(), ..config.clone() };
        Self { config, registry: Arc::new(Mutex::new(registry)), handed_in }
    }

    /// Does something with the labels, on a thread that may wait for the disk.
    pub async fn registry<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Registry) -> T + Send + 'static,
    ) -> T {
        let registry = Arc::clone(&self.registry);
        blocking(move || work(&mut registry.lock().unwrap_or_else(PoisonError::into_inner))).await
    }

    /// Puts labels and files on disk, or leaves them as they were.
    async fn save(&self, plan: Plan, files: Files) -> Result<(), ChangeError> {
        self.registry(move |registry| {
            let before = registry.plan();
            // In this order: whatever breaks off in between, a label that was retired does not come back.
            registry.adopt(plan)?;
            let saved = match files {
                Files::Stay => Ok(()),
                Files::Keep(file, text) => added::keep(&file, &text),
                Files::Forget(file) => added::forget(&file),
            };
            if saved.is_err()
                && let Err(error) = registry.adopt(before)
            {
                tracing::error!("the labels of a change that was not made stay changed: {error}");
            }
            Ok(saved?)
        })
        .await
    }
}

/// Runs what may block on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // It is never cancelled, so it panicked.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

impl Host {
    /// Turns what runs into what is configured.
    ///
    /// # Errors
    /// [`ChangeError`]: nothing is changed then.
    pub(super) async fn apply(
        &self,
        in_force: &mut InForce,
        next: Config,
        files: Files,
    ) -> Result<Changes, ChangeError> {
        refuse_restart(&in_force.config.daemon, &next.daemon)?;
        let before = self.vms();
        let (plan, labels) = plan_labels(in_force, &before, &next).await?;
        let mut drafts = Drafts::new(&before, &next, &labels, &plan);
        for wish in &mut drafts.wishes {
            wish.counted = self.checkpoint.counted((wish.brief.label(), wish.brief.port));
        }
        let there: Vec<_> = before.iter().flat_map(|vm| &vm.ports).cloned().collect();
        let ending: Vec<_> = there.iter().filter(|port| !drafts.stays(port)).cloned().collect();
        let wishes = std::mem::take(&mut drafts.wishes);
        let mut made = make::make(wishes, &ending, &there, &in_force.handed_in).await?;
        let altered = make::alter(&mut made).await?;
        if let Err(error) = in_force.save(plan, files).await {
            altered.undo().await;
            return Err(error);
        }
        in_force.config = next;
        let changes = drafts.changes(&before);
        let vms = drafts.finish(made);
        self.enforce(vms, &ending).await;
        // The kernel takes its time to remove a tap, which it does when the last descriptor is closed.
        let taps: Vec<_> = ending.iter().filter_map(|port| port.tap.share(u16::MAX).ok()).collect();
        drop((before, there, ending));
        blocking(move || drop(taps)).await;
        Ok(changes)
    }

    /// Ends ports, and begins others. Which ports stay is told by the VMs.
    async fn enforce(&self, vms: Vec<Rc<Vm>>, ending: &[Rc<Port>]) {
        let there: HashSet<_> = self.vms().iter().flat_map(|vm| &vm.ports).map(Rc::as_ptr).collect();
        for vm in &vms {
            vm.announce();
        }
        join_all(ending.iter().map(|port| port.end())).await;
        for port in ending {
            self.checkpoint.gather(port);
            match vms.iter().flat_map(|vm| &vm.ports).find(|next| next.is_successor_of(port)) {
                Some(next) if Rc::ptr_eq(&next.tally, &port.tally) => {}
                Some(next) => next.tally.go_on_from(&PortCounters::of(port)),
                None => say_farewell(port),
            }
        }
        for port in vms.iter().flat_map(|vm| &vm.ports).filter(|port| !there.contains(&Rc::as_ptr(port))) {
            if ending
                .iter()
                .any(|before| before.has_tap_of(&port.config) && before.brief.label != port.brief.label)
            {
                tap::drain(port.tap.first());
            }
            port.start();
        }
        self.replace(vms);
    }
}

/// What belongs to sockets and directories that are open cannot change.
fn refuse_restart(now: &Daemon, next: &Daemon) -> Result<(), ChangeError> {
    // Which labels may be given is asked anew each time.
    let Daemon { control, stats, stats_group, state, labels: _, node } = now;
    let fixed = [
        ("control", *control == next.control),
        ("stats", *stats == next.stats),
        ("stats_group", *stats_group == next.stats_group),
        ("state", *state == next.state),
        ("node", *node == next.node),
    ];
    let changed = fixed.iter().find(|(_, is_same)| !is_same);
    changed.map_or(Ok(()), |(key, _)| Err(ChangeError::NeedsRestart(key)))
}

/// The labels of the VMs that are wanted, in their order; those of VMs that go are retired.
async fn plan_labels(
    in_force: &InForce,
    before: &[Rc<Vm>],
    next: &Config,
) -> Result<(Plan, Vec<Label>), ChangeError> {
    let mut plan = in_force.registry(|registry| registry.plan()).await;
    let claim = |vm: &config::Vm| registry::Claim { name: vm.name.clone(), uuid: vm.uuid, label: vm.label };
    let claims: Vec<_> = next.vms.iter().map(claim).collect();
    let labels = plan.allocate(&claims, &next.daemon.labels)?;
    let stay: HashSet<_> = labels.iter().collect();
    for vm in before.iter().filter(|vm| !stay.contains(&vm.label())) {
        plan.retire(vm.label())?;
    }
    Ok((plan, labels))
}

/// The VMs as they are to be.
struct Drafts {
    vms: Vec<Draft>,
    /// The ports that begin, in the order of the VMs.
    wishes: Vec<Wish>,
}

/// A VM as it is to be.
struct Draft {
    config: config::Vm,
    policy: Policy,
    tag: Option<Tag>,
    before: Option<Rc<Vm>>,
    /// Its ports; none where one begins.
    ports: Vec<Option<Rc<Port>>>,
}

impl Drafts {
    fn new(before: &[Rc<Vm>], next: &Config, labels: &[Label], plan: &Plan) -> Self {
        let before: HashMap<_, _> = before.iter().map(|vm| (vm.label(), vm)).collect();
        let mut drafts = Self { vms: Vec::new(), wishes: Vec::new() };
        for (vm, label) in next.vms.iter().zip(labels) {
            let tag = plan.entry(*label).and_then(|entry| entry.suspect.clone());
            let suspect_action = vm.suspect.unwrap_or(next.suspect);
            let mut policy = Policy { generation: 1, label: *label, tagged: tag.is_some(), suspect_action };
            let before = before.get(label).copied().cloned();
            if let Some(before) = &before {
                let now = before.policy();
                policy.generation = now.generation + u64::from(now.suspect_action != suspect_action);
            }
            let ports = drafts.ports(vm, *label, before.as_deref());
            drafts.vms.push(Draft { config: vm.clone(), policy, tag, before, ports });
        }
        drafts
    }

    /// Keepers know their VM's name: another name begins all ports anew.
    fn ports(&mut self, vm: &config::Vm, label: Label, before: Option<&Vm>) -> Vec<Option<Rc<Port>>> {
        let mut ports = Vec::new();
        for (number, config) in vm.ports.iter().enumerate() {
            let old = before.and_then(|before| before.ports.get(number));
            let stays = old.filter(|old| old.config == *config && old.brief.vm == vm.name);
            if stays.is_none() {
                let same_queues = old.filter(|old| old.config.queue_pairs == config.queue_pairs);
                let tally = same_queues.map(|old| Rc::clone(&old.tally));
                let (brief, counted) = (brief(&vm.name, label, number, config), PortCounters::default());
                self.wishes.push(Wish { config: config.clone(), brief, tally, counted });
            }
            ports.push(stays.cloned());
        }
        ports
    }

    fn stays(&self, port: &Rc<Port>) -> bool {
        self.vms.iter().flat_map(|vm| &vm.ports).flatten().any(|stays| Rc::ptr_eq(stays, port))
    }

    /// What is different from before, by the names of VMs.
    fn changes(&self, before: &[Rc<Vm>]) -> Changes {
        let name = |draft: &Draft| draft.config.name.clone();
        let stay: HashSet<_> = self.vms.iter().filter_map(|vm| vm.before.as_ref()).map(Rc::as_ptr).collect();
        let gone = before.iter().filter(|vm| !stay.contains(&Rc::as_ptr(vm)));
        Changes::new(
            self.vms.iter().filter(|vm| vm.before.is_none()).map(name).collect(),
            gone.map(|vm| vm.config.name.clone()).collect(),
            self.vms.iter().filter(|vm| vm.is_changed()).map(name).collect(),
        )
    }

    /// The VMs, with what was made for the ports that begin.
    fn finish(self, made: Vec<Made>) -> Vec<Rc<Vm>> {
        let mut made = made.into_iter();
        let mut vms = Vec::with_capacity(self.vms.len());
        for Draft { config, policy, tag, ports, .. } in self.vms {
            let begin = |Made { config, brief, doorbell, tap, tally, .. }: Made| {
                Rc::new(Port::new(Parts { config, brief, doorbell, tap, tally, policy }))
            };
            let ports =
                ports.into_iter().filter_map(|stays| stays.or_else(|| made.next().map(begin))).collect();
            vms.push(Rc::new(Vm::new(config, policy, tag, ports)));
        }
        vms
    }
}

impl Draft {
    fn is_changed(&self) -> bool {
        self.before.as_ref().is_some_and(|before| {
            !before.config.is_same_as(&self.config) || before.policy().generation != self.policy.generation
        })
    }
}

/// What the keepers of a port are told, but for what its tap says: MTU and offloads.
fn brief(vm: &str, label: Label, number: usize, config: &config::Port) -> Brief {
    Brief {
        monitor: std::process::id(),
        vm: vm.to_owned(),
        label: label.get(),
        port: number,
        uid: UID_BASE + label.get() % UID_COUNT,
        queue_pairs: config.queue_pairs,
        mtu: 0,
        mac: config.mac.map(config::Mac::bytes),
        control_queue: config.control_queue,
        uso: false,
        coalesce: config.coalesce,
        poll_us: config.poll_us,
    }
}

/// The last that is heard of a port: nobody can ask for its numbers any more.
fn say_farewell(port: &Port) {
    let Brief { vm, label, port: number, .. } = &port.brief;
    let [receive, transmit] = port.tally.counted();
    let (transmit, receive) = (in_words(transmit.totals()), in_words(receive.totals()));
    tracing::info!(
        vm,
        label,
        port = number,
        transmit,
        receive,
        "the port is removed, with these last totals"
    );
}

/// Totals for people: what there was.
fn in_words(totals: &Totals) -> String {
    let volume = |Volume { frames, packets, bytes, wire_bytes }: Volume| {
        format!("{frames} frames, {packets} packets, {bytes} bytes, {wire_bytes} wire bytes")
    };
    let dropped = DropReason::ALL.iter().zip(totals.dropped).filter(|(_, frames)| *frames > 0);
    let dropped = dropped.map(|(reason, frames)| format!("; {frames} frames dropped: {}", reason.name()));
    let (passed, suspect) = (volume(totals.passed), volume(totals.suspect));
    format!("passed {passed}; suspect {suspect}{}", dropped.collect::<Vec<_>>().concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_totals_name_what_was_dropped_and_why() {
        let mut totals = Totals { passed: Volume::frame(2, 3000, 3054), ..Totals::default() };
        totals.dropped[DropReason::Runt.index()] = 7;
        assert_eq!(
            in_words(&totals),
            "passed 1 frames, 2 packets, 3000 bytes, 3054 wire bytes; \
             suspect 0 frames, 0 packets, 0 bytes, 0 wire bytes; 7 frames dropped: runt"
        );
    }
}
