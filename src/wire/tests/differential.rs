//! Another parser says the same. Where the two differ on purpose, [`Difference`] says why.

use super::frames::{IPV4, IPV6, TCP, UDP, ethernet, ipv4, ipv6, tcp, udp};
use crate::wire::net::{MAX_EXTENSIONS, protocol};
use crate::wire::{Addresses, FlowKey, Fragment, Framing, Headers, PREFIX, Unclassified};
use etherparse::err::packet::SliceError;
use etherparse::{LinkExtSlice, NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

const IGMP: u8 = 2;
const EXTENSIONS: [u8; 5] = [
    protocol::HOP_BY_HOP,
    protocol::ROUTING,
    protocol::FRAGMENT,
    protocol::AUTHENTICATION,
    protocol::DESTINATION_OPTIONS,
];

/// Where the parsers may differ. From `ThirdTag` on this parser refuses to classify what etherparse believes,
/// which is the safe side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Difference {
    /// etherparse doesn't look behind LLC and SNAP.
    Llc,
    /// etherparse takes 0x9100 for a VLAN tag and 0x88e5 for `MACsec`, and looks behind; Linux doesn't.
    OtherTag,
    /// etherparse looks behind an authentication header in IPv4, where `tcp` in a filter doesn't mean that.
    Ipv4Authentication,
    /// etherparse knows IGMP, and either ICMP in both versions of IP, and has lengths for ICMP's timestamps.
    OtherTransport,
    /// etherparse takes a later fragment's data for extension headers, if the first fragment's have some there.
    LaterFragment,
    /// etherparse looks at no fragment's transport, not at the first one's either.
    FirstFragment,
    /// etherparse stops at a third VLAN tag without a word.
    ThirdTag,
    /// etherparse takes an IPv6 payload length of 0 for "the rest of the frame".
    NoPayloadLength,
    /// etherparse bounds neither the number of extension headers nor how deep in the frame they are.
    LongChain,
    /// etherparse follows a fragment within a fragment.
    RepeatedFragment,
    /// etherparse takes a UDP length of 0 for "the rest of the packet".
    NoUdpLength,
    /// etherparse reads ARP of any kind.
    ForeignArp,
}

/// What both parsers should agree on.
#[derive(Debug, PartialEq, Eq)]
struct Agreed {
    ether_type: Option<u16>,
    vlans: Vec<u16>,
    addresses: Addresses,
    protocol: Option<u8>,
    is_fragment: bool,
    /// Of TCP and UDP.
    ports: Option<(u16, u16)>,
    icmp: Option<(u8, u8)>,
    l4_offset: Option<usize>,
}

fn ours(headers: &Headers) -> Agreed {
    let key: &FlowKey = headers.flow_key();
    Agreed {
        ether_type: key.ether_type().map(|ether_type| ether_type.0),
        vlans: key.vlan_ids().into_iter().flatten().collect(),
        addresses: key.addresses(),
        protocol: key.protocol(),
        is_fragment: key.fragment() != Fragment::Whole,
        ports: key.ports(),
        icmp: key.icmp().map(|icmp| (icmp.kind, icmp.code)),
        l4_offset: headers.l4_offset(),
    }
}

/// Where `part` begins in `frame`.
fn offset_of(frame: &[u8], part: &[u8]) -> usize {
    part.as_ptr().addr() - frame.as_ptr().addr()
}

fn theirs(frame: &[u8], sliced: &SlicedPacket<'_>) -> Agreed {
    let payload = sliced.ip_payload();
    let is_fragment = payload.is_some_and(|payload| payload.fragmented);
    let whole = payload.filter(|_| !is_fragment);
    let (ports, icmp) = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => (Some((tcp.source_port(), tcp.destination_port())), None),
        Some(TransportSlice::Udp(udp)) => (Some((udp.source_port(), udp.destination_port())), None),
        Some(TransportSlice::Icmpv4(icmp)) => (None, Some((icmp.type_u8(), icmp.code_u8()))),
        Some(TransportSlice::Icmpv6(icmp)) => (None, Some((icmp.type_u8(), icmp.code_u8()))),
        _ => (None, None),
    };
    Agreed {
        ether_type: sliced.ether_payload().map(|payload| payload.ether_type.0),
        vlans: sliced.vlan_ids().iter().map(|id| id.value()).collect(),
        addresses: their_addresses(sliced),
        protocol: payload.map(|payload| payload.ip_number.0),
        is_fragment,
        ports,
        icmp,
        l4_offset: whole.map(|whole| offset_of(frame, whole.payload)),
    }
}

