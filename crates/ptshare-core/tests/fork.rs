// SPDX-License-Identifier: GPL-2.0-only

//! The share count's protocol at fork in every interleaving, with loom.
//!
//! Around the kernel's functions the test rebuilds what `fork.rs` and rmap do with them: PMD
//! entries that are read-only while a table is shared, copies and take-backs under the PTE lock,
//! exits whose flush is put off, reclaim that changes a table in place for all who use it. What a
//! process reads is predicted exactly, each page is in exactly one rss, and each table is freed
//! once. As in `count.rs` the second half breaks one rule at a time, and loom must find it.

#![cfg(not(miri))]

mod model;

use loom::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use loom::sync::Mutex;
use model::{check, race, Breaks, Tracked};
use ptshare_core::count::{self, Counter, Leave};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::Arc;

/// A rule that a variant of the protocol breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    /// None: the kernel's protocol.
    None,
    /// The count is looked at and then set, in two steps.
    TornExchange,
    /// The owner is written after the table became shared.
    OwnerAfterCount,
    /// An owner that leaves stays the owner.
    OwnerStays,
    /// The parent's CPUs are not made to forget that they may write.
    ForkUnflushed,
    /// Who copies does not take the PTE lock.
    CopyUnlocked,
    /// The count falls before the entry points at the copy and is flushed.
    ReleaseFirst,
    /// Who takes a table back does not flush what others have just left.
    IgnorePending,
    /// Who is the last writes, and does not make the table its own first.
    LastByLook,
}

impl Breaks for Bug {
    fn tears_exchange(&self) -> bool {
        *self == Bug::TornExchange
    }
}

/// A last-level table with its descriptor.
struct Table {
    id: usize,
    count: model::Count<Bug>,
    /// The PTE lock.
    lock: Mutex<()>,
    /// Whose rss its pages are in while it is shared.
    owner: Tracked<Option<usize>>,
    /// How many of its pages are in memory.
    pages: Tracked<i32>,
    /// What is written there.
    content: Tracked<u32>,
    /// How often it was freed. Bookkeeping that synchronizes nothing.
    freed: AtomicU32,
}

impl Table {
    fn assert_alive(&self) {
        assert_eq!(self.freed.load(Relaxed), 0, "a freed table is reached");
    }
}

/// An address space with room for one table.
struct Mm {
    id: usize,
    /// The lock of the PMD entry. Who holds it may change the entry.
    lock: Mutex<()>,
    /// The entry as the MMU and rmap see it: 0, or twice the table's number, and 1 if writable.
    entry: AtomicUsize,
    /// A CPU's access in progress, with what its TLB has: a flush waits until it is over.
    access: Mutex<()>,
    /// Pages that it is charged for.
    rss: AtomicI32,
}

impl Mm {
    fn flush(&self) {
        drop(self.access.lock().unwrap());
    }

    fn charge(&self, pages: i32) {
        self.rss.fetch_add(pages, Ordering::Relaxed);
    }
}

/// All there is.
struct World {
    mms: Vec<Mm>,
    tables: std::sync::Mutex<Vec<Arc<Table>>>,
    /// How many have left a table and not flushed yet.
    leaving: AtomicI32,
    bug: Bug,
}

/// What a table has in it at first.
const FIRST: u32 = 1;
const PAGES: i32 = 2;

impl World {
    /// As many mms as said. The first has a table of its own, the others are empty.
    fn new(mms: usize, bug: Bug) -> Arc<Self> {
        let mm = |id| Mm {
            id,
            lock: Mutex::new(()),
            entry: AtomicUsize::new(0),
            access: Mutex::new(()),
            rss: AtomicI32::new(0),
        };
        let world = World {
            mms: (0..mms).map(mm).collect(),
            tables: std::sync::Mutex::new(Vec::new()),
            leaving: AtomicI32::new(0),
            bug,
        };
        let table = world.table(FIRST, PAGES);
        world.mms[0]
            .entry
            .store(table.id * 2 + 1, Ordering::Release);
        world.mms[0].charge(PAGES);
        Arc::new(world)
    }

    /// A new table, nobody's yet.
    fn table(&self, content: u32, pages: i32) -> Arc<Table> {
        let mut tables = self.tables.lock().unwrap();
        let table = Arc::new(Table {
            id: tables.len() + 1,
            count: model::Count::new(0, self.bug),
            lock: Mutex::new(()),
            owner: Tracked::new(None),
            pages: Tracked::new(pages),
            content: Tracked::new(content),
            freed: AtomicU32::new(0),
        });
        tables.push(table.clone());
        table
    }

    /// The table that an entry points at, and whether it lets write.
    fn at(&self, entry: usize) -> Option<(Arc<Table>, bool)> {
        let index = (entry / 2).checked_sub(1)?;
        Some((self.tables.lock().unwrap()[index].clone(), entry % 2 == 1))
    }

