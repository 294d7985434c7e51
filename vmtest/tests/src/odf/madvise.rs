//! madvise of every kind on memory that is shared since a fork.

use super::{diverge, verify_all, Events, Kin};
use crate::harness::{Ctx, Res};
use crate::kernel::{self, pagemap};
use crate::machine::{Cgroup, Setting, Swap};
use crate::oracle::pages;
use crate::peer::{flat, Remote};
use crate::sys::{self, Errno, GRANULE, GRANULE_PAGES, PAGE};
use crate::{ensure, ensure_eq, group, skip};
use std::ops::Range;
use std::time::{Duration, Instant};

group!("odf";
    dontfork_in_a_granule,
    dontfork_of_shared_memory,
    wipeonfork_in_a_granule,
    wipeonfork_of_shared_memory,
    dontneed_takes_its_page_only,
    dontneed_of_whole_granules,
    dropped_granules_leave_the_tlb,
    free_is_ones_own,
    cold_and_pageout,
    pageout_when_alone_again,
    remove_is_refused,
    populate,
    other_hints,
    dontneed_of_locked_pages,
    hints_from_outside,
    ksm_before_the_fork(120),
    ksm_after_the_fork(120),
    collapse_by_one,
    khugepaged_passes_by,
    huge_pages_among_small_ones,
    huge_page_is_split_for_one,
    soft_offline,
    hwpoison,
);

/// Part of a granule stays with the parent; the rest of it is copied, the granules around are shared.
fn dontfork_in_a_granule(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    let hidden = GRANULE_PAGES + 40..GRANULE_PAGES + 56;
    k.advise(hidden.clone(), libc::MADV_DONTFORK)?;
    let mut child = k.child(ctx, 2)?;
    child.sees(0..hidden.start)?;
    child.sees(hidden.end..pages(3))?;
    for page in [hidden.start, hidden.end - 1] {
        child.faults(page, libc::SIGSEGV, sys::SEGV_MAPERR)?;
    }
    k.store(hidden.start)?;
    k.store(hidden.start - 1)?;
    child.store(hidden.end)?;
    child.sees(0..hidden.start)?;
    child.sees(hidden.end..pages(3))?;
    k.verify()?;
    // Something of the child's own there is not the parent's.
    child.map(child.at(hidden.start), 16 * PAGE)?;
    child.zero(hidden.clone());
    child.store(hidden.start + 3)?;
    diverge(&mut [&mut k, &mut child])?;
    k.advise(hidden, libc::MADV_DOFORK)?;
    k.fork()?.verify()
}

/// The same said when a first child has the granule already.
fn dontfork_of_shared_memory(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    let mut first = k.child(ctx, 3)?;
    let hidden = GRANULE_PAGES..GRANULE_PAGES + 8;
    k.advise(hidden.clone(), libc::MADV_DONTFORK)?;
    let second = k.fork()?;
    second.sees(0..hidden.start)?;
    second.sees(hidden.end..pages(3))?;
    second.faults(hidden.start, libc::SIGSEGV, sys::SEGV_MAPERR)?;
    diverge(&mut [&mut k, &mut first])?;
    // What the first child forks has it.
    first.fork()?.verify()?;
    // A whole granule, and all of the memory.
    k.advise(0..GRANULE_PAGES, libc::MADV_DONTFORK)?;
    let third = k.fork()?;
    third.faults(5, libc::SIGSEGV, sys::SEGV_MAPERR)?;
    third.sees(hidden.end..pages(3))?;
    k.advise(0..pages(3), libc::MADV_DONTFORK)?;
    let fourth = k.child(ctx, 0)?;
    fourth.faults(pages(2), libc::SIGSEGV, sys::SEGV_MAPERR)?;
    first.sees(0..pages(3))?;
    k.verify()
}

