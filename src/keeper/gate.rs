//! The gate: looks at each message of the front end, before anything else sees it.
//!
//! The `vhost` crates are right about the protocol and hard on whoever deviates from it: a message that they
//! do not expect ends the connection, and some that they accept end the process. Real front ends deviate
//! (QEMU enables rings before it sets features, and adds one memory region per queue pair), and a hostile one
//! does what it likes. So each message is checked here, mended where front ends are known to need it,
//! answered here if no worker is needed for it, and only then passed on.

use std::os::fd::OwnedFd;

use super::{
    brief::Brief,
    files::{self, Descriptors},
    memory::{Region, Regions},
    message::{Message, NEED_REPLY, request, u32_at, u64_at},
    session::Session,
};
use crate::features;

/// Largest queue size (virtio 1.2, 2.7: at most 32768).
const QUEUE_SIZE_MAX: u32 = 32_768;
/// `u64` messages with a descriptor: the ring's index, and a flag that there is none.
const RING_MASK: u64 = 0xff;
const NO_DESCRIPTOR: u64 = 1 << 8;
/// `struct virtio_net_config` as far as we fill it in, and the most that may be asked for, in bytes.
const CONFIG_MAX: u32 = 256;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;

/// What is to be done about a message.
#[derive(Debug)]
pub enum Step {
    /// The message has an answer of its own, and this is it.
    Answer(Vec<u8>),
    /// Nothing more needs to happen; true if the message was in order.
    Acknowledge(bool),
    /// The worker is to be asked; its answer is the answer.
    Ask(Request),
    /// As [`Step::Ask`], for each of these in turn; the front end gets an acknowledgement.
    AskAll(Vec<Request>),
}

/// A message for the worker.
#[derive(Debug)]
pub struct Request {
    /// See [`super::message::request`].
    pub code: u32,
    /// The payload.
    pub body: Vec<u8>,
    /// Descriptors that go with it.
    pub files: Vec<OwnedFd>,
}

/// The front end did something that the protocol forbids: the connection is closed, with this line.
#[derive(Debug, thiserror::Error)]
#[error("request {request}: {why}")]
pub struct Forbidden {
    /// The request code.
    pub request: u32,
    /// What is wrong with it.
    pub why: String,
}

/// What the gate knows of a connection.
#[derive(Debug)]
pub struct Gate {
    brief: Brief,
    descriptors: Descriptors,
    reply_ack: bool,
    session: Session,
}

impl Gate {
    /// Nothing was said yet.
    #[must_use]
    pub fn new(brief: Brief, descriptors: Descriptors) -> Self {
        let session = Session::new(2 * usize::from(brief.queue_pairs));
        Self { brief, descriptors, reply_ack: false, session }
    }

    /// What the worker has acknowledged so far.
    #[must_use]
    pub const fn session(&self) -> &Session {
        &self.session
    }

    /// The worker has acknowledged this.
    pub fn remember(&mut self, asked: Request) {
        self.session.remember(asked);
    }

    /// True if the front end is to get an acknowledgement for this message.
    #[must_use]
    pub const fn wants_acknowledgement(&self, message: &Message) -> bool {
        self.reply_ack && message.flags & NEED_REPLY != 0
    }

    /// Rings that run, to be stopped in the end.
    pub fn started(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(0..self.session.rings()).filter(|(_, ring)| self.session.is_started(*ring)).map(|(n, _)| n)
    }

    /// Looks at one message.
    ///
    /// # Errors
    /// [`Forbidden`]: the connection is to be closed.
    pub fn look(&mut self, mut message: Message) -> Result<Step, Forbidden> {
        let code = message.request;
        let files = std::mem::take(&mut message.files);
        self.decide(&message, files).map_err(|why| Forbidden { request: code, why })
    }

