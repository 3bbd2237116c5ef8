"""Nodes without a shared disk: what each keeps; a run goes on whichever rank is on which node."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from errors import lines_with
from logged import logged_lines
from ranks import run_ranks
from recipes import make_run
from tunesmith.checkpoint import manifest, replicate
from tunesmith.checkpoint.sharded import RanksWriter
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import TunesmithError
from tunesmith.training import validation
from tunesmith.training.checkpoint_saver import CheckpointSaver
from tunesmith.training.run import train
from tunesmith.training.validation_loss import ValidationResult

pytestmark = [pytest.mark.slow, pytest.mark.long]

FULL: dict[str, Any] = {"adapter": {"kind": "none"}}
LORA: dict[str, Any] = {}


def on_node(folder: Path, layout: str) -> str:
    """Make this process rank r of the node that `layout` names for it: `aabb` is two nodes of two
    ranks each.
    """
    rank = int(os.environ["RANK"])
    node = layout[rank]
    local = {"LOCAL_RANK": layout[:rank].count(node), "LOCAL_WORLD_SIZE": layout.count(node)}
    os.environ.update({name: str(value) for name, value in local.items()})
    place = folder / node
    place.mkdir(exist_ok=True)
    os.environ["TUNESMITH_CACHE"] = str(place / "cache")
    os.chdir(place)
    return node


def start(
    model: Path,
    folder: Path,
    layout: str,
    steps: int,
    mesh: dict[str, int],
    changes: dict[str, Any],
    **options: Any,
) -> Any:
    """One start on this rank, below its node's folder: (first step, losses and norms), or the
    error.
    """
    on_node(folder, layout)
    changes = {
        "train": {
            "duration": f"{steps} steps",
            "schedule": "constant",
            "micro_batch": "128 tokens",
        },
        "output_dir": "run",
        "checkpoint": {"every": "2 steps", "keep": 9},
        **changes,
    }
    run = make_run(model, folder, held=False, parallel=mesh, **changes)
    try:
        result = train(run, quiet=True, **options)
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


class Whole(NamedTuple):
    """A run of six steps on one node that never stopped."""

    numbers: list[tuple[float, float]]
    final: Path


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    @cache
    def of(kind: str) -> Whole:
        (what, mesh), folder = RUNS[kind], tmp_path_factory.mktemp("whole")
        found = go("ww", tiny, folder, 6, mesh, what)[0][1]
        return Whole(found, folder / "w" / "run" / "final")

    return of


def run_once(
    factory: pytest.TempPathFactory, model: Path, layout: str, steps: int, kind: str
) -> Callable[[], Path]:
    """Train on the nodes of a layout; what is returned puts their folder back as it then was."""
    folder = factory.mktemp("nodes")
    what, mesh = RUNS[kind]
    go(layout, model, folder, steps, mesh, what)
    kept = shutil.copytree(folder, factory.mktemp("kept") / "nodes")

    def restore() -> Path:
        shutil.rmtree(folder)
        return Path(shutil.copytree(kept, folder))

    return restore


@pytest.fixture(scope="module")
def stopped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run on two nodes, of which four steps were taken: its folder, as it then was."""
    restore = cache(partial(run_once, tmp_path_factory, tiny, "ab", 4))
    return lambda kind: restore(kind)()


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
    own = {path.name for path in b.iterdir()} - {p.name for p in a.iterdir()}
    assert own == {"metrics-rank1.jsonl"}
    assert not {"final", "metrics.jsonl", "log.txt"} & {path.name for path in b.iterdir()}

    resumed = go("ba", tiny, folder, 6, mesh, what)
    assert resumed[0] == (4, whole(kind).numbers[4:])
    assert steps_in(b) == [1, 2, 3, 4, 5, 6]  # rank 0 is there now
    name = "model.safetensors" if what is FULL else "adapter_model.safetensors"
    assert (b / "final" / name).read_bytes() == (whole(kind).final / name).read_bytes()
    assert manifest.last_step_of(a / "final") == 4  # of the first start
    assert parts_of(first) == parts_of(second) == split[0] | split[1]
    assert lines_with((b / "log.txt").read_text(), "final/", "rank 0")

    if kind == "full":
        return
    assert go("ab", tiny, folder, 6, mesh, what) == ["finished"] * 2
    assert manifest.last_step_of(a / "final") == 6
    assert files_of(a / "final") == files_of(b / "final")
    assert (a / "final" / name).read_bytes() == (b / "final" / name).read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize(("lost", "steps"), [("a", [5, 6]), ("b", [1, 2, 3, 4, 5, 6])])
