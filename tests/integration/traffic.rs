//! Numbered frames of many flows, both ways and over all queue pairs without a pause, while something happens to
//! the connection.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use vmflow_driver::{channel::Channel, net::Device, transmit::Layout, vnet::VnetHeader};

use crate::{
    harness::{PATIENCE, wait_for},
    rig::{Rig, flow_and_number, of_flow, of_flow_back},
};

/// Frames under way each way: enough for several batches, fewer than the tap's queue holds.
const WINDOW: u64 = 128;
/// Length of the frames.
const LENGTH: usize = 100;
/// Flows of each direction.
const FLOWS: u64 = 61;
/// How long nothing may come before nothing more is on its way.
const QUIET: Duration = Duration::from_millis(200);

/// What was sent, and how often each frame came.
#[derive(Debug, Default)]
pub struct Traffic {
    /// The guest's frames, by number: sent are 0 to this.
    pub sent: u64,
    /// How often each came at the tap.
    pub arrived: BTreeMap<u64, u64>,
    /// The host's frames: those that the kernel took are 0 to this.
    pub injected: u64,
    /// How often each came to the guest.
    pub delivered: BTreeMap<u64, u64>,
    /// Of the host's frames, those that nobody waits for any more.
    given_up: u64,
    /// The guest sends from so many pairs only.
    pub senders: Option<usize>,
}

impl Traffic {
    /// One step: takes what came, sends as many as there is room for. True if anything came.
    pub fn step(&mut self, rig: &Rig, vm: usize, device: &mut Device) -> bool {
        let came = self.step_of_guest(rig, vm, device);
        // Those that were given up may come after all.
        while self.injected.saturating_sub(self.given_up + count(&self.delivered)) < WINDOW {
            if !rig.wires[vm].try_send(&of_flow_back(flow(self.injected), LENGTH, self.injected)) {
                break;
            }
            self.injected += 1;
        }
        came
    }

    /// Lets frames flow while `act` runs on a thread of its own, and until the backend has hung up.
    pub fn flow_until_closed(
        &mut self,
        rig: &Rig,
        vm: usize,
        device: &mut Device,
        act: impl FnOnce() + Send,
    ) {
        let until = Instant::now() + PATIENCE;
        std::thread::scope(|scope| {
            scope.spawn(act);
            while !closed(device.session.channel()) {
                self.step_of_guest(rig, vm, device);
                assert!(Instant::now() < until, "the backend never hung up: {}", self.summary());
            }
        });
    }

    /// As `step`, without new frames of the host: its tap may be gone at any moment.
    pub fn step_of_guest(&mut self, rig: &Rig, vm: usize, device: &mut Device) -> bool {
        let came = self.take(rig, vm, device);
        let taken = |queue: &vmflow_driver::queue::Queue| u64::from(queue.ring().size() - queue.free());
        let senders = self.senders.unwrap_or(device.pairs.len());
        let window = WINDOW / u64::try_from(senders).unwrap();
        for transmit in device.pairs.iter_mut().take(senders).map(|pair| &mut pair.transmit) {
            while transmit.queue.free() > 0 && taken(&transmit.queue) < window {
                let bytes = of_flow(flow(self.sent), LENGTH, self.sent);
                transmit.add(&bytes, &VnetHeader::default(), Layout::Single).unwrap();
                self.sent += 1;
            }
            transmit.flush().unwrap();
        }
        came
    }

    /// Takes what is there after the backend's end: nothing more will come.
    pub fn end_of_device(&mut self, rig: &Rig, vm: usize, device: &mut Device) {
        while self.take(rig, vm, device) {}
    }

    /// Different frames of the guest that came, and how many came again.
    pub fn arrived_and_doubled(&self) -> (u64, u64) {
        (count(&self.arrived), doubled(&self.arrived))
    }

