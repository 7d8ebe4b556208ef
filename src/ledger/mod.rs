//! The ledger: what was counted, in shared memory that outlives the process that counts.
//!
//! | file | what it is |
//! |---|---|
//! | [`layout`] | where things are |
//! | [`totals`], [`reason`] | the counters, as plain numbers |
//! | `slot`, `log` | what a batch puts in force, and what it has done so far |
//! | [`writer`] | the worker's side |
//! | [`recover`] | what a worker left that died, counted by its successor |
//! | [`reader`] | the monitor's and the keeper's side |
//! | `resume` | a new ledger that goes on from an earlier one |

pub(crate) mod fault;
pub mod layout;
mod log;
pub mod reader;
pub mod reason;
pub mod recover;
mod resume;
mod slot;
pub mod totals;
pub mod writer;

pub use layout::{Ledger, LedgerError, Part};
pub use log::{Ended, Fate};
pub use reader::Known;
pub use reason::DropReason;
pub use recover::RingIdentity;
pub use slot::Held;
pub use totals::{Totals, Volume};
pub use writer::{Account, Committed, Pulse, UNMONITORED};
