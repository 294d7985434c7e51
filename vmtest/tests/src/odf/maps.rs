//! Changes of mappings inside and around memory that is shared since a fork: munmap, mprotect, mremap, brk,
//! the stack, locks, splits and merges, userfaultfd, soft-dirty.

use super::{diverge, verify_all, Events, Kin};
use crate::harness::{Ctx, Res};
use crate::kernel::{self, pagemap};
use crate::leave::{
    soft_dirty_works, Uffd, EVENT_PAGEFAULT, FLAG_WP, MODE_MISSING, MODE_WP, UFFDIO_API,
    UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WRITEPROTECT,
};
use crate::oracle::{pages, STORE_PAGE};
use crate::peer::{flat, unpack, Peer, Remote};
use crate::sys::{
    self, Errno, ANON, FIXED, GRANULE, GRANULE_PAGES, NONE, PAGE, PRIVATE, RO, RW, SEGV_ACCERR,
    SEGV_MAPERR,
};
use crate::{ensure, ensure_eq, group};
use std::os::fd::AsRawFd;

group!("odf";
    munmap_of_parts,
    munmap_of_whole_granules,
    map_fixed_over_parts,
    mprotect_of_parts,
    mprotect_of_everything,
    mremap_out,
    mremap_in,
    mremap_of_parts,
    mremap_grow_and_shrink,
    mremap_dontunmap,
    brk_shrinks_and_grows,
    stack_grows,
    splits_and_merges,
    borders_that_a_flag_makes,
    mlock_after_the_fork,
    mlock_onfault_after_the_fork,
    mlock_before_the_fork,
    mlockall_and_fork,
    uffd_missing_in_one,
    uffd_wp_in_one,
    uffd_before_the_fork,
    uffd_event_of_a_fork,
    uffd_moves_pages_of_one,
    uffd_move_by_one,
    mmu_notifier_in_one,
    soft_dirty_of_one,
    soft_dirty_before_the_fork,
    pagemap_scan_of_one,
    clear_refs_referenced,
    clear_refs_peak,
    checkpoint_and_restore,
);

/// Both see what they must, but for a part that one of them no longer has.
fn without(one: &Kin, gone: std::ops::Range<u64>, other: &Kin) -> Res {
    one.sees(0..gone.start)?;
    one.sees(gone.end..one.model.pages.len() as u64)?;
    for page in [gone.start, gone.end - 1] {
        one.faults(page, libc::SIGSEGV, SEGV_MAPERR)?;
    }
    other.verify()
}

/// A page, some pages, pages across a border, in the middle and at the ends.
fn munmap_of_parts(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        for gone in [
            GRANULE_PAGES + 9..GRANULE_PAGES + 10,
            0..1,
            pages(3) - 1..pages(3),
            GRANULE_PAGES - 5..GRANULE_PAGES + 5,
            100..pages(2) + 100,
        ] {
            let mut k = Kin::new(ctx, 3)?;
            let mut child = k.child(ctx, 3)?;
            let (one, other) = match by_child {
                true => (&mut child, &mut k),
                false => (&mut k, &mut child),
            };
            one.peer
                .munmap(one.at(gone.start), (gone.end - gone.start) * PAGE)?;
            without(one, gone.clone(), other)?;
            other.store(gone.start)?;
            other.store(gone.end - 1)?;
            if gone.end < pages(3) {
                one.store(gone.end)?;
            }
            without(one, gone, other)?;
            diverge(&mut [other])?;
        }
    }
    Ok(())
}

/// Left without a copy.
fn munmap_of_whole_granules(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 4)?;
    let mut child = k.child(ctx, 4)?;
    let before = Events::now();
    child.peer.munmap(child.at(pages(1)), 2 * GRANULE)?;
    before.expect(ctx, 0, 0)?;
    child.borrows(ctx, 2)?;
    without(&child, pages(1)..pages(3), &k)?;
    k.peer.munmap(k.at(0), GRANULE)?;
    before.expect(ctx, 0, 0)?;
    child.sees(0..pages(1))?;
    child.store(5)?;
    before.expect(ctx, 0, 1)?;
    k.peer.munmap(k.at(pages(1)), 3 * GRANULE)?;
    child.sees(0..pages(1))?;
    child.sees(pages(3)..pages(4))
}

fn map_fixed_over_parts(ctx: &Ctx) -> Res {
    for over in [
        3..4,
        0..GRANULE_PAGES,
        GRANULE_PAGES - 9..GRANULE_PAGES + 9,
        9..pages(2) + 9,
    ] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let len = (over.end - over.start) * PAGE;
        let flags = PRIVATE | ANON | FIXED;
        child
            .peer
            .mmap(child.at(over.start), len, RW, flags, -1, 0)??;
        child.advise(over.clone(), libc::MADV_NOHUGEPAGE)?;
        child.zero(over.clone());
        verify_all(&[&k, &child])?;
        child.store(over.start)?;
        verify_all(&[&k, &child])?;
        k.peer.mmap(k.at(over.start), len, RW, flags, -1, 0)??;
        k.zero(over.clone());
        diverge(&mut [&mut k, &mut child])?;
        let grandchild = child.fork()?;
        verify_all(&[&k, &child, &grandchild])?;
    }
    Ok(())
}

