//! Unsynchronised stress: several processes on all CPUs map, fault, protect, leave, fork and exit at
//! once, while the file is cut and punched and processes are killed.
//!
//! Nobody knows the exact content at any moment, but a word of a page is always zero or carries the
//! page's own mark in its upper half: a word of another page, another file or a freed frame shows.
//! Each process also knows its own mappings, so every fault it gets must be one it can explain.

use crate::harness::{Ctx, Res};
use crate::kernel;
use crate::machine::{Cgroup, Swap};
use crate::ops::Dice;
use crate::oracle::pages;
use crate::peer::{Peer, Remote};
use crate::sys::{self, Fault, ANON, FIXED, GRANULE, GRANULE_PAGES, NONE, PAGE, RO, RW, SHARED};
use crate::{ensure, ensure_eq, group};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

group!("concurrent";
    churn(120),
    churn_and_file_changes(120),
    churn_and_kills(120),
    churn_and_reclaim(180),
    churn_and_mode_flips(120),
    churn_with_threads(120),
    churn_and_observers(120),
    attach_and_exit_race(120),
);

/// Size of the file.
pub const GRANULES: u64 = 4;
const SEED: u64 = 0x5eed;

/// The mark of a page, in the upper half of each word that is ever stored to it.
pub fn mark(page: u64) -> u64 {
    (crate::oracle::first_word(SEED, page, 1) >> 32) << 32
}

/// Has a word of a page come from elsewhere? The kernel may copy byte by byte, on both sides: who reads while
/// another one writes to a new page may find any byte of a word written, or still zero.
pub fn foreign(page: u64, word: u64) -> bool {
    let bytes = |w: u64| w.to_le_bytes().into_iter().skip(4);
    bytes(word)
        .zip(bytes(mark(page)))
        .any(|(got, right)| got != 0 && got != right)
}

/// How a worker ended: 0 is well, or with foreign data,
pub const FOREIGN: i64 = 1;
/// with an access that cannot be explained,
pub const UNEXPLAINED: i64 = 2;
/// with a system call that failed.
pub const SYSCALL: i64 = 3;

/// A worker's answer.
pub fn report(code: i64, what: String) -> (i64, Vec<u8>) {
    (code, what.into_bytes())
}

/// One worker's mapping: pages `first..first+len` of the file at `addr`.
#[derive(Clone, Copy)]
struct Map {
    addr: u64,
    first: u64,
    len: u64,
    prot: u64,
}

fn explained(m: &Map, write: bool, f: &Fault) -> bool {
    match f.signal {
        // The file may be shorter just now.
        libc::SIGBUS => true,
        _ => f.code == sys::SEGV_ACCERR && (m.prot == NONE || (write && m.prot == RO)),
    }
}

/// Random work until time is up. Arguments: fd, seed, milliseconds, arena.
pub const WORKER: Remote = |a, _| {
    let (fd, mut dice, arena) = (a[0] as i32, Dice::new(a[1]), a[3]);
    sys::pin_to_cpu(a[1] as usize);
    let end = Instant::now() + Duration::from_millis(a[2]);
    let mut maps: Vec<Map> = vec![];
    while Instant::now() < end {
        let r = work(&mut dice, fd, arena, &mut maps);
        if r.0 != 0 {
            return r;
        }
    }
    (0, vec![])
};

