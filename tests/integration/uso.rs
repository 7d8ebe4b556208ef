//! UDP whose datagrams are still to be cut (USO), both ways.

use std::net::UdpSocket;

use vmflow::ledger::DropReason;
use vmflow_driver::{
    frame::{ETHERNET, Ends, IPV4, IPV6, UDP, pattern, sum},
    net::{Config, Device, FEATURES},
    receive::Received,
    request::feature,
    transmit::Layout,
    vnet::{VnetHeader, flag, gso},
};

use crate::{
    far::Far,
    harness::{Netns, PATIENCE, dropped, unique},
    rig::{Rig, passes},
    wire::cut_into,
};

/// All that UDP segmentation needs and brings.
const USO: u64 =
    feature::CSUM | feature::HOST_USO | feature::GUEST_CSUM | feature::GUEST_USO4 | feature::GUEST_USO6;
/// Payload of one datagram.
const DATAGRAM: u16 = 1000;
/// Payload of all of them; the last one is short.
const PAYLOAD: usize = 3500;
/// How many they are.
const DATAGRAMS: u64 = 4;
/// Where UDP's checksum is in its header.
const UDP_SUM: u16 = 6;
/// Room for the large frame.
const ROOM: u32 = 8000;

fn config(features: u64) -> Config {
    Config { features: FEATURES | features, transmit_room: ROOM, ..Config::default() }
}

/// Bytes before the UDP header.
fn before_udp(ends: &Ends) -> usize {
    ETHERNET + if ends.addresses[0].is_ipv4() { IPV4 } else { IPV6 }
}

/// A UDP frame that is to be cut, with the pseudo header's sum, as a kernel leaves it.
fn uncut(ends: &Ends) -> (VnetHeader, Vec<u8>) {
    let mut frame = ends.udp(&pattern(PAYLOAD, 7));
    let l4 = before_udp(ends);
    let length = u16::try_from(frame.len() - l4).unwrap();
    let addresses = if ends.addresses[0].is_ipv4() { l4 - 8..l4 } else { l4 - 32..l4 };
    let pseudo = [&frame[addresses], &[0, 17], &length.to_be_bytes()].concat();
    frame[l4 + 6..l4 + 8].copy_from_slice(&sum(&pseudo).to_be_bytes());
    let header = VnetHeader {
        flags: flag::NEEDS_CSUM,
        gso_type: gso::UDP_L4,
        hdr_len: u16::try_from(l4 + UDP).unwrap(),
        gso_size: DATAGRAM,
        csum_start: u16::try_from(l4).unwrap(),
        csum_offset: UDP_SUM,
        num_buffers: 0,
    };
    (header, frame)
}

/// The datagrams that it is cut into; of IPv4 each has the next ID.
fn datagrams(ends: &Ends) -> Vec<Vec<u8>> {
    let payload = pattern(PAYLOAD, 7);
    let cut = (0..).zip(payload.chunks(DATAGRAM.into())).map(|(id, payload)| {
        let mut frame = ends.udp(payload);
        if ends.addresses[0].is_ipv4() {
            frame[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&u16::to_be_bytes(id));
            frame[ETHERNET + 10..ETHERNET + 12].fill(0);
            let sum = !sum(&frame[ETHERNET..ETHERNET + IPV4]);
            frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum.to_be_bytes());
        }
        frame
    });
    cut.collect()
}

fn transmit(device: &mut Device, (header, frame): &(VnetHeader, Vec<u8>)) {
    let transmit = &mut device.first().transmit;
    transmit.send(frame, header, Layout::HeaderApart).unwrap();
    transmit.drain(PATIENCE).unwrap();
}

fn receive(device: &mut Device) -> Received {
    let received = device.first().receive.receive_within(PATIENCE).unwrap();
    assert_eq!(received.strays, 0);
    received
}

