//! Contract 1.2: which parts of which mappings share, and which do not.

use crate::harness::{own, Ctx, Res};
use crate::kernel;
use crate::machine::{Ext4, Setting};
use crate::oracle::{diagnose, first_word, page_bytes, pages, Model};
use crate::peer::{flat, Peer, Remote};
use crate::probe::{self, Probe};
use crate::sys::{self, Errno, ANON, FIXED, GRANULE, GRANULE_PAGES, PAGE, PRIVATE, RO, RW, SHARED};
use crate::team::{expect_tables, Team};
use crate::uring::{Ring, Transfer};
use crate::{ensure, ensure_eq, group};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

group!("transparent";
    memfd,
    tmpfs_file,
    sysv_shm,
    anonymous_shared_over_fork,
    ext4_file,
    read_only_mappings,
    different_lengths,
    different_offsets,
    unaligned_head_and_tail,
    incongruent_address_is_private,
    two_mappings_in_one_process,
    congruent_address_is_chosen,
    address_of_a_32_bit_task,
    late_comer_shares,
    counted_links_and_tables,
    sparse_file_shares_and_fills,
    not_private,
    not_hugetlb,
    not_dax,
    not_locked,
    not_locked_future,
    not_pmd_folio,
    huge_folio_stays_huge_beside_a_small_mapping,
    protections_do_not_mix,
    reader_cannot_store,
    reader_cannot_be_written_by_process_vm,
    reader_cannot_be_written_by_ptrace,
    reader_cannot_be_written_by_proc_mem,
    reader_cannot_be_pinned_for_write,
    reader_cannot_be_direct_io_target,
    reader_cannot_be_pinned_for_write_gup_test,
    reader_cannot_be_written_by_io_uring,
    reader_cannot_be_written_by_futex,
    reader_cannot_execute,
    writer_is_written_for_all_by_ptrace,
    prot_none_is_read_by_proc_mem_only,
    prot_none_shares_nothing_visible,
    uprobe_stays_out_of_shared_tables,
);

fn sharing_works(ctx: &Ctx, fd: OwnedFd) -> Res {
    let mut t = Team::on(ctx, fd, 3, 2)?;
    t.coherent()
}

/// Eligible: memfd.
fn memfd(ctx: &Ctx) -> Res {
    sharing_works(ctx, sys::memfd(0)?)
}

/// Eligible: a file of a mounted tmpfs.
fn tmpfs_file(ctx: &Ctx) -> Res {
    let path = format!("/dev/shm/guest-tests-{}", std::process::id());
    let made = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path);
    let Ok(f) = made else {
        crate::skip!("no tmpfs at /dev/shm")
    };
    std::fs::remove_file(&path)?;
    sharing_works(ctx, f.into())
}

/// Eligible: a file whose faults come from an ordinary filesystem's page cache.
fn ext4_file(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(96)?;
    sharing_works(ctx, fs.file("f")?.into())
}

/// Eligible: System V shared memory.
fn sysv_shm(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let id = sys::syscall(
        libc::SYS_shmget,
        &[0, 2 * GRANULE, 0o600 | libc::IPC_CREAT as u64],
    )?;
    let result = sysv_with(ctx, id);
    sys::syscall(libc::SYS_shmctl, &[id, libc::IPC_RMID as u64, 0])?;
    result
}

fn sysv_with(ctx: &Ctx, id: u64) -> Res {
    let peers = [Peer::spawn()?, Peer::spawn()?];
    let mut model = Model::new(ctx.seed, pages(2));
    let mut at = vec![];
    for p in &peers {
        let addr = p.syscall(libc::SYS_shmat, &[id, 0, 0])??;
        p.touch(addr, pages(2))?;
        at.push(addr);
    }
    for p in &peers {
        expect_tables(ctx, p, 2)?;
    }
    for page in [0, 1, 511, 512, 1023] {
        let w = page as usize % 2;
        model.store(&peers[w], at[w] + page * PAGE, page)?;
    }
    for (p, a) in peers.iter().zip(&at) {
        model.verify_mapped(p, *a, 0..pages(2))?;
    }
    peers[0].syscall(libc::SYS_shmdt, &[at[0]])??;
    expect_tables(ctx, &peers[0], 0)?;
    expect_tables(ctx, &peers[1], 2)?;
    model.verify_mapped(&peers[1], at[1], 0..pages(2))
}

/// Eligible: MAP_ANONYMOUS|MAP_SHARED, shared with the children forked later.
fn anonymous_shared_over_fork(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let parent = Peer::spawn()?;
    let addr = parent.mmap(0, 2 * GRANULE, RW, SHARED | ANON, -1, 0)??;
    let mut model = Model::new(ctx.seed, pages(2));
    model.store(&parent, addr, 0)?;
    let child = parent.fork()?;
    let grandchild = child.fork()?;
    for p in [&parent, &child, &grandchild] {
        p.touch(addr, pages(2))?;
    }
    for p in [&parent, &child, &grandchild] {
        expect_tables(ctx, p, 2)?;
    }
    model.store(&grandchild, addr + 600 * PAGE, 600)?;
    model.store(&child, addr + PAGE, 1)?;
    for p in [&parent, &child, &grandchild] {
        model.verify_mapped(p, addr, 0..pages(2))?;
    }
    Ok(())
}

/// Readers share among themselves too, and see what a descriptor writes.
fn read_only_mappings(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let fd = sys::memfd(2 * GRANULE)?;
    let mut model = Model::new(ctx.seed, pages(2));
    model.fill(&fd, 0..pages(2))?;
    let peers = [Peer::spawn()?, Peer::spawn()?, Peer::spawn()?];
    let mut at = vec![];
    for p in &peers {
        at.push(p.map(&fd, 0, 2 * GRANULE, RO)?);
        p.touch(at[at.len() - 1], pages(2))?;
    }
    for p in &peers {
        expect_tables(ctx, p, 2)?;
    }
    model.pwrite(&fd, 700)?;
    for (p, a) in peers.iter().zip(at) {
        model.verify_mapped(p, a, 0..pages(2))?;
    }
    Ok(())
}

