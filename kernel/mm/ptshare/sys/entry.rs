// SPDX-License-Identifier: GPL-2.0

//! PMD entries, under the lock of the table that they are in.

#[cfg(CONFIG_COW_PTE)]
use super::cow::{Blank, BlankEntry, Private};
use super::table::{Link, Locked, Table};
use super::vma::Mm;
#[cfg(CONFIG_COW_PTE)]
use crate::core_logic::granule::next_neighbourhood;
use crate::core_logic::granule::{down, GRANULE, GRANULE_SHIFT, NEIGHBOURHOOD};
use core::marker::PhantomData;
use core::ptr::NonNull;
use kernel::bindings;

/// What a PMD entry holds.
pub(crate) enum Slot<'a> {
    /// Nothing.
    Empty,
    /// A last-level table.
    Table(Table<'a>),
    /// A huge page, or one on its way.
    Huge,
}

/// A table of PMD entries, locked.
///
/// # Invariants
///
/// `pmd` is the entry for `start` in a table of PMD entries of `mm`; `lock` is its lock and held.
pub(crate) struct Upper<'a> {
    mm: Mm,
    pmd: NonNull<bindings::pmd_t>,
    start: u64,
    lock: *mut bindings::spinlock_t,
    _table: PhantomData<&'a ()>,
}

impl<'a> Upper<'a> {
    /// Locks the table that `pmd` is in.
    ///
    /// # Safety
    ///
    /// `pmd` is the entry of `mm` for `addr`, in a table that is not freed during `'a`: the mm's
    /// lock, the lock of a VMA around `addr`, or the file's lock with such a VMA in its tree, is
    /// held.
    pub(crate) unsafe fn lock(mm: Mm, pmd: NonNull<bindings::pmd_t>, addr: u64) -> Self {
        // SAFETY: the table is alive, as the caller promises.
        let lock = unsafe { bindings::pmd_lock(mm.as_ptr(), pmd.as_ptr()) };
        // INVARIANT: as the caller promises; the lock was just taken.
        Upper {
            mm,
            pmd,
            start: down(addr),
            lock,
            _table: PhantomData,
        }
    }

    /// The mm whose entries these are.
    pub(crate) fn mm(&self) -> Mm {
        self.mm
    }

    /// The entry for the granule at `start`. `None` if it is in another table.
    pub(crate) fn entry(&mut self, start: u64) -> Option<Entry<'_, 'a>> {
        if (start ^ self.start) & !(NEIGHBOURHOOD - 1) != 0 {
            return None;
        }
        let steps = (start >> GRANULE_SHIFT) as isize - (self.start >> GRANULE_SHIFT) as isize;
        // SAFETY: both entries are in the same table, as was just checked.
        let pmd = unsafe { self.pmd.offset(steps) };
        Some(Entry {
            pmd,
            start: down(start),
            upper: self,
        })
    }
}

#[cfg(CONFIG_COW_PTE)]
impl<'a> Upper<'a> {
    /// Calls `visit` with the entries from `start` on, and with those of a child that go with them,
    /// until it answers `false` or either table ends. Returns to how many it answered `true`.
    pub(crate) fn each_with(
        &mut self,
        start: u64,
        blank: &mut Blank,
        mut visit: impl FnMut(&mut Entry<'_, 'a>, BlankEntry<'_>) -> bool,
    ) -> usize {
        let start = down(start);
        let Some(first) = self.entry(start).map(|entry| entry.pmd) else {
            return 0;
        };
        let rest = (next_neighbourhood(start) - start) >> GRANULE_SHIFT;
        let count = blank.len().min(rest as usize);
        for index in 0..count {
            let mut entry = Entry {
                // SAFETY: as many entries follow `first` in its table, as was just computed.
                pmd: unsafe { first.add(index) },
                start: start + index as u64 * GRANULE,
                upper: self,
            };
            // SAFETY: `count` is not above how many there are.
            let blank = unsafe { blank.at(index) };
            if !visit(&mut entry, blank) {
                return index;
            }
        }
        count
    }
}

impl Drop for Upper<'_> {
    fn drop(&mut self) {
        // SAFETY: the lock is held, by the invariant.
        unsafe { bindings::spin_unlock(self.lock) };
    }
}

/// A PMD entry whose lock is held.
pub(crate) struct Entry<'u, 'a> {
    pmd: NonNull<bindings::pmd_t>,
    start: u64,
    upper: &'u mut Upper<'a>,
}

