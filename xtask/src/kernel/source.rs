//! The kernel's source: Debian's package unpacked once, and trees with the
//! series and the overlay, in which an update touches only the files whose
//! content changes, so that make rebuilds only what depends on them.
//!
//! A patched tree starts as hard links to the pristine one. A file of it is
//! only ever replaced by rename, never written in place, which both leaves the
//! pristine tree alone and makes a kill at any moment harmless: the list of
//! files that may differ is written before the first of them is touched.

use super::read;
use crate::paths;
use anyhow::{bail, Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use walkdir::WalkDir;

const PACKAGE: &str = "linux-source-6.12";
const TARBALL: &str = "/usr/src/linux-source-6.12.tar.xz";
/// The version that the series was made and tried on.
const TRIED: u32 = 117;
/// Names, one a line, of the files that may differ from the pristine tree.
const MANIFEST: &str = ".ptshare-manifest";

/// Files of a tree that differ from the pristine one: content, or `None` for a
/// file that is not there.
type Files = BTreeMap<PathBuf, Option<Vec<u8>>>;

/// Debian's package of the source, and its directory in the cache.
pub struct Source {
    /// The package's version, such as `6.12.117-1~deb12u1`
    pub version: String,
    /// Everything about this version in the cache
    pub dir: PathBuf,
}

impl Source {
    /// Finds the installed package.
    pub fn find() -> Result<Self> {
        let version = crate::tools::output(Command::new("dpkg-query").args([
            "-W",
            "-f",
            "${Version}",
            PACKAGE,
        ]))
        .with_context(|| format!("is the package {PACKAGE} installed?"))?;
        let dir = paths::cache_dir("kernel")?.join(version.replace(['~', ':', '+'], "_"));
        fs::create_dir_all(&dir)?;
        Ok(Self { version, dir })
    }

    /// Says which source a build is about to use.
    pub fn announce(&self) {
        let upstream = upstream(&self.version);
        eprintln!("x: Linux {upstream} ({PACKAGE} {})", self.version);
        if !tried(upstream) {
            eprintln!(
                "x: warning: {upstream} is untried; the series was made and tested on 6.12.{TRIED}"
            );
        }
    }

    fn pristine(&self) -> PathBuf {
        self.dir.join("pristine")
    }

    /// Brings the patched tree `name`, or the pristine one, up to date and
    /// returns it; `extra` is a patch that comes after series and overlay. The
    /// caller holds the tree's lock.
    pub fn prepare(&self, name: Option<&str>, extra: Option<&str>) -> Result<PathBuf> {
        self.unpack()?;
        let Some(name) = name else {
            return Ok(self.pristine());
        };
        let tree = self.dir.join(name);
        if !tree.exists() {
            eprintln!("x: making the source tree {name}");
            let partial = self.dir.join(format!("{name}.partial"));
            remove_tree(&partial)?;
            run(Command::new("cp")
                .arg("-al")
                .arg(self.pristine())
                .arg(&partial))?;
            fs::rename(&partial, &tree)?;
        }
        self.sync(&tree, extra)?;
        Ok(tree)
    }

    fn unpack(&self) -> Result<()> {
        let pristine = self.pristine();
        let _lock = paths::lock(&self.dir.join("lock"), "the kernel's source")?;
        if pristine.exists() {
            return Ok(());
        }
        eprintln!("x: unpacking {TARBALL}");
        let partial = self.dir.join("pristine.partial");
        remove_tree(&partial)?;
        fs::create_dir_all(&partial)?;
        run(Command::new("tar")
            .arg("xf")
            .arg(TARBALL)
            .args(["--strip-components=1", "-C"])
            .arg(&partial))?;
        fs::rename(&partial, &pristine)?;
        Ok(())
    }

    /// Fails if series, overlay and `extra` do not go onto the pristine tree.
    pub fn check(&self, extra: &str) -> Result<()> {
        self.unpack()?;
        self.wanted(Some(extra)).map(drop)
    }

    /// What series, overlay and `extra` make of the pristine tree.
    fn wanted(&self, extra: Option<&str>) -> Result<Files> {
        let pristine = self.pristine();
        let mut wanted = self.patched(Files::new(), &series()?)?;
        for (path, from) in overlay()? {
            if pristine.join(&path).exists() || wanted.contains_key(&path) {
                bail!(
                    "kernel/{0} would replace the kernel's own {0}: changes of existing files belong in kernel/patches",
                    path.display()
                );
            }
            wanted.insert(path, Some(read(&from)?));
        }
        if let Some(extra) = extra {
            let patch = [(extra.to_owned(), paths::in_root(extra))];
            wanted = self.patched(wanted, &patch).context(
                "it goes over kernel/patches and the rest of kernel/, whose changes it has to follow",
            )?;
        }
        Ok(wanted)
    }

    /// Makes `tree` equal to pristine + series + overlay + `extra`.
    fn sync(&self, tree: &Path, extra: Option<&str>) -> Result<()> {
        let pristine = self.pristine();
        let mut wanted = self.wanted(extra)?;
        let manifest = tree.join(MANIFEST);
        let mut touched: BTreeSet<PathBuf> = wanted.keys().cloned().collect();
        if let Ok(old) = fs::read_to_string(&manifest) {
            touched.extend(old.lines().map(PathBuf::from));
        }
        replace(&manifest, listing(touched.iter()).as_bytes())?;

        let mut changed = 0;
        for path in &touched {
            let place = tree.join(path);
            let content = match wanted.remove(path) {
                Some(content) => content,
                None => fs::read(pristine.join(path)).ok(),
            };
            let current = fs::read(&place).ok();
            if content == current {
                continue;
            }
            changed += 1;
            match content {
                Some(content) => {
                    fs::create_dir_all(place.parent().context("no parent")?)?;
                    replace(&place, &content)?;
                    copy_mode(&pristine.join(path), &place)?;
                }
                None => {
                    fs::remove_file(&place)?;
                    // A directory left empty would keep a Makefile's glob alive.
                    let mut dir = place.parent();
                    while let Some(d) = dir.filter(|d| *d != tree && fs::remove_dir(d).is_ok()) {
                        dir = d.parent();
                    }
                }
            }
        }
        if changed > 0 {
            eprintln!("x: source tree: {changed} files changed");
        }
        Ok(())
    }

    /// What the patches make of the files they name, those in `files` being as
    /// they are there and all others pristine. Applies them to copies in a
    /// scratch directory.
    fn patched(&self, mut files: Files, patches: &[(String, PathBuf)]) -> Result<Files> {
        let mut names = BTreeSet::new();
        for (_, path) in patches {
            names.extend(files_of(&String::from_utf8_lossy(&read(path)?))?);
        }
        let scratch = tempfile::tempdir_in(&self.dir)?;
        for name in &names {
            let from = self.pristine().join(name);
            let to = scratch.path().join(name);
            fs::create_dir_all(to.parent().context("no parent")?)?;
            match files.get(name) {
                Some(Some(content)) => fs::write(&to, content)?,
                Some(None) => {}
                None if from.exists() => drop(fs::copy(&from, &to)?),
                None => {}
            }
        }
        for (name, path) in patches {
            let out = Command::new("patch")
                .args(["-p1", "--fuzz=0", "--batch", "--forward", "-d"])
                .arg(scratch.path())
                .arg("-i")
                .arg(path)
                .output()
                .context("running patch")?;
            let text = String::from_utf8_lossy(&out.stdout);
            if !out.status.success() || text.contains("fuzz") {
                bail!("{name} does not apply to {}:\n{text}", self.version);
            }
        }
        for name in names {
            let path = scratch.path().join(&name);
            let content = path.exists().then(|| read(&path)).transpose()?;
            files.insert(name, content);
        }
        Ok(files)
    }
}

/// The kernel's own version in that of the package.
fn upstream(version: &str) -> &str {
    version.split('-').next().unwrap_or(version)
}

/// Whether it is the one that the series was made and tried on.
fn tried(upstream: &str) -> bool {
    let y = upstream.strip_prefix("6.12.");
    y.and_then(|y| y.parse().ok()) == Some(TRIED)
}

/// The patches in order: name and path.
pub fn series() -> Result<Vec<(String, PathBuf)>> {
    let dir = paths::in_root("kernel/patches");
    let list = match fs::read_to_string(dir.join("series")) {
        Ok(list) => list,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).context("reading kernel/patches/series"),
    };
    Ok(list
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(|name| (name.to_owned(), dir.join(name)))
        .collect())
}

