//! vmflow.

pub mod label;
pub mod ledger;
pub mod policy;
