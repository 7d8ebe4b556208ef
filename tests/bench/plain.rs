//! The plain loop that vmflow is compared with.

use std::{io::IoSlice, os::fd::OwnedFd};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    time::{ClockId, clock_gettime},
};

use crate::host::{Sender, Tap, carrier, pin, wait_for};

/// An empty `virtio_net_hdr_v1`.
const HEADER: [u8; 12] = [0; 12];

/// What every simple backend does: a `writev` of header and frame, a `read`, for each frame.
pub struct Plain {
    fd: OwnedFd,
    name: &'static str,
}

impl Plain {
    pub fn attach(tap: &Tap) -> Self {
        let fd = vmflow::tap::attach(tap.0).expect("the tap is free");
        wait_for("the carrier", || carrier(tap.0));
        Self { fd, name: tap.0 }
    }

    /// ns of CPU per frame.
    pub fn transmit(&mut self, len: usize, frames: u64) -> f64 {
        // As many different buffers as a ring has, as far apart as a guest's.
        let buffers: Vec<Vec<u8>> = (0..1024).map(|_| super::frame(len)).collect();
        self.measured(frames, |fd| {
            for frame in buffers.iter().cycle().take(usize::try_from(frames).expect("small")) {
                let written = rustix::io::writev(fd, &[IoSlice::new(&HEADER), IoSlice::new(frame)]);
                assert_eq!(written, Ok(HEADER.len() + len));
            }
        })
    }

    pub fn receive(&mut self, len: usize, frames: u64, burst: u16) -> f64 {
        let (sender, frame) = (Sender::on(self.name), super::frame(len));
        let (mut spent, mut total) = (0.0, 0);
        while total < frames {
            sender.send(&frame, burst);
            spent += self.measured(1, |fd| read_all(fd, burst));
            total += u64::from(burst);
        }
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let frames = total as f64;
        spent / frames
    }

    fn measured(&self, frames: u64, work: impl FnOnce(&OwnedFd) + Send) -> f64 {
        let used = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                pin(super::BACKEND_CPU);
                let before = thread_cpu();
                work(&self.fd);
                thread_cpu() - before
            });
            thread.join().expect("the plain loop")
        });
        super::per_frame(used, frames)
    }
}

fn read_all(fd: &OwnedFd, frames: u16) {
    let mut buffer = vec![0; 1 << 16];
    let mut came = 0;
    while came < frames {
        match rustix::io::read(fd, &mut buffer[..]) {
            Ok(_) => came += 1,
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(fd, PollFlags::IN)], None);
            }
            Err(e) => unreachable!("the tap: {e}"),
        }
    }
}

fn thread_cpu() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}
