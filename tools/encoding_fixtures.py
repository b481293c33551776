"""Small checkpoints in every encoding of weights that the program decodes, with the plain weights in f32.

Each folder holds `config.json`, `model.safetensors` (encoded) and `plain.safetensors` (what it means). 8-bit floats are PyTorch's, the
4-bit and int8 weights of bitsandbytes are quantised and decoded by bitsandbytes; what is packed into words is packed here, bit by bit.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

F32 = np.float32
rng = np.random.default_rng(20261128)


def values(*shape):
    return (0.1 * rng.standard_normal(shape)).astype(F32)


def save(out, name, config, encoded, plain):
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    as_torch = lambda t: (t if torch.is_tensor(t) else torch.from_numpy(np.ascontiguousarray(t))).contiguous()
    save_file({k: as_torch(v) for k, v in encoded.items()}, folder / "model.safetensors", {"format": "pt"})
    save_file({k: as_torch(v) for k, v in plain.items()}, folder / "plain.safetensors", {"format": "pt"})


def pack(codes, bits, axis, order=None):
    """Packs unsigned `codes` along `axis` into 32-bit words, bit field by bit field, the lowest first (or at `order`)."""
    codes = np.moveaxis(np.asarray(codes, np.uint64), axis, -1)
    per = 32 // bits
    words = np.zeros(codes.shape[:-1] + (-(-codes.shape[-1] // per),), np.uint64)
    for i in range(codes.shape[-1]):
        field = i % per if order is None else order[i % per]
        words[..., i // per] |= codes[..., i] << np.uint64(bits * field)
    return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


def fp8(out):
    def e4m3(shape):
        t = torch.from_numpy(values(*shape) * 300).to(torch.float8_e4m3fn)
        return t, t.float().numpy()

    q, x = e4m3((5, 7))
    s = np.abs(values(2, 3)) + F32(0.01)
    blocks = np.repeat(np.repeat(s, 4, 0), 3, 1)[:5, :7]
    experts, ex = e4m3((2, 3, 4))
    es = np.abs(values(2, 1, 1)) + F32(0.01)
    two, tx = torch.from_numpy(values(2, 6)).to(torch.float8_e5m2), None
    tx = two.float().numpy()
    save(out, "fp8_blocks", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 3]}},
         {"a.weight": q, "a.weight_scale_inv": s, "norm.weight": values(7)}, {"a.weight": x * blocks})
    save(out, "fp8_tensors", {"quantization_config": {"quant_method": "fp8"}},
         {"a.weight": q, "a.weight_scale_inv": np.array(0.5, F32) + s[0, 0], "e.gate": experts, "e.gate_scale_inv": es, "b.weight": two,
          "b.weight_scale_inv": s[0, :1]},
         {"a.weight": x * (F32(0.5) + s[0, 0]), "e.gate": ex * es, "b.weight": tx * s[0, 0]})
    rows = np.abs(values(5, 1)) + F32(0.01)
    save(out, "fbgemm_fp8", {"quantization_config": {"quant_method": "fbgemm_fp8"}}, {"a.weight": q, "a.weight_scale": rows}, {"a.weight": x * rows})


def bitsandbytes(out):
    import bitsandbytes.functional as bnb

    for kind, double in [("nf4", False), ("nf4", True), ("fp4", False)]:
        encoded, plain = {}, {}
        for name, shape in [("a.weight", (4, 128)), ("b.weight", (6, 96))]:
            w = torch.from_numpy(values(*shape))
            codes, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=double)
            packed = state.as_dict(packed=True)
            encoded[name] = codes
            encoded |= {f"{name}.{k}": v for k, v in packed.items()}
            # Blocks run over the flattened weight, also across rows, which not every version of the package decodes.
            flat = bnb.quantize_4bit(w.reshape(1, -1), quant_type=kind, compress_statistics=double)
            plain[name] = bnb.dequantize_4bit(*flat).reshape(shape).clone()
        save(out, f"bitsandbytes_{kind}{'_double' if double else ''}", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
             encoded, plain)
    w = torch.from_numpy(values(5, 24))
    q, s, _ = bnb.int8_vectorwise_quant(w)
    save(out, "bitsandbytes_int8", {"quantization_config": {"load_in_8bit": True}},
         {"a.weight": q, "a.SCB": s, "a.weight_format": np.array(0, np.uint8)}, {"a.weight": bnb.int8_vectorwise_dequant(q, s)})


def gptq(out):
    for name, bits, v2, act_order in [("gptq", 4, False, False), ("gptq_act_order", 4, False, True), ("gptq_v2_8bit", 8, True, False), ("gptq_2bit", 2, False, False)]:
        inputs, outputs, group = 32, 16, 16
        q = rng.integers(0, 1 << bits, (inputs, outputs))
        zero = rng.integers(1, (1 << bits) - 1, (inputs // group, outputs))
        scale = (np.abs(values(inputs // group, outputs)) + F32(0.01)).astype(np.float16)
        g = np.arange(inputs) // group
        if act_order:
            g = rng.permutation(g)
        encoded = {"a.qweight": pack(q, bits, 0), "a.qzeros": pack(zero - (0 if v2 else 1), bits, 1), "a.scales": scale}
        if act_order or v2:
            encoded["a.g_idx"] = g.astype(np.int32)
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
        plain = scale.astype(F32)[g] * (q - zero[g]).astype(F32)
        save(out, name, {"quantization_config": config}, encoded, {"a.weight": plain.T})


def awq(out):
    inputs, outputs, group = 32, 16, 16
    q, zero = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (inputs // group, outputs))
    scale = (np.abs(values(inputs // group, outputs)) + F32(0.01)).astype(np.float16)
    g, order = np.arange(inputs) // group, [0, 4, 1, 5, 2, 6, 3, 7]
    save(out, "awq", {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}},
         {"a.qweight": pack(q, 4, 1, order), "a.qzeros": pack(zero, 4, 1, order), "a.scales": scale},
         {"a.weight": (scale.astype(F32)[g] * (q - zero[g]).astype(F32)).T})


def compressed_tensors(out):
    def config(form, **weights):
        return {"quantization_config": {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}}

    q = torch.from_numpy(values(4, 10) * 300).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(np.abs(values(4, 1)) + F32(0.01)).to(torch.bfloat16)
    i8 = rng.integers(-128, 128, (3, 10)).astype(np.int8)
    save(out, "compressed_tensors_8bit", config("float-quantized", num_bits=8, type="float"),
         {"a.weight": q, "a.weight_scale": scale, "b.weight": i8, "b.weight_scale": np.array([0.125], F32)},
         {"a.weight": q.float() * scale.float(), "b.weight": i8.astype(F32) * F32(0.125)})
    encoded, plain = {}, {}
    for name, columns, groups, asymmetric, act_order in [("a", 32, 2, False, False), ("b", 20, 1, False, False), ("c", 32, 2, True, False), ("d", 32, 2, False, True)]:
        rows = 12
        q = rng.integers(0, 16, (rows, columns))
        s = torch.from_numpy(np.abs(values(rows, groups)) + F32(0.01)).to(torch.bfloat16)
        zero = rng.integers(0, 16, (rows, groups)) if asymmetric else np.full((rows, groups), 8)
        g = np.arange(columns) * groups // columns
        if act_order:
            g = rng.permutation(g)
            encoded[f"{name}.weight_g_idx"] = g.astype(np.int32)
        if asymmetric:
            encoded[f"{name}.weight_zero_point"] = pack(zero, 4, 0)
        encoded |= {f"{name}.weight_packed": pack(q, 4, 1), f"{name}.weight_scale": s, f"{name}.weight_shape": np.array([rows, columns])}
        plain[f"{name}.weight"] = (q - zero[:, g]).astype(F32) * s.float().numpy()[:, g]
    save(out, "compressed_tensors_4bit", config("pack-quantized", num_bits=4, type="int"), encoded, plain)
    codes = rng.integers(0, 16, (3, 32))
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
    s = torch.from_numpy(np.abs(values(3, 2)) * 300 + 1).to(torch.float8_e4m3fn)
    top = np.array([1234.5], F32)
    save(out, "compressed_tensors_nvfp4", config("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
         {"a.weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8), "a.weight_scale": s, "a.weight_global_scale": top},
         {"a.weight": table[codes] * np.repeat(s.float().numpy() / top, 16, 1)})


def mxfp4(out):
    experts, outputs, inputs = 2, 3, 64
    codes = rng.integers(0, 16, (experts, outputs, inputs))
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
    exponents = rng.integers(118, 130, (experts, outputs, inputs // 32)).astype(np.uint8)
    exponents[0, 0, 0] = 0
    factor = np.exp2(exponents.astype(np.float64) - 127).astype(F32)
    plain = table[codes] * np.repeat(factor, 32, 2)
    save(out, "mxfp4", {"quantization_config": {"quant_method": "mxfp4"}},
         {"e.gate_blocks": (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(experts, outputs, inputs // 32, 16),
          "e.gate_scales": exponents, "e.gate_bias": values(experts, outputs)},
         {"e.gate": plain.transpose(0, 2, 1)})


def mlx(out):
    encoded, plain = {}, {}
    for name, bits, group in [("a", 4, 16), ("b", 8, 32)]:
        q = rng.integers(0, 1 << bits, (5, 64))
        s, b = [values(5, 64 // group).astype(np.float16) for _ in range(2)]
        words = torch.from_numpy(pack(q, bits, 1).view(np.uint32))
        encoded |= {f"{name}.weight": words, f"{name}.scales": s, f"{name}.biases": b}
        plain[f"{name}.weight"] = np.repeat(s.astype(F32), group, 1) * q.astype(F32) + np.repeat(b.astype(F32), group, 1)
    save(out, "mlx", {"quantization": {"group_size": 16, "bits": 4, "b": {"group_size": 32, "bits": 8}}}, encoded, plain)


def make(out):
    for encoding in [fp8, bitsandbytes, gptq, awq, compressed_tensors, mxfp4, mlx]:
        encoding(out / "encodings")
