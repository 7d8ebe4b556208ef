//! What kind of descriptor the front end gave us.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open, readlinkat};

/// A handle on `/proc/self/fd`, opened before `/proc` is out of sight.
#[derive(Debug)]
pub struct Descriptors(OwnedFd);

impl Descriptors {
    /// Opens it.
    ///
    /// # Errors
    /// Without `/proc`.
    pub fn open() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(open("/proc/self/fd", flags, Mode::empty())?))
    }

    /// True for an eventfd. Anything else as kick or call could block the data path or end it: a pipe, a
    /// socket, a file.
    #[must_use]
    pub fn is_eventfd(&self, file: &OwnedFd) -> bool {
        let name = file.as_raw_fd().to_string();
        readlinkat(&self.0, name, Vec::new()).is_ok_and(|target| target.to_bytes() == b"anon_inode:[eventfd]")
    }
}

/// Makes reads and writes return at once.
///
/// # Errors
/// Whatever `fcntl` says.
pub fn set_nonblocking(file: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&file)?;
    Ok(fcntl_setfl(&file, flags | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use rustix::{event::EventfdFlags, fs::MemfdFlags};

    use super::*;

    #[test]
    fn only_an_eventfd_is_an_eventfd() {
        let descriptors = Descriptors::open().unwrap();
        assert!(descriptors.is_eventfd(&rustix::event::eventfd(0, EventfdFlags::empty()).unwrap()));
        assert!(!descriptors.is_eventfd(&rustix::pipe::pipe().unwrap().0));
        assert!(!descriptors.is_eventfd(&rustix::fs::memfd_create("eventfd", MemfdFlags::empty()).unwrap()));
    }
}
