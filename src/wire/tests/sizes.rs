//! How many packets a frame is, and whether they fit the link.

use super::frames::{IPV4, IPV6, TCP, UDP, ethernet, ipv4, ipv6, tcp, udp};
use super::offloads::{ALL, gso, requested};
use super::with;
use crate::wire::vnet::{BadOffload, Checked, GsoType, OffloadFault, Size, check_receive, check_transmit};
use crate::wire::{Headers, PREFIX};

/// Cuts a payload piece by piece, as the kernel does.
fn segment(payload: usize, gso_size: usize) -> u64 {
    let (mut left, mut packets) = (payload, 0);
    while left > 0 {
        left -= left.min(gso_size);
        packets += 1;
    }
    packets
}

/// A TCP frame of `len` bytes over IPv4: the bytes that are looked at.
fn prefix_of(len: usize) -> Vec<u8> {
    let frame = ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[], &[0; PREFIX])));
    with(&frame, 16, &u16::try_from(len.saturating_sub(14)).unwrap().to_be_bytes())
}

#[test]
fn packets_are_what_cutting_piece_by_piece_gives_for_every_length() {
    const HEADERS: usize = 54;
    for gso_size in [48, 49, 536, 1000, 1448, 1460, 8948, 65_535] {
        let mut refused = 0;
        for len in 1..=65_535 {
            let headers = Headers::parse(&prefix_of(len), len);
            let header = gso(GsoType::TCPV4, 34, 16, gso_size);
            let Ok(checked) = check_transmit(header, &headers, len, ALL) else {
                refused += 1;
                assert!(len <= HEADERS, "a frame of {len} bytes was refused");
                continue;
            };
            let packets = segment(len - HEADERS, usize::from(gso_size));
            let wire_bytes = (len - HEADERS) as u64 + packets * HEADERS as u64;
            assert_eq!(checked.size(), Size { packets, bytes: len as u64, wire_bytes });
        }
        assert_eq!(refused, HEADERS, "there is nothing to cut");
    }
}

#[test]
fn a_frame_that_is_not_cut_is_one_packet_of_its_length() {
    for len in [60, 1514, 9014, 65_535, 200_014] {
        let headers = Headers::parse(&prefix_of(1514), len);
        let checked = check_transmit(requested(), &headers, len, ALL).unwrap();
        assert_eq!(checked.size(), Size { packets: 1, bytes: len as u64, wire_bytes: len as u64 });
    }
}

fn received(frame: &[u8], gso_type: GsoType, start: u16, hdr_len: u16) -> Checked {
    let header = crate::wire::vnet::VnetHeader { hdr_len, ..gso(gso_type, start, 16, 100) };
    check_receive(header, &Headers::parse(frame, frame.len()), frame.len(), ALL).unwrap()
}

#[test]
fn a_received_frame_has_the_parsed_headers_or_else_the_hinted_ones() {
    let frame = ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[1; 12], &[0; 250])));
    let parsed = received(&frame, GsoType::TCPV4, 34, 200);
    assert_eq!(parsed.size(), Size { packets: 3, bytes: 316, wire_bytes: 316 + 2 * 66 });
    assert_eq!(parsed.header().hdr_len, 66);

    let tunnelled = received(&frame, GsoType::TCPV4, 100, 116);
    assert_eq!(tunnelled.size(), Size { packets: 2, bytes: 316, wire_bytes: 316 + 116 });
    let another = received(&frame, GsoType::TCPV6, 34, 116);
    assert_eq!((another.size().packets, another.header().hdr_len), (2, 116));

    let unknown = ethernet(&[], 0x1234, &[0; 286]);
    assert_eq!(received(&unknown, GsoType::TCPV4, 34, 100).size().packets, 2);
    let clamped = received(&unknown, GsoType::TCPV4, 34, 60_000);
    assert_eq!(clamped.size(), Size { packets: 1, bytes: 300, wire_bytes: 300 });
    assert_eq!(clamped.header().hdr_len, 300);
}

#[test]
fn a_received_segment_size_of_zero_is_refused_and_never_divided_by() {
    let frame = ethernet(&[], IPV4, &ipv4(TCP, &tcp(&[], &[0; 250])));
    let header = gso(GsoType::TCPV4, 34, 16, 0);
    let checked = check_receive(header, &Headers::parse(&frame, frame.len()), frame.len(), ALL);
    assert_eq!(checked, Err(OffloadFault::BadOffload(BadOffload::GsoSize)));
}

#[test]
fn a_frame_fits_up_to_the_mtu_its_header_and_its_tags() {
    const TAG: [u8; 4] = [0x81, 0, 0, 5];
    for (tags, limit) in [(0, 1514), (1, 1518), (2, 1522), (3, 1522)] {
        for (len, fits) in [(limit - 1, true), (limit, true), (limit + 1, false), (200_014, false)] {
            let frame = ethernet(&[TAG, TAG, TAG][..tags], IPV4, &ipv4(UDP, &udp(b"")));
            let headers = Headers::parse(&frame, len);
            let checked = check_transmit(requested(), &headers, len, ALL).unwrap();
            assert_eq!(checked.fits_mtu(&headers, len, 1500), fits, "{len} bytes with {tags} tags");
        }
    }
}

#[test]
fn a_frame_that_is_cut_fits_by_the_packets_it_becomes() {
    let frame = ethernet(&[[0x81, 0, 0, 5]], IPV6, &ipv6(TCP, &tcp(&[1; 12], &vec![0; 30_000])));
    let headers = Headers::parse(&frame, frame.len());
    // 18 + 40 + 32 bytes of headers: 1428 bytes of payload fill a packet of 1500.
    for (gso_size, fits) in [(1427, true), (1428, true), (1429, false), (65_535, false)] {
        let header = gso(GsoType::TCPV6, 58, 16, gso_size);
        let checked = check_transmit(header, &headers, frame.len(), ALL).unwrap();
        assert_eq!(checked.fits_mtu(&headers, frame.len(), 1500), fits, "pieces of {gso_size}");
    }
}
