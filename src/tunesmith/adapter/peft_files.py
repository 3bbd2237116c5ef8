"""PEFT's files, `adapter_config.json` and `adapter_model.safetensors`, written and read.

What an adapter asks for and is not computed here (DoRA, a rank by layer, ...) is refused by name,
never ignored.
"""

import json
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.adapter import lora
from tunesmith.adapter.expert_lora import EXPERTS_TARGET, ExpertsLora, expert_updates
from tunesmith.adapter.low_rank import lora_scaling
from tunesmith.config.schema import Adapter
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.host.files import check_regular_files
from tunesmith.model.decoder import find_projector, is_whole, trained_projector
from tunesmith.model.experts import find_experts
from tunesmith.model.names import entire_model, is_in_whole, name_in_text, name_in_whole
from tunesmith.model.safetensors_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    read_header,
    read_json,
)
from tunesmith.model.save_tensors import save_tensors
from tunesmith.model.weights import StoredTensor, stored_tensors
from tunesmith.units import count_of

PREFIX = "base_model.model."
MERGE = "merge it into its base with PEFT, and start from the merged model"
# Names of tensors that are refused -> for the error: what the adapter does, why, and the fix.
NOT_READ = (
    (
        re.compile(r".+\.experts\.\d+\.\w+\.lora_[AB]\.weight"),
        "stores its experts separately",
        "this is the form for vLLM; PEFT's stacked form (target_parameters) is read",
        f"name the run that it was exported from; an adapter of another tool: {MERGE}",
    ),
    (
        re.compile(r".+\.(vision|visual)\w*\..+\.lora_[AB]\.weight"),
        "changes the vision part of the model",
        "the vision part is frozen, and takes no adapter",
        MERGE,
    ),
    (
        re.compile(r".+\.lora_embedding_[AB]"),
        "has a low-rank update of an embedding",
        "only linear layers and experts take an adapter",
        MERGE,
    ),
)
# PEFT stores a resized embedding two more times, under the names of its wrapper.
WRAPPER = re.compile(r"\.(modules_to_save|original_module)(?=\.)")

# Keys of PEFT's LoraConfig -> whether a value means plain LoRA. Keys that are neither here nor in
# HARMLESS must be empty.
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda v: v == "LORA",
    "task_type": lambda v: v in (None, "CAUSAL_LM"),
    "bias": lambda v: v in (None, "none"),
    # Other initializations (pissa, olora, corda, loftq, lora_ga) change the base's weights. The
    # value is true in adapters that PEFT converted back.
    "init_lora_weights": lambda v: (
        v in (None, True, False, "gaussian", "orthogonal", "eva", "mica")
    ),
}
# Keys that `read_adapter` reads, and keys that do not change what an adapter computes.
HARMLESS = frozenset(
    "r lora_alpha lora_dropout use_rslora modules_to_save target_modules target_parameters"
    " exclude_modules layers_to_transform layers_pattern base_model_name_or_path revision"
    " auto_mapping peft_version inference_mode runtime_config megatron_core qalora_group_size"
    " eva_config loftq_config".split()
)
# Keys that choose some of the layers that `target_modules` names.
LAYER_CHOICES = ("exclude_modules", "layers_to_transform", "layers_pattern")

# What every plain LoRA's configuration says; PEFT's defaults for the rest mean the same. Written by
# hand: `import peft` takes a second, in which the training thread hardly gets the interpreter.
PLAIN_LORA_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layers_pattern": None,
    "auto_mapping": None,
}


def adapter_files(
    model: nn.Module, adapter: Adapter, base_name: str, revision: str | None
) -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
    """The contents of PEFT's two files: the trained parameters and the configuration.

    The parameters go by PEFT's names and are not copied. `base_name` is the base model's Hub id or
    the folder that the recipe names.
    """
    adapted = {name for name, _ in lora.loras(model)}
    trained = {name for name, _, _ in lora.saved_parameters(model)}
    targets, to_save = _peft_modules(model, adapted, trained)
    # PEFT declares `lora_alpha` as an int.
    is_whole = adapter.alpha == int(adapter.alpha)
    settings = PLAIN_LORA_CONFIG | {
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if is_whole else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "target_modules": sorted(targets),
        "modules_to_save": sorted(to_save) or None,
    }
    stacks = _peft_stacks(model)
    if stacks:
        settings["target_parameters"] = stacks
    return _peft_tensors(model), settings


