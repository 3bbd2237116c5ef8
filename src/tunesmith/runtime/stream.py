"""Frozen weights in host memory that are copied to the device one layer at a time.

The frozen matrices of a streamed layer are in one block of page-locked host memory. There are two
slots on the device. Streamed layer number j computes in slot j mod 2, while the next layer is
copied into the other slot on a separate stream. The addresses of the slots never change, so the
parameters are assigned only once and no graph is compiled again. The backward of a layer reads the
matrices through views of the slot that the forward saved. Therefore a hook on the layer's output
copies the matrices into the slot again before the backward. At the end of the forward and of the
backward, the last two layers are still in the slots, so n layers need 2 (n - 2) copies per micro
batch. A copy starts when no work reads its slot any more, and the host does not wait for copies.

In containers and in WSL, the driver may allow only a part of the memory to be page-locked. For each
of the other layers, a thread then first copies the layer into one of two page-locked blocks. In
this case the host waits for the thread.

A parameter of a streamed layer has the right values only during the forward and backward of its
layer. At other times, the slot may contain the values of another layer.
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
from tunesmith.model.layers.fused import add_mixin
from tunesmith.runtime.transfer import Mark
from tunesmith.units import ceil_div

SLOTS = 2
LINK_BYTES = 1 << 27  # bytes of one copy when the link's bandwidth is measured
ALIGNED_BYTES = 256  # alignment of blocks in CUDA's own allocator, which kernels expect


class HostLayer(NamedTuple):
    """A streamed layer and its block of host memory.

    Attributes:
        block: contains all streamed matrices of the layer.
        offsets: the first byte of each matrix in the block.
        locked: whether the block is page-locked, so that the device can copy from it directly.
    """

    layer: nn.Module
    block: Tensor
    offsets: dict[str, int]
    locked: bool = True

    def places(self, block: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, view) for each matrix. The view is the part of `block` that contains the
        matrix.
        """
        for name, offset in self.offsets.items():
            like = self.layer.get_parameter(name)
            place = block[offset : offset + like.nbytes]
            yield name, place.view(like.dtype).view(like.shape)

    def bind(self, block: Tensor) -> None:
        """Set the layer's parameters to the views of the matrices in `block`."""
        for name, place in self.places(block):
            self.layer.get_parameter(name).data = place


