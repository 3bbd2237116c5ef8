"""The optimizer: gradients in, one update a step out, and its state by parameter name.

It always updates an fp32 tensor, or a bf16 one with stochastic rounding:

- a trained fp32 parameter (every LoRA matrix is one) is updated in place;
- a trained 16-bit parameter has an fp32 master copy. A hook moves each gradient into the master's
  fp32 gradient as soon as autograd has computed it, so micro batches accumulate in fp32 and the
  16-bit gradient is freed at once;
- with `master_weights: stochastic` there is no copy: the update is rounded up or down at random,
  with probability by the distance, so that small updates survive on average (Zamirai et al. 2020,
  arXiv:2010.06192).

`optimizer_in_backward` updates each parameter as soon as its gradient is complete, so the gradients
of the whole model never exist together (Lv et al. 2023, arXiv:2306.09782).
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
from tunesmith.model.weights import StoredTensor
from tunesmith.optim.adamw import HALF, AdamWUpdate, ParameterState
from tunesmith.optim.weight_gradients import Fp32GradientLinear

# Over which a parameter is sharded.
Groups = tuple[dist.ProcessGroup, ...]


class Optimizer:
    """AdamW over named parameters, with clipping, fp32 masters and a loss scale for fp16.

    A step is `start_step(lr, step)`, then every forward and backward, then `step()`.

    With `train.optimizer_in_backward` there must be one backward a step, no clipping and no loss
    scale, and `step()` only takes the norm. A parameter whose gradient is not finite is not
    updated, but others may have been: the weights are finite then but only partially updated, so
    resume from the last checkpoint.

    Args:
        named: name and parameter of everything that is trained, each once; the names key the saved
            state.
        train: optimizer, betas, eps, decay, clip_norm, master_weights, compile and seed of the
            recipe.
        loss_scale: first factor on the loss (fp16), or None. As in torch's GradScaler it halves
            when a gradient overflows and doubles after 2,000 steps without an overflow;
            `growth_tracker` counts these.

    Raises:
        MachineError: adamw-8bit without the package bitsandbytes, or on a device that it has no
            code for.
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
        self.parts: dict[str, ParameterState] = {}
        for name, param in self.params.items():
            self.parts[name] = ParameterState.of(name, param, train)
        device = torch.device("cpu")
        if self.params:
            device = next(iter(self.params.values())).device
        self.update = AdamWUpdate(train, device)
        if device.type == "cuda" and train.compile != "off":
            self.update.compile(self.parts.values())
        # On CUDA the kernels read `found_inf`, and the host waits for nothing; but the loss scale
        # lives on the host. On a CPU the norm is there at once.
        checks_on_device = device.type == "cuda" and self.update.takes_found_inf
        self.checks_on_host = loss_scale is not None or not checks_on_device
        self.lr = 0.0
        self.index = 0
        # Without duplicates and in the order of the parameters, which is the same on every rank.
        self.groups = list(dict.fromkeys(part.sharding_groups for part in self.parts.values()))
        # Of the updates in the backward.
        self.norms: dict[Groups, list[Tensor]] = {}
        for part in self.parts.values():
            # Only these: any other gradient stays in `param.grad` until `step`.
            if train.optimizer_in_backward or part.has_master:
                part.param.register_post_accumulate_grad_hook(partial(self._take_grad, part))

    def use_fp32_gradients(self, layers: Iterable[tuple[str, Fp32GradientLinear]]) -> None:
        """Update the weights of these layers by the gradients that the layers add up themselves."""
        for name, layer in layers:
            part = self.parts[name]
            part.weight.grad = layer.gradient
            part.filled = layer.filled
            part.drop_grad()  # of a trial before the first step

    def _take_grad(self, part: ParameterState, param: Tensor) -> None:
        """A hook: add a 16-bit gradient to its fp32 master's; update in the backward."""
        if part.filled is not None:  # autograd calls the hook, and has computed no gradient
            return
        # A master of its own: the 16-bit gradient moves to it and is freed within the backward.
        if part.weight is not part.param:
            assert param.grad is not None
            grad = local_part(param.grad)
            if part.weight.grad is None:
                part.weight.grad = grad.to(part.weight.dtype)
            else:
                part.weight.grad.add_(grad)
            param.grad = None
        if self.train.optimizer_in_backward:
            # For the record, and to skip what is not finite; nothing is clipped (see the class).
            norm = total_norm([part.grad])
            self.norms.setdefault(part.sharding_groups, []).append(norm)
            self._clip_and_update([part], norm)

    @property
    def masters(self) -> dict[str, Tensor]:
        """The fp32 copies of 16-bit parameters, by name; of one that ranks share a DTensor."""
        masters = {}
        for name, part in self.parts.items():
            if part.has_master:
                masters[name] = part.whole(part.weight.data)
        return masters

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of each gradient, by the parameter's name."""
        for part in self.parts.values():
            # A DTensor's: FSDP adds up those of its shards, and may still copy them to the host
            # within the backward.
            if part.weight is not part.param and part.param.grad is not None:
                self._take_grad(part, part.param)
        return {name: part.grad for name, part in self.parts.items() if part.has_grad}

    def drop_gradients(self) -> None:
        """Free the gradients of a step that is skipped."""
        for part in self.parts.values():
            part.drop_grad()
            part.param.grad = None

    def start_step(self, lr: float, index: int) -> None:
        """Set the learning rate and the index (from 0) of the coming step; before its backward."""
        self.lr = lr
        self.index = index
        self.norms.clear()

    def step(self) -> Tensor:
        """Clip, update and drop the gradients; return their L2 norm before clipping (0-d fp32, on
        the device).

        A step whose norm is not finite changes no weight, unless the updates happen in the
        backward (see above). On CUDA the host does not wait for the device, except with a loss
        scale.
        """
        if self.train.optimizer_in_backward:
            return self._global_norm(self.norms)
        # `gradients` first: it also moves what FSDP left in the parameters.
        parts = [self.parts[name] for name in self.gradients()]
        if self.scale is not None:
            # Before the norm, which is that of the gradients of the loss itself.
            for part in parts:
                part.grad.div_(self.scale)
        # Norms by who shares a parameter: each is reduced over these ranks, and whole ones are not.
        norms: dict[Groups, list[Tensor]] = {}
        for groups in self.groups:
            grads = [part.grad for part in parts if part.sharding_groups == groups]
            if grads:
                norms[groups] = [total_norm(grads)]
        return self._clip_and_update(parts, self._global_norm(norms))

    @torch.no_grad()
    def _global_norm(self, norms: Mapping[Groups, list[Tensor]]) -> Tensor:
        """The norm over all parameters, 0-d on the device, from those of this rank's parts.

        It is a collective call where some parameters are sharded.
        """
        if not any(self.groups):
            return total_norm(norms.get((), []))
        squares = []
        for groups in self.groups:  # on every rank the same ones in the same order
            # A rank without gradients of a group joins its reduction with 0.
            square = torch.zeros((), device=self.update.device)
            if norms.get(groups):
                square = torch.stack(norms[groups]).square().sum()
            # Over each mesh dimension in turn: after them the square is that of the whole
            # parameters.
            for group in groups:
                dist.all_reduce(square, group=group)
            squares.append(square)
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def _clip_and_update(self, parts: list[ParameterState], norm: Tensor) -> Tensor:
        """Clip, update and drop the gradients; leave all weights where the norm is not finite."""
        finite = norm.isfinite()
        found_inf = None
        divisor = norm
        limit = self.train.clip_norm
        if not self.checks_on_host:
            found_inf = (~finite).float()
            if any(part.eight_bit for part in parts):
                # Make every gradient NaN where the norm is not finite: norm - norm is then NaN,
                # else 0. Without a limit the factor on finite gradients is 1.
                divisor = norm + (norm - norm)
                if limit is None:
                    limit = float("inf")
        # `found_inf` makes the kernels skip; without it the host decides, which waits for the
        # device.
        if not self.checks_on_host or finite.item():
            if limit is not None:
                clip_grads_with_norm_([part.weight for part in parts], limit, divisor)
            self.update(parts, self.lr, self.index, found_inf)
        if self.scale is not None:
            if finite.item():
                self.growth_tracker += 1
                # The counter is saved and never reset by growth: every 2,000th step doubles.
                if self.growth_tracker % self.GROWTH_INTERVAL == 0:
                    self.scale *= 2.0
            else:
                self.scale /= 2.0
                self.growth_tracker = 0
        for part in parts:
            part.drop_grad()
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by `<parameter>.<field>` (see `initial_state`);
        nothing is copied.

        What is sharded as its parameter is, is a DTensor like that; sharded weights are their own
        masters.
        """
        tensors = {}
        for name, part in self.parts.items():
            for key, value in part.state.items():
                tensors[f"{name}.{key}"] = part.whole(value)
        for name, master in self.masters.items():
            tensors[f"{name}.master"] = master
        return tensors

    def load_state_dict(
        self,
        tensors: Mapping[str, Tensor | StoredTensor],
        *,
        scale: float | None,
        growth_tracker: int,
        where: str,
    ) -> None:
        """Copy in this rank's parts of a saved state, which errors call `where`.

        CheckpointError where it is another run's.
        """

        def part_of(name: str, like: Tensor) -> Tensor:
            saved = tensors.get(name)
            if saved is None or saved.shape != like.shape or saved.dtype != like.dtype:
                described = f"{name} of shape {tuple(like.shape)} and {like.dtype}"
                raise CheckpointError(
                    f"the optimizer's state has no {described}",
                    where=where,
                    why="it was written by a run with other trained weights, or another "
                    "train.optimizer",
                    fix="continue with the same adapter, model and optimizer, or start over with "
                    "--fresh",
                )
            # Of a stored tensor only these slices are read from the file.
            return saved[local_slices(like)]

        for name, part in self.parts.items():
            # Sharded weights are their own masters; a run of one process may have saved some.
            is_sharded = isinstance(part.param, DTensor)
            if part.has_master or (is_sharded and f"{name}.master" in tensors):
                master = part_of(f"{name}.master", part.whole(part.weight.data))
                part.weight.data.copy_(master)
            if f"{name}.step" in tensors:  # a parameter that has had no gradient yet has no state
                # Of the right shapes and dtypes first: they decide which slices of the file are
                # this rank's.
                part.state = part.initial_state()
                for field, value in part.state.items():
                    value.copy_(part_of(f"{name}.{field}", part.whole(value)))
        self.scale = scale
        self.growth_tracker = growth_tracker


def total_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all gradients, 0-d in fp32 or wider."""
    if len(grads) == 1:
        return _norm(grads[0])
    if any(grad.dtype in HALF for grad in grads):
        # torch's own would round each tensor's norm to 16 bits.
        return _norm(torch.stack([_norm(grad) for grad in grads]))
    return get_total_norm(grads)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
