"""Transfers between host and device that do not wait.

Batches are copied to the device before their step. Metrics and snapshots are copied to the host
after the step. A CUDA stream runs its work in issue order, so `.item()` would also wait for the
kernels of the next step. Values are therefore copied to pinned memory, and an event shows when they
have arrived. On a CPU all work is complete when a call returns, so there are no events.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from tunesmith.batches.batch import Batch


class Mark:
    """A position in the device's current stream. The device reaches it when all work that was
    issued earlier is done.

    The host issues a step long before a GPU has finished it, so the time of a GPU is measured with
    a CUDA event. On a CPU, the clock of the host is used.
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
        """Wait until the device has reached this mark."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Return the device time since an earlier mark of the same stream.

        This waits for the mark.
        """
        if self._event is None or earlier._event is None:
            return self._host_time - earlier._host_time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


class AsyncScalars:
    """Copies of scalar tensors from one device to the host. The tensors may be changed after the
    object is created.

    `read` waits only for the work that was issued before the copy.
    """

    def __init__(self, *values: Tensor) -> None:
        # float64 represents every fp32 value and large integers exactly, so one copy is enough for
        # all values.
        stacked = torch.stack([value.detach().double() for value in values])
        # Use pinned memory: a copy to pageable memory blocks the host even with non_blocking.
        self._host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=stacked.is_cuda)
        self._host.copy_(stacked, non_blocking=True)
        self._copied = Mark(stacked.device)

    def read(self) -> list[float]:
        """Return the values in the order of the arguments."""
        self._copied.wait()
        return [float(value) for value in self._host.tolist()]


class Snapshot:
    """Copies of tensors with the values at this point of the stream. The copies are made on the
    device of the tensors, and the host does not wait.

    The tensors may be on the host and on one GPU. Until `on_host` is called, the copies take as
    much memory on the device as the tensors. Raise torch.OutOfMemoryError if the device does not
    have enough memory for the copies.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        devices = (tensor.device for tensor in self._tensors.values() if tensor.is_cuda)
        self._device = next(devices, torch.device("cpu"))
        self._copied = Mark(self._device)

    def on_host(self) -> dict[str, Tensor]:
        """Return the copies, contiguous and in host memory.

        Call this only once. It can be called from any thread, and it waits for the copies.
        """
        tensors = self._tensors
        self._tensors = {}
        if self._device.type != "cuda":
            return {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._copied.wait()
        # Use a separate stream: on the current stream, the transfers would wait for the step that
        # is running. Each transfer is complete when `.cpu()` returns, so its memory can be returned
        # to the pool of the stream that allocated it.
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            return {name: tensors.pop(name).cpu().contiguous() for name in list(tensors)}


class DevicePrefetcher:
    """Callable that copies micro batches to a GPU. It is called in the thread that creates the
    batches.

    The thread that uses a batch must call `record_stream`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Batch:
        """Copy the batch to the device and return it. The images of the returned batch are in
        pinned host memory.

        Only the calling thread waits for the copy.
        """
        # Set the device, because the current device of a new thread is always device 0, even if the
        # main thread uses another device.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            placed = batch.map_tensors(Tensor.pin_memory).to(self._device)
            self._stream.synchronize()
        return placed

    def record_stream(self, batch: Batch) -> None:
        """Record for the allocator that the current stream reads the batch.

        Without this call, the memory of the batch would be reused by the prefetcher's stream as
        soon as Python frees the batch.
        """
        stream = torch.cuda.current_stream(self._device)
        for tensor in batch.tensors().values():
            if tensor.is_cuda:
                tensor.record_stream(stream)
