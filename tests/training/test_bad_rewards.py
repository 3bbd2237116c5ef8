"""Bad rewards, rows and settings of reinforcement learning: a row that is named and gets 0, or an error with its place and fix."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from errors import check_shown, holds, is_internal, refuses
from invoke import invoke
from logged import logged_lines
from recipes import merge, recipe, rows
from time_limit import time_limit
from tunesmith.answers.scoring import process
from tunesmith.answers.scoring.process import ScorerPool, ScorerProcess
from tunesmith.answers.scoring.scorers import RewardedAnswer, ScoredRow, check_scorer_names
from tunesmith.config.dump import to_yaml
from tunesmith.config.load import load_recipe
from tunesmith.errors import RunError, UsageError
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.start.run import train

pytestmark = pytest.mark.slow

OWN = """
import json, os, pickle, resource, signal, subprocess, sys, threading, time
import numpy as np

class Odd(Exception):
    def __str__(self): return 1 / 0

class Unprintable:
    def __repr__(self): return 1 / 0

class Uncomparable:
    def __float__(self): return 1 / 0
    __lt__ = __le__ = __eq__ = __float__

def do(answer, row):
    action = row.get("action", "")
    if action.startswith("return "):
        return eval(action.removeprefix("return "))
    exec(action)
    return 1.0
