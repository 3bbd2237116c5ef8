"""Conversion of a Transformers tokenizer to the keys `tokenizer.*` of a GGUF header.

llama.cpp implements tokenizers in C++. Its name for byte-level BPE is `gpt2`. The regular
expressions that split a text before BPE have a name, which is the value of the key
`tokenizer.ggml.pre`. A wrong name gives wrong token ids without an error, so unknown tokenizers are
refused. llama.cpp's name for SentencePiece's BPE is `llama`. This BPE works on characters, has
tokens for single bytes, and first joins the pair with the highest score.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tunesmith.answers.load_run import OpenedRun
from tunesmith.errors import ModelError
from tunesmith.tools.export.gguf.families import SERVE_FOLDER, ModelConfig

# Regular expressions for each value of `tokenizer.ggml.pre`.
PRE_TOKENIZER_TABLE = json.loads(
    Path(__file__).with_name("pre_tokenizers.json").read_text(encoding="utf-8")
)
SPACE = "\u2581"  # SentencePiece's character for a space
# If the model's name (`general.name`) matches this pattern, llama.cpp removes whitespace after
# special tokens, except after the tokens in NOT_STRIPPED.
STRIPPING_NAME = re.compile("phi-?3", re.IGNORECASE)
NOT_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}
# Scores of tokens that no merge produces: the first is for added and special tokens, the second for
# rows of the embedding that no token uses.
ADDED_SCORE = -1000.0
UNUSED_SCORE = -10000.0
SPECIAL_IDS = (
    "bos_token_id",
    "eos_token_id",
    "unk_token_id",
    "sep_token_id",
    "pad_token_id",
    "mask_token_id",
)
# Pattern for tokens that are special in chat templates, although some models do not mark them as
# special. llama.cpp's converter also treats these tokens as special.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>", re.DOTALL)

# Value of `prepend_scheme` in tokenizer.json -> note for the user.
_NOTES_ON_SPACES = {
    "always": "llama.cpp adds a space even to a text that starts with a space; the run's tokenizer "
    "does not",
    "first": "llama.cpp adds a space after every special token; the run's tokenizer adds it only "
    "at the start of the text",
}

TokenizerFile = Mapping[str, Any]  # content of tokenizer.json
# Normalizer or pre-tokenizer in tokenizer.json. Its key `type` has the name of a class of the
# package tokenizers, and the other keys are the arguments of this class.
TextStep = Mapping[str, Any]


class TokenType(IntEnum):
    """Types of tokens in llama.cpp, with the values of `gguf.TokenType`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special token: matched in a text only if the caller asks for it
    USER_DEFINED = 4  # added token: matched in any text before the rest is split
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GgufTokenizer:
    """Tokenizer for a GGUF header.

    Attributes:
        keys: the values for `plan.add_keys`. Some of them are:
            tokenizer_model: `gpt2` for byte-level BPE, `llama` for the BPE of SentencePiece.
            tokenizer_pre: the name of the regular expressions that split a text before BPE.
            token_list, token_types: text and `TokenType` of each row of the embedding.
            token_scores: score of each token, only for `llama`. The pair that gives the token with
                the highest score is joined first.
            token_merges: only for `gpt2`: pairs `left right`, in the order in which they are
                applied.
            eot_token_id: the end-of-turn token, if it is not eos.
        strips_space: whether whitespace after a special token is removed, as for Phi-3.
        notes: differences between llama.cpp and Transformers, for the user.
    """

    keys: Mapping[str, Any]
    strips_space: bool
    notes: tuple[str, ...]


