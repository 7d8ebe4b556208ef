//! The log of the batch in hand: how each of its frames ended. A worker that dies leaves it to its successor.
//!
//! ```text
//!  word 0   bits 0-23 packets | 24-31 joined | 32-47 elements of the used ring | 48-55 fate | 56 suspect | 57 held
//!           | 58 unreadable
//!  word 1   bits 0-31 wire_bytes | 32-63 bytes
//!           fate: 0 passed, else 1 + the drop reason's index
//! ```
//! A received frame's entry is written twice: when it was read, as far as it is known then, and when it ended.

use super::{
    reason::DropReason,
    slot::low_16_bits,
    totals::{Totals, Volume},
};

/// Most frames of one batch.
pub(super) const ENTRIES: usize = 64;

const JOINED: u32 = 24;
const ELEMENTS: u32 = 32;
const FATE: u32 = 48;
const SUSPECT: u64 = 1 << 56;
const HELD: u64 = 1 << 57;
const UNREADABLE: u64 = 1 << 58;
const LOW_24: u64 = 0xff_ffff;
const LOW_32: u64 = 0xffff_ffff;

/// How a frame ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The tap, or the guest, has it.
    Passed,
    /// Nobody has it.
    Dropped(DropReason),
}

/// A frame that ended: all that its counters are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How much it was: one frame.
    pub volume: Volume,
    /// Which label it carried.
    pub suspect: bool,
    /// How it ended.
    pub fate: Fate,
    /// How many elements of the used ring are given back for it.
    pub elements: u16,
    /// Transmit: the bytes of its headers, if they were left out because the frame was written to the tap together
    /// with the one before it, as one that the kernel cuts; 0 if it was written on its own.
    pub joined: u8,
}

/// An entry of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) ended: Ended,
    /// Receive: it was read in an earlier batch, and counted then.
    pub(super) held: bool,
    /// Receive: the kernel took it from the tap's queue and could not hand it over.
    pub(super) unreadable: bool,
}

impl Entry {
    pub(super) fn encode(&self) -> [u64; 2] {
        let Ended { volume, suspect, fate, elements, joined } = self.ended;
        let fate = match fate {
            Fate::Passed => 0,
            Fate::Dropped(reason) => 1 + reason.index() as u64,
        };
        let bit = |set, bit| if set { bit } else { 0 };
        let flags = bit(suspect, SUSPECT) | bit(self.held, HELD) | bit(self.unreadable, UNREADABLE);
        [
            // A frame is no longer than 2^20 bytes, so it has no more packets than these bits can say.
            volume.packets & LOW_24
                | u64::from(joined) << JOINED
                | u64::from(elements) << ELEMENTS
                | fate << FATE
                | flags,
            volume.wire_bytes & LOW_32 | (volume.bytes & LOW_32) << 32,
        ]
    }

    pub(super) fn decode([first, second]: [u64; 2]) -> Self {
        let fate = match first >> FATE & 0xff {
            0 => Fate::Passed,
            n => Fate::Dropped(reason(n - 1)),
        };
        let volume = Volume::frame(first & LOW_24, second >> 32, second & LOW_32);
        let elements = low_16_bits(first >> ELEMENTS);
        let [_, _, _, joined, ..] = first.to_le_bytes();
        Self {
            ended: Ended { volume, suspect: first & SUSPECT != 0, fate, elements, joined },
            held: first & HELD != 0,
            unreadable: first & UNREADABLE != 0,
        }
    }

    /// What the tap counted for a frame that was read.
    pub(super) fn tap_bytes(&self) -> Option<u64> {
        (!self.unreadable).then_some(self.ended.volume.bytes)
    }

    /// Counts the frame once more, as the worker that wrote the entry had done.
    pub(super) fn count(&self, totals: &mut Totals, is_transmit: bool) {
        if is_transmit {
            totals.transmitted(&self.ended);
            return;
        }
        if !self.held {
            totals.read(self.tap_bytes());
        }
        totals.received(&self.ended);
    }
}

/// The reason at a place of the ledger; a place that is none belongs to a broken writer.
fn reason(index: u64) -> DropReason {
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    DropReason::ALL.get(index).copied().unwrap_or(DropReason::Restart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let fates = DropReason::ALL.into_iter().map(Fate::Dropped).chain([Fate::Passed]);
        for (n, fate) in fates.enumerate() {
            let volume =
                Volume::frame(0xff_fff0 + n as u64 % 16, 0xfff0_0000 + n as u64, 0xffff_ff00 | n as u64);
            for (suspect, held, unreadable) in
                [(true, false, false), (false, true, false), (false, false, true)]
            {
                let ended = Ended { volume, suspect, fate, elements: 1024, joined: 0xf3 };
                let entry = Entry { ended, held, unreadable };
                assert_eq!(Entry::decode(entry.encode()), entry);
            }
        }
    }
}
