//! The features that a port offers: virtio bits (virtio 1.2, 5.1.3 and 6) and vhost-user protocol bits.

use virtio_bindings::{virtio_config, virtio_net, virtio_ring};

/// Declares feature bits as masks.
macro_rules! bits {
    ($($(#[$doc:meta])* $name:ident = $bit:expr;)*) => {
        $($(#[$doc])* pub const $name: u64 = 1 << $bit;)*
    };
}

bits! {
    /// Bit 30, vhost-user's own: there are protocol features.
    PROTOCOL_FEATURES = 30;
    /// The device has a MAC address of its own.
    MAC = virtio_net::VIRTIO_NET_F_MAC;
    /// Receive buffers can be merged.
    MRG_RXBUF = virtio_net::VIRTIO_NET_F_MRG_RXBUF;
    /// The 1.0 device: 12-byte virtio-net header, little endian.
    VERSION_1 = virtio_config::VIRTIO_F_VERSION_1;
    /// Events at an index: `used_event` and `avail_event`.
    EVENT_IDX = virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    /// There is a control queue. It stays with the VMM: we never see it.
    CTRL_VQ = virtio_net::VIRTIO_NET_F_CTRL_VQ;
    /// More than one queue pair.
    MQ = virtio_net::VIRTIO_NET_F_MQ;
    /// The guest can announce itself; needs the control queue.
    GUEST_ANNOUNCE = virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE;
    /// The guest takes frames without a checksum.
    GUEST_CSUM = virtio_net::VIRTIO_NET_F_GUEST_CSUM;
    /// The guest takes TCP over IPv4 unsegmented.
    GUEST_TSO4 = virtio_net::VIRTIO_NET_F_GUEST_TSO4;
    /// The guest takes TCP over IPv6 unsegmented.
    GUEST_TSO6 = virtio_net::VIRTIO_NET_F_GUEST_TSO6;
    /// The guest takes unsegmented TCP with ECN.
    GUEST_ECN = virtio_net::VIRTIO_NET_F_GUEST_ECN;
    /// The guest takes UDP over IPv4 unsegmented (virtio 1.3, 5.1.3).
    GUEST_USO4 = virtio_net::VIRTIO_NET_F_GUEST_USO4;
    /// The guest takes UDP over IPv6 unsegmented.
    GUEST_USO6 = virtio_net::VIRTIO_NET_F_GUEST_USO6;
    /// The device takes UDP unsegmented.
    HOST_USO = virtio_net::VIRTIO_NET_F_HOST_USO;
}

/// What a port offers in addition where the kernel's taps know UDP segmentation.
pub const USO: u64 = GUEST_USO4 | GUEST_USO6 | HOST_USO;

/// Most queue pairs of a port.
pub const QUEUE_PAIRS_MAX: u16 = 16;

/// What every port offers.
pub const ALWAYS: u64 = PROTOCOL_FEATURES
    | 1 << virtio_net::VIRTIO_NET_F_CSUM
    | GUEST_CSUM
    | 1 << virtio_net::VIRTIO_NET_F_MTU
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | 1 << virtio_net::VIRTIO_NET_F_HOST_TSO4
    | 1 << virtio_net::VIRTIO_NET_F_HOST_TSO6
    | 1 << virtio_net::VIRTIO_NET_F_HOST_ECN
    | MRG_RXBUF
    | 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC
    | EVENT_IDX
    | VERSION_1
    | 1 << virtio_config::VIRTIO_F_IN_ORDER;

/// Protocol features ("Protocol features" of the vhost-user specification).
pub mod protocol {
    bits! {
        /// More than one queue pair.
        MQ = 0;
        /// Acknowledgements on demand.
        REPLY_ACK = 3;
        /// `NET_SET_MTU`.
        NET_MTU = 4;
        /// `GET_CONFIG`.
        CONFIG = 9;
        /// `RESET_DEVICE`.
        RESET_DEVICE = 13;
        /// `ADD_MEM_REG` and `REM_MEM_REG`.
        CONFIGURE_MEM_SLOTS = 15;
    }

    /// What the gate offers to the front end. Migration's features (the dirty log, RARP, device state) are
    /// not among them: a VM cannot be migrated yet.
    pub const OFFERED: u64 = MQ | REPLY_ACK | NET_MTU | CONFIG | RESET_DEVICE | CONFIGURE_MEM_SLOTS;
}
