//! One layer after the other, by frames whose bytes are in view.

use super::frames::{
    self, GUEST, GUEST_PORT, IPV4, IPV6, PEER, PEER_PORT, TCP, UDP, ethernet, ipv4, ipv6, tcp, udp,
};
use super::{fault, parse, with};
use crate::wire::net::{self, protocol};
use crate::wire::{
    Addresses, Depth, EtherType, Family, Fragment, Framing, Headers, Icmp, Mac, PREFIX, Transport,
    Unclassified,
};
use std::net::{Ipv4Addr, Ipv6Addr};

const VLAN_5: [u8; 4] = [0x81, 0, 0x60, 5];
const SERVICE_7: [u8; 4] = [0x88, 0xa8, 0x10, 7];

fn addresses_v4() -> Addresses {
    Addresses::V4 { source: Ipv4Addr::new(10, 0, 0, 1), destination: Ipv4Addr::new(10, 0, 0, 2) }
}

fn addresses_v6() -> Addresses {
    Addresses::V6 { source: "fd00::1".parse().unwrap(), destination: "fd00::2".parse().unwrap() }
}

/// An extension header of 8 bytes.
fn extension(next: u8) -> [u8; 8] {
    [next, 0, 1, 4, 0, 0, 0, 0]
}

/// A fragment header with ID 0xabcd.
fn fragment_header(next: u8, offset: u16, more: bool) -> [u8; 8] {
    let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
    [next, 0, high, low, 0, 0, 0xab, 0xcd]
}

#[test]
fn a_tcp_syn_is_read_byte_for_byte() {
    let frame = [
        0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1, 0x08, 0x00, // Ethernet: to ..:02 from ..:01, IPv4
        0x45, 0xb8, 0, 44, 0x12, 0x34, 0x40, 0, 63, 6, 0, 0, 192, 0, 2, 1, 198, 51, 100,
        9, // IPv4, DF, DSCP 46
        0xc0, 0, 0x01, 0xbb, 1, 2, 3, 4, 5, 6, 7, 8, 0x60, 0x02, 0xfa, 0xf0, 0, 0, 0, 0, 2, 4, 5,
        0xb4, // SYN, MSS
        0, 0, // padding to 60 bytes
    ];
    let headers = parse(&frame);
    let key = headers.flow_key();
    assert_eq!((headers.depth(), headers.unclassified()), (Depth::Transport, None));
    assert_eq!((key.destination_mac(), key.source_mac()), (Mac::new(PEER), Mac::new(GUEST)));
    assert_eq!(key.source_mac().to_string(), "02:00:00:00:00:01");
    assert_eq!((key.ether_type(), key.framing()), (Some(EtherType::IPV4), Framing::EthernetII));
    assert_eq!((key.vlan_ids(), headers.vlan_tags()), ([None, None], [None, None]));
    assert_eq!(
        key.addresses(),
        Addresses::V4 { source: Ipv4Addr::new(192, 0, 2, 1), destination: Ipv4Addr::new(198, 51, 100, 9) }
    );
    assert_eq!((key.protocol(), key.fragment()), (Some(protocol::TCP), Fragment::Whole));
    assert_eq!((key.ports(), key.icmp()), (Some((0xc000, 443)), None));
    assert_eq!(
        (headers.l3_offset(), headers.l4_offset(), headers.payload_offset()),
        (Some(14), Some(34), Some(58))
    );
    assert_eq!((headers.packet_end(), headers.frame_len()), (Some(58), 60));
    assert_eq!((headers.dscp(), headers.hop_limit(), headers.identification()), (46, 63, 0x1234));
    assert!(headers.dont_fragment());
    let syn = headers.tcp().unwrap();
    assert_eq!((syn.source_port, syn.destination_port, syn.window), (0xc000, 443, 0xfaf0));
    assert_eq!((syn.sequence, syn.acknowledgement), (0x0102_0304, 0x0506_0708));
    assert_eq!((syn.flags, syn.header_length), (crate::wire::TcpFlags::SYN, 24));
    assert_eq!((headers.transport(), headers.udp()), (Transport::Tcp(syn), None));
}

