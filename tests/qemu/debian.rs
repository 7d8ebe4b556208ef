//! A whole Debian as the guest: systemd is its process 1, and it gets its address by a DHCP client of its own.

use crate::{
    bed::{Bed, Guest, IPERF_PORT, Seen, WEB1, Witness, settle},
    harness::count,
};

/// What the DHCP server gives: not the address that other guests are told to take.
const ADDRESS: &str = "10.0.0.77";
/// Frames that a guest may send and receive, unasked, when it goes down and when it comes up: DHCP, ARP, IPv6.
const OF_ITS_OWN: u64 = 100;

/// Waits until the guest has what DHCP gives: an address and a default route.
fn wait_for_address(guest: &Guest<'_>) {
    settle("an address and a default route by DHCP", || {
        let said = guest.run("ip -4 -o address show dev eth0; ip -4 route show default");
        let words = [&format!("inet {ADDRESS}/24 "), "default via 10.0.0.1 dev eth0 proto dhcp"];
        if words.iter().all(|words| said.contains(*words)) { Ok(()) } else { Err(said) }
    });
}

/// The guest has come back: it asks for its address again, and every count goes on from where it was.
fn comes_back(guest: &Guest<'_>, before: &Seen) -> Seen {
    wait_for_address(guest);
    let start = guest.at_its_start();
    let Witness { transmitted, received } = start.since(before.by_guest());
    assert!(transmitted.0 + received.0 < OF_ITS_OWN, "before {before:?}, when it came back {start:?}");
    let after = guest.talk_and_agree_since(start);
    assert_eq!(after.dropped(), 0, "dropped: {after:?}");
    after
}

#[test]
fn a_debian_gets_its_address_by_dhcp_and_comes_back_from_reboots() {
    let bed = Bed::new(&[WEB1]);
    bed.serve_dhcp(WEB1.name, ADDRESS);
    bed.serve_iperf(IPERF_PORT);
    let guest = Guest::start(&bed, WEB1.name, &["--image", "debian"]);
    assert_eq!(guest.run("cat /proc/1/comm").trim(), "systemd");
    wait_for_address(&guest);
    let mut seen = guest.talk_and_agree(&Seen::default());
    assert_eq!(seen.dropped(), 0, "dropped: {seen:?}");

    guest.run("networkctl down eth0 && networkctl up eth0");
    wait_for_address(&guest);
    seen = guest.talk_and_agree(&Seen::default());

    guest.run(
        "cd /sys/bus/virtio/drivers/virtio_net && device=$(ls -d virtio[0-9]*) && echo $device >unbind \
         && echo $device >bind",
    );
    seen = comes_back(&guest, &seen);

    for _ in 0..count(1, 5) {
        guest.reboot(); // systemctl reboot
        seen = comes_back(&guest, &seen);
    }
    assert_eq!(guest.run("systemctl is-system-running").trim(), "running");
}
