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
from typing import TYPE_CHECKING, TypedDict

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tunesmith.errors import ModelError
from tunesmith.hub.gguf_tokenizer import (
    NOT_STRIPPED,
    PRE_TOKENIZER_TABLE,
    SPACE,
    STRIPPING_NAME,
    TokenType,
    served_splits,
)
from tunesmith.tools.export.gguf.families import SERVE_FOLDER, ModelConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Scores of tokens that no merge produces: the first is for added and special tokens, the second for
# rows of the embedding that no token uses.
ADDED_SCORE = -1000.0
UNUSED_SCORE = -10000.0
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


class TextStep(TypedDict, total=False):
    """Normalizer or pre-tokenizer in tokenizer.json. Only the key `type` occurs in all types.

    The two types with the name Sequence contain a list of further steps.
    """

    type: str
    normalizers: "Sequence[TextStep]"
    pretokenizers: "Sequence[TextStep]"
    content: str
    prepend: str
    prepend_scheme: str
    split: bool
    pattern: dict[str, str]
    behavior: str
    invert: bool
    add_prefix_space: bool
    use_regex: bool
    individual_digits: bool


class BpeModel(TypedDict, total=False):
    """Object `model` in tokenizer.json."""

    type: str
    vocab: dict[str, int]
    merges: Sequence[list[str]]  # pairs of tokens
    byte_fallback: bool
    ignore_merges: bool
    continuing_subword_prefix: str
    end_of_word_suffix: str


class AddedToken(TypedDict):
    """Element of `added_tokens` in tokenizer.json."""

    id: int
    content: str
    special: bool
    rstrip: bool


class TokenizerFile(TypedDict):
    """Content of tokenizer.json."""

    model: BpeModel
    normalizer: TextStep | None
    pre_tokenizer: TextStep | None
    added_tokens: list[AddedToken]