fn mprotect_of_parts(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        for (prot, part) in [
            (RO, GRANULE_PAGES + 9..GRANULE_PAGES + 10),
            (NONE, GRANULE_PAGES - 4..GRANULE_PAGES + 4),
            (RO, 0..GRANULE_PAGES),
            (NONE, 0..GRANULE_PAGES + 1),
        ] {
            let mut k = Kin::new(ctx, 3)?;
            let mut child = k.child(ctx, 3)?;
            let (one, other) = match by_child {
                true => (&mut child, &mut k),
                false => (&mut k, &mut child),
            };
            let len = (part.end - part.start) * PAGE;
            one.must(libc::SYS_mprotect, &[one.at(part.start), len, prot])?;
            for page in [part.start, part.end - 1] {
                let got = one.peer.store(one.at(page), 1)?;
                ensure!(
                    matches!(got, Err(f) if f.code == SEGV_ACCERR),
                    "a store to a protected page: {got:?}"
                );
                if prot == NONE {
                    one.faults(page, libc::SIGSEGV, SEGV_ACCERR)?;
                }
                other.store(page)?;
            }
            other.verify()?;
            one.must(libc::SYS_mprotect, &[one.at(part.start), len, RW])?;
            verify_all(&[one, other])?;
            diverge(&mut [one, other])?;
        }
    }
    Ok(())
}

/// All of it, several times, with children that are made in each state.
fn mprotect_of_everything(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut all = vec![];
    for prot in [RO, RW, NONE, RW, RO, NONE, RW] {
        k.must(libc::SYS_mprotect, &[k.at(0), 2 * GRANULE, prot])?;
        let child = k.child(ctx, 2)?;
        match prot {
            NONE => child.faults(5, libc::SIGSEGV, SEGV_ACCERR)?,
            _ => child.verify()?,
        }
        if prot == RW {
            k.store(all.len() as u64)?;
        }
        all.push((child, prot));
    }
    for (child, prot) in &mut all {
        if *prot == RW {
            child.store(9)?;
        } else {
            child.must(libc::SYS_mprotect, &[child.at(0), 2 * GRANULE, RO])?;
        }
        child.verify()?;
    }
    diverge(&mut [&mut k])
}

const MAYMOVE: u64 = libc::MREMAP_MAYMOVE as u64;
const MFIXED: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
const MDONTUNMAP: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP) as u64;

/// The whole of it goes elsewhere, at the same offset in a granule or at another.
fn mremap_out(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        for shift in [0, 7 * PAGE] {
            let mut k = Kin::new(ctx, 2)?;
            let mut child = k.child(ctx, 2)?;
            let (one, other) = match by_child {
                true => (&mut child, &mut k),
                false => (&mut k, &mut child),
            };
            let to = one.peer.place(0, 3 * GRANULE)? + shift;
            let got = one.must(
                libc::SYS_mremap,
                &[one.base, 2 * GRANULE, 2 * GRANULE, MFIXED, to],
            )?;
            ensure_eq!(got, to, "mremap");
            one.faults(0, libc::SIGSEGV, SEGV_MAPERR)?;
            one.faults(pages(2) - 1, libc::SIGSEGV, SEGV_MAPERR)?;
            one.base = to;
            verify_all(&[one, other])?;
            diverge(&mut [other, one])?;
        }
    }
    Ok(())
}

/// Memory of one's own goes over a part that is shared.
fn mremap_in(ctx: &Ctx) -> Res {
    for (first, n) in [
        (0, GRANULE_PAGES),
        (GRANULE_PAGES - 7, 14),
        (GRANULE_PAGES + 3, 1),
    ] {
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        let from = child.peer.place(0, GRANULE)?;
        let len = n * PAGE;
        child
            .peer
            .mmap(from, len, RW, PRIVATE | ANON | FIXED, -1, 0)??;
        child.peer.madvise(from, len, libc::MADV_NOHUGEPAGE)??;
        for i in 0..n.min(20) {
            let g = super::next();
            let a = [from + i * PAGE, ctx.seed, first + i, u64::from(g)];
            ensure_eq!(child.peer.call(STORE_PAGE, &a, &[])?.0, 0, "the store");
            child.model.pages[(first + i) as usize] = g;
        }
        child.zero(first + n.min(20)..first + n);
        child.must(libc::SYS_mremap, &[from, len, len, MFIXED, child.at(first)])?;
        verify_all(&[&k, &child])?;
        diverge(&mut [&mut k, &mut child])?;
    }
    Ok(())
}

/// A part of a granule goes elsewhere.
fn mremap_of_parts(ctx: &Ctx) -> Res {
    for part in [
        GRANULE_PAGES + 5..GRANULE_PAGES + 9,
        0..GRANULE_PAGES,
        GRANULE_PAGES - 2..pages(2) + 2,
    ] {
        let mut k = Kin::new(ctx, 3)?;
        let child = k.child(ctx, 3)?;
        let n = part.end - part.start;
        let to = child.peer.place(0, 3 * GRANULE)? + part.start * PAGE % GRANULE;
        child.must(
            libc::SYS_mremap,
            &[child.at(part.start), n * PAGE, n * PAGE, MFIXED, to],
        )?;
        without(&child, part.clone(), &k)?;
        child.model.verify_mapped(&child.peer, to, part.clone())?;
        k.fill(part.clone())?;
        without(&child, part.clone(), &k)?;
        child.model.verify_mapped(&child.peer, to, part.clone())?;
        // And back.
        child.must(
            libc::SYS_mremap,
            &[to, n * PAGE, n * PAGE, MFIXED, child.at(part.start)],
        )?;
        verify_all(&[&k, &child])?;
        let mut grandchild = child.fork()?;
        let mut child = child;
        diverge(&mut [&mut grandchild, &mut child, &mut k])?;
    }
    Ok(())
}

