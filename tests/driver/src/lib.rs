//! A virtio-net driver over a vhost-user socket, without a VM.

pub mod mapping;
pub mod memory;
