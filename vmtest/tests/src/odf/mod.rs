//! On-demand fork: a child and its parent share their page tables until one of them writes, and nobody
//! can tell, except by the time it takes and by the counters.
//!
//! The oracle is one model a process: what each page of its memory must hold. A fork copies the model.
//! Every write is a generation that nothing else ever gets, so that a page which shows up with a
//! relative says whose write it was. With `--stock` the same is done by ordinary forks.

mod count;
mod fail;
mod files;
mod fuzz;
mod isolation;
mod madvise;
mod maps;
mod moves;
mod pins;
mod stale;
mod swap;
mod switch;
mod tree;

use crate::harness::{Ctx, Res, Test};
use crate::kernel;
use crate::machine::Setting;
use crate::oracle::{pages, Model, STORE_PAGE};
use crate::peer::{unpack, Peer, Remote};
use crate::sys::{self, ANON, GRANULE, NOREPLACE, PAGE, PRIVATE, RW};
use crate::{ensure, ensure_eq, skip};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// The tests of this group.
pub fn tests() -> Vec<Test> {
    [
        switch::tests(),
        isolation::tests(),
        pins::tests(),
        madvise::tests(),
        maps::tests(),
        files::tests(),
        swap::tests(),
        count::tests(),
        tree::tests(),
        moves::tests(),
        stale::tests(),
        fuzz::tests(),
        fail::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Where a process says that its forks are to share.
const SWITCH: &str = "/proc/self/use_odf";

/// Skips a test that is about the interface, and any other where a kernel that is to be tested lacks it.
fn need_switch(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    if !Path::new(SWITCH).exists() {
        skip!("this kernel has no on-demand fork");
    }
    Ok(())
}

/// Has a process's forks share from now on; nothing when `--stock`.
fn switch_on(ctx: &Ctx, pid: i32) -> Res {
    if ctx.sharing {
        need_switch(ctx)?;
        std::fs::write(format!("/proc/{pid}/use_odf"), "1")?;
    }
    Ok(())
}

/// The generation of the next write of anybody.
fn next() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// A process and what its memory must hold.
struct Kin {
    peer: Peer,
    /// Where page 0 is.
    base: u64,
    /// One generation for each page from there on.
    model: Model,
    /// A process on its own hints at its pages' nodes, which is a change of their PTEs.
    _quiet: Option<Setting>,
}

impl Kin {
    /// A process with `granules` of private memory, all of it written, whose forks share.
    fn new(ctx: &Ctx, granules: u64) -> Res<Kin> {
        let mut k = Kin::untouched(ctx, granules)?;
        k.fill(0..pages(granules))?;
        Ok(k)
    }

    /// The same before anything is written.
    fn untouched(ctx: &Ctx, granules: u64) -> Res<Kin> {
        let k = Kin::bare(ctx, granules)?;
        k.map(k.base, granules * GRANULE)?;
        k.peer
            .madvise(k.base, granules * GRANULE, libc::MADV_NOHUGEPAGE)??;
        Ok(k)
    }

    /// The same before anything is mapped; pages hold zeros.
    fn bare(ctx: &Ctx, granules: u64) -> Res<Kin> {
        let quiet = Setting::set("/proc/sys/kernel/numa_balancing", "0").ok();
        let peer = Peer::spawn()?;
        switch_on(ctx, peer.pid)?;
        Ok(Kin {
            base: peer.place(0, granules * GRANULE)?,
            peer,
            model: Model::new(ctx.seed, pages(granules)),
            _quiet: quiet,
        })
    }

    /// Maps private memory there.
    fn map(&self, addr: u64, len: u64) -> Res {
        let flags = PRIVATE | ANON | NOREPLACE;
        ensure_eq!(
            self.peer.mmap(addr, len, RW, flags, -1, 0)?,
            Ok(addr),
            "mmap"
        );
        Ok(())
    }

    /// A child, whatever it shares.
    fn fork(&self) -> Res<Kin> {
        Ok(self.adopt(self.peer.fork()?))
    }

    /// A child that was made in another way.
    fn adopt(&self, peer: Peer) -> Kin {
        Kin {
            peer,
            base: self.base,
            model: self.model.clone(),
            _quiet: None,
        }
    }

    /// A child that shares `tables` tables (unless `--stock`).
    fn child(&self, ctx: &Ctx, tables: u64) -> Res<Kin> {
        let before = Events::now();
        let child = self.fork()?;
        child.borrows(ctx, tables)?;
        if ctx.sharing {
            let shared = Events::now().since(&before).shared;
            ensure!(shared >= tables, "odf_table_shared rose by {shared} only");
        }
        Ok(child)
    }

    /// It uses `tables` tables that are not its own (unless `--stock`).
    fn borrows(&self, ctx: &Ctx, tables: u64) -> Res {
        if ctx.sharing {
            let got = kernel::tables_of(self.peer.pid)?;
            ensure_eq!(got, tables, "tables that process {} borrows", self.peer.pid);
        }
        Ok(())
    }

    /// The address of a page.
    fn at(&self, page: u64) -> u64 {
        self.base + page * PAGE
    }

    /// Writes a page.
    fn store(&mut self, page: u64) -> Res {
        let g = next();
        let a = [self.at(page), self.model.seed, page, u64::from(g)];
        let (r, d) = self.peer.call(STORE_PAGE, &a, &[])?;
        if let Err(f) = unpack(r, &d) {
            crate::fail!("process {}: store to page {page}: {f:?}", self.peer.pid);
        }
        self.model.pages[page as usize] = g;
        Ok(())
    }

    /// Writes all these pages.
    fn fill(&mut self, range: Range<u64>) -> Res {
        self.fill_every(1, range)
    }

    /// Writes every so many of these pages, from the first on.
    fn fill_every(&mut self, step: u64, range: Range<u64>) -> Res {
        let fill: Remote = |a, gens| {
            let stores = gens.chunks_exact(4).enumerate().try_fold(0, |_, (n, g)| {
                let page = a[2] + n as u64 * a[3];
                let g = u32::from_ne_bytes(g.try_into().unwrap_or_default());
                let bytes = crate::oracle::page_bytes(a[1], page, g);
                sys::copy(a[0] + page * PAGE, bytes.as_ptr() as u64, PAGE).map(|()| 0)
            });
            crate::peer::access(stores)
        };
        let mut gens = vec![];
        for page in range.clone().step_by(step as usize) {
            let g = next();
            self.model.pages[page as usize] = g;
            gens.extend(g.to_ne_bytes());
        }
        let a = [self.base, self.model.seed, range.start, step];
        let (r, d) = self.peer.call(fill, &a, &gens)?;
        if let Err(f) = unpack(r, &d) {
            crate::fail!("process {}: filling {range:?}: {f:?}", self.peer.pid);
        }
        Ok(())
    }

    /// Has the pages hold zeros from now on.
    fn zero(&mut self, range: Range<u64>) {
        self.model.pages[range.start as usize..range.end as usize].fill(0);
    }

    /// A new content for a page that comes from elsewhere: its bytes.
    fn incoming(&mut self, page: u64) -> Vec<u8> {
        let g = next();
        self.model.pages[page as usize] = g;
        crate::oracle::page_bytes(self.model.seed, page, g)
    }

    /// What the page holds.
    fn bytes(&self, page: u64) -> Vec<u8> {
        let g = self.model.pages[page as usize];
        crate::oracle::page_bytes(self.model.seed, page, g)
    }

    /// The first word of a page.
    fn word(&self, page: u64) -> u64 {
        crate::oracle::first_word(self.model.seed, page, self.model.pages[page as usize])
    }

    /// It sees what it must in these pages.
    fn sees(&self, range: Range<u64>) -> Res {
        self.model
            .verify_mapped(&self.peer, self.at(range.start), range)
    }

    /// It sees what it must everywhere.
    fn verify(&self) -> Res {
        self.sees(0..self.model.pages.len() as u64)
    }

    /// A load of the page's first word ends by this signal.
    fn faults(&self, page: u64, signal: i32, code: i32) -> Res {
        let got = self.peer.load(self.at(page))?;
        let right = matches!(got, Err(f) if f.signal == signal && f.code == code);
        ensure!(
            right,
            "process {} page {page}: expected signal {signal} code {code}, got {got:x?}",
            self.peer.pid
        );
        Ok(())
    }

    /// A system call that must succeed.
    fn must(&self, nr: i64, args: &[u64]) -> Res<u64> {
        match self.peer.syscall(nr, args)? {
            Ok(v) => Ok(v),
            Err(e) => crate::fail!("process {}: system call {nr}: {e}", self.peer.pid),
        }
    }

    /// madvise on a range of pages that must succeed.
    fn advise(&self, range: Range<u64>, advice: i32) -> Res {
        let len = (range.end - range.start) * PAGE;
        self.must(
            libc::SYS_madvise,
            &[self.at(range.start), len, advice as u64],
        )?;
        Ok(())
    }

    /// Reads what another process of the test has of it: the pagemap entry of a page.
    fn entry(&self, page: u64) -> Res<u64> {
        Ok(kernel::pagemap(self.peer.pid, self.at(page), 1)?[0])
    }

    /// How many of the pages have this bit in pagemap.
    fn count(&self, range: Range<u64>, bit: u64) -> Res<u64> {
        let n = range.end - range.start;
        let seen = kernel::pagemap(self.peer.pid, self.at(range.start), n)?;
        Ok(seen.iter().filter(|e| *e & bit != 0).count() as u64)
    }
}

/// All of them see what they must.
fn verify_all(kin: &[&Kin]) -> Res {
    kin.iter().try_for_each(|k| k.verify())
}

/// Everybody writes a page of each granule, and sees its own writes and nobody else's.
fn diverge(kin: &mut [&mut Kin]) -> Res {
    let granules = kin[0].model.pages.len() as u64 / sys::GRANULE_PAGES;
    for (i, k) in kin.iter_mut().enumerate() {
        for g in 0..granules {
            k.store(pages(g) + 3 + 5 * i as u64)?;
        }
    }
    kin.iter().try_for_each(|k| k.verify())
}

/// The events of /proc/vmstat; zeros on a kernel without them.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Events {
    shared: u64,
    copied: u64,
    reused: u64,
}

impl Events {
    fn now() -> Events {
        let [shared, copied, reused] = ["shared", "copied", "reused"]
            .map(|n| kernel::vmstat(&format!("odf_table_{n}")).unwrap_or(0));
        Events {
            shared,
            copied,
            reused,
        }
    }

    fn since(self, before: &Events) -> Events {
        Events {
            shared: self.shared - before.shared,
            copied: self.copied - before.copied,
            reused: self.reused - before.reused,
        }
    }

    /// Since this was taken, so many tables were copied and taken back (unless `--stock`).
    fn expect(&self, ctx: &Ctx, copied: u64, reused: u64) -> Res {
        if ctx.sharing {
            let since = Events::now().since(self);
            ensure_eq!(
                (since.copied, since.reused),
                (copied, reused),
                "tables copied and taken back"
            );
        }
        Ok(())
    }
}

/// A page's content in a file on a disk, to be read by direct I/O.
struct Disk {
    file: std::fs::File,
    direct: std::fs::File,
    _fs: crate::machine::Ext4,
}

impl Disk {
    fn new() -> Res<Disk> {
        use std::os::unix::fs::OpenOptionsExt;
        let fs = crate::machine::Ext4::mount(64)?;
        let file = fs.file("disk")?;
        let direct = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(fs.dir.join("disk"))?;
        Ok(Disk {
            file,
            direct,
            _fs: fs,
        })
    }

    /// Puts bytes at a page of the file.
    fn put(&self, page: u64, bytes: &[u8]) -> Res {
        sys::pwrite(&self.file, bytes, page * PAGE)?;
        Ok(self.file.sync_all()?)
    }

    /// What the disk has there.
    fn get(&self, page: u64) -> Res<Vec<u8>> {
        let at = sys::mmap(0, PAGE, RW, PRIVATE | ANON, -1, 0)?;
        sys::syscall(libc::SYS_pread64, &[self.raw(), at, PAGE, page * PAGE])?;
        let mut bytes = vec![0; PAGE as usize];
        sys::copy(bytes.as_mut_ptr() as u64, at, PAGE)?;
        sys::munmap(at, PAGE)?;
        Ok(bytes)
    }

    /// The descriptor for direct I/O, which children of the test have as well.
    fn raw(&self) -> u64 {
        self.direct.as_raw_fd() as u64
    }
}