fn mremap_grow_and_shrink(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    // In place where nothing is in the way, or elsewhere.
    let to = child.must(
        libc::SYS_mremap,
        &[child.base, 2 * GRANULE, 3 * GRANULE + 5 * PAGE, MAYMOVE, 0],
    )?;
    child.base = to;
    verify_all(&[&k, &child])?;
    ensure_eq!(child.peer.load(child.at(pages(2)))?, Ok(0), "what is new");
    diverge(&mut [&mut k, &mut child])?;
    let got = k.must(
        libc::SYS_mremap,
        &[k.base, 2 * GRANULE, GRANULE + 100 * PAGE, 0, 0],
    )?;
    ensure_eq!(got, k.base, "mremap to less");
    k.sees(0..GRANULE_PAGES + 100)?;
    k.faults(GRANULE_PAGES + 100, libc::SIGSEGV, SEGV_MAPERR)?;
    child.verify()?;
    let second = k.child(ctx, 1)?;
    second.sees(0..GRANULE_PAGES + 100)?;
    k.must(
        libc::SYS_mremap,
        &[k.base, GRANULE + 100 * PAGE, 100 * PAGE, 0, 0],
    )?;
    k.sees(0..100)?;
    second.sees(0..GRANULE_PAGES + 100)?;
    child.verify()
}

/// The tables move, and what was there is empty.
fn mremap_dontunmap(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let to = one.must(
            libc::SYS_mremap,
            &[one.base, 2 * GRANULE, 2 * GRANULE, MDONTUNMAP, 0],
        )?;
        one.model.verify_mapped(&one.peer, to, 0..pages(2))?;
        let moved = one.model.clone();
        one.zero(0..pages(2));
        verify_all(&[one, other])?;
        diverge(&mut [one, other])?;
        moved.verify_mapped(&one.peer, to, 0..pages(2))?;
    }
    Ok(())
}

/// The heap: in a peer, made large, shared, and made smaller and larger again by each.
fn brk_shrinks_and_grows(ctx: &Ctx) -> Res {
    let mut k = Kin::bare(ctx, 4)?;
    let brk = |k: &Kin, end: u64| -> Res {
        ensure_eq!(k.must(libc::SYS_brk, &[end])?, end, "brk");
        Ok(())
    };
    let old = k.must(libc::SYS_brk, &[0])?;
    k.base = old.next_multiple_of(GRANULE);
    let base = k.base;
    brk(&k, base + 4 * GRANULE)?;
    k.advise(0..pages(4), libc::MADV_NOHUGEPAGE)?;
    k.fill(0..pages(4))?;
    let mut child = k.child(ctx, 4)?;
    verify_all(&[&k, &child])?;
    for (n, who) in [&mut child, &mut k].into_iter().enumerate() {
        let end = pages(2) + 100 + n as u64;
        brk(who, base + end * PAGE)?;
        who.sees(0..end)?;
        who.faults(end, libc::SIGSEGV, SEGV_MAPERR)?;
        brk(who, base + 4 * GRANULE)?;
        who.zero(end..pages(4));
        who.verify()?;
    }
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])?;
    let grandchild = child.fork()?;
    brk(&child, base + PAGE)?;
    child.sees(0..1)?;
    verify_all(&[&k, &grandchild])
}

/// In a peer: goes down the stack by so many kilobytes, filling it, and answers a sum of it.
const DEEP: Remote = |a, _| {
    fn down(kb: u64, seed: u64) -> u64 {
        let mut frame = [0u8; 1024];
        for (i, b) in frame.iter_mut().enumerate() {
            *b = (seed + kb + i as u64) as u8;
        }
        let below = if kb == 0 { 0 } else { down(kb - 1, seed) };
        let sum: u64 = std::hint::black_box(&frame)
            .iter()
            .map(|b| u64::from(*b))
            .sum();
        below + sum
    }
    (down(a[0], a[1]) as i64, vec![])
};

/// A stack of some granules, shared, that both go on to use and that grows in both.
fn stack_grows(ctx: &Ctx) -> Res {
    let k = Kin::bare(ctx, 1)?;
    let deep = |p: &Peer, kb: u64, seed: u64| -> Res {
        let want: u64 = (0..=kb)
            .map(|kb| (0..1024u64).map(|i| (seed + kb + i) & 0xff).sum::<u64>())
            .sum();
        ensure_eq!(
            p.call(DEEP, &[kb, seed], &[])?.0 as u64,
            want,
            "the stack's sum"
        );
        Ok(())
    };
    deep(&k.peer, 6000, 1)?;
    let before = Events::now();
    let child = k.peer.fork()?;
    if ctx.sharing {
        ensure!(
            Events::now().since(&before).shared > 0,
            "no part of the stack is shared"
        );
    }
    deep(&child, 6000, 2)?;
    deep(&k.peer, 6500, 3)?;
    let grandchild = child.fork()?;
    deep(&child, 7000, 4)?;
    deep(&grandchild, 7000, 5)?;
    deep(&k.peer, 100, 6)
}

