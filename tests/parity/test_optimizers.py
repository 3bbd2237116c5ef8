"""8-bit moments beside AdamW, and updates inside the backward, through the real `train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from errors import refuses
from recipes import make_run
from tunesmith.config.schema import Run
from tunesmith.errors import NonFiniteError
from tunesmith.start.run import train
from tunesmith.training.identity import write_identity
from tunesmith.training.session import Session

pytestmark = pytest.mark.slow

SAME = ("step", "loss", "learning_rate", "tokens", "supervised_tokens", "examples")


def full(tiny: Path, folder: Path, name: str, /, dtype: str = "fp32", **changes: Any) -> Run:
    """Full fine-tuning of the tiny Llama, whose embedding is its head, at a constant rate."""
    train = {"duration": "4 steps", "schedule": "constant", "warmup": "0 steps", "clip_norm": None}
    return make_run(
        tiny, folder, held=False, model={"dtype": dtype}, adapter={"kind": "none"},
        train=train | changes, checkpoint={"every": None}, output_dir=str(folder / name),
    )  # fmt: skip


def go(run: Run) -> list[dict[str, Any]]:
    """Train; the records that lie in the run directory then."""
    train(run, quiet=True)
    return [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").open()]


def tensors(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    folder = Path(run.output_dir) / f"checkpoint-{step}"
    return {
        f"{f.name}:{k}": v
        for f in sorted(folder.rglob("*.safetensors"))
        for k, v in load_file(f).items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def test_8bit_curve_is_adamw_s_within_half_a_percent(tiny: Path, tmp_path: Path) -> None:
    curves = []
    for optimizer in ("adamw", "adamw-8bit"):
        run = full(tiny, tmp_path, optimizer, duration="24 steps", optimizer=optimizer)
        curves.append([record["loss"] for record in go(run)])
        held = {str(v.dtype) for k, v in tensors(run, 24).items() if k.endswith("exp_avg")}
        assert ("torch.uint8" in held) == (optimizer == "adamw-8bit")
    plain, eight = curves
    furthest = max(abs(a - b) / a for a, b in zip(plain, eight, strict=True))
    # Rounded moments shift each update a little: 0.2 % were measured, to half the loss.
    assert 1e-7 < furthest < 5e-3
    assert plain[-1] < plain[0] - 0.2, "the loss did not fall: the curves prove nothing"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"dtype": "bf16"}, marks=pytest.mark.nightly),
        {"dtype": "bf16", "master_weights": "stochastic"},
        {"optimizer": "adamw-8bit"},
    ],
)
def test_in_the_backward_is_the_ordinary_run_bit_for_bit(changes, tiny, tmp_path) -> None:
    """One micro batch, no clipping, a head tied to the embedding."""
    # In examples, as in the backward: micro batches in tokens lay the documents in another order.
    plain = full(tiny, tmp_path, "plain", **changes, micro_batch="8 examples")
    inside = full(tiny, tmp_path, "inside", **changes, optimizer_in_backward=True)
    wanted, got = go(plain), go(inside)
    assert [{k: r[k] for k in SAME} for r in got] == [{k: r[k] for k in SAME} for r in wanted]
    # The same squares, added up in another order.
    norms, others = ([r["grad_norm"] for r in records] for records in (got, wanted))
    assert norms == pytest.approx(others, rel=1e-6)
    assert_same(tensors(inside, 4), tensors(plain, 4))


def test_resumed_is_uninterrupted(tiny: Path, tmp_path: Path) -> None:
    """fp32 masters, 8-bit moments and updates in the backward."""
    changes = {"dtype": "bf16", "optimizer": "adamw-8bit", "optimizer_in_backward": True}
    keys = (*SAME, "grad_norm")
    whole = full(tiny, tmp_path, "whole", **changes)
    wanted = go(whole)
    go(full(tiny, tmp_path, "cut", **changes, duration="2 steps"))
    cut = full(tiny, tmp_path, "cut", **changes)
    assert [[r[k] for k in keys] for r in go(cut)] == [[r[k] for k in keys] for r in wanted]
    assert_same(tensors(cut, 4), tensors(whole, 4))


def test_in_the_backward_a_loss_that_is_not_finite_stops_with_finite_weights(
    tiny, tmp_path, monkeypatch
):
    sessions: list[Session] = []

    def kept(session: Session, argv: list[str] | None) -> None:
        sessions.append(session)
        write_identity(session, argv)

    monkeypatch.setattr("tunesmith.training.identity.write_identity", kept)
    run = full(tiny, tmp_path, "run", optimizer_in_backward=True, learning_rate=1e37)
    with refuses(NonFiniteError, cause="not-finite", names=["gradient"]):
        go(run)
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["last_step"] >= 1
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert all(p.isfinite().all() for p in sessions[0].model.parameters())
