"""What is said when a run is over: the closing summary, the loss curve in the terminal, failure.json."""

from __future__ import annotations

import json
import locale
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from tunesmith.config.schema import Run
from tunesmith.errors import TunesmithError
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.metrics.terminal import format_seconds

FAILURE = "failure.json"
VLLM_MAX_RANK = 16  # vLLM's default for --max-lora-rank


@dataclass(frozen=True)
class Failure:
    """failure.json: one block that says what stopped a run and how to go on."""

    what: str
    where: str
    why: str
    last_step: int
    next: str


def write_failure(folder: Path, error: TunesmithError, *, last_step: int, next_command: str) -> Failure:
    """Write failure.json, in one move, from the error that ended the run; its `fix` stands before `next_command`."""
    failure = Failure(error.what, error.where, error.why, last_step, error.fix or next_command)
    part = folder / (FAILURE + ".part")
    try:
        part.write_text(json.dumps(asdict(failure), indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / FAILURE)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return failure


def read_failure(folder: Path) -> Failure | None:
    """The failure that a run directory tells of, or None."""
    path = folder / FAILURE
    if not path.exists():
        return None
    return Failure(**json.loads(path.read_text(encoding="utf-8")))


def clear_failure(folder: Path) -> None:
    """A run that goes on has no failure any more."""
    (folder / FAILURE).unlink(missing_ok=True)


class RunOutcome(Protocol):
    """What a run came to, as `tunesmith.training.result.Result` tells it."""

    @property
    def output_dir(self) -> Path: ...
    @property
    def steps(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def finished_before(self) -> bool: ...


def closing(run: Run, result: RunOutcome) -> str:
    """The closing summary, as plain text: figures of all starts of the run, files written, what to type next."""
    folder = result.output_dir
    records = read_records(folder / "metrics.jsonl")
    rows = [*_figures(records, result.seconds), "", *_written(folder), "", *_next(run, folder)]
    if result.finished_before:
        rows = [
            f"this run is finished: it took its {result.steps} steps before",
            "  to go on: the same command with a longer train.duration",
            "  to start over: the same command with --fresh (the old run is put aside)",
            "",
            *rows,
        ]
    return "\n".join(rows)


def _figures(records: Sequence[StepRecord], seconds: float) -> list[str]:
    if not records:
        return ["no step was taken"]
    first, last, supervised = records[0], records[-1], sum(r.supervised_tokens for r in records)
    # The first step compiles and fills caches, so rates leave it out as soon as there are others.
    settled = records[1:] or records
    rows = {
        "steps": f"{last.step:,} ({last.epoch:.2f} epochs, {sum(r.examples for r in records):,} examples)",
        "time": format_seconds(seconds or sum(r.step_seconds for r in records)),
        "tokens": f"{sum(r.tokens for r in records):,} without padding, {supervised:,} of them trained",
        "speed": f"{_rate(settled):,.0f} tokens/s",
        "loss": f"{first.loss:.4f} -> {last.loss:.4f}" + _tail_mean(records),
    }
    known = [r for r in settled if r.mfu is not None]
    if known:
        share = sum((r.mfu or 0.0) * r.step_seconds for r in known) / sum(r.step_seconds for r in known)
        rows["speed"] += f", {share:.1%} MFU of {known[-1].mfu_peak_tflops or 0:,.0f} TFLOP/s"
    measured = [(r.val_loss, r.step) for r in records if r.val_loss is not None]
    if measured:
        best, at = min(measured)
        rows["val_loss"] = f"{measured[0][0]:.4f} -> {measured[-1][0]:.4f}, best {best:.4f} at step {at}"
    rows["peak memory"] = f"{max(r.memory_gib for r in records):.1f} GiB"
    return [f"{name:<12}{text}" for name, text in rows.items()]


def _rate(records: Sequence[StepRecord]) -> float:
    return sum(r.tokens for r in records) / max(sum(r.step_seconds for r in records), 1e-9)


def _tail_mean(records: Sequence[StepRecord]) -> str:
    """One batch's loss is noisy: beside it the mean over the last tenth, where that is more than one step."""
    tail = records[-max(1, len(records) // 10) :]
    return f" (mean of the last {len(tail)}: {sum(r.loss for r in tail) / len(tail):.4f})" if len(tail) > 1 else ""


_FILES = (
    ("final", "the trained weights, ready to use"),
    ("metrics.jsonl", "one record a step"),
    ("tensorboard", "tensorboard --logdir {path}"),
    ("log.txt", "what was shown here"),
    ("config.yaml", "the resolved recipe"),
    ("env.json", "versions and hardware"),
    ("profile", "traces for Perfetto and TensorBoard"),
)


def _written(folder: Path) -> list[str]:
    rows = [f"written to {folder}"]
    for name, what in _FILES:
        if (folder / name).exists():
            rows.append(f"  {name:<16}{what.format(path=shlex.quote(str(folder / name)))}")
    newest = sorted(folder.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
    if newest:
        rows.append(f"  {newest[-1].name:<16}the newest checkpoint, to go on from")
    return rows


def _next(run: Run, folder: Path) -> list[str]:
    """The commands that a user may want to type now, each whole."""
    here = shlex.quote(str(folder))
    merged = shlex.quote(f"{folder}-merged")
    held_out = run.data.validation[0].source if run.data.validation else "HELD_OUT.jsonl"
    rows = ["next", f"  tunesmith chat {here}", f"  tunesmith eval {here} --data {shlex.quote(held_out)}"]
    if run.adapter.kind == "none":
        return [*rows, f"  vllm serve {shlex.quote(str(folder / 'final'))}"]
    rows.append(f"  tunesmith merge {here} --output {merged}")
    # vLLM reads no GGUF base under an adapter, and no module that was trained in full beside it.
    if run.model.name.endswith(".gguf") or run.adapter.modules_to_save or run.model.added_tokens:
        return [*rows, f"  vllm serve {merged}   # after the merge"]
    rank = f" --max-lora-rank {_rank_step(run.adapter.rank)}" if run.adapter.rank > VLLM_MAX_RANK else ""
    adapter = shlex.quote(f"{folder.name}={folder / 'final'}")
    return [*rows, f"  vllm serve {shlex.quote(run.model.name)} --enable-lora{rank} --lora-modules {adapter}"]


def _rank_step(rank: int) -> int:
    """The smallest rank that vLLM takes and that holds ours: 8, 16, 32, 64, 128, 256, 320, 512."""
    return next((step for step in (8, 16, 32, 64, 128, 256, 320, 512) if step >= rank), rank)


def curve(values: Sequence[float], *, width: int = 64, height: int = 10, unicode: bool | None = None) -> str:
    """A line plot for the terminal, from braille dots (2 x 4 a cell), or from `*` where the locale is not UTF-8.

    Args:
        values: one per step; non-finite ones leave a gap.
        width, height: of the plot in characters, axis not counted.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "(nothing to plot)"
    if unicode is None:
        unicode = locale.getpreferredencoding(False).lower().replace("-", "") == "utf8"
    low, high = min(finite), max(finite)
    if high == low:
        low, high = low - 0.5, high + 0.5
    wide, tall = (2, 4) if unicode else (1, 1)
    columns, rows = width * wide, height * tall
    cells = [[0] * width for _ in range(height)]
    for column, row in _dots(values, columns, rows, low, high):
        cells[row // tall][column // wide] |= _DOT[row % tall][column % wide]
    drawn = [
        "".join((chr(0x2800 + cell) if unicode else "*") if cell else " " for cell in line).rstrip() for line in cells
    ]
    edge, corner, base = ("┤", "└", "─") if unicode else ("|", "+", "-")
    labels = [f"{high:8.3f} {edge}", *[f"{'':8} {edge}"] * (height - 2), f"{low:8.3f} {edge}"]
    axis = f"{'':8} {corner}{base * width}"
    ends = f"{'':10}1{len(values):>{width - 1}}"
    return "\n".join([*(label + line for label, line in zip(labels, drawn, strict=True)), axis, ends])


_DOT = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode's numbering of the braille dots


def _dots(values: Sequence[float], columns: int, rows: int, low: float, high: float) -> list[tuple[int, int]]:
    """The dots of a line through `values`: (column, row), row 0 on top; neighbours are joined upright."""
    dots: list[tuple[int, int]] = []
    before: int | None = None
    for column in range(columns):
        at = column * (len(values) - 1) / max(columns - 1, 1)
        left = math.floor(at)
        right = min(left + 1, len(values) - 1)
        value = values[left] + (values[right] - values[left]) * (at - left) if at > left else values[left]
        if not math.isfinite(value):
            before = None
            continue
        row = round((high - value) / (high - low) * (rows - 1))
        joined = range(min(row, before), max(row, before) + 1) if before is not None else (row,)
        dots += [(column, r) for r in joined]
        before = row
    return dots
