"""Kill a run anywhere: the next start goes on, and the numbers are those of a run without a stop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vision_models
from errors import refuses
from logged import logged_lines
from recipes import make_run, merge, recipe
from tunesmith.checkpoint import contents, manifest, replicate
from tunesmith.config.schema import Run
from tunesmith.errors import ModelError, StoppedEarlyError, StoppedError
from tunesmith.host.signals import SIGNAL_NAMES, StopRequest
from tunesmith.reader.run_files import RunFiles
from tunesmith.training.run import train
from tunesmith.training.trainer import Trainer
from tunesmith.training.validation import Validation
from waiting import TIME
from warm import Warm

pytestmark = [pytest.mark.slow, pytest.mark.long]

SAME = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "examples", "val_loss")  # fmt: skip


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in json.loads(line).items() if k in SAME}
        for line in (run_dir / "metrics.jsonl").open()
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """The same records and the same bytes of weights."""
    assert steps_of(one) == steps_of(other)
    files = list((other / "final").glob("*.safetensors"))
    assert files
    for file in files:
        assert (one / "final" / file.name).read_bytes() == file.read_bytes()


# ---- stopped in a step, and resumed, in this process ----

FULL: dict[str, Any] = {"adapter": {"kind": "none"}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # a model, and a recipe
    "lora": ("tiny", {"adapter": {"dropout": 0.1}}),
    "full": ("tiny", {**FULL, "model": {"dtype": "bf16"}, "data": {"pack": False}}),
    "nf4": ("tiny", {"model": {"quantize": "nf4"}}),
    "8-bit moments": ("wide", {**FULL, "train": {"optimizer": "adamw-8bit"}}),
    "mixture": ("mixture", {}),
    # A delta rule that runs by document, attention in chunks, the text part of a whole.
    "qwen3_5": ("qwen3_5", {}),
    "qwen3_5 in full": ("qwen3_5", FULL),
    "llama4": ("llama4", {}),
    "llama4 in full": ("llama4", FULL),
    "gemma3": ("gemma3", {}),
    "gemma3 in full": ("gemma3", FULL),
}
NAMES = [
    pytest.param(n, id=n, marks=() if n in ("lora", "full", "nf4") else pytest.mark.nightly)
    for n in CASES
]
# With 4 layers the last one of Llama 4 attends to the whole document.
SIZES: dict[str, dict[str, Any]] = {"llama4": {"num_hidden_layers": 4, "floor_scale": 4}}


def train_until_stopped(run: Run, stop_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that gets SIGTERM in a step."""
    step = Trainer.train_step

    def signalled(self: Trainer, batch: Any) -> Any:
        if batch.step + 1 == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        with pytest.raises(StoppedError):
            train(run, quiet=True)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_never_stopped(name, tiny, tmp_path, monkeypatch, request):
    base, changes = CASES[name]
    if base in vision_models.FAMILIES:
        model = vision_models.build(base, tmp_path / "model", tiny, **SIZES.get(base, {}))
    else:
        model = request.getfixturevalue(base)
    settings = {
        "train": {"duration": "6 steps", "micro_batch": "128 tokens"},
        "validate": {"every": "4 steps"},
        "checkpoint": {"every": None},
    }
    whole, cut = (
        make_run(model, tmp_path, **merge(merge(settings, changes), {"output_dir": str(out)}))
        for out in (tmp_path / "whole", tmp_path / "cut")
    )
    train(whole, quiet=True)
    train_until_stopped(cut, 3, monkeypatch)
    assert 3 <= train(cut, quiet=True).first_step < 6
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


# ---- a process that is killed ----


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIME
    while not condition():
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.002)


def interrupt(file: Path, out: Path, how: str) -> None:
    """Start a process that trains, and kill or stop it after a new step."""
    before = lines(out)
    process = Warm(["train", file], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_until(lambda: lines(out) > before or process.poll() is not None)
        if how == "SIGKILL in a checkpoint":
            wait_until(lambda: list(out.glob(".checkpoint-*.partial")))
        recorded = lines(out)
        number = signal.Signals[how.split(maxsplit=1)[0]]
        process.send_signal(number)
        code = process.wait()
    finally:
        process.kill()
    assert not (out / "failure.json").exists()
    if number == signal.SIGKILL:
        assert code == -number, "the run ended before it could be killed: make it longer"
        return
    assert code == 75
    with logged_lines() as said:
        found = replicate.newest_checkpoint(out)
    assert said == []
    assert found is not None
    # It begins to save within one step; a step may end while the signal is on its way.
    assert recorded <= found[0] <= recorded + 3


@pytest.mark.parametrize(
    ("name", "hows"),
    [
        ("lora", ["SIGKILL in a checkpoint", "SIGTERM"]),
        pytest.param("full", ["SIGKILL in a checkpoint", "SIGKILL"], marks=pytest.mark.nightly),
        pytest.param("lora", ["SIGINT", "SIGHUP", "SIGUSR1"], marks=pytest.mark.nightly),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_kills_and_signals_change_no_number(name, hows, tiny, tmp_path):
    """`benchmarks/faults/kills.py` does it many times, at random moments."""
    settings = {
        "train": {"duration": "30 steps", "micro_batch": "128 tokens"},
        "validate": {"every": "12 steps"},
        "output_dir": str(tmp_path / "cut"),
    }
    values = recipe(tiny, tmp_path, **merge(settings, CASES[name][1]))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values))
    whole = merge(settings, CASES[name][1]) | {"output_dir": str(tmp_path / "whole")}
    train(make_run(tiny, tmp_path, **merge(whole, {"checkpoint": {"every": None}})), quiet=True)
    for how in hows:
        interrupt(file, tmp_path / "cut", how)
    process = Warm(["train", file], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.wait() == 0, process.communicate()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert len(steps_of(tmp_path / "cut")) == 30


# ---- stops at other moments ----


def stop_while(monkeypatch: pytest.MonkeyPatch, place: str, name: str = "SIGTERM") -> None:
    """Let a signal arrive whenever the function at `place` is called."""

    def stopped(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(5)

    monkeypatch.setattr(place, stopped)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        # Its errors are caught, whatever they are.
        ("transformers.AutoTokenizer.from_pretrained", "SIGTERM"),
        ("transformers.AutoConfig.from_pretrained", "SIGINT"),
        ("tunesmith.stages.output.decide_start", "SIGHUP"),
        ("tunesmith.data.tokens.encode.convert_row", "SIGUSR1"),
        ("tunesmith.training.session.build_model", "SIGINT"),
        ("tunesmith.metrics.sink.JsonlSink.open", "SIGTERM"),
    ],
)
def test_a_stop_before_the_first_step_exits_75_wherever_it_comes(
    place, name, tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    stop_while(monkeypatch, place, name)
    with refuses(StoppedEarlyError, names=[name]):
        train(make_run(tiny, tmp_path), quiet=True)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "failure.json").exists()


def test_what_a_stop_saved_is_told_by_all_until_a_resume_goes_on(tiny, tmp_path, monkeypatch):
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
    for is_launched in (False, True):
        with monkeypatch.context() as patch:
            stop_while(patch, "tunesmith.training.session.build_model")
            patch.setattr("tunesmith.training.run.is_launched", lambda told=is_launched: told)
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
    tiny, tmp_path, monkeypatch
):
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
def test_ctrl_c_while_final_is_written(presses, tiny, tmp_path, monkeypatch):
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
