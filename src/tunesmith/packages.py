"""Optional packages: where each is imported."""

from __future__ import annotations

from typing import Any

from tunesmith.errors import MachineError


def bitsandbytes(what: str, where: str) -> Any:
    """`bitsandbytes.functional`, or a MachineError that says how to install it.

    `what` needs it, in the plural ("nf4 weights"); `where` is the recipe key that asks for it.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MachineError(
            f"{what} need the package bitsandbytes", where=where, fix="pip install 'tunesmith[nf4]'"
        ) from error
    return bitsandbytes.functional
