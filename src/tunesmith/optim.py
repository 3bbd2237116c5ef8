"""AdamW, the learning rate's course, clipping, and how 16-bit weights are updated.

What is updated is always an fp32 tensor, or a bf16 one with stochastic rounding:

- a trained fp32 parameter (every LoRA matrix is one) is updated in place;
- a trained 16-bit parameter has an fp32 master copy. A hook moves each gradient into the master's fp32 gradient as
  soon as autograd has made it, so accumulation over micro batches is in fp32 and the 16-bit gradient is freed at once;
- with `master_weights: stochastic` there is no copy: the update is computed in fp32 and rounded up or down at random,
  with probability by the distance, so that small updates are kept on average (Zamirai et al. 2020, arXiv:2010.06192).

Decoupled weight decay is Loshchilov and Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tunesmith.config.schema import Train
from tunesmith.errors import CheckpointError

HALF = (torch.bfloat16, torch.float16)


def warmup_steps(train: Train, total: int | None, steps_per_epoch: float) -> int:
    """Optimizer steps of rising learning rate; a percentage of a run that ends by the clock counts epochs as one."""
    amount, unit = train.warmup.amount, train.warmup.unit
    if unit == "steps":
        return int(amount)
    whole = steps_per_epoch if unit == "epochs" or total is None else total
    return math.ceil(whole * (amount / 100 if unit == "%" else amount))


def learning_rate(train: Train, step: int, *, warmup: int, progress: float) -> float:
    """The rate of one update.

    Args:
        train: peak, floor and schedule.
        step: index of the update, from 0.
        warmup: the first `warmup` updates rise linearly; update `warmup - 1` is the first at the peak.
        progress: share of the course after the warm-up that lies behind this update, 0 to 1.
    """
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    span, left = train.learning_rate - train.min_learning_rate, 1.0 - min(max(progress, 0.0), 1.0)
    if train.schedule == "linear":
        return train.min_learning_rate + span * left
    if train.schedule == "cosine":
        return train.min_learning_rate + span * 0.5 * (1.0 - math.cos(math.pi * left))
    return train.learning_rate


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16, up or down at random with the expectation kept; NaN and Inf pass unchanged."""
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = (value.view(torch.int32) + noise) & -65536
    return torch.where(value.isfinite(), bits.view(torch.float32), value).to(torch.bfloat16)


