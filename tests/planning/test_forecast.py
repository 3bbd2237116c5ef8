"""The forecast of a run for machines that are not here, by hand: memory and time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from errors import refuses
from rows import schedule_of
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from tunesmith.errors import RecipeError
from tunesmith.loss import chunk_size
from tunesmith.model.arch.shapes import SHAPES
from tunesmith.model.arch.spec import ModelSpec, adapter_parameters, flops, read_spec
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.forecast import Forecast, Planner, plan_on_paper
from tunesmith.planning.machines import read_cluster
from tunesmith.planning.memory import GATHERED_LAYERS
from tunesmith.planning.step_time import EIGHT_BIT_SPEED
from tunesmith.planning.workload import measure_work

P, LAYERS, MATRICES, TABLE = 70_553_706_496, 80, 855_638_016, 128256 * 8192  # Llama 3.1 70B
NORMS = P - LAYERS * MATRICES - 2 * TABLE
MEASURED = Path(__file__).parents[2] / "docs/measurements/gpu/h200/streamed.json"
FULL = {"adapter": {"kind": "none"}, "train": {"global_batch": "16 examples", "recompute": "full"}}


def spec_of(shape: str) -> ModelSpec:
    return read_spec(SHAPES[shape].config, where=shape)


def recipe(changes: dict, **parallel: int | str) -> Run:
    values = {"data": {"train": {"source": "rows.jsonl"}}, "output_dir": "out"} | changes
    values["model"] = {"name": "m", **changes.get("model", {})}
    run = from_mapping(values, where="test", base=Path.cwd())
    return replace(run, parallel=replace(run.parallel, **parallel))


def planner(
    shape: str, on: str, changes: dict, *, length: int | None = None, **parallel: int | str
) -> Planner:
    run, spec = recipe(changes, **parallel), spec_of(shape)
    return plan_on_paper(run, spec, read_cluster(on), measure_work(run, spec, None, length))


def forecast(shape: str, on: str, mesh: tuple[int, int, int], changes: dict) -> Forecast:
    return planner(shape, on, changes).forecast(MeshShape(*mesh))


def test_full_fine_tuning_holds_fp32_shards_of_what_its_tensor_group_cuts() -> None:
    """70B over 2 shards x 8: a weight and its gradient are 4 bytes each, its moments 8."""
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


def test_a_sharded_adapter_run_shards_the_frozen_layers_alone() -> None:
    meshes = ((1, 1, 1), (1, 2, 1), (2, 1, 1))
    one, two, copies = (forecast("llama3-8b", "2x-dgx-spark", m, {}).plan.memory for m in meshes)
    spec = spec_of("llama3-8b")
    adapter = 4 * adapter_parameters(spec, recipe({}).adapter)
    layers = spec.layer_matrices
    ends = spec.parameters - layers  # embedding, norms and head: whole on every rank
    assert one.weights == 2 * spec.parameters + adapter
    assert two.weights == layers + 2 * ends + adapter
    assert (one.gradients, one.optimizer, one.copies) == (two.gradients, two.optimizer, two.copies)
    assert (two.gathered, one.gathered) == (GATHERED_LAYERS * 2 * spec.layers[0].matmul, 0)
    assert vars(copies) == vars(one), "a replica holds what one process does"


def test_tensor_parallelism_keeps_the_normed_inputs_whole() -> None:
    run = {"train": {"recompute": "none", "micro_batch": "4096 tokens"}}
    one, eight = (forecast("llama3-70b", "8xh100", (8 // t, 1, t), run).plan.memory for t in (1, 8))
    hidden, heads, wide = 8192, 128 * (64 + 2 * 8), 28672
    # The ends: the last norm's input, and the gradient of its output, which is whole. Seven
    # products of 8 numbers with A, and A and B themselves, in bf16.
    spec, products = spec_of("llama3-70b"), 7 * 8
    factors = [2 * adapter_parameters(spec, recipe({}).adapter, cut) for cut in (1, 8)]
    assert one.activations == factors[0] + 2 * 4096 * (
        LAYERS * (5 * hidden + heads + 3 * wide + products) + 2 * hidden
    )
    ends = hidden + hidden // 8
    assert eight.activations == factors[1] + 2 * 4096 * (
        LAYERS * (2 * hidden + (3 * hidden + heads + 3 * wide) // 8 + products) + ends
    )
    chunk = min(4096, chunk_size(128256 // 8, 4096, torch.device("cuda"), card=79 << 30))
    head, backward = (2 * 2 + 4) * 128256 // 8 * chunk, 2 * (2 * wide // 8 + 3 * hidden) * 4096
    assert eight.workspace == max(head, backward)


def test_a_tensor_group_cuts_codes_and_scales_of_nf4() -> None:
    run = {"model": {"quantize": "nf4"}}
    meshes = ((8, 1, 1), (1, 1, 8), (1, 8, 1))
    one, eight, shards = (forecast("llama3-70b", "8xh100", m, run).plan.memory for m in meshes)
    spec = spec_of("llama3-70b")
    adapter = [4 * adapter_parameters(spec, recipe({}).adapter, cut) for cut in (1, 8)]
    matrices = LAYERS * MATRICES
    codes, tables = matrices // 2, 2 * (P - matrices)
    nested = matrices / 64 + matrices * 4 / (64 * 256)
    assert one.weights == pytest.approx(adapter[0] + codes + tables + nested, abs=8)
    norms = 2 * NORMS * 7 / 8  # whole on every rank
    cut = (codes + tables + nested) / 8
    assert eight.weights == pytest.approx(adapter[1] + norms + cut, abs=16)
    # Scales stay whole.
    assert shards.weights == pytest.approx(adapter[0] + codes / 8 + tables + nested, abs=16)


def test_the_meshes_of_a_cluster() -> None:
    found = planner("llama3-70b", "2x8xh100", {}, tensor="auto").meshes()
    assert len(found) == len({*found}) == 5 + 4 + 3 + 2  # shards of 16, 8, 4 and 2 ranks
    assert all(mesh.world == 16 and mesh.tensor <= 8 for mesh in found)
    # The fewest cuts and shards first
    assert found == sorted(found, key=lambda mesh: (mesh.tensor, mesh.shard))
    assert {mesh.tensor for mesh in planner("llama3-70b", "2x8xh100", {}).meshes()} == {1}
    given = planner("llama3-70b", "2x8xh100", {}, tensor="auto", shard=8, replicate=1)
    assert given.meshes() == [MeshShape(1, 8, 2)]
    with refuses(RecipeError, names=[16], fix=["auto"]):
        planner("llama3-70b", "2x8xh100", {}, shard=5).meshes()


NF4 = {"model": {"quantize": "nf4"}}
RL = {"method": {"name": "grpo", "reward": "exact"}, "data": {"train": {"source": "rows.jsonl"}}}
# Shape, machines, recipe, other facts of the model, and the sizes that a tensor group may have.
CUTS: list[tuple[str, str, dict, dict, set[int]]] = [
    # 24 heads, which 16 ranks cannot share; joined projections are not cut.
    ("llama3-3b", "16xh100", {}, {}, {1, 2, 4, 8}),
    ("llama3-3b", "8xh100", {}, {"model_type": "phi3"}, {1}),
    # 14336 / 8 = 1792 is 28 blocks of nf4, 28 / 8 is no whole number of them.
    ("llama3-8b", "8xh100", NF4, {"intermediate": 1792}, {1, 2, 4}),
    ("llama3-8b", "8xh100", {"model": {"quantize": "fp8"}}, {}, {1, 2, 4, 8}),
    # Ranks of a tensor group would draw tokens from their own parts of the vocabulary.
    ("llama3-70b", "8xh100", RL, {}, {1}),
]


@pytest.mark.parametrize(("shape", "on", "changes", "facts", "sizes"), CUTS)
def test_auto_cuts_what_can_be_cut_evenly(shape, on, changes, facts, sizes) -> None:
    made = planner(shape, on, changes, tensor="auto")
    layer = made.spec.layers[0]
    layer = replace(layer, intermediate=facts.pop("intermediate", layer.intermediate))
    spec = replace(made.spec, layers=(layer,) * made.spec.depth, **facts)
    assert {mesh.tensor for mesh in replace(made, spec=spec).meshes()} == sizes


def test_a_step_of_one_rank_takes_its_operations_at_the_rate_of_the_chip() -> None:
    keys = {"global_batch": "16384 tokens", "micro_batch": "16384 tokens", "recompute": "none"}
    found = forecast("llama3-8b", "h200", (1, 1, 1), {"train": keys})
    spec, run = spec_of("llama3-8b"), recipe({})
    factors = adapter_parameters(spec, run.adapter)
    work = flops(spec, [2048] * 8, 16384, trained="lora", adapter_parameters=factors)
    seconds = found.seconds
    assert seconds["matmuls"] + seconds["attention"] == pytest.approx(work / 551e12)
    assert seconds["attention"] == pytest.approx(12 * 32 * 4096 * 8 * 2048 * 2049 / 2 / 551e12)
    assert found.step_seconds == pytest.approx(sum(seconds.values()))
    assert found.tokens_per_second == pytest.approx(16384 / sum(seconds.values()))
    again = forecast("llama3-8b", "h200", (1, 1, 1), {"train": keys | {"recompute": "full"}})
    assert again.seconds["recompute"] == pytest.approx(work / 551e12 / 3)  # a forward
    fp8 = {"model": {"quantize": "fp8"}}
    eight_bit = forecast("llama3-8b", "h200", (1, 1, 1), {"train": keys} | fp8)
    assert seconds["matmuls"] / eight_bit.seconds["matmuls"] == pytest.approx(EIGHT_BIT_SPEED)
    assert forecast("llama3-8b", "a100-80gb", (1, 1, 1), fp8).plan.base == "bf16"


def test_gathers_hide_behind_compute_as_far_as_they_are_shorter() -> None:
    """70B in bf16 over two Sparks: half of 137 GB each way, at 20 GB/s."""
    runs = {}
    data = {"train": {"source": "r.jsonl"}, "seq_len": 512}
    for tokens in (512, 16384):
        keys = {"global_batch": f"{2 * tokens} tokens", "micro_batch": f"{tokens} tokens"}
        changes = {"train": keys | {"recompute": "full"}, "data": data}
        runs[tokens] = forecast("llama3-70b", "2x-dgx-spark", (1, 2, 1), changes)
    # Half of each layer goes over the cable; embedding and head are whole.
    gather = LAYERS * 2 * MATRICES / 2 / 20e9
    long, short = runs[16384], runs[512]
    assert long.seconds["shards"] == 0
    # In each pass all layers are read and written once.
    assert long.seconds["shard copies"] == pytest.approx(2 * LAYERS * 2 * 2 * MATRICES / 226e9)
    assert short.seconds["shard copies"] == long.seconds["shard copies"]
    forward = (short.seconds["matmuls"] + short.seconds["attention"]) / 3
    exposed = (gather - forward) + max(0, gather - 3 * forward)
    assert short.seconds["shards"] == pytest.approx(exposed)
    assert short.hides_from == pytest.approx(512 * gather / forward, abs=1)


# Cases of streamed.json, their shape, layers and tolerance. Matrices of the 70B run faster than those
# of the 8B, which the rate of whole steps is from.
STREAMED = {
    "plain resident": ("llama3-8b", 32, "none", 0.05),
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


def test_without_tokens_examples_are_as_long_as_said() -> None:
    short = planner("llama3-8b", "h200", {"train": {"duration": "10 steps"}}, length=100)
    assert (short.work.step.mean, short.work.longest, short.work.steps) == (6400, 100, 10)
    found = short.forecast(MeshShape())
    assert found.hours == pytest.approx(10 * found.step_seconds / 3600)
    filled = planner("llama3-8b", "h200", {})
    assert (filled.work.step.mean, filled.forecast(MeshShape()).hours) == (64 * 2048, None)


def test_the_lengths_of_real_examples_count() -> None:
    run, spec = recipe({"train": {"global_batch": "4 examples"}}), spec_of("llama3-8b")
    lengths = np.array([100, 200, 300, 400] * 10)
    tokens = SimpleNamespace(
        lengths=lengths, shared=np.zeros_like(lengths), row_lengths=lengths, has_pairs=False,
        document_lengths=lambda: lengths, longest_sequences=lengths, repeats=np.ones(40),
        counts=SimpleNamespace(supervised=int(lengths.sum()) // 2),
    )  # fmt: skip
    work = measure_work(run, spec, tokens, None)  # type: ignore[arg-type]
    assert (work.step.mean, work.longest, work.steps) == (1000, 400, 10)
    longer = measure_work(run, spec, None, 400)
    assert work.operations < longer.operations, "half of the positions have a label"
    tokens.shared = lengths // 4  # computed once for both answers of a pair
    tokens.row_lengths = lengths - tokens.shared
    once = measure_work(run, spec, tokens, None)  # type: ignore[arg-type]
    assert (once.step.mean, once.longest, once.steps) == (750, 400, 10)
    assert once.whole == pytest.approx(4 / 3)


def mixture() -> ModelSpec:
    """Llama 3.1 8B with 64 experts of 1,024 channels beside its MLP, 4 of them for each token."""
    spec = read_spec(SHAPES["llama3-8b"].config, where="test")
    of_expert = 3 * 4096 * 1024
    more = {"experts": 64 * of_expert, "expert_count": 64, "experts_per_token": 4}
    layers = tuple(
        replace(layer, active=layer.matmul + 4 * of_expert, **more) for layer in spec.layers
    )
    return replace(spec, layers=layers, parameters=spec.parameters + 32 * 64 * of_expert)


def forecast_mixture(recompute: str, tokens: int) -> Forecast:
    train = {"micro_batch": f"{tokens} tokens", "recompute": recompute}
    run = recipe(
        {"model": {"dtype": "bf16"}, "train": train | {"global_batch": f"{tokens} tokens"}}
    )
    work = measure_work(run, mixture(), None)
    return plan_on_paper(run, mixture(), read_cluster("dgx-spark"), work).forecast(MeshShape())


def test_a_step_of_a_mixture_by_hand() -> None:
    tokens = 8192
    kept, again = forecast_mixture("none", tokens), forecast_mixture("full", tokens)
    active = 32 * 4 * 3 * 4096 * 1024
    # Five rows of the hidden width for each of four experts, and 17 of the MLP's.
    rows = 32 * (4 * 5 * 4096 + 17 * 14336)
    # 512 rows an expert, and half a tile more; products alone reach 700 where steps reach 551.
    rate = 55e12 * 1.27
    assert kept.seconds["experts"] == pytest.approx(4 * active * tokens / rate * (1 + 64 / 512))
    assert kept.seconds["copies for experts"] == pytest.approx(tokens * rows * 2 / 226e9)
    products = kept.seconds["matmuls"] + kept.seconds["attention"]
    dense = mixture().active - active + mixture().head_matmul
    assert products * 55e12 / tokens > 4 * dense
    # All 64 experts are read in the forward, in the backward, and where layers recompute once more.
    once = 2 * (16 * active + mixture().linear_matrices) / 226e9
    assert kept.seconds["launch overhead"] == pytest.approx(2 * once)
    assert again.seconds["launch overhead"] == pytest.approx(3 * once)


@pytest.mark.parametrize(
    ("batch", "duration"),
    [("64 examples", "2.25 epochs"), ("5000 examples", "3 epochs"), ("16384 tokens", "0.5 epochs")],
)
def test_rows_of_one_length_make_the_steps_of_their_schedule(batch: str, duration: str) -> None:
    """Without a list of them, so that a billion rows are planned as fast as ten."""
    run = recipe({"train": {"global_batch": batch, "duration": duration}})
    spec = spec_of("llama3-8b")
    schedule = schedule_of(np.full(1003, 300), run.data, run.train)
    work = measure_work(run, spec, None, 300, rows=1003)
    assert (work.step, work.steps) == (schedule.step_size(), schedule.steps(run.train.duration))
    assert work.longest == schedule.longest
    many = measure_work(run, spec, None, 300, rows=10**9)
    assert many.steps is not None
    assert many.steps > 10**4
