//! What tells one flow from another: everything that a flow-invariant rule may read, and nothing else.
//!
//! ```text
//!  0            6       12      16                  32                  48          50      52      54 .. 58
//!  | destination | source | VLANs | source address  | destination addr. | EtherType | ports | ports | kinds |
//! ```
//!
//! Frames of one flow have equal keys, and every field that isn't there is 0 in all of them, so a key can be
//! hashed and compared as [eight words](FlowKey::words). A VLAN's priority is no part of it: it may change
//! within a flow.

use super::link::{Link, MAX_VLAN_TAGS};
use super::net::Network;
use super::{EtherType, Family, Fragment, Framing, Icmp, Mac, Transport, VlanTag};
use std::hash::{Hash, Hasher};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Above a VLAN's ID of 12 bits: there is a tag (so that ID 0 differs from no tag), and it is a service tag.
const TAG_PRESENT: u16 = 0x8000;
const TAG_SERVICE: u16 = 0x4000;
const TAG_ID: u16 = 0x0fff;

/// What the two port fields hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
enum Ends {
    #[default]
    None,
    Ports,
    /// ICMP's type and code.
    Icmp,
}

/// The addresses above the MACs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Addresses {
    /// None.
    None,
    /// An IPv4 packet's.
    V4 {
        /// Who sent it.
        source: Ipv4Addr,
        /// To whom.
        destination: Ipv4Addr,
    },
    /// An IPv6 packet's.
    V6 {
        /// Who sent it.
        source: Ipv6Addr,
        /// To whom.
        destination: Ipv6Addr,
    },
    /// An ARP packet's.
    Arp {
        /// Who asks or answers.
        sender: Ipv4Addr,
        /// Who is asked for.
        target: Ipv4Addr,
    },
}

/// What tells a frame's flow from others, within one label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowKey {
    destination_mac: Mac,
    source_mac: Mac,
    vlans: [u16; MAX_VLAN_TAGS],
    source: [u8; 16],
    destination: [u8; 16],
    ether_type: EtherType,
    ends: [u16; 2],
    protocol: u8,
    family: Family,
    fragment: Fragment,
    framing: Framing,
    ends_are: Ends,
}

fn vlan(tag: Option<VlanTag>) -> u16 {
    tag.map_or(0, |tag| TAG_PRESENT | if tag.is_service() { TAG_SERVICE } else { 0 } | tag.id())
}

fn narrow(address: [u8; 16]) -> Ipv4Addr {
    let [a, b, c, d, ..] = address;
    Ipv4Addr::new(a, b, c, d)
}

impl FlowKey {
    #[inline]
    pub(super) fn of_link(link: &Link) -> Self {
        Self {
            destination_mac: link.destination,
            source_mac: link.source,
            vlans: link.tags.pair().map(vlan),
            ether_type: link.ether_type,
            framing: link.framing,
            ..Self::default()
        }
    }

    #[inline]
    pub(super) fn add_network(&mut self, network: &Network) {
        self.source = network.source;
        self.destination = network.destination;
        self.protocol = network.protocol;
        self.family = network.family;
        self.fragment = network.fragment;
    }

    #[inline]
    pub(super) fn add_transport(&mut self, transport: Transport) {
        (self.ends_are, self.ends) = match transport {
            Transport::None => (Ends::None, [0, 0]),
            Transport::Tcp(tcp) => (Ends::Ports, [tcp.source_port, tcp.destination_port]),
            Transport::Udp(udp) => (Ends::Ports, [udp.source_port, udp.destination_port]),
            Transport::Icmp(icmp) | Transport::Icmpv6(icmp) => {
                (Ends::Icmp, [u16::from(icmp.kind), u16::from(icmp.code)])
            }
        };
    }

    /// The Ethernet address of the receiver.
    #[must_use]
    pub const fn destination_mac(&self) -> Mac {
        self.destination_mac
    }

    /// The Ethernet address of the sender.
    #[must_use]
    pub const fn source_mac(&self) -> Mac {
        self.source_mac
    }

