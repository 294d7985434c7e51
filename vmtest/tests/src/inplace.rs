//! Changes of the file or of its pages, which are done in place in the shared tables: truncation,
//! holes, reclaim, migration, writeback, collapse, memory failure. Every sharer must see them.

use crate::harness::{own, Ctx, Res};
use crate::kernel::{self, pagemap};
use crate::machine::{Cgroup, Ext4, Setting, Swap};
use crate::oracle::pages;
use crate::peer::{flat, Peer, Remote};
use crate::sys::{self, Errno, FIXED, GRANULE, GRANULE_PAGES, PAGE, RO, RW, SHARED};
use crate::team::{expect_tables, Member, Team};
use crate::{ensure, ensure_eq, group, skip};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

group!("inplace";
    truncate_to_nothing,
    truncate_inside_a_granule,
    truncate_inside_a_page,
    truncate_ext4,
    punch_pages,
    punch_whole_granule,
    punch_while_everybody_rewrites,
    zero_range_ext4,
    seals_see_the_mappings,
    future_write_seal,
    locked_segment_stays_in_memory(180),
    swap_out_and_in(180),
    swap_out_dirty_again_and_again(180),
    swapoff(180),
    pageout_by_one_process(180),
    pageout_by_process_madvise(180),
    pageout_of_a_part_of_a_huge_page,
    reclaim_clean_file_pages(180),
    referenced_bits_can_be_cleared,
    idle_pages_are_tracked,
    writeback_then_store_again(120),
    writeback_reaches_the_disk(120),
    writeback_by_msync_of_one_process(120),
    move_pages_between_nodes,
    pages_of_others_are_not_moved,
    migrate_pages_of_a_process,
    readers_stay_readers_during_migration,
    numa_balancing(120),
    compaction(180),
    collapse_by_madvise,
    collapse_then_punch,
    collapse_by_process_madvise,
    collapse_of_a_huge_page_mapped_small,
    collapse_by_khugepaged(120),
    soft_offline,
    hwpoison,
);

fn sigbus(t: &Team, page: u64) -> Res {
    for i in 0..t.members.len() {
        for got in [
            t.peer(i).load(t.at(i, page))?.map(drop),
            t.peer(i).store(t.at(i, page), 1)?,
        ] {
            let right =
                matches!(got, Err(f) if f.signal == libc::SIGBUS && f.code == sys::BUS_ADRERR);
            ensure!(
                right,
                "member {i}, page {page} beyond the end: {got:?} instead of SIGBUS"
            );
        }
    }
    Ok(())
}

/// The members whose view ends at page `end`.
fn verify_up_to(t: &Team, end: u64) -> Res {
    (0..t.members.len()).try_for_each(|i| t.verify(i, 0..end))?;
    t.model.verify_file(&t.fd)
}

/// truncate to 0: SIGBUS everywhere; after growth, zeros; after writing, the new content.
fn truncate_to_nothing(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    t.model.truncate(&t.fd, 0)?;
    for page in [0, 1, 511, 512, 1023] {
        sigbus(&t, page)?;
    }
    t.model.truncate(&t.fd, pages(2))?;
    t.verify_all()?;
    t.coherent()?;
    t.expect_all(2)
}

/// truncate at a page inside a granule: what is before stays shared and right.
fn truncate_inside_a_granule(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 3)?;
    for end in [pages(2) + 100, pages(2), GRANULE_PAGES + 1, 511, 1] {
        t.model.truncate(&t.fd, end)?;
        for page in [end, end + 1, pages(3) - 1] {
            sigbus(&t, page)?;
        }
        t.store(0, end - 1)?;
        verify_up_to(&t, end)?;
    }
    t.model.truncate(&t.fd, pages(3))?;
    t.verify_all()?;
    t.coherent()
}

/// truncate inside a page: the rest of the page reads as zeros for every sharer.
fn truncate_inside_a_page(ctx: &Ctx) -> Res {
    inside_a_page(Team::new(ctx, 3, 2)?)
}

fn inside_a_page(t: Team) -> Res {
    let page = GRANULE_PAGES + 7;
    sys::ftruncate(&t.fd, page * PAGE + 64)?;
    for i in 0..3 {
        let first = t.peer(i).load(t.at(i, page))?;
        let want = crate::oracle::first_word(t.model.seed, page, t.model.pages[page as usize]);
        ensure_eq!(first, Ok(want), "member {i}: the part that stays");
        for at in [64, 512, PAGE - 8] {
            ensure_eq!(
                t.peer(i).load(t.at(i, page) + at)?,
                Ok(0),
                "member {i}: byte {at} of the cut page"
            );
        }
        let got = t.peer(i).load(t.at(i, page + 1))?;
        ensure!(
            matches!(got, Err(f) if f.signal == libc::SIGBUS),
            "member {i}: load beyond: {got:?}"
        );
    }
    Ok(())
}

/// The same on an ordinary filesystem.
fn truncate_ext4(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(96)?;
    let mut t = Team::on(ctx, fs.file("f")?.into(), 3, 2)?;
    t.model.truncate(&t.fd, 700)?;
    sigbus(&t, 700)?;
    sigbus(&t, 1023)?;
    verify_up_to(&t, 700)?;
    t.model.truncate(&t.fd, pages(2))?;
    t.verify_all()?;
    t.coherent()?;
    t.expect_all(2)?;
    inside_a_page(t)
}

/// Punched pages are zeros for every sharer at once, and are written anew by any of them.
fn punch_pages(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    for (lo, hi) in [
        (3, 4),
        (100, 300),
        (GRANULE_PAGES - 1, GRANULE_PAGES + 1),
        (1023, 1024),
    ] {
        t.model.punch(&t.fd, lo..hi)?;
        t.expect_all(2)?;
        t.verify_all()?;
        t.store(2, lo)?;
        t.store(1, hi - 1)?;
        t.verify_all()?;
    }
    t.expect_all(2)
}

/// A hole of a whole granule, which empties a whole table.
fn punch_whole_granule(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 3)?;
    t.model.punch(&t.fd, GRANULE_PAGES..pages(2))?;
    t.verify_all()?;
    t.coherent()?;
    t.model.punch(&t.fd, 0..pages(3))?;
    t.verify_all()?;
    t.coherent()?;
    t.expect_all(3)
}

