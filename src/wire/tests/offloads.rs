//! What a virtio-net header may ask for.

use super::frames::{IPV4, IPV6, TCP, UDP, ethernet, ipv4, ipv6, tcp, udp};
use super::with;
use crate::wire::net::protocol;
use crate::wire::vnet::{
    BadOffload, Checked, Flags, GsoType, HEADER_LEN, MIN_GSO_SIZE, NegotiatedOffloads, OffloadFault,
    VnetHeader, check_receive, check_transmit,
};
use crate::wire::{Headers, Transport};
use proptest::prelude::*;

/// Everything that a driver can acknowledge.
pub(super) const ALL: NegotiatedOffloads = NegotiatedOffloads::from_features(u64::MAX);

const CSUM: u32 = 0;
const GUEST_CSUM: u32 = 1;
const GUEST_TSO4: u32 = 7;
const GUEST_TSO6: u32 = 8;
const GUEST_ECN: u32 = 9;
const HOST_TSO4: u32 = 11;
const HOST_TSO6: u32 = 12;
const HOST_ECN: u32 = 13;
const GUEST_USO4: u32 = 54;
const GUEST_USO6: u32 = 55;
const HOST_USO: u32 = 56;

/// A header that asks for nothing.
pub(super) fn requested() -> VnetHeader {
    VnetHeader::default()
}

/// A header that asks for a checksum.
fn csum(start: u16, offset: u16) -> VnetHeader {
    VnetHeader { flags: Flags::NEEDS_CSUM, csum_start: start, csum_offset: offset, ..requested() }
}

/// A header that asks for a checksum and for packets.
pub(super) fn gso(gso_type: GsoType, start: u16, offset: u16, gso_size: u16) -> VnetHeader {
    VnetHeader { gso_type, gso_size, ..csum(start, offset) }
}

fn without(features: &[u32]) -> NegotiatedOffloads {
    NegotiatedOffloads::from_features(features.iter().fold(u64::MAX, |all, bit| all & !(1 << bit)))
}

fn transmit(header: VnetHeader, frame: &[u8]) -> Result<Checked, OffloadFault> {
    check_transmit(header, &Headers::parse(frame, frame.len()), frame.len(), ALL)
}

fn receive(
    header: VnetHeader,
    frame: &[u8],
    negotiated: NegotiatedOffloads,
) -> Result<VnetHeader, OffloadFault> {
    let checked = check_receive(header, &Headers::parse(frame, frame.len()), frame.len(), negotiated);
    checked.map(|checked| checked.header())
}

fn bad(bad: BadOffload) -> Result<Checked, OffloadFault> {
    Err(OffloadFault::BadOffload(bad))
}

fn tcp4() -> Vec<u8> {
    ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[], &[0x5a; 3000])))
}

fn tcp6() -> Vec<u8> {
    ethernet(&[], IPV6, &ipv6(TCP, &tcp(&[], &[0x5a; 3000])))
}

fn udp4() -> Vec<u8> {
    ethernet(&[], IPV4, &ipv4(UDP, &udp(&[0x5a; 3000])))
}

fn udp6() -> Vec<u8> {
    ethernet(&[[0x81, 0, 0, 5]], IPV6, &ipv6(UDP, &udp(&[0x5a; 3000])))
}

#[test]
fn a_header_is_twelve_bytes_of_little_endian() {
    let bytes = [1, 0x81, 0x42, 0, 0xa8, 5, 0x22, 0, 16, 0, 2, 1];
    let header = VnetHeader::decode(bytes);
    let expected = VnetHeader {
        flags: Flags::NEEDS_CSUM,
        gso_type: GsoType::TCPV4.with_ecn(),
        hdr_len: 66,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 258,
    };
    assert_eq!((header, header.encode()), (expected, bytes));
    assert_eq!((header.gso_type.has_ecn(), header.gso_type.without_ecn()), (true, GsoType::TCPV4));
    assert_eq!(requested().encode(), [0; HEADER_LEN]);
}

