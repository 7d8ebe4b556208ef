//! The worker: maps guest memory, moves frames, writes the ledger. It has no rights at all.
//!
//! Two threads: one for the queue pair (kicks, tap, policies), one for the keeper's messages. Both are the
//! `vhost-user-backend` crate's; what they do is [`device`].

pub mod device;
pub mod vring;

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    os::unix::net::UnixListener,
    sync::Arc,
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
    /// An eventfd: written to by the worker when a turn was bounded, and by the keeper to see a pulse.
    pub again: BorrowedFd<'k>,
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
    let parts = Parts {
        brief: brief.clone(),
        memory: memory.clone(),
        tap: inherited.tap.try_clone()?,
        again: again.try_clone_to_owned()?,
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
    // From here on the monitor may hand over the policy; until then nothing passes.
    handover::send(&inherited.policies, Packet::Ready, None).context("policy socket")?;
    let mut listener = Listener::from(UnixListener::from(listener.try_clone_to_owned()?));
    daemon.start(&mut listener).map_err(|e| anyhow::anyhow!("private connection: {e}"))?;
    if let Err(e) = daemon.wait() {
        tracing::debug!("the private connection ended: {e}");
    }
    drop(daemon); // joins the queue's thread
    device.finish();
    Ok(())
}

fn watch(daemon: &VhostUserDaemon<Arc<Device>>, device: &Device, rings: &[Ring]) -> anyhow::Result<()> {
    let handlers = daemon.get_epoll_handlers();
    let handler = handlers.first().context("the daemon has no event loop")?;
    for (token, ring) in (0..).zip(rings) {
        ring.belongs_to(handler.as_raw_fd(), token);
    }
    for (fd, events, token) in device.sources() {
        handler.register_listener(fd, events, token).context("event loop")?;
    }
    Ok(())
}
