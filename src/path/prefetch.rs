//! Has the processor fetch memory that will be looked at soon: a guest's frames were written by another one, and
//! waiting for them costs more than all the looking.

#![expect(unsafe_code, reason = "the processor's hint takes an address")]

use vm_memory::VolatileSlice;

/// Bytes that come with one hint.
const LINE: usize = 64;

/// Asks for two lines of some guest memory, from a byte of it on: a virtio-net header and the headers of most
/// frames. What comes behind them in a row, the processor fetches by itself.
#[inline]
pub(super) fn prefetch(memory: &VolatileSlice<'_, ()>, from: usize) {
    let first = memory.ptr_guard().as_ptr().wrapping_add(from);
    fetch(first);
    fetch(first.wrapping_add(LINE));
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn fetch(address: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint reads nothing that the program could see and never faults, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
}

/// There is no stable way to say it on other processors.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
fn fetch(_address: *const u8) {}
