"""Check that the build of an image keeps the torch of its base image. pip must neither replace nor
shadow this torch.

    python check_torch.py before FOLDER     # before pip runs; writes FOLDER/constraints.txt and
                                            # FOLDER/torch.json; fails if the version of torch does
                                            # not fit the pyproject.toml in the working directory
    python check_torch.py after FOLDER      # after pip has run; fails if torch is not the same

On failure, the exit code is 1 and one line says why.

NVIDIA's builds of torch support chips that the builds on PyPI do not support, and the builds on
PyPI are for another version of CUDA. With constraints.txt, pip chooses versions of the other
packages that fit this torch. The comparison detects changes that constraints cannot prevent, for
example by a wheel that contains files of torch.
"""

import hashlib
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

BASE = "--build-arg BASE=nvcr.io/nvidia/pytorch:26.02-py3"
# torch and the packages that are built together with it. All their versions are kept.
KEPT = ("torch", "torchvision", "torchaudio", "triton", "pytorch-triton")


def look() -> dict[str, str]:
    """Return the version, the file and the file's hash of the torch that this Python imports.

    The values are empty texts if this Python has no torch.
    """
    try:
        version = distribution("torch").version
    except PackageNotFoundError:
        version = ""
    spec = find_spec("torch")
    file = spec.origin if spec and spec.origin else ""
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return {"version": version, "file": file, "sha256": digest}


def version_fault(version: str, project: Path) -> str:
    """Return why the version of torch does not fit the requirement in `project`.

    Return an empty text if it fits. This check replaces an error of pip with a hundred lines.
    """
    wanted = re.search(r'"torch>=(\d+)\.(\d+)[^",]*,<(\d+)\.(\d+)"', project.read_text())
    found = re.match(r"(\d+)\.(\d+)", version)
    if wanted is None or found is None:
        return ""
    least_major, least_minor, end_major, end_minor = map(int, wanted.groups())
    major, minor = map(int, found.groups())
    if (least_major, least_minor) <= (major, minor) < (end_major, end_minor):
        return ""
    needed = wanted[0].strip('"')
    if (major, minor) < (least_major, least_minor):
        return (
            f"the base has torch {version}, as NVIDIA's images before 26.02 do, and tunesmith "
            f"needs {needed}; use a newer base: {BASE}"
        )
    return f"the base has torch {version}, and tunesmith needs {needed}; take an older base: {BASE}"


def before(folder: Path) -> str:
    """Write the versions before pip runs.

    Return why this base cannot be used. Return an empty text if it can be used.
    """
    there = look()
    if not there["version"] or not there["file"]:
        return f"the base has no torch; use a base with torch: {BASE}"
    if fault := version_fault(there["version"], Path("pyproject.toml")):
        return fault
    lines = []
    for name in KEPT:
        try:
            lines.append(f"{name}=={distribution(name).version}\n")
        except PackageNotFoundError:
            continue
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "constraints.txt").write_text("".join(lines))
    (folder / "torch.json").write_text(json.dumps(there))
    return ""


def after(folder: Path) -> str:
    """Return how pip has changed torch. Return an empty text if torch is unchanged."""
    old, new = json.loads((folder / "torch.json").read_text()), look()
    if old == new:
        return ""
    words = [
        f"{torch['version'] or 'no torch'} in {torch['file'] or 'no file'}" for torch in (old, new)
    ]
    return (
        f"pip replaced the base's torch, {words[0]}, by {words[1]}; "
        "use a newer base: --build-arg BASE=..."
    )


if __name__ == "__main__":
    steps = {"before": before, "after": after}
    if len(sys.argv) != 3 or sys.argv[1] not in steps:
        sys.exit(__doc__)
    if fault := steps[sys.argv[1]](Path(sys.argv[2])):
        sys.exit(f"error: {fault}")
    print(
        f"torch {look()['version']} in {look()['file']}: {'kept' if sys.argv[1] == 'after' else 'to be kept'}"
    )
