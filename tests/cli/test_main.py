"""The frame of the command line: speed, exit codes, and words instead of tracebacks."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import tunesmith
from errors import check_shown, is_internal
from tunesmith.cli import main as frame
from tunesmith.cli.main import VERBS, main
from tunesmith.config.dump import dump
from tunesmith.config.load import load_recipe
from tunesmith.config.shipped import shipped
from tunesmith.errors import RecipeError, RunError, StoppedError
from waiting import TIME
from warm import Warm

HEAVY = {"torch", "transformers", "datasets", "peft", "numpy"}
MODULES = "import sys; from tunesmith.cli.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tunesmith.__file__).parents[1])}


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIME,
        check=False,
    )


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Put a verb `try` in place whose work is the given function."""

    def put(work: Callable[[], int]) -> None:
        module = ModuleType("tunesmith.cli.try_")
        vars(module).update(add_arguments=lambda parser: None, run=lambda args: work(), EPILOG="")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(VERBS, "try", (module.__name__, "for a test"))

    return put


# Words, and where the error is, of paths that are not there.
WRONG_PATHS = [
    ("plan nowhere/", "nowhere/"), ("plan tests", "tests"), ("train nowhere.yaml", "nowhere.yaml"), ("data nowhere", "nowhere"),
    ("eval nowhere", "nowhere"), ("chat nowhere", "nowhere"), ("merge nowhere --output out", "nowhere"),
    ("export nowhere --to gguf --output out", "nowhere"), ("export nowhere --to vllm --output out", "nowhere"),
    ("sweep nowhere train.seed=1,2", "nowhere"), ("train --model demo --data nowhere.csv", "nowhere.csv"),
    ("plan --model demo --data nowhere.csv --on h100", "nowhere.csv"),
]  # fmt: skip
REFUSALS = f"""import sys
from tunesmith.cli.main import main
for words in {[words for words, _ in WRONG_PATHS]!r}:
    code = main(words.split())
    print(code, *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
    print("----", file=sys.stderr)"""


def test_a_path_that_is_not_there_is_refused_before_torch_is_imported() -> None:
    *outputs, _ = _python("-c", REFUSALS).stderr.split("----\n")
    assert len(outputs) == len(WRONG_PATHS)
    for (words, where), output in zip(WRONG_PATHS, outputs, strict=True):
        check_shown(output, where=where)
        assert output.splitlines()[-1] == "2", words


def _raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def seconds_of_children() -> float:
    """Processor time of the processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_help_starts_at_once() -> None:
    """Under 0.4 s of the processor with an interpreter's own start, best of three; and nothing heavy
    is imported on the way.
    """
    seconds = []
    for _ in range(3):
        start = seconds_of_children()
        shown = _python("-m", "tunesmith", "--help")
        seconds.append(seconds_of_children() - start)
        assert (shown.returncode, shown.stderr) == (0, "")
    assert min(seconds) < 0.4
    assert all(f"  {verb} " in shown.stdout for verb in VERBS)
    loaded = set(_python("-c", MODULES, "--help").stderr.split())
    assert "argparse" in loaded
    assert not loaded & {*HEAVY, "rich", "ruamel.yaml", "huggingface_hub", "jinja2"}


def test_help_of_each_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb's help has an example, and comes before anything heavy is imported: in one
    process, not by any of them.
    """
    monkeypatch.setenv("COLUMNS", "80")
    help_of_all = f"[print(main([*verb.split(), '--help']), end='\\0') for verb in {[*VERBS]}]"
    shown = _python("-c", MODULES.replace("main(sys.argv[1:])", help_of_all))
    *pages, rest = shown.stdout.split("\0")
    assert rest == "", shown.stderr
    for name, page in zip(VERBS, pages, strict=True):
        assert page.endswith("\n0"), "its exit code"
        # One line of usage, one sentence, then examples; nothing that a terminal has to wrap.
        usage, sentence, examples, *_ = page.split("\n\n")
        assert usage.startswith(f"usage: tunesmith {name} "), usage
        assert sentence.count("\n") == 0, sentence
        assert sentence.endswith("."), sentence
        assert examples.startswith("example:\n"), examples
        assert re.search(rf"^ .*tunesmith {name}\b", examples, re.MULTILINE), examples
        assert max(map(len, page.splitlines())) <= 80, max(page.splitlines(), key=len)
    imported = set(shown.stderr.split())
    assert {module for module, _ in VERBS.values()} <= imported
    assert not imported & HEAVY


