//! Seeded random operations of several processes on a few files, against a model that predicts
//! every content and every fault.
//!
//! The model is page by page: for each process, which page of which file each page of its arena
//! shows, and with what protection; for each file, the generation of each page. One operation at a
//! time is done, so the prediction is exact. The same seed gives the same operations; a failure
//! names the seed, the number of the operation, and the last operations before it.

use crate::harness::{Ctx, Res, Stop, Walk};
use crate::kernel;
use crate::machine::{Cgroup, Swap};
use crate::oracle::{Model, STORE_PAGE};
use crate::peer::{unpack, Peer};
use crate::sys::{
    self, Errno, Fault, ANON, FIXED, GRANULE, GRANULE_PAGES, NONE, PAGE, RO, RW, SHARED,
};
use crate::{ensure, ensure_eq, group};
use rand_chacha::rand_core::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};

group!("ops";
    few_files_many_operations(300),
    other_seed(300),
    one_process(300),
    with_swap(300),
    with_mode_flips(300),
    on_ext4(300),
);

/// Random numbers with the few questions asked here.
pub struct Dice(ChaCha8Rng);

impl Dice {
    /// Dice that always fall the same way for one seed.
    pub fn new(seed: u64) -> Dice {
        Dice(ChaCha8Rng::seed_from_u64(seed))
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0.next_u64() % n.max(1)
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A length in pages: often whole granules, often few pages.
    fn length(&mut self, max: u64) -> u64 {
        let n = match self.below(4) {
            0 => GRANULE_PAGES * (1 + self.below(3)),
            1 => 1 + self.below(8),
            2 => GRANULE_PAGES + self.below(GRANULE_PAGES),
            _ => 1 + self.below(2 * GRANULE_PAGES),
        };
        n.clamp(1, max.max(1))
    }

    /// A page number below `max`: often at a granule's border.
    fn place(&mut self, max: u64) -> u64 {
        let p = if self.chance(50) {
            self.below(max.div_ceil(GRANULE_PAGES)) * GRANULE_PAGES
        } else {
            self.below(max)
        };
        let p = if self.chance(20) {
            p.saturating_sub(1)
        } else {
            p
        };
        p.min(max - 1)
    }
}

const ARENA_PAGES: u64 = 12 * GRANULE_PAGES;
const FILE_PAGES: u64 = 4 * GRANULE_PAGES;
const MAX_PROCESSES: usize = 5;

/// What one page of a process's arena shows.
#[derive(Clone, Copy, PartialEq)]
struct Slot {
    file: usize,
    page: u64,
    prot: u64,
}

struct Process {
    peer: Peer,
    base: u64,
    slots: BTreeMap<u64, Slot>,
}

struct FileState {
    fd: OwnedFd,
    model: Model,
}

struct World {
    dice: Dice,
    files: Vec<FileState>,
    processes: Vec<Process>,
    spawned: u64,
    max_processes: usize,
    group: Option<Cgroup>,
    flips: bool,
    sharing: bool,
    most_links: u64,
    log: VecDeque<String>,
}

/// What a program would observe.
#[derive(Debug, PartialEq)]
enum Expected {
    Fine,
    Signal(i32, i32),
}

impl World {
    fn new(ctx: &Ctx, seed: u64, files: Vec<OwnedFd>, max_processes: usize) -> Res<World> {
        ctx.opt_in()?;
        let files = files.into_iter().enumerate().map(|(i, fd)| FileState {
            fd,
            model: Model::new(seed ^ ((i as u64 + 1) << 56), 0),
        });
        let mut w = World {
            dice: Dice::new(seed),
            files: files.collect(),
            processes: vec![],
            spawned: 0,
            max_processes,
            group: None,
            flips: false,
            sharing: ctx.sharing,
            most_links: 0,
            log: VecDeque::new(),
        };
        for f in &mut w.files {
            f.model.truncate(&f.fd, FILE_PAGES)?;
            f.model.fill(&f.fd, 0..FILE_PAGES / 2)?;
        }
        for _ in 0..max_processes.min(3) {
            w.spawn()?;
        }
        Ok(w)
    }

    fn note(&mut self, what: String) {
        if self.log.len() == 16 {
            self.log.pop_front();
        }
        self.log.push_back(what);
    }

