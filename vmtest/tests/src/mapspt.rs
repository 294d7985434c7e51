//! Contract 1.3: the explicit form, MAP_SHARED_PT, and its whole error table.

use crate::harness::{Ctx, Res};
use crate::kernel;
use crate::machine::{Ext4, Mode, Setting};
use crate::oracle::{pages, Model};
use crate::peer::Peer;
use crate::sys::{
    self, Errno, ANON, FIXED, GRANULE, GRANULE_PAGES, MAP_SHARED_PT, NONE, NOREPLACE, PAGE,
    PRIVATE, RO, RW, SHARED,
};
use crate::team::{expect_tables, Member, Team};
use crate::{ensure, ensure_eq, group, skip};
use std::os::fd::{AsRawFd, OwnedFd};

group!("mapspt";
    maps_and_shares_without_opt_in,
    shares_with_transparent_mappings_or_not_but_is_right,
    unsupported_kernel_answers,
    off_mode_is_eopnotsupp,
    without_map_shared,
    hugetlb_is_refused,
    dax_is_refused,
    device_files_are_refused,
    secret_memory_is_refused,
    bad_length_and_offset,
    misaligned_length_and_offset,
    misaligned_fixed_address,
    kernel_chooses_congruent_address,
    shared_validate,
    anonymous_and_fork,
    fork_links_on_first_touch,
    read_only_descriptor,
    different_protections_do_not_mix,
    munmap_part,
    dontneed_drops_own_view_only,
    mremap_congruent,
    mremap_incongruent_is_einval,
    mremap_shrink_and_grow,
    mremap_of_some_pages_stays_congruent,
    mprotect_is_not_there_yet,
    mprotect_beyond_the_file_mode,
    smaps_shows_the_flag,
    survives_its_creator,
    beyond_the_end_of_file,
);

const SPT: u64 = SHARED | MAP_SHARED_PT;
const VALIDATE: u64 = libc::MAP_SHARED_VALIDATE as u64;

fn try_map(len: u64, flags: u64, fd: i32, off: u64) -> Result<u64, Errno> {
    sys::mmap(0, len, RW, flags, fd, off)
}

fn refused(what: &str, r: Result<u64, Errno>, errno: i32) -> Res {
    ensure_eq!(r, Err(Errno(errno)), "{what}");
    Ok(())
}

/// A team whose members map with MAP_SHARED_PT and have not asked by prctl.
fn team(ctx: &Ctx, n: usize, granules: u64) -> Res<Team> {
    ctx.need_feature()?;
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 0, granules)?;
    t.model.fill(&t.fd, 0..pages(granules))?;
    for _ in 0..n {
        let peer = Peer::spawn()?;
        let addr = peer.mmap(0, granules * GRANULE, RW, SPT, t.raw(), 0)??;
        t.members.push(Member { peer, addr });
    }
    t.touch_all()?;
    t.expect_all(granules)?;
    Ok(t)
}

/// 1.1 mode 1: MAP_SHARED_PT mappings share though nobody used prctl.
fn maps_and_shares_without_opt_in(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let _m = Mode::set(1)?;
    let mut t = team(ctx, 3, 2)?;
    t.coherent()?;
    let p = Peer::spawn()?;
    let a = p.map(&t.fd, 0, 2 * GRANULE, RW)?;
    p.touch(a, pages(2))?;
    expect_tables(ctx, &p, 0)?;
    t.model.verify_mapped(&p, a, 0..pages(2))
}

/// Explicit and transparent mappings of one file see one content.
fn shares_with_transparent_mappings_or_not_but_is_right(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 2)?;
    ctx.opt_in()?;
    t.join()?;
    t.touch_all()?;
    t.expect_all(2)?;
    t.coherent()
}

