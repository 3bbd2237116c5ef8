"""Names of functions that a program passes, such as a reward."""

import inspect
from collections.abc import Callable
from typing import Any

from tunesmith.errors import UsageError


def file_and_name(function: Callable[..., Any]) -> str:
    """Return the text `file.py:function` for a function at the top level of a file.

    Scorers run in other processes, which load the function from its file. Raise UsageError for a
    lambda, a method, or a function that was defined in another function or in a notebook.
    """
    name = getattr(function, "__qualname__", repr(function))
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    if not name.isidentifier() or not file.endswith(".py"):
        raise UsageError(
            f"{name} cannot be used as a scorer",
            where="scorer",
            why="scorers run in other processes, which load a function by its file and name; a "
            "lambda, a method and a function of a notebook or inside another function have none",
            fix="define the function with `def` at the top level of a .py file, and pass it or "
            'its name: "my_scorer.py:score"',
        )
    return f"{inspect.getsourcefile(function)}:{name}"
