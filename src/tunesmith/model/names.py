"""Names on the disk: which stored tensor is which parameter, or which part of one.

A checkpoint may name its tensors otherwise than the model that is built of it. A vision-language
model's folder has the text model under a prefix, and tensors of other parts beside it. Experts are
stored one by one where the model has them in one stack. The rules for the second are Transformers'
own (`get_model_conversion_mapping`).
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.model.safetensors_files import Entry
from tunesmith.model.shipped import FETCH_CONFIG
from tunesmith.model.shipped_entries import StoredEntry

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightTransform

Region = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is part of a parameter.

    Attributes:
        region: the part; a slice of each of the parameter's dimensions, with both ends.
        stacked: the tensor lacks the parameter's first dimension, of which `region` has one index.
    """

    entry: StoredEntry
    region: Region
    stacked: bool


@dataclass(frozen=True)
class Pieces:
    """A parameter that is stored as several tensors; the attributes are those of an `Entry`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def file(self) -> Path:
        """Return the file of the first piece, as `start`: in this order parameters are read."""
        return self.pieces[0].entry.file

    @property
    def start(self) -> int:
        return self.pieces[0].entry.start


# Parameter -> what is stored of it: itself under "", its companions (scales) under their suffixes.
StoredGroups = dict[str, dict[str, StoredEntry | Pieces]]


@dataclass
class StoredNames:
    """The tensors of a checkpoint, by what they are to a model.

    Attributes:
        groups: what is stored of each parameter.
        aside: tensors of other parts of the checkpoint, which the model does not have.
        unexpected: names that have no place.
        split: parameters whose entry is some rows of a stored tensor.
    """

    groups: StoredGroups = field(default_factory=dict)
    aside: list[StoredEntry] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    split: set[str] = field(default_factory=set)


def text_part(config: "PretrainedConfig") -> "PretrainedConfig":
    """Return the config of the text model, which is the config itself if it has no other parts."""
    text: PretrainedConfig = config.get_text_config()
    if text is config:
        return config
    # The checkpoint is tied as the outer config says: Mistral 3's inner one says otherwise.
    inner = vars(text).get("tie_word_embeddings", False)
    text.tie_word_embeddings = vars(config).get("tie_word_embeddings", inner)
    text.name_or_path = config.name_or_path
    stored = vars(config).get("quantization_config")
    if stored is not None:
        text.quantization_config = stored
    return text


def has_own_class(text: "PretrainedConfig") -> bool:
    """Return whether Transformers has a causal LM of a text model, apart from the entire model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(text) in MODEL_FOR_CAUSAL_LM_MAPPING


@dataclass(frozen=True)
class EntireNames:
    """The names that a text model of its own class has in the class of the entire model.

    Attributes:
        decoder, head: names in the text model, then in the entire model.
        model: the entire model, on meta.
    """

    decoder: tuple[str, str]
    head: tuple[str, str]
    model: "PreTrainedModel"

    @classmethod
    def find(cls, text: "PreTrainedModel", entire: "PreTrainedModel") -> "EntireNames":
        """Find the names by the embedding and the head of both models, which may be on meta."""
        from tunesmith.model.decoder import find_innermost, name_of_head

        decoder = (find_innermost(text)[0], find_innermost(entire)[0])
        head = (name_of_head(text), name_of_head(entire))
        names = cls(decoder, head, entire)
        theirs = dict(entire.named_parameters(remove_duplicate=False))
        for name, parameter in text.named_parameters():
            its_name = names.in_entire(name)
            if its_name not in theirs or theirs[its_name].shape != parameter.shape:
                raise ModelError(
                    f"{type(entire).__name__} has no parameter like {name} of "
                    f"{type(text).__name__}",
                    why="checkpoints and adapters have the names of the entire model",
                    fix=FETCH_CONFIG,
                )
        return names

    def in_entire(self, name: str) -> str:
        return _replace_prefix(name, (self.decoder, self.head))

    def in_text(self, name: str) -> str:
        return _replace_prefix(name, (self.decoder[::-1], self.head[::-1]))


# Attribute of a text model of its own class: its `EntireNames`.
ENTIRE_NAMES = "entire_names"


def _entire_names(model: "nn.Module") -> EntireNames | None:
    names: EntireNames | None = vars(model).get(ENTIRE_NAMES)
    return names


