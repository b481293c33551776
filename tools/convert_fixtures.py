"""The part of make_fixtures.py for `convert`: a GGUF file with every supported type, and pickled checkpoints."""

import hashlib
import json

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file, save_file

# One small LLaMA. Columns of 256 hold blocks of 256, columns of 32 blocks of 32.
HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 256, 32, 2, 1, 16, 32
TYPES = {
    "token_embd": T.Q8_0, "output": T.Q6_K,
    "blk.0.attn_q": T.Q2_K, "blk.0.attn_k": T.Q3_K, "blk.0.attn_v": T.Q4_K, "blk.0.attn_output": T.Q4_0,
    "blk.0.ffn_gate": T.Q5_K, "blk.0.ffn_up": T.Q6_K, "blk.0.ffn_down": T.Q4_1,
    "blk.1.attn_q": T.F16, "blk.1.attn_k": T.Q8_K, "blk.1.attn_v": T.BF16, "blk.1.attn_output": T.Q5_0,
    "blk.1.ffn_gate": T.F32, "blk.1.ffn_up": T.Q8_0, "blk.1.ffn_down": T.Q5_1,
}
SHAPES = {
    "attn_q": (HEADS * HEAD, HIDDEN), "attn_k": (KV_HEADS * HEAD, HIDDEN), "attn_v": (KV_HEADS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
    "token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN),
}
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm",
}


def make(out):
    gguf_file(out)
    pickles(out)


def gguf_file(out):
    rng = np.random.default_rng(90220)
    folder = out / "gguf"
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "types.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    vocabulary(writer)
    expected = {}
    norms = ["output_norm"] + [f"blk.{i}.{n}" for i in range(2) for n in ("attn_norm", "ffn_norm")]
    for name in norms:
        values = (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
        expected[name] = values
    for name, kind in TYPES.items():
        shape = SHAPES[name.split(".")[-1]]
        raw, values = blocks(rng, kind, shape)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
        expected[name] = values.reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = {}
    for name, values in expected.items():
        kind = name.split(".")[-1]
        if kind in ("attn_q", "attn_k"):
            # What the converter of llama.cpp did to the rows of each head, undone.
            heads = HEADS if kind == "attn_q" else KV_HEADS
            values = values.reshape(heads, HEAD // 2, 2, HIDDEN).swapaxes(1, 2).reshape(values.shape)
        new = NAMES[kind] if "." not in name else f"model.layers.{name.split('.')[1]}.{NAMES[kind]}"
        values = np.ascontiguousarray(values, dtype=np.float32)
        report[f"{new}.weight"] = {
            "stored_as": TYPES.get(name, T.F32).name,
            "shape": list(values.shape),
            "first": [float(v) for v in values.reshape(-1)[:4]],
            "sha256_f32": hashlib.sha256(values.tobytes()).hexdigest(),
        }
    (folder / "types.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def vocabulary(writer):
    tokens = ["<s>", "</s>", "<tool>"] + [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["Ġ", "th", "the"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 4] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")


def blocks(rng, kind, shape):
    """Stored bytes, and the values that the `gguf` package reads from them."""
    if kind in (T.F32, T.F16, T.BF16):
        values = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        raw = values if kind == T.F32 else values.astype(np.float16) if kind == T.F16 else gguf.quantize(values, kind)
        return raw, gguf.dequantize(raw, kind) if kind == T.BF16 else raw.astype(np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = shape[0] * shape[1] // block
    # Any bytes are valid but for the scales, which are f16 (f32 in Q8_K).
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    scale = lambda: (0.01 * rng.standard_normal(count)).astype(np.float16).view(np.uint8).reshape(count, 2)
    places = {T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.Q4_0: [0], T.Q4_1: [0, 2],
              T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0]}
    for place in places.get(kind, []):
        raw[:, place : place + 2] = scale()
    if kind == T.Q8_K:
        d = (0.01 * rng.standard_normal(count)).astype(np.float32)
        raw[:, :4] = d.view(np.uint8).reshape(count, 4)
        values = d[:, None] * raw[:, 4:260].view(np.int8).astype(np.float32)
    else:
        values = gguf.dequantize(raw, kind)
    return raw.reshape(shape[0], -1), values


def pickles(out):
    """tiny_llama_bf16 as older versions of transformers saved it; and what else a pickled state dict can hold."""
    weights = {}
    for path in sorted((out / "tiny_llama_bf16").glob("*.safetensors")):
        weights |= load_file(path)
    folder = out / "tiny_llama_bin"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((out / "tiny_llama_bf16" / "config.json").read_text())
    names = sorted(weights)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": {}}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        index["weight_map"] |= {name: file for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")

    generator = torch.Generator().manual_seed(90221)
    matrix = torch.randn(6, 4, generator=generator)
    state = {
        "plain.weight": matrix,
        "tied.weight": matrix,
        "transposed.weight": torch.randn(4, 6, generator=generator).T,
        "slice.weight": torch.randn(8, 8, generator=generator)[2:5, ::3],
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
        "half": torch.randn(5, generator=generator).half(),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    folder = out / "pickles"
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": state, "epoch": 3}, folder / "odd.bin")
    save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, folder / "odd.safetensors")
    torch.save(state, folder / "odd_legacy.bin", _use_new_zipfile_serialization=False)