/// A process that maps more, or less, than the others shares what both map.
fn different_lengths(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let fd = sys::memfd(4 * GRANULE)?;
    let mut model = Model::new(ctx.seed, pages(4));
    model.fill(&fd, 0..pages(4))?;
    for lens in [[1, 4, 2], [4, 1, 2]] {
        let before = kernel::gauges();
        let peers = [Peer::spawn()?, Peer::spawn()?, Peer::spawn()?];
        let mut at = vec![];
        for (p, n) in peers.iter().zip(lens) {
            let a = p.map(&fd, 0, n * GRANULE, RW)?;
            p.touch(a, pages(n))?;
            at.push(a);
        }
        for (p, n) in peers.iter().zip(lens) {
            expect_tables(ctx, p, n)?;
        }
        if let (true, Some(b), Some(now)) = (ctx.sharing, before, kernel::gauges()) {
            ensure_eq!(
                now.links - b.links,
                7,
                "links of mappings of 1, 2 and 4 granules"
            );
            ensure_eq!(now.tables - b.tables, 4, "tables of a file of 4 granules");
        }
        model.store(&peers[1], at[1] + 5 * PAGE, 5)?;
        for ((p, a), n) in peers.iter().zip(&at).zip(lens) {
            model.verify_mapped(p, *a, 0..pages(n))?;
        }
        drop(peers);
        wait_gauges(before)?;
    }
    Ok(())
}

fn wait_gauges(before: Option<kernel::Gauges>) -> Res {
    for _ in 0..600 {
        if kernel::gauges() == before {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    crate::fail!(
        "gauges: {before:?} before, {:?} after all is gone",
        kernel::gauges()
    );
}

/// Processes that map the file from different offsets share the granules both map.
fn different_offsets(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let fd = sys::memfd(4 * GRANULE)?;
    let mut model = Model::new(ctx.seed, pages(4));
    model.fill(&fd, 0..pages(4))?;
    let before = kernel::gauges();
    let peers = [Peer::spawn()?, Peer::spawn()?, Peer::spawn()?];
    let mut at = vec![];
    for (i, p) in peers.iter().enumerate() {
        let first = i as u64;
        let a = p.map(&fd, first * GRANULE, (4 - first) * GRANULE, RW)?;
        p.touch(a, pages(4 - first))?;
        at.push(a);
    }
    for (i, p) in peers.iter().enumerate() {
        expect_tables(ctx, p, 4 - i as u64)?;
    }
    if let (true, Some(b), Some(now)) = (ctx.sharing, before, kernel::gauges()) {
        ensure_eq!(
            now.links - b.links,
            9,
            "links of mappings of 4, 3 and 2 granules"
        );
        ensure_eq!(now.tables - b.tables, 4, "tables of a file of 4 granules");
    }
    model.store(&peers[2], at[2] + 9 * PAGE, pages(2) + 9)?;
    for (i, p) in peers.iter().enumerate() {
        model.verify_mapped(p, at[i], pages(i as u64)..pages(4))?;
    }
    Ok(())
}

/// The head before the first whole granule and the tail after the last are mapped privately, the
/// whole granules between them share, also with a process whose mapping is aligned.
fn unaligned_head_and_tail(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let mut t = Team::new(ctx, 2, 4)?;
    // From page 3 to page 3 of the last granule: whole are granules 1 and 2.
    let (first, end) = (3, pages(3) + 3);
    let len = (end - first) * PAGE;
    // Where the kernel likes, and where nothing else is in the granules of head and tail.
    for alone in [false, true] {
        let ragged = Peer::spawn()?;
        let (place, fixed) = match alone {
            true => (ragged.place(first * PAGE, len)?, FIXED),
            false => (0, 0),
        };
        let addr = ragged.mmap(place, len, RW, SHARED | fixed, t.raw(), first * PAGE)??;
        ragged.touch(addr, end - first)?;
        expect_tables(ctx, &ragged, 2)?;
        for page in [
            first,
            GRANULE_PAGES - 1,
            GRANULE_PAGES,
            pages(3) - 1,
            pages(3),
            end - 1,
        ] {
            t.model.store(&ragged, addr + (page - first) * PAGE, page)?;
        }
        t.coherent()?;
        t.model.verify_mapped(&ragged, addr, first..end)?;
    }
    Ok(())
}

/// A fixed address that is not congruent with the offset maps as always, without sharing.
fn incongruent_address_is_private(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    let odd = Peer::spawn()?;
    let addr = odd.place(0, 3 * GRANULE)? + PAGE;
    odd.mmap(addr, 2 * GRANULE, RW, SHARED | FIXED, t.raw(), 0)??;
    odd.touch(addr, pages(2))?;
    expect_tables(ctx, &odd, 0)?;
    t.model.store(&odd, addr + 77 * PAGE, 77)?;
    t.coherent()?;
    t.model.verify_mapped(&odd, addr, 0..pages(2))
}

/// One process may map the same granule twice: two links to one table.
fn two_mappings_in_one_process(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    let second = t.peer(0).map(&t.fd, 0, 2 * GRANULE, RW)?;
    t.peer(0).touch(second, pages(2))?;
    t.expect(0, 4)?;
    t.coherent()?;
    t.model.store(&t.members[0].peer, second + 8 * PAGE, 8)?;
    t.verify_all()?;
    t.model.verify_mapped(t.peer(0), second, 0..pages(2))?;
    t.peer(0).munmap(t.at(0, 0), 2 * GRANULE)?;
    t.expect(0, 2)?;
    t.model.verify_mapped(t.peer(0), second, 0..pages(2))
}

/// With addr = 0 the kernel picks an address congruent with the offset, for a granule or more.
fn congruent_address_is_chosen(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    ctx.opt_in()?;
    let fd = sys::memfd(8 * GRANULE)?;
    let p = Peer::spawn()?;
    for (off, len) in [(0, 1), (0, 4), (1, 1), (5, 2), (511, 3), (513, 2)] {
        // Something of odd size first, so that a lucky address is not enough.
        p.mmap(0, 3 * PAGE, RW, PRIVATE | ANON, -1, 0)??;
        let a = p.map(&fd, off * PAGE, len * GRANULE + PAGE, RW)?;
        ensure_eq!(
            a % GRANULE,
            off * PAGE % GRANULE,
            "address {a:#x} modulo the granule for offset of {off} pages"
        );
    }
    p.mmap(0, 3 * PAGE, RW, PRIVATE | ANON, -1, 0)??;
    let a = p.mmap(0, 2 * GRANULE, RW, SHARED | ANON, -1, 0)??;
    ensure_eq!(a % GRANULE, 0, "address of MAP_ANONYMOUS|MAP_SHARED");
    Ok(())
}

/// A program of 32 bits that goes over to 64-bit mode, maps 4 MiB of shared memory there, and exits with 0 when it
/// got an address that it can have, with the error, or with 255.
#[rustfmt::skip]
const LONG_MODE: &[u8] = &[
    0xea, 0x5b, 0x80, 0x04, 0x08, 0x33, 0x00,   // ljmp $0x33, $0x804805b: the next instruction
    0xb8, 9, 0, 0, 0,                           // mov $__NR_mmap, %eax
    0x31, 0xff,                                 // xor %edi, %edi
    0xbe, 0, 0, 0x40, 0,                        // mov $0x400000, %esi
    0xba, 3, 0, 0, 0,                           // mov $(PROT_READ | PROT_WRITE), %edx
    0x41, 0xba, 0x21, 0, 0, 0,                  // mov $(MAP_SHARED | MAP_ANONYMOUS), %r10d
    0x49, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff,   // mov $-1, %r8
    0x45, 0x31, 0xc9,                           // xor %r9d, %r9d
    0x0f, 0x05,                                 // syscall
    0x48, 0x85, 0xc0,                           // test %rax, %rax
    0x79, 0x06,                                 // jns 1f
    0xf7, 0xd8,                                 // neg %eax
    0x89, 0xc7,                                 // mov %eax, %edi
    0xeb, 0x0e,                                 // jmp 2f
    0x48, 0x89, 0xc7,                           // 1: mov %rax, %rdi
    0x48, 0xc1, 0xef, 0x20,                     // shr $32, %rdi
    0x74, 0x05,                                 // jz 2f
    0xbf, 0xff, 0, 0, 0,                        // mov $255, %edi
    0xb8, 60, 0, 0, 0,                          // 2: mov $__NR_exit, %eax
    0x0f, 0x05,                                 // syscall
];

/// An executable file of 32 bits with this code, loaded at 0x8048000.
fn program_of_32_bits(code: &[u8]) -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let size = HEADERS + code.len() as u32;
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, EM_386, version, entry, program headers at 52, no sections, no flags
    file.extend([2u16, 3].iter().flat_map(|w| w.to_le_bytes()));
    file.extend(
        [1, BASE + HEADERS, 52, 0, 0]
            .iter()
            .flat_map(|w| w.to_le_bytes()),
    );
    file.extend(
        [52u16, 32, 1, 40, 0, 0]
            .iter()
            .flat_map(|w| w.to_le_bytes()),
    );
    // PT_LOAD, from 0, here, size in the file and in memory, R and X, alignment
    file.extend(
        [1, 0, BASE, BASE, size, size, 5, PAGE as u32]
            .iter()
            .flat_map(|w| w.to_le_bytes()),
    );
    file.extend(code);
    file
}

/// A task of 32 bits gets no address above 4 GiB, by whatever kind of system call it asks.
fn address_of_a_32_bit_task(ctx: &Ctx) -> Res {
    use std::os::unix::fs::PermissionsExt;
    ctx.opt_in()?;
    let path = format!("/tmp/guest-tests-32-{}", std::process::id());
    std::fs::write(&path, program_of_32_bits(LONG_MODE))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
    let status = std::process::Command::new(&path).status();
    std::fs::remove_file(&path)?;
    match status {
        Err(e) if e.raw_os_error() == Some(libc::ENOEXEC) => crate::skip!("no programs of 32 bits"),
        status => {
            let code = status?.code();
            ensure!(
                code == Some(0) || code == Some(libc::ENOMEM),
                "mmap in a task of 32 bits: {code:?} (255: an address above 4 GiB)"
            );
            Ok(())
        }
    }
}

/// The order of arrival does not matter: who maps after all is populated shares as well.
fn late_comer_shares(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 3)?;
    t.join()?;
    t.peer(2).touch(t.at(2, 0), pages(3))?;
    t.expect_all(3)?;
    t.coherent()
}