fn work(dice: &mut Dice, fd: i32, arena: u64, maps: &mut Vec<Map>) -> (i64, Vec<u8>) {
    const SLOTS: u64 = 6;
    const STRIDE: u64 = (GRANULES + 2) * GRANULE;
    let what = dice.below(100);
    if maps.is_empty() || (what < 10 && (maps.len() as u64) < SLOTS) {
        let Some(slot) = (0..SLOTS).find(|s| {
            !maps
                .iter()
                .any(|m| m.addr >= arena + s * STRIDE && m.addr < arena + (s + 1) * STRIDE)
        }) else {
            return (0, vec![]);
        };
        let first = dice.below(pages(GRANULES) - 1);
        let len = 1 + dice.below(pages(GRANULES) - first);
        let first = if dice.chance(50) {
            first / GRANULE_PAGES * GRANULE_PAGES
        } else {
            first
        };
        let skew = if dice.chance(90) { 0 } else { PAGE };
        let addr = arena + slot * STRIDE + first * PAGE % GRANULE + skew;
        let prot = if dice.chance(70) { RW } else { RO };
        if let Err(e) = sys::mmap(addr, len * PAGE, prot, SHARED | FIXED, fd, first * PAGE) {
            return report(SYSCALL, format!("mmap: {e}"));
        }
        maps.push(Map {
            addr,
            first,
            len,
            prot,
        });
        return (0, vec![]);
    }
    let n = dice.below(maps.len() as u64) as usize;
    let m = maps[n];
    let at = dice.below(m.len);
    let (addr, page) = (m.addr + at * PAGE, m.first + at);
    let part = 1 + dice.below(m.len - at);
    let call = |nr: i64, args: &[u64]| match sys::syscall(nr, args) {
        Ok(_) => (0, vec![]),
        Err(e) => report(SYSCALL, format!("system call {nr}: {e}")),
    };
    match what {
        0..50 => {
            let word = addr + 8 * dice.below(512);
            match sys::load64(word) {
                Ok(v) if foreign(page, v) => report(
                    FOREIGN,
                    format!(
                        "page {page} at {word:#x} holds {v:#x}, its mark is {:#x}",
                        mark(page)
                    ),
                ),
                Ok(_) => (0, vec![]),
                Err(f) if explained(&m, false, &f) => (0, vec![]),
                Err(f) => report(
                    UNEXPLAINED,
                    format!("load from page {page}, protection {}: {f:?}", m.prot),
                ),
            }
        }
        50..75 => {
            match sys::store64(addr + 8 * dice.below(512), mark(page) | dice.below(1 << 32)) {
                Ok(()) if m.prot == RW => (0, vec![]),
                Ok(()) => report(
                    UNEXPLAINED,
                    format!("a store to page {page} went through protection {}", m.prot),
                ),
                Err(f) if explained(&m, true, &f) => (0, vec![]),
                Err(f) => report(
                    UNEXPLAINED,
                    format!("store to page {page}, protection {}: {f:?}", m.prot),
                ),
            }
        }
        75..80 => {
            maps.swap_remove(n);
            call(libc::SYS_munmap, &[m.addr, m.len * PAGE])
        }
        80..84 => {
            // Cut off the tail.
            if at == 0 {
                return (0, vec![]);
            }
            maps[n].len = at;
            call(libc::SYS_munmap, &[addr, (m.len - at) * PAGE])
        }
        84..88 => {
            let prot = [RW, RO, NONE][dice.below(3) as usize];
            maps[n].prot = prot;
            call(libc::SYS_mprotect, &[m.addr, m.len * PAGE, prot])
        }
        88..94 => call(
            libc::SYS_madvise,
            &[addr, part * PAGE, libc::MADV_DONTNEED as u64],
        ),
        94..96 => {
            sys::syscall(
                libc::SYS_madvise,
                &[
                    addr,
                    part * PAGE,
                    [libc::MADV_PAGEOUT, libc::MADV_COLD, 25][dice.below(3) as usize] as u64,
                ],
            )
            .ok();
            (0, vec![])
        }
        96..97 => call(libc::SYS_munlock, &[addr, part * PAGE]),
        97..98 => {
            // A lock on a few pages cuts the mapping inside a granule.
            sys::syscall(libc::SYS_mlock, &[addr, part.min(8) * PAGE]).ok();
            call(libc::SYS_munlock, &[addr, part.min(8) * PAGE])
        }
        _ => fork_and_touch(&m, page, addr),
    }
}

fn fork_and_touch(m: &Map, page: u64, addr: u64) -> (i64, Vec<u8>) {
    match sys::fork() {
        Ok(0) => {
            let code = match sys::load64(addr) {
                Ok(v) if foreign(page, v) => 1,
                Ok(_) => 0,
                Err(f) if explained(m, false, &f) => 0,
                Err(_) => 2,
            };
            sys::exit_now(code)
        }
        Ok(pid) => match sys::wait(pid) {
            Ok(0) => (0, vec![]),
            Ok(s) => report(UNEXPLAINED, format!("a child: {}", sys::describe_status(s))),
            Err(e) => report(SYSCALL, format!("waitpid: {e}")),
        },
        Err(e) => report(SYSCALL, format!("fork: {e}")),
    }
}

