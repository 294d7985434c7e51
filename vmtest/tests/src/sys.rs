//! Thin wrappers over the system calls the tests use, and loads and stores that survive a fault.
//!
//! Everything that touches tested memory goes through [`copy`], [`load64`] or [`store64`]: a bad
//! access comes back as a [`Fault`] value instead of killing the process.

use std::arch::global_asm;
use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Size of a base page.
pub const PAGE: u64 = 4096;
/// What one page table maps: the unit of sharing.
pub const GRANULE: u64 = 2 << 20;
/// Pages in a granule.
pub const GRANULE_PAGES: u64 = GRANULE / PAGE;

/// `prctl` option: ask for sharing.
pub const PR_SET_PTSHARE: u64 = 0x5054_5348;
/// `prctl` option: read the setting.
pub const PR_GET_PTSHARE: u64 = 0x5054_5349;
/// `mmap` flag: the explicit form.
pub const MAP_SHARED_PT: u64 = 0x20_0000;

/// `PROT_READ | PROT_WRITE`.
pub const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
/// `PROT_READ`.
pub const RO: u64 = libc::PROT_READ as u64;
/// `PROT_NONE`.
pub const NONE: u64 = 0;
/// `MAP_SHARED`.
pub const SHARED: u64 = libc::MAP_SHARED as u64;
/// `MAP_PRIVATE`.
pub const PRIVATE: u64 = libc::MAP_PRIVATE as u64;
/// `MAP_ANONYMOUS`.
pub const ANON: u64 = libc::MAP_ANONYMOUS as u64;
/// `MAP_FIXED`.
pub const FIXED: u64 = libc::MAP_FIXED as u64;
/// `MAP_FIXED_NOREPLACE`.
pub const NOREPLACE: u64 = libc::MAP_FIXED_NOREPLACE as u64;

/// A failed system call's error number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Errno {
    /// The calling thread's current error number.
    pub fn last() -> Errno {
        Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}

/// Result of a system call.
pub type Sys<T> = Result<T, Errno>;

/// Any system call by number. Pointers among the arguments are the caller's business: the kernel
/// checks them, and what it writes through them must be memory the caller may have overwritten.
pub fn syscall(nr: i64, a: &[u64]) -> Sys<u64> {
    let at = |i: usize| a.get(i).copied().unwrap_or(0);
    // SAFETY: a system call cannot break memory safety except through the pointers and mappings
    // it is given, which is the documented duty of the caller.
    let r = unsafe { libc::syscall(nr, at(0), at(1), at(2), at(3), at(4), at(5)) };
    if r == -1 {
        Err(Errno::last())
    } else {
        Ok(r as u64)
    }
}

/// `mmap`.
pub fn mmap(addr: u64, len: u64, prot: u64, flags: u64, fd: RawFd, off: u64) -> Sys<u64> {
    syscall(
        libc::SYS_mmap,
        &[addr, len, prot, flags, fd as i64 as u64, off],
    )
}

/// `munmap`.
pub fn munmap(addr: u64, len: u64) -> Sys<()> {
    syscall(libc::SYS_munmap, &[addr, len]).map(drop)
}

/// `prctl(PR_GET_PTSHARE)`.
pub fn get_ptshare() -> Sys<u64> {
    syscall(libc::SYS_prctl, &[PR_GET_PTSHARE])
}

/// `prctl(PR_SET_PTSHARE)`.
pub fn set_ptshare(on: bool) -> Sys<()> {
    syscall(libc::SYS_prctl, &[PR_SET_PTSHARE, on as u64]).map(drop)
}

/// An anonymous memory file of `len` bytes.
pub fn memfd(len: u64) -> Sys<OwnedFd> {
    memfd_flags(len, 0)
}

/// `memfd_create` with flags, sized.
pub fn memfd_flags(len: u64, flags: u32) -> Sys<OwnedFd> {
    // SAFETY: the name is a NUL-terminated string.
    let fd = unsafe { libc::memfd_create(c"guest-tests".as_ptr(), flags) };
    if fd < 0 {
        return Err(Errno::last());
    }
    // SAFETY: the descriptor was just created and nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    ftruncate(&fd, len)?;
    Ok(fd)
}

/// `ftruncate`.
pub fn ftruncate(fd: &impl AsRawFd, len: u64) -> Sys<()> {
    syscall(libc::SYS_ftruncate, &[fd.as_raw_fd() as u64, len]).map(drop)
}

/// `fallocate(PUNCH_HOLE | KEEP_SIZE)`.
pub fn punch(fd: &impl AsRawFd, off: u64, len: u64) -> Sys<()> {
    let mode = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
    syscall(
        libc::SYS_fallocate,
        &[fd.as_raw_fd() as u64, mode, off, len],
    )
    .map(drop)
}

