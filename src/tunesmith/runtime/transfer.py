"""Transfers between host and device without waiting.

Batches go ahead of the step, metrics and copies come back later. A stream runs its work in issue
order: `.item()` would wait for the next step's kernels as well, so values are copied to pinned
memory and an event says when they are there. On a CPU all work is complete when a call returns:
there are no events.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from tunesmith.data.batches.batch import Batch


class Mark:
    """A moment in the work of a device: all that was issued to its current stream is done.

    The host issues a step long before a GPU is through with it, so a GPU's time is that of a CUDA
    event. A CPU's is the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._host_time = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._host_time = time.perf_counter()

    def wait(self) -> None:
        """Return when the device has come here."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Device time from an earlier mark of the same stream to this one; waits for this one."""
        if self._event is None or earlier._event is None:
            return self._host_time - earlier._host_time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


class AsyncScalars:
    """0-d tensors of one device on their way to the host; they may change afterwards.

    `read` waits for their step only.
    """

    def __init__(self, *values: Tensor) -> None:
        # float64 holds every fp32 exactly, so that one copy can carry both.
        stacked = torch.stack([value.detach().double() for value in values])
        # A copy into pageable memory blocks the host, even with non_blocking.
        self._host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=stacked.is_cuda)
        self._host.copy_(stacked, non_blocking=True)
        self._copied = Mark(stacked.device)

    def read(self) -> list[float]:
        """The values, in the order of the arguments."""
        self._copied.wait()
        return [float(value) for value in self._host.tolist()]


class Snapshot:
    """Copies of tensors at this point of the stream, copied on their own device without waiting.

    They take as much memory there as the tensors, which may be on the host and on one GPU, until
    `on_host` is called; torch.OutOfMemoryError where there is no room for them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        devices = [tensor.device for tensor in self._tensors.values() if tensor.is_cuda]
        self._device = devices[0] if devices else torch.device("cpu")
        self._copied = Mark(self._device)

    def on_host(self) -> dict[str, Tensor]:
        """The copies, contiguous and in host memory.

        Call it once, from any thread, which then waits for them.
        """
        tensors = self._tensors
        self._tensors = {}
        if self._device.type != "cuda":
            return {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._copied.wait()
        # On a stream of its own: on the current one the copies would queue up behind the step that
        # now runs. Each is complete when `.cpu()` returns, so that the memory may go back to the
        # pool of the stream that allocated it.
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            return {name: tensors.pop(name).cpu().contiguous() for name in list(tensors)}


class DevicePrefetcher:
    """Copies micro batches to a GPU in the thread that makes them.

    `record_stream` is for the thread that takes them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device, with its pictures in pinned memory of the host.

        This thread waits for the copy. No other thread waits for this one.
        """
        # A new thread's current device is 0, whatever the main thread has chosen.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            placed = batch.map_tensors(Tensor.pin_memory).to(self._device)
            self._stream.synchronize()
        return placed

    def record_stream(self, batch: Batch) -> None:
        """Tell the allocator that the current stream reads the batch.

        Else the prefetcher's stream, which owns the memory, reuses it as soon as Python frees the
        batch.
        """
        stream = torch.cuda.current_stream(self._device)
        for tensor in batch.tensors().values():
            if tensor.is_cuda:
                tensor.record_stream(stream)
