"""Copies, shards and parts of a model on several ranks train as one process does."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open

import vision_models
from errors import lines_with
from pairwise import Combination, name_of, pairwise
from ranks import run_each, world_of
from recipes import make_run, merge, recipe
from shipped_bases import write_fp8, write_mxfp4_gpt_oss, write_qwen3_moe
from tunesmith.formats.fp8 import select_scaling
from tunesmith.formats.scaled_matmul import TENSOR_WISE
from tunesmith.parallel import copies, mesh
from tunesmith.start import session
from tunesmith.start.run import train
from tunesmith.training import answer_sampler
from untied import write_untied

pytestmark = [pytest.mark.slow, pytest.mark.long]

# Elements of a gradient that is summed beside the backward, or in pieces: matrices of these small models.
LARGE = 1000
ANSWER = 4  # tokens of a sample answer: a random model ends none by itself, and none is late
STEPS = 2  # the second shows the first update
Numbers = list[tuple[float, ...]]
Case = tuple[dict[str, Any], dict[str, int]]  # what is trained, how it is shared among the ranks


def numbers(model: Path, folder: Path, changes: dict[str, Any]) -> Numbers:
    """Loss, gradient norm and validation loss of each step, and the values of its method."""
    base = {
        "train": {"duration": f"{STEPS} steps", "warmup": "0 steps", "micro_batch": "128 tokens"},
        "validate": {"every": f"{STEPS} steps"}, "checkpoint": {"every": None},
    }  # fmt: skip
    with (
        mock.patch.object(session, "LOSS_PROBE_TOKENS", 256),
        mock.patch.object(copies, "MIN_OVERLAPPED_ELEMENTS", LARGE),
        mock.patch.object(mesh, "BUCKET_ELEMENTS", LARGE),
        mock.patch.object(answer_sampler, "SAMPLE_TOKENS", ANSWER),
    ):
        result = train(make_run(model, folder, **merge(base, changes)), quiet=True)
    found = []
    for r in result.records:
        extra = [value for name, value in r.extra.items() if name != "rollout_seconds"]
        found.append((r.loss, r.grad_norm, r.val_loss or 0.0, *extra))
    return found


FULL, LORA = {"adapter": {"kind": "none"}}, {"log": {"samples": 1}}
BITES = {"train": {"clip_norm": 0.05}}  # a tenth of the norm
RECOMPUTED = {"train": {"recompute": "full"}}
IN_BACKWARD = {
    "train": {
        "optimizer_in_backward": True, "clip_norm": None, "micro_batch": "auto", "global_batch": "1 examples",
    }
}  # fmt: skip
SHARD, COPY, TENSOR = {"shard": 2}, {"replicate": 2}, {"tensor": 2}
HYBRID, CUT_SHARDS = {"replicate": 2, "shard": 2}, {"shard": 2, "tensor": 2}
NF4 = {"model": {"quantize": "nf4"}}
FP8 = {"model": {"dtype": "bf16", "quantize": "fp8"}}
SHIPPED = {"model": {"quantize": "as-shipped"}}
EIGHT_BIT_MOMENTS = merge(FULL, {"train": {"optimizer": "adamw-8bit"}})
TRAINED: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "full": FULL,
    "nf4": NF4,
    "8-bit moments": EIGHT_BIT_MOMENTS,
    "bf16 with masters": merge(FULL, {"model": {"dtype": "bf16"}}),
    "fp8": FP8,
}
STEP: dict[str, dict[str, Any]] = {
    "clipped": BITES,
    "recomputed": RECOMPUTED,
    "padded": {"data": {"pack": False}, "train": {"micro_batch": "2 examples"}},
}
SHARED = {"replicate": COPY, "shard": SHARD, "tensor": TENSOR}


def differs(combination: Combination) -> bool:
    """Copies of codes and of 8-bit moments are the same code as other copies."""
    in_blocks = combination.get("trained") in ("nf4", "8-bit moments")
    return not (in_blocks and combination.get("mesh") == "replicate")


COVERED_MESHES = pairwise(
    {"trained": list(TRAINED), "mesh": list(SHARED), "step": list(STEP)}, allows=differs
)
FIRST_OF: dict[tuple[str, str], str] = {}
for row in COVERED_MESHES:
    FIRST_OF.setdefault((row["trained"], row["mesh"]), name_of(row))
# The recipe of a case that has `auto`
AUTO = {FIRST_OF["full", "tensor"]: {"replicate": 1, "shard": 1, "tensor": "auto"}}


def case_of(row: Combination) -> Case:
    return merge(TRAINED[row["trained"]], STEP[row["step"]]), SHARED[row["mesh"]]


def tensors_in(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of all tensors of a folder."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            shapes |= {name: tensors.get_slice(name).get_shape() for name in names}
    return shapes


def run_alone(model: Path, recipe: str) -> tuple[Numbers, dict[str, list[int]]]:
    """Numbers and saved tensors of one process that recomputes nothing and answers no sample."""
    changes = json.loads(recipe)
    changes.pop("log", None)
    changes.get("train", {}).pop("recompute", None)
    return train_alone(model, json.dumps({name: part for name, part in changes.items() if part}))


@cache
def train_alone(model: Path, recipe: str) -> tuple[Numbers, dict[str, list[int]]]:
    changes = json.loads(recipe)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = numbers(model, folder, {**changes, "output_dir": str(folder / "run")})
        return found, tensors_in(folder / "run" / "final")


def assert_those_of_one_process(
    every: dict[str, Case], model: Path, folder: Path, tolerance: tuple[float, float] = (1e-6, 1e-4)
) -> None:
    """Tolerance: of the first step and of others; fp32 sums are taken in another order."""
    (world,) = {world_of(mesh) for _, mesh in every.values()}
    cases = [
        {**what, "parallel": AUTO.get(name, mesh), "output_dir": str(folder / f"{name}, ranks")}
        for name, (what, mesh) in every.items()
    ]
    recipe(model, folder)  # writes the rows, which each rank would write otherwise
    found = run_each(world, numbers, [(model, folder, case) for case in cases])[0]
    wrong = {}
    for (name, (what, _)), many in zip(every.items(), found, strict=True):
        assert len(many) == STEPS
        alone, _ = run_alone(model, json.dumps(what))
        for step, (expected, got) in enumerate(zip(alone, many, strict=True)):
            if got != pytest.approx(expected, rel=tolerance[min(step, 1)]):
                wrong[name, step] = expected, got
    assert not wrong


def test_an_adapter_and_a_full_model_give_the_numbers_of_one_process(tiny, tmp_path):
    rows = [row for row in COVERED_MESHES if row["trained"] in ("lora", "full")]
    cases = {name_of(row): case_of(row) for row in rows}
    assert_those_of_one_process(cases, tiny, tmp_path)
    for name in AUTO:
        log = (tmp_path / f"{name}, ranks/log.txt").read_text()
        assert lines_with(log, "replicate 1 x shard 1 x tensor 2")
    for name, (what, shared) in cases.items():
        answered = (tmp_path / f"{name}, ranks/samples.jsonl").exists()
        assert answered == ("log" in what and shared is not TENSOR), name


# In the test lane, one combination of each kind; the others are nightly.
IN_TEST_LANE = {
    FIRST_OF[pair]
    for pair in (
        ("nf4", "tensor"), ("8-bit moments", "shard"), ("bf16 with masters", "shard"), ("fp8", "shard"),
    )
}  # fmt: skip


def tolerance_of(trained: str, mesh: str) -> tuple[float, float]:
    if trained == "bf16 with masters":
        return 2e-3, 2e-2  # gradients of micro batches are rounded before they are summed
    if trained != "fp8":
        return 1e-5, 1e-4  # norms of the wide model: sums in another order moved them by 4e-6
    if mesh == "tensor":
        return 1e-2, 2e-2  # a rank scales its part of a row by itself
    # With one scale a tensor, torch 2.11's on a CPU, fp8 rounds by the rows of a micro batch.
    is_coarse = select_scaling(torch.device("cpu")).recipe == TENSOR_WISE
    return (5e-3, 1e-2) if is_coarse else (2e-4, 3e-3)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row, id=name_of(row), marks=() if name_of(row) in IN_TEST_LANE else pytest.mark.nightly
        )
        for row in COVERED_MESHES
        if row["trained"] not in ("lora", "full")
    ],
)
def test_less_precise_models_and_moments_give_the_numbers_of_one_process(row, request, tmp_path):
    pytest.importorskip("bitsandbytes")
    in_blocks = row["trained"] in ("nf4", "8-bit moments")
    model = request.getfixturevalue("wide" if in_blocks else "tiny")
    tolerance = tolerance_of(row["trained"], row["mesh"])
    assert_those_of_one_process({name_of(row): case_of(row)}, model, tmp_path, tolerance)


# Of 8 examples a step on 3 and on 10 ranks, some have more than others, or none.
MORE_RANKS: dict[str, tuple[str, dict[str, Case]]] = {
    "3": ("tiny", {"full, uneven shards": (merge(FULL, BITES), {"shard": 3})}),
    # Most shards begin inside a block.
    "3, nf4": ("tiny", {"nf4, uneven shards": (NF4, {"shard": 3})}),
    "4": ("tiny", {"full, shards of a tensor group": (merge(FULL, BITES), CUT_SHARDS)}),
    "4, others": (
        "tiny",
        {
            "full, copies of shards": (merge(FULL, BITES), HYBRID),
            "lora, copies of a tensor group": ({}, {"replicate": 2, "tensor": 2}),
        },
    ),
    "10": ("tiny", {"lora on the head": ({"adapter": {"target": ["q_proj", "lm_head"]}}, {"replicate": 10})}),
    "4, blocks": (
        "wide",
        {
            "8-bit moments, shards of a tensor group": (EIGHT_BIT_MOMENTS, CUT_SHARDS),
            "nf4, shards of a tensor group": (NF4, CUT_SHARDS),
        },
    ),
}  # fmt: skip


def nightly_but(names: Any, *first: str) -> list[Any]:
    """Parameters of a test, of which all but the first ones are nightly."""
    return [
        pytest.param(name, id=name, marks=() if name in first else pytest.mark.nightly)
        for name in names
    ]


@pytest.mark.parametrize("name", nightly_but(MORE_RANKS, "3, nf4", "4"))
def test_more_ranks_give_the_numbers_of_one_process(name, request, tmp_path):
    model, cases = MORE_RANKS[name]
    pytest.importorskip("bitsandbytes")
    tolerance = (1e-5, 1e-4) if model == "wide" or name == "10" else (1e-6, 1e-4)
    assert_those_of_one_process(cases, request.getfixturevalue(model), tmp_path, tolerance)


def write_fp8_experts(tiny: Path, folder: Path) -> Path:
    base = write_qwen3_moe(folder / "base", tiny, moe_intermediate_size=40)
    return write_fp8(base, folder / "fp8", (16, 24), keep=("mlp.gate",))


# Embedding and head do not share a weight, so that FSDP2 gathers each by itself.
UNTIED: dict[str, Case] = {
    "lora on the head": ({"adapter": {"target": ["q_proj", "lm_head"]}}, SHARD),
    "full, shards, updated in the backward": (merge(FULL, IN_BACKWARD), SHARD),
}
MORE_OF_UNTIED: dict[str, Case] = {
    "full, copies, updated in the backward": (merge(FULL, IN_BACKWARD), COPY),
    "a trained embedding": ({"adapter": {"modules_to_save": ["embed_tokens"]}}, SHARD),
}
EXPERTS_SAVED = {"adapter": {"modules_to_save": ["experts"], "target": ["q_proj"]}}
MIXTURES: dict[str, dict[str, Case]] = {
    "shards": {"shards": (LORA, SHARD)},
    "tensor": {"full, tensor": (merge(FULL, BITES), TENSOR)},
    "four": {
        "copies of shards": (merge(BITES, RECOMPUTED), HYBRID),
        "shards of a tensor group": (EXPERTS_SAVED, CUT_SHARDS),
    },
}
# Shards of codes, whose rows are no whole blocks; a tensor group reads its parts of dense weights.
OF_CODES: dict[str, Case] = {
    "as shipped, shards": (LORA, SHARD),
    "dense, tensor": ({"model": {"quantize": "none"}}, TENSOR),
}
# Recurrent layers that run by document.
OF_FAMILY: dict[str, Case] = {"lora, copies": (LORA, COPY), "full, shards": (FULL, SHARD)}
Writer = Callable[[Path, Path], Path]
# Shards have whole experts: of 4 experts 3 ranks have 2, 1 and 1, or none.
BASES: dict[str, tuple[Writer, dict[str, Case]]] = {
    "untied": (lambda tiny, to: write_untied(tiny, to / "m"), UNTIED),
    "untied, others": (lambda tiny, to: write_untied(tiny, to / "m"), MORE_OF_UNTIED),
    "fp8": (lambda tiny, to: write_fp8(tiny, to / "m", (48, 40)), OF_CODES),
    "experts, fp8": (write_fp8_experts, {"fp8": (SHIPPED, {"shard": 3})}),
    "experts, mxfp4": (lambda tiny, to: write_mxfp4_gpt_oss(to / "m", tiny), {"mxfp4": (SHIPPED, SHARD)}),
    "qwen3_5": (lambda tiny, to: vision_models.build("qwen3_5", to / "m", tiny), OF_FAMILY),
}  # fmt: skip


@pytest.mark.parametrize("base", nightly_but(BASES, "untied"))
def test_other_bases_give_the_numbers_of_one_process(base, tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    write, cases = BASES[base]
    assert_those_of_one_process(cases, write(tiny, tmp_path), tmp_path)


@pytest.mark.parametrize("name", nightly_but(MIXTURES, "shards"))
def test_a_mixture_gives_the_numbers_of_one_process(name, mixture, tmp_path):
    assert_those_of_one_process(MIXTURES[name], mixture, tmp_path)
