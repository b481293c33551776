//! A linear layer with or without LoRA: `y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ`; x (N, in), W (out, in), A (r, in), B (out, r).

use super::{
    params::Param,
    product::{Extents, Product},
};
use crate::ops::{Device, Dropout, Element, Factor, Mat, MatMut};

/// Where the weight is in the list of parameters, and its LoRA factors, if there are any.
#[derive(Clone, Copy)]
pub(super) struct Linear {
    pub weight: usize,
    pub lora: Option<Factors>,
}

/// Where A and B are, and how the product with them is computed.
#[derive(Clone, Copy)]
pub(super) struct Factors {
    pub a: usize,
    pub b: usize,
    pub scaling: Scaling,
    pub product: Product,
}

/// s.
#[derive(Clone, Copy)]
pub(super) enum Scaling {
    Fixed(f32),
    /// `tanh` of the parameter at this place.
    Tanh(usize),
}

impl Scaling {
    pub fn factor<D: Device>(self, params: &[Param<D>]) -> Factor<'_, D::Buffer> {
        match self {
            Scaling::Fixed(s) => Factor::Number(s),
            Scaling::Tanh(at) => Factor::Tanh(&params[at].value),
        }
    }
}

/// What a pass over a batch tells every layer.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    /// N.
    pub rows: usize,
    /// Before A, in training.
    pub dropout: Option<Dropout>,
    /// Rows of the update's whole batch that come before those of this pass.
    pub first_row: usize,
}

impl Pass {
    /// Every layer drops other elements of its inputs, `inner` wide; which, does not depend on how a batch is divided.
    fn dropout_of(&self, weight: usize, inner: usize) -> Option<Dropout> {
        self.dropout.map(|d| d.fork(weight as u64).after(self.first_row * inner))
    }
}

/// Buffers that all layers share: nothing in them outlives one call.
pub(super) struct LinearScratch<D: Device> {
    /// `x Aᵀ` where it is not kept, (N, r).
    xa: D::Buffer,
    /// `dy B` (N, r).
    dyb: D::Buffer,
    /// `drop(x)`, or the gradient of it, (N, widest in); empty without dropout.
    dropped: D::Buffer,
    /// `W + s B A`, or W where it is quantised, by number of elements.
    formed: Vec<D::Buffer>,
    /// The gradient of a whole weight, by number of elements.
    whole_gradient: Vec<D::Buffer>,
}

/// What a layer needs of the scratch.
#[derive(Clone, Copy)]
pub(super) struct Needs {
    pub out: usize,
    pub inner: usize,
    /// How its factors are multiplied, if it has some.
    pub product: Option<Product>,
    pub quantised: bool,
}

impl<D: Device> LinearScratch<D> {
    /// For these layers, all of rank r.
    pub fn new(device: &D, element: Element, layers: &[Needs], rows: usize, r: usize, dropout: bool) -> Self {
        let buffers = |needed: &dyn Fn(&Needs) -> bool| {
            let mut lengths: Vec<usize> = layers.iter().filter(|n| needed(n)).map(|n| n.out * n.inner).collect();
            lengths.sort_unstable();
            lengths.dedup();
            lengths.into_iter().map(|len| device.zeros_of(element, len)).collect::<Vec<_>>()
        };
        let widest = layers.iter().map(|n| n.inner).max().unwrap_or(0);
        let is_thin = |n: &Needs| n.product.is_some_and(|p| p != Product::WholeGradient);
        let thin = if layers.iter().any(is_thin) { rows * r } else { 0 };
        let forms = |n: &Needs| n.quantised || n.product.is_some_and(|p| p != Product::Factored);
        LinearScratch {
            xa: device.zeros_of(element, thin),
            dyb: device.zeros_of(element, thin),
            dropped: device.zeros_of(element, if dropout { rows * widest } else { 0 }),
            formed: buffers(&forms),
            whole_gradient: buffers(&|n| n.product == Some(Product::WholeGradient)),
        }
    }
}

fn of_length<'a, D: Device>(device: &D, buffers: &'a mut [D::Buffer], len: usize) -> &'a mut D::Buffer {
    let found = buffers.iter_mut().find(|b| device.len(b) == len);
    found.expect("the scratch was made for the layers of this model")
}