#[test]
fn a_udp_datagram_over_ipv6_is_read() {
    let headers = parse(&ethernet(&[], IPV6, &ipv6(UDP, &udp(b"hello"))));
    assert_eq!((headers.depth(), headers.unclassified()), (Depth::Transport, None));
    assert_eq!(headers.flow_key().addresses(), addresses_v6());
    assert_eq!(headers.flow_key().ports(), Some((GUEST_PORT, PEER_PORT)));
    assert_eq!((headers.l4_offset(), headers.payload_offset()), (Some(54), Some(62)));
    assert_eq!((headers.dscp(), headers.hop_limit(), headers.identification()), (46, 64, 0));
    let datagram = headers.udp().unwrap();
    assert_eq!((datagram.length, datagram.has_checksum), (13, false));
    assert_eq!(headers.tcp(), None);
}

#[test]
fn icmp_has_type_and_code_where_others_have_ports() {
    let echo = [8, 3, 0, 0, 0, 1, 0, 1];
    let v4 = parse(&ethernet(&[], IPV4, &ipv4(protocol::ICMP, &echo)));
    let v6 = parse(&ethernet(&[], IPV6, &ipv6(protocol::ICMPV6, &echo)));
    for headers in [v4, v6] {
        assert_eq!(headers.flow_key().icmp(), Some(Icmp { kind: 8, code: 3 }));
        assert_eq!((headers.flow_key().ports(), headers.depth()), (None, Depth::Transport));
    }
    assert_eq!(v4.transport(), Transport::Icmp(Icmp { kind: 8, code: 3 }));
    assert_eq!(v6.transport(), Transport::Icmpv6(Icmp { kind: 8, code: 3 }));
    let crossed = parse(&ethernet(&[], IPV4, &ipv4(protocol::ICMPV6, &echo)));
    assert_eq!((crossed.depth(), crossed.unclassified()), (Depth::Network, None), "ICMPv6 belongs to IPv6");
}

#[test]
fn other_protocols_are_known_by_their_number_alone() {
    for number in [0, 2, 47, 50, 89, 132, 255] {
        let headers = parse(&ethernet(&[], IPV4, &ipv4(number, &[1; 30])));
        assert_eq!((headers.depth(), headers.unclassified()), (Depth::Network, None));
        assert_eq!(headers.flow_key().protocol(), Some(number));
        assert_eq!((headers.flow_key().ports(), headers.flow_key().icmp()), (None, None));
        assert_eq!((headers.l4_offset(), headers.payload_offset()), (Some(34), None));
    }
}

#[test]
fn arp_tells_sender_and_target() {
    let packet = [
        0, 1, 8, 0, 6, 4, 0, 1, // Ethernet, IPv4, request
        2, 0, 0, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2,
    ];
    let frame = ethernet(&[VLAN_5], EtherType::ARP.0, &packet);
    let headers = parse(&frame);
    let (sender, target) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
    assert_eq!((headers.depth(), headers.unclassified()), (Depth::Network, None));
    assert_eq!(headers.flow_key().addresses(), Addresses::Arp { sender, target });
    assert_eq!(headers.flow_key().protocol(), None);
    let arp = headers.arp(&frame).unwrap();
    assert_eq!((arp.operation, arp.sender, arp.target), (1, sender, target));
    assert_eq!((arp.sender_mac, arp.target_mac), (Mac::new(GUEST), Mac::default()));
    assert_eq!(fault(&with(&frame, 18, &[0, 6])), Some(Unclassified::ForeignArp));
    assert_eq!(fault(&frame[..45]), Some(Unclassified::TruncatedArp));
    assert_eq!(parse(&ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[], b"")))).arp(&frame), None);
}

