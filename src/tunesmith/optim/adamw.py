"""One AdamW update of some tensors: fp32 or 8-bit moments, rounded to nearest or stochastically.

Nothing here waits for the device, and few kernels are launched: fp32 tensors are updated by torch's fused kernel, many
in one launch; an 8-bit one by bitsandbytes' kernel; a stochastically rounded one by a function that torch.compile makes
one kernel of. bitsandbytes' optimizer class is not used because it synchronises with the device after each tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tunesmith import packages
from tunesmith.config.schema import Train
from tunesmith.errors import MachineError, first_line
from tunesmith.optim.state_size import BLOCK, LEAST_8BIT

# What changes no bit of a weight and its moments, in the order of `_rounded_adamw`; their gradient is then 0.
NOTHING = (0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0)


@dataclass(eq=False)
class ParameterState:
    """One trained tensor and what goes with it.

    Attributes:
        name: of the parameter in the model.
        param: as the model holds it.
        weight: what is updated and whose `.grad` is taken: the fp32 master of a 16-bit parameter, else `param` itself.
        decay: weight decay.
        rounded: `param` is bf16 without a master, and rounded stochastically.
        eight: both moments are held in 8 bits.
        state: moments and step count by field; empty before the first update.
    """

    name: str
    param: nn.Parameter
    weight: nn.Parameter
    decay: float
    rounded: bool
    eight: bool
    state: dict[str, Tensor] = field(default_factory=dict)

    def fresh(self) -> dict[str, Tensor]:
        """The state before the first update.

        exp_avg, exp_avg_sq: of the weight's shape, fp32 (fp64 where the weight is), or uint8 codes with
        exp_avg_scale, exp_avg_sq_scale: fp32 [blocks of 256]. step: fp32 [], on the device for the fused kernel.
        """
        if self.eight:
            codes = torch.zeros_like(self.weight, dtype=torch.uint8)
            scale = torch.zeros(-(-codes.numel() // BLOCK), device=codes.device)
            both = {"exp_avg_scale": scale, "exp_avg_sq_scale": scale.clone()}
            return {"exp_avg": codes, "exp_avg_sq": codes.clone(), **both, "step": torch.zeros(())}
        zero = torch.zeros_like(self.weight, dtype=torch.float32 if self.rounded else None, requires_grad=False)
        device = None if self.rounded else zero.device
        return {"exp_avg": zero, "exp_avg_sq": zero.clone(), "step": torch.zeros((), device=device)}


def holds_8bit(train: Train, param: Tensor) -> bool:
    """Whether this parameter's moments are held in 8 bits."""
    return train.optimizer == "adamw-8bit" and param.numel() >= LEAST_8BIT


