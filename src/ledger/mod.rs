//! The ledger: what was counted, in shared memory that outlives the process that counts.

pub mod reason;
pub mod totals;

pub use reason::DropReason;
pub use totals::{Totals, Volume};
