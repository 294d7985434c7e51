// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system calls that the measurements need, behind types that keep their promises.
//!
//! All `unsafe` of this crate is here. Two rules make the rest sound: the process has one thread while it
//! forks, and memory of a [`Map`] is only touched through volatile accesses inside its bounds.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Bytes of a base page; the project is for x86-64 only.
pub const PAGE: usize = 4096;
/// Bytes that one last-level page table maps.
pub const GRANULE: usize = 2 << 20;

/// `prctl` operation by which a process asks for shared page tables (a fact of the contract).
const PR_SET_PTSHARE: libc::c_int = 0x5054_5348;
/// Its reading counterpart.
const PR_GET_PTSHARE: libc::c_int = 0x5054_5349;

/// The result of a system call, with `errno` taken when it says failure.
fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

fn c_string(s: &str) -> io::Result<CString> {
    CString::new(s).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// The time-stamp counter. Under QEMU's `-icount shift=0` it counts executed instructions.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the instruction exists on every x86-64 CPU and touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Executes `2 * rounds` instructions and nothing else, to tell whether [`now`] counts instructions.
#[inline(never)]
pub fn spin(rounds: u64) {
    // SAFETY: the block changes a register that it declares, and flags.
    unsafe {
        core::arch::asm!("2:", "dec {n}", "jnz 2b", n = inout(reg) rounds => _, options(nomem, nostack));
    }
}

/// Asks that mappings of this process and of its children share page tables.
pub fn ask_for_sharing() -> io::Result<()> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::prctl(PR_SET_PTSHARE, 1, 0, 0, 0) }.into())?;
    // SAFETY: no pointer is passed.
    let got = check(unsafe { libc::prctl(PR_GET_PTSHARE, 0, 0, 0, 0) }.into())?;
    if got != 1 {
        return Err(io::Error::other(format!(
            "PR_GET_PTSHARE answers {got} after the request"
        )));
    }
    Ok(())
}

/// Asks that forks of this process and of its children share page tables.
pub fn ask_for_odf() -> io::Result<()> {
    const SWITCH: &str = "/proc/self/use_odf";
    std::fs::write(SWITCH, "1")?;
    let got = std::fs::read_to_string(SWITCH)?;
    if got != "1\n" {
        return Err(io::Error::other(format!(
            "{SWITCH} reads {got:?} after it was set"
        )));
    }
    Ok(())
}

/// Turns address randomisation off for the programs executed from now on; true when it was on.
pub fn fix_addresses() -> io::Result<bool> {
    // SAFETY: no pointer is passed.
    let old = check(unsafe { libc::personality(0xffff_ffff) }.into())?;
    if old & libc::c_long::from(libc::ADDR_NO_RANDOMIZE) != 0 {
        return Ok(false);
    }
    let fixed = old | libc::c_long::from(libc::ADDR_NO_RANDOMIZE);
    // SAFETY: no pointer is passed.
    check(unsafe { libc::personality(fixed as libc::c_ulong) }.into())?;
    Ok(true)
}

/// Makes this process and its children run to completion: the first real-time class, equal priority.
pub fn run_undisturbed() -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: `param` outlives the call.
    check(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &param) }.into())?;
    Ok(())
}

/// Makes this process and its children such as do not interrupt another one when they wake up.
pub fn run_in_batch() -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: `param` outlives the call.
    check(unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &param) }.into())?;
    Ok(())
}

/// Runs a process that computes whenever nobody else wants to, until the machine stops. Under the instruction
/// clock, time in which the CPU has nothing to do is skipped: with this, what waits for the host does not find
/// its timeouts expired.
pub fn never_idle() -> io::Result<()> {
    let Child(_) = fork(|| {
        let param = libc::sched_param { sched_priority: 0 };
        // SAFETY: `param` outlives the call.
        check(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &param) }.into())?;
        loop {
            spin(1_000_000);
        }
    })?;
    Ok(())
}

/// Minor faults of this process so far.
pub fn minor_faults() -> io::Result<u64> {
    // SAFETY: all-zero bytes are a valid `rusage`, a struct of integers.
    let mut usage: libc::rusage = unsafe { core::mem::zeroed() };
    // SAFETY: `usage` is writable and of the type asked for.
    check(unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) }.into())?;
    Ok(usage.ru_minflt as u64)
}

/// An unnamed memory file of `len` bytes with every page allocated.
pub fn memfd(name: &str, len: usize, flags: libc::c_uint) -> io::Result<File> {
    let name = c_string(name)?;
    // SAFETY: `name` is NUL-terminated and outlives the call.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), flags | libc::MFD_CLOEXEC) }.into())?;
    // SAFETY: the descriptor is new and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd as i32) };
    file.set_len(len as u64)?;
    Ok(file)
}

/// Allocates the first `len` bytes of `file`.
pub fn allocate(file: &File, len: usize) -> io::Result<()> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len as libc::off_t) }.into())?;
    Ok(())
}