/// Holes and stores in alternation, many times, at the same places.
fn punch_while_everybody_rewrites(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 1)?;
    for round in 0..if ctx.long { 500 } else { 30 } {
        let lo = round * 37 % 500;
        t.model.punch(&t.fd, lo..lo + 12)?;
        for i in 0..3 {
            t.store(i, lo + i as u64 * 3)?;
            t.verify((i + 1) % 3, lo..lo + 12)?;
        }
    }
    t.verify_all()?;
    t.expect_all(1)
}

/// FALLOC_FL_ZERO_RANGE on an ordinary filesystem unmaps the pages of every sharer.
fn zero_range_ext4(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(96)?;
    let mut t = Team::on(ctx, fs.file("f")?.into(), 3, 2)?;
    for (lo, hi) in [(9, 12), (500, 530)] {
        let (off, len) = (lo * PAGE, (hi - lo) * PAGE);
        sys::syscall(
            libc::SYS_fallocate,
            &[t.raw() as u64, libc::FALLOC_FL_ZERO_RANGE as u64, off, len],
        )?;
        t.model.pages[lo as usize..hi as usize].fill(0);
        t.verify_all()?;
        t.model.punch(&t.fd, hi..hi + 3)?;
        t.verify_all()?;
    }
    t.coherent()
}

/// A write seal is refused while anybody maps the file writable, and holds afterwards.
fn seals_see_the_mappings(ctx: &Ctx) -> Res {
    let fd = sys::memfd_flags(2 * GRANULE, libc::MFD_ALLOW_SEALING)?;
    let t = Team::on(ctx, fd, 2, 2)?;
    let seal = |s: i32| {
        sys::syscall(
            libc::SYS_fcntl,
            &[t.raw() as u64, libc::F_ADD_SEALS as u64, s as u64],
        )
    };
    ensure_eq!(
        seal(libc::F_SEAL_WRITE),
        Err(Errno(libc::EBUSY)),
        "sealing a file that is mapped writable"
    );
    for i in 0..2 {
        t.peer(i).munmap(t.at(i, 0), GRANULE)?;
    }
    ensure_eq!(
        seal(libc::F_SEAL_WRITE),
        Err(Errno(libc::EBUSY)),
        "sealing a file of which part is mapped"
    );
    for i in 0..2 {
        t.peer(i).munmap(t.granule(i, 1), GRANULE)?;
    }
    ensure_eq!(
        seal(libc::F_SEAL_WRITE),
        Ok(0),
        "sealing when nobody maps it"
    );
    let r = t.peer(0).mmap(0, 2 * GRANULE, RW, SHARED, t.raw(), 0)?;
    ensure_eq!(
        r,
        Err(Errno(libc::EPERM)),
        "a writable mapping of a sealed file"
    );
    Ok(())
}

/// F_SEAL_FUTURE_WRITE: who maps the file writable goes on, nobody else may, and those who map it for
/// reading afterwards share with those who did before and are as little able to write.
fn future_write_seal(ctx: &Ctx) -> Res {
    const F_SEAL_FUTURE_WRITE: u64 = 0x10;
    let fd = sys::memfd_flags(2 * GRANULE, libc::MFD_ALLOW_SEALING)?;
    let mut t = Team::on(ctx, fd, 2, 2)?;
    let mut readers = vec![];
    let mut join = |t: &Team| -> Res {
        let p = Peer::spawn()?;
        let a = p.map(&t.fd, 0, 2 * GRANULE, RO)?;
        p.touch(a, pages(2))?;
        expect_tables(ctx, &p, 2)?;
        readers.push((p, a));
        Ok(())
    };
    join(&t)?;
    let before = kernel::gauges();
    sys::syscall(
        libc::SYS_fcntl,
        &[
            t.raw() as u64,
            libc::F_ADD_SEALS as u64,
            F_SEAL_FUTURE_WRITE,
        ],
    )?;
    join(&t)?;
    join(&t)?;
    if let (true, Some(before), Some(now)) = (ctx.sharing, before, kernel::gauges()) {
        ensure_eq!(now.tables, before.tables, "tables after two more readers");
    }
    let r = t.peer(0).mmap(0, 2 * GRANULE, RW, SHARED, t.raw(), 0)?;
    ensure_eq!(r, Err(Errno(libc::EPERM)), "a new writable mapping");
    for (i, (p, a)) in readers.iter().enumerate() {
        if i > 0 {
            let r = p.mprotect(*a, GRANULE, RW)?;
            ensure_eq!(r, Err(Errno(libc::EACCES)), "mprotect of reader {i}");
        }
        let got = p.store(a + 5 * PAGE, 1)?;
        ensure!(
            matches!(got, Err(f) if f.code == sys::SEGV_ACCERR),
            "store by reader {i}: {got:?}"
        );
    }
    t.coherent()?;
    for (p, a) in &readers {
        t.model.verify_mapped(p, *a, 0..pages(2))?;
        expect_tables(ctx, p, 2)?;
    }
    t.expect_all(2)
}

/// SHM_LOCK of a System V segment: nothing of it is reclaimed from under those who share its tables,
/// and after SHM_UNLOCK it is again.
fn locked_segment_stays_in_memory(ctx: &Ctx) -> Res {
    const SHM_LOCK: u64 = 11;
    const SHM_UNLOCK: u64 = 12;
    ctx.opt_in()?;
    let swap = Swap::on(256)?;
    let group = Cgroup::enter()?;
    let id = sys::syscall(
        libc::SYS_shmget,
        &[0, 3 * GRANULE, 0o600 | libc::IPC_CREAT as u64],
    )?;
    let control = |what: u64| sys::syscall(libc::SYS_shmctl, &[id, what, 0]);
    let r = (|| -> Res {
        let mut model = crate::oracle::Model::new(ctx.seed, pages(3));
        let peers = [Peer::spawn()?, Peer::spawn()?];
        let mut at = vec![];
        for p in &peers {
            at.push(p.syscall(libc::SYS_shmat, &[id, 0, 0])??);
        }
        for page in 0..pages(3) {
            let i = page as usize % 2;
            model.store(&peers[i], at[i] + page * PAGE, page)?;
        }
        let present = |i: usize| -> Res<u64> {
            let seen = kernel::pagemap(peers[i].pid, at[i], pages(3))?;
            Ok(seen.iter().filter(|e| *e & pagemap::PRESENT != 0).count() as u64)
        };
        control(SHM_LOCK)?;
        for (p, a) in peers.iter().zip(&at) {
            p.touch(*a, pages(3))?;
            expect_tables(ctx, p, 3)?;
        }
        for _ in 0..4 {
            group.reclaim(3 * GRANULE);
        }
        for i in 0..2 {
            ensure_eq!(present(i)?, pages(3), "pages of a locked segment");
        }
        control(SHM_UNLOCK)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while present(0)? > pages(3) * 3 / 4 && Instant::now() < deadline {
            group.reclaim(3 * GRANULE);
        }
        for i in 0..2 {
            let n = present(i)?;
            ensure!(
                n <= pages(3) * 3 / 4,
                "{n} pages are mapped after SHM_UNLOCK and reclaim"
            );
        }
        ensure!(swap.used_pages() > 0, "nothing was swapped out");
        for (p, a) in peers.iter().zip(&at) {
            model.verify_mapped(p, *a, 0..pages(3))?;
            expect_tables(ctx, p, 3)?;
        }
        Ok(())
    })();
    control(libc::IPC_RMID as u64)?;
    r
}

