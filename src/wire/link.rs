//! The link layer: Ethernet II and 802.3 with LLC, behind at most two VLAN tags.
//!
//! ```text
//!  0            6            12                                   <- offset
//!  | destination | source     | EtherType      | packet ...        Ethernet II
//!  | destination | source     | tag | EtherType | packet ...        one tag: 0x8100 or 0x88a8, then 2 bytes
//!  | destination | source     | length | DSAP SSAP control | ...    802.3 with LLC
//!  | destination | source     | length | AA AA 03 | OUI | EtherType | packet ...   SNAP
//! ```
//!
//! A tag is only what Linux takes for one: frames with the old 0x9100 have that as their `EtherType`.

use super::{Depth, Headers, Unclassified, View, be16, field, key, net};
use std::fmt;

/// Two addresses and an `EtherType`: what every frame begins with.
pub const ETHERNET_HEADER: u8 = 14;
/// What each VLAN tag adds to a frame.
pub const VLAN_TAG: u8 = 4;
/// How many tags are looked behind, and how many may lengthen a frame beyond its MTU.
pub const MAX_VLAN_TAGS: usize = 2;

/// The largest value of the type field that is a length (IEEE 802.3).
const MAX_802_3_LENGTH: u16 = 1500;
/// The smallest value of the type field that is an `EtherType`; what lies between is neither.
const MIN_ETHER_TYPE: u16 = 0x600;
const ETHERNET_SIZE: usize = ETHERNET_HEADER as usize;
const TAG_SIZE: usize = VLAN_TAG as usize;
const LLC_SIZE: usize = 3;
const SNAP_SIZE: usize = 8;
/// LLC's two service access points and its control field, when SNAP follows.
const LLC_SNAP: [u8; LLC_SIZE] = [0xaa, 0xaa, 0x03];
/// Who defines the type that follows in SNAP: RFC 1042 and IEEE 802.1H both mean an `EtherType`.
const SNAP_RFC1042: [u8; 3] = [0, 0, 0];
const SNAP_802_1H: [u8; 3] = [0, 0, 0xf8];

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// The address of these bytes, in the order in which they travel.
    #[must_use]
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// The bytes, in the order in which they travel.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Does it name a group (the broadcast address included)? Then it can't be anybody's source.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|octet| write!(f, ":{octet:02x}"))
    }
}

/// An `EtherType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4.
    pub const IPV4: Self = Self(0x0800);
    /// ARP.
    pub const ARP: Self = Self(0x0806);
    /// A VLAN tag of 802.1Q.
    pub const VLAN: Self = Self(0x8100);
    /// IPv6.
    pub const IPV6: Self = Self(0x86dd);
    /// A service VLAN tag of 802.1ad ("`QinQ`").
    pub const SERVICE_VLAN: Self = Self(0x88a8);

    /// Does a VLAN tag follow?
    #[must_use]
    pub const fn is_vlan(self) -> bool {
        self.0 == Self::VLAN.0 || self.0 == Self::SERVICE_VLAN.0
    }
}

/// A VLAN tag: which of the two kinds it is, and its control field (priority 3 bits, drop eligible 1, ID 12).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VlanTag {
    control: u16,
    is_service: bool,
}

impl VlanTag {
    pub(super) const fn new(control: u16, is_service: bool) -> Self {
        Self { control, is_service }
    }

    const ID_MASK: u16 = 0x0fff;
    const DROP_ELIGIBLE: u16 = 0x1000;
    const PRIORITY_SHIFT: u32 = 13;

    /// The VLAN's ID; 0 means that the tag only carries a priority.
    #[must_use]
    pub const fn id(self) -> u16 {
        self.control & Self::ID_MASK
    }

    /// The priority, 0 to 7.
    #[must_use]
    pub const fn priority(self) -> u8 {
        let [_, low] = self.control.wrapping_shr(Self::PRIORITY_SHIFT).to_be_bytes();
        low
    }

    /// May it be dropped first?
    #[must_use]
    pub const fn is_drop_eligible(self) -> bool {
        self.control & Self::DROP_ELIGIBLE != 0
    }

    /// Is it a service tag (0x88a8), not a customer's (0x8100)?
    #[must_use]
    pub const fn is_service(self) -> bool {
        self.is_service
    }
}

/// How the frame says what it carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Framing {
    /// By an `EtherType` behind the addresses.
    #[default]
    EthernetII,
    /// By an `EtherType` behind an LLC and a SNAP header.
    Snap,
    /// By LLC's service access points: spanning tree (0x42), for one.
    Llc,
}

