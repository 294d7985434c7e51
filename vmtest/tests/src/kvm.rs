//! MMU notifiers with a real user: virtual machines of processes that share.
//!
//! A machine is one CPU in real mode with flat 4 GiB segments, which copies pages when it is told to,
//! or runs a loop by itself. It sees the tested file through a memory slot that is its process's
//! mapping. KVM keeps translations of its own of that memory and relies on the notifier to be told
//! of every change, so a notification that is missed shows as old content in the machine.

use crate::harness::{Ctx, Res};
use crate::inplace::swap_out;
use crate::kernel;
use crate::machine::{Cgroup, Mode, Swap};
use crate::oracle::{diagnose, page_bytes, pages};
use crate::peer::{flat, Peer, Remote};
use crate::sys::{
    self, Errno, ANON, FIXED, GRANULE, GRANULE_PAGES, MAP_SHARED_PT, PAGE, PRIVATE, RW, SHARED,
};
use crate::team::{expect_tables, Team};
use crate::{ensure, ensure_eq, fail, group, skip};
use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::arch::global_asm;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

group!("kvm";
    creating_a_machine_leaves_everything,
    creating_a_machine_in_mode_always,
    mappings_made_beside_a_machine_are_private,
    other_threads_fault_while_a_machine_is_created(120),
    machines_come_and_go(120),
    machine_sees_changes_of_the_file(120),
    machine_sees_stores_and_stores_itself,
    machine_sees_truncation,
    machine_sees_what_reclaim_moved(180),
    machine_sees_what_migration_moved(120),
    machine_sees_a_collapse(120),
    running_machine_loads_during_punch(120),
    running_machine_loads_during_remove(120),
    running_machine_loads_during_reclaim(180),
    running_machine_loads_during_migration(120),
    running_machine_stores_during_punch(120),
    running_machine_stores_during_reclaim(180),
    running_machine_stores_during_migration(120),
);

// The machine's programs, in its addresses: esi and edi are set before it starts. `copy` copies a
// page from esi to edi. `load` copies the word at edi to the board at esi and counts, until told to
// stop; `store` counts into the word at edi, and says on the board what it has stored.
global_asm!(
    ".pushsection .rodata",
    ".code16",
    "gt_guest_copy:",
    "mov ecx, 1024",
    ".byte 0x67",
    "rep movsd",
    "hlt",
    "gt_guest_load:",
    "mov eax, dword ptr [edi]",
    "mov dword ptr [esi], eax",
    "inc dword ptr [esi + 4]",
    "cmp dword ptr [esi + 8], 0",
    "je gt_guest_load",
    "hlt",
    "gt_guest_store:",
    "inc eax",
    "mov dword ptr [edi], eax",
    "mov dword ptr [esi], eax",
    "inc dword ptr [esi + 4]",
    "cmp dword ptr [esi + 8], 0",
    "je gt_guest_store",
    "hlt",
    "gt_guest_end:",
    ".code64",
    ".popsection",
);

extern "C" {
    static gt_guest_copy: u8;
    static gt_guest_load: u8;
    static gt_guest_store: u8;
    static gt_guest_end: u8;
}

/// Offsets of the programs in the machine's first page, and where they end.
fn programs() -> [u64; 4] {
    let from = &raw const gt_guest_copy as u64;
    [
        0,
        &raw const gt_guest_load as u64 - from,
        &raw const gt_guest_store as u64 - from,
        &raw const gt_guest_end as u64 - from,
    ]
}
const COPY: usize = 0;
const LOAD: usize = 1;
const STORE: usize = 2;

/// Where things are in the machine's memory: its programs and a buffer page, the board, the file.
const CODE: u64 = 0x1000;
const BUFFER: u64 = 0x2000;
const BOARD: u64 = 0x4000;
const FILE: u64 = 4 * GRANULE;

