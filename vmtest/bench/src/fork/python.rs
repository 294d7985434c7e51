// SPDX-License-Identifier: MIT OR Apache-2.0
//! Python's multiprocessing over data that was loaded before the workers were forked.

use super::{own_program, sharing};
use crate::figure::Samples;
use anyhow::{ensure, Context, Result};
use serde_json::Value;

/// Prints the figures.
pub fn run(ask: bool) -> Result<()> {
    let output = sharing(ask, 8 * 50, || {
        let mut command = own_program(ask, "/usr/bin/python3");
        command.args(["-c", include_str!("../../clients/workers.py")]);
        command.output().context("python3")
    })?;
    ensure!(
        output.status.success(),
        "python3: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let results: Value = serde_json::from_slice(&output.stdout).context("what python3 said")?;
    for (name, figure) in [("fork", "python_fork"), ("whole", "python_whole")] {
        let values = results[name].as_array().context("no figures")?;
        let mut samples = Samples::default();
        for value in values {
            samples.push(value.as_f64().context("not a number")?);
        }
        // A nanosecond of the machine's clock is an instruction.
        samples.emit(figure, "instructions");
    }
    Ok(())
}
