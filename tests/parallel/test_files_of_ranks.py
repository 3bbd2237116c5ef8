"""Several ranks read a base and write final/: the bytes of one process, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ranks import run_ranks, world_of
from recipes import make_run
from tunesmith.build_model import build_model
from tunesmith.checkpoint import contents
from tunesmith.checkpoint.resume import OPTIMIZER, Progress, Start
from tunesmith.distributed.ranks import join_ranks
from tunesmith.formats import stored
from tunesmith.hub.model_files import read_model_files
from tunesmith.model.weights import save_tensors, stored_tensors
from tunesmith.model.weights.random_init import seed_of
from tunesmith.model.weights.safetensors_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith.model.weights.weights import copy_full_tensor
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.mesh_shape import possible_shapes
from tunesmith.planning.resolve import inference_plan
from tunesmith.start.session import make_optimizer

pytestmark = [pytest.mark.slow, pytest.mark.long]

FULL = {"adapter": {"kind": "none"}}
# 3 divides no size of the model: shards are uneven.
MESHES = {
    3: [({"shard": 3}, "fp32"), ({"shard": 3}, "bf16")],
    4: [
        ({"replicate": 2, "shard": 2}, "fp32"),
        ({"shard": 2, "tensor": 2}, "bf16"),
        ({"replicate": 2, "tensor": 2}, "fp32"),
    ],
}
OF_3_AND_4 = pytest.mark.parametrize("world", [3, pytest.param(4, marks=pytest.mark.nightly)])


def built(
    model: Path, folder: Path, mesh: dict[str, int], changes: dict[str, Any], world: int
) -> Any:
    run = make_run(model, folder, held=False, parallel=mesh, **changes)
    files = read_model_files(model, run.model)
    shape = possible_shapes(run.parallel, world)[0]
    root, _ = build_model(
        run, files, inference_plan(run, files, torch.device("cpu")), mesh=Mesh.of(shape, "cpu")
    )
    return run, root


def write_all(
    model: Path, folder: Path, cases: list[tuple[dict[str, int], dict[str, Any], Path]]
) -> None:
    """Load a model on meshes and write it as final/ has it; a piece holds 15 rows or so."""
    save_tensors.MAX_PIECE_BYTES = save_tensors.MAX_GATHERED_BYTES = 4000
    stored_tensors.SLICE = stored.SLICE = 4000
    with join_ranks() as ranks:
        for mesh, changes, place in cases:
            run, root = built(model, folder, mesh, changes, ranks.world)
            contents.write_model_files(place if ranks.is_main_process else None, run, root, {})


def saved_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@OF_3_AND_4
def test_final_of_any_mesh_is_that_of_one_process_byte_for_byte(world, tiny, tmp_path):
    """In fp32, and where parameters are sharded in bf16, whose shards are fp32."""
    alone, cases = {}, []
    for dtype in ("fp32", "bf16"):
        place = tmp_path / f"alone {dtype}"
        place.mkdir()
        write_all(tiny, tmp_path, [({}, {**FULL, "model": {"dtype": dtype}}, place)])
        alone[dtype] = saved_files(place)
    for index, (mesh, dtype) in enumerate(MESHES[world]):
        place = tmp_path / str(index)
        place.mkdir()
        cases.append((mesh, {**FULL, "model": {"dtype": dtype}}, place))
    run_ranks(world, write_all, tiny, tmp_path, cases)
    for mesh, changes, place in cases:
        assert saved_files(place) == alone[changes["model"]["dtype"]], f"{mesh} {changes}"


# ---- an adapter of which ranks hold parts ----

# Embedding and head are tied: the trained embedding is a tensor of its own, cut by the vocabulary.
ADAPTER = {"adapter": {"rank": 4, "modules_to_save": ["embed_tokens", "norm"]}}
EXPERTS = {"adapter": {"rank": 4, "target": ["experts", "q_proj"]}}
# name: model, its adapter, meshes of as many ranks
ADAPTERS: dict[str, tuple[str, dict[str, Any], list[dict[str, int]]]] = {
    "two ranks": ("tiny", ADAPTER, [{"shard": 2}, {"tensor": 2}]),
    "four ranks": ("tiny", ADAPTER, [{"tensor": 4}, {"shard": 2, "tensor": 2}]),
    "experts": ("mixture", EXPERTS, [{"replicate": 2, "shard": 2}, {"shard": 2, "tensor": 2}]),
}
NAMES = [
    pytest.param(name, marks=() if name == "two ranks" else pytest.mark.nightly, id=name)
    for name in ADAPTERS
]


def drawn(name: str, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed_of(0, name)))


def write_adapters(
    model: Path,
    folder: Path,
    meshes: list[dict[str, int]],
    places: list[Path],
    adapter: dict[str, Any] = ADAPTER,
) -> list[int]:
    """A checkpoint and final/ of each mesh; the bytes that this rank holds beside its parts."""
    save_tensors.MAX_GATHERED_BYTES = 4000  # some rows at a time
    sizes = []
    with join_ranks() as ranks:
        DTensor.full_tensor = None  # nothing is gathered on every rank
        for mesh, place in zip(meshes, places, strict=True):
            run, root = built(model, folder, mesh, adapter, ranks.world)
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


def adapter_files(place: Path) -> list[bytes]:
    files = (ADAPTER_WEIGHTS, OPTIMIZER, f"final/{ADAPTER_WEIGHTS}", f"final/{ADAPTER_CONFIG}")
    return [(place / file).read_bytes() for file in files]


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_written_as_by_one_process_and_whole_on_rank_0_alone(name, request, tmp_path):
    fixture, adapter, meshes = ADAPTERS[name]
    model = request.getfixturevalue(fixture)
    places = [tmp_path / str(index) for index in range(len(meshes) + 1)]
    for place in places:
        (place / "final").mkdir(parents=True)
    run_ranks(1, write_adapters, model, tmp_path, [{}], places[-1:], adapter)
    world = world_of(meshes[0])
    first, *others = run_ranks(world, write_adapters, model, tmp_path, meshes, places[:-1], adapter)
    alone = adapter_files(places[-1])
    for mesh, place in zip(meshes, places, strict=False):
        assert adapter_files(place) == alone, mesh
    values = load_file(places[-1] / ADAPTER_WEIGHTS)
    assert all(value.abs().max() > 0 for value in values.values())
    assert fixture != "tiny" or len(values) == 2 * 14 + 1 + 5  # A and B, the embedding, the norms
    for size, mesh in zip(first, meshes, strict=True):
        assert size > 0 or "tensor" not in mesh
    assert others == [[0] * len(meshes)] * (world - 1)