/// A machine of this process. One word of it is the machine's loops' board.
struct Machine {
    vcpu: VcpuFd,
    vm: VmFd,
    /// The buffer page, in the process.
    buffer: u64,
}

/// The machine of this process, if it has made one.
static MACHINE: Mutex<Option<Machine>> = Mutex::new(None);

fn errno(e: kvm_ioctls::Error) -> Errno {
    Errno(e.errno())
}

impl Machine {
    fn create() -> sys::Sys<Machine> {
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).map_err(errno)?;
        let vcpu = vm.create_vcpu(0).map_err(errno)?;
        let code = sys::mmap(0, 2 * PAGE, RW, PRIVATE | ANON, -1, 0)?;
        let text = &raw const gt_guest_copy as u64;
        sys::copy(code, text, programs()[3]).map_err(|_| Errno(libc::EFAULT))?;
        let mut m = Machine {
            vcpu,
            vm,
            buffer: code + (BUFFER - CODE),
        };
        m.slot(0, CODE, code, 2 * PAGE)?;
        let mut s = m.vcpu.get_sregs().map_err(errno)?;
        let flat = |segment: &mut kvm_segment| {
            segment.base = 0;
            segment.selector = 0;
            segment.limit = u32::MAX;
            segment.g = 1;
        };
        for segment in [&mut s.cs, &mut s.ds, &mut s.es, &mut s.ss] {
            flat(segment);
        }
        m.vcpu.set_sregs(&s).map_err(errno)?;
        Ok(m)
    }

    /// Shows memory of the process to the machine.
    fn slot(&mut self, slot: u32, at: u64, addr: u64, len: u64) -> sys::Sys<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: at,
            memory_size: len,
            userspace_addr: addr,
        };
        // SAFETY: the tests pass mappings of theirs, which hold no value of Rust's, and the
        // machine's programs store to nothing else.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(errno)
    }

    /// Runs a program until it halts.
    fn run(&mut self, program: usize, source: u64, target: u64) -> sys::Sys<()> {
        let mut regs = self.vcpu.get_regs().map_err(errno)?;
        regs.rip = CODE + programs()[program];
        regs.rflags = 2;
        regs.rax = 0;
        regs.rsi = source;
        regs.rdi = target;
        self.vcpu.set_regs(&regs).map_err(errno)?;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(()),
                Ok(VcpuExit::Intr) => {}
                Ok(_) => return Err(Errno(libc::EPROTO)),
                Err(e) if [libc::EINTR, libc::EAGAIN].contains(&e.errno()) => {}
                Err(e) => return Err(errno(e)),
            }
        }
    }
}

/// Does something with this process's machine.
fn with_machine(f: impl FnOnce(&mut Machine) -> sys::Sys<()>) -> i64 {
    let mut m = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    match m.as_mut() {
        Some(m) => flat(f(m).map(|()| 0)),
        None => flat(Err(Errno(libc::ENODEV))),
    }
}

/// Makes the machine.
const CREATE: Remote = |_, _| match Machine::create() {
    Ok(m) => {
        *MACHINE.lock().unwrap_or_else(PoisonError::into_inner) = Some(m);
        (0, vec![])
    }
    Err(e) => (flat(Err(e)), vec![]),
};

/// Ends it.
const DESTROY: Remote = |_, _| {
    *MACHINE.lock().unwrap_or_else(PoisonError::into_inner) = None;
    (0, vec![])
};

/// Gives it memory. Arguments: slot, address in it, address here, length.
const SLOT: Remote = |a, _| {
    let r = with_machine(|m| m.slot(a[0] as u32, a[1], a[2], a[3]));
    (r, vec![])
};

/// Lets it load a page. Argument: the page's address in it.
const LOAD_PAGE: Remote = |a, _| {
    let mut page = vec![0; PAGE as usize];
    let r = with_machine(|m| {
        m.run(COPY, a[0], BUFFER)?;
        sys::copy(page.as_mut_ptr() as u64, m.buffer, PAGE).map_err(|_| Errno(libc::EFAULT))
    });
    (r, page)
};