    /// `share`: the parent's faults and other forks are locked out.
    fn fork(&self, parent: usize, child: usize) {
        let (parent, child) = (&self.mms[parent], &self.mms[child]);
        let lock = parent.lock.lock().unwrap();
        let Some((table, _)) = self.at(parent.entry.load(Ordering::Relaxed)) else {
            return;
        };
        let own = || table.owner.set(Some(parent.id));
        if self.bug == Bug::OwnerAfterCount {
            let mut first = false;
            count::fork(&table.count, || first = true);
            if first {
                own();
            }
        } else {
            count::fork(&table.count, own);
        }
        child.entry.store(table.id * 2, Ordering::Release);
        parent.entry.store(table.id * 2, Ordering::Release);
        drop(lock);
        if self.bug != Bug::ForkUnflushed {
            parent.flush();
        }
    }

    /// The last has brought the count to 0.
    fn take_back(&self, mm: &Mm, table: &Table) {
        if self.bug != Bug::IgnorePending && self.leaving.load(Ordering::Acquire) > 0 {
            self.mms.iter().for_each(Mm::flush);
        }
        if table.owner.get() != Some(mm.id) {
            mm.charge(table.pages.get());
        }
        table.owner.set(None);
        mm.entry.store(table.id * 2 + 1, Ordering::Release);
    }

    fn leave_count(&self, table: &Table) -> Leave {
        match self.bug {
            Bug::LastByLook if table.count.now() == 1 => Leave::Last,
            Bug::LastByLook => Leave::Others,
            _ => count::leave(&table.count),
        }
    }

    /// Makes the table the mm's own. Whether it was copied.
    fn unshare(&self, mm: usize) -> Option<bool> {
        let mm = &self.mms[mm];
        let _lock = mm.lock.lock().unwrap();
        let (table, writable) = self.at(mm.entry.load(Ordering::Relaxed))?;
        if table.count.load() <= 0 {
            assert!(writable, "read-only, and nobody shares it");
            return None;
        }
        let locked = (self.bug != Bug::CopyUnlocked).then(|| table.lock.lock().unwrap());
        if self.leave_count(&table) == Leave::Last {
            self.take_back(mm, &table);
            return Some(false);
        }
        let release = || assert!(count::release(&table.count) >= 1, "left unnoticed");
        let own = self.table(table.content.get(), table.pages.get());
        if table.owner.get() == Some(mm.id) {
            table.owner.set(None);
        } else {
            mm.charge(own.pages.get());
        }
        let locked = match self.bug {
            Bug::ReleaseFirst => {
                release();
                // Others get on with what they take for theirs.
                drop(locked);
                None
            }
            _ => locked,
        };
        mm.entry.store(own.id * 2 + 1, Ordering::Release);
        mm.flush();
        if self.bug != Bug::ReleaseFirst {
            release();
        }
        drop(locked);
        Some(true)
    }

