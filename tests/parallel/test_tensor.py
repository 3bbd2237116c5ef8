"""A model that is cut over ranks against the same model in one process, in float64: loss,
gradients, updates, scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from devices import graphs_compiled
from errors import error_in, holds, refuses
from ranks import gathered, run_ranks
from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter, MethodConfig, Model, Train
from tunesmith.data.batches.batch import Batch
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import TunesmithError
from tunesmith.formats.base import FrozenWeight
from tunesmith.formats.dense import DENSE_FORMAT
from tunesmith.formats.fp8 import Fp8
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.matmul import grouped_matmul
from tunesmith.formats.nf4 import Nf4
from tunesmith.formats.scaled_matmul import ROW_WISE
from tunesmith.methods import make_method
from tunesmith.methods.base import TrainModel, supervised_positions
from tunesmith.model import load
from tunesmith.model.decoder import Head
from tunesmith.model.fused import fuse_modules
from tunesmith.model.weights import copy_full_tensor, load_weights
from tunesmith.optim.optimizer import Optimizer
from tunesmith.parallel.mesh import Mesh, MeshShape
from tunesmith.parallel.tensor import apply_tensor_parallel, reduce_gradients
from tunesmith.planning import compare_eight_bit
from tunesmith.planning.compare_eight_bit import compare_with_bf16, read_dense_weight
from tunesmith.quant.linear_layers import load_hooks
from tunesmith.quant.replace import convert_to_eight_bit, replace_by_codes
from tunesmith.runtime.compilation import compile_layers
from tunesmith.runtime.recompute import recompute_layers

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
# Whole ones of nf4 on each of two ranks
OF_BLOCKS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-odd": {"vocab_size": 127, "tie_word_embeddings": True},  # as where tokens were added
    "llama-heads": {"num_key_value_heads": 8},
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
SAVED = Adapter(rank=4, alpha=8.0, modules_to_save=("embed_tokens", "norm"))
PARTLY = Adapter(rank=4, alpha=8.0, target=("q_proj", "o_proj", "up_proj"))
# Model, adapter, recomputed layers.
CASES = [
    ("llama", None, 0), ("llama-tied", None, 2), ("llama-odd", None, 0), ("qwen2", None, 0), ("qwen3", None, 1),
    ("mistral", None, 0), ("llama", ADAPTER, 1), ("llama-odd", ADAPTER, 0), ("qwen2", PARTLY, 0), ("qwen3", ADAPTER, 0),
    ("mistral", DROPPED, 2), ("smollm3", ADAPTER, 0), ("llama-biases", None, 1), ("llama-biases", ADAPTER, 0),
]  # fmt: skip


def causal_lm(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A model with drawn weights, norms and biases: the same each time."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        name.partition("-")[0], **{**SMALL, **MODELS.get(name, {}), **changes}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def rooted(model: PreTrainedModel, **options: Any) -> TrainModel:
    fuse_modules(model, project=lora.project)
    return TrainModel(
        model, make_method(MethodConfig()), **{"attention_backend": "products", **options}
    ).train()


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
    root: TrainModel, partial: frozenset[str], mesh: Mesh, alone: TrainModel, copies: int = 1
) -> list[float]:
    """Of the loss and of each gradient, which is the sum of `copies` ranks' for the same batch."""
    (loss, wanted), (cut_loss, grads) = gradients(alone), gradients(root)
    reduce_gradients(grads, partial, mesh)
    assert grads.keys() == wanted.keys()
    assert len(grads) >= 12
    return [
        difference(cut_loss, loss),
        *(difference(grads[name] / copies, wanted[name]) for name in wanted),
    ]


def compare(tensor: int, cases: list[tuple[str, Adapter | None, int]]) -> dict[str, float]:
    with join_ranks():
        mesh, found = Mesh.of(MeshShape(tensor=tensor), "cpu"), {}
        for name, adapter, recomputed in cases:
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


def test_two_ranks_have_the_loss_and_gradients_of_one():
    assert_small(run_ranks(2, compare, 2, CASES), len(CASES))


def test_four_ranks_have_the_loss_and_gradients_of_one():
    cases = [
        ("llama-odd", None, 1),
        ("qwen3", None, 0),
        ("qwen3", ADAPTER, 1),
        ("mistral", DROPPED, 0),
    ]
    assert_small(run_ranks(4, compare, 4, cases), len(cases))


@pytest.mark.slow
def test_eight_ranks_have_the_loss_and_gradients_of_one():
    cases = [("llama-heads", ADAPTER, 1)]
    assert_small(run_ranks(8, compare, 8, cases), len(cases))


def sharded() -> dict[str, float]:
    """Shard 2 x tensor 2: `fully_shard` of the parameters that are DTensors already."""
    with join_ranks():
        mesh, found = Mesh.of(MeshShape(1, 2, 2), "cpu"), {}
        for name, adapter in (("llama-odd", None), ("qwen3", ADAPTER)):
            root = build(name, adapter)
            partial = apply_tensor_parallel(root, mesh)
            ignored = {p for _, p in root.trained_parameters()} if adapter else set()
            for module in (*root.layers, root):
                fully_shard(module, mesh=mesh.sharding, ignored_params=ignored)
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)
            whole = causal_lm(name).state_dict()
            for key, weight in root.model.named_parameters():
                if not adapter:
                    found[f"{name} {key}"] = difference(weight.detach(), whole[key])
            alone = build(name, adapter)
            # The two data ranks take the same batch; only gradients that FSDP reduces are their
            # sum.
            found[name] = max(differences(root, partial, mesh, alone, copies=1 if adapter else 2))
        return found


