"""A model that is cut over ranks against the same model in one process, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from devices import graphs_compiled
from errors import error_in, holds
from ranks import gathered, run_ranks
from tunesmith.adapter import lora
from tunesmith.batches.batch import Batch
from tunesmith.config.schema import Adapter, MethodConfig
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import TunesmithError
from tunesmith.formats.nf4 import Nf4
from tunesmith.methods import make_method
from tunesmith.model.known.decoder import Head
from tunesmith.model.layers.fused import fuse_modules
from tunesmith.parallel.mesh import Mesh, MeshShape
from tunesmith.parallel.tensor import apply_tensor_parallel, reduce_gradients
from tunesmith.quant.replace import replace_by_codes
from tunesmith.runtime.compilation import compile_layers
from tunesmith.runtime.recompute import recompute_layers
from tunesmith.train_model import TrainModel, supervised_positions

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-odd": {"vocab_size": 127, "tie_word_embeddings": True},  # as where tokens were added
    "llama-biases": {"attention_bias": True, "mlp_bias": True},  # of o and down too
    "qwen2": {},  # q, k and v have biases
    "qwen3": {},  # q and k have norms
    "mistral": {"sliding_window": 9},
    "smollm3": {"pad_token_id": 3, "no_rope_layers": [1, 0]},
}
# Both sides add the same products in another order: 1e-14 of the largest value in float64. A sum
# that is left out shows in the first digits.
TOLERANCE = 1e-10
ADAPTER = Adapter(rank=4, alpha=8.0)
DROPPED = Adapter(rank=4, alpha=8.0, dropout=0.3)
PARTLY = Adapter(rank=4, alpha=8.0, target=("q_proj", "o_proj", "up_proj"))
# Model, adapter, recomputed layers.
CASES = [
    ("llama", None, 0), ("llama-tied", None, 2), ("llama-odd", None, 0), ("qwen2", None, 0), ("qwen3", None, 1),
    ("mistral", None, 0), ("llama", ADAPTER, 1), ("llama-odd", ADAPTER, 0), ("qwen2", PARTLY, 0), ("qwen3", ADAPTER, 0),
    ("mistral", DROPPED, 2), ("smollm3", ADAPTER, 0), ("llama-biases", None, 1), ("llama-biases", ADAPTER, 0),
]  # fmt: skip


def causal_lm(name: str) -> PreTrainedModel:
    """A model with drawn weights, norms and biases: the same each time."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(name.partition("-")[0], **{**SMALL, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def rooted(model: PreTrainedModel, attention: str = "batched_matmul") -> TrainModel:
    fuse_modules(model, project=lora.project)
    return TrainModel(model, make_method(MethodConfig()), attention_backend=attention).train()


def build(name: str, adapter: Adapter | None) -> TrainModel:
    model = causal_lm(name)
    if adapter is not None:
        lora.attach_lora(model, adapter, seed=1)
        for _, layer in lora.loras(model):  # with B = 0 the gradient of A would be zero
            nn.init.normal_(layer.lora_B, std=0.3)
    return rooted(model).double()


def batch(lengths: tuple[int, ...] = (5, 12, 3, 20)) -> Batch:
    torch.manual_seed(3)
    n = sum(lengths)
    ids, targets = torch.randint(3, 127, (2, 1, n))
    targets[0, ::3] = -100
    positions = torch.cat([torch.arange(m) for m in lengths]).unsqueeze(0)
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Batch(
        ids, positions, targets, edges, max(lengths), n, int((targets != -100).sum()), len(lengths)
    )


def gradients(root: TrainModel) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(11)  # of dropout
    loss = root(batch()).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in root.trained_parameters() if p.grad is not None
    }


def difference(got: Tensor, expected: Tensor) -> float:
    assert expected.abs().max() > 1e-6, "a zero reference proves nothing"
    return float((gathered(got) - expected).abs().max() / expected.abs().max())


