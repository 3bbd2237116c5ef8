"""Ranks that would train on with another recipe, base or rows: found before the first step, on all
of them.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer, write_tiny_llama
from errors import holds, lines_with
from ranks import run_ranks
from recipes import make_run, write_rows
from tunesmith.errors import EXIT_USAGE, TunesmithError
from tunesmith.host.packages import installed_versions
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

STEPS = {"duration": "3 steps", "schedule": "constant", "micro_batch": "128 tokens"}
FULL: dict[str, Any] = {"adapter": {"kind": "none"}}


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


@pytest.mark.parametrize("layout", ["ab", "aabb"])
def test_another_key_of_the_recipe(layout, tiny, tmp_path):
    on_b = {"train": {"learning_rate": 2e-3, "seed": 7, "micro_batch": "2 examples"}}
    where = end_together(
        run_ranks(len(layout), start, layout, tiny, tmp_path, {}, on_b, {}), layout, "RecipeError"
    )
    for key, here, there in (
        ("learning_rate", "0.001", "0.002"),
        ("seed", "42", "7"),
        ("micro_batch", "128 tokens", "2 examples"),
    ):
        (told,) = [part for part in where.split("train.") if part.startswith(f"{key}: ")]
        assert holds(told, here, "0 on node-a", there, f"{layout.index('b')} on node-b")


def test_one_rank_of_a_node_is_named_where_the_others_agree():
    from tunesmith.distributed.ranks import Ranks
    from tunesmith.stages.agree import find_differences

    ranks = Ranks(0, 4, hosts=("node-a", "node-a", "node-b", "node-b"), run_dir_writers=(0,) * 4)
    parts = [{"seed": "1"}] * 3 + [{"seed": "2"}]
    differences = find_differences(ranks, parts)["seed"]
    first, second = differences.split("; 2 ")
    assert holds(first, 1, "rank 0", "rank 1", "rank 2", "node-a", "node-b")
    assert holds(second, "rank 3", "node-b")


@pytest.mark.parametrize("what", [FULL, {}], ids=["full", "LoRA"])
def test_another_number_of_rows(what, tiny, tmp_path):
    """The ranks would wait for each other in different collectives."""
    on_b = {
        "data": {
            "train": {
                "source": str(write_rows(tmp_path / "fewer.jsonl", 11)),
                "format": "prompt-completion",
            }
        }
    }
    found = run_ranks(
        2, start, "ab", tiny, tmp_path, {"data": {}, "parallel": {"shard": 2}, **what}, on_b, {}
    )
    where = end_together(found, "ab", "DataError")
    assert "data.train: 48 rows, " in where
    assert "on node-a; 11 rows, " in where


def test_other_rows_of_the_same_number(tiny, tmp_path):
    rows = write_rows(tmp_path / "other.jsonl", 49).read_text().splitlines(keepends=True)[1:]
    (tmp_path / "other.jsonl").write_text("".join(rows))
    source = {"source": str(tmp_path / "other.jsonl"), "format": "prompt-completion"}
    found = run_ranks(2, start, "ab", tiny, tmp_path, {"data": {}}, {"data": {"train": source}}, {})
    where = end_together(found, "ab", "DataError")
    assert where.count("48 rows, ") == 2
    assert "data.validation" not in where


def test_other_held_out_rows(tiny, tmp_path):
    source = {"source": str(write_rows(tmp_path / "few.jsonl", 5)), "format": "prompt-completion"}
    found = run_ranks(
        2, start, "ab", tiny, tmp_path, {"data": {}}, {"data": {"validation": source}}, {}
    )
    where = end_together(found, "ab", "DataError")
    assert where.startswith("data.validation: 8 rows, ")


def test_another_base_of_the_same_shape(tiny, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    other = write_tiny_llama(tmp_path / "other")
    weights = {
        name: tensor + 0.01 * torch.randn_like(tensor)
        for name, tensor in load_file(tiny / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    changes = {"parallel": {"shard": 2}}
    where = end_together(
        run_ranks(2, start, "ab", tiny, tmp_path, changes, {"model": {"name": str(other)}}, {}),
        "ab",
        "ModelError",
    )
    assert where.startswith("model.name: weights: ")
    assert "on node-a; " in where


def test_another_configuration_and_tokenizer(tiny, tmp_path):
    other = write_tiny_llama(tmp_path / "other", rms_norm_eps=1e-4)
    (other / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    byte_tokenizer(bos_token="<|bos|>").save_pretrained(other)
    found = run_ranks(2, start, "ab", tiny, tmp_path, {}, {"model": {"name": str(other)}}, {})
    where = end_together(found, "ab", "ModelError")
    assert lines_with(where, "rms_norm_eps", "1e-06", 0, "0.0001", 1)
    assert "model.tokenizer: " in where
    assert "model.name: weights" not in where


def test_another_template_at_the_same_place(tiny, tmp_path):
    for name, end in (("one", "<|im_end|>"), ("two", "\n<|im_end|>")):
        turn = (
            "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '" + end + "\n' }}"
        )
        start_of_answer = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        text = "{% for message in messages %}" + turn + "{% endfor %}" + start_of_answer
        (tmp_path / f"{name}.jinja").write_text(text)
    one, two = ({"template": str(tmp_path / f"{name}.jinja")} for name in ("one", "two"))
    found = run_ranks(2, start, "ab", tiny, tmp_path, {"data": one}, {"data": two}, {})
    where = end_together(found, "ab", "DataError")
    assert where.startswith("data.template: ")
    assert "on node-a; " in where


def test_another_version(tiny, tmp_path):
    found = run_ranks(2, start, "ab", tiny, tmp_path, {}, {}, {"tokenizers": "0.1"})
    where = end_together(found, "ab", "MachineError")
    assert holds(where, "tokenizers", "0.1", "1 on node-b")


def test_another_adapter_to_begin_with(tiny, tmp_path):
    for name in ("first", "second"):
        seed = {"seed": len(name)}
        train(
            make_run(
                tiny, tmp_path, held=False, train=STEPS | seed, output_dir=str(tmp_path / name)
            ),
            quiet=True,
        )
    first, second = (
        {"adapter": {"from": str(tmp_path / name / "final")}} for name in ("first", "second")
    )
    found = run_ranks(2, start, "ab", tiny, tmp_path, first, second, {})
    assert end_together(found, "ab", "ModelError").startswith("adapter.from: ")


def test_places_may_differ(tiny, tmp_path):
    rows = write_rows(tmp_path / "moved.jsonl", 48)
    on_b = {
        "output_dir": str(tmp_path / "elsewhere"),
        "data": {"train": {"source": str(rows), "format": "prompt-completion"}},
    }
    found = run_ranks(2, start, "ab", tiny, tmp_path, {"data": {}}, on_b, {})
    same = run_ranks(
        2, start, "ab", tiny, tmp_path, {"data": {}, "output_dir": str(tmp_path / "same")}, {}, {}
    )
    assert found == same
    assert len(found[0]) == 3
