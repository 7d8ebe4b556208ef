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

use super::{Unclassified, View, be16, field};
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
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
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
    kind: EtherType,
    control: u16,
}

impl VlanTag {
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
        self.kind.0 == EtherType::SERVICE_VLAN.0
    }
}

/// The tags of one frame, outermost first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct VlanTags {
    tags: [VlanTag; MAX_VLAN_TAGS],
    count: u8,
}

impl VlanTags {
    pub(super) const NONE: Self =
        Self { tags: [VlanTag { kind: EtherType(0), control: 0 }; MAX_VLAN_TAGS], count: 0 };

    pub(super) fn as_slice(&self) -> &[VlanTag] {
        self.tags.get(..usize::from(self.count)).unwrap_or_default()
    }

    /// The two places, for the flow key; one that is empty is `None`.
    pub(super) fn pair(self) -> [Option<VlanTag>; MAX_VLAN_TAGS] {
        let [outer, inner] = self.tags;
        [(self.count >= 1).then_some(outer), (self.count >= 2).then_some(inner)]
    }

    fn push(&mut self, tag: VlanTag) -> Result<(), Unclassified> {
        let place = self.tags.get_mut(usize::from(self.count)).ok_or(Unclassified::TooManyVlanTags)?;
        *place = tag;
        self.count = self.count.saturating_add(1);
        Ok(())
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

/// A frame's link layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) destination: Mac,
    pub(super) source: Mac,
    pub(super) tags: VlanTags,
    pub(super) framing: Framing,
    /// Under LLC the destination's and the source's service access point.
    pub(super) ether_type: EtherType,
    /// Where the packet begins.
    pub(super) network_offset: usize,
    /// Where the packet ends at the latest: an 802.3 length can end it before the frame does.
    pub(super) end: usize,
    pub(super) stopped: Option<Unclassified>,
}

/// The link layer of a frame; `None` if it is too short to have one.
#[inline]
pub(super) fn parse(view: View<'_>) -> Option<Link> {
    let header = view.at::<ETHERNET_SIZE>(0)?;
    let mut link = Link {
        destination: Mac(field::<0, 6, _>(header)),
        source: Mac(field::<6, 6, _>(header)),
        tags: VlanTags::NONE,
        framing: Framing::EthernetII,
        ether_type: EtherType(be16::<12, _>(header)),
        network_offset: ETHERNET_SIZE,
        end: view.end,
        stopped: None,
    };
    if link.ether_type.is_vlan() {
        link.stopped = look_behind_tags(view, &mut link).err();
    }
    if link.ether_type.0 < MIN_ETHER_TYPE {
        link.stopped = look_behind_llc(view, &mut link).err();
    }
    Some(link)
}

/// Steps over the tags, so that `link` tells of what they wrap.
fn look_behind_tags(view: View<'_>, link: &mut Link) -> Result<(), Unclassified> {
    while link.ether_type.is_vlan() {
        let [c0, c1, t0, t1] =
            *view.at::<TAG_SIZE>(link.network_offset).ok_or(Unclassified::TruncatedVlanTag)?;
        link.tags.push(VlanTag { kind: link.ether_type, control: u16::from_be_bytes([c0, c1]) })?;
        link.ether_type = EtherType(u16::from_be_bytes([t0, t1]));
        link.network_offset = link.network_offset.saturating_add(TAG_SIZE);
    }
    Ok(())
}

/// Steps over an LLC header and, where there is one, SNAP. Rare enough to be kept out of the way.
#[cold]
fn look_behind_llc(view: View<'_>, link: &mut Link) -> Result<(), Unclassified> {
    let length = link.ether_type.0;
    // Until more is known: no service access point, not a length that reads like a type.
    link.ether_type = EtherType(0);
    link.framing = Framing::Llc;
    if length > MAX_802_3_LENGTH {
        return Err(Unclassified::LengthField);
    }
    let end = link.network_offset.saturating_add(usize::from(length));
    let llc = view.until(end).ok_or(Unclassified::LengthField)?;
    link.end = end;
    let points = llc.at::<LLC_SIZE>(link.network_offset).ok_or(Unclassified::TruncatedLlc)?;
    let [destination, source, _control] = *points;
    link.ether_type = EtherType(u16::from_be_bytes([destination, source]));
    if *points != LLC_SNAP {
        return Ok(());
    }
    let [_, _, _, o0, o1, o2, t0, t1] =
        *llc.at::<SNAP_SIZE>(link.network_offset).ok_or(Unclassified::TruncatedLlc)?;
    let ether_type = EtherType(u16::from_be_bytes([t0, t1]));
    if ![SNAP_RFC1042, SNAP_802_1H].contains(&[o0, o1, o2]) || ether_type.0 < MIN_ETHER_TYPE {
        return Ok(());
    }
    if ether_type.is_vlan() {
        return Err(Unclassified::MisplacedVlanTag);
    }
    link.framing = Framing::Snap;
    link.ether_type = ether_type;
    link.network_offset = link.network_offset.saturating_add(SNAP_SIZE);
    Ok(())
}
