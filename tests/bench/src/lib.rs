//! Measures vmflow beside other backends: the same case, one after the other, round by round (A B A B ..).
//!
//! ```text
//!   case      what is measured, as data: front end, load, ports, sink, and against whom; and the goals
//!   run       one case with one backend, once  ->  Sample, or why there is none
//!     backend   vmflow | plain loop | DPDK's forwarder | any --peer | QEMU's own tap
//!     driver, testpmd, guest    the front ends
//!     load      what lies in the ring's slots
//!     host      network namespace, taps and what is behind them, the packet socket that feeds them
//!     process, measure          processes and what they cost; was anybody else busy meanwhile?
//!   report    median and range, ratios pair by pair  ->  Markdown, JSON;   chart -> SVG
//! ```
//! Programs of their own beside it: `bin/death` (how long a killed worker is missed), `benches/path` (the data path
//! without a kernel), `benches/copy` (where a frame had better be written from).
//!
//! Costs are CPU time (schedstat of all of a backend's threads), because the machine may be shared. Only the ratio of
//! two neighbours in a round means something on another machine.

pub mod backend;
pub mod case;
pub mod chart;
pub mod driver;
pub mod guest;
pub mod host;
pub mod load;
pub mod measure;
pub mod plain;
pub mod process;
pub mod report;
pub mod run;
pub mod testpmd;
pub mod vmflow;

use std::time::Duration;

/// How long anything may take before it counts as never.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The processor of the front end and of whoever feeds the tap.
pub const FRONT_CPU: usize = 0;
/// The backend's processor.
pub const BACKEND_CPU: usize = 1;
