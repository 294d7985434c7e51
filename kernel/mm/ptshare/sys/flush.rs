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

/// Makes every CPU drop what it has cached of any user mapping.
///
/// To be called with interrupts enabled; PTE locks may be held.
pub(crate) fn all() {
    // SAFETY: both are statics of the type that the helpers want.
    let (wanted, mut done) = unsafe {
        (
            bindings::atomic_long_read(ptshare_flush_wanted.get()),
            bindings::atomic_long_read(ptshare_flush_done.get()),
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

/// Flushes if somebody else's flush is outstanding, before relying on a PTE being empty.
pub(crate) fn pending() {
    // SAFETY: both are statics of the type that the helper wants.
    let outstanding = unsafe {
        bindings::atomic_long_read(ptshare_flush_wanted.get())
            != bindings::atomic_long_read(ptshare_flush_done.get())
    };
    if outstanding {
        all();
    }
}