def _replace_prefix(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """Replace the first of these modules that the name is in, or is."""
    for module, replacement in prefixes:
        if name == module:
            return replacement
        if name.startswith(f"{module}."):
            return replacement + name.removeprefix(module)
    return name


def _conversions(model: "PreTrainedModel") -> "list[WeightTransform]":
    """Return the rules by which Transformers reads the checkpoints of a model, or of the entire
    model that it is part of.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    # Old names of norms, which every model has a rule for, are not written.
    return get_model_conversion_mapping(entire_model(model), add_legacy=False)


def entire_model(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the entire model, on meta, that a text model is part of; other models themselves."""
    names = _entire_names(model)
    return names.model if names else model


def name_in_whole(model: "nn.Module", name: str) -> str:
    """The name that a module or parameter has in the vision-language model that a text model is
    part of; its own for every other model.
    """
    names = _entire_names(model)
    return names.in_entire(name) if names else name


def name_in_text(model: "nn.Module", name: str) -> str:
    """The opposite of `name_in_whole`; a name of the text model's own stays as it is."""
    names = _entire_names(model)
    return names.in_text(name) if names else name


def name_in_checkpoint(model: "PreTrainedModel", name: str) -> str:
    """The name that Transformers writes for a parameter or module of the entire model."""
    from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key

    renamings = []
    for rule in reversed(_conversions(model)):
        # As Transformers does: whether a checkpoint has such a prefix is not known.
        if isinstance(rule, WeightRenaming) and not isinstance(rule, PrefixChange):
            renamings.append(rule.reverse_transform())
    renamed: str = rename_source_key(name_in_whole(model, name), renamings, [])[0]
    return renamed


def names_on_disk(model: "PreTrainedModel", name: str) -> list[str]:
    """The names that a config.json may have for a module of a text model: its own, and those in the
    vision-language model that it is part of.
    """
    names = [name]
    if is_in_whole(model):
        names += [name_in_whole(model, name), name_in_checkpoint(model, name)]
    return list(dict.fromkeys(names))


def is_in_whole(model: "nn.Module") -> bool:
    """Tell whether a model is the text model of a vision-language model, or such a model in
    whole.
    """
    from tunesmith.model.decoder import is_whole

    return _entire_names(model) is not None or is_whole(model)


def _text_of_parts_aside(model: "PreTrainedModel") -> str | None:
    """Return the name in the entire model of a text model that is built without the other parts.

    None: the model has all parts of its checkpoints.
    """
    from tunesmith.model.decoder import find_text_part, is_whole, vision_parameters

    if names := _entire_names(model):
        return names.decoder[1]
    if is_whole(model) and not any(vision_parameters(model)):
        return find_text_part(model)[0]
    return None


def assign_names(
    model: "PreTrainedModel",
    headers: Mapping[Path, Sequence[StoredEntry]],
    parameter_names: Collection[str],
    companions: Collection[str] = (),
) -> StoredNames:
    """Assign the tensors of a checkpoint to a model's parameters.

    Args:
        parameter_names: names of the model's parameters, `companions` among them.
        companions: those that may be stored with companions.

    ModelError where several tensors are one parameter in a way that is not read here.
    """
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    names = StoredNames()
    rest: list[StoredEntry] = []
    for entry in (entry for entries in headers.values() for entry in entries):
        stored = name_in_text(model, entry.name)
        name, suffix = _target_name(stored, parameter_names, companions)
        if name:
            names.groups.setdefault(name, {})[suffix] = entry
        # Old Llama checkpoints hold the frequencies.
        elif not entry.name.endswith("rotary_emb.inv_freq"):
            rest.append(entry)
    if not rest:
        return names
    text_name = _text_of_parts_aside(model)
    for entry, renamed in _assign_converted(model, rest, parameter_names, companions, names):
        is_ignored = any(re.search(pattern, entry.name) for pattern in ignored)
        if is_ignored or (text_name and not renamed.startswith(f"{text_name}.")):
            names.aside.append(entry)
        else:
            names.unexpected.append(entry.name)
    return names


def _target_name(
    stored: str, parameter_names: Collection[str], companions: Collection[str]
) -> tuple[str, str]:
    """The model's name for a stored tensor, and the companion suffix; ("", "") when it has no
    place.

    A checkpoint saved from the backbone alone lacks the prefix `model.`; one saved from a wrapper
    has it twice.
    """
    # As the checkpoint has it first, then with and without the backbone's prefix.
    for name in (stored, f"model.{stored}", stored.removeprefix("model.")):
        if name in parameter_names:
            return name, ""
        # Companions: "weight.absmax" belongs to "weight", which ends at one of the dots.
        for dot in range(len(name)):
            if name[dot] == "." and name[:dot] in companions:
                return name[:dot], name[dot + 1 :]
    return "", ""


def _assign_converted(
    model: "PreTrainedModel",
    entries: Iterable[StoredEntry],
    parameter_names: Collection[str],
    companions: Collection[str],
    names: StoredNames,
) -> list[tuple[StoredEntry, str]]:
    """Assign what Transformers renames or joins as it loads.

    Returns:
        The entries that it does not know, and their names in the class that it loads.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = [*_conversions(model), *get_checkpoint_conversion_mapping("legacy")]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    # Parameter -> pattern of the rule -> the stored tensors that match it.
    parts: dict[str, dict[str, list[StoredEntry]]] = {}
    rest = []
    for entry in entries:
        renamed, pattern = rename_source_key(entry.name, renamings, converters)
        stored = name_in_text(model, renamed)
        name, suffix = _target_name(stored, parameter_names, () if pattern else companions)
        if not name:
            rest.append((entry, renamed))
        elif pattern and len(by_pattern[pattern].target_patterns) > 1:
            _split(model, entry, renamed, by_pattern[pattern], names)
        # Renamed only; what has a pattern is one of several that are joined below.
        elif pattern is None:
            names.groups.setdefault(name, {})[suffix] = entry
        else:
            parts.setdefault(name, {}).setdefault(pattern, []).append(entry)
    for name, sources in parts.items():
        rule = by_pattern[next(iter(sources))]
        names.groups.setdefault(name, {})[""] = _join(name, rule, sources)
    return rest


def _split(
    model: "PreTrainedModel",
    entry: StoredEntry,
    renamed: str,
    rule: "WeightConverter",
    names: StoredNames,
) -> None:
    """Assign the rows of a stored tensor to the parameters that a rule splits it into.

    renamed: the first parameter's name in the class that the rule is of.
    """
    first, *_ = rule.target_patterns
    parameters = [
        name_in_text(model, renamed.replace(first, target)) for target in rule.target_patterns
    ]
    operations = [type(operation).__name__ for operation in rule.operations]
    is_read = isinstance(entry, Entry) and operations in (["Chunk"], ["Split"])
    if not is_read or rule.operations[0].dim != 0:
        raise _cannot_join(parameters[0], {"": [entry]}, ", ".join(operations))
    assert isinstance(entry, Entry)
    rows = entry.shape[0] // len(parameters)
    start = entry.start
    for name in parameters:
        if operations == ["Split"]:
            # A layer in codes has its width still.
            rows = model.get_submodule(name.rpartition(".")[0]).out_features
        shape = (rows, *entry.shape[1:])
        size = entry.size * rows // entry.shape[0]
        names.groups.setdefault(name, {})[""] = replace(entry, shape=shape, start=start, size=size)
        names.split.add(name)
        start += size
    if start != entry.start + entry.size:
        raise _cannot_join(parameters[0], {"": [entry]}, "they do not fill one tensor")


def _join(
    name: str, rule: "WeightConverter", sources: Mapping[str, Sequence[StoredEntry]]
) -> Pieces:
    """The parameter that a rule of Transformers makes of the entries of each of its patterns.

    Experts of a pattern are stacked; what the patterns make (gate, then up) is concatenated.
    """
    from transformers.core_model_loading import dot_natural_key

    stacks, dim = _read_operations(name, rule, sources)
    pieces = []
    offset = 0  # of a pattern, along the dimension that is concatenated
    shape: list[int] = []
    for pattern in rule.source_patterns:
        # Natural order: expert 10 comes after expert 9.
        entries = sorted(sources.get(pattern, ()), key=lambda entry: dot_natural_key(entry.name))
        for index, entry in enumerate(entries):
            # Of the same size it would be read into its place in another order.
            if stacks and entry.shape != entries[0].shape:
                why = f"{entry.name} is {list(entry.shape)}, others {list(entries[0].shape)}"
                raise _cannot_join(name, sources, why)
            # The shape that the pattern's tensors make together.
            shape = [len(entries), *entry.shape] if stacks else list(entry.shape)
            region = [slice(0, size) for size in shape]
            if stacks:
                region[0] = slice(index, index + 1)
            if dim is not None:
                region[dim] = slice(offset, offset + shape[dim])
                if not stacks or index == len(entries) - 1:
                    offset += shape[dim]
            pieces.append(Piece(entry, tuple(region), stacked=stacks))
    if dim is not None:
        shape[dim] = offset
    # Regions do not overlap: with equal counts they fill the parameter. An expert too few of one
    # kind, or one of another shape, does not.
    if sum(math.prod(piece.entry.shape) for piece in pieces) != math.prod(shape):
        raise _cannot_join(name, sources, "they do not fill one tensor")
    return Pieces(name, pieces[0].entry.dtype, tuple(shape), tuple(pieces))


def _read_operations(
    name: str, rule: "WeightConverter", sources: Mapping[str, Sequence[StoredEntry]]
) -> tuple[bool, int | None]:
    """Read whether a rule stacks the tensors of each pattern, and the dimension along which it
    concatenates; None: it does not.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stacks = False
    dim: int | None = None
    for operation in rule.operations:
        if isinstance(operation, MergeModulelist) and operation.dim == 0 and dim is None:
            stacks = True
        elif isinstance(operation, Concatenate):
            dim = operation.dim
        else:
            raise _cannot_join(name, sources, type(operation).__name__)
    if len(rule.target_patterns) > 1 or (dim is None and len(sources) > 1):
        raise _cannot_join(name, sources, "one tensor for several parameters")
    return stacks, dim


def _cannot_join(name: str, sources: Mapping[str, Sequence[StoredEntry]], why: str) -> ModelError:
    first = next(iter(sources.values()))[0]
    count = sum(len(entries) for entries in sources.values())
    return ModelError(
        f"{count} stored tensors do not make {name}: {first.name}, ...",
        where=str(first.file),
        why=why,
        fix="fetch the model again: tunesmith fetch MODEL",
    )
