"""The tokenizer: padding, added tokens, and which ids end a turn."""

import json
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.host_files import refuse_special_files
from tunesmith.model.load import one_line
from tunesmith.model.safetensors_files import read_json


def load_tokenizer(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """A recipe's tokenizer, with added tokens and a padding token; ModelError where it is missing or broken."""
    refuse_special_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        tokenizer("a")  # a setting of a wrong type shows in use only
    except Exception as error:  # Transformers and tokenizers raise many kinds for a missing or broken file
        fix = "put tokenizer.json (or tokenizer.model) and tokenizer_config.json there, or set model.tokenizer"
        raise ModelError("the tokenizer cannot be read", where=str(folder), why=one_line(error), fix=fix) from error
    new = [t for t in model.added_tokens if t not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in new], special_tokens=True)
    set_padding(tokenizer, model)
    return tokenizer


def set_padding(tokenizer: PreTrainedTokenizerBase, model: Model) -> None:
    """Set the padding token: the recipe's, else the tokenizer's own, its unk, its eos.

    Padding is masked out of attention and never a target, so any token will do and the vocabulary need not grow.
    """
    if model.pad_token is not None and model.pad_token not in tokenizer.get_vocab():
        fix = f"name a token of the tokenizer, or add it: model.added_tokens: [{json.dumps(model.pad_token)}]"
        raise ModelError(f"{model.pad_token!r} is not in the vocabulary", where="model.pad_token", fix=fix)
    candidates = (model.pad_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token)
    if (token := next((t for t in candidates if t is not None), None)) is None:
        what, fix = "the tokenizer has no padding, unknown or end token", "name a token of its vocabulary there"
        raise ModelError(what, where="model.pad_token", fix=fix)
    tokenizer.pad_token = token


def vocab_rows(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model: Model) -> int:
    """Rows that embedding and head need: the config's, or with `model.added_tokens` the tokenizer's count if that is more.

    ModelError where the padding token would have no row. Other tokens without one are not an error as long as no row of
    the data holds them: Gemma 3's tokenizer has one token for images more than its text model has rows.
    """
    rows = max(int(config.vocab_size), len(tokenizer) if model.added_tokens else 0)
    if tokenizer.pad_token_id >= rows:
        what = f"the padding token {tokenizer.pad_token} has the id {tokenizer.pad_token_id}, and the embedding {rows} rows"
        ends = [tokenizer.unk_token, tokenizer.eos_token]
        fix = f"name a token of the model: model.pad_token: {json.dumps(next((t for t in ends if t), '...'))}"
        raise ModelError(what, where=str(tokenizer.name_or_path), fix=fix)
    return rows


def eos_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a turn: the generation config's list (an instruct model's end of turn among them) and the tokenizer's."""
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    known = set(tokenizer.get_vocab().values())
    for file in (folder / "generation_config.json", folder / "config.json"):
        value = read_json(file).get("eos_token_id") if file.exists() else None
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            fix = "write the id of the end token, or a list of ids"
            raise ModelError(f"eos_token_id is {value!r}", where=str(file), fix=fix)
        if unknown := sorted(set(values) - known):
            what, why = f"eos_token_id {unknown[0]} is no token", f"the tokenizer's last is {max(known)}"
            fix = "write the tokenizer's end token there"
            fix += "" if tokenizer.eos_token_id is None else f": {tokenizer.eos_token_id}"
            raise ModelError(what, where=str(file), why=why, fix=fix)
        ids.update(values)
    return ids
