"""The end of a run in words: the closing summary, and failure.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from tunesmith.config.schema import Run
from tunesmith.errors import TunesmithError
from tunesmith.host.files import from_here, write_atomically
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.metrics.terminal import format_seconds
from tunesmith.run_dir import FAILURE, FINAL, IDENTITY, LOG, METRICS, RECIPE
from tunesmith.units import ratio

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank accepts
VLLM_DEFAULT_RANK = 16


def write_failure(
    folder: Path, error: TunesmithError, *, last_step: int, next_command: str
) -> None:
    """Write failure.json: what stopped the run, where, why, its last step, and `error.fix` or else `next_command`; the likely
    cause, and the rank that failed, null where they are not known; and the smaller micro batch to go on with, if any."""
    next_ = error.fix or next_command
    failure = {
        "what": error.what,
        "where": error.where,
        "why": error.why,
        "last_step": last_step,
        "next": next_,
    }
    failed_rank = {
        name: error.failed_rank.get(name) for name in ("rank", "host", "phase", "collective")
    }
    failure |= {"cause": error.cause or None, **failed_rank}
    if error.smaller:
        failure["smaller"] = error.smaller
    write_atomically(folder / FAILURE, json.dumps(failure, indent=2) + "\n")


def closing_summary(
    run: Run, *, steps: int, seconds: float = 0.0, finished_before: bool = False
) -> str:
    """The closing summary as plain text: figures of all starts of the run, files written, next commands.

    `seconds` of training: 0 takes the sum of the recorded steps. `finished_before`: this start did nothing.
    """
    folder = Path(from_here(run.output_dir))
    records = read_records(folder / METRICS)
    rows = [*run_figures(records, seconds), "", *_written(folder), "", *_next(run, folder)]
    if finished_before:
        on = "  to go on: the same command with a longer train.duration"
        over = "  to start over: the same command with --fresh (the old run is put aside)"
        rows = [f"this run is finished: it took its {steps} steps before", on, over, "", *rows]
    return "\n".join(rows)


def run_figures(records: Sequence[StepRecord], seconds: float) -> list[str]:
    """The figures of a run, a line each; `seconds` as in `closing_summary`."""
    if not records:
        return ["no step was taken"]
    first, last, supervised = records[0], records[-1], sum(r.supervised_tokens for r in records)
    steady = records[1:] or records  # the first step compiles and fills caches
    seconds_steady = max(sum(r.step_seconds for r in steady), 1e-9)
    rows = {
        "steps": f"{last.step:,} ({last.epoch:.2f} epochs, {sum(r.examples for r in records):,} examples)",
        "time": format_seconds(seconds or sum(r.step_seconds for r in records)),
        "tokens": f"{sum(r.tokens for r in records):,} without padding, {supervised:,} of them supervised",
        "speed": f"{sum(r.tokens for r in steady) / seconds_steady:,.0f} tokens/s",
        "loss": f"{first.loss:.4f} -> {last.loss:.4f}",
    }
    tail = records[-max(1, len(records) // 10) :]
    if len(tail) > 1:  # one batch's loss is noisy
        rows["loss"] += (
            f" (mean of the last {len(tail)}: {sum(r.loss for r in tail) / len(tail):.4f})"
        )
    if known := [r for r in steady if r.mfu is not None]:
        share = ratio(
            sum((r.mfu or 0.0) * r.step_seconds for r in known), sum(r.step_seconds for r in known)
        )
        rows["speed"] += f", {share:.1%} MFU of {known[-1].mfu_peak_tflops or 0:,.0f} TFLOP/s"
    if measured := [(r.val_loss, r.step) for r in records if r.val_loss is not None]:
        best, at = min(measured)
        rows["val_loss"] = (
            f"{measured[0][0]:.4f} -> {measured[-1][0]:.4f}, best {best:.4f} at step {at}"
        )
    rows["peak memory"] = f"{max(r.memory_gib for r in records):.1f} GiB"
    return [f"{name:<12}{text}" for name, text in rows.items()]


_FILES = (
    (FINAL, "the trained weights, ready to use"),
    (METRICS, "one record a step"),
    ("tensorboard", "tensorboard --logdir {path}"),
    (LOG, "what was shown here"),
    (RECIPE, "the resolved recipe"),
    (IDENTITY, "versions and hardware"),
    ("profile", "traces for ui.perfetto.dev; tunesmith report shows the rest"),
)


def _written(folder: Path) -> list[str]:
    rows = [f"written to {folder}"]
    for name, what in _FILES:
        if (folder / name).exists():
            rows.append(f"  {name:<16}{what.format(path=shell_path(folder / name))}")
    if newest := max(folder.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime, default=None):
        rows.append(f"  {newest.name:<16}the newest checkpoint, to go on from")
    return rows


def _next(run: Run, folder: Path) -> list[str]:
    """Complete commands that a user may want next."""
    here, whole = shell_path(folder), folder.absolute()  # `folder` may be `.`, without a name
    merged = shell_path(from_here(f"{whole}-merged"))
    rows = ["next", f"  tunesmith chat {here}"]
    if run.data.validation or run.data.hold_out:
        rows.append(f"  tunesmith eval {here}   # on the held-out rows, beside the base")
    if run.adapter.kind == "none":
        return [*rows, f"  vllm serve {shell_path(folder / FINAL)}"]
    rows.append(f"  tunesmith merge {here} --output {merged}")
    # vLLM takes no adapter on a GGUF base, and none with modules trained in full.
    if run.model.name.endswith(".gguf") or run.adapter.modules_to_save or run.model.added_tokens:
        return [*rows, f"  vllm serve {merged}   # after the merge"]
    least = next((rank for rank in VLLM_RANKS if rank >= run.adapter.rank), run.adapter.rank)
    rank = f" --max-lora-rank {least}" if least > VLLM_DEFAULT_RANK else ""
    adapter = shell_word(f"{whole.name}={folder / FINAL}")
    return [
        *rows,
        f"  vllm serve {shell_word(run.model.name)} --enable-lora{rank} --lora-modules {adapter}",
    ]