    fn decide(&mut self, message: &Message, files: Vec<OwnedFd>) -> Result<Step, String> {
        let body = &message.body[..];
        match message.request {
            request::GET_FEATURES => Ok(number(self.brief.features())),
            request::SET_FEATURES => self.set_features(u64_of(body)?),
            request::GET_PROTOCOL_FEATURES => Ok(number(features::protocol::OFFERED)),
            request::SET_PROTOCOL_FEATURES => self.set_protocol_features(u64_of(body)?),
            request::GET_QUEUE_NUM => Ok(number(self.session.rings() as u64)),
            request::GET_MAX_MEM_SLOTS => Ok(number(Regions::MAX as u64)),
            request::RESET_OWNER | request::RESET_DEVICE => Ok(self.reset()),
            request::SET_MEM_TABLE => Self::set_memory(body, files),
            request::ADD_MEM_REG => self.add_region(body, files),
            request::REM_MEM_REG => self.remove_region(body),
            request::SET_VRING_NUM
            | request::SET_VRING_ADDR
            | request::SET_VRING_BASE
            | request::GET_VRING_BASE
            | request::SET_VRING_ENABLE => self.ring_state(message.request, body),
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
                self.ring_file(message.request, body, files)
            }
            request::NET_SET_MTU => Ok(Step::Acknowledge(u64_of(body)? <= u64::from(self.brief.mtu))),
            // The keeper opened the worker's session itself, and there is one front end. There is nothing to
            // announce: a VM cannot be migrated yet, and its tap stays where it is.
            request::SET_OWNER | request::SEND_RARP => Ok(Step::Acknowledge(true)),
            request::GET_CONFIG => self.config(body),
            // The device's configuration is the operator's.
            request::SET_CONFIG => Ok(Step::Acknowledge(false)),
            unknown => {
                tracing::debug!(
                    request = unknown,
                    "the front end asked for something that was never offered"
                );
                Ok(Step::Acknowledge(false))
            }
        }
    }

    fn set_features(&self, acked: u64) -> Result<Step, String> {
        let offered = self.brief.features();
        if acked & !offered != 0 {
            return Err(format!("features {:#x} were never offered", acked & !offered));
        }
        // The worker's session always has the protocol features, whatever the front end knows of.
        let features = acked | features::PROTOCOL_FEATURES;
        let mut requests = vec![ask(request::SET_FEATURES, features.to_ne_bytes().to_vec())];
        if acked & features::PROTOCOL_FEATURES == 0 {
            // Without them rings are enabled from the start ("Ring states").
            let rings = u32::try_from(self.session.rings()).unwrap_or_default();
            requests.extend((0..rings).map(|ring| ask(request::SET_VRING_ENABLE, state(ring, 1))));
        }
        Ok(Step::AskAll(requests))
    }

    fn set_protocol_features(&mut self, acked: u64) -> Result<Step, String> {
        if acked & !features::protocol::OFFERED != 0 {
            return Err(format!(
                "protocol features {:#x} were never offered",
                acked & !features::protocol::OFFERED
            ));
        }
        self.reply_ack = acked & features::protocol::REPLY_ACK != 0;
        Ok(Step::Acknowledge(true))
    }

    /// All rings stop and are disabled; the session goes on.
    fn reset(&self) -> Step {
        let mut requests = Vec::new();
        for (index, ring) in (0..).zip(0..self.session.rings()) {
            if self.session.is_started(ring) {
                requests.push(ask(request::GET_VRING_BASE, state(index, 0)));
            }
            requests.push(ask(request::SET_VRING_ENABLE, state(index, 0)));
        }
        Step::AskAll(requests)
    }

    fn set_memory(body: &[u8], files: Vec<OwnedFd>) -> Result<Step, String> {
        let (body, files) = Regions::from_table(body, files)?.into_table();
        Ok(Step::Ask(Request { code: request::SET_MEM_TABLE, body, files }))
    }

    fn add_region(&self, body: &[u8], files: Vec<OwnedFd>) -> Result<Step, String> {
        let region = Region::from_single(body)?;
        if self.session.regions().contains(&region) {
            // QEMU 7.2 adds each region once per queue pair.
            return Ok(Step::Acknowledge(true));
        }
        let file = files.into_iter().next().ok_or("a region without a file")?;
        self.session.regions().admits(&region, &file)?;
        Ok(Step::Ask(Request { code: request::ADD_MEM_REG, body: region.to_single(), files: vec![file] }))
    }

    fn remove_region(&self, body: &[u8]) -> Result<Step, String> {
        let region = Region::from_single(body)?;
        if !self.session.regions().has(&region) {
            // Added once and removed once per queue pair, again.
            return Ok(Step::Acknowledge(true));
        }
        Ok(Step::Ask(ask(request::REM_MEM_REG, region.to_single())))
    }

    fn ring_state(&self, code: u32, body: &[u8]) -> Result<Step, String> {
        let expected = if code == request::SET_VRING_ADDR { 40 } else { 8 };
        if body.len() != expected {
            return Err(format!("{} bytes instead of {expected}", body.len()));
        }
        let (index, value) = (u32_at(body, 0), u32_at(body, 4));
        let reachable = code != request::SET_VRING_ADDR || self.session.regions().hold_ring(body);
        let ring = self.ring(index.into())?;
        match code {
            request::SET_VRING_NUM if self.session.is_started(ring) => {
                return Err("a running ring cannot change its size".into());
            }
            request::SET_VRING_NUM if value > QUEUE_SIZE_MAX || !value.is_power_of_two() => {
                return Err(format!(
                    "{value} is no queue size: it must be a power of two up to {QUEUE_SIZE_MAX}"
                ));
            }
            request::SET_VRING_ADDR if !reachable => {
                return Err("ring addresses outside the shared memory, or not aligned".into());
            }
            request::SET_VRING_ENABLE if value > 1 => return Err(format!("{value} is neither 0 nor 1")),
            _ => {}
        }
        Ok(Step::Ask(ask(code, body.to_vec())))
    }

    fn ring_file(&self, code: u32, body: &[u8], files: Vec<OwnedFd>) -> Result<Step, String> {
        let value = u64_of(body)?;
        if value & !(RING_MASK | NO_DESCRIPTOR) != 0 {
            return Err(format!("{value:#x} is no ring"));
        }
        self.ring(value & RING_MASK)?;
        let file = files.into_iter().next();
        if (value & NO_DESCRIPTOR == 0) != file.is_some() {
            return Err("the flag for a missing descriptor does not match what came".into());
        }
        match &file {
            Some(file) if !self.descriptors.is_eventfd(file) => {
                return Err("the descriptor is no eventfd".into());
            }
            // An eventfd that blocks would let the front end stop the data path.
            Some(file) => files::set_nonblocking(file).map_err(|e| format!("the eventfd: {e}"))?,
            None if code == request::SET_VRING_KICK => {
                return Err("polling without a kick was never offered".into());
            }
            None => {}
        }
        Ok(Step::Ask(Request { code, body: body.to_vec(), files: file.into_iter().collect() }))
    }

    /// `struct virtio_net_config` (virtio 1.2, 5.1.4): mac, status, `max_virtqueue_pairs`, mtu.
    fn config(&self, body: &[u8]) -> Result<Step, String> {
        let (offset, size) = (u32_at(body, 0), u32_at(body, 4));
        let end = offset.checked_add(size).filter(|end| *end <= CONFIG_MAX);
        let (Some(end), true) = (end, body.len() >= 12) else {
            return Err(format!("{size} bytes of configuration at {offset}"));
        };
        let mut config = Vec::new();
        config.extend(self.brief.mac.unwrap_or_default());
        for word in [LINK_UP, self.brief.queue_pairs, self.brief.mtu] {
            config.extend(word.to_le_bytes());
        }
        config.resize(CONFIG_MAX as usize, 0);
        let mut answer = body[..12].to_vec();
        answer.extend(&config[offset as usize..end as usize]);
        Ok(Step::Answer(answer))
    }

    fn ring(&self, index: u64) -> Result<usize, String> {
        let count = self.session.rings();
        let ring = usize::try_from(index).ok().filter(|ring| *ring < count);
        ring.ok_or_else(|| format!("ring {index} of {count}"))
    }
}

