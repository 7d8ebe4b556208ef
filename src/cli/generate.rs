//! Man pages and shell completions, made from the command line itself and laid out as below `/usr/share`.
//!
//! ```text
//!   man/man8/vmflow.8, vmflow-serve.8, ..     one page for each subcommand
//!   man/man5/vmflow.toml.5                    the configuration, written by hand: src/dist/man
//!   bash-completion/completions/vmflow
//!   zsh/vendor-completions/_vmflow
//!   fish/vendor_completions.d/vmflow.fish
//! ```

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Command;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

/// The configuration's page.
const CONFIGURATION: &str = include_str!("../dist/man/vmflow.toml.5");
/// What the command line does not know about itself.
const MORE: &str = include_str!("../dist/man/vmflow.8.more");
const NAME: &str = env!("CARGO_PKG_NAME");
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// System administration tools and daemons.
const SECTION: &str = "8";
const MANUAL: &str = "vmflow manual";
/// When the pages changed in more than words.
const DATE: &str = "2026-11-25";

/// Writes everything below `share`, and makes the directories that are missing.
///
/// # Errors
/// What the system says about a file, with its path.
pub(super) fn write_all(command: &Command, share: &Path) -> io::Result<()> {
    let commands = directory(share, "man/man8")?;
    let mut whole = command.clone().disable_help_subcommand(true);
    whole.build();
    pages(&whole, MORE, &commands)?;
    write(&directory(share, "man/man5")?.join("vmflow.toml.5"), CONFIGURATION.as_bytes())?;
    complete(command, share)
}

/// A command's page, and those of its subcommands.
fn pages(command: &Command, more: &str, directory: &Path) -> io::Result<()> {
    page(command, more, directory)?;
    let mut shown = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    shown.try_for_each(|subcommand| pages(subcommand, "", directory))
}

/// One page: what is made of the command, and more.
fn page(command: &Command, more: &str, directory: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let man = Man::new(command.clone()).title(name.to_uppercase()).section(SECTION);
    let man = man.manual(MANUAL).source(format!("{NAME} {VERSION}")).date(DATE);
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.get_subcommands().any(|subcommand| !subcommand.is_hide_set()) {
        man.render_subcommands_section(&mut text)?;
    }
    text.write_all(more.as_bytes())?;
    write(&directory.join(format!("{name}.{SECTION}")), &text)
}

fn complete(command: &Command, share: &Path) -> io::Result<()> {
    let places = [
        (Shell::Bash, "bash-completion/completions", "vmflow"),
        (Shell::Zsh, "zsh/vendor-completions", "_vmflow"),
        (Shell::Fish, "fish/vendor_completions.d", "vmflow.fish"),
    ];
    for (shell, place, file) in places {
        let directory = directory(share, place)?;
        let written = generate_to(shell, &mut visible(command), NAME, &directory)?;
        fs::rename(&written, directory.join(file)).map_err(|error| at(&written, &error))?;
    }
    Ok(())
}

/// The command without what is hidden, which completions would offer all the same.
fn visible(command: &Command) -> Command {
    let shown = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    let whole = Command::new(NAME).version(VERSION).propagate_version(true);
    whole.args(command.get_arguments().cloned()).subcommands(shown.cloned())
}

/// A directory below `share`, made where it is missing.
fn directory(share: &Path, below: &str) -> io::Result<PathBuf> {
    let directory = share.join(below);
    fs::create_dir_all(&directory).map_err(|error| at(&directory, &error))?;
    Ok(directory)
}

fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    fs::write(path, text).map_err(|error| at(path, &error))
}

/// An error with its place.
fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