#[test]
fn two_vlan_tags_are_looked_behind_and_a_third_is_not() {
    let packet = ipv4(UDP, &udp(b""));
    let headers = parse(&ethernet(&[SERVICE_7, VLAN_5], IPV4, &packet));
    assert_eq!(headers.flow_key().vlan_ids(), [Some(7), Some(5)]);
    let [outer, inner] = headers.vlan_tags().map(Option::unwrap);
    assert_eq!(
        (outer.id(), outer.priority(), outer.is_drop_eligible(), outer.is_service()),
        (7, 0, true, true)
    );
    assert_eq!(
        (inner.id(), inner.priority(), inner.is_drop_eligible(), inner.is_service()),
        (5, 3, false, false)
    );
    assert_eq!((headers.l3_offset(), headers.l4_offset()), (Some(22), Some(42)));
    assert_eq!(headers.flow_key().addresses(), addresses_v4());

    let third = parse(&ethernet(&[SERVICE_7, VLAN_5, VLAN_5], IPV4, &packet));
    assert_eq!((third.unclassified(), third.depth()), (Some(Unclassified::TooManyVlanTags), Depth::Link));
    assert_eq!((third.flow_key().ether_type(), third.l3_offset()), (Some(EtherType::VLAN), None));
    assert_eq!(third.flow_key().vlan_ids(), [Some(7), Some(5)]);

    let cut = ethernet(&[SERVICE_7, VLAN_5], IPV4, &[]);
    assert_eq!(fault(&cut[..17]), Some(Unclassified::TruncatedVlanTag));
    assert_eq!(fault(&cut[..21]), Some(Unclassified::TruncatedVlanTag));
    assert_eq!(fault(&cut), Some(Unclassified::TruncatedIpv4Header));
}

#[test]
fn vlans_tell_flows_apart_and_priorities_do_not() {
    let packet = ipv4(UDP, &udp(b""));
    let key = |tags: &[[u8; 4]]| *parse(&ethernet(tags, IPV4, &packet)).flow_key();
    assert_eq!(key(&[[0x81, 0, 0x60, 5]]), key(&[[0x81, 0, 0xf0, 5]]));
    let apart = [
        key(&[]),
        key(&[[0x81, 0, 0, 0]]),
        key(&[[0x81, 0, 0, 5]]),
        key(&[[0x88, 0xa8, 0, 5]]),
        key(&[[0x81, 0, 0, 5], [0x81, 0, 0, 0]]),
        key(&[[0x81, 0, 0, 0], [0x81, 0, 0, 5]]),
    ];
    for (index, one) in apart.iter().enumerate() {
        assert!(
            apart[..index].iter().all(|other| other.words() != one.words()),
            "VLANs of {index} look the same"
        );
    }
}

#[test]
fn llc_and_snap_are_looked_behind() {
    let snap = |oui: [u8; 3], ether_type: u16, packet: &[u8]| {
        let rest = [&[0xaa, 0xaa, 3][..], &oui, &ether_type.to_be_bytes(), packet].concat();
        ethernet(&[], u16::try_from(rest.len()).unwrap(), &rest)
    };
    let packet = ipv4(TCP, &tcp(&[], b"x"));
    for oui in [[0, 0, 0], [0, 0, 0xf8]] {
        let headers = parse(&snap(oui, IPV4, &packet));
        assert_eq!((headers.flow_key().framing(), headers.unclassified()), (Framing::Snap, None));
        assert_eq!(headers.flow_key().ether_type(), Some(EtherType::IPV4));
        assert_eq!((headers.l3_offset(), headers.l4_offset()), (Some(22), Some(42)));
        assert_eq!(headers.flow_key().ports(), Some((GUEST_PORT, PEER_PORT)));
    }
    let cisco = parse(&snap([0, 0, 0x0c], 0x2000, &packet));
    assert_eq!((cisco.flow_key().ether_type(), cisco.depth()), (None, Depth::Link));
    assert_eq!(cisco.flow_key().service_access_points(), Some([0xaa, 0xaa]));
    assert_eq!(fault(&snap([0, 0, 0], 0x8100, &packet)), Some(Unclassified::MisplacedVlanTag));

    let bpdu = [ethernet(&[], 38, &[0x42, 0x42, 3]), vec![0; 43]].concat();
    let headers = parse(&bpdu);
    assert_eq!((headers.flow_key().framing(), headers.unclassified()), (Framing::Llc, None));
    assert_eq!(headers.flow_key().service_access_points(), Some([0x42, 0x42]));
    assert_eq!((headers.depth(), headers.flow_key().family()), (Depth::Link, Family::None));

    let reads_like_ipv4 = [ethernet(&[], 38, &[0x08, 0x00, 3]), vec![0x45; 43]].concat();
    let headers = parse(&reads_like_ipv4);
    assert_eq!((headers.depth(), headers.unclassified()), (Depth::Link, None), "08 and 00 are not 0x0800");
}

