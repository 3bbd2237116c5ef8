"""Kernels and bytes of one decoder layer, counted without a GPU on the graphs that torch.compile makes of it.

    python benchmarks/count_kernels.py [--shape llama3-8b] [--tokens 16384] [--json FILE]
    PYTHONPATH=OTHER_CHECKOUT/src python benchmarks/count_kernels.py ...        # another version of the package

One layer of the true shape is traced with fake tensors, as training compiles it: Dynamo, the joint graph, its partition
into forward and backward, Inductor's passes and its fusion by the rules of Triton. What an operator of ours launches
inside is found by running its arithmetic on fake tensors. A kernel is counted with the bytes of its inputs and outputs,
each once: what a perfect cache would move. Of matrix products the operations are counted too, attention's are not.
The time is a forecast for an H200: each kernel takes as long as its operations at RATE or its bytes at BANDWIDTH, and
LAUNCH at least.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    _recursive_record_original_output_strides,
    compile_fx,
    fake_tensor_prop,
)
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig

from tunesmith.adapter import lora
from tunesmith.build_model import define_model
from tunesmith.config.schema import Adapter, Data, Model, Run, Source, Train
from tunesmith.model import attention
from tunesmith.model.documents import Documents
from tunesmith.model.load import materialise
from tunesmith.model.shapes import find_shape
from tunesmith.optim.weight_gradients import accumulate_in_fp32
from tunesmith.quant import frozen_matmul
from tunesmith.runtime.compilation import compile_layers
from tunesmith.runtime.recompute import recompute_layers

RATE = {"bf16": 790e12, "8 bit": 1.9 * 790e12}  # operations/s; bf16 was measured on 8192^3
BANDWIDTH = 4.3e12  # bytes/s
LAUNCH = 2.5e-6  # seconds that the shortest kernel occupies the GPU
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "_scaled_mm", "_int_mm")
EIGHT_BIT = {"fp8": "fp8 row-wise", "int8": "int8 rotated"}
# Operators that launch nothing: memory without values, and other names for a tensor.
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "lift_fresh")
# FlashAttention has no CPU kernel. These stand for it: a kernel forward, and backward the row sums of dO * O, the
# gradients, and dq's conversion.
ATTENTION = {"count::attention": 1, "count::attention_backward": 3}

# Fused as for a GPU: by Triton's rules, and `cat` computed where it is used.
INDUCTOR = inductor.patch(cpu_backend="triton", force_pointwise_cat=True)


@torch.library.custom_op("count::attention", mutates_args=())
def counted_attention(q: Tensor, k: Tensor, v: Tensor, edges: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("count::attention_backward", mutates_args=())
def counted_attention_backward(d: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, edges: Tensor) -> list[Tensor]:
    return [torch.empty_like(t) for t in (q, k, v)]


counted_attention.register_fake(lambda q, k, v, edges: torch.empty_like(q))
counted_attention_backward.register_fake(lambda d, q, k, v, out, edges: [torch.empty_like(t) for t in (q, k, v)])
counted_attention.register_autograd(
    lambda ctx, d: (*counted_attention_backward(d, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], output, inputs[3]),
)


def attention_of_cuda(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, *_: Any, **__: Any) -> Tensor:
    """In the place of torch's varlen_attn."""
    out: Tensor = counted_attention(q, k, v, edges)
    return out


@dataclass
class Count:
    """What one layer launches in one direction; tera_operations are those of matrix products, `ms` leaves out attention."""

    kernels: int = 0
    products: int = 0
    gib: float = 0.0
    tera_operations: float = 0.0
    ms: float = 0.0

    def add(self, size: int, *, operations: int = 0, rate: float = 1.0) -> None:
        """One kernel that reads and writes `size` bytes."""
        self.kernels += 1
        self.products += operations > 0
        self.gib += size / 2**30
        self.tera_operations += operations / 1e12
        self.ms += 1e3 * max(operations / rate, size / BANDWIDTH, LAUNCH)


def bytes_of(*values: Any) -> int:
    return sum(int(t.numel()) * t.itemsize for t in tensors_of(*values))


def tensors_of(*values: Any) -> list[Tensor]:
    return [t for t in tree_flatten(values)[0] if isinstance(t, Tensor)]


