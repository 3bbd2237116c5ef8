"""Packages that only some recipes need, each with its one door."""

from __future__ import annotations

from typing import Any

from tunesmith.errors import MachineError


def bitsandbytes(what: str, where: str) -> Any:
    """`bitsandbytes.functional`.

    Args:
        what: what needs it, in the plural: "nf4 weights".
        where: the key of the recipe that asks for it.

    Raises:
        MachineError: it is not installed; says how.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MachineError(
            f"{what} need the package bitsandbytes", where=where, fix="pip install 'tunesmith[nf4]'"
        ) from error
    return bitsandbytes.functional
