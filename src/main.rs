//! The `vmflow` command.
fn main() {}
