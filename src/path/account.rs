//! Counts what became of a frame. Nothing goes back to the guest uncounted.
//!
//! ```text
//!   Outcome --transmitted, received--> Recorded --ring.give_back--> GivenBack --confirm--> it would survive us
//! ```

use super::{
    chain::Chain,
    forward::Outcome,
    place::{ReceiveBuffer, TapFrame},
    ring::GivenBack,
};
use crate::{
    label::FrameLabel,
    ledger::{Account, Ended},
};

/// A receipt: proof that a frame was counted, and the right to give its chains back.
#[derive(Debug)]
#[must_use]
pub struct Recorded<F>(F);

impl<F> Recorded<F> {
    pub(super) fn into_frame(self) -> F {
        self.0
    }
}

/// Counts a frame that the guest sent.
pub fn transmitted(account: &mut Account, outcome: Outcome<Chain>) -> Recorded<Chain> {
    record(account, outcome, 1, false)
}

/// Counts a frame that was read from the tap, and will carry this label: from now on it is in flight.
pub fn read(account: &mut Account, buffer: &ReceiveBuffer, label: FrameLabel) {
    account.read(buffer.tap_bytes(), label.is_suspect());
}

/// Counts what became of a frame that was read from the tap.
pub fn received(
    account: &mut Account,
    outcome: Outcome<TapFrame>,
    buffer: &ReceiveBuffer,
) -> Recorded<TapFrame> {
    record(account, outcome, buffer.heads(), !buffer.is_readable())
}

/// A frame's chains are given back: a worker that comes after us publishes them, if we do not.
pub fn confirm(account: &mut Account, _given_back: GivenBack) {
    account.confirm();
}

fn record<F>(account: &mut Account, outcome: Outcome<F>, elements: u16, unreadable: bool) -> Recorded<F> {
    let suspect = outcome.label().is_suspect();
    let ended = Ended { volume: outcome.volume(), suspect, fate: outcome.fate(), elements };
    account.record(&ended, unreadable);
    Recorded(outcome.into_frame())
}