fn wipeonfork_in_a_granule(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    let secret = GRANULE_PAGES + 40..GRANULE_PAGES + 56;
    k.advise(secret.clone(), libc::MADV_WIPEONFORK)?;
    let mut child = k.child(ctx, 2)?;
    child.zero(secret.clone());
    verify_all(&[&k, &child])?;
    child.store(secret.start)?;
    k.store(secret.start + 1)?;
    diverge(&mut [&mut k, &mut child])?;
    // It stays said in the child.
    let mut grandchild = child.fork()?;
    grandchild.zero(secret);
    verify_all(&[&k, &child, &grandchild])
}

fn wipeonfork_of_shared_memory(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    let mut first = k.child(ctx, 3)?;
    for secret in [
        GRANULE_PAGES - 8..GRANULE_PAGES + 8,
        0..GRANULE_PAGES,
        0..pages(3),
    ] {
        k.advise(secret.clone(), libc::MADV_WIPEONFORK)?;
        let mut next = k.fork()?;
        next.zero(secret.clone());
        verify_all(&[&k, &first, &next])?;
        diverge(&mut [&mut next, &mut k, &mut first])?;
        k.advise(secret, libc::MADV_KEEPONFORK)?;
        k.fork()?.verify()?;
    }
    Ok(())
}

/// 4 kB mean 4 kB, in the child and in the parent, and for that one only.
fn dontneed_takes_its_page_only(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        for page in [0, GRANULE_PAGES - 1, GRANULE_PAGES, GRANULE_PAGES + 77] {
            let mut k = Kin::new(ctx, 3)?;
            let mut child = k.child(ctx, 3)?;
            let before = Events::now();
            let one = if by_child { &mut child } else { &mut k };
            one.advise(page..page + 1, libc::MADV_DONTNEED)?;
            one.zero(page..page + 1);
            before.expect(ctx, 1, 0)?;
            verify_all(&[&k, &child])?;
            diverge(&mut [&mut k, &mut child])?;
        }
    }
    // Across a border, with a part of each granule and one as a whole.
    let mut k = Kin::new(ctx, 3)?;
    let mut child = k.child(ctx, 3)?;
    let before = Events::now();
    child.advise(GRANULE_PAGES - 3..pages(2) + 3, libc::MADV_DONTNEED)?;
    child.zero(GRANULE_PAGES - 3..pages(2) + 3);
    before.expect(ctx, 2, 0)?;
    child.borrows(ctx, 0)?;
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])
}

/// Whole granules are left, without a copy.
fn dontneed_of_whole_granules(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let before = Events::now();
        let one = if by_child { &mut child } else { &mut k };
        one.advise(GRANULE_PAGES..pages(2), libc::MADV_DONTNEED)?;
        one.zero(GRANULE_PAGES..pages(2));
        before.expect(ctx, 0, 0)?;
        verify_all(&[&k, &child])?;
        diverge(&mut [&mut k, &mut child])?;
        let one = if by_child { &mut child } else { &mut k };
        one.advise(0..pages(3), libc::MADV_DONTNEED)?;
        one.zero(0..pages(3));
        verify_all(&[&k, &child])?;
    }
    Ok(())
}

/// In a peer: loads some pages at either end of a range, drops all of it, and loads them again, with
/// nothing in between that would flush a TLB. Arguments: address, pages, whether to map anew rather
/// than to drop. Answers how many are not zero then.
const DROP_AND_LOAD: Remote = |a, _| {
    let load = || {
        let ends = (0..40).chain(a[1] - 40..a[1]);
        ends.filter(|n| sys::load64(a[0] + n * PAGE) != Ok(0))
            .count() as i64
    };
    load();
    let (len, flags) = (a[1] * PAGE, sys::PRIVATE | sys::ANON | sys::FIXED);
    let dropped = match a[2] {
        0 => sys::syscall(libc::SYS_madvise, &[a[0], len, libc::MADV_DONTNEED as u64]),
        _ => sys::mmap(a[0], len, sys::RW, flags, -1, 0),
    };
    match dropped {
        Ok(_) => (load(), vec![]),
        Err(e) => (-1, e.to_string().into_bytes()),
    }
};