/// The gauges and the event counters move as links come and go.
fn counted_links_and_tables(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let (before, linked, unlinked) = (
        kernel::gauges(),
        kernel::vmstat("ptshare_link"),
        kernel::vmstat("ptshare_unlink"),
    );
    let t = Team::new(ctx, 3, 4)?;
    let (Some(b), Some(now)) = (before, kernel::gauges()) else {
        crate::fail!("no gauges in /proc/vmstat")
    };
    ensure_eq!(now.tables - b.tables, 4, "tables for 4 granules");
    ensure_eq!(now.links - b.links, 12, "links of 3 processes to 4 tables");
    let link_events = kernel::vmstat("ptshare_link").unwrap_or(0) - linked.unwrap_or(0);
    ensure!(
        link_events >= 12,
        "ptshare_link grew by {link_events} for 12 links"
    );
    drop(t);
    wait_gauges(before)?;
    let unlink_events = kernel::vmstat("ptshare_unlink").unwrap_or(0) - unlinked.unwrap_or(0);
    ensure!(
        unlink_events >= 12,
        "ptshare_unlink grew by {unlink_events} for 12 links"
    );
    Ok(())
}

/// Pages that do not exist yet are allocated once, by whoever touches them first, and all see them.
fn sparse_file_shares_and_fills(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 3, 2)?;
    for i in 0..3 {
        t.store(i, 100 + i as u64)?;
        t.store(i, GRANULE_PAGES + 200 + i as u64)?;
    }
    t.expect_all(2)?;
    t.verify_all()
}

/// Not eligible: MAP_PRIVATE, whose written pages are nobody else's.
fn not_private(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    let p = Peer::spawn()?;
    let addr = p.place(0, 2 * GRANULE)?;
    p.mmap(addr, 2 * GRANULE, RW, PRIVATE | FIXED, t.raw(), 0)??;
    p.touch(addr, pages(2))?;
    expect_tables(ctx, &p, 0)?;
    let mut own_view = t.model.clone();
    own_view.next();
    own_view.store(&p, addr + 9 * PAGE, 9)?;
    t.verify_all()?;
    own_view.verify_mapped(&p, addr, 0..pages(2))?;
    t.coherent()
}

/// Not eligible: hugetlb.
fn not_hugetlb(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let _pool = Setting::set("/proc/sys/vm/nr_hugepages", "4")?;
    let got: u64 = std::fs::read_to_string("/proc/sys/vm/nr_hugepages")?
        .trim()
        .parse()
        .unwrap_or(0);
    if got < 2 {
        crate::skip!("no 2 MB pages to be had");
    }
    let fd = sys::memfd_flags(2 * GRANULE, libc::MFD_HUGETLB)?;
    let peers = [Peer::spawn()?, Peer::spawn()?];
    let mut model = Model::new(ctx.seed, pages(2));
    let mut at = vec![];
    for p in &peers {
        let a = p.map(&fd, 0, 2 * GRANULE, RW)?;
        p.touch(a, pages(2))?;
        at.push(a);
    }
    for p in &peers {
        expect_tables(ctx, p, 0)?;
    }
    model.store(&peers[0], at[0] + PAGE, 1)?;
    model.verify_mapped(&peers[1], at[1], 0..pages(2))
}

