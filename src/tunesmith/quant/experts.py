"""Computation of a layer's experts, registered as an experts implementation in Transformers.

Each token is routed to k experts. Its k copies are sorted by expert, multiplied, weighted and
summed. Forward and backward only gather rows. They never add at indices, so the summation order is
the same on every device.

    sorted copies -> x W_up, activation, routing weights, times W_down -> sum over a token's k

Frozen experts are computed by this module (see `expert_matmul`). Fully trained experts are computed
by Transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tunesmith.model.layers.experts import Experts, find_experts
from tunesmith.quant.expert_matmul import expert_matmul
from tunesmith.quant.expert_rows import ExpertRows, sum_of_rows

EXPERTS_IMPLEMENTATION = "tunesmith"
# Transformers' own implementation, used for fully trained experts.
TRANSFORMERS_IMPLEMENTATION = "grouped_mm"


def use_grouped_experts(model: nn.Module) -> None:
    """Make a Transformers model compute its experts with `experts_forward`."""
    find_experts(model)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
    with_interface: Any = model  # only models of Transformers are passed
    with_interface.set_experts_implementation(EXPERTS_IMPLEMENTATION)


def experts_forward(
    module: Experts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the output of a layer's experts: [n, hidden].

    Args:
        hidden: [n, hidden].
        top_k_index: int64 [n, k], the experts of each token.
        top_k_weights: [n, k], the routing weights.
    """
    # Fully trained experts cannot be part of a compiled graph. Frozen experts can.
    if module.trains_in_full():
        return _train_in_full(module, hidden, top_k_index, top_k_weights)
    # If a dequantized stack would be large, it is dequantized in groups of experts.
    dtype = hidden.dtype
    stacks = map(module.stack, module.stack_names)
    in_groups = any(stack.experts_per_step(dtype) < stack.shape[0] for stack in stacks)
    rows = ExpertRows.of(top_k_index, module.num_experts, dtype, in_groups=in_groups)
    output = _apply_experts(module, hidden, _Weights.apply(top_k_weights, rows), rows)
    if module.has_bias:
        # Add the output biases of a token's experts, multiplied by their routing weights.
        _, second = module.stack_names
        bias = module.bias(second)
        all_weights = bias.new_zeros(len(top_k_index), len(bias))
        all_weights = all_weights.scatter(1, top_k_index, top_k_weights.to(bias.dtype))
        # Use a matmul, because embedding_bag in bf16 has no gradient for the weights on a GPU.
        output = output + all_weights @ bias
    return output.to(dtype)


@torch.compiler.disable
def _train_in_full(module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute fully trained experts with Transformers' code, outside of compiled graphs."""
    y: Tensor = ALL_EXPERTS_FUNCTIONS[TRANSFORMERS_IMPLEMENTATION](module, hidden, index, weights)
    return y


def _apply_experts(module: Experts, x: Tensor, weight: Tensor, rows: ExpertRows) -> Tensor:
    """Compute the weighted sum of the MLPs of each token's experts, without the output bias.

    The rows between the two stacks are multiplied by the routing weight, because they are narrower
    than the output rows. The backward recomputes the activation of these rows, so nothing is saved
    for the gradient of the wide output rows.

    Args:
        x: [n, hidden].
        weight: [rows, 1], the routing weight of each row.

    Returns:
        [n, hidden].
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
    if torch.compiler.is_compiling():  # the compiler saves the same tensors as the function below
        x = (activation(x) * weight).to(x.dtype)
    else:
        x = _WeightedActivation.apply(x, weight, activation)
    return _project(module, second, x, rows, sums=True)


def _project(
    module: Experts,
    name: str,
    x: Tensor,
    rows: ExpertRows,
    *,
    gathers: bool = False,
    sums: bool = False,
) -> Tensor:
    """Multiply x by one stack of experts and add the product of its adapter.

    See `expert_matmul` for `gathers` and `sums`.
    """
    lora_A = None
    lora_B = None
    update = module.update(name)
    if update is not None:
        lora_A, lora_B = update.factors(x.dtype)
    stack = module.stack(name)
    return expert_matmul(x, stack, rows.row_index, lora_A, lora_B, gathers=gathers, sums=sums)


class _Weights(torch.autograd.Function):
    """Autograd function that selects the routing weight of each row: [n, k] -> [rows, 1]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: ExpertRows) -> Tensor:
        ctx.save_for_backward(rows.row_index.places)
        return weights.flatten()[rows.copies].unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        return grads[0].squeeze(1)[places], None


class _Sum(torch.autograd.Function):
    """Autograd function that sums the rows of each token: [rows, width] -> [n, width]."""

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
    """Autograd function for weight * activation(x) in the dtype of x. It saves only x and the
    weights.

    It computes no gradients for parameters of the activation, because no supported activation has
    parameters.

    Args of `apply`: x: [rows, width]. weight: [rows, 1], possibly in a dtype of higher precision.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, activation: Callable[..., Tensor]) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x, weight)
        return (activation(x) * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        d_out = grads[0]
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.activation(x)
        (dx,) = torch.autograd.grad(y, x, (d_out * weight).to(y.dtype))
        d_weight = None
        if ctx.needs_input_grad[1]:  # False for Llama 4, whose weights are all 1
            dtype = torch.promote_types(y.dtype, weight.dtype)
            d_weight = torch.linalg.vecdot(d_out.to(dtype), y.detach().to(dtype))
            d_weight = d_weight.unsqueeze(1).to(weight.dtype)
        return dx, d_weight, None
