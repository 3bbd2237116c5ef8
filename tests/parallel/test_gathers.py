"""What FSDP2 gathers and reduces in a step, in which order, counted in the collectives themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import free_port, run_ranks
from recipes import make_run, merge
from tunesmith.checkpoint.resume import Start
from tunesmith.distributed.ranks import join_ranks
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.sink import Sinks
from tunesmith.stages.request import Request
from tunesmith.training.build import build
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from untied import write_untied

pytestmark = pytest.mark.slow

ONE_MICRO_BATCH = {
    "train": {"duration": "1 steps", "warmup": "0 steps", "micro_batch": "1024 tokens"},
    "parallel": {"shard": 2},
}
FULL, LORA = {"adapter": {"kind": "none"}}, {"adapter": {"kind": "lora"}}


COLLECTIVES = {"c10d::_allgather_base_": "gather", "c10d::_reduce_scatter_base_": "reduce"}


class Recorder(TorchDispatchMode):
    """Notes gathers and reductions of shards, with the elements of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if event := COLLECTIVES.get(func.name().partition(".")[0]):
            self.events.append((event, max(tensor.numel() for tensor in args[:2])))
        return func(*args, **(kwargs or {}))


def collectives_of_a_step(
    model: Path, folder: Path, changes: dict[str, Any], port: int
) -> dict[str, Any]:
    """The collectives of one step, the elements of each part of the model, and which parameters are
    sharded.
    """
    os.environ["MASTER_PORT"] = str(port)
    run = make_run(model, folder, held=False, **merge(ONE_MICRO_BATCH, changes))
    Path(run.output_dir).mkdir(exist_ok=True)
    with join_ranks() as ranks:
        session = build(Request(run), ranks)
        sharded = {
            name for name, p in session.model.model.named_parameters() if isinstance(p, DTensor)
        }
        parts: dict[str, int] = {}
        for name, parameter in session.model.model.named_parameters():
            if "lora_" in name:
                continue
            part = name.removeprefix("model.").removesuffix(".weight")
            part = ".".join(part.split(".")[:2]) if part.startswith("layers") else part
            parts[part] = parts.get(part, 0) + parameter.numel()
        stop = StopControl(StopRequest(), Path(run.output_dir), ranks)
        trainer = Trainer(session, Start(), Sinks([]), stop)
        session.model.train()
        with Recorder() as recorder, session.loader(0) as loader:
            assert len(list(trainer.steps(loader))) == 1
    return {"events": recorder.events, "parts": parts, "sharded": sharded}


def collectives_of_all(
    cases: list[tuple[Path, dict[str, Any], int]], folder: Path
) -> list[dict[str, Any]]:
    return [collectives_of_a_step(model, folder, changes, port) for model, changes, port in cases]


@pytest.fixture(scope="module")
def found(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gathers")
    untied = write_untied(tiny, folder / "untied")
    cases = {"lora": (untied, LORA), "full": (untied, FULL), "tied": (tiny, FULL)}
    make_run(tiny, folder)  # writes the rows
    with_ports = [(*case, free_port()) for case in cases.values()]
    return dict(zip(cases, run_ranks(2, collectives_of_all, with_ports, folder)[0], strict=True))


def test_with_an_adapter_only_layers_are_gathered(found):
    layer = found["lora"]["parts"]["layers.0"]
    # The forward's of both layers, and the backward's of the first: the last one stays gathered.
    assert found["lora"]["events"] == [("gather", layer)] * 3
    assert {name.split(".")[1] for name in found["lora"]["sharded"]} == {"layers"}


def elements(found: dict[str, Any], kind: str) -> list[int]:
    return [elements for name, elements in found["events"] if name == kind]


def test_a_head_is_gathered_beside_the_last_layer_and_reduced_first(found):
    parts, reduced = found["full"]["parts"], elements(found["full"], "reduce")
    norm, table, layer = parts["norm"], parts["embed_tokens"], parts["layers.0"]
    assert table == parts["lm_head"]
    # Forward: the root, the embedding, layers, the head. Backward: only the first layer.
    assert elements(found["full"], "gather") == [norm, table, layer, layer, table, layer]
    # The backward begins at the head. The root and the embedding, whose input has no gradient, come
    # at its end.
    assert reduced[:3] == [table, layer, layer]
    assert sorted(reduced[3:]) == sorted([norm, table])


def test_a_weight_that_both_share_is_gathered_once(found):
    parts = found["tied"]["parts"]
    ends, layer = parts["norm"] + parts["embed_tokens"], parts["layers.0"]
    assert elements(found["tied"], "gather") == [ends, layer, layer, layer]
