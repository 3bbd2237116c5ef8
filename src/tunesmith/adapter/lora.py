"""LoRA: a frozen linear layer plus a trained update of low rank (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + b + scaling * (dropout(x) A^T) B^T        A [r, in], B [out, r], scaling = alpha / r

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) scales by alpha / sqrt(r). As in PEFT A starts as Kaiming-uniform with
a = sqrt(5) and B as zeros; both are fp32 parameters, computed in the dtype of x. A layer keeps the names `weight` and
`bias` of the layer that it replaces, so the base loads into it as before.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.config.schema import Adapter
from tunesmith.errors import RecipeError
from tunesmith.model.random_init import seed_of
from tunesmith.model.weights import copy_whole
from tunesmith.quant.eight_bit import ALIGNED, EightBitLinear
from tunesmith.quant.frozen_matmul import grouped_matmul, linear_names
from tunesmith.quant.frozen_weight import DenseWeight, FrozenWeight
from tunesmith.quant.nf4 import Nf4Linear
from tunesmith.sharded import local_part

ALL_LINEAR = "all-linear"
ORIGINAL = "before_tuning_"  # a module trained in full keeps its base values in buffers of this prefix


class Lora(nn.Module):
    """What a linear layer with an adapter has, however its base weight is stored.

    lora_A: fp32 [rank, in_features]; lora_B: fp32 [out_features, rank]. With `enabled = False` the base alone is computed.
    """

    bias: Any  # nn.Parameter or None
    dense: Callable[..., Tensor]  # the base weight [out_features, in_features], in the dtype of its matmuls
    frozen_weight: Callable[..., FrozenWeight]
    in_features: int
    out_features: int
    scaling: float
    dropout: float
    enabled: bool
    first: int = 0  # of the whole layer's inputs this rank has `in_features`, from this one on

    def add_lora(self, adapter: Adapter, device: torch.device) -> None:
        """Make A and B; `init_lora` draws their values."""
        rank = adapter.rank
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))
        self.scaling = adapter.alpha / (math.sqrt(rank) if adapter.rslora else rank)
        self.dropout = adapter.dropout
        self.enabled = True

    def drop(self, x: Tensor) -> Tensor:
        """x [..., in_features] with dropout; the ranks that share the layer's inputs draw as one process does."""
        if self.lora_A.shape[1] == self.in_features:
            return F.dropout(x, self.dropout, self.training)
        ones = x.new_ones(*x.shape[:-1], self.lora_A.shape[1])
        return x * F.dropout(ones, self.dropout, self.training).narrow(-1, self.first, self.in_features)

    def base(self, x: Tensor) -> Tensor:
        """The layer without its adapter: [..., in_features] -> [..., out_features]."""
        return super().forward(x)

    def update(self) -> Tensor:
        """scaling * B A: fp32 [out_features, in_features]."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        return project(x, [self])[0]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.lora_A.shape[0]}, scaling={self.scaling:g}"


class LoraLinear(Lora, nn.Linear):
    """An `nn.Linear` with an adapter; it takes over the very parameters, so tied weights stay tied."""

    def __init__(self, base: nn.Linear, adapter: Adapter) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.add_lora(adapter, base.weight.device)

    def dense(self) -> Tensor:
        return local_part(self.weight)

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), local_part(self.bias))

    def frozen_weight(self) -> DenseWeight:
        return DenseWeight("dense", [self.dense()], (self.out_features, self.in_features))


class LoraNf4Linear(Lora, Nf4Linear):
    """An `Nf4Linear` with an adapter (QLoRA: Dettmers et al. 2023, arXiv:2305.14314)."""

    def __init__(self, base: Nf4Linear, adapter: Adapter) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, base.compute_dtype, device="meta")
        self.share(base)
        self.add_lora(adapter, base.weight.device)


class LoraEightBitLinear(Lora, EightBitLinear):
    """An `EightBitLinear` with an adapter; it takes over that of a `LoraLinear`."""

    def __init__(self, base: LoraLinear, kind: str) -> None:
        super().__init__(base, kind)
        self.lora_A, self.lora_B = base.lora_A, base.lora_B
        self.scaling, self.dropout, self.enabled = base.scaling, base.dropout, base.enabled


def eight_bit_names(model: nn.Module, skip: Collection[nn.Module] = ()) -> list[str]:
    """Full names of the dense, frozen linear layers of fitting widths; without the output layer."""
    layers = ((name, model.get_submodule(name)) for name in linear_names(model, head=False))
    frozen = [(name, m) for name, m in layers if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    fitting = [(name, m) for name, m in frozen if m.in_features % ALIGNED == 0 and m.out_features % ALIGNED == 0]
    return [name for name, m in fitting if m not in skip]


def eight_bit_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(out_features, in_features) of the layers that `convert_to_eight_bit` takes, each once; on meta or not."""
    shapes = (model.get_parameter(f"{name}.weight").shape for name in eight_bit_names(model))
    return sorted({(n_out, n_in) for n_out, n_in in shapes})


