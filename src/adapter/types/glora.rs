//! GLoRA (arXiv:2306.07967): `W' = W + W * A + B` and `b' = b + b * D + E + W C`, each of the five a product of two factors, a vector, or
//! zero. A C that is not zero moves the bias by the weight: refused.

use super::Site;
use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::{
        LowRank, Planned,
        forms::{self, Boxed},
    },
    error::{Error, Result},
};
use ndarray::{Array2, ArrayViewMut2};
use std::ops::Range;

/// The type.
pub struct Glora;

impl AdapterType for Glora {
    fn about(&self) -> About {
        let slots = &[
            "glora_A.Xd",
            "glora_A.Xu",
            "glora_A.X",
            "glora_A.zeros",
            "glora_B.Xd",
            "glora_B.Xu",
            "glora_B.X",
            "glora_B.zeros",
            "glora_C.Xd",
            "glora_C.Xu",
            "glora_C.X",
            "glora_C.zeros",
            "glora_D.X",
            "glora_D.zeros",
            "glora_E.X",
            "glora_E.zeros",
        ];
        About { id: "GLORA", name: "GLoRA", prefix: "glora_", slots }
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("scales its elements")
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        Ok([path(module, "A")?, path(module, "B")?].iter().all(|path| path.fits(layer.shape())))
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let (a, b) = (path(module, "A")?, path(module, "B")?);
        Ok(forms::rewriting(layer.shape(), a.bytes() + b.bytes(), move |rows, weight, mut out| {
            let mut scale = Array2::zeros(out.dim());
            a.rows(rows.clone(), scale.view_mut());
            b.rows(rows, out.view_mut());
            out.iter_mut().zip(weight.iter().zip(&scale)).for_each(|(out, (w, a))| *out += w + w * a);
        }))
    }

    fn plan_bias<'a>(&'static self, module: &Module<'a>, site: &Site) -> Result<Option<Planned<'a>>> {
        if let Some(zero) = ["X", "Xd"].iter().find(|part| module.get(&format!("glora_C.{part}")).is_some()) {
            return Err(Error::request(format!(
                "cannot merge '{}': 'glora_C.{zero}' of '{}' moves it by a product with the weight, which is not supported",
                site.name,
                module.name()
            ))
            .help("merge this adapter with PEFT"));
        }
        let count = site.shape.iter().product::<usize>();
        for which in ["D", "E"] {
            if let Some(vector) = module.get(&format!("glora_{which}.X")).filter(|vector| vector.elements() != count) {
                return Err(
                    site.refuse(module, &format!("shape {:?}, but glora_{which} has {:?}", site.shape, vector.shape()))
                );
            }
        }
        site.plan_bias(module, count, move |module| {
            let read = |which: &str| match module.get(&format!("glora_{which}.X")) {
                Some(vector) => values::vector::<f64>(&vector),
                None => Ok(vec![0.0; count]),
            };
            let (d, e) = (read("D")?, read("E")?);
            Ok(forms::rewriting((1, count), 16 * count, move |_, weight, mut out| {
                out.iter_mut().zip(weight).zip(d.iter().zip(&e)).for_each(|((out, b), (d, e))| *out = b + b * d + e);
            }))
        })
    }
}

/// A or B.
enum Path {
    Zero,
    Product(LowRank<f64>),
    /// One number per output.
    Vector(Vec<f64>),
}

fn path(module: &Module, which: &str) -> Result<Path> {
    let slot = |part: &str| format!("glora_{which}.{part}");
    if module.get(&slot("Xd")).is_some() {
        let (left, right) = (values::table(module, &slot("Xd"))?, values::table(module, &slot("Xu"))?);
        if left.ncols() != right.nrows() {
            return Err(module.damaged(&format!("the factors of glora_{which} do not share a rank")));
        }
        return Ok(Path::Product(LowRank { left, right, scaling: 1.0 }));
    }
    match module.get(&slot("X")) {
        Some(vector) => Ok(Path::Vector(values::vector(&vector)?)),
        None => module.need(&slot("zeros")).map(|_| Path::Zero),
    }
}

impl Path {
    fn fits(&self, (out, input): (usize, usize)) -> bool {
        match self {
            Path::Zero => true,
            Path::Product(product) => product.shape() == (out, input),
            Path::Vector(vector) => vector.len() == out,
        }
    }

    fn bytes(&self) -> usize {
        8 * match self {
            Path::Zero => 0,
            Path::Product(product) => product.left.len() + product.right.len(),
            Path::Vector(vector) => vector.len(),
        }
    }

    fn rows(&self, rows: Range<usize>, mut out: ArrayViewMut2<f64>) {
        match self {
            Path::Zero => out.fill(0.0),
            Path::Product(product) => product.rows(rows, out),
            Path::Vector(vector) => out.outer_iter_mut().zip(rows).for_each(|(mut out, row)| out.fill(vector[row])),
        }
    }
}
