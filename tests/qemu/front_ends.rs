//! Each front end that people have, and each set of features that changes what a frame looks like.

use crate::{
    bed::{Bed, Guest, IPERF_PORT, SERVER, Seen, Vm, WEB1, random_file, settle, sha256},
    harness::count,
};

/// One guest, started with these options, has pinged and sent and received by TCP, and every count agrees.
fn talks(vm: Vm, options: &[&str]) {
    let bed = Bed::new(&[vm]);
    bed.serve_iperf(IPERF_PORT);
    let seen = Guest::start(&bed, vm.name, options).talk_and_agree(&Seen::default());
    assert_eq!(seen.dropped(), 0, "dropped: {seen:?}");
}

#[test]
fn qemu_7_connects() {
    talks(WEB1, &["--qemu", "7"]);
}

#[test]
fn qemu_10_connects() {
    talks(WEB1, &["--qemu", "10"]);
}

const CLIENT: Vm = Vm { port: "mode = \"client\"", ..WEB1 };

#[test]
fn qemu_7_listens() {
    talks(CLIENT, &["--qemu", "7", "--listen"]);
}

#[test]
fn qemu_10_listens() {
    talks(CLIENT, &["--qemu", "10", "--listen"]);
}

#[test]
fn a_guest_without_mergeable_buffers_talks() {
    talks(WEB1, &["--device", "mrg_rxbuf=off"]);
}

#[test]
fn a_guest_without_checksum_offload_talks() {
    talks(WEB1, &["--device", "csum=off"]);
}

#[test]
fn a_guest_without_indirect_descriptors_talks() {
    talks(WEB1, &["--device", "indirect_desc=off"]);
}

#[test]
fn a_guest_without_event_index_talks() {
    talks(WEB1, &["--device", "event_idx=off"]);
}

#[test]
fn a_file_comes_through_whole_both_ways() {
    const DOWN: u16 = 7000;
    const UP: u16 = 7001;
    const MIB: u64 = 1 << 20;
    let bed = Bed::new(&[WEB1]);
    let guest = Guest::start(&bed, WEB1.name, &[]);
    let (original, returned) = (bed.file("original"), bed.file("returned"));
    random_file(&original, count(4, 64) * MIB);
    let from = format!("FILE:{}", original.display());
    let to = format!("CREATE:{}", returned.display());

    bed.serve(DOWN, "socat", &["-u", &from, &format!("TCP-LISTEN:{DOWN}")]);
    let inside = guest.run(&format!("nc {SERVER} {DOWN} </dev/null >/tmp/file && sha256sum /tmp/file"));
    assert_eq!(inside.split_whitespace().next(), Some(&*sha256(&original)), "in the guest");

    bed.serve(UP, "socat", &["-u", &format!("TCP-LISTEN:{UP}"), &to]);
    guest.run(&format!("nc {SERVER} {UP} </tmp/file >/dev/null"));
    settle("the file's return", || {
        let (sent, back) = (sha256(&original), sha256(&returned));
        if sent == back { Ok(()) } else { Err(format!("sent {sent}, got {back}")) }
    });
    guest.agree(&Seen::default());
}
