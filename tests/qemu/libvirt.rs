//! libvirt starts the domains of `src/dist/libvirt`, by its own QEMU driver, with QEMU under the user that it has on
//! Debian.
//!
//! The machine's libvirt, if it has one, is left alone: a libvirtd of the test's own runs in a mount namespace that
//! has its own /run, /etc/libvirt and /var, and vmflow runs in there too, so that paths are as they are documented.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use tempfile::TempDir;

use crate::{
    bed::{Bed, GATEWAY, GUEST, Guest, IPERF_PORT, Seen, Vm, WEB1, must, settle},
    harness::VMFLOW,
};

/// Becomes libvirtd, with everything that it writes in the directory `$0` or gone with the namespace. `$1` is Debian's
/// number for libvirt-qemu, which need not exist on a machine that runs tests; `$2` is the hook, `$3` vmflow and `$4`
/// its control socket.
const PRIVATE_LIBVIRTD: &str = r#"
set -e
mount --make-rprivate /
mkdir -p "$0/libvirt" "$0/log" "$0/netns" "$0/bin" "$0/drivers"
mount --rbind /run/netns "$0/netns"
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/libvirt /run/netns /run/vmflow
mount --move "$0/netns" /run/netns
mount --bind "$0/libvirt" /run/libvirt
for directory in /var/lib /var/cache /var/log; do mount -t tmpfs -o mode=755 tmpfs "$directory"; done
mkdir /var/log/libvirt
mount --bind "$0/log" /var/log/libvirt
mount -t tmpfs -o mode=755 tmpfs /etc/libvirt
cat >/etc/libvirt/qemu.conf <<CONF
user = "libvirt-qemu"
group = "libvirt-qemu"
cgroup_controllers = []
security_driver = []
namespaces = []
stdio_handler = "file"
CONF
for table in passwd group; do sed '/^libvirt-qemu:/d' "/etc/$table" >"$0/$table"; done
echo "libvirt-qemu:x:$1:$1::/var/lib/libvirt:/usr/sbin/nologin" >>"$0/passwd"
echo "libvirt-qemu:x:$1:" >>"$0/group"
# As on Debian: else it would ask QEMU again and again what it can do without KVM.
sed -i 's/^kvm:.*[^:]$/&,libvirt-qemu/; s/^kvm:.*:$/&libvirt-qemu/' "$0/group"
for table in passwd group; do mount --bind "$0/$table" "/etc/$table"; done
cat >"$0/libvirtd.conf" <<CONF
unix_sock_rw_perms = "0700"
auth_unix_rw = "none"
CONF
install -D -m 755 "$2" /etc/libvirt/hooks/qemu.d/50-vmflow
ln -s "$3" "$0/bin/vmflow"
ln -s "$4" /run/vmflow/control.sock
# It asks every emulator that it finds what it can do, and loads every driver: one of each is enough.
ln -s "$(command -v qemu-system-x86_64)" "$0/bin/"
ln -s /usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so "$0/drivers/"
export LIBVIRT_DRIVER_DIR="$0/drivers" PATH="$0/bin:/usr/sbin:/sbin"
exec /usr/sbin/libvirtd -f "$0/libvirtd.conf"
"#;
/// How long libvirt may take for a request: it waits for QEMU without a limit, and QEMU for vmflow.
const VIRSH_SECONDS: &str = "60";
/// Debian's number for the user libvirt-qemu.
const QEMU_UID: u32 = 64055;
/// The domain of `src/dist/libvirt`.
const DOMAIN: &str = "web1";

/// A libvirtd of the test's own.
struct Libvirt {
    daemon: Child,
    directory: TempDir,
}

