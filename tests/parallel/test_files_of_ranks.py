"""Several ranks read a base and write final/: the bytes of one process, in bounded memory."""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from errors import refuses
from ranks import gathered, run_ranks, world_of
from recipes import make_run, merge
from tunesmith.build_model import build_model
from tunesmith.checkpoint import contents
from tunesmith.checkpoint.resume import OPTIMIZER, Progress, Start
from tunesmith.distributed.ranks import join_ranks
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.formats import nf4, stored
from tunesmith.formats.base import FrozenWeight
from tunesmith.formats.linear import has_codes
from tunesmith.hub.model_files import read_model_files
from tunesmith.methods.base import TrainModel
from tunesmith.model import save_tensors, stored_tensors
from tunesmith.model.random_init import seed_of
from tunesmith.model.safetensors_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_into
from tunesmith.model.weights import copy_full_tensor
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.mesh_shape import possible_shapes
from tunesmith.planning.resolve import inference_plan
from tunesmith.presentation.start import trained_text
from tunesmith.training.session import make_optimizer

pytestmark = [pytest.mark.slow, pytest.mark.long]

FULL = {"adapter": {"kind": "none"}}
# 3 divides no size of the model: shards are uneven.
MESHES = {
    3: [({"shard": 3}, "fp32"), ({"shard": 3}, "bf16")],
    4: [
        ({"replicate": 2, "shard": 2}, "fp32"),
        ({"shard": 2, "tensor": 2}, "fp32"),
        ({"shard": 2, "tensor": 2}, "bf16"),
        ({"replicate": 2, "tensor": 2}, "fp32"),
    ],
}
OF_3_AND_4 = pytest.mark.parametrize("world", [3, pytest.param(4, marks=pytest.mark.nightly)])
RESIDENT = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc"
)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def resident() -> int:
    """Resident memory, from which its peak is then counted; garbage, and what malloc holds free,
    would hide as much that is taken next.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def tensor_bytes(root: TrainModel) -> int:
    """Of this rank's parts of a model. What malloc holds free after a large tensor is resident too,
    so that resident memory would hide the tensor.
    """
    tensors = [local_part(tensor) for tensor in (*root.parameters(), *root.buffers())]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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
    """Load a model on a mesh and write it as final/ has it, case by case; a piece holds 15 rows or
    so.
    """
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


def grown(model: Path, folder: Path, mesh: dict[str, int]) -> dict[str, np.ndarray]:
    """Embedding and head of a model whose tokenizer has more tokens than the checkpoint has rows."""
    stored_tensors.SLICE = stored.SLICE = 1000
    with join_ranks() as ranks:
        changes = {**FULL, "model": {"added_tokens": [f"<{i}>" for i in range(100)]}}
        _, root = built(model, folder, mesh, changes, ranks.world)
        ends = {
            "embedding": root.model.get_input_embeddings().weight,
            "head": root.model.lm_head.weight,
        }
        return {name: gathered(tensor.detach()).numpy() for name, tensor in ends.items()}


@pytest.mark.nightly
@pytest.mark.parametrize(
    "mesh", [{"shard": 3}, {"shard": 2, "tensor": 2}], ids=["uneven", "tensor"]
)
def test_rows_of_added_tokens_are_those_of_one_process(mesh, tiny, tmp_path):
    alone = grown(tiny, tmp_path, {})
    known, new = np.split(alone["embedding"], [272])
    assert len(new) > 64
    # fp32 sums of 272 rows
    np.testing.assert_allclose(new, known.mean(0)[None].repeat(len(new), 0), rtol=1e-4, atol=1e-7)
    for found in run_ranks(world_of(mesh), grown, tiny, tmp_path, mesh):
        assert all(np.array_equal(found[name], alone[name]) for name in alone)


def peaks(
    model: Path, folder: Path, mesh: dict[str, int], changes: dict[str, Any]
) -> tuple[int, int, int]:
    """Growth of this rank's resident memory at its peak: of loading and of writing final/. And the
    bytes of its tensors.
    """

    def begin() -> int:
        ranks.all_gather_object(None)
        return resident()

    with join_ranks() as ranks:
        # Code that is loaded once
        built(model.with_name("small"), folder, mesh, changes, ranks.world)
        before = begin()
        run, root = built(model, folder, mesh, changes, ranks.world)
        loading = status("VmHWM") - before
        before = begin()
        contents.write_model_files(folder if ranks.is_main_process else None, run, root, {})
        return loading, status("VmHWM") - before, tensor_bytes(root)


MIB = 1 << 20
# Of the largest tensors, embedding and head: 80 MiB in bf16, 160 in fp32
WIDTH, ROWS = 1024, 40_000


def write_models(tiny: Path, folder: Path, rows: int, columns: int = 1024) -> None:
    """`small`, and `large` with so many rows of embedding and head, in bf16; both have MLPs of so
    many columns.
    """
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": columns,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }
    for name, vocabulary in (("small", 512), ("large", rows)):
        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(**shape, vocab_size=vocabulary, num_key_value_heads=4)
            ).bfloat16()
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            # Transformers draws normal ones in fp32, for seconds
            parameter.data.uniform_(-0.1, 0.1)
        model.save_pretrained(folder / name)
        for file in tiny.glob("*token*"):
            (folder / name / file.name).write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def large(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(tiny, folder, ROWS)
    return folder / "large"


@RESIDENT
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ({"shard": 2, "tensor": 2}, FULL),
        ({"shard": 4}, {}),
        ({"shard": 4}, {"model": {"quantize": "nf4"}}),
    ],
    ids=["full, tensor", "lora", "nf4"],
)
def test_a_rank_holds_its_shard_and_one_tensor_at_most(mesh, changes, tiny, large, tmp_path):
    """16 MiB to read or to write are at hand beside the shard: less than one tensor, and no tensor
    is whole. To quantize its rows of the largest layer here to nf4 a rank took 63 to 99 MiB on a
    CPU, and 506 where it quantized the whole layer.
    """
    model, quantized = large, "model" in changes
    if quantized:
        write_models(tiny, tmp_path, ROWS // 10, 6144)
        model = tmp_path / "large"
    changes = merge(changes, {"model": {"dtype": "bf16"}})
    tensor = WIDTH * ROWS * 2
    for loading, final, held in run_ranks(4, peaks, model, tmp_path, mesh, changes):
        assert loading > held // 2, "nothing was measured"
        assert loading < held + (2 * tensor if quantized else tensor)
        assert final < tensor
    written = load_file(next(tmp_path.glob("*model.safetensors")))
    assert len(written) > 10


# ---- nf4: a rank quantizes the blocks that it holds ----

BLOCK_MESHES = {
    3: [{"shard": 3}],
    4: [{"shard": 2, "tensor": 2}, {"replicate": 2, "shard": 2}],
}


def quantized(
    model: Path, folder: Path, meshes: list[dict[str, int]]
) -> list[tuple[dict[str, Any], str]]:
    """Of each mesh: this rank's layers made dense from the whole codes, which part of the whole
    layer each is, and the bytes that were read of it; and what the start says of the model.
    """
    found, read = [], Counter[str]()
    nf4.MAX_NF4_ROUNDED_WEIGHTS = 3000  # not a multiple of a block, of a row or of a shard

    def counting(file: Any, entry: Any, memory: memoryview, offset: int = 0) -> None:
        read[entry.name] += len(memory)
        read_into(file, entry, memory, offset)

    stored_tensors.read_into = counting
    with join_ranks() as ranks:
        for mesh in meshes:
            read.clear()
            _, root = built(model, folder, mesh, {"model": {"quantize": "nf4"}}, ranks.world)
            layers = {n: m for n, m in root.model.named_modules() if has_codes(m)}
            dense = {}
            for name, layer in layers.items():
                frozen = layer.frozen_weight()
                codes = gathered(layer.weight).contiguous()
                values = FrozenWeight(
                    frozen.format, [codes, *frozen.tensors[1:]], frozen.shape
                ).dense(torch.float32)
                dense[name] = (
                    values.numpy(),
                    layer.tensor_shard and layer.tensor_shard[:3],
                    read[f"{name}.weight"],
                )
            trained = sum(p.numel() for _, p in root.trained_parameters())
            found.append((dense, trained_text(root.model, trained)))
    return found


@OF_3_AND_4
def test_ranks_quantize_the_blocks_that_they_hold_to_the_bits_of_one_process(
    world, tiny, wide, tmp_path
):
    """Of the tiny model most shards begin inside a block.

    A whole layer is read by nobody, except in copies.
    """
    pytest.importorskip("bitsandbytes")
    model, meshes = tiny if world == 3 else wide, BLOCK_MESHES[world]
    (((alone, said),),) = run_ranks(1, quantized, model, tmp_path, [{}])
    ranks = run_ranks(world, quantized, model, tmp_path, meshes)
    for mesh, (dense, line) in (
        (mesh, found[i]) for i, mesh in enumerate(meshes) for found in ranks
    ):
        assert line == said
        for name, (expected, _, size) in alone.items():
            values, cut, read = dense[name]
            parts, row = mesh.get("shard", 1), expected.shape[1]
            if cut and cut[0] == 0:  # of a part of the columns the rows are read whole
                parts *= cut[2]
            own = np.split(expected, cut[2], cut[0])[cut[1]] if cut else expected
            assert np.array_equal(values, own), f"{mesh} {name}"
            assert 0 < read <= size / parts + 2 * 4 * max(64, row), f"{mesh} {name}"


def test_a_tied_head_that_is_stored_twice_is_compared_piece_by_piece(tiny, tmp_path, monkeypatch):
    """The last row alone differs."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    monkeypatch.setattr(stored, "SLICE", 1000)
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    built(folder, tmp_path, {}, FULL, 1)
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    with refuses(ModelError, names=["lm_head.weight"], fix=["tie_word_embeddings: false"]):
        built(folder, tmp_path, {}, FULL, 1)


