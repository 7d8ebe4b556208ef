//! The texts that a configuration is made of, and reading them: files as TOML, arguments as `key=value,...`,
//! requests as JSON.

use std::{
    collections::HashSet,
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;
use toml::{
    Spanned,
    de::{DeTable, DeValue, Deserializer},
};

use super::{
    error::{ConfigError, Fault, Place, on_one_line},
    loose::{List, LooseId, LoosePeer, LoosePort, LooseVm, LooseVms},
};

/// Most wrong keys and types that are reported for one file: after so many, the rest is noise.
const MOST_FAULTS_PER_FILE: usize = 100;

/// A text that something was written in.
pub(super) enum Source {
    File {
        path: PathBuf,
        text: String,
    },
    /// The n-th argument of this kind that describes a VM.
    Vm {
        kind: &'static str,
        nth: usize,
        text: String,
    },
    /// A request, as TOML.
    Request {
        text: String,
    },
    /// Something that was judged before.
    Known(Place),
    Argument(&'static str),
    Default(&'static str),
}

/// A byte of a source; in the order in which faults are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Spot {
    pub(super) source: usize,
    pub(super) offset: usize,
}

impl Spot {
    /// The beginning of a value.
    pub(super) fn of<T>(source: usize, value: &Spanned<T>) -> Self {
        Self { source, offset: value.span().start }
    }
}

/// All sources, and what was found wrong in them.
#[derive(Default)]
pub(super) struct Sources {
    texts: Vec<Source>,
    /// Sources of which a part could not be understood.
    garbled: HashSet<usize>,
    /// Files of VMs that were added while running.
    added: HashSet<PathBuf>,
    faults: Vec<(Spot, Fault)>,
}

impl Sources {
    /// Takes a source in; returns its number.
    pub(super) fn add(&mut self, source: Source) -> usize {
        self.texts.push(source);
        self.texts.len() - 1
    }

    /// The beginning of a source that is one value as a whole.
    pub(super) fn whole(&mut self, source: Source) -> Spot {
        Spot { source: self.add(source), offset: 0 }
    }

    /// True for what came by `--vm`.
    pub(super) fn is_vm_argument(&self, spot: Spot) -> bool {
        matches!(self.texts.get(spot.source), Some(Source::Vm { .. }))
    }

    /// The place for people.
    pub(super) fn place(&self, spot: Spot) -> Place {
        match self.texts.get(spot.source) {
            Some(Source::File { path, text }) => {
                let (line, column) = line_and_column(text, spot.offset);
                Place::File { path: path.clone(), line, column }
            }
            Some(Source::Vm { kind, nth, text }) => {
                Place::VmArgument { kind, nth: *nth, column: line_and_column(text, spot.offset).1 }
            }
            Some(Source::Request { text }) => Place::Request { port: port_at(text, spot.offset) },
            Some(Source::Known(place)) => place.clone(),
            Some(Source::Argument(name)) => Place::Argument(name),
            Some(Source::Default(key)) => Place::Default(key),
            None => Place::Default("nothing"),
        }
    }

    /// Notes that a file holds a VM that was added while running.
    pub(super) fn expect_added(&mut self, file: &Path) {
        self.added.insert(file.to_owned());
    }

    /// True for what was added while running.
    pub(super) fn is_added(&self, spot: Spot) -> bool {
        matches!(self.place_of_vm(spot), Place::Added(_))
    }

    /// Where a VM comes from, for people.
    pub(super) fn place_of_vm(&self, spot: Spot) -> Place {
        match self.place(spot) {
            Place::File { path, .. } if self.added.contains(&path) => Place::Added(path),
            place => place,
        }
    }

    /// Notes what is wrong at a spot.
    pub(super) fn fault(&mut self, spot: Spot, error: ConfigError) {
        let place = self.place(spot);
        self.faults.push((spot, Fault { place, error }));
    }

    /// True if a part of the source could not be understood: what seems to be missing may be there, misspelt.
    pub(super) fn is_garbled(&self, source: usize) -> bool {
        self.garbled.contains(&source)
    }

    /// Notes that something at a spot cannot be understood.
    fn garbled(&mut self, spot: Spot, error: ConfigError) {
        self.garbled.insert(spot.source);
        self.fault(spot, error);
    }

    /// True if nothing was found wrong yet.
    pub(super) fn is_flawless(&self) -> bool {
        self.faults.is_empty()
    }

    /// Everything that was found wrong, in the order of the places.
    pub(super) fn into_faults(mut self) -> Vec<Fault> {
        self.faults.sort_by_key(|(spot, _)| *spot);
        self.faults.into_iter().map(|(_, fault)| fault).collect()
    }

    /// Reads a file of TOML. A file with faults comes out as far as it could be understood, so that the
    /// others are still compared with it; a file that is no TOML does not come out at all.
    pub(super) fn read_toml<T: DeserializeOwned>(&mut self, path: &Path) -> Option<(usize, T)> {
        let (number, text) = self.read_text(path)?;
        Some((number, self.parse_toml(number, &text)?))
    }

    /// Reads a request: one VM, as JSON.
    pub(super) fn read_request(&mut self, json: &[u8]) -> Option<(usize, LooseVms)> {
        match toml_of_json(json) {
            Ok(text) => {
                let number = self.add(Source::Request { text: text.clone() });
                Some((number, self.parse_toml(number, &text)?))
            }
            Err(why) => {
                let spot = self.whole(Source::Request { text: String::new() });
                self.fault(spot, ConfigError::NotAnObject(on_one_line(&why)));
                None
            }
        }
    }

    fn parse_toml<T: DeserializeOwned>(&mut self, number: usize, text: &str) -> Option<T> {
        let (mut table, syntax) = DeTable::parse_recoverable(text);
        // What follows the first error of syntax is often its echo.
        if let Some(error) = syntax.into_iter().min_by_key(|error| error.span().map(|span| span.start)) {
            let offset = error.span().map_or(0, |span| span.start);
            let message = on_one_line(&error.message().replace('`', "\""));
            self.fault(Spot { source: number, offset }, ConfigError::Syntax(message));
            return None;
        }
        // serde stops at the first fault: note it, take its key out, and read on.
        for _ in 0..MOST_FAULTS_PER_FILE {
            let error = match T::deserialize(Deserializer::from(table.clone())) {
                Ok(value) => return Some(value),
                Err(error) => error,
            };
            let span = error.span().unwrap_or_default();
            self.garbled(Spot { source: number, offset: span.start }, explain(error.message()));
            if !take_out(table.get_mut(), &span) {
                return None;
            }
        }
        None
    }

    fn read_text(&mut self, path: &Path) -> Option<(usize, String)> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) => {
                self.unreadable(path, &error);
                return None;
            }
        };
        match String::from_utf8(bytes) {
            Ok(text) => {
                let source = Source::File { path: path.to_owned(), text: text.clone() };
                Some((self.add(source), text))
            }
            Err(error) => {
                let offset = error.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
                let source = self.add(Source::File { path: path.to_owned(), text });
                self.fault(Spot { source, offset }, ConfigError::NotText);
                None
            }
        }
    }

    /// Notes that a file or directory cannot be read.
    pub(super) fn unreadable(&mut self, path: &Path, error: &io::Error) {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "write it, or name another file with --config",
            io::ErrorKind::PermissionDenied => "run as a user who may read it",
            io::ErrorKind::IsADirectory => "put a file in its place",
            _ => "look after the file, or name another with --config",
        };
        let spot = self.whole(Source::File { path: path.to_owned(), text: String::new() });
        let error = ConfigError::Unreadable { what: error.to_string(), advice };
        self.faults.push((spot, Fault { place: Place::WholeFile(path.to_owned()), error }));
    }

    /// Reads the n-th argument of this kind: one VM with one port.
    pub(super) fn read_argument(
        &mut self,
        kind: &'static str,
        nth: usize,
        text: &str,
    ) -> (usize, Spanned<LooseVm>) {
        let number = self.add(Source::Vm { kind, nth, text: text.to_owned() });
        let mut vm = LooseVm::default();
        let mut port = LoosePort::default();
        let mut seen: Vec<&str> = Vec::new();
        let mut offset = 0;
        for pair in text.split(',') {
            let spot = Spot { source: number, offset };
            match pair.split_once('=') {
                Some((key, _)) if seen.contains(&key) => {
                    self.garbled(spot, ConfigError::Twice(key.to_owned()));
                }
                Some((key, value)) => {
                    seen.push(key);
                    let start = offset + key.len() + 1;
                    let written = Spanned::new(start..start + value.len(), value.to_owned());
                    if let Err((at, error)) = assign(&mut vm, &mut port, key, written) {
                        let offset = if at == Side::Key { offset } else { start };
                        self.garbled(Spot { source: number, offset }, error);
                    }
                }
                None => self.garbled(spot, ConfigError::NotAPair(pair.to_owned())),
            }
            offset += pair.len() + 1;
        }
        vm.port = List(vec![Spanned::new(0..text.len(), port)]);
        (number, Spanned::new(0..text.len(), vm))
    }
}

