//! Stories of VMs that come and go, and a comparison with a simple model.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use tempfile::TempDir;
use uuid::Uuid;

use super::*;

const FIRST: Uuid = Uuid::from_u128(1);

fn label(number: u32) -> Label {
    Label::new(number).unwrap()
}

fn named(name: &str) -> Claim {
    Claim { name: name.to_owned(), uuid: None, label: None }
}

fn pinned(name: &str, number: u32) -> Claim {
    Claim { label: Some(label(number)), ..named(name) }
}

fn identified(name: &str, uuid: Uuid) -> Claim {
    Claim { uuid: Some(uuid), ..named(name) }
}

fn tag() -> Tag {
    Tag { reason: "port scan".to_owned(), by: "root".to_owned(), at: 1_800_000_000 }
}

/// A state directory and its registry.
struct Host {
    dir: TempDir,
    registry: Option<Registry>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(&dir.path().join("state")).unwrap();
        Self { dir, registry: Some(registry) }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn file(&self) -> PathBuf {
        self.state().join("registry.json")
    }

    fn registry(&mut self) -> &mut Registry {
        self.registry.as_mut().unwrap()
    }

    fn allocate(&mut self, claims: &[Claim]) -> Result<Vec<u32>, String> {
        let labels = self.registry().allocate(claims, &(label(1)..=label(5)));
        labels.map(|labels| labels.into_iter().map(Label::get).collect()).map_err(|error| error.to_string())
    }

    fn retire(&mut self, number: u32) {
        self.registry().retire(label(number)).unwrap();
    }

    /// What a new process would say.
    fn reopen(&mut self) -> Result<(), String> {
        self.registry = None;
        self.registry = Some(Registry::open(&self.state()).map_err(|error| error.to_string())?);
        Ok(())
    }

    /// Writes this file, opens, and returns the refusal with `FILE` and `DIR` for the paths.
    fn refusal_of(&mut self, file: &str) -> String {
        self.registry = None;
        fs::write(self.file(), file).unwrap();
        self.refusal()
    }

    fn refusal(&mut self) -> String {
        let said = self.reopen().unwrap_err();
        said.replace(self.file().to_str().unwrap(), "FILE").replace(self.state().to_str().unwrap(), "DIR")
    }
}

#[test]
fn labels_are_kept_over_restarts_and_for_vms_that_are_not_configured() {
    let mut host = Host::new();
    assert_eq!(host.allocate(&[named("a"), named("b")]), Ok(vec![1, 2]));
    host.reopen().unwrap();
    assert_eq!(host.allocate(&[named("b")]), Ok(vec![2]));
    host.reopen().unwrap();
    assert_eq!(host.allocate(&[named("c"), named("a")]), Ok(vec![3, 1]));
}

#[test]
fn a_pinned_label_is_not_given_to_one_that_came_before_it() {
    assert_eq!(Host::new().allocate(&[named("a"), pinned("b", 1), named("c")]), Ok(vec![2, 1, 3]));
}

#[test]
fn a_name_that_comes_back_is_another_vm() {
    let mut host = Host::new();
    host.allocate(&[named("a")]).unwrap();
    host.registry().set_suspect(label(1), Some(tag())).unwrap();
    host.retire(1);
    host.reopen().unwrap();
    assert_eq!(host.allocate(&[named("a")]), Ok(vec![2]));
    let second = host.registry().entry(label(2)).unwrap();
    assert_eq!((second.generation, &second.suspect), (2, &None));
    assert_eq!(
        host.allocate(&[pinned("b", 1)]).unwrap_err(),
        "label 1 of VM \"b\" belonged to the removed VM \"a\", and labels are never given twice: pin another label, or leave it out"
    );
    host.retire(2);
    assert!(host.allocate(&[pinned("a", 1)]).unwrap_err().starts_with("label 1 of VM \"a\" belonged to"));
}

#[test]
fn a_uuid_that_comes_back_is_the_same_vm_under_any_name() {
    let mut host = Host::new();
    assert_eq!(host.allocate(&[identified("a", FIRST)]), Ok(vec![1]));
    assert_eq!(host.allocate(&[identified("renamed", FIRST), named("a")]), Ok(vec![1, 2]));
    assert_eq!(host.registry().entry(label(1)).unwrap().name, "renamed");
    host.registry().set_suspect(label(1), Some(tag())).unwrap();
    host.retire(1);
    host.reopen().unwrap();
    assert_eq!(host.allocate(&[named("b"), identified("a", FIRST)]), Ok(vec![3, 1]));
    assert_eq!(host.registry().entry(label(1)).unwrap().suspect, Some(tag()));
}