/// Lets it store a page. Argument: the page's address in it.
const STORE_PAGE: Remote = |a, page| {
    let r = with_machine(|m| {
        sys::copy(m.buffer, page.as_ptr() as u64, PAGE).map_err(|_| Errno(libc::EFAULT))?;
        m.run(COPY, BUFFER, a[0])
    });
    (r, vec![])
};

/// Runs one of the loops until the board says stop. Arguments: program, address of the word.
const LOOP: Remote = |a, _| {
    sys::pin_to_cpu(1);
    let r = with_machine(|m| m.run(a[0] as usize, BOARD, a[1]));
    (r, vec![])
};

/// Has the kernel KVM, and the CPU what it needs?
pub fn available() -> bool {
    std::path::Path::new("/dev/kvm").exists()
}

/// Makes a machine in a peer; a kernel or a CPU without KVM is a skip.
pub fn create(p: &Peer) -> Res {
    if !available() {
        skip!("no /dev/kvm");
    }
    let (r, _) = p.call(CREATE, &[], &[])?;
    ensure!(r == 0, "creating a machine: {}", Errno(-r as i32));
    Ok(())
}

/// A team whose member 0 has a machine that sees the whole file.
struct Scene {
    t: Team,
}

impl Scene {
    fn new(ctx: &Ctx) -> Res<Scene> {
        let t = Team::new(ctx, 3, 2)?;
        create(t.peer(0))?;
        t.expect_left(2)?;
        let s = Scene { t };
        s.slot(1, FILE, s.t.at(0, 0), 2 * GRANULE)?;
        Ok(s)
    }

    fn slot(&self, slot: u64, at: u64, addr: u64, len: u64) -> Res {
        let (r, _) = self.t.peer(0).call(SLOT, &[slot, at, addr, len], &[])?;
        ensure_eq!(r, 0, "memory slot {slot}");
        Ok(())
    }

    /// The machine loads a page and finds what the model says.
    fn check(&self, page: u64) -> Res {
        let m = &self.t.model;
        let (r, bytes) = self.t.peer(0).call(LOAD_PAGE, &[FILE + page * PAGE], &[])?;
        ensure_eq!(r, 0, "the machine's load of page {page}");
        match diagnose(m.seed, page, m.pages[page as usize], &bytes) {
            Some(why) => fail!("in the machine: {why}"),
            None => Ok(()),
        }
    }

    /// The machine stores a page.
    fn store(&mut self, page: u64) -> Res {
        let m = &mut self.t.model;
        let g = m.next();
        let bytes = page_bytes(m.seed, page, g);
        let (r, _) = self.t.members[0]
            .peer
            .call(STORE_PAGE, &[FILE + page * PAGE], &bytes)?;
        ensure_eq!(r, 0, "the machine's store to page {page}");
        m.pages[page as usize] = g;
        Ok(())
    }

    /// The members see everything, and the machine does wherever it looks.
    fn verify_all(&self) -> Res {
        for page in (0..pages(2)).step_by(7).chain(PAGES) {
            self.check(page)?;
        }
        self.t.verify_all()
    }
}

/// The pages that the tests change.
const PAGES: [u64; 4] = [0, 5, GRANULE_PAGES + 5, 2 * GRANULE_PAGES - 1];

// ---- who shares ----

/// smaps of a member shows the whole of its mapping, divided by those who map it.
fn resident(t: &Team, i: usize) -> Res {
    let smaps = kernel::smaps_of(t.peer(i).pid, t.at(i, 0))?;
    let (rss, pss) = (kernel::kb_in(&smaps, "Rss"), kernel::kb_in(&smaps, "Pss"));
    let all = t.granules * GRANULE / 1024;
    ensure_eq!(rss, Some(all), "Rss of member {i}");
    let share = all / t.members.len() as u64;
    ensure!(
        pss.is_some_and(|p| p.abs_diff(share) <= share / 100 + 2),
        "Pss of member {i}: {pss:?} kB instead of {share}"
    );
    Ok(())
}

