// SPDX-License-Identifier: GPL-2.0

//! Tables that a fork left shared: whose counters have their pages, and how they are copied.

use super::entry::Entry;
use super::table::{next_field, owner_field, Link, Locked, Table};
use super::vma::{Mm, Vma};
use crate::core_logic::count;
use core::marker::PhantomData;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ptr::{self, NonNull};
use kernel::bindings;
use kernel::prelude::*;

/// Pages and swap entries by kind, as rss counts them.
#[derive(Clone, Copy)]
pub(crate) struct Rss([i32; bindings::NR_MM_COUNTERS as usize]);

impl Rss {
    const ZERO: Rss = Rss([0; bindings::NR_MM_COUNTERS as usize]);
}

impl Mm {
    /// Has a table of its own where it borrowed one: counts what is in it, and the table itself.
    pub(crate) fn owns_borrowed(self, rss: &Rss) {
        // SAFETY: the mm is alive; there are as many numbers as kinds.
        unsafe {
            bindings::cow_pte_add_rss(self.as_ptr(), rss.0.as_ptr(), 1);
            bindings::mm_inc_nr_ptes(self.as_ptr());
            bindings::cow_pte_note_owned(self.as_ptr(), rss.0.as_ptr());
        }
        self.borrows(-1);
    }

    /// No longer counts what a table has, nor the table.
    pub(crate) fn disowns(self, rss: &Rss) {
        // SAFETY: as in `owns_borrowed`.
        unsafe {
            bindings::cow_pte_add_rss(self.as_ptr(), rss.0.as_ptr(), -1);
            bindings::mm_dec_nr_ptes(self.as_ptr());
        }
    }

    /// Uses `count` tables more, or fewer, that it does not own.
    pub(crate) fn borrows(self, count: isize) {
        // SAFETY: the mm is alive.
        unsafe { bindings::cow_pte_borrows_add(self.as_ptr(), count) };
    }

    /// A fork has made `child` use `count` tables that this mm uses.
    pub(crate) fn shared_with(self, child: Mm, count: usize) {
        // SAFETY: both are alive.
        unsafe { bindings::cow_pte_note_shared(child.as_ptr(), self.as_ptr(), count as isize) };
    }

    /// Is it at its end, with no thread left and nobody who looks into it?
    pub(crate) fn exits(self) -> bool {
        // SAFETY: the mm is alive.
        unsafe { bindings::cow_pte_mm_exits(self.as_ptr()) }
    }

    /// A flag of the mm, one of `MMF_ODF` and `MMF_ODF_CHOSEN`.
    pub(crate) fn odf_flag(self, bit: u32) -> bool {
        // SAFETY: the mm is alive.
        unsafe { bindings::cow_pte_flag(self.as_ptr(), bit as i32) != 0 }
    }

    /// Notes whether its forks are to share tables.
    pub(crate) fn choose_odf(self, wanted: bool) {
        // SAFETY: the mm is alive.
        unsafe { bindings::cow_pte_choose(self.as_ptr(), wanted) };
    }
}

impl Table<'_> {
    /// Adds the child of a fork of `parent`, whose entry points at the table and is locked, to
    /// those who use it. The unit of the count is for the child's entry.
    pub(crate) fn fork(self, parent: Mm) {
        count::fork(&self, || {
            // Before the count: who sees that the table is shared looks here. That it is in no chain,
            // but points at itself, tells it from other tables that count their users.
            // SAFETY: the table is alive, and the fields are not in use while the table is not shared.
            unsafe {
                *owner_field(self.as_ptr()) = parent.as_ptr();
                *next_field(self.as_ptr()) = self.as_ptr();
            }
        });
    }
}

impl Locked<'_> {
    /// The mm whose counters have what is in the table, which a fork left shared.
    fn owner(&self) -> *mut bindings::mm_struct {
        // SAFETY: the table is alive, and locked, and the field is in use.
        unsafe { *owner_field(self.table.as_ptr()) }
    }

    /// Is it in the mm's counters?
    pub(crate) fn is_owned_by(&self, mm: Mm) -> bool {
        self.owner() == mm.as_ptr()
    }

    /// From now on it is in nobody's.
    pub(crate) fn set_unowned(&self) {
        // SAFETY: as in `owner`.
        unsafe { *owner_field(self.table.as_ptr()) = ptr::null_mut() };
    }

    /// What rss says of its entries.
    pub(crate) fn rss(&self) -> Rss {
        let mut rss = Rss::ZERO;
        // SAFETY: the table is alive and locked; there are as many numbers as kinds.
        unsafe { bindings::cow_pte_count(self.table.as_ptr(), rss.0.as_mut_ptr()) };
        rss
    }

    /// Has the next write to a page look for others who refer to it, where there are any: the table,
    /// at `start` in `mm`, is the mm's own again.
    pub(crate) fn settle(&self, mm: Mm, start: u64) {
        // SAFETY: the table is alive, locked, and the mm's own; its PMD entry is write-protected, so
        // that GUP pins nothing in it.
        unsafe { bindings::cow_pte_settle(mm.as_ptr(), start as usize, self.table.as_ptr()) };
    }

    /// Copies the entries as a fork does, from this table, which `vma` uses at `start`, to one that
    /// nobody knows yet.
    ///
    /// On failure says what it would need, and has changed nothing.
    pub(crate) fn copy_to(&self, to: &Private, vma: Vma<'_>, start: u64) -> Result<Rss, Need> {
        let mut rss = Rss::ZERO;
        let mut full = MaybeUninit::<bindings::swp_entry_t>::zeroed();
        // SAFETY: both tables are alive, this one is locked, the other known to nobody else; `vma` is
        // stable and has this table at `start`.
        let error = unsafe {
            bindings::cow_pte_copy(
                vma.as_ptr(),
                start as usize,
                to.table.as_ptr(),
                self.table.as_ptr(),
                rss.0.as_mut_ptr(),
                full.as_mut_ptr(),
            )
        };
        match error {
            0 => Ok(rss),
            // SAFETY: zeroed, or written by the function.
            _ if error == EIO.to_errno() => Err(Need::SwapCount(unsafe { full.assume_init() })),
            _ => Err(Need::Time),
        }
    }
}