/// A kernel without the feature ignores the flag with MAP_SHARED and refuses it with VALIDATE.
fn unsupported_kernel_answers(ctx: &Ctx) -> Res {
    if ctx.sharing || kernel::mode().is_some() {
        skip!("is about kernels without the feature");
    }
    let fd = sys::memfd(GRANULE)?;
    try_map(GRANULE, SPT, fd.as_raw_fd(), 0)?;
    refused(
        "MAP_SHARED_VALIDATE | MAP_SHARED_PT",
        try_map(GRANULE, VALIDATE | MAP_SHARED_PT, fd.as_raw_fd(), 0),
        libc::EOPNOTSUPP,
    )
}

/// vm.ptshare = 0: EOPNOTSUPP, also for anonymous memory.
fn off_mode_is_eopnotsupp(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    ctx.opt_in()?;
    let _m = Mode::set(0)?;
    let fd = sys::memfd(GRANULE)?;
    refused(
        "MAP_SHARED",
        try_map(GRANULE, SPT, fd.as_raw_fd(), 0),
        libc::EOPNOTSUPP,
    )?;
    refused(
        "MAP_SHARED_VALIDATE",
        try_map(GRANULE, VALIDATE | MAP_SHARED_PT, fd.as_raw_fd(), 0),
        libc::EOPNOTSUPP,
    )?;
    refused(
        "MAP_ANONYMOUS",
        try_map(GRANULE, SPT | ANON, -1, 0),
        libc::EOPNOTSUPP,
    )
}

/// Row 1: without MAP_SHARED or MAP_SHARED_VALIDATE it is EINVAL.
fn without_map_shared(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let fd = sys::memfd(GRANULE)?;
    refused(
        "MAP_PRIVATE",
        try_map(GRANULE, PRIVATE | MAP_SHARED_PT, fd.as_raw_fd(), 0),
        libc::EINVAL,
    )?;
    refused(
        "MAP_PRIVATE|MAP_ANONYMOUS",
        try_map(GRANULE, PRIVATE | ANON | MAP_SHARED_PT, -1, 0),
        libc::EINVAL,
    )?;
    refused(
        "no type",
        try_map(GRANULE, MAP_SHARED_PT, fd.as_raw_fd(), 0),
        libc::EINVAL,
    )
}

/// Row 2: MAP_HUGETLB and hugetlb files.
fn hugetlb_is_refused(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let _pool = Setting::set("/proc/sys/vm/nr_hugepages", "2")?;
    refused(
        "MAP_HUGETLB",
        try_map(GRANULE, SPT | ANON | libc::MAP_HUGETLB as u64, -1, 0),
        libc::EINVAL,
    )?;
    let fd = sys::memfd_flags(GRANULE, libc::MFD_HUGETLB)?;
    refused(
        "a hugetlb file",
        try_map(GRANULE, SPT, fd.as_raw_fd(), 0),
        libc::EINVAL,
    )
}

/// Row 2: files without a page cache.
fn dax_is_refused(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let fs = Ext4::dax()?;
    let file = fs.file("f")?;
    file.set_len(GRANULE)?;
    let r = try_map(GRANULE, SPT, file.as_raw_fd(), 0);
    refused("a DAX file", r, libc::EINVAL)?;
    try_map(GRANULE, SHARED, file.as_raw_fd(), 0)?;
    Ok(())
}

/// Row 2: device files. /dev/zero is one, though its shared mappings are memory.
fn device_files_are_refused(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    for path in ["/dev/mem", "/dev/zero"] {
        let Ok(f) = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
        else {
            continue;
        };
        let r = sys::mmap(0, GRANULE, RO, SPT, f.as_raw_fd(), 0);
        refused(path, r, libc::EINVAL)?;
    }
    Ok(())
}

/// Row 2: memory that looks like a file but is in no page cache.
fn secret_memory_is_refused(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let fd = match sys::syscall(libc::SYS_memfd_secret, &[0]) {
        Err(Errno(libc::ENOSYS)) => skip!("no memfd_secret in this kernel"),
        fd => crate::harness::own(fd?),
    };
    sys::ftruncate(&fd, GRANULE)?;
    refused(
        "a file of memfd_secret",
        try_map(GRANULE, SPT, fd.as_raw_fd(), 0),
        libc::EINVAL,
    )?;
    try_map(GRANULE, SHARED, fd.as_raw_fd(), 0)?;
    Ok(())
}

