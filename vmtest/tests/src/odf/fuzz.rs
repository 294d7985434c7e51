//! A family of processes that do anything to their memory, at random, and fork on demand; each one's whole
//! view is predicted page by page.
//!
//! A page's content is a generation that one write gave it, wherever it is moved to and whoever inherits
//! it. One operation is done at a time, so the prediction is exact. The same seed gives the same
//! operations; a failure names the seed, the operation's number and the last operations before it.

use super::{next, switch_on, Events};
use crate::harness::{own, Ctx, Res, Stop, Walk};
use crate::machine::{Cgroup, Setting, Swap};
use crate::ops::Dice;
use crate::oracle::page_bytes;
use crate::peer::{unpack, Peer, Remote};
use crate::sys::{
    self, Errno, Fault, ANON, FIXED, GRANULE, GRANULE_PAGES, NONE, PAGE, PRIVATE, RO, RW,
};
use crate::{ensure, ensure_eq, group};
use std::collections::VecDeque;
use std::os::fd::AsRawFd;

group!("odf";
    fuzz_a_family(300),
    fuzz_another_family(300),
    fuzz_with_swap(300),
    fuzz_with_huge_pages(300),
    fuzz_many_small_steps(300),
);

const ARENA: u64 = 5 * GRANULE_PAGES;
const MOST: usize = 7;

/// A page that is mapped.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Slot {
    /// What it holds; 0 is zeros.
    generation: u32,
    prot: u64,
    /// A child does not get it; two flags, of which this one counts when both are set.
    gone_at_fork: bool,
    /// A child gets zeros.
    wiped_at_fork: bool,
}

struct Process {
    peer: Peer,
    slots: Vec<Option<Slot>>,
}

struct World {
    dice: Dice,
    base: u64,
    seed: u64,
    processes: Vec<Process>,
    group: Option<Cgroup>,
    huge: bool,
    log: VecDeque<String>,
}

/// In a peer: writes pages. Arguments: address, seed, first generation, pages.
const WRITE: Remote = |a, _| {
    let r = (0..a[3]).try_fold(0, |_, n| {
        let bytes = page_bytes(a[1], 0, a[2] as u32 + n as u32);
        sys::copy(a[0] + n * PAGE, bytes.as_ptr() as u64, PAGE).map(|()| 0)
    });
    crate::peer::access(r)
};

/// In a peer: compares pages. Arguments: address, seed; bytes: the generations. Answers the number of the
/// first that differs, counted from 1.
const COMPARE: Remote = |a, gens| {
    let mut buf = vec![0u8; PAGE as usize];
    for (n, g) in gens.chunks_exact(4).enumerate() {
        let g = u32::from_ne_bytes(g.try_into().unwrap_or_default());
        if let Err(f) = sys::copy(buf.as_mut_ptr() as u64, a[0] + n as u64 * PAGE, PAGE) {
            return (n as i64 + 1, format!("{f:?}").into_bytes());
        }
        if let Some(why) = crate::oracle::diagnose(a[1], 0, g, &buf) {
            return (n as i64 + 1, why.into_bytes());
        }
    }
    (0, vec![])
};

const COLLAPSE: i32 = 25;

impl World {
    fn new(ctx: &Ctx, seed: u64) -> Res<World> {
        let first = Peer::spawn()?;
        switch_on(ctx, first.pid)?;
        let mut w = World {
            base: first.place(0, ARENA * PAGE)?,
            dice: Dice::new(seed),
            seed,
            processes: vec![Process {
                peer: first,
                slots: vec![None; ARENA as usize],
            }],
            group: None,
            huge: false,
            log: VecDeque::new(),
        };
        w.map(0, 0, ARENA)?;
        w.write(0, 0, ARENA)?;
        Ok(w)
    }

    fn note(&mut self, what: String) {
        if self.log.len() == 24 {
            self.log.pop_front();
        }
        self.log.push_back(what);
    }

    fn at(&self, page: u64) -> u64 {
        self.base + page * PAGE
    }

    fn slots(&mut self, i: usize, page: u64, n: u64) -> &mut [Option<Slot>] {
        &mut self.processes[i].slots[page as usize..(page + n) as usize]
    }

