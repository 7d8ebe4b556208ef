//! Starts a keeper: a new program image, so that it inherits no memory of ours, with exactly the descriptors
//! of its port.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::keeper::{brief::Brief, process::Inherited};

/// Between two looks whether a worker that has ended can be waited for.
const REAP_PAUSE: Duration = Duration::from_millis(1);

/// A keeper that was started and not yet waited for.
#[derive(Debug)]
pub struct KeeperProcess {
    child: Child,
    pidfd: AsyncFd<OwnedFd>,
}

impl KeeperProcess {
    /// Starts it.
    ///
    /// # Errors
    /// When the kernel gives no process or descriptor.
    pub fn start(brief: &Brief, inherited: Inherited) -> io::Result<Self> {
        let mappings = (Inherited::FIRST..)
            .zip(inherited)
            .map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd })
            .collect();
        let child = Command::new("/proc/self/exe")
            .arg("keeper")
            .arg(serde_json::to_string(brief)?)
            .envs(crate::log::environment())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0) // a Ctrl-C at our terminal is for us alone
            .fd_mappings(mappings)
            .map_err(io::Error::other)?
            .spawn()?;
        let pid = Pid::from_child(&child);
        let pidfd = watch(pidfd_open(pid, PidfdFlags::NONBLOCK)?)?;
        Ok(Self { child, pidfd })
    }

    /// Waits until it has ended. May be dropped and called again.
    ///
    /// # Errors
    /// Whatever `wait` says.
    pub async fn ended(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            let mut ready = self.pidfd.readable().await?;
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ready.clear_ready();
        }
    }

    /// Asks it to end in good order.
    pub fn terminate(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::TERM);
    }

    /// Ends it, and with it its worker.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Waits for what it leaves behind: a worker whose keeper is dead is our child (we are subreaper), has
    /// been killed, and has closed its descriptors already when this is called.
    pub async fn reap_worker(&self) {
        let group = WaitId::Pgid(Some(Pid::from_child(&self.child)));
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        // It closes its descriptors a moment before it can be waited for.
        while waitid(group.clone(), options).is_ok() {
            tokio::time::sleep(REAP_PAUSE).await;
        }
    }
}

/// A keeper never outlives what watches it.
impl Drop for KeeperProcess {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The other end of a keeper's connections: what remains with us.
#[derive(Debug)]
pub struct PolicySocket(AsyncFd<OwnedFd>);

impl PolicySocket {
    /// Takes our end of the pair.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        watch(fd).map(Self)
    }

    /// Waits for the worker's next packet. `None`: worker and keeper are gone.
    ///
    /// # Errors
    /// Whatever `recvmsg` says.
    pub async fn receive(&self) -> io::Result<Option<crate::policy::handover::Packet>> {
        loop {
            let mut ready = self.0.readable().await?;
            match crate::policy::handover::receive(self.0.get_ref()) {
                Ok(packet) => return Ok(packet.map(|(packet, _)| packet)),
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Hands a policy to the worker.
    ///
    /// # Errors
    /// Whatever sealing or sending says.
    pub fn send(&self, policy: &crate::policy::Policy) -> io::Result<()> {
        use crate::policy::handover::{self, Packet};
        let file = policy.seal().map_err(io::Error::other)?;
        handover::send(self.0.get_ref(), Packet::Policy(policy.generation), Some(file.as_fd()))?;
        Ok(())
    }
}

#[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` gives the same open descriptor for as long as it lives, and the `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}
