// SPDX-License-Identifier: GPL-2.0

//! The share count: how many PMD entries point at a table.
//!
//! ```text
//!            publish                link
//!   0 ─────────────────────▶ 1 ◀──────────────▶ 2, 3, …
//!   private  ◀─────────────        leave
//!            leave (take back)
//! ```
//!
//! A table with count 0 belongs to one mm and cannot be found. Lookup raises the count only from 1
//! up ([`link`]); the last sharer lowers it from 1 to 0 ([`leave`]), which makes the table its own.
//! Both are one atomic step, so exactly one of two that race wins: either the newcomer is a second
//! sharer and the leaver is not the last, or the newcomer finds nothing and makes a new table.
//!
//! Those who leave one table exclude each other by its PTE lock; those who link it do not take that
//! lock. So after [`leave`] has said [`Leave::Others`] the count may rise but not fall until
//! [`release`], and the leaver can clear its PMD entry and flush in between.
//!
//! A fork raises the count of a table that its parent's entry points at ([`fork`]): from 0 to 2, for
//! parent and child, or by one. Nobody but sharers forks, so a count of 1 does not rise behind the
//! back of the one who is left.

/// An atomic counter. What changes it is fully ordered, as in the kernel; a mere load need not be.
pub trait Counter {
    /// The count now.
    fn load(&self) -> i32;
    /// Sets the count to `new` if it is `old`; returns what it was.
    fn compare_exchange(&self, old: i32, new: i32) -> i32;
    /// Lowers the count by one and returns the new count.
    fn decrement(&self) -> i32;
}

/// What leaving a table means for the one who leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Leave {
    /// It was the last: the table is its own now.
    Last,
    /// Others use it: clear the entry, flush, then [`release`].
    Others,
}

/// Adds a sharer to a table that was found. False if the table is no longer shared.
// Out of line, for a fork of tables of the parent's own, which does not come here, has too few
// registers otherwise.
#[inline(never)]
pub fn link<C: Counter>(count: &C) -> bool {
    let mut seen = count.load();
    while seen > 0 {
        let was = count.compare_exchange(seen, seen + 1);
        if was == seen {
            return true;
        }
        seen = was;
    }
    false
}

/// Adds the child of a fork to those who use a table of the parent's, whose PMD entry nobody else
/// changes meanwhile. Calls `first` before, if the table is the parent's own until now.
pub fn fork<C: Counter>(count: &C, first: impl FnOnce()) {
    if count.load() == 0 {
        first();
        count.compare_exchange(0, 2);
    } else {
        // It does not fall to 0, for the parent uses it.
        link(count);
    }
}

/// Begins to leave. The caller is a sharer and holds the table's PTE lock.
pub fn leave<C: Counter>(count: &C) -> Leave {
    if count.load() == 1 && count.compare_exchange(1, 0) == 1 {
        Leave::Last
    } else {
        Leave::Others
    }
}

/// Ends leaving a table that others use, under the same PTE lock as [`leave`]. Returns how many
/// are left, which is never 0.
pub fn release<C: Counter>(count: &C) -> i32 {
    count.decrement()
}
