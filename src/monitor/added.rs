//! VMs that were added while running, on disk: each in a file of its own below the state directory, written as
//! in `vms.d` and read like one at the next start.
//!
//! ```text
//!   vms.d/web3.toml        the VM
//!   vms.d/.web3.toml.new   the next one, until it is whole
//! ```

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// The directory and its files are their user's only.
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// A VM's file could not be written or removed.
#[derive(Debug, thiserror::Error)]
#[error("{path}: cannot {what}: {reason}", path = path.display())]
pub struct AddedError {
    path: PathBuf,
    what: &'static str,
    reason: io::Error,
}

fn failed(path: &Path, what: &'static str) -> impl Fn(io::Error) -> AddedError {
    move |reason| AddedError { path: path.to_owned(), what, reason }
}

/// Writes a VM's file in one step: after a crash it is there as a whole, or not at all.
///
/// # Errors
/// [`AddedError`]; the file is not there then.
pub fn keep(file: &Path, text: &str) -> Result<(), AddedError> {
    let dir = file.parent().unwrap_or(Path::new("/"));
    match DirBuilder::new().mode(DIR_MODE).create(dir) {
        Ok(()) => sync(dir.parent().unwrap_or(dir))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(dir, "make it")(error)),
    }
    let next = hidden(file);
    let mut options = OpenOptions::new();
    let opened = options.write(true).create(true).truncate(true).mode(FILE_MODE).open(&next);
    let mut new = opened.map_err(failed(&next, "write it"))?;
    new.write_all(text.as_bytes()).and_then(|()| new.sync_all()).map_err(failed(&next, "write it"))?;
    fs::rename(&next, file).map_err(failed(&next, "rename it"))?;
    sync(dir)
}

/// Removes a VM's file.
///
/// # Errors
/// [`AddedError`]; the file is still there then.
pub fn forget(file: &Path) -> Result<(), AddedError> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(file, "remove it")(error)),
        _ => sync(file.parent().unwrap_or(Path::new("/"))),
    }
}

fn hidden(file: &Path) -> PathBuf {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    file.with_file_name(format!(".{name}.new"))
}

fn sync(dir: &Path) -> Result<(), AddedError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed(dir, "sync it"))
}
