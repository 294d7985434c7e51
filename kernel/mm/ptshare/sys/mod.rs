// SPDX-License-Identifier: GPL-2.0

//! All unsafe code of mm/ptshare: kernel structures behind types that say what may be done.
//!
//! - [`table`]: a last-level table ([`table::Table`], borrowed), the right to be in one PMD entry
//!   ([`table::Link`], owned), its PTE lock.
//! - [`entry`]: a table of PMD entries, locked, and what one of them holds; clearing one gives a
//!   token that only flushing turns back into a link.
//! - [`index`]: where shared tables are found.
//! - [`linking`]: how walks over all mappings of a file see links in progress.
//! - [`vma`]: mappings, faults and whole address spaces.
//! - `cow`: tables that a fork left shared, and those that are to replace them.
//! - [`flush`]: what all sharers have cached.
//! - [`boot`]: boot parameter, sysctl, sysfs.

pub(crate) mod boot;
#[cfg(CONFIG_COW_PTE)]
pub(crate) mod cow;
pub(crate) mod entry;
pub(crate) mod flush;
pub(crate) mod index;
pub(crate) mod linking;
pub(crate) mod table;
pub(crate) mod vma;

use core::cell::UnsafeCell;

/// A kernel structure in a Rust static, which only C code looks into.
#[repr(transparent)]
pub(crate) struct Shared<T>(UnsafeCell<T>);

// SAFETY: what is in it is only passed, by pointer, to kernel functions that may be called with it
// from any CPU at any time; see the uses of `Shared`.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) const fn new(value: T) -> Self {
        Shared(UnsafeCell::new(value))
    }

    pub(crate) const fn get(&self) -> *mut T {
        self.0.get()
    }
}

/// Lets others run, in a long loop. To be called where sleeping is allowed.
pub(crate) fn resched() {
    // SAFETY: no requirements but the context, which is the caller's.
    unsafe { kernel::bindings::ptshare_cond_resched() }
}

/// Are the hooks on?
pub(crate) fn enabled() -> bool {
    // SAFETY: no requirements.
    unsafe { kernel::bindings::ptshare_enabled() }
}

/// Switches the hooks on. To be called where sleeping is allowed and no lock is held.
pub(crate) fn enable() {
    // SAFETY: no requirements but the context, which is the caller's.
    unsafe { kernel::bindings::ptshare_enable() }
}
