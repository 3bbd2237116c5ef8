"""What several ranks read of a checkpoint and write into final/: the bytes of one process, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ranks import run_ranks
from recipes import make_run
from tunesmith.build_model import build_model
from tunesmith.checkpoint import export
from tunesmith.hub.model_files import read_model_files
from tunesmith.model import save_tensors, weights
from tunesmith.parallel.mesh import Mesh, possible_shapes
from tunesmith.parallel.shard import gathered
from tunesmith.ranks import join_ranks
from tunesmith.runtime.resolve import inference_plan

FULL = {"adapter": {"kind": "none"}}
# 3 divides no size of the model: shards are uneven.
MESHES = [
    {"shard": 4}, {"shard": 3}, {"replicate": 2, "shard": 2}, {"shard": 2, "tensor": 2}, {"tensor": 4},
    {"replicate": 2, "tensor": 2},
]  # fmt: skip


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def built(model: Path, folder: Path, mesh: dict[str, int], changes: dict[str, Any], world: int) -> Any:
    run = make_run(model, folder, held=False, parallel=mesh, **changes)
    files = read_model_files(model, run.model)
    shape = possible_shapes(run.parallel, world)[0]
    root, _ = build_model(run, files, inference_plan(run, files, torch.device("cpu")), mesh=Mesh.of(shape, "cpu"))
    return run, root


def write_all(model: Path, folder: Path, cases: list[tuple[dict[str, int], dict[str, Any], Path]]) -> None:
    """Load a model on a mesh and write it as final/ has it, case by case; a piece holds three rows or so."""
    save_tensors.PIECE = save_tensors.GATHERED = weights.SLICE = 1000
    with join_ranks() as ranks:
        for mesh, changes, place in cases:
            run, root = built(model, folder, mesh, changes, ranks.world)
            export.write_model_files(place if ranks.leads else None, run, root, {})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("world", [3, 4])
def test_final_of_any_mesh_is_that_of_one_process_byte_for_byte(world, tiny, tmp_path):
    """In fp32, and in bf16, whose shards are fp32."""
    cases, expected = [], []
    for dtype in ("fp32", "bf16"):
        changes = {**FULL, "model": {"dtype": dtype}}
        alone = tmp_path / f"alone {dtype}"
        alone.mkdir()
        write_all(tiny, tmp_path, [({}, changes, alone)])
        for index, mesh in enumerate(MESHES):
            if torch.tensor(list(mesh.values())).prod() == world:
                place = tmp_path / f"{dtype} {index}"
                place.mkdir()
                cases.append((mesh, changes, place))
                expected.append(contents(alone))
    assert len(cases) == (2 if world == 3 else 10)
    run_ranks(world, write_all, tiny, tmp_path, cases)
    for (mesh, changes, place), wanted in zip(cases, expected, strict=True):
        assert contents(place).keys() == wanted.keys()
        assert contents(place) == wanted, f"{mesh} {changes}"


def grown(model: Path, folder: Path, mesh: dict[str, int]) -> dict[str, np.ndarray]:
    """Embedding and head of a model whose tokenizer has more tokens than the checkpoint has rows."""
    weights.SLICE = 1000
    with join_ranks() as ranks:
        changes = {**FULL, "model": {"added_tokens": [f"<{i}>" for i in range(100)]}}
        _, root = built(model, folder, mesh, changes, ranks.world)
        ends = {"embedding": root.model.get_input_embeddings().weight, "head": root.model.lm_head.weight}
        return {name: tensor.detach().numpy() for name, tensor in gathered(ends).items()}


@pytest.mark.parametrize("mesh", [{"shard": 3}, {"shard": 2, "tensor": 2}], ids=["uneven", "tensor"])
def test_rows_of_added_tokens_are_those_of_one_process(mesh, tiny, tmp_path):
    alone = grown(tiny, tmp_path, {})
    known, new = np.split(alone["embedding"], [272])
    assert len(new) > 64
    np.testing.assert_allclose(
        new, known.mean(0)[None].repeat(len(new), 0), rtol=1e-4, atol=1e-7
    )  # fp32 sums of 272 rows
    world = int(torch.tensor(list(mesh.values())).prod())
    for found in run_ranks(world, grown, tiny, tmp_path, mesh):
        assert all(np.array_equal(found[name], alone[name]) for name in alone)


def peaks(model: Path, folder: Path, mesh: dict[str, int], changes: dict[str, Any]) -> list[tuple[int, int]]:
    """Growth of this rank's resident memory at its peak, and what it holds afterwards: of loading and of writing final/."""
    found = []

    def begin() -> int:
        ranks.gather(None)
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")

    with join_ranks() as ranks:
        built(model.with_name("small"), folder, mesh, changes, ranks.world)  # code that is loaded once
        before = begin()
        run, root = built(model, folder, mesh, changes, ranks.world)
        found.append((status("VmHWM") - before, status("VmRSS") - before))
        before = begin()
        export.write_model_files(folder if ranks.leads else None, run, root, {})
        found.append((status("VmHWM") - before, status("VmRSS") - before))
    return found


MIB = 1 << 20
WIDTH, ROWS = 1024, 40_000  # of the largest tensors, embedding and head: 80 MiB in bf16, 160 in fp32


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [({"shard": 4}, FULL), ({"shard": 2, "tensor": 2}, FULL), ({"shard": 4}, {})],
    ids=["full", "full, tensor", "lora"],
)
def test_a_rank_holds_its_shard_and_one_tensor_at_most(mesh, changes, tiny, tmp_path):
    """16 MiB to read or to write are at hand beside the shard: less than one tensor, and no tensor is whole."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    for name, vocabulary in (("small", 512), ("large", ROWS)):
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=vocabulary, num_key_value_heads=4)).bfloat16()
        model.save_pretrained(tmp_path / name)
        for file in tiny.glob("*token*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    changes = {**changes, "model": {"dtype": "bf16"}}
    tensor = WIDTH * ROWS * 2
    for loading, final in run_ranks(4, peaks, tmp_path / "large", tmp_path, mesh, changes):
        peak, held = loading
        assert held > (30 * MIB if changes.keys() == {"model"} else 60 * MIB), "nothing was measured"
        assert peak < held + tensor
        assert final[0] < tensor
    written = load_file(next(tmp_path.glob("*model.safetensors")))
    assert len(written) > 10


def test_a_tied_head_that_is_stored_twice_is_compared_piece_by_piece(tiny, tmp_path, monkeypatch):
    """The last row alone differs."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    monkeypatch.setattr(weights, "SLICE", 1000)
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    built(folder, tmp_path, {}, FULL, 1)
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(Exception, match="differ, but the config ties them"):
        built(folder, tmp_path, {}, FULL, 1)