    fn spawn(&mut self) -> Res {
        // Each process has its arena somewhere else, at a granule's border, far from where the
        // kernel puts mappings by itself.
        self.spawned += 1;
        let base = 0x1000_0000_0000 + self.spawned * (1 << 36) + self.dice.below(1000) * GRANULE;
        self.note(format!("spawn {} at {base:#x}", self.processes.len()));
        self.processes.push(Process {
            peer: Peer::spawn()?,
            base,
            slots: BTreeMap::new(),
        });
        let last = self.processes.len() - 1;
        self.map(last)
    }

    /// A process, by lot.
    fn pick(&mut self) -> usize {
        self.dice.below(self.processes.len() as u64) as usize
    }

    fn expected(&self, i: usize, vpn: u64, write: bool) -> Expected {
        match self.processes[i].slots.get(&vpn) {
            None => Expected::Signal(libc::SIGSEGV, sys::SEGV_MAPERR),
            Some(s) if s.prot == NONE || (write && s.prot != RW) => {
                Expected::Signal(libc::SIGSEGV, sys::SEGV_ACCERR)
            }
            Some(s) if s.page >= self.files[s.file].model.pages.len() as u64 => {
                Expected::Signal(libc::SIGBUS, sys::BUS_ADRERR)
            }
            Some(_) => Expected::Fine,
        }
    }

    fn compare<T: std::fmt::Debug>(expected: &Expected, got: &Result<T, Fault>, what: &str) -> Res {
        let right = match (expected, got) {
            (Expected::Fine, Ok(_)) => true,
            (Expected::Signal(s, c), Err(f)) => f.signal == *s && f.code == *c,
            _ => false,
        };
        ensure!(right, "{what}: expected {expected:?}, got {got:?}");
        Ok(())
    }

    fn address(&self, i: usize, vpn: u64) -> u64 {
        self.processes[i].base + vpn * PAGE
    }

    // ---- operations on mappings ----

    fn map(&mut self, i: usize) -> Res {
        let file = self.dice.below(self.files.len() as u64) as usize;
        let first = self.dice.place(FILE_PAGES);
        // Sometimes reaches beyond the file's end.
        let len = self.dice.length(FILE_PAGES + 64 - first);
        let mut vpn = self.dice.place(ARENA_PAGES);
        if self.dice.chance(85) {
            vpn = vpn / GRANULE_PAGES * GRANULE_PAGES + first % GRANULE_PAGES;
        }
        let len = len.min(ARENA_PAGES.saturating_sub(vpn));
        if len == 0 {
            return Ok(());
        }
        let prot = [RW, RW, RW, RO, NONE][self.dice.below(5) as usize];
        self.note(format!(
            "process {i} maps file {file} pages {first}+{len} at {vpn} prot {prot}"
        ));
        let (addr, fd) = (self.address(i, vpn), self.files[file].fd.as_raw_fd());
        let p = &mut self.processes[i];
        let got = p
            .peer
            .mmap(addr, len * PAGE, prot, SHARED | FIXED, fd, first * PAGE)?;
        ensure_eq!(got, Ok(addr), "mmap");
        for n in 0..len {
            p.slots.insert(
                vpn + n,
                Slot {
                    file,
                    page: first + n,
                    prot,
                },
            );
        }
        Ok(())
    }

    fn unmap(&mut self, i: usize) -> Res {
        let vpn = self.dice.place(ARENA_PAGES);
        let len = self.dice.length(ARENA_PAGES - vpn);
        self.note(format!("process {i} unmaps {vpn}+{len}"));
        let addr = self.address(i, vpn);
        let p = &mut self.processes[i];
        p.peer.munmap(addr, len * PAGE)?;
        for n in vpn..vpn + len {
            p.slots.remove(&n);
        }
        Ok(())
    }

    /// A run of mapped pages: all with one protection and of consecutive pages of one file when
    /// `uniform`, else merely without holes.
    fn run(&mut self, i: usize, uniform: bool) -> Option<(u64, u64, Slot)> {
        let count = self.processes[i].slots.len() as u64;
        if count == 0 {
            return None;
        }
        let want = self.dice.length(ARENA_PAGES);
        let at = if self.dice.chance(50) {
            self.dice.place(ARENA_PAGES)
        } else {
            self.dice.below(ARENA_PAGES)
        };
        let slots = &self.processes[i].slots;
        let (&vpn, &slot) = slots.range(at..).next().or_else(|| slots.iter().next())?;
        let mut len = 1;
        while len < want {
            match slots.get(&(vpn + len)) {
                Some(s)
                    if !uniform
                        || *s
                            == (Slot {
                                page: slot.page + len,
                                ..slot
                            }) =>
                {
                    len += 1
                }
                _ => break,
            }
        }
        Some((vpn, len, slot))
    }