    /// The IDs of the outer and of the inner VLAN.
    #[must_use]
    pub fn vlan_ids(&self) -> [Option<u16>; MAX_VLAN_TAGS] {
        self.vlans.map(|vlan| (vlan & TAG_PRESENT != 0).then_some(vlan & TAG_ID))
    }

    /// What the frame carries, behind its tags; `None` if it has LLC's service access points instead.
    #[must_use]
    pub fn ether_type(&self) -> Option<EtherType> {
        (self.framing != Framing::Llc).then_some(self.ether_type)
    }

    /// LLC's destination and source service access point, of a frame that has no `EtherType`.
    #[must_use]
    pub fn service_access_points(&self) -> Option<[u8; 2]> {
        (self.framing == Framing::Llc).then_some(self.ether_type.0.to_be_bytes())
    }

    /// How the frame says what it carries.
    #[must_use]
    pub const fn framing(&self) -> Framing {
        self.framing
    }

    /// Of which kind its addresses are.
    #[must_use]
    pub const fn family(&self) -> Family {
        self.family
    }

    /// The addresses above the MACs.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        match self.family {
            Family::None => Addresses::None,
            Family::Ipv4 => {
                Addresses::V4 { source: narrow(self.source), destination: narrow(self.destination) }
            }
            Family::Ipv6 => Addresses::V6 {
                source: Ipv6Addr::from(self.source),
                destination: Ipv6Addr::from(self.destination),
            },
            Family::Arp => Addresses::Arp { sender: narrow(self.source), target: narrow(self.destination) },
        }
    }

    /// What an IP packet carries, behind its extension headers; 0 is a protocol, too.
    #[must_use]
    pub fn protocol(&self) -> Option<u8> {
        matches!(self.family, Family::Ipv4 | Family::Ipv6).then_some(self.protocol)
    }

    /// Is it a piece of a packet?
    #[must_use]
    pub const fn fragment(&self) -> Fragment {
        self.fragment
    }

    /// The sender's and the receiver's port; 0 is a port, too.
    #[must_use]
    pub fn ports(&self) -> Option<(u16, u16)> {
        let [source, destination] = self.ends;
        (self.ends_are == Ends::Ports).then_some((source, destination))
    }

    /// ICMP's or ICMPv6's type and code.
    #[must_use]
    pub fn icmp(&self) -> Option<Icmp> {
        let [[_, kind], [_, code]] = self.ends.map(u16::to_be_bytes);
        (self.ends_are == Ends::Icmp).then_some(Icmp { kind, code })
    }

    /// The whole key in eight words: equal if and only if the keys are. For hashing, and for tables that store
    /// it; the order of the bytes is the machine's, so it is not for other machines.
    #[inline]
    #[must_use]
    pub fn words(&self) -> [u64; 8] {
        let [d0, d1, d2, d3, d4, d5] = self.destination_mac.octets();
        let [s0, s1, s2, s3, s4, s5] = self.source_mac.octets();
        let [[v0, v1], [w0, w1]] = self.vlans.map(u16::to_ne_bytes);
        let [[p0, p1], [q0, q1]] = self.ends.map(u16::to_ne_bytes);
        let [t0, t1] = self.ether_type.0.to_ne_bytes();
        let [s_low, s_high] = halves(self.source);
        let [d_low, d_high] = halves(self.destination);
        [
            u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, s0, s1]),
            u64::from_ne_bytes([s2, s3, s4, s5, v0, v1, w0, w1]),
            s_low,
            s_high,
            d_low,
            d_high,
            u64::from_ne_bytes([t0, t1, p0, p1, q0, q1, self.protocol, self.family as u8]),
            u64::from_ne_bytes([self.fragment as u8, self.framing as u8, self.ends_are as u8, 0, 0, 0, 0, 0]),
        ]
    }
}

#[inline]
fn halves(address: [u8; 16]) -> [u64; 2] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    [u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes([i, j, k, l, m, n, o, p])]
}

/// By words, which costs a hasher less than field by field.
impl Hash for FlowKey {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        for word in self.words() {
            state.write_u64(word);
        }
    }
}

/// One cache line, with room for nothing else.
const _: () = assert!(size_of::<FlowKey>() <= 64);
