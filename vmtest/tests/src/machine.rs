//! Machine-wide things a test may set up, each undone when its guard is dropped; what a killed test
//! leaves behind, [`clean_leftovers`] finds by name.

use crate::harness::{Res, Stop};
use crate::kernel;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const PREFIX: &str = "guest-tests-";

/// Removes mounts, swap and cgroups whose names say they are ours, and ends DAMON.
pub fn clean_leftovers() {
    Damon::end();
    for line in fs::read_to_string("/proc/mounts")
        .unwrap_or_default()
        .lines()
    {
        if let Some(dir) = line.split(' ').nth(1).filter(|d| d.contains(PREFIX)) {
            unmount(Path::new(dir));
            fs::remove_dir(dir).ok();
        }
    }
    for dev in fs::read_dir("/run").into_iter().flatten().flatten() {
        if let Some(n) = dev
            .file_name()
            .to_str()
            .and_then(|n| n.strip_prefix("guest-tests-zram"))
        {
            if let Ok(n) = n.parse() {
                Zram {
                    n,
                    marker: dev.path(),
                }
                .remove();
            }
        }
    }
    for dir in fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten()
    {
        if dir.file_name().to_string_lossy().starts_with(PREFIX) {
            remove_cgroup(&dir.path());
        }
    }
}

fn unmount(dir: &Path) {
    let Ok(c) = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes()) else {
        return;
    };
    // SAFETY: a NUL-terminated path.
    unsafe { libc::umount2(c.as_ptr(), libc::MNT_DETACH) };
}

/// Runs a command that must succeed; a missing binary is a skip.
pub fn tool(name: &str, args: &[&str]) -> Res {
    let path = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .iter()
        .map(|d| Path::new(d).join(name))
        .find(|p| p.exists());
    let Some(path) = path else {
        crate::skip!("this machine has no {name}")
    };
    let out = Command::new(path).args(args).output()?;
    crate::ensure!(
        out.status.success(),
        "{name} {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(())
}

/// DAMON with one context, until dropped.
pub struct Damon(());

impl Damon {
    const DIR: &'static str = "/sys/kernel/mm/damon/admin/kdamonds";
    /// How many regions a context may be given.
    pub const REGIONS: usize = 200;

    /// Prepares it to watch ranges of a process's addresses ("fvaddr") or of frames ("paddr").
    pub fn new(operations: &str, pid: Option<i32>, ranges: &[std::ops::Range<u64>]) -> Res<Damon> {
        if !Path::new(Damon::DIR).exists() {
            crate::skip!("this kernel has no {}", Damon::DIR);
        }
        let d = Damon(());
        d.write("nr_kdamonds", "1")?;
        d.write("0/contexts/nr_contexts", "1")?;
        if let Err(Stop::Fail(why)) = d.write("0/contexts/0/operations", operations) {
            crate::skip!("no DAMON of {operations}: {why}");
        }
        let attributes = "0/contexts/0/monitoring_attrs";
        for (name, value) in [
            ("intervals/sample_us", 5_000),
            ("intervals/aggr_us", 50_000),
            ("intervals/update_us", 1_000_000),
            ("nr_regions/min", 10),
            ("nr_regions/max", 2 * Damon::REGIONS as u64),
        ] {
            d.write(&format!("{attributes}/{name}"), &value.to_string())?;
        }
        d.write("0/contexts/0/targets/nr_targets", "1")?;
        let target = "0/contexts/0/targets/0";
        if let Some(pid) = pid {
            d.write(&format!("{target}/pid_target"), &pid.to_string())?;
        }
        let regions = format!("{target}/regions");
        d.write(&format!("{regions}/nr_regions"), &ranges.len().to_string())?;
        for (i, r) in ranges.iter().enumerate() {
            d.write(&format!("{regions}/{i}/start"), &r.start.to_string())?;
            d.write(&format!("{regions}/{i}/end"), &r.end.to_string())?;
        }
        Ok(d)
    }

    /// Says what to do with regions that were accessed so often.
    pub fn scheme(&self, action: &str, least: u64, most: u64) -> Res {
        self.write("0/contexts/0/schemes/nr_schemes", "1")?;
        let scheme = "0/contexts/0/schemes/0";
        self.write(&format!("{scheme}/action"), action)?;
        let pattern = format!("{scheme}/access_pattern");
        for (name, min, max) in [
            ("sz", 0, u64::MAX),
            ("nr_accesses", least, most),
            ("age", 0, u64::from(u32::MAX)),
        ] {
            self.write(&format!("{pattern}/{name}/min"), &min.to_string())?;
            self.write(&format!("{pattern}/{name}/max"), &max.to_string())?;
        }
        Ok(())
    }

    /// Starts it.
    pub fn on(&self) -> Res {
        self.write("0/state", "on")
    }

    /// Bytes that the scheme was applied to so far.
    pub fn applied(&self) -> Res<u64> {
        self.statistic("sz_applied")
    }

    /// Bytes that the scheme was tried on so far.
    pub fn tried(&self) -> Res<u64> {
        self.statistic("sz_tried")
    }

    fn statistic(&self, name: &str) -> Res<u64> {
        self.write("0/state", "update_schemes_stats")?;
        let path = format!("{}/0/contexts/0/schemes/0/stats/{name}", Damon::DIR);
        let text = fs::read_to_string(&path)?;
        text.trim()
            .parse()
            .map_err(|_| Stop::Fail(format!("{path}: {text:?}")))
    }

    fn write(&self, file: &str, text: &str) -> Res {
        let path = format!("{}/{file}", Damon::DIR);
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match fs::write(&path, text) {
                // DAMON's own thread is at its files just then.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                r => {
                    return r.map_err(|e| Stop::Fail(format!("writing {text:?} to {path}: {e}")));
                }
            }
        }
    }

    fn end() {
        fs::write(format!("{}/0/state", Damon::DIR), "off").ok();
        fs::write(format!("{}/nr_kdamonds", Damon::DIR), "0").ok();
    }
}

