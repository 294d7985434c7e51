//! Private mappings of files: pages of the file and pages of one's own in one table, and a file that
//! changes under all who share it.

use super::{diverge, verify_all, Events, Kin};
use crate::harness::{Ctx, Res};
use crate::leave::{Uffd, MODE_MISSING, UFFDIO_REGISTER, UFFDIO_UNREGISTER};
use crate::machine::Ext4;
use crate::oracle::{page_bytes, pages, Model};
use crate::peer::Remote;
use crate::probe::{self, Probe};
use crate::sys::{self, FIXED, GRANULE, GRANULE_PAGES, PAGE, PRIVATE, RW};
use crate::{ensure_eq, group};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

group!("odf";
    private_file_memfd,
    private_file_ext4,
    private_file_dax_is_copied,
    private_file_truncated,
    private_file_truncated_by_a_part_of_a_page,
    private_file_punched,
    punched_pages_leave_the_tlb,
    truncated_zero_page_leaves_the_tlb,
    forks_during_truncation(120),
    punched_pages_count_in_the_owner,
    punched_poison_stays,
    private_file_written_back,
    private_file_untouched,
    granule_of_several_mappings,
    shared_and_private_side_by_side,
    private_file_collapsed,
    uprobe_after_the_fork,
    uprobe_before_the_fork,
);

/// Gives the file its size and content. Page by page: this process is to have no heap that whole tables map,
/// which its children would share as well.
fn fill(fd: &OwnedFd, file: &mut Model, n: u64) -> Res {
    file.truncate(fd, n)?;
    for page in 0..n {
        let g = super::next();
        file.pages[page as usize] = g;
        sys::pwrite(fd, &page_bytes(file.seed, page, g), page * PAGE)?;
    }
    Ok(())
}

/// A file and a private mapping of it in which some pages were written.
struct Private {
    fd: OwnedFd,
    file: Model,
    k: Kin,
}

/// Pages that the process has written: every third.
fn own(page: u64) -> bool {
    page.is_multiple_of(3)
}

impl Private {
    fn new(ctx: &Ctx, fd: OwnedFd, granules: u64) -> Res<Private> {
        let mut p = Private {
            fd,
            // The same seed, so that a page's generation alone says whose it is.
            file: Model::new(ctx.seed, 0),
            k: Kin::bare(ctx, granules)?,
        };
        fill(&p.fd, &mut p.file, pages(granules))?;
        let (at, fd) = (p.k.base, p.fd.as_raw_fd());
        p.k.peer
            .mmap(at, granules * GRANULE, RW, PRIVATE | FIXED, fd, 0)??;
        p.k.model.pages.clone_from(&p.file.pages);
        p.k.peer.touch(at, pages(granules))?;
        p.k.fill_every(3, 0..pages(granules))?;
        p.k.verify()?;
        Ok(p)
    }

    /// The file gets something new, not through a mapping.
    fn write_file(&mut self, page: u64) -> Res {
        let g = super::next();
        self.file.pages[page as usize] = g;
        sys::pwrite(&self.fd, &page_bytes(self.file.seed, page, g), page * PAGE)?;
        Ok(())
    }

    /// The same, and everybody who has not written the page sees it.
    fn write_under(&mut self, page: u64, others: &mut [&mut Kin]) -> Res {
        self.write_file(page)?;
        let g = self.file.pages[page as usize];
        for k in std::iter::once(&mut self.k).chain(others.iter_mut().map(|k| &mut **k)) {
            if !own(page) {
                k.model.pages[page as usize] = g;
            }
        }
        Ok(())
    }
}

fn changes(ctx: &Ctx, fd: OwnedFd) -> Res {
    let mut p = Private::new(ctx, fd, 3)?;
    let before = Events::now();
    let mut child = p.k.child(ctx, 3)?;
    let mut grandchild = child.child(ctx, 3)?;
    verify_all(&[&p.k, &child, &grandchild])?;
    for page in [1, 3, GRANULE_PAGES + 2, GRANULE_PAGES + 1] {
        p.write_under(page, &mut [&mut child, &mut grandchild])?;
        verify_all(&[&p.k, &child, &grandchild])?;
    }
    before.expect(ctx, 0, 0)?;
    // A page of the file and a page of one's own, by each.
    child.store(4)?;
    child.store(6)?;
    p.k.store(7)?;
    p.k.store(9)?;
    grandchild.store(GRANULE_PAGES)?;
    verify_all(&[&p.k, &child, &grandchild])?;
    p.write_under(10, &mut [&mut child, &mut grandchild])?;
    verify_all(&[&p.k, &child, &grandchild])?;
    // Dropping one's own shows the file again.
    for page in [6, 9] {
        let one = if page == 6 { &mut child } else { &mut p.k };
        one.advise(page..page + 1, libc::MADV_DONTNEED)?;
        one.model.pages[page as usize] = p.file.pages[page as usize];
        verify_all(&[&p.k, &child, &grandchild])?;
    }
    diverge(&mut [&mut grandchild, &mut p.k, &mut child])?;
    p.file.verify_file(&p.fd)
}

