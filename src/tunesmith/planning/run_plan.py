"""What a run will do on a machine: one frozen value, resolved before anything is built. Importable without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.host.memory import MemoryLimit
from tunesmith.parallel.mesh_shape import ONE, MeshShape
from tunesmith.units import Size

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Machine:
    """What a plan depends on, as `resolve.probe_machine` finds it: memory, and findings with their reasons.

    `free_bytes` can be had now. `card_bytes` is all memory of a GPU, which an `integrated` one shares with the host; on a CPU
    the most that this rank could ever have, within its `limit` (0: not known). `attention` names the backend, `compiles` tells whether layers are compiled, `scaling` is that
    of an 8-bit base or None.
    """

    device: str
    free_bytes: int
    attention: tuple[str, str]
    compiles: tuple[bool, str]
    scaling: tuple[str | None, str] = (None, "")
    card_bytes: int = 0
    integrated: bool = False
    name: str = ""  # of the GPU, as the driver has it
    limit: MemoryLimit | None = None  # of a CPU: what bounds its memory


@dataclass(frozen=True)
class MicroBatchLayout:
    """How examples are laid out in micro batches; the fields are arguments of `data.loader.Loader`."""

    micro_batch: Size
    pad_to: int | None = None
    multiple: int = 1
    bound: int | None = None

    def multiple_of(self, tensor: int) -> MicroBatchLayout:
        """The layout whose micro batches can be cut into `tensor` equal parts."""
        pad_to = None if self.pad_to is None else -(-self.pad_to // tensor) * tensor
        return replace(self, pad_to=pad_to, multiple=math.lcm(self.multiple, tensor))


ONE_EXAMPLE = MicroBatchLayout(Size(1, "examples"))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device while it trains on a micro batch of `tokens`, padding counted, by part."""

    tokens: int = 0
    recomputed_layers: int = 0  # decoder layers that recompute in the backward
    weights: int = 0  # of the base and the adapter
    gradients: int = 0  # as the backward makes them, in the dtype of the weights
    optimizer: int = 0  # what the first optimizer step adds: moments, fp32 masters and gradients
    copies: int = 0  # of an adapter and its moments while its checkpoint is written; without room training waits
    activations: int = 0  # what the layers keep for the backward
    recomputed_layer: int = 0  # of it, for each that recomputes
    gathered: int = 0  # weights whose shards FSDP has gathered, and gradients on the way to theirs
    workspace: int = (
        0  # there for a moment: one layer's gradients, a chunk of logits, the embeddings' rows
    )
    host: int = 0  # in the host's memory, by train.cpu_offload; in none of the sums
    free: int = 0  # what there was before anything was built
    least: int = 0  # what a step on the longest example alone takes, before any gradient is there

    @property
    def static(self) -> int:
        """What does not depend on the micro batch."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.gathered

    @property
    def total(self) -> int:
        return self.static + self.activations + self.workspace

    def describe(self) -> str:
        """The parts, in GiB."""
        names = (
            "weights",
            "gradients",
            "optimizer",
            "gathered",
            "activations",
            "workspace",
            "host",
        )
        parts = [
            (name, vars(self)[name])
            for name in names
            if name not in ("gathered", "host") or vars(self)[name]
        ]
        return ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts) + " GiB"


class Saving(NamedTuple):
    """A change of the recipe, as words of the command line; the bytes that the run then needs; whether a resumed run may."""

    keys: str
    total: int
    resumes: bool


@dataclass(frozen=True)
class RunPlan:
    """What a run does on its machine, and why, by part. The defaults are those of inference.

    `base` is how the base's weights are stored: in a dtype, nf4, or a scaling recipe of fp8. Of the model's decoder
    `layers`, `recomputed_layers` recompute in the backward. `trial_peak` is the most bytes that were allocated before
    the last trial of memory, which begins the allocator's statistics anew. `savings` finds changes that need less memory than this plan.
    """

    device: str
    attention: str
    base: str
    layers: int
    compiled: bool = False
    deterministic: bool = False
    recomputed_layers: int = 0
    fp32_gradients: bool = (
        False  # those of linear layers' weights are added up in fp32 by the products that make them
    )
    cpu_offload: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    layout: MicroBatchLayout = ONE_EXAMPLE
    memory: MemoryEstimate = MemoryEstimate()
    mesh: MeshShape = ONE
    savings: Callable[[], Sequence[Saving]] = (
        tuple  # planned when advice is asked for: it takes some 0.3 s
    )
    trial_peak: int = 0
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, str]:
        """What was decided, by part, as env.json holds it."""
        size, count = self.layout.micro_batch, self.recomputed_layers
        more = {
            "kernels": "deterministic" if self.deterministic else "",
            "weight gradients": "added up in fp32" if self.fp32_gradients else "",
            "cpu offload": ", ".join(self.cpu_offload),
        }
        return {
            "attention": self.attention,
            "loss": "chunked, compiled" if self.compiled else "chunked",
            "base": self.base,
            "compile": "per layer" if self.compiled else "off",
            "recompute": {0: "none", self.layers: "full"}.get(
                count, f"{count} of {self.layers} layers"
            ),
            "micro batch": f"{size.amount:,} {size.unit}",
            **{part: taken for part, taken in more.items() if taken},
        }

    def less_memory(self, *, resumed: bool = False, recompute: bool = True) -> str:
        """The advice for a run that does not fit; `resumed`: it has a checkpoint, `recompute`: that may help."""
        found = [s for s in self.savings() if recompute or not s.keys.startswith("train.recompute")]
        free = [s for s in found if s.resumes]
        keys = " or ".join(
            f"{s.keys} ({s.total / 2**30:.1f} GiB)" for s in (resumed and free) or found
        )
        fresh = " with --fresh" if keys and resumed and not free else ""
        return f"{keys}{fresh}" or "a smaller model, or a device with more memory"

    def describe(self, *, why: bool = False) -> list[str]:
        """One line, `attention backend: varlen; loss: chunked; ...`; with `why` one line a choice, with its reason."""
        labels = {"attention": "attention backend"}
        taken = {part: f"{labels.get(part, part)}: {value}" for part, value in self.choices.items()}
        if not why:
            return ["; ".join(taken.values())]
        width = max(map(len, taken.values()))
        return [f"{text:<{width}}  {self.why[part]}" for part, text in taken.items()]