/// Row 3: len = 0 and an offset that is not page aligned.
fn bad_length_and_offset(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let fd = sys::memfd(2 * GRANULE)?;
    refused("len 0", try_map(0, SPT, fd.as_raw_fd(), 0), libc::EINVAL)?;
    refused(
        "offset 1",
        try_map(GRANULE, SPT, fd.as_raw_fd(), 1),
        libc::EINVAL,
    )?;
    refused(
        "offset 2 MiB + 512",
        try_map(GRANULE, SPT, fd.as_raw_fd(), GRANULE + 512),
        libc::EINVAL,
    )?;
    // The same call without the mistake works.
    try_map(GRANULE, VALIDATE | MAP_SHARED_PT, fd.as_raw_fd(), GRANULE)?;
    Ok(())
}

/// Row 4: offset or length not a multiple of the granule.
fn misaligned_length_and_offset(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let fd = sys::memfd(4 * GRANULE)?;
    for (len, off) in [
        (PAGE, 0),
        (GRANULE - PAGE, 0),
        (GRANULE - 1, 0),
        (GRANULE + PAGE, 0),
        (GRANULE + 1, 0),
        (1, 0),
        (GRANULE, PAGE),
        (GRANULE, GRANULE - PAGE),
    ] {
        for flags in [SPT, VALIDATE | MAP_SHARED_PT] {
            refused(
                &format!("len {len:#x} off {off:#x}"),
                try_map(len, flags, fd.as_raw_fd(), off),
                libc::EINVAL,
            )?;
        }
    }
    refused(
        "anonymous",
        try_map(GRANULE + PAGE, SPT | ANON, -1, 0),
        libc::EINVAL,
    )?;
    try_map(GRANULE, SPT, fd.as_raw_fd(), 3 * GRANULE)?;
    Ok(())
}

/// Row 5: a fixed address that is not a multiple of the granule; what was there stays.
fn misaligned_fixed_address(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let fd = sys::memfd(GRANULE)?;
    let room = sys::mmap(0, 4 * GRANULE, RW, PRIVATE | ANON, -1, 0)?;
    let aligned = room.next_multiple_of(GRANULE);
    sys::store64(aligned + PAGE, 5)?;
    for kind in [FIXED, NOREPLACE] {
        let r = sys::mmap(aligned + PAGE, GRANULE, RW, SPT | kind, fd.as_raw_fd(), 0);
        refused("address off by a page", r, libc::EINVAL)?;
    }
    ensure_eq!(
        sys::load64(aligned + PAGE),
        Ok(5),
        "what was mapped at the refused address"
    );
    let taken = sys::mmap(aligned, GRANULE, RW, SPT | NOREPLACE, fd.as_raw_fd(), 0);
    refused("MAP_FIXED_NOREPLACE onto something", taken, libc::EEXIST)?;
    ensure_eq!(
        sys::mmap(aligned, GRANULE, RW, SPT | FIXED, fd.as_raw_fd(), 0),
        Ok(aligned),
        "an aligned fixed address"
    );
    Ok(())
}