impl Linear {
    /// `(out, in)`.
    pub fn dims<D: Device>(&self, params: &[Param<D>]) -> (usize, usize) {
        (params[self.weight].shape[0], params[self.weight].shape[1])
    }

    /// `y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ`. Where the product is factored, `xa` receives `drop(x) Aᵀ` (N, r), which backward needs.
    #[allow(clippy::too_many_arguments)]
    pub fn forward<D: Device>(
        &self,
        device: &D,
        params: &[Param<D>],
        pass: Pass,
        x: &D::Buffer,
        xa: Option<&mut D::Buffer>,
        scratch: &mut LinearScratch<D>,
        y: &mut D::Buffer,
    ) {
        let ((out, inner), rows) = (self.dims(params), pass.rows);
        let LinearScratch { formed, dropped, .. } = scratch;
        let weight = Mat::new(self.weight(device, params, formed), out, inner);
        device.matmul(1.0, Mat::new(x, rows, inner), weight.t(), 0.0, MatMut::new(y, rows, out));
        let Some((factors, xa)) = self.factored().zip(xa) else { return };
        let r = params[factors.a].shape[0];
        self.project(device, params, pass, x, dropped, xa);
        let b = Mat::new(params[factors.b].operand(), out, r);
        let scaling = factors.scaling.factor(params);
        device.matmul(scaling, Mat::new(xa, rows, r), b.t(), 1.0, MatMut::new(y, rows, out));
    }

    /// The factors, if they are multiplied apart from the weight.
    fn factored(&self) -> Option<Factors> {
        self.lora.filter(|f| f.product == Product::Factored)
    }

    /// What x is multiplied with: W, or `W + s B A`. One of `formed` holds it, if it is not there as it is.
    fn weight<'a, D: Device>(&self, device: &D, params: &'a [Param<D>], formed: &'a mut [D::Buffer]) -> &'a D::Buffer {
        let w = &params[self.weight];
        let with_factors = self.lora.filter(|f| f.product != Product::Factored);
        if with_factors.is_none() && w.quantised.is_none() {
            return w.operand();
        }
        let (out, inner) = self.dims(params);
        let formed = of_length(device, formed, out * inner);
        match &w.quantised {
            Some(quantised) => device.dequantise(quantised, formed),
            None => device.copy(w.operand(), formed),
        }
        if let Some(factors) = with_factors {
            let [a, b] = [factors.a, factors.b].map(|at| &params[at]);
            let (b, a) = (Mat::new(b.operand(), b.shape[0], b.shape[1]), Mat::new(a.operand(), a.shape[0], a.shape[1]));
            device.matmul(factors.scaling.factor(params), b, a, 1.0, MatMut::new(formed, out, inner));
        }
        formed
    }

    /// `xa = drop(x) Aᵀ`.
    fn project<D: Device>(
        &self,
        device: &D,
        params: &[Param<D>],
        pass: Pass,
        x: &D::Buffer,
        dropped: &mut D::Buffer,
        xa: &mut D::Buffer,
    ) {
        let Some(factors) = self.lora else { return };
        let (r, inner) = (params[factors.a].shape[0], params[factors.a].shape[1]);
        let a = Mat::new(params[factors.a].operand(), r, inner);
        let x = match pass.dropout_of(self.weight, inner) {
            Some(dropout) => {
                device.dropout_forward(dropout, x, dropped);
                &*dropped
            }
            None => x,
        };
        device.matmul(1.0, Mat::new(x, pass.rows, inner), a.t(), 0.0, MatMut::new(xa, pass.rows, r));
    }

    /// What [`Linear::forward`] keeps for backward, without its product.
    pub fn project_again<D: Device>(
        &self,
        device: &D,
        params: &[Param<D>],
        pass: Pass,
        x: &D::Buffer,
        xa: Option<&mut D::Buffer>,
        scratch: &mut LinearScratch<D>,
    ) {
        if let Some(xa) = xa {
            self.project(device, params, pass, x, &mut scratch.dropped, xa);
        }
    }

