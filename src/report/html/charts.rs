//! The figures, as SVG that takes its ink and grid colours from the page.

use super::data::Series;
use crate::{
    error::{Error, Result},
    escape,
    spectrum::CycleSummary,
};
use plotters::{coord::ranged1d::Ranged, prelude::*};

/// A figure and what it shows, in words.
pub struct Chart {
    pub svg: String,
    pub alt: String,
}

// Stand-ins that `themed` replaces: text and axes take the page's colours.
const INK: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(4, 5, 6);

/// Paul Tol's bright scheme: told apart by the colour-blind, on white and on black.
const PALETTE: [RGBColor; 6] = [
    RGBColor(0x44, 0x77, 0xaa),
    RGBColor(0xee, 0x66, 0x77),
    RGBColor(0x22, 0x88, 0x33),
    RGBColor(0xcc, 0xbb, 0x44),
    RGBColor(0x66, 0xcc, 0xee),
    RGBColor(0xaa, 0x33, 0x77),
];

fn colour(i: usize) -> RGBColor {
    PALETTE[i % PALETTE.len()]
}

/// The colour of series `i` as CSS.
pub fn css(i: usize) -> String {
    let RGBColor(r, g, b) = colour(i);
    format!("#{r:02x}{g:02x}{b:02x}")
}

const SIZE: (u32, u32) = (400, 260);
const BINS: usize = 40;

/// Counts of singular values of one module kind, on a logarithmic axis, one outline per series.
pub fn histogram(module: &str, series: &[Series]) -> Result<Chart> {
    let values: Vec<Vec<f64>> = series.iter().map(|s| s.values(module)).collect();
    let largest = values.iter().flatten().copied().fold(0.0, f64::max);
    let width = if largest > 0.0 { largest * 1.000001 / BINS as f64 } else { 1.0 };
    let counts: Vec<Vec<f64>> = values.iter().map(|v| count(v, width)).collect();
    let top = counts.iter().flatten().copied().fold(1.0, f64::max) * 1.5;
    let svg = draw(|root| {
        let x = 0.0..width * BINS as f64;
        let mut chart = frame(root, module)?.build_cartesian_2d(x, (0.5..top).log_scale()).map_err(failed)?;
        mesh(&mut chart, "singular value", "count", &|x| short(*x), &|y| short(*y))?;
        for (i, counts) in counts.iter().enumerate() {
            let outline: Vec<(f64, f64)> = (counts.iter().enumerate())
                .flat_map(|(b, &n)| [b, b + 1].map(|edge| (edge as f64 * width, n.max(0.5))))
                .collect();
            let area = AreaSeries::new(outline, 0.5, colour(i).mix(0.15)).border_style(colour(i).stroke_width(2));
            chart.draw_series(area).map_err(failed)?;
        }
        Ok(())
    })?;
    Ok(Chart { svg, alt: format!("Histogram of the singular values of {module}, largest {largest:.3e}") })
}

fn count(values: &[f64], width: f64) -> Vec<f64> {
    let mut counts = vec![0.0; BINS];
    for v in values {
        counts[((v / width) as usize).min(BINS - 1)] += 1.0;
    }
    counts
}

/// Below this share of the largest value nothing is drawn.
const SMALLEST: f64 = 1e-6;

/// Relative singular values in their order, one line per series, and the noise edge.
pub fn scree(module: &str, series: &[Series]) -> Result<Chart> {
    let profiles: Vec<_> = series.iter().map(|s| s.profile(module, 120)).collect();
    let svg = draw(|root| {
        let y = (SMALLEST..1.2).log_scale();
        let mut chart = frame(root, module)?.build_cartesian_2d(0.0..1.0, y).map_err(failed)?;
        mesh(&mut chart, "place among min(m, n)", "relative to the largest", &|x| short(*x), &|y| format!("{y:.0e}"))?;
        for (i, (curve, edge)) in profiles.iter().enumerate() {
            let line = curve.iter().map(|&(x, y)| (x, y.max(SMALLEST)));
            chart.draw_series(LineSeries::new(line, colour(i).stroke_width(2))).map_err(failed)?;
            if *edge > SMALLEST && *edge < 1.0 {
                let dashes = DashedLineSeries::new([(0.0, *edge), (1.0, *edge)], 5, 4, colour(i).stroke_width(1));
                chart.draw_series(dashes).map_err(failed)?;
            }
        }
        Ok(())
    })?;
    Ok(Chart { svg, alt: format!("Relative singular values of {module} in falling order") })
}