    /// Some pages: often whole granules, often at a border, often few.
    fn some(&mut self) -> (u64, u64) {
        let d = &mut self.dice;
        let page = match d.below(4) {
            0 => d.below(ARENA / GRANULE_PAGES) * GRANULE_PAGES,
            1 => (d.below(ARENA / GRANULE_PAGES) * GRANULE_PAGES + GRANULE_PAGES - 1 - d.below(3))
                .min(ARENA - 1),
            _ => d.below(ARENA),
        };
        let n = match d.below(5) {
            0 => GRANULE_PAGES * (1 + d.below(2)),
            1 => 1 + d.below(GRANULE_PAGES),
            _ => 1 + d.below(6),
        };
        (page, n.min(ARENA - page))
    }

    /// Some pages that are all mapped, from the first such one that is found.
    fn mapped(&mut self, i: usize) -> Option<(u64, u64)> {
        let (page, n) = self.some();
        let slots = &self.processes[i].slots;
        let from = (page..ARENA)
            .chain(0..page)
            .find(|p| slots[*p as usize].is_some())?;
        let mut len = 1;
        while len < n && from + len < ARENA && slots[(from + len) as usize].is_some() {
            len += 1;
        }
        Some((from, len))
    }

    fn expected(&self, i: usize, page: u64, write: bool) -> Result<u32, (i32, i32)> {
        match self.processes[i].slots[page as usize] {
            None => Err((libc::SIGSEGV, sys::SEGV_MAPERR)),
            Some(s) if s.prot == NONE || write && s.prot != RW => {
                Err((libc::SIGSEGV, sys::SEGV_ACCERR))
            }
            Some(s) => Ok(s.generation),
        }
    }

    fn right<T: std::fmt::Debug>(expected: Result<u32, (i32, i32)>, got: &Result<T, Fault>) -> Res {
        let fine = match (expected, got) {
            (Ok(_), Ok(_)) => true,
            (Err((s, c)), Err(f)) => f.signal == s && f.code == c,
            _ => false,
        };
        ensure!(fine, "expected {expected:?}, got {got:?}");
        Ok(())
    }

    // ---- what a process does ----

    fn map(&mut self, i: usize, page: u64, n: u64) -> Res {
        self.note(format!("{i} maps {page}+{n}"));
        let at = self.at(page);
        let p = &self.processes[i].peer;
        let flags = PRIVATE | ANON | FIXED;
        ensure_eq!(p.mmap(at, n * PAGE, RW, flags, -1, 0)?, Ok(at), "mmap");
        self.slots(i, page, n).fill(Some(Slot {
            generation: 0,
            prot: RW,
            gone_at_fork: false,
            wiped_at_fork: false,
        }));
        Ok(())
    }

    /// Whole granules of small pages anew, in one mapping, as a fork can share them.
    fn renew(&mut self, i: usize) -> Res {
        let granules = ARENA / GRANULE_PAGES;
        let first = self.dice.below(granules);
        let n = 1 + self.dice.below(granules - first);
        let (page, n) = (first * GRANULE_PAGES, n * GRANULE_PAGES);
        self.map(i, page, n)?;
        if self.dice.chance(50) {
            return self.write(i, page, n);
        }
        // Some pages, so that there are holes; at least one in each granule.
        for g in 0..n / GRANULE_PAGES {
            let at = self.dice.below(GRANULE_PAGES - 40);
            let some = 1 + self.dice.below(40);
            self.write(i, page + g * GRANULE_PAGES + at, some)?;
        }
        Ok(())
    }

    fn unmap(&mut self, i: usize) -> Res {
        let (page, n) = self.some();
        self.note(format!("{i} unmaps {page}+{n}"));
        let at = self.at(page);
        self.processes[i].peer.munmap(at, n * PAGE)?;
        self.slots(i, page, n).fill(None);
        Ok(())
    }

    fn write(&mut self, i: usize, page: u64, n: u64) -> Res {
        let first = next();
        (1..n).for_each(|_| {
            next();
        });
        let a = [self.at(page), self.seed, u64::from(first), n];
        let (r, d) = self.processes[i].peer.call(WRITE, &a, &[])?;
        let got = unpack(r, &d);
        // Before the first page that may not be written, all are.
        let bad = (0..n).find(|m| self.expected(i, page + m, true).is_err());
        let expected = bad.map_or(Ok(0), |m| self.expected(i, page + m, true));
        World::right(expected, &got)?;
        for (m, s) in self.slots(i, page, bad.unwrap_or(n)).iter_mut().enumerate() {
            if let Some(s) = s {
                s.generation = first + m as u32;
            }
        }
        Ok(())
    }