def test_an_adapter_outlives_a_machine(lost, steps, whole, stopped, tiny):
    """The new machine gets all that it needs from the other."""
    folder = stopped("LoRA")
    shutil.rmtree(folder / lost)
    found = go("ab", tiny, folder, 6, {"replicate": 2}, LORA)[0]
    assert found == (4, whole("LoRA").numbers[4:])
    assert steps_in(folder / "a" / "run") == steps
    assert manifest.find_damage(folder / "a" / "run" / "final") is None


def test_a_part_that_is_damaged_makes_all_take_the_checkpoint_before(whole, stopped, tiny):
    folder = stopped("full")
    (part,) = parts_of(folder / "b" / "run" / "checkpoint-4")
    damage(folder / "b" / "run" / "checkpoint-4" / part)
    assert go("ab", tiny, folder, 6, {"shard": 2}, FULL)[0] == (2, whole("full").numbers[2:])
    said = (folder / "a" / "run" / "log.txt").read_text()
    assert lines_with(said, "checkpoint-4", part)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0x7F
    file.write_bytes(content)


# ---- without a model: what lies in the directories, whenever the writers die


def write_until_killed(folder: Path, seconds: float) -> None:
    """Write checkpoint after checkpoint, each step twice as at the end of a run, on a node of its
    own; killed on the way.
    """
    on_node(folder, "ab")
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
    on_node(folder, "ab")
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


def pass_files(folder: Path, fault: str) -> Any:
    """Rank 1 wants a file of 200 KB, an empty one and one in a folder from rank 0, in chunks of
    1,000 bytes.
    """
    node = on_node(folder, "ab")
    replicate.CHUNK_BYTES = 1000
    out, names = Path("run"), ["big", "empty", "state/small"]
    with join_ranks() as joined:
        ranks = replicate.choose_run_dir_writers(
            joined, out, lambda: (out / "state").mkdir(parents=True)
        )
        if node == "a":
            for name, size in zip(names, (200_001, 0, 7), strict=True):
                (out / name).write_bytes(os.urandom(size))
        entries = ranks.broadcast_object(manifest.flush_files(out))
        if fault == "damaged" and node == "a":
            (out / "big").write_bytes(os.urandom(200_001))
        if fault == "full" and node == "b":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        try:
            replicate.copy_files(ranks, out, names if node == "b" else [], entries)
        except TunesmithError as error:
            return f"{type(error).__name__}: {error}", sorted(files_of(out))
        return manifest.flush_files(out)


@pytest.mark.nightly
def test_files_go_to_another_node_whole(tmp_path):
    sent, received = run_ranks(2, pass_files, tmp_path, "")
    assert sent == received
    assert sent["big"]["bytes"] == 200_001


@pytest.mark.parametrize("fault", ["damaged", pytest.param("full", marks=pytest.mark.nightly)])
def test_a_file_that_does_not_come_whole_is_not_there(fault, tmp_path):
    (told, _), (own, files) = run_ranks(2, pass_files, tmp_path, fault)
    assert told.startswith("OtherRankError: rank 1 on")
    assert own.startswith("CheckpointError")
    assert fault == "damaged" or os.strerror(errno.EFBIG) in own
    assert "big" not in files
    assert "state/small" in files


def train_with_damage(model: Path, folder: Path, layout: str, damages: bool) -> int | None:
    """A model in full on two ranks, each with its disk by `layout`; the second step is the best.

    damages: a byte of its state changes before it is read.
    """
    on_node(folder, layout)
    results = iter([3.0, 2.0, 2.5, 2.6])
    load_best = CheckpointSaver.load_best

    def load_damaged(self: CheckpointSaver) -> int:
        for file in Path("run/checkpoint-2/state").glob("*.distcp"):
            damage(file)
        return load_best(self)

    if damages:
        CheckpointSaver.load_best = load_damaged
    validation.validation_loss = lambda *_, **__: ValidationResult(next(results), 1, {})
    changes: dict[str, Any] = {
        **FULL,
        "train": {"duration": "4 steps"},
        "validate": {"every": "1 steps"},
        "checkpoint": {"every": "2 steps", "keep": 9},
        "parallel": {"shard": 2},
        "output_dir": "run",
    }
    return train(make_run(model, folder, **changes), quiet=True).final_step


@pytest.mark.nightly
@pytest.mark.parametrize(("damages", "final_step"), [(False, 2), (True, 4)])
def test_the_best_shards_on_nodes_without_a_shared_disk(damages, final_step, tiny, tmp_path):
    found = run_ranks(2, train_with_damage, tiny, tmp_path, "ab", damages)
    assert found == [final_step, final_step]
