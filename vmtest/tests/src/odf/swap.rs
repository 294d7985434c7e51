//! Swap: pages that go out while their table is shared, and come back for one, for all, or by swapoff.

use super::{diverge, verify_all, Events, Kin};
use crate::harness::{Ctx, Res};
use crate::kernel::{self, pagemap};
use crate::machine::{Cgroup, Setting, Swap};
use crate::oracle::pages;
use crate::sys::{self, GRANULE, GRANULE_PAGES, PAGE};
use crate::{ensure, ensure_eq, group};
use std::time::{Duration, Instant};

group!("odf";
    swap_out_while_shared(120),
    swap_in_by_reading(120),
    swap_in_by_writing(120),
    swap_before_the_fork(120),
    swap_again_and_again(180),
    swapoff_with_shared_tables(120),
    swapoff_with_three_generations(120),
    swap_cache_is_reused(120),
    owner_leaves_first(120),
    borrower_leaves_first(120),
    reclaim_counts_in_the_owner(120),
    swapoff_of_what_was_out_before_the_fork(120),
    swap_counts(120),
    swap_counts_of_many(120),
    fault_around_swap_by_hint(120),
    use_of_any_table_keeps_a_page(180),
);

/// A cgroup with swap in which a family lives.
struct Pond {
    // In the order in which they must go.
    group: Cgroup,
    swap: Swap,
}

impl Pond {
    fn new() -> Res<Pond> {
        let swap = Swap::on(128)?;
        Ok(Pond {
            group: Cgroup::enter()?,
            swap,
        })
    }

    /// Nearly all that the process has goes out.
    fn drain(&self, k: &Kin) -> Res {
        let all = k.model.pages.len() as u64;
        let deadline = Instant::now() + Duration::from_secs(40);
        // Pages that were just used take a second round or a third.
        while k.count(0..all, pagemap::SWAPPED)? < all - all / 8 {
            ensure!(
                Instant::now() < deadline,
                "of {all} pages only {} were swapped out",
                k.count(0..all, pagemap::SWAPPED)?
            );
            self.group.reclaim(all * PAGE);
        }
        Ok(())
    }
}

/// What /proc says of a process's memory, in pages: resident and swapped anonymous ones.
fn counted(k: &Kin) -> Res<(u64, u64)> {
    let text = kernel::smaps_of(k.peer.pid, k.base)?;
    let field = |n| kernel::kb_in(&text, n).unwrap_or(u64::MAX) / 4;
    Ok((field("Rss"), field("Swap")))
}

/// Reclaim writes the page out once for all of them, and none of them has it mapped afterwards.
fn swap_out_while_shared(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let mut k = Kin::new(ctx, 3)?;
    let mut child = k.child(ctx, 3)?;
    let before = Events::now();
    pond.drain(&k)?;
    before.expect(ctx, 0, 0)?;
    child.borrows(ctx, 3)?;
    let out = k.count(0..pages(3), pagemap::SWAPPED)?;
    if ctx.sharing {
        ensure_eq!(
            child.count(0..pages(3), pagemap::SWAPPED)?,
            out,
            "the child's swapped pages"
        );
    }
    ensure!(pond.swap.used_pages() >= out, "used swap");
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])
}

/// A read brings pages back into a table of one's own.
fn swap_in_by_reading(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        pond.drain(&k)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        one.sees(GRANULE_PAGES..pages(2))?;
        other.sees(GRANULE_PAGES..pages(2))?;
        one.sees(0..9)?;
        one.store(3)?;
        other.store(pages(2))?;
        verify_all(&[one, other])?;
        diverge(&mut [one, other])?;
    }
    Ok(())
}

