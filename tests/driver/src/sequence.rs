//! In which order front ends say what: traced from real ones, message by message.
//!
//! ```text
//!               Plain                Qemu                          CloudHypervisor
//!  greet        OWNER FEATURES       per pair: GET_FEATURES        OWNER GET_FEATURES
//!               PROTOCOL             PROTOCOL QUEUE_NUM SLOTS      PROTOCOL QUEUE_NUM CONFIG
//!                                    OWNER GET_FEATURES CALL ERR
//!                                    ENABLE (before SET_FEATURES)
//!  start        SET_FEATURES memory  MTU ENABLE SET_FEATURES       SET_FEATURES memory NUM*
//!               per ring: NUM BASE   memory, per ring: NUM BASE    per ring: ADDR BASE CALL KICK
//!               ADDR CALL KICK       ADDR KICK CALL                ENABLE=1 *
//!               ENABLE=1
//!  stop         ENABLE=0 GET_BASE    GET_BASE                      ENABLE=0 GET_BASE
//!  again, base  used                 used                          avail; used with IN_ORDER
//! ```

use std::os::fd::{AsFd, OwnedFd};

use crate::error::Error;
use crate::memory::Memory;
use crate::queue::Queue;
use crate::request::{Request, feature, protocol};
use crate::session::{Acknowledge, Session};

/// Bytes of the configuration space that cloud-hypervisor reads.
const CONFIG_SIZE: u32 = 24;

/// Whose order of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sequence {
    /// As the protocol's text has it, each message acknowledged where the backend can.
    #[default]
    Plain,
    /// QEMU's: rings are enabled before the first `SET_FEATURES`.
    Qemu,
    /// QEMU 7.2's: the same, and each queue pair adds the memory regions once more.
    Qemu7,
    /// cloud-hypervisor's: acknowledged from `GET_QUEUE_NUM` on.
    CloudHypervisor,
}

/// What the front end wants, and what it says only if asked to.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    /// Virtio features.
    pub features: u64,
    /// Protocol features.
    pub protocol: u64,
    /// Queue pairs.
    pub pairs: u16,
    /// For `NET_SET_MTU`, where QEMU sends it.
    pub mtu: Option<u16>,
    /// Whether the driver gives call descriptors.
    pub calls: bool,
}

/// What both sides have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// What the backend offered.
    pub offered: u64,
    /// Of that, what the driver wanted.
    pub features: u64,
    /// Of the protocol features offered, what the driver wanted.
    pub protocol: u64,
}

/// Eventfds of QEMU's own, handed to the backend before the guest has any.
#[derive(Debug)]
pub struct Notifiers {
    /// In the place of call descriptors; what comes here before the guest's own are there is passed on.
    pub masked: OwnedFd,
    /// For `SET_VRING_ERR`.
    pub error: OwnedFd,
}

/// What a start is about: the session, what was agreed, the memory and the rings in the order receive 0,
/// transmit 0, receive 1, ...
#[derive(Debug)]
pub struct Start<'a> {
    /// The connection.
    pub session: &'a Session,
    /// What the greeting brought.
    pub agreed: Agreed,
    /// Guest memory.
    pub memory: &'a Memory,
    /// The rings and their bases.
    pub rings: Vec<(&'a Queue, u16)>,
    /// What the driver wants.
    pub wishes: Wishes,
}

impl Sequence {
    /// Everything before the driver in the guest is there. `again` = a reconnect, with what was agreed.
    ///
    /// # Errors
    /// The first request that fails.
    pub fn greet(
        self,
        session: &mut Session,
        wishes: Wishes,
        notifiers: &Notifiers,
        again: Option<Agreed>,
    ) -> Result<Agreed, Error> {
        match (self, again) {
            (Self::Plain, _) => greet_plain(session, wishes),
            (Self::Qemu | Self::Qemu7, _) => greet_qemu(session, wishes, notifiers),
            (Self::CloudHypervisor, None) => greet_cloud_hypervisor(session, wishes),
            (Self::CloudHypervisor, Some(agreed)) => greet_cloud_hypervisor_again(session, agreed),
        }
    }

    /// The driver is ready.
    ///
    /// # Errors
    /// The first request that fails.
    pub fn start(self, start: &Start<'_>) -> Result<(), Error> {
        match self {
            Self::Plain => start.plain(),
            Self::Qemu | Self::Qemu7 => start.qemu(self == Self::Qemu7),
            Self::CloudHypervisor => start.cloud_hypervisor(),
        }
    }

