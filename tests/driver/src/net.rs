//! A virtio-net device as its driver sees it: a session, guest memory, queue pairs.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use crate::channel::Channel;
use crate::error::Error;
use crate::memory::{Layout, Memory, MemoryError, PAGE};
use crate::queue::{Options, Queue, event, take};
use crate::receive::{Framing, Posting, Receiver};
use crate::request::{feature, protocol};
use crate::sequence::{Agreed, Notifiers, Sequence, Start, Wishes};
use crate::session::{PATIENCE, Session};
use crate::transmit::{Traffic, Transmitter};
use crate::vnet::{HEADER_SIZE, LEGACY_HEADER_SIZE};

/// What a plain Linux guest acknowledges without offloads.
pub const FEATURES: u64 = feature::VERSION_1
    | feature::PROTOCOL_FEATURES
    | feature::MRG_RXBUF
    | feature::INDIRECT
    | feature::EVENT_IDX;
/// What both QEMU and cloud-hypervisor ask for.
pub const PROTOCOL: u64 = protocol::MQ | protocol::REPLY_ACK;
/// Room for a frame of an MTU of 1500, two tags, its header and a good many gaps.
const TRANSMIT_ROOM: u32 = 2048;
/// What a Linux guest posts for mergeable frames.
const RECEIVE_ROOM: u32 = 1536;

/// How to set a device up. Everything has a default: `Config { queue_size: 512, ..Config::default() }`.
#[derive(Clone, Debug)]
pub struct Config {
    /// Virtio features wanted; of these, what the backend offers is acknowledged.
    pub features: u64,
    /// Protocol features wanted.
    pub protocol: u64,
    /// Queue pairs.
    pub pairs: u16,
    /// Entries of each ring.
    pub queue_size: u16,
    /// Where the indices of all rings begin.
    pub start: u16,
    /// Entries of the indirect tables of each queue.
    pub indirect: u16,
    /// Bytes for header, frame and gaps at each head of a transmit queue.
    pub transmit_room: u32,
    /// What is posted for receiving.
    pub posting: Posting,
    /// What is posted instead when the backend cannot merge buffers; `None` = the same.
    pub unmerged: Option<Posting>,
    /// Whose order of messages.
    pub sequence: Sequence,
    /// Guest memory; `None` = one region that is large enough.
    pub memory: Option<Layout>,
    /// For `NET_SET_MTU`, where QEMU sends it.
    pub mtu: Option<u16>,
    /// Whether the backend gets call descriptors.
    pub calls: bool,
    /// How long the backend may take for a request.
    pub patience: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            features: FEATURES,
            protocol: PROTOCOL,
            pairs: 1,
            queue_size: 256,
            start: 0,
            indirect: 0,
            transmit_room: TRANSMIT_ROOM,
            posting: Posting::single(RECEIVE_ROOM),
            unmerged: None,
            sequence: Sequence::Plain,
            memory: None,
            mtu: None,
            calls: true,
            patience: PATIENCE,
        }
    }
}

impl Config {
    fn wishes(&self) -> Wishes {
        let Self { features, protocol, pairs, mtu, calls, .. } = *self;
        Wishes { features, protocol, pairs, mtu, calls }
    }

    /// Enough guest memory for everything, with a page to spare for each thing and a share for tests.
    fn memory_size(&self) -> u64 {
        let postings = [Some(&self.posting), self.unmerged.as_ref()];
        let lengths = postings.into_iter().flatten().flat_map(|posting| &posting.lengths);
        let posted: u64 = lengths.map(|length| u64::from(*length) + PAGE).sum();
        let table = 16 * u64::from(self.indirect) + PAGE;
        let head = posted + u64::from(self.transmit_room) + 2 * table;
        (u64::from(self.pairs) * (u64::from(self.queue_size) * head + 16 * PAGE) + (1 << 20))
            .next_multiple_of(PAGE)
    }
}

/// One queue pair. Its halves can be lent to two threads.
#[derive(Debug)]
pub struct Pair {
    /// Queue 2n.
    pub receive: Receiver,
    /// Queue 2n + 1.
    pub transmit: Transmitter,
}

