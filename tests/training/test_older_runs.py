"""A run directory of the version before `train.fast_paths` and int8 were removed: resumed, asked,
merged, reported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errors import check_shown, error_in, is_at, lines_with
from recipes import recipe
from tunesmith.config.load import from_mapping
from tunesmith.training.run import train
from warm import run_warm

pytestmark = pytest.mark.slow

LAST_KEY = (
    "  deterministic: false\n"  # of train, in what was written then; `fast_paths` stood below it
)


def older_run(
    tiny: Path, folder: Path, *, fast_paths: str = "[]", quantize: str = "none", **changes: Any
) -> Path:
    """A run of 2 steps, with config.yaml as it was written then."""
    keys = {
        "model": {"dtype": "bf16"},
        "train": {"duration": "2 steps", "warmup": "0 steps"},
        **changes,
    }
    values = recipe(tiny, folder, **keys)
    train(from_mapping(values, where="test", base=folder), quiet=True)
    out = Path(values["output_dir"])
    text = (out / "config.yaml").read_text()
    assert LAST_KEY in text
    text = text.replace(LAST_KEY, f"{LAST_KEY}  fast_paths: {fast_paths}\n")
    (out / "config.yaml").write_text(
        text.replace("  quantize: none\n", f"  quantize: {quantize}\n")
    )
    return out


def resume(out: Path, *words: str) -> tuple[int, str]:
    done = run_warm(["train", out / "config.yaml", "train.duration=4 steps", *words])
    return done.returncode, done.stdout + done.stderr


def read_by_all(out: Path, folder: Path, *, merges: bool) -> None:
    """Generate, merge and report open the run."""
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Say amber 2 times: "}) + "\n")
    options = [
        "--input",
        folder / "prompts.jsonl",
        "--output",
        folder / "answers.jsonl",
        "--max-new-tokens",
        "3",
    ]
    assert run_warm(["generate", out, *options]).returncode == 0
    merged = run_warm(["merge", out, "--output", folder / "merged"])
    assert merged.returncode == (0 if merges else 2)
    assert merges or is_at(error_in(merged.stderr).where, f"{out.name}/final")
    assert run_warm(["report", out, "--output", folder / "report.html"]).returncode == 0


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_a_run_with_the_removed_key_at_its_default(kind: str, tiny: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"adapter": {"kind": kind}}
    out = older_run(tiny, tmp_path, **changes)
    read_by_all(out, tmp_path, merges=kind == "lora")
    code, said = resume(out)
    assert code == 0, said
    assert lines_with(said, "step 2", 4)
    assert "fast_paths" not in (out / "config.yaml").read_text()


def test_a_run_that_used_a_fast_path(tiny: Path, tmp_path: Path) -> None:
    out = older_run(tiny, tmp_path, fast_paths="[joined-weights, one-pass-gradients]")
    read_by_all(out, tmp_path, merges=True)
    code, said = resume(out)
    assert code == 2
    assert f"{out / 'config.yaml'}:" in said
    assert "train.fast_paths=[]" in said
    code, said = resume(out, "train.fast_paths=[]")
    assert code == 0, said
    assert lines_with(said, "step 2", 4)


def test_a_run_on_a_base_in_int8(tiny: Path, tmp_path: Path) -> None:
    out = older_run(tiny, tmp_path, quantize="int8")
    read_by_all(out, tmp_path, merges=True)
    code, said = resume(out)
    assert code == 2
    check_shown(said, names=["model.quantize: int8"], fix=["model.quantize=fp8"])
    code, said = resume(out, "model.quantize=none")
    assert (code, "checkpoint.resume=force" in said) == (2, True), (
        "another base than the run began with"
    )
    code, said = resume(out, "model.quantize=none", "checkpoint.resume=force")
    assert code == 0, said
    assert lines_with(said, "step 2", 4)
