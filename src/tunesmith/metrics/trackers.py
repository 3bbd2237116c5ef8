"""A sink for experiment trackers (W&B, MLflow, Trackio, Comet and others), based on accelerate's
classes.

A tracker is configured by its own files and environment variables, such as WANDB_PROJECT,
MLFLOW_TRACKING_URI or TRACKIO_SPACE_ID. `<tracker>-id.txt` in the run directory contains the id of
the tracker's run, so that a resumed run continues it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from tunesmith.config.dump import flatten, to_mapping
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, first_line
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import SampleAnswer, Sink

PROJECT = "tunesmith"


class Tracker(NamedTuple):
    """Functions and texts with which tunesmith uses a tracker.

    Attributes:
        options: returns the arguments that accelerate's class passes to the tracker. It is called
            with the run directory and the id of the run to continue (None for a new run).
        run_id: returns the id of the tracker's run object.
        setup: instructions for the setup, for an error message.
        project: the variable with the project's name, used if `log.project` is not set.
    """

    options: Callable[[Path, str | None], dict[str, object]]
    run_id: Callable[[Any], str]
    setup: str
    project: str = ""


TRACKERS = {
    "wandb": Tracker(
        lambda folder, run_id: {
            "id": run_id,
            "resume": "allow" if run_id else None,
            "dir": str(folder),
            "name": os.environ.get("WANDB_NAME", folder.name),
        },
        lambda run: run.id,
        "run `wandb login`, or set WANDB_MODE=offline",
        "WANDB_PROJECT",
    ),
    "mlflow": Tracker(
        lambda folder, run_id: {"run_id": run_id, "run_name": folder.name},
        lambda run: run.info.run_id,
        "set MLFLOW_TRACKING_URI to a running server, or to a database such as sqlite:///mlflow.db",
    ),
    "trackio": Tracker(
        # Trackio identifies a run by its name, so a new run needs a unique name.
        lambda folder, run_id: {
            "name": run_id or f"{folder.name}-{token_hex(3)}",
            "resume": "allow",
            "embed": False,
        },
        lambda run: run.name,
        "run `hf auth login`, or unset TRACKIO_SPACE_ID to write to a local folder",
        "TRACKIO_PROJECT",
    ),
    "comet_ml": Tracker(
        lambda folder, run_id: {"experiment_key": run_id},
        lambda experiment: experiment.get_key(),
        "run `comet login`, or set COMET_START_ONLINE=0",
        "COMET_PROJECT_NAME",
    ),
    "swanlab": Tracker(
        lambda folder, run_id: {
            "id": run_id,
            "resume": "must" if run_id else None,
            "experiment_name": folder.name,
        },
        lambda run: run.id,
        "run `swanlab login`, or set SWANLAB_MODE=offline",
    ),
}


def trackers_of(run: Run) -> list[str]:
    """Return the trackers that a recipe requests. `log.wandb: true` requests W&B."""
    wandb = ["wandb"] if run.log.wandb else []
    return list(dict.fromkeys([*wandb, *run.log.trackers]))


def key_and_fix(run: Run, name: str) -> dict[str, str]:
    """Return `where` and `fix` for an error of a tracker: the recipe key that enables the tracker,
    and how to disable it.
    """
    if name in run.log.trackers:
        return {"where": "log.trackers", "fix": f"remove {name} from log.trackers"}
    return {"where": f"log.{name}", "fix": f"set log.{name}=false"}


@dataclass
class TrackerSink(Sink):
    """A sink for one tracker. It sends the recipe as the config, and the values of the records
    (`train/loss`, `validation/loss`).

    All calls run one after the other in a background thread, so that a slow server does not delay a
    step. After the first call that fails, the tracker is no longer called, because each call could
    wait for minutes.

    Args:
        name: a key of TRACKERS.
        folder: the run directory.
        warn: shows a line to the user.
    """

    name: str
    folder: Path
    warn: Callable[[str], None]
    _tracker: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)

    def open(self, run: Run, resumed_at: int) -> None:
        tracker = TRACKERS[self.name]
        id_file = self.folder / f"{self.name}-id.txt"
        run_id = id_file.read_text().strip() if resumed_at and id_file.exists() else None
        try:
            # Redirect the tracker's output to stderr, because stdout is for the command's results.
            with redirect_stdout(sys.stderr):
                self._tracker = self._thread.submit(self._start, run, run_id).result()
        except Exception as error:
            self._thread.shutdown(wait=False)
            key = key_and_fix(run, self.name)
            raise MachineError(
                f"{self.name} did not start",
                where=key["where"],
                why=first_line(error),
                fix=f"{tracker.setup}; or {key['fix']}",
            ) from error
        id_file.write_text(tracker.run_id(self._tracker.tracker) + "\n")

    def _start(self, run: Run, run_id: str | None) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        from accelerate.utils import patch_environment

        # accelerate's classes need its PartialState for logging, so create it first. With the
        # launcher's LOCAL_RANK, accelerate would start a process group. local_rank=-1 prevents
        # this.
        with patch_environment(local_rank=-1):
            PartialState()
        # Use fewer retries than MLflow's default of 7, which takes 4 minutes if the server is
        # unreachable.
        is_mlflow = self.name == "mlflow"
        if is_mlflow:
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

        settings = TRACKERS[self.name]
        project = run.log.project or os.environ.get(settings.project, PROJECT)
        options = settings.options(self.folder, run_id)
        tracker = LOGGER_TYPE_TO_CLASS[self.name](project, **options)
        tracker.start()
        if self.name == "wandb":
            tracker.tracker.define_metric("train/*", step_metric="train/step")
            tracker.tracker.define_metric("validation/*", step_metric="train/step")
            tracker.store_init_configuration(to_mapping(run))
        # MLflow rejects a changed parameter, such as a longer duration, so send the recipe only
        # once.
        elif run_id is None or not is_mlflow:
            tracker.store_init_configuration(flatten(run))
        return tracker

    def step(self, record: StepRecord) -> None:
        values = record.tagged()
        step: int | None = record.step
        # W&B's step must not decrease, but a resumed run repeats the steps after its checkpoint.
        # Therefore send the step as a metric.
        if self.name == "wandb":
            values["train/step"] = record.step
            step = None
        self._thread.submit(self._call, lambda tracker: tracker.log(values, step=step))

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        def report(tracker: Any) -> None:
            import wandb

            columns = ["step", *SampleAnswer._fields]
            table = wandb.Table(columns=columns, data=[[step, *row] for row in rows])
            tracker.log({"samples": table, "train/step": step})

        if self.name == "wandb":
            self._thread.submit(self._call, report)

    def close(self) -> None:
        if self._tracker is not None:
            self._thread.submit(self._call, lambda tracker: tracker.finish())
        with redirect_stdout(sys.stderr):
            self._thread.shutdown()
        self._tracker = None

    def _call(self, action: Callable[[Any], object]) -> None:
        """Call `action` with the tracker. If it fails, warn once and disable the tracker."""
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = None
            text = f"{self.name} failed and is disabled for this run: {first_line(error)}"
            self.warn(f"warning: {text}; metrics.jsonl has every step")
