//! What a port has counted, as it is kept and handed on: what is 0 is left out.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    ledger::{Known, Part, Totals},
    monitor::{
        api::document::{Counts, Dropped},
        ports::Port,
    },
};

/// Everything that a port has counted since its VM got its label. A counter that is 0 is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PortCounters {
    /// Front ends served.
    #[serde(skip_serializing_if = "is_zero")]
    pub connections: u64,
    /// Front ends refused: a wrong peer, or a second front end.
    #[serde(skip_serializing_if = "is_zero")]
    pub refused_connections: u64,
    /// Connections closed by us because one worker after the other died.
    #[serde(skip_serializing_if = "is_zero")]
    pub connections_given_up: u64,
    /// Workers that were started in place of one that ended.
    #[serde(skip_serializing_if = "is_zero")]
    pub worker_restarts: u64,
    /// What the guest sent.
    #[serde(skip_serializing_if = "is_zero")]
    pub transmit: DirectionCounters,
    /// What came for the guest.
    #[serde(skip_serializing_if = "is_zero")]
    pub receive: DirectionCounters,
}

/// What was counted in one direction, over all queue pairs. A counter that is 0 is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DirectionCounters {
    /// Transmit: chains taken from the ring. Receive: frames read from the tap.
    #[serde(skip_serializing_if = "is_zero")]
    pub chains: u64,
    /// Taken and not yet at an end.
    #[serde(skip_serializing_if = "is_zero")]
    pub in_flight: u64,
    /// Transmit: forwarded to the tap. Receive: delivered to the guest.
    #[serde(skip_serializing_if = "is_zero")]
    pub passed: Counts,
    /// Sent elsewhere by policy.
    #[serde(skip_serializing_if = "is_zero")]
    pub diverted: Counts,
    /// Carried the normal label.
    #[serde(skip_serializing_if = "is_zero")]
    pub normal: Counts,
    /// Carried the suspect label.
    #[serde(skip_serializing_if = "is_zero")]
    pub suspect: Counts,
    /// Frames dropped, by reason.
    #[serde(skip_serializing_if = "is_zero")]
    pub dropped: Dropped,
    /// Packets in dropped frames.
    #[serde(skip_serializing_if = "is_zero")]
    pub dropped_packets: u64,
    /// Bytes in dropped frames.
    #[serde(skip_serializing_if = "is_zero")]
    pub dropped_bytes: u64,
    /// Writes to the tap, or reads from it, that carried a frame.
    #[serde(skip_serializing_if = "is_zero")]
    pub tap_operations: u64,
    /// Bytes of these, without the virtio-net header.
    #[serde(skip_serializing_if = "is_zero")]
    pub tap_bytes: u64,
    /// Queues that stopped because the guest broke them.
    #[serde(skip_serializing_if = "is_zero")]
    pub queue_faults: u64,
    /// Frames of the tap writes and reads whose end is unknown, because a worker died in them.
    #[serde(skip_serializing_if = "is_zero")]
    pub uncertain: u64,
    /// Counters of the ledger that were not believed, because they went back.
    #[serde(skip_serializing_if = "is_zero")]
    pub gone_back: u64,
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl PortCounters {
    /// What a port has counted up to now.
    #[must_use]
    pub fn of(port: &Port) -> Self {
        let tally = &port.tally;
        let [receive, transmit] = tally.counted();
        Self {
            connections: tally.connections.get(),
            refused_connections: tally.refused.get(),
            connections_given_up: tally.connections_given_up(),
            worker_restarts: tally.worker_restarts(),
            transmit: DirectionCounters::from(&transmit),
            receive: DirectionCounters::from(&receive),
        }
    }

    /// What a ledger that goes on from here begins with: receive, transmit. All of it is in the first pair.
    #[must_use]
    pub fn known(&self) -> [Known; 2] {
        [self.receive.known(Part::receive(0)), self.transmit.known(Part::transmit(0))]
    }

    /// The later of two states of one port: that in which no counter is lower. None if each has gone on from
    /// the other's past in a way of its own.
    pub(super) fn later<'a>(&'a self, other: &'a Self) -> Option<&'a Self> {
        let (ours, others) = (self.words(), other.words());
        let mut pairs = ours.iter().zip(&others);
        if pairs.clone().all(|(ours, others)| ours >= others) {
            Some(self)
        } else if pairs.all(|(ours, others)| ours <= others) {
            Some(other)
        } else {
            None
        }
    }

    /// Every counter, in a fixed order.
    fn words(&self) -> Vec<u64> {
        let Self { connections, refused_connections, connections_given_up, worker_restarts, .. } = *self;
        let own = [connections, refused_connections, connections_given_up, worker_restarts];
        own.into_iter().chain(self.transmit.words()).chain(self.receive.words()).collect()
    }
}

