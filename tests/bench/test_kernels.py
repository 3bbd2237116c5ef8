"""Gaps, self times and the dearest kernels, on timelines written down by hand and on a trace of torch's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.bench.kernels import Gap, Span, dearest, gaps, self_times, summarise
from tunesmith.config.schema import Profile
from tunesmith.metrics.profile import Profiler


def test_gaps_between_kernels_that_overlap_nest_and_touch() -> None:
    line = [
        Span(0, 10, "a"),
        Span(2, 4, "inside"),
        Span(8, 15, "b"),
        Span(15, 16, "c"),
        Span(20, 21, "d"),
        Span(30, 40, "e"),
    ]
    assert gaps(line) == gaps(reversed(line)) == [Gap(16, 4, "c", "d"), Gap(21, 9, "d", "e")]
    # A long one covers the end of a later short one: the gap begins where the long one ends.
    assert gaps([Span(0, 10, "long"), Span(1, 2, "short"), Span(12, 13, "next")]) == [Gap(10, 2, "long", "next")]
    assert gaps([]) == gaps([Span(5, 6, "only")]) == []


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=12))
def test_gaps_are_what_a_count_of_microseconds_finds(pieces: list[tuple[int, int]]) -> None:
    """Reference: mark each whole microsecond that some span covers."""
    spans = [Span(start, start + length, str(n)) for n, (start, length) in enumerate(pieces)]
    covered = {t for span in spans for t in range(int(span.start), int(span.end))}
    idle = set(range(min(covered), max(covered) + 1)) - covered
    found = gaps(spans)
    assert {t for gap in found for t in range(int(gap.start), int(gap.start + gap.length))} == idle
    assert sum(gap.length for gap in found) == len(idle)


def test_an_operator_is_counted_without_what_it_calls() -> None:
    line = [
        Span(0, 100, "linear"),
        Span(10, 90, "mm"),
        Span(20, 30, "copy"),
        Span(40, 45, "copy"),
        Span(100, 103, "add"),
    ]
    assert self_times(line) == [("linear", 20), ("mm", 65), ("copy", 10), ("copy", 5), ("add", 3)]
    assert sum(time for _, time in self_times(line)) == 103


def test_the_dearest_come_first_with_share_and_count() -> None:
    top = dearest([("mm", 30.0), ("add", 10.0), ("mm", 50.0), ("exp", 10.0)], count=2)
    assert [(k.name, k.count, k.share) for k in top] == [("mm", 2, 0.8), ("add", 1, 0.1)]
    assert top[0].seconds == pytest.approx(80e-6)


def test_a_trace_with_a_gpu_is_read_from_the_device_rows(tmp_path: Path) -> None:
    """Two cycles: what lies between them is no gap. Host operators and annotations are no work of the GPU."""

    def event(cat: str, name: str, ts: float, dur: float) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": 7}

    first = [
        event("kernel", "gemm", 1000, 60), event("kernel", "softmax", 1080, 10), event("gpu_memcpy", "copy", 1090, 10),
        event("cpu_op", "aten::mm", 0, 500), event("gpu_user_annotation", "ProfilerStep#1", 900, 400),
        {"ph": "i", "name": "an instant", "ts": 5},
    ]  # fmt: skip
    second = [event("kernel", "gemm", 9000, 50), event("kernel", "gemm", 9100, 50)]
    paths = []
    for number, events in enumerate((first, second)):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps({"traceEvents": events}))
    found = summarise(paths)
    assert found.device == "gpu"
    assert [(k.name, k.count) for k in found.top] == [("gemm", 3), ("copy", 1), ("softmax", 1)]
    assert found.top[0].share == pytest.approx(160 / 180)
    assert found.window_seconds == pytest.approx(250e-6)
    assert found.idle_share == pytest.approx(70 / 250)
    assert [(g.length, g.before, g.after) for g in found.gaps] == [(50, "gemm", "gemm"), (20, "gemm", "softmax")]
    assert "GPU idle: 28.00%" in "\n".join(found.lines())
    json.dumps(found.values())


def test_a_trace_of_torch_on_the_cpu(tmp_path: Path) -> None:
    settings = Profile(enabled=True, wait=0, warmup=1, active=3)
    with Profiler(settings, tmp_path, rank=0, device=torch.device("cpu")) as profiler:
        for _ in range(5):
            torch.ones(256, 256) @ torch.ones(256, 256)
            profiler.step()
    found = summarise(profiler.traces)
    assert (found.device, found.idle_share, found.gaps) == ("cpu", None, ())
    assert {k.name: k.count for k in found.top}["aten::mm"] == 3
    assert 0.9 < sum(k.share for k in found.top) <= 1.0 + 1e-9
