"""Experiment trackers (W&B, MLflow, Trackio, Comet and others), driven through accelerate's classes
by one sink.

A tracker is set up by its own files and variables, such as WANDB_PROJECT, MLFLOW_TRACKING_URI or
TRACKIO_SPACE_ID. `<tracker>-id.txt` in the run directory holds the id of its run, which a resumed
run continues.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from tunesmith.config.dump import flatten, to_mapping
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, RunError, first_line
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.metrics.sink import SampleAnswer, Sink
from tunesmith.run_dir import METRICS

PROJECT = "tunesmith"


class Tracker(NamedTuple):
    """A tracker, by how its run is begun, continued and named.

    Attributes:
        options: (run directory, id of the run to continue or None) -> what accelerate's class hands
            to the tracker.
        run_id: of the tracker's own run object.
        setup: how to set it up, for an error.
        project: the variable that names the project if `log.project` does not.
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
        "wandb login, or WANDB_MODE=offline",
        "WANDB_PROJECT",
    ),
    "mlflow": Tracker(
        lambda folder, run_id: {"run_id": run_id, "run_name": folder.name},
        lambda run: run.info.run_id,
        "set MLFLOW_TRACKING_URI to a running server, or to a database such as sqlite:///mlflow.db",
    ),
    "trackio": Tracker(
        # It finds a run by its name, so a new one gets a name of its own.
        lambda folder, run_id: {
            "name": run_id or f"{folder.name}-{token_hex(3)}",
            "resume": "allow",
            "embed": False,
        },
        lambda run: run.name,
        "hf auth login, or unset TRACKIO_SPACE_ID to write to this machine",
        "TRACKIO_PROJECT",
    ),
    "comet_ml": Tracker(
        lambda folder, run_id: {"experiment_key": run_id},
        lambda experiment: experiment.get_key(),
        "comet login, or COMET_START_ONLINE=0",
        "COMET_PROJECT_NAME",
    ),
    "swanlab": Tracker(
        lambda folder, run_id: {
            "id": run_id,
            "resume": "must" if run_id else None,
            "experiment_name": folder.name,
        },
        lambda run: run.id,
        "swanlab login, or SWANLAB_MODE=offline",
    ),
}


def trackers_of(run: Run) -> list[str]:
    """The trackers that a recipe wants; `log.wandb` is short for one of them."""
    names = list(run.log.trackers)
    if run.log.wandb:
        names.insert(0, "wandb")
    return list(dict.fromkeys(names))


def key_and_fix(run: Run, name: str) -> dict[str, str]:
    """The key that names a tracker, and how to do without it: `where` and `fix` of an error."""
    if name in run.log.trackers:
        return {"where": "log.trackers", "fix": f"remove {name} from log.trackers"}
    return {"where": f"log.{name}", "fix": f"log.{name}=false"}


class TrackerSink(Sink):
    """One tracker: the recipe as its config, `train/<record name>` and `validation/loss` at their
    steps.

    Its calls run one by one in a thread of its own, so that a slow server does not delay a
    step. After the first call that fails the tracker is left alone: each further one may wait for
    minutes.

    Args:
        name: a key of TRACKERS.
        folder: the run directory, with metrics.jsonl as the run before left it.
        warn: takes a line for the user.
    """

    def __init__(self, name: str, folder: Path, warn: Callable[[str], None]) -> None:
        self.name = name
        self.folder = folder
        self.warn = warn
        self._tracker: Any = None
        # Step, loss and val_loss of the records that the tracker has from an earlier start.
        self._sent: set[tuple[int, float, float | None]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def open(self, run: Run, resumed_at: int) -> None:
        tracker = TRACKERS[self.name]
        id_file = self.folder / f"{self.name}-id.txt"
        run_id = None
        if resumed_at and id_file.exists():
            run_id = id_file.read_text().strip()
        # What a killed run reported after its checkpoint is not reported twice, if it comes out the
        # same.
        with suppress(OSError, RunError):
            for record in read_records(self.folder / METRICS) if run_id else ():
                self._sent.add((record.step, record.loss, record.val_loss))
        try:
            # stdout is for answers.
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

        # accelerate's classes log through its process state. Created now, and as that of one
        # process, whatever launched this one: with a LOCAL_RANK it would start a process group.
        with patch_environment(local_rank=-1):
            PartialState()
        # Its own 7 tries wait 4 minutes for a server that is gone.
        if self.name == "mlflow":
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
        # MLflow refuses a changed parameter, such as a longer duration.
        elif run_id is None or self.name != "mlflow":
            tracker.store_init_configuration(flatten(run))
        return tracker

    def step(self, record: StepRecord) -> None:
        if (record.step, record.loss, record.val_loss) in self._sent:
            return
        values = record.tagged()
        # W&B's own step may not decrease, and a resumed run repeats the steps after its checkpoint.
        if self.name == "wandb":
            values["train/step"] = record.step
            self._thread.submit(self._call, lambda tracker: tracker.log(values))
        else:
            self._thread.submit(self._call, lambda tracker: tracker.log(values, step=record.step))

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        def report(tracker: Any) -> None:
            import wandb

            table = wandb.Table(
                columns=["step", *SampleAnswer._fields], data=[[step, *row] for row in rows]
            )
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
        """Do something with the tracker; if it fails, warn once and leave the tracker alone."""
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = None
            text = f"{self.name} failed and is disabled for this run: {first_line(error)}"
            self.warn(f"warning: {text}; metrics.jsonl has every step")
