"""LoRA: a frozen linear layer plus a trained low-rank update (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + b + scaling * (dropout(x) A^T) B^T        A [r, in], B [out, r], scaling = alpha / r

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) scales by alpha / sqrt(r). As in PEFT, A is
initialized Kaiming-uniform with a = sqrt(5), and B with zeros. Both are fp32 parameters that are
converted to the dtype of x. A layer with an adapter has the same parameter names `weight` and
`bias` as the layer that it replaces. Therefore the base is loaded in the same way with and without
an adapter.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.adapter.expert_lora import (
    ExpertsLora,
    attach_to_experts,
    is_selected,
    name_whole_experts,
    router_names,
)
from tunesmith.adapter.low_rank import LowRank
from tunesmith.config.names import last_part
from tunesmith.config.schema import Adapter
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import RecipeError
from tunesmith.formats.linear import FrozenLinear, FrozenTensors, has_codes
from tunesmith.formats.matmul import grouped_matmul
from tunesmith.model.known.decoder import find_projector, is_in_text, trained_projector
from tunesmith.model.layers.experts import Experts, find_experts
from tunesmith.model.weights.names import name_in_text
from tunesmith.model.weights.random_init import seed_of
from tunesmith.model.weights.weights import copy_full_tensor
from tunesmith.quant.experts import use_grouped_experts
from tunesmith.quant.linear_layers import (
    BypassedLinear,
    is_plain_linear,
    linear_names,
    parameter_count,
)
from tunesmith.quant.llama4_experts import choose_top_k

ALL_LINEAR = "all-linear"
# Prefix of the buffers that hold the base values of fully trained modules.
ORIGINAL = "before_tuning_"


class LoraLinear(LowRank, FrozenLinear):
    """A linear layer with an adapter. It takes its weight and bias from the layer that it replaces.

    Attributes:
        lora_A: fp32 [rank, in_features].
        lora_B: fp32 [out_features, rank].
    """

    # Index of this rank's first input, if tensor parallelism splits the inputs of the layer.
    first: int = 0

    def __init__(self, base: nn.Linear | FrozenLinear, adapter: Adapter) -> None:
        nn.Module.__init__(self)
        self.take_over(base)
        self.add_lora(adapter, base.weight.device)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_features), (self.out_features, rank)

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to x [..., in_features].

        If the layer's inputs are split over ranks, each rank gets its part of the result that a
        single process would compute.
        """
        all_inputs = self.lora_A.shape[1]
        if all_inputs == self.in_features:
            return F.dropout(x, self.dropout, self.training)
        # The inputs are split over ranks. Each rank draws the dropout mask of all inputs, and uses
        # only the columns of its own inputs.
        mask = F.dropout(x.new_ones(*x.shape[:-1], all_inputs), self.dropout, self.training)
        return x * mask.narrow(-1, self.first, self.in_features)

    def base(self, x: Tensor) -> Tensor:
        """Compute the output of the layer without its adapter: [..., in_features] -> [...,
        out_features].
        """
        return super().forward(x)

    def update(self) -> Tensor:
        """Return scaling * B A, fp32 [out_features, in_features]."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output.

        Args:
            x: [..., in_features].

        Returns:
            [..., out_features].
        """
        return project(x, [self])[0]


def attach_lora(model: nn.Module, adapter: Adapter, *, seed: int) -> list[str]:
    """Add an adapter to the model in place and freeze all other parameters.

    For a model on the meta device, call `init_lora` after the weights are loaded.

    Returns:
        The names of the adapted layers.

    Raises:
        RecipeError: a name in `target` or `modules_to_save` does not exist, or nothing would be
            trained.
    """
    projector = trained_projector(model)
    # Freeze the model first, because A and B are created later and must be trainable.
    model.requires_grad_(False)
    for module in projector:
        module.requires_grad_(True)
    choose_top_k(model)
    names = target_names(model, adapter)
    if not names and not adapter.modules_to_save and not projector:
        raise RecipeError(
            f"{type(model).__name__} has no layer that supports an adapter",
            where="adapter.target",
            why="LoRA supports nn.Linear layers, but this model has other classes of layers",
            fix="set adapter.kind=none for full fine-tuning",
        )
    for name in names:
        base = model.get_submodule(name)
        if isinstance(base, nn.Linear | FrozenLinear):
            model.set_submodule(name, LoraLinear(base, adapter))
        elif isinstance(base, Experts):
            attach_to_experts(base, adapter)
    if any(isinstance(module, ExpertsLora) for module in model.modules()):
        use_grouped_experts(model)
    _check_saved(model, adapter)
    if not any(parameter.is_meta for parameter in model.parameters()):
        init_lora(model, adapter, seed=seed)
    return names


