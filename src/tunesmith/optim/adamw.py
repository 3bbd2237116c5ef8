"""One AdamW update (Loshchilov and Hutter, arXiv:1711.05101) of some tensors, without waiting for
the device.

Moments are fp32, or 8-bit with one scale a block of 256 (Dettmers et al. 2022, arXiv:2110.02861).
torch's fused kernel updates many fp32 tensors at once, bitsandbytes' kernel an 8-bit one, and
torch.compile makes one kernel of the stochastically rounded update. bitsandbytes' optimizer class
is not used: it waits for the device after each tensor.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from tunesmith.config.schema import Train
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part, sharding_groups
from tunesmith.errors import MachineError, RecipeError, first_line
from tunesmith.host import packages
from tunesmith.units import ceil_div

HALF = (torch.bfloat16, torch.float16)
BLOCK_ELEMENTS = 256  # of an 8-bit moment, which share a scale
# A smaller tensor keeps fp32 moments, as in bitsandbytes, and a vector too: it costs nothing, and
# norms are sensitive.
MIN_8BIT_ELEMENTS = 4096

# Elements that are rounded at once where no compiled kernel does it, so that temporaries stay
# small: on a CPU they fit its cache, and on a GPU a piece must be worth the start of some 60
# kernels.
MAX_PIECE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}

# Scalars that leave a weight and its moments as they are where the gradient is 0, in the order of
# `_adamw_rounded`.
NO_UPDATE = (0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0)


def checkpoint_bytes_per_parameter(train: Train, weight_bytes: int) -> float:
    """Moments and fp32 master: what a checkpoint holds beside the weights, in bytes per trained
    parameter.

    `weight_bytes` is of one trained weight in the model: 4, or 2 with full fine-tuning in 16 bits.
    """
    moments = 2 * 4.0
    if train.optimizer == "adamw-8bit":
        # Two moments of a byte, and an fp32 scale a block of each.
        moments = 2 * (1 + 4 / BLOCK_ELEMENTS)
    # A 16-bit weight with stochastic rounding is its own master.
    has_master = weight_bytes == 2 and train.master_weights == "fp32"
    return moments + (4.0 if has_master else 0.0)


def state_bytes_per_parameter(train: Train, weight_bytes: int) -> float:
    """Gradient, moments and fp32 master: what a trained parameter takes on the device beside its
    weight. As above.

    With `optimizer_in_backward` no gradient counts: there is one tensor's at a time.
    """
    gradient = 4.0
    # Rounded weights take the gradient in their own 16 bits; all others have it in fp32.
    if weight_bytes == 2 and train.master_weights == "stochastic":
        gradient = 2.0
    if train.optimizer_in_backward:
        gradient = 0.0
    return checkpoint_bytes_per_parameter(train, weight_bytes) + gradient


def has_eight_bit_moments(param: Tensor) -> bool:
    """Tell whether adamw-8bit stores 8-bit moments of this parameter; it may be a DTensor."""
    return param.ndim >= 2 and param.numel() >= MIN_8BIT_ELEMENTS


def check_blocks(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """RecipeError where ranks would hold parts of a block of an 8-bit moment.

    The parameters may be on meta.

    Where a rank's part of each row is whole blocks, the scales are sharded as the weight is: the
    numbers are those of one process, and any mesh reads the state again. Blocks that reach over
    rows would depend on the mesh.
    """
    for name, param in named:
        if not (sharding_groups(param) and has_eight_bit_moments(param)):
            continue
        # The whole row, unless a tensor mesh cuts it: FSDP2 shards dimension 0.
        columns = local_slices(param)[-1]
        width = columns.stop - columns.start
        if width % BLOCK_ELEMENTS:
            raise RecipeError(
                "8-bit moments cannot be sharded over these ranks",
                where="train.optimizer",
                why=f"{name} has rows of {width:,} elements on a rank, and {BLOCK_ELEMENTS} share "
                "a scale",
                fix="train.optimizer=adamw, or only replicas: parallel.shard=1 parallel.tensor=1",
            )


@dataclass(eq=False)
class ParameterState:
    """One trained parameter and its optimizer state."""

    name: str  # of the parameter in the model
    param: nn.Parameter  # the model's own
    # What is updated and whose `.grad` is read: the fp32 master of a 16-bit `param`, this rank's
    # part of a sharded one, else itself.
    weight: nn.Parameter
    decay: float  # weight decay
    rounded: bool  # `param` is bf16 without a master, and rounded stochastically
    eight_bit: bool  # both moments are stored in 8 bits
    # Whose ranks hold the other parts of `param`.
    sharding_groups: tuple[dist.ProcessGroup, ...] = ()
    # Moments and step count; empty before the first update.
    state: dict[str, Tensor] = field(default_factory=dict)
    # Where its noise begins, see `noise_at`; set by the first rounded update.
    noise_place: Tensor | None = None
    # Of a layer that adds up `weight.grad` itself (`Fp32GradientLinear`): bool [].
    filled: Tensor | None = None

    @classmethod
    def of(cls, name: str, param: nn.Parameter, train: Train) -> "ParameterState":
        """The state of a parameter that the recipe trains, with its fp32 master if it has one."""
        rounded = param.dtype in HALF and train.master_weights == "stochastic"
        has_master = param.dtype in HALF and not rounded
        weight: nn.Parameter = param
        # Of a sharded parameter the master has this rank's part alone.
        if has_master:
            weight = nn.Parameter(local_part(param).detach().float())
        elif isinstance(param, DTensor):
            # The same memory as the shard's, so an update of `weight` is one of `param`.
            weight = nn.Parameter(param.to_local().detach())
        # Decay pulls matrices towards zero; norms, biases and scalars have no reason to go there.
        decay = train.weight_decay if param.ndim >= 2 else 0.0
        eight_bit = train.optimizer == "adamw-8bit" and has_eight_bit_moments(param)
        return cls(name, param, weight, decay, rounded, eight_bit, sharding_groups(param))

    @property
    def has_master(self) -> bool:
        """Tell whether `weight` is an fp32 copy of the 16-bit `param`, or of this rank's."""
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
        """A tensor that is sharded as the weight is, as a DTensor where the parameter is one; any
        other as it is.
        """
        like = self.param
        if not isinstance(like, DTensor) or value.ndim != like.ndim:
            return value
        shape = like.shape
        # Codes have the weight's shape; their scales have one for each block of a row.
        if value.shape != self.weight.shape:  # scales of 8-bit moments
            shape = torch.Size((*like.shape[:-1], like.shape[-1] // BLOCK_ELEMENTS))
        # Strides of a contiguous whole: without shape and stride `from_local` assumes even shards.
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            value, like.device_mesh, like.placements, shape=shape, stride=stride
        )

    def initial_state(self) -> dict[str, Tensor]:
        """The state before the first update.

        exp_avg, exp_avg_sq: of the weight's shape, fp32 (fp64 for an fp64 weight), or uint8 codes
        with exp_avg_scale, exp_avg_sq_scale: fp32 [..., blocks of a row], or [blocks] where blocks
        of 256 reach from row to row. step: fp32 [], on the device for the fused kernel.
        """
        if self.eight_bit:
            codes = torch.zeros_like(self.weight, dtype=torch.uint8)
            *rows, width = codes.shape
            shape = [*rows, width // BLOCK_ELEMENTS]
            # Blocks of bitsandbytes' kernel run over the flat tensor: rows that are no whole blocks
            # share.
            if width % BLOCK_ELEMENTS:
                shape = [ceil_div(codes.numel(), BLOCK_ELEMENTS)]
            scale = torch.zeros(shape, device=codes.device)
            return {
                "exp_avg": codes,
                "exp_avg_sq": codes.clone(),
                "exp_avg_scale": scale,
                "exp_avg_sq_scale": scale.clone(),
                # On the host: bitsandbytes' kernel takes the step as a number.
                "step": torch.zeros(()),
            }
        if self.rounded:
            moment = torch.zeros_like(self.weight, dtype=torch.float32, requires_grad=False)
            # On the host: it is an exponent of the bias correction, see `_scalars_of`.
            step = torch.zeros(())
        else:
            moment = torch.zeros_like(self.weight, requires_grad=False)
            # On the device: the fused kernel reads and increments it there, unless `found_inf` says
            # not.
            step = torch.zeros((), device=moment.device)
        return {"exp_avg": moment, "exp_avg_sq": moment.clone(), "step": step}


class AdamWUpdate:
    """AdamW with the betas, eps and seed of a recipe, on the device of the parameters.

    Raises:
        MachineError: adamw-8bit without the package bitsandbytes, or with one that cannot do it on
            this device.

    Attributes:
        takes_found_inf: a step can be skipped on the device; see `found_inf` of a call.
    """

    def __init__(self, train: Train, device: torch.device) -> None:
        self.train = train
        self.device = device
        self.rounded = _adamw_rounded
        self.compiled = False
        # Computed once a step: tensors differ in their weight decay alone.
        self.scalars_of = lru_cache(maxsize=8)(self._scalars_of)
        self.key_of = lru_cache(maxsize=1)(self._key_of)
        self.functional: Any = None
        if train.optimizer == "adamw-8bit":
            self.functional = packages.bnb_functional("8-bit moments", "train.optimizer")
            # The values of the 256 codes; v is never negative, and has all of them above zero.
            exp_avg_codes = self.functional.create_dynamic_map(signed=True).to(device)
            exp_avg_sq_codes = self.functional.create_dynamic_map(signed=False).to(device)
            self.codes = [exp_avg_codes, exp_avg_sq_codes]
        self.takes_found_inf = self.functional is None or self._skips_nan()

    @torch.no_grad()
    def _skips_nan(self) -> bool:
        """Tell whether bitsandbytes leaves a weight with a NaN gradient alone.

        Its CUDA kernel does, its CPU code does not.
        """
        weight = nn.Parameter(torch.ones(MIN_8BIT_ELEMENTS, device=self.device))
        weight.grad = torch.full_like(weight, float("nan"))
        part = ParameterState("", weight, weight, 0.1, rounded=False, eight_bit=True)
        part.state = part.initial_state()
        try:
            self._update_8bit(part, 1.0, 0)
        except RuntimeError as error:
            raise MachineError(
                f"the installed bitsandbytes has no 8-bit optimizer for {self.device.type}",
                where="train.optimizer",
                why=first_line(error),
                fix="pip install --upgrade bitsandbytes, or train.optimizer=adamw",
            ) from error
        return bool((weight == 1.0).all())

    @torch.no_grad()
    def compile(
        self, parts: Iterable[ParameterState], *, backend: str | Callable[..., object] = "inductor"
    ) -> None:
        """Compile the stochastically rounded update now: its dozen kernels a tensor become one.

        One graph for vectors and one for matrices, of every size. They are compiled from small
        tensors whose sides differ: from a square one the graph would be for squares only. An
        autograd thread finds them ready in the backward.
        """
        ranks = {part.param.ndim for part in parts if part.rounded and not part.eight_bit}
        # `dynamic=True`: sizes are symbols, so one graph serves every matrix of the model.
        self.rounded = torch.compile(_adamw_rounded, dynamic=True, fullgraph=True, backend=backend)
        self.compiled = True
        for rank in sorted(ranks):
            # Sides 32 and 48: no dimension equals another or is 1, which the compiler would
            # specialize.
            shape = [16 * (dim + 2) for dim in range(rank)]
            weight = torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
            grad = weight.clone()
            exp_avg = torch.zeros_like(weight, dtype=torch.float32)
            exp_avg_sq = exp_avg.clone()
            place = torch.zeros(2 + 2 * rank, dtype=torch.int64, device=self.device)
            key = torch.zeros(2, dtype=torch.int64, device=self.device)
            scalars = torch.ones(2, 7, device=self.device)
            found_inf = torch.zeros((), device=self.device)
            self.rounded(weight, grad, exp_avg, exp_avg_sq, place, key, scalars, found_inf)

    @torch.no_grad()
    def __call__(
        self, parts: Iterable[ParameterState], lr: float, step: int, found_inf: Tensor | None
    ) -> None:
        """Update every weight by its gradient.

        Args:
            step: from 0; with the parameter's name it seeds the stochastic rounding.
            found_inf: fp32 [] on the device; where it is 1, no weight changes. With 8-bit moments
                all gradients must then be NaN, and `takes_found_inf` True: bitsandbytes' kernel
                takes no flag. None: the gradients are finite.
        """
        # One fused call a weight decay: the kernel takes one value for all tensors of a call.
        fused: dict[float, list[ParameterState]] = {}
        for part in parts:
            # Lazily: a parameter that never gets a gradient takes no memory for moments.
            part.state = part.state or part.initial_state()
            if part.eight_bit:
                self._update_8bit(part, lr, step)
            elif part.rounded:
                self._update_rounded(part, lr, step, found_inf)
            else:
                fused.setdefault(part.decay, []).append(part)
        for decay, group in fused.items():
            self._update_fused(group, lr, decay, found_inf)

    def _update_fused(
        self, parts: list[ParameterState], lr: float, decay: float, found_inf: Tensor | None
    ) -> None:
        beta1, beta2 = self.train.betas
        adamw(
            [part.weight for part in parts],
            [part.grad for part in parts],
            [part.state["exp_avg"] for part in parts],
            [part.state["exp_avg_sq"] for part in parts],
            [],  # amsgrad's
            [part.state["step"] for part in parts],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            eps=self.train.eps,
            weight_decay=decay,
        )
        for part in parts:
            # The model computes with the 16-bit copy of the master just updated.
            if part.has_master:
                local_part(part.param).copy_(part.weight)

    def _update_8bit(self, part: ParameterState, lr: float, step: int) -> None:
        state = part.state
        beta1, beta2 = self.train.betas
        state["step"] += 1
        if not part.weight.numel():  # other ranks have all its rows
            return
        # Stochastic rounding needs the update in fp32: a temporary of one tensor.
        weight = part.weight.float() if part.rounded else part.weight
        exp_avg_codes, exp_avg_sq_codes = self.codes
        self.functional.optimizer_update_8bit_blockwise(
            "adam",
            part.grad.to(weight.dtype).contiguous(),
            weight,
            state["exp_avg"],
            state["exp_avg_sq"],
            beta1,
            beta2,
            beta3=0.0,
            alpha=0.0,
            eps=self.train.eps,
            step=int(state["step"]),
            lr=lr,
            qmap1=exp_avg_codes,
            qmap2=exp_avg_sq_codes,
            # The kernel takes one scale a block, in the order of the flat codes.
            absmax1=state["exp_avg_scale"].view(-1),
            absmax2=state["exp_avg_sq_scale"].view(-1),
            weight_decay=part.decay,
        )
        if part.rounded:
            key = self.key_of(step)
            # bitsandbytes has updated `weight`, an fp32 copy; its rounding goes to the parameter.
            for place, updated, rounded in self._pieces(part, weight, part.weight.data):
                noise = noise_at(place, key, updated.shape)
                rounded.copy_(round_stochastically(updated, noise))
        elif part.has_master:
            local_part(part.param).copy_(weight)

    def _update_rounded(
        self, part: ParameterState, lr: float, step: int, found_inf: Tensor | None
    ) -> None:
        state = part.state
        state["step"] += 1
        scalars = self.scalars_of(int(state["step"]), lr, part.decay)
        key = self.key_of(step)
        tensors = (part.weight.data, part.grad, state["exp_avg"], state["exp_avg_sq"])
        for place, weight, grad, exp_avg, exp_avg_sq in self._pieces(part, *tensors):
            self.rounded(weight, grad, exp_avg, exp_avg_sq, place, key, scalars, found_inf)

    def _scalars_of(self, count: int, lr: float, decay: float) -> Tensor:
        """The `scalars` of `_adamw_rounded` in the update number `count`.

        They go in a tensor, so that no value needs a graph of its own.
        """
        beta1, beta2 = self.train.betas
        values = (
            # The bias corrections are folded in:
            # step_size = lr / (1 - beta1^t), root = sqrt(1 - beta2^t).
            1 - beta1,
            beta2,
            1 - beta2,
            self.train.eps,
            1 - lr * decay,
            lr / (1 - beta1**count),
            (1 - beta2**count) ** 0.5,
        )
        return self._to_device(torch.tensor((values, NO_UPDATE), dtype=torch.float32))

    def _to_device(self, value: Tensor) -> Tensor:
        """A small tensor of the host on the device, without waiting for it."""
        if self.device.type != "cuda":
            return value
        # From pinned memory the host does not wait for the copy.
        return value.pin_memory().to(self.device, non_blocking=True)

    def _key_of(self, step: int) -> Tensor:
        """The key of a step for `noise_at`."""
        return self._to_device(torch.tensor(_two_words(f"{self.train.seed} {step}")))

    def _pieces(self, part: ParameterState, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors in pieces along the first dimension, each behind its place for `noise_at`.

        The tensors have the shape of the part's weight. They are one piece where the compiled
        update takes them.
        """
        if part.noise_place is None:
            part.noise_place = self._to_device(noise_place(part.name, part.param))
        count = part.weight.numel()
        most = MAX_PIECE_ELEMENTS[self.device.type]
        is_compiled = self.compiled and not part.eight_bit
        if is_compiled or count <= most:
            yield part.noise_place, *tensors
            return
        rows = max(1, most * len(part.weight) // count)
        for start in range(0, len(part.weight), rows):
            place = part.noise_place.clone()
            # place[2] is the index of the first row: the noise is that of the whole tensor's rows.
            place[2] += start
            yield place, *(tensor[start : start + rows] for tensor in tensors)


def _two_words(text: str) -> list[int]:
    """Two numbers of 32 bits with a sign that follow from a text."""
    return [*struct.unpack("<2i", hashlib.blake2b(text.encode(), digest_size=8).digest())]


def noise_place(name: str, param: Tensor) -> Tensor:
    """Locate the noise of this rank's part of a parameter, for `noise_at`: int64 [2 + 2 *
    dimensions] on the host.

    Two words of its name, then of each dimension the index of the part's first element in the whole
    parameter, and how many elements of the whole lie between two neighbours.
    """
    numbers = _two_words(name)
    between = param.numel()
    for part, size in zip(local_slices(param), param.shape, strict=True):
        # The stride of each dimension in the whole parameter, from the outermost inward.
        between = between // size if size else 0
        numbers += [part.start, between]
    return torch.tensor(numbers)


def noise_at(place: Tensor, key: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform noise of 16 bits, int32 from 0 to 65,535, of a part of a parameter that has this
    local shape.

    Each element's noise follows from its index in the whole parameter, the parameter's name, the
    seed and the step, so it is the same on every mesh and device, and nothing is drawn for the
    parts of other ranks. Two rounds of an integer hash with little bias (C. Wellons,
    hash-prospector, `lowbias32`); compiled, no element of it is ever in memory.

    Args:
        place: of `noise_place`.
        key: int64 [2] of the seed and the step.
    """
    # Name and seed-and-step are mixed by xor: 64 bits, in two words.
    low_key, high_key = (place[:2] ^ key).unbind()
    # An element's index is that of the first element of its row, plus that within the row.
    outer = torch.zeros((), dtype=torch.int64, device=place.device)
    inner = outer
    for dim, size in enumerate(shape):
        # place is [word, word, first_0, stride_0, first_1, stride_1, ...].
        first = place[2 + 2 * dim]
        between = place[3 + 2 * dim]
        inner = (torch.arange(size, device=place.device) + first) * between
        if dim < len(shape) - 1:
            # One index a row; that within the row is added last, so no int64 index of every
            # element.
            outer = outer.unsqueeze(-1) + inner
    rows = outer.unsqueeze(-1) if shape else outer
    # The index is 64 bits and the hash takes 32: low words first, then the high word of the row.
    mixed = _mix((_low_word(rows) + _low_word(inner)) ^ _low_word(low_key))
    mixed = _mix(mixed ^ _low_word((rows >> 32) ^ high_key))
    # 16 bits: as many as bf16 cuts off an fp32.
    return _right_shift(mixed, 16)


def _low_word(number: Tensor) -> Tensor:
    """The low 32 bits of int64 as int32."""
    # Congruent modulo 2^32 and within int32's range, so that the cast does not overflow.
    half = 1 << 31
    return (((number + half) & (2 * half - 1)) - half).int()


def _mix(word: Tensor) -> Tensor:
    """A bijection of the 32 bits of int32, whose products wrap around; may overwrite `word`."""
    word = word.bitwise_xor_(_right_shift(word, 16)).mul_(0x7FEB352D)
    # The constant of `lowbias32` as int32: products wrap around alike with and without a sign.
    word = word.bitwise_xor_(_right_shift(word, 15)).mul_(0x846CA68B - (1 << 32))
    return word.bitwise_xor_(_right_shift(word, 16))


def _right_shift(word: Tensor, bits: int) -> Tensor:
    """int32 shifted right as if it had no sign."""
    # `>>` on a signed integer copies the sign; the mask clears these bits.
    return (word >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bf16, up or down by the noise of `noise_at` so that the expectation is unchanged; NaN
    and Inf pass unchanged.

    `noise` is overwritten.
    """
    # fp32 = bf16 plus 16 more bits. Adding noise below 2^16 carries into bf16's last bit with a
    # probability of (those bits) / 2^16; then they are cleared.
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
    """AdamW in fp32 on a bf16 weight, rounded stochastically; fp32 moments; all of one shape, in
    place.

    place, key: of the noise, see `noise_at`. scalars: fp32 [2, 7]: 1 - beta1, beta2, 1 - beta2,
    eps, factor of the decay, step size, root of the bias correction; then NO_UPDATE, used where
    `found_inf` is 1.
    """
    value = weight.float()
    grad = grad.float()
    chosen = scalars[0]
    if found_inf is not None:
        # `where`, not a branch: the host does not read the flag, and the graph is the same.
        chosen = torch.where(found_inf == 0, scalars[0], scalars[1])
        grad = torch.where(found_inf == 0, grad, 0.0)
    one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, root = chosen.unbind()
    # exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg.lerp_(grad, one_minus_beta1)
    # exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad^2
    exp_avg_sq.mul_(beta2).add_((grad * grad).mul_(one_minus_beta2))
    # (exp_avg / (1 - beta1^t)) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps), without the first
    # factor, which is in step_size.
    update = exp_avg / exp_avg_sq.sqrt().div_(root).add_(eps)
    noise = noise_at(place, key, weight.shape)
    # Decay applies to the weight before the update, decoupled from the gradient.
    weight.copy_(round_stochastically(value.mul_(decay).sub_(update.mul_(step_size)), noise))
