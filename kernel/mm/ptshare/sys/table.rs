// SPDX-License-Identifier: GPL-2.0

//! Last-level tables and the right to be in a PMD entry.

use super::vma::{File, Mm};
use crate::core_logic::count::Counter;
use crate::core_logic::granule::ENTRIES;
use crate::core_logic::key::Key;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicI64, Ordering};
use kernel::bindings;
use kernel::prelude::*;

/// Shared tables alive now.
pub(super) static TABLES: AtomicI64 = AtomicI64::new(0);
/// PMD entries that point at them now.
static LINKS: AtomicI64 = AtomicI64::new(0);

/// How many shared tables there are, and how many PMD entries point at them.
pub(crate) fn gauges() -> (i64, i64) {
    (
        TABLES.load(Ordering::Relaxed),
        LINKS.load(Ordering::Relaxed),
    )
}

/// A last-level table that stays allocated for `'a`.
///
/// # Invariants
///
/// The pointer is to the descriptor of a user PTE table, which is not freed during `'a`: either a
/// lock is held without which the last entry that points at it cannot be cleared, or it is in a
/// chain of the index that is locked.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a>(NonNull<bindings::ptdesc>, PhantomData<&'a ()>);

impl<'a> Table<'a> {
    /// # Safety
    ///
    /// `ptdesc` is the descriptor of a user PTE table that is not freed during `'a`.
    pub(super) unsafe fn from_raw(ptdesc: NonNull<bindings::ptdesc>) -> Self {
        // INVARIANT: as the caller promises.
        Table(ptdesc, PhantomData)
    }

    pub(super) fn as_ptr(self) -> *mut bindings::ptdesc {
        self.0.as_ptr()
    }

    /// Is it shared, that is, can others find it or do they use it?
    pub(crate) fn is_shared(self) -> bool {
        self.load() > 0
    }

    /// Takes the table's PTE lock. The lock of the PMD entry is held, which comes first.
    pub(crate) fn lock(self) -> Locked<'a> {
        // SAFETY: the table is alive, by the invariant; a PMD lock is held.
        let lock = unsafe { bindings::ptshare_table_lock(self.as_ptr()) };
        Locked { table: self, lock }
    }

    /// Is it shared since a fork, rather than found through a file? The lock of a PMD entry that
    /// points at it is held.
    pub(crate) fn is_forked(self) -> bool {
        // SAFETY: the table is alive; the field is written only before the table is shared, and when
        // it is not any more, by a holder of the PMD lock of the only entry that points at it.
        self.is_shared() && unsafe { (*mapping_field(self.as_ptr())).is_null() }
    }

    /// The file and key that it was published under. Only while it is shared, and not by a fork.
    pub(crate) fn identity(self) -> (File, Key) {
        let ptdesc = self.as_ptr();
        // SAFETY: the table is alive, and both fields are written before it can be found and after
        // nobody can find it any more.
        unsafe {
            (
                File::from_raw(*mapping_field(ptdesc)),
                Key::from_word(*key_field(ptdesc) as u64),
            )
        }
    }

    /// Is `what` true of every entry? The table's lock is held.
    fn all(self, what: unsafe extern "C" fn(*mut bindings::ptdesc, u32) -> bool) -> bool {
        // SAFETY: the table is alive; the helpers that this is called with only read the entry.
        (0..ENTRIES as u32).all(|entry| unsafe { what(self.as_ptr(), entry) })
    }

    /// Does entry `entry` map `page`?
    pub(super) fn maps(self, entry: usize, page: *const bindings::page) -> bool {
        // SAFETY: the table is alive; the helper only reads the entry, `entry` is below ENTRIES.
        unsafe { bindings::ptshare_pte_maps(self.as_ptr(), (entry % ENTRIES) as u32, page) }
    }
}

impl Counter for Table<'_> {
    fn load(&self) -> i32 {
        // SAFETY: the table is alive, by the invariant.
        unsafe { bindings::ptshare_count_read(self.as_ptr()) }
    }

    fn compare_exchange(&self, old: i32, new: i32) -> i32 {
        // SAFETY: the table is alive, by the invariant.
        unsafe { bindings::ptshare_count_cmpxchg(self.as_ptr(), old, new) }
    }

    fn decrement(&self) -> i32 {
        // SAFETY: the table is alive, by the invariant.
        unsafe { bindings::ptshare_count_dec(self.as_ptr()) }
    }
}

/// A table whose PTE lock is held.
pub(crate) struct Locked<'a> {
    pub(super) table: Table<'a>,
    lock: *mut bindings::spinlock_t,
}

impl<'a> Locked<'a> {
    pub(crate) fn table(&self) -> Table<'a> {
        self.table
    }

    /// Has it no entry?
    pub(crate) fn is_empty(&self) -> bool {
        self.table.all(bindings::ptshare_pte_none)
    }

    /// Has it nothing but pages, which can be had again from the page cache?
    pub(crate) fn can_be_dropped(&self) -> bool {
        self.table.all(bindings::ptshare_pte_drops)
    }

    /// How many of its entries rss counts.
    fn pages(&self) -> isize {
        (0..ENTRIES as u32)
            // SAFETY: the table is alive and its entries do not change while its lock is held.
            .filter(|&entry| unsafe { bindings::ptshare_pte_counts(self.table.as_ptr(), entry) })
            .count() as isize
    }

    /// Gives the table, whose count the caller has brought to 0 and which is out of the index, to
    /// `mm`, whose entry goes on to point at it: from now on its pages are in the mm's rss.
    pub(crate) fn give_to(&self, mm: Mm, file: File) {
        let ptdesc = self.table.as_ptr();
        // SAFETY: the table is alive; nobody but the holder of its lock looks at these fields when
        // the count is 0 and the table is not in the index. `file` is mapped by the mm.
        unsafe {
            *mapping_field(ptdesc) = ptr::null_mut();
            bindings::ptshare_mm_own(mm.as_ptr(), self.pages(), file.as_ptr());
        }
        unlinked(mm);
        TABLES.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // SAFETY: the lock was taken by `Table::lock`.
        unsafe { bindings::spin_unlock(self.lock) };
    }
}

