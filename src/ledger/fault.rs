//! Death at a chosen moment, for the tests: a worker can be stopped before each store and each tap operation.

/// A worker may die here. Outside of unit tests there is nothing here.
#[inline]
pub(crate) fn may_die() {
    #[cfg(test)]
    armed::pass();
}

#[cfg(test)]
pub(crate) use armed::run_until;

#[cfg(test)]
mod armed {
    use std::{
        cell::Cell,
        panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    };

    thread_local! {
        /// How many moments this thread may pass before it dies; nothing if it lives for ever.
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// What a death leaves.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Died;

    pub(super) fn pass() {
        match LEFT.take() {
            Some(0) => resume_unwind(Box::new(Died)), // without a word in the test's output
            left => LEFT.set(left.map(|n| n - 1)),
        }
    }

    /// Runs `work` until it has passed so many moments, and then lets it die; says whether it did.
    pub(crate) fn run_until<T>(moments: usize, work: impl FnOnce() -> T) -> Result<T, Died> {
        LEFT.set(Some(moments));
        let ended = catch_unwind(AssertUnwindSafe(work));
        LEFT.set(None);
        ended.map_err(|payload| match payload.downcast::<Died>() {
            Ok(died) => *died,
            Err(payload) => resume_unwind(payload),
        })
    }
}
