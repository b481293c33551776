//! Weights in a few bits each, as quantise.cu computes them.

use super::{Arg, Cuda, THREADS, WARPS, buffer::CudaBuffer, memory::Memory, typed};
use crate::ops::{
    Element, Quantisation, Quantised, Scales,
    quantise::{NESTED, NF4, dynamic},
};

/// A matrix in few bits on a GPU.
pub struct CudaQuantised {
    how: Quantisation,
    rows: usize,
    cols: usize,
    codes: Memory,
    /// f32, or codes where there are nested ones.
    scales: Memory,
    nested: Option<Nested>,
}

struct Nested {
    scales: Memory,
    offset: Memory,
}

impl CudaQuantised {
    fn len(&self) -> usize {
        self.rows * self.cols
    }

    fn blocks(&self) -> usize {
        self.len().div_ceil(self.how.block(self.cols))
    }

    /// Room for a matrix.
    fn new(cuda: &Cuda, how: Quantisation, rows: usize, cols: usize) -> CudaQuantised {
        let (n, blocks) = (rows * cols, (rows * cols).div_ceil(how.block(cols)));
        let double = how == Quantisation::Nf4 { double: true };
        CudaQuantised {
            how,
            rows,
            cols,
            codes: cuda.allocate_bytes(if how == Quantisation::Int8 { n } else { n.div_ceil(2) }),
            scales: cuda.allocate_bytes(if double { blocks } else { 4 * blocks }),
            nested: double.then(|| Nested { scales: cuda.allocate(blocks.div_ceil(NESTED)), offset: cuda.allocate(1) }),
        }
    }
}

impl Cuda {
    /// The numbers of NF4 and of scales.
    fn tables(&self) -> &CudaBuffer {
        use crate::ops::Device;
        self.0.tables.get_or_init(|| self.upload(&[&NF4[..], dynamic()].concat()))
    }

    pub(super) fn quantise_matrix(&self, how: Quantisation, rows: usize, cols: usize, x: &CudaBuffer) -> CudaQuantised {
        assert!(x.len == rows * cols && x.element == Element::F32, "quantise: extents");
        let result = CudaQuantised::new(self, how, rows, cols);
        let (n, blocks) = (x.len, result.blocks());
        let scales = self.allocate(blocks);
        let grid = [blocks.div_ceil(WARPS as usize) as u32, 1, 1];
        let block = how.block(cols) as u32;
        self.launch("quantise_scales", grid, 0, &[x.into(), n.into(), block.into(), (&scales).into()]);
        let (codes, tables): (Arg, Arg) = ((&result.codes).into(), self.tables().into());
        if how == Quantisation::Int8 {
            self.launch_each("quantise_int8", n, &[x.into(), n.into(), block.into(), (&scales).into(), codes]);
        } else {
            let args = [x.into(), n.into(), (&scales).into(), tables, codes];
            self.launch_each("quantise_nf4", n.div_ceil(2), &args);
        }
        let Some(nested) = &result.nested else { return CudaQuantised { scales, ..result } };
        let sum = self.allocate(2);
        self.fill_words(&sum, 0);
        self.add_up_raw("sum_parts", vec![(&scales).into()], blocks, 1.0, (&sum).into());
        let inputs = [(&scales).into(), blocks.into(), (&sum).into(), self.tables().into()];
        let outputs = [&result.scales, &nested.scales, &nested.offset].map(Arg::from);
        let args: Vec<Arg> = inputs.into_iter().chain(outputs).collect();
        assert_eq!(NESTED, THREADS as usize, "a thread per scale");
        self.launch("quantise_nested", [blocks.div_ceil(NESTED) as u32, 1, 1], 0, &args);
        result
    }

    pub(super) fn dequantise_matrix(&self, x: &CudaQuantised, y: &mut CudaBuffer) {
        assert_eq!(y.len, x.len(), "dequantise: extents");
        let (n, blocks) = (x.len(), x.blocks());
        let wide = x.nested.as_ref().map(|nested| {
            let scales = self.allocate(blocks);
            let inputs = [(&x.scales).into(), blocks.into(), (&nested.scales).into(), (&nested.offset).into()];
            let args: Vec<Arg> = inputs.into_iter().chain([self.tables().into(), (&scales).into()]).collect();
            self.launch_each("dequantise_nested", blocks, &args);
            scales
        });
        let (codes, scales): (Arg, Arg) = ((&x.codes).into(), wide.as_ref().unwrap_or(&x.scales).into());
        if x.how == Quantisation::Int8 {
            let args = [codes, n.into(), (x.cols as u32).into(), scales, (&y).into()];
            self.launch_each(typed!("dequantise_int8", y.element), n, &args);
        } else {
            let args = [codes, n.into(), scales, self.tables().into(), (&y).into()];
            self.launch_each(typed!("dequantise_nf4", y.element), n.div_ceil(2), &args);
        }
    }

    pub(super) fn download_matrix(&self, x: &CudaQuantised) -> Quantised {
        let bytes = |memory: &Memory, n: usize| {
            let mut bytes = vec![0u8; n];
            self.after_flush(|_| memory.read(&mut bytes));
            bytes
        };
        let floats = |memory: &Memory, n: usize| {
            let mut floats = vec![f32::NAN; n];
            self.after_flush(|_| memory.read(&mut floats));
            floats
        };
        let codes = if x.how == Quantisation::Int8 { x.len() } else { x.len().div_ceil(2) };
        let scales = match &x.nested {
            None => Scales::F32(floats(&x.scales, x.blocks())),
            Some(nested) => Scales::Double {
                codes: bytes(&x.scales, x.blocks()),
                nested: floats(&nested.scales, x.blocks().div_ceil(NESTED)),
                offset: floats(&nested.offset, 1)[0],
            },
        };
        Quantised { how: x.how, rows: x.rows, cols: x.cols, codes: bytes(&x.codes, codes), scales }
    }

    pub(super) fn upload_matrix(&self, x: &Quantised) -> CudaQuantised {
        let mut result = CudaQuantised::new(self, x.how, x.rows, x.cols);
        self.after_flush(|_| {
            result.codes.write(&x.codes)?;
            match (&x.scales, &mut result.nested) {
                (Scales::F32(scales), _) => result.scales.write(scales),
                (Scales::Double { codes, nested, offset }, Some(own)) => {
                    result.scales.write(codes)?;
                    own.scales.write(nested)?;
                    own.offset.write(&[*offset])
                }
                (Scales::Double { .. }, None) => unreachable!("nested scales are made for double quantisation"),
            }
        });
        result
    }
}