class AdamWUpdate:
    """AdamW by the betas, eps and seed of a recipe.

    Args:
        train: the recipe's part.
        device: where the parameters are.

    Raises:
        MachineError: adamw-8bit without the package bitsandbytes, or with one that cannot do it on this device.

    Attributes:
        takes_flag: a step can be skipped on the device, see `bad` of a call.
    """

    def __init__(self, train: Train, device: torch.device) -> None:
        self.train, self.device = train, device
        self.rounded = _rounded_adamw
        self._numbers: dict[tuple[float, ...], Tensor] = {}
        self.functional: Any = None
        if train.optimizer == "adamw-8bit":
            self.functional = packages.bitsandbytes("8-bit moments", "train.optimizer")
            # The values of the 256 codes; v is never negative, and has all of them above zero.
            self.codes = [self.functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
        self.takes_flag = self.functional is None or self._leaves_nan()

    @torch.no_grad()
    def _leaves_nan(self) -> bool:
        """Whether bitsandbytes leaves a weight alone whose gradient is NaN: its CUDA kernel does, its CPU code not."""
        weight = nn.Parameter(torch.ones(LEAST_8BIT, device=self.device))
        weight.grad = torch.full_like(weight, float("nan"))
        part = ParameterState("", weight, weight, 0.1, rounded=False, eight=True)
        part.state = part.fresh()
        try:
            self._eight(part, 1.0, 0)
        except (NotImplementedError, RuntimeError) as error:
            raise MachineError(
                f"the installed bitsandbytes has no 8-bit optimizer for {self.device.type}",
                where="train.optimizer",
                why=first_line(error),
                fix="pip install --upgrade bitsandbytes, or train.optimizer=adamw",
            ) from error
        return bool((weight == 1.0).all())

    @torch.no_grad()
    def compile(self, parts: Iterable[ParameterState], *, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the stochastically rounded update, here and now: its dozen kernels a tensor become one.

        One graph for vectors and one for matrices, of every size, made from small ones whose sides differ: from a square
        one it would be for squares only. In the backward, a thread of autograd finds the graph ready.
        """
        ranks = {part.param.ndim for part in parts if part.rounded and not part.eight}
        self.rounded = torch.compile(_rounded_adamw, dynamic=True, fullgraph=True, backend=backend)
        for rank in sorted(ranks):
            weight = torch.zeros([16 * (i + 2) for i in range(rank)], dtype=torch.bfloat16, device=self.device)
            mean, square = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
            noise = torch.zeros_like(weight, dtype=torch.int16)
            numbers, bad = torch.ones(2, 7, device=self.device), torch.zeros((), device=self.device)
            self.rounded(weight, weight.clone(), mean, square, noise, numbers, bad)

    @torch.no_grad()
    def __call__(self, parts: Iterable[ParameterState], rate: float, number: int, bad: Tensor | None) -> None:
        """Update every part by its weight's gradient.

        Args:
            rate: the learning rate.
            number: index of the step, from 0; with the parameter's name it seeds the stochastic rounding, so that a
                resumed run rounds as the uninterrupted one did.
            bad: fp32 [] on the device; where it is 1, no weight changes. With 8-bit moments all gradients must then be
                NaN, and `takes_flag` True: bitsandbytes' kernel knows no flag. None: all is well.
        """
        fused: dict[float, list[ParameterState]] = {}
        for part in parts:
            part.state = part.state or part.fresh()
            if part.eight:
                self._eight(part, rate, number)
            elif part.rounded:
                self._round(part, rate, number, bad)
            else:
                fused.setdefault(part.decay, []).append(part)
        for decay, some in fused.items():
            self._fused(some, rate, decay, bad)

    def _fused(self, parts: list[ParameterState], rate: float, decay: float, bad: Tensor | None) -> None:
        adamw(
            [p.weight for p in parts], [_grad(p) for p in parts],
            [p.state["exp_avg"] for p in parts], [p.state["exp_avg_sq"] for p in parts], [],
            [p.state["step"] for p in parts], fused=True, found_inf=bad, amsgrad=False, maximize=False,
            beta1=self.train.betas[0], beta2=self.train.betas[1], lr=rate, eps=self.train.eps, weight_decay=decay,
        )  # fmt: skip
        for part in parts:
            if part.param is not part.weight:
                part.param.copy_(part.weight)

    def _eight(self, part: ParameterState, rate: float, number: int) -> None:
        state, betas = part.state, self.train.betas
        state["step"] += 1
        # Stochastic rounding needs the update in fp32: a temporary of one tensor.
        weight = part.weight.float() if part.rounded else part.weight
        self.functional.optimizer_update_8bit_blockwise(
            "adam", _grad(part).to(weight.dtype).contiguous(), weight, state["exp_avg"], state["exp_avg_sq"],
            betas[0], betas[1], 0.0, 0.0, self.train.eps, int(state["step"]), rate, *self.codes,
            state["exp_avg_scale"], state["exp_avg_sq_scale"], part.decay,
        )  # fmt: skip
        if part.rounded:
            part.param.copy_(_round(weight, self._noise(part, number)))
        elif part.param is not part.weight:
            part.param.copy_(weight)

    def _round(self, part: ParameterState, rate: float, number: int, bad: Tensor | None) -> None:
        state, (beta1, beta2) = part.state, self.train.betas
        state["step"] += 1
        count = int(state["step"])
        of_betas = (1 - beta1, beta2, 1 - beta2)
        of_step = (1 - rate * part.decay, rate / (1 - beta1**count), (1 - beta2**count) ** 0.5)
        numbers = self._on_device((*of_betas, self.train.eps, *of_step))
        noise = self._noise(part, number)
        self.rounded(part.param.data, _grad(part), state["exp_avg"], state["exp_avg_sq"], noise, numbers, bad)

    def _on_device(self, values: tuple[float, ...]) -> Tensor:
        """Numbers in a tensor (see `_rounded_adamw`), so that no value needs a graph of its own; made once a step."""
        if values not in self._numbers:
            if len(self._numbers) > 8:
                self._numbers.clear()
            here = torch.tensor((values, NOTHING), dtype=torch.float32)
            cuda = self.device.type == "cuda"
            # From pinned memory the host does not wait for the copy.
            self._numbers[values] = here.pin_memory().to(self.device, non_blocking=True) if cuda else here
        return self._numbers[values]

    def _noise(self, part: ParameterState, number: int) -> Tensor:
        """Uniform int16 of the parameter's shape, by seed, step and name."""
        text = f"{self.train.seed} {number} {part.name}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
        return draw_noise(part.param, torch.Generator(self.device).manual_seed(seed))


def _grad(part: ParameterState) -> Tensor:
    assert part.weight.grad is not None
    return part.weight.grad


def draw_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform over all 16 bits: int16 of the shape of `like`, on its device."""
    return torch.randint(-(1 << 15), 1 << 15, like.shape, dtype=torch.int16, device=like.device, generator=generator)


def _round(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bf16, up or down by int16 noise so that the expectation is kept; NaN and Inf pass unchanged."""
    bits = noise.int().add_(value.view(torch.int32)).add_(1 << 15).bitwise_and_(-65536)
    # Infinity has no bits that noise could carry over; a NaN may have, and would become a number.
    return torch.where(value.isnan(), value, bits.view(torch.float32)).to(torch.bfloat16)


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16, up or down at random with the expectation kept; NaN and Inf pass unchanged."""
    return _round(value, draw_noise(value, generator))


def _rounded_adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    noise: Tensor,
    numbers: Tensor,
    bad: Tensor | None,
) -> None:
    """AdamW in fp32 on a bf16 weight, rounded stochastically by int16 noise; fp32 moments; all of one shape, in place.

    numbers: fp32 [2, 7]: 1 - beta1, beta2, 1 - beta2, eps, factor of the decay, step size, root of the correction; and
    those that change nothing, taken where `bad` is 1.
    """
    value, slope = weight.float(), grad.float()
    taken = numbers[0]
    if bad is not None:
        taken = torch.where(bad == 0, numbers[0], numbers[1])
        slope = torch.where(bad == 0, slope, 0.0)
    rest1, beta2, rest2, eps, shrink, size, root = taken.unbind()
    exp_avg.lerp_(slope, rest1)
    exp_avg_sq.mul_(beta2).add_((slope * slope).mul_(rest2))
    step = exp_avg / exp_avg_sq.sqrt().div_(root).add_(eps)
    weight.copy_(_round(value.mul_(shrink).sub_(step.mul_(size)), noise))