@dataclass(frozen=True)
class GgufTokenizer:
    """Values of the tokenizer's keys in a GGUF header.

    Attributes:
        model: `gpt2` for byte-level BPE, `llama` for the BPE of SentencePiece.
        pre: the name of the regular expressions that split a text before BPE.
        tokens, types: text and `TokenType` of each row of the embedding.
        scores: score of each token, only for `llama`. The pair that gives the token with the
            highest score is joined first.
        merges: only for `gpt2`: pairs `left right`, in the order in which they are applied.
        special: token ids by name, such as `bos` and `eos`. `eot` is an end-of-turn token that is
            not eos.
        add_bos, add_eos: whether encoding adds the bos and eos token to a text.
        add_space: whether encoding adds a space at the start of a text.
        strips_space: whether whitespace after a special token is removed, as for Phi-3.
        chat_template: the Jinja template, or None.
        notes: differences between llama.cpp and Transformers, for the user.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space: bool
    strips_space: bool
    chat_template: str | None
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
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unknown_tokenizer(f"{type(tokenizer).__name__} has no tokenizer.json")
    state: TokenizerFile = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unknown_tokenizer(f"the model of the tokenizer is {model['type']}, not BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if affix := model.get(key):
            raise _unknown_tokenizer(f"the model of the tokenizer has {key} = {affix!r}")
    # Leave out tokens that have no row in the embedding. Some tokenizers have such tokens.
    vocab = {token: index for token, index in model["vocab"].items() if index < rows}
    added = {token["id"]: token for token in state["added_tokens"] if token["id"] < rows}
    tokens, types = _token_lists(vocab, added, rows)
    special = _special_ids(tokenizer, rows, config, turn_end)
    # Encode any text, to see whether the tokenizer adds bos and eos.
    ids = tokenizer.encode("a")
    notes: list[str] = []
    is_sentencepiece = bool(model.get("byte_fallback"))
    pre, adds_space = "default", False
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    if is_sentencepiece:
        adds_space = _adds_space(state, notes)
        scores = _scores(state, vocab, tokens, types, special.get("unk"))
    else:
        pre = _byte_level_name(tokenizer, state, notes)
        merges = tuple(
            " ".join(part.replace(" ", "\u0120") for part in pair) for pair in model["merges"]
        )
    strips_space, stripping_notes = _stripping(added.values(), {*tokens})
    return GgufTokenizer(
        model="llama" if is_sentencepiece else "gpt2",
        pre=pre,
        tokens=tuple(tokens),
        types=tuple(types),
        scores=scores,
        merges=merges,
        special=special,
        add_bos=bool(ids) and ids[0] == special.get("bos"),
        add_eos=len(ids) > 1 and ids[-1] == special.get("eos"),
        add_space=adds_space,
        strips_space=strips_space,
        chat_template=_default_template(tokenizer.chat_template),
        notes=(*notes, *stripping_notes),
    )


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
    for name in SPECIAL:
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is None:
            index = config.get(f"{name}_token_id")
        if isinstance(index, int) and 0 <= index < rows:
            special[name] = index
    if turn_end is not None and turn_end != special.get("eos"):
        special["eot"] = turn_end
    return special


def _default_template(template: str | Mapping[str, str] | None) -> str | None:
    """Return the chat template that llama.cpp uses.

    If a tokenizer has several templates, `template` is a dict.
    """
    if isinstance(template, Mapping):
        return template.get("default")
    return template


# Pattern for tokens that are special in chat templates, although some models do not mark them as
# special. llama.cpp's converter also treats these tokens as special.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>", re.DOTALL)


def _added_type(token: AddedToken) -> TokenType:
    if token["special"] or _LOOKS_SPECIAL.fullmatch(token["content"]):
        return TokenType.CONTROL
    return TokenType.USER_DEFINED


def _stripping(added: Collection[AddedToken], tokens: set[str]) -> tuple[bool, list[str]]:
    """Return whether llama.cpp should remove whitespace after special tokens, and notes.

    The notes tell the user in which cases llama.cpp differs from the tokenizer.

    Args:
        added: the added tokens.
        tokens: the texts of all tokens.
    """
    dropped = {token["content"] for token in added if token["rstrip"]}
    unstripped = {token["content"] for token in added} - dropped
    if not dropped:
        return False, []
    # llama.cpp removes whitespace after special tokens if the model's name contains "Phi-3". But it
    # cannot load a file with this name if one of the tokens below is missing.
    if not tokens >= {*NOT_STRIPPED, "</s>"}:
        return False, [
            f"llama.cpp keeps whitespace after {', '.join(sorted(dropped))}; the run's tokenizer "
            "removes it"
        ]
    if unstripped > NOT_STRIPPED:
        others = ", ".join(sorted(unstripped - NOT_STRIPPED))
        return True, [f"llama.cpp removes whitespace after {others}; the run's tokenizer keeps it"]
    return True, []


def model_name(name: str, strips_space: bool) -> str:
    """Return the model's name, changed so that llama.cpp handles whitespace correctly.

    llama.cpp removes whitespace after special tokens only if the name contains "Phi-3".
    """
    if strips_space and not STRIPPING_NAME.search(name):
        return f"{name} (Phi-3)"
    if not strips_space:
        return STRIPPING_NAME.sub("phi 3", name)
    return name


def _token_lists(
    vocab: Mapping[str, int], added: Mapping[int, AddedToken], rows: int
) -> tuple[list[str], list[TokenType]]:
    """Return two lists: the text and the type of each embedding row's token."""
    # An embedding often has more rows than there are tokens. Each additional row needs a unique
    # text.
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, index in vocab.items():
        tokens[index] = text
        types[index] = TokenType.NORMAL
    for index, token in added.items():
        types[index] = _added_type(token)
        tokens[index] = token["content"]
        if types[index] is TokenType.USER_DEFINED:
            # llama.cpp searches for these tokens in the original text, where spaces are not
            # escaped.
            tokens[index] = token["content"].replace(SPACE, " ")
    return tokens, types


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
    ignores_merges = bool(state["model"].get("ignore_merges"))
    names = []
    for row in PRE_TOKENIZER_TABLE["structures"]:
        if splits in (row["splits"], row.get("served", row["splits"])):
            if row["ignore_merges"] == ignores_merges:
                return str(row["pre"])
            names.append(row["pre"])
    if names:
        # The regular expressions match, but `ignore_merges` differs. If it is true, a word in the
        # vocabulary becomes one token without merges. This makes no difference if the merges can
        # produce every token of the vocabulary.
        return str(names[0])
    raise _unknown_tokenizer(f"no pre-tokenizer of llama.cpp is known to split text by {splits}")


def _splits(state: TokenizerFile) -> list[str] | None:
    """Return the regular expressions that split a text, in the order in which they are applied.

    Return None if the normalizer or pre-tokenizer has an unsupported kind of step.
    """
    for step in _steps(state["normalizer"]):
        if step["type"] != "NFC":
            return None
    splits = []
    steps = list(_steps(state["pre_tokenizer"]))
    for position, step in enumerate(steps):
        is_last = position == len(steps) - 1
        # ByteLevel converts bytes to letters. It must be the last step, and must not occur earlier.
        if (step["type"] == "ByteLevel") != is_last:
            return None
        split = _split_of(step)
        if split is None:
            return None
        splits.extend(split)
    return splits or None


