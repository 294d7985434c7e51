// SPDX-License-Identifier: GPL-2.0

//! Fork tables: last-level tables that a fork leaves shared between parent and child.
//!
//! All entries that point at one are write-protected, so that the CPU refuses writes whatever the
//! PTEs say. No sharer changes a PTE on its own behalf. Who wants to write copies the table first,
//! which is when what fork does for every page is done for these 512; who is the last to use it
//! takes it back instead, with nothing to copy. Leaving without a copy loses what is in it, so only
//! those do who unmap it.
//!
//! # Whose rss
//!
//! The pages of a table stay in the counters of the mm that had it before the fork, its *owner*, as
//! long as that uses it; others *borrow*. So a fork has nothing to count, nor has the exit of a child
//! that wrote nothing. What reclaim changes in the table it changes in the owner's counters.
//!
//! | | owner | borrower |
//! |---|---|---|
//! | copies the table | nothing: what it had it has | adds what it copied |
//! | takes it back | nothing | adds what is in it |
//! | unmaps it | subtracts what is in it; the table is unowned | nothing |
//!
//! # Exclusive pages
//!
//! A page that was the parent's alone stays marked so: exclusive to the *table*. Copying clears the
//! mark. Taking back finds it true again unless somebody who has left still refers to the page, from
//! before the fork or since: then the mark is cleared. Pins rely on it, so GUP copies before it pins.

use crate::core_logic::count::{self, Leave};
use crate::sys::cow::{count_event, killed, Blank, Private};
use crate::sys::entry::{Entry, Slot, Upper};
use crate::sys::flush;
use crate::sys::table::Locked;
use crate::sys::vma::{Mm, Vma};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::bindings;
use kernel::prelude::*;

/// `vm.odf_default`.
static DEFAULT: AtomicBool = AtomicBool::new(false);

/// Do forks share tables in processes that have not said?
pub(crate) fn default() -> bool {
    DEFAULT.load(Ordering::Relaxed)
}

/// Sets what processes do that have not said.
pub(crate) fn set_default(wanted: bool) {
    DEFAULT.store(wanted, Ordering::Relaxed);
}

/// Do forks of this mm share tables?
pub(crate) fn uses(mm: Mm) -> bool {
    if mm.odf_flag(bindings::MMF_ODF_CHOSEN) {
        mm.odf_flag(bindings::MMF_ODF)
    } else {
        default()
    }
}

/// Is a fork of this mm with these flags of clone3(2) to share tables?
pub(crate) fn wanted(mm: Mm, flags: u64) -> bool {
    if flags & bindings::CLONE_NO_ODF != 0 {
        false
    } else {
        flags & bindings::CLONE_ODF != 0 || uses(mm)
    }
}

/// Shares the tables from `start` on with the child that `blank` belongs to, up to the first entry
/// that does not point at one. Returns how many.
///
/// The parent's mapping is locked against faults.
pub(crate) fn share(upper: &mut Upper<'_>, child: Mm, blank: &mut Blank, start: u64) -> usize {
    let parent = upper.mm();
    // Read after the lock was taken, which orders it after what tells GUP-fast that a fork is under
    // way: a pin that this does not see is given up.
    if parent.odf_flag(bindings::MMF_HAS_PINNED) {
        return 0;
    }
    let shared = upper.each_with(start, blank, |entry, blank| {
        let Slot::Table(table) = entry.slot() else {
            return false;
        };
        table.fork(parent);
        blank.pair(entry);
        true
    });
    if shared != 0 {
        parent.shared_with(child, shared);
    }
    shared
}

/// Makes the table that `vma` uses at `start` its mm's own, if a fork left it shared.
///
/// Sleeps. Fails with `ENOMEM`.
pub(crate) fn unshare(vma: Vma<'_>, mm: Mm, start: u64) -> Result {
    let mut fresh: Option<Private> = None;
    loop {
        let mut need = None;
        {
            let Some(mut upper) = vma.upper(mm, start) else {
                return Ok(());
            };
            let Some(mut entry) = upper.entry(start) else {
                return Ok(());
            };
            let Some(table) = entry.forked() else {
                return Ok(());
            };
            let locked = table.lock();
            if count::leave(&table) == Leave::Last {
                take_back(&mut entry, &locked, mm);
                return Ok(());
            }
            if let Some(own) = fresh.take() {
                match locked.copy_to(&own, vma, start) {
                    Ok(rss) => {
                        if locked.is_owned_by(mm) {
                            locked.set_unowned();
                        } else {
                            mm.owns_borrowed(&rss);
                        }
                        entry
                            .replace(&locked, own)
                            .flush()
                            .release_forked(&locked);
                        count_event(bindings::vm_event_item_ODF_TABLE_COPIED);
                        return Ok(());
                    }
                    Err(lacks) => {
                        fresh = Some(own);
                        need = Some(lacks);
                    }
                }
            }
        }
        match need {
            Some(need) => need.provide()?,
            None => fresh = Some(Private::new(mm)?),
        }
    }
}

/// Makes all tables its mm's own that `vma` uses in `from..to`.
///
/// Sleeps. Fails as [`unshare`] does, and with `EINTR` if the task is killed; those before are unshared
/// then.
pub(crate) fn unshare_range(vma: Vma<'_>, from: u64, to: u64) -> Result {
    let facts = vma.facts();
    let mut result = Ok(());
    vma.each_granule(&facts, from, to, |start| {
        // Who is killed for its memory is to give some back, and not to take a table for each of
        // many granules first while others wait for the mm's lock.
        result = if killed() {
            Err(EINTR)
        } else {
            unshare(vma, facts.mm, start)
        };
        result.is_ok()
    });
    result
}

/// Unmaps the table that an entry points at from its mm, if a fork left it shared: either the entry
/// is cleared, and [`flush::leave_ends`] is the caller's to call, or this was the last sharer and the
/// table is its own.
///
/// Returns whether the entry was cleared.
pub(crate) fn leave(upper: &mut Upper<'_>, start: u64) -> bool {
    let mm = upper.mm();
    let Some(mut entry) = upper.entry(start) else {
        return false;
    };
    let Some(table) = entry.forked() else {
        return false;
    };
    let locked = table.lock();
    match count::leave(&table) {
        Leave::Last => {
            take_back(&mut entry, &locked, mm);
            false
        }
        Leave::Others => {
            if locked.is_owned_by(mm) {
                mm.disowns(&locked.rss());
                locked.set_unowned();
            } else {
                mm.borrows(-1);
            }
            flush::leave_begins();
            entry.clear(&locked).defer().release_forked(&locked);
            true
        }
    }
}

/// The mm has brought the count to 0: makes the table an ordinary one of its own.
fn take_back(entry: &mut Entry<'_, '_>, locked: &Locked<'_>, mm: Mm) {
    // What was cleared on behalf of others, and what others have just left.
    flush::pending();
    if !locked.is_owned_by(mm) {
        mm.owns_borrowed(&locked.rss());
    }
    locked.set_unowned();
    // Who unmaps it has threads, too, that may write until it is unmapped.
    if !mm.exits() {
        locked.settle(mm, entry.start());
    }
    entry.unprotect();
    count_event(bindings::vm_event_item_ODF_TABLE_REUSED);
}
