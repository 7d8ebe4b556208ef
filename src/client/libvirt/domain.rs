//! What a domain's XML says to vmflow (<https://libvirt.org/formatdomain.html>).
//!
//! ```text
//!   <uuid>                                    uuid, under which the label is kept
//!   <interface type='vhostuser'>              a port, if its socket is in /run/vmflow or in <metadata>
//!     <source path='S' mode='client'>           socket, and mode (vmflow's is the other side's)
//!     <target dev='T'>  <mtu size='N'>          tap, mtu
//!     <driver queues='N'>                       queue_pairs
//!   <seclabel model='dac'><label>U:G          owner: the user that QEMU will run as
//!   <metadata>
//!     <vmflow:port socket='S' KEY='VALUE'>    any other key of [[vm.port]], or another value for one of these
//! ```

use std::collections::BTreeMap;

use roxmltree::{Document, Node};
use serde_json::{Map, Value, json};
use uuid::Uuid;

/// The namespace of vmflow's own elements.
const NAMESPACE: &str = "urn:vmflow:libvirt:1";
/// Sockets in here are vmflow's.
const DIRECTORY: &str = "/run/vmflow/";

/// Why a domain cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// It is no XML.
    #[error("cannot understand its XML: {0}")]
    Xml(#[from] roxmltree::Error),
    /// Something that every domain has is missing.
    #[error("its XML has no valid <{0}>")]
    Missing(&'static str),
    /// A port of vmflow has no socket.
    #[error("<vmflow:port> in its <metadata> has no socket: add socket='PATH'")]
    NoSocket,
    /// A port of vmflow has no interface.
    #[error("<vmflow:port> names the socket {0:?}, which no <interface type='vhostuser'> has")]
    NoInterface(String),
    /// An interface has no tap.
    #[error("its interface at {0:?} has no tap: add <target dev='TAP'/>, or the VM to vmflow.toml")]
    NoTap(String),
}

/// A domain, as far as vmflow is concerned.
#[derive(Debug, PartialEq)]
pub(super) struct Domain {
    name: String,
    pub(super) uuid: Uuid,
    /// None for a domain that vmflow has nothing to do with.
    pub(super) ports: Vec<Port>,
}

/// An interface that is a port of vmflow.
#[derive(Debug, PartialEq)]
pub(super) struct Port {
    pub(super) socket: String,
    /// The keys of `[[vm.port]]` without the socket.
    keys: Map<String, Value>,
}

impl Port {
    pub(super) fn has_tap(&self) -> bool {
        self.keys.contains_key("tap")
    }
}

impl Domain {
    /// Reads a domain.
    ///
    /// # Errors
    /// [`DomainError`].
    pub(super) fn parse(xml: &str) -> Result<Self, DomainError> {
        let document = Document::parse(xml)?;
        let domain = document.root_element();
        let uuid = text_of(domain, "uuid").and_then(|text| Uuid::try_parse(text).ok());
        let mut said = said_by_metadata(domain)?;
        let mut ports = Vec::new();
        for interface in children(domain, "devices").flat_map(|devices| children(devices, "interface")) {
            ports.extend(port(domain, interface, &mut said));
        }
        if let Some((socket, _)) = said.pop_first() {
            return Err(DomainError::NoInterface(socket));
        }
        Ok(Self {
            name: text_of(domain, "name").ok_or(DomainError::Missing("name"))?.to_owned(),
            uuid: uuid.ok_or(DomainError::Missing("uuid"))?,
            ports,
        })
    }

    /// As `POST /v1/vms` takes it.
    pub(super) fn to_json(&self) -> Value {
        let port = |port: &Port| {
            let mut keys = port.keys.clone();
            keys.insert("socket".into(), port.socket.clone().into());
            Value::Object(keys)
        };
        json!({ "name": self.name, "uuid": self.uuid, "port": self.ports.iter().map(port).collect::<Vec<_>>() })
    }
}

/// The keys that `<vmflow:port>` elements give, by socket.
fn said_by_metadata(domain: Node<'_, '_>) -> Result<BTreeMap<String, Map<String, Value>>, DomainError> {
    let mut said = BTreeMap::new();
    let elements = children(domain, "metadata").flat_map(|metadata| metadata.children());
    for element in elements.filter(|element| element.has_tag_name((NAMESPACE, "port"))) {
        let socket = element.attribute("socket").ok_or(DomainError::NoSocket)?;
        let others = element.attributes().filter(|attribute| attribute.name() != "socket");
        let keys =
            others.map(|attribute| (attribute.name().to_owned(), value(attribute.name(), attribute.value())));
        said.insert(socket.to_owned(), keys.collect());
    }
    Ok(said)
}

/// An attribute's text as the type that its key has in the configuration. What is not of that type is judged there.
fn value(key: &str, text: &str) -> Value {
    match key {
        "mtu" | "queue_pairs" | "poll_us" => text.parse::<i64>().map_or_else(|_| text.into(), Value::from),
        "control_queue" | "coalesce" => text.parse::<bool>().map_or_else(|_| text.into(), Value::from),
        "peer" => json!({ "uid": text }),
        _ => text.into(),
    }
}

/// The port that an interface is, if it is vmflow's. What metadata says goes before what the interface says.
fn port(
    domain: Node<'_, '_>,
    interface: Node<'_, '_>,
    said: &mut BTreeMap<String, Map<String, Value>>,
) -> Option<Port> {
    let source = children(interface, "source").next()?;
    let socket = source.attribute("path").filter(|_| interface.attribute("type") == Some("vhostuser"))?;
    let mut more = said.remove(socket);
    if more.is_none() && !socket.starts_with(DIRECTORY) {
        return None;
    }
    let attribute = |element, name| children(interface, element).find_map(|child| child.attribute(name));
    let qemu_listens = source.attribute("mode") == Some("server");
    let mut keys = Map::new();
    keys.insert("mode".into(), if qemu_listens { "client" } else { "server" }.into());
    let written = [
        ("tap", attribute("target", "dev")),
        ("mtu", attribute("mtu", "size")),
        ("queue_pairs", attribute("driver", "queues")),
        ("owner", qemu_user(domain).filter(|_| !qemu_listens)),
    ];
    keys.extend(written.into_iter().filter_map(|(key, text)| Some((key.into(), value(key, text?)))));
    keys.append(&mut more.take().unwrap_or_default());
    Some(Port { socket: socket.to_owned(), keys })
}

/// The user that QEMU will run as, by name or number.
fn qemu_user<'d>(domain: Node<'d, '_>) -> Option<&'d str> {
    let label = children(domain, "seclabel").find(|label| label.attribute("model") == Some("dac"))?;
    // A plus says that it is a number.
    text_of(label, "label")?.split(':').next().map(|user| user.trim_start_matches('+'))
}

fn children<'d, 'i: 'd>(node: Node<'d, 'i>, name: &'d str) -> impl Iterator<Item = Node<'d, 'i>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

