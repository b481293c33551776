//! Yes-or-no questions for CI: `METRIC OP VALUE [for all|any|median|P%] [on GLOB]`.
//!
//! `rank_above_noise > 2*r for 90% on *self_attn*` holds when at least 90% of the matrices whose names match the glob
//! have a `rank_above_noise` above twice the rank of the adapter they come from. A metric that is undefined for a
//! matrix (the ratios of a zero delta) never satisfies a comparison, and neither does a weight that was not measured.

use super::{
    Reason, Skipped,
    measures::{METRICS, Measures, Metric},
};
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

/// One matrix as gates see it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
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
    /// Matrices that the gate is about, measured or not.
    pub matrices: usize,
    /// How many of them satisfy the comparison.
    pub satisfied: usize,
    /// How many of them were not measured, which never satisfies it.
    #[serde(default)]
    pub not_measured: usize,
    /// The first of these, by name; at most [`MAX_OFFENDERS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_measured_names: Vec<String>,
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
            Error::request(format!("gate does not parse: expected {expected}, found {found}")).help(format!(
                "at the caret of\n  {text}\n  {caret}^\nthe form is METRIC OP VALUE [for all|any|median|P%] [on GLOB], for example 'rank_above_noise > 2*r for 90% on *self_attn*'"
            ))
        })
    }

    /// Whether the value is a multiple of the adapter's rank.
    pub fn needs_rank(&self) -> bool {
        matches!(self.value, Value::TimesRank(_))
    }

    /// Whether the verdict depends on the noise edge.
    pub fn needs_noise_edge(&self) -> bool {
        ["noise_edge", "rank_above_noise"].contains(&self.metric.name)
    }

    /// Whether the gate is about this tensor, which was not measured. What an adapter stores in full has no rank `r` that it
    /// could be compared with.
    pub(super) fn names(&self, skipped: &Skipped) -> bool {
        let comparable = !(self.needs_rank() && skipped.reason == Reason::NotLowRank);
        skipped.weight && comparable && self.covers(&skipped.name)
    }

    /// Whether the gate is about this tensor.
    pub fn covers(&self, name: &str) -> bool {
        self.on.as_ref().is_none_or(|glob| glob.is_match(name))
    }

    /// The verdict on the candidates of one source (those it [covers](Gate::covers)), of which `unmeasured` more exist.
    pub fn judge(&self, label: &str, candidates: &[Candidate], unmeasured: &[&str]) -> Result<GateResult> {
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
        let satisfied = margins.len() - offenders.len();
        let matrices = margins.len() + unmeasured.len();
        margins.extend(unmeasured.iter().map(|_| None));
        let passed = match self.quantifier {
            _ if matrices == 0 => false,
            Quantifier::All => satisfied == matrices,
            Quantifier::Any => satisfied > 0,
            // Compared as integers would be: 90% of 10 is 9, without rounding trouble.
            Quantifier::Percent(p) => satisfied as f64 * 100.0 >= p * matrices as f64 * (1.0 - 1e-12),
            // Whatever the undefined values are: as if they were all very small, and as if they were all very large.
            Quantifier::Median => [f64::NEG_INFINITY, f64::INFINITY]
                .into_iter()
                .all(|undefined| self.compare.holds(median(&margins, undefined), 0.0)),
        };
        let miss = |o: &Offender| o.value.map_or(f64::INFINITY, |v| (v - o.limit).abs());
        offenders.sort_by(|a, b| miss(b).total_cmp(&miss(a)).then_with(|| a.name.cmp(&b.name)));
        offenders.truncate(MAX_OFFENDERS);
        let names = unmeasured.iter().take(MAX_OFFENDERS);
        Ok(GateResult {
            gate: self.text.clone(),
            label: label.to_owned(),
            passed,
            matrices,
            satisfied,
            not_measured: unmeasured.len(),
            not_measured_names: names.map(|name| (*name).to_owned()).collect(),
            offenders,
        })
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
            .help("check its glob, which matches whole tensor names, and --filter")
    }
}

/// The median, with `undefined` in the place of undefined values. There is at least one value.
fn median(values: &[Option<f64>], undefined: f64) -> f64 {
    let mut values: Vec<f64> = values.iter().map(|value| value.unwrap_or(undefined)).collect();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
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
        // 0% would hold whatever the matrices are.
        Some(p) if p > 0.0 && p <= 100.0 && c.take("%") => Ok(Quantifier::Percent(p)),
        _ => {
            c.at = before;
            c.rest();
            Err("all, any, median or a percentage above 0% and up to 100%".into())
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
        let candidates: Vec<Candidate> =
            (all.iter().zip(&names)).map(|(measures, name)| Candidate { name, r: Some(4), measures }).collect();
        Gate::parse(gate).unwrap().judge("x", &candidates, &[]).unwrap()
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
    fn what_was_not_measured_satisfies_no_gate() {
        let m = measures(9);
        let candidates: Vec<Candidate> = (0..9).map(|_| Candidate { name: "w", r: Some(4), measures: &m }).collect();
        let judge = |gate: &str, unmeasured: &[&str]| Gate::parse(gate).unwrap().judge("x", &candidates, unmeasured);
        for (gate, one_is_enough) in [
            ("numerical_rank > 8", true),
            ("numerical_rank > 8 for 95%", true),
            ("numerical_rank > 8 for 90%", false),
            ("numerical_rank > 8 for any", false),
            ("numerical_rank < 10", true),
        ] {
            assert!(judge(gate, &[]).unwrap().passed, "{gate}");
            let result = judge(gate, &["a"]).unwrap();
            assert_eq!((result.passed, result.matrices, result.not_measured), (!one_is_enough, 10, 1), "{gate}");
        }
        // Half of the values are unknown: so is the median, in both directions.
        let many = ["a"; 9];
        for gate in
            ["numerical_rank > 8 for median", "numerical_rank < 10 for median", "numerical_rank == 9 for median"]
        {
            assert!(judge(gate, &many[..8]).unwrap().passed && !judge(gate, &many).unwrap().passed, "{gate}");
        }
        assert!(!judge("numerical_rank > 8 for any on other*", &["a"]).unwrap().passed);
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
            ("numerical_rank > 2 for 0%", 23, "all, any"),
            ("numerical_rank > 2 on", 21, "a glob over tensor names"),
            ("numerical_rank > 2 on a[", 22, "a glob"),
            ("numerical_rank > 2 on a b", 24, "the end"),
            ("numerical_rank > 2 always", 19, "'for', 'on' or the end"),
            ("", 0, "a metric"),
        ] {
            let Error { message, help, .. } = Gate::parse(text).unwrap_err();
            let help = help.unwrap();
            assert!(message.contains(&format!("expected {expected}")), "{text}: {message}");
            let caret = help.lines().nth(2).unwrap();
            assert_eq!(caret.find('^'), Some(column + 2), "{help}");
        }
    }

    #[test]
    fn a_rank_multiple_without_a_rank_is_refused() {
        let m = measures(3);
        let candidates = [Candidate { name: "w", r: None, measures: &m }];
        let error = Gate::parse("numerical_rank > r").unwrap().judge("x", &candidates, &[]).unwrap_err();
        assert!(error.help.unwrap().contains("--rank"));
    }
}
