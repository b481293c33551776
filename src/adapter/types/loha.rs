//! LoHa (arXiv:2108.06098, LyCORIS): the elementwise product of two low-rank matrices.
//!
//! `dW = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)`, w_a `[out, r]`, w_b `[r, in]`.
//! Of a convolution the kernel stands in the columns of w_b, or each product has a core t `[r, r, kernel]` between w_a `[r, out]` and
//! w_b `[r, in]`.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::{
        LowRank, Real, Update,
        forms::{self, Boxed},
    },
    error::Result,
};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use std::ops::Range;

/// The type.
pub struct LoHa;

impl AdapterType for LoHa {
    fn about(&self) -> About {
        let slots = &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"];
        About { id: "LOHA", name: "LoHa", prefix: "hada_", slots }
    }

    fn check(&self, module: &Module) -> Result<()> {
        shape(module).map(|_| ())
    }

    fn shape(&self, module: &Module) -> Result<Option<(usize, usize)>> {
        shape(module).map(Some)
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        Ok(shape(module)? == layer.shape())
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let scaling = weight * values::scaling(module)?;
        if module.get("hada_t1").is_none() {
            return build(module, scaling);
        }
        let first = values::core(module, "hada_t1", "hada_w1_a", "hada_w1_b")?;
        let dense = scaling * first * values::core(module, "hada_t2", "hada_w2_a", "hada_w2_b")?;
        Ok(forms::adding(layer.shape(), 8 * dense.len(), move |rows, mut out| out.assign(&dense.slice(s![rows, ..]))))
    }

    fn single(&self, module: &Module, weight: f64) -> Option<Result<Box<dyn Update<f32>>>> {
        module.get("hada_t1").is_none().then(|| build(module, weight * values::scaling(module)?))
    }
}

fn shape(module: &Module) -> Result<(usize, usize)> {
    if module.get("hada_t1").is_some() {
        let first = values::core_shape(module, "hada_t1", "hada_w1_a", "hada_w1_b")?;
        let second = values::core_shape(module, "hada_t2", "hada_w2_a", "hada_w2_b")?;
        return match first == second {
            true => Ok(first),
            false => Err(module.damaged(&format!("its products are {first:?} and {second:?}"))),
        };
    }
    let [a1, b1, a2, b2] =
        ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"].map(|slot| values::extents(module, slot));
    let (a1, b1, a2, b2) = (a1?, b1?, a2?, b2?);
    let r = module.config().rank_of(module.name());
    if (a1, b1) != (a2, b2) || a1.1 != b1.0 {
        return Err(module.damaged(&format!("factors {a1:?}, {b1:?}, {a2:?} and {b2:?} do not fit each other")));
    }
    if a1.1 != r || r == 0 {
        return Err(module.damaged(&format!("its factors have rank {}, adapter_config.json says {r}", a1.1)));
    }
    Ok((a1.0, b1.1))
}

struct Hadamard<T> {
    first: LowRank<T>,
    second: LowRank<T>,
}

fn build<T: Real>(module: &Module, scaling: f64) -> Result<Box<dyn Update<T>>> {
    let factor = |slot| values::matrix::<T>(&module.need(slot)?, values::extents(module, slot)?);
    let pair = |a, b, scaling| Ok(LowRank { left: factor(a)?, right: factor(b)?, scaling });
    let first = pair("hada_w1_a", "hada_w1_b", T::from_f64(scaling))?;
    Ok(Box::new(Hadamard { first, second: pair("hada_w2_a", "hada_w2_b", T::one())? }))
}

impl<T: Real> Update<T> for Hadamard<T> {
    fn shape(&self) -> (usize, usize) {
        self.first.shape()
    }

    fn bytes(&self) -> usize {
        [&self.first, &self.second].iter().map(|p| (p.left.len() + p.right.len()) * size_of::<T>()).sum()
    }

    fn rows(&self, rows: Range<usize>, _: ArrayView2<T>, mut out: ArrayViewMut2<T>) -> Result<()> {
        let mut second = Array2::zeros(out.dim());
        self.second.rows(rows.clone(), second.view_mut());
        self.first.rows(rows, out.view_mut());
        out.zip_mut_with(&second, |out, &x| *out = *out * x);
        Ok(())
    }
}
