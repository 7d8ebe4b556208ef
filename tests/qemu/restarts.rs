//! Each part of the way ends and comes back: the guest, its driver, its VMM, vmflow, the worker. Traffic goes on, and so
//! do the numbers.

use crate::{
    bed::{Bed, Guest, IPERF_PORT, Seen, WEB1},
    harness::{count, harass::Harasser},
};

/// Pings after each change.
const PINGS: u32 = 20;

/// A guest that has talked already.
fn talking(bed: &Bed) -> (Guest<'_>, Seen) {
    bed.serve_iperf(IPERF_PORT);
    let guest = Guest::start(bed, WEB1.name, &[]);
    let seen = guest.talk_and_agree(&Seen::default());
    (guest, seen)
}

#[test]
fn a_guest_reboots() {
    let bed = Bed::new(&[WEB1]);
    let (guest, before) = talking(&bed);
    guest.reboot();
    let after = guest.talk_and_agree(&before);
    assert_eq!(after.dropped(), 0, "dropped: {after:?}");
}

#[test]
fn a_driver_is_unbound_and_bound() {
    let bed = Bed::new(&[WEB1]);
    let (guest, mut before) = talking(&bed);
    for _ in 0..3 {
        guest.reload_driver();
        before = guest.talk_and_agree(&before);
    }
    assert_eq!(before.dropped(), 0, "dropped: {before:?}");
}

#[test]
fn a_vmm_is_killed_and_another_connects() {
    let bed = Bed::new(&[WEB1]);
    let (guest, before) = talking(&bed);
    guest.kill();
    bed.vmflow().wait_connected(WEB1.name, false);
    let guest = Guest::start(&bed, WEB1.name, &["--qemu", "10"]);
    guest.talk_and_agree(&before);
    assert_eq!(bed.vmflow().port(WEB1.name).connections, 2);
}

#[test]
fn vmflow_restarts_under_a_running_guest() {
    let bed = Bed::new(&[WEB1]);
    let (guest, _) = talking(&bed);
    bed.stop_vmflow();
    assert_eq!(guest.ping(1), 0, "nobody was there to forward a ping");
    bed.start_vmflow();
    bed.vmflow().wait_connected(WEB1.name, true);
    guest.wait_for_answer();
    guest.iperf(4, "");
    guest.iperf(4, "--reverse");
}

#[test]
fn workers_are_killed_under_traffic_and_the_guest_notices_nothing() {
    let bed = Bed::new(&[WEB1]);
    let (guest, _) = talking(&bed);
    let harasser = Harasser::of(&bed.vmflow(), WEB1.name);
    guest.iperf(count(4, 200), "");
    guest.iperf(count(4, 200), "--reverse");
    let kills = harasser.stop();
    undisturbed(&guest, kills);
    let after = guest.agree(&Seen::default());
    println!("{kills} kills: {} uncertain, {} frames dropped", after.uncertain, after.dropped());
    assert!(after.dropped() <= kills, "at most one frame a death: {after:?}");
}

#[test]
fn workers_are_killed_through_boot_and_driver_reloads_and_no_ping_is_lost() {
    let bed = Bed::new(&[WEB1]);
    let harasser = Harasser::of(&bed.vmflow(), WEB1.name);
    let guest = Guest::start(&bed, WEB1.name, &[]);
    assert_eq!(guest.ping(PINGS), PINGS, "answers after the boot");
    for _ in 0..count(2, 10) {
        guest.reload_driver();
        assert_eq!(guest.ping(PINGS), PINGS, "answers after a reload");
    }
    guest.reboot();
    assert_eq!(guest.ping(PINGS), PINGS, "answers after a reboot");
    let kills = harasser.stop();
    assert_eq!(guest.ping(PINGS), PINGS, "answers when it is over");
    undisturbed(&guest, kills);
    println!("{kills} kills: {} uncertain", bed.vmflow().port(WEB1.name).uncertain);
}

/// The VMM was never told anything, and has nothing to say.
fn undisturbed(guest: &Guest<'_>, kills: u64) {
    let port = guest.bed.vmflow().port(guest.name);
    assert_eq!((port.connections, port.connections_given_up), (1, 0));
    assert!(kills > 10 && port.worker_restarts == kills, "{kills} kills, {} deaths", port.worker_restarts);
    assert!(port.uncertain <= 2 * kills);
    let said = guest.qemu_said();
    // Said once when it connects: QEMU uses no configuration space of ours.
    let news: Vec<_> = said.lines().filter(|line| !line.contains("VHOST_USER_PROTOCOL_F_CONFIG")).collect();
    assert!(news.is_empty() && said.lines().count() <= 1, "QEMU said: {said}");
    let carrier = guest.run("cat /sys/class/net/eth0/carrier_changes");
    assert!(carrier.trim().parse::<u32>().unwrap() <= 2, "the link went up once: {carrier}");
}
