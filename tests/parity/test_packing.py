"""Packed rows and micro batches beside one document a row, and each alone in plain Transformers.

fp32. B is drawn at random: with B = 0 the gradient of A is exactly zero, and any two zeros agree.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recipes import built_model, make_run, write_rows
from tunesmith.adapter import lora
from tunesmith.batches.batch import IGNORE, Batch, collate
from tunesmith.batches.loader import Loader
from tunesmith.model.arch.tokenizer import eos_ids, load_tokenizer
from tunesmith.runtime.recompute import recompute_layers
from tunesmith.start.prepare import prepare_data
from tunesmith.tokens.text.example import Example
from tunesmith.train_model import TrainModel
from tunesmith.units import Size

TOLERANCE = 1e-5
LENGTHS = (30, 5, 31, 2, 57, 30)


def examples(seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    return [
        Example(draw.integers(3, 250, n).astype(np.int32), np.arange(n) >= max(1, n // 3))
        for n in LENGTHS
    ]


def layouts(of: list[Example]) -> dict[str, Batch]:
    return {
        "one row": collate([of], length=sum(LENGTHS), pad_id=0),
        "one row and padding": collate([of], length=200, pad_id=0),
        "two rows": collate([of[:3], of[3:]], length=100, pad_id=0),
        "unpacked": collate([[e] for e in of], length=64, pad_id=0),
        "backwards": collate([of[::-1]], length=160, pad_id=0),
    }


def model_of(tiny: Path, tmp_path: Path, **changes) -> TrainModel:
    changes["train"] = {"recompute": "none", **changes.get("train", {})}
    return with_drawn_b(built_model(make_run(tiny, tmp_path, held=False, **changes), tiny).train())


def with_drawn_b(model: TrainModel) -> TrainModel:
    torch.manual_seed(1)
    for _, layer in lora.loras(model):
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model


def by_document(losses: torch.Tensor, batch: Batch) -> dict[int, torch.Tensor]:
    """Losses of the supervised positions of each document, by its first token and length."""
    edges = batch.cu_seqlens.tolist()
    found = {}
    for a, b in itertools.pairwise(edges):
        kept = batch.targets.flatten()[a:b] != IGNORE
        if kept.any():
            found[tuple(batch.input_ids.flatten()[a:b].tolist())] = losses.flatten()[a:b][kept]
    return found


def test_losses_of_every_token_are_the_same_in_every_layout(tiny, tmp_path):
    model, of = model_of(tiny, tmp_path), examples()
    plain = plain_losses(model, of)
    for name, batch in layouts(of).items():
        documents = by_document(model.token_scores(batch)[0], batch)
        assert documents.keys() == plain.keys(), name
        for document, losses in documents.items():
            torch.testing.assert_close(losses, plain[document], rtol=0, atol=TOLERANCE, msg=name)


def plain_losses(model: TrainModel, of: list[Example]) -> dict[tuple[int, ...], torch.Tensor]:
    """Each document alone through Transformers' own attention and head."""
    model.model.set_attn_implementation("eager")
    found = {}
    for example in of:
        tokens = torch.from_numpy(example.ids.astype(np.int64))
        with torch.no_grad():
            logits = model.model(tokens.unsqueeze(0)).logits[0, :-1]
        losses = F.cross_entropy(logits, tokens[1:], reduction="none")
        found[tuple(tokens.tolist())] = losses[example.trained[1:]]
    model.use_attention("training")
    return found


def gradients(model: TrainModel, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss, count, _ = model(batch)
    assert count == batch.supervised
    (loss / count).backward()
    return {name: p.grad.clone() for name, p in model.trained_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"compile": "off"}, "model": {"attention": "eager"}},
        {"adapter": {"kind": "none"}},
        {"adapter": {"target": ["v_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}},
    ],
    ids=["lora", "eager attention", "full", "head adapter and trained embedding"],
)
def test_gradients_are_the_same_in_every_layout(changes, tiny, tmp_path):
    model = model_of(tiny, tmp_path, **changes)
    found = {name: gradients(model, batch) for name, batch in layouts(examples()).items()}
    wanted = found.pop("unpacked")
    assert len(wanted) >= 5
    for name, grads in found.items():
        for key, reference in wanted.items():
            assert reference.norm() > 0, f"{key}: a zero reference proves nothing"
            assert (grads[key] - reference).norm() / reference.norm() <= TOLERANCE, f"{key}, {name}"


def test_document_two_sees_neither_document_one_nor_padding(tiny, tmp_path):
    """Another document 1 of the same length, and other padding, change no bit of its losses."""
    model, of, other = model_of(tiny, tmp_path), examples(), examples(seed=9)
    before = model.token_scores(collate([of], length=200, pad_id=0))[0]
    after = model.token_scores(collate([[other[0], *of[1:]]], length=200, pad_id=77))[0]
    edge = LENGTHS[0]
    assert torch.equal(before[0, edge:], after[0, edge:])
    assert not torch.equal(before[0, :edge], after[0, :edge])
    assert (before[0, edge:] > 0).sum() > 60


def test_recomputing_layers_changes_nothing(tiny, tmp_path):
    plain, again = model_of(tiny, tmp_path), model_of(tiny, tmp_path)
    calls = []
    recompute_layers(again.layers, 2)
    recompute_layers(again.layers, 1)
    for number, layer in enumerate(again.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, n=number: calls.append(n))
    batch = layouts(examples())["two rows"]
    a, b = gradients(plain, batch), gradients(again, batch)
    assert sorted(calls) == [0, 0, 1], "a layer that is run again runs twice, the others once"
    assert all(torch.equal(a[k], b[k]) for k in a)


def whole_batch(
    tiny: Path, folder: Path, pack: bool, examples: int
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients and number of micro batches of the first global batch."""
    train = {"global_batch": "16 examples"}
    run = make_run(tiny, folder, held=False, data={"pack": pack}, train=train)
    tokenizer = load_tokenizer(tiny, run.model)
    ends = eos_ids(tiny, tokenizer)
    data = prepare_data(run, tokenizer, ends, len(tokenizer), cache=folder / "cache")
    micro_batch = Size(examples, "examples")
    batch = Loader(data.train, data.schedule, micro_batch=micro_batch, pad_id=0).batch(0)
    model = with_drawn_b(built_model(run, tiny).train())
    total = 0.0
    for micro in batch.micro:
        loss_sum = model(micro).loss
        (loss_sum / batch.supervised).backward()
        total += float(loss_sum.detach().double())
    grads = {name: p.grad for name, p in model.trained_parameters() if p.grad is not None}
    return total / batch.supervised, grads, len(batch.micro)


@pytest.mark.slow
def test_micro_batches_change_neither_loss_nor_gradient(tiny: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 16)
    write_rows(tmp_path / "held.jsonl", 8)
    reference, wanted, _ = whole_batch(tiny, tmp_path, False, 1)
    assert len(wanted) == 28  # A and B of 7 layers in 2 blocks
    assert all(float(g.norm()) > 1e-6 for g in wanted.values()), "a zero reference proves nothing"
    for pack, examples in ((True, 16), (True, 4), (False, 16)):
        loss, grads, micros = whole_batch(tiny, tmp_path, pack, examples)
        assert micros == 16 // examples
        assert loss == pytest.approx(reference, rel=1e-6)
        for name, grad in grads.items():
            apart = float((grad - wanted[name]).norm() / wanted[name].norm())
            assert apart <= 1e-5, f"{name}, packed {pack}, {examples} a micro batch"
