//! Translations of memory that is shared since a fork: what is taken out of a table for all, or left by
//! one, no CPU goes on using.

use super::{Events, Kin};
use crate::harness::{Ctx, Res};
use crate::kernel::pagemap;
use crate::machine::{Cgroup, Swap};
use crate::oracle::pages;
use crate::peer::Remote;
use crate::sys::{self, GRANULE, GRANULE_PAGES};
use crate::tlb::{address, board, let_run, stop, Board, LOADER, STORER};
use crate::{ensure, ensure_eq, group};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

group!("odf";
    reclaimed_pages_leave_the_tlb(120),
    left_granules_are_not_seen_written,
    threads_store_during_forks(120),
);

/// Whoever reads a page on another CPU, parent or child, has to fault once reclaim has taken it.
fn reclaimed_pages_leave_the_tlb(ctx: &Ctx) -> Res {
    let swap = Swap::on(64)?;
    sys::pin_to_cpu(0);
    for by_child in [true, false] {
        let b = board()?;
        let mut k = Kin::untouched(ctx, 2)?;
        // What is in the cgroup is this memory and nothing else of the two, of which a translation
        // that is flushed would take all others along.
        let group = Cgroup::enter()?;
        let pid = k.peer.pid.to_string();
        std::fs::write(group.path("cgroup.procs"), &pid)?;
        k.fill(0..pages(2))?;
        std::fs::write("/sys/fs/cgroup/cgroup.procs", &pid)?;
        group.leave()?;
        let child = k.child(ctx, 2)?;
        let (one, other) = if by_child { (&child, &k) } else { (&k, &child) };
        let page = GRANULE_PAGES + 3;
        one.peer
            .start(LOADER, &[address(b), one.at(page), 1], &[])?;
        let_run(b, 50)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while other.entry(page)? & pagemap::SWAPPED == 0 {
            ensure!(Instant::now() < deadline, "the page is not reclaimed");
            group.reclaim(4 * GRANULE);
        }
        let_run(b, 50)?;
        ensure!(
            one.entry(page)? & pagemap::PRESENT != 0,
            "process {} reads on from a page that was reclaimed",
            one.peer.pid
        );
        stop(b, &[&one.peer])?;
        super::verify_all(&[&k, &child])?;
    }
    swap.off()
}

/// In a peer: drops memory while another thread reads from it, on CPU 1. Arguments: board, page,
/// memory, its length. Answers 1 if that thread saw anything but what was there before, or zeros.
const DROP_UNDER_A_THREAD: Remote = |a, _| {
    let (b, page, from, len): (&Board, u64, u64, u64) =
        (crate::tlb::board_at(a[0]), a[1], a[2], a[3]);
    let before = sys::load64(page);
    let reader = std::thread::spawn(move || {
        sys::pin_to_cpu(1);
        while b.stop.load(SeqCst) == 0 {
            let now = sys::load64(page);
            if now != before && now != Ok(0) {
                return 1;
            }
            b.done.fetch_add(1, SeqCst);
        }
        0
    });
    sys::pin_to_cpu(0);
    let started = Instant::now();
    while b.done.load(SeqCst) < 50 && started.elapsed() < Duration::from_secs(20) {
        std::thread::yield_now();
    }
    let dropped = sys::syscall(libc::SYS_madvise, &[from, len, libc::MADV_DONTNEED as u64]);
    let more = b.done.load(SeqCst) + 50;
    while dropped.is_ok() && b.done.load(SeqCst) < more && !reader.is_finished() {
        std::thread::yield_now();
    }
    b.stop.store(1, SeqCst);
    match (dropped, reader.join()) {
        (Ok(_), Ok(seen)) => (seen, vec![]),
        _ => (2, vec![]),
    }
};

