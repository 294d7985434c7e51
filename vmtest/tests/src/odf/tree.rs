//! Whole families: generations, threads that fork while others write, ends of every kind.

use super::{diverge, verify_all, Disk, Events, Kin};
use crate::harness::{Ctx, Res};
use crate::machine::{Cgroup, Setting};
use crate::oracle::{pages, word_at};
use crate::peer::{flat, Remote};
use crate::sys::{self, ANON, GRANULE, GRANULE_PAGES, PAGE, PRIVATE, RW};
use crate::{ensure, ensure_eq, group, skip};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

group!("odf";
    generations,
    every_generation_writes,
    grandchild_outlives_them_all,
    many_children_at_once,
    parent_and_child_write_at_once(120),
    threads_write_at_once(120),
    threads_fork_while_others_write(120),
    threads_collapse_and_drop_while_others_look(180),
    direct_reads_while_forking(120),
    children_run_programs,
    killed_parent,
    killed_child_in_the_middle_of_writes,
    killed_parent_in_the_middle_of_mprotect(120),
    oom_kill_of_the_parent(120),
    oom_kill_of_a_child(120),
    core_dump_of_a_borrower(120),
    futex_of_threads_after_the_fork,
    futex_waiter_from_before_the_fork,
    robust_list_in_a_shared_granule,
);

/// A line of children, of which the last ones see what the first had, whatever became of those.
fn generations(ctx: &Ctx) -> Res {
    let mut line = vec![Kin::new(ctx, 2)?];
    for n in 0..12 {
        let next = line[n].child(ctx, 2)?;
        line.push(next);
    }
    for k in &line {
        k.sees(GRANULE_PAGES - 9..GRANULE_PAGES + 9)?;
    }
    // From the middle outwards, with a write by a neighbour each time.
    while line.len() > 1 {
        line.remove(line.len() / 2).peer.exit()?;
        let n = line.len() / 2;
        line[n].store(n as u64)?;
        for k in &line {
            k.sees(0..16)?;
        }
    }
    line[0].verify()?;
    diverge(&mut [&mut line[0]])
}

/// Each has one page that it wrote before its child was made and one after.
fn every_generation_writes(ctx: &Ctx) -> Res {
    let mut line = vec![Kin::new(ctx, 2)?];
    for n in 0..8u64 {
        let parent = &mut line[n as usize];
        parent.store(10 + n)?;
        let next = parent.child(ctx, 2)?;
        parent.store(30 + n)?;
        parent.store(GRANULE_PAGES + n)?;
        line.push(next);
    }
    for k in &line {
        k.verify()?;
    }
    for (n, k) in line.iter_mut().enumerate() {
        k.store(n as u64)?;
    }
    while let Some(k) = line.pop() {
        k.verify()?;
        k.peer.exit()?;
    }
    Ok(())
}

fn grandchild_outlives_them_all(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 3)?;
    let child = k.child(ctx, 3)?;
    let mut grandchild = child.child(ctx, 3)?;
    k.peer.exit()?;
    child.peer.exit()?;
    grandchild.verify()?;
    let before = Events::now();
    grandchild.fill(0..pages(3))?;
    before.expect(ctx, 0, 3)?;
    grandchild.verify()?;
    let mut last = grandchild.child(ctx, 3)?;
    diverge(&mut [&mut grandchild, &mut last])
}

fn many_children_at_once(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 1)?;
    let mut all = vec![];
    for n in 0..if ctx.long { 200 } else { 40 } {
        if n % 7 == 0 {
            // Those that follow share another table.
            k.store(n)?;
        }
        all.push(k.child(ctx, 1)?);
    }
    for (n, child) in all.iter_mut().enumerate() {
        child.sees(0..64)?;
        if n % 3 == 0 {
            child.store(n as u64 % GRANULE_PAGES)?;
        }
    }
    k.store(3)?;
    for child in &all {
        child.verify()?;
    }
    // Odd ones first.
    let mut n = 0;
    all.retain(|_| {
        n += 1;
        n % 2 == 0
    });
    for child in &mut all {
        child.store(5)?;
        child.verify()?;
    }
    drop(all);
    diverge(&mut [&mut k])
}

// ---- at once ----

