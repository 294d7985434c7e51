//! Stale translations: a sharer that runs on another CPU, or that sleeps, must not go on using a
//! page that was taken out of the table, nor a permission that was withdrawn.
//!
//! The scheme: a spinner in one process loads (or stores) in a tight loop, and says what it sees
//! through a small page of its own that is never shared page-table-wise. The test process changes
//! the file through its descriptor and, once the change has returned, publishes a number. Whatever
//! the spinner does after it has read that number must be by the new state.

use crate::harness::{Ctx, Res};
use crate::kernel;
use crate::machine::{Cgroup, Setting, Swap};
use crate::oracle::pages;
use crate::peer::{Peer, Remote};
use crate::sys::{self, Fault, ANON, FIXED, GRANULE, GRANULE_PAGES, PAGE, RO, RW, SHARED};
use crate::team::Team;
use crate::{ensure, ensure_eq, group};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

group!("tlb";
    loads_during_truncate(120),
    loads_during_punch(120),
    loads_during_reclaim(180),
    loads_during_punch_and_reclaim(240),
    loads_during_collapse(120),
    loads_during_migration(120),
    loads_during_invalidation(120),
    loads_by_readers_and_writers(120),
    loads_during_memory_failure,
    stores_during_punch(120),
    stores_during_truncate(120),
    stores_during_reclaim(180),
    stores_during_migration(180),
    stores_during_moves_between_nodes(120),
    stores_during_collapse(120),
    stores_while_others_come_and_go(120),
    stores_during_reclaim_while_others_leave(180),
    stores_during_writeback(120),
    sleeping_sharers_hold_nothing(120),
    own_threads_lose_permission_on_mprotect,
    own_threads_lose_the_page_on_munmap,
    own_threads_see_the_new_mapping_on_map_fixed,
    many_granules_one_truncate(120),
);

/// What spinner and test process tell each other. Zero-initialised shared memory.
#[repr(C)]
pub struct Board {
    /// The newest generation that is complete; the spinner must see it or a newer one.
    pub published: AtomicU64,
    /// Accesses done by the spinner so far.
    pub done: AtomicU64,
    /// The last value a storing spinner has stored.
    pub stored: AtomicU64,
    /// Accesses that faulted.
    pub faults: AtomicU64,
    /// First violation: what was seen, older than it should have been; 0 while there is none.
    pub seen: AtomicU64,
    /// What should have been seen.
    pub wanted: AtomicU64,
    /// Set when the spinner is to end.
    pub stop: AtomicU64,
}

/// A new one, which processes have that are started later.
pub fn board() -> Res<&'static Board> {
    let a = sys::mmap(0, PAGE, RW, SHARED | ANON, -1, 0)?;
    Ok(board_at(a))
}

/// The one at this address.
pub fn board_at(addr: u64) -> &'static Board {
    // SAFETY: callers pass the address of a page that stays mapped and holds only atomics, for
    // which zeros are valid.
    unsafe { &*(addr as *const Board) }
}

/// Its address.
pub fn address(b: &'static Board) -> u64 {
    b as *const Board as u64
}

/// Loads from one word for ever. Arguments: board, address, cpu. Zero and SIGBUS are answers too:
/// the page may be out just now.
pub const LOADER: Remote = |a, _| {
    let (b, addr) = (board_at(a[0]), a[1]);
    sys::pin_to_cpu(a[2] as usize);
    while b.stop.load(SeqCst) == 0 {
        let at_least = b.published.load(SeqCst);
        match sys::load64(addr) {
            Ok(0) => {}
            Ok(v) if v >= at_least => {}
            Ok(v) => {
                b.wanted.store(at_least, SeqCst);
                b.seen.store(v, SeqCst);
                return (1, vec![]);
            }
            Err(f) if f.signal == libc::SIGBUS => {
                b.faults.fetch_add(1, SeqCst);
            }
            Err(_) => return (2, vec![]),
        }
        b.done.fetch_add(1, SeqCst);
    }
    (0, vec![])
};

/// Stores a growing number to one word for ever, and says after each store what it was. Arguments: board,
/// address, cpu.
pub const STORER: Remote = |a, _| {
    let (b, addr) = (board_at(a[0]), a[1]);
    sys::pin_to_cpu(a[2] as usize);
    let mut n = 0;
    while b.stop.load(SeqCst) == 0 {
        n += 1;
        match sys::store64(addr, n) {
            Ok(()) => b.stored.store(n, SeqCst),
            Err(f) if f.signal == libc::SIGBUS => {
                b.faults.fetch_add(1, SeqCst);
            }
            Err(_) => return (2, vec![]),
        }
        b.done.fetch_add(1, SeqCst);
    }
    (0, vec![])
};