impl Libvirt {
    /// Starts it in this network namespace, after everything in /run/netns is there.
    fn start(bed: &Bed) -> Self {
        let directory = tempfile::Builder::new().prefix("vmflow-libvirt-").tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let log = fs::File::create(directory.path().join("libvirtd.log")).unwrap();
        let mut command = bed.inside("srv", "unshare");
        command.args(["--mount", "sh", "-c", PRIVATE_LIBVIRTD]).arg(directory.path());
        command.arg(QEMU_UID.to_string()).arg(shipped("qemu-hook")).arg(VMFLOW).arg(bed.file("control.sock"));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut libvirt = Self { daemon: command.spawn().unwrap(), directory };
        settle("libvirtd", || {
            if let Some(status) = libvirt.daemon.try_wait().unwrap() {
                panic!("libvirtd ended with {status}: {}", libvirt.log());
            }
            let output = libvirt.virsh(&["list"]);
            if output.status.success() { Ok(()) } else { Err(libvirt.log()) }
        });
        libvirt
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("libvirtd.log")).unwrap()
    }

    fn virsh(&self, arguments: &[&str]) -> Output {
        let socket = self.directory.path().join("libvirt/libvirt-sock");
        let mut command = Command::new("timeout");
        command
            .args([VIRSH_SECONDS, "virsh", "--connect"])
            .arg(format!("qemu:///system?socket={}", socket.display()));
        command.args(arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// A subcommand of virsh that must succeed.
    fn must(&self, arguments: &[&str]) {
        let output = self.virsh(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "virsh {arguments:?}: {said}\n{}", self.log());
    }

    /// A subcommand of virsh that must fail; gives what it says.
    fn refuses(&self, arguments: &[&str]) -> String {
        let output = self.virsh(arguments);
        assert!(!output.status.success(), "virsh {arguments:?} did not fail");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// The words before a command that is to see what libvirtd sees.
    fn enter(&self) -> [String; 2] {
        ["nsenter".into(), format!("--mount=/proc/{}/ns/mnt", self.daemon.id())]
    }

    /// QEMU's process.
    fn qemu(&self) -> String {
        fs::read_to_string(self.directory.path().join(format!("libvirt/qemu/{DOMAIN}.pid"))).unwrap()
    }

    fn domains(&self) -> String {
        let output = self.virsh(&["list", "--all", "--name"]);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let qemu = self.directory.path().join(format!("log/qemu/{DOMAIN}.log"));
            eprintln!("libvirtd said:\n{}", self.log());
            eprintln!("QEMU said:\n{}", fs::read_to_string(qemu).unwrap_or_default());
        }
        for domain in self.domains().lines() {
            self.virsh(&["destroy", domain]);
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// One of the files in `src/dist/libvirt`, adapted as its reader would do it.
struct Domain(String);

impl Domain {
    /// As it is shipped, which must be valid.
    fn shipped(name: &str) -> Self {
        let path = shipped(name);
        validate(&path);
        Self(fs::read_to_string(&path).unwrap())
    }

    /// As a file, which must be valid.
    fn file(&self, bed: &Bed) -> String {
        let path = bed.file("domain.xml");
        fs::write(&path, &self.0).unwrap();
        validate(&path);
        path.display().to_string()
    }

    /// Puts something in the place of everything from `first` to `last`, of which there must be one.
    fn put(&mut self, first: &str, last: &str, new: &str) {
        assert_eq!(self.0.matches(first).count(), 1, "{first} in {}", self.0);
        let start = self.0.find(first).unwrap();
        let end =
            start + self.0[start..].find(last).unwrap_or_else(|| panic!("{last} in {}", self.0)) + last.len();
        self.0.replace_range(start..end, new);
    }

    /// The lines between two words, without them.
    fn between(&self, first: &str, last: &str) -> &str {
        let start = self.0.find(first).unwrap() + first.len();
        let end = start + self.0[start..].find(last).unwrap();
        &self.0[start..end]
    }

    /// What the file says for vmflow.toml.
    fn configuration(&self) -> String {
        let lines = self.between("vmflow.toml:\n", "\n\n  libvirt-qemu is").lines();
        lines.map(str::trim).collect::<Vec<_>>().join("\n")
    }

    /// Is for a VM that is in vmflow.toml.
    fn without_hook(&mut self) {
        self.0 = self.0.replace("<target dev='vmf-web1'/>", "");
    }

    /// Is for a VM that the hook adds.
    fn for_hook(&mut self, bed: &Bed) {
        let metadata = self.between("that has this socket.\n", "-->").to_owned();
        self.put("<!-- Only the hook reads this: keys", "-->", &metadata);
        self.put("bridge='br0'", "'br0'", &format!("netns='{}'", bed.netns(DOMAIN)));
    }

    /// Has the guest of `setup` instead of a disk, on QEMU 7.2 without KVM.
    fn for_test_guest(&mut self, bed: &Bed) {
        // libvirt gives kernel and initramfs to QEMU's user, so they are copies.
        let [kernel, initramfs] = ["kernel/vmlinuz", "initramfs.cpio"].map(|name| copy_of(name, bed));
        let folder = bed.guest(DOMAIN);
        fs::create_dir_all(&folder).unwrap();
        let folder = folder.display();
        let boot = format!(
            "<kernel>{kernel}</kernel><initrd>{initramfs}</initrd><cmdline>console=ttyS0 quiet panic=-1 \
             vmflow.name={DOMAIN} vmflow.ip={GUEST}/24 vmflow.gw={GATEWAY}</cmdline>"
        );
        let ports = format!(
            "<serial type='file'><source path='{folder}/console.log'/><target port='0'/></serial>\
             <serial type='unix'><source mode='bind' path='{folder}/commands.sock'/><target port='1'/></serial>"
        );
        self.put("type='kvm'", "'kvm'", "type='qemu'");
        self.put("<boot ", ">", &boot);
        self.put("<disk ", "</disk>", "");
        self.put("<memory ", "</memory>", "<memory unit='MiB'>192</memory>");
        self.put("<console ", ">", &ports);
        let no_vectors = self.between("nowhere else, add:\n", "-->").to_owned();
        self.put("<!-- QEMU 7.2", "-->", &no_vectors);
    }
}

/// A copy of something in target/guest.
fn copy_of(name: &str, bed: &Bed) -> String {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest").join(name);
    let to = bed.file(from.file_name().unwrap().to_str().unwrap());
    fs::copy(&from, &to).unwrap_or_else(|e| panic!("{}: {e}: run qemu-scripts/setup", from.display()));
    to.display().to_string()
}

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist/libvirt").join(name)
}

fn validate(file: &Path) {
    must(Command::new("virt-xml-validate").arg(file).arg("domain"));
}

/// A bed with the network of the domain's VM, a libvirtd in it, and vmflow, which is told this.
fn bed_with_libvirt(configuration: impl FnOnce(&Bed) -> String) -> (Bed, Libvirt) {
    let mut bed = Bed::without_vmflow(&[Vm { network_only: true, ..WEB1 }]);
    let libvirt = Libvirt::start(&bed);
    let configuration = configuration(&bed);
    bed.configure(|setup| setup.with(&configuration).started_by(&libvirt.enter()));
    bed.start_vmflow();
    bed.serve_iperf(IPERF_PORT);
    (bed, libvirt)
}

/// A shipped domain is valid and starts, with the lines for vmflow that it shows; all counts agree; and when it is
/// destroyed nobody is connected any more.
fn starts(name: &str) {
    let mut domain = Domain::shipped(name);
    let configuration = domain.configuration();
    let (bed, libvirt) =
        bed_with_libvirt(|bed| format!("{configuration}\nnetns = \"{}\"", bed.netns(DOMAIN)));
    bed.bring_up_tap(DOMAIN);
    domain.without_hook();
    domain.for_test_guest(&bed);
    libvirt.must(&["create", &domain.file(&bed)]);
    assert_eq!(owner(&libvirt.qemu()), QEMU_UID, "QEMU's user");
    let seen = Guest::adopt(&bed, DOMAIN, &libvirt.qemu()).talk_and_agree(&Seen::default());
    assert_eq!(seen.dropped(), 0, "dropped: {seen:?}");

    libvirt.must(&["destroy", DOMAIN]);
    assert_eq!(libvirt.domains(), "", "domains that are left");
    bed.vmflow().wait_connected(DOMAIN, false);
}

/// The user that a process runs as.
fn owner(process: &str) -> u32 {
    fs::metadata(format!("/proc/{process}")).unwrap().uid()
}

#[test]
fn a_domain_that_connects_is_valid_and_works() {
    starts("qemu-connects.xml");
}

#[test]
fn a_domain_that_listens_is_valid_and_works() {
    starts("qemu-listens.xml");
}

#[test]
fn the_hook_adds_a_domain_and_removes_it_and_its_label_stays() {
    let (bed, libvirt) = bed_with_libvirt(|_| String::new());
    let mut domain = Domain::shipped("qemu-connects.xml");
    domain.for_hook(&bed);
    domain.for_test_guest(&bed);
    let file = domain.file(&bed);
    let vms = || bed.vmflow().stats().vms;
    assert!(vms().is_empty());

    libvirt.must(&["create", &file]);
    bed.bring_up_tap(DOMAIN);
    Guest::adopt(&bed, DOMAIN, &libvirt.qemu()).talk_and_agree(&Seen::default());
    let [vm] = &vms()[..] else { panic!("{:?}", vms()) };
    let uuid = domain.between("<uuid>", "</uuid>");
    assert_eq!((vm.name.as_str(), vm.uuid.map(|uuid| uuid.to_string()).as_deref()), (DOMAIN, Some(uuid)));
    libvirt.must(&["destroy", DOMAIN]);
    settle("the VM's removal", || if vms().is_empty() { Ok(()) } else { Err(format!("{:?}", vms())) });

    libvirt.must(&["create", &file]);
    let [again] = &vms()[..] else { panic!("{:?}", vms()) };
    assert_eq!(again.label, vm.label, "the label of the same UUID");
    libvirt.must(&["destroy", DOMAIN]);
}

#[test]
fn a_domain_that_cannot_be_added_does_not_start_and_one_that_cannot_be_removed_ends() {
    let (bed, libvirt) = bed_with_libvirt(|_| String::new());
    let mut domain = Domain::shipped("qemu-connects.xml");
    domain.for_hook(&bed);
    domain.for_test_guest(&bed);
    let good = domain.0.clone();

    domain.put("<target dev='vmf-web1'/>", ">", "");
    let said = libvirt.refuses(&["create", &domain.file(&bed)]);
    let line = "vmflow: domain \"web1\": its interface at \"/run/vmflow/web1/net0.sock\" has no tap: \
                add <target dev='TAP'/>, or the VM to vmflow.toml";
    assert!(said.contains(line), "{said}");
    domain.0 = good.replace("netns='", "nets='");
    let said = libvirt.refuses(&["create", &domain.file(&bed)]);
    assert!(said.contains("unknown key \"nets\": did you mean \"netns\"?"), "{said}");
    assert_eq!(libvirt.domains(), "");

    domain.0 = good;
    libvirt.must(&["create", &domain.file(&bed)]);
    bed.stop_vmflow();
    libvirt.must(&["destroy", DOMAIN]);
    assert_eq!(libvirt.domains(), "");
    let said = libvirt.refuses(&["create", &domain.file(&bed)]);
    assert!(said.contains("is `vmflow serve` running"), "{said}");
}
