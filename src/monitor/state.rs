//! What outlives everything, as one document: to be taken to another host, or kept.
//!
//! `vmflow state export` writes it, `vmflow state import` reads it: from and into a vmflow that runs (`GET` and
//! `PUT /v1/state`), or the state directory of one that does not.
//!
//! An import takes nothing away: a label that another VM has is refused, and so are numbers that are lower than
//! ours in one place and higher in another. One refusal, and nothing is imported.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    checkpoint::{Checkpoint, CheckpointError, PortCounters, PortKey},
    registry::{Entry, Plan, Registry, RegistryError, Tag},
};
use crate::{config, label::Label};

/// What such a document says it is.
const FORMAT: &str = "vmflow-state";
const VERSION: u32 = 1;

/// Labels, and what was counted under them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Always `vmflow-state`.
    pub format: String,
    /// The version of this document: 1.
    pub version: u32,
    /// Each label that was ever given, in their order.
    pub vms: Vec<VmState>,
}

/// A label, whose it is or was, and what was counted under it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// The label.
    pub label: u32,
    /// The VM's name.
    pub name: String,
    /// The VM's UUID, if it has one.
    pub uuid: Option<Uuid>,
    /// Which VM of that name this is; with a UUID, which of its labels.
    pub generation: u32,
    /// True once the VM was removed.
    pub retired: bool,
    /// The operator's tag, if there is one.
    pub tag: Option<Tag>,
    /// What each of its ports has counted.
    pub ports: Vec<PortState>,
}

/// What a port has counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Its number among the VM's ports: 0 is the first.
    pub port: usize,
    /// What it has counted.
    pub counted: PortCounters,
}

/// What came of an import.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Imported {
    /// How many labels are now as the document has them, or later.
    pub vms: usize,
    /// The same for ports.
    pub ports: usize,
}

/// Why state could not be exported or imported.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// There is nothing to export.
    #[error("{}: there is no registry.json: is it the state directory of a vmflow (--state DIR)?", .0.display())]
    NoState(PathBuf),
    /// No VM has this name.
    #[error("no VM is called \"{0}\": see vmflow vms for those that there are")]
    NoSuchVm(String),
    /// The labels cannot be read or kept.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The totals cannot be read or kept.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The document is not one.
    #[error("not a state document of version {VERSION}: {0}")]
    Foreign(String),
    /// The document contradicts what is here: a line for each contradiction, and nothing was imported.
    #[error("{}", .0.iter().map(|why| format!("{why}: nothing is imported")).collect::<Vec<_>>().join("\n"))]
    Refused(Vec<String>),
}

/// A document that was judged, and contradicts nothing here.
#[derive(Debug)]
pub struct Judged {
    /// The labels, to be adopted first: numbers without a label would be refused at the next start.
    pub labels: Plan,
    /// What was counted under them.
    pub numbers: Numbers,
}

/// What was counted elsewhere.
#[derive(Debug)]
pub struct Numbers {
    ports: Vec<(PortKey, PortCounters)>,
    vms: usize,
}

impl State {
    /// Reads a document.
    ///
    /// # Errors
    /// [`StateError::Foreign`] says where it is none.
    pub fn parse(bytes: &[u8]) -> Result<Self, StateError> {
        let state: Self =
            serde_json::from_slice(bytes).map_err(|error| StateError::Foreign(error.to_string()))?;
        if (state.format.as_str(), state.version) != (FORMAT, VERSION) {
            let found = format!("it says {:?}, version {}", state.format, state.version);
            return Err(StateError::Foreign(found));
        }
        Ok(state)
    }

    /// Everything that is kept here.
    #[must_use]
    pub fn of(labels: &Plan, checkpoint: &Checkpoint) -> Self {
        let vm = |(label, entry): (Label, &Entry)| {
            let Entry { name, uuid, generation, retired, suspect } = entry.clone();
            let ports = checkpoint.of_label(label).into_iter();
            let ports = ports.map(|(port, counted)| PortState { port, counted }).collect();
            VmState { label: label.get(), name, uuid, generation, retired, tag: suspect, ports }
        };
        Self { format: FORMAT.to_owned(), version: VERSION, vms: labels.entries().map(vm).collect() }
    }

