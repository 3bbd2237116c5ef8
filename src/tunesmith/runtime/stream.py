"""Frozen weights that wait in the host's memory and come to the device one layer at a time.

The frozen matrices of a streamed layer lie in one block of page-locked host memory. Two slots on
the device take turns: number j of the layers that stream computes in slot j mod 2, while the next
one is copied into the other, on a stream of its own. Addresses never change, so nothing is bound or
compiled anew. A backward reads its matrices where the forward left views of them: a hook on the
layer's output brings them back before it runs. At both turns of a micro batch the last two layers
are still there, so n layers take 2 (n - 2) copies. A copy begins when its slot is free, and the
host waits for none.

Where the driver page-locks only a part of the memory (containers, WSL), a thread copies the other
layers into one of two page-locked blocks before their turn; there the host waits for the thread.

A matrix that is read outside its layer's forward and backward is another layer's.
"""

import mmap
import sys
import time
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from rich.filesize import decimal as size_text
from torch import Tensor, nn

from tunesmith.errors import MachineError
from tunesmith.model.fused import add_mixin
from tunesmith.runtime.transfer import Mark
from tunesmith.units import ceil_div

SLOTS = 2
LINK_BYTES = 1 << 27  # copied at a time to measure the link
ALIGNED_BYTES = 256  # as blocks of CUDA's own allocator, whose alignment kernels expect


