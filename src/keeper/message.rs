//! vhost-user messages on a socket (vhost-user protocol, "Message Specification").
//!
//! ```text
//!   request u32 | flags u32 | size u32 | payload, `size` bytes        native byte order
//!                 bits 0-1 version (1), bit 2 reply, bit 3 need_reply
//! ```
//! A message may come in pieces: a stream has no message boundaries.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};

/// Header size in bytes.
const HEADER: usize = 12;
/// Longest payload that is accepted, in bytes: the longest real one, a memory table, has 264.
const PAYLOAD_MAX: usize = 4096;
/// Most descriptors that one `recvmsg` can carry (`SCM_MAX_FD`).
const DESCRIPTORS_MAX: usize = 253;
/// Most descriptors that we send: one for each region of the largest memory table.
const DESCRIPTORS_SENT: usize = 32;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// The message is an answer.
pub const REPLY: u32 = 1 << 2;
/// The sender wants an acknowledgement where the request has no answer of its own.
pub const NEED_REPLY: u32 = 1 << 3;

/// Request codes ("Front-end message types").
#[expect(missing_docs, reason = "the names are the protocol's own")]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// One message.
#[derive(Debug)]
pub struct Message {
    /// See [`request`].
    pub request: u32,
    /// Version, [`REPLY`], [`NEED_REPLY`].
    pub flags: u32,
    /// The payload.
    pub body: Vec<u8>,
    /// Descriptors that came with it.
    pub files: Vec<OwnedFd>,
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The other side hung up.
    #[error("the connection was closed")]
    Closed,
    /// The kernel refused something.
    #[error(transparent)]
    Io(#[from] Errno),
    /// Not a vhost-user header.
    #[error(
        "a header with request {request}, flags {flags:#x} and size {size} is none of vhost-user version 1"
    )]
    Header {
        /// As received.
        request: u32,
        /// As received.
        flags: u32,
        /// As received.
        size: u32,
    },
}

/// Reads 32 bits at a byte offset; 0 beyond the end.
#[must_use]
pub fn u32_at(body: &[u8], at: usize) -> u32 {
    body.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// Reads 64 bits at a byte offset; 0 beyond the end.
#[must_use]
pub fn u64_at(body: &[u8], at: usize) -> u64 {
    body.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

/// A message that is being received.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
    since: Option<Instant>,
}

impl Inbox {
    /// Receives what is there. `None`: the message is not complete yet.
    ///
    /// # Errors
    /// [`MessageError`]: the connection is to be closed.
    pub fn receive(&mut self, socket: impl AsFd) -> Result<Option<Message>, MessageError> {
        let missing = self.missing()?;
        if missing > 0 && !self.receive_some(socket.as_fd(), missing)? {
            return Ok(None);
        }
        // The header may just have become complete, and the payload be there too.
        let missing = self.missing()?;
        if missing > 0 && !self.receive_some(socket.as_fd(), missing)? {
            return Ok(None);
        }
        if self.missing()? > 0 { Ok(None) } else { Ok(Some(self.take())) }
    }

    /// When the first byte of an incomplete message came.
    #[must_use]
    pub const fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Bytes that are missing of the header, or else of the payload.
    fn missing(&self) -> Result<usize, MessageError> {
        if self.bytes.len() < HEADER {
            return Ok(HEADER - self.bytes.len());
        }
        let [request, flags, size] = [0, 4, 8].map(|at| u32_at(&self.bytes, at));
        match usize::try_from(size) {
            Ok(n) if n <= PAYLOAD_MAX && flags & VERSION_MASK == VERSION => Ok(HEADER + n - self.bytes.len()),
            _ => Err(MessageError::Header { request, flags, size }),
        }
    }

    /// Receives up to `most` bytes. False: there are none now.
    fn receive_some(&mut self, socket: BorrowedFd<'_>, most: usize) -> Result<bool, MessageError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let had = self.bytes.len();
        self.bytes.resize(had + most, 0);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(socket, &mut [IoSliceMut::new(&mut self.bytes[had..])], &mut control, flags);
        let count = received.as_ref().map_or(0, |r| r.bytes);
        self.bytes.truncate(had + count);
        match received {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(Errno::CONNRESET) => return Err(MessageError::Closed),
            Err(e) => return Err(e.into()),
            Ok(_) if count == 0 => return Err(MessageError::Closed),
            Ok(_) => {}
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        self.since.get_or_insert_with(Instant::now);
        Ok(true)
    }

    fn take(&mut self) -> Message {
        let message = Message {
            request: u32_at(&self.bytes, 0),
            flags: u32_at(&self.bytes, 4),
            body: self.bytes.split_off(HEADER),
            files: std::mem::take(&mut self.files),
        };
        self.bytes.clear();
        self.since = None;
        message
    }
}

/// Sends a message; `flags` without the version.
///
/// # Errors
/// Whatever `sendmsg` says; `MSGSIZE` if only a part was taken.
pub fn send(
    socket: impl AsFd,
    request: u32,
    flags: u32,
    body: &[u8],
    files: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let size = u32::try_from(body.len()).map_err(|_| Errno::MSGSIZE)?;
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    for word in [request, flags | VERSION, size] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(body);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_SENT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(Errno::MSGSIZE);
    }
    let sent = sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(Errno::MSGSIZE) }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn a_message_may_come_byte_by_byte_and_two_may_come_at_once() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        for word in [request::SET_FEATURES, 1 | NEED_REPLY, 8] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(7_u64.to_ne_bytes());
        let mut inbox = Inbox::default();
        for byte in &bytes[..bytes.len() - 1] {
            theirs.write_all(&[*byte]).unwrap();
            assert!(inbox.receive(&ours).unwrap().is_none());
            assert!(inbox.since().is_some());
        }
        theirs.write_all(&bytes[bytes.len() - 1..]).unwrap();
        let message = inbox.receive(&ours).unwrap().unwrap();
        assert_eq!((message.request, u64_at(&message.body, 0)), (request::SET_FEATURES, 7));
        assert!(inbox.since().is_none());
        theirs.write_all(&[&bytes[..], &bytes[..]].concat()).unwrap();
        assert!(inbox.receive(&ours).unwrap().is_some());
        assert!(inbox.receive(&ours).unwrap().is_some());
        assert!(inbox.receive(&ours).unwrap().is_none());
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        send(&theirs, request::SET_VRING_KICK, 0, &1_u64.to_ne_bytes(), &[theirs.as_fd()]).unwrap();
        send(&theirs, request::GET_FEATURES, 0, &[], &[]).unwrap();
        let mut inbox = Inbox::default();
        assert_eq!(inbox.receive(&ours).unwrap().unwrap().files.len(), 1);
        assert!(inbox.receive(&ours).unwrap().unwrap().files.is_empty());
        drop(theirs);
        assert!(matches!(inbox.receive(&ours), Err(MessageError::Closed)));
    }

    #[test]
    fn a_header_of_another_version_or_of_a_huge_message_ends_the_connection() {
        for words in [[1_u32, 0, 0], [1, 2, 0], [1, 1, u32::MAX], [1, 1, 4097]] {
            let (mut theirs, ours) = UnixStream::pair().unwrap();
            theirs.write_all(&words.map(u32::to_ne_bytes).concat()).unwrap();
            assert!(matches!(Inbox::default().receive(&ours), Err(MessageError::Header { .. })), "{words:?}");
        }
    }
}
