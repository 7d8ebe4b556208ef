//! libvirt starts the domains of `src/dist/libvirt`, by its own QEMU driver, with QEMU under the user that it has on
//! Debian.
//!
//! The machine's libvirt, if it has one, is left alone: a libvirtd of the test's own runs in a mount namespace that
//! has its own /run, /etc/libvirt and /var, and vmflow runs in there too, so that paths are as they are documented.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use tempfile::TempDir;

use crate::bed::{Bed, GATEWAY, GUEST, Guest, IPERF_PORT, Seen, Vm, WEB1, must, settle};

/// Becomes libvirtd, with everything that it writes in the directory `$0` or gone with the namespace. `$1` is Debian's
/// number for libvirt-qemu, which need not exist on a machine that runs tests.
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
# It asks every emulator that it finds what it can do, and loads every driver: one of each is enough.
ln -s "$(command -v qemu-system-x86_64)" "$0/bin/"
ln -s /usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so "$0/drivers/"
export LIBVIRT_DRIVER_DIR="$0/drivers" PATH="$0/bin:/usr/sbin:/sbin"
exec /usr/sbin/libvirtd -f "$0/libvirtd.conf"
"#;
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
        command.arg(QEMU_UID.to_string()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
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
        let mut command = Command::new("virsh");
        command.arg("--connect").arg(format!("qemu:///system?socket={}", socket.display()));
        command.args(arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// A subcommand of virsh that must succeed.
    fn must(&self, arguments: &[&str]) {
        let output = self.virsh(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "virsh {arguments:?}: {said}\n{}", self.log());
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
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist/libvirt").join(name);
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

fn validate(file: &Path) {
    must(Command::new("virt-xml-validate").arg(file).arg("domain"));
}

/// A shipped domain is valid and starts, with the lines for vmflow that it shows; all counts agree; and when it is
/// destroyed nobody is connected any more.
fn starts(name: &str) {
    let mut bed = Bed::without_vmflow(&[Vm { network_only: true, ..WEB1 }]);
    let mut domain = Domain::shipped(name);
    let configuration = format!("{}\nnetns = \"{}\"", domain.configuration(), bed.netns(DOMAIN));
    domain.for_test_guest(&bed);
    let libvirt = Libvirt::start(&bed);
    bed.configure(|setup| setup.with(&configuration).started_by(&libvirt.enter()));
    bed.start_vmflow();
    bed.bring_up_tap(DOMAIN);
    bed.serve_iperf(IPERF_PORT);

    libvirt.must(&["create", &domain.file(&bed)]);
    let qemu = libvirt.qemu();
    assert_eq!(owner(&qemu), QEMU_UID, "QEMU's user");
    let seen = Guest::adopt(&bed, DOMAIN, &qemu).talk_and_agree(&Seen::default());
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
