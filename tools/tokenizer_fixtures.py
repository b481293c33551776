"""A small byte-level BPE vocabulary and what Hugging Face's tokenizers makes of some texts with it."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "Licensed under the Apache License",
    "two  spaces,\n\na newline\tand a tab",
    "naïve café, 漢字, \U0001f980",
    "<|endoftext|> in the text is the token itself",
    " a leading space and 1234567890",
]


def make(out, text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    folder = out / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|endoftext|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    expected = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids} for text in TEXTS]
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
