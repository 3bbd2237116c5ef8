"""The tokenizer: padding, added tokens, and which ids end a turn."""

import json
from collections.abc import Collection
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError, is_fault
from tunesmith.host.files import check_regular_files
from tunesmith.model.load import one_line
from tunesmith.model.safetensors_files import read_json

GENERATION_CONFIG = "generation_config.json"


def load_tokenizer(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """A recipe's tokenizer, with added tokens and a padding token; ModelError where it is missing
    or broken.
    """
    check_regular_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        tokenizer("a")  # a setting of a wrong type shows in use only
    # Transformers and tokenizers raise many kinds for a missing or broken file.
    except BaseException as error:
        if not is_fault(error):
            raise
        raise ModelError(
            "the tokenizer cannot be read",
            where=str(folder),
            why=one_line(error),
            fix="put tokenizer.json (or tokenizer.model) and tokenizer_config.json there, or set "
            "model.tokenizer",
        ) from error
    vocabulary = tokenizer.get_vocab()
    tokens = []
    for text in model.added_tokens:
        if text not in vocabulary:
            tokens.append(AddedToken(text, special=True, normalized=False))
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)
    set_padding(tokenizer, model)
    return tokenizer


def set_padding(tokenizer: PreTrainedTokenizerBase, model: Model) -> None:
    """Set the padding token: the recipe's, else the tokenizer's own, its unk, its eos.

    Padding is masked out of attention and never a target, so any token will do and the vocabulary
    need not grow.
    """
    if model.pad_token is not None and model.pad_token not in tokenizer.get_vocab():
        key = f"model.added_tokens: [{json.dumps(model.pad_token)}]"
        raise ModelError(
            f"{model.pad_token!r} is not in the vocabulary",
            where="model.pad_token",
            fix=f"use a token of the tokenizer, or add it: {key}",
        )
    candidates = (model.pad_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token)
    for token in candidates:
        if token is not None:
            tokenizer.pad_token = token
            return
    raise ModelError(
        "the tokenizer has no padding, unknown or end token",
        where="model.pad_token",
        fix="use a token of its vocabulary there",
    )


def vocab_rows(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model: Model) -> int:
    """Rows that embedding and head need.

    These are the config's, or with `model.added_tokens` the tokenizer's count if that is more.
    ModelError where the padding token would have no row. Other tokens without one are not an error
    as long as no row of the data holds them: Gemma 3's tokenizer has one token for images more than
    its text model has rows.
    """
    rows = int(config.vocab_size)
    if model.added_tokens:
        rows = max(rows, len(tokenizer))
    if tokenizer.pad_token_id >= rows:
        padding = f"the padding token {tokenizer.pad_token} has the id {tokenizer.pad_token_id}"
        other = tokenizer.unk_token or tokenizer.eos_token or "..."
        raise ModelError(
            f"{padding}, and the embedding {rows} rows",
            where=str(tokenizer.name_or_path),
            fix=f"use a token of the model: model.pad_token: {json.dumps(other)}",
        )
    return rows


def eos_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a turn: those of the generation config and config.json, and the tokenizer's.

    The generation config of an instruct model lists its end of turn.
    """
    ids = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    token_ids = set(tokenizer.get_vocab().values())
    for file in (folder / GENERATION_CONFIG, folder / "config.json"):
        values = _stated_eos_ids(file)
        unknown = sorted(set(values) - token_ids)
        if unknown:
            fix = "write the tokenizer's end token there"
            if tokenizer.eos_token_id is not None:
                fix = f"{fix}: {tokenizer.eos_token_id}"
            raise ModelError(
                f"eos_token_id {unknown[0]} is not a token",
                where=str(file),
                why=f"the tokenizer's last is {max(token_ids)}",
                fix=fix,
            )
        ids.update(values)
    return ids


def generation_config_text(
    base: Path, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]
) -> str:
    """The text of a trained model's `generation_config.json`: the sampling defaults of the base, a
    folder, and the tokens that end an answer.

    The file is read as JSON: GenerationConfig refuses to save some that models do ship.
    """
    file = base / GENERATION_CONFIG
    settings: dict[str, object] = read_json(file) if file.is_file() else {}
    settings["eos_token_id"] = sorted(end_ids)
    settings["pad_token_id"] = tokenizer.pad_token_id
    return json.dumps(settings, indent=2) + "\n"


def _stated_eos_ids(file: Path) -> list[int]:
    """Read what a JSON file says of `eos_token_id`; none where it is missing."""
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
                where=str(file),
                fix="write the id of the end token, or a list of ids",
            )
    return values
