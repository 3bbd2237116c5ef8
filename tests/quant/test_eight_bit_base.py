"""A base goes into fp8 only if the loss stays; the reason comes with its figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errors import holds, refuses
from logged import logged_lines
from recipes import make_run, write_rows
from tunesmith.errors import ModelError
from tunesmith.formats import fp8, scaled_matmul
from tunesmith.planning import compare_eight_bit
from tunesmith.stages.request import Request
from tunesmith.training.build import build
from tunesmith.training.session import Session, first_batches

pytestmark = pytest.mark.slow


def begin(tiny: Path, folder: Path) -> tuple[Session, list[str]]:
    for name, rows in (("train", 24), ("held", 8)):
        write_rows(folder / f"{name}.jsonl", rows)
    run = make_run(tiny, folder, held=False, train={"global_batch": "4 examples"})
    run = replace(run, model=replace(run.model, dtype="bf16", quantize="fp8"))
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    with logged_lines() as said:
        return build(Request(run)), said


def base(session: Session) -> tuple[str, str]:
    return session.plan.base, session.plan.why["base"]


def count(session: Session) -> int:
    return len(list(compare_eight_bit.eight_bit_layers(session.model)))


def test_the_base_is_quantized_and_the_loss_is_told(tiny, tmp_path):
    session, said = begin(tiny, tmp_path)
    taken, why = base(session)
    assert taken == fp8.select_scaling(torch.device("cpu")).recipe
    assert count(session) == 14
    assert "14 layers" in why
    assert "loss " in why
    assert any(f"base: {taken}" in line for line in said)
    assert not any(line.startswith("warning: ") and holds(line, "base") for line in said)
    weights = {id(p): p for p in session.model.parameters()}
    held = sum(p.numel() * p.itemsize for p in weights.values())
    assert held == session.plan.memory.weights, (
        "a byte a weight of the layers, as the estimate has it"
    )


def test_where_the_loss_moves_too_far_the_base_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_eight_bit, "MAX_LOSS_CHANGE", -1.0)
    with refuses(ModelError, where="model.quantize", fix=["model.quantize=none"]):
        begin(tiny, tmp_path)


@pytest.mark.parametrize(("loss", "taken"), [(0.0, "fast"), (1.5, "full")])
def test_fast_sums_are_taken_where_the_loss_stays(loss, taken, tiny, tmp_path, monkeypatch):
    """loss: the share that the stand-in's sums lose. It moves the loss of a model that knows
    nothing, near log(vocabulary), by 0.05 %.
    """
    monkeypatch.setattr(compare_eight_bit, "MAX_LOSS_CHANGE_BY_SUMS", 1e-4)
    session, _ = begin(tiny, tmp_path)
    layers = list(compare_eight_bit.eight_bit_layers(session.model))
    batches = first_batches(session.loader(0), session.device, 200)
    product = scaled_matmul.scaled_mm

    def short(a, b, *, use_fast_accum, **rest):
        return product(a, b, use_fast_accum=False, **rest) * (1 - loss * use_fast_accum)

    monkeypatch.setattr(scaled_matmul, "scaled_mm", short)
    change = compare_eight_bit.choose_sums(session.model, batches, session.ranks)
    assert change.is_tolerable == (taken == "fast"), change
    assert {layer.format.fast_sums for layer in layers} == {taken == "fast"}


def test_a_machine_without_fp8_matmuls_trains_in_bf16(tiny, tmp_path, monkeypatch):
    refused = fp8.Scaling(None, "this chip has no fp8 matmuls: too old")
    monkeypatch.setattr(fp8, "select_scaling", lambda *tried, **options: refused)
    session, said = begin(tiny, tmp_path)
    assert base(session) == ("bf16", refused.why)
    assert count(session) == 0
    assert any(refused.why in line for line in said)


@pytest.mark.parametrize("least", [1, 200, 3000])
def test_probes_are_the_first_batches_and_hold_enough(tiny, tmp_path, least):
    session, _ = begin(tiny, tmp_path)
    found = first_batches(session.loader(0), session.device, least)
    assert sum(b.tokens for b in found) >= least
    assert sum(b.tokens for b in found[:-1]) < least
    first = session.loader(0).batch(0).micro
    assert any(
        found[0].input_ids is not b.input_ids and torch.equal(found[0].input_ids, b.input_ids)
        for b in first
    )
    assert found[0].input_ids.numel() == max(b.input_ids.numel() for b in first)
