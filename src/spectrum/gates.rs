//! Yes-or-no questions for CI: `METRIC OP VALUE [for all|any|median|P%] [on GLOB]`.
//!
//! `rank_above_noise > 2*r for 90% on *self_attn*` holds when at least 90% of the matrices whose names match the glob
//! have a `rank_above_noise` above twice the rank of the adapter they come from. A metric that is undefined for a
//! matrix (the ratios of a zero delta) never satisfies a comparison.

use super::measures::{METRICS, Measures, Metric};
use crate::error::{Error, Result};
use globset::{Glob, GlobMatcher};
use serde::{Deserialize, Serialize};

/// A parsed gate.
#[derive(Clone, Debug)]
pub struct Gate {
    /// As written.
    pub text: String,
    metric: &'static Metric,
    compare: Compare,
    value: Value,
    quantifier: Quantifier,
    on: Option<GlobMatcher>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Compare {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Equal,
    NotEqual,
}

const OPERATORS: [(&str, Compare); 6] = [
    ("<=", Compare::LessOrEqual),
    (">=", Compare::GreaterOrEqual),
    ("==", Compare::Equal),
    ("!=", Compare::NotEqual),
    ("<", Compare::Less),
    (">", Compare::Greater),
];

impl Compare {
    fn holds(self, a: f64, b: f64) -> bool {
        match self {
            Compare::Less => a < b,
            Compare::LessOrEqual => a <= b,
            Compare::Greater => a > b,
            Compare::GreaterOrEqual => a >= b,
            Compare::Equal => a == b,
            Compare::NotEqual => a != b,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Value {
    Number(f64),
    TimesRank(f64),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Quantifier {
    All,
    Any,
    Median,
    Percent(f64),
}

/// A weight that gates may ask about, before it is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub label: &'a str,
    pub name: &'a str,
    /// Whether it has an adapter's rank to compare with.
    pub ranked: bool,
}

/// One matrix as gates see it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Source.
    pub label: &'a str,
    /// Tensor.
    pub name: &'a str,
    /// Rank of the adapter, if the source has one.
    pub r: Option<usize>,
    /// What was measured.
    pub measures: &'a Measures,
}

/// A gate's verdict on one source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateResult {
    /// As written.
    pub gate: String,
    /// Source.
    pub label: String,
    /// The verdict.
    pub passed: bool,
    /// Matrices looked at.
    pub matrices: usize,
    /// How many of them satisfy the comparison.
    pub satisfied: usize,
    /// The matrices that miss it by most, worst first; at most [`MAX_OFFENDERS`].
    pub offenders: Vec<Offender>,
}

/// A matrix that does not satisfy a gate's comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Offender {
    /// Tensor.
    pub name: String,
    /// The metric; `None` where undefined.
    pub value: Option<f64>,
    /// What it was compared with.
    pub limit: f64,
}

/// How many offenders a result lists.
pub const MAX_OFFENDERS: usize = 10;

impl Gate {
    /// Parses a gate. An error points at the place with a caret.
    pub fn parse(text: &str) -> Result<Gate> {
        let mut cursor = Cursor { text, at: 0 };
        parse(&mut cursor).map_err(|expected| {
            let rest = text[cursor.at..].split_whitespace().next();
            let found = rest.map_or("the end".to_owned(), |word| format!("'{word}'"));
            let caret = " ".repeat(text[..cursor.at].chars().count());
            Error::request(format!("gate does not parse: expected {expected}, found {found}\n  {text}\n  {caret}^")).help(
                "METRIC OP VALUE [for all|any|median|P%] [on GLOB], for example 'rank_above_noise > 2*r for 90% on *self_attn*'",
            )
        })
    }

    /// Whether the value is a multiple of the adapter's rank.
    pub fn needs_rank(&self) -> bool {
        matches!(self.value, Value::TimesRank(_))
    }

    /// Whether the gate asks about this tensor.
    pub fn covers(&self, name: &str) -> bool {
        self.on.as_ref().is_none_or(|glob| glob.is_match(name))
    }

