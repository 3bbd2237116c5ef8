"""Write a model in the form of the checkpoint that it was loaded from.

Tensors get the names that they have there, experts are written one by one where they are stored so,
and what the model does not have (a vision tower, draft heads) is copied byte for byte. A reader of
the base then reads what was trained.
"""

import json
import math
import shutil
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.model.decoder import vision_parameters
from tunesmith.model.names import (
    Pieces,
    assign_names,
    is_in_whole,
    name_in_checkpoint,
    name_in_whole,
)
from tunesmith.model.safetensors_files import Entry, has_weights, read_headers, read_json
from tunesmith.model.save_tensors import JoinedRows, Source, TensorPart
from tunesmith.model.shipped_entries import StoredEntry, read_entries

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # slow, and a plan needs none

MODEL_CONFIG = "config.json"
# How images become inputs.
PROCESSORS = "*processor_config.json"


def is_stored_otherwise(model: "PreTrainedModel") -> bool:
    """Tell whether a model's base may hold other tensors than the model has."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    # Old names of norms, which every model has a rule for, are not written.
    has_rules = bool(get_model_conversion_mapping(model, add_legacy=False))
    return has_rules or is_in_whole(model)


def in_stored_form(
    model: "PreTrainedModel", tensors: Mapping[str, Tensor], folder: Path | None = None
) -> dict[str, Source]:
    """The tensors of a model as its base stores them.

    Args:
        tensors: by the model's own names; on meta or DTensors too. Tied ones are there once.
        folder: of the base; None: the one that the model's config was read from.

    ModelError where the model is part of a larger one whose files are gone.
    """
    if not is_stored_otherwise(model):
        return dict(tensors)
    folder = folder or Path(model.config.name_or_path)
    if not has_weights(folder):
        if not is_in_whole(model):
            return dict(tensors)  # Transformers reads these names too
        raise ModelError(
            "the base model's files no longer exist",
            where=str(folder),
            why="the image and audio tensors are copied from there when a model is saved",
            fix="restore the folder, then run the same command again",
        )
    headers = read_entries(folder)
    names = assign_names(model, headers, tensors.keys())
    frozen = {name for name, p in vision_parameters(model) if not p.requires_grad}
    written: dict[str, Source] = {}
    # Stored name -> where each of its rows' parameters begins, and that parameter.
    split: dict[str, dict[int, Tensor]] = {}
    for name, group in names.groups.items():
        entry = group[""]
        if isinstance(entry, Pieces):
            for piece in entry.pieces:
                # Only named here: it is cut when it is written.
                part = TensorPart(tensors[name], piece.region, piece.stacked)
                written[piece.entry.name] = part
        elif name in names.split:
            split.setdefault(entry.name, {})[entry.start] = tensors[name]
        else:
            written[entry.name] = _check_plain(entry) if name in frozen else tensors[name]
    for stored, parts in split.items():
        written[stored] = JoinedRows(tuple(parts[start] for start in sorted(parts)))
    # A head that is not tied any more; an embedding that was stored as the head.
    for name in tensors.keys() - names.groups.keys():
        written[_name_like_others(model, name, names.groups, written)] = tensors[name]
    # What the model does not have: copied from the base's files, as what is never trained.
    written |= {aside.name: _check_plain(aside) for aside in names.aside}
    # On every rank in one order: writing is a collective call.
    return dict(sorted(written.items()))


def _name_like_others(
    model: "PreTrainedModel", name: str, others: Iterable[str], stored: Container[str]
) -> str:
    """Return the name that Transformers writes, if others are stored under such names, or the name
    in the entire model.
    """
    for other in others:
        renamed = name_in_checkpoint(model, other)
        if renamed != name_in_whole(model, other) and renamed in stored:
            return name_in_checkpoint(model, name)
    return name_in_whole(model, name)


def _check_plain(aside: StoredEntry) -> Entry:
    if isinstance(aside, Entry):
        return aside
    raise ModelError(
        f"{aside.name}, which is not part of the text model, is quantized",
        where=str(aside.file),
        why="the other parts of a trained text model are saved unquantized",
        fix="use the adapter, which loads on the original base",
    )


def bytes_aside(folder: Path, parameters: int) -> int:
    """Return the bytes of a checkpoint outside its text model. A written model has them, too.

    They are 0 if the folder has no weights. `parameters` is the number of the text model's.
    """
    size = 0
    elements = 0
    # A plan takes no more than config.json, and the index of weights that are not there.
    with suppress(ModelError):
        for entry in chain.from_iterable(read_headers(folder).values()):
            size += entry.size
            elements += math.prod(entry.shape)
    beside = max(0, elements - parameters)
    return size * beside // elements if beside else 0


def write_model_config(model: "PreTrainedModel", folder: Path) -> None:
    """Write config.json; of a model that is part of a larger one that of the whole, and what else
    the whole needs.

    It is the base's own, but for the dtype of the weights, tied weights and rows of the embedding.
    """
    if not is_in_whole(model):
        model.config.save_pretrained(folder)
        return
    base = Path(model.config.name_or_path)
    config = read_json(base / MODEL_CONFIG)
    changed = updated_config(config, model)
    if changed == config:
        shutil.copyfile(base / MODEL_CONFIG, folder / MODEL_CONFIG)
    else:
        text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
        (folder / MODEL_CONFIG).write_text(text, encoding="utf-8")
    for file in base.glob(PROCESSORS):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def updated_config(config: Mapping[str, Any], model: "PreTrainedModel") -> dict[str, Any]:
    """Return the base's config.json with what training changed."""
    trained = model.config.get_text_config()
    dtype = str(trained.dtype).removeprefix("torch.")
    changed: dict[str, Any] = dict(config)
    text = dict(config.get("text_config") or {})
    for values in (changed, text):
        values.pop("quantization_config", None)  # what is written is dense
        for key in ("dtype", "torch_dtype"):
            if key in values:
                values[key] = dtype
    if not {"dtype", "torch_dtype"} & changed.keys():
        changed["dtype"] = dtype
    if changed.get("tie_word_embeddings") != trained.tie_word_embeddings:
        changed["tie_word_embeddings"] = trained.tie_word_embeddings
    # Older Qwen's have the text model's keys beside the vision part's.
    sizes = text if text or "vocab_size" not in changed else changed
    if sizes.get("vocab_size") != trained.vocab_size:
        sizes["vocab_size"] = trained.vocab_size
    if text:
        changed["text_config"] = text
    return changed
