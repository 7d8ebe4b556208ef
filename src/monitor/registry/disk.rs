//! The state directory: its lock, and the book in one file of JSON.
//!
//! ```text
//!   lock               held as long as the registry is open, with the holder's process id in it
//!   registry.json      { "format": "vmflow-registry", "version": 1, "vms": [ {"label": 1, ...}, ... ] }
//!   registry.json.new  the next one, until it is whole
//! ```

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    book::{Book, Entry, Tag},
    error::RegistryError,
};
use crate::{config, label::Label};

const LOCK: &str = "lock";
const REGISTRY: &str = "registry.json";
const NEXT: &str = "registry.json.new";
/// What the next version of a file has behind its name, until it is whole.
const NEW: &str = ".new";
/// What every directory at the top of a file system may hold.
const LOST_AND_FOUND: &str = "lost+found";
const FORMAT: &str = "vmflow-registry";
const VERSION: u64 = 1;
/// The directory is its user's only.
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
const WRITABLE_BY_OTHERS: u32 = 0o022;
const ROOT: u32 = 0;

/// What tells the format, whatever else is there.
#[derive(Deserialize)]
struct Header {
    format: String,
    version: u64,
}

/// The file as it is.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    format: String,
    version: u64,
    vms: Vec<Row>,
}

/// A label's line in the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    label: u32,
    name: String,
    uuid: Option<Uuid>,
    generation: u32,
    retired: bool,
    suspect: Option<Tag>,
}

/// The state directory, locked.
#[derive(Debug)]
pub(super) struct StateDir {
    path: PathBuf,
    /// The lock ends with this descriptor.
    _lock: File,
}

impl StateDir {
    /// Makes the directory if need be, and locks it.
    pub(super) fn open(path: &Path) -> Result<Self, RegistryError> {
        make_dir(path)?;
        refuse_exposed(path)?;
        Ok(Self { path: path.to_owned(), _lock: lock(path)? })
    }

    /// The book of the directory; an empty one, already saved, if the directory is new.
    pub(super) fn read(&self) -> Result<Book, RegistryError> {
        let file = self.path.join(REGISTRY);
        match fs::read(&file) {
            Ok(bytes) => parse(&file, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(found) = self.other_state()? {
                    return Err(RegistryError::Missing { path: file, found });
                }
                let book = Book::default();
                self.save(&book)?;
                Ok(book)
            }
            Err(reason) => Err(RegistryError::Unreadable { path: file, reason }),
        }
    }

    /// A file that only a vmflow with labels can have left here.
    fn other_state(&self) -> Result<Option<String>, RegistryError> {
        let entries = fs::read_dir(&self.path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = entries.map_err(failed(&self.path, "list it"))?;
        let names = entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let foreign =
            |name: &String| ![LOCK, NEXT, LOST_AND_FOUND].contains(&name.as_str()) && !name.starts_with('.');
        Ok(names.filter(foreign).min())
    }

    /// Replaces the file in one step: whoever reads it, after a crash as well, finds the old or the new book.
    pub(super) fn save(&self, book: &Book) -> Result<(), RegistryError> {
        let file = self.path.join(REGISTRY);
        let bytes = serde_json::to_vec_pretty(&Page::of(book))
            .map_err(|error| failed(&file, "write it")(error.into()))?;
        replace(&file, &bytes)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Replaces a file of the state directory in one step: whoever reads it, after a crash or a power cut as well,
/// finds all of the old or all of the new one. The next one is written beside it, as `NAME.new`.
pub(in crate::monitor) fn replace(path: &Path, bytes: &[u8]) -> Result<(), RegistryError> {
    let mut next = path.as_os_str().to_owned();
    next.push(NEW);
    let next = PathBuf::from(next);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE_MODE)
        .open(&next)
        .map_err(failed(&next, "write it"))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed(&next, "write it"))?;
    fs::rename(&next, path).map_err(failed(&next, "rename it"))?;
    path.parent().map_or(Ok(()), sync_dir)
}

impl Page {
    fn of(book: &Book) -> Self {
        let row = |(label, entry): (Label, &Entry)| {
            let Entry { name, uuid, generation, retired, suspect } = entry.clone();
            Row { label: label.get(), name, uuid, generation, retired, suspect }
        };
        Self { format: FORMAT.to_owned(), version: VERSION, vms: book.entries().map(row).collect() }
    }

