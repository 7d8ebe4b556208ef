//! The worker: maps guest memory, moves frames, writes the ledger. It has no rights at all.
//!
//! A thread for each queue pair (kicks, its queue of the tap), one for the keeper's messages: these are the
//! `vhost-user-backend` crate's, and what they do is [`device`] and [`pair`]. Where the tap has several queues, one
//! more thread attaches and detaches them ([`queues`]).

pub mod device;
pub mod pair;
pub mod queues;
pub mod vring;

use std::{
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixListener,
    sync::Arc,
    thread::{self, JoinHandle},
};

use anyhow::Context;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryAtomic;

use crate::{
    keeper::{brief::Brief, process::Inherited},
    ledger::Ledger,
    path::ring::Memory,
    policy::handover::{self, Packet},
};
use device::{Device, Parts};
use queues::TapQueues;
use vring::Ring;

/// What a worker is forked with.
#[derive(Clone, Copy, Debug)]
pub struct Orders<'k> {
    /// What the monitor said of the port.
    pub brief: &'k Brief,
    /// Tap, ledger and policy socket.
    pub inherited: &'k Inherited,
    /// Where the keeper has connected already.
    pub listener: BorrowedFd<'k>,
    /// An eventfd for each queue pair: written to by the worker when a turn was bounded, and by the keeper to see a
    /// pulse.
    pub again: &'k [OwnedFd],
    /// The connection's number.
    pub session: u64,
}

/// Runs in the forked child until the keeper hangs up; gives the exit code.
#[must_use]
pub fn run(orders: &Orders<'_>) -> i32 {
    if let Ok(name) = std::ffi::CString::new(orders.brief.process_name('w')) {
        let _ = rustix::thread::set_name(&name);
    }
    match serve(orders) {
        Ok(()) => 0,
        Err(why) => {
            tracing::error!("the worker ends: {why:#}");
            1
        }
    }
}

fn serve(orders: &Orders<'_>) -> anyhow::Result<()> {
    let Orders { brief, inherited, listener, again, session } = *orders;
    let ledger = Ledger::open(&inherited.ledger, brief.queue_pairs)?;
    let memory = GuestMemoryAtomic::new(Memory::new());
    let queues = Arc::new(TapQueues::new(copies(&inherited.tap)?));
    let parts = Parts {
        brief: brief.clone(),
        memory: memory.clone(),
        pairs: (0..)
            .zip(copies(&inherited.tap)?)
            .zip(copies(again)?)
            .map(|((number, tap), again)| pair::Parts { number, tap, again })
            .collect(),
        queues: Arc::clone(&queues),
        policies: inherited.policies.try_clone()?,
        ledger,
        session,
    };
    let device = Arc::new(Device::new(parts));
    let name = brief.process_name('w');
    let (daemon, rings) = Ring::made_in(|| VhostUserDaemon::new(name, Arc::clone(&device), memory));
    let mut daemon = daemon.map_err(|e| anyhow::anyhow!("vhost-user daemon: {e}"))?;
    watch(&daemon, &device, &rings)?;
    device.adopt(rings);
    let attaching = attach_queues(&queues).context("thread")?;
    // From here on the monitor may hand over the policy; until then nothing passes.
    handover::send(&inherited.policies, Packet::Ready, None).context("policy socket")?;
    let mut listener = Listener::from(UnixListener::from(listener.try_clone_to_owned()?));
    daemon.start(&mut listener).map_err(|e| anyhow::anyhow!("private connection: {e}"))?;
    if let Err(e) = daemon.wait() {
        tracing::debug!("the private connection ended: {e}");
    }
    drop(daemon); // joins the pairs' threads
    device.finish();
    queues.end();
    if let Some(attaching) = attaching {
        let _ = attaching.join();
    }
    Ok(())
}

fn copies(descriptors: &[OwnedFd]) -> std::io::Result<Vec<OwnedFd>> {
    descriptors.iter().map(OwnedFd::try_clone).collect()
}

/// Starts the thread that attaches and detaches the tap's queues, if there is a choice.
fn attach_queues(queues: &Arc<TapQueues>) -> std::io::Result<Option<JoinHandle<()>>> {
    if !queues.are_several() {
        return Ok(None);
    }
    let followed = Arc::clone(queues);
    let thread = thread::Builder::new().name("tap_queues".into()).spawn(move || followed.follow())?;
    queues.followed_by(thread.thread());
    Ok(Some(thread))
}

fn watch(daemon: &VhostUserDaemon<Arc<Device>>, device: &Device, rings: &[Ring]) -> anyhow::Result<()> {
    for (thread, (handler, rings)) in daemon.get_epoll_handlers().iter().zip(rings.chunks(2)).enumerate() {
        for (token, ring) in (0..).zip(rings) {
            ring.belongs_to(handler.as_raw_fd(), token);
        }
        device.watched_by(thread, handler.as_raw_fd());
        for (fd, events, token) in device.sources(thread) {
            handler.register_listener(fd, events, token).context("event loop")?;
        }
    }
    Ok(())
}
