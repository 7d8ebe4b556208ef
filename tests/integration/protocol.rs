//! vhost-user as front ends speak it, right, unusual and wrong.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use vmflow_driver::{
    Error, Reason,
    channel::{Deadline, Header},
    memory::{Layout as MemoryLayout, Memory},
    net::{Config, Device, PROTOCOL},
    request::{Request, flag, protocol},
    sequence::Sequence,
    session::{Session, pair},
    transmit::Layout,
    vnet::VnetHeader,
};

use crate::{
    harness::{PATIENCE, count, wait_for},
    rig::{NAMES, Rig, frame, hang_up, number, passes, receive_one},
};

/// How soon a refused front end is told so.
const SOON: Duration = Duration::from_secs(5);
/// Chains that are left in the ring while nobody serves it.
const OUTSTANDING: u64 = 50;
/// Every order of messages, each with what that front end negotiates.
const SEQUENCES: [(Sequence, u64); 4] = [
    (Sequence::Plain, PROTOCOL),
    (Sequence::Qemu, PROTOCOL | protocol::NET_MTU | protocol::CONFIGURE_MEM_SLOTS),
    (Sequence::Qemu7, PROTOCOL | protocol::CONFIGURE_MEM_SLOTS),
    (Sequence::CloudHypervisor, PROTOCOL | protocol::CONFIG),
];

#[test]
fn every_front_ends_order_of_messages_works_and_chains_outlive_a_reconnect() {
    for (sequence, protocol) in SEQUENCES {
        let rig = Rig::one("");
        let config = Config { sequence, protocol, mtu: Some(1500), ..Config::default() };
        let mut device = rig.connect(0, config);
        passes(&rig, 0, &mut device);
        hang_up(&mut device);
        rig.vmflow.wait_connected(NAMES[0], false);
        for number in 0..OUTSTANDING {
            let transmit = &mut device.first().transmit;
            transmit.send(&frame(100, number), &VnetHeader::default(), Layout::HeaderApart).unwrap();
        }
        device.reconnect(&rig.socket(0)).unwrap_or_else(|e| panic!("{sequence:?}: {e}"));
        rig.wait_carrier(0, true);
        device.first().transmit.drain(PATIENCE).unwrap();
        for expected in 0..OUTSTANDING {
            assert_eq!(number(&rig.wire().receive().bytes), expected, "{sequence:?}");
        }
        // More than the ring has buffers: those posted before the reconnect are all used.
        for number in 0..300 {
            rig.wire().send(&frame(100, number));
            assert_eq!(receive_one(&mut device), frame(100, number), "{sequence:?}");
        }
        device.reset(7).unwrap_or_else(|e| panic!("{sequence:?}: {e}"));
        device.first().receive.refill().unwrap();
        passes(&rig, 0, &mut device);
        rig.check(0, &device, 0);
        device.shut_down().unwrap();
    }
}

/// Sets the stopped rings up again, with the memory told as the test wants.
fn again(device: &mut Device, tell_memory: impl Fn(&Session, &Memory)) {
    device.stop().unwrap();
    let features = device.agreed().features;
    device.first().receive.reset(0);
    device.first().transmit.reset(0);
    let session = &device.session;
    session.set_features(features).unwrap();
    tell_memory(session, &device.memory);
    let queues = [&device.pairs[0].receive.queue, &device.pairs[0].transmit.queue];
    for (ring, queue) in (0..).zip(queues) {
        session.set_ring_size(ring, queue.ring().size().into()).unwrap();
        session.set_ring_base(ring, 0).unwrap();
        session.set_ring_addresses(ring, queue.ring().addresses(&device.memory).unwrap()).unwrap();
        session.set_ring_event(Request::SET_VRING_CALL, ring, Some(queue.call_event())).unwrap();
        session.set_ring_event(Request::SET_VRING_KICK, ring, Some(queue.kick_event())).unwrap();
        session.enable_ring(ring, true).unwrap();
    }
    device.first().receive.refill().unwrap();
}