/// Who drops granules that are shared has no translation of them left, however few they are.
fn dropped_granules_leave_the_tlb(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 33)?;
    for granules in [1, 2, 8, 32, 33] {
        for anew in [0, 1] {
            let child = k.child(ctx, 33)?;
            let a = [child.at(0), pages(granules), anew];
            let (left, why) = child.peer.call(DROP_AND_LOAD, &a, &[])?;
            let why = String::from_utf8_lossy(&why).into_owned();
            ensure_eq!(left, 0, "old pages after {granules} were dropped {why}");
        }
    }
    k.verify()
}

/// In a peer: each of these pages is all zeros or as expected. Arguments: address, first page, seed;
/// bytes: the generations. Answers how many are zeros.
const OLD_OR_ZERO: Remote = |a, gens| {
    let mut zeros = 0;
    let mut buf = vec![0u8; PAGE as usize];
    for (i, g) in gens.chunks_exact(4).enumerate() {
        let g = u32::from_ne_bytes(g.try_into().unwrap_or_default());
        if let Err(f) = sys::copy(buf.as_mut_ptr() as u64, a[0] + i as u64 * PAGE, PAGE) {
            return (-1, format!("{f:?}").into_bytes());
        }
        if buf.iter().all(|b| *b == 0) {
            zeros += 1;
        } else if let Some(why) = crate::oracle::diagnose(a[2], a[1] + i as u64, g, &buf) {
            return (-1, why.into_bytes());
        }
    }
    (zeros, vec![])
};

fn old_or_zero(k: &Kin, range: Range<u64>) -> Res<u64> {
    let gens: Vec<u8> = k.model.pages[range.start as usize..range.end as usize]
        .iter()
        .flat_map(|g| g.to_ne_bytes())
        .collect();
    let a = [k.at(range.start), range.start, k.model.seed];
    let (n, why) = k.peer.call(OLD_OR_ZERO, &a, &gens)?;
    ensure!(n >= 0, "{}", String::from_utf8_lossy(&why));
    Ok(n as u64)
}

/// MADV_FREE by one, then reclaim: the others lose nothing, and what the one writes again stays.
fn free_is_ones_own(ctx: &Ctx) -> Res {
    let swap = Swap::on(64)?;
    for by_child in [true, false] {
        let group = Cgroup::enter()?;
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let freed = GRANULE_PAGES - 20..GRANULE_PAGES + 20;
        one.advise(freed.clone(), libc::MADV_FREE)?;
        other.verify()?;
        for _ in 0..4 {
            group.reclaim(4 * GRANULE);
        }
        other.verify()?;
        old_or_zero(one, freed.clone())?;
        one.sees(0..freed.start)?;
        one.sees(freed.end..pages(2))?;
        one.fill(freed.clone())?;
        for _ in 0..4 {
            group.reclaim(4 * GRANULE);
        }
        verify_all(&[one, other])?;
        // By the last of them, it does free.
        one.advise(freed.clone(), libc::MADV_FREE)?;
        other.advise(freed.clone(), libc::MADV_FREE)?;
        for _ in 0..4 {
            group.reclaim(4 * GRANULE);
        }
        old_or_zero(one, freed.clone())?;
        old_or_zero(other, freed.clone())?;
        one.fill(freed.clone())?;
        other.fill(freed)?;
        diverge(&mut [one, other])?;
    }
    swap.off()
}

/// Hints about pages that others use as well: they stay.
fn cold_and_pageout(ctx: &Ctx) -> Res {
    let swap = Swap::on(64)?;
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    for (advice, range) in [
        (libc::MADV_COLD, 0..pages(2)),
        (libc::MADV_PAGEOUT, 0..pages(2)),
        (libc::MADV_COLD, GRANULE_PAGES - 5..GRANULE_PAGES + 5),
        (libc::MADV_PAGEOUT, GRANULE_PAGES - 5..GRANULE_PAGES + 5),
    ] {
        child.advise(range.clone(), advice)?;
        k.advise(range, advice)?;
        for who in [&k, &child] {
            let there = who.count(0..pages(2), pagemap::PRESENT)?;
            ensure_eq!(there, pages(2), "pages present after a hint");
        }
        verify_all(&[&k, &child])?;
    }
    diverge(&mut [&mut k, &mut child])?;
    child.advise(0..pages(2), libc::MADV_PAGEOUT)?;
    verify_all(&[&k, &child])?;
    child.peer.exit()?;
    k.advise(0..pages(2), libc::MADV_PAGEOUT)?;
    k.verify()?;
    k.fill(0..pages(2))?;
    k.advise(0..pages(2), libc::MADV_PAGEOUT)?;
    k.verify()?;
    swap.off()
}

