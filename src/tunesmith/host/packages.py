"""Checks of installed packages and their versions, and the pip commands that install them."""

import hashlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MachineError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Packages whose versions can change the numeric results of a run.
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


def pip_install(package: str) -> str:
    """Return the command that installs a package, such as `pip install 'peft>=0.20'`.

    The command includes the version that tunesmith's package metadata requires. It has no version
    if the metadata does not list the package.
    """
    for requirement in _requirements():
        if requirement.name == package and requirement.specifier:
            return f"pip install '{package}{requirement.specifier}'"
    return f"pip install {package}"


def _requirements() -> "list[Requirement]":
    """Return the requirements of tunesmith and its extras from the package metadata.

    Return an empty list in a source tree that is not installed.
    """
    import importlib.metadata  # imported late, because the import is slow

    from packaging.requirements import Requirement

    with suppress(importlib.metadata.PackageNotFoundError):
        return [Requirement(text) for text in importlib.metadata.requires("tunesmith") or []]
    return []


@cache
def installed_versions() -> dict[str, str]:
    """Return the installed version of each package in COMPUTE. Missing packages are omitted."""
    import importlib.metadata

    versions = {}
    for name in COMPUTE:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@cache
def source_digest() -> str:
    """Return the SHA-256 of tunesmith's Python files. The value is computed once per process."""
    source = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(file.read_bytes())
    return source.hexdigest()


def check_versions() -> None:
    """Raise MachineError if an installed package has a version that tunesmith does not support."""
    installed = installed_versions()
    for requirement in _requirements():
        version = installed.get(requirement.name)
        # Skip requirements with a marker, because they are for extras or for other platforms.
        if version is None or requirement.marker:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            raise MachineError(
                f"{requirement.name} {version} is installed, but {requirement} is required",
                where="the Python environment",
                fix=f"pip install '{requirement}'",
                cause="version",
            )


def require(package: str, *, where: str, fix: str, module: str = "") -> None:
    """Raise MachineError if a package is not installed. The package is not imported.

    Args:
        fix: another way to fix the error than to install the package, for the error message.
        module: the name of the package's module, if it differs from the package's name.
    """
    from importlib.util import find_spec

    if find_spec(module or package) is None:
        fix = f"run `{pip_install(package)}`, or {fix}"
        raise MachineError(f"{package} is not installed", where=where, fix=fix)


def bnb_functional(what: str, where: str) -> Any:
    """Return the module `bitsandbytes.functional`.

    Raise MachineError, with the install command, if bitsandbytes is not installed.

    Args:
        what: the things that need bitsandbytes, in the plural, such as "nf4 weights".
        where: the recipe key that requires it.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MachineError(
            f"{what} need bitsandbytes", where=where, fix=pip_install("bitsandbytes")
        ) from error
    return bitsandbytes.functional