def _peft_modules(
    model: nn.Module, adapted: set[str], trained: set[str]
) -> tuple[set[str], set[str]]:
    """Choose the names by which PEFT matches the adapted modules, and those trained in full.

    Last parts of names, but full names where it would match other modules by a last part too. In
    the vision-language model that a text model is part of, those are the vision tower's.
    """
    trained = _joined_projector(model, trained)
    if is_in_whole(model):
        in_whole = partial(name_in_whole, model)
        return set(map(in_whole, adapted)), set(map(in_whole, trained))
    # PEFT matches a target with the end of a name, and a saved module with any end of it.
    targets = {last_part(name) for name in adapted}
    to_save = {last_part(name) for name in trained}
    matched_by_target = set()
    matched_by_saved = set()
    for name, module in model.named_modules():
        if last_part(name) in targets and not isinstance(module, nn.ModuleList):
            matched_by_target.add(name)
        if name.endswith(tuple(to_save)):
            matched_by_saved.add(name)
    # A last part that matches too much: full names, which match nothing else.
    if matched_by_target != adapted:
        targets = adapted
    if matched_by_saved != trained:
        to_save = trained
    return targets, to_save


def _joined_projector(model: nn.Module, trained: set[str]) -> set[str]:
    """Names of modules trained in full, with those of a projector as the one that they are parts
    of: PEFT copies such a module whole.
    """
    if not trained_projector(model):
        return trained
    projector = find_projector(model)
    inside = tuple(f"{name}." for name in projector)
    return {name for name in trained if not f"{name}.".startswith(inside)}.union(projector)


def _peft_stacks(model: nn.Module) -> list[str]:
    """Choose the names by which PEFT matches the adapted stacks of experts: their ends, but full
    names where an end would match others too.
    """
    adapted = [name for name, _ in expert_updates(model)]
    if is_in_whole(model):
        return [name_in_whole(model, name) for name in adapted]
    ends = {".".join(name.split(".")[-3:]) for name in adapted}
    matched = set()
    for name, _ in model.named_parameters():
        if name.endswith(tuple(f".{end}" for end in ends)):
            matched.add(name)
    return sorted(ends if matched == set(adapted) else adapted)


def describe_misread(model: PreTrainedModel) -> str:
    """Return a warning if PEFT reads the adapter otherwise than it is trained, or an empty string.

    PEFT 0.21 takes gate_proj, up_proj and down_proj of many models with experts for the experts' of
    older files, and drops the adapters of linear layers of these names (shared experts, dense first
    layers).
    """
    # Other models have no such rules, and importing PEFT takes a second.
    if not is_whole(model) and not any(parameter.ndim == 3 for parameter in model.parameters()):
        return ""
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT, which converts nothing
        return ""
    # PEFT goes by the type and the rules of the model that it opens.
    opened = entire_model(model)
    adapted = {last_part(name) for name, _ in lora.loras(model)}
    config = LoraConfig(target_modules=sorted(adapted), target_parameters=_peft_stacks(model))
    try:
        convert_peft_config_for_transformers(config, opened, None)
    except ValueError as error:
        return f"warning: PEFT does not open this adapter: {error}"
    read = set(config.target_modules)
    if adapted <= read:
        return ""
    targets = sorted(read)
    if any(expert_updates(model)):
        targets.append(EXPERTS_TARGET)
    # Of a file with experts too, PEFT refuses all: it gives the experts twice the rank.
    return (
        f"warning: PEFT takes {', '.join(sorted(adapted - read))} of a {opened.config.model_type} "
        "for its experts, and does not load these adapters; merge it (tunesmith merge), or set "
        f"adapter.target: [{', '.join(targets)}]"
    )


