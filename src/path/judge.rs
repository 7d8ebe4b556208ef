//! What becomes of a frame. Judging changes nothing: a frame that has to wait is judged again, and is not
//! charged twice.

use super::inspect::{FrameSize, Inspected};
use crate::{
    label::FrameLabel,
    ledger::{DropReason, Volume},
    policy::{Policy, SuspectAction},
};

/// What is to be done with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To the tap (transmit), or to the guest (receive).
    Forward,
    /// Nowhere.
    Drop(DropReason),
}

/// A frame, the label that it carries, and its verdict.
#[derive(Debug)]
#[must_use]
pub struct Judged<F> {
    frame: F,
    label: FrameLabel,
    size: FrameSize,
    verdict: Verdict,
}

impl<F> Judged<F> {
    /// The label that it carries.
    #[must_use]
    pub const fn label(&self) -> FrameLabel {
        self.label
    }
    /// Its size in every unit.
    #[must_use]
    pub fn volume(&self) -> Volume {
        self.size.volume()
    }
    /// What is to be done with it.
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        self.verdict
    }
    pub(super) fn into_frame(self) -> F {
        self.frame
    }
}

/// Gives a frame its verdict: what is wrong with the frame itself comes first, then the policy.
pub fn judge<F>(inspected: Inspected<F>, policy: &Policy) -> Judged<F> {
    let fault = inspected.fault();
    let (frame, label, size) = inspected.into_parts();
    let verdict = match fault {
        Some(reason) => Verdict::Drop(reason),
        None if label.is_suspect() => suspect(policy.suspect_action),
        None => Verdict::Forward,
    };
    Judged { frame, label, size, verdict }
}

const fn suspect(action: SuspectAction) -> Verdict {
    match action {
        SuspectAction::Count => Verdict::Forward,
        SuspectAction::Drop => Verdict::Drop(DropReason::SuspectPolicy),
    }
}
