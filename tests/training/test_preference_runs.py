"""Whole runs that learn from preferences: files in, records, checkpoints and a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import tunesmith
from errors import refuses
from recipes import WORDS, make_run
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.metrics.record import read_records
from tunesmith.training.result import Result


def write_pairs(path: Path, first: int, count: int) -> Path:
    rows = []
    for i in range(first, first + count):
        word = WORDS[i % 10]
        rows.append(
            {
                "prompt": f"Say {word} {i}: ",
                "chosen": word,
                "rejected": " ".join([word] * (i % 5 + 2)),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_feedback(path: Path, first: int, count: int) -> Path:
    rows = []
    for row in map(json.loads, write_pairs(path, first, count).read_text().splitlines()):
        for answer in ("chosen", "rejected"):
            is_good = answer == "chosen"
            rows.append({"prompt": row["prompt"], "completion": row[answer], "label": is_good})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(tiny: Path, folder: Path, method: Any, name: str = "run", **changes: Any) -> Result:
    """Four steps of eight pairs, with held-out ones, unless `changes` say otherwise."""
    is_kto = method == "kto" or (isinstance(method, dict) and method["name"] == "kto")
    write = write_feedback if is_kto else write_pairs
    data_format = "feedback" if is_kto else "preference"
    train_file = folder / "train.jsonl"
    held_file = folder / "held.jsonl"
    if not train_file.exists():
        write(train_file, 0, 32)
        write(held_file, 40, 8)
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
    files = sorted((run / "final").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_equal(first: Path, second: Path) -> None:
    ours = weights(first)
    others = weights(second)
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        assert np.array_equal(value, others[name]), name


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo", "kto"])
def test_a_run_learns_and_resumes_to_the_same_bits(tiny: Path, tmp_path: Path, method: str) -> None:
    whole = train(tiny, tmp_path, method, "whole")
    train(tiny, tmp_path, method, "parts", train={"duration": "2 steps"})
    train(tiny, tmp_path, method, "parts")
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    records = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert records[-1].loss < records[0].loss
    last = records[-1].extra
    assert last["rewards_chosen"] - last["rewards_rejected"] == pytest.approx(last["reward_margin"])
    assert last["val_reward_margin"] == pytest.approx(
        last["val_rewards_chosen"] - last["val_rewards_rejected"]
    )
    if method == "kto":
        assert last["kl"] >= 0
    else:
        assert 0 <= last["val_reward_accuracy"] <= 1
        best = json.loads((tmp_path / "whole" / "best.json").read_text())
        assert best["val_accuracy"] in [r.extra.get("val_reward_accuracy") for r in whole.records]


def test_the_first_loss_of_dpo_is_that_of_an_undecided_model(tiny: Path, tmp_path: Path) -> None:
    """Before the first update the model is its reference: log 2 for each pair, exactly."""
    result = train(tiny, tmp_path, "dpo", train={"duration": "1 steps"})
    assert result.records[0].loss == pytest.approx(np.log(2), abs=1e-12)
    assert result.records[0].extra["reward_accuracy"] == 0.5


def test_on_top_of_an_adapter_the_reference_is_that_adapter(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "simpo", "first")
    settings = {"from": str(tmp_path / "first" / "final")}
    whole = train(tiny, tmp_path, "dpo", "whole", adapter={"from": settings["from"]})
    assert whole.records[0].loss == pytest.approx(np.log(2), abs=1e-12)
    part = {"duration": "2 steps"}
    train(tiny, tmp_path, "dpo", "parts", adapter={"from": settings["from"]}, train=part)
    train(tiny, tmp_path, "dpo", "parts", adapter={"from": settings["from"]})
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    # Another adapter under that name would be another reference, without a word.
    train(tiny, tmp_path, "simpo", "other", train={"duration": "1 steps"})
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "other").rename(tmp_path / "first")
    longer = {"duration": "6 steps"}
    with refuses(ModelError, where=f"adapter.from: {settings['from']}"):
        train(tiny, tmp_path, "dpo", "parts", adapter={"from": settings["from"]}, train=longer)


def test_full_fine_tuning_scores_the_base_once_and_keeps_the_numbers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    full = {"kind": "none"}
    whole = train(tiny, tmp_path, "dpo", "whole", adapter=full)
    # Rows are laid out otherwise than in training: fp32 sums in another order.
    assert whole.records[0].loss == pytest.approx(np.log(2), abs=1e-5)
    files = sorted(cache.glob("tokens/reference/*.npy"))
    assert len(files) == 2
    values = [np.load(file) for file in files]
    assert {value.shape for value in values} == {(32, 2), (8, 2)}
    train(tiny, tmp_path, "dpo", "parts", adapter=full, train={"duration": "2 steps"})
    for file in files:
        file.unlink()
    # They are measured again on the base, not on the weights that it goes on with.
    train(tiny, tmp_path, "dpo", "parts", adapter=full)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    for file, value in zip(files, values, strict=True):
        assert np.array_equal(np.load(file), value)


def test_the_best_validation_may_go_by_accuracy(tiny: Path, tmp_path: Path) -> None:
    rule = {"every": "1 steps", "best_by": "accuracy", "patience": 2}
    result = train(tiny, tmp_path, "dpo", validate=rule)
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    seen = {r.step: r.extra["val_reward_accuracy"] for r in result.records}
    assert best["val_accuracy"] == max(seen.values())


def test_a_resume_with_another_method_is_refused(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "dpo", train={"duration": "1 steps"})
    with pytest.raises(RecipeError) as error:
        train(tiny, tmp_path, {"name": "dpo", "beta": 0.5})
    assert "method.beta" in str(error.value.where)


def test_feedback_of_one_kind_is_refused(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}: ", "completion": "x", "label": True} for n in range(8)]
    for name in ("train.jsonl", "held.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        train(tiny, tmp_path, "kto")
    assert "train.jsonl" in str(error.value.where)
    assert not (tmp_path / "run").exists()


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