def test_cut_parameters_are_sharded_further():
    found = run_ranks(4, sharded)
    assert_small(found, len(found[0]))
    assert len(found[0]) > 20


def updated(adapter: Adapter | None) -> dict[str, float]:
    """The norm and the weights after two clipped updates."""
    train = Train(learning_rate=1e-2, clip_norm=0.5, weight_decay=0.1, compile="off")
    with join_ranks():
        mesh, roots, norms = Mesh.of(MeshShape(tensor=2), "cpu"), [], []
        for cut in (True, False):
            root = build("qwen3", adapter)
            partial = apply_tensor_parallel(root, mesh) if cut else frozenset()
            optimizer = Optimizer(root.trained_parameters(), train)
            for step in range(2):
                optimizer.start_step(1e-2, step)
                gradients(root)
                grads = optimizer.gradients()
                reduce_gradients(grads, partial, mesh)
                norms.append(optimizer.step())
            roots.append(dict(root.trained_parameters()))
        cut_root, alone = roots
        found = {name: difference(cut_root[name].detach(), alone[name].detach()) for name in alone}
        return {**found, "norms": difference(torch.stack(norms[:2]), torch.stack(norms[2:]))}


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
def test_the_optimizer_clips_and_updates_as_on_one_rank(adapter):
    found = run_ranks(2, updated, adapter)
    # Its scalars are fp32, the same ones on both sides.
    assert_small(found, len(found[0]))
    assert len(found[0]) > 12


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


def loaded() -> dict[str, float]:
    """As a run builds a model: cut on meta, its memory, its weights, an adapter that is drawn."""
    with join_ranks():
        alone = build("qwen3", SAVED)
        lora.init_lora(alone.model, SAVED, seed=5)
        model = load.build_on_meta(alone.model.config, Model(name="x", dtype="fp32"))
        lora.attach_lora(model, SAVED, seed=5)
        root = rooted(model)
        mesh = Mesh.of(MeshShape(tensor=2), "cpu")
        partial = apply_tensor_parallel(root, mesh)
        assert all(p.is_meta for p in model.parameters())
        load.materialize(root.double(), torch.device("cpu"))
        whole = dict(alone.model.named_parameters())
        for name, parameter in model.named_parameters():
            if not lora.is_adapter_weight(name):
                copy_full_tensor(parameter.detach(), whole[name].detach())
        lora.init_lora(model, SAVED, seed=5)
        found = {
            name: difference(p, whole[name])
            for name, p in model.named_parameters()
            if "lora_A" in name
        }
        for each in (alone, root):
            for name, parameter in each.trained_parameters():
                if "lora_B" in name:
                    copy_full_tensor(
                        parameter.detach(), torch.full(parameter.shape, 0.1, dtype=torch.float64)
                    )
        return {**found, "gradients": max(differences(root, partial, mesh, alone))}


def test_a_model_is_cut_on_meta_and_its_adapter_drawn_whole():
    assert_small(run_ranks(2, loaded), 2 * 7 + 1)


def quantized(folder: Path) -> tuple[int, float]:
    """The 4-bit and the 8-bit weights of each part, against those of the whole layers."""
    with join_ranks() as ranks:
        mesh, rank = Mesh.of(MeshShape(tensor=2), "cpu"), dist.get_rank()
        dense = causal_lm("llama", torch.bfloat16, **OF_BLOCKS)
        model, whole = (
            load.build_on_meta(dense.config, Model(name="x", dtype="bf16")) for _ in range(2)
        )
        replace_by_codes(model, Nf4(torch.bfloat16), torch.bfloat16)
        lora.attach_lora(model, ADAPTER, seed=1)
        replace_by_codes(whole, Nf4(torch.bfloat16), torch.bfloat16)
        apply_tensor_parallel(rooted(model), mesh)
        for each in (model, whole):
            load.materialize(each, torch.device("cpu"))
        count, nested = 0, []
        for name, layer in whole.named_modules():
            if isinstance(layer, FrozenLinear):
                weight, part = dense.get_submodule(name).weight.detach(), model.get_submodule(name)
                layer.load({"": weight}, name)
                part.load({"": weight}, name)
                own = layer.dense().chunk(2, 1 if name.endswith(("o_proj", "down_proj")) else 0)[
                    rank
                ]
                assert torch.equal(part.dense(), own), name
                nested.append(part.format.nested_block > 0)
                count += 1
        assert any(nested), "no part has scales in one piece"
        assert not all(nested)
        expected = rooted(dense.requires_grad_(False))(batch()).loss
        eight = load.build_on_meta(dense.config, Model(name="x", dtype="bf16"))
        lora.attach_lora(eight, ADAPTER, seed=1)
        count += convert_to_eight_bit(eight, ROW_WISE)
        root = rooted(eight)
        apply_tensor_parallel(root, mesh)
        load.materialize(eight, torch.device("cpu"))
        load_weights(eight, folder, skip=lora.is_adapter_weight, convert=load_hooks(eight))
        lora.init_lora(eight, ADAPTER, seed=1)
        for name, layer in eight.named_modules():
            if isinstance(layer, FrozenLinear) and has_codes(layer):
                whole_weight = dense.get_submodule(name).weight
                part = whole_weight.chunk(2, 1 if name.endswith(("o_proj", "down_proj")) else 0)[
                    rank
                ]
                assert torch.equal(layer.dense(), Fp8(ROW_WISE).round(part).dense(torch.bfloat16))
                assert torch.equal(read_dense_weight(layer, mesh, ranks), part), name
        change = compare_with_bf16(root, [batch()], mesh, ranks)
        after, denominator = root(batch())[:2]
        # Sums in bf16
        assert change.exact * denominator == pytest.approx(float(expected), rel=2**-8)
        assert change.rounded * denominator == pytest.approx(float(after), rel=1e-6)
        return count, change.relative


