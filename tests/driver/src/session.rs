//! The front end's side of vhost-user, one typed request after the other.
//!
//! Nothing here knows an order: see `sequence` for those of real front ends. A request that is none of
//! these, or is wrong on purpose, goes through [`Session::channel`].

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::channel::{Channel, Deadline, Header, Message};
use crate::error::{Error, Reason};
use crate::memory::{Memory, Region};
use crate::request::{NO_DESCRIPTOR, Request, flag, protocol};

/// How long a backend may take for one request before the driver gives up.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes before the data in the body of `GET_CONFIG` and `SET_CONFIG`: offset, size, flags.
const CONFIG_PREFIX: usize = 12;

/// Which requests ask for an acknowledgement, once `REPLY_ACK` is negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledge {
    /// None.
    Never,
    /// What QEMU asks it for: memory and MTU.
    Memory,
    /// All.
    Always,
}

/// A connection with what was agreed on it.
#[derive(Debug)]
pub struct Session {
    channel: Channel,
    acknowledge: Acknowledge,
    protocol: u64,
    patience: Duration,
}

/// Where a ring lies, in user addresses, as `SET_VRING_ADDR` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// 1 = log writes to the used ring.
    pub flags: u32,
    /// Descriptor table.
    pub descriptors: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
    /// Guest physical address of the used ring for the log.
    pub log: u64,
}

