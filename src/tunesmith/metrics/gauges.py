"""Readings of the machine's sensors during training, such as power and network traffic.

A sensor that fails never ends a run. A value that cannot be read is omitted.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

Sources = dict[str, Callable[[], float]]
_GPU: dict[str, Callable[[torch.device], float]] = {
    "gpu_utilization": lambda device: float(torch.cuda.utilization(device)),
    "gpu_power_watts": lambda device: torch.cuda.power_draw(device) / 1000.0,
    "gpu_clock_mhz": lambda device: float(torch.cuda.clock_rate(device)),
    "gpu_temperature_celsius": lambda device: float(torch.cuda.temperature(device)),
}


class Gauges:
    """Reader of the machine's sensors. It reads them at most once per `every` seconds.

    An NVML call takes about a millisecond and averages over 1/6 to 1 s, so reading at every step
    gives no more information. If NVML cannot read a value, the value is not requested again. Many
    containers have no NVML, and on chips with unified memory NVML lacks some values.

    Args:
        links: also measure network and NVLink traffic, for runs on several ranks.
        root: folder that contains /sys, for tests.
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
        gauges = _GPU.items() if device.type == "cuda" else ()
        self.gauges: Sources = {name: partial(gauge, device) for name, gauge in gauges}

        # Functions that return the number of bytes transferred since boot. The record has the bytes
        # per second, computed from two readings.
        self.counters: Sources = {}
        if links:
            self.counters["network"] = partial(network_bytes, root)
            # Omit NVLink if NVML cannot find the device.
            with contextlib.suppress(Exception):
                uuid = torch.cuda.get_device_properties(device).uuid
                import pynvml

                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
                self.counters["nvlink"] = partial(nvlink_bytes, handle)

        self._read_at = -every
        self._values: dict[str, float] = {}
        self._counts = _read_all(self.counters)

    def read(self) -> Mapping[str, float]:
        """Return the sensor values. The keys are names of record fields. The units are percent,
        watts, MHz, degrees Celsius and bytes per second.
        """
        now = time.monotonic()
        if now - self._read_at < self.every:
            return self._values
        counts = _read_all(self.counters)
        seconds = max(now - self._read_at, 1e-9)

        self._read_at = now
        self._values = {
            "host_memory_percent": psutil.virtual_memory().percent,
            **_read_all(self.gauges),
        }
        for name, count in counts.items():
            if name in self._counts:
                # The difference is negative if the counter was reset.
                growth = max(0.0, count - self._counts[name])
                self._values[f"{name}_bytes_per_second"] = growth / seconds
        self._counts = counts
        return self._values


def _read_all(sources: Sources) -> dict[str, float]:
    """Call all sources and return their values by name.

    A source that raises OSError is omitted this time. A source that raises another error is
    removed.
    """
    values = {}
    for name, source in list(sources.items()):
        try:
            values[name] = source()
        # The error can be temporary, for example if a port is being reset or a network interface is
        # being recreated. Read this source again next time.
        except OSError:
            continue
        # Catch Exception, because NVML's error type cannot be imported without NVML.
        except Exception:
            del sources[name]
    return values


def network_bytes(root: Path) -> int:
    """Return the number of bytes that this machine sent and received over its network.

    If the machine has RDMA ports, their bytes are counted, else the bytes of the network interface
    that gloo or NCCL uses. The counters are read from /sys below `root`.
    """
    # The counters of RDMA ports count words of four bytes, even if the link is Ethernet.
    words = [*root.glob("sys/class/infiniband/*/ports/*/counters/port_*_data")]
    if words:
        return 4 * sum(int(file.read_text()) for file in words)
    names = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or "lo"
    # NCCL_SOCKET_IFNAME can be a list of names, with "=" before exact names. Use the first name.
    interface = names.lstrip("=").partition(",")[0]
    statistics = root / "sys/class/net" / interface / "statistics"
    return sum(int((statistics / name).read_text()) for name in ("rx_bytes", "tx_bytes"))


def nvlink_bytes(handle: Any) -> int:
    """Return the bytes that a GPU's NVLinks sent and received. NVML counts in KiB."""
    import pynvml

    all_links = 2**32 - 1
    fields = [
        (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, all_links),
        (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, all_links),
    ]
    values = pynvml.nvmlDeviceGetFieldValues(handle, fields)
    if any(value.nvmlReturn for value in values):
        raise OSError("no NVLink")
    return 1024 * sum(value.value.ullVal for value in values)
