//! What the API says about the VMs: the documents of `GET /v1/stats` and `GET /v1/vms`.
//!
//! The order of the fields is the order of the keys. Counters only grow; `in_flight` is the one gauge.
//! Directions are the guest's: *transmit* is what the guest sends.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, Visitor},
};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, schema::AdditionalProperties},
};
use uuid::Uuid;

pub use super::time::{rfc3339, rfc3339_seconds};
use crate::{
    label::Label,
    ledger::{DropReason, Totals, Volume},
    monitor::checkpoint::{self, GapReason},
};

/// The version of both documents: it changes when a key goes or changes its meaning, not when one is added.
pub const VERSION: u32 = 1;

/// `GET /v1/stats`: what every VM sent and received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stats {
    /// The version of this document: 1.
    pub version: u32,
    /// The host's name.
    pub node: String,
    /// Each VM.
    pub vms: Vec<VmStats>,
    /// When numbers were lost, oldest first: the newest 100.
    #[serde(default)]
    pub gaps: Vec<Gap>,
}

/// A time of which it is not known what was counted in it: the totals that were kept last were written at its
/// beginning, and the next vmflow went on from them at its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Gap {
    /// When the totals were written last: RFC 3339, UTC. They are written when they change: once a second at most.
    pub from: String,
    /// When the next vmflow went on from them: RFC 3339, UTC.
    pub to: String,
    /// Why.
    pub reason: GapReason,
}

/// One VM's part of [`Stats`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmStats {
    /// The VM's name.
    pub name: String,
    /// The VM's UUID, if it has one.
    pub uuid: Option<Uuid>,
    /// The label of its normal frames.
    pub label: u32,
    /// The label of its suspect frames.
    pub suspect_label: u32,
    /// True while an operator's tag puts every frame under the suspect label.
    pub suspect: bool,
    /// That tag; the key is there only while the tag is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<Tag>,
    /// Its ports.
    pub ports: Vec<PortStats>,
}

/// An operator's tag on a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tag {
    /// Why, in the operator's words.
    pub reason: String,
    /// Who: user and process at the control socket.
    pub by: String,
    /// When: RFC 3339, UTC.
    pub since: String,
}

/// Which side makes the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// vmflow listens.
    Server,
    /// vmflow connects.
    Client,
}

/// One port's part of [`VmStats`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortStats {
    /// Path of the vhost-user socket.
    pub socket: String,
    /// Which side makes the connection.
    pub mode: Mode,
    /// Name of the tap.
    pub tap: String,
    /// Network namespace of the tap, if it is not the host's.
    pub netns: Option<String>,
    /// True while a front end is connected.
    pub connected: bool,
    /// Number of queue pairs; all that is counted is counted over all of them.
    pub queue_pairs: u16,
    /// Workers that died. Another one took over, and the front end noticed nothing; or it was connected anew.
    pub worker_restarts: u64,
    /// Frames of the tap writes and reads whose end is unknown, because a worker died in them.
    pub uncertain: u64,
    /// Queues that stopped because the guest broke them.
    pub queue_faults: u64,
    /// Connections refused: a wrong peer, or a second front end.
    pub refused_connections: u64,
    /// Connections accepted.
    pub connections: u64,
    /// Connections closed by us because one worker after the other died: a guest or front end that breaks each.
    #[serde(default)]
    pub connections_given_up: u64,
    /// What the guest sent.
    pub transmit: Transmit,
    /// What came for the guest.
    pub receive: Receive,
}

/// How much traffic: four units of the same frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counts {
    /// Frames: descriptor chains (transmit) or tap reads (receive).
    pub frames: u64,
    /// Packets on the wire: a GSO frame counts its segments.
    pub packets: u64,
    /// Bytes of the frames, without the virtio-net header.
    pub bytes: u64,
    /// Bytes on the wire: each further segment of a GSO frame repeats the headers.
    pub wire_bytes: u64,
}

