//! The queues of a tap: a descriptor each.
//!
//! The kernel spreads a tap's frames over those of its queues that are attached, by flow: by the queue that the
//! flow's last frame of the other direction came from, or else by a hash. What it gives to a queue that nobody
//! reads is lost; so a queue is attached only while it is read. The first one stays attached while none is read:
//! frames then wait there, as they do in a tap that has one queue.

use std::{io, os::fd::OwnedFd};

use super::{TapError, adopt, attach, attach_one_of_several, attach_queue, prepare};

/// The queues that we have of a tap: one at least.
#[derive(Debug)]
pub struct Queues {
    first: OwnedFd,
    others: Vec<OwnedFd>,
}

impl Queues {
    /// Creates a tap, or attaches to the one of that name; sets owner and header size. The link stays as it is.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn attach(name: &str, count: u16) -> Result<Self, TapError> {
        if count <= 1 {
            return Ok(Self { first: attach(name)?, others: Vec::new() });
        }
        let first = attach_one_of_several(name)?;
        prepare(&first, name)?;
        let mut queues = Self { first, others: Vec::new() };
        queues.extend(name, count)?;
        Ok(queues)
    }

    /// Takes a tap whose queues were handed in as descriptors, and sets it up as [`Self::attach`] does.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn adopt(handed_in: Self, name: &str, count: u16) -> Result<Self, TapError> {
        handed_in.check(name, count)?;
        prepare(&handed_in.first, name)?;
        handed_in.rest(); // also those that are more than wanted
        let Self { first, mut others } = handed_in;
        others.truncate(usize::from(count).saturating_sub(1));
        Ok(Self { first, others })
    }

    /// Finds out whether these are so many queues of the tap of this name.
    ///
    /// # Errors
    /// [`TapError::TooFew`], [`TapError::OneQueue`]; [`TapError::NotThisTap`] if one is none, or of another name or
    /// kind.
    pub fn check(&self, name: &str, count: u16) -> Result<(), TapError> {
        let mut can_have_several = true;
        for fd in self.iter() {
            can_have_several &= adopt(fd, name)?;
        }
        let there = self.iter().count();
        if count > 1 && !can_have_several {
            return Err(TapError::OneQueue(name.into()));
        }
        if there < count.into() {
            return Err(TapError::TooFew { name: name.into(), there, wanted: count });
        }
        Ok(())
    }

    /// Opens more queues of the tap, until there are so many. To be called in the tap's network namespace.
    ///
    /// # Errors
    /// [`TapError`]; those that were opened before remain.
    pub fn extend(&mut self, name: &str, count: u16) -> Result<(), TapError> {
        while self.iter().count() < count.into() {
            let queue = attach_one_of_several(name)?;
            attach_queue(&queue, false).map_err(|e| TapError::Setup(name.into(), "its queues", e))?;
            self.others.push(queue);
        }
        Ok(())
    }

    /// The one that carries frames while no queue is read, and through which the tap as a whole is set up.
    #[must_use]
    pub const fn first(&self) -> &OwnedFd {
        &self.first
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &OwnedFd> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// One more, which was attached elsewhere.
    pub fn push(&mut self, queue: OwnedFd) {
        self.others.push(queue);
    }

    /// Other descriptors of the first `count` queues.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn share(&self, count: u16) -> io::Result<Self> {
        let others = self.others.iter().take(usize::from(count).saturating_sub(1));
        Ok(Self {
            first: self.first.try_clone()?,
            others: others.map(OwnedFd::try_clone).collect::<Result<_, _>>()?,
        })
    }

    /// Nobody reads: the first is attached, the others are not.
    pub fn rest(&self) {
        if self.others.is_empty() {
            return; // a tap with one queue has no choice
        }
        for (queue, attach) in self.iter().zip(std::iter::once(true).chain(std::iter::repeat(false))) {
            if let Err(e) = attach_queue(queue, attach) {
                tracing::warn!("a queue of a tap cannot be attached or detached: {e}");
            }
        }
    }
}

impl From<OwnedFd> for Queues {
    fn from(first: OwnedFd) -> Self {
        Self { first, others: Vec::new() }
    }
}

impl IntoIterator for Queues {
    type Item = OwnedFd;
    type IntoIter = std::iter::Chain<std::iter::Once<OwnedFd>, std::vec::IntoIter<OwnedFd>>;

    fn into_iter(self) -> Self::IntoIter {
        std::iter::once(self.first).chain(self.others)
    }
}
