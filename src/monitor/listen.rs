//! Listening sockets in the file system: made, guarded and removed.
//!
//! ```text
//!   /run/vmflow/.control.sock.lock   flock: held by whoever may touch the socket's name
//!   /run/vmflow/control.sock         the socket: bound 0600, given its owner and mode, and only then listening
//! ```
//!
//! A socket that nobody listens on stays behind when its process is killed. It is replaced, but only under the
//! lock: without it two processes could each take the other's new socket for a stale one. The lock is a file of
//! its own because a socket cannot be locked before it exists.
//!
//! This file doesn't accept connections and doesn't know who may connect beyond owner, group and mode.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, FlockOperation, Gid, Mode, OFlags, Stat, Uid},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;

/// The mode of a directory that is made for a socket because it was missing.
const DIRECTORY_MODE: u32 = 0o755;

/// The mode of a socket before it has its owner: nobody else can connect.
const PRIVATE_MODE: u32 = 0o600;

/// Who may use a socket or a directory: mode bits, and owner and group where they are not the process's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Permission bits.
    pub mode: u32,
    /// Owner; none leaves the process's own.
    pub uid: Option<u32>,
    /// Group; none leaves the process's own.
    pub gid: Option<u32>,
}

impl Access {
    /// These permission bits, for the process's own user and group.
    #[must_use]
    pub const fn mode(mode: u32) -> Self {
        Self { mode, uid: None, gid: None }
    }
}

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process of this program holds the lock.
    #[error("{} is in use by another vmflow", .0.display())]
    InUse(PathBuf),
    /// A process listens there that holds no lock.
    #[error("{} is in use by another program, which listens there without vmflow's lock", .0.display())]
    Foreign(PathBuf),
    /// Something else has the socket's name.
    #[error("{} exists and is not a socket: move it away or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// Something else has the directory's name.
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// The directory is missing, and so is the one above it.
    #[error("cannot make the directory {}: the one above it is missing: create it first", .0.display())]
    NoDirectory(PathBuf),
    /// The path ends in no name that a socket could have.
    #[error("{} does not name a file", .0.display())]
    NoName(PathBuf),
    /// The path doesn't fit a socket address.
    #[error("{} is longer than the 107 bytes that a socket's path may have", .0.display())]
    TooLong(PathBuf),
    /// The system refused a step.
    #[error("cannot {step} {}", path.display())]
    System {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Turns a failed step into an error that names it.
fn failed(step: &'static str, path: &Path) -> impl FnOnce(Errno) -> BindError {
    move |errno| BindError::System { step, path: path.to_owned(), source: errno.into() }
}

/// A listening socket and the right to its name. Both are wanted for as long as it listens.
#[derive(Debug)]
pub struct Bound {
    /// The socket: blocking, close-on-exec.
    pub listener: UnixListener,
    /// The right to its name: dropping it removes the socket.
    pub claim: Claim,
}

impl Bound {
    /// The same for a tokio program. To be called inside its runtime.
    ///
    /// # Errors
    /// What the system said.
    pub fn into_tokio(self) -> io::Result<(tokio::net::UnixListener, Claim)> {
        self.listener.set_nonblocking(true)?;
        Ok((tokio::net::UnixListener::from_std(self.listener)?, self.claim))
    }
}

/// The right to a socket's name: holds the lock, and removes the socket when dropped, if it is still the one
/// that was made with it.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    /// Keeps the socket's inode number from being given to another file as long as we compare with it.
    socket: OwnedFd,
    /// Dropped after the socket is removed: up to then nobody else makes one here.
    _lock: Lock,
}

impl Claim {
    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets others use the socket than were told when it was made.
    ///
    /// # Errors
    /// [`BindError::System`] where the system refuses.
    pub fn give_access(&self, access: &Access) -> Result<(), BindError> {
        give_access(self.socket.as_fd(), &self.path, access)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        remove_if_ours(&self.path, self.socket.as_fd());
    }
}

