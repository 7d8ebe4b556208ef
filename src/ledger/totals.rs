//! The counters of one direction of one queue pair, as plain numbers.
//!
//! Directions are the guest's: *transmit* is what the guest sends. At any time between two batches
//!
//! ```text
//!   transmit   chains = in_flight + forwarded + diverted + sum(dropped)
//!   receive    reads  = in_flight + delivered + diverted + sum(dropped)
//!   both       normal + suspect = chains - in_flight      in frames, packets and bytes
//! ```

use super::{
    log::{Ended, Fate},
    reason::DropReason,
};

/// How much traffic: four units of the same frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    /// Descriptor chains (transmit) or tap reads (receive); a GSO frame is one frame.
    pub frames: u64,
    /// Packets on the wire: a GSO frame counts its segments.
    pub packets: u64,
    /// Bytes without the virtio-net header.
    pub bytes: u64,
    /// Bytes on the wire: each further segment of a GSO frame repeats the headers.
    pub wire_bytes: u64,
}

impl Volume {
    /// One frame of this many packets and bytes.
    #[must_use]
    pub const fn frame(packets: u64, bytes: u64, wire_bytes: u64) -> Self {
        Self { frames: 1, packets, bytes, wire_bytes }
    }

    /// Adds another volume; counters wrap at 2^64, which no host reaches.
    pub const fn add(&mut self, other: Self) {
        self.frames = self.frames.wrapping_add(other.frames);
        self.packets = self.packets.wrapping_add(other.packets);
        self.bytes = self.bytes.wrapping_add(other.bytes);
        self.wire_bytes = self.wire_bytes.wrapping_add(other.wire_bytes);
    }
}

/// Everything that is counted for one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Transmit: chains taken from the ring. Receive: frames read from the tap.
    pub chains: u64,
    /// Taken and not yet at an end: at most one frame for each queue pair, and only in receive.
    pub in_flight: u64,
    /// Transmit: forwarded to the tap. Receive: delivered to the guest.
    pub passed: Volume,
    /// Sent elsewhere by policy.
    pub diverted: Volume,
    /// Carried the normal label, whatever became of them.
    pub normal: Volume,
    /// Carried the suspect label, whatever became of them.
    pub suspect: Volume,
    /// Dropped frames by reason, in the order of [`DropReason::ALL`].
    pub dropped: [u64; DropReason::COUNT],
    /// Packets in dropped frames.
    pub dropped_packets: u64,
    /// Bytes in dropped frames.
    pub dropped_bytes: u64,
    /// Writes to the tap (transmit) or reads from it (receive) that carried a frame; one write may carry several.
    pub tap_operations: u64,
    /// Bytes of these without the virtio-net header: the change of the tap's own counters.
    pub tap_bytes: u64,
}

impl Totals {
    /// Number of words that [`Self::words`] gives.
    pub const WORDS: usize = 2 + 4 * 4 + DropReason::COUNT + 4;

    /// All counters in the order of the ledger.
    #[must_use]
    pub fn words(&self) -> [u64; Self::WORDS] {
        let mut words = [0; Self::WORDS];
        let volumes = [self.passed, self.diverted, self.normal, self.suspect]
            .into_iter()
            .flat_map(|v| [v.frames, v.packets, v.bytes, v.wire_bytes]);
        let all = [self.chains, self.in_flight].into_iter().chain(volumes).chain(self.dropped).chain([
            self.dropped_packets,
            self.dropped_bytes,
            self.tap_operations,
            self.tap_bytes,
        ]);
        for (word, value) in words.iter_mut().zip(all) {
            *word = value;
        }
        words
    }

    /// The counters from what [`Self::words`] gave.
    #[must_use]
    pub fn from_words(words: &[u64; Self::WORDS]) -> Self {
        let mut rest = words.iter().copied();
        let mut next = || rest.next().unwrap_or_default();
        let mut totals = Self { chains: next(), in_flight: next(), ..Self::default() };
        for volume in [&mut totals.passed, &mut totals.diverted, &mut totals.normal, &mut totals.suspect] {
            *volume = Volume { frames: next(), packets: next(), bytes: next(), wire_bytes: next() };
        }
        totals.dropped.fill_with(&mut next);
        totals.dropped_packets = next();
        totals.dropped_bytes = next();
        totals.tap_operations = next();
        totals.tap_bytes = next();
        totals
    }

    /// Counts a frame that the guest sent.
    pub const fn transmitted(&mut self, ended: &Ended) {
        self.chains = self.chains.wrapping_add(1);
        match (ended.fate, ended.joined) {
            (Fate::Passed, 0) => self.tap_operation(ended.volume.bytes),
            (Fate::Passed, headers) => {
                let more = ended.volume.bytes.wrapping_sub(headers as u64);
                self.tap_bytes = self.tap_bytes.wrapping_add(more);
            }
            (Fate::Dropped(_), _) => {}
        }
        self.end(ended);
    }

