"""Matrices in few bits as bitsandbytes quantises them, from values that the tests make again."""

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import save_file

ROWS, COLS = 151, 127
SHOWN = 3001  # values that are kept


def values(seed, n):
    """0.1 x^3 of the linear congruential numbers x in (-1, 1) of `noise` in src/ops/mod.rs."""
    state = seed * 0x9E3779B97F4A7C15 % 2**64 | 1
    numbers = np.empty(n, dtype=np.float32)
    for i in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        numbers[i] = np.float32(state >> 40) / np.float32(1 << 23) - np.float32(1)
    return torch.from_numpy(np.float32(0.1) * (numbers * numbers * numbers))


def make(out):
    (out / "quantised").mkdir(parents=True)
    x = values(5, ROWS * COLS)
    single_codes, single = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=False)
    double_codes, double = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    assert torch.equal(single_codes, double_codes)
    int8, rows, _ = bnb.int8_vectorwise_quant(x.reshape(ROWS, COLS))
    tensors = {
        "nf4.codes": single_codes.flatten(),
        "nf4.scales": single.absmax,
        "nf4.values": bnb.dequantize_4bit(single_codes, single)[:SHOWN],
        "nf4_double.scales": double.absmax,
        "nf4_double.nested": double.state2.absmax,
        "nf4_double.offset": double.offset.reshape(1),
        "nf4_double.values": bnb.dequantize_4bit(double_codes, double)[:SHOWN],
        "int8.codes": int8.flatten(),
        "int8.scales": rows,
        "int8.values": bnb.int8_vectorwise_dequant(int8, rows).flatten()[:SHOWN],
    }
    save_file({name: t.clone() for name, t in tensors.items()}, out / "quantised" / "bitsandbytes.safetensors")