fn ask(code: u32, body: Vec<u8>) -> Request {
    Request { code, body, files: Vec::new() }
}

/// `struct vhost_vring_state`: a ring's index and a number.
#[must_use]
pub fn state(ring: u32, value: u32) -> Vec<u8> {
    [ring.to_ne_bytes(), value.to_ne_bytes()].concat()
}

fn number(value: u64) -> Step {
    Step::Answer(value.to_ne_bytes().to_vec())
}

fn u64_of(body: &[u8]) -> Result<u64, String> {
    if body.len() == 8 { Ok(u64_at(body, 0)) } else { Err(format!("{} bytes instead of 8", body.len())) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::{
        event::{EventfdFlags, eventfd},
        fs::{MemfdFlags, ftruncate, memfd_create},
    };

    use super::*;
    use crate::features::protocol;

    const USER: u64 = 1 << 40;
    const SIZE: u64 = 0x10_0000;

    fn gate() -> Gate {
        Gate::new(Brief::example(), Descriptors::open().unwrap())
    }

    fn say(gate: &mut Gate, request: u32, body: Vec<u8>, files: Vec<OwnedFd>) -> Result<Step, Forbidden> {
        gate.look(Message { request, flags: 1, body, files })
    }

    /// The same, acknowledged by a worker.
    fn done(gate: &mut Gate, request: u32, body: Vec<u8>, files: Vec<OwnedFd>) -> bool {
        match say(gate, request, body, files) {
            Ok(Step::Ask(asked)) => gate.remember(asked),
            other => panic!("{other:?}"),
        }
        true
    }

    fn number(gate: &mut Gate, request: u32, value: u64) -> Result<Step, Forbidden> {
        say(gate, request, value.to_ne_bytes().to_vec(), Vec::new())
    }

    fn share_memory(gate: &mut Gate) {
        let file = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, SIZE).unwrap();
        let region = [0, SIZE, USER, 0].map(u64::to_ne_bytes).concat();
        let body = [&1_u32.to_ne_bytes()[..], &[0; 4], &region].concat();
        assert!(done(gate, request::SET_MEM_TABLE, body, vec![file]));
    }

    fn addresses(gate: &mut Gate, areas: [u64; 3]) -> Result<Step, Forbidden> {
        let areas = areas.map(|at| (USER + at).to_ne_bytes()).concat();
        say(gate, request::SET_VRING_ADDR, [&[0; 8], &areas[..], &[0; 8]].concat(), Vec::new())
    }

    #[test]
    fn features_that_were_never_offered_are_forbidden_and_bit_30_always_reaches_the_worker() {
        let mut gate = gate();
        assert!(number(&mut gate, request::SET_FEATURES, 1 << 34).is_err());
        assert!(number(&mut gate, request::SET_PROTOCOL_FEATURES, protocol::OFFERED | 1 << 1).is_err());
        let step = number(&mut gate, request::SET_FEATURES, features::VERSION_1).unwrap();
        let Step::AskAll(requests) = step else { panic!("{step:?}") };
        assert_eq!(u64_at(&requests[0].body, 0), features::VERSION_1 | features::PROTOCOL_FEATURES);
        let enabled = requests.iter().filter(|r| r.code == request::SET_VRING_ENABLE).count();
        assert_eq!(enabled, 2, "without protocol features rings are enabled from the start");
    }

    #[test]
    fn rings_may_be_enabled_before_features_are_set() {
        let mut gate = gate();
        let body = state(0, 1);
        assert!(matches!(say(&mut gate, request::SET_VRING_ENABLE, body, Vec::new()), Ok(Step::Ask(_))));
        assert!(say(&mut gate, request::SET_VRING_ENABLE, state(2, 1), Vec::new()).is_err(), "no such ring");
        assert!(say(&mut gate, request::SET_VRING_ENABLE, state(0, 2), Vec::new()).is_err());
    }

    #[test]
    fn ring_addresses_lie_in_shared_memory_and_are_aligned() {
        let mut gate = gate();
        assert!(addresses(&mut gate, [0x1000, 0x3000, 0x2000]).is_err(), "before memory");
        share_memory(&mut gate);
        assert!(addresses(&mut gate, [0x1000, 0x3000, 0x2000]).is_ok());
        for wrong in
            [[0x1008, 0x3000, 0x2000], [0x1000, 0x3002, 0x2000], [0x1000, 0x3000, 0x2001], [SIZE, 0, 0]]
        {
            assert!(addresses(&mut gate, wrong).is_err(), "{wrong:x?}");
        }
    }

    #[test]
    fn only_eventfds_are_kicks_and_calls_and_a_running_ring_keeps_its_size() {
        let mut gate = gate();
        let event = || eventfd(0, EventfdFlags::empty()).unwrap();
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        let ring = 0_u64.to_ne_bytes().to_vec();
        assert!(say(&mut gate, request::SET_VRING_CALL, ring.clone(), vec![pipe]).is_err());
        assert!(number(&mut gate, request::SET_VRING_KICK, NO_DESCRIPTOR).is_err(), "polling");
        assert!(number(&mut gate, request::SET_VRING_CALL, 0).is_err(), "the flag and the files disagree");
        assert!(number(&mut gate, request::SET_VRING_CALL, NO_DESCRIPTOR).is_ok());
        for (size, fine) in [(256, true), (0, false), (3, false), (65_536, false), (32_768, true)] {
            let step = say(&mut gate, request::SET_VRING_NUM, state(0, size), Vec::new());
            assert_eq!(step.is_ok(), fine, "{size}");
        }
        assert!(done(&mut gate, request::SET_VRING_KICK, ring, vec![event()]));
        assert_eq!(gate.started().collect::<Vec<_>>(), [0]);
        assert!(say(&mut gate, request::SET_VRING_NUM, state(0, 256), Vec::new()).is_err());
        assert!(done(&mut gate, request::GET_VRING_BASE, state(0, 0), Vec::new()));
        assert_eq!(gate.started().count(), 0);
    }

    #[test]
    fn the_configuration_space_is_virtio_nets() {
        let mut gate = gate();
        let ask = |offset: u32, size: u32| [offset, size, 0].map(u32::to_ne_bytes).concat();
        let body = [ask(0, 12), vec![0; 12]].concat();
        let step = say(&mut gate, request::GET_CONFIG, body, Vec::new()).unwrap();
        let Step::Answer(answer) = step else { panic!("{step:?}") };
        assert_eq!(answer[12..], [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0xdc, 0x05]);
        assert!(say(&mut gate, request::GET_CONFIG, ask(250, 12), Vec::new()).is_err());
        assert!(say(&mut gate, request::GET_CONFIG, ask(u32::MAX, 2), Vec::new()).is_err());
    }

    #[test]
    fn what_nobody_offered_is_answered_with_no() {
        let mut gate = gate();
        for unknown in [6, 7, 21, 31, 99] {
            assert!(matches!(number(&mut gate, unknown, 0), Ok(Step::Acknowledge(false))), "{unknown}");
        }
        assert!(matches!(number(&mut gate, request::NET_SET_MTU, 1500), Ok(Step::Acknowledge(true))));
        assert!(matches!(number(&mut gate, request::NET_SET_MTU, 9000), Ok(Step::Acknowledge(false))));
    }
}
