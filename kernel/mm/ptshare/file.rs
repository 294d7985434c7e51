// SPDX-License-Identifier: GPL-2.0

//! File tables: the PTEs of page-cache pages, shared by all who map the same granule of a file
//! with the same protection.
//!
//! A file table is written in place by whoever faults first, and holds no anonymous page, ever. So
//! leaving it loses no content: its pages come back from the page cache. Lost are marks of poisoned
//! pages, and that a page was mapped at all.

use crate::core_logic::count::{self, Leave};
use crate::core_logic::granule::{self, Granule};
use crate::core_logic::key::Key;
use crate::mode;
use crate::sys::entry::{Slot, Upper};
use crate::sys::flush;
use crate::sys::index::Chain;
use crate::sys::linking::Linking;
use crate::sys::table::{Locked, Table};
use crate::sys::vma::{Facts, Fault, File, Mm, Vma};

impl Facts {
    /// Would the mapping share tables now, whatever its place?
    fn eligible(&self) -> bool {
        self.page_cache && !self.excluded && mode().applies(self.explicit, self.asked)
    }

    /// The file and the granule around `addr`, if its table can be shared.
    fn granule(&self, addr: u64) -> Option<(File, Granule)> {
        if !self.eligible() {
            return None;
        }
        Some((self.file?, self.span.granule(addr)?))
    }

    fn key(&self, granule: Granule) -> Key {
        Key::new(granule, self.class)
    }
}

/// A fault found no table: links the file's, if there is one, and those of the granules around it.
///
/// Returns whether the fault's entry has something in it now.
pub(crate) fn link(fault: &Fault<'_>) -> bool {
    let facts = fault.vma().facts();
    let Some((file, granule)) = facts.granule(fault.address()) else {
        return false;
    };
    let mut upper = fault.upper(facts.mm);
    let Some(_linking) = Linking::begin(file) else {
        return false;
    };
    let vma = fault.vma();
    if !link_one(&mut upper, vma, file, granule, &facts) {
        return false;
    }
    for start in facts.span.window(granule.start) {
        if let Some(neighbour) = facts.span.granule(start) {
            link_one(&mut upper, vma, file, neighbour, &facts);
        }
    }
    true
}

/// Links one granule's table, if it exists, unless a huge page can be mapped instead. Returns whether
/// the entry has something in it now.
fn link_one(
    upper: &mut Upper<'_>,
    vma: Vma<'_>,
    file: File,
    granule: Granule,
    facts: &Facts,
) -> bool {
    let Some(mut entry) = upper.entry(granule.start) else {
        return false;
    };
    if !matches!(entry.slot(), Slot::Empty) {
        return true;
    }
    if vma.is_huge(granule.start) {
        return false;
    }
    let found =
        Chain::lock(file, granule.index).and_then(|chain| chain.find(file, facts.key(granule)));
    match found {
        Some(link) => {
            entry.set(link);
            true
        }
        None => false,
    }
}

/// A fault is about to install the table that it allocated: publishes it, or links the one that
/// somebody else has published since.
///
/// Returns whether the fault's entry has something in it now; the fault keeps its table when that
/// was not needed. Takes only spinlocks and allocates nothing.
pub(crate) fn install(fault: &mut Fault<'_>) -> bool {
    let facts = fault.vma().facts();
    let Some((file, granule)) = facts.granule(fault.address()) else {
        return false;
    };
    let mut upper = fault.upper(facts.mm);
    let Some(mut entry) = upper.entry(granule.start) else {
        return false;
    };
    if !matches!(entry.slot(), Slot::Empty) {
        return true;
    }
    let Some(_linking) = Linking::begin(file) else {
        return false;
    };
    let Some(mut chain) = Chain::lock(file, granule.index) else {
        return false;
    };
    let key = facts.key(granule);
    let link = match chain.find(file, key) {
        Some(link) => link,
        None => match fault.fresh() {
            Some(fresh) => chain.insert(fresh, file, key),
            None => return false,
        },
    };
    drop(chain);
    entry.set(link);
    true
}

