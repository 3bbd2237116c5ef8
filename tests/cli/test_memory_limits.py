"""Limits on memory, real ones: a control group and `ulimit`.

What cannot fit is refused before the first step.
"""

from __future__ import annotations

import json
import os
import re
import resource
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
from errors import holds, is_internal
from recipes import make_run
from tunesmith.config.dump import dump
from tunesmith.errors import EXIT_OK, EXIT_USAGE
from warm import run_warm

pytestmark = pytest.mark.slow

LIMIT = 740 << 20


def parts_of(said: str) -> dict[str, str]:
    """The last error of a command, line by line."""
    assert not is_internal(said), said
    block = said[said.rindex("error: ") :].splitlines()
    return {name.strip(): text for name, _, text in (line.partition(": ") for line in block)}


def little(kind: int, size: int) -> None:
    resource.setrlimit(kind, (size, resource.RLIM_INFINITY))


SMALL = [
    ("ulimit -v", resource.RLIMIT_AS, ["train", "recipe.yaml"]),
    ("ulimit -d", resource.RLIMIT_DATA, ["train", "recipe.yaml"]),
    ("ulimit -v", resource.RLIMIT_AS, ["launch", "local", "recipe.yaml"]),
    ("ulimit -v", resource.RLIMIT_AS, ["plan", "recipe.yaml"]),
    ("ulimit -v", resource.RLIMIT_AS, ["data", "recipe.yaml"]),
    ("ulimit -v", resource.RLIMIT_AS, ["eval", "run", "--data", "rows.jsonl"]),
]


@pytest.mark.parametrize(("name", "kind", "words"), SMALL)
def test_a_limit_under_which_torch_cannot_be_loaded(name: str, kind: int, words: list[str]) -> None:
    done = run_warm(words, prepare=partial(little, kind, 350 << 20))
    assert done.returncode == EXIT_USAGE, done.stderr
    parts = parts_of(done.stderr)
    assert holds(parts["error"], name, "350 MiB")
    assert parts["fix"] == f"{name} unlimited"


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


@pytest.mark.slow
def test_what_a_control_group_cannot_hold_is_refused_with_keys_that_fit(
    recipe: Path, group: Path
) -> None:
    done = in_group(group, "train", str(recipe))
    assert done.returncode == EXIT_USAGE, done.stderr
    parts = parts_of(done.stderr)
    assert re.search(r"\b0\.\d+ GiB", parts["error"])
    assert f"control group {group} of {LIMIT / 2**30:.2f} GiB" in parts["where"]
    assert "docker run --memory=" in parts["fix"]
    assert not (recipe.parent / "run" / "metrics.jsonl").exists()
    options = [option.rpartition(" (")[0] for option in parts["fix"].split(" or ")[:-1]]
    assert "adapter.kind=lora" in options
    done = in_group(group, "train", str(recipe), *shlex.split("adapter.kind=lora"))
    assert done.returncode == EXIT_OK, done.stderr


def beside_loaded_libraries(more: int) -> None:
    """As little address space as lets `more` bytes be allocated."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    little(resource.RLIMIT_AS, pages * resource.getpagesize() + more)


def beside_loaded_data(more: int) -> None:
    """As little private memory as lets `more` bytes be allocated."""
    kib = next(
        line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if "VmData" in line
    )
    little(resource.RLIMIT_DATA, (int(kib) << 10) + more)


LOADED_TWICE = """
import json, sys
from pathlib import Path
from cli.test_memory_limits import beside_loaded_data
from tunesmith.errors import MachineError
from tunesmith.inference.load_run import load_run
load_run(Path(sys.argv[1]), device="cpu")  # all libraries have their memory now
beside_loaded_data(100 << 20)
try:
    load_run(Path(sys.argv[1]), device="cpu")
except MachineError as error:
    print(json.dumps([str(error.what), str(error.where), str(error.fix)]))
"""


def test_weights_that_a_limit_cannot_hold_are_refused(model: Path) -> None:
    """38 million parameters in fp32 take 150 MB.

    Of data, not of address space: the file is mapped before it is read.
    """
    done = run_warm([model], program=LOADED_TWICE)
    assert done.returncode == EXIT_OK, done.stderr
    what, where, fix = json.loads(done.stdout)
    assert what.count("0.1 GiB") == 2
    assert where.startswith("cpu, ulimit -d of ")
    assert fix == "ulimit -d unlimited"


def test_a_run_that_a_limit_cannot_hold_is_refused(recipe: Path) -> None:
    done = run_warm(["train", str(recipe)], prepare=partial(beside_loaded_libraries, 400 << 20))
    assert done.returncode == EXIT_USAGE, done.stderr
    parts = parts_of(done.stderr)
    assert "GiB" in parts["error"]
    assert "cpu, ulimit -v of " in parts["where"]
    assert holds(parts["fix"], "ulimit -v unlimited")
