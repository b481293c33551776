//! LoKr (arXiv:2309.14859, LyCORIS): `dW = alpha / r * kron(w1, w2)`, each of the two full or a product of two factors.
//!
//! Of a convolution w2 is `[out', in', kernel]`, stored as one tensor, as `w2_a @ w2_b` with the kernel in the columns, or with a core
//! t2. PEFT scales by `alpha / r` also where both are full; LyCORIS itself then scales by 1.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::{Array2, ArrayViewMut2};
use std::ops::Range;

/// The type.
pub struct LoKr;

impl AdapterType for LoKr {
    fn about(&self) -> About {
        About {
            id: "LOKR",
            name: "LoKr",
            prefix: "lokr_",
            slots: &["lokr_w1_a", "lokr_w1_b", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_w2", "lokr_t2"],
        }
    }

    fn shape(&self, module: &Module) -> Result<Option<(usize, usize)>> {
        let (w1, w2, misaligned) = shapes(module)?;
        Ok(misaligned.is_none().then_some((w1.0 * w2.0, w1.1 * w2.1)))
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (w1, w2, _) = shapes(module)?;
        Ok((w1.0 * w2.0, w1.1 * w2.1) == layer.shape())
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let (_, shape, misaligned) = shapes(module)?;
        let w1 = product(module, "lokr_w1")?;
        let w2 = match (module.get("lokr_w2"), module.get("lokr_t2")) {
            (Some(w2), _) => values::matrix(&w2, shape)?,
            (None, Some(_)) => values::core(module, "lokr_t2", "lokr_w2_a", "lokr_w2_b")?,
            (None, None) => product(module, "lokr_w2")?,
        };
        let (scaling, held) = (weight * values::scaling(module)?, 8 * (w1.len() + w2.len()));
        let rows = move |rows: Range<usize>, out: ArrayViewMut2<f64>| match misaligned {
            Some(kernel) => misaligned_rows(&w1, &w2, kernel, scaling, rows, out),
            None => aligned_rows(&w1, &w2, scaling, rows, out),
        };
        Ok(forms::adding(layer.shape(), held, rows))
    }
}

fn aligned_rows(w1: &Array2<f64>, w2: &Array2<f64>, scaling: f64, rows: Range<usize>, mut out: ArrayViewMut2<f64>) {
    for (mut out, row) in out.outer_iter_mut().zip(rows) {
        let (first, second) = (w1.row(row / w2.nrows()), w2.row(row % w2.nrows()));
        for (mut out, x) in out.exact_chunks_mut(second.len()).into_iter().zip(first) {
            out.zip_mut_with(&second, |out, y| *out = scaling * x * y);
        }
    }
}

/// The layers of Conv1d with a full w2: PEFT takes the Kronecker product of `[1, a, b]` and `[c, d, kernel]`, whose axes do not line
/// up, and reshapes it. Its forward pass does the same, so that the trained adapter means exactly this.
fn misaligned_rows(
    w1: &Array2<f64>,
    w2: &Array2<f64>,
    kernel: usize,
    scaling: f64,
    rows: Range<usize>,
    mut out: ArrayViewMut2<f64>,
) {
    let ((a, b), d, columns) = (w1.dim(), w2.ncols() / kernel, out.ncols());
    for (mut out, row) in out.outer_iter_mut().zip(rows) {
        for (j, out) in out.iter_mut().enumerate() {
            let flat = row * columns + j;
            let (rest, k) = (flat / kernel, flat % kernel);
            let (rest, column) = (rest / b, rest % b);
            let (rest, q) = (rest / d, rest % d);
            *out = scaling * w1[[rest % a, column]] * w2[[rest / a, q * kernel + k]];
        }
    }
}

/// Shapes of w1 and w2 as matrices; and the kernel of a w2 with three axes.
type Shapes = ((usize, usize), (usize, usize), Option<usize>);

fn shapes(module: &Module) -> Result<Shapes> {
    let of_product = |name: &str| match module.get(name) {
        Some(_) => values::extents(module, name),
        None => {
            let (a, b) =
                (values::extents(module, &format!("{name}_a"))?, values::extents(module, &format!("{name}_b"))?);
            match a.1 == b.0 {
                true => Ok((a.0, b.1)),
                false => Err(module.damaged(&format!("'{name}_a' {a:?} and '{name}_b' {b:?} do not share a rank"))),
            }
        }
    };
    let w1 = of_product("lokr_w1")?;
    if module.get("lokr_t2").is_some() {
        return Ok((w1, values::core_shape(module, "lokr_t2", "lokr_w2_a", "lokr_w2_b")?, None));
    }
    match module.get("lokr_w2").map(|w2| w2.shape()) {
        Some(&[c, d, kernel]) if kernel > 0 => Ok((w1, (c, d * kernel), Some(kernel))),
        Some(&[c, d, m, n]) => Ok((w1, (c, d * m * n), None)),
        _ => Ok((w1, of_product("lokr_w2")?, None)),
    }
}

fn product(module: &Module, name: &str) -> Result<Array2<f64>> {
    if module.get(name).is_some() {
        return values::table(module, name);
    }
    Ok(values::table(module, &format!("{name}_a"))?.dot(&values::table(module, &format!("{name}_b"))?))
}
