//! References to pages that the kernel takes by walking page tables without a lock, while those tables
//! are left, taken back and freed; and pins that outlive the mapping they were taken through.

use crate::concurrent::{
    foreign, mark, report, stressed, Crowd, FOREIGN, GRANULES, SYSCALL, UNEXPLAINED, WORKER,
};
use crate::harness::{own, Ctx, Res};
use crate::machine::Ext4;
use crate::ops::Dice;
use crate::oracle::{page_bytes, pages};
use crate::peer::{flat, Peer, Remote};
use crate::sys::{self, Errno, ANON, FIXED, GRANULE, GRANULE_PAGES, PAGE, PRIVATE, RO, RW, SHARED};
use crate::team::Team;
use crate::uring::{Ring, Transfer};
use crate::{ensure, ensure_eq, group, skip};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::Arc;
use std::time::{Duration, Instant};

group!("gup";
    fast_against_tables_that_go(240),
    fast_against_the_last_sharer(180),
    fixed_buffer_outlives_its_mapping,
    fixed_buffer_of_a_page_that_went,
    vmsplice_outlives_its_mapping,
);

fn direct(path: &Path) -> Res<File> {
    Ok(OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?)
}

// ---- the race ----

/// Descriptors that the workers inherit: a file that holds each page's mark, and one to write to, both
/// for direct I/O.
static SOURCE: AtomicU64 = AtomicU64::new(0);
static SINK: AtomicU64 = AtomicU64::new(0);

/// What one transfer met.
enum Met {
    /// It was done.
    Done,
    /// Nothing is mapped there just now, or it may not be written.
    Nothing,
    /// A test failure.
    Wrong(i64, String),
}

/// The thread that lets the kernel walk the tables.
struct Walker {
    dice: Dice,
    arena: u64,
    buffer: u64,
    pipe: [OwnedFd; 2],
    gup_test: Option<File>,
}

impl Walker {
    fn new(seed: u64, arena: u64) -> sys::Sys<Walker> {
        let mut ends = [0i32; 2];
        sys::syscall(libc::SYS_pipe2, &[ends.as_mut_ptr() as u64, 0])?;
        Ok(Walker {
            dice: Dice::new(seed),
            arena,
            buffer: sys::mmap(0, PAGE, RW, PRIVATE | ANON, -1, 0)?,
            // SAFETY: the kernel has just made these descriptors.
            pipe: ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            gup_test: OpenOptions::new()
                .read(true)
                .write(true)
                .open("/sys/kernel/debug/gup_test")
                .ok(),
        })
    }

    /// Does the buffer hold nothing but the page's mark or zeros?
    fn check(&self, page: u64, how: &str) -> Met {
        for word in (0..PAGE).step_by(8) {
            match sys::load64(self.buffer + word) {
                Ok(v) if foreign(page, v) => {
                    return Met::Wrong(
                        FOREIGN,
                        format!(
                            "page {page} by {how} holds {v:#x}, its mark is {:#x}",
                            mark(page)
                        ),
                    )
                }
                Ok(_) => {}
                Err(f) => return Met::Wrong(UNEXPLAINED, format!("own buffer: {f:?}")),
            }
        }
        Met::Done
    }

    fn outcome(r: sys::Sys<u64>, how: &str) -> Met {
        match r {
            Ok(n) if n == PAGE => Met::Done,
            Ok(n) => Met::Wrong(SYSCALL, format!("{how}: {n} bytes")),
            Err(Errno(libc::EFAULT)) => Met::Nothing,
            Err(e) => Met::Wrong(SYSCALL, format!("{how}: {e}")),
        }
    }

