"""Kill a run anywhere: the next start goes on, and the numbers are those of a run without a stop."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import vision_models
from errors import lines_with, refuses
from recipes import make_run, merge, recipe
from tunesmith.checkpoint import contents, manifest, replicate
from tunesmith.checkpoint.claim import is_run, run_files
from tunesmith.config.schema import Run
from tunesmith.errors import StoppedEarlyError, StoppedError
from tunesmith.host import signals
from tunesmith.host.signals import SIGNAL_NAMES, StopRequest
from tunesmith.launch.job import Job
from tunesmith.run_dir import (
    RUNNING,
    STOP_FILE,
    Manifest,
    RunningNote,
    RunState,
    Stopped,
    read_object,
)
from tunesmith.start.run import train
from tunesmith.start.tokens import TokenFacts
from tunesmith.tools.report.run_files import RunFiles
from tunesmith.training.trainer import Trainer
from tunesmith.training.validation import Validation
from waiting import TIME, wait_for
from warm import Warm, fork_ranks, run_warm

pytestmark = [pytest.mark.slow, pytest.mark.long]

SAME = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "examples", "val_loss")  # fmt: skip


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in json.loads(line).items() if k in SAME}
        for line in (run_dir / "metrics.jsonl").open()
    ]


def assert_same_run(one: Path, other: Path) -> None:
    assert steps_of(one) == steps_of(other)
    files = list((other / "final").glob("*.safetensors"))
    assert files
    for file in files:
        assert (one / "final" / file.name).read_bytes() == file.read_bytes()


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


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def interrupt(file: Path, out: Path, how: str) -> None:
    before, deadline = lines(out), time.monotonic() + TIME
    name, *moment = how.split(maxsplit=1)
    number = signal.Signals[name]

    def has_come() -> bool:
        is_written = not moment or any(out.glob(".checkpoint-*.partial"))
        return lines(out) > before and is_written

    process = Warm(["train", file], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not has_come() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        recorded = lines(out)
        process.send_signal(number)
        code = process.wait()
    finally:
        process.kill()
    assert not (out / "failure.json").exists()
    if number == signal.SIGKILL:
        assert code == -number, "the run ended before it could be killed: make it longer"
        return
    assert code == 75
    found = replicate.newest_checkpoint(out)
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
    settings = merge(settings, CASES[name][1])
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tiny, tmp_path, **settings)))
    whole = settings | {"output_dir": str(tmp_path / "whole"), "checkpoint": {"every": None}}
    train(make_run(tiny, tmp_path, **whole), quiet=True)
    for how in hows:
        interrupt(file, tmp_path / "cut", how)
    process = Warm(["train", file], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.wait() == 0, process.communicate()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert len(steps_of(tmp_path / "cut")) == 30


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
        ("tunesmith.tokens.encode.convert_row", "SIGUSR1"),
        ("tunesmith.start.session.build_model", "SIGINT"),
        ("tunesmith.metrics.sink.JsonlSink.open", "SIGHUP"),
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
    measure = Validation.measure

    def stopped_while_measuring(self: Validation) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self)

    for kind in (StoppedError, StoppedEarlyError):
        with monkeypatch.context() as patch:
            if kind is StoppedError:
                patch.setattr(Validation, "measure", stopped_while_measuring)
            else:
                stop_while(patch, "tunesmith.start.session.build_model")
            with refuses(kind, names=["step 2"]):
                train(run, quiet=True)
        assert RunFiles(folder).steps == 2
        assert json.loads((folder / "stopped.json").read_text())["step"] == 2
    assert train(run, quiet=True).steps == 4
    assert RunFiles(folder).steps == 4


@pytest.mark.parametrize("name", SIGNAL_NAMES)
def test_a_signal_that_is_ignored_stays_ignored(name: str) -> None:
    """As nohup leaves SIGHUP."""
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


def test_the_second_ctrl_c_stops_at_once(tiny, tmp_path, monkeypatch):
    step = Trainer.train_step

    def interrupted(self: Trainer, batch: Any) -> Any:
        if batch.step == 5:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.4)
            pytest.fail("it went on")
        return step(self, batch)

    run = make_run(tiny, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with refuses(StoppedError, where="checkpoint-4", names=["step 5", "step 4"]):
            train(run, quiet=True)
    assert manifest.find_damage(tmp_path / "run" / "checkpoint-4") is None
    assert not (tmp_path / "run" / "failure.json").exists()
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

    run = make_run(tiny, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(contents, "write_model_files", pressed)
        with contextlib.suppress(StoppedError):
            train(run, quiet=True)
    assert (tmp_path / "run" / "final").exists() == (presses == 1)
    train(run, quiet=True)
    assert manifest.find_damage(tmp_path / "run" / "final") is None


def test_two_sigints_of_one_press_and_repeated_signals_of_a_scheduler_are_one_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A scheduler repeats its signal seconds later, while the run still saves.
    monkeypatch.setattr(signals, "ONE_REQUEST", 0.0)
    with StopRequest() as stop:
        stop.defer_signals()
        for name in ("SIGINT", "SIGINT", "SIGTERM", "SIGTERM", "SIGHUP", "SIGHUP"):
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(0.05)
    assert stop.signal == "SIGINT"
    assert not stop.now


# ---- stops while a run loads, by one process or by ranks that a launcher would restart ----

LOADED = "loaded"  # a file of the run directory that lets the load end


def load_slowly() -> None:
    from tunesmith.start import build as build_module

    build = build_module.build_from_tokens

    def slow_build(tokens: TokenFacts, *words: Any, **options: Any) -> Any:
        out = Path(tokens.run.output_dir)
        deadline = time.monotonic() + TIME
        while not (out / LOADED).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return build(tokens, *words, **options)

    build_module.build_from_tokens = slow_build


def slow_ranks() -> None:
    load_slowly()
    fork_ranks()


@pytest.fixture
def file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    values = recipe(tiny, tmp_path, held=False, train={"duration": "4 steps"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    return tmp_path / "recipe.yaml"


def test_the_file_stop_is_kept_by_one_process_and_an_old_one_is_not(file: Path, tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    (out / STOP_FILE).touch()  # of nobody's start
    process = Warm(["train", file], prepare=load_slowly)
    try:
        wait_for((out / RUNNING).exists, process)
        (out / STOP_FILE).touch()
        (out / LOADED).touch()
        printed = "".join(process.communicate(timeout=TIME))
    finally:
        process.kill()
    assert process.returncode == 75, printed
    assert lines_with(printed, "stop file")
    assert not (out / STOP_FILE).exists()
    assert not (out / "final").exists()
    assert Job("", str(out)).state().state is RunState.STOPPED
    done = run_warm(["train", file])
    assert done.returncode == 0, done.stderr
    assert (out / "final" / "manifest.json").exists()


@pytest.mark.parametrize("first_rank", [False, True], ids=["launcher", "first rank"])
def test_ranks_that_a_launcher_would_start_again_stay_stopped(first_rank, file, tmp_path):
    out = tmp_path / "run"
    words = ["launch", "local", file, "--ranks", "2", "--restarts", "3"]
    launcher = Warm(words, prepare=slow_ranks)
    try:
        wait_for((out / RUNNING).exists, launcher)
        pid = read_object(out / RUNNING, RunningNote)["process"] if first_rank else launcher.pid
        os.kill(pid, signal.SIGTERM)
        printed = "".join(launcher.communicate(timeout=TIME))
    finally:
        launcher.kill()
    assert launcher.returncode == 75, printed
    assert "Traceback" not in printed
    assert run_files(out) == []
    (out / "stopped.json").write_text('{"next": "", "cause": null}')  # by a rank that ended last
    assert is_run(out)


def block_in_a_step() -> None:
    """Let step 5 wait in C, where no signal handler of Python runs."""
    from tunesmith.training.trainer import Trainer as Blocked

    step = Blocked.train_step
    signals.ONE_REQUEST = signals.END_NOW_SECONDS = 0.2
    StopRequest.is_of_command = True

    def blocked(self: Trainer, batch: Any) -> Any:
        if batch.step == 4:
            (self.out / LOADED).touch()
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
        return step(self, batch)

    Blocked.train_step = blocked  # type: ignore[method-assign]


def test_a_second_signal_ends_a_blocked_step_and_tells_what_is_saved(file: Path, tmp_path: Path):
    out = tmp_path / "run"
    words = ["train", file, "train.duration=6 steps", "checkpoint.every=2 steps"]
    process = Warm(words, prepare=block_in_a_step)
    try:
        wait_for((out / LOADED).exists, process)
        for _ in range(2):
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(2.0)  # a busy machine may read two quick signals as one request
        printed = "".join(process.communicate(timeout=TIME))
    finally:
        process.kill()
    assert process.returncode == 130, printed
    assert lines_with(printed, "stopped", "SIGTERM")
    assert lines_with(printed, "why", "step 4")
    assert read_object(out / "stopped.json", Stopped)["step"] == 4
    assert run_warm(words).returncode == 0
    assert read_object(out / "final" / "manifest.json", Manifest)["step"] == 6