/// Boundaries of mappings that come and go inside shared granules.
fn splits_and_merges(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    let mut child = k.child(ctx, 3)?;
    let part = |k: &Kin, first: u64, n: u64, prot: u64| -> Res {
        k.must(libc::SYS_mprotect, &[k.at(first), n * PAGE, prot])?;
        Ok(())
    };
    for round in 0..4 {
        for first in [50, GRANULE_PAGES - 3, GRANULE_PAGES + 200] {
            part(&child, first, 6, RO)?;
            verify_all(&[&k, &child])?;
            part(&k, first + 2, 6, NONE)?;
            child.verify()?;
            part(&child, first, 6, RW)?;
            part(&k, first + 2, 6, RW)?;
            verify_all(&[&k, &child])?;
        }
        diverge(&mut [&mut k, &mut child])?;
        // Whole again, so all of it can be shared again.
        match round {
            0 => child = k.child(ctx, 3)?,
            1 => child = child.child(ctx, 3)?,
            _ => {}
        }
    }
    // A neighbour that merges with the last mapping, and one that fills a hole.
    child.peer.munmap(child.at(GRANULE_PAGES), 3 * PAGE)?;
    let grandchild = child.child(ctx, 2)?;
    child.map(child.at(GRANULE_PAGES), 3 * PAGE)?;
    child.advise(GRANULE_PAGES..GRANULE_PAGES + 3, libc::MADV_NOHUGEPAGE)?;
    child.zero(GRANULE_PAGES..GRANULE_PAGES + 3);
    verify_all(&[&k, &child])?;
    without(&grandchild, GRANULE_PAGES..GRANULE_PAGES + 3, &k)?;
    // It does not merge there, in a process that was forked, so that granule is of several mappings.
    let last = child.child(ctx, 2)?;
    last.verify()?;
    diverge(&mut [&mut k, &mut child])?;
    last.sees(0..3)
}

/// A flag makes a border inside a granule, and moves it into another one: each is copied then, not when
/// something changes on either side.
fn borders_that_a_flag_makes(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let before = Events::now();
        for (copies, border) in [(1, GRANULE_PAGES + 100), (2, pages(2) + 50)] {
            one.advise(0..border, libc::MADV_DONTDUMP)?;
            before.expect(ctx, copies, 0)?;
            verify_all(&[one, other])?;
        }
        for prot in [RO, RW] {
            one.must(libc::SYS_mprotect, &[one.at(0), 3 * GRANULE, prot])?;
            verify_all(&[one, other])?;
        }
        diverge(&mut [one, other])?;
    }
    Ok(())
}

// ---- locks ----

fn locked_kb(k: &Kin) -> u64 {
    kernel::kb_field(&format!("/proc/{}/status", k.peer.pid), "VmLck").unwrap_or(u64::MAX)
}

/// Locking makes a part one's own; the other's is not locked.
fn mlock_after_the_fork(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        one.must(libc::SYS_mlock, &[one.at(GRANULE_PAGES + 9), 16 * PAGE])?;
        ensure_eq!((locked_kb(one), locked_kb(other)), (64, 0), "VmLck");
        verify_all(&[one, other])?;
        one.must(libc::SYS_mlock, &[one.at(0), 3 * GRANULE])?;
        verify_all(&[one, other])?;
        one.borrows(ctx, 0)?;
        one.must(libc::SYS_munlock, &[one.at(0), 2 * GRANULE])?;
        diverge(&mut [one, other])?;
        one.must(libc::SYS_munlock, &[one.at(0), 3 * GRANULE])?;
        ensure_eq!(locked_kb(one), 0, "VmLck at the end");
        let grandchild = one.child(ctx, 3)?;
        verify_all(&[one, other, &grandchild])?;
    }
    Ok(())
}

/// mlock2(MLOCK_ONFAULT) touches no page, and yet one's tables are one's own from then on.
fn mlock_onfault_after_the_fork(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let before = Events::now();
        let one = if by_child { &child } else { &k };
        one.must(libc::SYS_mlock2, &[one.at(0), 3 * GRANULE, 1])?;
        before.expect(ctx, 3, 0)?;
        verify_all(&[&k, &child])?;
        diverge(&mut [&mut k, &mut child])?;
    }
    Ok(())
}

/// What is locked is copied, at once, and is not locked in the child.
fn mlock_before_the_fork(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    k.must(libc::SYS_mlock, &[k.at(GRANULE_PAGES), GRANULE])?;
    let mut child = k.child(ctx, 2)?;
    ensure_eq!((locked_kb(&k), locked_kb(&child)), (2048, 0), "VmLck");
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])?;
    // The child's is whole again, and not locked.
    let mut grandchild = child.fork()?;
    ensure_eq!(locked_kb(&grandchild), 0, "VmLck of the grandchild");
    diverge(&mut [&mut child, &mut grandchild])
}

fn mlockall_and_fork(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    child.must(libc::SYS_mlockall, &[libc::MCL_CURRENT as u64])?;
    child.borrows(ctx, 0)?;
    verify_all(&[&k, &child])?;
    let mut locked = child.child(ctx, 0)?;
    diverge(&mut [&mut k, &mut child, &mut locked])?;
    k.must(
        libc::SYS_mlockall,
        &[(libc::MCL_CURRENT | libc::MCL_FUTURE) as u64],
    )?;
    verify_all(&[&k, &child, &locked])?;
    k.must(libc::SYS_munlockall, &[])?;
    let mut last = k.child(ctx, 2)?;
    diverge(&mut [&mut last, &mut k, &mut child])
}

// ---- userfaultfd ----

const FEATURE_EVENT_FORK: u64 = 1 << 1;
const EVENT_FORK: u64 = 0x13;

