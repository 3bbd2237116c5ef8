"""Records come back bit for bit, and a file of them survives being torn."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from records import record
from tunesmith.errors import RunError
from tunesmith.metrics.record import StepRecord, cut_back, read_records

REQUIRED = (
    "step epoch loss learning_rate grad_norm tokens supervised_tokens examples step_seconds "
    "data_seconds tokens_per_second mfu memory_gib"
).split()


def bits(value: float | None) -> bytes | None:
    return None if value is None else struct.pack("<d", value)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


FLOATS = [0.1, 1 / 3, -0.0, 5e-324, 1e100, 2**53 + 2.0, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", FLOATS)
def test_floats_come_back_bit_for_bit_from_legal_json(value: float) -> None:
    before = record(loss=value, val_loss=value, mfu=value, extra={"kl": value})
    line = before.to_json()
    json.loads(line, parse_constant=refuse)
    after = StepRecord.from_json(line)
    found = [after.loss, after.val_loss, after.mfu, after.extra["kl"]]
    assert [bits(each) for each in found] == [bits(value)] * 4
    assert math.isnan(value) or after == before


def test_names_are_the_published_ones_and_unmeasured_ones_are_left_out() -> None:
    assert list(json.loads(record().to_json())) == REQUIRED
    optional = {"mfu_peak_tflops": 989.5, "gpu_power_watts": 650.0, "val_loss": 1.0}
    full = record(mfu=0.4, **optional)
    assert list(json.loads(full.to_json())) == [*REQUIRED, *optional]
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert [name for name in StepRecord.__dataclass_fields__ if f"`{name}`" not in page] == []


@pytest.mark.parametrize(
    ("line", "named"),
    [("{", "EOF"), ('{"step": 1}', "loss"), ({"step": 1.5}, "step"), ({"loss": "high"}, "loss")],
)  # fmt: skip
def test_what_is_no_record_is_refused(line: str | dict[str, Any], named: str) -> None:
    if isinstance(line, dict):
        line = json.dumps(json.loads(record().to_json()) | line)
    with pytest.raises(ValueError, match=named):
        StepRecord.from_json(line)


def test_a_methods_metrics_stand_beside_the_others_and_come_back() -> None:
    full = record(val_loss=1.0, extra={"reward_margin": 0.25, "kl": -math.inf})
    line = full.to_json()
    assert list(json.loads(line)) == [*REQUIRED, "val_loss", "reward_margin", "kl"]
    assert StepRecord.from_json(line) == StepRecord.from_plain(full.to_plain()) == full
    assert full.values()["kl"] == -math.inf
    with pytest.raises(ValueError, match="val_loss"):
        record(extra={"kl": 1.0, "val_loss": 2.0})
    # Names of a later version: numbers are kept, the rest is passed over.
    later = {"nvlink": True, "ranks": [1, 2], "host": "a", "nvlink_gib": 3.0}
    line = json.dumps(json.loads(record().to_json()) | later)
    assert StepRecord.from_json(line) == record(extra={"nvlink_gib": 3.0})


def lines(*steps: int) -> bytes:
    return "".join(record(step).to_json() + "\n" for step in steps).encode()


def test_cut_back_keeps_the_bytes_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert cut_back(path, 3) == 0
    assert not path.exists()
    path.write_bytes(lines(1, 2, 3, 4))
    assert cut_back(path, 2) == 2
    assert path.read_bytes() == lines(1, 2)
    assert cut_back(path, 2) == 0


def test_cut_back_drops_every_torn_last_line(tmp_path: Path) -> None:
    """A kill can tear the line at any byte; a line without its end would run into the next one."""
    path = tmp_path / "metrics.jsonl"
    whole, last = lines(1, 2), lines(3)
    for end in (1, len(last) // 2, len(last) - 1):
        path.write_bytes(whole + last[:end])
        assert cut_back(path, 3) == 1, end
        assert path.read_bytes() == whole
    path.write_bytes(whole + last)
    assert cut_back(path, 3) == 0
    path.write_bytes(lines(1) + b"\x00\xff\xfe\n" + lines(2))
    assert cut_back(path, 5) == 1
    assert [r.step for r in read_records(path)] == [1, 2]


def test_read_leaves_out_a_torn_last_line_and_names_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2) + b'{"step": 3, "lo')
    assert [r.step for r in read_records(path)] == [1, 2]
    path.write_bytes(lines(1) + b"oops\n" + lines(3))
    with refuses(RunError, where=f"{path}:2"):
        read_records(path)