    /// What trains of W, A, B and s gets its gradient added. `xa` is what forward kept.
    #[allow(clippy::too_many_arguments)]
    pub fn weight_gradients<D: Device>(
        &self,
        device: &D,
        params: &mut [Param<D>],
        pass: Pass,
        x: &D::Buffer,
        xa: Option<&D::Buffer>,
        scratch: &mut LinearScratch<D>,
        dy: &D::Buffer,
    ) {
        let ((out, inner), rows) = (self.dims(params), pass.rows);
        if let Param { grad: Some(dw), .. } = &mut params[self.weight] {
            let (x, dy) = (Mat::new(x, rows, inner), Mat::new(dy, rows, out));
            device.matmul(1.0, dy.t(), x, 1.0, MatMut::new(dw, out, inner));
        }
        let Some(factors) = self.lora else { return };
        let low_rank = LowRank { device, linear: self, factors, pass, x, dy };
        let LinearScratch { xa: projected, dyb, dropped, whole_gradient, .. } = scratch;
        match (factors.product, xa) {
            (Product::WholeGradient, _) => {
                low_rank.gradients_from_whole(params, of_length(device, whole_gradient, out * inner));
            }
            (_, Some(xa)) => low_rank.thin_gradients(params, xa, dyb, dropped),
            (_, None) => {
                self.project(device, params, pass, x, dropped, projected);
                low_rank.thin_gradients(params, projected, dyb, dropped);
            }
        }
    }

    /// `dx = beta · dx + dy W + s (dy B) A`, dropped where x was. Comes after [`Linear::weight_gradients`] of the same
    /// `dy`, which leaves `dy B` in the scratch; x is no longer needed, and dx may lie where it was.
    #[allow(clippy::too_many_arguments)]
    pub fn input_gradient<D: Device>(
        &self,
        device: &D,
        params: &[Param<D>],
        pass: Pass,
        scratch: &mut LinearScratch<D>,
        dy: &D::Buffer,
        beta: f32,
        dx: &mut D::Buffer,
    ) {
        let ((out, inner), rows) = (self.dims(params), pass.rows);
        let LinearScratch { formed, dyb, dropped, .. } = scratch;
        let weight = Mat::new(self.weight(device, params, formed), out, inner);
        device.matmul(1.0, Mat::new(dy, rows, out), weight, beta, MatMut::new(dx, rows, inner));
        let Some(factors) = self.factored() else { return };
        let (r, scaling) = (params[factors.a].shape[0], factors.scaling.factor(params));
        let (dyb, a) = (Mat::new(dyb, rows, r), Mat::new(params[factors.a].operand(), r, inner));
        match pass.dropout_of(self.weight, inner) {
            None => device.matmul(scaling, dyb, a, 1.0, MatMut::new(dx, rows, inner)),
            Some(dropout) => {
                device.matmul(scaling, dyb, a, 0.0, MatMut::new(dropped, rows, inner));
                device.dropout_backward(dropout, dropped, dx);
            }
        }
    }
}

/// What the gradients of the factors of one layer are computed from.
struct LowRank<'a, D: Device> {
    device: &'a D,
    linear: &'a Linear,
    factors: Factors,
    pass: Pass,
    x: &'a D::Buffer,
    dy: &'a D::Buffer,
}