/// Row 6: addr = 0 or a hint that cannot be taken.
fn kernel_chooses_congruent_address(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let fd = sys::memfd(4 * GRANULE)?;
    for _ in 0..4 {
        sys::mmap(0, 3 * PAGE, RW, PRIVATE | ANON, -1, 0)?;
        let a = try_map(GRANULE, SPT, fd.as_raw_fd(), 0)?;
        ensure_eq!(a % GRANULE, 0, "chosen address {a:#x}");
    }
    let room = sys::mmap(0, 8 * GRANULE, NONE, PRIVATE | ANON, -1, 0)?;
    let aligned = room.next_multiple_of(GRANULE);
    for hint in [aligned, aligned + PAGE, aligned + 5 * PAGE, 1 << 60] {
        let a = sys::mmap(hint, GRANULE, RW, SPT, fd.as_raw_fd(), GRANULE)?;
        ensure_eq!(a % GRANULE, 0, "address {a:#x} for hint {hint:#x}");
        ensure!(
            !(room..room + 8 * GRANULE).contains(&a),
            "{a:#x} is inside what was mapped"
        );
    }
    munmap(room, 8 * GRANULE)?;
    let a = sys::mmap(aligned + GRANULE, GRANULE, RW, SPT, fd.as_raw_fd(), 0)?;
    ensure_eq!(a, aligned + GRANULE, "a free, aligned hint");
    Ok(())
}

fn munmap(addr: u64, len: u64) -> Res {
    Ok(sys::munmap(addr, len)?)
}

/// MAP_SHARED_VALIDATE is accepted, which is how programs detect support, and shares.
fn shared_validate(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 2)?;
    let peer = Peer::spawn()?;
    let addr = peer.mmap(0, 2 * GRANULE, RW, VALIDATE | MAP_SHARED_PT, t.raw(), 0)??;
    t.members.push(Member { peer, addr });
    t.touch_all()?;
    t.expect_all(2)?;
    t.coherent()?;
    let r = sys::mmap(
        0,
        GRANULE,
        RW,
        VALIDATE | MAP_SHARED_PT | 0x40_0000,
        t.raw(),
        0,
    );
    refused(
        "an unknown flag with MAP_SHARED_VALIDATE",
        r,
        libc::EOPNOTSUPP,
    )
}

/// With MAP_ANONYMOUS: shared with the children forked later, and their children.
fn anonymous_and_fork(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let parent = Peer::spawn()?;
    let addr = parent.mmap(0, 3 * GRANULE, RW, SPT | ANON, -1, 0)??;
    let mut model = Model::new(ctx.seed, pages(3));
    for page in [0, 600, 1200] {
        model.store(&parent, addr + page * PAGE, page)?;
    }
    let child = parent.fork()?;
    let grandchild = child.fork()?;
    let all = [&parent, &child, &grandchild];
    for p in all {
        p.touch(addr, pages(3))?;
    }
    for p in all {
        expect_tables(ctx, p, 3)?;
    }
    for (i, p) in all.iter().enumerate() {
        model.store(p, addr + (700 + i as u64) * PAGE, 700 + i as u64)?;
    }
    for p in all {
        model.verify_mapped(p, addr, 0..pages(3))?;
    }
    Ok(())
}

/// Row "fork": the child maps the region too, its tables linked on first touch.
fn fork_links_on_first_touch(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 2)?;
    let child = t.peer(0).fork()?;
    expect_tables(ctx, &child, 0)?;
    child.touch(t.at(0, 0), pages(2))?;
    expect_tables(ctx, &child, 2)?;
    t.model.store(&child, t.at(0, 9), 9)?;
    t.coherent()?;
    t.model.verify_mapped(&child, t.at(0, 0), 0..pages(2))
}

/// A descriptor opened for reading maps read-only, and not writable.
fn read_only_descriptor(ctx: &Ctx) -> Res {
    let t = team(ctx, 2, 2)?;
    let f: OwnedFd = std::fs::File::open(format!("/proc/self/fd/{}", t.raw()))?.into();
    refused(
        "writable from a read-only descriptor",
        sys::mmap(0, GRANULE, RW, SPT, f.as_raw_fd(), 0),
        libc::EACCES,
    )?;
    let p = Peer::spawn()?;
    let a = p.mmap(0, 2 * GRANULE, RO, SPT, f.as_raw_fd(), 0)??;
    t.model.verify_mapped(&p, a, 0..pages(2))
}

