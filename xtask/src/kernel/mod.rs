//! `./x kernel`: the three kernels, each built from the same source and
//! configuration and kept in the cache under a key of all that went into it.
//!
//! ```text
//! CACHE/kernel/6.12.117-1_deb12u1/   one directory per version of Debian's source
//!     lock-FLAVOR                    held by whoever prepares or builds that flavor
//!     pristine/                      the source as packaged; what `stock` is built from
//!     patched/, patched-debug/, ...  with series and overlay, for `release` and `debug`:
//!                                    one each, so that a build holds nobody else up;
//!                                    patched-mutant/ has the mutations as well,
//!                                    patched-bare/ is built with the series' symbols off,
//!                                    patched-files/ with those of fork off
//!     out-FLAVOR/                    make's O= directory, kept for incremental builds
//!     images/FLAVOR-KEY/             bzImage, config: finished, never changed again
//!     build-FLAVOR.log               the last build's whole output
//! ```

mod build;
mod config;
mod source;

use crate::{paths, tools::Toolchain};
use anyhow::{bail, Context, Result};
use clap::{Subcommand, ValueEnum};
use sha2::{Digest, Sha256};
pub use source::series;
use source::Source;
use std::fs;
use std::path::{Path, PathBuf};

/// Which kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Flavor {
    /// With the series, configured as users would run it
    Release,
    /// With the series and the kernel's own checkers
    Debug,
    /// `release` without the series
    Stock,
    /// `release` with the series' symbols turned off, which is to do what `stock` does
    Bare,
    /// `release` without on-demand fork, for nothing of the rest may need it
    Files,
    /// `release` in which a boot parameter takes out one handling of a path
    Mutant,
}

/// What `mutant` has besides.
const MUTATIONS: &str = "vmtest/mutations/mutant.patch";

impl Flavor {
    /// Those that stand for themselves, cheapest source tree first.
    pub const ALL: [Flavor; 3] = [Flavor::Stock, Flavor::Release, Flavor::Debug];

    /// The name on the command line and in the cache.
    pub fn name(self) -> &'static str {
        match self {
            Flavor::Release => "release",
            Flavor::Debug => "debug",
            Flavor::Stock => "stock",
            Flavor::Bare => "bare",
            Flavor::Files => "files",
            Flavor::Mutant => "mutant",
        }
    }

    /// Whether the series and the overlay are in it.
    pub fn patched(self) -> bool {
        self.patched_tree().is_some()
    }

    /// The name of its source tree, when that is not the pristine one.
    fn patched_tree(self) -> Option<&'static str> {
        match self {
            Flavor::Release => Some("patched"),
            Flavor::Debug => Some("patched-debug"),
            Flavor::Bare => Some("patched-bare"),
            Flavor::Files => Some("patched-files"),
            Flavor::Mutant => Some("patched-mutant"),
            Flavor::Stock => None,
        }
    }

    /// The patch that comes after series and overlay.
    fn extra_patch(self) -> Option<&'static str> {
        (self == Flavor::Mutant).then_some(MUTATIONS)
    }

    /// Prepares its source tree. The caller holds its lock.
    fn prepare(self, source: &Source) -> Result<PathBuf> {
        source.prepare(self.patched_tree(), self.extra_patch())
    }

    fn lock(self, source: &Source) -> Result<impl Drop> {
        let file = source.dir.join(format!("lock-{}", self.name()));
        let what = format!("the build directory of the {} kernel", self.name());
        paths::lock(&file, &what)
    }

    /// The fragments in `kernel/configs` that make its configuration.
    fn fragments(self) -> &'static [&'static str] {
        match self {
            Flavor::Release => &["base.config", "ptshare.config"],
            Flavor::Debug => &[
                "base.config",
                "ptshare.config",
                "devices.config",
                "debug.config",
            ],
            Flavor::Stock => &["base.config", "stock.config"],
            Flavor::Bare => &["base.config", "bare.config"],
            Flavor::Files => &["base.config", "files.config"],
            Flavor::Mutant => &[
                "base.config",
                "ptshare.config",
                "devices.config",
                "mutant.config",
            ],
        }
    }

    /// Whether programs can ask it to share.
    pub fn shares(self) -> bool {
        !matches!(self, Flavor::Stock | Flavor::Bare)
    }
}

/// A finished kernel in the cache.
#[derive(Clone, Debug)]
pub struct Image {
    dir: PathBuf,
}

