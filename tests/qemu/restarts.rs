//! Each part of the way ends and comes back: the guest, its driver, its VMM, vmflow, the worker. Traffic goes on, and so
//! do the numbers.

use rustix::process::{Pid, Signal, kill_process};

use crate::bed::{Bed, Guest, IPERF_PORT, Seen, WEB1, settle};

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
        guest.run(
            "cd /sys/bus/virtio/drivers/virtio_net && device=$(ls -d virtio[0-9]*) && echo $device >unbind \
             && echo $device >bind && configure-network",
        );
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
fn a_worker_is_killed_and_traffic_goes_on() {
    let bed = Bed::new(&[WEB1]);
    let (guest, before) = talking(&bed);
    let port = bed.vmflow().port(WEB1.name);
    let workers = bed.vmflow().processes("vmf-w");
    let [worker] = workers[..] else { panic!("one port has one worker, not {workers:?}") };
    kill_process(Pid::from_raw(worker.cast_signed()).unwrap(), Signal::KILL).unwrap();
    // Either it has got a successor, or the VMM has connected anew.
    settle("another worker", || {
        let now = bed.vmflow().port(WEB1.name);
        let another = now.worker_restarts > port.worker_restarts || now.connections > port.connections;
        if another && now.connected { Ok(()) } else { Err(format!("{now:?}")) }
    });
    guest.wait_for_answer();
    guest.iperf(4, "");
    guest.iperf(4, "--reverse");
    // It was killed between two frames: the guest, who has noticed nothing, still counts the same.
    let after = guest.agree(&Seen::default());
    assert!(after.transmit.chains > before.transmit.chains, "numbers go on: {before:?}, {after:?}");
}
