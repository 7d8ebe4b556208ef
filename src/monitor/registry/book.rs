//! Who has which label: rules only, no files.
//!
//! ```text
//!   never used --allocate--> held --retire--> retired
//!                             ^                  |
//!                             +-- the same UUID -+     nobody else, ever
//! ```
//!
//! A label has one line in the book, for good: so no two VMs can have it, now or one after the other. A VM is
//! known by its UUID, or else by its name and generation: a name that was removed and comes back is another
//! VM. A UUID that was removed and comes back is the same VM, and gets its label back.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::error::RegistryError;
use crate::label::Label;

/// An operator's tag: why a VM is suspect, who says so, and since when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = StoredTag)]
pub struct Tag {
    /// Why.
    pub reason: String,
    /// Who.
    pub by: String,
    /// Since when, in seconds since 1970 (UTC).
    pub at: u64,
}

/// A VM that wants its label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its name.
    pub name: String,
    /// What it is known by, where it has one.
    pub uuid: Option<Uuid>,
    /// The label that it must get.
    pub label: Option<Label>,
}

/// The line of a label: whose it is or was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The VM's name; that of a VM with a UUID may change.
    pub name: String,
    /// What the VM is known by, where it has one.
    pub uuid: Option<Uuid>,
    /// For a name: which VM of that name this is. For a UUID: which of its labels. From 1.
    pub generation: u32,
    /// True once the VM was removed.
    pub retired: bool,
    /// The operator's tag.
    pub suspect: Option<Tag>,
}

/// What a VM is known by, but for the generation.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Identity<'a> {
    Uuid(Uuid),
    Name(&'a str),
}

impl<'a> Identity<'a> {
    fn new(uuid: Option<Uuid>, name: &'a str) -> Self {
        uuid.map_or(Self::Name(name), Self::Uuid)
    }
}

impl Entry {
    fn identity(&self) -> Identity<'_> {
        Identity::new(self.uuid, &self.name)
    }
}

impl Claim {
    fn identity(&self) -> Identity<'_> {
        Identity::new(self.uuid, &self.name)
    }

    /// True for a line of this VM; for a name, also of an earlier VM of that name.
    fn matches(&self, entry: &Entry) -> bool {
        self.identity() == entry.identity()
    }
}

/// All labels that were ever used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Book {
    lines: BTreeMap<Label, Entry>,
}

