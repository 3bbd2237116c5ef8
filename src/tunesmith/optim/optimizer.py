"""The optimizer: gradients in, one update a step out, and its state by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tunesmith.config.schema import Train
from tunesmith.errors import CheckpointError
from tunesmith.optim.adamw import AdamWUpdate, ParameterState, holds_8bit

HALF = (torch.bfloat16, torch.float16)


class Optimizer:
    """AdamW over named parameters, with clipping, fp32 masters and a loss scale for fp16.

    A step is `begin(rate, number)`, then every forward and backward, then `step()`.

    With `train.optimizer_in_backward` a hook updates each parameter within the backward, as soon as its gradient is
    whole, and `step()` only adds up the norm. Tied parameters are one: autograd adds all their parts up first. Then
    there must be one backward a step, no clipping and no loss scale: `config/check.py` and `build.py` see to it. A
    parameter whose gradient is not finite is not updated, but others of the same step may have been by then: such a
    step is torn. All weights are finite after it, but they are those of no step, so the run must end and go on from its
    last checkpoint.

    Args:
        named: name and parameter of everything that is trained, each once; the names key the saved state.
        train: optimizer, betas, eps, decay, clip_norm, master_weights, compile and seed of the recipe.
        loss_scale: first factor on the loss (fp16), or None. It halves when a gradient overflows and doubles after
            2,000 good steps, as torch's GradScaler does.

    Raises:
        MachineError: adamw-8bit without the package bitsandbytes.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], train: Train, *, loss_scale: float | None = None):
        self.train, self.scale, self.good_steps = train, loss_scale, 0
        self.params = dict(named)
        self.parts = {name: self._part(name, param) for name, param in self.params.items()}
        device = next(iter(self.params.values())).device if self.params else torch.device("cpu")
        self.update = AdamWUpdate(train, device)
        if device.type == "cuda" and train.compile != "off":
            self.update.compile(self.parts.values())
        # On a CPU a number is there at once. On CUDA the kernels read a flag instead: the host never waits for them;
        # but the loss scale, which changes with an overflow, lives on the host.
        self.asks_host = device.type != "cuda" or loss_scale is not None or not self.update.takes_flag
        self.rate, self.number = 0.0, 0
        self.norms: list[Tensor] = []
        for part in self.parts.values():
            if hook := self._hook(part):
                part.param.register_post_accumulate_grad_hook(hook)

    def _part(self, name: str, param: nn.Parameter) -> ParameterState:
        rounded = param.dtype in HALF and self.train.master_weights == "stochastic"
        mastered = param.dtype in HALF and not rounded
        weight = nn.Parameter(param.detach().float()) if mastered else param
        # Decay pulls weights of products towards zero; norms, biases and scalars have no reason to go there.
        decay = self.train.weight_decay if param.ndim >= 2 else 0.0
        return ParameterState(name, param, weight, decay, rounded, holds_8bit(self.train, param))

    def _hook(self, part: ParameterState) -> Callable[[Tensor], None] | None:
        """What happens to a parameter's gradient as soon as autograd has made it."""
        if self.train.optimizer_in_backward:
            return partial(self._update_now, part)
        return None if part.weight is part.param else partial(_move_to_master, part)

    def _update_now(self, part: ParameterState, param: Tensor) -> None:
        if part.weight is not part.param:
            _move_to_master(part, param)
        self.norms.append(self._advance([part]))

    @property
    def masters(self) -> dict[str, nn.Parameter]:
        """The fp32 copies of 16-bit parameters, by name."""
        return {name: part.weight for name, part in self.parts.items() if part.weight is not part.param}

    def grads(self) -> dict[str, Tensor]:
        """Gradients by parameter name: fp32 where the weights are fp32 or have a master."""
        return {name: p.weight.grad for name, p in self.parts.items() if p.weight.grad is not None}

    def begin(self, rate: float, number: int) -> None:
        """Say with which learning rate the coming step is taken, and its index from 0; before its backward."""
        self.rate, self.number = rate, number
        self.norms.clear()

    def step(self) -> Tensor:
        """Clip, update and drop the gradients; return their L2 norm before clipping (0-d fp32, on the device).

        A step whose norm is not finite changes no weight, unless the updates are made in the backward (see above).
        Nothing here waits for the device on CUDA, but with a loss scale.
        """
        if self.train.optimizer_in_backward:
            return _norm(torch.stack(self.norms))
        return self._advance([part for part in self.parts.values() if part.weight.grad is not None])

    @torch.no_grad()
    def _advance(self, parts: list[ParameterState]) -> Tensor:
        weights = [part.weight for part in parts]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        if self.scale is not None:
            for grad in grads:
                grad.div_(self.scale)
        norm = total_norm(grads)
        finite = norm.isfinite()
        if not self.asks_host:
            self._clip(weights, norm, poison=any(part.eight for part in parts))
            self.update(parts, self.rate, self.number, (~finite).float())
        elif finite.item():
            self._clip(weights, norm, poison=False)
            self.update(parts, self.rate, self.number, None)
            self._went_well()
        else:
            self._overflowed()
        for weight in weights:
            weight.grad = None
        return norm

    def _clip(self, weights: list[nn.Parameter], norm: Tensor, *, poison: bool) -> None:
        """Clip to `clip_norm`; with `poison`, make all gradients NaN where the norm is not finite."""
        limit = self.train.clip_norm
        if poison:
            # norm - norm is 0, or NaN where the norm is not finite; without a limit the factor is then 1.
            norm, limit = norm + (norm - norm), float("inf") if limit is None else limit
        if limit is not None:
            clip_grads_with_norm_(weights, limit, norm)

    def _went_well(self) -> None:
        if self.scale is not None:
            self.good_steps += 1
            if self.good_steps % self.GROWTH_INTERVAL == 0:
                self.scale *= 2.0

    def _overflowed(self) -> None:
        if self.scale is not None:
            self.scale, self.good_steps = self.scale / 2.0, 0

    def state(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by `<parameter>.<field>` (see `Part.fresh`); nothing is copied."""
        out: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            out |= {f"{name}.{field}": value for field, value in part.state.items()}
        return out | {f"{name}.master": master.data for name, master in self.masters.items()}

    def load(self, tensors: Mapping[str, Tensor], *, scale: float | None, good_steps: int, where: str) -> None:
        """Take a saved state.

        Raises:
            CheckpointError: if tensors are missing or have another shape or type, that is, if they belong to another run.
        """

        def take(name: str, like: Tensor) -> Tensor:
            saved = tensors.get(name)
            if saved is None or saved.shape != like.shape or saved.dtype != like.dtype:
                raise CheckpointError(
                    f"the optimizer's state has no {name} of shape {tuple(like.shape)} and {like.dtype}",
                    where=where,
                    why="it was written by a run with other trained weights, or another train.optimizer",
                    fix="go on with the same adapter, model and optimizer, or start over with --fresh",
                )
            return saved.to(like.device, copy=True)

        for name, master in self.masters.items():
            master.data.copy_(take(f"{name}.master", master))
        for name, part in self.parts.items():
            if f"{name}.step" in tensors:  # a parameter that has had no gradient yet has no state
                part.state = {field: take(f"{name}.{field}", like) for field, like in part.fresh().items()}
        self.scale, self.good_steps = scale, good_steps


def _move_to_master(part: ParameterState, param: Tensor) -> None:
    """Add a 16-bit gradient to its master's fp32 one, and drop it."""
    assert param.grad is not None
    if part.weight.grad is None:
        part.weight.grad = param.grad.float()
    else:
        part.weight.grad.add_(param.grad)
    param.grad = None


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
