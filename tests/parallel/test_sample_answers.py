"""Sample answers of a sharded model: each rank gathers weights from the others with every token."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranks import run_ranks
from recipes import make_run
from tunesmith.distributed import ranks as ranks_module
from tunesmith.parallel import mesh
from tunesmith.run_dir import read_samples
from tunesmith.start.build import build
from tunesmith.start.request import Request
from tunesmith.start.run import train
from tunesmith.training import answer_sampler
from tunesmith.training.answer_sampler import SAMPLE_TOKENS, sample_answers

pytestmark = pytest.mark.slow


def answers_of_unequal_length(model: Path, folder: Path) -> list[str]:
    """What rank 0 answers that may stop at any token, and rank 1 that stops at none."""
    for module in (ranks_module, mesh):  # that one waits for another which does not come
        module.COLLECTIVE_TIMEOUT = timedelta(seconds=20)
    rank = int(os.environ["RANK"])
    run = make_run(model, folder, parallel={"shard": 2}, data={"template": "raw"})
    with ranks_module.join_ranks() as ranks:
        session = build(Request(run), ranks)
        assert session.data.validation is not None
        stops = set(range(session.files.vocab_rows)) if rank == 0 else set()
        examples = session.data.validation.first(2)
        found = sample_answers(session.model, session.files.tokenizer, examples, stops, synced=True)
    return [sample.answer for sample in found]


def answers_by_the_clock_of(allowed: dict[str, float], model: Path, folder: Path) -> list[int]:
    """The steps with answers where each rank has this share of the training time for them."""
    answer_sampler.MAX_SAMPLING_SHARE = allowed[os.environ["RANK"]]
    changes = {
        "parallel": {"shard": 2}, "train": {"duration": "4 steps"}, "validate": {"every": "2 steps"},
        "log": {"samples": 2, "sample_seconds": 1e-6},
    }  # fmt: skip
    train(make_run(model, folder, **changes), quiet=True)
    lines = (folder / "run" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_shards_answer_at_validations_alone_and_by_the_clock_of_rank_0(tiny, tmp_path):
    allowed = {"0": 1e6, "1": 0.0}
    steps = run_ranks(2, answers_by_the_clock_of, allowed, tiny, tmp_path)[0]
    assert steps == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("seconds", "steps", "warns"),
    [(0.1, [0, 0, 2, 2, 4, 4], False), (9.0, [0, 0, 4, 4], True), (300.0, [0, 4], True)],
    ids=["fast", "slow", "very slow"],
)
def test_one_prompt_is_answered_before_and_after_on_any_machine(
    seconds: float,
    steps: list[int],
    warns: bool,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answer takes this time. log.sample_seconds is 20."""
    clock, sample = [0.0], answer_sampler.sample_answers

    def timed(*args: Any, **options: Any) -> Any:
        clock[0] += seconds
        return sample(*args, **options)

    monkeypatch.setattr(answer_sampler, "sample_answers", timed)
    monkeypatch.setattr(answer_sampler, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    changes = {
        "train": {"duration": "4 steps"},
        "validate": {"every": "2 steps"},
        "log": {"samples": 2},
    }
    train(make_run(tiny, tmp_path, **changes), quiet=True)
    samples = read_samples(tmp_path / "run").value
    assert [sample["step"] for sample in samples] == steps
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("log.sample_seconds") == warns


def test_a_rank_that_has_finished_waits_for_the_others(tiny, tmp_path):
    short, long = run_ranks(2, answers_of_unequal_length, tiny, tmp_path)
    assert short == ["", ""]
    assert all(len(answer.encode()) > SAMPLE_TOKENS / 2 for answer in long)