/// Not eligible: a file without a page cache.
fn not_dax(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let fs = Ext4::dax()?;
    let fd: OwnedFd = fs.file("f")?.into();
    let mut model = Model::new(ctx.seed, 0);
    model.truncate(&fd, pages(2))?;
    model.fill(&fd, 0..pages(2))?;
    let peers = [Peer::spawn()?, Peer::spawn()?];
    let mut at = vec![];
    for p in &peers {
        let a = p.place(0, 2 * GRANULE)?;
        p.mmap(a, 2 * GRANULE, RW, SHARED | FIXED, fd.as_raw_fd(), 0)??;
        p.touch(a, pages(2))?;
        at.push(a);
    }
    for p in &peers {
        expect_tables(ctx, p, 0)?;
    }
    model.store(&peers[0], at[0] + PAGE, 1)?;
    model.verify_mapped(&peers[1], at[1], 0..pages(2))?;
    model.truncate(&fd, pages(1))?;
    let gone = peers[1].load(at[1] + GRANULE)?;
    ensure!(gone.is_err(), "a page beyond the end holds {gone:?}");
    model.verify_mapped(&peers[0], at[0], 0..pages(1))
}

/// Not eligible: a part that was locked before it was touched, by mlock or MAP_LOCKED.
fn not_locked(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 3)?;
    t.join()?;
    t.join()?;
    t.peer(2)
        .syscall(libc::SYS_mlock, &[t.granule(2, 1), GRANULE])??;
    t.peer(2).touch(t.at(2, 0), pages(3))?;
    t.expect(2, 2)?;
    let p = t.peer(3);
    p.munmap(t.at(3, 0), 3 * GRANULE)?;
    let a = p.mmap(
        0,
        3 * GRANULE,
        RW,
        SHARED | libc::MAP_LOCKED as u64,
        t.raw(),
        0,
    )??;
    t.members[3].addr = a;
    t.expect(3, 0)?;
    t.coherent()
}

/// Not eligible: mappings made after mlockall(MCL_FUTURE).
fn not_locked_future(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    let p = Peer::spawn()?;
    p.syscall(libc::SYS_mlockall, &[libc::MCL_FUTURE as u64])??;
    let a = p.map(&t.fd, 0, 2 * GRANULE, RW)?;
    p.touch(a, pages(2))?;
    expect_tables(ctx, &p, 0)?;
    t.model.store(&p, a + 5 * PAGE, 5)?;
    t.coherent()?;
    t.model.verify_mapped(&p, a, 0..pages(2))
}

/// Not eligible: a part backed by a PMD-sized folio, which needs no table; it stays huge-mapped.
fn not_pmd_folio(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let _s = Setting::set(
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "advise",
    )?;
    let huge_pages = || kernel::kb_field("/proc/meminfo", "ShmemHugePages").unwrap_or(0);
    let before = huge_pages();
    let fd = sys::memfd(3 * GRANULE)?;
    let mut model = Model::new(ctx.seed, pages(3));
    let peers = [Peer::spawn()?, Peer::spawn()?];
    let mut at = vec![];
    for p in &peers {
        let a = p.place(0, 3 * GRANULE)?;
        p.mmap(a, 3 * GRANULE, RW, SHARED | FIXED, fd.as_raw_fd(), 0)??;
        // The middle granule huge, its neighbours of small pages.
        p.madvise(a + GRANULE, GRANULE, libc::MADV_HUGEPAGE)??;
        at.push(a);
    }
    for page in [0, GRANULE_PAGES, pages(2)] {
        model.store(&peers[0], at[0] + page * PAGE, page)?;
    }
    for (p, a) in peers.iter().zip(&at) {
        p.touch(*a, pages(3))?;
    }
    if huge_pages() < before + 2048 {
        crate::skip!("this kernel gave no huge page for shmem");
    }
    for (p, a) in peers.iter().zip(&at) {
        let smaps = kernel::smaps_of(p.pid, a + GRANULE)?;
        ensure_eq!(
            kernel::kb_in(&smaps, "ShmemPmdMapped"),
            Some(2048),
            "ShmemPmdMapped"
        );
        expect_tables(ctx, p, 2)?;
        model.verify_mapped(p, *a, 0..pages(3))?;
    }
    model.store(
        &peers[1],
        at[1] + (GRANULE_PAGES + 3) * PAGE,
        GRANULE_PAGES + 3,
    )?;
    model.verify_mapped(&peers[0], at[0], 0..pages(3))
}

/// A table of small entries for a huge page, made by one who wants no huge mappings, is not linked by who
/// takes them: two of each kind, and only the first kind shares.
fn huge_folio_stays_huge_beside_a_small_mapping(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let _s = Setting::set(
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "always",
    )?;
    let fd = sys::memfd(3 * GRANULE)?;
    let mut model = Model::new(ctx.seed, pages(3));
    model.fill(&fd, 0..pages(3))?;
    let mut all = vec![];
    for small in [true, true, false, false] {
        let p = Peer::spawn()?;
        let a = p.place(0, 3 * GRANULE)?;
        p.mmap(a, 3 * GRANULE, RW, SHARED | FIXED, fd.as_raw_fd(), 0)??;
        if small {
            p.madvise(a, 3 * GRANULE, libc::MADV_NOHUGEPAGE)??;
        }
        p.touch(a, pages(3))?;
        all.push((p, a, small));
    }
    let huge = |p: &Peer, a: u64| -> Res<u64> {
        Ok(kernel::kb_in(&kernel::smaps_of(p.pid, a)?, "ShmemPmdMapped").unwrap_or(0) / 2048)
    };
    // Whether these pages are huge at all is seen where nobody shares.
    let alone = Peer::spawn()?;
    let optout: Remote = |_, _| (flat(sys::set_ptshare(false).map(|()| 0)), vec![]);
    if ctx.sharing {
        ensure_eq!(alone.call(optout, &[], &[])?.0, 0, "PR_SET_PTSHARE, 0");
    }
    let a = alone.place(0, 3 * GRANULE)?;
    alone.mmap(a, 3 * GRANULE, RW, SHARED | FIXED, fd.as_raw_fd(), 0)??;
    alone.touch(a, pages(3))?;
    if huge(&alone, a)? != 3 {
        crate::skip!("this kernel gave no huge pages for shmem");
    }
    all.push((alone, a, false));
    for round in 0..2 {
        for (p, a, small) in &all {
            let (granules, tables) = if *small { (0, 3) } else { (3, 0) };
            ensure_eq!(
                huge(p, *a)?,
                granules,
                "huge granules where small is {small}, round {round}"
            );
            expect_tables(ctx, p, tables)?;
        }
        for (i, (p, a, _)) in all.iter().enumerate() {
            let page = i as u64 * 300 + 7 + round;
            model.store(p, a + page * PAGE, page)?;
        }
        for (p, a, _) in &all {
            model.verify_mapped(p, *a, 0..pages(3))?;
        }
        // What is dropped comes back as it was.
        for (p, a, _) in &all {
            p.madvise(*a, 3 * GRANULE, libc::MADV_DONTNEED)??;
        }
        for (p, a, _) in &all {
            p.touch(*a, pages(3))?;
        }
    }
    Ok(())
}

