"""The sinks of step records: metrics.jsonl and TensorBoard here, trackers beside it; and which a recipe asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tunesmith.config.schema import Run
from tunesmith.errors import MachineError
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.record import StepRecord, cut_back
from tunesmith.metrics.sink import Sink, Sinks
from tunesmith.metrics.terminal import Terminal
from tunesmith.metrics.trackers import TrackerSink, trackers_of


class JsonlSink(Sink):
    """metrics.jsonl: one line per step, cut back to the checkpoint's step on resume, synced to the disk by `flush`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def open(self, run: Run, resumed_at: int) -> None:
        cut_back(self.path, resumed_at)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        self._file.write(record.to_json() + "\n")

    def flush(self) -> None:
        # The file is line-buffered, so the kernel has every whole line; the Python file object is not safe to flush in
        # one thread while another writes.
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None


class TensorBoardSink(Sink):
    """TensorBoard events: `train/<record name>`, `validation/loss`, the recipe and sample answers as text.

    A `shared` folder may hold other runs' events, which a fresh start must not hide.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self.folder, self.shared = folder, shared
        self._writer: Any = None

    def open(self, run: Run, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        from tunesmith.config.dump import dump

        # purge_step=n makes TensorBoard hide every older event from step n on.
        purge = resumed_at + 1 if resumed_at else None if self.shared else 0
        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=10)
        except OSError as error:
            what, fix = "TensorBoard's events cannot be written", "log.tensorboard_dir=FOLDER, or log.tensorboard=false"
            raise MachineError(what, where=str(self.folder), why=str(error), fix=fix) from None
        self._writer.add_text("recipe", f"```yaml\n{dump(run)}```", global_step=resumed_at)

    def step(self, record: StepRecord) -> None:
        for name, value in record.values().items():
            if name not in ("step", "val_loss") and value is not None:
                self._writer.add_scalar(f"train/{name}", value, record.step)

    def validation(self, step: int, loss: float) -> None:
        self._writer.add_scalar("validation/loss", loss, step)

    def samples(self, step: int, rows: Sequence[tuple[str, str]]) -> None:
        for number, (prompt, answer) in enumerate(rows, start=1):
            shown = f"**prompt**\n\n{_verbatim(prompt)}\n\n**answer**\n\n{_verbatim(answer)}"
            self._writer.add_text(f"sample/{number}", shown, global_step=step)

    def text(self, title: str, body: str) -> None:
        self._writer.add_text(title, _verbatim(body))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _verbatim(text: str) -> str:
    """Text that Markdown shows as it is: four spaces before each line make it code."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def sinks_of(
    run: Run, folder: Path, *, total_steps: int | None, steps_per_epoch: int, log: LogFile, stream: TextIO | None = None
) -> Sinks:
    """The sinks that a recipe asks for. The terminal comes first, and metrics.jsonl before those that may be slow."""
    terminal = Terminal(log, total_steps=total_steps, steps_per_epoch=steps_per_epoch, stream=stream)
    sinks: list[Sink] = [terminal, JsonlSink(folder / "metrics.jsonl")]
    if run.log.tensorboard:
        elsewhere = run.log.tensorboard_dir
        sinks.append(TensorBoardSink(Path(elsewhere or folder / "tensorboard"), shared=elsewhere is not None))
    sinks += [TrackerSink(name, folder, lambda text: terminal.text("tracker", text)) for name in trackers_of(run)]
    return Sinks(sinks)
