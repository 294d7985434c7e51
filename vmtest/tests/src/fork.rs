//! Processes that come and go: fork, exec, exit in every order, kill, the OOM killer.

use crate::harness::{Ctx, Res};
use crate::kernel;
use crate::machine::Cgroup;
use crate::oracle::{pages, STORE_PAGE};
use crate::peer::{Peer, Remote};
use crate::sys::{self, ANON, GRANULE, GRANULE_PAGES, PAGE, PRIVATE, RW};
use crate::team::{expect_tables, Team};
use crate::{ensure, ensure_eq, group};
use std::time::Duration;

group!("fork";
    child_of_a_sharer,
    child_outlives_its_parent,
    many_generations,
    exit_in_every_order,
    creator_dies_first,
    execve_drops_everything,
    spawn_while_sharing,
    threads_of_a_sharer,
    killed_while_storing,
    killed_by_oom(120),
    core_dump(120),
    locked_part_and_fork,
);

/// A child has the mapping, starts with no links of its own, and gets them by touching.
fn child_of_a_sharer(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 3)?;
    let child = t.peer(0).fork()?;
    expect_tables(ctx, &child, 0)?;
    let at = t.at(0, 0);
    t.model.verify_mapped(&child, at, 0..pages(3))?;
    expect_tables(ctx, &child, 3)?;
    t.model.store(&child, at + 9 * PAGE, 9)?;
    t.coherent()?;
    t.model.verify_mapped(&child, at, 0..pages(3))?;
    // What the child does to its own view is its own business.
    child.munmap(at + GRANULE, PAGE)?;
    expect_tables(ctx, &child, 2)?;
    t.coherent()?;
    t.expect_all(3)
}

/// The parent goes first.
fn child_outlives_its_parent(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    let (child, at) = (t.peer(0).fork()?, t.at(0, 0));
    child.touch(at, pages(2))?;
    let grandchild = child.fork()?;
    grandchild.touch(at, pages(2))?;
    t.members.remove(0).peer.exit()?;
    child.exit()?;
    t.model.verify_mapped(&grandchild, at, 0..pages(2))?;
    expect_tables(ctx, &grandchild, 2)?;
    t.model.store(&grandchild, at + 77 * PAGE, 77)?;
    t.coherent()
}

/// A line of children, each the parent of the next.
fn many_generations(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 1, 2)?;
    let at = t.at(0, 0);
    let mut line: Vec<Peer> = vec![];
    for n in 0..12 {
        let next = line.last().unwrap_or(t.peer(0)).fork()?;
        next.touch(at, pages(2))?;
        expect_tables(ctx, &next, 2)?;
        line.push(next);
        t.model.store(&line[line.len() - 1], at + n * PAGE, n)?;
    }
    for p in &line {
        t.model.verify_mapped(p, at, 0..pages(2))?;
    }
    // From the middle outwards.
    while !line.is_empty() {
        line.remove(line.len() / 2).exit()?;
        t.verify(0, 0..16)?;
    }
    t.coherent()
}

/// Four sharers leave in each of the 24 orders; who is left sees everything.
fn exit_in_every_order(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 0, 1)?;
    for order in 0..24 {
        for _ in 0..4 {
            t.join()?;
        }
        t.touch_all()?;
        t.expect_all(1)?;
        let mut rest = order;
        for left in (1..=4).rev() {
            let who = rest % left;
            rest /= left;
            t.members.remove(who).peer.exit()?;
            for i in 0..t.members.len() {
                t.store(i, (order * 4 + left) as u64)?;
                t.verify(i, 0..GRANULE_PAGES)?;
            }
        }
    }
    t.model.verify_file(&t.fd)
}

/// The process whose faults made the tables is gone before the others do anything with them.
fn creator_dies_first(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 3, 3)?;
    t.model.fill(&t.fd, 0..pages(3))?;
    t.peer(0).touch(t.at(0, 0), pages(3))?;
    t.members.remove(0).peer.exit()?;
    t.touch_all()?;
    t.expect_all(3)?;
    t.coherent()
}