def read_gguf_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    config: ModelConfig,
    turn_end: int | None = None,
) -> GgufTokenizer:
    """Convert a tokenizer to the values of a GGUF header.

    Args:
        rows: number of rows of the model's embedding.
        config: the model's config, for special tokens that the tokenizer does not have.
        turn_end: the token that ends an answer, if it is not eos.

    Raise ModelError if llama.cpp could give other token ids.
    """
    state = _read_tokenizer_file(tokenizer)
    model = state["model"]
    # Leave out tokens that have no row in the embedding. Some tokenizers have such tokens.
    vocab = {token: index for token, index in model["vocab"].items() if index < rows}
    added = [token for token in state["added_tokens"] if token["id"] < rows]
    tokens, types = _token_lists(vocab, added, rows)
    special = _special_ids(tokenizer, rows, config, turn_end)
    notes: list[str] = []
    is_sentencepiece = bool(model.get("byte_fallback"))
    pre = "default"
    adds_space = scores = merges = None
    if is_sentencepiece:
        adds_space = _adds_space(state, notes)
        scores = _scores(model["merges"], vocab, tokens, types, special.get("unk_token_id"))
    else:
        pre = _byte_level_name(tokenizer, state, notes)
        merges = [
            " ".join(part.replace(" ", "\u0120") for part in pair) for pair in model["merges"]
        ]
    strips_space = _strips_space(added, {*tokens}, notes)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # the tokenizer has several templates
        template = template.get("default")
    # Encode any text, to see whether the tokenizer adds bos and eos.
    ids = tokenizer.encode("a")
    keys = {
        "tokenizer_model": "llama" if is_sentencepiece else "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_scores": scores,
        "token_types": types,
        "token_merges": merges,
        **special,
        "add_bos_token": bool(ids) and ids[0] == special.get("bos_token_id"),
        "add_eos_token": len(ids) > 1 and ids[-1] == special.get("eos_token_id"),
        "add_space_prefix": adds_space,
        "chat_template": template or None,
    }
    return GgufTokenizer(keys, strips_space, tuple(notes))


def _read_tokenizer_file(tokenizer: PreTrainedTokenizerBase) -> TokenizerFile:
    """Return the content of tokenizer.json. Raise ModelError if its model is not a plain BPE."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unknown_tokenizer(f"{type(tokenizer).__name__} has no tokenizer.json")
    state: TokenizerFile = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unknown_tokenizer(f"the model of the tokenizer is {model['type']}, not BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if affix := model.get(key):
            raise _unknown_tokenizer(f"the model of the tokenizer has {key} = {affix!r}")
    return state


def _unknown_tokenizer(why: str) -> ModelError:
    return ModelError(
        "no tokenizer of llama.cpp is known to give the same token ids as the run's tokenizer",
        where="tokenizer.json",
        why=why,
        fix=SERVE_FOLDER,
    )


def _special_ids(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    config: ModelConfig,
    turn_end: int | None,
) -> dict[str, int]:
    special = {}
    for name in SPECIAL_IDS:
        index = getattr(tokenizer, name, None)
        if index is None:
            index = config.get(name)
        if isinstance(index, int) and 0 <= index < rows:
            special[name] = index
    if turn_end is not None and turn_end != special.get("eos_token_id"):
        special["eot_token_id"] = turn_end
    return special


def _token_lists(
    vocab: Mapping[str, int], added: Collection[Mapping[str, Any]], rows: int
) -> tuple[list[str], list[TokenType]]:
    """Return two lists: the text and the type of each embedding row's token."""
    # An embedding often has more rows than there are tokens. Each additional row needs a unique
    # text.
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, index in vocab.items():
        tokens[index] = text
        types[index] = TokenType.NORMAL
    for token in added:
        index, text = token["id"], token["content"]
        if token["special"] or _LOOKS_SPECIAL.fullmatch(text):
            types[index] = TokenType.CONTROL
            tokens[index] = text
        else:
            types[index] = TokenType.USER_DEFINED
            # llama.cpp searches for these tokens in the original text, where spaces are not
            # escaped.
            tokens[index] = text.replace(SPACE, " ")
    return tokens, types


def _strips_space(added: Collection[Mapping[str, Any]], tokens: set[str], notes: list[str]) -> bool:
    """Return whether llama.cpp should remove whitespace after special tokens.

    If llama.cpp then differs from the tokenizer for some tokens, add a note for the user.

    Args:
        added: the added tokens of tokenizer.json.
        tokens: the texts of all tokens.
    """
    stripped = {token["content"] for token in added if token["rstrip"]}
    unstripped = {token["content"] for token in added} - stripped
    if not stripped:
        return False
    # llama.cpp removes whitespace after special tokens if the model's name contains "Phi-3". But it
    # cannot load a file with this name if one of the tokens below is missing.
    if not tokens >= {*NOT_STRIPPED, "</s>"}:
        notes.append(
            f"llama.cpp keeps whitespace after {', '.join(sorted(stripped))}; the run's tokenizer "
            "removes it"
        )
        return False
    if unstripped > NOT_STRIPPED:
        others = ", ".join(sorted(unstripped - NOT_STRIPPED))
        notes.append(f"llama.cpp removes whitespace after {others}; the run's tokenizer keeps it")
    return True


