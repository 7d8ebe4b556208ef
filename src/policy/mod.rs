//! Policy: what a worker is told to do with its VM's frames.
//!
//! The monitor writes a policy into a sealed memfd without pointers and hands it to the worker, which checks
//! it and swaps it between two batches. A port passes nothing before its first policy is acknowledged.
//!
//! ```text
//!  byte  0  magic "VMFLPOL\0"
//!        8  format version      u32, little endian, as everything here
//!       12  the VM's label      u32
//!       16  generation          u64, grows with every change
//!       24  operator's tag      u8: 0 none, 1 suspect
//!       25  suspect action      u8: 0 count, 1 drop
//!       26  zero                to byte 64
//! ```

pub mod handover;

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create},
    io::{Errno, pread, pwrite},
};
use serde::{Deserialize, Serialize};

use crate::label::{FrameLabel, Label};

const MAGIC: [u8; 8] = *b"VMFLPOL\0";
const VERSION: u32 = 1;
/// Size of a policy in bytes.
const SIZE: usize = 64;
/// Nothing about a policy may change once it is made.
const SEALS: SealFlags =
    SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::WRITE).union(SealFlags::SEAL);

/// What becomes of frames under a suspect label where no rule says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SuspectAction {
    /// They pass, counted apart.
    #[default]
    Count,
    /// They are dropped, counted apart.
    Drop,
}

/// One VM's policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Grows with every change; what a worker acknowledges.
    pub generation: u64,
    /// The VM's normal label.
    pub label: Label,
    /// The operator's tag: every frame of the VM carries the suspect label.
    pub tagged: bool,
    /// What becomes of frames under the suspect label.
    pub suspect_action: SuspectAction,
}

/// Why a file is no policy.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The kernel refused something.
    #[error("policy: {0}")]
    Io(#[from] Errno),
    /// Wrong size, seals, magic, version or value.
    #[error("policy: {0} is not as it must be")]
    Foreign(&'static str),
}

impl Policy {
    /// What a frame of this VM carries before any rule has looked at it.
    #[must_use]
    pub const fn label_of_frame(&self) -> FrameLabel {
        self.label.of_frame(self.tagged)
    }

    /// The policy in a sealed file, to be handed over.
    ///
    /// # Errors
    /// [`PolicyError::Io`] when the kernel gives no memory.
    pub fn seal(&self) -> Result<OwnedFd, PolicyError> {
        let fd = memfd_create("vmflow-policy", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut image = [0; SIZE];
        let fields: [&[u8]; 6] = [
            &MAGIC,
            &VERSION.to_le_bytes(),
            &self.label.get().to_le_bytes(),
            &self.generation.to_le_bytes(),
            &[u8::from(self.tagged)],
            &[self.suspect_action as u8],
        ];
        for (byte, value) in image.iter_mut().zip(fields.into_iter().flatten()) {
            *byte = *value;
        }
        if pwrite(&fd, &image, 0)? != SIZE {
            return Err(PolicyError::Io(Errno::NOSPC));
        }
        fcntl_add_seals(&fd, SEALS)?;
        Ok(fd)
    }

    /// Reads a policy that [`Self::seal`] made.
    ///
    /// # Errors
    /// [`PolicyError::Foreign`] unless everything is as it must be: a port goes on with what it had.
    pub fn read(fd: impl AsFd) -> Result<Self, PolicyError> {
        let fd = fd.as_fd();
        if !fcntl_get_seals(fd)?.contains(SEALS) {
            return Err(PolicyError::Foreign("the seal"));
        }
        let mut image = [0; SIZE];
        if usize::try_from(fstat(fd)?.st_size).ok() != Some(SIZE) || pread(fd, &mut image, 0)? != SIZE {
            return Err(PolicyError::Foreign("the size"));
        }
        Self::decode(&image)
    }

    fn decode(image: &[u8; SIZE]) -> Result<Self, PolicyError> {
        let word = |at: usize| u32::from_le_bytes([image[at], image[at + 1], image[at + 2], image[at + 3]]);
        if image[..8] != MAGIC || word(8) != VERSION {
            return Err(PolicyError::Foreign("the version"));
        }
        let tagged = match image[24] {
            0 => false,
            1 => true,
            _ => return Err(PolicyError::Foreign("the operator's tag")),
        };
        let suspect_action = match image[25] {
            0 => SuspectAction::Count,
            1 => SuspectAction::Drop,
            _ => return Err(PolicyError::Foreign("the suspect action")),
        };
        if image[26..].iter().any(|byte| *byte != 0) {
            return Err(PolicyError::Foreign("the end"));
        }
        Ok(Self {
            generation: u64::from(word(16)) | u64::from(word(20)) << 32,
            label: Label::new(word(12)).map_err(|_| PolicyError::Foreign("the label"))?,
            tagged,
            suspect_action,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy {
            generation: 0x1_0000_0007,
            label: Label::new(42).unwrap(),
            tagged: true,
            suspect_action: SuspectAction::Drop,
        }
    }

    #[test]
    fn what_was_sealed_is_what_is_read() {
        let fd = policy().seal().unwrap();
        assert_eq!(Policy::read(&fd).unwrap(), policy());
        assert!(pwrite(&fd, b"x", 0).is_err(), "a sealed policy can be written");
    }

    #[test]
    fn a_file_that_anybody_could_still_write_is_refused() {
        let fd = memfd_create("p", MemfdFlags::ALLOW_SEALING).unwrap();
        let mut image = [0; SIZE];
        assert_eq!(pread(policy().seal().unwrap(), &mut image, 0).unwrap(), SIZE);
        assert_eq!(pwrite(&fd, &image, 0).unwrap(), SIZE);
        assert!(matches!(Policy::read(&fd), Err(PolicyError::Foreign("the seal"))));
    }

    #[test]
    fn every_damaged_byte_that_matters_is_noticed() {
        let mut image = [0; SIZE];
        assert_eq!(pread(policy().seal().unwrap(), &mut image, 0).unwrap(), SIZE);
        for at in (0..12).chain(24..SIZE) {
            let mut damaged = image;
            damaged[at] ^= 0x80;
            assert!(Policy::decode(&damaged).is_err(), "byte {at}");
        }
    }
}
