//! Allocation failure, injected by the kernel's own fault injection where it is built in: an
//! operation may fail, content may not change, and nothing may be left behind.

use crate::harness::{Ctx, Res};
use crate::machine::{Cgroup, Setting};
use crate::oracle::pages;
use crate::peer::{flat, unpack, Peer, Remote};
use crate::sys::{self, Errno, GRANULE, NONE, PAGE, RO, RW, SHARED};
use crate::team::{expect_tables, Team};
use crate::{ensure, group, skip};
use std::path::Path;

group!("allocfail";
    page_allocation_in_faults(120),
    slab_allocation_in_faults(120),
    leaving_needs_no_memory(120),
    page_allocation_in_fork(120),
    charge_fails_at_the_cgroup_limit(120),
);

/// Fault injection for the tasks that ask for it, until dropped.
pub struct Injection {
    _settings: Vec<Setting>,
}

impl Injection {
    /// Has so many of a hundred allocations fail.
    pub fn on(which: &str, percent: u32) -> Res<Injection> {
        let dir = format!("/sys/kernel/debug/{which}");
        if !Path::new(&dir).exists() || !Path::new("/proc/self/make-it-fail").exists() {
            skip!("this kernel has no {dir}");
        }
        let mut s = vec![];
        // Probability last when turning on; the guards turn it off in the opposite order.
        for (name, value) in [
            ("task-filter", "Y"),
            ("ignore-gfp-wait", "N"),
            ("min-order", "0"),
            ("verbose", "0"),
            ("times", "-1"),
            ("interval", "1"),
            ("probability", &percent.to_string()),
        ] {
            match Setting::set(&format!("{dir}/{name}"), value) {
                Ok(g) => s.push(g),
                // Not each kind has each knob.
                Err(_) if matches!(name, "min-order" | "ignore-gfp-wait") => {}
                Err(e) => return Err(e),
            }
        }
        s.reverse();
        Ok(Injection { _settings: s })
    }
}

/// In a peer: runs `f` with this process's allocations failing, and only that; what the peer needs
/// to talk to the test is spared.
pub fn with_failures(f: impl FnOnce() -> (i64, Vec<u8>)) -> (i64, Vec<u8>) {
    // Opened beforehand: turning the failures off must not need memory.
    let switch = match std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/make-it-fail")
    {
        Ok(switch) => switch,
        Err(e) => return (-100, e.to_string().into_bytes()),
    };
    if let Err(e) = sys::pwrite(&switch, b"1", 0) {
        return (-101, e.to_string().into_bytes());
    }
    let r = f();
    while sys::pwrite(&switch, b"0", 0).is_err() {}
    r
}

/// In a peer: maps, touches every 16th page, stores to some, and unmaps, some times over. An
/// operation may fail for memory; a word that is loaded must be right. Arguments: fd, granules,
/// rounds, seed, generation of all pages.
const ATTACH: Remote = |a, _| with_failures(|| attach(a));

fn attach(a: &[u64]) -> (i64, Vec<u8>) {
    let (fd, len, seed) = (a[0] as i32, a[1] * GRANULE, a[3]);
    let mut done = 0;
    for _ in 0..a[2] {
        let addr = match sys::mmap(0, len, RW, SHARED, fd, 0) {
            Ok(addr) => addr,
            Err(Errno(libc::ENOMEM)) => continue,
            Err(e) => return (-1, e.to_string().into_bytes()),
        };
        for page in (0..pages(a[1])).step_by(16) {
            match sys::load64(addr + page * PAGE) {
                Ok(v) if v == crate::oracle::first_word(seed, page, page as u32 + 1) => done += 1,
                Ok(v) => return (-2, format!("page {page} holds {v:#x}").into_bytes()),
                Err(f) if f.signal == libc::SIGBUS => {}
                Err(f) => return (-3, format!("page {page}: {f:?}").into_bytes()),
            }
        }
        while let Err(e) = sys::munmap(addr, len) {
            if e.0 != libc::ENOMEM {
                return (-4, e.to_string().into_bytes());
            }
        }
    }
    (done, vec![])
}

/// A team whose pages' generations are their numbers plus one, which ATTACH relies on.
fn numbered(ctx: &Ctx) -> Res<Team> {
    Team::new(ctx, 2, 4)
}

fn attach_under(ctx: &Ctx, which: &str, percent: u32) -> Res {
    let mut t = numbered(ctx)?;
    let p = Peer::spawn()?;
    let rounds = if ctx.long { 2000 } else { 60 };
    {
        let _i = Injection::on(which, percent)?;
        let (r, why) = p.call(ATTACH, &[t.raw() as u64, 4, rounds, ctx.seed], &[])?;
        ensure!(
            r > 0,
            "attaching under {which}: {r}: {}",
            String::from_utf8_lossy(&why)
        );
    }
    expect_tables(ctx, &p, 0)?;
    t.coherent()?;
    t.expect_all(4)
}

