// SPDX-License-Identifier: GPL-2.0

//! Links in progress, as walks over all mappings of a file see them.
//!
//! Such a walk (unmapping a page that leaves the file, write-protecting it for writeback, putting
//! a migrated one back) goes from VMA to VMA, and links and leaves go on meanwhile. A table could
//! hide from it: linked by an mm that was visited already, left by the one that was yet to be. So
//! every link says when it begins, before it looks for a table, and when it has ended, after the
//! PMD entry is set. A walk that finds as many begun when it is over as had ended before it saw no
//! link at all in between: whoever is in a table then was in it all along and was visited, or was
//! the last to leave it and was visited with it.
//!
//! Files share the counters by hash; a walk that goes again for another file's sake does no harm.
//! After a few turns a walk holds links back: who is refused gets a table of its own.

use super::vma::File;
use crate::core_logic::key::bucket;
use core::sync::atomic::{AtomicUsize, Ordering::SeqCst};

const SLOTS: usize = 256;

struct Slot {
    begun: AtomicUsize,
    ended: AtomicUsize,
    held: AtomicUsize,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        begun: AtomicUsize::new(0),
        ended: AtomicUsize::new(0),
        held: AtomicUsize::new(0),
    }
}; SLOTS];

fn slot(file: File) -> &'static Slot {
    &TABLE[bucket(file.number(), 0, SLOTS)]
}

/// How many links of the file have ended. To be read before a walk.
pub(crate) fn ended(file: File) -> usize {
    slot(file).ended.load(SeqCst)
}

/// How many links of the file have begun. To be read after a walk.
pub(crate) fn begun(file: File) -> usize {
    slot(file).begun.load(SeqCst)
}

/// Holds back links of the file, or lets them go on. Calls are paired.
pub(crate) fn hold(file: File, hold: bool) {
    if hold {
        slot(file).held.fetch_add(1, SeqCst);
    } else {
        slot(file).held.fetch_sub(1, SeqCst);
    }
}

/// A link in progress: to be held from before a table is looked for until the entry is set.
#[must_use]
pub(crate) struct Linking(&'static Slot);

impl Linking {
    /// Begins. `None` while links of the file are held back.
    pub(crate) fn begin(file: File) -> Option<Self> {
        let slot = slot(file);
        if slot.held.load(SeqCst) != 0 {
            return None;
        }
        slot.begun.fetch_add(1, SeqCst);
        let linking = Linking(slot);
        // Held back in between: the walk counts this one and may go again, but no further.
        (slot.held.load(SeqCst) == 0).then_some(linking)
    }
}

impl Drop for Linking {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, SeqCst);
    }
}