/// A locked file. It is removed while it is still locked, so no directory keeps one for a socket that it no
/// longer has.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    file: OwnedFd,
}

impl Drop for Lock {
    fn drop(&mut self) {
        remove_if_ours(&self.path, self.file.as_fd());
    }
}

/// Listens at `path`, which nobody without the rights in `access` can connect to at any moment.
///
/// A stale socket is replaced. The directory is made, mode 0755, where only its last part is missing.
///
/// # Errors
/// [`BindError`] where another process listens, where the name is taken by something that is no socket, where
/// the directory is missing, or where the system refuses.
pub fn bind_unix(path: &Path, access: &Access) -> Result<Bound, BindError> {
    let address = SocketAddrUnix::new(path).map_err(|_| BindError::TooLong(path.to_owned()))?;
    let name = path.file_name().ok_or_else(|| BindError::NoName(path.to_owned()))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    ensure_directory(directory, &Access::mode(DIRECTORY_MODE))?;

    let mut lock_name = std::ffi::OsString::from(".");
    lock_name.push(name);
    lock_name.push(".lock");
    let lock_path = directory.join(lock_name);
    let lock = take_lock(&lock_path, path)?;
    remove_stale(path, &address)?;

    let socket = bind_private(path, &address)?;
    let inode = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open", path))?;
    // From here on an error removes the socket again.
    let claim = Claim { path: path.to_owned(), socket: inode, _lock: lock };
    give_access(claim.socket.as_fd(), path, access)?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed("listen on", path))?;
    Ok(Bound { listener: UnixListener::from(socket), claim })
}

/// Makes a directory where its last part is missing; leaves one that exists as it is. True if it was made.
///
/// # Errors
/// [`BindError`] where the name is taken by something else, where more than the last part is missing, or where
/// the system refuses.
pub fn ensure_directory(path: &Path, access: &Access) -> Result<bool, BindError> {
    match rustix::fs::stat(path) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => return Ok(false),
        Ok(_) => return Err(BindError::NotADirectory(path.to_owned())),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(failed("look at the directory", path)(errno)),
    }
    rustix::fs::mkdir(path, Mode::from_raw_mode(access.mode & 0o700)).map_err(|errno| match errno {
        Errno::NOENT => BindError::NoDirectory(path.to_owned()),
        errno => failed("make the directory", path)(errno),
    })?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open", path))?;
    give_access(directory.as_fd(), path, access)?;
    Ok(true)
}

/// Takes the lock, or says that another process has it.
fn take_lock(path: &Path, socket_path: &Path) -> Result<Lock, BindError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    loop {
        let file = rustix::fs::open(path, flags, Mode::from_raw_mode(PRIVATE_MODE))
            .map_err(failed("open the lock file", path))?;
        match lock(path, file) {
            Ok(Some(lock)) => return Ok(lock),
            Ok(None) => {}
            Err(Errno::WOULDBLOCK) => return Err(BindError::InUse(socket_path.to_owned())),
            Err(errno) => return Err(failed("lock", path)(errno)),
        }
    }
}

/// Locks the file; none where the holder before us removed it as it left, after it was opened: then it has no
/// name any more, and keeps nobody out.
fn lock(path: &Path, file: OwnedFd) -> Result<Option<Lock>, Errno> {
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(is_same_file(path, file.as_fd()).then(|| Lock { path: path.to_owned(), file }))
}

/// Removes a socket that nobody listens on. The lock is held.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let Some(stat) = look(path)? else { return Ok(()) };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    // Nonblocking, since a listener that accepts nothing would hold us up.
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(failed("make a socket for", path))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => rustix::fs::unlink(path).map_err(failed("remove the stale", path)),
        // AGAIN: its backlog is full. PROTOTYPE: a socket of another type, which exists only while it is bound.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(BindError::Foreign(path.to_owned())),
        Err(errno) => Err(failed("find out who listens on", path)(errno)),
    }
}

