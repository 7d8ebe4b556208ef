//! The labels of this host on disk: a VM gets its label before any front end connects, keeps it over restarts,
//! and nobody else ever gets it.
//!
//! A change is on disk before it is in force; one that fails changes nothing.

mod book;
pub(super) mod disk;
mod error;

use std::{ops::RangeInclusive, path::Path};

use self::{book::Book, disk::StateDir};
pub use self::{
    book::{Claim, Entry, Tag},
    error::RegistryError,
};
use crate::label::Label;

/// The labels that were ever used, and whose they are. Open in one process at a time.
#[derive(Debug)]
pub struct Registry {
    dir: StateDir,
    book: Book,
}

impl Registry {
    /// Locks the state directory, which is made if its parent exists, and reads the labels.
    ///
    /// # Errors
    /// [`RegistryError`]: another process has the directory, or its files are not as they must be.
    pub fn open(state_dir: &Path) -> Result<Self, RegistryError> {
        let dir = StateDir::open(state_dir)?;
        let book = dir.read()?;
        Ok(Self { dir, book })
    }

    /// Gives each VM its label: the one that it has; else the pinned one; else the lowest that was never used.
    /// The labels come in the order of the claims. VMs that are not among the claims keep theirs.
    ///
    /// # Errors
    /// [`RegistryError`]: no VM got a label.
    pub fn allocate(
        &mut self,
        claims: &[Claim],
        range: &RangeInclusive<Label>,
    ) -> Result<Vec<Label>, RegistryError> {
        let mut plan = self.plan();
        let labels = plan.allocate(claims, range)?;
        self.adopt(plan)?;
        Ok(labels)
    }

    /// Retires the label of a VM that is removed: no other VM ever gets it.
    ///
    /// # Errors
    /// [`RegistryError`]: no VM has the label, or it could not be saved.
    pub fn retire(&mut self, label: Label) -> Result<(), RegistryError> {
        self.turn_to(self.book.retire(label)?)
    }

    /// Puts an operator's tag on a VM, or takes it off.
    ///
    /// # Errors
    /// [`RegistryError`]: no VM has the label, or it could not be saved.
    pub fn set_suspect(&mut self, label: Label, tag: Option<Tag>) -> Result<(), RegistryError> {
        self.turn_to(self.book.set_suspect(label, tag)?)
    }

    /// A change that is not made yet: as things are now, to begin with.
    #[must_use]
    pub fn plan(&self) -> Plan {
        Plan { book: self.book.clone() }
    }

    /// Makes a change. What was changed otherwise since it was planned is lost.
    ///
    /// # Errors
    /// [`RegistryError`]: it could not be saved.
    pub fn adopt(&mut self, plan: Plan) -> Result<(), RegistryError> {
        self.turn_to(plan.book)
    }

    /// Whose a label is or was.
    #[must_use]
    pub fn entry(&self, label: Label) -> Option<&Entry> {
        self.book.entry(label)
    }

    /// All labels that were ever used, in their order.
    pub fn entries(&self) -> impl Iterator<Item = (Label, &Entry)> {
        self.book.entries()
    }

    /// The state directory, which nobody else changes while this is open.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.dir.path()
    }

    fn turn_to(&mut self, next: Book) -> Result<(), RegistryError> {
        if next != self.book {
            self.dir.save(&next)?;
            self.book = next;
        }
        Ok(())
    }
}

/// Labels as they would be after a change: nobody has them yet, and nothing is on disk.
#[derive(Clone, Debug)]
pub struct Plan {
    book: Book,
}

impl Plan {
    /// As [`Registry::allocate`].
    ///
    /// # Errors
    /// [`RegistryError`]: no VM would get a label.
    pub fn allocate(
        &mut self,
        claims: &[Claim],
        range: &RangeInclusive<Label>,
    ) -> Result<Vec<Label>, RegistryError> {
        let (next, labels) = self.book.allocate(claims, range)?;
        self.book = next;
        Ok(labels)
    }

    /// As [`Registry::retire`].
    ///
    /// # Errors
    /// [`RegistryError`]: no VM has the label.
    pub fn retire(&mut self, label: Label) -> Result<(), RegistryError> {
        self.book = self.book.retire(label)?;
        Ok(())
    }

    /// Takes over lines of another host. A label that the same VM has here stays as it is, but for a tag, which is
    /// never lost.
    ///
    /// # Errors
    /// Why not, a line of text for each refusal.
    pub fn import(&mut self, lines: &[(Label, Entry)]) -> Result<(), Vec<String>> {
        self.book = self.book.import(lines)?;
        Ok(())
    }

    /// Whose a label would be.
    #[must_use]
    pub fn entry(&self, label: Label) -> Option<&Entry> {
        self.book.entry(label)
    }

    /// All labels, in their order.
    pub fn entries(&self) -> impl Iterator<Item = (Label, &Entry)> {
        self.book.entries()
    }
}

#[cfg(test)]
mod tests;
