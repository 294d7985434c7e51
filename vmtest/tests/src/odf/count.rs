//! What /proc and the cgroup say of memory that is shared since a fork: what they would say after any
//! fork, while it lasts and when either is gone.

use super::{diverge, Events, Kin};
use crate::harness::{Ctx, Res};
use crate::kernel::{self, pagemap};
use crate::machine::Cgroup;
use crate::oracle::pages;
use crate::sys::{self, GRANULE, GRANULE_PAGES, PAGE};
use crate::{ensure, ensure_eq, group, skip};
use std::time::{Duration, Instant};

group!("odf";
    rss_of_parent_and_child,
    rss_after_every_step,
    zeros_of_a_split_huge_page,
    pss_is_divided,
    exclusive_bit,
    numa_maps_counts_processes,
    oom_score_of_a_borrower,
    page_tables_are_not_made,
    page_tables_of_a_living_child,
    cgroup_pays_once,
    cgroup_is_empty_in_the_end,
    counters_of_file_and_shmem_pages,
    walks_do_not_unshare,
    oom_score_of_a_child,
    oom_score_after_copies,
    peak_of_a_child,
    stat_does_not_wait_for_a_fork(120),
);

fn numbers(path: &str) -> Res<Vec<u64>> {
    let text = std::fs::read_to_string(path)?;
    Ok(text
        .split_whitespace()
        .filter_map(|w| w.parse().ok())
        .collect())
}

/// Resident anonymous pages of a process by each account of them: status (RssAnon), statm less its shared
/// pages, stat less those, smaps_rollup (Anonymous).
fn accounts(k: &Kin) -> Res<[u64; 4]> {
    let pid = k.peer.pid;
    let status = kernel::kb_field(&format!("/proc/{pid}/status"), "RssAnon").unwrap_or(0) / 4;
    let statm = numbers(&format!("/proc/{pid}/statm"))?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit(')').next().unwrap_or("");
    // rss is field 24, the state, first after the name, is field 3.
    let rss: u64 = after_name
        .split_whitespace()
        .nth(21)
        .and_then(|w| w.parse().ok())
        .unwrap_or(0);
    let rollup =
        kernel::kb_field(&format!("/proc/{pid}/smaps_rollup"), "Anonymous").unwrap_or(0) / 4;
    Ok([
        status,
        statm[1].saturating_sub(statm[2]),
        rss.saturating_sub(statm[2]),
        rollup,
    ])
}

/// The process has its memory, and by every account a hundred pages more at most.
fn has(k: &Kin, granule_pages: u64) -> Res {
    for (n, got) in accounts(k)?.into_iter().enumerate() {
        ensure!(
            // The stat file adds up counters that lag by a batch for each CPU.
            got + 130 > granule_pages && got < granule_pages + 200,
            "account {n} of process {} says {got} pages, it has {granule_pages}",
            k.peer.pid
        );
    }
    let text = kernel::smaps_of(k.peer.pid, k.base)?;
    let rss = kernel::kb_in(&text, "Rss").unwrap_or(0) / 4;
    ensure_eq!(rss, granule_pages, "Rss in smaps of process {}", k.peer.pid);
    Ok(())
}

fn rss_of_parent_and_child(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 4)?;
    has(&k, pages(4))?;
    let child = k.child(ctx, 4)?;
    has(&k, pages(4))?;
    has(&child, pages(4))?;
    let grandchild = child.child(ctx, 4)?;
    has(&grandchild, pages(4))?;
    child.peer.exit()?;
    has(&k, pages(4))?;
    has(&grandchild, pages(4))?;
    k.peer.exit()?;
    has(&grandchild, pages(4))
}

/// Through copies, drops, take-backs and ends.
fn rss_after_every_step(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 4)?;
    let mut child = k.child(ctx, 4)?;
    child.store(3)?;
    has(&child, pages(4))?;
    has(&k, pages(4))?;
    k.store(3)?;
    k.store(GRANULE_PAGES)?;
    has(&child, pages(4))?;
    has(&k, pages(4))?;
    // Half a granule less, and a whole one.
    child.advise(pages(2)..pages(2) + 256, libc::MADV_DONTNEED)?;
    has(&child, pages(4) - 256)?;
    has(&k, pages(4))?;
    k.advise(pages(3)..pages(4), libc::MADV_DONTNEED)?;
    has(&k, pages(3))?;
    has(&child, pages(4) - 256)?;
    let other = child.child(ctx, 4)?;
    has(&other, pages(4) - 256)?;
    child.must(libc::SYS_munmap, &[child.at(pages(3)), GRANULE])?;
    has(&child, pages(3) - 256)?;
    has(&other, pages(4) - 256)?;
    child.peer.exit()?;
    has(&other, pages(4) - 256)?;
    has(&k, pages(3))?;
    other.peer.exit()?;
    has(&k, pages(3))?;
    k.fill(0..pages(4))?;
    has(&k, pages(4))?;
    k.verify()
}