/// Who else sees what is written to a mapping.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `MAP_SHARED`.
    Shared,
    /// `MAP_PRIVATE`.
    Private,
}

/// A mapping of this process, unmapped when dropped.
pub struct Map {
    addr: usize,
    len: usize,
}

impl Map {
    /// Maps `len` bytes of `file` from its start (or anonymous memory), readable and writable, where the
    /// kernel likes.
    #[inline]
    pub fn new(file: Option<&File>, len: usize, kind: Kind) -> io::Result<Map> {
        Self::place(file, len, kind, 0, 0)
    }

    /// The same at a multiple of the granule, so that where table boundaries fall does not depend on the
    /// kernel's choice.
    pub fn aligned(file: Option<&File>, len: usize, kind: Kind) -> io::Result<Map> {
        let room = Self::place(None, len + GRANULE, Kind::Private, 0, libc::MAP_NORESERVE)?;
        let addr = room.addr.next_multiple_of(GRANULE);
        drop(room);
        Self::place(file, len, kind, addr, libc::MAP_FIXED_NOREPLACE)
    }

    #[inline]
    fn place(
        file: Option<&File>,
        len: usize,
        kind: Kind,
        addr: usize,
        flags: i32,
    ) -> io::Result<Map> {
        let kind = if kind == Kind::Shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        let (fd, anon) = file.map_or((-1, libc::MAP_ANONYMOUS), |f| (f.as_raw_fd(), 0));
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without MAP_FIXED a new mapping replaces nothing; no Rust object lives in it.
        let at = unsafe { libc::mmap(addr as *mut _, len, prot, kind | anon | flags, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Map {
            addr: at as usize,
            len,
        })
    }

    /// Reads one byte of each page (of each `step` bytes).
    #[inline]
    pub fn read_every(&self, step: usize) {
        let end = self.addr + self.len;
        let mut at = self.addr;
        while at < end {
            // SAFETY: `at` is inside the mapping, which is readable and lives as long as `self`.
            unsafe { core::ptr::read_volatile(at as *const u8) };
            at += step;
        }
    }

    /// Writes one byte of each `step` bytes.
    #[inline]
    pub fn write_every(&self, step: usize) {
        let end = self.addr + self.len;
        let mut at = self.addr;
        while at < end {
            // SAFETY: `at` is inside the mapping, which is writable and lives as long as `self`.
            unsafe { core::ptr::write_volatile(at as *mut u8, 1) };
            at += step;
        }
    }

    /// Writes one byte, `offset` bytes from the start.
    #[inline(always)]
    pub fn write_at(&self, offset: usize) {
        assert!(offset < self.len);
        // SAFETY: the address is inside the mapping, which is writable and lives as long as `self`.
        unsafe { core::ptr::write_volatile((self.addr + offset) as *mut u8, 1) };
    }

    /// The word `offset` bytes from the start.
    pub fn word_at(&self, offset: usize) -> u64 {
        assert!(offset & 7 == 0 && offset < self.len);
        // SAFETY: the address is aligned and inside the mapping, which is whole pages.
        unsafe { core::ptr::read_volatile((self.addr + offset) as *const u64) }
    }

    /// Stores the word `offset` bytes from the start.
    #[inline(always)]
    pub fn set_word_at(&self, offset: usize, value: u64) {
        assert!(offset & 7 == 0 && offset < self.len);
        // SAFETY: the address is aligned and inside the mapping, which is whole pages and writable.
        unsafe { core::ptr::write_volatile((self.addr + offset) as *mut u64, value) }
    }

    /// Locks the whole mapping into memory.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping; locking changes nothing that a program can see.
        check(unsafe { libc::mlock(self.addr as *const _, self.len) }.into())?;
        Ok(())
    }

    /// Has the kernel pin a page of the mapping and let go of it, which it remembers about the process.
    pub fn pin_for_a_moment(&self) -> io::Result<()> {
        let mut word = 0_u64;
        let here = libc::iovec {
            iov_base: (&raw mut word).cast(),
            iov_len: size_of::<u64>(),
        };
        let there = libc::iovec {
            iov_base: self.addr as *mut _,
            iov_len: size_of::<u64>(),
        };
        // SAFETY: `here` describes `word`, which is writable; `there` is only read, inside the mapping.
        let copied = unsafe { libc::process_vm_readv(libc::getpid(), &here, 1, &there, 1, 0) };
        check(copied as libc::c_long).map(drop)
    }

    /// The word at the start of the mapping.
    pub fn word(&self) -> u64 {
        // SAFETY: every mapping is at least a page long and page aligned.
        unsafe { core::ptr::read_volatile(self.addr as *const u64) }
    }

    /// Stores the word at the start of the mapping.
    #[inline(always)]
    pub fn set_word(&self, value: u64) {
        // SAFETY: every mapping is at least a page long, page aligned and writable.
        unsafe { core::ptr::write_volatile(self.addr as *mut u64, value) }
    }

