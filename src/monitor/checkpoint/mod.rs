//! The checkpoint: what every port has counted, on disk, so that numbers never go back.
//!
//! ```text
//!   start   read what was counted; the ports' ledgers begin with it
//!           it was not the last word of a run (killed, power lost): note a gap
//!           write "not clean"                             from here on a death is a gap
//!   then    once a second, and before numbers are shown: write what changed
//!   end     all ports have ended: write their last numbers, and "clean"
//! ```
//!
//! A number that was shown is on disk: whoever asks is answered when it is. So a kill or a power cut takes back
//! nothing that anybody has seen. Where the disk fails, nobody is kept waiting: numbers stay in memory, are
//! written when it works again, and until then may go back at a kill, which the log and the API's health say.
//!
//! The disk is waited for on a thread of its own, never by the monitor's task.

mod counters;
mod error;
mod file;

use std::{
    cell::{Cell, RefCell},
    fs,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    time::{Instant, timeout},
};

use self::file::Saved;
pub use self::{
    counters::{DirectionCounters, PortCounters},
    error::CheckpointError,
    file::{Gap, GapReason, PortKey},
};
use super::{api::document::rfc3339_seconds, ports::Port, registry::Registry};
use crate::label::Label;

/// How long numbers wait for the disk before they are shown all the same.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is said that the disk still fails.
const REMIND: Duration = Duration::from_secs(600);
/// Different in each boot of the host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What every port has counted, in memory and on disk.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// What the file says after the next write.
    saved: RefCell<Saved>,
    /// Grows with each change of `saved`.
    version: Cell<u64>,
    /// The version that is on disk.
    on_disk: Cell<u64>,
    /// Counts the rounds: in each, ports are looked at and what changed is written.
    rounds: Cell<u64>,
    /// One round at a time: held until its file is whole, also when nobody waits for that any more.
    round: Arc<Mutex<()>>,
    trouble: RefCell<Option<Trouble>>,
}

/// The disk fails.
#[derive(Debug)]
struct Trouble {
    why: String,
    /// When it was last said.
    said: Instant,
}

impl Checkpoint {
    /// Reads what was counted under the registry's labels. `forget`: where that is lost, begin at 0.
    ///
    /// # Errors
    /// [`CheckpointError`]: it cannot be read, or the next run could not read what this one writes.
    pub fn open(registry: &Registry, forget: bool) -> Result<Self, CheckpointError> {
        let path = file::path(registry);
        let saved = match file::read(registry) {
            Ok(saved) => saved,
            Err(error) if forget && error.is_loss() => {
                file::put_away(registry)?;
                tracing::warn!("{}: forgotten: every VM's numbers begin at 0", path.display());
                let (from, to) = (now(), now());
                let mut saved = Saved::none();
                saved.note(Gap { from, to, reason: GapReason::Forgotten });
                saved
            }
            Err(error) => return Err(error),
        };
        if !path.exists() {
            // Before the first label is given: from then on a missing file is a loss.
            file::write(&path, &saved)?;
        }
        Ok(Self {
            path,
            saved: RefCell::new(saved),
            version: Cell::new(0),
            on_disk: Cell::new(0),
            rounds: Cell::new(0),
            round: Arc::default(),
            trouble: RefCell::new(None),
        })
    }

    /// What was counted of a port up to the last round.
    #[must_use]
    pub fn counted(&self, port: PortKey) -> PortCounters {
        self.saved.borrow().ports.get(&port).cloned().unwrap_or_default()
    }

    /// When numbers were lost, oldest first.
    #[must_use]
    pub fn gaps(&self) -> Vec<Gap> {
        self.saved.borrow().gaps.clone()
    }