/// Who is left alone with its memory, and has not written since, may have it paged out.
fn pageout_when_alone_again(ctx: &Ctx) -> Res {
    let swap = Swap::on(64)?;
    let k = Kin::new(ctx, 2)?;
    k.child(ctx, 2)?.peer.exit()?;
    k.advise(0..pages(2), libc::MADV_PAGEOUT)?;
    let out = k.count(0..pages(2), pagemap::SWAPPED)?;
    ensure!(out > pages(1), "{out} pages are out");
    k.verify()?;
    swap.off()
}

/// MADV_REMOVE is for shared mappings.
fn remove_is_refused(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    for who in [&k, &child] {
        let got = who.peer.madvise(who.at(3), PAGE, libc::MADV_REMOVE)?;
        ensure_eq!(got, Err(Errno(libc::EINVAL)), "MADV_REMOVE");
    }
    child.borrows(ctx, 2)?;
    diverge(&mut [&mut k, &mut child])
}

/// MADV_POPULATE_READ finds everything there; MADV_POPULATE_WRITE makes it one's own.
fn populate(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let before = Events::now();
        let one = if by_child { &child } else { &k };
        one.advise(0..pages(3), libc::MADV_POPULATE_READ)?;
        before.expect(ctx, 0, 0)?;
        one.advise(
            GRANULE_PAGES - 4..GRANULE_PAGES + 4,
            libc::MADV_POPULATE_WRITE,
        )?;
        before.expect(ctx, 2, 0)?;
        verify_all(&[&k, &child])?;
        diverge(&mut [&mut k, &mut child])?;
        before.expect(ctx, 3, 3)?;
    }
    // Holes.
    let mut k = Kin::untouched(ctx, 2)?;
    k.fill(0..9)?;
    k.fill(GRANULE_PAGES..GRANULE_PAGES + 9)?;
    let mut child = k.child(ctx, 2)?;
    child.advise(0..pages(2), libc::MADV_POPULATE_READ)?;
    verify_all(&[&k, &child])?;
    k.advise(0..pages(2), libc::MADV_POPULATE_WRITE)?;
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])
}

/// What changes no page: access patterns, and flags that split the mapping inside a granule.
fn other_hints(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let part = 100..GRANULE_PAGES + 100;
    for advice in [
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
        libc::MADV_WILLNEED,
        libc::MADV_NORMAL,
        libc::MADV_DONTDUMP,
        libc::MADV_DODUMP,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
    ] {
        child.advise(part.clone(), advice)?;
        verify_all(&[&k, &child])?;
        k.advise(part.clone(), advice)?;
        verify_all(&[&k, &child])?;
        k.store(100)?;
        child.store(100)?;
        let grandchild = child.fork()?;
        verify_all(&[&k, &child, &grandchild])?;
    }
    diverge(&mut [&mut k, &mut child])
}