    /// The process ends: it leaves the table, and frees it if it is its own.
    fn exit(&self, mm: usize) {
        let mm = &self.mms[mm];
        let lock = mm.lock.lock().unwrap();
        let Some((table, _)) = self.at(mm.entry.load(Ordering::Relaxed)) else {
            return;
        };
        if table.count.load() > 0 {
            let _locked = table.lock.lock().unwrap();
            match self.leave_count(&table) {
                Leave::Last => self.take_back(mm, &table),
                Leave::Others => {
                    if table.owner.get() == Some(mm.id) {
                        mm.charge(-table.pages.get());
                        if self.bug != Bug::OwnerStays {
                            table.owner.set(None);
                        }
                    }
                    self.leaving.fetch_add(1, Ordering::AcqRel);
                    mm.entry.store(0, Ordering::Release);
                    assert!(count::release(&table.count) >= 1, "left unnoticed");
                }
            }
        }
        if mm.entry.load(Ordering::Relaxed) == 0 {
            drop(lock);
            mm.flush();
            self.leaving.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        {
            let _locked = table.lock.lock().unwrap();
            mm.charge(-table.pages.get());
            table.pages.set(0);
            mm.entry.store(0, Ordering::Release);
        }
        mm.flush();
        assert_eq!(table.freed.fetch_add(1, Relaxed), 0, "freed twice");
        assert_eq!(table.count.now(), 0, "freed while it is shared");
        table.content.set(u32::MAX);
    }

    /// Reclaim takes a page from the first mm of a list, and so from all who use its table.
    fn reclaim(&self, mms: &[usize]) {
        for mm in mms.iter().map(|&mm| &self.mms[mm]) {
            let entry = mm.entry.load(Ordering::Acquire);
            let Some((table, _)) = self.at(entry) else {
                continue;
            };
            let _locked = table.lock.lock().unwrap();
            // The rights in the entry do not matter, but what it points at.
            if mm.entry.load(Ordering::Acquire) / 2 != entry / 2 {
                continue;
            }
            table.assert_alive();
            if table.pages.get() == 0 {
                continue;
            }
            table.pages.set(table.pages.get() - 1);
            let owner = match table.count.load() > 0 {
                true => table.owner.get(),
                false => Some(mm.id),
            };
            if let Some(owner) = owner {
                self.mms[owner].charge(-1);
            }
            return;
        }
    }

    /// A CPU reads.
    fn read(&self, mm: usize) -> Option<u32> {
        let mm = &self.mms[mm];
        let _access = mm.access.lock().unwrap();
        let (table, _) = self.at(mm.entry.load(Ordering::Acquire))?;
        table.assert_alive();
        Some(table.content.get())
    }

    /// A CPU writes, if the entry lets it.
    fn try_write(&self, mm: usize, content: u32) -> bool {
        let mm = &self.mms[mm];
        let _access = mm.access.lock().unwrap();
        let (table, writable) = self.at(mm.entry.load(Ordering::Acquire)).unwrap();
        if writable {
            table.assert_alive();
            table.content.set(content);
        }
        writable
    }

    /// A process writes: a fault makes the table its own where the CPU refuses.
    fn write(&self, mm: usize, content: u32) {
        while !self.try_write(mm, content) {
            self.unshare(mm);
        }
    }

    /// All processes end; nothing is left then.
    fn end(&self) {
        (0..self.mms.len()).for_each(|mm| self.exit(mm));
        for mm in &self.mms {
            let rss = mm.rss.load(Ordering::Relaxed);
            assert_eq!(rss, 0, "bad rss of mm {}", mm.id);
        }
        for table in &*self.tables.lock().unwrap() {
            assert_eq!(table.freed.load(Relaxed), 1, "freed once");
        }
    }
}

/// A thread that does something with the world.
type Act = Box<dyn Fn(&World) + Send>;

/// Does all that at once, after the first mm has forked the second.
fn at_once(mms: usize, bug: Bug, acts: Vec<Act>) -> Arc<World> {
    let world = World::new(mms, bug);
    world.fork(0, 1);
    let threads = acts.into_iter().map(|act| thread!(world; act(&world)));
    race(threads.collect());
    world
}

/// Parent and child write.
fn both_write(bug: Bug) {
    let world = at_once(
        2,
        bug,
        vec![Box::new(|w| w.write(0, 10)), Box::new(|w| w.write(1, 11))],
    );
    assert_eq!((world.read(0), world.read(1)), (Some(10), Some(11)));
    assert_eq!(world.tables.lock().unwrap().len(), 2, "copied once");
    world.end();
}

#[test]
fn parent_and_child_write_at_once() {
    check(3, || both_write(Bug::None));
}

/// The parent writes while the child, which has read, ends with its flush put off.
fn write_while_child_ends(bug: Bug) {
    let world = at_once(
        2,
        bug,
        vec![
            Box::new(|w| w.write(0, 10)),
            Box::new(|w| w.exit(1)),
            Box::new(|w| assert!(matches!(w.read(1), None | Some(FIRST)), "read the parent's")),
        ],
    );
    assert_eq!(world.read(0), Some(10));
    world.end();
}

#[test]
fn the_parent_writes_while_the_child_ends() {
    check(2, || write_while_child_ends(Bug::None));
}

/// The owner ends while the child writes and reclaim takes a page.
fn owner_ends(bug: Bug) {
    let world = at_once(
        2,
        bug,
        vec![
            Box::new(|w| w.exit(0)),
            Box::new(|w| w.write(1, 11)),
            Box::new(|w| w.reclaim(&[0, 1])),
        ],
    );
    assert_eq!(world.read(1), Some(11));
    world.end();
}

#[test]
fn the_owner_ends_while_the_child_writes_and_reclaim_takes_a_page() {
    check(2, || owner_ends(Bug::None));
}

/// The owner has ended; reclaim takes a page of what nobody is charged for.
fn reclaim_unowned(bug: Bug) {
    let world = World::new(3, bug);
    world.fork(0, 1);
    world.fork(0, 2);
    world.exit(0);
    race(vec![
        thread!(world; world.reclaim(&[1, 2])),
        thread!(world; world.write(2, 12)),
    ]);
    assert_eq!((world.read(1), world.read(2)), (Some(FIRST), Some(12)));
    world.end();
}

#[test]
fn reclaim_takes_a_page_that_nobody_owns() {
    check(3, || reclaim_unowned(Bug::None));
}

/// A child copies while reclaim takes a page.
fn copy_and_reclaim(bug: Bug) {
    let world = at_once(
        2,
        bug,
        vec![
            Box::new(|w| w.write(1, 11)),
            Box::new(|w| w.reclaim(&[0, 1])),
        ],
    );
    assert_eq!((world.read(0), world.read(1)), (Some(FIRST), Some(11)));
    world.end();
}

#[test]
fn a_child_copies_while_reclaim_takes_a_page() {
    check(None, || copy_and_reclaim(Bug::None));
}

/// The parent forks once more while its first child does something.
fn fork_again(bug: Bug, act: fn(&World)) {
    let world = at_once(3, bug, vec![Box::new(|w| w.fork(0, 2)), Box::new(act)]);
    world.write(2, 12);
    world.write(0, 10);
    assert_eq!((world.read(0), world.read(2)), (Some(10), Some(12)));
    world.end();
}

#[test]
fn a_second_fork_while_the_first_child_ends() {
    check(3, || fork_again(Bug::None, |w| w.exit(1)));
}

#[test]
fn a_second_fork_while_the_first_child_writes() {
    check(3, || fork_again(Bug::None, |w| w.write(1, 11)));
}

#[test]
fn a_second_fork_while_the_first_child_forks() {
    check(3, || {
        let world = at_once(
            4,
            Bug::None,
            vec![Box::new(|w| w.fork(0, 2)), Box::new(|w| w.fork(1, 3))],
        );
        (0..4).for_each(|mm| world.write(mm, 10 + mm as u32));
        (0..4).for_each(|mm| assert_eq!(world.read(mm as usize), Some(10 + mm)));
        world.end();
    });
}

#[test]
fn a_fork_while_reclaim_takes_a_page() {
    check(None, || fork_and_reclaim(Bug::None));
}

/// The first fork while reclaim takes a page of the parent's.
fn fork_and_reclaim(bug: Bug) {
    let world = World::new(2, bug);
    race(vec![
        thread!(world; world.fork(0, 1)),
        thread!(world; world.reclaim(&[0])),
    ]);
    world.end();
}

/// A thread of the parent writes while another forks: the child has what was there before, or what
/// was written before the fork was over, and that does not change any more.
fn write_while_forking(bug: Bug) {
    let world = World::new(2, bug);
    race(vec![
        thread!(world; {
            world.fork(0, 1);
            let forked = world.read(1);
            assert_eq!(world.read(1), forked, "changed after the fork");
        }),
        thread!(world; { world.try_write(0, 10); }),
    ]);
    world.end();
}

#[test]
fn a_thread_writes_while_another_forks() {
    check(None, || write_while_forking(Bug::None));
}

/// Three share a table and write at once: two copy it, the last takes it back.
#[test]
fn of_three_who_write_the_last_takes_the_table_back() {
    check(2, || {
        let world = World::new(3, Bug::None);
        world.fork(0, 1);
        world.fork(1, 2);
        race(
            (0..3)
                .map(|mm| thread!(world; world.write(mm, 10 + mm as u32)))
                .collect(),
        );
        (0..3).for_each(|mm| assert_eq!(world.read(mm as usize), Some(10 + mm)));
        assert_eq!(world.tables.lock().unwrap().len(), 3, "copied twice");
        world.end();
    });
}

// The protocol broken: what the above is worth.

#[test]
#[should_panic(expected = "freed while it is shared")]
fn loom_finds_a_last_sharer_by_look() {
    check(3, || both_write(Bug::LastByLook));
}

#[test]
#[should_panic(expected = "read-only, and nobody shares it")]
fn loom_finds_a_torn_exchange() {
    check(3, || fork_again(Bug::TornExchange, |w| w.exit(1)));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_an_owner_written_too_late() {
    check(None, || fork_and_reclaim(Bug::OwnerAfterCount));
}

#[test]
#[should_panic(expected = "bad rss")]
fn loom_finds_an_owner_that_has_ended() {
    check(3, || reclaim_unowned(Bug::OwnerStays));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_a_parent_that_goes_on_writing() {
    check(None, || write_while_forking(Bug::ForkUnflushed));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_a_copy_without_the_lock() {
    check(None, || copy_and_reclaim(Bug::CopyUnlocked));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_a_count_that_falls_before_the_copy_is_in_place() {
    check(3, || {
        let world = at_once(
            2,
            Bug::ReleaseFirst,
            vec![
                Box::new(|w| w.write(0, 10)),
                Box::new(|w| w.write(1, 11)),
                Box::new(|w| {
                    w.read(1);
                }),
            ],
        );
        world.end();
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_a_flush_put_off_and_forgotten() {
    check(2, || write_while_child_ends(Bug::IgnorePending));
}