# ---- an adapter of which ranks hold parts ----

# Embedding and head are tied: the trained embedding is a tensor of its own, cut by the vocabulary.
ADAPTER = {"adapter": {"rank": 4, "modules_to_save": ["embed_tokens", "norm"]}}
EXPERTS = {"adapter": {"rank": 4, "target": ["experts", "q_proj"]}}
# name: model, its adapter, meshes of as many ranks
ADAPTERS: dict[str, tuple[str, dict[str, Any], list[dict[str, int]]]] = {
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
    """A checkpoint and final/ of each mesh, with values drawn by name; the bytes of adapter and
    moments that this rank then has for itself beside its own parts.
    """
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
    files = (
        ADAPTER_WEIGHTS,
        OPTIMIZER,
        f"final/{ADAPTER_WEIGHTS}",
        f"final/{ADAPTER_CONFIG}",
    )
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
    if fixture == "tiny":
        assert len(values) == 2 * 14 + 1 + 5  # A and B, the embedding, the norms
    else:
        # [out, rank * experts]
        assert (64, 4 * 8) in {tuple(value.shape) for value in values.values()}
    for size, mesh in zip(first, meshes, strict=True):
        assert size > 0 or "tensor" not in mesh
    assert others == [[0] * len(meshes)] * (world - 1)