def differences(
    root: TrainModel, partial: frozenset[str], mesh: Mesh, alone: TrainModel
) -> list[float]:
    """Of the loss and of each gradient."""
    (loss, wanted), (cut_loss, grads) = gradients(alone), gradients(root)
    reduce_gradients(grads, partial, mesh)
    assert grads.keys() == wanted.keys()
    assert len(grads) >= 12
    return [difference(cut_loss, loss), *(difference(grads[name], wanted[name]) for name in wanted)]


def compare() -> dict[str, float]:
    with join_ranks() as ranks:
        mesh, found = Mesh.of(MeshShape(tensor=ranks.world), "cpu"), {}
        for name, adapter, recomputed in CASES:
            root = build(name, adapter)
            partial = apply_tensor_parallel(root, mesh)
            recompute_layers(root.layers, recomputed)
            found[f"{name}, {adapter}, {recomputed}"] = max(
                differences(root, partial, mesh, build(name, adapter))
            )
        return found


def assert_small(found: list[dict[str, float]], count: int) -> None:
    for of_rank in found:
        assert len(of_rank) == count
        assert {case: value for case, value in of_rank.items() if not value < TOLERANCE} == {}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_the_loss_and_gradients_are_those_of_one_rank(world):
    assert_small(run_ranks(world, compare), len(CASES))


def scored() -> dict[str, float]:
    with join_ranks():
        results = []
        for cut in (True, False):
            root = build("llama-odd", None)
            root.logit_rule = Head(3.0, 0.7)
            if cut:
                apply_tensor_parallel(root, Mesh.of(MeshShape(tensor=2), "cpu"))
            losses, hits = root.token_scores(batch())
            index, targets = supervised_positions(batch())
            logprobs = root.logprobs(root.hidden(batch()).index_select(0, index), targets)
            (logprobs * torch.linspace(-1, 2, len(index))).sum().backward()
            results.append([losses, hits.double(), logprobs, root.head.weight.grad])
        names = ("losses", "hits", "logprobs", "gradient of the head")
        return {name: difference(*pair) for name, *pair in zip(names, *results, strict=True)}


def test_validation_and_logprobs_are_those_of_one_rank():
    assert_small(run_ranks(2, scored), 4)


def refused() -> list[str]:
    with join_ranks():
        mesh, texts = Mesh.of(MeshShape(tensor=4), "cpu"), []

        def attempt(model: PreTrainedModel, *attention: str) -> None:
            try:
                apply_tensor_parallel(rooted(model, *attention), mesh)
            except TunesmithError as error:
                texts.append(error.text())

        packed = causal_lm("llama")  # 192 and 64 columns: 3 blocks and 1
        replace_by_codes(packed, Nf4(torch.float32), torch.float32)
        attempt(packed)
        attempt(causal_lm("llama"), "eager")
        headed = causal_lm("llama")
        lora.attach_lora(headed, Adapter(target=("lm_head",)), seed=1)
        attempt(headed)
        return texts


def test_what_cannot_be_cut_is_refused_with_the_reason():
    blocks, eager, head = run_ranks(4, refused)[0]
    assert holds(blocks, "1 nf4", "self_attn.o_proj")
    assert error_in(eager).where == "model.attention"
    assert error_in(head).where == "adapter.target"


def compiled() -> tuple[float, list[int]]:
    """The largest difference, and the graphs that batches of other lengths add."""
    with join_ranks():
        root, mesh = build("qwen3", ADAPTER), Mesh.of(MeshShape(tensor=2), "cpu")
        partial = apply_tensor_parallel(root, mesh)
        recompute_layers(root.layers, 2)
        compile_layers(root.layers, varied=True, backend="aot_eager")
        largest, graphs = max(differences(root, partial, mesh, build("qwen3", ADAPTER))), []
        for lengths in ((7, 9, 8), (30, 2), (6, 4, 4)):
            before = graphs_compiled()
            root(batch(lengths)).loss.backward()
            graphs.append(graphs_compiled() - before)
        return largest, graphs


@pytest.mark.nightly
def test_compiled_layers_are_equal_and_take_any_length():
    for largest, (_, *later) in run_ranks(2, compiled):
        assert largest < TOLERANCE
        # The first batch of another length makes the number of tokens a variable
        assert later == [0, 0]
