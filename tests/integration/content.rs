//! Every byte arrives as it was sent, whatever the frame's size and however it lies in guest memory.

use vmflow_driver::{
    net::{Config, FEATURES},
    receive::Posting,
    request::feature,
    transmit::Layout,
    vnet::VnetHeader,
};

use crate::{
    harness::{PATIENCE, count},
    rig::{Rig, frame},
};

/// The shortest Ethernet frame without a checksum, and the longest that a tap takes.
const SHORTEST: usize = 14;
const LONGEST: usize = 65_535;
/// The largest MTU: the longest frame without its Ethernet header.
const MTU: &str = "mtu = 65521";
/// Room for the longest frame, its header and the gaps between its buffers.
const ROOM: u32 = 66_000;

/// How frames are cut: all in one, the header apart, in pieces that end within and at headers, some empty.
const LAYOUTS: [Layout<'static>; 6] = [
    Layout::Single,
    Layout::HeaderApart,
    Layout::Scattered(&[1, 10, 3, 0, 13, 100]),
    Layout::Scattered(&[12, 14, 20, 1000, 1, 4096]),
    Layout::Indirect(&Layout::HeaderApart),
    Layout::Indirect(&Layout::Scattered(&[12, 1, 255, 1, 256, 3000])),
];

/// Every size with the full counts; else the small ones and a sample.
fn sizes() -> Vec<usize> {
    let sample = (SHORTEST..=300).chain((301..=2000).step_by(97)).chain((2001..LONGEST).step_by(4099));
    let edges = [1514, 4095, 4096, 4097, 65_534, LONGEST];
    count(sample.chain(edges).collect(), (SHORTEST..=LONGEST).collect())
}

/// Both ways, one frame at a time, each size in one of the layouts, all of which take turns.
fn arrive(config: Config) {
    let rig = Rig::one(MTU);
    let config = Config { queue_size: 64, indirect: 16, transmit_room: ROOM, ..config };
    let mut device = rig.connect(0, config);
    let pair = device.first();
    for (number, size) in (0..).zip(sizes()) {
        let bytes = frame(size, number);
        let layout = LAYOUTS[usize::try_from(number).unwrap() % LAYOUTS.len()];
        pair.transmit.send(&bytes, &VnetHeader::default(), layout).unwrap();
        pair.transmit.drain(PATIENCE).unwrap();
        assert!(rig.wire().receive().bytes == bytes, "{size} bytes from the guest in {layout:?}");
        rig.wire().send(&bytes);
        let received = pair.receive.receive_within(PATIENCE).unwrap();
        assert!(received.bytes == bytes, "{size} bytes to the guest");
        assert_eq!((received.strays, received.header.flags, received.header.gso_type), (0, 0, 0));
        pair.receive.refill().unwrap();
    }
    let (transmit, receive) = rig.check(0, &device, 0);
    assert_eq!(transmit.dropped_packets + receive.dropped_packets, 0);
}

#[test]
fn every_size_arrives_both_ways_with_merged_buffers() {
    arrive(Config { posting: Posting::single(1536), ..Config::default() });
}

#[test]
fn every_size_arrives_both_ways_in_indirect_tables() {
    let posting = Posting::chain(&[12, 100, 1424]).indirect();
    arrive(Config { posting, ..Config::default() });
}

#[test]
fn every_size_arrives_in_one_big_chain_without_merging() {
    let posting = Posting::chain(&[12, 20_000, 20_000, 1, 26_000]);
    // A chain takes five descriptors, of which 64 make twelve chains.
    arrive(Config { features: FEATURES & !feature::MRG_RXBUF, posting, ..Config::default() });
}

#[test]
fn every_size_arrives_behind_the_header_of_an_old_driver() {
    let features = feature::PROTOCOL_FEATURES | feature::INDIRECT | feature::EVENT_IDX;
    arrive(Config { features, posting: Posting::single(ROOM), ..Config::default() });
}

#[test]
fn every_size_arrives_in_rings_spread_over_many_regions() {
    let memory = vmflow_driver::memory::Layout::scattered(32 << 20, 4);
    arrive(Config { memory: Some(memory), posting: Posting::single(ROOM), ..Config::default() });
}