    fn store(&mut self, i: usize) -> Res {
        let (page, n) = match self.dice.chance(80) {
            true => match self.mapped(i) {
                Some((page, n)) => (page, n),
                None => return Ok(()),
            },
            false => self.some(),
        };
        let n = if self.dice.chance(70) { 1 } else { n.min(40) };
        self.note(format!("{i} writes {page}+{n}"));
        self.write(i, page, n)
    }

    fn load(&mut self, i: usize) -> Res {
        let (page, _) = self.some();
        self.note(format!("{i} reads {page}"));
        let got = self.processes[i].peer.load(self.at(page))?;
        let expected = self.expected(i, page, false);
        World::right(expected, &got)?;
        if let (Ok(g), Ok(word)) = (expected, got) {
            ensure_eq!(
                word,
                crate::oracle::first_word(self.seed, 0, g),
                "page {page}"
            );
        }
        Ok(())
    }

    /// By process_vm_writev, or by /proc/PID/mem, which may write what the process may not.
    fn store_from_outside(&mut self, i: usize) -> Res {
        let Some((page, _)) = self.mapped(i) else {
            return Ok(());
        };
        let by_mem = self.dice.chance(50);
        self.note(format!(
            "page {page} of {i} is written from outside, by mem: {by_mem}"
        ));
        let g = next();
        let mut bytes = page_bytes(self.seed, 0, g);
        let (pid, at) = (self.processes[i].peer.pid, self.at(page));
        let expected = self.expected(i, page, true);
        let r = if by_mem {
            let mem = std::fs::OpenOptions::new()
                .write(true)
                .open(format!("/proc/{pid}/mem"))?;
            sys::pwrite(&mem, &bytes, at).map(|()| PAGE)
        } else {
            let (local, remote) = ([bytes.as_mut_ptr() as u64, PAGE], [at, PAGE]);
            let [l, r] = [&local, &remote].map(|v| v.as_ptr() as u64);
            sys::syscall(libc::SYS_process_vm_writev, &[pid as u64, l, 1, r, 1, 0])
        };
        match (by_mem, expected) {
            (true, _) | (false, Ok(_)) => ensure_eq!(r, Ok(PAGE), "written"),
            _ => {
                ensure_eq!(r, Err(Errno(libc::EFAULT)), "process_vm_writev");
                return Ok(());
            }
        }
        if let Some(s) = &mut self.slots(i, page, 1)[0] {
            s.generation = g;
        }
        Ok(())
    }

    fn protect(&mut self, i: usize) -> Res {
        let Some((page, n)) = self.mapped(i) else {
            return Ok(());
        };
        let prot = [RW, RW, RO, NONE][self.dice.below(4) as usize];
        self.note(format!("{i} protects {page}+{n} to {prot}"));
        let at = self.at(page);
        self.processes[i].peer.mprotect(at, n * PAGE, prot)??;
        for s in self.slots(i, page, n).iter_mut().flatten() {
            s.prot = prot;
        }
        Ok(())
    }

    fn advise(&mut self, i: usize) -> Res {
        let Some((page, n)) = self.mapped(i) else {
            return Ok(());
        };
        let d = &mut self.dice;
        let advice = match d.below(14) {
            0..4 => libc::MADV_DONTNEED,
            4 => libc::MADV_PAGEOUT,
            5 => libc::MADV_COLD,
            6 => libc::MADV_POPULATE_READ,
            7 => libc::MADV_POPULATE_WRITE,
            8 => libc::MADV_DONTFORK,
            9 => libc::MADV_DOFORK,
            10 => libc::MADV_WIPEONFORK,
            11 => libc::MADV_KEEPONFORK,
            12 => [libc::MADV_WILLNEED, libc::MADV_NORMAL][d.below(2) as usize],
            _ if self.huge => {
                [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE, COLLAPSE][d.below(3) as usize]
            }
            _ => [libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE][d.below(2) as usize],
        };
        self.note(format!("{i} advises {page}+{n}: {advice}"));
        let at = self.at(page);
        if advice == libc::MADV_DONTNEED {
            // What is locked is not dropped.
            self.processes[i]
                .peer
                .syscall(libc::SYS_munlock, &[at, n * PAGE])??;
        }
        let r = self.processes[i].peer.madvise(at, n * PAGE, advice)?;
        let slots = self.slots(i, page, n).iter_mut().flatten();
        match advice {
            libc::MADV_DONTNEED => {
                r?;
                slots.for_each(|s| s.generation = 0);
            }
            libc::MADV_DONTFORK | libc::MADV_DOFORK => {
                r?;
                slots.for_each(|s| s.gone_at_fork = advice == libc::MADV_DONTFORK);
            }
            libc::MADV_WIPEONFORK | libc::MADV_KEEPONFORK => {
                r?;
                slots.for_each(|s| s.wiped_at_fork = advice == libc::MADV_WIPEONFORK);
            }
            // The others may fail for good reasons, protection and lack of huge pages among them.
            _ => {}
        }
        Ok(())
    }