/// Writers and readers of one file, each kind sharing with its own; the team are the writers.
struct Mixed {
    writers: Team,
    readers: Vec<(Peer, u64)>,
}

fn mixed(ctx: &Ctx) -> Res<Mixed> {
    mixed_on(ctx, sys::memfd(0)?)
}

fn mixed_on(ctx: &Ctx, fd: OwnedFd) -> Res<Mixed> {
    let writers = Team::on(ctx, fd, 2, 2)?;
    let mut readers = vec![];
    for _ in 0..2 {
        let p = Peer::spawn()?;
        let a = p.map(&writers.fd, 0, 2 * GRANULE, RO)?;
        p.touch(a, pages(2))?;
        readers.push((p, a));
    }
    let mut m = Mixed { writers, readers };
    // The writers write every page that the readers are about to try, so that the writers' entries
    // are writable and dirty.
    for page in [0, 5, GRANULE_PAGES + 5] {
        m.writers.store(0, page)?;
        m.writers.store(1, page)?;
    }
    for (p, _) in &m.readers {
        expect_tables(ctx, p, 2)?;
    }
    Ok(m)
}

impl Mixed {
    fn verify(&self) -> Res {
        self.writers.verify_all()?;
        for (p, a) in &self.readers {
            self.writers.model.verify_mapped(p, *a, 0..pages(2))?;
        }
        Ok(())
    }
}

/// Processes with different protections use different tables.
fn protections_do_not_mix(ctx: &Ctx) -> Res {
    let before = kernel::gauges();
    let mut m = mixed(ctx)?;
    if let (true, Some(b), Some(now)) = (ctx.sharing, before, kernel::gauges()) {
        ensure_eq!(
            now.tables - b.tables,
            4,
            "tables of 2 granules, one for the writers and one for the readers each"
        );
        ensure_eq!(
            now.links - b.links,
            8,
            "links of 4 processes to 2 tables each"
        );
    }
    m.writers.coherent()?;
    m.verify()
}

/// A reader's store is refused, whatever writers did before or in between.
fn reader_cannot_store(ctx: &Ctx) -> Res {
    let mut m = mixed(ctx)?;
    for page in [0, 5, GRANULE_PAGES + 5, 17] {
        m.writers.store(0, page)?;
        let (p, a) = &m.readers[0];
        let got = p.store(a + page * PAGE, 0xbad)?;
        let refused =
            matches!(got, Err(f) if f.signal == libc::SIGSEGV && f.code == sys::SEGV_ACCERR);
        ensure!(
            refused,
            "a reader's store to page {page}: {got:?} instead of SIGSEGV/ACCERR"
        );
    }
    m.verify()
}

/// process_vm_writev into a reader is refused.
fn reader_cannot_be_written_by_process_vm(ctx: &Ctx) -> Res {
    let m = mixed(ctx)?;
    let (p, a) = &m.readers[0];
    for page in [0, 5, GRANULE_PAGES + 5] {
        let data = 0xbad_u64;
        let local = [&data as *const u64 as u64, 8];
        let remote = [a + page * PAGE, 8];
        let r = sys::syscall(
            libc::SYS_process_vm_writev,
            &[
                p.pid as u64,
                local.as_ptr() as u64,
                1,
                remote.as_ptr() as u64,
                1,
                0,
            ],
        );
        ensure_eq!(
            r,
            Err(Errno(libc::EFAULT)),
            "process_vm_writev into a reader"
        );
    }
    // The same call into a writer is fine, so the test does refuse for the right reason.
    let mut word = m.writers.model.clone();
    word.next();
    let value =
        sys::load64(&crate::oracle::first_word(word.seed, 5, word.pages[5]) as *const u64 as u64)?;
    let local = [&value as *const u64 as u64, 8];
    let remote = [m.writers.at(0, 5), 8];
    let a = [
        m.writers.peer(0).pid as u64,
        local.as_ptr() as u64,
        1,
        remote.as_ptr() as u64,
        1,
        0,
    ];
    ensure_eq!(
        sys::syscall(libc::SYS_process_vm_writev, &a),
        Ok(8),
        "process_vm_writev into a writer"
    );
    m.verify()
}

/// PTRACE_POKEDATA into a reader's shared mapping is refused.
fn reader_cannot_be_written_by_ptrace(ctx: &Ctx) -> Res {
    let m = mixed(ctx)?;
    let (p, a) = &m.readers[0];
    sys::syscall(
        libc::SYS_ptrace,
        &[u64::from(libc::PTRACE_ATTACH), p.pid as u64],
    )?;
    sys::wait(p.pid)?;
    let mut results = vec![];
    for page in [0, 5, GRANULE_PAGES + 5] {
        results.push(sys::syscall(
            libc::SYS_ptrace,
            &[
                u64::from(libc::PTRACE_POKEDATA),
                p.pid as u64,
                a + page * PAGE,
                0xbad,
            ],
        ));
    }
    sys::syscall(
        libc::SYS_ptrace,
        &[u64::from(libc::PTRACE_DETACH), p.pid as u64],
    )?;
    for r in results {
        ensure!(
            matches!(r, Err(Errno(libc::EIO | libc::EFAULT))),
            "PTRACE_POKEDATA into a reader: {r:?}"
        );
    }
    m.verify()
}

/// Writing /proc/PID/mem of a reader is refused.
fn reader_cannot_be_written_by_proc_mem(ctx: &Ctx) -> Res {
    let m = mixed(ctx)?;
    let (p, a) = &m.readers[0];
    let mem = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{}/mem", p.pid))?;
    for page in [0, 5, GRANULE_PAGES + 5] {
        let r = sys::pwrite(&mem, &[0xba; 8], a + page * PAGE);
        ensure!(
            matches!(r, Err(Errno(libc::EIO | libc::EFAULT))),
            "writing a reader's /proc/PID/mem: {r:?}"
        );
        let mut word = [0; 8];
        sys::pread(&mem, &mut word, a + page * PAGE)?;
        let want = crate::oracle::first_word(
            m.writers.model.seed,
            page,
            m.writers.model.pages[page as usize],
        );
        ensure_eq!(
            u64::from_ne_bytes(word),
            want,
            "reading a reader's /proc/PID/mem, page {page}"
        );
    }
    m.verify()
}

