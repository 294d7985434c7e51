//! Contract 1.2, "semantics are unchanged": operations of one process that end its sharing for the
//! part they touch. Each test has member 0 act on part of the file while members 1 and 2 keep
//! sharing, and checks what each of them sees.

use crate::harness::{Ctx, Res};
use crate::kernel::{self, pagemap};
use crate::oracle::{pages, STORE_PAGE};
use crate::peer::{flat, unpack, Peer, Remote};
use crate::sys::{
    self, Errno, Fault, ANON, FIXED, GRANULE, GRANULE_PAGES, NONE, PAGE, PRIVATE, RO, RW, SHARED,
};
use crate::team::Team;
use crate::{ensure, ensure_eq, group, skip};
use std::os::fd::{AsRawFd, OwnedFd};

group!("leave";
    mprotect_whole_granule,
    mprotect_everything_and_back,
    mprotect_part_of_a_granule,
    mprotect_one_page_to_none,
    mprotect_same_protection_changes_nothing,
    mprotect_refused_changes_nothing,
    pkey_mprotect_granule,
    pkey_mprotect_without_a_key,
    munmap_whole,
    munmap_one_granule,
    munmap_one_page_in_the_middle,
    munmap_across_a_granule_border,
    map_fixed_over_part,
    mremap_move,
    mremap_move_incongruent,
    mremap_fixed_over_shared,
    mremap_grow,
    mremap_shrink,
    mremap_part,
    mremap_dontunmap,
    mremap_duplicate_of_old_size_zero,
    madvise_dontneed_whole_granule,
    madvise_dontneed_pages,
    madvise_dontneed_alone,
    madvise_cold_and_pageout,
    madvise_free_is_refused,
    madvise_remove,
    madvise_populate,
    madvise_populate_write_of_holes,
    madvise_dontfork,
    madvise_wipeonfork_is_refused,
    madvise_hugepage_nohugepage,
    madvise_willneed_random_sequential,
    madvise_dontdump_splits,
    madvise_dontdump_moves_the_border,
    madvise_guard_install,
    mlock_granule,
    mlock_part_and_munlock,
    mlock2_onfault,
    mlockall_current,
    split_inside_granule_then_merge,
    userfaultfd_missing,
    userfaultfd_missing_unregister,
    userfaultfd_minor,
    userfaultfd_wp,
    userfaultfd_events,
    soft_dirty,
    soft_dirty_and_untracked_become_one,
    pagemap_scan_write_protect,
    remap_file_pages_call,
    two_threads_leave_at_once,
);

fn scene(ctx: &Ctx) -> Res<Team> {
    Team::new(ctx, 3, 3)
}

fn expect_fault(what: &str, got: Result<u64, Fault>, signal: i32, code: i32) -> Res {
    let right = matches!(got, Err(f) if f.signal == signal && f.code == code);
    ensure!(
        right,
        "{what}: expected signal {signal} code {code}, got {got:?}"
    );
    Ok(())
}

fn refused(t: &Team, i: usize, page: u64) -> Res {
    let got = t.peer(i).store(t.at(i, page), 0xbad)?.map(|()| 0);
    expect_fault(
        &format!("store by member {i} to read-only page {page}"),
        got,
        libc::SIGSEGV,
        sys::SEGV_ACCERR,
    )
}

fn unmapped(t: &Team, i: usize, page: u64) -> Res {
    let got = t.peer(i).load(t.at(i, page))?;
    expect_fault(
        &format!("load by member {i} from unmapped page {page}"),
        got,
        libc::SIGSEGV,
        sys::SEGV_MAPERR,
    )
}

/// The others write everywhere, and everybody sees it, wherever member 0 still maps `ranges`.
fn others_go_on(t: &mut Team, ranges: &[(u64, u64)]) -> Res {
    for i in 1..t.members.len() {
        for g in 0..t.granules {
            for page in [0, 1, 255, 256, 511] {
                t.store(i, g * GRANULE_PAGES + page)?;
            }
        }
    }
    for i in 1..t.members.len() {
        t.verify(i, 0..pages(t.granules))?;
    }
    for (lo, hi) in ranges {
        t.verify(0, *lo..*hi)?;
    }
    t.model.verify_file(&t.fd)
}

/// Member 0 maps the file again at the same place. What it populated while it was not eligible had
/// private tables, which go with the mapping only.
fn map_anew(t: &Team) -> Res {
    let at = t.at(0, 0);
    let len = t.granules * GRANULE;
    ensure_eq!(
        t.peer(0).mmap(at, len, RW, SHARED | FIXED, t.raw(), 0)?,
        Ok(at),
        "mmap"
    );
    Ok(())
}

/// mprotect of one granule to read-only: it leaves, the others stay writable.
fn mprotect_whole_granule(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0).mprotect(t.granule(0, 1), GRANULE, RO)??;
    t.expect_left(1)?;
    refused(&t, 0, GRANULE_PAGES)?;
    refused(&t, 0, GRANULE_PAGES + 511)?;
    t.store(0, GRANULE_PAGES - 1)?;
    t.store(0, pages(2))?;
    others_go_on(&mut t, &[(0, pages(3))])?;
    // Written by the others meanwhile: still refused.
    refused(&t, 0, GRANULE_PAGES)?;
    t.peer(0).mprotect(t.granule(0, 1), GRANULE, RW)??;
    t.coherent()?;
    t.expect_all(3)
}

/// mprotect of the whole mapping, to nothing, to read-only and back.
fn mprotect_everything_and_back(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    for prot in [NONE, RO, RW] {
        t.peer(0).mprotect(t.at(0, 0), 3 * GRANULE, prot)??;
        t.expect_left(3)?;
        for page in [0, GRANULE_PAGES, pages(3) - 1] {
            if prot == NONE {
                let got = t.peer(0).load(t.at(0, page))?;
                expect_fault("load from PROT_NONE", got, libc::SIGSEGV, sys::SEGV_ACCERR)?;
            }
            if prot != RW {
                refused(&t, 0, page)?;
            }
        }
        let visible = if prot == NONE {
            vec![]
        } else {
            vec![(0, pages(3))]
        };
        others_go_on(&mut t, &visible)?;
    }
    t.coherent()?;
    t.expect_all(3)
}