fn text_of<'d>(node: Node<'d, '_>, name: &str) -> Option<&'d str> {
    node.children().find(|child| child.has_tag_name(name))?.text().map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3";

    fn domain(metadata: &str, interfaces: &str) -> Result<Domain, DomainError> {
        Domain::parse(&format!(
            "<domain type='kvm'><name>web1</name><uuid>{UUID}</uuid>\
             <metadata xmlns:v='{NAMESPACE}'>{metadata}</metadata><devices>{interfaces}</devices>\
             <seclabel type='dynamic' model='apparmor'><label>x</label></seclabel>\
             <seclabel type='dynamic' model='dac'><label>+64055:+64055</label></seclabel></domain>"
        ))
    }

    fn interface(socket: &str, mode: &str, inside: &str) -> String {
        format!(
            "<interface type='vhostuser'><source type='unix' path='{socket}' mode='{mode}'/>{inside}</interface>"
        )
    }

    fn refused(metadata: &str, interfaces: &str) -> String {
        domain(metadata, interfaces).unwrap_err().to_string()
    }

    #[test]
    fn an_interface_says_all_that_a_port_needs() {
        let more = "<target dev='vmf-web1'/><mtu size='9000'/><driver queues='4'/>";
        let said = domain("", &interface("/run/vmflow/web1/net0.sock", "client", more)).unwrap();
        let port = json!({ "socket": "/run/vmflow/web1/net0.sock", "mode": "server", "tap": "vmf-web1",
            "mtu": 9000, "queue_pairs": 4, "owner": "64055" });
        assert_eq!(said.to_json(), json!({ "name": "web1", "uuid": UUID, "port": [port] }));
    }

    #[test]
    fn metadata_says_the_rest_and_goes_before_the_interface() {
        let metadata = "<v:port socket='/s' tap='t2' bridge='br0' peer='64055' control_queue='false'/>";
        let said = domain(metadata, &interface("/s", "server", "<target dev='t1'/>")).unwrap();
        let port = json!({ "socket": "/s", "mode": "client", "tap": "t2", "bridge": "br0",
            "peer": { "uid": "64055" }, "control_queue": false });
        assert_eq!(said.to_json()["port"], json!([port]));
    }

    #[test]
    fn other_interfaces_are_none_of_our_business() {
        let bridge = "<interface type='bridge'><source bridge='/run/vmflow/x'/></interface>";
        let others = [interface("/run/openvswitch/s", "client", ""), bridge.into()].concat();
        assert_eq!(domain("<other/>", &others).unwrap().ports, []);
        assert_eq!(domain("", "").unwrap().ports, []);
    }

    #[test]
    fn what_is_wrong_is_one_line_that_says_what_to_do() {
        assert_eq!(
            refused("<v:port bridge='br0'/>", ""),
            "<vmflow:port> in its <metadata> has no socket: add socket='PATH'"
        );
        assert_eq!(
            refused("<v:port socket='/s'/>", &interface("/t", "client", "")),
            "<vmflow:port> names the socket \"/s\", which no <interface type='vhostuser'> has"
        );
        assert!(
            Domain::parse("<domain>").unwrap_err().to_string().starts_with("cannot understand its XML: ")
        );
        assert_eq!(
            Domain::parse("<domain><name>a</name></domain>").unwrap_err().to_string(),
            "its XML has no valid <uuid>"
        );
    }
}