impl Session {
    /// Nothing is said yet.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self { channel, acknowledge: Acknowledge::Never, protocol: 0, patience: PATIENCE }
    }

    /// The socket, for messages that are wrong on purpose.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The protocol features that were set.
    #[must_use]
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// Which requests ask for an acknowledgement from now on.
    pub fn acknowledge(&mut self, which: Acknowledge) {
        self.acknowledge = which;
    }

    /// How long the backend may take for each request from now on.
    pub fn patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// A request without an answer of its own; waits for the acknowledgement where one is asked for.
    ///
    /// # Errors
    /// Not sent, refused, or silence.
    pub fn tell(&self, request: Request, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let memory = matches!(
            request,
            Request::SET_MEM_TABLE | Request::ADD_MEM_REG | Request::REM_MEM_REG | Request::NET_SET_MTU
        );
        let wanted = match self.acknowledge {
            Acknowledge::Never => false,
            Acknowledge::Memory => memory,
            Acknowledge::Always => true,
        };
        if !wanted || self.protocol & protocol::REPLY_ACK == 0 {
            return self
                .send(request, flag::VERSION, body, fds)
                .map_err(|reason| Error::Request(request, reason));
        }
        self.acknowledged(request, body, fds).map_err(|reason| Error::Request(request, reason))
    }

    /// A request with an answer of its own.
    ///
    /// # Errors
    /// Not sent, silence, or an answer to something else.
    pub fn ask(&self, request: Request, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message, Error> {
        let always = self.acknowledge == Acknowledge::Always && self.protocol & protocol::REPLY_ACK != 0;
        let flags = flag::VERSION | if always { flag::NEED_REPLY } else { 0 };
        let answer = self.send(request, flags, body, fds).and_then(|()| self.answer(request));
        answer.map_err(|reason| Error::Request(request, reason))
    }

    fn send(&self, request: Request, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Reason> {
        let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.channel.send(Header { request, flags, size }, body, fds, Deadline::within(self.patience))
    }

    fn acknowledged(&self, request: Request, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Reason> {
        self.send(request, flag::VERSION | flag::NEED_REPLY, body, fds)?;
        match number(&self.answer(request)?)? {
            0 => Ok(()),
            value => Err(Reason::Refused(value)),
        }
    }

    fn answer(&self, request: Request) -> Result<Message, Reason> {
        let message = self.channel.receive(Deadline::within(self.patience))?;
        let flags = flag::VERSION | flag::REPLY;
        let right = message.header.request == request
            && message.header.flags & (flag::VERSION_MASK | flag::REPLY) == flags;
        if right { Ok(message) } else { Err(unexpected(&message)) }
    }

    fn ask_number(&self, request: Request) -> Result<u64, Error> {
        let message = self.ask(request, &[], &[])?;
        number(&message).map_err(|reason| Error::Request(request, reason))
    }

    fn tell_number(&self, request: Request, value: u64) -> Result<(), Error> {
        self.tell(request, &value.to_ne_bytes(), &[])
    }
}

/// The requests. Each fails as [`Session::tell`] and [`Session::ask`] say.
#[expect(clippy::missing_errors_doc, reason = "all alike, said above")]
impl Session {
    /// `SET_OWNER`.
    pub fn set_owner(&self) -> Result<(), Error> {
        self.tell(Request::SET_OWNER, &[], &[])
    }

    /// `GET_FEATURES`.
    pub fn features(&self) -> Result<u64, Error> {
        self.ask_number(Request::GET_FEATURES)
    }

    /// `SET_FEATURES`.
    pub fn set_features(&self, features: u64) -> Result<(), Error> {
        self.tell_number(Request::SET_FEATURES, features)
    }

    /// `GET_PROTOCOL_FEATURES`.
    pub fn protocol_features(&self) -> Result<u64, Error> {
        self.ask_number(Request::GET_PROTOCOL_FEATURES)
    }

    /// `SET_PROTOCOL_FEATURES`, remembered: acknowledgements are asked for after this.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<(), Error> {
        self.tell_number(Request::SET_PROTOCOL_FEATURES, features)?;
        self.protocol = features;
        Ok(())
    }

    /// `GET_QUEUE_NUM`.
    pub fn queue_count(&self) -> Result<u64, Error> {
        self.ask_number(Request::GET_QUEUE_NUM)
    }

    /// `GET_MAX_MEM_SLOTS`.
    pub fn memory_slots(&self) -> Result<u64, Error> {
        self.ask_number(Request::GET_MAX_MEM_SLOTS)
    }

    /// `SET_MEM_TABLE` with all regions.
    pub fn set_memory_table(&self, memory: &Memory) -> Result<(), Error> {
        let regions = memory.regions();
        let mut body = (regions.len() as u64).to_ne_bytes().to_vec();
        for region in regions {
            body.extend_from_slice(&region_bytes(region));
        }
        let files: Vec<_> = regions.iter().map(|region| memory.file(region)).collect();
        self.tell(Request::SET_MEM_TABLE, &body, &files)
    }

    /// `ADD_MEM_REG`.
    pub fn add_region(&self, memory: &Memory, region: &Region) -> Result<(), Error> {
        self.tell(Request::ADD_MEM_REG, &slot_bytes(region), &[memory.file(region)])
    }

    /// `REM_MEM_REG`.
    pub fn remove_region(&self, region: &Region) -> Result<(), Error> {
        self.tell(Request::REM_MEM_REG, &slot_bytes(region), &[])
    }

    /// `SET_VRING_NUM`.
    pub fn set_ring_size(&self, ring: u32, size: u32) -> Result<(), Error> {
        self.tell(Request::SET_VRING_NUM, &pair(ring, size), &[])
    }

    /// `SET_VRING_BASE`.
    pub fn set_ring_base(&self, ring: u32, base: u16) -> Result<(), Error> {
        self.tell(Request::SET_VRING_BASE, &pair(ring, base.into()), &[])
    }

    /// `GET_VRING_BASE`, which stops the ring.
    pub fn ring_base(&self, ring: u32) -> Result<u16, Error> {
        let request = Request::GET_VRING_BASE;
        let message = self.ask(request, &pair(ring, 0), &[])?;
        let base = match *message.body.as_slice() {
            [_, _, _, _, a, b, c, d] => u16::try_from(u32::from_ne_bytes([a, b, c, d])).ok(),
            _ => None,
        };
        base.ok_or_else(|| Error::Request(request, unexpected(&message)))
    }

    /// `SET_VRING_ADDR`.
    pub fn set_ring_addresses(&self, ring: u32, at: RingAddresses) -> Result<(), Error> {
        let mut body = pair(ring, at.flags).to_vec();
        for address in [at.descriptors, at.used, at.available, at.log] {
            body.extend_from_slice(&address.to_ne_bytes());
        }
        self.tell(Request::SET_VRING_ADDR, &body, &[])
    }

    /// `SET_VRING_KICK`, CALL or ERR, with or without a descriptor.
    pub fn set_ring_event(&self, what: Request, ring: u32, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let none = if fd.is_some() { 0 } else { NO_DESCRIPTOR };
        self.tell(what, &(u64::from(ring) | none).to_ne_bytes(), fd.as_slice())
    }

    /// `SET_VRING_ENABLE`.
    pub fn enable_ring(&self, ring: u32, enable: bool) -> Result<(), Error> {
        self.tell(Request::SET_VRING_ENABLE, &pair(ring, enable.into()), &[])
    }

    /// `NET_SET_MTU`.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), Error> {
        self.tell_number(Request::NET_SET_MTU, mtu.into())
    }

    /// `SEND_RARP` for a MAC address.
    pub fn send_rarp(&self, mac: [u8; 6]) -> Result<(), Error> {
        let mut body = [0; 8];
        body[..6].copy_from_slice(&mac);
        self.tell(Request::SEND_RARP, &body, &[])
    }

    /// `RESET_DEVICE`.
    pub fn reset_device(&self) -> Result<(), Error> {
        self.tell(Request::RESET_DEVICE, &[], &[])
    }

    /// `SET_LOG_BASE`: `size` bytes of `file` from `offset` are the dirty log. The backend always answers.
    pub fn set_log(&self, size: u64, offset: u64, file: BorrowedFd<'_>) -> Result<(), Error> {
        let body = [size.to_ne_bytes(), offset.to_ne_bytes()].concat();
        self.ask(Request::SET_LOG_BASE, &body, &[file]).map(|_| ())
    }

    /// `GET_CONFIG`: `size` bytes of the device's configuration space from `offset`.
    pub fn config(&self, offset: u32, size: u32) -> Result<Vec<u8>, Error> {
        let room = usize::try_from(size).unwrap_or(0);
        let mut body = vec![0; CONFIG_PREFIX + room];
        body[..4].copy_from_slice(&offset.to_ne_bytes());
        body[4..8].copy_from_slice(&size.to_ne_bytes());
        let mut message = self.ask(Request::GET_CONFIG, &body, &[])?;
        if message.body.len() != body.len() {
            return Err(Error::Request(Request::GET_CONFIG, unexpected(&message)));
        }
        Ok(message.body.split_off(CONFIG_PREFIX))
    }
}