/// mprotect of some pages of a granule: page-granular, and the granule stays private while split.
fn mprotect_part_of_a_granule(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let (lo, hi) = (GRANULE_PAGES + 100, GRANULE_PAGES + 200);
    t.peer(0).mprotect(t.at(0, lo), (hi - lo) * PAGE, RO)??;
    t.expect_left(1)?;
    for page in [lo, hi - 1] {
        refused(&t, 0, page)?;
    }
    for page in [lo - 1, hi, GRANULE_PAGES, pages(2) - 1, 0, pages(2)] {
        t.store(0, page)?;
    }
    others_go_on(&mut t, &[(0, pages(3))])?;
    t.expect_left(1)
}

/// mprotect of a single page to PROT_NONE.
fn mprotect_one_page_to_none(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let page = pages(2) + 13;
    t.peer(0).mprotect(t.at(0, page), PAGE, NONE)??;
    t.expect_left(1)?;
    expect_fault(
        "load from the PROT_NONE page",
        t.peer(0).load(t.at(0, page))?,
        libc::SIGSEGV,
        sys::SEGV_ACCERR,
    )?;
    others_go_on(&mut t, &[(0, page), (page + 1, pages(3))])
}

/// mprotect to the protection the mapping has already has no effect at all.
fn mprotect_same_protection_changes_nothing(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0).mprotect(t.at(0, 5), PAGE, RW)??;
    t.coherent()?;
    t.expect_all(3)
}

/// mprotect that the file's open mode forbids fails and leaves the reader a reader.
fn mprotect_refused_changes_nothing(ctx: &Ctx) -> Res {
    let t = scene(ctx)?;
    let path = format!("/proc/self/fd/{}", t.raw());
    let readonly: OwnedFd = std::fs::File::open(path)?.into();
    let p = Peer::spawn()?;
    let a = p.map(&readonly, 0, 3 * GRANULE, RO)?;
    p.touch(a, pages(3))?;
    for (from, len) in [
        (a, 3 * GRANULE),
        (a + GRANULE, GRANULE),
        (a + 9 * PAGE, PAGE),
    ] {
        ensure_eq!(
            p.mprotect(from, len, RW)?,
            Err(Errno(libc::EACCES)),
            "mprotect of a read-only file"
        );
        let got = p.store(from, 0xbad)?.map(|()| 0);
        expect_fault(
            "store after a refused mprotect",
            got,
            libc::SIGSEGV,
            sys::SEGV_ACCERR,
        )?;
    }
    t.verify_all()?;
    t.expect_all(3)
}

/// pkey_mprotect of a granule: it leaves, and the key holds for this process and this granule only.
fn pkey_mprotect_granule(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    // Arguments: address, value of the key's rights. A word is loaded and one is stored in between,
    // since the rights are the thread's.
    let with_rights: Remote = |a, _| {
        let (addr, key, rights) = (a[0], a[1], a[2]);
        pkey_set(key, rights);
        let loaded = sys::load64(addr);
        let stored = loaded.and_then(|v| sys::store64(addr, v));
        pkey_set(key, 0);
        let code = |r: Option<Fault>| r.map_or(0, |f| i64::from(f.code));
        (code(loaded.err()) | code(stored.err()) << 8, vec![])
    };
    let key = match t.peer(0).syscall(libc::SYS_pkey_alloc, &[0, 0])? {
        Err(e) => skip!("no protection keys: {e}"),
        Ok(key) => key,
    };
    let (at, page) = (t.granule(0, 1), GRANULE_PAGES);
    t.peer(0)
        .syscall(libc::SYS_pkey_mprotect, &[at, GRANULE, RW, key])??;
    t.expect_left(1)?;
    t.coherent()?;
    // Access disabled, and writing disabled.
    let (denied, none) = (i64::from(SEGV_PKUERR), 0);
    for (rights, wanted) in [(1, denied | denied << 8), (2, denied << 8), (0, none)] {
        for (addr, wanted) in [(t.at(0, page + 9), wanted), (t.at(0, 9), none)] {
            let (r, _) = t.peer(0).call(with_rights, &[addr, key, rights], &[])?;
            ensure_eq!(r, wanted, "faults at {addr:#x} with rights {rights}");
        }
        others_go_on(&mut t, &[(0, pages(3))])?;
    }
    // It shares again, with those who have that key there, of whom there are none.
    t.expect_all(3)?;
    // Back to the key that everything has.
    t.peer(0)
        .syscall(libc::SYS_pkey_mprotect, &[at, GRANULE, RW, 0])??;
    t.coherent()?;
    t.expect_all(3)
}

const SEGV_PKUERR: i32 = 4;

/// Sets this thread's rights by a protection key: 1 is no access, 2 no writing.
fn pkey_set(key: u64, rights: u64) {
    let shift = 2 * key;
    // SAFETY: the kernel gave out a key, so the CPU has the register; rights by that key concern the
    // tested granule only.
    unsafe {
        let pkru: u32;
        std::arch::asm!("rdpkru", in("ecx") 0, out("eax") pkru, out("edx") _);
        let pkru = pkru & !(3 << shift) | (rights as u32) << shift;
        std::arch::asm!("wrpkru", in("ecx") 0, in("eax") pkru, in("edx") 0);
    }
}

/// pkey_mprotect without a key is mprotect.
fn pkey_mprotect_without_a_key(ctx: &Ctx) -> Res {
    const NO_KEY: u64 = u64::MAX;
    let mut t = scene(ctx)?;
    let at = t.granule(0, 1);
    match t
        .peer(0)
        .syscall(libc::SYS_pkey_mprotect, &[at, GRANULE, RO, NO_KEY])?
    {
        Err(Errno(libc::ENOSYS)) => skip!("no protection keys in this kernel"),
        r => r?,
    };
    t.expect_left(1)?;
    refused(&t, 0, GRANULE_PAGES + 9)?;
    others_go_on(&mut t, &[(0, pages(3))])?;
    t.peer(0)
        .syscall(libc::SYS_pkey_mprotect, &[at, GRANULE, RW, NO_KEY])??;
    t.coherent()?;
    t.expect_all(3)
}

/// munmap of the whole mapping.
fn munmap_whole(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0).munmap(t.at(0, 0), 3 * GRANULE)?;
    t.expect_left(3)?;
    for page in [0, GRANULE_PAGES, pages(3) - 1] {
        unmapped(&t, 0, page)?;
    }
    others_go_on(&mut t, &[])
}