/// A device. Dropping it closes the connection without a word, as a killed VMM does.
#[derive(Debug)]
pub struct Device {
    /// The connection, for what is wrong on purpose.
    pub session: Session,
    /// Guest memory: tests may allocate what they need.
    pub memory: Memory,
    /// The queue pairs.
    pub pairs: Vec<Pair>,
    config: Config,
    notifiers: Notifiers,
    agreed: Agreed,
}

impl Device {
    /// Connects to a backend that listens, and sets the device up. Nothing is posted yet.
    ///
    /// # Errors
    /// No connection, the first request that fails, no memory.
    pub fn connect(path: &Path, config: Config) -> Result<Self, Error> {
        Self::over(Channel::connect(path)?, config)
    }

    /// Waits for a backend that connects, and sets the device up.
    ///
    /// # Errors
    /// As `connect`.
    pub fn accept(listener: &UnixListener, config: Config) -> Result<Self, Error> {
        Self::over(Channel::accept(listener, config.patience)?, config)
    }

    /// Sets the device up over a connection that is there.
    ///
    /// # Errors
    /// As `connect`.
    pub fn over(channel: Channel, config: Config) -> Result<Self, Error> {
        let mut session = Session::new(channel);
        session.patience(config.patience);
        let notifiers =
            Notifiers { masked: event().map_err(Error::Event)?, error: event().map_err(Error::Event)? };
        let agreed = config.sequence.greet(&mut session, config.wishes(), &notifiers, None)?;
        let layout = config.memory.clone().unwrap_or_else(|| Layout::single(config.memory_size()));
        let mut memory = Memory::new(&layout)?;
        let make = |_| pair(&mut memory, &config, agreed);
        let pairs = (0..config.pairs).map(make).collect::<Result<_, _>>()?;
        let mut device = Self { session, memory, pairs, config, notifiers, agreed };
        device.start(|queue| queue.ring().available_idx())?;
        Ok(device)
    }

    /// What was offered and acknowledged.
    #[must_use]
    pub fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// How it was set up.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The first queue pair.
    #[must_use]
    pub fn first(&mut self) -> &mut Pair {
        &mut self.pairs[0]
    }

    /// Frames sent and received over all pairs since the device was made, and their bytes.
    #[must_use]
    pub fn totals(&self) -> (Traffic, Traffic) {
        let mut totals = (Traffic::default(), Traffic::default());
        for pair in &self.pairs {
            totals.0 += pair.transmit.sent();
            totals.1 += pair.receive.received();
        }
        totals
    }

    /// Stops all rings, as when the guest shuts its driver down. Returns the bases that the backend tells.
    ///
    /// # Errors
    /// The first request that fails.
    pub fn stop(&mut self) -> Result<Vec<u16>, Error> {
        self.config.sequence.stop(&self.session, self.agreed, self.rings())
    }

    /// As a guest that reboots: rings stopped, zeroed, and set up again at `start`; what was in flight is
    /// forgotten, nothing is posted. Counters go on. Returns the bases that the backend told.
    ///
    /// # Errors
    /// The first request that fails.
    pub fn reset(&mut self, start: u16) -> Result<Vec<u16>, Error> {
        let bases = self.stop()?;
        self.config.sequence.between(&self.session, self.agreed, self.config.pairs)?;
        for pair in &mut self.pairs {
            pair.receive.reset(start);
            pair.transmit.reset(start);
        }
        self.start(|queue| queue.ring().available_idx())?;
        Ok(bases)
    }

    /// Connects again, as after the backend's end: the guest notices nothing, memory and rings stay as they
    /// are.
    ///
    /// # Errors
    /// As `connect`; a backend that offers less than was acknowledged.
    pub fn reconnect(&mut self, path: &Path) -> Result<(), Error> {
        self.reconnect_over(Channel::connect(path)?)
    }

