"""`tunesmith selfcheck`: it passes here, and each way of training wrong makes it fail."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import run_ranks
from recipes import recipe
from tunesmith import selfcheck
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.data.loader import GlobalBatch
from tunesmith.data.schedule import BatchSchedule
from tunesmith.methods.base import TrainModel
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.parallel.mesh import MeshShape
from tunesmith.training import trainer

ROOT = Path(__file__).parents[2]


def leave_an_adapter_out_of_the_optimizer() -> None:
    original = TrainModel.trained_parameters
    TrainModel.trained_parameters = lambda self: (p for p in original(self) if "0.mlp.up_proj.lora_B" not in p[0])


def leave_a_layer_without_gradient() -> None:
    original = TrainModel.hidden

    def hidden(self, batch):
        self.model.get_submodule("model.layers.0.mlp.up_proj").lora_B.requires_grad_(False)
        return original(self, batch)

    TrainModel.hidden = hidden


def divide_by_the_ranks_own_tokens() -> None:
    def denominator(self, batch):
        return sum(m.supervised for m in batch.micro) if isinstance(batch, GlobalBatch) else batch.supervised

    SupervisedFineTuning.denominator = denominator


def shuffle_by_rank() -> None:
    original = BatchSchedule.examples
    BatchSchedule.examples = lambda self, step: original(self, step + int(os.environ["RANK"]) % 2)


def keep_gradients_to_oneself() -> None:
    trainer.sum_gradients = lambda grads, mesh: None


BROKEN = [  # what is wrong, and checks that must say so
    (leave_an_adapter_out_of_the_optimizer, {"changed parameters"}),
    (leave_a_layer_without_gradient, {"parameters with a gradient"}),
    (divide_by_the_ranks_own_tokens, {"loss", "gradient norm"}),
    (shuffle_by_rank, {"loss", "gradient norm", "examples of the batch"}),
    (keep_gradients_to_oneself, {"gradient norm", "different weights on ranks"}),
]


def check_broken(change) -> list[str]:
    """The checks that fail on two copies with an adapter, in a build with `change`."""
    change()
    selfcheck.KINDS = {"lora": "lora"}
    selfcheck.possible_shapes = lambda parallel, world: [MeshShape(world)]
    report = selfcheck.run_checks(say=lambda row: None)
    return [row["check"] for row in report["checks"] if row["passed"] is False]


@pytest.mark.parametrize(("change", "found"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_a_broken_build_fails(change, found):
    for failed in run_ranks(2, check_broken, change):
        assert found <= {check.rpartition(": ")[2] for check in failed}


def commands_of_the_page() -> list[list[str]]:
    """The commands of docs/ranks.md in blocks without a language; those for two machines are `sh`."""
    page = (ROOT / "docs/ranks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)
    return [shlex.split(line) for language, block in blocks if not language for line in block.splitlines()]


def test_two_ranks_that_it_starts_pass():
    words = next(words for words in commands_of_the_page() if words[:2] == ["tunesmith", "selfcheck"])
    done = subprocess.run([sys.executable, "-m", *words, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["passed"], report["ranks"]) == (True, 2)
    meshes = {row["check"].rpartition(": ")[0] for row in report["checks"]}
    shapes = [f"replicate {a} x shard {b} x tensor 1" for a, b in ((1, 1), (2, 1), (1, 2))]
    assert {f"{kind}, {shape}" for kind in ("lora", "full") for shape in shapes} <= meshes
    assert sum(row["passed"] is True for row in report["checks"]) == len(report["checks"]) - 1  # a figure is no verdict


def test_the_page_trains_on_two_ranks(tiny, tmp_path):
    (words,) = [words for words in commands_of_the_page() if words[0] == "torchrun"]
    (tmp_path / "my-recipe.yaml").write_text(to_yaml(recipe(tiny, tmp_path, train={"duration": "2 steps"})))
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert (env["mesh"]["replicate"], (tmp_path / "run" / "final").is_dir()) == (2, True)


def test_ranks_that_cannot_start_are_reported(monkeypatch, capsys):
    """What torchrun prints of it is a traceback."""
    stderr = "W1121 torch\nerror: the disk is full\n  fix: make room\nTraceback (most recent call last):\n  File"
    done = subprocess.CompletedProcess([], 1, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: done)
    assert main(["selfcheck", "--ranks", "2"]) == 1
    said = capsys.readouterr().err
    assert "the ranks ended before the checks were done\n  why: the disk is full\n" in said
    assert "Traceback" not in said


def test_ranks_that_are_there_are_not_started_again(monkeypatch, capsys):
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["selfcheck", "--ranks", "2"]) == 2
    assert "leave it out under torchrun" in capsys.readouterr().err
