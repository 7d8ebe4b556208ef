//! What is claimed of the parser and of the offload checks, and shown.

#![expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test that goes wrong may panic; nothing hostile reaches it"
)]

mod differential;
pub(crate) mod frames;
mod layers;
mod offloads;
mod sizes;
mod totality;

use super::{Headers, Unclassified};

/// The headers of a frame that was copied whole.
fn parse(frame: &[u8]) -> Headers {
    Headers::parse(frame, frame.len())
}

/// Why the frame could not be parsed to its end.
fn fault(frame: &[u8]) -> Option<Unclassified> {
    parse(frame).unclassified()
}

/// The frame with some bytes changed from `at` on.
fn with(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut changed = frame.to_vec();
    changed[at..at + bytes.len()].copy_from_slice(bytes);
    changed
}