/// What the guest sent: `chains = in_flight + forwarded + diverted + sum(dropped)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Transmit {
    /// Descriptor chains taken from the ring.
    pub chains: u64,
    /// Taken and not yet at an end.
    pub in_flight: u64,
    /// Forwarded to the tap.
    pub forwarded: Counts,
    /// Sent elsewhere by policy.
    pub diverted: Counts,
    /// Carried the normal label, whatever became of them.
    pub normal: Counts,
    /// Carried the suspect label, whatever became of them.
    pub suspect: Counts,
    /// Frames dropped, by reason.
    pub dropped: Dropped,
    /// Packets in dropped frames.
    pub dropped_packets: u64,
    /// Bytes in dropped frames.
    pub dropped_bytes: u64,
    /// What went to the tap.
    pub tap: TapWrites,
}

/// What came for the guest: `reads = in_flight + delivered + diverted + sum(dropped)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Receive {
    /// Frames read from the tap.
    pub reads: u64,
    /// Read and not yet at an end.
    pub in_flight: u64,
    /// Delivered to the guest.
    pub delivered: Counts,
    /// Sent elsewhere by policy.
    pub diverted: Counts,
    /// Carried the normal label, whatever became of them.
    pub normal: Counts,
    /// Carried the suspect label, whatever became of them.
    pub suspect: Counts,
    /// Frames dropped, by reason.
    pub dropped: Dropped,
    /// Packets in dropped frames.
    pub dropped_packets: u64,
    /// Bytes in dropped frames.
    pub dropped_bytes: u64,
    /// What came from the tap.
    pub tap: TapReads,
}

/// Writes to the tap: one may carry several frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TapWrites {
    /// Writes.
    pub writes: u64,
    /// Their bytes, without the virtio-net header.
    pub write_bytes: u64,
}

/// Reads from the tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TapReads {
    /// Reads.
    pub reads: u64,
    /// Their bytes, without the virtio-net header.
    pub read_bytes: u64,
}

/// Dropped frames by reason: a map from [`DropReason::name`], each reason present, in the order of the ledger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped(pub [u64; DropReason::COUNT]);

/// `GET /v1/vms`: which VMs there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vms {
    /// The version of this document: 1.
    pub version: u32,
    /// The host's name.
    pub node: String,
    /// Each VM.
    pub vms: Vec<VmDocument>,
}

/// One VM's part of [`Vms`], and the answer to a change of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDocument {
    /// The VM's name.
    pub name: String,
    /// The VM's UUID, if it has one.
    pub uuid: Option<Uuid>,
    /// The label of its normal frames.
    pub label: u32,
    /// The label of its suspect frames.
    pub suspect_label: u32,
    /// True while an operator's tag puts every frame under the suspect label.
    pub suspect: bool,
    /// That tag.
    pub tag: Option<Tag>,
    /// What becomes of frames under the suspect label, by its name in the configuration.
    pub suspect_action: String,
    /// Its ports.
    pub ports: Vec<PortDocument>,
}

/// One port's part of [`VmDocument`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortDocument {
    /// Path of the vhost-user socket.
    pub socket: String,
    /// Which side makes the connection.
    pub mode: Mode,
    /// Name of the tap.
    pub tap: String,
    /// Network namespace of the tap, if it is not the host's.
    pub netns: Option<String>,
    /// True while a front end is connected.
    pub connected: bool,
    /// The MAC address that the guest is told, if one is configured.
    pub mac: Option<String>,
    /// The MTU that the guest is told, in bytes, once it is known.
    pub mtu: Option<u16>,
}

/// The answer to `POST /v1/reload`: the names of the VMs that a change of the configuration concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Changes {
    /// The version of this document: 1.
    pub version: u32,
    /// VMs that were not there before.
    pub added: Vec<String>,
    /// VMs that are not there any more.
    pub removed: Vec<String>,
    /// VMs that have other settings than before.
    pub changed: Vec<String>,
}

impl Changes {
    /// The document of a change.
    #[must_use]
    pub const fn new(added: Vec<String>, removed: Vec<String>, changed: Vec<String>) -> Self {
        Self { version: VERSION, added, removed, changed }
    }
}

