//! What a frame is: its headers, its size in every unit, and whether its offloads are what they claim.

use super::{
    batch::{Batch, FRAME_MAX},
    chain::Chain,
    label::Labelled,
    place::{ReceiveBuffer, TapFrame},
};
use crate::{
    label::FrameLabel,
    ledger::{DropReason, UNMONITORED, Volume},
    wire::{
        Headers,
        segment::Segment,
        vnet::{self, Checked, NegotiatedOffloads, OffloadFault, Size},
    },
};

/// Shortest frame: an Ethernet header (IEEE 802.3, without padding).
const ETHERNET_HEADER: usize = 14;

/// Which frames may be put together on their way to the tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coalesce {
    /// None.
    Nothing,
    /// TCP segments.
    Tcp,
    /// TCP segments and UDP datagrams: the kernel knows how to cut the latter (Linux 6.2 and later).
    TcpAndUdp,
}

impl Coalesce {
    /// What a frame of `len` bytes is as a part of a longer one; nothing if it goes alone.
    #[inline]
    fn segment(self, headers: &Headers, checked: &Checked, len: usize) -> Option<Segment> {
        match self {
            Self::Nothing => None,
            Self::Tcp if headers.udp().is_some() => None,
            Self::Tcp | Self::TcpAndUdp => Segment::of(headers, checked.header(), len),
        }
    }
}

/// What the port's two sides agreed on.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// The tap's MTU in bytes: the longest IP packet.
    pub mtu: u16,
    /// Offloads that the driver acknowledged.
    pub negotiated: NegotiatedOffloads,
    /// Length of the guest's virtio-net header in bytes: 12, or 10 for a legacy driver.
    pub header_len: usize,
    /// Which frames may be put together on their way to the tap.
    pub coalesce: Coalesce,
}

/// A frame that was looked at.
#[derive(Debug)]
#[must_use]
pub struct Inspected<F> {
    frame: F,
    label: FrameLabel,
    size: FrameSize,
    fault: Option<DropReason>,
}

/// A frame's size, in as few bytes as it needs: it is handed on from step to step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameSize {
    packets: u32,
    bytes: u32,
    wire_bytes: u32,
}

impl FrameSize {
    /// What is said of a chain of more than a mebibyte is that it is malformed.
    fn new(packets: u64, bytes: u64, wire_bytes: u64) -> Self {
        let short = |n| u32::try_from(n).unwrap_or(u32::MAX);
        Self { packets: short(packets), bytes: short(bytes), wire_bytes: short(wire_bytes) }
    }

    /// As it is counted.
    pub(super) fn volume(self) -> Volume {
        Volume::frame(self.packets.into(), self.bytes.into(), self.wire_bytes.into())
    }
}

impl<F> Inspected<F> {
    pub(super) const fn fault(&self) -> Option<DropReason> {
        self.fault
    }
    pub(super) fn into_parts(self) -> (F, FrameLabel, FrameSize) {
        (self.frame, self.label, self.size)
    }
}

/// Looks at a frame that the guest sends, and puts a rebuilt virtio-net header in front of it.
pub fn transmitted(labelled: Labelled<Chain>, batch: &mut Batch<'_, '_>, link: &Link) -> Inspected<Chain> {
    let len = batch.len();
    let findings = if UNMONITORED {
        Findings::plain(len, batch.fault().map(|_| DropReason::Malformed))
    } else if batch.fault().is_some() {
        Findings::malformed()
    } else if len < ETHERNET_HEADER {
        Findings::plain(len, Some(DropReason::Runt))
    } else {
        let headers = Headers::parse(batch.prefix(), len);
        let checked = vnet::check_transmit(batch.header(), &headers, len, link.negotiated);
        if let Ok(checked) = &checked {
            batch.set_header(checked.header(), link.coalesce.segment(&headers, checked, len));
        }
        Findings::of(checked, &headers, len, link)
    };
    findings.into_inspected(labelled)
}

/// Looks at a frame that the tap gave us for the guest.
pub fn received(
    labelled: Labelled<TapFrame>,
    buffer: &mut ReceiveBuffer,
    link: &Link,
) -> Inspected<TapFrame> {
    let len = buffer.len();
    let findings = if UNMONITORED && buffer.is_readable() {
        Findings::plain(len, None)
    } else if !buffer.is_readable() {
        Findings::plain(0, Some(DropReason::TapRefused))
    } else if len < ETHERNET_HEADER {
        Findings::plain(len, Some(DropReason::Runt))
    } else {
        let headers = Headers::parse(buffer.prefix(), len);
        let checked = vnet::check_receive(buffer.header(), &headers, len, link.negotiated);
        if let Ok(checked) = &checked {
            buffer.set_header(checked.header());
        }
        Findings::of(checked, &headers, len, link)
    };
    findings.into_inspected(labelled)
}

struct Findings {
    size: FrameSize,
    fault: Option<DropReason>,
}

impl Findings {
    /// A malformed chain counts as one packet of no bytes.
    const fn malformed() -> Self {
        let size = FrameSize { packets: 1, bytes: 0, wire_bytes: 0 };
        Self { size, fault: Some(DropReason::Malformed) }
    }

    fn plain(len: usize, fault: Option<DropReason>) -> Self {
        Self { size: FrameSize::new(1, len as u64, len as u64), fault }
    }

    fn of(checked: Result<Checked, OffloadFault>, headers: &Headers, len: usize, link: &Link) -> Self {
        match checked {
            Ok(checked) => {
                let Size { packets, bytes, wire_bytes } = checked.size();
                let fits = checked.fits_mtu(headers, len, link.mtu) && len <= FRAME_MAX;
                let fault = (!fits).then_some(DropReason::Oversize);
                Self { size: FrameSize::new(packets, bytes, wire_bytes), fault }
            }
            Err(OffloadFault::NotNegotiated) => Self::plain(len, Some(DropReason::NotNegotiated)),
            Err(OffloadFault::BadOffload(_)) => Self::plain(len, Some(DropReason::BadOffload)),
        }
    }

    fn into_inspected<F>(self, labelled: Labelled<F>) -> Inspected<F> {
        let (frame, label) = labelled.into_parts();
        Inspected { frame, label, size: self.size, fault: self.fault }
    }
}
