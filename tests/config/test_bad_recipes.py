"""Wrong recipes: each is refused with what, where and the fix, as a usage error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from errors import holds
from tunesmith.config.load import load_recipe
from tunesmith.config.tree import MAX_NODES
from tunesmith.errors import UsageError

from .bad_recipes import BAD_RECIPES, BASE, Bad


@pytest.mark.parametrize("bad", BAD_RECIPES, ids=[bad.name for bad in BAD_RECIPES])
def test_refused(bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(bad.recipe, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_recipe("r.yaml", bad.overrides)
    error = caught.value
    assert bad.what in error.what
    assert error.where == bad.where
    assert bad.fix in error.fix
    assert error.exit_code == 2


def test_table_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of all rows is a good recipe, so each row is refused for its own fault."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(BASE)
    assert load_recipe("r.yaml").model.name == "org/model"
    assert len({bad.name for bad in BAD_RECIPES}) == len(BAD_RECIPES) >= 60


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin, huge, run, pipe = (tmp_path / name for name in ("l.yaml", "h.yaml", "run", "p.yaml"))
    latin.write_bytes(b"model:\n  name: caf\xe9\n")
    huge.write_bytes(b"#" * (256 << 10) + b"\n")
    run.mkdir()
    os.mkfifo(pipe)
    for path, place, fix in (
        (latin, f"{latin}:2", "iconv"),
        (huge, huge, "page of YAML"),
        (run, run, "name a recipe file"),
        (pipe, pipe, "tunesmith recipes"),
    ):
        with pytest.raises(UsageError) as caught:
            load_recipe(path)
        assert (caught.value.where, fix in caught.value.fix) == (str(place), True)


def test_aliases_cannot_grow_without_bound(tmp_path: Path) -> None:
    """The billion laughs: nine lines that stand for 10^9 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert holds(caught.value.what, MAX_NODES)
    assert caught.value.where == f"{path}:4"