class HostLayer(NamedTuple):
    """A streamed layer; each of its matrices begins at its offset of the block, in bytes.

    locked: the block is page-locked, so that the device copies from it by itself.
    """

    layer: nn.Module
    block: Tensor
    offsets: dict[str, int]
    locked: bool = True

    def places(self, block: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each matrix by its name, and its place in a block of this layout."""
        for name, offset in self.offsets.items():
            like = self.layer.get_parameter(name)
            place = block[offset : offset + like.nbytes]
            yield name, place.view(like.dtype).view(like.shape)

    def bind(self, block: Tensor) -> None:
        """Let the layer compute with the matrices of a block."""
        for name, place in self.places(block):
            self.layer.get_parameter(name).data = place


class LayerStream:
    """The streamed layers of a model, in the order of its forward.

    Args:
        layers: of the model, on meta. The matrices of those that stream get their memory here, on
            the host, where they are loaded; then `attach` binds them to the device.
        count: of them that stream; the others lie evenly between them.
        stays: parameters that are not moved.

    Attributes:
        copies: layers that were copied to the device so far.

    Raises:
        MachineError: the driver cannot page-lock two layers of the host's memory.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        count: int,
        device: torch.device,
        stays: Collection[nn.Parameter] = (),
    ) -> None:
        self.layers = layers
        self.device = device
        self.copies = 0
        self.streamed: list[HostLayer] = []
        self._slots: list[Tensor] = []
        self._held: list[int | None] = []
        self._locked: list[Tensor] = []
        self._staging: list[Tensor] = []  # one a slot; empty where all blocks are page-locked
        self._staged: list[Future[None] | None] = [None] * SLOTS
        self._thread = ThreadPoolExecutor(1)  # starts with its first work
        self._stream: torch.cuda.Stream | None = None
        self._copied: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._copied = [torch.cuda.Event() for _ in range(SLOTS)]
        # At the end of the process the driver does it.
        weakref.finalize(self, page_unlock, self._locked, device).atexit = False
        uses = Counter(parameter for layer in layers for parameter in layer.parameters())
        shared = {parameter for parameter, count in uses.items() if count > 1}
        for number in evenly(count, len(layers)):
            self._move(layers[number], shared.union(stays))
        self._lock()

    def _move(self, layer: nn.Module, stays: Collection[nn.Parameter]) -> None:
        """Give the matrices of a layer on meta their memory on the host."""
        offsets = {}
        size = 0
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 1 and not parameter.requires_grad and parameter not in stays:
                offsets[name] = size
                size += ceil_div(parameter.nbytes, ALIGNED_BYTES) * ALIGNED_BYTES
        if not size:
            return
        host = HostLayer(layer, host_block(size), offsets)
        for name, place in host.places(host.block):
            owner, _, key = name.rpartition(".")
            parameter = nn.Parameter(place, requires_grad=False)
            layer.get_submodule(owner).register_parameter(key, parameter)
        self.streamed.append(host)

    def _lock(self) -> None:
        """Page-lock the blocks; where the driver does not take all, as many as leave room for two
        that the others are staged in.
        """
        error = 0
        for host in self.streamed:
            error = page_lock(host.block, self.device)
            if error:
                break
            self._locked.append(host.block)
        if not error:
            return
        count = len(self._locked)
        freed = 0
        while count and freed < SLOTS * self.slot_bytes:
            count -= 1
            freed += self._locked[count].nbytes
        page_unlock(self._locked[count:], self.device)
        del self._locked[count:]
        self.streamed[count:] = [host._replace(locked=False) for host in self.streamed[count:]]
        self._staging = [host_block(self.slot_bytes) for _ in range(SLOTS)]
        for block in self._staging:
            if page_lock(block, self.device):
                raise MachineError(
                    f"the driver cannot page-lock {size_text(SLOTS * block.nbytes)} of the host's "
                    "memory",
                    where="train.cpu_offload",
                    why=f"cudaHostRegister returned error {error}",
                    fix="train.cpu_offload=[] with model.quantize=nf4, or more memory for this "
                    "process",
                )
            self._locked.append(block)

    def describe_staging(self) -> str:
        """A line on the layers that a thread copies first, and how fast; empty where none are."""
        staged = [host.block for host in self.streamed if not host.locked]
        if not staged:
            return ""
        self._finish()  # a copy from there may be on its way
        began = time.perf_counter()
        self._staging[0][: staged[0].nbytes].copy_(staged[0])
        rate = staged[0].nbytes / (time.perf_counter() - began)
        return (
            f"{len(staged)} of {len(self.streamed)} streamed layers lie in memory that the driver "
            f"does not page-lock: a thread copies them first, with {size_text(int(rate))}/s"
        )

    @property
    def parameters(self) -> set[nn.Parameter]:
        """The parameters of the streamed layers that are on the host until `attach`."""
        return {host.layer.get_parameter(name) for host in self.streamed for name in host.offsets}

    @property
    def host_bytes(self) -> int:
        return sum(host.block.nbytes for host in self.streamed)

    @property
    def slot_bytes(self) -> int:
        return max((host.block.nbytes for host in self.streamed), default=0)

    def attach(self) -> None:
        """Let the layers compute on the device: once they are loaded, and after all that wraps
        them.
        """
        self._slots = [self._empty(self.slot_bytes) for _ in range(SLOTS)]
        for layer in self.layers:
            # All of them: layers of two classes would be compiled twice.
            add_mixin(layer, StreamedLayer).stream = self
        self._bind()

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _bind(self) -> None:
        """Give every streamed layer its turn, and its slot."""
        self._held = [None] * SLOTS
        turns = {host.layer: turn for turn, host in enumerate(self.streamed)}
        for layer in self.layers:
            assert isinstance(layer, StreamedLayer)  # since `attach`
            layer.turn = turns.get(layer)
        for turn, host in enumerate(self.streamed):
            host.bind(self._slots[turn % SLOTS])

    def _finish(self) -> None:
        """Return when all copies have arrived."""
        for slot in range(SLOTS):
            self._wait_staged(slot)
        if self._stream is not None:
            torch.cuda.synchronize(self.device)

    def _wait_staged(self, slot: int) -> None:
        """Return when the thread has issued the copy into a slot, if it has one to make."""
        staged = self._staged[slot]
        if staged is not None:
            staged.result()

    def take(self, turn: int, ahead: int) -> None:
        """Have a layer in its slot for what is issued next, and begin to bring another one, which
        the other slot is for.
        """
        slot = turn % SLOTS
        if self._held[slot] != turn:
            self._bring(turn)
        self._wait_staged(slot)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied[slot])
        if 0 <= ahead < len(self.streamed) and self._held[ahead % SLOTS] != ahead:
            self._bring(ahead)

    def _bring(self, turn: int) -> None:
        """Copy a layer into its slot, after all that was issued: it reads what is there."""
        slot = turn % SLOTS
        host = self.streamed[turn]
        issued = torch.cuda.current_stream(self.device).record_event() if self._stream else None
        self._held[slot] = turn
        self.copies += 1
        self._wait_staged(slot)  # of a layer that took no turn: else it might come after this copy
        if host.locked:
            self._copy(host.block, slot, issued)
        else:
            self._staged[slot] = self._thread.submit(self._stage, host.block, slot, issued)

    def _stage(self, block: Tensor, slot: int, issued: torch.cuda.Event | None) -> None:
        """Copy a block by way of the page-locked one of its slot, in the thread."""
        if self._copied:
            self._copied[slot].synchronize()  # the last copy from there
        self._copy(self._staging[slot][: block.nbytes].copy_(block), slot, issued)

    def _copy(self, block: Tensor, slot: int, issued: torch.cuda.Event | None) -> None:
        place = self._slots[slot][: block.nbytes]
        if self._stream is None or issued is None:
            place.copy_(block)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(issued)
            place.copy_(block, non_blocking=True)
            self._copied[slot].record()