// ---- reclaim ----

fn present_in(t: &Team, i: usize) -> Res<usize> {
    let seen = kernel::pagemap(t.peer(i).pid, t.at(i, 0), pages(t.granules))?;
    Ok(seen.iter().filter(|e| *e & pagemap::PRESENT != 0).count())
}

/// Reclaims the team's pages; at least a quarter must go, from everybody's view.
pub fn swap_out(t: &Team, group: &Cgroup, swap: &Swap) -> Res {
    let all = pages(t.granules);
    let most = (all - all / 8) as usize;
    let too_many = || -> Res<Option<(usize, usize)>> {
        for i in 0..t.members.len() {
            let present = present_in(t, i)?;
            if present > most {
                return Ok(Some((i, present)));
            }
        }
        Ok(None)
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    // Pages that were just used take a second round or a third. What is used has to be looked at as well as
    // what is mapped: slots that CPUs have in stock count as used, too.
    loop {
        let (out, left) = (swap.used_pages(), too_many()?);
        if out >= all / 4 && left.is_none() {
            return Ok(());
        }
        if Instant::now() > deadline {
            ensure!(out >= all / 4, "of {all} pages only {out} were swapped out");
            let (i, present) = left.unwrap_or_default();
            crate::fail!("member {i} still maps {present} of {all} pages after {out} went out");
        }
        group.reclaim(all * PAGE);
    }
}

/// Reclaim to zram and back: nobody keeps a stale page, nobody loses content.
fn swap_out_and_in(ctx: &Ctx) -> Res {
    let swap = Swap::on(256)?;
    let group = Cgroup::enter()?;
    let mut t = Team::new(ctx, 3, 4)?;
    swap_out(&t, &group, &swap)?;
    t.verify_all()?;
    t.coherent()?;
    t.expect_all(4)
}

/// What is written between two rounds of reclaim is not lost: dirty bits in shared tables count.
fn swap_out_dirty_again_and_again(ctx: &Ctx) -> Res {
    let swap = Swap::on(256)?;
    let group = Cgroup::enter()?;
    let mut t = Team::new(ctx, 3, 3)?;
    for round in 0..if ctx.long { 40 } else { 4 } {
        swap_out(&t, &group, &swap)?;
        for n in 0..40 {
            t.store(n as usize % 3, (round * 401 + n * 37) % pages(3))?;
        }
        swap_out(&t, &group, &swap)?;
        t.verify((round % 3) as usize, 0..pages(3))?;
        t.verify_all()?;
    }
    Ok(())
}

/// swapoff brings every page back while it is mapped through shared tables.
fn swapoff(ctx: &Ctx) -> Res {
    let swap = Swap::on(256)?;
    let group = Cgroup::enter()?;
    let mut t = Team::new(ctx, 3, 3)?;
    swap_out(&t, &group, &swap)?;
    t.store(1, 5)?;
    swap.off()?;
    t.verify_all()?;
    t.coherent()
}

/// MADV_PAGEOUT by one process, with swap: a hint that must not cost anybody content, and takes no
/// page out that others map.
fn pageout_by_one_process(ctx: &Ctx) -> Res {
    let _swap = Swap::on(256)?;
    let mut t = Team::new(ctx, 3, 3)?;
    for round in 0..3 {
        t.peer(round)
            .madvise(t.at(round, 0), 3 * GRANULE, libc::MADV_PAGEOUT)??;
        let others = (round + 1) % 3;
        ensure_eq!(
            present_in(&t, others)? as u64,
            pages(3),
            "pages of member {others} after MADV_PAGEOUT by another"
        );
        t.store((round + 1) % 3, 17)?;
        t.verify_all()?;
        t.peer(round)
            .madvise(t.at(round, 100), 50 * PAGE, libc::MADV_PAGEOUT)??;
        t.coherent()?;
    }
    // A process with nobody to share with: now the pages do go out, and come back.
    t.members.truncate(1);
    t.peer(0)
        .madvise(t.at(0, 0), 3 * GRANULE, libc::MADV_PAGEOUT)??;
    t.verify_all()?;
    t.coherent()
}

/// process_madvise(2) of a process's memory by another.
fn process_madvise(t: &Team, i: usize, page: u64, n: u64, advice: i32) -> Res<sys::Sys<u64>> {
    let pidfd = own(sys::syscall(
        libc::SYS_pidfd_open,
        &[t.peer(i).pid as u64, 0],
    )?);
    let range = [t.at(i, page), n * PAGE];
    Ok(sys::syscall(
        libc::SYS_process_madvise,
        &[
            pidfd.as_raw_fd() as u64,
            range.as_ptr() as u64,
            1,
            advice as u64,
            0,
        ],
    ))
}

/// Hints for another process's memory: while others share it they take nothing from anybody, and
/// when nobody does, MADV_PAGEOUT takes the pages out and they come back.
fn pageout_by_process_madvise(ctx: &Ctx) -> Res {
    let swap = Swap::on(256)?;
    let mut t = Team::new(ctx, 3, 3)?;
    for (i, advice) in [libc::MADV_COLD, libc::MADV_PAGEOUT, libc::MADV_WILLNEED]
        .into_iter()
        .enumerate()
    {
        for (page, n) in [(0, pages(3)), (100, 50)] {
            ensure_eq!(
                process_madvise(&t, i, page, n, advice)?,
                Ok(n * PAGE),
                "process_madvise {advice}"
            );
            ensure_eq!(swap.used_pages(), 0, "pages swapped out by hint {advice}");
            t.coherent()?;
            t.expect_all(3)?;
        }
    }
    t.members.truncate(1);
    let all = pages(3);
    let deadline = Instant::now() + Duration::from_secs(20);
    while swap.used_pages() < all / 2 && Instant::now() < deadline {
        process_madvise(&t, 0, 0, all, libc::MADV_PAGEOUT)??;
    }
    let out = swap.used_pages();
    ensure!(out >= all / 2, "of {all} pages only {out} were paged out");
    t.join()?;
    t.coherent()
}

/// Clean pages of an ordinary file are dropped under all sharers and read again.
fn reclaim_clean_file_pages(ctx: &Ctx) -> Res {
    let group = Cgroup::enter()?;
    let fs = Ext4::mount(96)?;
    let mut t = Team::on(ctx, fs.file("f")?.into(), 3, 3)?;
    for _ in 0..2 {
        sys::syscall(libc::SYS_fsync, &[t.raw() as u64])?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while present_in(&t, 0)? as u64 > pages(3) * 7 / 8 && Instant::now() < deadline {
            group.reclaim(pages(3) * PAGE);
        }
        for i in 0..3 {
            let present = present_in(&t, i)? as u64;
            ensure!(
                present <= pages(3) * 7 / 8,
                "member {i} maps {present} pages after reclaim"
            );
        }
        t.verify_all()?;
        t.coherent()?;
    }
    Ok(())
}

/// clear_refs 1 and 3 clear accessed bits; contents and sharing do not suffer.
fn referenced_bits_can_be_cleared(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    for what in ["1", "3"] {
        fs::write(format!("/proc/{}/clear_refs", t.peer(0).pid), what)?;
        t.coherent()?;
    }
    Ok(())
}

/// Idle page tracking: the touch of any sharer counts, and tracking does not unshare.
fn idle_pages_are_tracked(ctx: &Ctx) -> Res {
    let Ok(bitmap) = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/sys/kernel/mm/page_idle/bitmap")
    else {
        skip!("no idle page tracking in this kernel")
    };
    let t = Team::new(ctx, 3, 2)?;
    // Pages that were just allocated may not be on the LRU lists yet, where tracking finds them.
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let frames: Vec<u64> = kernel::pagemap(t.peer(0).pid, t.at(0, 0), pages(2))?
        .iter()
        .map(|e| e & ((1 << 55) - 1))
        .collect();
    let idle = |frame: u64| -> Res<bool> {
        let mut word = [0; 8];
        sys::pread(&bitmap, &mut word, frame / 64 * 8)?;
        Ok(u64::from_ne_bytes(word) >> (frame % 64) & 1 == 1)
    };
    let mark = |frame: u64| {
        sys::pwrite(
            &bitmap,
            &(1u64 << (frame % 64)).to_ne_bytes(),
            frame / 64 * 8,
        )
    };
    let mut tracked = 0;
    for page in (0..pages(2)).step_by(100) {
        let frame = frames[page as usize];
        mark(frame)?;
        if !idle(frame)? {
            continue;
        }
        tracked += 1;
        // Marking does not flush, so that a touch through an old translation is not seen. Of a
        // process that goes to the other CPU nothing old is left.
        let toucher = tracked % 3;
        let deadline = Instant::now() + Duration::from_secs(30);
        for cpu in 0.. {
            let pin: Remote = |a, _| {
                sys::pin_to_cpu(a[0] as usize);
                (0, vec![])
            };
            t.peer(toucher).call(pin, &[cpu], &[])?;
            t.peer(toucher).touch(t.at(toucher, page), 1)?;
            if !idle(frame)? {
                break;
            }
            // The first turn may have been on the CPU where it was before.
            ensure!(
                cpu < 2 || Instant::now() < deadline,
                "page {page} is still idle after member {toucher} touched it"
            );
        }
    }
    if tracked == 0 {
        skip!("no page could be marked idle");
    }
    t.verify_all()?;
    t.expect_all(2)
}

// ---- writeback ----

/// Reads a page past the page cache.
fn on_disk(direct: &impl AsRawFd, page: u64) -> Res<Vec<u8>> {
    // One page of page-aligned memory.
    let buf = sys::mmap(0, PAGE, RW, sys::PRIVATE | sys::ANON, -1, 0)?;
    let n = sys::syscall(
        libc::SYS_pread64,
        &[direct.as_raw_fd() as u64, buf, PAGE, page * PAGE],
    )?;
    ensure_eq!(n, PAGE, "direct read");
    let mut out = vec![0; PAGE as usize];
    sys::copy(out.as_mut_ptr() as u64, buf, PAGE)?;
    sys::munmap(buf, PAGE)?;
    Ok(out)
}

/// What is on the disk of a page is what the model says.
pub fn expect_on_disk(t: &Team, direct: &impl AsRawFd, page: u64) -> Res {
    let got = on_disk(direct, page)?;
    if let Some(why) =
        crate::oracle::diagnose(t.model.seed, page, t.model.pages[page as usize], &got)
    {
        crate::fail!("on disk: {why}");
    }
    Ok(())
}

fn ext4_team(ctx: &Ctx, fs: &Ext4) -> Res<(Team, fs::File)> {
    let t = Team::on(ctx, fs.file("f")?.into(), 3, 2)?;
    let direct = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(fs.dir.join("f"))?;
    Ok((t, direct))
}

/// Writeback write-protects a page for all sharers: a store after it makes the page dirty again,
/// whoever stores. The direct read writes back what is marked dirty and reads the disk.
fn writeback_then_store_again(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(96)?;
    let (mut t, direct) = ext4_team(ctx, &fs)?;
    for round in 0..6 {
        for page in [0, 77, GRANULE_PAGES, GRANULE_PAGES + 300] {
            t.store(round % 3, page)?;
            sys::syscall(libc::SYS_fsync, &[t.raw() as u64])?;
            expect_on_disk(&t, &direct, page)?;
            // The same page, by the same process and then by another.
            t.store(round % 3, page)?;
            expect_on_disk(&t, &direct, page)?;
            t.store((round + 1) % 3, page)?;
            expect_on_disk(&t, &direct, page)?;
        }
    }
    t.verify_all()?;
    t.expect_all(2)
}

/// All that was ever stored is in the file after sync, with every cache gone.
fn writeback_reaches_the_disk(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(96)?;
    let (mut t, _direct) = ext4_team(ctx, &fs)?;
    for n in 0..120 {
        t.store(n % 3, (n as u64 * 353) % pages(2))?;
        if n % 40 == 39 {
            sys::syscall(libc::SYS_syncfs, &[t.raw() as u64])?;
        }
    }
    t.verify_all()?;
    t.members.clear();
    sys::syscall(libc::SYS_fsync, &[t.raw() as u64])?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let resident = {
        let a = sys::mmap(0, 2 * GRANULE, sys::RO, SHARED, t.raw(), 0)?;
        let mut v = vec![0u8; pages(2) as usize];
        sys::syscall(libc::SYS_mincore, &[a, 2 * GRANULE, v.as_mut_ptr() as u64])?;
        sys::munmap(a, 2 * GRANULE)?;
        v.iter().filter(|b| **b & 1 != 0).count()
    };
    ensure!(
        resident < pages(2) as usize / 2,
        "{resident} pages are still cached after drop_caches"
    );
    t.model.verify_file(&t.fd)
}

/// msync(MS_SYNC) by one process writes what another stored.
fn writeback_by_msync_of_one_process(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(96)?;
    let (mut t, direct) = ext4_team(ctx, &fs)?;
    for page in [3, GRANULE_PAGES + 3] {
        t.store(1, page)?;
        t.peer(0).syscall(
            libc::SYS_msync,
            &[t.at(0, 0), 2 * GRANULE, libc::MS_SYNC as u64],
        )??;
        expect_on_disk(&t, &direct, page)?;
        t.store(2, page)?;
        t.peer(1).syscall(
            libc::SYS_msync,
            &[t.at(1, page), PAGE, libc::MS_SYNC as u64],
        )??;
        expect_on_disk(&t, &direct, page)?;
    }
    t.coherent()
}

// ---- migration ----

/// Fails a test that needs two memory nodes, which any VM of these tests has: a boot parameter that leaves one
/// would go unnoticed among what is skipped.
pub fn two_nodes() -> Res {
    let online = fs::read_to_string("/sys/devices/system/node/online").unwrap_or_default();
    let online = online.trim();
    ensure!(
        online.contains(['-', ',']),
        "memory nodes {online}: boot with numa=fake=2"
    );
    Ok(())
}

/// Pages that the kernel has moved, ever.
pub fn migrated() -> u64 {
    kernel::vmstat("pgmigrate_success").unwrap_or(0)
}

/// move_pages(2) of a sharer's pages to another node and back, with stores in between.
fn move_pages_between_nodes(ctx: &Ctx) -> Res {
    two_nodes()?;
    let mut t = Team::new(ctx, 3, 2)?;
    const MOVE_ALL: u64 = 4;
    let first = nodes_of(&t)?[0];
    ensure!([0, 1].contains(&first), "the first page is on node {first}");
    for node in [1 - first, first, 1 - first] {
        let before = migrated();
        let addrs: Vec<u64> = (0..pages(2)).map(|p| t.at(0, p)).collect();
        let nodes = vec![node; addrs.len()];
        let mut status = vec![0i32; addrs.len()];
        let a = [
            t.peer(0).pid as u64,
            addrs.len() as u64,
            addrs.as_ptr() as u64,
            nodes.as_ptr() as u64,
            status.as_mut_ptr() as u64,
            MOVE_ALL,
        ];
        sys::syscall(libc::SYS_move_pages, &a)?;
        let there = status.iter().filter(|s| **s == node).count();
        ensure!(
            there as u64 > pages(2) / 2,
            "{there} pages are on node {node} after move_pages"
        );
        ensure!(migrated() > before, "move_pages migrated nothing");
        t.verify_all()?;
        t.coherent()?;
    }
    t.expect_all(2)
}

/// The node of each page of member 0.
fn nodes_of(t: &Team) -> Res<Vec<i32>> {
    let addrs: Vec<u64> = (0..pages(t.granules)).map(|p| t.at(0, p)).collect();
    let mut status = vec![-1i32; addrs.len()];
    let a = [
        t.peer(0).pid as u64,
        addrs.len() as u64,
        addrs.as_ptr() as u64,
        0,
        status.as_mut_ptr() as u64,
        0,
    ];
    sys::syscall(libc::SYS_move_pages, &a)?;
    Ok(status)
}

/// move_pages(2) and mbind(2) for one process alone, without MPOL_MF_MOVE_ALL, leave the pages where
/// they are that others map too.
fn pages_of_others_are_not_moved(ctx: &Ctx) -> Res {
    two_nodes()?;
    const MOVE: u64 = 2;
    let mut t = Team::new(ctx, 3, 2)?;
    // So that no page is on its way to the lists on which moving finds it.
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let before = nodes_of(&t)?;
    let addrs: Vec<u64> = (0..pages(2)).map(|p| t.at(0, p)).collect();
    let others: Vec<i32> = before.iter().map(|n| 1 - n).collect();
    let mut status = vec![0i32; addrs.len()];
    let a = [
        t.peer(0).pid as u64,
        addrs.len() as u64,
        addrs.as_ptr() as u64,
        others.as_ptr() as u64,
        status.as_mut_ptr() as u64,
        MOVE,
    ];
    sys::syscall(libc::SYS_move_pages, &a)?;
    ensure!(
        status.iter().all(|s| *s == -libc::EACCES),
        "move_pages did not refuse a page that others map: {:?}",
        status.iter().find(|s| **s != -libc::EACCES)
    );
    ensure!(nodes_of(&t)? == before, "move_pages moved pages of others");
    let bind: Remote = |a, _| {
        const MPOL_BIND: u64 = 2;
        let mask = a[2];
        let args = [a[0], a[1], MPOL_BIND, &mask as *const u64 as u64, 64, MOVE];
        (flat(sys::syscall(libc::SYS_mbind, &args)), vec![])
    };
    for node in [1, 0] {
        let (r, _) = t
            .peer(0)
            .call(bind, &[t.at(0, 0), 2 * GRANULE, 1 << node], &[])?;
        ensure_eq!(r, 0, "mbind");
        ensure!(nodes_of(&t)? == before, "mbind moved pages of others");
    }
    t.verify_all()?;
    t.coherent()
}

/// migrate_pages(2) of one process moves what it shares, and nobody loses content.
fn migrate_pages_of_a_process(ctx: &Ctx) -> Res {
    two_nodes()?;
    let mut t = Team::new(ctx, 3, 2)?;
    for (from, to) in [(1u64, 2u64), (2, 1), (1, 2)] {
        sys::syscall(
            libc::SYS_migrate_pages,
            &[
                t.peer(0).pid as u64,
                64,
                &from as *const u64 as u64,
                &to as *const u64 as u64,
            ],
        )?;
        t.verify_all()?;
        t.coherent()?;
    }
    Ok(())
}

/// A page comes back from migration with the protection of the mapping through which it is found.
/// One that is being made writable meanwhile must not lend that to the readers it shared with.
fn readers_stay_readers_during_migration(ctx: &Ctx) -> Res {
    two_nodes()?;
    ctx.opt_in()?;
    const MOVE_ALL: u64 = 4;
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 0, 1)?;
    t.model.fill(&t.fd, 0..GRANULE_PAGES)?;
    for _ in 0..3 {
        let peer = Peer::spawn()?;
        let addr = peer.map(&t.fd, 0, GRANULE, sys::RO)?;
        t.members.push(Member { peer, addr });
    }
    t.touch_all()?;
    t.expect_all(1)?;
    let toggle: Remote = |a, _| {
        let end = Instant::now() + Duration::from_millis(a[1]);
        while Instant::now() < end {
            for prot in [RW, sys::RO] {
                let r = sys::syscall(libc::SYS_mprotect, &[a[0], GRANULE, prot]);
                if r.is_err() || sys::load64(a[0]).is_err() {
                    return (1, vec![]);
                }
            }
        }
        (0, vec![])
    };
    let time = ctx.duration(2, 30);
    let end = Instant::now() + time;
    t.peer(0)
        .start(toggle, &[t.at(0, 0), time.as_millis() as u64], &[])?;
    let addrs: Vec<u64> = (0..GRANULE_PAGES).map(|p| t.at(1, p)).collect();
    for node in [1i32, 0].into_iter().cycle() {
        if Instant::now() > end {
            break;
        }
        let nodes = vec![node; addrs.len()];
        let mut status = vec![0i32; addrs.len()];
        let a = [
            t.peer(1).pid as u64,
            addrs.len() as u64,
            addrs.as_ptr() as u64,
            nodes.as_ptr() as u64,
            status.as_mut_ptr() as u64,
            MOVE_ALL,
        ];
        sys::syscall(libc::SYS_move_pages, &a)?;
        for page in (0..GRANULE_PAGES).step_by(37) {
            let got = t.peer(2).store(t.at(2, page), 0xbad)?;
            ensure!(
                matches!(got, Err(f) if f.signal == libc::SIGSEGV && f.code == sys::SEGV_ACCERR),
                "a reader's store to page {page}: {got:?}"
            );
        }
    }
    ensure_eq!(t.peer(0).finish()?.0, 0, "mprotect");
    t.verify_all()
}

