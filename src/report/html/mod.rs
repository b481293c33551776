//! `spectrum --report`: one self-contained page. No scripts, no network; light and dark; readable when printed.

mod charts;
mod data;

use super::spectrum::{number, optional, plural, range, roundings_remark, satisfied};
use crate::{error::Result, escape, spectrum::Spectrum};
use std::fmt::Write;

/// The page. `spectrum` must hold all singular values.
pub fn page(spectrum: &Spectrum) -> Result<String> {
    let mut body = String::new();
    body += &verdict(spectrum);
    body += &gates(spectrum);
    body += &cycles(spectrum)?;
    body += &histograms(spectrum)?;
    body += &scree(spectrum)?;
    body += &heat_maps(spectrum);
    body += &matrices(spectrum);
    body += &sources(spectrum);
    let title = format!("Spectrum of {}", labels(spectrum).join(", "));
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\
         <footer>relora-kit {version}</footer>\n</body>\n</html>\n",
        title = escape(&title),
        style = include_str!("style.css"),
        version = env!("CARGO_PKG_VERSION"),
    ))
}

fn labels(s: &Spectrum) -> Vec<String> {
    s.sources.iter().map(|s| s.label.clone()).collect()
}

/// Text for an element or a quoted attribute: the one way in which text comes into the page.
pub(super) fn escape(text: &str) -> String {
    let text = escape::line(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;").replace('\'', "&#39;")
}

fn verdict(s: &Spectrum) -> String {
    let failed = s.gates.iter().filter(|g| !g.passed).count();
    let (class, words) = match (s.gates.len(), failed) {
        (0, _) => ("plain", "No gate was given.".to_owned()),
        (n, 0) => ("yes", format!("{} held.", plural(n, "gate"))),
        (n, failed) => ("no", format!("{failed} of {} failed.", plural(n, "gate"))),
    };
    let total = s.totals().count();
    let skipped = match s.skipped.len() {
        0 => String::new(),
        n => format!("; {} not measured", plural(n, "tensor")),
    };
    format!(
        "<p class=\"verdict {class}\"><strong>{words}</strong> {} measured{skipped}.</p>\n",
        plural(total, "weight update")
    )
}

fn gates(s: &Spectrum) -> String {
    if s.gates.is_empty() {
        return String::new();
    }
    let mut rows = String::new();
    for g in &s.gates {
        let (class, words) = if g.passed { ("yes", "holds") } else { ("no", "fails") };
        let worst = g.offenders.first().filter(|_| !g.passed).map_or(String::new(), |o| {
            format!("{} has {} against {}", escape(&o.name), optional(o.value), number(o.limit))
        });
        let _ = writeln!(
            rows,
            "<tr><td><code>{}</code></td><td>{}</td><td>{}</td><td class=\"{class}\">{words}</td><td>{worst}</td></tr>",
            escape(&g.gate),
            escape(&g.label),
            satisfied(g)
        );
    }
    format!(
        "<section><h2>Gates</h2>\n<table><tr><th>gate</th><th>source</th><th>satisfied</th><th>verdict</th>\
         <th>worst</th></tr>\n{rows}</table></section>\n"
    )
}

fn figure(chart: &charts::Chart) -> String {
    format!("<figure role=\"img\" aria-label=\"{}\">{}</figure>\n", escape(&chart.alt), chart.svg)
}

fn section(title: &str, text: &str, legend: &[String], figures: &str) -> String {
    let mut keys = String::new();
    for (i, name) in legend.iter().enumerate() {
        let _ =
            write!(keys, "<span class=\"key\"><i style=\"background:{}\"></i>{}</span> ", charts::css(i), escape(name));
    }
    format!(
        "<section><h2>{title}</h2>\n<p>{text}</p>\n<p class=\"legend\">{keys}</p>\n<div class=\"grid\">\n{figures}</div></section>\n"
    )
}

fn cycles(s: &Spectrum) -> Result<String> {
    if s.cycles.is_empty() {
        return Ok(String::new());
    }
    let (mut figures, mut tables) = (String::new(), String::new());
    for label in labels(s) {
        let of_label: Vec<_> = s.cycles.iter().filter(|c| c.label == label).collect();
        if of_label.is_empty() {
            continue;
        }
        figures += &figure(&charts::growth(&label, &of_label)?);
        let mut rows = String::new();
        for c in of_label {
            let cells = [c.r, c.own_rank, c.sum_of_r, c.full_rank, c.rank_above_noise].map(range).join("</td><td>");
            let effective = c.effective_rank.map_or("null".into(), range);
            let _ = writeln!(rows, "<tr><td>{}</td><td>{cells}</td><td>{effective}</td></tr>", c.cycle);
        }
        let _ = write!(
            tables,
            "<table class=\"numbers\"><caption>{}: median (smallest to largest) over the matrices</caption>\n<tr><th>cycle</th>\
             <th>r</th><th>rank of the cycle</th><th>k·r</th><th>min(m, n)</th><th>rank of the sum</th>\
             <th>effective rank of the sum</th></tr>\n{rows}</table>\n",
            escape(&label)
        );
    }
    let legend =
        ["rank of the sum above rounding noise (band: smallest to largest)", "k·r", "min(m, n)"].map(String::from);
    let text = "Each cycle adds an update of rank r. If the cycles point in new directions, the rank of their sum grows \
                with k·r until it reaches min(m, n); if they repeat themselves, it stays behind.";
    Ok(section("Rank over cycles", text, &legend, &figures) + &tables)
}

fn histograms(s: &Spectrum) -> Result<String> {
    let series = data::Series::all(s);
    let mut figures = String::new();
    let (changed, unchanged) = data::changed_modules(s);
    for module in changed {
        figures += &figure(&charts::histogram(&module, &series)?);
    }
    let mut text =
        "How many singular values of the update fall where, over all layers; the count is on a logarithmic axis. \
                    An update of low rank has nearly all of them at zero."
            .to_owned();
    if !unchanged.is_empty() {
        text += &format!(" Not changed at all: {}.", unchanged.join(", "));
    }
    let legend: Vec<String> = series.iter().map(|s| s.name.clone()).collect();
    Ok(section("Singular values per module kind", &escape(&text), &legend, &figures))
}

fn scree(s: &Spectrum) -> Result<String> {
    let series = data::Series::all(s);
    let mut figures = String::new();
    for module in data::changed_modules(s).0 {
        figures += &figure(&charts::scree(&module, &series)?);
    }
    let text = "Singular values relative to the largest, in their order (median over the layers). The dashed line is the \
                noise edge: values below it may come from rounding alone.";
    let legend: Vec<String> = series.iter().map(|s| s.name.clone()).collect();
    Ok(section("Scree", text, &legend, &figures))
}

fn heat_maps(s: &Spectrum) -> String {
    let mut tables = String::new();
    for label in labels(s) {
        tables += &data::heat_map(s, &label);
    }
    format!(
        "<section><h2>Proportional effective rank</h2>\n<p>Effective rank as a share of min(m, n): 1 would be an update \
         whose singular values are all equal. Darker is higher.</p>\n{tables}</section>\n"
    )
}

fn matrices(s: &Spectrum) -> String {
    let mut rows = String::new();
    for m in s.totals() {
        let v = &m.measures;
        let _ = writeln!(
            rows,
            "<tr><td>{}</td><td>{}</td><td>{}×{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&m.name),
            escape(&m.label),
            m.shape[0],
            m.shape[1],
            number(v.spectral_norm),
            number(v.noise_edge),
            v.numerical_rank,
            v.rank_above_noise,
            optional(v.effective_rank),
            optional(v.stable_rank)
        );
    }
    format!(
        "<section><h2>Matrices</h2>\n<details><summary>{}</summary>\n<table class=\"numbers\"><tr><th>matrix</th><th>source</th>\
         <th>shape</th><th>s1</th><th>noise edge</th><th>numerical rank</th><th>rank above noise</th><th>effective rank</th>\
         <th>stable rank</th></tr>\n{rows}</table></details></section>\n",
        plural(s.totals().count(), "row")
    )
}

fn sources(s: &Spectrum) -> String {
    let mut rows = String::new();
    for source in &s.sources {
        let base = source.base.as_ref().map_or(String::new(), |b| format!(" minus {}", b.display()));
        let what = escape(&format!("{} ({}): {}{base}", source.label, source.kind, source.path.display()));
        let _ = writeln!(rows, "<tr><th colspan=\"2\">{what}</th></tr>");
        if let Some(remark) = roundings_remark(source) {
            let _ = writeln!(rows, "<tr><td colspan=\"2\">{}</td></tr>", escape(&remark));
        }
        for (file, hash) in &source.files {
            let _ = writeln!(rows, "<tr><td>{}</td><td><code>{}</code></td></tr>", escape(file), escape(hash));
        }
    }
    format!("<section><h2>Sources</h2>\n<table class=\"sources\">\n{rows}</table></section>\n")
}
