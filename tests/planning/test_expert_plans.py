"""A mixture over ranks in a plan: memory and traffic by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from tunesmith.config.load import from_mapping
from tunesmith.model.measured_spec import model_spec
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.forecast import Planner, plan_on_paper
from tunesmith.planning.machines import read_cluster
from tunesmith.planning.workload import measure_work

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
COPIES = MeshShape(2)


def planner(gib: float, on: str = "2x-dgx-spark", **changes: Any) -> Planner:
    values = {"data": {"train": {"source": "rows.jsonl"}}, "output_dir": "out", **changes}
    run = from_mapping({"model": {"name": "m"}, **values}, where="test", base=Path.cwd())
    spec = model_spec(CONFIG.to_dict(), where="test")
    cluster = read_cluster(on)
    cluster = replace(cluster, chip=replace(cluster.chip, gib=gib))
    return plan_on_paper(run, spec, cluster, measure_work(run, spec, None))


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
    link = 360e9
    assert cut.seconds["tensor parallel"] == pytest.approx(rows / link)
    assert cut.seconds["gradients"] == pytest.approx(4 * 2 * LAYERS * FACTORS / 2 / link)