def other_end_id(read: OpenedRun) -> int | None:
    """Return the token that ends an answer, if it is not eos.

    A GGUF file can hold only one such token.
    """
    return min(read.template.end_ids - {read.tokenizer.eos_token_id}, default=None)


def model_name(name: str, strips_space: bool) -> str:
    """Return the model's name, changed so that llama.cpp handles whitespace correctly.

    llama.cpp removes whitespace after special tokens only if the name contains "Phi-3".
    """
    if strips_space and not STRIPPING_NAME.search(name):
        return f"{name} (Phi-3)"
    if not strips_space:
        return STRIPPING_NAME.sub("phi 3", name)
    return name


# Functions for byte-level BPE


def _byte_level_name(
    tokenizer: PreTrainedTokenizerBase, state: TokenizerFile, notes: list[str]
) -> str:
    """Return `pre_tokenizer_name`, and add notes about texts that llama.cpp splits differently."""
    if list(_steps(state["normalizer"])):
        notes.append(
            "llama.cpp does not apply the Unicode normalization NFC, so the token ids of "
            "decomposed letters can differ"
        )
    if not state["model"]["merges"]:
        raise _unknown_tokenizer(
            "the tokenizer has no merges, and llama.cpp cannot open a file without merges"
        )
    pre = pre_tokenizer_name(tokenizer, state)
    if pre in PRE_TOKENIZER_TABLE["notes"] and _splits(state) != served_splits(pre):
        notes.append(PRE_TOKENIZER_TABLE["notes"][pre])
    return pre


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase, state: TokenizerFile) -> str:
    """Return the value of `tokenizer.ggml.pre` for a byte-level tokenizer.

    llama.cpp's converter identifies a tokenizer by the token ids of a fixed text. If these ids are
    unknown, for example because the vocabulary was trained again, use the pre-tokenizer in
    tokenizer.json. Raise ModelError if llama.cpp does not know this pre-tokenizer either.
    """
    ids = tokenizer.encode(PRE_TOKENIZER_TABLE["text"])
    name = PRE_TOKENIZER_TABLE["hashes"].get(hashlib.sha256(str(ids).encode()).hexdigest())
    if name is not None:
        return str(name)
    # The vocabulary is unknown, so identify the pre-tokenizer by its regular expressions.
    splits = _splits(state)
    rows = PRE_TOKENIZER_TABLE["structures"]
    rows = [row for row in rows if splits in (row["splits"], row.get("served", row["splits"]))]
    if not rows:
        raise _unknown_tokenizer(
            f"no pre-tokenizer of llama.cpp is known to split text by {splits}"
        )
    ignores_merges = bool(state["model"].get("ignore_merges"))
    same = [row for row in rows if row["ignore_merges"] == ignores_merges]
    # If only `ignore_merges` differs, use the first row that has the regular expressions. If
    # `ignore_merges` is true, a word in the vocabulary becomes one token without merges. This makes
    # no difference if the merges can produce every token of the vocabulary.
    return str((same or rows)[0]["pre"])


def served_splits(pre: str) -> list[str] | None:
    """Return the regular expressions with which llama.cpp splits a text, in the order of their use.

    `pre` is the value of `tokenizer.ggml.pre`. Return None if it is unknown.
    """
    rows = PRE_TOKENIZER_TABLE["structures"]
    row = next((row for row in rows if pre in (row["pre"], *row.get("also", ()))), None)
    return row.get("served", row["splits"]) if row else None


def _splits(state: TokenizerFile) -> list[str] | None:
    """Return the regular expressions that split a text, in the order in which they are applied.

    Return None if the normalizer or pre-tokenizer has an unsupported kind of step.
    """
    if any(step["type"] != "NFC" for step in _steps(state["normalizer"])):
        return None
    steps = list(_steps(state["pre_tokenizer"]))
    # The last step must convert bytes to letters.
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    splits = []
    for step in steps[:-1]:
        split = _split_of(step)
        if split is None:
            return None
        splits.append(split)
    if steps[-1]["use_regex"]:
        splits.append("gpt-2")
    return splits or None


