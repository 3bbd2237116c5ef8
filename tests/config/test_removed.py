"""Keys and values that recipes had once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.config.load import load_recipe
from tunesmith.config.removed import REMOVED
from tunesmith.errors import RemovedError

RECIPE = (
    "model: {{name: a/b{model}}}\ndata: {{train: c/d}}\ntrain:\n  seed: 1\n{train}output_dir: x\n"
)


def write(folder: Path, *, model: str = "", train: str = "") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(model=model, train=train).replace("c/d", "{source: c/d}"))
    return file


def test_a_removed_key_at_its_default_is_ignored(tmp_path: Path) -> None:
    plain = load_recipe(write(tmp_path))
    assert load_recipe(write(tmp_path, train="  fast_paths: []\n")) == plain
    assert load_recipe(write(tmp_path), ["train.fast_paths=[]"]) == plain
    used = write(tmp_path, train="  fast_paths: [joined-weights]\n")
    assert load_recipe(used, ["train.fast_paths=[]"]) == plain, "the way on that the error names"


@pytest.mark.parametrize(
    ("model", "train", "place", "words"),
    [
        ("", "  fast_paths: [joined-weights]\n", 5, "train.fast_paths=[]"),
        ("", "  fast_paths: [fp32-weight-gradients]\n", 5, "without a key now"),
        (", quantize: int8", "", 1, "model.quantize=fp8"),
    ],
)
def test_another_value_is_refused_with_what_to_use(
    model, train, place, words, tmp_path: Path
) -> None:
    file = write(tmp_path, model=model, train=train)
    with pytest.raises(RemovedError) as refused:
        load_recipe(file)
    assert refused.value.where == f"{file}:{place}"
    assert words in refused.value.text()


def test_who_reads_an_older_run_may_ignore_it(tmp_path: Path) -> None:
    plain = load_recipe(write(tmp_path))
    file = write(tmp_path, model=", quantize: int8", train="  fast_paths: [joined-weights]\n")
    assert load_recipe(file, ignored=REMOVED) == plain


@pytest.mark.parametrize(
    "lines", ["  fast_paths:\n    a: 1\n", "  fast_paths: joined-weights\n", "  fast_paths:\n"]
)
def test_a_value_that_it_never_took_is_refused_too(lines: str, tmp_path: Path) -> None:
    with pytest.raises(RemovedError):
        load_recipe(write(tmp_path, train=lines))
