"""Packed rows against one document a row, and against each document alone in plain Transformers.

fp32. B is drawn at random: with B = 0 the gradient of A is exactly zero, and any two zeros agree.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recipes import built_model, make_run
from tunesmith.adapter import lora
from tunesmith.data.batches.batch import IGNORE, Batch, collate
from tunesmith.data.text.example import Example
from tunesmith.methods.base import TrainModel, supervised_positions
from tunesmith.presentation.start import trained_text
from tunesmith.runtime.recompute import recompute_layers

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
    run = make_run(tiny, tmp_path, held=False)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, dtype="fp32", **changes.get("model", {})),
        adapter=dataclasses.replace(run.adapter, **changes.get("adapter", {})),
        train=dataclasses.replace(run.train, recompute="none", **changes.get("train", {})),
    )
    model = built_model(run, tiny).train()
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
    found = {
        name: by_document(model.token_scores(batch)[0], batch)
        for name, batch in layouts(of).items()
    }
    plain = plain_losses(model, of)
    for name, documents in found.items():
        assert documents.keys() == plain.keys(), name
        for document, losses in documents.items():
            torch.testing.assert_close(losses, plain[document], rtol=0, atol=TOLERANCE, msg=name)


def plain_losses(model: TrainModel, of: list[Example]) -> dict[tuple[int, ...], torch.Tensor]:
    """Each document alone through Transformers' own attention and head."""
    model.model.set_attn_implementation("eager")
    found = {}
    for example in of:
        ids = example.ids
        trained = example.trained
        tokens = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits = model.model(tokens.unsqueeze(0)).logits[0, :-1]
        found[tuple(tokens.tolist())] = F.cross_entropy(logits, tokens[1:], reduction="none")[
            trained[1:]
        ]
    model.use_training_attention()
    return found


def gradients(model: TrainModel, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss, count, _ = model(batch)
    assert count == batch.supervised
    (loss / count).backward()
    return {name: p.grad.clone() for name, p in model.trained_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"compile": "off"}, "model": {"attention": "eager"}},
        {"adapter": {"kind": "none"}},
        {"adapter": {"target": ("v_proj", "lm_head"), "modules_to_save": ("embed_tokens",)}},
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


def test_document_two_cannot_see_document_one(tiny, tmp_path):
    """Another document 1 of the same length leaves the losses of document 2 as they were, bit by
    bit.
    """
    model, of, other = model_of(tiny, tmp_path), examples(), examples(seed=9)
    before = model.token_scores(collate([of], length=200, pad_id=0))[0]
    changed = [other[0], *of[1:]]
    after = model.token_scores(collate([changed], length=200, pad_id=0))[0]
    edge = LENGTHS[0]
    assert torch.equal(before[0, edge:], after[0, edge:])
    assert not torch.equal(before[0, :edge], after[0, :edge])
    assert (before[0, edge:] > 0).sum() > 60


def test_padding_is_neither_seen_nor_learnt(tiny, tmp_path):
    model, of = model_of(tiny, tmp_path), examples()
    one, other = (collate([of], length=200, pad_id=pad) for pad in (0, 77))
    assert torch.equal(model.token_scores(one)[0], model.token_scores(other)[0])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_recomputing_layers_changes_nothing(tiny, tmp_path, count):
    plain, again = model_of(tiny, tmp_path), model_of(tiny, tmp_path)
    calls = [0, 0]

    def counter(layer):
        def forward(*_):
            calls[layer] += 1

        return forward

    recompute_layers(again.layers, 2)
    recompute_layers(again.layers, count)
    for number, layer in enumerate(again.layers):
        layer.input_layernorm.register_forward_hook(counter(number))
    batch = layouts(examples())["two rows"]
    a, b = gradients(plain, batch), gradients(again, batch)
    assert calls == [1 + (count > 0), 1 + (count > 1)], (
        "a layer that is run again runs twice, the others once"
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_token_scores_agree_with_the_loss(tiny, tmp_path):
    model, batch = model_of(tiny, tmp_path), layouts(examples())["two rows"]
    losses, hits = model.token_scores(batch)
    total, count, _ = model(batch)
    assert losses.shape == hits.shape == batch.targets.shape
    assert (losses[batch.targets == IGNORE] == 0).all()
    assert (losses != 0).sum() == count == batch.supervised
    torch.testing.assert_close(losses.sum(), total.detach(), rtol=1e-6, atol=0)


def test_supervised_positions_are_those_with_a_label():
    batch = layouts(examples())["one row and padding"]
    index, targets = supervised_positions(batch)
    assert torch.equal(index, (batch.targets.flatten() != IGNORE).nonzero().squeeze(1))
    assert torch.equal(targets, batch.targets.flatten()[index])


def test_what_is_trained_and_how_it_is_described(tiny, tmp_path):
    model = model_of(tiny, tmp_path)
    names = [name for name, _ in model.trained_parameters()]
    assert len(names) == 28
    assert names[0] == "model.layers.0.self_attn.q_proj.lora_A"
    assert "LlamaForCausalLM" in trained_text(model.model, 1)
