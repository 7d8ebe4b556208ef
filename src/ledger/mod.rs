//! The ledger: what was counted, in shared memory that outlives the process that counts.

pub mod layout;
pub mod reader;
pub mod reason;
pub mod totals;
pub mod writer;

pub use layout::{Ledger, LedgerError, Part};
pub use reader::Known;
pub use reason::DropReason;
pub use totals::{Totals, Volume};
pub use writer::{Account, Committed};
