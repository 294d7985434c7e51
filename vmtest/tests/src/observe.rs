//! Contract 1.4: what can be observed.

use crate::harness::{Ctx, Res};
use crate::kernel::{self, pagemap};
use crate::oracle::pages;
use crate::peer::Peer;
use crate::sys::{self, GRANULE, PAGE, RO, RW};
use crate::team::Team;
use crate::{ensure, ensure_eq, group};
use std::fs;

group!("observe";
    granule_file,
    vmstat_names,
    events_only_grow,
    page_tables_are_counted_once(120),
    vmpte_and_ptshared,
    ptshared_line_is_there_for_everybody,
    smaps_rss_is_full_and_pss_divided,
    smaps_pss_over_protections_and_private_tables,
    smaps_private_when_alone,
    numa_maps,
    pagemap_present_and_exclusive,
    mincore_sees_the_file,
    read_only_walks_do_not_unshare,
);

/// `/sys/kernel/mm/ptshare/granule`: decimal bytes.
fn granule_file(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let text = fs::read_to_string("/sys/kernel/mm/ptshare/granule")?;
    ensure_eq!(text.as_str(), "2097152\n", "the granule file");
    let readonly = fs::write("/sys/kernel/mm/ptshare/granule", "4096").is_err();
    ensure!(readonly, "the granule file can be written");
    Ok(())
}

/// The five lines of /proc/vmstat, each once.
fn vmstat_names(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let text = fs::read_to_string("/proc/vmstat")?;
    for name in [
        "ptshare_tables",
        "ptshare_links",
        "ptshare_link",
        "ptshare_unlink",
        "ptshare_flush",
    ] {
        let n = text
            .lines()
            .filter(|l| l.split(' ').next() == Some(name))
            .count();
        ensure_eq!(n, 1, "lines {name} in /proc/vmstat");
        ensure!(kernel::vmstat(name).is_some(), "{name} is not a number");
    }
    Ok(())
}

/// Events grow with links, unlinks and shared changes, and never shrink.
fn events_only_grow(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let read = || {
        ["ptshare_link", "ptshare_unlink", "ptshare_flush"].map(|n| kernel::vmstat(n).unwrap_or(0))
    };
    let start = read();
    let mut t = Team::new(ctx, 3, 2)?;
    let linked = read();
    ensure!(
        linked[0] >= start[0] + 6,
        "ptshare_link: {} then {}",
        start[0],
        linked[0]
    );
    t.model.punch(&t.fd, 0..100)?;
    let flushed = read();
    ensure!(
        flushed[2] > linked[2],
        "ptshare_flush did not grow with a hole in a shared table: {}",
        flushed[2]
    );
    t.peer(0).munmap(t.at(0, 0), 2 * GRANULE)?;
    let left = read();
    ensure!(
        left[1] >= flushed[1] + 2,
        "ptshare_unlink: {} then {}",
        flushed[1],
        left[1]
    );
    ensure!(
        (0..3).all(|i| left[i] >= linked[i] && linked[i] >= start[i]),
        "an event counter shrank"
    );
    Ok(())
}

/// PageTables in /proc/meminfo counts each shared table once: 50 processes over 64 MiB.
fn page_tables_are_counted_once(ctx: &Ctx) -> Res {
    const PROCESSES: u64 = 50;
    const GRANULES: u64 = 32;
    ctx.opt_in()?;
    let fd = sys::memfd(GRANULES * GRANULE)?;
    for g in 0..GRANULES {
        sys::pwrite(&fd, &[1; 8], g * GRANULE)?;
    }
    let peers = (0..PROCESSES)
        .map(|_| Peer::spawn())
        .collect::<Res<Vec<_>>>()?;
    // Let them all have run, so that their own tables are there.
    for p in &peers {
        p.faults()?;
    }
    let before = kernel::page_tables_kb()?;
    for p in &peers {
        let a = p.map(&fd, 0, GRANULES * GRANULE, RW)?;
        for g in 0..GRANULES {
            p.touch(a + g * GRANULE, 1)?;
        }
        if ctx.sharing {
            crate::team::expect_tables(ctx, p, GRANULES)?;
        }
    }
    let grown = kernel::page_tables_kb()?.saturating_sub(before);
    if ctx.sharing {
        // The tables once, two upper-level tables each, and some slack for whoever else runs.
        let limit = GRANULES * 4 + PROCESSES * 8 + 400;
        ensure!(
            grown <= limit,
            "PageTables grew by {grown} kB, more than {limit}"
        );
    } else {
        ensure!(
            grown >= PROCESSES * GRANULES * 4 * 9 / 10,
            "PageTables grew by {grown} kB only: the measure is wrong"
        );
    }
    Ok(())
}

