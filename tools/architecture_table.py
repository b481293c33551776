#!/usr/bin/env python3
"""Writes src/architecture/table.json: what the classes of transformers say about the weights of each architecture.

    python tools/architecture_table.py src/architecture/table.json

Every class of the automatic mappings below is built from its configuration's defaults on the meta device (no weights). Per class:
  conv1d, embedding, other   ends of names of modules with a 2-d `weight` that are a Conv1D (stored [in, out]), an Embedding, or neither
                             of Linear, Conv1D, Embedding (routers); as stored, numbers written `#`; the shortest end that is unambiguous
  tied, tie                  `_tied_weights_keys` (tensor: the tensor it is), and whether the configuration ties by default
  renamed                    parts of names in memory -> as stored, from transformers' own conversion mapping, reversed as
                             `save_pretrained` reverses it; prefixes that end at a dot, numbers written `#`
  split                      parameters that are one tensor in memory and several as stored (fused experts): name -> stored names
  experts_in_out             expert parameters in memory are [experts, in, out]
Classes with equal facts share an entry. The head of the file names the versions.
"""
import copy, json, os, re, sys, warnings
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
import torch, transformers
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers import core_model_loading as loading, conversion_mapping
from transformers.pytorch_utils import Conv1D
transformers.utils.logging.set_verbosity_error()
MAPPINGS = ["CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "SEQUENCE_CLASSIFICATION"]
mask = lambda name: ".".join("#" if part.isdigit() else part for part in name.split("."))


def classes():
    seen = {}
    for task in MAPPINGS:
        for model_type, names in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            for name in names if isinstance(names, (list, tuple)) else [names]:
                seen.setdefault(name, model_type)
    for model_type, names in auto.MODEL_MAPPING_NAMES.items():
        for name in names if isinstance(names, (list, tuple)) else [names]:
            seen.setdefault(name, model_type)
    return sorted(seen.items())


def shrink(config):
    for c in [config] + [getattr(config, k) for k in ("text_config", "vision_config", "audio_config") if getattr(config, k, None) is not None]:
        for key in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "n_layers"):
            if isinstance(getattr(c, key, None), int) and getattr(c, key) > 4:
                setattr(c, key, 4)
    return config


def build(name, model_type):
    cls = getattr(transformers, name)
    for reduce in (shrink, lambda c: c):
        try:
            config = reduce(CONFIG_MAPPING[model_type]())
            with torch.device("meta"):
                return cls(config)
        except Exception as e:
            last = e
    raise last


def stored_names(model, names):
    transforms = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    transforms = [t for t in transforms if not isinstance(t, loading.PrefixChange)][::-1]
    back = [t.reverse_transform() for t in transforms]
    renamings = [t for t in back if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in back if isinstance(t, loading.WeightConverter)]
    by_source = {p: c for c in converters for p in c.source_patterns}
    rename = lambda key: loading.apply_renamings(key, renamings)
    plain, split = {}, {}
    for name in names:
        key, pattern = loading.apply_converters(name, converters)
        if pattern is None:
            plain[name] = rename(name)
            continue
        converter = by_source[pattern]
        end = pattern if name.endswith(pattern) else None
        if end is None:
            split[name] = [rename(key)]
        else:
            split[name] = [rename(name[: -len(end)] + t) for t in converter.target_patterns]
    return plain, split


def rules(pairs):
    """The fewest prefix rules that give all pairs; longest prefix wins."""
    found = {}
    for a, b in pairs.items():
        x, y = mask(a).split("."), mask(b).split(".")
        if x == y:
            continue
        while len(x) > 1 and len(y) > 1 and x[-1] == y[-1]:
            x.pop(), y.pop()
        found[".".join(x)] = ".".join(y)

    def apply(table, name):
        parts = name.split(".")
        for n in range(len(parts), 0, -1):
            head = ".".join(parts[:n])
            if head in table:
                return ".".join([table[head]] + parts[n:])
        return name
    for a, b in sorted(pairs.items(), key=lambda p: len(p[0])):
        if apply(found, mask(a)) != mask(b):
            found[mask(a)] = mask(b)
    for key in sorted(found, key=len, reverse=True):
        rest = {k: v for k, v in found.items() if k != key}
        if apply(rest, key) == found[key]:
            found = rest
    assert all(apply(found, mask(a)) == mask(b) for a, b in pairs.items())
    return dict(sorted(found.items()))


def ends(kinds, wanted):
    """Shortest ends of names that only modules of this kind have."""
    mine = {mask(n) for n, k in kinds.items() if k == wanted}
    others = {mask(n) for n, k in kinds.items() if k != wanted}
    out = set()
    for name in mine:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            end = ".".join(parts[-n:])
            if not any(o == end or o.endswith("." + end) for o in others):
                break
        out.add(end)
    return sorted(out)


def facts(name, model_type):
    model = build(name, model_type)
    plain, split = stored_names(model, list(model.state_dict()))
    kinds = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            continue
        kind = "linear" if isinstance(module, torch.nn.Linear) else "conv1d" if isinstance(module, Conv1D) else "embedding" if isinstance(module, torch.nn.Embedding) else "other"
        kinds[plain.get(path + ".weight", path + ".weight").removesuffix(".weight")] = kind
    entry = {kind: ends(kinds, kind) for kind in ("conv1d", "embedding", "other")}
    tied = getattr(model, "_tied_weights_keys", None) or {}
    if isinstance(tied, dict):
        entry["tied"] = {k: v for k, v in sorted(tied.items()) if not re.search(r"[\\^$*+?(\[]", k + v)}
    text = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    entry["tie"] = bool(getattr(model.config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False)))
    entry["renamed"] = rules(plain)
    entry["split"] = dict(sorted({mask(k): sorted({mask(v) for v in vs}) if len(vs) < 2 else [mask(v) for v in vs] for k, vs in split.items()}.items()))
    hidden = getattr(text, "hidden_size", None)
    entry["experts_in_out"] = any(n.endswith("gate_up_proj") and p.dim() == 3 and p.shape[1] == hidden and p.shape[2] != hidden for n, p in model.named_parameters())
    return {k: v for k, v in entry.items() if v not in ([], {}, None, False)}, model.config.model_type


def main():
    groups, failed = {}, []
    for name, model_type in classes():
        try:
            # Several model types share classes: the configuration's own is what config.json says.
            entry, model_type = facts(name, model_type)
        except Exception as e:
            failed.append(f"{name}: {type(e).__name__}: {str(e)[:80]}")
            continue
        text = json.dumps(entry, sort_keys=True)
        groups.setdefault(text, []).append([name, model_type])
        print(name, text[:150], flush=True)
    out = {"source": f"transformers {transformers.__version__}, torch {torch.__version__}: tools/architecture_table.py",
           "entries": [{"classes": {n: m for n, m in names}, **json.loads(text)} for text, names in groups.items()]}
    lines = ",\n".join(json.dumps(e, separators=(",", ":")) for e in out["entries"])
    open(sys.argv[1], "w").write('{"source": %s,\n"entries": [\n%s\n]}\n' % (json.dumps(out["source"]), lines))
    print(len(groups), "entries,", len(failed), "classes not built"); print("\n".join(failed))


main()