/// Waits until the spinners have done `n` more accesses.
pub fn let_run(b: &Board, n: u64) -> Res {
    let from = b.done.load(SeqCst);
    let deadline = Instant::now() + Duration::from_secs(20);
    while b.done.load(SeqCst) < from + n {
        ensure!(
            b.seen.load(SeqCst) == 0,
            "stale load: saw generation {} after {} was complete",
            b.seen.load(SeqCst),
            b.wanted.load(SeqCst)
        );
        ensure!(Instant::now() < deadline, "the spinner stands still");
        std::thread::yield_now();
    }
    Ok(())
}

/// Ends spinners, which must not have seen anything old.
pub fn stop(b: &Board, spinners: &[&Peer]) -> Res {
    b.stop.store(1, SeqCst);
    for p in spinners {
        let (r, _) = p.finish()?;
        ensure!(
            r != 1,
            "stale load: saw generation {} after {} was complete",
            b.seen.load(SeqCst),
            b.wanted.load(SeqCst)
        );
        ensure_eq!(r, 0, "how the spinner ended (2: SIGSEGV)");
    }
    Ok(())
}

/// Two processes to watch a file with, and their board.
struct Watchers {
    board: &'static Board,
    peers: [Peer; 2],
    fd: OwnedFd,
}

impl Watchers {
    /// Those of a file, which is theirs, too.
    fn of(ctx: &Ctx, fd: OwnedFd) -> Res<Watchers> {
        ctx.opt_in()?;
        Ok(Watchers {
            board: board()?,
            peers: [Peer::spawn()?, Peer::spawn()?],
            fd,
        })
    }
}

/// Two loaders watch one word while `change` takes the page out; then the next generation is
/// written and published.
fn loads_during(ctx: &Ctx, change: impl FnMut(&mut Team) -> Res) -> Res {
    loads_during_on(ctx, Watchers::of(ctx, sys::memfd(0)?)?, [RW, RW], change)
}

/// The same on any file, with loaders of any protection.
fn loads_during_on(
    ctx: &Ctx,
    watchers: Watchers,
    protections: [u64; 2],
    change: impl FnMut(&mut Team) -> Res,
) -> Res {
    let (_, loaders) = watch_loads(ctx, watchers, protections, change)?;
    for (loader, _) in &loaders {
        crate::team::expect_tables(ctx, loader, 2)?;
    }
    Ok(())
}

/// The same without a look at the tables in the end. Returns the loaders, which have ended, and where each maps
/// the file.
fn watch_loads(
    ctx: &Ctx,
    watchers: Watchers,
    protections: [u64; 2],
    mut change: impl FnMut(&mut Team) -> Res,
) -> Res<(Team, Vec<(Peer, u64)>)> {
    let Watchers {
        board: b,
        peers: watchers,
        fd,
    } = watchers;
    let mut t = Team::on(ctx, fd, 3, 2)?;
    let page = GRANULE_PAGES + 3;
    sys::pin_to_cpu(0);
    sys::pwrite(&t.fd, &1u64.to_ne_bytes(), page * PAGE)?;
    let mut loaders = vec![];
    for (cpu, w) in [1, 0].into_iter().zip(watchers) {
        let addr = w.map(&t.fd, 0, 2 * GRANULE, protections[1 - cpu as usize])?;
        w.touch(addr, pages(2))?;
        crate::team::expect_tables(ctx, &w, 2)?;
        w.start(LOADER, &[address(b), addr + page * PAGE, cpu], &[])?;
        loaders.push((w, addr));
    }
    let end = Instant::now() + ctx.duration(2, 30);
    let mut generation = 1;
    while Instant::now() < end || generation < 4 {
        let_run(b, 20)?;
        change(&mut t)?;
        generation += 1;
        sys::pwrite(&t.fd, &u64::to_ne_bytes(generation), page * PAGE)?;
        b.published.store(generation, SeqCst);
        let_run(b, 20)?;
    }
    stop(b, &[&loaders[0].0, &loaders[1].0])?;
    Ok((t, loaders))
}

/// Truncation below the page and growth again.
fn loads_during_truncate(ctx: &Ctx) -> Res {
    loads_during(ctx, |t| {
        sys::ftruncate(&t.fd, GRANULE + PAGE)?;
        Ok(sys::ftruncate(&t.fd, 2 * GRANULE)?)
    })
}

/// A hole at the page.
fn loads_during_punch(ctx: &Ctx) -> Res {
    loads_during(ctx, |t| {
        Ok(sys::punch(&t.fd, (GRANULE_PAGES + 3) * PAGE, PAGE)?)
    })
}

/// Reclaim of the page: it comes back at another place, and a stale loader never sees what is
/// written there.
fn loads_during_reclaim(ctx: &Ctx) -> Res {
    let swap = Swap::on(128)?;
    // Before the test enters the group: memory of a loader that goes out in the same batch would flush its CPU, too.
    let watchers = Watchers::of(ctx, sys::memfd(0)?)?;
    let group = Cgroup::enter()?;
    let mut out = 0;
    loads_during_on(ctx, watchers, [RW, RW], |_| {
        group.reclaim(4 * GRANULE);
        out = out.max(swap.used_pages());
        Ok(())
    })?;
    ensure!(out > 0, "nothing was ever swapped out");
    Ok(())
}

