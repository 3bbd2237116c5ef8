"""What `import tunesmith` gives: the members are those of `__all__`, and no torch is loaded."""

from __future__ import annotations

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

FUNCTIONS = ["compare", "evaluate", "export_gguf", "generate", "inspect_data", "load_run", "merge", "plan", "sweep", "train"]  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def members_after_all() -> list[tuple[str, str, str]]:
    """Of each member its name in the package, its kind and its own name, after all imports:
    importing `package.name` sets the attribute `name`.
    """
    for module in pkgutil.walk_packages(tunesmith.__path__, "tunesmith."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    members = {name: getattr(tunesmith, name) for name in tunesmith.__all__}
    return [
        (name, type(m).__name__, m.__name__ if callable(m) else name) for name, m in members.items()
    ]


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
    code += f"; print(*{heavy}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    members, loaded = done.stdout.splitlines()
    helpers = {"TYPE_CHECKING", "Any", "errors", "import_module"}
    assert {*members.split()} - {*tunesmith.__all__} == helpers
    assert loaded == ""
    assert dir(tunesmith) == sorted(tunesmith.__all__) == tunesmith.__all__
    with refuses(AttributeError, names=["'opening'"]):
        tunesmith.opening  # noqa: B018


def test_what_the_docs_name_is_exported_and_what_is_exported_they_name() -> None:
    page = PAGE.read_text(encoding="utf-8")
    docstrings = [getattr(tunesmith, name).__doc__ for name in FUNCTIONS]
    named = {*re.findall(r"\b[A-Z]\w*Error\b", "\n".join([page, *docstrings]))}
    named |= {*re.findall(r"tunesmith\.(\w+)\(", page)}
    assert named <= {*tunesmith.__all__}
    words = {"__version__", *re.findall(r"\w+", page)}
    assert {*tunesmith.__all__} - words == set()


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
    rates = {"train.learning_rate": [1e-3, 2e-3]}
    found = tunesmith.sweep("my.yaml", rates, {"train.duration": "4 steps"})
    tried = [one["values"]["train.learning_rate"] for one in found["candidates"]]
    assert tried == ["0.001", "0.002"]
    assert capsys.readouterr().out == ""


def test_what_names_no_run_dtype_or_scorer_is_refused(tiny: Path, tmp_path: Path) -> None:
    run: Any = "runs/my-run"
    with refuses(UsageError, names=["str"], fix=["tunesmith.load_run"]):
        tunesmith.generate(run, [{"prompt": "Hello"}])
    with refuses(UsageError, where="dtype", names=["float32"], fix=["fp32"]):
        tunesmith.load_run(tiny, dtype="float32")  # type: ignore[arg-type]
    with refuses(UsageError, where="scorer", names=["lambda"]):
        tunesmith.evaluate(tiny, scorers=[lambda answer, row: 1.0])  # type: ignore[list-item]
    with refuses(UsageError, where="scorers", names=["exakt"], fix=["scorers='exact'"]):
        tunesmith.evaluate(tiny, scorers="exakt")