/// One drops a granule; the other, who is left alone with the table, writes at once. No thread of the
/// first sees that, though it may still have the page cached until the drop is over.
fn left_granules_are_not_seen_written(ctx: &Ctx) -> Res {
    sys::pin_to_cpu(0);
    for round in 0..if ctx.long { 200 } else { 10 } {
        let b = board()?;
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        let (one, other) = match round % 2 {
            0 => (&mut child, &mut k),
            _ => (&mut k, &mut child),
        };
        let page = GRANULE_PAGES + 3;
        let a = [address(b), one.at(page), one.at(GRANULE_PAGES), GRANULE];
        one.peer.start(DROP_UNDER_A_THREAD, &a, &[])?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while other.entry(page)? & pagemap::EXCLUSIVE == 0 {
            ensure!(Instant::now() < deadline, "the granule is not dropped");
        }
        other.store(page)?;
        let (seen, _) = one.peer.finish()?;
        ensure_eq!(
            seen,
            0,
            "round {round}: 1 is that the other's write was seen"
        );
        one.zero(GRANULE_PAGES..pages(2));
        super::verify_all(&[&k, &child])?;
    }
    Ok(())
}

/// In a peer: forks again and again while another thread stores a growing number to a page, on CPU 1. Each
/// child looks at the page at once, and again until the thread has stored many more. Arguments: board,
/// address, forks. Answers -1, or what was wrong in which fork.
const FORK_UNDER_A_THREAD: Remote = |a, _| {
    let (b, addr) = (crate::tlb::board_at(a[0]), a[1]);
    let storing = [a[0], addr, 1];
    let storer = std::thread::spawn(move || STORER(&storing, &[]).0);
    sys::pin_to_cpu(0);
    let watch = |before: u64| {
        let first = sys::load64(addr);
        b.published.store(first.unwrap_or(0), SeqCst);
        if !matches!(first, Ok(n) if n > before) {
            return 1;
        }
        let (more, started) = (b.done.load(SeqCst) + 2000, Instant::now());
        while b.done.load(SeqCst) < more {
            if sys::load64(addr) != first {
                return 2;
            }
            if started.elapsed() > Duration::from_secs(20) {
                return 3;
            }
        }
        0
    };
    let round = || -> Result<(), String> {
        let before = b.stored.load(SeqCst);
        if let_run(b, 20).is_err() {
            return Err("the thread stands still".to_owned());
        }
        let pid = match sys::fork() {
            Ok(0) => sys::exit_now(watch(before)),
            Ok(pid) => pid,
            Err(e) => return Err(e.to_string()),
        };
        let after = b.stored.load(SeqCst);
        let status = sys::wait(pid).map_err(|e| e.to_string())?;
        let first = b.published.load(SeqCst);
        match status {
            // One store may have been under way.
            0 if first > after + 1 => Err(format!(
                "the child sees store {first}, the fork was over at {after}"
            )),
            0 => Ok(()),
            256 => Err(format!(
                "the child sees store {first}, {before} was over before the fork"
            )),
            512 => Err(format!(
                "the child sees store {first} first, and then another"
            )),
            768 => Err("the thread stands still after the fork".to_owned()),
            other => Err(sys::describe_status(other)),
        }
    };
    let wrong = (0..a[2]).find_map(|n| round().err().map(|why| format!("fork {n}: {why}")));
    b.stop.store(1, SeqCst);
    match (wrong, storer.join()) {
        (None, Ok(0)) => (-1, vec![]),
        (None, _) => (0, b"the thread cannot store".to_vec()),
        (Some(why), _) => (0, why.into_bytes()),
    }
};

/// A thread of the parent stores to a page all the while, and forks go on: from the fork on the child sees
/// none of it.
fn threads_store_during_forks(ctx: &Ctx) -> Res {
    let b = board()?;
    let k = Kin::new(ctx, 2)?;
    let page = GRANULE_PAGES + 3;
    let forks = if ctx.long { 2000 } else { 100 };
    let before = Events::now();
    let a = [address(b), k.at(page), forks];
    let (r, why) = k.peer.call(FORK_UNDER_A_THREAD, &a, &[])?;
    ensure!(r < 0, "{}", String::from_utf8_lossy(&why));
    if ctx.sharing {
        let shared = Events::now().since(&before).shared;
        ensure!(shared >= 2 * forks, "forks shared {shared} tables");
    }
    k.sees(0..page)?;
    k.sees(page + 1..pages(2))
}
