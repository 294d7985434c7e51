//! Configuration fragments, and the check that kconfig kept what they ask for.

use super::Flavor;
use crate::paths;
use anyhow::{bail, Context, Result};
use std::collections::BTreeMap;
use std::fs;

/// A fragment's text. Its comments are part of nothing: they are left out, so
/// that rewording one rebuilds nothing.
pub fn fragment(name: &str) -> Result<String> {
    let path = paths::in_root("kernel/configs").join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut kept = String::new();
    for line in text.lines().map(str::trim_end) {
        match parse(line) {
            Some(_) => {
                kept.push_str(line);
                kept.push('\n');
            }
            None if line.is_empty() || line.starts_with('#') => {}
            None => bail!("{}: not a config line: {line}", path.display()),
        }
    }
    Ok(kept)
}

/// The fragments of `flavor`, joined.
pub fn requested(flavor: Flavor) -> Result<String> {
    flavor.fragments().iter().map(|f| fragment(f)).collect()
}

/// One line of a configuration: the symbol and its value, "n" when not set.
fn parse(line: &str) -> Option<(&str, &str)> {
    if let Some(symbol) = line
        .strip_prefix("# CONFIG_")
        .and_then(|l| l.strip_suffix(" is not set"))
    {
        return Some((symbol, "n"));
    }
    line.strip_prefix("CONFIG_")?.split_once('=')
}

/// Fails, naming them all, when `config` lacks symbols that `requested` asks
/// for. A later line of `requested` overrides an earlier one, as in kconfig.
pub fn verify(requested: &str, config: &str) -> Result<()> {
    let have: BTreeMap<_, _> = config.lines().filter_map(parse).collect();
    let want: BTreeMap<_, _> = requested.lines().filter_map(parse).collect();
    let lost: Vec<String> = want
        .iter()
        .filter_map(|(symbol, value)| {
            // A symbol whose dependencies are not met is not written at all.
            let got = have.get(symbol).copied().unwrap_or("n");
            (got != *value).then(|| format!("  CONFIG_{symbol}: asked for {value}, got {got}"))
        })
        .collect();
    if !lost.is_empty() {
        bail!(
            "kconfig did not keep what kernel/configs asks for:\n{}",
            lost.join("\n")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_loss_is_named() {
        let requested = "CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_D=16\nCONFIG_E=y\n";
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_D=8\n";
        let error = verify(requested, config).unwrap_err().to_string();
        for symbol in ["CONFIG_B", "CONFIG_C", "CONFIG_D", "CONFIG_E"] {
            assert!(error.contains(symbol), "{symbol} not in: {error}");
        }
        assert!(!error.contains("CONFIG_A"));
    }

    #[test]
    fn what_is_kept_passes() {
        verify(
            "CONFIG_A=y\n# CONFIG_C is not set\nCONFIG_S=\"x\"\n",
            "CONFIG_S=\"x\"\nCONFIG_A=y\n",
        )
        .unwrap();
    }

    #[test]
    fn the_last_request_counts() {
        verify("CONFIG_A=y\nCONFIG_A=n\n", "# CONFIG_A is not set\n").unwrap();
        verify("# CONFIG_A is not set\nCONFIG_A=y\n", "CONFIG_A=y\n").unwrap();
    }
}
