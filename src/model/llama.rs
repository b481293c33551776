//! The whole model: embedding, blocks, final norm, head and loss; forward and then backward.
//!
//! The head and the loss work on a few rows at a time, forward and backward at once: the logits of a batch never exist
//! in full.

use super::{
    Model,
    block::{self, Block, Saved, Scratch, Shape},
    linear::{LinearScratch, Needs},
    params::Param,
};
use crate::{
    error::{Error, Result},
    ops::{Device, Dropout, IGNORE, Mat, MatMut},
};

/// Logits that exist at a time.
const LOGITS: usize = 1 << 23;

/// Is told which parameters, by their places, have complete gradients.
pub type Ready<'a, D> = dyn FnMut(&D, &mut [Param<D>], &[usize]) + 'a;

/// Rows of logits that exist at a time, for a batch of `rows`.
pub(super) fn logits_chunk(vocab: usize, rows: usize) -> usize {
    (LOGITS / vocab).clamp(32, rows.max(32)).min(rows)
}

/// All activations of one batch shape.
pub(super) struct Workspace<D: Device> {
    shape: Shape<D>,
    /// The residual stream before each block, and after the last: L + 1 of (N, C).
    residual: Vec<D::Buffer>,
    blocks: Vec<Block>,
    /// One per block, unless its buffers are in the pool; with activation checkpointing, one for all.
    saved: Vec<Option<Saved<D>>>,
    scratch: Scratch<D>,
    /// Of the norm before each block, and of the last: L + 1 of (N).
    rstd: Vec<D::Buffer>,
    /// Rows of logits that exist at a time, in `scratch.wide`.
    chunk: usize,
    /// One loss per row (N).
    losses: D::Buffer,
}

impl<D: Device> Workspace<D> {
    fn new(model: &Model<D>, batch: usize, len: usize) -> Self {
        let Model { device, config, params, layout, lora, activation_checkpointing, element, .. } = model;
        let element = *element;
        let rows = batch * len;
        let linears = |i| std::array::from_fn(|which| model.linear(i, which, rows));
        let blocks: Vec<Block> = (0..config.num_hidden_layers).map(|i| Block::new(layout, i, linears(i))).collect();
        let chunk = logits_chunk(config.vocab_size, rows);
        let needs: Vec<Needs> = blocks.first().into_iter().flat_map(|b| b.needs(params)).collect();
        let (r, dropout) = lora.as_ref().map_or((0, false), |spec| (spec.r, spec.dropout > 0.0));
        let linear = LinearScratch::new(device, element, &needs, rows, r, dropout);
        let kept = if *activation_checkpointing { 1.min(blocks.len()) } else { blocks.len() };
        Workspace {
            shape: Shape::new(device, config, batch, len),
            residual: (0..=blocks.len()).map(|_| device.zeros_of(element, rows * config.hidden_size)).collect(),
            rstd: (0..=blocks.len()).map(|_| device.zeros(rows)).collect(),
            saved: (0..kept).map(|_| None).collect(),
            blocks,
            scratch: Scratch::new(device, config, element, rows, chunk * config.vocab_size, linear),
            chunk,
            losses: device.zeros(rows),
        }
    }

    fn fits(&self, batch: usize, len: usize) -> bool {
        (self.shape.attention.batch, self.shape.attention.len) == (batch, len)
    }
}

/// Of a batch: the last token of a window predicts none.
fn predictions(batch: usize, len: usize) -> f64 {
    (batch * (len - 1)) as f64
}

impl<D: Device> Model<D> {
    /// One forward and backward over `batch` windows of `len` tokens (row-major); inside each window, token t predicts
    /// token t+1. Returns the mean loss of the `batch · (len - 1)` predictions, in nats, and adds `grad_scale` times its
    /// gradient to the gradients of what trains.
    pub fn forward_backward(&mut self, tokens: &[u32], batch: usize, len: usize, grad_scale: f32) -> Result<f64> {
        let mut stats = self.device.step_stats();
        self.forward_backward_then(tokens, batch, len, grad_scale, &mut stats, &mut |_, _, _| {})?;
        self.device.status()?;
        Ok(self.sum_of_losses() / predictions(batch, len))
    }

