//! Link-around: attaching to a populated range costs few faults.

use crate::harness::{Ctx, Res};
use crate::machine::Setting;
use crate::oracle::pages;
use crate::peer::{access, unpack, Peer, Remote};
use crate::sys::{self, GRANULE, PAGE, RO, RW, SHARED};
use crate::team::expect_tables;
use crate::{ensure, ensure_eq, group};
use std::os::fd::{AsRawFd, OwnedFd};

group!("faults";
    reader_of_a_populated_range(180),
    writer_to_a_populated_range(180),
    reader_of_a_populated_range_read_only(180),
    backwards_and_at_random(120),
    attach_does_not_reach_beyond_the_mapping,
    populate_flag,
);

/// A file of which each page holds its number.
struct Populated {
    fd: OwnedFd,
    /// The process that has it all mapped and written
    first: Peer,
    /// That no faults come of looking where memory is used
    _quiet: Option<Setting>,
}

/// One of `granules` granules.
fn populated(ctx: &Ctx, granules: u64, prot: u64) -> Res<Populated> {
    ctx.opt_in()?;
    let quiet = Setting::set("/proc/sys/kernel/numa_balancing", "0").ok();
    let fd = sys::memfd(granules * GRANULE)?;
    let first = Peer::spawn()?;
    let w = first.map(&fd, 0, granules * GRANULE, RW)?;
    let write: Remote = |a, _| {
        access((0..a[1]).try_fold(0, |_, n| sys::store64(a[0] + n * PAGE, n + 1).map(|()| 0)))
    };
    let (r, d) = first.call(write, &[w, pages(granules)], &[])?;
    unpack(r, &d)?;
    if prot != RW {
        let a = first.map(&fd, 0, granules * GRANULE, prot)?;
        first.touch(a, pages(granules))?;
    }
    Ok(Populated {
        fd,
        first,
        _quiet: quiet,
    })
}

/// Loads the number in each page, and compares it.
const READ_NUMBERS: Remote = |a, _| {
    let n = a[1];
    for i in 0..n {
        // Forwards, backwards, or jumping about.
        let page = match a[2] {
            0 => i,
            1 => n - 1 - i,
            _ => (i * 7919 + 13) % n,
        };
        match sys::load64(a[0] + page * PAGE) {
            Ok(v) if v == page + 1 => {}
            Ok(v) => return (-1, v.to_ne_bytes().to_vec()),
            Err(f) => return access(Err(f)),
        }
    }
    (0, vec![])
};

fn attach(ctx: &Ctx, granules: u64, prot: u64, order: u64, limit: u64) -> Res {
    let file = populated(ctx, granules, prot)?;
    let p = Peer::spawn()?;
    let a = p.map(&file.fd, 0, granules * GRANULE, prot)?;
    // Once over everything the measuring itself needs.
    p.faults()?;
    let before = p.faults()?.0;
    let (r, d) = p.call(READ_NUMBERS, &[a, pages(granules), order], &[])?;
    ensure!(r != -1, "a page held {}", crate::peer::word(&d));
    unpack(r, &d)?;
    let faults = p.faults()?.0 - before;
    if ctx.sharing {
        ensure!(
            faults <= limit,
            "{faults} faults for {granules} granules, more than {limit}"
        );
        expect_tables(ctx, &p, granules)?;
    } else {
        ensure!(
            faults >= granules,
            "{faults} faults only: the measure is wrong"
        );
    }
    Ok(())
}

fn size(ctx: &Ctx) -> (u64, u64) {
    if ctx.long {
        (512, 40)
    } else {
        (64, 10)
    }
}

/// 128 MiB in at most 10 faults; with --long 1 GiB in at most 40.
fn reader_of_a_populated_range(ctx: &Ctx) -> Res {
    let (granules, limit) = size(ctx);
    attach(ctx, granules, RW, 0, limit)
}

