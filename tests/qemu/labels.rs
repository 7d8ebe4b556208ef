//! What vmflow is for: every frame under its VM's label, and under the suspect label exactly while there is a tag.

use vmflow::ledger::{DropReason, Volume};

use crate::{
    bed::{Bed, GUEST, Guest, IPERF_PORT, Seen, Vm, WEB1, WEB2, settle},
    harness::{count, dropped},
};

const PINGS: u32 = 20;

/// Frames under the normal and the suspect label, in transmit and receive.
fn frames(seen: &Seen) -> [(u64, u64); 2] {
    [&seen.transmit, &seen.receive].map(|totals| (totals.normal.frames, totals.suspect.frames))
}

#[test]
fn an_operators_tag_is_on_every_frame_from_then_on_until_it_is_cleared() {
    let bed = Bed::new(&[WEB1]);
    let guest = Guest::start(&bed, WEB1.name, &[]);
    assert_eq!(guest.ping(PINGS), PINGS);
    let normal = guest.agree(&Seen::default());
    assert_eq!((normal.transmit.suspect, normal.receive.suspect), (Volume::default(), Volume::default()));

    bed.vmflow().ok(&["suspect", WEB1.name, "--reason", "a test"]);
    assert_eq!(guest.ping(PINGS), PINGS, "the action is count: nothing is lost");
    let tagged = guest.agree(&Seen::default());
    assert_eq!(frames(&tagged).map(|f| f.0), frames(&normal).map(|f| f.0), "no frame is normal any more");
    assert!(
        frames(&tagged).iter().all(|f| f.1 >= u64::from(PINGS)),
        "each ping and answer is suspect: {tagged:?}"
    );

    bed.vmflow().ok(&["clear", WEB1.name]);
    assert_eq!(guest.ping(PINGS), PINGS);
    let cleared = guest.agree(&Seen::default());
    assert_eq!(frames(&cleared).map(|f| f.1), frames(&tagged).map(|f| f.1), "no frame is suspect any more");
    assert_eq!(cleared.dropped(), 0);
}

#[test]
fn a_tag_that_comes_and_goes_under_load_loses_nothing() {
    let bed = Bed::new(&[WEB1]);
    bed.serve_iperf(IPERF_PORT);
    let guest = Guest::start(&bed, WEB1.name, &[]);
    let suspect_frames = || Seen::of(&bed, WEB1.name).transmit.suspect.frames;
    let normal_frames = || Seen::of(&bed, WEB1.name).transmit.normal.frames;
    let grows = |what: &str, frames: &dyn Fn() -> u64| {
        let (before, enough) = (frames(), 100);
        settle(what, || if frames() >= before + enough { Ok(()) } else { Err(format!("{before} before")) });
    };
    // In the guest's background: this thread changes the tag meanwhile.
    guest.run(&format!(
        "(iperf3 --client {server} --port {IPERF_PORT} --time 120 >/tmp/iperf 2>&1; echo over >>/tmp/iperf) &",
        server = crate::bed::SERVER
    ));
    for _ in 0..count(3, 20) {
        grows("normal frames", &normal_frames);
        bed.vmflow().ok(&["suspect", WEB1.name, "--reason", "a test"]);
        grows("suspect frames", &suspect_frames);
        bed.vmflow().ok(&["clear", WEB1.name]);
    }
    guest.run("killall -INT iperf3");
    guest.run("until grep -q over /tmp/iperf; do usleep 10000; done");
    let seen = guest.agree(&Seen::default());
    assert_eq!(seen.dropped(), 0, "dropped: {seen:?}");
}

#[test]
fn two_guests_that_no_packet_tells_apart_are_counted_each_for_itself() {
    const SECOND_PORT: u16 = 5202;
    const SOURCE_PORT: u16 = 40000;
    let stopped = Vm { own: "suspect = { action = \"drop\" }", ..WEB2 };
    let bed = Bed::new(&[WEB1, stopped]);
    bed.serve_iperf(IPERF_PORT);
    bed.serve_iperf(SECOND_PORT);
    bed.take_second_guest_to(SECOND_PORT);
    let guests = Guest::start_both(&bed, [WEB1.name, WEB2.name]);
    let identity =
        guests.map(|guest| guest.run("cat /sys/class/net/eth0/address; ip -4 -o address show dev eth0"));
    assert_eq!(identity[0], identity[1], "same MAC, same address");

    // Not the same amount, so that numbers that are mixed up are seen.
    let words = format!("--bind {GUEST} --cport {SOURCE_PORT} --time {}", count(3, 30));
    let mut processes = [(guests[0], "--bitrate 40M"), (guests[1], "--bitrate 160M")]
        .map(|(guest, rate)| guest.start_iperf(&format!("{words} {rate}")));
    for process in &mut processes {
        assert!(process.wait().unwrap().success(), "iperf3 of both ends well");
    }
    let [one, two] = guests.map(|guest| guest.agree(&Seen::default()));
    assert!(two.transmit.passed.bytes > 2 * one.transmit.passed.bytes, "{one:?}\n{two:?}");
    assert_eq!(one.dropped() + two.dropped(), 0);

    bed.vmflow().ok(&["suspect", WEB2.name, "--reason", "a test"]);
    assert_eq!(guests.map(|guest| guest.ping(3)), [3, 0], "only the marked one is stopped");
    let [one, two] = guests.map(|guest| guest.agree(&Seen::default()));
    assert_eq!(one.dropped(), 0, "{one:?}");
    assert_eq!(frames(&one).map(|f| f.1), [0, 0], "{one:?}");
    let stopped = dropped(&two.transmit, DropReason::SuspectPolicy);
    assert!(stopped >= 3, "each ping was dropped: {two:?}");
    assert_eq!(stopped, two.transmit.suspect.frames, "all that is suspect, and nothing else: {two:?}");
}