/// Processes that map with other protection share among themselves; readers never write.
fn different_protections_do_not_mix(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 2)?;
    let readers = [Peer::spawn()?, Peer::spawn()?];
    let mut at = vec![];
    for p in &readers {
        let a = p.mmap(0, 2 * GRANULE, RO, SPT, t.raw(), 0)??;
        p.touch(a, pages(2))?;
        at.push(a);
    }
    for (p, a) in readers.iter().zip(&at) {
        expect_tables(ctx, p, 2)?;
        for page in [0, 3, GRANULE_PAGES] {
            t.store(0, page)?;
            let got = p.store(a + page * PAGE, 0xbad)?;
            ensure!(
                matches!(got, Err(f) if f.signal == libc::SIGSEGV && f.code == sys::SEGV_ACCERR),
                "a reader's store: {got:?}"
            );
        }
    }
    t.coherent()?;
    for (p, a) in readers.iter().zip(&at) {
        t.model.verify_mapped(p, *a, 0..pages(2))?;
    }
    Ok(())
}

/// Row "munmap of part": page granular, the others keep theirs.
fn munmap_part(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 3, 3)?;
    let (lo, n) = (GRANULE_PAGES + 20, 3);
    t.peer(0).munmap(t.at(0, lo), n * PAGE)?;
    t.expect_left(1)?;
    for page in [lo, lo + n - 1] {
        let got = t.peer(0).load(t.at(0, page))?;
        ensure!(
            matches!(got, Err(f) if f.code == sys::SEGV_MAPERR),
            "load from the unmapped page: {got:?}"
        );
    }
    for page in [lo - 1, lo, lo + n, 0, pages(2)] {
        t.store(1, page)?;
    }
    t.verify(0, 0..lo)?;
    t.verify(0, lo + n..pages(3))?;
    t.verify(1, 0..pages(3))?;
    t.verify(2, 0..pages(3))?;
    t.store(0, lo - 1)?;
    t.store(0, lo + n)?;
    t.verify(2, 0..pages(3))
}

/// Row MADV_DONTNEED: drops that process's own view; contents and the others are unaffected.
fn dontneed_drops_own_view_only(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 3, 2)?;
    let present = |t: &Team, i: usize| -> Res<usize> {
        let seen = kernel::pagemap(t.peer(i).pid, t.granule(i, 1), GRANULE_PAGES)?;
        Ok(seen
            .iter()
            .filter(|e| *e & kernel::pagemap::PRESENT != 0)
            .count())
    };
    t.peer(0)
        .madvise(t.granule(0, 1), GRANULE, libc::MADV_DONTNEED)??;
    t.expect_left(1)?;
    ensure_eq!(
        (present(&t, 0)?, present(&t, 1)?, present(&t, 2)?),
        (0, 512, 512),
        "present pages of the three"
    );
    t.verify_all()?;
    t.coherent()?;
    t.expect_all(2)
}

const FIXED_MOVE: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;

/// Row mremap: to a congruent address it moves and goes on sharing.
fn mremap_congruent(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 2)?;
    let to = t.peer(0).place(0, 2 * GRANULE)?;
    let r = t.peer(0).syscall(
        libc::SYS_mremap,
        &[t.at(0, 0), 2 * GRANULE, 2 * GRANULE, FIXED_MOVE, to],
    )?;
    ensure_eq!(r, Ok(to), "mremap");
    let got = t.peer(0).load(t.at(0, 0))?;
    ensure!(
        matches!(got, Err(f) if f.code == sys::SEGV_MAPERR),
        "load from the old place: {got:?}"
    );
    t.members[0].addr = to;
    t.coherent()?;
    t.expect_all(2)
}

/// Row mremap: to an address that is not congruent it is EINVAL and nothing moves.
fn mremap_incongruent_is_einval(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 2)?;
    let to = t.peer(0).place(0, 3 * GRANULE)?;
    for off in [PAGE, GRANULE / 2, GRANULE - PAGE] {
        let r = t.peer(0).syscall(
            libc::SYS_mremap,
            &[t.at(0, 0), 2 * GRANULE, 2 * GRANULE, FIXED_MOVE, to + off],
        )?;
        refused("mremap off the granule", r, libc::EINVAL)?;
        t.coherent()?;
        t.expect_all(2)?;
    }
    Ok(())
}