def last_part(name: str) -> str:
    """The last part of a module's full name."""
    return name.rsplit(".", 1)[-1]


def write_adapter(
    folder: Path | None, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write PEFT's two files, as of `adapter_files`, to `folder`, an existing one.

    None: as in `save_tensors`.
    """
    shapes = {name: _file_shape(name, tensor) for name, tensor in tensors.items()}
    if folder is None:
        save_tensors(None, tensors, {"format": "pt"}, shapes=shapes)
        return
    save_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"}, shapes=shapes)
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _file_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter in PEFT's file: B of experts, [out, rank, experts], is flat."""
    if name.endswith(".lora_B.weight") and tensor.ndim == 3:
        return tensor.shape[0], tensor.shape[1] * tensor.shape[2]
    return tuple(tensor.shape)


def _peft_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by PEFT's names."""
    # Layers by their names in the whole model: PEFT opens that one, not its text part.
    layers = {}
    for name, layer in lora.loras(model):
        layers[PREFIX + name_in_whole(model, name)] = layer
    tensors = {f"{name}.lora_A.weight": layer.lora_A for name, layer in layers.items()}
    tensors |= {f"{name}.lora_B.weight": layer.lora_B for name, layer in layers.items()}
    tensors |= _peft_expert_tensors(model)
    for name, module, key in lora.saved_parameters(model):
        tensors[f"{PREFIX}{name_in_whole(model, name)}.{key}"] = module.get_parameter(key)
    return tensors


def _peft_expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of experts, by PEFT's names, which wraps the first of two stacks twice."""
    tensors = {}
    for name, experts in find_experts(model).items():
        updates = []
        for stack in experts.stacks_in_order():
            update = experts.update(stack)
            if isinstance(update, ExpertsLora):
                updates.append(update)
        key = PREFIX + name_in_whole(model, name) + len(updates) * ".base_layer"
        for update in updates:
            key = key.removesuffix(".base_layer")
            tensors[f"{key}.lora_A.weight"] = update.lora_A
            tensors[f"{key}.lora_B.weight"] = update.lora_B
    return tensors


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder by its `adapter_config.json`.

    ModelError where that is missing, broken or not plain LoRA.
    """
    check_regular_files(folder)
    file = folder / ADAPTER_CONFIG
    if not file.exists():
        what = f"there is no {ADAPTER_CONFIG}"
        raise ModelError(what, where=str(folder), fix="name a PEFT adapter's folder")
    settings = read_json(file, again="copy the adapter again")
    # peft_type comes first: the name of another method says more than its keys.
    for name, value in sorted(settings.items(), key=lambda setting: setting[0] != "peft_type"):
        if name not in HARMLESS and not NEUTRAL.get(name, operator.not_)(value):
            raise ModelError(
                f"the adapter has {name} = {json.dumps(value)}, which is not supported",
                where=str(file),
                why="only plain LoRA and rsLoRA with a single rank are supported",
                fix=MERGE,
            )
    pickled = folder / "adapter_model.bin"
    if pickled.exists() and not (folder / ADAPTER_WEIGHTS).exists():
        raise ModelError(
            "the adapter's weights are pickled",
            where=str(pickled),
            why="only safetensors files are read, because a pickle can run code",
            fix="load the adapter with PEFT, and save it again with save_pretrained(FOLDER)",
        )
    _check_names(folder / ADAPTER_WEIGHTS)
    try:
        target = settings["target_modules"]
        experts = _experts_of(settings.get("target_parameters") or [], file)
        is_pattern = isinstance(target, str) and target != lora.ALL_LINEAR
        if is_pattern or any(settings.get(key) is not None for key in LAYER_CHOICES):
            target = _adapted_modules(folder / ADAPTER_WEIGHTS)
        elif not isinstance(target, str):
            target = sorted({*(target or ()), *experts})
        values = {
            "rank": settings["r"],
            "alpha": settings["lora_alpha"],
            "dropout": settings.get("lora_dropout") or 0.0,
            "rslora": bool(settings.get("use_rslora")),
            "modules_to_save": settings.get("modules_to_save") or [],
            "target": target,
        }
        # By the recipe's types and bounds.
        return TypeAdapter(Adapter).validate_json(json.dumps(values))
    except (KeyError, TypeError, ValueError) as error:
        why = f"a value is missing or invalid: {error}"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{first['loc'][0]} is {str(first['input'])[:80]!r}: {first['msg']}"
        raise ModelError(
            "the adapter's configuration cannot be read",
            where=str(file),
            why=why,
            fix="name a PEFT adapter's folder, or copy it again",
        ) from error


def _adapted_modules(file: Path) -> list[str]:
    """Return the full names of the modules, experts included, for which an adapter has weights.

    The configuration does not name them if it has a regular expression or excludes layers.
    """
    names = set()
    for entry in read_header(file):
        if entry.name.endswith(".lora_A.weight"):
            name = entry.name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            names.add(name.replace(".base_layer", ""))
    return sorted(names)


def _check_names(file: Path) -> None:
    """Raise ModelError if an adapter has a tensor that NOT_READ names."""
    names: list[str] = []
    # A file that is missing or damaged is reported where it is loaded.
    with suppress(ModelError):
        names = [entry.name for entry in read_header(file)]
    for name, (pattern, what, why, fix) in product(names, NOT_READ):
        if pattern.fullmatch(name):
            fault = f"the adapter {what}: {name.removeprefix(PREFIX)}"
            raise ModelError(fault, where=str(file), why=why, fix=fix)


def _experts_of(parameters: Sequence[str], file: Path) -> list[str]:
    """The modules whose two stacks an adapter's `target_parameters` name."""
    stacks: dict[str, set[str]] = {}
    for parameter in parameters:
        module, _, stack = parameter.rpartition(".")
        stacks.setdefault(module, set()).add(stack)
    for module, named in stacks.items():
        if not module or "down_proj" not in named or len(named) != 2:
            raise ModelError(
                f"the adapter has target_parameters = {json.dumps(list(parameters))}, "
                "which is not supported",
                where=str(file),
                why="of experts both stacks are adapted here, gate_up_proj (or up_proj) and "
                "down_proj, and no other parameters",
                fix=MERGE,
            )
    return sorted(stacks)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Load PEFT's two files into the model's adapter.

    ModelError where scaling, layers, shapes or names differ from the model's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))

    # This rank compares its own part: parameters may be sharded by now.
    def is_base(name: str, stored: StoredTensor) -> bool:
        parameter = parameters[name]
        stored_part = stored[local_slices(parameter)].to(parameter.dtype)
        return torch.equal(local_part(parameter).cpu(), stored_part)

    with stored_adapter(model, folder, is_base) as stored:
        for name, tensor in stored.items():
            tensor.into_part(parameters[name])


@contextmanager
def stored_adapter(
    model: nn.Module, folder: Path, is_base: Callable[[str, StoredTensor], bool]
) -> Iterator[dict[str, StoredTensor]]:
    """Yield what PEFT's two files hold of a model's adapter, by the model's parameter names.

    Args:
        model: with the adapter, on meta or not.
        is_base: whether a tensor equals the base's parameter of that name. PEFT adds copies of
            embedding and head when one of them carries an adapter.

    ModelError where scaling, layers, shapes or names differ from the model's.
    """
    adapter = read_adapter(folder)
    _check_scaling(model, adapter, folder / ADAPTER_CONFIG)
    file = folder / ADAPTER_WEIGHTS
    parameters = _peft_tensors(model)
    # By identity: the mapping of PEFT's names holds the model's very parameters.
    own_names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        read_header(file)
    except ModelError as error:
        what = "the adapter's weights cannot be read"
        why = f"{error.what}. {error.why}"
        raise ModelError(what, where=str(file), why=why, fix="copy the adapter again") from error
    with stored_tensors(file) as stored:
        _check_rows(model, stored, file)
        names = set()
        for name, tensor in stored.items():
            if WRAPPER.search(name) and WRAPPER.sub("", name) in stored:
                continue
            # A copy of the base's values that PEFT added is skipped. One that differs stays here,
            # and reported as unknown below.
            base_name = None if name in parameters else _base_name(model, name, tensor)
            if base_name is None or not is_base(base_name, tensor):
                names.add(name)
        unknown = names - parameters.keys()
        reshaped = set()
        for name in names - unknown:
            if stored[name].shape != _file_shape(name, parameters[name]):
                reshaped.add(name)
        _check_none(parameters.keys() - names, "missing in the adapter", file)
        what = "of the adapter, not in the recipe's target or modules_to_save"
        _check_none(unknown, what, file)
        _check_none(reshaped, "of another shape", file)
        in_model = {}
        for name in sorted(names):
            parameter = parameters[name]
            in_model[own_names[id(parameter)]] = stored[name].with_shape(parameter.shape)
        yield in_model


def _check_rows(model: nn.Module, stored: Mapping[str, StoredTensor], file: Path) -> None:
    """Raise ModelError if the adapter has another number of rows in the embedding or the head."""
    in_model = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in stored.items():
        own_name = name_in_text(model, name.removeprefix(PREFIX))
        own_shape = in_model[own_name].shape if own_name in in_model else tensor.shape
        # A tensor of one number has no rows.
        if tensor.shape == own_shape or not tensor.shape or tensor.shape[1:] != own_shape[1:]:
            continue
        rows, own_rows = tensor.shape[0], own_shape[0]
        fix = (
            f"load the base in Transformers, call resize_token_embeddings({rows}), merge the "
            "adapter with PEFT, and start from the merged model"
        )
        if rows > own_rows and in_model[own_name].requires_grad:
            fix = (
                f"name the {rows - own_rows} new tokens in model.added_tokens, in the order of "
                "their ids; without a recipe, copy the adapter's own tokenizer to its folder; or "
                f"{fix}"
            )
        raise ModelError(
            f"the adapter has {rows:,} rows in {own_name}, and the model {own_rows:,}",
            where=str(file),
            why="tokens were added or removed before the adapter was trained",
            fix=fix,
        )


def _check_scaling(model: nn.Module, adapter: Adapter, file: Path) -> None:
    """ModelError where the model does not scale its updates as the adapter in `file` does."""
    scaling = lora_scaling(adapter)
    for name, layer in lora.low_ranks(model):
        # Relative to the scaling: alpha and rank have gone through JSON and a division.
        if abs(layer.scaling - scaling) > 1e-9 * abs(scaling):
            keys = f"adapter.rank: {adapter.rank}, adapter.alpha: {adapter.alpha:g}"
            raise ModelError(
                f"the adapter scales its update by {scaling:g}, the recipe by {layer.scaling:g}",
                where=f"{file}, layer {name}",
                fix=f"set {keys}, adapter.rslora: {str(adapter.rslora).lower()}",
            )


def _check_none(names: Collection[str], problem: str, file: Path) -> None:
    """ModelError that says the problem and some of the names, if there are any."""
    if not names:
        return
    shown = ", ".join(name.removeprefix(PREFIX) for name in sorted(names)[:3])
    if len(names) > 3:
        shown += ", ..."
    raise ModelError(
        f"{count_of(len(names), 'tensor')} {problem}: {shown}",
        where=str(file),
        why="adapter and model do not match",
        fix="use the base model, target, rank and modules_to_save that the adapter was "
        "trained with",
    )


def _base_name(model: nn.Module, name: str, stored: StoredTensor) -> str | None:
    """The base's parameter that a stored tensor may be a copy of; None where there is none of its
    name and shape.
    """
    base_name = name_in_text(model, name.removeprefix(PREFIX).replace(".base_layer.", "."))
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(base_name)
    if parameter is None or parameter.shape != stored.shape:
        return None
    return base_name
