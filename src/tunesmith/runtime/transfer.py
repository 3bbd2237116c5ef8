"""Between host and device without waiting: batches go ahead of the step, numbers and copies come back behind it.

The one file that knows streams, events and pinned memory. The rule behind all of it: work is done in the order in which
a stream was given it, so what is put on the stream in use is made *after* everything that was given before it, and an
event says when. Asking for a value in any other way (`float(tensor)`) queues a copy behind everything given so far, the
next step's kernels too, and so waits for a step that it does not need.

On the CPU everything has been done when the call returns: marks are free, nothing is pinned or copied twice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tunesmith.data.batch import Batch


class StreamEvent:
    """A point in the work of a device: all that its stream in use had been given when the mark was made."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Hold this thread until the device has come to the mark; what it was given later is not waited for."""
        if self._event is not None:
            self._event.synchronize()


class AsyncScalars:
    """Numbers of a step on their way to the host; `read` waits for that step only.

    Args:
        values: 0-d tensors of one device. They are copied here and now in stream order, so they may change afterwards.
    """

    def __init__(self, *values: Tensor) -> None:
        # float64 holds every fp32 exactly, so that one copy can carry both.
        made = torch.stack([value.detach().double() for value in values])
        # A copy into pageable memory makes the host wait, whatever it is told.
        self._host = torch.empty(made.shape, dtype=made.dtype, pin_memory=made.is_cuda)
        self._host.copy_(made, non_blocking=True)
        self._made = StreamEvent(made.device)

    def read(self) -> list[float]:
        """The numbers, in the order given."""
        self._made.wait()
        return [float(value) for value in self._host.tolist()]


class Snapshot:
    """Copies of tensors as they are at this point of the work, made on their own device without waiting for it.

    They take as much memory there as the tensors do, until `on_host` has been called.

    Args:
        tensors: any devices of one machine; those of a GPU must all be on the same one.

    Raises:
        torch.OutOfMemoryError: there is no room for them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._device = next((t.device for t in self._tensors.values() if t.is_cuda), torch.device("cpu"))
        self._made = StreamEvent(self._device)

    def on_host(self) -> dict[str, Tensor]:
        """The copies, contiguous and in host memory; call it once, from whichever thread is to wait for them."""
        tensors, self._tensors = self._tensors, {}
        if self._device.type != "cuda":
            return {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._made.wait()
        # On a stream of its own: on the one in use the copies would queue up behind the step that now runs. Each is
        # done when `.cpu()` returns, so that the memory may go back to the pool of the stream that made it.
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            return {name: tensors.pop(name).cpu().contiguous() for name in list(tensors)}


class DevicePrefetcher:
    """Puts micro batches on a GPU from the thread that makes them, so that a step finds its tokens there.

    Call it in that thread; `claim` in the one that takes the batch.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, all of it there: the copy is waited for here, where nobody waits for this thread."""
        # A thread begins with device 0 as its own, whatever the main thread has chosen.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            placed = batch.each(Tensor.pin_memory).to(self._device)
            self._stream.synchronize()
        return placed

    def claim(self, batch: Batch) -> None:
        """Tell the allocator that the stream in use reads the batch.

        Its memory belongs to the placer's stream, which would hand it out again as soon as Python lets go of the batch,
        while kernels given to the other stream have yet to read it.
        """
        stream = torch.cuda.current_stream(self._device)
        for tensor in batch.tensors().values():
            tensor.record_stream(stream)
