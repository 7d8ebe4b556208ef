//! The client: what the subcommands of a running vmflow use.
//!
//! It asks the daemon through its control socket; where that may not be opened, through the stats socket beside
//! it, which is all that looking needs.

mod change;
pub mod doctor;
pub mod libvirt;
mod operate;
mod state;
pub mod table;
mod units;
pub mod watch;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::UnixStream, time::timeout};

use crate::{
    config,
    log::Directive,
    monitor::api::{
        ErrorDocument, Which,
        document::{Changes, Stats, VERSION, VmDocument, Vms},
        names,
    },
};

/// The stats socket's name, beside the control socket.
pub const STATS_SOCKET: &str = "stats.sock";

/// The time for a whole exchange: as long as the daemon may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The largest answer that is read, in bytes: some 100,000 ports.
const ANSWER_MAX: usize = 256 << 20;

/// Why the daemon's answer is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers at the socket, or we may not open it.
    #[error("cannot connect to {}: {reason}{hint}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        reason: String,
        /// What to do, after a colon; may be empty.
        hint: &'static str,
    },
    /// The daemon went away before it had answered, or speaks something else than HTTP.
    #[error("the connection to {} broke: {reason}", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
    /// The daemon takes too long.
    #[error("{} did not answer within {} s", .0.display(), PATIENCE.as_secs())]
    Late(PathBuf),
    /// The daemon says no, in its own words.
    #[error("{0}")]
    Refused(String),
    /// The daemon says that what was asked for is wrong in itself, in its own words: a line for each thing.
    #[error("{0}")]
    Invalid(String),
    /// The answer is not one that this client knows.
    #[error("{} answered something else than a document of version {VERSION}: {reason}", path.display())]
    Unreadable {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No VM has this name.
    #[error("no VM is called \"{name}\": {there}")]
    NoSuchVm {
        /// The name.
        name: String,
        /// The names that VMs have.
        there: String,
    },
    /// The period is too short.
    #[error("{0:?} is too short a time between two samples: at least {min:?}", min = watch::PERIOD_MIN)]
    Period(Duration),
    /// Not all is well: the output says what.
    #[error("not all is well")]
    Unwell,
    /// The output cannot be written.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

/// What a subcommand asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `vmflow vms`
    Vms {
        /// Print the document as it came.
        json: bool,
    },
    /// `vmflow stats [VM]`
    Stats {
        /// Only this VM.
        vm: Option<String>,
        /// Print the document as it came; with a VM, that VM's part of it.
        json: bool,
        /// Go on with a sample per period.
        watch: Option<Duration>,
    },
    /// `vmflow suspect VM --reason TEXT`
    Suspect {
        /// The VM's name.
        vm: String,
        /// Why.
        reason: String,
    },
    /// `vmflow clear VM`
    Clear {
        /// The VM's name.
        vm: String,
    },
    /// `vmflow add`
    Add(Box<config::Vm>),
    /// `vmflow remove`
    Remove(Which),
    /// `vmflow reload`
    Reload,
    /// `vmflow health`
    Health {
        /// Print the document as it came.
        json: bool,
    },
    /// `vmflow version`
    Version {
        /// Print the document as it came.
        json: bool,
    },
    /// `vmflow log-level [LEVEL]`
    LogLevel {
        /// What is wanted; none only shows it.
        level: Option<Directive>,
    },
}

