"""Mixtures and bases as shipped in which one thing is wrong: an exit code, what, where and a fix;
and nothing is written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cli.bad_mixtures import MIXTURES, MixtureWorld
from cli.bad_world import Case, snapshot
from cli.test_bad_inputs import assert_told
from recipes import write_rows
from shipped_bases import write_fp8, write_mxfp4_gpt_oss
from tunesmith.adapter import lora, peft_files
from tunesmith.cli.main import main
from tunesmith.config.schema import Adapter

# The quickest of each kind; the others are slow.
QUICK = ("one stack without the other", "top_k over experts", "both forms")


@pytest.fixture(scope="module")
def models(mixture: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases in codes, and adapters of the mixture."""
    folder = tmp_path_factory.mktemp("models")
    write_fp8(mixture, folder / "fp8", (16, 32))
    write_mxfp4_gpt_oss(folder / "mxfp4", tiny)
    for name, experts in (("stacked", 8), ("other", 4)):
        model = AutoModelForCausalLM.from_pretrained(
            mixture, num_experts=experts, ignore_mismatched_sizes=True
        )
        adapter = Adapter(rank=2, target=("q_proj", "experts"))
        lora.attach_lora(model, adapter, seed=0)
        files = peft_files.adapter_files(model, adapter, str(mixture), None)
        (folder / name).mkdir()
        peft_files.write_adapter(folder / name, *files)
        if name == "stacked":
            for file in mixture.glob("tokenizer*"):
                (folder / name / file.name).write_bytes(file.read_bytes())
            shutil.copytree(folder / name, folder / "single")
            weights = {
                key.replace(".experts.", ".experts.0.gate_proj."): tensor
                for key, tensor in load_file(folder / name / "adapter_model.safetensors").items()
            }
            save_file(weights, folder / "single" / "adapter_model.safetensors")
    return folder


@pytest.fixture
def world(mixture: Path, models: Path, tmp_path: Path) -> MixtureWorld:
    write_rows(tmp_path / "train.jsonl", 48)
    stacked = (models / "stacked" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "stacked.safetensors").write_bytes(stacked)
    return MixtureWorld(
        tmp_path, mixture, fp8=models / "fp8", mxfp4=models / "mxfp4", adapters=models
    )


def cases() -> list[object]:
    return [
        pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow, id=str(case))
        for case in MIXTURES
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_bad_mixture(case: Case, world: MixtureWorld, capsys: pytest.CaptureFixture[str]) -> None:
    words = case.make(world)
    before = snapshot(world.folder)
    capsys.readouterr()
    code = main(words)
    assert_told(case, world, before, code, *capsys.readouterr())
