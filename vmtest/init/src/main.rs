//! PID 1 of the lab's VM: makes the machine's files a writable root, runs one
//! command on it, reports what became of the command, and powers off.
//!
//! It says what it does on two channels. The kernel's log gets a line at the
//! start and one at the end, each with the run's nonce, by which the host
//! knows that the log was captured whole. A virtio-serial port gets the result
//! record; a run without one has failed, so nothing here may end the VM
//! quietly.

mod leaks;
mod mounts;
mod net;

use anyhow::{anyhow, bail, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What the host wants of this run: `/spec.json` of the initramfs.
#[derive(Deserialize)]
struct Spec {
    /// The command and its arguments
    command: Vec<String>,
    /// Where to run it
    cwd: String,
    /// Its environment, whole
    env: Vec<(String, String)>,
    /// 9p tags to mount, writable, at `/run/share/TAG`
    shares: Vec<String>,
    /// Marks this run's lines in the kernel's log
    nonce: String,
}

/// What became of it: one line of JSON on the port `ptshare.result`.
#[derive(Default, Serialize)]
struct Record {
    /// The command's exit status
    exit: Option<i32>,
    /// The signal that killed it
    signal: Option<i32>,
    /// Why it could not be run at all
    error: Option<String>,
    /// Whether kmemleak has looked for leaks, on kernels that have it
    leak_scan: Option<bool>,
}

fn main() {
    let record = session().unwrap_or_else(|e| Record {
        error: Some(format!("{e:#}")),
        ..Record::default()
    });
    if let Err(e) = report(&record) {
        kmsg(&format!("ptshare-lab: no report: {e:#}"));
    }
    power_off()
}

/// Everything up to the report. The last thing it does is to say so in the
/// kernel's log, and that line is out before the report is.
fn session() -> Result<Record> {
    mounts::early()?;
    let spec: Spec =
        serde_json::from_slice(&fs::read("/spec.json")?).context("reading spec.json")?;
    kmsg(&format!("ptshare-lab: begin {}", spec.nonce));
    mounts::root(
        &spec.cwd,
        spec.command.first().map_or("", |c| c),
        &spec.shares,
    )?;
    net::setup()?;

    let mut record = run(&spec)?;
    record.leak_scan = leaks::scan(kmsg)?;
    kmsg(&format!("ptshare-lab: end {}", spec.nonce));
    Ok(record)
}

/// Runs the command and everything it leaves behind to the end.
fn run(spec: &Spec) -> Result<Record> {
    let (name, arguments) = spec.command.split_first().context("no command")?;
    let (out, out_pump) = stream("ptshare.stdout")?;
    let (err, err_pump) = stream("ptshare.stderr")?;
    let mut complaints = File::from(err.try_clone()?);
    // The Command, which holds writing ends of the pipes, is gone after this.
    let spawned = Command::new(name)
        .args(arguments)
        .env_clear()
        .envs(spec.env.iter().map(|(k, v)| (k, v)))
        .current_dir(&spec.cwd)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn();
    let mut record = Record::default();
    match spawned {
        Ok(child) => {
            let status = reap_until(Pid::from_raw(i32::try_from(child.id())?))?;
            match status {
                WaitStatus::Exited(_, code) => record.exit = Some(code),
                WaitStatus::Signaled(_, signal, _) => record.signal = Some(signal as i32),
                other => bail!("the command ended in an unknown way: {other:?}"),
            }
        }
        Err(e) => {
            let missing = e.kind() == io::ErrorKind::NotFound;
            record.exit = Some(if missing { 127 } else { 126 });
            writeln!(complaints, "{name}: {e}")?;
        }
    }
    drop(complaints);
    finish_others()?;
    for pump in [out_pump, err_pump] {
        pump.join()
            .map_err(|_| anyhow!("a thread died"))?
            .context("passing output on")?;
    }
    Ok(record)
}

/// A pipe whose other end a thread copies to a virtio-serial port. The port
/// itself will not do as a standard stream: it can be opened only once.
fn stream(port: &str) -> Result<(OwnedFd, JoinHandle<io::Result<()>>)> {
    let mut port = open_port(port)?;
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let mut read = File::from(read);
    // Not io::copy: it would splice, and a port takes an empty pipe for the end.
    let pump = thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        loop {
            match read.read(&mut buffer)? {
                0 => return Ok(()),
                n => port.write_all(&buffer[..n])?,
            }
        }
    });
    Ok((write, pump))
}

/// Reaps whatever ends until `child` does.
fn reap_until(child: Pid) -> Result<WaitStatus> {
    loop {
        match waitpid(None, None) {
            Ok(status) if status.pid() == Some(child) => return Ok(status),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("waiting for the command"),
        }
    }
}

/// Kills what the command left running, so that its memory is freed, and
/// checked, before the run counts as ended.
fn finish_others() -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match kill(Pid::from_raw(-1), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(e).context("killing what the command left"),
        }
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::ECHILD) => return Ok(()),
                Err(e) => return Err(e).context("reaping what the command left"),
            }
        }
        if Instant::now() > deadline {
            bail!("processes that the command left do not die");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Opens a virtio-serial port by its name.
fn open_port(name: &str) -> Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim() == name) {
            let device = std::path::Path::new("/dev").join(entry.file_name());
            return OpenOptions::new()
                .write(true)
                .open(&device)
                .with_context(|| format!("opening {name}"));
        }
    }
    bail!("the VM has no port {name}")
}

fn report(record: &Record) -> Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    open_port("ptshare.result")?.write_all(&line)?;
    Ok(())
}

/// Writes a line to the kernel's log. There is nobody to tell when it fails;
/// the host sees it by the line's absence.
fn kmsg(line: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = log.write_all(line.as_bytes());
    }
}

fn power_off() -> ! {
    nix::unistd::sync();
    // The kernel stops the other CPUs wherever they are, and one that spreads load just then gives work to one
    // that has stopped, which is a WARNING. In order, this happens to none. What cannot go offline stays.
    for cpu in 1.. {
        let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        if std::fs::write(online, "0").is_err() {
            break;
        }
    }
    // It does not return but by an error, after which PID 1 ends and the
    // kernel panics: the VM is gone either way.
    let e = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    panic!("power off: {e:?}")
}