/// Collapses the second granule of a file through a mapping made for that.
fn collapse_second_granule(fd: &impl AsRawFd) -> Res<bool> {
    const MADV_COLLAPSE: u64 = 25;
    let a = sys::mmap(0, 4 * GRANULE, sys::NONE, sys::PRIVATE | ANON, -1, 0)?;
    let aligned = a.next_multiple_of(GRANULE);
    sys::mmap(aligned, 2 * GRANULE, RW, SHARED | FIXED, fd.as_raw_fd(), 0)?;
    let r = sys::syscall(
        libc::SYS_madvise,
        &[aligned + GRANULE, GRANULE, MADV_COLLAPSE],
    );
    sys::munmap(a, 4 * GRANULE)?;
    Ok(r.is_ok())
}

/// A hole at a page that reclaim has just taken out, its flush still to come: once the hole is there nobody
/// sees what was in the page.
///
/// Only clean pages of a file leave the page cache before the flush, which comes at the end of a batch. Reclaim
/// runs at the lowest priority on the test's CPU: as soon as it has let the page go, the test, which looks
/// again and again, takes over. So the loader's CPU has nothing to drop its translation for.
fn loads_during_punch_and_reclaim(ctx: &Ctx) -> Res {
    let fs = crate::machine::Ext4::mount(64)?;
    ctx.opt_in()?;
    let group = Cgroup::enter()?;
    let (b, page) = (board()?, 40);
    let fd: OwnedFd = fs.file("f")?.into();
    let word = |generation: u64| sys::pwrite(&fd, &generation.to_ne_bytes(), page * PAGE);
    let clean = || sys::syscall(libc::SYS_fsync, &[fd.as_raw_fd() as u64]);
    sys::pwrite(&fd, &vec![0; GRANULE as usize], 0)?;
    word(1)?;
    clean()?;
    sys::pin_to_cpu(0);
    let peers = [Peer::spawn()?, Peer::spawn()?, Peer::spawn()?];
    let mut at = vec![];
    for p in &peers[..2] {
        let addr = p.map(&fd, 0, GRANULE, RO)?;
        p.touch(addr, pages(1))?;
        crate::team::expect_tables(ctx, p, 1)?;
        at.push(addr);
    }
    // Not the one through whose mapping, the first, reclaim finds the page: of that one mm it is
    // remembered that a flush is due.
    let [_, loader, reclaimer] = &peers;
    loader.start(LOADER, &[address(b), at[1] + page * PAGE, 1], &[])?;
    let reclaim: Remote = |a, path| {
        let b = board_at(a[0]);
        sys::pin_to_cpu(0);
        let lowest = 0u32;
        let idle = [0, libc::SCHED_IDLE as u64, &raw const lowest as u64];
        let opened = std::fs::OpenOptions::new()
            .write(true)
            .open(String::from_utf8_lossy(path).as_ref());
        let (Ok(file), Ok(_)) = (opened, sys::syscall(libc::SYS_sched_setscheduler, &idle)) else {
            return (3, vec![]);
        };
        while b.stop.load(SeqCst) == 0 {
            // Fails when less could be reclaimed.
            sys::pwrite(&file, b"1048576", 0).ok();
        }
        (0, vec![])
    };
    let path = group.path("memory.reclaim");
    reclaimer.start(reclaim, &[address(b)], path.as_bytes())?;
    // A mapping of the test's own tells whether the page is in the page cache.
    let own = sys::mmap(0, GRANULE, RO, SHARED, fd.as_raw_fd(), 0)? + page * PAGE;
    let cached = || -> Res<bool> {
        let mut there = 0u8;
        sys::syscall(libc::SYS_mincore, &[own, PAGE, &raw mut there as u64])?;
        Ok(there & 1 != 0)
    };
    let (end, limit) = (
        Instant::now() + ctx.duration(3, 30),
        Instant::now() + Duration::from_secs(180),
    );
    let (mut generation, mut gone) = (1, 0);
    while Instant::now() < end || gone < 10 {
        ensure!(Instant::now() < limit, "reclaim took the page {gone} times");
        let_run(b, 20)?;
        while cached()? && Instant::now() < limit {
            std::thread::sleep(Duration::from_micros(20));
        }
        gone += u64::from(!cached()?);
        sys::punch(&fd, page * PAGE, PAGE)?;
        generation += 1;
        b.published.store(generation, SeqCst);
        let_run(b, 20)?;
        word(generation)?;
        clean()?;
    }
    stop(b, &[loader, reclaimer])
}