/// VmPTE counts what a process owns, PtShared what it links.
fn vmpte_and_ptshared(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    ctx.opt_in()?;
    let t = Team::new(ctx, 2, 16)?;
    let p = Peer::spawn()?;
    p.faults()?;
    let status = format!("/proc/{}/status", p.pid);
    let vmpte = || kernel::kb_field(&status, "VmPTE").unwrap_or(0);
    let before = vmpte();
    let a = p.map(&t.fd, 0, 16 * GRANULE, RW)?;
    p.touch(a, pages(16))?;
    ensure_eq!(
        kernel::kb_field(&status, "PtShared"),
        Some(64),
        "PtShared in kB"
    );
    let grown = vmpte().saturating_sub(before);
    ensure!(
        grown <= 24,
        "VmPTE grew by {grown} kB for 64 kB of linked tables"
    );
    p.munmap(a, 16 * GRANULE)?;
    ensure_eq!(
        kernel::kb_field(&status, "PtShared"),
        Some(0),
        "PtShared after munmap"
    );
    Ok(())
}

/// Processes that share nothing have the line too, and it says 0.
fn ptshared_line_is_there_for_everybody(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let text = fs::read_to_string("/proc/self/status")?;
    let lines: Vec<_> = text
        .lines()
        .filter(|l| l.starts_with("PtShared:"))
        .collect();
    ensure_eq!(lines.len(), 1, "PtShared lines of this process");
    ensure!(lines[0].ends_with(" kB"), "{:?}", lines[0]);
    ensure_eq!(
        kernel::tables_of(std::process::id() as i32)?,
        0,
        "tables of a process that shares nothing"
    );
    Ok(())
}

/// Fields of smaps of the mapping that contains an address, in kB.
fn smaps(pid: i32, addr: u64, names: &[&str]) -> Res<Vec<u64>> {
    let text = kernel::smaps_of(pid, addr)?;
    Ok(names
        .iter()
        .map(|n| kernel::kb_in(&text, n).unwrap_or(u64::MAX))
        .collect())
}

fn near(got: u64, want: u64) -> bool {
    got.abs_diff(want) <= want / 100 + 2
}

/// Rss is all that is mapped, Pss divides by the sharers, and all of it is "shared".
fn smaps_rss_is_full_and_pss_divided(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 4, 2)?;
    for n in [4, 3, 2] {
        t.members.truncate(n);
        t.expect_all(2)?;
        for i in 0..n {
            let f = smaps(
                t.peer(i).pid,
                t.at(i, 0),
                &[
                    "Rss",
                    "Pss",
                    "Shared_Clean",
                    "Shared_Dirty",
                    "Private_Clean",
                    "Private_Dirty",
                ],
            )?;
            ensure_eq!(f[0], 4096, "Rss of member {i} of {n}");
            ensure!(
                near(f[1], 4096 / n as u64),
                "Pss of member {i} of {n}: {} kB",
                f[1]
            );
            ensure_eq!(f[2] + f[3], 4096, "shared of member {i} of {n}");
            ensure_eq!(f[4] + f[5], 0, "private of member {i} of {n}");
        }
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", t.peer(0).pid))?;
        let rss = kernel::kb_in(&rollup, "Rss").unwrap_or(0);
        ensure!(rss >= 4096, "Rss in smaps_rollup: {rss} kB");
    }
    Ok(())
}

/// The sharers of several tables, and those who map it without sharing, all count.
fn smaps_pss_over_protections_and_private_tables(ctx: &Ctx) -> Res {
    let t = Team::new(ctx, 2, 2)?;
    let readers = [Peer::spawn()?, Peer::spawn()?];
    let mut at = vec![];
    for r in &readers {
        let a = r.map(&t.fd, 0, 2 * GRANULE, RO)?;
        r.touch(a, pages(2))?;
        at.push(a);
    }
    let odd = Peer::spawn()?;
    let a = odd.place(0, 3 * GRANULE)? + PAGE;
    odd.mmap(a, 2 * GRANULE, RW, sys::SHARED | sys::FIXED, t.raw(), 0)??;
    odd.touch(a, pages(2))?;
    crate::team::expect_tables(ctx, &odd, 0)?;
    let all = [
        (t.peer(0), t.at(0, 0)),
        (t.peer(1), t.at(1, 0)),
        (&readers[0], at[0]),
        (&readers[1], at[1]),
        (&odd, a),
    ];
    for (n, (p, a)) in all.iter().enumerate() {
        let f = smaps(p.pid, *a, &["Rss", "Pss"])?;
        ensure_eq!(f[0], 4096, "Rss of process {n}");
        ensure!(
            near(f[1], 4096 / 5),
            "Pss of process {n} of five: {} kB",
            f[1]
        );
    }
    Ok(())
}

/// The last process left has it all for itself.
fn smaps_private_when_alone(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    t.members.truncate(1);
    let f = smaps(
        t.peer(0).pid,
        t.at(0, 0),
        &["Rss", "Pss", "Shared_Clean", "Shared_Dirty"],
    )?;
    ensure_eq!(
        f,
        vec![4096, 4096, 0, 0],
        "Rss, Pss and shared of the only process"
    );
    Ok(())
}

