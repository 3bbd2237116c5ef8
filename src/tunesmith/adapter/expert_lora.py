"""LoRA for mixture-of-experts layers. Each expert of a stack has its own low-rank update.

    y = x W_e + scaling * (x A_e^T) B_e^T        for the rows of expert e

The parameters have the layout of PEFT's files (`target_parameters`), so that a checkpoint is
written and read without a conversion. A is [experts * rank, in], one expert after the other. B is
[out, rank, experts], which a file stores as [out, rank * experts]. With this layout, the experts of
one rank are a contiguous part of A along dimension 0 and of B along dimension 2.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tunesmith.adapter.low_rank import LowRank
from tunesmith.config.schema import Adapter
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import RecipeError
from tunesmith.model.layers.experts import LORA_SUFFIX, Experts, find_experts
from tunesmith.quant.llama4_experts import Llama4Experts

EXPERTS_TARGET = "experts"  # target that selects both stacks of every layer


class ExpertsLora(LowRank):
    """Module with the LoRA update of all experts of one stack.

    Attributes:
        lora_A: fp32 [experts * rank, in].
        lora_B: fp32 [out, rank, experts].
        shape: (experts, in_features, out_features) of the entire stack.
        is_swapped: whether PEFT swaps the inputs and outputs of this stack, so that A has the width
            `out` and B has the width `in`.
        is_transposed: whether the product B A of an expert is the transpose of the stored matrix.
    """

    def __init__(self, experts: Experts, name: str, adapter: Adapter) -> None:
        super().__init__()
        stack = experts.stack(name)
        self.shape = stack.shape
        self.is_swapped = isinstance(experts, Llama4Experts)
        self.is_transposed = bool(experts.is_transposed) and not self.is_swapped
        self.add_lora(adapter, stack.tensors[0].device)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts, in_features, out_features = self.shape
        if self.is_swapped:
            return (experts * rank, out_features), (in_features, rank, experts)
        return (experts * rank, in_features), (out_features, rank, experts)

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """Return views of this rank's experts: A [experts, rank, in] and B [experts, out, rank].

        If the stack is swapped, in and out are exchanged.
        """
        lora_B = local_part(self.lora_B).permute(2, 0, 1)
        return local_part(self.lora_A).unflatten(0, (len(lora_B), -1)), lora_B

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return A [experts, rank, in], and B [experts, rank, out] times the scaling, for
        `expert_matmul`.

        Return (None, None) if the adapter is disabled.
        """
        if not self.enabled:
            return None, None
        lora_A, lora_B = self.by_expert()
        lora_B = lora_B.mT
        if self.is_swapped:
            lora_A, lora_B = lora_B.contiguous(), lora_A
        scaled_B = (lora_B * self.scaling).to(dtype)
        return lora_A.to(dtype), scaled_B.contiguous()

    def update(self) -> Tensor:
        """Return scaling * B A of each expert in fp32. The result has the shape of the stored
        stack.
        """
        lora_A, lora_B = self.by_expert()
        update = self.scaling * (lora_B @ lora_A)
        if self.is_transposed:
            return update.mT
        return update


def expert_updates(model: nn.Module) -> Iterator[tuple[str, ExpertsLora]]:
    """Yield (full name of the stack, update) for each stack of experts with an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertsLora):
            yield name.removesuffix(LORA_SUFFIX), module


def attach_to_experts(experts: Experts, adapter: Adapter) -> None:
    """Add an adapter to both stacks of a layer's experts. The module is changed in place."""
    if adapter.dropout:
        raise RecipeError(
            "adapter.dropout is not supported for experts",
            where="adapter.dropout",
            why="PEFT merges the adapter into the weights of the experts, and therefore rejects "
            "dropout for them",
            fix="set adapter.dropout: 0, or only list linear layers in adapter.target",
        )
    for stack in experts.stack_names:
        attach_to_stack(experts, stack, adapter)


def attach_to_stack(experts: Experts, stack: str, adapter: Adapter) -> None:
    """Add an adapter to one stack of a layer's experts.

    The adapter is a separate module. It is registered next to the stack, in the experts' module.
    """
    experts.add_module(stack + LORA_SUFFIX, ExpertsLora(experts, stack, adapter))


def name_whole_experts(
    model: nn.Module, targets: Sequence[str], names: Sequence[str]
) -> tuple[str, ...]:
    """Return the targets. If both stacks of a layer are targets, the name of the experts' module
    replaces their two names.

    A target that selects one of `names` is unchanged. Raise RecipeError if only one of the two
    stacks is a target.

    Args:
        targets: the targets of the recipe.
        names: full names of the linear layers and experts that a target can select.
    """
    whole = []
    stacks: dict[str, set[str]] = {}
    experts = find_experts(model)
    for target in targets:
        if any(is_selected(name, [target]) for name in names):
            whole.append(target)
            continue
        modules = set()
        for module, held in experts.items():
            for stack in held.stack_names:
                if is_selected(f"{module}.{stack}", [target]):
                    modules.add(module)
                    stacks.setdefault(module, set()).add(stack)
        whole += modules or {target}
    for module, named in stacks.items():
        missing = set(experts[module].stack_names) - named
        if missing:
            raise RecipeError(
                f"adapter.target names {named.pop()!r} of {module} but not {missing.pop()!r}",
                where="adapter.target",
                why="PEFT stores the adapters of both weights of the experts under one name, so a "
                "file with only one of them would be ambiguous",
                fix=f"use {EXPERTS_TARGET!r} instead, which selects both weights",
            )
    return tuple(dict.fromkeys(whole))


def is_selected(name: str, targets: Iterable[str]) -> bool:
    """Return whether a target is the name, or its last parts after a dot."""
    return f".{name}".endswith(tuple(f".{target}" for target in targets))


def router_names(model: nn.Module) -> set[str]:
    """Return the full names of the layers that choose a token's experts. They are always frozen.

    A router is in the same parent module as the experts, in a module called gate or router. The
    shape of a layer cannot identify it, because another layer may have as many outputs as there are
    experts, and a router may be an MLP (Zaya).
    """
    routers = set()
    for name in find_experts(model):
        parent = name.rpartition(".")[0]
        for below, part in model.get_submodule(parent).named_modules(prefix=parent):
            path = below[len(parent) :]
            is_router = "router" in path or "gate" in path.split(".")
            if not is_router or "expert" in path:
                continue
            weight = dict(part.named_parameters(recurse=False)).get("weight")
            if weight is not None and weight.ndim == 2:
                routers.add(below)
    return routers
