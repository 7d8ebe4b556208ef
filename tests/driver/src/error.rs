//! What can go wrong between the driver and a backend, by request and reason.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::memory::MemoryError;
use crate::request::Request;

/// Why a device could not be set up or changed.
#[derive(Debug)]
pub enum Error {
    /// No connection: the path or address, and what the kernel says.
    Connect(String, io::Error),
    /// A request failed.
    Request(Request, Reason),
    /// Guest memory.
    Memory(MemoryError),
    /// An eventfd could not be made or written.
    Event(io::Error),
    /// The configuration contradicts itself.
    Config(&'static str),
}

/// Why a request failed.
#[derive(Debug)]
pub enum Reason {
    /// It could not be sent.
    Send(io::Error),
    /// Its reply could not be read.
    Receive(io::Error),
    /// The backend closed the connection.
    Closed,
    /// The backend neither answered nor closed in this time.
    Deadline(Duration),
    /// The backend refused it: the value of its acknowledgement.
    Refused(u64),
    /// What came is no answer to it.
    Unexpected {
        /// The request that the reply names.
        request: Request,
        /// The reply's flags.
        flags: u32,
        /// The reply's body's size.
        size: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(to, _) => write!(f, "{to}: no connection"),
            Self::Request(request, reason) => write!(f, "{request}: {reason}"),
            Self::Memory(_) => write!(f, "guest memory"),
            Self::Event(_) => write!(f, "eventfd"),
            Self::Config(what) => f.write_str(what),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Send(source) => write!(f, "not sent: {source}"),
            Self::Receive(source) => write!(f, "no reply: {source}"),
            Self::Closed => write!(f, "the backend closed the connection"),
            Self::Deadline(time) => write!(f, "nothing heard within {time:?}"),
            Self::Refused(value) => write!(f, "refused with {value}"),
            Self::Unexpected { request, flags, size } => {
                write!(f, "answered by {request}, flags {flags:#x}, {size} bytes")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connect(_, source) | Self::Event(source) => Some(source),
            Self::Memory(source) => Some(source),
            Self::Request(..) | Self::Config(_) => None,
        }
    }
}

impl From<MemoryError> for Error {
    fn from(source: MemoryError) -> Self {
        Self::Memory(source)
    }
}
