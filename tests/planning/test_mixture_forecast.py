"""The forecast of a mixture of experts, by hand: products, copies of tokens, reads of all experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from tunesmith.model.shapes import SHAPES
from tunesmith.model.spec import ModelSpec, read_spec
from tunesmith.parallel.mesh_shape import ONE
from tunesmith.planning.forecast import Forecast, plan_on_paper
from tunesmith.planning.machines import read_cluster
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.step_time import Step
from tunesmith.planning.workload import measure_work


def mixture() -> ModelSpec:
    """Llama 3.1 8B with 64 experts of 1,024 channels beside its MLP, 4 of them for each token."""
    spec = read_spec(SHAPES["llama3-8b"].config, where="test")
    of_expert = 3 * 4096 * 1024
    layers = tuple(
        replace(
            layer,
            experts=64 * of_expert,
            expert_count=64,
            experts_per_token=4,
            active=layer.matmul + 4 * of_expert,
        )
        for layer in spec.layers
    )
    return replace(spec, layers=layers, parameters=spec.parameters + 32 * 64 * of_expert)


def recipe(quantize: str = "none", **train: str) -> Run:
    values = {
        "model": {"name": "m", "dtype": "bf16", "quantize": quantize},
        "data": {"train": {"source": "rows.jsonl"}},
        "train": train,
        "output_dir": "out",
    }
    return from_mapping(values, where="test", base=Path.cwd())


def forecast(recompute: str, tokens: int) -> Forecast:
    batch = f"{tokens} tokens"
    run = recipe(global_batch=batch, micro_batch=batch, recompute=recompute)
    spec = mixture()
    work = measure_work(run, spec, None)
    return plan_on_paper(run, spec, read_cluster("dgx-spark"), work).forecast(ONE)


def test_a_step_of_a_mixture_by_hand() -> None:
    tokens = 8192
    kept, again = forecast("none", tokens), forecast("full", tokens)
    active = 32 * 4 * 3 * 4096 * 1024
    # Five rows of the hidden width for each of four experts, and 17 of the MLP's.
    rows = 32 * (4 * 5 * 4096 + 17 * 14336)
    # 512 rows an expert, and half a tile more; products alone reach 700 where steps reach 551.
    rate = 55e12 * 1.27
    assert kept.seconds["experts"] == pytest.approx(4 * active * tokens / rate * (1 + 64 / 512))
    assert kept.seconds["copies for experts"] == pytest.approx(tokens * rows * 2 / 226e9)
    products = kept.seconds["products"] + kept.seconds["attention"]
    dense = mixture().active - active + mixture().head_matmul
    assert products * 55e12 / tokens > 4 * dense
    # All 64 experts are read in the forward, in the backward, and where layers recompute once more.
    once = 2 * (16 * active + mixture().linear_matrices) / 226e9
    assert kept.seconds["fixed cost of passes"] == pytest.approx(2 * once)
    assert again.seconds["fixed cost of passes"] == pytest.approx(3 * once)


def test_codes_are_made_dense_in_both_passes() -> None:
    """nf4: half a byte and a scale of 64 weights in fp32 are read, 16 bits written and read."""
    figures = {}
    for quantize in ("none", "nf4"):
        run = recipe(quantize)
        work = measure_work(run, mixture(), None)
        planner = plan_on_paper(run, mixture(), read_cluster("dgx-spark"), work)
        estimator = MemoryEstimator(run, mixture(), planner.machine, 0)
        step = Step(estimator, planner.cluster, work, estimator.estimate(2048), one_shape=False)
        figures[quantize] = step.pass_bytes, estimator.base_bytes(2)
    experts = 32 * 64 * 3 * 4096 * 1024
    linears = mixture().linear_matrices
    assert figures["none"][0] == 2 * (experts + linears) * 2
    assert figures["nf4"][0] == 2 * experts * (0.5 + 4 / 64 + 2 + 2) + linears * 9.03
    matrices = experts + mixture().linear_matrices
    saved = figures["none"][1] - figures["nf4"][1]
    assert saved == pytest.approx(matrices * (2 - 0.5 - 1 / 64 - 4 / 64 / 256), rel=1e-6)
