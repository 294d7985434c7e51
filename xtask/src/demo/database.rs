// SPDX-License-Identifier: MIT OR Apache-2.0
//! The database of the demonstration: made once, at native speed, by Debian's
//! PostgreSQL and pgbench, and kept in the cache as a disk image.

use crate::{paths, tools};
use anyhow::{bail, ensure, Context, Result};
use nix::fcntl::Flock;
use nix::sys::signal::{kill, Signal};
use nix::unistd::{chown, geteuid, Pid, User};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What is known of the image; absent while the image is not to be trusted.
const FACTS: &str = "facts.json";

/// The data directory in the image.
pub const DATA: &str = "pgdata";

/// Changes when the way of making the image does.
const RECIPE: &str = "1";

/// Rows so wide that a block holds one: a scan goes through many blocks and few rows, which keeps emulation
/// affordable. The rows are pgbench's, its filler is wider.
const WIDEN: &str =
    "ALTER TABLE pgbench_accounts ALTER filler TYPE char(5000), ALTER filler SET STORAGE PLAIN";

/// Transactions of pgbench's own, so that balances differ.
const TRANSACTIONS: &str = "5000";

/// A database in an image.
pub struct Database {
    /// The ext4 image
    pub image: PathBuf,
    /// Directory of the server's programs
    pub bin: PathBuf,
    /// What a scan of the table must return
    pub checksum: String,
    blocks: u64,
    /// Nobody else uses the image meanwhile.
    _lock: Flock<File>,
}

/// What is kept beside the image.
#[derive(Deserialize, Serialize)]
struct Facts {
    checksum: String,
    blocks: u64,
}

impl Database {
    /// The database of that scale, made when the cache does not have it.
    pub fn prepare(guest_bench: &Path, scale: u32) -> Result<Self> {
        let bin = server_programs()?;
        let query = tools::output(Command::new(guest_bench).arg("scan-query"))?;
        let version = tools::output(Command::new(bin.join("postgres")).arg("--version"))?;
        let mut key = Sha256::new();
        for part in [
            RECIPE,
            &version,
            &query,
            WIDEN,
            TRANSACTIONS,
            &format!("{}", geteuid()),
        ] {
            key.update(part);
            key.update([0]);
        }
        let key: String = key.finalize()[..6]
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let cache = paths::cache_dir("demo")?;
        let lock = paths::lock(&cache.join("lock"), "the demonstration's database")?;
        let prefix = format!("scale-{scale}-");
        let home = cache.join(format!("{prefix}{key}"));
        if !home.join(FACTS).exists() {
            // An image takes gigabytes: what an older recipe made goes.
            for old in fs::read_dir(&cache)?.flatten() {
                if old.file_name().to_string_lossy().starts_with(&prefix) {
                    fs::remove_dir_all(old.path())?;
                }
            }
            let unfinished = tempfile::Builder::new()
                .prefix("unfinished-")
                .tempdir_in(&cache)?;
            make(&bin, scale, query.trim(), unfinished.path())?;
            fs::rename(unfinished.keep(), &home)?;
        }
        let facts: Facts = serde_json::from_slice(&fs::read(home.join(FACTS))?)?;
        Ok(Self {
            image: home.join("image"),
            bin,
            checksum: facts.checksum,
            blocks: facts.blocks,
            _lock: lock,
        })
    }

    /// Has a VM use the image. The server in it writes next to nothing, stops and unmounts, so that the next VM
    /// finds the same table; if it does not come to that, the image is made again the next time.
    pub fn lend<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let home = self.image.parent().context("the image has a directory")?;
        let (facts, aside) = (home.join(FACTS), home.join("facts.lent"));
        fs::rename(&facts, &aside)?;
        let done = work()?;
        fs::rename(&aside, &facts)?;
        Ok(done)
    }

    /// Size of the table.
    pub fn table_mib(&self) -> u64 {
        self.blocks * 8 / 1024
    }

    /// Shared buffers that the table fills, with room for its index and the catalogs.
    pub fn shared_buffers_mib(&self) -> u64 {
        self.table_mib() + self.table_mib() / 25 + 64
    }
}

/// Finds PostgreSQL's programs, and installs Debian's package when there are none.
fn server_programs() -> Result<PathBuf> {
    if let Some(bin) = newest_server() {
        return Ok(bin);
    }
    eprintln!("x: demo: installing PostgreSQL, the database of the demonstration");
    // The package would make a database of its own and start it.
    let quiet = "mkdir -p /etc/postgresql-common/createcluster.d && \
                 echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/ptshare.conf && \
                 { apt-get update -q || true; } && DEBIAN_FRONTEND=noninteractive \
                 apt-get install -q -y --no-install-recommends postgresql postgresql-contrib; status=$?; \
                 rm -f /etc/postgresql-common/createcluster.d/ptshare.conf; exit $status";
    tools::as_root(quiet).context("installing postgresql")?;
    newest_server().context("the package postgresql brought no server")
}

fn newest_server() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|v| Some((v.file_name().to_str()?.parse().ok()?, v.path().join("bin"))))
        .filter(|(_, bin)| bin.join("postgres").exists() && bin.join("pgbench").exists())
        .collect();
    found.sort();
    Some(found.pop()?.1)
}

/// Who runs the server, which refuses to be root.
struct Owner(Option<User>);

impl Owner {
    fn find() -> Result<Self> {
        if !geteuid().is_root() {
            return Ok(Self(None));
        }
        let user = User::from_name("postgres")?.context("there is no user postgres")?;
        Ok(Self(Some(user)))
    }

    fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C");
        command.current_dir("/").stdin(Stdio::null());
        if let Some(user) = &self.0 {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }
}

/// Makes image and facts in `home`.
fn make(bin: &Path, scale: u32, query: &str, home: &Path) -> Result<()> {
    let start = Instant::now();
    let say = |what: &str| eprintln!("x: demo: {what} ({} s)", start.elapsed().as_secs());
    let owner = Owner::find()?;
    // Not in the cache: the server's user may not be allowed to go there.
    let stage = tempfile::Builder::new()
        .prefix("ptshare-demo-")
        .tempdir_in("/var/tmp")?;
    if let Some(user) = &owner.0 {
        chown(stage.path(), Some(user.uid), Some(user.gid))?;
    }
    let tree = stage.path().join("tree");
    tools::output(owner.command("/bin/mkdir").arg(&tree))?;
    let data = tree.join(DATA);
    say("initdb");
    tools::output(
        owner
            .command(bin.join("initdb"))
            .args([
                "-U",
                "postgres",
                "-A",
                "trust",
                "-N",
                "--no-locale",
                "-E",
                "UTF8",
                "-D",
            ])
            .arg(&data),
    )?;
    let server = HostServer::start(&owner, bin, &data, stage.path())?;
    say(&format!("pgbench makes a table of {} MB", scale * 800));
    let scale = scale.to_string();
    server.run("pgbench", &["-i", "-q", "-I", "dt", "-s", &scale])?;
    server.sql(WIDEN)?;
    server.run("pgbench", &["-i", "-q", "-I", "Gp", "-s", &scale])?;
    server.run(
        "pgbench",
        &["-n", "-c", "1", "-t", TRANSACTIONS, "--random-seed=1"],
    )?;
    say("vacuum, and the result that all scans must return");
    server.sql("CREATE EXTENSION pg_prewarm")?;
    server.sql("CREATE EXTENSION pg_buffercache")?;
    server.sql("VACUUM (FREEZE, ANALYZE)")?;
    server.sql("CHECKPOINT")?;
    let blocks = server.sql("SELECT pg_relation_size('pgbench_accounts') / 8192")?;
    let facts = Facts {
        checksum: server.sql(query)?,
        blocks: blocks
            .parse()
            .with_context(|| format!("size of the table: {blocks}"))?,
    };
    server.stop()?;
    say("packing the disk image");
    let used = tools::output(Command::new("du").arg("-sm").arg(&tree))?;
    let used: u64 = used
        .split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .context("du")?;
    tools::output(
        Command::new("/usr/sbin/mke2fs")
            .args([
                "-q",
                "-t",
                "ext4",
                "-O",
                "^has_journal",
                "-m",
                "0",
                "-i",
                "65536",
            ])
            .args(["-E", "lazy_itable_init=0", "-d"])
            .arg(&tree)
            .arg(home.join("image"))
            .arg(format!("{}M", used + used / 32 + 128)),
    )?;
    fs::write(home.join(FACTS), serde_json::to_vec(&facts)?)?;
    say("the database is ready");
    Ok(())
}

/// A server on this machine, only reachable through a socket in its directory.
struct HostServer<'a> {
    owner: &'a Owner,
    bin: &'a Path,
    socket: &'a Path,
    postmaster: Child,
}

impl<'a> HostServer<'a> {
    fn start(owner: &'a Owner, bin: &'a Path, data: &Path, socket: &'a Path) -> Result<Self> {
        let log = socket.join("log");
        let file = File::create(&log)?;
        let mut command = owner.command(bin.join("postgres"));
        command.arg("-D").arg(data);
        for setting in [
            &format!("unix_socket_directories={}", socket.display()),
            "listen_addresses=",
            "shared_buffers=256MB",
            "autovacuum=off",
            "fsync=off",
            "full_page_writes=off",
            // Filling a table in the transaction that empties it writes no log then.
            "wal_level=minimal",
            "max_wal_senders=0",
            "max_wal_size=4GB",
            "max_parallel_workers_per_gather=0",
        ] {
            command.args(["-c", setting]);
        }
        let postmaster = command.stdout(file.try_clone()?).stderr(file).spawn()?;
        let mut server = Self {
            owner,
            bin,
            socket,
            postmaster,
        };
        let start = Instant::now();
        while server.sql("SELECT 1").is_err() {
            let gone = server.postmaster.try_wait()?.is_some();
            if gone || start.elapsed() > Duration::from_secs(60) {
                bail!("the server does not start:\n{}", fs::read_to_string(&log)?);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(server)
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = self.owner.command(self.bin.join(program));
        command.args(args).env("PGHOST", self.socket);
        tools::output(
            command
                .env("PGUSER", "postgres")
                .env("PGDATABASE", "postgres"),
        )
    }

    fn sql(&self, sql: &str) -> Result<String> {
        let out = self.run("psql", &["-qAtX", "-v", "ON_ERROR_STOP=1", "-c", sql])?;
        Ok(out.trim().to_owned())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.postmaster.id() as i32)
    }

    /// Fast shutdown: the data directory is clean afterwards.
    fn stop(mut self) -> Result<()> {
        kill(self.pid(), Signal::SIGINT)?;
        let status = self.postmaster.wait()?;
        ensure!(status.success(), "the server's end: {status}");
        Ok(())
    }
}

impl Drop for HostServer<'_> {
    fn drop(&mut self) {
        if let Ok(None) = self.postmaster.try_wait() {
            let _ = kill(self.pid(), Signal::SIGQUIT);
            let _ = self.postmaster.wait();
        }
    }
}