impl Stats {
    /// The document of this host.
    #[must_use]
    pub const fn new(node: String, vms: Vec<VmStats>) -> Self {
        Self { version: VERSION, node, vms, gaps: Vec::new() }
    }
}

impl Vms {
    /// The document of this host.
    #[must_use]
    pub const fn new(node: String, vms: Vec<VmDocument>) -> Self {
        Self { version: VERSION, node, vms }
    }
}

impl VmStats {
    /// A VM without ports; `suspect` follows the tag.
    #[must_use]
    pub const fn new(name: String, uuid: Option<Uuid>, label: Label, tag: Option<Tag>) -> Self {
        let (suspect_label, suspect) = (label.suspect(), tag.is_some());
        Self { name, uuid, label: label.get(), suspect_label, suspect, tag, ports: Vec::new() }
    }
}

impl VmDocument {
    /// A VM without ports; `suspect` follows the tag.
    #[must_use]
    pub const fn new(
        name: String,
        uuid: Option<Uuid>,
        label: Label,
        tag: Option<Tag>,
        suspect_action: String,
    ) -> Self {
        let (suspect_label, suspect) = (label.suspect(), tag.is_some());
        let ports = Vec::new();
        Self { name, uuid, label: label.get(), suspect_label, suspect, tag, suspect_action, ports }
    }
}

impl From<&checkpoint::Gap> for Gap {
    fn from(gap: &checkpoint::Gap) -> Self {
        Self { from: rfc3339_seconds(gap.from), to: rfc3339_seconds(gap.to), reason: gap.reason }
    }
}

impl From<Volume> for Counts {
    fn from(Volume { frames, packets, bytes, wire_bytes }: Volume) -> Self {
        Self { frames, packets, bytes, wire_bytes }
    }
}

impl From<Counts> for Volume {
    fn from(Counts { frames, packets, bytes, wire_bytes }: Counts) -> Self {
        Self { frames, packets, bytes, wire_bytes }
    }
}

impl From<&Totals> for Transmit {
    fn from(totals: &Totals) -> Self {
        Self {
            chains: totals.chains,
            in_flight: totals.in_flight,
            forwarded: totals.passed.into(),
            diverted: totals.diverted.into(),
            normal: totals.normal.into(),
            suspect: totals.suspect.into(),
            dropped: Dropped(totals.dropped),
            dropped_packets: totals.dropped_packets,
            dropped_bytes: totals.dropped_bytes,
            tap: TapWrites { writes: totals.tap_operations, write_bytes: totals.tap_bytes },
        }
    }
}

impl From<&Totals> for Receive {
    fn from(totals: &Totals) -> Self {
        Self {
            reads: totals.chains,
            in_flight: totals.in_flight,
            delivered: totals.passed.into(),
            diverted: totals.diverted.into(),
            normal: totals.normal.into(),
            suspect: totals.suspect.into(),
            dropped: Dropped(totals.dropped),
            dropped_packets: totals.dropped_packets,
            dropped_bytes: totals.dropped_bytes,
            tap: TapReads { reads: totals.tap_operations, read_bytes: totals.tap_bytes },
        }
    }
}

impl From<&Transmit> for Totals {
    fn from(document: &Transmit) -> Self {
        Self {
            chains: document.chains,
            in_flight: document.in_flight,
            passed: document.forwarded.into(),
            diverted: document.diverted.into(),
            normal: document.normal.into(),
            suspect: document.suspect.into(),
            dropped: document.dropped.0,
            dropped_packets: document.dropped_packets,
            dropped_bytes: document.dropped_bytes,
            tap_operations: document.tap.writes,
            tap_bytes: document.tap.write_bytes,
        }
    }
}