/// Does what a subcommand asks for. Ends well when the reader of `out` goes away. To be called inside a tokio
/// runtime.
///
/// # Errors
/// [`ClientError`], whose text is one line.
pub async fn run(
    control: &Path,
    action: &Action,
    out: &mut impl Write,
    is_terminal: bool,
) -> Result<(), ClientError> {
    match perform(&Client::new(control), action, out, is_terminal).await {
        Err(ClientError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        ended => ended,
    }
}

async fn perform(
    client: &Client,
    action: &Action,
    out: &mut impl Write,
    is_terminal: bool,
) -> Result<(), ClientError> {
    let text = match action {
        Action::Vms { json: true } => client.vms_json().await?,
        Action::Vms { json: false } => table::vms_table(&client.vms().await?),
        Action::Stats { vm, json, watch: Some(period) } => {
            let watch = watch::Watch { vm: vm.as_deref(), period: *period, json: *json, is_terminal };
            return watch.run(client, out).await;
        }
        Action::Stats { vm, json: true, watch: None } => client.stats_json(vm.as_deref()).await?,
        Action::Stats { vm, json: false, watch: None } => {
            table::stats_table(&client.stats(vm.as_deref()).await?)
        }
        Action::Suspect { vm, reason } => in_force(&client.suspect(vm, reason).await?),
        Action::Clear { vm } => in_force(&client.clear(vm).await?),
        Action::Add(vm) => change::added(&client.add(vm).await?),
        Action::Remove(which) => change::removed(&client.remove(which).await?),
        Action::Reload => change::reloaded(&client.reload().await?),
        Action::Health { json } => return client.show_health(*json, out).await,
        Action::Version { json } => return client.show_version(*json, out).await,
        Action::LogLevel { level } => client.log_level(level.as_ref()).await?,
    };
    print(out, &text)
}

fn print(out: &mut impl Write, text: &str) -> Result<(), ClientError> {
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(ClientError::Output)
}

/// One line that says under which label a VM's frames are.
fn in_force(vm: &VmDocument) -> String {
    match &vm.tag {
        Some(tag) => format!(
            "{} is suspect since {} by {}: every frame carries label {}, suspect action \"{}\": {}\n",
            vm.name, tag.since, tag.by, vm.suspect_label, vm.suspect_action, tag.reason
        ),
        None => format!(
            "{} is not tagged: its frames carry label {} where no rule finds them suspect\n",
            vm.name, vm.label
        ),
    }
}

/// The statistics of all VMs.
///
/// # Errors
/// [`ClientError`], whose text is one line.
pub async fn fetch_stats(control: &Path) -> Result<Stats, ClientError> {
    Client::new(control).stats(None).await
}

/// The way to a daemon. It makes a connection for each request, as the daemon wants it.
#[derive(Clone, Debug)]
pub struct Client {
    control: PathBuf,
}

/// What the daemon answered.
#[derive(Debug)]
struct Answer {
    socket: PathBuf,
    status: StatusCode,
    body: Bytes,
}

impl Client {
    /// The daemon with this control socket.
    #[must_use]
    pub fn new(control: &Path) -> Self {
        Self { control: control.to_owned() }
    }

    /// The statistics, of all VMs or of one.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn stats(&self, vm: Option<&str>) -> Result<Stats, ClientError> {
        let mut stats: Stats = self.look("/v1/stats").await?.document()?;
        if let Some(name) = vm {
            if !stats.vms.iter().any(|vm| vm.name == name) {
                let there = names(stats.vms.iter().map(|vm| vm.name.as_str()));
                return Err(ClientError::NoSuchVm { name: name.to_owned(), there });
            }
            stats.vms.retain(|vm| vm.name == name);
        }
        Ok(stats)
    }

    /// The statistics as one line of JSON: as they came, or one VM's part.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn stats_json(&self, vm: Option<&str>) -> Result<String, ClientError> {
        if vm.is_none() {
            return self.look("/v1/stats").await?.text();
        }
        let stats = self.stats(vm).await?;
        let unreadable = |error: serde_json::Error| ClientError::Unreadable {
            path: self.control.clone(),
            reason: error.to_string(),
        };
        Ok(serde_json::to_string(&stats).map_err(unreadable)? + "\n")
    }

    /// The VMs.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn vms(&self) -> Result<Vms, ClientError> {
        self.look("/v1/vms").await?.document()
    }

    /// The VMs as one line of JSON, as it came.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn vms_json(&self) -> Result<String, ClientError> {
        self.look("/v1/vms").await?.text()
    }

    /// Puts every frame of a VM under its suspect label.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn suspect(&self, vm: &str, reason: &str) -> Result<VmDocument, ClientError> {
        let body = serde_json::json!({ "reason": reason }).to_string();
        self.change(Method::PUT, vm, body).await
    }

    /// Takes the tag off a VM.
    ///
    /// # Errors
    /// [`ClientError`], whose text is one line.
    pub async fn clear(&self, vm: &str) -> Result<VmDocument, ClientError> {
        self.change(Method::DELETE, vm, String::new()).await
    }

    /// Asks where we may.
    async fn look(&self, path: &str) -> Result<Answer, ClientError> {
        let (socket, stream) = self.reach().await;
        exchange(socket, stream, Method::GET, path, String::new()).await
    }

    /// The socket at which we may look.
    async fn reach(&self) -> (PathBuf, io::Result<UnixStream>) {
        match UnixStream::connect(&self.control).await {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let beside = self.control.with_file_name(STATS_SOCKET);
                let stream = UnixStream::connect(&beside).await;
                (beside, stream)
            }
            stream => (self.control.clone(), stream),
        }
    }

    async fn change(&self, method: Method, vm: &str, body: String) -> Result<VmDocument, ClientError> {
        let path = format!("/v1/vms/{}/suspect", path_segment(vm));
        self.request(method, &path, body).await?.part()
    }
}

