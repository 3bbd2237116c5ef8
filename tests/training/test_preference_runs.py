"""Runs that learn from preferences. Ranks: tests/parallel/test_preferences_on_ranks.py."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tunesmith
from errors import refuses, warnings_with
from recipes import make_run, write_feedback, write_pairs
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.methods.kto import KahnemanTverskyOptimization
from tunesmith.methods.pairs import answer_logprobs
from tunesmith.train_model import StepTotals, TrainModel, ValidationResult
from tunesmith.training import session as session_module
from tunesmith.training.result import Result

pytestmark = pytest.mark.slow

FULL: dict[str, Any] = {"adapter": {"kind": "none"}}


def train(tiny: Path, folder: Path, method: Any, name: str = "run", **changes: Any) -> Result:
    """Four steps of eight pairs, with held-out ones, unless `changes` say otherwise."""
    is_kto = method == "kto" or (isinstance(method, dict) and method["name"] == "kto")
    write = write_feedback if is_kto else write_pairs
    data_format = "feedback" if is_kto else "preference"
    train_file = folder / "train.jsonl"
    held_file = folder / "held.jsonl"
    if not train_file.exists():
        write(train_file, 32)
        write(held_file, 8, first=40)
    settings = {
        "method": method,
        "data": {
            "train": {"source": str(train_file), "format": data_format},
            "validation": {"source": str(held_file), "format": data_format},
            "seq_len": 64,
        },
        "train": {
            "duration": "4 steps",
            "schedule": "constant",
            "warmup": "0 steps",
            "micro_batch": "256 tokens",
            "learning_rate": 5e-3,
        },
        "validate": {"every": "2 steps"},
        "output_dir": str(folder / name),
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return tunesmith.train(make_run(tiny, folder, **settings))


def weights(run: Path) -> dict[str, np.ndarray]:
    (file,) = (run / "final").glob("*.safetensors")
    return load_file(file)


def assert_equal(first: Path, second: Path) -> None:
    ours, others = weights(first), weights(second)
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        assert np.array_equal(value, others[name]), name


def resume(tiny: Path, folder: Path, method: Any, **changes: Any) -> None:
    train(tiny, folder, method, "parts", train={"duration": "2 steps"}, **changes)
    train(tiny, folder, method, "parts", **changes)
    assert_equal(folder / "whole", folder / "parts")


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpo and cross-entropy": ({"name": "dpo", "sft_weight": 0.5}, {}),
    "kto in full": ("kto", FULL),
    "orpo": ("orpo", {}),
    "dpo in full": ("dpo", FULL),
    "simpo in full": ("simpo", FULL),
    "kto": ("kto", {}),
}
TIER_1 = ("dpo and cross-entropy", "kto in full")
NAMES = [
    pytest.param(name, id=name, marks=() if name in TIER_1 else pytest.mark.nightly)
    for name in METHODS
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one example at a time, recomputed": {
        "train": {"micro_batch": "1 examples", "recompute": "full"}
    },
    "unpacked, three examples": {"data": {"pack": False}, "train": {"micro_batch": "3 examples"}},
}
# Of one method: layers and their loss are the same code in all. Traced, not compiled: that the
# compiler itself answers alike is shown in runtime/test_compilation.py. Few graphs: by documents,
# each layer is cut in two.
COMPILED = {"train": {"compile": "on"}, "model": {"attention": "eager"}}


def numbers_of(result: Result) -> list[float]:
    """Loss, gradient norm and the method's metrics of each step, and of held-out rows."""
    found = []
    for record in result.records:
        # Before the first update margins are 0 but for rounding, and their signs mean nothing.
        extra = [value for name, value in record.extra.items() if name != "reward_accuracy"]
        found += [record.loss, record.grad_norm, record.val_loss or 0.0, *extra]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_changes_nothing(name, tiny, tmp_path, monkeypatch, request):
    """Packed or not, in any micro batch, recomputed or compiled. 1e-4: fp32 sums in another order."""
    (method, what), layouts = METHODS[name], dict(LAYOUTS)
    if name == "dpo and cross-entropy":
        request.getfixturevalue("eager_compiler")
        layouts["compiled"] = COMPILED
    packed = None
    for layout, changes in {"packed": {}, **layouts}.items():
        # The base scores its answers in the layout of each run, not in one of other code before.
        monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / f"cache, {layout}"))
        steps = {"duration": "2 steps", "learning_rate": 1e-3, **changes.get("train", {})}
        found = numbers_of(
            train(tiny, tmp_path, method, layout, **what, **changes | {"train": steps})
        )
        packed = packed or found
        assert len(found) == len(packed)
        # Of a number next to 0, in ten of these.
        differences = [abs(b - a) / max(abs(a), 0.1) for a, b in zip(packed, found, strict=True)]
        assert max(differences) < 1e-4, layout


