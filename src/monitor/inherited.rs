//! Taps that are handed in as descriptors, by a service manager or a launcher (`sd_listen_fds(3)`): how a tap
//! in a network namespace that we cannot enter becomes ours. The descriptor's name is the tap's; a tap with several
//! queues is as many descriptors of that name.

#![expect(unsafe_code, reason = "takes over inherited descriptors")]

use std::{
    collections::HashMap,
    os::fd::{FromRawFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::tap::Queues;

/// The taps that were handed to this process, by name; none the second time.
#[must_use]
pub fn take() -> HashMap<String, Queues> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return HashMap::new();
    }
    let Ok(named) = sd_notify::listen_fds_with_names() else { return HashMap::new() };
    let mut taps = HashMap::<_, Queues>::new();
    for (number, name) in named {
        // SAFETY: LISTEN_PID names this process, so the descriptor was left open for us and nobody else in here
        // knows of it; it is taken once.
        let queue = unsafe { OwnedFd::from_raw_fd(number) };
        if let Some(queues) = taps.get_mut(&name) {
            queues.push(queue);
        } else {
            taps.insert(name, queue.into());
        }
    }
    taps
}
