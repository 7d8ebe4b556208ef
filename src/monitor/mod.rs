//! The monitor: one process per host, which owns the sockets, the labels and what the outside sees.

pub mod api;
pub mod listen;
