#!/usr/bin/env python3
"""Compares the ids that `relora-kit generate` gives a prompt, and the text that it adds, with those of transformers.

    SP_MODEL=tokenizer.model tools/prompts_sweep.py [PATH-OF-relora-kit]

SP_MODEL: any SentencePiece model of LLaMA's kind (PyPI's mistral-common ships some). Makes tiny random models whose tokenizers differ
in kind, class, template and settings; prints one line per case, and exits 1 if a case differs. Needs torch, transformers, gguf,
sentencepiece, tokenizers.
"""
import json, os, shutil, subprocess, sys, tempfile, warnings
warnings.filterwarnings("ignore")
os.environ["HF_HUB_OFFLINE"] = "1"
import gguf, numpy as np, sentencepiece, torch, transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

transformers.logging.set_verbosity_error()
PROGRAM = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else "relora-kit"
SP_MODEL = os.path.abspath(os.environ["SP_MODEL"])
PROMPTS = ["Hello world", " leading space", "trailing ", "two  spaces", "na\u00efve caf\u00e9 \U0001f600 \u6f22", "line\nbreak\ttab", "x", "</s> inside"]
failed = 0


def model(folder, vocab_size):
    torch.manual_seed(len(folder))
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=vocab_size,
                                      max_position_embeddings=64, tie_word_embeddings=False)
    made = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) * 0.5)
    made.save_pretrained(folder)


def case(name, folder):
    global failed
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for special in (True, False):
        for prompt in PROMPTS:
            expected = tokenizer(prompt, add_special_tokens=special)["input_ids"]
            flags = [] if special else ["--no-special-tokens"]
            done = subprocess.run([PROGRAM, "--threads", "1", "generate", "--model", folder, "--prompt", prompt, "--max-new-tokens", "6", "--json", *flags],
                                  capture_output=True, text=True)
            if done.returncode:
                failed += 1
                print(f"WRONG {name}: {prompt!r}: {done.stderr.strip()}")
                continue
            found = json.loads(done.stdout)
            new = [i for i in found["tokens"] if i != tokenizer.eos_token_id or found["finish"] != "end_of_document"]
            whole = tokenizer.decode(expected + new, clean_up_tokenization_spaces=False)
            before = tokenizer.decode(expected, clean_up_tokenization_spaces=False)
            text = whole[len(before):] if whole.startswith(before) else None
            good = found["prompt_tokens"] == expected and text in (None, found["text"])
            failed += not good
            if not good:
                print(f"WRONG {name}: {prompt!r}, special tokens {special}\n      expected {expected} {text!r}\n      found    {found['prompt_tokens']} {found['text']!r}")
    print(f"done  {name}")


def byte_level(folder, template=None, config=None):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator([" ".join(PROMPTS) * 3], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"],
                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if template:
        t.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    os.makedirs(folder)
    t.save(f"{folder}/tokenizer.json")
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>", **(config or {})}, open(f"{folder}/tokenizer_config.json", "w"))
    model(folder, t.get_vocab_size())


def sentencepiece_gguf(path, **flags):
    sp = sentencepiece.SentencePieceProcessor(model_file=SP_MODEL)
    size = sp.vocab_size()
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(1); w.add_context_length(64); w.add_embedding_length(16); w.add_feed_forward_length(16); w.add_head_count(2); w.add_head_count_kv(2)
    w.add_rope_dimension_count(8); w.add_layer_norm_rms_eps(1e-5); w.add_tokenizer_model("llama"); w.add_tokenizer_pre("default")
    w.add_token_list([sp.id_to_piece(i).encode() for i in range(size)]); w.add_token_scores([sp.get_score(i) for i in range(size)])
    w.add_token_types([2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(size)])
    w.add_bos_token_id(1); w.add_eos_token_id(2); w.add_unk_token_id(0)
    for name, value in flags.items():
        getattr(w, name)(value)
    f = lambda *s: (np.random.default_rng(1).standard_normal(s) * .5).astype(np.float32)
    w.add_tensor("token_embd.weight", f(size, 16)); w.add_tensor("output.weight", f(size, 16)); w.add_tensor("output_norm.weight", np.ones(16, np.float32))
    for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        w.add_tensor(f"blk.0.{n}.weight", f(16, 16))
    for n in ("attn_norm", "ffn_norm"):
        w.add_tensor(f"blk.0.{n}.weight", np.ones(16, np.float32))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


os.chdir(tempfile.mkdtemp())
for name, template, config in [
    ("byte level", None, {}), ("byte level, template", "<s> $A", {}), ("byte level, template with an end", "<s> $A </s>", {}),
    ("byte level, add_bos_token over a template", "$A </s>", {"add_bos_token": True}), ("byte level, add_bos_token false", "<s> $A", {"add_bos_token": False}),
    ("byte level, add_eos_token", None, {"add_eos_token": True}), ("byte level, both", None, {"add_bos_token": True, "add_eos_token": True}),
    ("byte level, a nameless bos", None, {"add_bos_token": True, "bos_token": None}),
    ("byte level, tokens as objects", None, {"add_bos_token": True, "bos_token": {"content": "<s>", "__type": "AddedToken"}}),
]:
    folder = name.replace(" ", "_").replace(",", "")
    byte_level(folder, template, config)
    case(name, folder)
byte_level("cut")
t = Tokenizer.from_file("cut/tokenizer.json"); t.enable_truncation(3); t.enable_padding(length=32, pad_id=2, pad_token="<pad>"); t.save("cut/tokenizer.json")
case("byte level, truncation and padding", "cut")
for name, flags in {"converted sentencepiece": {"add_add_bos_token": True, "add_add_eos_token": False}, "converted sentencepiece, an end": {"add_add_eos_token": True},
                    "converted sentencepiece, no bos": {"add_add_bos_token": False}, "converted sentencepiece, no space prefix": {"add_add_space_prefix": False}}.items():
    folder = name.replace(" ", "_").replace(",", "")
    sentencepiece_gguf("m.gguf", **flags)
    subprocess.run([PROGRAM, "-q", "convert", "m.gguf", "-o", folder], check=True, capture_output=True)
    case(name, folder)
# As transformers itself saves it, under the class that LLaMA's files name.
made = transformers.AutoTokenizer.from_pretrained("converted_sentencepiece")
for name, config in {"saved by LlamaTokenizer": {}, "LlamaTokenizer with add_bos_token false": {"add_bos_token": False}}.items():
    folder = name.replace(" ", "_")
    shutil.copytree("converted_sentencepiece", folder)
    os.remove(f"{folder}/tokenizer.json"); os.remove(f"{folder}/tokenizer_config.json")
    shutil.copy(SP_MODEL, f"{folder}/tokenizer.model")
    transformers.LlamaTokenizer.from_pretrained(folder, **config).save_pretrained(folder)
    case(name, folder)
print(f"{failed} wrong")
sys.exit(failed > 0)