/// Resolves a missing page that `k` waits for.
fn resolve(u: &Uffd, k: &mut Kin, page: u64) -> Res {
    let (kind, _, addr) = u.event()?;
    ensure_eq!(
        (kind, addr & !(PAGE - 1)),
        (EVENT_PAGEFAULT, k.at(page)),
        "the event"
    );
    let at = k.at(page);
    let bytes = k.incoming(page);
    u.ioctl(UFFDIO_COPY, &mut [at, bytes.as_ptr() as u64, PAGE, 0, 0])?;
    let (r, d) = k.peer.finish()?;
    ensure_eq!(unpack(r, &d), Ok(k.word(page)), "the resolved load");
    Ok(())
}

const LOAD: Remote = |a, _| crate::peer::access(sys::load64(a[0]));

/// Missing pages of one that registered after the fork; the other has its pages and fills its holes.
fn uffd_missing_in_one(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let hole = GRANULE_PAGES + 20..GRANULE_PAGES + 30;
        k.advise(hole.clone(), libc::MADV_DONTNEED)?;
        k.zero(hole.clone());
        let mut child = k.child(ctx, 3)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let u = Uffd::of(&one.peer, 0)?;
        u.register(one.at(GRANULE_PAGES), GRANULE, MODE_MISSING)?;
        one.sees(0..hole.start)?;
        other.sees(hole.start..hole.start + 3)?;
        one.peer.start(LOAD, &[one.at(hole.start)], &[])?;
        resolve(&u, one, hole.start)?;
        other.verify()?;
        other.store(hole.start)?;
        // A page that it drops is missing, too.
        let page = GRANULE_PAGES + 5;
        one.advise(page..page + 1, libc::MADV_DONTNEED)?;
        one.peer.start(LOAD, &[one.at(page)], &[])?;
        resolve(&u, one, page)?;
        other.verify()?;
        u.ioctl(UFFDIO_UNREGISTER, &mut [one.at(GRANULE_PAGES), GRANULE])?;
        verify_all(&[one, other])?;
        diverge(&mut [one, other])?;
    }
    Ok(())
}

/// In a peer: UFFDIO_MOVE of a page, which only the process itself may do. Arguments: to, from.
const UFFD_MOVE: Remote = |a, _| {
    const FEATURE_MOVE: u64 = 1 << 16;
    const UFFDIO_MOVE: u64 = 0xc028_aa05;
    let moved = (|| {
        let fd = sys::syscall(libc::SYS_userfaultfd, &[libc::O_CLOEXEC as u64])?;
        let uffd = Uffd {
            fd: crate::harness::own(fd),
        };
        uffd.ioctl(UFFDIO_API, &mut [0xaa, FEATURE_MOVE, 0])?;
        uffd.ioctl(UFFDIO_REGISTER, &mut [a[0], PAGE, MODE_MISSING, 0])?;
        uffd.ioctl(UFFDIO_MOVE, &mut [a[0], a[1], PAGE, 0, 0])
    })();
    (flat(moved.map(|()| 0)), vec![])
};

/// UFFDIO_MOVE takes a page away from one's own table only, and not while others have it.
fn uffd_move_by_one(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let to = one.peer.mmap(0, PAGE, RW, PRIVATE | ANON, -1, 0)??;
        let page = GRANULE_PAGES + 5;
        let a = [to, one.at(page)];
        let (r, _) = one.peer.call(UFFD_MOVE, &a, &[])?;
        if r == -i64::from(libc::ENOSYS) {
            crate::skip!("no userfaultfd in this kernel");
        }
        ensure_eq!(
            r,
            -i64::from(libc::EBUSY),
            "UFFDIO_MOVE of what others have"
        );
        verify_all(&[one, other])?;
        one.store(page)?;
        let word = one.word(page);
        ensure_eq!(one.peer.call(UFFD_MOVE, &a, &[])?.0, 0, "UFFDIO_MOVE");
        ensure_eq!(one.peer.load(to)?, Ok(word), "the page that moved");
        one.zero(page..page + 1);
        verify_all(&[one, other])?;
        diverge(&mut [one, other])?;
    }
    Ok(())
}

/// A virtual machine in one of them: that one has its tables for itself from then on, and what it forks
/// shares none.
fn mmu_notifier_in_one(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let before = Events::now();
        let one = if by_child { &mut child } else { &mut k };
        crate::kvm::create(&one.peer)?;
        before.expect(ctx, 3, 0)?;
        one.child(ctx, 0)?.verify()?;
        diverge(&mut [&mut k, &mut child])?;
    }
    Ok(())
}

/// Write-protection in one; the other writes freely.
fn uffd_wp_in_one(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let u = Uffd::of(&one.peer, 0)?;
        u.register(one.at(GRANULE_PAGES), GRANULE, MODE_WP)?;
        let page = GRANULE_PAGES + 7;
        u.ioctl(UFFDIO_WRITEPROTECT, &mut [one.at(page), 2 * PAGE, 1])?;
        other.store(page)?;
        one.store(page + 2)?;
        let g = super::next();
        one.peer.start(
            STORE_PAGE,
            &[one.at(page), ctx.seed, page, u64::from(g)],
            &[],
        )?;
        let (kind, flags, addr) = u.event()?;
        ensure_eq!(
            (kind, flags & FLAG_WP, addr & !(PAGE - 1)),
            (EVENT_PAGEFAULT, FLAG_WP, one.at(page)),
            "the event"
        );
        ensure!(
            !one.peer.answers_within(50),
            "a store to a write-protected page went through"
        );
        u.ioctl(UFFDIO_WRITEPROTECT, &mut [one.at(page), PAGE, 0])?;
        let (r, d) = one.peer.finish()?;
        unpack(r, &d)?;
        one.model.pages[page as usize] = g;
        verify_all(&[one, other])?;
        // A child of the one is not write-protected: it did not ask for events of forks.
        let mut grandchild = one.fork()?;
        grandchild.store(page + 1)?;
        verify_all(&[one, other, &grandchild])?;
        u.ioctl(UFFDIO_UNREGISTER, &mut [one.at(GRANULE_PAGES), GRANULE])?;
        diverge(&mut [one, other, &mut grandchild])?;
    }
    Ok(())
}

