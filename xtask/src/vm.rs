//! The VM: QEMU around one of the kernels, this machine's files as its root,
//! one command in it, and a verdict that fails closed.
//!
//! ```no_run
//! let outcome = Vm::new(Flavor::Release)
//!     .mem("4G").smp(2).append("ptshare=2")
//!     .timeout(Duration::from_secs(60))
//!     .run(&["cat", "/proc/vmstat"])?
//!     .expect_success()?;
//! ```
//!
//! A run is good only when a result record came, the console log holds PID 1's
//! marks of begin and end, and no line of it is a complaint of the kernel.
//! Anything else, silence included, is a failure.
//!
//! QEMU dies with the thread that called [`Vm::run`].

mod outcome;

pub use outcome::{Outcome, Verdict, EXIT_LAB};

use crate::kernel::{self, Flavor};
use crate::splat::Matcher;
use crate::{guest, paths};
use anyhow::{bail, ensure, Context, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How many runs' logs the cache keeps.
const KEEP_RUNS: usize = 40;

/// A VM to be.
pub struct Vm {
    flavor: Flavor,
    mem: String,
    smp: u32,
    icount: bool,
    accel: String,
    append: Vec<String>,
    drives: Vec<PathBuf>,
    shares: Vec<(PathBuf, String)>,
    cwd: Option<PathBuf>,
    timeout: Duration,
    tee_stdout: Option<Tee>,
    tee_stderr: Option<Tee>,
}

/// Makes the place to which the output of a VM with this kernel is copied as it comes.
type Tee = fn(Flavor) -> Box<dyn Write + Send>;

impl Vm {
    /// A VM of 4 GB and two CPUs with the kernel of `flavor`.
    pub fn new(flavor: Flavor) -> Self {
        Self {
            flavor,
            mem: "4G".into(),
            smp: 2,
            icount: false,
            accel: "tcg".into(),
            append: Vec::new(),
            drives: Vec::new(),
            shares: Vec::new(),
            cwd: None,
            timeout: Duration::from_secs(900),
            tee_stdout: None,
            tee_stderr: None,
        }
    }

    /// Memory, as QEMU's `-m` takes it.
    pub fn mem(mut self, mem: &str) -> Self {
        self.mem = mem.into();
        self
    }

    /// Number of CPUs.
    pub fn smp(mut self, smp: u32) -> Self {
        self.smp = smp;
        self
    }

    /// One CPU whose clock is the number of instructions executed, one to the
    /// nanosecond.
    pub fn icount(mut self, icount: bool) -> Self {
        self.icount = icount;
        self
    }

    /// QEMU's accelerator.
    pub fn accel(mut self, accel: &str) -> Self {
        self.accel = accel.into();
        self
    }

    /// Adds to the kernel's command line.
    pub fn append(mut self, words: &str) -> Self {
        self.append
            .extend(words.split_whitespace().map(str::to_owned));
        self
    }

    /// Adds a disk, /dev/vda first. The image is written to.
    pub fn drive(mut self, image: impl AsRef<Path>) -> Self {
        self.drives.push(image.as_ref().to_owned());
        self
    }

    /// Lets the guest write into a directory: `/run/share/TAG` there.
    pub fn share(mut self, dir: impl AsRef<Path>, tag: &str) -> Self {
        self.shares.push((dir.as_ref().to_owned(), tag.to_owned()));
        self
    }

    /// Runs the command there instead of in the current directory.
    pub fn cwd(mut self, dir: impl AsRef<Path>) -> Self {
        self.cwd = Some(dir.as_ref().to_owned());
        self
    }

    /// Kills the VM after so long.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Copies the command's output to this program's as it comes.
    pub fn forward(mut self, forward: bool) -> Self {
        self.tee_stdout = forward.then_some(|_| Box::new(io::stdout()));
        self.tee_stderr = forward.then_some(|_| Box::new(io::stderr()));
        self
    }

    /// Copies the command's stdout to what `tee` makes as it comes.
    pub fn tee(mut self, tee: Tee) -> Self {
        self.tee_stdout = Some(tee);
        self
    }

    /// Runs the command to its end, building the kernel first when there is
    /// none. An error means that there was no run; a run that failed is an
    /// [`Outcome`].
    pub fn run<S: AsRef<str>>(&self, command: &[S]) -> Result<Outcome> {
        let matcher = Matcher::new()?;
        let kernel = kernel::ensure(self.flavor)?;
        let init = guest::binary("guest-init")?;
        let run = RunDir::new()?;
        let nonce = run
            .dir
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let spec = self.spec(command, &nonce)?;
        fs::write(run.file("initramfs"), initramfs(&init, &spec)?)?;

        let start = Instant::now();
        let stdout = Capture::start(
            run.file("stdout"),
            self.tee_stdout.map(|tee| tee(self.flavor)),
        )?;
        let stderr = Capture::start(
            run.file("stderr"),
            self.tee_stderr.map(|tee| tee(self.flavor)),
        )?;
        let result = Capture::start(run.file("result"), None)?;
        let mut qemu = self.qemu(&run, &kernel.bz_image())?;
        let mut child = Guard(
            qemu.spawn()
                .context("running qemu-system-x86_64 (package qemu-system-x86)")?,
        );
        let ended = child.wait_until(start + self.timeout)?;
        // QEMU is gone, so every writer of the fifos is.
        let (stdout, stderr, result) = (stdout.finish()?, stderr.finish()?, result.finish()?);
        for (name, content) in [
            ("stdout", &stdout),
            ("stderr", &stderr),
            ("result", &result),
        ] {
            fs::remove_file(run.file(name))?;
            fs::write(run.file(name), content)?;
        }
        let elapsed = start.elapsed();
        let _ = fs::remove_file(run.file("initramfs"));

        let qemu_log = fs::read_to_string(run.file("qemu.log")).unwrap_or_default();
        let console = fs::read(run.file("console.log")).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        if ended.is_some_and(|s| !s.success()) && console.is_empty() {
            bail!("QEMU did not start:\n{}", qemu_log.trim());
        }
        let mark = |what: &str| console.contains(&format!("ptshare-lab: {what} {nonce}"));
        Ok(Outcome {
            flavor: self.flavor,
            timed_out: ended.is_none(),
            record: serde_json::from_slice(&result).ok(),
            console_captured: mark("begin") && mark("end"),
            splats: matcher.find(&console),
            stdout,
            stderr,
            console_log: run.file("console.log"),
            elapsed,
        })
    }

    fn spec<S: AsRef<str>>(&self, command: &[S], nonce: &str) -> Result<Spec> {
        let cwd = match &self.cwd {
            Some(dir) => dir.clone(),
            None => std::env::current_dir()?,
        };
        let env = [
            (
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            ),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("TERM", "dumb"),
            ("USER", "root"),
        ];
        Ok(Spec {
            command: command.iter().map(|w| w.as_ref().to_owned()).collect(),
            cwd: cwd
                .into_os_string()
                .into_string()
                .ok()
                .context("the current directory's name is not UTF-8")?,
            env: env.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
            shares: self.shares.iter().map(|(_, tag)| tag.clone()).collect(),
            nonce: nonce.to_owned(),
        })
    }

    fn command_line(&self) -> String {
        // Where the emulator stands still at times, the kernel's look at whether the timer ticks is no use.
        let mut line = String::from(
            "console=ttyS0 ignore_loglevel printk.devkmsg=on panic=-1 rdinit=/init \
             tsc=reliable nokaslr random.trust_cpu=on no_timer_check",
        );
        if self.icount {
            // One instruction is one nanosecond: nothing to calibrate.
            line.push_str(" tsc_early_khz=1000000 lpj=4000000");
        }
        if self.flavor == Flavor::Debug {
            // Emulation is slow: 60 s without scheduling is what 20 s are on
            // a machine.
            line.push_str(" page_poison=1 watchdog_thresh=30");
        }
        for word in &self.append {
            line.push(' ');
            line.push_str(word);
        }
        line
    }

    fn qemu(&self, run: &RunDir, kernel: &Path) -> Result<Command> {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-machine", "q35,vmport=off", "-no-reboot"])
            .args(["-m", &self.mem])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(run.file("initramfs"))
            .args(["-append", &self.command_line()]);
        if self.icount {
            ensure!(
                self.accel == "tcg",
                "the instruction clock needs --accel tcg"
            );
            qemu.args(["-accel", "tcg,thread=single", "-smp", "1", "-cpu", "max"])
                .args(["-icount", "shift=0,sleep=off", "-seed", "1"])
                .args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
        } else if self.accel == "tcg" {
            qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max"]);
            qemu.args(["-smp", &self.smp.to_string()]);
        } else {
            qemu.args(["-accel", &self.accel, "-cpu", "host"]);
            qemu.args(["-smp", &self.smp.to_string()]);
        }
        qemu.arg("-serial")
            .arg(format!("file:{}", comma(&run.file("console.log"))?));
        qemu.args(["-device", "virtio-serial-pci"]);
        for name in ["stdout", "stderr", "result"] {
            let path = comma(&run.file(name))?;
            qemu.args(["-chardev", &format!("file,id={name},path={path}")])
                .arg("-device")
                .arg(format!("virtserialport,chardev={name},name=ptshare.{name}"));
        }
        self.export(&mut qemu, Path::new("/"), "root", true)?;
        for (dir, tag) in &self.shares {
            let dir = dir
                .canonicalize()
                .with_context(|| format!("sharing {}", dir.display()))?;
            self.export(&mut qemu, &dir, tag, false)?;
        }
        for (n, image) in self.drives.iter().enumerate() {
            let image = comma(image)?;
            qemu.arg("-drive")
                .arg(format!(
                    "file={image},id=d{n},if=none,format=raw,cache=unsafe"
                ))
                .args(["-device", &format!("virtio-blk-pci,drive=d{n}")]);
        }
        let log = File::create(run.file("qemu.log"))?;
        qemu.stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        paths::die_with_parent(&mut qemu, Signal::SIGKILL);
        Ok(qemu)
    }

    fn export(&self, qemu: &mut Command, dir: &Path, tag: &str, readonly: bool) -> Result<()> {
        let root = nix::unistd::geteuid().is_root();
        let model = if root { "passthrough" } else { "none" };
        let more = if readonly { ",readonly=on" } else { "" };
        let path = comma(dir)?;
        qemu.arg("-fsdev")
            .arg(format!(
                "local,id={tag},path={path},security_model={model},multidevs=remap{more}"
            ))
            .arg("-device")
            .arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
        Ok(())
    }
}

/// What the guest's PID 1 is told; `Spec` of guest-init.
#[derive(Serialize)]
struct Spec {
    command: Vec<String>,
    cwd: String,
    env: Vec<(String, String)>,
    shares: Vec<String>,
    nonce: String,
}

/// A directory for the files of one run. The newest are kept for reading, and those of runs that go on.
struct RunDir {
    dir: PathBuf,
    _in_use: Flock<File>,
}

impl RunDir {
    fn new() -> Result<Self> {
        Self::new_in(&paths::cache_dir("runs")?)
    }

    fn new_in(runs: &Path) -> Result<Self> {
        let mut old: Vec<_> = fs::read_dir(runs)?
            .flatten()
            .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
            .collect();
        old.sort();
        old.reverse();
        for (_, dir) in old.iter().skip(KEEP_RUNS) {
            // A long run sees many short ones come and go.
            if Self::hold(dir).is_ok() {
                let _ = fs::remove_dir_all(dir);
            }
        }
        let dir = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(runs)?
            .keep();
        let in_use = Self::hold(&dir)?;
        Ok(Self {
            dir,
            _in_use: in_use,
        })
    }

    /// The directory as one's own, unless somebody else has it.
    fn hold(dir: &Path) -> Result<Flock<File>> {
        Flock::lock(File::open(dir)?, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| e)
            .with_context(|| format!("locking {}", dir.display()))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// A fifo that QEMU writes, and the thread that reads it to the end.
struct Capture {
    keep_open: File,
    thread: JoinHandle<io::Result<Vec<u8>>>,
}

impl Capture {
    fn start(path: PathBuf, mut copy: Option<Box<dyn Write + Send>>) -> Result<Self> {
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600))?;
        // Without a writer of its own the reader would see the end before
        // QEMU has opened the fifo.
        let mut read = OpenOptions::new()
            .read(true)
            .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
            .open(&path)?;
        let keep_open = OpenOptions::new().write(true).open(&path)?;
        nix::fcntl::fcntl(
            &read,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
        )?;
        let thread = thread::spawn(move || {
            let mut all = Vec::new();
            let mut buffer = [0; 16 * 1024];
            loop {
                let n = read.read(&mut buffer)?;
                if n == 0 {
                    return Ok(all);
                }
                all.extend_from_slice(&buffer[..n]);
                let written = copy
                    .as_mut()
                    .map(|c| c.write_all(&buffer[..n]).and_then(|()| c.flush()));
                if matches!(written, Some(Err(_))) {
                    // Its reader has gone; the run goes on to its end.
                    copy = None;
                }
            }
        });
        Ok(Self { keep_open, thread })
    }

    fn finish(self) -> Result<Vec<u8>> {
        drop(self.keep_open);
        match self.thread.join() {
            Ok(read) => read.context("reading the VM's output"),
            Err(_) => bail!("the thread that reads the VM's output died"),
        }
    }
}

/// A child that does not outlive this value.
struct Guard(Child);

impl Guard {
    /// Waits; kills and returns `None` at the deadline.
    fn wait_until(&mut self, deadline: Instant) -> Result<Option<ExitStatus>> {
        loop {
            if let Some(status) = self.0.try_wait()? {
                if let Some(signal) = status.signal() {
                    eprintln!("x: vm: QEMU was killed by signal {signal}");
                }
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                self.0.kill()?;
                self.0.wait()?;
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn initramfs(init: &Path, spec: &Spec) -> Result<Vec<u8>> {
    let mut archive = guest::Initramfs::default();
    for dir in ["dev", "proc", "sys"] {
        archive.directory(dir);
    }
    archive.console("dev/console");
    archive.program("init", &fs::read(init)?);
    archive.program("spec.json", &serde_json::to_vec(spec)?);
    Ok(archive.finish())
}

/// A path as a value among QEMU's comma-separated options.
fn comma(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.replace(',', ",,"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_runs_that_go_on_are_kept() {
        let runs = tempfile::tempdir().unwrap();
        let first = RunDir::new_in(runs.path()).unwrap();
        let ended = RunDir::new_in(runs.path()).unwrap().dir;
        for dir in [&first.dir, &ended] {
            let long_ago = std::time::SystemTime::UNIX_EPOCH;
            File::open(dir).unwrap().set_modified(long_ago).unwrap();
        }
        for _ in 0..KEEP_RUNS + 2 {
            RunDir::new_in(runs.path()).unwrap();
        }
        assert!(first.dir.exists());
        assert!(!ended.exists());
    }
}
