"""A Transformers tokenizer as the `tokenizer.*` part of a GGUF header.

llama.cpp has its own tokenizers in C++. Byte-level BPE is `gpt2`, whose regular expressions go by a
name in `tokenizer.ggml.pre`; a wrong name gives other ids without an error, so a tokenizer that is
not recognized is refused. BPE over characters with tokens for single bytes, as of SentencePiece, is
`llama`, which joins the pair with the highest score.
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
from tunesmith.tools.export.gguf.families import ModelConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter

ADDED_SCORE = -1000.0
UNUSED_SCORE = -10000.0
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_SERVE_FOLDER = "serve the Transformers folder, whose tokenizer is exact: tunesmith merge RUN"


class TextStep(TypedDict, total=False):
    """A normalizer or pre-tokenizer of tokenizer.json; each but `type` is of some types alone."""

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
    """The part `model` of tokenizer.json."""

    type: str
    vocab: dict[str, int]
    merges: Sequence[list[str]]  # pairs
    byte_fallback: bool
    ignore_merges: bool
    continuing_subword_prefix: str
    end_of_word_suffix: str


class AddedToken(TypedDict):
    """One of the tokens that stand beside the vocabulary in tokenizer.json."""

    id: int
    content: str
    special: bool
    rstrip: bool


class TokenizerFile(TypedDict):
    """The content of tokenizer.json."""

    model: BpeModel
    normalizer: TextStep | None
    pre_tokenizer: TextStep | None
    added_tokens: list[AddedToken]


@dataclass(frozen=True)
class GgufTokenizer:
    """The header's entries about the tokenizer.

    Attributes:
        model: `gpt2` for byte-level BPE, `llama` for SentencePiece's.
        pre: the name of the regular expressions that text is split by first.
        tokens, types: one for each row of the embedding.
        scores: of `llama`: the pair with the highest is joined first.
        merges: of `gpt2`: `left right`, in the order in which they apply.
        special: ids by `bos`, `eos`, ..., and `eot` where a turn ends with another token than eos.
        add_bos, add_eos: whether encoding puts them around a text.
        add_space: whether encoding puts a space in front of a text.
        strips_space: whether space after a special token is dropped, as of Phi-3.
        chat_template: Jinja; None: there is none.
        notes: for the user: what llama.cpp does in another way.
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
    """The tokenizer of a model whose embedding has `rows` rows.

    `config` is the model's, for ids of special tokens that the tokenizer does not name. `turn_end`
    is the token that ends an answer, where it is not eos. ModelError where llama.cpp would give
    other ids.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unknown_tokenizer(f"{type(tokenizer).__name__} has no tokenizer.json")
    state: TokenizerFile = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unknown_tokenizer(f"its model is {model['type']}, not BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if affix := model.get(key):
            raise _unknown_tokenizer(f"its model has {key} = {affix!r}")
    # Rows of the embedding count: a tokenizer may know tokens that the model has no row for.
    vocab = {token: index for token, index in model["vocab"].items() if index < rows}
    added = {token["id"]: token for token in state["added_tokens"] if token["id"] < rows}
    tokens, types = _token_lists(vocab, added, rows)
    special = _special_ids(tokenizer, rows, config, turn_end)
    # What encoding puts around a text shows in the ids of any text.
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
        merges = tuple(_merge_text(pair) for pair in model["merges"])
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
        "llama.cpp has no tokenizer that is known to give the same ids",
        where="tokenizer.json",
        why=why,
        fix=_SERVE_FOLDER,
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
    """A tokenizer may have several by name; llama.cpp uses one."""
    if isinstance(template, Mapping):
        return template.get("default")
    return template


# Tokens that some models add for their templates and training without marking them as special;
# llama.cpp's converter takes them for it.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>", re.DOTALL)


def _added_type(token: AddedToken) -> TokenType:
    if token["special"] or _LOOKS_SPECIAL.fullmatch(token["content"]):
        return TokenType.CONTROL
    return TokenType.USER_DEFINED


def _stripping(added: Collection[AddedToken], tokens: set[str]) -> tuple[bool, list[str]]:
    """Tell whether space after special tokens is dropped, by the name, and add notes on that."""
    dropped = {token["content"] for token in added if token["rstrip"]}
    unstripped = {token["content"] for token in added} - dropped
    if not dropped:
        return False, []
    # llama.cpp does not load a file with the name that lacks one of the four.
    if not tokens >= {*NOT_STRIPPED, "</s>"}:
        return False, [f"llama.cpp keeps space after {', '.join(sorted(dropped))}"]
    if unstripped > NOT_STRIPPED:
        others = ", ".join(sorted(unstripped - NOT_STRIPPED))
        return True, [f"llama.cpp drops space after {others}, too"]
    return True, []


def model_name(name: str, strips_space: bool) -> str:
    """`name` as llama.cpp has to read it: whether it has Phi-3 in it decides on space."""
    if strips_space and not STRIPPING_NAME.search(name):
        return f"{name} (Phi-3)"
    if not strips_space:
        return STRIPPING_NAME.sub("phi 3", name)
    return name


def _token_lists(
    vocab: Mapping[str, int], added: Mapping[int, AddedToken], rows: int
) -> tuple[list[str], list[TokenType]]:
    """Text and type of every row: of no token, of the vocabulary, added."""
    # An embedding is often padded to a round number of rows; each needs a text of its own.
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, index in vocab.items():
        tokens[index] = text
        types[index] = TokenType.NORMAL
    for index, token in added.items():
        types[index] = _added_type(token)
        tokens[index] = token["content"]
        if types[index] is TokenType.USER_DEFINED:
            # llama.cpp looks for it in the text as it was written.
            tokens[index] = token["content"].replace(SPACE, " ")
    return tokens, types


# Byte-level BPE


def _byte_level_name(
    tokenizer: PreTrainedTokenizerBase, state: TokenizerFile, notes: list[str]
) -> str:
    """`pre_tokenizer_name`, with notes on what llama.cpp splits otherwise."""
    if list(_steps(state["normalizer"])):
        notes.append("llama.cpp does not compose letters (NFC): two code points stay two")
    if not state["model"]["merges"]:
        raise _unknown_tokenizer("it joins no bytes to tokens, and llama.cpp opens no such file")
    pre = pre_tokenizer_name(tokenizer, state)
    if pre in PRE_TOKENIZER_TABLE["notes"] and _splits(state) != served_splits(pre):
        notes.append(PRE_TOKENIZER_TABLE["notes"][pre])
    return pre


def _merge_text(pair: list[str]) -> str:
    """Join the two, whose parts may contain a space, by one."""
    return " ".join(part.replace(" ", "\u0120") for part in pair)


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase, state: TokenizerFile) -> str:
    """`tokenizer.ggml.pre`, by the ids of a fixed text, else by the steps of tokenizer.json.

    The first is llama.cpp's own key, and sees the whole tokenizer; a vocabulary that was trained
    anew has other ids, and keeps the steps. ModelError where both are unknown.
    """
    ids = tokenizer.encode(PRE_TOKENIZER_TABLE["text"])
    name = PRE_TOKENIZER_TABLE["hashes"].get(hashlib.sha256(str(ids).encode()).hexdigest())
    if name is not None:
        # The vocabulary is unknown: by its steps.
        return str(name)
    splits = _splits(state)
    ignores_merges = bool(state["model"].get("ignore_merges"))
    names = []
    for row in PRE_TOKENIZER_TABLE["structures"]:
        if splits in (row["splits"], row.get("served", row["splits"])):
            if row["ignore_merges"] == ignores_merges:
                return str(row["pre"])
            names.append(row["pre"])
    if names:
        # Same splits, and a whole word that is a token is one only for the other: in a vocabulary
        # whose merges lead to every token both give the same ids.
        return str(names[0])
    raise _unknown_tokenizer(f"nothing in llama.cpp is known to split text by {splits}")


def _splits(state: TokenizerFile) -> list[str] | None:
    """The regular expressions that text is split by, one after the other.

    None where a step is another.
    """
    for step in _steps(state["normalizer"]):
        if step["type"] != "NFC":
            return None
    splits = []
    steps = list(_steps(state["pre_tokenizer"]))
    for position, step in enumerate(steps):
        is_last = position == len(steps) - 1
        # ByteLevel makes letters of bytes, so it has to be the last step, and be there.
        if (step["type"] == "ByteLevel") != is_last:
            return None
        split = _split_of(step)
        if split is None:
            return None
        splits.extend(split)
    return splits or None


def _split_of(step: TextStep) -> list[str] | None:
    """The expressions of one step; None where it does something else."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return ["gpt-2"] if step["use_regex"] else []
    if step["type"] == "Digits" and step["individual_digits"]:
        return ["digit"]
    if step["type"] == "Split" and "Regex" in step["pattern"]:
        # Of an expression that matches all text, the same two ways to write it.
        how = (step["behavior"], step["invert"])
        if how in (("Isolated", False), ("Removed", True)):
            return [step["pattern"]["Regex"]]
    return None


