"""The experts of a layer, through the interface that Transformers calls them by.

Each token goes to k experts. Its k copies are sorted by expert, multiplied, weighted and added up
again, by gathers alone: neither pass adds at an index, so sums have one order on every device.

    sorted copies -> x W_up, activation, routing weights, times W_down -> sum over a token's k

Frozen experts are computed here (see `expert_matmul`); those that train in full as Transformers
does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tunesmith.model.experts import Experts, find_experts
from tunesmith.quant.expert_matmul import expert_matmul
from tunesmith.quant.expert_rows import ExpertRows, sum_of_rows

EXPERTS_IMPLEMENTATION = "tunesmith"
# Transformers' own, of experts that train in full.
IN_FULL = "grouped_mm"


def use_grouped_experts(model: nn.Module) -> None:
    """Let a model of Transformers compute its experts by `experts_forward`."""
    assert isinstance(model, PreTrainedModel)  # of others no module has the interface
    find_experts(model)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
    with_interface: Any = model
    with_interface.set_experts_implementation(EXPERTS_IMPLEMENTATION)


def experts_forward(
    module: Experts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The output of a layer's experts: [n, hidden].

    Args:
        hidden: [n, hidden].
        top_k_index: int64 [n, k], the experts of each token.
        top_k_weights: [n, k].
    """
    # The compiler, if it runs, takes frozen experts into the graph of their layer.
    if module.trains_in_full():
        return _train_in_full(module, hidden, top_k_index, top_k_weights)
    # A stack that is large when dense is dequantized for some experts at a time.
    stacks = map(module.stack, module.stack_names)
    in_groups = any(s.experts_at_once(hidden.dtype) < s.shape[0] for s in stacks)
    rows = ExpertRows.of(top_k_index, module.num_experts, hidden.dtype, in_groups=in_groups)
    output = _apply_experts(module, hidden, _Weights.apply(top_k_weights, rows), rows)
    if module.has_bias:
        output = output + _weighted_bias(module, top_k_index, top_k_weights)
    return output.to(hidden.dtype)


@torch.compiler.disable
def _train_in_full(module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`experts_forward` by Transformers, outside of a graph."""
    y: Tensor = ALL_EXPERTS_FUNCTIONS[IN_FULL](module, hidden, index, weights)
    return y


def _apply_experts(module: Experts, x: Tensor, weight: Tensor, rows: ExpertRows) -> Tensor:
    """The sum over a token's experts of their MLP without its last bias, by weight: [n, hidden].

    x: [n, hidden]. weight: of each row: [rows, 1]. It meets the narrow rows between the two stacks,
    whose gate is computed again in the backward: of the wide ones nothing is kept for its gradient.
    """
    first, second = module.stack_names
    x = _project(module, first, x, rows, gathers=True)
    if module.has_bias:
        x = x + module.bias(first)[rows.experts]
    activation = module.activation
    if module.has_post_expert_norm:
        x = _project(module, second, activation(x), rows)
        x = module.post_expert_norm(x)
        return _Sum.apply((x * weight).to(x.dtype), rows)
    if torch.compiler.is_compiling():  # which keeps no more by itself
        x = (activation(x) * weight).to(x.dtype)
    else:
        x = _WeightedActivation.apply(x, weight, activation)
    return _project(module, second, x, rows, sums=True)


def _weighted_bias(module: Experts, chosen: Tensor, weights: Tensor) -> Tensor:
    """The last biases of a token's experts, by their weights: [n, hidden].

    chosen: int64 [n, k].
    """
    _, second = module.stack_names
    bias = module.bias(second)
    # A product: in bf16 a GPU's embedding_bag has no gradient for the weights.
    weight_of_all = bias.new_zeros(len(chosen), len(bias))
    return weight_of_all.scatter(1, chosen, weights.to(bias.dtype)) @ bias


def _project(
    module: Experts,
    name: str,
    x: Tensor,
    rows: ExpertRows,
    *,
    gathers: bool = False,
    sums: bool = False,
) -> Tensor:
    """One stack's products, with the update of its adapter; the options are `expert_matmul`'s."""
    update = module.update(name)
    factors = update.factors(x.dtype) if update is not None else (None, None)
    stack = module.stack(name)
    return expert_matmul(x, stack, rows.row_index, *factors, gathers=gathers, sums=sums)


class _Weights(torch.autograd.Function):
    """The routing weight of each row: [n, k] -> [rows, 1]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: ExpertRows) -> Tensor:
        ctx.save_for_backward(rows.row_index.places)
        return weights.flatten()[rows.copies].unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        return grads[0].squeeze(1)[places], None


class _Sum(torch.autograd.Function):
    """The sum of a token's rows: [rows, width] -> [n, width]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: ExpertRows) -> Tensor:
        index = rows.row_index
        ctx.save_for_backward(index.tokens)
        return sum_of_rows(x, index.places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (tokens,) = ctx.saved_tensors
        return grads[0].index_select(0, tokens), None


class _WeightedActivation(torch.autograd.Function):
    """weight * activation(x), in the dtype of x; keeps x and the weights alone.

    An activation with parameters would get no gradients of them; none has any.

    x: [rows, width]; weight: [rows, 1], perhaps in a wider dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, activation: Callable[..., Tensor]) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x, weight)
        return (activation(x) * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.activation(x)
        (dx,) = torch.autograd.grad(y, x, (grads[0] * weight).to(y.dtype))
        d_weight = None
        if ctx.needs_input_grad[1]:  # not of Llama 4's, which are all 1
            dtype = torch.promote_types(y.dtype, weight.dtype)
            d_weight = torch.linalg.vecdot(grads[0].to(dtype), y.detach().to(dtype))
            d_weight = d_weight.unsqueeze(1).to(weight.dtype)
        return dx, d_weight, None
