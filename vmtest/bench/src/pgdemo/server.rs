// SPDX-License-Identifier: MIT OR Apache-2.0
//! A PostgreSQL server that lives as long as the demonstration.

use crate::{progress, sys};
use anyhow::{bail, Context, Result};
use postgres::{Client, NoTls};
use std::fs::{self, File};
use std::os::unix::fs::{chown, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Emulated machines are slow; a server that needs longer than this hangs.
const START: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(60);
/// The disk with the data is mounted here when there is one.
const MOUNT: &str = "/mnt";

/// How to start the server.
#[derive(Default)]
pub struct Settings {
    /// Directory of the server's programs.
    pub bin: PathBuf,
    /// The data directory; below the disk's root when there is a disk.
    pub data: PathBuf,
    /// The device that holds the data.
    pub disk: Option<String>,
    /// Size of the shared buffers, in MiB.
    pub shared_buffers_mb: usize,
    /// Connections to allow.
    pub connections: usize,
}

/// A running server.
pub struct Server {
    postmaster: Child,
    run: PathBuf,
    user: String,
    /// Whether the data is on a disk of its own.
    mounted: bool,
}

impl Server {
    /// Starts the server as the owner of its data, and waits until it answers.
    pub fn start(settings: &Settings) -> Result<Server> {
        let data = match &settings.disk {
            Some(disk) => {
                sys::mount(disk, MOUNT, "ext4", "").context("mounting the data")?;
                Path::new(MOUNT).join(&settings.data)
            }
            None => settings.data.clone(),
        };
        let owner = fs::metadata(&data).with_context(|| data.display().to_string())?;
        let run = PathBuf::from(format!("/tmp/guest-bench-pg-{}", std::process::id()));
        fs::create_dir(&run)?;
        chown(&run, Some(owner.uid()), Some(owner.gid()))?;
        let log = File::create(run.join("log"))?;
        let mut command = Command::new(settings.bin.join("postgres"));
        command.arg("-D").arg(&data);
        for (name, value) in [
            ("unix_socket_directories", run.display().to_string()),
            ("listen_addresses", String::new()),
            (
                "shared_buffers",
                format!("{}MB", settings.shared_buffers_mb),
            ),
            ("max_connections", settings.connections.to_string()),
            ("huge_pages", "off".into()),
            // One process reads the whole table, in its order, and nothing else runs.
            ("max_parallel_workers_per_gather", "0".into()),
            ("synchronize_seqscans", "off".into()),
            ("jit", "off".into()),
            ("autovacuum", "off".into()),
            // The disk is thrown away afterwards.
            ("fsync", "off".into()),
        ] {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        // The standard library drops root's groups along with the user.
        command.uid(owner.uid()).gid(owner.gid()).current_dir("/");
        command
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let postmaster = command.spawn().context("starting the postmaster")?;
        let mut server = Server {
            postmaster,
            run,
            user: "postgres".into(),
            mounted: settings.disk.is_some(),
        };
        let start = Instant::now();
        loop {
            let alive = server.postmaster.try_wait()?.is_none();
            match server.connect() {
                Ok(_) => break,
                Err(_) if alive && start.elapsed() < START => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(e) => {
                    let _ = server.stop(true);
                    return Err(e.context("the server does not answer"));
                }
            }
        }
        progress!(
            "the server answers after {:.1} s",
            start.elapsed().as_secs_f64()
        );
        Ok(server)
    }

    /// A new connection, and so a new backend.
    pub fn connect(&self) -> Result<Client> {
        let run = self.run.to_str().context("socket directory")?;
        Client::configure()
            .host(run)
            .user(&self.user)
            .dbname("postgres")
            .connect(NoTls)
            .context("connecting to the server")
    }

    /// Stops the server, and shows its log if that is of interest.
    pub fn stop(mut self, show_log: bool) -> Result<()> {
        if show_log {
            progress!(
                "the server's log:\n{}",
                fs::read_to_string(self.run.join("log")).unwrap_or_default()
            );
        }
        if let Some(status) = self.postmaster.try_wait()? {
            bail!("the server ended by itself: {status}");
        }
        // Fast shutdown: sessions are ended, and so is the server.
        sys::signal(self.postmaster.id(), libc::SIGINT)?;
        let start = Instant::now();
        while self.postmaster.try_wait()?.is_none() {
            if start.elapsed() > STOP {
                sys::signal(self.postmaster.id(), libc::SIGQUIT)?;
                self.postmaster.wait()?;
                bail!("the server did not stop");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if self.mounted {
            sys::unmount(MOUNT).context("unmounting the data")?;
        }
        Ok(())
    }
}