impl<D: Device> LowRank<'_, D> {
    /// `dB += s dyᵀ xa`, `dA += s (dy B)ᵀ drop(x)`, and of a trained scaling `tanh(p)`: `dp += (1 - s²) <dy B, xa>`.
    fn thin_gradients(&self, params: &mut [Param<D>], xa: &D::Buffer, dyb: &mut D::Buffer, dropped: &mut D::Buffer) {
        let LowRank { device, linear, factors, pass, x, dy } = *self;
        let ((out, inner), rows, r) = (linear.dims(params), pass.rows, params[factors.a].shape[0]);
        let dy = || Mat::new(dy, rows, out);
        device.matmul(1.0, dy(), Mat::new(params[factors.b].operand(), out, r), 0.0, MatMut::new(dyb, rows, r));
        self.add_gradient(params, factors.b, |scaling, db| {
            device.matmul(scaling, dy().t(), Mat::new(xa, rows, r), 1.0, MatMut::new(db, out, r));
        });
        self.add_gradient(params, factors.a, |scaling, da| {
            let x = match pass.dropout_of(linear.weight, inner) {
                Some(dropout) => {
                    device.dropout_forward(dropout, x, dropped);
                    &*dropped
                }
                None => x,
            };
            let (dyb, x) = (Mat::new(&*dyb, rows, r), Mat::new(x, rows, inner));
            device.matmul(scaling, dyb.t(), x, 1.0, MatMut::new(da, r, inner));
        });
        if let Scaling::Tanh(at) = factors.scaling {
            let Param { value: p, grad, .. } = &mut params[at];
            grad.iter_mut().for_each(|dp| device.tanh_backward(p, dyb, xa, dp));
        }
    }

    /// Lets `add` add to the gradient of the parameter at this place, if it has one; it is told s.
    fn add_gradient(
        &self,
        params: &mut [Param<D>],
        at: usize,
        add: impl FnOnce(Factor<'_, D::Buffer>, &mut D::Buffer),
    ) {
        let Some(mut grad) = params[at].grad.take() else { return };
        add(self.factors.scaling.factor(params), &mut grad);
        params[at].grad = Some(grad);
    }

    /// `dW = dyᵀ x`, `dB += s dW Aᵀ`, `dA += s Bᵀ dW`.
    fn gradients_from_whole(&self, params: &mut [Param<D>], dw: &mut D::Buffer) {
        let LowRank { device, linear, factors, pass, x, dy } = *self;
        let ((out, inner), rows, r) = (linear.dims(params), pass.rows, params[factors.a].shape[0]);
        let (x, dy) = (Mat::new(x, rows, inner), Mat::new(dy, rows, out));
        device.matmul(1.0, dy.t(), x, 0.0, MatMut::new(dw, out, inner));
        let Scaling::Fixed(scaling) = factors.scaling else { unreachable!("a trained scaling needs x Aᵀ") };
        let [a, b] = params.get_disjoint_mut([factors.a, factors.b]).expect("A and B are two parameters");
        if let Some(db) = &mut b.grad {
            let a = Mat::new(a.operand(), r, inner);
            device.matmul(scaling, Mat::new(dw, out, inner), a.t(), 1.0, MatMut::new(db, out, r));
        }
        if let Some(da) = &mut a.grad {
            let b = Mat::new(b.operand(), out, r);
            device.matmul(scaling, b.t(), Mat::new(dw, out, inner), 1.0, MatMut::new(da, r, inner));
        }
    }
}

