"""An adapter of which ranks hold parts is written as by one process, and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ranks import gathered, run_ranks, world_of
from recipes import make_run
from tunesmith.adapter import lora, peft_files
from tunesmith.build_model import build_model
from tunesmith.checkpoint import contents
from tunesmith.checkpoint.resume import OPTIMIZER, Progress, Start
from tunesmith.distributed.ranks import Ranks, join_ranks
from tunesmith.hub.model_files import read_model_files
from tunesmith.model import save_tensors
from tunesmith.model.random_init import seed_of
from tunesmith.model.safetensors_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith.model.weights import copy_full_tensor
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.mesh_shape import possible_shapes
from tunesmith.planning.resolve import inference_plan
from tunesmith.training.session import make_optimizer

pytestmark = pytest.mark.slow

# Embedding and head are tied: the trained embedding is a tensor of its own, cut by the vocabulary.
ADAPTER = {"adapter": {"rank": 4, "modules_to_save": ["embed_tokens", "norm"]}}
EXPERTS = {"adapter": {"rank": 4, "target": ["experts", "q_proj"]}}
# name: model, its adapter, meshes of as many ranks
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, int]]]] = {
    "two ranks": ("tiny", ADAPTER, [{"shard": 2}, {"tensor": 2}]),
    "four ranks": (
        "tiny",
        ADAPTER,
        [{"tensor": 4}, {"shard": 2, "tensor": 2}, {"replicate": 2, "tensor": 2}, {"shard": 4}],
    ),
    "experts": ("mixture", EXPERTS, [{"replicate": 2, "shard": 2}, {"shard": 2, "tensor": 2}]),
}
NAMES = [
    pytest.param(name, marks=() if name == "two ranks" else pytest.mark.nightly, id=name)
    for name in CASES
]


def built(
    model: Path, folder: Path, mesh: dict[str, int], ranks: Ranks, adapter: dict[str, Any] = ADAPTER
) -> Any:
    run = make_run(model, folder, held=False, parallel=mesh, **adapter)
    files = read_model_files(model, run.model)
    shape = possible_shapes(run.parallel, ranks.world)[0]
    root, _ = build_model(
        run, files, inference_plan(run, files, torch.device("cpu")), mesh=Mesh.of(shape, "cpu")
    )
    return run, root


def drawn(name: str, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed_of(0, name)))


def write_all(
    model: Path,
    folder: Path,
    meshes: list[dict[str, int]],
    places: list[Path],
    adapter: dict[str, Any] = ADAPTER,
) -> list[int]:
    """A checkpoint and final/ of each mesh, with values drawn by name; the bytes of adapter and
    moments that this rank then has for itself beside its own parts.
    """
    save_tensors.MAX_GATHERED_BYTES = 4000  # some rows at a time
    sizes = []
    with join_ranks() as ranks:
        DTensor.full_tensor = None  # nothing is gathered on every rank
        for mesh, place in zip(meshes, places, strict=True):
            run, root = built(model, folder, mesh, ranks, adapter)
            optimizer = make_optimizer(run, root, Start(), ranks)
            for name, part in optimizer.parts.items():
                copy_full_tensor(part.param.data, drawn(name, part.param))
                part.state = part.initial_state()
                for field in ("exp_avg", "exp_avg_sq"):
                    copy_full_tensor(
                        part.whole(part.state[field]), drawn(f"{name}.{field}", part.param)
                    )
            state = optimizer.state_dict()
            save, copied = contents.adapter_save_function(
                run, root, {}, state, Progress(), ranks.is_main_process
            )
            assert copied == ranks.is_main_process
            contents.write_model_files(
                place / "final" if ranks.is_main_process else None, run, root, {}
            )
            if ranks.is_main_process:
                root.model.requires_grad_(False)
                for parameter in root.model.parameters():
                    parameter.zero_()  # the copy was made before
                save(place)
            sizes.append(
                sum(t.nbytes for t in save_tensors.gathered(state).values() if not t.is_meta)
            )
    return sizes


def saved_files(place: Path) -> list[bytes]:
    files = (
        ADAPTER_WEIGHTS,
        OPTIMIZER,
        f"final/{ADAPTER_WEIGHTS}",
        f"final/{ADAPTER_CONFIG}",
    )
    return [(place / file).read_bytes() for file in files]


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_written_as_by_one_process_and_whole_on_rank_0_alone(name, request, tmp_path):
    fixture, adapter, meshes = CASES[name]
    model = request.getfixturevalue(fixture)
    places = [tmp_path / str(index) for index in range(len(meshes) + 1)]
    for place in places:
        (place / "final").mkdir(parents=True)
    run_ranks(1, write_all, model, tmp_path, [{}], places[-1:], adapter)
    world = world_of(meshes[0])
    first, *others = run_ranks(world, write_all, model, tmp_path, meshes, places[:-1], adapter)
    alone = saved_files(places[-1])
    for mesh, place in zip(meshes, places, strict=False):
        assert saved_files(place) == alone, mesh
    values = load_file(places[-1] / ADAPTER_WEIGHTS)
    assert all(value.abs().max() > 0 for value in values.values())
    if fixture == "tiny":
        assert len(values) == 2 * 14 + 1 + 5  # A and B, the embedding, the norms
    else:
        # [out, rank * experts]
        assert (64, 4 * 8) in {tuple(value.shape) for value in values.values()}
    for size, mesh in zip(first, meshes, strict=True):
        assert size > 0 or "tensor" not in mesh
    assert others == [[0] * len(meshes)] * (world - 1)


def loaded(model: Path, folder: Path, adapter: Path) -> dict[str, Any]:
    with join_ranks() as ranks:
        _, root = built(model, folder, {"shard": ranks.world}, ranks)
        peft_files.load_adapter(root.model, adapter)
        return {
            name: gathered(layer.lora_B.detach()).numpy() for name, layer in lora.loras(root.model)
        }


def test_shards_read_an_adapter_with_copies_of_base_weights(tiny, tmp_path):
    """PEFT writes the base's embedding and head beside an adapter where one of them carries one."""
    place = tmp_path / "adapter"
    (place / "final").mkdir(parents=True)
    run_ranks(1, write_all, tiny, tmp_path, [{}], [place])
    tensors = load_file(place / ADAPTER_WEIGHTS)
    base = load_file(tiny / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    extra = {"base_model.model.model.layers.0.mlp.up_proj.base_layer.weight": base}
    save_file(tensors | extra, place / "final" / ADAPTER_WEIGHTS)
    for found in run_ranks(2, loaded, tiny, tmp_path, place / "final"):
        assert len(found) == 14
        for name, value in found.items():
            expected = tensors[f"{peft_files.PREFIX}{name}.lora_B.weight"]
            assert torch.equal(torch.from_numpy(value), expected)