#[test]
fn an_802_3_length_must_fit_the_frame() {
    let rest = [0x42, 0x42, 3, 0];
    assert_eq!(fault(&ethernet(&[], 4, &rest)), None);
    assert_eq!(fault(&ethernet(&[], 3, &rest)), None, "one byte of padding");
    assert_eq!(fault(&ethernet(&[], 5, &rest)), Some(Unclassified::LengthField));
    assert_eq!(fault(&ethernet(&[], 2, &rest)), Some(Unclassified::TruncatedLlc));
    assert_eq!(fault(&ethernet(&[], 1501, &[0; 1600])), Some(Unclassified::LengthField));
    assert_eq!(fault(&ethernet(&[], 0x5ff, &[0; 1600])), Some(Unclassified::LengthField));
    assert_eq!(fault(&ethernet(&[], 0x600, &[0; 1600])), None);
    let packet = ipv4(TCP, &tcp(&[], b""));
    let short = [&[0xaa, 0xaa, 3, 0, 0, 0, 8, 0][..], &packet].concat();
    let length = u16::try_from(short.len()).unwrap();
    assert_eq!(fault(&ethernet(&[], length, &short)), None);
    assert_eq!(fault(&ethernet(&[], length - 1, &short)), Some(Unclassified::Ipv4TotalLength));
    assert_eq!(fault(&ethernet(&[], 7, &short)), Some(Unclassified::TruncatedLlc));
}

#[test]
fn ipv4_lengths_must_agree() {
    let frame = ethernet(&[], IPV4, &ipv4(UDP, &udp(b"0123")));
    let cases = [
        (14, vec![0x55], Some(Unclassified::Ipv4Version)),
        (14, vec![0x65], Some(Unclassified::Ipv4Version)),
        (14, vec![0x44], Some(Unclassified::Ipv4HeaderLength)),
        (14, vec![0x40], Some(Unclassified::Ipv4HeaderLength)),
        (14, vec![0x4f], Some(Unclassified::Ipv4TotalLength)), // 60 bytes of header in 32 of packet
        (16, vec![0, 19], Some(Unclassified::Ipv4TotalLength)),
        (16, vec![0, 33], Some(Unclassified::Ipv4TotalLength)), // one more than the frame has
        (16, vec![0, 0], Some(Unclassified::Ipv4TotalLength)),
        (16, vec![0, 31], Some(Unclassified::UdpLength)),
        (16, vec![0, 27], Some(Unclassified::TruncatedUdpHeader)),
        (38, vec![0, 7], Some(Unclassified::UdpLength)),
        (38, vec![0, 13], Some(Unclassified::UdpLength)),
        (38, vec![0, 0], Some(Unclassified::UdpLength)),
        (38, vec![0, 8], None), // the rest are UDP options
    ];
    assert_eq!(fault(&frame), None);
    for (at, bytes, expected) in cases {
        assert_eq!(fault(&with(&frame, at, &bytes)), expected, "{bytes:x?} at {at}");
    }
    assert_eq!(fault(&frame[..33]), Some(Unclassified::TruncatedIpv4Header));
}

#[test]
fn ipv4_options_move_the_transport() {
    let mut packet = ipv4(TCP, &tcp(&[], b"x"));
    packet.splice(20..20, [7, 7, 4, 0, 0, 0, 0, 0]);
    packet[0] = 0x47;
    packet[3] += 8;
    let frame = ethernet(&[], IPV4, &packet);
    let headers = parse(&frame);
    assert_eq!((headers.l4_offset(), headers.payload_offset()), (Some(42), Some(62)));
    assert_eq!(headers.ipv4_header(&frame).map(<[u8]>::len), Some(28));
}

#[test]
fn padding_behind_the_packet_is_normal() {
    let frame = ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[], b"")));
    for padding in [0, 1, 6, 46, 1000] {
        let padded = [frame.clone(), vec![0xee; padding]].concat();
        let headers = parse(&padded);
        assert_eq!((headers.unclassified(), headers.packet_end()), (None, Some(54)));
        assert_eq!(headers.frame_len() as usize, 54 + padding);
    }
}