/// Workers on one file for some time.
pub struct Crowd {
    /// The file.
    pub fd: OwnedFd,
    /// Those who have been started and not dropped.
    pub workers: Vec<Peer>,
    started: u64,
    seed: u64,
    end: Instant,
}

impl Crowd {
    /// A file and `n` workers that do everything.
    pub fn new(ctx: &Ctx, n: usize, time: Duration) -> Res<Crowd> {
        ctx.opt_in()?;
        let fd = sys::memfd(GRANULES * GRANULE)?;
        let mut c = Crowd {
            fd,
            workers: vec![],
            started: 0,
            seed: ctx.seed.wrapping_mul(1000),
            end: Instant::now() + time,
        };
        for page in 0..pages(GRANULES) {
            c.write(page)?;
        }
        for _ in 0..n {
            c.start(WORKER)?;
        }
        Ok(c)
    }

    /// Writes a page with its mark by descriptor.
    pub fn write(&self, page: u64) -> Res {
        let bytes: Vec<u8> = (0..512)
            .flat_map(|n| (mark(page) | n).to_ne_bytes())
            .collect();
        Ok(sys::pwrite(&self.fd, &bytes, page * PAGE)?)
    }

    /// Starts a worker with its own seed and arena.
    pub fn start(&mut self, f: Remote) -> Res {
        let p = Peer::spawn()?;
        self.started += 1;
        let left = self
            .end
            .saturating_duration_since(Instant::now())
            .as_millis() as u64;
        let arena = 0x2000_0000_0000 + self.started * (1 << 34);
        p.start(
            f,
            &[
                self.fd.as_raw_fd() as u64,
                self.seed + self.started,
                left,
                arena,
            ],
            &[],
        )?;
        self.workers.push(p);
        Ok(())
    }

    /// Is there time left?
    pub fn running(&self) -> bool {
        Instant::now() < self.end
    }

    /// All that is left must end well; then no page may hold anything foreign.
    pub fn finish(mut self) -> Res {
        for w in self.workers.drain(..) {
            let (code, why) = w.finish()?;
            let kind = [
                "well",
                "foreign data",
                "an access that cannot be explained",
                "a system call failed",
            ];
            ensure_eq!(
                code,
                0,
                "seed {}: {}: {}",
                self.seed,
                kind.get(code as usize).unwrap_or(&"?"),
                String::from_utf8_lossy(&why)
            );
        }
        let mut word = [0; 8];
        for page in 0..pages(GRANULES) {
            sys::pread(&self.fd, &mut word, page * PAGE)?;
            let v = u64::from_ne_bytes(word);
            ensure!(
                !foreign(page, v),
                "page {page} of the file holds {v:#x}, its mark is {:#x}",
                mark(page)
            );
        }
        Ok(())
    }
}

fn crowd(ctx: &Ctx) -> Res<Crowd> {
    Crowd::new(ctx, 4, ctx.duration(3, 60))
}

/// Stresses, and again on a machine too slow to have made enough links by then: without them the
/// stress stressed something else.
pub fn stressed(ctx: &Ctx, mut stress: impl FnMut() -> Res) -> Res {
    let links = || kernel::vmstat("ptshare_link").unwrap_or(0);
    let before = links();
    for _ in 0..10 {
        stress()?;
        if !ctx.sharing || links() >= before + 50 {
            return Ok(());
        }
    }
    crate::fail!(
        "only {} links were made during the stress",
        links() - before
    )
}

/// Mappings only.
fn churn(ctx: &Ctx) -> Res {
    stressed(ctx, || {
        let c = crowd(ctx)?;
        c.finish()
    })
}