    /// The guest resets its device. Returns the bases that the backend tells.
    ///
    /// # Errors
    /// The first request that fails.
    pub fn stop(self, session: &Session, agreed: Agreed, rings: u32) -> Result<Vec<u16>, Error> {
        let disable = matches!(self, Self::Plain | Self::CloudHypervisor);
        let stop = |ring| {
            if disable && agreed.has_protocol() {
                session.enable_ring(ring, false)?;
            }
            session.ring_base(ring)
        };
        (0..rings).map(stop).collect()
    }

    /// What happens between a stop and the next start on the same connection.
    ///
    /// # Errors
    /// The first request that fails.
    pub fn between(self, session: &Session, agreed: Agreed, pairs: u16) -> Result<(), Error> {
        if matches!(self, Self::Qemu | Self::Qemu7) && agreed.has_protocol() {
            enable_first_pair(session, pairs)?;
        }
        Ok(())
    }

    /// What cloud-hypervisor says before it closes; the others just close.
    ///
    /// # Errors
    /// The first request that fails.
    pub fn shut_down(self, session: &Session, rings: u32) -> Result<(), Error> {
        if self == Self::CloudHypervisor {
            for ring in (0..rings).chain(0..rings) {
                session.enable_ring(ring, true)?;
            }
        }
        Ok(())
    }

    /// The base for a ring that goes on where it was, on a new connection.
    #[must_use]
    pub fn base_again(self, queue: &Queue, agreed: Agreed) -> u16 {
        let in_order = agreed.features & feature::IN_ORDER != 0;
        if self == Self::CloudHypervisor && !in_order {
            return queue.ring().available_idx();
        }
        queue.ring().used_idx()
    }
}

impl Agreed {
    fn of(offered: u64, wishes: Wishes) -> Self {
        Self { offered, features: offered & wishes.features, protocol: 0 }
    }

    /// Whether there are protocol features, and with them `SET_VRING_ENABLE`.
    #[must_use]
    pub fn has_protocol(self) -> bool {
        self.features & feature::PROTOCOL_FEATURES != 0
    }
}

fn agree_on_protocol(session: &mut Session, wishes: Wishes, agreed: &mut Agreed) -> Result<(), Error> {
    if agreed.has_protocol() {
        agreed.protocol = session.protocol_features()? & wishes.protocol;
        session.set_protocol_features(agreed.protocol)?;
    }
    Ok(())
}

fn greet_plain(session: &mut Session, wishes: Wishes) -> Result<Agreed, Error> {
    session.acknowledge(Acknowledge::Always);
    session.set_owner()?;
    let mut agreed = Agreed::of(session.features()?, wishes);
    agree_on_protocol(session, wishes, &mut agreed)?;
    Ok(agreed)
}

fn greet_qemu(session: &mut Session, wishes: Wishes, notifiers: &Notifiers) -> Result<Agreed, Error> {
    session.acknowledge(Acknowledge::Memory);
    let mut agreed = Agreed::default();
    for pair in 0..u32::from(wishes.pairs) {
        agreed = Agreed::of(session.features()?, wishes);
        agree_on_protocol(session, wishes, &mut agreed)?;
        if pair == 0 {
            if agreed.protocol & protocol::MQ != 0 {
                session.queue_count()?;
            }
            if agreed.protocol & protocol::CONFIGURE_MEM_SLOTS != 0 {
                session.memory_slots()?;
            }
            session.set_owner()?;
        }
        session.features()?;
        for ring in [2 * pair, 2 * pair + 1] {
            session.set_ring_event(Request::SET_VRING_CALL, ring, Some(notifiers.masked.as_fd()))?;
            session.set_ring_event(Request::SET_VRING_ERR, ring, Some(notifiers.error.as_fd()))?;
        }
    }
    if agreed.has_protocol() {
        enable_first_pair(session, wishes.pairs)?;
    }
    Ok(agreed)
}

/// A guest begins with one queue pair; QEMU says so before anything else is agreed on.
fn enable_first_pair(session: &Session, pairs: u16) -> Result<(), Error> {
    (0..2 * u32::from(pairs)).try_for_each(|ring| session.enable_ring(ring, ring < 2))
}

fn greet_cloud_hypervisor(session: &mut Session, wishes: Wishes) -> Result<Agreed, Error> {
    session.set_owner()?;
    let mut agreed = Agreed::of(session.features()?, wishes);
    agree_on_protocol(session, wishes, &mut agreed)?;
    session.acknowledge(Acknowledge::Always);
    if agreed.protocol & protocol::MQ != 0 {
        session.queue_count()?;
    }
    if agreed.protocol & protocol::CONFIG != 0 {
        session.config(0, CONFIG_SIZE)?;
    }
    Ok(agreed)
}