    /// The verdict on the candidates of one source (those it [covers](Gate::covers)).
    pub fn judge(&self, label: &str, candidates: &[Candidate]) -> Result<GateResult> {
        let mut margins = Vec::new();
        let mut offenders = Vec::new();
        for c in candidates.iter().filter(|c| self.covers(c.name)) {
            let limit = match (self.value, c.r) {
                (Value::Number(x), _) => x,
                (Value::TimesRank(k), Some(r)) => k * r as f64,
                (Value::TimesRank(_), None) => return Err(self.no_rank(label)),
            };
            let value = c.measures.get(self.metric);
            margins.push(value.map(|v| v - limit));
            if !value.is_some_and(|v| self.compare.holds(v, limit)) {
                offenders.push(Offender { name: c.name.to_owned(), value, limit });
            }
        }
        let (matrices, satisfied) = (margins.len(), margins.len() - offenders.len());
        let passed = match self.quantifier {
            _ if matrices == 0 => false,
            Quantifier::All => satisfied == matrices,
            Quantifier::Any => satisfied > 0,
            // Compared as integers would be: 90% of 10 is 9, without rounding trouble.
            Quantifier::Percent(p) => satisfied as f64 * 100.0 >= p * matrices as f64 * (1.0 - 1e-12),
            Quantifier::Median => median(margins).is_some_and(|m| self.compare.holds(m, 0.0)),
        };
        let miss = |o: &Offender| o.value.map_or(f64::INFINITY, |v| (v - o.limit).abs());
        offenders.sort_by(|a, b| miss(b).total_cmp(&miss(a)).then_with(|| a.name.cmp(&b.name)));
        offenders.truncate(MAX_OFFENDERS);
        Ok(GateResult { gate: self.text.clone(), label: label.to_owned(), passed, matrices, satisfied, offenders })
    }

    /// The error for a gate with `r` over a source without one.
    pub fn no_rank(&self, label: &str) -> Error {
        Error::request(format!(
            "gate '{}' compares with the adapter rank r, which source '{label}' has none of",
            self.text
        ))
        .help("pass --rank R, or compare with a number")
    }