fn their_addresses(sliced: &SlicedPacket<'_>) -> Addresses {
    let v4 = |bytes: &[u8]| Ipv4Addr::from(*bytes.first_chunk::<4>().unwrap());
    match &sliced.net {
        Some(NetSlice::Ipv4(ip)) => {
            Addresses::V4 { source: ip.header().source_addr(), destination: ip.header().destination_addr() }
        }
        Some(NetSlice::Ipv6(ip)) => Addresses::V6 {
            source: Ipv6Addr::from(ip.header().source()),
            destination: Ipv6Addr::from(ip.header().destination()),
        },
        Some(NetSlice::Arp(arp)) => {
            Addresses::Arp { sender: v4(arp.sender_protocol_addr()), target: v4(arp.target_protocol_addr()) }
        }
        None => Addresses::None,
    }
}

/// May the parsers differ on this frame? Decided by what is in the frame, not by how the answers differ.
fn difference(frame: &[u8], headers: &Headers, sliced: Option<&SlicedPacket<'_>>) -> Option<Difference> {
    let key = headers.flow_key();
    if headers.flow_key().framing() != Framing::EthernetII {
        return Some(Difference::Llc);
    }
    if matches!(key.ether_type().map(|ether_type| ether_type.0), Some(0x9100 | 0x88e5)) {
        return Some(Difference::OtherTag);
    }
    match headers.unclassified() {
        Some(Unclassified::TooManyVlanTags) => return Some(Difference::ThirdTag),
        Some(Unclassified::TooManyExtensions) => return Some(Difference::LongChain),
        Some(Unclassified::RepeatedFragmentHeader) => return Some(Difference::RepeatedFragment),
        Some(Unclassified::ForeignArp) => return Some(Difference::ForeignArp),
        _ => {}
    }
    let start = headers.l3_offset()?;
    if matches!(key.addresses(), Addresses::V4 { .. }) && key.protocol() == Some(protocol::AUTHENTICATION) {
        return Some(Difference::Ipv4Authentication);
    }
    if frame.get(start + 4..start + 6) == Some(&[0, 0]) && key.ether_type().map(|e| e.0) == Some(IPV6) {
        return Some(Difference::NoPayloadLength);
    }
    if is_other_transport(key, sliced) {
        return Some(Difference::OtherTransport);
    }
    match key.fragment() {
        Fragment::First => return Some(Difference::FirstFragment),
        Fragment::Later if key.protocol().is_some_and(|number| EXTENSIONS.contains(&number)) => {
            return Some(Difference::LaterFragment);
        }
        _ => {}
    }
    let udp_length = headers.l4_offset().and_then(|l4| frame.get(l4 + 4..l4 + 6));
    if key.protocol() == Some(UDP) && udp_length == Some(&[0, 0]) {
        return Some(Difference::NoUdpLength);
    }
    let beyond = sliced.and_then(SlicedPacket::ip_payload).is_some_and(|payload| {
        let header = if payload.ip_number.0 == TCP { 20 } else { 8 };
        offset_of(frame, payload.payload) + header > PREFIX
    });
    beyond.then_some(Difference::LongChain)
}

/// IGMP, the other version's ICMP, or a timestamp whose length etherparse refused.
fn is_other_transport(key: &FlowKey, sliced: Option<&SlicedPacket<'_>>) -> bool {
    match (key.protocol(), key.addresses()) {
        (Some(protocol::ICMP), Addresses::V4 { .. }) => {
            sliced.is_none() && key.icmp().is_some_and(|icmp| matches!(icmp.kind, 13 | 14))
        }
        (Some(protocol::ICMPV6), Addresses::V6 { .. }) => false,
        (number, _) => matches!(number, Some(protocol::ICMP | protocol::ICMPV6 | IGMP)),
    }
}

fn compare(frame: &[u8]) -> Result<Option<Difference>, TestCaseError> {
    let headers = Headers::parse(frame, frame.len());
    let sliced: Result<_, SliceError> = SlicedPacket::from_ethernet(frame);
    let found = difference(frame, &headers, sliced.as_ref().ok());
    match (&sliced, headers.unclassified(), found) {
        (_, _, Some(difference)) => return Ok(Some(difference)),
        (Ok(sliced), None, None) => prop_assert_eq!(ours(&headers), theirs(frame, sliced)),
        (Err(_), Some(_), None) => {}
        (Ok(_), Some(reason), None) => prop_assert!(false, "only etherparse believes it: {:?}", reason),
        (Err(error), None, None) => prop_assert!(false, "only we believe it: {:?}", error),
    }
    Ok(None)
}

