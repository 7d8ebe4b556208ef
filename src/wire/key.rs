//! What tells one flow from another: everything that a flow-invariant rule may read, and nothing else.
//!
//! ```text
//!  byte   0         2           4           6         7        8
//!  word 0 | destination MAC                 | source MAC ...   |
//!       1 | ... source MAC      | outer VLAN          | inner  |     VLAN: 2 bytes each
//!    2, 3 | source address, IPv4's in the first 4 bytes        |
//!    4, 5 | destination address, likewise                      |
//!       6 | EtherType | source port | destination port | protocol | family |     ICMP: type, code for ports
//!       7 | fragment | framing | what the ports are | 0 ...    |
//! ```
//!
//! Frames of one flow have equal keys, and what isn't there is 0 in all of them. So a key is eight words to
//! copy, to hash and to compare. A VLAN's priority is no part of it: it may change within a flow.

use super::link::MAX_VLAN_TAGS;
use super::{EtherType, Family, Fragment, Framing, Icmp, Mac};
use std::net::{Ipv4Addr, Ipv6Addr};

const WORDS: usize = 8;
const WORD_SIZE: usize = 8;
const MACS_SIZE: usize = 12;

/// Above a VLAN's ID of 12 bits: there is a tag (so that ID 0 differs from no tag), and it is a service tag.
const TAG_PRESENT: u16 = 0x8000;
const TAG_SERVICE: u16 = 0x4000;
const TAG_ID: u16 = 0x0fff;

/// Where the fields of words 0, 1, 6 and 7 begin, in bits.
const SOURCE_MAC: u32 = 48;
const VLANS: [u32; MAX_VLAN_TAGS] = [32, 48];
const ENDS: u32 = 16;
const PROTOCOL: u32 = 48;
const FAMILY: u32 = 56;
const FRAMING: u32 = 8;
const ENDS_KIND: u32 = 16;

/// What the two port fields hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Ends {
    /// TCP's or UDP's ports. 0: nothing.
    Ports = 1,
    /// ICMP's type and code.
    Icmp = 2,
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey([u64; WORDS]);

/// A VLAN, as the key tells it.
pub(super) fn vlan(id: u16, is_service: bool) -> u16 {
    TAG_PRESENT | if is_service { TAG_SERVICE } else { 0 } | id & TAG_ID
}

fn at(value: impl Into<u64>, bit: u32) -> u64 {
    value.into().wrapping_shl(bit)
}

/// How the key is written: each layer once, from the outside in.
impl FlowKey {
    #[inline]
    pub(super) fn set_macs(&mut self, macs: &[u8; MACS_SIZE]) {
        let [first, second, ..] = &mut self.0;
        *first = u64::from_le_bytes(super::field::<0, 8, _>(macs));
        *second = u64::from(u32::from_le_bytes(super::field::<8, 4, _>(macs)));
    }

    pub(super) fn set_vlan(&mut self, place: usize, vlan: u16) {
        let [_, second, ..] = &mut self.0;
        *second |= VLANS.get(place).map_or(0, |bit| at(vlan, *bit));
    }

    #[inline]
    pub(super) fn set_ether_type(&mut self, ether_type: EtherType, framing: Framing) {
        let [.., seventh, eighth] = &mut self.0;
        *seventh = u64::from(ether_type.0);
        *eighth = at(framing as u8, FRAMING);
    }

    #[inline]
    pub(super) fn set_addresses(&mut self, family: Family, source: [u64; 2], destination: [u64; 2]) {
        let ([s0, s1], [d0, d1]) = (source, destination);
        let [_, _, third, fourth, fifth, sixth, seventh, _] = &mut self.0;
        (*third, *fourth, *fifth, *sixth) = (s0, s1, d0, d1);
        *seventh |= at(family as u8, FAMILY);
    }

    #[inline]
    pub(super) fn set_protocol(&mut self, protocol: u8, fragment: Fragment) {
        let [.., seventh, eighth] = &mut self.0;
        *seventh |= at(protocol, PROTOCOL);
        *eighth |= u64::from(fragment as u8);
    }

    /// `ends` are the two fields as the transport's header has them.
    #[inline]
    pub(super) fn set_ends(&mut self, kind: Ends, ends: [u8; 4]) {
        let [.., seventh, eighth] = &mut self.0;
        *seventh |= at(u32::from_le_bytes(ends), ENDS);
        *eighth |= at(kind as u8, ENDS_KIND);
    }
}

/// What the key tells.
impl FlowKey {
    /// The whole key, for tables that keep and compare it. The order of the bytes is the same everywhere.
    #[must_use]
    pub const fn words(&self) -> &[u64; WORDS] {
        &self.0
    }

    fn bytes<const WORD: usize>(&self) -> [u8; WORD_SIZE] {
        const { assert!(WORD < WORDS) };
        self.0.get(WORD).copied().unwrap_or_default().to_le_bytes()
    }

    /// The Ethernet address of the receiver.
    #[must_use]
    pub fn destination_mac(&self) -> Mac {
        Mac::new(super::field::<0, 6, _>(&self.bytes::<0>()))
    }

