#!/usr/bin/env python3
"""Computes fixtures/ with PyTorch, transformers and PEFT: models, adapters, and the results the tests compare with.

    python -m venv venv && venv/bin/pip install -r tools/requirements-fixtures.txt
    venv/bin/python tools/make_fixtures.py

Everything is seeded; the same versions give the same files on the same kind of processor. fixtures/README.md says what
each file is for and how close the program has to come.
"""

import json
import math
import shutil
from pathlib import Path

import convert_fixtures
import numpy as np
import encoding_fixtures
import quantised_fixtures
import tokenizer_fixtures
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "fixtures"
TEXT = ROOT / "LICENSE"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WINDOWS, WINDOW = 4, 48  # windows per batch, tokens per window
R, LORA_ALPHA = 4, 8


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    OUT.mkdir(exist_ok=True)
    for folder in OUT.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    models()
    adapters()
    merges()
    gradients()
    full_training()
    relora_training()
    spectra()
    schedules()
    convert_fixtures.make(OUT)
    tokenizer_fixtures.make(OUT, TEXT)
    quantised_fixtures.make(OUT)
    encoding_fixtures.make(OUT)


# --- inputs -----------------------------------------------------------------------------------------------------------


def models():
    """tiny_llama (one f32 file) and the same weights rounded to bf16, in shards."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=10000.0,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(90210)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.1 * noise)
    model.save_pretrained(OUT / "tiny_llama")
    model.to(torch.bfloat16).save_pretrained(OUT / "tiny_llama_bf16", max_shard_size="60KB")
    for folder in ("tiny_llama", "tiny_llama_bf16"):
        (OUT / folder / "generation_config.json").unlink(missing_ok=True)


def base(folder="tiny_llama", dtype=torch.float32):
    return LlamaForCausalLM.from_pretrained(OUT / folder, dtype=dtype, attn_implementation="eager")


def adapters():
    """A plain adapter in f32; one in bf16 with rsLoRA, a rank per module and an alpha per module."""
    plain = LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    patterns = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 6, "down_proj": 2}, alpha_pattern={"up_proj": 3}, task_type="CAUSAL_LM",
    )
    for name, config, seed in (("tiny_adapter", plain, 90211), ("patterns_adapter", patterns, 90212)):
        model = get_peft_model(base(), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.copy_(0.05 * torch.randn(p.shape, generator=generator))
        save_adapter(model, OUT / name)
    (OUT / "tiny_adapter_bin").mkdir(exist_ok=True)
    shutil.copy(OUT / "tiny_adapter" / "adapter_config.json", OUT / "tiny_adapter_bin")
    torch.save(load_file(OUT / "tiny_adapter" / "adapter_model.safetensors"), OUT / "tiny_adapter_bin" / "adapter_model.bin")
    path = OUT / "patterns_adapter" / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path, {"format": "pt"})


def save_adapter(peft_model, folder):
    peft_model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "tiny_llama"
    config["target_modules"].sort()  # a set in PEFT
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


# --- what PEFT makes of them ------------------------------------------------------------------------------------------


def merges():
    for name, base_folder, adapter, dtype in (
        ("tiny_adapter_f32", "tiny_llama", "tiny_adapter", torch.float32),
        ("tiny_adapter_bf16", "tiny_llama_bf16", "tiny_adapter", torch.bfloat16),
        ("patterns_adapter_f32", "tiny_llama", "patterns_adapter", torch.float32),
        ("patterns_adapter_bf16", "tiny_llama_bf16", "patterns_adapter", torch.bfloat16),
    ):
        before = {k: v.clone() for k, v in base(base_folder, dtype).state_dict().items()}
        after = PeftModel.from_pretrained(base(base_folder, dtype), OUT / adapter).merge_and_unload().state_dict()
        changed = {k: v.contiguous() for k, v in after.items() if not torch.equal(v, before[k])}
        (OUT / "merged").mkdir(exist_ok=True)
        save_file(changed, OUT / "merged" / f"{name}.safetensors")


# --- training ---------------------------------------------------------------------------------------------------------


def llama_loss(w, tokens, lora=None):
    """The model written out, so that all of it runs in the dtype of its weights (transformers computes norms, softmax and
    loss in f32 whatever the dtype): mean over the WINDOWS * (WINDOW - 1) predictions of the next token in each window.
    w: tensor name -> weight; lora: module name -> (A, B). B batch, T time, H heads, D head size."""
    eps, theta, heads, kv_heads, head = 1e-6, 10000.0, 4, 2, 16
    lora = lora or {}

    def norm(x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        if name in lora:
            a_factor, b_factor = lora[name]
            y = y + LORA_ALPHA / R * ((x @ a_factor.T) @ b_factor.T)
        return y

    def rotate(x_BHTD):
        t = torch.arange(x_BHTD.shape[2], dtype=x_BHTD.dtype)
        angle = t[:, None] * theta ** (-torch.arange(0, head, 2, dtype=x_BHTD.dtype) / head)
        x1, x2 = x_BHTD.chunk(2, dim=-1)
        return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    n, t = tokens.shape
    future = torch.ones(t, t, dtype=torch.bool).triu(1)
    for i in range(2):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q = rotate(linear(h, f"{layer}.self_attn.q_proj").view(n, t, heads, head).transpose(1, 2))
        k = rotate(linear(h, f"{layer}.self_attn.k_proj").view(n, t, kv_heads, head).transpose(1, 2))
        v = linear(h, f"{layer}.self_attn.v_proj").view(n, t, kv_heads, head).transpose(1, 2)
        k, v = (z.repeat_interleave(heads // kv_heads, dim=1) for z in (k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(head)).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1)
        x = x + linear(mixed, f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gated = torch.nn.functional.silu(linear(h, f"{layer}.mlp.gate_proj")) * linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(gated, f"{layer}.mlp.down_proj")
    logits = norm(x, "model.norm") @ w["lm_head.weight"].T
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def batch(i):
    """Batch i of the licence text, one byte per token: windows WINDOWS*i ... of WINDOW bytes each."""
    text = TEXT.read_bytes()
    start = i * WINDOWS * WINDOW
    return torch.tensor(list(text[start : start + WINDOWS * WINDOW])).view(WINDOWS, WINDOW)


def weights(dtype, frozen=()):
    tensors = load_file(OUT / "tiny_llama/model.safetensors")
    return {k: v.to(dtype).requires_grad_(k.split(".")[-2] not in frozen) for k, v in tensors.items()}


def gradients():
    """Gradients of one batch in f64: every weight; and LoRA factors with embeddings, norms and head, projections frozen.
    transformers and PEFT, in f32, have to agree."""
    w = weights(torch.float64)
    loss = llama_loss(w, batch(0))
    loss.backward()
    grads = {k: v.grad for k, v in w.items()}
    model = base()
    check_gradients(model, grads)
    save_gradients("full", loss, grads)

    w = weights(torch.float64, frozen=PROJECTIONS)
    factors = {k.removeprefix("base_model.model."): v.double().requires_grad_()
               for k, v in load_file(OUT / "tiny_adapter/adapter_model.safetensors").items()}
    names = {k.rsplit(".lora_", 1)[0] for k in factors}
    loss = llama_loss(w, batch(0), {n: (factors[f"{n}.lora_A.weight"], factors[f"{n}.lora_B.weight"]) for n in names})
    loss.backward()
    grads = {k: v.grad for k, v in (w | factors).items() if v.grad is not None}
    model = PeftModel.from_pretrained(base(), OUT / "tiny_adapter", is_trainable=True)
    for name, p in model.named_parameters():
        p.requires_grad_("base_layer" not in name)
    check_gradients(model, grads)
    save_gradients("lora", loss, grads)


def check_gradients(model, grads):
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    found = {k.removeprefix("base_model.model.").replace(".default.weight", ".weight"): p.grad.double()
             for k, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    for name, g in grads.items():
        error = float((found[name] - g).norm() / g.norm())
        assert error < 3e-6, f"{name}: transformers' gradient differs by {error:.1e}"


def save_gradients(name, loss, grads):
    (OUT / "gradients").mkdir(exist_ok=True)
    save_file({k: g.float().contiguous() for k, g in grads.items()}, OUT / "gradients" / f"{name}.safetensors")
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    write_json(OUT / "gradients" / f"{name}.json", {"loss": loss.item(), "grad_norm": norm})


class Training:
    """The order of one update: loss, backward, clip, AdamW, schedule. The first update has rate multiplier(0)."""

    def __init__(self, parameters, lr, multiplier):
        self.parameters, self.lr, self.multiplier = list(parameters), lr, multiplier
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        self.rows = []

    def update(self, loss):
        lr = self.lr * self.multiplier(len(self.rows))
        self.optimizer.param_groups[0]["lr"] = lr
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rows.append({"step": len(self.rows) + 1, "lr": lr, "loss": loss.item(), "grad_norm": norm.item()})


def full_training(steps=20):
    schedule = {"scheduler": "cosine", "num_training_steps": steps, "warmup_steps": 4, "cycle_length": steps, "min_lr_ratio": 0.1}
    runs = {}
    for dtype in (torch.float64, torch.float32):
        w = weights(dtype)
        run = Training(w.values(), 2e-3, lambda s: cosine(s, steps, 4, 0.1))
        for s in range(steps):
            run.update(llama_loss(w, batch(s)))
        runs[dtype] = run.rows, {k: v.detach() for k, v in w.items()}
    save_trajectory("full", runs, {"lr": 2e-3, "schedule": schedule, "first_batch": 0})


def relora_training(cycles=3, cycle_length=8, first_batch=20):
    """Three cycles. A restart follows update k * cycle_length: merge, A from a file, B = 0, and for both the moments and the
    step counter of AdamW begin anew. Everything else (embeddings, norms, head) runs on."""
    steps = cycles * cycle_length
    folder = OUT / "relora"
    folder.mkdir()
    generator = torch.Generator().manual_seed(90213)
    shapes = {k.removesuffix(".weight"): v.shape for k, v in weights(torch.float32).items() if k.split(".")[-2] in PROJECTIONS}
    initial = []
    for cycle in range(cycles):
        # Kaiming-uniform with a = sqrt(5): uniform within 1/sqrt(fan_in).
        initial.append({name: (2 * torch.rand(R, fan_in, generator=generator) - 1) / math.sqrt(fan_in)
                        for name, (_, fan_in) in shapes.items()})
        save_file({f"{k}.lora_A.weight": v for k, v in initial[-1].items()}, folder / f"initial_a_{cycle + 1}.safetensors")

    schedule = {"scheduler": "cosine_restarts", "num_training_steps": steps, "warmup_steps": 3, "restart_warmup_steps": 2,
                "cycle_length": cycle_length, "adjust_step": 0, "min_lr_ratio": 0.1}
    runs = {}
    for dtype in (torch.float64, torch.float32):
        w = weights(dtype, frozen=PROJECTIONS)
        lora = {name: (initial[0][name].to(dtype, copy=True).requires_grad_(), torch.zeros(out, R, dtype=dtype).requires_grad_())
                for name, (out, _) in shapes.items()}
        run = Training([v for v in w.values() if v.requires_grad] + [f for pair in lora.values() for f in pair], 3e-3,
                       lambda s: cosine_restarts(s, steps, 3, 2, cycle_length, 0, 0.1))
        for s in range(steps):
            run.update(llama_loss(w, batch(first_batch + s), lora))
            if (s + 1) % cycle_length == 0:
                restart(w, lora, run.optimizer, initial[(s + 1) // cycle_length % cycles])
        runs[dtype] = run.rows, {k: v.detach() for k, v in w.items()}
    save_trajectory("relora", runs, {
        "lr": 3e-3, "schedule": schedule, "first_batch": first_batch, "r": R, "lora_alpha": LORA_ALPHA,
    })
    # The checkpoint after the last merge: what the sum of the three deltas is read from.
    save_file({k: v.contiguous() for k, v in runs[torch.float32][1].items()}, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(OUT / "tiny_llama" / "config.json", folder / "config.json")


@torch.no_grad()
def restart(w, lora, optimizer, next_a):
    for name, (a, b) in lora.items():
        w[f"{name}.weight"] += LORA_ALPHA / R * (b @ a)
        a.copy_(next_a[name])
        b.zero_()
        optimizer.state.pop(a)
        optimizer.state.pop(b)


def save_trajectory(name, runs, settings):
    rows, final = runs[torch.float64]
    rows_f32, final_f32 = runs[torch.float32]
    folder = OUT / name
    folder.mkdir(exist_ok=True)
    write_json(folder / "trajectory.json", {
        **settings,
        "weight_decay": 0.01,
        "clip_grad_norm": 1.0,
        "windows_per_batch": WINDOWS,
        "window": WINDOW,
        "f32_against_f64": {
            "loss": max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows_f32, rows)),
            "grad_norm": max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(rows_f32, rows)),
            "weights": max(float((final_f32[k] - final[k]).abs().max()) for k in final),
        },
        "final_weights": {k: probe(v) for k, v in sorted(final.items())},
        "updates": rows,
    })


def probe(tensor):
    """Two numbers that move when any element does: the plain and a position-weighted sum, in f64."""
    flat = tensor.double().flatten()
    weights = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    return {"sum": float(flat.sum()), "cosine_sum": float((flat * weights).sum()), "norm": float(flat.norm())}


# --- spectra ----------------------------------------------------------------------------------------------------------


def spectra():
    """Singular values of the difference of two checkpoints: f64 SVD of the exact difference, and every measure."""
    pairs = {
        "relora_f32": (load_file(OUT / "tiny_llama/model.safetensors"), load_file(OUT / "relora/model.safetensors"), 23),
        "merged_bf16": (
            {k: v for f in sorted((OUT / "tiny_llama_bf16").glob("*.safetensors")) for k, v in load_file(f).items()},
            load_file(OUT / "merged/tiny_adapter_bf16.safetensors"),
            7,
        ),
    }
    (OUT / "spectra").mkdir()
    for name, (w0, wn, mantissa_bits) in pairs.items():
        matrices = {}
        for key in sorted(wn):
            if wn[key].ndim == 2 and key.split(".")[-2] in PROJECTIONS:
                matrices[key] = measures(w0[key].double().numpy(), wn[key].double().numpy(), mantissa_bits)
        write_json(OUT / "spectra" / f"{name}.json", matrices)


def measures(w0, wn, mantissa_bits):
    m, n = wn.shape
    s = np.linalg.svd(wn - w0, compute_uv=False)
    p = s[s > 0] / s.sum()
    energy = np.cumsum(s**2) / np.sum(s**2)
    tolerance = max(m, n) * 2.0**-23 * s[0]
    # The unit in the last place of a stored value: the spacing of the numbers around it.
    _, exponent = np.frexp(np.abs(wn))
    ulp = np.ldexp(1.0, np.maximum(exponent - 1, -126) - mantissa_bits)
    edge = np.sqrt((ulp**2 / 12).sum(axis=1)).max() + np.sqrt((ulp**2 / 12).sum(axis=0)).max()
    return {
        "shape": [m, n],
        "spectral_norm": s[0], "frobenius_norm": np.linalg.norm(wn - w0), "nuclear_norm": s.sum(),
        "numerical_rank": int((s > tolerance).sum()),
        "noise_edge": edge,
        "rank_above_noise": int((s > max(edge, tolerance)).sum()),
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "proportional_effective_rank": math.exp(-(p * np.log(p)).sum()) / min(m, n),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
        "energy_rank_90": int(np.argmax(energy >= 0.90)) + 1,
        "energy_rank_99": int(np.argmax(energy >= 0.99)) + 1,
        "condition_number": s[0] / s[-1],
        "below_0_1": int((s < 0.1).sum()),
        "sigma": s.tolist(),
    }


# --- schedules --------------------------------------------------------------------------------------------------------


def cosine(s, cycle_length, warmup, lo):
    """Cosine decay from 1 to lo over each cycle, after a linear warmup that later cycles repeat (from 1e-7, not 0)."""
    c = s % cycle_length
    if c < warmup:
        return 1e-7 if s >= cycle_length and c < 2 else c / warmup
    return lo + (1 - lo) * 0.5 * (1 + math.cos(math.pi * (c - warmup) / (cycle_length - warmup)))


def cosine_restarts(s, total, warmup, restart_warmup, cycle_length, adjust_step, lo):
    """One cosine over the whole training, dipping to 0 at every restart and warmed up again onto the same curve."""

    def decay(x):
        return lo + (1 - lo) * 0.5 * (1 + math.cos(math.pi * (x - warmup) / max(1, total - warmup)))

    if s < warmup:
        return s / warmup
    shifted = s + adjust_step
    into_cycle = shifted % cycle_length
    if into_cycle < restart_warmup and s >= cycle_length:
        return into_cycle / restart_warmup * decay(shifted - into_cycle + restart_warmup)
    return decay(shifted)


def schedules():
    tables = []
    for total, warmup, cycle, lo in ((40, 5, 40, 0.1), (60, 4, 20, 0.05)):
        settings = {"scheduler": "cosine", "num_training_steps": total, "warmup_steps": warmup, "cycle_length": cycle, "min_lr_ratio": lo}
        tables.append({**settings, "multipliers": [cosine(s, cycle, warmup, lo) for s in range(total)]})
    for total, warmup, again, cycle, adjust, lo in ((48, 6, 3, 12, 0, 0.1), (90, 8, 5, 30, 0, 0.01), (60, 6, 4, 15, 5, 0.1)):
        settings = {"scheduler": "cosine_restarts", "num_training_steps": total, "warmup_steps": warmup, "restart_warmup_steps": again,
                    "cycle_length": cycle, "adjust_step": adjust, "min_lr_ratio": lo}
        tables.append({**settings, "multipliers": [cosine_restarts(s, total, warmup, again, cycle, adjust, lo) for s in range(total)]})
    # Linear is transformers' own.
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=7, num_training_steps=50)
    multipliers = []
    for _ in range(50):
        multipliers.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    tables.append({"scheduler": "linear", "num_training_steps": 50, "warmup_steps": 7, "min_lr_ratio": 0.0, "multipliers": multipliers})
    (OUT / "schedules").mkdir()
    write_json(OUT / "schedules" / "schedules.json", tables)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