def _split_of(step: TextStep) -> str | None:
    """Return the regular expression of one step. Return None for an unsupported kind of step."""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digit"
    if step["type"] == "Split" and "Regex" in step["pattern"]:
        # "Isolated" keeps the matches and the text between the matches. "Removed" with `invert`
        # keeps only the matches. Both are equivalent if the matches cover the entire text.
        how = (step["behavior"], step["invert"])
        if how in (("Isolated", False), ("Removed", True)):
            return str(step["pattern"]["Regex"])
    return None


def _steps(part: TextStep | None) -> Iterator[TextStep]:
    """Yield the steps of a normalizer or pre-tokenizer. Nested sequences are flattened."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for member in (*part.get("normalizers", ()), *part.get("pretokenizers", ())):
        yield from _steps(member)


# Functions for SentencePiece's BPE


def _adds_space(state: TokenizerFile, notes: list[str]) -> bool:
    """Return whether encoding adds a space at the start of a text.

    Raise ModelError if the tokenizer changes or splits a text in any way other than
    SentencePiece's, which only escapes spaces.
    """
    adds = False
    for step in _steps(state["normalizer"]):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            adds = True
        elif step["type"] != "Replace" or step["content"] != SPACE:
            raise _unknown_tokenizer(f"the tokenizer normalizes text with {step['type']}")
    for step in _steps(state["pre_tokenizer"]):
        if step["type"] == "Metaspace" and not step["split"]:
            scheme = step["prepend_scheme"]
            adds = adds or scheme != "never"
            if scheme in _NOTES_ON_SPACES:
                notes.append(_NOTES_ON_SPACES[scheme])
        # A split at " " has no effect, because the normalizer has already replaced all spaces.
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:
            raise _unknown_tokenizer(f"the tokenizer splits text with {step['type']}")
    return adds


def _scores(
    merges: Sequence[list[str]],
    vocab: Mapping[str, int],
    tokens: list[str],
    types: list[TokenType],
    unknown: int | None,
) -> list[float]:
    """Return the score of each token.

    Also set the types of the byte tokens and of the unknown token in `types`. Raise ModelError if
    the vocabulary or the merges cannot be expressed in a GGUF file.
    """
    for byte in range(256):
        index = vocab.get(f"<0x{byte:02X}>")
        if index is None:
            raise _unknown_tokenizer(f"the vocabulary has no <0x{byte:02X}>")
        types[index] = TokenType.BYTE
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    # Tokens that are searched for in the text before BPE. No merge has to produce these tokens.
    whole = {text for text, kind in zip(tokens, types, strict=True) if kind != TokenType.NORMAL}
    whole |= {text.replace(" ", SPACE) for text in whole}
    ranks = _join_ranks(merges, whole)
    _check_pairs(merges, vocab.keys() - whole)
    # Earlier merges have a higher score.
    scores = [-float(ranks.get(text, 0)) for text in tokens]
    fixed_scores = {
        TokenType.UNUSED: UNUSED_SCORE,
        TokenType.CONTROL: ADDED_SCORE,
        TokenType.USER_DEFINED: ADDED_SCORE,
    }
    return [fixed_scores.get(kind, score) for kind, score in zip(types, scores, strict=True)]


def _join_ranks(merges: Sequence[list[str]], whole: set[str]) -> dict[str, int]:
    """Return the rank of each token that a merge produces. Merges with low ranks come first.

    tokenizer.json ranks the pairs to join, but llama.cpp ranks the tokens that result from joining.
    Raise ModelError if ranks of tokens cannot express the ranks of the pairs.
    """
    ranks: dict[str, int] = {}
    previous = ""
    for left, right in merges:
        joined = left + right
        # All pairs that result in the same token get one rank. Therefore they must be next to each
        # other in the list of pairs.
        if joined in ranks and joined != previous and joined not in whole:
            raise _unknown_tokenizer(
                f"the merges that give {joined!r} are not next to each other in the list"
            )
        ranks.setdefault(joined, len(ranks))
        previous = joined
    return ranks


def _check_pairs(merges: Sequence[list[str]], tokens: set[str]) -> None:
    """Raise ModelError if the merges lack two tokens whose concatenation is also a token.

    llama.cpp joins any two tokens that result in a token.
    """
    pairs = {(left, right) for left, right in merges}
    for token in sorted(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in tokens and right in tokens and (left, right) not in pairs:
                raise _unknown_tokenizer(
                    f"the merges lack {left!r} and {right!r}, which together are a token"
                )
