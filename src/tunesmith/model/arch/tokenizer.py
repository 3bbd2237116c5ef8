"""Loading of the tokenizer: padding token, added tokens, and the ids that end a turn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError, is_fault
from tunesmith.host.files import check_regular_files
from tunesmith.host.signals import loading_libraries
from tunesmith.model.arch.spec import one_line
from tunesmith.model.arch.tokenizer_copy import (
    CORE_FILE,
    find_copy,
    follow_core_file,
    read_copy,
    write_copy,
)
from tunesmith.model.weights.safetensors_files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from tunesmith.model.arch.config_facts import ConfigFacts

GENERATION_CONFIG = "generation_config.json"


def load_tokenizer(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a recipe, with its added tokens and a padding token.

    It is read from its copy in the cache, without torch. If there is no copy, it is loaded with
    AutoTokenizer, and a copy is written. Raise ModelError if the tokenizer is missing or broken.
    """
    return _load(folder, model, _load_by_copy)


def load_original_tokenizer(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer as `load_tokenizer` does, but always in the class of the model.

    Use it to save a tokenizer: the class is part of the saved files.
    """
    return _load(folder, model, _load_by_class)


def _load_by_class(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    with loading_libraries():
        from transformers import AutoTokenizer  # imports torch

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    file = folder / CORE_FILE
    if tokenizer.is_fast and file.is_file():
        follow_core_file(tokenizer, file)
    return tokenizer


def _load_by_copy(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    if model.trust_remote_code:
        return _load_by_class(folder, model)
    copy = find_copy(folder)
    tokenizer = read_copy(copy, folder)
    if tokenizer is None:
        tokenizer = _load_by_class(folder, model)
        if (copy / CORE_FILE).exists():
            shutil.rmtree(copy, ignore_errors=True)  # the copy is damaged
        if not copy.exists():
            write_copy(copy, tokenizer)
    return tokenizer


def _load(
    folder: Path, model: Model, load: Callable[[Path, Model], PreTrainedTokenizerBase]
) -> PreTrainedTokenizerBase:
    check_regular_files(folder)
    try:
        tokenizer = load(folder, model)
        tokenizer("a")  # some invalid settings cause an error only at the first call
    # Transformers and tokenizers raise many kinds of errors for a missing or broken file.
    except BaseException as error:
        if not is_fault(error):
            raise
        raise ModelError(
            "the tokenizer cannot be read",
            where=folder,
            why=one_line(error),
            fix="put tokenizer.json (or tokenizer.model) and tokenizer_config.json into this "
            "folder, or set model.tokenizer to a folder with these files",
        ) from error
    vocabulary = tokenizer.get_vocab()
    from transformers import AddedToken

    tokens = [
        AddedToken(text, special=True, normalized=False)
        for text in model.added_tokens
        if text not in vocabulary
    ]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)
    set_padding(tokenizer, model)
    return tokenizer


def set_padding(tokenizer: PreTrainedTokenizerBase, model: Model) -> None:
    """Set the padding token from the recipe, or else the tokenizer's padding, unknown or end token.

    Padding is masked in attention and never has a label. Therefore any token can be used, and no
    padding token must be added to the vocabulary.
    """
    if model.pad_token is not None and model.pad_token not in tokenizer.get_vocab():
        key = f"model.added_tokens: [{json.dumps(model.pad_token)}]"
        raise ModelError(
            f"{model.pad_token!r} is not in the vocabulary",
            where="model.pad_token",
            fix=f"use a token of the tokenizer, or add this token with {key}",
        )
    candidates = (model.pad_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token)
    for token in candidates:
        if token is not None:
            tokenizer.pad_token = token
            return
    raise ModelError(
        "the tokenizer has no padding, unknown or end token",
        where="model.pad_token",
        fix="set model.pad_token to a token of its vocabulary",
    )


def vocab_rows(
    config: PretrainedConfig | ConfigFacts, tokenizer: PreTrainedTokenizerBase, model: Model
) -> int:
    """Return the number of rows that the embedding and the head need.

    This is the config's vocabulary size. With `model.added_tokens`, it is the tokenizer's size if
    the tokenizer is larger. Raise ModelError if the padding token has no row. Other tokens may have
    no row as long as the data does not contain them: Gemma 3's tokenizer has an image token that
    its text model does not have.
    """
    rows = int(config.vocab_size)
    if model.added_tokens:
        rows = max(rows, len(tokenizer))
    if tokenizer.pad_token_id >= rows:
        padding = f"the padding token {tokenizer.pad_token} has the id {tokenizer.pad_token_id}"
        other = tokenizer.unk_token or tokenizer.eos_token or "..."
        raise ModelError(
            f"{padding}, but the embedding has {rows} rows",
            where=tokenizer.name_or_path,
            fix=f"use a token with an embedding, such as model.pad_token: {json.dumps(other)}",
        )
    return rows


def eos_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a turn, from generation_config.json, config.json and the tokenizer.

    The generation config of an instruct model contains its end-of-turn token.
    """
    ids = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    token_ids = set(tokenizer.get_vocab().values())
    for file in (folder / GENERATION_CONFIG, folder / "config.json"):
        values = _stated_eos_ids(file)
        unknown = sorted(set(values) - token_ids)
        if unknown:
            fix = "set it to the tokenizer's end token"
            if tokenizer.eos_token_id is not None:
                fix = f"{fix}: {tokenizer.eos_token_id}"
            raise ModelError(
                f"eos_token_id is {unknown[0]}, but the tokenizer has no token with this id",
                where=file,
                why=f"the tokenizer's largest id is {max(token_ids)}",
                fix=fix,
            )
        ids.update(values)
    return ids


def generation_config_text(
    base: Path, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]
) -> str:
    """Return the text of a trained model's `generation_config.json`.

    It contains the sampling defaults from the folder of the base model, and the tokens that end an
    answer. The file is read as JSON, because GenerationConfig refuses to save some existing files.
    """
    file = base / GENERATION_CONFIG
    settings = {}
    if file.is_file():
        settings = read_json(file)
    settings["eos_token_id"] = sorted(end_ids)
    settings["pad_token_id"] = tokenizer.pad_token_id
    return json.dumps(settings, indent=2) + "\n"


def _stated_eos_ids(file: Path) -> list[int]:
    """Return the ids of `eos_token_id` in a JSON file, or an empty list if there are none."""
    if not file.exists():
        return []
    stated = read_json(file).get("eos_token_id")
    if stated is None:
        return []
    values = stated if isinstance(stated, list) else [stated]
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ModelError(
                f"eos_token_id is {stated!r}",
                where=file,
                fix="write the id of the end token, or a list of ids",
            )
    return values