    fn protect(&mut self, i: usize) -> Res {
        let Some((vpn, len, _)) = self.run(i, false) else {
            return Ok(());
        };
        let prot = [RW, RW, RO, NONE][self.dice.below(4) as usize];
        self.note(format!("process {i} protects {vpn}+{len} to {prot}"));
        let addr = self.address(i, vpn);
        let p = &mut self.processes[i];
        p.peer.mprotect(addr, len * PAGE, prot)??;
        for n in vpn..vpn + len {
            if let Some(s) = p.slots.get_mut(&n) {
                s.prot = prot;
            }
        }
        Ok(())
    }

    fn advise(&mut self, i: usize) -> Res {
        const COLLAPSE: i32 = 25;
        let hints = [
            libc::MADV_DONTNEED,
            libc::MADV_DONTNEED,
            libc::MADV_DONTNEED,
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_WILLNEED,
            libc::MADV_RANDOM,
            libc::MADV_NORMAL,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_DONTDUMP,
            libc::MADV_DODUMP,
            libc::MADV_POPULATE_READ,
            libc::MADV_POPULATE_WRITE,
            COLLAPSE,
        ];
        let advice = hints[self.dice.below(hints.len() as u64) as usize];
        let Some((vpn, len, _)) = self.run(i, false) else {
            return Ok(());
        };
        self.note(format!("process {i} advises {vpn}+{len}: {advice}"));
        let addr = self.address(i, vpn);
        let r = self.processes[i].peer.madvise(addr, len * PAGE, advice)?;
        // The others may fail for good reasons: locked, protected, beyond the end, no huge page.
        if matches!(
            advice,
            libc::MADV_WILLNEED | libc::MADV_RANDOM | libc::MADV_NORMAL | libc::MADV_DODUMP
        ) {
            r?;
        }
        Ok(())
    }

    fn remove(&mut self, i: usize) -> Res {
        let Some((vpn, len, slot)) = self.run(i, true) else {
            return Ok(());
        };
        self.note(format!(
            "process {i} removes {vpn}+{len} (file {} page {})",
            slot.file, slot.page
        ));
        let addr = self.address(i, vpn);
        let r = self.processes[i]
            .peer
            .madvise(addr, len * PAGE, libc::MADV_REMOVE)?;
        match r {
            // Locked parts refuse before anything is removed only when they come first.
            Err(Errno(libc::EINVAL)) => self.relearn_holes(slot.file, slot.page, len),
            Err(Errno(libc::EACCES)) if slot.prot != RW => Ok(()),
            r => {
                r?;
                self.holes(slot.file, slot.page, len);
                Ok(())
            }
        }
    }

    fn holes(&mut self, file: usize, page: u64, len: u64) {
        let g = &mut self.files[file].model.pages;
        let end = (page + len).min(g.len() as u64);
        if page < end {
            g[page as usize..end as usize].fill(0);
        }
    }

    /// After a MADV_REMOVE that stopped half way: each page is a hole or what it was.
    fn relearn_holes(&mut self, file: usize, page: u64, len: u64) -> Res {
        let f = &mut self.files[file];
        let end = (page + len).min(f.model.pages.len() as u64);
        for n in page..end {
            let mut word = [0; 8];
            sys::pread(&f.fd, &mut word, n * PAGE)?;
            if word == [0; 8] {
                f.model.pages[n as usize] = 0;
            }
        }
        Ok(())
    }

    fn lock(&mut self, i: usize) -> Res {
        let Some((vpn, len, _)) = self.run(i, false) else {
            return Ok(());
        };
        let len = len.min(64);
        let call =
            [libc::SYS_mlock, libc::SYS_munlock, libc::SYS_munlock][self.dice.below(3) as usize];
        self.note(format!(
            "process {i} {} {vpn}+{len}",
            if call == libc::SYS_mlock {
                "locks"
            } else {
                "unlocks"
            }
        ));
        // Fails for PROT_NONE and beyond the end of a file, with the flag set all the same.
        self.processes[i]
            .peer
            .syscall(call, &[self.address(i, vpn), len * PAGE])?
            .ok();
        Ok(())
    }

