//! LoHa (arXiv:2108.06098, LyCORIS): the elementwise product of two low-rank matrices.
//!
//! `dW = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)`, w_a `[out, r]`, w_b `[r, in]`.

use super::{AdapterType, Parameter, Site, values};
use crate::{
    adapter::{Module, config},
    delta::{LowRank, Planned, Real, Update},
    error::Result,
};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use std::ops::Range;

/// The type.
pub struct LoHa;

impl AdapterType for LoHa {
    fn id(&self) -> &'static str {
        "LOHA"
    }

    fn name(&self) -> &'static str {
        "LoHa"
    }

    fn prefix(&self) -> &'static str {
        "hada_"
    }

    fn slots(&self) -> &'static [&'static str] {
        &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"]
    }

    fn check(&self, module: &Module) -> Result<()> {
        shape(module).map(|_| ())
    }

    fn shape(&self, module: &Module) -> Result<Option<(usize, usize)>> {
        shape(module).map(Some)
    }

    fn plan<'a>(&self, module: &Module<'a>, site: &Site<'a>) -> Result<Option<Planned<'a>>> {
        if site.parameter == Parameter::Bias {
            return Ok(None);
        }
        let (rows, columns) = shape(module)?;
        if *site.shape != [rows, columns] {
            return Err(site.refuse(module, &format!("shape {:?} but LoHa gives {:?}", site.shape, [rows, columns])));
        }
        let (module, scaling) = (*module, scaling(module)? * site.weight);
        let file = module.adapter().file().path();
        let (single, double) = (move || build::<f32>(&module, scaling), move || build::<f64>(&module, scaling));
        let mut planned = Planned::new(file, (rows, columns), single, double);
        planned.tensors = module.tensors().collect();
        Ok(Some(planned))
    }
}

fn scaling(module: &Module) -> Result<f64> {
    let config = module.config();
    let alpha = config.alpha_pattern.get(module.name()).or_else(|| config.number("alpha"));
    let alpha = alpha.ok_or_else(|| module.damaged("adapter_config.json has no alpha"))?;
    Ok(config::scaling(alpha, config.rank_of(module.name()), false))
}

fn shape(module: &Module) -> Result<(usize, usize)> {
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
