//! What `vmflow check` says about a configuration without a fault.

use std::io::Write;

use super::CliError;
use crate::config::{Config, Port, Vm};

/// Says what a valid configuration comes to.
pub(super) fn tell(config: &Config, out: &mut impl Write) -> Result<(), CliError> {
    for vm in &config.vms {
        writeln!(out, "{}", summary(vm))?;
    }
    let ports = config.vms.iter().map(|vm| vm.ports.len()).sum();
    let pinned = config.vms.iter().filter(|vm| vm.label.is_some()).count();
    writeln!(
        out,
        "OK: {}, {}, {} pinned",
        count(config.vms.len(), "VM"),
        count(ports, "port"),
        count(pinned, "label")
    )?;
    Ok(out.flush()?)
}

fn summary(vm: &Vm) -> String {
    let label = vm.label.map_or("label not pinned".to_owned(), |label| format!("label {label}"));
    let ports: Vec<_> = vm.ports.iter().map(port).collect();
    format!("{}: {label}, {}", vm.name, ports.join(", "))
}

fn port(port: &Port) -> String {
    let place = format!("{} at {}", port.tap, port.socket.display());
    if port.queue_pairs == 1 {
        place
    } else {
        format!("{place} with {}", count(port.queue_pairs.into(), "queue pair"))
    }
}

/// A number of things, in words.
pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