fn unexpected(message: &Message) -> Reason {
    let Header { request, flags, .. } = message.header;
    Reason::Unexpected { request, flags, size: message.body.len() }
}

fn number(message: &Message) -> Result<u64, Reason> {
    let bytes = message.body.as_slice().try_into().map_err(|_| unexpected(message))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// A ring's state: index and number.
#[must_use]
pub fn pair(ring: u32, value: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&ring.to_ne_bytes());
    body[4..].copy_from_slice(&value.to_ne_bytes());
    body
}

/// A region in `SET_MEM_TABLE`: guest address, size, user address, offset in the file.
#[must_use]
pub fn region_bytes(region: &Region) -> Vec<u8> {
    let words = [region.span.guest, region.span.size, region.user, region.span.offset];
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The body of `ADD_MEM_REG` and `REM_MEM_REG`: 8 bytes of padding, then the region.
fn slot_bytes(region: &Region) -> Vec<u8> {
    [&[0; 8], region_bytes(region).as_slice()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::thread;

    fn session(protocol: u64) -> (Session, Channel) {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        let mut session = Session::new(ours.into());
        session.protocol = protocol;
        session.acknowledge(Acknowledge::Always);
        session.patience(Duration::from_millis(200));
        (session, theirs.into())
    }

    /// Answers one message with a number, as the backend.
    fn answer(backend: &Channel, value: u64) -> Message {
        let by = Deadline::within(PATIENCE);
        let message = backend.receive(by).expect("a request");
        let header = Header { flags: flag::VERSION | flag::REPLY, size: 8, ..message.header };
        backend.send(header, &value.to_ne_bytes(), &[], by).expect("answered");
        message
    }

    #[test]
    fn a_refusal_names_the_request_and_the_value() {
        let (session, backend) = session(protocol::REPLY_ACK);
        let refusing = thread::spawn(move || answer(&backend, 7));
        let error = session.enable_ring(3, true).expect_err("refused");
        assert_eq!(error.to_string(), "SET_VRING_ENABLE: refused with 7");
        let message = refusing.join().expect("backend");
        assert_eq!(message.header.flags, flag::VERSION | flag::NEED_REPLY);
        assert_eq!(message.body, [3, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn a_silent_backend_is_left_at_the_deadline() {
        let (session, _backend) = session(protocol::REPLY_ACK);
        let error = session.set_owner().expect_err("silence");
        assert_eq!(error.to_string(), "SET_OWNER: nothing heard within 200ms");
    }

    #[test]
    fn without_reply_ack_nothing_is_waited_for() {
        let (session, backend) = session(0);
        session.set_features(1).expect("sent");
        let message = backend.receive(Deadline::within(PATIENCE)).expect("received");
        assert_eq!(message.header.flags, flag::VERSION);
    }

    #[test]
    fn an_answer_to_another_request_is_an_error() {
        let (session, backend) = session(0);
        let header = Header { request: Request::GET_QUEUE_NUM, flags: 5, size: 8 };
        backend.send(header, &[0; 8], &[], Deadline::within(PATIENCE)).expect("sent");
        let error = session.features().expect_err("wrong");
        assert_eq!(error.to_string(), "GET_FEATURES: answered by GET_QUEUE_NUM, flags 0x5, 8 bytes");
    }

    #[test]
    fn a_base_is_the_second_half_of_the_state() {
        let (session, backend) = session(0);
        let backend = thread::spawn(move || answer(&backend, 0xfffe_0000_0001));
        assert_eq!(session.ring_base(1).expect("base"), 0xfffe);
        backend.join().expect("backend");
    }
}
