"""The gauges of the machine while it trains.

A gauge never ends a run: a value that cannot be read is left out.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.host.memory import unavailable_percent

Sources = dict[str, Callable[[], float]]
_GPU: dict[str, Callable[[torch.device], float]] = {
    "gpu_utilization": lambda device: float(torch.cuda.utilization(device)),
    "gpu_power_watts": lambda device: torch.cuda.power_draw(device) / 1000.0,
    "gpu_clock_mhz": lambda device: float(torch.cuda.clock_rate(device)),
    "gpu_temperature_celsius": lambda device: float(torch.cuda.temperature(device)),
}


class Gauges:
    """The machine's gauges by the names of their record fields, read at most once per `every`
    seconds.

    NVML takes about a millisecond and averages over 1/6 to 1 s, so reading it at each step adds
    nothing. What NVML fails at is not read again: NVML is missing in many containers and incomplete
    on unified-memory chips. Links are read where several ranks use them.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        links: bool = False,
        every: float = 1.0,
        root: Path = Path("/"),
    ) -> None:
        self.every = every
        self.gauges: Sources = {}
        if device.type == "cuda":
            self.gauges = {name: partial(gauge, device) for name, gauge in _GPU.items()}
        # Bytes so far, of which the record has the growth in a second.
        self.counters: Sources = {}
        if links:
            self.counters["network"] = partial(network_bytes, root)
            handle = _nvml_device(device)
            if handle:
                self.counters["nvlink"] = partial(nvlink_bytes, handle)
        self._read_at = -every
        self._values: dict[str, float] = {}
        self._counts = _read_all(self.counters)

    def read(self) -> Mapping[str, float]:
        """Percent, watts, MHz, degrees Celsius, bytes per second, by their names."""
        now = time.monotonic()
        if now - self._read_at < self.every:
            return self._values
        counts = _read_all(self.counters)
        seconds = max(now - self._read_at, 1e-9)
        self._read_at = now
        self._values = {"host_memory_percent": unavailable_percent(), **_read_all(self.gauges)}
        for name, count in counts.items():
            if name in self._counts:
                # A counter that was reset has fallen.
                growth = max(0.0, count - self._counts[name])
                self._values[f"{name}_bytes_per_second"] = growth / seconds
        self._counts = counts
        return self._values


def _read_all(sources: Sources) -> dict[str, float]:
    """The values of all sources; one whose file is away for a moment is left out, one that fails in
    another way is removed."""
    values = {}
    for name, source in list(sources.items()):
        try:
            values[name] = source()
        # A port that is reset, an interface that is created anew.
        except OSError:
            continue
        # NVML's error type cannot be imported without NVML.
        except Exception:
            del sources[name]
    return values


def network_bytes(root: Path = Path("/")) -> int:
    """Bytes that the RDMA ports of this machine sent and received; without such ports, those of the
    interface that gloo or NCCL uses. Counters of /sys below `root`."""
    # InfiniBand counts its data in words of four bytes, also over Ethernet.
    words = [*root.glob("sys/class/infiniband/*/ports/*/counters/port_*_data")]
    if words:
        return 4 * sum(int(file.read_text()) for file in words)
    names = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or "lo"
    # NCCL takes a list, and "=" before an exact name.
    interface = root / "sys/class/net" / names.lstrip("=").partition(",")[0]
    return sum(
        int((interface / "statistics" / file).read_text()) for file in ("rx_bytes", "tx_bytes")
    )


def _nvml_device(device: torch.device) -> Any:
    """NVML's handle of a CUDA device; None where there is none."""
    with contextlib.suppress(Exception):
        uuid = torch.cuda.get_device_properties(device).uuid
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    return None


def nvlink_bytes(handle: Any) -> int:
    """Bytes of data that a GPU's NVLinks sent and received; NVML counts them in KiB."""
    import pynvml

    fields = [
        pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
        pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
    ]
    all_links = 2**32 - 1
    values = pynvml.nvmlDeviceGetFieldValues(handle, [(field, all_links) for field in fields])
    if any(value.nvmlReturn for value in values):
        raise OSError("no NVLink")
    return 1024 * sum(value.value.ullVal for value in values)