impl Book {
    pub(super) fn entry(&self, label: Label) -> Option<&Entry> {
        self.lines.get(&label)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (Label, &Entry)> {
        self.lines.iter().map(|(label, entry)| (*label, entry))
    }

    /// Takes a line in, unless its label has one.
    pub(super) fn write(&mut self, label: Label, entry: Entry) -> bool {
        let free = !self.lines.contains_key(&label);
        if free {
            self.lines.insert(label, entry);
        }
        free
    }

    /// The book after these VMs got their labels, and the labels in the order of the claims.
    pub(super) fn allocate(
        &self,
        claims: &[Claim],
        range: &RangeInclusive<Label>,
    ) -> Result<(Self, Vec<Label>), RegistryError> {
        let mut seen = BTreeSet::new();
        if let Some(twice) = claims.iter().find(|claim| !seen.insert(claim.identity())) {
            return Err(RegistryError::ClaimedTwice { name: twice.name.clone() });
        }
        let mut next = self.clone();
        // Those whose label is settled go first, so that no other gets it.
        let settled = claims.iter().map(|claim| next.settle(claim, range)).collect::<Result<Vec<_>, _>>()?;
        let mut unused = range.start().get()..=range.end().get();
        let mut labels = Vec::with_capacity(claims.len());
        for (claim, settled) in claims.iter().zip(settled) {
            let label = if let Some(label) = settled {
                label
            } else {
                let lowest = next.lowest(&mut unused);
                let label = lowest.ok_or_else(|| RegistryError::UsedUp(range.clone()))?;
                next.hold(claim, label);
                label
            };
            labels.push(label);
        }
        Ok((next, labels))
    }

    /// Gives a VM the label that it has, had, or must get; none if any label will do.
    fn settle(
        &mut self,
        claim: &Claim,
        range: &RangeInclusive<Label>,
    ) -> Result<Option<Label>, RegistryError> {
        let name = || claim.name.clone();
        // A name that comes back is another VM, a UUID is the same.
        let known = self.latest(claim).filter(|(_, entry)| claim.uuid.is_some() || !entry.retired);
        if let (Some((has, entry)), Some(asked)) = (known, claim.label)
            && !entry.retired
            && has != asked
        {
            return Err(RegistryError::HasAnother { name: name(), has, asked });
        }
        let Some(label) = claim.label.or(known.map(|(label, _)| label)) else { return Ok(None) };
        match self.lines.get(&label) {
            Some(entry) if known.is_none() || !claim.matches(entry) => {
                let (owner, retired) = (entry.name.clone(), entry.retired);
                Err(RegistryError::LabelUsed { name: name(), label, owner, retired })
            }
            None if !range.contains(&label) => {
                Err(RegistryError::OutsideRange { name: name(), label, range: range.clone() })
            }
            _ => {
                self.hold(claim, label);
                Ok(Some(label))
            }
        }
    }

    /// The newest line of a VM, or of its name.
    fn latest(&self, claim: &Claim) -> Option<(Label, &Entry)> {
        self.entries().filter(|(_, entry)| claim.matches(entry)).max_by_key(|(_, entry)| entry.generation)
    }

    /// The lowest label of these that was never used.
    fn lowest(&self, numbers: &mut RangeInclusive<u32>) -> Option<Label> {
        numbers.filter_map(|number| Label::new(number).ok()).find(|label| !self.lines.contains_key(label))
    }

    /// Writes that a VM has a label, which is its own or nobody's.
    fn hold(&mut self, claim: &Claim, label: Label) {
        let latest = self.latest(claim).map(|(label, entry)| (label, entry.clone()));
        let (generation, suspect) = match latest {
            Some((current, entry)) if current == label => (entry.generation, entry.suspect),
            // Removing a VM and adding it again is no way to lose its tag.
            Some((_, entry)) => (entry.generation + 1, entry.suspect.filter(|_| claim.uuid.is_some())),
            None => (1, None),
        };
        let (name, uuid) = (claim.name.clone(), claim.uuid);
        self.lines.insert(label, Entry { name, uuid, generation, retired: false, suspect });
    }

    /// The book after a VM was removed.
    pub(super) fn retire(&self, label: Label) -> Result<Self, RegistryError> {
        self.change(label, |entry| entry.retired = true)
    }

    /// The book after a VM was tagged, or its tag was taken off.
    pub(super) fn set_suspect(&self, label: Label, tag: Option<Tag>) -> Result<Self, RegistryError> {
        self.change(label, |entry| entry.suspect = tag)
    }

    fn change(&self, label: Label, change: impl FnOnce(&mut Entry)) -> Result<Self, RegistryError> {
        let mut next = self.clone();
        match next.lines.get_mut(&label) {
            Some(entry) if !entry.retired => change(entry),
            _ => return Err(RegistryError::NotHeld(label)),
        }
        Ok(next)
    }

    /// The book with these lines too, or why not, a line of text for each. A label that the same VM has here
    /// stays as it is, but for a tag, which is never lost.
    pub(super) fn import(&self, lines: &[(Label, Entry)]) -> Result<Self, Vec<String>> {
        let (mut next, mut refusals, mut seen) = (self.clone(), Vec::new(), BTreeSet::new());
        for (label, entry) in lines {
            if !seen.insert(label) {
                refusals.push(format!("label {label} is there twice"));
            } else if let Some(why) = self.refuses(*label, entry) {
                refusals.push(why);
            } else if let Some(ours) = next.lines.get_mut(label) {
                ours.suspect = ours.suspect.take().or_else(|| entry.suspect.clone());
            } else {
                next.lines.insert(*label, entry.clone());
            }
        }
        if refusals.is_empty() {
            refusals.extend(next.broken_rule());
        }
        if refusals.is_empty() { Ok(next) } else { Err(refusals) }
    }

    /// Why a line from elsewhere cannot stand beside ours.
    fn refuses(&self, label: Label, entry: &Entry) -> Option<String> {
        let (name, same) = (&entry.name, |ours: &Entry| ours.identity() == entry.identity());
        match self.lines.get(&label) {
            Some(ours) if same(ours) && ours.generation == entry.generation => None,
            Some(ours) => Some(format!(
                "label {label} of VM {name:?} belongs to VM {:?} here, and labels are never given twice",
                ours.name
            )),
            None => {
                let clashes = |ours: &Entry| {
                    same(ours) && (ours.generation == entry.generation || !ours.retired && !entry.retired)
                };
                let (other, _) = self.entries().find(|(_, ours)| clashes(ours))?;
                Some(format!("VM {name:?} has label {other} here, not {label}"))
            }
        }
    }

    /// The first rule that the lines break, if any: so a book that was read is as good as one that was kept.
    pub(super) fn broken_rule(&self) -> Option<String> {
        /// Generations, and whether they are retired.
        type Generations = BTreeMap<u32, bool>;
        let mut vms: BTreeMap<Identity<'_>, Generations> = BTreeMap::new();
        for (label, entry) in self.entries() {
            let generations = vms.entry(entry.identity()).or_default();
            if entry.generation == 0 || generations.insert(entry.generation, entry.retired).is_some() {
                return Some(format!("label {label} has the generation of another, or none"));
            }
        }
        let holds_an_older =
            |generations: &Generations| generations.values().rev().skip(1).any(|retired| !retired);
        vms.values().any(holds_an_older).then(|| "a VM holds two labels".to_owned())
    }
}