fn transport() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let bytes = |most| prop::collection::vec(any::<u8>(), 0..most);
    prop_oneof![
        4 => (0usize..=10, bytes(60)).prop_map(|(words, payload)| (TCP, tcp(&vec![1; words * 4], &payload))),
        4 => bytes(60).prop_map(|payload| (UDP, udp(&payload))),
        1 => bytes(30).prop_map(|rest| (protocol::ICMP, [&[8, 0, 0, 0, 0, 0, 0, 1], &rest[..]].concat())),
        1 => bytes(30).prop_map(|rest| (protocol::ICMPV6, [&[128, 0, 0, 0, 0, 0, 0, 1], &rest[..]].concat())),
        1 => (any::<u8>(), bytes(60)),
    ]
}

/// A chain of extension headers before a transport: the first one's number, and the bytes.
fn extended() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let number = prop_oneof![
        Just(protocol::ROUTING),
        Just(protocol::DESTINATION_OPTIONS),
        Just(protocol::FRAGMENT),
        Just(protocol::AUTHENTICATION)
    ];
    let header = (number, 0u8..3, any::<[u8; 32]>());
    let chain = prop::collection::vec(header, 0..MAX_EXTENSIONS + 2);
    (transport(), chain, any::<bool>()).prop_map(|((number, segment), chain, hop_by_hop)| {
        let wrap = |(next, bytes): (u8, Vec<u8>), (number, length, mut filling): (u8, u8, [u8; 32])| {
            let size = match number {
                protocol::AUTHENTICATION => usize::from(length + 1) * 4 + 8,
                protocol::FRAGMENT => 8,
                _ => usize::from(length + 1) * 8,
            };
            let length = if number == protocol::AUTHENTICATION { length + 1 } else { length };
            (filling[0], filling[1]) = (next, length);
            if number == protocol::FRAGMENT && filling[4] > 80 {
                filling[2..4].fill(0); // most are atomic: others end the comparison early
            }
            (number, [&filling[..size], &bytes[..]].concat())
        };
        let wrapped = chain.into_iter().fold((number, segment), wrap);
        if hop_by_hop { wrap(wrapped, (protocol::HOP_BY_HOP, 0, [0; 32])) } else { wrapped }
    })
}

fn packet() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let v4 =
        (transport(), 0u8..4, any::<u16>(), 0..8u8).prop_map(|((number, segment), words, flags, plain)| {
            let mut packet = ipv4(number, &segment);
            packet.splice(20..20, vec![1; usize::from(words) * 4]);
            let length = u16::try_from(packet.len()).unwrap();
            packet[0] += words;
            packet[2..4].copy_from_slice(&length.to_be_bytes());
            packet[6..8].copy_from_slice(&if plain > 0 { [0x40, 0] } else { flags.to_be_bytes() });
            (IPV4, packet)
        });
    let v6 = extended().prop_map(|(number, rest)| (IPV6, ipv6(number, &rest)));
    let arp = any::<[u8; 20]>()
        .prop_map(|addresses| (0x0806, [&[0, 1, 8, 0, 6, 4, 0, 2], &addresses[..]].concat()));
    prop_oneof![4 => v4, 4 => v6, 1 => arp, 1 => (any::<u16>(), prop::collection::vec(any::<u8>(), 0..60))]
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let tag = (prop_oneof![Just([0x81, 0]), Just([0x88, 0xa8])], any::<[u8; 2]>())
        .prop_map(|([a, b], [c, d])| [a, b, c, d]);
    let padding = prop_oneof![Just(0usize), 0usize..50];
    (prop::collection::vec(tag, 0..4), packet(), padding).prop_map(|(tags, (ether_type, packet), padding)| {
        [ethernet(&tags, ether_type, &packet), vec![0; padding]].concat()
    })
}

/// Compares on many frames, and tells how often each difference was met; `None`: none.
fn compared(
    cases: u32,
    frames: impl Strategy<Value = Vec<u8>>,
) -> (BTreeMap<Option<Difference>, usize>, usize) {
    let met = RefCell::new(BTreeMap::new());
    let classified = Cell::new(0);
    TestRunner::new(ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() })
        .run(&frames, |frame| {
            let difference = compare(&frame)?;
            *met.borrow_mut().entry(difference).or_default() += 1;
            let is_classified = Headers::parse(&frame, frame.len()).unclassified().is_none();
            classified.set(classified.get() + usize::from(is_classified && difference.is_none()));
            Ok(())
        })
        .unwrap();
    (met.into_inner(), classified.get())
}

#[test]
fn etherparse_agrees_on_generated_frames() {
    let (met, classified) = compared(20_000, frame());
    assert!(classified > 10_000, "too few frames were compared: {classified}, {met:?}");
}

