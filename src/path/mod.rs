//! The path of a frame between a guest's virtqueues and its tap.
//!
//! ```text
//! transmit  ring.take -> Chain ---> Labelled -> Inspected -> Judged -> Run -> Outcome -> Recorded -> ring.give_back
//! receive   tap.read --> TapFrame -> Labelled -> Inspected -> Judged --------> Outcome -> Recorded -> ring.give_back
//!                                   label       inspect      judge  coalesce  forward    account     account.confirm
//!                                                                             place                  ring.publish
//! ```
//!
//! Each type has private fields and is made in one module, by consuming the one before it; so the order of the
//! steps is not a habit but a rule that the compiler keeps:
//!
//! A frame that was not labelled cannot be inspected:
//! ```compile_fail,E0308
//! # use vmflow::path::{chain::Chain, batch::Batch, inspect::{self, Link}};
//! fn skip_label(chain: Chain, batch: &mut Batch, link: &Link) { inspect::transmitted(chain, batch, link); }
//! ```
//! Only the label step makes a [`label::Labelled`]:
//! ```compile_fail,E0451
//! # use vmflow::{path::{chain::Chain, label::Labelled}, label::FrameLabel};
//! fn forge(frame: Chain, label: FrameLabel) -> Labelled<Chain> { Labelled { frame, label } }
//! ```
//! A frame that was not judged cannot be forwarded:
//! ```compile_fail,E0308
//! # use vmflow::{ledger::Account, path::{chain::Chain, inspect::Inspected, forward::{self, Tap}}};
//! fn skip_verdict(frame: Inspected<Chain>, tap: &Tap, account: &mut Account) {
//!     let _ = forward::forward(frame, tap, account);
//! }
//! ```
//! Nor can it join a run of frames that were:
//! ```compile_fail,E0308
//! # use vmflow::path::{batch::Batch, chain::Chain, coalesce::Run, inspect::Inspected};
//! fn join_unjudged(run: &mut Run, frame: Inspected<Chain>, batch: &Batch) { let _ = run.join(frame, batch); }
//! ```
//! Nor can a run be forwarded twice:
//! ```compile_fail,E0382
//! # use vmflow::{ledger::Account, path::{coalesce::Run, forward::{self, Tap}}};
//! fn twice(run: Run, tap: &Tap, account: &mut Account) {
//!     let _ = forward::forward(run, tap, account);
//!     let _ = forward::forward(run, tap, account);
//! }
//! ```
//! A frame that was not counted cannot be given back to the guest:
//! ```compile_fail,E0308
//! # use vmflow::path::{coalesce::Run, forward::Outcome, ring::OpenRing};
//! fn skip_account(outcome: Outcome<Run>, ring: &mut OpenRing) { let _ = ring.give_back(outcome); }
//! ```
//! A frame that was not given back cannot be confirmed in the ledger, where a later worker would find it:
//! ```compile_fail,E0308
//! # use vmflow::{ledger::Account, path::{account::{self, Recorded}, coalesce::Run}};
//! fn skip_give_back(recorded: Recorded<Run>, ledger: &mut Account) { account::confirm(ledger, recorded); }
//! ```
//! And nothing becomes visible to the guest before it is in the ledger:
//! ```compile_fail,E0061
//! # use vmflow::path::ring::OpenRing;
//! fn skip_ledger(ring: OpenRing) { ring.publish(); }
//! ```
//!
//! Guest memory is read once, by copy; what is judged is what is sent. A guest's fault is a value, never an
//! error: nothing in here allocates, panics or logs.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

pub mod account;
pub mod batch;
pub mod chain;
pub mod coalesce;
pub mod forward;
pub mod inspect;
pub mod judge;
pub mod label;
pub mod place;
mod prefetch;
pub mod receive;
pub mod ring;
pub mod transmit;

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "a test may panic")]
mod tests;

use crate::policy::Policy;
use forward::Tap;
use inspect::Link;
use ring::QueueFault;

/// What a turn of either direction needs to know of its port.
#[derive(Clone, Copy, Debug)]
pub struct Port<'p> {
    /// What to do with frames.
    pub policy: &'p Policy,
    /// What both sides agreed on.
    pub link: Link,
    /// Where frames go to and come from.
    pub tap: &'p Tap,
    /// The thread looks at the ring again by itself: the guest need not kick.
    pub looks_again: bool,
}

/// What frames wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitsFor {
    /// Transmit: the tap takes no more now; it says when it has room.
    Room,
    /// Receive: the guest has no buffer, or too few for the frame in hand; it kicks when it has one. Whatever comes
    /// to the tap meanwhile changes nothing.
    Buffers,
}

/// What a turn leaves to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Turn {
    /// How many frames came to their end.
    pub frames: u64,
    /// The guest is to be signalled: something was published, and it wants to know.
    pub signal: bool,
    /// There is more to do: another turn, after other events had theirs.
    pub more: bool,
    /// What has to happen before there is more to do, if frames wait.
    pub waits_for: Option<WaitsFor>,
    /// The guest broke its queue: it stops until the guest resets it.
    pub fault: Option<QueueFault>,
}

impl Turn {
    /// Nothing could be done.
    pub(crate) fn fault(fault: QueueFault) -> Self {
        Self { fault: Some(fault), ..Self::default() }
    }
}
