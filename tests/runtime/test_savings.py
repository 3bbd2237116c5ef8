"""A run that does not fit is refused with the settings that need less memory."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from errors import refuses, warnings_with
from tunesmith.batches.schedule import StepSize
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.errors import EXIT_USAGE, MachineError
from tunesmith.host.chips import Chip
from tunesmith.host.memory import MemoryLimit
from tunesmith.model.arch.shapes import SHAPES
from tunesmith.model.arch.spec import ModelSpec, read_spec
from tunesmith.planning.forecast import Planner
from tunesmith.planning.machines import Cluster
from tunesmith.planning.memory import USABLE_SHARE
from tunesmith.planning.run_plan import Machine, RunPlan
from tunesmith.planning.savings import ALLOCATABLE_SHARE, check_memory_fits, find_overrun
from tunesmith.planning.workload import measure_work
from tunesmith.presentation.plan import warning_text
from tunesmith.units import Size

GIB = 2**30
STEP = StepSize(16000, 18000)
FULL = {"adapter.kind": "none"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {name: m, dtype: bf16}\ndata: {train: {source: rows.jsonl}}\noutput_dir: runs/mine\n"
    )
    return file


def plan_on(
    machine: Machine, run: Run, spec: ModelSpec, trained: int, before: Size | None = None
) -> RunPlan:
    work = measure_work(run, spec, None)._replace(step=STEP, longest=2000)
    cluster = Cluster(Chip("other", machine.card_bytes / GIB))
    return Planner(run, spec, cluster, work, machine, trained, before).best().plan


def plan_of(
    run: Run, shape: str, gib: float, before: Size | None = None, **found: object
) -> RunPlan:
    spec = read_spec(SHAPES[shape].config, where=shape)
    trained = spec.parameters if run.adapter.kind == "none" else spec.parameters // 400
    parts = {"device": "cuda:0", "attention": ("varlen", ""), "compiles": (True, "")} | found
    machine = Machine(free_bytes=int(gib * GIB), card_bytes=int(gib * GIB), **parts)
    plan = plan_on(machine, run, spec, trained, before)
    check_memory_fits(run, plan, machine, resumed=before is not None)
    return plan


INSIDE = FULL | {"train.optimizer_in_backward": True, "train.clip_norm": None}
NONE = {"train.recompute": "none"}
WIDE = NONE | {"train.micro_batch": "16384 tokens"}
IN_BACKWARD = "train.optimizer_in_backward=true train.clip_norm=null"
SHORTER = "data.seq_len=1024 data.too_long=drop"
OPTIMIZER = ["train.optimizer=adamw-8bit", "train.master_weights=stochastic", IN_BACKWARD]
STREAMED = "train.cpu_offload='[parameters]'"
REFUSED = [
    ("llama3-8b", 138, FULL, [*OPTIMIZER, SHORTER, "adapter.kind=lora"]),
    ("llama3-8b", 100, INSIDE, ["train.optimizer=adamw-8bit", "train.master_weights=stochastic", "adapter.kind=lora train.optimizer_in_backward=false"]),
    ("llama3-8b", 24, NONE, ["train.recompute=full", "model.quantize=nf4", SHORTER, STREAMED]),
    ("llama3-8b", 40, WIDE, ["train.micro_batch=auto", "train.recompute=full", "model.quantize=nf4", SHORTER, STREAMED]),
    ("llama3-70b", 138, {}, ["model.quantize=nf4", SHORTER, STREAMED]),
    ("llama3-70b", 138, FULL, [*OPTIMIZER, "adapter.kind=lora"]),
]  # fmt: skip


# What the refusal of a run that does not fit tells: its memory by parts, and the plan.
NEEDS = ("GiB", "weights", "recompute")


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "gib", "keys", "offered"), REFUSED)
def test_a_plan_that_does_not_fit_is_refused_with_settings_that_need_less(
    recipe, shape, gib, keys, offered
):
    with refuses(MachineError, names=NEEDS) as refused:
        plan_of(load_recipe(recipe, keys), shape, gib)
    assert refused.value.exit_code == EXIT_USAGE
    fixes = refused.value.fix.removeprefix("set ").split("; or ")
    assert fixes[: len(offered)] == offered
    assert len(fixes) == len(offered) + 1
    needed = plan_of(load_recipe(recipe, keys), shape, 3000).memory
    for words in offered:
        # As the user would: the same recipe, with the words on the command line.
        run = load_recipe(recipe, [*words_of(keys), *shlex.split(words)])
        assert plan_of(run, shape, 3000).memory.total <= needed.total, words


def words_of(keys: dict[str, object]) -> list[str]:
    names = {None: "null", True: "true"}
    return [f"{key}={names.get(value, value)}" for key, value in keys.items()]  # type: ignore[call-overload]


@pytest.mark.slow
def test_nothing_is_offered_where_nothing_helps(recipe: Path) -> None:
    keys = {"model.quantize": "nf4", "train.cpu_offload": ["parameters"]}
    with refuses(MachineError) as refused:
        plan_of(load_recipe(recipe, keys), "llama3-8b", 1)
    assert "=" not in refused.value.fix


@pytest.mark.parametrize(
    ("keys", "fix"),
    [
        (NONE, ["train.recompute=full", STREAMED]),
        (FULL, ["train.optimizer=adamw-8bit", "adapter.kind=lora", "--fresh"]),
    ],
)
def test_a_run_that_resumes_on_a_smaller_device_is_told_what_it_may_change(recipe, keys, fix):
    with refuses(MachineError, fix=fix) as refused:
        plan_of(load_recipe(recipe, keys), "llama3-8b", 24, before=Size(2048, "tokens"))
    assert "model.quantize" not in refused.value.fix


def test_what_fits_but_leaves_little_is_not_refused(recipe: Path) -> None:
    """Between USABLE_SHARE and ALLOCATABLE_SHARE a plan is tried, with advice in case it fails."""
    run = load_recipe(recipe, NONE | {"train.micro_batch": "2048 tokens"})
    plan = plan_of(run, "llama3-8b", 26)
    assert USABLE_SHARE < plan.memory.total / plan.memory.free < ALLOCATABLE_SHARE
    # A checkpoint's copies refuse nothing: without room for them training waits.
    needed = plan.memory.total - plan.memory.copies
    assert plan_of(run, "llama3-8b", 1.001 * needed / ALLOCATABLE_SHARE / GIB).memory.total > needed
    with pytest.raises(MachineError):
        plan_of(run, "llama3-8b", 0.999 * needed / ALLOCATABLE_SHARE / GIB)


BUSY = {"device": "cpu", "compiles": (False, "")}


def test_on_a_cpu_only_what_no_machine_memory_holds_is_refused(recipe: Path) -> None:
    run = load_recipe(recipe, FULL)
    assert plan_of(run, "llama3-3b", 60, **BUSY).memory.free == 60 * GIB
    with refuses(MachineError, where="cpu", names=NEEDS, fix=["train.optimizer=adamw-8bit"]):
        plan_of(run, "llama3-3b", 50, **BUSY)


@pytest.mark.parametrize(("free", "warned"), [(1.27, False), (0.5, True)])
def test_on_a_cpu_a_plan_that_may_not_fit_is_warned_of(recipe, free, warned):
    run = load_recipe(recipe, FULL | NONE | {"train.micro_batch": "2048 tokens"})
    spec = read_spec(SHAPES["llama3-3b"].config, where="test")
    group = MemoryLimit("control group /job", 200 * GIB, used=0, used_by_run=0)
    machine = Machine(
        "cpu", 200 * GIB, ("batched_matmul", ""), (False, ""), card_bytes=200 * GIB, limit=group
    )
    plan = plan_on(machine, run, spec, spec.parameters)
    machine = replace(machine, free_bytes=int(plan.memory.total * free))
    plan = plan_on(machine, run, spec, spec.parameters)
    found = find_overrun(run, plan, machine)
    assert (found is not None) == warned
    if found:
        warning = warning_text(plan, found)
        assert warnings_with(warning, "/job", "200.00 GiB")
        assert "fix: set train.optimizer=adamw-8bit" in warning
        assert "docker run --memory=" in warning
