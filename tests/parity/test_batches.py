"""How a global batch is laid out changes nothing: 64 examples in one micro batch, in 8, in 64,
packed and not.

fp32; B is drawn at random, because with B = 0 the gradient of A is exactly zero and any two zeros
agree.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes import built_model, make_run, write_rows
from tunesmith.data.batches.loader import Loader
from tunesmith.data.prepare import prepare_data
from tunesmith.model.tokenizer import eos_ids, load_tokenizer
from tunesmith.units import Size

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LAYOUTS = [(pack, examples) for pack in (True, False) for examples in (64, 8, 1)]


def whole_batch(
    tiny: Path, folder: Path, pack: bool, examples: int
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients and number of micro batches of the first global batch."""
    run = make_run(
        tiny, folder, held=False, data={"pack": pack}, train={"global_batch": "64 examples"}
    )
    tokenizer = load_tokenizer(tiny, run.model)
    data = prepare_data(
        run, tokenizer, eos_ids(tiny, tokenizer), len(tokenizer), cache=folder / "cache"
    )
    batch = Loader(
        data.train, data.schedule, micro_batch=Size(examples, "examples"), pad_id=0
    ).batch(0)
    model = built_model(run, tiny).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.trained_parameters():
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    total = 0.0
    for micro in batch.micro:
        loss_sum = model(micro).loss
        (loss_sum / batch.supervised).backward()
        total += float(loss_sum.detach().double())
    grads = {name: p.grad for name, p in model.trained_parameters() if p.grad is not None}
    return total / batch.supervised, grads, len(batch.micro)


def test_layout_changes_neither_loss_nor_gradient(tiny: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 64)
    write_rows(tmp_path / "held.jsonl", 8)
    reference, wanted, _ = whole_batch(tiny, tmp_path, False, 1)
    assert len(wanted) == 28  # A and B of 7 layers in 2 blocks
    assert all(float(g.norm()) > 1e-6 for g in wanted.values()), "a zero reference proves nothing"
    for pack, examples in LAYOUTS:
        loss, grads, micros = whole_batch(tiny, tmp_path, pack, examples)
        assert micros == 64 // examples
        assert loss == pytest.approx(reference, rel=1e-6)
        for name, grad in grads.items():
            apart = float((grad - wanted[name]).norm() / wanted[name].norm())
            assert apart <= 1e-5, f"{name}, packed {pack}, {examples} a micro batch"


def test_old_scripts_number_of_steps_is_kept(tiny: Path, tmp_path: Path) -> None:
    """512 examples, 8 a step, one epoch: 64 optimizer steps, packed or not."""
    write_rows(tmp_path / "train.jsonl", 512)
    write_rows(tmp_path / "held.jsonl", 8)
    for pack in (True, False):
        run = make_run(
            tiny,
            tmp_path,
            data={"pack": pack},
            train={"duration": "1 epochs", "global_batch": "8 examples"},
        )
        tokenizer = load_tokenizer(tiny, run.model)
        data = prepare_data(
            run, tokenizer, eos_ids(tiny, tokenizer), len(tokenizer), cache=tmp_path / "cache"
        )
        assert data.schedule.steps(run.train.duration) == 64