/// A write to a page that is out: it is one's own afterwards, and the other's is what it was.
fn swap_in_by_writing(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    for order in 0..3 {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        pond.drain(&k)?;
        for page in [0, 1, GRANULE_PAGES - 1, GRANULE_PAGES, pages(3) - 1] {
            // Without a read before it, of which the first write says what else was there.
            match order {
                0 => k.store(page)?,
                1 => child.store(page)?,
                _ => {
                    k.store(page)?;
                    child.store(page)?;
                }
            }
        }
        verify_all(&[&k, &child])?;
        pond.drain(&child)?;
        pond.drain(&k)?;
        k.store(5)?;
        child.store(5)?;
        verify_all(&[&k, &child])?;
    }
    Ok(())
}

/// A table of swap entries is shared like any other.
fn swap_before_the_fork(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let mut k = Kin::new(ctx, 3)?;
    pond.drain(&k)?;
    let mut child = k.child(ctx, 3)?;
    child.store(4)?;
    k.store(4)?;
    child.sees(GRANULE_PAGES..pages(2))?;
    child.peer.munmap(child.at(pages(2)), GRANULE)?;
    k.verify()?;
    child.sees(0..pages(2))?;
    pond.drain(&k)?;
    let mut second = k.child(ctx, 3)?;
    child.peer.exit()?;
    diverge(&mut [&mut second, &mut k])
}

/// Out and in, with writes by either in between, and children that come and go.
fn swap_again_and_again(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    for round in 0..if ctx.long { 40 } else { 4 } {
        k.fill_every(37, 7 * round..pages(2))?;
        child.fill_every(53, 5 * round..pages(2))?;
        pond.drain(&k)?;
        pond.drain(&child)?;
        verify_all(&[&k, &child])?;
        child = match round % 3 {
            0 => k.child(ctx, 2)?,
            1 => child.child(ctx, 2)?,
            _ => child,
        };
        pond.drain(&child)?;
    }
    verify_all(&[&k, &child])
}

/// swapoff finds every entry in tables that several use, and ends.
fn swapoff_with_shared_tables(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let mut k = Kin::new(ctx, 3)?;
    let mut child = k.child(ctx, 3)?;
    pond.drain(&k)?;
    child.store(7)?;
    let Pond { swap, group } = pond;
    swap.off()?;
    for who in [&k, &child] {
        ensure_eq!(
            who.count(0..pages(3), pagemap::SWAPPED)?,
            0,
            "entries left after swapoff"
        );
    }
    verify_all(&[&k, &child])?;
    diverge(&mut [&mut k, &mut child])?;
    drop(group);
    Ok(())
}

/// The one that swapped is gone; those that are left only ever borrowed.
fn swapoff_with_three_generations(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let k = Kin::new(ctx, 3)?;
    let mut child = k.child(ctx, 3)?;
    let mut grandchild = child.child(ctx, 3)?;
    pond.drain(&k)?;
    let late = grandchild.child(ctx, 3)?;
    k.peer.exit()?;
    child.store(1)?;
    let Pond { swap, group } = pond;
    swap.off()?;
    verify_all(&[&child, &grandchild, &late])?;
    late.peer.exit()?;
    diverge(&mut [&mut child, &mut grandchild])?;
    drop(group);
    Ok(())
}

/// A page that comes back from the swap cache: written in place only by who is alone with it.
fn swap_cache_is_reused(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    for order in 0..4 {
        let mut k = Kin::new(ctx, 1)?;
        let mut child = k.child(ctx, 1)?;
        pond.drain(&k)?;
        // One reads, which leaves the page in the cache with the entry still in use.
        let (reader, writer) = match order % 2 {
            0 => (&mut k, &mut child),
            _ => (&mut child, &mut k),
        };
        reader.sees(0..GRANULE_PAGES)?;
        writer.fill(0..64)?;
        verify_all(&[reader, writer])?;
        reader.fill(32..96)?;
        verify_all(&[reader, writer])?;
        if order / 2 == 1 {
            pond.drain(reader)?;
            pond.drain(writer)?;
            child.peer.exit()?;
            k.fill(0..128)?;
            k.verify()?;
        }
    }
    Ok(())
}

