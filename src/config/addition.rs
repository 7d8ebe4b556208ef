//! One VM more: judged by itself, and against those that are there.

use std::path::{Path, PathBuf};

use super::{
    Config, Faults, Place, Port, Vm,
    error::ConfigError,
    judge::{Claim, Judge},
    source::{Source, Spot},
    strict,
    vms::Vms,
};

/// How somebody describes one VM that is to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Described {
    /// As `name=web1,socket=PATH,tap=IFNAME[,label=1]...`; each further argument is another port of it.
    Arguments(Vec<String>),
    /// As a file in `vms.d`.
    File(PathBuf),
}

impl Described {
    /// The VM, judged by itself.
    ///
    /// # Errors
    /// [`Faults`]: all that is wrong with it.
    pub fn judge(&self) -> Result<Vm, Faults> {
        let mut judge = Judge::default();
        let spot = match self {
            Self::Arguments(_) => judge.sources.whole(Source::Argument("add")),
            Self::File(file) => judge.sources.whole(Source::Known(Place::WholeFile(file.clone()))),
        };
        let mut vms = Vms::new(&mut judge, None);
        match self {
            Self::Arguments(arguments) => vms.judge_arguments("argument", arguments),
            Self::File(file) => vms.judge_file(file),
        }
        let vms = vms.finish();
        one(judge, vms, spot)
    }
}

impl Config {
    /// Judges a VM that is to be added: JSON with the keys of a `[[vm]]` table. It may be there already: one of
    /// its name is left out of the comparison.
    ///
    /// # Errors
    /// [`Faults`]: all that is wrong with it, and all that others have.
    pub fn judge_addition(&self, json: &[u8]) -> Result<Vm, Faults> {
        let mut judge = Judge::default();
        let Some((number, loose)) = judge.sources.read_request(json) else {
            return Err(Faults(judge.sources.into_faults()));
        };
        let name = loose.vm.0.first().and_then(|vm| vm.get_ref().name.as_ref()).map(toml::Spanned::get_ref);
        for vm in self.vms.iter().filter(|vm| Some(&vm.name) != name) {
            judge.occupy(vm.at.clone(), vm.claims());
        }
        for (key, path) in
            [("control under [daemon]", &self.daemon.control), ("stats under [daemon]", &self.daemon.stats)]
        {
            judge.occupy(Place::Argument(key), [Claim::Socket(path.clone())]);
        }
        let mut vms = Vms::new(&mut judge, Some(self.daemon.labels.clone()));
        vms.judge_all(number, loose.vm);
        let vms = vms.finish();
        one(judge, vms, Spot { source: number, offset: 0 })
    }
}

/// The one VM that was described.
fn one(mut judge: Judge, mut vms: Vec<Vm>, spot: Spot) -> Result<Vm, Faults> {
    if judge.sources.is_flawless() && vms.len() != 1 {
        judge.sources.fault(spot, ConfigError::NotOne(vms.len()));
    }
    let faults = judge.sources.into_faults();
    match vms.pop() {
        Some(vm) if faults.is_empty() => Ok(vm),
        _ => Err(Faults(faults)),
    }
}

