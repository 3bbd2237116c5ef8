"""The experts of a layer, through the interface that Transformers calls them by.

Each token goes to k experts. Its k copies are sorted by expert, multiplied, weighted and added up
again, by gathers alone: neither pass adds at an index, so sums have one order on every device.

    sorted copies -> x W_up, activation, times W_down -> routing weights -> sum over a token's k

Frozen experts are computed here (see `expert_matmul`); those that train in full as Transformers
does. Where ranks divide them (see `expert_ranks`), each computes its own for the tokens of all, and
what goes to other experts counts as 0.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.quant.expert_matmul import ExpertRows, expert_matmul
from tunesmith.quant.expert_ranks import ExpertRanks
from tunesmith.quant.expert_stack import ExpertStack
from tunesmith.quant.frozen_stack import DenseStack, FrozenStack

NAME = "tunesmith"
# Transformers' own, of experts that train in full.
IN_FULL = "grouped_mm"
# The child module with the update of a stack has the stack's name and this.
UPDATE = "_lora"
# The attribute of a module whose experts ranks divide: an `ExpertRanks`.
RANKS = "expert_ranks"
# What Transformers sets on the modules that it calls by the interface.
_FACTS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")


def has_interface(module: nn.Module) -> bool:
    """Whether a module is all experts of a layer, and Transformers calls it by its interface."""
    if not all(hasattr(module, fact) for fact in _FACTS):
        return False
    return all(getattr(module, name, None) is not None for name in stack_names(module))


def stack_names(module: nn.Module) -> tuple[str, str]:
    """Names of the two stacks of a module's experts: of the input, and of the output."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return first, "down_proj"


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts of each layer that has some, by full name."""
    modules = {}
    for name, module in model.named_modules():
        if has_interface(module):
            modules[name] = module
    return modules


def stacks_in_order(module: nn.Module) -> list[str]:
    """`stack_names` in the order in which a module has them."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    names += [name for name, _ in module.named_children()]  # those in codes
    return sorted(stack_names(module), key=names.index)


def replace_stacks(
    model: nn.Module, empty: Callable[[str, nn.Module, Tensor], ExpertStack | None]
) -> list[str]:
    """Replace parameters of a model on meta by stacks in codes.

    empty: makes one of the experts' full name, their module and the parameter; None: it stays.

    Returns their full names.
    """
    names = []
    for name, module in expert_modules(model).items():
        for key in stacks_in_order(module):
            stack = empty(name, module, getattr(module, key))
            if stack is None:
                continue
            delattr(module, key)
            module.add_module(key, stack)
            names.append(f"{name}.{key}")
    if names:
        use_grouped_experts(model)  # with an adapter on them or without: Transformers wants tensors
    return names


def trains_in_full(module: nn.Module) -> bool:
    """Whether a stack of a module of experts gets gradients."""
    stacks = [getattr(module, name) for name in stack_names(module)]
    return any(isinstance(stack, nn.Parameter) and stack.requires_grad for stack in stacks)


def use_grouped_experts(model: nn.Module) -> None:
    """Let a model of Transformers compute its experts by `experts_forward`."""
    assert isinstance(model, PreTrainedModel)  # of others no module has the interface
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    with_interface: Any = model
    with_interface.set_experts_implementation(NAME)


def stack_of(module: nn.Module, name: str) -> FrozenStack:
    """This rank's part of a module's stack of this name, as the products take it."""
    weight = getattr(module, name)
    if isinstance(weight, ExpertStack):
        return weight.frozen_stack()
    weight = local_part(weight)
    return DenseStack.of(weight, is_transposed=bool(module.is_transposed))