impl<'u> Entry<'u, '_> {
    /// What it holds. A table stays alive as long as the lock is held, for the entry points at it.
    pub(crate) fn slot(&self) -> Slot<'u> {
        // SAFETY: the entry is alive and locked, by the invariant of `Upper`.
        unsafe {
            match NonNull::new(bindings::ptshare_pmd_table(self.pmd.as_ptr())) {
                Some(ptdesc) => Slot::Table(Table::from_raw(ptdesc)),
                None if bindings::ptshare_pmd_none(self.pmd.as_ptr()) => Slot::Empty,
                None => Slot::Huge,
            }
        }
    }

    /// Points the entry, which is empty, at a shared table.
    pub(crate) fn set(&mut self, link: Link) {
        let mm = self.upper.mm;
        let table = link.into_entry(mm);
        // SAFETY: the entry is alive and locked; the table is alive: the entry owns a unit of its
        // count now.
        unsafe {
            bindings::ptshare_pmd_populate(mm.as_ptr(), self.pmd.as_ptr(), table.as_ptr());
        }
    }

    /// Clears the entry, which points at the table that is locked.
    pub(crate) fn clear(&mut self, locked: &Locked<'_>) -> Unflushed {
        // SAFETY: the entry is alive and locked, and so is the table it points at; the unit of the
        // count that the entry owned goes to the link.
        let link = unsafe {
            bindings::pmd_clear(self.pmd.as_ptr());
            Link::from_table(locked.table())
        };
        Unflushed {
            link,
            mm: self.upper.mm,
            start: self.start,
        }
    }
}

#[cfg(CONFIG_COW_PTE)]
impl<'u> Entry<'u, '_> {
    /// The table that it points at and that a fork left shared, if so.
    pub(crate) fn forked(&self) -> Option<Table<'u>> {
        match self.slot() {
            Slot::Table(table) if table.is_forked() => Some(table),
            _ => None,
        }
    }

    pub(super) fn as_ptr(&mut self) -> *mut bindings::pmd_t {
        self.pmd.as_ptr()
    }

    /// Where its granule starts.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Lets the mm write to the table, which is its own now.
    pub(crate) fn unprotect(&mut self) {
        // SAFETY: the entry is alive and locked.
        unsafe { bindings::cow_pte_unprotect(self.pmd.as_ptr()) };
    }

    /// Points the entry at a table of the mm's own instead of the one that is locked.
    pub(crate) fn replace(&mut self, locked: &Locked<'_>, table: Private) -> Unflushed {
        let mm = self.upper.mm;
        // SAFETY: the entry is alive and locked, and so is the table it points at; the unit of the
        // count that the entry owned goes to the link. The new table is the entry's from now on.
        let link = unsafe {
            bindings::ptshare_pmd_populate(mm.as_ptr(), self.pmd.as_ptr(), table.into_raw());
            Link::from_table(locked.table())
        };
        Unflushed {
            link,
            mm,
            start: self.start,
        }
    }
}

impl Entry<'_, '_> {
    /// Frees the table that the entry points at: the mm's own, empty, and locked.
    pub(crate) fn free(&mut self, locked: Locked<'_>) {
        let mm = self.upper.mm.as_ptr();
        let table = locked.table().as_ptr();
        // SAFETY: the entry is alive and locked, and so is the table it points at, which nobody
        // else can reach: it is not shared. Those who are in it still are waited for by RCU.
        unsafe {
            bindings::pmd_clear(self.pmd.as_ptr());
            bindings::ptshare_arch_flush_granule(mm, self.start as usize);
        }
        drop(locked);
        // SAFETY: as above.
        unsafe { bindings::ptshare_table_free(mm, table) };
    }
}

/// A link out of an entry that CPUs may still have cached.
#[must_use]
pub(crate) struct Unflushed {
    link: Link,
    mm: Mm,
    start: u64,
}

impl Unflushed {
    /// Makes all CPUs forget the granule in this mm, and gives the link back.
    pub(crate) fn flush(self) -> Link {
        const { assert!(GRANULE.is_power_of_two()) };
        // SAFETY: the mm is alive; interrupts are enabled where PMD entries change.
        unsafe { bindings::ptshare_arch_flush_granule(self.mm.as_ptr(), self.start as usize) };
        self.link
    }

    /// Gives the link back unflushed: `flush::leave_begins` was called before the entry was
    /// cleared, and `flush::leave_ends` will be.
    #[cfg(CONFIG_COW_PTE)]
    pub(crate) fn defer(self) -> Link {
        self.link
    }
}