    fn step(&mut self) -> Met {
        let page = self.dice.below(pages(GRANULES));
        let (addr, at) = (self.arena + page * PAGE, page * PAGE);
        let io = |nr: i64, fd: u64, addr: u64| sys::syscall(nr, &[fd, addr, PAGE, at]);
        match self.dice.below(11) {
            // The device reads the page: direct write, and what arrived is looked at.
            0..4 => {
                let sink = SINK.load(SeqCst);
                match Walker::outcome(io(libc::SYS_pwrite64, sink, addr), "direct write") {
                    Met::Done => {}
                    met => return met,
                }
                match Walker::outcome(io(libc::SYS_pread64, sink, self.buffer), "direct read") {
                    Met::Done => self.check(page, "direct write"),
                    met => met,
                }
            }
            // The device writes the page.
            4..6 => Walker::outcome(
                io(libc::SYS_pread64, SOURCE.load(SeqCst), addr),
                "direct read",
            ),
            // The page itself goes into a pipe, and is read later.
            6..8 => {
                let iov = [addr, PAGE];
                let [from, to] = [0, 1].map(|end: usize| self.pipe[end].as_raw_fd() as u64);
                let r = sys::syscall(libc::SYS_vmsplice, &[to, iov.as_ptr() as u64, 1, 0]);
                match Walker::outcome(r, "vmsplice") {
                    Met::Done => {}
                    met => return met,
                }
                let r = sys::syscall(libc::SYS_read, &[from, self.buffer, PAGE]);
                match Walker::outcome(r, "read from the pipe") {
                    Met::Done => self.check(page, "vmsplice"),
                    met => met,
                }
            }
            // Page by page, with the mm's lock.
            8 => {
                let (local, remote) = ([self.buffer, PAGE], [addr, PAGE]);
                let me = std::process::id();
                let a = [
                    u64::from(me),
                    local.as_ptr() as u64,
                    1,
                    remote.as_ptr() as u64,
                    1,
                    0,
                ];
                match Walker::outcome(sys::syscall(libc::SYS_process_vm_readv, &a), "its read") {
                    Met::Done => self.check(page, "process_vm_readv"),
                    met => met,
                }
            }
            // Many pages at once.
            _ => {
                let Some(f) = &self.gup_test else {
                    return Met::Nothing;
                };
                let n = (pages(GRANULES) - page).min(64);
                // GUP_FAST_BENCHMARK and PIN_FAST_BENCHMARK, for reading or writing.
                let cmd = 1 + self.dice.below(2);
                let write = self.dice.below(2);
                gup_test(f, cmd, addr, n, write).ok();
                Met::Done
            }
        }
    }
}

/// GUP_TEST of `n` pages, of which it says how many it got.
fn gup_test(f: &File, nr: u64, addr: u64, n: u64, write: u64) -> sys::Sys<u64> {
    let size = 4 * 8 + 3 * 4 + 8 * 4 + 4;
    let cmd = (3 << 30) | (size << 16) | (u64::from(b'g') << 8) | nr;
    // struct gup_test: get_delta, put_delta, addr, size, nr_pages_per_call, gup_flags, test_flags,
    // which_pages[8].
    let mut arg = [0u64, 0, addr, n * PAGE, n | (write << 32), 0, 0, 0, 0, 0];
    sys::syscall(
        libc::SYS_ioctl,
        &[f.as_raw_fd() as u64, cmd, arg.as_mut_ptr() as u64],
    )?;
    Ok(arg[3] / PAGE)
}

/// A walker that has done fewer transfers goes on for some time: the machine may be busy with others.
const LEAST: u64 = 20;
const GRACE: Duration = Duration::from_secs(30);

