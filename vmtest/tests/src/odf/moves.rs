//! Pages that move while their table is shared: between nodes, by compaction, by NUMA balancing.

use super::{diverge, verify_all, Events, Kin};
use crate::harness::{Ctx, Res};
use crate::inplace::{hinted, migrated, numa_hints, two_nodes};
use crate::kernel;
use crate::oracle::pages;
use crate::peer::Remote;
use crate::sys::{self, ANON, GRANULE, GRANULE_PAGES, PAGE, PRIVATE, RW};
use crate::tlb::{address, board, board_at, let_run};
use crate::{ensure, ensure_eq, group, skip};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

group!("odf";
    move_pages_for_all,
    move_pages_for_one,
    migrate_pages_of_a_family,
    mbind_by_one,
    numa_hints_after_the_fork(120),
    numa_hints_before_the_fork(120),
    compaction_under_a_family(120),
    moves_while_both_write(180),
    reads_during_moves(120),
);

const MOVE: u64 = 2;
const MOVE_ALL: u64 = 4;

/// move_pages of all pages of a process: how many are on the node afterwards, and how many were refused
/// because others use them.
fn move_to(k: &Kin, node: i32, flags: u64) -> Res<(u64, u64)> {
    let pages = 0..k.model.pages.len() as u64;
    let status = move_pages(k, pages.map(|p| (k.at(p), node)), flags)?;
    let count = |what: i32| status.iter().filter(|s| **s == what).count() as u64;
    Ok((count(node), count(-libc::EACCES)))
}

/// move_pages of single pages: addresses and nodes. Returns where each is, or why it is not there.
fn move_pages(k: &Kin, pages: impl Iterator<Item = (u64, i32)>, flags: u64) -> Res<Vec<i32>> {
    let (addrs, nodes): (Vec<u64>, Vec<i32>) = pages.unzip();
    let mut status = vec![0i32; addrs.len()];
    let a = [
        k.peer.pid as u64,
        addrs.len() as u64,
        addrs.as_ptr() as u64,
        nodes.as_ptr() as u64,
        status.as_mut_ptr() as u64,
        flags,
    ];
    sys::syscall(libc::SYS_move_pages, &a)?;
    Ok(status)
}

/// MPOL_MF_MOVE_ALL moves what several use, without a copy of the table; nobody loses anything.
fn move_pages_for_all(ctx: &Ctx) -> Res {
    two_nodes()?;
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let before = Events::now();
    for (node, by_child) in [(1, false), (0, true), (1, true)] {
        let who = if by_child { &child } else { &k };
        let (there, _) = move_to(who, node, MOVE_ALL)?;
        ensure!(there > pages(2) / 2, "{there} pages are on node {node}");
        verify_all(&[&k, &child])?;
    }
    before.expect(ctx, 0, 0)?;
    child.store(3)?;
    let (there, _) = move_to(&k, 0, MOVE_ALL)?;
    ensure!(there > pages(2) / 2, "{there} pages are on node 0");
    diverge(&mut [&mut k, &mut child])?;
    let (there, _) = move_to(&child, 1, MOVE_ALL)?;
    ensure!(there > pages(2) / 2, "{there} pages are on node 1");
    let grandchild = child.child(ctx, 2)?;
    move_to(&grandchild, 0, MOVE_ALL)?;
    verify_all(&[&k, &child, &grandchild])
}

/// MPOL_MF_MOVE moves what is one's own, and refuses the rest.
fn move_pages_for_one(ctx: &Ctx) -> Res {
    two_nodes()?;
    let mut k = Kin::new(ctx, 2)?;
    let (there, _) = move_to(&k, 0, MOVE)?;
    ensure_eq!(there, pages(2), "pages moved before");
    let child = k.child(ctx, 2)?;
    let (there, refused) = move_to(&child, 0, MOVE)?;
    ensure_eq!(
        (there, refused),
        (pages(2), 0),
        "of the child's, there already and refused"
    );
    let (there, refused) = move_to(&child, 1, MOVE)?;
    ensure_eq!(
        (there, refused),
        (0, pages(2)),
        "of the child's, moved and refused"
    );
    let (there, refused) = move_to(&k, 1, MOVE)?;
    ensure_eq!(
        (there, refused),
        (0, pages(2)),
        "of the parent's, moved and refused"
    );
    k.fill(0..9)?;
    let (_, refused) = move_to(&k, 1, MOVE)?;
    ensure_eq!(
        refused,
        pages(2) - 9,
        "of the parent's, refused after nine writes"
    );
    verify_all(&[&k, &child])?;
    child.peer.exit()?;
    let (_, refused) = move_to(&k, 1, MOVE)?;
    ensure_eq!(refused, 0, "of the last one's, refused");
    k.verify()
}