def _steps(part: TextStep | None) -> Iterator[TextStep]:
    """A normalizer or pre-tokenizer as a flat list."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for member in (*part.get("normalizers", ()), *part.get("pretokenizers", ())):
        yield from _steps(member)


# SentencePiece's BPE


def _scores(
    state: TokenizerFile,
    vocab: Mapping[str, int],
    tokens: list[str],
    types: list[TokenType],
    unknown: int | None,
) -> tuple[float, ...]:
    """The score of each token; sets the types of bytes and of the unknown token in `types`."""
    for byte in range(256):
        index = vocab.get(f"<0x{byte:02X}>")
        if index is None:
            raise _unknown_tokenizer(f"its vocabulary has no <0x{byte:02X}>")
        types[index] = TokenType.BYTE
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    ranks = _join_ranks(state["model"]["merges"], vocab, tokens, types)
    scores = []
    for text, token_type in zip(tokens, types, strict=True):
        if token_type is TokenType.UNUSED:
            scores.append(UNUSED_SCORE)
        # No pair is joined to such a token: it is matched in the text before.
        elif token_type in (TokenType.CONTROL, TokenType.USER_DEFINED):
            scores.append(ADDED_SCORE)
        else:
            # The earlier a merge stands in the list, the higher its score.
            scores.append(-float(ranks.get(text, 0)))
    return tuple(scores)


def _adds_space(state: TokenizerFile, notes: list[str]) -> bool:
    """Tell whether encoding puts a space in front.

    ModelError where text is changed or split by more than SentencePiece's escape of spaces.
    """
    adds = False
    for step in _steps(state["normalizer"]):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            adds = True
        elif step["type"] != "Replace" or step["content"] != SPACE:
            raise _unknown_tokenizer(f"text is normalized by {step['type']}")
    for step in _steps(state["pre_tokenizer"]):
        if step["type"] == "Metaspace" and not step["split"]:
            adds = adds or step["prepend_scheme"] != "never"
            if step["prepend_scheme"] == "always":
                notes.append("llama.cpp puts a space in front of text that begins with one, too")
            if step["prepend_scheme"] == "first":
                notes.append("llama.cpp puts a space in front of text after any special token")
        # No space is left to split by: the normalizer has replaced them.
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:
            raise _unknown_tokenizer(f"text is split by {step['type']}")
    return adds


def _join_ranks(
    merges: Sequence[list[str]],
    vocab: Mapping[str, int],
    tokens: list[str],
    types: list[TokenType],
) -> dict[str, int]:
    """The order in which tokens are joined from two others: the smallest first.

    llama.cpp joins any two that make a token, by that token's score; tokenizer.json lists the
    pairs. ModelError where one order cannot express the list.
    """
    # Matched in the text before any pair is joined.
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
        # One score stands for all pairs that make a token, so they must follow each other in the
        # list.
        if joined in ranks and joined != previous and joined not in whole:
            raise _unknown_tokenizer(f"the pairs that make {joined!r} do not follow each other")
        ranks.setdefault(joined, len(ranks))
        previous = joined
    for token in vocab:
        if token not in whole:
            _check_pairs(token, pairs, vocab, whole)
    return ranks


def _check_pairs(
    joined: str, pairs: set[tuple[str, str]], vocab: Mapping[str, int], whole: set[str]
) -> None:
    # llama.cpp would join each two parts that make a token, in the list or not.
    for split in range(1, len(joined)):
        left, right = joined[:split], joined[split:]
        is_pair = left in vocab and right in vocab and left not in whole and right not in whole
        if is_pair and (left, right) not in pairs:
            raise _unknown_tokenizer(f"no merge of {left!r} and {right!r}, which make a token")


# The header


def add_tokenizer(writer: "GGUFWriter", tokenizer: GgufTokenizer) -> None:
    """The tokenizer into a `gguf.GGUFWriter`."""
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
