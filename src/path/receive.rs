//! One turn of receive: frames from the tap to the guest.
//!
//! A frame is read only when the guest has a buffer for it to begin in. If there are too few for all of it,
//! the frame is held (at most one: `in_flight`) until the guest offers more.

use virtio_queue::Queue;

use super::{
    Port, Turn, WaitsFor, account,
    batch::FRAMES,
    forward::Outcome,
    inspect,
    judge::{Judged, judge},
    label,
    place::{Placed, ReceiveBuffer, TapFrame, place},
    ring::{self, Areas, Memory, OpenRing, QueueFault},
};
use crate::ledger::{Account, DropReason, Fate};

/// More frames than wait in a queue of a tap (500 by default in Linux), whatever its length was set to.
const WAITING: usize = 10_000;

/// What a receive queue keeps between its turns.
#[derive(Debug)]
pub struct Receive {
    buffer: ReceiveBuffer,
    held: Option<Judged<TapFrame>>,
    account: Account,
}

/// Why a turn ended.
enum End {
    /// The tap has no frame.
    TapEmpty,
    /// The guest has no buffer for a frame to begin in.
    RingEmpty,
    /// A frame waits for more buffers.
    Waits,
    /// The turn is full; there may be more.
    Full,
    Fault(QueueFault),
}

impl Receive {
    /// Counts in this account.
    #[must_use]
    pub fn new(account: Account) -> Self {
        Self { buffer: ReceiveBuffer::default(), held: None, account }
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

    /// Moves up to [`FRAMES`] frames. `mergeable`: the driver negotiated `MRG_RXBUF`.
    pub fn turn(&mut self, queue: &mut Queue, memory: &Memory, port: &Port<'_>, mergeable: bool) -> Turn {
        let turn = self.work(queue, memory, port, mergeable).unwrap_or_else(Turn::fault);
        if turn.fault.is_some() {
            self.account.queue_fault();
        }
        turn
    }

    fn work(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        port: &Port<'_>,
        mergeable: bool,
    ) -> Result<Turn, QueueFault> {
        let areas = Areas::find(queue, memory)?;
        let mut ring = OpenRing::open(queue, &areas)?;
        ring.suppress();
        let end = self.fill(&mut ring, port, mergeable);
        let wants_buffers = matches!(end, End::RingEmpty | End::Waits);
        let more = match end {
            End::TapEmpty => Ok(false),
            End::Full => Ok(true),
            End::RingEmpty | End::Waits if port.looks_again => Ok(false),
            End::RingEmpty => ring.rearm(),
            End::Waits => ring.rearm_for_more(),
            End::Fault(fault) => Err(fault),
        };
        let frames = self.account.frames();
        let signal = ring.end(&mut self.account);
        let waits_for = (wants_buffers && more == Ok(false)).then_some(WaitsFor::Buffers);
        Ok(Turn { frames, signal, more: more == Ok(true), waits_for, fault: more.err() })
    }

    fn fill(&mut self, ring: &mut OpenRing<'_, '_>, port: &Port<'_>, mergeable: bool) -> End {
        for _ in 0..FRAMES {
            let judged = match self.next(ring, port) {
                Ok(judged) => judged,
                Err(end) => return end,
            };
            match place(judged, &mut self.buffer, ring, &port.link, mergeable) {
                Placed::Done(outcome) => {
                    let recorded = account::received(&mut self.account, outcome, &self.buffer);
                    let given_back = ring.give_back_placed(recorded, &mut self.buffer);
                    account::confirm(&mut self.account, given_back);
                }
                Placed::Waits(judged) => {
                    self.held = Some(judged);
                    return End::Waits;
                }
                Placed::Broken(judged, fault) => {
                    self.held = Some(judged);
                    return End::Fault(fault);
                }
            }
        }
        End::Full
    }

    /// The frame that waits, or the next one from the tap.
    fn next(&mut self, ring: &mut OpenRing<'_, '_>, port: &Port<'_>) -> Result<Judged<TapFrame>, End> {
        if let Some(held) = self.held.take() {
            // The policy may have changed while it waited.
            return Ok(self.consider(held.into_frame(), port));
        }
        match ring.has_next() {
            Ok(true) => {}
            Ok(false) => return Err(End::RingEmpty),
            Err(fault) => return Err(End::Fault(fault)),
        }
        // The guest's next buffers come nearer while the kernel copies the frame.
        ring.fetch_ahead(0);
        ring.fetch_ahead(1);
        self.account.begin_tap_operation(1);
        let Some(frame) = self.buffer.read(port.tap) else {
            self.account.withdraw_tap_operation();
            return Err(End::TapEmpty);
        };
        account::read(&mut self.account, &self.buffer, port.policy.label_of_frame());
        Ok(self.consider(frame, port))
    }

    fn consider(&mut self, frame: TapFrame, port: &Port<'_>) -> Judged<TapFrame> {
        let inspected = inspect::received(label::attach(frame, port.policy), &mut self.buffer, &port.link);
        judge(inspected, port.policy)
    }

    /// The ring is not served any more, and its queue of the tap is about to be detached: what waits there is read,
    /// dropped and counted, since detaching throws it away. What comes without a pause is never all of it.
    pub fn discard(&mut self, port: &Port<'_>, why: DropReason) {
        self.drop_held(why);
        for _ in 0..WAITING {
            self.account.begin_tap_operation(1);
            let Some(frame) = self.buffer.read(port.tap) else {
                self.account.withdraw_tap_operation();
                return;
            };
            account::read(&mut self.account, &self.buffer, port.policy.label_of_frame());
            self.held = Some(self.consider(frame, port));
            self.drop_held(why);
        }
    }

    /// The ring stops: a frame that still waits is at its end.
    pub fn stop(&mut self, why: DropReason) {
        self.drop_held(why);
        self.account.end();
    }

    fn drop_held(&mut self, why: DropReason) {
        if let Some(judged) = self.held.take() {
            let outcome = Outcome::new(judged, Fate::Dropped(why));
            let _nothing_to_give_back = account::received(&mut self.account, outcome, &self.buffer);
            let _nothing_to_publish = self.account.commit();
        }
    }
}