def convert_to_eight_bit(model: nn.Module, kind: str, skip: Collection[nn.Module] = ()) -> int:
    """Put the layers of `eight_bit_names` into 8 bits, one at a time; return how many. Those on meta become empty ones.

    Args:
        kind: one of `scaled_matmul.KINDS`.
        skip: layers that will be trained in full, which a model on meta does not tell.
    """
    names = eight_bit_names(model, skip)  # by name: a list of the layers would keep every dense weight alive
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, LoraLinear):
            model.set_submodule(name, LoraEightBitLinear(layer, kind))
        elif isinstance(layer, nn.Linear):
            model.set_submodule(name, EightBitLinear(layer, kind))
    return len(names)


def attach_lora(model: nn.Module, adapter: Adapter, *, seed: int) -> list[str]:
    """Put an adapter on the model in place, freeze all else, and return the names of the adapted layers.

    On the meta device call `init_lora` once the weights are there. RecipeError for a target or module to save that the
    model does not have.
    """
    model.requires_grad_(False)
    names = target_names(model, adapter)
    for name in names:
        base = model.get_submodule(name)
        if isinstance(base, Nf4Linear):
            model.set_submodule(name, LoraNf4Linear(base, adapter))
        elif isinstance(base, nn.Linear):
            model.set_submodule(name, LoraLinear(base, adapter))
    _names_to_save(model, adapter)
    if not any(p.is_meta for p in model.parameters()):
        init_lora(model, adapter, seed=seed)
    return names


