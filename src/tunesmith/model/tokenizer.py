"""The tokenizer, and the three policies around it: padding, added tokens, which ids end a turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.hub.fetch import tokenizer_folder
from tunesmith.model.safetensors_files import read_json

ROW_MULTIPLE = 64  # tensor cores want the vocabulary, a dimension of the head's product, in multiples of this


def load_tokenizer(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe: the model's own or `model.tokenizer`, with added tokens and a padding token.

    Args:
        folder: the model's.

    Raises:
        ModelError: it is missing or broken, or `model.pad_token` is not in its vocabulary.
    """
    source = folder if model.tokenizer is None else tokenizer_folder(model.tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # Transformers and tokenizers raise many kinds for a missing or broken file
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            "the tokenizer cannot be read",
            where=str(source),
            why=f"{type(error).__name__}: {text}",
            fix="put tokenizer.json (or tokenizer.model) and tokenizer_config.json there, or set model.tokenizer",
        ) from error
    new = [t for t in model.added_tokens if t not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in new], special_tokens=True)
    set_padding(tokenizer, model)
    return tokenizer


def set_padding(tokenizer: PreTrainedTokenizerBase, model: Model) -> str:
    """Choose the padding token: the recipe's, the tokenizer's own, its unk, its eos; return one line that says which.

    Padding is masked out of attention and never a target, so any token will do and the vocabulary need not grow.
    """
    if model.pad_token is not None:
        if model.pad_token not in tokenizer.get_vocab():
            raise ModelError(
                f"{model.pad_token!r} is not in the vocabulary",
                where="model.pad_token",
                fix=f"name a token of the tokenizer, or add it: model.added_tokens: [{json.dumps(model.pad_token)}]",
            )
        tokenizer.pad_token = model.pad_token
        source = "the recipe's"
    elif tokenizer.pad_token is not None:
        source = "the tokenizer's own"
    else:
        source = "the tokenizer's unk" if tokenizer.unk_token is not None else "the tokenizer's eos"
        token = tokenizer.unk_token if tokenizer.unk_token is not None else tokenizer.eos_token
        if token is None:
            raise ModelError(
                "the tokenizer has no padding, unknown or end token",
                where="model.pad_token",
                fix="name a token of its vocabulary as model.pad_token",
            )
        tokenizer.pad_token = token
    return f"padding: {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}), {source}; never attended to, never learnt"


def vocab_rows(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that embedding and head need: the config's, or the tokenizer's count rounded up to 64 when that is more."""
    known = int(config.vocab_size)
    return known if len(tokenizer) <= known else -(-len(tokenizer) // ROW_MULTIPLE) * ROW_MULTIPLE


def eos_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a turn: the generation config's list (an instruct model's end of turn among them) and the tokenizer's."""
    ids: set[int] = set()
    for file in (folder / "generation_config.json", folder / "config.json"):
        if file.exists():
            ids |= _ids(read_json(file).get("eos_token_id"), file)
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return ids


def _ids(value: Any, file: Path) -> set[int]:
    if value is None:
        return set()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise ModelError(
            f"eos_token_id is {value!r}", where=str(file), fix="write the id of the end token, or a list of ids"
        )
    return set(values)
