// SPDX-License-Identifier: GPL-2.0-only

//! The share count's protocol in every interleaving, with loom.
//!
//! The functions of `count` are the kernel's; around them the test rebuilds what `file.rs` does with
//! them, over loom's locks and atomics: the PMD lock with the entry, the table's PTE lock, a chain of
//! the index. Memory that the kernel reads and writes without atomics is a [`Tracked`] cell: loom
//! fails the test if two accesses are not ordered, and to free a table is to write all its cells. So
//! a table that is reached after it was freed, or may be, is found even if nothing bad came of it.
//!
//! The second half breaks the protocol on purpose, one rule at a time ([`Bug`]), and asserts that
//! loom finds each: a model that cannot fail would say nothing about the first half.

// An interpreter would take hours, and loom needs none.
#![cfg(not(miri))]

mod model;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Mutex, MutexGuard};
use loom::thread;
use model::{check, race, Breaks, Tracked};
use ptshare_core::count::{self, Counter, Leave};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::Arc;

/// A rule that a variant of the protocol breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    /// None: the kernel's protocol.
    None,
    /// Linking or leaving looks at the count and then sets it, in two steps.
    TornExchange,
    /// Linking raises any count, even one of 0.
    LinkFromNothing,
    /// The last sharer is told by a look at the count alone; nothing takes it from 1 to 0.
    LastByLook,
    /// Leaving does not take the PTE lock.
    LeaveUnlocked,
    /// The count falls before the entry is cleared and flushed.
    ReleaseFirst,
    /// The entry is cleared, but the CPUs are not made to forget it.
    NoFlush,
    /// A table that is taken back stays in the index.
    StayInIndex,
    /// Who installs a table does not look once more whether there is one.
    InsertUnseen,
    /// A table is looked for without the lock of its chain.
    FindUnlocked,
}

impl Breaks for Bug {
    fn tears_exchange(&self) -> bool {
        *self == Bug::TornExchange
    }
}

type Count = model::Count<Bug>;

fn link(count: &Count) -> bool {
    match count.bug {
        Bug::LinkFromNothing => {
            count.value.fetch_add(1, Ordering::AcqRel);
            true
        }
        _ => count::link(count),
    }
}

fn leave(count: &Count) -> Leave {
    match count.bug {
        Bug::LastByLook if count.now() == 1 => Leave::Last,
        Bug::LastByLook => Leave::Others,
        _ => count::leave(count),
    }
}

/// A last-level table with its descriptor.
struct Table {
    count: Count,
    /// The PTE lock.
    lock: Mutex<()>,
    /// Under which key it was published.
    key: Tracked<u64>,
    /// Its entries.
    content: Tracked<u32>,
    /// How often it was given to an mm, and freed. Bookkeeping that synchronizes nothing.
    given: AtomicU32,
    freed: AtomicU32,
}

impl Table {
    fn new(key: u64, bug: Bug) -> Arc<Self> {
        Arc::new(Table {
            count: Count::new(1, bug),
            lock: Mutex::new(()),
            key: Tracked::new(key),
            content: Tracked::new(0),
            given: AtomicU32::new(0),
            freed: AtomicU32::new(0),
        })
    }

    fn assert_alive(&self) {
        assert_eq!(self.freed.load(Relaxed), 0, "a freed table is reached");
    }

    /// Writes an entry, as a fault does.
    fn touch(&self) {
        let _lock = self.lock.lock().unwrap();
        self.assert_alive();
        self.content.set(self.content.get() + 1);
    }

    fn free(&self) {
        assert_eq!(self.freed.fetch_add(1, Relaxed), 0, "freed twice");
        self.key.set(u64::MAX);
        self.content.set(u32::MAX);
    }
}

/// A chain of the index, and all tables that there ever were.
struct Index {
    chain: Mutex<Vec<Arc<Table>>>,
    tables: std::sync::Mutex<Vec<Arc<Table>>>,
    bug: Bug,
}

type Chain<'a> = MutexGuard<'a, Vec<Arc<Table>>>;

impl Index {
    fn new(bug: Bug) -> Arc<Self> {
        Arc::new(Index {
            chain: Mutex::new(Vec::new()),
            tables: std::sync::Mutex::new(Vec::new()),
            bug,
        })
    }

    /// Adds a sharer to the table of this key, if there is one.
    fn find(chain: &[Arc<Table>], key: u64) -> Option<Arc<Table>> {
        let found = chain
            .iter()
            .filter(|table| {
                table.assert_alive();
                table.key.get() == key
            })
            .find(|table| link(&table.count))?;
        assert_eq!(
            found.given.load(Relaxed),
            0,
            "linked after it was taken back"
        );
        Some(found.clone())
    }