/// The new files, each by its path in the kernel's tree: all that lies in a
/// directory below `kernel/` other than `patches` and `configs`.
pub fn overlay() -> Result<Vec<(PathBuf, PathBuf)>> {
    let root = paths::in_root("kernel");
    let mut files = Vec::new();
    let walk = WalkDir::new(&root)
        .min_depth(1)
        .sort_by_file_name()
        .into_iter()
        .filter_entry(|e| {
            let name = e.file_name().as_bytes();
            let ours = e.depth() == 1 && (name == b"patches" || name == b"configs");
            !(ours || name.starts_with(b".") || name.ends_with(b"~"))
        });
    for entry in walk {
        let entry = entry?;
        if entry.depth() > 1 && entry.file_type().is_file() {
            let path = entry.path().strip_prefix(&root)?.to_owned();
            files.push((path, entry.into_path()));
        }
    }
    Ok(files)
}

/// The files that a patch names, from its `---` and `+++` lines.
fn files_of(patch: &str) -> Result<BTreeSet<PathBuf>> {
    let mut names = BTreeSet::new();
    let mut lines = patch.lines().peekable();
    while let Some(line) = lines.next() {
        // A removed line that begins with "-- " looks alike but for what follows.
        let Some(old) = line.strip_prefix("--- ") else {
            continue;
        };
        let Some(new) = lines.peek().and_then(|l| l.strip_prefix("+++ ")) else {
            continue;
        };
        for name in [old, new] {
            let name = name.split('\t').next().unwrap_or(name).trim();
            if name == "/dev/null" {
                continue;
            }
            let name = name
                .split_once('/')
                .map(|(_, rest)| PathBuf::from(rest))
                .with_context(|| format!("a patch names {name} without a leading a/ or b/"))?;
            if !name.components().all(|c| matches!(c, Component::Normal(_))) {
                bail!("a patch names {}, outside of the tree", name.display());
            }
            names.insert(name);
        }
    }
    Ok(names)
}

