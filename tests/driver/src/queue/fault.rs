//! What goes wrong at a queue: the device's fault, no room, silence.

use std::fmt;
use std::io;
use std::time::Duration;

/// What a device did that it may not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// used.idx is further than the chains that the device was given.
    Jump {
        /// Where the driver was.
        from: u16,
        /// What the device wrote.
        to: u16,
    },
    /// A head that is not in flight.
    NotInFlight {
        /// What the device wrote.
        head: u32,
    },
    /// A received length that the chain cannot hold, or too small for a header.
    Length {
        /// Which chain.
        head: u16,
        /// What the device wrote.
        len: u32,
    },
    /// A frame said to fill so many buffers, of which only some came.
    Missing {
        /// `num_buffers` of its header.
        buffers: u16,
        /// How many were there.
        came: u16,
    },
}

/// Why a chain was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not enough free descriptors.
    Full,
    /// A chain needs at least one element.
    Empty,
    /// More elements than the queue, or its indirect tables, can ever hold.
    TooLong,
}

/// Why waiting for the device ended without a used chain.
#[derive(Debug)]
pub enum Silence {
    /// The device used nothing.
    Nothing(Duration),
    /// The device used chains and never called, although the driver had asked for it: a lost interrupt.
    LostCall(Duration),
    /// The call descriptor could not be read.
    Io(io::Error),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jump { from, to } => write!(f, "the device moved used.idx from {from} to {to}"),
            Self::NotInFlight { head } => write!(f, "the device used head {head}, which is not in flight"),
            Self::Length { head, len } => write!(f, "the device wrote {len} bytes to the chain at {head}"),
            Self::Missing { buffers, came } => write!(f, "a frame of {buffers} buffers came in {came}"),
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "not enough free descriptors",
            Self::Empty => "a chain without elements",
            Self::TooLong => "a chain longer than its table",
        })
    }
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing(time) => write!(f, "the device used nothing within {time:?}"),
            Self::LostCall(time) => write!(f, "the device used chains but sent no call within {time:?}"),
            Self::Io(source) => write!(f, "the call descriptor: {source}"),
        }
    }
}

impl std::error::Error for Fault {}
impl std::error::Error for Refused {}
impl std::error::Error for Silence {}
