"""Experiment trackers (W&B, MLflow, Trackio, Comet and others), driven through accelerate's classes by one sink.

A tracker is set up by its own files and variables, such as WANDB_PROJECT, MLFLOW_TRACKING_URI or TRACKIO_SPACE_ID.
`<tracker>-id.txt` in the run directory holds the id of its run, which a resumed run continues.
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
    """How one tracker's run is begun, continued and named."""

    # (run directory, id of the run to continue or None) -> what accelerate's class hands to the tracker
    options: Callable[[Path, str | None], dict[str, Any]]
    run_id: Callable[[Any], str]  # of the tracker's own run object
    setup: str  # how to set it up, for an error
    project: str = (
        ""  # the variable that names the project, where accelerate's class does not read it
    )


TRACKERS = {
    "wandb": Tracker(
        lambda folder, known: (
            {"id": known, "resume": "allow" if known else None, "dir": str(folder)}
            | {"name": os.environ.get("WANDB_NAME", folder.name)}
        ),
        lambda run: run.id,
        "wandb login, or WANDB_MODE=offline",
        "WANDB_PROJECT",
    ),
    "mlflow": Tracker(
        lambda folder, known: {"run_id": known, "run_name": folder.name},
        lambda run: run.info.run_id,
        "set MLFLOW_TRACKING_URI to a server that answers, or to a database such as sqlite:///mlflow.db",
    ),
    "trackio": Tracker(
        # It finds a run by its name, so a new one gets a name of its own.
        lambda folder, known: {
            "name": known or f"{folder.name}-{token_hex(3)}",
            "resume": "allow",
            "embed": False,
        },
        lambda run: run.name,
        "hf auth login, or unset TRACKIO_SPACE_ID to write to this machine",
        "TRACKIO_PROJECT",
    ),
    "comet_ml": Tracker(
        lambda folder, known: {"experiment_key": known},
        lambda experiment: experiment.get_key(),
        "comet login, or COMET_START_ONLINE=0",
        "COMET_PROJECT_NAME",
    ),
    "swanlab": Tracker(
        lambda folder, known: {
            "id": known,
            "resume": "must" if known else None,
            "experiment_name": folder.name,
        },
        lambda run: run.id,
        "swanlab login, or SWANLAB_MODE=offline",
    ),
}


def trackers_of(run: Run) -> list[str]:
    """The trackers that a recipe asks for; `log.wandb` is short for one of them."""
    return list(dict.fromkeys((*(["wandb"] if run.log.wandb else []), *run.log.trackers)))


def asked_by(run: Run, name: str) -> dict[str, str]:
    """The key that asks for a tracker, and how to do without it: `where` and `fix` of an error."""
    if name in run.log.trackers:
        return {"where": "log.trackers", "fix": f"take {name} out of log.trackers"}
    return {"where": f"log.{name}", "fix": f"log.{name}=false"}


class TrackerSink(Sink):
    """One tracker: the recipe as its config, `train/<record name>` and `validation/loss` at their steps.

    Its calls are made one by one in a thread of its own, so that a slow server does not hold up a step. After the first
    call that fails the tracker is left alone: each further one may wait for minutes.
    `name` is a key of TRACKERS; `folder` the run directory, with metrics.jsonl as the run before left it; `warn` takes a
    line for the user.
    """

    def __init__(self, name: str, folder: Path, warn: Callable[[str], None]) -> None:
        self.name, self.folder, self.warn = name, folder, warn
        self._tracker: Any = None
        self._sent: set[tuple[str, int, float | None]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def open(self, run: Run, resumed_at: int) -> None:
        kept, kind = self.folder / f"{self.name}-id.txt", TRACKERS[self.name]
        known = kept.read_text().strip() if resumed_at and kept.exists() else None
        # What a killed run reported after its checkpoint is not reported twice, if it comes out the same.
        with suppress(OSError, RunError):
            for record in read_records(self.folder / METRICS) if known else ():
                self._sent |= {
                    ("train", record.step, record.loss),
                    ("validation", record.step, record.val_loss),
                }
        try:
            with redirect_stdout(sys.stderr):  # stdout is for answers
                self._tracker = self._thread.submit(self._start, run, known).result()
        except Exception as error:
            self._thread.shutdown(wait=False)
            what, asked = f"{self.name} did not start", asked_by(run, self.name)
            fix = f"{kind.setup}; or {asked['fix']}"
            raise MachineError(
                what, where=asked["where"], why=first_line(error), fix=fix
            ) from error
        kept.write_text(kind.run_id(self._tracker.tracker) + "\n")

    def _start(self, run: Run, known: str | None) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        from accelerate.utils import patch_environment

        # accelerate's classes log through its process state. Made now, and as that of one process, whatever launched
        # this one: with a LOCAL_RANK it would start a process group.
        with patch_environment(local_rank=-1):
            PartialState()
        if self.name == "mlflow":  # its own 7 tries wait 4 minutes for a server that is gone
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        kind = TRACKERS[self.name]
        options = kind.options(self.folder, known)
        tracker = LOGGER_TYPE_TO_CLASS[self.name](os.environ.get(kind.project, PROJECT), **options)
        tracker.start()
        if self.name == "wandb":
            # W&B's own step may not decrease, and a resumed run repeats the steps after its checkpoint.
            tracker.tracker.define_metric("train/*", step_metric="train/step")
            tracker.tracker.define_metric("validation/*", step_metric="train/step")
            tracker.store_init_configuration(to_mapping(run))
        elif (
            known is None or self.name != "mlflow"
        ):  # which refuses a changed parameter, such as a longer duration
            tracker.store_init_configuration(flatten(run))
        return tracker

    def step(self, record: StepRecord) -> None:
        values = {
            f"train/{name}": v
            for name, v in record.values().items()
            if name not in ("step", "val_loss")
        }
        self._report(
            "train",
            record.step,
            record.loss,
            {name: v for name, v in values.items() if v is not None},
        )

    def validation(self, step: int, loss: float) -> None:
        self._report("validation", step, loss, {"validation/loss": loss})

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

    def _report(self, part: str, step: int, loss: float | None, values: dict[str, Any]) -> None:
        if (part, step, loss) in self._sent:
            return
        if self.name == "wandb":
            self._thread.submit(
                self._call, lambda tracker: tracker.log(values | {"train/step": step})
            )
        else:
            self._thread.submit(self._call, lambda tracker: tracker.log(values, step=step))

    def _call(self, action: Callable[[Any], object]) -> None:
        """Do something with the tracker; if it fails, say so once and leave the tracker alone."""
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = None
            text = f"{self.name} failed, and gets no more of this run: {first_line(error)}"
            self.warn(f"warning: {text}; metrics.jsonl has every step")
