//! Shuts the door: what a keeper, and the worker that it forks, cannot do any more.
//!
//! Order matters: the namespaces need the rights that the last steps give away for good.

use std::io;

use rustix::{
    fs::Gid,
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    process::{
        DumpableBehavior, Resource, Rlimit, Signal, Uid, chdir, pivot_root, set_dumpable_behavior,
        set_parent_process_death_signal, setrlimit,
    },
    thread::{
        CapabilitySet, CapabilitySets, UnshareFlags, remove_capability_from_bounding_set, set_capabilities,
        set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};

/// Descriptors that a keeper or a worker may have: regions, eventfds and what it was started with.
const DESCRIPTORS_MAX: u64 = 512;

/// Why the door could not be shut: nothing is served then.
#[derive(Debug, thiserror::Error)]
#[error("cannot give up rights: {what}: {why}")]
pub struct DoorError {
    what: &'static str,
    why: Errno,
}

/// Leaves every namespace that holds anything, every right, and root.
///
/// # Errors
/// [`DoorError`] names the step.
pub fn shut(uid: u32) -> Result<(), DoorError> {
    step("new namespaces", new_namespaces())?;
    step("an empty root directory", empty_root())?;
    step("resource limits", limits())?;
    step("capability bounding set", empty_bounding_set())?;
    step("user and group", become_user(uid))?;
    step("capabilities", empty_capabilities())?;
    step("no_new_privs", set_no_new_privs(true))?;
    step("core dumps", set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
    // When the monitor dies the port is finished in good order. (A change of user clears this, so it is last.)
    step("death signal", set_parent_process_death_signal(Some(Signal::TERM)))
}

fn step(what: &'static str, done: Result<(), Errno>) -> Result<(), DoorError> {
    done.map_err(|why| DoorError { what, why })
}

/// New and empty namespaces for this thread.
#[expect(unsafe_code, reason = "unshare is marked unsafe for its effect on descriptor tables")]
pub(crate) fn new_namespaces() -> Result<(), Errno> {
    let flags = UnshareFlags::NEWNET | UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: the descriptor table is not among the flags, so no descriptor changes its meaning.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

fn empty_root() -> Result<(), Errno> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // Any directory will do to mount on; /proc is there (it was needed before).
    mount("vmflow", "/proc", "tmpfs", flags, c"size=4k,mode=0555")?;
    chdir("/proc")?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")
}

fn limits() -> Result<(), Errno> {
    let both = |n| Rlimit { current: Some(n), maximum: Some(n) };
    setrlimit(Resource::Nofile, both(DESCRIPTORS_MAX))?;
    setrlimit(Resource::Core, both(0))
}

fn empty_bounding_set() -> Result<(), Errno> {
    for capability in CapabilitySet::all().iter() {
        match remove_capability_from_bounding_set(capability) {
            // The kernel knows fewer capabilities than the library.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn become_user(uid: u32) -> Result<(), Errno> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_thread_groups(&[])?;
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)
}

fn empty_capabilities() -> Result<(), Errno> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

impl From<DoorError> for io::Error {
    fn from(error: DoorError) -> Self {
        Self::other(error)
    }
}