/// What is registered at the fork is copied, the granules beside it shared.
fn uffd_before_the_fork(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    let u = Uffd::of(&k.peer, 0)?;
    u.register(k.at(GRANULE_PAGES), GRANULE, MODE_MISSING | MODE_WP)?;
    let page = GRANULE_PAGES + 7;
    u.ioctl(UFFDIO_WRITEPROTECT, &mut [k.at(page), PAGE, 1])?;
    let mut child = k.child(ctx, 2)?;
    child.store(page)?;
    child.advise(page + 5..page + 6, libc::MADV_DONTNEED)?;
    child.zero(page + 5..page + 6);
    verify_all(&[&k, &child])?;
    u.ioctl(UFFDIO_WRITEPROTECT, &mut [k.at(page), PAGE, 0])?;
    diverge(&mut [&mut k, &mut child])?;
    u.ioctl(UFFDIO_UNREGISTER, &mut [k.at(GRANULE_PAGES), GRANULE])?;
    // The child never was.
    let mut grandchild = child.fork()?;
    diverge(&mut [&mut child, &mut grandchild, &mut k])
}

/// UFFD_FEATURE_EVENT_FORK: the fork is an event, and the child's memory is registered with a descriptor
/// of its own.
fn uffd_event_of_a_fork(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    let u = Uffd::of(&k.peer, FEATURE_EVENT_FORK)?;
    u.register(k.at(GRANULE_PAGES), GRANULE, MODE_MISSING)?;
    // The fork waits until its event is read.
    let event = std::thread::scope(|s| {
        let reader = s.spawn(|| u.event());
        let child = k.fork();
        (reader.join(), child)
    });
    let (Ok(event), child) = event else {
        crate::fail!("reading the event panicked");
    };
    let ((kind, fd, _), mut child) = (event?, child?);
    ensure_eq!(kind, EVENT_FORK, "the event of the fork");
    let theirs = Uffd {
        fd: crate::harness::own(fd & 0xffff_ffff),
    };
    child.borrows(ctx, 2)?;
    let page = GRANULE_PAGES + 11;
    for (who, u) in [(&mut child, &theirs), (&mut k, &u)] {
        who.advise(page..page + 1, libc::MADV_DONTNEED)?;
        who.peer.start(LOAD, &[who.at(page)], &[])?;
        resolve(u, who, page)?;
    }
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])
}

/// In a peer that has a userfaultfd: moves a page by it, which none but the process itself may. Arguments:
/// where to, where from.
const MOVE_HERE: Remote = |a, _| {
    const UFFDIO_MOVE: u64 = 0xc028_aa05;
    let is_uffd = |fd: &u64| {
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}"));
        link.is_ok_and(|l| l.as_os_str() == "anon_inode:[userfaultfd]")
    };
    let Some(fd) = (0..100).find(is_uffd) else {
        return (-i64::from(libc::EBADF), vec![]);
    };
    let mut arg = [a[0], a[1], PAGE, 0, 0];
    let a = [fd, UFFDIO_MOVE, arg.as_mut_ptr() as u64];
    (flat(sys::syscall(libc::SYS_ioctl, &a)), vec![])
};

/// UFFDIO_MOVE out of a table that is shared: a page that others have as well stays, with EBUSY, as after any
/// fork; one's own goes, and nobody else loses it.
fn uffd_moves_pages_of_one(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        k.advise(pages(2)..pages(3), libc::MADV_DONTNEED)?;
        k.zero(pages(2)..pages(3));
        let mut child = k.child(ctx, 3)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let u = Uffd::of(&one.peer, 0)?;
        u.register(one.at(pages(2)), GRANULE, MODE_MISSING)?;
        let (from, to) = (GRANULE_PAGES + 9, pages(2) + 9);
        let move_it = |k: &Kin| -> Res<sys::Sys<u64>> {
            let (r, _) = k.peer.call(MOVE_HERE, &[k.at(to), k.at(from)], &[])?;
            Ok(match r {
                0.. => Ok(r as u64),
                _ => Err(Errno(-r as i32)),
            })
        };
        let got = move_it(one)?;
        ensure_eq!(got, Err(Errno(libc::EBUSY)), "moving what others have");
        one.sees(0..pages(2))?;
        other.verify()?;
        one.store(from)?;
        let moved = one.bytes(from);
        ensure_eq!(move_it(one)?, Ok(0), "moving one's own");
        let mut there = vec![0; PAGE as usize];
        let mem = std::fs::File::open(format!("/proc/{}/mem", one.peer.pid))?;
        sys::pread(&mem, &mut there, one.at(to))?;
        ensure!(there == moved, "what was moved is not what was there");
        one.zero(from..from + 1);
        one.sees(0..pages(2))?;
        other.verify()?;
        one.store(to)?;
        u.ioctl(UFFDIO_UNREGISTER, &mut [one.at(pages(2)), GRANULE])?;
        verify_all(&[one, other])?;
        diverge(&mut [one, other])?;
    }
    Ok(())
}

