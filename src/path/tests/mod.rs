//! The path on rings in plain memory, with a datagram socket for a tap: each write and read is one frame.

use std::os::{fd::OwnedFd, unix::net::UnixDatagram};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{
    Port, Turn, WaitsFor,
    batch::FRAMES,
    forward::Tap,
    inspect::{Coalesce, Link},
    receive::Receive,
    ring::{Memory, QueueFault},
    transmit::Transmit,
};
use crate::{
    features,
    label::Label,
    ledger::{Account, DropReason, Known, Ledger, Part, Totals},
    policy::{Policy, SuspectAction},
    wire::vnet::{HEADER_LEN, NegotiatedOffloads},
};

mod coalesce;
mod receive;
mod recovery;
mod transmit;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const SIZE: u16 = 128;
const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where the guest keeps its buffers; the second memory region begins at `SEAM`.
const BUFFERS: u64 = 0x1_0000;
const SEAM: u64 = 0x10_0000;

/// The connection's number.
const SESSION: u64 = 1;

/// A guest with one queue, and a tap.
struct Rig {
    memory: Memory,
    queue: Queue,
    tap: Tap,
    far_end: UnixDatagram,
    ledger: Ledger,
    transmit: Transmit,
    receive: Receive,
    policy: Policy,
    acked: u64,
    avail: u16,
    mtu: u16,
    coalesce: Coalesce,
    looks_again: bool,
    /// The ring's first batch is still to come.
    fresh: bool,
}

fn rig() -> Rig {
    let ranges = [(GuestAddress(0), 0x10_0000), (GuestAddress(SEAM), 0x10_0000)];
    let memory = Memory::from_ranges(&ranges).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    let (near, far_end) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far_end.set_nonblocking(true).unwrap();
    let (ledger, _) = Ledger::create(1).unwrap();
    let account = |part| Account::succeed(&ledger, part, SESSION);
    Rig {
        transmit: Transmit::new(account(Part::transmit(0))),
        receive: Receive::new(account(Part::receive(0))),
        policy: Policy {
            generation: 1,
            label: Label::new(7).unwrap(),
            tagged: false,
            suspect_action: SuspectAction::Count,
        },
        acked: features::VERSION_1 | features::MRG_RXBUF,
        tap: Tap::new(OwnedFd::from(near)),
        mtu: 1500,
        coalesce: Coalesce::TcpAndUdp,
        looks_again: false,
        avail: 0,
        fresh: true,
        memory,
        queue,
        far_end,
        ledger,
    }
}

/// A frame that every parser takes for a non-IP one, with bytes that tell their place.
fn frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|n| (n % 251).to_le_bytes()[0]).collect();
    let head = [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..], &[0x88, 0xb5]].concat();
    for (byte, value) in frame.iter_mut().zip(head) {
        *byte = value;
    }
    frame
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_LEN][..], frame].concat()
}

impl Rig {
    fn descriptor(&self, table: u64, index: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let bytes =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.memory.write_slice(&bytes.concat(), GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    fn make_available(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u64::from(self.avail % SIZE);
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.write_obj(self.avail.to_le(), GuestAddress(AVAIL + 2)).unwrap();
    }

    /// A transmit chain of one buffer, in descriptor and place `n`.
    fn offer(&mut self, n: u16, bytes: &[u8]) {
        let address = BUFFERS + u64::from(n) * 0x2000;
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        self.descriptor(TABLE, n, (address, u32::try_from(bytes.len()).unwrap(), 0, 0));
        self.make_available(n);
    }

    /// A receive chain of one buffer.
    fn post(&mut self, n: u16, len: u32) {
        self.descriptor(TABLE, n, (BUFFERS + u64::from(n) * 0x2000, len, WRITE, 0));
        self.make_available(n);
    }

    fn link(&self) -> Link {
        let modern = self.acked & features::VERSION_1 != 0;
        Link {
            mtu: self.mtu,
            negotiated: NegotiatedOffloads::from_features(self.acked),
            header_len: if modern { HEADER_LEN } else { 10 },
            coalesce: self.coalesce,
        }
    }

    fn transmit(&mut self) -> Turn {
        let took_over = self.fresh && self.transmit.settle(&mut self.queue, &self.memory, SESSION).unwrap();
        self.fresh = false;
        let port =
            Port { policy: &self.policy, link: self.link(), tap: &self.tap, looks_again: self.looks_again };
        let turn = self.transmit.turn(&mut self.queue, &self.memory, &port);
        Turn { signal: turn.signal || took_over, ..turn }
    }

    fn receive(&mut self) -> Turn {
        let took_over = self.fresh && self.receive.settle(&mut self.queue, &self.memory, SESSION).unwrap();
        self.fresh = false;
        let port =
            Port { policy: &self.policy, link: self.link(), tap: &self.tap, looks_again: self.looks_again };
        let mergeable = self.acked & features::MRG_RXBUF != 0;
        let turn = self.receive.turn(&mut self.queue, &self.memory, &port, mergeable);
        Turn { signal: turn.signal || took_over, ..turn }
    }

    fn totals(&self, part: Part) -> Totals {
        let mut known = Known::new(part);
        known.refresh(&self.ledger);
        assert!(known.totals().balances(), "{:?}", known.totals());
        *known.totals()
    }
    fn sent(&self) -> Totals {
        self.totals(Part::transmit(0))
    }
    fn got(&self) -> Totals {
        self.totals(Part::receive(0))
    }

    fn used_index(&self) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(USED + 2)).unwrap())
    }
    fn used(&self, place: u16) -> (u32, u32) {
        let element: u64 = self.memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(place))).unwrap();
        let element = u64::from_le(element);
        (u32::try_from(element & 0xffff_ffff).unwrap(), u32::try_from(element >> 32).unwrap())
    }
    fn at_far_end(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let n = self.far_end.recv(&mut bytes).ok()?;
        bytes.truncate(n);
        Some(bytes)
    }
    fn guest_bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

fn dropped(totals: &Totals, reason: DropReason) -> u64 {
    totals.dropped[reason.index()]
}