fn machine_of_one_of_three(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 3)?;
    create(t.peer(0))?;
    t.expect_left(3)?;
    t.coherent()?;
    t.touch_all()?;
    t.expect_left(3)?;
    for i in 0..3 {
        resident(&t, i)?;
    }
    // A child has no machine of its own, although it has the descriptor.
    let child = t.peer(0).fork()?;
    child.touch(t.at(0, 0), pages(3))?;
    expect_tables(ctx, &child, 3)?;
    drop(child);
    let (r, _) = t.peer(0).call(DESTROY, &[], &[])?;
    ensure_eq!(r, 0, "ending the machine");
    t.coherent()?;
    // A process stays out for good, those that it starts do not.
    t.expect_left(3)?;
    let child = t.peer(0).fork()?;
    child.touch(t.at(0, 0), pages(3))?;
    expect_tables(ctx, &child, 3)?;
    t.verify_all()
}

/// KVM_CREATE_VM: the process leaves every table and links none again; the others go on sharing, and
/// so do its children.
fn creating_a_machine_leaves_everything(ctx: &Ctx) -> Res {
    machine_of_one_of_three(ctx)
}

/// The same when everybody shares without asking.
fn creating_a_machine_in_mode_always(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let _always = Mode::set(2)?;
    machine_of_one_of_three(ctx)
}

/// What a process with a machine maps later is private from the first touch on, MAP_SHARED_PT or not;
/// and it is not what the others find when they come.
fn mappings_made_beside_a_machine_are_private(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 0, 3)?;
    t.model.fill(&t.fd, 0..pages(3))?;
    let p = Peer::spawn()?;
    create(&p)?;
    let mut views = vec![p.map(&t.fd, 0, 3 * GRANULE, RW)?];
    if ctx.sharing {
        let flags = SHARED | MAP_SHARED_PT;
        views.push(p.mmap(0, 3 * GRANULE, RW, flags, t.raw(), 0)??);
    }
    for a in &views {
        p.touch(*a, pages(3))?;
    }
    expect_tables(ctx, &p, 0)?;
    for _ in 0..2 {
        t.join()?;
    }
    t.touch_all()?;
    t.expect_all(3)?;
    for a in &views {
        for page in PAGES {
            t.model.store(&p, a + page * PAGE, page)?;
        }
    }
    t.coherent()?;
    for a in &views {
        t.model.verify_mapped(&p, *a, 0..pages(3))?;
    }
    expect_tables(ctx, &p, 0)
}

/// A second thread faults all over the mapping while the first creates the machine: whichever comes
/// first, nothing is linked afterwards.
fn other_threads_fault_while_a_machine_is_created(ctx: &Ctx) -> Res {
    // Arguments: address, pages.
    let race: Remote = |a, _| {
        let (addr, n) = (a[0], a[1]);
        const DONE: u32 = u32::MAX;
        let rounds = std::sync::Arc::new(AtomicU32::new(0));
        let thread = {
            let rounds = rounds.clone();
            std::thread::spawn(move || {
                sys::pin_to_cpu(1);
                loop {
                    let len = n * PAGE;
                    sys::syscall(libc::SYS_madvise, &[addr, len, libc::MADV_DONTNEED as u64]).ok();
                    for page in (0..n).step_by(GRANULE_PAGES as usize) {
                        if sys::load64(addr + page * PAGE).is_err() {
                            return false;
                        }
                    }
                    let next = |r| (r != DONE).then(|| r + 1);
                    if rounds.fetch_update(SeqCst, SeqCst, next).is_err() {
                        return true;
                    }
                }
            })
        };
        // However busy the machine is: rounds before and after, or a thread that ended.
        let goes_on = || {
            let from = rounds.load(SeqCst);
            while rounds.load(SeqCst) < from + 2 && !thread.is_finished() {
                std::thread::yield_now();
            }
        };
        sys::pin_to_cpu(0);
        goes_on();
        let r = CREATE(&[], &[]).0;
        goes_on();
        rounds.store(DONE, SeqCst);
        match thread.join() {
            Ok(true) => (r, vec![]),
            _ => (-i64::from(libc::EFAULT), vec![]),
        }
    };
    if !available() {
        skip!("no /dev/kvm");
    }
    let mut t = Team::new(ctx, 2, 8)?;
    for _ in 0..if ctx.long { 200 } else { 12 } {
        let p = Peer::spawn()?;
        let a = p.map(&t.fd, 0, 8 * GRANULE, RW)?;
        p.touch(a, pages(8))?;
        expect_tables(ctx, &p, 8)?;
        let (r, _) = p.call(race, &[a, pages(8)], &[])?;
        ensure_eq!(r, 0, "creating a machine beside a thread that faults");
        expect_tables(ctx, &p, 0)?;
        t.store(0, 9)?;
        t.model.verify_mapped(&p, a, 0..GRANULE_PAGES)?;
        p.touch(a, pages(8))?;
        expect_tables(ctx, &p, 0)?;
    }
    t.expect_all(8)?;
    t.coherent()
}