def test_overviews_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """The page of all commands has each once; `launch` alone has its kinds, and its own usage."""
    for words in ([], ["launch"], ["launch", "--help"]):
        assert main(words) == 0
        page = capsys.readouterr().out
        listed = [name for name in VERBS if words == [] or name.startswith("launch ")]
        assert [name for name in VERBS if f"\n  {name}  " in page] == listed
        assert page.startswith(" ".join(["usage: tunesmith", *words[:1]]))
        assert max(map(len, page.splitlines())) <= 80


def test_options_of_one_name_are_one_option() -> None:
    """`--json`, `--columns` and `--device` mean the same wherever they stand."""
    meanings: dict[str, set[tuple[object, ...]]] = {}
    for name, (module, _) in VERBS.items():
        parser = argparse.ArgumentParser(f"tunesmith {name}")
        import_module(module).add_arguments(parser)
        for action in parser._actions:
            for option in {"--json", "--columns", "--device"} & {*action.option_strings}:
                if (name, option) != ("bench", "--json"):  # it keeps a file, and shows a table
                    meaning = (action.nargs, action.metavar, action.help)
                    meanings.setdefault(option, set()).add(meaning)
    assert {option: len(shown) for option, shown in meanings.items()} == {
        "--json": 1,
        "--columns": 1,
        "--device": 1,
    }


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tunesmith {tunesmith.__version__}\n"


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["trian"], "there is no command 'trian'", "did you mean tunesmith train?"),
        (
            ["train", "--model", "m", "--data", "d", "train.seed", "=", "1"],
            "a recipe and --model cannot be combined",
            "remove train.seed",
        ),
        (["zzz"], "there is no command 'zzz'", "tunesmith --help"),
        (
            ["launch", "slrum", "r.yaml"],
            "there is no command 'launch slrum'",
            "did you mean tunesmith launch slurm?",
        ),
        (
            ["launch", "--dry", "r.yaml"],
            "there is no command 'launch --dry'",
            "did you mean tunesmith launch docker?",
        ),
        (["compare", "a", "b"], "there is no command 'compare'", "tunesmith report A B"),
        (["serve", "runs/a"], "there is no command 'serve'", "tunesmith export RUN --to vllm"),
        (["--json"], "there is no command '--json'", "tunesmith --help"),
        (
            ["train", "r.yaml", "--lr", "1e-4"],
            "unrecognized arguments: --lr",
            "fix: write train.learning_rate=1e-4, without dashes",
        ),
        (
            ["train", "r.yaml", "--learning-rate=3e-4"],
            "--learning-rate",
            "without dashes; did you mean train.learning_rate?",
        ),
        (
            ["data", "r.yaml", "--epochs", "3"],
            "--epochs",
            "write train.duration=VALUE (in a file: train.duration: 3 epochs",
        ),
        (
            ["train", "--max_steps", "500", "r.yaml"],
            "--max_steps",
            "write train.duration=VALUE (in a file: train.duration: 500 steps), without dashes",
        ),
        (
            ["train", "r.yaml", "--per_device_train_batch_size", "8"],
            "--per_device",
            "write train.micro_batch",
        ),
        (
            ["train", "r.yaml", "--batch_size", "8"],
            "--batch_size",
            "write train.global_batch",
        ),
        (
            ["train", "r.yaml", "--output_dir", "runs/x"],
            "--output_dir",
            "write output_dir=VALUE, without dashes",
        ),
        (
            ["train", "r.yaml", "--bf16", "True"],
            "--bf16",
            "write model.dtype=bf16, without dashes",
        ),
        (
            ["train", "r.yaml", "--warmup_ratio", "0.1"],
            "--warmup_ratio",
            "write train.warmup=VALUE, without dashes",
        ),
        (
            ["train", "r.yaml", "--lora_r", "32"],
            "--lora_r",
            "write adapter.rank=VALUE, without dashes",
        ),
        (
            ["train", "r.yaml", "--train.seed", "4"],
            "--train.seed",
            "write train.seed=VALUE, without dashes",
        ),
        (
            ["fetch", "r.yaml", "--learning_rte", "1"],
            "--learning_rte",
            "without dashes; did you mean train.learning_rate?",
        ),
        (["train", "r.yaml", "--zzzz", "1"], "--zzzz", "a recipe: method, model"),
        (["generate", "run", "--lr", "1"], "", "tunesmith generate --help"),
        (["recipes", "--jsn"], "unrecognized arguments: --jsn", "did you mean --json?"),
        (["recipes", "lst"], "invalid choice: 'lst'", "tunesmith recipes --help"),
        (
            ["recipes", "show"],
            "recipes show needs a recipe's name",
            "tunesmith recipes show smollm2-135m-lora",
        ),
        (
            ["recipes", "show", "qwen3-8b"],
            "neither a file nor a shipped recipe with the name 'qwen3-8b'",
            "did you mean qwen3-8b-dpo?",
        ),
        (
            ["recipes", "copy", "mistral-7b"],
            "no recipe 'mistral-7b' is shipped",
            "did you mean mistral-7b-lora?",
        ),
        (
            ["recipes", "copy", "mistral-7b-lora", "a", "b"],
            "one destination, not 2",
            "copy mistral-7b-lora a",
        ),
        (
            ["recipes", "copy", "mistral-7b-lora", "no/such/x.yaml"],
            "there is no folder no/such",
            "mkdir -p no/such",
        ),
    ],
)
def test_wrong_commands(
    words: list[str], what: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    first, *rest = shown.err.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert any(line.startswith("  fix: ") and fix in line for line in rest), shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("no", where="r.yaml:1", fix="yes"), 2, "error: no\n  where: r.yaml:1\n  fix: yes\n"),
        (RunError("it failed"), 1, "error: it failed\n"),
        (StoppedError("stopped at step 3", fix="start again"), 75, "stopped at step 3\n  fix: start again\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)  # fmt: skip
def test_ends(
    error: BaseException,
    code: int,
    said: str,
    verb: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb(_raising(error))
    assert main(["try"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (OSError(errno.ENOSPC, "No space left", "/x"), {"where": "/x", "cause": "disk"}),
        (PermissionError(errno.EACCES, "Denied", "/x"), {"where": "/x", "names": ["Denied"]}),
        (RuntimeError("you tried to allocate 5 bytes"), {"where": "this machine", "names": [5]}),
        (MemoryError("no 7 bytes"), {"where": "this machine", "names": [7]}),
        (
            ModuleNotFoundError("no", name="wandb.sdk"),
            {"names": ["wandb"], "fix": ["pip install 'wandb>=0.18'"]},
        ),
    ],
    ids=str,
)
def test_an_error_of_another_library_is_a_block_too(
    error: BaseException,
    fields: dict[str, Any],
    verb: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb(_raising(error))
    assert main(["try"]) == 2
    shown = capsys.readouterr().err
    check_shown(shown, **fields)
    assert not is_internal(shown)


def test_the_folder_is_listed_where_a_file_could_not_be_made(
    verb: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my folder"
    folder.mkdir()
    missing = folder / "none" / "b.json"
    verb(_raising(OSError(errno.EROFS, "Read-only file system", str(missing))))
    assert main(["try"]) == 2
    check_shown(capsys.readouterr().err, where=str(missing), fix=[f"ls -ld '{folder}'"])


def test_what_transformers_says_of_a_released_config_is_not_shown(
    verb: Callable[[Callable[[], int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils.logging import get_logger

    def warns() -> int:
        logger.warning("high_freq_factor must be greater than low_freq_factor")
        logger.warning(other)
        return 0

    other = "factor must be at least 1"
    logger = get_logger("transformers.modeling_rope_utils")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logger, "handlers", [handler])
    verb(warns)
    assert main(["try"]) == 0
    assert [record.getMessage() for record in records] == [other]


def test_internal_error(
    verb: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault of ours is one block; the traceback lies in a file, and is shown only when asked for."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    verb(_raising(ZeroDivisionError("one\ntwo")))
    assert main(["try"]) == 1
    shown = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert is_internal(shown)
    assert "Traceback" not in shown
    check_shown(shown, names=["ZeroDivisionError", "one"], fix=[file, "TUNESMITH_DEBUG=1"])
    assert "Traceback" in file.read_text()
    assert tunesmith.__version__ in file.read_text()
    monkeypatch.setenv("TUNESMITH_DEBUG", "1")
    main(["try"])
    assert "Traceback" in capsys.readouterr().err


def test_internal_error_without_a_place_to_write(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    verb(_raising(ZeroDivisionError("one")))
    assert main(["try"]) == 1
    assert "Traceback" in capsys.readouterr().err  # nowhere else to put it


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("doctor --fix", "each fault"),
        ("doctor smollm2-135m-lora", "fetch RECIPE --dry-run"),
        ("launch slurm r.yaml --site alps", "--setup"),
        ("launch slurm r.yaml --site=alps", "--setup"),
        ("fetch org/model --hosts spark-b", "ssh HOST"),
        ("export run --to vllm --quant nvfp4 --output out", "--quantization fp8"),
        ("export run --to vllm --quant fp8 --output out", "--quantization fp8"),
        ("train smollm2-135m-lora parallel.experts=2", "parallel.shard"),
        ("bench r.yaml --ablation", "once with the key and once without"),
        (
            "bench r.yaml --ablation --only data.packing=false --rounds 3",
            "once with the key and once without",
        ),
        ("bench r.yaml --only=data.packing=false", "--only key=value"),
        ("bench r.yaml --rounds 3", "--only key=value"),
        ("bench r.yaml --plain", "plain text"),
        ("bench r.yaml --cold", "TORCHINDUCTOR_CACHE_DIR"),
    ],
)
def test_what_went_names_what_to_use(
    words: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    check_shown(capsys.readouterr().err, fix=[fix])


def test_options_between_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipes", "show", "mistral-7b-lora", "train.seed=1", "--json", "train.eps=1e-7"]
    assert main(words) == 0
    assert '"seed": 1' in capsys.readouterr().out


def test_a_shipped_recipe_is_shown_with_its_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "qwen3-8b-lora"]) == 0
    text = capsys.readouterr().out
    assert text == shipped()["qwen3-8b-lora"].read_text(encoding="utf-8")
    # With an override it is what would be trained.
    assert main(["recipes", "show", "qwen3-8b-lora", "train.seed=1"]) == 0
    assert capsys.readouterr().out == dump(load_recipe("qwen3-8b-lora", ["train.seed=1"]))


@pytest.mark.slow
def test_closed_pipe_is_quiet() -> None:
    """`tunesmith recipes show ... | head -1`: no complaint, and the status of a process that
    SIGPIPE ended.
    """
    script = (
        f"{sys.executable} -c 'import sys, time; from tunesmith.cli.main import main; time.sleep(0.5);"
        ' sys.exit(main(["recipes", "show", "mistral-7b-lora"]))\' | true; echo ${PIPESTATUS[0]}'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIME,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (str(frame.EXIT_BROKEN_PIPE), "")


def test_a_crash_says_where_it_was() -> None:
    crash = (
        "import os, signal, sys; from tunesmith.cli import main;"
        " main.dispatch = lambda words: os.kill(os.getpid(), signal.SIGSEGV); main.run_process()"
    )
    done = _python("-c", crash)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert "main.py" in done.stderr


def test_another_broken_pipe_is_told(
    verb: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    verb(_raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert main(["try"]) == 1
    shown = capfd.readouterr().err
    assert is_internal(shown)
    check_shown(shown, names=["BrokenPipeError"])


@pytest.mark.slow
def test_ctrl_c_ends_the_look_at_rows_at_once(tiny: Path, tmp_path: Path) -> None:
    """A template may take minutes of a row: a signal is not kept until it has ended."""
    loops = "".join(f"{{%- for {name} in range(9000) -%}}" for name in "abc")
    loops = f"{{%- if messages[0].content == 'c' -%}}{loops}{'{%- endfor -%}' * 3}{{%- endif -%}}"
    (tmp_path / "slow.jinja").write_text(f"{loops}{{{{ messages }}}}")
    (tmp_path / "rows.csv").write_text("question,answer\na,b\nc,d\n")
    words = ["--model", str(tiny), "--data", "rows.csv", "data.template=slow.jinja"]
    process = Warm(["train", *words], cwd=tmp_path)
    try:
        # Of the processor: what comes before takes some 0.3 s of it, and then the template all.
        while process.poll() is None and psutil.Process(process.pid).cpu_times().user < 3:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 75, error
