// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page tables against the number of backends, one line for each kernel.

use super::report::Run;
use anyhow::{anyhow, Result};
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (800, 500);
const COLORS: [RGBColor; 2] = [RGBColor(200, 60, 40), RGBColor(30, 90, 180)];

/// Draws the picture.
pub fn draw(path: &Path, runs: &[Run]) -> Result<()> {
    plot(path, runs).map_err(|e| anyhow!("drawing {}: {e}", path.display()))
}

fn mib(kb: u64) -> f64 {
    kb as f64 / 1024.0
}

fn plot(path: &Path, runs: &[Run]) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let samples = || runs.iter().flat_map(|r| &r.samples);
    let most = samples().map(|s| s.backends).max().unwrap_or(1);
    let top = samples().map(|s| mib(s.page_tables_kb)).fold(1.0, f64::max) * 1.05;
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(
            "Page tables of PostgreSQL, emulated machine",
            ("sans-serif", 20),
        )
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0..most, 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("backends that have scanned the whole table")
        .y_desc("PageTables of /proc/meminfo [MiB]")
        .label_style(("sans-serif", 14))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    for (run, color) in runs.iter().zip(COLORS) {
        let mut points: Vec<(u32, f64)> = run
            .samples
            .iter()
            .map(|s| (s.backends, mib(s.page_tables_kb)))
            .collect();
        points.sort_by_key(|p| p.0);
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(run.title())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .label_font(("sans-serif", 14))
        .draw()?;
    area.present()?;
    Ok(())
}
