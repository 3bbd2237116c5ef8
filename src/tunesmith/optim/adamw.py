"""AdamW update (Loshchilov and Hutter, arXiv:1711.05101) of a list of parameters. The host does not
wait for the device.

The moments are fp32, or 8-bit with one scale per block of 256 elements (Dettmers et al. 2022,
arXiv:2110.02861). torch's fused kernel updates many fp32 tensors at once, and bitsandbytes' kernel
updates one tensor with 8-bit moments. The stochastically rounded update is compiled to one kernel
by torch.compile. bitsandbytes' optimizer class is not used, because it waits for the device after
each tensor.
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
from tunesmith.model.layers.documents import copy_to_device
from tunesmith.units import ceil_div

HALF = (torch.bfloat16, torch.float16)
BLOCK_ELEMENTS = 256  # elements of an 8-bit moment that share a scale
# Tensors with fewer elements have fp32 moments, as in bitsandbytes. All vectors have fp32 moments
# too, because the weights of norms are sensitive to rounding. These moments take almost no memory.
MIN_8BIT_ELEMENTS = 4096

# Maximum number of elements that are rounded in one step without the compiled kernel. Temporary
# tensors of this size fit in the cache of a CPU. On a GPU, larger pieces are needed because each
# piece starts about 60 kernels.
MAX_PIECE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}

# Values of `scalars` for a call of `_adamw_rounded` that must change nothing: if the gradient is 0,
# weights and moments stay equal.
NO_UPDATE = (0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0)


def checkpoint_bytes_per_parameter(train: Train, weight_bytes: int) -> float:
    """Return the bytes per trained parameter that a checkpoint stores in addition to the weight.

    These are the moments and the fp32 master.

    Args:
        weight_bytes: bytes of a trained weight in the model: 4, or 2 for full fine-tuning in 16
            bits.
    """
    moments = 2 * 4.0
    if train.optimizer == "adamw-8bit":
        # Each of the two moments has one byte per element and an fp32 scale per block.
        moments = 2 * (1 + 4 / BLOCK_ELEMENTS)
    # A 16-bit weight with stochastic rounding has no fp32 master.
    if weight_bytes == 2 and train.master_weights == "fp32":
        return moments + 4.0
    return moments


def state_bytes_per_parameter(train: Train, weight_bytes: int) -> float:
    """Return the bytes per trained parameter on the device in addition to the weight.

    These are the gradient, the moments and the fp32 master. With `optimizer_in_backward`, gradients
    are not counted, because only the gradient of one tensor exists at a time.
    """
    gradient = 4.0
    # Stochastically rounded weights have gradients in 16 bits. All other gradients are fp32.
    if weight_bytes == 2 and train.master_weights == "stochastic":
        gradient = 2.0
    if train.optimizer_in_backward:
        gradient = 0.0
    return checkpoint_bytes_per_parameter(train, weight_bytes) + gradient


def has_eight_bit_moments(param: Tensor) -> bool:
    """Return whether adamw-8bit stores 8-bit moments for this parameter, which may be a DTensor."""
    return param.ndim >= 2 and param.numel() >= MIN_8BIT_ELEMENTS


def check_blocks(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise RecipeError if a block of an 8-bit moment would be split over several ranks.

    Each rank's part of a row must consist of complete blocks. Then the scales are sharded in the
    same way as the weight, the update is the same as in one process, and any mesh can read the
    state. If blocks extended over several rows, the mesh would determine the elements of a block.

    Args:
        named: pairs of name and parameter. The parameters may be on the meta device.
    """
    for name, param in named:
        if not (sharding_groups(param) and has_eight_bit_moments(param)):
            continue
        # Columns of this rank. FSDP2 shards dimension 0, so only tensor parallelism splits the
        # columns.
        columns = local_slices(param)[-1]
        width = columns.stop - columns.start
        if width % BLOCK_ELEMENTS:
            raise RecipeError(
                "the optimizer's 8-bit moments cannot be sharded over these ranks",
                where="train.optimizer",
                why=f"{name} has rows of {width:,} elements on a rank, which is not a "
                f"multiple of {BLOCK_ELEMENTS}, the size of a block of elements that share a scale",
                fix="set train.optimizer=adamw, or use only replicas with parallel.shard=1 "
                "parallel.tensor=1",
            )