impl DirectionCounters {
    fn totals(&self) -> Totals {
        Totals {
            chains: self.chains,
            in_flight: self.in_flight,
            passed: self.passed.into(),
            diverted: self.diverted.into(),
            normal: self.normal.into(),
            suspect: self.suspect.into(),
            dropped: self.dropped.0,
            dropped_packets: self.dropped_packets,
            dropped_bytes: self.dropped_bytes,
            tap_operations: self.tap_operations,
            tap_bytes: self.tap_bytes,
        }
    }

    fn set_totals(&mut self, totals: &Totals) {
        let Totals { chains, in_flight, passed, diverted, normal, suspect, dropped, .. } = *totals;
        let Totals { dropped_packets, dropped_bytes, tap_operations, tap_bytes, .. } = *totals;
        *self = Self {
            chains,
            in_flight,
            passed: passed.into(),
            diverted: diverted.into(),
            normal: normal.into(),
            suspect: suspect.into(),
            dropped: Dropped(dropped),
            dropped_packets,
            dropped_bytes,
            tap_operations,
            tap_bytes,
            queue_faults: self.queue_faults,
            uncertain: self.uncertain,
            gone_back: self.gone_back,
        };
    }

    /// Every counter; what is in flight is none.
    fn words(&self) -> impl Iterator<Item = u64> {
        let counted = Totals { in_flight: 0, ..self.totals() };
        counted.words().into_iter().chain([self.queue_faults, self.uncertain, self.gone_back])
    }

    fn known(&self, part: Part) -> Known {
        Known::resumed(part, self.totals(), self.queue_faults, self.uncertain, self.gone_back)
    }
}

impl From<&Known> for DirectionCounters {
    fn from(known: &Known) -> Self {
        let mut counters = Self {
            queue_faults: known.queue_faults(),
            uncertain: known.uncertain(),
            gone_back: known.gone_back(),
            ..Self::default()
        };
        counters.set_totals(known.totals());
        counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counters that all differ.
    fn distinct() -> PortCounters {
        let known = |part, first: u64| {
            let mut words = [0; Totals::WORDS];
            for (word, n) in words.iter_mut().zip(first..) {
                *word = n;
            }
            Known::resumed(part, Totals::from_words(&words), first + 80, first + 81, first + 82)
        };
        PortCounters {
            connections: 1,
            refused_connections: 2,
            connections_given_up: 4,
            worker_restarts: 3,
            transmit: (&known(Part::transmit(0), 100)).into(),
            receive: (&known(Part::receive(0), 200)).into(),
        }
    }

    #[test]
    fn every_counter_comes_back_from_text_and_from_a_ledger() {
        let counters = distinct();
        let text = serde_json::to_string(&counters).unwrap();
        assert_eq!(serde_json::from_str::<PortCounters>(&text).unwrap(), counters);
        let [receive, transmit] = counters.known();
        assert_eq!(DirectionCounters::from(&receive), counters.receive);
        assert_eq!(DirectionCounters::from(&transmit), counters.transmit);
        assert_eq!(receive.totals().words()[0], 200);
    }

    #[test]
    fn what_is_0_takes_no_room() {
        assert_eq!(serde_json::to_string(&PortCounters::default()).unwrap(), "{}");
        assert_eq!(serde_json::from_str::<PortCounters>("{}").unwrap(), PortCounters::default());
    }

    #[test]
    fn the_later_of_two_states_is_that_in_which_no_counter_is_lower() {
        let before = distinct();
        let mut after = before.clone();
        assert_eq!(before.later(&after), Some(&before));
        after.receive.gone_back += 1;
        after.transmit.in_flight = 0;
        assert_eq!((before.later(&after), after.later(&before)), (Some(&after), Some(&after)));
        let mut aside = before.clone();
        aside.connections += 1;
        assert_eq!((aside.later(&after), after.later(&aside)), (None, None));
    }
}
