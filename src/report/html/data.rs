//! What the figures show, drawn from a spectrum: series of singular values, and the heat map as a table.

use super::escape;
use crate::spectrum::{Matrix, Spectrum};
use std::fmt::Write;

/// Matrices that share a colour.
pub struct Series<'a> {
    /// In the legend.
    pub name: String,
    matrices: Vec<&'a Matrix>,
}

impl<'a> Series<'a> {
    /// One series per source; for runs, the last cycle alone beside the sum of all.
    pub fn all(s: &'a Spectrum) -> Vec<Series<'a>> {
        let mut all = Vec::new();
        for source in &s.sources {
            let label = &source.label;
            let totals = s.totals().filter(|m| m.label == *label).collect();
            let Some(cycles) = source.cycles else {
                all.push(Series { name: label.clone(), matrices: totals });
                continue;
            };
            all.push(Series { name: format!("{label}: sum of {cycles} cycles"), matrices: totals });
            let last = s.matrices.iter().filter(|m| m.label == *label && m.cycle == Some(cycles));
            let alone = last.filter(|m| m.cumulative == Some(false)).collect();
            all.push(Series { name: format!("{label}: cycle {cycles} alone"), matrices: alone });
        }
        all
    }

    /// All singular values of one module kind.
    pub fn values(&self, module: &str) -> Vec<f64> {
        self.of(module).filter_map(|m| m.sigma.as_ref()).flatten().copied().collect()
    }

    /// `s_i / s_1` at up to `points` places between 0 and 1, the median over the matrices of one kind; and the median
    /// noise edge relative to `s_1`.
    pub fn profile(&self, module: &str, points: usize) -> (Vec<(f64, f64)>, f64) {
        let sigmas: Vec<&Vec<f64>> =
            self.of(module).filter_map(|m| m.sigma.as_ref()).filter(|s| s.first().is_some_and(|s| *s > 0.0)).collect();
        let longest = sigmas.iter().map(|s| s.len()).max().unwrap_or(0);
        let count = points.min(longest);
        let at = |x: f64| {
            let place = |s: &Vec<f64>| s[((s.len() - 1) as f64 * x).round() as usize] / s[0];
            median(sigmas.iter().map(|s| place(s)).collect())
        };
        let curve = (0..count).map(|i| i as f64 / (count.max(2) - 1) as f64).map(|x| (x, at(x))).collect();
        let edges = self.of(module).filter(|m| m.measures.spectral_norm > 0.0);
        (curve, median(edges.map(|m| m.measures.noise_edge / m.measures.spectral_norm).collect()))
    }

    fn of(&self, module: &str) -> impl Iterator<Item = &&'a Matrix> {
        self.matrices.iter().filter(move |m| m.module == module)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Module kinds in the order of their first matrices.
pub fn modules(s: &Spectrum) -> Vec<String> {
    let mut kinds: Vec<String> = Vec::new();
    for m in s.totals() {
        if !kinds.contains(&m.module) {
            kinds.push(m.module.clone());
        }
    }
    kinds
}

/// Module kinds with a change to draw, and those without any.
pub fn changed_modules(s: &Spectrum) -> (Vec<String>, Vec<String>) {
    let changed = |kind: &String| s.totals().any(|m| m.module == *kind && m.measures.spectral_norm > 0.0);
    modules(s).into_iter().partition(changed)
}

/// Layers down, module kinds across. Every cell says its number, so the colour is not needed to read it.
pub fn heat_map(s: &Spectrum, label: &str) -> String {
    let of_label: Vec<&Matrix> = s.totals().filter(|m| m.label == label).collect();
    let kinds: Vec<String> =
        modules(s).into_iter().filter(|k| of_label.iter().any(|m| m.module == *k && m.layer.is_some())).collect();
    let mut layers: Vec<usize> = of_label.iter().filter_map(|m| m.layer).collect();
    layers.sort_unstable();
    layers.dedup();
    if layers.is_empty() {
        return String::new();
    }
    let mut out = format!("<table class=\"heat\"><caption>{}</caption>\n<tr><th>layer</th>", escape(label));
    kinds.iter().for_each(|k| out += &format!("<th>{}</th>", escape(k)));
    out += "</tr>\n";
    for layer in layers {
        let _ = write!(out, "<tr><th>{layer}</th>");
        for kind in &kinds {
            let values: Vec<f64> = of_label
                .iter()
                .filter(|m| m.layer == Some(layer) && m.module == *kind)
                .filter_map(|m| m.measures.proportional_effective_rank)
                .collect();
            if values.is_empty() {
                out += "<td></td>";
            } else {
                let share = values.iter().sum::<f64>() / values.len() as f64;
                let _ = write!(out, "<td style=\"--share:{:.0}%\">{share:.3}</td>", 100.0 * share.clamp(0.0, 1.0));
            }
        }
        out += "</tr>\n";
    }
    out + "</table>\n"
}