/// Collapse into a huge folio and back.
fn loads_during_collapse(ctx: &Ctx) -> Res {
    let mut collapsed = 0;
    let watchers = Watchers::of(ctx, sys::memfd(0)?)?;
    let (t, loaders) = watch_loads(ctx, watchers, [RW, RW], |t| {
        collapsed += u32::from(collapse_second_granule(&t.fd)?);
        // A hole in it makes small pages of it again.
        Ok(sys::punch(&t.fd, (GRANULE_PAGES + 3) * PAGE, PAGE)?)
    })?;
    if collapsed == 0 {
        crate::skip!("MADV_COLLAPSE of shmem never worked");
    }
    // A loader may be left with a huge page, if it held on to the folio while the hole was to split it, or with
    // a table of its own, if a walk over all mappings held links back. Once more with no loader about: the
    // collapse frees such a table, and the hole takes the huge page away.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !collapse_second_granule(&t.fd)? {
        ensure!(Instant::now() < deadline, "MADV_COLLAPSE fails at rest");
        std::thread::sleep(Duration::from_millis(20));
    }
    sys::punch(&t.fd, GRANULE, GRANULE)?;
    for (loader, addr) in &loaders {
        loader.touch(*addr, pages(2))?;
        crate::team::expect_tables(ctx, loader, 2)?;
    }
    Ok(())
}

/// Moves the page between the nodes, by a sharer's addresses.
fn move_page(t: &Team, node: i32) -> Res<bool> {
    const MOVE_ALL: u64 = 4;
    let (addr, mut status) = (t.at(0, GRANULE_PAGES + 3), 0i32);
    let a = [
        t.peer(0).pid as u64,
        1,
        &raw const addr as u64,
        &raw const node as u64,
        &raw mut status as u64,
        MOVE_ALL,
    ];
    sys::syscall(libc::SYS_move_pages, &a)?;
    Ok(status == node)
}

/// The page moves to the other node and back: what is written there a stale loader never sees.
fn loads_during_migration(ctx: &Ctx) -> Res {
    crate::inplace::two_nodes()?;
    let (mut node, mut moved) = (0, 0);
    loads_during(ctx, |t| {
        node = 1 - node;
        moved += u32::from(move_page(t, node)?);
        Ok(())
    })?;
    ensure!(moved > 0, "the page never moved");
    Ok(())
}

/// Direct I/O to the file invalidates its page cache, from under all sharers.
fn loads_during_invalidation(ctx: &Ctx) -> Res {
    use std::os::unix::fs::OpenOptionsExt;
    let fs = crate::machine::Ext4::mount(64)?;
    let file = fs.file("f")?;
    let direct = std::fs::OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(fs.dir.join("f"))?;
    let buf = sys::mmap(0, PAGE, RW, sys::PRIVATE | ANON, -1, 0)?;
    let at = (GRANULE_PAGES + 3) * PAGE;
    let watchers = Watchers::of(ctx, file.into())?;
    loads_during_on(ctx, watchers, [RW, RW], |_| {
        // Zeros, which the loaders take for a page that is out just now.
        let a = [direct.as_raw_fd() as u64, buf, PAGE, at];
        ensure_eq!(
            sys::syscall(libc::SYS_pwrite64, &a),
            Ok(PAGE),
            "direct write"
        );
        Ok(())
    })
}

/// A page that is in two tables, the writers' and the readers', goes from both.
fn loads_by_readers_and_writers(ctx: &Ctx) -> Res {
    let mut round = 0;
    let watchers = Watchers::of(ctx, sys::memfd(0)?)?;
    loads_during_on(ctx, watchers, [RO, RW], |t| {
        round += 1;
        let at = (GRANULE_PAGES + 3) * PAGE;
        match round % 3 {
            0 => {
                sys::ftruncate(&t.fd, GRANULE).and_then(|()| sys::ftruncate(&t.fd, 2 * GRANULE))?
            }
            1 => sys::punch(&t.fd, at, PAGE)?,
            _ => {
                t.peer(1)
                    .madvise(t.at(1, GRANULE_PAGES + 3), PAGE, libc::MADV_REMOVE)??;
            }
        }
        Ok(())
    })
}

/// Memory failure takes a page away: from when that is done each load of a sharer that runs on
/// another CPU is a SIGBUS.
fn loads_during_memory_failure(ctx: &Ctx) -> Res {
    let b = board()?;
    let t = Team::new(ctx, 2, 2)?;
    sys::pin_to_cpu(0);
    for page in [GRANULE_PAGES + 3, GRANULE_PAGES + 40, 7] {
        b.stop.store(0, SeqCst);
        let p = Peer::spawn()?;
        let addr = p.map(&t.fd, 0, 2 * GRANULE, RW)?;
        // Both granules: neighbours are not linked across a multiple of 1 GiB, which may lie between them.
        p.touch(addr, GRANULE_PAGES + 1)?;
        crate::team::expect_tables(ctx, &p, 2)?;
        p.start(LOADER, &[address(b), addr + page * PAGE, 1], &[])?;
        let_run(b, 50)?;
        crate::inplace::poison(&t, page)?;
        // The first may have begun before.
        let_run(b, 2)?;
        let from = b.faults.load(SeqCst);
        let_run(b, 3)?;
        ensure!(
            b.faults.load(SeqCst) > from,
            "loads from the page go through after it has failed"
        );
        stop(b, &[&p])?;
        sys::punch(&t.fd, page * PAGE, PAGE)?;
    }
    Ok(())
}

