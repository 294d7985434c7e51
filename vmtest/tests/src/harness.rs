//! What a test is, how it ends, and the runner that gives each one its own process.

use crate::{kernel, sys};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

/// Why a test ended early.
#[derive(Debug)]
pub enum Stop {
    /// The system under test is wrong.
    Fail(String),
    /// The kernel or the machine lacks what the test needs.
    Skip(String),
}

/// Result of a test and of every helper it uses.
pub type Res<T = ()> = Result<T, Stop>;

impl From<sys::Errno> for Stop {
    #[track_caller]
    fn from(e: sys::Errno) -> Stop {
        Stop::Fail(format!(
            "{}: unexpected error: {e}",
            std::panic::Location::caller()
        ))
    }
}

impl From<std::io::Error> for Stop {
    #[track_caller]
    fn from(e: std::io::Error) -> Stop {
        Stop::Fail(format!(
            "{}: unexpected error: {e}",
            std::panic::Location::caller()
        ))
    }
}

impl From<sys::Fault> for Stop {
    #[track_caller]
    fn from(f: sys::Fault) -> Stop {
        Stop::Fail(format!(
            "{}: unexpected fault: {f:?}",
            std::panic::Location::caller()
        ))
    }
}

/// Ends the test with a failure.
#[macro_export]
macro_rules! fail {
    ($($arg:tt)*) => {
        return Err($crate::harness::Stop::Fail(format!("{}:{}: {}", file!(), line!(), format!($($arg)*))))
    };
}

/// Ends the test as skipped.
#[macro_export]
macro_rules! skip {
    ($($arg:tt)*) => { return Err($crate::harness::Stop::Skip(format!($($arg)*))) };
}

/// Fails unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($arg:tt)*) => { if !$cond { $crate::fail!($($arg)*); } };
}

/// Fails unless both values are equal, naming both.
#[macro_export]
macro_rules! ensure_eq {
    ($actual:expr, $expected:expr, $($arg:tt)*) => {{
        let (actual, expected) = (&$actual, &$expected);
        if *actual != *expected {
            $crate::fail!("{}: expected {:?}, got {:?}", format!($($arg)*), expected, actual);
        }
    }};
}

/// Builds a module's table of tests.
#[macro_export]
macro_rules! group {
    ($group:literal; $($name:ident $(($secs:literal))?),* $(,)?) => {
        /// The tests of this group.
        pub fn tests() -> Vec<$crate::harness::Test> {
            vec![$($crate::harness::Test {
                name: concat!($group, "::", stringify!($name)),
                seconds: [$($secs,)? 60][0],
                run: $name,
            }),*]
        }
    };
}

/// How this run was asked for.
#[derive(Clone, Copy)]
pub struct Ctx {
    /// Ask for sharing, and require that it happens.
    pub sharing: bool,
    /// Minutes rather than seconds.
    pub long: bool,
    /// Seed of the random tests.
    pub seed: u64,
    /// Report on stderr how long each test took.
    pub times: bool,
}

impl Ctx {
    /// Asks for sharing for this process and its children to come; nothing when `--stock`.
    pub fn opt_in(&self) -> Res {
        if self.sharing {
            sys::set_ptshare(true)
                .map_err(|e| Stop::Fail(format!("prctl(PR_SET_PTSHARE): {e}")))?;
        }
        Ok(())
    }

    /// Skips a test that is about the feature's own interface.
    pub fn need_feature(&self) -> Res {
        if !self.sharing {
            skip!("is about the sharing interface, which --stock does not use");
        }
        Ok(())
    }

    /// `short` seconds, or `long` with `--long`.
    pub fn duration(&self, short: u64, long: u64) -> Duration {
        Duration::from_secs(if self.long { long } else { short })
    }

    /// A random test of `steps`, or with `--long` of as many as fit in `seconds`, and no fewer: on a debug kernel
    /// and a busy machine one takes ten times as long as on release and an idle one.
    pub fn walk(&self, steps: u64, seconds: u64) -> Walk {
        let mut walk = Walk::steps(steps);
        if self.long {
            walk.end += Duration::from_secs(seconds);
        }
        walk
    }
}

/// How far a random test goes.
#[derive(Clone, Copy)]
pub struct Walk {
    least: u64,
    end: Instant,
}

impl Walk {
    /// So many steps.
    pub fn steps(steps: u64) -> Walk {
        Walk {
            least: steps,
            end: Instant::now(),
        }
    }

    /// Whether another step follows after `n` of them.
    pub fn goes_on(self, n: u64) -> bool {
        n < self.least || Instant::now() < self.end
    }
}

/// One registered test.
pub struct Test {
    /// `group::name`.
    pub name: &'static str,
    /// Time limit of a default run; `--long` multiplies it.
    pub seconds: u64,
    /// The test.
    pub run: fn(&Ctx) -> Res,
}