def _split_of(step: TextStep) -> list[str] | None:
    """Return the regular expressions of one step. Return None for an unsupported kind of step."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return ["gpt-2"] if step["use_regex"] else []
    if step["type"] == "Digits" and step["individual_digits"]:
        return ["digit"]
    if step["type"] == "Split" and "Regex" in step["pattern"]:
        # "Isolated" keeps the matches and the text between the matches. "Removed" with `invert`
        # keeps only the matches. Both are equivalent if the matches cover the entire text.
        how = (step["behavior"], step["invert"])
        if how in (("Isolated", False), ("Removed", True)):
            return [step["pattern"]["Regex"]]
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


def _scores(
    state: TokenizerFile,
    vocab: Mapping[str, int],
    tokens: list[str],
    types: list[TokenType],
    unknown: int | None,
) -> tuple[float, ...]:
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
    ranks = _join_ranks(state["model"]["merges"], vocab, tokens, types)
    scores = []
    for text, token_type in zip(tokens, types, strict=True):
        if token_type is TokenType.UNUSED:
            scores.append(UNUSED_SCORE)
        # No merge produces these tokens, because they are searched for in the text before BPE.
        elif token_type in (TokenType.CONTROL, TokenType.USER_DEFINED):
            scores.append(ADDED_SCORE)
        else:
            # Earlier merges have a higher score.
            scores.append(-float(ranks.get(text, 0)))
    return tuple(scores)


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
            adds = adds or step["prepend_scheme"] != "never"
            if step["prepend_scheme"] == "always":
                notes.append(
                    "llama.cpp adds a space even to a text that starts with a space; the run's "
                    "tokenizer does not"
                )
            if step["prepend_scheme"] == "first":
                notes.append(
                    "llama.cpp adds a space after every special token; the run's tokenizer adds it "
                    "only at the start of the text"
                )
        # A split at " " has no effect, because the normalizer has already replaced all spaces.
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:
            raise _unknown_tokenizer(f"the tokenizer splits text with {step['type']}")
    return adds


def _join_ranks(
    merges: Sequence[list[str]],
    vocab: Mapping[str, int],
    tokens: list[str],
    types: list[TokenType],
) -> dict[str, int]:
    """Return the rank of each token that a merge produces. Merges with low ranks come first.

    tokenizer.json ranks the pairs to join. llama.cpp ranks the tokens that result from joining, and
    joins any pair that results in a token. Raise ModelError if ranks of tokens cannot express the
    ranks of the pairs.
    """
    # Tokens that are searched for in the text before BPE. No merge has to produce these tokens.
    whole = {
        tokens[index] for index, token_type in enumerate(types) if token_type != TokenType.NORMAL
    }
    whole |= {text.replace(" ", SPACE) for text in whole}
    ranks: dict[str, int] = {}
    pairs = set()
    previous = ""
    for left, right in merges:
        joined = left + right
        pairs.add((left, right))
        # All pairs that result in the same token get one rank. Therefore they must be next to each
        # other in the list of pairs.
        if joined in ranks and joined != previous and joined not in whole:
            raise _unknown_tokenizer(
                f"the merges that give {joined!r} are not next to each other in the list"
            )
        ranks.setdefault(joined, len(ranks))
        previous = joined
    for token in vocab:
        if token not in whole:
            _check_pairs(token, pairs, vocab, whole)
    return ranks


def _check_pairs(
    joined: str, pairs: set[tuple[str, str]], vocab: Mapping[str, int], whole: set[str]
) -> None:
    # llama.cpp joins any two tokens that result in a token. Therefore the merges must contain every
    # pair that results in `joined`.
    for split in range(1, len(joined)):
        left, right = joined[:split], joined[split:]
        is_pair = left in vocab and right in vocab and left not in whole and right not in whole
        if is_pair and (left, right) not in pairs:
            raise _unknown_tokenizer(
                f"the merges lack {left!r} and {right!r}, which together are a token"
            )


# Functions that write the header of a GGUF file


def add_tokenizer(writer: "GGUFWriter", tokenizer: GgufTokenizer) -> None:
    """Add the keys of the tokenizer to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    writer.add_token_types(tokenizer.types)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    for name, index in tokenizer.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    if tokenizer.model == "llama":
        writer.add_add_space_prefix(tokenizer.add_space)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