/// MADV_DONTNEED_LOCKED takes the pages of a mapping that is locked, of that process alone.
fn dontneed_of_locked_pages(ctx: &Ctx) -> Res {
    const MADV_DONTNEED_LOCKED: i32 = 24;
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let part = GRANULE_PAGES - 9..GRANULE_PAGES + 9;
        one.advise(part.clone(), MADV_DONTNEED_LOCKED)?;
        one.zero(part.clone());
        verify_all(&[one, other])?;
        // Locks only what is there, so that what is dropped stays away.
        one.must(libc::SYS_mlock2, &[one.at(0), 3 * GRANULE, 1])?;
        let got = one.peer.madvise(one.at(3), PAGE, libc::MADV_DONTNEED)?;
        ensure_eq!(
            got,
            Err(Errno(libc::EINVAL)),
            "MADV_DONTNEED of locked pages"
        );
        one.advise(pages(2)..pages(3), MADV_DONTNEED_LOCKED)?;
        one.zero(pages(2)..pages(3));
        verify_all(&[one, other])?;
        one.must(libc::SYS_munlock, &[one.at(0), 3 * GRANULE])?;
        diverge(&mut [one, other])?;
    }
    Ok(())
}

/// process_madvise of one of them by another process.
fn hints_from_outside(ctx: &Ctx) -> Res {
    let swap = Swap::on(64)?;
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        for advice in [libc::MADV_COLD, libc::MADV_PAGEOUT, libc::MADV_WILLNEED] {
            let one = if by_child { &child } else { &k };
            let pidfd = sys::syscall(libc::SYS_pidfd_open, &[one.peer.pid as u64, 0])?;
            let pidfd = crate::harness::own(pidfd);
            // Of two granules a part each.
            let (first, n) = (GRANULE_PAGES - 100, 200);
            let range = [one.at(first), n * PAGE];
            let a = [
                std::os::fd::AsRawFd::as_raw_fd(&pidfd) as u64,
                range.as_ptr() as u64,
                1,
                advice as u64,
                0,
            ];
            let done = sys::syscall(libc::SYS_process_madvise, &a);
            ensure_eq!(done, Ok(n * PAGE), "bytes advised with {advice}");
            verify_all(&[&k, &child])?;
            k.store(GRANULE_PAGES - 50)?;
            child.store(GRANULE_PAGES - 51)?;
            verify_all(&[&k, &child])?;
        }
        diverge(&mut [&mut k, &mut child])?;
    }
    swap.off()
}

// ---- KSM ----

const KSM: &str = "/sys/kernel/mm/ksm";

/// KSM at work until dropped; what it merged is taken apart then.
struct Ksm(Vec<Setting>);

impl Ksm {
    fn on() -> Res<Ksm> {
        let mut s = vec![];
        for (name, value) in [
            ("sleep_millisecs", "1"),
            ("pages_to_scan", "4000"),
            ("run", "1"),
        ] {
            s.push(Setting::set(&format!("{KSM}/{name}"), value)?);
        }
        s.reverse();
        Ok(Ksm(s))
    }

    fn number(name: &str) -> Res<u64> {
        let text = std::fs::read_to_string(format!("{KSM}/{name}"))?;
        Ok(text.trim().parse().unwrap_or(0))
    }