    /// Counts a frame that was read from the tap: from now on it is in flight. `tap_bytes`: what the tap counts,
    /// or nothing if the kernel could not hand the frame over.
    pub const fn read(&mut self, tap_bytes: Option<u64>) {
        self.chains = self.chains.wrapping_add(1);
        self.in_flight = self.in_flight.wrapping_add(1);
        if let Some(bytes) = tap_bytes {
            self.tap_operation(bytes);
        }
    }

    /// Counts what became of a frame that was read from the tap.
    pub const fn received(&mut self, ended: &Ended) {
        self.in_flight = self.in_flight.wrapping_sub(1);
        self.end(ended);
    }

    const fn tap_operation(&mut self, bytes: u64) {
        self.tap_operations = self.tap_operations.wrapping_add(1);
        self.tap_bytes = self.tap_bytes.wrapping_add(bytes);
    }

    const fn end(&mut self, ended: &Ended) {
        let volume = ended.volume;
        if ended.suspect {
            self.suspect.add(volume);
        } else {
            self.normal.add(volume);
        }
        match ended.fate {
            Fate::Passed => self.passed.add(volume),
            Fate::Dropped(reason) => {
                let place = reason.index();
                self.dropped[place] = self.dropped[place].wrapping_add(1);
                self.dropped_packets = self.dropped_packets.wrapping_add(volume.packets);
                self.dropped_bytes = self.dropped_bytes.wrapping_add(volume.bytes);
            }
        }
    }

    /// Dropped frames, all reasons.
    #[must_use]
    pub fn dropped_frames(&self) -> u64 {
        self.dropped.iter().fold(0, |sum, n| sum.wrapping_add(*n))
    }

    /// True when each equation at the head of this file holds.
    #[must_use]
    pub fn balances(&self) -> bool {
        let mut ended = self.passed;
        ended.add(self.diverted);
        ended.add(Volume {
            frames: self.dropped_frames(),
            packets: self.dropped_packets,
            bytes: self.dropped_bytes,
            wire_bytes: 0,
        });
        let mut labelled = self.normal;
        labelled.add(self.suspect);
        self.chains == self.in_flight.wrapping_add(ended.frames)
            && (labelled.frames, labelled.packets, labelled.bytes)
                == (ended.frames, ended.packets, ended.bytes)
    }

    /// Adds another queue's counters.
    pub fn add(&mut self, other: &Self) {
        let mut words = self.words();
        for (word, more) in words.iter_mut().zip(other.words()) {
            *word = word.wrapping_add(more);
        }
        *self = Self::from_words(&words);
    }

    /// Takes over what `seen` says, counter by counter, never backwards. Returns how many counters had gone
    /// back: a ledger that does that is broken or lying. `in_flight` may go both ways.
    pub fn advance_to(&mut self, seen: &Self) -> usize {
        let (mut words, seen) = (self.words(), seen.words());
        let mut gone_back = 0;
        for (place, (word, new)) in words.iter_mut().zip(seen).enumerate() {
            let is_gauge = place == Self::IN_FLIGHT;
            if new >= *word || is_gauge {
                *word = new;
            } else {
                gone_back += 1;
            }
        }
        *self = Self::from_words(&words);
        gone_back
    }

    /// The place of `in_flight` among the words.
    const IN_FLIGHT: usize = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distinct() -> Totals {
        let mut words = [0; Totals::WORDS];
        for (word, n) in words.iter_mut().zip(1..) {
            *word = n;
        }
        Totals::from_words(&words)
    }

    #[test]
    fn words_and_counters_are_the_same_thing() {
        let totals = distinct();
        assert_eq!((totals.chains, totals.in_flight, totals.passed.frames), (1, 2, 3));
        assert_eq!(totals.tap_bytes, Totals::WORDS as u64);
        assert_eq!(Totals::from_words(&totals.words()), totals);
    }

    #[test]
    fn a_sum_has_every_counter_of_both() {
        let mut sum = distinct();
        sum.add(&distinct());
        assert!(sum.words().into_iter().eq((2..).step_by(2).take(Totals::WORDS)));
    }

    #[test]
    fn a_counter_that_goes_back_is_not_believed() {
        let mut totals = distinct();
        let mut seen = totals;
        seen.chains += 10;
        seen.in_flight = 0;
        seen.passed.bytes -= 1;
        assert_eq!(totals.advance_to(&seen), 1);
        assert_eq!((totals.chains, totals.in_flight, totals.passed.bytes), (11, 0, distinct().passed.bytes));
    }

    #[test]
    fn the_equation_needs_every_frame_under_one_outcome_and_one_label() {
        let frame = Volume::frame(3, 4000, 4108);
        let mut totals = Totals { chains: 2, passed: frame, normal: frame, ..Totals::default() };
        assert!(!totals.balances());
        totals.dropped[DropReason::Runt.index()] = 1;
        totals.dropped_packets = 1;
        assert!(!totals.balances());
        totals.suspect = Volume::frame(1, 0, 0);
        assert!(totals.balances());
    }
}
