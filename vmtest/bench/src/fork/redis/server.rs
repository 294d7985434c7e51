// SPDX-License-Identifier: MIT OR Apache-2.0
//! A Redis server of this machine's package, with its dump in memory.

use super::super::own_program;
use crate::{progress, sys};
use anyhow::{bail, ensure, Context, Result};
use redis::{cmd, Client, Connection};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const HOME: &str = "/run/guest-bench-redis";
/// In emulated time.
const START: Duration = Duration::from_secs(120);

/// A server.
pub struct Server(Child);

impl Server {
    /// Starts one that has what is in the dump, if there is one, and waits until it answers.
    pub fn start(ask: bool) -> Result<Server> {
        fs::create_dir_all(HOME)?;
        let mut command = own_program(ask, &program()?);
        for option in [
            ["--port", "0"],
            ["--unixsocket", &format!("{HOME}/socket")],
            ["--dir", HOME],
            ["--save", ""],
            ["--appendonly", "no"],
            ["--enable-debug-command", "yes"],
            ["--loglevel", "warning"],
            ["--logfile", &format!("{HOME}/log")],
        ] {
            command.args(option);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut server = Server(command.spawn().context("starting redis-server")?);
        let start = Instant::now();
        loop {
            let alive = server.0.try_wait()?.is_none();
            match server.connect() {
                Ok(_) => return Ok(server),
                Err(_) if alive && start.elapsed() < START => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) => {
                    progress!("{}", fs::read_to_string(format!("{HOME}/log"))?);
                    return Err(e.context("Redis does not answer"));
                }
            }
        }
    }

    /// A connection to a server that has loaded its data.
    pub fn connect(&self) -> Result<Connection> {
        let client = Client::open(format!("unix://{HOME}/socket"))?;
        let mut connection = client.get_connection()?;
        let _: String = cmd("PING").query(&mut connection)?;
        Ok(connection)
    }

    /// Kills the processes that the server has forked.
    pub fn kill_children(&mut self) -> Result<()> {
        let server = self.0.id();
        let mut killed = 0;
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            if crate::proc::find(&status, "PPid") == Some(server.into()) {
                sys::signal(pid, libc::SIGKILL)?;
                killed += 1;
            }
        }
        ensure!(killed == 1, "the server has {killed} children");
        Ok(())
    }

    /// Ends the server, which saves nothing.
    pub fn stop(mut self) -> Result<()> {
        let mut connection = self.connect()?;
        // No answer: the connection ends.
        let _ = cmd("SHUTDOWN").arg("NOSAVE").query::<()>(&mut connection);
        let status = self.0.wait()?;
        ensure!(status.success(), "the server's end: {status}");
        Ok(())
    }
}

/// Where the server's program is, under its own name.
fn program() -> Result<String> {
    let installed = "/usr/bin/redis-server";
    if Path::new(installed).exists() {
        return Ok(installed.into());
    }
    // One program is the server and its tools: it goes by the name that it is called by. The package that has
    // it under the tools' names starts no service.
    let tool = "/usr/bin/redis-check-rdb";
    if !Path::new(tool).exists() {
        bail!("there is neither {installed} nor {tool}");
    }
    let link = format!("{HOME}/redis-server");
    if !Path::new(&link).exists() {
        symlink(tool, &link)?;
    }
    Ok(link)
}