/// In a peer: registers one page as an io_uring fixed buffer, which pins it for writing.
const PIN_BY_URING: Remote = |a, _| {
    let mut params = [0u8; 120];
    let ring = match sys::syscall(libc::SYS_io_uring_setup, &[1, params.as_mut_ptr() as u64]) {
        Ok(fd) => own(fd),
        Err(e) => return (1, i64::from(e.0).to_ne_bytes().to_vec()),
    };
    let iov = [a[0], PAGE];
    let r = sys::syscall(
        libc::SYS_io_uring_register,
        &[ring.as_raw_fd() as u64, 0, iov.as_ptr() as u64, 1],
    );
    (flat(r), vec![])
};

/// io_uring refuses a reader's memory as a fixed buffer (GUP, FOLL_WRITE|FOLL_LONGTERM), and takes
/// a writer's when the file is of memory.
fn reader_cannot_be_pinned_for_write(ctx: &Ctx) -> Res {
    let m = mixed(ctx)?;
    let (p, a) = &m.readers[0];
    for page in [0, 5, GRANULE_PAGES + 5] {
        match p.call(PIN_BY_URING, &[a + page * PAGE], &[])? {
            (1, _) => crate::skip!("this kernel has no io_uring"),
            (r, _) => ensure_eq!(r, -i64::from(libc::EFAULT), "fixed buffer in a reader"),
        }
        let (r, _) = m
            .writers
            .peer(0)
            .call(PIN_BY_URING, &[m.writers.at(0, page)], &[])?;
        ensure_eq!(r, 0, "fixed buffer in a writer");
    }
    m.verify()
}

/// read(2) with O_DIRECT into a reader's memory (GUP fast, FOLL_WRITE) fails; into a writer's it
/// arrives, and everybody sees it.
fn reader_cannot_be_direct_io_target(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(64)?;
    let source = fs.file("source")?;
    let mut m = mixed(ctx)?;
    // The source holds what page 5 is to become.
    let g = m.writers.model.next();
    sys::pwrite(&source, &crate::oracle::page_bytes(ctx.seed, 5, g), 0)?;
    source.sync_all()?;
    let direct: File = {
        use std::os::unix::fs::OpenOptionsExt;
        std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(fs.dir.join("source"))?
    };
    let path = format!("/proc/{}/fd/{}", std::process::id(), direct.as_raw_fd());
    let read_here: Remote = |a, path| {
        use std::os::unix::fs::OpenOptionsExt;
        let Ok(f) = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(String::from_utf8_lossy(path).as_ref())
        else {
            return (-i64::from(libc::ENOENT), vec![]);
        };
        (
            flat(sys::syscall(
                libc::SYS_read,
                &[f.as_raw_fd() as u64, a[0], PAGE],
            )),
            vec![],
        )
    };
    let (p, a) = &m.readers[0];
    let (r, _) = p.call(read_here, &[a + 5 * PAGE], path.as_bytes())?;
    ensure_eq!(r, -i64::from(libc::EFAULT), "direct read into a reader");
    m.verify()?;
    let (r, _) = m
        .writers
        .peer(1)
        .call(read_here, &[m.writers.at(1, 5)], path.as_bytes())?;
    ensure_eq!(r, PAGE as i64, "direct read into a writer");
    m.writers.model.pages[5] = g;
    m.verify()
}

/// The kernel's GUP_TEST: fast and slow GUP and pins, with and without FOLL_WRITE.
fn reader_cannot_be_pinned_for_write_gup_test(ctx: &Ctx) -> Res {
    const PATH: &str = "/sys/kernel/debug/gup_test";
    if !std::path::Path::new(PATH).exists() {
        crate::skip!("no {PATH}");
    }
    let m = mixed(ctx)?;
    /// Returns how many of 4 pages were got, or the negative error.
    const GUP: Remote = |a, _| {
        let Ok(f) = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(PATH)
        else {
            return (-i64::from(libc::ENOENT), vec![]);
        };
        // struct gup_test: get_delta, put_delta, addr, size, nr_pages_per_call, gup_flags,
        // test_flags, which_pages[8].
        let mut arg = [0u64, 0, a[0], 4 * PAGE, 4 | (a[2] << 32), 0, 0, 0, 0, 0];
        match sys::syscall(
            libc::SYS_ioctl,
            &[f.as_raw_fd() as u64, a[1], arg.as_mut_ptr() as u64],
        ) {
            Ok(_) => ((arg[3] / PAGE) as i64, vec![]),
            Err(e) => (flat(Err(e)), vec![]),
        }
    };
    // _IOWR('g', nr, struct gup_test): GUP_FAST, PIN_FAST, PIN_LONGTERM, GUP_BASIC, PIN_BASIC.
    for nr in 1..=5u64 {
        let size = 4 * 8 + 3 * 4 + 8 * 4 + 4;
        let cmd = (3 << 30) | (size << 16) | (u64::from(b'g') << 8) | nr;
        let (r, a) = &m.readers[0];
        let (got, _) = r.call(GUP, &[*a, cmd, 1], &[])?;
        ensure!(
            got <= 0,
            "gup_test {nr} got {got} pages of a reader for write"
        );
        let (got, _) = r.call(GUP, &[*a, cmd, 0], &[])?;
        ensure_eq!(got, 4, "gup_test {nr}: pages of a reader for read");
        let (got, _) = m
            .writers
            .peer(0)
            .call(GUP, &[m.writers.at(0, 0), cmd, 1], &[])?;
        ensure_eq!(got, 4, "gup_test {nr}: pages of a writer for write");
    }
    m.verify()
}

/// In a peer: io_uring reads a file into memory. Arguments: address, how (0: buffered, 1: direct, by
/// the submitter; 2 and 3: the same by a thread of the kernel). The path comes as data.
const READ_BY_URING: Remote = |a, path| {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = if a[1] % 2 == 1 { libc::O_DIRECT } else { 0 };
    let Ok(f) = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(String::from_utf8_lossy(path).as_ref())
    else {
        return (-i64::from(libc::ENOENT), vec![]);
    };
    let t = Transfer {
        fd: f.as_raw_fd(),
        at: 0,
        addr: a[0],
        len: PAGE,
    };
    let r = Ring::new().and_then(|mut ring| ring.read(t, a[1] >= 2));
    (flat(r), vec![])
};

