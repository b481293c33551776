#!/usr/bin/env python3
"""Converts GGUF files of random models and compares the logits in transformers with those of the model they came from.

    tools/gguf_sweep.py [PATH-OF-relora-kit]

Every rotary scaling with its settings, whole and split files; then every other metadata key of the package `gguf` that an architecture
can have, with a value that changes something: each must be refused by name, or be listed in the report. Prints one line per case,
exits 1 if one is wrong. Needs torch, transformers, gguf.
"""
import json, os, re, subprocess, sys, tempfile, warnings
warnings.filterwarnings("ignore")
os.environ["HF_HUB_OFFLINE"] = "1"
import gguf, torch, transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
PROGRAM = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else "relora-kit"
TOKENS = torch.arange(24)[None]
TABLE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
failed = 0
os.chdir(tempfile.mkdtemp())


def say(good, name, more=""):
    global failed
    failed += not good
    print(f"{'ok   ' if good else 'WRONG'} {name} {more}")


def paired(weight, heads):
    """llama.cpp's order of rotary pairs: `permute` in its converter."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(model, path, arch, keys=(), **options):
    c = model.config
    w = gguf.GGUFWriter(path, arch, **options)
    w.add_context_length(c.max_position_embeddings); w.add_embedding_length(c.hidden_size); w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size); w.add_head_count(c.num_attention_heads); w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    rope = c.rope_parameters
    w.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "default":
        w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"])); w.add_rope_scaling_factor(rope["factor"])
    for key, add in {"original_max_position_embeddings": w.add_rope_scaling_orig_ctx_len, "attention_factor": w.add_rope_scaling_yarn_attn_factor,
                     "beta_fast": w.add_rope_scaling_yarn_beta_fast, "beta_slow": w.add_rope_scaling_yarn_beta_slow}.items():
        if rope["rope_type"] == "yarn" and rope.get(key) is not None:
            add(rope[key])
    for key, value in keys:
        {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}[type(value)](key, value)
    for name, p in model.state_dict().items():
        parts = name.split(".")
        target = TABLE[parts[-2]] + "." + parts[-1]
        if "layers" in parts:
            target = f"blk.{parts[parts.index('layers') + 1]}.{target}"
        data = p.numpy()
        if arch == "llama" and parts[-2] in ("q_proj", "k_proj"):
            data = paired(data, c.num_attention_heads if parts[-2] == "q_proj" else c.num_key_value_heads)
        w.add_tensor(target, data)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


def made(arch, rope):
    torch.manual_seed(1)
    config, kind = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM), "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}[arch]
    model = kind(config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **rope}, tie_word_embeddings=False))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model.eval(), kind


def convert(path, *flags):
    done = subprocess.run([PROGRAM, "--progress", "never", "convert", path, "-o", "out", "--force", "--format", "json", *flags], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
for arch in ("llama", "qwen2"):
    for rope in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, yarn, {**yarn, "attention_factor": 0.5}, {**yarn, "beta_fast": 4.0},
                 {**yarn, "beta_slow": 0.5}, {**yarn, "attention_factor": 1.0, "beta_fast": 8.0, "beta_slow": 2.0}, {**yarn, "original_max_position_embeddings": 64}):
        model, kind = made(arch, rope)
        write(model, "m.gguf", arch)
        code, _, stderr = convert("m.gguf")
        difference = (logits(kind.from_pretrained("out").eval()) - logits(model)).abs().max().item() if code == 0 else stderr
        say(difference == 0.0, f"{arch} {rope}", f"largest difference {difference}")

model, kind = made("llama", yarn)
write(model, "split.gguf", "llama", split_max_tensors=4)
parts = sorted(name for name in os.listdir(".") if name.startswith("split-"))
for part in (parts[0], parts[-1]):
    code, _, stderr = convert(part)
    say(code == 0 and (logits(kind.from_pretrained("out").eval()) == logits(model)).all().item(), f"split into {len(parts)}, named by {part}", stderr)
os.rename(parts[2], "gone")
code, _, stderr = convert(parts[0])
say(code == 2 and parts[2] in stderr, "a part is missing", stderr.strip().replace("\n", " "))

known = sorted({value for group in vars(gguf.Keys).values() if isinstance(group, type) for value in vars(group).values() if isinstance(value, str) and "{arch}" in value})
carried = set(re.findall(r'"([a-z_.]+)"', open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../src/convert/gguf/settings.rs")).read().split("NEUTRAL")[0]))
model, _ = made("llama", {"rope_type": "default"})
for key in known:
    name = key.replace("{arch}.", "")
    if name in carried or "{" in name:
        continue
    for value in (3, 0.37, True if name != "attention.causal" else False, "other", [1, 2]):
        write(model, "m.gguf", "llama", [(f"llama.{name}", value)])
        code, stdout, stderr = convert("m.gguf")
        if not (code == 2 and f"llama.{name}" in stderr and "help:" in stderr):
            say(False, f"{key} = {value!r} is neither refused nor carried", stdout[:200] + stderr[:200])
            break
    else:
        say(True, f"{key} is refused")
for key in ("tokenizer.ggml.fim_pre_token_id", "tokenizer.chat_template.tool_use", "clip.vision.block_count", "general.sampling.mirostat"):
    write(model, "m.gguf", "llama", [(key, 3)])
    code, stdout, stderr = convert("m.gguf")
    say(code == 0 and any(key in sentence for sentence in json.loads(stdout)["left_out"]) and key in stderr, f"{key} is listed", stderr.strip())
write(model, "m.gguf", "llama", [("general.sampling.temp", 0.5), ("general.sampling.top_k", 7)])
code, _, _ = convert("m.gguf")
generation = json.load(open("out/generation_config.json"))
say((generation["temperature"], generation["top_k"], generation["do_sample"]) == (0.5, 7, True), "sampling is carried over")
print(f"{failed} wrong")
sys.exit(failed > 0)