/// `pread` of exactly `buf.len()` bytes.
pub fn pread(fd: &impl AsRawFd, buf: &mut [u8], off: u64) -> Sys<()> {
    let mut done = 0;
    while done < buf.len() {
        let rest = &mut buf[done..];
        let a = [
            fd.as_raw_fd() as u64,
            rest.as_mut_ptr() as u64,
            rest.len() as u64,
            off + done as u64,
        ];
        match syscall(libc::SYS_pread64, &a)? {
            0 => return Err(Errno(libc::ENODATA)),
            n => done += n as usize,
        }
    }
    Ok(())
}

/// `pwrite` of all of `buf`.
pub fn pwrite(fd: &impl AsRawFd, buf: &[u8], off: u64) -> Sys<()> {
    let mut done = 0;
    while done < buf.len() {
        let rest = &buf[done..];
        let a = [
            fd.as_raw_fd() as u64,
            rest.as_ptr() as u64,
            rest.len() as u64,
            off + done as u64,
        ];
        done += syscall(libc::SYS_pwrite64, &a)? as usize;
    }
    Ok(())
}

/// A connected pair of stream sockets.
pub fn socketpair() -> Sys<(OwnedFd, OwnedFd)> {
    let mut fds = [0 as RawFd; 2];
    // SAFETY: `fds` has room for the two descriptors.
    let r = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    };
    if r < 0 {
        return Err(Errno::last());
    }
    // SAFETY: both descriptors were just created and nobody else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// `fork`; 0 in the child.
pub fn fork() -> Sys<i32> {
    // SAFETY: callers fork only from single-threaded processes, so the child may do anything.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        Err(Errno::last())
    } else {
        Ok(pid)
    }
}

/// Leaves the process at once, running no exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit only ends the process.
    unsafe { libc::_exit(code) }
}

/// `kill`.
pub fn kill(pid: i32, sig: i32) -> Sys<()> {
    syscall(libc::SYS_kill, &[pid as i64 as u64, sig as u64]).map(drop)
}

/// Waits for a child and returns its wait status.
pub fn wait(pid: i32) -> Sys<i32> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the result.
        let r = unsafe { libc::waitpid(pid, &mut status, 0) };
        match r {
            -1 if Errno::last().0 == libc::EINTR => continue,
            -1 => return Err(Errno::last()),
            _ => return Ok(status),
        }
    }
}

/// A wait status in words.
pub fn describe_status(status: i32) -> String {
    if libc::WIFSIGNALED(status) {
        format!("killed by signal {}", libc::WTERMSIG(status))
    } else {
        format!("exit status {}", libc::WEXITSTATUS(status))
    }
}

/// A descriptor of a process, which can be read when the process has ended.
pub fn pidfd(pid: i32) -> Sys<OwnedFd> {
    let fd = syscall(libc::SYS_pidfd_open, &[pid as u64, 0])? as RawFd;
    // SAFETY: the kernel just returned this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A duplicate of descriptor `fd` of process `pid`.
pub fn steal_fd(pid: i32, fd: RawFd) -> Sys<OwnedFd> {
    let pidfd = pidfd(pid)?;
    let got = syscall(
        libc::SYS_pidfd_getfd,
        &[pidfd.as_raw_fd() as u64, fd as u64, 0],
    )? as RawFd;
    // SAFETY: the kernel just returned this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(got) })
}

/// Pins the calling thread to one CPU (modulo those online); no effect where that is refused.
pub fn pin_to_cpu(cpu: usize) {
    let online = cpus();
    // SAFETY: an all-zero cpu_set_t is the empty set; the calls only read and write `set`.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu % online, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// CPUs online.
pub fn cpus() -> usize {
    // SAFETY: sysconf has no preconditions.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN).max(1) as usize }
}

/// Minor and major faults of the calling process so far.
pub fn fault_counts() -> (u64, u64) {
    // SAFETY: rusage is plain data; getrusage fills it.
    unsafe {
        let mut u: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut u);
        (u.ru_minflt as u64, u.ru_majflt as u64)
    }
}

/// A memory access the kernel answered with a signal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// `SIGSEGV` or `SIGBUS`.
    pub signal: i32,
    /// `si_code`.
    pub code: i32,
    /// `si_addr`.
    pub addr: u64,
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.signal, self.code) {
            (libc::SIGSEGV, 1) => "SIGSEGV/MAPERR",
            (libc::SIGSEGV, 2) => "SIGSEGV/ACCERR",
            (libc::SIGSEGV, _) => "SIGSEGV",
            (libc::SIGBUS, 2) => "SIGBUS/ADRERR",
            (libc::SIGBUS, 4) => "SIGBUS/MCEERR_AR",
            (libc::SIGBUS, _) => "SIGBUS",
            _ => "signal",
        };
        write!(f, "{name} (code {}) at {:#x}", self.code, self.addr)
    }
}