class LayerStream:
    """The streamed layers of a model in the order of its forward.

    Args:
        layers: layers of the model on the meta device. The matrices of the streamed layers are
            allocated on the host, where they are loaded. `attach` binds them to the device later.
        count: number of streamed layers. They are evenly distributed over the model, so that the
            layers between them give time for the copies.
        stays: parameters that stay on the device.

    Attributes:
        copies: number of layer copies to the device so far.

    Raises:
        MachineError: the driver cannot page-lock host memory for two layers.
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
        self._held: list[int | None] = [None] * SLOTS
        self._locked: list[Tensor] = []
        self._staging: list[Tensor] = []  # one block per slot; empty if all layers are page-locked
        self._staged: list[Future[None] | None] = [None] * SLOTS
        self._thread = ThreadPoolExecutor(1)  # the thread starts with its first task

        self._stream: torch.cuda.Stream | None = None
        self._copied: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._copied = [torch.cuda.Event() for _ in range(SLOTS)]

        # Do not unlock at the exit of the process, because the driver does this then.
        weakref.finalize(self, page_unlock, self._locked, device).atexit = False

        uses = Counter(parameter for layer in layers for parameter in layer.parameters())
        unmoved = {parameter for parameter, count in uses.items() if count > 1}.union(stays)
        for number in range(count):
            # The streamed layers are evenly distributed.
            self._allocate_on_host(layers[number * len(layers) // count], unmoved)
        self._lock()

    def _allocate_on_host(self, layer: nn.Module, stays: Collection[nn.Parameter]) -> None:
        """Allocate host memory for the matrices of a layer that is on the meta device."""
        offsets = {}
        size = 0
        for name, parameter in layer.named_parameters():
            is_frozen_matrix = parameter.ndim > 1 and not parameter.requires_grad
            if is_frozen_matrix and parameter not in stays:
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
        """Page-lock the blocks of all layers.

        If the driver does not allow this for all blocks, some blocks are unlocked again, so that
        two staging blocks for the other layers can be page-locked.
        """
        locked = self._locked
        for host in self.streamed:
            error = page_lock(host.block, self.device)
            if error:
                break
            locked.append(host.block)
        else:
            return

        count = len(locked)
        freed = 0
        while count and freed < SLOTS * self.slot_bytes:
            count -= 1
            freed += locked[count].nbytes
        page_unlock(locked[count:], self.device)
        del locked[count:]
        self.streamed[count:] = [host._replace(locked=False) for host in self.streamed[count:]]

        self._staging = [host_block(self.slot_bytes) for _ in range(SLOTS)]
        for block in self._staging:
            if page_lock(block, self.device):
                raise MachineError(
                    f"the driver cannot page-lock {size_text(SLOTS * block.nbytes)} of the host's "
                    "memory",
                    where="train.cpu_offload",
                    why=f"cudaHostRegister returned error {error}",
                    fix="set train.cpu_offload=[] and model.quantize=nf4, or give this process "
                    "more memory",
                )
            locked.append(block)

    def measure_staging(self) -> tuple[int, int]:
        """Return the number of layers that a thread copies to staging blocks, and its bytes per
        second.

        Both are 0 if the blocks of all layers are page-locked.
        """
        staged = [host.block for host in self.streamed if not host.locked]
        if not staged:
            return 0, 0
        block = staged[0]
        # Wait for copies that may still read the staging blocks.
        for slot in range(SLOTS):
            self._wait_staged(slot)
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        self._staging[0][: block.nbytes].copy_(block)
        return len(staged), int(block.nbytes / (time.perf_counter() - began))

    @property
    def parameters(self) -> set[nn.Parameter]:
        """Parameters of the streamed layers. They are on the host until `attach` is called."""
        return {host.layer.get_parameter(name) for host in self.streamed for name in host.offsets}

    @property
    def host_bytes(self) -> int:
        return sum(host.block.nbytes for host in self.streamed)

    @property
    def slot_bytes(self) -> int:
        return max((host.block.nbytes for host in self.streamed), default=0)

    def attach(self) -> None:
        """Bind the streamed layers to the slots, so that they compute on the device.

        Call this after the weights are loaded and after all other wrappers are added.
        """
        self._slots = [
            torch.empty(self.slot_bytes, dtype=torch.uint8, device=self.device)
            for _ in range(SLOTS)
        ]
        turns = {host.layer: turn for turn, host in enumerate(self.streamed)}
        for layer in self.layers:
            # Also add the mixin to layers that are not streamed, because each graph would be
            # compiled twice if the layers had two classes.
            streamed = add_mixin(layer, StreamedLayer)
            streamed.stream = self
            streamed.turn = turns.get(layer)

        for turn, host in enumerate(self.streamed):
            host.bind(self._slots[turn % SLOTS])
        self._held = [None] * SLOTS

    def _wait_staged(self, slot: int) -> None:
        """Wait until the thread has issued its copy into a slot. Return at once if no copy is
        pending.
        """
        staged = self._staged[slot]
        if staged is not None:
            staged.result()

    def take(self, turn: int, ahead: int) -> None:
        """Make sure that streamed layer number `turn` is in its slot. Start the copy of streamed
        layer number `ahead` into the other slot.
        """
        slot = turn % SLOTS
        if self._held[slot] != turn:
            self._copy_to_slot(turn)
        self._wait_staged(slot)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied[slot])
        if 0 <= ahead < len(self.streamed) and self._held[ahead % SLOTS] != ahead:
            self._copy_to_slot(ahead)

    def _copy_to_slot(self, turn: int) -> None:
        """Copy a layer into its slot. The copy starts after all work that is already issued,
        because this work may read the slot.
        """
        slot = turn % SLOTS
        host = self.streamed[turn]
        issued = torch.cuda.current_stream(self.device).record_event() if self._stream else None
        self._held[slot] = turn
        self.copies += 1
        self._wait_staged(slot)  # an earlier copy by the thread must not finish after this one
        if host.locked:
            self._copy(host.block, slot, issued)
        else:
            self._staged[slot] = self._thread.submit(self._stage, host.block, slot, issued)

    def _stage(self, block: Tensor, slot: int, issued: torch.cuda.Event | None) -> None:
        """Copy a block to the device through the page-locked block of its slot.

        This function runs in the thread.
        """
        if self._copied:
            self._copied[slot].synchronize()  # wait for the last copy from the staging block
        locked = self._staging[slot][: block.nbytes]
        self._copy(locked.copy_(block), slot, issued)

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
    """A layer whose matrices are copied to the device before its forward and again before its
    backward.

    Attributes:
        turn: number of this layer among the streamed layers. None if the layer is not streamed.
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
            # The hook runs before the layer's backward, on the same stream. At this time, all work
            # that reads the matrices of later layers is already issued, so their slot can be
            # overwritten.
            hidden.register_hook(lambda gradient: stream.take(turn, turn - 1))
        return output


def host_block(size: int) -> Tensor:
    """Return a block of host memory that shares no page with other memory.

    Huge pages are used if the system supports them, because they can be page-locked in a fraction
    of the time.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        # Exclude the pages from child processes, because a fork would copy page-locked pages.
        memory.madvise(mmap.MADV_DONTFORK)
        with suppress(OSError):  # the kernel does not support huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def page_lock(block: Tensor, device: torch.device) -> int:
    """Page-lock a block of host memory for a GPU. Return the driver's error code, or 0.

    `pin_memory` is not used, because it would copy the block and round its size up to a power of
    two.
    """
    if device.type != "cuda":
        return 0
    code = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    if code:
        # CUDA's runtime stores its last error, and the next kernel launch raises this error. Launch
        # a small kernel to clear it.
        with suppress(RuntimeError):
            torch.empty(1, device=device).fill_(1)
    return code


def host_link(device: torch.device) -> float:
    """Measure the speed of copies from page-locked memory to a GPU, in GB/s. This takes 0.1 s."""
    block = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    place = torch.empty_like(block, device=device)
    marks = []
    for _ in range(4):
        place.copy_(block, non_blocking=True)
        marks.append(Mark(device))

    # The first copy is a warm-up and is not counted.
    return 3 * block.nbytes / marks[-1].seconds_since(marks[0]) / 1e9


def page_unlock(blocks: list[Tensor], device: torch.device) -> None:
    """Unlock page-locked blocks. Call this before their memory is freed."""
    if device.type != "cuda" or not blocks:
        return
    torch.cuda.synchronize(device)
    for block in blocks:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
