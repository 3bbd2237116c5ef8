"""Functions for programs: `plan`, `inspect_data` and `sweep` return what the commands print with
--json.
"""

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.layers import override_words
from tunesmith.host.logger import lines_by_default


def plan(
    recipe: str | Path | None = None,
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    model: str | None = None,
    data: str | Path | None = None,
    on: str | None = None,
) -> dict[str, Any]:
    """Forecast memory, hours and the layout of a run without training.

    >>> tunesmith.plan("my-recipe.yaml", on="2x8xh100")["meshes"][0]["hours"]

    Args:
        recipe, overrides: as for `train`.
        model, data: for a new recipe, as `tunesmith train --model X --data FILE` makes it.
        on: machines such as `2x8xh100` or `dgx-spark`; None is this machine.

    Returns:
        what `tunesmith plan --json` prints; the best mesh is the first.

    Raises:
        UsageError: something is wrong with the recipe, data or model.
        MachineError: the run does not fit.
    """
    return _json_of("plan", recipe, overrides, model=model, data=data, on=on)


def inspect_data(
    recipe: str | Path | None = None,
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    model: str | None = None,
    data: str | Path | None = None,
    rows: int = 3,
) -> dict[str, Any]:
    """Return the rows of a recipe as the tokens that are trained, with counts and findings.

    >>> tunesmith.inspect_data(model="demo", data="faq.csv")["warnings"]

    Args:
        recipe, overrides, model, data: as for `plan`; `recipe` may be a run directory.
        rows: how many rows are returned in full.

    Returns:
        what `tunesmith data --json` prints.

    Raises:
        UsageError: something is wrong with the recipe, data or model.
    """
    return _json_of("data", recipe, overrides, model=model, data=data, rows=rows)


def sweep(
    recipe: str | Path,
    space: Mapping[str, Sequence[object]],
    overrides: Mapping[str, object] | Sequence[str] = (),
) -> dict[str, Any]:
    """Train one adapter for each combination of values on one base, and find the best.

    >>> tunesmith.sweep("my-recipe.yaml", {"train.learning_rate": [1e-4, 3e-4]})["candidates"]

    Args:
        recipe, overrides: as for `train`; the same call resumes.
        space: key of the recipe -> its values.

    Returns:
        what `tunesmith sweep --json` prints.

    Raises:
        As `train`.
    """
    words = [f"{key}={','.join(map(_value_word, values))}" for key, values in space.items()]
    return _json_of("sweep", recipe, [*override_words(overrides), *words])


def _json_of(
    verb: str,
    recipe: str | Path | None,
    overrides: Mapping[str, object] | Sequence[str],
    **options: object,
) -> dict[str, Any]:
    """Run a command in this process and return what it prints with --json."""
    from tunesmith.cli.main import dispatch

    words = [verb] if recipe is None else [verb, os.fspath(recipe)]
    words += override_words(overrides)
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    printed = io.StringIO()
    with lines_by_default(), contextlib.redirect_stdout(printed):
        dispatch([*words, "--json"])
    values: dict[str, Any] = json.loads(printed.getvalue())
    return values


def _value_word(value: object) -> str:
    """Return a value as a recipe writes it: JSON is YAML, but a text needs no quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
