//! Any order of additions, removals, tags and restarts, against a model that keeps the rules in the plainest
//! way: a list of what happened.

use std::collections::{BTreeSet, HashMap};

use proptest::prelude::*;

use super::*;

/// Few names, UUIDs and labels, so that they meet.
const LABELS: u32 = 6;
const NAMES: [&str; 3] = ["a", "b", "c"];
const UUIDS: u128 = 2;

#[derive(Clone, Debug)]
enum Step {
    Allocate(Vec<Claim>),
    Retire(u32),
    Tag(u32, bool),
    Restart,
}

/// A VM as the rules see it: a UUID, or the n-th VM of a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Vm {
    Uuid(Uuid),
    Name(String, usize),
}

#[derive(Default)]
struct Model {
    /// Every label that was ever given, to whom, in the order of giving.
    given: Vec<(u32, Vm)>,
    /// Who is there now.
    present: HashMap<Vm, u32>,
    /// How often a VM of this name was removed.
    removed: HashMap<String, usize>,
    tagged: BTreeSet<u32>,
}

impl Model {
    fn vm(&self, claim: &Claim) -> Vm {
        let nth = || self.removed.get(&claim.name).copied().unwrap_or(0);
        claim.uuid.map_or_else(|| Vm::Name(claim.name.clone(), nth()), Vm::Uuid)
    }

    fn owner(&self, label: u32) -> Option<&Vm> {
        self.given.iter().find(|(given, _)| *given == label).map(|(_, vm)| vm)
    }

    /// The labels that the rules demand, or none if they forbid the claims.
    fn demand(&self, claims: &[Claim]) -> Option<Vec<u32>> {
        let vms: Vec<Vm> = claims.iter().map(|claim| self.vm(claim)).collect();
        if vms.iter().enumerate().any(|(n, vm)| vms[..n].contains(vm)) {
            return None;
        }
        let last = |vm: &Vm| self.given.iter().rev().find(|(_, owner)| owner == vm).map(|(label, _)| *label);
        let mut wanted = Vec::new();
        for (claim, vm) in claims.iter().zip(&vms) {
            let pin = claim.label.map(Label::get);
            let present = self.present.get(vm).copied();
            let stranger = |pin| self.owner(pin).is_some_and(|owner| owner != vm) || pin > LABELS;
            if pin.is_some_and(|pin| stranger(pin) || present.is_some_and(|has| has != pin)) {
                return None;
            }
            wanted.push(pin.or(present).or(last(vm)));
        }
        let settled: Vec<u32> = wanted.iter().flatten().copied().collect();
        if settled.iter().collect::<BTreeSet<_>>().len() != settled.len() {
            return None;
        }
        let mut unused =
            (1..=LABELS).filter(|label| self.owner(*label).is_none() && !settled.contains(label));
        wanted.into_iter().map(|label| label.or_else(|| unused.next())).collect()
    }

    fn give(&mut self, claims: &[Claim], labels: &[u32]) {
        for (claim, label) in claims.iter().zip(labels) {
            let vm = self.vm(claim);
            let last = self.given.iter().rev().find(|(_, owner)| *owner == vm).map(|(label, _)| *label);
            if last != Some(*label) {
                let inherits = last.is_some_and(|last| self.tagged.contains(&last));
                if inherits {
                    self.tagged.insert(*label)
                } else {
                    self.tagged.remove(label)
                };
                self.given.push((*label, vm.clone()));
            }
            self.present.insert(vm, *label);
        }
    }

    fn holder(&self, label: u32) -> Option<Vm> {
        self.present.iter().find(|(_, held)| **held == label).map(|(vm, _)| vm.clone())
    }

    fn remove(&mut self, vm: &Vm) {
        self.present.remove(vm);
        if let Vm::Name(name, _) = vm {
            *self.removed.entry(name.clone()).or_default() += 1;
        }
    }
}

fn claim() -> impl Strategy<Value = Claim> {
    let name = prop::sample::select(&NAMES[..]);
    let uuid = prop::option::of((1..=UUIDS).prop_map(Uuid::from_u128));
    // One more than the range has, so that some are outside.
    let pin = prop::option::weighted(0.3, (1..=LABELS + 1).prop_map(label));
    (name, uuid, pin).prop_map(|(name, uuid, label)| Claim { name: name.to_owned(), uuid, label })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec(claim(), 1..4).prop_map(Step::Allocate),
        3 => (1..=LABELS).prop_map(Step::Retire),
        1 => (1..=LABELS, any::<bool>()).prop_map(|(label, on)| Step::Tag(label, on)),
        1 => Just(Step::Restart),
    ]
}

/// Does one step on both; a refused one must leave the file as it was.
fn take(host: &mut Host, model: &mut Model, step: Step) {
    let before = fs::read(host.file()).unwrap();
    let done = match step {
        Step::Allocate(claims) => {
            let range = label(1)..=label(LABELS);
            let labels = host.registry().allocate(&claims, &range).ok();
            let labels = labels.map(|labels| labels.into_iter().map(Label::get).collect::<Vec<_>>());
            assert_eq!(labels, model.demand(&claims), "{claims:?}");
            if let Some(labels) = &labels {
                model.give(&claims, labels);
            }
            labels.is_some()
        }
        Step::Retire(number) => {
            let holder = model.holder(number);
            assert_eq!(host.registry().retire(label(number)).is_ok(), holder.is_some());
            holder.map(|vm| model.remove(&vm)).is_some()
        }
        Step::Tag(number, on) => {
            let held = model.holder(number).is_some();
            assert_eq!(host.registry().set_suspect(label(number), on.then(tag)).is_ok(), held);
            if held && on {
                model.tagged.insert(number);
            } else if held {
                model.tagged.remove(&number);
            }
            held
        }
        Step::Restart => {
            host.reopen().unwrap();
            false
        }
    };
    if !done {
        assert_eq!(fs::read(host.file()).unwrap(), before, "a refusal or a restart changed the file");
    }
}

/// What the registry says, as the model would say it.
fn compare(host: &mut Host, model: &Model) {
    let entries: Vec<_> =
        host.registry().entries().map(|(label, entry)| (label.get(), entry.clone())).collect();
    let given: BTreeSet<u32> = model.given.iter().map(|(label, _)| *label).collect();
    assert_eq!(entries.iter().map(|(label, _)| *label).collect::<BTreeSet<_>>(), given);
    for (number, entry) in entries {
        assert_eq!(entry.retired, model.holder(number).is_none(), "label {number}");
        assert_eq!(entry.suspect.is_some(), model.tagged.contains(&number), "tag of label {number}");
        match model.owner(number).unwrap() {
            Vm::Uuid(uuid) => assert_eq!(entry.uuid, Some(*uuid)),
            Vm::Name(name, nth) => {
                assert_eq!((&entry.name, entry.generation), (name, u32::try_from(nth + 1).unwrap()));
                assert_eq!(entry.uuid, None);
            }
        }
    }
    // No label ever had two owners.
    for (number, vm) in &model.given {
        assert_eq!(model.owner(*number), Some(vm));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_label_ever_has_two_owners_and_no_vm_two_labels(steps in prop::collection::vec(step(), 1..40)) {
        let mut host = Host::new();
        let mut model = Model::default();
        for step in steps {
            take(&mut host, &mut model, step);
            compare(&mut host, &model);
        }
    }
}