impl Answer {
    fn text(&self) -> Result<String, ClientError> {
        std::str::from_utf8(&self.body).map(str::to_owned).map_err(|error| self.unreadable(&error))
    }

    fn document<T: DeserializeOwned + Versioned>(&self) -> Result<T, ClientError> {
        let document: T = serde_json::from_slice(&self.body).map_err(|error| self.unreadable(&error))?;
        match document.version() {
            VERSION => Ok(document),
            other => Err(self.unreadable(&format!("it has version {other}"))),
        }
    }

    /// A part of a document, which says no version.
    fn part<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_slice(&self.body).map_err(|error| self.unreadable(&error))
    }

    fn unreadable(&self, reason: &impl ToString) -> ClientError {
        ClientError::Unreadable { path: self.socket.clone(), reason: reason.to_string() }
    }
}

/// A document that says its version.
trait Versioned {
    fn version(&self) -> u32;
}

impl Versioned for Stats {
    fn version(&self) -> u32 {
        self.version
    }
}

impl Versioned for Changes {
    fn version(&self) -> u32 {
        self.version
    }
}

impl Versioned for Vms {
    fn version(&self) -> u32 {
        self.version
    }
}

/// One request and its answer.
async fn exchange(
    socket: PathBuf,
    stream: io::Result<UnixStream>,
    method: Method,
    path: &str,
    body: String,
) -> Result<Answer, ClientError> {
    let (status, answer) = converse(socket, stream, method, path, body).await?;
    if status.is_success() {
        return Ok(answer);
    }
    let said = match serde_json::from_slice::<ErrorDocument>(&answer.body) {
        Ok(document) => document.error,
        Err(_) => format!("{} answered {status}", answer.socket.display()),
    };
    Err(if status == StatusCode::BAD_REQUEST {
        ClientError::Invalid(said)
    } else {
        ClientError::Refused(said)
    })
}

/// One request and its answer, whatever its status.
async fn converse(
    socket: PathBuf,
    stream: io::Result<UnixStream>,
    method: Method,
    path: &str,
    body: String,
) -> Result<(StatusCode, Answer), ClientError> {
    let stream = stream.map_err(|error| unconnected(&socket, &error))?;
    let broken =
        |reason: &dyn ToString| ClientError::Broken { path: socket.clone(), reason: reason.to_string() };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "vmflow")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| broken(&error))?;
    let answered = timeout(PATIENCE, send(stream, request)).await;
    let answered = answered.map_err(|_| ClientError::Late(socket.clone()))?;
    let (status, body) = answered.map_err(|error| broken(&error))?;
    Ok((status, Answer { socket, status, body }))
}

/// Sends a request and reads its answer to the end.
async fn send(
    stream: UnixStream,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await?.to_bytes();
        // The connection ends when nobody can send on it any more.
        drop(sender);
        Ok((status, body))
    };
    let (answered, _) = tokio::join!(exchange, connection);
    answered
}

/// Why there is no connection, and what to do.
fn unconnected(socket: &Path, error: &io::Error) -> ClientError {
    let hint = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ": is `vmflow serve` running, or is it elsewhere (--control PATH)?"
        }
        io::ErrorKind::PermissionDenied => {
            ": ask as root, or to look only, as a member of the socket's group"
        }
        io::ErrorKind::WouldBlock => ": too many clients wait there",
        _ => "",
    };
    ClientError::Connect { path: socket.to_owned(), reason: plain(error), hint }
}

/// The system's words without the number that the standard library adds.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error ") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

/// A name as a part of a path: what could mean something else there is percent-encoded.
fn path_segment(name: &str) -> String {
    let only_dots = name.bytes().all(|byte| byte == b'.');
    let encoded = name.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => char::from(byte).to_string(),
        b'.' if !only_dots => ".".to_owned(),
        _ => format!("%{byte:02X}"),
    });
    encoded.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_part_of_the_path() {
        assert_eq!(path_segment("web-1.example_2"), "web-1.example_2");
        assert_eq!(path_segment("../a b?#%"), "..%2Fa%20b%3F%23%25");
        assert_eq!(path_segment(".."), "%2E%2E");
        assert_eq!(path_segment("ä"), "%C3%A4");
    }

    #[test]
    fn a_missing_daemon_is_one_line_that_says_what_to_do() {
        let error = unconnected(Path::new("/run/vmflow/control.sock"), &io::Error::from_raw_os_error(2));
        assert_eq!(
            error.to_string(),
            "cannot connect to /run/vmflow/control.sock: No such file or directory: \
             is `vmflow serve` running, or is it elsewhere (--control PATH)?"
        );
    }
}
