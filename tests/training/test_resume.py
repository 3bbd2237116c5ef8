"""Kill it anywhere: the next start goes on, and the numbers are those of a run that never stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from logged import logged_lines
from recipes import make_run, recipe
from tunesmith.checkpoint import contents, manifest, replicate
from tunesmith.errors import ModelError, StoppedEarlyError, StoppedError
from tunesmith.host.signals import SIGNAL_NAMES, StopRequest
from tunesmith.reader.run_files import RunFiles
from tunesmith.training.run import train
from tunesmith.training.trainer import Trainer
from tunesmith.training.validation import Validation
from waiting import TIME
from warm import Warm

pytestmark = [pytest.mark.slow, pytest.mark.long]

SAME = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "supervised_tokens",
    "examples",
    "val_loss",
)

# One warm process forks a child for each start: the kills hit real, whole
# processes. Signals that come before the run can take them wait until it does, and those after its
# end are not delivered.
DRIVER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tunesmith.config.load import from_mapping
from tunesmith.errors import TunesmithError
from tunesmith.host.signals import SIGNAL_NAMES, StopRequest
from tunesmith.stages import output
from tunesmith.training import run
import peft
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
STOPS = [signal.Signals[name] for name in SIGNAL_NAMES]
class Blocking(StopRequest):
    def __exit__(self, *error):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        super().__exit__(*error)
def claim(*words, then=output.claim_run_dir):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    return then(*words)
run.StopRequest, output.claim_run_dir = Blocking, claim
signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
for line in sys.stdin:
    recipe, ignored, unread = json.loads(line)
    pid = os.fork()
    if pid == 0:
        if ignored:
            signal.signal(signal.Signals[ignored], signal.SIG_IGN)
        if unread:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 2)
        try:
            run.train(from_mapping(recipe, where="test", base=Path.cwd()), quiet=not unread)
            os._exit(0)
        except TunesmithError as error:
            print(error, file=sys.stderr, flush=True) if not unread else None
            os._exit(error.exit_code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Starter:
    """Starts runs in child processes of one warm process."""

    def __init__(self, folder: Path) -> None:
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TUNESMITH_CACHE": str(folder / "cache"),
        }
        self.log = (folder / "driver.log").open("w")
        stdin, orders = os.pipe()
        answers, stdout = os.pipe()
        streams = (stdin, stdout, self.log.fileno())
        self.process = Warm([], program=DRIVER, env=env, streams=streams)
        os.close(stdin)
        os.close(stdout)
        self.orders = os.fdopen(orders, "w")
        self.answers = os.fdopen(answers)

    def start(
        self, values: dict[str, Any], *, ignored: str | None = None, unread: bool = False
    ) -> int:
        """Start a run, with a signal ignored as by nohup, or with a closed pipe as stderr; its
        process id.
        """
        self.orders.write(json.dumps([values, ignored, unread]) + "\n")
        self.orders.flush()
        return int(self.read())

    def read(self) -> str:
        line = self.answers.readline()
        assert line, "the driver died: see driver.log"
        return line

    def wait(self) -> int:
        """Exit code of the run that was started last; minus the signal's number if one killed it."""
        return int(self.read())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.orders, self.answers, self.log):
            file.close()


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory):
    starter = Starter(tmp_path_factory.mktemp("starter"))
    yield starter
    starter.close()


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in json.loads(line).items() if k in SAME}
        for line in (run_dir / "metrics.jsonl").open()
    ]


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


