"""The machine while it trains: what its gauges show, and whether the chip computes as fast as it
should.

A gauge or a check never ends a run: what cannot be read is left out.
"""

import contextlib
import os
import time
import timeit
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.distributed.ranks import Ranks
from tunesmith.host.chips import Peak
from tunesmith.host.cores import available_cores
from tunesmith.host.memory import unavailable_percent
from tunesmith.metrics.sink import Sink
from tunesmith.units import ratio

# Rows of the short product's matrices: some 0.05 ms on an H100, 1 to 4 ms on a CPU core.
SIZE = {
    "cuda": 2048,
    "cpu": 384,
}
# Products a check; the quickest counts on a CPU, where others take turns.
TIMES = {
    "cuda": 16,
    "cpu": 5,
}
EVERY = 60.0  # seconds between checks: below 0.05 % of a run
SLOW = 0.7  # of the best check
PEAK_SHARE = 1 / 3  # of the chip's peak
IN_A_ROW = 3  # slow checks that are named

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


class ChipCheck:
    """A short product, timed at the start and once per `every` seconds between two steps.

    On CUDA it is queued behind a step and read one step later, so that the host never waits.

    Attributes:
        best: TFLOP/s of the quickest check.
        slow: slow checks in a row.
        warned: a fault was reported, and has not gone since.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        peak: Peak,
        *,
        every: float = EVERY,
    ) -> None:
        self.device = device
        self.peak = peak
        self.every = every
        size = SIZE[device.type]
        self.work = 2 * size**3
        if device.type == "cuda":
            self.work *= TIMES["cuda"]
        else:
            # A CPU may emulate bf16.
            dtype = torch.float32
        self.left = torch.ones(size, size, device=device, dtype=dtype).mul_(0.01)
        self.right = self.left.clone()
        self.out = torch.empty_like(self.left)
        self.best = 0.0
        self.slow = 0
        self.warned = False
        self._checked_at = time.monotonic()
        # Seconds of the current check, None while it runs.
        self._pending: Callable[[], float | None] | None = None

    def first(self) -> float:
        """The check at the start, waited for; the chip is warm after some of them."""
        for _ in range(3):
            self._pending = self._run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            tflops = self.read()
        assert tflops is not None
        return tflops

    def read(self) -> float | None:
        """TFLOP/s of the current check, if it has ended; begins the next one when it is time."""
        if self._pending is None:
            if time.monotonic() - self._checked_at < self.every:
                return None
            self._pending = self._run()
        seconds = self._pending()
        if seconds is None:
            return None
        self._pending = None
        self._checked_at = time.monotonic()
        tflops = ratio(self.work, seconds) / 1e12
        self.best = max(self.best, tflops)
        return tflops

    def _run(self) -> Callable[[], float | None]:
        """Run the product, on CUDA behind what is queued; the function returns its seconds, or None
        while it runs."""
        product = partial(torch.mm, self.left, self.right, out=self.out)
        if self.device.type != "cuda":
            # The quickest of several: a busy core makes others slower, never faster.
            quickest = min(timeit.repeat(product, number=1, repeat=TIMES["cpu"]))
            return lambda: quickest
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(TIMES["cuda"]):
            product()
        end.record()
        # The events are queried, and not waited for: the training goes on meanwhile.
        return lambda: start.elapsed_time(end) / 1000 if end.query() else None

    def fault(self, tflops: float) -> str:
        """Describe what is wrong with this check in a line, once; empty where nothing is, or it has
        been reported.
        """
        # The clock stood still.
        if not tflops:
            return ""
        share = tflops / self.best
        self.slow = self.slow + 1 if share < SLOW else 0
        fault = ""
        if self.peak.tflops and tflops < PEAK_SHARE * self.peak.tflops:
            speeds = f"{tflops:.0f} TFLOP/s where its peak is {self.peak.tflops:.0f}"
            fault = f"the chip computes {speeds}: {self._cause()}"
        elif self.slow >= IN_A_ROW:
            fault = f"the chip computes at {share:.0%} of its speed at the start: {self._cause()}"
        was_warned = self.warned
        self.warned = bool(fault) or (self.warned and self.slow > 0)
        return "" if was_warned else fault

    def _cause(self) -> str:
        """Why a chip may be slow, from what can be seen, with what to do."""
        if self.device.type != "cpu":
            return f"{clock_reason(self.device)}; nvidia-smi -q -d PERFORMANCE shows more"
        load = os.getloadavg()[0]
        cores = available_cores()
        if load > 1.5 * cores:
            return f"other programs use its cores (load {load:.1f} on {cores}); fix: close them"
        return "hot, or on battery; fix: check its temperature and power settings"


_CLOCK_REASONS = {
    "HwThermalSlowdown": "it is hot; fix: check its cooling",
    "SwThermalSlowdown": "it is hot; fix: check its cooling",
    "HwPowerBrakeSlowdown": "its power supply limits it; fix: check the power supply",
    "SwPowerCap": "it is at its power limit; fix: nvidia-smi -q -d POWER shows the limits",
}


def clock_reason(device: torch.device) -> str:
    """Ask NVML what slows a GPU's clock; GB10's stuck low-power state is seen by speed alone."""
    with contextlib.suppress(Exception):
        import pynvml

        mask = pynvml.nvmlDeviceGetCurrentClocksEventReasons(_nvml_device(device))
        for name, text in _CLOCK_REASONS.items():
            if mask & pynvml.__dict__[f"nvmlClocksEventReason{name}"]:
                return text
    return (
        "no reason is reported, which happens in a low-power state that nvidia-smi does not show; "
        "fix: shut down, pull the plug for 30 s, start again"
    )


class Health:
    """Gauges and checks of this rank's machine; what is wrong goes to the sinks as a warning."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, peak: Peak, ranks: Ranks, sink: Sink
    ) -> None:
        self.ranks = ranks
        self.sink = sink
        self.gauges = Gauges(device, links=ranks.world > 1)
        self.chip = ChipCheck(device, dtype, peak)

    def start(self) -> None:
        """Run the first check."""
        self._warn(self.chip.fault(self.chip.first()))

    def read(self) -> dict[str, float]:
        """Fields of a step's record."""
        tflops = self.chip.read()
        if tflops is None:
            return dict(self.gauges.read())
        self._warn(self.chip.fault(tflops))
        return {**self.gauges.read(), "product_tflops": tflops}

    def _warn(self, fault: str) -> None:
        if fault:
            name = f"{self.ranks.name(self.ranks.rank)}: " if self.ranks.world > 1 else ""
            self.sink.text("health", f"warning: {name}{fault}")