    /// Some full scans.
    fn scan(&self, times: u64) -> Res {
        let before = Ksm::number("full_scans")?;
        let deadline = Instant::now() + Duration::from_secs(40);
        while Ksm::number("full_scans")? < before + times {
            ensure!(Instant::now() < deadline, "KSM does not get through");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// At least so many pages are one with others.
    fn merged(&self, least: u64) -> Res {
        let deadline = Instant::now() + Duration::from_secs(40);
        while Ksm::number("pages_sharing")? < least {
            if Instant::now() > deadline {
                let n = Ksm::number("pages_sharing")?;
                crate::fail!("KSM has merged {n} pages only, of {least}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        std::fs::write(format!("{KSM}/run"), "2").ok();
        self.0.clear();
    }
}

/// Has the pages hold zeros that are written, each in a page of its own.
fn blank(k: &mut Kin, range: Range<u64>) -> Res {
    let blank: Remote = |a, _| {
        let zeros = [0u8; PAGE as usize];
        crate::peer::access((0..a[1]).try_fold(0, |_, n| {
            sys::copy(a[0] + n * PAGE, zeros.as_ptr() as u64, PAGE).map(|()| 0)
        }))
    };
    let a = [k.at(range.start), range.end - range.start];
    ensure_eq!(k.peer.call(blank, &a, &[])?.0, 0, "writing zeros");
    k.zero(range);
    Ok(())
}

/// Merged pages over a fork: a mapping that KSM may merge in is not shared, and goes on to be merged.
fn ksm_before_the_fork(ctx: &Ctx) -> Res {
    let ksm = Ksm::on()?;
    let mut k = Kin::new(ctx, 2)?;
    let same = GRANULE_PAGES - 100..GRANULE_PAGES + 100;
    blank(&mut k, same.clone())?;
    k.advise(0..pages(2), libc::MADV_MERGEABLE)?;
    ksm.merged(190)?;
    let mut child = k.child(ctx, 0)?;
    verify_all(&[&k, &child])?;
    child.store(same.start)?;
    k.store(same.start + 1)?;
    verify_all(&[&k, &child])?;
    // Merged in both, and by and by what both write alike.
    blank(&mut child, 0..50)?;
    blank(&mut k, 0..50)?;
    ksm.merged(230)?;
    verify_all(&[&k, &child])?;
    child.advise(0..pages(2), libc::MADV_UNMERGEABLE)?;
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])?;
    // Not mergeable any longer, so shared.
    let mut grandchild = child.child(ctx, 2)?;
    diverge(&mut [&mut grandchild, &mut k, &mut child])
}

/// Merged pages in tables that are shared, and tables that KSM finds shared.
fn ksm_after_the_fork(ctx: &Ctx) -> Res {
    let ksm = Ksm::on()?;
    let mut k = Kin::new(ctx, 3)?;
    let same = GRANULE_PAGES - 100..GRANULE_PAGES + 100;
    blank(&mut k, same.clone())?;
    k.advise(0..GRANULE_PAGES, libc::MADV_MERGEABLE)?;
    ksm.merged(90)?;
    let mut child = k.child(ctx, 2)?;
    for p in [&k, &child] {
        p.advise(0..pages(3), libc::MADV_MERGEABLE)?;
    }
    ksm.scan(3)?;
    verify_all(&[&k, &child])?;
    if ctx.sharing {
        // Those of the first granule, which was copied.
        let merged = Ksm::number("pages_sharing")?;
        ensure!(
            merged <= 200,
            "{merged} pages, some of them in shared tables"
        );
    }
    k.store(same.end - 1)?;
    child.store(same.end - 2)?;
    ksm.scan(3)?;
    verify_all(&[&k, &child])?;
    ksm.merged(190)?;
    diverge(&mut [&mut k, &mut child])?;
    ksm.scan(2)?;
    verify_all(&[&k, &child])?;
    // Everything is unmerged under both.
    std::fs::write(format!("{KSM}/run"), "2")?;
    ensure_eq!(Ksm::number("pages_sharing")?, 0, "pages_sharing");
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])
}

// ---- huge pages ----

const MADV_COLLAPSE: i32 = 25;
const THP: &str = "/sys/kernel/mm/transparent_hugepage";

fn huge_kb(k: &Kin, granule: u64) -> Res<u64> {
    let text = kernel::smaps_of(k.peer.pid, k.at(pages(granule)))?;
    Ok(kernel::kb_in(&text, "AnonHugePages").unwrap_or(0))
}

/// Makes a huge page of a granule.
pub(super) fn collapse(k: &Kin, granule: u64) -> Res {
    let at = k.at(pages(granule));
    k.peer.madvise(at, GRANULE, libc::MADV_HUGEPAGE)??;
    for _ in 0..40 {
        match k.peer.madvise(at, GRANULE, MADV_COLLAPSE)? {
            Err(Errno(libc::EAGAIN | libc::EBUSY)) => std::thread::sleep(Duration::from_millis(50)),
            Err(Errno(libc::ENOMEM)) => skip!("no huge page to be had"),
            r => {
                r?;
                return Ok(());
            }
        }
    }
    crate::fail!("MADV_COLLAPSE kept failing");
}

/// One makes a huge page of its granule; the other keeps its small ones.
fn collapse_by_one(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        // Since a fork nothing there is writable, which is a reason to refuse.
        one.advise(0..pages(3), libc::MADV_HUGEPAGE)?;
        let got = one
            .peer
            .madvise(one.at(GRANULE_PAGES), GRANULE, MADV_COLLAPSE)?;
        ensure_eq!(
            got,
            Err(Errno(libc::EINVAL)),
            "MADV_COLLAPSE of memory as forked"
        );
        verify_all(&[one, other])?;
        one.store(GRANULE_PAGES + 300)?;
        collapse(one, 1)?;
        ensure!(huge_kb(one, 1)? >= 2048, "no huge page where it was made");
        ensure_eq!(huge_kb(other, 1)?, 0, "AnonHugePages of the other");
        verify_all(&[&k, &child])?;
        diverge(&mut [&mut k, &mut child])?;
    }
    Ok(())
}

