"""A checkpoint that several ranks write is whole or absent, and one process reads and exports it."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from errors import holds
from ranks import run_ranks
from recipes import make_run
from tunesmith.answers.load_run import load_run, locate_run, read_run_files
from tunesmith.checkpoint import manifest
from tunesmith.cli.main import main
from tunesmith.errors import TunesmithError
from tunesmith.start.run import train

pytestmark = pytest.mark.slow

SMALL = 20_000  # bytes: less than a rank's part of the checkpoint


def start(model: Path, folder: Path, is_limited: bool = False) -> dict[str, Any]:
    """At the second checkpoint rank 1 runs into a limit of its files, if it is limited."""
    run = make_run(
        model, folder, held=False, adapter={"kind": "none"}, parallel={"shard": 2},
        train={"duration": "3 steps"}, checkpoint={"every": "1 step", "keep": 9},
    )  # fmt: skip
    write, calls = FileSystemWriter.write_data, []

    def faulty(self: FileSystemWriter, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 2 and os.environ.get("RANK") == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, resource.RLIM_INFINITY))
        return write(self, *args)

    if is_limited:
        FileSystemWriter.write_data = faulty  # type: ignore[method-assign]
    try:
        return {"first": train(run, quiet=True).first_step}
    except TunesmithError as error:
        return {"error": type(error).__name__, "code": error.exit_code, "text": str(error)}


def whole(run_dir: Path) -> list[int]:
    found = manifest.list_checkpoints(run_dir)
    return [step for step in found if manifest.find_damage(found[step]) is None]


def test_a_full_disk_of_one_rank_ends_all_and_leaves_what_was_written(tiny, tmp_path):
    out = tmp_path / "run"
    found = run_ranks(2, start, tiny, tmp_path, True)
    assert [rank["error"] for rank in found] == ["CheckpointError", "OtherRankError"]
    assert holds(found[0]["text"], "ulimit -f", "checkpoint-1")
    assert {rank["code"] for rank in found} == {1}
    assert json.loads((out / "failure.json").read_text())["cause"] == "disk"
    assert whole(out) == [1]
    assert not list(out.glob(".*.partial"))
    assert [rank["first"] for rank in run_ranks(2, start, tiny, tmp_path)] == [1, 1]
    assert whole(out) == [3, 2, 1]


def test_one_process_opens_and_exports_what_two_ranks_wrote(tiny, tmp_path, capsys):
    open_tuned_model = pytest.importorskip("tunesmith.tools.export.tuned_weights").open_tuned_model
    run_ranks(2, start, tiny, tmp_path)
    assert whole(tmp_path / "run") == [3, 2, 1]
    saved, output = tmp_path / "run" / "checkpoint-3", tmp_path / "exported"
    assert not list(saved.glob("*.safetensors"))
    assert main(["export", str(saved), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    exported = load_file(output / "model.safetensors")
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)
    names = {path.name for path in (tmp_path / "run" / "final").iterdir()}
    assert {path.name for path in output.iterdir()} == names
    opened, trained = load_run(saved), load_run(tmp_path / "run" / "final")
    state_of = trained.model.state_dict()
    assert all(
        torch.equal(value, state_of[name]) for name, value in opened.model.state_dict().items()
    )
    # As other formats read it, in rows
    weights = open_tuned_model(read_run_files(locate_run(saved))).weights
    for name, tensor in final.items():
        half = len(tensor) // 2
        rows = [weights[name].rows(0, half), weights[name].rows(half, len(tensor))]
        assert torch.equal(torch.cat(rows), tensor.float())

    part = next((saved / "state").glob("*.distcp"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert main(["export", str(saved), "--output", str(tmp_path / "no")]) == 2
    assert holds(capsys.readouterr().err, f"state/{part.name}")
    assert not (tmp_path / "no").exists()