/// In a worker: one thread lets the kernel walk the tables, the other leaves them, frees them and
/// comes back. Arguments as for every worker: fd, seed, milliseconds, arena.
const WALKED: Remote = |a, _| {
    let (fd, seed, arena) = (a[0] as i32, a[1], a[3]);
    let end = Instant::now() + Duration::from_millis(a[2]);
    let len = GRANULES * GRANULE;
    if sys::mmap(arena, len, RW, SHARED | FIXED, fd, 0).is_err() {
        return report(SYSCALL, "mmap".into());
    }
    let wrong = Arc::new(AtomicBool::new(false));
    let walker = {
        let wrong = wrong.clone();
        std::thread::spawn(move || {
            sys::pin_to_cpu(seed as usize + 1);
            let mut w = match Walker::new(!seed, arena) {
                Ok(w) => w,
                Err(e) => return (SYSCALL, e.to_string(), 0),
            };
            let mut done = 0u64;
            while Instant::now() < end || (done < LEAST && Instant::now() < end + GRACE) {
                match w.step() {
                    Met::Done => done += 1,
                    Met::Nothing => {}
                    Met::Wrong(code, why) => {
                        wrong.store(true, SeqCst);
                        return (code, why, done);
                    }
                }
            }
            (0, String::new(), done)
        })
    };
    sys::pin_to_cpu(seed as usize);
    let mut dice = Dice::new(seed);
    while !walker.is_finished() && !wrong.load(SeqCst) {
        let granule = dice.below(GRANULES) * GRANULE;
        let (addr, bytes) = (arena + granule, GRANULE);
        let r = match dice.below(8) {
            0 => sys::syscall(libc::SYS_munmap, &[addr, bytes]),
            1 => sys::syscall(
                libc::SYS_madvise,
                &[addr, bytes, libc::MADV_DONTNEED as u64],
            ),
            2 => sys::syscall(libc::SYS_mprotect, &[addr, bytes, RO]),
            3 => sys::syscall(libc::SYS_munmap, &[addr + 9 * PAGE, 9 * PAGE]),
            4 => sys::mmap(arena, len, RW, SHARED | FIXED, fd, 0),
            _ => sys::mmap(addr, bytes, RW, SHARED | FIXED, fd, granule),
        };
        match r {
            // Something in the range is unmapped already.
            Ok(_) | Err(Errno(libc::ENOMEM)) => {}
            Err(e) => return report(SYSCALL, e.to_string()),
        }
        // Attach, here and there.
        for _ in 0..4 {
            let page = dice.below(pages(GRANULES));
            match sys::load64(arena + page * PAGE) {
                Ok(v) if foreign(page, v) => {
                    return report(
                        FOREIGN,
                        format!("page {page} holds {v:#x}, its mark is {:#x}", mark(page)),
                    )
                }
                _ => {}
            }
        }
    }
    match walker.join() {
        Ok((0, _, done)) if done >= LEAST => (0, vec![]),
        Ok((0, _, done)) => report(UNEXPLAINED, format!("only {done} transfers were done")),
        Ok((code, why, _)) => report(code, why),
        Err(_) => report(UNEXPLAINED, "the walking thread panicked".into()),
    }
};

/// In a worker: memory of its own, which takes up frames that others free, and must stay as it is.
const BYSTANDER: Remote = |a, _| {
    let end = Instant::now() + Duration::from_millis(a[2]);
    let value = 0xb157_a4de_0000_0000 | a[1] & 0xffff;
    while Instant::now() < end {
        let Ok(at) = sys::mmap(0, GRANULE, RW, PRIVATE | ANON, -1, 0) else {
            return report(SYSCALL, "mmap".into());
        };
        sys::syscall(
            libc::SYS_madvise,
            &[at, GRANULE, libc::MADV_NOHUGEPAGE as u64],
        )
        .ok();
        for turn in 0..2 {
            for word in (0..GRANULE).step_by(512) {
                let r = match turn {
                    0 => sys::store64(at + word, value + word).map(|()| value + word),
                    _ => sys::load64(at + word),
                };
                if r != Ok(value + word) {
                    let what = format!("private memory at {:#x} holds {r:x?}", at + word);
                    return report(FOREIGN, what);
                }
            }
        }
        sys::munmap(at, GRANULE).ok();
    }
    (0, vec![])
};

