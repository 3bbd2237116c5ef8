"""`profile:` of a recipe: traces and memory of some steps, on every rank.

In its folder, `output_dir/profile/` for a training run, each rank r writes for each cycle:

    rank<r>.<time>.pt.trace.json.gz   the trace, for ui.perfetto.dev
    memory-rank<r>-<cycle>.pickle     GPU only: the allocator's segments, for pytorch.org/memory_viz
    top-rank<r>-<cycle>.txt           the ten operations with the most time of their own; on a GPU
                                      its idle time
    summary-rank<r>-<cycle>.json      the same for programs, with the peak of each device:
                                      `tunesmith report` shows it
"""

import gzip
import json
import pickle
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import Self, TypedDict

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tunesmith.config.schema import Profile
from tunesmith.run_dir import ProfiledOperation, ProfileSummary

TOP = 10  # operations of a table


# The `args` of a trace's event. The functional form, as names have a space.
TraceArgs = TypedDict(
    "TraceArgs",
    {"External id": int, "Device Type": int, "Device Id": int, "Total Allocated": int},
    total=False,
)


class TraceEvent(TypedDict, total=False):
    """The parts of a trace's event that are read; `ts` and `dur` are microseconds."""

    name: str
    cat: str
    ts: float
    dur: float
    tid: int
    args: TraceArgs


class Profiler:
    """Context around the training loop; call `step()` after each optimizer step. Costs nothing when
    not enabled.

    `traces` and `tables` are the files written so far, one of each per cycle.
    """

    def __init__(self, settings: Profile, folder: Path, *, rank: int, device: torch.device) -> None:
        self.folder = folder
        self.rank = rank
        self.device = device
        self.traces: list[Path] = []
        self.tables: list[Path] = []
        self._steps_left = (settings.wait + settings.warmup + settings.active) * settings.cycles
        self._profile: profile | None = None
        # Ranks that are not profiled pay nothing.
        if not settings.enabled or (settings.ranks != "all" and rank not in settings.ranks):
            return
        folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(
                wait=settings.wait,
                warmup=settings.warmup,
                active=settings.active,
                repeat=settings.cycles,
            ),
            on_trace_ready=self._write,
            profile_memory=True,
            record_shapes=True,
            with_stack=settings.stacks,
            # Else torch warns, 2.11 and 2.12 of every profile, that a new cycle clears the events.
            acc_events=True,
        )

    def __enter__(self) -> Self:
        if self._profile is not None:
            self._profile.start()
            self._keep_traces_only()
        return self

    def step(self) -> None:
        """Note an optimizer step. The profiler ends after its last cycle, with what it holds."""
        if self._profile is None:
            return
        self._profile.step()
        self._keep_traces_only()
        self._steps_left -= 1
        if self._steps_left == 0:
            self.__exit__()

    def _keep_traces_only(self) -> None:
        """Parse no events of the cycle that has begun, if one has: they are read from its trace.

        Torch would take minutes for 100,000 operations, as it accumulates what it has parsed.
        """
        if self._profile is not None and self._profile.profiler is not None:
            self._profile.profiler.acc_events = False

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            running = self._profile
            self._profile = None
            running.stop()

    def _write(self, cycle: profile) -> None:
        """Called by torch at the end of each cycle, also of one that the run's end cuts short."""
        trace = self.folder / f"rank{self.rank}.{time.time_ns()}.pt.trace.json.gz"
        cycle.export_chrome_trace(str(trace))
        self.traces.append(trace)
        name = f"rank{self.rank}-{len(self.traces)}"
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            events: list[TraceEvent] = json.load(file)["traceEvents"]
        if self.device.type == "cuda":
            _write_snapshot(self.folder / f"memory-{name}.pickle")
        summary = summarize(events)
        text = json.dumps(summary, indent=1)
        (self.folder / f"summary-{name}.json").write_text(text, encoding="utf-8")
        table = self.folder / f"top-{name}.txt"
        table.write_text(_table(summary), encoding="utf-8")
        self.tables.append(table)


