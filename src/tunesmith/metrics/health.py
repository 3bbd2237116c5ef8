"""The machine while it trains: what its gauges show, and whether the chip computes as fast as it should.

A gauge or a check never ends a run: what cannot be read is left out.
"""

import contextlib
import os
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tunesmith.distributed.ranks import Ranks
from tunesmith.host.chips import Peak
from tunesmith.host.cores import available_cores, control_groups
from tunesmith.host.memory import unavailable_percent
from tunesmith.metrics.sink import Sink
from tunesmith.units import ratio

# Of the short product: some 0.05 ms on an H100, 1 to 4 ms on a CPU core
SIZE = {
    "cuda": 2048,
    "cpu": 384,
}
# Products a check; the quickest counts on a CPU, where others take turns
TIMES = {
    "cuda": 16,
    "cpu": 5,
}
EVERY = 60.0  # seconds between checks: below 0.05 % of a run
# Of the best check, of the chip's peak; of the time by a limit on cores
SLOW, PEAK_SHARE, THROTTLED = (
    0.7,
    1 / 3,
    0.2,
)
IN_A_ROW = 3  # slow checks that are named

Sources = dict[str, Callable[[], float]]
_GPU: dict[str, Callable[[torch.device], float]] = {
    "gpu_utilization": lambda device: float(torch.cuda.utilization(device)),
    "gpu_power_watts": lambda device: torch.cuda.power_draw(device) / 1000.0,
    "gpu_clock_mhz": lambda device: float(torch.cuda.clock_rate(device)),
    "gpu_temperature_celsius": lambda device: float(torch.cuda.temperature(device)),
}


class Gauges:
    """The machine's gauges by the names of their record fields, read at most once per `every` seconds.

    NVML takes about a millisecond and averages over 1/6 to 1 s, so reading it at each step adds nothing. What NVML fails at is
    not asked again: NVML is missing in many containers and incomplete on unified-memory chips. Links are read where
    several ranks use them.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        links: bool = False,
        every: float = 1.0,
        root: Path = Path("/"),
    ) -> None:
        self.every, gpu = every, _GPU if device.type == "cuda" else {}
        self.gauges: Sources = {name: partial(gauge, device) for name, gauge in gpu.items()}
        self.counters: Sources = {"network": partial(network_bytes, root)} if links else {}
        if links and (handle := _nvml_device(device)):
            self.counters["nvlink"] = partial(nvlink_bytes, handle)
        self._at, self._last, self._counted = -every, dict[str, float](), _ask(self.counters)

    def read(self) -> Mapping[str, float]:
        """Percent, watts, MHz, degrees Celsius, bytes per second, as the names say."""
        now = time.monotonic()
        if now - self._at >= self.every:
            counted, seconds, self._at = _ask(self.counters), max(now - self._at, 1e-9), now
            grown = {
                name: max(0.0, n - self._counted[name])
                for name, n in counted.items()
                if name in self._counted
            }
            rates = {f"{name}_bytes_per_second": value / seconds for name, value in grown.items()}
            self._last = {
                "host_memory_percent": unavailable_percent(),
                **_ask(self.gauges),
                **rates,
            }
            self._counted = counted
        return self._last


def _ask(sources: Sources) -> dict[str, float]:
    """What the sources say; one whose file is away for a moment is left out, one that fails in another way is removed."""
    found = {}
    for name, source in [*sources.items()]:
        try:
            found[name] = source()
        except OSError:  # a port that is reset, an interface that is made anew
            continue
        except Exception:  # NVML's error type cannot be imported without NVML
            del sources[name]
    return found


def network_bytes(root: Path = Path("/")) -> int:
    """Bytes that the RDMA ports of this machine sent and received; without such ports, those of the interface that gloo
    or NCCL was given. Counters of /sys below `root`."""
    # InfiniBand counts its data in words of four bytes, also over Ethernet.
    words = [*root.glob("sys/class/infiniband/*/ports/*/counters/port_*_data")]
    if words:
        return 4 * sum(int(file.read_text()) for file in words)
    name = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or "lo"
    statistics_of = root / "sys/class/net" / name.lstrip("=").partition(",")[0] / "statistics"
    return sum(int((statistics_of / file).read_text()) for file in ("rx_bytes", "tx_bytes"))


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
    # Of all links
    values = pynvml.nvmlDeviceGetFieldValues(handle, [(field, 2**32 - 1) for field in fields])
    if any(value.nvmlReturn for value in values):
        raise OSError("no NVLink")
    return 1024 * sum(value.value.ullVal for value in values)


class Reading(NamedTuple):
    """One check: the product's TFLOP/s, and the share of the time before it in which a limit on cores throttled it."""

    tflops: float
    throttled: float