/// mremap without a fixed address keeps congruence by itself.
fn mremap_shrink_and_grow(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 3)?;
    let a = t.at(0, 0);
    let r = t
        .peer(0)
        .syscall(libc::SYS_mremap, &[a, 3 * GRANULE, GRANULE, 0])?;
    ensure_eq!(r, Ok(a), "mremap that shrinks");
    t.expect_left(2)?;
    // Something in the way, so that growing must move.
    t.peer(0)
        .mmap(a + GRANULE, PAGE, RW, PRIVATE | ANON | FIXED, -1, 0)??;
    // And where any mapping of that size would go, a page, so that no lucky address is left.
    loop {
        let any = t.peer(0).mmap(0, 3 * GRANULE, RW, SHARED, t.raw(), 0)??;
        t.peer(0).munmap(any, 3 * GRANULE)?;
        if any % GRANULE != 0 {
            break;
        }
        t.peer(0).mmap(
            any + 3 * GRANULE - PAGE,
            PAGE,
            RW,
            PRIVATE | ANON | FIXED,
            -1,
            0,
        )??;
    }
    let b = t.peer(0).syscall(
        libc::SYS_mremap,
        &[a, GRANULE, 3 * GRANULE, libc::MREMAP_MAYMOVE as u64],
    )??;
    ensure_eq!(b % GRANULE, 0, "address {b:#x} after mremap that grows");
    t.members[0].addr = b;
    t.coherent()?;
    t.expect_all(3)
}

/// A few pages that are moved by themselves keep their place in a granule, however few they are: once they
/// have grown over a whole one they share it.
fn mremap_of_some_pages_stays_congruent(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 4)?;
    let part = GRANULE_PAGES + 3;
    let moved = |t: &Team, from: u64, old: u64, new: u64| -> Res<u64> {
        // Something of odd size first, so that a lucky address is not enough.
        t.peer(0).mmap(0, 5 * PAGE, RW, PRIVATE | ANON, -1, 0)??;
        // Something in the way, so that growing must move.
        t.peer(0)
            .mmap(from + old * PAGE, PAGE, RW, PRIVATE | ANON | FIXED, -1, 0)??;
        let a = [from, old * PAGE, new * PAGE, libc::MREMAP_MAYMOVE as u64];
        let to = t.peer(0).syscall(libc::SYS_mremap, &a)??;
        ensure!(to != from, "it did not move");
        ensure_eq!(
            to % GRANULE,
            3 * PAGE,
            "address {to:#x} of {new} pages that were at {from:#x}, modulo the granule"
        );
        t.model.verify_mapped(t.peer(0), to, part..part + new)?;
        Ok(to)
    };
    // Page 3 of granule 1 on, 4 pages, then 8, then all that follow.
    let mut at = t.at(0, part);
    for (old, new) in [(4, 8), (8, 300), (300, pages(4) - part)] {
        at = moved(&t, at, old, new)?;
    }
    t.peer(0).touch(at, pages(4) - part)?;
    t.verify(0, pages(2)..pages(4))?;
    // All but granule 1 of the old mapping, and two of the new one.
    t.expect(0, 3 + 2)?;
    t.expect(1, 4)?;
    for page in [part, part + 4, pages(2), pages(3) + 9] {
        let there = at + (page - part) * PAGE;
        t.model.store(&t.members[0].peer, there, page)?;
        t.verify(1, 0..pages(4))?;
        t.store(1, page + 1)?;
        t.model.verify_mapped(t.peer(0), at, part..pages(4))?;
    }
    Ok(())
}