/// Extents of the product of a layer, for [`Product::choose`].
pub(super) fn extents((out, inner): (usize, usize), rows: usize, r: usize) -> Extents {
    Extents { rows, out, inner, r }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{ParamKind, params::Param},
        ops::{
            Cpu,
            testing::{assert_close, dot, gradient, noise, wide},
        },
    };

    const ROWS: usize = 7;
    const OUT: usize = 6;
    const INNER: usize = 5;
    const R: usize = 3;

    /// y (rows, out) in f64. `values` are W, A, B and p or s; `mask` multiplies x before A.
    fn reference(x: &[f64], values: &[Vec<f64>], mask: &[f64], tanh: bool) -> Vec<f64> {
        let [w, a, b, s] = values else { unreachable!() };
        let s = if tanh { s[0].tanh() } else { s[0] };
        let rows = (0..ROWS * OUT).map(|at| {
            let (n, o) = (at / OUT, at % OUT);
            let x = &x[n * INNER..][..INNER];
            let dropped: Vec<f64> = x.iter().zip(&mask[n * INNER..]).map(|(x, m)| x * m).collect();
            let low: f64 = (0..R).map(|j| dot(&dropped, &a[j * INNER..][..INNER]) * b[o * R + j]).sum();
            dot(x, &w[o * INNER..][..INNER]) + s * low
        });
        rows.collect()
    }

    /// Forward, dx and every gradient against f64 and its differences, `dx` and gradients added to what was there.
    fn check(product: Product, dropout: Option<Dropout>, tanh: bool) {
        let what = format!("{product:?} {dropout:?} {tanh}");
        let shapes = [vec![OUT, INNER], vec![R, INNER], vec![OUT, R], vec![1]];
        let kinds = [ParamKind::Linear, ParamKind::LoraA, ParamKind::LoraB, ParamKind::LoraScaling];
        let mut params: Vec<Param<Cpu>> = Vec::new();
        for (i, (shape, kind)) in shapes.into_iter().zip(kinds).enumerate() {
            let values = noise(10 + i as u64, shape.iter().product());
            let mut param = Param::new(format!("{kind:?}"), kind, shape, values);
            param.set_trainable(&Cpu, kind != ParamKind::Linear);
            if let Some(grad) = &mut param.grad {
                grad.fill(0.25);
            }
            params.push(param);
        }
        let scaling = if tanh { Scaling::Tanh(3) } else { Scaling::Fixed(params[3].value[0]) };
        let linear = Linear { weight: 0, lora: Some(Factors { a: 1, b: 2, scaling, product }) };
        let pass = Pass { rows: ROWS, dropout, first_row: 0 };
        let layers = [Needs { out: OUT, inner: INNER, product: Some(product), quantised: false }];
        let mut scratch = LinearScratch::new(&Cpu, Element::F32, &layers, ROWS, R, dropout.is_some());
        let (x, dy, mut y) = (noise(1, ROWS * INNER), noise(2, ROWS * OUT), noise(3, ROWS * OUT));
        let (mut dx, mut xa) = (noise(4, ROWS * INNER), vec![0.0; ROWS * R]);
        let mut mask = vec![1.0; ROWS * INNER];
        if let Some(dropout) = pass.dropout_of(0, INNER) {
            Cpu.dropout_forward(dropout, &vec![1.0; ROWS * INNER], &mut mask);
            assert!(mask.contains(&0.0));
        }
        let (x64, mask, dy64) = (wide(&x), wide(&mask), wide(&dy));
        let values: Vec<Vec<f64>> = params.iter().map(|p| wide(&p.value)).collect();
        let add = |start: &[f32], half: f64, more: Vec<f64>| -> Vec<f64> {
            wide(start).iter().zip(more).map(|(a, b)| half * a + b).collect()
        };
        let expected_y = reference(&x64, &values, &mask, tanh);
        let expected_dx = add(&dx, 0.5, gradient(&x64, |x| dot(&reference(x, &values, &mask, tanh), &dy64)));

        linear.forward(&Cpu, &params, pass, &x, Some(&mut xa), &mut scratch, &mut y);
        assert_close(&format!("{what} y"), &y, &expected_y, 1e-6);
        let kept = (product == Product::Factored).then_some(&xa);
        linear.weight_gradients(&Cpu, &mut params, pass, &x, kept, &mut scratch, &dy);
        linear.input_gradient(&Cpu, &params, pass, &mut scratch, &dy, 0.5, &mut dx);
        assert_close(&format!("{what} dx"), &dx, &expected_dx, 1e-6);
        for at in 1..if tanh { 4 } else { 3 } {
            let loss = |value: &[f64]| {
                let mut values = values.clone();
                values[at] = value.to_vec();
                dot(&reference(&x64, &values, &mask, tanh), &dy64)
            };
            let expected: Vec<f64> = gradient(&values[at], loss).iter().map(|g| g + 0.25).collect();
            assert_close(&format!("{what} {}", params[at].name), params[at].grad.as_ref().unwrap(), &expected, 2e-6);
        }
    }

    #[test]
    fn every_way_to_compute_the_product_matches_f64_and_its_differences() {
        for product in [Product::Factored, Product::Formed, Product::WholeGradient] {
            check(product, None, false);
        }
        check(Product::Factored, None, true);
        check(Product::Formed, None, true);
    }

    #[test]
    fn dropout_is_the_same_in_forward_and_backward() {
        let dropout = Some(Dropout { p: 0.4, key: 5, first_run: 0 });
        check(Product::Factored, dropout, false);
        check(Product::Factored, dropout, true);
    }
}
