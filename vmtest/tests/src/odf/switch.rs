//! Contract 3: who has forks share, and for how long.

use super::{need_switch, Events, Kin, SWITCH};
use crate::harness::{Ctx, Res};
use crate::machine::Setting;
use crate::oracle::pages;
use crate::peer::{flat, Peer, Remote};
use crate::sys::{self, Errno, GRANULE, PAGE};
use crate::{ensure, ensure_eq, fail, group};
use std::fs;

group!("odf";
    switch_is_read_and_written,
    switch_of_others,
    switch_asks_who_opened_it,
    switch_is_inherited,
    switch_default,
    switch_off_shares_nothing,
    boot_parameter,
    clone3_flags_exclude_each_other,
    clone3_shares_once,
    clone3_refuses_once,
    clone3_with_the_same_memory,
    threads_share_everything_anyway,
    vfork_shares_everything_anyway,
);

const CLONE_ODF: u64 = 0x4_0000_0000;
const CLONE_NO_ODF: u64 = 0x8_0000_0000;
const DEFAULT: &str = "/proc/sys/vm/odf_default";

fn read_of(pid: i32) -> Res<String> {
    Ok(fs::read_to_string(format!("/proc/{pid}/use_odf"))?)
}

/// "0\n" or "1\n"; anything else written is EINVAL and changes nothing.
fn switch_is_read_and_written(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let default = fs::read_to_string(DEFAULT)?;
    ensure_eq!(
        fs::read_to_string(SWITCH)?.trim().to_owned(),
        default.trim(),
        "use_odf of a process that has not said"
    );
    for value in ["1", "0", "1\n", "0\n", "1", "1"] {
        fs::write(SWITCH, value)?;
        let want = format!("{}\n", value.trim());
        ensure_eq!(fs::read_to_string(SWITCH)?, want, "after writing {value:?}");
        for bad in ["2", "-1", "x", "01x", "1 1", "99999999999999999999", "\n"] {
            let got = fs::write(SWITCH, bad).map_err(|e| e.raw_os_error());
            let kind = match bad.len() {
                20 => libc::ERANGE,
                _ => libc::EINVAL,
            };
            ensure_eq!(got, Err(Some(kind)), "writing {bad:?}");
            ensure_eq!(fs::read_to_string(SWITCH)?, want, "after writing {bad:?}");
        }
    }
    Ok(())
}

/// In a peer: becomes an ordinary user. Argument: user id.
const BECOME: Remote = |a, _| (flat(sys::syscall(libc::SYS_setresuid, &[a[0]; 3])), vec![]);

/// In a peer: writes a file. Bytes: its path, a space, and the text.
const WRITE: Remote = |_, text| {
    let text = String::from_utf8_lossy(text);
    let (path, text) = text.split_once(' ').unwrap_or(("", ""));
    let r = fs::write(path, text).map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::EIO)));
    (flat(r.map(|()| 0)), vec![])
};

/// The owner may, and whoever has CAP_SYS_RESOURCE; others get EACCES.
fn switch_of_others(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let [user, same, other] = [Peer::spawn()?, Peer::spawn()?, Peer::spawn()?];
    for (p, id) in [(&user, 1000), (&same, 1000), (&other, 1001)] {
        ensure_eq!(p.call(BECOME, &[id], &[])?.0, 0, "setresuid");
    }
    let write = |p: &Peer, whose: i32, value: u32| -> Res<i64> {
        let text = format!("/proc/{whose}/use_odf {value}");
        Ok(p.call(WRITE, &[], text.as_bytes())?.0)
    };
    fs::write(format!("/proc/{}/use_odf", user.pid), "1")?;
    ensure_eq!(read_of(user.pid)?, "1\n", "after root wrote");
    ensure_eq!(write(&user, user.pid, 0)?, 0, "writing one's own");
    ensure_eq!(read_of(user.pid)?, "0\n", "after its owner wrote");
    ensure_eq!(write(&same, user.pid, 1)?, 0, "writing that of one's user");
    ensure_eq!(read_of(user.pid)?, "1\n", "after its user wrote");
    let refused = -i64::from(libc::EACCES);
    ensure_eq!(write(&other, user.pid, 0)?, refused, "writing another's");
    let root = std::process::id() as i32;
    let before = read_of(root)?;
    ensure_eq!(write(&other, root, 1)?, refused, "writing root's");
    ensure_eq!(read_of(user.pid)?, "1\n", "after another was refused");
    ensure_eq!(read_of(root)?, before, "after a user was refused");
    Ok(())
}

