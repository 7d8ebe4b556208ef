//! The monitor: one process per host, which owns the sockets, the taps, the labels, the policies and what the
//! outside sees. It never touches a frame.
//!
//! Order of start-up: what can be refused is refused before anything changes. First the labels (and with them
//! the state directory, which no other vmflow may have), then every socket, then the taps, then the ports; and
//! when all of it listens, it says so.

pub mod api;
pub mod connection;
pub mod doorbell;
pub mod host;
pub mod inherited;
pub mod link;
pub mod listen;
pub mod ports;
pub mod registry;
pub mod spawn;

use std::{collections::HashMap, convert::Infallible, os::fd::OwnedFd, rc::Rc, time::Duration};

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, set_child_subreaper, setrlimit};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    task::{JoinSet, LocalSet},
};

use crate::{
    config::{self, Config},
    keeper::brief::Brief,
    label::Label,
    policy::{Policy, SuspectAction},
    tap,
};
use doorbell::Doorbell;
use host::{Host, Vm};
use link::Wanted;
use listen::{Access, Claim};
use ports::Port;
use registry::{Registry, Tag};

/// Users (and groups) that keepers run as: this number plus the VM's label. The range up to 2^31 belongs to
/// no distribution's users, containers or dynamic services.
const UID_BASE: u32 = 0x7000_0000;
/// Labels beyond this share a user with another VM; nobody has that many.
const UID_COUNT: u32 = 0x0fff_fffe;
/// Commands of the API that may wait.
const COMMANDS: usize = 64;
/// How long the ports may take to end: more than each of them gives its keeper.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// Mode of a VM's socket directory.
const SOCKET_DIRECTORY: u32 = 0o710;
/// Mode of the control socket: whoever may write to it may change things.
const CONTROL_MODE: u32 = 0o600;
/// Mode of the statistics socket.
const STATS_MODE: u32 = 0o660;

/// Runs until it is told to end.
///
/// # Errors
/// One line that says what is wrong and where; nothing was changed then that a later start would not find
/// right.
pub fn run(config: &Config) -> anyhow::Result<()> {
    rustix::thread::set_name(c"vmf-mon")?;
    set_child_subreaper(Some(rustix::process::getpid()))?;
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, serve(config))
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    let mut registry = Registry::open(&config.daemon.state)?;
    let labels = registry.allocate(&claims(config), &config.daemon.labels)?;
    let (doorbells, claims) = bind(config)?;
    let api = Api::bind(config)?;
    let mut host = Means { doorbells, taps: inherited::take(), suspect: config.suspect };
    let mut vms = Vec::new();
    for (vm, label) in config.vms.iter().zip(labels) {
        let tag = registry.entry(label).and_then(|entry| entry.suspect.clone());
        vms.push(host.set_up(vm, label, tag)?);
    }
    let host = Rc::new(Host::new(config.daemon.node.clone(), vms, registry));
    let (stop, stopped) = watch::channel(false);
    let mut ports = JoinSet::new();
    for port in host.ports() {
        let (port, stopped) = (Rc::clone(port), stopped.clone());
        ports.spawn_local(async move { port.serve(stopped).await });
    }
    let api = api.serve(&host)?;
    let end = TheEnd::watch()?;
    announce(config);
    end.comes().await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop.send_replace(true);
    let all = async { while ports.join_next().await.is_some() {} };
    if tokio::time::timeout(END_DEADLINE, all).await.is_err() {
        tracing::error!("some ports did not end within {END_DEADLINE:?}: left behind");
    }
    drop((api, claims)); // removes the sockets
    tracing::info!("ended");
    Ok(())
}

fn claims(config: &Config) -> Vec<registry::Claim> {
    let claim = |vm: &config::Vm| registry::Claim { name: vm.name.clone(), uuid: vm.uuid, label: vm.label };
    config.vms.iter().map(claim).collect()
}

/// Listens for the front ends of every port in server mode, or for none of them. In the order of the ports.
fn bind(config: &Config) -> anyhow::Result<(Vec<Doorbell>, Vec<Claim>)> {
    let (mut doorbells, mut claims) = (Vec::new(), Vec::new());
    for port in config.vms.iter().flat_map(|vm| &vm.ports) {
        if port.mode == config::Mode::Client {
            doorbells.push(Doorbell::Client(port.socket.clone()));
            continue;
        }
        let access = Access { mode: port.socket_mode, uid: port.owner, gid: port.group };
        let path = &port.socket;
        if let Some(directory) = path.parent() {
            listen::ensure_directory(directory, &Access { mode: SOCKET_DIRECTORY, ..access })?;
        }
        let (listener, claim) = listen::bind_unix(path, &access)?.into_tokio()?;
        doorbells.push(Doorbell::Server(listener));
        claims.push(claim);
    }
    doorbells.reverse(); // to be taken from the end
    Ok((doorbells, claims))
}

/// What ports are made of.
struct Means {
    /// In the order of the ports, from the end.
    doorbells: Vec<Doorbell>,
    /// Taps that were handed in, by name.
    taps: HashMap<String, OwnedFd>,
    /// The host's suspect action.
    suspect: SuspectAction,
}

impl Means {
    fn set_up(&mut self, vm: &config::Vm, label: Label, tag: Option<Tag>) -> anyhow::Result<Vm> {
        let suspect_action = vm.suspect.unwrap_or(self.suspect);
        let policy = Policy { generation: 1, label, tagged: tag.is_some(), suspect_action };
        let mut ports = Vec::new();
        for (number, port) in vm.ports.iter().enumerate() {
            let (tap, mtu) = open_tap(port, self.taps.remove(port.tap.as_str()))?;
            let brief = Brief {
                monitor: std::process::id(),
                vm: vm.name.clone(),
                label: label.get(),
                port: number,
                uid: UID_BASE + label.get() % UID_COUNT,
                queue_pairs: port.queue_pairs,
                mtu,
                mac: port.mac.map(config::Mac::bytes),
                control_queue: port.control_queue,
            };
            let doorbell = self.doorbells.pop().context("a port without a socket")?;
            let made_of = ports::Parts { brief, doorbell, peer: port.peer, tap, policy };
            ports.push(Rc::new(Port::new(made_of)?));
        }
        Ok(Vm::new(vm.clone(), policy, tag, ports))
    }
}

/// The port's tap, set up, and its MTU.
fn open_tap(port: &config::Port, handed_in: Option<OwnedFd>) -> anyhow::Result<(OwnedFd, u16)> {
    let name = port.tap.as_str();
    let tap = match handed_in {
        Some(fd) => tap::adopt(fd, name)?,
        None => tap::attach(name)?,
    };
    let wanted = Wanted {
        name: name.into(),
        netns: port.netns.as_ref().map(|netns| netns.path().to_path_buf()),
        bridge: port.bridge.clone(),
        mtu: port.mtu,
    };
    Ok((tap, link::configure(&wanted)?.mtu))
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
fn announce(config: &Config) {
    let ports = config.vms.iter().map(|vm| vm.ports.len()).sum::<usize>();
    let (vms, control) = (config.vms.len(), config.daemon.control.display());
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