/// execve gives up all links; the others keep theirs.
fn execve_drops_everything(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    let member = t.members.remove(0);
    let before = kernel::gauges();
    let exec: Remote = |_, _| {
        use std::os::unix::process::CommandExt;
        let e = std::process::Command::new("/proc/self/exe")
            .args(["helper", "wait"])
            .stdin(std::process::Stdio::piped())
            .exec();
        (i64::from(e.raw_os_error().unwrap_or(1)), vec![])
    };
    // The socket closes in execve, after the old memory is gone; an answer is an error.
    if let Ok((why, _)) = member.peer.call(exec, &[], &[]) {
        crate::fail!("execve: {}", sys::Errno(why as i32));
    }
    let name = std::fs::read_to_string(format!("/proc/{}/cmdline", member.peer.pid))?;
    ensure!(name.contains("helper"), "the member runs {name:?}");
    expect_tables(ctx, &member.peer, 0)?;
    if let (true, Some(b), Some(now)) = (ctx.sharing, before, kernel::gauges()) {
        ensure_eq!(now.links, b.links - 2, "links after execve of one of three");
    }
    t.coherent()?;
    t.expect_all(2)
}

/// A sharer starts other programs (vfork) and goes on.
fn spawn_while_sharing(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    let spawn: Remote = |_, _| {
        let run = std::process::Command::new("/proc/self/exe")
            .args(["helper", "nothing"])
            .status();
        (
            run.map_or(-1, |s| i64::from(s.code().unwrap_or(-2))),
            vec![],
        )
    };
    for _ in 0..5 {
        let (r, _) = t.peer(0).call(spawn, &[], &[])?;
        ensure_eq!(r, 0, "a program started by a sharer");
    }
    t.coherent()?;
    t.expect_all(2)
}

/// Threads of one process touch different granules at once; they share one set of links.
fn threads_of_a_sharer(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 1, 8)?;
    t.join()?;
    let touch: Remote = |a, _| {
        let base = a[0];
        let threads: Vec<_> = (0..8u64)
            .map(|n| {
                std::thread::spawn(move || {
                    sys::pin_to_cpu(n as usize);
                    // Each begins at its own granule and goes round.
                    (0..8 * GRANULE_PAGES).all(|i| {
                        sys::load64(base + ((i + n * GRANULE_PAGES) % (8 * GRANULE_PAGES)) * PAGE)
                            .is_ok()
                    })
                })
            })
            .collect();
        (
            threads
                .into_iter()
                .map(|t| i64::from(!matches!(t.join(), Ok(true))))
                .sum(),
            vec![],
        )
    };
    let (r, _) = t.peer(1).call(touch, &[t.at(1, 0)], &[])?;
    ensure_eq!(r, 0, "threads that met a fault");
    t.expect_all(8)?;
    t.coherent()
}

/// SIGKILL in the middle of stores: the others find each page old or new, and go on.
fn killed_while_storing(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    for round in 0..if ctx.long { 300 } else { 20 } {
        t.join()?;
        let victim = t.members.len() - 1;
        let spin: Remote = |a, _| loop {
            for n in 0..a[1] {
                if sys::store64(a[0] + n * PAGE, 7).is_err() {
                    return (1, vec![]);
                }
            }
        };
        // It stores to the second granule only.
        t.peer(victim)
            .start(spin, &[t.granule(victim, 1), GRANULE_PAGES], &[])?;
        std::thread::sleep(Duration::from_millis(round % 7));
        drop(t.members.pop());
        for page in GRANULE_PAGES..GRANULE_PAGES + 20 {
            let seen = t.peer(0).load(t.at(0, page))?;
            let old = crate::oracle::first_word(t.model.seed, page, t.model.pages[page as usize]);
            ensure!(
                seen == Ok(7) || seen == Ok(old),
                "page {page} after the kill: {seen:x?}"
            );
        }
        t.verify(1, 0..GRANULE_PAGES)?;
    }
    t.model.fill(&t.fd, GRANULE_PAGES..pages(2))?;
    t.coherent()?;
    t.expect_all(2)
}

