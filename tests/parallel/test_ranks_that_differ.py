"""Ranks with another recipe, base or rows: all of them end before the first step."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer, write_tiny_llama
from errors import holds, refuses
from ranks import run_ranks
from recipes import make_run, write_rows
from tunesmith.distributed.ranks import Ranks
from tunesmith.errors import EXIT_USAGE, DataError, ModelError, TunesmithError
from tunesmith.host.packages import installed_versions
from tunesmith.stages.agree import check_same_inputs, find_differences
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

STEPS = {"duration": "3 steps", "schedule": "constant", "micro_batch": "128 tokens"}
WITH_ROWS: dict[str, Any] = {"data": {}}


def be_on_node(layout: str) -> str:
    """Make this process a rank of the node that `layout` has for it: `aabb` is two nodes of two
    ranks each.
    """
    rank = int(os.environ["RANK"])
    node = layout[rank]
    local = {"LOCAL_RANK": layout[:rank].count(node), "LOCAL_WORLD_SIZE": layout.count(node)}
    os.environ.update({name: str(value) for name, value in local.items()})
    socket.gethostname = lambda: f"node-{node}"
    return node


def start(
    layout: str,
    model: Path,
    folder: Path,
    changes: dict[str, Any],
    on_b: dict[str, Any],
    versions: dict[str, str],
) -> Any:
    """Losses and norms of one start on this rank; or the error's type, exit code, `what` and
    `where`. `changes` are those of the recipe on every node, `on_b` and `versions` what node b has
    otherwise.
    """
    node = be_on_node(layout)
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
        return type(error).__name__, error.exit_code, error.what, error.where
    return [(record.loss, record.grad_norm) for record in result.records]


def end_together(found: list[Any], layout: str, kind: str) -> str:
    """All ranks have ended with exit 2, one of each node has said the error; its `where`."""
    assert [rank[1] for rank in found] == [EXIT_USAGE] * len(layout), found
    first = {layout.index(node) for node in layout}
    kinds = [kind if rank in first else "OtherRankError" for rank in range(len(layout))]
    assert [rank[0] for rank in found] == kinds, found
    return found[0][3]


@pytest.mark.parametrize("layout", ["ab", pytest.param("aabb", marks=pytest.mark.nightly)])
def test_another_key_of_the_recipe(layout, tiny, tmp_path):
    on_b = {"train": {"learning_rate": 2e-3, "seed": 7, "micro_batch": "2 examples"}}
    found = run_ranks(len(layout), start, layout, tiny, tmp_path, {}, on_b, {})
    where = end_together(found, layout, "RecipeError")
    for key, here, there in (
        ("learning_rate", "0.001", "0.002"),
        ("seed", "42", "7"),
        ("micro_batch", "128 tokens", "2 examples"),
    ):
        (told,) = [part for part in where.split("train.") if part.startswith(f"{key}: ")]
        assert holds(told, here, "0 on node-a", there, f"{layout.index('b')} on node-b")


def test_one_rank_of_a_node_is_named_where_the_others_agree():
    ranks = Ranks(0, 4, hosts=("node-a", "node-a", "node-b", "node-b"), run_dir_writers=(0,) * 4)
    parts = [{"seed": "1"}] * 3 + [{"seed": "2"}]
    differences = find_differences(ranks, parts)["seed"]
    first, second = differences.split("; 2 ")
    assert holds(first, 1, "rank 0", "rank 1", "rank 2", "node-a", "node-b")
    assert holds(second, "rank 3", "node-b")


def source_of(file: Path) -> dict[str, str]:
    return {"source": str(file), "format": "prompt-completion"}


def test_another_number_of_rows(tiny, tmp_path):
    """The ranks would wait for each other in different collectives."""
    on_b = {"data": {"train": source_of(write_rows(tmp_path / "fewer.jsonl", 11))}}
    changes = {**WITH_ROWS, "parallel": {"shard": 2}, "adapter": {"kind": "none"}}
    found = run_ranks(2, start, "ab", tiny, tmp_path, changes, on_b, {})
    where = end_together(found, "ab", "DataError")
    assert "data.train: 48 rows, " in where
    assert "on node-a; 11 rows, " in where


def test_another_version(tiny, tmp_path):
    found = run_ranks(2, start, "ab", tiny, tmp_path, {}, {}, {"tokenizers": "0.1"})
    where = end_together(found, "ab", "MachineError")
    assert holds(where, "tokenizers", "0.1", "1 on node-b")


@pytest.mark.nightly
def test_places_may_differ(tiny, tmp_path):
    rows = write_rows(tmp_path / "moved.jsonl", 48)
    on_b = {"output_dir": str(tmp_path / "elsewhere"), "data": {"train": source_of(rows)}}
    found = run_ranks(2, start, "ab", tiny, tmp_path, WITH_ROWS, on_b, {})
    same = {**WITH_ROWS, "output_dir": str(tmp_path / "same")}
    assert found == run_ranks(2, start, "ab", tiny, tmp_path, same, {}, {})
    assert len(found[0]) == 3


# ---- which inputs are compared: two starts in this process ----


def other_rows(folder: Path, _: Path) -> dict[str, Any]:
    file = write_rows(folder / "other.jsonl", 49)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    return {"data": {"train": source_of(file)}}


def other_held_rows(folder: Path, _: Path) -> dict[str, Any]:
    return {"data": {"validation": source_of(write_rows(folder / "few.jsonl", 5))}}


def other_weights(folder: Path, tiny: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file

    other = write_tiny_llama(folder / "other")
    weights = {
        name: tensor + 0.01 * torch.randn_like(tensor)
        for name, tensor in load_file(tiny / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return {"model": {"name": str(other)}}


def other_configuration(folder: Path, tiny: Path) -> dict[str, Any]:
    other = write_tiny_llama(folder / "other", rms_norm_eps=1e-4)
    (other / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    byte_tokenizer(bos_token="<|bos|>").save_pretrained(other)
    return {"model": {"name": str(other)}}


def other_template(folder: Path, _: Path) -> dict[str, Any]:
    turn = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '\n<|im_end|>\n' }}"
    start_of_answer = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    file = folder / "other.jinja"
    file.write_text("{% for message in messages %}" + turn + "{% endfor %}" + start_of_answer)
    return {"data": {"template": str(file)}}


def other_adapter(folder: Path, tiny: Path) -> dict[str, Any]:
    for seed in (1, 2):
        out = str(folder / f"adapter-{seed}")
        settings = STEPS | {"duration": "1 steps", "warmup": "0 steps", "seed": seed}
        train(make_run(tiny, folder, held=False, train=settings, output_dir=out), quiet=True)
    return {"adapter": {"from": str(folder / "adapter-2" / "final")}}


Maker = Callable[[Path, Path], dict[str, Any]]
# name: what the other rank has, the error, where it says so
DIFFERENCES: dict[str, tuple[Maker, type[TunesmithError], tuple[str, ...]]] = {
    "other rows": (other_rows, DataError, ("data.train: 48 rows, ",)),
    "other held-out rows": (other_held_rows, DataError, ("data.validation: 8 rows, ",)),
    "another base": (other_weights, ModelError, ("model.name: weights: ",)),
    "another configuration": (
        other_configuration,
        ModelError,
        ("rms_norm_eps", "0.0001", "model.tokenizer: "),
    ),
    "another template": (other_template, DataError, ("data.template: ",)),
    "another adapter": (other_adapter, ModelError, ("adapter.from: ",)),
}


class InputsRead(Exception):
    """Ends a start whose inputs have been read."""


class OneOfTwo(Ranks):
    """Rank 0 of two, and what the other one has read."""

    def __init__(self, other: dict[str, str] | None) -> None:
        super().__init__(0, 2, hosts=("node-a", "node-b"), run_dir_writers=(0, 0))
        object.__setattr__(self, "other", other)

    def all_gather_object(self, value: Any) -> Any:
        if self.other is None:
            raise InputsRead(value)
        return [value, self.other]

    def raise_on_all_ranks(self) -> Any:
        return nullcontext()


@pytest.mark.parametrize("name", DIFFERENCES)
def test_another_base_or_other_rows(name, tiny, tmp_path, monkeypatch):
    make, error, places = DIFFERENCES[name]
    changes = make(tmp_path, tiny)
    own = (
        {"adapter": {"from": str(tmp_path / "adapter-1" / "final")}} if "adapter" in changes else {}
    )

    def read(other: dict[str, str] | None, changes: dict[str, Any]) -> None:
        check = lambda tokens, files, ranks: check_same_inputs(tokens, files, OneOfTwo(other))  # noqa: E731
        monkeypatch.setattr("tunesmith.stages.plan.check_same_inputs", check)
        model = changes.get("model", {}).get("name", tiny)
        train(make_run(model, tmp_path, train=STEPS, **changes), quiet=True)

    with pytest.raises(InputsRead) as seen:
        read(None, changes)
    with refuses(error) as refused:
        read(seen.value.args[0], own)
    where = refused.value.where
    assert all(place in where for place in places), where
    assert ("model.name: weights" in where) == (name == "another base")
    assert name != "other rows" or "data.validation" not in where