/// munmap of one granule.
fn munmap_one_granule(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0).munmap(t.granule(0, 1), GRANULE)?;
    t.expect_left(1)?;
    unmapped(&t, 0, GRANULE_PAGES)?;
    unmapped(&t, 0, pages(2) - 1)?;
    others_go_on(&mut t, &[(0, GRANULE_PAGES), (pages(2), pages(3))])
}

/// munmap of one page: its granule goes private, its neighbours stay mapped.
fn munmap_one_page_in_the_middle(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let page = GRANULE_PAGES + 300;
    t.peer(0).munmap(t.at(0, page), PAGE)?;
    t.expect_left(1)?;
    unmapped(&t, 0, page)?;
    t.store(0, page - 1)?;
    t.store(0, page + 1)?;
    others_go_on(&mut t, &[(0, page), (page + 1, pages(3))])?;
    t.expect_left(1)
}

/// munmap of pages on both sides of a border between granules cuts both.
fn munmap_across_a_granule_border(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let (lo, hi) = (GRANULE_PAGES - 2, GRANULE_PAGES + 2);
    t.peer(0).munmap(t.at(0, lo), (hi - lo) * PAGE)?;
    t.expect_left(2)?;
    for page in lo..hi {
        unmapped(&t, 0, page)?;
    }
    others_go_on(&mut t, &[(0, lo), (hi, pages(3))])
}

/// MAP_FIXED of something else over part of a granule: only that process sees it.
fn map_fixed_over_part(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let page = GRANULE_PAGES + 40;
    let addr = t.at(0, page);
    t.peer(0)
        .mmap(addr, PAGE, RW, PRIVATE | ANON | FIXED, -1, 0)??;
    t.expect_left(1)?;
    ensure_eq!(t.peer(0).load(addr)?, Ok(0), "a fresh anonymous page");
    ensure_eq!(t.peer(0).store(addr, 77)?, Ok(()), "store to it");
    others_go_on(&mut t, &[(0, page), (page + 1, pages(3))])?;
    ensure_eq!(
        t.peer(0).load(addr)?,
        Ok(77),
        "the anonymous page after the others wrote theirs"
    );
    Ok(())
}

fn mremap(p: &Peer, a: &[u64]) -> Res<Result<u64, Errno>> {
    p.syscall(libc::SYS_mremap, a)
}

const MAYMOVE: u64 = libc::MREMAP_MAYMOVE as u64;
const MFIXED: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
const MDONTUNMAP: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP) as u64;

/// mremap to a congruent address: the old place is gone, the new one right, and it shares again.
fn mremap_move(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let to = t.peer(0).place(0, 3 * GRANULE)?;
    let old = t.at(0, 0);
    ensure_eq!(
        mremap(t.peer(0), &[old, 3 * GRANULE, 3 * GRANULE, MFIXED, to])?,
        Ok(to),
        "mremap"
    );
    t.expect(1, 3)?;
    unmapped(&t, 0, 0)?;
    unmapped(&t, 0, pages(3) - 1)?;
    t.members[0].addr = to;
    t.coherent()?;
    t.expect_all(3)
}

/// mremap to an address that is not congruent: right, and private.
fn mremap_move_incongruent(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let to = t.peer(0).place(0, 4 * GRANULE)? + 5 * PAGE;
    let old = t.at(0, 0);
    ensure_eq!(
        mremap(t.peer(0), &[old, 3 * GRANULE, 3 * GRANULE, MFIXED, to])?,
        Ok(to),
        "mremap"
    );
    t.expect_left(3)?;
    unmapped(&t, 0, GRANULE_PAGES)?;
    t.members[0].addr = to;
    t.coherent()?;
    t.expect_left(3)
}

/// mremap of something else over a shared granule replaces it, for that process only.
fn mremap_fixed_over_shared(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let p = t.peer(0);
    let other = p.mmap(0, 2 * PAGE, RW, PRIVATE | ANON, -1, 0)??;
    p.store(other, 0x5151)??;
    let page = GRANULE_PAGES + 60;
    let to = t.at(0, page);
    ensure_eq!(
        mremap(p, &[other, 2 * PAGE, 2 * PAGE, MFIXED, to])?,
        Ok(to),
        "mremap"
    );
    t.expect_left(1)?;
    ensure_eq!(p.load(to)?, Ok(0x5151), "the page that was moved in");
    others_go_on(&mut t, &[(0, page), (page + 2, pages(3))])
}

/// mremap that grows in place or elsewhere shows more of the file.
fn mremap_grow(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let mut t = Team::new(ctx, 2, 3)?;
    let p = Peer::spawn()?;
    let a = p.map(&t.fd, 0, GRANULE + 3 * PAGE, RW)?;
    p.touch(a, GRANULE_PAGES + 3)?;
    crate::team::expect_tables(ctx, &p, 1)?;
    let b = mremap(&p, &[a, GRANULE + 3 * PAGE, 3 * GRANULE, MAYMOVE])??;
    t.coherent()?;
    t.model.verify_mapped(&p, b, 0..pages(3))?;
    t.model.store(&p, b + pages(2) * PAGE, pages(2))?;
    t.verify_all()
}

/// mremap that shrinks into the middle of a granule.
fn mremap_shrink(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let keep = GRANULE_PAGES + 50;
    let a = t.at(0, 0);
    ensure_eq!(
        mremap(t.peer(0), &[a, 3 * GRANULE, keep * PAGE, 0])?,
        Ok(a),
        "mremap"
    );
    t.expect_left(2)?;
    unmapped(&t, 0, keep)?;
    unmapped(&t, 0, pages(2))?;
    others_go_on(&mut t, &[(0, keep)])
}

/// mremap of part of a granule to another place.
fn mremap_part(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let (lo, n) = (GRANULE_PAGES + 10, 20);
    let to = t.peer(0).place(0, GRANULE)?;
    let from = t.at(0, lo);
    ensure_eq!(
        mremap(t.peer(0), &[from, n * PAGE, n * PAGE, MFIXED, to])?,
        Ok(to),
        "mremap"
    );
    t.expect_left(1)?;
    unmapped(&t, 0, lo)?;
    unmapped(&t, 0, lo + n - 1)?;
    t.model.store(&t.members[0].peer, to + 3 * PAGE, lo + 3)?;
    others_go_on(&mut t, &[(0, lo), (lo + n, pages(3))])?;
    t.model.verify_mapped(t.peer(0), to, lo..lo + n)
}

