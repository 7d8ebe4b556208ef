//! vmflow as a service of systemd, on a host that boots, is administered and is rebooted.

use crate::{
    bed::settle,
    host::{Host, VERSIONS},
};

/// A unit that stands where libvirt's is: it must find vmflow at work when it starts, and still when it stops.
const LIBVIRT: &str = r#"[Unit]
Description=A stand-in for libvirt
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/vmflow vms
ExecStop=/bin/sh -c "vmflow vms >/root/vmflow-at-our-end"
[Install]
WantedBy=multi-user.target
"#;

#[test]
fn a_service_starts_reloads_restarts_and_ends_as_systemd_wants_it_and_goes_on_after_a_reboot() {
    let host = Host::start();
    host.write_vm();
    host.run(&format!("dpkg --install /root/vmflow_{}_amd64.deb", VERSIONS[0]));
    let (code, said) = host.outcome("systemd-analyze verify --man=no /lib/systemd/system/vmflow.service");
    assert_eq!((code, said.trim()), (Some(0), ""));
    // `systemctl start` returned when vmflow said that it is ready, so it answers at once.
    host.run("systemctl stop vmflow && systemctl start vmflow && vmflow vms");
    let label = host.label();
    reloads_under_traffic(&host);
    comes_back_after_a_kill(&host, label);

    host.send();
    host.run("systemctl stop vmflow && ! pgrep vmf- && ! ls -d /run/vmflow/*.sock /run/vmflow/*/*.sock");
    assert_eq!(host.unit("Result"), "success");
    host.kill_front_end();
    refuses_a_wrong_configuration(&host);
    let journal = host.journal();
    for words in ["ready: 1 VMs, 1 ports", "a front end is connected", "ended", "wrong.toml:1:"] {
        assert!(journal.contains(words), "the journal lacks {words}:\n{journal}");
    }
    goes_on_after_a_reboot(&host, label);
}

/// Under traffic the monitor is killed: its keepers follow, and systemd starts another one.
fn comes_back_after_a_kill(host: &Host, label: u64) {
    host.send();
    let killed = host.unit("MainPID");
    host.run(&format!("kill -KILL {killed}"));
    settle("another monitor", || {
        let [state, now] = ["ActiveState", "MainPID"].map(|property| host.unit(property));
        if state == "active" && now != killed { Ok(()) } else { Err(format!("{state}, {now}")) }
    });
    host.kill_front_end();
    assert_eq!(host.label(), label);
    host.send();
    host.stop_sending();
}

/// A reload adds a VM and takes it away, refuses what is wrong, and leaves the connection alone.
fn reloads_under_traffic(host: &Host) {
    let monitor = host.unit("MainPID");
    host.send();
    host.run("cd /etc/vmflow/vms.d && sed s/web1/web2/ web1.toml >web2.toml && systemctl reload vmflow");
    let has_web2 = || host.run("vmflow vms").contains("vmf-web2");
    settle("another VM", || if has_web2() { Ok(()) } else { Err("it is not there".into()) });
    host.run("rm /etc/vmflow/vms.d/web2.toml && echo 'nonsense = 1' >/etc/vmflow/vms.d/wrong.toml");
    assert_ne!(host.outcome("systemctl reload vmflow").0, Some(0), "a wrong configuration");
    assert!(has_web2(), "nothing has changed");
    host.run("rm /etc/vmflow/vms.d/wrong.toml && systemctl reload vmflow");
    settle("its end", || if has_web2() { Err("it is still there".into()) } else { Ok(()) });
    assert_eq!(host.unit("MainPID"), monitor);
    let sent = host.stop_sending();
    let port = host.port();
    assert_eq!((port.connections, port.transmit.forwarded.frames), (1, sent), "{port:?}");
}

/// What is wrong is said, and is not tried again and again.
fn refuses_a_wrong_configuration(host: &Host) {
    host.run("echo 'nonsense = 1' >/etc/vmflow/vms.d/wrong.toml");
    let (code, _) = host.outcome("systemctl start vmflow");
    let state = ["ActiveState", "Result", "ExecMainStatus", "NRestarts"].map(|property| host.unit(property));
    assert_eq!((code, state), (Some(1), ["failed", "exit-code", "2", "0"].map(String::from)));
    host.run("rm /etc/vmflow/vms.d/wrong.toml && systemctl start vmflow && vmflow vms");
}

/// The host is rebooted while a front end sends: vmflow is there before what starts VMs, and until that has ended;
/// and labels and numbers go on.
fn goes_on_after_a_reboot(host: &Host, label: u64) {
    host.run(&format!("printf '%s' '{LIBVIRT}' >/etc/systemd/system/libvirtd.service"));
    host.run("systemctl enable --now libvirtd");
    host.send();
    let before = host.port().transmit.chains;
    host.reboot();
    assert_eq!([host.unit("ActiveState"), host.unit("NRestarts")], ["active", "0"]);
    assert_eq!(host.run("systemctl is-active libvirtd").trim(), "active");
    host.run("grep web1 /root/vmflow-at-our-end");
    assert_eq!(host.label(), label);
    let after = host.port().transmit.chains;
    assert!(after >= before, "{before} frames before the reboot, {after} behind it");
    host.send();
    let sent = host.stop_sending();
    assert_eq!(host.port().transmit.chains, after + sent);
}
