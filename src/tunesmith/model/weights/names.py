"""Mapping from the tensors of a checkpoint to the parameters of a model.

The names in a checkpoint can differ from those in the model. The checkpoint of a vision-language
model stores the text model under a prefix, together with tensors of other parts. Experts can be
stored separately while the model has them in one stack; for this, Transformers' own rules are used
(`get_model_conversion_mapping`).
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.model.known.decoder import (
    find_innermost,
    find_text_model,
    has_vision_language_class,
    name_of_head,
    vision_parameters,
)
from tunesmith.model.weights.safetensors_files import Entry
from tunesmith.model.weights.shipped import FETCH_CONFIG
from tunesmith.model.weights.shipped_entries import StoredEntry

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightTransform

Region = tuple[slice, ...]
# Pattern of a conversion rule -> the stored tensors that match it.
Sources = Mapping[str, Sequence[StoredEntry]]


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is one region of a parameter.

    For example, `experts.3.up_proj.weight` is the region [3:4, width : 2 * width, 0:hidden] of the
    parameter `experts.gate_up_proj`.

    Attributes:
        region: one slice with start and stop for each dimension of the parameter.
        stacked: whether the stored tensor lacks the parameter's first dimension. `region` then
            selects a single index of that dimension.
    """

    entry: StoredEntry
    region: Region
    stacked: bool


@dataclass(frozen=True)
class Pieces:
    """A parameter that is stored as several tensors, with the same attributes as an `Entry`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def file(self) -> Path:
        """File of the first piece. Parameters are read in the order of `file` and `start`."""
        return self.pieces[0].entry.file

    @property
    def start(self) -> int:
        return self.pieces[0].entry.start


# Parameter name -> its stored tensors by suffix: "" for the weight itself, and for example "absmax"
# for a companion tensor with scales.
StoredGroups = dict[str, dict[str, StoredEntry | Pieces]]


@dataclass
class StoredNames:
    """The tensors of a checkpoint, sorted by their role in a model.

    Attributes:
        groups: the stored tensors of each parameter.
        other_parts: tensors of parts that the model does not have, for example of a vision tower.
        unexpected: names of tensors that belong to no parameter.
        split: names of parameters that are stored as a range of rows of a larger tensor.
    """

    groups: StoredGroups = field(default_factory=dict)
    other_parts: list[StoredEntry] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    split: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class EntireNames:
    """Mapping from the names in a separate text model to those in its vision-language model.

    Attributes:
        decoder, head: the module's name in the text model, and its name in the entire model.
        model: the entire model, on meta.
    """

    decoder: tuple[str, str]
    head: tuple[str, str]
    model: "PreTrainedModel"

    @classmethod
    def find(cls, text: "PreTrainedModel", entire: "PreTrainedModel") -> "EntireNames":
        """Build the mapping from the names of the decoder and of the head in both models."""
        decoder = (find_innermost(text)[0], find_innermost(entire)[0])
        head = (name_of_head(text), name_of_head(entire))
        names = cls(decoder, head, entire)
        theirs = dict(entire.named_parameters(remove_duplicate=False))
        for name, parameter in text.named_parameters():
            its_name = names.in_entire(name)
            if its_name not in theirs or theirs[its_name].shape != parameter.shape:
                raise ModelError(
                    f"{type(entire).__name__} has no parameter that corresponds to {name} of "
                    f"its text model {type(text).__name__}",
                    why="checkpoints and adapters use the parameter names of the entire model, so "
                    "each parameter of the text model needs such a name",
                    fix=FETCH_CONFIG,
                )
        return names

    def in_entire(self, name: str) -> str:
        return _replace_prefix(name, (self.decoder, self.head))

    def in_text(self, name: str) -> str:
        return _replace_prefix(name, (self.decoder[::-1], self.head[::-1]))


# Name of the attribute in which a text model that is built separately stores its `EntireNames`.
ENTIRE_NAMES = "entire_names"


def _entire_names(model: "nn.Module") -> EntireNames | None:
    names: EntireNames | None = vars(model).get(ENTIRE_NAMES)
    return names


def _replace_prefix(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """Replace the first matching module name at the start of `name`."""
    for module, replacement in prefixes:
        if f"{name}.".startswith(f"{module}."):
            return replacement + name.removeprefix(module)
    return name


def conversions(model: "PreTrainedModel") -> "list[WeightTransform]":
    """Return Transformers' rules that convert checkpoints of the entire model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    # Omit the rules for legacy names of norms. Every model has these rules, but legacy names are
    # never written.
    return get_model_conversion_mapping(entire_model(model), add_legacy=False)


