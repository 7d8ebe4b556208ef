//! Users and groups by number or by name.
//!
//! Names are looked up in the two files and nowhere else: a lookup through NSS would load foreign code into
//! a process with rights. Whoever keeps users elsewhere writes the number.

use std::fs;

use super::{error::ConfigError, loose::LooseId};

/// The number that chown and setuid take for "leave as it is": never a user or group.
const NO_ID: u32 = u32::MAX;

/// Which of the two tables.
#[derive(Clone, Copy)]
pub(super) struct Table {
    kind: &'static str,
    path: &'static str,
}

/// Users: `name:password:uid:...`
pub(super) const USERS: Table = Table { kind: "user", path: "/etc/passwd" };
/// Groups: `name:password:gid:...`
pub(super) const GROUPS: Table = Table { kind: "group", path: "/etc/group" };

impl Table {
    /// The number of what was written.
    pub(super) fn number_of(self, written: &LooseId) -> Result<u32, ConfigError> {
        match written {
            LooseId::Number(number) => {
                u32::try_from(*number).ok().filter(|&id| id != NO_ID).ok_or(ConfigError::OutOfRange {
                    what: if self.kind == USERS.kind { "uid" } else { "gid" },
                    value: *number,
                    min: 0,
                    max: i64::from(NO_ID - 1),
                })
            }
            LooseId::Name(name) => self.look_up(name),
        }
    }

    fn look_up(self, name: &str) -> Result<u32, ConfigError> {
        let table = fs::read(self.path).map_err(|error| ConfigError::Unreadable {
            what: format!("{}: {error}", self.path),
            advice: "give the number instead of the name",
        })?;
        // As chown does: a name first, then a number.
        find(&table, name)
            .or_else(|| name.parse().ok())
            .filter(|&id| id != NO_ID)
            .ok_or_else(|| ConfigError::Unknown { kind: self.kind, name: name.to_owned(), table: self.path })
    }
}

/// The third field of the line whose first field is this name.
fn find(table: &[u8], name: &str) -> Option<u32> {
    table.split(|&byte| byte == b'\n').find_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        (fields.next()? == name.as_bytes() && !name.is_empty())
            .then(|| fields.nth(1))?
            .and_then(|id| std::str::from_utf8(id).ok()?.parse().ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_by_its_whole_first_field() {
        let table = b"root:x:0:0:root:/root:/bin/sh\n\xff:x:3:\nqemu:x:64055:64055::/:\nbroken\n+::::\n";
        assert_eq!(find(table, "root"), Some(0));
        assert_eq!(find(table, "qemu"), Some(64055));
        for absent in ["roo", "qemu:x", "broken", "", "+", "x"] {
            assert_eq!(find(table, absent), None, "{absent:?}");
        }
    }

    #[test]
    fn the_number_that_means_nobody_is_refused() {
        assert_eq!(USERS.number_of(&LooseId::Number(1000)).unwrap(), 1000);
        assert!(USERS.number_of(&LooseId::Number(-1)).is_err());
        assert!(GROUPS.number_of(&LooseId::Number(i64::from(NO_ID))).is_err());
        assert!(USERS.number_of(&LooseId::Name("4294967295".into())).is_err());
        assert_eq!(USERS.number_of(&LooseId::Name("root".into())).unwrap(), 0);
        assert_eq!(
            GROUPS.number_of(&LooseId::Name("no-such-group".into())).unwrap_err().to_string(),
            "no group \"no-such-group\" in /etc/group: create it, or give the number"
        );
    }
}