    /// [`Model::forward_backward`] that does not wait for the device: `grad_scale` times the mean loss is added to `stats`.
    /// It calls `ready` with the places of parameters as soon as their gradients are complete, while the backward goes on:
    /// it will not look at them again, and they may be taken away for the time being.
    pub fn forward_backward_then(
        &mut self,
        tokens: &[u32],
        batch: usize,
        len: usize,
        grad_scale: f32,
        stats: &mut D::StepStats,
        ready: &mut Ready<D>,
    ) -> Result<()> {
        self.check_tokens(tokens, batch, len, 2)?;
        self.run_blocks(tokens, batch, len, self.dropout());
        let scale = f64::from(grad_scale) / predictions(batch, len);
        self.run_head(tokens, len, Some(scale as f32));
        if let Some(workspace) = &self.workspace {
            self.device.accumulate_losses(scale, &workspace.losses, stats);
        }
        self.run_backward(tokens, ready);
        Ok(())
    }

    /// Sum of the losses, in nats, and the number of predictions; no gradients.
    pub fn loss(&mut self, tokens: &[u32], batch: usize, len: usize) -> Result<(f64, u64)> {
        self.check_tokens(tokens, batch, len, 2)?;
        self.run_blocks(tokens, batch, len, None);
        self.run_head(tokens, len, None);
        self.device.status()?;
        Ok((self.sum_of_losses(), (batch * (len - 1)) as u64))
    }

    /// Logits of every position (N, V), on the host.
    pub fn logits(&mut self, tokens: &[u32], batch: usize, len: usize) -> Result<Vec<f32>> {
        self.check_tokens(tokens, batch, len, 1)?;
        self.run_blocks(tokens, batch, len, None);
        let Model { device, config, params, layout, workspace, .. } = self;
        let workspace = workspace.as_mut().expect("the blocks have just run");
        let (rows, width, vocab) = (batch * len, config.hidden_size, config.vocab_size);
        let mut all = Vec::with_capacity(rows * vocab);
        for first in (0..rows).step_by(workspace.chunk) {
            let count = workspace.chunk.min(rows - first);
            let h = Mat::new(&workspace.scratch.h, count, width).from_row(first);
            let head = Mat::new(params[layout.head()].operand(), vocab, width);
            let logits = &mut workspace.scratch.wide;
            device.matmul(1.0, h, head.t(), 0.0, MatMut::new(logits, count, vocab));
            all.extend_from_slice(&device.read(logits)[..count * vocab]);
        }
        device.status()?;
        Ok(all)
    }

    fn check_tokens(&self, tokens: &[u32], batch: usize, len: usize, least: usize) -> Result<()> {
        if batch == 0 || len < least || tokens.len() != batch * len {
            return Err(Error::request(format!(
                "a batch of {batch} windows of {len} tokens cannot be made of {} tokens (windows need {least} or more)",
                tokens.len()
            )));
        }
        match tokens.iter().position(|&t| t as usize >= self.config.vocab_size) {
            None => Ok(()),
            Some(at) => Err(Error::request(format!(
                "token {} at position {at} of the batch is outside the model's vocabulary of {}",
                tokens[at], self.config.vocab_size
            ))
            .help("the data were tokenized for another model")),
        }
    }

    fn sum_of_losses(&self) -> f64 {
        self.workspace.as_ref().map_or(0.0, |w| self.device.sum(&w.losses))
    }

    /// From tokens to the normed output of the last block, in `scratch.h`.
    fn run_blocks(&mut self, tokens: &[u32], batch: usize, len: usize, dropout: Option<Dropout>) {
        if !self.workspace.as_ref().is_some_and(|w| w.fits(batch, len)) {
            // The old one goes first: there is never memory for two.
            self.drop_workspace();
            self.workspace = Some(Workspace::new(self, batch, len));
        }
        self.refresh();
        let Model { device, config, params, layout, workspace, pool, element, dropout_first, .. } = self;
        let Some(Workspace { shape, residual, rstd, blocks, saved, scratch, .. }) = workspace else { return };
        (shape.dropout, shape.first_row) = (dropout, *dropout_first * len);
        let tokens = device.upload_tokens(tokens);
        device.embedding_forward(&tokens, &params[layout.embedding()].value, &mut residual[0]);
        let norm_before = |i: usize| {
            let norm = blocks.get(i).map_or(layout.final_norm(), |block| block.attention_norm);
            &params[norm].value
        };
        device.rms_norm_forward(&residual[0], norm_before(0), shape.eps, &mut scratch.h, &mut rstd[0]);
        for (i, block) in blocks.iter().enumerate() {
            let (before, after) = residual.split_at_mut(i + 1);
            let own = i.min(saved.len() - 1);
            let make = || Saved::new(device, pool, config, *element, shape.rows(), params, block);
            let own = saved[own].get_or_insert_with(make);
            block::forward(device, params, block, shape, &before[i], own, scratch, true);
            let Scratch { h, dh: branch, .. } = scratch;
            let (next, rstd) = (norm_before(i + 1), &mut rstd[i + 1]);
            device.add_rms_norm_forward(&own.middle, branch, &mut after[0], next, shape.eps, h, rstd);
        }
    }