/// In a peer: writes and reads back words of its own all over its memory. Arguments: address, pages,
/// rounds, its mark. Each word it finds is its own or what was there at the fork, the page's number.
const SCRIBBLE: Remote = |a, _| {
    let mine = |page: u64, round: u64| (a[3] << 48) | (round << 32) | page;
    for page in 0..a[1] {
        if sys::load64(a[0] + page * PAGE + 8) != Ok(page) {
            return (
                1,
                format!("page {page} is not as it was at the fork").into_bytes(),
            );
        }
    }
    for round in 1..=a[2] {
        // Each in another order.
        for n in 0..a[1] {
            let page = (n * (2 * a[3] + 1) + round) % a[1];
            if let Err(f) = sys::store64(a[0] + page * PAGE + 8, mine(page, round)) {
                return (2, format!("page {page}: {f:?}").into_bytes());
            }
        }
        for page in 0..a[1] {
            let got = sys::load64(a[0] + page * PAGE + 8);
            if got != Ok(mine(page, round)) {
                return (3, format!("page {page} holds {got:x?}").into_bytes());
            }
        }
    }
    (0, vec![])
};

/// In a peer: gives each page its number.
const NUMBER: Remote = |a, _| {
    let r = (0..a[1]).try_fold(0, |_, page| {
        sys::store64(a[0] + page * PAGE + 8, page).map(|()| 0)
    });
    crate::peer::access(r)
};

/// Parent, child and grandchild write everything at the same time, over and over.
fn parent_and_child_write_at_once(ctx: &Ctx) -> Res {
    let end = Instant::now() + ctx.duration(3, 60);
    let mut rounds = 0;
    while Instant::now() < end || rounds < 3 {
        rounds += 1;
        let k = Kin::untouched(ctx, 4)?;
        ensure_eq!(
            k.peer.call(NUMBER, &[k.base, pages(4)], &[])?.0,
            0,
            "numbering"
        );
        let child = k.child(ctx, 4)?;
        let grandchild = child.child(ctx, 4)?;
        let all = [&k, &child, &grandchild];
        for (n, who) in all.iter().enumerate() {
            let a = [who.base, pages(4), 3, n as u64 + 1];
            who.peer.start(SCRIBBLE, &a, &[])?;
        }
        for who in all {
            let (r, why) = who.peer.finish()?;
            ensure_eq!(r, 0, "{}: {}", who.peer.pid, String::from_utf8_lossy(&why));
        }
    }
    Ok(())
}

/// Threads of one process find the table shared at the same moment.
fn threads_write_at_once(ctx: &Ctx) -> Res {
    let crowd: Remote = |a, _| {
        let all: Vec<_> = (0..4u64)
            .map(|n| {
                let (base, granules) = (a[0], a[1]);
                std::thread::spawn(move || {
                    sys::pin_to_cpu(n as usize);
                    // Some pages of every granule, granule by granule, each thread others.
                    (0..granules * GRANULE_PAGES)
                        .filter(|page| page % 32 == n)
                        .all(|page| sys::store64(base + page * PAGE + 8, !page).is_ok())
                })
            })
            .collect();
        let bad: i64 = all
            .into_iter()
            .map(|t| i64::from(!matches!(t.join(), Ok(true))))
            .sum();
        let want = |page: u64| if page % 32 < 4 { !page } else { page };
        let right = |page: u64| sys::load64(a[0] + page * PAGE + 8) == Ok(want(page));
        let lost = (0..a[1] * GRANULE_PAGES).filter(|p| !right(*p)).count();
        (bad * 1_000_000 + lost as i64, vec![])
    };
    for _ in 0..if ctx.long { 100 } else { 3 } {
        let k = Kin::untouched(ctx, 8)?;
        ensure_eq!(
            k.peer.call(NUMBER, &[k.base, pages(8)], &[])?.0,
            0,
            "numbering"
        );
        let child = k.child(ctx, 8)?;
        let before = Events::now();
        let (r, _) = child.peer.call(crowd, &[child.base, 8], &[])?;
        ensure_eq!(r, 0, "stores that are lost");
        before.expect(ctx, 8, 0)?;
        let (r, _) = k.peer.call(crowd, &[k.base, 8], &[])?;
        ensure_eq!(r, 0, "stores of the parent that are lost");
        before.expect(ctx, 8, 8)?;
    }
    Ok(())
}