fn migrate_pages_of_a_family(ctx: &Ctx) -> Res {
    two_nodes()?;
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let grandchild = child.child(ctx, 2)?;
    for (who, from, to) in [
        (&k, 1u64, 2u64),
        (&child, 2, 1),
        (&grandchild, 1, 2),
        (&k, 2, 1),
    ] {
        let [f, t] = [&from, &to].map(|v| v as *const u64 as u64);
        sys::syscall(libc::SYS_migrate_pages, &[who.peer.pid as u64, 64, f, t])?;
        verify_all(&[&k, &child, &grandchild])?;
    }
    grandchild.peer.exit()?;
    diverge(&mut [&mut child, &mut k])
}

/// The node of each page.
fn nodes(k: &Kin) -> Res<Vec<i32>> {
    let addrs: Vec<u64> = (0..k.model.pages.len() as u64).map(|p| k.at(p)).collect();
    let mut status = vec![-1i32; addrs.len()];
    let (addr, to) = (addrs.as_ptr() as u64, status.as_mut_ptr() as u64);
    let a = [k.peer.pid as u64, addrs.len() as u64, addr, 0, to, 0];
    sys::syscall(libc::SYS_move_pages, &a)?;
    Ok(status)
}

/// mbind in one of them, with each of its flags: without MPOL_MF_MOVE_ALL no page moves that others use.
fn mbind_by_one(ctx: &Ctx) -> Res {
    two_nodes()?;
    const BIND: u64 = 2;
    const STRICT: u64 = 1;
    // MPOL_MF_STRICT: what others use, and therefore stays, is no failure.
    for flags in [0, MOVE, MOVE | STRICT, MOVE_ALL] {
        for part in [0..pages(2), GRANULE_PAGES - 9..GRANULE_PAGES + 9] {
            let mut k = Kin::new(ctx, 2)?;
            let mut child = k.child(ctx, 2)?;
            // So that no page is on its way to the lists on which moving finds it.
            std::fs::write("/proc/sys/vm/drop_caches", "1")?;
            let before = nodes(&k)?;
            for (who, by_child) in [(1u64, true), (0, false)] {
                let one = if by_child { &child } else { &k };
                let mbind: Remote = |a, _| {
                    let mask = 1u64 << a[2];
                    let r = sys::syscall(
                        libc::SYS_mbind,
                        &[a[0], a[1], BIND, &raw const mask as u64, 64, a[3]],
                    );
                    (crate::peer::flat(r), vec![])
                };
                let len = (part.end - part.start) * PAGE;
                let a = [one.at(part.start), len, who, flags];
                ensure_eq!(one.peer.call(mbind, &a, &[])?.0, 0, "mbind, flags {flags}");
                verify_all(&[&k, &child])?;
                if flags & MOVE_ALL == 0 {
                    ensure!(nodes(&k)? == before, "mbind moved pages that others use");
                }
            }
            diverge(&mut [&mut k, &mut child])?;
            k.child(ctx, if part.start == 0 { 2 } else { 0 })?
                .verify()?;
        }
    }
    Ok(())
}

/// In a peer: reads, and now and then writes what is there already. Arguments: address, pages, CPU,
/// milliseconds, write?
const SPIN: Remote = |a, _| {
    let end = Instant::now() + Duration::from_millis(a[3]);
    let mut cpu = a[2];
    while Instant::now() < end {
        // From here and from there, so that pages have a reason to move.
        cpu += 1;
        sys::pin_to_cpu(cpu as usize / 8);
        for n in 0..a[1] {
            let at = a[0] + n * PAGE;
            let r = sys::load64(at).and_then(|v| match a[4] != 0 && n % 64 == 0 {
                true => sys::store64(at, v),
                false => Ok(()),
            });
            if let Err(f) = r {
                return (1, format!("page {n}: {f:?}").into_bytes());
            }
        }
    }
    (0, vec![])
};

/// In a peer: loads from all pages again and again until it is told to stop. Arguments: board, address, pages,
/// CPU.
const READ: Remote = |a, _| {
    let b = board_at(a[0]);
    sys::pin_to_cpu(a[3] as usize);
    while b.stop.load(SeqCst) == 0 {
        for n in 0..a[2] {
            if let Err(f) = sys::load64(a[1] + n * PAGE) {
                return (1, format!("page {n}: {f:?}").into_bytes());
            }
        }
        b.done.fetch_add(1, SeqCst);
    }
    (0, vec![])
};