/// Also truncation, holes and writes by descriptor.
fn churn_and_file_changes(ctx: &Ctx) -> Res {
    stressed(ctx, || {
        let c = crowd(ctx)?;
        let mut dice = Dice::new(ctx.seed);
        while c.running() {
            let page = dice.below(pages(GRANULES));
            match dice.below(10) {
                0 => {
                    sys::ftruncate(&c.fd, page * PAGE)?;
                    sys::ftruncate(&c.fd, GRANULES * GRANULE)?;
                }
                1..4 => sys::punch(&c.fd, page * PAGE, (1 + dice.below(600)) * PAGE)?,
                _ => c.write(page)?,
            }
        }
        c.finish()
    })
}

/// Workers are killed at random moments, and others take their place.
fn churn_and_kills(ctx: &Ctx) -> Res {
    stressed(ctx, || {
        let mut c = crowd(ctx)?;
        let mut dice = Dice::new(ctx.seed);
        while c.running() {
            std::thread::sleep(Duration::from_millis(dice.below(40)));
            let n = dice.below(c.workers.len() as u64) as usize;
            drop(c.workers.swap_remove(n));
            c.start(WORKER)?;
            sys::punch(&c.fd, dice.below(pages(GRANULES)) * PAGE, 8 * PAGE)?;
        }
        c.finish()
    })
}

/// Pages go to swap and come back all the while.
fn churn_and_reclaim(ctx: &Ctx) -> Res {
    let _swap = Swap::on(256)?;
    let group = Cgroup::enter()?;
    stressed(ctx, || {
        let c = crowd(ctx)?;
        while c.running() {
            group.reclaim(4 << 20);
            std::thread::sleep(Duration::from_millis(5));
        }
        c.finish()
    })
}

/// vm.ptshare changes while processes share.
fn churn_and_mode_flips(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    stressed(ctx, || {
        let c = crowd(ctx)?;
        for mode in [0, 2, 1].into_iter().cycle() {
            if !c.running() {
                break;
            }
            kernel::set_mode(mode)?;
            std::thread::sleep(Duration::from_millis(30));
        }
        kernel::set_mode(1)?;
        c.finish()
    })
}

/// A second thread in each worker loads from a mapping that the first one unmaps, protects and
/// maps again. Any fault may be, foreign data may not.
const TWO_THREADS: Remote = |a, _| {
    let (fd, arena, end) = (
        a[0] as i32,
        a[3],
        Instant::now() + Duration::from_millis(a[2]),
    );
    let mut dice = Dice::new(a[1]);
    let len = GRANULES * GRANULE;
    if sys::mmap(arena, len, RW, SHARED | FIXED, fd, 0).is_err() {
        return report(SYSCALL, "mmap".into());
    }
    let seed = a[1];
    let reader = std::thread::spawn(move || {
        sys::pin_to_cpu(seed as usize + 1);
        let mut dice = Dice::new(!seed);
        while Instant::now() < end {
            let page = dice.below(pages(GRANULES));
            match sys::load64(arena + page * PAGE + 8 * dice.below(512)) {
                Ok(v) if foreign(page, v) => return Some((page, v)),
                _ => {}
            }
            // Fails when it is not writable just now.
            sys::store64(arena + page * PAGE, mark(page) | 1).ok();
        }
        None
    });
    sys::pin_to_cpu(seed as usize);
    while Instant::now() < end {
        let page = dice.below(pages(GRANULES));
        let n = 1 + dice.below(pages(GRANULES) - page);
        let (addr, bytes) = (arena + page * PAGE, n * PAGE);
        let r = match dice.below(5) {
            0 => sys::syscall(
                libc::SYS_mprotect,
                &[addr, bytes, [RO, RW, NONE][dice.below(3) as usize]],
            ),
            1 => sys::syscall(
                libc::SYS_madvise,
                &[addr, bytes, libc::MADV_DONTNEED as u64],
            ),
            2 => sys::mmap(addr, bytes, RW, SHARED | FIXED, fd, page * PAGE),
            3 => sys::syscall(libc::SYS_munmap, &[addr, bytes])
                .and_then(|_| sys::mmap(addr, bytes, RW, SHARED | FIXED, fd, page * PAGE)),
            // All in one piece again.
            _ => sys::mmap(arena, len, RW, SHARED | FIXED, fd, 0),
        };
        if let Err(e) = r {
            return report(SYSCALL, e.to_string());
        }
    }
    match reader.join() {
        Ok(None) => (0, vec![]),
        Ok(Some((page, v))) => report(
            FOREIGN,
            format!("page {page} holds {v:#x}, its mark is {:#x}", mark(page)),
        ),
        Err(_) => report(UNEXPLAINED, "the second thread panicked".into()),
    }
};