/// `SEGV_MAPERR`.
pub const SEGV_MAPERR: i32 = 1;
/// `SEGV_ACCERR`.
pub const SEGV_ACCERR: i32 = 2;
/// `BUS_ADRERR`.
pub const BUS_ADRERR: i32 = 2;

#[repr(C)]
struct RawAccess {
    status: u64,
    addr: u64,
}

// Each access instruction has its own label. The signal handler recognises them, and resumes at
// `gt_fixup` with the outcome in rax:rdx, the two registers in which RawAccess is returned.
global_asm!(
    ".text",
    ".globl gt_copy, gt_copy_words, gt_copy_bytes, gt_load64, gt_load64_at, gt_store64, gt_store64_at, gt_fixup",
    "gt_copy:",
    "mov rcx, rdx",
    "shr rcx, 3",
    "gt_copy_words:",
    "rep movsq",
    "mov rcx, rdx",
    "and rcx, 7",
    "gt_copy_bytes:",
    "rep movsb",
    "xor eax, eax",
    "xor edx, edx",
    "ret",
    "gt_load64:",
    "gt_load64_at:",
    "mov rcx, [rdi]",
    "mov [rsi], rcx",
    "xor eax, eax",
    "xor edx, edx",
    "ret",
    "gt_store64:",
    "gt_store64_at:",
    "mov [rdi], rsi",
    "xor eax, eax",
    "xor edx, edx",
    "gt_fixup:",
    "ret",
);

extern "C" {
    fn gt_copy(dst: u64, src: u64, len: u64) -> RawAccess;
    fn gt_load64(src: u64, out: *mut u64) -> RawAccess;
    fn gt_store64(dst: u64, value: u64) -> RawAccess;
    fn gt_copy_words();
    fn gt_copy_bytes();
    fn gt_load64_at();
    fn gt_store64_at();
    fn gt_fixup();
}

fn outcome(raw: RawAccess) -> Result<(), Fault> {
    if raw.status == 0 {
        return Ok(());
    }
    Err(Fault {
        signal: (raw.status >> 32) as i32,
        code: raw.status as u32 as i32,
        addr: raw.addr,
    })
}

/// Copies `len` bytes between any two addresses. Writing over memory that Rust owns is the
/// caller's business; the tests pass tested mappings or buffers they own.
pub fn copy(dst: u64, src: u64, len: u64) -> Result<(), Fault> {
    // SAFETY: gt_copy recovers from faults; what may be overwritten is the documented duty above.
    outcome(unsafe { gt_copy(dst, src, len) })
}

/// One 8-byte load.
pub fn load64(addr: u64) -> Result<u64, Fault> {
    let mut value = 0;
    // SAFETY: gt_load64 recovers from faults on `addr`; `value` is ours.
    outcome(unsafe { gt_load64(addr, &mut value) }).map(|()| value)
}

/// One 8-byte store into a tested mapping.
pub fn store64(addr: u64, value: u64) -> Result<(), Fault> {
    // SAFETY: as for `copy`.
    outcome(unsafe { gt_store64(addr, value) })
}

extern "C" fn on_fault(sig: libc::c_int, info: *mut libc::siginfo_t, ctx: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo and ucontext to an SA_SIGINFO handler; changing
    // saved registers of our own assembly routines is what the handler is for, and for any other
    // address the default action is put back so that the access faults again and ends the process.
    unsafe {
        let regs = &mut (*ctx.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = regs[libc::REG_RIP as usize] as usize;
        let known = [
            gt_copy_words as *const () as usize,
            gt_copy_bytes as *const () as usize,
            gt_load64_at as *const () as usize,
            gt_store64_at as *const () as usize,
        ];
        if known.contains(&rip) {
            regs[libc::REG_RIP as usize] = gt_fixup as *const () as i64;
            regs[libc::REG_RAX as usize] = ((sig as i64) << 32) | (*info).si_code as u32 as i64;
            regs[libc::REG_RDX as usize] = (*info).si_addr() as i64;
        } else {
            libc::signal(sig, libc::SIG_DFL);
        }
    }
}

/// Installs the handler that turns faults of the routines above into values.
pub fn catch_faults() {
    // SAFETY: the handler only touches the interrupted context, see `on_fault`.
    unsafe {
        let mut sa: libc::sigaction = std::mem::zeroed();
        sa.sa_sigaction = on_fault as *const () as usize;
        sa.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGSEGV, &sa, std::ptr::null_mut());
        libc::sigaction(libc::SIGBUS, &sa, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}