/// NUMA balancing at its liveliest, for processes that are made from now on. Where its pace cannot be set a
/// process has hints when it has run for a second.
pub fn numa_hints() -> Res<Vec<Setting>> {
    let mut all = vec![Setting::set("/proc/sys/kernel/numa_balancing", "1")?];
    for (n, v) in [
        ("scan_delay_ms", "1"),
        ("scan_period_min_ms", "10"),
        ("scan_period_max_ms", "50"),
    ] {
        let path = format!("/sys/kernel/debug/sched/numa_balancing/{n}");
        all.extend(Setting::set(&path, v));
    }
    all.reverse();
    Ok(all)
}

/// Entries that were made hints, and faults that such made, since boot.
pub fn hinted() -> (u64, u64) {
    let number = |n| kernel::vmstat(n).unwrap_or(0);
    (number("numa_pte_updates"), number("numa_hint_faults"))
}

/// NUMA balancing passes by shared tables. It gives hints to one who maps the file in tables of its own, and
/// moves pages because of them, under those who share.
fn numa_balancing(ctx: &Ctx) -> Res {
    two_nodes()?;
    let _on = numa_hints()?;
    let mut t = Team::new(ctx, 3, 3)?;
    let own = Peer::spawn()?;
    let at = own.place(0, 4 * GRANULE)? + PAGE;
    own.mmap(at, 3 * GRANULE, RW, SHARED | FIXED, t.raw(), 0)??;
    let spin: Remote = |a, _| {
        let end = Instant::now() + Duration::from_millis(a[3]);
        let mut round = a[2];
        while Instant::now() < end {
            // From here and from there, so that pages have a reason to move.
            round += 1;
            sys::pin_to_cpu(round as usize / 8);
            for n in 0..a[1] {
                if let Err(f) = sys::load64(a[0] + n * PAGE) {
                    return (1, format!("page {n}: {f:?}").into_bytes());
                }
            }
        }
        (0, vec![])
    };
    let (before, left) = (hinted(), kernel::vmstat("ptshare_unlink"));
    // Who has hints for it: as many as it has pages, and a fault for each.
    let enough = |now: (u64, u64)| now.0 - before.0 >= pages(3) && now.1 - before.1 >= pages(3);
    for round in 0..15 {
        let time = ctx.duration(2, 10).as_millis() as u64;
        let all: Vec<(&Peer, u64)> = (0..3)
            .map(|i| (t.peer(i), t.at(i, 0)))
            .chain([(&own, at)])
            .collect();
        for (i, (p, a)) in all.iter().enumerate() {
            p.start(spin, &[*a, pages(3), i as u64, time], &[])?;
        }
        for (i, (p, _)) in all.iter().enumerate() {
            let (r, why) = p.finish()?;
            ensure_eq!(r, 0, "member {i}: {}", String::from_utf8_lossy(&why));
        }
        t.verify_all()?;
        t.model.verify_mapped(&own, at, 0..pages(3))?;
        t.store(round % 3, 100 + round as u64)?;
        if round > 1 && enough(hinted()) {
            break;
        }
    }
    let now = hinted();
    ensure!(
        enough(now),
        "hints and faults: {before:?} before, {now:?} now"
    );
    ensure_eq!(
        kernel::vmstat("ptshare_unlink"),
        left,
        "ptshare_unlink while nothing but NUMA balancing went on"
    );
    t.expect_all(3)?;
    t.model.store(&own, at + 9 * PAGE, 9)?;
    t.coherent()?;
    t.model.verify_mapped(&own, at, 0..pages(3))
}