#[test]
fn a_removed_uuid_may_be_pinned_anew_and_keeps_its_tag() {
    let mut host = Host::new();
    host.allocate(&[identified("a", FIRST)]).unwrap();
    host.registry().set_suspect(label(1), Some(tag())).unwrap();
    let elsewhere = Claim { label: Some(label(4)), ..identified("a", FIRST) };
    assert_eq!(
        host.allocate(std::slice::from_ref(&elsewhere)).unwrap_err(),
        "VM \"a\" has label 1, not 4: use label 1, or remove the VM first"
    );
    host.retire(1);
    assert_eq!(host.allocate(&[elsewhere]), Ok(vec![4]));
    assert_eq!(host.registry().entry(label(4)).unwrap().suspect, Some(tag()));
    assert!(host.registry().entry(label(1)).unwrap().retired);
    host.retire(4);
    host.reopen().unwrap();
    assert_eq!(host.allocate(&[identified("a", FIRST)]), Ok(vec![4]), "its newest label");
}

#[test]
fn a_label_that_another_holds_is_refused() {
    let mut host = Host::new();
    host.allocate(&[named("a")]).unwrap();
    assert_eq!(
        host.allocate(&[pinned("b", 1)]).unwrap_err(),
        "label 1 of VM \"b\" belongs to VM \"a\", and labels are never given twice: pin another label, or leave it out"
    );
    assert!(host.allocate(&[pinned("b", 3), pinned("c", 3)]).unwrap_err().starts_with("label 3 of VM \"c\""));
    assert_eq!(
        host.allocate(&[named("b"), named("b")]).unwrap_err(),
        "VM \"b\" is claimed twice: each VM needs a name or UUID of its own"
    );
}

#[test]
fn a_label_outside_the_range_is_given_only_to_the_vm_that_has_it() {
    let mut host = Host::new();
    assert_eq!(
        host.allocate(&[pinned("a", 6)]).unwrap_err(),
        "label 6 of VM \"a\" is outside this host's range 1..=5: pin one of the range, or widen \"labels\" under [daemon]"
    );
    host.allocate(&[named("a")]).unwrap();
    let moved = label(3)..=label(4);
    assert_eq!(host.registry().allocate(&[named("a"), named("b")], &moved).unwrap(), [label(1), label(3)]);
}

#[test]
fn a_range_that_is_used_up_refuses_all_and_changes_nothing() {
    let mut host = Host::new();
    host.allocate(&[named("a"), named("b"), named("c"), pinned("d", 5)]).unwrap();
    host.retire(2);
    let before = fs::read(host.file()).unwrap();
    assert_eq!(
        host.allocate(&[named("e"), named("f")]).unwrap_err(),
        "all labels of this host's range 1..=5 have been used, and labels are never given twice: widen \"labels\" under [daemon]"
    );
    assert_eq!(fs::read(host.file()).unwrap(), before);
    assert_eq!(host.allocate(&[named("e")]), Ok(vec![4]));
}

#[test]
fn a_tag_is_kept_over_restarts_until_it_is_taken_off() {
    let mut host = Host::new();
    host.allocate(&[named("a"), named("b")]).unwrap();
    host.registry().set_suspect(label(2), Some(tag())).unwrap();
    host.reopen().unwrap();
    let tagged: Vec<_> =
        host.registry().entries().map(|(label, entry)| (label.get(), entry.suspect.clone())).collect();
    assert_eq!(tagged, [(1, None), (2, Some(tag()))]);
    host.registry().set_suspect(label(2), None).unwrap();
    host.reopen().unwrap();
    assert!(host.registry().entries().all(|(_, entry)| entry.suspect.is_none()));
}

#[test]
fn what_no_vm_holds_can_be_neither_tagged_nor_retired() {
    let mut host = Host::new();
    host.allocate(&[named("a")]).unwrap();
    host.retire(1);
    for number in [1, 2] {
        assert!(matches!(host.registry().retire(label(number)), Err(RegistryError::NotHeld(_))));
        assert!(matches!(host.registry().set_suspect(label(number), None), Err(RegistryError::NotHeld(_))));
    }
}

#[test]
fn a_change_that_cannot_be_saved_is_not_in_force() {
    let mut host = Host::new();
    host.allocate(&[named("a")]).unwrap();
    let before = fs::read(host.file()).unwrap();
    // A directory in the place of the new file stops even root.
    fs::create_dir(host.state().join("registry.json.new")).unwrap();
    assert!(host.allocate(&[named("b")]).unwrap_err().contains("cannot write it: Is a directory"));
    assert!(host.registry().retire(label(1)).is_err());
    assert_eq!(host.registry().entries().count(), 1);
    assert!(!host.registry().entry(label(1)).unwrap().retired);
    assert_eq!(fs::read(host.file()).unwrap(), before);
    assert_eq!(host.allocate(&[named("a")]), Ok(vec![1]), "nothing to save");
}