    /// `madvise` over the whole mapping.
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range is this mapping; no advice used here changes what Rust objects contain.
        check(unsafe { libc::madvise(self.addr as *mut _, self.len, advice) }.into())?;
        Ok(())
    }

    /// `mprotect` over the whole mapping: read only, or readable and writable.
    #[inline]
    pub fn protect(&self, writable: bool) -> io::Result<()> {
        let prot = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: the range is this mapping; nothing writes to it while it is read only.
        check(unsafe { libc::mprotect(self.addr as *mut _, self.len, prot) }.into())?;
        Ok(())
    }

    /// Unmaps, saying what went wrong if something did.
    #[inline]
    pub fn unmap(self) -> io::Result<()> {
        // SAFETY: the range is this mapping, and `self` is gone afterwards.
        let ret = unsafe { libc::munmap(self.addr as *mut _, self.len) };
        core::mem::forget(self);
        check(ret.into()).map(drop)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, and nothing can refer to it any more.
        unsafe { libc::munmap(self.addr as *mut _, self.len) };
    }
}

/// A pipe: reading end, writing end.
pub fn pipe() -> io::Result<(File, File)> {
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for two descriptors.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }.into())?;
    // SAFETY: both descriptors are new and nobody else owns them.
    let [read, write] = fds.map(|fd| unsafe { File::from(OwnedFd::from_raw_fd(fd)) });
    Ok((read, write))
}

/// Keeps `file` open over `execve`, and gives its number.
pub fn keep_over_exec(file: &File) -> io::Result<i32> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) }.into())?;
    Ok(file.as_raw_fd())
}

/// A child process that has not been waited for.
#[must_use = "a child that nobody waits for stays a zombie"]
pub struct Child(libc::pid_t);

/// Forks; `body` runs in the child, whose exit status says whether it succeeded.
#[inline]
pub fn fork(body: impl FnOnce() -> anyhow::Result<()>) -> io::Result<Child> {
    // SAFETY: the process has one thread, so the child may use everything it inherits.
    let pid = check(unsafe { libc::fork() }.into())? as libc::pid_t;
    if pid == 0 {
        let status = match body() {
            Ok(()) => 0,
            Err(e) => {
                eprintln!("guest-bench: child: {e:#}");
                1
            }
        };
        leave(status);
    }
    Ok(Child(pid))
}

/// Ends this process at once, without running destructors or flushing what its parent buffered.
#[inline(always)]
pub fn leave(status: i32) -> ! {
    // SAFETY: ending the process invalidates nothing.
    unsafe { libc::_exit(status) }
}

impl Child {
    /// Waits, and turns anything but success into an error.
    #[inline]
    pub fn wait(self) -> io::Result<()> {
        let mut status = 0;
        // SAFETY: `status` is writable; the pid is of a child that was not waited for.
        check(unsafe { libc::waitpid(self.0, &mut status, 0) }.into())?;
        if status == 0 {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "a child ended with wait status {status:#x}"
            )))
        }
    }
}

/// A program prepared for `execve` so that nothing but the call is left to measure.
pub struct Program {
    path: CString,
}

impl Program {
    /// The program at `path`, without arguments and environment.
    pub fn new(path: &str) -> io::Result<Program> {
        Ok(Program {
            path: c_string(path)?,
        })
    }

    /// Replaces this process; comes back only to say why it could not.
    #[inline(always)]
    pub fn exec(&self) -> io::Error {
        let argv = [self.path.as_ptr(), core::ptr::null()];
        let envp = [core::ptr::null()];
        // SAFETY: the path is NUL-terminated, both arrays end with a null pointer, all outlive the call.
        unsafe { libc::execve(self.path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
        io::Error::last_os_error()
    }
}

/// `mount(2)` without options; a target that already has such a mount is fine.
pub fn mount(source: &str, target: &str, fstype: &str, options: &str) -> io::Result<()> {
    let (source, target, fstype, options) = (
        c_string(source)?,
        c_string(target)?,
        c_string(fstype)?,
        c_string(options)?,
    );
    // SAFETY: four NUL-terminated strings that outlive the call.
    let ret = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fstype.as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    };
    check(ret.into()).map(drop)
}

/// `umount(2)`: what was written is on the device afterwards.
pub fn unmount(target: &str) -> io::Result<()> {
    let target = c_string(target)?;
    // SAFETY: a NUL-terminated string that outlives the call.
    check(unsafe { libc::umount(target.as_ptr()) }.into()).map(drop)
}

/// `swapon(2)`.
pub fn swap_on(device: &str) -> io::Result<()> {
    let device = c_string(device)?;
    // SAFETY: a NUL-terminated string that outlives the call.
    check(unsafe { libc::swapon(device.as_ptr(), 0) }.into()).map(drop)
}

/// Sends `signal` to a process that this one started.
pub fn signal(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::kill(pid as libc::pid_t, signal) }.into()).map(drop)
}

/// Lets everything that waits for idle time run, so that it does not fall into the next measurement.
pub fn settle() {
    std::thread::sleep(Duration::from_millis(2));
}