/// A descriptor that an ordinary user has opened writes as that user does, whoever has it by then; and one that
/// root has opened writes as root does.
fn switch_asks_who_opened_it(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let _default = Setting::set(DEFAULT, "0")?;
    let [target, stranger] = [Peer::spawn()?, Peer::spawn()?];
    for (p, id) in [(&target, 1000), (&stranger, 1001)] {
        ensure_eq!(p.call(BECOME, &[id], &[])?.0, 0, "setresuid");
    }
    let open: Remote = |_, path| {
        let a = [
            libc::AT_FDCWD as u64,
            path.as_ptr() as u64,
            libc::O_WRONLY as u64,
        ];
        (flat(sys::syscall(libc::SYS_openat, &a)), vec![])
    };
    let write: Remote = |a, _| {
        let text = b"1";
        let r = sys::syscall(libc::SYS_write, &[a[0], text.as_ptr() as u64, 1]);
        (flat(r), vec![])
    };
    let path = format!("/proc/{}/use_odf", target.pid);
    let (fd, _) = stranger.call(open, &[], format!("{path}\0").as_bytes())?;
    ensure!(fd >= 0, "opening it: {fd}");
    // Root, with a stranger's descriptor.
    let taken = sys::steal_fd(stranger.pid, fd as i32)?;
    let got = write(&[std::os::fd::AsRawFd::as_raw_fd(&taken) as u64], &[]).0;
    ensure_eq!(got, -i64::from(libc::EACCES), "root, as a stranger");
    ensure_eq!(read_of(target.pid)?, "0\n", "after that");
    // A stranger, with root's descriptor.
    let ours = fs::OpenOptions::new().write(true).open(&path)?;
    let heir = Peer::spawn()?;
    ensure_eq!(heir.call(BECOME, &[1001], &[])?.0, 0, "setresuid");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&ours) as u64;
    ensure_eq!(heir.call(write, &[fd], &[])?.0, 1, "a stranger, as root");
    ensure_eq!(read_of(target.pid)?, "1\n", "after that");
    Ok(())
}

/// Over fork and execve, on or off; a later change is one's own.
fn switch_is_inherited(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let cat: Remote = |_, _| {
        let out = std::process::Command::new("/bin/cat").arg(SWITCH).output();
        match out {
            Ok(out) => (0, out.stdout),
            Err(e) => (-1, e.to_string().into_bytes()),
        }
    };
    let _default = Setting::set(DEFAULT, "0")?;
    for value in ["1\n", "0\n", "1\n"] {
        let parent = Peer::spawn()?;
        fs::write(format!("/proc/{}/use_odf", parent.pid), value)?;
        // A changed default is for those that have not said.
        fs::write(DEFAULT, if value == "1\n" { "0" } else { "1" })?;
        let child = parent.fork()?;
        let grandchild = child.fork()?;
        for p in [&parent, &child, &grandchild] {
            ensure_eq!(read_of(p.pid)?, value, "in the line of the one who said so");
            let (r, out) = p.call(cat, &[], &[])?;
            ensure_eq!(r, 0, "cat: {}", String::from_utf8_lossy(&out));
            let out = String::from_utf8_lossy(&out).into_owned();
            ensure_eq!(out, value, "in a program that it started");
        }
        fs::write(format!("/proc/{}/use_odf", child.pid), "0")?;
        ensure_eq!(
            read_of(parent.pid)?,
            value,
            "the child's change in its parent"
        );
        ensure_eq!(
            read_of(grandchild.pid)?,
            value,
            "the child's change in its child"
        );
    }
    Ok(())
}

/// `vm.odf_default` is for all who have not said, whenever they were made.
fn switch_default(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let set = Setting::set(DEFAULT, "0")?;
    let mut k = Kin::new(ctx, 2)?;
    let silent = Peer::spawn()?;
    ensure_eq!(read_of(silent.pid)?, "0\n", "by default");
    fs::write(DEFAULT, "1")?;
    ensure_eq!(read_of(silent.pid)?, "1\n", "with the default changed");
    fs::write(format!("/proc/{}/use_odf", k.peer.pid), "0")?;
    ensure_eq!(read_of(k.peer.pid)?, "0\n", "in one that has said");
    k.child(ctx, 0)?.verify()?;
    for bad in ["2", "-1", "x"] {
        ensure!(fs::write(DEFAULT, bad).is_err(), "{bad:?} was accepted");
        ensure_eq!(fs::read_to_string(DEFAULT)?, "1\n", "after {bad:?}");
    }
    // One that has not said, and shares by default.
    k.peer = Peer::spawn()?;
    k.base = k.peer.place(0, 2 * GRANULE)?;
    k.map(k.base, 2 * GRANULE)?;
    k.advise(0..pages(2), libc::MADV_NOHUGEPAGE)?;
    k.fill(0..pages(2))?;
    let mut child = k.child(ctx, 2)?;
    super::diverge(&mut [&mut k, &mut child])?;
    drop(set);
    Ok(())
}