    fn remap(&mut self, i: usize) -> Res {
        let Some((page, n)) = self.mapped(i) else {
            return Ok(());
        };
        let mut to = self.dice.below(ARENA - n + 1);
        if self.dice.chance(60) {
            to = to / GRANULE_PAGES * GRANULE_PAGES + page % GRANULE_PAGES;
        }
        if to + n > ARENA || to < page + n && page < to + n {
            return Ok(());
        }
        self.note(format!("{i} moves {page}+{n} to {to}"));
        let (from, dest) = (self.at(page), self.at(to));
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let a = [from, n * PAGE, n * PAGE, flags, dest];
        let p = &self.processes[i].peer;
        match p.syscall(libc::SYS_mremap, &a)? {
            Ok(got) => {
                ensure_eq!(got, dest, "mremap");
                let moved = self.slots(i, page, n).to_vec();
                self.slots(i, page, n).fill(None);
                self.slots(i, to, n).copy_from_slice(&moved);
            }
            // In more than one mapping: refused, with the destination gone already.
            Err(Errno(libc::EFAULT)) => {
                self.slots(i, to, n).fill(None);
            }
            Err(e) => crate::fail!("mremap: {e}"),
        }
        Ok(())
    }

    fn lock(&mut self, i: usize) -> Res {
        let Some((page, n)) = self.mapped(i) else {
            return Ok(());
        };
        let call = [libc::SYS_mlock, libc::SYS_munlock, libc::SYS_munlock];
        let call = call[self.dice.below(3) as usize];
        self.note(format!("{i} locks or unlocks {page}+{n}: {call}"));
        let a = [self.at(page), n.min(64) * PAGE];
        // Fails in the end where nothing may be read.
        self.processes[i].peer.syscall(call, &a)?.ok();
        Ok(())
    }

    /// A page goes into a pipe; something is done; what comes out is what went in.
    fn splice(&mut self, i: usize) -> Res {
        let Some((page, _)) = self.mapped(i) else {
            return Ok(());
        };
        let Ok(g) = self.expected(i, page, false) else {
            return Ok(());
        };
        let Some(other) = (0..self.processes.len()).find(|j| *j != i) else {
            return Ok(());
        };
        self.note(format!(
            "{i} splices {page} of generation {g}; {other} writes it"
        ));
        let mut ends = [0i32; 2];
        sys::syscall(libc::SYS_pipe2, &[ends.as_mut_ptr() as u64, 0])?;
        let [from, to] = ends.map(|fd| own(fd as u64));
        // The peer has no such descriptor: it opens the test's.
        let path = format!("/proc/{}/fd/{}", std::process::id(), to.as_raw_fd());
        let splice: Remote = |a, path| {
            let path = String::from_utf8_lossy(path).into_owned();
            let Ok(to) = std::fs::OpenOptions::new().write(true).open(path) else {
                return (-1, vec![]);
            };
            let iov = [a[0], PAGE];
            let a = [to.as_raw_fd() as u64, iov.as_ptr() as u64, 1, 0];
            (
                crate::peer::flat(sys::syscall(libc::SYS_vmsplice, &a)),
                vec![],
            )
        };
        let p = &self.processes[i].peer;
        let (r, _) = p.call(splice, &[self.at(page)], path.as_bytes())?;
        ensure_eq!(r, PAGE as i64, "vmsplice");
        if self.expected(other, page, true).is_ok() {
            self.write(other, page, 1)?;
        }
        let mut bytes = vec![0; PAGE as usize];
        let a = [from.as_raw_fd() as u64, bytes.as_mut_ptr() as u64, PAGE];
        ensure_eq!(sys::syscall(libc::SYS_read, &a)?, PAGE, "read");
        let why = crate::oracle::diagnose(self.seed, 0, g, &bytes);
        ensure!(why.is_none(), "in the pipe: {why:?}");
        Ok(())
    }

