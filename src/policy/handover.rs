//! How a policy reaches a worker: the monitor and the worker of a port share a `SOCK_SEQPACKET` pair.
//!
//! ```text
//!  worker -> monitor   Ready                  "I am new and have no policy"
//!  monitor -> worker   Policy(generation) + the sealed file
//!  worker -> monitor   Acknowledged(generation) | Refused(generation)
//! ```
//! Each is one packet of 16 bytes: kind and generation, both u64, little endian.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
};

/// Packet size in bytes.
const SIZE: usize = 16;

/// One packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// From the worker: it is new and has no policy.
    Ready,
    /// From the monitor, with the sealed file.
    Policy(u64),
    /// From the worker: this generation is in force, from the next batch on.
    Acknowledged(u64),
    /// From the worker: this generation was no policy; the one before stays in force.
    Refused(u64),
}

impl Packet {
    fn encode(self) -> [u8; SIZE] {
        let (kind, generation) = match self {
            Self::Ready => (1_u64, 0),
            Self::Policy(g) => (2, g),
            Self::Acknowledged(g) => (3, g),
            Self::Refused(g) => (4, g),
        };
        let mut packet = [0; SIZE];
        packet[..8].copy_from_slice(&kind.to_le_bytes());
        packet[8..].copy_from_slice(&generation.to_le_bytes());
        packet
    }

    fn decode(packet: [u8; SIZE]) -> Option<Self> {
        let packet = u128::from_le_bytes(packet);
        let generation = u64::try_from(packet >> 64).ok()?;
        match packet & u128::from(u64::MAX) {
            1 => Some(Self::Ready),
            2 => Some(Self::Policy(generation)),
            3 => Some(Self::Acknowledged(generation)),
            4 => Some(Self::Refused(generation)),
            _ => None,
        }
    }
}

/// The two ends: monitor's and worker's. Neither blocks.
///
/// # Errors
/// Whatever `socketpair` says.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// Sends a packet, with a file if it is a policy.
///
/// # Errors
/// Whatever `sendmsg` says; `AGAIN` when the other side does not read.
pub fn send(socket: impl AsFd, packet: Packet, file: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: &[BorrowedFd<'_>] = file.as_slice();
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(files));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(&packet.encode())], &mut control, flags).map(|_| ())
}

/// Receives a packet; nothing when the other side is gone.
///
/// # Errors
/// `AGAIN` when there is none yet; `PROTO` for a packet that is none of ours.
pub fn receive(socket: impl AsFd) -> Result<Option<(Packet, Option<OwnedFd>)>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut packet = [0; SIZE];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = match recvmsg(socket, &mut [IoSliceMut::new(&mut packet)], &mut control, flags) {
        Err(Errno::CONNRESET) => return Ok(None),
        other => other?,
    };
    let mut file = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.last().or(file);
        }
    }
    match received.bytes {
        0 => Ok(None),
        SIZE => Packet::decode(packet).map(|p| Some((p, file))).ok_or(Errno::PROTO),
        _ => Err(Errno::PROTO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_travels_with_its_file_and_the_answer_comes_back() {
        let (monitor, worker) = pair().unwrap();
        let (file, _) = pair().unwrap();
        assert_eq!(receive(&worker).unwrap_err(), Errno::AGAIN);
        send(&monitor, Packet::Policy(7), Some(file.as_fd())).unwrap();
        let (packet, file) = receive(&worker).unwrap().unwrap();
        assert_eq!(packet, Packet::Policy(7));
        assert!(file.is_some());
        send(&worker, Packet::Acknowledged(7), None).unwrap();
        assert_eq!(receive(&monitor).unwrap().unwrap().0, Packet::Acknowledged(7));
        drop(worker);
        assert!(receive(&monitor).unwrap().is_none());
    }
}