/// Parent and child read while their pages move to and fro: they wait for what is on its way, and neither
/// needs a table of its own for that.
fn reads_during_moves(ctx: &Ctx) -> Res {
    two_nodes()?;
    let b = board()?;
    let k = Kin::new(ctx, 2)?;
    let child = k.child(ctx, 2)?;
    let before = (Events::now(), migrated());
    for (cpu, one) in [(0, &k), (1, &child)] {
        let a = [address(b), one.base, pages(2), cpu];
        one.peer.start(READ, &a, &[])?;
    }
    let end = Instant::now() + ctx.duration(2, 20);
    let mut rounds = 0;
    while rounds < 6 || Instant::now() < end {
        move_to(&k, rounds % 2, MOVE_ALL)?;
        let_run(b, 2)?;
        rounds += 1;
    }
    b.stop.store(1, SeqCst);
    for one in [&k, &child] {
        let (r, why) = one.peer.finish()?;
        ensure_eq!(r, 0, "{}", String::from_utf8_lossy(&why));
    }
    ensure!(
        migrated() >= before.1 + 2 * pages(2),
        "pages did not move to and fro"
    );
    before.0.expect(ctx, 0, 0)?;
    child.borrows(ctx, 2)?;
    verify_all(&[&k, &child])
}

fn spin(ctx: &Ctx, kin: &[&Kin], write: u64) -> Res {
    let time = ctx.duration(1, 20).as_millis() as u64;
    for (i, k) in kin.iter().enumerate() {
        let a = [k.base, k.model.pages.len() as u64, i as u64, time, write];
        k.peer.start(SPIN, &a, &[])?;
    }
    for k in kin {
        let (r, why) = k.peer.finish()?;
        ensure_eq!(r, 0, "{}: {}", k.peer.pid, String::from_utf8_lossy(&why));
    }
    kin.iter().try_for_each(|k| k.verify())
}

/// In a peer: runs for so many milliseconds and touches nothing. Hints are made when a process has run for a
/// second, of pages that are not on its node, and go when it touches them.
const BURN: Remote = |a, _| {
    sys::pin_to_cpu(0);
    let end = Instant::now() + Duration::from_millis(a[0]);
    while Instant::now() < end {}
    (0, vec![])
};

/// Pages that tell by their faults that hinting has come to a process.
const CANARY: u64 = 256;

/// Memory of a process' own, mapped after all else and half of it away from either node: whoever makes hints
/// in it has been to the rest, too.
fn canary(k: &Kin) -> Res<u64> {
    let at = k.peer.mmap(0, CANARY * PAGE, RW, PRIVATE | ANON, -1, 0)??;
    let pages = (0..CANARY).map(|n| (at + n * PAGE, (n % 2) as i32));
    for (n, _) in pages.clone() {
        ensure_eq!(k.peer.store(n, 1)?, Ok(()), "a store at {n:x}");
    }
    let status = move_pages(k, pages.clone(), MOVE)?;
    ensure!(
        pages.map(|(_, node)| node).eq(status.iter().copied()),
        "the canary is on {status:?}"
    );
    Ok(at)
}

/// In a peer: how many faults it takes to read `a[1]` pages at `a[0]`, all of which it has.
const HINTS: Remote = |a, _| {
    let before = sys::fault_counts().0;
    for n in 0..a[1] {
        if let Err(f) = sys::load64(a[0] + n * PAGE) {
            return (-1, format!("page {n}: {f:?}").into_bytes());
        }
    }
    ((sys::fault_counts().0 - before) as i64, vec![])
};

/// Hinting does not touch what is shared, though it comes to each process that shares.
fn numa_hints_after_the_fork(ctx: &Ctx) -> Res {
    two_nodes()?;
    let mut k = Kin::new(ctx, 3)?;
    let mut child = k.child(ctx, 3)?;
    let on = numa_hints()?;
    let canaries = [canary(&k)?, canary(&child)?];
    let before = Events::now();
    let mut hints = [0; 2];
    let end = Instant::now() + Duration::from_secs(80);
    while hints.iter().any(|n| *n < CANARY as i64 / 4) {
        ensure!(Instant::now() < end, "NUMA balancing made {hints:?} hints");
        move_to(&k, 1, MOVE_ALL)?;
        spin(ctx, &[&k, &child], 0)?;
        for (i, kin) in [&k, &child].into_iter().enumerate() {
            let (n, why) = kin.peer.call(HINTS, &[canaries[i], CANARY], &[])?;
            ensure!(n >= 0, "{}", String::from_utf8_lossy(&why));
            hints[i] += n;
        }
    }
    before.expect(ctx, 0, 0)?;
    child.borrows(ctx, 3)?;
    spin(ctx, &[&k, &child], 1)?;
    drop(on);
    diverge(&mut [&mut k, &mut child])
}

