"""Where step records go: metrics.jsonl, TensorBoard, W&B and the terminal, all behind one small class.

The loop calls `Sinks`, which hands every event to each sink in turn. A sink shows and never computes; metrics.jsonl
is the only one that a resume reads back. In a run of many ranks only rank 0 has sinks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from tunesmith.config.schema import Run
from tunesmith.errors import MachineError
from tunesmith.metrics.record import StepRecord, cut_back


class Sink:
    """What a run tells; a sink overrides what it shows."""

    def open(self, run: Run, resumed_at: int) -> None:
        """Before the first step. `resumed_at` is the step of the checkpoint that the run goes on from, 0 for none."""

    def step(self, record: StepRecord) -> None:
        """A step is done. With `val_loss` set, the held-out rows were measured after it."""

    def validation(self, step: int, loss: float) -> None:
        """The held-out rows were measured."""

    def samples(self, step: int, rows: Sequence[tuple[str, str]]) -> None:
        """The model answered these prompts: (prompt, answer)."""

    def text(self, title: str, body: str) -> None:
        """Something to read: the recipe, the token contract, a warning."""

    def flush(self) -> None:
        """Called before a checkpoint becomes valid: what was told must survive a crash from here on.

        It may be called in the thread that writes the checkpoint, while the loop tells the next step.
        """

    def close(self) -> None:
        """After the last step, or on the way out of a failure. May be called twice."""


class Sinks(Sink):
    """Several sinks as one."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.all = list(sinks)

    def open(self, run: Run, resumed_at: int) -> None:
        """Open all of them, last first: one that may be refused comes before the run's own files are touched."""
        for sink in reversed(self.all):
            sink.open(run, resumed_at)

    def step(self, record: StepRecord) -> None:
        for sink in self.all:
            sink.step(record)

    def validation(self, step: int, loss: float) -> None:
        for sink in self.all:
            sink.validation(step, loss)

    def samples(self, step: int, rows: Sequence[tuple[str, str]]) -> None:
        for sink in self.all:
            sink.samples(step, rows)

    def text(self, title: str, body: str) -> None:
        for sink in self.all:
            sink.text(title, body)

    def flush(self) -> None:
        for sink in self.all:
            sink.flush()

    def close(self) -> None:
        """Close all of them, also when one fails; the first error is raised at the end."""
        with contextlib.ExitStack() as stack:
            for sink in reversed(self.all):
                stack.callback(sink.close)


class JsonlSink(Sink):
    """metrics.jsonl: one line a step, cut back to the checkpoint's step on resume, synced to the disk by `flush`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def open(self, run: Run, resumed_at: int) -> None:
        cut_back(self.path, resumed_at)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        if self._file is not None:
            self._file.write(record.to_json() + "\n")

    def flush(self) -> None:
        # The file is buffered by line, so whole lines are the kernel's already; the file object itself is not safe to
        # flush in one thread while another writes.
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None


class TensorBoardSink(Sink):
    """TensorBoard events: `train/<record name>`, `validation/loss`, the recipe and sample generations as text.

    Args:
        folder: where the event files go.
        shared: the folder may hold other runs' events, which a fresh start must not hide.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self.folder, self.shared = folder, shared
        self._writer: Any = None

    def open(self, run: Run, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        from tunesmith.config.load import dump

        # A start record with step n makes TensorBoard drop every older event from step n on.
        purge = resumed_at + 1 if resumed_at else None if self.shared else 0
        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=10)
        except OSError as error:
            raise MachineError(
                "TensorBoard's events cannot be written",
                where=str(self.folder),
                why=str(error),
                fix="choose another folder: log.tensorboard_dir=..., or log.tensorboard=false",
            ) from None
        self._writer.add_text("recipe", f"```yaml\n{dump(run)}```", global_step=resumed_at)

    def step(self, record: StepRecord) -> None:
        for name, value in record.values().items():
            if name not in ("step", "val_loss") and value is not None:
                self._writer.add_scalar(f"train/{name}", value, record.step)

    def validation(self, step: int, loss: float) -> None:
        self._writer.add_scalar("validation/loss", loss, step)

    def samples(self, step: int, rows: Sequence[tuple[str, str]]) -> None:
        for number, (prompt, answer) in enumerate(rows, start=1):
            # Four spaces make Markdown show the text as it is, whatever marks it holds.
            shown = "\n\n".join(
                f"**{name}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines() or [""])
                for name, text in (("prompt", prompt), ("answer", answer))
            )
            self._writer.add_text(f"sample/{number}", shown, global_step=step)

    def text(self, title: str, body: str) -> None:
        self._writer.add_text(title, "\n".join(f"    {line}" for line in body.splitlines()))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink(Sink):
    """Weights & Biases, set up by its own WANDB_ variables; a resumed run goes on under the id kept in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._run: Any = None
        self._wandb: Any = None

    def open(self, run: Run, resumed_at: int) -> None:
        try:
            import wandb
        except ImportError:
            raise MachineError(
                "Weights & Biases is asked for and not installed",
                where="log.wandb",
                fix="pip install 'tunesmith[wandb]', or log.wandb=false",
            ) from None
        from tunesmith.config.load import to_mapping

        kept = self.folder / "wandb-id.txt"
        known = kept.read_text().strip() if resumed_at and kept.exists() else None
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tunesmith"),
                name=os.environ.get("WANDB_NAME", self.folder.name),
                id=known or os.environ.get("WANDB_RUN_ID"),
                resume="allow" if known else None,
                dir=str(self.folder),
                config=to_mapping(run),
            )
        except wandb.errors.Error as error:
            raise MachineError(
                "Weights & Biases did not start",
                where="log.wandb",
                why=str(error),
                fix="wandb login, or WANDB_MODE=offline, or log.wandb=false",
            ) from None
        kept.write_text(self._run.id + "\n")
        # W&B's own step may never go back, and a resumed run repeats the steps after its checkpoint.
        self._run.define_metric("train/*", step_metric="train/step")
        self._run.define_metric("validation/*", step_metric="train/step")

    def step(self, record: StepRecord) -> None:
        values = record.values().items()
        self._run.log({f"train/{name}": value for name, value in values if name != "val_loss" and value is not None})

    def validation(self, step: int, loss: float) -> None:
        self._run.log({"train/step": step, "validation/loss": loss})

    def samples(self, step: int, rows: Sequence[tuple[str, str]]) -> None:
        table = self._wandb.Table(columns=["step", "prompt", "answer"], data=[[step, *row] for row in rows])
        self._run.log({"train/step": step, "samples": table})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def for_run(run: Run, folder: Path, *, total_steps: int | None, stream: TextIO | None = None) -> Sinks:
    """The sinks that a recipe asks for. The terminal comes first and metrics.jsonl before what may be slow."""
    from tunesmith.metrics.terminal import Terminal

    sinks: list[Sink] = [Terminal(folder / "log.txt", total_steps=total_steps, stream=stream)]
    sinks.append(JsonlSink(folder / "metrics.jsonl"))
    if run.log.tensorboard:
        elsewhere = run.log.tensorboard_dir
        sinks.append(TensorBoardSink(Path(elsewhere or folder / "tensorboard"), shared=elsewhere is not None))
    if run.log.wandb:
        sinks.append(WandbSink(folder))
    return Sinks(sinks)