/// Without the switch a fork is an ordinary one.
fn switch_off_shares_nothing(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let mut k = Kin::new(ctx, 2)?;
    fs::write(format!("/proc/{}/use_odf", k.peer.pid), "0")?;
    let before = Events::now();
    let mut child = k.child(ctx, 0)?;
    super::diverge(&mut [&mut k, &mut child])?;
    before.expect(ctx, 0, 0)
}

/// `odf=1` on the kernel's command line is `vm.odf_default`.
fn boot_parameter(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let said = cmdline
        .split_whitespace()
        .filter_map(|w| w.strip_prefix("odf="))
        .next_back()
        .unwrap_or("0");
    ensure_eq!(
        fs::read_to_string(DEFAULT)?.trim().to_owned(),
        said,
        "vm.odf_default after {cmdline:?}"
    );
    Ok(())
}

/// struct clone_args, up to what is used here: flags, pidfd, child_tid, parent_tid, exit_signal,
/// stack, stack_size, tls.
fn clone_args(flags: u64) -> [u64; 8] {
    [flags, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0]
}

fn clone3(args: &[u64; 8]) -> sys::Sys<u64> {
    sys::syscall(libc::SYS_clone3, &[args.as_ptr() as u64, 64])
}

fn clone3_flags_exclude_each_other(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    for more in [0, libc::CLONE_VM as u64 | libc::CLONE_VFORK as u64] {
        match clone3(&clone_args(CLONE_ODF | CLONE_NO_ODF | more)) {
            Ok(0) => sys::exit_now(0),
            got => ensure_eq!(got, Err(Errno(libc::EINVAL)), "clone3 with both flags"),
        }
    }
    // The bits beyond are nobody's.
    match clone3(&clone_args(CLONE_NO_ODF << 1)) {
        Ok(0) => sys::exit_now(0),
        got => ensure_eq!(got, Err(Errno(libc::EINVAL)), "clone3 with the next bit"),
    }
    Ok(())
}

/// In a peer: a child by clone3 with these flags that only waits for its end. Answers its pid.
const CLONE: Remote = |a, _| match clone3(&clone_args(a[0])) {
    Ok(0) => loop {
        sys::syscall(libc::SYS_pause, &[]).ok();
    },
    r => (flat(r), vec![]),
};

/// A child that does nothing, seen from outside.
struct Idle {
    pid: i32,
    mem: fs::File,
}

impl Drop for Idle {
    fn drop(&mut self) {
        sys::kill(self.pid, libc::SIGKILL).ok();
    }
}

impl Idle {
    fn of(k: &Kin, flags: u64) -> Res<Idle> {
        let (pid, _) = k.peer.call(CLONE, &[flags], &[])?;
        ensure!(pid > 0, "clone3({flags:#x}): {}", Errno(-pid as i32));
        let pid = pid as i32;
        Ok(Idle {
            pid,
            mem: fs::File::open(format!("/proc/{pid}/mem"))?,
        })
    }

    /// It has what the model says.
    fn has(&self, k: &Kin) -> Res {
        let mut buf = vec![0; PAGE as usize];
        for (page, g) in k.model.pages.iter().enumerate() {
            sys::pread(&self.mem, &mut buf, k.at(page as u64))?;
            if let Some(why) = crate::oracle::diagnose(k.model.seed, page as u64, *g, &buf) {
                fail!("in a child by clone3: {why}");
            }
        }
        Ok(())
    }

    fn borrows(&self, tables: u64) -> Res {
        let got = crate::kernel::tables_of(self.pid)?;
        ensure_eq!(got, tables, "tables that a child by clone3 borrows");
        Ok(())
    }
}

/// CLONE_ODF is for that one call.
fn clone3_shares_once(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let mut k = Kin::new(ctx, 2)?;
    fs::write(format!("/proc/{}/use_odf", k.peer.pid), "0")?;
    let with = Idle::of(&k, CLONE_ODF)?;
    with.borrows(2)?;
    ensure_eq!(read_of(k.peer.pid)?, "0\n", "use_odf after CLONE_ODF");
    ensure_eq!(read_of(with.pid)?, "0\n", "use_odf of the child");
    // What the parent shares already it may share no more, so that nothing new is shared here.
    k.store(0)?;
    k.store(pages(1))?;
    let without = Idle::of(&k, 0)?;
    without.borrows(0)?;
    without.has(&k)?;
    let old = k.model.clone();
    k.store(7)?;
    k.verify()?;
    let new = std::mem::replace(&mut k.model, old);
    without.has(&k)?;
    k.model = new;
    Ok(())
}

