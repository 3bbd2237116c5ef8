"""Hold the build of an image to the torch that its base brings: pip must neither replace nor shadow
it.

    python check_torch.py before FOLDER     # writes FOLDER/constraints.txt and FOLDER/torch.json; exit code 1 and one line
                                            # where torch is older or newer than the pyproject.toml
                                            here asks for
    python check_torch.py after FOLDER      # exit code 1 and one line where torch is another one, or is gone

NVIDIA's builds of torch know chips that those of the package index do not, and a wheel of the index
is built for another CUDA. Constraints make pip choose other packages around them; the comparison
finds what constraints do not, such as a wheel that carries files of torch.
"""

import hashlib
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

BASE = "--build-arg BASE=nvcr.io/nvidia/pytorch:26.02-py3"
# What is built together with torch: another version of one is no longer the base's torch either.
KEPT = ("torch", "torchvision", "torchaudio", "triton", "pytorch-triton")


def look() -> dict[str, str]:
    """Version, file and the file's hash of the torch that this Python imports; empty texts where it
    has none.
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
    """Why a base's torch is none of those that `project` asks for, or nothing: pip would say so in
    a hundred lines.
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
        return f"the base has torch {version}, as NVIDIA's images before 26.02 do, and tunesmith needs {needed}; {BASE}"
    return f"the base has torch {version}, and tunesmith needs {needed}; take an older base: {BASE}"


def before(folder: Path) -> str:
    """Write what is there before pip runs; returns why this base cannot be built on, or nothing."""
    there = look()
    if not there["version"] or not there["file"]:
        return f"the base has no torch; take one that has: {BASE}"
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
    """What pip has done to torch, or nothing."""
    old, new = json.loads((folder / "torch.json").read_text()), look()
    if old == new:
        return ""
    words = [
        f"{torch['version'] or 'no torch'} in {torch['file'] or 'no file'}" for torch in (old, new)
    ]
    return f"pip replaced the base's torch, {words[0]}, by {words[1]}; take a newer base: --build-arg BASE=..."


if __name__ == "__main__":
    steps = {"before": before, "after": after}
    if len(sys.argv) != 3 or sys.argv[1] not in steps:
        sys.exit(__doc__)
    if fault := steps[sys.argv[1]](Path(sys.argv[2])):
        sys.exit(f"error: {fault}")
    print(
        f"torch {look()['version']} in {look()['file']}: {'kept' if sys.argv[1] == 'after' else 'to be kept'}"
    )