#[test]
fn the_directory_is_its_users_only_and_needs_a_parent() {
    let host = Host::new();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(host.state()), mode(host.file())), (0o700, 0o600));
    let refusal = Registry::open(&host.dir.path().join("x/state")).unwrap_err().to_string();
    assert!(refusal.contains("x/state: cannot create it (its parent must exist)"), "{refusal}");
    assert!(matches!(Registry::open(&host.file()), Err(RegistryError::Io { what: "use it", .. })));
}

#[test]
fn a_directory_that_others_can_write_to_is_refused() {
    let mut host = Host::new();
    fs::set_permissions(host.state(), fs::Permissions::from_mode(0o770)).unwrap();
    assert_eq!(host.refusal(), "DIR: others can write to it: give it to this user, and run chmod go-w on it");
}

#[test]
fn a_second_vmflow_on_the_same_state_is_refused_by_the_firsts_process_id() {
    let mut host = Host::new();
    let refusal = Registry::open(&host.state()).unwrap_err().to_string();
    let holder = format!(
        "in use by another vmflow (process {}): stop it, or choose another directory with --state",
        std::process::id()
    );
    assert!(refusal.ends_with(&holder), "{refusal}");
    host.reopen().unwrap();
}

#[test]
fn a_damaged_file_is_refused_with_the_way_out() {
    let mut host = Host::new();
    host.allocate(&[named("a"), named("b")]).unwrap();
    let good = fs::read_to_string(host.file()).unwrap();
    let way_out =
        ": restore it from a backup; without one move its directory away, then every VM gets a new label";
    let mut why = |file: &str| {
        let said = host.refusal_of(file);
        let said = said.strip_prefix("FILE: damaged: ").and_then(|said| said.strip_suffix(way_out));
        said.expect("the whole line").to_owned()
    };
    assert_eq!(why(""), "EOF while parsing a value at line 1 column 0");
    assert!(why(&good[..good.len() / 2]).starts_with("EOF while parsing"));
    assert_eq!(why(&good.replace("\"label\": 2", "\"label\": 1")), "label 1 is there twice");
    assert_eq!(
        why(&good.replace("\"label\": 2", "\"label\": 0")),
        "0 is no label: labels are 1 to 2147483647"
    );
    assert!(why(&good.replace("\"b\"", "\"../b\"")).starts_with("VM name \"../b\""));
    assert_eq!(why(&good.replace("\"b\"", "\"a\"")), "label 2 has the generation of another, or none");
    let second = good.replace("\"b\"", "\"a\"").replacen("\"generation\": 1", "\"generation\": 2", 1);
    assert_eq!(why(&second), "a VM holds two labels");
    assert!(why(&good.replace("\"retired\"", "\"tired\"")).starts_with("unknown field `tired`"));
    assert_eq!(why("{\"format\": \"x\", \"version\": 1}"), "its format is \"x\", not \"vmflow-registry\"");
    assert_eq!(
        host.refusal_of(&good.replace("\"version\": 1", "\"version\": 2")),
        "FILE: has format version 2, and this vmflow knows 1: run the vmflow that wrote it"
    );
    fs::write(host.file(), good).unwrap();
    host.reopen().unwrap();
}

#[test]
fn a_file_that_cannot_be_read_is_refused_with_the_way_out() {
    let mut host = Host::new();
    host.registry = None;
    fs::remove_file(host.file()).unwrap();
    // Not even root can read a directory as a file.
    fs::create_dir(host.file()).unwrap();
    assert_eq!(
        host.refusal(),
        "FILE: cannot be read: Is a directory (os error 21): run as its owner, or restore it from a backup"
    );
}

#[test]
fn state_without_labels_is_refused_and_a_new_file_that_was_never_whole_is_not() {
    let mut host = Host::new();
    host.registry = None;
    fs::remove_file(host.file()).unwrap();
    fs::write(host.state().join("registry.json.new"), "{").unwrap();
    host.reopen().unwrap();
    host.registry = None;
    fs::remove_file(host.file()).unwrap();
    fs::write(host.state().join("checkpoint"), "").unwrap();
    assert_eq!(
        host.refusal(),
        "FILE: missing, but its directory holds \"checkpoint\": restore it from a backup; \
         without one move the directory away, then every VM gets a new label"
    );
}

mod model;
