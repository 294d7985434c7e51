//! Builds the selftests, once for each version of the kernel's source and of
//! what they are built with.
//!
//! ```text
//! CACHE/selftests/lock          held by whoever builds
//!                 programs-KEY/ the programs: finished, never changed again
//!                 build.log     the last build's whole output
//! ```

use crate::kernel::{self, Flavor};
use crate::{paths, tools};
use anyhow::{bail, ensure, Context, Result};
use nix::sys::signal::Signal;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Libraries that the programs are linked with.
const LIBRARIES: [&str; 4] = ["libc6-dev", "libcap-dev", "libnuma-dev", "liburing-dev"];
/// khugepaged.c of some 6.12.y uses this without including its definition;
/// a second, equal definition is none.
const CFLAGS: &str = "EXTRA_CFLAGS=-DKSFT_SKIP=4";
/// What is another in our copies: file, what is there, what is put there.
const CHANGES: [[&str; 3]; 2] = [
    // No option for its size. Each page is a wakeup from one CPU to another, the
    // dearest thing under emulation; 8 MiB are four granules.
    ["uffd-unit-tests.c", "(32UL << 20)", "(8UL << 20)"],
    // Three seconds for khugepaged to come, which is at the end of the line when
    // the machine is busy.
    ["khugepaged.c", "int timeout = 6;", "int timeout = 60;"],
];

/// The built programs.
pub struct Programs {
    /// Where they are
    pub dir: PathBuf,
    /// Says what they were built from
    pub key: String,
}

/// Builds the programs unless the cache has them.
pub fn programs() -> Result<Programs> {
    let place = paths::cache_dir("selftests")?;
    let tree = kernel::source_tree(Flavor::Stock)?;
    let key = key(&tree)?;
    let dir = place.join(format!("programs-{key}"));
    let _lock = paths::lock(&place.join("lock"), "the selftests")?;
    if !dir.exists() {
        eprintln!("x: building the kernel's mm selftests");
        let scratch = tempfile::Builder::new()
            .prefix("build-")
            .tempdir_in(&place)?;
        build(&tree, scratch.path(), &place.join("build.log"))?;
        fs::rename(scratch.path().join("out"), &dir)?;
    }
    Ok(Programs { dir, key })
}

impl Programs {
    /// Their names, those of the scripts among them.
    pub fn names(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.dir)?.collect::<io::Result<Vec<_>>>()?;
        let names = entries.iter().map(|e| e.file_name().into_string());
        let mut names: Vec<String> = names.filter_map(Result::ok).collect();
        names.sort();
        Ok(names)
    }
}

fn key(tree: &Path) -> Result<String> {
    let mut key = Sha256::new();
    // The tree lies in a directory that is named after the source's version.
    let version = tree.parent().and_then(Path::file_name);
    key.update(version.context("no version")?.as_encoded_bytes());
    key.update(tools::output(Command::new("gcc").arg("--version"))?);
    let query = ["-W", "-f", "${Package} ${Version}\n"];
    key.update(
        tools::output(Command::new("dpkg-query").args(query).args(LIBRARIES))
            .context("the selftests need libraries")?,
    );
    // How they are built, and what else is put beside them.
    key.update(include_str!("build.rs"));
    Ok(hex(&key.finalize()))
}

/// The beginning of a hash, which is enough of it for a file's name.
pub fn hex(hash: &[u8]) -> String {
    hash[..8].iter().map(|b| format!("{b:02x}")).collect()
}

/// Builds from copies of what the build writes next to, so that the source
/// tree stays as it is.
fn build(tree: &Path, scratch: &Path, log: &Path) -> Result<()> {
    let headers = scratch.join("headers");
    let selftests = scratch.join("tree/tools/testing/selftests");
    let out = scratch.join("out");
    for dir in [&headers, &out, &scratch.join("tree/mm")] {
        fs::create_dir_all(dir)?;
    }
    for name in ["mm", "x86", "lib.mk", "kselftest.h", "kselftest_harness.h"] {
        copy(&tree.join("tools/testing/selftests").join(name), &selftests)?;
    }
    for [name, old, new] in CHANGES {
        let file = selftests.join("mm").join(name);
        let text = fs::read_to_string(&file).with_context(|| format!("reading {name}"))?;
        let places = text.matches(old).count();
        ensure!(places == 1, "{name} has {old:?} in {places} places");
        fs::write(&file, text.replace(old, new))?;
    }
    copy(&tree.join("mm/gup_test.h"), &scratch.join("tree/mm"))?;
    let log_file = File::create(log)?;
    let assign = |name: &str, value: &Path| format!("{name}={}", value.display());

    let mut install = make(tree, &log_file)?;
    install.arg("headers_install").args([
        assign("O", &headers),
        assign("INSTALL_HDR_PATH", &headers.join("usr")),
    ]);
    let include = headers.join("usr/include");
    let mut programs = make(&selftests.join("mm"), &log_file)?;
    programs.args(["ARCH=x86_64", CFLAGS]).args([
        assign("OUTPUT", &out),
        assign("top_srcdir", tree),
        format!("KHDR_INCLUDES=-isystem {}", include.display()),
    ]);
    for mut command in [install, programs] {
        let status = command.status().context("running make")?;
        if !status.success() {
            let text = fs::read_to_string(log).unwrap_or_default();
            let errors: Vec<&str> = text.lines().filter(|l| l.contains("rror")).collect();
            let errors = errors.into_iter().take(5).collect::<Vec<_>>().join("\n");
            bail!(
                "building the selftests failed; log: {}\n{errors}",
                log.display()
            );
        }
    }
    for entry in fs::read_dir(selftests.join("mm"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "sh") {
            copy(&path, &out)?;
        }
    }
    Ok(())
}

fn make(dir: &Path, log: &File) -> Result<Command> {
    let jobs = std::thread::available_parallelism().map_or(2, |n| n.get());
    let mut make = Command::new("nice");
    make.args(["make", &format!("-j{jobs}"), "-C"])
        .arg(dir)
        .env("LC_ALL", "C")
        .env_remove("MAKEFLAGS")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?);
    paths::die_with_parent(&mut make, Signal::SIGTERM);
    Ok(make)
}

fn copy(from: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into)?;
    let status = Command::new("cp").arg("-r").arg(from).arg(into).status();
    let status = status.context("running cp")?;
    ensure!(status.success(), "copying {} failed", from.display());
    Ok(())
}
