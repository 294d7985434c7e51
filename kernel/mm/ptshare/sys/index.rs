// SPDX-License-Identifier: GPL-2.0

//! Where shared tables are found: a hash table by file and granule.
//!
//! The chains run through the tables' own descriptors, so that publishing a table allocates
//! nothing. All tables of one granule, whatever their class, are on one chain.

use super::table::{next_field, Fresh, Link, Table};
use super::vma::{File, Page};
use crate::core_logic::count::{self, Counter};
use crate::core_logic::granule::ENTRIES;
use crate::core_logic::key::{bucket, Key};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use kernel::bindings;
use kernel::prelude::*;

static BUCKETS: AtomicPtr<bindings::ptshare_bucket> = AtomicPtr::new(ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Allocates the index, once: a bucket for every two granules of memory.
pub(crate) fn init() -> Result {
    // SAFETY: no requirements.
    let granules = unsafe { bindings::totalram_pages() } as usize / ENTRIES;
    let count = (granules / 2).next_power_of_two().clamp(256, 1 << 16);
    // SAFETY: no requirements.
    let buckets = unsafe { bindings::ptshare_alloc_buckets(count) };
    if buckets.is_null() {
        return Err(ENOMEM);
    }
    COUNT.store(count, Ordering::Relaxed);
    BUCKETS.store(buckets, Ordering::Release);
    Ok(())
}

/// A chain of the index, locked.
///
/// # Invariants
///
/// The pointer is to a bucket of the index, whose lock is held.
pub(crate) struct Chain(NonNull<bindings::ptshare_bucket>);

impl Chain {
    /// Locks the chain of one granule of a file. `None` before the index is there.
    pub(crate) fn lock(file: File, index: u64) -> Option<Chain> {
        let buckets = NonNull::new(BUCKETS.load(Ordering::Acquire))?;
        let count = COUNT.load(Ordering::Relaxed);
        // SAFETY: the number is below `count`, which is how many buckets there are.
        let bucket = unsafe { buckets.add(bucket(file.number(), index, count)) };
        // SAFETY: buckets are initialized with the index and never freed.
        unsafe { bindings::spin_lock(&raw mut (*bucket.as_ptr()).lock) };
        // INVARIANT: the lock was just taken.
        Some(Chain(bucket))
    }

    fn tables(&self) -> impl Iterator<Item = Table<'_>> {
        // SAFETY: the lock is held, by the invariant; a table leaves the chain before it is freed,
        // so all that are on it are alive as long as the lock is held.
        let mut next = unsafe { (*self.0.as_ptr()).first };
        core::iter::from_fn(move || {
            let ptdesc = NonNull::new(next)?;
            // SAFETY: as above.
            unsafe {
                next = *next_field(ptdesc.as_ptr());
                Some(Table::from_raw(ptdesc))
            }
        })
    }

    /// Adds a sharer to the table of this file and key, if there is one.
    pub(crate) fn find(&self, file: File, key: Key) -> Option<Link> {
        self.tables()
            .filter(|table| table.identity() == (file, key))
            .find(count::link)
            // SAFETY: `count::link` has raised the count for this link.
            .map(|table| unsafe { Link::from_table(table) })
    }

    /// Puts a new table, of this file and key, into the chain.
    pub(crate) fn insert(&mut self, fresh: Fresh<'_>, file: File, key: Key) -> Link {
        let link = fresh.share(file, key);
        let ptdesc = link.table().as_ptr();
        // SAFETY: the lock is held, by the invariant; the table is alive and in no chain.
        unsafe {
            let first = &raw mut (*self.0.as_ptr()).first;
            *next_field(ptdesc) = *first;
            *first = ptdesc;
        }
        link
    }

    /// Is there a table of this file and key?
    pub(crate) fn has(&self, file: File, key: Key) -> bool {
        self.tables().any(|table| table.identity() == (file, key))
    }

    /// Takes a table out, whose count is 0.
    pub(crate) fn remove(&mut self, table: Table<'_>) {
        // SAFETY: the lock is held, by the invariant, so every place on the chain is alive.
        unsafe {
            let mut place = &raw mut (*self.0.as_ptr()).first;
            while !(*place).is_null() {
                if *place == table.as_ptr() {
                    *place = *next_field(table.as_ptr());
                    *next_field(table.as_ptr()) = ptr::null_mut();
                    return;
                }
                place = next_field(*place);
            }
        }
        pr_err!("BUG: ptshare: a shared table was not in the index\n");
    }

    /// How many processes map `page` through shared tables, beyond one for each such table.
    pub(crate) fn extra_mappers(&self, file: File, page: &Page) -> i32 {
        self.tables()
            .filter(|table| {
                let (mapped, key) = table.identity();
                mapped == file
                    && key.index() == page.granule()
                    && table.maps(page.entry(), page.as_ptr())
            })
            .map(|table| (table.load() - 1).max(0))
            .sum()
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        // SAFETY: the lock is held, by the invariant.
        unsafe { bindings::spin_unlock(&raw mut (*self.0.as_ptr()).lock) };
    }
}
