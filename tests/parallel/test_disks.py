"""Nodes without a shared disk: what each keeps; a run goes on whichever rank is on which node."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from errors import lines_with
from logged import logged_lines
from ranks import be_on_node, run_ranks
from recipes import make_run
from tunesmith.checkpoint import manifest, replicate
from tunesmith.checkpoint.sharded import RanksWriter
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import TunesmithError
from tunesmith.start.run import train

pytestmark = [pytest.mark.slow, pytest.mark.long]

FULL: dict[str, Any] = {"adapter": {"kind": "none"}}
LORA: dict[str, Any] = {}


def go_to_node(folder: Path, layout: str) -> str:
    node = be_on_node(layout)
    place = folder / node
    place.mkdir(exist_ok=True)
    os.environ["TUNESMITH_CACHE"] = str(place / "cache")
    os.chdir(place)
    return node


def start(
    model: Path, folder: Path, layout: str, steps: int, mesh: dict[str, int], what: dict[str, Any]
) -> Any:
    """One start on this rank: (first step, losses and norms), or the error."""
    go_to_node(folder, layout)
    settings = {"schedule": "constant", "micro_batch": "128 tokens"}
    changes = {
        "train": settings | {"duration": f"{steps} steps"},
        "output_dir": "run",
        "checkpoint": {"every": "2 steps", "keep": 9},
        **what,
    }
    run = make_run(model, folder, held=False, parallel=mesh, **changes)
    try:
        result = train(run, quiet=True)
    except TunesmithError as error:
        return f"{type(error).__name__}: {error}"
    if result.finished_before:
        return "finished"
    return result.first_step, [(record.loss, record.grad_norm) for record in result.records]


def go(layout: str, *arguments: Any) -> list[Any]:
    """`start` on each rank of a layout."""
    model, folder, *rest = arguments
    return run_ranks(len(layout), start, model, folder, layout, *rest)


def files_of(checkpoint: Path) -> set[str]:
    return {
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    }


def parts_of(checkpoint: Path) -> set[str]:
    return {name for name in files_of(checkpoint) if name.endswith(manifest.PART)}


def steps_in(run_dir: Path) -> list[int]:
    return [
        json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


RUNS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "full": (FULL, {"shard": 2}),
    "LoRA": (LORA, {"replicate": 2}),
}


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The numbers and final/ of a run of six steps on one node that never stopped."""

    @cache
    def of(kind: str) -> tuple[list[tuple[float, float]], Path]:
        (what, mesh), folder = RUNS[kind], tmp_path_factory.mktemp("whole")
        return go("ww", tiny, folder, 6, mesh, what)[0][1], folder / "w" / "run" / "final"

    return of


