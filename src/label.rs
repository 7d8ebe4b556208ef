//! Labels: the numbers that VMs are known by.
//!
//! ```text
//!  bit 31      30 ........................ 0
//!  +---------+-------------------------------+
//!  | suspect |  the VM's number, 1..2^31-1   |
//!  +---------+-------------------------------+
//! ```
//!
//! A label is given to a VM before any front end connects, and a frame gets it from the virtqueue that it
//! came through: never from a byte of the frame, nor from a message of the front end.

use std::{fmt, num::NonZeroU32, str::FromStr};

/// The bit that makes a VM's label its suspect label.
const SUSPECT_BIT: u32 = 1 << 31;

/// A VM's normal label: `1..=0x7fff_ffff`. Its suspect label is the same number with the top bit set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(NonZeroU32);

/// What a frame carries: the normal or the suspect label of its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameLabel(u32);

/// A number that is no label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no label: labels are 1 to {max}", max = Label::MAX.get())]
pub struct NotALabel(pub u64);

impl Label {
    /// The smallest label.
    pub const MIN: Self = Self(NonZeroU32::MIN);
    /// The largest label.
    pub const MAX: Self = match NonZeroU32::new(SUSPECT_BIT - 1) {
        Some(n) => Self(n),
        None => Self::MIN,
    };

    /// The label with this number.
    ///
    /// # Errors
    /// [`NotALabel`] for 0 and for numbers above `0x7fff_ffff`.
    pub fn new(number: u32) -> Result<Self, NotALabel> {
        match NonZeroU32::new(number) {
            Some(n) if number <= Self::MAX.get() => Ok(Self(n)),
            _ => Err(NotALabel(number.into())),
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// What a frame of this VM carries.
    #[must_use]
    pub const fn of_frame(self, suspect: bool) -> FrameLabel {
        FrameLabel(if suspect { self.get() | SUSPECT_BIT } else { self.get() })
    }

    /// The number of the suspect label.
    #[must_use]
    pub const fn suspect(self) -> u32 {
        self.of_frame(true).0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Label {
    type Err = NotALabel;
    fn from_str(text: &str) -> Result<Self, NotALabel> {
        let number: u64 = text.parse().map_err(|_| NotALabel(0))?;
        u32::try_from(number).map_err(|_| NotALabel(number)).and_then(Self::new)
    }
}

impl FrameLabel {
    /// True for a suspect label.
    #[must_use]
    pub const fn is_suspect(self) -> bool {
        self.0 & SUSPECT_BIT != 0
    }

    /// The number, with the top bit set for a suspect label.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_and_its_suspect_label_differ_in_the_top_bit_only() {
        let label = Label::new(7).unwrap();
        assert_eq!(label.of_frame(false).get(), 7);
        assert_eq!(label.suspect(), 0x8000_0007);
        assert!(label.of_frame(true).is_suspect() && !label.of_frame(false).is_suspect());
    }

    #[test]
    fn zero_and_the_suspect_half_are_no_labels() {
        assert_eq!(Label::new(0), Err(NotALabel(0)));
        assert_eq!(Label::new(0x8000_0000), Err(NotALabel(0x8000_0000)));
        assert_eq!(Label::new(0x7fff_ffff).unwrap(), Label::MAX);
        assert_eq!("5000000000".parse::<Label>(), Err(NotALabel(5_000_000_000)));
    }
}
