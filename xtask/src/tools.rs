//! The compilers and tools of a kernel build, their versions, and the one of
//! them that Debian 12 does not package in a usable version (bindgen).

use crate::paths;
use anyhow::{bail, Context, Result};
use nix::unistd::geteuid;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The oldest bindgen that Linux 6.12 accepts.
const BINDGEN_MIN: (u32, u32, u32) = (0, 65, 1);

/// The programs that a kernel is built with.
pub struct Toolchain {
    /// rustc of the distribution, whose library sources the kernel compiles
    pub rustc: PathBuf,
    /// bindgen
    pub bindgen: PathBuf,
    /// The directory of libclang, which bindgen loads
    pub libclang: PathBuf,
}

impl Toolchain {
    /// Finds the tools; installs bindgen when the machine has none that will do.
    pub fn find() -> Result<Self> {
        Ok(Self {
            rustc: find_rustc()?,
            bindgen: find_bindgen()?,
            libclang: find_libclang()?,
        })
    }

    /// What of the tools' identity decides the outcome of a build.
    pub fn versions(&self) -> Result<String> {
        let mut all = String::new();
        for (program, arg) in [
            (self.rustc.as_path(), "-vV"),
            (self.bindgen.as_path(), "--version"),
            (Path::new("gcc"), "--version"),
            (Path::new("ld"), "--version"),
        ] {
            all.push_str(&output(Command::new(program).arg(arg))?);
        }
        all.push_str(&self.libclang.to_string_lossy());
        Ok(all)
    }

    /// Sets `make`'s environment. The kernel's build finds `bindgen` on PATH.
    pub fn apply(&self, make: &mut Command) {
        let mut path = self
            .bindgen
            .parent()
            .map(|d| d.as_os_str().to_owned())
            .unwrap_or_default();
        // The system's own programs come before a user's, bindgen aside, so
        // that the versions in the cache's key are those that are used.
        path.push(":/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin");
        make.env("PATH", path)
            .env("LIBCLANG_PATH", &self.libclang)
            .env("LC_ALL", "C")
            .env_remove("MAKEFLAGS")
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTUP_TOOLCHAIN");
        for name in ["RUSTC", "HOSTRUSTC"] {
            make.arg(format!("{name}={}", self.rustc.display()));
        }
        make.arg(format!("BINDGEN={}", self.bindgen.display()));
    }
}

/// Runs a command and returns its stdout.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {name}"))?;
    if !out.status.success() {
        bail!(
            "{name} failed ({}): {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Installs a package of the distribution, saying why.
pub fn install(package: &str, why: &str) -> Result<()> {
    eprintln!("x: installing {package}: {why}");
    as_root(&format!(
        "{{ apt-get update -q || true; }} && DEBIAN_FRONTEND=noninteractive \
         apt-get install -q -y --no-install-recommends {package}"
    ))
    .with_context(|| format!("installing {package}"))
}

/// Runs a shell script as root.
pub fn as_root(script: &str) -> Result<()> {
    let mut shell = if geteuid().is_root() {
        Command::new("sh")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg("sh");
        sudo
    };
    let status = shell
        .args(["-c", script])
        .stdout(std::io::stderr())
        .status()?;
    if !status.success() {
        bail!("a script for root: {status}");
    }
    Ok(())
}

fn find_rustc() -> Result<PathBuf> {
    // rustup's rustc has no library sources unless asked; Debian's package
    // has, so the distribution's own is the one that works everywhere.
    let rustc = PathBuf::from("/usr/bin/rustc");
    let sysroot = output(Command::new(&rustc).args(["--print", "sysroot"]))
        .context("the kernel needs the distribution's rustc (package rustc-web or rustc)")?;
    let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !library.exists() {
        bail!(
            "{} is missing: the kernel compiles Rust's core library from source (package rust-web-src or rust-src)",
            library.display()
        );
    }
    Ok(rustc)
}

fn find_libclang() -> Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir("/usr/lib")?.flatten() {
        let name = entry.file_name();
        let Some(version) = name
            .to_str()
            .and_then(|n| n.strip_prefix("llvm-"))
            .and_then(|v| v.parse().ok())
        else {
            continue;
        };
        let lib = entry.path().join("lib");
        if lib.join("libclang.so").exists() || lib.join("libclang.so.1").exists() {
            found.push((version, lib));
        }
    }
    found.sort();
    match found.pop() {
        Some((version, lib)) if version >= 16 => Ok(lib),
        _ => bail!("no libclang of version 16 or later (package libclang-19-dev)"),
    }
}

fn bindgen_version(bindgen: &Path) -> Option<(u32, u32, u32)> {
    let text = output(Command::new(bindgen).arg("--version")).ok()?;
    let mut numbers = text
        .split_whitespace()
        .nth(1)?
        .split('.')
        .map(|n| n.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}

fn find_bindgen() -> Result<PathBuf> {
    let tools = paths::cache()?.join("tools");
    let mut candidates = Vec::new();
    if let Some(path) = std::env::var_os("PATH") {
        candidates.extend(std::env::split_paths(&path));
    }
    if let Some(home) = std::env::var_os("HOME") {
        candidates.push(Path::new(&home).join(".cargo/bin"));
    }
    candidates.push(tools.join("bin"));
    let usable = |dir: &PathBuf| {
        let bindgen = dir.join("bindgen");
        (bindgen.exists() && bindgen_version(&bindgen).is_some_and(|v| v >= BINDGEN_MIN))
            .then_some(bindgen)
    };
    if let Some(bindgen) = candidates.iter().find_map(usable) {
        return Ok(bindgen);
    }
    eprintln!("x: installing bindgen: the kernel's Rust bindings are made with it and the distribution's is too old");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["install", "--quiet", "--locked", "bindgen-cli", "--root"])
        .arg(&tools)
        .stdout(std::io::stderr())
        .status()
        .context("running cargo install bindgen-cli")?;
    if !status.success() {
        bail!("cargo install bindgen-cli failed");
    }
    usable(&tools.join("bin")).context("the bindgen just installed does not run")
}