/// khugepaged leaves alone what is shared, and may have it when it is one's own again.
fn khugepaged_passes_by(ctx: &Ctx) -> Res {
    let _e = Setting::set(&format!("{THP}/enabled"), "madvise")?;
    let _p = Setting::set(&format!("{THP}/khugepaged/pages_to_scan"), "65536")?;
    let _m = Setting::set(&format!("{THP}/khugepaged/scan_sleep_millisecs"), "10")?;
    let _a = Setting::set(&format!("{THP}/khugepaged/alloc_sleep_millisecs"), "10")?;
    let mut k = Kin::new(ctx, 3)?;
    let mut child = k.child(ctx, 3)?;
    let number = |name: &str| -> u64 {
        let text = std::fs::read_to_string(format!("{THP}/khugepaged/{name}"));
        text.ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
    };
    for p in [&k, &child] {
        p.advise(0..pages(3), libc::MADV_HUGEPAGE)?;
    }
    let before = number("full_scans");
    let deadline = Instant::now() + Duration::from_secs(20);
    while number("full_scans") < before + 4 && Instant::now() < deadline {
        verify_all(&[&k, &child])?;
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(number("full_scans") > before, "khugepaged did not scan");
    if ctx.sharing {
        ensure_eq!(huge_kb(&k, 0)?, 0, "AnonHugePages of the parent");
        child.borrows(ctx, 3)?;
    }
    diverge(&mut [&mut k, &mut child])?;
    child.peer.exit()?;
    k.fill(0..pages(3))?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while huge_kb(&k, 0)? == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(
        huge_kb(&k, 0)? > 0,
        "khugepaged never took what is one's own"
    );
    k.verify()
}

/// A huge page between small ones: that one is copied, the others are shared.
fn huge_pages_among_small_ones(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    collapse(&k, 1)?;
    let mut child = k.child(ctx, 2)?;
    ensure!(huge_kb(&child, 1)? >= 2048, "the child has no huge page");
    verify_all(&[&k, &child])?;
    child.store(GRANULE_PAGES + 9)?;
    k.store(GRANULE_PAGES + 9)?;
    k.store(GRANULE_PAGES - 1)?;
    child.store(pages(2))?;
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])
}

/// A huge page that is mapped by small entries in a shared table, and split there for one of them.
fn huge_page_is_split_for_one(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    collapse(&k, 1)?;
    // One page less: small entries for the rest of the huge page.
    k.advise(GRANULE_PAGES + 9..GRANULE_PAGES + 10, libc::MADV_DONTNEED)?;
    k.zero(GRANULE_PAGES + 9..GRANULE_PAGES + 10);
    // khugepaged would make it one again.
    k.advise(0..pages(3), libc::MADV_NOHUGEPAGE)?;
    let mut child = k.child(ctx, 3)?;
    verify_all(&[&k, &child])?;
    child.advise(GRANULE_PAGES + 20..GRANULE_PAGES + 30, libc::MADV_DONTNEED)?;
    child.zero(GRANULE_PAGES + 20..GRANULE_PAGES + 30);
    verify_all(&[&k, &child])?;
    k.advise(GRANULE_PAGES + 25..GRANULE_PAGES + 35, libc::MADV_DONTNEED)?;
    k.zero(GRANULE_PAGES + 25..GRANULE_PAGES + 35);
    diverge(&mut [&mut k, &mut child])?;
    let mut grandchild = child.child(ctx, 3)?;
    k.advise(GRANULE_PAGES..pages(2), libc::MADV_DONTNEED)?;
    k.zero(GRANULE_PAGES..pages(2));
    diverge(&mut [&mut k, &mut grandchild, &mut child])
}