/// A storer runs while `change` takes the page out: what it stores afterwards must be in the file.
fn stores_during(ctx: &Ctx, change: impl FnMut(&Team) -> Res) -> Res {
    stores_during_then(ctx, change, |_, _| Ok(()))
}

/// The same, with a look at the storer and its mapping after each change.
fn stores_during_then(
    ctx: &Ctx,
    mut change: impl FnMut(&Team) -> Res,
    look: impl Fn(&Peer, u64) -> Res,
) -> Res {
    let t = Team::new(ctx, 2, 2)?;
    let (b, page) = (board()?, GRANULE_PAGES + 3);
    sys::pin_to_cpu(0);
    let p = Peer::spawn()?;
    let addr = p.map(&t.fd, 0, 2 * GRANULE, RW)?;
    p.touch(addr, pages(2))?;
    crate::team::expect_tables(ctx, &p, 2)?;
    p.start(STORER, &[address(b), addr + page * PAGE, 1], &[])?;
    let end = Instant::now() + ctx.duration(2, 30);
    let mut rounds = 0;
    while Instant::now() < end || rounds < 3 {
        let_run(b, 20)?;
        change(&t)?;
        // At least one whole store begins after this.
        let_run(b, 3)?;
        let at_least = b.stored.load(SeqCst);
        let mut word = [0; 8];
        sys::pread(&t.fd, &mut word, page * PAGE)?;
        let got = u64::from_ne_bytes(word);
        ensure!(
            got >= at_least,
            "store {at_least} was acknowledged, the file holds {got} (round {rounds})"
        );
        look(&p, addr)?;
        // And another sharer sees it too.
        let seen = t.peer(0).load(t.at(0, page))?;
        ensure!(
            matches!(seen, Ok(v) if v >= at_least),
            "store {at_least} was acknowledged, another process sees {seen:?}"
        );
        rounds += 1;
    }
    stop(b, &[&p])?;
    // Where a huge page was left there is no table.
    sys::punch(&t.fd, GRANULE, GRANULE)?;
    p.touch(addr, pages(2))?;
    crate::team::expect_tables(ctx, &p, 2)
}

/// A hole at the page being stored to.
fn stores_during_punch(ctx: &Ctx) -> Res {
    stores_during(ctx, |t| {
        Ok(sys::punch(&t.fd, (GRANULE_PAGES + 3) * PAGE, PAGE)?)
    })
}

/// Truncation below the page and growth again.
fn stores_during_truncate(ctx: &Ctx) -> Res {
    stores_during(ctx, |t| {
        sys::ftruncate(&t.fd, GRANULE)?;
        Ok(sys::ftruncate(&t.fd, 2 * GRANULE)?)
    })
}

/// Reclaim of the page being stored to: no store is lost on the way to swap.
fn stores_during_reclaim(ctx: &Ctx) -> Res {
    let swap = Swap::on(128)?;
    let group = Cgroup::enter()?;
    let mut out = 0;
    stores_during(ctx, |_| {
        group.reclaim(4 * GRANULE);
        out = out.max(swap.used_pages());
        Ok(())
    })?;
    ensure!(out > 0, "nothing was ever swapped out");
    Ok(())
}

/// Migration of the page being stored to, by soft offlining where there is that, by compaction
/// otherwise: no store goes to the old frame.
fn stores_during_migration(ctx: &Ctx) -> Res {
    let before = kernel::vmstat("pgmigrate_success").unwrap_or(0);
    let mut offlined = 0;
    stores_during(ctx, |t| {
        if offlined < 8 {
            let r = t.peer(0).madvise(t.at(0, GRANULE_PAGES + 3), PAGE, 101)?;
            offlined += if r.is_ok() { 1 } else { 100 };
        }
        std::fs::write("/proc/sys/vm/compact_memory", "1").ok();
        Ok(())
    })?;
    if kernel::vmstat("pgmigrate_success").unwrap_or(0) == before {
        crate::skip!("nothing was migrated");
    }
    Ok(())
}

/// The page moves to the other node and back: no store goes to the frame that it left.
fn stores_during_moves_between_nodes(ctx: &Ctx) -> Res {
    crate::inplace::two_nodes()?;
    let (mut node, mut moved) = (0, 0);
    stores_during(ctx, |t| {
        node = 1 - node;
        moved += u32::from(move_page(t, node)?);
        Ok(())
    })?;
    ensure!(moved > 0, "the page never moved");
    Ok(())
}