@pytest.mark.parametrize(
    ("method", "adapter"),
    [
        ("dpo", {}),
        # KTO computes mismatched pairs with dropout, before the micro batches of a step.
        ("kto", {"dropout": 0.2}),
        *(pytest.param(name, {}, marks=pytest.mark.nightly) for name in ("orpo", "simpo")),
    ],
)
def test_a_run_learns_and_resumes_to_the_same_bits(tiny, tmp_path, method, adapter):
    whole = train(tiny, tmp_path, method, "whole", adapter=adapter)
    resume(tiny, tmp_path, method, adapter=adapter)
    records = whole.records
    assert records[-1].loss < records[0].loss
    if method == "dpo":  # before the first update the model is its reference
        assert records[0].loss == pytest.approx(np.log(2), abs=1e-12)
        assert records[0].extra["reward_accuracy"] == 0.5
    last = records[-1].extra
    assert last["rewards_chosen"] - last["rewards_rejected"] == pytest.approx(last["reward_margin"])
    if method == "kto":
        assert last["kl"] >= 0
    else:
        best = json.loads((tmp_path / "whole" / "best.json").read_text())
        assert best["val_accuracy"] in [r.extra.get("val_reward_accuracy") for r in records]


def test_on_top_of_an_adapter_the_reference_is_that_adapter(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "simpo", "first")
    adapter = {"from": str(tmp_path / "first" / "final")}
    whole = train(tiny, tmp_path, "dpo", "whole", adapter=adapter)
    assert whole.records[0].loss == pytest.approx(np.log(2), abs=1e-12)
    resume(tiny, tmp_path, "dpo", adapter=adapter)
    # Another adapter under that name would be another reference, without a word.
    train(tiny, tmp_path, "simpo", "other", train={"duration": "1 steps"})
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "other").rename(tmp_path / "first")
    with refuses(ModelError, where=f"adapter.from: {adapter['from']}"):
        train(tiny, tmp_path, "dpo", "parts", adapter=adapter, train={"duration": "6 steps"})


@pytest.mark.parametrize(("method", "loss"), [("dpo", np.log(2)), ("kto", 0.5)])
def test_full_fine_tuning_scores_the_base_once_and_keeps_the_numbers(
    tiny, tmp_path, monkeypatch, capsys, method, loss
):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    whole = train(tiny, tmp_path, method, "whole", **FULL)
    # Rows are laid out otherwise than in training: fp32 sums in another order.
    assert whole.records[0].loss == pytest.approx(loss, abs=1e-5)
    values = {file: np.load(file) for file in sorted(cache.glob("tokens/reference/*.npy"))}
    # Of KTO also the answers of each step under other prompts: of held-out rows each twice.
    sizes = [16, 16, 32, 64] if method == "kto" else [8, 32]
    assert sorted(len(value) for value in values.values()) == sizes
    train(tiny, tmp_path, method, "parts", train={"duration": "2 steps"}, **FULL)
    for file in values:
        file.unlink()
    # They are measured again on the base, not on the weights that it goes on with.
    train(tiny, tmp_path, method, "parts", **FULL)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    assert all(np.array_equal(np.load(file), value) for file, value in values.items())
    # A value that has changed on the disk is not used.
    file, value = next(iter(values.items()))
    content = bytearray(file.read_bytes())
    content[content.index(value.tobytes()) + 7] ^= 1  # the highest byte of a number
    file.write_bytes(content)
    capsys.readouterr()
    train(tiny, tmp_path, method, "again", **FULL)
    assert_equal(tmp_path / "whole", tmp_path / "again")
    assert warnings_with(capsys.readouterr().err, file.name)
    assert np.array_equal(np.load(file), value)