/// MREMAP_DONTUNMAP: the old place stays mapped too; for a shared file both show the file.
fn mremap_dontunmap(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let a = t.at(0, 0);
    let b = match mremap(t.peer(0), &[a, 3 * GRANULE, 3 * GRANULE, MDONTUNMAP, 0])? {
        Err(Errno(libc::EINVAL)) => skip!("no MREMAP_DONTUNMAP of shared mappings"),
        r => r?,
    };
    t.coherent()?;
    t.model.verify_mapped(t.peer(0), b, 0..pages(3))?;
    t.model.store(&t.members[0].peer, b + 4 * PAGE, 4)?;
    t.verify_all()
}

/// mremap with old size 0 makes a second mapping of the same file range.
fn mremap_duplicate_of_old_size_zero(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let a = t.at(0, 0);
    let b = mremap(t.peer(0), &[a, 0, 3 * GRANULE, MAYMOVE])??;
    t.expect_all(3)?;
    t.model.verify_mapped(t.peer(0), b, 0..pages(3))?;
    t.model.store(&t.members[0].peer, b + 4 * PAGE, 4)?;
    t.coherent()
}

/// MADV_DONTNEED of a granule drops that process's view; the contents stay and it shares again.
fn madvise_dontneed_whole_granule(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0)
        .madvise(t.granule(0, 1), GRANULE, libc::MADV_DONTNEED)??;
    t.expect_left(1)?;
    let present = |e: &u64| e & pagemap::PRESENT != 0;
    let mine = kernel::pagemap(t.peer(0).pid, t.granule(0, 1), GRANULE_PAGES)?;
    ensure_eq!(
        mine.iter().filter(|e| present(e)).count(),
        0,
        "present pages after MADV_DONTNEED"
    );
    let theirs = kernel::pagemap(t.peer(1).pid, t.granule(1, 1), GRANULE_PAGES)?;
    ensure_eq!(
        theirs.iter().filter(|e| present(e)).count(),
        512,
        "present pages of another process"
    );
    t.verify_all()?;
    t.coherent()?;
    t.expect_all(3)
}

/// MADV_DONTNEED of a few pages: nobody loses content.
fn madvise_dontneed_pages(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0)
        .madvise(t.at(0, 10), 20 * PAGE, libc::MADV_DONTNEED)??;
    t.expect(1, 3)?;
    let mine = kernel::pagemap(t.peer(0).pid, t.at(0, 10), 20)?;
    ensure!(
        mine.iter().all(|e| e & pagemap::PRESENT == 0),
        "pages present after MADV_DONTNEED"
    );
    t.verify_all()?;
    t.coherent()
}

/// MADV_DONTNEED by the only process that uses the tables leaves nothing in the way of sharing with
/// those who come later.
fn madvise_dontneed_alone(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 1, 2)?;
    t.peer(0)
        .madvise(t.at(0, 0), 2 * GRANULE, libc::MADV_DONTNEED)??;
    t.expect(0, 0)?;
    t.join()?;
    t.peer(1).touch(t.at(1, 0), pages(2))?;
    t.coherent()?;
    t.expect_all(2)
}

/// MADV_COLD and MADV_PAGEOUT are hints: no content changes.
fn madvise_cold_and_pageout(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    for advice in [libc::MADV_COLD, libc::MADV_PAGEOUT] {
        t.peer(0).madvise(t.granule(0, 1), GRANULE, advice)??;
        t.peer(0).madvise(t.at(0, 17), 5 * PAGE, advice)??;
        t.verify_all()?;
        t.coherent()?;
    }
    Ok(())
}

/// MADV_FREE is for anonymous memory only: EINVAL, and sharing goes on.
fn madvise_free_is_refused(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    ensure_eq!(
        t.peer(0)
            .madvise(t.granule(0, 1), GRANULE, libc::MADV_FREE)?,
        Err(Errno(libc::EINVAL)),
        "MADV_FREE"
    );
    t.coherent()?;
    t.expect_all(3)
}

/// MADV_REMOVE punches a hole that every process sees.
fn madvise_remove(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    for (lo, n) in [(5, 3), (GRANULE_PAGES - 4, 8), (pages(2), GRANULE_PAGES)] {
        t.peer(0)
            .madvise(t.at(0, lo), n * PAGE, libc::MADV_REMOVE)??;
        t.model.pages[lo as usize..(lo + n) as usize].fill(0);
        t.verify_all()?;
    }
    t.coherent()
}

/// MADV_POPULATE_READ and _WRITE make every page present.
fn madvise_populate(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.join()?;
    for advice in [libc::MADV_POPULATE_READ, libc::MADV_POPULATE_WRITE] {
        t.peer(3).madvise(t.at(3, 0), 3 * GRANULE, advice)??;
        t.expect_all(3)?;
        let seen = kernel::pagemap(t.peer(3).pid, t.at(3, 0), pages(3))?;
        ensure!(
            seen.iter().all(|e| e & pagemap::PRESENT != 0),
            "a page is absent after populate {advice}"
        );
        t.coherent()?;
    }
    Ok(())
}

/// MADV_POPULATE_WRITE of a sparse file allocates the pages; on a read-only mapping it fails.
fn madvise_populate_write_of_holes(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 2, 2)?;
    t.peer(0)
        .madvise(t.at(0, 0), 2 * GRANULE, libc::MADV_POPULATE_WRITE)??;
    t.peer(1).touch(t.at(1, 0), pages(2))?;
    t.expect_all(2)?;
    t.verify_all()?;
    t.coherent()?;
    let p = Peer::spawn()?;
    let a = p.map(&t.fd, 0, 2 * GRANULE, RO)?;
    let r = p.madvise(a, 2 * GRANULE, libc::MADV_POPULATE_WRITE)?;
    ensure_eq!(
        r,
        Err(Errno(libc::EINVAL)),
        "MADV_POPULATE_WRITE of a read-only mapping"
    );
    Ok(())
}

