"""One AdamW update (Loshchilov and Hutter, arXiv:1711.05101) of some tensors, without waiting for the device.

Moments are fp32, or 8-bit with one scale a block of 256 (Dettmers et al. 2022, arXiv:2110.02861). torch's fused kernel
updates many fp32 tensors at once, bitsandbytes' kernel an 8-bit one, and torch.compile makes one kernel of the
stochastically rounded update. bitsandbytes' optimizer class is not used: it waits for the device after each tensor.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from tunesmith import packages
from tunesmith.config.schema import Train
from tunesmith.errors import MachineError, RecipeError, first_line
from tunesmith.private import local_slices
from tunesmith.sharded import local_part, sharding_groups

HALF = (torch.bfloat16, torch.float16)
BLOCK = 256  # elements of an 8-bit moment that share a scale
# A smaller tensor keeps fp32 moments, as in bitsandbytes, and a vector too: it costs nothing, and norms are sensitive.
MIN_8BIT = 4096

# Elements that are rounded at once where no compiled kernel does it, so that temporaries stay small: on a CPU they fit
# its cache, and on a GPU a piece must be worth the start of some 60 kernels.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}

# Scalars that leave a weight and its moments as they are where the gradient is 0, in the order of `_adamw_rounded`.
NO_UPDATE = (0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0)


def checkpoint_bytes_per_parameter(train: Train, weight_bytes: int) -> float:
    """Moments and fp32 master: what a checkpoint holds beside the weights, in bytes per trained parameter.

    `weight_bytes` is of one trained weight in the model: 4, or 2 with full fine-tuning in 16 bits.
    """
    moments = 2 * (1 + 4 / BLOCK) if train.optimizer == "adamw-8bit" else 8.0
    return moments + (4.0 if weight_bytes == 2 and train.master_weights == "fp32" else 0.0)


def state_bytes_per_parameter(train: Train, weight_bytes: int) -> float:
    """Gradient, moments and fp32 master: what a trained parameter takes on the device beside its weight. As above.

    With `optimizer_in_backward` no gradient counts: there is one tensor's at a time.
    """
    gradient = 2.0 if weight_bytes == 2 and train.master_weights == "stochastic" else 4.0
    return checkpoint_bytes_per_parameter(train, weight_bytes) + (0.0 if train.optimizer_in_backward else gradient)


def has_eight_bit_moments(param: Tensor) -> bool:
    """Whether adamw-8bit stores the moments of this parameter, which may be a DTensor, in 8 bits."""
    return param.ndim >= 2 and param.numel() >= MIN_8BIT


def check_blocks(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """RecipeError where ranks would hold parts of a block of an 8-bit moment. The parameters may be on meta.

    Where a rank's part of each row is whole blocks, the scales are sharded as the weight is: the numbers are those of one
    process, and any mesh reads the state again. Blocks that reach over rows would depend on the mesh.
    """
    for name, param in named:
        if not (sharding_groups(param) and has_eight_bit_moments(param)):
            continue
        columns = local_slices(param)[-1]
        width = columns.stop - columns.start
        if width % BLOCK:
            why = f"{name} has rows of {width:,} elements on a rank, and {BLOCK} share a scale"
            fix = "train.optimizer=adamw, or copies alone: parallel.shard=1 parallel.tensor=1"
            raise RecipeError("8-bit moments cannot be cut over these ranks", where="train.optimizer", why=why, fix=fix)


@dataclass(eq=False)
class ParameterState:
    """One trained parameter and its optimizer state."""

    name: str  # of the parameter in the model
    param: nn.Parameter  # the model's own
    # What is updated and whose `.grad` is read: the fp32 master of a 16-bit `param`, this rank's part of a sharded one,
    # else itself
    weight: nn.Parameter
    decay: float  # weight decay
    rounded: bool  # `param` is bf16 without a master, and rounded stochastically
    eight_bit: bool  # both moments are stored in 8 bits
    sharding_groups: tuple[dist.ProcessGroup, ...] = ()  # whose ranks hold the other parts of `param`
    state: dict[str, Tensor] = field(default_factory=dict)  # moments and step count; empty before the first update
    noise_place: Tensor | None = None  # where its noise begins, see `noise_at`; made by the first rounded update
    filled: Tensor | None = None  # of a layer that adds up `weight.grad` itself (`Fp32GradientLinear`): bool []

    @classmethod
    def of(cls, name: str, param: nn.Parameter, train: Train) -> "ParameterState":
        """The state of a parameter that the recipe trains, with its fp32 master if it has one."""
        rounded = param.dtype in HALF and train.master_weights == "stochastic"
        has_master = param.dtype in HALF and not rounded
        weight: nn.Parameter = param
        if has_master:
            weight = nn.Parameter(local_part(param).detach().float())
        elif isinstance(param, DTensor):
            weight = nn.Parameter(param.to_local().detach())
        # Decay pulls matrices towards zero; norms, biases and scalars have no reason to go there.
        decay = train.weight_decay if param.ndim >= 2 else 0.0
        eight_bit = train.optimizer == "adamw-8bit" and has_eight_bit_moments(param)
        return cls(name, param, weight, decay, rounded, eight_bit, sharding_groups(param))

    @property
    def has_master(self) -> bool:
        """Whether `weight` is an fp32 copy of the 16-bit `param`, or of this rank's part of it."""
        return self.weight.dtype != self.param.dtype

    @property
    def grad(self) -> Tensor:
        assert self.weight.grad is not None
        return self.weight.grad

    @property
    def has_grad(self) -> bool:
        return self.weight.grad is not None and (self.filled is None or bool(self.filled))

    def drop_grad(self) -> None:
        if self.filled is None:
            self.weight.grad = None
        else:
            self.filled.fill_(False)

    def whole(self, value: Tensor) -> Tensor:
        """A tensor that is sharded as the weight is, as a DTensor where the parameter is one; any other as it is."""
        like = self.param
        if not isinstance(like, DTensor) or value.ndim != like.ndim:
            return value
        shape = like.shape if value.shape == self.weight.shape else (*like.shape[:-1], like.shape[-1] // BLOCK)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(value, like.device_mesh, like.placements, shape=torch.Size(shape), stride=stride)

    def initial_state(self) -> dict[str, Tensor]:
        """The state before the first update.

        exp_avg, exp_avg_sq: of the weight's shape, fp32 (fp64 for an fp64 weight), or uint8 codes with exp_avg_scale,
        exp_avg_sq_scale: fp32 [..., blocks of a row], or [blocks] where blocks of 256 reach from row to row. step: fp32 [],
        on the device for the fused kernel.
        """
        if self.eight_bit:
            codes = torch.zeros_like(self.weight, dtype=torch.uint8)
            *rows, width = codes.shape
            shape = [-(-codes.numel() // BLOCK)] if width % BLOCK else [*rows, width // BLOCK]
            scale = torch.zeros(shape, device=codes.device)
            scales = {"exp_avg_scale": scale, "exp_avg_sq_scale": scale.clone()}
            return {"exp_avg": codes, "exp_avg_sq": codes.clone(), **scales, "step": torch.zeros(())}
        zero = torch.zeros_like(self.weight, dtype=torch.float32 if self.rounded else None, requires_grad=False)
        device = None if self.rounded else zero.device
        return {"exp_avg": zero, "exp_avg_sq": zero.clone(), "step": torch.zeros((), device=device)}


class AdamWUpdate:
    """AdamW with the betas, eps and seed of a recipe, on the device of the parameters.

    Raises:
        MachineError: adamw-8bit without the package bitsandbytes, or with one that cannot do it on this device.

    Attributes:
        takes_found_inf: a step can be skipped on the device; see `found_inf` of a call.
    """

    def __init__(self, train: Train, device: torch.device) -> None:
        self.train, self.device = train, device
        self.rounded, self.compiled = _adamw_rounded, False
        self._scalars: dict[tuple[float, ...], Tensor] = {}
        self._step_key: tuple[int, Tensor] | None = None
        self.functional: Any = None
        if train.optimizer == "adamw-8bit":
            self.functional = packages.bitsandbytes("8-bit moments", "train.optimizer")
            # The values of the 256 codes; v is never negative, and has all of them above zero.
            self.codes = [self.functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
        self.takes_found_inf = self.functional is None or self._skips_nan()

    @torch.no_grad()
    def _skips_nan(self) -> bool:
        """Whether bitsandbytes leaves a weight with a NaN gradient alone: its CUDA kernel does, its CPU code does not."""
        weight = nn.Parameter(torch.ones(MIN_8BIT, device=self.device))
        weight.grad = torch.full_like(weight, float("nan"))
        part = ParameterState("", weight, weight, 0.1, rounded=False, eight_bit=True)
        part.state = part.initial_state()
        try:
            self._update_8bit(part, 1.0, 0)
        except RuntimeError as error:
            what = f"the installed bitsandbytes has no 8-bit optimizer for {self.device.type}"
            fix = "pip install --upgrade bitsandbytes, or train.optimizer=adamw"
            raise MachineError(what, where="train.optimizer", why=first_line(error), fix=fix) from error
        return bool((weight == 1.0).all())

    @torch.no_grad()
    def compile(self, parts: Iterable[ParameterState], *, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the stochastically rounded update now: its dozen kernels a tensor become one.

        One graph for vectors and one for matrices, of every size. They are made from small tensors whose sides differ: from
        a square one the graph would be for squares only. An autograd thread finds them ready in the backward.
        """
        ranks = {part.param.ndim for part in parts if part.rounded and not part.eight_bit}
        self.rounded = torch.compile(_adamw_rounded, dynamic=True, fullgraph=True, backend=backend)
        self.compiled = True
        for rank in sorted(ranks):
            weight = torch.zeros([16 * (i + 2) for i in range(rank)], dtype=torch.bfloat16, device=self.device)
            exp_avg, exp_avg_sq = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
            place = torch.zeros(2 + 2 * rank, dtype=torch.int64, device=self.device)
            key = torch.zeros(2, dtype=torch.int64, device=self.device)
            scalars, found_inf = torch.ones(2, 7, device=self.device), torch.zeros((), device=self.device)
            self.rounded(weight, weight.clone(), exp_avg, exp_avg_sq, place, key, scalars, found_inf)

    @torch.no_grad()
    def __call__(self, parts: Iterable[ParameterState], lr: float, step: int, found_inf: Tensor | None) -> None:
        """Update every weight by its gradient.

        Args:
            step: from 0; with the parameter's name it seeds the stochastic rounding.
            found_inf: fp32 [] on the device; where it is 1, no weight changes. With 8-bit moments all gradients must then
                be NaN, and `takes_found_inf` True: bitsandbytes' kernel takes no flag. None: the gradients are finite.
        """
        fused: dict[float, list[ParameterState]] = {}
        for part in parts:
            part.state = part.state or part.initial_state()
            if part.eight_bit:
                self._update_8bit(part, lr, step)
            elif part.rounded:
                self._update_rounded(part, lr, step, found_inf)
            else:
                fused.setdefault(part.decay, []).append(part)
        for decay, group in fused.items():
            self._update_fused(group, lr, decay, found_inf)

    def _update_fused(self, parts: list[ParameterState], lr: float, decay: float, found_inf: Tensor | None) -> None:
        adamw(
            [p.weight for p in parts], [p.grad for p in parts],
            [p.state["exp_avg"] for p in parts], [p.state["exp_avg_sq"] for p in parts], [],
            [p.state["step"] for p in parts], fused=True, found_inf=found_inf, amsgrad=False, maximize=False,
            beta1=self.train.betas[0], beta2=self.train.betas[1], lr=lr, eps=self.train.eps, weight_decay=decay,
        )  # fmt: skip
        for part in parts:
            if part.has_master:
                local_part(part.param).copy_(part.weight)

    def _update_8bit(self, part: ParameterState, lr: float, step: int) -> None:
        state, betas = part.state, self.train.betas
        state["step"] += 1
        if not part.weight.numel():  # other ranks have all its rows
            return
        # Stochastic rounding needs the update in fp32: a temporary of one tensor.
        weight = part.weight.float() if part.rounded else part.weight
        self.functional.optimizer_update_8bit_blockwise(
            "adam", part.grad.to(weight.dtype).contiguous(), weight, state["exp_avg"], state["exp_avg_sq"],
            betas[0], betas[1], 0.0, 0.0, self.train.eps, int(state["step"]), lr, *self.codes,
            state["exp_avg_scale"].view(-1), state["exp_avg_sq_scale"].view(-1), part.decay,
        )  # fmt: skip
        if part.rounded:
            key = self._key_of(step)
            for place, updated, rounded in self._pieces(part, weight, part.weight.data):
                rounded.copy_(round_stochastically(updated, noise_at(place, key, updated.shape)))
        elif part.has_master:
            local_part(part.param).copy_(weight)

    def _update_rounded(self, part: ParameterState, lr: float, step: int, found_inf: Tensor | None) -> None:
        state, (beta1, beta2) = part.state, self.train.betas
        state["step"] += 1
        count = int(state["step"])
        of_step = (1 - lr * part.decay, lr / (1 - beta1**count), (1 - beta2**count) ** 0.5)
        # Scalars go in a tensor, so that no value needs a graph of its own; it is made once a step.
        values = (1 - beta1, beta2, 1 - beta2, self.train.eps, *of_step)
        if values not in self._scalars:
            if len(self._scalars) > 8:
                self._scalars.clear()
            self._scalars[values] = self._to_device(torch.tensor((values, NO_UPDATE), dtype=torch.float32))
        key, scalars = self._key_of(step), self._scalars[values]
        moments = (state["exp_avg"], state["exp_avg_sq"])
        for place, weight, grad, exp_avg, exp_avg_sq in self._pieces(part, part.weight.data, part.grad, *moments):
            self.rounded(weight, grad, exp_avg, exp_avg_sq, place, key, scalars, found_inf)

    def _to_device(self, value: Tensor) -> Tensor:
        """A small tensor of the host on the device; from pinned memory the host does not wait for the copy."""
        return value.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else value

    def _key_of(self, step: int) -> Tensor:
        """The key of a step for `noise_at`, made once a step."""
        if self._step_key is None or self._step_key[0] != step:
            key = torch.tensor(_two_words(f"{self.train.seed} {step}"))
            self._step_key = (step, self._to_device(key))
        return self._step_key[1]

    def _pieces(self, part: ParameterState, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors, which have the shape of the part's weight, in pieces along the first dimension, each behind its
        place for `noise_at`; in one piece where the compiled update takes them."""
        if part.noise_place is None:
            part.noise_place = self._to_device(noise_place(part.name, part.param))
        weight, most = part.weight, CHUNK[self.device.type]
        is_compiled = self.compiled and not part.eight_bit
        if is_compiled or weight.numel() <= most:
            yield part.noise_place, *tensors
            return
        rows = max(1, most * len(weight) // weight.numel())
        for start in range(0, len(weight), rows):
            place = part.noise_place.clone()
            place[2] += start
            yield place, *(tensor[start : start + rows] for tensor in tensors)


def _two_words(text: str) -> list[int]:
    """Two numbers of 32 bits with a sign that follow from a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return [int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:])]


def noise_place(name: str, param: Tensor) -> Tensor:
    """Where the noise of this rank's part of a parameter lies, for `noise_at`: int64 [2 + 2 * dimensions] on the host.

    Two words of its name, then of each dimension the index of the part's first element in the whole parameter, and how
    many elements of the whole lie between two neighbours.
    """
    numbers = _two_words(name)
    between = param.numel()
    for part, size in zip(local_slices(param), param.shape, strict=True):
        between = between // size if size else 0
        numbers += [part.start, between]
    return torch.tensor(numbers)


def noise_at(place: Tensor, key: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform noise of 16 bits, int32 from 0 to 65,535, of a part of a parameter that has this local shape.

    Each element's noise follows from its index in the whole parameter, the parameter's name, the seed and the step, so it
    is the same on every mesh and device, and nothing is drawn for the parts of other ranks. Two rounds of an integer hash
    with little bias (C. Wellons, hash-prospector, `lowbias32`); compiled, no element of it is ever in memory.

    Args:
        place: of `noise_place`.
        key: int64 [2] of the seed and the step.
    """
    word, other = (place[:2] ^ key).unbind()
    outer = torch.zeros((), dtype=torch.int64, device=place.device)  # index of the first element of each row
    inner = outer
    for dim, size in enumerate(shape):
        first, between = place[2 + 2 * dim], place[3 + 2 * dim]
        inner = (torch.arange(size, device=place.device) + first) * between
        if dim < len(shape) - 1:
            outer = outer.unsqueeze(-1) + inner
    rows = outer.unsqueeze(-1) if shape else outer
    mixed = _mix((_low_word(rows) + _low_word(inner)) ^ _low_word(word))
    return _right(_mix(mixed ^ _low_word((rows >> 32) ^ other)), 16)


def _low_word(number: Tensor) -> Tensor:
    """The low 32 bits of int64 as int32."""
    half = 1 << 31
    return (((number + half) & (2 * half - 1)) - half).int()


def _mix(word: Tensor) -> Tensor:
    """A bijection of the 32 bits of int32, whose products wrap around; `word` may be overwritten."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        word = word.bitwise_xor_(_right(word, shift)).mul_(factor)
    return word.bitwise_xor_(_right(word, 16))


def _right(word: Tensor, bits: int) -> Tensor:
    """int32 shifted right as if it had no sign."""
    return (word >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bf16, up or down by the noise of `noise_at` so that the expectation is kept; NaN and Inf pass unchanged.

    `noise` is overwritten.
    """
    bits = noise.add_(value.view(torch.int32)).bitwise_and_(-65536)
    # Infinity has no bits that noise could carry over; a NaN may have, and would become a number.
    return torch.where(value.isnan(), value, bits.view(torch.float32)).to(torch.bfloat16)


def _adamw_rounded(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    place: Tensor,
    key: Tensor,
    scalars: Tensor,
    found_inf: Tensor | None,
) -> None:
    """AdamW in fp32 on a bf16 weight, rounded stochastically; fp32 moments; all of one shape, in place.

    place, key: of the noise, see `noise_at`.
    scalars: fp32 [2, 7]: 1 - beta1, beta2, 1 - beta2, eps, factor of the decay, step size, root of the bias correction;
    then NO_UPDATE, taken where `found_inf` is 1.
    """
    value, grad = weight.float(), grad.float()
    taken = scalars[0]
    if found_inf is not None:
        taken = torch.where(found_inf == 0, scalars[0], scalars[1])
        grad = torch.where(found_inf == 0, grad, 0.0)
    rest1, beta2, rest2, eps, decay, step_size, root = taken.unbind()
    exp_avg.lerp_(grad, rest1)
    exp_avg_sq.mul_(beta2).add_((grad * grad).mul_(rest2))
    update = exp_avg / exp_avg_sq.sqrt().div_(root).add_(eps)
    noise = noise_at(place, key, weight.shape)
    weight.copy_(round_stochastically(value.mul_(decay).sub_(update.mul_(step_size)), noise))
