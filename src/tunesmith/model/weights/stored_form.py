"""Writing of a model in the stored form of its base checkpoint.

All tools that read the base can also read this form. Tensors get the names of the checkpoint.
Experts are written separately if the checkpoint stores them separately. Tensors of the checkpoint
that the model does not have (vision tower, draft heads) are copied byte for byte.
"""

import json
import math
import shutil
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.model.known.decoder import vision_parameters
from tunesmith.model.weights.names import (
    Pieces,
    assign_names,
    conversions,
    is_vision_language,
    name_in_checkpoint,
    name_in_entire_model,
)
from tunesmith.model.weights.safetensors_files import (
    Config,
    Entry,
    has_weights,
    read_all_entries,
    read_json,
)
from tunesmith.model.weights.save_tensors import JoinedRows, Source, TensorPart
from tunesmith.model.weights.shipped_entries import StoredEntry, read_entries

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # only for type checking: the import is slow

MODEL_CONFIG = "config.json"
# File names of the configs of picture processors.
PROCESSORS = "*processor_config.json"


def is_stored_otherwise(model: "PreTrainedModel") -> bool:
    """Return whether the base checkpoint may have other tensors or other names than the model."""
    return bool(conversions(model)) or is_vision_language(model)


def in_stored_form(
    model: "PreTrainedModel", tensors: Mapping[str, Tensor], folder: Path | None = None
) -> dict[str, Source]:
    """Return the tensors of a model in the form in which its base checkpoint stores them.

    Args:
        tensors: the tensors by the model's own names. They can be on meta or DTensors. Tied tensors
            occur once.
        folder: the folder of the base; None: the folder from which the model's config was read.

    Raises:
        ModelError: if the model is part of a larger model whose files no longer exist.
    """
    if not is_stored_otherwise(model):
        return dict(tensors)
    folder = folder or Path(model.config.name_or_path)
    if not has_weights(folder):
        if not is_vision_language(model):
            return dict(tensors)  # Transformers can also read the model's own names
        raise ModelError(
            "the base model's files no longer exist",
            where=folder,
            why="the image and audio tensors are copied from there when a model is saved",
            fix="restore the folder, then run the same command again",
        )
    names = assign_names(model, read_entries(folder), tensors.keys())
    frozen = {name for name, p in vision_parameters(model) if not p.requires_grad}
    written: dict[str, Source] = {}
    # Name of a stored tensor -> the parameters that it contains, by their position in the file.
    split: dict[str, dict[int, Tensor]] = {}
    for name, group in names.groups.items():
        entry = group[""]
        if isinstance(entry, Pieces):
            for piece in entry.pieces:
                # TensorPart only describes the region. The tensor is sliced later, when the part is
                # written.
                part = TensorPart(tensors[name], piece.region, piece.stacked)
                written[piece.entry.name] = part
        elif name in names.split:
            split.setdefault(entry.name, {})[entry.start] = tensors[name]
        elif name in frozen:
            written[entry.name] = _check_plain(entry)
        else:
            written[entry.name] = tensors[name]
    for stored, parts in split.items():
        written[stored] = JoinedRows(tuple(parts[start] for start in sorted(parts)))
    # Add the tensors that the base does not store, for example a head that is no longer tied to the
    # embedding.
    for name in tensors.keys() - names.groups.keys():
        written[_name_like_others(model, name, names.groups, written)] = tensors[name]
    # Copy from the base's files the tensors that the model does not have. Such tensors are never
    # trained.
    written |= {other.name: _check_plain(other) for other in names.other_parts}
    # Sort the names, because writing is a collective call that needs the same order on every rank.
    return dict(sorted(written.items()))


def _name_like_others(
    model: "PreTrainedModel", name: str, others: Iterable[str], stored: Container[str]
) -> str:
    """Return the name under which to store a tensor that the checkpoint does not have.

    If other tensors are stored under the names that Transformers writes, use such a name here too.
    Otherwise use the name in the entire model.
    """
    for other in others:
        renamed = name_in_checkpoint(model, other)
        if renamed != name_in_entire_model(model, other) and renamed in stored:
            return name_in_checkpoint(model, name)
    return name_in_entire_model(model, name)


def _check_plain(other: StoredEntry) -> Entry:
    if isinstance(other, Entry):
        return other
    raise ModelError(
        f"{other.name} is quantized and therefore cannot be copied to the saved model",
        where=other.file,
        why="the parts outside the text model, such as the image part, must be unquantized",
        fix="use the adapter together with the original base model",
    )


def bytes_of_other_parts(folder: Path, parameters: int) -> int:
    """Return the size in bytes of those tensors of a checkpoint that are not in its text model.

    A written model contains these tensors as well.

    Return 0 if the folder has no weights.

    Args:
        parameters: number of parameters of the text model.
    """
    size = 0
    elements = 0
    # A plan needs only config.json and an index, so the weight files can be missing.
    with suppress(ModelError):
        for entry in read_all_entries(folder):
            size += entry.size
            elements += math.prod(entry.shape)
    if elements <= parameters:
        return 0
    return size * (elements - parameters) // elements


def write_model_config(model: "PreTrainedModel", folder: Path) -> None:
    """Write config.json. For a multimodal model, also copy the processor configs of its base.

    The values are those of the base's config, except for the dtype, tied weights and the vocabulary
    size.
    """
    if not is_vision_language(model):
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


def updated_config(config: Config, model: "PreTrainedModel") -> dict[str, Any]:
    """Return the base's config.json with the values that training changed."""
    trained = model.config.get_text_config()
    dtype = str(trained.dtype).removeprefix("torch.")
    changed: dict[str, Any] = dict(config)
    text = dict(config.get("text_config") or {})
    for values in (changed, text):
        values.pop("quantization_config", None)  # the written weights are not quantized
        for key in ("dtype", "torch_dtype"):
            if key in values:
                values[key] = dtype
    if not {"dtype", "torch_dtype"} & changed.keys():
        changed["dtype"] = dtype
    if changed.get("tie_word_embeddings") != trained.tie_word_embeddings:
        changed["tie_word_embeddings"] = trained.tie_word_embeddings
    # Older Qwen models have the text model's keys at the top level, next to `vision_config`.
    sizes = changed if not text and "vocab_size" in changed else text
    if sizes.get("vocab_size") != trained.vocab_size:
        sizes["vocab_size"] = trained.vocab_size
    if text:
        changed["text_config"] = text
    return changed