/// In a peer: two threads count, each in two pages of different granules, the first page first; a third
/// forks. A child must find the pages as of one moment, and they must stay so. Arguments: address,
/// milliseconds.
const COUNT_AND_FORK: Remote = |a, _| {
    static STOP: AtomicBool = AtomicBool::new(false);
    static DONE: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
    let base = a[0];
    let place = move |thread: u64, second: u64| {
        base + second * GRANULE + (3 + 4 * thread) * PAGE + 8 * second
    };
    for (t, second) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        if sys::store64(place(t, second), 0).is_err() {
            return (1, b"the first stores".to_vec());
        }
    }
    let counters: Vec<_> = (0..2u64)
        .map(|t| {
            std::thread::spawn(move || {
                sys::pin_to_cpu(t as usize);
                let mut n = 0;
                while !STOP.load(Ordering::Relaxed) {
                    n += 1;
                    if sys::store64(place(t, 0), n).is_err()
                        || sys::store64(place(t, 1), n).is_err()
                    {
                        return false;
                    }
                    DONE[t as usize].store(n, Ordering::Relaxed);
                }
                // None of one's own stores is lost.
                sys::load64(place(t, 0)) == Ok(n) && sys::load64(place(t, 1)) == Ok(n)
            })
        })
        .collect();
    let end = Instant::now() + Duration::from_millis(a[1]);
    let (mut forks, mut wrong) = (0, 0);
    while wrong == 0 && (Instant::now() < end || forks < 5) {
        match sys::fork() {
            Ok(0) => {
                let look = || {
                    [0, 1].map(|t| {
                        [0, 1].map(|second| sys::load64(place(t, second)).unwrap_or(u64::MAX))
                    })
                };
                let first = look();
                for [one, two] in first {
                    if one != two && one != two + 1 {
                        sys::exit_now(2);
                    }
                }
                for _ in 0..50 {
                    sys::syscall(libc::SYS_sched_yield, &[]).ok();
                    if look() != first {
                        sys::exit_now(3);
                    }
                }
                // A write of one's own, which nobody else sees.
                if sys::store64(place(0, 1), 1 << 60).is_err() {
                    sys::exit_now(4);
                }
                sys::exit_now(0)
            }
            Ok(pid) => {
                forks += 1;
                wrong = sys::wait(pid).unwrap_or(-1);
            }
            Err(_) => wrong = -2,
        }
    }
    STOP.store(true, Ordering::Relaxed);
    let lost = counters
        .into_iter()
        .filter_map(|t| t.join().ok())
        .filter(|right| !right)
        .count();
    let what = format!(
        "{forks} forks, {:?} counted, wait status {wrong:#x}, {lost} threads lost a store",
        DONE.each_ref().map(|d| d.load(Ordering::Relaxed))
    );
    (i64::from(wrong != 0 || lost != 0), what.into_bytes())
};

fn threads_fork_while_others_write(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 2)?;
    let before = Events::now();
    let time = ctx.duration(3, 60).as_millis() as u64;
    let (r, what) = k.peer.call(COUNT_AND_FORK, &[k.base, time], &[])?;
    ensure_eq!(r, 0, "{}", String::from_utf8_lossy(&what));
    if ctx.sharing {
        ensure!(
            Events::now().since(&before).shared >= 10,
            "no tables were shared"
        );
    }
    k.sees(20..GRANULE_PAGES)
}

/// In a peer: a thread reads from the disk into its memory, while another forks. What was read must be
/// there, for the reader. Arguments: fd, address, milliseconds; the disk's page n holds n in every word.
const READ_AND_FORK: Remote = |a, _| {
    static STOP: AtomicBool = AtomicBool::new(false);
    static READS: AtomicU64 = AtomicU64::new(0);
    let (fd, base) = (a[0], a[1]);
    let reader = std::thread::spawn(move || {
        sys::pin_to_cpu(1);
        let mut reads = 0u64;
        while !STOP.load(Ordering::Relaxed) {
            let (from, to) = (1 + reads % 16, base + (reads * 31 % 1024) * PAGE);
            match sys::syscall(libc::SYS_pread64, &[fd, to, PAGE, from * PAGE]) {
                Ok(PAGE) => {}
                r => return (-1, format!("direct read: {r:?}")),
            }
            for word in [0, 8, PAGE - 8] {
                let got = sys::load64(to + word);
                if got != Ok(from) {
                    let what =
                        format!("read {reads}: word {word} holds {got:x?} instead of {from}");
                    return (-2, what);
                }
            }
            reads += 1;
            READS.store(reads, Ordering::Relaxed);
        }
        (reads as i64, String::new())
    });
    let enough = |forks: u64| forks >= 5 && READS.load(Ordering::Relaxed) >= 20;
    sys::pin_to_cpu(0);
    let end = Instant::now() + Duration::from_millis(a[2]);
    let mut forks = 0;
    while !reader.is_finished() && (Instant::now() < end || !enough(forks)) {
        match sys::fork() {
            Ok(0) => {
                // Now and then something that has the table copied, in this process or by the parent.
                if forks % 3 == 0 {
                    sys::store64(base + (forks % 1024) * PAGE, 7).ok();
                }
                sys::exit_now(0)
            }
            Ok(pid) => {
                forks += 1;
                sys::wait(pid).ok();
            }
            Err(_) => break,
        }
    }
    STOP.store(true, Ordering::Relaxed);
    match reader.join() {
        Ok((n, _)) if n >= 20 && forks >= 5 => (0, vec![]),
        Ok((n, why)) => (1, format!("{forks} forks, {n}: {why}").into_bytes()),
        Err(_) => (1, b"panic".to_vec()),
    }
};