/// Collective protection is not there yet: EOPNOTSUPP, and nothing changes anywhere.
fn mprotect_is_not_there_yet(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 2)?;
    for (page, n) in [
        (0, pages(2)),
        (GRANULE_PAGES, GRANULE_PAGES),
        (7, 1),
        (GRANULE_PAGES - 1, 2),
    ] {
        for prot in [RO, NONE] {
            let r = t.peer(0).mprotect(t.at(0, page), n * PAGE, prot)?;
            refused(
                &format!("mprotect of {n} pages at {page}"),
                r,
                libc::EOPNOTSUPP,
            )?;
        }
        t.coherent()?;
        t.expect_all(2)?;
    }
    Ok(())
}

/// mprotect to what the file's open mode never allowed fails and changes nothing.
fn mprotect_beyond_the_file_mode(ctx: &Ctx) -> Res {
    let t = team(ctx, 2, 2)?;
    let f: OwnedFd = std::fs::File::open(format!("/proc/self/fd/{}", t.raw()))?.into();
    let p = Peer::spawn()?;
    let a = p.mmap(0, 2 * GRANULE, RO, SPT, f.as_raw_fd(), 0)??;
    p.touch(a, pages(2))?;
    let r = p.mprotect(a, 2 * GRANULE, RW)?;
    // EACCES once collective protection is there.
    ensure!(
        matches!(r, Err(Errno(libc::EOPNOTSUPP | libc::EACCES))),
        "mprotect beyond the open mode: {r:?}"
    );
    let got = p.store(a, 0xbad)?;
    ensure!(
        matches!(got, Err(f) if f.code == sys::SEGV_ACCERR),
        "store after it: {got:?}"
    );
    t.verify_all()
}

/// 1.4: the VmFlags mnemonic `pt` marks these mappings and no others.
fn smaps_shows_the_flag(ctx: &Ctx) -> Res {
    let t = team(ctx, 2, 2)?;
    ctx.opt_in()?;
    let other = Peer::spawn()?;
    let a = other.map(&t.fd, 0, 2 * GRANULE, RW)?;
    other.touch(a, pages(2))?;
    let flags = |pid: i32, addr: u64| -> Res<bool> {
        let text = kernel::smaps_of(pid, addr)?;
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("VmFlags:"))
            .unwrap_or("");
        Ok(line.split_whitespace().any(|w| w == "pt"))
    };
    ensure!(
        flags(t.peer(0).pid, t.at(0, 0))?,
        "no `pt` in VmFlags of a MAP_SHARED_PT mapping"
    );
    ensure!(
        !flags(other.pid, a)?,
        "`pt` in VmFlags of a mapping without MAP_SHARED_PT"
    );
    Ok(())
}

/// The file's tables and contents do not depend on the process that came first.
fn survives_its_creator(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 3, 2)?;
    t.members.remove(0).peer.exit()?;
    t.coherent()?;
    t.expect_all(2)?;
    let peer = Peer::spawn()?;
    let addr = peer.mmap(0, 2 * GRANULE, RW, SPT, t.raw(), 0)??;
    t.members.push(Member { peer, addr });
    t.coherent()?;
    t.expect_all(2)
}

/// A mapping may reach beyond the file's end: SIGBUS there, until the file grows.
fn beyond_the_end_of_file(ctx: &Ctx) -> Res {
    let mut t = team(ctx, 2, 2)?;
    let p = Peer::spawn()?;
    let a = p.mmap(0, 4 * GRANULE, RW, SPT, t.raw(), 0)??;
    let got = p.load(a + 2 * GRANULE)?;
    ensure!(
        matches!(got, Err(f) if f.signal == libc::SIGBUS),
        "load beyond the end: {got:?}"
    );
    t.model.truncate(&t.fd, pages(3))?;
    t.model.store(&p, a + 2 * GRANULE, pages(2))?;
    t.model.verify_mapped(&p, a, 0..pages(3))?;
    t.model.verify_file(&t.fd)?;
    t.granules = 2;
    for i in 0..2 {
        t.verify(i, 0..pages(2))?;
    }
    Ok(())
}