fn private_file_memfd(ctx: &Ctx) -> Res {
    changes(ctx, sys::memfd(0)?)
}

fn private_file_ext4(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(64)?;
    changes(ctx, fs.file("private")?.into())
}

/// A file without a page cache: fork copies the tables as ever.
fn private_file_dax_is_copied(ctx: &Ctx) -> Res {
    let fs = Ext4::dax()?;
    let mut p = Private::new(ctx, fs.file("private")?.into(), 2)?;
    let mut child = p.k.child(ctx, 0)?;
    p.write_under(1, &mut [&mut child])?;
    child.store(4)?;
    p.k.store(6)?;
    diverge(&mut [&mut p.k, &mut child])?;
    p.file.verify_file(&p.fd)
}

/// What is beyond the end goes for everybody, their own pages too.
fn private_file_truncated(ctx: &Ctx) -> Res {
    let mut p = Private::new(ctx, sys::memfd(0)?, 3)?;
    let mut child = p.k.child(ctx, 3)?;
    let grandchild = child.child(ctx, 3)?;
    // One table of the child's own among the shared ones.
    child.store(GRANULE_PAGES + 3)?;
    let end = GRANULE_PAGES + 100;
    p.file.truncate(&p.fd, end)?;
    for who in [&p.k, &child, &grandchild] {
        for page in [end, end + 1, end + 2, pages(2), pages(3) - 1] {
            who.faults(page, libc::SIGBUS, sys::BUS_ADRERR)?;
        }
        who.sees(0..end)?;
    }
    // Anew: zeros for everybody.
    p.file.truncate(&p.fd, pages(3))?;
    let mut all = [p.k, child, grandchild];
    for who in &mut all {
        who.zero(end..pages(3));
        who.verify()?;
    }
    let [k, child, grandchild] = &mut all;
    diverge(&mut [grandchild, k, child])?;
    p.file.truncate(&p.fd, 0)?;
    for who in &all {
        who.faults(0, libc::SIGBUS, sys::BUS_ADRERR)?;
    }
    Ok(())
}

/// The rest of the last page is zeros in the file, and as it was in a page of one's own.
fn private_file_truncated_by_a_part_of_a_page(ctx: &Ctx) -> Res {
    for page in [GRANULE_PAGES + 1, GRANULE_PAGES + 2] {
        let p = Private::new(ctx, sys::memfd(0)?, 2)?;
        let child = p.k.child(ctx, 2)?;
        sys::ftruncate(&p.fd, page * PAGE + 64)?;
        for who in [&p.k, &child] {
            let (inside, beyond) = (who.at(page) + 56, who.at(page) + 64);
            let want =
                |n| crate::oracle::word_at(ctx.seed, page, who.model.pages[page as usize], n);
            ensure_eq!(who.peer.load(inside)?, Ok(want(7)), "before the end");
            let rest = if own(page) { want(8) } else { 0 };
            ensure_eq!(who.peer.load(beyond)?, Ok(rest), "after the end");
            who.sees(0..page)?;
            who.faults(page + 1, libc::SIGBUS, sys::BUS_ADRERR)?;
        }
    }
    Ok(())
}

