//! A virtio-net driver over a vhost-user socket, without a VM.
//!
//! ```text
//!   Device ---- Session ----- Channel ------------ socket ------- the backend under test
//!     |           typed         bytes, fds
//!     |-- Pair -- Transmitter, Receiver -- Queue -- Ring --+
//!     |             frames                 chains  fields  |
//!     +-- Memory ------------------------------------------+-- memfds
//! ```
//! Each layer is public, and the lower, the more may be done wrong on purpose: [`net::Device`] sends and
//! receives frames as a good guest would, [`queue::Queue::push_raw`] and [`ring::Ring`] put anything into
//! any field, [`channel::Channel::write`] sends any bytes with any descriptors.
//!
//! It shares no code with the backend: neither the `vhost` nor the `virtio-queue` crate, so that a
//! misunderstanding there is not repeated here.

pub mod channel;
pub mod error;
pub mod frame;
pub mod mapping;
pub mod memory;
pub mod net;
pub mod queue;
pub mod receive;
pub mod request;
pub mod ring;
pub mod sequence;
pub mod session;
pub mod transmit;
pub mod vnet;

pub use error::{Error, Reason};