/// A huge page that is mostly zeros, in a shared table: who splits it maps the zero page for these, and takes them
/// from the counters that have them, the owner's or nobody's.
fn zeros_of_a_split_huge_page(ctx: &Ctx) -> Res {
    const SPLIT: &str = "/sys/kernel/debug/split_huge_pages";
    for copied in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let page = GRANULE_PAGES;
        k.advise(page..pages(2), libc::MADV_DONTNEED)?;
        k.zero(page..pages(2));
        k.fill(page..page + 9)?;
        super::madvise::collapse(&k, 1)?;
        // One mapping again, in which khugepaged finds nothing to do.
        k.advise(0..pages(3), libc::MADV_NOHUGEPAGE)?;
        // One page less: small entries for the rest of the huge page.
        k.advise(page + 9..page + 10, libc::MADV_DONTNEED)?;
        has(&k, pages(3) - 1)?;
        let mut child = k.child(ctx, 3)?;
        if copied {
            // The owner has a table of its own; that of the child has no owner.
            k.store(page + 300)?;
        }
        // Something that the child counts itself, so that there is what can be taken from it wrongly.
        child.store(pages(2))?;
        has(&child, pages(3) - 1)?;
        let rss = || -> Res<Option<u64>> {
            let text = kernel::smaps_of(k.peer.pid, k.base)?;
            Ok(kernel::kb_in(&text, "Rss").map(|kb| kb / 4))
        };
        let left = pages(2) + 9 + u64::from(copied);
        let range = format!("{},{:#x},{:#x}", k.peer.pid, k.at(page), k.at(pages(2)));
        let deadline = Instant::now() + Duration::from_secs(10);
        while rss()? != Some(left) && Instant::now() < deadline {
            if std::fs::write(SPLIT, &range).is_err() {
                skip!("no {SPLIT}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        has(&k, left)?;
        has(&child, pages(2) + 9)?;
        super::verify_all(&[&k, &child])?;
        diverge(&mut [&mut k, &mut child])?;
        // Counters that are wrong the kernel complains of now.
        k.peer.exit()?;
        child.peer.exit()?;
    }
    Ok(())
}

/// Pss of each is its part; together they are what there is.
fn pss_is_divided(ctx: &Ctx) -> Res {
    let pss = |k: &Kin| -> Res<[u64; 5]> {
        let text = kernel::smaps_of(k.peer.pid, k.base)?;
        let f = |n| kernel::kb_in(&text, n).unwrap_or(u64::MAX) / 4;
        Ok([
            f("Pss"),
            f("Shared_Clean") + f("Shared_Dirty"),
            f("Private_Clean") + f("Private_Dirty"),
            f("Anonymous"),
            f("Rss"),
        ])
    };
    let n = pages(2);
    let mut k = Kin::new(ctx, 2)?;
    ensure_eq!(pss(&k)?, [n, 0, n, n, n], "alone");
    let mut child = k.child(ctx, 2)?;
    for who in [&k, &child] {
        ensure_eq!(pss(who)?, [n / 2, n, 0, n, n], "of two");
    }
    let third = k.child(ctx, 2)?;
    let fourth = k.child(ctx, 2)?;
    for who in [&k, &child, &third, &fourth] {
        ensure_eq!(pss(who)?, [n / 4, n, 0, n, n], "of four");
    }
    third.peer.exit()?;
    fourth.peer.exit()?;
    // Copied, unwritten: as shared as before.
    child.must(libc::SYS_mprotect, &[child.at(0), n * sys::PAGE, sys::RO])?;
    child.must(libc::SYS_mprotect, &[child.at(0), n * sys::PAGE, sys::RW])?;
    for who in [&k, &child] {
        ensure_eq!(pss(who)?, [n / 2, n, 0, n, n], "of two, copied");
    }
    child.fill(0..n / 2)?;
    for who in [&k, &child] {
        let half = n / 2;
        ensure_eq!(
            pss(who)?,
            [half + half / 2, half, half, n, n],
            "half of it written"
        );
    }
    child.peer.exit()?;
    ensure_eq!(pss(&k)?, [n, 0, n, n, n], "alone again");
    k.fill(0..n)?;
    ensure_eq!(pss(&k)?, [n, 0, n, n, n], "after writing");
    Ok(())
}

/// Pagemap's exclusive bit: mapped by nobody else.
fn exclusive_bit(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let exclusive = |k: &Kin| k.count(0..pages(2), pagemap::EXCLUSIVE);
    ensure_eq!(exclusive(&k)?, pages(2), "alone");
    let mut child = k.child(ctx, 2)?;
    ensure_eq!(exclusive(&k)?, 0, "of two, in the parent");
    ensure_eq!(exclusive(&child)?, 0, "of two, in the child");
    child.store(9)?;
    ensure_eq!(exclusive(&child)?, 1, "in the child after a store");
    ensure_eq!(exclusive(&k)?, 1, "in the parent after the child's store");
    k.store(GRANULE_PAGES)?;
    ensure_eq!(exclusive(&child)?, 2, "in the child after both stored");
    ensure_eq!(exclusive(&k)?, 2, "in the parent after both stored");
    child.peer.exit()?;
    ensure_eq!(exclusive(&k)?, pages(2), "alone again");
    Ok(())
}

/// numa_maps says how many map the page that most do.
fn numa_maps_counts_processes(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 2)?;
    let child = k.child(ctx, 2)?;
    let third = child.child(ctx, 2)?;
    for who in [&k, &child, &third] {
        let Ok(text) = std::fs::read_to_string(format!("/proc/{}/numa_maps", who.peer.pid)) else {
            skip!("no numa_maps in this kernel")
        };
        let at = format!("{:x} ", who.base);
        let line = text.lines().find(|l| l.starts_with(&at)).unwrap_or("none");
        ensure!(line.split(' ').any(|w| w == "mapmax=3"), "{line}");
    }
    Ok(())
}

/// The OOM killer sees what a process borrows.
fn oom_score_of_a_borrower(ctx: &Ctx) -> Res {
    // A point of the score is some 6 MB.
    let k = Kin::new(ctx, 32)?;
    let child = k.child(ctx, 32)?;
    let score =
        |k: &Kin| -> Res<u64> { Ok(numbers(&format!("/proc/{}/oom_score", k.peer.pid))?[0]) };
    let bare = Kin::bare(ctx, 1)?;
    let (of_k, of_child, of_nobody) = (score(&k)?, score(&child)?, score(&bare)?);
    ensure!(of_k >= of_nobody + 7, "scores {of_k} and {of_nobody}");
    ensure!(
        of_child + 1 >= of_k,
        "a borrower's score is {of_child}, its parent's {of_k}"
    );
    Ok(())
}

/// A child that only reads has next to no page tables of its own, by VmPTE and by PageTables.
fn page_tables_are_not_made(ctx: &Ctx) -> Res {
    // Far more than other processes need meanwhile.
    let granules = 256;
    let written = || (0..pages(granules)).step_by(GRANULE_PAGES as usize / 4);
    let mut k = Kin::untouched(ctx, granules)?;
    k.fill_every(GRANULE_PAGES / 4, 0..pages(granules))?;
    let before = kernel::settled_page_tables_kb()?;
    let child = k.child(ctx, granules)?;
    for page in written() {
        child.peer.load(child.at(page))??;
    }
    let grown = kernel::page_tables_kb()?.saturating_sub(before);
    let pte =
        |k: &Kin| kernel::kb_field(&format!("/proc/{}/status", k.peer.pid), "VmPTE").unwrap_or(0);
    if ctx.sharing {
        ensure!(grown < 4 * granules / 2, "PageTables grew by {grown} kB");
        ensure!(
            pte(&child) < 4 * granules / 2,
            "the child's VmPTE is {} kB",
            pte(&child)
        );
    } else {
        ensure!(
            pte(&child) >= 4 * granules,
            "the child's VmPTE is {} kB",
            pte(&child)
        );
    }
    ensure!(
        pte(&k) >= 4 * granules,
        "the parent's VmPTE is {} kB",
        pte(&k)
    );
    k.peer.exit()?;
    if ctx.sharing {
        // In nobody's account, and not freed either.
        ensure!(
            kernel::page_tables_kb()? + 200 > before,
            "PageTables fell to {} kB",
            kernel::page_tables_kb()?
        );
    }
    child.sees(0..GRANULE_PAGES)?;
    child.peer.exit()?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while kernel::page_tables_kb()? + 2 * granules > before {
        ensure!(
            Instant::now() < deadline,
            "PageTables: {} kB, it was {before} kB with a process of {granules} tables",
            kernel::page_tables_kb()?
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A fork a hundred times over while the first child lives: nothing is left of the later ones.
fn page_tables_of_a_living_child(ctx: &Ctx) -> Res {
    let granules = 8;
    let mut k = Kin::new(ctx, granules)?;
    let first = k.child(ctx, granules)?;
    let mut second = k.child(ctx, granules)?;
    second.store(1)?;
    k.store(2)?;
    second.peer.exit()?;
    let before = kernel::settled_page_tables_kb()?;
    for n in 0..if ctx.long { 1000 } else { 100 } {
        let mut next = k.child(ctx, granules)?;
        next.store(n % pages(granules))?;
        k.store((7 * n) % pages(granules))?;
        if n % 20 == 0 {
            super::verify_all(&[&k, &first, &next])?;
        }
        next.peer.exit()?;
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    // One table for each granule that the parent has copied, and what any process has.
    while kernel::page_tables_kb()? > before + 4 * granules + 64 {
        ensure!(
            Instant::now() < deadline,
            "PageTables: {} kB, it was {before} kB",
            kernel::page_tables_kb()?
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    super::verify_all(&[&k, &first])
}

/// A child in a cgroup of its own, which pays for what it copies and no more.
fn cgroup_pays_once(ctx: &Ctx) -> Res {
    // So many tables that they stand out from what CPUs have in stock for the cgroup, 256 kB each.
    const GRANULES: u64 = 512;
    let mut k = Kin::untouched(ctx, GRANULES)?;
    k.fill_every(GRANULE_PAGES / 2, 0..pages(GRANULES))?;
    let group = Cgroup::enter()?;
    let mut child = k.fork()?;
    std::fs::write(
        format!(
            "/sys/fs/cgroup/guest-tests-{}/cgroup.procs",
            std::process::id()
        ),
        child.peer.pid.to_string(),
    )?;
    group.leave()?;
    // A fork in there has its tables charged there.
    let grandchild = child.child(ctx, GRANULES)?;
    let before = settled(&group)?;
    for page in (0..pages(GRANULES)).step_by(GRANULE_PAGES as usize / 2) {
        grandchild.peer.load(grandchild.at(page))??;
    }
    let after = settled(&group)?;
    ensure!(
        after < before + GRANULES * PAGE / 2,
        "reading cost the cgroup {} bytes",
        after.saturating_sub(before)
    );
    // So much that an eighth of it is more than those stocks, here, too.
    const WRITTEN: u64 = 6;
    child.fill(0..pages(WRITTEN))?;
    let cost = settled(&group)?.saturating_sub(before);
    ensure!(
        cost > WRITTEN * GRANULE * 7 / 8 && cost < WRITTEN * GRANULE * 9 / 8,
        "writing {WRITTEN} granules cost the cgroup {cost} bytes"
    );
    child.peer.exit()?;
    k.sees(0..pages(8))?;
    grandchild.sees(0..pages(8))
}

/// memory.current, once what lies in CPUs' stocks has settled.
fn settled(group: &Cgroup) -> Res<u64> {
    std::thread::sleep(Duration::from_millis(100));
    group.number("memory.current")
}

/// When the whole family is gone the cgroup has next to nothing.
fn cgroup_is_empty_in_the_end(ctx: &Ctx) -> Res {
    let group = Cgroup::enter()?;
    // This process stays in it meanwhile, and what it touches is its own.
    let before = settled(&group)?;
    {
        let mut k = Kin::new(ctx, 6)?;
        let mut child = k.child(ctx, 6)?;
        let mut grandchild = child.child(ctx, 6)?;
        diverge(&mut [&mut grandchild, &mut k, &mut child])?;
        k.peer.exit()?;
        child.fill(0..pages(2))?;
        let late = grandchild.child(ctx, 6)?;
        child.peer.exit()?;
        grandchild.peer.exit()?;
        late.verify()?;
        late.peer.exit()?;
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let now = group.number("memory.current")?;
        if now < before + (2 << 20) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the cgroup has {now} bytes, it had {before} before"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Pages of files and of shared memory in shared tables are counted as what they are.
fn counters_of_file_and_shmem_pages(ctx: &Ctx) -> Res {
    let fs = crate::machine::Ext4::mount(64)?;
    let [disk, memory] = [fs.file("counted")?.into(), sys::memfd(0)?];
    for (fd, field) in [(disk, "RssFile"), (memory, "RssShmem")] {
        let k = Kin::bare(ctx, 2)?;
        sys::ftruncate(&fd, 2 * GRANULE)?;
        let mut model = crate::oracle::Model::new(ctx.seed, pages(2));
        model.fill(&fd, 0..pages(2))?;
        use std::os::fd::AsRawFd;
        let flags = sys::PRIVATE | sys::FIXED;
        k.peer
            .mmap(k.base, 2 * GRANULE, sys::RW, flags, fd.as_raw_fd(), 0)??;
        k.peer.touch(k.base, pages(2))?;
        let mut k = k;
        k.model.pages.clone_from(&model.pages);
        k.store(0)?;
        k.store(GRANULE_PAGES)?;
        let count = |k: &Kin| {
            kernel::kb_field(&format!("/proc/{}/status", k.peer.pid), field).unwrap_or(0) / 4
        };
        let before = count(&k);
        ensure!(before >= pages(2) - 2, "{field}: {before} pages");
        let child = k.child(ctx, 2)?;
        for who in [&k, &child] {
            let now = count(who);
            ensure!(
                now.abs_diff(before) < 130,
                "{field}: {now} pages, it was {before}"
            );
        }
        // A hole takes them away from both.
        sys::punch(&fd, 0, 2 * GRANULE)?;
        for who in [&k, &child] {
            let now = count(who);
            ensure!(
                now + pages(2) < before + 130,
                "{field}: {now} pages after a hole, it was {before}"
            );
        }
        k.peer.exit()?;
        let now = count(&child);
        ensure!(
            now + pages(2) < before + 130,
            "{field} of the child: {now} pages, it was {before}"
        );
    }
    Ok(())
}

/// Whoever looks, in whatever way, changes nothing.
fn walks_do_not_unshare(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 3)?;
    let child = k.child(ctx, 3)?;
    let before = Events::now();
    for who in [&k, &child] {
        for name in [
            "status",
            "stat",
            "statm",
            "smaps",
            "smaps_rollup",
            "maps",
            "numa_maps",
            "oom_score",
        ] {
            std::fs::read(format!("/proc/{}/{name}", who.peer.pid))?;
        }
        kernel::pagemap(who.peer.pid, who.base, pages(3))?;
        // mincore says that everything is there.
        let mincore: crate::peer::Remote = |a, _| {
            let mut there = vec![0u8; a[1] as usize];
            let r = sys::syscall(
                libc::SYS_mincore,
                &[a[0], a[1] * sys::PAGE, there.as_mut_ptr() as u64],
            );
            (crate::peer::flat(r), there)
        };
        let (r, there) = who.peer.call(mincore, &[who.base, pages(3)], &[])?;
        ensure_eq!(r, 0, "mincore");
        let n = there.iter().filter(|b| **b & 1 != 0).count() as u64;
        ensure_eq!(n, pages(3), "pages that mincore finds");
        let mem = std::fs::File::open(format!("/proc/{}/mem", who.peer.pid))?;
        let mut buf = vec![0; 3 * GRANULE as usize];
        sys::pread(&mem, &mut buf, who.base)?;
    }
    before.expect(ctx, 0, 0)?;
    child.borrows(ctx, 3)
}

/// The OOM killer cannot look into what a child borrows. It counts that as full, up to what the parent had:
/// so the child of a fork has its parent's score, as it has after an ordinary one.
fn oom_score_of_a_child(ctx: &Ctx) -> Res {
    let score =
        |k: &Kin| -> Res<u64> { Ok(numbers(&format!("/proc/{}/oom_score", k.peer.pid))?[0]) };
    let bare = Kin::bare(ctx, 1)?;
    // Full tables, and four times as many with a page each.
    for (granules, step) in [(64, 1), (256, GRANULE_PAGES)] {
        let mut k = Kin::untouched(ctx, granules)?;
        let empty = score(&k)?;
        ensure!(
            empty.abs_diff(score(&bare)?) <= 1,
            "the score of an empty process is {empty}"
        );
        k.fill_every(step, 0..pages(granules))?;
        let child = k.child(ctx, granules)?;
        let grandchild = child.child(ctx, granules)?;
        let parents = score(&k)?;
        ensure!(
            step > 1 || parents > empty + 10,
            "the parent's score is {parents}, an empty process has {empty}"
        );
        for who in [&child, &grandchild] {
            let got = score(who)?;
            // An ordinary child has page tables as well, which count a little.
            ensure!(
                got.abs_diff(parents) <= 3,
                "{granules} tables, a page in {step}: the score of process {} is {got}, its parent's {parents}",
                who.peer.pid
            );
        }
        grandchild.peer.exit()?;
        // Nothing is left of it when all is unmapped.
        child.must(libc::SYS_munmap, &[child.base, granules * GRANULE])?;
        let got = score(&child)?;
        ensure!(
            got.abs_diff(empty) <= 3,
            "the child's score is {got}, with nothing mapped; an empty process has {empty}"
        );
        k.verify()?;
    }
    Ok(())
}

/// What a child has made its own, by a copy or by taking back, the OOM killer no longer counts as borrowed:
/// with tables a quarter full, what is left of them would otherwise have room for all of it again.
fn oom_score_after_copies(ctx: &Ctx) -> Res {
    let score =
        |k: &Kin| -> Res<u64> { Ok(numbers(&format!("/proc/{}/oom_score", k.peer.pid))?[0]) };
    const GRANULES: u64 = 128;
    for copies in [true, false] {
        let mut k = Kin::untouched(ctx, GRANULES)?;
        k.fill_every(4, 0..pages(GRANULES))?;
        let mut child = k.child(ctx, GRANULES)?;
        let parents = score(&k)?;
        let write = 3 * GRANULES / 4;
        if !copies {
            // The child is alone with these, and takes them back.
            k.must(libc::SYS_munmap, &[k.base, write * GRANULE])?;
        }
        for g in 0..write {
            child.store(pages(g))?;
        }
        child.borrows(ctx, GRANULES - write)?;
        let got = score(&child)?;
        // A point is some 6 MB; what it has is 64 MB, what was counted twice 48 MB of it.
        ensure!(
            got.abs_diff(parents) <= 3,
            "with {write} tables of its own (copies: {copies}) the child's score is {got}, its parent's was {parents}"
        );
        child.verify()?;
    }
    Ok(())
}

/// VmHWM of a child begins with what it had at the fork, through whatever tables, also when they are far from
/// full.
fn peak_of_a_child(ctx: &Ctx) -> Res {
    let read = |k: &Kin| -> [u64; 2] {
        let path = format!("/proc/{}/status", k.peer.pid);
        ["VmHWM", "VmRSS"].map(|n| kernel::kb_field(&path, n).unwrap_or(0) / 4)
    };
    for (granules, step) in [(8, 1), (64, GRANULE_PAGES / 4)] {
        let mut k = Kin::untouched(ctx, granules)?;
        let [_, empty] = read(&k);
        k.fill_every(step, 0..pages(granules))?;
        let has = pages(granules) / step;
        let child = k.child(ctx, granules)?;
        let grandchild = child.child(ctx, granules)?;
        // A grandchild begins with an upper bound: its parent may have had in tables what it had elsewhere.
        for (who, over) in [(&k, 200), (&child, 200), (&grandchild, 200 + empty)] {
            let [peak, now] = read(who);
            ensure!(
                now.abs_diff(empty + has) < 200 && peak + 200 > now && peak < now + over,
                "process {}: VmHWM {peak}, VmRSS {now} pages; it has {has} and {empty} before",
                who.peer.pid
            );
        }
        child.must(libc::SYS_munmap, &[child.base, granules * GRANULE])?;
        let [peak, now] = read(&child);
        // What it had at the fork. What it took for itself since then, and gave back, is not added to that.
        ensure!(
            now < empty + 200 && peak + 200 > empty + has && peak < empty + has + 200,
            "unmapped: VmHWM {peak}, VmRSS {now} pages; it had {has} and {empty} before"
        );
        // More than there ever was.
        let more = 3 * has;
        let at = child.peer.place(0, more * sys::PAGE)?;
        let flags = sys::PRIVATE | sys::ANON | sys::FIXED;
        child
            .peer
            .mmap(at, more * sys::PAGE, sys::RW, flags, -1, 0)??;
        child
            .peer
            .madvise(at, more * sys::PAGE, libc::MADV_POPULATE_WRITE)??;
        let [peak, now] = read(&child);
        ensure!(
            now.abs_diff(empty + more) < 200 && peak.abs_diff(now) < 200,
            "grown: VmHWM {peak}, VmRSS {now} pages; it has {more} and {empty} before"
        );
        let [peak, now] = read(&k);
        ensure!(
            now.abs_diff(empty + has) < 200 && peak.abs_diff(now) < 200,
            "the parent: VmHWM {peak}, VmRSS {now} pages"
        );
        super::verify_all(&[&k, &grandchild])?;
    }
    Ok(())
}

/// stat and statm of a process that borrows tables answer while it holds its mmap lock for writing, which it
/// does while it forks: about as many times a second as when it does nothing. What they say then is too much
/// rather than too little.
fn stat_does_not_wait_for_a_fork(ctx: &Ctx) -> Res {
    // Much to copy, in two processes' time: page table entries, of the zero page.
    let bulk = 1 << 30;
    let k = Kin::new(ctx, 3)?;
    let child = k.child(ctx, 3)?;
    let at = child.peer.place(0, bulk)?;
    let flags = sys::PRIVATE | sys::ANON | sys::FIXED;
    child.peer.mmap(at, bulk, sys::RW, flags, -1, 0)??;
    child.peer.madvise(at, bulk, libc::MADV_NOHUGEPAGE)??;
    ensure_eq!(child.peer.store(at, 1)?, Ok(()), "a store");
    child.peer.madvise(at, bulk, libc::MADV_POPULATE_READ)??;
    if ctx.sharing {
        std::fs::write(format!("/proc/{}/use_odf", child.peer.pid), "0")?;
    }
    // Forks once, and answers how long that took, in microseconds.
    let fork: crate::peer::Remote = |_, _| {
        sys::pin_to_cpu(1);
        let start = Instant::now();
        match sys::fork() {
            Ok(0) => sys::exit_now(0),
            Ok(pid) => {
                let took = start.elapsed().as_micros() as i64;
                sys::wait(pid).ok();
                (took, vec![])
            }
            Err(_) => (-1, vec![]),
        }
    };
    sys::pin_to_cpu(0);
    let reads = |name: &str| -> Res<u64> {
        let path = format!("/proc/{}/{name}", child.peer.pid);
        let text = std::fs::read_to_string(&path)?;
        // Without the program's name stat has rss as its 21st number, statm as its second.
        let index = if name == "stat" { 20 } else { 1 };
        let numbers: Vec<u64> = text
            .rsplit(')')
            .next()
            .unwrap_or("")
            .split_whitespace()
            .filter_map(|w| w.parse::<i64>().ok().map(|n| n as u64))
            .collect();
        Ok(numbers[index])
    };
    for name in ["stat", "statm"] {
        let truth = reads(name)?;
        ensure!(truth >= pages(3), "{name}: rss is {truth} pages");
        let (mut while_forking, mut forking) = (0, Duration::ZERO);
        for _ in 0..4 {
            child.peer.start(fork, &[], &[])?;
            // From when it has begun until it says that it is done; the exit of its child is not the fork.
            let start = Instant::now();
            let mut times = vec![];
            while !child.peer.answers_within(0) {
                let rss = reads(name)?;
                ensure!(
                    rss + 130 > truth,
                    "{name}: rss is {rss} pages in a fork, {truth} before"
                );
                times.push(start.elapsed());
            }
            let (took, _) = child.peer.finish()?;
            ensure!(took > 0, "fork");
            let took = Duration::from_micros(took as u64);
            while_forking += times.iter().filter(|t| **t < took).count();
            forking += took;
        }
        let (start, mut idle) = (Instant::now(), 0);
        while start.elapsed() < forking {
            reads(name)?;
            idle += 1;
        }
        ensure!(
            while_forking * 5 > idle,
            "{name}: {while_forking} reads in {forking:?} of forks, {idle} in the same time without"
        );
    }
    child.borrows(ctx, 3)?;
    super::verify_all(&[&k, &child])
}