/// A hole takes the file's pages from everybody, and nobody's own.
fn private_file_punched(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(64)?;
    for fd in [sys::memfd(0)?, fs.file("punched")?.into()] {
        let mut p = Private::new(ctx, fd, 3)?;
        let mut child = p.k.child(ctx, 3)?;
        let mut grandchild = child.child(ctx, 3)?;
        let before = Events::now();
        let holes: [Range<u64>; 3] = [
            5..9,
            GRANULE_PAGES - 4..GRANULE_PAGES + 4,
            pages(2)..pages(3),
        ];
        for hole in holes {
            p.file.punch(&p.fd, hole.clone())?;
            for page in hole.filter(|p| !own(*p)) {
                for who in [&mut p.k, &mut child, &mut grandchild] {
                    who.zero(page..page + 1);
                }
            }
            // Own pages first: reading a hole fills it for oneself.
            grandchild.verify()?;
            verify_all(&[&p.k, &child, &grandchild])?;
            child.store(6)?;
            p.k.store(pages(2) + 2)?;
            verify_all(&[&p.k, &child, &grandchild])?;
        }
        if ctx.sharing {
            let since = Events::now().since(&before);
            crate::ensure!(since.copied > 0, "no table was copied");
        }
        diverge(&mut [&mut grandchild, &mut p.k, &mut child])?;
    }
    Ok(())
}

/// Pages go that are in the counters of one, through the mapping of another one, which comes first.
fn punched_pages_count_in_the_owner(ctx: &Ctx) -> Res {
    let p = Private::new(ctx, sys::memfd(0)?, 2)?;
    let child = p.k.child(ctx, 2)?;
    p.k.peer.munmap(p.k.at(0), GRANULE)?;
    sys::punch(&p.fd, 0, 2 * GRANULE)?;
    for who in [&p.k, &child] {
        let path = format!("/proc/{}/status", who.peer.pid);
        let left = crate::kernel::kb_field(&path, "RssShmem").unwrap_or(0) / 4;
        // The counter lags by a batch for each CPU.
        crate::ensure!(left < 130, "{left} pages in RssShmem after all are gone");
    }
    // Counters that are wrong the kernel complains of now.
    p.k.peer.exit()?;
    child.peer.exit()
}

/// A page of one's own that failed has failed, whatever becomes of the file.
fn punched_poison_stays(ctx: &Ctx) -> Res {
    let p = Private::new(ctx, sys::memfd(0)?, 2)?;
    let child = p.k.child(ctx, 2)?;
    let page = GRANULE_PAGES + 1;
    crate::ensure!(own(page), "not a page of one's own");
    super::madvise::poison(&p.k, page)?;
    for _ in 0..2 {
        // The first time while nobody has noticed yet: who does copies the table.
        sys::punch(&p.fd, page * PAGE, PAGE)?;
        for who in [&p.k, &child] {
            who.faults(page, libc::SIGBUS, super::madvise::BUS_MCEERR_AR)?;
        }
    }
    Ok(())
}

/// A hole in the file, while one of those who share the table reads there on another CPU.
fn punched_pages_leave_the_tlb(ctx: &Ctx) -> Res {
    use crate::tlb::{address, board, let_run, stop, LOADER};
    sys::pin_to_cpu(0);
    for by_child in [true, false] {
        let b = board()?;
        let p = Private::new(ctx, sys::memfd(0)?, 2)?;
        let child = p.k.child(ctx, 2)?;
        let one = if by_child { &child } else { &p.k };
        // A page of the file, then one's own, which stays.
        let page = GRANULE_PAGES + 2;
        one.peer
            .start(LOADER, &[address(b), one.at(page), 1], &[])?;
        let_run(b, 50)?;
        sys::punch(&p.fd, page * PAGE, PAGE)?;
        // Nothing but zeros from now on.
        b.published.store(u64::MAX, SeqCst);
        let_run(b, 50)?;
        stop(b, &[&one.peer])?;
        // Whoever reads fills the hole for itself.
        child.borrows(ctx, if by_child { 1 } else { 2 })?;
    }
    Ok(())
}

/// The page that they write to in each granule.
const WRITTEN: u64 = 7;

