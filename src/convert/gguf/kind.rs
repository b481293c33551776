//! ggml's tensor types, and their numbers as f32.

use crate::{
    checkpoint::{Dtype, dtype},
    error::{Error, Result},
};
use candle_core::{
    Device,
    quantized::{GgmlDType, QStorage, QTensor},
};
use std::borrow::Cow;

/// How the numbers of a tensor are packed: as plain floats, or in blocks that share scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    id: u32,
    name: &'static str,
    packing: Packing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Plain(Dtype),
    Blocks(GgmlDType),
}

use Packing::{Blocks, Plain};

/// The numbers and names are ggml's (`enum ggml_type`).
const KINDS: [(u32, &str, Packing); 15] = [
    (0, "F32", Plain(Dtype::F32)),
    (1, "F16", Plain(Dtype::F16)),
    (2, "Q4_0", Blocks(GgmlDType::Q4_0)),
    (3, "Q4_1", Blocks(GgmlDType::Q4_1)),
    (6, "Q5_0", Blocks(GgmlDType::Q5_0)),
    (7, "Q5_1", Blocks(GgmlDType::Q5_1)),
    (8, "Q8_0", Blocks(GgmlDType::Q8_0)),
    (10, "Q2_K", Blocks(GgmlDType::Q2K)),
    (11, "Q3_K", Blocks(GgmlDType::Q3K)),
    (12, "Q4_K", Blocks(GgmlDType::Q4K)),
    (13, "Q5_K", Blocks(GgmlDType::Q5K)),
    (14, "Q6_K", Blocks(GgmlDType::Q6K)),
    (15, "Q8_K", Blocks(GgmlDType::Q8K)),
    (28, "F64", Plain(Dtype::F64)),
    (30, "BF16", Plain(Dtype::BF16)),
];

/// Known by name only.
const OTHERS: [(u32, &str); 19] = [
    (9, "Q8_1"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

impl Kind {
    /// The type with ggml's number `id`, or how to call the one that cannot be read.
    pub fn from_id(id: u32) -> std::result::Result<Kind, String> {
        if let Some(&(id, name, packing)) = KINDS.iter().find(|k| k.0 == id) {
            return Ok(Kind { id, name, packing });
        }
        let name = OTHERS.iter().find(|k| k.0 == id).map(|k| k.1.to_owned());
        Err(name.unwrap_or_else(|| format!("number {id}")))
    }

    /// The types that can be read, for messages.
    pub fn supported() -> String {
        KINDS.map(|k| k.1).join(", ")
    }

    /// ggml's name: `Q4_1`.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Elements of a block.
    pub fn block(self) -> usize {
        match self.packing {
            Plain(_) => 1,
            Blocks(kind) => kind.block_size(),
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self.packing {
            Plain(dtype) => dtype.bitsize() / 8,
            Blocks(kind) => kind.type_size(),
        }
    }

    /// The type that holds every value as it is: its own, and F32 for blocks, whose arithmetic is f32.
    pub fn natural_dtype(self) -> Dtype {
        match self.packing {
            Plain(dtype) => dtype,
            Blocks(_) => Dtype::F32,
        }
    }

    /// The values of whole blocks. `bytes` begins at a multiple of 8 in memory.
    pub fn decode(self, bytes: &[u8]) -> Result<Vec<f32>> {
        let count = bytes.len() / self.block_bytes() * self.block();
        match self.packing {
            Plain(dtype) => {
                let mut values = vec![0.0; count];
                dtype::decode_f32(dtype, bytes, &mut values)?;
                Ok(values)
            }
            Blocks(_) if count == 0 => Ok(Vec::new()),
            Blocks(kind) => unpack(kind, bytes, count)
                .map_err(|e| Error::environment(format!("cannot unpack {count} values of {}: {e}", self.name))),
        }
    }
}

fn unpack(kind: GgmlDType, bytes: &[u8], count: usize) -> candle_core::Result<Vec<f32>> {
    let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, kind)?;
    QTensor::new(storage, count)?.dequantize(&Device::Cpu)?.to_vec1()
}
