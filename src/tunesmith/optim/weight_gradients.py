"""Weight gradients of 16-bit linear layers, added up in fp32 by the matrix product that makes them.

Otherwise a product writes its gradient in 16 bits, and the optimizer's hook reads it and adds it to
the fp32 one: 8 bytes a parameter in the first micro batch of a step and 12 in each further one,
here 4 and 8, in the product's own epilogue. The gradient is never rounded to 16 bits. Megatron-LM
calls this gradient accumulation fusion.

It takes no memory at a step's peak, where all fp32 gradients are there either way; they stay
between the steps too.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.distributed.torch_private import SavingContext
from tunesmith.model.fused import add_mixin
from tunesmith.optim.adamw import HALF
from tunesmith.quant.linear_layers import BypassedLinear


def accumulate_in_fp32(model: nn.Module) -> int:
    """Let every trained 16-bit `nn.Linear` below `model` add up its weight's gradient in fp32;
    returns how many.

    In place, on meta or not; the layers' parameters keep their names, and autograd gives their
    weights no gradient.
    """
    count = 0
    for layer in model.modules():
        kind = type(layer)
        if issubclass(kind, BypassedLinear):
            kind = kind.__bases__[-1]  # the class that the mixin stands before
        # Linear layers of other classes compute something else.
        if kind is not nn.Linear or not isinstance(layer, nn.Linear):
            continue
        if layer.weight.requires_grad and layer.weight.dtype in HALF:
            summing = add_mixin(layer, Fp32GradientLinear)
            gradient = torch.empty_like(layer.weight, dtype=torch.float32)
            summing.register_buffer("gradient", gradient, persistent=False)
            # Whether `gradient` holds anything. Not a buffer, as that would move to the GPU.
            summing.filled = torch.zeros((), dtype=torch.bool, device="cpu")
            count += 1
    return count


def fp32_gradients(model: nn.Module) -> "Iterator[tuple[str, Fp32GradientLinear]]":
    """The layers that add up their own gradients, by the names of their weights."""
    for name, layer in model.named_modules():
        if isinstance(layer, Fp32GradientLinear):
            yield f"{name}.weight", layer


class Fp32GradientLinear(nn.Module):
    """A linear layer with the fp32 gradient of its weight.

    gradient: fp32 [out_features, in_features], of use where `filled` (bool [], on the CPU) says so.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    gradient: Tensor
    filled: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        # Generation and validation: no gradient, so the plain product.
        if not torch.is_grad_enabled():
            return super().forward(x)
        # The operator takes matrices: [n, in] -> [n, out].
        y = linear(x.flatten(0, -2), self.weight, self.bias, self.gradient, self.filled)
        return y.unflatten(0, x.shape[:-1])


@torch.library.custom_op("tunesmith::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor, filled: Tensor
) -> Tensor:
    """x W^T + b [n, out]; the backward adds the gradient of W to `gradient` and gives autograd
    none.
    """
    return F.linear(x, weight, bias)


@torch.library.custom_op("tunesmith::add_weight_gradient", mutates_args=("gradient", "filled"))
def add_weight_gradient(gradient: Tensor, filled: Tensor, dy: Tensor, x: Tensor) -> None:
    """gradient += dy^T x, or = where it is not filled yet: fp32 [out, in], 16-bit [n, out] and [n,
    in].
    """
    beta = int(filled)  # the flag is on the CPU: nothing waits
    if _multiplies_into_fp32(x.device):
        torch.addmm(gradient, dy.T, x, out_dtype=torch.float32, beta=beta, out=gradient)
    else:
        gradient.addmm_(dy.T.float(), x.float(), beta=beta)
    filled.fill_(True)


@cache
def _multiplies_into_fp32(device: torch.device) -> bool:
    """Check whether 16-bit matrices can be multiplied and added into an fp32 one: torch has this
    for CUDA, and not always.
    """
    total = torch.ones(16, 16, device=device)
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, beta=1, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


@linear.register_fake
def _(x, weight, bias, gradient, filled):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0])


@add_weight_gradient.register_fake
def _(gradient, filled, dy, x):  # type: ignore[no-untyped-def]
    return None


def _save(ctx: SavingContext, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, _, gradient, filled = inputs
    ctx.save_for_backward(x, weight, gradient, filled)


def _differentiate(ctx: SavingContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gradient, filled = ctx.saved_tensors
    add_weight_gradient(gradient, filled, dy, x)
    needs_dx, _, needs_db, *_ = ctx.needs_input_grad
    dx = dy @ weight if needs_dx else None
    # [out], in the dtype of dy: biases are accumulated by autograd, only the matrix is by us.
    db = dy.sum(0) if needs_db else None
    # None for the weight: its gradient is in `gradient` by now.
    return dx, None, db, None, None


linear.register_autograd(_differentiate, setup_context=_save)
