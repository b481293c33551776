//! Text from a model: a prompt, and what the model makes of it.

use crate::{
    error::{Error, Result},
    model::Model,
    ops::Device,
    tokenize::Tokenizer,
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use serde::Serialize;

/// How the next token is chosen.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens to add at most.
    pub max_new_tokens: usize,
    /// Logits are divided by this; 0 takes the most likely token.
    pub temperature: f64,
    /// Only this many of the most likely tokens are candidates; 0 takes all.
    pub top_k: usize,
    /// Seed of the draw.
    pub seed: u64,
    /// Give the prompt the special tokens that the tokenizer puts around a text, such as `<s>`.
    pub special_tokens: bool,
}

/// Why it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// As many tokens as were asked for.
    Length,
    /// The model ended the document.
    EndOfDocument,
    /// The model's longest sequence.
    Context,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Generated {
    /// The text it began with.
    pub prompt: String,
    /// The same as ids, special tokens included.
    pub prompt_tokens: Vec<u32>,
    /// What the model added; bytes that are no UTF-8 are replaced.
    pub text: String,
    /// The same as ids.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Continues `prompt`; `each` sees every new piece of text as soon as it is complete.
pub fn generate<D: Device>(
    model: &Model<D>,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: &Options,
    each: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Generated> {
    let config = model.config();
    if config.vocab_size > tokenizer.vocab_size() && matches!(tokenizer, Tokenizer::Bytes) {
        return Err(Error::request(format!(
            "the model has a vocabulary of {} ids, the byte tokenizer one of {}",
            config.vocab_size,
            tokenizer.vocab_size()
        ))
        .help("put the model's tokenizer.json into its folder, or name it with --tokenizer"));
    }
    let ids = match options.special_tokens {
        true => tokenizer.encode_with_special_tokens(prompt)?,
        false => tokenizer.encode(prompt)?,
    };
    if ids.is_empty() || ids.len() >= config.max_position_embeddings {
        return Err(Error::request(format!(
            "the prompt has {} tokens, expected 1 to {} (max_position_embeddings - 1)",
            ids.len(),
            config.max_position_embeddings - 1
        )));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        return Err(Error::request(format!("the tokenizer makes id {id}, the model has {} ids", config.vocab_size))
            .help("the tokenizer belongs to another model"));
    }
    let mut decoder = model.decoder()?;
    let mut logits = Vec::new();
    for &id in &ids {
        logits = decoder.push(id)?;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let (mut tokens, mut text, mut stream) = (Vec::new(), String::new(), tokenizer.stream_after(&ids)?);
    let finish = loop {
        if tokens.len() == options.max_new_tokens {
            break Finish::Length;
        }
        let token = choose(&logits, options, &mut rng);
        if token == tokenizer.end_of_document() {
            tokens.push(token);
            break Finish::EndOfDocument;
        }
        tokens.push(token);
        let piece = stream.push(token)?;
        if !piece.is_empty() {
            each(&piece)?;
            text.push_str(&piece);
        }
        if decoder.len() == config.max_position_embeddings {
            break Finish::Context;
        }
        logits = decoder.push(token)?;
    };
    // What an incomplete character at the end is decoded to.
    let shown = tokens.strip_suffix(&[tokenizer.end_of_document()]).unwrap_or(&tokens);
    if let Some(rest) = tokenizer.decode_after(&ids, shown)?.strip_prefix(text.as_str()).filter(|rest| !rest.is_empty())
    {
        each(rest)?;
        text.push_str(rest);
    }
    Ok(Generated { prompt: prompt.to_owned(), prompt_tokens: ids, text, tokens, finish })
}

/// The most likely token, or one drawn from the `top_k` most likely with their probabilities.
fn choose(logits: &[f32], options: &Options, rng: &mut ChaCha8Rng) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // The first of equals wins, whatever the sort does with them.
    order.sort_unstable_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if options.temperature == 0.0 {
        return order[0] as u32;
    }
    if options.top_k > 0 {
        order.truncate(options.top_k);
    }
    let top = f64::from(logits[order[0]]);
    let weights: Vec<f64> = order.iter().map(|&i| ((f64::from(logits[i]) - top) / options.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut at = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
    for (i, w) in order.iter().zip(&weights) {
        at -= w;
        if at < 0.0 {
            return *i as u32;
        }
    }
    order[order.len() - 1] as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(temperature: f64, top_k: usize) -> Options {
        Options { max_new_tokens: 5, temperature, top_k, seed: 1, special_tokens: true }
    }

    #[test]
    fn draws_follow_the_probabilities_of_the_candidates() {
        let logits = [0.0, 3f32.ln(), 1f32.ln() - 50.0, 4f32.ln()];
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0; 4];
        for _ in 0..8000 {
            counts[choose(&logits, &options(1.0, 0), &mut rng) as usize] += 1;
        }
        // Shares 1/8, 3/8, 0, 4/8; standard deviations 30, 43, 45.
        assert!((counts[0] - 1000i32).abs() < 150 && (counts[1] - 3000).abs() < 215 && counts[2] == 0, "{counts:?}");
        let top_two: Vec<u32> = (0..100).map(|_| choose(&logits, &options(1.0, 2), &mut rng)).collect();
        assert!(top_two.iter().all(|t| [1, 3].contains(t)) && top_two.contains(&1));
        assert_eq!(choose(&logits, &options(0.0, 0), &mut rng), 3);
    }
}