    /// Keeps these VMs only: those that have the names now.
    ///
    /// # Errors
    /// [`StateError::NoSuchVm`]: the first name that no VM has.
    pub fn keep_only(&mut self, names: &[String]) -> Result<(), StateError> {
        let is = |vm: &VmState, name: &String| !vm.retired && vm.name == *name;
        if let Some(unknown) = names.iter().find(|name| !self.vms.iter().any(|vm| is(vm, name))) {
            return Err(StateError::NoSuchVm(unknown.clone()));
        }
        self.vms.retain(|vm| names.iter().any(|name| is(vm, name)));
        Ok(())
    }

    /// What an import would change, or every reason against it.
    ///
    /// # Errors
    /// [`StateError::Refused`].
    pub fn judge(
        self,
        mut labels: Plan,
        checkpoint: &Checkpoint,
        is_served: impl Fn(Label) -> bool,
    ) -> Result<Judged, StateError> {
        let (mut refusals, mut lines, mut ports) = (Vec::new(), Vec::new(), Vec::new());
        let vms = self.vms.len();
        for vm in self.vms {
            match vm.strict(checkpoint, &is_served) {
                Ok((line, of_vm)) => {
                    lines.push(line);
                    ports.extend(of_vm);
                }
                Err(why) => refusals.push(why),
            }
        }
        if let Err(more) = labels.import(&lines) {
            refusals.extend(more);
        }
        if refusals.is_empty() {
            Ok(Judged { labels, numbers: Numbers { ports, vms } })
        } else {
            Err(StateError::Refused(refusals))
        }
    }
}

/// A line of the registry, and what was counted under its label.
type Line = ((Label, Entry), Vec<(PortKey, PortCounters)>);

impl VmState {
    fn strict(self, checkpoint: &Checkpoint, is_served: impl Fn(Label) -> bool) -> Result<Line, String> {
        let label = Label::new(self.label).map_err(|error| error.to_string())?;
        let name = config::vm_name(&self.name).map_err(|error| error.to_string())?;
        if is_served(label) {
            return Err(format!("label {label} of VM {name:?} is being served: remove its VM first"));
        }
        let mut ports = Vec::new();
        for PortState { port, counted } in self.ports {
            let key = (label, port);
            if ports.iter().any(|(other, _)| *other == key) {
                return Err(format!("port {port} of VM {name:?} is there twice"));
            }
            if !checkpoint.may_import(key, &counted) {
                let why = "some of its numbers are lower than here, others higher";
                return Err(format!("port {port} of VM {name:?}: {why}"));
            }
            ports.push((key, counted));
        }
        let Self { uuid, generation, retired, tag: suspect, .. } = self;
        Ok(((label, Entry { name, uuid, generation, retired, suspect }), ports))
    }
}

impl Numbers {
    /// Brings them into force where they are later than ours. They are in memory then, and are to be written.
    #[must_use]
    pub fn take_over(self, checkpoint: &Checkpoint) -> Imported {
        let imported = Imported { vms: self.vms, ports: self.ports.len() };
        for (key, counted) in self.ports {
            checkpoint.import(key, counted);
        }
        imported
    }
}

/// Everything that a state directory holds whose vmflow does not run.
///
/// # Errors
/// [`StateError`], whose text is one line.
pub fn export_directory(directory: &Path) -> Result<State, StateError> {
    if !directory.join("registry.json").exists() {
        return Err(StateError::NoState(directory.to_owned()));
    }
    let registry = Registry::open(directory)?;
    let checkpoint = Checkpoint::open(&registry, false)?;
    Ok(State::of(&registry.plan(), &checkpoint))
}

/// Imports into a state directory whose vmflow does not run; makes it if its parent exists.
///
/// # Errors
/// [`StateError`].
pub fn import_directory(directory: &Path, state: State) -> Result<Imported, StateError> {
    let mut registry = Registry::open(directory)?;
    let checkpoint = Checkpoint::open(&registry, false)?;
    let Judged { labels, numbers } = state.judge(registry.plan(), &checkpoint, |_| false)?;
    registry.adopt(labels)?;
    let imported = numbers.take_over(&checkpoint);
    checkpoint.write_import()?;
    Ok(imported)
}