/// Two threads in each process, one pulling the mapping from under the other.
fn churn_with_threads(ctx: &Ctx) -> Res {
    stressed(ctx, || {
        let mut c = Crowd::new(ctx, 0, ctx.duration(3, 60))?;
        for _ in 0..3 {
            c.start(TWO_THREADS)?;
        }
        while c.running() {
            sys::punch(&c.fd, GRANULE / 2, GRANULE)?;
            std::thread::sleep(Duration::from_millis(3));
        }
        c.finish()
    })
}

/// smaps, pagemap, numa_maps and /proc/PID/mem of the workers are read all the while.
fn churn_and_observers(ctx: &Ctx) -> Res {
    stressed(ctx, || {
        let c = crowd(ctx)?;
        while c.running() {
            for w in &c.workers {
                for f in ["smaps", "numa_maps", "status", "smaps_rollup"] {
                    std::fs::read(format!("/proc/{}/{f}", w.pid)).ok();
                }
                for what in ["1", "3", "4"] {
                    std::fs::write(format!("/proc/{}/clear_refs", w.pid), what).ok();
                }
                let maps =
                    std::fs::read_to_string(format!("/proc/{}/maps", w.pid)).unwrap_or_default();
                for start in maps
                    .lines()
                    .filter_map(|l| l.split('-').next())
                    .filter_map(|h| u64::from_str_radix(h, 16).ok())
                {
                    if (0x2000_0000_0000..0x3000_0000_0000).contains(&start) {
                        kernel::pagemap(w.pid, start, 64).ok();
                        if let Ok(mem) = std::fs::File::open(format!("/proc/{}/mem", w.pid)) {
                            let mut word = [0; 8];
                            sys::pread(&mem, &mut word, start).ok();
                        }
                    }
                }
            }
        }
        c.finish()
    })
}

/// The narrowest race: the last sharer leaves while the next one arrives, again and again.
fn attach_and_exit_race(ctx: &Ctx) -> Res {
    stressed(ctx, || {
        let attach: Remote = |a, _| {
            let (fd, end, arena) = (
                a[0] as i32,
                Instant::now() + Duration::from_millis(a[2]),
                a[3],
            );
            sys::pin_to_cpu(a[1] as usize);
            let mut n = 0u64;
            while Instant::now() < end {
                n += 1;
                let page = n % GRANULE_PAGES;
                if sys::mmap(arena, GRANULE, RW, SHARED | FIXED, fd, 0).is_err() {
                    return report(SYSCALL, "mmap".into());
                }
                match sys::load64(arena + page * PAGE) {
                    Ok(v) if foreign(page, v) => {
                        return report(
                            FOREIGN,
                            format!("page {page} holds {v:#x}, its mark is {:#x}", mark(page)),
                        )
                    }
                    Ok(_) => {}
                    Err(f) => return report(UNEXPLAINED, format!("{f:?}")),
                }
                if let Err(f) = sys::store64(arena + page * PAGE, mark(page) | n & 0xffff) {
                    return report(UNEXPLAINED, format!("{f:?}"));
                }
                let gone = match n % 3 {
                    0 => sys::munmap(arena, GRANULE),
                    1 => sys::syscall(
                        libc::SYS_madvise,
                        &[arena, GRANULE, libc::MADV_DONTNEED as u64],
                    )
                    .map(drop),
                    _ => sys::mmap(arena, GRANULE, NONE, sys::PRIVATE | ANON | FIXED, -1, 0)
                        .map(drop),
                };
                if let Err(e) = gone {
                    return report(SYSCALL, e.to_string());
                }
            }
            (0, vec![])
        };
        let mut c = Crowd::new(ctx, 0, ctx.duration(3, 60))?;
        for _ in 0..2 {
            c.start(attach)?;
        }
        while c.running() {
            sys::punch(&c.fd, 0, GRANULE)?;
            std::thread::sleep(Duration::from_millis(2));
        }
        c.finish()
    })
}