/// Processes share, get a machine, and exit with it, while others write and cut the file.
fn machines_come_and_go(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    let end = Instant::now() + ctx.duration(3, 60);
    let mut round = 0;
    while Instant::now() < end || round < 4 {
        t.join()?;
        let newest = t.members.len() - 1;
        t.peer(newest).touch(t.at(newest, 0), pages(2))?;
        t.expect(newest, 2)?;
        create(t.peer(newest))?;
        t.expect(newest, 0)?;
        let p = t.peer(newest);
        let (r, _) = p.call(SLOT, &[1, FILE, t.at(newest, 0), 2 * GRANULE], &[])?;
        ensure_eq!(r, 0, "memory slot");
        let page = round * 37 % pages(2);
        for who in [0, newest] {
            t.store(who, page)?;
            let (r, bytes) = t.peer(newest).call(LOAD_PAGE, &[FILE + page * PAGE], &[])?;
            ensure_eq!(r, 0, "the machine's load of page {page}");
            let g = t.model.pages[page as usize];
            if let Some(why) = diagnose(t.model.seed, page, g, &bytes) {
                fail!("in the machine: {why}");
            }
        }
        t.model.punch(&t.fd, page..page + 1)?;
        t.verify_all()?;
        if t.members.len() > 4 {
            // Some exit, some are killed.
            let gone = t.members.remove(2);
            if round % 2 == 0 {
                gone.peer.exit()?;
            }
        }
        round += 1;
    }
    t.expect(0, 2)?;
    t.expect(1, 2)
}

// ---- what a machine sees ----

/// Holes, MADV_REMOVE and writes by descriptor: the machine's next load finds the new content.
fn machine_sees_changes_of_the_file(ctx: &Ctx) -> Res {
    let mut s = Scene::new(ctx)?;
    for page in PAGES {
        s.check(page)?;
        s.t.model.pwrite(&s.t.fd, page)?;
        s.check(page)?;
        s.t.model.punch(&s.t.fd, page..page + 1)?;
        s.check(page)?;
        s.t.model.pwrite(&s.t.fd, page)?;
        s.check(page)?;
        let (p, at) = (s.t.peer(1), s.t.at(1, page));
        p.madvise(at, PAGE, libc::MADV_REMOVE)??;
        s.t.model.pages[page as usize] = 0;
        s.check(page)?;
    }
    s.t.model.fill(&s.t.fd, 0..pages(2))?;
    s.verify_all()?;
    s.t.model.punch(&s.t.fd, GRANULE_PAGES..2 * GRANULE_PAGES)?;
    s.verify_all()?;
    s.t.expect_left(2)
}