#[test]
fn an_ipv4_checksum_is_verified_over_the_header_alone() {
    let frame = ethernet(&[], IPV4, &ipv4(UDP, &udp(b"x")));
    let headers = parse(&frame);
    assert!(net::ipv4_checksum_is_valid(headers.ipv4_header(&frame).unwrap()));
    for at in 14..34 {
        let wrong = with(&frame, at, &[frame[at] ^ 0x10]);
        assert!(!net::ipv4_checksum_is_valid(&wrong[14..34]), "a bit flipped at {at}");
    }
    for bytes in [&[][..], &[0x45; 19][..], &[0x46; 20][..], &[0; 20][..]] {
        assert!(!net::ipv4_checksum_is_valid(bytes));
    }
    assert_eq!(parse(&ethernet(&[], IPV6, &ipv6(UDP, &udp(b"x")))).ipv4_header(&frame), None);
}

#[test]
fn ipv4_fragments_are_told_apart() {
    let frame = ethernet(&[], IPV4, &ipv4(UDP, &udp(b"0123")));
    let first = parse(&with(&frame, 20, &[0x20, 0]));
    assert_eq!((first.flow_key().fragment(), first.depth()), (Fragment::First, Depth::Transport));
    assert_eq!(first.flow_key().ports(), Some((GUEST_PORT, PEER_PORT)));
    for (flags, offset) in [([0, 1], 1), ([0x20, 3], 3), ([0x1f, 0xff], 0x1fff)] {
        let later = parse(&with(&frame, 20, &flags));
        assert_eq!((later.flow_key().fragment(), later.fragment_offset()), (Fragment::Later, offset));
        assert_eq!((later.depth(), later.unclassified()), (Depth::Network, None));
        assert_eq!((later.flow_key().ports(), later.l4_offset()), (None, None));
        assert_eq!(later.flow_key().protocol(), Some(UDP));
    }
    let tiny = with(&ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[], b"")[..19])), 20, &[0x20, 0]);
    assert_eq!(fault(&tiny), Some(Unclassified::IncompleteFirstFragment));
    let whole_length = with(&with(&frame, 20, &[0x20, 0]), 38, &[0xff, 0]);
    assert_eq!(fault(&whole_length), None, "a first fragment tells the length of the whole datagram");
}

#[test]
fn tcp_lengths_must_agree() {
    let frame = ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[1, 1, 1, 0], b"01234")));
    let cases = [
        (vec![0x60], None),
        (vec![0x50], None),
        (vec![0x70], None), // 28 of 29 bytes
        (vec![0x80], Some(Unclassified::TcpDataOffset)),
        (vec![0xf0], Some(Unclassified::TcpDataOffset)),
        (vec![0x40], Some(Unclassified::TcpDataOffset)),
        (vec![0x00], Some(Unclassified::TcpDataOffset)),
    ];
    for (data_offset, expected) in cases {
        assert_eq!(fault(&with(&frame, 46, &data_offset)), expected, "{data_offset:x?}");
    }
    let cut = ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[], b"")[..19]));
    assert_eq!(fault(&cut), Some(Unclassified::TruncatedTcpHeader));
    let icmp = ethernet(&[], IPV4, &ipv4(protocol::ICMP, &[8, 0, 0, 0, 0, 0, 0]));
    assert_eq!(fault(&icmp), Some(Unclassified::TruncatedIcmpHeader));
}

#[test]
fn ipv6_lengths_must_agree() {
    let frame = ethernet(&[], IPV6, &ipv6(UDP, &udp(b"0123")));
    let cases = [
        (14, vec![0x4b], Some(Unclassified::Ipv6Version)),
        (18, vec![0, 13], Some(Unclassified::Ipv6PayloadLength)),
        (18, vec![0, 11], Some(Unclassified::UdpLength)),
        (18, vec![0, 0], Some(Unclassified::TruncatedUdpHeader)),
        (18, vec![0, 0, 0], Some(Unclassified::Jumbogram)),
        (18, vec![0, 0, 59], None),
    ];
    assert_eq!(fault(&frame), None);
    for (at, bytes, expected) in cases {
        assert_eq!(fault(&with(&frame, at, &bytes)), expected, "{bytes:x?} at {at}");
    }
    assert_eq!(fault(&frame[..53]), Some(Unclassified::TruncatedIpv6Header));
}

