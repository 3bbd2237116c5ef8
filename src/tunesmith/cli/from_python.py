"""Python functions `plan`, `inspect_data` and `sweep`, which return the same values as the commands
print with --json.
"""

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.layers import Overrides, override_words
from tunesmith.config.row_settings import rows_set_by
from tunesmith.host.logger import lines_by_default


def plan(
    recipe: str | Path | None = None,
    overrides: Overrides = (),
    *,
    model: str | None = None,
    data: str | Path | None = None,
    on: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Forecast the memory, hours and layout of a run without training.

    >>> tunesmith.plan("my-recipe.yaml", on="2x8xh100")["meshes"][0]["hours"]

    Args:
        recipe, overrides: as for `train`.
        model, data: create a new recipe, as `tunesmith train --model X --data FILE` does.
        on: machines such as `2x8xh100` or `dgx-spark`. None means this machine.
        trust_remote_code: run code of another person's recipe or model, which you have reviewed.

    Returns:
        The values that `tunesmith plan --json` prints. The best mesh is the first.

    Raises:
        UsageError: if the recipe, data or model is wrong.
        MachineError: if the run does not fit on the machine.
    """
    options = {"model": model, "data": data, "on": on}
    return _json_of("plan", recipe, overrides, trust_remote_code, **options)


def inspect_data(
    recipe: str | Path | None = None,
    overrides: Overrides = (),
    *,
    model: str | None = None,
    data: str | Path | None = None,
    rows: int = 3,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return the tokens of a recipe's rows, marked as supervised or not, with counts and checks.

    >>> tunesmith.inspect_data(model="demo", data="faq.csv")["warnings"]

    Args:
        recipe, overrides, model, data: as for `plan`. `recipe` can also be a run directory.
        rows: number of rows whose tokens are returned.
        trust_remote_code: as for `plan`.

    Returns:
        The values that `tunesmith data --json` prints.

    Raises:
        UsageError: if the recipe, data or model is wrong.
    """
    options = {"model": model, "data": data, "rows": rows}
    return _json_of("data", recipe, overrides, trust_remote_code, **options)


def sweep(
    recipe: str | Path | None = None,
    space: Mapping[str, Sequence[object]] = {},
    overrides: Overrides = (),
    *,
    trust_remote_code: bool = False,
    model: str | None = None,
    data: str | Path | None = None,
) -> dict[str, Any]:
    """Train one adapter for each combination of values on one base, and find the best.

    >>> tunesmith.sweep("my-recipe.yaml", {"train.learning_rate": [1e-4, 3e-4]})["candidates"]

    Args:
        recipe, overrides, model, data: as for `plan`. The same call resumes an interrupted sweep.
        space: the values to try for each key of the recipe.
        trust_remote_code: as for `plan`.

    Returns:
        The values that `tunesmith sweep --json` prints.

    Raises:
        TunesmithError: the same errors as `train`.
    """
    words = override_words(overrides)
    for key, values in space.items():
        # Text is passed unchanged. Other values become JSON, which is valid YAML.
        texts = [
            value if isinstance(value, str) else json.dumps(value, default=str) for value in values
        ]
        words.append(f"{key}={','.join(texts)}")
    return _json_of("sweep", recipe, words, trust_remote_code, model=model, data=data)


def _json_of(
    verb: str,
    recipe: str | Path | None,
    overrides: Overrides,
    trust_remote_code: bool,
    **options: object,
) -> dict[str, Any]:
    """Run a command with --json in this process and return the values that it prints."""
    from tunesmith.cli.main import dispatch

    words = [verb] if recipe is None else [verb, os.fspath(recipe)]
    words += override_words(overrides)
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    words += ["--trust-remote-code"] * trust_remote_code
    printed = io.StringIO()
    with lines_by_default(), contextlib.redirect_stdout(printed), rows_set_by(python=True):
        dispatch([*words, "--json"])
    values: dict[str, Any] = json.loads(printed.getvalue())
    return values