/// CLONE_NO_ODF is for that one call.
fn clone3_refuses_once(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let mut k = Kin::new(ctx, 2)?;
    let without = Idle::of(&k, CLONE_NO_ODF)?;
    without.borrows(0)?;
    without.has(&k)?;
    ensure_eq!(read_of(k.peer.pid)?, "1\n", "use_odf after CLONE_NO_ODF");
    ensure_eq!(read_of(without.pid)?, "1\n", "use_odf of the child");
    let with = Idle::of(&k, 0)?;
    with.borrows(2)?;
    with.has(&k)?;
    let both = Idle::of(&k, CLONE_ODF)?;
    both.borrows(2)?;
    both.has(&k)?;
    k.store(5)?;
    k.verify()
}

/// In a peer: a child by clone3 in the same memory with a stack of its own, which stores a word and
/// exits. Arguments: flags, where to, what, the stack's end.
const CLONE_VM_AND_STORE: Remote = |a, _| {
    let mut args = clone_args(a[0]);
    args[5] = a[3] - PAGE;
    args[6] = PAGE;
    let mut r: i64 = libc::SYS_clone3;
    // SAFETY: the child has a stack of its own, which it does not even use: it stores to tested memory
    // and exits. The parent goes on as after any system call.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov [r8], r9",
            "mov edi, 0",
            "mov eax, 60",
            "syscall",
            "2:",
            inout("rax") r,
            in("rdi") args.as_ptr(),
            in("rsi") 64u64,
            in("r8") a[1],
            in("r9") a[2],
            out("rcx") _,
            out("r11") _,
        );
    }
    if r > 0 {
        // It may be a thread, whose end nobody waits for; what it stored says that it ran.
        sys::wait(r as i32).ok();
    }
    (r, vec![])
};

/// With CLONE_VM there is nothing to share: the flags are allowed and do nothing.
fn clone3_with_the_same_memory(ctx: &Ctx) -> Res {
    need_switch(ctx)?;
    let k = Kin::new(ctx, 2)?;
    let before = Events::now();
    let vm = libc::CLONE_VM as u64;
    let all = [
        (vm | libc::CLONE_VFORK as u64, "vfork"),
        (vm, "a process in the same memory"),
    ];
    let mut value = 1;
    for (flags, what) in all {
        for odf in [0, CLONE_ODF, CLONE_NO_ODF] {
            value += 1;
            let a = [flags | odf, k.at(9), value, k.at(pages(2))];
            let (r, _) = k.peer.call(CLONE_VM_AND_STORE, &a, &[])?;
            ensure!(r > 0, "{what} with {odf:#x}: {}", Errno(-r as i32));
            ensure_eq!(k.peer.load(k.at(9))?, Ok(value), "stored by {what}");
        }
    }
    let since = Events::now().since(&before);
    ensure_eq!(
        (since.shared, since.copied, since.reused),
        (0, 0, 0),
        "tables shared with oneself"
    );
    k.borrows(ctx, 0)?;
    k.sees(10..pages(2) - 1)
}

/// Threads of a process whose forks share.
fn threads_share_everything_anyway(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 2)?;
    let before = Events::now();
    let threads: Remote = |a, _| {
        let all: Vec<_> = (0..4u64)
            .map(|n| {
                let addr = a[0] + n * PAGE;
                std::thread::spawn(move || sys::store64(addr, 100 + n).is_ok())
            })
            .collect();
        (
            all.into_iter()
                .map(|t| i64::from(!matches!(t.join(), Ok(true))))
                .sum(),
            vec![],
        )
    };
    ensure_eq!(
        k.peer.call(threads, &[k.at(0)], &[])?.0,
        0,
        "threads that failed"
    );
    for n in 0..4 {
        ensure_eq!(k.peer.load(k.at(n))?, Ok(100 + n), "stored by thread {n}");
    }
    let since = Events::now().since(&before);
    ensure_eq!(since.shared, 0, "tables shared with threads");
    k.sees(4..pages(2))
}

/// Programs started by vfork or posix_spawn.
fn vfork_shares_everything_anyway(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let before = Events::now();
    let run: Remote = |_, _| {
        let run = std::process::Command::new("/proc/self/exe")
            .args(["helper", "nothing"])
            .status();
        (
            run.map_or(-1, |s| i64::from(s.code().unwrap_or(-2))),
            vec![],
        )
    };
    for _ in 0..3 {
        ensure_eq!(
            k.peer.call(run, &[], &[])?.0,
            0,
            "a program that it started"
        );
        k.store(3)?;
    }
    let since = Events::now().since(&before);
    ensure_eq!(
        (since.shared, since.copied),
        (0, 0),
        "tables shared by vfork"
    );
    k.verify()
}
