//! Values that are valid by their type: a MAC address, a tap's name, a network namespace, a socket's path.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
    str::FromStr,
};

use super::error::ConfigError;

/// Where `ip netns` keeps the namespaces that have names.
const NETNS_DIR: &str = "/run/netns";
/// Longest name of a network interface: IFNAMSIZ less the zero byte.
const TAP_NAME_MAX: usize = 15;
/// Longest path of a socket: `sun_path` less the zero byte.
const SOCKET_PATH_MAX: usize = 107;
/// Longest name of a file.
const FILE_NAME_MAX: usize = 255;
/// Longest name of a VM: it becomes a directory, a label in metrics and a part of a process's name.
const VM_NAME_MAX: usize = 63;
/// Longest name of this host in records.
const NODE_NAME_MAX: usize = 253;
/// The permission bits of a file.
const PERMISSION_BITS: u32 = 0o777;

fn bad<T>(what: &'static str, value: &str, why: &'static str) -> Result<T, ConfigError> {
    Err(ConfigError::BadValue { what, value: value.to_owned(), why })
}

/// An Ethernet address that a VM's interface can have: unicast and not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac([u8; Mac::LEN]);

impl Mac {
    /// Bytes in an Ethernet address.
    pub const LEN: usize = 6;
    /// The bit of the first byte that marks a group of receivers (IEEE 802-2014, 8.2.2).
    const GROUP_BIT: u8 = 1;

    /// The bytes in the order of the wire.
    #[must_use]
    pub const fn bytes(self) -> [u8; Self::LEN] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        const FORM: &str = "is not six pairs of hex digits with colons, as 52:54:00:12:34:56";
        let mut bytes = [0; Self::LEN];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            match parts.next().map(|part| (part, u8::from_str_radix(part, 16))) {
                // from_str_radix also takes a sign, and one digit.
                Some((part, Ok(value))) if part.len() == 2 && !part.starts_with('+') => *byte = value,
                _ => return bad("MAC address", text, FORM),
            }
        }
        if parts.next().is_some() {
            return bad("MAC address", text, FORM);
        }
        if bytes[0] & Self::GROUP_BIT != 0 {
            return bad("MAC address", text, "is a group address: make the second digit even");
        }
        if bytes == [0; Self::LEN] {
            return bad("MAC address", text, "is all zero: give a real one, or leave mac out");
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, byte) in self.0.iter().enumerate() {
            let separator = if n == 0 { "" } else { ":" };
            write!(f, "{separator}{byte:02x}")?;
        }
        Ok(())
    }
}

/// A name that the kernel takes for a network interface, and does not change.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TapName(String);

impl TapName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Checks the name of a `what`: the kernel's rule for all interfaces.
    pub(super) fn parse(what: &'static str, text: &str) -> Result<Self, ConfigError> {
        if text.is_empty() || text.len() > TAP_NAME_MAX {
            return bad(what, text, "is not 1 to 15 bytes long: choose another name");
        }
        if text == "." || text == ".." {
            return bad(what, text, "is a directory's name: choose another name");
        }
        // The kernel refuses '/', ':' and white space, and replaces "%d" by a number of its choice.
        if text.bytes().any(|b| !b.is_ascii_graphic() || b"/:%".contains(&b)) {
            return bad(
                what,
                text,
                "has a character that an interface's name cannot have: use letters, digits, \"-\", \"_\" and \".\"",
            );
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for TapName {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::parse("tap name", text)
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A network namespace, by the file that holds it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetNs(PathBuf);

impl NetNs {
    /// The file that holds the namespace.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl FromStr for NetNs {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if text.starts_with('/') {
            return absolute("netns", text).map(Self);
        }
        let is_name = !text.is_empty() && text.len() <= FILE_NAME_MAX && text != "." && text != "..";
        if !is_name || text.chars().any(|c| c == '/' || c.is_control() || c.is_whitespace()) {
            return bad("netns", text, "is neither a name under /run/netns nor an absolute path");
        }
        Ok(Self(Path::new(NETNS_DIR).join(text)))
    }
}

/// The short name where the namespace has one, else the path.
impl fmt::Display for NetNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.strip_prefix(NETNS_DIR).unwrap_or(&self.0).display().fmt(f)
    }
}

/// Who makes a port's socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// vmflow listens, the front end connects.
    #[default]
    Server,
    /// The front end listens, vmflow connects.
    Client,
}

impl Mode {
    /// The word in the configuration and in documents.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

impl FromStr for Mode {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        [Self::Server, Self::Client]
            .into_iter()
            .find(|mode| mode.name() == text)
            .map_or_else(|| bad("mode", text, "is not \"server\" or \"client\""), Ok)
    }
}

/// An absolute path without "..": two spellings of one path come out the same.
pub(super) fn absolute(what: &'static str, text: &str) -> Result<PathBuf, ConfigError> {
    let path = Path::new(text);
    if text.chars().any(char::is_control) {
        return bad(what, text, "has a control character: choose another path");
    }
    if !path.is_absolute() {
        return bad(what, text, "is not an absolute path: begin it with \"/\"");
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return bad(what, text, "has \"..\" in it: write the path without");
    }
    Ok(path.components().collect())
}

