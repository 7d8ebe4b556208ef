//! Notifications: kicking the device, being called by it (virtio 1.2, sections 2.7.7 and 2.7.10).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFlags, eventfd};

use super::{Queue, Silence};
use crate::channel::ready;
use crate::ring::{LARGEST_RING, NO_NOTIFICATION};

/// Kicking the device.
impl Queue {
    /// Kicks, if the device wants to know of what was published since the last time.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    #[inline]
    pub fn kick_if_needed(&mut self) -> io::Result<bool> {
        let (old, new) = (self.kicked, self.published);
        if old == new {
            return Ok(false);
        }
        self.kicked = new;
        // The device writes its wish, then looks at avail.idx; here it is the other way round. Both need the
        // full barrier, or each can miss the other's write.
        fence(Ordering::SeqCst);
        let wanted = if self.options.event_idx {
            crossed(self.ring.available_event(), old, new)
        } else {
            self.ring.used_flags() & NO_NOTIFICATION == 0
        };
        if wanted {
            self.kick()?;
        }
        Ok(wanted)
    }

    /// Kicks, wanted or not.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn kick(&mut self) -> io::Result<()> {
        self.notifications.kicks += 1;
        signal(self.kick.as_fd())
    }
}

/// Being called by the device.
impl Queue {
    /// Asks for a call once the device is done with `count` more chains than were taken back.
    pub fn set_call_after(&mut self, count: u16) {
        if self.options.event_idx {
            self.ring.set_used_event(self.seen.wrapping_add(count.wrapping_sub(1)));
        } else {
            self.ring.set_available_flags(0);
        }
    }

    /// Asks for no calls, as far as the device can be asked: with `EVENT_IDX` for the next half of the index
    /// space, so a poller says it again as it goes on.
    #[inline]
    pub fn refuse_calls(&mut self) {
        if self.options.event_idx {
            self.ring.set_used_event(self.seen.wrapping_add(LARGEST_RING - 1));
        } else {
            self.ring.set_available_flags(NO_NOTIFICATION);
        }
    }

    /// Waits until the device is done with a chain, by its call and by nothing else.
    ///
    /// # Errors
    /// When that time passes: [`Silence`] tells whether the device did nothing or only forgot to call.
    pub fn wait(&mut self, within: Duration) -> Result<(), Silence> {
        let until = Instant::now() + within;
        loop {
            if self.has_used() {
                return Ok(());
            }
            self.set_call_after(1);
            // As for the kick: the wish must be out before the index is looked at again.
            fence(Ordering::SeqCst);
            if self.has_used() {
                return Ok(());
            }
            if !ready(self.call.as_fd(), PollFlags::IN, until).map_err(Silence::Io)? {
                let lost = self.has_used();
                return Err(if lost { Silence::LostCall(within) } else { Silence::Nothing(within) });
            }
            self.take_calls().map_err(Silence::Io)?;
        }
    }

    /// Reads the calls that came since the last time.
    ///
    /// # Errors
    /// When the eventfd cannot be read.
    pub fn take_calls(&mut self) -> io::Result<u64> {
        let count = take(self.call.as_fd())?;
        self.notifications.calls += count;
        Ok(count)
    }

    /// Calls the driver, as a VMM does that passes on a call which came for it elsewhere.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn pass_call_on(&self) -> io::Result<()> {
        signal(self.call.as_fd())
    }
}

/// Whether moving from `old` to `new` passes `event` (virtio 1.2, section 2.7.7.2).
#[inline]
pub(super) fn crossed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// An eventfd that never blocks: neither side may hang on the other.
pub(crate) fn event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Adds 1 to an eventfd.
fn signal(event: BorrowedFd<'_>) -> io::Result<()> {
    match rustix::io::write(event, &1_u64.to_ne_bytes()) {
        // A full counter is a signal that nobody has read yet, as good as another.
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(source) => Err(source.into()),
    }
}

/// Reads an eventfd's counter, which makes it 0.
pub(crate) fn take(event: BorrowedFd<'_>) -> io::Result<u64> {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(_) => Ok(u64::from_ne_bytes(count)),
        Err(rustix::io::Errno::AGAIN) => Ok(0),
        Err(source) => Err(source.into()),
    }
}
