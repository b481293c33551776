//! Training, tokenizing and evaluation as tables.

use super::{Report, table::Table};
use crate::{
    tokenize,
    train::{evaluate::Evaluation, session::Summary},
};
use std::time::Duration;

fn facts(title: &str, rows: Vec<(&str, String)>) -> Vec<Table> {
    let mut table = Table::new(title, &["", ""]);
    rows.into_iter().for_each(|(name, value)| table.row(vec![name.to_owned(), value]));
    vec![table]
}

impl Report for Summary {
    fn tables(&self) -> Vec<Table> {
        let mut rows = vec![
            ("updates", self.steps.to_string()),
            ("cycles merged", self.cycles.to_string()),
            ("tokens", self.tokens.to_string()),
            ("training loss (last tenth)", format!("{:.4}", self.loss)),
        ];
        if let Some(e) = &self.evaluation {
            rows.push(("validation loss", format!("{:.4}", e.loss)));
            rows.push(("validation perplexity", format!("{:.3}", e.perplexity)));
        }
        if self.skipped > 0 {
            rows.push(("updates skipped (not finite)", self.skipped.to_string()));
        }
        rows.push(("tokens/s", format!("{:.0}", self.tokens_per_s)));
        rows.push(("time", indicatif::HumanDuration(Duration::from_secs_f64(self.seconds)).to_string()));
        rows.push(("final checkpoint", self.checkpoint.display().to_string()));
        facts(&format!("run {}", self.run.display()), rows)
    }
}

impl Report for tokenize::Summary {
    fn tables(&self) -> Vec<Table> {
        let rows = vec![
            ("documents", self.documents.to_string()),
            ("tokens", self.tokens.to_string()),
            ("tokenizer", self.tokenizer.to_owned()),
            ("vocab_size", self.vocab_size.to_string()),
            ("skipped (empty or not UTF-8)", self.skipped.to_string()),
        ];
        facts(&format!("{}", self.output.display()), rows)
    }
}

impl Report for Evaluation {
    fn tables(&self) -> Vec<Table> {
        let mut table = Table::new("", &["loss", "perplexity", "predictions"]);
        table.row(vec![format!("{:.6}", self.loss), format!("{:.4}", self.perplexity), self.predictions.to_string()]);
        vec![table]
    }
}