/// numa_maps counts the pages of a shared mapping.
fn numa_maps(ctx: &Ctx) -> Res {
    let t = Team::new(ctx, 3, 2)?;
    let Ok(text) = fs::read_to_string(format!("/proc/{}/numa_maps", t.peer(0).pid)) else {
        crate::skip!("no numa_maps in this kernel")
    };
    let at = format!("{:x} ", t.at(0, 0));
    let Some(line) = text.lines().find(|l| l.starts_with(&at)) else {
        crate::fail!("no line {at} in numa_maps")
    };
    let field = |name: &str| -> u64 {
        line.split(' ')
            .filter_map(|w| w.strip_prefix(name))
            .filter_map(|v| v.parse::<u64>().ok())
            .sum()
    };
    let pages_seen: u64 = (0..8).map(|n| field(&format!("N{n}="))).sum();
    ensure_eq!(pages_seen, 1024, "pages by node in {line:?}");
    ensure_eq!(field("mapmax="), 3, "mapmax in {line:?}");
    Ok(())
}

/// pagemap: present, of a file, and exclusive only when nobody else maps the page.
fn pagemap_present_and_exclusive(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    for n in [3, 2, 1] {
        t.members.truncate(n);
        for i in 0..n {
            let seen = kernel::pagemap(t.peer(i).pid, t.at(i, 0), pages(2))?;
            let count = |bit: u64| seen.iter().filter(|e| *e & bit != 0).count();
            ensure_eq!(
                count(pagemap::PRESENT),
                1024,
                "present pages of member {i} of {n}"
            );
            ensure_eq!(
                count(pagemap::FILE),
                1024,
                "file pages of member {i} of {n}"
            );
            ensure_eq!(
                count(pagemap::SWAPPED),
                0,
                "swapped pages of member {i} of {n}"
            );
            ensure_eq!(
                count(pagemap::UFFD_WP),
                0,
                "write-protected pages of member {i} of {n}"
            );
            let exclusive = if n == 1 { 1024 } else { 0 };
            ensure_eq!(
                count(pagemap::EXCLUSIVE),
                exclusive,
                "exclusive pages of member {i} of {n}"
            );
        }
        // All see the same frames.
        let frames = |i: usize| -> Res<Vec<u64>> {
            Ok(kernel::pagemap(t.peer(i).pid, t.at(i, 0), pages(2))?
                .iter()
                .map(|e| e & ((1 << 55) - 1))
                .collect())
        };
        let first = frames(0)?;
        for i in 1..n {
            ensure!(
                frames(i)? == first,
                "members 0 and {i} map different frames"
            );
        }
    }
    t.expect(0, 2)
}

/// mincore tells which pages of the file are in memory.
fn mincore_sees_the_file(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    t.model.punch(&t.fd, 10..20)?;
    t.model.punch(&t.fd, 512..1024)?;
    for i in 0..2 {
        let (r, v) = t.peer(i).call(
            |a, _| {
                let mut v = vec![0u8; a[1] as usize];
                (
                    crate::peer::flat(sys::syscall(
                        libc::SYS_mincore,
                        &[a[0], a[1] * PAGE, v.as_mut_ptr() as u64],
                    )),
                    v,
                )
            },
            &[t.at(i, 0), pages(2)],
            &[],
        )?;
        ensure_eq!(r, 0, "mincore");
        let resident: Vec<usize> = (0..1024).filter(|n| v[*n] & 1 != 0).collect();
        let want: Vec<usize> = (0..10).chain(20..512).collect();
        ensure!(
            resident == want,
            "member {i}: {} pages resident, {} expected",
            resident.len(),
            want.len()
        );
    }
    t.expect_all(2)
}

/// Read-only walks over everybody's tables do not unshare them.
fn read_only_walks_do_not_unshare(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    for i in 0..3 {
        let pid = t.peer(i).pid;
        for f in [
            "smaps",
            "smaps_rollup",
            "numa_maps",
            "maps",
            "status",
            "statm",
        ] {
            fs::read(format!("/proc/{pid}/{f}")).ok();
        }
        kernel::pagemap(pid, t.at(i, 0), pages(2))?;
        // Reads through the page tables of another process.
        let mem = fs::File::open(format!("/proc/{pid}/mem"))?;
        let mut word = [0; 8];
        sys::pread(&mem, &mut word, t.at(i, 5))?;
        let want = crate::oracle::first_word(t.model.seed, 5, t.model.pages[5]);
        ensure_eq!(
            u64::from_ne_bytes(word),
            want,
            "word read through /proc/PID/mem"
        );
    }
    t.expect_all(2)?;
    t.coherent()
}