// ---- soft-dirty and its kin ----

fn dirty(k: &Kin) -> Res<Vec<u64>> {
    let n = k.model.pages.len() as u64;
    let seen = kernel::pagemap(k.peer.pid, k.base, n)?;
    Ok((0..n)
        .filter(|p| seen[*p as usize] & pagemap::SOFT_DIRTY != 0)
        .collect())
}

fn clear(k: &Kin, what: &str) -> Res {
    Ok(std::fs::write(
        format!("/proc/{}/clear_refs", k.peer.pid),
        what,
    )?)
}

/// Tracking in one: its own writes and no others; the other's bits are as they were.
fn soft_dirty_of_one(ctx: &Ctx) -> Res {
    if !soft_dirty_works()? {
        crate::skip!("no soft-dirty tracking in this kernel");
    }
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        clear(one, "4")?;
        ensure_eq!(dirty(one)?, vec![], "right after clear_refs");
        ensure_eq!(
            dirty(other)?.len() as u64,
            pages(2),
            "soft-dirty pages of the other"
        );
        other.store(3)?;
        other.store(GRANULE_PAGES + 3)?;
        one.verify()?;
        ensure_eq!(dirty(one)?, vec![], "after only the other wrote");
        one.store(5)?;
        one.store(GRANULE_PAGES)?;
        ensure_eq!(dirty(one)?, vec![5, GRANULE_PAGES], "after two stores");
        clear(one, "4")?;
        one.store(6)?;
        ensure_eq!(dirty(one)?, vec![6], "after one more");
        verify_all(&[one, other])?;
    }
    Ok(())
}

/// Bits that are there before the fork: the child's copy of them, and tracking that goes on in the parent.
fn soft_dirty_before_the_fork(ctx: &Ctx) -> Res {
    if !soft_dirty_works()? {
        crate::skip!("no soft-dirty tracking in this kernel");
    }
    let mut k = Kin::new(ctx, 2)?;
    clear(&k, "4")?;
    k.store(7)?;
    k.store(GRANULE_PAGES + 7)?;
    let mut child = k.fork()?;
    ensure_eq!(
        dirty(&k)?,
        vec![7, GRANULE_PAGES + 7],
        "in the parent after the fork"
    );
    k.store(9)?;
    ensure_eq!(
        dirty(&k)?,
        vec![7, 9, GRANULE_PAGES + 7],
        "in the parent after a store"
    );
    child.store(11)?;
    ensure!(dirty(&child)?.contains(&11), "the child's store shows");
    verify_all(&[&k, &child])?;
    child.peer.exit()?;
    k.store(GRANULE_PAGES + 1)?;
    ensure_eq!(
        dirty(&k)?,
        vec![7, 9, GRANULE_PAGES + 1, GRANULE_PAGES + 7],
        "in the parent after the child's end"
    );
    // Who begins to track its own writes does not disturb the other's tracking.
    let other = k.child(ctx, 2)?;
    clear(&other, "4")?;
    ensure_eq!(dirty(&other)?, vec![], "in a child after clear_refs");
    ensure_eq!(
        dirty(&k)?,
        vec![7, 9, GRANULE_PAGES + 1, GRANULE_PAGES + 7],
        "in the parent after the child's clear_refs"
    );
    k.verify()
}

const PAGEMAP_SCAN: u64 = 0xc060_6610;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const WP_MATCHING: u64 = 1;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// In a peer: which pages were written since the last time. Arguments: address, length.
const SCAN: Remote = |a, _| {
    let Ok(f) = std::fs::File::open("/proc/self/pagemap") else {
        return (-1, vec![]);
    };
    let mut regions = [[0u64; 3]; 64];
    let mut arg = [
        96,
        WP_MATCHING | 2,
        a[0],
        a[0] + a[1],
        0,
        regions.as_mut_ptr() as u64,
        64,
        0,
        0,
        PAGE_IS_WRITTEN,
        0,
        PAGE_IS_WRITTEN,
    ];
    let fd = f.as_raw_fd() as u64;
    match sys::syscall(
        libc::SYS_ioctl,
        &[fd, PAGEMAP_SCAN, arg.as_mut_ptr() as u64],
    ) {
        Ok(n) => {
            let found = regions[..n as usize].iter();
            let bounds = found.flat_map(|r| [(r[0] - a[0]) / PAGE, (r[1] - a[0]) / PAGE]);
            (n as i64, bounds.flat_map(u64::to_ne_bytes).collect())
        }
        Err(e) => (flat(Err(e)), vec![]),
    }
};

/// PAGEMAP_SCAN with write-protection in one of them.
fn pagemap_scan_of_one(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let u = Uffd::of(&one.peer, FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC)?;
        u.register(one.base, 2 * GRANULE, MODE_WP)?;
        let scan = |k: &Kin| -> Res<Vec<u64>> {
            let (n, d) = k.peer.call(SCAN, &[k.base, 2 * GRANULE], &[])?;
            if n == -i64::from(libc::ENOTTY) {
                crate::skip!("no PAGEMAP_SCAN in this kernel");
            }
            ensure!(n >= 0, "PAGEMAP_SCAN: {}", Errno(-n as i32));
            Ok(d.chunks_exact(8).map(crate::peer::word).collect())
        };
        scan(one)?;
        ensure_eq!(scan(one)?, vec![], "right after write-protection");
        other.store(3)?;
        one.verify()?;
        ensure_eq!(scan(one)?, vec![], "after only the other wrote");
        one.store(9)?;
        one.store(GRANULE_PAGES)?;
        ensure_eq!(
            scan(one)?,
            vec![9, 10, GRANULE_PAGES, GRANULE_PAGES + 1],
            "written ranges"
        );
        verify_all(&[one, other])?;
        diverge(&mut [one, other])?;
    }
    Ok(())
}