/// One huge folio takes the page's place, and is split again. Whatever a fault finds changed under it,
/// the storer maps the huge page or shares a table.
fn stores_during_collapse(ctx: &Ctx) -> Res {
    let mut collapsed = 0;
    stores_during_then(
        ctx,
        |t| {
            collapsed += u32::from(collapse_second_granule(&t.fd)?);
            // A hole beside it makes small pages of it again.
            Ok(sys::punch(&t.fd, (GRANULE_PAGES + 5) * PAGE, PAGE)?)
        },
        |p, addr| {
            if ctx.sharing {
                let smaps = kernel::smaps_of(p.pid, addr)?;
                let huge = kernel::kb_in(&smaps, "ShmemPmdMapped").unwrap_or(0);
                let tables = kernel::tables_of(p.pid)?;
                ensure_eq!(tables + huge / 2048, 2, "shared tables and huge pages");
            }
            Ok(())
        },
    )?;
    if collapsed == 0 {
        crate::skip!("MADV_COLLAPSE of shmem never worked");
    }
    Ok(())
}

/// The storer's table is left by others all the while, down to the storer alone, which takes it back,
/// and it is found or published again.
fn stores_while_others_come_and_go(ctx: &Ctx) -> Res {
    let t = Team::new(ctx, 2, 2)?;
    let b = board()?;
    sys::pin_to_cpu(0);
    let page = GRANULE_PAGES + 3;
    // Only the storer and those who come and go map the second granule.
    for i in 0..2 {
        t.peer(i).munmap(t.granule(i, 1), GRANULE)?;
    }
    let p = Peer::spawn()?;
    let addr = p.map(&t.fd, 0, 2 * GRANULE, RW)?;
    p.touch(addr, pages(2))?;
    p.start(STORER, &[address(b), addr + page * PAGE, 1], &[])?;
    let end = Instant::now() + ctx.duration(2, 30);
    let mut rounds = 0u64;
    while Instant::now() < end || rounds < 3 {
        let guests = [Peer::spawn()?, Peer::spawn()?];
        for g in &guests {
            let a = g.map(&t.fd, 0, 2 * GRANULE, RW)?;
            g.touch(a, pages(2))?;
            let_run(b, 3)?;
            let at_least = b.stored.load(SeqCst);
            let seen = g.load(a + page * PAGE)?;
            ensure!(
                matches!(seen, Ok(v) if v >= at_least),
                "store {at_least} was acknowledged, a newcomer sees {seen:?}"
            );
            if rounds.is_multiple_of(2) {
                g.munmap(a + GRANULE, GRANULE)?;
            }
        }
        drop(guests);
        // Alone again: the page goes.
        sys::punch(&t.fd, page * PAGE, PAGE)?;
        let_run(b, 3)?;
        let at_least = b.stored.load(SeqCst);
        let mut word = [0; 8];
        sys::pread(&t.fd, &mut word, page * PAGE)?;
        let got = u64::from_ne_bytes(word);
        ensure!(
            got >= at_least,
            "store {at_least} was acknowledged, the file holds {got} (round {rounds})"
        );
        rounds += 1;
    }
    stop(b, &[&p])
}

/// Reclaim clears entries and flushes once for many, while all but the storer leave the table and the
/// storer takes it back: the flush that was put off still comes before a page is let go.
fn stores_during_reclaim_while_others_leave(ctx: &Ctx) -> Res {
    let swap = Swap::on(128)?;
    let group = Cgroup::enter()?;
    let churn: Remote = |a, _| {
        let (b, fd) = (board_at(a[0]), a[1]);
        sys::pin_to_cpu(0);
        while b.stop.load(SeqCst) == 0 {
            let Ok(at) = sys::mmap(0, 2 * GRANULE, RW, SHARED, fd as i32, 0) else {
                return (1, vec![]);
            };
            for page in 0..8 {
                if sys::load64(at + GRANULE + page * PAGE).is_err() {
                    return (2, vec![]);
                }
            }
            sys::munmap(at, 2 * GRANULE).ok();
        }
        (0, vec![])
    };
    let b = board()?;
    let mut t = Team::new(ctx, 2, 2)?;
    let page = GRANULE_PAGES + 3;
    let p = Peer::spawn()?;
    let addr = p.map(&t.fd, 0, 2 * GRANULE, RW)?;
    p.touch(addr, pages(2))?;
    let churners = [Peer::spawn()?, Peer::spawn()?];
    t.members.clear();
    p.start(STORER, &[address(b), addr + page * PAGE, 1], &[])?;
    for c in &churners {
        c.start(churn, &[address(b), t.raw() as u64], &[])?;
    }
    let end = Instant::now() + ctx.duration(3, 40);
    let (mut rounds, mut out) = (0, 0);
    while Instant::now() < end || rounds < 3 {
        group.reclaim(4 * GRANULE);
        out = out.max(swap.used_pages());
        let_run(b, 3)?;
        let at_least = b.stored.load(SeqCst);
        let mut word = [0; 8];
        sys::pread(&t.fd, &mut word, page * PAGE)?;
        let got = u64::from_ne_bytes(word);
        ensure!(
            got >= at_least,
            "store {at_least} was acknowledged, the file holds {got} (round {rounds})"
        );
        rounds += 1;
    }
    b.stop.store(1, SeqCst);
    for c in &churners {
        ensure_eq!(c.finish()?.0, 0, "how one that comes and goes ended");
    }
    stop(b, &[&p])?;
    ensure!(out > 0, "nothing was ever swapped out");
    Ok(())
}

