"""Records come back bit for bit, and a file of them survives being torn."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from records import record
from tunesmith.errors import RunError
from tunesmith.metrics.record import StepRecord, cut_back, read_records

REQUIRED = [
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "examples",
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
    "mfu",
    "memory_gib",
]


def bits(value: float | None) -> bytes | None:
    return None if value is None else struct.pack("<d", value)


FLOATS = st.floats(-1e100, 1e100) | st.sampled_from([math.inf, -math.inf])


@given(
    loss=FLOATS,
    norm=FLOATS,
    mfu=st.none() | FLOATS,
)
def test_floats_round_trip_bit_for_bit(loss: float, norm: float, mfu: float | None) -> None:
    before = StepRecord(
        step=1, epoch=0.1, loss=loss, learning_rate=1e-4, grad_norm=norm, tokens=1, supervised_tokens=1, examples=1,
        step_seconds=0.1, data_seconds=0.0, tokens_per_second=10.0, mfu=mfu, memory_gib=1.0,
    )  # fmt: skip
    after = StepRecord.from_json(before.to_json())
    assert [bits(v) for v in (after.loss, after.grad_norm, after.mfu)] == [
        bits(v) for v in (loss, norm, mfu)
    ]
    assert after == before


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_legal_json(value: float) -> None:
    line = record(loss=value, val_loss=value).to_json()
    json.loads(line, parse_constant=refuse)
    after = StepRecord.from_json(line)
    assert bits(after.loss) == bits(value)
    assert bits(after.val_loss) == bits(value)


def test_names_are_the_published_ones_and_unmeasured_ones_are_left_out() -> None:
    assert list(json.loads(record().to_json())) == REQUIRED
    full = record(
        mfu=0.4, mfu_peak_tflops=989.5, gpu_utilization=99.0, gpu_power_watts=650.0, val_loss=1.0
    )
    optional = ["mfu_peak_tflops", "gpu_utilization", "gpu_power_watts", "val_loss"]
    assert list(json.loads(full.to_json())) == REQUIRED + optional


@pytest.mark.parametrize(("line", "why"), [("[]", "step"), ("{", "EOF"), ('{"step": 1}', "loss")])
def test_what_is_no_record_is_refused(line: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        StepRecord.from_json(line)


@pytest.mark.parametrize(
    ("name", "value"), [("step", 1.5), ("step", True), ("loss", "high"), ("loss", None)]
)
def test_a_value_of_another_type_is_refused(name: str, value: object) -> None:
    values = json.loads(record().to_json()) | {name: value}
    with pytest.raises(ValueError, match=name):
        StepRecord.from_json(json.dumps(values))


def test_names_of_a_later_version_are_passed_over_or_kept_as_extra_numbers() -> None:
    values = json.loads(record().to_json()) | {
        "nvlink": True,
        "ranks": [1, 2],
        "host": "a",
        "nvlink_gib": 3.0,
    }
    assert StepRecord.from_json(json.dumps(values)) == record(extra={"nvlink_gib": 3.0})


def test_a_methods_metrics_stand_beside_the_others_and_come_back() -> None:
    full = record(val_loss=1.0, extra={"reward_margin": 0.25, "kl": -math.inf})
    line = full.to_json()
    assert list(json.loads(line)) == [*REQUIRED, "val_loss", "reward_margin", "kl"]
    assert StepRecord.from_json(line) == full
    assert StepRecord.from_plain(full.to_plain()) == full
    assert full.values()["kl"] == -math.inf
    for name in ("loss", "val_loss", "extra"):
        with pytest.raises(ValueError, match=rf"{name} must\W+not\W+be\W+in `extra`"):
            record(extra={"kl": 1.0, name: 2.0})


def lines(*records: StepRecord) -> bytes:
    return "".join(r.to_json() + "\n" for r in records).encode()


def test_cut_back_keeps_the_bytes_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = lines(record(1), record(2))
    path.write_bytes(kept + lines(record(3), record(4)))
    assert cut_back(path, 2) == 2
    assert path.read_bytes() == kept
    assert cut_back(path, 2) == 0
    assert cut_back(path, 0) == 2
    assert path.read_bytes() == b""
    assert list(tmp_path.iterdir()) == [path]


def test_cut_back_drops_every_torn_last_line(tmp_path: Path) -> None:
    """A kill can tear the line at any byte; even a line that lacks only its end would run into the
    next one.
    """
    path = tmp_path / "metrics.jsonl"
    whole, last = lines(record(1), record(2)), lines(record(3))
    for end in range(1, len(last)):
        path.write_bytes(whole + last[:end])
        assert cut_back(path, 3) == 1, end
        assert path.read_bytes() == whole
    path.write_bytes(whole + last)
    assert cut_back(path, 3) == 0


def test_cut_back_drops_unreadable_bytes_and_leaves_a_missing_file_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert cut_back(path, 3) == 0
    assert not path.exists()
    path.write_bytes(lines(record(1)) + b"\x00\xff\xfe\n" + lines(record(2)))
    assert cut_back(path, 5) == 1
    assert [r.step for r in read_records(path)] == [1, 2]


def test_read_leaves_out_a_torn_last_line_and_names_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(record(1), record(2)) + b'{"step": 3, "lo')
    assert [r.step for r in read_records(path)] == [1, 2]
    path.write_bytes(lines(record(1)) + b"oops\n" + lines(record(3)))
    with pytest.raises(RunError) as raised:
        read_records(path)
    assert raised.value.where == f"{path}:2"


def test_the_page_explains_every_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert [name for name in StepRecord.__dataclass_fields__ if f"`{name}`" not in page] == []
