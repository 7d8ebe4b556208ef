//! A thread of a worker that stands still while the others go on: a debugger stops it.

#![expect(unsafe_code, reason = "ptrace and waitpid are not in any of the libraries that the tests use")]

use std::fs;

use rustix::process::Pid;

/// What the crate calls the threads that serve queue pairs.
const NAME: &str = "vring_worker";

/// A thread that was stopped, and stays so until it is killed.
pub struct Held(libc::pid_t);

impl Held {
    /// Stops the thread of a worker's queue pair.
    pub fn thread_of_pair(worker: Pid, pair: usize) -> Self {
        let tasks = format!("/proc/{}/task", worker.as_raw_nonzero());
        let of_pair = |path: &fs::DirEntry| {
            fs::read_to_string(path.path().join("comm")).is_ok_and(|name| name.trim() == NAME)
        };
        let mut threads: Vec<libc::pid_t> = fs::read_dir(tasks)
            .unwrap()
            .flatten()
            .filter(of_pair)
            .map(|task| task.file_name().to_str().unwrap().parse().unwrap())
            .collect();
        threads.sort_unstable(); // they are made in the order of their pairs
        let thread = threads[pair];
        let nothing = std::ptr::null_mut::<libc::c_void>();
        for request in [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT] {
            // SAFETY: neither request takes an address, and both fail on what is no thread.
            let done = unsafe { libc::ptrace(request, thread, nothing, nothing) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        }
        let held = Self(thread);
        assert!(held.wait(0), "it stands still");
        held
    }

    /// If it was killed: takes notice of that, without which it would not be gone.
    pub fn let_it_die(&self) {
        self.wait(libc::WNOHANG);
    }

    fn wait(&self, how: libc::c_int) -> bool {
        // SAFETY: no status is asked for, so no memory is written.
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), how | libc::__WALL) == self.0 }
    }
}