def test_kto_in_full_has_the_bases_numbers_of_every_step(tiny, tmp_path, monkeypatch):
    """Beside a copy of the base, which scores the rows of each step again in the same layout."""
    begin_step = KahnemanTverskyOptimization.begin_step
    bases: list[TrainModel] = []
    compared = []

    def compare(method: Any, model: TrainModel, totals: StepTotals, add_up: Any) -> StepTotals:
        bases.append(copy.deepcopy(model))
        for batch in totals.mismatched:
            assert batch.sequences is not None
            with torch.no_grad():
                plain = bases[0](batch, answer_logprobs).logprobs
            assert torch.equal(batch.sequences.reference, plain)
            compared.append(len(plain))
        return begin_step(method, model, totals, add_up)

    monkeypatch.setattr(KahnemanTverskyOptimization, "begin_step", compare)
    train(tiny, tmp_path, "kto", data={"validation": []}, **FULL)
    assert sum(compared) == 4 * 8


@pytest.mark.parametrize(("best_by", "steps", "best"), [("accuracy", 4, 2), ("loss", 6, 6)])
def test_patience_goes_by_accuracy(tiny, tmp_path, monkeypatch, best_by, steps, best):
    accuracies = iter([0.5, 0.75, 0.625, 0.5, 0.5, 0.5])
    losses = iter([0.7, 0.6, 0.5, 0.4, 0.3, 0.2])

    def measured(*_: Any, **__: Any) -> ValidationResult:
        return ValidationResult(next(losses), 8, {"reward_accuracy": next(accuracies)})

    monkeypatch.setattr(session_module, "validation_loss", measured)
    rule = {"every": "1 steps", "best_by": best_by, "patience": 2}
    result = train(tiny, tmp_path, "dpo", validate=rule, train={"duration": "6 steps"})
    assert result.records[-1].step == steps
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == best


def test_eval_says_how_many_pairs_are_in_order(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "dpo", train={"duration": "8 steps"})
    result = tunesmith.evaluate(tmp_path / "run")
    (pairs,) = result.by_scorer
    assert pairs.rows == 8
    for model, score in result.scores.items():
        assert pairs.models[model].mean == pytest.approx(np.mean(score.pairs))
        assert set(score.pairs) <= {0.0, 0.5, 1.0}
        # The loss is that of the chosen answers alone.
        assert 0 < score.tokens < 8 * 12
    assert pairs.models["tuned"].mean >= pairs.models["base"].mean


# ---- rows that cannot be learned from; single rows: tests/rows/test_preference_rows.py ----

PAIR = {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "It is three."}
ANSWER = {"prompt": "Add 1 and 2.", "completion": "3", "label": True}
LONG = "1 + 2? " * 40
EQUAL_ONCE_CUT = {"prompt": "Add.", "chosen": LONG + "3", "rejected": LONG + "4"}
# name: method, rows, more keys of the data, where
FILES: dict[str, tuple[str, list[Any], dict[str, Any], str]] = {
    "no rejected": ("dpo", [PAIR, {"prompt": "Add 1 and 2.", "chosen": "3"}], {}, "train.jsonl:2"),
    "equal once cut": ("dpo", [PAIR, EQUAL_ONCE_CUT], {"allow_cut_answers": True}, "train.jsonl:2"),
    "good answers alone": ("kto", [ANSWER] * 3, {}, "train.jsonl"),
    "bad answers alone": ("kto", [ANSWER | {"label": False}] * 3, {}, "train.jsonl"),
    "all too long": ("dpo", [PAIR | {"prompt": LONG}] * 3, {"too_long": "drop"}, "train.jsonl"),
    "one too long": ("dpo", [PAIR, PAIR | {"chosen": LONG}], {"too_long": "error"}, "train.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named_and_nothing_is_written(name: str, tiny: Path, tmp_path: Path) -> None:
    method, rows, limits, where = FILES[name]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": str(file), "format": "feedback" if method == "kto" else "preference"}
    data = {"train": source, "seq_len": 96, **limits}
    run = make_run(tiny, tmp_path, held=False, method=method, data=data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TunesmithError) as caught:
        tunesmith.train(run)
    assert sorted(tmp_path.rglob("*")) == before
    assert where in caught.value.where
    assert caught.value.fix