def test_weights_are_cut_and_then_quantized(tmp_path):
    pytest.importorskip("bitsandbytes")
    causal_lm("llama", torch.bfloat16, **OF_BLOCKS).save_pretrained(tmp_path)
    for count, change in run_ranks(2, quantized, tmp_path):
        assert count == 4 * 7
        assert abs(change) < compare_eight_bit.MAX_LOSS_CHANGE


def refused() -> list[str]:
    with join_ranks():
        mesh, texts = Mesh.of(MeshShape(tensor=4), "cpu"), []

        def attempt(model: PreTrainedModel, **options: Any) -> None:
            try:
                apply_tensor_parallel(rooted(model, **options), mesh)
            except TunesmithError as error:
                texts.append(error.text())

        attempt(causal_lm("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=6))
        packed = causal_lm("llama")  # 192 and 64 columns: 3 blocks and 1
        replace_by_codes(packed, Nf4(torch.float32), torch.float32)
        attempt(packed)
        attempt(causal_lm("phi3"))
        attempt(causal_lm("glm4"))
        changed = causal_lm("llama")
        changed.config.base_model_tp_plan = {
            **changed.config.base_model_tp_plan,
            "layers.*.self_attn.q_proj": "rowwise",
        }
        attempt(changed)
        attempt(causal_lm("llama"), attention_backend="eager")
        headed = causal_lm("llama")
        lora.attach_lora(headed, Adapter(target=("lm_head",)), seed=1)
        attempt(headed)
        fine = rooted(causal_lm("llama"))
        plan = fine.model.config.base_model_tp_plan  # Transformers 5.17 names a tied embedding
        fine.model.config.base_model_tp_plan = {**plan, "embed_tokens": "embedding_rowwise"}
        apply_tensor_parallel(fine, mesh)
        weight = fine.layers[0].mlp.up_proj.weight
        assert isinstance(weight, DTensor)
        with pytest.raises(AssertionError):
            grouped_matmul(
                torch.zeros(1, 64), [FrozenWeight(DENSE_FORMAT, [weight], (192, 64))], [None]
            )
        with refuses(AssertionError, names=["4 tokens"]):
            fine(batch((5,)))
        return texts


def test_what_cannot_be_cut_is_refused_with_the_reason():
    sizes, blocks, *families, eager, head = run_ranks(4, refused)[0]
    assert "6 key-value heads" in sizes
    assert holds(error_in(sizes).fix, "parallel.tensor: 1", "divisor of 6")
    assert holds(blocks, "1 nf4", "self_attn.o_proj")
    assert len(families) == 3
    for text in families:
        assert error_in(text).where == "parallel.tensor"
        assert holds(error_in(text).fix, "parallel.shard")
    assert error_in(eager).where == "model.attention"
    assert error_in(head).where == "adapter.target"


def compiled() -> tuple[float, list[int]]:
    """The largest difference, and the graphs that batches of other lengths add."""
    with join_ranks():
        root, mesh = build("qwen3", ADAPTER), Mesh.of(MeshShape(tensor=2), "cpu")
        partial = apply_tensor_parallel(root, mesh)
        # Plain ones would be another kind to compile; `test_compilation.py` has both
        recompute_layers(root.layers, 2)
        compile_layers(root.layers, varied=True, backend="aot_eager")
        largest, graphs = max(differences(root, partial, mesh, build("qwen3", ADAPTER))), []
        for lengths in ((7, 9, 8), (30, 2), (6, 4, 4)):
            before = graphs_compiled()
            root(batch(lengths)).loss.backward()
            graphs.append(graphs_compiled() - before)
        return largest, graphs


@pytest.mark.slow
def test_compiled_layers_are_equal_and_take_any_length():
    for largest, (_, *later) in run_ranks(2, compiled):
        assert largest < TOLERANCE
        # The first batch of another length makes the number of tokens a variable
        assert later == [
            0,
            0,
        ]