/// GUP-fast and forks at the same time: what a device writes is never lost to a child.
fn direct_reads_while_forking(ctx: &Ctx) -> Res {
    let disk = Disk::new()?;
    for n in 0..18u64 {
        let bytes: Vec<u8> = (0..512).flat_map(|_| n.to_ne_bytes()).collect();
        disk.put(n, &bytes)?;
    }
    let k = Kin::new(ctx, 2)?;
    let time = ctx.duration(3, 60).as_millis() as u64;
    let (r, why) = k
        .peer
        .call(READ_AND_FORK, &[disk.raw(), k.base, time], &[])?;
    ensure_eq!(r, 0, "{}", String::from_utf8_lossy(&why));
    Ok(())
}

/// In a peer, for a while: a thread that has granules collapsed, one that drops pages, and two that read and
/// write everywhere, each a word of its own in every page. Arguments: address, pages, milliseconds, the
/// model's seed; and the pages' generations. Answers 0, or what a thread saw that nobody wrote.
const COLLAPSE_AND_DROP: Remote = |a, gens| {
    const MADV_COLLAPSE: u64 = 25;
    static STOP: AtomicBool = AtomicBool::new(false);
    STOP.store(false, Ordering::SeqCst);
    let (base, n, seed) = (a[0], a[1], a[3]);
    let gens: std::sync::Arc<Vec<u32>> = std::sync::Arc::new(
        gens.chunks_exact(4)
            .map(|g| u32::from_ne_bytes(g.try_into().unwrap_or_default()))
            .collect(),
    );
    let advise = |at, len, what| sys::syscall(libc::SYS_madvise, &[at, len, what]).is_ok();
    // How often it did what it is for, or what was wrong.
    type Outcome = Result<u64, String>;
    let mut threads: Vec<std::thread::JoinHandle<Outcome>> = vec![];
    threads.push(std::thread::spawn(move || {
        let mut done = 0;
        while !STOP.load(Ordering::Relaxed) {
            for granule in 0..n / GRANULE_PAGES {
                let at = base + granule * GRANULE;
                done += u64::from(advise(at, GRANULE, MADV_COLLAPSE));
            }
        }
        Ok(done)
    }));
    threads.push(std::thread::spawn(move || {
        let (mut done, mut x) = (0, seed);
        while !STOP.load(Ordering::Relaxed) {
            x = x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let (first, len) = match (x >> 40) % 16 {
                0 => ((x >> 33) % n / GRANULE_PAGES * GRANULE_PAGES, GRANULE_PAGES),
                few => ((x >> 33) % (n - 16), few),
            };
            if !advise(base + first * PAGE, len * PAGE, libc::MADV_DONTNEED as u64) {
                return Err("MADV_DONTNEED".into());
            }
            done += 1;
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(done)
    }));
    for own in 1..3u64 {
        let gens = gens.clone();
        threads.push(std::thread::spawn(move || {
            let (mut done, mut x) = (0u64, seed ^ own);
            while !STOP.load(Ordering::Relaxed) {
                x = x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                let page = (x >> 33) % n;
                let mark = (page << 32) | (own << 28) | 0xa5;
                for (word, mine) in [(0, 0), (own, mark), (511, 0)] {
                    let was = word_at(seed, page, gens[page as usize], word);
                    match sys::load64(base + page * PAGE + word * 8) {
                        Ok(v) if v == was || v == 0 || v == mine => {}
                        got => return Err(format!("page {page} word {word}: {got:x?}")),
                    }
                }
                if x >> 63 == 0 && sys::store64(base + page * PAGE + own * 8, mark).is_err() {
                    return Err(format!("page {page}: a store"));
                }
                done += 1;
            }
            Ok(done)
        }));
    }
    std::thread::sleep(Duration::from_millis(a[2]));
    STOP.store(true, Ordering::Relaxed);
    let ends: Vec<Outcome> = threads
        .into_iter()
        .map(|t| t.join().unwrap_or(Err("panic".into())))
        .collect();
    match ends.iter().find_map(|e| e.as_ref().err()) {
        Some(why) => (-1, why.clone().into_bytes()),
        None => {
            let counts = ends.iter().flatten().flat_map(|n| n.to_ne_bytes());
            (0, counts.collect())
        }
    }
};

/// Granules become huge and small again and lose pages in one process, whose tables were shared with a parent
/// and a child. Those two see nothing of it, and write themselves.
fn threads_collapse_and_drop_while_others_look(ctx: &Ctx) -> Res {
    let n = 4;
    let end = Instant::now() + ctx.duration(6, 120);
    let mut done = [0u64; 4];
    let mut round = 0;
    while round < 4 || Instant::now() < end {
        // With and without huge pages by faults.
        let thp = ["never", "madvise"][round % 2];
        let _thp = Setting::set("/sys/kernel/mm/transparent_hugepage/enabled", thp)?;
        let mut old = Kin::new(ctx, n)?;
        let mut middle = old.child(ctx, n)?;
        let mut young = middle.child(ctx, n)?;
        // By one who borrows, and by the owner.
        let (one, mut others) = match round / 2 % 2 {
            0 => (&mut middle, [&mut old, &mut young]),
            _ => (&mut old, [&mut middle, &mut young]),
        };
        one.advise(0..pages(n), libc::MADV_HUGEPAGE)?;
        let gens: Vec<u8> = one
            .model
            .pages
            .iter()
            .flat_map(|g| g.to_ne_bytes())
            .collect();
        let time = ctx.duration(1, 5).as_millis() as u64;
        let a = [one.base, pages(n), time, one.model.seed];
        one.peer.start(COLLAPSE_AND_DROP, &a, &gens)?;
        let mut step = 0;
        while !one.peer.answers_within(0) {
            for (i, k) in others.iter_mut().enumerate() {
                let part = (step + i as u64) % (2 * n) * (GRANULE_PAGES / 2);
                k.sees(part..part + GRANULE_PAGES / 2)?;
                if step % 8 == 7 {
                    k.store(part + step % 256)?;
                }
            }
            step += 1;
        }
        let (r, what) = one.peer.finish()?;
        ensure_eq!(r, 0, "round {round}: {}", String::from_utf8_lossy(&what));
        for (sum, count) in done.iter_mut().zip(what.chunks_exact(8)) {
            *sum += crate::peer::word(count);
        }
        let [a, b] = others;
        verify_all(&[a, b])?;
        diverge(&mut [a, b])?;
        round += 1;
    }
    ensure!(
        done.iter().all(|d| *d > 0),
        "collapsed, dropped, touched, touched: {done:?}"
    );
    Ok(())
}

/// fork, and execve at once, many times.
fn children_run_programs(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 4)?;
    let run: Remote = |a, _| {
        use std::os::unix::process::CommandExt;
        let mut program = std::process::Command::new("/proc/self/exe");
        program.args(["helper", "nothing"]);
        let at = a[0];
        // SAFETY: one store to tested memory, or none; this also has std use fork, not vfork.
        unsafe {
            program.pre_exec(move || {
                if at != 0 {
                    sys::store64(at, 1).ok();
                }
                Ok(())
            });
        }
        let status = program.status();
        (
            status.map_or(-1, |s| i64::from(s.code().unwrap_or(-2))),
            vec![],
        )
    };
    let before = Events::now();
    for n in 0..if ctx.long { 300 } else { 12 } {
        let at = if n % 3 == 0 { k.at(GRANULE_PAGES) } else { 0 };
        ensure_eq!(k.peer.call(run, &[at], &[])?.0, 0, "the program");
        k.store(n % 3 * GRANULE_PAGES)?;
    }
    if ctx.sharing {
        let since = Events::now().since(&before);
        ensure!(
            since.shared >= 12 * 4,
            "only {} tables were shared",
            since.shared
        );
    }
    k.verify()
}

