"""LoRA on the experts of a mixture: an update of low rank for each expert of a stack.

    y = x W_e + scaling * (x A_e^T) B_e^T        for the rows of expert e

The parameters have the order of PEFT's files (`target_parameters`), so that a checkpoint is written
and read as it is: A [experts * rank, in], one expert after the other, and B [out, rank, experts],
which a file has as [out, rank * experts]. So the experts of a rank are a part of each along one
dimension.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tunesmith.adapter.low_rank import LowRank
from tunesmith.config.schema import Adapter
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import RecipeError
from tunesmith.model.experts import LORA_SUFFIX, Experts, StackUpdate, find_experts
from tunesmith.quant.llama4_experts import Llama4Experts

EXPERTS_TARGET = "experts"  # a target that means both stacks of every layer


class ExpertsLora(LowRank, StackUpdate):
    """The update of one stack.

    Attributes:
        lora_A: fp32 [experts * rank, in]; lora_B: fp32 [out, rank, experts].
        shape: (experts, in_features, out_features) of the whole stack.
        is_swapped: PEFT takes the stack's inputs for its outputs: A has `out`, and B has `in`.
        is_transposed: the product B A of an expert is the transpose of what the stack stores.
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
            in_features, out_features = out_features, in_features
        return (experts * rank, in_features), (out_features, rank, experts)

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """A [experts, rank, in] and B [experts, out, rank] of this rank's experts, views; of
        swapped ones in and out are exchanged.
        """
        lora_B = local_part(self.lora_B).permute(2, 0, 1)
        return local_part(self.lora_A).unflatten(0, (len(lora_B), -1)), lora_B

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """A [experts, rank, in], and B [experts, rank, out] times the scaling, for `expert_matmul`;
        (None, None) where it is disabled.
        """
        if not self.enabled:
            return None, None
        lora_A, lora_B = self.by_expert()
        lora_B = lora_B.mT
        if self.is_swapped:
            lora_A, lora_B = lora_B.contiguous(), lora_A
        return lora_A.to(dtype), (lora_B * self.scaling).to(dtype).contiguous()

    def update(self) -> Tensor:
        """scaling * B A of each expert: fp32, in the shape of the stack as it is stored."""
        lora_A, lora_B = self.by_expert()
        update = self.scaling * (lora_B @ lora_A)
        return update.mT if self.is_transposed else update


def expert_updates(model: nn.Module) -> Iterator[tuple[str, ExpertsLora]]:
    """Every update of a stack of experts, by the full name of the stack."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertsLora):
            yield name.removesuffix(LORA_SUFFIX), module


def attach_to_experts(experts: Experts, adapter: Adapter) -> None:
    """Add an adapter to both stacks of a layer's experts, in place."""
    if adapter.dropout:
        raise RecipeError(
            "adapter.dropout is not supported for experts",
            where="adapter.dropout",
            why="PEFT adds their update to the weight, where there is no input to drop out, and "
            "refuses it",
            fix="set adapter.dropout: 0, or only list linear layers in adapter.target",
        )
    for stack in experts.stack_names:
        attach_to_stack(experts, stack, adapter)


def attach_to_stack(experts: Experts, stack: str, adapter: Adapter) -> None:
    """Add an adapter to one stack, in place: a module beside it."""
    experts.add_module(stack + LORA_SUFFIX, ExpertsLora(experts, stack, adapter))


def name_whole_experts(
    model: nn.Module, targets: Sequence[str], names: Sequence[str]
) -> tuple[str, ...]:
    """The targets, with the experts' module for each two that name its two stacks.

    A target that means one of `names` (linear layers and experts) stays. RecipeError for one stack
    without the other.
    """
    whole: dict[str, None] = {}
    stacks: dict[str, set[str]] = {}
    experts = find_experts(model)
    for target in targets:
        if any(means(target, name) for name in names):
            whole[target] = None
            continue
        modules = set()
        for module, held in experts.items():
            for stack in held.stack_names:
                if means(target, f"{module}.{stack}"):
                    modules.add(module)
                    stacks.setdefault(module, set()).add(stack)
        whole |= dict.fromkeys(modules or {target})
    for module, named in stacks.items():
        missing = set(experts[module].stack_names) - named
        if missing:
            raise RecipeError(
                f"adapter.target names {named.pop()!r} of {module} and not {missing.pop()!r}",
                where="adapter.target",
                why="PEFT's files call both by the name of the experts, and one by itself could "
                "not be told from the other",
                fix=f"name {EXPERTS_TARGET!r}, which means both",
            )
    return tuple(whole)


def means(target: str, name: str) -> bool:
    """Tell whether a target means the module of this full name."""
    return name == target or name.endswith(f".{target}")


def router_names(model: nn.Module) -> set[str]:
    """Full names of the layers that choose a token's experts: they stay frozen.

    They stand beside the experts, in a module called gate or router. A shape says nothing: another
    layer may have as many outputs as there are experts, and a router may be an MLP (Zaya).
    """
    routers = set()
    for name in find_experts(model):
        parent = name.rpartition(".")[0]
        for below, part in model.get_submodule(parent).named_modules(prefix=parent):
            words = below[len(parent) :].split(".")
            is_router = any(word == "gate" or "router" in word for word in words)
            is_expert = any("expert" in word for word in words)
            own = dict(part.named_parameters(recurse=False))
            if is_router and not is_expert and "weight" in own and own["weight"].ndim == 2:
                routers.add(below)
    return routers