/// Writeback takes the write permission away under a storer; none of its stores may be left out
/// of a later writeback.
fn stores_during_writeback(ctx: &Ctx) -> Res {
    let fs = crate::machine::Ext4::mount(64)?;
    ctx.opt_in()?;
    let t = Team::on(ctx, fs.file("f")?.into(), 2, 1)?;
    let b = board()?;
    sys::pin_to_cpu(0);
    let p = Peer::spawn()?;
    let addr = p.map(&t.fd, 0, GRANULE, RW)?;
    p.touch(addr, pages(1))?;
    crate::team::expect_tables(ctx, &p, 1)?;
    p.start(STORER, &[address(b), addr + 3 * PAGE, 1], &[])?;
    let direct = {
        use std::os::unix::fs::OpenOptionsExt;
        std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(fs.dir.join("f"))?
    };
    let buf = sys::mmap(0, PAGE, RW, sys::PRIVATE | ANON, -1, 0)?;
    let end = Instant::now() + ctx.duration(2, 20);
    while Instant::now() < end {
        sys::syscall(libc::SYS_fsync, &[t.raw() as u64])?;
        let_run(b, 3)?;
        let at_least = b.stored.load(SeqCst);
        // Writes back whatever is marked dirty, then reads the disk.
        sys::syscall(
            libc::SYS_pread64,
            &[
                std::os::fd::AsRawFd::as_raw_fd(&direct) as u64,
                buf,
                PAGE,
                3 * PAGE,
            ],
        )?;
        let got = sys::load64(buf)?;
        ensure!(
            got >= at_least,
            "store {at_least} was acknowledged, the disk holds {got} after writeback"
        );
    }
    stop(b, &[&p])?;
    crate::team::expect_tables(ctx, &p, 1)
}

/// Sharers that are not running keep nothing under their address-space tags: after a change they
/// are woken on the CPU on which they last ran.
fn sleeping_sharers_hold_nothing(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 6, 2)?;
    let pin: Remote = |a, _| {
        sys::pin_to_cpu(a[0] as usize);
        (0, vec![])
    };
    for i in 0..6 {
        t.peer(i).call(pin, &[i as u64 % 2], &[])?;
    }
    for round in 0..if ctx.long { 400 } else { 25 } {
        let lo = (round * 31) % (pages(2) - 8);
        // All load it, so that all have it in the TLB they run with.
        for i in 0..6 {
            t.peer(i).touch(t.at(i, lo), 8)?;
        }
        t.model.punch(&t.fd, lo..lo + 8)?;
        // The freed frames get other content at once.
        let other = sys::memfd(0)?;
        sys::pwrite(&other, &[0xee; 64 * PAGE as usize], 0)?;
        for i in 0..6 {
            t.verify(i, lo..lo + 8)?;
        }
        for page in lo..lo + 8 {
            t.store((page % 6) as usize, page)?;
        }
        for i in 0..6 {
            t.verify(i, lo..lo + 8)?;
        }
    }
    t.expect_all(2)
}

/// Runs `f` in a thread of this process on CPU 1 until `stop`, counting in `done`.
fn in_thread(
    b: &'static Board,
    mut f: impl FnMut() -> Option<Fault> + Send + 'static,
) -> std::thread::JoinHandle<Option<Fault>> {
    std::thread::spawn(move || {
        sys::pin_to_cpu(1);
        while b.stop.load(SeqCst) == 0 {
            if let Some(f) = f() {
                return Some(f);
            }
            b.done.fetch_add(1, SeqCst);
        }
        None
    })
}

