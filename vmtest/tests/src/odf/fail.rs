//! No memory: a fork fails and leaves nothing, a fault that cannot copy its table never writes to the
//! shared one, and a system call that would have to copy says ENOMEM and has changed nothing.

use super::{diverge, verify_all, Disk, Events, Kin};
use crate::allocfail::{with_failures, Injection};
use crate::harness::{Ctx, Res};
use crate::kernel;
use crate::leave::{Uffd, MODE_WP};
use crate::machine::Cgroup;
use crate::oracle::pages;
use crate::peer::{flat, Remote};
use crate::sys::{self, Errno, GRANULE, GRANULE_PAGES, PAGE, RO, RW};
use crate::{ensure, ensure_eq, group};
use std::time::{Duration, Instant};

group!("odf";
    fork_fails_for_pages(120),
    fork_fails_for_slabs(120),
    faults_without_memory(120),
    io_without_memory(120),
    calls_that_cut_a_granule(120),
    calls_that_need_no_memory(120),
    taking_back_needs_no_memory,
    charge_fails_in_a_fault(120),
);

/// In a peer: stops failures in this process, in a child that was made with them on.
fn spared() {
    if let Ok(switch) = std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/make-it-fail")
    {
        sys::pwrite(&switch, b"0", 0).ok();
    }
}

/// In a peer: forks with failures on. Children look at some words and write some. Arguments: address,
/// pages, forks, seed; bytes: the generations of all pages. Answers how many forks succeeded, or less than
/// 0 for anything wrong.
const FORKS: Remote = |a, gens| {
    let word = |page: u64| {
        let g = &gens[page as usize * 4..][..4];
        let g = u32::from_ne_bytes(g.try_into().unwrap_or_default());
        crate::oracle::first_word(a[3], page, g)
    };
    let right = |step: usize| {
        (0..a[1])
            .step_by(step)
            .all(|p| sys::load64(a[0] + p * PAGE) == Ok(word(p)))
    };
    with_failures(|| {
        let (mut made, mut failed) = (0, 0);
        for n in 0..a[2] {
            match sys::fork() {
                Ok(0) => {
                    spared();
                    if !right(7) {
                        sys::exit_now(1);
                    }
                    for p in (n % 5..a[1]).step_by(97) {
                        if sys::store64(a[0] + p * PAGE, 1).is_err() {
                            sys::exit_now(2);
                        }
                    }
                    sys::exit_now(0)
                }
                Ok(pid) => {
                    made += 1;
                    match sys::wait(pid) {
                        Ok(0) => {}
                        Ok(s) => return (-1, sys::describe_status(s).into_bytes()),
                        Err(e) => return (-2, e.to_string().into_bytes()),
                    }
                }
                Err(Errno(libc::ENOMEM | libc::EAGAIN)) => failed += 1,
                Err(e) => return (-3, e.to_string().into_bytes()),
            }
            if !right(61) {
                return (
                    -4,
                    format!("after {made} forks and {failed} failures").into_bytes(),
                );
            }
        }
        (made, failed.to_string().into_bytes())
    })
};

