"""A limit on memory, a real one: a control group's.

What cannot fit is refused before the first step.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from control_groups import control_group
from errors import error_in
from recipes import make_run
from tunesmith.config.dump import dump
from tunesmith.errors import EXIT_OK, EXIT_USAGE
from warm import run_warm

pytestmark = pytest.mark.nightly

LIMIT = 740 << 20


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 38 million parameters: 0.56 GiB with gradients and moments."""
    folder = tmp_path_factory.mktemp("mid-llama")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    sizes = {"hidden_size": 512, "intermediate_size": 2560, "num_hidden_layers": 8, "head_dim": 64}
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, **sizes)).save_pretrained(folder)
    torch.manual_seed(0)
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    short = {"duration": "1 steps", "global_batch": "2 examples", "warmup": "0 steps"}
    full = {"adapter": {"kind": "none"}, "train": short}
    run = make_run(model, tmp_path, held=False, output_dir=str(tmp_path / "run"), **full)
    (tmp_path / "recipe.yaml").write_text(dump(run))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def group() -> Iterator[Path]:
    with control_group(
        "memory", {"memory.limit_in_bytes": str(LIMIT)}, {"memory.max": str(LIMIT)}
    ) as folder:
        yield folder


def join(group: Path) -> None:
    """Move this process into a group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def in_group(group: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`tunesmith WORDS` in a process of the group."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return run_warm(words, prepare=partial(join, group), env=environ, timeout=600)


def test_what_a_control_group_cannot_hold_is_refused_with_keys_that_fit(
    recipe: Path, group: Path
) -> None:
    done = in_group(group, "train", str(recipe))
    assert done.returncode == EXIT_USAGE, done.stderr
    told = error_in(done.stderr)
    assert re.search(r"\b0\.\d+ GiB", told.what)
    assert f"control group {group} of {LIMIT / 2**30:.2f} GiB" in told.where
    assert "docker run --memory=" in told.fix
    assert not (recipe.parent / "run" / "metrics.jsonl").exists()
    options = [option.rpartition(" (")[0] for option in told.fix.removeprefix("set ").split(" or ")]
    assert "adapter.kind=lora" in options
    done = in_group(group, "train", str(recipe), *shlex.split("adapter.kind=lora"))
    assert done.returncode == EXIT_OK, done.stderr
