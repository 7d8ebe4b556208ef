//! The socket: bytes, descriptors and whole messages, right or wrong, each with a deadline.
//!
//! ```text
//!   0        4        8        12
//!   | code   | flags  | size   | body ... size bytes |      native endianness
//! ```

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::error::{Error, Reason};
use crate::request::Request;

/// Bytes of a message's header.
pub const HEADER_SIZE: usize = 12;
/// The most descriptors that the kernel lets one message carry (`SCM_MAX_FD`).
pub const MOST_DESCRIPTORS: usize = 253;
/// A reply's body may not be larger; the largest real one is a device's configuration space.
const LARGEST_BODY: usize = 64 << 10;

/// A message's header; every field can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which request, or which one a reply answers.
    pub request: Request,
    /// Version, REPLY, `NEED_REPLY`.
    pub flags: u32,
    /// How many bytes the body is said to have.
    pub size: u32,
}

impl Header {
    /// As it goes over the socket.
    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        for (place, word) in bytes.chunks_exact_mut(4).zip([self.request.0, self.flags, self.size]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn parse(bytes: [u8; HEADER_SIZE]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { request: Request(word(0)), flags: word(4), size: word(8) }
    }
}

/// A message that came.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its body.
    pub body: Vec<u8>,
    /// The descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
}

/// A connection to a backend.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// Connects to a backend that listens.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path);
        stream.map(Self::from).map_err(|source| Error::Connect(path.display().to_string(), source))
    }

    /// Takes the next backend that connects.
    ///
    /// # Errors
    /// When none does within `within`.
    pub fn accept(listener: &UnixListener, within: Duration) -> Result<Self, Error> {
        let failed = |source| Error::Connect(format!("{listener:?}"), source);
        let deadline = Instant::now() + within;
        if !ready(listener.as_fd(), PollFlags::IN, deadline).map_err(failed)? {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        listener.accept().map(|(stream, _)| Self::from(stream)).map_err(failed)
    }

    /// Sends one message as it should be: header, body and descriptors at once.
    ///
    /// # Errors
    /// When it does not go out before the deadline.
    pub fn send(
        &self,
        header: Header,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        by: Deadline,
    ) -> Result<(), Reason> {
        let mut bytes = Vec::with_capacity(HEADER_SIZE + body.len());
        bytes.extend_from_slice(&header.bytes());
        bytes.extend_from_slice(body);
        self.write(&bytes, fds, by)
    }

    /// Writes any bytes with any descriptors: half a header, a split body, several messages at once. The
    /// descriptors go with the first byte.
    ///
    /// # Errors
    /// When they do not all go out before the deadline, or are more descriptors than the kernel takes.
    pub fn write(&self, mut bytes: &[u8], mut fds: &[BorrowedFd<'_>], by: Deadline) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let space = SendAncillaryMessage::ScmRights(fds).size();
            let mut space = vec![MaybeUninit::uninit(); if fds.is_empty() { 0 } else { space }];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(Reason::Send(io::ErrorKind::InvalidInput.into()));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    fds = &[];
                }
                Err(rustix::io::Errno::AGAIN) => by.wait(self.stream.as_fd(), PollFlags::OUT)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(source) => return Err(Reason::Send(source.into())),
            }
        }
        Ok(())
    }

    /// Reads the next message.
    ///
    /// # Errors
    /// When it is not there, whole, before the deadline.
    pub fn receive(&self, by: Deadline) -> Result<Message, Reason> {
        let mut descriptors = Vec::new();
        let mut header = [0; HEADER_SIZE];
        self.fill(&mut header, &mut descriptors, by)?;
        let header = Header::parse(header);
        let size = usize::try_from(header.size).unwrap_or(usize::MAX);
        if size > LARGEST_BODY {
            return Err(Reason::Unexpected { request: header.request, flags: header.flags, size });
        }
        let mut body = vec![0; size];
        self.fill(&mut body, &mut descriptors, by)?;
        Ok(Message { header, body, descriptors })
    }

    /// Reads bytes, with whatever descriptors come with them.
    ///
    /// # Errors
    /// When not all of them are there before the deadline.
    pub fn fill(&self, mut bytes: &mut [u8], fds: &mut Vec<OwnedFd>, by: Deadline) -> Result<(), Reason> {
        while !bytes.is_empty() {
            by.wait(self.stream.as_fd(), PollFlags::IN)?;
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let read = match recvmsg(&self.stream, &mut [IoSliceMut::new(bytes)], &mut control, flags) {
                Ok(message) if message.bytes == 0 => return Err(Reason::Closed),
                Ok(message) => message.bytes,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
                Err(rustix::io::Errno::CONNRESET) => return Err(Reason::Closed),
                Err(source) => return Err(Reason::Receive(source.into())),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            bytes = &mut bytes[read..];
        }
        Ok(())
    }

    /// Waits until the backend has closed the connection; messages that still come are dropped.
    ///
    /// # Errors
    /// When it has not before the deadline.
    pub fn wait_closed(&self, by: Deadline) -> Result<(), Reason> {
        loop {
            match self.fill(&mut [0], &mut Vec::new(), by) {
                Ok(()) => {}
                Err(Reason::Closed) => return Ok(()),
                Err(reason) => return Err(reason),
            }
        }
    }

    /// The socket itself, for what this type does not do.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }
}

