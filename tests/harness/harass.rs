//! Someone who kills every worker of a port that comes up, at moments that nothing announces.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Vmflow, children, name};

/// Microseconds between two kills: at least, and at most.
const PAUSE: (u64, u64) = (500, 5000);

/// Kills from when it is made until it is stopped.
pub struct Harasser {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Harasser {
    /// Turns on the workers of a VM of one port. The VM's front end may still have to come.
    pub fn of(vmflow: &Vmflow, vm: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (monitor, vm, stopped) = (vmflow.pid(), vm.to_owned(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let (mut seed, mut kills, mut keeper, mut last) = (7, 0, None, None);
            while !stopped.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_micros(
                    PAUSE.0 + scatter(&mut seed, PAUSE.1 - PAUSE.0),
                ));
                let workers = keeper.map(children).unwrap_or_default();
                if workers.is_empty() {
                    let of_vm = |pid: &u32| name(*pid) == format!("vmf-k:{vm}");
                    keeper = children(monitor).into_iter().find(of_vm);
                }
                // One that is still dying counts once.
                for worker in workers.into_iter().filter(|worker| last != Some(*worker)).collect::<Vec<_>>() {
                    last = Some(worker);
                    kills += u64::from(kill(worker));
                }
            }
            kills
        });
        Self { stop, thread }
    }

    /// Leaves them alone; gives the number of kills.
    pub fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Kills a process; false if it has gone.
fn kill(pid: u32) -> bool {
    let pid = Pid::from_raw(pid.cast_signed());
    pid.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
}

/// A number below `limit` that is different each time, and the same in each run.
pub fn scatter(seed: &mut u64, limit: u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) % limit
}