// ---- ends ----

fn killed_parent(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 4)?;
    let mut child = k.child(ctx, 4)?;
    let mut other = k.child(ctx, 4)?;
    k.store(3)?;
    child.store(GRANULE_PAGES)?;
    let pid = k.peer.pid;
    // Kills it, and waits.
    drop(k);
    ensure!(
        !std::path::Path::new(&format!("/proc/{pid}/maps")).exists(),
        "the parent is still there"
    );
    verify_all(&[&child, &other])?;
    diverge(&mut [&mut child, &mut other])?;
    other.peer.exit()?;
    child.fill(0..pages(4))?;
    child.verify()
}

/// SIGKILL while it copies tables, over and over.
fn killed_child_in_the_middle_of_writes(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 6)?;
    let sibling = k.child(ctx, 6)?;
    for round in 0..if ctx.long { 400 } else { 25 } {
        let child = k.child(ctx, 6)?;
        let spin: Remote = |a, _| loop {
            for n in 0..a[1] {
                if sys::store64(a[0] + n * PAGE, 7).is_err() {
                    return (1, vec![]);
                }
            }
        };
        child.peer.start(spin, &[child.base, pages(6)], &[])?;
        std::thread::sleep(Duration::from_millis(round % 7));
        sys::kill(child.peer.pid, libc::SIGKILL)?;
        k.store(round % pages(6))?;
        if round % 5 == 0 {
            verify_all(&[&k, &sibling])?;
        }
    }
    verify_all(&[&k, &sibling])
}

