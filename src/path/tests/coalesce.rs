//! Frames that are put together, and cut again as the kernel does it (by a model of it: `tests/integration` has
//! the kernel itself).

use proptest::prelude::*;
use vmflow_driver::frame::{Ends, Segment, pattern, sum, tagged};

use super::*;
use crate::wire::vnet::{Flags, GsoType, VnetHeader};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;

/// Offers frames, lets one turn run, and gives what was written to the tap.
fn written(rig: &mut Rig, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let images: Vec<_> = frames.iter().map(|frame| with_header(frame)).collect();
    written_as(rig, &images)
}

/// The same for frames behind virtio-net headers of their own.
fn written_as(rig: &mut Rig, images: &[Vec<u8>]) -> Vec<Vec<u8>> {
    for (n, image) in (0..).zip(images) {
        rig.offer(n, image);
    }
    let turn = rig.transmit();
    assert_eq!((turn.fault, turn.waits_for), (None, None));
    std::iter::from_fn(|| rig.at_far_end()).collect()
}

/// The kernel's segmentation, for a frame as it was written to the tap.
fn cut(image: &[u8]) -> Vec<Vec<u8>> {
    let (header, frame) = image.split_first_chunk().unwrap();
    let header = VnetHeader::decode(*header);
    if header.gso_type == GsoType::NONE {
        return vec![frame.to_vec()];
    }
    assert!(header.flags.contains(Flags::NEEDS_CSUM));
    let (headers, size) = (usize::from(header.hdr_len), usize::from(header.gso_size));
    let l4 = usize::from(header.csum_start);
    let pieces = frame[headers..].chunks(size);
    let last = pieces.len() - 1;
    pieces
        .enumerate()
        .map(|(n, piece)| segment(&header, &frame[..headers], l4, (n, n == last, size), piece))
        .collect()
}