@pytest.fixture(scope="module")
def stopped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run on two nodes, as it was after four steps."""

    @cache
    def trained_on_nodes(kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("nodes")
        what, mesh = RUNS[kind]
        go("ab", tiny, folder, 4, mesh, what)
        return folder, shutil.copytree(folder, tmp_path_factory.mktemp("kept") / "nodes")

    def restore(kind: str) -> Path:
        folder, kept = trained_on_nodes(kind)
        shutil.rmtree(folder)
        return Path(shutil.copytree(kept, folder))

    return restore


@pytest.mark.parametrize("kind", ["full", pytest.param("LoRA", marks=pytest.mark.nightly)])
def test_a_run_goes_on_bit_for_bit_after_its_ranks_have_swapped_nodes(kind, whole, stopped, tiny):
    (what, mesh), folder = RUNS[kind], stopped(kind)
    a, b = (folder / node / "run" for node in "ab")
    first, second = (run / "checkpoint-4" for run in (a, b))
    entries = (first / "manifest.json").read_bytes()
    assert entries == (second / "manifest.json").read_bytes()
    both = files_of(first) | files_of(second)
    assert both == {*json.loads(entries)["files"], "manifest.json"}
    split = parts_of(first), parts_of(second)
    if what is FULL:  # each node keeps what its own ranks wrote
        assert [len(parts) for parts in split] == [1, 1]
        assert not split[0] & split[1]
    assert files_of(first) - split[0] == files_of(second) - split[1]
    assert manifest.find_damage(a / "final") is None
    assert not {"final", "metrics.jsonl", "log.txt"} & {path.name for path in b.iterdir()}

    numbers, final = whole(kind)
    resumed = go("ba", tiny, folder, 6, mesh, what)
    assert resumed[0] == (4, numbers[4:])
    assert steps_in(b) == [1, 2, 3, 4, 5, 6]  # rank 0 is there now
    name = "model.safetensors" if what is FULL else "adapter_model.safetensors"
    assert (b / "final" / name).read_bytes() == (final / name).read_bytes()
    assert manifest.last_step_of(a / "final") == 4  # of the first start
    assert parts_of(first) == parts_of(second) == split[0] | split[1]
    if kind == "LoRA":
        assert go("ab", tiny, folder, 6, mesh, what) == ["finished"] * 2
        assert (a / "final" / name).read_bytes() == (b / "final" / name).read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize(("lost", "steps"), [("a", [5, 6]), ("b", [1, 2, 3, 4, 5, 6])])
def test_an_adapter_outlives_a_machine(lost, steps, whole, stopped, tiny):
    folder = stopped("LoRA")
    shutil.rmtree(folder / lost)
    found = go("ab", tiny, folder, 6, {"replicate": 2}, LORA)[0]
    assert found == (4, whole("LoRA")[0][4:])
    assert steps_in(folder / "a" / "run") == steps
    assert manifest.find_damage(folder / "a" / "run" / "final") is None


def test_a_part_that_is_damaged_makes_all_take_the_checkpoint_before(whole, stopped, tiny):
    folder = stopped("full")
    (part,) = parts_of(folder / "b" / "run" / "checkpoint-4")
    damaged = folder / "b" / "run" / "checkpoint-4" / part
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 0x7F
    damaged.write_bytes(content)
    assert go("ab", tiny, folder, 6, {"shard": 2}, FULL)[0] == (2, whole("full")[0][2:])
    said = (folder / "a" / "run" / "log.txt").read_text()
    assert lines_with(said, "checkpoint-4", part)


# ---- without a model: what lies in the directories, whenever the writers die


def write_until_killed(folder: Path, seconds: float) -> None:
    """Write checkpoints on a node of its own, each step twice, until it is killed."""
    go_to_node(folder, "ab")
    out = Path("run")
    with join_ranks() as joined:
        ranks = replicate.choose_run_dir_writers(joined, out, lambda: out.mkdir(exist_ok=True))
        (out / "env.json").write_text("{}")
        (out / "config.yaml").write_text("")
        writer = RanksWriter(out, 1, None, sync=lambda: None, ranks=ranks)
        ranks.all_gather_object(None)
        signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGKILL))
        for step in range(1, 100_000):
            if step == 2:
                signal.setitimer(signal.ITIMER_REAL, seconds * (1 + 0.02 * ranks.rank))
            for again in range(2):

                def fill(place: Path, step: int = step, again: int = again) -> None:
                    (place / "state").mkdir(exist_ok=True)
                    (place / "state" / f"__{ranks.rank}_0{manifest.PART}").write_bytes(
                        bytes([step % 256, again]) * 9_000
                    )
                    if ranks.is_main_process:
                        (place / "progress").write_bytes(bytes([step % 256, again]))

                writer.write(fill, step, keep_step=None)
            (out / f"done-{step}").touch()


def look(folder: Path) -> tuple[int, set[bytes]]:
    """The newest checkpoint over both nodes, and what its files hold."""
    go_to_node(folder, "ab")
    out = Path("run")
    with logged_lines() as said, join_ranks() as joined:
        ranks = replicate.choose_run_dir_writers(joined, out, lambda: None)
        found = replicate.newest_checkpoint(out, ranks)
    assert found is not None, said
    assert not said
    step, _ = found
    files = (out / f"checkpoint-{step}").rglob("*[!n]")
    return step, {path.read_bytes()[:2] for path in files if path.is_file()}


@pytest.mark.parametrize(
    "numbers", [[2], pytest.param([0, 1, 3, 4], marks=pytest.mark.nightly)], ids=["one", "more"]
)
def test_kill_9_at_any_moment_leaves_one_whole_over_the_nodes(numbers, tmp_path):
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(AssertionError):
            run_ranks(2, write_until_killed, folder, 0.1 + 0.0613 * number)
        runs = [folder / node / "run" for node in "ab"]
        done = min(max(int(path.name[5:]) for path in run.glob("done-*")) for run in runs)
        first, second = run_ranks(2, look, folder)
        assert first == second  # all files of one write
        assert first[0] >= done
        assert len(first[1]) == 1, first