/// What a sharer stores the machine sees, and the other way round, before and after a hole.
fn machine_sees_stores_and_stores_itself(ctx: &Ctx) -> Res {
    let mut s = Scene::new(ctx)?;
    for page in PAGES {
        for _ in 0..2 {
            s.t.store(1, page)?;
            s.check(page)?;
            s.store(page)?;
            s.t.verify(2, page..page + 1)?;
            s.t.store(2, page)?;
            s.check(page)?;
            s.t.model.punch(&s.t.fd, page..page + 1)?;
            s.store(page)?;
            s.t.verify(1, page..page + 1)?;
        }
    }
    s.verify_all()?;
    s.t.expect_left(2)
}

/// Beyond the file's end the machine gets nothing, and after growth zeros.
fn machine_sees_truncation(ctx: &Ctx) -> Res {
    let mut s = Scene::new(ctx)?;
    for end in [GRANULE_PAGES + 5, GRANULE_PAGES, 5] {
        for page in PAGES.into_iter().filter(|p| *p >= end) {
            s.t.store(1, page)?;
            s.check(page)?;
        }
        s.t.model.truncate(&s.t.fd, end)?;
        for page in PAGES.into_iter().filter(|p| *p >= end) {
            let (r, _) = s.t.peer(0).call(LOAD_PAGE, &[FILE + page * PAGE], &[])?;
            ensure_eq!(
                r,
                -i64::from(libc::EFAULT),
                "the machine's load of page {page} of {end}"
            );
        }
        s.t.model.truncate(&s.t.fd, pages(2))?;
        s.verify_all()?;
    }
    s.t.expect_left(2)
}

/// Pages go to swap under the machine, are changed by sharers, and are found changed.
fn machine_sees_what_reclaim_moved(ctx: &Ctx) -> Res {
    let swap = Swap::on(256)?;
    let group = Cgroup::enter()?;
    let mut s = Scene::new(ctx)?;
    for round in 0..if ctx.long { 12 } else { 2 } {
        s.verify_all()?;
        swap_out(&s.t, &group, &swap)?;
        for n in 0..40 {
            s.t.store(1 + n as usize % 2, (round * 401 + n * 37) % pages(2))?;
        }
        s.verify_all()?;
        for n in 0..10 {
            s.store((round * 211 + n * 97) % pages(2))?;
        }
        swap_out(&s.t, &group, &swap)?;
        s.t.verify_all()?;
    }
    s.verify_all()?;
    s.t.expect_left(2)
}

/// Moves the pages that a member maps to a node.
fn move_to(t: &Team, i: usize, range: std::ops::Range<u64>, node: i32) -> Res<usize> {
    const MOVE_ALL: u64 = 4;
    let addrs: Vec<u64> = range.map(|page| t.at(i, page)).collect();
    let nodes = vec![node; addrs.len()];
    let mut status = vec![0i32; addrs.len()];
    let a = [
        t.peer(i).pid as u64,
        addrs.len() as u64,
        addrs.as_ptr() as u64,
        nodes.as_ptr() as u64,
        status.as_mut_ptr() as u64,
        MOVE_ALL,
    ];
    sys::syscall(libc::SYS_move_pages, &a)?;
    Ok(status.iter().filter(|s| **s == node).count())
}

/// Pages move to other frames under the machine.
fn machine_sees_what_migration_moved(ctx: &Ctx) -> Res {
    crate::inplace::two_nodes()?;
    let mut s = Scene::new(ctx)?;
    for node in [1, 0, 1] {
        s.verify_all()?;
        let moved = move_to(&s.t, 1, 0..pages(2), node)?;
        ensure!(moved > 512, "{moved} pages are on node {node}");
        for page in PAGES {
            s.t.store(2, page)?;
            s.check(page)?;
            s.store(page)?;
        }
        s.verify_all()?;
    }
    s.t.expect_left(2)
}

