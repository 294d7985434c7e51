// SPDX-License-Identifier: MIT OR Apache-2.0
//! The real programs of `./x bench fork`: Debian's, installed on this machine, which the VM sees.

use crate::{bench, paths, tools};
use anyhow::Result;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Redis. Its package of tools has the server's program too, and starts no service.
pub fn redis() -> Result<Vec<String>> {
    if !Path::new("/usr/bin/redis-server").exists()
        && !Path::new("/usr/bin/redis-check-rdb").exists()
    {
        tools::install("redis-tools", "Redis saves by fork")?;
    }
    Ok(Vec::new())
}

/// AFL++, and a target that its compiler has instrumented.
pub fn afl() -> Result<Vec<String>> {
    let compiler = "/usr/bin/afl-clang-fast";
    if !Path::new("/usr/bin/afl-fuzz").exists() || !Path::new(compiler).exists() {
        tools::install("afl++", "a fuzzer forks for every input")?;
    }
    let dir = paths::in_root("target/bench");
    fs::create_dir_all(&dir)?;
    let target = dir.join("heap");
    tools::output(
        Command::new(compiler)
            .env("AFL_QUIET", "1")
            .args(["-O2", "-Wall", "-Werror", "-o"])
            .arg(&target)
            .arg(paths::in_root("vmtest/bench/clients/heap.c")),
    )?;
    Ok(vec!["--target".into(), bench::text(&target)?])
}
