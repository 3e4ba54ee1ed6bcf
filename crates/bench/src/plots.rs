//! Pictures of a report, as SVG.

use crate::census::Census;
use crate::measure::Report;
use crate::samples::Samples;
use plotters::coord::CoordTranslate;
use plotters::prelude::*;
use std::error::Error;
use std::fs;
use std::path::Path;

const SIZE: (u32, u32) = (860, 480);
const COLORS: [RGBColor; 5] = [
    RGBColor(0x1f, 0x6f, 0xb2),
    RGBColor(0xd9, 0x5f, 0x02),
    RGBColor(0x1b, 0x9e, 0x77),
    RGBColor(0x75, 0x70, 0xb3),
    RGBColor(0x66, 0x66, 0x66),
];

type Drawn = Result<(), Box<dyn Error>>;

/// Draws what there is into a folder, which is made if it is missing.
///
/// # Errors
/// If a file cannot be written.
pub fn draw(folder: &Path, report: &Report, census: Option<&Census>) -> Drawn {
    fs::create_dir_all(folder)?;
    latency(&folder.join("latency.svg"), report)?;
    branches(&folder.join("branches.svg"), report)?;
    if let Some(held) = &report.held {
        let moments = [
            ("parked", Some(held.parked)),
            ("after print(1+1)", Some(held.after_print)),
            ("after numpy", held.after_numpy),
        ];
        let bars = moments.into_iter().filter_map(|(name, cost)| {
            let cost = cost?;
            Some((name.to_owned(), vec![cost.user_kib, cost.kernel_kib]))
        });
        let title = format!("Memory of a sandbox, {} held at once (KiB)", held.count);
        let parts = ["its pages", "page tables and kernel objects"];
        stacked(
            &folder.join("memory.svg"),
            &title,
            &parts,
            &bars.collect::<Vec<_>>(),
        )?;
    }
    if let Some(census) = census {
        let owners = census.by_owner();
        let bars: Vec<_> = owners
            .iter()
            .filter(|(_, share)| share.private_pages > 0)
            .map(|(owner, share)| (owner.clone(), vec![share.private_pages as f64]))
            .collect();
        let title = "Pages that a run of print(1+1) makes its own, by owner";
        stacked(&folder.join("pages.svg"), title, &["pages"], &bars)?;
    }
    Ok(())
}

/// What share of the runs has ended by when.
fn latency(path: &Path, report: &Report) -> Drawn {
    let mut lines: Vec<(&str, &Samples)> = vec![
        ("from the pool", &report.pooled.run),
        ("without it", &report.unpooled.run),
        ("many at once", &report.under_load.run),
    ];
    let python3 = report.baselines.python3.as_ref();
    lines.extend(python3.map(|samples| ("python3 -c", samples)));
    let title = "print(1+1), from request to exit status";
    shares(path, report, title, &lines)
}

/// The same of what is done to sandboxes that live.
fn branches(path: &Path, report: &Report) -> Drawn {
    let times = &report.branches;
    let lines: Vec<(&str, &Samples)> = vec![
        ("a sandbox made", &times.create),
        ("branched", &times.branch),
        ("taken back", &times.rollback),
        ("to disk", &times.to_disk),
        ("from disk", &times.from_disk),
    ];
    let title = "Sandboxes that live, from request to answer";
    shares(path, report, title, &lines)
}

/// Times of requests to an engine: what share has been answered by when.
///
/// # Errors
/// If the file cannot be written.
pub fn draw_load(folder: &Path, title: &str, lines: &[(&str, &Samples)]) -> Drawn {
    fs::create_dir_all(folder)?;
    curves(&folder.join("load.svg"), (1.0, "ms"), title, lines)
}

/// What share has ended by when; in a lab, times as multiples of python3's.
fn shares(path: &Path, report: &Report, title: &str, lines: &[(&str, &Samples)]) -> Drawn {
    let python3 = report.baselines.python3.as_ref();
    let scale = match (report.host.kind, python3) {
        ("lab", Some(python3)) if python3.p50_ms > 0.0 => 1.0 / python3.p50_ms,
        _ => 1.0,
    };
    let unit = if report.host.kind == "lab" {
        "multiples of python3's median, in an emulated host"
    } else {
        "ms"
    };
    curves(path, (scale, unit), title, lines)
}

fn curves(
    path: &Path,
    (scale, unit): (f64, &str),
    title: &str,
    lines: &[(&str, &Samples)],
) -> Drawn {
    let longest = lines.iter().map(|(_, samples)| samples.max_ms * scale);
    let longest = longest.fold(f64::MIN_POSITIVE, f64::max);
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..longest * 1.05, 0.0..1.0)?;
    chart
        .configure_mesh()
        .x_desc(unit)
        .y_desc("share of the runs")
        .draw()?;
    for ((name, samples), color) in lines.iter().zip(COLORS) {
        let count = samples.all_ms.len() as f64;
        let steps = samples.all_ms.iter().enumerate().flat_map(|(number, ms)| {
            let (before, after) = (number as f64 / count, (number + 1) as f64 / count);
            [(ms * scale, before), (ms * scale, after)]
        });
        chart
            .draw_series(LineSeries::new(steps, color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    legend(&mut chart)?;
    area.present()?;
    Ok(())
}

fn legend<'a, C: CoordTranslate>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, C>,
) -> Result<(), Box<dyn Error>> {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.9))
        .border_style(COLORS[4])
        .draw()?;
    Ok(())
}

/// Bars from left to right, each of parts one after the other.
fn stacked(path: &Path, title: &str, parts: &[&str], bars: &[(String, Vec<f64>)]) -> Drawn {
    let sums = bars.iter().map(|(_, parts)| parts.iter().sum());
    let longest = sums.fold(f64::MIN_POSITIVE, f64::max);
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let count = bars.len().max(1);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(36)
        .y_label_area_size(220)
        .build_cartesian_2d(0.0..longest * 1.1, (0..count).into_segmented())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(count)
        .y_label_formatter(&|place| match place {
            SegmentValue::CenterOf(index) => {
                // The first one above.
                let bar = bars.iter().rev().nth(*index);
                bar.map_or_else(String::new, |(name, _)| name.clone())
            }
            _ => String::new(),
        })
        .draw()?;
    for (part, color) in (0..parts.len()).zip(COLORS) {
        let rectangles = bars.iter().rev().enumerate().map(|(index, (_, values))| {
            let before: f64 = values[..part].iter().sum();
            let (from, to) = (SegmentValue::Exact(index), SegmentValue::Exact(index + 1));
            let mut bar = Rectangle::new(
                [(before, from), (before + values[part], to)],
                color.filled(),
            );
            bar.set_margin(4, 4, 0, 0);
            bar
        });
        let drawn = chart.draw_series(rectangles)?;
        if parts.len() > 1 {
            drawn.label(parts[part]).legend(move |(x, y)| {
                Rectangle::new([(x, y - 5), (x + 14, y + 5)], color.filled())
            });
        }
    }
    if parts.len() > 1 {
        legend(&mut chart)?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_drawn_with_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bars.svg");
        let bars = [
            ("slab".to_owned(), vec![12.0, 3.0]),
            ("agent".to_owned(), vec![4.0, 0.0]),
        ];
        stacked(&path, "Pages", &["one", "other"], &bars).unwrap();
        let svg = fs::read_to_string(path).unwrap();
        assert!(svg.starts_with("<svg"));
        for word in ["Pages", "slab", "agent", "other"] {
            assert!(svg.contains(word), "{word}");
        }
    }
}
