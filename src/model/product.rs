//! Three ways to compute `y = x (W + s B A)ᵀ` and its gradients, and which of them takes the fewest operations.

use super::lora::LoraSpec;
use serde::{Deserialize, Serialize};

/// How a low-rank product is computed. All give the same result up to rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// `x Wᵀ + s (x Aᵀ) Bᵀ`: `x Aᵀ` is kept for backward. The only way with dropout, which stands between x and A.
    Factored,
    /// `W + s B A` is formed first; forward and the gradient of x take one product each.
    Formed,
    /// Formed, and the gradients of A and B come from that of the whole weight: `dA = s Bᵀ dW`, `dB = s dW Aᵀ`.
    /// Cheaper where r is large for the matrix.
    WholeGradient,
}

/// What a user may ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProductChoice {
    /// Per weight, whichever takes the fewest operations.
    #[default]
    Auto,
    /// Always `x Wᵀ + s (x Aᵀ) Bᵀ`.
    Factored,
    /// Always form `W + s B A`.
    Formed,
    /// Always form it, and the gradient of the whole weight.
    WholeGradient,
}

/// The extents of one low-rank product: x (rows, inner), W (out, inner), rank r.
#[derive(Clone, Copy, Debug)]
pub struct Extents {
    /// N.
    pub rows: usize,
    /// Rows of W.
    pub out: usize,
    /// Columns of W.
    pub inner: usize,
    /// Rank.
    pub r: usize,
}

impl Product {
    /// Floating-point operations of one forward and backward, W frozen.
    pub fn flops(self, Extents { rows, out, inner, r }: Extents) -> u64 {
        let [n, o, i, r] = [rows, out, inner, r].map(|x| x as u64);
        let whole = 2 * n * o * i;
        let thin = 2 * n * r * (o + i);
        // One product of the factors, or of a factor and a whole gradient.
        let square = 2 * o * i * r;
        match self {
            Product::Factored => 2 * whole + 3 * thin,
            Product::Formed => 2 * whole + 2 * thin + 2 * square,
            Product::WholeGradient => 3 * whole + 4 * square,
        }
    }

    /// The way that the factors ask for. There is but one with dropout, and where the weight is not `exact`: in the sum with
    /// it, a small delta would be lost. A trained scaling needs `x Aᵀ`.
    pub(super) fn choose(spec: &LoraSpec, extents: Extents, exact: bool) -> Product {
        let train_scaling = spec.train_scaling;
        match spec.product {
            _ if spec.dropout > 0.0 || !exact => Product::Factored,
            ProductChoice::Factored => Product::Factored,
            ProductChoice::Formed => Product::Formed,
            ProductChoice::WholeGradient if !train_scaling => Product::WholeGradient,
            ProductChoice::WholeGradient => Product::Formed,
            ProductChoice::Auto => {
                let ways = [Product::Formed, Product::Factored, Product::WholeGradient];
                let possible = ways.into_iter().filter(|w| !(train_scaling && *w == Product::WholeGradient));
                possible.min_by_key(|w| w.flops(extents)).unwrap_or(Product::Factored)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_way_depends_on_rank_and_rows() {
        let choose = |rows, width, r| {
            let extents = Extents { rows, out: width, inner: width, r };
            Product::choose(&LoraSpec::new(r, 1.0), extents, true)
        };
        // Few rows: forming the weight costs more than it saves.
        assert_eq!(choose(64, 512, 8), Product::Factored);
        assert_eq!(choose(4096, 768, 128), Product::Formed);
        // r beyond a quarter of the width.
        assert_eq!(choose(4096, 256, 128), Product::WholeGradient);
        let extents = Extents { rows: 4096, out: 256, inner: 256, r: 128 };
        let spec = |product| LoraSpec { product, ..LoraSpec::new(128, 1.0) };
        let scaled = LoraSpec { train_scaling: true, ..spec(ProductChoice::Auto) };
        assert_eq!(Product::choose(&scaled, extents, true), Product::Formed);
        let dropped = LoraSpec { dropout: 0.1, ..spec(ProductChoice::Formed) };
        assert_eq!(Product::choose(&dropped, extents, true), Product::Factored);
        assert_eq!(Product::choose(&spec(ProductChoice::WholeGradient), extents, false), Product::Factored);
    }
}
