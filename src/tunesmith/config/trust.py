"""Consent to run Python code of another person: model classes and scorers.

The user consents by --trust-remote-code, by naming the code in the command, or by naming it in a
recipe of their own.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path

from tunesmith.config.layers import COMMAND_LINE, FROM_PYTHON
from tunesmith.config.names import without_indices
from tunesmith.config.paths import inputs_of
from tunesmith.config.schema import Run
from tunesmith.config.shipped import shipped
from tunesmith.errors import RecipeError
from tunesmith.host.files import cache_folder

# Whether the command has --trust-remote-code.
TRUSTS_CODE = ContextVar("TRUSTS_CODE", default=False)
# Name of the resolved recipe in a run directory, and names of other files there. A recipe with this
# name next to one of these files belongs to a run.
RUN_RECIPE = "config.yaml"
_OF_A_RUN = ("env.json", "metrics.jsonl", "final", "checkpoint-*", "rollouts", "adapter_*")


def check_trust(run: Run, places: Mapping[str, str], recipe: Path) -> None:
    """Raise RecipeError if another person's file names code that the run would execute.

    Args:
        places: file and line of each key of the recipe.
        recipe: the file that the user has named.
    """
    code = {"model.trust_remote_code": run.model.name} if run.model.trust_remote_code else {}
    for key, file in inputs_of(run).items():
        if key.startswith("method.reward "):
            code["method.reward"] = file
    for key, where in places.items():
        named = code.get(without_indices(key))
        is_given = where.startswith((COMMAND_LINE, FROM_PYTHON))
        if named and not is_given and not _is_users_own(where, recipe):
            raise untrusted_code(key, named, where)


def untrusted_code(key: str, named: str, where: str) -> RecipeError:
    """Build the error for a recipe from another person whose `key` runs the code that it names."""
    return RecipeError(
        f"{key} is not accepted from this file, which another person may have written",
        where=where,
        why=f"this key runs Python code of {named}, and only your own recipe or command can allow "
        "that",
        fix="review the code, then add --trust-remote-code",
    )


def _is_users_own(where: str, recipe: Path) -> bool:
    """Return whether `where`, a position such as "recipe.yaml:3", is in a file that the user wrote.

    The user has named the file `recipe`. Another person may have written a file in a subfolder, the
    config.yaml of a run, and the recipes that this config.yaml extends. It is the user's if this
    user's run has written it on this machine.
    """
    file, named = Path(where.rpartition(":")[0]).resolve(), recipe.resolve()
    is_in_subfolder = file.parent != named.parent and file.is_relative_to(named.parent)
    is_own = not (is_in_subfolder or _is_of_run(named) or _is_of_run(file))
    shipped_files = [path.resolve() for path in shipped().values()]
    return is_own or file in shipped_files or _mark(file).is_file()


def _is_of_run(recipe: Path) -> bool:
    return recipe.name == RUN_RECIPE and any(any(recipe.parent.glob(name)) for name in _OF_A_RUN)


def mark_own_run(file: Path) -> None:
    """Note in the cache folder that this user's run has written the recipe `file`."""
    # Without a cache folder, a later command needs --trust-remote-code.
    with suppress(OSError, RuntimeError):
        mark = _mark(file.resolve())
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _mark(file: Path) -> Path:
    """Return the mark of a recipe. Its name has the content: a replaced file is not the user's."""
    content = str(file).encode() + b"\0" + file.read_bytes()
    return cache_folder("own-runs", hashlib.sha256(content).hexdigest())