/// Runs the tests, prints a line for each, and returns whether none failed.
pub fn run(tests: &[Test], ctx: Ctx) -> bool {
    become_subreaper();
    let mut failed = 0;
    for t in tests {
        let sysctl = kernel::mode();
        let before = kernel::gauges();
        let started = Instant::now();
        let mut end = run_one(t, &ctx);
        if let (Some(v), true) = (sysctl, kernel::mode() != sysctl) {
            kernel::set_mode(v).ok();
        }
        crate::machine::clean_leftovers();
        if let Some(leak) = leaked(before) {
            let and = match end {
                Err(Stop::Fail(why)) => format!("{why}; "),
                _ => String::new(),
            };
            end = Err(Stop::Fail(format!("{and}leak: {leak}")));
        }
        if ctx.times {
            eprintln!("{:8.2} s {}", started.elapsed().as_secs_f32(), t.name);
        }
        match end {
            Ok(()) => println!("ok {}", t.name),
            Err(Stop::Skip(why)) => println!("skip {}: {why}", t.name),
            Err(Stop::Fail(why)) => {
                failed += 1;
                println!("FAIL {}: {}", t.name, why.replace('\n', " / "));
            }
        }
        std::io::stdout().flush().ok();
    }
    println!("end {}", tests.len());
    failed == 0
}

/// Waits for the gauges to return to `before`; says what is left when they do not.
fn leaked(before: Option<kernel::Gauges>) -> Option<String> {
    let before = before?;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let now = kernel::gauges()?;
        if now == before {
            return None;
        }
        if Instant::now() > deadline {
            return Some(format!("{before:?} before the test, {now:?} long after it"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn become_subreaper() {
    sys::syscall(libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER as u64, 1]).ok();
}

fn run_one(t: &Test, ctx: &Ctx) -> Res {
    let (ours, theirs) = sys::socketpair()?;
    let pid = sys::fork()?;
    if pid == 0 {
        drop(ours);
        in_test_process(t, ctx, theirs);
    }
    drop(theirs);
    // Both sides set the group, so that it exists whoever runs first.
    set_group(pid, pid);
    let limit = Duration::from_secs(t.seconds * if ctx.long { 12 } else { 1 });
    let mut pipe = File::from(ours);
    let mut text = Vec::new();
    let finished = readable_within(&pipe, limit);
    if finished {
        pipe.read_to_end_quietly(&mut text);
    }
    sys::kill(-pid, libc::SIGKILL).ok();
    let status = sys::wait(pid)?;
    reap_orphans();
    if !finished {
        crate::fail!("no result within {} s", limit.as_secs());
    }
    match text.split_first() {
        Some((b'o', _)) => Ok(()),
        Some((b's', why)) => Err(Stop::Skip(String::from_utf8_lossy(why).into_owned())),
        Some((_, why)) => Err(Stop::Fail(String::from_utf8_lossy(why).into_owned())),
        None => Err(Stop::Fail(format!(
            "the test process ended without a result: {}",
            sys::describe_status(status)
        ))),
    }
}

trait ReadQuietly {
    fn read_to_end_quietly(&mut self, into: &mut Vec<u8>);
}

impl ReadQuietly for File {
    /// Reads one message. Not to the end of file: grandchildren may hold the other end open.
    fn read_to_end_quietly(&mut self, into: &mut Vec<u8>) {
        let mut buf = [0u8; 16384];
        if let Ok(n) = self.read(&mut buf) {
            into.extend_from_slice(&buf[..n]);
        }
    }
}

fn in_test_process(t: &Test, ctx: &Ctx, pipe: OwnedFd) -> ! {
    set_group(0, 0);
    become_subreaper();
    sys::syscall(
        libc::SYS_prctl,
        &[libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64],
    )
    .ok();
    sys::catch_faults();
    std::panic::set_hook(Box::new(|_| {}));
    let end = match catch_unwind(AssertUnwindSafe(|| (t.run)(ctx))) {
        Ok(end) => end,
        Err(p) => Err(Stop::Fail(format!("panic: {}", panic_text(&*p)))),
    };
    let message = match end {
        Ok(()) => "o".to_string(),
        Err(Stop::Skip(why)) => format!("s{why}"),
        Err(Stop::Fail(why)) => format!("f{why}"),
    };
    let mut bytes = message.into_bytes();
    bytes.truncate(16000);
    File::from(pipe).write_all(&bytes).ok();
    sys::exit_now(0);
}

fn panic_text(p: &dyn std::any::Any) -> String {
    p.downcast_ref::<String>()
        .cloned()
        .or_else(|| p.downcast_ref::<&str>().map(|s| s.to_string()))
        .unwrap_or_default()
}

fn set_group(pid: i32, group: i32) {
    sys::syscall(libc::SYS_setpgid, &[pid as u64, group as u64]).ok();
}

fn readable_within(f: &impl AsRawFd, limit: Duration) -> bool {
    let mut p = libc::pollfd {
        fd: f.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut p, 1, limit.as_millis() as i32) == 1 }
}

/// Waits until a descriptor has something to read.
pub fn wait_readable(f: &impl AsRawFd, limit: Duration) -> bool {
    readable_within(f, limit)
}

/// Collects whatever the test's processes left to us as their subreaper. The group is dead already.
fn reap_orphans() {
    while sys::wait(-1).is_ok() {}
}

/// Takes ownership of a descriptor number that a system call returned.
pub fn own(fd: u64) -> OwnedFd {
    // SAFETY: callers pass a descriptor that the kernel just gave them.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}