    fn remap(&mut self, i: usize) -> Res {
        let Some((vpn, len, slot)) = self.run(i, true) else {
            return Ok(());
        };
        // To free space only, so that a refusal leaves everything as it was.
        let mut to = self.dice.place(ARENA_PAGES);
        if self.dice.chance(70) {
            to = to / GRANULE_PAGES * GRANULE_PAGES + slot.page % GRANULE_PAGES;
        }
        let new_len = if self.dice.chance(70) {
            len
        } else {
            self.dice.length(2 * len)
        };
        let p = &self.processes[i];
        let clear = p.slots.range(to..to + new_len).next().is_none();
        if !clear || to + new_len > ARENA_PAGES || (to < vpn + len && vpn < to + new_len) {
            return Ok(());
        }
        self.note(format!("process {i} moves {vpn}+{len} to {to}+{new_len}"));
        let (from, dest) = (self.address(i, vpn), self.address(i, to));
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let p = &mut self.processes[i];
        match p.peer.syscall(
            libc::SYS_mremap,
            &[from, len * PAGE, new_len * PAGE, flags, dest],
        )? {
            // The pages are consecutive but in more than one mapping. Shrinking cuts the old tail
            // before that is noticed, so what is left is asked from the kernel.
            Err(Errno(libc::EFAULT)) if new_len >= len => {}
            Err(Errno(libc::EFAULT | libc::EAGAIN)) => {
                for n in vpn..vpn + len {
                    let mut v = [0u8; 1];
                    let here = p.peer.call(
                        |a, _| {
                            let mut v = 0u8;
                            (
                                crate::peer::flat(sys::syscall(
                                    libc::SYS_mincore,
                                    &[a[0], PAGE, &mut v as *mut u8 as u64],
                                )),
                                vec![],
                            )
                        },
                        &[p.base + n * PAGE],
                        &[],
                    )?;
                    v[0] = u8::from(here.0 == 0);
                    if v[0] == 0 {
                        p.slots.remove(&n);
                    }
                }
            }
            r => {
                ensure_eq!(r, Ok(dest), "mremap");
                for n in vpn..vpn + len {
                    p.slots.remove(&n);
                }
                for n in 0..new_len {
                    p.slots.insert(
                        to + n,
                        Slot {
                            page: slot.page + n,
                            ..slot
                        },
                    );
                }
            }
        }
        Ok(())
    }

    /// A second mapping of the same pages: by mremap of size 0, or by moving the tables with
    /// MREMAP_DONTUNMAP, after which the old place shows the file again too.
    fn duplicate(&mut self, i: usize) -> Res {
        let Some((vpn, len, slot)) = self.run(i, true) else {
            return Ok(());
        };
        let mut to = self.dice.place(ARENA_PAGES);
        if self.dice.chance(70) {
            to = to / GRANULE_PAGES * GRANULE_PAGES + slot.page % GRANULE_PAGES;
        }
        let p = &self.processes[i];
        let clear = p.slots.range(to..to + len).next().is_none();
        if !clear || to + len > ARENA_PAGES {
            return Ok(());
        }
        let moved = self.dice.chance(50);
        self.note(format!(
            "process {i} duplicates {vpn}+{len} at {to}{}",
            if moved { " by MREMAP_DONTUNMAP" } else { "" }
        ));
        let (from, dest) = (self.address(i, vpn), self.address(i, to));
        let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (old, flags) = match moved {
            true => (len, fixed | libc::MREMAP_DONTUNMAP),
            false => (0, fixed),
        };
        let a = [from, old * PAGE, len * PAGE, flags as u64, dest];
        let p = &mut self.processes[i];
        match p.peer.syscall(libc::SYS_mremap, &a)? {
            // The pages are consecutive but in more than one mapping.
            Err(Errno(libc::EFAULT)) if moved => return Ok(()),
            // Of locked memory.
            Err(Errno(libc::EAGAIN)) => return Ok(()),
            r => ensure_eq!(r, Ok(dest), "mremap"),
        }
        for n in 0..len {
            let page = slot.page + n;
            p.slots.insert(to + n, Slot { page, ..slot });
        }
        Ok(())
    }