@dataclass(eq=False)
class ParameterState:
    """A trained parameter and its optimizer state."""

    name: str  # name of the parameter in the model
    param: nn.Parameter  # parameter of the model
    # The optimizer updates this tensor and reads its `.grad`. It is the fp32 master if `param` has
    # a master, this rank's shard if `param` is sharded, and otherwise `param` itself.
    weight: nn.Parameter
    decay: float  # factor of the weight decay
    rounded: bool  # whether `param` is bf16 without a master, and is rounded stochastically
    eight_bit: bool  # whether both moments are stored in 8 bits
    # Process groups over which `param` is sharded.
    sharding_groups: tuple[dist.ProcessGroup, ...] = ()
    # Moments and step count. Empty before the first update.
    state: dict[str, Tensor] = field(default_factory=dict)
    # Position of this rank's shard for the noise, see `noise_at`. The first stochastically rounded
    # update sets it.
    noise_place: Tensor | None = None
    # Scalar bool tensor: whether `weight.grad` is valid. None unless the layer is a
    # `Fp32GradientLinear`, which accumulates its gradient itself.
    filled: Tensor | None = None

    @classmethod
    def of(cls, name: str, param: nn.Parameter, train: Train) -> "ParameterState":
        """Create the state of a trained parameter. If the recipe requires an fp32 master, create
        the master too.
        """
        rounded = param.dtype in HALF and train.master_weights == "stochastic"
        has_master = param.dtype in HALF and not rounded
        weight: nn.Parameter = param
        # The master of a sharded parameter is only this rank's shard.
        if has_master:
            weight = nn.Parameter(local_part(param).detach().float())
        elif isinstance(param, DTensor):
            # `weight` shares the memory of the local shard, so an update of `weight` updates
            # `param`.
            weight = nn.Parameter(param.to_local().detach())
        # Weight decay applies only to matrices. It would pull norms, biases and scalars to zero,
        # for which there is no reason.
        decay = train.weight_decay if param.ndim >= 2 else 0.0
        eight_bit = train.optimizer == "adamw-8bit" and has_eight_bit_moments(param)
        return cls(name, param, weight, decay, rounded, eight_bit, sharding_groups(param))

    @property
    def has_master(self) -> bool:
        """Return whether `weight` is an fp32 copy of the 16-bit `param` or of its local shard."""
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
        """Return this rank's shard `value` as a DTensor that is sharded like the parameter.

        Return `value` unchanged if the parameter is not a DTensor, or if `value` is not sharded.
        """
        like = self.param
        if not isinstance(like, DTensor) or value.ndim != like.ndim:
            return value
        shape = like.shape
        # Codes of 8-bit moments have the shape of the weight. Scales have one element per block of
        # a row.
        if value.shape != self.weight.shape:
            shape = torch.Size((*like.shape[:-1], like.shape[-1] // BLOCK_ELEMENTS))
        # Pass the shape and the strides of the entire tensor, because `from_local` otherwise
        # assumes shards of equal size.
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            value, like.device_mesh, like.placements, shape=shape, stride=stride
        )

    def initial_state(self) -> dict[str, Tensor]:
        """Return the state before the first update.

        It has these tensors:
            exp_avg, exp_avg_sq: fp32 with the weight's shape (fp64 for an fp64 weight), or uint8
                codes.
            exp_avg_scale, exp_avg_sq_scale: only for uint8 codes. fp32 [..., blocks per row], or
                [blocks] if blocks of 256 extend over several rows.
            step: fp32 [], on the device for the fused kernel.
        """
        if self.eight_bit:
            codes = torch.zeros_like(self.weight, dtype=torch.uint8)
            *rows, width = codes.shape
            shape = [*rows, width // BLOCK_ELEMENTS]
            # bitsandbytes' kernel divides the flat tensor into blocks. If a row is not a multiple
            # of the block size, a block can contain elements of two rows.
            if width % BLOCK_ELEMENTS:
                shape = [ceil_div(codes.numel(), BLOCK_ELEMENTS)]
            scale = torch.zeros(shape, device=codes.device)
            return {
                "exp_avg": codes,
                "exp_avg_sq": codes.clone(),
                "exp_avg_scale": scale,
                "exp_avg_sq_scale": scale.clone(),
                # The step is on the host, because bitsandbytes' kernel takes it as a number.
                "step": torch.zeros(()),
            }
        dtype = torch.float32 if self.rounded else self.weight.dtype
        moment = torch.zeros_like(self.weight, dtype=dtype, requires_grad=False)
        # The fused kernel reads and increments the step on the device, unless `found_inf` is set.
        # For the stochastically rounded update the step is on the host, because `_scalars_of` uses
        # it as the exponent of the bias correction.
        step = torch.zeros((), device="cpu" if self.rounded else moment.device)
        return {"exp_avg": moment, "exp_avg_sq": moment.clone(), "step": step}


class AdamWUpdate:
    """AdamW with the betas, eps and seed of a recipe, on the device of the parameters.

    Attributes:
        takes_found_inf: whether the kernels can skip a step according to `found_inf`, see
            `__call__`.

    Raises:
        MachineError: adamw-8bit is used and bitsandbytes is missing or does not support the device.
    """

    def __init__(self, train: Train, device: torch.device) -> None:
        self.train = train
        self.device = device
        self.rounded = _adamw_rounded
        self.compiled = False
        # Cache the scalars of a step, because they are the same for all tensors with the same
        # weight decay.
        self.scalars_of = lru_cache(maxsize=8)(self._scalars_of)
        self.key_of = lru_cache(maxsize=1)(self._key_of)
        self.functional: Any = None
        if train.optimizer == "adamw-8bit":
            self.functional = packages.bnb_functional("8-bit moments", "train.optimizer")
            # Values of the 256 codes of exp_avg and of exp_avg_sq, which is never negative.
            self.codes = [
                self.functional.create_dynamic_map(signed=signed).to(device)
                for signed in (True, False)
            ]
        self.takes_found_inf = self.functional is None or self._skips_nan()

    @torch.no_grad()
    def _skips_nan(self) -> bool:
        """Return whether bitsandbytes leaves a weight unchanged if its gradient is NaN.

        Its CUDA kernel does, but its CPU code does not. If it does, `Optimizer._clip_and_update`
        skips a step without waiting for the device: it sets all gradients to NaN. This trial update
        also checks that the kernel exists.
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
                fix="run `pip install --upgrade bitsandbytes`, or set train.optimizer=adamw",
            ) from error
        return bool((weight == 1.0).all())

    @torch.no_grad()
    def compile(
        self, parts: Iterable[ParameterState], *, backend: str | Callable[..., object] = "inductor"
    ) -> None:
        """Compile the stochastically rounded update now. Compilation replaces about twelve kernels
        per tensor by one.

        There is one graph for vectors and one for matrices, of any size. They are compiled with
        small tensors whose dimensions differ, because a graph compiled with a square matrix would
        only support square matrices. They are compiled before the first backward, because with
        `optimizer_in_backward` the update runs in an autograd thread.
        """
        device = self.device
        # `dynamic=True` makes the sizes symbolic, so that one graph serves every matrix of the
        # model.
        self.rounded = torch.compile(_adamw_rounded, dynamic=True, fullgraph=True, backend=backend)
        self.compiled = True
        for rank in sorted(
            {part.param.ndim for part in parts if part.rounded and not part.eight_bit}
        ):
            # Use sizes 32 and 48. The compiler would specialize for equal dimensions and for a
            # dimension of 1.
            shape = [16 * (dim + 2) for dim in range(rank)]
            weight = torch.zeros(shape, dtype=torch.bfloat16, device=device)
            grad = weight.clone()
            exp_avg = torch.zeros_like(weight, dtype=torch.float32)
            exp_avg_sq = exp_avg.clone()
            place = torch.zeros(2 + 2 * rank, dtype=torch.int64, device=device)
            key = torch.zeros(2, dtype=torch.int64, device=device)
            scalars = torch.ones(2, 7, device=device)
            found_inf = torch.zeros((), device=device)
            self.rounded(weight, grad, exp_avg, exp_avg_sq, place, key, scalars, found_inf)

    @torch.no_grad()
    def __call__(
        self, parts: Sequence[ParameterState], lr: float, step: int, found_inf: Tensor | None
    ) -> None:
        """Update every weight with its gradient.

        Args:
            lr: learning rate.
            step: step number from 0. The noise of the stochastic rounding depends on it, on the
                parameter's name and on the seed of the recipe.
            found_inf: fp32 [] on the device. If it is 1, no weight changes. With 8-bit moments, all
                gradients must then be NaN and `takes_found_inf` must be True, because bitsandbytes'
                kernel takes no flag. None if the gradients are finite.
        """
        # Group the parameters by weight decay, because the fused kernel has one decay per call.
        fused: dict[float, list[ParameterState]] = {}
        for part in parts:
            # Create the state at the first update, so that a parameter that never gets a gradient
            # uses no memory for it.
            part.state = part.state or part.initial_state()
            if part.eight_bit:
                self._update_8bit(part, lr, step)
            elif part.rounded:
                self._update_rounded(part, lr, step, found_inf)
            else:
                fused.setdefault(part.decay, []).append(part)
        for decay, group in fused.items():
            self._update_fused(group, lr, decay, found_inf)
        for part in parts:
            # Copy the updated master to the 16-bit parameter, which the model computes with.
            if part.has_master:
                local_part(part.param).copy_(part.weight)

    def _update_fused(
        self, parts: list[ParameterState], lr: float, decay: float, found_inf: Tensor | None
    ) -> None:
        beta1, beta2 = self.train.betas
        adamw(
            [part.weight for part in parts],
            [part.grad for part in parts],
            [part.state["exp_avg"] for part in parts],
            [part.state["exp_avg_sq"] for part in parts],
            [],  # max_exp_avg_sqs, only for amsgrad
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

    def _update_8bit(self, part: ParameterState, lr: float, step: int) -> None:
        state = part.state
        beta1, beta2 = self.train.betas
        state["step"] += 1
        if not part.weight.numel():  # all rows of the parameter are on other ranks
            return
        weight: Tensor = part.weight
        # Stochastic rounding needs the result of the update in fp32, so update a temporary copy.
        if part.rounded:
            weight = weight.float()
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
            # The kernel expects one scale per block in the order of the flat codes.
            absmax1=state["exp_avg_scale"].view(-1),
            absmax2=state["exp_avg_sq_scale"].view(-1),
            weight_decay=part.decay,
        )
        if part.rounded:
            key = self.key_of(step)
            # bitsandbytes has updated `weight`, an fp32 copy. Round it stochastically into the
            # parameter.
            for place, updated, rounded in self._pieces(part, weight, part.weight.data):
                rounded.copy_(round_stochastically(updated, noise_at(place, key, updated.shape)))

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
        """Return the `scalars` argument of `_adamw_rounded` for update number `count`.

        The result is a tensor, because a new Python number would make torch.compile build another
        graph.
        """
        beta1, beta2 = self.train.betas
        values = (
            # The last two values include the bias corrections:
            # step_size = lr / (1 - beta1^t), root = sqrt(1 - beta2^t).
            1 - beta1,
            beta2,
            1 - beta2,
            self.train.eps,
            1 - lr * decay,
            lr / (1 - beta1**count),
            (1 - beta2**count) ** 0.5,
        )
        return copy_to_device(torch.tensor((values, NO_UPDATE), dtype=torch.float32), self.device)

    def _key_of(self, step: int) -> Tensor:
        """Return the argument `key` of `noise_at` for a step."""
        return copy_to_device(torch.tensor(_two_words(f"{self.train.seed} {step}")), self.device)

    def _pieces(self, part: ParameterState, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield pieces of the tensors along the first dimension, each with its position for
        `noise_at`.

        The tensors have the shape of the part's weight. If the update is compiled, the entire
        tensors are one piece.
        """
        if part.noise_place is None:
            part.noise_place = copy_to_device(noise_place(part.name, part.param), self.device)
        count = part.weight.numel()
        max_elements = MAX_PIECE_ELEMENTS[self.device.type]
        is_compiled = self.compiled and not part.eight_bit
        if is_compiled or count <= max_elements:
            yield part.noise_place, *tensors
            return
        row_count = len(part.weight)
        rows = max(1, max_elements * row_count // count)
        for start in range(0, row_count, rows):
            place = part.noise_place.clone()
            # place[2] is the index of the first row. Add the start of the piece, so that the noise
            # is the same as for the entire tensor.
            place[2] += start
            yield place, *(tensor[start : start + rows] for tensor in tensors)


def _two_words(text: str) -> list[int]:
    """Return two signed 32-bit integers from the hash of a text."""
    return [*struct.unpack("<2i", hashlib.blake2b(text.encode(), digest_size=8).digest())]


def noise_place(name: str, param: Tensor) -> Tensor:
    """Return the position of this rank's shard for `noise_at`: int64 [2 + 2 * dimensions] on the
    host.

    The first two elements are two words from the hash of the name. Each dimension adds the index of
    the shard's first element in the entire parameter, and the dimension's stride in the entire
    parameter.
    """
    numbers = _two_words(name)
    between = param.numel()
    for part, size in zip(local_slices(param), param.shape, strict=True):
        # Compute the stride of each dimension in the entire parameter, from the first dimension to
        # the last.
        between //= max(1, size)  # between is 0 if a size is 0
        numbers += [part.start, between]
    return torch.tensor(numbers)


def noise_at(place: Tensor, key: Tensor, shape: Sequence[int]) -> Tensor:
    """Return 16-bit uniform noise, int32 from 0 to 65,535, for a shard of a parameter with this
    local shape.

    The noise of an element is a function of its index in the entire parameter, the parameter's
    name, the seed and the step. It is therefore the same on every mesh and device, and no noise is
    drawn for the shards of other ranks. The function is two rounds of an integer hash with little
    bias (C. Wellons, hash-prospector, `lowbias32`). The compiled version stores no noise in memory.

    Args:
        place: result of `noise_place`.
        key: int64 [2], hash of the seed and the step.
    """
    # Combine the name with the seed and step by xor: 64 bits in two words.
    low_key, high_key = (place[:2] ^ key).unbind()
    # The index of an element is the index of the first element of its row plus its index in the
    # row.
    outer = torch.zeros((), dtype=torch.int64, device=place.device)
    inner = outer
    for dim, size in enumerate(shape):
        # `place` is [word, word, first_0, stride_0, first_1, stride_1, ...].
        first = place[2 + 2 * dim]
        inner = (torch.arange(size, device=place.device) + first) * place[3 + 2 * dim]
        if dim < len(shape) - 1:
            # Compute one index per row. The index within the row is added last as int32, so there
            # is no int64 index for every element.
            outer = outer.unsqueeze(-1) + inner
    rows = outer.unsqueeze(-1) if shape else outer
    # The index has 64 bits, but the hash takes 32. Therefore mix the low 32 bits first, and then
    # the high 32 bits of the row index.
    mixed = _mix((_low_word(rows) + _low_word(inner)) ^ _low_word(low_key))
    mixed = _mix(mixed ^ _low_word((rows >> 32) ^ high_key))
    # Return 16 bits of noise, because rounding to bf16 removes 16 bits of an fp32 value.
    return _right_shift(mixed, 16)


def _low_word(number: Tensor) -> Tensor:
    """Return the low 32 bits of int64 values as int32."""
    # The value is congruent modulo 2^32 and within the range of int32, so the cast does not
    # overflow.
    half = 1 << 31
    return (((number + half) & (2 * half - 1)) - half).int()


def _mix(word: Tensor) -> Tensor:
    """Apply a bijective 32-bit hash to int32 values. This may overwrite `word`.

    Products overflow and wrap around.
    """
    word = word.bitwise_xor_(_right_shift(word, 16)).mul_(0x7FEB352D)
    # The constant of `lowbias32` as int32. The lower 32 bits of a product are the same for signed
    # and unsigned factors.
    word = word.bitwise_xor_(_right_shift(word, 15)).mul_(0x846CA68B - (1 << 32))
    return word.bitwise_xor_(_right_shift(word, 16))


def _right_shift(word: Tensor, bits: int) -> Tensor:
    """Shift int32 values right as if they were unsigned."""
    # `>>` on a signed integer copies the sign bit. The mask clears these bits.
    return (word >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """Round fp32 values to bf16, up or down at random, so that the expected value is unchanged.
    `noise` is the result of `noise_at`.

    NaN and infinity are not changed. The tensor `noise` is overwritten.
    """
    # fp32 is bf16 plus 16 more bits. Adding 16-bit noise carries into the last bit of bf16 with a
    # probability of (the lower 16 bits) / 2^16. The lower bits are then cleared.
    bits = noise.add_(value.view(torch.int32)).bitwise_and_(-65536)
    # Noise does not change infinity, because its lower bits are 0. A NaN could become a number, so
    # it is not rounded.
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
    """Update a bf16 weight with AdamW in fp32 and round it stochastically, in place.

    All tensors have the same shape. The moments are fp32.

    Args:
        place, key: position and key of the noise, see `noise_at`.
        scalars: fp32 [2, 7]. The first row is 1 - beta1, beta2, 1 - beta2, eps, the factor of the
            decay, the step size, and the root of the bias correction. The second row is NO_UPDATE,
            which is used if `found_inf` is 1.
    """
    value = weight.float()
    grad = grad.float()
    chosen = scalars[0]
    if found_inf is not None:
        # Use `where` instead of a branch, so that the host does not read the flag and one graph is
        # enough.
        chosen = torch.where(found_inf == 0, scalars[0], scalars[1])
        grad = torch.where(found_inf == 0, grad, 0.0)
    one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, root = chosen.unbind()
    # exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg.lerp_(grad, one_minus_beta1)
    # exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad^2
    exp_avg_sq.mul_(beta2).add_((grad * grad).mul_(one_minus_beta2))
    # (exp_avg / (1 - beta1^t)) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps). The factor 1 / (1 -
    # beta1^t) is included in step_size.
    update = exp_avg / exp_avg_sq.sqrt().div_(root).add_(eps)
    noise = noise_at(place, key, weight.shape)
    # Weight decay scales the weight before the update is subtracted. It does not affect the
    # moments.
    weight.copy_(round_stochastically(value.mul_(decay).sub_(update.mul_(step_size)), noise))