fn greet_cloud_hypervisor_again(session: &mut Session, agreed: Agreed) -> Result<Agreed, Error> {
    session.set_owner()?;
    session.features()?;
    if agreed.has_protocol() {
        session.set_protocol_features(agreed.protocol)?;
    }
    session.acknowledge(Acknowledge::Always);
    Ok(agreed)
}

impl Start<'_> {
    fn plain(&self) -> Result<(), Error> {
        self.session.set_features(self.agreed.features)?;
        self.tell_memory()?;
        for (ring, queue, base) in self.each() {
            self.session.set_ring_size(ring, queue.ring().size().into())?;
            self.session.set_ring_base(ring, base)?;
            self.tell_addresses(ring, queue)?;
            self.tell_call(ring, queue)?;
            self.tell_kick(ring, queue)?;
        }
        self.enable_all()
    }

    fn qemu(&self, memory_per_pair: bool) -> Result<(), Error> {
        for pair in 0..u32::from(self.wishes.pairs) {
            if pair == 0 && self.agreed.protocol & protocol::NET_MTU != 0 {
                self.wishes.mtu.map_or(Ok(()), |mtu| self.session.set_mtu(mtu))?;
            }
            if self.agreed.has_protocol() {
                self.session.enable_ring(2 * pair, pair == 0)?;
                self.session.enable_ring(2 * pair + 1, pair == 0)?;
            }
            self.session.set_features(self.agreed.features)?;
            let slots = self.agreed.protocol & protocol::CONFIGURE_MEM_SLOTS != 0;
            if pair == 0 || (memory_per_pair && slots) {
                self.tell_memory()?;
            }
            for (ring, queue, base) in self.each().filter(|(ring, ..)| ring / 2 == pair) {
                self.session.set_ring_size(ring, queue.ring().size().into())?;
                self.session.set_ring_base(ring, base)?;
                self.tell_addresses(ring, queue)?;
                self.tell_kick(ring, queue)?;
                self.tell_call(ring, queue)?;
            }
        }
        if self.wishes.pairs > 1 { self.enable_all() } else { Ok(()) }
    }

    fn cloud_hypervisor(&self) -> Result<(), Error> {
        self.session.set_features(self.agreed.features)?;
        self.tell_memory()?;
        for (ring, queue, _) in self.each() {
            self.session.set_ring_size(ring, queue.ring().size().into())?;
        }
        for (ring, queue, base) in self.each() {
            self.tell_addresses(ring, queue)?;
            self.session.set_ring_base(ring, base)?;
            if self.wishes.calls {
                self.tell_call(ring, queue)?;
            }
            self.tell_kick(ring, queue)?;
        }
        self.enable_all()
    }

    /// The rings with their numbers and bases.
    fn each(&self) -> impl Iterator<Item = (u32, &Queue, u16)> {
        (0..).zip(&self.rings).map(|(ring, (queue, base))| (ring, *queue, *base))
    }

    fn tell_memory(&self) -> Result<(), Error> {
        if self.agreed.protocol & protocol::CONFIGURE_MEM_SLOTS == 0 {
            return self.session.set_memory_table(self.memory);
        }
        self.memory.regions().iter().try_for_each(|region| self.session.add_region(self.memory, region))
    }

    fn tell_addresses(&self, ring: u32, queue: &Queue) -> Result<(), Error> {
        let at =
            queue.ring().addresses(self.memory).ok_or(Error::Config("a ring outside of guest memory"))?;
        self.session.set_ring_addresses(ring, at)
    }

    fn tell_kick(&self, ring: u32, queue: &Queue) -> Result<(), Error> {
        self.session.set_ring_event(Request::SET_VRING_KICK, ring, Some(queue.kick_event()))
    }

    fn tell_call(&self, ring: u32, queue: &Queue) -> Result<(), Error> {
        let call = self.wishes.calls.then(|| queue.call_event());
        self.session.set_ring_event(Request::SET_VRING_CALL, ring, call)
    }

    /// Without protocol features a ring is enabled by its kick descriptor.
    fn enable_all(&self) -> Result<(), Error> {
        if !self.agreed.has_protocol() {
            return Ok(());
        }
        self.each().try_for_each(|(ring, ..)| self.session.enable_ring(ring, true))
    }
}