/// SIGKILL while it is about to copy very many tables, of one mapping or of as many: it ends without copying
/// them all.
fn killed_parent_in_the_middle_of_mprotect(ctx: &Ctx) -> Res {
    killed_in_mprotect(ctx, false)?;
    killed_in_mprotect(ctx, true)
}

fn killed_in_mprotect(ctx: &Ctx, apart: bool) -> Res {
    const GRANULES: u64 = 512;
    let mprotect: Remote = |a, _| {
        let r = sys::syscall(libc::SYS_mprotect, &[a[0], a[1], libc::PROT_READ as u64]);
        (flat(r), vec![])
    };
    for _ in 0..50 {
        let mut k = Kin::untouched(ctx, GRANULES)?;
        k.fill_every(GRANULE_PAGES, 0..pages(GRANULES))?;
        if apart {
            let prot = RW | libc::PROT_EXEC as u64;
            for page in (0..GRANULES).map(pages).step_by(2) {
                k.must(libc::SYS_mprotect, &[k.at(page), GRANULE, prot])?;
            }
        }
        let child = k.child(ctx, GRANULES)?;
        let before = Events::now();
        k.peer.start(mprotect, &[k.base, GRANULES * GRANULE], &[])?;
        let end = Instant::now() + Duration::from_secs(20);
        while ctx.sharing && Events::now().since(&before).copied == 0 && Instant::now() < end {
            std::hint::spin_loop();
        }
        // Kills it, and waits.
        drop(k);
        for page in (0..GRANULES).map(pages).step_by(37) {
            child.sees(page..page + 1)?;
        }
        // It may have been over already.
        let copied = Events::now().since(&before).copied;
        if copied < GRANULES {
            ensure!(copied > 0 || !ctx.sharing, "mprotect copied nothing");
            return Ok(());
        }
    }
    crate::fail!("who is killed copies all tables first")
}

const HOG: Remote = |_, _| {
    let len = 512 << 20;
    let Ok(a) = sys::mmap(0, len, RW, PRIVATE | ANON, -1, 0) else {
        return (1, vec![]);
    };
    (
        i64::from((0..len / PAGE).any(|n| sys::store64(a + n * PAGE, n).is_err())),
        vec![],
    )
};

fn oom_killed(k: &Kin, group: &Cgroup) -> Res {
    std::fs::write(format!("/proc/{}/oom_score_adj", k.peer.pid), "1000")?;
    group.write("memory.swap.max", "0").ok();
    let now = group.number("memory.current")?;
    group.write("memory.max", &(now + (24 << 20)).to_string())?;
    k.peer.start(HOG, &[], &[])?;
    let deadline = Instant::now() + Duration::from_secs(100);
    ensure!(
        k.peer.finish().is_err(),
        "512 MiB went into a cgroup with 24 MiB left"
    );
    let dead = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", k.peer.pid));
        stat.is_err() || stat.is_ok_and(|s| s.contains(") Z "))
    };
    while !dead() {
        ensure!(Instant::now() < deadline, "the hog lives");
        std::thread::sleep(Duration::from_millis(10));
    }
    group.write("memory.max", "max")
}

/// The OOM killer takes the one whose pages they were.
fn oom_kill_of_the_parent(ctx: &Ctx) -> Res {
    let group = Cgroup::enter()?;
    let k = Kin::new(ctx, 4)?;
    let mut child = k.child(ctx, 4)?;
    let mut grandchild = child.child(ctx, 4)?;
    oom_killed(&k, &group)?;
    verify_all(&[&child, &grandchild])?;
    diverge(&mut [&mut grandchild, &mut child])
}

fn oom_kill_of_a_child(ctx: &Ctx) -> Res {
    let group = Cgroup::enter()?;
    let mut k = Kin::new(ctx, 4)?;
    let child = k.child(ctx, 4)?;
    let mut grandchild = child.child(ctx, 4)?;
    oom_killed(&child, &group)?;
    verify_all(&[&k, &grandchild])?;
    diverge(&mut [&mut grandchild, &mut k])
}