/// Binds a socket that only its owner can use.
///
/// On Linux the file gets the mode of the socket's own inode (less the umask, which belongs to the process and
/// all its threads, so it is left alone).
fn bind_private(path: &Path, address: &SocketAddrUnix) -> Result<OwnedFd, BindError> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(failed("make a socket for", path))?;
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(PRIVATE_MODE))
        .map_err(failed("set the mode of the socket for", path))?;
    rustix::net::bind(&socket, address).map_err(failed("bind", path))?;
    Ok(socket)
}

/// Sets owner, group and mode of what `file` (opened with `O_PATH`) is, whatever its name is by now. The owner
/// comes first: the mode's group bits are meant for the new group.
fn give_access(file: BorrowedFd<'_>, path: &Path, access: &Access) -> Result<(), BindError> {
    let (owner, group) = (access.uid.map(Uid::from_raw), access.gid.map(Gid::from_raw));
    if owner.is_some() || group.is_some() {
        rustix::fs::chownat(file, "", owner, group, AtFlags::EMPTY_PATH)
            .map_err(failed("set the owner of", path))?;
    }
    // fchmod refuses an O_PATH descriptor, and fchmodat2 is younger than the kernels we run on.
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::chmod(link, Mode::from_raw_mode(access.mode)).map_err(failed("set the mode of", path))
}

/// What has this name, a symbolic link itself included.
fn look(path: &Path) -> Result<Option<Stat>, BindError> {
    match rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(failed("look at", path)(errno)),
    }
}

/// Removes the name, if it still means this file.
fn remove_if_ours(path: &Path, file: BorrowedFd<'_>) {
    if is_same_file(path, file)
        && let Err(error) = rustix::fs::unlink(path)
    {
        tracing::warn!("cannot remove {}: {error}", path.display());
    }
}