fn listing<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> String {
    paths.map(|p| format!("{}\n", p.display())).collect()
}

/// Puts a whole file in place at once, breaking any hard link.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".ptshare-new");
    let temporary = PathBuf::from(name);
    fs::write(&temporary, content).with_context(|| format!("writing {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("replacing {}", path.display()))
}

fn copy_mode(from: &Path, to: &Path) -> Result<()> {
    if let Ok(meta) = fs::metadata(from) {
        fs::set_permissions(to, meta.permissions())?;
    }
    Ok(())
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("running {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{:?} failed: {status}", command.get_program());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_changed_new_and_deleted_files() {
        let patch = "\
diff --git a/mm/a.c b/mm/a.c
--- a/mm/a.c
+++ b/mm/a.c
@@ -1,2 +1,1 @@
--- a comment that goes
 x
--- /dev/null
+++ b/mm/new.h\t2026-01-01
--- a/mm/old.c
+++ /dev/null
";
        let names: Vec<_> = files_of(patch).unwrap().into_iter().collect();
        assert_eq!(names, ["mm/a.c", "mm/new.h", "mm/old.c"].map(PathBuf::from));
    }

    #[test]
    fn one_version_of_the_kernel_is_tried() {
        assert!(tried(upstream(&format!("6.12.{TRIED}-1~deb12u1"))));
        assert!(tried(upstream(&format!("6.12.{TRIED}"))));
        let (before, after) = (TRIED - 1, TRIED + 1);
        for other in [
            format!("6.12.{before}-1"),
            format!("6.12.{after}-1~bpo12+1"),
            format!("6.12.{TRIED}0-1"),
            format!("6.13.{TRIED}-1"),
            format!("6.1.{TRIED}-1"),
            format!("6.12~rc1-1+{TRIED}"),
            "6.12-1".into(),
            String::new(),
        ] {
            assert!(!tried(upstream(&other)), "{other}");
        }
    }

    #[test]
    fn a_patch_stays_inside_the_tree() {
        assert!(files_of("--- a/../x\n+++ b/../x\n").is_err());
        assert!(files_of("--- x\n+++ x\n").is_err());
    }
}
