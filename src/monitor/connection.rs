//! One front end's connection, from its keeper's start until keeper and worker are gone.

use std::{io, process::ExitStatus, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    change::blocking,
    doorbell::FrontEnd,
    ports::{Acknowledged, Port},
    spawn::{KeeperProcess, PolicySocket},
};
use crate::{
    keeper::process::Inherited,
    policy::{
        Policy,
        handover::{self, Packet},
    },
};

/// A second front end may come before the first one's keeper has noticed that the first is gone (a VMM that
/// restarts): it waits this long, and is then refused.
const SECOND_WAITS: Duration = Duration::from_millis(500);
/// How long a keeper may take to end in good order.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// A connection that is being served.
#[derive(Debug)]
pub struct Connection<'p> {
    port: &'p Port,
    keeper: KeeperProcess,
    policies: PolicySocket,
    policy: watch::Receiver<Policy>,
    /// The worker has asked for its policy.
    ready: bool,
    /// The worker has closed its end, or sent what it must not.
    worker_gone: bool,
    /// A front end that came meanwhile, and when it is refused.
    second: Option<(FrontEnd, Instant)>,
    /// When the keeper, asked to end, is killed.
    deadline: Option<Instant>,
}

/// What can happen to a connection.
enum Event {
    KeeperEnded(ExitStatus),
    Packet(Packet),
    WorkerGone,
    PolicyChanged,
    SecondCame(FrontEnd),
    SecondExpired,
    Stop,
    DeadlinePassed,
}

impl<'p> Connection<'p> {
    /// Starts a keeper for the front end.
    ///
    /// # Errors
    /// When the kernel gives no process or descriptor.
    pub fn start(port: &'p Port, front_end: FrontEnd) -> io::Result<Self> {
        let (ours, theirs) = handover::pair()?;
        let inherited = Inherited {
            front_end: front_end.connection,
            ledger: port.tally.ledger_file.try_clone()?,
            policies: theirs,
            tap: port.tap.share(port.brief.queue_pairs)?.into_iter().collect(),
        };
        let keeper = KeeperProcess::start(&port.brief, inherited)?;
        port.acknowledged.send_replace(Acknowledged::Nothing);
        let (policies, policy) = (PolicySocket::new(ours)?, port.policy.subscribe());
        Ok(Self {
            port,
            keeper,
            policies,
            policy,
            ready: false,
            worker_gone: false,
            second: None,
            deadline: None,
        })
    }

    /// Serves it to its end; gives a front end that came meanwhile.
    ///
    /// # Errors
    /// When the keeper cannot be watched.
    pub async fn serve(mut self, mut stop: watch::Receiver<bool>) -> io::Result<Option<FrontEnd>> {
        let status = loop {
            match self.next(&mut stop).await? {
                Event::KeeperEnded(status) => break status,
                Event::Packet(packet) => self.answer(packet),
                // The worker is gone, or not to be understood: its keeper follows, or is made to.
                Event::WorkerGone => {
                    self.worker_gone = true;
                    self.deadline = Some(Instant::now() + END_DEADLINE);
                }
                Event::PolicyChanged => self.hand_over(),
                Event::SecondCame(another) => self.second = Some((another, Instant::now() + SECOND_WAITS)),
                Event::SecondExpired => {
                    self.second = None;
                    self.port.refuse("one is connected");
                }
                Event::Stop => {
                    self.keeper.terminate();
                    self.deadline = Some(Instant::now() + END_DEADLINE);
                }
                Event::DeadlinePassed => {
                    tracing::warn!("the keeper did not end in time: killed");
                    self.keeper.kill();
                    self.deadline = None;
                }
            }
        };
        self.port.keeper_ended(status);
        // A successor starts only after keeper and worker are gone.
        while let Ok(Some(_)) = self.policies.receive().await {}
        self.keeper.reap_worker().await;
        self.port.tally.close_accounts();
        let tap = self.port.tap.share(self.port.brief.queue_pairs)?;
        blocking(move || tap.rest()).await; // the kernel takes its time
        self.port.acknowledged.send_replace(Acknowledged::NoWorker);
        Ok(self.second.map(|(front_end, _)| front_end))
    }

    async fn next(&mut self, stop: &mut watch::Receiver<bool>) -> io::Result<Event> {
        let may_wait = self.second.is_none() && self.port.doorbell.listens();
        let second_expires = self.second.as_ref().map(|(_, at)| *at);
        Ok(tokio::select! {
            status = self.keeper.ended() => Event::KeeperEnded(status?),
            packet = self.policies.receive(), if !self.worker_gone => match packet {
                Ok(Some(packet)) => Event::Packet(packet),
                Ok(None) | Err(_) => Event::WorkerGone,
            },
            Ok(()) = self.policy.changed(), if self.ready => Event::PolicyChanged,
            another = self.port.another(), if may_wait => Event::SecondCame(another),
            () = at(second_expires) => Event::SecondExpired,
            Ok(_) = stop.wait_for(|stop| *stop), if self.deadline.is_none() => Event::Stop,
            () = at(self.deadline) => Event::DeadlinePassed,
        })
    }

    fn answer(&mut self, packet: Packet) {
        match packet {
            Packet::Ready => {
                self.ready = true;
                self.hand_over();
            }
            Packet::Acknowledged(generation) => {
                self.port.acknowledged.send_replace(Acknowledged::Generation(generation));
            }
            Packet::Refused(generation) => tracing::error!(generation, "the worker refused its policy"),
            Packet::Policy(_) => {}
        }
    }

    fn hand_over(&mut self) {
        let policy = *self.policy.borrow_and_update();
        // From now on frames may pass, under this policy or a later one.
        self.port.acknowledged.send_if_modified(|acknowledged| {
            let first = *acknowledged == Acknowledged::Nothing;
            if first {
                *acknowledged = Acknowledged::Generation(policy.generation);
            }
            first
        });
        if let Err(e) = self.policies.send(&policy) {
            tracing::error!("cannot hand over the policy: {e}");
        }
    }
}

/// Waits until a moment; for ever if there is none.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
