//! The Debian package: installed, upgraded under traffic, removed, purged.

use crate::host::{Host, VERSIONS};

#[test]
fn an_upgrade_touches_no_port_and_a_purge_leaves_nothing() {
    let host = Host::start();
    let install = |version: &str| host.run(&format!("dpkg --install /root/vmflow_{version}_amd64.deb"));
    let [old, new] = VERSIONS;
    host.write_vm();
    install(old);
    assert_eq!([host.unit("ActiveState"), host.unit("UnitFileState")], ["active", "enabled"]);
    assert!(host.run("vmflow check").contains("OK: 1 VM, 1 port"));
    // Debian's smallest installation leaves documentation out; what the package holds, its list says.
    let holds = host.run(&format!("dpkg-deb --contents /root/vmflow_{old}_amd64.deb"));
    for file in
        ["man8/vmflow.8.gz", "man5/vmflow.toml.5.gz", "bash-completion/completions/vmflow", "qemu-hook"]
    {
        assert!(holds.contains(file), "no {file} in the package:\n{holds}");
    }
    let (monitor, label) = (host.unit("MainPID"), host.label());
    let is_old = || host.outcome(&format!("readlink /proc/{monitor}/exe | grep -q deleted")).0 == Some(0);
    assert!(!is_old());

    host.send();
    let said = install(new);
    assert!(said.contains("systemctl restart vmflow starts the new one"), "{said}");
    let version = host.run("dpkg-query --show --showformat '${Version}' vmflow");
    assert_eq!([version.as_str(), &host.unit("MainPID")], [new, &monitor], "new on disk, the same at work");
    assert!(is_old());
    host.wait_for_frames();
    let sent = host.stop_sending();
    // A keeper can still be started by a monitor whose program is gone.
    host.send();
    let sent = sent + host.stop_sending();
    let port = host.port();
    assert_eq!((port.transmit.chains, port.transmit.forwarded.frames), (sent, sent), "{port:?}");
    assert_eq!((port.connections, port.worker_restarts), (2, 0), "{port:?}");
    host.run("systemctl restart vmflow");
    assert_ne!(host.unit("MainPID"), monitor);
    assert_eq!(host.label(), label);

    host.run("dpkg --remove vmflow");
    assert_eq!(host.outcome("systemctl is-active vmflow").1.trim(), "inactive");
    host.run("test -e /etc/vmflow/vmflow.toml && test -e /var/lib/vmflow/registry.json && ! pgrep vmf-");
    host.run("dpkg --purge vmflow");
    let left = host.run(
        "find / -xdev -name '*vmflow*' -not -path '/root/*' -not -path '/proc/*' -not -path '/var/log/*'",
    );
    let ours: Vec<_> = left.lines().filter(|path| !path.contains("vmflow-guest")).collect();
    assert!(ours.is_empty(), "left behind: {ours:?}");
}