"""
LATE, ENDED, BIG = "0.5 seconds", "ended its process", "File too large"
# What a scorer does: what the log says of its row, which gets 0.
FAULTS = {
    "time.sleep(1000)": LATE,
    "while True: pass": LATE,
    "signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(1000)": LATE,
    "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)), time.sleep(1000)": LATE,
    "subprocess.run(['sleep', '1000'])": LATE,
    "subprocess.run(['sleep', '1000'], start_new_session=True)": LATE,
    "if os.fork(): time.sleep(1000)": LATE,
    "os._exit(0)": ENDED,
    "os.fork() or (os.setsid(), time.sleep(1000))\nos._exit(0)": LATE,
    "os.abort()": ENDED,
    "os.kill(os.getpid(), 9)": ENDED,
    "os.kill(os.getpid(), 40)": ENDED,
    "os.close(1); os.close(2); os._exit(3)": ENDED,
    "os.closerange(0, 99); time.sleep(1000)": ENDED,
    "for n in range(3, 15):\n try: os.write(n, b'?' * 99)\n except OSError: pass": ENDED,
    "pickle.dump = None": ENDED,
    "os.write(4, b'\\x8c\\xff')": LATE,
    "os.write(4, b'I1x\\n')": ENDED,
    "raise KeyboardInterrupt": ENDED,
    "sys.exit(3)": "SystemExit: 3",
    "raise MemoryError": "MemoryError",
    "do(answer, row)": "RecursionError",
    "1 / 0": "ZeroDivisionError",
    "raise ValueError('first\\nsecond')": "ValueError",
    "raise Odd": "Odd",
    "row['missing']": "KeyError: 'missing'",
    "input()": "EOFError",
    "open('none.txt')": "FileNotFoundError",
    "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, -1)); bytearray(5 << 30)": "MemoryError",
    "os.ftruncate(os.open('big', os.O_CREAT | os.O_RDWR), 1 << 40)": BIG,
    "while True: os.write(1, b'x' * 65536)": BIG,
    "return '1'": "'1'", "return None": "None", "return float('nan')": "nan", "return float('inf')": "inf", "return [1.0]": "[1.0]",
    "return 2": "returned 2", "return -0.1": "-0.1", "return 1j": "1j", "return np.ones(2)": "array([1., 1.])", "return 10 ** 5000": "int", "raise ValueError('\\ud800')": "\\ud800", "raise ValueError('x' * 10_000_000)": "xxx", "return Uncomparable()": "returned <",
    "return Unprintable()": "Unprintable", "return sys.modules['torch'].ones(())": "KeyError",
}  # fmt: skip
HARMLESS = (
    "subprocess.Popen(['sleep', '1000'], start_new_session=True)", "os.fork()", "os.fork() or time.sleep(1000)",
    "os.fork() or (os.setsid(), os.fork() or time.sleep(1000), os._exit(0))", "os.fork() or os.execve('/bin/sh', ['sh', '-c', 'setsid sleep 1000 &'], {'TMPDIR': os.environ['TMPDIR']})",
 "threading.Thread(target=time.sleep, args=[1000]).start()", "print('loud' * 10_000)",
    "row.clear()", "row['turns'].clear()", "os.chdir('/')", "sys.stdout.close()", "os.close(0)", "subprocess.run(['cat'])",
    "json.loads = json.dumps = None", "return True", "return np.float32(1)", "return np.int64(1)", "return np.bool_(True)", "return np.array(1)",
)  # fmt: skip


def row(where: str = "rows:1", **more: Any) -> ScoredRow:
    return ScoredRow("a", "a", {"turns": [1], **more}, where)


def processes_of(marker: str) -> list[str]:
    """The processes whose environment has this text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """Each action: its score, the score of the next answer, and the line that the log has."""
    folder = tmp_path_factory.mktemp("scored")
    actions = (*FAULTS, *HARMLESS)
    items = []
    for number, action in enumerate(actions):
        for asked in (row(f"rows:{2 * number + 1}", action=action), row(f"rows:{2 * number + 2}")):
            items.append(RewardedAnswer("a", "a", asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(process, "MIN_FAULTS", 1000)
        patch.setattr(process, "SHOWN_FAULTS", 1000)
        Path("mine.py").write_text(OWN)
        with (
            time_limit(200),
            logged_lines() as lines,
            ScorerPool(["mine.py:do"], own_seconds=0.5, count=2) as pool,
        ):
            found = pool.score_all("mine.py:do", items)
            scores = [each and each["do"] for each in found]
        # A killed process can exist until it gets a core.
        deadline = time.monotonic() + 30
        while processes_of(f"TMPDIR={folder}") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(f"TMPDIR={folder}") == []
    by_action = {}
    for number, action in enumerate(actions):
        told = [line for line in lines if holds(line, f"rows:{2 * number + 1}")]
        by_action[action] = (scores[2 * number], scores[2 * number + 1], told)
    return by_action


@pytest.mark.parametrize("action", FAULTS)
def test_a_scorer_that_fails_gives_0_and_its_row_is_named(action, scored):
    score, following, lines = scored[action]
    assert (score, following, len(lines)) == (None, 1.0, 1)
    assert holds(lines[0], "mine.py:do")
    assert FAULTS[action] in lines[0]


@pytest.mark.parametrize("action", HARMLESS)
def test_what_a_scorer_does_harms_no_answer(action, scored):
    assert scored[action] == (1.0, 1.0, [])


# The file of a scorer: what the error says of it.
FILES = {
    "": "do", "do = 3": "do", "def do(": "SyntaxError", "caf\xe9 = '": "SyntaxError", "import no_such_module": "no_such_module",
    "raise SystemExit(3)": "SystemExit: 3", "raise KeyboardInterrupt": ENDED, "import os; os._exit(3)": "code 3", "input()": "EOFError",
    "import time; time.sleep(1000)": "3 seconds", "while True: pass": "3 seconds", "while True: print('x' * 99_999)": BIG,
}  # fmt: skip


@pytest.mark.parametrize("content", FILES)
def test_a_file_that_cannot_be_loaded_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "LOAD_SECONDS", 3)
    # A file without the name is refused without being executed.
    Path("mine.py").write_text(content and f"{content}\ndo = 3", "latin-1")
    with time_limit(60), refuses(UsageError, where="--score mine.py:do") as refused:
        ScorerProcess(["mine.py:do"]).__enter__()
    assert FILES[content] in f"{refused.value.what}\n{refused.value.why}"


def test_a_name_that_is_no_scorer_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    for name in ("accuracy", "exakt", "mine.py", "mine.py:a b", "none.py:do", ".:do", 3):
        with refuses(UsageError) as refused:
            check_scorer_names([name])  # type: ignore[list-item]
        assert str(name) in f"{refused.value.where} {refused.value.what}"
        assert refused.value.fix


ROWS = rows(8)
SCORE = "def do(answer, row): "
# Changes of the recipe, of the second row and the text of r.py; the place of the error, and values in it.
BAD: dict[str, tuple[dict[str, Any], dict[str, Any] | str, str | None, list[object]]] = {
    **{
        f"{key}: {value}": ({"method": {key: value}}, {}, None, [f"method.{key}"])
        for key, values in {
            "group": [1, 2.5], "answer_tokens": [0, 128], "temperature": [0, -1, "hot"], "top_p": [0.9], "top_k": [5],
            "reward": [[], None, ""], "reward_weights": [[1, 2], [-1], [0]], "reward_seconds": [0], "variant": ["bnpo"],
        }.items()
        for value in values
    },
    "weight nan": ({"method": {"reward_weights": [float("nan")]}}, {}, None, ["method.reward_weights.0"]),
    "streaming": ({"data": {"streaming": True}}, {}, None, ["data.streaming"]),
    "no tools": ({"method": {"reward": "tool-call"}}, {}, "train.jsonl:1, tools", ["tools"]),
    "no JSON": ({"method": {"reward": "json"}}, {}, "train.jsonl:1", ["JSON"]),
    "unknown scorer": ({"method": {"reward": "exakt"}}, {}, "method.reward", ["exakt"]),
    "no file": ({"method": {"reward": "none.py:do"}}, {}, None, ["none.py"]),
    # rows
    "no prompt": ({}, {"prompt": None}, "train.jsonl:2", ["prompt"]),
    "no answer": ({}, {"completion": None}, "train.jsonl:2", ["completion"]),
    "empty answer": ({}, {"completion": ""}, "train.jsonl:2", []),
    "long prompt": ({"method": {"answer_tokens": 60}}, {"prompt": "a" * 70}, "train.jsonl:2", [68]),
    "pictures": ({}, {"images": ["a.png"]}, "train.jsonl:2", ["model.vision"]),
    # scorers
    "all rewards 0": ({}, SCORE + "return 0", "method.reward", [8]),
    "syntax error": ({}, "def do(", "r.py:do", ["r.py", 1]),
    "no function": ({}, "do = 3", "r.py:do", ["do"]),
    "one argument": ({}, "def do(answer): return 1", "r.py:do", ["do(answer)"]),
    "fails": ({}, SCORE + "return 1 / 0", "train.jsonl:1", ["ZeroDivisionError", "r.py:1"]),
    "hangs": ({"method": {"reward_seconds": 0.2}}, SCORE + "\n while True: pass", "train.jsonl:1", [0.2]),
    "verl": ({}, "def do(data_source, solution_str, ground_truth, extra_info=None): return 1", "r.py:do", ["do(data_source, solution_str, ground_truth, extra_info)"]),
    "verifiers": ({}, "async def do(completion, answer, state): return 1", "r.py:do", ["do(completion, answer, state)"]),
    "class": ({}, "class do:\n def __call__(self, completions, **columns): return [1] * len(completions)", "r.py:do", ["class"]),
    "keywords": ({}, "def do(*, answer, row): return 1", "r.py:do", ["do(answer, row)"]),
    "dictionary": ({}, SCORE + "return {'score': 1.0}", "train.jsonl:1", ["{'score': 1.0}"]),
    "one reward": ({}, "def do(completions): return [1, 2]", "train.jsonl:1", ["2 rewards for 1"]),
    "no column": ({}, "def do(completions, truth): return [1 for _ in truth]", "train.jsonl:1", ["truth"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run_is_refused_before_it_begins(name, tiny, tmp_path, monkeypatch):
    changes, other, where, values = BAD[name]
    monkeypatch.chdir(tmp_path)
    second = ROWS[1] if isinstance(other, str) else ROWS[1] | other
    lines = [ROWS[0], {k: v for k, v in second.items() if v is not None}, *ROWS[2:]]
    Path("train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    method = {"name": "grpo", "group": 2, "answer_tokens": 4}
    if isinstance(other, str):
        Path("r.py").write_text(other)
        method["reward"] = "r.py:do"
    tree = recipe(tiny, tmp_path, held=False, **merge({"method": method}, changes))
    Path("r.yaml").write_text(to_yaml(tree))
    with time_limit(60):
        done = invoke("train", "r.yaml")
    assert done.code == 2, done.err
    assert not is_internal(done.err)
    check_shown(done.err, where=where, names=values)
    assert "  fix: " in done.err
    assert not Path("run").exists()


def test_a_sweep_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        to_yaml(recipe(tiny, tmp_path, method={"name": "grpo", "answer_tokens": 4}))
    )
    done = invoke("sweep", "r.yaml", "train.learning_rate=1e-3,1e-4")
    assert done.code == 2
    check_shown(done.err, where="method.name")


# Each harms only its own row: a prompt with the end token, an empty prompt, and a row that does not fit.
# Own answers may be of any length, because they are not learned.
ODD_ROWS = [
    {"prompt": "a</s>b<|im_end|>"},
    {"prompt": ""},
    {"prompt": "long " * 99},
    *[{"completion": "long " * 99}] * 2,
]


def test_a_scorer_that_fails_later_ends_the_run_and_nothing_is_lost(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [*ROWS, *({**ROWS[0], **row} for row in ODD_ROWS)]
    Path("train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("r.py").write_text(f"import os\n{SCORE}return 1 / (not os.path.exists('broken'))")
    method = {"name": "grpo", "group": 2, "answer_tokens": 4, "reward": "r.py:do"}
    tree = recipe(tiny, tmp_path, held=False, method=method, train={"duration": "4 steps"})
    Path("r.yaml").write_text(to_yaml(tree))
    words = ("train", "r.yaml", "train.duration=4 steps")

    def break_scorer(record: StepRecord) -> None:
        if record.step == 3:
            Path("broken").touch()

    with refuses(RunError, names=["ZeroDivisionError"], fix=["checkpoint.resume=force"]):
        train(load_recipe(Path("r.yaml")), quiet=True, on_record=break_scorer)
    failure = json.loads(Path("run/failure.json").read_text())
    assert (failure["last_step"], Path("run/checkpoint-2").is_dir()) == (3, True)
    Path("broken").unlink()
    # The file is corrected: the run continues from its checkpoint.
    Path("r.py").write_text(f"{SCORE}return 1")
    assert invoke(*words).code == 2
    assert invoke(*words, "checkpoint.resume=force").code == 0
    assert [record.step for record in read_records(Path("run/metrics.jsonl"))] == [1, 2, 3, 4]