class Optimizer:
    """AdamW over named parameters, with clipping, fp32 masters and a loss scale for fp16.

    Args:
        named: name and parameter of everything that is trained, each once; the names key the saved state.
        train: betas, eps, decay, clip_norm, master_weights and seed of the recipe.
        loss_scale: first factor on the loss (fp16), or None. It halves when a gradient overflows and doubles after
            2,000 good steps, as torch's GradScaler does.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], train: Train, *, loss_scale: float | None = None):
        self.train, self.scale, self.good_steps = train, loss_scale, 0
        self.params = dict(named)
        half = {name for name, p in self.params.items() if p.dtype in HALF}
        self.stochastic = half if train.master_weights == "stochastic" else set()
        self.masters = {name: self._master(self.params[name]) for name in sorted(half - self.stochastic)}
        updated = {name: self.masters.get(name, p) for name, p in self.params.items() if name not in self.stochastic}
        # Decay pulls weights of products towards zero; norms, biases and scalars have no reason to go there.
        matrices = [p for p in updated.values() if p.ndim >= 2]
        others = [p for p in updated.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.updated = updated
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]] or [{"params": [nn.Parameter(torch.zeros(0))]}],
            lr=train.learning_rate,
            betas=train.betas,
            eps=train.eps,
            fused=all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in updated.values()),
        )
        self.moments = {name: self._fresh_moments(self.params[name]) for name in sorted(self.stochastic)}

    @staticmethod
    def _master(param: nn.Parameter) -> nn.Parameter:
        master = nn.Parameter(param.detach().float())

        def move(param: Tensor) -> None:
            assert param.grad is not None
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad.add_(param.grad)
            param.grad = None

        param.register_post_accumulate_grad_hook(move)
        return master

    @staticmethod
    def _fresh_moments(param: Tensor) -> dict[str, Tensor]:
        zero = torch.zeros_like(param, dtype=torch.float32)
        return {"exp_avg": zero, "exp_avg_sq": zero.clone(), "step": torch.zeros(())}

    def grads(self) -> dict[str, Tensor]:
        """Gradients by parameter name: fp32 where the weights are fp32 or have a master."""
        owners = {name: self.masters.get(name, p) for name, p in self.params.items()}
        return {name: p.grad for name, p in owners.items() if p.grad is not None}

    def step(self, rate: float, number: int) -> Tensor:
        """Clip, update and drop the gradients; return the L2 norm before clipping (0-d fp32, on the device).

        A step whose norm is not finite changes no weight. Nothing here waits for the device on CUDA.
        """
        grads = list(self.grads().values())
        if self.scale is not None:
            for grad in grads:
                grad.div_(self.scale)
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.train.clip_norm is not None:
            factor = (self.train.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(factor.to(grad.dtype))
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self._update(norm, rate, number)
        for param in (*self.params.values(), *self.masters.values()):
            param.grad = None
        return norm

    def _update(self, norm: Tensor, rate: float, number: int) -> None:
        finite = norm.isfinite()
        # The fused kernel reads this flag on the device, as GradScaler uses it: no update, and no wait for the host.
        fused_skip = norm.device.type == "cuda" and not self.stochastic and self.scale is None
        if fused_skip:
            self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
        elif not finite.item():
            self._overflowed()
            return
        self.adamw.step()
        for name, master in self.masters.items():
            self.params[name].data.copy_(master.data)
        if self.stochastic:
            self._step_stochastically(rate, number)
        if self.scale is not None:
            self.good_steps += 1
            if self.good_steps % self.GROWTH_INTERVAL == 0:
                self.scale *= 2.0

    def _overflowed(self) -> None:
        if self.scale is not None:
            self.scale, self.good_steps = self.scale / 2.0, 0

    def _step_stochastically(self, rate: float, number: int) -> None:
        # Seeded by the step: a resumed run rounds as the uninterrupted one did.
        device = next(iter(self.params.values())).device
        generator = torch.Generator(device).manual_seed(self.train.seed * 1_000_003 + number)
        for name in sorted(self.stochastic):
            param, moment = self.params[name], self.moments[name]
            if param.grad is None:
                continue
            weight = param.detach().float()
            adamw(
                [weight], [param.grad.float()], [moment["exp_avg"]], [moment["exp_avg_sq"]], [], [moment["step"]],
                amsgrad=False, beta1=self.train.betas[0], beta2=self.train.betas[1], lr=rate, eps=self.train.eps,
                weight_decay=self.train.weight_decay if param.ndim >= 2 else 0.0, maximize=False,
            )  # fmt: skip
            param.data.copy_(round_stochastically(weight, generator))

    def state(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by `<parameter>.<field>`; nothing is copied."""
        out: dict[str, Tensor] = {}
        for name, param in self.updated.items():
            out |= {f"{name}.{field}": value for field, value in self.adamw.state.get(param, {}).items()}
        for name, moment in self.moments.items():
            out |= {f"{name}.{field}": value for field, value in moment.items()}
        return out | {f"{name}.master": master.data for name, master in self.masters.items()}

    def load(self, tensors: Mapping[str, Tensor], *, scale: float | None, good_steps: int, where: str) -> None:
        """Take a saved state.

        Raises:
            CheckpointError: if tensors are missing or have another shape, that is, if they belong to another run.
        """

        def take(name: str, like: Tensor) -> Tensor:
            saved = tensors.get(name)
            if saved is None or saved.shape != like.shape:
                raise CheckpointError(
                    f"the optimizer's state has no {name} of shape {tuple(like.shape)}",
                    where=where,
                    why="it was written by a run with other trained weights",
                    fix="go on with the same adapter and model, or start over with --fresh",
                )
            return saved.to(like.device)

        for name, master in self.masters.items():
            master.data.copy_(take(f"{name}.master", master))
        for name, param in self.updated.items():
            if f"{name}.step" not in tensors:
                continue  # a parameter that has had no gradient yet has no state
            moments = {field: take(f"{name}.{field}", param).clone() for field in ("exp_avg", "exp_avg_sq")}
            step = tensors[f"{name}.step"].clone()
            self.adamw.state[param] = {"step": step.to(param.device) if param.is_cuda else step, **moments}
        for name, moment in self.moments.items():
            for field, value in moment.items():
                value.copy_(take(f"{name}.{field}", value))
        self.scale, self.good_steps = scale, good_steps
