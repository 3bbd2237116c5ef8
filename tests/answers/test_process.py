"""Whatever a scorer does, its row is named, and the other answers are scored."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from errors import refuses
from logged import logged_lines
from time_limit import time_limit
from tunesmith.answers.scoring import process
from tunesmith.answers.scoring.process import ScorerPool, ScorerProcess
from tunesmith.answers.scoring.scorers import RewardedAnswer, ScoredRow
from tunesmith.errors import DataError, RunError


def row(reference: str = "a", where: str = "held.jsonl:3", **more: Any) -> ScoredRow:
    return ScoredRow(reference, reference, **{"row": {}, "where": where, **more})


@pytest.mark.parametrize(
    ("name", "answer", "endless"),
    [
        ("regex", "a" * 60 + "b", row(r"^(a|aa)+$(?<!b)c|^(\w|\w\w)+\d$")),
        ("json", '{"' + "a" * 60 + 'b": 1}', row("{}", row={"schema": {"patternProperties": {"^(a+)+$": {}}}})),
        ("json", None, row('"' + "a" * 60 + 'b"', row={"schema": {"pattern": "^(a+)+$"}})),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_scorer_without_end_is_killed(
    name: str, answer: str | None, endless: ScoredRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SCORER_SECONDS", 0.2)
    error = DataError if answer is None else RunError
    with (
        time_limit(30),
        ScorerProcess([name]) as scorers,
        refuses(error, where="held.jsonl:3", names=[name, "0.2 seconds"]),
    ):
        if answer is None:
            scorers.check(name, endless)
        else:
            scorers.score(name, [RewardedAnswer(answer, answer, endless)])


OWN = """
def do(answer, row):
    exec(row.get("action", ""))
    return 1.0
"""


def answer_to(**more: Any) -> RewardedAnswer:
    return RewardedAnswer("a", "a", row(**more))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "MIN_FAULTS", 100)
    Path("mine.py").write_text(OWN)
    return "mine.py:do"


@pytest.mark.parametrize(("count", "limit"), [(9, 3), (60, 6)])
def test_a_share_of_faults_ends_the_scoring(
    own: str, count: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MIN_FAULTS", 3)
    bad = [answer_to(where=f"rows:{n}", row={"action": "1 / 0"}) for n in range(limit)]
    good = [answer_to() for _ in range(count - limit)]
    with ScorerPool([own]) as pool:
        with logged_lines() as lines:
            scores = pool.score_all(own, [*bad[1:], *good])
        assert scores == [None] * (limit - 1) + [{"do": 1.0}] * len(good)
        assert len(lines) == min(limit - 1, process.SHOWN_FAULTS + 1)
        with refuses(RunError, where=f"rows:{limit - 1}"):
            pool.score_all(own, [*bad, *good])


def test_printed_text_goes_to_stderr(own: str, capfd: pytest.CaptureFixture[str]) -> None:
    with ScorerProcess([own, "exact"]) as scorers:
        scorers.check(own, row())
        loud = [answer_to(row={"action": "print('loud')"})]
        assert scorers.score(own, loud) + scorers.score("exact", loud) == [{"do": 1}, {"exact": 1}]
        scorers.score(own, [answer_to(row={"action": "print('x' * 100_000)"})])
    out, err = capfd.readouterr()
    assert out == "", "stdout is for results"
    assert err.startswith("loud\n")
    assert len(err) < 5000


def test_a_stop_does_not_wait_for_a_scorer(own: str) -> None:
    began = time.monotonic()
    endless = [answer_to(row={"action": "while True: pass"})] * 3
    with time_limit(30), ScorerPool([own], own_seconds=1000) as pool:
        assert pool.score_all(own, endless, lambda: time.monotonic() > began + 2) == [None] * 3
        assert pool.score_all(own, [answer_to()]) == [{"do": 1.0}]


def test_a_scorer_ends_with_the_training(own: str, tmp_path: Path) -> None:
    code = (
        "from tunesmith.answers.scoring.process import ScorerProcess\n"
        "from tunesmith.answers.scoring.scorers import RewardedAnswer, ScoredRow\n"
        "row = ScoredRow('', '', {'action': 'open(\"pid\", \"w\").write(str(__import__(\"os\").getpid()))\\nwhile True: pass'}, '')\n"
        "ScorerProcess(['mine.py:do']).score('mine.py:do', [RewardedAnswer('', '', row)])\n"
    )
    training = subprocess.Popen([sys.executable, "-c", code])
    with time_limit(60):
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            time.sleep(0.1)
        scorer = psutil.Process(int((tmp_path / "pid").read_text()))
        training.kill()
        training.wait()
        scorer.wait(20)
