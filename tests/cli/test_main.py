"""The frame of the command line: speed, exit codes, and words instead of tracebacks."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tunesmith
from errors import check_shown, error_in, is_internal
from invoke import Output, invoke
from tunesmith.cli.main import VERBS
from tunesmith.errors import OtherRankError, RecipeError, RunError, StoppedError

HEAVY = {"torch", "transformers", "datasets", "peft", "numpy"}
MODULES = """import contextlib, sys
from tunesmith.cli.main import main
for number, words in enumerate({pages!r}):
    with contextlib.redirect_stdout(None):
        main(words)
    if number == 0:
        print(*sys.modules, file=sys.stderr)
print(*sys.modules, file=sys.stderr)"""
EndWith = Callable[[BaseException], Output]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tunesmith.__file__).parents[1])}


@pytest.fixture
def end_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Output]:
    """Run a command that ends with the given error."""

    def run(error: BaseException) -> Output:
        def work(args: object) -> int:
            raise error

        module = ModuleType("tunesmith.cli.try_")
        vars(module).update(add_arguments=lambda parser: None, run=work, EPILOG="")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(VERBS, "try", (module.__name__, "for a test"))
        return invoke("try")

    return run


def seconds_of_children() -> float:
    """Processor time of the processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_help_starts_at_once() -> None:
    """Under 0.4 s of the processor, best of three; no page imports anything heavy."""
    seconds, options = [], {"env": ENVIRONMENT, "capture_output": True, "text": True}
    for _ in range(3):
        start = seconds_of_children()
        shown = subprocess.run([sys.executable, "-m", "tunesmith", "--help"], check=True, **options)
        seconds.append(seconds_of_children() - start)
    assert min(seconds) < 0.4
    assert all(f"  {verb} " in shown.stdout for verb in VERBS)
    pages = [["--help"], *([*verb.split(), "--help"] for verb in VERBS)]
    program = MODULES.format(pages=pages)
    done = subprocess.run([sys.executable, "-c", program], check=True, **options)
    first, all_modules = (set(line.split()) for line in done.stderr.splitlines())
    assert not first & {*HEAVY, "rich", "ruamel.yaml", "huggingface_hub", "jinja2"}
    assert {module for module, _ in VERBS.values()} <= all_modules
    assert not all_modules & HEAVY


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_fits_a_terminal(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke(*verb.split(), "--help")
    assert (shown.code, shown.err) == (0, "")
    examples = shown.out.partition("\nexample:\n")[2]
    assert re.search(rf"^ .*tunesmith {verb}\b", examples, re.MULTILINE), shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


# Words of a command -> values of the fix
WRONG = {
    "trian": ["tunesmith train?"],
    "zzz": ["tunesmith --help"],
    "compare a b": ["tunesmith report A B"],
    "serve runs/a": ["tunesmith export RUN --to vllm"],
    "launch slrum r.yaml": ["tunesmith launch slurm?"],
    "train": ["--data"],
    "train --model m --data d train.seed = 1": ["train.seed"],
    "train r.yaml --freshh": ["--fresh?"],
    "train r.yaml --lr 1e-4": ["train.learning_rate=1e-4"],
    "data r.yaml --epochs 3": ["train.duration=VALUE", "3 epochs"],
    "train --max_steps 500 r.yaml": ["train.duration=VALUE", "500 steps"],
    "train r.yaml --bf16 True": ["model.dtype=bf16"],
    "train r.yaml --train.seed 4": ["train.seed=VALUE"],
    "generate run --lr 1": ["tunesmith generate --help"],
    "recipes show": ["tunesmith recipes show smollm2-135m-lora"],
    "recipes show qwen3-8b": ["qwen3-8b-dpo?"],
    "train llama3.1-8b-lor": ["llama3.1-8b-lora?"],
    "export run --to olama --output x": ["--to ollama?"],
    "export run --to gguf --quant q4 --output x": ["--quant q4_k_m?"],
    "data demo --format messges": ["--format messages?"],
    "sweep r.yaml --rank 2": ["--ranks?"],
    "train smollm2-135m-lora parallel.experts=2": ["parallel.shard"],
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_commands(words: str) -> None:
    shown = invoke(*words.split())
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("error: ")
    assert error_in(shown.err).fix
    check_shown(shown.err, fix=WRONG[words])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("no", where="r.yaml:1", fix="yes"), 2, "error: no\n  where: r.yaml:1\n  fix: yes\n"),
        (RunError("it failed"), 1, "error: it failed\n"),
        (OtherRankError("rank 1 on b failed", exit_code=2), 2, ""),
        (StoppedError("stopped at step 3", fix="start again"), 75, "stopped at step 3\n  fix: start again\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)  # fmt: skip
def test_ends(error: BaseException, code: int, said: str, end_with: EndWith) -> None:
    shown = end_with(error)
    assert (shown.code, shown.out, shown.err) == (code, "", said)


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (OSError(errno.ENOSPC, "No space left", "/x"), {"where": "/x", "cause": "disk"}),
        (OSError(errno.EROFS, "Read-only", "/proc/a b"), {"where": "/proc/a b", "fix": ["ls -la /proc"]}),
        (RuntimeError("you tried to allocate 5 bytes"), {"where": "this machine", "names": [5]}),
        (MemoryError("no 7 bytes"), {"where": "this machine", "names": [7]}),
        (ModuleNotFoundError("no", name="wandb.sdk"), {"names": ["wandb"], "fix": ["pip install 'wandb>=0.18'"]}),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_of_another_library_is_a_block_too(
    error: BaseException, fields: dict[str, Any], end_with: EndWith
) -> None:
    shown = end_with(error)
    assert shown.code == 2
    check_shown(shown.err, **fields)
    assert not is_internal(shown.err)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("one\ntwo"), BrokenPipeError(errno.EPIPE, "one")]
)
def test_internal_error(
    error: Exception, end_with: EndWith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours is one block; the traceback lies in a file, and is shown only when asked for."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shown = end_with(error)
    assert shown.code == 1
    (file,) = tmp_path.iterdir()
    assert is_internal(shown.err)
    assert "Traceback" not in shown.err
    check_shown(shown.err, names=[type(error).__name__, "one"], fix=[file, "TUNESMITH_DEBUG=1"])
    assert "Traceback" in file.read_text()
    assert tunesmith.__version__ in file.read_text()
    # Where there is no place to write, and where it is asked for
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    assert "Traceback" in end_with(error).err
    monkeypatch.setenv("TUNESMITH_DEBUG", "1")
    assert "Traceback" in end_with(error).err