    /// The error for a gate that asks about nothing.
    pub fn no_match(&self, label: &str) -> Error {
        Error::request(format!("gate '{}' matches no matrix of source '{label}'", self.text))
            .help("a gate over nothing would hold by accident; check its glob and --filter")
    }
}

/// The median; `None` for nothing, or where the middle is undefined (undefined values sort first).
fn median(mut values: Vec<Option<f64>>) -> Option<f64> {
    values.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    let n = values.len();
    if n == 0 { None } else { Some((values[(n - 1) / 2]? + values[n / 2]?) / 2.0) }
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        rest.trim_start()
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    /// A token that ends where `more` does.
    fn word(&mut self, more: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        &rest[..rest.find(|c| !more(c)).unwrap_or(rest.len())]
    }

    fn keyword(&mut self, keyword: &str) -> bool {
        let found = self.word(|c| !c.is_whitespace()) == keyword;
        if found {
            self.at += keyword.len();
        }
        found
    }

    fn number(&mut self) -> Option<f64> {
        let word = self.word(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-' | '_'));
        // `2r` and `1e-3`: the longest prefix that is a number.
        let end = (1..=word.len()).rev().find(|&end| word[..end].parse::<f64>().is_ok_and(f64::is_finite))?;
        self.at += end;
        word[..end].parse().ok()
    }
}

fn parse(c: &mut Cursor) -> std::result::Result<Gate, String> {
    let name = c.word(|c| c.is_alphanumeric() || c == '_');
    let metric = Metric::find(name).ok_or_else(|| {
        let names: Vec<&str> = METRICS.iter().map(|m| m.name).collect();
        format!("a metric ({})", names.join(", "))
    })?;
    c.at += name.len();
    let operator = OPERATORS.iter().find(|(sign, _)| c.take(sign));
    let compare = operator.map(|o| o.1).ok_or("one of <, <=, >, >=, ==, !=")?;
    let value = match c.number() {
        None if c.take("r") => Value::TimesRank(1.0),
        None => return Err("a number or a multiple of the adapter rank, such as 2*r".into()),
        Some(k) if c.take("*") => match c.take("r") {
            true => Value::TimesRank(k),
            false => return Err("'r' after '*'".into()),
        },
        Some(x) => Value::Number(x),
    };
    let mut quantifier = Quantifier::All;
    if c.keyword("for") {
        quantifier = parse_quantifier(c)?;
    }
    let mut on = None;
    if c.keyword("on") {
        let word = c.word(|c| !c.is_whitespace());
        let glob = Glob::new(word).map_err(|e| format!("a glob ({})", e.kind()))?;
        if word.is_empty() {
            return Err("a glob over tensor names".into());
        }
        on = Some(glob.compile_matcher());
        c.at += word.len();
    }
    match c.rest() {
        "" => Ok(Gate { text: c.text.trim().to_owned(), metric, compare, value, quantifier, on }),
        _ if on.is_some() => Err("the end".into()),
        _ if quantifier != Quantifier::All => Err("'on GLOB' or the end".into()),
        _ => Err("'for', 'on' or the end".into()),
    }
}

fn parse_quantifier(c: &mut Cursor) -> std::result::Result<Quantifier, String> {
    for (word, quantifier) in [("all", Quantifier::All), ("any", Quantifier::Any), ("median", Quantifier::Median)] {
        if c.keyword(word) {
            return Ok(quantifier);
        }
    }
    let before = c.at;
    match c.number() {
        Some(p) if (0.0..=100.0).contains(&p) && c.take("%") => Ok(Quantifier::Percent(p)),
        _ => {
            c.at = before;
            c.rest();
            Err("all, any, median or a percentage from 0% to 100%".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measures(rank: usize) -> Measures {
        Measures::new(&vec![1.0; rank], (rank, rank), 1e-6, 0.0)
    }

    fn verdict(gate: &str, ranks: &[usize]) -> GateResult {
        let all: Vec<Measures> = ranks.iter().map(|&r| measures(r)).collect();
        let names: Vec<String> = (0..ranks.len()).map(|i| format!("layers.{i}.q_proj.weight")).collect();
        let candidates: Vec<Candidate> = (all.iter().zip(&names))
            .map(|(measures, name)| Candidate { label: "x", name, r: Some(4), measures })
            .collect();
        Gate::parse(gate).unwrap().judge("x", &candidates).unwrap()
    }

    #[test]
    fn quantifiers_count_as_they_read() {
        assert!(verdict("numerical_rank > 2*r", &[9, 10]).passed);
        assert!(!verdict("numerical_rank > 2*r for all", &[8, 10]).passed);
        assert!(verdict("numerical_rank>2*r for any", &[8, 10]).passed);
        assert!(verdict("numerical_rank >= r for 90%", &[5, 5, 5, 5, 5, 5, 5, 5, 5, 1]).passed);
        assert!(!verdict("numerical_rank >= r for 90.1%", &[5, 5, 5, 5, 5, 5, 5, 5, 5, 1]).passed);
        assert!(verdict("numerical_rank >= 6 for median", &[1, 5, 7, 9]).passed);
        assert!(!verdict("numerical_rank > 6 for median", &[1, 5, 7, 9]).passed);
        assert!(verdict("numerical_rank == 7 on *.1.*", &[1, 7]).passed);
        assert!(verdict("numerical_rank != 7 for all on *.0.*", &[1, 7]).passed);
    }

    #[test]
    fn the_worst_offenders_come_first() {
        let result = verdict("numerical_rank > 8", &[7, 9, 0, 3]);
        let worst: Vec<_> = result.offenders.iter().map(|o| (o.name.as_str(), o.value, o.limit)).collect();
        assert_eq!(worst[0], ("layers.2.q_proj.weight", Some(0.0), 8.0));
        assert_eq!((worst.len(), result.satisfied, result.matrices), (3, 1, 4));
    }

    #[test]
    fn undefined_metrics_and_empty_selections_fail() {
        assert!(!verdict("effective_rank >= 0", &[0]).passed);
        assert!(!verdict("effective_rank >= 0 for median", &[0, 0, 3]).passed);
        assert!(!verdict("numerical_rank >= 0 on nothing*", &[3]).passed);
    }

    #[test]
    fn the_caret_shows_where_a_gate_does_not_parse() {
        for (text, column, expected) in [
            ("rank > 3", 0, "a metric (spectral_norm"),
            ("numerical_rank about 3", 15, "one of <"),
            ("numerical_rank > many", 17, "a number"),
            ("numerical_rank > 2*q", 19, "'r' after '*'"),
            ("numerical_rank > 2 for most", 23, "all, any, median"),
            ("numerical_rank > 2 for 101%", 23, "all, any"),
            ("numerical_rank > 2 on", 21, "a glob over tensor names"),
            ("numerical_rank > 2 on a[", 22, "a glob"),
            ("numerical_rank > 2 on a b", 24, "the end"),
            ("numerical_rank > 2 always", 19, "'for', 'on' or the end"),
            ("", 0, "a metric"),
        ] {
            let message = Gate::parse(text).unwrap_err().message;
            assert!(message.contains(&format!("expected {expected}")), "{text}: {message}");
            let caret = message.lines().last().unwrap();
            assert_eq!(caret.find('^'), Some(column + 2), "{message}");
        }
    }

    #[test]
    fn a_rank_multiple_without_a_rank_is_refused() {
        let m = measures(3);
        let candidates = [Candidate { label: "x", name: "w", r: None, measures: &m }];
        let error = Gate::parse("numerical_rank > r").unwrap().judge("x", &candidates).unwrap_err();
        assert!(error.help.unwrap().contains("--rank"));
    }
}