/// Leaves the table of the granule at `start`, if it is shared: either the entry is cleared and
/// what this mm has cached of it flushed, or this was the last sharer and the table is its own.
///
/// Returns whether the entry was cleared.
pub(crate) fn leave(upper: &mut Upper<'_>, start: u64) -> bool {
    let mm = upper.mm();
    let Some(mut entry) = upper.entry(start) else {
        return false;
    };
    let Slot::Table(table) = entry.slot() else {
        return false;
    };
    if !table.is_shared() || table.is_forked() {
        return false;
    }
    let locked = table.lock();
    match count::leave(&table) {
        Leave::Last => {
            take_back(&locked, mm);
            false
        }
        Leave::Others => {
            entry.clear(&locked).flush().release(&locked, mm);
            true
        }
    }
}

/// The mm has brought the count to 0: makes the table an ordinary one of its own.
fn take_back(locked: &Locked<'_>, mm: Mm) {
    let table: Table<'_> = locked.table();
    let (file, key) = table.identity();
    if let Some(mut chain) = Chain::lock(file, key.index()) {
        chain.remove(table);
    }
    // Its PTEs may have been cleared on behalf of sharers with the flush put off: this mm's own
    // bookkeeping knows nothing of that.
    flush::pending();
    locked.give_to(mm, file);
}

/// Leaves every shared table that the mapping links in `from..to`.
pub(crate) fn leave_range(vma: Vma<'_>, from: u64, to: u64) {
    let facts = vma.facts();
    if !facts.page_cache || facts.mm.links() == 0 {
        return;
    }
    vma.each_granule(&facts, from, to, |start| {
        if let Some(mut upper) = vma.upper(facts.mm, start) {
            leave(&mut upper, start);
        }
        true
    });
}

/// Drops tables that are the mm's own where it could share, in the granules that `from..to`
/// touches, so that the next fault links the shared ones. If `zap`, also those with pages in them,
/// where there is one to link or all of the granule has changed; otherwise only empty ones.
///
/// # Safety
///
/// The mm's lock is held, for write if `zap`.
pub(crate) unsafe fn rejoin_range(vma: Vma<'_>, from: u64, to: u64, zap: bool) {
    let facts = vma.facts();
    if !facts.eligible() {
        return;
    }
    vma.each_granule(&facts, from, to, |start| {
        let Some((file, granule)) = facts.granule(start) else {
            return true;
        };
        if drop_own(vma, facts.mm, start) || !zap {
            return true;
        }
        let whole = from <= start && to.saturating_sub(start) >= granule::GRANULE;
        let wanted = whole
            || Chain::lock(file, granule.index)
                .is_some_and(|chain| chain.has(file, facts.key(granule)));
        if wanted && holds_pages(vma, facts.mm, start) {
            // SAFETY: the mm's lock is held; eligible mappings show the page cache.
            unsafe { vma.zap(start) };
            drop_own(vma, facts.mm, start);
        }
        true
    });
}

/// Frees the granule's table if it is the mm's own and empty. Returns whether there is none now, or
/// one that may not be dropped.
fn drop_own(vma: Vma<'_>, mm: Mm, start: u64) -> bool {
    let Some(mut upper) = vma.upper(mm, start) else {
        return true;
    };
    let Some(mut entry) = upper.entry(start) else {
        return true;
    };
    let Slot::Table(table) = entry.slot() else {
        return true;
    };
    if table.is_shared() {
        return true;
    }
    let locked = table.lock();
    if locked.is_empty() {
        entry.free(locked);
        return true;
    }
    false
}

/// Has the granule's table, the mm's own, nothing in it but pages?
fn holds_pages(vma: Vma<'_>, mm: Mm, start: u64) -> bool {
    let Some(mut upper) = vma.upper(mm, start) else {
        return false;
    };
    let Some(entry) = upper.entry(start) else {
        return false;
    };
    match entry.slot() {
        Slot::Table(table) => !table.is_shared() && table.lock().can_be_dropped(),
        _ => false,
    }
}

/// Makes every mapping of the mm share that should now, and those leave that should not.
pub(crate) fn review(mm: Mm) {
    mm.for_each_vma_locked(|vma| {
        let facts = vma.facts();
        if facts.eligible() {
            // SAFETY: the mm's lock is held for write.
            unsafe { rejoin_range(vma, facts.span.start, facts.span.end, true) };
        } else {
            leave_range(vma, facts.span.start, facts.span.end);
        }
    });
}
