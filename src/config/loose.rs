//! What was written, as it was written: every key optional, every value with its place in the text.
//!
//! Nothing here is judged; `strict` turns it into what is meant. Keys that no table has are found here.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};
use toml::Spanned;

/// A value and where it stands in its text.
type Written<T> = Option<Spanned<T>>;

/// `vmflow.toml`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LooseMain {
    pub(super) daemon: LooseDaemon,
    pub(super) suspect: LooseSuspect,
    pub(super) rules: LooseRules,
    pub(super) vm: List<Spanned<LooseVm>>,
}

/// A file in `vms.d`: VMs and nothing else.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LooseVms {
    pub(super) vm: List<Spanned<LooseVm>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, as [daemon]")]
pub(super) struct LooseDaemon {
    pub(super) control: Written<String>,
    pub(super) stats: Written<String>,
    pub(super) stats_group: Written<LooseId>,
    pub(super) state: Written<String>,
    pub(super) labels: Written<String>,
    pub(super) node: Written<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, as { action = \"count\" }")]
pub(super) struct LooseSuspect {
    pub(super) action: Written<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, as [rules]")]
pub(super) struct LooseRules {
    pub(super) files: List<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, as [[vm]]")]
pub(super) struct LooseVm {
    pub(super) name: Written<String>,
    pub(super) uuid: Written<String>,
    pub(super) label: Written<i64>,
    pub(super) suspect: LooseSuspect,
    pub(super) port: List<Spanned<LoosePort>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, as [[vm.port]]")]
pub(super) struct LoosePort {
    pub(super) socket: Written<String>,
    pub(super) mode: Written<String>,
    pub(super) peer: Written<LoosePeer>,
    pub(super) owner: Written<LooseId>,
    pub(super) group: Written<LooseId>,
    pub(super) socket_mode: Written<String>,
    pub(super) tap: Written<String>,
    pub(super) netns: Written<String>,
    pub(super) bridge: Written<String>,
    pub(super) queue_pairs: Written<i64>,
    pub(super) mac: Written<String>,
    pub(super) mtu: Written<i64>,
    pub(super) control_queue: Option<bool>,
    pub(super) coalesce: Option<bool>,
    pub(super) poll_us: Written<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, as { uid = \"libvirt-qemu\" }")]
pub(super) struct LoosePeer {
    pub(super) uid: Written<LooseId>,
}

/// A user or group: a number, or a name (or a number in quotes).
#[derive(Debug)]
pub(super) enum LooseId {
    Number(i64),
    Name(String),
}

impl<'de> Deserialize<'de> for LooseId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrName;
        impl Visitor<'_> for NumberOrName {
            type Value = LooseId;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or a name in quotes")
            }
            fn visit_i64<E: Error>(self, number: i64) -> Result<LooseId, E> {
                Ok(LooseId::Number(number))
            }
            fn visit_str<E: Error>(self, name: &str) -> Result<LooseId, E> {
                Ok(LooseId::Name(name.to_owned()))
            }
        }
        deserializer.deserialize_any(NumberOrName)
    }
}

/// A `Vec` that explains itself to whoever writes `[vm]` instead of `[[vm]]`.
#[derive(Debug)]
pub(super) struct List<T>(pub(super) Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Elements<T> {
            type Value = List<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list: tables of a list have two brackets, as [[vm]]")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<List<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(element) = elements.next_element()? {
                    list.push(element);
                }
                Ok(List(list))
            }
        }
        deserializer.deserialize_seq(Elements(PhantomData))
    }
}
