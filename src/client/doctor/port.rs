//! A port: its front end, its tap, and its socket.

use std::path::{Path, PathBuf};

use super::{Finding, socket};
use crate::{
    config::{self, Config},
    monitor::{
        api::document::{Mode, PortDocument, Vms},
        link::{self, Link, Wanted},
    },
};

/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// A port as it is configured, or as the monitor has it, or both.
#[derive(Debug)]
pub(super) struct Port {
    what: String,
    pub(super) socket: PathBuf,
    tap: String,
    netns: Option<PathBuf>,
    config: Option<config::Port>,
    /// As the monitor has it.
    served: Option<PortDocument>,
}

impl Port {
    /// Every port of the configuration, and those that only the monitor knows.
    pub(super) fn all(config: Option<&Config>, vms: Option<&Vms>) -> Vec<Self> {
        let mut served: Vec<_> = vms
            .iter()
            .flat_map(|vms| &vms.vms)
            .flat_map(|vm| vm.ports.iter().map(|port| (&vm.name, port)))
            .collect();
        let mut ports = Vec::new();
        for (vm, port) in
            config.iter().flat_map(|config| &config.vms).flat_map(|vm| vm.ports.iter().map(move |p| (vm, p)))
        {
            let place = served.iter().position(|(_, known)| Path::new(&known.socket) == port.socket);
            ports.push(Self {
                what: format!("{}, tap {}", vm.name, port.tap),
                socket: port.socket.clone(),
                tap: port.tap.to_string(),
                netns: port.netns.as_ref().map(|netns| netns.path().to_owned()),
                config: Some(port.clone()),
                served: place.map(|place| served.remove(place).1.clone()),
            });
        }
        ports.extend(served.into_iter().map(|(vm, port)| Self::served(vm, port)));
        ports
    }

    /// One that only the monitor knows.
    fn served(vm: &str, port: &PortDocument) -> Self {
        Self {
            what: format!("{vm}, tap {}", port.tap),
            socket: port.socket.clone().into(),
            tap: port.tap.clone(),
            // A path stays what it is.
            netns: port.netns.as_ref().map(|name| Path::new(NAMESPACES).join(name)),
            config: None,
            served: Some(port.clone()),
        }
    }

    /// Looks at everything.
    pub(super) fn look(&self, is_running: bool) -> Vec<Finding> {
        if !is_running {
            return vec![self.prospects()];
        }
        let Some(served) = &self.served else {
            return vec![Finding::warn(
                &self.what,
                "is in the configuration and not served",
                "run `vmflow reload`",
            )];
        };
        let mut findings = vec![self.front_end(served)];
        match link::look(&self.tap, self.netns.as_deref()) {
            Ok(tap) => findings.push(self.judge_tap(&tap)),
            Err(error) => {
                findings.push(Finding::fail(&self.what, error.to_string(), "restart vmflow: it makes it"));
            }
        }
        let config = self.config.as_ref().filter(|_| served.mode == Mode::Server);
        findings.extend(config.map(|config| socket::port(&self.what, config)));
        findings
    }

    /// What the next start will need.
    fn prospects(&self) -> Finding {
        let bridge = self.config.as_ref().and_then(|config| config.bridge.clone());
        let wanted =
            Wanted { name: self.tap.clone(), netns: self.netns.clone(), bridge, ..Wanted::default() };
        match link::check(&wanted) {
            Ok(()) => Finding::ok(&self.what, "its network namespace and bridge are there"),
            Err(error) => Finding::fail(&self.what, error.to_string(), "make it before vmflow starts"),
        }
    }

    fn front_end(&self, served: &PortDocument) -> Finding {
        let socket = self.socket.display();
        match (served.connected, served.mode) {
            (true, _) => Finding::ok(&self.what, "a front end is connected"),
            (false, Mode::Server) => Finding::warn(
                &self.what,
                format!("no front end is connected to {socket}"),
                "start the VM, or look at its VMM's log",
            ),
            (false, Mode::Client) => Finding::warn(
                &self.what,
                format!("nobody listens at {socket}"),
                "start the VM, with server=on at its socket",
            ),
        }
    }

    fn judge_tap(&self, tap: &Link) -> Finding {
        let config = self.config.as_ref();
        let wanted = config.and_then(|config| config.bridge.as_deref());
        let bridge = tap.bridge.as_ref().map(|(name, _)| name.as_str());
        if !tap.is_up {
            let command = self.command(&format!("link set {} up", self.tap));
            return Finding::fail(&self.what, "the tap is down", command);
        }
        if wanted.is_some() && bridge != wanted {
            let (wanted, bridge) = (wanted.unwrap_or_default(), bridge.unwrap_or("none"));
            let command = self.command(&format!("link set {} master {wanted}", self.tap));
            return Finding::fail(&self.what, format!("the tap's bridge is {bridge}, not {wanted}"), command);
        }
        if let Some(mtu) = config.and_then(|config| config.mtu).filter(|mtu| u32::from(*mtu) != tap.mtu) {
            let command = self.command(&format!("link set {} mtu {mtu}", self.tap));
            return Finding::fail(&self.what, format!("the tap's MTU is {}, not {mtu}", tap.mtu), command);
        }
        if let Some((name, mtu)) = tap.bridge.as_ref().filter(|(_, mtu)| *mtu < tap.mtu) {
            let why = format!("the tap's MTU is {}, that of its bridge {name} only {mtu}", tap.mtu);
            return Finding::warn(&self.what, why, "larger frames are lost there: give both the same MTU");
        }
        let at = bridge.map_or_else(String::new, |bridge| format!(", a port of {bridge}"));
        Finding::ok(&self.what, format!("the tap is up, MTU {}{at}", tap.mtu))
    }

    /// An `ip` command at the tap's place.
    fn command(&self, words: &str) -> String {
        match &self.netns {
            Some(netns) if netns.parent() == Some(Path::new(NAMESPACES)) => {
                format!("ip -n {} {words}", netns.file_name().unwrap_or_default().display())
            }
            Some(netns) => format!("nsenter --net={} ip {words}", netns.display()),
            None => format!("ip {words}"),
        }
    }
}