    // ---- what happens to processes ----

    fn fork(&mut self, i: usize) -> Res {
        if self.processes.len() >= MOST {
            return Ok(());
        }
        let on = self.dice.chance(85);
        if self.dice.chance(40) {
            self.renew(i)?;
        }
        self.note(format!(
            "{i} forks into {}, on demand: {on}",
            self.processes.len()
        ));
        let p = &self.processes[i];
        let switch = format!("/proc/{}/use_odf", p.peer.pid);
        if std::path::Path::new(&switch).exists() && !on {
            let old = std::fs::read_to_string(&switch)?;
            std::fs::write(&switch, "0")?;
            self.push_child(i)?;
            for k in [i, self.processes.len() - 1] {
                let pid = self.processes[k].peer.pid;
                std::fs::write(format!("/proc/{pid}/use_odf"), &old)?;
            }
            return Ok(());
        }
        self.push_child(i)
    }

    fn push_child(&mut self, i: usize) -> Res {
        let p = &self.processes[i];
        let slots = p.slots.iter().map(|s| match s {
            Some(s) if s.gone_at_fork => None,
            Some(s) if s.wiped_at_fork => Some(Slot {
                generation: 0,
                ..*s
            }),
            s => *s,
        });
        let child = Process {
            slots: slots.collect(),
            peer: p.peer.fork()?,
        };
        self.processes.push(child);
        Ok(())
    }

    fn end(&mut self, i: usize) -> Res {
        if self.processes.len() < 2 {
            return Ok(());
        }
        let kill = self.dice.chance(30);
        self.note(format!("{i} goes, killed: {kill}"));
        let p = self.processes.remove(i);
        if !kill {
            p.peer.exit()?;
        }
        Ok(())
    }

    fn reclaim(&mut self) {
        if let Some(g) = &self.group {
            g.reclaim(24 << 20);
            self.note("reclaim".into());
        }
    }

    fn migrate(&mut self, i: usize) {
        let to = 1u64 << self.dice.below(2);
        let from = 3 ^ to;
        self.note(format!("{i} goes to nodes {to:#b}"));
        let pid = self.processes[i].peer.pid as u64;
        let [from, to] = [&from, &to].map(|v| v as *const u64 as u64);
        sys::syscall(libc::SYS_migrate_pages, &[pid, 64, from, to]).ok();
    }

    fn clear_refs(&mut self, i: usize) {
        let what = ["1", "4"][self.dice.below(2) as usize];
        self.note(format!("clear_refs {what} of {i}"));
        let pid = self.processes[i].peer.pid;
        std::fs::write(format!("/proc/{pid}/clear_refs"), what).ok();
    }

    // ---- looking ----

    /// Everything a process may read, run by run.
    fn verify(&self, i: usize) -> Res {
        let p = &self.processes[i];
        let mut page = 0;
        while page < ARENA {
            let mut gens: Vec<u8> = vec![];
            let mut n = 0;
            while page + n < ARENA {
                match self.expected(i, page + n, false) {
                    Ok(g) => gens.extend(g.to_ne_bytes()),
                    Err(_) => break,
                }
                n += 1;
            }
            if n > 0 {
                let a = [self.at(page), self.seed];
                let (bad, why) = p.peer.call(COMPARE, &a, &gens)?;
                ensure!(
                    bad == 0,
                    "process {i} ({}) page {}: {}",
                    p.peer.pid,
                    page + bad as u64 - 1,
                    String::from_utf8_lossy(&why)
                );
            }
            page += n + 1;
        }
        Ok(())
    }

    fn verify_all(&self) -> Res {
        (0..self.processes.len()).try_for_each(|i| self.verify(i))
    }

    fn step(&mut self) -> Res {
        let i = self.dice.below(self.processes.len() as u64) as usize;
        match self.dice.below(100) {
            0..12 => self.fork(i),
            12..22 => self.end(i),
            22..27 => self.renew(i),
            27..46 => self.store(i),
            46..54 => self.load(i),
            54..64 => self.advise(i),
            64..70 => self.protect(i),
            70..73 => self.unmap(i),
            73..78 => {
                let (page, n) = self.some();
                self.map(i, page, n)
            }
            78..83 => self.remap(i),
            83..85 => self.lock(i),
            85..89 => self.store_from_outside(i),
            89..91 => self.splice(i),
            91..94 => {
                self.reclaim();
                Ok(())
            }
            94..95 => {
                self.migrate(i);
                Ok(())
            }
            95..96 => {
                self.clear_refs(i);
                Ok(())
            }
            _ => self.verify(i),
        }
    }