    /// Publishes a new table with one sharer.
    fn insert(&self, chain: &mut Chain<'_>, key: u64) -> Arc<Table> {
        let table = Table::new(key, self.bug);
        self.tables.lock().unwrap().push(table.clone());
        chain.insert(0, table.clone());
        let findable = chain
            .iter()
            .filter(|table| table.key.get() == key && table.count.now() > 0);
        assert_eq!(findable.count(), 1, "two tables of one key can be found");
        table
    }

    fn remove(&self, table: &Arc<Table>) {
        let mut chain = self.chain.lock().unwrap();
        let place = chain.iter().position(|other| Arc::ptr_eq(other, table));
        let place = place.expect("a shared table is in the index");
        if self.bug != Bug::StayInIndex {
            chain.remove(place);
        }
    }
}

/// An address space with room for one table.
struct Mm {
    /// The PMD entry, under its lock.
    entry: Mutex<Option<Arc<Table>>>,
    /// What the MMU sees of the entry, without a lock.
    present: AtomicBool,
    /// A walk in progress: a flush waits until it is over.
    walk: Mutex<()>,
}

impl Mm {
    fn new() -> Arc<Self> {
        Arc::new(Mm {
            entry: Mutex::new(None),
            present: AtomicBool::new(false),
            walk: Mutex::new(()),
        })
    }

    /// One that links the table of `key` from the start.
    fn linked(index: &Index, key: u64) -> Arc<Self> {
        let mm = Mm::new();
        mm.fault(index, key);
        mm
    }

    fn set(&self, entry: &mut Option<Arc<Table>>, table: Arc<Table>) {
        *entry = Some(table);
        self.present.store(true, Ordering::Release);
    }

    /// `link`: a fault found no table.
    fn link(&self, index: &Index, key: u64) -> bool {
        let mut entry = self.entry.lock().unwrap();
        if entry.is_some() {
            return true;
        }
        let found = if index.bug == Bug::FindUnlocked {
            let chain = index.chain.lock().unwrap().clone();
            Index::find(&chain, key)
        } else {
            Index::find(&index.chain.lock().unwrap(), key)
        };
        match found {
            Some(table) => {
                self.set(&mut entry, table);
                true
            }
            None => false,
        }
    }

    /// `install`: it has allocated one meanwhile.
    fn install(&self, index: &Index, key: u64) {
        let mut entry = self.entry.lock().unwrap();
        if entry.is_some() {
            return;
        }
        let mut chain = index.chain.lock().unwrap();
        let found = match index.bug {
            Bug::InsertUnseen => None,
            _ => Index::find(&chain, key),
        };
        let table = found.unwrap_or_else(|| index.insert(&mut chain, key));
        drop(chain);
        self.set(&mut entry, table);
    }

    fn fault(&self, index: &Index, key: u64) {
        if !self.link(index, key) {
            self.install(index, key);
        }
    }

    /// Writes through the entry, if there is one, and sees that it is a sharer or the owner.
    fn touch(&self) {
        if let Some(table) = &*self.entry.lock().unwrap() {
            table.touch();
            let count = table.count.now();
            let given = table.given.load(Relaxed);
            assert!(count + given as i32 > 0, "in use, and nobody counts it");
            assert!(count >= 0, "the count is negative");
        }
    }

    /// The MMU walks the table on behalf of another thread of the process.
    fn walk(&self, table: &Table) {
        let _walk = self.walk.lock().unwrap();
        if self.present.load(Ordering::Acquire) {
            table.assert_alive();
            table.content.get();
        }
    }

    /// Clears the entry and waits until nobody walks through it.
    fn clear(&self, entry: &mut Option<Arc<Table>>, flush: bool) {
        *entry = None;
        self.present.store(false, Ordering::Release);
        if flush {
            drop(self.walk.lock().unwrap());
        }
    }