/// Which side of a `key=value` is wrong.
#[derive(PartialEq)]
enum Side {
    Key,
    Value,
}

/// The keys of `--vm`.
const ARGUMENT_KEYS: [&str; 13] = [
    "name",
    "socket",
    "tap",
    "label",
    "uuid",
    "mac",
    "mtu",
    "mode",
    "netns",
    "peer",
    "queue_pairs",
    "coalesce",
    "poll_us",
];

fn assign(
    vm: &mut LooseVm,
    port: &mut LoosePort,
    key: &str,
    written: Spanned<String>,
) -> Result<(), (Side, ConfigError)> {
    match key {
        "name" => vm.name = Some(written),
        "uuid" => vm.uuid = Some(written),
        "label" => vm.label = Some(number("label", &written)?),
        "socket" => port.socket = Some(written),
        "tap" => port.tap = Some(written),
        "mac" => port.mac = Some(written),
        "mtu" => port.mtu = Some(number("mtu", &written)?),
        "queue_pairs" => port.queue_pairs = Some(number("queue_pairs", &written)?),
        "poll_us" => port.poll_us = Some(number("poll_us", &written)?),
        "coalesce" => port.coalesce = Some(switch("coalesce", &written)?),
        "mode" => port.mode = Some(written),
        "netns" => port.netns = Some(written),
        "peer" => {
            let span = written.span();
            let uid = Spanned::new(span.clone(), LooseId::Name(written.into_inner()));
            port.peer = Some(Spanned::new(span, LoosePeer { uid: Some(uid) }));
        }
        _ => return Err((Side::Key, unknown_key(key, &ARGUMENT_KEYS))),
    }
    Ok(())
}