/// MADV_DONTFORK of a granule: the child does not have it, the others and the parent do.
fn madvise_dontfork(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0)
        .madvise(t.granule(0, 1), GRANULE, libc::MADV_DONTFORK)??;
    let child = t.peer(0).fork()?;
    let got = child.load(t.granule(0, 1))?;
    expect_fault(
        "the child's load from DONTFORK memory",
        got,
        libc::SIGSEGV,
        sys::SEGV_MAPERR,
    )?;
    t.model
        .verify_mapped(&child, t.at(0, 0), 0..GRANULE_PAGES)?;
    t.model
        .verify_mapped(&child, t.granule(0, 2), pages(2)..pages(3))?;
    t.coherent()?;
    t.peer(0)
        .madvise(t.granule(0, 1), GRANULE, libc::MADV_DOFORK)??;
    let child = t.peer(0).fork()?;
    t.model.verify_mapped(&child, t.at(0, 0), 0..pages(3))
}

/// MADV_WIPEONFORK is for private anonymous memory only.
fn madvise_wipeonfork_is_refused(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let r = t
        .peer(0)
        .madvise(t.granule(0, 1), GRANULE, libc::MADV_WIPEONFORK)?;
    ensure_eq!(r, Err(Errno(libc::EINVAL)), "MADV_WIPEONFORK");
    t.coherent()?;
    t.expect_all(3)
}

/// MADV_HUGEPAGE and NOHUGEPAGE of part of the mapping change no content.
fn madvise_hugepage_nohugepage(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    for (page, n) in [(GRANULE_PAGES, GRANULE_PAGES), (30, 40)] {
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
            match t.peer(0).madvise(t.at(0, page), n * PAGE, advice)? {
                Err(Errno(libc::EINVAL)) => skip!("no transparent huge pages in this kernel"),
                r => r?,
            };
            t.expect(1, 3)?;
            t.coherent()?;
        }
    }
    Ok(())
}

/// Access-pattern hints split or flag the mapping; contents stay.
fn madvise_willneed_random_sequential(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    for advice in [
        libc::MADV_WILLNEED,
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
        libc::MADV_NORMAL,
    ] {
        t.peer(0).madvise(t.at(0, 100), 300 * PAGE, advice)??;
        t.peer(0).madvise(t.granule(0, 1), GRANULE, advice)??;
        t.expect(1, 3)?;
        t.coherent()?;
    }
    Ok(())
}

/// MADV_DONTDUMP inside a granule splits the mapping there: that granule leaves.
fn madvise_dontdump_splits(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0)
        .madvise(t.at(0, GRANULE_PAGES + 9), 9 * PAGE, libc::MADV_DONTDUMP)??;
    t.expect_left(1)?;
    t.coherent()?;
    t.expect_left(1)?;
    t.peer(0)
        .madvise(t.at(0, GRANULE_PAGES + 9), 9 * PAGE, libc::MADV_DODUMP)??;
    t.coherent()
}

/// MADV_DONTDUMP of what follows such a part moves the border between the two mappings: into a
/// granule, which leaves, out of another one.
fn madvise_dontdump_moves_the_border(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let cut = GRANULE_PAGES + 9;
    t.peer(0)
        .madvise(t.at(0, 0), cut * PAGE, libc::MADV_DONTDUMP)??;
    t.expect_left(1)?;
    t.peer(0)
        .madvise(t.at(0, cut), GRANULE, libc::MADV_DONTDUMP)??;
    t.expect_left(2)?;
    t.coherent()?;
    t.expect_left(1)
}

/// MADV_GUARD_INSTALL (where the kernel has it for files): own view only.
fn madvise_guard_install(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let (install, remove) = (102, 103);
    let at = t.at(0, GRANULE_PAGES + 9);
    match t.peer(0).madvise(at, 2 * PAGE, install)? {
        Err(Errno(libc::EINVAL)) => skip!("no guard regions for shared files in this kernel"),
        r => r?,
    };
    let got = t.peer(0).load(at)?;
    ensure!(got.is_err(), "load from a guard page: {got:?}");
    t.expect_left(1)?;
    others_go_on(
        &mut t,
        &[(0, GRANULE_PAGES + 9), (GRANULE_PAGES + 11, pages(3))],
    )?;
    t.peer(0).madvise(at, 2 * PAGE, remove)??;
    t.coherent()
}

/// mlock of a granule: it leaves, is resident and counted as locked; munlock brings it back.
fn mlock_granule(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0)
        .syscall(libc::SYS_mlock, &[t.granule(0, 1), GRANULE])??;
    t.expect_left(1)?;
    let status = format!("/proc/{}/status", t.peer(0).pid);
    ensure_eq!(kernel::kb_field(&status, "VmLck"), Some(2048), "VmLck");
    let seen = kernel::pagemap(t.peer(0).pid, t.granule(0, 1), GRANULE_PAGES)?;
    ensure!(
        seen.iter().all(|e| e & pagemap::PRESENT != 0),
        "an mlocked page is absent"
    );
    t.coherent()?;
    t.expect_left(1)?;
    t.peer(0)
        .syscall(libc::SYS_munlock, &[t.granule(0, 1), GRANULE])??;
    ensure_eq!(
        kernel::kb_field(&status, "VmLck"),
        Some(0),
        "VmLck after munlock"
    );
    t.coherent()?;
    t.expect_all(3)
}

/// mlock of some pages splits the mapping inside the granule.
fn mlock_part_and_munlock(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let (at, len) = (t.at(0, GRANULE_PAGES + 10), 10 * PAGE);
    t.peer(0).syscall(libc::SYS_mlock, &[at, len])??;
    t.expect_left(1)?;
    t.coherent()?;
    t.peer(0).syscall(libc::SYS_munlock, &[at, len])??;
    t.coherent()?;
    t.expect_all(3)
}

/// mlock2(MLOCK_ONFAULT): leaves too.
fn mlock2_onfault(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0).syscall(
        libc::SYS_mlock2,
        &[t.granule(0, 1), GRANULE, u64::from(libc::MLOCK_ONFAULT)],
    )??;
    t.expect_left(1)?;
    t.coherent()?;
    t.expect_left(1)
}

/// mlockall(MCL_CURRENT): everything of that process leaves, munlockall lets it come back.
fn mlockall_current(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    t.peer(0)
        .syscall(libc::SYS_mlockall, &[libc::MCL_CURRENT as u64])??;
    t.expect_left(3)?;
    t.coherent()?;
    t.expect_left(3)?;
    t.peer(0).syscall(libc::SYS_munlockall, &[])??;
    t.coherent()?;
    t.expect_all(3)
}

