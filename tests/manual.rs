//! Man pages and completions, as `vmflow generate` writes them: whole, well-formed and working.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where something unexpected happens")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

const VMFLOW: &str = env!("CARGO_BIN_EXE_vmflow");
/// Commands that are not for people.
const HIDDEN: [&str; 3] = ["keeper", "libvirt-hook", "generate"];

/// Everything that is generated.
fn generated() -> TempDir {
    let share = tempfile::tempdir().unwrap();
    let status = Command::new(VMFLOW).arg("generate").arg(share.path()).status().unwrap();
    assert!(status.success(), "{status}");
    share
}

/// Runs a command; gives what it printed, errors first.
fn said(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).env("LC_ALL", "C.UTF-8").env("MANWIDTH", "100").output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}: run qemu-scripts/setup"));
    String::from_utf8_lossy(&[output.stderr, output.stdout].concat()).into_owned()
}

fn pages(share: &Path) -> Vec<PathBuf> {
    let directories = ["man/man5", "man/man8"].map(|name| fs::read_dir(share.join(name)).unwrap());
    directories.into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

/// Subcommands as `--help` lists them, with theirs: each as the words that are typed.
fn subcommands() -> Vec<Vec<String>> {
    below(&[])
}

fn below(command: &[String]) -> Vec<Vec<String>> {
    let words: Vec<_> = command.iter().map(String::as_str).chain(["--help"]).collect();
    let help = said(VMFLOW, &words);
    let list =
        help.split("Commands:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).unwrap_or_default();
    let names = list.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help");
    let found = names.map(|name| [command, &[name.to_owned()]].concat());
    found.flat_map(|command| [vec![command.clone()], below(&command)].concat()).collect()
}

/// The long options that a text names.
fn options(text: &str) -> BTreeSet<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    text.split(|c| !is_part(c)).filter(|word| word.starts_with("--") && word.len() > 2).collect()
}

#[test]
fn the_pages_render_without_a_warning() {
    let share = generated();
    let pages = pages(share.path());
    assert_eq!(pages.len(), 2 + subcommands().len());
    for page in pages {
        let page = page.to_str().unwrap();
        let warnings = said("man", &["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page]);
        let (warnings, _) = warnings.split_once("x T utf8").unwrap_or_else(|| panic!("{page}: {warnings}"));
        assert_eq!(warnings, "", "man");
        assert_eq!(said("mandoc", &["-T", "lint", "-W", "warning", page]), "", "mandoc");
    }
}

#[test]
fn every_subcommand_has_a_page_with_its_options() {
    let share = generated();
    let main = said("man", &["-l", share.path().join("man/man8/vmflow.8").to_str().unwrap()]);
    for words in subcommands() {
        let name = words.join("-");
        let file = share.path().join(format!("man/man8/vmflow-{name}.8"));
        let page = said("man", &["-l", file.to_str().unwrap()]);
        let words: Vec<_> = words.iter().map(String::as_str).chain(["--help"]).collect();
        let help = said(VMFLOW, &words);
        let (in_help, in_page) = (options(&help), options(&page));
        assert!(in_help.is_subset(&in_page), "{name}: help {in_help:?}, page {in_page:?}");
        assert!(words.len() > 2 || main.contains(&format!("vmflow-{name}(8)")), "{name} in {main}");
    }
    for name in HIDDEN {
        assert!(!main.contains(name), "{name} in {main}");
    }
}

/// What bash would offer behind these words.
fn bash_offers(share: &Path, words: &str) -> Vec<String> {
    // What bash itself does: the words, the place of the last one, and the function that `complete` names.
    let script = "source \"$0\"; read -r -a COMP_WORDS <<<\"$1\"; [[ $1 != *' ' ]] || COMP_WORDS+=('')
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); [[ $(complete -p vmflow) =~ -F\\ ([^ ]+) ]] || exit 1
        \"${BASH_REMATCH[1]}\" vmflow \"${COMP_WORDS[-1]}\" \"${COMP_WORDS[-2]}\"; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let file = share.join("bash-completion/completions/vmflow");
    let output = Command::new("bash").args(["-c", script]).arg(file).arg(words).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_options_and_files() {
    let share = generated();
    let offers = |words| bash_offers(share.path(), words);
    assert_eq!(offers("vmflow susp"), ["suspect"]);
    assert_eq!(offers("vmflow serve --su"), ["--suspect-action"]);
    let config = share.path().join("conf.toml");
    fs::write(&config, "").unwrap();
    let typed = format!("vmflow check --config {}/con", share.path().display());
    assert_eq!(offers(&typed), [config.to_str().unwrap()]);
    let commands = offers("vmflow ");
    for words in subcommands().iter().filter(|words| words.len() == 1) {
        assert!(commands.contains(&words[0]), "{words:?} in {commands:?}");
    }
}

#[test]
fn no_shell_offers_what_is_hidden() {
    let share = generated();
    let files = [
        "bash-completion/completions/vmflow",
        "zsh/vendor-completions/_vmflow",
        "fish/vendor_completions.d/vmflow.fish",
    ];
    for file in files {
        let text = fs::read_to_string(share.path().join(file)).unwrap();
        assert!(text.contains("suspect"), "{file}");
        for name in HIDDEN {
            assert!(!text.contains(name), "{name} in {file}");
        }
    }
}

/// The keys of a table, as `vmflow check` names them to whoever writes a wrong one.
fn keys_of(table: &str) -> BTreeSet<String> {
    const WRONG: &str = "qqqqqqqqqqqqqqqq";
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vmflow.toml");
    fs::write(&file, table.replace('?', WRONG)).unwrap();
    let lines = said(VMFLOW, &["check", "--config", file.to_str().unwrap()]);
    let line = lines.lines().find(|line| line.contains(WRONG)).unwrap_or_else(|| panic!("{table}: {lines}"));
    let keys = line.split("known here: ").nth(1).unwrap_or_else(|| panic!("{line}"));
    keys.split(", ").map(str::to_owned).collect()
}

#[test]
fn the_configurations_page_has_every_key_and_no_other() {
    let tables = [
        ("", "? = 1"),
        ("The table [daemon]", "[daemon]\n? = 1"),
        ("The table [suspect]", "[suspect]\n? = 1"),
        ("The table [rules]", "[rules]\n? = 1"),
        ("Each table [[vm]]", "[[vm]]\n? = 1"),
        ("Each table [[vm.port]]", "[[vm]]\n[[vm.port]]\n? = 1"),
    ];
    let page = fs::read_to_string(generated().path().join("man/man5/vmflow.toml.5")).unwrap();
    for (heading, table) in tables {
        let keys = keys_of(table);
        if heading.is_empty() {
            for key in keys {
                assert!(page.contains(&format!("[{key}]")), "{key}");
            }
            continue;
        }
        let part = page.split(&format!(".Ss {heading}\n")).nth(1).unwrap_or_else(|| panic!("no {heading}"));
        let part = part.split("\n.S").next().unwrap();
        let items = part.lines().filter_map(|line| line.strip_prefix(".It Ic "));
        let described: BTreeSet<_> = items.flat_map(|item| item.split(" , ")).map(str::to_owned).collect();
        assert_eq!(described, keys, "{heading}");
    }
    assert!(
        keys_of("[[vm]]\n[[vm.port]]\npeer = { ? = 1 }")
            .iter()
            .all(|key| page.contains(&format!(".Ic {key} :")))
    );
}
