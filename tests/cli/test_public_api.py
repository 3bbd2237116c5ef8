"""What `import tunesmith` gives, as httpx holds it: the members that are there are those of
`__all__`, typed, and no torch.
"""

from __future__ import annotations

import inspect
import os
import pickle
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from errors import refuses
from ranks import run_ranks
from recipes import recipe
from tunesmith.config.dump import to_yaml
from tunesmith.errors import UsageError

pytestmark = pytest.mark.slow

FIRST = ["train", "load_run", "generate", "evaluate", "merge"]
FUNCTIONS = sorted([*FIRST, "compare", "export_gguf", "inspect_data", "plan", "sweep"])
ROOT = Path(__file__).parents[2]


def members_after_all() -> list[tuple[str, str, str]]:
    """Of each member its name in the package, its kind and its own name, after all modules were
    imported: importing `package.name` sets the attribute `name`.
    """
    found = pkgutil.walk_packages(tunesmith.__path__, "tunesmith.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    for name in names:
        import_module(name)
    assert len(names) > 80, len(names)
    members = {name: getattr(tunesmith, name) for name in tunesmith.__all__}
    return [
        (name, type(m).__name__, m.__name__ if callable(m) else name) for name, m in members.items()
    ]


# Each ignored line is an error, or mypy would say that the comment is unused: the names have types,
# not Any.
USER_SCRIPT = """
from pathlib import Path

import tunesmith

losses: list[float] = []


def note(record: tunesmith.StepRecord) -> None:
    losses.append(record.loss)


result: tunesmith.Result = tunesmith.train("recipe.yaml", {"train.learning_rate": 2e-4}, on_record=note, quiet=True)
tunesmith.train("recipe.yaml", ["train.learning_rate=2e-4"])
loaded: tunesmith.LoadedModel = tunesmith.load_run(result.output_dir)
rows = tunesmith.generate(loaded, [{"prompt": "Hello"}], tunesmith.Decoding(max_new_tokens=8))
outputs: list[str] = [row["output"] for row in rows]
evaluation: tunesmith.Evaluation = tunesmith.evaluate(result.output_dir, Path("held-out.jsonl"), scorers="exact")
loss: float = evaluation.scores["tuned"].loss
merged: tunesmith.Merged = tunesmith.merge(result.output_dir, "merged", dtype="bf16")
better: list[str] = [tunesmith.compare("runs/a", "runs/b").runs[i] for i in tunesmith.compare("a").verdict.best]
exported: tunesmith.ExportedFile = tunesmith.export_gguf(result.output_dir, "model.gguf", quant="q8_0")
try:
    tunesmith.load_run("nowhere")
except tunesmith.StoppedError:
    raise
except tunesmith.TunesmithError as error:
    print(error.what, error.where, error.why, error.fix)
tunesmith.train(3)  # type: ignore[arg-type]
tunesmith.train("recipe.yaml", on_record=len)  # type: ignore[arg-type]
tunesmith.merge("runs/x", "merged", dtype="int3")  # type: ignore[arg-type]
loss = result.records  # type: ignore[assignment]
"""


def printed(code: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    words = [sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def test_members_stay_what_they_are_after_every_module_was_imported() -> None:
    """In a process of its own, since the modules stay; pickle finds a function again."""
    (found,) = run_ranks(1, members_after_all)
    kinds = {name: kind for name, kind, _ in found}
    assert list(kinds) == [own for _, _, own in found] == tunesmith.__all__
    assert [name for name, kind in kinds.items() if kind == "function"] == FUNCTIONS
    assert "module" not in kinds.values()
    assert pickle.loads(pickle.dumps(tunesmith.load_run)) is tunesmith.load_run


def test_exported_members_are_those_of_all_and_their_import_is_light() -> None:
    code = "import sys, tunesmith; print(*(n for n in vars(tunesmith) if not n.startswith('_')))"
    heavy = "{'torch', 'transformers', 'numpy', 'rich'}"
    members, loaded = printed(f"{code}; print(*{heavy}.intersection(sys.modules))")
    helpers = {"TYPE_CHECKING", "Any", "errors", "import_module"}
    assert {*members.split()} - {*tunesmith.__all__} == helpers
    assert loaded == ""
    assert dir(tunesmith) == sorted(tunesmith.__all__) == tunesmith.__all__
    with refuses(AttributeError, names=["'opening'"]):
        tunesmith.opening  # noqa: B018


def test_each_function_tells_its_types_and_has_an_example() -> None:
    """No defaults are objects of ours, but for callbacks: a signature is read in a notebook."""
    for name in FUNCTIONS:
        function = getattr(tunesmith, name)
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, name
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, name
            assert callable(parameter.default) or "<" not in str(parameter.default), name
        assert re.search(rf">>>.*tunesmith\.{name}\(", function.__doc__), name


def test_help_begins_with_the_five_functions_and_an_example_of_each() -> None:
    text = inspect.getdoc(tunesmith)
    entries = re.findall(r"^(\w+) +\S.*\n((?: +>>> .*\n)+)", text, re.MULTILINE)
    names = [name for name, _ in entries]
    assert names[: len(FIRST)] == FIRST
    assert sorted(names) == FUNCTIONS, "those that are exported, no others"
    for name, examples in entries:
        assert f"tunesmith.{name}(" in examples, name
    assert max(map(len, text.splitlines())) <= 100


def test_what_the_docs_name_is_exported_and_what_is_exported_they_name() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b[A-Z]\w*Error\b", page))
    named |= set(re.findall(r"tunesmith\.(\w+)\(", page))
    raised = set()
    for name in FUNCTIONS:
        docstring = inspect.getdoc(getattr(tunesmith, name)) or ""
        raised |= set(re.findall(r"\b[A-Z]\w*Error\b", docstring))
    assert len(raised) > 5, raised
    assert named | raised <= set(tunesmith.__all__)
    for name in tunesmith.__all__:
        if name != "__version__":
            assert re.search(rf"\b{name}\b", page), f"docs/python.md does not name {name}"


def test_plan_data_and_sweep_return_what_json_prints(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = recipe(tiny, tmp_path)
    Path("my.yaml").write_text(to_yaml(values))
    plan = tunesmith.plan("my.yaml", {"train.micro_batch": "1 examples"}, on="h100")
    assert plan["meshes"][0]["plan"]["memory"]
    # A text is not read as YAML.
    system = "Answer: # briefly"
    data = tunesmith.inspect_data("my.yaml", {"data.system": system}, rows=1)
    assert len(data["rows"]) == 1
    assert system in str(data["rows"][0]["segments"])
    rates = [1e-3, 2e-3]
    found = tunesmith.sweep(
        "my.yaml", {"train.learning_rate": rates}, {"train.duration": "4 steps"}
    )
    assert [one["values"] for one in found["candidates"]] == [
        {"train.learning_rate": str(rate)} for rate in rates
    ]
    assert capsys.readouterr().out == ""


def test_what_names_no_run_dtype_or_scorer_is_refused(tiny: Path, tmp_path: Path) -> None:
    run: Any = "runs/my-run"
    with refuses(UsageError, names=["str"], fix=["tunesmith.load_run"]):
        tunesmith.generate(run, [{"prompt": "Hello"}])
    with refuses(UsageError, where="--dtype", names=["float32"], fix=["fp32"]):
        tunesmith.load_run(tiny, dtype="float32")  # type: ignore[arg-type]
    with refuses(UsageError, where="--score", names=["lambda"]):
        tunesmith.evaluate(tiny, scorers=[lambda answer, row: 1.0])  # type: ignore[list-item]
    with refuses(UsageError, where="--score", names=["exakt"], fix=["--score exact"]):
        tunesmith.evaluate(tiny, scorers="exakt")
    (tmp_path / "my-run").mkdir()
    for function in (tunesmith.load_run, tunesmith.compare):
        missing = str(tmp_path / "my-rum")
        with refuses(UsageError, where=missing, fix=[tmp_path / "my-run"]):
            function(missing)


@pytest.mark.nightly
def test_a_user_script_passes_mypy_strict(tmp_path: Path) -> None:
    package = Path(tunesmith.__file__).parent
    assert (package / "py.typed").is_file(), "without it type checkers take the package as untyped"
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    # The libraries below are as `Any` to the script, whose types are ours; reading theirs would
    # take a minute.
    skipped = "torch transformers datasets peft numpy pyarrow rich tokenizers safetensors pydantic ruamel".split()
    rules = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
        for name in skipped
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\nfollow_imports = silent\n{rules}")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "script.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
