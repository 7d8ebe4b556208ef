//! The whole program under test: `vmflow serve` as an operator starts it, a virtio-net driver at its socket, a
//! raw socket at the other side of its tap.
//!
//! ```text
//!   Device (driver in Rust) --- vhost-user --- vmflow --- tap in a network namespace --- Wire (packet socket)
//!     own counts                               own counts   the kernel's counts            own counts
//! ```
//! Each test ends with [`rig::Rig::check`]: the ledger balances, and all four agree.

#![expect(clippy::unwrap_used, clippy::panic, reason = "what a test cannot go on without fails it")]
#![expect(unreachable_pub, reason = "a test program exports nothing; `pub` says what a module is for")]

mod far;
#[path = "../harness/mod.rs"]
mod harness;
mod rig;
mod rights;
mod traffic;
mod wire;

mod coalesce;
mod content;
mod deaths;
mod doctor;
mod ending;
mod held;
mod notify;
mod numbers;
mod offload;
mod operate;
mod pairs;
mod policy;
mod protocol;
mod queue;
mod runtime;
mod session;
mod start;
mod state;
mod syscalls;
mod tap;
mod uso;