CASES: dict[str, tuple[dict[str, Any], int]] = {  # a recipe, and its steps
    "LoRA, dropout, packed": (
        {"adapter": {"dropout": 0.1}, "train": {"micro_batch": "128 tokens"}},
        50,
    ),
    "full, bf16, masters": (
        {"adapter": {"kind": "none"}, "model": {"dtype": "bf16"}, "data": {"pack": False}},
        14,
    ),
}


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, starter: Starter
) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """The recipe of a case of CASES, and the directory of a run of it that nothing stopped."""

    @cache
    def made(case: str) -> tuple[dict[str, Any], Path]:
        (changes, steps), folder = CASES[case], tmp_path_factory.mktemp("whole")
        values = recipe(tiny, folder, **changes)
        values["train"]["duration"] = f"{steps} steps"
        values["validate"] = {"every": f"{steps * 2 // 5} steps"}
        starter.start(values | {"checkpoint": {"every": None}})
        assert starter.wait() == 0
        return values, folder / "run"

    return made


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kills"), zip(CASES, (3, 1), strict=True))
def test_kill_9_at_random_moments_changes_no_number(
    case: str, kills: int, uninterrupted: Any, tmp_path: Path, starter: Starter
) -> None:
    values, whole = uninterrupted(case)
    cut = values | {"output_dir": str(tmp_path / "cut")}
    chance, inside = random.Random(0), 0
    for number in range(kills):
        before, pid = lines(tmp_path / "cut"), starter.start(cut)
        deadline = time.monotonic() + TIME
        # At least one new step each time, so that the kills come to an end; then any moment of the
        # next steps.
        while lines(tmp_path / "cut") <= before:
            assert time.monotonic() < deadline, "no step"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.08))
        while number % 2 == 0 and not list((tmp_path / "cut").glob(".checkpoint-*.partial")):
            assert time.monotonic() < deadline, "no checkpoint is written"
        os.kill(pid, signal.SIGKILL)
        assert starter.wait() == -signal.SIGKILL, (
            "the run ended before it could be killed: make it longer"
        )
        inside += bool(list((tmp_path / "cut").glob(".checkpoint-*")))
    starter.start(cut)
    assert starter.wait() == 0
    assert steps_of(tmp_path / "cut") == steps_of(whole)
    assert len(steps_of(whole)) == CASES[case][1]
    if kills > 2:
        assert inside >= 1, "no kill fell into the writing of a checkpoint"


def test_a_signal_saves_exits_75_and_resume_goes_on(
    tiny: Path, tmp_path: Path, starter: Starter
) -> None:
    """One signal after another cuts one run; in the end it is the uninterrupted one."""
    whole = recipe(tiny, tmp_path, checkpoint={"every": None}, train={"duration": "28 steps"})
    cut = whole | {"output_dir": str(tmp_path / "cut")}
    starter.start(whole)
    assert starter.wait() == 0
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        before, pid = lines(tmp_path / "cut"), starter.start(cut)
        while lines(tmp_path / "cut") < before + 2:
            time.sleep(0.002)
        recorded = lines(tmp_path / "cut")
        os.kill(pid, signal.Signals[name])
        assert starter.wait() == 75, name
        with logged_lines() as said:
            found = replicate.newest_checkpoint(tmp_path / "cut")
        assert said == []
        assert found is not None
        # It begins to save within one step; a step may end while the signal is on its way.
        assert recorded <= found[0] <= recorded + 3
        assert not (tmp_path / "cut" / "failure.json").exists()
    starter.start(cut)
    assert starter.wait() == 0
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "run")


def test_any_signal_at_any_moment_changes_no_number(
    uninterrupted: Any, tmp_path: Path, starter: Starter
) -> None:
    """While the run loads, steps, saves or ends; under nohup, in the background, without a reader."""
    values, whole = uninterrupted("LoRA, dropout, packed")
    cut = values | {"output_dir": str(tmp_path / "cut")}
    chance, codes = random.Random(1), []
    for _ in range(6):
        names = chance.choice(
            [
                ["SIGKILL"],
                ["SIGINT", "SIGINT"],
                ["SIGTERM", "SIGTERM"],
                *([name] for name in SIGNAL_NAMES),
            ]
        )
        ignored, before = chance.choice([None, "SIGHUP", "SIGINT"]), lines(tmp_path / "cut")
        pid = starter.start(cut, ignored=ignored, unread=chance.random() < 0.5)
        deadline = time.monotonic() + TIME
        # So that the kills come to an end
        while names[0] == "SIGKILL" and lines(tmp_path / "cut") <= before:
            assert time.monotonic() < deadline, "no step"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1 if names[0] == "SIGKILL" else 0.6))
        if names[0] == ignored:
            os.kill(pid, signal.Signals[ignored])
            time.sleep(0.1)
            names = ["SIGKILL"]
        for name in names:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[name])
                time.sleep(0.35 * (len(names) > 1))
        codes.append(starter.wait())
        assert codes[-1] in ((-signal.SIGKILL, 0) if names[0] == "SIGKILL" else (75, 0)), (
            names,
            ignored,
        )
        assert not (tmp_path / "cut" / "failure.json").exists()
    assert {75, -signal.SIGKILL} <= set(codes)
    starter.start(cut)
    assert starter.wait() == 0
    assert steps_of(tmp_path / "cut") == steps_of(whole)
    files = [
        json.loads((folder / "final" / "manifest.json").read_text())["files"]
        for folder in (tmp_path / "cut", whole)
    ]
    # They tell the time that it took, and the run's folder
    cards = [found.pop("README.md") for found in files]
    assert files[0] == files[1]
    assert all(card["bytes"] for card in cards)


