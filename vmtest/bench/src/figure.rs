// SPDX-License-Identifier: MIT OR Apache-2.0
//! A measured figure: samples in, one JSON line out.

use serde_json::json;

/// Samples of one quantity.
#[derive(Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a sample.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// What stands for the samples.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        at(&sorted, 0.5)
    }

    /// Prints the figure as one JSON object on one line: the median stands for it, the spread is the
    /// distance of the quartiles as a part of the median.
    pub fn emit(mut self, figure: &str, unit: &str) {
        self.0.sort_by(f64::total_cmp);
        let at = |part| at(&self.0, part);
        let median = at(0.5);
        let spread = if median == 0.0 {
            0.0
        } else {
            (at(0.75) - at(0.25)) / median
        };
        println!(
            "{}",
            json!({
                "figure": figure, "unit": unit, "value": median,
                "min": at(0.0), "max": at(1.0), "spread": spread, "samples": self.0.len(),
            })
        );
    }
}

/// The sample below which that part of the sorted ones lies.
fn at(sorted: &[f64], part: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * part).round() as usize]
}

/// Prints a figure that was taken once.
pub fn emit(figure: &str, unit: &str, value: f64) {
    let mut samples = Samples::default();
    samples.push(value);
    samples.emit(figure, unit);
}

/// Says on standard error what goes on.
#[macro_export]
macro_rules! progress {
    ($($arg:tt)*) => { eprintln!("bench: {}", format_args!($($arg)*)) };
}