/// The core file of a borrower has what is in its borrowed tables, and the tables stay.
fn core_dump_of_a_borrower(ctx: &Ctx) -> Res {
    let path = format!("/tmp/guest-tests-odf-core-{}", std::process::id());
    let pattern = Setting::set("/proc/sys/kernel/core_pattern", &path)?;
    let mut k = Kin::new(ctx, 2)?;
    let child = k.child(ctx, 2)?;
    let mut other = k.child(ctx, 2)?;
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
    let before = Events::now();
    child.peer.start(abort, &[], &[])?;
    ensure!(child.peer.finish().is_err(), "it lives");
    drop(pattern);
    let names = [path.clone(), format!("{path}.{}", child.peer.pid)];
    let core = names.iter().find_map(|n| std::fs::read(n).ok());
    names.iter().for_each(|n| {
        std::fs::remove_file(n).ok();
    });
    let Some(core) = core else {
        skip!("no core file was written")
    };
    let pages_of_core: std::collections::HashSet<&[u8]> =
        core.chunks_exact(PAGE as usize).collect();
    let found = (0..pages(2))
        .filter(|p| pages_of_core.contains(&child.bytes(*p)[..]))
        .count() as u64;
    ensure_eq!(
        found,
        pages(2),
        "of the child's pages, those in the core file"
    );
    if ctx.sharing {
        let copied = Events::now().since(&before).copied;
        ensure_eq!(copied, 0, "tables copied by the dump");
    }
    verify_all(&[&k, &other])?;
    diverge(&mut [&mut other, &mut k])
}

// ---- futexes ----

/// FUTEX_WAIT on a word that holds 0, private or not. Answers as the system call.
fn futex_wait(at: u64, private: u64) -> sys::Sys<u64> {
    let limit = libc::timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let op = libc::FUTEX_WAIT as u64 | (private * libc::FUTEX_PRIVATE_FLAG as u64);
    sys::syscall(libc::SYS_futex, &[at, op, 0, &raw const limit as u64])
}

fn futex_wake(at: u64, private: u64) -> sys::Sys<u64> {
    let op = libc::FUTEX_WAKE as u64 | (private * libc::FUTEX_PRIVATE_FLAG as u64);
    sys::syscall(libc::SYS_futex, &[at, op, 64])
}

/// In a peer: one thread waits for a word to change, another changes it and wakes. Arguments: address of
/// a word that holds 0, private. Answers 0 when the waiter woke.
const WAIT_AND_WAKE: Remote = |a, _| {
    let (at, private) = (a[0], a[1]);
    let waiter = std::thread::spawn(move || futex_wait(at, private));
    std::thread::sleep(Duration::from_millis(60));
    if sys::store64(at, 1).is_err() {
        return (1, vec![]);
    }
    let end = Instant::now() + Duration::from_secs(10);
    let mut woken = 0;
    while woken == 0 && !waiter.is_finished() && Instant::now() < end {
        woken = futex_wake(at, private).unwrap_or(0);
        std::thread::sleep(Duration::from_millis(5));
    }
    match waiter.join() {
        // EAGAIN: it looked only when the word had changed already.
        Ok(Ok(0) | Err(sys::Errno(libc::EAGAIN))) => (0, vec![]),
        r => (2, format!("woken {woken}, waiter {r:?}").into_bytes()),
    }
};

/// Threads meet on a word in a shared table, which the waiter looks at before anybody writes.
fn futex_of_threads_after_the_fork(ctx: &Ctx) -> Res {
    let mut k = Kin::untouched(ctx, 2)?;
    k.fill(1..9)?;
    k.fill(GRANULE_PAGES + 1..GRANULE_PAGES + 9)?;
    // Words that hold 0 in pages that are there.
    for page in [0, GRANULE_PAGES] {
        k.peer.store(k.at(page) + 8, 5)??;
    }
    for private in [0, 1] {
        let mut child = k.child(ctx, 2)?;
        let mut grandchild = child.child(ctx, 2)?;
        for who in [&grandchild, &child, &k] {
            for page in [0, GRANULE_PAGES] {
                let a = [who.at(page) + 16 + 8 * private, private];
                let (r, why) = who.peer.call(WAIT_AND_WAKE, &a, &[])?;
                ensure_eq!(r, 0, "private {private}: {}", String::from_utf8_lossy(&why));
            }
        }
        for who in [&k, &child, &grandchild] {
            ensure_eq!(who.peer.load(who.at(0) + 8)?, Ok(5), "the word beside");
            who.sees(1..GRANULE_PAGES)?;
        }
        child.store(1)?;
        grandchild.store(1)?;
        // For the next round: tables to share again.
        k.store(2)?;
    }
    Ok(())
}