impl Vm {
    /// True if it has the same settings, wherever they were written.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let Self { at: _, name, uuid, label, suspect, ports } = self;
        (name, uuid, label, suspect, ports)
            == (&other.name, &other.uuid, &other.label, &other.suspect, &other.ports)
    }

    /// True if it was added while the monitor ran.
    #[must_use]
    pub const fn is_added(&self) -> bool {
        matches!(self.at, Place::Added(_))
    }

    /// The file that it is kept in if it is added, below this state directory.
    #[must_use]
    pub fn added_file(&self, state: &Path) -> PathBuf {
        strict::added_dir(state).join(format!("{}.toml", self.name))
    }

    /// What no other VM can have.
    fn claims(&self) -> Vec<Claim> {
        let tap = |port: &Port| Claim::Tap(port.netns.clone(), port.tap.clone());
        let ports = self.ports.iter().flat_map(|port| [Claim::Socket(port.socket.clone()), tap(port)]);
        let own =
            [Some(Claim::Name(self.name.clone())), self.uuid.map(Claim::Uuid), self.label.map(Claim::Label)];
        own.into_iter().flatten().chain(ports).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Mode, Origins};

    fn running(vms: &[&str]) -> Config {
        Config::load(&Origins { vms: vms.iter().map(ToString::to_string).collect(), ..Origins::default() })
            .unwrap()
    }

    fn refused(running: &Config, json: &str) -> Vec<String> {
        running.judge_addition(json.as_bytes()).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_vm_is_the_same_as_a_request_as_arguments_and_as_a_file() {
        let vm = Described::Arguments(vec![
            "name=web3,socket=/s/3,tap=t3,label=7,uuid=1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3,mtu=1400,peer=root".into(),
            "name=web3,socket=/s/4,tap=t3,netns=n,mode=client,mac=02:00:00:00:00:01,coalesce=false".into(),
        ]);
        let vm = vm.judge().unwrap();
        assert_eq!((vm.ports.len(), vm.ports[0].peer, vm.ports[1].mode), (2, Some(0), Mode::Client));

        let mut full = vm.clone();
        full.suspect = Some(crate::config::SuspectAction::Drop);
        full.ports[0].owner = Some(5);
        full.ports[0].group = Some(6);
        full.ports[0].socket_mode = 0o600;
        full.ports[0].bridge = Some("br0".into());
        full.ports[0].control_queue = false;
        full.ports[0].coalesce = false;
        full.ports[0].poll_us = 7;
        for vm in [vm, full] {
            let json = serde_json::to_vec(&vm).unwrap();
            let requested = running(&[]).judge_addition(&json).unwrap();
            assert!(requested.is_same_as(&vm), "{requested:?}");
            assert_eq!(requested.at, Place::Request { port: None });

            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("a.toml");
            std::fs::write(&file, vm.to_file().unwrap()).unwrap();
            let read = Described::File(file.clone()).judge().unwrap();
            assert!(read.is_same_as(&vm), "{}", vm.to_file().unwrap());
            assert_eq!(read.at, Place::File { path: file, line: 3, column: 8 });
        }
    }

    #[test]
    fn what_others_have_is_a_conflict_and_names_its_place() {
        let running =
            running(&["name=a,socket=/s/1,tap=t1,label=4,uuid=1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3"]);
        let json = r#"{"name":"b","label":4,"uuid":"1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3",
            "port":[{"socket":"/run/vmflow/control.sock","tap":"t2"},{"socket":"/s/1","tap":"t1"}]}"#;
        assert!(running.judge_addition(json.as_bytes()).unwrap_err().are_conflicts());
        let taken = "is taken at --vm number 1, column 6: give each its own";
        assert_eq!(
            refused(&running, json),
            [
                format!("the request: label 4 {taken}"),
                format!("the request: the UUID 1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3 {taken}"),
                "the request, port number 1: the socket \"/run/vmflow/control.sock\" is taken at control under \
                 [daemon]: give each its own".to_owned(),
                format!("the request, port number 2: the socket \"/s/1\" {taken}"),
                format!("the request, port number 2: the tap \"t1\" {taken}"),
            ]
        );
        let same = r#"{"name":"a","port":[{"socket":"/s/1","tap":"t1"}]}"#;
        assert!(running.judge_addition(same.as_bytes()).is_ok(), "it may be the same VM");
    }

    #[test]
    fn every_fault_of_a_request_is_told_with_its_port() {
        let json = r#"{"nme":"a","suspect":{"action":"dorp"},"uuid":null,
            "port":[{"socket":"/s/1","tap":"t1","mtu":"big"},{"socket":"s","tap":"t/2","peer":{"uid":-1}}]}"#;
        let faults = refused(&running(&[]), json);
        for (fault, said) in faults.iter().zip([
            "the request: unknown key \"nme\": did you mean \"name\"?",
            "the request, port number 1: invalid type: string \"big\", expected a number",
            "the request, port number 2: socket \"s\" is not an absolute path",
            "the request, port number 2: tap name \"t/2\" has a character",
            "the request, port number 2: uid -1 is out of range",
            "the request: suspect action \"dorp\" is not",
        ]) {
            assert!(fault.starts_with(said), "{fault}\nis not\n{said}");
        }
        assert_eq!(faults.len(), 6, "{faults:?}");
    }

    #[test]
    fn what_is_no_vm_is_refused() {
        let none = running(&[]);
        for (json, said) in [
            ("", "the request: is not a JSON object"),
            ("[]", "the request: is not a JSON object"),
            ("{}", "the request: the VM \"\" has no port"),
            (r#"{"name":"a","port":[]}"#, "the request: the VM \"a\" has no port"),
            (r#"{"name":"a","port":{}}"#, "the request: invalid type: table"),
            (r#"{"name":"a","port":[null]}"#, "the request: is not a JSON object"),
            (
                r#"{"name":"a\nb","port":[{"socket":"/s","tap":"t"}]}"#,
                "the request: VM name \"a\\nb\" has other",
            ),
            (r#"{"label":99999999999999999999}"#, "the request: "),
            (
                r#"{"label":16777216,"name":"a","port":[{"socket":"/s","tap":"t"}]}"#,
                "the request: label 16777216 is outside",
            ),
        ] {
            let faults = refused(&none, json);
            assert!(faults[0].starts_with(said), "{json}: {faults:?}");
            assert!(faults.iter().all(|fault| !fault.contains('\n')), "{faults:?}");
        }
        let two = ["name=a,socket=/s/1,tap=t1", "name=b,socket=/s/2,tap=t2"].map(str::to_owned).to_vec();
        let error = Described::Arguments(two).judge().unwrap_err().to_string();
        assert_eq!(error, "add: describes 2 VMs: one is added at a time");
        let error = Described::File("/none".into()).judge().unwrap_err().to_string();
        assert!(error.starts_with("/none: cannot be read: No such file"), "{error}");
    }
}
