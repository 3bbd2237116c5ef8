"""Experts over ranks in a plan: memory and traffic by hand, when it is chosen, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from errors import holds, refuses
from tunesmith.config.load import from_mapping
from tunesmith.errors import RecipeError
from tunesmith.model.measured_spec import model_spec
from tunesmith.parallel.mesh import meshes_for
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.forecast import Planner, measure_work, plan_on_paper
from tunesmith.planning.machines import read_cluster

LAYERS, EXPERTS, HIDDEN, WIDTH, RANK = 2, 128, 2048, 768, 8
STACKS = 3 * EXPERTS * HIDDEN * WIDTH  # parameters of a layer
FACTORS = EXPERTS * RANK * ((HIDDEN + 2 * WIDTH) + (WIDTH + HIDDEN))  # A and B of a layer
# The layers of Qwen3-30B-A3B, two of 48.
CONFIG = Qwen3MoeConfig(
    vocab_size=32_000,
    hidden_size=HIDDEN,
    moe_intermediate_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=EXPERTS,
    num_experts_per_tok=8,
)
COPIES, DIVIDED = MeshShape(2), MeshShape(2, experts=2)


def planner(gib: float, on: str = "2x-dgx-spark", **changes: Any) -> Planner:
    values = {"data": {"train": {"source": "rows.jsonl"}}, "output_dir": "out", **changes}
    run = from_mapping({"model": {"name": "m"}, **values}, where="test", base=Path.cwd())
    spec = model_spec(CONFIG.to_dict(), where="test")
    cluster = read_cluster(on)
    cluster = replace(cluster, chip=replace(cluster.chip, gib=gib))
    return plan_on_paper(run, spec, cluster, measure_work(run, spec, None))


def test_a_rank_holds_its_experts_and_their_adapter_alone() -> None:
    plans = planner(100.0)
    copies, divided = plans.forecast(COPIES), plans.forecast(DIVIDED)
    experts, factors = LAYERS * STACKS // 2, LAYERS * FACTORS // 2
    saved = copies.plan.memory.weights - divided.plan.memory.weights
    assert saved == 2 * experts + 4 * factors
    assert copies.plan.memory.optimizer - divided.plan.memory.optimizer == 8 * factors
    # Each rank sends one of two halves: its hidden states and sums, forward and backward, in bf16,
    # and the gradients of what is not divided, in fp32.
    recomputed = divided.plan.recomputed_layers
    rows = (4 * LAYERS + 2 * recomputed) * plans.work.step.mean / 2 * HIDDEN * 2
    gradients = 4 * 2 * (plans.trained - LAYERS * FACTORS) / 2
    assert divided.sent["network"] == pytest.approx(rows + gradients)


def test_a_tensor_group_divides_attention_and_keeps_experts_whole() -> None:
    plans = planner(100.0, "2xh100")
    copies, cut = plans.forecast(COPIES), plans.forecast(MeshShape(1, 1, 2))
    attention, router = 2 * HIDDEN * (32 + 4) * 128, EXPERTS * HIDDEN
    tables = 2 * 32_000 * HIDDEN
    halves = (LAYERS * (attention + router) + tables) // 2
    assert copies.plan.memory.weights - cut.plan.memory.weights == 2 * halves
    assert copies.plan.memory.optimizer == cut.plan.memory.optimizer
    # Half of the hidden states and sums of attention alone, in bf16, of the embedding and the head,
    # and of the gradients of the experts' adapter, in fp32.
    sums = 2 * LAYERS + cut.plan.recomputed_layers + 2
    rows = 2 * sums * plans.work.step.mean / 2 * HIDDEN * 2
    assert cut.sent["link"] == pytest.approx(rows + 4 * 2 * LAYERS * FACTORS / 2)


def test_experts_are_divided_where_copies_do_not_fit_and_shards_move_more() -> None:
    plan = planner(3.0).choose()
    assert plan.mesh.experts == 2
    assert holds(plan.why["mesh"], "2 ranks", "0.03 GB", "1.21 GB")
    assert planner(100.0).choose().mesh == COPIES
    # As the recipe says, whatever is faster.
    assert planner(100.0, parallel={"experts": 2}).choose().mesh.experts == 2
    shards = planner(100.0, parallel={"shard": 2, "experts": 1}).choose()
    assert shards.mesh == MeshShape(1, 2)


@pytest.mark.parametrize(
    ("changes", "ranks", "where"),
    [
        ({"parallel": {"experts": 3}}, 3, "parallel.experts"),
        ({"parallel": {"experts": 4}}, 2, "parallel"),
        ({"parallel": {"experts": 2}, "adapter": {"kind": "none"}}, 2, "parallel.experts"),
        (
            {"parallel": {"experts": 2}, "adapter": {"modules_to_save": ["experts"]}},
            2,
            "parallel.experts",
        ),
        ({"parallel": {"experts": 2}, "train": {"optimizer": "adamw-8bit"}}, 2, "train.optimizer"),
        ({"parallel": {"experts": 2}, "train": {"cpu_offload": ["parameters"]}}, 2,
         "train.cpu_offload"),
        ({"parallel": {"tensor": 2, "experts": 2}}, 4, "parallel.experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused(changes: dict[str, Any], ranks: int, where: str) -> None:
    made = planner(100.0, **changes)
    with pytest.raises(RecipeError) as caught:
        meshes_for(made.run, made.spec, ranks, ranks)
    assert caught.value.where == where
    assert caught.value.fix


def test_a_dense_model_has_none_to_divide() -> None:
    made = planner(100.0, parallel={"experts": 2})
    dense = tuple(replace(layer, experts=0, expert_count=0) for layer in made.spec.layers)
    with refuses(
        RecipeError,
        where="parallel.experts",
        names=[made.spec.model_type],
        fix=["parallel.experts=1"],
    ):
        meshes_for(made.run, replace(made.spec, layers=dense), 2, 1)