def init_lora(model: nn.Module, adapter: Adapter, *, seed: int) -> None:
    """Initialize A and B, and copy the fully trained modules. The base must already be loaded."""
    for name, layer in low_ranks(model):
        # Draw the unsharded A with a seed that is computed from the run's seed and the layer's
        # name. The values then do not depend on the order of the layers or on sharding.
        generator = torch.Generator().manual_seed(seed_of(seed, f"{name}.lora_A"))
        bound = 1 / math.sqrt(layer.lora_A.shape[1])  # Kaiming-uniform with a = sqrt(5)
        values = torch.empty(layer.lora_A.shape, dtype=torch.float32)
        values.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            copy_full_tensor(layer.lora_A, values)
            layer.lora_B.zero_()
    copy_saved_modules(model, adapter)


def copy_saved_modules(model: nn.Module, adapter: Adapter) -> None:
    """Replace the parameters of fully trained modules by copies. The model may be on the meta
    device.
    """
    for module in modules_to_save(model, adapter):
        # If this adapter replaces an earlier adapter, the base values are in buffers that were
        # registered for the earlier adapter.
        buffers = dict(module.named_buffers(recurse=False))
        for key, parameter in list(module.named_parameters(recurse=False)):
            base = buffers.get(ORIGINAL + key, parameter.detach())
            # Copy the values, so that a head that is tied to a trained embedding keeps the base
            # values, as in PEFT.
            module.register_parameter(key, nn.Parameter(base.clone()))
            module.register_buffer(ORIGINAL + key, base, persistent=False)


def is_adapter_weight(name: str) -> bool:
    """Return whether the parameter with this name is a lora_A or lora_B. A checkpoint of the base
    has no such parameters.
    """
    return name.endswith((".lora_A", ".lora_B"))


def count_adapter_parameters(model: nn.Module, adapter: Adapter) -> int:
    """Return the number of trained parameters of a model with an adapter: A, B, and the fully
    trained modules.
    """
    saved = modules_to_save(model, adapter)
    in_full = sum(p.numel() for module in saved for p in module.parameters(recurse=False))
    return in_full + sum(
        layer.lora_A.numel() + layer.lora_B.numel() for _, layer in low_ranks(model)
    )