/// The parent goes while the pages are out; the child has them, and its counters.
fn owner_leaves_first(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let k = Kin::new(ctx, 3)?;
    let mut child = k.child(ctx, 3)?;
    pond.drain(&k)?;
    k.peer.exit()?;
    let (rss, swap) = counted(&child)?;
    ensure_eq!(rss + swap, pages(3), "pages of the child, in and out");
    child.sees(0..GRANULE_PAGES)?;
    child.store(GRANULE_PAGES + 4)?;
    child.verify()?;
    pond.drain(&child)?;
    child.verify()?;
    child.fill(0..pages(3))?;
    child.verify()?;
    child.peer.exit()?;
    empty(pond)
}

fn borrower_leaves_first(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let mut k = Kin::new(ctx, 3)?;
    let child = k.child(ctx, 3)?;
    pond.drain(&k)?;
    child.sees(0..9)?;
    child.peer.exit()?;
    let (rss, swap) = counted(&k)?;
    ensure_eq!(rss + swap, pages(3), "pages of the parent, in and out");
    k.verify()?;
    pond.drain(&k)?;
    k.fill(0..pages(3))?;
    k.verify()?;
    k.peer.exit()?;
    empty(pond)
}

/// Nothing is left of the family in swap, but what this process has there itself.
fn empty(pond: Pond) -> Res {
    let own = || kernel::kb_field("/proc/self/status", "VmSwap").unwrap_or(0) / 4;
    let left = || -> Res<u64> { Ok(pond.group.number("memory.swap.current")? / PAGE) };
    let deadline = Instant::now() + Duration::from_secs(10);
    // Each CPU keeps up to two lots of 64 slots that are free but not yet given back.
    let kept = 128 * sys::cpus() as u64;
    while left()? > own() + kept {
        if Instant::now() > deadline {
            crate::fail!(
                "{} pages are left in swap, {} of this process",
                left()?,
                own()
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // An entry that nobody has would keep this from ending.
    pond.swap.off()
}

/// Pages go out that are in the counters of one, through the mapping of another one, which comes first;
/// and pages that are in nobody's counters, for their owner has copied.
fn reclaim_counts_in_the_owner(ctx: &Ctx) -> Res {
    for copies in [false, true] {
        let pond = Pond::new()?;
        let mut k = Kin::new(ctx, 3)?;
        let child = k.child(ctx, 3)?;
        k.peer.munmap(k.at(0), GRANULE)?;
        if copies {
            k.fill(GRANULE_PAGES..pages(3))?;
        }
        pond.drain(&child)?;
        for who in [&k, &child] {
            let path = format!("/proc/{}/smaps_rollup", who.peer.pid);
            let out = kernel::kb_field(&path, "Swap").unwrap_or(u64::MAX) / 4;
            ensure_eq!(status(who)?.1, out, "VmSwap, and Swap in smaps");
        }
        child.verify()?;
        k.sees(GRANULE_PAGES..pages(3))?;
        // Counters that are wrong the kernel complains of now.
        k.peer.exit()?;
        child.peer.exit()?;
        empty(pond)?;
    }
    Ok(())
}

/// A process that has nothing out but what was out when it was forked is found by swapoff.
fn swapoff_of_what_was_out_before_the_fork(ctx: &Ctx) -> Res {
    let swap = Swap::on(128)?;
    let mut k = Kin::new(ctx, 2)?;
    let out = |k: &Kin| k.count(0..pages(2), pagemap::SWAPPED);
    let deadline = Instant::now() + Duration::from_secs(40);
    while out(&k)? < pages(1) {
        ensure!(Instant::now() < deadline, "{} pages are out", out(&k)?);
        k.advise(0..pages(2), libc::MADV_PAGEOUT)?;
    }
    let mut child = k.child(ctx, 2)?;
    let mut grandchild = child.child(ctx, 2)?;
    swap.off()?;
    for who in [&k, &child, &grandchild] {
        ensure_eq!(out(who)?, 0, "pages out after swapoff");
    }
    diverge(&mut [&mut grandchild, &mut k, &mut child])
}

/// In status, in smaps and in the pagemap, for both, at every step.
fn swap_counts(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let k = Kin::new(ctx, 3)?;
    let (before_rss, _) = status(&k)?;
    let mut child = k.child(ctx, 3)?;
    let check = |who: &Kin, others: u64| -> Res {
        let out = who.count(0..pages(3), pagemap::SWAPPED)?;
        let present = who.count(0..pages(3), pagemap::PRESENT)?;
        ensure_eq!(out + present, pages(3), "pages in pagemap");
        ensure_eq!(counted(who)?, (present, out), "Rss and Swap in smaps");
        let (rss, swap) = status(who)?;
        ensure_eq!(swap, out + others, "VmSwap in status");
        ensure!(rss >= present, "VmRSS {rss} with {present} pages present");
        Ok(())
    };
    check(&k, 0)?;
    check(&child, 0)?;
    pond.drain(&k)?;
    for who in [&k, &child] {
        let text = kernel::smaps_of(who.peer.pid, who.base)?;
        let [all, part] = ["Swap", "SwapPss"].map(|f| kernel::kb_in(&text, f));
        ensure_eq!(part.map(|kb| 2 * kb), all, "SwapPss, twice, and Swap");
    }
    let others = |who: &Kin| -> Res<u64> {
        // What else of the process is out.
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", who.peer.pid))?;
        let all = kernel::kb_in(&text, "Swap").unwrap_or(0) / 4;
        Ok(all - who.count(0..pages(3), pagemap::SWAPPED)?)
    };
    for who in [&k, &child] {
        check(who, others(who)?)?;
    }
    child.store(4)?;
    k.sees(GRANULE_PAGES..pages(2))?;
    for who in [&k, &child] {
        check(who, others(who)?)?;
    }
    let grandchild = child.child(ctx, 3)?;
    for who in [&k, &child, &grandchild] {
        check(who, others(who)?)?;
    }
    k.peer.exit()?;
    for who in [&child, &grandchild] {
        check(who, others(who)?)?;
    }
    child.peer.exit()?;
    check(&grandchild, others(&grandchild)?)?;
    grandchild.verify()?;
    let (rss, _) = status(&grandchild)?;
    ensure!(
        rss.abs_diff(before_rss) < 200,
        "VmRSS of the last one is {rss} pages, the first one had {before_rss}"
    );
    grandchild.peer.exit()?;
    empty(pond)
}

/// VmRSS and VmSwap in pages.
fn status(k: &Kin) -> Res<(u64, u64)> {
    let path = format!("/proc/{}/status", k.peer.pid);
    let field = |n| kernel::kb_field(&path, n).unwrap_or(u64::MAX) / 4;
    Ok((field("VmRSS"), field("VmSwap")))
}

/// More sharers of one entry than its first counter holds: copying makes room.
fn swap_counts_of_many(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let mut k = Kin::new(ctx, 1)?;
    pond.drain(&k)?;
    let mut all = vec![];
    // SWAP_MAP_MAX is 62.
    for n in 0..if ctx.long { 160 } else { 75 } {
        let child = k.child(ctx, 1)?;
        if ctx.sharing {
            // Only a copy raises the count.
            child.must(libc::SYS_mprotect, &[child.at(0), PAGE, sys::RO])?;
            child.must(libc::SYS_mprotect, &[child.at(0), PAGE, sys::RW])?;
            child.borrows(ctx, 0)?;
        }
        if n % 25 == 0 {
            child.sees(0..40)?;
        }
        all.push(child);
    }
    for child in all.iter_mut().step_by(9) {
        child.store(17)?;
        child.verify()?;
    }
    k.fill(0..100)?;
    k.verify()?;
    for child in &all {
        child.sees(0..GRANULE_PAGES)?;
    }
    while let Some(child) = all.pop() {
        child.peer.exit()?;
    }
    k.verify()?;
    k.peer.exit()?;
    empty(pond)
}

/// MADV_WILLNEED and MADV_PAGEOUT by one of them.
fn fault_around_swap_by_hint(ctx: &Ctx) -> Res {
    let pond = Pond::new()?;
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    pond.drain(&k)?;
    child.advise(0..pages(2), libc::MADV_WILLNEED)?;
    k.advise(0..pages(1), libc::MADV_WILLNEED)?;
    verify_all(&[&k, &child])?;
    child.store(3)?;
    k.store(GRANULE_PAGES + 3)?;
    for _ in 0..3 {
        child.advise(0..pages(2), libc::MADV_PAGEOUT)?;
        k.advise(0..pages(2), libc::MADV_PAGEOUT)?;
        verify_all(&[&k, &child])?;
    }
    diverge(&mut [&mut k, &mut child])
}

/// Pages that several shared tables map, of which each is read through one table alone: reclaim asks them all,
/// and takes the others.
fn use_of_any_table_keeps_a_page(ctx: &Ctx) -> Res {
    // Reclaim that asks the tables of each page by itself.
    let _lru = Setting::set("/sys/kernel/mm/lru_gen/enabled", "0")?;
    let swap = Swap::on(256)?;
    // More tables than reclaim remembers having seen are asked as well.
    for (tables, reader) in [(3, 2), (3, 1), (3, 0), (6, 5)] {
        let group = Cgroup::enter()?;
        // While a table is one's own; it would be copied else.
        let forget = |k: &Kin| std::fs::write(format!("/proc/{}/clear_refs", k.peer.pid), "1");
        let mut line = vec![Kin::new(ctx, 2)?];
        forget(&line[0])?;
        let mut seconds: Vec<Kin> = vec![];
        for n in 1..tables {
            let next = line[n - 1].child(ctx, 2)?;
            for prot in [sys::RO, sys::RW] {
                next.must(libc::SYS_mprotect, &[next.base, 2 * GRANULE, prot])?;
            }
            next.borrows(ctx, 0)?;
            forget(&next)?;
            // Whoever has a table shares it, and comes later than the next one with a table.
            seconds.push(line[n - 1].child(ctx, 2)?);
            line.push(next);
        }
        seconds.push(line[tables - 1].child(ctx, 2)?);
        let family = || line.iter().chain(&seconds);
        for who in &seconds {
            who.borrows(ctx, 2)?;
        }
        let used = |page: u64| page.is_multiple_of(2);
        for page in (0..pages(2)).filter(|p| used(*p)) {
            let got = seconds[reader].peer.load(line[0].at(page))?;
            ensure_eq!(got, Ok(line[0].word(page)), "page {page}");
        }
        let there = |want: bool| -> Res<u64> {
            let seen = kernel::pagemap(line[0].peer.pid, line[0].base, pages(2))?;
            let there = |(page, e): &(usize, &u64)| {
                used(*page as u64) == want && **e & pagemap::PRESENT != 0
            };
            Ok(seen.iter().enumerate().filter(there).count() as u64)
        };
        let half = pages(1);
        ensure_eq!((there(true)?, there(false)?), (half, half), "before");
        let deadline = Instant::now() + Duration::from_secs(30);
        while there(false)? > half * 3 / 4 && there(true)? > half * 3 / 4 {
            ensure!(Instant::now() < deadline, "nothing is reclaimed");
            group.reclaim(32 * PAGE);
        }
        let (used, unused) = (there(true)?, there(false)?);
        ensure!(
            used > half * 15 / 16,
            "{tables} tables, read through number {reader}: of {half} pages each, {used} that were \
             used and {unused} that were not are there"
        );
        family().try_for_each(|who| who.verify())?;
    }
    swap.off()
}