#[test]
fn the_tun_driver_takes_every_set_of_features_that_a_driver_can_acknowledge() {
    let netns = Netns::new();
    let tap = netns.inside(|| vmflow::tap::attach(&unique("t"))).unwrap();
    let features = vmflow::features::USO
        | vmflow::features::GUEST_CSUM
        | vmflow::features::GUEST_TSO4
        | vmflow::features::GUEST_TSO6
        | vmflow::features::GUEST_ECN;
    let mut acked = features;
    loop {
        vmflow::tap::set_offloads(&tap, acked).unwrap_or_else(|e| panic!("{acked:#x}: {e}"));
        if acked == 0 {
            return;
        }
        acked = (acked - 1) & features; // the next smaller subset
    }
}

#[test]
fn uncut_udp_from_the_guest_leaves_the_host_as_its_datagrams_and_is_counted_as_them() {
    let rig = Rig::one("");
    let far = Far::of(&rig, 0);
    let mut device = rig.connect(0, config(USO));
    assert_eq!(device.agreed().offered & vmflow::features::USO, vmflow::features::USO);
    for (count, ends) in (1..).zip([Ends::default(), Ends::v6()]) {
        let (header, frame) = uncut(&ends);
        let before = rig.vmflow.totals("web1").0.passed;
        transmit(&mut device, &(header, frame.clone()));
        // To a packet socket the kernel tells as hdr_len what it has in one piece.
        let at_tap = VnetHeader { hdr_len: header.hdr_len, ..rig.wire().receive().header };
        assert_eq!(at_tap, header);
        for expected in datagrams(&ends) {
            assert!(far.receive() == expected, "{ends:?}");
        }
        let (counts, _) = rig.check(0, &device, 0);
        let bytes = u64::try_from(frame.len()).unwrap();
        let wire = bytes + (DATAGRAMS - 1) * u64::try_from(before_udp(&ends) + UDP).unwrap();
        let passed = counts.passed;
        assert_eq!((passed.frames, passed.packets), (count, count * DATAGRAMS));
        assert_eq!((passed.bytes - before.bytes, passed.wire_bytes - before.wire_bytes), (bytes, wire));
    }
}

#[test]
fn uncut_udp_that_the_driver_did_not_negotiate_is_a_counted_drop() {
    // Without CSUM there is no HOST_USO (virtio 1.3, 5.1.3.1).
    for features in [USO & !feature::HOST_USO, USO & !feature::CSUM] {
        let rig = Rig::one("");
        let mut device = rig.connect(0, config(features));
        for (count, ends) in (1..).zip([Ends::default(), Ends::v6()]) {
            transmit(&mut device, &uncut(&ends));
            let (counts, _) = rig.check(0, &device, 0);
            assert_eq!(dropped(&counts, DropReason::NotNegotiated), count, "{features:#x}: {counts:?}");
        }
        passes(&rig, 0, &mut device);
        rig.check(0, &device, 0);
    }
}

#[test]
fn uncut_udp_that_does_not_fit_its_header_is_a_counted_drop() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(USO | feature::HOST_TSO4));
    let (right, frame) = uncut(&Ends::default());
    let wrong = [
        VnetHeader { gso_type: gso::TCPV4, ..right },
        VnetHeader { gso_type: gso::UDP_L4 | gso::ECN, ..right },
        VnetHeader { csum_offset: 16, ..right },
        VnetHeader { flags: 0, ..right },
        VnetHeader { gso_size: 0, ..right },
    ];
    for (count, header) in (1..).zip(wrong) {
        transmit(&mut device, &(header, frame.clone()));
        let (counts, _) = rig.check(0, &device, 0);
        assert_eq!(dropped(&counts, DropReason::BadOffload), count, "{header:?}: {counts:?}");
    }
}

