//! The words of vhost-user: requests, header flags, feature bits; numbers as the protocol's text has them.

use std::fmt;

/// A request's number. Any number can be sent; those that the protocol names have a constant.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Request(pub u32);

macro_rules! requests {
    ($($(#[$doc:meta])* $name:ident = $code:literal;)*) => {
        #[allow(missing_docs, reason = "the protocol's own names and numbers")]
        impl Request {
            $($(#[$doc])* pub const $name: Self = Self($code);)*

            /// Every request that the protocol names.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The protocol's name, where it has one.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $($code => Some(stringify!($name)),)* _ => None }
            }
        }
    };
}

requests! {
    GET_FEATURES = 1; SET_FEATURES = 2; SET_OWNER = 3; RESET_OWNER = 4; SET_MEM_TABLE = 5;
    SET_LOG_BASE = 6; SET_LOG_FD = 7; SET_VRING_NUM = 8; SET_VRING_ADDR = 9; SET_VRING_BASE = 10;
    GET_VRING_BASE = 11; SET_VRING_KICK = 12; SET_VRING_CALL = 13; SET_VRING_ERR = 14;
    GET_PROTOCOL_FEATURES = 15; SET_PROTOCOL_FEATURES = 16; GET_QUEUE_NUM = 17; SET_VRING_ENABLE = 18;
    SEND_RARP = 19; NET_SET_MTU = 20; SET_BACKEND_REQ_FD = 21; IOTLB_MSG = 22; SET_VRING_ENDIAN = 23;
    GET_CONFIG = 24; SET_CONFIG = 25; CREATE_CRYPTO_SESSION = 26; CLOSE_CRYPTO_SESSION = 27;
    POSTCOPY_ADVISE = 28; POSTCOPY_LISTEN = 29; POSTCOPY_END = 30; GET_INFLIGHT_FD = 31;
    SET_INFLIGHT_FD = 32; GPU_SET_SOCKET = 33; RESET_DEVICE = 34; VRING_KICK = 35;
    GET_MAX_MEM_SLOTS = 36; ADD_MEM_REG = 37; REM_MEM_REG = 38; SET_STATUS = 39; GET_STATUS = 40;
    GET_SHARED_OBJECT = 41; SET_DEVICE_STATE_FD = 42; CHECK_DEVICE_STATE = 43;
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "request {}", self.0),
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Header flags.
pub mod flag {
    /// The protocol's version, in the two lowest bits.
    pub const VERSION: u32 = 1;
    /// Which bits the version has.
    pub const VERSION_MASK: u32 = 3;
    /// The message answers one of the front end's.
    pub const REPLY: u32 = 1 << 2;
    /// The sender wants an acknowledgement, if `REPLY_ACK` was negotiated.
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// Set in the body of `SET_VRING_KICK`, CALL and ERR when no descriptor comes with them.
pub const NO_DESCRIPTOR: u64 = 1 << 8;

/// Virtio's feature bits, as masks.
pub mod feature {
    /// The device checks sums that the driver left out.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes frames with partial checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The device has an MTU to tell.
    pub const MTU: u64 = 1 << 3;
    /// The device has a MAC address to tell.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TCP over IPv4 larger than the MTU.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes TCP over IPv6 larger than the MTU.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The device takes TCP over IPv4 larger than the MTU.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes TCP over IPv6 larger than the MTU.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// A received frame may fill several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// There is a status field.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// There may be several queue pairs.
    pub const MQ: u64 = 1 << 22;
    /// Dirty pages can be logged (vhost).
    pub const LOG_ALL: u64 = 1 << 26;
    /// Chains may live in tables of their own.
    pub const INDIRECT: u64 = 1 << 28;
    /// Notifications by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// There are protocol features (vhost-user).
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.
    pub const VERSION_1: u64 = 1 << 32;
    /// Buffers are used in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// Single queues can be reset.
    pub const RING_RESET: u64 = 1 << 40;
    /// The driver takes UDP over IPv4 that is to be cut into datagrams.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The driver takes UDP over IPv6 that is to be cut into datagrams.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes UDP that is to be cut into datagrams.
    pub const HOST_USO: u64 = 1 << 56;
}

/// vhost-user's own feature bits, as masks.
pub mod protocol {
    /// More than one queue pair, `GET_QUEUE_NUM`.
    pub const MQ: u64 = 1 << 0;
    /// The dirty log is shared memory.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// `SEND_RARP`.
    pub const RARP: u64 = 1 << 2;
    /// `NEED_REPLY` is honoured.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// `NET_SET_MTU`.
    pub const NET_MTU: u64 = 1 << 4;
    /// The backend may send requests.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// `GET_CONFIG` and `SET_CONFIG`.
    pub const CONFIG: u64 = 1 << 9;
    /// In-flight descriptors are shared memory.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// `RESET_DEVICE`.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// `ADD_MEM_REG`, `REM_MEM_REG`, `GET_MAX_MEM_SLOTS`.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// `SET_STATUS` and `GET_STATUS`.
    pub const STATUS: u64 = 1 << 16;
    /// The backend's state can be saved.
    pub const DEVICE_STATE: u64 = 1 << 19;
}