    fn foreign(&mut self, i: usize) -> Res {
        // Something else mapped over part of it, and taken away again.
        let vpn = self.dice.place(ARENA_PAGES);
        let len = self.dice.length(64.min(ARENA_PAGES - vpn));
        self.note(format!(
            "process {i} maps private memory over {vpn}+{len} and unmaps it"
        ));
        let addr = self.address(i, vpn);
        let p = &mut self.processes[i];
        p.peer
            .mmap(addr, len * PAGE, RW, sys::PRIVATE | ANON | FIXED, -1, 0)??;
        ensure_eq!(p.peer.load(addr)?, Ok(0), "fresh private memory");
        p.peer.store(addr, 0xdead)??;
        p.peer.munmap(addr, len * PAGE)?;
        for n in vpn..vpn + len {
            p.slots.remove(&n);
        }
        Ok(())
    }

    // ---- operations on processes ----

    fn fork(&mut self, i: usize) -> Res {
        if self.processes.len() >= self.max_processes {
            return Ok(());
        }
        self.note(format!("process {i} forks into {}", self.processes.len()));
        let p = &self.processes[i];
        let child = Process {
            peer: p.peer.fork()?,
            base: p.base,
            slots: p.slots.clone(),
        };
        self.processes.push(child);
        Ok(())
    }

    fn leave(&mut self, i: usize) -> Res {
        if self.processes.len() < 2 {
            return Ok(());
        }
        self.note(format!("process {i} goes"));
        let p = self.processes.remove(i);
        if self.dice.chance(50) {
            p.peer.exit()?;
        }
        if self.processes.len() < 2 && self.max_processes > 1 {
            self.spawn()?;
        }
        Ok(())
    }

    // ---- operations on files ----

    fn truncate(&mut self) -> Res {
        let n = self.dice.below(self.files.len() as u64) as usize;
        let size = if self.dice.chance(60) {
            FILE_PAGES
        } else {
            self.dice.place(FILE_PAGES)
        };
        self.note(format!("file {n} is cut to {size}"));
        let f = &mut self.files[n];
        f.model.truncate(&f.fd, size)
    }

    fn punch(&mut self) -> Res {
        let n = self.dice.below(self.files.len() as u64) as usize;
        let lo = self.dice.place(FILE_PAGES);
        let len = self.dice.length(FILE_PAGES - lo);
        self.note(format!("file {n} gets a hole {lo}+{len}"));
        sys::punch(&self.files[n].fd, lo * PAGE, len * PAGE)?;
        self.holes(n, lo, len);
        Ok(())
    }

    fn pwrite(&mut self) -> Res {
        let n = self.dice.below(self.files.len() as u64) as usize;
        let size = self.files[n].model.pages.len() as u64;
        if size == 0 {
            return Ok(());
        }
        let page = self.dice.place(size);
        self.note(format!("file {n} page {page} is written by descriptor"));
        let f = &mut self.files[n];
        f.model.pwrite(&f.fd, page)
    }

    // ---- accesses ----

    fn store(&mut self, i: usize) -> Res {
        let vpn = self.some_page(i);
        let expected = self.expected(i, vpn, true);
        let addr = self.address(i, vpn);
        let slot = self.processes[i].slots.get(&vpn).copied();
        let (seed, page, g) = match slot {
            Some(s) => {
                let m = &mut self.files[s.file].model;
                (m.seed, s.page, m.next())
            }
            None => (0, 0, 0),
        };
        self.note(format!(
            "process {i} stores to {vpn} ({slot:?}), expecting {expected:?}",
            slot = slot.map(|s| (s.file, s.page, s.prot))
        ));
        let (r, d) =
            self.processes[i]
                .peer
                .call(STORE_PAGE, &[addr, seed, page, u64::from(g)], &[])?;
        World::compare(&expected, &unpack(r, &d), "store")?;
        if let (Expected::Fine, Some(s)) = (expected, slot) {
            self.files[s.file].model.pages[s.page as usize] = g;
        }
        Ok(())
    }

    fn some_page(&mut self, i: usize) -> u64 {
        if self.dice.chance(10) {
            return self.dice.below(ARENA_PAGES);
        }
        self.run(i, false)
            .map_or(0, |(vpn, len, _)| vpn + self.dice.below(len))
    }

    fn load(&mut self, i: usize) -> Res {
        let vpn = self.some_page(i);
        let expected = self.expected(i, vpn, false);
        self.note(format!(
            "process {i} loads from {vpn}, expecting {expected:?}"
        ));
        let got = self.processes[i].peer.load(self.address(i, vpn))?;
        World::compare(&expected, &got, "load")?;
        if let (Ok(word), Some(s)) = (got, self.processes[i].slots.get(&vpn)) {
            let m = &self.files[s.file].model;
            let want = crate::oracle::first_word(m.seed, s.page, m.pages[s.page as usize]);
            ensure_eq!(
                word,
                want,
                "process {i} page {vpn} (file {} page {})",
                s.file,
                s.page
            );
        }
        Ok(())
    }