impl Image {
    /// The compressed kernel, for QEMU's `-kernel`.
    pub fn bz_image(&self) -> PathBuf {
        self.dir.join("bzImage")
    }

    /// Its complete configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config")
    }

    fn complete(&self) -> bool {
        // Images appear by rename, so the directory's presence means whole.
        self.bz_image().exists()
    }
}

/// Subcommands of `./x kernel`.
#[derive(Subcommand)]
pub enum Command {
    /// Build a kernel, or stock, release and debug; nothing when nothing changed
    Build {
        /// Only this one
        #[arg(long)]
        flavor: Option<Flavor>,
    },
    /// Print the path of the bzImage of the current inputs; builds nothing
    Path {
        /// Which kernel
        #[arg(long)]
        flavor: Flavor,
    },
    /// Print the path of the complete configuration; builds nothing
    Config {
        /// Which kernel
        #[arg(long)]
        flavor: Flavor,
    },
    /// Bring the prepared source tree up to date and print its path
    Source {
        /// Which kernel's tree
        #[arg(long)]
        flavor: Flavor,
    },
}

/// Runs a subcommand.
pub fn command(command: Command) -> Result<()> {
    match command {
        Command::Build { flavor } => {
            let flavors = flavor.map_or(Flavor::ALL.to_vec(), |f| vec![f]);
            for flavor in flavors {
                let image = ensure(flavor)?;
                println!("{}", image.bz_image().display());
            }
        }
        Command::Path { flavor } => println!("{}", path(flavor)?.bz_image().display()),
        Command::Config { flavor } => println!("{}", path(flavor)?.config().display()),
        Command::Source { flavor } => println!("{}", source_tree(flavor)?.display()),
    }
    Ok(())
}

/// Builds the kernel of `flavor` unless the cache has it, and returns it.
pub fn ensure(flavor: Flavor) -> Result<Image> {
    let source = Source::find()?;
    let tools = Toolchain::find()?;
    let image = image(flavor, &source, &tools)?;
    if image.complete() {
        return Ok(image);
    }
    source.announce();
    let _lock = flavor.lock(&source)?;
    let (image, tree) = loop {
        let image = self::image(flavor, &source, &tools)?;
        if image.complete() {
            return Ok(image);
        }
        let tree = flavor.prepare(&source)?;
        // The inputs may have changed while they were copied, and the image
        // must be what its key says.
        if self::image(flavor, &source, &tools)?.dir == image.dir {
            break (image, tree);
        }
    };
    build::build(flavor, &source, &tree, &tools, &image.dir)?;
    Ok(image)
}

/// The kernel of `flavor` if it was built from the current inputs.
pub fn path(flavor: Flavor) -> Result<Image> {
    let image = image(flavor, &Source::find()?, &Toolchain::find()?)?;
    if !image.complete() {
        bail!(
            "the {0} kernel is not built: ./x kernel build --flavor {0}",
            flavor.name()
        );
    }
    Ok(image)
}

/// Prepares the source tree of `flavor` and returns its path.
pub fn source_tree(flavor: Flavor) -> Result<PathBuf> {
    let source = Source::find()?;
    let _lock = flavor.lock(&source)?;
    flavor.prepare(&source)
}

/// Fails if the mutations do not go onto the series and the overlay.
pub fn check_mutations() -> Result<()> {
    Source::find()?.check(MUTATIONS)
}

fn image(flavor: Flavor, source: &Source, tools: &Toolchain) -> Result<Image> {
    let mut key = Sha256::new();
    let mut add = |name: &str, content: &[u8]| {
        key.update((name.len() as u64).to_le_bytes());
        key.update(name);
        key.update((content.len() as u64).to_le_bytes());
        key.update(content);
    };
    add("flavor", flavor.name().as_bytes());
    add("source", source.version.as_bytes());
    add("tools", tools.versions()?.as_bytes());
    for name in flavor.fragments() {
        add(name, config::fragment(name)?.as_bytes());
    }
    if flavor.patched() {
        for (name, path) in source::series()? {
            add(&name, &read(&path)?);
        }
        for (name, path) in source::overlay()? {
            add(&name.to_string_lossy(), &read(&path)?);
        }
    }
    if let Some(patch) = flavor.extra_patch() {
        add(patch, &read(&paths::in_root(patch))?);
    }
    let key: String = key.finalize()[..8]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    Ok(Image {
        dir: source
            .dir
            .join("images")
            .join(format!("{}-{key}", flavor.name())),
    })
}

/// Reads a file, naming it when that fails.
fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}
