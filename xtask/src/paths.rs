//! Where things are: the checkout, and the cache outside of it.

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, FdFlag, Flock, FlockArg};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The checkout that this program was built from.
pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A path below the checkout.
pub fn in_root(path: &str) -> PathBuf {
    let root = root();
    root.canonicalize()
        .unwrap_or_else(|_| root.to_owned())
        .join(path)
}

/// The cache: `$PTSHARE_CACHE`, or `ptshare` in the user's cache directory.
///
/// It may be deleted at any time; everything in it is made again from the
/// checkout and Debian's packages.
pub fn cache() -> Result<PathBuf> {
    let env = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let dir = env("PTSHARE_CACHE")
        .or_else(|| env("XDG_CACHE_HOME").map(|d| d.join("ptshare")))
        .or_else(|| env("HOME").map(|d| d.join(".cache/ptshare")))
        .context("none of PTSHARE_CACHE, XDG_CACHE_HOME and HOME is set")?;
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    dir.canonicalize()
        .with_context(|| format!("finding {}", dir.display()))
}

/// A directory of the cache, made when it is not there.
pub fn cache_dir(name: &str) -> Result<PathBuf> {
    let dir = cache()?.join(name);
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    Ok(dir)
}

/// Takes the lock file `path` for as long as the returned guard lives, and
/// says what it waits for when another run holds it.
///
/// Programs started meanwhile hold the lock too, until the last of them ends:
/// when this one is killed, a make that it leaves behind must not meet another.
pub fn lock(path: &Path, what: &str) -> Result<Flock<File>> {
    let open = || -> Result<File> {
        let file = File::create(path).with_context(|| format!("opening {}", path.display()))?;
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty()))?;
        Ok(file)
    };
    match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
        Ok(held) => return Ok(held),
        Err((_, Errno::EWOULDBLOCK)) => {
            eprintln!("x: waiting for another run that holds {what}");
        }
        Err((_, e)) => return Err(e).with_context(|| format!("locking {}", path.display())),
    }
    Flock::lock(open()?, FlockArg::LockExclusive)
        .map_err(|(_, e)| e)
        .with_context(|| format!("locking {}", path.display()))
}

/// Has the command killed by `signal` when the thread that starts it ends, so
/// that nothing is left behind when this program is killed.
pub fn die_with_parent(command: &mut Command, signal: Signal) {
    // SAFETY: the closure runs between fork and exec and makes one system
    // call; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || Ok(nix::sys::prctl::set_pdeathsig(signal)?));
    }
}