/// clear_refs 1: the referenced bits of one.
fn clear_refs_referenced(ctx: &Ctx) -> Res {
    let referenced = |k: &Kin| -> Res<u64> {
        let text = kernel::smaps_of(k.peer.pid, k.base)?;
        Ok(kernel::kb_in(&text, "Referenced").unwrap_or(0) / 4)
    };
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    clear(&child, "1")?;
    // The page's own mark is cleared, too, which is everybody's.
    ensure_eq!(referenced(&child)?, 0, "right after clear_refs");
    child.sees(0..10)?;
    let n = referenced(&child)?;
    ensure!(
        (10..=26).contains(&n),
        "{n} pages referenced, of which 10 were read"
    );
    verify_all(&[&k, &child])?;
    clear(&k, "1")?;
    diverge(&mut [&mut k, &mut child])
}

/// clear_refs 5: the peak of rss is what is there now.
fn clear_refs_peak(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    k.advise(GRANULE_PAGES..pages(3), libc::MADV_DONTNEED)?;
    k.zero(GRANULE_PAGES..pages(3));
    // Empty tables are shared like others.
    let mut child = k.child(ctx, 3)?;
    for who in [&k, &child] {
        clear(who, "5")?;
        let path = format!("/proc/{}/status", who.peer.pid);
        let [peak, now] = ["VmHWM", "VmRSS"].map(|n| kernel::kb_field(&path, n).unwrap_or(0));
        ensure!(
            peak.abs_diff(now) < 1024,
            "VmHWM is {peak} kB, VmRSS {now} kB"
        );
    }
    diverge(&mut [&mut k, &mut child])
}

/// What a checkpointer does: stop the process, read which pages it has and what is in them, let it run, stop it
/// again and read what it has written since. Put into a new process that is the old one, whose parent
/// lives on, and whose children share.
fn checkpoint_and_restore(ctx: &Ctx) -> Res {
    if !soft_dirty_works()? {
        crate::skip!("no soft-dirty tracking in this kernel");
    }
    let n = 3;
    let mut k = Kin::new(ctx, n)?;
    let hole = GRANULE_PAGES + 20..GRANULE_PAGES + 30;
    k.advise(hole.clone(), libc::MADV_DONTNEED)?;
    k.zero(hole.clone());
    let mut child = k.child(ctx, n)?;
    child.store(3)?;
    // Made now, as later this process has a heap of whole granules that it would get, too.
    let mut restored = Kin::untouched(ctx, n)?;
    let mut image = std::collections::HashMap::new();
    let mut dump = |child: &Kin, wanted: u64| -> Res<usize> {
        let pid = child.peer.pid as u64;
        let ptrace =
            |request: u32| sys::syscall(libc::SYS_ptrace, &[u64::from(request), pid, 0, 0]);
        ptrace(libc::PTRACE_SEIZE)?;
        ptrace(libc::PTRACE_INTERRUPT)?;
        sys::wait(child.peer.pid)?;
        let seen = kernel::pagemap(child.peer.pid, child.base, pages(n))?;
        let found: Vec<u64> = (0..pages(n))
            .filter(|p| seen[*p as usize] & wanted != 0)
            .collect();
        for page in &found {
            let mut buf = vec![0u8; PAGE as usize];
            let local = [buf.as_mut_ptr() as u64, PAGE];
            let remote = [child.at(*page), PAGE];
            let [l, r] = [&local, &remote].map(|v| v.as_ptr() as u64);
            let got = sys::syscall(libc::SYS_process_vm_readv, &[pid, l, 1, r, 1, 0]);
            ensure_eq!(got, Ok(PAGE), "process_vm_readv of page {page}");
            image.insert(*page, buf);
        }
        clear(child, "4")?;
        ptrace(libc::PTRACE_DETACH)?;
        Ok(found.len())
    };
    let all = dump(&child, pagemap::PRESENT | pagemap::SWAPPED)?;
    ensure_eq!(all as u64, pages(n) - 10, "pages of the first dump");
    verify_all(&[&k, &child])?;
    // Between the dumps: writes of all of them, and a child. It shares nothing: process_vm_readv has pinned pages.
    let grandchild = child.child(ctx, 0)?;
    for page in [4, hole.start, pages(2)] {
        child.store(page)?;
        k.store(page + 1)?;
    }
    ensure_eq!(
        dump(&child, pagemap::SOFT_DIRTY)?,
        3,
        "pages of the second dump"
    );
    let model = child.model.clone();
    child.peer.exit()?;
    let mem = std::fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/{}/mem", restored.peer.pid))?;
    for (page, bytes) in &image {
        sys::pwrite(&mem, bytes, restored.at(*page))?;
    }
    restored.model = model;
    let mut its_child = restored.child(ctx, n)?;
    verify_all(&[&k, &grandchild, &restored, &its_child])?;
    diverge(&mut [&mut restored, &mut its_child, &mut k])?;
    grandchild.verify()
}