    /// process_vm_writev or process_vm_readv of one page of a process.
    fn transfer(&self, i: usize, vpn: u64, bytes: &mut [u8], write: bool) -> sys::Sys<u64> {
        let nr = match write {
            true => libc::SYS_process_vm_writev,
            false => libc::SYS_process_vm_readv,
        };
        let local = [bytes.as_mut_ptr() as u64, PAGE];
        let remote = [self.address(i, vpn), PAGE];
        let pid = self.processes[i].peer.pid as u64;
        let [local, remote] = [&local, &remote].map(|v| v.as_ptr() as u64);
        sys::syscall(nr, &[pid, local, 1, remote, 1, 0])
    }

    /// What the kernel answers where an access would fault.
    fn compare_call(expected: &Expected, got: sys::Sys<u64>, what: &str) -> Res {
        let wanted = match expected {
            Expected::Fine => Ok(PAGE),
            Expected::Signal(..) => Err(Errno(libc::EFAULT)),
        };
        ensure_eq!(got, wanted, "{what}");
        Ok(())
    }

    fn store_from_outside(&mut self, i: usize) -> Res {
        let vpn = self.some_page(i);
        let expected = self.expected(i, vpn, true);
        self.note(format!(
            "page {vpn} of process {i} is written from outside, expecting {expected:?}"
        ));
        let slot = self.processes[i].slots.get(&vpn).copied();
        let (mut bytes, g) = match slot {
            Some(s) => {
                let m = &mut self.files[s.file].model;
                let g = m.next();
                (crate::oracle::page_bytes(m.seed, s.page, g), g)
            }
            None => (vec![0xee; PAGE as usize], 0),
        };
        let got = self.transfer(i, vpn, &mut bytes, true);
        World::compare_call(&expected, got, "process_vm_writev")?;
        if let (Expected::Fine, Some(s)) = (expected, slot) {
            self.files[s.file].model.pages[s.page as usize] = g;
        }
        Ok(())
    }

    fn load_from_outside(&mut self, i: usize) -> Res {
        let vpn = self.some_page(i);
        let expected = self.expected(i, vpn, false);
        self.note(format!(
            "page {vpn} of process {i} is read from outside, expecting {expected:?}"
        ));
        let mut bytes = vec![0; PAGE as usize];
        let got = self.transfer(i, vpn, &mut bytes, false);
        World::compare_call(&expected, got, "process_vm_readv")?;
        self.diagnose(i, vpn, &expected, &bytes)
    }

    /// Compares a page that was read somehow with the model.
    fn diagnose(&self, i: usize, vpn: u64, expected: &Expected, bytes: &[u8]) -> Res {
        if let (Expected::Fine, Some(s)) = (expected, self.processes[i].slots.get(&vpn)) {
            let m = &self.files[s.file].model;
            let g = m.pages[s.page as usize];
            if let Some(why) = crate::oracle::diagnose(m.seed, s.page, g, bytes) {
                crate::fail!("process {i} page {vpn} (file {}): {why}", s.file);
            }
        }
        Ok(())
    }

    /// vmsplice, which takes a reference to the page by GUP-fast.
    fn splice(&mut self, i: usize) -> Res {
        let vpn = self.some_page(i);
        let expected = self.expected(i, vpn, false);
        self.note(format!("process {i} splices {vpn}, expecting {expected:?}"));
        let splice: crate::peer::Remote = |a, _| {
            let mut ends = [0i32; 2];
            let mut bytes = vec![0; PAGE as usize];
            let r = sys::syscall(libc::SYS_pipe2, &[ends.as_mut_ptr() as u64, 0]).and_then(|_| {
                let [from, to] = ends.map(|fd| crate::harness::own(fd as u64));
                let iov = [a[0], PAGE];
                let a = [to.as_raw_fd() as u64, iov.as_ptr() as u64, 1, 0];
                let n = sys::syscall(libc::SYS_vmsplice, &a)?;
                let a = [from.as_raw_fd() as u64, bytes.as_mut_ptr() as u64, n];
                sys::syscall(libc::SYS_read, &a)
            });
            (crate::peer::flat(r), bytes)
        };
        let addr = self.address(i, vpn);
        let (r, bytes) = self.processes[i].peer.call(splice, &[addr], &[])?;
        let got = match r {
            0.. => Ok(r as u64),
            _ => Err(Errno(-r as i32)),
        };
        World::compare_call(&expected, got, "vmsplice")?;
        self.diagnose(i, vpn, &expected, &bytes)
    }