/// Segment `n` of a frame that is cut.
fn segment(
    header: &VnetHeader,
    headers: &[u8],
    l4: usize,
    (n, is_last, size): (usize, bool, usize),
    payload: &[u8],
) -> Vec<u8> {
    let short = |n: usize| u16::try_from(n).unwrap().to_be_bytes();
    let mut frame = [headers, payload].concat();
    let v4 =
        frame[12..].windows(2).take(l4 - 13).any(|two| two == [8, 0]) && header.gso_type != GsoType::TCPV6;
    let v4 = v4 && l4 < 14 + 40;
    let l3 = if v4 { l4 - 20 } else { l4 - 40 };
    let transport = frame.len() - l4;
    let addresses = if v4 {
        frame[l3 + 2..l3 + 4].copy_from_slice(&short(transport + 20));
        let id = u16::from_be_bytes([frame[l3 + 4], frame[l3 + 5]]).wrapping_add(u16::try_from(n).unwrap());
        frame[l3 + 4..l3 + 6].copy_from_slice(&id.to_be_bytes());
        frame[l3 + 10..l3 + 12].fill(0);
        let sum = !sum(&frame[l3..l4]);
        frame[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
        l3 + 12..l4
    } else {
        frame[l3 + 4..l3 + 6].copy_from_slice(&short(transport));
        l3 + 8..l4
    };
    let udp = header.gso_type == GsoType::UDP_L4;
    if udp {
        frame[l4 + 4..l4 + 6].copy_from_slice(&short(transport));
    } else {
        let sequence = u32::from_be_bytes(*frame[l4 + 4..].first_chunk().unwrap());
        let on = sequence.wrapping_add(u32::try_from(n * size).unwrap());
        frame[l4 + 4..l4 + 8].copy_from_slice(&on.to_be_bytes());
        if !is_last {
            frame[l4 + 13] &= !(FIN | PSH);
        }
    }
    let field = l4 + usize::from(header.csum_offset);
    frame[field..field + 2].fill(0);
    let protocol = if udp { 17 } else { 6 };
    let pseudo = [&frame[addresses], &[0, protocol], &short(transport), &frame[l4..]].concat();
    let checksum = match !sum(&pseudo) {
        0 if udp => u16::MAX,
        other => other,
    };
    frame[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// `count` datagrams of one flow.
fn datagrams(ends: Ends, count: u64, payload: usize) -> Vec<Vec<u8>> {
    (0..count).map(|n| ends.udp(&pattern(payload, n))).collect()
}

/// `count` segments of one stream.
fn stream(ends: Ends, count: u32, payload: usize, last_flags: u8) -> Vec<Vec<u8>> {
    let segment = |n: u32| {
        let sequence = 0xffff_ff00_u32.wrapping_add(n * u32::try_from(payload).unwrap());
        let flags = if n + 1 == count { ACK | last_flags } else { ACK };
        ends.tcp(Segment { sequence, acknowledged: 77, flags, window: 500 }, &pattern(payload, n.into()))
    };
    (0..count).map(segment).collect()
}

fn cut_all(writes: &[Vec<u8>]) -> Vec<Vec<u8>> {
    writes.iter().flat_map(|image| cut(image)).collect()
}

#[test]
fn a_run_of_one_flow_is_one_write_that_is_cut_into_what_the_guest_sent() {
    for ends in [Ends::default(), Ends::v6()] {
        for frames in [
            datagrams(ends, 40, 18),
            datagrams(ends, 40, 1400),
            stream(ends, 40, 1400, PSH),
            stream(ends, 7, 301, FIN | PSH),
            datagrams(ends, 3, 1).iter().map(|frame| tagged(frame, &[(0x8100, 5)])).collect(),
        ] {
            let mut rig = rig();
            let writes = written(&mut rig, &frames);
            assert_eq!(writes.len(), 1);
            // The ID of a packet that is not to be fragmented is counted on all the same.
            let cut = cut_all(&writes);
            assert_eq!(without_ids(&cut), without_ids(&frames));
            let (sent, headers) = (rig.sent(), writes[0].len() - 12 - payloads(&frames, &writes[0]));
            let bytes: usize = frames.iter().map(Vec::len).sum();
            assert_eq!((sent.chains, sent.passed.packets), (frames.len() as u64, frames.len() as u64));
            assert_eq!((sent.passed.bytes, sent.passed.wire_bytes), (bytes as u64, bytes as u64));
            assert_eq!(sent.tap_operations, 1);
            assert_eq!(sent.tap_bytes, (bytes - (frames.len() - 1) * headers) as u64);
            assert_eq!(rig.used_index(), u16::try_from(frames.len()).unwrap());
        }
    }
}

/// Bytes of payload in all frames, by the header length that the write has.
fn payloads(frames: &[Vec<u8>], write: &[u8]) -> usize {
    let headers = usize::from(VnetHeader::decode(*write.first_chunk().unwrap()).hdr_len);
    frames.iter().map(|frame| frame.len() - headers).sum()
}

/// Frames with IPv4's ID left out where DF is set, and of the checksum over it only whether it is right.
fn without_ids(frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let without = |frame: &Vec<u8>| {
        let mut frame = frame.clone();
        let l3 = if frame[12..14] == [0x81, 0] { 18 } else { 14 };
        if frame[l3 - 2..l3] == [8, 0] && frame[l3 + 6] & 0x40 != 0 {
            let right = sum(&frame[l3..l3 + 20]) == u16::MAX;
            frame[l3 + 4..l3 + 6].fill(0);
            frame[l3 + 10..l3 + 12].copy_from_slice(&[u8::from(right), 0]);
        }
        frame
    };
    frames.iter().map(without).collect()
}

#[test]
fn a_run_ends_where_the_kernel_could_not_give_it_back() {
    let ends = Ends::default();
    let other = Ends { ports: [1, 2], ..ends };
    let short_in_between =
        [datagrams(ends, 2, 100), datagrams(ends, 1, 50), datagrams(ends, 2, 100)].concat();
    let longer_later = [datagrams(ends, 1, 50), datagrams(ends, 1, 100)].concat();
    let pushed = [stream(ends, 2, 100, PSH), stream(ends, 2, 100, 0)].concat();
    let interleaved: Vec<_> =
        datagrams(ends, 3, 60).into_iter().zip(datagrams(other, 3, 60)).flat_map(|(a, b)| [a, b]).collect();
    let mut unsummed = datagrams(ends, 2, 60);
    for frame in &mut unsummed {
        frame[40..42].fill(0);
    }
    let mut wrong = datagrams(ends, 4, 60);
    wrong[1][50] ^= 1;
    let mut first_wrong = datagrams(ends, 3, 60);
    first_wrong[0][50] ^= 1;
    let mut padded = datagrams(ends, 2, 10);
    padded[1].resize(60, 0);
    let mut wrong_ip = datagrams(ends, 2, 60);
    wrong_ip[1][24] ^= 1;
    let cases: [(&str, Vec<Vec<u8>>, usize); 10] = [
        ("a shorter one is the last", short_in_between, 2),
        ("a longer one is another run", longer_later, 2),
        ("PSH is the last", pushed, 2),
        ("another flow in between", interleaved, 6),
        ("no UDP checksum", unsummed, 2),
        ("a wrong checksum", wrong, 3),
        ("a wrong checksum first", first_wrong, 2),
        ("padding", padded, 2),
        ("a wrong IPv4 checksum", wrong_ip, 2),
        ("more than a packet holds", datagrams(ends, 50, 1400), 2),
    ];
    for (what, frames, writes) in cases {
        let mut rig = rig();
        let written = written(&mut rig, &frames);
        assert_eq!(written.len(), writes, "{what}");
        assert_eq!(without_ids(&cut_all(&written)), without_ids(&frames), "{what}");
        assert_eq!(rig.sent().tap_operations, writes as u64, "{what}");
    }
}

#[test]
fn where_it_is_not_wanted_each_frame_is_a_write_of_its_own() {
    for (coalesce, udp, tcp) in
        [(Coalesce::Nothing, 5, 5), (Coalesce::Tcp, 5, 1), (Coalesce::TcpAndUdp, 1, 1)]
    {
        let mut rig = rig();
        rig.coalesce = coalesce;
        assert_eq!(written(&mut rig, &datagrams(Ends::default(), 5, 60)).len(), udp);
        assert_eq!(written(&mut rig, &stream(Ends::default(), 5, 60, 0)).len(), tcp);
    }
}

#[test]
fn checksums_that_are_to_be_finished_are_not_summed_but_must_be_such_that_they_come_out_right() {
    let offloaded = |frame: &Vec<u8>| {
        let mut frame = frame.clone();
        frame[40..42].fill(0);
        let length = u16::try_from(frame.len() - 34).unwrap().to_be_bytes();
        let pseudo = sum(&[&frame[26..34], &[0, 17], &length].concat());
        frame[40..42].copy_from_slice(&pseudo.to_be_bytes());
        frame
    };
    let header =
        VnetHeader { flags: Flags::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VnetHeader::default() };
    let frames = datagrams(Ends::default(), 4, 700);
    let mut images: Vec<_> =
        frames.iter().map(|frame| [&header.encode()[..], &offloaded(frame)].concat()).collect();
    let mut rig = rig();
    rig.acked |= 1; // VIRTIO_NET_F_CSUM
    let writes = written_as(&mut rig, &images);
    assert_eq!((writes.len(), without_ids(&cut_all(&writes))), (1, without_ids(&frames)));
    images[2][12 + 40] ^= 1;
    assert_eq!(written_as(&mut rig, &images).len(), 3);
}

#[test]
fn frames_that_the_kernel_does_not_take_as_one_are_sent_one_by_one() {
    let mut rig = rig();
    // Whatever is not 8 bytes long is invalid to an eventfd.
    rig.tap = Tap::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap());
    let frames =
        [datagrams(Ends::default(), 3, 60), vec![frame(60)], datagrams(Ends::default(), 2, 60)].concat();
    for (n, frame) in (0..).zip(&frames) {
        rig.offer(n, &with_header(frame));
    }
    assert!(rig.transmit().more);
    assert_eq!((rig.sent().chains, rig.used_index()), (0, 0), "nothing happened to them yet");
    assert!(rig.transmit().more, "the second run is not taken as one either");
    assert_eq!(dropped(&rig.sent(), DropReason::TapRefused), 4);
    assert!(!rig.transmit().more);
    assert_eq!(dropped(&rig.sent(), DropReason::TapRefused), 6);
    assert_eq!((rig.sent().chains, rig.used_index()), (6, 6));
}

#[test]
fn a_tap_that_is_full_between_two_runs_loses_no_frame_and_doubles_none() {
    let mut rig = rig();
    rustix::net::sockopt::set_socket_send_buffer_size(&rig.tap, 4608).unwrap();
    let mut frames = Vec::new();
    for n in 0..12_u16 {
        let ends = Ends { ports: [n, 9], ..Ends::default() };
        frames.extend(datagrams(ends, 1 + u64::from(n % 4), 200));
    }
    for (n, frame) in (0..).zip(&frames) {
        rig.offer(n, &with_header(frame));
    }
    let (mut arrived, mut turns) = (Vec::new(), 0);
    while usize::from(rig.used_index()) < frames.len() {
        let turn = rig.transmit();
        assert_eq!(rig.sent().chains, u64::from(rig.used_index()));
        assert!(turn.waits_for == Some(WaitsFor::Room) || usize::from(rig.used_index()) == frames.len());
        arrived.extend(std::iter::from_fn(|| rig.at_far_end()).flat_map(|image| cut(&image)));
        turns += 1;
    }
    assert!(turns > 1, "the socket never was full");
    assert_eq!(without_ids(&arrived), without_ids(&frames));
}

/// One frame of a random mix: mostly the next one of a few streams, sometimes with something changed.
#[derive(Clone, Debug)]
struct Draw {
    flow: usize,
    short: bool,
    flags: u8,
    change: Option<(prop::sample::Index, u8, bool)>,
    id_step: u16,
}

fn draw() -> impl Strategy<Value = Draw> {
    let flags = prop_oneof![12 => Just(ACK), 1 => Just(ACK | PSH), 1 => any::<u8>()];
    let change = prop::option::weighted(0.15, (any::<prop::sample::Index>(), 1..=255_u8, any::<bool>()));
    let steps = prop_oneof![9 => Just(1_u16), 1 => any::<u16>()];
    (0..8_usize, prop::bool::weighted(0.1), flags, change, steps).prop_map(
        |(flow, short, flags, change, id_step)| Draw {
            flow: [0, 0, 0, 1, 1, 2, 3, 4][flow],
            short,
            flags,
            change,
            id_step,
        },
    )
}

/// The frames of a mix. A frame with a changed byte has, half of the time, its checksums made right again.
fn mix(draws: &[Draw]) -> Vec<Vec<u8>> {
    let (mut sequence, mut id) = (u32::MAX - 2000, 65_530_u16);
    let mut frames = Vec::new();
    for (n, draw) in (0..).zip(draws) {
        let payload = pattern(if draw.short { 33 } else { 120 }, n);
        let v4 = Ends::default();
        let mut frame = match draw.flow {
            0 => v4.udp(&payload),
            1 => {
                let segment = Segment { sequence, acknowledged: 9, flags: draw.flags, window: 64 };
                sequence = sequence.wrapping_add(u32::try_from(payload.len()).unwrap());
                v4.tcp(segment, &payload)
            }
            2 => Ends::v6().udp(&payload),
            3 => tagged(&v4.udp(&payload), &[(0x8100, 1)]),
            _ => frame(60),
        };
        if draw.flow < 2 {
            id = id.wrapping_add(draw.id_step);
            frame[18..20].copy_from_slice(&id.to_be_bytes());
            frame[20] = if n % 7 == 0 { 0x40 } else { 0 };
            mend(&mut frame);
        }
        if let Some((at, xor, mended)) = &draw.change {
            let at = at.index(frame.len().min(70));
            frame[at] ^= xor;
            if *mended && draw.flow < 2 {
                mend(&mut frame);
            }
        }
        frames.push(frame);
    }
    frames
}

/// Makes the checksums of an IPv4 packet without options right.
fn mend(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let header = !sum(&frame[14..34]);
    frame[24..26].copy_from_slice(&header.to_be_bytes());
    let field = match frame[23] {
        17 => 40,
        6 => 50,
        _ => return,
    };
    frame[field..field + 2].fill(0);
    let length = u16::try_from(frame.len() - 34).unwrap().to_be_bytes();
    let checksum = !sum(&[&frame[26..34], &[0, frame[23]], &length, &frame[34..]].concat());
    frame[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_put_together_is_cut_into_the_guests_frames(draws in prop::collection::vec(draw(), 1..60)) {
        let frames = mix(&draws);
        let mut rig = rig();
        let writes = written(&mut rig, &frames);
        prop_assert_eq!(rig.sent().tap_operations, writes.len() as u64);
        prop_assert_eq!(without_ids(&cut_all(&writes)), without_ids(&frames));
    }
}