fn forks_under(ctx: &Ctx, which: &str, percent: u32) -> Res {
    let mut k = Kin::new(ctx, 6)?;
    // One that lives on, so that tables are shared already, and one table that is not.
    let mut child = k.child(ctx, 6)?;
    k.store(3)?;
    let before = (kernel::page_tables_kb()?, Events::now());
    let gens: Vec<u8> = k.model.pages.iter().flat_map(|g| g.to_ne_bytes()).collect();
    let (mut made, mut failed) = (0, 0);
    for percent in [percent, 3 * percent, percent / 2 + 1] {
        let _i = Injection::on(which, percent)?;
        let n = if ctx.long { 2000 } else { 60 };
        let a = [k.base, pages(6), n, k.model.seed];
        let (r, what) = k.peer.call(FORKS, &a, &gens)?;
        let what = String::from_utf8_lossy(&what).into_owned();
        ensure!(r >= 0, "forking under {which}: {r}: {what}");
        made += r;
        failed += what.parse::<i64>().unwrap_or(0);
    }
    ensure!(made > 0, "no fork succeeded");
    ensure!(failed > 0, "no fork failed");
    k.borrows(ctx, 0)?;
    verify_all(&[&k, &child])?;
    if ctx.sharing {
        ensure!(
            Events::now().since(&before.1).shared > 0,
            "no table was shared"
        );
    }
    diverge(&mut [&mut k, &mut child])?;
    let end = Instant::now() + Duration::from_secs(10);
    // Six tables that parent or child copied meanwhile, and what other processes had.
    loop {
        let now = kernel::page_tables_kb()?;
        if now <= before.0 + 6 * 4 + 64 {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "PageTables: {now} kB, before {} kB",
            before.0
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn fork_fails_for_pages(ctx: &Ctx) -> Res {
    forks_under(ctx, "fail_page_alloc", 3)
}

fn fork_fails_for_slabs(ctx: &Ctx) -> Res {
    forks_under(ctx, "failslab", 1)
}

/// In a peer: stores to a page in each granule, each in the end done. Arguments: address, granules, page in
/// the granule, value. Needs no memory for anything else.
const STORE_IN_EACH: Remote = |a, _| {
    with_failures(|| {
        let bad = (0..a[1])
            .filter(|g| sys::store64(a[0] + g * GRANULE + a[2] * PAGE, a[3]).is_err())
            .count();
        (bad as i64, vec![])
    })
};

/// Nearly no page is to be had: a fault tries again and again, and its store is the process's own.
fn faults_without_memory(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        for round in 0..if ctx.long { 40 } else { 3 } {
            let k = Kin::new(ctx, 6)?;
            let child = k.child(ctx, 6)?;
            let (one, other) = match by_child {
                true => (&child, &k),
                false => (&k, &child),
            };
            {
                let _i = Injection::on("fail_page_alloc", 80)?;
                let a = [one.base, 6, 100 + round, 0xfa11];
                let (bad, _) = one.peer.call(STORE_IN_EACH, &a, &[])?;
                ensure_eq!(bad, 0, "stores that failed");
            }
            other.verify()?;
            for g in 0..6 {
                let page = pages(g) + 100 + round;
                ensure_eq!(one.peer.load(one.at(page))?, Ok(0xfa11), "what was stored");
                one.sees(pages(g)..page)?;
                one.sees(page + 1..pages(g + 1))?;
            }
        }
    }
    Ok(())
}

/// In a peer: reads from a file into a page, directly or not. An error is an answer. Arguments: fd, address,
/// the file's page.
const READ_INTO: Remote = |a, _| {
    with_failures(|| {
        (
            flat(sys::syscall(
                libc::SYS_pread64,
                &[a[0], a[1], PAGE, a[2] * PAGE],
            )),
            vec![],
        )
    })
};

/// GUP and copies from the kernel that cannot have the table copied: an error, and nothing is written; or
/// success, and it is one's own.
fn io_without_memory(ctx: &Ctx) -> Res {
    use std::os::fd::AsRawFd;
    let disk = Disk::new()?;
    let fresh = |k: &mut Kin, page: u64| -> Res { disk.put(page, &k.incoming(page)) };
    let (mut done, mut failed) = (0, 0);
    // How many allocations a read takes differs among kernels: it goes on until it has seen both answers.
    let (least, most) = if ctx.long { (200u64, 400) } else { (12, 60) };
    for round in 0..most {
        if round >= least && done > 0 && failed > 0 {
            break;
        }
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        let (one, other) = match round % 2 {
            0 => (&mut child, &mut k),
            _ => (&mut k, &mut child),
        };
        let page = GRANULE_PAGES * (round / 2 % 2) + 5;
        let old = one.model.clone();
        fresh(one, page)?;
        let fd = match round % 3 {
            0 => disk.file.as_raw_fd() as u64,
            _ => disk.raw(),
        };
        let r = {
            let percent = match round % 3 {
                0 => [40, 20, 10, 5][(round / 3 % 4) as usize],
                _ => 100,
            };
            let _i = Injection::on("fail_page_alloc", percent)?;
            one.peer.call(READ_INTO, &[fd, one.at(page), page], &[])?.0
        };
        if r == PAGE as i64 {
            done += 1;
        } else {
            ensure!(r < 0, "{r} bytes read");
            failed += 1;
            one.model = old;
        }
        verify_all(&[one, other])?;
        diverge(&mut [one, other])?;
    }
    // By direct I/O with no memory at all, and otherwise with some.
    ensure!(
        done > 0 && failed > 0,
        "{done} reads were done, {failed} failed"
    );
    Ok(())
}

/// In a peer: a system call with failures on. Arguments: its number, and its own.
const CALL: Remote = |a, _| with_failures(|| (flat(sys::syscall(a[0] as i64, &a[1..])), vec![]));

/// What a process's mappings are.
fn mappings(k: &Kin) -> Res<String> {
    Ok(std::fs::read_to_string(format!(
        "/proc/{}/maps",
        k.peer.pid
    ))?)
}

/// Calls that have to copy a table, while there is no page: ENOMEM, and everything is as it was.
fn calls_that_cut_a_granule(ctx: &Ctx) -> Res {
    for by_child in [true, false] {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let (one, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        let free = one.peer.place(0, 3 * GRANULE)?;
        let (at, part) = (one.at(GRANULE_PAGES + 9), 8 * PAGE);
        let fixed = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let map = sys::PRIVATE | sys::ANON | sys::FIXED;
        let nowhere = u64::MAX;
        let calls: [(&str, i64, [u64; 6]); 11] = [
            ("munmap", libc::SYS_munmap, [at, part, 0, 0, 0, 0]),
            ("mprotect", libc::SYS_mprotect, [at, part, RO, 0, 0, 0]),
            (
                "mprotect of all",
                libc::SYS_mprotect,
                [one.base, 3 * GRANULE, RO, 0, 0, 0],
            ),
            ("mremap", libc::SYS_mremap, [at, part, part, fixed, free, 0]),
            (
                "mremap of all",
                libc::SYS_mremap,
                [one.base, 3 * GRANULE, 3 * GRANULE, fixed, free, 0],
            ),
            (
                "mremap to less",
                libc::SYS_mremap,
                [one.base, 3 * GRANULE, 2 * GRANULE + PAGE, 0, 0, 0],
            ),
            ("mlock", libc::SYS_mlock, [at, part, 0, 0, 0, 0]),
            (
                "MADV_DONTNEED",
                libc::SYS_madvise,
                [at, part, libc::MADV_DONTNEED as u64, 0, 0, 0],
            ),
            (
                "MADV_FREE",
                libc::SYS_madvise,
                [at, part, libc::MADV_FREE as u64, 0, 0, 0],
            ),
            (
                "MADV_DONTFORK",
                libc::SYS_madvise,
                [at, part, libc::MADV_DONTFORK as u64, 0, 0, 0],
            ),
            ("mmap", libc::SYS_mmap, [at, part, RW, map, nowhere, 0]),
        ];
        for (what, nr, a) in calls {
            let before = (mappings(one)?, Events::now());
            let mut args = vec![nr as u64];
            args.extend(a);
            let got = {
                let _i = Injection::on("fail_page_alloc", 100)?;
                one.peer.call(CALL, &args, &[])?.0
            };
            // madvise says of flags that it cannot change that it may later.
            let refused = -i64::from(match what {
                "MADV_DONTFORK" => libc::EAGAIN,
                _ => libc::ENOMEM,
            });
            if ctx.sharing {
                ensure_eq!(got, refused, "{what} without memory");
            }
            if got != refused {
                // There is nothing to copy in an ordinary table.
                return Ok(());
            }
            before.1.expect(ctx, 0, 0)?;
            ensure_eq!(mappings(one)?, before.0, "mappings after {what} failed");
            verify_all(&[one, other])?;
            one.borrows(ctx, if by_child { 3 } else { 0 })?;
        }
        // With memory they work.
        one.must(libc::SYS_mprotect, &[at, part, RO])?;
        one.must(libc::SYS_mprotect, &[at, part, RW])?;
        one.advise(GRANULE_PAGES + 9..GRANULE_PAGES + 17, libc::MADV_DONTNEED)?;
        one.zero(GRANULE_PAGES + 9..GRANULE_PAGES + 17);
        diverge(&mut [one, other])?;
    }
    // Registration with userfaultfd and clear_refs.
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let u = Uffd::of(&child.peer, 0)?;
    let clear: Remote = |_, _| {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open("/proc/self/clear_refs");
        match file {
            Ok(f) => with_failures(|| (flat(sys::pwrite(&f, b"4", 0).map(|()| 0)), vec![])),
            Err(_) => (1, vec![]),
        }
    };
    {
        let _i = Injection::on("fail_page_alloc", 100)?;
        let got = child.peer.call(clear, &[], &[])?.0;
        if ctx.sharing {
            ensure_eq!(got, -i64::from(libc::ENOMEM), "clear_refs without memory");
        }
    }
    child.borrows(ctx, if ctx.sharing { 2 } else { 0 })?;
    verify_all(&[&k, &child])?;
    u.register(child.at(0), 2 * GRANULE, MODE_WP)?;
    child.borrows(ctx, 0)?;
    diverge(&mut [&mut k, &mut child])
}

/// Whole granules are dropped and left, and a child ends, without a page.
fn calls_that_need_no_memory(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 4)?;
    let mut child = k.child(ctx, 4)?;
    let other = k.child(ctx, 4)?;
    let drop_it = |k: &Kin, first: u64, n: u64| -> Res {
        let a = [
            libc::SYS_madvise as u64,
            k.at(pages(first)),
            n * GRANULE,
            libc::MADV_DONTNEED as u64,
        ];
        ensure_eq!(
            k.peer.call(CALL, &a, &[])?.0,
            0,
            "MADV_DONTNEED of whole granules"
        );
        Ok(())
    };
    {
        let _i = Injection::on("fail_page_alloc", 100)?;
        drop_it(&child, 1, 2)?;
        drop_it(&k, 0, 1)?;
        let a = [libc::SYS_munmap as u64, child.at(pages(3)), GRANULE];
        ensure_eq!(child.peer.call(CALL, &a, &[])?.0, 0, "munmap of a granule");
    }
    child.zero(pages(1)..pages(3));
    k.zero(0..pages(1));
    other.verify()?;
    k.verify()?;
    child.sees(0..pages(3))?;
    child.fill(0..pages(3))?;
    child.sees(0..pages(3))?;
    other.peer.exit()?;
    diverge(&mut [&mut k])
}

/// The last one that uses a table writes to it without a page.
fn taking_back_needs_no_memory(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 4)?;
    let child = k.child(ctx, 4)?;
    child.peer.exit()?;
    let before = Events::now();
    {
        let _i = Injection::on("fail_page_alloc", 100)?;
        let a = [k.base, 4, 50, 0xba];
        let (bad, _) = k.peer.call(STORE_IN_EACH, &a, &[])?;
        ensure_eq!(bad, 0, "stores that failed");
    }
    before.expect(ctx, 0, 4)?;
    k.fill(0..pages(4))?;
    k.verify()
}

/// A child in a cgroup with no room left for tables is killed; the parent has everything.
fn charge_fails_in_a_fault(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 16)?;
    let group = Cgroup::enter()?;
    let child = k.child(ctx, 16)?;
    std::fs::write(
        format!(
            "/sys/fs/cgroup/guest-tests-{}/cgroup.procs",
            std::process::id()
        ),
        child.peer.pid.to_string(),
    )?;
    group.leave()?;
    std::fs::write(format!("/proc/{}/oom_score_adj", child.peer.pid), "1000")?;
    group.write("memory.swap.max", "0").ok();
    let now = group.number("memory.current")?;
    group.write("memory.max", &(now + (256 << 10)).to_string())?;
    let write: Remote = |a, _| {
        crate::peer::access(
            (0..a[1]).try_fold(0, |_, n| sys::store64(a[0] + n * PAGE, 0).map(|()| 0)),
        )
    };
    // Killed for memory, or refused; only success would be wrong.
    if let Ok((r, d)) = child.peer.call(write, &[child.base, pages(16)], &[]) {
        ensure!(
            crate::peer::unpack(r, &d).is_err(),
            "32 MiB went into a cgroup with 256 kB left"
        );
    }
    k.verify()?;
    group.write("memory.max", "max")?;
    diverge(&mut [&mut k])?;
    k.fill(0..pages(16))?;
    k.verify()
}