/// Page allocations fail while a process attaches.
fn page_allocation_in_faults(ctx: &Ctx) -> Res {
    attach_under(ctx, "fail_page_alloc", 30)
}

/// Slab allocations fail while a process attaches.
fn slab_allocation_in_faults(ctx: &Ctx) -> Res {
    attach_under(ctx, "failslab", 20)
}

/// Leaving works when no page is to be had at all. mprotect and munmap may fail for what they need
/// besides, the bookkeeping of mappings; then they have changed nothing and work later.
fn leaving_needs_no_memory(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 4)?;
    let leave: Remote = |a, _| {
        with_failures(|| {
            let calls = [
                (
                    libc::SYS_madvise,
                    [a[0], GRANULE, libc::MADV_DONTNEED as u64],
                ),
                (libc::SYS_mprotect, [a[0], 4 * GRANULE, RO]),
                (libc::SYS_mprotect, [a[0], 4 * GRANULE, NONE]),
                (libc::SYS_munmap, [a[0], 4 * GRANULE, 0]),
            ];
            for (nr, args) in calls {
                match sys::syscall(nr, &args) {
                    Ok(_) => {}
                    Err(Errno(libc::ENOMEM)) if nr != libc::SYS_madvise => {}
                    Err(e) => return (nr, flat(Err(e)).to_ne_bytes().to_vec()),
                }
            }
            (0, vec![])
        })
    };
    {
        let _i = Injection::on("fail_page_alloc", 100)?;
        let (r, d) = t.peer(0).call(leave, &[t.at(0, 0)], &[])?;
        ensure!(
            r == 0,
            "system call {r} failed without memory: {}",
            crate::peer::word(&d) as i64
        );
    }
    t.peer(0).munmap(t.at(0, 0), 4 * GRANULE)?;
    t.expect(0, 0)?;
    t.members.remove(0);
    t.coherent()?;
    t.expect_all(4)
}

/// A fork that fails half way leaves no link behind.
fn page_allocation_in_fork(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 4)?;
    let forks: Remote = |a, _| {
        with_failures(|| {
            let mut made = 0;
            for _ in 0..a[1] {
                match sys::fork() {
                    Ok(0) => {
                        sys::load64(a[0]).ok();
                        sys::exit_now(0)
                    }
                    Ok(pid) => {
                        made += 1;
                        sys::wait(pid).ok();
                    }
                    Err(Errno(libc::ENOMEM | libc::EAGAIN)) => {}
                    Err(e) => return (flat(Err(e)), vec![]),
                }
            }
            (made, vec![])
        })
    };
    {
        let _i = Injection::on("fail_page_alloc", 2)?;
        let (r, _) = t
            .peer(0)
            .call(forks, &[t.at(0, 0), if ctx.long { 2000 } else { 60 }], &[])?;
        ensure!(r >= 0, "fork: {}", Errno(-r as i32));
    }
    t.coherent()?;
    t.expect_all(4)
}

/// Without fault injection: a cgroup at its limit with nothing to reclaim. A process that cannot
/// get memory is killed, the others keep what they have.
fn charge_fails_at_the_cgroup_limit(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 4)?;
    let group = Cgroup::enter()?;
    let p = Peer::spawn()?;
    // Alone: with this process in it, either could be the one that cannot get memory.
    group.leave()?;
    let at = p.map(&t.fd, 0, 8 * GRANULE, RW)?;
    p.touch(at, pages(4))?;
    expect_tables(ctx, &p, 4)?;
    std::fs::write(format!("/proc/{}/oom_score_adj", p.pid), "1000")?;
    group.write("memory.swap.max", "0").ok();
    let now = group.number("memory.current")?;
    group.write("memory.max", &(now + (256 << 10)).to_string())?;
    // New pages of the file are charged to whoever makes them: this one soon cannot.
    sys::ftruncate(&t.fd, 8 * GRANULE)?;
    let fill: Remote = |a, _| {
        crate::peer::access(
            (0..a[1]).try_fold(0, |_, n| sys::store64(a[0] + n * PAGE, 0).map(|()| 0)),
        )
    };
    // Killed for memory, or refused; only success would be wrong.
    if let Ok((r, d)) = p.call(fill, &[at + 4 * GRANULE, pages(4)], &[]) {
        ensure!(
            unpack(r, &d).is_err(),
            "8 MiB went into a cgroup with 256 kB left"
        );
    }
    drop(p);
    group.write("memory.max", "max")?;
    sys::ftruncate(&t.fd, 4 * GRANULE)?;
    t.coherent()?;
    t.expect_all(4)
}
