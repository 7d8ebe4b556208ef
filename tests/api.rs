//! The API from outside: real sockets, real routers, a monitor that answers from fixed data, and as clients
//! curl, raw bytes and vmflow's own.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where something unexpected happens")]

#[path = "harness/described.rs"]
mod described;

use std::{
    io::{Read, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Command as Process,
    sync::{Arc, Mutex, OnceLock},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use described::Described;
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use vmflow::{
    client::{self, Action, Client, ClientError},
    label::Label,
    ledger::Totals,
    monitor::{
        api::{
            Added, Command, CommandError, Limits, StateCommand, TagRequest, VmCommand, Which, control_router,
            document::{
                Changes, Gap, Mode, PortDocument, PortStats, Receive, Stats, Tag, Transmit, VmDocument,
                VmStats, Vms,
            },
            health::{Check, Health, Problem},
            serve_unix, stats_router,
        },
        checkpoint::GapReason,
        listen::{Access, bind_unix},
        state::{Imported, State},
    },
};

/// How long a test waits for what must happen at once on an idle machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// The VM that there is.
const VM: &str = "web1";
/// A VM whose port does not acknowledge.
const VM_SLOW: &str = "slow";
/// A VM whose state cannot be written.
const VM_READ_ONLY: &str = "readonly";
/// A VM about which the monitor says nothing.
const VM_MUTE: &str = "mute";

const SINCE: &str = "2026-01-02T03:04:05Z";

/// Every tag that was asked for, with the VM's name.
type Tags = Arc<Mutex<Vec<(String, Option<TagRequest>)>>>;

/// A vmflow whose monitor is fixed data. It ends when dropped.
struct Daemon {
    directory: TempDir,
    tags: Tags,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start(stats: Stats, limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Open to all, as a daemon's directory is: the sockets keep out who has no right.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let tags = Tags::default();
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn({
            let (path, tags) = (directory.path().to_owned(), Arc::clone(&tags));
            move || {
                runtime().block_on(async move {
                    let (commands, asked) = mpsc::channel(1);
                    let bind = |name, mode| {
                        bind_unix(&path.join(name), &Access::mode(mode)).unwrap().into_tokio().unwrap()
                    };
                    let (control, _control_claim) = bind("control.sock", 0o600);
                    let (looking, _stats_claim) = bind(client::STATS_SOCKET, 0o660);
                    ready.send(()).unwrap();
                    tokio::select! {
                        _ = serve_unix(control, control_router(commands.clone()), limits) => {}
                        _ = serve_unix(looking, stats_router(commands), limits) => {}
                        () = monitor(asked, stats, tags) => {}
                        _ = stopped => {}
                    }
                });
            }
        });
        is_ready.recv_timeout(DEADLINE).unwrap();
        Self { directory, tags, stop: Some(stop), thread: Some(thread) }
    }

    fn usual() -> Self {
        Self::start(numbered(), Limits::default())
    }

    fn control(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    fn stats(&self) -> PathBuf {
        self.directory.path().join(client::STATS_SOCKET)
    }

    fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Answers commands until nobody can send any more.
async fn monitor(mut commands: mpsc::Receiver<Command>, stats: Stats, tags: Tags) {
    let mut unanswered = Vec::new();
    while let Some(command) = commands.recv().await {
        match command {
            // Who asked may be gone by now.
            Command::Stats(reply) => drop(reply.send(stats.clone())),
            Command::Vms(reply) => drop(reply.send(Vms::new("host1".into(), vec![document(None)]))),
            Command::Health(reply) => drop(reply.send(health(stats.gaps.is_empty()))),
            Command::State(StateCommand::Export(reply)) => drop(reply.send(state())),
            Command::State(StateCommand::Import { state: other, reply }) => {
                let refusal = CommandError::Conflict("nothing is imported: label 1 is taken".into());
                let imported = Imported { vms: 1, ports: 1 };
                drop(reply.send(if other == state() { Ok(imported) } else { Err(refusal) }));
            }
            Command::Tag { vm, tag, reply } => {
                tags.lock().unwrap().push((vm.clone(), tag.clone()));
                let answer = match vm.as_str() {
                    VM => Ok(document(tag)),
                    VM_SLOW => Err(CommandError::NotApplied("port net0 did not acknowledge".into())),
                    VM_READ_ONLY => Err(CommandError::State("the disk is full".into())),
                    VM_MUTE => {
                        unanswered.push(reply);
                        continue;
                    }
                    _ => Err(CommandError::NoSuchVm(vm)),
                };
                drop(reply.send(answer));
            }
            Command::Vm { command, by } => {
                assert!(by.contains("uid "), "{by}");
                change(command);
            }
        }
    }
}

/// A monitor to which [`VM`] is new, and [`VM_SLOW`] there already.
fn change(command: VmCommand) {
    match command {
        VmCommand::Add(vm, reply) => {
            let text = String::from_utf8_lossy(&vm).into_owned();
            drop(reply.send(match serde_json::from_str::<serde_json::Value>(&text) {
                Ok(vm) if vm["name"] == VM => Ok(Added { vm: document(None), is_new: true }),
                Ok(vm) if vm["name"] == VM_SLOW => Ok(Added { vm: document(None), is_new: false }),
                Ok(_) => Err(CommandError::Conflict("the tap is taken".into())),
                Err(_) => Err(CommandError::Invalid(format!("not JSON: {text}\nnor anything else"))),
            }));
        }
        VmCommand::Remove(Which::Name(name), reply) if name == VM => drop(reply.send(Ok(document(None)))),
        VmCommand::Remove(which, reply) => drop(reply.send(Err(which.missing()))),
        VmCommand::Reload(reply) => {
            let changes = Changes::new(vec!["a".into()], vec![], vec!["b".into(), "c".into()]);
            drop(reply.send(Ok(changes)));
        }
    }
}

/// What `GET /v1/state` answers, to the byte.
const STATE: &str = concat!(
    r#"{"format":"vmflow-state","version":1,"vms":[{"label":1,"name":"web1","uuid":null,"generation":1,"#,
    r#""retired":false,"tag":{"reason":"scans","by":"root","at":1800000000},"#,
    r#""ports":[{"port":0,"counted":{"connections":2,"transmit":{"chains":7,"#,
    r#""passed":{"frames":7,"packets":7,"bytes":700,"wire_bytes":700}}}}]}]}"#,
    "\n"
);

fn state() -> State {
    State::parse(STATE.as_bytes()).unwrap()
}

/// All is well, or nothing.
fn health(is_well: bool) -> Health {
    let problems = |reason: &str| {
        let reason = reason.to_owned();
        let (vm, label, port) = (Some(VM.into()), Some(1), Some(0));
        if is_well { vec![] } else { vec![Problem { vm, label, port, reason }] }
    };
    let disk = if is_well { vec![] } else { vec![Problem::of_host("the disk is full".into())] };
    Health::new(vec![Check::new("checkpoint", disk), Check::new("taps", problems("the tap is gone"))])
}

fn document(tag: Option<TagRequest>) -> VmDocument {
    let tag = tag.map(|TagRequest { reason, by }| Tag { reason, by, since: SINCE.into() });
    let mut vm = VmDocument::new(VM.into(), None, Label::new(1).unwrap(), tag, "count".into());
    vm.ports = vec![PortDocument {
        socket: "/run/vmflow/web1/net0.sock".into(),
        mode: Mode::Client,
        tap: "vmf-web1".into(),
        netns: None,
        connected: false,
        mac: Some("52:54:00:12:34:56".into()),
        mtu: Some(1500),
    }];
    vm
}

/// Counters that count up from `first`, in the order of the ledger.
fn counting_from(first: u64) -> Totals {
    let mut words = [0; Totals::WORDS];
    for (word, number) in words.iter_mut().zip(first..) {
        *word = number;
    }
    Totals::from_words(&words)
}

/// One VM whose every counter has a number of its own.
fn numbered() -> Stats {
    let mut vm = VmStats::new(VM.into(), None, Label::new(1).unwrap(), None);
    vm.ports = vec![PortStats {
        socket: "/run/vmflow/web1/net0.sock".into(),
        mode: Mode::Server,
        tap: "vmf-web1".into(),
        netns: Some("web1".into()),
        connected: true,
        queue_pairs: 1,
        worker_restarts: 91,
        uncertain: 92,
        queue_faults: 93,
        refused_connections: 94,
        connections: 95,
        connections_given_up: 96,
        transmit: Transmit::from(&counting_from(1)),
        receive: Receive::from(&counting_from(101)),
    }];
    Stats::new("host1".into(), vec![vm])
}

/// What `GET /v1/stats` answers with [`numbered`], to the byte.
const NUMBERED: &str = concat!(
    r#"{"version":1,"node":"host1","vms":[{"name":"web1","uuid":null,"label":1,"suspect_label":2147483649,"#,
    r#""suspect":false,"ports":[{"socket":"/run/vmflow/web1/net0.sock","mode":"server","tap":"vmf-web1","#,
    r#""netns":"web1","connected":true,"queue_pairs":1,"worker_restarts":91,"uncertain":92,"queue_faults":93,"#,
    r#""refused_connections":94,"connections":95,"connections_given_up":96,"#,
    r#""transmit":{"chains":1,"in_flight":2,"#,
    r#""forwarded":{"frames":3,"packets":4,"bytes":5,"wire_bytes":6},"#,
    r#""diverted":{"frames":7,"packets":8,"bytes":9,"wire_bytes":10},"#,
    r#""normal":{"frames":11,"packets":12,"bytes":13,"wire_bytes":14},"#,
    r#""suspect":{"frames":15,"packets":16,"bytes":17,"wire_bytes":18},"#,
    r#""dropped":{"malformed":19,"runt":20,"oversize":21,"bad_offload":22,"not_negotiated":23,"no_buffers":24,"#,
    r#""buffers_too_small":25,"rule":26,"default":27,"suspect_policy":28,"guard":29,"rate_limit":30,"#,
    r#""quarantine":31,"tap_refused":32,"tap_down":33,"ring_disabled":34,"restart":35,"restart_unmatched":36},"#,
    r#""dropped_packets":37,"dropped_bytes":38,"tap":{"writes":39,"write_bytes":40}},"#,
    r#""receive":{"reads":101,"in_flight":102,"#,
    r#""delivered":{"frames":103,"packets":104,"bytes":105,"wire_bytes":106},"#,
    r#""diverted":{"frames":107,"packets":108,"bytes":109,"wire_bytes":110},"#,
    r#""normal":{"frames":111,"packets":112,"bytes":113,"wire_bytes":114},"#,
    r#""suspect":{"frames":115,"packets":116,"bytes":117,"wire_bytes":118},"#,
    r#""dropped":{"malformed":119,"runt":120,"oversize":121,"bad_offload":122,"not_negotiated":123,"#,
    r#""no_buffers":124,"buffers_too_small":125,"rule":126,"default":127,"suspect_policy":128,"guard":129,"#,
    r#""rate_limit":130,"quarantine":131,"tap_refused":132,"tap_down":133,"ring_disabled":134,"restart":135,"#,
    r#""restart_unmatched":136},"dropped_packets":137,"dropped_bytes":138,"#,
    r#""tap":{"reads":139,"read_bytes":140}}}]}],"gaps":[]}"#,
    "\n"
);

/// What `GET /v1/vms` answers, to the byte.
const VMS: &str = concat!(
    r#"{"version":1,"node":"host1","vms":[{"name":"web1","uuid":null,"label":1,"suspect_label":2147483649,"#,
    r#""suspect":false,"tag":null,"suspect_action":"count","ports":[{"socket":"/run/vmflow/web1/net0.sock","#,
    r#""mode":"client","tap":"vmf-web1","netns":null,"connected":false,"mac":"52:54:00:12:34:56","mtu":1500}]}]}"#,
    "\n"
);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// What `vmflow` prints for a subcommand.
fn run(control: &Path, action: &Action) -> Result<String, ClientError> {
    let mut out = Vec::new();
    runtime().block_on(client::run(control, action, &mut out, false))?;
    Ok(String::from_utf8(out).unwrap())
}

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// The answer to raw bytes, up to the end of the connection; it must be as the API describes itself.
fn raw(socket: &Path, request: &str) -> String {
    let answer = unchecked(socket, request);
    if let Some((head, body)) = answer.split_once("\r\n\r\n").filter(|_| !request.starts_with("HEAD")) {
        let mut line = request.split(' ');
        let (method, path) = (line.next().unwrap(), line.next().unwrap());
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        assert!(head.contains("content-type: application/json"), "{answer}");
        described(socket).check(method, path, status, body);
    }
    answer
}

fn unchecked(socket: &Path, request: &str) -> String {
    let mut stream = connect(socket);
    stream.write_all(request.as_bytes()).unwrap();
    rest(stream)
}

/// How a socket describes itself: what it answers.
fn described(socket: &Path) -> &'static Described {
    static OF: [OnceLock<Described>; 2] = [OnceLock::new(), OnceLock::new()];
    OF[usize::from(socket.ends_with(client::STATS_SOCKET))].get_or_init(|| {
        let daemon = Daemon::usual();
        let socket = daemon.directory.path().join(socket.file_name().unwrap());
        let answer = unchecked(&socket, &request("GET", "/v1/openapi.json", ""));
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        Described::new(serde_json::from_str(body).unwrap())
    })
}

fn rest(mut stream: UnixStream) -> String {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn request(method: &str, path: &str, body: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: vmflow\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// Status and error text of a refusal, which must be one line of JSON.
fn refusal(answer: &str) -> (u16, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(head.contains("content-type: application/json"), "{answer}");
    assert_eq!(body.matches('\n').count(), 1, "{answer}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    (status, body["error"].as_str().unwrap().to_owned())
}

/// What curl prints; an answer must be as the API describes itself.
fn curl(socket: &Path, arguments: &[&str]) -> (String, bool) {
    let output = Process::new("curl")
        .args([
            "--silent",
            "--show-error",
            "--max-time",
            "20",
            "--write-out",
            "%{http_code}",
            "--unix-socket",
        ])
        .arg(socket)
        .args(arguments)
        .output()
        .unwrap();
    let mut text = String::from_utf8(output.stdout).unwrap();
    let status = text.split_off(text.len() - 3).parse().unwrap();
    if status != 0 {
        let option = arguments.iter().position(|argument| *argument == "-X");
        let method = option.map_or("GET", |place| arguments[place + 1]);
        let path = arguments.iter().find_map(|argument| argument.strip_prefix("http://vmflow")).unwrap();
        let body = text.rsplit("\r\n\r\n").next().unwrap();
        described(socket).check(method, path, status, body);
    }
    (text + &String::from_utf8_lossy(&output.stderr), output.status.success())
}

#[test]
fn curl_gets_the_statistics_key_by_key_from_both_sockets() {
    let daemon = Daemon::usual();
    for socket in [daemon.stats(), daemon.control()] {
        assert_eq!(curl(&socket, &["http://vmflow/v1/stats"]), (NUMBERED.to_owned(), true));
        assert_eq!(curl(&socket, &["http://vmflow/v1/vms"]), (VMS.to_owned(), true));
    }
    let (head, _) = curl(&daemon.stats(), &["--include", "http://vmflow/v1/vms"]);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"), "{head}");
    assert!(head.contains("\r\nconnection: close\r\n"), "a connection serves one request: {head}");
}

#[test]
fn each_socket_describes_what_it_answers_and_every_operation_and_key_has_its_sentence() {
    let daemon = Daemon::usual();
    let of = |socket: &Path| {
        let (text, _) = curl(socket, &["http://vmflow/v1/openapi.json"]);
        Described::new(serde_json::from_str(&text).unwrap())
    };
    let (control, stats) = (of(&daemon.control()), of(&daemon.stats()));
    assert_eq!(control.document(), described(&daemon.control()).document());
    let operations = control.operations();
    assert!(stats.operations().iter().all(|operation| operations.contains(operation)));
    assert!(stats.operations().iter().all(|(_, method)| method == "get"));
    for (path, method) in &operations {
        let operation = &control.document()["paths"][path][method];
        assert!(operation["summary"].is_string(), "{method} {path} has no sentence");
        assert!(operation["responses"]["200"]["content"]["application/json"]["schema"].is_object());
    }
    let schemas = control.document()["components"]["schemas"].as_object().unwrap();
    for (name, schema) in schemas {
        for (key, property) in schema["properties"].as_object().into_iter().flatten() {
            let is_said = property["description"].is_string() || property["oneOf"].is_array();
            assert!(is_said, "{name}.{key} has no sentence: {property}");
        }
    }
}

#[test]
fn the_descriptions_own_test_refuses_what_is_not_described() {
    let described = described(Path::new("control.sock"));
    let refuses = |method: &str, path: &str, status, body: &str| {
        let check = || described.check(method, path, status, body);
        assert!(std::panic::catch_unwind(check).is_err(), "{method} {path} {status} {body}");
    };
    described.check("GET", "/v1/stats", 200, NUMBERED);
    refuses("GET", "/v1/stats", 201, NUMBERED);
    refuses("GET", "/v1/nothing", 200, NUMBERED);
    refuses("GET", "/v1/stats", 200, VMS);
    refuses("GET", "/v1/stats", 200, &NUMBERED.replacen("\"gaps\"", "\"more\":1,\"gaps\"", 1));
    refuses("GET", "/v1/stats", 200, &NUMBERED.replacen("\"runt\"", "\"other\"", 1));
    refuses("GET", "/v1/stats", 200, &NUMBERED.replacen("\"chains\":1,", "", 1));
    refuses("GET", "/v1/stats", 200, &NUMBERED.replacen("\"connected\":true", "\"connected\":1", 1));
    refuses("GET", "/v1/stats", 503, "{}");
}

#[test]
fn curl_tags_and_clears_a_vm_on_the_control_socket() {
    let daemon = Daemon::usual();
    let url = "http://vmflow/v1/vms/web1/suspect";
    let (answer, _) = curl(&daemon.control(), &["-X", "PUT", "-d", r#"{"reason": "scans port 22"}"#, url]);
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((&answer["suspect"], &answer["suspect_label"]), (&true.into(), &2_147_483_649_u32.into()));
    assert_eq!(answer["tag"]["reason"], "scans port 22");
    let (answer, _) = curl(&daemon.control(), &["-X", "DELETE", url]);
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((&answer["suspect"], &answer["tag"]), (&false.into(), &serde_json::Value::Null));
}

#[test]
fn the_stats_socket_answers_get_only_on_every_path() {
    let daemon = Daemon::usual();
    for path in ["/v1/stats", "/v1/vms", "/v1/vms/web1/suspect", "/", "/nowhere", "/v1/stats?x=1", "*"] {
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"] {
            let answer = raw(&daemon.stats(), &request(method, path, r#"{"reason":"x"}"#));
            let (status, error) = refusal(&answer);
            assert_eq!(status, 405, "{method} {path}: {answer}");
            assert!(answer.contains("\r\nallow: GET\r\n"), "{answer}");
            assert_eq!(error, format!("{method} is not allowed here: this socket answers GET only"));
        }
        let head = raw(&daemon.stats(), &request("HEAD", path, ""));
        assert!(head.starts_with("HTTP/1.1 405 ") && head.ends_with("\r\n\r\n"), "{head}");
    }
    assert!(daemon.tags.lock().unwrap().is_empty());
}

#[test]
fn a_wrong_method_or_path_is_named_on_the_control_socket() {
    let daemon = Daemon::usual();
    for (method, path, allow) in
        [("POST", "/v1/stats", "GET,HEAD"), ("PATCH", "/v1/vms/web1/suspect", "PUT,DELETE")]
    {
        let answer = raw(&daemon.control(), &request(method, path, ""));
        assert_eq!(refusal(&answer), (405, format!("{method} is not allowed on {path}")));
        assert!(answer.contains(&format!("\r\nallow: {allow}\r\n")), "{answer}");
    }
    let missing =
        (404, "there is no /v2/stats: try /v1/stats or /v1/vms; /v1/openapi.json has them all".to_owned());
    assert_eq!(refusal(&raw(&daemon.control(), &request("GET", "/v2/stats", ""))), missing);
    assert_eq!(refusal(&raw(&daemon.stats(), &request("GET", "/v2/stats", ""))), missing);
}

#[test]
fn a_change_that_fails_says_why_with_a_fitting_status() {
    let limits = Limits { answer: Duration::from_secs(1), ..Limits::default() };
    let daemon = Daemon::start(numbered(), limits);
    let put = |vm: &str, body: &str| {
        refusal(&raw(&daemon.control(), &request("PUT", &format!("/v1/vms/{vm}/suspect"), body)))
    };
    let good = r#"{"reason":"x"}"#;
    assert_eq!(put("web9", good), (404, "no VM is called \"web9\": there are web1".into()));
    assert_eq!(put(VM_SLOW, good), (504, "not in force yet: port net0 did not acknowledge".into()));
    assert_eq!(put(VM_READ_ONLY, good), (500, "not changed: the disk is full".into()));
    assert_eq!(put(VM_MUTE, good), (503, "the monitor did not answer within 1 s: see its log".into()));
    assert_eq!(put("%ff", good).0, 400);

    let asked = daemon.tags.lock().unwrap().len();
    for (body, said) in [
        ("", "the body must be {\"reason\": \"...\"}"),
        ("reason=x", "the body must be {\"reason\": \"...\"}"),
        (r#"{"reason":1}"#, "the body must be {\"reason\": \"...\"}"),
        (r#"{"reason":"x","force":true}"#, "unknown field `force`"),
        (r#"{"reason":""}"#, "the reason is empty"),
        (r#"{"reason":"a\u001b[2Jb"}"#, "control character"),
        (&format!(r#"{{"reason":"{}"}}"#, "x".repeat(1025)), "1025 characters"),
    ] {
        let (status, error) = put(VM, body);
        assert!(status == 400 && error.contains(said), "{body}: {status} {error}");
    }
    assert_eq!(daemon.tags.lock().unwrap().len(), asked, "the monitor heard of none of these");
}

#[test]
fn vms_come_and_go_through_the_control_socket_with_fitting_statuses() {
    let daemon = Daemon::usual();
    let ask = |method: &str, path: &str, body: &str| {
        let answer = raw(&daemon.control(), &request(method, path, body));
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        (head.split(' ').nth(1).unwrap().parse::<u16>().unwrap(), body)
    };
    let (status, vm) = ask("POST", "/v1/vms", r#"{"name":"web1"}"#);
    assert_eq!((status, vm["label"].as_u64()), (201, Some(1)));
    assert_eq!(ask("POST", "/v1/vms", r#"{"name":"slow"}"#).0, 200);
    let refused = |error: &str| serde_json::json!({ "error": error });
    assert_eq!(ask("POST", "/v1/vms", r#"{"name":"web9"}"#), (409, refused("the tap is taken")));
    assert_eq!(ask("POST", "/v1/vms", "x"), (400, refused("not JSON: x\nnor anything else")));

    let (status, vm) = ask("DELETE", "/v1/vms/web1", "");
    assert_eq!((status, vm["name"].as_str()), (200, Some("web1")));
    let missing = refused("no VM is called \"web9\": there are web1");
    assert_eq!(ask("DELETE", "/v1/vms/web9", ""), (404, missing));
    let uuid = "1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3";
    let missing = refused(&format!("no VM has the UUID {uuid}: there are web1"));
    assert_eq!(ask("DELETE", &format!("/v1/vms?uuid={uuid}"), ""), (404, missing));
    for query in ["", "?uuid=1", "?name=web1"] {
        assert_eq!(ask("DELETE", &format!("/v1/vms{query}"), "").0, 400);
    }

    let (status, changes) = ask("POST", "/v1/reload", "");
    assert_eq!(status, 200);
    assert_eq!(changes, serde_json::json!({"version":1,"added":["a"],"removed":[],"changed":["b","c"]}));
    assert_eq!(run(&daemon.control(), &Action::Reload).unwrap(), "added: a\nchanged: b, c\n");
    let error = run(&daemon.control(), &Action::Remove(Which::Name("web9".into()))).unwrap_err();
    assert_eq!(error.to_string(), "no VM is called \"web9\": there are web1");
    for (method, path) in [("POST", "/v1/vms"), ("DELETE", "/v1/vms/web1"), ("POST", "/v1/reload")] {
        assert_eq!(refusal(&raw(&daemon.stats(), &request(method, path, ""))).0, 405);
    }
}

#[test]
fn state_is_had_and_given_on_the_control_socket_only() {
    let daemon = Daemon::usual();
    let url = "http://vmflow/v1/state";
    assert_eq!(curl(&daemon.control(), &[url]), (STATE.to_owned(), true));
    assert_eq!(refusal(&raw(&daemon.stats(), &request("GET", "/v1/state", ""))).0, 404);
    let put = |body: &str| raw(&daemon.control(), &request("PUT", "/v1/state", body));
    assert!(put(STATE).ends_with("{\"vms\":1,\"ports\":1}\n"));
    let other = STATE.replace("web1", "web2");
    assert_eq!(refusal(&put(&other)), (409, "nothing is imported: label 1 is taken".into()));
    for (wrong, said) in [
        ("{", "not a state document of version 1: EOF"),
        (STATE.replace("chains", "chain").as_str(), "unknown field `chain`"),
        (STATE.replace("-state", "-stats").as_str(), "it says \"vmflow-stats\", version 1"),
    ] {
        let (status, error) = refusal(&put(wrong));
        assert!(status == 400 && error.contains(said), "{status} {error}");
    }
    // Larger than what other requests may be.
    let many = STATE.replace("\"format\"", &format!("{}\"format\"", " ".repeat(1 << 20)));
    assert!(put(&many).ends_with("{\"vms\":1,\"ports\":1}\n"));
}

/// A daemon that is not well.
fn unwell() -> Daemon {
    let mut stats = numbered();
    let time = || SINCE.to_owned();
    stats.gaps.push(Gap { from: time(), to: time(), reason: GapReason::Killed });
    Daemon::start(stats, Limits::default())
}

#[test]
fn health_has_a_status_for_programs_and_lines_for_people_on_both_sockets() {
    let (well, unwell) = (Daemon::usual(), unwell());
    for socket in [well.control(), well.stats()] {
        let answer = raw(&socket, &request("GET", "/v1/health", ""));
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(r#"{"status":"ok","checks":["#));
    }
    for socket in [unwell.control(), unwell.stats()] {
        let answer = raw(&socket, &request("GET", "/v1/health", ""));
        assert!(
            answer.starts_with("HTTP/1.1 503 ") && answer.contains(r#"{"status":"degraded","#),
            "{answer}"
        );
    }
    let said = |daemon: &Daemon, json| {
        let mut out = Vec::new();
        let action = Action::Health { json };
        let ended = runtime().block_on(client::run(&daemon.control(), &action, &mut out, false));
        (String::from_utf8(out).unwrap(), ended)
    };
    let (text, ended) = said(&well, false);
    assert!(ended.is_ok());
    assert_eq!(text, "checkpoint: ok\ntaps: ok\nstatus: ok\n");
    let (text, ended) = said(&unwell, false);
    assert!(matches!(ended, Err(ClientError::Unwell)));
    assert_eq!(
        text,
        "checkpoint: degraded\n  the disk is full\ntaps: degraded\n  web1, port 0: the tap is gone\nstatus: degraded\n"
    );
    let (text, ended) = said(&unwell, true);
    assert!(
        matches!(ended, Err(ClientError::Unwell)) && text.starts_with(r#"{"status":"degraded""#),
        "{text}"
    );
}

#[test]
fn versions_are_told_on_both_sockets() {
    let daemon = Daemon::usual();
    let own = env!("CARGO_PKG_VERSION");
    for socket in [daemon.control(), daemon.stats()] {
        let (text, _) = curl(&socket, &["http://vmflow/v1/version"]);
        assert_eq!(text, format!("{{\"version\":\"{own}\",\"api\":1}}\n"));
    }
    let text = run(&daemon.control(), &Action::Version { json: false }).unwrap();
    assert_eq!(text, format!("this program: {own}\nrunning: {own}, API version 1\n"));
}

#[test]
fn a_tag_carries_the_identity_of_the_caller() {
    let daemon = Daemon::usual();
    let uid = rustix::process::geteuid().as_raw();
    let line = run(&daemon.control(), &Action::Suspect { vm: VM.into(), reason: "scans".into() }).unwrap();
    let tag = daemon.tags.lock().unwrap()[0].1.clone().unwrap();
    assert!(tag.by.contains(&format!("uid {uid}, pid {}", std::process::id())), "{}", tag.by);
    if uid == 0 {
        assert!(tag.by.starts_with("root (uid 0, pid "), "{}", tag.by);
    }
    let by = &tag.by;
    assert_eq!(
        line,
        format!(
            "web1 is suspect since {SINCE} by {by}: every frame carries label 2147483649, \
             suspect action \"count\": scans\n"
        )
    );
    let line = run(&daemon.control(), &Action::Clear { vm: VM.into() }).unwrap();
    assert_eq!(line, "web1 is not tagged: its frames carry label 1 where no rule finds them suspect\n");
    let error = run(&daemon.control(), &Action::Clear { vm: "a/b ä".into() }).unwrap_err();
    assert_eq!(error.to_string(), "no VM is called \"a/b ä\": there are web1");
}

#[test]
fn the_sockets_have_their_modes_and_go_with_the_daemon() {
    let mut daemon = Daemon::usual();
    let mode = |path: PathBuf| path.metadata().unwrap().mode() & 0o7777;
    assert_eq!((mode(daemon.control()), mode(daemon.stats())), (0o600, 0o660));
    let error = bind_unix(&daemon.control(), &Access::mode(0o600)).unwrap_err();
    assert!(error.to_string().ends_with("control.sock is in use by another vmflow"), "{error}");
    daemon.stop();
    assert_eq!(std::fs::read_dir(daemon.directory.path()).unwrap().count(), 0);
}

#[test]
fn a_client_that_sends_half_a_header_is_closed_and_others_are_answered_meanwhile() {
    let limits = Limits { idle: Duration::from_secs(1), ..Limits::default() };
    let daemon = Daemon::start(numbered(), limits);
    let begin = Instant::now();
    let mut half = connect(&daemon.stats());
    half.write_all(b"GET /v1/stats HTTP/1.1\r\nHost: vm").unwrap();
    let silent = connect(&daemon.stats());
    assert!(raw(&daemon.stats(), &request("GET", "/v1/stats", "")).ends_with(NUMBERED));
    assert!(!rest(half).contains(" 200 "));
    assert!(!rest(silent).contains(" 200 "));
    assert!(begin.elapsed() >= limits.idle);
}

#[test]
fn half_a_body_is_refused_in_time() {
    let limits = Limits { idle: Duration::from_secs(1), ..Limits::default() };
    let daemon = Daemon::start(numbered(), limits);
    let half = "PUT /v1/vms/web1/suspect HTTP/1.1\r\nHost: vmflow\r\nContent-Length: 99\r\n\r\n{\"rea";
    assert_eq!(refusal(&raw(&daemon.control(), half)), (408, "the body did not arrive within 1 s".into()));
}

#[test]
fn a_body_of_a_mebibyte_is_refused_with_an_answer() {
    let daemon = Daemon::usual();
    let wanted = (413, "the body is larger than 65536 bytes".to_owned());
    let large = format!(r#"{{"reason":"{}"}}"#, "x".repeat(1 << 20));
    assert_eq!(refusal(&raw(&daemon.control(), &request("PUT", "/v1/vms/web1/suspect", &large))), wanted);

    let file = daemon.directory.path().join("body");
    std::fs::write(&file, &large).unwrap();
    let data = format!("@{}", file.display());
    let url = "http://vmflow/v1/vms/web1/suspect";
    let (answer, _) = curl(&daemon.control(), &["-i", "-X", "PUT", "--data-binary", &data, url]);
    assert!(answer.contains("413 Payload Too Large") && answer.contains(&wanted.1), "{answer}");
    assert!(daemon.tags.lock().unwrap().is_empty());
}

#[test]
fn a_header_without_end_is_refused() {
    let daemon = Daemon::usual();
    let mut stream = connect(&daemon.stats());
    let line = format!("X-Long: {}\r\n", "x".repeat(1000));
    // The socket holds all of it, so the write succeeds whether or not it is read.
    stream.write_all(format!("GET /v1/stats HTTP/1.1\r\n{}", line.repeat(40)).as_bytes()).unwrap();
    let mut answer = Vec::new();
    // Closing with bytes unread is told as a reset, after what was answered.
    let ended = stream.read_to_end(&mut answer);
    assert!(ended.is_ok() || ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    assert!(answer.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&answer));
}

#[test]
fn a_client_that_reads_nothing_is_cut_off_and_others_are_answered_meanwhile() {
    let mut many = numbered();
    many.vms = vec![many.vms[0].clone(); 2000];
    let limits = Limits { idle: Duration::from_secs(2), ..Limits::default() };
    let daemon = Daemon::start(many, limits);
    let mut slow = connect(&daemon.stats());
    slow.write_all(request("GET", "/v1/stats", "").as_bytes()).unwrap();
    wait_for(&slow, PollFlags::IN);
    assert!(raw(&daemon.stats(), &request("GET", "/v1/vms", "")).ends_with(VMS));

    wait_for(&slow, PollFlags::HUP);
    let got = rest(slow);
    let (head, body) = got.split_once("\r\n\r\n").unwrap();
    let (_, length) = head.split_once("content-length: ").unwrap();
    let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
    assert!(body.len() < length, "{} of {length} bytes", body.len());
    let whole = raw(&daemon.stats(), &request("GET", "/v1/stats", ""));
    assert_eq!(whole.split_once("\r\n\r\n").unwrap().1.len(), length);
}

/// Waits for a state of the connection.
fn wait_for(stream: &UnixStream, wanted: PollFlags) {
    let mut polled = [PollFd::new(stream, wanted)];
    let timeout = DEADLINE.try_into().unwrap();
    assert_eq!(poll(&mut polled, Some(&timeout)), Ok(1));
    assert!(polled[0].revents().contains(wanted), "{:?}", polled[0].revents());
}

#[test]
fn a_client_above_the_limit_waits_for_a_place() {
    let limits = Limits { clients: 2, idle: DEADLINE * 2, connection: DEADLINE * 4, ..Limits::default() };
    let daemon = Daemon::start(numbered(), limits);
    let (first, second) = (connect(&daemon.stats()), connect(&daemon.stats()));
    let mut third = connect(&daemon.stats());
    third.write_all(request("GET", "/v1/stats", "").as_bytes()).unwrap();
    // Places are per socket.
    assert!(raw(&daemon.control(), &request("GET", "/v1/stats", "")).ends_with(NUMBERED));
    let mut polled = [PollFd::new(&third, PollFlags::IN)];
    let while_full = Duration::from_millis(200).try_into().unwrap();
    assert_eq!(poll(&mut polled, Some(&while_full)), Ok(0), "both places are taken");
    drop(first);
    assert!(rest(third).ends_with(NUMBERED));
    drop(second);
}

#[test]
fn a_daemon_that_stops_lets_no_client_hang() {
    let mut daemon = Daemon::usual();
    let mut waiting = connect(&daemon.control());
    let head = "PUT /v1/vms/web1/suspect HTTP/1.1\r\nHost: vmflow\r\n\
                Content-Length: 9\r\nExpect: 100-continue\r\n\r\n";
    waiting.write_all(head.as_bytes()).unwrap();
    // It is being served now: the daemon asks for the body.
    wait_for(&waiting, PollFlags::IN);
    daemon.stop();
    assert_eq!(rest(waiting), "HTTP/1.1 100 Continue\r\n\r\n");
    let error = run(&daemon.control(), &Action::Vms { json: false }).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot connect to {}: No such file or directory: is `vmflow serve` running, \
             or is it elsewhere (--control PATH)?",
            daemon.control().display()
        )
    );
}

#[test]
fn the_client_prints_documents_as_they_came_and_tables() {
    let daemon = Daemon::usual();
    let stats = |vm: Option<&str>, json| {
        run(&daemon.control(), &Action::Stats { vm: vm.map(str::to_owned), json, watch: None })
    };
    assert_eq!(stats(None, true).unwrap(), NUMBERED);
    assert_eq!(stats(Some(VM), true).unwrap(), NUMBERED, "one VM of one is all");
    let table = stats(Some(VM), false).unwrap();
    assert!(
        table.starts_with("VM   DIRECTION FRAMES PACKETS BYTES SUSPECT DROPPED IN-FLIGHT TAP-OPS\n"),
        "{table}"
    );
    assert!(table.contains("\nledger: NOT balanced\n"), "numbers that count up balance nowhere: {table}");
    let error = stats(Some("web9"), false).unwrap_err();
    assert_eq!(error.to_string(), "no VM is called \"web9\": there are web1");

    assert_eq!(run(&daemon.control(), &Action::Vms { json: true }).unwrap(), VMS);
    let table = run(&daemon.control(), &Action::Vms { json: false }).unwrap();
    assert!(
        table.contains("\nweb1 1     no      -    vmf-web1 -     /run/vmflow/web1/net0.sock connecting\n"),
        "{table}"
    );
}

/// An output that takes a number of blocks and is then gone, as `head` is; it may do something after each.
struct Reader<F> {
    blocks: Vec<String>,
    wanted: usize,
    after: F,
}

impl<F: FnMut(usize)> Write for Reader<F> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.blocks.len() == self.wanted {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        self.blocks.push(String::from_utf8(bytes.to_vec()).unwrap());
        (self.after)(self.blocks.len());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn watched(control: &Path, json: bool, terminal: bool, after: impl FnMut(usize)) -> Vec<String> {
    let watch = Some(Duration::from_millis(100));
    let action = Action::Stats { vm: None, json, watch };
    let mut reader = Reader { blocks: Vec::new(), wanted: 3, after };
    runtime().block_on(client::run(control, &action, &mut reader, terminal)).unwrap();
    reader.blocks
}

#[test]
fn watching_shows_rates_until_the_reader_is_gone() {
    let daemon = Daemon::usual();
    let blocks = watched(&daemon.control(), false, false, |_| {});
    assert!(blocks[0].contains(" host1: rates from the next sample on\n"), "{}", blocks[0]);
    assert!(blocks[2].contains(" host1: rates over 0."), "{}", blocks[2]);
    assert!(blocks.iter().all(|block| block.ends_with("\n\n") && !block.contains('\x1b')));
    let screens = watched(&daemon.control(), false, true, |_| {});
    assert!(screens.iter().all(|screen| screen.starts_with("\x1b[H\x1b[2J20")), "{screens:?}");
    assert_eq!(watched(&daemon.control(), true, true, |_| {}), [NUMBERED; 3]);
}

#[test]
fn watching_outlives_the_daemon_once_it_has_begun() {
    let mut daemon = Daemon::usual();
    let control = daemon.control();
    let blocks = watched(&control, false, false, |block| {
        if block == 1 {
            daemon.stop();
        }
    });
    assert!(blocks[0].contains("FRAMES/S"));
    assert!(blocks[1].contains("Z cannot connect to ") && blocks[2].contains("is `vmflow serve` running"));
    let action = Action::Stats { vm: None, json: false, watch: Some(Duration::from_secs(1)) };
    assert!(matches!(run(&control, &action), Err(ClientError::Connect { .. })), "but it must begin");
    let action = Action::Stats { vm: None, json: false, watch: Some(Duration::ZERO) };
    assert!(matches!(run(&control, &action), Err(ClientError::Period(_))));
}

#[test]
fn who_may_not_open_the_control_socket_can_look_through_the_other() {
    let daemon = Daemon::usual();
    for (socket, mode) in [(daemon.control(), 0o000), (daemon.stats(), 0o666)] {
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let control = daemon.control();
    std::thread::spawn(move || {
        // Root opens everything, so this thread (and only it) becomes somebody else.
        let nobody = rustix::process::Uid::from_raw(65534);
        if rustix::process::geteuid().is_root() {
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        }
        let stats = runtime().block_on(client::fetch_stats(&control)).unwrap();
        assert_eq!(stats, numbered());
        let error = runtime().block_on(Client::new(&control).suspect(VM, "x")).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "cannot connect to {}: Permission denied: ask as root, or to look only, \
                 as a member of the socket's group",
                control.display()
            )
        );
    })
    .join()
    .unwrap();
}