#[test]
fn etherparse_agrees_on_changed_and_cut_frames() {
    let change = (any::<prop::sample::Index>(), any::<u8>());
    let changed = (frame(), prop::collection::vec(change, 0..4), any::<prop::sample::Index>(), any::<bool>())
        .prop_map(|(mut frame, changes, end, is_cut)| {
            for (at, value) in changes {
                let at = at.index(frame.len().min(80));
                frame[at] = value;
            }
            if is_cut {
                frame.truncate(end.index(frame.len()) + 1);
            }
            frame
        });
    let (met, classified) = compared(40_000, changed);
    assert!(classified > 5_000, "too few frames were compared: {classified}, {met:?}");
    assert!(met[&None] > classified + 5_000, "too few frames were refused by both: {met:?}");
}

#[test]
fn each_difference_is_met_so_none_is_an_excuse() {
    let udp_of_no_length = super::with(&ethernet(&[], IPV4, &ipv4(UDP, &udp(b"x"))), 38, &[0, 0]);
    let nested = [protocol::FRAGMENT, 0, 0, 0, 0, 0, 0, 1, UDP, 0, 0, 0, 0, 0, 0, 1];
    let later = [protocol::ROUTING, 0, 0, 8, 0, 0, 0, 1, TCP, 0, 0, 0, 0, 0, 0, 0];
    let nested = [&nested[..], &udp(b"")].concat();
    let chain =
        [&[protocol::DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0].repeat(9)[..], &[59, 0, 0, 0, 0, 0, 0, 0]];
    let deep = [&[UDP, 24][..], &[0; 198], &udp(&[0; 60])].concat();
    let cases = [
        (Difference::Llc, ethernet(&[], 4, &[0x42, 0x42, 3, 0])),
        (Difference::OtherTag, ethernet(&[[0x91, 0, 0, 5]], IPV4, &ipv4(TCP, &tcp(&[], b"")))),
        (Difference::Ipv4Authentication, ethernet(&[], IPV4, &ipv4(protocol::AUTHENTICATION, &[6, 4, 0, 0]))),
        (Difference::OtherTransport, ethernet(&[], IPV4, &ipv4(IGMP, &[0x16; 4]))),
        (Difference::OtherTransport, ethernet(&[], IPV6, &ipv6(protocol::ICMP, &[8, 0, 0, 0, 0, 0, 0, 0]))),
        (
            Difference::OtherTransport,
            ethernet(&[], IPV4, &ipv4(protocol::ICMP, &[13, 0, 0, 0, 0, 0, 0, 0, 0])),
        ),
        (Difference::ThirdTag, ethernet(&[[0x81, 0, 0, 5]; 3], IPV4, &ipv4(TCP, &tcp(&[], b"")))),
        (Difference::NoPayloadLength, [ethernet(&[], IPV6, &ipv6(UDP, b"")), udp(b"x")].concat()),
        (Difference::LongChain, ethernet(&[], IPV6, &ipv6(protocol::DESTINATION_OPTIONS, &chain.concat()))),
        (Difference::LongChain, ethernet(&[], IPV6, &ipv6(protocol::DESTINATION_OPTIONS, &deep))),
        (Difference::RepeatedFragment, ethernet(&[], IPV6, &ipv6(protocol::FRAGMENT, &nested))),
        (
            Difference::FirstFragment,
            super::with(&ethernet(&[], IPV4, &ipv4(UDP, &udp(b"x"))), 20, &[0x20, 0]),
        ),
        (Difference::LaterFragment, ethernet(&[], IPV6, &ipv6(protocol::FRAGMENT, &later))),
        (Difference::NoUdpLength, udp_of_no_length),
        (Difference::ForeignArp, ethernet(&[], 0x0806, &[&[0, 6, 8, 0, 6, 4, 0, 1][..], &[0; 20]].concat())),
    ];
    for (expected, frame) in cases {
        assert_eq!(compare(&frame).unwrap(), Some(expected));
        let headers = Headers::parse(&frame, frame.len());
        let sliced = SlicedPacket::from_ethernet(&frame);
        let agree = match &sliced {
            Ok(sliced) => headers.unclassified().is_none() && ours(&headers) == theirs(&frame, sliced),
            Err(_) => headers.unclassified().is_some(),
        };
        assert!(!agree, "{expected:?} is no difference");
        assert!(
            !matches!(sliced, Ok(sliced) if sliced.link_exts.iter().any(|e| matches!(e, LinkExtSlice::Macsec(_))))
        );
    }
}
