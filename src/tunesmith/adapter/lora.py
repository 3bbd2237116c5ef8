"""LoRA: a frozen linear layer plus a trained update of low rank (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + b + scaling * (dropout(x) A^T) B^T        A [r, in], B [out, r], scaling = alpha / r

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) scales by alpha / sqrt(r). As in PEFT A starts as
Kaiming-uniform with a = sqrt(5) and B as zeros; both are fp32 parameters, computed in the dtype of
x. A layer keeps the names `weight` and `bias` of the layer that it replaces, so the base loads into
it as before.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.adapter.expert_lora import (
    ExpertsLora,
    attach_to_experts,
    means,
    name_whole_experts,
    router_names,
)
from tunesmith.adapter.low_rank import LowRank
from tunesmith.config.schema import Adapter
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import RecipeError
from tunesmith.formats.linear import FrozenLinear, FrozenTensors, has_codes
from tunesmith.formats.matmul import grouped_matmul
from tunesmith.model.decoder import find_projector, is_in_text, trained_projector
from tunesmith.model.experts import Experts, find_experts
from tunesmith.model.names import name_in_text
from tunesmith.model.random_init import seed_of
from tunesmith.model.weights import copy_whole
from tunesmith.quant.experts import use_grouped_experts
from tunesmith.quant.linear_layers import (
    BypassedLinear,
    is_plain_linear,
    linear_names,
    parameter_count,
)
from tunesmith.quant.llama4_experts import choose_top_k

ALL_LINEAR = "all-linear"
# A module trained in full keeps its base values in buffers of this prefix.
ORIGINAL = "before_tuning_"


class LoraLinear(LowRank, FrozenLinear):
    """A linear layer with an adapter; it takes over the very parameters of another layer.

    lora_A: fp32 [rank, in_features]; lora_B: fp32 [out_features, rank].
    """

    # Of the whole layer's inputs this rank has `in_features`, from this one on.
    first: int = 0

    def __init__(self, base: nn.Linear | FrozenLinear, adapter: Adapter) -> None:
        nn.Module.__init__(self)
        self.take_over(base)
        self.add_lora(adapter, base.weight.device)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_features), (self.out_features, rank)

    def drop(self, x: Tensor) -> Tensor:
        """x [..., in_features] with dropout.

        The ranks that share the layer's inputs draw as one process does.
        """
        all_inputs = self.lora_A.shape[1]
        if all_inputs == self.in_features:
            return F.dropout(x, self.dropout, self.training)
        # Inputs are split over ranks: each draws the mask of all inputs and takes its own columns.
        mask = F.dropout(x.new_ones(*x.shape[:-1], all_inputs), self.dropout, self.training)
        return x * mask.narrow(-1, self.first, self.in_features)

    def base(self, x: Tensor) -> Tensor:
        """The layer without its adapter: [..., in_features] -> [..., out_features]."""
        return super().forward(x)

    def update(self) -> Tensor:
        """scaling * B A: fp32 [out_features, in_features]."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        return project(x, [self])[0]