/// In a peer: a thread that waits on a word until it is not 0; its outcome is left beside the word.
/// Arguments: address, private. Answers when it sleeps.
const WAIT_IN_A_THREAD: Remote = |a, _| {
    let (at, private) = (a[0], a[1]);
    static TID: AtomicU64 = AtomicU64::new(0);
    TID.store(0, Ordering::SeqCst);
    std::thread::spawn(move || {
        TID.store(
            sys::syscall(libc::SYS_gettid, &[]).unwrap_or(0),
            Ordering::SeqCst,
        );
        let r = futex_wait(at, private);
        sys::store64(at + 8, if r.is_ok() { 1 } else { 2 }).ok();
    });
    let asleep = format!("{} ", libc::SYS_futex);
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        let tid = TID.load(Ordering::SeqCst);
        let doing = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall"));
        if doing.is_ok_and(|doing| doing.starts_with(&asleep)) {
            return (0, vec![]);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    (1, vec![])
};

/// One waits since before the fork, whose table is then shared: its own process wakes it, the child's
/// wake-up of the same address does not.
fn futex_waiter_from_before_the_fork(ctx: &Ctx) -> Res {
    for private in [0, 1] {
        let mut k = Kin::untouched(ctx, 2)?;
        k.peer.store(k.at(0) + 64, 5)??;
        k.fill(1..9)?;
        let at = k.at(0);
        ensure_eq!(
            k.peer.call(WAIT_IN_A_THREAD, &[at, private], &[])?.0,
            0,
            "starting the waiter"
        );
        let child = k.fork()?;
        let wake: Remote = |a, _| {
            if sys::store64(a[0], 1).is_err() {
                return (-1, vec![]);
            }
            (flat(futex_wake(a[0], a[1])), vec![])
        };
        ensure_eq!(
            child.peer.call(wake, &[at, private], &[])?.0,
            0,
            "woken by the child"
        );
        ensure_eq!(k.peer.load(at)?, Ok(0), "the parent's word");
        ensure_eq!(
            k.peer.call(wake, &[at, private], &[])?.0,
            1,
            "woken by the parent"
        );
        let end = Instant::now() + Duration::from_secs(10);
        while k.peer.load(at + 8)? == Ok(0) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        ensure_eq!(k.peer.load(at + 8)?, Ok(1), "the waiter's outcome");
        ensure_eq!(child.peer.load(at + 8)?, Ok(0), "the outcome, in the child");
        verify_from(&k, 1)?;
        verify_from(&child, 1)?;
    }
    Ok(())
}

fn verify_from(k: &Kin, first: u64) -> Res {
    k.sees(first..GRANULE_PAGES)
}

/// Lets the thread of `DIE_WITH_A_LOCK` go.
static GO: AtomicU32 = AtomicU32::new(0);

/// In a peer: a thread with a robust list in tested memory that says it holds a lock there. It waits to be
/// let go. Arguments: address of the list's head; the lock is 64 bytes further. Answers the thread's id.
const HOLD_A_LOCK: Remote = |a, _| {
    let at = a[0];
    GO.store(0, Ordering::SeqCst);
    static TID: AtomicU64 = AtomicU64::new(0);
    TID.store(0, Ordering::SeqCst);
    std::thread::spawn(move || {
        let tid = sys::syscall(libc::SYS_gettid, &[]).unwrap_or(0);
        // struct robust_list_head: next, the futex's offset from an entry, what is pending. One entry, at
        // 32 bytes, which points back at the head.
        for (word, value) in [(0, at + 32), (8, 32), (16, 0), (32, at), (64, tid)] {
            if sys::store64(at + word, value).is_err() {
                return;
            }
        }
        sys::syscall(libc::SYS_set_robust_list, &[at, 24]).ok();
        TID.store(tid, Ordering::SeqCst);
        while GO.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        sys::syscall(libc::SYS_exit, &[0]).ok();
    });
    while TID.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    (TID.load(Ordering::SeqCst) as i64, vec![])
};

/// A thread dies with a lock whose word is in a shared table: its process's word says so, the child's does
/// not.
fn robust_list_in_a_shared_granule(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let at = k.at(GRANULE_PAGES + 5);
    let (tid, _) = k.peer.call(HOLD_A_LOCK, &[at], &[])?;
    ensure!(tid > 0, "the thread did not start");
    let child = k.child(ctx, 2)?;
    let go: Remote = |_, _| {
        GO.store(1, Ordering::SeqCst);
        (0, vec![])
    };
    ensure_eq!(k.peer.call(go, &[], &[])?.0, 0, "letting it go");
    const OWNER_DIED: u64 = 0x4000_0000;
    let end = Instant::now() + Duration::from_secs(10);
    while k.peer.load(at + 64)? == Ok(tid as u64) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure_eq!(
        k.peer.load(at + 64)?,
        Ok(OWNER_DIED),
        "the lock of the one that died"
    );
    ensure_eq!(
        child.peer.load(at + 64)?,
        Ok(tid as u64),
        "the lock in the child"
    );
    child.sees(0..GRANULE_PAGES)?;
    k.store(7)?;
    k.sees(0..GRANULE_PAGES)
}