/// The payload of a memory table with one region per entry: guest address, size, user address, offset.
fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let head = u64::try_from(regions.len()).unwrap().to_ne_bytes();
    let words = regions.as_flattened().iter().flat_map(|word| word.to_ne_bytes());
    head.into_iter().chain(words).collect()
}

#[test]
fn a_padded_memory_table_is_cut_to_the_regions_that_it_names() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    again(&mut device, |session, memory| {
        let region = &memory.regions()[0];
        let told = [region.span.guest, region.span.size, region.user, region.span.offset];
        let padded = [table(&[told]), vec![0; 32]].concat();
        session.tell(Request::SET_MEM_TABLE, &padded, &[memory.file(region)]).unwrap();
    });
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn a_region_that_is_added_again_is_taken_as_added() {
    let rig = Rig::one("");
    let memory = Some(MemoryLayout::scattered(8 << 20, 4));
    let protocol = PROTOCOL | protocol::CONFIGURE_MEM_SLOTS;
    let mut device = rig.connect(0, Config { protocol, memory, ..Config::default() });
    passes(&rig, 0, &mut device);
    again(&mut device, |session, memory| {
        for region in memory.regions().iter().chain(memory.regions()) {
            session.add_region(memory, region).unwrap();
        }
    });
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

/// How a VMM changes a region: it removes it and adds it again, while the guest's rings run in it.
#[test]
fn a_region_that_is_exchanged_under_running_rings_costs_no_frame() {
    let rig = Rig::one("");
    let protocol = PROTOCOL | protocol::CONFIGURE_MEM_SLOTS;
    let mut device = rig.connect(0, Config { protocol, ..Config::default() });
    passes(&rig, 0, &mut device);
    device.session.remove_region(&device.memory.regions()[0]).unwrap();
    // Kicked while its rings are nowhere, the device rests.
    device.first().transmit.send(&frame(60, 7), &VnetHeader::default(), Layout::Single).unwrap();
    device.first().transmit.queue.kick().unwrap();
    wait_for("the device to look", || (rig.vmflow.port(NAMES[0]).queue_faults > 0).then_some(()));
    device.session.add_region(&device.memory, &device.memory.regions()[0]).unwrap();
    assert_eq!(number(&rig.wire().receive().bytes), 7);
    device.first().transmit.drain(PATIENCE).unwrap();
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn messages_that_come_byte_by_byte_are_understood() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    let kick = device.pairs[0].transmit.queue.kick_event();
    let messages: [(Request, Vec<u8>, &[BorrowedFd<'_>]); 3] = [
        (Request::GET_FEATURES, Vec::new(), &[]),
        (Request::SET_VRING_ENABLE, pair(1, 1).to_vec(), &[]),
        (Request::SET_VRING_KICK, 1_u64.to_ne_bytes().to_vec(), &[kick]),
    ];
    for (request, body, files) in messages {
        let flags = flag::VERSION | flag::NEED_REPLY;
        let size = u32::try_from(body.len()).unwrap();
        let bytes = [&Header { request, flags, size }.bytes()[..], &body].concat();
        let channel = device.session.channel();
        for (place, byte) in bytes.iter().enumerate() {
            let files = if place == 0 { files } else { &[] };
            channel.write(&[*byte], files, Deadline::within(PATIENCE)).unwrap();
            std::thread::yield_now();
        }
        let answer = channel.receive(Deadline::within(PATIENCE)).unwrap();
        assert_eq!((answer.header.request, answer.body.len()), (request, 8));
    }
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

#[test]
fn a_second_kick_descriptor_on_a_running_ring_loses_no_kick() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    for round in 0..count(200, 20_000) {
        let pair = &mut device.pairs[0];
        pair.transmit.send(&frame(100, round), &VnetHeader::default(), Layout::Single).unwrap();
        for (ring, queue) in [(0, &pair.receive.queue), (1, &pair.transmit.queue)] {
            device.session.set_ring_event(Request::SET_VRING_KICK, ring, Some(queue.kick_event())).unwrap();
        }
        pair.transmit.drain(PATIENCE).unwrap();
        assert_eq!(number(&rig.wire().receive().bytes), round);
        rig.wire().send(&frame(100, round));
        assert_eq!(number(&receive_one(&mut device)), round);
    }
    rig.check(0, &device, 0);
}

#[test]
fn an_unknown_request_is_answered_negatively_and_the_connection_lives() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, Config::default());
    for unknown in [Request(99), Request(u32::MAX), Request::SET_CONFIG, Request::GET_INFLIGHT_FD] {
        let refused = device.session.tell(unknown, &[0; 16], &[]);
        assert!(matches!(refused, Err(Error::Request(_, Reason::Refused(_)))), "{unknown}: {refused:?}");
    }
    passes(&rig, 0, &mut device);
    rig.check(0, &device, 0);
}

/// A front end that does what is forbidden is closed with one line that says why; another VM, and the next
/// front end of this one, notice nothing.
fn forbidden(says: &str, wrong: impl Fn(&mut Device)) {
    let rig = Rig::two();
    let mut other = rig.connect(1, Config::default());
    let mut device = rig.connect(0, Config::default());
    passes(&rig, 0, &mut device);
    wrong(&mut device);
    device.session.channel().wait_closed(Deadline::within(SOON)).unwrap();
    rig.vmflow.wait_connected(NAMES[0], false);
    assert!(rig.vmflow.log().wait(says), "{}", rig.vmflow.log().text());
    assert_eq!(rig.vmflow.log().count("the connection is closed"), 1, "{}", rig.vmflow.log().text());
    passes(&rig, 1, &mut other);
    device.reconnect(&rig.socket(0)).unwrap();
    rig.wait_carrier(0, true);
    passes(&rig, 0, &mut device);
    passes(&rig, 1, &mut other);
    rig.check(0, &device, 0);
    rig.check(1, &other, 0);
    assert_eq!(rig.vmflow.port(NAMES[0]).worker_restarts, 0);
}

fn closes(told: &Result<(), Error>) {
    assert!(matches!(told, Err(Error::Request(_, Reason::Closed))), "{told:?}");
}

#[test]
fn a_region_beyond_its_file_closes_the_connection_and_touches_no_other_vm() {
    forbidden("request 5: a region of", |device| {
        let region = &device.memory.regions()[0];
        let size = region.span.size;
        let told = [0, size + 4096, region.user, 0];
        let file = device.memory.file(region);
        closes(&device.session.tell(Request::SET_MEM_TABLE, &table(&[told]), &[file]));
    });
}

#[test]
fn overlapping_regions_close_the_connection() {
    forbidden("request 5: two regions overlap", |device| {
        let region = &device.memory.regions()[0];
        let told = [[0, 8192, region.user, 0], [4096, 8192, region.user + (1 << 30), 0]];
        let file = device.memory.file(region);
        closes(&device.session.tell(Request::SET_MEM_TABLE, &table(&told), &[file, file]));
    });
}

#[test]
fn features_that_were_never_offered_close_the_connection() {
    let never = 1 << 20;
    forbidden("request 2: features 0x100000 were never offered", move |device| {
        closes(&device.session.set_features(device.agreed().features | never));
    });
}

#[test]
fn protocol_features_that_were_never_offered_close_the_connection() {
    forbidden("request 16: protocol features 0x20 were never offered", |device| {
        closes(&device.session.set_protocol_features(PROTOCOL | protocol::BACKEND_REQ));
    });
}

fn bad_call(file: impl Fn() -> OwnedFd) {
    forbidden("request 13: the descriptor is no eventfd", |device| {
        closes(&device.session.set_ring_event(Request::SET_VRING_CALL, 0, Some(file().as_fd())));
    });
}

#[test]
fn a_pipe_as_call_descriptor_closes_the_connection() {
    bad_call(|| rustix::pipe::pipe().unwrap().1);
}

#[test]
fn a_device_file_as_call_descriptor_closes_the_connection() {
    bad_call(|| File::open("/dev/zero").unwrap().into());
}

#[test]
fn a_header_that_is_none_closes_the_connection() {
    forbidden("is none of vhost-user version 1", |device| {
        let bytes = Header { request: Request::GET_FEATURES, flags: 2, size: 0 }.bytes();
        device.session.channel().write(&bytes, &[], Deadline::within(PATIENCE)).unwrap();
    });
}