fn race(ctx: &Ctx, walkers: usize, workers: usize) -> Res {
    let fs = Ext4::mount(64)?;
    let prepare = |name: &str| -> Res<File> {
        let f = fs.file(name)?;
        for page in 0..pages(GRANULES) {
            let bytes: Vec<u8> = (0..512)
                .flat_map(|n| (mark(page) | n).to_ne_bytes())
                .collect();
            sys::pwrite(&f, &bytes, page * PAGE)?;
        }
        f.sync_all()?;
        direct(&fs.dir.join(name))
    };
    let source = prepare("source")?;
    SOURCE.store(source.as_raw_fd() as u64, SeqCst);
    stressed(ctx, || {
        let mut c = Crowd::new(ctx, 0, ctx.duration(4, 90))?;
        // A file to write to for each, so that nobody reads what another has written.
        let mut sinks = vec![];
        for n in 0..walkers {
            let sink = prepare(&format!("sink{n}"))?;
            SINK.store(sink.as_raw_fd() as u64, SeqCst);
            sinks.push(sink);
            c.start(WALKED)?;
        }
        c.start(BYSTANDER)?;
        for _ in 0..workers {
            c.start(WORKER)?;
        }
        let first = walkers + 1;
        let mut dice = Dice::new(ctx.seed);
        while c.running() {
            std::thread::sleep(Duration::from_millis(1 + dice.below(30)));
            let page = dice.below(pages(GRANULES));
            sys::punch(&c.fd, page * PAGE, (1 + dice.below(64)) * PAGE)?;
            c.write(page)?;
            if workers > 0 {
                // One goes, killed, and another comes.
                let n = first + dice.below(workers as u64) as usize;
                drop(c.workers.remove(n));
                c.start(WORKER)?;
            }
        }
        c.finish()
    })
}

/// Direct I/O, vmsplice and GUP_TEST through tables that their process leaves and frees meanwhile,
/// while others map, leave, fork, are killed and come again. No frame but the page's own is ever read
/// or written.
fn fast_against_tables_that_go(ctx: &Ctx) -> Res {
    race(ctx, 2, 2)
}

/// The same with two sharers only, so that mostly the last one takes its table back, and frees it.
fn fast_against_the_last_sharer(ctx: &Ctx) -> Res {
    race(ctx, 2, 0)
}

// ---- pins ----

/// A file on a disk whose page `p` holds what page `p` of the team's file is to become.
struct Source {
    _fs: Ext4,
    file: File,
    direct: File,
}

impl Source {
    fn new() -> Res<Source> {
        let fs = Ext4::mount(64)?;
        let file = fs.file("source")?;
        let direct = direct(&fs.dir.join("source"))?;
        Ok(Source {
            _fs: fs,
            file,
            direct,
        })
    }

    /// Puts a new generation of a page there.
    fn prepare(&self, t: &mut Team, page: u64) -> Res<u32> {
        let g = t.model.next();
        sys::pwrite(&self.file, &page_bytes(t.model.seed, page, g), page * PAGE)?;
        self.file.sync_all()?;
        Ok(g)
    }
}

static RING: std::sync::Mutex<Option<Ring>> = std::sync::Mutex::new(None);

/// In a peer: makes a ring with a page as fixed buffer. Argument: address.
pub const REGISTER: Remote = |a, _| {
    let r = Ring::new().and_then(|ring| {
        ring.register(a[0], PAGE)?;
        if let Ok(mut place) = RING.lock() {
            *place = Some(ring);
        }
        Ok(0)
    });
    (flat(r), vec![])
};

/// In a peer: reads into the fixed buffer. Arguments: fd, offset, address.
pub const READ_FIXED: Remote = |a, _| {
    let t = Transfer {
        fd: a[0] as i32,
        at: a[1],
        addr: a[2],
        len: PAGE,
    };
    match RING.lock() {
        Ok(mut place) => match place.as_mut() {
            Some(ring) => (flat(ring.read_fixed(t)), vec![]),
            None => (flat(Err(Errno(libc::ENODEV))), vec![]),
        },
        Err(_) => (flat(Err(Errno(libc::EDEADLK))), vec![]),
    }
};

/// Makes a ring in a peer, with a page as fixed buffer.
pub fn register(p: &Peer, addr: u64) -> Res {
    match p.call(REGISTER, &[addr], &[])?.0 {
        0 => Ok(()),
        r if r == -i64::from(libc::ENOSYS) => skip!("this kernel has no io_uring"),
        r => crate::fail!("registering a buffer: {}", Errno(-r as i32)),
    }
}