def stop_while(monkeypatch: pytest.MonkeyPatch, place: str, name: str = "SIGTERM") -> None:
    """Let a signal arrive whenever the function at `place` is called."""

    def stopped(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(5)

    monkeypatch.setattr(place, stopped)


@pytest.mark.parametrize("name", SIGNAL_NAMES)
@pytest.mark.parametrize(
    "place",
    [
        "transformers.AutoTokenizer.from_pretrained",  # whose errors are caught, whatever they are
        "transformers.AutoConfig.from_pretrained",
        "tunesmith.stages.output.decide_start",
        "tunesmith.data.tokens.encode.convert_row",
        "tunesmith.training.session.build_model",
        "tunesmith.metrics.sink.JsonlSink.open",
    ],
)
def test_a_stop_before_the_first_step_exits_75_wherever_it_comes(
    place: str, name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    stop_while(monkeypatch, place, name)
    with refuses(StoppedEarlyError, names=[name]):
        train(make_run(tiny, tmp_path), quiet=True)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "failure.json").exists()


def test_what_a_stop_saved_is_told_by_all_until_a_resume_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of a step whose validation was cut off is not written yet, and a resume that is
    stopped while it loads has still that step saved.
    """
    run = make_run(tiny, tmp_path, train={"duration": "4 steps"}, validate={"every": "2 steps"})
    folder = tmp_path / "run"

    def told_steps() -> list[int | None]:
        summary = RunFiles(folder)
        stopped = json.loads((folder / "stopped.json").read_text())
        return [summary.steps, stopped["step"]]

    measure = Validation.measure

    def stopped_while_measuring(self: Validation) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "measure", stopped_while_measuring)
        with refuses(StoppedError, names=["step 2"]):
            train(run, quiet=True)
    assert told_steps() == [2, 2]
    with monkeypatch.context() as patch:
        stop_while(patch, "tunesmith.training.session.build_model")
        with refuses(StoppedEarlyError, names=["step 2"]):
            train(run, quiet=True)
    assert told_steps() == [2, 2]
    with monkeypatch.context() as patch:
        stop_while(patch, "tunesmith.training.session.build_model")
        patch.setattr("tunesmith.training.run.is_launched", lambda: True)
        with refuses(StoppedEarlyError, names=["step 2"]):
            train(run, quiet=True)
    assert told_steps() == [2, 2]
    (folder / "stopped.json").write_text(json.dumps({"step": None}))
    assert told_steps() == [1, None], "the recorded step"
    assert train(run, quiet=True).steps == 4
    assert RunFiles(folder).steps == 4


def test_a_stop_that_a_library_swallows_is_not_lost() -> None:
    def swallowed() -> None:
        with StopRequest() as stop:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            stop.defer_signals()
            pytest.fail("it went on")

    def made_another_error() -> None:
        with StopRequest():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            except BaseException as error:
                raise ModelError("the tokenizer cannot be read") from error

    for library in (swallowed, made_another_error):
        with pytest.raises(StoppedError):
            library()


def test_a_stop_inside_code_that_c_runs_keeps_the_exit_code(tmp_path: Path) -> None:
    """`python -m` ends by SIGINT once a plain KeyboardInterrupt has passed PyRun_String, as while
    torch is imported.
    """
    (tmp_path / "stopped.py").write_text("""
import ctypes, sys
from tunesmith.errors import StoppedError
from tunesmith.host.signals import StopRequest
run = ctypes.pythonapi.PyRun_String
run.restype, run.argtypes = ctypes.py_object, (ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object)
try:
    with StopRequest():
        run(b"import os, time; os.kill(os.getpid(), 15); time.sleep(5)", 257, {}, {})
except StoppedError as error:
    sys.exit(error.exit_code)
""")
    assert (
        subprocess.run([sys.executable, "-m", "stopped"], check=False, cwd=tmp_path).returncode
        == 75
    )


@pytest.mark.parametrize("name", SIGNAL_NAMES)
def test_a_signal_that_is_ignored_stays_ignored(name: str) -> None:
    """As nohup leaves SIGHUP, and a shell without job control the SIGINT of what runs in the
    background.
    """
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert not stop.requested()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def busy(seconds: float) -> None:
    """Hold the main thread in C, as a backward does: Python's own handlers wait until it returns."""

    def clock() -> float:
        began = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000)
        return max(time.monotonic() - began, 1e-4)

    # The quickest of five: one that had to wait for its core would ask for too few rounds.
    one = min(clock() for _ in range(5))
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(10_000 * seconds / one))