#[test]
fn a_chain_of_extension_headers_is_followed_to_its_end() {
    let authentication = [&[protocol::TCP, 4][..], &[0; 22]].concat(); // (4 + 2) * 4 bytes
    let chain = [
        &extension(protocol::ROUTING)[..], // hop-by-hop
        &extension(protocol::DESTINATION_OPTIONS),
        &[protocol::AUTHENTICATION, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // 2 * 8 bytes
        &authentication,
        &tcp(&[], b"x"),
    ]
    .concat();
    let headers = parse(&ethernet(&[VLAN_5], IPV6, &ipv6(protocol::HOP_BY_HOP, &chain)));
    assert_eq!((headers.unclassified(), headers.l4_offset()), (None, Some(18 + 40 + 8 + 8 + 16 + 24)));
    assert_eq!(headers.flow_key().protocol(), Some(TCP));
    assert_eq!(headers.flow_key().ports(), Some((GUEST_PORT, PEER_PORT)));
}

#[test]
fn an_authentication_header_has_its_fixed_fields() {
    let fields = [&[UDP, 1][..], &[0; 10], &udp(b"")].concat();
    let frame = ethernet(&[], IPV6, &ipv6(protocol::AUTHENTICATION, &fields));
    assert_eq!(fault(&frame), None);
    assert_eq!(fault(&with(&frame, 55, &[0])), Some(Unclassified::AuthenticationLength));
}

#[test]
fn extension_headers_are_bounded_in_number_and_in_bytes() {
    let options = |count: usize| {
        let mut chain = extension(protocol::DESTINATION_OPTIONS).repeat(count);
        chain[(count - 1) * 8] = UDP;
        ethernet(&[], IPV6, &ipv6(protocol::DESTINATION_OPTIONS, &[chain, udp(b"")].concat()))
    };
    assert_eq!(fault(&options(net::MAX_EXTENSIONS)), None);
    assert_eq!(fault(&options(net::MAX_EXTENSIONS + 1)), Some(Unclassified::TooManyExtensions));
    let addresses = parse(&options(100)).flow_key().addresses();
    assert_eq!(addresses, addresses_v6(), "what was parsed before is there");

    // 14 + 40 + 200 bytes leave 2 of the 256 for the transport.
    let long = [&[UDP, 24][..], &[0; 198], &udp(b"")].concat();
    let frame = ethernet(&[], IPV6, &ipv6(protocol::DESTINATION_OPTIONS, &long));
    assert_eq!(fault(&frame), Some(Unclassified::TruncatedUdpHeader));
    let longer = [&[UDP, 25][..], &[0; 206], &udp(b"")].concat();
    let frame = ethernet(&[], IPV6, &ipv6(protocol::DESTINATION_OPTIONS, &longer));
    assert_eq!(fault(&frame), Some(Unclassified::TruncatedExtension));
}

#[test]
fn hop_by_hop_options_come_first_or_not_at_all() {
    let chain = [&extension(protocol::HOP_BY_HOP)[..], &extension(UDP), &udp(b"")].concat();
    for first in [protocol::HOP_BY_HOP, protocol::DESTINATION_OPTIONS] {
        assert_eq!(fault(&ethernet(&[], IPV6, &ipv6(first, &chain))), Some(Unclassified::HopByHopNotFirst));
    }
}

#[test]
fn ipv6_fragments_are_told_apart() {
    let fragment = |next: u8, offset: u16, more: bool, rest: &[u8]| {
        let packet = [&fragment_header(next, offset, more)[..], rest].concat();
        parse(&ethernet(&[], IPV6, &ipv6(protocol::FRAGMENT, &packet)))
    };
    let atomic = fragment(UDP, 0, false, &udp(b""));
    assert_eq!((atomic.flow_key().fragment(), atomic.unclassified()), (Fragment::Whole, None));
    let first = fragment(UDP, 0, true, &udp(b""));
    assert_eq!((first.flow_key().fragment(), first.identification()), (Fragment::First, 0xabcd));
    assert_eq!((first.flow_key().ports(), first.l4_offset()), (Some((GUEST_PORT, PEER_PORT)), Some(62)));
    let later = fragment(UDP, 0x1fff, false, &[1; 64]);
    assert_eq!((later.flow_key().fragment(), later.fragment_offset()), (Fragment::Later, 0x1fff));
    assert_eq!((later.flow_key().protocol(), later.l4_offset()), (Some(UDP), None));
    assert_eq!(later.unclassified(), None);

    let chain_cut = fragment(protocol::DESTINATION_OPTIONS, 0, true, &[UDP, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(chain_cut.unclassified(), Some(Unclassified::IncompleteFirstFragment));
    let transport_cut = fragment(TCP, 0, true, &tcp(&[], b"")[..16]);
    assert_eq!(transport_cut.unclassified(), Some(Unclassified::IncompleteFirstFragment));
    let twice =
        fragment(protocol::FRAGMENT, 0, true, &[&fragment_header(UDP, 0, true)[..], &udp(b"")].concat());
    assert_eq!(twice.unclassified(), Some(Unclassified::RepeatedFragmentHeader));
}

#[test]
fn the_answer_does_not_depend_on_how_much_was_copied() {
    let frame = ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[1; 40], &[0; 1400])));
    assert_eq!(Headers::parse(&frame[..PREFIX], frame.len()), parse(&frame));
    let mut behind = [UDP, 25].to_vec();
    behind.extend([0; 206]);
    behind.extend(udp(&[0; 1000]));
    let frame = ethernet(&[], IPV6, &ipv6(protocol::DESTINATION_OPTIONS, &behind));
    assert_eq!(Headers::parse(&frame[..PREFIX], frame.len()), parse(&frame));
    assert_eq!(Headers::parse(&frame, frame.len()).unclassified(), Some(Unclassified::TruncatedExtension));
}