/// The reverse: writes memory to the file.
const WRITE_BY_URING: Remote = |a, path| {
    let Ok(f) = std::fs::OpenOptions::new()
        .write(true)
        .open(String::from_utf8_lossy(path).as_ref())
    else {
        return (-i64::from(libc::ENOENT), vec![]);
    };
    let t = Transfer {
        fd: f.as_raw_fd(),
        at: 0,
        addr: a[0],
        len: PAGE,
    };
    let r = Ring::new().and_then(|mut ring| ring.write(t, a[1] >= 2));
    (flat(r), vec![])
};

/// io_uring reads no file into a reader's memory, buffered or direct, by itself or by its workers; into
/// a writer's it does, and everybody sees it. A reader's memory can be written to a file.
fn reader_cannot_be_written_by_io_uring(ctx: &Ctx) -> Res {
    let fs = Ext4::mount(64)?;
    let source = fs.file("source")?;
    let sink = fs.file("sink")?;
    let mut m = mixed(ctx)?;
    let path = |name: &str| fs.dir.join(name).to_string_lossy().into_owned();
    for how in 0..4 {
        for page in [5, GRANULE_PAGES + 5] {
            let g = m.writers.model.next();
            sys::pwrite(&source, &page_bytes(ctx.seed, page, g), 0)?;
            source.sync_all()?;
            let (p, a) = &m.readers[0];
            let args = [a + page * PAGE, how];
            let (r, _) = p.call(READ_BY_URING, &args, path("source").as_bytes())?;
            if r == -i64::from(libc::ENOSYS) {
                crate::skip!("this kernel has no io_uring");
            }
            ensure_eq!(
                r,
                -i64::from(libc::EFAULT),
                "reading into a reader, way {how}"
            );
            m.verify()?;
            let (r, _) = p.call(WRITE_BY_URING, &args, path("sink").as_bytes())?;
            ensure_eq!(r, PAGE as i64, "writing from a reader, way {how}");
            let mut bytes = vec![0; PAGE as usize];
            sys::pread(&sink, &mut bytes, 0)?;
            let have = m.writers.model.pages[page as usize];
            let why = diagnose(m.writers.model.seed, page, have, &bytes);
            ensure!(why.is_none(), "written from a reader: {why:?}");
            let args = [m.writers.at(1, page), how];
            let (r, _) = m
                .writers
                .peer(1)
                .call(READ_BY_URING, &args, path("source").as_bytes())?;
            ensure_eq!(r, PAGE as i64, "reading into a writer, way {how}");
            m.writers.model.pages[page as usize] = g;
            m.verify()?;
        }
    }
    Ok(())
}

/// FUTEX_WAKE_OP, with which the kernel itself modifies a word, is refused in a reader; in a writer
/// everybody sees the new word.
fn reader_cannot_be_written_by_futex(ctx: &Ctx) -> Res {
    const FUTEX_WAKE_OP: u64 = 5;
    // FUTEX_OP_SET of 0x7f, comparing with 0 for equality.
    const SET: u64 = 0x7f << 12;
    let m = mixed(ctx)?;
    let op: Remote = |a, _| {
        let r = sys::syscall(libc::SYS_futex, &[a[0], FUTEX_WAKE_OP, 1, 1, a[1], SET]);
        (flat(r), vec![])
    };
    for page in [0, 5, GRANULE_PAGES + 5] {
        let (p, a) = &m.readers[0];
        let own = p.mmap(0, PAGE, RW, PRIVATE | ANON, -1, 0)??;
        let (r, _) = p.call(op, &[own, a + page * PAGE], &[])?;
        ensure_eq!(r, -i64::from(libc::EFAULT), "FUTEX_WAKE_OP in a reader");
        m.verify()?;
    }
    let page = 5;
    let w = m.writers.peer(0);
    let own = w.mmap(0, PAGE, RW, PRIVATE | ANON, -1, 0)??;
    let (r, _) = w.call(op, &[own, m.writers.at(0, page)], &[])?;
    ensure_eq!(r, 0, "FUTEX_WAKE_OP in a writer");
    for (p, a) in [
        (m.writers.peer(1), m.writers.at(1, page)),
        (&m.readers[0].0, m.readers[0].1 + page * PAGE),
        (&m.readers[1].0, m.readers[1].1 + page * PAGE),
    ] {
        ensure_eq!(p.load(a)?? as u32, 0x7f, "the word that the kernel set");
    }
    Ok(())
}

/// Those who map the file executable share a table, and nobody else executes by it.
fn reader_cannot_execute(ctx: &Ctx) -> Res {
    const RX: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    const RET: u8 = 0xc3;
    ctx.opt_in()?;
    let fd = sys::memfd(2 * GRANULE)?;
    sys::pwrite(&fd, &vec![RET; 2 * GRANULE as usize], 0)?;
    // Calls code in a child, since a fault of the code itself is not survived.
    let execute: Remote = |a, _| match sys::fork() {
        Ok(0) => {
            // SAFETY: if it can be executed at all, what is there only returns.
            let f = unsafe { std::mem::transmute::<usize, extern "C" fn()>(a[0] as usize) };
            f();
            sys::exit_now(0)
        }
        Ok(pid) => (sys::wait(pid).map_or(-1, i64::from), vec![]),
        Err(e) => (flat(Err(e)), vec![]),
    };
    let mut peers = vec![];
    for prot in [RX, RX, RO, RO, RW, RW] {
        let p = Peer::spawn()?;
        let a = p.map(&fd, 0, 2 * GRANULE, prot)?;
        p.touch(a, pages(2))?;
        expect_tables(ctx, &p, 2)?;
        peers.push((p, a, prot));
    }
    for page in [0, 9, GRANULE_PAGES + 9] {
        for (p, a, prot) in &peers {
            let (status, _) = p.call(execute, &[a + page * PAGE], &[])?;
            let wanted = if *prot == RX { 0 } else { libc::SIGSEGV };
            let got = status as i32 & !0x80;
            ensure_eq!(
                got,
                wanted,
                "wait status of a call of page {page}, protection {prot}"
            );
        }
        for (p, a, prot) in &peers {
            let r = p.store(a + page * PAGE, u64::from_ne_bytes([RET; 8]))?;
            ensure_eq!(r.is_ok(), *prot == RW, "store by protection {prot}");
        }
    }
    for (p, _, _) in &peers {
        expect_tables(ctx, p, 2)?;
    }
    Ok(())
}