    /// The book, or what is wrong with the page.
    fn strict(self) -> Result<Book, String> {
        let mut book = Book::default();
        for Row { label, name, uuid, generation, retired, suspect } in self.vms {
            let label = Label::new(label).map_err(|error| error.to_string())?;
            let name = config::vm_name(&name).map_err(|error| error.to_string())?;
            if !book.write(label, Entry { name, uuid, generation, retired, suspect }) {
                return Err(format!("label {label} is there twice"));
            }
        }
        book.broken_rule().map_or(Ok(book), Err)
    }
}

fn parse(file: &Path, bytes: &[u8]) -> Result<Book, RegistryError> {
    let damaged = |why: String| RegistryError::Damaged { path: file.to_owned(), why };
    match version(bytes, FORMAT) {
        Ok(VERSION) => {}
        Ok(found) => {
            return Err(RegistryError::OtherVersion { path: file.to_owned(), found, known: VERSION });
        }
        Err(why) => return Err(damaged(why)),
    }
    let page: Page = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
    page.strict().map_err(damaged)
}

/// The version of a file that says its format; or what is wrong with its head.
pub(in crate::monitor) fn version(bytes: &[u8], format: &str) -> Result<u64, String> {
    let header: Header = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if header.format != format {
        return Err(format!("its format is {:?}, not {format:?}", header.format));
    }
    Ok(header.version)
}

/// An error of the kernel with what was tried.
fn failed(path: &Path, what: &'static str) -> impl Fn(io::Error) -> RegistryError {
    move |reason| RegistryError::Io { path: path.to_owned(), what, reason }
}

fn make_dir(path: &Path) -> Result<(), RegistryError> {
    match DirBuilder::new().mode(DIR_MODE).create(path) {
        Ok(()) => path.parent().map_or(Ok(()), sync_dir),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(reason) => {
            let what = "create it (its parent must exist)";
            Err(RegistryError::Io { path: path.to_owned(), what, reason })
        }
    }
}

/// Whoever can change the labels could give one VM's past to another.
fn refuse_exposed(path: &Path) -> Result<(), RegistryError> {
    let found = fs::metadata(path).map_err(failed(path, "look at it"))?;
    let exposed = |why| Err(RegistryError::Exposed { path: path.to_owned(), why });
    if !found.is_dir() {
        return Err(failed(path, "use it")(io::ErrorKind::NotADirectory.into()));
    }
    if found.uid() != ROOT && found.uid() != rustix::process::geteuid().as_raw() {
        return exposed("belongs to another user");
    }
    if found.mode() & WRITABLE_BY_OTHERS != 0 {
        return exposed("others can write to it");
    }
    Ok(())
}

fn lock(dir: &Path) -> Result<File, RegistryError> {
    let path = dir.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .open(&path)
        .map_err(failed(&path, "open it"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {
            let write = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            write.map_err(failed(&path, "write it"))?;
            Ok(file)
        }
        Err(Errno::WOULDBLOCK) => Err(RegistryError::InUse { path: dir.to_owned(), holder: holder(&path) }),
        Err(errno) => Err(failed(&path, "lock it")(errno.into())),
    }
}

/// Who holds the lock, if that can be read.
fn holder(lock: &Path) -> String {
    let written = fs::read_to_string(lock).unwrap_or_default();
    written.trim().parse::<u32>().map_or_else(|_| String::new(), |id| format!(" (process {id})"))
}

fn sync_dir(path: &Path) -> Result<(), RegistryError> {
    // The parent of a relative name is "".
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path).and_then(|dir| dir.sync_all()).map_err(failed(path, "sync it"))
}
