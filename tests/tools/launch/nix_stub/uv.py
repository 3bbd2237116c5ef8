#!/usr/bin/python3
"""Stands in for uv, without the network; its commands print their own name and arguments."""

import os
import sys
import venv
from pathlib import Path

NAMES = ["tunesmith", "hf", "accelerate"]


def main(words: list[str]) -> None:
    match words:
        case ["venv", "--quiet", "--python", python, folder] if os.access(python, os.X_OK):
            venv.create(folder, symlinks=True)
        case ["pip", "sync", "--python", python, "--require-hashes", requirements]:
            folder = Path(python).parents[1]
            (folder / "synced.txt").write_text(Path(requirements).read_text())
        case [
            "pip",
            "install",
            "--quiet",
            "--python",
            python,
            "--no-deps",
            "--no-build-isolation",
            source,
        ]:
            assert (Path(source) / "pyproject.toml").is_file()
            for name in NAMES:
                script = Path(python).with_name(name)
                script.write_text(
                    f"#!{python}\nimport sys\nprint('{name} of', sys.prefix, *sys.argv[1:])\n"
                )
                script.chmod(0o755)
        case _:
            sys.exit(f"uv: not known here: {words}")


if __name__ == "__main__":
    main(sys.argv[1:])
