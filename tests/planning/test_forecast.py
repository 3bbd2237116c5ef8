"""The forecast of a run for machines that are not here: memory by hand for every layout, time, and
what hides behind what.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rows import schedule_of
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from tunesmith.errors import RecipeError
from tunesmith.host.chips import Chip
from tunesmith.loss import chunk_size
from tunesmith.model.shapes import SHAPES
from tunesmith.model.spec import adapter_parameters, flops, read_spec
from tunesmith.parallel.copies import GRADIENT_PIECE, MAX_GRADIENT_PIECES
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.forecast import Forecast, Planner, plan_on_paper
from tunesmith.planning.machines import Cluster, read_cluster
from tunesmith.planning.memory import GATHERED_LAYERS
from tunesmith.planning.step_time import EIGHT_BIT_SPEED
from tunesmith.planning.workload import measure_work
from tunesmith.presentation.plan import warning_text
from warm import run_warm

P, LAYERS, MATRICES, TABLE = 70_553_706_496, 80, 855_638_016, 128256 * 8192  # Llama 3.1 70B
NORMS = P - LAYERS * MATRICES - 2 * TABLE
MEASURED = Path(__file__).parents[2] / "docs/measurements/gpu/h200/streamed.json"
FULL = {"adapter": {"kind": "none"}, "train": {"global_batch": "16 examples", "recompute": "full"}}


def recipe(changes: dict, **parallel: int | str) -> Run:
    values = {"data": {"train": {"source": "rows.jsonl"}}, "output_dir": "out"} | changes
    values["model"] = {"name": "m", **changes.get("model", {})}
    run = from_mapping(values, where="test", base=Path.cwd())
    return replace(run, parallel=replace(run.parallel, **parallel))


def planner(
    shape: str, on: str, changes: dict, *, length: int | None = None, **parallel: int | str
) -> Planner:
    run, spec = recipe(changes, **parallel), read_spec(SHAPES[shape].config, where=shape)
    return plan_on_paper(run, spec, read_cluster(on), measure_work(run, spec, None, length))


def forecast(shape: str, on: str, mesh: tuple[int, int, int], changes: dict) -> Forecast:
    return planner(shape, on, changes).forecast(MeshShape(*mesh))


def test_full_fine_tuning_holds_fp32_shards_of_what_its_tensor_group_cuts() -> None:
    """70B over 2 shards x 8: a weight is 4 bytes, its gradient 4, its moments 8; layers are
    gathered in bf16.
    """
    memory = forecast("llama3-70b", "2x8xh100", (1, 2, 8), FULL).plan.memory
    cut = (P - NORMS) // 8 + NORMS
    # Norms are on every rank; the shares of weights and of trained parameters are rounded up.
    assert memory.weights == pytest.approx(4 * cut / 2, abs=8)
    assert memory.gradients == pytest.approx(4 * cut / 2, abs=8)
    assert memory.optimizer == pytest.approx(8 * cut / 2, abs=16)
    layer, head = MATRICES // 8, TABLE // 8
    # Of the head the weight, its gradient, and that in fp32 on its way to the shards.
    assert memory.gathered == pytest.approx(
        2 * GATHERED_LAYERS * layer + (2 + 2 * 4) * layer + (2 + 2 + 4) * head, abs=8
    )


def test_copies_trained_in_full_hold_what_one_process_holds() -> None:
    """16-bit weights and fp32 masters.

    Those that are rounded stochastically sum their gradients in pieces.
    """
    one, copies = (
        forecast("llama3-3b", "2x-dgx-spark", mesh, FULL).plan.memory
        for mesh in ((1, 1, 1), (2, 1, 1))
    )
    assert (copies.weights, copies.static, copies.gathered) == (one.weights, one.static, 0)
    rounded = FULL | {"train": FULL["train"] | {"master_weights": "stochastic"}}
    one, copies = (
        forecast("llama3-3b", "2x-dgx-spark", mesh, rounded).plan.memory
        for mesh in ((1, 1, 1), (2, 1, 1))
    )
    pieces = 4 * GRADIENT_PIECE * MAX_GRADIENT_PIECES
    assert (one.gathered, copies.gathered) == (0, pieces)
    assert copies.static - pieces == one.static


def test_a_sharded_adapter_run_shards_the_frozen_layers_alone() -> None:
    one, two, copies = (
        forecast("llama3-8b", "2x-dgx-spark", m, {}).plan.memory
        for m in ((1, 1, 1), (1, 2, 1), (2, 1, 1))
    )
    spec = read_spec(SHAPES["llama3-8b"].config, where="")
    adapter = 4 * adapter_parameters(spec, recipe({}).adapter)
    layers = spec.layer_matrices
    ends = spec.parameters - layers  # embedding, norms and head: whole on every rank
    assert (one.weights, two.weights) == (
        2 * spec.parameters + adapter,
        layers + 2 * ends + adapter,
    )
    assert (one.gradients, one.optimizer, one.copies) == (two.gradients, two.optimizer, two.copies)
    assert (two.gathered, one.gathered) == (GATHERED_LAYERS * 2 * spec.layers[0].matmul, 0)
    assert vars(copies) == vars(one), "a replica holds what one process does"


def test_tensor_parallelism_keeps_the_normed_inputs_whole() -> None:
    run = {"train": {"recompute": "none", "micro_batch": "4096 tokens"}}
    one, eight = (forecast("llama3-70b", "8xh100", (8 // t, 1, t), run).plan.memory for t in (1, 8))
    hidden, heads, wide = 8192, 128 * (64 + 2 * 8), 28672
    # The ends: the last norm's input, and the gradient of its output, which is whole. Seven
    # products of 8 numbers with A, and A and B themselves, in bf16.
    spec, products = read_spec(SHAPES["llama3-70b"].config, where=""), 7 * 8
    factors = [2 * adapter_parameters(spec, recipe({}).adapter, cut) for cut in (1, 8)]
    assert one.activations == factors[0] + 2 * 4096 * (
        LAYERS * (5 * hidden + heads + 3 * wide + products) + 2 * hidden
    )
    assert eight.activations == factors[1] + 2 * 4096 * (
        LAYERS * (2 * hidden + (3 * hidden + heads + 3 * wide) // 8 + products)
        + hidden
        + hidden // 8
    )
    chunk = min(4096, chunk_size(128256 // 8, 4096, torch.device("cuda"), card=79 << 30))
    head, backward = (2 * 2 + 4) * 128256 // 8 * chunk, 2 * (2 * wide // 8 + 3 * hidden) * 4096
    assert eight.workspace == max(head, backward)


def test_a_tensor_group_cuts_codes_and_scales_of_nf4() -> None:
    run = {"model": {"quantize": "nf4"}}
    one, eight, shards = (
        forecast("llama3-70b", "8xh100", mesh, run).plan.memory
        for mesh in ((8, 1, 1), (1, 1, 8), (1, 8, 1))
    )
    adapter = [
        4
        * adapter_parameters(
            read_spec(SHAPES["llama3-70b"].config, where=""), recipe({}).adapter, n
        )
        for n in (1, 8)
    ]
    matrices = LAYERS * MATRICES
    codes, tables, nested = (
        matrices // 2,
        2 * (P - matrices),
        matrices / 64 + matrices * 4 / (64 * 256),
    )
    assert one.weights == pytest.approx(adapter[0] + codes + tables + nested, abs=8)
    norms = 2 * NORMS * 7 / 8  # whole on every rank
    assert eight.weights == pytest.approx(
        adapter[1] + norms + (codes + tables + nested) / 8, abs=16
    )
    assert shards.weights == pytest.approx(adapter[0] + codes / 8 + tables + nested, abs=16), (
        "scales stay whole"
    )


def tensors(
    shape: str, on: str, changes: dict, *, intermediate: int = 0, **spec: object
) -> set[int]:
    """The sizes of a tensor group that `auto` may take."""
    made = planner(shape, on, changes, tensor="auto")
    layer = made.spec.layers[0]
    layer = replace(layer, intermediate=intermediate or layer.intermediate)
    changed = replace(made.spec, layers=(layer,) * made.spec.depth, **spec)
    return {mesh.tensor for mesh in replace(made, spec=changed).meshes()}


def test_the_meshes_of_a_cluster() -> None:
    found = planner("llama3-70b", "2x8xh100", {}, tensor="auto").meshes()
    assert len(found) == len({*found}) == 5 + 4 + 3 + 2  # shards of 16, 8, 4 and 2 ranks
    assert all(mesh.world == 16 and mesh.tensor <= 8 for mesh in found)
    assert found == sorted(found, key=lambda mesh: (mesh.tensor, mesh.shard)), (
        "the fewest cuts and shards first"
    )
    assert {mesh.tensor for mesh in planner("llama3-70b", "2x8xh100", {}).meshes()} == {1}, (
        "as the recipe says"
    )
    assert planner("llama3-70b", "2x8xh100", {}, tensor=8, shard=2).meshes() == [MeshShape(1, 2, 8)]
    assert planner("llama3-70b", "2x8xh100", {}, tensor="auto", shard=8, replicate=1).meshes() == [
        MeshShape(1, 8, 2)
    ]


def test_auto_cuts_what_can_be_cut_evenly() -> None:
    nf4 = {"model": {"quantize": "nf4"}}
    assert tensors("qwen3-8b", "2x8xh100", nf4) == {1, 2, 4, 8}
    # 3B has 24 heads, which 16 ranks cannot share; joined projections are not cut.
    assert tensors("llama3-3b", "16xh100", {}) == {1, 2, 4, 8}
    assert tensors("llama3-3b", "8xh100", {}, model_type="gemma2") == {1, 2, 4, 8}
    assert tensors("llama3-3b", "8xh100", {}, model_type="phi3") == {1}
    # 14336 / 8 = 1792 is 28 blocks of nf4, 28 / 8 is no whole number of them.
    assert tensors("llama3-8b", "8xh100", nf4, intermediate=1792) == {1, 2, 4}
    assert tensors("llama3-8b", "8xh100", nf4, quantized="bnb-nf4") == {1}
    assert tensors(
        "llama3-8b",
        "8xh100",
        {"train": {"optimizer_in_backward": True, "clip_norm": None}, "adapter": {"kind": "none"}},
    ) == {1}
    assert tensors("llama3-8b", "8xh100", {"model": {"quantize": "fp8"}}) == {1, 2, 4, 8}


REFUSED = {
    "does not fit 16 ranks": {"shard": 5},
    "64 attention heads, 8 key-value heads": {"tensor": 3, "world": "3xh100"},
    "8 ranks on each node cannot be divided into groups of 16": {"tensor": 16},
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mesh_that_cannot_be(text: str) -> None:
    parallel = dict(REFUSED[text])
    with pytest.raises(RecipeError, match=text) as refused:
        planner("llama3-70b", parallel.pop("world", "2x8xh100"), {}, **parallel).meshes()
    assert "auto" in refused.value.fix


def test_a_step_of_one_rank_takes_its_operations_at_the_rate_of_the_chip() -> None:
    keys = {"global_batch": "16384 tokens", "micro_batch": "16384 tokens", "recompute": "none"}
    found = forecast("llama3-8b", "h200", (1, 1, 1), {"train": keys})
    spec, run = read_spec(SHAPES["llama3-8b"].config, where=""), recipe({})
    work = flops(
        spec,
        [2048] * 8,
        16384,
        trained="lora",
        adapter_parameters=adapter_parameters(spec, run.adapter),
    )
    seconds = found.seconds
    assert seconds["products"] + seconds["attention"] == pytest.approx(work / 551e12)
    assert seconds["attention"] == pytest.approx(12 * 32 * 4096 * 8 * 2048 * 2049 / 2 / 551e12)
    assert found.step_seconds == pytest.approx(sum(seconds.values()))
    assert found.tokens_per_second == pytest.approx(16384 / sum(seconds.values()))
    again = forecast("llama3-8b", "h200", (1, 1, 1), {"train": keys | {"recompute": "full"}})
    assert again.seconds["recompute"] == pytest.approx(work / 551e12 / 3), (
        "a forward is a third of both passes"
    )
    eight_bit = forecast(
        "llama3-8b", "h200", (1, 1, 1), {"train": keys, "model": {"quantize": "fp8"}}
    )
    assert seconds["products"] / eight_bit.seconds["products"] == pytest.approx(EIGHT_BIT_SPEED)
    assert (
        forecast("llama3-8b", "a100-80gb", (1, 1, 1), {"model": {"quantize": "fp8"}}).plan.base
        == "bf16"
    )


def test_gathers_hide_behind_compute_as_far_as_they_are_shorter() -> None:
    """70B in bf16 over two Sparks: half of 137 GB each way, at 20 GB/s."""
    runs = {}
    for tokens in (512, 16384):
        keys = {
            "global_batch": f"{2 * tokens} tokens",
            "micro_batch": f"{tokens} tokens",
            "recompute": "full",
        }
        runs[tokens] = forecast(
            "llama3-70b",
            "2x-dgx-spark",
            (1, 2, 1),
            {"train": keys, "data": {"train": {"source": "r.jsonl"}, "seq_len": 512}},
        )
    # Half of each layer goes over the cable; embedding and head are whole.
    gather = LAYERS * 2 * MATRICES / 2 / 20e9
    long, short = runs[16384], runs[512]
    assert long.seconds["shards"] == 0
    # In each pass all layers are read and written once.
    assert long.seconds["shard copies"] == pytest.approx(2 * LAYERS * 2 * 2 * MATRICES / 226e9)
    assert short.seconds["shard copies"] == long.seconds["shard copies"]
    forward = (short.seconds["products"] + short.seconds["attention"]) / 3
    exposed = (gather - forward) + max(0, gather - 3 * forward)
    assert short.seconds["shards"] == pytest.approx(exposed)
    assert short.hides_from == pytest.approx(512 * gather / forward, abs=1)


# Cases of streamed.json, their shape, layers and tolerance. Matrices of the 70B run faster than those
# of the 8B, which the rate of whole steps is from.
STREAMED = {
    "plain resident": ("llama3-8b", 32, "none", 0.05),
    "8b resident": ("llama3-8b", 32, "full", 0.05),
    "70b streamed": ("llama3-70b", 48, "full", 0.1),
}


@pytest.mark.parametrize("case", STREAMED)
def test_steps_with_layers_from_the_host_take_what_an_h200_took(case: str) -> None:
    shape, depth, recompute, tolerance = STREAMED[case]
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))[case][0]
    tokens = f"{measured['micro_batch']} tokens"  # a row is padded to so many
    keys = {"global_batch": tokens, "micro_batch": tokens}
    run = recipe({"train": keys | {"recompute": recompute}})
    spec = read_spec(SHAPES[shape].config | {"num_hidden_layers": depth}, where=shape)
    work = measure_work(run, spec, None, 2017)
    found = plan_on_paper(run, spec, read_cluster("h200"), work).forecast(MeshShape())
    assert found.step_seconds == pytest.approx(min(measured["step_seconds"][1:]), rel=tolerance)


def test_trained_in_full_gradients_are_reduced_in_fp32_beside_the_backward() -> None:
    """8B over two Sparks: all weights are gathered in both passes, gradients are reduced once."""
    keys = {"global_batch": "2048 tokens", "micro_batch": "1024 tokens", "recompute": "none"}
    data = {"train": {"source": "r.jsonl"}, "seq_len": 1024}
    found = forecast("llama3-8b", "2x-dgx-spark", (1, 2, 1), FULL | {"train": keys, "data": data})
    spec = read_spec(SHAPES["llama3-8b"].config, where="")
    # Half of each over the cable; no compute is beside the embedding's.
    one = spec.parameters / 2 / 20e9
    embedding = spec.head_matmul / 2 / 20e9
    beside_forward = 2 * (one - embedding)
    beside_backward = beside_forward + 4 * (one - embedding)
    compute = found.seconds["products"] + found.seconds["attention"]
    hidden = min(beside_forward, compute / 3) + min(beside_backward, 2 * compute / 3)
    assert 0 < hidden < beside_forward + beside_backward
    exposed = (2 + 4) * embedding + beside_forward + beside_backward - hidden
    assert found.seconds["shards"] == pytest.approx(exposed)
    copies = (2 * 2 * 2 + 2 + 4) * spec.parameters
    assert found.seconds["shard copies"] == pytest.approx(copies / 226e9)


def test_sums_over_each_link_take_the_time_of_their_rings() -> None:
    """70B, LoRA, 32 examples of 2,048 tokens."""
    keys = {
        "train": {"global_batch": "32 examples", "micro_batch": "4096 tokens", "recompute": "full"}
    }
    spec = read_spec(SHAPES["llama3-70b"].config, where="")
    # Over two Sparks A and B's gradients, there and back.
    adapter = 4 * adapter_parameters(spec, recipe({}).adapter)
    pair = forecast("llama3-70b", "2x-dgx-spark", (1, 2, 1), keys).seconds
    assert pair["gradients"] == pytest.approx(2 * adapter / 2 / 20e9)
    # Tensor groups stay on a node: 6 sums a layer and two more, each a scatter and a gather of 2
    # bytes a channel; what is left for the network is the adapter's gradients.
    both = forecast("llama3-70b", "2x8xh100", (2, 1, 8), keys).seconds
    here = 4 * adapter_parameters(spec, recipe({}).adapter, 8)
    sums = 2 * (6 * LAYERS + 2) * 16 * 2048 * 8192 * 2 * 7 / 8
    assert both["tensor parallel"] == pytest.approx(sums / 360e9)
    assert both["gradients"] == pytest.approx(2 * here / 2 / 40e9)


def test_a_group_is_as_fast_as_its_slowest_link() -> None:
    cluster = read_cluster("2x8xh100")
    link, network = 360e9, 40e9
    for ranks, stride, expected in (
        (8, 1, link),
        (2, 4, link),
        (2, 8, network),  # one rank of each node, through its own network card
        (4, 4, 2 * network),
        (16, 1, 8 * network),
    ):
        assert cluster.bandwidth(ranks, stride) == pytest.approx(expected)


def test_a_global_batch_that_does_not_fill_the_ranks_leaves_some_idle() -> None:
    run = {"train": {"global_batch": "4 examples"}}
    few, many = (
        forecast("llama3-8b", on, (n, 1, 1), run) for on, n in (("4xh100", 4), ("2x8xh100", 16))
    )
    assert many.seconds["products"] == few.seconds["products"]


def test_groups_over_nodes_come_first_where_they_gain() -> None:
    """70B in full, 8-bit moments, on 2 x 8: copies of 4 x 2 on a node fit, but recompute nearly all
    layers.
    """
    train = {
        "global_batch": "32768 tokens", "optimizer": "adamw-8bit", "master_weights": "stochastic", "clip_norm": None,
    }  # fmt: skip
    run = {"adapter": {"kind": "none"}, "train": train}
    made = planner("llama3-70b", "2x8xh100", run, tensor="auto")
    first, others = made.best(), map(made.forecast, made.meshes())
    assert first.plan.mesh.shard * first.plan.mesh.tensor > 8
    within_nodes = [
        f for f in others if f.fits and not f.tight and f.plan.mesh.shard * f.plan.mesh.tensor <= 8
    ]
    assert within_nodes
    assert all(first.step_seconds <= 0.95 * f.step_seconds for f in within_nodes)


def test_near_equal_meshes_stay_within_the_nodes() -> None:
    """70B, LoRA, 2 x 8: shards of all 16 ranks are as fast by the forecast as those of a node, and
    nothing is gained.
    """
    # 8 shards recompute a little
    run = {
        "train": {"global_batch": "32 examples"},
        "adapter": {"rank": 32},
    }
    made = planner("llama3-70b", "2x8xh100", run)
    shards = {mesh: made.forecast(mesh) for mesh in made.meshes()}
    over_nodes, within = shards[MeshShape(1, 16, 1)], shards[MeshShape(2, 8, 1)]
    assert over_nodes.step_seconds < within.step_seconds
    assert made.best().plan.mesh == MeshShape(2, 8, 1)


def test_without_a_speed_groups_over_nodes_come_last() -> None:
    """Shards of 8 ranks over two nodes of 4 are taken only if those of 4 do not fit."""
    run, spec = (
        recipe({"model": {"quantize": "nf4"}, "train": {"recompute": "full"}}),
        read_spec(SHAPES["llama3-70b"].config, where=""),
    )
    for gib, crosses in ((46, False), (17, True)):
        cluster = Cluster(Chip("NVIDIA Other", gib), 2, 4)
        made = plan_on_paper(run, spec, cluster, measure_work(run, spec, None, None))
        best = made.best()
        assert best.fits
        assert (best.plan.mesh.shard > 4) == crosses


# Tokens of an example, data.seq_len and train.global_batch -> the batch that the warning names, or
# None.
EXPOSED: dict[tuple[int, int, str], str | None] = {
    (180, 2048, "4 examples"): "24 examples",
    (180, 2048, "32 examples"): None,
    (2048, 2048, "4 examples"): None,
    (512, 512, "1024 tokens"): "4096 tokens",
}


@pytest.mark.parametrize(("length", "seq_len", "batch"), EXPOSED)
def test_a_share_too_short_to_hide_the_gathers_is_named_with_the_batch_that_hides_them(
    length: int, seq_len: int, batch: str
) -> None:
    """70B, LoRA, two Sparks. With the batch that the warning names, nothing is left to warn of."""
    wanted = EXPOSED[length, seq_len, batch]
    data = {"data": {"train": {"source": "rows.jsonl"}, "seq_len": seq_len}}
    made = planner(
        "llama3-70b", "2x-dgx-spark", data | {"train": {"global_batch": batch}}, length=length
    )
    best = made.best()
    warning = made.find_short_steps(best)
    if wanted is None:
        assert warning is None
        assert made.choose().warnings == ()
        return
    assert warning is not None
    assert f"train.global_batch='{wanted}'" in warning_text(made.run, best.plan, warning)
    assert made.choose().warnings == (warning,), "train prints it"
    larger = planner(
        "llama3-70b", "2x-dgx-spark", data | {"train": {"global_batch": wanted}}, length=length
    )
    mended = larger.best()
    assert larger.find_short_steps(mended) is None
    assert mended.tokens_per_second > 1.5 * best.tokens_per_second


def test_replicas_are_taken_where_shards_gain_little() -> None:
    """Two Sparks with a model that each of them holds."""
    # The sum of the gradients is a large part of a step
    few = FULL | {"train": {"global_batch": "8 examples"}}
    for shape, changes in (("llama3-8b", {}), ("llama3-3b", FULL), ("llama3-3b", few)):
        found = planner(shape, "2x-dgx-spark", changes).best()
        assert found.plan.mesh == MeshShape(2, 1, 1)
        assert found.fits
    assert planner("llama3-70b", "2x-dgx-spark", {}).best().plan.mesh == MeshShape(1, 2, 1)


def test_a_larger_micro_batch_is_taken_where_it_spares_gathers() -> None:
    """Two Sparks gather 70B over the cable in each pass; one that holds it in nf4 reads it alone."""
    run = {"train": {"global_batch": "32 examples", "recompute": "full"}}
    slow = planner("llama3-70b", "2x-dgx-spark", run).forecast(MeshShape(1, 2, 1))
    for tokens in (2048, 4096, 8192):
        train = run["train"] | {"micro_batch": f"{tokens} tokens"}
        named = planner("llama3-70b", "2x-dgx-spark", {"train": train}).forecast(slow.plan.mesh)
        assert named.step_seconds >= slow.step_seconds


def test_what_does_not_fit_comes_last_and_has_its_savings() -> None:
    made = planner("llama3-70b", "dgx-spark", {})
    nearest = made.best()
    assert not nearest.fits
    assert "model.quantize=nf4" in nearest.plan.less_memory()
    nf4 = planner("llama3-70b", "dgx-spark", {"model": {"quantize": "nf4"}}).best()
    assert nf4.fits
    assert nf4.phases["save"] - nf4.phases["step"] == 12 * made.trained


def test_without_tokens_examples_are_as_long_as_said() -> None:
    """In steps the duration is known, in epochs it is not."""
    short = planner("llama3-8b", "h200", {"train": {"duration": "10 steps"}}, length=100)
    assert (short.work.step.mean, short.work.longest, short.work.steps) == (6400, 100, 10)
    found = short.forecast(MeshShape())
    assert found.hours == pytest.approx(10 * found.step_seconds / 3600)
    filled = planner("llama3-8b", "h200", {})
    assert (filled.work.step.mean, filled.forecast(MeshShape()).hours) == (64 * 2048, None)
    assert (
        planner("llama3-8b", "h200", {"train": {"duration": "2 h"}}).forecast(MeshShape()).hours
        == 2
    )


WITHOUT_TRANSFORMERS = """
import sys
others = {"transformers", "datasets", "peft"}
for name in [name for name in sys.modules if name.partition(".")[0] in {"tunesmith", *others}]:
    del sys.modules[name]