    /// From `scratch.h` to the losses; with a scale, also to `scratch.dh` and the head's gradient.
    fn run_head(&mut self, tokens: &[u32], len: usize, scale: Option<f32>) {
        let Model { device, config, params, layout, workspace, .. } = self;
        let Some(Workspace { scratch: Scratch { h: hidden, dh, wide: logits, .. }, chunk, losses, .. }) = workspace
        else {
            return;
        };
        let targets: Vec<u32> = tokens.chunks(len).flat_map(|w| w[1..].iter().copied().chain([IGNORE])).collect();
        let targets = device.upload_tokens(&targets);
        let (rows, width, vocab) = (tokens.len(), config.hidden_size, config.vocab_size);
        let Param { value, working, grad, .. } = &mut params[layout.head()];
        let head = || Mat::new(working.as_ref().unwrap_or(value), vocab, width);
        for first in (0..rows).step_by(*chunk) {
            let count = (*chunk).min(rows - first);
            let h = || Mat::new(&*hidden, count, width).from_row(first);
            device.matmul(1.0, h(), head().t(), 0.0, MatMut::new(logits, count, vocab));
            device.cross_entropy(vocab, first, count, &targets, logits, losses, scale);
            if scale.is_some() {
                let dlogits = || Mat::new(&*logits, count, vocab);
                let dh = MatMut::new(dh, count, width).from_row(first);
                device.matmul(1.0, dlogits(), head(), 0.0, dh);
                if let Some(grad) = grad {
                    device.matmul(1.0, dlogits().t(), h(), 1.0, MatMut::new(grad, vocab, width));
                }
            }
        }
    }

    /// From `scratch.dh` back to the embedding.
    fn run_backward(&mut self, tokens: &[u32], ready: &mut Ready<D>) {
        let Model { device, params, layout, workspace, pool, gradient_accumulation, .. } = self;
        let Some(Workspace { shape, residual, rstd, blocks, saved, scratch, .. }) = workspace else { return };
        device.fill(&mut scratch.dx, 0.0);
        let (norm, last) = (&mut params[layout.final_norm()], blocks.len());
        block::norm_backward(device, norm, &residual[last], &rstd[last], &scratch.dh, &mut scratch.dx);
        if layout.head() != layout.embedding() {
            ready(device, params, &[layout.head()]);
        }
        ready(device, params, &[layout.final_norm()]);
        for (i, block) in blocks.iter().enumerate().rev() {
            block.begin_gradients(device, params, pool);
            let shared = saved.len() < blocks.len();
            let place = &mut saved[if shared { 0 } else { i }];
            let Some(own) = place else { return };
            // What the last block kept is still there.
            if shared && i + 1 < blocks.len() {
                let norm = &params[block.attention_norm].value;
                device.rms_norm_forward(&residual[i], norm, shape.eps, &mut scratch.h, &mut rstd[i]);
                block::forward(device, params, block, shape, &residual[i], own, scratch, false);
            }
            block::backward(device, params, block, shape, &residual[i], &mut rstd[i], own, scratch);
            ready(device, params, &block.params());
            let lend = !shared && !*gradient_accumulation && i > 0;
            if lend && blocks[i - 1].lacks_gradients(params) {
                place.take().into_iter().for_each(|own| own.give(pool));
            }
        }
        if let Some(grad) = &mut params[layout.embedding()].grad {
            device.embedding_backward(&device.upload_tokens(tokens), &scratch.dx, grad);
        }
        ready(device, params, &[layout.embedding()]);
    }
}