def init_lora(model: nn.Module, adapter: Adapter, *, seed: int) -> None:
    """Draw A, zero B, and copy the modules that are trained in full; the base weights must be loaded."""
    for name, module in loras(model):
        # Drawn in full, by seed and name: neither the order of the layers nor a later sharding changes it.
        generator = torch.Generator().manual_seed(seed_of(seed, f"{name}.lora_A"))
        bound = 1 / math.sqrt(module.lora_A.shape[1])  # Kaiming-uniform with a = sqrt(5)
        drawn = torch.empty(module.lora_A.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            copy_whole(module.lora_A, drawn)
            module.lora_B.zero_()
    for name in _names_to_save(model, adapter):
        to_save = model.get_submodule(name)
        known = dict(to_save.named_buffers(recurse=False))  # of an adapter that this one replaces
        for key, parameter in list(to_save.named_parameters(recurse=False)):
            base = known.get(ORIGINAL + key, parameter.detach())
            # A copy: a head tied to a trained embedding stays what it was, as in PEFT.
            to_save.register_parameter(key, nn.Parameter(base.clone()))
            to_save.register_buffer(ORIGINAL + key, base, persistent=False)


def replace_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Give every adapted layer another A and B, with their scaling and dropout; `init_lora` draws their values."""
    for _, layer in loras(model):
        layer.add_lora(adapter, layer.lora_A.device)


def is_adapter_weight(name: str) -> bool:
    """Whether the parameter of this name is A or B, which no checkpoint of the base holds."""
    return name.endswith((".lora_A", ".lora_B"))


def count_adapter_parameters(model: nn.Module, adapter: Adapter) -> int:
    """Parameters that a model with an adapter trains: A, B and the modules to save; on meta or not."""
    count = sum(p.numel() for module in modules_to_save(model, adapter) for p in module.parameters(recurse=False))
    return count + sum(m.lora_A.numel() + m.lora_B.numel() for _, m in loras(model))


def target_names(model: nn.Module, adapter: Adapter) -> list[str]:
    """Full names of the layers that `adapter.target` means, in the order of the model.

    As in PEFT a target means every linear layer of that name, and every one whose name ends in it after a dot.
    """
    to_save = _names_to_save(model, adapter)
    if adapter.target == ALL_LINEAR:
        return [name for name in linear_names(model, head=False) if name not in to_save]
    wanted = (adapter.target,) if isinstance(adapter.target, str) else adapter.target
    endings = {target: f".{target}" for target in wanted}
    names = _match(endings, linear_names(model, head=True), "adapter.target", "linear layer named")
    if both := set(names).intersection(to_save):
        what = f"{min(both)!r} is both an adapter target and a module to save"
        why, fix = "a module is either trained in full or through an adapter", "take it out of one of the two"
        raise RecipeError(what, where="adapter.modules_to_save", why=why, fix=fix)
    return names


def _match(wanted: Mapping[str, str], names: Sequence[str], key: str, kind: str) -> list[str]:
    """The names that equal a wanted one or end in its ending; RecipeError if a wanted one matches none."""
    for name, ending in wanted.items():
        if not any(n == name or n.endswith(ending) for n in names):
            why = f"it has: {', '.join(dict.fromkeys(n.rsplit('.', 1)[-1] for n in names))}"
            fix = f"name some of these, or {f'use {ALL_LINEAR}' if key == 'adapter.target' else f'remove {key}'}"
            raise RecipeError(f"the model has no {kind} {name!r}", where=key, why=why, fix=fix)
    return [n for n in names if n in wanted or n.endswith(tuple(wanted.values()))]


def _names_to_save(model: nn.Module, adapter: Adapter) -> list[str]:
    """Full names of `modules_to_save`: modules with parameters of their own, such as an embedding or a norm.

    As in PEFT a name means every module whose full name ends in it, with or without a dot before.
    """
    own = [n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    endings = {name: name for name in adapter.modules_to_save}
    return _match(endings, own, "adapter.modules_to_save", "module with weights of its own named")


def modules_to_save(model: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """The modules that an adapter trains in full; `init_lora` gives them parameters of their own."""
    return [model.get_submodule(name) for name in _names_to_save(model, adapter)]


def loras(model: nn.Module) -> Iterator[tuple[str, Lora]]:
    """Every layer with an adapter, by its full name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Lora))


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter of `modules_to_save`: (module's full name, module, name of the parameter)."""
    for name, module in model.named_modules():
        for key, _ in module.named_buffers(recurse=False):
            if key.startswith(ORIGINAL):
                yield name, module, key.removeprefix(ORIGINAL)


@torch.no_grad()
def merged_weight(module: Lora, dtype: torch.dtype | None = None) -> Tensor:
    """Base weight plus update [out_features, in_features], added in fp32 and rounded once, to `dtype` or the base's."""
    weight = module.dense()
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + module.update().to(wide)).to(dtype or weight.dtype)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone: no adapter, and modules trained in full back at their base values."""
    layers = [(module, module.enabled) for _, module in loras(model)]
    trained = [(m.get_parameter(key), m.get_buffer(ORIGINAL + key)) for _, m, key in saved_parameters(model)]
    tuned = [parameter.data for parameter, _ in trained]
    try:
        for module, _ in layers:
            module.enabled = False
        for parameter, original in trained:
            parameter.data = original
        yield
    finally:
        for module, enabled in layers:
            module.enabled = enabled
        for (parameter, _), data in zip(trained, tuned, strict=True):
            parameter.data = data


def project(x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Outputs [..., out_features] of several layers for one input x [..., in_features].

    If all are frozen with weights of one kind, `grouped_matmul` reads x once for all of them. Otherwise (dropout, a base
    that is trained, an adapter that is switched off) each layer is computed by itself, by plain autograd.
    """

    def alone(m: nn.Module) -> Tensor:
        y: Tensor = m.base(x) if isinstance(m, Lora) else m(x)
        if not isinstance(m, Lora) or not m.enabled:
            return y
        a, b = local_part(m.lora_A), local_part(m.lora_B)
        return y + F.linear(F.linear(m.drop(x), a.to(x.dtype)), b.to(x.dtype)) * m.scaling

    layers = [m for m in linears if isinstance(m, Lora) and m.enabled and not (m.dropout > 0 and m.training)]
    layers = [m for m in layers if not (isinstance(m, nn.Linear) and m.weight.requires_grad)]
    weights = [m.frozen_weight() for m in layers]
    if len(layers) < len(linears) or len({w.kind for w in weights}) != 1:
        return [alone(m) for m in linears]
    biases, lora_A = [local_part(m.bias) for m in layers], [local_part(m.lora_A) for m in layers]
    lora_B = [local_part(m.lora_B) * m.scaling for m in layers]
    return grouped_matmul(x, weights, biases, lora_A, lora_B)