/// True when the name still means this file.
fn is_same_file(path: &Path, file: BorrowedFd<'_>) -> bool {
    match (rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW), rustix::fs::fstat(file)) {
        (Ok(named), Ok(held)) => (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{
            fs::{MetadataExt, PermissionsExt},
            net::{UnixDatagram, UnixStream},
        },
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    fn mode(path: &Path) -> u32 {
        path.symlink_metadata().unwrap().permissions().mode() & 0o7777
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_socket_has_its_mode_and_group_and_is_private_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let early = bind_private(&path, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        assert_eq!(mode(&path), 0o600);
        drop(early);

        for wanted in [0o600, 0o660, 0o666] {
            let bound = bind_unix(&path, &Access::mode(wanted)).unwrap();
            assert_eq!(mode(&path), wanted);
            UnixStream::connect(&path).unwrap();
            drop(bound);
        }
    }

    #[test]
    fn a_socket_is_given_to_the_wanted_owner_and_group() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        // Giving files away needs privilege; without it the same call must say so and leave nothing.
        let access = Access { mode: 0o660, uid: Some(12_345), gid: Some(23_456) };
        match bind_unix(&path, &access) {
            Ok(_bound) => {
                let stat = path.symlink_metadata().unwrap();
                assert_eq!((stat.uid(), stat.gid(), mode(&path)), (12_345, 23_456, 0o660));
            }
            Err(error) => {
                assert!(!rustix::process::geteuid().is_root());
                assert_eq!(error.to_string(), format!("cannot set the owner of {}", path.display()));
                assert!(names(directory.path()).is_empty());
            }
        }
    }

    #[test]
    fn a_second_bind_is_refused_and_harms_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let first = bind_unix(&path, &Access::mode(0o600)).unwrap();
        let error = bind_unix(&path, &Access::mode(0o600)).unwrap_err();
        assert_eq!(error.to_string(), format!("{} is in use by another vmflow", path.display()));
        UnixStream::connect(&path).unwrap();
        drop(first);
        assert!(names(directory.path()).is_empty(), "neither socket nor lock file stays");
        bind_unix(&path, &Access::mode(0o600)).unwrap();
    }

    #[test]
    fn a_lock_on_a_file_that_was_removed_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".a.sock.lock");
        let open = || OwnedFd::from(std::fs::File::create(&path).unwrap());
        let (first, second) = (lock(&path, open()).unwrap().unwrap(), open());
        drop(first);
        assert!(!path.exists());
        // Meanwhile a third one comes, whose lock must stay the only one.
        let third = lock(&path, open()).unwrap().unwrap();
        assert!(lock(&path, second).unwrap().is_none());
        assert!(path.exists());
        assert_eq!(lock(&path, open()).unwrap_err(), Errno::WOULDBLOCK);
        drop(third);
    }

    #[test]
    fn of_many_that_want_one_name_at_once_one_has_it() {
        const RIVALS: usize = 4;
        const ROUNDS: usize = 500;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (holders, wins) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let compete = || {
            for _ in 0..ROUNDS {
                match bind_unix(&path, &Access::mode(0o600)) {
                    Ok(bound) => {
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two have it");
                        assert!(is_same_file(&path, bound.claim.socket.as_fd()));
                        wins.fetch_add(1, Ordering::SeqCst);
                        holders.fetch_sub(1, Ordering::SeqCst);
                    }
                    Err(error) => assert!(matches!(error, BindError::InUse(_)), "{error:?}"),
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..RIVALS {
                scope.spawn(compete);
            }
        });
        assert!(wins.load(Ordering::SeqCst) > 0);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let other = UnixListener::bind(&path).unwrap();
        assert!(matches!(bind_unix(&path, &Access::mode(0o600)), Err(BindError::Foreign(_))));
        UnixStream::connect(&path).unwrap();

        drop(other);
        assert!(path.exists(), "it is stale now");
        let bound = bind_unix(&path, &Access::mode(0o600)).unwrap();
        UnixStream::connect(&path).unwrap();
        bound.listener.accept().unwrap();
    }

    #[test]
    fn a_live_socket_of_another_type_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let _other = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(bind_unix(&path, &Access::mode(0o600)), Err(BindError::Foreign(_))));
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        std::fs::write(&file, "precious").unwrap();
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &link).unwrap();
        for path in [&file, &link] {
            let error = bind_unix(path, &Access::mode(0o600)).unwrap_err();
            assert!(matches!(error, BindError::NotASocket(_)), "{error}");
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        assert_eq!(names(directory.path()), ["file", "link"], "no lock file stays");
    }

    #[test]
    fn a_socket_that_took_our_name_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let bound = bind_unix(&path, &Access::mode(0o600)).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(bound);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn one_missing_directory_is_made_and_two_are_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let bound = bind_unix(&directory.path().join("run/a.sock"), &Access::mode(0o600)).unwrap();
        assert_eq!(mode(&directory.path().join("run")), 0o755);
        drop(bound);

        let error = bind_unix(&directory.path().join("no/such/a.sock"), &Access::mode(0o600)).unwrap_err();
        assert!(matches!(error, BindError::NoDirectory(_)), "{error}");
        assert!(ensure_directory(&directory.path().join("web1"), &Access::mode(0o710)).unwrap());
        assert_eq!(mode(&directory.path().join("web1")), 0o710);
        assert!(!ensure_directory(&directory.path().join("web1"), &Access::mode(0o700)).unwrap());
        assert_eq!(mode(&directory.path().join("web1")), 0o710, "one that exists stays as it is");
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused_by_name() {
        let long = Path::new("/tmp").join("x".repeat(120));
        assert!(matches!(bind_unix(&long, &Access::mode(0o600)), Err(BindError::TooLong(_))));
        assert!(matches!(bind_unix(Path::new("/"), &Access::mode(0o600)), Err(BindError::NoName(_))));
    }
}
