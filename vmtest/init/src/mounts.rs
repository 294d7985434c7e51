//! What is mounted where: the machine's files below an overlay that takes the
//! writes, and the kernel's own filesystems on top.

use anyhow::{Context, Result};
use nix::mount::{mount, MsFlags};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// What the initramfs needs before anything can be reported.
pub fn early() -> Result<()> {
    fs::create_dir_all("/dev")?;
    // The kernel may have mounted it already.
    if !Path::new("/dev/kmsg").exists() {
        plain("devtmpfs", "/dev", "")?;
    }
    plain("proc", "/proc", "")?;
    plain("sysfs", "/sys", "")
}

/// Makes the writable view of the machine's files the root of everything.
///
/// `/tmp` and `/run` are the guest's own. When the run's directory or program
/// lies in the machine's `/tmp`, that stays visible instead, below the overlay.
pub fn root(cwd: &str, program: &str, shares: &[String]) -> Result<()> {
    plain("tmpfs", "/scratch", "mode=755,size=90%")?;
    for dir in ["/scratch/upper", "/scratch/work", "/newroot"] {
        fs::create_dir_all(dir)?;
    }
    nine_p("root", "/lower", MsFlags::MS_RDONLY, ",cache=loose")?;
    plain(
        "overlay",
        "/newroot",
        "lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work",
    )?;
    for dir in ["proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir_all(Path::new("/newroot").join(dir))?;
    }
    for dir in ["proc", "sys", "dev"] {
        let to = format!("/newroot/{dir}");
        move_mount(&format!("/{dir}"), &to)?;
    }
    std::env::set_current_dir("/newroot")?;
    move_mount(".", "/")?;
    nix::unistd::chroot(".").context("chroot")?;
    std::env::set_current_dir("/")?;

    plain("tmpfs", "/run", "mode=755")?;
    fs::create_dir_all("/run/lock")?;
    if !(cwd.starts_with("/tmp") || program.starts_with("/tmp/")) {
        plain("tmpfs", "/tmp", "mode=1777")?;
    }
    devices()?;
    plain("debugfs", "/sys/kernel/debug", "mode=755")?;
    plain("tracefs", "/sys/kernel/tracing", "mode=755")?;
    plain("cgroup2", "/sys/fs/cgroup", "memory_recursiveprot")?;
    // For programs that ask which filesystems there are.
    for tag in shares {
        nine_p(tag, &format!("/run/share/{tag}"), MsFlags::empty(), "")?;
    }
    Ok(())
}

fn devices() -> Result<()> {
    plain("devpts", "/dev/pts", "mode=620,ptmxmode=666")?;
    plain("tmpfs", "/dev/shm", "mode=1777")?;
    plain("mqueue", "/dev/mqueue", "")?;
    plain("hugetlbfs", "/dev/hugepages", "mode=1777")?;
    for (name, to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let link = Path::new("/dev").join(name);
        if !link.exists() {
            symlink(to, link)?;
        }
    }
    Ok(())
}

/// Mounts a filesystem that has no source, making the directory.
fn plain(kind: &str, place: &str, options: &str) -> Result<()> {
    fs::create_dir_all(place).with_context(|| format!("making {place}"))?;
    mount(
        Some(kind),
        place,
        Some(kind),
        MsFlags::empty(),
        Some(options),
    )
    .with_context(|| format!("mounting {kind} at {place}"))
}

fn nine_p(tag: &str, place: &str, flags: MsFlags, more: &str) -> Result<()> {
    fs::create_dir_all(place).with_context(|| format!("making {place}"))?;
    // 512000 is the largest message that one virtio queue can carry.
    let options = format!("trans=virtio,version=9p2000.L,msize=512000{more}");
    mount(Some(tag), place, Some("9p"), flags, Some(options.as_str()))
        .with_context(|| format!("mounting the host's {tag} at {place}"))
}

fn move_mount(from: &str, to: &str) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_MOVE, none)
        .with_context(|| format!("moving {from} to {to}"))
}