#[test]
fn only_what_was_judged_is_in_the_rebuilt_header() {
    let everything = VnetHeader::decode([0xfe, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    for frame in [tcp4(), udp6(), ethernet(&[], 0x1234, &[0; 50])] {
        let checked = transmit(everything, &frame).unwrap();
        assert_eq!(
            checked.header(),
            requested(),
            "flags that a guest may not set, numbers that mean nothing"
        );
    }
    let header = VnetHeader { num_buffers: 7, hdr_len: 9, gso_size: 99, ..csum(34, 16) };
    assert_eq!(transmit(header, &tcp4()).unwrap().header(), csum(34, 16));
    let all_flags = VnetHeader::decode([0xff, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
    assert_eq!(transmit(all_flags, &tcp4()).unwrap().header(), csum(34, 16));
    let header = VnetHeader { num_buffers: 7, hdr_len: 9, ..gso(GsoType::TCPV4, 34, 16, 1448) };
    let rebuilt = VnetHeader { hdr_len: 54, ..gso(GsoType::TCPV4, 34, 16, 1448) };
    assert_eq!(transmit(header, &tcp4()).unwrap().header(), rebuilt);
}

#[test]
fn a_checksum_has_one_place() {
    let places = [(tcp4(), 34, 16), (tcp6(), 54, 16), (udp4(), 34, 6), (udp6(), 58, 6)];
    for (frame, start, offset) in &places {
        assert_eq!(transmit(csum(*start, *offset), frame).unwrap().header(), csum(*start, *offset));
        for wrong in (0..200).chain([u16::MAX, u16::MAX - 6, u16::MAX - 16]) {
            let started = transmit(csum(wrong, *offset), frame);
            assert_eq!(started.is_ok(), wrong == *start);
            let stored = transmit(csum(*start, wrong), frame);
            assert_eq!(stored.is_ok(), wrong == *offset);
        }
        assert_eq!(transmit(csum(start - 14, offset + 14), frame), bad(BadOffload::ChecksumStart));
        assert_eq!(transmit(csum(*start, 2), frame), bad(BadOffload::ChecksumOffset));
    }
}

#[test]
fn a_checksum_needs_a_header_that_was_parsed() {
    let icmp = ethernet(&[], IPV4, &ipv4(protocol::ICMP, &[8; 64]));
    let sctp = ethernet(&[], IPV4, &ipv4(132, &[8; 64]));
    let wrong_version = with(&tcp4(), 14, &[0x65]);
    let no_data_offset = with(&tcp4(), 46, &[0x10]);
    let three_tags = ethernet(&[[0x81, 0, 0, 5]; 3], IPV4, &ipv4(TCP, &tcp(&[], b"")));
    for frame in [icmp, sctp, wrong_version, no_data_offset, three_tags] {
        assert_eq!(transmit(csum(34, 16), &frame), bad(BadOffload::ChecksumOfUnparsed));
    }
    for flags in [[0x20, 0], [0x20, 1], [0, 1]] {
        let fragment = with(&udp4(), 20, &flags);
        assert_eq!(transmit(csum(34, 6), &fragment), bad(BadOffload::ChecksumOfFragment));
    }
}

#[test]
fn segmentation_must_fit_its_frame() {
    use BadOffload::{
        ChecksumOfFragment, EcnWithoutTcp, GsoProtocol, GsoSize, GsoWithPadding, GsoWithoutChecksum,
        GsoWithoutPayload,
    };
    let no_payload = ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[1; 8], b"")));
    let padded = [tcp4(), vec![0]].concat();
    let snap = [&[0xaa, 0xaa, 3, 0, 0, 0, 8, 0][..], &ipv4(UDP, &udp(&[0; 1000]))].concat();
    let snap = ethernet(&[], u16::try_from(snap.len()).unwrap(), &snap);
    assert!(transmit(csum(42, 6), &snap).is_ok());
    let unsummed = VnetHeader { flags: Flags::default(), ..gso(GsoType::TCPV4, 34, 16, 1000) };
    let ecn_alone = VnetHeader { gso_type: GsoType::NONE.with_ecn(), ..csum(34, 16) };
    let cases = [
        (gso(GsoType::TCPV4, 34, 16, 1000), tcp4(), None),
        (gso(GsoType::TCPV4.with_ecn(), 34, 16, 1000), tcp4(), None),
        (gso(GsoType::TCPV6, 54, 16, 1000), tcp6(), None),
        (gso(GsoType::TCPV6.with_ecn(), 54, 16, 1000), tcp6(), None),
        (gso(GsoType::UDP_L4, 34, 6, 1000), udp4(), None),
        (gso(GsoType::UDP_L4, 58, 6, 1000), udp6(), None),
        (gso(GsoType::TCPV4, 34, 16, MIN_GSO_SIZE), tcp4(), None),
        (gso(GsoType::TCPV4, 34, 16, u16::MAX), tcp4(), None),
        (unsummed, tcp4(), Some(GsoWithoutChecksum)),
        (gso(GsoType::TCPV6, 34, 16, 1000), tcp4(), Some(GsoProtocol)),
        (gso(GsoType::UDP_L4, 34, 16, 1000), tcp4(), Some(GsoProtocol)),
        (gso(GsoType::TCPV4, 54, 16, 1000), tcp6(), Some(GsoProtocol)),
        (gso(GsoType::TCPV4, 34, 6, 1000), udp4(), Some(GsoProtocol)),
        (gso(GsoType::TCPV6, 58, 6, 1000), udp6(), Some(GsoProtocol)),
        (gso(GsoType::UDP_L4, 42, 6, 100), snap, Some(GsoProtocol)),
        (gso(GsoType::TCPV4, 34, 16, 0), tcp4(), Some(GsoSize)),
        (gso(GsoType::TCPV4, 34, 16, 1), tcp4(), Some(GsoSize)),
        (gso(GsoType::UDP_L4, 34, 6, MIN_GSO_SIZE - 1), udp4(), Some(GsoSize)),
        (gso(GsoType::TCPV4, 34, 16, 1000), no_payload, Some(GsoWithoutPayload)),
        (gso(GsoType::TCPV4, 34, 16, 1000), padded, Some(GsoWithPadding)),
        (gso(GsoType::TCPV4, 34, 16, 1000), with(&tcp4(), 20, &[0x20, 0]), Some(ChecksumOfFragment)),
        (gso(GsoType::UDP_L4.with_ecn(), 34, 6, 1000), udp4(), Some(EcnWithoutTcp)),
        (ecn_alone, tcp4(), Some(EcnWithoutTcp)),
    ];
    for (header, frame, expected) in cases {
        let checked = transmit(header, &frame);
        assert_eq!(checked.err(), expected.map(OffloadFault::BadOffload), "{header:?}");
    }
}

#[test]
fn each_offload_needs_the_feature_that_the_driver_acknowledged() {
    let data_valid = VnetHeader::decode([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let sent = [
        (csum(34, 16), tcp4(), CSUM),
        (gso(GsoType::TCPV4, 34, 16, 1000), tcp4(), HOST_TSO4),
        (gso(GsoType::TCPV6, 54, 16, 1000), tcp6(), HOST_TSO6),
        (gso(GsoType::UDP_L4, 34, 6, 1000), udp4(), HOST_USO),
        (gso(GsoType::UDP_L4, 58, 6, 1000), udp6(), HOST_USO),
        (gso(GsoType::TCPV4.with_ecn(), 34, 16, 1000), tcp4(), HOST_ECN),
        (gso(GsoType::TCPV6.with_ecn(), 54, 16, 1000), tcp6(), HOST_ECN),
    ];
    for (header, frame, feature) in sent {
        let headers = Headers::parse(&frame, frame.len());
        let check = |negotiated| check_transmit(header, &headers, frame.len(), negotiated);
        assert!(check(ALL).is_ok());
        assert_eq!(check(without(&[feature])), Err(OffloadFault::NotNegotiated), "feature {feature}");
        let others = [GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_USO4, GUEST_USO6];
        assert!(check(without(&others)).is_ok(), "what the guest takes is another matter");
    }
    let got = [
        (csum(34, 16), tcp4(), GUEST_CSUM),
        (gso(GsoType::TCPV4, 34, 16, 1000), tcp4(), GUEST_TSO4),
        (gso(GsoType::TCPV6, 54, 16, 1000), tcp6(), GUEST_TSO6),
        (gso(GsoType::UDP_L4, 34, 6, 1000), udp4(), GUEST_USO4),
        (gso(GsoType::UDP_L4, 58, 6, 1000), udp6(), GUEST_USO6),
        (gso(GsoType::TCPV4.with_ecn(), 34, 16, 1000), tcp4(), GUEST_ECN),
    ];
    for (header, frame, feature) in got {
        assert!(receive(header, &frame, ALL).is_ok());
        let refused = receive(header, &frame, without(&[feature]));
        assert_eq!(refused, Err(OffloadFault::NotNegotiated), "feature {feature}");
        let others = [CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_USO];
        assert!(receive(header, &frame, without(&others)).is_ok(), "what the guest sends is another matter");
    }
    assert_eq!(receive(data_valid, &tcp4(), ALL), Ok(data_valid));
    assert_eq!(receive(data_valid, &tcp4(), without(&[GUEST_CSUM])), Ok(requested()), "cleared, not dropped");
}

#[test]
fn what_is_never_offered_is_never_negotiated() {
    let kinds = (0..=u8::MAX).filter(|kind| ![0, 1, 4, 5].contains(&(kind & 0x7f)));
    for kind in kinds {
        let header = VnetHeader::decode([1, kind, 0, 0, 0xe8, 3, 34, 0, 6, 0, 0, 0]);
        assert_eq!(transmit(header, &udp4()), Err(OffloadFault::NotNegotiated), "type {kind}");
        assert_eq!(receive(header, &udp4(), ALL), Err(OffloadFault::NotNegotiated), "type {kind}");
    }
}

#[test]
fn a_received_checksum_lies_in_the_frame() {
    let frame = udp4();
    let len = u16::try_from(frame.len()).unwrap();
    assert_eq!(receive(csum(34, 6), &frame, ALL), Ok(csum(34, 6)));
    assert_eq!(receive(csum(80, 16), &frame, ALL), Ok(csum(80, 16)), "within a tunnel, for one");
    assert!(receive(csum(len - 2, 0), &frame, ALL).is_ok());
    let outside = Err(OffloadFault::BadOffload(BadOffload::ChecksumOutside));
    for (start, offset) in [(len - 1, 0), (len - 2, 1), (34, len), (u16::MAX, u16::MAX)] {
        assert_eq!(receive(csum(start, offset), &frame, ALL), outside);
    }
    let surplus = VnetHeader::decode([0xff, 0, 9, 9, 9, 9, 34, 0, 6, 0, 9, 9]);
    let rebuilt = VnetHeader::decode([3, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0]);
    assert_eq!(receive(surplus, &frame, ALL), Ok(rebuilt));
}

/// A header that is likely to be accepted, with some of its bytes changed.
fn headers() -> impl Strategy<Value = VnetHeader> {
    let likely = (0u8..4, 0u8..6, 0u16..3000, prop_oneof![Just(34u16), Just(54), Just(58)], any::<bool>());
    let changes = prop::collection::vec((0..HEADER_LEN, any::<u8>()), 0..3);
    (likely, changes).prop_map(|((flags, gso_type, size, start, is_udp), changes)| {
        let header = VnetHeader {
            gso_size: size,
            csum_start: start,
            csum_offset: if is_udp { 6 } else { 16 },
            ..requested()
        };
        let mut bytes = header.encode();
        (bytes[0], bytes[1]) = (flags, gso_type);
        for (at, value) in changes {
            bytes[at] = value;
        }
        VnetHeader::decode(bytes)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// What the whole module is for.
    #[test]
    fn a_checked_header_has_the_kernel_write_to_the_checksum_field_and_nowhere_else(
        header in headers(),
        which in 0usize..4,
        changes in prop::collection::vec((0usize..80, any::<u8>()), 0..3),
    ) {
        let mut frame = [tcp4, tcp6, udp4, udp6][which]();
        for (at, value) in changes {
            frame[at] = value;
        }
        let headers = Headers::parse(&frame, frame.len());
        let Ok(checked) = check_transmit(header, &headers, frame.len(), ALL) else { return Ok(()) };
        let rebuilt = checked.header();
        let [flags, ..] = rebuilt.encode();
        if flags == 0 {
            prop_assert_eq!(rebuilt, requested());
            return Ok(());
        }
        prop_assert_eq!(flags, 1);
        let field = match headers.transport() {
            Transport::Tcp(_) => 16,
            Transport::Udp(_) => 6,
            other => return Err(TestCaseError::fail(format!("a checksum of {other:?}"))),
        };
        let written = usize::from(rebuilt.csum_start) + usize::from(rebuilt.csum_offset);
        prop_assert_eq!(written, headers.l4_offset().unwrap() + field);
        prop_assert!(written + 2 <= headers.payload_offset().unwrap());
        prop_assert_eq!(rebuilt.num_buffers, 0);
        let again = check_transmit(rebuilt, &headers, frame.len(), ALL);
        prop_assert_eq!(again, Ok(checked), "what was rebuilt is judged alike");
    }

    #[test]
    fn any_header_before_any_frame_gives_an_answer(
        bytes in any::<[u8; HEADER_LEN]>(),
        frame in prop::collection::vec(any::<u8>(), 0..100),
        len in 0usize..70_000,
        features in any::<u64>(),
    ) {
        let headers = Headers::parse(&frame, len);
        let negotiated = NegotiatedOffloads::from_features(features);
        for checked in [
            check_transmit(VnetHeader::decode(bytes), &headers, len, negotiated),
            check_receive(VnetHeader::decode(bytes), &headers, len, negotiated),
        ].into_iter().flatten() {
            prop_assert!(checked.size().packets >= 1);
            prop_assert!(checked.size().wire_bytes >= checked.size().bytes);
            prop_assert!(checked.size().wire_bytes <= (len as u64).pow(2).max(len as u64));
            let _ = checked.fits_mtu(&headers, len, 1500);
        }
    }
}