impl Drop for Damon {
    fn drop(&mut self) {
        Damon::end();
    }
}

/// Sets `vm.ptshare` until dropped.
pub struct Mode(u32);

impl Mode {
    /// Sets it.
    pub fn set(v: u32) -> Res<Mode> {
        let Some(old) = kernel::mode() else {
            return Err(Stop::Fail("no /proc/sys/vm/ptshare".into()));
        };
        kernel::set_mode(v)?;
        Ok(Mode(old))
    }
}

impl Drop for Mode {
    fn drop(&mut self) {
        kernel::set_mode(self.0).ok();
    }
}

/// Writes a file of /proc/sys or /sys and puts the old content back when dropped.
pub struct Setting {
    path: String,
    old: String,
}

impl Setting {
    /// Writes it; a missing file is a skip. For `a [b] c` files the bracketed word is put back.
    pub fn set(path: &str, value: &str) -> Res<Setting> {
        let Ok(text) = fs::read_to_string(path) else {
            crate::skip!("this kernel has no {path}")
        };
        let old = match text.split_once('[').and_then(|(_, r)| r.split_once(']')) {
            Some((word, _)) => word.to_string(),
            None => text.trim().to_string(),
        };
        fs::write(path, value).map_err(|e| Stop::Skip(format!("{path} refuses {value:?}: {e}")))?;
        Ok(Setting {
            path: path.to_string(),
            old,
        })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        fs::write(&self.path, &self.old).ok();
    }
}

/// A zram device of our own.
pub struct Zram {
    n: u32,
    marker: PathBuf,
}