/// A table that was allocated for a fault and that nobody else knows.
///
/// # Invariants
///
/// The place holds the descriptor of a PTE table that only the fault knows.
pub(crate) struct Fresh<'a>(pub(super) &'a mut bindings::pgtable_t);

impl Fresh<'_> {
    /// Makes it a shared table with one sharer, to be put into the index next.
    pub(super) fn share(self, file: File, key: Key) -> Link {
        let ptdesc = core::mem::replace(self.0, ptr::null_mut()).cast::<bindings::ptdesc>();
        // SAFETY: by the invariant it is a table's descriptor and nobody else reads it yet.
        unsafe {
            *mapping_field(ptdesc) = file.as_ptr();
            *key_field(ptdesc) = key.to_word() as usize;
            bindings::ptshare_count_set(ptdesc, 1);
        }
        TABLES.fetch_add(1, Ordering::Relaxed);
        // INVARIANT: the count of 1 is this link's.
        Link(NonNull::new(ptdesc).expect("a fault's table"))
    }
}

/// The right to be in one PMD entry: one unit of a table's share count.
///
/// # Invariants
///
/// The table's count includes one for this value, so the table stays alive.
#[must_use]
pub(crate) struct Link(NonNull<bindings::ptdesc>);

impl Link {
    /// # Safety
    ///
    /// The caller owns one unit of the table's share count, and gives it up.
    pub(super) unsafe fn from_table(table: Table<'_>) -> Self {
        // INVARIANT: as the caller promises.
        Link(table.0)
    }

    pub(super) fn table(&self) -> Table<'_> {
        // SAFETY: the count keeps the table alive as long as `self`.
        unsafe { Table::from_raw(self.0) }
    }

    /// To be put into an entry of `mm`, which then owns the unit.
    pub(super) fn into_entry(self, mm: Mm) -> NonNull<bindings::ptdesc> {
        LINKS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the mm is alive.
        unsafe {
            bindings::ptshare_mm_links_add(mm.as_ptr(), 1);
            bindings::count_vm_event(bindings::vm_event_item_PTSHARE_LINK);
        }
        ManuallyDrop::new(self).0
    }

    /// Gives the unit back, which was in an entry of `mm` that is cleared and flushed. The table's
    /// lock is held and others use it.
    pub(crate) fn release(self, locked: &Locked<'_>, mm: Mm) {
        unlinked(mm);
        let left = crate::core_logic::count::release(&locked.table());
        if left < 1 {
            pr_err!("BUG: ptshare: a table lost its last sharer unnoticed\n");
        }
        core::mem::forget(self);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        pr_err!("BUG: ptshare: a link was lost\n");
    }
}

/// Counts an entry of `mm` that no longer points at a shared table.
fn unlinked(mm: Mm) {
    LINKS.fetch_sub(1, Ordering::Relaxed);
    // SAFETY: the mm is alive.
    unsafe {
        bindings::ptshare_mm_links_add(mm.as_ptr(), -1);
        bindings::count_vm_event(bindings::vm_event_item_PTSHARE_UNLINK);
    }
}

/// Where a descriptor keeps the next table of its chain.
///
/// # Safety
///
/// `ptdesc` is the descriptor of a PTE table.
pub(super) unsafe fn next_field(ptdesc: *mut bindings::ptdesc) -> *mut *mut bindings::ptdesc {
    // SAFETY: in bounds of the descriptor.
    unsafe { &raw mut (*ptdesc).__bindgen_anon_1.__bindgen_anon_2.pt_share_next }
}

/// Where a descriptor keeps its key.
///
/// # Safety
///
/// `ptdesc` is the descriptor of a PTE table.
unsafe fn key_field(ptdesc: *mut bindings::ptdesc) -> *mut usize {
    // SAFETY: in bounds of the descriptor.
    unsafe {
        &raw mut (*ptdesc)
            .__bindgen_anon_1
            .__bindgen_anon_2
            .__bindgen_anon_1
            .pt_share_key
    }
}

/// Where a descriptor keeps the file whose pages the table maps.
///
/// # Safety
///
/// `ptdesc` is the descriptor of a PTE table.
unsafe fn mapping_field(ptdesc: *mut bindings::ptdesc) -> *mut *mut bindings::address_space {
    // SAFETY: in bounds of the descriptor.
    unsafe { &raw mut (*ptdesc).__bindgen_anon_2.pt_share_mapping }
}

/// Where the descriptor of a table that a fork left shared keeps its owner.
///
/// # Safety
///
/// `ptdesc` is the descriptor of a PTE table.
#[cfg(CONFIG_COW_PTE)]
pub(super) unsafe fn owner_field(ptdesc: *mut bindings::ptdesc) -> *mut *mut bindings::mm_struct {
    // SAFETY: in bounds of the descriptor.
    unsafe {
        &raw mut (*ptdesc)
            .__bindgen_anon_1
            .__bindgen_anon_2
            .__bindgen_anon_1
            .pt_share_owner
    }
}
