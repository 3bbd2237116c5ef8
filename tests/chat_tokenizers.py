"""Real tokenizers, small and trained on the spot, with merges over every edge that a template has."""

from __future__ import annotations

from functools import cache
from typing import Any

# Merges such as "\n" + " ", ":" + "\n\n" and "> " make tokens that lie across the start of an
# answer.
_CORPUS = [
    "assistant\n  user\n\n The answer: \n\n### Response:\nThe <|x|> [INST] so [/INST] I see.\n\n\n```py\n    return 1\n",
    'user\n\nWhat is it? {"name": "weather", "parameters": {"place": "Oslo"}} model\n    indented\n: "so"\n]) -- done:',
    "Τι είναι; 这是一座桥。 🎉 yes 👍 الساعة תודה e\u0301 é <think>\nBecause.\n</think>\n\nSo it is.\n",
] * 4


@cache
def train(kind: str, special: tuple[str, ...], adds_bos: bool) -> Any:
    """A fast tokenizer.

    kind: `bytes` (byte-level as Llama 3's, merging across words), `trimmed` (the same with cut
    offsets, and text normalised to NFC, as Qwen's), `pieces` (as Gemma's: blanks as "▁", bytes for
    what is unknown), `prefixed` (the same with a "▁" before a text, as Mistral's) or `llama2` (with
    one before each text between special tokens).
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>"]
    if kind in ("pieces", "prefixed", "llama2"):
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        core.normalizer = normalizers.Replace(" ", "▁")
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "prefixed":
            core.normalizer = None
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        elif kind == "llama2":
            core.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        if kind != "pieces":
            parts.append(decoders.Strip(" ", 1, 0))
        core.decoder = decoders.Sequence(parts)
        names += [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, show_progress=False)
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        )
        if kind == "trimmed":
            core.normalizer = normalizers.NFC()
    core.train_from_iterator(_CORPUS, trainer)
    after = [processors.ByteLevel(trim_offsets=True)] if kind == "trimmed" else []
    if adds_bos:
        one, two = "<s> $A", "<s> $A <s> $B"
        after.append(
            processors.TemplateProcessing(single=one, pair=two, special_tokens=[("<s>", 1)])
        )
    if after:
        core.post_processor = processors.Sequence(after)
    core.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def wordpiece(*vocabulary: str) -> Any:
    """A fast tokenizer of these words, as BERT's: "##" before the rest of a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(("[UNK]", "</s>", *vocabulary))}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[UNK]")