class StreamedLayer(nn.Module):
    """A layer whose matrices are brought before its forward, and again before its backward.

    Attributes:
        turn: its number among the streamed layers; None: it stays on the device.
    """

    stream: LayerStream
    turn: int | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.stream
        turn = self.turn
        if turn is None:
            return super().forward(*args, **kwargs)
        stream.take(turn, turn + 1)
        output = super().forward(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            # Called before the first node of the layer's backward, on its stream. All that reads
            # the matrices of later layers was issued before.
            hidden.register_hook(lambda gradient: stream.take(turn, turn - 1))
        return output


def streamed_modules(model: nn.Module) -> set[nn.Module]:
    """All modules whose matrices are on the device during their layer's passes alone."""
    layers = [layer for layer in model.modules() if isinstance(layer, StreamedLayer)]
    return {module for layer in layers if layer.turn is not None for module in layer.modules()}


def evenly(count: int, total: int) -> list[int]:
    """So many of the numbers below `total`, evenly spread."""
    return [number * total // count for number in range(count)]


def host_block(size: int) -> Tensor:
    """Bytes of the host, in pages of their own: large ones where the system has them, which are
    locked in a fraction of the time.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        # A child process would get a copy of locked pages.
        memory.madvise(mmap.MADV_DONTFORK)
        with suppress(OSError):  # of kernels that are built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def page_lock(block: Tensor, device: torch.device) -> int:
    """Page-lock a block of the host for a GPU; the driver's error, or 0.

    `pin_memory` would copy it, into a power of two of bytes.
    """
    if device.type != "cuda":
        return 0
    code = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    if code:
        # CUDA's runtime keeps its last error, and the next kernel raises it: this one.
        with suppress(RuntimeError):
            torch.empty(1, device=device).fill_(1)
    return code


def host_link(device: torch.device) -> float:
    """Measure copies from page-locked memory to a GPU, in GB/s; it takes a tenth of a second."""
    block = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    place = torch.empty_like(block, device=device)
    marks = [Mark(device)]
    for _ in range(4):
        place.copy_(block, non_blocking=True)
        marks.append(Mark(device))
    # Without the first copy.
    return 3 * block.nbytes / marks[-1].seconds_since(marks[1]) / 1e9


def page_unlock(blocks: list[Tensor], device: torch.device) -> None:
    """Release page-locked blocks, before their memory goes."""
    if device.type != "cuda" or not blocks:
        return
    torch.cuda.synchronize(device)
    for block in blocks:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