def entire_model(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the entire model (on meta) to which a separate text model belongs.

    Any other model is returned unchanged.
    """
    names = _entire_names(model)
    return names.model if names else model


def name_in_entire_model(model: "nn.Module", name: str) -> str:
    """Return the name of a module or parameter in the entire vision-language model.

    For example, "model.layers.0" is "model.language_model.layers.0" in many of these models. The
    name is unchanged if `model` is not the separate text model of a vision-language model.
    """
    names = _entire_names(model)
    return names.in_entire(name) if names else name


def name_in_text(model: "nn.Module", name: str) -> str:
    """Return the name in the text model for a name in its vision-language model.

    Other names are unchanged.
    """
    names = _entire_names(model)
    return names.in_text(name) if names else name


def name_in_checkpoint(model: "PreTrainedModel", name: str) -> str:
    """Return the name under which Transformers saves a parameter or module to a checkpoint."""
    from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key

    # Skip PrefixChange rules, as Transformers does, because it is unknown whether the checkpoint
    # has the prefix.
    renamings = [
        rule.reverse_transform()
        for rule in reversed(conversions(model))
        if isinstance(rule, WeightRenaming) and not isinstance(rule, PrefixChange)
    ]
    renamed: str = rename_source_key(name_in_entire_model(model, name), renamings, [])[0]
    return renamed


def names_on_disk(model: "PreTrainedModel", name: str) -> list[str]:
    """Return all names that a config.json can use for a module of a text model.

    These are its own name and its names in the entire vision-language model.
    """
    names = [name]
    if is_vision_language(model):
        names += [name_in_entire_model(model, name), name_in_checkpoint(model, name)]
    return list(dict.fromkeys(names))


def is_vision_language(model: "nn.Module") -> bool:
    """Return whether a model is a vision-language model, or the text model of one."""
    return _entire_names(model) is not None or has_vision_language_class(model)


def _text_name_if_partial(model: "PreTrainedModel") -> str | None:
    """Return the text model's name in a vision-language model whose other parts were not built.

    Return None if the model has all parts of its checkpoint.
    """
    names = _entire_names(model)
    if names:
        return names.decoder[1]
    if has_vision_language_class(model) and not any(vision_parameters(model)):
        return find_text_model(model)[0]
    return None


def assign_names(
    model: "PreTrainedModel",
    headers: Mapping[Path, Sequence[StoredEntry]],
    parameter_names: Collection[str],
    companions: Collection[str] = (),
) -> StoredNames:
    """Assign the tensors of a checkpoint to a model's parameters.

    Most tensors have the name of their parameter. The others are renamed, split or joined by the
    rules of Transformers.

    Args:
        parameter_names: names of all parameters of the model, including `companions`.
        companions: names of parameters that can be stored with companion tensors (scales).

    Raises:
        ModelError: if several tensors form one parameter in a way that is not supported.
    """
    names = StoredNames()
    rest = []
    for entry in chain.from_iterable(headers.values()):
        stored = name_in_text(model, entry.name)
        name, suffix = _target_name(stored, parameter_names, companions)
        if name:
            names.groups.setdefault(name, {})[suffix] = entry
        # Old Llama checkpoints contain the rotary frequencies. Ignore them.
        elif not entry.name.endswith("rotary_emb.inv_freq"):
            rest.append(entry)
    if rest:
        _assign_converted(model, rest, parameter_names, companions, names)
    return names


def _target_name(
    stored: str, parameter_names: Collection[str], companions: Collection[str]
) -> tuple[str, str]:
    """Return the name of the parameter to which a stored tensor belongs, and the companion suffix.

    Return ("", "") if there is no such parameter. A checkpoint that was saved from the decoder
    lacks the prefix `model.`, and one saved from a wrapper has it twice.
    """
    # Try the stored name first, then the name with the prefix `model.` added, then removed.
    for name in (stored, f"model.{stored}", stored.removeprefix("model.")):
        if name in parameter_names:
            return name, ""
        # A companion such as "weight.absmax" belongs to "weight". Try each dot as the separator.
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
) -> None:
    """Assign stored tensors that Transformers renames, splits or joins when it loads them.

    The remaining tensors belong to other parts of the model, or are unexpected.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = [*conversions(model), *get_checkpoint_conversion_mapping("legacy")]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    # Parameter name -> pattern of the rule -> stored tensors that match the pattern.
    parts: dict[str, dict[str, list[StoredEntry]]] = {}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    text_name = _text_name_if_partial(model)
    for entry in entries:
        renamed, pattern = rename_source_key(entry.name, renamings, converters)
        stored = name_in_text(model, renamed)
        name, suffix = _target_name(stored, parameter_names, () if pattern else companions)
        if not name:
            is_ignored = any(re.search(ignored_name, entry.name) for ignored_name in ignored)
            if is_ignored or (text_name and not renamed.startswith(f"{text_name}.")):
                names.other_parts.append(entry)
            else:
                names.unexpected.append(entry.name)
        elif pattern is None:  # the tensor is only renamed
            names.groups.setdefault(name, {})[suffix] = entry
        elif len(by_pattern[pattern].target_patterns) > 1:
            _split(model, entry, renamed, by_pattern[pattern], names)
        else:  # several tensors, joined below
            parts.setdefault(name, {}).setdefault(pattern, []).append(entry)
    for name, sources in parts.items():
        rule = by_pattern[next(iter(sources))]
        names.groups.setdefault(name, {})[""] = _join(name, rule, sources)


def _split(
    model: "PreTrainedModel",
    entry: StoredEntry,
    renamed: str,
    rule: "WeightConverter",
    names: StoredNames,
) -> None:
    """Split a stored tensor by rows with a conversion rule, and assign each part to its parameter.

    For example, a stored `qkv` has the rows of `q_proj`, then those of `k_proj` and of `v_proj`.

    Args:
        renamed: the name of the first parameter in the entire model.
    """
    first = rule.target_patterns[0]
    parameters = [
        name_in_text(model, renamed.replace(first, target)) for target in rule.target_patterns
    ]
    sources = {"": [entry]}
    operations = [type(operation).__name__ for operation in rule.operations]
    is_read = operations in (["Chunk"], ["Split"]) and rule.operations[0].dim == 0
    if not is_read or not isinstance(entry, Entry):
        raise _cannot_join(parameters[0], sources, ", ".join(operations))
    stored_rows, *columns = entry.shape
    rows = stored_rows // len(parameters)
    start = entry.start
    for name in parameters:
        if operations == ["Split"]:
            # Use `out_features`, because the weight of a quantized layer has another shape.
            module = model.get_submodule(name.rpartition(".")[0])
            rows = module.out_features
        size = entry.size * rows // stored_rows
        part = replace(entry, shape=(rows, *columns), start=start, size=size)
        names.groups.setdefault(name, {})[""] = part
        names.split.add(name)
        start += size
    if start != entry.start + entry.size:
        raise _cannot_join(parameters[0], sources, "they do not fill one tensor")


def _join(name: str, rule: "WeightConverter", sources: Sources) -> Pieces:
    """Return the parameter that a conversion rule forms from the entries of its patterns.

    The tensors that match one pattern (the experts) are stacked. The stacks of all patterns (gate,
    then up) are concatenated. For example, `experts.0.gate_proj`, `experts.1.gate_proj`,
    `experts.0.up_proj` and `experts.1.up_proj` form `experts.gate_up_proj`.
    """
    from transformers.core_model_loading import dot_natural_key

    stacks, dim = _read_operations(name, rule, sources)
    pieces = []
    offset = 0  # offset of the pattern along the concatenated dimension
    shape = []
    for pattern in rule.source_patterns:
        # Sort the numbers in the names by value, so that expert 10 follows expert 9.
        entries = sorted(sources.get(pattern, ()), key=lambda entry: dot_natural_key(entry.name))
        for index, entry in enumerate(entries):
            # All stacked tensors must have the same shape. The check of the element count below
            # would not detect a tensor of another shape with equally many elements.
            if stacks and entry.shape != entries[0].shape:
                raise _cannot_join(
                    name,
                    sources,
                    f"{entry.name} is {list(entry.shape)}, the others are {list(entries[0].shape)}",
                )
            # Shape of the tensor that is formed from all tensors of this pattern.
            shape = [len(entries), *entry.shape] if stacks else [*entry.shape]
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
    # Regions do not overlap, so they fill the parameter exactly if the element counts are equal. A
    # missing expert or a wrong shape gives another count.
    if sum(math.prod(piece.entry.shape) for piece in pieces) != math.prod(shape):
        raise _cannot_join(name, sources, "they do not fill one tensor")
    return Pieces(name, pieces[0].entry.dtype, tuple(shape), tuple(pieces))


def _read_operations(
    name: str, rule: "WeightConverter", sources: Sources
) -> tuple[bool, int | None]:
    """Return whether a rule stacks the tensors of each pattern, and which dim it concatenates.

    The dim is None if the rule does not concatenate.
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
    if dim is None and len(sources) > 1:
        raise _cannot_join(name, sources, "one tensor contains several parameters")
    return stacks, dim


def _cannot_join(name: str, sources: Sources, why: str) -> ModelError:
    first = next(iter(sources.values()))[0]
    count = sum(len(entries) for entries in sources.values())
    return ModelError(
        f"{count} stored tensors cannot be combined into the parameter {name}: {first.name}, ...",
        where=first.file,
        why=why,
        fix="fetch the model again: tunesmith fetch MODEL",
    )
