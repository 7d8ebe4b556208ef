//! Counts what became of a frame. Nothing goes back to the guest uncounted.

use super::{
    chain::Chain,
    forward::{Fate, Outcome},
    place::TapFrame,
};
use crate::ledger::{DropReason, Totals, Volume};

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
pub fn transmitted(totals: &mut Totals, outcome: Outcome<Chain>) -> Recorded<Chain> {
    totals.chains = totals.chains.wrapping_add(1);
    if outcome.fate() == Fate::Passed {
        totals.tap_operations = totals.tap_operations.wrapping_add(1);
        totals.tap_bytes = totals.tap_bytes.wrapping_add(outcome.volume().bytes);
    }
    record(totals, outcome)
}

/// Counts a frame that was read from the tap: from now on it is in flight. `bytes`: what the tap counts, or
/// nothing if the kernel could not hand the frame over.
pub fn read(totals: &mut Totals, bytes: Option<u64>) {
    totals.chains = totals.chains.wrapping_add(1);
    totals.in_flight = totals.in_flight.wrapping_add(1);
    if let Some(bytes) = bytes {
        totals.tap_operations = totals.tap_operations.wrapping_add(1);
        totals.tap_bytes = totals.tap_bytes.wrapping_add(bytes);
    }
}

/// Counts frames of which nothing more is known than that a worker died while it held them.
pub fn lost(totals: &mut Totals, frames: u64) {
    totals.normal.add(Volume { frames, packets: frames, ..Volume::default() });
    totals.dropped_packets = totals.dropped_packets.wrapping_add(frames);
    if let Some(counter) = totals.dropped.get_mut(DropReason::Restart.index()) {
        *counter = counter.wrapping_add(frames);
    }
}

/// Counts what became of a frame that was read from the tap.
pub fn received(totals: &mut Totals, outcome: Outcome<TapFrame>) -> Recorded<TapFrame> {
    totals.in_flight = totals.in_flight.wrapping_sub(1);
    record(totals, outcome)
}

fn record<F>(totals: &mut Totals, outcome: Outcome<F>) -> Recorded<F> {
    let volume = outcome.volume();
    if outcome.label().is_suspect() {
        totals.suspect.add(volume);
    } else {
        totals.normal.add(volume);
    }
    match outcome.fate() {
        Fate::Passed => totals.passed.add(volume),
        Fate::Dropped(reason) => {
            if let Some(counter) = totals.dropped.get_mut(reason.index()) {
                *counter = counter.wrapping_add(1);
            }
            totals.dropped_packets = totals.dropped_packets.wrapping_add(volume.packets);
            totals.dropped_bytes = totals.dropped_bytes.wrapping_add(volume.bytes);
        }
    }
    Recorded(outcome.into_frame())
}
