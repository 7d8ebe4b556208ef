//! The monitor: one process per host, which owns the sockets, the taps, the labels, the policies and what the
//! outside sees. It never touches a frame.
//!
//! Order of start-up: what can be refused is refused before anything changes. First the state directory, which
//! no other vmflow may have, with the labels and the totals in it, and the API's sockets; then the configuration comes into force as any later change
//! of it does ([`change`]); and when all of it listens, it says so.

pub mod added;
pub mod api;
pub mod change;
pub mod checkpoint;
pub mod connection;
pub mod doorbell;
pub mod host;
pub mod inherited;
pub mod link;
pub mod listen;
pub mod make;
pub mod ports;
pub mod registry;
pub mod spawn;
pub mod state;
pub mod tally;

use std::{convert::Infallible, rc::Rc, time::Duration};

use rustix::process::{Resource, Rlimit, getrlimit, set_child_subreaper, setrlimit};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::{JoinSet, LocalSet},
};

use crate::{
    config::{Config, Origins},
    ledger::UNMONITORED,
};
use change::InForce;
use checkpoint::Checkpoint;
use host::Host;
use listen::{Access, Claim};
use registry::Registry;

/// Commands of the API that may wait.
const COMMANDS: usize = 64;
/// How long the end may take: a change that is being made, and then each port, has a deadline of its own.
const END_DEADLINE: Duration = Duration::from_secs(30);
/// Mode of the control socket: whoever may write to it may change things.
const CONTROL_MODE: u32 = 0o600;
/// Mode of the statistics socket.
const STATS_MODE: u32 = 0o660;

/// Runs until it is told to end. `config` is what `origins` say; they are read again when the labels are ours.
/// `forget_totals`: where what was counted is lost, numbers begin at 0.
///
/// # Errors
/// One line that says what is wrong and where; nothing was changed then that a later start would not find
/// right.
pub fn run(origins: Origins, config: &Config, forget_totals: bool) -> anyhow::Result<()> {
    rustix::thread::set_name(c"vmf-mon")?;
    set_child_subreaper(Some(rustix::process::getpid()))?;
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().thread_name("vmf-mon").build()?;
    LocalSet::new().block_on(&runtime, serve(origins, config, forget_totals))
}

async fn serve(origins: Origins, config: &Config, forget_totals: bool) -> anyhow::Result<()> {
    if UNMONITORED {
        tracing::warn!(
            "built without monitoring, for measurements: frames are not judged, nothing is counted"
        );
    }
    let (end, reload) = (TheEnd::watch()?, signal(SignalKind::hangup())?);
    let registry = Registry::open(&config.daemon.state)?;
    let checkpoint = Checkpoint::open(&registry, forget_totals)?;
    let api = Api::bind(config)?;
    checkpoint.begin()?;
    let in_force = InForce::new(config, registry, inherited::take());
    let host = Rc::new(Host::new(origins, in_force, checkpoint));
    if let Err(error) = host.load().await {
        host.finish_numbers(true).await; // nothing was counted
        return Err(error.into());
    }
    let upkeep = Rc::clone(&host);
    tokio::task::spawn_local(async move { upkeep.keep_up().await });
    let api = api.serve(&host)?;
    tokio::task::spawn_local(reload_at(reload, Rc::clone(&host)));
    announce(&host, config);
    end.comes().await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let ended = tokio::time::timeout(END_DEADLINE, host.end()).await.is_ok();
    if !ended {
        tracing::error!("some ports did not end within {END_DEADLINE:?}: left behind");
    }
    if tokio::time::timeout(END_DEADLINE, host.finish_numbers(ended)).await.is_err() {
        tracing::error!("the last totals are not on disk after {END_DEADLINE:?}: left behind");
    }
    drop((api, host)); // removes the sockets
    tracing::info!("ended");
    Ok(())
}

/// Reads the configuration again whenever the signal comes; the log tells how it ended.
async fn reload_at(mut signal: Signal, host: Rc<Host>) {
    use sd_notify::{NotifyState, notify};
    while signal.recv().await.is_some() {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            let _ = notify(&[NotifyState::Reloading, now]);
        }
        let _ = host.reload("SIGHUP").await;
        let _ = notify(&[NotifyState::Ready]);
    }
}

/// The API's sockets: changes, and statistics.
struct Api([listen::Bound; 2]);

/// The API's tasks and the right to its sockets: both end when it is dropped.
struct ServedApi {
    #[expect(dead_code, reason = "held")]
    tasks: JoinSet<Infallible>,
    #[expect(dead_code, reason = "held")]
    claims: Vec<Claim>,
}

impl Api {
    fn bind(config: &Config) -> anyhow::Result<Self> {
        let daemon = &config.daemon;
        let stats = Access { mode: STATS_MODE, uid: None, gid: daemon.stats_group };
        let control = listen::bind_unix(&daemon.control, &Access::mode(CONTROL_MODE))?;
        Ok(Self([control, listen::bind_unix(&daemon.stats, &stats)?]))
    }

    fn serve(self, host: &Rc<Host>) -> anyhow::Result<ServedApi> {
        let (commands, mut received) = mpsc::channel(COMMANDS);
        let routers = [api::control_router(commands.clone()), api::stats_router(commands)];
        let (mut tasks, mut claims) = (JoinSet::new(), Vec::new());
        for (bound, router) in self.0.into_iter().zip(routers) {
            let (listener, claim) = bound.into_tokio()?;
            claims.push(claim);
            tasks.spawn_local(api::serve_unix(listener, router, api::Limits::default()));
        }
        let host = Rc::clone(host);
        tokio::task::spawn_local(async move {
            while let Some(command) = received.recv().await {
                Rc::clone(&host).obey(command);
            }
        });
        Ok(ServedApi { tasks, claims })
    }
}

/// Every socket listens: say so.
fn announce(host: &Host, config: &Config) {
    let (vms, control) = (host.vms(), config.daemon.control.display());
    let (vms, ports) = (vms.len(), vms.iter().map(|vm| vm.ports.len()).sum::<usize>());
    tracing::info!("ready: {vms} VMs, {ports} ports, control socket {control}");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

/// The signals that ask for an end.
struct TheEnd([Signal; 2]);

impl TheEnd {
    fn watch() -> std::io::Result<Self> {
        Ok(Self([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?]))
    }

    async fn comes(self) {
        let Self([mut terminate, mut interrupt]) = self;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}