    /// The Ethernet address of the sender.
    #[must_use]
    pub fn source_mac(&self) -> Mac {
        let [first, second, ..] = self.0;
        let mac = first.wrapping_shr(SOURCE_MAC) | second.wrapping_shl(u64::BITS.wrapping_sub(SOURCE_MAC));
        Mac::new(super::field::<0, 6, _>(&mac.to_le_bytes()))
    }

    fn vlans(&self) -> [u16; MAX_VLAN_TAGS] {
        let [_, _, _, _, a, b, c, d] = self.bytes::<1>();
        [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]
    }

    /// The IDs of the outer and of the inner VLAN.
    #[must_use]
    pub fn vlan_ids(&self) -> [Option<u16>; MAX_VLAN_TAGS] {
        let id = |vlan| if vlan & TAG_PRESENT != 0 { Some(vlan & TAG_ID) } else { None };
        let [outer, inner] = self.vlans();
        [id(outer), id(inner)]
    }

    /// Which of the VLANs are the service's (0x88a8), not the customer's.
    pub(super) fn service_vlans(&self) -> [bool; MAX_VLAN_TAGS] {
        let [outer, inner] = self.vlans();
        [outer & TAG_SERVICE != 0, inner & TAG_SERVICE != 0]
    }

    fn type_field(&self) -> u16 {
        let [a, b, ..] = self.bytes::<6>();
        u16::from_le_bytes([a, b])
    }

    /// What the frame carries, behind its tags; `None` if it has LLC's service access points instead.
    #[must_use]
    pub fn ether_type(&self) -> Option<EtherType> {
        (self.framing() != Framing::Llc).then_some(EtherType(self.type_field()))
    }

    /// LLC's destination and source service access point, of a frame that has no `EtherType`.
    #[must_use]
    pub fn service_access_points(&self) -> Option<[u8; 2]> {
        (self.framing() == Framing::Llc).then_some(self.type_field().to_be_bytes())
    }

    /// How the frame says what it carries.
    #[must_use]
    pub fn framing(&self) -> Framing {
        let [_, framing, ..] = self.bytes::<7>();
        if framing == Framing::Snap as u8 {
            Framing::Snap
        } else if framing == Framing::Llc as u8 {
            Framing::Llc
        } else {
            Framing::EthernetII
        }
    }

    /// Of which kind its addresses are.
    #[inline]
    #[must_use]
    pub fn family(&self) -> Family {
        let [.., family] = self.bytes::<6>();
        [Family::Ipv4, Family::Ipv6, Family::Arp].into_iter().find(|f| *f as u8 == family).unwrap_or_default()
    }

    /// The addresses above the MACs.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        let first = Ipv4Addr::from(super::field::<0, 4, _>(&self.bytes::<2>()));
        let second = Ipv4Addr::from(super::field::<0, 4, _>(&self.bytes::<4>()));
        match self.family() {
            Family::None => Addresses::None,
            Family::Ipv4 => Addresses::V4 { source: first, destination: second },
            Family::Arp => Addresses::Arp { sender: first, target: second },
            Family::Ipv6 => Addresses::V6 {
                source: joined(self.bytes::<2>(), self.bytes::<3>()),
                destination: joined(self.bytes::<4>(), self.bytes::<5>()),
            },
        }
    }

    /// What an IP packet carries, behind its extension headers; 0 is a protocol, too.
    #[must_use]
    pub fn protocol(&self) -> Option<u8> {
        let [.., protocol, _] = self.bytes::<6>();
        matches!(self.family(), Family::Ipv4 | Family::Ipv6).then_some(protocol)
    }

    /// Is it a piece of a packet?
    #[inline]
    #[must_use]
    pub fn fragment(&self) -> Fragment {
        let [fragment, ..] = self.bytes::<7>();
        [Fragment::First, Fragment::Later].into_iter().find(|f| *f as u8 == fragment).unwrap_or_default()
    }

    fn ends(&self, kind: Ends) -> Option<[u8; 4]> {
        let [_, _, found, ..] = self.bytes::<7>();
        (found == kind as u8).then_some(super::field::<2, 4, _>(&self.bytes::<6>()))
    }

    /// The sender's and the receiver's port; 0 is a port, too.
    #[must_use]
    pub fn ports(&self) -> Option<(u16, u16)> {
        let [a, b, c, d] = self.ends(Ends::Ports)?;
        Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    }

    /// ICMP's or `ICMPv6`'s type and code.
    #[must_use]
    pub fn icmp(&self) -> Option<Icmp> {
        let [kind, code, ..] = self.ends(Ends::Icmp)?;
        Some(Icmp { kind, code })
    }
}

fn joined(high: [u8; WORD_SIZE], low: [u8; WORD_SIZE]) -> Ipv6Addr {
    let bits = |half| u128::from(u64::from_be_bytes(half));
    Ipv6Addr::from_bits(bits(high).wrapping_shl(u64::BITS) | bits(low))
}

/// One cache line.
const _: () = assert!(size_of::<FlowKey>() == 64);