/// The same for a mapping that only reads.
fn reader_of_a_populated_range_read_only(ctx: &Ctx) -> Res {
    let (granules, limit) = size(ctx);
    attach(ctx, granules, RO, 0, limit)
}

/// And for a process that only writes: what the first has written needs no further fault.
fn writer_to_a_populated_range(ctx: &Ctx) -> Res {
    let (granules, limit) = size(ctx);
    let file = populated(ctx, granules, RW)?;
    let p = Peer::spawn()?;
    let a = p.map(&file.fd, 0, granules * GRANULE, RW)?;
    p.faults()?;
    let before = p.faults()?.0;
    let write: Remote = |a, _| {
        access((0..a[1]).try_fold(0, |_, n| sys::store64(a[0] + n * PAGE + 8, n).map(|()| 0)))
    };
    let (r, d) = p.call(write, &[a, pages(granules)], &[])?;
    unpack(r, &d)?;
    let faults = p.faults()?.0 - before;
    ensure!(
        !ctx.sharing || faults <= limit,
        "{faults} faults for {granules} granules, more than {limit}"
    );
    let mut word = [0; 8];
    for page in [0, 1, pages(granules) - 1] {
        sys::pread(&file.fd, &mut word, page * PAGE + 8)?;
        ensure_eq!(
            u64::from_ne_bytes(word),
            page,
            "what the second process wrote"
        );
    }
    Ok(())
}

/// The order of access does not matter much.
fn backwards_and_at_random(ctx: &Ctx) -> Res {
    attach(ctx, 32, RW, 1, 16)?;
    attach(ctx, 32, RW, 2, 16)
}

/// Linking neighbours stops at the mapping's ends, its unaligned parts and its holes.
fn attach_does_not_reach_beyond_the_mapping(ctx: &Ctx) -> Res {
    let file = populated(ctx, 16, RW)?;
    let p = Peer::spawn()?;
    // Granules 4..12 with ragged ends, and granule 8 taken out.
    let (lo, hi) = (4 * 512 - 3, 12 * 512 + 3);
    let a = p.map(&file.fd, lo * PAGE, (hi - lo) * PAGE, RW)?;
    let at = |page: u64| a + (page - lo) * PAGE;
    p.munmap(at(8 * 512), GRANULE)?;
    p.touch(at(4 * 512), 1)?;
    let hole = p.load(at(8 * 512))?;
    ensure!(
        matches!(hole, Err(f) if f.code == sys::SEGV_MAPERR),
        "load from the hole: {hole:?}"
    );
    // Whatever lies there, it is not the file's next page.
    let beyond = p.load(at(hi))?;
    ensure!(beyond != Ok(hi + 1), "load beyond the mapping: {beyond:?}");
    for page in (lo..8 * 512).chain(9 * 512..hi) {
        if page % 64 < 4 || page == lo || page == hi - 1 {
            ensure_eq!(p.load(at(page))?, Ok(page + 1), "page {page}");
        }
    }
    p.touch(at(lo), 8 * 512 - lo)?;
    p.touch(at(9 * 512), hi - 9 * 512)?;
    expect_tables(ctx, &p, 7)
}

/// MAP_POPULATE of a populated range links it.
fn populate_flag(ctx: &Ctx) -> Res {
    let file = populated(ctx, 8, RW)?;
    let p = Peer::spawn()?;
    let a = p.mmap(
        0,
        8 * GRANULE,
        RW,
        SHARED | libc::MAP_POPULATE as u64,
        file.fd.as_raw_fd(),
        0,
    )??;
    expect_tables(ctx, &p, 8)?;
    expect_tables(ctx, &file.first, 8)?;
    p.faults()?;
    let before = p.faults()?.0;
    let (r, d) = p.call(READ_NUMBERS, &[a, pages(8), 0], &[])?;
    ensure_eq!(r, 0, "reading: {:?}", unpack(r, &d));
    let faults = p.faults()?.0 - before;
    ensure!(faults <= 2, "{faults} faults after MAP_POPULATE");
    Ok(())
}