@torch.compiler.disable
def experts_forward(
    module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The output of a layer's experts: [n, hidden].

    Args:
        module: of Transformers, with the facts that its interface sets.
        hidden: [n, hidden].
        top_k_index: int64 [n, k], the experts of each token.
        top_k_weights: [n, k].
    """
    if trains_in_full(module):
        y: Tensor = ALL_EXPERTS_FUNCTIONS[IN_FULL](module, hidden, top_k_index, top_k_weights)
        return y
    ranks: ExpertRanks | None = getattr(module, RANKS, None)
    if ranks is None:
        return _compute(module, hidden, top_k_index, top_k_weights, range(module.num_experts))
    gathered = ranks.gather(hidden, top_k_index, top_k_weights, module.num_experts)
    output = _compute(module, *gathered, ranks.local_experts(module.num_experts))
    return ranks.scatter(output, len(hidden))


def _compute(
    module: Any, hidden: Tensor, index: Tensor, weights: Tensor, local_experts: range
) -> Tensor:
    """As `experts_forward`; what goes to others than `local_experts` counts as 0."""
    per_token = index.shape[-1]
    is_part = len(local_experts) < module.num_experts
    numbers = index.flatten()
    if is_part:
        numbers = _local_numbers(numbers, local_experts)
    # By expert, so that the products of one are of rows that follow each other.
    experts, order = torch.sort(numbers, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    rows = _expert_rows(module, experts, len(local_experts), hidden.dtype)
    if is_part:
        experts, order, places = _leave_out_others(experts, order, places, rows)

    x = _Scatter.apply(hidden, order, places, per_token, is_part)
    x = _apply_experts(module, x, rows, experts)
    # The products have left rows of other experts as they were: their weights get no gradient.
    if is_part and rows.spans is None:
        position = torch.arange(len(x), device=x.device)
        is_other = position >= rows.offsets[-1]
        x = x.masked_fill(is_other.unsqueeze(1), 0)
    output: Tensor = _WeightedSum.apply(x, weights, order, places, is_part)
    return output.to(hidden.dtype)


def _local_numbers(numbers: Tensor, local_experts: range) -> Tensor:
    """This rank's experts from 0 on; all others have the number behind them."""
    is_local = (numbers >= local_experts.start) & (numbers < local_experts.stop)
    return torch.where(is_local, numbers - local_experts.start, len(local_experts))


def _expert_rows(module: Any, experts: Tensor, count: int, dtype: torch.dtype) -> ExpertRows:
    """Where the rows of each of `count` experts lie; in groups, where a stack is dequantized so."""
    in_groups = False
    for name in stack_names(module):
        stack = stack_of(module, name)
        if stack.experts_at_once(dtype) < stack.shape[0]:
            in_groups = True
    return ExpertRows.of(experts, count, dtype, in_groups=in_groups)


def _apply_experts(module: Any, x: Tensor, rows: ExpertRows, experts: Tensor) -> Tensor:
    """The MLP of each row's expert: [n, hidden]."""
    first, second = stack_names(module)
    x = _project(module, first, x, rows, experts)
    if module.has_gate:
        x = module._apply_gate(x)
    else:
        x = module.act_fn(x)
    x = _project(module, second, x, rows, experts)
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    return x


def _leave_out_others(
    experts: Tensor, order: Tensor, places: Tensor, rows: ExpertRows
) -> tuple[Tensor, Tensor, Tensor]:
    """`experts`, `order` and `places` without the copies for experts of other ranks.

    These have the place behind the last row. Only where the host knows how many there are, their
    rows are left out; elsewhere they belong to the last expert, whose products do not reach them.
    """
    count: Tensor | int = rows.offsets[-1]
    if rows.spans is not None:
        count = rows.spans[-1][2] if rows.spans else 0
        experts = experts[:count]
        order = order[:count]
    places = torch.where(places < count, places, len(order))
    return experts.clamp_max(len(rows.offsets) - 1), order, places


def _project(module: Any, name: str, x: Tensor, rows: ExpertRows, experts: Tensor) -> Tensor:
    """One stack's products, with the update of its adapter and its bias."""
    update = getattr(module, name + UPDATE, None)
    factors = update.factors(x.dtype) if update is not None else (None, None)
    y = expert_matmul(x, stack_of(module, name), rows, *factors)
    if module.has_bias:
        y = y + local_part(getattr(module, f"{name}_bias"))[experts]
    return y


class _Scatter(torch.autograd.Function):
    """A row for each of the k experts of a token, sorted by expert: [n, width] -> [n * k, width].

    order: int64 [n * k], which copy stands in each row; places: the row of each copy. Where
    `is_part`, `order` may be shorter, and copies without a row have the place behind the last one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order: Tensor, places: Tensor, per_token: int, is_part: bool
    ) -> Tensor:
        ctx.per_token, ctx.is_part = per_token, is_part
        ctx.save_for_backward(places)
        return x.index_select(0, order // per_token)  # twice as fast as x[...] on a CPU

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        dx = _sum_of_rows(grads[0], places.view(-1, ctx.per_token), is_part=ctx.is_part)
        return dx, None, None, None, None


class _WeightedSum(torch.autograd.Function):
    """The weighted sum of a token's k rows: [n * k, width] -> [n, width], in the dtype of x.

    weights: [n, k], perhaps in a wider dtype than x, in which the sum is computed then. order,
    places, is_part: as of `_Scatter`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, order: Tensor, places: Tensor, is_part: bool
    ) -> Tensor:
        ctx.is_part = is_part
        # The rows are for the gradient of the weights alone, which Llama 4's, all 1, do not need.
        saved_x = x if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(saved_x, weights, order, places)
        dtype = torch.promote_types(x.dtype, weights.dtype)
        total = _sum_of_rows(
            x.to(dtype), places.view_as(weights), weights.to(dtype), is_part=is_part
        )
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weights, order, places = ctx.saved_tensors
        grad_rows = grads[0].index_select(0, order // weights.shape[1])  # [rows, width]
        d_weights = None
        if x is not None:
            # A row and its gradient multiplied: [rows], then back in the order of the copies.
            dtype = torch.promote_types(x.dtype, weights.dtype)
            d_sorted = torch.linalg.vecdot(grad_rows.to(dtype), x.to(dtype))
            if ctx.is_part:
                d_sorted = F.pad(d_sorted, (0, 1))
            d_weights = d_sorted[places].view_as(weights).to(weights.dtype)
        dx = grad_rows.mul_(weights.flatten()[order].unsqueeze(1))
        return dx, d_weights, None, None, None


def _sum_of_rows(
    x: Tensor, places: Tensor, weights: Tensor | None = None, *, is_part: bool
) -> Tensor:
    """For each token the sum of its k rows of x, which lie at `places` [n, k]: [n, width].

    weights: of the rows: [n, k], in the dtype of x. is_part: a place may be behind the last row,
    for a row of 0, which takes a copy of x.
    """
    if is_part:
        x = F.pad(x, (0, 0, 0, 1))
    # One kernel, which reads each row once and adds up a token's in their order.
    return F.embedding_bag(places, x, mode="sum", per_sample_weights=weights)