    /// Everything a process may read, run by run.
    fn verify(&self, i: usize) -> Res {
        let p = &self.processes[i];
        let mut next = 0;
        while let Some((&vpn, slot)) = p.slots.range(next..).next() {
            let model = &self.files[slot.file].model;
            let mut len = 0;
            while p.slots.get(&(vpn + len)).is_some_and(|s| {
                s.prot != NONE
                    && s.file == slot.file
                    && s.page == slot.page + len
                    && s.page < model.pages.len() as u64
            }) {
                len += 1;
            }
            if len > 0 {
                model.verify_mapped(&p.peer, p.base + vpn * PAGE, slot.page..slot.page + len)?;
            }
            next = vpn + len.max(1);
        }
        Ok(())
    }

    fn verify_all(&mut self) -> Res {
        for i in 0..self.processes.len() {
            self.verify(i)?;
        }
        for f in &self.files {
            f.model.verify_file(&f.fd)?;
        }
        self.most_links = self.most_links.max(kernel::gauges().map_or(0, |g| g.links));
        Ok(())
    }

    // ---- the machine ----

    fn reclaim(&mut self) {
        if let Some(g) = &self.group {
            g.reclaim(16 << 20);
            self.note("reclaim".into());
        }
    }

    fn flip(&mut self) -> Res {
        if self.flips && self.sharing {
            let v = self.dice.below(3) as u32;
            self.note(format!("vm.ptshare = {v}"));
            kernel::set_mode(v)?;
        }
        Ok(())
    }

    /// The process asks for sharing, or no longer.
    fn ask(&mut self, i: usize) -> Res {
        if self.sharing {
            let on = self.dice.chance(75);
            self.note(format!("process {i} asks: {on}"));
            let a = [sys::PR_SET_PTSHARE, u64::from(on)];
            self.processes[i].peer.syscall(libc::SYS_prctl, &a)??;
        }
        Ok(())
    }

    /// All that the process maps goes to one memory node, as far as it can.
    fn migrate(&mut self, i: usize) -> Res {
        let to = 1u64 << self.dice.below(2);
        let from = 3 ^ to;
        self.note(format!("process {i} goes to nodes {to:#b}"));
        let pid = self.processes[i].peer.pid as u64;
        let [from, to] = [&from, &to].map(|v| v as *const u64 as u64);
        sys::syscall(libc::SYS_migrate_pages, &[pid, 64, from, to]).ok();
        Ok(())
    }

    /// process_madvise: hints by somebody else.
    fn advise_from_outside(&mut self, i: usize) -> Res {
        let Some((vpn, len, _)) = self.run(i, false) else {
            return Ok(());
        };
        let hints = [
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_WILLNEED,
            25, // MADV_COLLAPSE
        ];
        let advice = hints[self.dice.below(hints.len() as u64) as usize];
        self.note(format!("process {i} is advised {vpn}+{len}: {advice}"));
        let pid = self.processes[i].peer.pid as u64;
        let pidfd = crate::harness::own(sys::syscall(libc::SYS_pidfd_open, &[pid, 0])?);
        let range = [self.address(i, vpn), len * PAGE];
        let a = [
            pidfd.as_raw_fd() as u64,
            range.as_ptr() as u64,
            1,
            advice as u64,
            0,
        ];
        sys::syscall(libc::SYS_process_madvise, &a).ok();
        Ok(())
    }

    /// Writeback, where there is that.
    fn sync(&mut self) -> Res {
        let n = self.dice.below(self.files.len() as u64) as usize;
        self.note(format!("file {n} is synced"));
        sys::syscall(libc::SYS_fsync, &[self.files[n].fd.as_raw_fd() as u64])?;
        Ok(())
    }

    /// Now and then a process gets an MMU notifier, with a virtual machine, and shares no more.
    fn watch(&mut self, i: usize) -> Res {
        if self.dice.chance(8) && crate::kvm::available() {
            self.note(format!("process {i} gets a virtual machine"));
            crate::kvm::create(&self.processes[i].peer)?;
        }
        Ok(())
    }

    fn clear_refs(&mut self, i: usize) {
        self.note(format!("clear_refs of process {i}"));
        std::fs::write(
            format!("/proc/{}/clear_refs", self.processes[i].peer.pid),
            "4",
        )
        .ok();
    }