def _write_snapshot(file: Path) -> None:
    """Write the state of the GPU's allocator in the form that pytorch.org's memory viewer opens."""
    snapshot = {"segments": torch.cuda.memory_snapshot(), "device_traces": []}
    with file.open("wb") as out:
        pickle.dump(snapshot, out)


def _table(summary: ProfileSummary) -> str:
    """The operations of a summary as text."""
    lines = [f"{'operation':<60} {'own time, ms':>14} {'share':>9} {'calls':>9}"]
    for operation in summary["operations"]:
        lines.append(
            f"{operation['name']:<60.60} {operation['ms']:>14,.1f} "
            f"{operation['share']:>9.2%} {operation['calls']:>9,}"
        )
    busy = summary["gpu_busy_share"]
    if busy is not None:
        lines.append(f"GPU idle: {1 - busy:.2%} of the time from the first to the last kernel")
    return "\n".join(lines) + "\n"


def summarize(events: Sequence[TraceEvent]) -> ProfileSummary:
    """The operations of a trace with the most time of their own, and the share of the time in which
    the GPU was busy.

    On a GPU an operation's time is that of the kernels it launched, elsewhere its time without that
    of operations inside it. Counted from the trace: torch's `key_averages` takes a minute for
    150,000 operations, this a fifth of a second.
    """
    operations = [event for event in events if event.get("cat") == "cpu_op"]
    kernels = [
        event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    times = defaultdict[str, float](float)  # microseconds
    calls = Counter[str]()
    if kernels:
        launchers = {event["args"].get("External id"): event["name"] for event in operations}
        # A kernel is counted for the operation that launched it, which has the same id.
        for kernel in kernels:
            name = launchers.get(kernel["args"].get("External id"), kernel["name"])
            times[name] += kernel["dur"]
            calls[name] += 1
    # Without a GPU the time of an operation less that of those inside it.
    else:
        _count_own_times(operations, times, calls)
    total = sum(times.values()) or 1.0
    top: list[ProfiledOperation] = []
    for name, spent in nlargest(TOP, times.items(), key=itemgetter(1)):
        top.append({"name": name, "calls": calls[name], "ms": spent / 1e3, "share": spent / total})
    idle = idle_share((event["ts"], event["ts"] + event["dur"]) for event in kernels)
    busy = None if idle is None else 1 - idle
    return {"operations": top, "gpu_busy_share": busy, "peak_bytes": peak_bytes(events)}


def _count_own_times(
    operations: Sequence[TraceEvent], times: dict[str, float], calls: Counter[str]
) -> None:
    """Add the time of each operation without that of operations inside it."""
    # (end, name) of the operations that the next one may lie in, the innermost last.
    enclosing: list[tuple[float, str]] = []
    thread = None
    for event in sorted(operations, key=lambda e: (e["tid"], e["ts"], -e["dur"])):
        name = event["name"]
        if event["tid"] != thread:
            thread = event["tid"]
            enclosing.clear()
        while enclosing and enclosing[-1][0] <= event["ts"]:
            enclosing.pop()
        parent = enclosing[-1][1] if enclosing else None
        if parent:
            times[parent] -= event["dur"]
        times[name] += event["dur"]
        # One that calls itself is one call.
        calls[name] += name != parent
        enclosing.append((event["ts"] + event["dur"], name))


def idle_share(spans: Iterable[tuple[float, float]]) -> float | None:
    """Share of the time from the first start to the last end that no span (start, end) covers; None
    without spans."""
    ordered = sorted(spans)
    if not ordered:
        return None
    first, latest = ordered[0]
    idle = 0.0
    for start, end in ordered:
        idle += max(0.0, start - latest)
        latest = max(latest, end)
    return idle / (latest - first) if latest > first else 0.0


def peak_bytes(events: Sequence[TraceEvent]) -> dict[str, float]:
    """The most bytes that were allocated on each device; on a CPU they count from the start of the
    trace."""
    peaks: dict[str, float] = {}
    for event in events:
        if event.get("name") == "[memory]":
            values = event["args"]
            is_cpu = values["Device Type"] == 0  # c10::DeviceType
            device = "CPU" if is_cpu else f"GPU {values['Device Id']}"
            peaks[device] = max(values["Total Allocated"], peaks.get(device, 0))
    return peaks