    /// The same over a connection that is there.
    ///
    /// # Errors
    /// As `reconnect`.
    pub fn reconnect_over(&mut self, channel: Channel) -> Result<(), Error> {
        let sequence = self.config.sequence;
        self.session = Session::new(channel);
        self.session.patience(self.config.patience);
        let (wishes, known) = (self.config.wishes(), Some(self.agreed));
        let again = sequence.greet(&mut self.session, wishes, &self.notifiers, known)?;
        if self.agreed.features & !again.features != 0 {
            return Err(Error::Config("the backend now offers less than the guest acknowledged"));
        }
        let agreed = self.agreed;
        self.start(|queue| sequence.base_again(queue, agreed))
    }

    /// Says what the front end says at its end, and closes the connection.
    ///
    /// # Errors
    /// The first request that fails.
    pub fn shut_down(self) -> Result<(), Error> {
        self.config.sequence.shut_down(&self.session, self.rings())
    }

    /// How often the backend signalled an error on a ring since the last time; only QEMU asks for that.
    ///
    /// # Errors
    /// When the eventfd cannot be read.
    pub fn ring_errors(&self) -> io::Result<u64> {
        take(self.notifiers.error.as_fd())
    }

    fn rings(&self) -> u32 {
        2 * u32::from(self.config.pairs)
    }

    fn start(&mut self, base: impl Fn(&Queue) -> u16) -> Result<(), Error> {
        let queues = self.pairs.iter().flat_map(|pair| [&pair.receive.queue, &pair.transmit.queue]);
        let start = Start {
            session: &self.session,
            agreed: self.agreed,
            memory: &self.memory,
            rings: queues.map(|queue| (queue, base(queue))).collect(),
            wishes: self.config.wishes(),
        };
        self.config.sequence.start(&start)?;
        // A ring starts with its first kick, and what was added before must be looked at: QEMU hands out
        // eventfds that are already signalled.
        for pair in &mut self.pairs {
            pair.receive.queue.kick().map_err(Error::Event)?;
            pair.transmit.queue.kick().map_err(Error::Event)?;
        }
        self.pass_calls_on().map_err(Error::Event)
    }

    /// Waits until the backend is through with all that it was told, by one more question, and passes on the
    /// calls that went to QEMU's own notifier until the backend had the driver's. A start does not wait for
    /// that, as QEMU doesn't: right after one, a call can still go where nobody looks, and
    /// [`Queue::wait`] then rightly reports it as lost.
    ///
    /// # Errors
    /// No answer, or an eventfd that cannot be read or written.
    pub fn settle(&self) -> Result<(), Error> {
        self.session.features()?;
        self.pass_calls_on().map_err(Error::Event)
    }

    /// As QEMU does when it unmasks an interrupt.
    fn pass_calls_on(&self) -> io::Result<()> {
        if take(self.notifiers.masked.as_fd())? > 0 {
            for pair in &self.pairs {
                pair.receive.queue.pass_call_on()?;
                pair.transmit.queue.pass_call_on()?;
            }
        }
        Ok(())
    }
}

fn pair(memory: &mut Memory, config: &Config, agreed: Agreed) -> Result<Pair, MemoryError> {
    let has = |bit| agreed.features & bit != 0;
    let options = Options {
        event_idx: has(feature::EVENT_IDX),
        in_order: has(feature::IN_ORDER),
        indirect: if has(feature::INDIRECT) { config.indirect } else { 0 },
        start: config.start,
    };
    let mergeable = has(feature::MRG_RXBUF);
    let header_size = if mergeable || has(feature::VERSION_1) { HEADER_SIZE } else { LEGACY_HEADER_SIZE };
    let queue = Queue::new(memory, config.queue_size, options)?;
    let framing = Framing { header_size, mergeable };
    let posting = config.unmerged.as_ref().filter(|_| !mergeable).unwrap_or(&config.posting);
    let receive = Receiver::new(memory, queue, posting.clone(), framing)?;
    let queue = Queue::new(memory, config.queue_size, options)?;
    let transmit = Transmitter::new(memory, queue, config.transmit_room, header_size)?;
    Ok(Pair { receive, transmit })
}
