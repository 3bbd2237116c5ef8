"""Reading and writing of PEFT's files `adapter_config.json` and `adapter_model.safetensors`.

If an adapter uses a feature that is not supported (DoRA, a rank per layer, ...), an error names the
feature. Features are never ignored.
"""

import json
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.adapter import lora
from tunesmith.adapter.expert_lora import EXPERTS_TARGET, expert_updates
from tunesmith.adapter.low_rank import lora_scaling
from tunesmith.config.names import last_part
from tunesmith.config.schema import Adapter
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.formats.stored import StoredTensor
from tunesmith.host.files import check_regular_files
from tunesmith.model.known.decoder import (
    find_projector,
    has_vision_language_class,
    trained_projector,
)
from tunesmith.model.layers.experts import find_experts
from tunesmith.model.weights.names import (
    entire_model,
    is_vision_language,
    name_in_entire_model,
    name_in_text,
)
from tunesmith.model.weights.safetensors_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    read_header,
    read_json,
)
from tunesmith.model.weights.save_tensors import save_tensors
from tunesmith.model.weights.stored_tensors import name_tensors, stored_tensors

PREFIX = "base_model.model."
MERGE = "merge it into its base with PEFT, and start from the merged model"
# Patterns for names of tensors that are not supported. Each pattern has three texts for the error
# message: what the adapter does, why it is not supported, and the fix.
NOT_READ = (
    (
        re.compile(r".+\.experts\.\d+\.\w+\.lora_[AB]\.weight"),
        "stores its experts separately",
        "this is vLLM's format, but only PEFT's stacked format (target_parameters) can be read",
        f"name the run that it was exported from; for an adapter of another tool, {MERGE}",
    ),
    (
        re.compile(r".+\.(vision|visual)\w*\..+\.lora_[AB]\.weight"),
        "changes the vision part of the model",
        "the vision part is frozen and cannot have an adapter",
        MERGE,
    ),
    (
        re.compile(r".+\.lora_embedding_[AB]"),
        "has a low-rank update of an embedding",
        "only linear layers and experts can have an adapter",
        MERGE,
    ),
)
# Parts of names that PEFT's wrapper module adds. PEFT stores a resized embedding two more times
# under such names.
WRAPPER = re.compile(r"\.(modules_to_save|original_module)(?=\.)")

# Keys of PEFT's LoraConfig. The function of a key returns True if its argument, the value of the
# key, is allowed for a plain LoRA. All keys that are neither in NEUTRAL nor in HARMLESS must have
# an empty or false value.
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda v: v == "LORA",
    "task_type": lambda v: v in (None, "CAUSAL_LM"),
    "bias": lambda v: v in (None, "none"),
    # Other initializations (pissa, olora, corda, loftq, lora_ga) change the base's weights. If PEFT
    # has converted such an adapter back to the original base, the value is true.
    "init_lora_weights": lambda v: (
        v in (None, True, False, "gaussian", "orthogonal", "eva", "mica")
    ),
}
# Keys that `read_adapter` reads, and keys that do not change the result of an adapter.
HARMLESS = frozenset(
    "r lora_alpha lora_dropout use_rslora modules_to_save target_modules target_parameters"
    " exclude_modules layers_to_transform layers_pattern base_model_name_or_path revision"
    " auto_mapping peft_version inference_mode runtime_config megatron_core qalora_group_size"
    " eva_config loftq_config".split()
)
# Keys that restrict the adapter to some of the layers in `target_modules`.
LAYER_CHOICES = ("exclude_modules", "layers_to_transform", "layers_pattern")

