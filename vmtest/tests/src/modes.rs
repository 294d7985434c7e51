//! Contract 1.1 and the prctl of 1.2: who asks for sharing, and how.

use crate::harness::{Ctx, Res};
use crate::kernel;
use crate::machine::Mode;
use crate::oracle::pages;
use crate::peer::{flat, Peer};
use crate::sys::{self, Errno, GRANULE, PAGE, PR_GET_PTSHARE, PR_SET_PTSHARE, RW};
use crate::team::{expect_tables, Team};
use crate::{ensure, ensure_eq, group};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

group!("modes";
    boot_value,
    sysctl_range,
    prctl_set_and_get,
    prctl_invalid_arguments,
    prctl_is_per_process_not_per_thread,
    inherited_over_fork,
    inherited_over_execve,
    inherited_over_vfork_and_execve,
    off_shares_nothing,
    opt_in_shares_only_who_asked,
    opt_in_then_out_again,
    always_shares_without_asking,
    changed_mode_reaches_everybody,
    unsupported_prctl_is_einval,
);

/// What this binary does when a test executes it: `get` prints the prctl setting, `nothing` ends at
/// once, `wait` never does.
pub fn helper(name: &str, _args: &[String]) -> ExitCode {
    match name {
        "get" => match sys::get_ptshare() {
            Ok(v) => {
                println!("{v}");
                ExitCode::SUCCESS
            }
            Err(_) => ExitCode::FAILURE,
        },
        "nothing" => ExitCode::SUCCESS,
        // Until it is killed.
        "wait" => loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        },
        _ => ExitCode::from(2),
    }
}

fn prctl(args: &[u64]) -> Result<u64, Errno> {
    sys::syscall(libc::SYS_prctl, args)
}

fn einval(args: &[u64], what: &str) -> Res {
    ensure_eq!(prctl(args), Err(Errno(libc::EINVAL)), "{what}");
    Ok(())
}

/// 1.1: the boot parameter sets the mode, and without it the mode is 1.
fn boot_value(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    let asked = cmdline
        .split_whitespace()
        .rev()
        .find_map(|w| w.strip_prefix("ptshare="));
    let expected = asked.map_or(Some(1), |v| v.parse().ok());
    ensure_eq!(
        kernel::mode(),
        expected,
        "vm.ptshare with {asked:?} on the command line"
    );
    Ok(())
}

/// 1.1: 0, 1 and 2 are accepted and read back; anything else is EINVAL and changes nothing.
fn sysctl_range(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    for v in [0, 1, 2] {
        let _m = Mode::set(v)?;
        ensure_eq!(kernel::mode(), Some(v), "vm.ptshare after writing {v}");
    }
    let before = kernel::mode();
    for bad in ["3", "-1", "256", "x"] {
        let e = kernel::write_mode(bad).err().and_then(|e| e.raw_os_error());
        ensure_eq!(e, Some(libc::EINVAL), "writing {bad:?} to vm.ptshare");
        ensure_eq!(kernel::mode(), before, "vm.ptshare after a refused write");
    }
    Ok(())
}

/// 1.2: the setting reads 0 first, then what was set.
fn prctl_set_and_get(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    for v in [0, 1, 1, 0, 0, 1] {
        ensure_eq!(prctl(&[PR_SET_PTSHARE, v]), Ok(0), "PR_SET_PTSHARE {v}");
        ensure_eq!(prctl(&[PR_GET_PTSHARE]), Ok(v), "PR_GET_PTSHARE after {v}");
    }
    Ok(())
}

/// 1.2: other values of the arguments are EINVAL and change nothing.
fn prctl_invalid_arguments(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    for state in [0, 1] {
        prctl(&[PR_SET_PTSHARE, state])?;
        for v in [2, 3, u64::MAX, 1 << 32, (1 << 32) | 1] {
            einval(&[PR_SET_PTSHARE, v], &format!("PR_SET_PTSHARE {v:#x}"))?;
        }
        for pos in 2..5 {
            let mut a = [PR_SET_PTSHARE, 1 - state, 0, 0, 0];
            a[pos] = 1;
            einval(&a, &format!("PR_SET_PTSHARE with argument {} set", pos + 1))?;
        }
        for pos in 1..5 {
            let mut a = [PR_GET_PTSHARE, 0, 0, 0, 0];
            a[pos] = 1;
            einval(&a, &format!("PR_GET_PTSHARE with argument {} set", pos + 1))?;
        }
        ensure_eq!(
            prctl(&[PR_GET_PTSHARE]),
            Ok(state),
            "the setting after refused calls"
        );
    }
    Ok(())
}

/// 1.2: "a process asks for itself": one thread's request is all its threads'.
fn prctl_is_per_process_not_per_thread(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    prctl(&[PR_SET_PTSHARE, 0])?;
    let set = std::thread::spawn(|| prctl(&[PR_SET_PTSHARE, 1])).join();
    ensure!(
        matches!(set, Ok(Ok(0))),
        "PR_SET_PTSHARE in a thread: {set:?}"
    );
    ensure_eq!(prctl(&[PR_GET_PTSHARE]), Ok(1), "the main thread's view");
    let seen = std::thread::spawn(|| prctl(&[PR_GET_PTSHARE])).join();
    ensure!(matches!(seen, Ok(Ok(1))), "a later thread's view: {seen:?}");
    Ok(())
}