def test_the_first_ctrl_c_is_answered_at_once_and_the_second_stops_at_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a step; what was saved before stays, and the next start goes on to the same numbers."""
    step, said = Trainer.train_step, []
    again = True

    def interrupted(self: Trainer, batch: Any) -> Any:
        if batch.step == 5 and again:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            began = time.monotonic()
            busy(1.5)
            took = time.monotonic() - began
            announced = [
                at - began for at, text in said if "press ctrl-C again to stop now" in text
            ]
            assert [at < 0.7 * took for at in announced] == [True]
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            pytest.fail("it went on")
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    run = make_run(tiny, tmp_path)
    stopped = refuses(StoppedError, where="checkpoint-4", names=["step 5", "step 4"])
    with stopped as caught, logged_lines(lambda text: said.append((time.monotonic(), text))):
        train(run)
    assert caught.value.where.endswith("checkpoint-4")
    assert manifest.find_damage(tmp_path / "run" / "checkpoint-4") is None
    assert not (tmp_path / "run" / "failure.json").exists()
    again = False
    train(run, quiet=True)
    train(make_run(tiny, tmp_path, output_dir=str(tmp_path / "whole")), quiet=True)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_while_final_is_written(
    presses: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lets it be written; the second stops, and the next start writes it."""
    write = contents.write_model_files

    def pressed(folder: Path, *args: Any) -> None:
        for _ in range(presses if folder.name == ".final.partial" else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.4)
        write(folder, *args)

    monkeypatch.setattr(contents, "write_model_files", pressed)
    run = make_run(tiny, tmp_path)
    stopped = (
        contextlib.nullcontext()
        if presses == 1
        else refuses(StoppedError, where="checkpoint-8", names=["step 8"])
    )
    with stopped, logged_lines() as said:
        train(run)
    assert [line for line in said if line.startswith("SIGINT: ") and "final/" in line]
    assert (tmp_path / "run" / "final").exists() == (presses == 1)
    monkeypatch.setattr(contents, "write_model_files", write)
    train(run, quiet=True)
    assert manifest.find_damage(tmp_path / "run" / "final") is None


def test_two_sigints_of_one_press_and_repeated_signals_of_a_scheduler_are_one_stop() -> None:
    with logged_lines() as said, StopRequest() as stop:
        stop.defer_signals()
        for name in ("SIGINT", "SIGINT", "SIGTERM", "SIGTERM", "SIGHUP"):
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(0.01)
    assert stop.signal == "SIGINT"
    assert not stop.now
    assert [text.partition(":")[0] for text in said] == ["SIGINT", "SIGTERM", "SIGHUP"]


def test_a_signal_of_the_callers_own_is_left_to_it() -> None:
    came = []
    number = signal.SIGRTMIN + 1  # without a name
    before = signal.signal(number, lambda *_: came.append(1))
    try:
        with logged_lines() as said, StopRequest() as stop:
            stop.defer_signals()
            for each in (number, signal.SIGINT):
                os.kill(os.getpid(), each)
                time.sleep(0.05)
    finally:
        signal.signal(number, before)
    assert came == [1]
    (line,) = said
    assert line.startswith("SIGINT: ")


def test_a_forked_worker_is_not_the_run() -> None:
    """A pool ends its workers with SIGTERM: that stops them, and the run says nothing."""
    with logged_lines() as said, StopRequest() as stop:
        stop.defer_signals()
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(writer, b"1")
            time.sleep(60)
            os._exit(0)
        # On a busy machine a child may take longer to begin than any pause.
        os.read(reader, 1)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        os.close(reader)
        os.close(writer)
    assert not said
    assert not stop.requested()
