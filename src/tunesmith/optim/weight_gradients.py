"""Linear layers with 16-bit weights whose gradients are accumulated in fp32 by the matmul itself.

Otherwise, a matmul writes the gradient in 16 bits, and the optimizer's hook adds it to the fp32
gradient. These two operations read and write 8 bytes per parameter in the first micro batch of a
step, and 12 bytes in each later micro batch. If the matmul adds to the fp32 gradient itself, 4 and
8 bytes are enough, and the gradient is never rounded to 16 bits. Megatron-LM calls this gradient
accumulation fusion.

The peak memory of a step is unchanged, because all fp32 gradients exist at the peak anyway. But the
gradients also take memory between steps.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.distributed.torch_private import SavingContext
from tunesmith.model.layers.fused import add_mixin
from tunesmith.optim.adamw import HALF
from tunesmith.quant.linear_layers import BypassedLinear


def accumulate_in_fp32(model: nn.Module) -> None:
    """Let every trained 16-bit `nn.Linear` in `model` accumulate its weight's gradient in fp32.

    The layers are changed in place and may be on the meta device. Their parameters keep their
    names, but autograd no longer computes gradients of the weights.
    """
    for layer in model.modules():
        kind = type(layer)
        if issubclass(kind, BypassedLinear):
            kind = kind.__bases__[-1]  # the class to which the mixin was added
        # Subclasses of nn.Linear may compute something else.
        if kind is not nn.Linear or not isinstance(layer, nn.Linear):
            continue
        if layer.weight.requires_grad and layer.weight.dtype in HALF:
            summing = add_mixin(layer, Fp32GradientLinear)
            gradient = torch.empty_like(layer.weight, dtype=torch.float32)
            summing.register_buffer("gradient", gradient, persistent=False)
            # Flag that `gradient` is valid. It is not a buffer, because a buffer would be moved to
            # the GPU.
            summing.filled = torch.zeros((), dtype=torch.bool, device="cpu")


def fp32_gradients(model: nn.Module) -> "Iterator[tuple[str, Fp32GradientLinear]]":
    """Yield (full name of the weight, layer) for each layer that accumulates its own gradient."""
    for name, layer in model.named_modules():
        if isinstance(layer, Fp32GradientLinear):
            yield f"{name}.weight", layer


class Fp32GradientLinear(nn.Module):
    """Linear layer that accumulates the gradient of its weight in fp32.

    Attributes:
        gradient: fp32 [out_features, in_features]. It is only valid if `filled` is True.
        filled: bool [], on the CPU.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    gradient: Tensor
    filled: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output.

        Args:
            x: [..., in_features].

        Returns:
            [..., out_features].
        """
        # In generation and validation there is no gradient, so the normal layer is used.
        if not torch.is_grad_enabled():
            return super().forward(x)
        # The operator takes matrices: [n, in] -> [n, out].
        y = linear(x.flatten(0, -2), self.weight, self.bias, self.gradient, self.filled)
        return y.unflatten(0, x.shape[:-1])


@torch.library.custom_op("tunesmith::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor, filled: Tensor
) -> Tensor:
    """Compute x W^T + b, [n, out].

    The backward adds the gradient of W to `gradient` and returns no gradient of W to autograd.
    """
    return F.linear(x, weight, bias)


@torch.library.custom_op("tunesmith::add_weight_gradient", mutates_args=("gradient", "filled"))
def add_weight_gradient(gradient: Tensor, filled: Tensor, dy: Tensor, x: Tensor) -> None:
    """Compute gradient += dy^T x, or gradient = dy^T x if it is not filled yet.

    Args:
        gradient: fp32 [out, in].
        dy: 16-bit [n, out].
        x: 16-bit [n, in].
    """
    beta = int(filled)  # the flag is on the CPU, so this does not wait for the device
    if _multiplies_into_fp32(x.device):
        torch.addmm(gradient, dy.T, x, out_dtype=torch.float32, beta=beta, out=gradient)
    else:
        gradient.addmm_(dy.T.float(), x.float(), beta=beta)
    filled.fill_(True)


@cache
def _multiplies_into_fp32(device: torch.device) -> bool:
    """Return whether torch can add the product of two 16-bit matrices to an fp32 matrix.

    Some versions of torch support this on CUDA.
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
    # Gradient of the bias, shape [out], in the dtype of dy. Autograd accumulates it.
    db = dy.sum(0) if needs_db else None
    # Return None for the weight, because its gradient is already added to `gradient`.
    return dx, None, db, None, None


linear.register_autograd(_differentiate, setup_context=_save)