class ChipCheck:
    """A short product, timed at the start and once per `every` seconds between two steps.

    On CUDA it is queued behind a step and read one step later, so that the host never waits.

    Attributes:
        best: TFLOP/s of the quickest check.
        warned: a fault was told, and has not gone since.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        peak: Peak,
        *,
        every: float = EVERY,
        root: Path = Path("/"),
    ) -> None:
        self.device, self.peak, self.every, self.root = device, peak, every, root
        # bf16 may be emulated
        size, dtype = (
            SIZE[device.type],
            dtype if device.type == "cuda" else torch.float32,
        )
        self.work = 2 * size**3 * (TIMES["cuda"] if device.type == "cuda" else 1)
        self.left, self.right = (
            torch.ones(size, size, device=device, dtype=dtype).mul_(0.01) for _ in range(2)
        )
        self.out = torch.empty_like(self.left)
        self.best, self.slow, self.warned = 0.0, 0, False
        self._at = self._stat_at = time.monotonic()
        self._taken: Callable[[], float | None] | None = (
            None  # seconds of the check that is under way
        )
        self._throttled = throttled_seconds(root)

    def first(self) -> Reading:
        """The check at the start, waited for; the chip is warm after some of them."""
        for _ in range(3):
            self._taken = self._run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            reading = self.read()
        assert reading is not None
        return reading

    def read(self) -> Reading | None:
        """What the check that is under way found, if it is done; begins the next one when it is time."""
        if self._taken is None and time.monotonic() - self._at < self.every:
            return None
        self._taken = self._taken or self._run()
        if (seconds := self._taken()) is None:
            return None
        self._taken = None
        return self._read(seconds)

    def _run(self) -> Callable[[], float | None]:
        """Run the product, on CUDA behind what is queued; the function tells its seconds, or None while it is not done."""
        product = partial(torch.mm, self.left, self.right, out=self.out)
        if self.device.type != "cuda":
            quickest = min(timeit.repeat(product, number=1, repeat=TIMES["cpu"]))
            return lambda: quickest
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(TIMES["cuda"]):
            product()
        ended.record()
        return lambda: began.elapsed_time(ended) / 1000 if ended.query() else None

    def _read(self, seconds: float) -> Reading:
        now, throttled = time.monotonic(), throttled_seconds(self.root)
        share = (
            (throttled - self._throttled) / max(now - self._stat_at, 1e-9) / torch.get_num_threads()
        )
        self._at, self._stat_at, self._throttled = now, now, throttled
        reading = Reading(ratio(self.work, seconds) / 1e12, share)
        self.best = max(self.best, reading.tflops)
        return reading

    def fault(self, reading: Reading) -> str:
        """What is wrong with this check in a line, once; empty where nothing is, or it has been told."""
        if not reading.tflops:
            return ""  # the clock stood still
        share = reading.tflops / self.best
        self.slow = self.slow + 1 if share < SLOW else 0
        what = ""
        if reading.throttled > THROTTLED:
            cores = (
                f"its control group may use {available_cores(self.root)} of {os.cpu_count()} cores"
            )
            what = f"this process was throttled {reading.throttled:.0%} of the time: {cores}; fix: a higher limit"
        elif self.peak.tflops and reading.tflops < PEAK_SHARE * self.peak.tflops:
            figures = f"{reading.tflops:.0f} TFLOP/s where its peak is {self.peak.tflops:.0f}"
            what = f"the chip computes {figures}: {self._cause()}"
        elif self.slow >= IN_A_ROW:
            what = f"the chip computes at {share:.0%} of its speed at the start: {self._cause()}"
        told, self.warned = self.warned, bool(what) or (self.warned and self.slow > 0)
        return "" if told else what

    def _cause(self) -> str:
        """Why a chip may be slow, from what can be seen, with what to do."""
        if self.device.type == "cpu":
            load, cores = os.getloadavg()[0], available_cores(self.root)
            if load > 1.5 * cores:
                return f"other programs want its cores (load {load:.1f} on {cores}); fix: end them"
            return "hot, or on battery; fix: look at its temperature and power settings"
        return f"{clock_reason(self.device)}; tunesmith doctor says more"


_REASONS = {
    "HwThermalSlowdown": "it is hot; fix: see to its cooling",
    "SwThermalSlowdown": "it is hot; fix: see to its cooling",
    "HwPowerBrakeSlowdown": "its power supply holds it back; fix: look at the supply",
    "SwPowerCap": "it is at its power limit; fix: nvidia-smi -q -d POWER shows the limits",
}


def clock_reason(device: torch.device) -> str:
    """What NVML says holds a GPU's clock back; GB10's stuck low-power state is seen by speed alone."""
    with contextlib.suppress(Exception):
        import pynvml

        mask = pynvml.nvmlDeviceGetCurrentClocksEventReasons(_nvml_device(device))
        return next(
            text
            for name, text in _REASONS.items()
            if mask & pynvml.__dict__[f"nvmlClocksEventReason{name}"]
        )
    stuck = "a low-power state that nvidia-smi does not show; fix: shut down, pull the plug for 30 s, start again"
    return f"no reason is shown, as in {stuck}"


def throttled_seconds(root: Path = Path("/")) -> float:
    """Seconds, over all its threads, in which a limit on cores throttled this process's control groups of version 1 or 2."""
    total = 0.0
    for group in control_groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):
            stat = dict(
                line.split()
                for line in (group / "cpu.stat").read_text(encoding="ascii").splitlines()
            )
            total += (
                int(stat.get("throttled_usec", 0)) / 1e6 + int(stat.get("throttled_time", 0)) / 1e9
            )
    return total