/// A mapping that is cut inside granules by mprotect and made whole again by the reverse: every
/// state shows the right contents, and whole granules share again when mapped anew.
fn split_inside_granule_then_merge(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    for (page, n) in [
        (GRANULE_PAGES + 1, 1),
        (GRANULE_PAGES - 1, 2),
        (0, 1),
        (pages(3) - 1, 1),
        (256, 512),
    ] {
        t.peer(0).mprotect(t.at(0, page), n * PAGE, RO)??;
        t.expect(1, 3)?;
        refused(&t, 0, page)?;
        others_go_on(&mut t, &[(0, pages(3))])?;
        t.peer(0).mprotect(t.at(0, page), n * PAGE, RW)??;
        t.coherent()?;
    }
    map_anew(&t)?;
    t.touch_all()?;
    t.expect_all(3)
}

// ---- userfaultfd ----

/// Its request UFFDIO_API.
pub const UFFDIO_API: u64 = 0xc018_aa3f;
/// Its request UFFDIO_REGISTER.
pub const UFFDIO_REGISTER: u64 = 0xc020_aa00;
/// Of userfaultfd's interface.
pub const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
/// Of userfaultfd's interface.
pub const UFFDIO_COPY: u64 = 0xc028_aa03;
/// Of userfaultfd's interface.
pub const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const UFFDIO_CONTINUE: u64 = 0xc020_aa07;
/// Of userfaultfd's interface.
pub const MODE_MISSING: u64 = 1;
/// Of userfaultfd's interface.
pub const MODE_WP: u64 = 2;
const MODE_MINOR: u64 = 4;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const FEATURE_WP_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// Of userfaultfd's interface.
pub const EVENT_PAGEFAULT: u64 = 0x12;
const EVENT_REMOVE: u64 = 0x15;
/// Of userfaultfd's interface.
pub const FLAG_WP: u64 = 2;
const FLAG_MINOR: u64 = 4;

/// A userfaultfd of a peer's memory, in the test process's hands.
pub struct Uffd {
    /// The descriptor.
    pub fd: OwnedFd,
}

impl Uffd {
    /// One with these features.
    pub fn of(peer: &Peer, features: u64) -> Res<Uffd> {
        let make: Remote = |a, _| {
            let flags = libc::O_CLOEXEC as u64;
            match sys::syscall(libc::SYS_userfaultfd, &[flags]) {
                Ok(fd) => {
                    let mut api = [0xaa_u64, a[0], 0];
                    match sys::syscall(libc::SYS_ioctl, &[fd, UFFDIO_API, api.as_mut_ptr() as u64])
                    {
                        Ok(_) => (fd as i64, vec![]),
                        Err(e) => (flat(Err(e)), vec![]),
                    }
                }
                Err(e) => (flat(Err(e)), vec![]),
            }
        };
        let (fd, _) = peer.call(make, &[features], &[])?;
        if fd < 0 {
            skip!(
                "userfaultfd with features {features:#x}: {}",
                Errno(-fd as i32)
            );
        }
        Ok(Uffd {
            fd: sys::steal_fd(peer.pid, fd as i32)?,
        })
    }

    /// One of its operations.
    pub fn ioctl(&self, cmd: u64, arg: &mut [u64]) -> sys::Sys<()> {
        sys::syscall(
            libc::SYS_ioctl,
            &[self.fd.as_raw_fd() as u64, cmd, arg.as_mut_ptr() as u64],
        )
        .map(drop)
    }

    /// Registers a range.
    pub fn register(&self, addr: u64, len: u64, mode: u64) -> Res {
        Ok(self.ioctl(UFFDIO_REGISTER, &mut [addr, len, mode, 0])?)
    }

    /// The next event within a few seconds: kind, and its two words.
    pub fn event(&self) -> Res<(u64, u64, u64)> {
        let mut msg = [0u64; 4];
        ensure!(
            crate::harness::wait_readable(&self.fd, std::time::Duration::from_secs(20)),
            "no userfaultfd event"
        );
        sys::syscall(
            libc::SYS_read,
            &[self.fd.as_raw_fd() as u64, msg.as_mut_ptr() as u64, 32],
        )?;
        Ok((msg[0] & 0xff, msg[1], msg[2]))
    }
}

/// Missing mode: an absent page is an event for the process that registered, and for it only.
fn userfaultfd_missing(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let u = Uffd::of(t.peer(0), 0)?;
    u.register(t.granule(0, 1), GRANULE, MODE_MISSING)?;
    t.expect_left(1)?;
    let page = GRANULE_PAGES + 33;
    t.model.punch(&t.fd, page..page + 2)?;
    // Present pages of the registered part do not raise events.
    t.verify(0, GRANULE_PAGES..page)?;
    t.expect_left(1)?;
    t.peer(0).start(
        |a, _| crate::peer::access(sys::load64(a[0])),
        &[t.at(0, page)],
        &[],
    )?;
    let (kind, flags, addr) = u.event()?;
    ensure_eq!(
        (kind, flags & (FLAG_WP | FLAG_MINOR), addr & !(PAGE - 1)),
        (EVENT_PAGEFAULT, 0, t.at(0, page)),
        "the event"
    );
    let g = t.model.next();
    let bytes = crate::oracle::page_bytes(ctx.seed, page, g);
    u.ioctl(
        UFFDIO_COPY,
        &mut [t.at(0, page), bytes.as_ptr() as u64, PAGE, 0, 0],
    )?;
    t.model.pages[page as usize] = g;
    let (r, d) = t.peer(0).finish()?;
    ensure_eq!(
        unpack(r, &d),
        Ok(crate::oracle::first_word(ctx.seed, page, g)),
        "the resolved load"
    );
    // A process that did not register gets its hole filled with zeros by the kernel.
    ensure_eq!(
        t.peer(1).load(t.at(1, page + 1))?,
        Ok(0),
        "another process's load from the hole"
    );
    t.coherent()
}