    /// `leave`. Says what it was, if the table was shared.
    fn leave(&self, index: &Index) -> Option<Leave> {
        let mut entry = self.entry.lock().unwrap();
        let table = entry.clone()?;
        if table.count.load() <= 0 {
            return None;
        }
        let lock = match index.bug {
            Bug::LeaveUnlocked => None,
            _ => Some(table.lock.lock().unwrap()),
        };
        let leave = leave(&table.count);
        match leave {
            Leave::Last => {
                index.remove(&table);
                let given = table.given.fetch_add(1, Relaxed);
                assert_eq!(given, 0, "a table is given away twice");
                // Only its owner looks at it now.
                table.key.set(u64::MAX);
            }
            Leave::Others => {
                let release = || {
                    let left = count::release(&table.count);
                    assert!(left >= 1, "the last sharer has left unnoticed");
                };
                match index.bug {
                    Bug::ReleaseFirst => {
                        release();
                        // Others who leave get on.
                        drop(lock);
                        self.clear(&mut entry, true);
                    }
                    bug => {
                        self.clear(&mut entry, bug != Bug::NoFlush);
                        release();
                    }
                }
            }
        }
        Some(leave)
    }

    /// The process ends: it leaves, and frees the table if that is its own.
    fn exit(&self, index: &Index) -> Option<Leave> {
        let leave = self.leave(index);
        let mut entry = self.entry.lock().unwrap();
        if let Some(table) = entry.clone() {
            // In one step with what was just found: in the kernel nothing links for an mm that is
            // being torn down, here nobody faults any more.
            self.clear(&mut entry, true);
            assert_eq!(table.given.load(Relaxed), 1, "freed by who does not own it");
            table.free();
        }
        leave
    }
}

/// When all processes are gone: every table was given back and freed once, and none can be found.
fn assert_nothing_left(index: &Index) {
    assert!(index.chain.lock().unwrap().is_empty(), "left in the index");
    for table in &*index.tables.lock().unwrap() {
        assert_eq!(table.count.now(), 0);
        assert_eq!(table.given.load(Relaxed), 1, "given back once");
        assert_eq!(table.freed.load(Relaxed), 1, "freed once");
    }
}

const KEY: u64 = 7;
const OTHER_KEY: u64 = 8;

// The count alone.

/// The last sharer leaves while somebody links.
fn leaver_and_newcomer(bug: Bug) {
    let count = Arc::new(Count::new(1, bug));
    let newcomer = thread::spawn({
        let count = count.clone();
        move || link(&count)
    });
    let left = leave(&count);
    let linked = newcomer.join().unwrap();
    match left {
        Leave::Last => assert!(!linked, "both win"),
        Leave::Others => assert!(linked, "neither wins"),
    }
    assert_eq!(count.now(), if linked { 2 } else { 0 });
    if left == Leave::Others {
        assert_eq!(count::release(&*count), 1);
    }
}

#[test]
fn either_the_last_leaver_or_the_newcomer_wins() {
    check(None, || leaver_and_newcomer(Bug::None));
}

#[test]
fn of_two_newcomers_and_the_last_leaver_the_leaver_wins_or_both_newcomers() {
    check(None, || {
        let count = Arc::new(Count::new(1, Bug::None));
        let linked = |count: &Arc<Count>| thread!(count; link(&count));
        let newcomers = [linked(&count), linked(&count)].map(thread::spawn);
        let left = count::leave(&*count);
        let linked = newcomers.map(|t| t.join().unwrap());
        match left {
            // Whoever was first finds it; the leaver was last, so nobody did.
            Leave::Last => assert_eq!(linked, [false, false]),
            Leave::Others => assert_eq!(linked, [true, true]),
        }
        let sharers = linked.iter().filter(|&&linked| linked).count() as i32;
        let leaver = (left == Leave::Others) as i32;
        assert_eq!(count.now(), sharers + leaver);
    });
}

#[test]
fn newcomers_are_all_counted() {
    check(None, || {
        let count = Arc::new(Count::new(1, Bug::None));
        let link = || thread!(count; link(&count));
        assert_eq!(race(vec![link(), link()]), [true, true]);
        assert!(count::link(&*count));
        assert_eq!(count.now(), 4);
    });
}

#[test]
fn a_table_of_nobody_is_never_linked() {
    check(None, || {
        let count = Arc::new(Count::new(0, Bug::None));
        let link = || thread!(count; link(&count));
        assert_eq!(race(vec![link(), link()]), [false, false]);
        assert_eq!(count.now(), 0);
    });
}

/// As many leave under the lock as are given, of as many sharers. Returns what they were told.
fn leavers(sharers: i32, leavers: usize, bug: Bug) -> Vec<Leave> {
    let table = Table::new(KEY, bug);
    for _ in 1..sharers {
        assert!(count::link(&table.count));
    }
    let one = || {
        thread!(table; {
            let _lock = (bug != Bug::LeaveUnlocked).then(|| table.lock.lock().unwrap());
            let leave = leave(&table.count);
            if leave == Leave::Others {
                let left = count::release(&table.count);
                assert!(left >= 1, "the last sharer has left unnoticed");
            }
            leave
        })
    };
    let left = race((0..leavers).map(|_| one()).collect());
    assert_eq!(table.count.now(), sharers - leavers as i32);
    left
}

