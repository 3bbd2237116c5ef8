"""Optional packages: where each is imported, and how each is installed."""

import hashlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MachineError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# What decides the numbers of a run.
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
    """The command that installs `package` in a version that works: `pip install 'peft>=0.20'`.

    A package that tunesmith's own metadata does not name has no version.
    """
    for requirement in _requirements():
        if requirement.name == package and requirement.specifier:
            return f"pip install '{package}{requirement.specifier}'"
    return f"pip install {package}"


def _requirements() -> "list[Requirement]":
    """Read what tunesmith's own metadata requires, with its extras.

    None in a source tree that is not installed.
    """
    import importlib.metadata  # slow to import, and needed only here

    from packaging.requirements import Requirement

    with suppress(importlib.metadata.PackageNotFoundError):
        return [Requirement(text) for text in importlib.metadata.requires("tunesmith") or []]
    return []


@cache
def installed_versions() -> dict[str, str]:
    """The versions of what computes, by name; one that is not installed is left out."""
    import importlib.metadata

    versions = {}
    for name in COMPUTE:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@cache
def source_digest() -> str:
    """SHA-256 of this package's own files as this process first read them."""
    source = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(file.read_bytes())
    return source.hexdigest()


def check_versions() -> None:
    """MachineError where a package is not of a version that tunesmith's own metadata allows."""
    installed = installed_versions()
    for requirement in _requirements():
        version = installed.get(requirement.name)
        # Those of extras and of other platforms have a marker.
        if version is None or requirement.marker:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            raise MachineError(
                f"{requirement.name} {version} is installed, and {requirement} is needed",
                where="the Python environment",
                fix=f"pip install '{requirement}'",
                cause="version",
            )


def require(package: str, *, where: str, fix: str, module: str = "") -> None:
    """MachineError unless `package` is installed; it is not imported. `fix` is another way out.

    `module` is what it is imported as, where that is another name.
    """
    from importlib.util import find_spec

    if find_spec(module or package) is None:
        fix = f"{pip_install(package)}, or {fix}"
        raise MachineError(f"{package} is not installed", where=where, fix=fix)


def bnb_functional(what: str, where: str) -> Any:
    """`bitsandbytes.functional`, or a MachineError that says how to install it.

    `what` needs it, in the plural ("nf4 weights"); `where` is the recipe key that asks for it.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        fix = pip_install("bitsandbytes")
        raise MachineError(f"{what} need bitsandbytes", where=where, fix=fix) from error
    return bitsandbytes.functional