/// One huge folio takes the place of the pages, and small pages that of the folio.
fn machine_sees_a_collapse(ctx: &Ctx) -> Res {
    const MADV_COLLAPSE: u64 = 25;
    let mut s = Scene::new(ctx)?;
    let mut collapsed = 0;
    for _ in 0..3 {
        s.verify_all()?;
        let place = sys::mmap(0, 4 * GRANULE, sys::NONE, PRIVATE | ANON, -1, 0)?;
        let at = place.next_multiple_of(GRANULE);
        sys::mmap(at, 2 * GRANULE, RW, SHARED | FIXED, s.t.raw(), 0)?;
        let r = sys::syscall(libc::SYS_madvise, &[at + GRANULE, GRANULE, MADV_COLLAPSE]);
        sys::munmap(place, 4 * GRANULE)?;
        match r {
            Err(Errno(libc::EINVAL | libc::ENOMEM)) => skip!("no MADV_COLLAPSE of shmem"),
            // Others held a page of it just then.
            Err(Errno(libc::EAGAIN | libc::EBUSY)) => continue,
            r => r?,
        };
        collapsed += 1;
        for page in [GRANULE_PAGES, GRANULE_PAGES + 5, pages(2) - 1] {
            s.t.store(1, page)?;
            s.check(page)?;
            s.store(page)?;
        }
        s.verify_all()?;
        let hole = GRANULE_PAGES + 7;
        s.t.model.punch(&s.t.fd, hole..hole + 1)?;
        s.verify_all()?;
    }
    if collapsed == 0 {
        skip!("nothing was collapsed");
    }
    Ok(())
}

// ---- a machine that runs meanwhile ----

/// What a running machine and the test tell each other.
#[repr(C)]
struct Board {
    /// What the machine has loaded or stored last.
    word: AtomicU32,
    /// Turns done.
    turns: AtomicU32,
    stop: AtomicU32,
}