#[test]
fn tcp_options_may_reach_beyond_the_copied_bytes() {
    let options = [&[TCP, 20][..], &[0; 166]].concat(); // 14 + 40 + 168 + 20 = 242: the options end at 282
    let segment = tcp(&[1; 40], b"payload");
    let frame = ethernet(&[], IPV6, &ipv6(protocol::DESTINATION_OPTIONS, &[options, segment].concat()));
    let headers = Headers::parse(&frame[..PREFIX], frame.len());
    assert_eq!((headers.unclassified(), headers.payload_offset()), (None, Some(282)));
}

#[test]
fn a_frame_without_an_ethernet_header_is_a_runt() {
    for length in 0..14 {
        let headers = parse(&[0xff; 14][..length]);
        assert_eq!((headers.unclassified(), headers.depth()), (Some(Unclassified::Runt), Depth::Nothing));
        assert_eq!(headers.frame_len() as usize, length);
    }
    assert_eq!(
        Headers::parse(&[0; 60], 13).unclassified(),
        Some(Unclassified::Runt),
        "L counts, not the copy"
    );
    let broadcast = parse(&[0xff; 14]);
    assert_eq!(broadcast.flow_key().destination_mac(), Mac::BROADCAST);
    assert!(broadcast.flow_key().source_mac().is_multicast());
    assert_eq!((broadcast.depth(), broadcast.unclassified()), (Depth::Link, None));
}

#[test]
fn headers_tell_ipv6_addresses_in_full() {
    let mut packet = ipv6(59, &[]);
    for (index, byte) in packet[8..40].iter_mut().enumerate() {
        *byte = u8::try_from(index).unwrap();
    }
    let source: Ipv6Addr = "1:203:405:607:809:a0b:c0d:e0f".parse().unwrap();
    let destination: Ipv6Addr = "1011:1213:1415:1617:1819:1a1b:1c1d:1e1f".parse().unwrap();
    let headers = parse(&ethernet(&[], frames::IPV6, &packet));
    assert_eq!(headers.flow_key().addresses(), Addresses::V6 { source, destination });
}