sys.modules |= dict.fromkeys(others)  # an import of them fails
import tunesmith.planning.forecast
"""


def test_a_forecast_needs_no_transformers() -> None:
    done = run_warm([], program=WITHOUT_TRANSFORMERS)
    assert done.returncode == 0, done.stderr


def test_the_lengths_of_real_examples_count() -> None:
    from types import SimpleNamespace

    run, spec = (
        recipe({"train": {"global_batch": "4 examples"}}),
        read_spec(SHAPES["llama3-8b"].config, where=""),
    )
    lengths = np.array([100, 200, 300, 400] * 10)
    counts = SimpleNamespace(supervised=int(lengths.sum()) // 2)
    tokens = SimpleNamespace(
        lengths=lengths,
        shared=np.zeros_like(lengths),
        row_lengths=lengths,
        document_lengths=lambda: lengths,
        longest_sequences=lengths,
        has_pairs=False,
        repeats=np.ones(len(lengths)),
        counts=counts,
    )
    work = measure_work(run, spec, tokens, None)  # type: ignore[arg-type]
    assert (work.step.mean, work.longest, work.steps) == (1000, 400, 10)
    assert work.operations < measure_work(run, spec, None, 400).operations, (
        "half of the positions have a label"
    )
    tokens.shared = lengths // 4
    tokens.row_lengths = lengths - tokens.shared
    once = measure_work(run, spec, tokens, None)  # type: ignore[arg-type]
    assert (once.step.mean, once.longest, once.steps) == (750, 400, 10)
    assert once.whole == pytest.approx(4 / 3)
    # The positions with a label are as many, and so a token that is computed costs more.
    assert 0.75 < 0.75 * once.operations / work.operations < 0.85


@pytest.mark.parametrize("batch", ["64 examples", "5000 examples", "16384 tokens"])
@pytest.mark.parametrize("duration", ["3 epochs", "0.5 epochs", "2.25 epochs"])
def test_rows_of_one_length_make_the_steps_of_their_schedule(batch: str, duration: str) -> None:
    """Without a list of them, so that a billion rows are planned as fast as ten."""
    run = recipe({"train": {"global_batch": batch, "duration": duration}})
    spec = read_spec(SHAPES["llama3-8b"].config, where="")
    schedule = schedule_of(np.full(1003, 300), run.data, run.train)
    work = measure_work(run, spec, None, 300, rows=1003)
    assert (work.step, work.steps) == (schedule.step_size(), schedule.steps(run.train.duration))
    assert work.longest == schedule.longest
    many = measure_work(run, spec, None, 300, rows=10**9)
    assert many.steps is not None
    assert many.steps > 10**4


def test_a_base_in_fp8_takes_half_from_the_start() -> None:
    dense, fp8 = (
        forecast("llama3-8b", "h200", (1, 1, 1), {"model": {"quantize": q}})
        for q in ("none", "fp8")
    )
    spec = read_spec(SHAPES["llama3-8b"].config, where="test")
    assert dense.plan.memory.weights - fp8.plan.memory.weights == spec.layer_matrices
    shards = [
        forecast("llama3-70b", "2x8xh100", (1, 16, 1), {"model": {"quantize": q}})
        for q in ("none", "fp8")
    ]
    copied = [one.seconds["shard copies"] for one in shards]
    assert copied[1] / copied[0] == pytest.approx(0.5)


def test_a_base_in_fp8_is_never_dense() -> None:
    """70B is 141 GB in bf16, more than a Spark has."""
    found = forecast("llama3-70b", "dgx-spark", (1, 1, 1), {"model": {"quantize": "fp8"}})
    assert max(found.phases.values()) < found.room < 141e9
    assert found.fits