impl Board {
    /// Waits until the machine has begun and ended `n` turns from now on.
    fn turns(&self, n: u32) -> Res {
        let from = self.turns.load(SeqCst);
        let deadline = Instant::now() + Duration::from_secs(20);
        // The turn that is under way may have begun before.
        while self.turns.load(SeqCst).wrapping_sub(from) < n + 1 {
            ensure!(Instant::now() < deadline, "the machine stands still");
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// Member 0's machine runs a loop on one word while `change` takes the page away, again and again.
fn running(
    ctx: &Ctx,
    program: usize,
    mut change: impl FnMut(&Team, u64) -> Res,
    mut check: impl FnMut(&Team, &Board, u64) -> Res,
) -> Res {
    // At the same address in the members, which are made next.
    let board = sys::mmap(0, PAGE, RW, SHARED | ANON, -1, 0)?;
    // SAFETY: the page stays mapped as long as the process lives, and zeros are valid atomics.
    let b = unsafe { &*(board as *const Board) };
    let s = Scene::new(ctx)?;
    let page = GRANULE_PAGES + 3;
    sys::pin_to_cpu(0);
    s.slot(2, BOARD, board, PAGE)?;
    s.t.peer(0)
        .start(LOOP, &[program as u64, FILE + page * PAGE], &[])?;
    let end = Instant::now() + ctx.duration(2, 30);
    let mut rounds = 0;
    while Instant::now() < end || rounds < 3 {
        b.turns(20)?;
        change(&s.t, page)?;
        check(&s.t, b, page)?;
        rounds += 1;
    }
    b.stop.store(1, SeqCst);
    let (r, _) = s.t.peer(0).finish()?;
    ensure_eq!(r, 0, "how the machine ended");
    s.t.expect_left(2)
}

/// After the change new content is written: every turn that begins then must load it.
fn loads_during(ctx: &Ctx, change: impl FnMut(&Team, u64) -> Res) -> Res {
    let mut generation = 0u32;
    running(ctx, LOAD, change, |t, b, page| {
        generation += 1;
        if generation.is_multiple_of(2) {
            sys::pwrite(&t.fd, &generation.to_ne_bytes(), page * PAGE)?;
        } else {
            let addr = t.at(1, page);
            t.peer(1).store(addr, u64::from(generation))??;
        }
        b.turns(1)?;
        ensure_eq!(
            b.word.load(SeqCst),
            generation,
            "what the machine loads after generation {generation} was written"
        );
        Ok(())
    })
}

/// What the machine says it has stored after the change must be in the file, and others see it.
fn stores_during(ctx: &Ctx, change: impl FnMut(&Team, u64) -> Res) -> Res {
    running(ctx, STORE, change, |t, b, page| {
        b.turns(2)?;
        let at_least = b.word.load(SeqCst);
        let mut word = [0; 4];
        sys::pread(&t.fd, &mut word, page * PAGE)?;
        let got = u32::from_ne_bytes(word);
        ensure!(
            got >= at_least,
            "the machine had stored {at_least}, the file holds {got}"
        );
        let seen = t.peer(1).load(t.at(1, page))?? as u32;
        ensure!(
            seen >= at_least,
            "the machine had stored {at_least}, another process sees {seen}"
        );
        Ok(())
    })
}

fn punch(t: &Team, page: u64) -> Res {
    Ok(sys::punch(&t.fd, page * PAGE, PAGE)?)
}

/// MADV_REMOVE by a sharer.
fn remove(t: &Team, page: u64) -> Res {
    t.peer(2)
        .madvise(t.at(2, page), PAGE, libc::MADV_REMOVE)??;
    Ok(())
}

fn during_reclaim(
    ctx: &Ctx,
    test: impl FnOnce(&Ctx, &mut dyn FnMut(&Team, u64) -> Res) -> Res,
) -> Res {
    let swap = Swap::on(128)?;
    let group = Cgroup::enter()?;
    let mut out = 0;
    test(ctx, &mut |_, _| {
        group.reclaim(4 * GRANULE);
        out = out.max(swap.used_pages());
        Ok(())
    })?;
    ensure!(out > 0, "nothing was ever swapped out");
    Ok(())
}

fn during_migration(
    ctx: &Ctx,
    test: impl FnOnce(&Ctx, &mut dyn FnMut(&Team, u64) -> Res) -> Res,
) -> Res {
    crate::inplace::two_nodes()?;
    let (mut node, mut moved) = (0, 0);
    test(ctx, &mut |t, page| {
        node = 1 - node;
        moved += move_to(t, 1, page..page + 1, node)?;
        Ok(())
    })?;
    ensure!(moved > 0, "the page never moved");
    Ok(())
}

/// A hole under a machine that loads.
fn running_machine_loads_during_punch(ctx: &Ctx) -> Res {
    loads_during(ctx, punch)
}

/// A hole made by a sharer's MADV_REMOVE.
fn running_machine_loads_during_remove(ctx: &Ctx) -> Res {
    loads_during(ctx, remove)
}

/// Reclaim under a machine that loads.
fn running_machine_loads_during_reclaim(ctx: &Ctx) -> Res {
    during_reclaim(ctx, |ctx, change| loads_during(ctx, change))
}

/// Migration under a machine that loads.
fn running_machine_loads_during_migration(ctx: &Ctx) -> Res {
    during_migration(ctx, |ctx, change| loads_during(ctx, change))
}

/// A hole under a machine that stores.
fn running_machine_stores_during_punch(ctx: &Ctx) -> Res {
    stores_during(ctx, punch)
}

/// Reclaim under a machine that stores.
fn running_machine_stores_during_reclaim(ctx: &Ctx) -> Res {
    during_reclaim(ctx, |ctx, change| stores_during(ctx, change))
}

/// Migration under a machine that stores.
fn running_machine_stores_during_migration(ctx: &Ctx) -> Res {
    during_migration(ctx, |ctx, change| stores_during(ctx, change))
}