    fn step(&mut self) -> Res {
        let i = self.pick();
        match self.dice.below(120) {
            0..12 => self.map(i),
            12..16 => self.unmap(i),
            16..22 => self.protect(i),
            22..31 => self.advise(i),
            31..33 => self.remove(i),
            33..36 => self.remap(i),
            36..38 => self.lock(i),
            38..39 => self.foreign(i),
            39..42 => self.fork(i),
            42..44 => self.leave(i),
            44..46 => self.truncate(),
            46..50 => self.punch(),
            50..54 => self.pwrite(),
            54..72 => self.store(i),
            72..90 => self.load(i),
            90..94 => self.verify(i),
            94..96 => self.flip(),
            96..97 => {
                self.clear_refs(i);
                Ok(())
            }
            97..99 => {
                self.reclaim();
                Ok(())
            }
            99..100 => {
                if self.processes.len() < self.max_processes {
                    self.spawn()
                } else {
                    Ok(())
                }
            }
            100..103 => self.duplicate(i),
            103..106 => self.store_from_outside(i),
            106..109 => self.load_from_outside(i),
            109..112 => self.splice(i),
            112..114 => self.ask(i),
            114..116 => self.migrate(i),
            116..118 => self.advise_from_outside(i),
            118..119 => self.sync(),
            _ => self.watch(i),
        }
    }

    fn go(&mut self, seed: u64, walk: Walk) -> Res {
        for n in (0..).take_while(|n| walk.goes_on(*n)) {
            let r = self.step().and_then(|()| {
                if n % 100 == 99 {
                    self.verify_all()
                } else {
                    Ok(())
                }
            });
            if let Err(Stop::Fail(why)) = r {
                let log: Vec<_> = self.log.iter().cloned().collect();
                crate::fail!(
                    "seed {seed}, operation {n}: {why}; before it: {}",
                    log.join("; ")
                );
            }
        }
        self.verify_all()?;
        if self.sharing && !self.flips {
            ensure!(
                self.most_links > 0,
                "seed {seed}: no table was ever seen shared"
            );
        }
        Ok(())
    }
}

/// 1 500 steps, or a minute of them.
fn whole(ctx: &Ctx) -> Walk {
    ctx.walk(1_500, 60)
}

fn memfds() -> Res<Vec<OwnedFd>> {
    Ok(vec![sys::memfd(0)?, sys::memfd(0)?])
}

/// Two memory files, up to five processes.
fn few_files_many_operations(ctx: &Ctx) -> Res {
    World::new(ctx, ctx.seed, memfds()?, MAX_PROCESSES)?.go(ctx.seed, whole(ctx))
}

/// The same by other seeds.
fn other_seed(ctx: &Ctx) -> Res {
    for n in 1..3 {
        let seed = ctx.seed.wrapping_add(n * 1000);
        World::new(ctx, seed, memfds()?, MAX_PROCESSES)?.go(seed, ctx.walk(750, 30))?;
    }
    Ok(())
}

/// One process that maps the same file many times over.
fn one_process(ctx: &Ctx) -> Res {
    let seed = ctx.seed.wrapping_add(1);
    World::new(ctx, seed, vec![sys::memfd(0)?], 1)?.go(seed, whole(ctx))
}

/// With a memory cgroup that is reclaimed to swap in between.
fn with_swap(ctx: &Ctx) -> Res {
    let _swap = Swap::on(256)?;
    let group = Cgroup::enter()?;
    let seed = ctx.seed.wrapping_add(2);
    let mut w = World::new(ctx, seed, memfds()?, MAX_PROCESSES)?;
    w.group = Some(group);
    w.go(seed, whole(ctx))
}

/// With vm.ptshare changing all the time.
fn with_mode_flips(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let seed = ctx.seed.wrapping_add(3);
    let mut w = World::new(ctx, seed, memfds()?, MAX_PROCESSES)?;
    w.flips = true;
    w.go(seed, whole(ctx))
}

/// On a filesystem with writeback.
fn on_ext4(ctx: &Ctx) -> Res {
    let fs = crate::machine::Ext4::mount(128)?;
    let seed = ctx.seed.wrapping_add(4);
    let files = vec![fs.file("a")?.into(), fs.file("b")?.into()];
    World::new(ctx, seed, files, MAX_PROCESSES)?.go(seed, whole(ctx))
}
