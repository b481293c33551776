//! 8-bit floats with a scale per block, per row or per tensor.

use super::{
    packed,
    stored::{EncodedWeight, Stored, bad, expect_dtype, owned, scales},
};
use crate::{
    checkpoint::{Dtype, Tensor},
    error::Result,
};

/// `quant_method: fp8` (DeepSeek, Qwen): `W[.., i, j] = f8 * X_scale_inv[.., i / block rows, j / block columns]`. Despite its name
/// `X_scale_inv` is the factor to multiply with. `weight_block_size` gives the blocks' shape, which the last blocks need not
/// fill; without it there is one scale per tensor (or per expert).
pub(super) fn find_blocks<'a>(stored: &Stored<'a>) -> Result<Vec<EncodedWeight<'a>>> {
    let block = stored.settings["weight_block_size"].as_array();
    let block = block.and_then(|b| Some((b.first()?.as_u64()? as usize, b.get(1)?.as_u64()? as usize)));
    let mut found = Vec::new();
    for (name, scale) in stored.ending("_scale_inv") {
        let values = stored.need(name, &scale)?;
        let grid = match block {
            Some((m, n)) if m > 0 && n > 0 => Grid::blocks(&values, &scale, m, n)?,
            Some(_) => return Err(bad(&values, "weight_block_size in config.json holds 0")),
            None => Grid::leading(&values, &scale)?,
        };
        found.push(weight(name, values, scale, grid)?);
    }
    complete(stored, found)
}

/// `quant_method: fbgemm_fp8`: `W[i, j] = f8 * weight_scale[i]`.
pub(super) fn find_rows<'a>(stored: &Stored<'a>) -> Result<Vec<EncodedWeight<'a>>> {
    let mut found = Vec::new();
    for (module, scale) in stored.ending(".weight_scale") {
        let name = format!("{module}.weight");
        let values = stored.need(&name, &scale)?;
        found.push(weight(&name, values, scale, Grid::leading(&values, &scale)?)?);
    }
    complete(stored, found)
}

/// Refuses a checkpoint with 8-bit floats that no scale belongs to.
pub(super) fn complete<'a>(stored: &Stored<'a>, found: Vec<EncodedWeight<'a>>) -> Result<Vec<EncodedWeight<'a>>> {
    let owned = owned(&found);
    let alone = |t: &Tensor| matches!(t.dtype(), Dtype::F8_E4M3 | Dtype::F8_E5M2) && !owned.contains(t.name());
    match stored.base.tensors().find(alone) {
        Some(tensor) => Err(bad(&tensor, "it holds 8-bit floats, and no scale belongs to it")),
        None => Ok(found),
    }
}

/// Which scale belongs to an element: the tensor is seen as `[matrices, rows, columns]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// Rows of one matrix.
    rows: usize,
    columns: usize,
    /// Rows and columns that share a scale.
    block: (usize, usize),
    /// Scales of one matrix: block rows and block columns.
    scales: (usize, usize),
}

impl Grid {
    /// Blocks of `m` by `n` elements in the last two extents; the leading extents are those of the scales, too.
    pub(super) fn blocks(values: &Tensor, scale: &Tensor, m: usize, n: usize) -> Result<Grid> {
        let [leading @ .., rows, columns] = values.shape() else {
            return Err(bad(values, format!("it has shape {:?}, expected a matrix", values.shape())));
        };
        let scales = (rows.div_ceil(m), columns.div_ceil(n));
        let expected = [leading, &[scales.0, scales.1]].concat();
        if scale.shape() != expected {
            return Err(bad(
                scale,
                format!(
                    "it has shape {:?}, expected {expected:?} for blocks of {m}x{n} in {:?}",
                    scale.shape(),
                    values.shape()
                ),
            ));
        }
        Ok(Grid { rows: *rows, columns: *columns, block: (m, n), scales })
    }

    /// One scale for the whole tensor, per leading extent, per row, or per group of columns: what the scales' shape says.
    pub(super) fn leading(values: &Tensor, scale: &Tensor) -> Result<Grid> {
        let shape = values.shape();
        let [leading @ .., rows, columns] = shape else {
            return Err(bad(values, format!("it has shape {shape:?}, expected a matrix")));
        };
        let (rows, columns, matrices) = (*rows, *columns, leading.iter().product::<usize>());
        let mut per = scale.shape();
        // A per-row scale may be [rows], [rows, 1]; a scale per matrix [experts], [experts, 1, 1].
        while per.len() > leading.len() + 1 && per.last() == Some(&1) {
            per = &per[..per.len() - 1];
        }
        let whole =
            |matrices| Grid { rows: rows * matrices, columns, block: (rows * matrices, columns), scales: (1, 1) };
        if scale.elements() == 1 {
            return Ok(whole(matrices));
        }
        if !leading.is_empty() && per.strip_suffix(&[1]).unwrap_or(per) == leading {
            return Ok(whole(1));
        }
        match per.strip_prefix(leading) {
            Some(&[r]) if r == rows => Ok(Grid { rows, columns, block: (1, columns), scales: (rows, 1) }),
            Some(&[r, groups]) if r == rows && groups > 0 && columns.is_multiple_of(groups) => {
                Ok(Grid { rows, columns, block: (1, columns / groups), scales: (rows, groups) })
            }
            _ => Err(bad(scale, format!("its shape {:?} does not fit values of shape {shape:?}", scale.shape()))),
        }
    }

    /// Multiplies the elements of `rows` (rows of all matrices, counted through) with their scales.
    pub(super) fn apply(&self, scales: &[f32], rows: std::ops::Range<usize>, out: &mut [f32]) {
        if self.columns == 0 {
            return;
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(self.columns)) {
            let first = (row / self.rows * self.scales.0 + row % self.rows / self.block.0) * self.scales.1;
            for (out, &scale) in out.chunks_mut(self.block.1).zip(&scales[first..]) {
                out.iter_mut().for_each(|o| *o *= scale);
            }
        }
    }
}

/// A weight of 8-bit floats or 8-bit integers whose scales lie as `grid` says.
pub(super) fn weight<'a>(name: &str, values: Tensor<'a>, scale: Tensor<'a>, grid: Grid) -> Result<EncodedWeight<'a>> {
    expect_dtype(&values, &[Dtype::F8_E4M3, Dtype::F8_E5M2, Dtype::I8])?;
    let of: fn(u8) -> f32 = match values.dtype() {
        Dtype::F8_E4M3 => packed::e4m3,
        Dtype::F8_E5M2 => packed::e5m2,
        _ => |byte| f32::from(byte as i8),
    };
    let columns = grid.columns;
    Ok(EncodedWeight {
        name: name.to_owned(),
        shape: values.shape().to_vec(),
        tensors: vec![values, scale],
        open: Box::new(move || {
            let (scales, table) = (scales(&scale)?, packed::table(of));
            Ok(Box::new(move |rows, out| {
                let bytes = &values.bytes()[rows.start * columns..rows.end * columns];
                out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = table[usize::from(b)]);
                grid.apply(&scales, rows, out);
            }))
        }),
    })
}
