"""The optimizer. It updates the parameters once per step, and stores its state by parameter name.

It updates either fp32 tensors, or bf16 tensors with stochastic rounding:

- A trained fp32 parameter, for example a LoRA matrix, is updated in place.
- A trained 16-bit parameter has an fp32 master copy. A hook adds each gradient to the master's fp32
  gradient as soon as autograd has computed it. Micro batches therefore accumulate in fp32, and the
  16-bit gradient is freed at once.
- With `master_weights: stochastic` there is no fp32 copy. The updated weight is rounded up or down
  at random. The closer value is more likely, so that small updates have the right effect on average
  (Zamirai et al. 2020, arXiv:2010.06192).

`optimizer_in_backward` updates each parameter as soon as its gradient is complete, so the gradients
of all parameters are never in memory at the same time (Lv et al. 2023, arXiv:2306.09782).
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tunesmith.config.schema import Train
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import CheckpointError
from tunesmith.formats.stored import StoredTensor
from tunesmith.optim.adamw import HALF, AdamWUpdate, ParameterState
from tunesmith.optim.weight_gradients import Fp32GradientLinear

# Process groups over which a parameter is sharded.
Groups = tuple[dist.ProcessGroup, ...]


class Optimizer:
    """AdamW for named parameters, with gradient clipping, fp32 masters and a loss scale for fp16.

    For each step, call `start_step(lr, step)`, run all forward and backward passes, and then call
    `step()`.

    With `train.optimizer_in_backward`, a step has only one backward, gradients are not clipped,
    there is no loss scale, and `step()` only computes the norm. A parameter is not updated if its
    gradient is not finite, but other parameters may already be updated. The weights are then finite
    but only partially updated, so resume from the last checkpoint.

    Args:
        named: pairs of name and parameter for all trained parameters, without duplicates. The names
            are the keys of the saved state.
        train: optimizer, betas, eps, decay, clip_norm, master_weights, compile and seed of the
            recipe.
        loss_scale: initial factor of the loss for fp16, or None. As in torch's GradScaler, it is
            halved when a gradient overflows and doubled after 2,000 steps without an overflow,
            which `growth_tracker` counts.

    Raises:
        MachineError: adamw-8bit is used and bitsandbytes is missing or does not support the device.
    """

    GROWTH_INTERVAL = 2000

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        train: Train,
        *,
        loss_scale: float | None = None,
    ) -> None:
        self.train = train
        self.scale = loss_scale
        self.growth_tracker = 0
        self.params = dict(named)
        self.parts = {name: ParameterState.of(name, p, train) for name, p in self.params.items()}
        device = next((p.device for p in self.params.values()), torch.device("cpu"))
        self.update = AdamWUpdate(train, device)
        parts = self.parts.values()
        is_cuda = device.type == "cuda"
        if is_cuda and train.compile != "off":
            self.update.compile(parts)
        # On CUDA the kernels read `found_inf` on the device, so the host does not wait for the
        # norm. With a loss scale the host must check the norm, because it updates the scale. On a
        # CPU the norm is available at once.
        checks_on_device = is_cuda and self.update.takes_found_inf
        self.checks_on_host = loss_scale is not None or not checks_on_device
        self.lr = 0.0
        self.index = 0
        # Process groups of all parameters without duplicates, in the same order on every rank.
        self.groups = list(dict.fromkeys(part.sharding_groups for part in parts))
        # Gradient norms of the parameters that were updated in the backward.
        self.norms: dict[Groups, list[Tensor]] = {}
        for part in parts:
            # Only these parameters need a hook. Other gradients remain in `param.grad` until
            # `step`.
            if train.optimizer_in_backward or part.has_master:
                part.param.register_post_accumulate_grad_hook(partial(self._take_grad, part))

    def use_fp32_gradients(self, layers: Iterable[tuple[str, Fp32GradientLinear]]) -> None:
        """Update the weights of these layers with the gradients that the layers accumulate
        themselves.
        """
        for name, layer in layers:
            part = self.parts[name]
            part.weight.grad = layer.gradient
            part.filled = layer.filled
            part.drop_grad()  # discard the gradients of a trial step before the run

    def _take_grad(self, part: ParameterState, param: Tensor) -> None:
        """Move the gradient of `param` to `part.weight`. With `optimizer_in_backward`, update the
        weight too.

        This is a hook that autograd calls.
        """
        if part.filled is not None:  # autograd calls the hook even if there is no gradient
            return
        # If `part.weight` is not the parameter itself, add `param.grad` to `part.weight.grad` and
        # free `param.grad` during the backward.
        if part.weight is not part.param:
            assert param.grad is not None
            grad = local_part(param.grad)
            if part.weight.grad is None:
                part.weight.grad = grad.to(part.weight.dtype)
            else:
                part.weight.grad.add_(grad)
            param.grad = None
        if self.train.optimizer_in_backward:
            # The norm is written to the metrics. If it is not finite, the update is skipped.
            # Gradients are not clipped (see the docstring of the class).
            norm = total_norm([part.grad])
            self.norms.setdefault(part.sharding_groups, []).append(norm)
            self._clip_and_update([part], norm)

    @property
    def masters(self) -> dict[str, Tensor]:
        """The fp32 master copies of 16-bit parameters. The keys are the names of the parameters.

        If a parameter is sharded, its copy is a DTensor.
        """
        return {
            name: part.whole(part.weight.data)
            for name, part in self.parts.items()
            if part.has_master
        }

    def gradients(self) -> dict[str, Tensor]:
        """Return this rank's shard of each gradient. The keys are the names of the parameters."""
        for part in self.parts.values():
            # The gradients of DTensors are moved here instead of in a hook. FSDP accumulates them
            # itself and may still be copying them to the host during the backward.
            if part.weight is not part.param and part.param.grad is not None:
                self._take_grad(part, part.param)
        return {name: part.grad for name, part in self.parts.items() if part.has_grad}

    def drop_gradients(self) -> None:
        """Free the gradients of a skipped step."""
        for part in self.parts.values():
            part.drop_grad()
            part.param.grad = None

    def start_step(self, lr: float, index: int) -> None:
        """Set the learning rate and the index (from 0) of the next step.

        Call this before its backward.
        """
        self.lr = lr
        self.index = index
        self.norms.clear()

    def step(self) -> Tensor:
        """Clip, update and free the gradients. Return their L2 norm before clipping (fp32 [], on
        the device).

        A step whose norm is not finite changes no weight, unless the updates happen in the backward
        (see the class). On CUDA the host does not wait for the device, except with a loss scale.
        """
        if self.train.optimizer_in_backward:
            return self._global_norm(self.norms)
        # Call `gradients` first: it also moves the gradients that FSDP left in the parameters.
        parts = [self.parts[name] for name in self.gradients()]
        if self.scale is not None:
            # Remove the loss scale before the norm is computed, because clipping and metrics need
            # the norm of the unscaled gradients.
            for part in parts:
                part.grad.div_(self.scale)
        # Compute one norm for each combination of process groups, because a norm is reduced over
        # the ranks that hold shards of its parameters. Norms of unsharded parameters are not
        # reduced.
        norms = {}
        for groups in self.groups:
            grads = [part.grad for part in parts if part.sharding_groups == groups]
            if grads:
                norms[groups] = [total_norm(grads)]
        return self._clip_and_update(parts, self._global_norm(norms))

    @torch.no_grad()
    def _global_norm(self, norms: Mapping[Groups, list[Tensor]]) -> Tensor:
        """Return the norm over all parameters as fp32 [] on the device, from the norms on this
        rank.

        This is a collective call if some parameters are sharded.
        """
        if not any(self.groups):
            return total_norm(norms.get((), []))
        squares = []
        for groups in self.groups:  # the same groups in the same order on every rank
            # A rank that has no gradients for these process groups contributes 0 to the reduction.
            square = torch.zeros((), device=self.update.device)
            if norms.get(groups):
                square = torch.stack(norms[groups]).square().sum()
            # Sum over each mesh dimension. The result is the squared norm of the entire gradients.
            for group in groups:
                dist.all_reduce(square, group=group)
            squares.append(square)
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def _clip_and_update(self, parts: list[ParameterState], norm: Tensor) -> Tensor:
        """Clip, update and free the gradients. Change no weight if the norm is not finite."""
        finite = norm.isfinite()
        found_inf = None
        divisor = norm
        limit = self.train.clip_norm
        if not self.checks_on_host:
            found_inf = (~finite).float()
            if any(part.eight_bit for part in parts):
                # If the norm is not finite, norm - norm is NaN, so that every gradient becomes NaN.
                # Otherwise norm - norm is 0. Without a clipping limit, finite gradients are
                # multiplied by 1.
                divisor = norm + (norm - norm)
                if limit is None:
                    limit = float("inf")
        # With `found_inf` the kernels skip the update. Otherwise the host decides whether to skip
        # it, and must wait for the norm.
        if not self.checks_on_host or finite.item():
            if limit is not None:
                clip_grads_with_norm_([part.weight for part in parts], limit, divisor)
            self.update(parts, self.lr, self.index, found_inf)
        if self.scale is not None:
            if finite.item():
                self.growth_tracker += 1
                # A resumed run continues the saved counter, and only an overflow resets it.
                # Therefore the scale doubles whenever the counter reaches a multiple of 2,000.
                if self.growth_tracker % self.GROWTH_INTERVAL == 0:
                    self.scale *= 2.0
            else:
                self.scale /= 2.0
                self.growth_tracker = 0
        for part in parts:
            part.drop_grad()
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors that a resumed run needs. The keys are `<parameter>.<field>` (see
        `initial_state`).

        The tensors are not copied. A tensor that is sharded like its parameter is a DTensor. The
        state has no masters of sharded fp32 weights, because these weights need none.
        """
        tensors = {}
        for name, part in self.parts.items():
            for key, value in part.state.items():
                tensors[f"{name}.{key}"] = part.whole(value)
        return tensors | {f"{name}.master": master for name, master in self.masters.items()}

    def load_state_dict(
        self,
        tensors: Mapping[str, Tensor | StoredTensor],
        *,
        scale: float | None,
        growth_tracker: int,
        where: str,
    ) -> None:
        """Copy this rank's shards of a saved state into the optimizer.

        Args:
            tensors: the saved state.
            where: name of the saved state in error messages.

        Raise CheckpointError if the state does not fit the trained parameters.
        """

        def part_of(name: str, like: Tensor) -> Tensor:
            saved = tensors.get(name)
            if saved is None or saved.shape != like.shape or saved.dtype != like.dtype:
                described = f"{name} with shape {tuple(like.shape)} and {like.dtype}"
                raise CheckpointError(
                    f"the saved optimizer state has no tensor {described}",
                    where=where,
                    why="the state is from a run that trained other weights or used another "
                    "train.optimizer",
                    fix="continue with the same adapter, model and optimizer, or start over with "
                    "--fresh",
                )
            # If the tensor is in a file, only these slices are read.
            return saved[local_slices(like)]

        for name, part in self.parts.items():
            # Sharded fp32 weights have no separate masters, but the saved state can contain masters
            # if a run of one process has written it.
            is_sharded = isinstance(part.param, DTensor)
            if part.has_master or (is_sharded and f"{name}.master" in tensors):
                part.weight.data.copy_(part_of(f"{name}.master", part.whole(part.weight.data)))
            if f"{name}.step" in tensors:  # no state if the parameter never had a gradient
                # Create the state first: its shapes and dtypes determine which slices of the file
                # belong to this rank.
                part.state = part.initial_state()
                for field, value in part.state.items():
                    value.copy_(part_of(f"{name}.{field}", part.whole(value)))
        self.scale = scale
        self.growth_tracker = growth_tracker


def total_norm(grads: list[Tensor]) -> Tensor:
    """Return the L2 norm over all gradients, a scalar tensor in fp32 or wider."""
    if len(grads) == 1:
        return _norm(grads[0])
    if any(grad.dtype in HALF for grad in grads):
        # torch's function would round the norm of each tensor to 16 bits.
        return _norm(torch.stack([_norm(grad) for grad in grads]))
    return get_total_norm(grads)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