def attach_lora(model: nn.Module, adapter: Adapter, *, seed: int) -> list[str]:
    """Add an adapter to the model in place, freeze all else, and return the adapted layers' names.

    On the meta device call `init_lora` once the weights are there. RecipeError for a target or
    module to save that the model does not have, and where nothing would train.
    """
    projector = trained_projector(model)
    # Frozen first: A and B are created afterwards, and stay trainable.
    model.requires_grad_(False)
    for module in projector:
        module.requires_grad_(True)
    choose_top_k(model)
    names = target_names(model, adapter)
    if not names and not adapter.modules_to_save and not projector:
        raise RecipeError(
            f"{type(model).__name__} has no layer that takes an adapter",
            where="adapter.target",
            why="LoRA supports nn.Linear layers, and its layers are of other classes",
            fix="adapter.kind=none for full fine-tuning",
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
    """Draw A, zero B, and copy the modules that are trained in full; the base must be loaded."""
    for name, layer in low_ranks(model):
        # Drawn in full, by seed and name: neither the order of the layers nor a later sharding
        # changes it.
        generator = torch.Generator().manual_seed(seed_of(seed, f"{name}.lora_A"))
        bound = 1 / math.sqrt(layer.lora_A.shape[1])  # Kaiming-uniform with a = sqrt(5)
        values = torch.empty(layer.lora_A.shape, dtype=torch.float32)
        values.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            copy_whole(layer.lora_A, values)
            layer.lora_B.zero_()
    copy_saved_modules(model, adapter)


def copy_saved_modules(model: nn.Module, adapter: Adapter) -> None:
    """Give the modules that are trained in full parameters of their own, on meta or not."""
    for module in modules_to_save(model, adapter):
        # An adapter that this one replaces has stored the base's values.
        buffers = dict(module.named_buffers(recurse=False))
        for key, parameter in list(module.named_parameters(recurse=False)):
            base = buffers.get(ORIGINAL + key, parameter.detach())
            # A copy: a head tied to a trained embedding stays what it was, as in PEFT.
            module.register_parameter(key, nn.Parameter(base.clone()))
            module.register_buffer(ORIGINAL + key, base, persistent=False)


def replace_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Give every adapted layer another A and B, with their scaling and dropout.

    `init_lora` draws their values.
    """
    for _, layer in low_ranks(model):
        layer.add_lora(adapter, layer.lora_A.device)


def is_adapter_weight(name: str) -> bool:
    """Tell whether the parameter of this name is A or B, which no checkpoint of the base holds."""
    return name.endswith((".lora_A", ".lora_B"))


def count_adapter_parameters(model: nn.Module, adapter: Adapter) -> int:
    """Parameters that a model with an adapter trains, on meta or not: A, B, the modules to save."""
    count = 0
    for module in modules_to_save(model, adapter):
        count += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    for _, layer in low_ranks(model):
        count += layer.lora_A.numel() + layer.lora_B.numel()
    return count


def target_names(model: nn.Module, adapter: Adapter) -> list[str]:
    """Full names of the modules that `adapter.target` means: linear layers in the order of the
    model, then the experts of each layer.

    As in PEFT a target means every linear layer of that name, and every one whose name ends in it
    after a dot. `experts` means both stacks of the experts, as does to name both. Routers are no
    targets: what is trained with them as they are would be read with others.
    """
    to_save = _names_to_save(model, adapter)
    experts = list(find_experts(model))
    routers = router_names(model)
    if adapter.target == ALL_LINEAR:
        linears = linear_names(model, head=False)
        names = [*(name for name in linears if name not in routers), *experts]
        return [name for name in names if name not in to_save]
    targets = adapter.target
    if isinstance(targets, str):
        targets = (targets,)
    # An adapter of a vision-language model names its layers in there.
    targets = tuple(name_in_text(model, target) for target in targets)
    linears = [name for name in linear_names(model, head=True) if name not in routers]
    all_names = [*linears, *experts]
    targets = name_whole_experts(model, targets, all_names)
    bypassed = [
        name for name, module in model.named_modules() if isinstance(module, BypassedLinear)
    ]
    _check_target(
        targets,
        bypassed,
        "an adapter on {!r} would learn nothing",
        "the model reads this layer's weight past its forward (a fused kernel of Mamba does), or "
        "only selects by it: measured on a small model of its class",
        f"take it out, or use {ALL_LINEAR}",
    )
    unmatched = [target for target in targets if not _named(target, all_names)]
    _check_target(
        unmatched,
        routers,
        "{!r} is a router, which takes no adapter",
        "it chooses the experts of each token, and a small change sends tokens to experts that "
        "were not trained on them",
        f"take it out, or use {ALL_LINEAR}; adapter.modules_to_save trains it in full",
    )
    parts = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    _check_target(
        unmatched,
        [name for name in parts if "expert" in name],
        f"{{!r}} of a {type(model).__name__} takes no adapter",
        "Transformers computes these experts with separate code, and not through its experts "
        "interface",
        f"remove it, or use {ALL_LINEAR}, which adapts the other layers",
    )
    described = "linear layer or experts named" if experts else "linear layer named"
    for target in unmatched:
        raise _unknown(target, all_names, "adapter.target", described, f"use {ALL_LINEAR}")
    names = [name for name in all_names if any(means(target, name) for target in targets)]
    in_both = set(names).intersection(to_save)
    if in_both:
        raise RecipeError(
            f"{min(in_both)!r} is both an adapter target and a module to save",
            where="adapter.modules_to_save",
            why="a module is either trained in full or through an adapter",
            fix="remove it from one of the two",
        )
    return names


def _named(target: str, names: Iterable[str]) -> bool:
    """Tell whether a target means one of the names."""
    return any(means(target, name) for name in names)


def _check_target(
    targets: Iterable[str], names: Collection[str], what: str, why: str, fix: str
) -> None:
    """RecipeError for a target that means one of these names."""
    for target in targets:
        if _named(target, names):
            raise RecipeError(what.format(target), where="adapter.target", why=why, fix=fix)


def describe_unreached(model: nn.Module) -> str:
    """A line for the user: the matrices of the layers that `all-linear` does not reach; "" where it
    reaches all.
    """
    routers = router_names(model)
    names: dict[str, None] = {}
    bypassed: dict[str, None] = {}
    parameters = 0
    is_text = is_in_text(model)
    for name, module in model.named_modules():
        words = [word for word in name.split(".") if not word.isdigit()]
        # Not reported: embeddings, the output layer, and what takes an adapter.
        if isinstance(module, nn.Embedding | LowRank) or words[-1:] == ["lm_head"]:
            continue
        if name in routers or isinstance(module, Experts) or is_plain_linear(module):
            continue
        if has_codes(module) or not is_text(name):
            continue
        if isinstance(module, BypassedLinear):
            bypassed[words[-1]] = None
            continue
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim >= 2:
                parameters += weight.numel()
                part = words[-1:] if key == "weight" else [*words[-1:], key]
                names[".".join(part)] = None
    parts = []
    if names:
        share = parameters / parameter_count(model)
        parts.append(f"{', '.join(names)}, which are not linear layers ({share:.0%} of the model)")
    if bypassed:
        parts.append(f"{', '.join(bypassed)}, where it would get no gradient")
    if routers:
        parts.append("the routers")
    if not parts:
        return ""
    return f"the adapter excludes {'; '.join(parts)}"


def _unknown(name: str, names: Iterable[str], key: str, described: str, fix: str) -> RecipeError:
    """The error for a name of the recipe's `key` that the model does not have."""
    last_parts = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return RecipeError(
        f"the model has no {described} {name!r}",
        where=key,
        why=f"it has: {', '.join(last_parts)}",
        fix=f"name some of these, or {fix}",
    )


def _names_to_save(model: nn.Module, adapter: Adapter) -> list[str]:
    """Full names of `modules_to_save`: modules with parameters of their own, as an embedding has,
    and those of a projector that is trained.

    As in PEFT a name means every module whose full name ends in it, with or without a dot before.
    """
    names = []
    is_text = is_in_text(model)
    projector = {part for module in trained_projector(model) for part in module.modules()}
    in_projector = []
    for name, module in model.named_modules():
        # Experts in codes have their weights in modules below.
        has_own = next(module.parameters(recurse=False), None) is not None
        if module in projector and has_own:
            in_projector.append(name)
        elif (isinstance(module, Experts) or has_own) and is_text(name):
            names.append(name)
    saved = tuple(name_in_text(model, name) for name in adapter.modules_to_save)
    _check_known(model, saved, names)
    return [*(name for name in names if name.endswith(saved)), *in_projector]


def _check_known(model: nn.Module, saved: Iterable[str], names: Collection[str]) -> None:
    """RecipeError for a name of `modules_to_save` that is not among those of the model."""
    key = "adapter.modules_to_save"
    projector = find_projector(model)
    for ending in saved:
        if any(name.endswith(ending) for name in names):
            continue
        # As PEFT's files name it
        if not any(name.endswith(ending) for name in projector):
            raise _unknown(ending, names, key, "module with weights named", f"remove {key}")
        if not trained_projector(model):
            raise RecipeError(
                f"{ending!r} is the model's projector, which is frozen",
                where=key,
                why="it is trained by a key of its own, with an adapter or without",
                fix="model.train_projector=true",
            )


def _check_saved(model: nn.Module, adapter: Adapter) -> None:
    """RecipeError for a module to save that the model does not have, or whose weight is codes."""
    for name in _names_to_save(model, adapter):
        module = model.get_submodule(name)
        for layer in (module, *module.children()):
            if not isinstance(layer, FrozenTensors) or not has_codes(layer):
                continue
            raise RecipeError(
                f"{name} is stored in codes ({layer.format.name}), and cannot be trained in full",
                where="adapter.modules_to_save",
                why="codes are frozen",
                fix="take it out and let adapter.target reach it, or model.quantize=none",
            )


def modules_to_save(model: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """The modules that an adapter trains in full; `init_lora` gives them their own parameters."""
    return [model.get_submodule(name) for name in _names_to_save(model, adapter)]


def loras(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every linear layer with an adapter, by its full name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def low_ranks(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Every module with an A and a B, by its full name: those of `loras`, and of experts."""
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            yield name, module


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter of `modules_to_save`: (module's full name, module, parameter's name)."""
    for name, module in model.named_modules():
        for key, _ in module.named_buffers(recurse=False):
            if key.startswith(ORIGINAL):
                yield name, module, key.removeprefix(ORIGINAL)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone: no adapter, and modules trained in full back at their base values."""
    enabled = [(layer, layer.enabled) for _, layer in low_ranks(model)]
    originals = []
    for _, module, key in saved_parameters(model):
        originals.append((module.get_parameter(key), module.get_buffer(ORIGINAL + key)))
    try:
        for layer, _ in enabled:
            layer.enabled = False
        with _in_place(originals):
            yield
    finally:
        for layer, was_enabled in enabled:
            layer.enabled = was_enabled


class TrainedValues:
    """The values of everything that a model trains, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self.values = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    def in_place(self) -> AbstractContextManager[None]:
        """Compute with them, in place of what the parameters hold."""
        return _in_place(self.values)


@contextmanager
def _in_place(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Give parameters other values within the block."""
    current = [parameter.data for parameter, _ in values]
    try:
        # `.data` is exchanged, not the parameter: optimizer and hooks hold the parameter.
        for parameter, value in values:
            parameter.data = value
        yield
    finally:
        for (parameter, _), value in zip(values, current, strict=True):
            parameter.data = value


def project(x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Outputs [..., out_features] of several layers for one input x [..., in_features].

    `grouped_matmul` reads x once for all layers where it can compute them; otherwise each layer is
    computed by itself, by plain autograd.
    """
    layers = [layer for layer in linears if isinstance(layer, LoraLinear) and can_be_grouped(layer)]
    weights = [layer.frozen_weight() for layer in layers]
    is_grouped = len(layers) == len(linears) and len({w.format.encoding for w in weights}) == 1
    if not is_grouped:
        # One layer that needs plain autograd, or two encodings: each layer by itself.
        return [_project_alone(x, layer) for layer in linears]
    biases = [local_part(layer.bias) for layer in layers]
    lora_A = [local_part(layer.lora_A) for layer in layers]
    # Scaling B [out, rank] is cheaper than scaling its product [n, out].
    lora_B = [local_part(layer.lora_B) * layer.scaling for layer in layers]
    return grouped_matmul(x, weights, biases, lora_A, lora_B)


def can_be_grouped(layer: LoraLinear) -> bool:
    """Tell whether `grouped_matmul` computes it: an adapter without dropout on a frozen base."""
    if not layer.enabled:
        return False
    if layer.training and layer.dropout > 0:
        return False  # each layer drops other entries of x
    return not layer.weight.requires_grad


def _project_alone(x: Tensor, layer: nn.Module) -> Tensor:
    y: Tensor
    if not isinstance(layer, LoraLinear):
        y = layer(x)
        return y
    y = layer.base(x)
    if not layer.enabled:
        return y
    a = local_part(layer.lora_A).to(x.dtype)
    b = local_part(layer.lora_B).to(x.dtype)
    # Dropout acts on the adapter's input only; the base has seen x itself.
    return y + F.linear(F.linear(layer.drop(x), a), b) * layer.scaling