impl From<&Receive> for Totals {
    fn from(document: &Receive) -> Self {
        Self {
            chains: document.reads,
            in_flight: document.in_flight,
            passed: document.delivered.into(),
            diverted: document.diverted.into(),
            normal: document.normal.into(),
            suspect: document.suspect.into(),
            dropped: document.dropped.0,
            dropped_packets: document.dropped_packets,
            dropped_bytes: document.dropped_bytes,
            tap_operations: document.tap.reads,
            tap_bytes: document.tap.read_bytes,
        }
    }
}

impl Serialize for Dropped {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(DropReason::ALL.iter().map(|reason| reason.name()).zip(self.0))
    }
}

impl PartialSchema for Dropped {
    fn schema() -> RefOr<Schema> {
        let object = ObjectBuilder::new().description(Some("Dropped frames by reason; each is present."));
        let object = DropReason::ALL.iter().fold(object, |object, reason| {
            let frames = ObjectBuilder::new()
                .schema_type(utoipa::openapi::schema::Type::Integer)
                .minimum(Some(0))
                .description(Some(reason.meaning()));
            object.property(reason.name(), frames).required(reason.name())
        });
        object.additional_properties(Some(AdditionalProperties::FreeForm(false))).into()
    }
}

impl ToSchema for Dropped {}

impl<'de> Deserialize<'de> for Dropped {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(DroppedVisitor)
    }
}

/// Reads [`Dropped`]. A reason that is missing counts 0: an older daemon has fewer. One that is unknown is an
/// error: left out, it would look as if the ledger did not balance.
struct DroppedVisitor;

impl<'de> Visitor<'de> for DroppedVisitor {
    type Value = Dropped;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from drop reasons to frames")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Dropped, M::Error> {
        let mut dropped = Dropped::default();
        while let Some((name, frames)) = map.next_entry::<String, u64>()? {
            let place = DropReason::ALL.iter().zip(&mut dropped.0).find(|(r, _)| r.name() == name);
            let Some((_, place)) = place else {
                return Err(de::Error::custom(format!("`{name}` is a drop reason of a newer vmflow")));
            };
            *place = frames;
        }
        Ok(dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counters that all differ, so that no two can be mixed up unseen.
    fn distinct() -> Totals {
        let mut words = [0; Totals::WORDS];
        for (word, n) in words.iter_mut().zip(1000..) {
            *word = n;
        }
        Totals::from_words(&words)
    }

    #[test]
    fn every_counter_of_the_ledger_survives_the_way_through_the_document() {
        let totals = distinct();
        let text = serde_json::to_string(&Transmit::from(&totals)).unwrap();
        assert_eq!(Totals::from(&serde_json::from_str::<Transmit>(&text).unwrap()), totals);
        let text = serde_json::to_string(&Receive::from(&totals)).unwrap();
        assert_eq!(Totals::from(&serde_json::from_str::<Receive>(&text).unwrap()), totals);
    }

    #[test]
    fn a_missing_reason_is_zero_and_an_unknown_one_is_an_error() {
        let dropped: Dropped = serde_json::from_str(r#"{"runt": 7}"#).unwrap();
        assert_eq!(dropped.0.iter().sum::<u64>(), 7);
        assert_eq!(dropped.0[DropReason::Runt.index()], 7);
        let error = serde_json::from_str::<Dropped>(r#"{"boredom": 7}"#).unwrap_err();
        assert!(error.to_string().starts_with("`boredom` is a drop reason of a newer vmflow"), "{error}");
    }

    #[test]
    fn a_tag_is_a_key_of_the_statistics_only_while_it_is_there() {
        let label = Label::new(7).unwrap();
        let vm = VmStats::new("web1".into(), None, label, None);
        assert!(!serde_json::to_string(&vm).unwrap().contains("tag"));
        let tag = Tag { reason: "scan".into(), by: "root".into(), since: rfc3339_seconds(0) };
        let vm = VmStats::new("web1".into(), None, label, Some(tag));
        let json = serde_json::to_value(&vm).unwrap();
        assert_eq!(json["suspect"], true);
        assert_eq!(json["tag"]["since"], "1970-01-01T00:00:00Z");
    }
}
