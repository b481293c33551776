#!/usr/bin/env python3
"""Writes fixtures/adapter_types: one small adapter per type, as PEFT saves it, and PEFT's own merge of it in float64.

usage: python tools/make_adapter_fixtures.py [TYPE ...]

Every trained parameter gets noise, so that no factor is zero. Needs what tools/requirements-fixtures.txt lists.
"""

import json
import pathlib
import sys

import peft
import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "adapter_types"
TARGETS = ["q_proj", "up_proj"]


class Model(torch.nn.Module):
    """Linear layers, a norm, an embedding and a convolution of the smallest sizes that every type accepts."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(6, 8)
        self.q_proj = torch.nn.Linear(8, 8, bias=False)
        self.up_proj = torch.nn.Linear(8, 16, bias=True)
        self.norm = torch.nn.LayerNorm(8)
        self.conv = torch.nn.Conv2d(4, 8, 3)

    def forward(self, x):
        return self.up_proj(self.norm(self.q_proj(self.embed_tokens(x))))


def base():
    torch.manual_seed(1)
    return Model()


def configs():
    t = TARGETS
    return {
        "lora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=t),
        "lora_conv": peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv"]),
        "lora_kasa": peft.LoraConfig(r=2, lora_alpha=3, target_modules=t, kasa_config=peft.KasaConfig()),
        "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=t),
        "loha_conv": peft.LoHaConfig(r=2, alpha=3, target_modules=["conv"], use_effective_conv2d=True),
        "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=t, decompose_factor=2),
        "ia3": peft.IA3Config(target_modules=t, feedforward_modules=["q_proj"]),
        "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=3, target_modules=t, total_step=10),
        "oft": peft.OFTConfig(oft_block_size=4, r=0, target_modules=t, use_cayley_neumann=False),
        "boft": peft.BOFTConfig(boft_block_size=4, target_modules=t),
        "vera": peft.VeraConfig(r=4, target_modules=t, save_projection=False),
        "pvera": peft.PveraConfig(r=4, target_modules=t),
        "hra": peft.HRAConfig(r=2, target_modules=t),
        "miss": peft.MissConfig(r=4, target_modules=t),
        "miss_bat": peft.MissConfig(r=4, target_modules=t, init_weights="bat"),
        "ln_tuning": peft.LNTuningConfig(target_modules=["norm"]),
        "trainable_tokens": peft.TrainableTokensConfig(token_indices=[4, 1], target_modules=["embed_tokens"]),
        "shira": peft.ShiraConfig(r=1, target_modules=t),
        "fourierft": peft.FourierFTConfig(n_frequency=9, scaling=3.0, target_modules=t),
        "randlora": peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=t),
        "c3a": peft.C3AConfig(block_size=4, target_modules=t),
        "road": peft.RoadConfig(variant="road_2", group_size=4, target_modules=t),
        "gralora": peft.GraloraConfig(r=4, alpha=3, gralora_k=2, hybrid_r=1, target_modules=t),
        "hira": peft.HiraConfig(r=2, target_modules=t),
        "delora": peft.DeloraConfig(r=2, target_modules=t),
        "vblora": peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=4, topk=2, target_modules=t),
        "unilora": peft.UniLoraConfig(r=2, save_indices=True, theta_d_length=9, target_modules=t),
        "glora": peft.GloraConfig(r=2, target_modules=["q_proj"]),
        "beft": peft.BeftConfig(target_modules=["up_proj"]),
        "supertuning": peft.SupertuningConfig(r=2, sparsity=0.9, lora_alpha=3, target_modules=["q_proj"]),
        "deft": peft.DeftConfig(r=2, alpha=3, target_modules=t),
        "osf": peft.OSFConfig(effective_rank=5, target_modules=t),
        "peanut": peft.PeanutConfig(r=2, depth=1, target_modules=t),
    }


def make(name, config):
    folder = ROOT / name
    torch.manual_seed(2)
    model = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"] = "../base"
    path.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    # In float64 as far as PEFT lets it.
    torch.manual_seed(3)
    merged = peft.PeftModel.from_pretrained(base(), folder).double().merge_and_unload().state_dict()
    before = base().state_dict()
    changed = {k: v.float().contiguous() for k, v in merged.items() if not torch.equal(v.float(), before[k])}
    assert changed, name
    save_file(changed, folder / "merged.safetensors")


def main():
    (ROOT / "base").mkdir(parents=True, exist_ok=True)
    save_file(base().state_dict(), ROOT / "base" / "model.safetensors", metadata={"format": "pt"})
    (ROOT / "base" / "config.json").write_text("{}\n")
    for name, config in configs().items():
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            make(name, config)


if __name__ == "__main__":
    main()
