//! A linear layer with or without LoRA: `y = x Wᵀ + s (x Aᵀ) Bᵀ`; x (N, in), W (out, in), A (r, in), B (out, r).

use super::params::Param;
use crate::ops::{Device, Mat, MatMut};

/// Where the weight is in the list of parameters and, if there are LoRA factors, A, B and the scaling s.
#[derive(Clone, Copy)]
pub(super) struct Linear {
    pub weight: usize,
    pub lora: Option<(usize, usize, f32)>,
}

impl Linear {
    /// `(out, in)`.
    fn dims<D: Device>(&self, params: &[Param<D>]) -> (usize, usize) {
        (params[self.weight].shape[0], params[self.weight].shape[1])
    }

    /// `y = beta · y + x Wᵀ + s (x Aᵀ) Bᵀ`. `xa` receives `x Aᵀ` (N, r), kept for backward.
    #[allow(clippy::too_many_arguments)]
    pub fn forward<D: Device>(
        &self,
        device: &D,
        params: &[Param<D>],
        rows: usize,
        x: &D::Buffer,
        xa: Option<&mut D::Buffer>,
        beta: f32,
        y: &mut D::Buffer,
    ) {
        let (out, inner) = self.dims(params);
        let weight = Mat::new(&params[self.weight].value, out, inner);
        device.matmul(1.0, Mat::new(x, rows, inner), weight.t(), beta, MatMut::new(y, rows, out));
        if let (Some((a, b, scaling)), Some(xa)) = (self.lora, xa) {
            let r = params[a].shape[0];
            let (a, b) = (Mat::new(&params[a].value, r, inner), Mat::new(&params[b].value, out, r));
            device.matmul(1.0, Mat::new(x, rows, inner), a.t(), 0.0, MatMut::new(xa, rows, r));
            device.matmul(scaling, Mat::new(xa, rows, r), b.t(), 1.0, MatMut::new(y, rows, out));
        }
    }

    /// `dx = beta · dx + dy W + s (dy B) A`; what trains of W, A, B gets its gradient added. `dyb` is scratch (N, r).
    #[allow(clippy::too_many_arguments)]
    pub fn backward<D: Device>(
        &self,
        device: &D,
        params: &mut [Param<D>],
        rows: usize,
        x: &D::Buffer,
        lora_scratch: Option<(&D::Buffer, &mut D::Buffer)>,
        dy: &D::Buffer,
        beta: f32,
        dx: &mut D::Buffer,
    ) {
        let (out, inner) = self.dims(params);
        let (x, dy) = (|| Mat::new(x, rows, inner), || Mat::new(dy, rows, out));
        let Param { value, grad, .. } = &mut params[self.weight];
        if let Some(dw) = grad {
            device.matmul(1.0, dy().t(), x(), 1.0, MatMut::new(dw, out, inner));
        }
        device.matmul(1.0, dy(), Mat::new(value, out, inner), beta, MatMut::new(dx, rows, inner));
        if let (Some((a, b, scaling)), Some((xa, dyb))) = (self.lora, lora_scratch) {
            let r = params[a].shape[0];
            if let Some(db) = &mut params[b].grad {
                device.matmul(scaling, dy().t(), Mat::new(xa, rows, r), 1.0, MatMut::new(db, out, r));
            }
            device.matmul(scaling, dy(), Mat::new(&params[b].value, out, r), 0.0, MatMut::new(dyb, rows, r));
            if let Some(da) = &mut params[a].grad {
                device.matmul(1.0, Mat::new(dyb, rows, r).t(), x(), 1.0, MatMut::new(da, r, inner));
            }
            let a = Mat::new(&params[a].value, r, inner);
            device.matmul(1.0, Mat::new(dyb, rows, r), a, 1.0, MatMut::new(dx, rows, inner));
        }
    }
}
