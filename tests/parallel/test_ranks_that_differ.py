"""Ranks with another recipe, base or rows: all of them end before the first step."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import write_tiny_llama
from errors import holds
from ranks import be_on_node, run_ranks
from recipes import CHATML, make_run, write_rows
from tunesmith.errors import EXIT_USAGE, TunesmithError
from tunesmith.host.packages import installed_versions
from tunesmith.start.run import train

pytestmark = pytest.mark.slow

STEPS = {"duration": "3 steps", "schedule": "constant", "micro_batch": "128 tokens"}
WITH_ROWS: dict[str, Any] = {"data": {}}


def start(
    layout: str,
    model: Path,
    folder: Path,
    changes: dict[str, Any],
    on_b: dict[str, Any],
    versions: dict[str, str],
) -> Any:
    """Losses and norms of a start on this rank, or its error; `on_b`, `versions` are of node b."""
    node = be_on_node(layout)
    socket.gethostname = lambda: f"node-{node}"
    os.environ["TUNESMITH_CACHE"] = str(folder / "cache")
    changes = {"train": STEPS, "parallel": {"replicate": len(layout)}, **changes}
    if node == "b":
        model = on_b.get("model", {}).get("name", model)
        installed_versions().update(versions)  # it is made once a process
        for section, values in on_b.items():
            both = changes.get(section)
            changes[section] = {**both, **values} if isinstance(both, dict) else values
    run = make_run(model, folder, held="data" in changes, **changes)
    try:
        result = train(run, quiet=True)
    except TunesmithError as error:
        return type(error).__name__, error.exit_code, error.where
    return [(record.loss, record.grad_norm) for record in result.records]


def end_together(found: list[Any], layout: str, kind: str) -> str:
    """All ranks have ended with exit 2, one of each node has said the error; its `where`."""
    assert [rank[1] for rank in found] == [EXIT_USAGE] * len(layout), found
    first = {layout.index(node) for node in layout}
    kinds = [kind if rank in first else "OtherRankError" for rank in range(len(layout))]
    assert [rank[0] for rank in found] == kinds, found
    return found[0][2]


@pytest.mark.parametrize("layout", ["ab", pytest.param("aabb", marks=pytest.mark.nightly)])
def test_another_key_of_the_recipe(layout, tiny, tmp_path):
    on_b = {"train": {"learning_rate": 2e-3, "seed": 7, "micro_batch": "2 examples"}}
    found = run_ranks(len(layout), start, layout, tiny, tmp_path, {}, on_b, {})
    where = end_together(found, layout, "RecipeError")
    assert holds(where, "train", "0 on node-a", f"{layout.index('b')} on node-b")
    assert not holds(where, "model")


def source_of(file: Path) -> dict[str, str]:
    return {"source": str(file), "format": "prompt-completion"}


def test_another_version(tiny, tmp_path):
    found = run_ranks(2, start, "ab", tiny, tmp_path, {}, {}, {"tokenizers": "0.1"})
    where = end_together(found, "ab", "MachineError")
    assert holds(where, "versions", "0 on node-a", "1 on node-b")


@pytest.mark.nightly
def test_places_may_differ(tiny, tmp_path):
    rows = write_rows(tmp_path / "moved.jsonl", 48)
    on_b = {"output_dir": str(tmp_path / "elsewhere"), "data": {"train": source_of(rows)}}
    found = run_ranks(2, start, "ab", tiny, tmp_path, WITH_ROWS, on_b, {})
    same = {**WITH_ROWS, "output_dir": str(tmp_path / "same")}
    assert found == run_ranks(2, start, "ab", tiny, tmp_path, same, {}, {})
    assert len(found[0]) == 3


def test_another_number_of_rows_is_refused(tiny, tmp_path):
    """The ranks would wait for each other in different collectives."""
    on_b = {"data": {"train": source_of(write_rows(tmp_path / "fewer.jsonl", 11))}}
    changes = {**WITH_ROWS, "parallel": {"shard": 2}, "adapter": {"kind": "none"}}
    found = run_ranks(2, start, "ab", tiny, tmp_path, changes, on_b, {})
    where = end_together(found, "ab", "DataError")
    assert holds(where, "data.train", "0 on node-a", "1 on node-b")


def test_other_rows_another_template_and_another_base_are_refused(tiny, tmp_path):
    rows = write_rows(tmp_path / "other.jsonl", 49)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    template = tmp_path / "other.jinja"
    template.write_text(CHATML.replace("'<|im_end|>'", "'\n<|im_end|>'"))
    other = write_tiny_llama(tmp_path / "other")
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    data = {"train": source_of(rows), "template": str(template)}
    on_b = {"data": data, "model": {"name": str(other)}}
    found = run_ranks(2, start, "ab", tiny, tmp_path, WITH_ROWS, on_b, {})
    where = end_together(found, "ab", "ModelError")
    assert holds(where, "data.train", "data.template", "model.name")
    assert not holds(where, "model.tokenizer")
