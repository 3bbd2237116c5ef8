"""Tiny tokenizers and models of each family, and their GGUF files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from conftest import CHATML
from model import families
from tunesmith.tools.export.gguf.plan import GgufPlan, plan_gguf
from tunesmith.tools.export.gguf.tokenizer import PRE_TOKENIZER_TABLE
from tunesmith.tools.export.gguf.write import write_gguf
from tunesmith.tools.export.tuned_weights import WholeRows

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEXTS = [
    "Hello world, the quick brown fox jumps over 13 lazy dogs; it's 1,234.56 dollars!",
    "def add(a, b):\n    return a + b  # a sum\n\n\tx = [1, 2, 333]\n",
    "I'll say: we've DON'T camelCase HTTPServer 2026-11-24 https://a.b/c?d=1",
    "Привет мир, 日本語 テキスト, 안녕하세요, नमस्ते, مرحبا, 🚀 ok",
]
# What pre-tokenizers disagree on.
HARD = [
    "Hello world", "  two  spaces   three", "tabs\tand\nnew\n\nlines\r\nx \n y", "1234567 3.14 1,000",
    "I'm he'LL we'Ve DON'T 'tis", "नमस्ते दुनिया", "안녕하세요 세계", "日本語のテキスト、です。", "Привет мир",
    "🚀👨‍👩‍👧 ok 🏳️‍🌈", "def f(x):\n    return x**2  # c", "a", " ", "\n", "é ﬁ ½ ²", "https://x.y/z?q=1&b=%20",
    "\u00a0nbsp\u200bzw", "camelCaseWord HTTPServer", "مرحبا بالعالم", "!!! ??? ...---===",
]  # fmt: skip
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"

SIZES = {
    "vocab_size": 600, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 16,
            "long_factor": [2.0] * 16, "original_max_position_embeddings": 64}  # fmt: skip

# name -> settings: those of every family, and what matters in a file alone
VARIANTS: dict[str, dict[str, Any]] = {
    **families.VARIANTS,
    "llama": {},
    "olmo2": {},
    "qwen3": {"head_dim": 128, "tie_word_embeddings": True},  # that Transformers reads back
    "llama-tied": {"tie_word_embeddings": True, "head_dim": 64},
    "llama-yarn": {"rope_parameters": YARN},
    "mistral": {"sliding_window": None, "head_dim": 32},
    # Layers without a rotation, with a window, and those between.
    "smollm3": {"num_hidden_layers": 5},
    "gemma3_text": {**families.VARIANTS["gemma3_text"], "num_hidden_layers": 7},
    "gemma3_text-head": {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": False},
    "granite-bias": {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.2,
                     "head_dim": 64},
    "qwen3-linear": {"head_dim": 128, "rope_parameters": LINEAR},
    "phi3": {"tie_word_embeddings": False},
    "phi3-long": {"tie_word_embeddings": False, "rope_parameters": LONGROPE,
                  "original_max_position_embeddings": 64},
}  # fmt: skip


def byte_level(structure: Mapping[str, Any], vocab_size: int = 590) -> PreTrainedTokenizerBase:
    """A BPE trained on TEXTS with the splits of a row of `pre_tokenizers.json`."""
    steps: list[Any] = []
    for split in structure["splits"]:
        if split == "digit":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif split != "gpt-2":
            steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    own_regex = "gpt-2" in structure["splits"]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_regex))
    tokenizer = Tokenizer(models.BPE(ignore_merges=structure["ignore_merges"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return as_transformers(tokenizer)


def chat_tokenizer() -> PreTrainedTokenizerBase:
    """One that llama.cpp reads, with ChatML and its two tokens."""
    tokenizer = byte_level(structure_of("gpt-2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def structure_of(pre: str) -> dict[str, Any]:
    """The row of `pre_tokenizers.json` with this name."""
    return next(row for row in PRE_TOKENIZER_TABLE["structures"] if row["pre"] == pre)


def sentencepiece(prepend: bool = True) -> PreTrainedTokenizerBase:
    """A BPE with byte tokens, its pairs all those that make a token, as SentencePiece's are."""
    space = "\u2581"
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", space)
    trained.train_from_iterator(TEXTS[:3], BpeTrainer(vocab_size=300, special_tokens=SPECIAL))
    state = json.loads(trained.to_str())["model"]
    vocab = {token: index for index, token in enumerate(SPECIAL)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    learned = ["".join(merge) for merge in state["merges"]]
    for token in [*learned, *(token for token in state["vocab"] if len(token) == 1), space]:
        vocab.setdefault(token, len(vocab))
    merges = []
    for token in dict.fromkeys(learned):
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                merges.append((token[:cut], token[cut:]))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    escape = normalizers.Replace(" ", space)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(space), escape]) if prepend else escape
    )
    return as_transformers(tokenizer)


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TEMPLATE
    return fast


def random_model(variant: str, **more: Any) -> PreTrainedModel:
    settings = {**families.SMALL, **SIZES, **VARIANTS[variant], **more}
    return families.random_model(AutoConfig.for_model(variant.partition("-")[0], **settings))


def tensor_rows(tensor: torch.Tensor) -> WholeRows:
    return WholeRows(tensor.shape, tensor.clone)


def rows_of(model: PreTrainedModel) -> dict[str, WholeRows]:
    """Its weights by name, a tied head left out."""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else ""
    state = model.state_dict()
    return {name: tensor_rows(tensor) for name, tensor in state.items() if name != tied}


def plan_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, quant: str = "f32", **more: Any
) -> GgufPlan:
    more = {"name": "tiny", **more}
    return plan_gguf(model.config.to_dict(), rows_of(model), tokenizer, quant=quant, **more)


def write_model(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quant: str = "f32",
) -> Path:
    write_gguf(plan_of(model, tokenizer, quant), path, threads=2)
    return path


def header_of(plan: GgufPlan, folder: Path) -> dict[str, Any]:
    """The header's values by key."""
    from gguf import GGUFReader

    file = folder / "header.gguf"
    file.write_bytes(plan.header + bytes(plan.size - len(plan.header)))
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


def word_tokenizer() -> PreTrainedTokenizerBase:
    """Of sixty words."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(60)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t2")