/// The OOM killer takes one sharer; the others and the contents stay.
fn killed_by_oom(ctx: &Ctx) -> Res {
    let group = Cgroup::enter()?;
    let mut t = Team::new(ctx, 3, 2)?;
    let now = group.number("memory.current")?;
    group.write("memory.swap.max", "0").ok();
    group.write("memory.max", &(now + (24 << 20)).to_string())?;
    let victim = t.members.remove(2);
    std::fs::write(format!("/proc/{}/oom_score_adj", victim.peer.pid), "1000")?;
    let hog: Remote = |_, _| {
        let len = 512 << 20;
        let Ok(a) = sys::mmap(0, len, RW, PRIVATE | ANON, -1, 0) else {
            return (1, vec![]);
        };
        (
            i64::from((0..len / PAGE).any(|n| sys::store64(a + n * PAGE, n).is_err())),
            vec![],
        )
    };
    victim.peer.start(hog, &[], &[])?;
    let status = sys::wait(victim.peer.pid)?;
    ensure!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL,
        "the hog ended by {}",
        sys::describe_status(status)
    );
    group.write("memory.max", "max")?;
    t.coherent()?;
    t.expect_all(2)
}

/// A core dump walks the shared tables and takes nothing from the others.
fn core_dump(ctx: &Ctx) -> Res {
    let dir = format!("/tmp/guest-tests-core-{}", std::process::id());
    let pattern = crate::machine::Setting::set("/proc/sys/kernel/core_pattern", &dir)?;
    let mut t = Team::new(ctx, 3, 2)?;
    let victim = t.members.remove(0);
    std::fs::write(format!("/proc/{}/coredump_filter", victim.peer.pid), "0x7f").ok();
    let abort: Remote = |_, _| {
        // SAFETY: plain calls about the process's own limits and end.
        unsafe {
            let all = libc::rlimit {
                rlim_cur: libc::RLIM_INFINITY,
                rlim_max: libc::RLIM_INFINITY,
            };
            libc::setrlimit(libc::RLIMIT_CORE, &all);
            libc::signal(libc::SIGABRT, libc::SIG_DFL);
            libc::abort()
        }
    };
    victim.peer.start(abort, &[], &[])?;
    let status = sys::wait(victim.peer.pid)?;
    drop(pattern);
    // The pattern may get the process id appended.
    let names = [dir.clone(), format!("{dir}.{}", victim.peer.pid)];
    let core = names.iter().find_map(|n| std::fs::read(n).ok());
    names.iter().for_each(|n| {
        std::fs::remove_file(n).ok();
    });
    ensure!(
        libc::WIFSIGNALED(status),
        "the process ended by {}",
        sys::describe_status(status)
    );
    let Some(core) = core else {
        crate::skip!("no core file was written")
    };
    let page = crate::oracle::page_bytes(t.model.seed, 700, t.model.pages[700]);
    let found = core.chunks_exact(PAGE as usize).any(|c| c == &page[..])
        || core.windows(64).step_by(8).any(|c| c == &page[..64]);
    ensure!(
        found,
        "the shared page 700 is not in the core file of {} bytes",
        core.len()
    );
    t.coherent()?;
    t.expect_all(2)
}

/// A locked part is not locked in the child, which shares it.
fn locked_part_and_fork(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    t.peer(0)
        .syscall(libc::SYS_mlock, &[t.granule(0, 1), GRANULE])??;
    t.expect(0, 1)?;
    let child = t.peer(0).fork()?;
    let at = t.at(0, 0);
    t.model.verify_mapped(&child, at, 0..pages(2))?;
    expect_tables(ctx, &child, 2)?;
    let g = t.model.next();
    child.start(
        STORE_PAGE,
        &[at + 600 * PAGE, t.model.seed, 600, u64::from(g)],
        &[],
    )?;
    ensure_eq!(child.finish()?.0, 0, "a store by the child");
    t.model.pages[600] = g;
    t.coherent()?;
    t.expect(0, 1)
}
