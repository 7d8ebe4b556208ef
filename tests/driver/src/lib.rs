//! A virtio-net driver over a vhost-user socket.