/// Hints that are there at the fork are resolved by each for itself.
fn numa_hints_before_the_fork(ctx: &Ctx) -> Res {
    two_nodes()?;
    let on = numa_hints()?;
    let mut k = Kin::untouched(ctx, 3)?;
    k._quiet = None;
    std::fs::write("/proc/sys/kernel/numa_balancing", "1")?;
    k.fill(0..pages(3))?;
    let before = hinted().0;
    for round in 0..8 {
        if hinted().0 > before + pages(1) {
            break;
        }
        // Not for long: of memory that nobody touches it makes no more.
        move_to(&k, 1 - round % 2, MOVE)?;
        k.peer.call(BURN, &[1200], &[])?;
    }
    if hinted().0 <= before + pages(1) {
        skip!("NUMA balancing did nothing");
    }
    let mut child = k.child(ctx, 3)?;
    let mut grandchild = child.child(ctx, 3)?;
    spin(ctx, &[&k, &child, &grandchild], 0)?;
    spin(ctx, &[&k, &child, &grandchild], 1)?;
    drop(on);
    diverge(&mut [&mut k, &mut child, &mut grandchild])
}

/// Compaction moves pages of shared tables.
fn compaction_under_a_family(ctx: &Ctx) -> Res {
    let migrated = || kernel::vmstat("pgmigrate_success").unwrap_or(0);
    let mut k = Kin::new(ctx, 4)?;
    let mut child = k.child(ctx, 4)?;
    // Checkered memory, so that there is something to compact.
    let checkered = sys::memfd(32 * GRANULE)?;
    let fd = checkered.as_raw_fd() as u64;
    sys::syscall(libc::SYS_fallocate, &[fd, 0, 0, 32 * GRANULE])?;
    for page in (0..pages(32)).step_by(2) {
        sys::punch(&checkered, page * PAGE, PAGE)?;
    }
    let before = migrated();
    for round in 0..if ctx.long { 30 } else { 3 } {
        if let Err(e) = std::fs::write("/proc/sys/vm/compact_memory", "1") {
            skip!("no compaction: {e}");
        }
        verify_all(&[&k, &child])?;
        if round > 0 {
            k.store(5 + round)?;
            child.store(pages(2) + round)?;
        }
        for page in (1..pages(32)).step_by(16) {
            sys::punch(&checkered, page * PAGE, PAGE)?;
        }
    }
    if migrated() == before {
        skip!("compaction found nothing to migrate");
    }
    diverge(&mut [&mut k, &mut child])
}

/// In a peer: counts in every page until told otherwise by the time, and says what should be there.
/// Arguments: address, pages, milliseconds.
const COUNT: Remote = |a, _| {
    let end = Instant::now() + Duration::from_millis(a[2]);
    let mut round = 1u64;
    while Instant::now() < end {
        for n in 0..a[1] {
            let at = a[0] + n * PAGE;
            let old = sys::load64(at + 8);
            if round > 1 && old != Ok(round - 1) {
                return (
                    1,
                    format!("page {n} round {round} holds {old:x?}").into_bytes(),
                );
            }
            if let Err(f) = sys::store64(at + 8, round) {
                return (2, format!("page {n}: {f:?}").into_bytes());
            }
        }
        round += 1;
    }
    (0, vec![])
};

/// Both write all the time, children come and go, while everything is moved from node to node.
fn moves_while_both_write(ctx: &Ctx) -> Res {
    two_nodes()?;
    let end = Instant::now() + ctx.duration(3, 60);
    let mut moved = 0;
    let mut rounds = 0;
    while Instant::now() < end || rounds < 2 {
        rounds += 1;
        let k = Kin::new(ctx, 2)?;
        let child = k.child(ctx, 2)?;
        let spare = k.child(ctx, 2)?;
        for who in [&k, &child] {
            who.peer.start(COUNT, &[who.base, pages(2), 700], &[])?;
        }
        for n in 0..12 {
            let who = [&k, &child, &spare][n % 3];
            moved += move_to(who, (n as i32 / 3 + 1) % 2, MOVE_ALL)?.0;
            std::thread::sleep(Duration::from_millis(20));
        }
        for who in [&k, &child] {
            let (r, why) = who.peer.finish()?;
            ensure_eq!(r, 0, "{}: {}", who.peer.pid, String::from_utf8_lossy(&why));
        }
        spare.verify()?;
    }
    ensure!(moved > 0, "nothing was moved");
    Ok(())
}