impl From<UnixStream> for Channel {
    fn from(stream: UnixStream) -> Self {
        Self { stream }
    }
}

/// A point in time until which a peer must have done its part, and how long that was.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    within: Duration,
}

impl Deadline {
    /// So long from now.
    #[must_use]
    pub fn within(within: Duration) -> Self {
        Self { at: Instant::now() + within, within }
    }

    fn wait(&self, fd: BorrowedFd<'_>, event: PollFlags) -> Result<(), Reason> {
        match ready(fd, event, self.at) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Reason::Deadline(self.within)),
            Err(source) => Err(Reason::Receive(source)),
        }
    }
}

impl fmt::Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.within)
    }
}

/// Waits for an event on a descriptor; false when `until` comes first.
///
/// # Errors
/// What `poll` says.
pub(crate) fn ready(fd: BorrowedFd<'_>, event: PollFlags, until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::from_borrowed_fd(fd, event)], Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(source) => return Err(source.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const SHORT: Duration = Duration::from_millis(50);

    fn pair() -> (Channel, Channel) {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        (ours.into(), theirs.into())
    }

    #[test]
    fn a_message_arrives_with_its_body_and_descriptors() {
        let (ours, theirs) = pair();
        let header = Header { request: Request(77), flags: 0xf1, size: 3 };
        let fd = ours.stream().as_fd();
        ours.send(header, b"abc", &[fd, fd], Deadline::within(SHORT)).expect("sent");
        let message = theirs.receive(Deadline::within(SHORT)).expect("received");
        assert_eq!(message.header, header);
        assert_eq!(message.body, b"abc");
        assert_eq!(message.descriptors.len(), 2);
    }

    #[test]
    fn a_split_message_is_put_together() {
        let (ours, theirs) = pair();
        let bytes = Header { request: Request::GET_FEATURES, flags: 5, size: 8 }.bytes();
        for part in [&bytes[..5], &bytes[5..], &[1, 2, 3], &[4, 5, 6, 7, 8]] {
            ours.write(part, &[], Deadline::within(SHORT)).expect("sent");
        }
        let message = theirs.receive(Deadline::within(SHORT)).expect("received");
        assert_eq!(message.body, [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn silence_and_an_end_are_told_apart() {
        let (ours, theirs) = pair();
        (&theirs.stream).write_all(&[0; 5]).expect("half a header");
        assert!(matches!(ours.receive(Deadline::within(SHORT)), Err(Reason::Deadline(SHORT))));
        drop(theirs);
        assert!(matches!(ours.receive(Deadline::within(SHORT)), Err(Reason::Closed)));
        assert!(ours.wait_closed(Deadline::within(SHORT)).is_ok());
    }

    #[test]
    fn the_most_descriptors_go_and_one_more_is_refused() {
        let (ours, theirs) = pair();
        let fds = vec![ours.stream().as_fd(); MOST_DESCRIPTORS + 1];
        ours.write(&[0], &fds[1..], Deadline::within(SHORT)).expect("as many as the kernel takes");
        let mut came = Vec::new();
        theirs.fill(&mut [0], &mut came, Deadline::within(SHORT)).expect("received");
        assert_eq!(came.len(), MOST_DESCRIPTORS);
        assert!(matches!(ours.write(&[0], &fds, Deadline::within(SHORT)), Err(Reason::Send(_))));
    }
}
