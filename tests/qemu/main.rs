//! Real guests, started by the very scripts that people use, and DPDK's front end: what vmflow counted must be what
//! they and the taps counted.
//!
//! They need root and what `qemu-scripts/setup` makes; `qemu-scripts/test` does both. One test runs at a time, with at
//! most two guests.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where something unexpected happens")]
#![expect(unreachable_pub, reason = "a test program exports nothing; `pub` says what a module is for")]

#[path = "../harness/mod.rs"]
mod harness;

mod bed;
mod bench;
mod debian;
mod doctor;
mod front_ends;
mod host;
mod labels;
mod libvirt;
mod package;
mod pairs;
mod restarts;
mod service;
mod testpmd;
