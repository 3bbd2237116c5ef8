"""Optional packages: where each is imported, and how each is installed."""

from contextlib import suppress
from functools import cache
from typing import Any

from tunesmith.errors import MachineError


def pip_install(package: str) -> str:
    """The command that installs `package` in a version that works: `pip install 'bitsandbytes>=0.50'`.

    The version is read from the metadata of tunesmith's own extras; a package that they do not name has none.
    """
    import importlib.metadata  # slow to import, and needed only here

    from packaging.requirements import Requirement

    stated: list[str] = []
    # Run from a source tree that is not installed
    with suppress(importlib.metadata.PackageNotFoundError):
        stated = importlib.metadata.requires("tunesmith") or []
    versions = [
        str(needed.specifier) for needed in map(Requirement, stated) if needed.name == package
    ]
    return (
        f"pip install '{package}{versions[0]}'"
        if versions and versions[0]
        else f"pip install {package}"
    )


COMPUTE = (
    "tunesmith",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
)


@cache
def installed_versions() -> dict[str, str]:
    """The versions of what computes, by name; one that is not installed is left out."""
    import importlib.metadata

    found = {}
    for name in COMPUTE:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def refuse_unfit_versions() -> None:
    """Raise MachineError where an installed package is not of a version that tunesmith's own metadata allows."""
    import importlib.metadata

    from packaging.requirements import Requirement

    installed = installed_versions()
    with suppress(importlib.metadata.PackageNotFoundError):
        for needed in map(Requirement, importlib.metadata.requires("tunesmith") or []):
            version = installed.get(needed.name)
            if (
                version
                and not needed.marker
                and not needed.specifier.contains(version, prereleases=True)
            ):
                what, fix = (
                    f"{needed.name} {version} is installed, and {needed} is needed",
                    f"pip install '{needed}'",
                )
                raise MachineError(what, where="the Python environment", fix=fix, cause="version")


def require(package: str, *, where: str, fix: str) -> None:
    """Raise MachineError unless `package` is installed, without importing it; `fix` is another way out."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MachineError(
            f"{package} is not installed", where=where, fix=f"{pip_install(package)}, or {fix}"
        )


def bitsandbytes(what: str, where: str) -> Any:
    """`bitsandbytes.functional`, or a MachineError that says how to install it.

    `what` needs it, in the plural ("nf4 weights"); `where` is the recipe key that asks for it.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MachineError(
            f"{what} need bitsandbytes", where=where, fix=pip_install("bitsandbytes")
        ) from error
    return bitsandbytes.functional