/// Unregistering and closing: the memory is ordinary again.
fn userfaultfd_missing_unregister(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let u = Uffd::of(t.peer(0), 0)?;
    u.register(t.at(0, 0), 3 * GRANULE, MODE_MISSING)?;
    t.expect_left(3)?;
    t.coherent()?;
    t.expect_left(3)?;
    u.ioctl(UFFDIO_UNREGISTER, &mut [t.at(0, 0), 3 * GRANULE])?;
    t.model.punch(&t.fd, 5..9)?;
    t.coherent()?;
    t.expect_all(3)?;
    map_anew(&t)?;
    t.touch_all()?;
    t.expect_all(3)
}

/// Minor mode: a page that is in the file but not in this process's table is an event.
fn userfaultfd_minor(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let u = Uffd::of(t.peer(0), FEATURE_MINOR_SHMEM)?;
    u.register(t.granule(0, 1), GRANULE, MODE_MINOR)?;
    t.expect_left(1)?;
    t.peer(0)
        .madvise(t.granule(0, 1), GRANULE, libc::MADV_DONTNEED)??;
    let page = GRANULE_PAGES + 200;
    // Another process's touch of the same page must not resolve it here.
    t.store(1, page)?;
    t.peer(0).start(
        |a, _| crate::peer::access(sys::load64(a[0])),
        &[t.at(0, page)],
        &[],
    )?;
    let (kind, flags, addr) = u.event()?;
    ensure_eq!(
        (kind, flags & FLAG_MINOR, addr & !(PAGE - 1)),
        (EVENT_PAGEFAULT, FLAG_MINOR, t.at(0, page)),
        "the event"
    );
    u.ioctl(UFFDIO_CONTINUE, &mut [t.at(0, page), PAGE, 0, 0])?;
    let (r, d) = t.peer(0).finish()?;
    let want = crate::oracle::first_word(ctx.seed, page, t.model.pages[page as usize]);
    ensure_eq!(unpack(r, &d), Ok(want), "the resolved load");
    t.expect_left(1)?;
    u.ioctl(UFFDIO_UNREGISTER, &mut [t.granule(0, 1), GRANULE])?;
    t.coherent()
}

/// Write-protect mode: stores of the process that registered are events, the others' are not.
fn userfaultfd_wp(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let u = Uffd::of(t.peer(0), FEATURE_WP_SHMEM)?;
    u.register(t.granule(0, 1), GRANULE, MODE_WP)?;
    t.expect_left(1)?;
    t.touch_all()?;
    let page = GRANULE_PAGES + 77;
    u.ioctl(UFFDIO_WRITEPROTECT, &mut [t.at(0, page), 2 * PAGE, 1])?;
    t.store(1, page)?;
    t.store(2, page + 1)?;
    t.store(0, page + 2)?;
    let g = t.model.next();
    t.peer(0).start(
        STORE_PAGE,
        &[t.at(0, page), ctx.seed, page, u64::from(g)],
        &[],
    )?;
    let (kind, flags, addr) = u.event()?;
    ensure_eq!(
        (kind, flags & FLAG_WP, addr & !(PAGE - 1)),
        (EVENT_PAGEFAULT, FLAG_WP, t.at(0, page)),
        "the event"
    );
    ensure!(
        !t.peer(0).answers_within(100),
        "a store to a write-protected page went through"
    );
    t.verify(1, page..page + 1)?;
    u.ioctl(UFFDIO_WRITEPROTECT, &mut [t.at(0, page), PAGE, 0])?;
    let (r, d) = t.peer(0).finish()?;
    unpack(r, &d)?;
    t.model.pages[page as usize] = g;
    t.verify_all()?;
    t.expect_left(1)
}

/// MADV_REMOVE in a registered range sends an event and waits until it is read.
fn userfaultfd_events(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let u = Uffd::of(t.peer(0), FEATURE_EVENT_REMOVE)?;
    u.register(t.granule(0, 1), GRANULE, MODE_MISSING)?;
    t.expect_left(1)?;
    let (lo, n) = (GRANULE_PAGES + 8, 4);
    let remove: Remote = |a, _| {
        (
            flat(sys::syscall(
                libc::SYS_madvise,
                &[a[0], a[1], libc::MADV_REMOVE as u64],
            )),
            vec![],
        )
    };
    t.peer(0).start(remove, &[t.at(0, lo), n * PAGE], &[])?;
    let (kind, start, end) = u.event()?;
    ensure_eq!(
        (kind, start, end),
        (EVENT_REMOVE, t.at(0, lo), t.at(0, lo + n)),
        "the event"
    );
    let (r, _) = t.peer(0).finish()?;
    ensure_eq!(r, 0, "MADV_REMOVE");
    t.model.pages[lo as usize..(lo + n) as usize].fill(0);
    u.ioctl(UFFDIO_UNREGISTER, &mut [t.granule(0, 1), GRANULE])?;
    t.verify_all()?;
    t.coherent()
}

/// Soft-dirty: after clear_refs, the bit is set for the pages this process wrote and no others.
fn soft_dirty(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let clear = |t: &Team| std::fs::write(format!("/proc/{}/clear_refs", t.peer(0).pid), "4");
    let dirty = |t: &Team| -> Res<Vec<u64>> {
        let seen = kernel::pagemap(t.peer(0).pid, t.at(0, 0), pages(3))?;
        Ok((0..pages(3))
            .filter(|p| seen[*p as usize] & pagemap::SOFT_DIRTY != 0)
            .collect())
    };
    if clear(&t).is_err() || !soft_dirty_works()? {
        skip!("no soft-dirty tracking in this kernel");
    }
    ensure_eq!(
        dirty(&t)?,
        vec![],
        "soft-dirty pages right after clear_refs"
    );
    t.expect(1, 3)?;
    t.store(1, 2)?;
    t.store(2, GRANULE_PAGES + 3)?;
    t.verify(0, 0..pages(3))?;
    t.expect(0, 0)?;
    ensure_eq!(
        dirty(&t)?,
        vec![],
        "soft-dirty pages after only others wrote"
    );
    for page in [4, GRANULE_PAGES + 5, pages(3) - 1] {
        t.store(0, page)?;
    }
    ensure_eq!(
        dirty(&t)?,
        vec![4, GRANULE_PAGES + 5, pages(3) - 1],
        "soft-dirty pages after three stores"
    );
    clear(&t)?;
    ensure_eq!(
        dirty(&t)?,
        vec![],
        "soft-dirty pages after the second clear_refs"
    );
    t.store(0, 4)?;
    ensure_eq!(dirty(&t)?, vec![4], "soft-dirty pages after one store");
    t.verify_all()
}

