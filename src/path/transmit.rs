//! One turn of transmit: up to a batch of frames from the guest to the tap.

use virtio_queue::Queue;

use super::{
    Port, Turn, WaitsFor, account,
    batch::{Batch, FRAMES},
    chain::Chain,
    coalesce::{Run, Storage},
    forward::{Unsent, forward},
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
    /// So many frames go one by one: the kernel did not take them as one.
    singly: usize,
    account: Account,
}

/// Why a batch ended.
enum End {
    /// The ring is empty.
    Empty,
    /// The batch is full, or to be begun anew; there may be more.
    Full,
    /// The tap takes no more.
    TapFull,
    Fault(QueueFault),
}

/// Takes frames, until the batch is full or the ring empty.
struct Intake<'t, 'a, 'm> {
    ring: &'t mut OpenRing<'a, 'm>,
    port: &'t Port<'t>,
    batch: Batch<'t, 'm>,
    taken: usize,
    /// Why no more frames come.
    end: End,
}

impl Transmit {
    /// Counts in this account.
    #[must_use]
    pub fn new(account: Account) -> Self {
        Self { storage: Storage::default(), singly: 0, account }
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
        let mut pieces = Pieces::new();
        let batch = Batch::new(port.link.header_len, &mut pieces);
        let end = self.send_all(Intake { ring: &mut ring, port, batch, taken: 0, end: End::Empty });
        // The tap tells when there is room again, if there is none now.
        let waits_for = (matches!(end, End::TapFull) && !port.tap.has_room()).then_some(WaitsFor::Room);
        let more = match end {
            End::Empty if port.looks_again => Ok(false),
            End::Empty => ring.rearm(),
            End::Full => Ok(true),
            End::TapFull => Ok(waits_for.is_none()),
            End::Fault(fault) => Err(fault),
        };
        let frames = self.account.frames();
        let signal = ring.end(&mut self.account);
        Ok(Turn { frames, signal, more: more == Ok(true), waits_for, fault: more.err() })
    }

    /// Sends one run after the other. A frame that follows none begins the next one.
    fn send_all(&mut self, mut intake: Intake<'_, '_, '_>) -> End {
        let mut next = intake.next();
        while let Some(judged) = next.take() {
            let run = if intake.batch.is_long() {
                Run::long(&mut self.storage, judged, &intake.batch)
            } else {
                let mut run = Run::short(&mut self.storage, judged, &intake.batch);
                if self.singly == 0 {
                    next = intake.grow(&mut run);
                }
                run
            };
            let frames = run.len();
            match forward(run, intake.port.tap, &mut self.account) {
                Ok(outcome) => {
                    let recorded = account::transmitted(&mut self.account, outcome);
                    let given_back = intake.ring.give_back(recorded);
                    account::confirm(&mut self.account, given_back);
                }
                Err(unsent) => {
                    intake.untake(frames.saturating_add(next.is_some().into()));
                    if unsent == Unsent::TapFull {
                        return End::TapFull;
                    }
                    self.singly = frames;
                    return End::Full;
                }
            }
            self.singly = self.singly.saturating_sub(frames);
            if next.is_none() {
                next = intake.next();
            }
        }
        intake.end
    }
}

impl Intake<'_, '_, '_> {
    /// Takes, labels, inspects and judges the next frame.
    fn next(&mut self) -> Option<Judged<Chain>> {
        if matches!(self.end, End::Fault(_)) {
            return None; // whatever the guest makes of its ring now
        }
        if self.taken == FRAMES {
            self.end = End::Full;
            return None;
        }
        match self.batch.take(self.ring) {
            Ok(Some(chain)) => {
                self.taken = self.taken.saturating_add(1);
                let labelled = label::attach(chain, self.port.policy);
                let inspected = inspect::transmitted(labelled, &mut self.batch, &self.port.link);
                Some(judge(inspected, self.port.policy))
            }
            Ok(None) => {
                self.end = End::Empty;
                None
            }
            Err(fault) => {
                self.end = End::Fault(fault);
                None
            }
        }
    }

    /// Lets a run grow as long as frames follow that belong to it; gives the first one that does not.
    fn grow(&mut self, run: &mut Run<'_>) -> Option<Judged<Chain>> {
        while run.may_grow() {
            if let Err(other) = run.join(self.next()?, &self.batch) {
                return Some(other);
            }
        }
        None
    }

    /// Un-takes the last frames: they are found again in the next batch.
    fn untake(&mut self, frames: usize) {
        self.ring.untake(u16::try_from(frames).unwrap_or(u16::MAX));
    }
}