/// Compaction migrates pages that are mapped through shared tables.
fn compaction(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 4)?;
    // Checkered memory, so that there is something to compact.
    let checkered = sys::memfd(32 * GRANULE)?;
    sys::syscall(
        libc::SYS_fallocate,
        &[checkered.as_raw_fd() as u64, 0, 0, 32 * GRANULE],
    )?;
    for page in (0..pages(32)).step_by(2) {
        sys::punch(&checkered, page * PAGE, PAGE)?;
    }
    let before = migrated();
    for round in 0..if ctx.long { 30 } else { 3 } {
        if let Err(e) = fs::write("/proc/sys/vm/compact_memory", "1") {
            skip!("no compaction: {e}");
        }
        t.store(round % 3, 5 + round as u64)?;
        t.verify_all()?;
        for page in (1..pages(32)).step_by(16) {
            sys::punch(&checkered, page * PAGE, PAGE)?;
        }
    }
    if migrated() == before {
        skip!("compaction found nothing to migrate");
    }
    t.coherent()?;
    t.expect_all(4)
}

// ---- huge folios ----

/// Members at granule-aligned addresses also on kernels that do not choose such by themselves.
fn aligned_team(ctx: &Ctx, n: usize, granules: u64) -> Res<Team> {
    ctx.opt_in()?;
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 0, granules)?;
    t.model.fill(&t.fd, 0..pages(granules))?;
    for _ in 0..n {
        let peer = Peer::spawn()?;
        let addr = peer.place(0, granules * GRANULE)?;
        peer.mmap(addr, granules * GRANULE, RW, SHARED | FIXED, t.raw(), 0)??;
        t.members.push(Member { peer, addr });
    }
    t.touch_all()?;
    t.expect_all(granules)?;
    Ok(t)
}