/// Rank of the sum over the cycles against k*r and min(m, n).
pub fn growth(label: &str, cycles: &[&CycleSummary]) -> Result<Chart> {
    let last = cycles.last().map_or(1.0, |c| c.cycle as f64);
    let top = cycles.iter().map(|c| c.full_rank.max.min(2.0 * c.sum_of_r.max).max(c.rank_above_noise.max));
    let top = top.fold(1.0, f64::max) * 1.08;
    let line = |of: &dyn Fn(&CycleSummary) -> f64| -> Vec<(f64, f64)> {
        std::iter::once((0.0, 0.0)).chain(cycles.iter().map(|c| (c.cycle as f64, of(c)))).collect()
    };
    let svg = draw(|root| {
        let mut chart = frame(root, label)?.build_cartesian_2d(0.0..last, 0.0..top).map_err(failed)?;
        mesh(&mut chart, "cycles", "rank", &|x| short(*x), &|y| short(*y))?;
        let mut band = line(&|c| c.rank_above_noise.max);
        band.extend(line(&|c| c.rank_above_noise.min).into_iter().rev());
        chart.draw_series([Polygon::new(band, colour(0).mix(0.2))]).map_err(failed)?;
        let full: Vec<_> = line(&|c| c.full_rank.median).into_iter().skip(1).filter(|p| p.1 <= top).collect();
        chart.draw_series(LineSeries::new(full, colour(2).stroke_width(1))).map_err(failed)?;
        let rank = line(&|c| c.rank_above_noise.median);
        chart.draw_series(LineSeries::new(rank.clone(), colour(0).stroke_width(3))).map_err(failed)?;
        // Over the rank: where every cycle adds its full r the two coincide.
        let bound = line(&|c| c.sum_of_r.median.min(top));
        chart.draw_series(DashedLineSeries::new(bound, 6, 4, colour(1).stroke_width(2))).map_err(failed)?;
        let dots = rank.into_iter().map(|p| Circle::new(p, 3, colour(0).filled()));
        chart.draw_series(dots).map_err(failed)?;
        Ok(())
    })?;
    let end = cycles.last().map_or(0.0, |c| c.rank_above_noise.median);
    Ok(Chart { svg, alt: format!("Rank of the sum of the cycles of {label}: {end} after {last} cycles") })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(figure: impl FnOnce(&Area) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        figure(&root)?;
        root.present().map_err(failed)?;
    }
    Ok(themed(&svg))
}

fn frame<'a, 'b>(root: &'a Area<'b>, title: &str) -> Result<ChartBuilder<'a, 'b, SVGBackend<'b>>> {
    let mut builder = ChartBuilder::on(root);
    builder
        .margin(8)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .caption(escape::line(title), ("sans-serif", 17, &INK));
    Ok(builder)
}

type Plane<'a, 'b, X, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>;

fn mesh<X, Y>(
    chart: &mut Plane<X, Y>,
    x: &str,
    y: &str,
    x_label: &dyn Fn(&f64) -> String,
    y_label: &dyn Fn(&f64) -> String,
) -> Result<()>
where
    X: Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .x_labels(5)
        .y_labels(6)
        .max_light_lines(0)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(("sans-serif", 13, &INK))
        .x_desc(x)
        .y_desc(y)
        .x_label_formatter(&|v| x_label(v))
        .y_label_formatter(&|v| y_label(v))
        .draw()
        .map_err(failed)
}

fn short(x: f64) -> String {
    if x == 0.0 || (x.abs() >= 0.01 && x.abs() < 1e5) {
        format!("{}", (x * 1000.0).round() / 1000.0)
    } else {
        format!("{x:.0e}")
    }
}

/// Lets text and axes follow the page, and the figure its column.
fn themed(svg: &str) -> String {
    let hex = |RGBColor(r, g, b): RGBColor| format!("\"#{r:02X}{g:02X}{b:02X}\"");
    svg.replace(&hex(INK), "\"currentColor\"").replace(&hex(GRID), "\"var(--grid)\"").replacen(
        &format!("width=\"{}\" height=\"{}\" ", SIZE.0, SIZE.1),
        "",
        1,
    )
}

fn failed(e: impl std::fmt::Display) -> Error {
    Error::environment(format!("cannot draw a figure: {e}"))
}