# Values that are the same for every plain LoRA. PEFT uses its defaults for keys that are not
# listed. The values are not read from PEFT, because `import peft` takes a second and would block
# the training thread for most of this time.
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
    """Return the contents of PEFT's two files: the trained parameters and the configuration.

    The keys of the parameters are PEFT's names. The tensors are not copied.

    Args:
        base_name: Hub id of the base model, or the path of its folder in the recipe.
    """
    adapted = {name for name, _ in lora.loras(model)}
    trained = {name for name, _, _ in lora.saved_parameters(model)}
    targets, to_save = _peft_modules(model, adapted, trained)
    alpha = adapter.alpha
    # PEFT declares `lora_alpha` as an int, so write an integer if possible.
    if alpha == int(alpha):
        alpha = int(alpha)
    settings = PLAIN_LORA_CONFIG | {
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": alpha,
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
    """Return two lists of names for PEFT's configuration: those of the adapted modules, and those
    of the fully trained modules.

    A list has only the last part of each module's name, unless the last parts would match other
    modules too. Then it has full names. This happens in a vision-language model if the vision tower
    has layers with the same names as the text model.
    """
    trained = _joined_projector(model, trained)
    if is_vision_language(model):
        in_whole = partial(name_in_entire_model, model)
        return set(map(in_whole, adapted)), set(map(in_whole, trained))
    # PEFT matches a target against the last parts of a name, and a saved module against any suffix
    # of a name.
    targets = {last_part(name) for name in adapted}
    to_save = {last_part(name) for name in trained}
    modules = dict(model.named_modules())
    by_saved = {name for name in modules if name.endswith(tuple(to_save))}
    by_target = {
        name
        for name, module in modules.items()
        if last_part(name) in targets and not isinstance(module, nn.ModuleList)
    }
    # If a last part matches other modules too, use full names, which match nothing else.
    return targets if by_target == adapted else adapted, to_save if by_saved == trained else trained


def _joined_projector(model: nn.Module, trained: set[str]) -> set[str]:
    """Return the names of fully trained modules. The name of a projector replaces the names of its
    parts.

    PEFT copies a projector with all of its modules, so only the projector must be listed.
    """
    if not trained_projector(model):
        return trained
    projector = find_projector(model)
    inside = tuple(f"{name}." for name in projector)
    others = {name for name in trained if not f"{name}.".startswith(inside)}
    return others.union(projector)


def _peft_stacks(model: nn.Module) -> list[str]:
    """Return the names of the adapted stacks of experts for PEFT's configuration.

    The list has only the last three parts of each name, or full names if the last parts would match
    other parameters too.
    """
    adapted = [name for name, _ in expert_updates(model)]
    if is_vision_language(model):
        return [name_in_entire_model(model, name) for name in adapted]
    ends = {".".join(name.split(".")[-3:]) for name in adapted}
    endings = tuple(f".{end}" for end in ends)
    matched = {name for name, _ in model.named_parameters() if name.endswith(endings)}
    return sorted(ends if matched == set(adapted) else adapted)


class Misread(NamedTuple):
    """An adapter whose updates PEFT would not load completely.

    Attributes:
        error: the error with which PEFT rejects the adapter. Empty if PEFT loads the adapter.
        layers: names of the linear layers that PEFT treats as experts.
        targets: the names for `adapter.target` with which PEFT loads the adapter.
    """

    error: str = ""
    layers: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    model_type: str = ""


def find_misread(model: PreTrainedModel) -> Misread | None:
    """Find the updates of this adapter that PEFT would not load. Return None if it loads all.

    In many models with experts, PEFT 0.21 treats the targets gate_proj, up_proj and down_proj as
    the experts of older files. PEFT then does not load the adapters of linear layers with these
    names, such as those of shared experts and of dense first layers.
    """
    # Only models with experts or a vision part need this conversion. Return early for other models,
    # because importing PEFT takes a second.
    if not has_vision_language_class(model) and not any(
        parameter.ndim == 3 for parameter in model.parameters()
    ):
        return None
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # older versions of PEFT have no such conversion
        return None
    # Use the entire vision-language model, because PEFT loads this model and applies the conversion
    # rules for its type.
    opened = entire_model(model)
    adapted = {last_part(name) for name, _ in lora.loras(model)}
    config = LoraConfig(target_modules=sorted(adapted), target_parameters=_peft_stacks(model))
    try:
        convert_peft_config_for_transformers(config, opened, None)
    except ValueError as error:
        return Misread(error=str(error))
    read = set(config.target_modules)
    if adapted <= read:
        return None
    targets = sorted(read)
    if any(expert_updates(model)):
        targets.append(EXPERTS_TARGET)
    # This also covers adapters with updates of experts. For these, PEFT expects twice the rank and
    # rejects the entire adapter.
    return Misread("", tuple(sorted(adapted - read)), tuple(targets), opened.config.model_type)


def write_adapter(
    folder: Path | None, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write the result of `adapter_files` as PEFT's two files to an existing folder.

    Args:
        folder: None on ranks that write no files, see `save_tensors`.
    """
    shapes = {name: _file_shape(name, tensor) for name, tensor in tensors.items()}
    path = folder / ADAPTER_WEIGHTS if folder else None
    save_tensors(path, tensors, {"format": "pt"}, shapes=shapes)
    if folder:
        text = json.dumps(settings, indent=2, sort_keys=True)
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _file_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter in PEFT's file. B of experts, [out, rank, experts], has the
    shape [out, rank * experts] there.
    """
    if name.endswith(".lora_B.weight") and tensor.ndim == 3:
        return tensor.shape[0], tensor.shape[1] * tensor.shape[2]
    return tuple(tensor.shape)


def _peft_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters. The keys are PEFT's names."""
    tensors = {}
    # Use the names of layers in the entire vision-language model, because PEFT loads this model and
    # not only its text part.
    for name, layer in lora.loras(model):
        peft_name = PREFIX + name_in_entire_model(model, name)
        tensors[f"{peft_name}.lora_A.weight"] = layer.lora_A
        tensors[f"{peft_name}.lora_B.weight"] = layer.lora_B
    for name, experts in find_experts(model).items():
        stacks = map(experts.update, experts.stacks_in_order())
        updates = [update for update in stacks if update is not None]
        # PEFT wraps the experts' module once per stack. Each wrapper adds `.base_layer` to the
        # name, so the first stack has one `.base_layer` more than the second.
        peft_name = PREFIX + name_in_entire_model(model, name) + len(updates) * ".base_layer"
        for update in updates:
            peft_name = peft_name.removesuffix(".base_layer")
            tensors[f"{peft_name}.lora_A.weight"] = update.lora_A
            tensors[f"{peft_name}.lora_B.weight"] = update.lora_B
    for name, module, key in lora.saved_parameters(model):
        peft_name = PREFIX + name_in_entire_model(model, name)
        tensors[f"{peft_name}.{key}"] = module.get_parameter(key)
    return tensors


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter's settings from the `adapter_config.json` in a folder.

    Raise ModelError if the file is missing or damaged, or if the adapter is not a plain LoRA.
    """
    check_regular_files(folder)
    file = folder / ADAPTER_CONFIG
    if not file.exists():
        raise ModelError(
            f"there is no {ADAPTER_CONFIG}",
            where=folder,
            fix="use the folder of a PEFT adapter",
        )
    settings = read_json(file, again="copy the adapter again")
    # Check peft_type first. If the adapter uses another method, an error with the name of the
    # method is clearer than an error about one of its keys.
    for name, value in sorted(settings.items(), key=lambda setting: setting[0] != "peft_type"):
        if name not in HARMLESS and not NEUTRAL.get(name, operator.not_)(value):
            raise ModelError(
                f"the adapter has {name} = {json.dumps(value)}, which is not supported",
                where=file,
                why="only plain LoRA and rsLoRA with a single rank are supported",
                fix=MERGE,
            )
    weights = folder / ADAPTER_WEIGHTS
    pickled = folder / "adapter_model.bin"
    if pickled.exists() and not weights.exists():
        raise ModelError(
            "the adapter's weights are pickled",
            where=pickled,
            why="only safetensors files are read, because a pickle can run code",
            fix="load the adapter with PEFT, and save it again with save_pretrained(FOLDER)",
        )
    _check_names(weights)
    try:
        target = settings["target_modules"]
        experts = _experts_of(settings.get("target_parameters") or [], file)
        is_pattern = isinstance(target, str) and target != lora.ALL_LINEAR
        if is_pattern or any(settings.get(key) is not None for key in LAYER_CHOICES):
            target = _adapted_modules(weights)
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
        # Validate the values with the types and limits of the recipe.
        return TypeAdapter(Adapter).validate_json(json.dumps(values))
    except (KeyError, TypeError, ValueError) as error:
        why = f"a value is missing or invalid: {error}"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{first['loc'][0]} is {str(first['input'])[:80]!r}: {first['msg']}"
        raise ModelError(
            "the adapter's configuration cannot be read",
            where=file,
            why=why,
            fix="copy the adapter again, or use the folder of another PEFT adapter",
        ) from error


def _adapted_modules(file: Path) -> list[str]:
    """Return the full names of the modules, including experts, for which an adapter has weights.

    This is needed if the configuration has a regular expression or excludes layers instead of
    listing the names.
    """
    names = set()
    for entry in read_header(file):
        if entry.name.endswith(".lora_A.weight"):
            name = entry.name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            names.add(name.replace(".base_layer", ""))
    return sorted(names)


def _check_names(file: Path) -> None:
    """Raise ModelError if the name of a tensor matches a pattern in NOT_READ."""
    names = []
    # Ignore a missing or damaged file, because the error is raised when the file is loaded.
    with suppress(ModelError):
        names = [entry.name for entry in read_header(file)]
    for name, (pattern, what, why, fix) in product(names, NOT_READ):
        if pattern.fullmatch(name):
            raise ModelError(
                f"the adapter {what}: {name.removeprefix(PREFIX)}",
                where=file,
                why=why,
                fix=fix,
            )


def _experts_of(parameters: Sequence[str], file: Path) -> list[str]:
    """Return the modules of experts whose two stacks are both in `target_parameters`."""
    stacks: dict[str, set[str]] = {}
    for parameter in parameters:
        module, _, stack = parameter.rpartition(".")
        stacks.setdefault(module, set()).add(stack)
    for module, named in stacks.items():
        if not module or "down_proj" not in named or len(named) != 2:
            raise ModelError(
                f"the adapter has target_parameters = {json.dumps(list(parameters))}, "
                "which is not supported",
                where=file,
                why="for experts, only the two stacks gate_up_proj (or up_proj) and down_proj can "
                "be adapted, and only together",
                fix=MERGE,
            )
    return sorted(stacks)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Load PEFT's two files into the model's adapter.

    Raise ModelError if scaling, layers, shapes or names differ from the model's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))

    # Compare only this rank's shard of the parameter, because the parameters may already be
    # sharded.
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
) -> Iterator[Mapping[str, StoredTensor]]:
    """Yield (name of the model's parameter, tensor) for each tensor of an adapter in PEFT's two
    files.

    Args:
        model: the model with the adapter, on the meta device or not.
        is_base: returns whether a tensor equals the base's parameter with this name. The function
            is needed because PEFT adds copies of embedding and head to the file if one of them has
            an adapter.

    Raise ModelError if scaling, layers, shapes or names differ from the model's.
    """
    _check_scaling(model, read_adapter(folder), folder / ADAPTER_CONFIG)
    file = folder / ADAPTER_WEIGHTS
    parameters = _peft_tensors(model)
    in_base = dict(model.named_parameters(remove_duplicate=False))
    # Map the id of each parameter object to its name in the model. `parameters` has the same
    # objects under PEFT's names.
    own_names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        read_header(file)
    except ModelError as error:
        what = "the adapter's weights cannot be read"
        raise ModelError(
            what, where=file, why=f"{error.what}. {error.why}", fix="copy the adapter again"
        ) from error
    with stored_tensors(file) as stored:
        _check_rows(model, in_base, stored, file)
        names = set()
        for name, tensor in stored.items():
            if WRAPPER.search(name) and WRAPPER.sub("", name) in stored:
                continue
            # Skip copies of the base's values that PEFT added. If a copy differs from the base, its
            # name is added and reported as unknown below.
            if name not in parameters:
                path = name.removeprefix(PREFIX).replace(".base_layer.", ".")
                base_name = name_in_text(model, path)
                base = in_base.get(base_name)
                may_be_copy = base is not None and base.shape == tensor.shape
                if may_be_copy and is_base(base_name, tensor):
                    continue
            names.add(name)
        unknown = names - parameters.keys()
        reshaped = {
            name
            for name in names - unknown
            if stored[name].shape != _file_shape(name, parameters[name])
        }
        _check_none(parameters.keys() - names, "missing in the adapter", file)
        what = "of the adapter, not in the recipe's target or modules_to_save"
        _check_none(unknown, what, file)
        _check_none(reshaped, "of another shape", file)
        in_model = {}
        for name in sorted(names):
            parameter = parameters[name]
            in_model[own_names[id(parameter)]] = stored[name].with_shape(parameter.shape)
        yield in_model


def _check_rows(
    model: nn.Module,
    in_model: Mapping[str, nn.Parameter],
    stored: Mapping[str, StoredTensor],
    file: Path,
) -> None:
    """Raise ModelError if the embedding or head in the adapter has another number of rows than in
    the model.
    """
    for name, tensor in stored.items():
        own_name = name_in_text(model, name.removeprefix(PREFIX))
        if own_name not in in_model:
            continue
        shape = tensor.shape
        own_shape = in_model[own_name].shape
        # Skip tensors that differ in another dimension than the rows, and scalar tensors, which
        # have no rows.
        if shape == own_shape or not shape or shape[1:] != own_shape[1:]:
            continue
        rows = shape[0]
        own_rows = own_shape[0]
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
            f"the adapter has {rows:,} rows in {own_name}, but the model has {own_rows:,}",
            where=file,
            why="tokens were added or removed before the adapter was trained",
            fix=fix,
        )


def _check_scaling(model: nn.Module, adapter: Adapter, file: Path) -> None:
    """Raise ModelError if the model's adapter and the adapter in `file` have different scaling."""
    scaling = lora_scaling(adapter)
    for name, layer in lora.low_ranks(model):
        # Use a relative tolerance, because `scaling` is a quotient of numbers that were converted
        # to JSON.
        if abs(layer.scaling - scaling) > 1e-9 * abs(scaling):
            keys = f"adapter.rank: {adapter.rank}, adapter.alpha: {adapter.alpha:g}"
            raise ModelError(
                f"the adapter has the scaling factor {scaling:g}, but the recipe has "
                f"{layer.scaling:g}",
                where=f"{file}, layer {name}",
                fix=f"set {keys}, adapter.rslora: {str(adapter.rslora).lower()}",
            )


def _check_none(names: Collection[str], problem: str, file: Path) -> None:
    """Raise ModelError if `names` is not empty. The message has the problem and some of the
    names.
    """
    if not names:
        return
    shown = [name.removeprefix(PREFIX) for name in sorted(names)]
    raise ModelError(
        name_tensors(shown, problem),
        where=file,
        fix="use the base model, target, rank and modules_to_save that the adapter was "
        "trained with",
    )