/// PTRACE_POKEDATA, /proc/PID/mem and process_vm_writev into one writer are seen by everybody.
fn writer_is_written_for_all_by_ptrace(ctx: &Ctx) -> Res {
    let m = mixed(ctx)?;
    let pid = m.writers.peer(0).pid;
    let seen = |page: u64, value: u64| -> Res {
        for (p, a) in &m.readers {
            ensure_eq!(
                p.load(a + page * PAGE)?,
                Ok(value),
                "a reader's page {page}"
            );
        }
        let other = m.writers.peer(1).load(m.writers.at(1, page))?;
        ensure_eq!(other, Ok(value), "the other writer's page {page}");
        Ok(())
    };
    let mem = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    // The last one is absent before.
    sys::punch(&m.writers.fd, 17 * PAGE, PAGE)?;
    for page in [0, GRANULE_PAGES + 5, 17] {
        let at = m.writers.at(0, page);
        let mut value = 0x1111 + page;
        sys::syscall(
            libc::SYS_ptrace,
            &[u64::from(libc::PTRACE_ATTACH), pid as u64],
        )?;
        sys::wait(pid)?;
        let poked = sys::syscall(
            libc::SYS_ptrace,
            &[u64::from(libc::PTRACE_POKEDATA), pid as u64, at, value],
        );
        sys::syscall(
            libc::SYS_ptrace,
            &[u64::from(libc::PTRACE_DETACH), pid as u64],
        )?;
        poked?;
        seen(page, value)?;
        value += 0x1111;
        sys::pwrite(&mem, &value.to_ne_bytes(), at)?;
        seen(page, value)?;
        value += 0x1111;
        let (local, remote) = ([&raw const value as u64, 8], [at, 8]);
        let a = [
            pid as u64,
            local.as_ptr() as u64,
            1,
            remote.as_ptr() as u64,
            1,
            0,
        ];
        ensure_eq!(
            sys::syscall(libc::SYS_process_vm_writev, &a),
            Ok(8),
            "process_vm_writev"
        );
        seen(page, value)?;
    }
    m.writers.expect_all(2)
}

/// /proc/PID/mem reads even what its process may not; the fault it takes gives nobody access.
fn prot_none_is_read_by_proc_mem_only(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    let blind = [Peer::spawn()?, Peer::spawn()?];
    let mut at = vec![];
    for p in &blind {
        at.push(p.map(&t.fd, 0, 2 * GRANULE, sys::NONE)?);
    }
    for page in [0, 5, GRANULE_PAGES + 5] {
        t.store(1, page)?;
        for (p, a) in blind.iter().zip(&at) {
            let mem = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(format!("/proc/{}/mem", p.pid))?;
            let mut word = [0; 8];
            sys::pread(&mem, &mut word, a + page * PAGE)?;
            let want = first_word(t.model.seed, page, t.model.pages[page as usize]);
            ensure_eq!(u64::from_ne_bytes(word), want, "read by /proc/PID/mem");
            let r = sys::pwrite(&mem, &word, a + page * PAGE);
            ensure!(r.is_err(), "written by /proc/PID/mem");
        }
        for (p, a) in blind.iter().zip(&at) {
            for got in [
                p.load(a + page * PAGE)?.map(drop),
                p.store(a + page * PAGE, 1)?,
            ] {
                ensure!(
                    matches!(got, Err(f) if f.code == sys::SEGV_ACCERR),
                    "access to PROT_NONE: {got:?}"
                );
            }
        }
    }
    t.coherent()?;
    t.expect_all(2)
}

/// A PROT_NONE mapping of a shared file gives nothing, neither before nor after others populate.
fn prot_none_shares_nothing_visible(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 2, 2)?;
    let p = Peer::spawn()?;
    let a = p.map(&t.fd, 0, 2 * GRANULE, sys::NONE)?;
    for page in [0, GRANULE_PAGES + 5] {
        let got = p.load(a + page * PAGE)?;
        ensure!(
            matches!(got, Err(f) if f.code == sys::SEGV_ACCERR),
            "load from PROT_NONE: {got:?}"
        );
        let got = p.store(a + page * PAGE, 1)?;
        ensure!(
            matches!(got, Err(f) if f.code == sys::SEGV_ACCERR),
            "store to PROT_NONE: {got:?}"
        );
    }
    p.mprotect(a, 2 * GRANULE, RW)??;
    p.touch(a, pages(2))?;
    expect_tables(ctx, &p, 2)?;
    t.model.store(&p, a + 3 * PAGE, 3)?;
    t.coherent()?;
    t.model.verify_mapped(&p, a, 0..pages(2))
}

/// A breakpoint in a private mapping of a file is not in its page, so not in shared tables; a process that has
/// the file mapped shared cannot get one there.
fn uprobe_stays_out_of_shared_tables(ctx: &Ctx) -> Res {
    ctx.opt_in()?;
    let fd = sys::memfd(2 * GRANULE)?;
    let mut model = Model::new(ctx.seed, pages(2));
    model.fill(&fd, 0..pages(2))?;
    let page = GRANULE_PAGES + 8;
    sys::pwrite(&fd, &probe::code_page(), page * PAGE)?;
    let run = RO | libc::PROT_EXEC as u64;
    let mut sharers = vec![];
    for _ in 0..2 {
        let p = Peer::spawn()?;
        let a = p.map(&fd, 0, 2 * GRANULE, run)?;
        p.touch(a, pages(2))?;
        sharers.push((p, a));
    }
    let own = Peer::spawn()?;
    let mine = own.place(0, 2 * GRANULE)?;
    own.mmap(mine, 2 * GRANULE, run, PRIVATE | FIXED, fd.as_raw_fd(), 0)??;
    own.touch(mine, pages(2))?;
    let seen = |first: u64| -> Res {
        probe::holds(&own, mine + page * PAGE, first)?;
        probe::runs(&own, mine + page * PAGE)?;
        model.verify_mapped(&own, mine, 0..page)?;
        for (p, a) in &sharers {
            probe::holds(p, a + page * PAGE, probe::CODE)?;
            probe::runs(p, a + page * PAGE)?;
            model.verify_mapped(p, *a, 0..page)?;
            expect_tables(ctx, p, 2)?;
        }
        Ok(())
    };
    seen(probe::CODE)?;
    let of_own = Probe::new(&fd, page * PAGE, own.pid)?;
    let of_sharer = Probe::new(&fd, page * PAGE, sharers[0].0.pid)?;
    for times in 1..3 {
        seen(probe::BROKEN)?;
        of_own.hit(times)?;
        of_sharer.hit(0)?;
    }
    drop(of_own);
    seen(probe::CODE)?;
    of_sharer.hit(0)
}