def product_operations(name: str, tensors: list[Tensor]) -> int:
    """2 m n k of a matrix product by the name of its operator, else 0; `tensors` are its matrices, the summand first."""
    if name not in PRODUCTS:
        return 0
    a, b = tensors[1:3] if name.startswith("addmm") else tensors[:2]
    return 2 * int(a.numel()) * (int(b.numel()) // int(a.shape[-1]))


class Launches(TorchDispatchMode):
    """Counts the kernels of the operators that are called below it."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not view and space != "prim" and name not in NO_KERNEL:
            given = tensors_of(args, kwargs)
            rate = RATE["8 bit" if given[0].itemsize == 1 else "bf16"]
            self.count.add(bytes_of(given, out), operations=product_operations(name, given), rate=rate)
        return out


class Counter:
    """A backend of torch.compile that counts what Inductor would launch, and answers with the plain graph."""

    def __init__(self) -> None:
        self.counts: dict[str, Count] = {}

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(module, inputs, inner_compile=self.inner)

    def inner(self, module: torch.fx.GraphModule, inputs: Any, *, is_backward: bool = False, **_: Any) -> Any:
        count = self.counts.setdefault("backward" if is_backward else "forward", Count())
        mode = detect_fake_mode(inputs)
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            fake_tensor_prop(module, inputs)
            _recursive_record_original_output_strides(module)
            _recursive_post_grad_passes(module, is_inference=False)
            fake_tensor_prop(module, inputs)
            for node in module.graph.nodes:
                count_operator(node, count, mode)
            graph = GraphLowering(module, inputs, shape_env=mode.shape_env, is_backward=is_backward)
            with V.set_graph_handler(graph):
                graph.run(*inputs)
                graph._update_scheduler()
                for fused in graph.scheduler.nodes:
                    if not isinstance(fused.node, ir.ExternKernel | ir.MultiOutput):  # these are counted above
                        count.add(int(fused.get_read_write_buffers_sizes()))
        return make_boxed_func(module.forward)


def count_operator(node: torch.fx.Node, count: Count, mode: FakeTensorMode) -> None:
    """A library's product, attention, or what one of our own operators launches inside."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if schema.name in ATTENTION:
        count.kernels += ATTENTION[schema.name]
        count.gib += bytes_of(args, node.meta["val"]) / 2**30
        return
    if schema.name == "tunesmith::add_weight_gradient":  # one product on a GPU, which reads what it adds to
        gradient, _, dy, x = args
        count.add(bytes_of(gradient, gradient, dy, x), operations=2 * gradient.numel() * len(dy), rate=RATE["bf16"])
        return
    space, name = schema.name.split("::")
    run: Callable[..., Any] = node.target  # type: ignore[assignment]
    if space == "tunesmith":
        run = OPDEFS[schema.name]._init_fn
    elif name not in PRODUCTS:
        return
    with mode, Launches(count), torch.no_grad():
        run(*args, **kwargs)


def recipe(base: str, *, full: bool, fast_paths: tuple[str, ...]) -> Run:
    """What `define_model` needs of a recipe; `base` is bf16 or a value of model.quantize."""
    train: dict[str, Any] = {"fast_paths": fast_paths} if fast_paths else {}
    return Run(
        model=Model(name="shape", quantize="none" if base == "bf16" else base),
        data=Data(train=(Source(source="rows.jsonl"),)),
        adapter=Adapter(kind="none" if full else "lora"),
        train=Train(**train),
        output_dir="out",
    )


def count_layer(shape: str, run: Run, *, tokens: int, recomputed: bool) -> dict[str, Count]:
    """Launches of one layer of `shape`, forward and backward, on a micro batch of `tokens`."""
    config = AutoConfig.for_model(**{**find_shape(shape).config, "num_hidden_layers": 1})
    torch.compiler.reset()
    counter, fake = Counter(), FakeTensorMode(allow_non_fake_inputs=True)
    model = define_model(run, SimpleNamespace(config=config, vocab_rows=config.vocab_size))  # type: ignore[arg-type]
    if "fp32-weight-gradients" in run.train.fast_paths:
        accumulate_in_fp32(model.model.layers)
    # A CPU multiplies dB in another order, and copies it.
    b_of_cuda = patch.object(frozen_matmul, "gradient_of_b", lambda dy, xa: dy.T @ xa, create=True)
    with fake, patch.object(attention, "varlen_attn", attention_of_cuda), b_of_cuda, INDUCTOR:
        materialise(model, torch.device("cpu"))
        for name, p in model.named_parameters():  # made outside the mode
            module, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(module, key, torch.nn.Parameter(fake.from_tensor(p), requires_grad=p.requires_grad))
        if "joined-weights" in run.train.fast_paths:
            lora.join_weights(model, torch.device("cpu"))
        if run.model.quantize in EIGHT_BIT:
            convert = getattr(lora, "convert_to_eight_bit", None) or lora.convert_to_fp8  # an older name
            convert(model, EIGHT_BIT[run.model.quantize])
        model.train().set_attn_implementation(attention.register())
        layers = model.model.layers
        recompute_layers(layers, len(layers) * recomputed)
        compile_layers(layers, varied=False, backend=counter)
        hidden = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        rotary = tuple(torch.empty(1, tokens, config.head_dim, dtype=torch.bfloat16) for _ in range(2))
        edges = torch.empty(81, dtype=torch.int32)
        out = layers[0](hidden, position_embeddings=rotary, documents=Documents(edges, 2048, "varlen"))
        out.backward(torch.empty_like(out))
    return counter.counts


def main() -> None:
    """One table: a row for each base, with and without recompute."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="llama3-8b")
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--bases", nargs="+", default=["bf16", "fp8", "nf4"])
    p.add_argument("--full", action="store_true", help="full fine-tuning: no adapter, all weights trained")
    p.add_argument("--fast-paths", nargs="+", default=[])
    p.add_argument("--json")
    a = p.parse_args()
    found: dict[str, Any] = {}
    print(f"{'a layer of ' + a.shape:32} {'kernels':>8} {'products':>8} {'GiB':>8} {'TFLOP':>8} {'ms':>8}")
    for base in a.bases:
        for recomputed in (False, True):
            run = recipe(base, full=a.full, fast_paths=tuple(a.fast_paths))
            counts = count_layer(a.shape, run, tokens=a.tokens, recomputed=recomputed)
            for direction, c in counts.items():
                row = f"{base}{', recomputed' * recomputed}, {direction}"
                found[row] = dataclasses.asdict(c)
                print(
                    f"{row:32} {c.kernels:8} {c.products:8} {c.gib:8.2f} {c.tera_operations:8.2f} {c.ms:8.2f}",
                    flush=True,
                )
    if a.json:
        with open(a.json, "w") as file:
            json.dump({"shape": a.shape, "tokens": a.tokens, "counts": found}, file, indent=1)


if __name__ == "__main__":
    main()