fn number(what: &'static str, written: &Spanned<String>) -> Result<Spanned<i64>, (Side, ConfigError)> {
    let text = written.get_ref();
    let parsed = text.parse().map(|number| Spanned::new(written.span(), number));
    let why = "is not a number: write decimal digits";
    parsed.map_err(|_| (Side::Value, ConfigError::BadValue { what, value: text.clone(), why }))
}

fn switch(what: &'static str, written: &Spanned<String>) -> Result<bool, (Side, ConfigError)> {
    let text = written.get_ref();
    let why = "is neither: write true or false";
    text.parse().map_err(|_| (Side::Value, ConfigError::BadValue { what, value: text.clone(), why }))
}

/// Takes the key out of the table, or of a table in it, whose own place or whose value's place is this one.
fn take_out(table: &mut DeTable<'_>, span: &Range<usize>) -> bool {
    let found = table.iter().find(|(key, value)| key.span() == *span || is_at(value, span));
    if let Some(key) = found.map(|(key, _)| key.clone()) {
        return table.remove(&key).is_some();
    }
    table.iter_mut().any(|(_, value)| match value.get_mut() {
        DeValue::Table(inner) => take_out(inner, span),
        DeValue::Array(elements) => elements.iter_mut().any(|element| match element.get_mut() {
            DeValue::Table(inner) => take_out(inner, span),
            _ => false,
        }),
        _ => false,
    })
}

/// True if the value, or an element of a list, stands here.
fn is_at(value: &Spanned<DeValue<'_>>, span: &Range<usize>) -> bool {
    value.span() == *span
        || matches!(value.get_ref(), DeValue::Array(elements)
            if elements.iter().any(|element| element.span() == *span))
}