#[test]
fn one_of_all_who_leave_is_the_last() {
    for sharers in [2, 3] {
        check(None, move || {
            let left = leavers(sharers, sharers as usize, Bug::None);
            let last = left.iter().filter(|&&left| left == Leave::Last).count();
            assert_eq!(last, 1);
        });
    }
}

#[test]
fn nobody_is_the_last_while_somebody_stays() {
    check(None, || {
        assert_eq!(leavers(3, 2, Bug::None), [Leave::Others, Leave::Others]);
    });
}

// The protocol around it.

/// Processes fault in the same place, use what they get, and end.
fn lives(processes: usize, bug: Bug) {
    let index = Index::new(bug);
    let life = || {
        thread!(index; {
            let mm = Mm::new();
            mm.fault(&index, KEY);
            mm.touch();
            mm.exit(&index);
        })
    };
    race((0..processes).map(|_| life()).collect());
    assert_nothing_left(&index);
}

#[test]
fn two_processes_come_and_go() {
    check(4, || lives(2, Bug::None));
}

#[test]
fn three_processes_come_and_go() {
    check(2, || lives(3, Bug::None));
}

/// The last sharer ends while two others fault: they get one table, the old one or a new one.
fn republish(bug: Bug) {
    let index = Index::new(bug);
    let old = Mm::linked(&index, KEY);
    let new = [Mm::new(), Mm::new()];
    let [one, other] = &new;
    race(vec![
        thread!(index, old; { old.exit(&index); }),
        thread!(index, one; { one.install(&index, KEY); }),
        thread!(index, other; { other.install(&index, KEY); }),
    ]);
    let tables = [one, other].map(|mm| mm.entry.lock().unwrap().clone().unwrap());
    assert!(Arc::ptr_eq(&tables[0], &tables[1]), "two tables of one key");
    assert_eq!(tables[0].count.now(), 2);
    one.touch();
    assert_eq!(one.exit(&index), Some(Leave::Others));
    other.touch();
    assert_eq!(other.exit(&index), Some(Leave::Last));
    assert_nothing_left(&index);
}

#[test]
fn two_faults_while_the_last_sharer_ends_get_one_table() {
    check(2, || republish(Bug::None));
}

/// Of three sharers two end while the third uses the table.
#[test]
fn who_stays_keeps_a_table_that_is_alive() {
    check(2, || {
        let index = Index::new(Bug::None);
        let stays = Mm::linked(&index, KEY);
        let leaves = || {
            let mm = Mm::linked(&index, KEY);
            thread!(index; assert_eq!(mm.exit(&index), Some(Leave::Others)))
        };
        let threads = [leaves(), leaves()].map(thread::spawn);
        stays.touch();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(stays.exit(&index), Some(Leave::Last));
        assert_nothing_left(&index);
    });
}

/// Three sharers end at once.
#[test]
fn the_last_of_three_frees_the_table() {
    check(2, || {
        let index = Index::new(Bug::None);
        let ends = || {
            let mm = Mm::linked(&index, KEY);
            thread!(index; mm.exit(&index) == Some(Leave::Last))
        };
        let last = race(vec![ends(), ends(), ends()]);
        assert_eq!(last.iter().filter(|&&last| last).count(), 1);
        assert_nothing_left(&index);
    });
}

/// Somebody makes an mm leave (reclaim, a collapse into a huge page, a new mode) while a thread of
/// it faults and the only other sharer ends.
#[test]
fn one_mm_is_made_to_leave_while_it_faults() {
    check(2, || {
        let index = Index::new(Bug::None);
        let mm = Mm::linked(&index, KEY);
        let other = Mm::linked(&index, KEY);
        race(vec![
            thread!(index, mm; { mm.leave(&index); }),
            thread!(index, mm; {
                mm.fault(&index, KEY);
                mm.touch();
            }),
            thread!(index, other; { other.exit(&index); }),
        ]);
        mm.touch();
        mm.exit(&index);
        assert_nothing_left(&index);
    });
}

