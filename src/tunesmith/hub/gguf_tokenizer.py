"""Conversion of the tokenizer in a .gguf header to a Transformers tokenizer, by llama.cpp's rules.

The conversion in Transformers is not used, because it can give wrong token ids without an error. It
supports only some values of `tokenizer.ggml.pre`, which names the regular expressions that split a
text. It also handles `add_space_prefix` in the same way for all tokenizers.
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

# Regular expressions for each value of `tokenizer.ggml.pre`. The GGUF export uses the same table in
# reverse, to find the value for a tokenizer.
PRE_TOKENIZER_TABLE = json.loads(
    Path(__file__).with_name("pre_tokenizers.json").read_text(encoding="utf-8")
)
Header = Mapping[str, Any]  # the values in the header of a .gguf file, by key
SPACE = "\u2581"  # SentencePiece's character for a space
# If the model's name (`general.name`) matches this pattern, llama.cpp removes whitespace after
# special tokens, except after the tokens in NOT_STRIPPED.
STRIPPING_NAME = re.compile("phi-?3", re.IGNORECASE)
NOT_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}
# Default ids that llama.cpp uses if a file with a SentencePiece tokenizer does not give them.
_LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_KEYS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


class TokenType(IntEnum):
    """Types of tokens in llama.cpp, with the values of `gguf.TokenType`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special token: matched in a text only if the caller asks for it
    USER_DEFINED = 4  # added token: matched in any text before the rest is split
    UNUSED = 5
    BYTE = 6


# Types of tokens that are matched in a text first, before the rest of the text is split into words.
_WHOLE_TOKEN_TYPES = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)


def read_file_tokenizer(header: Header, where: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer from the header of a .gguf file.

    Args:
        where: the path of the file, for error messages.

    Raise ModelError if the rules of the tokenizer are unknown.
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
                where, f"tokenizer.ggml.pre is {name!r}, whose regular expressions are unknown"
            )
        core = _byte_level(header, row)
        adds_bos = row.get("adds_bos", False)
    elif kind == "llama":
        core = _sentencepiece(header, special["unk_token"])
        adds_bos = True
    else:
        raise unknown_tokenizer(
            where, f"tokenizer.ggml.model is {kind!r}; only gpt2 and llama are supported"
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
    """Build the error for a tokenizer that would give different token ids in llama.cpp."""
    return ModelError(
        "the file's tokenizer is not supported: its token ids would differ from those of llama.cpp",
        where=where,
        why=why,
        fix="train on the safetensors version of this model: set model.name to OWNER/NAME or a "
        "folder",
    )


def _row_of(pre: str) -> dict[str, Any] | None:
    rows: list[dict[str, Any]] = PRE_TOKENIZER_TABLE["structures"]
    return next((row for row in rows if pre in (row["pre"], *row.get("also", ()))), None)


def served_splits(pre: str) -> list[str] | None:
    """Return the regular expressions with which llama.cpp splits a text, in the order of their use.

    `pre` is the value of `tokenizer.ggml.pre`. Return None if it is unknown.
    """
    row = _row_of(pre)
    return row.get("served", row["splits"]) if row else None


def split_text(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """Split a fixed text with the tokenizer's pre-tokenizer. Return None if it has none."""
    step = tokenizer.backend_tokenizer.pre_tokenizer
    return step.pre_tokenize_str(PRE_TOKENIZER_TABLE["text"]) if step else None


def _byte_level(header: Header, row: Mapping[str, Any]) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(header["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab, merges, ignore_merges=row["ignore_merges"]))
    # Split a text by the expressions, then map bytes to letters.
    steps: list[pre_tokenizers.PreTokenizer] = []
    splits = row.get("served", row["splits"])
    for split in splits:
        if split == "digit":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif split != "gpt-2":
            steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt-2" in splits))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(header: Header, unknown: str) -> Tokenizer:
    tokens = header["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges(header, vocab)
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
        # `Prepend` adds a space before the text, and also before the text that follows an added
        # token, as llama.cpp does.
        steps.insert(0, normalizers.Prepend(SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Sequence(undo)
    return core


def _merges(header: Header, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the BPE merges: all pairs of tokens whose concatenation is also a token.

    The pairs are sorted by the score of the joined token, because llama.cpp joins the pair with the
    highest score first.
    """
    types = header["tokenizer.ggml.token_type"]
    scores = header["tokenizer.ggml.scores"]
    # Use only normal tokens, because merges do not produce tokens of other types.
    joined = [token for token, index in vocab.items() if types[index] == TokenType.NORMAL]
    joined.sort(key=lambda token: -scores[vocab[token]])
    merges = []
    for token in joined:
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                merges.append((token[:cut], token[cut:]))
    return merges


def _added_tokens(header: Header) -> list[AddedToken]:
    strips_space = STRIPPING_NAME.search(header.get("general.name", "")) is not None
    types = header.get("tokenizer.ggml.token_type", ())
    added = []
    for text, token_type in zip(header["tokenizer.ggml.tokens"], types, strict=False):
        if token_type in _WHOLE_TOKEN_TYPES and text:
            is_special = token_type != TokenType.USER_DEFINED
            rstrip = strips_space and text not in NOT_STRIPPED
            added.append(AddedToken(text, special=is_special, rstrip=rstrip, normalized=False))
    return added