    fn go(&mut self, ctx: &Ctx, walk: Walk) -> Res {
        let before = Events::now();
        let steps = self.run(walk)?;
        // A granule that is huge is not shared.
        let one_in = if self.huge { 60 } else { 20 };
        shared_enough(ctx, self.seed, &before, steps, one_in)
    }

    /// Returns how many steps it made.
    fn run(&mut self, walk: Walk) -> Res<u64> {
        let mut n = 0;
        while walk.goes_on(n) {
            let r = self.step().and_then(|()| match n % 60 {
                59 => self.verify_all(),
                _ => Ok(()),
            });
            if let Err(Stop::Fail(why)) = r {
                let log: Vec<_> = self.log.iter().cloned().collect();
                crate::fail!(
                    "seed {}, operation {n}: {why}; before it: {}",
                    self.seed,
                    log.join("; ")
                );
            }
            n += 1;
        }
        self.verify_all()?;
        Ok(n)
    }
}

/// A table was shared in one of so many steps, and copied and taken back in a third of that.
fn shared_enough(ctx: &Ctx, seed: u64, before: &Events, steps: u64, one_in: u64) -> Res {
    if ctx.sharing {
        let (since, least) = (Events::now().since(before), steps / one_in);
        ensure!(
            since.shared > least && since.copied > least / 3 && since.reused > least / 3,
            "seed {seed}: {since:?} in {steps} steps"
        );
    }
    Ok(())
}

/// 600 steps, or a minute of them.
fn whole(ctx: &Ctx) -> Walk {
    ctx.walk(600, 60)
}

fn fuzz_a_family(ctx: &Ctx) -> Res {
    World::new(ctx, ctx.seed)?.go(ctx, whole(ctx))
}

fn fuzz_another_family(ctx: &Ctx) -> Res {
    World::new(ctx, ctx.seed.wrapping_add(1000))?.go(ctx, whole(ctx))
}

/// In a cgroup that is reclaimed to swap in between, and swap that goes and comes.
fn fuzz_with_swap(ctx: &Ctx) -> Res {
    for round in 0..if ctx.long { 6 } else { 1 } {
        let swap = Swap::on(256)?;
        let group = Cgroup::enter()?;
        let mut w = World::new(ctx, ctx.seed.wrapping_add(2000 + round))?;
        w.group = Some(group);
        w.go(ctx, ctx.walk(200, 20))?;
        swap.off()?;
        w.verify_all()?;
        w.run(Walk::steps(60))?;
    }
    Ok(())
}

/// With huge pages wherever they can be had.
fn fuzz_with_huge_pages(ctx: &Ctx) -> Res {
    const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    let _always = Setting::set(THP, "always")?;
    let mut w = World::new(ctx, ctx.seed.wrapping_add(3000))?;
    w.huge = true;
    // So that there are tables of small pages, too.
    let at = w.at(GRANULE_PAGES);
    w.processes[0]
        .peer
        .madvise(at, 2 * GRANULE, libc::MADV_NOHUGEPAGE)??;
    w.advise_small()?;
    w.go(ctx, whole(ctx))
}

impl World {
    /// Has the second and third granule consist of small pages.
    fn advise_small(&mut self) -> Res {
        let (page, n) = (GRANULE_PAGES, 2 * GRANULE_PAGES);
        let at = self.at(page);
        let p = &self.processes[0].peer;
        p.madvise(at, n * PAGE, libc::MADV_DONTNEED)??;
        for s in self.slots(0, page, n).iter_mut().flatten() {
            s.generation = 0;
        }
        self.write(0, page, n)
    }
}

/// Several short lives of different seeds.
fn fuzz_many_small_steps(ctx: &Ctx) -> Res {
    let (before, mut steps) = (Events::now(), 0);
    for n in 0..if ctx.long { 60 } else { 4 } {
        steps += World::new(ctx, ctx.seed.wrapping_add(4000 + n))?.run(Walk::steps(150))?;
    }
    // By all of them: one alone has too few.
    shared_enough(ctx, ctx.seed.wrapping_add(4000), &before, steps, 20)
}