/// Two make the same mm leave. It leaves once.
#[test]
fn one_mm_is_made_to_leave_twice() {
    check(3, || {
        let index = Index::new(Bug::None);
        let mm = Mm::linked(&index, KEY);
        let other = Mm::linked(&index, KEY);
        let leave = || thread!(index, mm; mm.leave(&index));
        let left = race(vec![leave(), leave()]);
        assert_eq!(left.iter().flatten().count(), 1);
        assert_eq!(other.exit(&index), Some(Leave::Last));
        assert_nothing_left(&index);
    });
}

/// A table that its last sharer has taken back goes on to be used by it, and is not found.
#[test]
fn a_table_that_is_taken_back_stays_in_use() {
    check(3, || {
        let index = Index::new(Bug::None);
        let mm = Mm::linked(&index, KEY);
        let other = Mm::new();
        race(vec![
            thread!(index, mm; {
                mm.leave(&index);
                mm.touch();
            }),
            thread!(index, other; {
                other.fault(&index, KEY);
                other.touch();
            }),
        ]);
        let of = |mm: &Mm| mm.entry.lock().unwrap().clone();
        if let (Some(own), Some(shared)) = (of(&mm), of(&other)) {
            assert!(
                !Arc::ptr_eq(&own, &shared),
                "shared after it was taken back"
            );
        }
        mm.exit(&index);
        other.exit(&index);
        assert_nothing_left(&index);
    });
}

/// A reader and a writer, in one chain, come and go.
#[test]
fn two_keys_in_one_chain_do_not_meet() {
    check(2, || {
        let index = Index::new(Bug::None);
        let life = |key| {
            thread!(index; {
                let mm = Mm::new();
                mm.fault(&index, key);
                let table = mm.entry.lock().unwrap().clone().unwrap();
                assert_eq!(table.key.get(), key);
                assert_eq!(table.count.now(), 1);
                assert_eq!(mm.exit(&index), Some(Leave::Last));
            })
        };
        race(vec![life(KEY), life(OTHER_KEY)]);
        assert_nothing_left(&index);
    });
}

/// One of two sharers leaves while its MMU walks the table, and the other ends and frees it.
fn walk_while_leaving(bug: Bug) {
    let index = Index::new(bug);
    let mm = Mm::linked(&index, KEY);
    let other = Mm::linked(&index, KEY);
    let table = index.tables.lock().unwrap()[0].clone();
    race(vec![
        thread!(mm, table; mm.walk(&table)),
        thread!(index, mm; { mm.leave(&index); }),
        thread!(index, other; { other.exit(&index); }),
    ]);
    mm.exit(&index);
    assert_nothing_left(&index);
}

#[test]
fn a_table_is_not_freed_while_the_mmu_of_a_leaver_walks_it() {
    check(2, || walk_while_leaving(Bug::None));
}

// The protocol broken: what the above is worth.

#[test]
#[should_panic(expected = "both win")]
fn loom_finds_a_torn_exchange() {
    check(None, || leaver_and_newcomer(Bug::TornExchange));
}

#[test]
#[should_panic(expected = "both win")]
fn loom_finds_a_link_from_nothing() {
    check(None, || leaver_and_newcomer(Bug::LinkFromNothing));
}

#[test]
#[should_panic(expected = "both win")]
fn loom_finds_a_last_sharer_by_look() {
    check(None, || leaver_and_newcomer(Bug::LastByLook));
}

#[test]
#[should_panic(expected = "left unnoticed")]
fn loom_finds_leaving_without_the_lock() {
    check(None, || {
        leavers(2, 2, Bug::LeaveUnlocked);
    });
}

#[test]
#[should_panic(expected = "a freed table is reached")]
fn loom_finds_a_torn_exchange_in_the_protocol() {
    check(3, || lives(2, Bug::TornExchange));
}

#[test]
#[should_panic(expected = "left unnoticed")]
fn loom_finds_leaving_without_the_lock_in_the_protocol() {
    check(3, || lives(2, Bug::LeaveUnlocked));
}

#[test]
#[should_panic(expected = "a freed table is reached")]
fn loom_finds_a_freed_table_in_the_index() {
    check(3, || lives(2, Bug::StayInIndex));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_a_look_into_the_index_without_its_lock() {
    check(3, || lives(2, Bug::FindUnlocked));
}

#[test]
#[should_panic(expected = "two tables of one key")]
fn loom_finds_two_tables_of_one_key() {
    check(2, || republish(Bug::InsertUnseen));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_a_count_that_falls_before_the_entry_is_flushed() {
    check(2, || walk_while_leaving(Bug::ReleaseFirst));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_an_entry_that_is_not_flushed() {
    check(2, || walk_while_leaving(Bug::NoFlush));
}