    /// Why what was counted last is not on disk; none if it is.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.trouble.borrow().as_ref().map(|trouble| trouble.why.clone())
    }

    /// Frames may pass after this: notes the gap before this run, if there is one, and that a death would be
    /// another. To be called once, before any port is served.
    ///
    /// # Errors
    /// [`CheckpointError::State`]: the disk refuses it.
    pub fn begin(&self) -> Result<(), CheckpointError> {
        let mut saved = self.saved.borrow_mut();
        let boot = boot_id();
        if !saved.clean {
            let reason = if saved.boot == boot { GapReason::Killed } else { GapReason::Reboot };
            let gap = Gap { from: saved.written, to: now().max(saved.written), reason };
            saved.note(gap);
            let (from, why) = (rfc3339_seconds(gap.from), gap.reason.meaning());
            tracing::warn!("what was counted between {from} and the end of the last run is lost: {why}");
        }
        (saved.clean, saved.boot, saved.written) = (false, boot, now());
        file::write(&self.path, &saved)
    }

    /// To be called after numbers were read and before they are shown: waits until they, or later ones, are on
    /// disk. Not for long: a disk that fails or hangs keeps nobody from looking.
    pub async fn cover(&self, ports: impl Fn() -> Vec<Rc<Port>>) {
        if self.trouble.borrow().is_none() && timeout(PATIENCE, self.write(ports)).await.is_err() {
            self.fails(format!("{}: the disk takes longer than {PATIENCE:?}", self.path.display()));
        }
    }

    /// What was counted under a label, by the number of the port, as of the last round.
    pub fn of_label(&self, label: Label) -> Vec<(usize, PortCounters)> {
        let saved = self.saved.borrow();
        let ports = saved.ports.range((label, 0)..=(label, usize::MAX));
        ports.map(|((_, port), counters)| (*port, counters.clone())).collect()
    }

    /// True if the counters are known already, or go on from those that are.
    #[must_use]
    pub fn may_import(&self, key: PortKey, counters: &PortCounters) -> bool {
        self.saved.borrow().ports.get(&key).is_none_or(|ours| ours.later(counters).is_some())
    }

    /// Takes over counters from elsewhere where they are later than our own; on disk after the next write. To be
    /// called for ports that are not served.
    pub fn import(&self, key: PortKey, counters: PortCounters) {
        let mut saved = self.saved.borrow_mut();
        let lower = saved.ports.get(&key).is_some_and(|ours| ours.later(&counters) != Some(&counters));
        if !lower {
            saved.ports.insert(key, counters);
            self.version.set(self.version.get() + 1);
        }
    }

    /// Writes what was imported while no vmflow runs: what else the file says stays.
    ///
    /// # Errors
    /// [`CheckpointError::State`]: the disk refuses it.
    pub fn write_import(&self) -> Result<(), CheckpointError> {
        file::write(&self.path, &self.saved.borrow())
    }

    /// Notes what a port has counted; it is on disk after the next round. To be called when a port has ended
    /// that will not be among those of the next round.
    pub fn gather(&self, port: &Port) {
        let key = (port.brief.label(), port.brief.port);
        let counters = PortCounters::of(port);
        let mut saved = self.saved.borrow_mut();
        if saved.ports.get(&key) != Some(&counters) {
            saved.ports.insert(key, counters);
            self.version.set(self.version.get() + 1);
        }
    }

    /// The last word of this run, after all ports have ended. Not `clean` if some have not: what they still
    /// count is lost.
    pub async fn finish(&self, ports: impl Fn() -> Vec<Rc<Port>>, clean: bool) {
        let round = Arc::clone(&self.round).lock_owned().await;
        for port in ports() {
            self.gather(&port);
        }
        self.saved.borrow_mut().clean = clean;
        self.version.set(self.version.get() + 1);
        self.flush(round).await;
    }

    /// Writes what changed. To be called once a second.
    pub async fn write(&self, ports: impl Fn() -> Vec<Rc<Port>>) {
        let asked = self.rounds.get();
        let round = Arc::clone(&self.round).lock_owned().await;
        let is_on_disk = || self.version.get() == self.on_disk.get();
        if self.rounds.get() > asked && is_on_disk() {
            return; // another has looked at the ports since we asked
        }
        self.rounds.set(self.rounds.get() + 1);
        for port in ports() {
            self.gather(&port);
        }
        if !is_on_disk() {
            self.flush(round).await;
        }
    }

    async fn flush(&self, round: OwnedMutexGuard<()>) {
        let version = self.version.get();
        let written = now();
        let next = Saved { written, ..self.saved.borrow().clone() };
        let path = self.path.clone();
        let write = move || {
            let written = file::write(&path, &next);
            drop(round);
            written
        };
        match tokio::task::spawn_blocking(write).await {
            Ok(Ok(())) => {
                self.on_disk.set(version);
                self.saved.borrow_mut().written = written;
                if self.trouble.take().is_some() {
                    tracing::info!("{}: totals are written again", self.path.display());
                }
            }
            Ok(Err(error)) => self.fails(error.to_string()),
            Err(error) => self.fails(error.to_string()),
        }
    }

    /// Says that the disk fails: at first, and from time to time.
    fn fails(&self, why: String) {
        let said = self.trouble.borrow().as_ref().map(|trouble| trouble.said);
        let said = said.filter(|said| said.elapsed() < REMIND).unwrap_or_else(|| {
            tracing::error!("totals are not on disk, and would be lost with this process: {why}");
            Instant::now()
        });
        self.trouble.replace(Some(Trouble { why, said }));
    }
}

impl GapReason {
    /// A few words for people.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Killed => "vmflow was killed",
            Self::Reboot => "the host went down",
            Self::Forgotten => "the totals were forgotten, and numbers began at 0",
        }
    }
}

/// Seconds since 1970 (UTC). The clock may be wrong, and jump: it is for people, nothing depends on it.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Empty where /proc does not tell: then any two boots are one.
fn boot_id() -> String {
    fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned()
}