/// A packet in its frame: what it should be, where it begins, and a view that ends where the link layer ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    pub(super) view: View<'a>,
    pub(super) offset: usize,
    pub(super) ether_type: EtherType,
}

/// Reads the link layer and what it carries.
#[inline]
pub(super) fn read(headers: &mut Headers, view: View<'_>) -> Result<(), Unclassified> {
    let header = view.at::<ETHERNET_SIZE>(0).ok_or(Unclassified::Runt)?;
    headers.key.set_macs(&field::<0, 12, _>(header));
    headers.depth = Depth::Link;
    let ether_type = EtherType(be16::<12, _>(header));
    if ether_type.is_vlan() || ether_type.0 < MIN_ETHER_TYPE {
        return read_wrapped(headers, view.copy, view.end, ether_type);
    }
    headers.key.set_ether_type(ether_type, Framing::EthernetII);
    headers.set_l3_offset(ETHERNET_SIZE);
    net::read(headers, Packet { view, offset: ETHERNET_SIZE, ether_type })
}

/// The same behind tags or LLC. Apart, and with the view in pieces, so that the plain frame's can stay in
/// registers.
#[inline(never)]
fn read_wrapped(
    headers: &mut Headers,
    copy: &[u8],
    end: usize,
    ether_type: EtherType,
) -> Result<(), Unclassified> {
    let mut packet = Packet { view: View { copy, end }, offset: ETHERNET_SIZE, ether_type };
    step_over_tags(headers, &mut packet)?;
    let framing = if packet.ether_type.0 < MIN_ETHER_TYPE {
        step_over_llc(headers, &mut packet)?
    } else {
        Framing::EthernetII
    };
    headers.key.set_ether_type(packet.ether_type, framing);
    headers.set_l3_offset(packet.offset);
    if framing == Framing::Llc { Ok(()) } else { net::read(headers, packet) }
}

fn step_over_tags(headers: &mut Headers, packet: &mut Packet<'_>) -> Result<(), Unclassified> {
    for place in 0..=MAX_VLAN_TAGS {
        if !packet.ether_type.is_vlan() {
            return Ok(());
        }
        // What the key tells, should this tag be the last that can be read.
        headers.key.set_ether_type(packet.ether_type, Framing::EthernetII);
        let tag = packet.view.at::<TAG_SIZE>(packet.offset).ok_or(Unclassified::TruncatedVlanTag)?;
        let control = headers.tags.get_mut(place).ok_or(Unclassified::TooManyVlanTags)?;
        *control = be16::<0, _>(tag);
        let is_service = packet.ether_type == EtherType::SERVICE_VLAN;
        headers.key.set_vlan(place, key::vlan(*control, is_service));
        packet.ether_type = EtherType(be16::<2, _>(tag));
        packet.offset = packet.offset.wrapping_add(TAG_SIZE);
    }
    Err(Unclassified::TooManyVlanTags)
}

/// Steps over LLC and SNAP to a packet with an `EtherType`; without SNAP, stays before LLC and takes its
/// service access points for the type.
#[cold]
fn step_over_llc(headers: &mut Headers, packet: &mut Packet<'_>) -> Result<Framing, Unclassified> {
    let length = packet.ether_type.0;
    // Until more is known: no service access point, not a length that reads like a type.
    headers.key.set_ether_type(EtherType(0), Framing::Llc);
    let end = packet.offset.wrapping_add(usize::from(length));
    let view = packet.view.until(end).filter(|_| length <= MAX_802_3_LENGTH);
    packet.view = view.ok_or(Unclassified::LengthField)?;
    let llc = packet.view.at::<LLC_SIZE>(packet.offset).ok_or(Unclassified::TruncatedLlc)?;
    packet.ether_type = EtherType(be16::<0, _>(llc));
    if *llc != LLC_SNAP {
        return Ok(Framing::Llc);
    }
    headers.key.set_ether_type(packet.ether_type, Framing::Llc);
    let snap = packet.view.at::<SNAP_SIZE>(packet.offset).ok_or(Unclassified::TruncatedLlc)?;
    let ether_type = EtherType(be16::<6, _>(snap));
    if ![SNAP_RFC1042, SNAP_802_1H].contains(&field::<3, 3, _>(snap)) || ether_type.0 < MIN_ETHER_TYPE {
        return Ok(Framing::Llc);
    }
    if ether_type.is_vlan() {
        return Err(Unclassified::MisplacedVlanTag);
    }
    packet.ether_type = ether_type;
    packet.offset = packet.offset.wrapping_add(SNAP_SIZE);
    Ok(Framing::Snap)
}