impl Zram {
    /// Adds a device of `megabytes`.
    pub fn new(megabytes: u32) -> Res<Zram> {
        let control = "/sys/class/zram-control/hot_add";
        let Ok(n) = fs::read_to_string(control) else {
            crate::skip!("this kernel has no {control}")
        };
        let n: u32 = n
            .trim()
            .parse()
            .map_err(|_| Stop::Fail(format!("{control}: {n:?}")))?;
        fs::create_dir_all("/run").ok();
        let marker = PathBuf::from(format!("/run/{PREFIX}zram{n}"));
        fs::write(&marker, "").ok();
        let z = Zram { n, marker };
        fs::write(
            format!("/sys/block/zram{n}/disksize"),
            format!("{megabytes}M"),
        )?;
        device_node(&format!("zram{n}"))?;
        Ok(z)
    }

    /// The device's path.
    pub fn path(&self) -> String {
        format!("/dev/zram{}", self.n)
    }

    fn remove(&self) {
        let path = std::ffi::CString::new(self.path()).unwrap_or_default();
        // SAFETY: a NUL-terminated path; fails harmlessly when it is not in use as swap.
        unsafe { libc::swapoff(path.as_ptr()) };
        for _ in 0..100 {
            fs::write(format!("/sys/block/zram{}/reset", self.n), "1").ok();
            if fs::write("/sys/class/zram-control/hot_remove", self.n.to_string()).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        fs::remove_file(&self.marker).ok();
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Makes the node of a block device, unless it is there, and returns its path.
fn device_node(name: &str) -> Res<String> {
    let node = format!("/dev/{name}");
    if Path::new(&node).exists() {
        return Ok(node);
    }
    let dev = fs::read_to_string(format!("/sys/block/{name}/dev"))?;
    let (major, minor) = dev.trim().split_once(':').unwrap_or(("0", "0"));
    let dev = libc::makedev(major.parse().unwrap_or(0), minor.parse().unwrap_or(0));
    let path = std::ffi::CString::new(node.as_str()).unwrap_or_default();
    // SAFETY: a NUL-terminated path.
    let r = unsafe { libc::mknod(path.as_ptr(), libc::S_IFBLK | 0o600, dev) };
    crate::ensure!(r == 0, "mknod {node}: {}", crate::sys::Errno::last());
    Ok(node)
}

/// Swap on zram until dropped.
pub struct Swap {
    zram: Zram,
}

impl Swap {
    /// Turns on `megabytes` of swap.
    pub fn on(megabytes: u32) -> Res<Swap> {
        let zram = Zram::new(megabytes)?;
        tool("mkswap", &[&zram.path()])?;
        let path = std::ffi::CString::new(zram.path()).unwrap_or_default();
        // SAFETY: a NUL-terminated path.
        let r = unsafe { libc::swapon(path.as_ptr(), 0) };
        crate::ensure!(
            r == 0,
            "swapon {}: {}",
            zram.path(),
            crate::sys::Errno::last()
        );
        Ok(Swap { zram })
    }

    /// Turns the swap off, bringing every page back, which must succeed.
    pub fn off(self) -> Res {
        let path = std::ffi::CString::new(self.zram.path()).unwrap_or_default();
        // SAFETY: a NUL-terminated path.
        let r = unsafe { libc::swapoff(path.as_ptr()) };
        crate::ensure!(r == 0, "swapoff: {}", crate::sys::Errno::last());
        Ok(())
    }

    /// Pages swapped out now.
    pub fn used_pages(&self) -> u64 {
        let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
        let line = text.lines().find(|l| l.starts_with(&self.zram.path()));
        let kb: u64 = line
            .and_then(|l| l.split_whitespace().nth(3))
            .and_then(|k| k.parse().ok())
            .unwrap_or(0);
        kb / 4
    }
}

/// A fresh ext4 filesystem, mounted until dropped.
pub struct Ext4 {
    /// Where it is mounted.
    pub dir: PathBuf,
    _zram: Option<Zram>,
}

impl Ext4 {
    /// Makes and mounts one of `megabytes`.
    pub fn mount(megabytes: u32) -> Res<Ext4> {
        let zram = Zram::new(megabytes)?;
        let device = zram.path();
        Ext4::on(&device, "", Some(zram))
    }

    /// Makes and mounts one whose files have no page cache (DAX), on what memory the VM has set aside for it.
    pub fn dax() -> Res<Ext4> {
        if !Path::new("/sys/block/pmem0").exists() {
            crate::skip!("no persistent memory here");
        }
        Ext4::on(&device_node("pmem0")?, "dax=always", None)
    }

    fn on(device: &str, options: &str, zram: Option<Zram>) -> Res<Ext4> {
        tool("mke2fs", &["-q", "-F", "-b", "4096", "-t", "ext4", device])?;
        let dir = PathBuf::from(format!("/tmp/{PREFIX}ext4-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let from = std::ffi::CString::new(device).unwrap_or_default();
        let data = std::ffi::CString::new(options).unwrap_or_default();
        let to = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes()).unwrap_or_default();
        // SAFETY: NUL-terminated strings.
        let r = unsafe {
            libc::mount(
                from.as_ptr(),
                to.as_ptr(),
                c"ext4".as_ptr(),
                0,
                data.as_ptr().cast(),
            )
        };
        if r != 0 {
            let e = crate::sys::Errno::last();
            fs::remove_dir(&dir).ok();
            if e.0 == libc::ENODEV {
                crate::skip!("this kernel has no ext4");
            }
            crate::fail!("mount {device}: {e}");
        }
        Ok(Ext4 { dir, _zram: zram })
    }

    /// A new empty file on it, open for reading and writing.
    pub fn file(&self, name: &str) -> Res<fs::File> {
        Ok(fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.dir.join(name))?)
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        unmount(&self.dir);
        fs::remove_dir(&self.dir).ok();
    }
}

/// A memory cgroup (v2) that this process is in until it is dropped.
pub struct Cgroup {
    dir: PathBuf,
    home: String,
}

impl Cgroup {
    /// Makes one and enters it; children made from now on are in it too.
    pub fn enter() -> Res<Cgroup> {
        let root = Path::new("/sys/fs/cgroup");
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        if !controllers.split_whitespace().any(|c| c == "memory") {
            crate::skip!("no cgroup2 with the memory controller at /sys/fs/cgroup");
        }
        fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        let dir = root.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&dir)?;
        let home = fs::read_to_string("/proc/self/cgroup")?;
        let home = home.trim().strip_prefix("0::/").unwrap_or("").to_string();
        let c = Cgroup { dir, home };
        fs::write(c.dir.join("cgroup.procs"), "0")?;
        Ok(c)
    }

    /// Leaves it to the children that were made in it.
    pub fn leave(&self) -> Res {
        let home = Path::new("/sys/fs/cgroup").join(&self.home);
        Ok(fs::write(home.join("cgroup.procs"), "0")?)
    }

    /// Asks for `bytes` to be reclaimed; as much as can be is.
    pub fn reclaim(&self, bytes: u64) {
        // Fails with EAGAIN when less could be reclaimed; callers measure what happened.
        fs::write(self.dir.join("memory.reclaim"), bytes.to_string()).ok();
    }

    /// The path of a file of the cgroup.
    pub fn path(&self, file: &str) -> String {
        self.dir.join(file).to_string_lossy().into_owned()
    }

    /// Writes a file of the cgroup.
    pub fn write(&self, file: &str, text: &str) -> Res {
        Ok(fs::write(self.dir.join(file), text)?)
    }

    /// Reads a number from a file of the cgroup.
    pub fn number(&self, file: &str) -> Res<u64> {
        let text = fs::read_to_string(self.dir.join(file))?;
        text.trim()
            .parse()
            .map_err(|_| Stop::Fail(format!("{file}: {text:?}")))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.leave().ok();
        remove_cgroup(&self.dir);
    }
}

fn remove_cgroup(dir: &Path) {
    fs::write(dir.join("cgroup.kill"), "1").ok();
    for _ in 0..100 {
        if fs::remove_dir(dir).is_ok() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