/// Has the host send the payload with one call, to be cut by whoever must.
fn sent_by_the_host(rig: &Rig) {
    let (guest, tap) = (Ends::default(), &rig.taps[0]);
    let [at_guest, at_host] = guest.addresses.map(|address| address.to_string());
    let mac = guest.macs[1].map(|byte| format!("{byte:02x}")).join(":");
    rig.netns.run("ip", &["address", "add", &format!("{at_host}/24"), "dev", tap]);
    rig.netns.run("ip", &["neighbour", "add", &at_guest, "lladdr", &mac, "dev", tap]);
    rig.netns.inside(|| {
        let socket = UdpSocket::bind((guest.addresses[1], guest.ports[1])).unwrap();
        socket.connect((guest.addresses[0], guest.ports[0])).unwrap();
        cut_into(&socket, DATAGRAM).unwrap();
        assert_eq!(socket.send(&pattern(PAYLOAD, 7)).unwrap(), PAYLOAD);
    });
}

#[test]
fn what_a_host_program_sends_uncut_reaches_a_driver_that_takes_it_as_one_frame() {
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(USO));
    sent_by_the_host(&rig);
    let received = receive(&mut device);
    let (header, frame) = uncut(&Ends::default().reversed());
    assert_eq!(VnetHeader { num_buffers: 0, ..received.header }, header);
    assert!(received.bytes[ETHERNET + IPV4..] == frame[ETHERNET + IPV4..]);
    let (_, counts) = rig.check(0, &device, 0);
    let bytes = u64::try_from(frame.len()).unwrap();
    let wire = bytes + (DATAGRAMS - 1) * u64::try_from(ETHERNET + IPV4 + UDP).unwrap();
    let passed = counts.passed;
    assert_eq!((passed.frames, passed.packets, passed.bytes, passed.wire_bytes), (1, DATAGRAMS, bytes, wire));
}

#[test]
fn what_a_host_program_sends_uncut_reaches_any_other_driver_as_datagrams() {
    // The TUN driver knows both families only together; without GUEST_CSUM there is neither.
    for less in [feature::GUEST_USO4, feature::GUEST_USO6, feature::GUEST_CSUM, USO] {
        let rig = Rig::one("");
        let mut device = rig.connect(0, config(USO & !less));
        sent_by_the_host(&rig);
        let mut payload = Vec::new();
        for _ in 0..DATAGRAMS {
            let received = receive(&mut device);
            assert_eq!(received.header.gso_type, gso::NONE, "without {less:#x}");
            assert!(received.bytes.len() <= ETHERNET + IPV4 + UDP + usize::from(DATAGRAM));
            payload.extend_from_slice(&received.bytes[ETHERNET + IPV4 + UDP..]);
        }
        assert!(payload == pattern(PAYLOAD, 7), "without {less:#x}");
        let (_, counts) = rig.check(0, &device, 0);
        assert_eq!((counts.passed.frames, counts.passed.packets), (DATAGRAMS, DATAGRAMS));
    }
}

#[test]
fn uncut_udp_over_ipv6_for_the_guest_arrives_whole_or_cut_as_its_driver_wants() {
    let ends = Ends::v6().reversed();
    let (header, frame) = uncut(&ends);
    let rig = Rig::one("");
    let mut device = rig.connect(0, config(USO));
    rig.wire().send_with(&header, &frame);
    let received = receive(&mut device);
    assert!(received.bytes == frame);
    assert_eq!(VnetHeader { num_buffers: 0, ..received.header }, header);
    device.shut_down().unwrap();

    let mut device = rig.connect(0, config(0));
    rig.wire().send_with(&header, &frame);
    for expected in datagrams(&ends) {
        let received = receive(&mut device);
        assert_eq!((received.header.flags & flag::NEEDS_CSUM, received.header.gso_type), (0, gso::NONE));
        assert!(received.bytes == expected);
    }
    let (_, counts) = rig.vmflow.totals("web1");
    assert_eq!((counts.passed.frames, counts.passed.packets), (1 + DATAGRAMS, 2 * DATAGRAMS));
}