// ---- memory failure ----
// The frames that are poisoned here are lost until the next boot: a few pages.

const MADV_HWPOISON: i32 = 100;
const MADV_SOFT_OFFLINE: i32 = 101;
pub(super) const BUS_MCEERR_AR: i32 = 4;

/// The page moves away under all of them, with what it holds.
fn soft_offline(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let frame = |k: &Kin, page: u64| -> Res<u64> { Ok(k.entry(page)? & ((1 << 55) - 1)) };
    for (by_child, page) in [(true, 9), (false, GRANULE_PAGES + 9)] {
        let old = frame(&k, page)?;
        let one = if by_child { &child } else { &k };
        match one.peer.madvise(one.at(page), PAGE, MADV_SOFT_OFFLINE)? {
            Err(Errno(libc::EINVAL | libc::EPERM)) => {
                skip!("no memory failure injection in this kernel")
            }
            r => r?,
        };
        verify_all(&[&k, &child])?;
        for who in [&k, &child] {
            ensure!(frame(who, page)? != old, "still the offlined page");
        }
    }
    diverge(&mut [&mut k, &mut child])
}

/// A page of the process fails.
pub(super) fn poison(one: &Kin, page: u64) -> Res {
    let poison: Remote = |a, _| {
        // The kernel also signals the process that injects, of which the handler makes nothing.
        let r = sys::syscall(libc::SYS_madvise, &[a[0], PAGE, MADV_HWPOISON as u64]);
        sys::catch_faults();
        (flat(r), vec![])
    };
    match one.peer.call(poison, &[one.at(page)], &[])?.0 {
        0 => Ok(()),
        r if r == -i64::from(libc::EINVAL) || r == -i64::from(libc::EPERM) => {
            skip!("no memory failure injection in this kernel")
        }
        r => crate::fail!("MADV_HWPOISON: {}", Errno(-r as i32)),
    }
}

/// Everybody that has the page gets SIGBUS, those who are forked later too; who drops it has zeros.
fn hwpoison(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    for (by_child, page) in [(true, 9), (false, GRANULE_PAGES + 9)] {
        let one = if by_child { &child } else { &k };
        poison(one, page)?;
        let mut grandchild = child.fork()?;
        let neighbours = |k: &Kin| -> Res {
            let g = page / GRANULE_PAGES * GRANULE_PAGES;
            k.sees(g..page)?;
            k.sees(page + 1..g + GRANULE_PAGES)
        };
        for who in [&k, &child, &grandchild] {
            who.faults(page, libc::SIGBUS, BUS_MCEERR_AR)?;
            let got = who.peer.store(who.at(page), 1)?;
            ensure!(
                matches!(got, Err(f) if f.signal == libc::SIGBUS),
                "a store to it: {got:?}"
            );
            neighbours(who)?;
        }
        k.store(page + 1)?;
        neighbours(&k)?;
        neighbours(&child)?;
        for who in [&mut child, &mut k] {
            who.advise(page..page + 1, libc::MADV_DONTNEED)?;
            who.zero(page..page + 1);
            who.verify()?;
        }
        grandchild.faults(page, libc::SIGBUS, BUS_MCEERR_AR)?;
        grandchild.store(page + 1)?;
        grandchild.faults(page, libc::SIGBUS, BUS_MCEERR_AR)?;
        neighbours(&grandchild)?;
    }
    diverge(&mut [&mut k, &mut child])?;
    ensure_eq!(
        k.count(0..pages(2), pagemap::PRESENT)?,
        pages(2),
        "pages present"
    );
    Ok(())
}
