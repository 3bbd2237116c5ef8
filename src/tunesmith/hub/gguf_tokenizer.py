"""The tokenizer of a .gguf file, as llama.cpp reads it from the header.

Transformers' own conversion takes `tokenizer.ggml.pre`, the name of the expressions that text is
split by first, for some names and leaves the others unread, and `add_space_prefix` for all; the ids
are then others than the file's without an error.
"""

import json
import re
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tunesmith.errors import ModelError

# What the names in `tokenizer.ggml.pre` stand for; the export reads it the other way.
PRE_TOKENIZER_TABLE = json.loads(
    Path(__file__).with_name("pre_tokenizers.json").read_text(encoding="utf-8")
)
SPACE = "\u2581"  # what SentencePiece has in place of a space
# llama.cpp drops space after special tokens where `general.name` has this in it, but not after
# three of them.
STRIPPING_NAME = re.compile("phi-?3", re.IGNORECASE)
NOT_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}
# Ids that llama.cpp takes where a file of SentencePiece's kind has none.
_LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_KEYS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


class TokenType(IntEnum):
    """The kinds of tokens in llama.cpp; the numbers are those of `gguf.TokenType`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special: matched in text only where the caller asks for it
    USER_DEFINED = 4  # added: matched in any text before the rest is split
    UNUSED = 5
    BYTE = 6


# Matched in the text as a whole, before the rest is split.
_WHOLE_TOKEN_TYPES = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)


def read_file_tokenizer(header: Mapping[str, Any], where: str) -> PreTrainedTokenizerFast:
    """The tokenizer that a .gguf file's `header`, key to value, describes.

    ModelError with `where` for one whose rules are not known.
    """
    kind = header["tokenizer.ggml.model"]
    tokens = header["tokenizer.ggml.tokens"]
    special = {}
    for name, key in _KEYS.items():
        default = _LLAMA_IDS.get(name) if kind == "llama" else None
        index = header.get(f"tokenizer.ggml.{name}_token_id", default)
        if index is not None:
            special[key] = tokens[index]
    if kind == "gpt2":
        name = header.get("tokenizer.ggml.pre", "default")
        row = _row_of(name)
        if row is None:
            raise unknown_tokenizer(
                where, f"tokenizer.ggml.pre is {name!r}, whose expressions are not known"
            )
        core = _byte_level(header, row)
        adds_bos = row.get("adds_bos", False)
    elif kind == "llama":
        core = _sentencepiece(header, special["unk_token"])
        adds_bos = True
    else:
        raise unknown_tokenizer(
            where, f"tokenizer.ggml.model is {kind!r}; gpt2 and llama are known"
        )
    core.add_tokens(_added_tokens(header))
    begin = header.get("tokenizer.ggml.add_bos_token", adds_bos) and special.get("bos_token")
    end = header.get("tokenizer.ggml.add_eos_token", False) and special.get("eos_token")
    around = [token for token in (begin, end) if token]
    core.post_processor = TemplateProcessing(
        single=[*filter(None, (begin, "$A", end))],
        pair=[*filter(None, (begin, "$A", end, begin, "$B:1", end))],
        special_tokens=[(token, core.token_to_id(token)) for token in around],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = header.get("tokenizer.chat_template")
    return tokenizer


def unknown_tokenizer(where: str, why: str) -> ModelError:
    """The error for a file whose text would get other ids in training than in llama.cpp."""
    return ModelError(
        "the file's tokenizer is not supported: its text would get other ids than in llama.cpp",
        where=where,
        why=why,
        fix="train on the safetensors version of this model: model.name: OWNER/NAME or its folder",
    )


def _row_of(pre: str) -> dict[str, Any] | None:
    rows: list[dict[str, Any]] = PRE_TOKENIZER_TABLE["structures"]
    return next((row for row in rows if pre in (row["pre"], *row.get("also", ()))), None)


def served_splits(pre: str) -> list[str] | None:
    """The expressions that llama.cpp splits by for a name in `tokenizer.ggml.pre`, one after the
    other; None where they are not known.
    """
    row = _row_of(pre)
    return row.get("served", row["splits"]) if row else None


def split_text(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """Split the table's text into what a tokenizer joins tokens in; None if it splits no text."""
    step = tokenizer.backend_tokenizer.pre_tokenizer
    return step.pre_tokenize_str(PRE_TOKENIZER_TABLE["text"]) if step else None


def _byte_level(header: Mapping[str, Any], row: Mapping[str, Any]) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(header["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab, merges, ignore_merges=row["ignore_merges"]))
    core.pre_tokenizer = pre_tokenizer_of(row.get("served", row["splits"]))
    core.decoder = decoders.ByteLevel()
    return core


def pre_tokenizer_of(splits: list[str]) -> pre_tokenizers.PreTokenizer:
    """The `splits` of a row of the table as steps, the last of which makes letters of bytes."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    for split in splits:
        if split == "digit":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif split != "gpt-2":
            steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt-2" in splits))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(header: Mapping[str, Any], unknown: str) -> Tokenizer:
    tokens = header["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges_of(header, vocab)
    core = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    undo: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if header.get("tokenizer.ggml.add_space_prefix", True):
        # Also behind each added token, as llama.cpp has it.
        steps.insert(0, normalizers.Prepend(SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Sequence(undo)
    return core


def _merges_of(header: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs that make a token, those of the highest score first: llama.cpp joins by score."""
    types = header["tokenizer.ggml.token_type"]
    scores = header["tokenizer.ggml.scores"]
    # What is matched as a whole is joined from nothing.
    joined = [token for token, index in vocab.items() if types[index] == TokenType.NORMAL]
    joined.sort(key=lambda token: -scores[vocab[token]])
    merges = []
    for token in joined:
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                merges.append((token[:cut], token[cut:]))
    return merges


def _added_tokens(header: Mapping[str, Any]) -> list[AddedToken]:
    strips_space = STRIPPING_NAME.search(header.get("general.name", "")) is not None
    types = header.get("tokenizer.ggml.token_type", ())
    added = []
    for text, token_type in zip(header["tokenizer.ggml.tokens"], types, strict=False):
        if token_type in _WHOLE_TOKEN_TYPES and text:
            is_special = token_type != TokenType.USER_DEFINED
            rstrip = strips_space and text not in NOT_STRIPPED
            added.append(AddedToken(text, special=is_special, rstrip=rstrip, normalized=False))
    return added
