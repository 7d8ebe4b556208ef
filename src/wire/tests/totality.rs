//! Any bytes give an answer, and an answer that holds together.

use super::frames::{IPV4, IPV6, TCP, UDP, ethernet, ipv4, ipv6, tcp, udp};
use crate::wire::net::protocol;
use crate::wire::{Depth, Family, Fragment, Headers, PREFIX, Transport, net};
use proptest::prelude::*;

/// What holds of every answer.
fn assert_consistent(headers: &Headers, copied: usize, frame_len: usize) {
    let key = headers.flow_key();
    let looked_at = copied.min(frame_len).min(PREFIX);
    for offset in [headers.l3_offset(), headers.l4_offset()].into_iter().flatten() {
        assert!((14..=looked_at).contains(&offset));
    }
    assert!(headers.l3_offset() <= headers.l4_offset() || headers.l4_offset().is_none());
    if let Some(payload) = headers.payload_offset() {
        assert!(headers.l4_offset().unwrap() < payload);
        assert!(payload <= headers.packet_end().unwrap());
    }
    assert!(headers.packet_end().is_none_or(|end| end <= frame_len));
    assert_eq!(headers.packet_end().is_some(), headers.depth() >= Depth::Network);
    assert_eq!(headers.depth() >= Depth::Network, key.family() != Family::None);
    assert_eq!(headers.depth() == Depth::Transport, headers.transport() != Transport::None);
    assert_eq!(headers.depth() == Depth::Transport, headers.payload_offset().is_some());
    assert_eq!(key.ports().is_some() || key.icmp().is_some(), headers.depth() == Depth::Transport);
    if headers.depth() == Depth::Transport {
        assert_ne!(key.fragment(), Fragment::Later);
        assert_eq!(headers.unclassified(), None, "nothing is left to parse");
    }
}

fn assert_answers(bytes: &[u8], frame_len: usize) {
    let headers = Headers::parse(bytes, frame_len);
    assert_consistent(&headers, bytes.len(), frame_len);
    let _ = headers.arp(bytes);
    let _ = headers.vlan_tags();
    let _ = headers.flow_key().addresses();
    let _ = headers.ipv4_header(bytes).map(net::ipv4_checksum_is_valid);
}

/// A frame of each kind, for cutting and changing.
fn some_frames() -> Vec<Vec<u8>> {
    let segment = tcp(&[1; 12], &[0x5a; 300]);
    let tags = [[0x88, 0xa8, 0, 7], [0x81, 0, 0, 5]];
    let chain = [&[protocol::FRAGMENT, 0, 1, 4, 0, 0, 0, 0, TCP, 0, 0, 1, 0, 0, 0, 1][..], &segment].concat();
    let snap = [&[0xaa, 0xaa, 3, 0, 0, 0, 8, 0][..], &ipv4(UDP, &udp(b"snap"))].concat();
    let mut options = ipv4(89, &[0; 80]);
    options[0] = 0x4f; // 40 of the 80 bytes
    vec![
        ethernet(&[], IPV4, &options),
        ethernet(&[], IPV4, &ipv4(TCP, &segment)),
        ethernet(&tags, IPV4, &ipv4(UDP, &udp(&[3; 20]))),
        ethernet(&tags[1..], IPV6, &ipv6(UDP, &udp(&[3; 20]))),
        ethernet(&[], IPV6, &ipv6(protocol::HOP_BY_HOP, &chain)),
        ethernet(&[], IPV4, &ipv4(protocol::ICMP, &[8, 0, 0, 0, 0, 0, 0, 1])),
        ethernet(&[], u16::try_from(snap.len()).unwrap(), &snap),
        ethernet(&[], 0x0806, &[&[0, 1, 8, 0, 6, 4, 0, 1][..], &[9; 20]].concat()),
    ]
}

#[test]
fn a_frame_cut_anywhere_gives_an_answer() {
    for frame in some_frames() {
        for copied in 0..=frame.len() {
            assert_answers(&frame[..copied], copied);
            assert_answers(&frame[..copied], frame.len());
            assert_answers(&frame, copied);
        }
    }
}

#[test]
fn a_frame_with_any_byte_changed_gives_an_answer() {
    for frame in some_frames() {
        for at in 0..frame.len().min(PREFIX) {
            for value in 0..=u8::MAX {
                assert_answers(&super::with(&frame, at, &[value]), frame.len());
            }
        }
    }
}

#[test]
fn a_frame_of_any_claimed_length_gives_an_answer() {
    for frame in some_frames() {
        for frame_len in [0, 1, 13, 14, 65_535, 65_536, 200_014, u32::MAX as usize, usize::MAX] {
            assert_answers(&frame, frame_len);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_give_an_answer(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        copied in 0usize..400,
        frame_len in 0usize..70_000,
    ) {
        assert_answers(&bytes[..copied.min(bytes.len())], frame_len);
    }

    #[test]
    fn changed_frames_give_an_answer(
        which in 0usize..8,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        copied in any::<prop::sample::Index>(),
    ) {
        let mut frame = some_frames().swap_remove(which);
        for (at, value) in changes {
            let at = at.index(frame.len().min(96));
            frame[at] = value;
        }
        assert_answers(&frame, frame.len());
        assert_answers(&frame[..copied.index(frame.len() + 1)], frame.len());
    }
}
