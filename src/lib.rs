//! vmflow.

pub mod client;
pub mod label;
pub mod ledger;
pub mod monitor;
pub mod policy;