/// In a peer: has all pages of a private mapping, some of them its own, and forks until the file was truncated
/// and has its size again. It, and every other child, meanwhile writes to one page in each granule, for which it
/// copies the table. Then it, and each child, looks at all other pages. Arguments: board, address, pages, what
/// pages hold. Answers how many children it had, or less than 0 for anything wrong.
const FORK_UNTIL_TRUNCATED: Remote = |a, _| {
    let (b, addr) = (crate::tlb::board_at(a[0]), a[1]);
    let count = |right: Result<u64, sys::Fault>| {
        let others = (0..a[2]).filter(|p| p % GRANULE_PAGES != WRITTEN);
        others
            .filter(|p| sys::load64(addr + p * PAGE) != right)
            .count()
    };
    // May be beyond the end of the file.
    let write = || {
        for at in (addr..addr + a[2] * PAGE).step_by(GRANULE as usize) {
            sys::store64(at + WRITTEN * PAGE, 1).ok();
        }
    };
    // No longer than that, should the test itself fail.
    let wait = || {
        let started = Instant::now();
        while b.published.load(SeqCst) != a[3] && started.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    sys::pin_to_cpu(1);
    let before = count(Ok(a[3]));
    if before != 0 {
        return (-1, format!("{before} pages are wrong before").into_bytes());
    }
    for page in (0..a[2]).filter(|p| own(*p)) {
        if let Err(f) = sys::store64(addr + page * PAGE, a[3]) {
            return (-2, format!("page {page}: {f:?}").into_bytes());
        }
    }
    let mut children = vec![];
    while b.published.load(SeqCst) != a[3] && children.len() < 30 {
        match sys::fork() {
            Ok(0) => {
                if children.len() % 2 == 0 {
                    write();
                }
                wait();
                sys::exit_now(i32::from(count(Ok(0)) != 0))
            }
            Ok(pid) => children.push(pid),
            Err(e) => return (-3, e.to_string().into_bytes()),
        }
        b.done.fetch_add(1, SeqCst);
        write();
    }
    wait();
    let left = count(Ok(0));
    for (n, pid) in children.iter().enumerate() {
        match sys::wait(*pid) {
            Ok(0) => {}
            Ok(256) => return (-4, format!("child {n} sees old pages").into_bytes()),
            other => return (-5, format!("child {n}: {other:?}").into_bytes()),
        }
    }
    match left {
        0 => (children.len() as i64, vec![]),
        _ => (-6, format!("the parent sees {left} old pages").into_bytes()),
    }
};

/// A file loses all its pages while a process that maps it privately forks: neither it nor any child, from before
/// or from meanwhile, sees one of them afterwards.
fn forks_during_truncation(ctx: &Ctx) -> Res {
    const GRANULES: u64 = 4;
    sys::pin_to_cpu(0);
    let b = crate::tlb::board()?;
    let fd = sys::memfd(pages(GRANULES) * PAGE)?;
    let k = Kin::bare(ctx, GRANULES)?;
    let (len, flags) = (pages(GRANULES) * PAGE, PRIVATE | sys::NOREPLACE);
    ensure_eq!(
        k.peer.mmap(k.base, len, RW, flags, fd.as_raw_fd(), 0)?,
        Ok(k.base),
        "mmap"
    );
    let before = Events::now();
    let mut forks = 0;
    for round in 1..=if ctx.long { 300 } else { 20u64 } {
        for page in 0..pages(GRANULES) {
            sys::pwrite(&fd, &round.to_ne_bytes(), page * PAGE)?;
        }
        let a = [crate::tlb::address(b), k.base, pages(GRANULES), round];
        let done = b.done.load(SeqCst);
        k.peer.start(FORK_UNTIL_TRUNCATED, &a, &[])?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while b.done.load(SeqCst) < done + 1 + round % 4 {
            crate::ensure!(Instant::now() < deadline, "round {round}: no forks");
            std::hint::spin_loop();
        }
        // From the end to the begin, as long as some forks take.
        for granule in (0..GRANULES).rev() {
            sys::ftruncate(&fd, granule * GRANULE)?;
        }
        sys::ftruncate(&fd, len)?;
        b.published.store(round, SeqCst);
        let (r, why) = k.peer.finish()?;
        crate::ensure!(r > 0, "round {round}: {}", String::from_utf8_lossy(&why));
        forks += r as u64;
    }
    if ctx.sharing {
        let shared = Events::now().since(&before).shared;
        crate::ensure!(shared >= forks, "{forks} forks shared {shared} tables");
    }
    Ok(())
}

/// The zero page, which userfaultfd can put into a private mapping of a file and which is in nobody's counters:
/// after truncation all who share the table get SIGBUS there, also who has it in the TLB.
fn truncated_zero_page_leaves_the_tlb(ctx: &Ctx) -> Res {
    use crate::tlb::{address, board, let_run, stop, LOADER};
    const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
    sys::pin_to_cpu(0);
    for by_child in [true, false] {
        let b = board()?;
        let p = Private::new(ctx, sys::memfd(0)?, 2)?;
        let page = GRANULE_PAGES + 2;
        sys::punch(&p.fd, page * PAGE, PAGE)?;
        let granule = p.k.at(GRANULE_PAGES);
        let u = Uffd::of(&p.k.peer, 0)?;
        u.ioctl(UFFDIO_REGISTER, &mut [granule, GRANULE, MODE_MISSING, 0])?;
        u.ioctl(UFFDIO_ZEROPAGE, &mut [p.k.at(page), PAGE, 0, 0])?;
        u.ioctl(UFFDIO_UNREGISTER, &mut [granule, GRANULE])?;
        let child = p.k.child(ctx, 2)?;
        let one = if by_child { &child } else { &p.k };
        one.peer
            .start(LOADER, &[address(b), one.at(page), 1], &[])?;
        let_run(b, 50)?;
        ensure_eq!(b.faults.load(SeqCst), 0, "faults before the end moves");
        // At the end it goes alone: a page that is counted would make the flush reach everybody.
        sys::ftruncate(&p.fd, (page + 1) * PAGE)?;
        sys::ftruncate(&p.fd, page * PAGE)?;
        let before = b.faults.load(SeqCst);
        let_run(b, 50)?;
        let faults = b.faults.load(SeqCst) - before;
        crate::ensure!(faults > 0, "loads from beyond the end of the file");
        stop(b, &[&one.peer])?;
    }
    Ok(())
}

/// Writeback of the file, while pages of it are in shared tables: what is written later is not lost.
fn private_file_written_back(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(64)?;
    let mut p = Private::new(ctx, fs.file("back")?.into(), 2)?;
    let at = p.k.peer.map(&p.fd, 0, 2 * GRANULE, RW)?;
    let mut child = p.k.child(ctx, 2)?;
    for (round, page) in [1, GRANULE_PAGES + 2, 7, GRANULE_PAGES + 8]
        .into_iter()
        .enumerate()
    {
        // Through the shared mapping, by the parent or the child.
        let who = if round < 2 { &p.k } else { &child };
        let g = super::next();
        let a = [at + page * PAGE, ctx.seed, page, u64::from(g)];
        ensure_eq!(
            who.peer.call(crate::oracle::STORE_PAGE, &a, &[])?.0,
            0,
            "the store"
        );
        p.file.pages[page as usize] = g;
        p.k.model.pages[page as usize] = g;
        child.model.pages[page as usize] = g;
        sys::syscall(libc::SYS_fsync, &[p.fd.as_raw_fd() as u64])?;
        verify_all(&[&p.k, &child])?;
    }
    p.k.store(2)?;
    child.store(2)?;
    sys::syscall(libc::SYS_fsync, &[p.fd.as_raw_fd() as u64])?;
    verify_all(&[&p.k, &child])?;
    p.file.verify_file(&p.fd)
}

/// A mapping that nobody has written to is not copied by a fork at all; each reads the file for itself.
fn private_file_untouched(ctx: &Ctx) -> Res {
    let mut p = Private::new(ctx, sys::memfd(0)?, 2)?;
    let at = p.k.peer.place(0, 2 * GRANULE)?;
    let fd = p.fd.as_raw_fd();
    p.k.peer
        .mmap(at, 2 * GRANULE, RW, PRIVATE | FIXED, fd, 0)??;
    p.k.peer.touch(at, pages(2))?;
    // The written mapping is shared, this one not.
    let child = p.k.child(ctx, 2)?;
    p.file.verify_mapped(&child.peer, at, 0..pages(2))?;
    p.write_file(5)?;
    p.file.verify_mapped(&child.peer, at, 0..pages(2))?;
    p.file.verify_mapped(&p.k.peer, at, 0..pages(2))
}

/// Several mappings in one granule: that one is copied, the one beside it shared.
fn granule_of_several_mappings(ctx: &Ctx) -> Res {
    let fd = sys::memfd(0)?;
    let mut file = Model::new(ctx.seed, 0);
    fill(&fd, &mut file, pages(2))?;
    let mut k = Kin::new(ctx, 2)?;
    // Over the middle of the first granule: private pages of the file, with some of one's own.
    let part = 100..200;
    k.peer.mmap(
        k.at(100),
        100 * PAGE,
        RW,
        PRIVATE | FIXED,
        fd.as_raw_fd(),
        100 * PAGE,
    )??;
    k.model.pages[100..200].clone_from_slice(&file.pages[100..200]);
    for page in part.clone().step_by(7) {
        k.store(page)?;
    }
    // And one that may not be read.
    k.must(libc::SYS_mprotect, &[k.at(300), 8 * PAGE, sys::NONE])?;
    let mut child = k.child(ctx, 1)?;
    let mut grandchild = child.child(ctx, 1)?;
    for who in [&mut grandchild, &mut k, &mut child] {
        for page in [99, 100, 101, 199, 200, 308, GRANULE_PAGES] {
            who.store(page)?;
        }
    }
    for who in [&k, &child, &grandchild] {
        who.sees(0..300)?;
        who.faults(300, libc::SIGSEGV, sys::SEGV_ACCERR)?;
        who.sees(308..pages(2))?;
    }
    Ok(())
}

/// A private mapping beside a shared one of the same file: what is shared stays so.
fn shared_and_private_side_by_side(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let mut p = Private::new(ctx, sys::memfd(0)?, 2)?;
    let at = p.k.peer.map(&p.fd, 0, 2 * GRANULE, RW)?;
    let child = p.k.fork()?;
    for (n, who) in [&p.k, &child].into_iter().enumerate() {
        let page = GRANULE_PAGES + 2 + 3 * n as u64;
        let g = super::next();
        let a = [at + page * PAGE, ctx.seed, page, u64::from(g)];
        ensure_eq!(
            who.peer.call(crate::oracle::STORE_PAGE, &a, &[])?.0,
            0,
            "the store"
        );
        p.file.pages[page as usize] = g;
    }
    for who in [&p.k, &child] {
        p.file.verify_mapped(&who.peer, at, 0..pages(2))?;
    }
    // Unwritten pages of the private mapping show the file.
    let mut child = child;
    for page in [GRANULE_PAGES + 2, GRANULE_PAGES + 5] {
        p.k.model.pages[page as usize] = p.file.pages[page as usize];
        child.model.pages[page as usize] = p.file.pages[page as usize];
    }
    diverge(&mut [&mut p.k, &mut child])?;
    for who in [&p.k, &child] {
        p.file.verify_mapped(&who.peer, at, 0..pages(2))?;
    }
    Ok(())
}

// ---- uprobes ----

/// The page of code in granule 1.
const CODE_AT: u64 = GRANULE_PAGES + 8;

/// A process that maps a file privately, for execution, with one page of code, of which it may have made
/// its own copy.
fn executable(ctx: &Ctx, own: bool) -> Res<Private> {
    let p = Private::new(ctx, sys::memfd(0)?, 2)?;
    sys::pwrite(&p.fd, &probe::code_page(), CODE_AT * PAGE)?;
    let write: crate::peer::Remote = |a, code| {
        let r = sys::copy(a[0], code.as_ptr() as u64, PAGE);
        (i64::from(r.is_err()), vec![])
    };
    let code = p.k.at(CODE_AT);
    if own {
        let (r, _) = p.k.peer.call(write, &[code], &probe::code_page())?;
        ensure_eq!(r, 0, "writing the code");
    }
    let run = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    p.k.must(libc::SYS_mprotect, &[p.k.base, 2 * GRANULE, run])?;
    probe::holds(&p.k.peer, code, probe::CODE)?;
    probe::runs(&p.k.peer, code)?;
    Ok(p)
}

/// All see what they must beside the code.
fn sees_the_rest(kin: &[&Kin]) -> Res {
    kin.iter().try_for_each(|k| {
        k.sees(0..CODE_AT)?;
        k.sees(CODE_AT + 1..pages(2))
    })
}

/// A breakpoint is put into the one whose it is, and taken out of it again.
fn uprobe_after_the_fork(ctx: &Ctx) -> Res {
    for (by_child, own) in [(true, false), (false, false), (true, true), (false, true)] {
        let p = executable(ctx, own)?;
        let at = p.k.at(CODE_AT);
        let child = p.k.child(ctx, 2)?;
        let (one, other) = match by_child {
            true => (&child, &p.k),
            false => (&p.k, &child),
        };
        let before = Events::now();
        let probe = Probe::new(&p.fd, CODE_AT * PAGE, one.peer.pid)?;
        for hits in 0..3 {
            probe::holds(&one.peer, at, probe::BROKEN)?;
            probe::holds(&other.peer, at, probe::CODE)?;
            probe.hit(hits)?;
            probe::runs(&other.peer, at)?;
            probe.hit(hits)?;
            probe::runs(&one.peer, at)?;
        }
        before.expect(ctx, 1, 0)?;
        let mut page = vec![0; PAGE as usize];
        sys::pread(&p.fd, &mut page, CODE_AT * PAGE)?;
        ensure_eq!(page, probe::code_page(), "the file's code");
        drop(probe);
        for who in [one, other] {
            probe::holds(&who.peer, at, probe::CODE)?;
            probe::runs(&who.peer, at)?;
        }
        sees_the_rest(&[one, other])?;
    }
    Ok(())
}

/// A child is born with its parent's breakpoint. It is not the child's: when the child comes there it is taken
/// out of the child, and stays in the parent, whose count has the parent's hits alone.
fn uprobe_before_the_fork(ctx: &Ctx) -> Res {
    for own in [false, true] {
        let p = executable(ctx, own)?;
        let at = p.k.at(CODE_AT);
        let probe = Probe::new(&p.fd, CODE_AT * PAGE, p.k.peer.pid)?;
        let child = p.k.child(ctx, 2)?;
        let grandchild = child.child(ctx, 2)?;
        for who in [&p.k, &child, &grandchild] {
            probe::holds(&who.peer, at, probe::BROKEN)?;
        }
        probe::runs(&child.peer, at)?;
        probe::holds(&child.peer, at, probe::CODE)?;
        for who in [&p.k, &grandchild] {
            probe::holds(&who.peer, at, probe::BROKEN)?;
        }
        probe.hit(0)?;
        probe::runs(&p.k.peer, at)?;
        probe.hit(1)?;
        probe::runs(&grandchild.peer, at)?;
        probe.hit(1)?;
        probe::holds(&p.k.peer, at, probe::BROKEN)?;
        drop(probe);
        for who in [&p.k, &child, &grandchild] {
            probe::holds(&who.peer, at, probe::CODE)?;
            probe::runs(&who.peer, at)?;
        }
        sees_the_rest(&[&p.k, &child, &grandchild])?;
    }
    Ok(())
}

// ---- collapse ----

/// MADV_COLLAPSE replaces the file's pages by a huge one, under all who map them; who asked for it maps it as
/// such where it has no pages of its own.
fn private_file_collapsed(ctx: &Ctx) -> Res {
    const MADV_COLLAPSE: i32 = 25;
    for by_child in [true, false] {
        let mut p = Private::new(ctx, sys::memfd(0)?, 3)?;
        // Granule 1 has pages of the file alone.
        p.k.advise(GRANULE_PAGES..pages(2), libc::MADV_DONTNEED)?;
        p.k.model.pages[GRANULE_PAGES as usize..pages(2) as usize]
            .copy_from_slice(&p.file.pages[GRANULE_PAGES as usize..pages(2) as usize]);
        p.k.verify()?;
        let mut child = p.k.child(ctx, 3)?;
        let one = if by_child { &child } else { &p.k };
        for granule in 0..3 {
            let at = one.at(pages(granule));
            let end = Instant::now() + Duration::from_secs(20);
            loop {
                match one.peer.madvise(at, GRANULE, MADV_COLLAPSE)? {
                    Err(sys::Errno(libc::EAGAIN | libc::EBUSY)) if Instant::now() < end => {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    // Where it has pages of its own there is nothing to be had.
                    r => {
                        let empty = granule == 1;
                        ensure_eq!(
                            r.is_ok(),
                            empty,
                            "MADV_COLLAPSE of granule {granule}: {r:?}"
                        );
                        break;
                    }
                }
            }
            verify_all(&[&p.k, &child])?;
        }
        let huge = |k: &Kin| -> Res<u64> {
            let text = crate::kernel::smaps_of(k.peer.pid, k.base)?;
            Ok(crate::kernel::kb_in(&text, "ShmemPmdMapped").unwrap_or(0) / 2048)
        };
        let one = if by_child { &child } else { &p.k };
        ensure_eq!(huge(one)?, 1, "huge granules of the one who asked");
        for page in [1, GRANULE_PAGES + 2, GRANULE_PAGES + 3, pages(2) + 1] {
            p.write_under(page, &mut [&mut child])?;
            verify_all(&[&p.k, &child])?;
        }
        let mut grandchild = child.fork()?;
        diverge(&mut [&mut p.k, &mut grandchild, &mut child])?;
        p.file.verify_file(&p.fd)?;
    }
    Ok(())
}