/// 1.2: a child starts with its parent's setting, and changing it does not reach the parent.
fn inherited_over_fork(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    for state in [1, 0] {
        prctl(&[PR_SET_PTSHARE, state])?;
        let child = Peer::spawn()?;
        let grandchild = child.fork()?;
        for p in [&child, &grandchild] {
            ensure_eq!(
                p.syscall(libc::SYS_prctl, &[PR_GET_PTSHARE])?,
                Ok(state),
                "the setting in a child"
            );
        }
        child.syscall(libc::SYS_prctl, &[PR_SET_PTSHARE, 1 - state])??;
        ensure_eq!(
            prctl(&[PR_GET_PTSHARE]),
            Ok(state),
            "the parent's setting after the child changed its own"
        );
        ensure_eq!(
            grandchild.syscall(libc::SYS_prctl, &[PR_GET_PTSHARE])?,
            Ok(state),
            "the grandchild's"
        );
    }
    Ok(())
}

fn setting_after_exec() -> Res<String> {
    let out = Command::new("/proc/self/exe")
        .args(["helper", "get"])
        .output()?;
    ensure!(
        out.status.success(),
        "the helper: {:?}",
        out.status.signal()
    );
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_string())
}

/// 1.2: the setting survives execve, in both states.
fn inherited_over_execve(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    for state in [1, 0] {
        prctl(&[PR_SET_PTSHARE, state])?;
        ensure_eq!(
            setting_after_exec()?,
            state.to_string(),
            "the setting after fork and execve"
        );
    }
    Ok(())
}

/// 1.2: the same from a child that shares its parent's memory until the execve.
fn inherited_over_vfork_and_execve(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    prctl(&[PR_SET_PTSHARE, 1])?;
    // Without a pre_exec hook the standard library starts programs with CLONE_VFORK.
    ensure_eq!(
        setting_after_exec()?,
        "1",
        "the setting after vfork and execve"
    );
    ensure_eq!(
        prctl(&[PR_GET_PTSHARE]),
        Ok(1),
        "the parent's setting afterwards"
    );
    Ok(())
}

/// 1.1: in mode 0 nobody shares, not even who asked; contents are right all the same.
fn off_shares_nothing(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    ctx.opt_in()?;
    let _m = Mode::set(0)?;
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 2, 2)?;
    t.model.fill(&t.fd, 0..pages(2))?;
    t.touch_all()?;
    t.expect_all(0)?;
    t.coherent()
}

/// 1.1: in mode 1 the processes that asked share, one that did not has private tables.
fn opt_in_shares_only_who_asked(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let _m = Mode::set(1)?;
    sys::set_ptshare(false)?;
    let outsider = Peer::spawn()?;
    let mut t = Team::new(ctx, 2, 2)?;
    let fd = sys::steal_fd(std::process::id() as i32, t.raw())?;
    drop(fd);
    let (there, _) = outsider.call(
        |a, _| {
            (
                flat(
                    sys::steal_fd(a[0] as i32, a[1] as i32)
                        .map(|f| std::os::fd::IntoRawFd::into_raw_fd(f) as u64),
                ),
                vec![],
            )
        },
        &[u64::from(std::process::id()), t.raw() as u64],
        &[],
    )?;
    ensure!(there >= 0, "pidfd_getfd: {there}");
    let addr = outsider.mmap(0, 2 * GRANULE, RW, sys::SHARED, there as i32, 0)??;
    outsider.touch(addr, pages(2))?;
    expect_tables(ctx, &outsider, 0)?;
    t.coherent()?;
    t.model.store(&outsider, addr + 3 * PAGE, 3)?;
    t.verify_all()?;
    t.model.verify_mapped(&outsider, addr, 0..pages(2))
}

/// 1.2: what was mapped while sharing stays right after the process changes its mind, and a mapping
/// made afterwards is not shared.
fn opt_in_then_out_again(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let _m = Mode::set(1)?;
    let mut t = Team::new(ctx, 2, 2)?;
    let p = t.peer(0);
    p.syscall(libc::SYS_prctl, &[PR_SET_PTSHARE, 0])??;
    t.expect(0, 0)?;
    t.expect(1, 2)?;
    p.munmap(t.at(0, 0), 2 * GRANULE)?;
    let addr = p.map(&t.fd, 0, 2 * GRANULE, RW)?;
    p.touch(addr, pages(2))?;
    t.expect(0, 0)?;
    t.expect(1, 2)?;
    t.members[0].addr = addr;
    t.coherent()
}

/// 1.1: in mode 2 nobody has to ask.
fn always_shares_without_asking(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    sys::set_ptshare(false)?;
    let _m = Mode::set(2)?;
    let mut t = Team::untouched(ctx, sys::memfd(0)?, 3, 2)?;
    t.model.fill(&t.fd, 0..pages(2))?;
    t.touch_all()?;
    t.expect_all(2)?;
    t.coherent()
}

/// 1.1: a change of the mode is for the processes that run already: they stop sharing, and begin.
fn changed_mode_reaches_everybody(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    let _m = Mode::set(1)?;
    let mut t = Team::new(ctx, 3, 2)?;
    kernel::set_mode(0)?;
    t.expect_all(0)?;
    t.coherent()?;
    t.expect_all(0)?;
    kernel::set_mode(1)?;
    t.coherent()?;
    t.expect_all(2)
}

/// On a kernel without the feature the prctl numbers are free, which is how programs detect it.
fn unsupported_prctl_is_einval(ctx: &Ctx) -> Res {
    if ctx.sharing || kernel::mode().is_some() {
        crate::skip!("is about kernels without the feature");
    }
    einval(&[PR_SET_PTSHARE, 1], "PR_SET_PTSHARE")?;
    einval(&[PR_GET_PTSHARE], "PR_GET_PTSHARE")
}