class Health:
    """Gauges and checks of this rank's machine; what is wrong goes to the sinks as a warning."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, peak: Peak, ranks: Ranks, sink: Sink
    ) -> None:
        self.ranks, self.sink = ranks, sink
        self.gauges = Gauges(device, links=ranks.world > 1)
        self.chip = ChipCheck(device, dtype, peak)

    def start(self) -> None:
        """The first check, on all ranks at once; a collective call."""
        reading = self.chip.first()
        self._tell(self.chip.fault(reading))
        slow = describe_slow_host(self.ranks.hosts, self.ranks.gather(reading))
        if slow and self.ranks.leads:
            self.sink.text("health", f"warning: {slow}")

    def read(self) -> dict[str, float]:
        """Fields of a step's record."""
        reading = self.chip.read()
        if reading is None:
            return dict(self.gauges.read())
        self._tell(self.chip.fault(reading))
        return {**self.gauges.read(), "product_tflops": reading.tflops}

    def _tell(self, fault: str) -> None:
        if fault:
            name = f"{self.ranks.name(self.ranks.rank)}: " if self.ranks.world > 1 else ""
            self.sink.text("health", f"warning: {name}{fault}")


def describe_slow_host(hosts: Sequence[str], readings: Sequence[Reading]) -> str:
    """A line that names the host whose chips are slower than those of the others; empty where all are alike."""
    speeds = {
        host: max(r.tflops for h, r in zip(hosts, readings, strict=True) if h == host)
        for host in hosts
    }
    slowest = min(speeds, key=speeds.__getitem__)
    others = statistics.median(
        [speed for host, speed in speeds.items() if host != slowest] or [0.0]
    )
    if not speeds[slowest] or speeds[slowest] >= SLOW * others:  # 0: the clock stood still there
        return ""
    what = f"{slowest} computes at {speeds[slowest] / others:.0%} of the speed of the others"
    figures = f"{speeds[slowest]:.3g} and {others:.3g} TFLOP/s in a short product"
    return f"{what} ({figures}), and all wait for it; fix: tunesmith doctor there, which looks at clock, power and packages"
