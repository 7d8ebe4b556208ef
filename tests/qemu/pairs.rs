//! Guests with several queue pairs, which change how many they use.

use crate::bed::{Bed, Guest, IPERF_PORT, SERVER, Seen, Vm, WEB1, must, settle};

/// A VM whose port has so many pairs.
pub const TWO: Vm = Vm { port: "queue_pairs = 2", ..WEB1 };
const FOUR: Vm = Vm { port: "queue_pairs = 4", ..WEB1 };

/// Waits until so many queues of the VM's tap are attached.
pub fn wait_attached(bed: &Bed, vm: &str, queues: usize) {
    let listed = format!("/sys/class/net/vmf-{vm}/queues");
    settle("the tap's queues", || {
        let listed = must(bed.inside(vm, "ls").arg(&listed));
        let attached = listed.lines().filter(|queue| queue.starts_with("tx-")).count();
        if attached == queues { Ok(()) } else { Err(format!("{attached} are attached")) }
    });
}

/// How many frames each pair of the guest has carried: received, sent.
fn of_pairs(guest: &Guest<'_>) -> Vec<(u64, u64)> {
    let said = guest.run("ethtool -S eth0");
    let counter = |direction: &str, pair: usize| {
        let name = format!("{direction}_queue_{pair}_packets: ");
        said.lines().find_map(|line| line.trim().strip_prefix(&name)?.parse::<u64>().ok())
    };
    (0..).map_while(|pair| counter("rx", pair).zip(counter("tx", pair))).collect()
}

/// The guest uses so many pairs from now on, all of which then carry frames both ways.
fn use_pairs(guest: &Guest<'_>, pairs: usize) -> Seen {
    // It refuses a change to what it has.
    guest.run(&format!("ethtool -l eth0 | tail -n1 | grep -w {pairs} || ethtool -L eth0 combined {pairs}"));
    wait_attached(guest.bed, guest.name, pairs);
    let before = of_pairs(guest);
    for direction in ["", "--reverse"] {
        guest.run(&format!(
            "iperf3 --client {SERVER} --port {IPERF_PORT} --bytes 16M --parallel 8 {direction}"
        ));
    }
    let seen = guest.talk_and_agree(&Seen::default());
    assert_eq!(seen.dropped(), 0, "dropped: {seen:?}");
    for (pair, (before, after)) in before.iter().zip(of_pairs(guest)).enumerate() {
        let used = pair < pairs;
        assert_eq!((after.0 > before.0, after.1 > before.1), (used, used), "pair {pair} of {pairs}");
    }
    seen
}

fn changes_its_mind(qemu: &str) {
    let bed = Bed::new(&[TWO]);
    bed.serve_iperf(IPERF_PORT);
    let guest = Guest::start(&bed, TWO.name, &["--qemu", qemu, "--queues", "2"]);
    for pairs in [2, 1, 2] {
        use_pairs(&guest, pairs);
    }
}

#[test]
fn a_guest_of_qemu_7_changes_how_many_pairs_it_uses() {
    changes_its_mind("7");
}

#[test]
fn a_guest_of_qemu_10_changes_how_many_pairs_it_uses() {
    changes_its_mind("10");
}

#[test]
fn a_vmm_that_takes_fewer_pairs_than_offered_is_served_and_its_guest_may_reboot() {
    let bed = Bed::new(&[FOUR]);
    bed.serve_iperf(IPERF_PORT);
    let guest = Guest::start(&bed, FOUR.name, &["--queues", "2"]);
    let before = use_pairs(&guest, 2);
    guest.reboot();
    wait_attached(&bed, FOUR.name, 2);
    guest.talk_and_agree_since(guest.at_its_start());
    assert!(Seen::of(&bed, FOUR.name).transmit.chains > before.transmit.chains);
}