/// In a peer with a second thread that stores all the time: does operation `a[3]`, and reports
/// whether the thread's stores ended with the right fault. 0 is right.
const LOSE: Remote = |a, _| {
    let (b, addr, what) = (board_at(a[0]), a[1], a[2]);
    sys::pin_to_cpu(0);
    b.stop.store(0, SeqCst);
    b.published.store(0, SeqCst);
    let store = move || {
        let before = b.published.load(SeqCst);
        match sys::store64(addr, 42) {
            Ok(()) if before == 1 && what != 2 => Some(Fault {
                signal: 0,
                code: 0,
                addr,
            }),
            Ok(()) => None,
            Err(f) => Some(f),
        }
    };
    let thread = in_thread(b, store);
    let base = addr & !(GRANULE - 1);
    let from = b.done.load(SeqCst);
    while b.done.load(SeqCst) < from + 50 && !thread.is_finished() {
        std::thread::yield_now();
    }
    let r = match what {
        0 => sys::syscall(libc::SYS_mprotect, &[base, GRANULE, RO]),
        1 => sys::syscall(libc::SYS_munmap, &[base, GRANULE]),
        _ => sys::mmap(base, GRANULE, RW, sys::PRIVATE | ANON | FIXED, -1, 0),
    };
    b.published.store(1, SeqCst);
    if r.is_err() {
        return (10, vec![]);
    }
    if what == 2 {
        let from = b.done.load(SeqCst);
        while b.done.load(SeqCst) < from + 5 && !thread.is_finished() {
            std::thread::yield_now();
        }
        b.stop.store(1, SeqCst);
        let seen = sys::load64(addr);
        return match (thread.join(), seen) {
            (Ok(None), Ok(42)) => (0, vec![]),
            _ => (11, vec![]),
        };
    }
    let right = if what == 0 {
        sys::SEGV_ACCERR
    } else {
        sys::SEGV_MAPERR
    };
    match thread.join() {
        Ok(Some(f)) if f.signal == libc::SIGSEGV && f.code == right => (0, vec![]),
        Ok(Some(f)) if f.signal == 0 => (12, vec![]),
        _ => (13, vec![]),
    }
};

/// The board must be at the same address in the peer: make it before the team.
fn lose(ctx: &Ctx, what: u64) -> Res {
    let b = board()?;
    for _ in 0..if ctx.long { 100 } else { 8 } {
        let mut t = Team::new(ctx, 2, 3)?;
        // Granule-aligned on every kernel, since the operation is on a granule of addresses.
        let to = t.peer(0).place(0, 3 * GRANULE)?;
        t.peer(0)
            .mmap(to, 3 * GRANULE, RW, SHARED | FIXED, t.raw(), 0)??;
        t.peer(0).touch(to, pages(3))?;
        t.expect(0, 6)?;
        let addr = to + (GRANULE_PAGES + 3) * PAGE;
        let (r, _) = t.peer(0).call(LOSE, &[address(b), addr, what], &[])?;
        ensure_eq!(r, 0, "outcome (12: a store went through after the call had returned, 11: the new mapping did not get the stores, 13: wrong fault)");
        t.expect(0, 5)?;
        // The other process writes on; what the thread stored is overwritten with known content.
        t.store(1, GRANULE_PAGES + 3)?;
        t.verify(1, 0..pages(3))?;
        t.model.verify_file(&t.fd)?;
    }
    Ok(())
}

/// After mprotect to read-only returns, no store of another thread goes through.
fn own_threads_lose_permission_on_mprotect(ctx: &Ctx) -> Res {
    lose(ctx, 0)
}

/// After munmap returns, no store of another thread goes through.
fn own_threads_lose_the_page_on_munmap(ctx: &Ctx) -> Res {
    lose(ctx, 1)
}

/// After MAP_FIXED replaced the granule, the other thread stores into the new memory and the file
/// stays as it was.
fn own_threads_see_the_new_mapping_on_map_fixed(ctx: &Ctx) -> Res {
    lose(ctx, 2)
}

/// One truncation that empties many tables at once, with loaders on several of them.
fn many_granules_one_truncate(ctx: &Ctx) -> Res {
    const GRANULES: u64 = 6;
    let b = board()?;
    let t = Team::new(ctx, 2, GRANULES)?;
    sys::pin_to_cpu(0);
    let _thp = Setting::set("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "never").ok();
    let words: Vec<u64> = (0..GRANULES).map(|g| g * GRANULE + 9 * PAGE).collect();
    let write = |generation: u64| -> Res {
        for w in &words {
            sys::pwrite(&t.fd, &generation.to_ne_bytes(), *w)?;
        }
        Ok(())
    };
    write(1)?;
    let mut loaders = vec![];
    for w in [words[0], words[3], words[5]] {
        let p = Peer::spawn()?;
        let addr = p.map(&t.fd, 0, GRANULES * GRANULE, RW)?;
        p.touch(addr, pages(GRANULES))?;
        crate::team::expect_tables(ctx, &p, GRANULES)?;
        p.start(LOADER, &[address(b), addr + w, 1], &[])?;
        loaders.push(p);
    }
    let end = Instant::now() + ctx.duration(2, 30);
    let mut generation = 1;
    while Instant::now() < end || generation < 4 {
        let_run(b, 60)?;
        sys::ftruncate(&t.fd, 0)?;
        sys::ftruncate(&t.fd, GRANULES * GRANULE)?;
        generation += 1;
        write(generation)?;
        b.published.store(generation, SeqCst);
        let_run(b, 60)?;
    }
    stop(b, &loaders.iter().collect::<Vec<_>>())
}