/// A path that a socket can have.
pub(super) fn socket_path(what: &'static str, text: &str) -> Result<PathBuf, ConfigError> {
    let path = absolute(what, text)?;
    if text.len() > SOCKET_PATH_MAX {
        return bad(what, text, "is longer than 107 bytes, the most that a socket's path can have");
    }
    if path.file_name().is_none() || text.ends_with('/') {
        return bad(what, text, "is a directory: name the socket in it");
    }
    Ok(path)
}

/// The name of a VM.
///
/// # Errors
/// [`ConfigError::BadValue`] for what cannot be a directory's name or would look like an option.
pub fn vm_name(text: &str) -> Result<String, ConfigError> {
    if text.is_empty() || text.len() > VM_NAME_MAX {
        return bad("VM name", text, "is not 1 to 63 characters long: choose another name");
    }
    if text.starts_with(['.', '-']) {
        return bad("VM name", text, "begins with a dot or a dash: choose another name");
    }
    if text.bytes().any(|b| !b.is_ascii_alphanumeric() && !b"._-".contains(&b)) {
        return bad("VM name", text, "has other characters than letters, digits, \".\", \"_\" and \"-\"");
    }
    Ok(text.to_owned())
}

/// The name of this host in records.
pub(super) fn node_name(text: &str) -> Result<String, ConfigError> {
    if text.is_empty() || text.len() > NODE_NAME_MAX {
        return bad("node name", text, "is not 1 to 253 bytes long: set \"node\" under [daemon]");
    }
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return bad("node name", text, "has white space or control characters: set \"node\" under [daemon]");
    }
    Ok(text.to_owned())
}

/// The permissions of a socket, in the octal digits that chmod takes.
pub(super) fn socket_mode(text: &str) -> Result<u32, ConfigError> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match u32::from_str_radix(text, 8) {
        Ok(mode) if digits && mode <= PERMISSION_BITS => Ok(mode),
        _ => bad("socket_mode", text, "is not three octal digits, as \"0660\""),
    }
}

/// A VM's UUID.
pub(super) fn vm_uuid(text: &str) -> Result<uuid::Uuid, ConfigError> {
    match uuid::Uuid::try_parse(text) {
        Ok(uuid) if !uuid.is_nil() => Ok(uuid),
        Ok(_) => bad("UUID", text, "is all zero, which names no VM: leave uuid out"),
        Err(_) => bad("UUID", text, "is no UUID, as 1f3a7c52-9d0e-4b6a-8c11-5e2d7f904ab3"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_is_six_pairs_and_no_group_and_not_zero() {
        let mac: Mac = "52:54:00:AB:cd:ef".parse().unwrap();
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
        for wrong in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:+6", "5:54:00:12:34:56"] {
            assert!(wrong.parse::<Mac>().unwrap_err().to_string().contains("six pairs"), "{wrong}");
        }
        assert!("01:00:5e:00:00:01".parse::<Mac>().unwrap_err().to_string().contains("group"));
        assert!("00:00:00:00:00:00".parse::<Mac>().unwrap_err().to_string().contains("all zero"));
    }

    #[test]
    fn a_tap_name_is_one_that_the_kernel_takes_unchanged() {
        for good in ["t", "vmf-web1", "fifteen-bytes-x", "a.b"] {
            assert_eq!(good.parse::<TapName>().unwrap().as_str(), good);
        }
        for wrong in ["", "sixteen-bytes-xx", ".", "..", "a/b", "a b", "a:1", "tap%d", "a\0", "é"] {
            assert!(wrong.parse::<TapName>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_netns_is_a_name_or_a_path_and_both_spellings_are_one() {
        let named: NetNs = "web1".parse().unwrap();
        assert_eq!(named.path(), Path::new("/run/netns/web1"));
        assert_eq!(named, "/run/netns//web1".parse().unwrap());
        assert_eq!(named.to_string(), "web1");
        assert_eq!("/proc/7/ns/net".parse::<NetNs>().unwrap().to_string(), "/proc/7/ns/net");
        for wrong in ["", ".", "..", "a/b", "a b", "/run/../x"] {
            assert!(wrong.parse::<NetNs>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_socket_path_has_room_for_the_zero_byte() {
        let longest = format!("/{}", "s".repeat(SOCKET_PATH_MAX - 1));
        assert!(socket_path("socket", &longest).is_ok());
        assert!(socket_path("socket", &format!("{longest}s")).is_err());
        assert_eq!(socket_path("socket", "/run//a/./s").unwrap(), Path::new("/run/a/s"));
        for wrong in ["run/s", "/", "/run/", "/run/../s", "/run/s\0", ""] {
            assert!(socket_path("socket", wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_vm_name_can_be_a_directory_and_no_option() {
        for good in ["web1", "Web_1.example-x", "7"] {
            assert!(vm_name(good).is_ok(), "{good}");
        }
        assert!(vm_name(&"n".repeat(VM_NAME_MAX)).is_ok() && vm_name(&"n".repeat(VM_NAME_MAX + 1)).is_err());
        for wrong in ["", ".x", "-x", "a/b", "a b", "ä"] {
            assert!(vm_name(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_socket_mode_is_octal_and_nothing_above_the_permission_bits() {
        assert_eq!(socket_mode("0660").unwrap(), 0o660);
        assert_eq!(socket_mode("600").unwrap(), 0o600);
        for wrong in ["", "0o660", "1777", "668", "+60"] {
            assert!(socket_mode(wrong).is_err(), "{wrong:?}");
        }
    }
}