const MADV_COLLAPSE: i32 = 25;

fn huge_kb(t: &Team, i: usize) -> Res<u64> {
    Ok(kernel::kb_in(
        &kernel::smaps_of(t.peer(i).pid, t.granule(i, 1))?,
        "ShmemPmdMapped",
    )
    .unwrap_or(0))
}

fn collapse(t: &Team, i: usize, granule: u64) -> Res {
    for _ in 0..20 {
        match t
            .peer(i)
            .madvise(t.granule(i, granule), GRANULE, MADV_COLLAPSE)?
        {
            Err(Errno(libc::EINVAL)) => skip!("no MADV_COLLAPSE of shmem in this kernel"),
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

/// MADV_COLLAPSE replaces the granule's pages by one huge folio under all sharers.
fn collapse_by_madvise(ctx: &Ctx) -> Res {
    let mut t = aligned_team(ctx, 3, 3)?;
    collapse(&t, 0, 1)?;
    t.verify_all()?;
    ensure_eq!(
        huge_kb(&t, 0)?,
        2048,
        "ShmemPmdMapped of the process that collapsed"
    );
    t.coherent()?;
    for i in 0..3 {
        t.peer(i)
            .madvise(t.at(i, 0), 3 * GRANULE, libc::MADV_DONTNEED)??;
    }
    t.touch_all()?;
    for i in 0..3 {
        ensure_eq!(
            huge_kb(&t, i)?,
            2048,
            "ShmemPmdMapped of member {i} after it came back"
        );
    }
    t.expect_all(2)?;
    t.coherent()
}

/// A huge folio under shared neighbours: a hole in it, and everybody goes back to small pages.
fn collapse_then_punch(ctx: &Ctx) -> Res {
    let mut t = aligned_team(ctx, 3, 3)?;
    collapse(&t, 1, 1)?;
    t.touch_all()?;
    t.model.punch(&t.fd, GRANULE_PAGES + 5..GRANULE_PAGES + 9)?;
    t.verify_all()?;
    t.coherent()?;
    t.model.truncate(&t.fd, GRANULE_PAGES + 100)?;
    sigbus(&t, GRANULE_PAGES + 100)?;
    verify_up_to(&t, GRANULE_PAGES + 100)?;
    t.model.truncate(&t.fd, pages(3))?;
    t.coherent()
}

/// process_madvise(MADV_COLLAPSE): another process collapses what this one shares.
fn collapse_by_process_madvise(ctx: &Ctx) -> Res {
    let mut t = aligned_team(ctx, 3, 3)?;
    let mut r = Err(Errno(libc::EAGAIN));
    for _ in 0..20 {
        r = process_madvise(&t, 2, GRANULE_PAGES, GRANULE_PAGES, MADV_COLLAPSE)?;
        match r {
            Err(Errno(libc::EAGAIN | libc::EBUSY)) => std::thread::sleep(Duration::from_millis(50)),
            _ => break,
        }
    }
    match r {
        Err(Errno(libc::EINVAL | libc::ENOMEM)) => skip!("no MADV_COLLAPSE of shmem"),
        r => ensure_eq!(r, Ok(GRANULE), "process_madvise"),
    }
    t.touch_all()?;
    for i in 0..3 {
        ensure_eq!(huge_kb(&t, i)?, 2048, "ShmemPmdMapped of member {i}");
    }
    t.expect_all(2)?;
    t.coherent()?;
    t.model.punch(&t.fd, GRANULE_PAGES + 5..GRANULE_PAGES + 9)?;
    t.coherent()
}

/// Three processes that map huge pages of a file by small entries, which they share.
fn huge_pages_mapped_small(ctx: &Ctx) -> Res<Team> {
    const DIR: &str = "/sys/kernel/mm/transparent_hugepage";
    ctx.opt_in()?;
    let _s = Setting::set(&format!("{DIR}/shmem_enabled"), "always")?;
    let huge_folios = || kernel::kb_field("/proc/meminfo", "ShmemHugePages").unwrap_or(0);
    let before = huge_folios();
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 0, 3)?;
    t.model.fill(&t.fd, 0..pages(3))?;
    if huge_folios() < before + 3 * 2048 {
        skip!("no huge pages to be had for shmem");
    }
    for _ in 0..3 {
        let peer = Peer::spawn()?;
        let addr = peer.place(0, 3 * GRANULE)?;
        peer.mmap(addr, 3 * GRANULE, RW, SHARED | FIXED, t.raw(), 0)??;
        peer.madvise(addr, 3 * GRANULE, libc::MADV_NOHUGEPAGE)??;
        t.members.push(Member { peer, addr });
    }
    t.touch_all()?;
    t.expect_all(3)?;
    ensure_eq!(huge_kb(&t, 0)?, 0, "ShmemPmdMapped of small entries");
    Ok(t)
}

/// MADV_PAGEOUT of a part of a huge page that others map by small entries, too: it stays whole.
fn pageout_of_a_part_of_a_huge_page(ctx: &Ctx) -> Res {
    let mut t = huge_pages_mapped_small(ctx)?;
    let splits = || kernel::vmstat("thp_split_page");
    let before = splits();
    for round in 0..3 {
        t.peer(round)
            .madvise(t.at(round, GRANULE_PAGES + 9), 7 * PAGE, libc::MADV_PAGEOUT)??;
        ensure_eq!(splits(), before, "huge pages split so far");
        ensure_eq!(
            present_in(&t, (round + 1) % 3)? as u64,
            pages(3),
            "pages of another member"
        );
        t.coherent()?;
    }
    Ok(())
}

/// A huge folio whose pages all map one by one, through shared tables, until one process has
/// MADV_COLLAPSE map it whole for itself: the others keep their tables.
fn collapse_of_a_huge_page_mapped_small(ctx: &Ctx) -> Res {
    let mut t = huge_pages_mapped_small(ctx)?;
    t.peer(0)
        .madvise(t.granule(0, 1), GRANULE, libc::MADV_HUGEPAGE)??;
    let mut r = Err(Errno(libc::EAGAIN));
    for _ in 0..20 {
        r = t.peer(0).madvise(t.granule(0, 1), GRANULE, MADV_COLLAPSE)?;
        match r {
            Err(Errno(libc::EAGAIN | libc::EBUSY)) => std::thread::sleep(Duration::from_millis(50)),
            _ => break,
        }
    }
    ensure!(r.is_ok(), "MADV_COLLAPSE where a huge page is: {r:?}");
    ensure_eq!(huge_kb(&t, 0)?, 2048, "ShmemPmdMapped afterwards");
    t.expect_left(1)?;
    t.verify_all()?;
    t.coherent()?;
    t.expect_left(1)
}

/// khugepaged does the same in the background.
fn collapse_by_khugepaged(ctx: &Ctx) -> Res {
    const DIR: &str = "/sys/kernel/mm/transparent_hugepage";
    let _e = Setting::set(&format!("{DIR}/enabled"), "madvise")?;
    let _s = Setting::set(&format!("{DIR}/shmem_enabled"), "advise")?;
    let _p = Setting::set(&format!("{DIR}/khugepaged/pages_to_scan"), "65536")?;
    let _m = Setting::set(&format!("{DIR}/khugepaged/scan_sleep_millisecs"), "10")?;
    let mut t = aligned_team(ctx, 3, 3)?;
    for i in 0..3 {
        t.peer(i)
            .madvise(t.at(i, 0), 3 * GRANULE, libc::MADV_HUGEPAGE)??;
    }
    let huge_folios = || kernel::kb_field("/proc/meminfo", "ShmemHugePages").unwrap_or(0);
    let before = huge_folios();
    let deadline = Instant::now() + Duration::from_secs(40);
    while huge_folios() < before + 2048 && Instant::now() < deadline {
        t.store(1, 9)?;
        t.verify(2, 0..20)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    if huge_folios() < before + 2048 {
        skip!("khugepaged collapsed nothing within 40 s");
    }
    t.verify_all()?;
    t.coherent()
}

// ---- memory failure ----
// The frames these tests poison are lost until the next boot: two or three pages.

const MADV_HWPOISON: i32 = 100;
const MADV_SOFT_OFFLINE: i32 = 101;

/// Soft offlining moves a page away under all sharers; its content stays.
fn soft_offline(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    for page in [9, GRANULE_PAGES + 9] {
        let frame = |t: &Team, i: usize| -> Res<u64> {
            Ok(kernel::pagemap(t.peer(i).pid, t.at(i, page), 1)?[0] & ((1 << 55) - 1))
        };
        let before = frame(&t, 0)?;
        match t.peer(0).madvise(t.at(0, page), PAGE, MADV_SOFT_OFFLINE)? {
            Err(Errno(libc::EINVAL | libc::EPERM)) => {
                skip!("no memory failure injection in this kernel")
            }
            r => r?,
        };
        t.verify_all()?;
        for i in 0..3 {
            t.peer(i).touch(t.at(i, page), 1)?;
            ensure!(
                frame(&t, i)? != before,
                "member {i} still maps the offlined page"
            );
        }
        t.coherent()?;
    }
    t.expect_all(2)
}

/// Has a process of its own declare a page of the file failed memory.
pub fn poison(t: &Team, page: u64) -> Res {
    let injector = Peer::spawn()?;
    let addr = injector.map(&t.fd, page * PAGE, PAGE, RW)?;
    injector.touch(addr, 1)?;
    let poison: Remote = |a, _| {
        // The kernel also signals the process that injects; it has nothing more to do.
        // SAFETY: ignoring a signal.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_IGN) };
        (
            flat(sys::syscall(
                libc::SYS_madvise,
                &[a[0], PAGE, MADV_HWPOISON as u64],
            )),
            vec![],
        )
    };
    injector.start(poison, &[addr], &[])?;
    injector.answers_within(20_000);
    match injector.finish() {
        Ok((r, _)) if r == -i64::from(libc::EINVAL) || r == -i64::from(libc::EPERM) => {
            skip!("no memory failure injection in this kernel")
        }
        // Killed by the signal, or answered.
        _ => drop(injector),
    }
    Ok(())
}

/// A poisoned page: every sharer that touches it gets SIGBUS, the neighbours are fine, and
/// punching the page out heals the file. A process's own mark of the poison goes when it drops its
/// view, and does not come back from a table that others still use.
fn hwpoison(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    let page = GRANULE_PAGES + 9;
    poison(&t, page)?;
    for i in 0..3 {
        let got = t.peer(i).load(t.at(i, page))?;
        ensure!(
            matches!(got, Err(f) if f.signal == libc::SIGBUS),
            "member {i} loads from the poisoned page: {got:?}"
        );
        t.verify(i, 0..page)?;
        t.verify(i, page + 1..pages(2))?;
    }
    t.model.punch(&t.fd, page..page + 1)?;
    for i in 0..3 {
        t.peer(i)
            .madvise(t.granule(i, 1), GRANULE, libc::MADV_DONTNEED)??;
        t.verify(i, 0..pages(2))?;
    }
    t.model.verify_file(&t.fd)?;
    t.coherent()
}
