//! Counts what became of a frame. Nothing goes back to the guest uncounted.
//!
//! ```text
//!   Outcome --transmitted, received--> Recorded --ring.give_back--> GivenBack --confirm--> it would survive us
//! ```

use super::{
    coalesce::Run,
    forward::Outcome,
    judge::Judged,
    place::{ReceiveBuffer, TapFrame},
    ring::GivenBack,
};
use crate::{
    label::FrameLabel,
    ledger::{Account, Ended},
};

/// A receipt: proof that a frame, or each frame of a run, was counted, and the right to give its chains back.
#[derive(Debug)]
#[must_use]
pub struct Recorded<F>(F);

impl<F> Recorded<F> {
    pub(super) fn into_inner(self) -> F {
        self.0
    }
}

/// Counts the frames of a run that the guest sent: each on its own, as if they had not been put together.
pub fn transmitted<'b>(account: &mut Account, outcome: Outcome<Run<'b>>) -> Recorded<Run<'b>> {
    let fate = outcome.fate();
    for (frame, joined) in outcome.of().frames() {
        let (volume, suspect) = (frame.volume(), frame.label().is_suspect());
        account.record(&Ended { volume, suspect, fate, elements: 1, joined }, false);
    }
    Recorded(outcome.into_inner())
}

/// Counts a frame that was read from the tap, and will carry this label: from now on it is in flight.
pub fn read(account: &mut Account, buffer: &ReceiveBuffer, label: FrameLabel) {
    account.read(buffer.tap_bytes(), label.is_suspect());
}

/// Counts what became of a frame that was read from the tap.
pub fn received(
    account: &mut Account,
    outcome: Outcome<Judged<TapFrame>>,
    buffer: &ReceiveBuffer,
) -> Recorded<TapFrame> {
    let fate = outcome.fate();
    let judged = outcome.into_inner();
    let (volume, suspect) = (judged.volume(), judged.label().is_suspect());
    account
        .record(&Ended { volume, suspect, fate, elements: buffer.heads(), joined: 0 }, !buffer.is_readable());
    Recorded(judged.into_frame())
}

/// The chains are given back: a worker that comes after us publishes them, if we do not.
pub fn confirm(account: &mut Account, _given_back: GivenBack) {
    account.confirm();
}