/// A tracked mapping and one that is not merge into one that is tracked: what the second shared
/// until then it leaves.
fn soft_dirty_and_untracked_become_one(ctx: &Ctx) -> Res {
    if !soft_dirty_works()? {
        skip!("no soft-dirty tracking in this kernel");
    }
    let mut t = scene(ctx)?;
    let p = Peer::spawn()?;
    let a = p.place(0, 3 * GRANULE)?;
    p.mmap(a, GRANULE, RW, SHARED | FIXED, t.raw(), 0)??;
    p.madvise(a, GRANULE, libc::MADV_DONTDUMP)??;
    std::fs::write(format!("/proc/{}/clear_refs", p.pid), "4")?;
    let rest = a + GRANULE;
    p.mmap(rest, 2 * GRANULE, RW, SHARED | FIXED, t.raw(), GRANULE)??;
    p.touch(a, pages(3))?;
    crate::team::expect_tables(ctx, &p, 2)?;
    p.madvise(a, GRANULE, libc::MADV_DODUMP)??;
    crate::team::expect_tables(ctx, &p, 0)?;
    t.coherent()?;
    t.model.verify_mapped(&p, a, 0..pages(3))?;
    crate::team::expect_tables(ctx, &p, 0)
}

/// Whether a store to a private page of our own sets the bit.
pub fn soft_dirty_works() -> Res<bool> {
    let a = sys::mmap(0, PAGE, RW, PRIVATE | ANON, -1, 0)?;
    sys::store64(a, 1)?;
    let me = std::process::id() as i32;
    std::fs::write("/proc/self/clear_refs", "4")?;
    let before = kernel::pagemap(me, a, 1)?[0] & pagemap::SOFT_DIRTY;
    sys::store64(a, 2)?;
    let after = kernel::pagemap(me, a, 1)?[0] & pagemap::SOFT_DIRTY;
    Ok(before == 0 && after != 0)
}

/// PAGEMAP_SCAN with write-protection (asynchronous userfaultfd): reports own stores only.
fn pagemap_scan_write_protect(ctx: &Ctx) -> Res {
    const PAGEMAP_SCAN: u64 = 0xc060_6610;
    const PAGE_IS_WRITTEN: u64 = 1 << 1;
    const WP_MATCHING: u64 = 1;
    let mut t = scene(ctx)?;
    let u = Uffd::of(
        t.peer(0),
        FEATURE_WP_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC,
    )?;
    u.register(t.at(0, 0), 3 * GRANULE, MODE_WP)?;
    t.expect_left(3)?;
    // The ioctl works on the caller's own memory only, so the peer does it.
    let scan: Remote = |a, _| {
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
        match sys::syscall(
            libc::SYS_ioctl,
            &[f.as_raw_fd() as u64, PAGEMAP_SCAN, arg.as_mut_ptr() as u64],
        ) {
            Ok(n) => (
                n as i64,
                regions[..n as usize]
                    .iter()
                    .flat_map(|r| [(r[0] - a[0]) / PAGE, (r[1] - a[0]) / PAGE])
                    .flat_map(u64::to_ne_bytes)
                    .collect(),
            ),
            Err(e) => (flat(Err(e)), vec![]),
        }
    };
    let scan = |t: &Team| -> Res<Vec<u64>> {
        let (n, d) = t.peer(0).call(scan, &[t.at(0, 0), 3 * GRANULE], &[])?;
        if n == -i64::from(libc::ENOTTY) {
            skip!("no PAGEMAP_SCAN in this kernel");
        }
        ensure!(n >= 0, "PAGEMAP_SCAN: {}", Errno(-n as i32));
        Ok(d.chunks_exact(8).map(crate::peer::word).collect())
    };
    scan(&t)?;
    ensure_eq!(
        scan(&t)?,
        vec![],
        "written pages right after write-protection"
    );
    t.store(1, 3)?;
    t.store(0, 9)?;
    t.store(0, GRANULE_PAGES)?;
    t.store(0, GRANULE_PAGES + 1)?;
    ensure_eq!(
        scan(&t)?,
        vec![9, 10, GRANULE_PAGES, GRANULE_PAGES + 2],
        "written ranges"
    );
    t.verify_all()?;
    t.coherent()
}

/// remap_file_pages, emulated by the kernel with an mmap inside the mapping.
fn remap_file_pages_call(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let at = t.at(0, GRANULE_PAGES + 4);
    match t
        .peer(0)
        .syscall(libc::SYS_remap_file_pages, &[at, PAGE, 0, 7, 0])?
    {
        Err(Errno(libc::ENOSYS)) => skip!("no remap_file_pages in this kernel"),
        r => r?,
    };
    t.expect_left(1)?;
    t.model.verify_mapped(t.peer(0), at, 7..8)?;
    others_go_on(
        &mut t,
        &[(0, GRANULE_PAGES + 4), (GRANULE_PAGES + 5, pages(3))],
    )?;
    t.model.verify_mapped(t.peer(0), at, 7..8)
}

/// Two threads of one process leave and come back to the same granules at once.
fn two_threads_leave_at_once(ctx: &Ctx) -> Res {
    let mut t = scene(ctx)?;
    let churn: Remote = |a, _| {
        let (base, rounds) = (a[0], a[1]);
        let work = move |cpu: usize| {
            sys::pin_to_cpu(cpu);
            for i in 0..rounds {
                let addr = base + GRANULE * (i % 3);
                let len = if i % 5 == 0 { GRANULE } else { 3 * PAGE };
                sys::syscall(libc::SYS_madvise, &[addr, len, libc::MADV_DONTNEED as u64]).ok();
                if sys::load64(addr + (i * 7 % 512) * PAGE).is_err() {
                    return 1;
                }
            }
            0
        };
        let other = std::thread::spawn(move || work(1));
        (work(0) + other.join().unwrap_or(9), vec![])
    };
    let rounds = if ctx.long { 20_000 } else { 500 };
    t.peer(0).start(churn, &[t.at(0, 0), rounds], &[])?;
    t.peer(1).start(churn, &[t.at(1, 0), rounds], &[])?;
    ensure_eq!(
        (t.peer(0).finish()?.0, t.peer(1).finish()?.0),
        (0, 0),
        "threads that saw a fault"
    );
    t.coherent()?;
    t.expect_all(3)
}
