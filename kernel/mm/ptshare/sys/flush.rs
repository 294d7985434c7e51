// SPDX-License-Identifier: GPL-2.0

//! Flushing what any CPU has cached of shared tables.
//!
//! A flush that is addressed to one mm does not do: CPUs ignore an mm that they have not loaded,
//! and a sharer that is not running keeps its entries under its PCID. So all CPUs drop everything,
//! once for a whole batch of cleared PTEs; the cost goes with the CPUs, not with the sharers.
//!
//! `ptshare_flush_wanted` counts the PTEs that were cleared with the flush put off, under their PTE
//! lock; `ptshare_flush_done` is how many of them are known to be flushed. Where they differ, a PTE
//! that is seen to be empty may still be in a TLB.

use super::Shared;
#[cfg(CONFIG_COW_PTE)]
use crate::core_logic::granule::GRANULE;
use kernel::bindings;

/// PTEs of shared tables that were cleared with the flush put off.
#[no_mangle]
#[allow(non_upper_case_globals, reason = "read by C code, by this name")]
static ptshare_flush_wanted: Shared<bindings::atomic_long_t> =
    Shared::new(bindings::atomic_long_t { counter: 0 });

/// How many of them are flushed.
#[no_mangle]
#[allow(non_upper_case_globals, reason = "read by C code, by this name")]
static ptshare_flush_done: Shared<bindings::atomic_long_t> =
    Shared::new(bindings::atomic_long_t { counter: 0 });

/// PMD entries that were cleared, and left, with the flush put off: see `leave_begins`.
#[no_mangle]
#[allow(non_upper_case_globals, reason = "read by C code, by this name")]
static ptshare_leaving: Shared<bindings::atomic_long_t> =
    Shared::new(bindings::atomic_long_t { counter: 0 });

/// A PMD entry is about to be cleared and its table left, with the flush put off to
/// [`leave_ends`].
///
/// Until then CPUs may still read through it what is in the table. So those who change a table that
/// the mm has left, or take it back, must flush everything: see [`pending`].
#[cfg(CONFIG_COW_PTE)]
pub(crate) fn leave_begins() {
    // SAFETY: a static of the type that the helper wants. The atomic operation on the share count
    // that follows orders it before the count that others see.
    unsafe { bindings::atomic_long_add_return_release(1, ptshare_leaving.get()) };
}

/// Adds the granule at `start` to those that an mm has left.
#[cfg(CONFIG_COW_PTE)]
pub(crate) fn remember(left: &mut bindings::cow_pte_left, start: u64) {
    let (start, end) = (start as usize, (start + GRANULE) as usize);
    if left.tables == 0 {
        (left.start, left.end) = (start, end);
    }
    left.start = left.start.min(start);
    left.end = left.end.max(end);
    left.tables += 1;
}

/// Flushes what an mm has left, which [`leave_begins`] has announced.
#[cfg(CONFIG_COW_PTE)]
pub(crate) fn leave_ends(mm: super::vma::Mm, left: bindings::cow_pte_left) {
    // SAFETY: the mm is alive; interrupts are enabled where page tables are unmapped. Who sees the
    // new number, which is read with acquire, comes after the flush.
    unsafe {
        bindings::ptshare_arch_flush_range(mm.as_ptr(), left.start, left.end);
        bindings::atomic_long_add_return_release(-(left.tables as isize), ptshare_leaving.get());
    }
}

/// Makes every CPU drop what it has cached of any user mapping.
///
/// To be called with interrupts enabled; PTE locks may be held.
pub(crate) fn all() {
    // SAFETY: both are statics of the type that the helpers want.
    let (wanted, mut done) = unsafe {
        (
            bindings::atomic_long_read_acquire(ptshare_flush_wanted.get()),
            bindings::atomic_long_read_acquire(ptshare_flush_done.get()),
        )
    };
    // SAFETY: interrupts are enabled, by this function's contract; it waits for other CPUs'
    // interrupt handlers only, which take no PTE lock.
    unsafe {
        bindings::ptshare_arch_flush_all();
        bindings::count_vm_event(bindings::vm_event_item_PTSHARE_FLUSH);
    }
    while done < wanted {
        // SAFETY: as above; `done` is updated when it fails.
        if unsafe { bindings::atomic_long_try_cmpxchg(ptshare_flush_done.get(), &mut done, wanted) }
        {
            break;
        }
    }
}

/// Flushes if somebody else's flush is outstanding, before relying on a PTE being empty, or on a
/// table being nobody else's any more.
pub(crate) fn pending() {
    // SAFETY: all are statics of the type that the helper wants.
    let outstanding = unsafe {
        bindings::atomic_long_read_acquire(ptshare_flush_wanted.get())
            != bindings::atomic_long_read_acquire(ptshare_flush_done.get())
            || bindings::atomic_long_read_acquire(ptshare_leaving.get()) != 0
    };
    if outstanding {
        all();
    }
}