/// What copying a table lacked.
pub(crate) enum Need {
    /// Room for the count of a swap entry.
    SwapCount(bindings::swp_entry_t),
    /// Somebody to unlock a page that a device was using.
    Time,
}

impl Need {
    /// Gets it. Sleeps.
    pub(crate) fn provide(self) -> Result {
        match self {
            Need::SwapCount(entry) => {
                // SAFETY: no requirements but the context: no lock is held. An entry that is gone
                // meanwhile is found to be so.
                let error = unsafe { bindings::add_swap_count_continuation(entry, bindings::GFP_KERNEL) };
                if error < 0 {
                    return Err(ENOMEM);
                }
                Ok(())
            }
            Need::Time => {
                // SAFETY: no requirements but the context, as above.
                unsafe { bindings::schedule_timeout_uninterruptible(1) };
                Ok(())
            }
        }
    }
}

/// A table that nobody knows yet, to be an mm's own.
///
/// # Invariants
///
/// The descriptor is of a PTE table that was allocated for `mm` and that only this value knows.
pub(crate) struct Private {
    table: NonNull<bindings::ptdesc>,
    mm: Mm,
}

impl Private {
    /// Allocates one, empty. Sleeps.
    pub(crate) fn new(mm: Mm) -> Result<Self> {
        // SAFETY: the mm is alive.
        let table = unsafe { bindings::ptshare_table_alloc(mm.as_ptr()) };
        // INVARIANT: it was just allocated.
        NonNull::new(table)
            .map(|table| Private { table, mm })
            .ok_or(ENOMEM)
    }

    /// To be put into a PMD entry.
    pub(super) fn into_raw(self) -> *mut bindings::ptdesc {
        ManuallyDrop::new(self).table.as_ptr()
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // SAFETY: by the invariant nobody else knows the table.
        unsafe { bindings::ptshare_table_unalloc(self.mm.as_ptr(), self.table.as_ptr()) };
    }
}

impl Link {
    /// Gives back the unit of a table that a fork left shared; others use it, and it is locked.
    pub(crate) fn release_forked(self, locked: &Locked<'_>) {
        let left = count::release(&locked.table());
        if left < 1 {
            pr_err!("BUG: ptshare: a table lost its last sharer unnoticed\n");
        }
        core::mem::forget(self);
    }
}

/// The entries of a child, as empty as it is new, that go with a parent's.
///
/// # Invariants
///
/// `first` and the `count` entries from it on are in one table of the child's, which runs nowhere.
pub(crate) struct Blank {
    first: NonNull<bindings::pmd_t>,
    count: usize,
}

impl Blank {
    /// # Safety
    ///
    /// `first` and the `count` entries from it on are in one table of PMD entries, of an mm that a
    /// fork is making.
    pub(crate) unsafe fn new(first: NonNull<bindings::pmd_t>, count: usize) -> Self {
        // INVARIANT: as the caller promises.
        Blank { first, count }
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// One of them.
    ///
    /// # Safety
    ///
    /// `index` is below [`Blank::len`].
    pub(crate) unsafe fn at(&mut self, index: usize) -> BlankEntry<'_> {
        // SAFETY: in bounds, as the caller promises.
        // INVARIANT: it is one of those of an mm that runs nowhere as long as `self` is there.
        BlankEntry(unsafe { self.first.add(index) }, PhantomData)
    }
}

/// One of them.
///
/// # Invariants
///
/// It is alive during `'b`, in a table of an mm that runs nowhere yet.
pub(crate) struct BlankEntry<'b>(NonNull<bindings::pmd_t>, PhantomData<&'b mut Blank>);

impl BlankEntry<'_> {
    /// Points it at the table that the parent's entry points at, and write-protects both. What CPUs
    /// have cached of the parent's is the caller's to flush. The unit of the share count that
    /// [`Table::fork`] has made for the child is the entry's from now on.
    pub(crate) fn pair(self, parent: &mut Entry<'_, '_>) {
        // SAFETY: the parent's entry is alive and locked; the child's is alive, and nobody else uses
        // it, by the invariant.
        unsafe { bindings::cow_pte_pair(self.0.as_ptr(), parent.as_ptr()) };
    }
}

/// Has the running task been killed?
pub(crate) fn killed() -> bool {
    // SAFETY: no requirements.
    unsafe { bindings::cow_pte_killed() }
}

/// Counts an event.
pub(crate) fn count_event(event: bindings::vm_event_item) {
    // SAFETY: no requirements.
    unsafe { bindings::count_vm_event(event) };
}
