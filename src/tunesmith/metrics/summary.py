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
    """Write failure.json: what stopped the run, where, why, its last step, and `error.fix` or else
    `next_command`; the likely cause, and the rank that failed, null where they are not known; and
    the smaller micro batch to go on with, if any."""
    failure = {
        "what": error.what,
        "where": error.where,
        "why": error.why,
        "last_step": last_step,
        "next": error.fix or next_command,
        "cause": error.cause or None,
    }
    for name in ("rank", "host", "phase", "collective"):
        failure[name] = error.failed_rank.get(name)
    if error.smaller:
        failure["smaller"] = error.smaller
    write_atomically(folder / FAILURE, json.dumps(failure, indent=2) + "\n")


def closing_summary(
    run: Run, *, steps: int, seconds: float = 0.0, finished_before: bool = False
) -> str:
    """The closing summary as plain text: numbers of all starts of the run, files written, next
    commands.

    `seconds` of training: 0 takes the sum of the recorded steps. `finished_before`: this start did
    nothing.
    """
    folder = Path(from_here(run.output_dir))
    records = read_records(folder / METRICS)
    rows = []
    if finished_before:
        rows = [
            f"this run is finished: it took its {steps} steps before",
            "  to go on: the same command with a longer train.duration",
            "  to start over: the same command with --fresh (the old run is put aside)",
            "",
        ]
    rows += [*run_figures(records, seconds), "", *_written(folder), "", *_next(run, folder)]
    return "\n".join(rows)


def run_figures(records: Sequence[StepRecord], seconds: float) -> list[str]:
    """The numbers of a run, a line each; `seconds` as in `closing_summary`."""
    if not records:
        return ["no step was taken"]
    last = records[-1]
    examples = sum(r.examples for r in records)
    tokens = sum(r.tokens for r in records)
    supervised = sum(r.supervised_tokens for r in records)
    rows = {
        "steps": f"{last.step:,} ({last.epoch:.2f} epochs, {examples:,} examples)",
        # The sum of steps where nobody measured the whole.
        "time": format_seconds(seconds or sum(r.step_seconds for r in records)),
        "tokens": f"{tokens:,} without padding, {supervised:,} of them supervised",
        "speed": _speed(records),
        "loss": f"{records[0].loss:.4f} -> {last.loss:.4f}",
    }
    # One batch's loss is noisy.
    tail = records[-max(1, len(records) // 10) :]
    if len(tail) > 1:
        mean = sum(r.loss for r in tail) / len(tail)
        rows["loss"] += f" (mean of the last {len(tail)}: {mean:.4f})"
    validations = [(r.val_loss, r.step) for r in records if r.val_loss is not None]
    if validations:
        best, step = min(validations)
        losses = f"{validations[0][0]:.4f} -> {validations[-1][0]:.4f}"
        rows["val_loss"] = f"{losses}, best {best:.4f} at step {step}"
    rows["peak memory"] = f"{max(r.memory_gib for r in records):.1f} GiB"
    return [f"{name:<12}{text}" for name, text in rows.items()]


def _speed(records: Sequence[StepRecord]) -> str:
    # The first step compiles and fills caches.
    steady = records[1:] or records
    seconds = max(sum(r.step_seconds for r in steady), 1e-9)
    speed = f"{sum(r.tokens for r in steady) / seconds:,.0f} tokens/s"
    weighted = 0.0
    mfu_seconds = 0.0
    peak = None
    for record in steady:
        if record.mfu is not None:
            weighted += record.mfu * record.step_seconds
            mfu_seconds += record.step_seconds
            peak = record.mfu_peak_tflops or 0.0
    if peak is None:
        return speed
    return f"{speed}, {ratio(weighted, mfu_seconds):.1%} MFU of {peak:,.0f} TFLOP/s"


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
    checkpoints = folder.glob("checkpoint-*")
    newest = max(checkpoints, key=lambda p: p.stat().st_mtime, default=None)
    if newest:
        rows.append(f"  {newest.name:<16}the newest checkpoint, to go on from")
    return rows


def _next(run: Run, folder: Path) -> list[str]:
    """Complete commands that a user may want next."""
    # `folder` may be `.`, without a name.
    absolute = folder.absolute()
    merged = shell_path(from_here(f"{absolute}-merged"))
    rows = ["next", f"  tunesmith chat {shell_path(folder)}"]
    if run.data.validation or run.data.hold_out:
        rows.append(
            f"  tunesmith eval {shell_path(folder)}   # on the held-out rows, beside the base"
        )
    adapter = run.adapter
    if adapter.kind == "none":
        return [*rows, f"  vllm serve {shell_path(folder / FINAL)}"]
    rows.append(f"  tunesmith merge {shell_path(folder)} --output {merged}")
    # vLLM takes no adapter on a GGUF base, and none with modules trained in full.
    is_refused = run.model.name.endswith(".gguf") or adapter.modules_to_save
    if is_refused or run.model.added_tokens or _adapts_experts(folder / FINAL):
        return [*rows, f"  vllm serve {merged}   # after the merge"]
    command = f"  vllm serve {shell_word(run.model.name)} --enable-lora"
    if adapter.rank > VLLM_DEFAULT_RANK:
        accepted = [rank for rank in VLLM_RANKS if rank >= adapter.rank]
        command += f" --max-lora-rank {min(accepted, default=adapter.rank)}"
    # vLLM reads the base's tokenizer, whose template has neither the arguments nor the date of
    # training, if it has one at all.
    template = folder / FINAL / "chat_template.jinja"
    if template.is_file():
        command += f" --chat-template {shell_path(template)}"
    modules = shell_word(f"{absolute.name}={folder / FINAL}")
    return [*rows, f"{command} --lora-modules {modules}"]


def _adapts_experts(final: Path) -> bool:
    """Whether an adapter has stacks of experts: of most models vLLM takes the rows of gate and up
    for one another in such a file, without an error.
    """
    config = final / "adapter_config.json"
    return config.is_file() and bool(json.loads(config.read_bytes()).get("target_parameters"))