/// Turns serde's words into ours. Its form is "unknown field `a`, expected one of `b`, `c`".
fn explain(message: &str) -> ConfigError {
    match message.strip_prefix("unknown field `").and_then(|rest| rest.split_once("`, expected ")) {
        Some((key, expected)) => {
            let keys: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
            unknown_key(key, &keys)
        }
        None => ConfigError::WrongType(in_toml_words(message)),
    }
}

/// serde names the types of its own model: those who write TOML know others.
fn in_toml_words(message: &str) -> String {
    let words =
        [("`", ""), ("type: map", "type: table"), (" as i128", ", which is too large"), ("i64", "a number")];
    let said = words.iter().fold(message.to_owned(), |said, (from, to)| said.replace(from, to));
    on_one_line(&said)
}

fn unknown_key(key: &str, keys: &[&str]) -> ConfigError {
    let hint = match super::spelling::nearest(key, keys) {
        Some(near) => format!("did you mean {near:?}?"),
        None => format!("known here: {}", keys.join(", ")),
    };
    ConfigError::UnknownKey { key: key.to_owned(), hint }
}

/// One VM in JSON as a file of `vms.d` has it; a key without a value is a key that is not there. What is
/// wrong, if it is no object.
fn toml_of_json(json: &[u8]) -> Result<String, String> {
    let mut vm: serde_json::Value = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if !vm.is_object() {
        return Err("it has no braces around it".to_owned());
    }
    remove_nulls(&mut vm);
    toml::to_string(&serde_json::json!({ "vm": [vm] })).map_err(|error| error.to_string())
}

fn remove_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(keys) => {
            keys.retain(|_, value| !value.is_null());
            keys.values_mut().for_each(remove_nulls);
        }
        serde_json::Value::Array(elements) => elements.iter_mut().for_each(remove_nulls),
        _ => {}
    }
}

/// Which port of a request's VM a byte belongs to.
fn port_at(text: &str, offset: usize) -> Option<usize> {
    let rest_of_line = text.get(offset..).and_then(|rest| rest.find('\n')).unwrap_or_default();
    let before = text.get(..offset + rest_of_line).unwrap_or(text);
    let mut tables = before.lines().filter(|line| line.starts_with('['));
    let ports = tables.clone().filter(|line| *line == "[[vm.port]]").count();
    let last = tables.next_back().unwrap_or_default();
    last.trim_start_matches('[').starts_with("vm.port").then_some(ports).filter(|port| *port > 0)
}

/// Line and column of a byte, both from 1; the column in characters.
fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |part| part.chars().count()) + 1;
    (line, column)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_counts_lines_and_characters_from_one() {
        let text = "a\nbäc\n";
        let at = |offset| line_and_column(text, offset);
        assert_eq!((at(0), at(1), at(2)), ((1, 1), (1, 2), (2, 1)));
        assert_eq!((at(5), at(6), at(7), at(99)), ((2, 3), (2, 4), (3, 1), (3, 1)));
    }

    #[test]
    fn an_argument_is_a_vm_with_one_port() {
        let mut sources = Sources::default();
        let (_, vm) = sources.read_argument("--vm", 1, "name=a,socket=/s=1,mtu=1500,peer=64055");
        assert!(sources.into_faults().is_empty());
        let vm = vm.into_inner();
        assert_eq!(vm.name.unwrap().into_inner(), "a");
        let port = vm.port.0.into_iter().next().unwrap().into_inner();
        assert_eq!(port.socket.unwrap().span(), 14..18);
        assert_eq!(port.mtu.unwrap().into_inner(), 1500);
    }

    #[test]
    fn every_fault_of_an_argument_is_told_with_its_column() {
        let mut sources = Sources::default();
        sources.read_argument("--vm", 2, "name=a,sokcet=/s,tap,mtu=big,name=b");
        let lines: Vec<String> = sources.into_faults().iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "--vm number 2, column 8: unknown key \"sokcet\": did you mean \"socket\"?",
                "--vm number 2, column 18: \"tap\" is not key=value: write name=NAME,socket=PATH,tap=IFNAME",
                "--vm number 2, column 26: mtu \"big\" is not a number: write decimal digits",
                "--vm number 2, column 30: \"name\" is given twice: leave one of them out",
            ]
        );
    }
}