    /// Takes what came at both ends.
    fn take(&mut self, rig: &Rig, vm: usize, device: &mut Device) -> bool {
        let mut came = false;
        for pair in &mut device.pairs {
            came |= pair.transmit.reclaim().unwrap() > 0;
        }
        while let Some(frame) = rig.wires[vm].try_receive() {
            *self.arrived.entry(flow_and_number(&frame.bytes).1).or_default() += 1;
            came = true;
        }
        for receive in device.pairs.iter_mut().map(|pair| &mut pair.receive) {
            while let Some(frame) = receive.receive().unwrap() {
                assert_eq!(frame.strays, 0);
                *self.delivered.entry(flow_and_number(&frame.bytes).1).or_default() += 1;
                came = true;
            }
            receive.refill().unwrap();
        }
        came
    }

    /// Of so many frames that were read from the tap, those that never came to the guest.
    pub fn lost_to_guest(&self, read: u64) -> u64 {
        read - count(&self.delivered)
    }

    /// Goes on until `frames` more have come each way: it flows.
    pub fn flow(&mut self, rig: &Rig, vm: usize, device: &mut Device, frames: u64) {
        let (arrived, delivered) = (count(&self.arrived), count(&self.delivered));
        let mut last = Instant::now();
        while count(&self.arrived) < arrived + frames || count(&self.delivered) < delivered + frames {
            if self.step(rig, vm, device) {
                last = Instant::now();
            } else {
                // What was on its way to the guest when its carrier went is the kernel's to throw away.
                if last.elapsed() > QUIET {
                    self.given_up = self.injected - count(&self.delivered);
                }
                std::thread::yield_now();
            }
            assert!(last.elapsed() < PATIENCE, "nothing flows any more: {}", self.summary());
        }
    }

    /// Sends nothing more, and takes everything that is still on its way.
    pub fn end(&mut self, rig: &Rig, vm: usize, device: &mut Device) {
        let mut last = Instant::now();
        let in_flight = |device: &Device| device.pairs.iter().any(|p| p.transmit.queue.in_flight() > 0);
        while in_flight(device) || last.elapsed() < QUIET {
            if self.take(rig, vm, device) {
                last = Instant::now();
            }
            assert!(last.elapsed() < PATIENCE, "chains are never given back: {}", self.summary());
            std::thread::yield_now();
        }
    }

    /// As [`Self::end`], until nothing of the host's frames waits in the tap any more either.
    pub fn end_and_empty_tap(&mut self, rig: &Rig, vm: usize, device: &mut Device) {
        wait_for("the tap to be empty", || {
            self.end(rig, vm, device);
            let refused = rig.netns.counter(&rig.taps[vm], "tx_dropped");
            (rig.kernel(vm).1 + refused == self.injected).then_some(())
        });
        self.end(rig, vm, device);
    }

    /// Frames of the guest that never came, and those that came more than once.
    pub fn lost_and_doubled(&self) -> (u64, u64) {
        (self.sent - count(&self.arrived), doubled(&self.arrived))
    }

    /// Frames that came to the guest more than once.
    pub fn doubled_to_guest(&self) -> u64 {
        doubled(&self.delivered)
    }

    fn summary(&self) -> String {
        let (arrived, delivered) = (count(&self.arrived), count(&self.delivered));
        format!("{} sent, {arrived} arrived, {} injected, {delivered} delivered", self.sent, self.injected)
    }
}

/// The flow of a frame.
fn flow(number: u64) -> u16 {
    u16::try_from(number % FLOWS).unwrap()
}

/// Different frames.
fn count(frames: &BTreeMap<u64, u64>) -> u64 {
    u64::try_from(frames.len()).unwrap()
}

fn doubled(frames: &BTreeMap<u64, u64>) -> u64 {
    frames.values().map(|times| times - 1).sum()
}

/// True once the backend has hung up.
fn closed(channel: &Channel) -> bool {
    use rustix::{
        event::{PollFd, PollFlags, Timespec, poll},
        io::Errno,
    };
    let mut fds = [PollFd::new(channel.stream(), PollFlags::RDHUP)];
    loop {
        match poll(&mut fds, Some(&Timespec::default())) {
            Err(Errno::INTR) => {}
            other => return other.unwrap() > 0,
        }
    }
}
