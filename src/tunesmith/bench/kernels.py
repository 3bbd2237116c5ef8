"""What a profiler's trace says: the dearest kernels, and the gaps in which the GPU had nothing to do.

Traces are those that torch writes for Perfetto (Chrome's trace event format: times and durations in microseconds). On
a GPU the device's own rows are read: kernels, copies and fills. Without one there are operators alone, each counted
by the time it does not spend in another.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
TOP = 10
GAPS = 5


class Span(NamedTuple):
    """One piece of work on a timeline, in microseconds."""

    start: float
    end: float
    name: str


class Gap(NamedTuple):
    """A stretch in which nothing ran: when it began, how long it was (microseconds), and what ran before and after."""

    start: float
    length: float
    before: str
    after: str


@dataclass(frozen=True)
class KernelTime:
    """All runs of one kernel. share: of the time of all kernels."""

    name: str
    seconds: float
    count: int
    share: float


@dataclass(frozen=True)
class Summary:
    """What a trace came to.

    Attributes:
        device: "gpu", or "cpu" for operators by their own time.
        top: the dearest, the first first.
        window_seconds: on a GPU, from the first kernel's start to the last one's end; else None.
        idle_share: of the window, in which nothing ran on the GPU.
        gaps: the longest, the longest first.
    """

    device: str
    top: tuple[KernelTime, ...]
    window_seconds: float | None
    idle_share: float | None
    gaps: tuple[Gap, ...]

    def values(self) -> dict[str, Any]:
        """For JSON; gaps in microseconds."""
        return asdict(self) | {"gaps": [gap._asdict() for gap in self.gaps]}

    def lines(self) -> list[str]:
        """For a reader."""
        what = "kernels by GPU time" if self.device == "gpu" else "operators by CPU time, their callees left out"
        rows = [f"top {len(self.top)} {what}:"]
        rows += [f"  {k.share:6.1%}  {k.seconds * 1e3:10.2f} ms  {k.count:6d} x  {k.name[:90]}" for k in self.top]
        if self.idle_share is not None:
            rows.append(f"GPU idle: {self.idle_share:.2%} of {self.window_seconds:.3f} s; the longest gaps:")
            rows += [f"  {g.length:10.1f} us  after {g.before[:40]}, before {g.after[:40]}" for g in self.gaps]
        return rows


def gaps(spans: Iterable[Span]) -> list[Gap]:
    """Every stretch between the first start and the last end that no span covers, in order; spans may overlap."""
    found: list[Gap] = []
    latest: Span | None = None  # the one that ends last so far
    for span in sorted(spans):
        if latest is not None and span.start > latest.end:
            found.append(Gap(latest.end, span.start - latest.end, latest.name, span.name))
        if latest is None or span.end > latest.end:
            latest = span
    return found


def self_times(spans: Iterable[Span]) -> list[tuple[str, float]]:
    """(name, microseconds) of each span of one thread, without those that lie inside it."""
    own: list[tuple[str, float]] = []
    open_: list[tuple[Span, int]] = []  # enclosing spans and their places in `own`
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        while open_ and open_[-1][0].end <= span.start:
            open_.pop()
        length = span.end - span.start
        if open_:
            name, time = own[open_[-1][1]]
            own[open_[-1][1]] = (name, time - length)
        open_.append((span, len(own)))
        own.append((span.name, length))
    return own


def dearest(times: Iterable[tuple[str, float]], count: int = TOP) -> tuple[KernelTime, ...]:
    """The `count` names with the most time, from (name, microseconds) of each run."""
    total: dict[str, float] = defaultdict(float)
    runs: dict[str, int] = defaultdict(int)
    for name, time in times:
        total[name] += time
        runs[name] += 1
    everything = sum(total.values()) or 1.0
    ranked = sorted(total, key=lambda name: (-total[name], name))[:count]
    return tuple(KernelTime(n, total[n] / 1e6, runs[n], total[n] / everything) for n in ranked)


def summarise(traces: Sequence[Path]) -> Summary:
    """Read traces (.json or .json.gz), one for each cycle, and add them up."""
    device: list[list[Span]] = []
    own: list[tuple[str, float]] = []
    for path in traces:
        by_thread: dict[tuple[Any, Any], list[Span]] = defaultdict(list)
        work: list[Span] = []
        for event in _events(path):
            if event.get("ph") != "X":
                continue
            span = Span(float(event["ts"]), float(event["ts"]) + float(event["dur"]), str(event["name"]))
            if event.get("cat") in DEVICE:
                work.append(span)
            elif event.get("cat") == "cpu_op":
                by_thread[event["pid"], event["tid"]].append(span)
        device.append(work)
        for spans in by_thread.values():
            own += self_times(spans)
    if not any(device):
        return Summary("cpu", dearest(own), None, None, ())
    idle = [gap for work in device for gap in gaps(work)]
    window = sum(max(s.end for s in work) - min(s.start for s in work) for work in device if work)
    share = sum(gap.length for gap in idle) / window if window else 0.0
    longest = tuple(sorted(idle, key=lambda gap: -gap.length)[:GAPS])
    times = ((span.name, span.end - span.start) for work in device for span in work)
    return Summary("gpu", dearest(times), window / 1e6, share, longest)


def _events(path: Path) -> list[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events
