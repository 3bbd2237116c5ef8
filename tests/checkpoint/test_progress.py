"""progress.json: its keys and values, in this version and an older one."""

from __future__ import annotations

import json
import math
from pathlib import Path

from errors import refuses
from records import record
from tunesmith.checkpoint.resume import PROGRESS, Progress
from tunesmith.errors import CheckpointError

KEYS = (
    "step seconds record validated best_step best_loss best_accuracy kept_step kept_score worse "
    "loss_scale good_steps ended data_hash validation_hash model_hash reference_hash micro_batch "
    "threads shares_prompts"
).split()


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    last = record(3, val_loss=math.inf, extra={"kl": 0.1})
    before = Progress(3, 1.5, last, best_step=2, kept_step=1, kept_score=[2.5], worse=1)
    before.write(tmp_path)
    values = json.loads((tmp_path / PROGRESS).read_text())
    assert list(values) == KEYS
    assert values["record"] == json.loads(last.to_json())
    assert Progress.read(tmp_path) == before


OLD = {"step": 3, "seconds": 1.5, "record": json.loads(record(3).to_json()), "validated": True}


def test_an_older_file_is_read_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS
    path.parent.mkdir()
    path.write_text(json.dumps(OLD | {"rounding": "counter"}))  # a key of an earlier version
    assert Progress.read(tmp_path) == Progress(step=3, seconds=1.5, record=record(3))
    for broken, named in (({"step": 3}, ["'record'"]), ([], []), ("{", [])):
        path.write_text(json.dumps(broken))
        with refuses(CheckpointError, names=[PROGRESS, *named]):
            Progress.read(tmp_path)
