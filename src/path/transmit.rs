//! One turn of transmit: up to a batch of frames from the guest to the tap.

use arrayvec::ArrayVec;
use virtio_queue::Queue;

use super::{
    Port, Turn, account,
    batch::{Batch, FRAMES, Storage},
    chain::{Chain, Purpose},
    forward::forward,
    inspect,
    judge::{Judged, judge},
    label,
    ring::{self, Areas, Memory, OpenRing, Pieces, QueueFault},
};
use crate::ledger::Account;

/// What a transmit queue keeps between its turns.
#[derive(Debug)]
pub struct Transmit {
    storage: Storage,
    account: Account,
}

/// Why a batch ended.
enum End {
    /// The ring is empty.
    Empty,
    /// The batch is full; there may be more.
    Full,
    Fault(QueueFault),
}

impl Transmit {
    /// Counts in this account.
    #[must_use]
    pub fn new(account: Account) -> Self {
        Self { storage: Storage::default(), account }
    }

    /// Before a ring's first batch: see [`settle`](super::ring::settle).
    ///
    /// # Errors
    /// [`QueueFault::Outside`].
    pub fn settle(&mut self, queue: &mut Queue, memory: &Memory, session: u64) -> Result<bool, QueueFault> {
        let settled = ring::settle(queue, memory, &mut self.account, session);
        if settled.is_err() {
            self.account.queue_fault();
        }
        settled
    }

    /// The ring stops.
    pub fn stop(&mut self) {
        self.account.end();
    }

    /// Moves up to [`FRAMES`] frames.
    pub fn turn(&mut self, queue: &mut Queue, memory: &Memory, port: &Port<'_>) -> Turn {
        let turn = self.work(queue, memory, port).unwrap_or_else(Turn::fault);
        if turn.fault.is_some() {
            self.account.queue_fault();
        }
        turn
    }

    fn work(&mut self, queue: &mut Queue, memory: &Memory, port: &Port<'_>) -> Result<Turn, QueueFault> {
        let areas = Areas::find(queue, memory)?;
        let mut ring = OpenRing::open(queue, &areas)?;
        ring.suppress();
        let mut batch = self.storage.begin();
        let mut frames = ArrayVec::new();
        let end = fill(&mut ring, &mut batch, &mut frames, port);
        let mut waiting = u16::try_from(frames.len()).unwrap_or(u16::MAX);
        for judged in frames {
            let Ok(outcome) = forward(judged, &batch, port.tap, &mut self.account) else { break };
            let given_back = ring.give_back(account::transmitted(&mut self.account, outcome));
            account::confirm(&mut self.account, given_back);
            waiting = waiting.saturating_sub(1);
        }
        // The tap is full: the frame that it refused, and everything after it, goes back untouched. The tap
        // tells when there is room.
        ring.untake(waiting);
        let room = waiting == 0 || port.tap.has_room();
        let more = match end {
            _ if waiting > 0 => Ok(room),
            End::Empty => ring.rearm(),
            End::Full => Ok(true),
            End::Fault(fault) => Err(fault),
        };
        let signal = ring.end(&mut self.account);
        Ok(Turn { signal, more: more == Ok(true), tap_full: !room, fault: more.err() })
    }
}

/// Takes, labels, inspects and judges frames until the ring is empty or the batch full.
fn fill<'m>(
    ring: &mut OpenRing<'_, 'm>,
    batch: &mut Batch<'_, 'm>,
    frames: &mut ArrayVec<Judged<Chain>, FRAMES>,
    port: &Port<'_>,
) -> End {
    let mut pieces = Pieces::new();
    while !frames.is_full() {
        pieces.clear();
        let walked = match ring.take(Purpose::Transmit, &mut pieces) {
            Ok(Some(walked)) => walked,
            Ok(None) => return End::Empty,
            Err(fault) => return End::Fault(fault),
        };
        let Ok(chain) = batch.take(walked, &pieces, port.link.header_len) else {
            ring.untake(1);
            return End::Full;
        };
        let inspected = inspect::transmitted(label::attach(chain, port.policy), batch, &port.link);
        frames.push(judge(inspected, port.policy));
    }
    End::Full
}
