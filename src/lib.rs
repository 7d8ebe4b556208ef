//! vmflow.

pub mod label;
pub mod ledger;