def target_names(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return the full names of the modules that `adapter.target` selects.

    The linear layers come first, in the order of the model, and then the experts of each layer. As
    in PEFT, a target selects a linear layer if it is the full name of the layer, or the last part
    of the name after a dot. The target `experts` selects the experts of every layer, and so do the
    names of both stacks of experts. Routers cannot be targets, because other programs would
    load the adapter without the updates of the routers.
    """
    to_save = _names_to_save(model, adapter)
    experts = list(find_experts(model))
    routers = router_names(model)
    if adapter.target == ALL_LINEAR:
        linears = linear_names(model, head=False)
        excluded = routers.union(to_save)
        return [name for name in (*linears, *experts) if name not in excluded]
    given = [adapter.target] if isinstance(adapter.target, str) else adapter.target
    # Convert targets that are names in an entire vision-language model to names in its text model,
    # which are compared below.
    in_text = [name_in_text(model, target) for target in given]
    linears = [name for name in linear_names(model, head=True) if name not in routers]
    selectable = [*linears, *experts]
    targets = name_whole_experts(model, in_text, selectable)
    _check_targets(model, targets, selectable, routers)
    names = [name for name in selectable if is_selected(name, targets)]
    in_both = set(names).intersection(to_save)
    if in_both:
        raise RecipeError(
            f"{min(in_both)!r} is both an adapter target and a module to save",
            where="adapter.modules_to_save",
            fix="remove it from adapter.target or from adapter.modules_to_save",
        )
    return names


def _check_targets(
    model: nn.Module, targets: Sequence[str], selectable: Sequence[str], routers: Collection[str]
) -> None:
    """Raise RecipeError if a target is a layer that cannot have an adapter, or does not exist.

    Args:
        selectable: full names of the linear layers and experts that a target can select.
    """
    modules = dict(model.named_modules())
    names = [*modules, *(name for name, _ in model.named_parameters())]
    bypassed = [name for name, module in modules.items() if isinstance(module, BypassedLinear)]
    unmatched = [t for t in targets if not any(is_selected(name, [t]) for name in selectable)]
    # Targets, names that they must not select, and what, why and fix of the error.
    refused = (
        (
            targets,
            bypassed,
            "an adapter on {!r} would learn nothing",
            "the model uses this layer's weight without calling its forward (as Mamba's fused "
            "kernel does), or only for a selection: measured on a small model of this class",
            f"remove it from adapter.target, or use {ALL_LINEAR}",
        ),
        (
            unmatched,
            routers,
            "{!r} is a router, which cannot have an adapter",
            "it chooses the experts of each token, and a small change sends tokens to experts that "
            "were not trained on them",
            f"remove it, or use {ALL_LINEAR}; adapter.modules_to_save trains it in full",
        ),
        (
            unmatched,
            [name for name in names if "expert" in name],
            f"{{!r}} of a {type(model).__name__} cannot have an adapter",
            "Transformers computes these experts with separate code, not through its experts "
            "interface",
            f"remove it, or use {ALL_LINEAR}, which adapts the other layers",
        ),
    )
    for checked, others, what, why, fix in refused:
        for target in checked:
            if any(is_selected(name, [target]) for name in others):
                raise RecipeError(what.format(target), where="adapter.target", why=why, fix=fix)
    if unmatched:
        described = "linear layer or experts named" if find_experts(model) else "linear layer named"
        fix = f"set adapter.target={ALL_LINEAR}"
        raise _unknown(unmatched[0], selectable, "adapter.target", described, fix)


class Unreached(NamedTuple):
    """Parts of the decoder that `all-linear` does not adapt.

    Attributes:
        matrices: names of matrices that are not in linear layers.
        share: fraction of the model's parameters in `matrices`.
        bypassed: names of linear layers in which an adapter would get no gradient.
        has_routers: whether the model has routers.
    """

    matrices: tuple[str, ...]
    share: float
    bypassed: tuple[str, ...]
    has_routers: bool


def find_unreached(model: nn.Module) -> Unreached:
    """Find the parts of the decoder that `all-linear` does not adapt."""
    routers = router_names(model)
    names = []
    bypassed = []
    parameters = 0
    is_text = is_in_text(model)
    for name, module in model.named_modules():
        words = [word for word in name.split(".") if not word.isdigit()]
        # Do not report embeddings, the output layer and layers that have an adapter.
        if isinstance(module, nn.Embedding | LowRank) or words[-1:] == ["lm_head"]:
            continue
        if name in routers or isinstance(module, Experts) or is_plain_linear(module):
            continue
        if has_codes(module) or not is_text(name):
            continue
        if isinstance(module, BypassedLinear):
            bypassed.append(words[-1])
            continue
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim >= 2:
                parameters += weight.numel()
                part = words[-1:] if key == "weight" else [*words[-1:], key]
                names.append(".".join(part))
    return Unreached(
        tuple(dict.fromkeys(names)),
        parameters / parameter_count(model),
        tuple(dict.fromkeys(bypassed)),
        bool(routers),
    )


def _unknown(name: str, names: Iterable[str], key: str, described: str, fix: str) -> RecipeError:
    """Build the error for a name that the recipe has in `key`, but that does not exist in the
    model.
    """
    last_parts = dict.fromkeys(map(last_part, names))
    return RecipeError(
        f"the model has no {described} {name!r}",
        where=key,
        why=f"the model has: {', '.join(last_parts)}",
        fix=f"use names from this list, or {fix}",
    )


def _names_to_save(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return the full names of the modules that `modules_to_save` selects. A trained projector is
    included.

    Only modules that have parameters themselves are included, such as an embedding. A module that
    only contains other modules is not included. As in PEFT, a name selects every module whose full
    name ends with it, with or without a dot before it.
    """
    names = []
    is_text = is_in_text(model)
    projector: set[nn.Module] = set()
    for module in trained_projector(model):
        projector.update(module.modules())
    in_projector = []
    for name, module in model.named_modules():
        # The module of quantized experts has its weights in child modules, so it has no parameters
        # itself.
        has_own = next(module.parameters(recurse=False), None) is not None
        if module in projector and has_own:
            in_projector.append(name)
        elif (isinstance(module, Experts) or has_own) and is_text(name):
            names.append(name)
    saved = tuple(name_in_text(model, name) for name in adapter.modules_to_save)
    _check_known(model, saved, names)
    chosen = [name for name in names if name.endswith(saved)]
    return chosen + in_projector


def _check_known(model: nn.Module, saved: Iterable[str], names: Collection[str]) -> None:
    """Raise RecipeError if a name of `modules_to_save` matches no module of the model."""
    key = "adapter.modules_to_save"
    projector = find_projector(model)
    for ending in saved:
        if any(name.endswith(ending) for name in names):
            continue
        # Do not reject the projector, because PEFT's files list it under `modules_to_save`.
        if not any(name.endswith(ending) for name in projector):
            raise _unknown(ending, names, key, "module with weights named", f"remove {key}")
        if not trained_projector(model):
            raise RecipeError(
                f"{ending!r} is the model's projector, which is frozen",
                where=key,
                fix="set model.train_projector=true",
            )


def _check_saved(model: nn.Module, adapter: Adapter) -> None:
    """Raise RecipeError if a module in `modules_to_save` does not exist or is quantized."""
    for name in _names_to_save(model, adapter):
        module = model.get_submodule(name)
        for layer in (module, *module.children()):
            if not isinstance(layer, FrozenTensors) or not has_codes(layer):
                continue
            raise RecipeError(
                f"{name} is quantized ({layer.format.name}) and cannot be trained in full",
                where="adapter.modules_to_save",
                fix="remove it from adapter.modules_to_save (adapter.target can adapt it instead), "
                "or set model.quantize=none",
            )


def modules_to_save(model: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """Return the modules that an adapter trains fully.

    `init_lora` gives them their own parameters.
    """
    return [model.get_submodule(name) for name in _names_to_save(model, adapter)]


def loras(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (full name, layer) for every linear layer with an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def low_ranks(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Yield (full name, module) for every module with an A and a B. These are linear layers and
    stacks of experts.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            yield name, module


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the parameters of `modules_to_save` as (module's full name, module, parameter's
    name).
    """
    for name, module in model.named_modules():
        for key, _ in module.named_buffers(recurse=False):
            if key.startswith(ORIGINAL):
                yield name, module, key.removeprefix(ORIGINAL)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Disable the adapter inside the `with` block, and use the base values in fully trained
    modules.
    """
    enabled = [(layer, layer.enabled) for _, layer in low_ranks(model)]
    originals = [
        (module.get_parameter(key), module.get_buffer(ORIGINAL + key))
        for _, module, key in saved_parameters(model)
    ]
    try:
        for layer, _ in enabled:
            layer.enabled = False
        with _in_place(originals):
            yield
    finally:
        for layer, was_enabled in enabled:
            layer.enabled = was_enabled


def keep_trained_values(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Copy the current values of all trained parameters.

    Returns:
        A function that creates a context manager. In its block, the parameters have these values.
    """
    values = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    return partial(_in_place, values)


@contextmanager
def _in_place(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Set parameters to the given values inside the `with` block."""
    current = [parameter.data for parameter, _ in values]
    try:
        # Replace `.data` instead of the parameter, because optimizer and hooks reference the
        # parameter.
        for parameter, value in values:
            parameter.data = value
        yield
    finally:
        for (parameter, _), value in zip(values, current, strict=True):
            parameter.data = value


def project(x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Compute the outputs [..., out_features] of several layers for one input x [..., in_features].

    `grouped_matmul` reads x once for all layers if it supports all of them. Otherwise each layer is
    computed separately with plain autograd.
    """
    layers = [layer for layer in linears if isinstance(layer, LoraLinear) and can_be_grouped(layer)]
    weights = [layer.frozen_weight() for layer in layers]
    encodings = {weight.format.encoding for weight in weights}
    # Compute each layer separately if `grouped_matmul` does not support a layer, or if the layers
    # have different encodings.
    if len(layers) < len(linears) or len(encodings) != 1:
        return [_project_alone(x, layer) for layer in linears]
    biases = [local_part(layer.bias) for layer in layers]
    lora_A = [local_part(layer.lora_A) for layer in layers]
    # Scale B [out, rank], because this is cheaper than scaling the product [n, out].
    lora_B = [local_part(layer.lora_B) * layer.scaling for layer in layers]
    return grouped_matmul(x, weights, biases, lora_A, lora_B)


def can_be_grouped(layer: LoraLinear) -> bool:
    """Return whether `grouped_matmul` supports the layer.

    The layer must have an enabled adapter without dropout on a frozen base.
    """
    # Dropout draws a different mask of x for each layer.
    has_dropout = layer.training and layer.dropout > 0
    return layer.enabled and not has_dropout and not layer.weight.requires_grad


def _project_alone(x: Tensor, layer: nn.Module) -> Tensor:
    if not isinstance(layer, LoraLinear):
        output: Tensor = layer(x)
        return output
    y = layer.base(x)
    if not layer.enabled:
        return y
    a = local_part(layer.lora_A).to(x.dtype)
    b = local_part(layer.lora_B).to(x.dtype)
    # Dropout affects only the input of the adapter, not the input of the base.
    return y + F.linear(F.linear(layer.drop(x), a), b) * layer.scaling