/// A page that was pinned through a shared table stays the file's page after its process left the
/// table, took it back as the last sharer, or unmapped it: what arrives in the pin everybody sees.
fn fixed_buffer_outlives_its_mapping(ctx: &Ctx) -> Res {
    let source = Source::new()?;
    let mut t = Team::new(ctx, 3, 2)?;
    let page = GRANULE_PAGES + 5;
    let at = t.at(0, page);
    register(t.peer(0), at)?;
    for way in 0..4 {
        match way {
            0 => {}
            1 => {
                t.peer(0)
                    .madvise(t.granule(0, 1), GRANULE, libc::MADV_DONTNEED)??;
            }
            2 => t.members.truncate(1),
            _ => t.peer(0).munmap(t.granule(0, 1), GRANULE)?,
        }
        let g = source.prepare(&mut t, page)?;
        let a = [source.direct.as_raw_fd() as u64, page * PAGE, at];
        let (r, _) = t.peer(0).call(READ_FIXED, &a, &[])?;
        ensure_eq!(r, PAGE as i64, "reading into the fixed buffer, way {way}");
        t.model.pages[page as usize] = g;
        t.model.verify_file(&t.fd)?;
        if way == 3 {
            t.join()?;
            t.verify(1, 0..pages(2))?;
        } else {
            t.verify_all()?;
        }
    }
    Ok(())
}

/// A hole takes a pinned page out of the file: what arrives in the pin afterwards nobody sees, and
/// what is stored to the file does not go there.
fn fixed_buffer_of_a_page_that_went(ctx: &Ctx) -> Res {
    let source = Source::new()?;
    let mut t = Team::new(ctx, 3, 2)?;
    let page = GRANULE_PAGES + 5;
    let at = t.at(0, page);
    register(t.peer(0), at)?;
    t.model.punch(&t.fd, page..page + 1)?;
    t.verify_all()?;
    for _ in 0..2 {
        source.prepare(&mut t, page)?;
        let a = [source.direct.as_raw_fd() as u64, page * PAGE, at];
        let (r, _) = t.peer(0).call(READ_FIXED, &a, &[])?;
        ensure_eq!(r, PAGE as i64, "reading into the fixed buffer");
        t.verify_all()?;
        t.coherent()?;
    }
    t.expect_all(2)
}

/// A page in a pipe is the file's page still when its process has left: a later store shows in it.
fn vmsplice_outlives_its_mapping(ctx: &Ctx) -> Res {
    let mut ends = [0i32; 2];
    sys::syscall(libc::SYS_pipe2, &[ends.as_mut_ptr() as u64, 0])?;
    let [from, to] = ends.map(|fd| own(fd as u64));
    let mut t = Team::new(ctx, 3, 1)?;
    let send: Remote = |a, _| {
        let iov = [a[1], PAGE];
        let a = [a[0], iov.as_ptr() as u64, 1, 0];
        (flat(sys::syscall(libc::SYS_vmsplice, &a)), vec![])
    };
    for page in [3, 99] {
        let a = [to.as_raw_fd() as u64, t.at(0, page)];
        ensure_eq!(t.peer(0).call(send, &a, &[])?.0, PAGE as i64, "vmsplice");
        t.peer(0)
            .madvise(t.at(0, 0), GRANULE, libc::MADV_DONTNEED)??;
        t.store(1, page)?;
        let mut bytes = vec![0; PAGE as usize];
        let a = [from.as_raw_fd() as u64, bytes.as_mut_ptr() as u64, PAGE];
        ensure_eq!(sys::syscall(libc::SYS_read, &a)?, PAGE, "read");
        let g = t.model.pages[page as usize];
        let why = crate::oracle::diagnose(t.model.seed, page, g, &bytes);
        ensure!(why.is_none(), "in the pipe: {why:?}");
        // A page that left the file while it was in the pipe keeps what it held.
        let a = [to.as_raw_fd() as u64, t.at(0, page)];
        ensure_eq!(t.peer(0).call(send, &a, &[])?.0, PAGE as i64, "vmsplice");
        t.model.punch(&t.fd, page..page + 1)?;
        t.store(2, page)?;
        let a = [from.as_raw_fd() as u64, bytes.as_mut_ptr() as u64, PAGE];
        ensure_eq!(sys::syscall(libc::SYS_read, &a)?, PAGE, "read");
        let why = crate::oracle::diagnose(t.model.seed, page, g, &bytes);
        ensure!(why.is_none(), "in the pipe after a hole: {why:?}");
    }
    t.coherent()?;
    t.expect_all(1)
}
